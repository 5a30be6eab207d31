"""policyd-admin mail: what on_stop= runs tells a human, once, in a mail that nothing can forge."""

from __future__ import annotations

import contextlib
import email
import email.message
import email.policy
import json
import os
import re
import shlex
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from scripting import ADMIN, HOSTILE, HOUR_S, Entry, commands_in, embedded, fill, pasted, program, run, settings_file
from servers import Database, Policyd, Postfix, free_port, wait_until
from stores import Store, on_stores, table_locked

import policyd as module

TO = "postmaster@example.net"
HOST = os.uname().nodename.partition(".")[0]


class Mail(NamedTuple):
    """One mail as it came in."""

    helo: str
    sender: str
    recipients: list[str]
    message: email.message.EmailMessage

    @property
    def subject(self) -> str:
        return str(self.message["Subject"])

    @property
    def text(self) -> str:
        return str(self.message.get_content())


def parse(text: bytes) -> email.message.EmailMessage:
    """Return a mail, in which nothing may be wrong."""
    message = email.message_from_bytes(text, policy=email.policy.default)
    assert isinstance(message, email.message.EmailMessage)
    assert not message.defects
    return message


class MailServer(socketserver.ThreadingTCPServer):
    """Takes mail, unless it is to answer otherwise to a command, to the mail of a login, or as its greeting.

    An empty answer is to hang up; an empty greeting, to say nothing.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, **answers: str) -> None:
        super().__init__(("127.0.0.1", 0), MailHandler)
        self.answers = {"greeting": "220 mail.example.net ESMTP", "quit": "221 2.0.0 Bye", "data": "354", **answers}
        self.mails: list[Mail] = []
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class MailHandler(socketserver.StreamRequestHandler):
    """One session."""

    server: MailServer

    def handle(self) -> None:
        recipients: list[str] = []
        rests = {}
        if not self.answer("greeting"):
            self.rfile.read()  # until the other one gives up
        for line in self.rfile:
            verb, _, rests[verb] = line.decode("ascii").rstrip("\r\n").lower().partition(" ")
            recipients = [] if verb == "mail" else recipients + [rests[verb]] * (verb == "rcpt")
            if not self.answer(verb):
                break
            if verb == "data":
                mail = Mail(rests["ehlo"], rests["mail"], recipients, parse(self.read_to_the_dot()))
                login = mail.subject.split()[2].rstrip(":")
                if login not in self.server.answers:
                    self.server.mails.append(mail)
                self.answer(login)

    def answer(self, to: str) -> str:
        """Say, and return, what is to be said."""
        line = self.server.answers.get(to, "250 2.0.0 Ok")
        with contextlib.suppress(OSError):
            self.wfile.write(f"{line}\r\n".encode("latin-1") if line else b"")
        return line

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


@pytest.fixture
def mails() -> Iterator[MailServer]:
    """A mail server that takes what comes."""
    with MailServer() as server:
        yield server


def told(login: str = "boris", rule: str = "HOLD places", figure: int = 6, limit: int = 5, **more: str) -> str:
    """Return an incident as the daemon tells it."""
    return json.dumps({
        "login": login, "rule": rule, "since": "2026-11-25T03:12:44+01:00", "recipients": 312, "figure": figure,
        "limit": limit, "sender": "bank@example.net", "client_address": "203.0.113.9", "queue_id": "4Xk1b12rTnz3xT",
        **more,
    }) + "\n"  # fmt: skip


def users(number: int) -> list[str]:
    """Return incidents of so many logins."""
    return [told(f"user{n}") for n in range(number)]


def mail(server: MailServer | str, file: Path, *incidents: str, options: tuple[str, ...] = (TO,),
         postconf: str = "exit 1") -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run `policyd-admin mail` with these incidents; the real postconf would wait before it fails."""
    address = server if isinstance(server, str) else server.address
    environment = program(file.parent, "postconf", postconf)
    return run("mail", *options, "--server", address, "-c", file, text="".join(incidents), **environment)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that says why a mail was not handed over; the daemon tries again."""
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"policyd-admin: [ -~]+\n", done.stderr), done
    return done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The settings of an empty store."""
    return settings_file(tmp_path, embedded(tmp_path).settings)


