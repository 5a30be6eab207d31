"""policyd-admin mail: what on_stop= runs tells a human, once, in a mail that nothing can forge."""

from __future__ import annotations

import contextlib
import email
import email.policy
import itertools
import json
import os
import re
import shlex
import socketserver
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Callable

import pytest
from scripting import ADMIN, HOSTILE, HOUR_S, Desk, Entry, commands_in, pasted, program, refusal, run
from servers import Database, Policyd, Postfix, free_port, wait_until
from stores import Store, on_stores, table_locked

import policyd as module

TO = "postmaster@example.net"
HOST = os.uname().nodename.partition(".")[0]


def parse(text: bytes) -> EmailMessage:
    """Return a mail, in which nothing may be wrong."""
    message = email.message_from_bytes(text, EmailMessage, policy=email.policy.default)
    assert not message.defects
    return message


def login_of(mail: EmailMessage) -> str:
    return str(mail["Subject"]).split()[2].rstrip(":")


class MailServer(socketserver.ThreadingTCPServer):
    """Takes mail, unless it is to answer otherwise to a command, to the mail of a login, or as its greeting.

    An empty answer is to hang up; an empty greeting, to say nothing.
    """

    allow_reuse_address = daemon_threads = True
    block_on_close = False

    def __init__(self, **answers: str) -> None:
        super().__init__(("127.0.0.1", 0), MailHandler)
        self.answers = {"greeting": "220 mail.example.net ESMTP", "quit": "221 2.0.0 Bye", "data": "354", **answers}
        self.mails: list[EmailMessage] = []
        self.said: dict[str, list[str]] = {}  # in the last session: behind each verb
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class MailHandler(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        said = self.server.said = defaultdict(list)
        if not self.answer("greeting"):
            self.rfile.read()  # until the other one gives up
        for line in self.rfile:
            verb, _, rest = line.decode("ascii").rstrip("\r\n").lower().partition(" ")
            said[verb].append(rest)
            if not self.answer(verb):
                break
            if verb == "data":
                mail = parse(self.read_to_the_dot())
                if login_of(mail) not in self.server.answers:
                    self.server.mails.append(mail)
                self.answer(login_of(mail))

    def answer(self, to: str) -> str:
        """Say, and return, what is to be said."""
        line = self.server.answers.get(to, "250 2.0.0 Ok")
        with contextlib.suppress(OSError):
            self.wfile.write(f"{line}\r\n".encode("latin-1") if line else b"")
        return line

    def read_to_the_dot(self) -> bytes:
        """Return the mail that comes now, with the line ends of a file."""
        lines = list(itertools.takewhile(lambda line: line != b".\r\n", self.rfile))
        assert all(line.endswith(b"\r\n") and len(line) <= 1000 for line in lines), "RFC 5321, 4.5.3.1.6"
        return b"".join(line.removeprefix(b".") for line in lines).replace(b"\r\n", b"\n")


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
    return [told(f"user{n}") for n in range(number)]


def mail(server: MailServer | str, desk: Desk, *incidents: str, options: tuple[str, ...] = (TO,),
         postconf: str = "exit 1") -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run `policyd-admin mail` with these incidents; the real postconf would wait before it fails."""
    address = server if isinstance(server, str) else server.address
    environment = program(desk.file.parent, "postconf", postconf)
    return desk.run("mail", *options, "--server", address, text="".join(incidents), **environment)


def check_text(mail: EmailMessage) -> list[str]:
    """Return the commands of a mail that is as small and plain as promised."""
    text = mail.get_content()
    assert re.fullmatch(r"[ -~\n]*", text)
    assert len(text.splitlines()) <= 50
    assert all(len(line) <= 78 or line.startswith("  policyd-admin ") for line in text.splitlines()), text
    commands = commands_in(text)
    assert [command.split()[1] for command in commands] == ["user", "forgive", "block", "delete", "trace", "unblock"]
    return commands


@on_stores("SQLite", "schema.sql")
def test_a_human_is_told_all_that_he_asks(store: Store, mails: MailServer, desk: Desk) -> None:
    desk.fill(
        *(Entry(60 + n, "boris", 10 + n, "bank@example.net", f"203.0.113.{n}") for n in range(4)), Entry(3, "anna", 99),
        Entry(50, "boris", -6, "", "2001:db8:25::1"), Entry(40, "boris", 7, "b@c", "unknown"),
        *(Entry(300 + n, "boris", 1, f"s{n}@example.org", f"198.{18 + n}.0.1") for n in range(20)),
        Entry(25 * HOUR_S, "boris", 77, client="10.0.0.1"),
    )  # fmt: skip
    done = mail(mails, desk, told(), options=(TO, "second@example.net"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (found,) = mails.mails
    assert mails.said["rcpt"] == [f"to:<{TO}>", "to:<second@example.net>"]
    assert mails.said["ehlo"] == [os.uname().nodename.lower()]
    headers = {
        "To": f"{TO}, second@example.net", "From": f"policyd@{os.uname().nodename}",
        "Subject": f"policyd: HOLD boris: 6 new places ({HOST})", "Auto-Submitted": "auto-generated",
    }  # fmt: skip
    assert {name: found[name] for name in headers} == headers
    text = found.get_content()
    parts = "Mail of boris\n", "since 2026-11-25T03:12:44+01:00 on ", "6 new places (HOLD places)", "312 recipients"
    assert [part for part in parts if part not in text] == []
    networks, senders = re.findall(r"^The largest .*\n((?: .*\n)+)", text, re.MULTILINE)
    lines = [line.split() for line in networks.splitlines()]
    assert lines[:3] == [["46", "203.0.113.0/24"], ["7", "unknown"], ["6", "2001:db8:25::/48"]]
    assert [line[0] for line in lines[3:5]] == ["1", "1"]
    assert lines[5:] == [["and", "18", "more"]]
    lines = [line.split() for line in senders.splitlines()]
    assert lines[:3] == [["46", "bank@example.net"], ["7", "b@c"], ["6", "<>"]]
    for command in check_text(found):
        name = command.split()[1]
        assert command == f"policyd-admin {name} " + "--release " * (name == "forgive") + f"-c {desk.file} boris"


RULES = {
    "HOLD overquota": (1507, 1500, "1507 recipients, limit 1500"),
    "REJECT overquota": (3001, 3000, "3001 recipients, limit 3000"),
    "HOLD hourquota": (301, 300, "301 recipients in an hour, limit 300"), "HOLD places": (16, 15, "16 new places"),
    "HOLD newplace": (120, 100, "120 recipients from new places"), "REJECT places": (6, 5, "6 new places"),
    "HOLD blocked": (0, 0, "blocked by hand"),
}  # fmt: skip


def test_each_rule_has_a_subject_that_sorts(mails: MailServer, desk: Desk) -> None:
    for rule, (figure, limit, _) in RULES.items():
        assert mail(mails, desk, told("boris", rule, figure, limit)).returncode == 0
    assert [found["Subject"] for found in mails.mails] == [
        f"policyd: {rule.partition(' ')[0]} boris: {text} ({HOST})" for rule, (_, _, text) in RULES.items()
    ]
    for found, rule in zip(mails.mails, RULES):
        assert ("--release" in found.get_content()) == rule.startswith("HOLD"), "what was refused is not held"


def test_of_many_incidents_five_have_a_mail_and_the_rest_one(mails: MailServer, desk: Desk) -> None:
    assert mail(mails, desk, *users(40), *users(40)).returncode == 0, "each one once"
    assert list(map(login_of, mails.mails[:5])) == [f"user{n}" for n in range(5)]
    (rest,) = mails.mails[5:]
    assert rest["Subject"] == f"policyd: 35 more ({HOST})"
    assert "HOLD user5: 6 new places" in rest.get_content()
    commands = commands_in(rest.get_content())
    assert commands[0] == f"policyd-admin user -c {desk.file} user5"
    assert commands[-1] == f"policyd-admin top -c {desk.file}"
    assert len(rest.get_content().splitlines()) <= 50


def test_its_own_name_and_sender_and_the_specimen(mails: MailServer, desk: Desk) -> None:
    """Postfix's own name is the one it greets and signs with; with the default file no -c is needed."""
    assert run("mail", TO, "--server", mails.address, text=told()).returncode == 0
    assert "  policyd-admin block boris\n" in mails.mails[0].get_content()
    done = mail(mails, desk, options=(TO, "--from", "alerts@example.org", "--test"))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"on_stop=policyd-admin mail -c {desk.file} {TO}" in done.stdout
    found = mails.mails[1]
    assert (found["From"], "specimen" in found["Subject"]) == ("alerts@example.org", True)
    assert mails.said["mail"][0].startswith("from:<alerts@example.org>")
    check_text(found)
    postconf = '[ "$*" = "-h myhostname" ] && echo relay1.example.org'
    assert mail(mails, desk, told(), postconf=postconf).returncode == 0
    found = mails.mails[2]
    assert (mails.said["ehlo"], found["From"]) == (["relay1.example.org"], "policyd@relay1.example.org")
    assert found["Message-ID"].endswith("@relay1.example.org>")


def test_without_the_database_the_mail_goes_out_and_says_so(mails: MailServer, desk: Desk, database: Database) -> None:
    desk.write(**{**database.settings(), "dbport": str(free_port())})
    assert mail(mails, desk, *users(5)).returncode == 0
    desk.write(**database.settings())
    began = time.monotonic()
    with table_locked(database):
        assert mail(mails, desk, *users(5)).returncode == 0
    assert time.monotonic() - began < 45, "the daemon waits for 60 s"
    assert len(mails.mails) == 10
    for found in mails.mails:
        assert "From where is not known: the database is away.\n" in found.get_content()
        check_text(found)
    desk.write("mode=audti")
    assert mail(mails, desk, told()).returncode == 0, "a mistake that was made since keeps no mail back"
    assert len(mails.mails) == 11


@pytest.mark.parametrize("answers", [
    {"greeting": ""}, {"greeting": "554 go away"}, {"mail": "\x00\xff\x1b[31m"}, {"rcpt": "550 5.1.1 unknown"},
    {"data": ""}, {"boris": "452 4.3.1 disk full"},
], ids=str)  # fmt: skip
def test_a_mail_that_nobody_takes_is_a_status_that_the_daemon_tries_again(desk: Desk, answers: dict[str, str]) -> None:
    """And one that is refused does not keep the others back."""
    with MailServer(**answers) as server:
        assert refusal(mail(server, desk, told(), *users(2 * ("boris" in answers)))).startswith("127.0.0.1: ")
        assert list(map(login_of, server.mails)) == ["user0", "user1"] * ("boris" in answers)


def test_nobody_listening_and_a_name_that_is_none_too(desk: Desk) -> None:
    for server in ("127.0.0.1:{}", "no-such-host.invalid", "[::1]:{}", "a" * 70 + ".example"):
        refusal(mail(server.format(free_port()), desk, told()))
    with MailServer(quit="421 4.3.0 shutting down") as stranger:
        assert mail(stranger, desk, told()).returncode == 0, "it has the mail"


@pytest.mark.parametrize(("text", "status", "sent"), [
    ("", 0, 0), ("not json\n", 1, 0), ("[]\n", 1, 0), ('{"login": 5}\n', 0, 1), ('broken\n{"login": "a"}\n', 1, 1),
    ('{"login": "a", "figure": "x"}\n', 0, 1), ('{"login": "a", "rule": "HOLD {figure.x}"}\n', 0, 1),
    ('{"login": "\\ud800"}\n' + "[" * 100_000 + "\n" + told(), 1, 2),
])  # fmt: skip
def test_what_is_no_incident_keeps_no_other_back(
    mails: MailServer, desk: Desk, text: str, status: int, sent: int
) -> None:
    done = mail(mails, desk, text)
    assert (done.returncode, done.stderr.count("\n"), len(mails.mails)) == (status, status, sent)


def test_nothing_that_a_client_sends_can_forge_a_mail(mails: MailServer, desk: Desk, tmp_path: Path) -> None:
    """Neither its headers nor its text, nor what is pasted from it."""
    logins = [*HOSTILE, "a\nBcc: y@example.net", "x" * 3000]
    counted = [*map(module.Settings(strip_domain=False).login_of, logins)]
    desk.store.add([(login, login, login, 5) for login in counted], 60)
    desk.write(strip_domain="no")
    commands = []
    for login, name in zip(logins, counted):
        done = mail(mails, desk, told(name, sender=login, client_address=login, queue_id=login, since=login))
        assert (done.returncode, done.stderr) == (0, "")
        found = mails.mails.pop()
        assert sorted(found.keys()) == [
            "Auto-Submitted", "Content-Transfer-Encoding", "Content-Type", "Date", "From", "MIME-Version",
            "Message-ID", "Subject", "To",
        ]  # fmt: skip
        assert mails.said["rcpt"] == [f"to:<{TO}>"]
        assert re.fullmatch(rf"policyd: HOLD [A-Za-z0-9._@+?-]{{1,64}}: 6 new places \({HOST}\)", found["Subject"])
        commands += check_text(found)
    assert mails.mails == []
    names = [name for name in counted for _ in range(6)]
    assert [words[-1] for words in pasted(commands, tmp_path)] == names


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
    found = parse(text.encode())
    assert found["Subject"] == f"policyd: HOLD boris: 6 recipients, limit 3 ({HOST})"
    user, forgive, block, delete, trace, unblock = check_text(found)

    def typed(command: str) -> str:
        done = run(*shlex.split(command)[1:], MAIL_CONFIG=str(postfix.directory / "etc"))
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
