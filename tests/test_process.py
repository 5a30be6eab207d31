"""The life of the process: systemd, signals, the log and its statedir."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import complaints
from daemons import running_here
from recorders import GatedRepository, Waiter
from servers import (
    DUNNO,
    HOLD,
    ROOT,
    STOP_TIMEOUT_S,
    Database,
    Policyd,
    free_port,
    read_answer,
    read_to_end,
    request_bytes,
    run_policyd,
    wait_until,
)
from stores import GENEROUS, Clock, KeptLog, SQLiteStore, event, sessions, table_locked

import policyd as module
from policyd import Daemon, Journal, Recorder, Settings

Start = Callable[..., Policyd]

STATUS = (
    r"\d+ requests: \d+ DUNNO, \d+ HOLD, \d+ REJECT; \d+ logins held; \d+ connections; p99 \d+\.\d ms;"
    r" database up, \d+ events in the journal; on inet:127\.0\.0\.1:\d+"
)


# ---- systemd --------------------------------------------------------------------------------------


def test_systemd_is_told_when_it_serves_that_it_lives_and_when_it_ends(policyd: Start) -> None:
    """As often as it asks, with the figures of the moment.  Without WATCHDOG_USEC the second time is after 10 s."""
    daemon = policyd(environment={"WATCHDOG_USEC": "100000"})
    assert re.fullmatch(rf"READY=1\nSTATUS={STATUS}", daemon.notifications[0])
    assert [daemon.ask(sasl_username=login) for login in ("anna", "")] == [DUNNO] * 2
    assert re.fullmatch(rf"WATCHDOG=1\nSTATUS={STATUS}", daemon.wait_for_notification("2 requests"))
    daemon.wait_for_notification("WATCHDOG=1", count=3)
    assert daemon.stop() == 0
    assert daemon.notifications[-1] == "STOPPING=1"


def settings_file(directory: Path, *lines: str) -> Path:
    """Write the settings of a daemon in this process."""
    path = directory / "policyd.cfg"
    path.write_text("".join(f"{line}\n" for line in (f"port={free_port()}", f"statedir={directory}", *lines)))
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [
    "", "PolicyServer.serve_forever", "Daemon.publish", "Housekeeper.run", "OnStop.run", "Recorder.turn",
    "Recorder.tell_next", "Recorder.look_for_store", "Log._write_all", "an event that waits",
])  # fmt: skip
def test_the_watchdog_is_fed_only_while_all_threads_live_and_no_event_waits_for_10_s(
    tmp_path: Path, logged: KeptLog, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whichever of them a fault of ours ends: the accepting one, too."""
    told: list[str] = []
    monkeypatch.setattr("policyd.sd_notify", lambda *lines: told.append(lines[0]))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")

    def fail(*_: Any) -> None:
        raise ValueError("a fault of ours")

    if "." in fault:
        monkeypatch.setattr(f"policyd.{fault}", fail)
    if fault == "PolicyServer.serve_forever":
        monkeypatch.setattr("policyd.PolicyServer.shutdown", lambda self: None)  # it waits for the thread
    if fault != "Log._write_all":
        logged.thread.start()
    waits_s = 10.1 if fault == "an event that waits" else 9.9
    monkeypatch.setattr("policyd.Recorder.longest_wait_s", lambda self: waits_s)
    with running_here(settings_file(tmp_path)) as here:
        if not fault:
            wait_until(lambda: told.count("WATCHDOG=1") >= 3, "it is fed")
            return
        here.daemon._recorder.record(event("anna"), lambda _: None)
        wait_until(lambda: "READY=1" in told and not here.daemon.is_well(), "it is noticed")
        for n in (1, 2):
            before = len(told)
            here.signal(signal.SIGUSR1)
            wait_until(lambda n=n: sum(" requests: " in line.text for line in logged.lines) == n, "a status is logged")
        assert told[before:] == []


def test_the_longest_wait_is_that_of_events_in_the_store_and_behind_it(tmp_path: Path, logged: KeptLog) -> None:
    clock = Clock()
    gated = GatedRepository(SQLiteStore(tmp_path / "events.sqlite3").repository)
    recorder = Recorder(gated, Journal(str(tmp_path / "journal.sqlite3")), GENEROUS, None, clock)  # type: ignore[arg-type]
    recorder.start()
    recorder.looked.wait()
    assert recorder.longest_wait_s() == 0
    gated.gate.clear()
    first = Waiter(recorder, event("anna"))
    assert gated.waiting.wait(20)
    clock.now += 7
    second = Waiter(recorder, event("bert"))
    clock.now += 4
    assert recorder.longest_wait_s() == 11
    gated.gate.set()
    assert (first.sum(), second.sum()) == (1, 1)
    wait_until(lambda: recorder.longest_wait_s() == 0, "nothing waits any more")
    recorder.stop(20)


