"""The life of the process: systemd, signals, the log, its statedir; its figures, for SIGUSR1, systemd and Prometheus.

And SIGHUP, at which the settings are read again: whole or not at all, and nobody who asks notices.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from asking import Load, Relay, complaints, reload, running_here, status
from hypothesis import given
from hypothesis import strategies as st
from servers import (
    DUNNO,
    HOLD,
    REJECT,
    Connection,
    Start,
    own_mounts,
    request_bytes,
    run_policyd,
    wait_until,
    write_settings,
)
from stores import Clock, KeptLog, SQLiteStore, Store, event, on_each_table, on_stores

import policyd as module
from policyd import DAY_S, HOUR_S, PAUSE_S, Daemon, Figures, Settings, SQLiteRepository, purge

HOUR, BLACKLISTED = "HOLD hour quota exceeded", "HOLD blacklisted"
ALWAYS = "whitelist_days=1-7 whitelist_hours=0-24"
EARLY = ["early_signs=yes", "keep_days=30", "max_places=1"]
PLACES = "HOLD too many places"
Samples = dict[str, float]
QUOTA = 10
SERIES = [  # of requests: login, recipients, answer
    ("anna", 9, DUNNO), ("anna", 1, HOLD), ("anna", 10, REJECT), ("bert", 10, HOLD), ("bert", 1, HOLD),
    ("phished", 1, "HOLD blacklisted"), ("", 5, DUNNO), ("carl", 1, DUNNO),
]  # fmt: skip


def test_systemd_is_told_when_it_serves_that_it_lives_and_when_it_ends(policyd: Start) -> None:
    """As often as it asks, with the figures of the moment.  The first line of the log says all that matters."""
    daemon = policyd(environment={"WATCHDOG_USEC": "100000"}, defaultquota=42)
    status = rf"READY=1\nWATCHDOG=1\nSTATUS={{}} requests: \d .*; database up, .* on inet:127\.0\.0\.1:{daemon.port}"
    assert re.fullmatch(status.format(0), daemon.notify.messages()[0])
    line = daemon.log_lines()[0]
    assert line[:4] == ("daemon", "info", "policyd", daemon.pid)
    assert line.text.startswith(f"policyd {module.__version__} on inet:127.0.0.1:{daemon.port}, ")
    for part in ("quota 42", f"embedded store {daemon.statedir}/events.sqlite3", f"settings: {daemon.settings_file}"):
        assert part in line.text
    assert [daemon.ask(sasl_username=login) for login in ("anna", "")] == [DUNNO] * 2
    assert re.fullmatch(status.format(2), daemon.notify.wait_for("2 requests"))
    daemon.notify.wait_for("WATCHDOG=1", count=3)
    assert daemon.stop() == 0
    assert daemon.notify.messages()[-1] == "STOPPING=1"
    assert daemon.stderr == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [
    "", "PolicyServer.serve_forever", "Daemon.publish", "Policy.sweep", "OnStop.turn", "Recorder.turn",
    "Recorder.tell", "Recorder.look_for_store", "Log._write_all", "an event that waits",
])  # fmt: skip
def test_the_watchdog_is_fed_only_while_all_threads_live_and_no_event_waits_for_10_s(
    file: Path, logged: KeptLog, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whichever of them a fault of ours ends: the accepting one, too."""
    told: list[str] = []
    monkeypatch.setattr("policyd.sd_notify", lambda *lines: told.extend(lines))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    if "." in fault:
        monkeypatch.setattr(f"policyd.{fault}", lambda *_: 1 / 0)
    if fault == "PolicyServer.serve_forever":
        monkeypatch.setattr("policyd.PolicyServer.shutdown", lambda self: None)  # it waits for the thread
    if fault != "Log._write_all":
        logged.thread.start()
    waits_s = 10.1 if fault == "an event that waits" else 9.9
    monkeypatch.setattr("policyd.Recorder.longest_wait_s", lambda self: waits_s)
    with running_here(file) as here:
        if not fault:
            wait_until(lambda: told.count("WATCHDOG=1") >= 3, "it is fed")
            return
        here._recorder.record(event("anna"), lambda _: None)
        for n in (1, 2, 3):
            before = len(told)
            os.write(here.wakeup, bytes([signal.SIGUSR1]))
            wait_until(lambda n=n: sum(" requests: " in line.text for line in logged.lines) == n, "a status is logged")
            wait_until(lambda: not here.is_well(), "it is noticed")
        assert told[before:] == []


