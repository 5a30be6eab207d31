"""The life of the process: systemd, signals, the log, and more clients than it can bear."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from servers import (
    ROOT,
    STOP_TIMEOUT_S,
    Database,
    Policyd,
    free_port,
    read_answer,
    read_to_end,
    request_bytes,
    wait_until,
)

import policyd as module

Start = Callable[..., Policyd]

STATUS = (
    r"\d+ requests: \d+ DUNNO, \d+ HOLD, \d+ REJECT; \d+ logins held; \d+ connections; p99 \d+\.\d ms;"
    r" database up, \d+ events in the journal"
)


# ---- systemd --------------------------------------------------------------------------------------


def test_systemd_is_told_when_it_serves_and_when_it_ends(policyd: Start) -> None:
    daemon = policyd()
    assert re.fullmatch(rf"READY=1\nSTATUS={STATUS}", daemon.notifications[0])
    assert daemon.ask() == "DUNNO"
    assert daemon.stop() == 0
    assert daemon.notifications[-1] == "STOPPING=1"


def test_the_watchdog_is_fed_as_often_as_systemd_asks(policyd: Start) -> None:
    """With the figures of the moment.  Without WATCHDOG_USEC the second one comes after 10 s."""
    daemon = policyd(environment={"WATCHDOG_USEC": "100000"}, defaultquota=1)
    daemon.ask()
    daemon.ask(sasl_username="")
    message = daemon.wait_for_notification("2 requests", timeout=5)
    assert re.fullmatch(rf"WATCHDOG=1\nSTATUS={STATUS}", message)
    assert daemon.wait_for_notification("WATCHDOG=1", timeout=5, count=3)


def test_sigusr1_logs_one_line_of_status(policyd: Start) -> None:
    daemon = policyd(defaultquota=2)
    for _ in range(5):
        daemon.ask()
    daemon.signal(signal.SIGUSR1)
    line = daemon.wait_for_log(re.compile(r": \d+ requests: "))
    assert line.level == "info"
    assert re.fullmatch(
        r"5 requests: 1 DUNNO, 2 HOLD, 2 REJECT; 1 logins held; 1 connections; p99 \d+\.\d ms;"
        " database up, 0 events in the journal",
        line.text,
    )


# ---- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_at_the_end_what_was_received_is_answered_and_stored(policyd: Start, number: int) -> None:
    daemon = policyd()
    with daemon.connect() as connection:
        connection.sendall(request_bytes())
        assert read_answer(connection) == "DUNNO"  # the connection is accepted
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
            assert read_answer(connection) == "DUNNO"
        with locked_table(database):
            for connection in connections:
                connection.sendall(request_bytes())
            wait_until(lambda: waiting_for_the_lock(database), "the insert waits for the lock")
            daemon.signal(signal.SIGTERM)
            daemon.wait_for_notification("STOPPING=1")
        assert [read_to_end(connection) for connection in connections] == [b"action=DUNNO\n\n"] * 5
    assert daemon.process.wait(STOP_TIMEOUT_S) == 0
    assert database.query("SELECT SUM(recipient_count) FROM events WHERE sasl_username = 'alice'") == [(5,)]


@contextlib.contextmanager
def locked_table(database: Database) -> Iterator[None]:
    """Let nobody else write to the table."""
    import pymysql

    connection = pymysql.connect(unix_socket=database.server.socket, user="root", database=database.name)
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("LOCK TABLES events WRITE")
        yield
        cursor.execute("UNLOCK TABLES")


def waiting_for_the_lock(database: Database) -> bool:
    return bool(database.query(
        "SELECT id FROM information_schema.processlist WHERE db = %s AND state LIKE 'Waiting for table%%'",
        (database.name,),
    ))


def test_at_the_end_idle_connections_see_it(policyd: Start) -> None:
    """Also one in the middle of a request, which nobody will complete."""
    daemon = policyd()
    with daemon.connect() as idle, daemon.connect() as begun:
        for connection in (idle, begun):
            connection.sendall(request_bytes())
            assert read_answer(connection) == "DUNNO"
        begun.sendall(request_bytes()[:-1])
        daemon.signal(signal.SIGTERM)
        assert read_to_end(idle) == read_to_end(begun) == b""
        assert daemon.process.wait(STOP_TIMEOUT_S) == 0
    assert [line.level for line in daemon.log_lines()] == ["info"] * 4


def test_at_the_end_nobody_listens_any_more(policyd: Start) -> None:
    daemon = policyd()
    assert daemon.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        daemon.connect()


def test_what_was_answered_is_counted_after_a_crash(policyd: Start) -> None:
    daemon = policyd()
    assert daemon.ask(recipient_count=5) == "DUNNO"
    daemon.kill()
    daemon.start().ask()
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/6")


# ---- the log --------------------------------------------------------------------------------------


@pytest.fixture
def answer_on_stderr(tmp_path: Path) -> Callable[..., str]:
    """A function that runs the daemon outside of all fixtures for one answer, and returns what stderr got."""

    def run(*arguments: str) -> str:
        file, errors = tmp_path / "policyd.cfg", tmp_path / "stderr"
        port = free_port()
        file.write_text(f"port={port}\nstatedir={tmp_path}\n")
        command = [sys.executable, str(ROOT / "policyd.py"), "-c", str(file), *arguments]
        with errors.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
            try:
                wait_until(lambda: errors.read_text().endswith("\n"), "policyd has started")
                with socket.create_connection(("127.0.0.1", port), 20) as connection:
                    connection.sendall(request_bytes())
                    assert read_answer(connection) == "DUNNO"
            finally:
                process.terminate()
        assert process.returncode == 0
        return errors.read_text().replace(f"policyd[{process.pid}]: ", "TAG ")

    return run


def test_with_stderr_it_logs_there(answer_on_stderr: Callable[..., str]) -> None:
    """Whether there is a /dev/log or not."""
    first, second, last = answer_on_stderr("--stderr").splitlines()
    assert first.startswith(f"TAG policyd {module.__version__} on inet:127.0.0.1:")
    assert second == "TAG Updating db: alice/alice@example.org/192.0.2.1/1/1"
    assert last.startswith("TAG policyd ends; ")


def test_the_first_line_says_all_that_matters(policyd: Start) -> None:
    daemon = policyd(defaultquota=42)
    line = daemon.log_lines()[0]
    assert line == (
        "daemon", "info", "policyd", daemon.pid,
        f"policyd {module.__version__} on inet:127.0.0.1:{daemon.port}, quota 42,"
        f" embedded store {daemon.statedir}/events.sqlite3, settings: {daemon.settings_file}",
    )
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


def test_a_stuck_syslog_does_not_keep_it_from_ending(policyd: Start) -> None:
    daemon = policyd(blacklist="listed")
    daemon.syslog.pause()
    for _ in range(100):
        daemon.ask(sasl_username="listed")
    assert daemon.stop() == 0  # and not by force


def test_a_syslog_that_is_gone_delays_no_answer(policyd: Start) -> None:
    daemon = policyd()
    daemon.syslog.close()
    assert [daemon.ask() for _ in range(20)] == ["DUNNO"] * 20


# ---- more clients than it can bear ----------------------------------------------------------------


def descriptors(most: int) -> str:
    """Return what lets a daemon have no more open files than this; the tests themselves may need more."""
    return f"ulimit -S -n {most}"


def open_connections(daemon: Policyd, number: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Return connections that have all been accepted and answered."""
    connections = [stack.enter_context(daemon.connect()) for _ in range(number)]
    for connection in connections:
        connection.sendall(request_bytes())
    assert [read_answer(connection) for connection in connections] == ["DUNNO"] * number
    return connections