# ---- its statedir ---------------------------------------------------------------------------------


def test_a_second_daemon_on_a_statedir_ends_and_says_who_has_it(policyd: Start, tmp_path: Path) -> None:
    """Both would move the same journal; and the first one never notices."""
    daemon = policyd()
    second = tmp_path / "second.cfg"
    second.write_text(f"port={free_port()}\nstatedir={daemon.statedir}\n")
    for _ in range(2):
        done = run_policyd("-c", str(second))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
        assert f"policyd with pid {daemon.pid} keeps its events there" in done.stderr
    assert daemon.ask() == DUNNO
    daemon.kill()
    assert daemon.start().ask() == DUNNO


def test_a_statedir_that_is_not_there_is_a_warning_and_mail_is_counted(policyd: Start, database: Database) -> None:
    daemon = policyd(defaultquota=2)
    assert daemon.stop() == 0
    daemon.write_settings(defaultquota=2, **database.settings())
    text = daemon.settings_file.read_text().replace(f"statedir={daemon.statedir}", "statedir=/nowhere/at/all")
    daemon.settings_file.write_text(text)
    daemon.settings_file.chmod(0o640)
    daemon.start()
    assert [daemon.ask() for _ in range(2)] == [DUNNO, HOLD]
    assert any("statedir /nowhere/at/all: No such file or directory" in line for line in complaints(daemon))


def test_what_an_older_version_has_left_is_removed(policyd: Start) -> None:
    daemon = policyd()
    assert daemon.stop() == 0
    (daemon.statedir / "notified.json").write_text("{}")
    daemon.start()
    assert not (daemon.statedir / "notified.json").exists()


# ---- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "answer"), [("defaultquota=1\n", HOLD), ("defaultquota=x\n", DUNNO), (None, DUNNO)])
def test_a_reload_reads_a_file_that_was_not_there_at_the_start(
    tmp_path: Path, logged: KeptLog, text: str | None, answer: str
) -> None:
    """Whole or not at all; and without one the defaults serve on."""
    port, file = free_port(), tmp_path / "policyd.cfg"
    settings = Settings(port=port, statedir=str(tmp_path))
    daemon = Daemon(settings, str(file), os.sched_getaffinity(0))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, Daemon.SIGNALS)  # as main() does: run() asks for them
    thread = threading.Thread(target=daemon.run)
    thread.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert thread.ident is not None
    if text:
        file.write_text(text)
    signal.pthread_kill(thread.ident, signal.SIGHUP)
    wait_until(lambda: any("settings" in line.text for line in logged.lines), "it has been acted upon")
    assert len(logged.errors()) == (text == "defaultquota=x\n")
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(request_bytes())
        assert read_answer(connection) == answer
    signal.pthread_kill(thread.ident, signal.SIGTERM)
    thread.join()


def test_hangup_of_the_terminal_it_was_started_in_ends_it(tmp_path: Path) -> None:
    """Nobody who tries it out means a reload."""
    ours, theirs = pty.openpty()
    errors = tmp_path / "stderr"
    with errors.open("wb") as stderr:
        command = [sys.executable, str(ROOT / "policyd.py"), "--stderr", "-c", str(settings_file(tmp_path))]
        daemon = subprocess.Popen(command, stdin=theirs, stderr=stderr)
    wait_until(lambda: b"\n" in errors.read_bytes(), "it has started")
    daemon.send_signal(signal.SIGHUP)
    assert daemon.wait(STOP_TIMEOUT_S) == 0
    assert "policyd ends; " in errors.read_text()
    os.close(ours)
    os.close(theirs)


# ---- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_at_the_end_what_was_received_is_answered_and_stored(policyd: Start, number: int) -> None:
    daemon = policyd()
    with daemon.connect() as connection:
        connection.sendall(request_bytes())
        assert read_answer(connection) == DUNNO  # the connection is accepted
        connection.sendall(b"".join(request_bytes() for _ in range(200)))
        daemon.signal(number)
        assert read_to_end(connection) == b"action=DUNNO\n\n" * 200
    assert daemon.process.wait(STOP_TIMEOUT_S) == 0
    assert daemon.log_lines()[-1].text.startswith("policyd ends; 201 requests: 201 DUNNO, 0 HOLD, 0 REJECT; ")
    daemon.start().ask()
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/202")