def test_a_second_daemon_on_a_statedir_ends_and_says_who_has_it(policyd: Start, file: Path) -> None:
    """Both would move the same journal; and the first one never notices."""
    daemon = policyd(statedir=file.parent)
    for _ in range(2):
        done = run_policyd("-c", file)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
        assert f"policyd with pid {daemon.pid} keeps its events there" in done.stderr
    assert daemon.ask() == DUNNO
    daemon.kill()
    assert daemon.start().ask() == DUNNO


def test_a_statedir_that_is_not_there_is_a_warning_and_mail_is_counted(policyd: Start, database: Any) -> None:
    daemon = policyd(defaultquota=2, mounts='rmdir "$STATE_DIRECTORY"', **database.settings())
    assert [daemon.ask() for _ in range(2)] == [DUNNO, HOLD]
    assert any("statedir: [Errno 2] No such file or directory: " in line for line in complaints(daemon))


def test_a_reload_reads_a_file_that_was_not_there_at_the_start(
    tmp_path: Path, logged: KeptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "policyd.cfg"
    monkeypatch.setattr("policyd.SETTINGS_FILE", str(file))
    daemon = Daemon(Settings(port=0, statedir=str(tmp_path)))
    daemon.reload()
    assert logged.lines[-1].text.endswith("No such file or directory; going on with the old settings")
    file.write_text("defaultquota=2\n")
    daemon.reload()
    assert logged.lines[-1].text.endswith(f"settings read again: {file}")
    assert daemon._recorder.settings.defaultquota == 2
    daemon.server.server_close()


def test_with_stderr_it_logs_there_and_hangup_of_its_terminal_ends_it(file: Path) -> None:
    """Whether there is a /dev/log or not.  Nobody who tries it out means a reload by that."""
    port, errors = Settings.from_file(str(file)).port, file.with_name("stderr")
    ours, theirs = pty.openpty()
    with errors.open("wb") as stderr:
        command = [sys.executable, module.__file__, "--stderr", "-c", str(file)]
        process = subprocess.Popen(command, stdin=theirs, stderr=stderr)
    try:
        wait_until(lambda: b"\n" in errors.read_bytes(), "it has started")
        with Connection(("127.0.0.1", port)) as connection:
            assert connection.ask() == DUNNO
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    first, second, last = errors.read_text().replace(f"policyd[{process.pid}]: ", "TAG ").splitlines()
    assert first.startswith(f"TAG policyd {module.__version__} on inet:127.0.0.1:")
    assert second == "TAG Updating db: alice/alice@example.org/192.0.2.1/1/1"
    assert last.startswith("TAG policyd ends; ")


def test_whoever_starts_it_by_hand_reads_that_it_serves_and_logs_to_syslog(file: Path, tmp_path: Path) -> None:
    """Under systemd, which has the log anyway, it says nothing there."""
    (dev := tmp_path / "dev").mkdir()
    (dev / "log").touch()
    command = [*own_mounts(dev, mounts="unset NOTIFY_SOCKET"), sys.executable, module.__file__, "-c", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "policyd.prom").exists, "it serves")
        process.terminate()
        _, said = process.communicate()
    assert re.fullmatch(rf"policyd .* on inet:127\.0\.0\.1:.*, embedded store {tmp_path}/.*; logging to syslog\n", said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_at_the_end_what_was_received_is_answered_and_stored_and_the_idle_see_it(policyd: Start, number: int) -> None:
    """Also one in the middle of a request, which nobody will complete.

    It starts again at once on the port it had; and what was answered is counted after a crash, too.
    """
    daemon = policyd()
    with daemon.connect() as connection, daemon.connect() as idle, daemon.connect() as begun:
        for each in (connection, idle, begun):
            assert each.ask() == DUNNO  # the connection is accepted
        begun.sendall(request_bytes()[:-1])
        connection.sendall(b"".join(request_bytes() for _ in range(200)))
        daemon.signal(number)
        assert connection.rest() == b"action=DUNNO\n\n" * 200
        assert idle.rest() == begun.rest() == b""
        assert daemon.process.wait(20) == 0
        with pytest.raises(ConnectionRefusedError):
            daemon.connect()
    assert daemon.log_lines()[-1].text.startswith("policyd ends; 203 requests: 203 DUNNO, 0 HOLD, 0 REJECT; ")
    assert {line.level for line in daemon.log_lines()} == {"info"}
    for sum_ in (204, 205):
        daemon.start().ask()
        daemon.wait_for_log(f"Updating db: alice/alice@example.org/192.0.2.1/1/{sum_}")
        daemon.kill()


def test_at_the_end_it_waits_for_the_database(policyd: Start, database: Any) -> None:
    """For what is being recorded: nobody's message is forgotten, nobody's answer lost."""
    daemon = policyd(**database.settings())
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(daemon.connect()) for _ in range(5)]
        for connection in connections:
            assert connection.ask(sasl_username="known") == DUNNO
        with database.table_locked():
            for connection in connections:
                connection.sendall(request_bytes())
            wait_until(lambda: any("INSERT" in (what or "") for _, what, _ in database.sessions()), "the insert waits")
            daemon.signal(signal.SIGTERM)
            daemon.notify.wait_for("STOPPING=1")
        assert [connection.rest() for connection in connections] == [b"action=DUNNO\n\n"] * 5
    assert daemon.process.wait(20) == 0
    assert database.query("SELECT SUM(recipient_count) FROM events WHERE sasl_username = 'alice'") == [(5,)]


