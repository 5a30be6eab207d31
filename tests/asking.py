"""Ways to ask, and what comes of it: of a daemon, of its parts in this thread, or of the Postfix before it."""

from __future__ import annotations

import re
import signal
import smtplib
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from recorders import tell
from servers import LogLine, Policyd, Postfix, numbers, request_bytes, wait_until
from stores import Clock, KeptLog, Store, read_settings

from policyd import Housekeeper, Journal, Policy, Recorder, Repository, SQLiteRepository, Watch, parse_request


class Outcome(NamedTuple):
    """What policyd answered, and the lines it logged about it."""

    answer: str
    lines: list[str]


def ask(daemon: Policyd, login: str, **attributes: object) -> Outcome:
    before = len(daemon.lines_so_far())
    answer = daemon.ask(**{"sasl_username": login, "queue_id": "4Xk1Zt", **attributes})
    lines = daemon.lines_so_far()[before:]
    assert {line[:4] for line in lines} <= {("daemon", "info", "policyd", daemon.pid)}, lines
    return Outcome(answer, [line.text for line in lines])


def reload(daemon: Policyd) -> list[str]:
    """Send SIGHUP, wait until it has been acted upon, and return what systemd was told when it began and then."""
    number = len(daemon.notify.messages())
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: any("RELOADING=1" in message for message in daemon.notify.messages()[number:-1]), "it is over")
    while "RELOADING=1" not in daemon.notify.messages()[number]:
        number += 1
    return daemon.notify.messages()[number : number + 2]


def status(daemon: Policyd) -> LogLine:
    pattern = re.compile(r": \d+ requests: ")
    before = sum(bool(pattern.search(message)) for message in daemon.syslog.messages())
    daemon.signal(signal.SIGUSR1)
    return daemon.wait_for_log(pattern, count=before + 1)


def complaints(daemon: Policyd) -> list[str]:
    return [line.text for line in daemon.lines_so_far() if line.level != "info"]


def a_request(**attributes: object) -> Any:
    return parse_request(request_bytes(**{"queue_id": "4Xk1Zt", **attributes})[:-2])


class Unrecorded:
    """Stands where the recorder is, and counts nothing."""

    def record(self, *_: object) -> None:
        pass


class Relay:
    """One relay without threads, in front of a store: what is asked has been counted when ask() returns.

    `told` is what on_stop= would be told; `clock` is that of what is remembered and of the sweep.
    """

    def __init__(self, store: Store, logged: KeptLog, *lines: str, repository: Repository | None = None) -> None:
        settings = read_settings(*lines)
        self.clock = Clock()
        self.told: list[dict[str, Any]] = []
        self._logged = logged
        repository = repository or store.another()
        self._directory = tempfile.TemporaryDirectory()
        journal = Journal(SQLiteRepository(f"{self._directory.name}/journal.sqlite3"))
        # Its deadlines are such that no machine is too busy for them.
        self.recorder = Recorder(repository, journal, settings, lambda: time.monotonic() + 60)
        self.recorder.watch = Watch(repository, self.clock)
        journal.look()
        self.recorder.look_for_store()
        self.policy = Policy(settings, self.recorder, self.told.append)
        self._housekeeper = Housekeeper(repository, self.recorder, self.policy, self.clock)
        self._logged.lines.clear()

    def reload(self, *lines: str) -> None:
        self.policy.settings = self.recorder.settings = read_settings(*lines)

    def ask(self, login: str, peer: str = "127.0.0.1", **attributes: object) -> Outcome:
        return self.ask_at_once([{"sasl_username": login, **attributes}], peer)[0]

    def ask_at_once(self, messages: Sequence[dict[str, object]], peer: str = "127.0.0.1") -> list[Outcome]:
        """Ask about messages that are counted as one batch; the lines are those of all."""
        before = len(self._logged.lines)
        answers: list[str] = []
        for message in messages:
            self.policy.answer(a_request(**message), peer, answers.append)
        for _ in range(2):  # what is stopped has an incident to be recorded
            self.recorder.turn()
            tell(self.recorder)
        assert len(answers) == len(messages)
        return [Outcome(answer, [line.text for line in self._logged.lines[before:]]) for answer in answers]

    def sweep(self, after_s: float = 61) -> list[str]:
        """Sweep, so much later than before; return what is logged."""
        self.clock.now += after_s
        before = len(self._logged.lines)
        self._housekeeper.sweep()
        return [line.text for line in self._logged.lines[before:]]


def forgive(store: Store, login: str) -> None:
    """Begin a login's count anew and end its incidents, with the statement of policyd-admin."""
    ours = "sasl_username = %(login)s AND (recipient_count > 0 OR recipient_count IS NULL)"
    statement = f"UPDATE {{table}} SET recipient_count = COALESCE(-recipient_count, 0), ts = ts WHERE {ours}"
    store.another().ask(statement, {"login": login})


class Reply(NamedTuple):
    code: int
    reply: str
    subject: str

    @property
    def queue_id(self) -> str:
        match = re.search(r"queued as (\w+)", self.reply)
        assert match, self
        return match[1]


def send(session: smtplib.SMTP, sender: str = "alice@example.org", recipients: int = 1) -> Reply:
    subject = f"message {next(numbers)} of the tests"
    session.mail(sender)
    for number in range(recipients):
        assert session.rcpt(f"rcpt{number}@example.net")[0] == 250
    code, reply = session.data(f"From: <{sender}>\r\nSubject: {subject}\r\n\r\nHello\r\n")
    return Reply(code, reply.decode(), subject)


def submit(postfix: Postfix, port: int | None = None, recipients: int = 1, login: bool | str = True) -> Reply:
    """Send one message in a session of its own."""
    with postfix.session(port, login) as session:
        return send(session, recipients=recipients)


def wait_for_delivery(postfix: Postfix, reply: Reply) -> None:
    assert reply.code == 250, reply
    wait_until(lambda: any(reply.subject in text for text in postfix.delivered()), f"{reply} is delivered")