def test_300_connections_at_once_are_all_answered(policyd: Start) -> None:
    """Also while the daemon is busy elsewhere: those that come meanwhile wait in the kernel."""
    daemon = policyd()
    with contextlib.ExitStack() as stack:
        daemon.signal(signal.SIGSTOP)
        connections = [stack.enter_context(daemon.connect()) for _ in range(300)]
        for connection in connections:
            connection.sendall(request_bytes())
        daemon.signal(signal.SIGCONT)
        assert [read_answer(connection) for connection in connections] == ["DUNNO"] * 300
        for connection in connections:
            connection.sendall(request_bytes())
        assert [read_answer(connection) for connection in connections] == ["DUNNO"] * 300
        daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/600")


def test_one_connection_too_many_is_closed_at_once_with_one_warning(policyd: Start) -> None:
    """Those that are open never notice; and when one of them ends, there is room again."""
    daemon = policyd(mounts=descriptors(64 + 40))
    with contextlib.ExitStack() as stack:
        connections = open_connections(daemon, 40, stack)
        for _ in range(5):
            with daemon.connect() as one_too_many:
                assert read_to_end(one_too_many) == b""
        connections.pop().close()

        def has_room() -> bool:
            with daemon.connect() as connection, contextlib.suppress(EOFError, ConnectionError):
                connection.sendall(request_bytes())
                return read_answer(connection) == "DUNNO"
            return False

        wait_until(has_room, "there is room for one connection")
        connections[0].sendall(request_bytes())
        assert read_answer(connections[0]) == "DUNNO"
    warnings = [line.text for line in daemon.log_lines() if line.level == "warning"]
    assert warnings == ["40 connections are open, as many as may be: closing new ones at once"]


def test_running_out_of_descriptors_neither_kills_nor_spins(policyd: Start) -> None:
    """Open connections are served on, others wait until there are descriptors again."""
    daemon = policyd()
    daemon.ask()
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir(f"/proc/{daemon.pid}/fd")))
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (in_use + 1, before[1]))
    with daemon.connect() as waiting:
        waiting.sendall(request_bytes())
        assert daemon.wait_for_log("cannot accept a connection: ").level == "warning"
        assert daemon.ask() == "DUNNO"
        used = processor_s(daemon)
        time.sleep(1)
        assert processor_s(daemon) - used < 0.5
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert read_answer(waiting) == "DUNNO"
    assert len([line for line in daemon.log_lines() if line.level == "warning"]) == 1


def processor_s(daemon: Policyd) -> float:
    """Return for how long the daemon has occupied a processor."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