def test_a_signal_is_acted_upon_at_once_whichever_thread_the_kernel_hands_it_to(policyd: Start) -> None:
    """In a rush of connections it may be one that just begins; the main one looks around every ten seconds only."""
    daemon = policyd()
    other = max(int(task.name) for task in Path(f"/proc/{daemon.pid}/task").iterdir())
    os.kill(other, signal.SIGUSR1)
    daemon.wait_for_log(" requests: ", timeout=5)
    os.kill(other, signal.SIGTERM)
    assert daemon.process.wait(timeout=5) == 0


def test_a_stuck_syslog_delays_no_answer(policyd: Start) -> None:
    """Of 20,000 lines it keeps 10,000, and when somebody reads again it says how many were lost."""
    daemon = policyd(blacklist="listed")
    daemon.syslog.pause()
    glued, expected = request_bytes(sasl_username="listed", instance="") * 500, b"action=HOLD blacklisted\n\n" * 500
    with daemon.connect() as connection, connection.makefile("rb") as answers:
        for _ in range(40):
            connection.sendall(glued)
            assert answers.read(len(expected)) == expected
    daemon.syslog.resume()
    line = daemon.wait_for_log("log lines were lost")
    lost = re.fullmatch(r"(\d+) log lines were lost: syslog did not take them", line.text)
    assert (line.level, bool(lost)) == ("warning", True)
    kept = sum(line.text.startswith("Holding blacklisted user: listed/") for line in daemon.log_lines())
    assert kept + int(lost[1]) == 20_000
    assert kept >= 10_000


@pytest.mark.parametrize("trouble", ["pause", "close"])
def test_a_syslog_that_is_stuck_or_gone_delays_neither_answers_nor_the_end(policyd: Start, trouble: str) -> None:
    daemon = policyd(blacklist="listed")
    getattr(daemon.syslog, trouble)()
    assert [daemon.ask(sasl_username="listed") for _ in range(100)] == ["HOLD blacklisted"] * 100
    assert daemon.stop() == 0  # and not by force


