"""Clients that are broken or mean harm: the others get their answers, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest
from asking import complaints, reload
from servers import DUNNO, Policyd, free_port, read_answer, read_to_end, request_bytes, wait_until

Start = Callable[..., Policyd]

MEMORY_MB = 150


def status_of(daemon: Policyd, name: str) -> int:
    """Return a number of /proc/PID/status: Threads, or VmHWM in kB."""
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return int(dict(line.split(":\t", 1) for line in lines)[name].split()[0])


def processor_s(daemon: Policyd) -> float:
    """Return for how long the daemon has occupied a processor."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def send_all(connection: socket.socket, data: bytes) -> None:
    """Send it, or as much of it as the daemon takes before it hangs up."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)


@contextlib.contextmanager
def connections(daemon: Policyd, number: int) -> Iterator[list[socket.socket]]:
    """Lend so many connections."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(daemon.connect()) for _ in range(number)]


# ---- attacks --------------------------------------------------------------------------------------


def idle_connections(daemon: Policyd) -> None:
    with connections(daemon, 300):
        wait_until(lambda: status_of(daemon, "Threads") >= 300, "all 300 are served")


def slow_connections(daemon: Policyd) -> None:
    """A byte now and then; in the end each has sent a request, and is answered like any other."""
    request = b"request=smtpd_access_policy\nsasl_username=slow\nrecipient_count=1\n\n"
    with connections(daemon, 100) as slow:
        for position in range(len(request)):
            for connection in slow:
                connection.sendall(request[position : position + 1])
            time.sleep(0.01)
        assert {read_answer(connection) for connection in slow} == {DUNNO}


def random_bytes(daemon: Policyd) -> None:
    chance = random.Random(1)
    for _ in range(100):
        with daemon.connect() as connection:
            send_all(connection, bytes(chance.choices(range(256), k=10_000)))


def malformed_bytes(daemon: Policyd) -> None:
    """NULs, a line without an end, a request of a million lines."""
    for data in (
        b"\0" * 10_000, request_bytes(sender="\0"), request_bytes()[:-1] + b"\0\n\n", b"x=" + b"x" * 10_000_000,
        b"request=smtpd_access_policy\n" + b"x=y\n" * 1_000_000 + b"\n",
    ):  # fmt: skip
        with daemon.connect() as connection:
            send_all(connection, data)
            assert read_to_end(connection) == b""


def half_closed_connections(daemon: Policyd) -> None:
    """Whoever has asked gets his answer, and whoever has not the end."""
    for sent, answer in ((request_bytes(), b"action=DUNNO\n\n"), (request_bytes()[:-1], b""), (b"", b"")):
        with connections(daemon, 30) as half_closed:
            for connection in half_closed:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
            assert {read_to_end(connection) for connection in half_closed} == {answer}


def reset_connections(daemon: Policyd) -> None:
    for sent in (b"", request_bytes()[:-1], request_bytes(), b"".join(request_bytes() for _ in range(20))):
        for _ in range(25):
            with daemon.connect() as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # an error, no end


def clients_that_do_not_read(daemon: Policyd) -> None:
    """Each asks ten thousand times; nobody waits for them while they are there."""
    with connections(daemon, 5) as deaf:
        for connection in deaf:
            send_all(connection, b"".join(request_bytes(sasl_username="deaf") for _ in range(10_000)))
        assert is_answered(daemon)


def values_as_long_as_may_be(daemon: Policyd) -> None:
    """Of which we remember something.  With one wide character, each takes four bytes of memory."""
    request = request_bytes(sasl_username="listed", sender="x" * 8000)
    with daemon.connect() as connection:
        for number in range(4500):
            connection.sendall(request.replace(b"instance=", b"instance=%d\xf0\x9f\x92\xa9%s" % (number, b"x" * 8000)))
            assert read_answer(connection) == "HOLD blacklisted"


ATTACKS = [
    idle_connections, slow_connections, random_bytes, malformed_bytes, half_closed_connections, reset_connections,
    clients_that_do_not_read, values_as_long_as_may_be,
]  # fmt: skip


def all_of_them_at_once(daemon: Policyd) -> None:
    with ThreadPoolExecutor(len(ATTACKS)) as threads:
        for attack in [threads.submit(attack, daemon) for attack in ATTACKS]:
            attack.result()


def ask_on(connection: socket.socket, **attributes: object) -> str:
    connection.sendall(request_bytes(**attributes))
    return read_answer(connection)


def ask_until(enough: threading.Event, daemon: Policyd) -> list[str]:
    """Be an honest client: one message after the other on one connection.  Return the answers."""
    with daemon.connect() as connection:
        answers = [ask_on(connection, sasl_username="honest")]
        while not enough.wait(0.002):
            answers.append(ask_on(connection, sasl_username="honest"))
        return answers


