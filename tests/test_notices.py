"""A mail to a human, once: at the first message of a login that is held or refused; nobody waits for it."""

from __future__ import annotations

import contextlib
import email
import email.message
import email.policy
import email.utils
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from daemons import running_here
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripting import SCRIPTS
from servers import START_TIMEOUT_S, Database, Policyd, Postfix, free_port, read_answer, request_bytes, wait_until
from stores import KeptLog

import policyd as module
from policyd import DAY_S, SETTINGS_FILE, Case, Notices, Settings, SQLiteRepository, Trace, describe, post

Start = Callable[..., Policyd]

QUOTA = 10
TO = "postmaster@example.net"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


# ---- the other side: a mail server that can fail ------------------------------------------------------


class Mail(NamedTuple):
    """One mail as it came in."""

    sender: str
    recipients: list[str]
    message: email.message.EmailMessage

    @property
    def subject(self) -> str:
        return str(self.message["Subject"]).strip()  # a long one begins on the next line

    @property
    def login(self) -> str:
        """The login its subject names."""
        return self.subject[len("policyd: ") :].partition(" on ")[0]

    @property
    def text(self) -> str:
        """The body, decoded."""
        return str(self.message.get_content())


def parse_mail(text: bytes) -> email.message.EmailMessage:
    """Return a mail, in which nothing may be wrong."""
    message = email.message_from_bytes(text, policy=email.policy.default)
    assert isinstance(message, email.message.EmailMessage)
    assert not message.defects
    return message


class MailServer(socketserver.ThreadingTCPServer):
    """Takes mail, or fails in the way that `fails` names."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0, fails: str = "") -> None:
        super().__init__(("127.0.0.1", port), MailHandler)
        self.fails = fails
        self.mails: list[Mail] = []
        self.sessions = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        """What notify_server= has."""
        return f"127.0.0.1:{self.server_address[1]}"

    def wait_for(self, number: int) -> list[Mail]:
        """Wait until so many mails are here; return all."""
        wait_until(lambda: len(self.mails) >= number, f"{number} mails have come")
        return list(self.mails)

    def logins(self) -> list[str]:
        """Return the login that each mail is about."""
        return [mail.login for mail in self.mails]


class MailHandler(socketserver.StreamRequestHandler):
    """One session."""

    server: MailServer

    def handle(self) -> None:
        self.server.sessions += 1
        fails = self.server.fails
        if fails == "says nothing":
            self.rfile.read()  # until the other one gives up
            return
        self.say("554 go away" if fails == "greets with a refusal" else "220 mail.example.net ESMTP")
        sender, recipients = "", []
        for line in self.rfile:
            verb, _, rest = line.decode("ascii").rstrip("\r\n").partition(" ")
            verb = verb.lower()
            if verb in ("ehlo", "helo"):
                self.say("250 mail.example.net")
            elif verb in ("mail", "rcpt") and fails == "speaks something else":
                self.say("\x00\xff\x1b[31m")
            elif verb == "mail":
                sender, recipients = rest, []
                self.say("250 2.1.0 Ok")
            elif verb == "rcpt" and fails == "refuses the recipient":
                self.say("550 5.1.1 unknown")
            elif verb == "rcpt":
                recipients.append(rest)
                self.say("250 2.1.5 Ok")
            elif verb == "data":
                self.say("354 go on")
                if fails == "hangs up in DATA":
                    self.rfile.readline()
                    return
                mail = Mail(sender, recipients, parse_mail(self.read_to_the_dot()))
                if fails != "refuses the text":
                    self.server.mails.append(mail)
                self.say("452 4.3.1 disk full" if fails == "refuses the text" else "250 2.0.0 Ok: queued")
            elif verb == "quit" and fails == "refuses to end":
                self.say("421 4.3.0 shutting down")
            elif verb == "quit":
                self.say("221 2.0.0 Bye")
                return
            else:
                self.say("250 2.0.0 Ok")

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(line.encode("latin-1") + b"\r\n")

    def read_to_the_dot(self) -> bytes:
        """Return the mail that comes now, with the line ends of a file."""
        lines = []
        for line in self.rfile:
            assert line.endswith(b"\r\n")
            assert len(line) <= 1000, "RFC 5321, 4.5.3.1.6"
            if line == b".\r\n":
                break
            lines.append(line[1:] if line.startswith(b".") else line)
        return b"".join(lines).replace(b"\r\n", b"\n")


@contextlib.contextmanager
def mail_server(port: int = 0, fails: str = "") -> Iterator[MailServer]:
    """Run a mail server."""
    server = MailServer(port, fails)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mails() -> Iterator[MailServer]:
    """A mail server that takes what comes."""
    with mail_server() as server:
        yield server


# ---- the daemon ---------------------------------------------------------------------------------------


def notifying(server: MailServer, **settings: object) -> dict[str, Any]:
    """Return settings of a daemon that mails there."""
    return {"defaultquota": QUOTA, "notify": TO, "notify_server": server.address, **settings}


def hold(daemon: Policyd, login: str, **attributes: object) -> None:
    """Have a message of a login held."""
    assert daemon.ask(sasl_username=login, recipient_count=QUOTA, **attributes) == "HOLD quota exceeded"


def wait_for_memory(daemon: Policyd, login: str) -> None:
    """Wait until the daemon has written down that it mailed about a login."""
    file = daemon.statedir / "notified.json"
    wait_until(lambda: file.exists() and login in json.loads(file.read_text()), f"{login} is in notified.json")


def reload(daemon: Policyd, **settings: object) -> None:
    """Give the daemon other settings."""
    daemon.write_settings(**settings)
    number = sum("settings read again" in message for message in daemon.syslog.messages())
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("settings read again", count=number + 1)


class Here:
    """A daemon in this process, whose times can be shortened."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.port = free_port()
        self.file = directory / "policyd.cfg"
        settings = {"port": self.port, "statedir": directory, **settings}
        self.file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def hold(self, login: str) -> None:
        """Have a message of a login held."""
        with socket.create_connection(("127.0.0.1", self.port), START_TIMEOUT_S) as connection:
            connection.sendall(request_bytes(sasl_username=login, recipient_count=QUOTA))
            assert read_answer(connection) == "HOLD quota exceeded"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr("policyd.RETRY_MAIL_S", 0.02)