def reloaded(daemon: Any) -> list[tuple[str, str]]:
    """Reload; return the level and the text of each line so far, but for those of messages: they come after answers."""
    reload(daemon)
    return [(line.level, line.text) for line in daemon.lines_so_far() if not line.text.startswith("Updating db: ")]


def test_a_new_quota_applies_to_the_next_message(policyd: Start) -> None:
    """Also beside a setting that is gone, which is an error in the log."""
    daemon = policyd(defaultquota=10)
    assert daemon.ask(recipient_count=5) == DUNNO
    daemon.write_settings(defaultquota=5, max_networks=10)
    (level, text), last = reloaded(daemon)[-2:]
    assert (level, "max_networks= is gone; write instead: early_signs=audit" in text) == ("err", True)
    assert last == ("info", f"settings read again: {daemon.settings_file}")
    assert [daemon.ask(recipient_count=count) for count in (1, 4)] == [HOLD, REJECT]


REACHES_10, REACHES_4 = {"login": "alice", "recipient_count": 10}, {"login": "alice", "recipient_count": 4}
IS_LISTED = {"login": "phished"}
TO_THE_HELPDESK = {"login": "phished", "recipient": "helpdesk@example.org"}
CHANGES: list[tuple[str, str, dict[str, Any], str, str]] = [  # settings, and those after them; message; the answers
    ("", "mode=audit", REACHES_10, HOLD, DUNNO),
    ("mode=audit", "", REACHES_10, DUNNO, REJECT),
    ("", "mode=audit", IS_LISTED, BLACKLISTED, DUNNO),
    ("", "quota=alice:unlimited", REACHES_10, HOLD, DUNNO),
    ("quota=alice:100", "quota=alice:15", REACHES_10, DUNNO, HOLD),
    ("rejectquota=10", "rejectquota=25", REACHES_10, REJECT, HOLD),
    ("hold_message=Anna", "hold_message=Bert defaultquota=15", REACHES_10, f"{HOLD}; Anna", f"{HOLD}; Bert"),
    ("rejectquota=10 reject_message=Anna", "", REACHES_10, f"{REJECT}; Anna", REJECT),
    ("", "hourquota=8", REACHES_4, DUNNO, HOUR),
    ("hourquota=4", "hourquota=4 quota=alice:9:0", REACHES_4, HOUR, DUNNO),
    ("", "quota=alice:9:8", REACHES_4, DUNNO, HOUR),
    ("", "always_allow=helpdesk@example.org", TO_THE_HELPDESK, BLACKLISTED, DUNNO),
    ("", "strip_domain=no", {"login": "alice@example.org", "recipient_count": 9}, DUNNO, DUNNO),
    ("blacklist=alice", f"whitelist=alice {ALWAYS}", REACHES_10, BLACKLISTED, DUNNO),
    (f"whitelist=alice {ALWAYS}", f"whitelist=alice {ALWAYS[:-4]}0-0", REACHES_10, DUNNO, HOLD),
]


@pytest.mark.parametrize(("before", "after", "message", "first", "second"), CHANGES, ids=str)
@on_stores("SQLite", "schema.sql")
def test_what_a_site_changes_of_the_rule_applies_to_the_next_message(
    store: Store, logged: KeptLog, before: str, after: str, message: dict[str, Any], first: str, second: str
) -> None:
    """The second message counts on top of the first one, whatever became of that."""
    lines = [[*each.split(), "blacklist=phished", *["defaultquota=10"] * ("defaultquota" not in each)]
             for each in (before, after)]  # fmt: skip
    relay = Relay(store, logged, *lines[0])
    assert relay.ask(**message).answer == first
    relay.reload(*lines[1])
    assert relay.ask(**message).answer == second


