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
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import complaints
from daemons import running_here
from servers import DUNNO, HOLD, Policyd, free_port, read_answer, read_to_end, request_bytes, run_policyd, wait_until
from stores import KeptLog, event, sessions, table_locked

import policyd as module
from policyd import Daemon, Settings

Start = Callable[..., Policyd]


def settings_file(statedir: Path, port: int, name: str = "policyd.cfg") -> Path:
    """Write the settings of a daemon that is none of the fixture's."""
    path = statedir / name
    path.write_text(f"port={port}\nstatedir={statedir}\n")
    return path


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
    "", "PolicyServer.serve_forever", "Daemon.publish", "Housekeeper.sweep", "OnStop.turn", "Recorder.turn",
    "Recorder.tell", "Recorder.look_for_store", "Log._write_all", "an event that waits",
])  # fmt: skip
def test_the_watchdog_is_fed_only_while_all_threads_live_and_no_event_waits_for_10_s(
    tmp_path: Path, logged: KeptLog, monkeypatch: pytest.MonkeyPatch, fault: str
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
    with running_here(settings_file(tmp_path, free_port())) as here:
        if not fault:
            wait_until(lambda: told.count("WATCHDOG=1") >= 3, "it is fed")
            return
        here._recorder.record(event("anna"), lambda _: None)
        for n in (1, 2, 3):
            before = len(told)
            here.signals.put(signal.SIGUSR1)
            wait_until(lambda n=n: sum(" requests: " in line.text for line in logged.lines) == n, "a status is logged")
            wait_until(lambda: not here.is_well(), "it is noticed")
        assert told[before:] == []


def test_a_second_daemon_on_a_statedir_ends_and_says_who_has_it(policyd: Start) -> None:
    """Both would move the same journal; and the first one never notices."""
    daemon = policyd()
    second = settings_file(daemon.statedir, free_port(), "second.cfg")
    for _ in range(2):
        done = run_policyd("-c", str(second))
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
    daemon = Daemon(Settings(port=free_port(), statedir=str(tmp_path)))
    daemon.reload()
    assert logged.lines[-1].text.endswith("No such file or directory; going on with the old settings")
    file.write_text("defaultquota=2\n")
    daemon.reload()
    assert logged.lines[-1].text.endswith(f"settings read again: {file}")
    assert daemon._policy.settings.defaultquota == 2
    daemon.server.server_close()


def test_with_stderr_it_logs_there_and_hangup_of_its_terminal_ends_it(tmp_path: Path) -> None:
    """Whether there is a /dev/log or not.  Nobody who tries it out means a reload by that."""
    port, errors = free_port(), tmp_path / "stderr"
    ours, theirs = pty.openpty()
    with errors.open("wb") as stderr:
        command = [sys.executable, module.__file__, "--stderr", "-c", str(settings_file(tmp_path, port))]
        process = subprocess.Popen(command, stdin=theirs, stderr=stderr)
    try:
        wait_until(lambda: b"\n" in errors.read_bytes(), "it has started")
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(request_bytes())
            assert read_answer(connection) == DUNNO
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_at_the_end_what_was_received_is_answered_and_stored_and_the_idle_see_it(policyd: Start, number: int) -> None:
    """Also one in the middle of a request, which nobody will complete.

    It starts again at once on the port it had; and what was answered is counted after a crash, too.
    """
    daemon = policyd()
    with daemon.connect() as connection, daemon.connect() as idle, daemon.connect() as begun:
        for each in (connection, idle, begun):
            each.sendall(request_bytes())
            assert read_answer(each) == DUNNO  # the connection is accepted
        begun.sendall(request_bytes()[:-1])
        connection.sendall(b"".join(request_bytes() for _ in range(200)))
        daemon.signal(number)
        assert read_to_end(connection) == b"action=DUNNO\n\n" * 200
        assert read_to_end(idle) == read_to_end(begun) == b""
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
            connection.sendall(request_bytes(sasl_username="known"))
            assert read_answer(connection) == DUNNO
        with table_locked(database):
            for connection in connections:
                connection.sendall(request_bytes())
            wait_until(lambda: any("INSERT" in (what or "") for _, what, _ in sessions(database)), "the insert waits")
            daemon.signal(signal.SIGTERM)
            daemon.notify.wait_for("STOPPING=1")
        assert [read_to_end(connection) for connection in connections] == [b"action=DUNNO\n\n"] * 5
    assert daemon.process.wait(20) == 0
    assert database.query("SELECT SUM(recipient_count) FROM events WHERE sasl_username = 'alice'") == [(5,)]


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
