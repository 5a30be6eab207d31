"""policyd-admin mail: what on_stop= runs tells a human, once, in a mail that nothing can forge."""

from __future__ import annotations

import contextlib
import email
import email.message
import email.policy
import json
import os
import re
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from scripting import HOSTILE, HOUR_S, Entry, commands_in, fill, paste, run, settings_file
from servers import Policyd, Postfix, free_port, wait_until
from stores import SQLiteStore, Store, on_each_table, table_locked

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
    """Takes mail, or fails in the way that `fails` names."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, fails: str = "") -> None:
        super().__init__(("127.0.0.1", 0), MailHandler)
        self.fails = fails
        self.mails: list[Mail] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        """What --server takes."""
        return f"127.0.0.1:{self.server_address[1]}"


class MailHandler(socketserver.StreamRequestHandler):
    """One session."""

    server: MailServer

    def handle(self) -> None:
        fails = self.server.fails
        if fails == "says nothing":
            self.rfile.read()  # until the other one gives up
            return
        self.say("554 go away" if fails == "greets with a refusal" else "220 mail.example.net ESMTP")
        helo, sender, recipients = "", "", []
        for line in self.rfile:
            verb, _, rest = line.decode("ascii").rstrip("\r\n").partition(" ")
            verb = verb.lower()
            if verb in ("ehlo", "helo"):
                helo = rest
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
                mail = Mail(helo, sender, recipients, parse(self.read_to_the_dot()))
                if fails == "refuses the text" or (fails == "refuses the second" and len(self.server.mails) == 1):
                    fails = fails.replace("the second", "")
                    self.say("452 4.3.1 disk full")
                    continue
                self.server.mails.append(mail)
                self.say("250 2.0.0 Ok: queued")
            elif verb == "quit":
                self.say("421 4.3.0 shutting down" if fails == "refuses to end" else "221 2.0.0 Bye")
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
def mail_server(fails: str = "") -> Iterator[MailServer]:
    """Run a mail server."""
    server = MailServer(fails)
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


def told(
    login: str = "boris", rule: str = "HOLD places", figure: int = 6, limit: int = 5, **more: object
) -> dict[str, Any]:
    """Return an incident as the daemon tells it."""
    return {
        "login": login, "rule": rule, "since": "2026-11-25T03:12:44+01:00", "recipients": 312, "figure": figure,
        "limit": limit, "sender": "bank@example.net", "client_address": "203.0.113.9", "queue_id": "4Xk1b12rTnz3xT",
        **more,
    }  # fmt: skip


def mail(
    server: MailServer,
    file: Path,
    *incidents: dict[str, Any],
    options: tuple[object, ...] = (),
    to: tuple[str, ...] = (TO,),
    **how: Any,
) -> subprocess.CompletedProcess[str]:
    """Run `policyd-admin mail` with these incidents."""
    text = "".join(json.dumps(incident) + "\n" for incident in incidents)
    return run("mail", *to, "--server", server.address, "-c", file, *options, text=text, **how)


def check_text(mail: Mail, login: str | None = None) -> list[str]:
    """Return the commands of a mail that is as small and plain as promised."""
    assert re.fullmatch(r"[ -~\n]*", mail.text)
    assert len(mail.text.splitlines()) <= 50
    assert all(len(line) <= 78 or line.startswith("  policyd-admin ") for line in mail.text.splitlines()), mail.text
    commands = commands_in(mail.text)
    assert [command.split()[1] for command in commands] == ["user", "forgive", "block", "delete", "trace", "unblock"]
    return commands


# ---- what is in it ------------------------------------------------------------------------------------------------


@on_each_table
def test_a_human_is_told_all_that_he_asks(store: Store, mails: MailServer, tmp_path: Path) -> None:
    fill(store, *(Entry(60 + n, "boris", 10 + n, "bank@example.net", f"203.0.113.{n}") for n in range(4)),
         Entry(50, "boris", -6, "", "2001:db8:25::1"), Entry(40, "boris", 7, "b@c", "unknown"), Entry(3, "anna", 99),
         *(Entry(300 + n, "boris", 1, f"s{n}@example.org", f"198.{18 + n}.0.1") for n in range(20)),
         Entry(25 * HOUR_S, "boris", 77, client="10.0.0.1"))  # fmt: skip
    file = settings_file(tmp_path, store.settings)
    done = mail(mails, file, told(), to=(TO, "second@example.net"), TZ="UTC")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (found,) = mails.mails
    assert [to.lower() for to in found.recipients] == [f"to:<{TO}>", "to:<second@example.net>"]
    assert found.message["To"] == f"{TO}, second@example.net"
    assert found.message["From"] == f"policyd@{os.uname().nodename}"
    assert found.helo == os.uname().nodename
    assert found.subject == f"policyd: HOLD boris: 6 new places ({HOST})"
    assert found.message["Auto-Submitted"] == "auto-generated"
    assert found.message["Date"]
    assert found.message["Message-ID"]
    for part in ("Mail of boris\n", "since 2026-11-25 02:12:44 on ", "6 new places", "HOLD places, limit 5",
        "312 recipients",
                 "4Xk1b12rTnz3xT", "203.0.113.9", "<bank@example.net>"):  # fmt: skip
        assert part in found.text, part
    networks, senders = re.findall(r"^The largest .*\n((?: .*\n)+)", found.text, re.MULTILINE)
    lines = [line.split() for line in networks.splitlines()]
    assert lines[:3] == [["46", "203.0.113.0/24"], ["7", "unknown"], ["6", "2001:db8:25::/48"]]
    assert [line[0] for line in lines[3:5]] == ["1", "1"]
    assert lines[5:] == [["and", "18", "more"]]
    assert [line.split() for line in senders.splitlines()][:3] == [
        ["46", "bank@example.net"],
        ["7", "b@c"],
        ["6", "<>"],
    ]
    for command in check_text(found):
        assert (
            command
            == f"policyd-admin {command.split()[1]} " + "--release " * ("forgive" in command) + f"-c {file} boris"
        )


RULES = {
    "HOLD overquota": (1507, 1500, "1507 recipients, quota 1500"),
    "REJECT overquota": (3001, 3000, "3001 recipients, limit 3000"),
    "HOLD hourquota": (301, 300, "301 recipients in an hour, quota 300"), "HOLD places": (16, 15, "16 new places"),
    "HOLD newplace": (120, 100, "120 recipients from new places"), "REJECT places": (6, 5, "6 new places"),
    "HOLD blocked": (0, 0, "blocked by hand"),
}  # fmt: skip


def test_each_rule_has_a_subject_that_sorts(mails: MailServer, tmp_path: Path) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    for rule, (figure, limit, _) in RULES.items():
        assert mail(mails, file, told("boris", rule, figure, limit)).returncode == 0
    assert [found.subject for found in mails.mails] == [
        f"policyd: {rule.partition(' ')[0]} boris: {text} ({HOST})" for rule, (_, _, text) in RULES.items()
    ]


def test_of_many_incidents_five_have_a_mail_and_the_rest_one(mails: MailServer, tmp_path: Path) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    incidents = [told(f"user{n}") for n in range(40)]
    assert mail(mails, file, *incidents, *incidents).returncode == 0, "each one once"
    assert len(mails.mails) == 6
    assert [found.subject.split()[2] for found in mails.mails[:5]] == [f"user{n}:" for n in range(5)]
    rest = mails.mails[5]
    assert rest.subject == f"policyd: 35 more ({HOST})"
    assert "HOLD user5: 6 new places" in rest.text
    assert commands_in(rest.text)[:1] == [f"policyd-admin user -c {file} user5"]
    assert commands_in(rest.text)[-1] == f"policyd-admin top -c {file}"
    assert len(rest.text.splitlines()) <= 50
    assert mail(mails, file, *[told(f"user{n}") for n in range(7)]).returncode == 0
    assert "HOLD user6: " in mails.mails[-1].text


def test_with_the_default_settings_file_no_option_is_needed(mails: MailServer) -> None:
    assert run("mail", TO, "--server", mails.address, text=json.dumps(told()) + "\n").returncode == 0
    assert "  policyd-admin block boris\n" in mails.mails[0].text


def test_the_sender_may_be_given_and_a_specimen_be_sent(mails: MailServer, tmp_path: Path) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    done = mail(mails, file, options=("--from", "alerts@example.org", "--test"))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"on_stop=policyd-admin mail -c {file} {TO}" in done.stdout
    assert mails.mails[0].message["From"] == "alerts@example.org"
    assert mails.mails[0].sender.lower().startswith("from:<alerts@example.org>")
    assert "specimen" in mails.mails[0].subject
    check_text(mails.mails[0])


def test_it_greets_and_signs_with_postfixs_own_name(mails: MailServer, tmp_path: Path) -> None:
    (tmp_path / "postconf").write_text('#!/bin/sh\n[ "$*" = "-h myhostname" ] && echo relay1.example.org\n')
    (tmp_path / "postconf").chmod(0o755)
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    assert mail(mails, file, told(), PATH=f"{tmp_path}:{os.environ['PATH']}").returncode == 0
    (found,) = mails.mails
    assert (found.helo, found.message["From"]) == ("relay1.example.org", "policyd@relay1.example.org")
    assert found.message["Message-ID"].endswith("@relay1.example.org>")


# ---- when something is down ---------------------------------------------------------------------------------------


def test_without_the_database_the_mail_goes_out_and_says_so(mails: MailServer, tmp_path: Path, database: Any) -> None:
    away = {**database.settings(), "dbport": str(free_port())}
    assert mail(mails, settings_file(tmp_path, away), *[told(f"user{n}") for n in range(5)]).returncode == 0
    began = time.monotonic()
    with table_locked(database):
        assert (
            mail(mails, settings_file(tmp_path, database.settings()), *[told(f"user{n}") for n in range(5)]).returncode
            == 0
        )
    assert time.monotonic() - began < 45, "the daemon waits for 60 s"
    assert len(mails.mails) == 10
    for found in mails.mails:
        assert "From where is not known: the database is away.\n" in found.text
        check_text(found)


def test_a_mistake_that_was_made_in_the_settings_since_keeps_no_mail_back(mails: MailServer, tmp_path: Path) -> None:
    file = tmp_path / "policyd.cfg"
    file.write_text("mode=audti\n")
    assert mail(mails, file, told()).returncode == 0
    assert len(mails.mails) == 1


@pytest.mark.parametrize(
    "fails",
    [
        "says nothing",
        "greets with a refusal",
        "speaks something else",
        "refuses the recipient",
        "hangs up in DATA",
        "refuses the text",
    ],
)
def test_a_mail_that_nobody_takes_is_a_status_that_the_daemon_tries_again(tmp_path: Path, fails: str) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    with mail_server(fails) as server:
        done = mail(server, file, told())
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"policyd-admin: 127\.0\.0\.1: [ -~]+\n", done.stderr), done
    server.fails = ""


def test_nobody_listening_and_a_name_that_is_none_are_one_line(tmp_path: Path) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    for server in (f"127.0.0.1:{free_port()}", "no-such-host.invalid", f"[::1]:{free_port()}", "a" * 70 + ".example"):
        done = run("mail", TO, "--server", server, "-c", file, text=json.dumps(told()) + "\n")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1


def test_one_that_is_refused_does_not_keep_the_others_back(tmp_path: Path) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    with mail_server("refuses the second") as server:
        assert mail(server, file, *[told(f"user{n}") for n in range(4)]).returncode == 1
        assert [found.subject.split()[2] for found in server.mails] == ["user0:", "user2:", "user3:"]
    with mail_server("refuses to end") as server:
        assert mail(server, file, told()).returncode == 0, "it has the mail"


@pytest.mark.parametrize(("text", "status", "sent"), [
    ("", 0, 0), ("not json\n", 1, 0), ("[]\n", 1, 0), ('{"login": 5}\n', 0, 1), ('{"login": "a"}\nbroken\n', 1, 1),
    ('{"login": "a", "figure": "x"}\n', 1, 0), ('{"login": "a", "rule": "HOLD {figure.x}"}\n', 0, 1),
])  # fmt: skip
def test_what_is_no_incident_keeps_no_other_back(
    mails: MailServer, tmp_path: Path, text: str, status: int, sent: int
) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    done = run("mail", TO, "--server", mails.address, "-c", file, text=text)
    assert (done.returncode, done.stderr.count("\n"), len(mails.mails)) == (status, status, sent)


# ---- what a client sends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("login", [*HOSTILE, "a\nBcc: y@example.net", "x" * 3000], ids=lambda login: ascii(login[:20]))
def test_nothing_that_a_client_sends_can_forge_a_mail(mails: MailServer, tmp_path: Path, login: str) -> None:
    """Neither its headers nor its text, nor what is pasted from it."""
    store, counted = SQLiteStore(tmp_path / "events.sqlite3"), module.login_of(login, False)
    fill(store, Entry(60, counted, 5, login, login), Entry(60, "innocent", 5))
    file = settings_file(tmp_path, {**store.settings, "strip_domain": "no"})
    done = mail(mails, file, told(counted, sender=login, client_address=login, queue_id=login, since=login))
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = mails.mails
    assert sorted(found.message.keys()) == [
        "Auto-Submitted", "Content-Transfer-Encoding", "Content-Type", "Date", "From", "MIME-Version", "Message-ID",
        "Subject", "To",
    ]  # fmt: skip
    assert [to.lower() for to in found.recipients] == [f"to:<{TO}>"]
    assert re.fullmatch(rf"policyd: HOLD [A-Za-z0-9._@+?-]{{1,64}}: 6 new places \({HOST}\)", found.subject)
    commands = check_text(found)
    if len(login) < 300 and "\n" not in login:
        result = paste(commands[1].replace("forgive --release", "forgive --yes"), tmp_path)
        assert (result.returncode, result.stderr) == (0, ""), result
        assert [row[3] for row in store.rows() if row[0] == "innocent"] == [5]
        assert -5 in [row[3] for row in store.rows() if row[0] == counted]
    assert not (tmp_path / "touched").exists()


# ---- all of it together -------------------------------------------------------------------------------------------


def test_a_running_daemon_has_it_mail_and_what_the_mail_says_stops_the_thief(
    policyd: Callable[..., Policyd], postfix: Postfix, tmp_path: Path
) -> None:
    """Postfix, policyd, on_stop=, the mail through the same Postfix, and the pasted lines, in their order."""
    postfix.delete("ALL")
    to = f"postmaster{free_port()}@example.net"
    from scripting import ADMIN

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
    assert found.subject == f"policyd: HOLD boris: 6 recipients, quota 3 ({HOST})"
    user, forgive, block, delete, trace, unblock = check_text(found)
    environment = {"MAIL_CONFIG": str(postfix.directory / "etc")}

    def typed(command: str) -> str:
        done = paste(command, tmp_path, **environment)
        assert (done.returncode, done.stderr) == (0, ""), (command, done)
        return done.stdout

    assert "state         HOLD: overquota (6>3)\n" in typed(user)
    typed(block.replace("block", "block --yes", 1))
    assert running.ask(sasl_username="boris") == "HOLD blocked"
    assert "deleted 1 message\n" in typed(delete.replace("delete", "delete --yes", 1))
    assert "1 sent\n" in typed(trace)
    typed(unblock.replace("unblock", "unblock --yes", 1))
    typed(forgive + " --yes")
    assert running.ask(sasl_username="boris") == "DUNNO"