@pytest.mark.parametrize(("other", "back"), [
    ([], DUNNO), (["early_signs=no"], DUNNO), (["early_signs=audit", *EARLY[1:]], DUNNO),
    ([*EARLY, "mode=audit"], DUNNO),
    ([*EARLY[:2], "max_places=2"], PLACES), ([*EARLY, "trusted_network=21.0.0.0/8"], PLACES),  # the incident lasts
], ids=str)  # fmt: skip
@on_stores("SQLite", "schema.sql")
def test_what_a_site_changes_of_the_early_signs_applies_within_a_minute(
    store: Store, logged: KeptLog, other: list[str], back: str
) -> None:
    """Of a login that has come from one new place and comes from another one; there and back."""
    store.add([("bert", "", "192.0.2.1", 1)], age_s=4 * DAY_S)
    store.add([("alice", "", "20.0.0.1", 50)], age_s=600)
    relay = Relay(store, logged, *other)
    for lines, answer in ((other, DUNNO), (EARLY, PLACES), (other, back)):
        relay.reload(*lines)
        relay.sweep()
        assert relay.ask("alice", client_address="21.0.0.1").answer == answer


@on_each_table
def test_a_higher_quota_sums_as_far_as_it_needs(store: Store, logged: KeptLog) -> None:
    """Of a long history only as much is summed as decides; a higher quota needs more of it."""
    store.add([("alice", "", "", 1)] * 500, age_s=60)
    relay = Relay(store, logged, "defaultquota=1")
    assert [relay.ask("alice").answer for _ in range(2)] == [REJECT] * 2
    relay.reload("defaultquota=1", "quota=alice:504")
    assert [relay.ask("alice").answer for _ in range(2)] == [DUNNO, HOLD]
    relay.reload("defaultquota=1000")
    assert relay.ask("alice").lines == ["Updating db: alice/alice@example.org/192.0.2.1/1/505"]


def test_a_mistake_or_no_file_is_logged_and_the_old_settings_stay(policyd: Start) -> None:
    """All of them: what stands before the mistake does not apply either."""
    daemon = policyd(defaultquota=10, blacklist="phished", quota="bert:unlimited")
    file = daemon.settings_file
    for mistake, said in [
        ("whitelist_hours=7 to 19", "whitelist_hours=7 to 19: give FROM-TO, say 7-19"),
        ("blacklist=boris # phished", "blacklist=boris # phished: give one login, sender, @domain, "),
        ("quota=A:2\nquota=a@b:3", "a has a quota= already; keep one of them"), ("max_networks=1\nfrobnicate=1", ""),
    ]:  # fmt: skip
        file.write_text(f"defaultquota=1\nport={daemon.port}\nstatedir={daemon.statedir}\n{mistake}\n")
        level, text = reloaded(daemon)[-1]
        assert (level, text.endswith("; going on with the old settings")) == ("err", True)
        assert text.startswith(f"{file}:{3 + len(mistake.splitlines())}: {said}")
    file.unlink()
    expected = f"{file}: No such file or directory; going on with the old settings"
    assert reloaded(daemon)[-1] == ("err", expected)
    assert daemon.ask(sasl_username="phished") == BLACKLISTED
    assert daemon.ask(sasl_username="bert", recipient_count=5000) == DUNNO
    assert [daemon.ask(recipient_count=count) for count in (9, 1)] == [DUNNO, HOLD]


def test_what_needs_a_restart_is_said_and_no_password_shown(policyd: Start) -> None:
    """The rest of the file applies."""
    daemon = policyd(defaultquota=10)
    port = daemon.port
    changed = {"port": port + 1, "bind": "127.0.0.2", "dbname": "x", "dbuser": "x", "dbpass": "hunter2"}
    daemon.write_settings(defaultquota=1, **changed)
    daemon.bind, daemon.port = "127.0.0.1", port
    needs = "settings changed that need a restart: bind, port, dbname, dbuser, dbpass"
    for number in (1, 2):  # it is still true the second time
        reload(daemon)
        assert complaints(daemon) == [needs] * number
    assert daemon.ask() == HOLD
    assert "hunter2" not in "".join(daemon.syslog.messages() + daemon.notify.messages())