def check_text(mail: Mail) -> list[str]:
    """Return the commands of a mail that is as small and plain as promised."""
    assert re.fullmatch(r"[ -~\n]*", mail.text)
    assert len(mail.text.splitlines()) <= 50
    assert all(len(line) <= 78 or line.startswith("  policyd-admin ") for line in mail.text.splitlines()), mail.text
    commands = commands_in(mail.text)
    assert [command.split()[1] for command in commands] == ["user", "forgive", "block", "delete", "trace", "unblock"]
    return commands


# ---- what is in it ------------------------------------------------------------------------------------------------


@on_stores("SQLite", "schema.sql")
def test_a_human_is_told_all_that_he_asks(store: Store, mails: MailServer, tmp_path: Path) -> None:
    fill(store, *(Entry(60 + n, "boris", 10 + n, "bank@example.net", f"203.0.113.{n}") for n in range(4)),
         Entry(50, "boris", -6, "", "2001:db8:25::1"), Entry(40, "boris", 7, "b@c", "unknown"), Entry(3, "anna", 99),
         *(Entry(300 + n, "boris", 1, f"s{n}@example.org", f"198.{18 + n}.0.1") for n in range(20)),
         Entry(25 * HOUR_S, "boris", 77, client="10.0.0.1"))  # fmt: skip
    file = settings_file(tmp_path, store.settings)
    done = mail(mails, file, told(), options=(TO, "second@example.net"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (found,) = mails.mails
    assert found.recipients == [f"to:<{TO}>", "to:<second@example.net>"]
    assert found.message["To"] == f"{TO}, second@example.net"
    assert found.message["From"] == f"policyd@{os.uname().nodename}"
    assert found.helo == os.uname().nodename.lower()
    assert found.subject == f"policyd: HOLD boris: 6 new places ({HOST})"
    assert found.message["Auto-Submitted"] == "auto-generated"
    assert found.message["Date"]
    assert found.message["Message-ID"]
    for part in (
        "Mail of boris\n", "since 2026-11-25T03:12:44+01:00 on ", "6 new places (HOLD places)", "312 recipients",
    ):  # fmt: skip
        assert part in found.text, part
    networks, senders = re.findall(r"^The largest .*\n((?: .*\n)+)", found.text, re.MULTILINE)
    lines = [line.split() for line in networks.splitlines()]
    assert lines[:3] == [["46", "203.0.113.0/24"], ["7", "unknown"], ["6", "2001:db8:25::/48"]]
    assert [line[0] for line in lines[3:5]] == ["1", "1"]
    assert lines[5:] == [["and", "18", "more"]]
    lines = [line.split() for line in senders.splitlines()]
    assert lines[:3] == [["46", "bank@example.net"], ["7", "b@c"], ["6", "<>"]]
    for command in check_text(found):
        name = command.split()[1]
        assert command == f"policyd-admin {name} " + "--release " * (name == "forgive") + f"-c {file} boris"


RULES = {
    "HOLD overquota": (1507, 1500, "1507 recipients, limit 1500"),
    "REJECT overquota": (3001, 3000, "3001 recipients, limit 3000"),
    "HOLD hourquota": (301, 300, "301 recipients in an hour, limit 300"), "HOLD places": (16, 15, "16 new places"),
    "HOLD newplace": (120, 100, "120 recipients from new places"), "REJECT places": (6, 5, "6 new places"),
    "HOLD blocked": (0, 0, "blocked by hand"),
}  # fmt: skip


def test_each_rule_has_a_subject_that_sorts(mails: MailServer, file: Path) -> None:
    for rule, (figure, limit, _) in RULES.items():
        assert mail(mails, file, told("boris", rule, figure, limit)).returncode == 0
    assert [found.subject for found in mails.mails] == [
        f"policyd: {rule.partition(' ')[0]} boris: {text} ({HOST})" for rule, (_, _, text) in RULES.items()
    ]
    for found, rule in zip(mails.mails, RULES):
        assert ("--release" in found.text) == rule.startswith("HOLD"), "what was refused is not held"


def test_of_many_incidents_five_have_a_mail_and_the_rest_one(mails: MailServer, file: Path) -> None:
    assert mail(mails, file, *users(40), *users(40)).returncode == 0, "each one once"
    assert [found.subject.split()[2] for found in mails.mails[:5]] == [f"user{n}:" for n in range(5)]
    (rest,) = mails.mails[5:]
    assert rest.subject == f"policyd: 35 more ({HOST})"
    assert "HOLD user5: 6 new places" in rest.text
    commands = commands_in(rest.text)
    assert (commands[0], commands[-1]) == (f"policyd-admin user -c {file} user5", f"policyd-admin top -c {file}")
    assert len(rest.text.splitlines()) <= 50


def test_its_own_name_and_sender_and_the_specimen(mails: MailServer, file: Path) -> None:
    """Postfix's own name is the one it greets and signs with; with the default file no -c is needed."""
    assert run("mail", TO, "--server", mails.address, text=told()).returncode == 0
    assert "  policyd-admin block boris\n" in mails.mails[0].text
    done = mail(mails, file, options=(TO, "--from", "alerts@example.org", "--test"))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"on_stop=policyd-admin mail -c {file} {TO}" in done.stdout
    found = mails.mails[1]
    assert (found.message["From"], "specimen" in found.subject) == ("alerts@example.org", True)
    assert found.sender.startswith("from:<alerts@example.org>")
    check_text(found)
    postconf = '[ "$*" = "-h myhostname" ] && echo relay1.example.org'
    assert mail(mails, file, told(), postconf=postconf).returncode == 0
    found = mails.mails[2]
    assert (found.helo, found.message["From"]) == ("relay1.example.org", "policyd@relay1.example.org")
    assert found.message["Message-ID"].endswith("@relay1.example.org>")


# ---- when something is down ---------------------------------------------------------------------------------------


def test_without_the_database_the_mail_goes_out_and_says_so(
    mails: MailServer, tmp_path: Path, database: Database
) -> None:
    away = settings_file(tmp_path, {**database.settings(), "dbport": str(free_port())})
    assert mail(mails, away, *users(5)).returncode == 0
    began = time.monotonic()
    with table_locked(database):
        assert mail(mails, settings_file(tmp_path, database.settings()), *users(5)).returncode == 0
    assert time.monotonic() - began < 45, "the daemon waits for 60 s"
    assert len(mails.mails) == 10
    for found in mails.mails:
        assert "From where is not known: the database is away.\n" in found.text
        check_text(found)
    away.write_text("mode=audti\n")
    assert mail(mails, away, told()).returncode == 0, "a mistake that was made since keeps no mail back"
    assert len(mails.mails) == 11


@pytest.mark.parametrize("answers", [
    {"greeting": ""}, {"greeting": "554 go away"}, {"mail": "\x00\xff\x1b[31m"}, {"rcpt": "550 5.1.1 unknown"},
    {"data": ""}, {"boris": "452 4.3.1 disk full"},
], ids=str)  # fmt: skip
def test_a_mail_that_nobody_takes_is_a_status_that_the_daemon_tries_again(file: Path, answers: dict[str, str]) -> None:
    with MailServer(**answers) as server:
        assert "127.0.0.1: " in refusal(mail(server, file, told()))
        assert server.mails == []


def test_nobody_listening_and_a_name_that_is_none_are_one_line(file: Path) -> None:
    for server in (f"127.0.0.1:{free_port()}", "no-such-host.invalid", f"[::1]:{free_port()}", "a" * 70 + ".example"):
        refusal(mail(server, file, told()))


def test_one_that_is_refused_does_not_keep_the_others_back(file: Path) -> None:
    with MailServer(user1="452 4.3.1 disk full") as server:
        assert "disk full" in refusal(mail(server, file, *users(4)))
        assert [found.subject.split()[2] for found in server.mails] == ["user0:", "user2:", "user3:"]
    with MailServer(quit="421 4.3.0 shutting down") as server:
        assert mail(server, file, told()).returncode == 0, "it has the mail"


def test_what_is_no_incident_keeps_no_other_back(mails: MailServer, file: Path) -> None:
    for text, status, sent in (
        ("", 0, 0), ("not json\n", 1, 0), ("[]\n", 1, 0), ('{"login": 5}\n', 0, 1), ('broken\n{"login": "a"}\n', 1, 1),
        ('{"login": "a", "figure": "x"}\n', 0, 1), ('{"login": "a", "rule": "HOLD {figure.x}"}\n', 0, 1),
    ):  # fmt: skip
        mails.mails.clear()
        done = mail(mails, file, text)
        assert (done.returncode, done.stderr.count("\n"), len(mails.mails)) == (status, status, sent), text


# ---- what a client sends ------------------------------------------------------------------------------------------


def test_nothing_that_a_client_sends_can_forge_a_mail(mails: MailServer, tmp_path: Path) -> None:
    """Neither its headers nor its text, nor what is pasted from it."""
    store, logins = embedded(tmp_path), [*HOSTILE, "a\nBcc: y@example.net", "x" * 3000]
    counted = [module.login_of(login, False) for login in logins]
    store.add([(login, login, login, 5) for login in counted], 60)
    file = settings_file(tmp_path, {**store.settings, "strip_domain": "no"})
    commands = []
    for login, name in zip(logins, counted):
        done = mail(mails, file, told(name, sender=login, client_address=login, queue_id=login, since=login))
        assert (done.returncode, done.stderr) == (0, "")
        found = mails.mails.pop()
        assert sorted(found.message.keys()) == [
            "Auto-Submitted", "Content-Transfer-Encoding", "Content-Type", "Date", "From", "MIME-Version",
            "Message-ID", "Subject", "To",
        ]  # fmt: skip
        assert found.recipients == [f"to:<{TO}>"]
        assert re.fullmatch(rf"policyd: HOLD [A-Za-z0-9._@+?-]{{1,64}}: 6 new places \({HOST}\)", found.subject)
        commands += check_text(found)
    assert mails.mails == []
    names = [name for name in counted for _ in range(6)]
    assert [words[-1] for words in pasted(commands, tmp_path)] == names


# ---- all of it together -------------------------------------------------------------------------------------------


def test_a_running_daemon_has_it_mail_and_what_the_mail_says_stops_the_thief(
    policyd: Callable[..., Policyd], postfix: Postfix, tmp_path: Path
) -> None:
    """Postfix, policyd, on_stop=, the mail through the same Postfix, and the pasted lines, in their order."""
    postfix.delete("ALL")
    to = f"postmaster{free_port()}@example.net"
    file = tmp_path / "policyd.cfg"
    running = policyd(
        port=postfix.policy_port, defaultquota=3, rejectquota=100,
        on_stop=f"{ADMIN} mail {to} --server 127.0.0.1:{postfix.submission_port}"
        f" --from policyd@relay.example.org -c {file}",
    )  # fmt: skip
    file.write_text(running.settings_file.read_text())
    for recipients in (1, 5):
        with postfix.session(login="boris") as session:
            session.sendmail("boris@example.org", [f"r{n}@example.net" for n in range(recipients)], "Subject: x\n\nx\n")
    (text,) = wait_until(
        lambda: [text for text in postfix.delivered() if f"\nTo: {to}\n" in text], "the mail is delivered"
    )
    found = Mail("", "", [], parse(text.encode()))
    assert found.subject == f"policyd: HOLD boris: 6 recipients, limit 3 ({HOST})"
    user, forgive, block, delete, trace, unblock = check_text(found)
    environment = {"MAIL_CONFIG": str(postfix.directory / "etc")}

    def typed(command: str) -> str:
        done = run(*shlex.split(command)[1:], **environment)
        assert (done.returncode, done.stderr) == (0, ""), (command, done)
        return done.stdout

    assert "\nwhy             overquota (6>3)\n" in typed(user)
    typed(block.replace("block", "block --yes", 1))
    assert running.ask(sasl_username="boris") == "HOLD blocked"
    assert "deleted 1 of 1 messages\n" in typed(delete.replace("delete", "delete --yes", 1))
    assert "1 sent\n" in typed(trace)
    typed(unblock.replace("unblock", "unblock --yes", 1))
    typed(forgive + " --yes")
    assert running.ask(sasl_username="boris") == "DUNNO"


@pytest.mark.parametrize("server", ["::1", "127.0.0.1:x", "a b"])
def test_a_server_that_cannot_be_is_a_wrong_call(file: Path, server: str) -> None:
    done = run("mail", "postmaster@example.net", "--server", server, "-c", file)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_what_is_no_text_keeps_no_mail_back(mails: MailServer, file: Path) -> None:
    done = mail(mails, file, '{"login": "\\ud800", "rule": "HOLD places"}\n', "[" * 100_000 + "\n", told())
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert [found.subject.split()[2] for found in mails.mails] == ["?:", "boris:"]