def test_at_the_end_it_waits_for_the_database(policyd: Start, database: Database) -> None:
    """For what is being recorded: nobody's message is forgotten, nobody's answer lost."""
    daemon = policyd(**database.settings())
    connections = [daemon.connect() for _ in range(5)]
    with contextlib.ExitStack() as stack:
        for connection in connections:
            stack.enter_context(connection)
            connection.sendall(request_bytes(sasl_username="known"))
            assert read_answer(connection) == DUNNO
        with table_locked(database):
            for connection in connections:
                connection.sendall(request_bytes())
            wait_until(lambda: any("INSERT" in (what or "") for _, what, _ in sessions(database)), "the insert waits")
            daemon.signal(signal.SIGTERM)
            daemon.wait_for_notification("STOPPING=1")
        assert [read_to_end(connection) for connection in connections] == [b"action=DUNNO\n\n"] * 5
    assert daemon.process.wait(STOP_TIMEOUT_S) == 0
    assert database.query("SELECT SUM(recipient_count) FROM events WHERE sasl_username = 'alice'") == [(5,)]


def test_at_the_end_idle_connections_see_it(policyd: Start) -> None:
    """Also one in the middle of a request, which nobody will complete."""
    daemon = policyd()
    with daemon.connect() as idle, daemon.connect() as begun:
        for connection in (idle, begun):
            connection.sendall(request_bytes())
            assert read_answer(connection) == DUNNO
        begun.sendall(request_bytes()[:-1])
        daemon.signal(signal.SIGTERM)
        assert read_to_end(idle) == read_to_end(begun) == b""
        assert daemon.process.wait(STOP_TIMEOUT_S) == 0
    assert [line.level for line in daemon.log_lines()] == ["info"] * 4
    with pytest.raises(ConnectionRefusedError):
        daemon.connect()


def test_what_was_answered_is_counted_after_a_crash(policyd: Start) -> None:
    daemon = policyd()
    assert daemon.ask(recipient_count=5) == DUNNO
    daemon.kill()
    daemon.start().ask()
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/6")


# ---- the log --------------------------------------------------------------------------------------


def test_with_stderr_it_logs_there(tmp_path: Path) -> None:
    """Whether there is a /dev/log or not."""
    file, errors = settings_file(tmp_path), tmp_path / "stderr"
    port = int(file.read_text().splitlines()[0].partition("=")[2])
    command = [sys.executable, str(ROOT / "policyd.py"), "-c", str(file), "--stderr"]
    with errors.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            wait_until(lambda: errors.read_text().endswith("\n"), "policyd has started")
            with socket.create_connection(("127.0.0.1", port), 20) as connection:
                connection.sendall(request_bytes())
                assert read_answer(connection) == DUNNO
        finally:
            process.terminate()
    assert process.returncode == 0
    first, second, last = errors.read_text().replace(f"policyd[{process.pid}]: ", "TAG ").splitlines()
    assert first.startswith(f"TAG policyd {module.__version__} on inet:127.0.0.1:")
    assert second == "TAG Updating db: alice/alice@example.org/192.0.2.1/1/1"
    assert last.startswith("TAG policyd ends; ")


def test_the_first_line_says_all_that_matters(policyd: Start) -> None:
    daemon = policyd(defaultquota=42)
    line = daemon.log_lines()[0]
    assert line[:4] == ("daemon", "info", "policyd", daemon.pid)
    assert line.text.startswith(f"policyd {module.__version__} on inet:127.0.0.1:{daemon.port}, ")
    for part in ("quota 42", f"embedded store {daemon.statedir}/events.sqlite3", f"settings: {daemon.settings_file}"):
        assert part in line.text
    assert daemon.stderr == ""


def test_a_stuck_syslog_delays_no_answer(policyd: Start) -> None:
    """Of 20,000 lines it keeps 10,000, and when somebody reads again it says how many were lost."""
    daemon = policyd(blacklist="listed")
    daemon.syslog.pause()
    requests = 20_000
    glued = request_bytes(sasl_username="listed", instance="") * 500
    with daemon.connect() as connection:
        for _ in range(requests // 500):
            connection.sendall(glued)
            expected = b"action=HOLD blacklisted\n\n" * 500
            answers = b""
            while len(answers) < len(expected):
                answers += connection.recv(65536)
            assert answers == expected
    daemon.syslog.resume()
    line = daemon.wait_for_log("log lines were lost")
    lost = re.fullmatch(r"(\d+) log lines were lost: syslog did not take them", line.text)
    assert lost
    assert line.level == "warning"
    kept = sum(line.text.startswith("Holding blacklisted user: listed/") for line in daemon.log_lines())
    assert kept + int(lost[1]) == requests
    assert kept >= 10_000


@pytest.mark.parametrize("trouble", ["pause", "close"])
def test_a_syslog_that_is_stuck_or_gone_delays_neither_answers_nor_the_end(policyd: Start, trouble: str) -> None:
    daemon = policyd(blacklist="listed")
    getattr(daemon.syslog, trouble)()
    assert [daemon.ask(sasl_username="listed") for _ in range(100)] == ["HOLD blacklisted"] * 100
    assert daemon.stop() == 0  # and not by force