@on_each_table
def test_a_new_keep_days_applies_to_the_next_purge(store: Store, logged: KeptLog, tmp_path: Path) -> None:
    """Without it a week is kept; a purge that fails is tried again after an hour, and is not the end."""
    recorder: Any = types.SimpleNamespace(settings=Settings())
    nowhere = SQLiteRepository(str(tmp_path / "nowhere" / "events.sqlite3"))
    assert purge(nowhere, recorder) == HOUR_S
    (line,) = logged.lines
    assert line.text.startswith("old events stay for now: ")
    for days in range(1, 10):
        store.add([("anna", "", "", days)], age_s=days * DAY_S - 60)
    repository = store.another()
    for changes, kept in [({}, 7), ({"keep_days": 5}, 5), ({"keep_days": 2}, 2), ({"keep_days": 4}, 2)]:
        recorder.settings = Settings(**changes)
        first = PAUSE_S if len(store.rows()) > kept else DAY_S
        assert [purge(repository, recorder) for _ in range(2)] == [first, DAY_S]
        assert [row[3] for row in store.rows()] == list(range(kept, 0, -1))
        days = recorder.settings.keep_days
        assert logged.lines[-1] == ("info", f"purged the events older than {days} days")


def test_connections_stay_open_across_a_rush_of_reloads(policyd: Start) -> None:
    """Whoever asks all the while gets every answer, and the sum runs on.

    A signal that arrives while another is acted upon waits for its turn, whichever thread the kernel asks.
    """
    daemon = policyd(defaultquota=1)
    daemon.write_settings(defaultquota=10**6)
    reload(daemon)
    with Load([daemon], 1, "steady") as load:
        for _ in range(5):
            load.wait_for_more(1)
            reload(daemon)
        for _ in range(500):
            daemon.signal(signal.SIGHUP)
        reload(daemon)
        load.wait_for_more(1)
    assert {answer.action for answer in load.answers} == {DUNNO}
    daemon.wait_for_log(f"Updating db: steady/alice@example.org/192.0.2.1/1/{len(load.answers)}")
    assert daemon.stop() == 0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=500) | st.permutations(range(100)))
def test_the_99th_percentile_is_what_99_of_100_answers_kept_to(times: list[float]) -> None:
    figures = Figures()
    for seconds in times:
        figures.count("DUNNO", seconds)
    p99 = figures.p99_s()
    assert p99 in times
    assert sum(seconds < p99 for seconds in times) < 0.99 * len(times) <= sum(seconds <= p99 for seconds in times)


def test_the_99th_percentile_is_that_of_the_last_10_000_answers_and_a_login_is_held_once() -> None:
    """Until it is under the limit again, or for a day."""
    clock = Clock()
    figures = Figures(clock)
    assert figures.p99_s() == 0, "without any"
    for n in range(11_000):
        figures.count("DUNNO", 9.0 if n < 1000 else 0.25)
    assert figures.p99_s() == 0.25
    assert figures.answered["DUNNO"] == 11_000, "what is counted is counted from the start"
    for login, action, held in [("anna", "HOLD", 1), ("anna", "REJECT", 1), ("bert", "HOLD", 2), ("anna", "DUNNO", 1)]:
        figures.note(login, action)
        assert figures.logins_held() == held
    assert not any(figures.spared.values())
    for seconds, held in ((DAY_S - 1, 1), (2, 0)):
        clock.now += seconds
        assert figures.logins_held() == held


FAMILY = (
    r"# HELP (policyd_[a-z0-9_]+) (?:[^\\\n]|\\[\\n])+\n# TYPE \1 (?:counter|gauge)\n"
    r"""(?:\1(?:\{[a-z_]+="[^"\\\n]*"\})? [0-9.e+-]+\n)+"""
)


def parse(text: str) -> Samples:
    """Return the samples of a file in Prometheus' text format 0.0.4, of which no letter may be wrong."""
    assert re.fullmatch(f"(?:{FAMILY})*", text), f"each has a line of HELP, one of TYPE and samples: {text!r}"
    kinds = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds), "promtool would complain"
    samples = re.findall(r"^(policyd_.*) (\S+)$", text, re.MULTILINE)
    assert (len(dict(kinds)), len(dict(samples))) == (len(kinds), len(samples)), "twice"
    return {name: float(value) for name, value in samples}


