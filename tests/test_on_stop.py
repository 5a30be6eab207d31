"""on_stop=: a program of the site's is told of each login that is stopped, once; and no request waits for it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import stat
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import Relay, forgive, reload
from servers import DUNNO, HOLD, REJECT, Policyd, wait_until
from stores import Clock, KeptLog, Store, on_each_table, read_settings

from policyd import OnStop, Settings

Start = Callable[..., Policyd]

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


class Program:
    """A program for on_stop=, which may fail."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / "program"
        directory.mkdir()
        self.write(PROGRAM)

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self.path.chmod(0o755)

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
        forgive(store, "anna")
    # Each row of a batch is a millisecond older than the next: no forgiven one shall be of the same sender then.
    flood = [{"sasl_username": "anna", "sender": "flood@example.org"}] * 25
    answers = [outcome.answer for outcome in relay.ask_at_once(flood)]
    assert answers == [DUNNO] * 9 + [HOLD] * 10 + [REJECT] * 6
    assert rules(relay) == [("anna", "HOLD overquota"), ("anna", "REJECT overquota")] * 3


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
    assert stat.S_IMODE(telling.file.stat().st_mode) == 0o600
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
