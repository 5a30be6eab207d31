"""A human is told of each login that is stopped, once: what on_stop= runs, for which no request waits.

And policyd-admin mail, which it may run: in a mail that nothing can forge.
"""

from __future__ import annotations

import contextlib
import datetime
import email
import email.policy
import itertools
import json
import os
import re
import shlex
import signal
import socketserver
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
import scripting
from asking import Relay, reload
from scripting import ADMIN, HOSTILE, HOUR_S, Desk, Entry, commands_in, pasted, refusal, run
from servers import DUNNO, HOLD, REJECT, Database, Postfix, Result, Start, executable, read_settings, wait_until
from stores import Clock, KeptLog, Listener, Store, on_each_table, on_stores

from policyd import OnStop, Settings

QUOTA = 10
# Keeps its standard input, as one run of those that are told apart by a line.
PROGRAM = """#!/bin/sh
cd "${0%/*}" || exit
cat >>told
grep -E '^(Sig(Blk|Ign)|Cpus_allowed_list):' /proc/self/status >status-of-process
echo "$*" >>arguments
echo ended >>told
exit 0
"""
FAILING = PROGRAM.replace("exit 0", "exit 75")
TO = "postmaster@example.net"
HOST = os.uname().nodename.partition(".")[0]


class Program:
    """A program for on_stop=, which may fail."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / "program"
        directory.mkdir()
        self.write(PROGRAM)

    def write(self, text: str) -> None:
        executable(self.path, text)

    def said(self, name: str) -> list[str]:
        file = self.directory / name
        return file.read_text().splitlines() if file.exists() else []

    def runs(self) -> list[list[dict[str, Any]]]:
        """Return what each run that is over was told."""
        runs = "\n".join(self.said("told")).split("ended")[:-1]
        return [[json.loads(line) for line in run.split("\n") if line] for run in runs]

    def logins(self) -> list[list[str]]:
        """Return the logins that each run that is over was told of."""
        return [[incident["login"] for incident in run] for run in self.runs()]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "a program")


def rules(relay: Relay) -> list[tuple[str, str]]:
    return [(each["login"], each["rule"]) for each in relay.told]


@on_each_table
def test_a_login_is_told_of_once_a_day_and_once_more_when_it_is_refused(store: Store, logged: KeptLog) -> None:
    """By whichever relay; the rule and its figures are those of the message that was the first."""
    one, other = (Relay(store, logged, f"defaultquota={QUOTA}", "quota=own:5:3") for _ in range(2))
    assert one.ask("anna", recipient_count=9).answer == DUNNO
    assert one.told == []
    assert [relay.ask("anna", recipient_count=3).answer for relay in (one, one, other)] == [HOLD] * 3
    assert [other.ask("own", recipient_count=3).answer for _ in range(2)] == ["HOLD hour quota exceeded", HOLD]
    assert [relay.ask("anna", recipient_count=3).answer for relay in (other, one)] == [REJECT] * 2
    assert rules(one) == [("anna", "HOLD overquota")]
    assert rules(other) == [("own", "HOLD hourquota"), ("anna", "REJECT overquota")]
    figures = [(each["recipients"], each["figure"], each["limit"]) for each in one.told + other.told]
    assert figures == [(12, 12, 10), (3, 3, 3), (21, 21, 20)]
    kinds = {(login, what) for login, _, what, count in store.rows() if count is None}
    assert kinds == {("anna", "HOLD overquota"), ("own", "HOLD hourquota"), ("anna", "REJECT overquota")}


@on_each_table
def test_a_second_wave_after_a_forgive_is_told_of_again(store: Store, logged: KeptLog) -> None:
    """And of a flood that comes at once, once: also before its incident is in the table."""
    relay = Relay(store, logged, f"defaultquota={QUOTA}")
    for _ in range(2):
        assert [relay.ask("anna", recipient_count=6).answer for _ in range(4)] == [DUNNO, HOLD, HOLD, REJECT]
        store.forgive("anna")
    # Each row of a batch is a millisecond older than the next: no forgiven one shall be of the same sender then.
    flood = [{"sasl_username": "anna", "sender": "flood@example.org"}] * 25
    answers = [outcome.answer for outcome in relay.ask_at_once(flood)]
    assert answers == [DUNNO] * 9 + [HOLD] * 10 + [REJECT] * 6
    assert rules(relay) == [("anna", "HOLD overquota"), ("anna", "REJECT overquota")] * 3
    assert [each["queue_id"] for each in relay.told] == ["4Xk1Zt", ""] * 3  # what is refused is in no queue


@on_each_table
@pytest.mark.parametrize("lines", ["blacklist=anna", "mode=audit", "quota=anna:unlimited"])
def test_of_the_blacklisted_and_in_an_audit_nobody_is_told(store: Store, logged: KeptLog, lines: str) -> None:
    """The site knows; and in an audit nobody is stopped."""
    relay = Relay(store, logged, f"defaultquota={QUOTA}", lines)
    for _ in range(2):
        relay.ask("anna", recipient_count=15)
    assert relay.told == [row for row in store.rows() if row[3] is None] == []


@on_each_table
def test_what_cannot_be_held_is_told_of_as_refused_without_held_mail(store: Store, logged: KeptLog) -> None:
    """And when some of it is held at another door, once more."""
    relay = Relay(store, logged, f"defaultquota={QUOTA}")
    for queue_id, answer in (*[("", "REJECT quota exceeded")] * 2, ("4Xk2", HOLD), ("4Xk3", HOLD)):
        assert relay.ask("anna", recipient_count=1 if relay.told else QUOTA, queue_id=queue_id).answer == answer
    told = [(each["rule"], each["queue_id"]) for each in relay.told]
    assert told == [("REJECT overquota", ""), ("HOLD overquota", "4Xk2")]


class Telling:
    """OnStop with a clock that is set, and without its thread."""

    def __init__(self, program: Program, file: Path) -> None:
        self.clock, self.file = Clock(), file
        settings = read_settings(f"on_stop='{program.path}' one 'two three'")
        self.on_stop = OnStop(str(file), settings, self.clock)

    def tell(self, *logins: str, after_s: float = 0) -> list[str]:
        """Tell of these, so much later, and let it do what is due; return the logins that wait in the file then."""
        self.clock.now += after_s
        for login in logins:
            self.on_stop.incidents.put({"login": login})
        self.on_stop.turn()
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line)["login"] for line in lines]


@pytest.fixture
def telling(program: Program, tmp_path: Path, logged: KeptLog) -> Telling:
    return Telling(program, tmp_path / "incidents.json")


def test_the_first_is_told_at_once_and_later_ones_after_three_minutes(telling: Telling, program: Program) -> None:
    """A thief with a hundred accounts must not mean a hundred mails."""
    assert telling.tell("anna") == []
    assert program.logins() == [["anna"]]
    telling.tell("bert", "carl")
    telling.tell("dora", after_s=90)
    assert telling.tell("emil", after_s=89) == ["bert", "carl", "dora", "emil"]
    assert program.logins() == [["anna"]]
    assert telling.file.stat().st_mode & 0o777 == 0o600
    assert telling.tell(after_s=1) == []
    telling.tell(after_s=180)
    telling.tell("anna")
    assert program.logins() == [["anna"], ["bert", "carl", "dora", "emil"], ["anna"]]
    assert program.said("arguments") == ["one two three"] * 3


def test_a_failed_program_is_run_again_each_minute(telling: Telling, program: Program, logged: KeptLog) -> None:
    """The incidents stay in the file until it ends with 0; after an hour it is given up, and the log says so."""
    program.write(FAILING)
    assert telling.tell("anna") == ["anna"]
    telling.tell("bert", after_s=59)
    assert program.logins() == [["anna"]]
    assert telling.tell("carl", after_s=1) == ["anna", "bert", "carl"]
    program.write(PROGRAM)
    assert telling.tell(after_s=60) == []
    assert program.logins() == [["anna"], *[["anna", "bert", "carl"]] * 2]
    (line,) = {line.text.partition(" (")[0] for line in logged.lines}
    assert line == f"on_stop='{program.path}' one 'two three': status 75; trying again each minute for an hour"
    program.write(FAILING)
    assert telling.tell("late", after_s=180) == ["late"]
    assert [telling.tell(after_s=60) for _ in range(60)] == [["late"]] * 59 + [[]]
    assert program.logins()[3:] == [["late"]] * 61
    assert logged.errors() == ["gave up telling of 1 incidents: status 75"]


def test_a_program_that_hangs_is_killed_with_all_its_children(
    telling: Telling, program: Program, logged: KeptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policyd.MINUTE_S", 1)
    program.write('#!/bin/sh\ncd "${0%/*}"\nsleep 1000 &\necho $$ $! >new-pids && mv new-pids pids\nwait\n')
    assert telling.tell("anna") == ["anna"]
    assert logged.lines[0].text.endswith(": not done after 1 s; trying again each minute for an hour")
    for pid in program.said("pids")[0].split():
        with contextlib.suppress(FileNotFoundError):
            wait_until(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().split()[2] in "ZX", f"{pid} has ended")


def test_a_program_that_is_not_there_is_a_warning(telling: Telling, program: Program, logged: KeptLog) -> None:
    """Once it is switched off nothing waits, nor what waited before."""
    program.path.unlink()
    assert telling.tell("anna") == ["anna"]
    assert "No such file or directory; trying again each minute" in logged.lines[0].text
    telling.on_stop.settings = Settings()
    assert telling.tell(after_s=60) == []
    program.write(PROGRAM)
    for login in ("bert", "carl"):
        assert telling.tell(login, after_s=600) == []
    assert program.logins() == []


def test_incidents_that_cannot_be_kept_are_told_all_the_same(program: Program, tmp_path: Path, logged: KeptLog) -> None:
    Telling(program, tmp_path / "nowhere" / "incidents.json").tell("anna")
    assert program.logins() == [["anna"]]
    assert logged.lines[0].text == f"{tmp_path}/nowhere/incidents.json cannot be written: No such file or directory"


def test_the_daemon_tells_all_that_a_human_asks(policyd: Start, program: Program) -> None:
    """As JSON, a line for each; the program has a life of its own: no signal blocked, all processors.

    A reload switches it on and off.
    """
    daemon = policyd(defaultquota=QUOTA)
    daemon.write_settings(defaultquota=QUOTA, on_stop=f"'{program.path}' --to 'a b'")
    reload(daemon)
    before = datetime.datetime.now().astimezone()
    who = {"sasl_username": "Boris@example.org", "sender": "\xe9@\"x\"", "client_address": "2001:db8::1"}
    for recipients, queue_id in ((9, "4Xk1"), (3, "4Xk2"), (1, "4Xk3")):
        daemon.ask(recipient_count=recipients, queue_id=queue_id, **who)
    wait_until(program.runs, "it is told")
    ((incident,),) = program.runs()
    since = datetime.datetime.fromisoformat(incident.pop("since"))
    assert since.utcoffset() == before.utcoffset()
    assert abs((since - before).total_seconds()) < 600
    assert incident == {
        "login": "boris", "rule": "HOLD overquota", "recipients": 12, "figure": 12, "limit": 10,
        "sender": "\xe9@\"x\"", "client_address": "2001:db8::1", "queue_id": "4Xk2",
    }  # fmt: skip
    assert program.said("arguments") == ["--to a b"]
    facts = dict(line.split(":\t") for line in program.said("status-of-process"))
    assert int(facts["SigBlk"], 16) == 0
    assert int(facts["SigIgn"], 16) & 1 << signal.SIGPIPE - 1 == 0
    ours = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert facts["Cpus_allowed_list"] == ours["Cpus_allowed_list"]
    incidents = daemon.statedir / "incidents.json"
    wait_until(lambda: not incidents.exists(), "nothing waits")
    daemon.write_settings(defaultquota=QUOTA)
    reload(daemon)
    assert daemon.ask(sasl_username="carl", recipient_count=QUOTA) == HOLD
    assert daemon.stop() == 0
    assert not incidents.exists()
    assert program.logins() == [["boris"]]


def test_no_answer_waits_for_the_program_nor_does_the_end(policyd: Start, program: Program) -> None:
    """What it was told of is told again after the restart, with what came later: rather twice than never."""
    program.write("#!/bin/sh\necho $$ >\"${0%/*}/pid\"\nexec sleep 1000\n")
    daemon = policyd(defaultquota=QUOTA, on_stop=program.path.name, environment={
        "PATH": f"{program.directory}:{os.environ['PATH']}"})  # fmt: skip
    incidents = daemon.statedir / "incidents.json"
    for n in range(5):
        assert daemon.ask(sasl_username=f"login{n}", recipient_count=QUOTA) == HOLD
    wait_until(lambda: incidents.exists() and "login0" in incidents.read_text(), "it is told")
    assert daemon.stop() == 0
    os.kill(int(program.said("pid")[0]), signal.SIGKILL)  # as systemd does
    assert [json.loads(line)["login"] for line in incidents.read_text().splitlines()] == [f"login{n}" for n in range(5)]
    program.write(PROGRAM)
    daemon.start()
    wait_until(lambda: not incidents.exists(), "it is told")
    assert program.logins() == [[f"login{n}" for n in range(5)]]
    assert daemon.ask(sasl_username="login1") == HOLD, "and nobody is told of it again"
    assert not incidents.exists()


def parse(text: bytes) -> EmailMessage:
    """Return a mail, in which nothing may be wrong."""
    message = email.message_from_bytes(text, EmailMessage, policy=email.policy.default)
    assert not message.defects
    return message


def login_of(mail: EmailMessage) -> str:
    return str(mail["Subject"]).split()[2].rstrip(":")


class MailServer(Listener):
    """Takes mail, unless it is to answer otherwise to a command, to the mail of a login, or as its greeting.

    An empty answer is to hang up; an empty greeting, to say nothing.
    """

    def __init__(self, **answers: str) -> None:
        self.answers = {"greeting": "220 mail.example.net ESMTP", "quit": "221 2.0.0 Bye", "data": "354", **answers}
        self.mails: list[EmailMessage] = []
        self.said: dict[str, list[str]] = {}  # in the last session: behind each verb
        super().__init__(MailHandler)
        self.address = f"127.0.0.1:{self.port}"


class MailHandler(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        said = self.server.said = {}
        if not self.answer("greeting"):
            self.rfile.read()  # until the other one gives up
        for line in self.rfile:
            verb, _, rest = line.decode("ascii").rstrip("\r\n").lower().partition(" ")
            said.setdefault(verb, []).append(rest)
            if not self.answer(rest if rest in self.server.answers else verb):
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
         postconf: str = "exit 1") -> Result:  # fmt: skip
    """Run `policyd-admin mail` with these incidents; the real postconf would wait before it fails."""
    address = server if isinstance(server, str) else server.address
    environment = scripting.program(desk.file.parent, "postconf", postconf)
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
        Entry(25 * HOUR_S, "boris", 77, client="10.0.0.1"), Entry(41, "boris", 5, "b@c", "10.0.0.0/8"),
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
    assert (lines[3], lines[4][0]) == (["5", "10.0.0.0/24"], "1")
    assert lines[5:] == [["and", "19", "more"]]
    lines = [line.split() for line in senders.splitlines()]
    assert lines[:3] == [["46", "bank@example.net"], ["12", "b@c"], ["6", "<>"]]
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
    how = f"{TO} --from=alerts@example.org --server={mails.address}"
    assert f"on_stop=policyd-admin mail -c {desk.file} {how}\n" in done.stdout
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
    desk.write(**database.settings(dbport=1))
    assert mail(mails, desk, *users(5)).returncode == 0
    desk.write(**database.settings())
    began = time.monotonic()
    with database.table_locked():
        assert mail(mails, desk, *users(5)).returncode == 0
    assert time.monotonic() - began < 45, "the daemon waits for 60 s"
    assert len(mails.mails) == 10
    for found in mails.mails:
        assert "From where is not known: the database is away, or too slow.\n" in found.get_content()
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


def test_who_is_refused_beside_others_is_named_and_does_not_have_them_told_again(desk: Desk) -> None:
    with MailServer(**{"to:<lost@example.org>": "550 5.1.1 unknown"}) as server:
        done = mail(server, desk, told(), options=(TO, "lost@example.org"))
        assert (done.returncode, len(server.mails), "lost@example.org" in done.stderr) == (0, 1, True)
        assert "lost@example.org" in refusal(mail(server, desk, options=(TO, "lost@example.org", "--test")))


def test_nobody_listening_and_a_name_that_is_none_too(desk: Desk) -> None:
    for server in ("127.0.0.1:1", "no-such-host.invalid", "[::1]:1", "a" * 70 + ".example"):
        refusal(mail(server, desk, told()))
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
    counted = [*map(Settings(strip_domain=False).login_of, logins)]
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
    policyd: Start, postfix: Postfix, tmp_path: Path
) -> None:
    """Postfix, policyd, on_stop=, the mail through the same Postfix, and the pasted lines, in their order."""
    postfix.delete("ALL")
    to = "human@example.net"
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