def answers(metric: str, **numbers: int) -> Samples:
    return {f'policyd_{metric}{{answer="{answer}"}}': number for answer, number in numbers.items()}


NOTHING_YET = {
    **answers("requests_total", DUNNO=0, HOLD=0, REJECT=0), **answers("audited_total", HOLD=0, REJECT=0),
    "policyd_logins_held": 0, "policyd_database_up": 1, "policyd_database_down_seconds": 0, "policyd_journal_events": 0,
    "policyd_answer_p99_seconds": 0, "policyd_connections": 0,
}  # fmt: skip


@pytest.fixture
def here(file: Path, logged: KeptLog) -> Any:
    """A function that runs a daemon in this process, with these settings."""
    lines = [*file.read_text().splitlines(), f"defaultquota={QUOTA}", "blacklist=phished"]
    return lambda **settings: running_here(write_settings(file, *lines, **settings))


def figures(daemon: Daemon, directory: Path) -> Samples:
    daemon.publish()
    return parse((directory / "policyd.prom").read_text())


def ask(daemon: Daemon, login: str, recipients: int) -> str:
    with Connection(daemon.server.server_address[:2]) as connection:
        return connection.ask(sasl_username=login, recipient_count=recipients)


@pytest.mark.parametrize("mode", ["enforce", "audit"])
def test_all_figures_are_those_of_what_was_answered(here: Any, tmp_path: Path, mode: str) -> None:
    """In the line for the log and systemd, and for Prometheus; an audit says what it has let through."""
    with here(mode=mode) as daemon, Connection(daemon.server.server_address[:2]):
        for login, recipients, answer in SERIES:
            assert ask(daemon, login, recipients) == (answer if mode == "enforce" else DUNNO)
        wait_until(lambda: "; 1 connections;" in daemon.status(), "all others have gone")
        text, found = "3 DUNNO, 4 HOLD, 1 REJECT", answers("requests_total", DUNNO=3, HOLD=4, REJECT=1)
        if mode == "audit":
            text = "8 DUNNO, 0 HOLD, 0 REJECT (audit: 4 would HOLD, 1 would REJECT)"
            found = answers("requests_total", DUNNO=8) | answers("audited_total", HOLD=4, REJECT=1)
        shown = figures(daemon, tmp_path)
        p99 = shown["policyd_answer_p99_seconds"]
        assert 1e-6 < p99 < 20
        found |= {"policyd_logins_held": 3, "policyd_connections": 1, "policyd_answer_p99_seconds": p99}
        assert shown == {**NOTHING_YET, **found}
        assert daemon.status() == (
            f"8 requests: {text}; 3 logins held; 1 connections; p99 {p99 * 1000:.1f} ms; database up, 0 events in the"
            f" journal; on inet:127.0.0.1:{daemon.server.server_address[1]}"
        )


def test_who_is_forgiven_is_not_among_the_logins_held_once_he_sends_again(policyd: Start) -> None:
    """The same line goes to the log and to systemd; the file is there from the start on, for everybody to read."""
    daemon = policyd(environment={"WATCHDOG_USEC": "100000"}, defaultquota=QUOTA, always_allow="help@example.org")
    file = daemon.statedir / "policyd.prom"
    wait_until(file.exists, "the figures are written")
    assert parse(file.read_text()).items() >= NOTHING_YET.items()
    assert file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in file.parent.glob("policyd.prom*")] == ["policyd.prom"]
    assert [daemon.ask(sasl_username=login, recipient_count=QUOTA) for login in ("anna", "bert")] == [HOLD] * 2
    line = status(daemon)
    assert line.level == "info"
    assert line.text.startswith("2 requests: 0 DUNNO, 2 HOLD, 0 REJECT; 2 logins held; 1 connections; p99 ")
    daemon.notify.wait_for("STATUS=2 requests: 0 DUNNO, 2 HOLD, 0 REJECT; 2 logins held;")
    SQLiteStore(daemon.statedir / "events.sqlite3").clear()
    assert daemon.ask(sasl_username="anna", recipient="help@example.org") == DUNNO
    assert "; 2 logins held; " in status(daemon).text, "what is not counted changes nothing"
    assert daemon.ask(sasl_username="anna") == DUNNO
    assert "; 1 logins held; " in status(daemon).text