def reached(mails: MailServer) -> tuple[tuple[str, int | None], ...]:
    """Return what Settings has of a mail server."""
    return (("127.0.0.1", mails.server_address[1]),)


def start_notices(directory: Path, settings: Callable[[], Settings]) -> Notices:
    """Start what mails, without a daemon."""
    store = SQLiteRepository(str(directory / "events.sqlite3"))
    notices = Notices(str(directory / "notified.json"), store, settings, SETTINGS_FILE)
    threading.Thread(target=notices.mail, args=(threading.Event(),), daemon=True).start()
    return notices


def warnings(logged: KeptLog) -> list[str]:
    """Return what has been warned of."""
    return [line.text for line in logged.lines if line.level == "warning"]


def line_with(text: str, *parts: str) -> str:
    """Return the one line that has these parts in this order."""
    wanted = re.compile(".*".join(map(re.escape, parts)))
    found = [line for line in text.splitlines() if wanted.search(line)]
    assert len(found) == 1, (parts, text)
    return found[0]


# ---- what is in it ------------------------------------------------------------------------------------


@pytest.fixture(
    params=[
        "embedded",
        pytest.param("database", marks=pytest.mark.mariadb),
        pytest.param("old_database", marks=pytest.mark.mariadb),
    ]
)
def store(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings that lead to each kind of store."""
    return {} if request.param == "embedded" else request.getfixturevalue(request.param).settings()


def test_the_first_message_held_is_mailed_with_all_that_a_human_asks(
    policyd: Start, mails: MailServer, store: dict[str, str]
) -> None:
    daemon = policyd(**notifying(mails, notify_from="policyd@example.org", defaultquota=30, **store))
    for address, sender, recipients in [
        ("192.0.2.7", "boris@example.org", 10),
        ("203.0.113.9", "", 6),
        ("203.0.113.77", "x@example.net", 2),
        ("203.0.113.77", "x@example.net", 3),
        ("2001:db8:25::1", "boris@example.org", 4),
    ]:
        assert daemon.ask(
            sasl_username="Boris@example.org", client_address=address, sender=sender, recipient_count=recipients
        ) == "DUNNO"
    assert not mails.mails
    assert daemon.ask(
        sasl_username="boris", client_address="unknown", sender="b@c", recipient_count=7, queue_id="4XkHELD"
    ) == "HOLD quota exceeded"
    (mail,) = mails.wait_for(1)

    # Which Python writes it in capitals differs.
    assert (mail.sender.upper(), [to.upper() for to in mail.recipients]) == (
        "FROM:<POLICYD@EXAMPLE.ORG>", [f"TO:<{TO.upper()}>"]
    )
    assert mail.message["From"] == "policyd@example.org"
    assert mail.message["To"] == TO
    assert mail.subject == f"policyd: boris on {os.uname().nodename}: HOLD overquota (32>30)"
    assert mail.message["Auto-Submitted"] == "auto-generated"
    assert abs(email.utils.parsedate_to_datetime(mail.message["Date"]).timestamp() - time.time()) < 600
    assert re.fullmatch(r"<\S+@\S+>", mail.message["Message-ID"])
    assert mail.message.get_content_type() == "text/plain"

    line_with(mail.text, "boris", "overquota (32>30)")
    line_with(mail.text, "24 hours: 32.")
    line_with(mail.text, "Held so far: 4XkHELD.")
    networks = re.findall(r"^(\S.*): (\d+) recipients$", mail.text, re.MULTILINE)
    assert networks == [
        ("203.0.113.0/24", "11"), ("192.0.2.0/24", "10"), ("no network", "7"), ("2001:db8:25::/48", "4")
    ]  # fmt: skip
    trace = rf"^    (\S+): (\d+) recipients, (\d+) messages, {TIME} to {TIME}, <(.*)>$"
    found = re.findall(trace, mail.text, re.MULTILINE)
    assert found == [
        ("203.0.113.9", "6", "1", ""),
        ("203.0.113.77", "5", "2", "x@example.net"),
        ("192.0.2.7", "10", "1", "boris@example.org"),
        ("unknown", "7", "1", "b@c"),
        ("2001:db8:25::1", "4", "1", "boris@example.org"),
    ]
    words = [command.split()[0] for command in commands_of(mail.text)]
    assert words == ["policyd-user.sh", "policyd-held.sh", "policyd-held.sh", "policyd-user.sh", "policyd-held.sh",
                     "printf"]  # fmt: skip


RULES = {
    "quota": ({}, [QUOTA + 2], "HOLD overquota (12>10)"),
    "reject": ({}, [2 * QUOTA + 1], "REJECT overquota (21>2x10)"),
    "rejectquota": ({"rejectquota": 15}, [16], "REJECT overquota (16>15)"),
    "quota of its own": ({"quota": "boris:5"}, [6], "HOLD overquota (6>5)"),
    "quota of nothing": ({"quota": "boris:0"}, [1], "HOLD overquota (1>0)"),
    "hour quota": ({"hourquota": 3}, [4], "HOLD hourquota (4>3)"),
    "networks": ({"max_networks": 2}, [1, 1, 1], "HOLD fanout (3>2)"),
    "blacklist": ({"blacklist": "boris"}, [1], "HOLD blacklisted"),
    "blacklisted sender": ({"blacklist": "b@example.org"}, [1], "HOLD blacklisted"),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_mailed_with_its_figures(policyd: Start, mails: MailServer, rule: str) -> None:
    settings, messages, figures = RULES[rule]
    daemon = policyd(**notifying(mails, **settings))
    for n, recipients in enumerate(messages):
        answer = daemon.ask(
            sasl_username="boris", recipient_count=recipients, client_address=f"192.0.{n}.1", sender="b@example.org",
            queue_id=f"4Xk{n}",
        )  # fmt: skip
    (mail,) = mails.wait_for(1)
    assert mail.subject == f"policyd: boris on {os.uname().nodename}: {figures}"
    line_with(mail.text, "boris", figures)
    line_with(mail.text, "24 hours: ", "0" if rule.startswith("blacklist") else str(sum(messages)))
    line_with(mail.text, "Held so far: ", "nothing" if answer.startswith("REJECT") else f"4Xk{len(messages) - 1}")


def test_of_a_login_blacklisted_later_the_sum_is_told(policyd: Start, mails: MailServer) -> None:
    """What a blacklisted login sends is not counted, what it sent before is."""
    daemon = policyd(**notifying(mails))
    assert daemon.ask(sasl_username="boris", recipient_count=QUOTA - 1) == "DUNNO"
    reload(daemon, **notifying(mails, blacklist="boris"))
    assert daemon.ask(sasl_username="boris") == "HOLD blacklisted"
    line_with(mails.wait_for(1)[0].text, "24 hours: 9.")


def test_a_mail_names_the_host_that_wrote_it(policyd: Start, mails: MailServer) -> None:
    hold(policyd(**notifying(mails)), "boris")
    assert mails.wait_for(1)[0].message["From"] == f"policyd@{os.uname().nodename}"


@pytest.mark.mariadb
def test_while_the_database_is_away_the_mail_says_so(policyd: Start, mails: MailServer, database: Database) -> None:
    daemon = policyd(**notifying(mails, **database.settings()))
    database.query("RENAME TABLE events TO away")
    hold(daemon, "boris", queue_id="4XkHELD")
    (mail,) = mails.wait_for(1)
    line_with(mail.text, "the database is away")
    line_with(mail.text, "24 hours: 10.")
    line_with(mail.text, "Held so far: 4XkHELD.")
    assert len(commands_of(mail.text)) == 6


def test_a_mail_that_comes_late_tells_what_happened_meanwhile(
    tmp_path: Path, logged: KeptLog, hasty: None
) -> None:
    port = free_port()
    here = Here(tmp_path, defaultquota=QUOTA, rejectquota=100, notify=TO, notify_server=f"127.0.0.1:{port}")
    with running_here(here.file):
        for _ in range(3):
            here.hold("boris")
        wait_until(lambda: warnings(logged), "it is known that the mail server is down")
        with mail_server(port) as mails:
            (mail,) = mails.wait_for(1)
    assert f"overquota ({QUOTA}>{QUOTA})" in mail.subject, "what began it"
    line_with(mail.text, "24 hours: 30.")
    assert len(line_with(mail.text, "Held so far: ").split()) == 3 + 3


def test_of_very_many_senders_the_mail_says_that_there_are_more() -> None:
    traces = [Trace("192.0.2.1", f"s{n}@example.org", 1, 1, "then", "now") for n in range(module.MAILED_TRACES)]
    assert "and more" not in describe(Case("boris", "fanout (9>8)", 0), traces[1:], SETTINGS_FILE)
    assert "\n... and more\n" in describe(Case("boris", "fanout (9>8)", 0), traces, SETTINGS_FILE)


# ---- once ---------------------------------------------------------------------------------------------


def test_a_login_is_mailed_once_and_another_one_too(policyd: Start, mails: MailServer) -> None:
    """Mails go out in the order of the cases: what came before the last one would be here."""
    daemon = policyd(**notifying(mails, rejectquota=100, blacklist="198.51.100.0/24"))
    for _ in range(5):
        hold(daemon, "boris")
    assert daemon.ask(sasl_username="boris", recipient_count=100) == "REJECT max quota exceeded"
    assert daemon.ask(sasl_username="boris", client_address="198.51.100.1") == "HOLD blacklisted"
    hold(daemon, "carla")
    hold(daemon, "boris2")
    mails.wait_for(3)
    assert mails.logins() == ["boris", "carla", "boris2"]


@pytest.mark.parametrize("ends", [Policyd.stop, Policyd.kill], ids=["restart", "crash"])
def test_it_is_once_also_after(policyd: Start, mails: MailServer, ends: Callable[[Policyd], Any]) -> None:
    daemon = policyd(**notifying(mails, rejectquota=100))
    hold(daemon, "boris")
    mails.wait_for(1)
    wait_for_memory(daemon, "boris")
    ends(daemon)
    daemon.start()
    hold(daemon, "boris")
    hold(daemon, "carla")
    mails.wait_for(2)
    assert mails.logins() == ["boris", "carla"]


def test_after_a_day_it_is_mailed_again(policyd: Start, mails: MailServer) -> None:
    daemon = policyd(**notifying(mails))
    daemon.stop()
    memory = {"yesterday": time.time() - DAY_S - 60, "today": time.time() - DAY_S + 3600}
    (daemon.statedir / "notified.json").write_text(json.dumps(memory))
    daemon.start()
    for login in ("today", "yesterday", "boris"):
        hold(daemon, login)
    mails.wait_for(2)
    assert mails.logins() == ["yesterday", "boris"]
    wait_for_memory(daemon, "boris")
    memory = json.loads((daemon.statedir / "notified.json").read_text())
    assert memory.keys() == {"today", "yesterday", "boris"}
    assert all(time.time() - DAY_S < began <= time.time() for began in memory.values())


def test_after_a_day_a_daemon_that_never_ended_mails_again(
    tmp_path: Path, mails: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    notices = start_notices(tmp_path, lambda: Settings(notify=TO, notify_server=reached(mails)))
    with monkeypatch.context() as patch:
        cases = [(0, "boris"), (0.99, "boris"), (1.01, "boris"), (2, "boris"), (2, "carla"), (2.02, "boris")]
        for days, login in cases:
            patch.setattr("policyd.time.time", lambda days=days: now + days * DAY_S)
            notices.note(login, f"a rule on day {days}", 1, "")
    mails.wait_for(4)
    about = [(mail.login, mail.subject.rpartition(" ")[2]) for mail in mails.mails]
    assert about == [("boris", "0"), ("boris", "1.01"), ("carla", "2"), ("boris", "2.02")]


def test_a_clock_that_was_ahead_once_keeps_no_mail_back(policyd: Start, mails: MailServer) -> None:
    daemon = policyd(**notifying(mails))
    daemon.stop()
    (daemon.statedir / "notified.json").write_text(json.dumps({"boris": time.time() + 10 * DAY_S}))
    daemon.start()
    hold(daemon, "boris")
    assert mails.wait_for(1)[0].login == "boris"


GARBAGE = [
    "", "{", "[]", "null", "7", '"boris"', '{"boris": null}', '{"boris": [1]}', '{"boris": "soon"}', '{"boris": NaN}',
    '{"boris": Infinity}', '{"boris": -1e999}', '{"boris": {"boris": 1}}', '{"boris": true}', "[" * 100_000, "\0",
    '{"boris": 1' + "0" * 400 + "}",
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda text: ascii(text[:24]))
def test_a_memory_that_is_garbage_is_none(tmp_path: Path, mails: MailServer, garbage: str) -> None:
    file = tmp_path / "notified.json"
    file.write_text(garbage)
    notices = start_notices(tmp_path, lambda: Settings(notify=TO, notify_server=reached(mails)))
    notices.note("boris", "a rule", 1, "")
    assert mails.wait_for(1)[0].login == "boris"
    wait_until(lambda: file.read_text() != garbage, "it is written anew")
    assert json.loads(file.read_text()).keys() == {"boris"}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON | st.dictionaries(st.text(), st.floats() | st.integers()))
def test_no_memory_keeps_a_login_from_being_mailed_for_more_than_a_day(memory: object) -> None:
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(memory, file)
        file.flush()
        notices = Notices(file.name, SQLiteRepository(":memory:"), Settings, SETTINGS_FILE)
    assert all(0 <= time.time() - case.began <= DAY_S + 60 for case in notices._cases.values())


def test_a_statedir_that_is_read_only_costs_a_warning(
    policyd: Start, mails: MailServer, database: Database
) -> None:
    """Mails go out, also the next ones; after a restart a second one may come."""
    bind = 'mount --bind "$STATE_DIRECTORY" "$STATE_DIRECTORY" || exit'
    read_only = 'mount -o remount,bind,ro "$STATE_DIRECTORY" || exit'
    daemon = policyd(mounts=f"{bind}\n{read_only}", **notifying(mails, **database.settings()))
    hold(daemon, "boris")
    hold(daemon, "carla")
    hold(daemon, "dora")
    mails.wait_for(3)
    line = daemon.wait_for_log("after a restart a second notice may come")
    assert line.level == "warning"
    assert mails.logins() == ["boris", "carla", "dora"]


def test_a_memory_that_is_a_directory_costs_a_warning(policyd: Start, mails: MailServer) -> None:
    daemon = policyd(**notifying(mails))
    daemon.stop()
    (daemon.statedir / "notified.json").mkdir()
    daemon.start()
    hold(daemon, "boris")
    hold(daemon, "carla")
    mails.wait_for(2)
    assert daemon.wait_for_log("after a restart a second notice may come").level == "warning"


def test_the_memory_is_nobody_elses(policyd: Start, mails: MailServer) -> None:
    daemon = policyd(**notifying(mails))
    hold(daemon, "boris")
    wait_for_memory(daemon, "boris")
    file = daemon.statedir / "notified.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in daemon.statedir.glob("notified*")] == ["notified.json"]


# ---- not --------------------------------------------------------------------------------------------


def test_in_audit_nobody_is_mailed(policyd: Start, mails: MailServer) -> None:
    """Nor is it remembered: with mode=enforce the next message is."""
    settings = notifying(mails, rejectquota=100, blacklist="spam@example.org")
    daemon = policyd(mode="audit", **settings)
    assert daemon.ask(sasl_username="boris", recipient_count=QUOTA) == "DUNNO"
    assert daemon.ask(sasl_username="boris", recipient_count=100) == "DUNNO"
    assert daemon.ask(sasl_username="boris", sender="spam@example.org") == "DUNNO"
    daemon.wait_for_log("would HOLD blacklisted")
    reload(daemon, **settings)
    hold(daemon, "carla")
    assert daemon.ask(sasl_username="boris") == "REJECT max quota exceeded"
    mails.wait_for(2)
    assert mails.logins() == ["carla", "boris"]


def test_without_notify_nobody_is_mailed_and_a_reload_is_enough_to_change_that(
    policyd: Start, mails: MailServer
) -> None:
    settings = notifying(mails, rejectquota=100)
    del settings["notify"]
    daemon = policyd(**settings)
    hold(daemon, "boris")
    reload(daemon, notify=TO, **settings)
    hold(daemon, "carla")
    hold(daemon, "boris")
    mails.wait_for(2)
    assert mails.logins() == ["carla", "boris"]
    assert "settings changed that need a restart" not in "\n".join(daemon.syslog.messages())


def test_who_is_let_through_is_not_mailed(policyd: Start, mails: MailServer) -> None:
    daemon = policyd(**notifying(mails, whitelist="news", whitelist_days="1-7", whitelist_hours="0-24",
                                 always_allow="help@example.org"))  # fmt: skip
    assert daemon.ask(sasl_username="news", recipient_count=1000) == "DUNNO"
    assert daemon.ask(sasl_username="anna", recipient_count=QUOTA - 1) == "DUNNO"
    assert daemon.ask(sasl_username="", recipient_count=1000) == "DUNNO"
    assert daemon.ask(sasl_username="anna", recipient_count=1, recipient="help@example.org") == "DUNNO"
    hold(daemon, "boris")
    mails.wait_for(1)
    assert mails.logins() == ["boris"]


def test_what_could_not_be_mailed_waits_while_a_reload_has_switched_the_mails_off(
    tmp_path: Path, mails: MailServer, logged: KeptLog, hasty: None
) -> None:
    looks = 0

    def settings() -> Settings:
        nonlocal looks
        looks += 1
        return now

    now = Settings(notify=TO, notify_server=(("127.0.0.1", free_port()),))
    notices = start_notices(tmp_path, settings)
    notices.note("boris", "a rule", 1, "")
    wait_until(lambda: warnings(logged), "it is known that the mail server is down")
    now = Settings(notify_server=reached(mails))
    looks = 0
    wait_until(lambda: looks > 0, "it has been seen that nobody wants a mail")
    now = Settings(notify=TO, notify_server=reached(mails))
    notices.note("carla", "a rule", 1, "")
    mails.wait_for(2)
    assert sorted(mails.logins()) == ["boris", "carla"]


def test_a_mail_that_is_refused_for_good_holds_no_other_one_back(
    tmp_path: Path, mails: MailServer, logged: KeptLog, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spam filter may object to what a mail about a spammer shows."""

    def refuse_boris(subject: str, text: str, settings: Settings) -> None:
        if "boris" in subject:
            raise OSError("554 5.7.1 this looks like spam")
        post(subject, text, settings)

    monkeypatch.setattr("policyd.post", refuse_boris)
    notices = start_notices(tmp_path, lambda: Settings(notify=TO, notify_server=reached(mails)))
    notices.note("boris", "a rule", 1, "")
    wait_until(lambda: warnings(logged), "it is refused")
    notices.note("carla", "a rule", 1, "")
    mails.wait_for(1)
    assert mails.logins() == ["carla"]


# ---- at most so many ----------------------------------------------------------------------------------


def test_after_20_mails_in_an_hour_the_rest_comes_in_one(
    tmp_path: Path, mails: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    logins = [f"user{n}" for n in range(50)]
    notices = start_notices(tmp_path, lambda: Settings(notify=TO, notify_server=reached(mails)))
    for login in logins:
        notices.note(login, f"overquota ({login}>10)", 10, "")
    mails.wait_for(20)
    wait_until(notices._new.empty, "the others wait")
    assert len(mails.mails) == 20

    monkeypatch.setattr("policyd.HOUR_S", 0)  # the hour is over, which the next case lets the thread see
    notices.note("last", "a rule", 10, "")
    mails.wait_for(21)
    assert [mail.login for mail in mails.mails[:20]] == logins[:20]
    summary = mails.mails[20]
    about = re.findall(r"^(\S+) on .*: ", summary.text, re.MULTILINE)
    assert about[:30] == logins[20:]
    assert summary.subject == f"policyd: {len(about)} more logins"
    assert line_with(summary.text, "user33 on ", "overquota (user33>10)")
    assert "    policyd-user.sh user33\n" in summary.text
    file = tmp_path / "notified.json"
    wait_until(lambda: "last" in file.read_text(), "all are remembered")
    assert json.loads(file.read_text()).keys() == {*logins, "last"}


def test_what_could_not_be_mailed_is_not_one_of_the_20(
    tmp_path: Path, logged: KeptLog, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policyd.MAILS_AN_HOUR", 2)
    monkeypatch.setattr("policyd.GIVE_UP_MAIL_S", 0)
    with mail_server(fails="refuses the recipient") as mails:
        here = Here(tmp_path, **notifying(mails))
        with running_here(here.file):
            for login in ("boris", "carla", "dora"):
                here.hold(login)
            wait_until(lambda: len(logged.errors()) == 3, "three are given up")
            mails.fails = ""
            here.hold("emil")
            here.hold("fritz")
            mails.wait_for(2)
        assert mails.logins() == ["emil", "fritz"]


# ---- a mail server that fails -------------------------------------------------------------------------

FAILURES = [
    "is down", "says nothing", "greets with a refusal", "speaks something else", "refuses the recipient",
    "hangs up in DATA", "refuses the text",
]  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_a_mail_server_that_fails_is_tried_again_until_it_takes_the_mail(
    tmp_path: Path, logged: KeptLog, hasty: None, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """With one warning; the answers do not wait."""
    monkeypatch.setattr("policyd.MAIL_TIMEOUT_S", 0.2)
    port = free_port()
    here = Here(tmp_path, defaultquota=QUOTA, notify=TO, notify_server=f"127.0.0.1:{port}")
    with contextlib.ExitStack() as running:
        running.enter_context(running_here(here.file))
        server = None
        if failure != "is down":
            server = running.enter_context(mail_server(port, failure))
        for login in ("boris", "carla"):
            here.hold(login)
        wait_until(lambda: warnings(logged), "one warning")
        if server:
            wait_until(lambda: server.sessions >= 3, "it is tried again")
            assert not server.mails
            server.fails = ""
        else:
            server = running.enter_context(mail_server(port))
        server.wait_for(2)
        assert sorted(server.logins()) == ["boris", "carla"]
    (warning,) = warnings(logged)
    assert warning.startswith(f"no notice of boris on {os.uname().nodename}: HOLD overquota (10>10): 127.0.0.1: ")
    assert logged.errors() == []


def test_answers_do_not_wait_for_a_mail_server_that_hangs(policyd: Start) -> None:
    """It is left hanging for longer than an answer may take."""
    with mail_server(fails="says nothing") as server:
        daemon = policyd(**notifying(server))
        hold(daemon, "boris")
        wait_until(lambda: server.sessions, "the mail server is asked")
        began = time.monotonic()
        for n in range(100):
            hold(daemon, f"user{n}")
        assert time.monotonic() - began < module.MAIL_TIMEOUT_S
        daemon.wait_for_log("for user user99 ")
        assert server.sessions == 1, "it hangs all the time"
        assert daemon.stop() == 0


def test_after_an_hour_a_mail_is_given_up_with_one_error(
    tmp_path: Path, logged: KeptLog, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next login gets its own hour."""
    monkeypatch.setattr("policyd.GIVE_UP_MAIL_S", 0.2)
    here = Here(tmp_path, defaultquota=QUOTA, notify=TO, notify_server=f"127.0.0.1:{free_port()}")
    with running_here(here.file):
        here.hold("boris")
        here.hold("carla")
        wait_until(lambda: len(logged.errors()) == 2, "both are given up")
    host = os.uname().nodename
    assert logged.errors() == [
        f"gave up the notice of {login} on {host}: HOLD overquota (10>10)" for login in ("boris", "carla")
    ]
    assert len(warnings(logged)) == 1, "the reason is the same"
    assert not (tmp_path / "notified.json").exists(), "after a restart there is another try"


def test_a_mail_that_was_taken_is_not_sent_again(tmp_path: Path, logged: KeptLog, hasty: None) -> None:
    """Whatever the server says when we leave."""
    with mail_server(fails="refuses to end") as mails:
        here = Here(tmp_path, **notifying(mails))
        with running_here(here.file):
            here.hold("boris")
            here.hold("carla")
            wait_until(lambda: "carla" in mails.logins() or warnings(logged), "the mails are taken")
        assert mails.logins() == ["boris", "carla"]
        assert warnings(logged) == []


@pytest.mark.parametrize("failure", ["is down", "refuses the recipient", "hangs up in DATA"])
def test_of_several_mail_servers_the_next_one_takes_the_mail(policyd: Start, mails: MailServer, failure: str) -> None:
    with mail_server(fails=failure) as first:
        if failure == "is down":
            first.server_close()
        servers = f"{first.address}, {mails.address}"
        daemon = policyd(**{**notifying(mails), "notify_server": servers})
        hold(daemon, "boris")
        hold(daemon, "carla")
        mails.wait_for(2)
        assert mails.logins() == ["boris", "carla"]
        assert not first.mails
        assert not [line for line in daemon.log_lines() if line.level in ("warning", "err")]


def test_a_server_name_that_cannot_be_one_ends_no_thread(tmp_path: Path, logged: KeptLog, mails: MailServer) -> None:
    here = Here(tmp_path, **{**notifying(mails), "notify_server": "mail..example.net"})
    with running_here(here.file) as daemon:
        here.hold("boris")
        wait_until(lambda: warnings(logged) or logged.errors(), "it is told")
        here.file.write_text(here.file.read_text().replace("mail..example.net", mails.address))
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: any("settings read again" in line.text for line in logged.lines), "read again")
        here.hold("carla")
        wait_until(lambda: "carla" in mails.logins(), "the next mail comes")


def test_a_daemon_that_ends_while_the_mail_server_is_down_mails_after_its_start(policyd: Start) -> None:
    port = free_port()
    settings = {"defaultquota": QUOTA, "rejectquota": 100, "notify": TO, "notify_server": f"127.0.0.1:{port}"}
    daemon = policyd(**settings)
    hold(daemon, "boris")
    daemon.wait_for_log("no notice of boris on ")
    assert daemon.stop() == 0
    with mail_server(port) as mails:
        daemon.start()
        hold(daemon, "boris")
        assert mails.wait_for(1)[0].login == "boris"


# ---- what a client sends ------------------------------------------------------------------------------

HOSTILE = [
    "a\rBcc: y@example.net",
    "a\r\rBcc: y@example.net",
    "\x1b]0;owned\x07\x1b[31m",
    "\x7f\x08\x08\t",
    "=?utf-8?q?x=0aBcc:_y@example.net?=",
    "=?utf-8?b?eApCY2M6IHlAZXhhbXBsZS5uZXQ=?=",
    "$(touch touched)",
    "`touch touched`",
    "; touch touched",
    "a' ; touch touched ; '",
    "'\"'\"'$(touch touched)'\"'\"'",
    '"; touch touched; "',
    "a|touch touched&",
    "!!",
    "*",
    "~root",
    "$HOME",
    "#",
    "-rf",
    "--yes",
    "-c/etc/passwd",
    "release",
    "delete",
    ".",
    "..",
    ".quit",
    "a\\nblacklist=0.0.0.0/0",
    "a\\c",
    "%s%n",
    "josé",
    "jos\\xe9",
    "жанна",
    "\u2028Bcc: y@example.net",
    "\u202egnitrats",
    "x" * 3000,
    "é" * 3000,
    "' " * 1000,
    "a b  c",
    " leading",
    "trailing ",
    "0.0.0.0/0",
    "1.2/3",
    "192.0.2.1",
    "blacklist=carla",
    "#comment",
    b"\xff\xfe",
    b"\xc3(",
]

STUB = """#!/bin/sh
for word in "$#" "${0##*/}" "$@"; do printf '%s\\0' "$word"; done >>"$RECORD"
"""
PROGRAMS = ("policyd-user.sh", "policyd-held.sh", "systemctl")


def commands_of(text: str) -> list[str]:
    """Return the commands of a mail, as a human would paste them."""
    _, found, after = text.partition("\nLook:")
    assert found
    lines = [re.sub("^(An honest user|A thief)?:? +", "", line) for line in after.splitlines()]
    assert lines[-1] == "and a new password"
    return lines[:-1]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of programs that only write down how they were called."""
    directory = tmp_path_factory.mktemp("stubs")
    for name in PROGRAMS:
        (directory / name).write_text(STUB)
        (directory / name).chmod(0o755)
    return directory


def paste(commands: list[str], stubs: Path, shell: str) -> list[list[bytes]]:
    """Run commands as they stand, where they may do nothing but call the programs; return how these were called."""
    assert "\n" not in "".join(commands)
    record = stubs / "record"
    record.write_bytes(b"")
    done = subprocess.run(
        [shell, "-eu", "-c", "\n".join(commands)], cwd=stubs, stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        env={"PATH": f"{stubs}:/usr/bin:/bin", "RECORD": str(record), "HOME": str(stubs)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b""), (commands, done)
    ours = {*PROGRAMS, "record", "policyd.cfg", "systemctl-only"}
    assert {path.name for path in stubs.iterdir()} <= ours, "something was touched"
    words = record.read_bytes().split(b"\0")[:-1]
    calls = []
    while words:  # each is how many words there are, the program, the words
        length = 2 + int(words[0])
        calls.append(words[1:length])
        del words[:length]
    return calls


def options_and_login(call: list[bytes]) -> tuple[list[bytes], bytes]:
    """Return a call without its login, and the login; it must not be taken for an option or a command."""
    program, *words = call
    if b"--" in words:
        at = words.index(b"--")
        assert len(words) == at + 2, call
        return [program, *words[:at]], words[-1]
    login = words.pop()
    assert not login.startswith(b"-"), call
    assert program != b"policyd-held.sh" or words or login not in (b"release", b"delete"), call
    return [program, *words], login


def can_be_listed(login: str) -> bool:
    """Tell whether a settings file can name this login, and does not take it for a network."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="") as file:
            file.write(f"blacklist={login}\n")
            file.flush()
            listed = Settings.from_file(file.name).blacklist
    except module.SettingsError:
        return False
    return listed.holds([login], "")


def assert_commands_are_for(text: str, login: str, settings_file: str, stubs: Path, shell: str) -> None:
    """Paste all that a mail says, and look what happens."""
    option = [] if settings_file == SETTINGS_FILE else ["-c", settings_file]
    wanted = login.encode()
    *calls, block = commands_of(text)
    seen = []
    for call in paste(calls, stubs, shell):
        options, named = options_and_login(call)
        assert named == wanted, call
        seen.append([word.decode() for word in options])
    assert seen == [
        ["policyd-user.sh", *option],
        ["policyd-held.sh", *option],
        ["policyd-held.sh", *option, "release", "--yes"],
        ["policyd-user.sh", *option, "--forgive", "--yes"],
        ["policyd-held.sh", *option, "delete", "--yes"],
    ]
    if not block.startswith("printf "):
        assert not can_be_listed(login)
        return
    file = stubs / "policyd.cfg"
    file.write_text("defaultquota=7\nblacklist=phished")  # as many a file, without an end of its last line
    block = block.replace(settings_file, str(file))
    assert paste([block], stubs, shell) == [[b"systemctl", b"reload", b"policyd"]]
    settings = Settings.from_file(str(file))
    assert settings.blacklist.holds([login], "")
    assert settings.blacklist.holds(["phished"], "")
    assert not settings.blacklist.holds(["somebody", ""], "198.51.100.99")
    assert settings.defaultquota == 7


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Here, MailServer]]:
    """A daemon for all of them, that may mail as often as it likes."""
    with pytest.MonkeyPatch.context() as patch, mail_server() as mails:
        patch.setattr("policyd.MAILS_AN_HOUR", 1000)
        patch.setattr("policyd.log", KeptLog())
        here = Here(tmp_path_factory.mktemp("relay"), **notifying(mails, notify_from="policyd@example.org"))
        with running_here(here.file):
            yield here, mails


@pytest.mark.parametrize("login", HOSTILE, ids=lambda login: ascii(login[:24]))
def test_nothing_that_a_client_sends_can_forge_a_mail(
    relay: tuple[Here, MailServer], stubs: Path, login: str | bytes
) -> None:
    """Neither its headers nor its text, nor what is pasted from it."""
    here, mails = relay
    number = len(mails.mails)
    wire = login if isinstance(login, bytes) else login.encode()
    hostile = dict.fromkeys(("sasl_username", "sender", "client_address", "queue_id"), "LOGIN")
    request = request_bytes(recipient_count=QUOTA, **hostile).replace(b"LOGIN", wire)
    with socket.create_connection(("127.0.0.1", here.port), START_TIMEOUT_S) as connection:
        connection.sendall(request)
        assert read_answer(connection) == "HOLD quota exceeded"
    mail = mails.wait_for(number + 1)[number]
    # Which Python writes it in capitals differs.
    assert (mail.sender.upper(), [to.upper() for to in mail.recipients]) == (
        "FROM:<POLICYD@EXAMPLE.ORG>", [f"TO:<{TO.upper()}>"]
    )
    assert sorted(mail.message.keys()) == [
        "Auto-Submitted", "Content-Transfer-Encoding", "Content-Type", "Date", "From", "MIME-Version", "Message-ID",
        "Subject", "To",
    ]  # fmt: skip
    assert mail.message["To"] == TO
    assert re.fullmatch(r"policyd: [A-Za-z0-9._@+?-]{1,64} on \S+: HOLD overquota \(10>10\)", mail.subject)
    assert re.fullmatch(r"[ -~\n]*", mail.text)
    line_with(mail.text, " recipients, 1 messages, ", ", <")
    counted = wire.decode("utf-8", "backslashreplace").lower().partition("@")[0][: module.KEPT_TEXT]
    assert_commands_are_for(mail.text, counted, str(here.file), stubs, "dash")


@pytest.mark.parametrize(
    "text", [".\n", "..\n.\n", ".quit\n.\nRSET\n", "x" * 75 + ".\n." + "y" * 2000 + "\n", "\n\n.\n\n"], ids=ascii
)
def test_a_dot_at_the_start_of_a_line_ends_no_mail(mails: MailServer, text: str) -> None:
    module.post("a subject", text, Settings(notify=TO, notify_server=reached(mails)))
    (mail,) = mails.wait_for(1)
    assert mail.text == text


LOGINS = st.text(st.characters(blacklist_characters="\0\n", blacklist_categories=("Cs",)), min_size=1, max_size=60)


@hypothesis_settings(max_examples=40)
@given(
    LOGINS | st.text(st.sampled_from("a-\\'\"$`!%;n0 /.:é\x1b"), min_size=1, max_size=9),
    st.sampled_from(["dash", "bash"]),
)
def test_the_commands_mean_the_login_and_nothing_else(stubs: Path, login: str, shell: str) -> None:
    case = Case(login, "HOLD overquota (10>10)", 0, 10, [login])
    traces = [Trace(login, login, 1, 10, "then", "now")]
    text = describe(case, traces, SETTINGS_FILE)
    assert re.fullmatch(r"[ -~\n]*", text)
    assert text.count("\n") == describe(Case("boris", "overquota (10>10)", 0), traces, SETTINGS_FILE).count("\n")
    assert re.fullmatch(r"[A-Za-z0-9._@+?-]{1,60} on \S+: HOLD overquota \(10>10\)", case.headline())
    assert_commands_are_for(text, login, SETTINGS_FILE, stubs, shell)


# ---- all of it together: real mail, and what the mail says to type --------------------------------------


@pytest.fixture
def in_postfix(policyd: Start, postfix: Postfix) -> Callable[..., Policyd]:
    """A function that starts a daemon where Postfix asks, and mails through the same Postfix."""
    to = f"postmaster{free_port()}@example.net"

    def start(**settings: object) -> Policyd:
        server = f"127.0.0.1:{postfix.submission_port}"
        return policyd(
            port=postfix.policy_port, defaultquota=3, rejectquota=100, notify=to, notify_server=server, **settings
        )

    return start


def type_in(command: str, postfix: Postfix, stubs: Path) -> str:
    """Run a command of a mail with the real scripts; return what it printed."""
    ours = stubs / "systemctl-only"
    if not ours.exists():
        ours.mkdir()
        (ours / "systemctl").symlink_to(stubs / "systemctl")
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PATH": f"{ours}:{SCRIPTS}:{os.environ['PATH']}", "RECORD": str(stubs / "record"),
             "MAIL_CONFIG": str(postfix.directory / "etc")},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), (command, done)
    return done.stdout


def send_as_boris(postfix: Postfix, recipients: int) -> None:
    with postfix.session(login="boris") as session:
        session.sendmail("boris@example.org", [f"r{n}@example.net" for n in range(recipients)], "Subject: x\n\nx\n")


def mailed(postfix: Postfix, daemon: Policyd) -> Mail:
    """Return the mail that Postfix has delivered to this daemon's human."""
    to = re.search("^notify=(.*)$", daemon.settings_file.read_text(), re.MULTILINE)
    assert to

    def found() -> list[str]:
        return [text for text in postfix.delivered() if f"\nTo: {to[1]}\n" in text]

    (text,) = wait_until(found, "the mail is delivered")
    return Mail("", [], parse_mail(text.encode()))


def test_what_the_mail_says_to_type_is_what_releases_and_forgives(
    in_postfix: Callable[..., Policyd], postfix: Postfix, stubs: Path
) -> None:
    daemon = in_postfix()
    send_as_boris(postfix, 5)
    mail = mailed(postfix, daemon)
    (held,) = line_with(mail.text, "Held so far: ").rstrip(".").split()[3:]
    assert postfix.queue_name(held) == "hold"
    line_with(mail.text, "127.0.0.1: 5 recipients, 1 messages", "boris@example.org")
    user, in_hold, release, forgive, _, _ = commands_of(mail.text)
    assert re.search(r"^state +HOLD", type_in(user, postfix, stubs), re.MULTILINE)
    assert held in type_in(in_hold, postfix, stubs)
    assert "released 1 message" in type_in(release, postfix, stubs)
    assert postfix.queue_name(held) != "hold"
    assert "sum: 5 -> 0" in type_in(forgive, postfix, stubs)
    assert daemon.ask(sasl_username="boris") == "DUNNO"


def test_what_the_mail_says_to_type_is_what_deletes_and_blocks(
    in_postfix: Callable[..., Policyd], postfix: Postfix, stubs: Path
) -> None:
    """Also when the last line of the settings lacks its end."""
    daemon = in_postfix(blacklist="phished")
    daemon.settings_file.write_text(daemon.settings_file.read_text().rstrip("\n"))
    send_as_boris(postfix, 5)
    mail = mailed(postfix, daemon)
    (held,) = line_with(mail.text, "Held so far: ").rstrip(".").split()[3:]
    *_, delete, block = commands_of(mail.text)
    assert "deleted 1 message" in type_in(delete, postfix, stubs)
    assert postfix.queue_name(held) is None
    type_in(block, postfix, stubs)  # but for systemctl, which is ours
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("settings read again")
    assert daemon.ask(sasl_username="boris") == "HOLD blacklisted"
    assert daemon.ask(sasl_username="phished") == "HOLD blacklisted"
    assert daemon.ask(sasl_username="anna") == "DUNNO"


@pytest.mark.parametrize("login", ["-rf", "release", "jos\xe9", "it's"])
def test_what_the_mail_says_to_type_works_for_strange_logins(
    policyd: Start, mails: MailServer, postfix: Postfix, stubs: Path, login: str
) -> None:
    daemon = policyd(**notifying(mails))
    hold(daemon, login)
    user, in_hold, release, forgive, delete, _ = commands_of(mails.wait_for(1)[0].text)
    assert re.search(r"^state +HOLD", type_in(user, postfix, stubs), re.MULTILINE)
    assert "nothing is held" in type_in(in_hold, postfix, stubs)
    for command in (release, delete):
        done = f"{command} 2>&1 || true"
        assert "no login and no queue id of a held message; nothing was changed" in type_in(done, postfix, stubs)
    assert "sum: 10 -> 0" in type_in(forgive, postfix, stubs)
    assert daemon.ask(sasl_username=login) == "DUNNO"