@pytest.mark.parametrize("attack", [*ATTACKS, all_of_them_at_once], ids=lambda attack: attack.__name__)
def test_an_attack_costs_the_others_nothing(policyd: Start, attack: Callable[[Policyd], None]) -> None:
    """Every answer comes, every message counts, memory stays small, and all threads go away again."""
    daemon = policyd(defaultquota=1_000_000, blacklist="listed")
    daemon.hang_up()
    threads = status_of(daemon, "Threads")
    enough = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        honest = thread.submit(ask_until, enough, daemon)
        try:
            attack(daemon)
        finally:
            enough.set()
    assert set(honest.result()) == {DUNNO}
    wait_until(lambda: status_of(daemon, "Threads") == threads, f"the {threads} threads of before are left")
    assert daemon.ask(sasl_username="honest", queue_id="") == DUNNO
    daemon.wait_for_log(f"Updating db: honest/alice@example.org/192.0.2.1/1/{len(honest.result()) + 1}")
    assert status_of(daemon, "VmHWM") < MEMORY_MB * 1024
    assert daemon.stop() == 0


# ---- too many connections -------------------------------------------------------------------------


def is_answered(daemon: Policyd) -> bool:
    """Tell whether a new connection is served, not closed."""
    with daemon.connect() as connection, contextlib.suppress(EOFError, ConnectionError):
        return ask_on(connection) == DUNNO
    return False


def test_there_are_as_many_connections_as_the_settings_say(policyd: Start) -> None:
    """Also after SIGHUP.  One too many is closed at once, and the others never notice."""
    daemon = policyd(max_connections=3)
    with connections(daemon, 3) as first:
        assert [ask_on(connection) for connection in first] == [DUNNO] * 3
        assert [is_answered(daemon) for _ in range(5)] == [False] * 5
        daemon.write_settings(max_connections=5)
        reload(daemon)
        with connections(daemon, 2) as more:
            assert [ask_on(connection) for connection in first + more] == [DUNNO] * 5
            assert not is_answered(daemon)
            daemon.write_settings(max_connections=2)
            reload(daemon)
            assert [ask_on(connection) for connection in first + more] == [DUNNO] * 5
            assert not is_answered(daemon)
        first.pop().close()
        first.pop().close()
        wait_until(lambda: is_answered(daemon), "there is room for a second one")
        assert ask_on(first[0]) == DUNNO
    wait_until(lambda: is_answered(daemon), "there is room again")
    assert complaints(daemon) == ["3 connections are open, as many as may be: closing new ones at once"]


def test_with_80_descriptors_it_neither_dies_nor_spins(policyd: Start) -> None:
    """What is open is served, at the price that it has without the crowd outside, and later there is room again."""
    daemon = policyd(mounts="ulimit -S -n 80", max_connections=1000)
    with connections(daemon, 80 - 64) as served:
        assert {ask_on(connection) for connection in served} == {DUNNO}
        began = processor_s(daemon)
        with connections(daemon, 200) as crowd:
            assert {read_to_end(connection) for connection in crowd} == {b""}
        for _ in range(20):
            assert {ask_on(connection) for connection in served} == {DUNNO}
        assert processor_s(daemon) - began < 2
        began = processor_s(daemon)
        time.sleep(0.5)
        assert processor_s(daemon) - began < 0.1
    wait_until(lambda: is_answered(daemon), "there is room again")
    assert complaints(daemon) == ["16 connections are open, as many as may be: closing new ones at once"]


def test_300_connections_at_once_are_all_answered(policyd: Start) -> None:
    """Also while the daemon is busy elsewhere: those that come meanwhile wait in the kernel."""
    daemon = policyd()
    daemon.signal(signal.SIGSTOP)
    with connections(daemon, 300) as many:
        for connection in many:
            connection.sendall(request_bytes())
        daemon.signal(signal.SIGCONT)
        assert [read_answer(connection) for connection in many] == [DUNNO] * 300
        assert [ask_on(connection) for connection in many] == [DUNNO] * 300
        daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/600")


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
        assert daemon.ask() == DUNNO
        used = processor_s(daemon)
        time.sleep(1)
        assert processor_s(daemon) - used < 0.5
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert read_answer(waiting) == DUNNO
    assert len(complaints(daemon)) == 1


# ---- what is shown to whom ------------------------------------------------------------------------


def test_a_complaint_shows_what_a_client_sent_as_text(policyd: Start) -> None:
    """As the lines of the ordinary course do, which test_decision.py looks at."""
    sent, shown = "'; DROP \\ %s%n \x1b]0;x\x07\r", r"'; DROP \\ %s%n \x1b]0;x\x07\r"
    daemon = policyd()
    assert daemon.ask(protocol_state=sent, recipient_count=0) == DUNNO
    with daemon.connect() as connection:
        connection.sendall(request_bytes(recipient_count=sent))
        assert read_to_end(connection) == b""
    misplaced, malformed = complaints(daemon)
    assert misplaced.startswith(f"recipient_count is 0 at protocol_state {shown}: nothing is counted;")
    assert malformed == f"bad request from 127.0.0.1: recipient_count={shown} is not 1 to 6 digits; hung up"


@pytest.mark.parametrize(("has_password", "mode"), [(True, 0o640), (True, 0o644), (False, 0o644)])
def test_a_password_that_everybody_can_read_is_warned_of(policyd: Start, has_password: bool, mode: int) -> None:
    daemon = policyd()
    assert daemon.stop() == 0
    password = {"dbname": "x", "dbuser": "x", "dbpass": "hunter2", "dbport": free_port()}
    daemon.write_settings(**password if has_password else {})
    daemon.settings_file.chmod(mode)
    daemon.start()
    file = daemon.settings_file
    expected = f"everybody can read the password in {file}; try: chmod 0640 {file}"
    assert (expected in complaints(daemon)) == (has_password and mode == 0o644)