@pytest.mark.usefixtures("no_delay")
def test_all_figures_tell_that_the_database_is_down_and_since_when(here: Any, database: Any, tmp_path: Path) -> None:
    """In local time, with what waits for it; and when it is up again, that it is."""
    with here(**database.settings()) as daemon:
        assert ask(daemon, "anna", 1) == DUNNO
        database.query("RENAME TABLE events TO away")
        before = time.time()
        assert [ask(daemon, "anna", 1) for _ in range(2)] == [DUNNO] * 2
        (since,) = re.findall(r"; database down since ([-0-9]+ [:0-9]+), 2 events in the journal", daemon.status())
        assert before - 2 <= time.mktime(time.strptime(since, "%Y-%m-%d %H:%M:%S")) <= time.time() + 2
        wait_until(lambda: figures(daemon, tmp_path)["policyd_database_down_seconds"] >= 1, "a second has passed")
        assert figures(daemon, tmp_path).items() >= {"policyd_database_up": 0, "policyd_journal_events": 2}.items()
        database.query("RENAME TABLE away TO events")
        wait_until(lambda: "; database up, 0 events in the journal" in daemon.status(), "it is up again", 60)
        up = {"policyd_database_up": 1, "policyd_database_down_seconds": 0}
        assert figures(daemon, tmp_path).items() >= up.items()


def test_without_a_database_all_say_down_from_the_start_on(policyd: Start) -> None:
    """The first status to systemd, the status line and the file of figures; also that the journal cannot be used."""
    daemon = policyd(dbhost="127.0.0.1", dbport=1, dbname="x", dbuser="x")
    down = r"; database down since [-0-9]+ [:0-9]+, {} events in the journal{}; on"
    assert re.search(down.format(0, ""), daemon.notify.messages()[0])
    wait_until((daemon.statedir / "policyd.prom").exists, "the figures are written")
    assert parse((daemon.statedir / "policyd.prom").read_text())["policyd_database_up"] == 0
    assert re.search(down.format(0, ""), status(daemon).text)
    assert daemon.ask() == DUNNO
    assert re.search(down.format(1, ""), status(daemon).text)
    (daemon.statedir / "journal.sqlite3").unlink()
    (daemon.statedir / "journal.sqlite3").mkdir()
    assert daemon.ask() == DUNNO
    daemon.wait_for_log("no outage journal: ")
    assert re.search(down.format(r"\d", ", which CANNOT BE USED"), status(daemon).text)


def test_nobody_ever_reads_half_a_file_and_one_that_cannot_be_written_is_warned_of_once(
    here: Any, tmp_path: Path, logged: KeptLog
) -> None:
    """Not once a minute; and mail flows."""
    prom, in_the_way = tmp_path / "policyd.prom", tmp_path / "policyd.prom.new"
    complaint = ("warning", f"{prom} cannot be written: Is a directory")
    in_the_way.mkdir()
    with here() as daemon:
        wait_until(lambda: complaint in logged.lines, "it is warned of")
        daemon.publish()
        logged.tick(time.monotonic() + 61)
        assert [ask(daemon, "anna", recipients) for recipients in (9, 1)] == [DUNNO, HOLD]
        in_the_way.rmdir()
        daemon.publish()
        seen, is_over = set(), threading.Event()
        publish = iter(lambda: is_over.is_set() or daemon.publish(), True)
        writing = threading.Thread(target=lambda: [*publish], daemon=True)
        writing.start()
        while len(seen) < 10:  # a new one each time
            with prom.open() as file:
                assert parse(file.read()).keys() == NOTHING_YET.keys()
                seen.add(os.fstat(file.fileno()).st_mtime_ns)
        is_over.set()
        writing.join()
        assert [line for line in logged.lines if "policyd.prom" in line.text] == [complaint]
