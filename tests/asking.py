"""Ways to ask, and what comes of it: of daemons, of their parts in this thread, or of the Postfix before them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import smtplib
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from servers import LogLine, Policyd, Postfix, numbers, read_settings, request_bytes, wait_until
from stores import Clock, KeptLog, Store

from policyd import Daemon, Journal, Policy, Recorder, Settings, SQLiteRepository, Watch, parse_request

CONNECTIONS = 16
BEGINS = "ERROR while UPDATING db: "
ENDS = re.compile(r"ERROR while UPDATING db: over after (\d+) s, (\d+) events replayed")
BACK_S = 60  # until a store is used again: promised are 15 s; a cluster needs 5 s more, and a busy machine the rest


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


def reload(daemon: Policyd) -> None:
    """Send SIGHUP and wait until it has been acted upon.

    systemd is told as sd_notify(3) asks: when it begins, by the monotonic clock, and when it is over, in any case.
    """
    number = len(daemon.notify.messages())
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: any("RELOADING=1" in message for message in daemon.notify.messages()[number:-1]), "it is over")
    told = "\0".join(daemon.notify.messages()[number:])
    assert re.search(r"RELOADING=1\nMONOTONIC_USEC=[0-9]{6,}\0READY=1\nWATCHDOG=1\nSTATUS=", told), told


def status(daemon: Policyd) -> LogLine:
    pattern = re.compile(r": \d+ requests: ")
    before = sum(bool(pattern.search(message)) for message in daemon.syslog.messages())
    daemon.signal(signal.SIGUSR1)
    return daemon.wait_for_log(pattern, count=before + 1)


def complaints(daemon: Policyd) -> list[str]:
    return [line.text for line in daemon.lines_so_far() if line.level != "info"]


def a_request(**attributes: object) -> Any:
    return parse_request(request_bytes(**{"queue_id": "4Xk1Zt", **attributes})[:-2])


def tell(recorder: Recorder) -> None:
    """Do what the teller's thread does with what waits for it."""
    recorder._told.put(None)
    recorder.tell()


class Relay:
    """One relay without threads, in front of a store: what is asked has been counted when ask() returns.

    `told` is what on_stop= would be told; `clock` is that of what is remembered and of the sweep.
    """

    def __init__(self, store: Store, logged: KeptLog, *lines: str, repository: Any = None) -> None:
        settings = read_settings(*lines)
        self.clock = Clock()
        self.told: list[dict[str, Any]] = []
        self._logged = logged
        self._repository = repository = repository or store.another()
        self._directory = tempfile.TemporaryDirectory()
        journal = Journal(SQLiteRepository(f"{self._directory.name}/journal.sqlite3"))
        # Its deadlines are such that no machine is too busy for them.
        self.recorder = Recorder(repository, journal, settings, lambda: time.monotonic() + 60)
        self.recorder.watch = Watch(repository, self.clock)
        journal.look()
        self.recorder.look_for_store()
        self.policy = Policy(self.recorder, self.told.append)
        self._logged.lines.clear()

    def reload(self, *lines: str) -> None:
        self.recorder.settings = read_settings(*lines)

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
        self.policy.sweep(self._repository, self.clock)
        return [line.text for line in self._logged.lines[before:]]


class Reply(NamedTuple):
    code: int
    reply: str
    subject: str

    @property
    def queue_id(self) -> str:
        match = re.search(r"queued as (\w+)", self.reply)
        assert match, self
        return match[1]


def send(
    session: smtplib.SMTP, sender: str = "alice@example.org", recipients: int = 1, domain: str = "example.net",
    parameter: str = "", text: str = "",
) -> Reply:  # fmt: skip
    """Send a message, with a subject of its own unless there is a text; `parameter` goes to its recipients."""
    subject = f"message {next(numbers)} of the tests"
    replies = [session.docmd(f"MAIL FROM:<{sender}>")]
    replies += [session.docmd(f"RCPT TO:<rcpt{n}@{domain}> {parameter}".rstrip()) for n in range(recipients)]
    assert {code for code, _ in replies} == {250}, replies
    code, reply = session.data(text or f"Subject: {subject}\r\n\r\nHello\r\n")
    return Reply(code, reply.decode(), subject)


def submit(postfix: Postfix, port: int | None = None, recipients: int = 1, login: bool | str = True) -> Reply:
    """Send one message in a session of its own."""
    with postfix.session(port, login) as session:
        return send(session, recipients=recipients)


def wait_for_delivery(postfix: Postfix, reply: Reply) -> None:
    assert reply.code == 250, reply
    wait_until(lambda: any(reply.subject in text for text in postfix.delivered()), f"{reply} is delivered")


@contextlib.contextmanager
def running_here(settings_file: Path) -> Iterator[Daemon]:
    """Run a daemon in this process, so that time can be made short; what it logs is in the fixture `logged`."""
    daemon = Daemon(Settings.from_file(str(settings_file)))
    thread = threading.Thread(target=daemon.run, daemon=True)
    thread.start()
    try:
        yield daemon
    finally:
        os.write(daemon.wakeup, bytes([signal.SIGTERM]))
        thread.join()


class Answer(NamedTuple):
    asked: float  # monotonic
    took: float  # seconds
    action: str


def answers(daemon: Policyd, messages: Iterable[dict[str, Any]]) -> Iterator[Answer]:
    """Ask about the messages one after the other on a connection of its own; yield the answers."""
    with daemon.connect() as connection:
        for message in messages:
            asked = time.monotonic()
            action = connection.ask(**message)
            yield Answer(asked, time.monotonic() - asked, action)


def send_at_once(daemons: list[Policyd], messages: list[dict[str, Any]]) -> list[str]:
    """Ask about the messages over many connections, dealt out over the daemons; return the answers."""
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        sent = threads.map(
            lambda n: [*answers(daemons[n % len(daemons)], messages[n::CONNECTIONS])], range(CONNECTIONS), timeout=60
        )
        return [answer.action for each in sent for answer in each]


class Load:
    """So many clients of each daemon, each on one connection, which ask about one login, with a pause or without."""

    def __init__(self, daemons: list[Policyd], clients: int, login: str = "load", pause_s: float = 0) -> None:
        self.answers: list[Answer] = []
        self._enough = threading.Event()
        self._login, self._pause_s = login, pause_s
        self._threads = ThreadPoolExecutor(len(daemons) * clients)
        self._clients = [self._threads.submit(self._send, daemon) for daemon in daemons for _ in range(clients)]

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: Any) -> None:
        """End, and raise what a client ran into."""
        self._enough.set()
        self._threads.shutdown()
        for client in self._clients:
            client.result()

    def _send(self, daemon: Policyd) -> None:
        for answer in answers(daemon, itertools.repeat({"sasl_username": self._login})):
            self.answers.append(answer)
            if self._enough.wait(self._pause_s):
                return

    def wait_for_more(self, number: int) -> None:
        """Wait until so many more have been answered; nobody may have come to an end."""
        goal = len(self.answers) + number
        wait_until(lambda: len(self.answers) >= goal, f"{number} answers")
        assert not any(client.done() for client in self._clients)


def errors(daemon: Policyd) -> list[LogLine]:
    return [line for line in daemon.log_lines() if line.level == "err"]


def end_of_outage(daemon: Policyd) -> int:
    """Wait for the line that tells the end of the outage; return the number of events replayed."""
    end = daemon.wait_for_log(ENDS, BACK_S)
    assert (end.facility, end.level) == ("daemon", "err")
    return int(ENDS.fullmatch(end.text)[2])  # type: ignore[index]
