"""Clients that are broken or mean harm: the others get their answers, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
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
from servers import DUNNO, Policyd, free_port, policyd_factory, read_answer, read_to_end, request_bytes, wait_until

MEMORY_MB = 150


def status_of(daemon: Policyd, name: str) -> int:
    """Return a number of /proc/PID/status: Threads, or VmHWM in kB."""
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return int(dict(line.split(":\t", 1) for line in lines)[name].split()[0])


def processor_s(daemon: Policyd) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_spinning(daemon: Policyd) -> bool:
    began = processor_s(daemon)
    time.sleep(0.5)
    return processor_s(daemon) - began > 0.2


def ask_on(connection: socket.socket, **attributes: object) -> str:
    connection.sendall(request_bytes(**attributes))
    return read_answer(connection)


def is_answered(daemon: Policyd) -> bool:
    with daemon.connect() as connection, contextlib.suppress(EOFError, ConnectionError):
        return ask_on(connection) == DUNNO
    return False


@contextlib.contextmanager
def connections(daemon: Policyd, number: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(daemon.connect()) for _ in range(number)]


def three_hundred_at_once(daemon: Policyd) -> None:
    """While the daemon is busy elsewhere they wait in the kernel; all are answered then, and idle."""
    daemon.signal(signal.SIGSTOP)
    with connections(daemon, 300) as many:
        for connection in many:
            connection.sendall(request_bytes())
        daemon.signal(signal.SIGCONT)
        assert [read_answer(connection) for connection in many] == [DUNNO] * 300
        assert status_of(daemon, "Threads") >= 300


def requests_without_an_end(daemon: Policyd) -> None:
    """A line, and a million lines."""
    for data in (b"x=" + b"x" * 10_000_000, b"request=smtpd_access_policy\n" + b"x=y\n" * 1_000_000 + b"\n"):
        with daemon.connect() as connection:
            with contextlib.suppress(ConnectionError):  # it hangs up before all is sent
                connection.sendall(data)
            assert read_to_end(connection) == b""


def reset_connections(daemon: Policyd) -> None:
    for sent in (b"", request_bytes()[:-1], request_bytes(), b"".join(request_bytes() for _ in range(20))):
        for _ in range(25):
            with daemon.connect() as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # an error, no end


def clients_that_do_not_read(daemon: Policyd) -> None:
    """Nobody waits for them, not the thread that counts for all; who goes on asking is hung up on."""
    with connections(daemon, 4) as deaf, socket.socket() as deafest:
        for connection in deaf:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"".join(request_bytes(sasl_username="deaf") for _ in range(10_000)))
        deafest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deafest.settimeout(60)
        deafest.connect(("127.0.0.1", daemon.port))
        with contextlib.suppress(ConnectionError):  # once all buffers are full
            for _ in range(500):
                deafest.sendall(request_bytes(sasl_username="") * 1000)
            pytest.fail("nobody hangs up")
        assert is_answered(daemon)


def values_as_long_as_may_be(daemon: Policyd) -> None:
    """Of which we remember something.  With one wide character, each takes four bytes of memory."""
    request = request_bytes(sasl_username="listed", sender="x" * 8000)
    with daemon.connect() as connection:
        for number in range(4500):
            connection.sendall(request.replace(b"instance=", b"instance=%d\xf0\x9f\x92\xa9%s" % (number, b"x" * 8000)))
            assert read_answer(connection) == "HOLD blacklisted"


ATTACKS = [three_hundred_at_once, requests_without_an_end, reset_connections, clients_that_do_not_read,
           values_as_long_as_may_be]  # fmt: skip


def all_of_them_at_once(daemon: Policyd) -> None:
    with ThreadPoolExecutor(len(ATTACKS)) as threads:
        for attack in [threads.submit(attack, daemon) for attack in ATTACKS]:
            attack.result()


@pytest.fixture(scope="module")
def victim() -> Iterator[Policyd]:
    """One daemon for all attacks, which in the end has taken no more memory than it may, and stops as it should."""
    with policyd_factory() as start:
        daemon = start(defaultquota=1_000_000, blacklist="listed")
        yield daemon
        assert status_of(daemon, "VmHWM") < MEMORY_MB * 1024
        assert daemon.stop() == 0


def ask_until(enough: threading.Event, daemon: Policyd, login: str) -> list[str]:
    """Be an honest client: one message after the other on one connection.  Return the answers."""
    with daemon.connect() as connection:
        answers = [ask_on(connection, sasl_username=login)]
        while not enough.wait(0.002):
            answers.append(ask_on(connection, sasl_username=login))
        return answers


@pytest.mark.parametrize("attack", [*ATTACKS, all_of_them_at_once], ids=lambda attack: attack.__name__)
def test_an_attack_costs_the_others_nothing(victim: Policyd, attack: Callable[[Policyd], None]) -> None:
    """Every answer comes, every message counts, memory stays small, and all threads go away again."""
    victim.hang_up()
    threads = status_of(victim, "Threads")
    enough, honest = threading.Event(), f"honest_{attack.__name__}"
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(ask_until, enough, victim, honest)
        try:
            attack(victim)
        finally:
            enough.set()
    assert set(answers.result()) == {DUNNO}
    wait_until(lambda: status_of(victim, "Threads") <= threads, f"the {threads} threads of before are left")
    assert victim.ask(sasl_username=honest, queue_id="") == DUNNO
    victim.wait_for_log(f"Updating db: {honest}/alice@example.org/192.0.2.1/1/{len(answers.result()) + 1}")


def test_there_are_as_many_connections_as_the_settings_say(policyd: Callable[..., Policyd]) -> None:
    """Also after SIGHUP.  One too many is closed at once, and the others never notice."""
    daemon = policyd(max_connections=3)
    with connections(daemon, 3) as first:
        assert [ask_on(connection) for connection in first] == [DUNNO] * 3
        assert [is_answered(daemon) for _ in range(5)] == [False] * 5
        daemon.write_settings(max_connections=5)
        reload(daemon)
        with connections(daemon, 2) as more:
            for fewer in (5, 2):
                daemon.write_settings(max_connections=fewer)
                reload(daemon)
                assert [ask_on(connection) for connection in first + more] == [DUNNO] * 5
                assert not is_answered(daemon)
        for _ in range(2):
            first.pop().close()
        wait_until(lambda: is_answered(daemon), "there is room for a second one")
        assert ask_on(first[0]) == DUNNO
    wait_until(lambda: is_answered(daemon), "there is room again")
    assert complaints(daemon) == ["3 connections are open, as many as may be: closing new ones at once"]


def test_with_80_descriptors_it_neither_dies_nor_spins(policyd: Callable[..., Policyd]) -> None:
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
        assert not is_spinning(daemon)
    wait_until(lambda: is_answered(daemon), "there is room again")
    assert complaints(daemon) == ["16 connections are open, as many as may be: closing new ones at once"]


def test_running_out_of_descriptors_neither_kills_nor_spins(policyd: Callable[..., Policyd]) -> None:
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
        assert not is_spinning(daemon)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert read_answer(waiting) == DUNNO
    assert len(complaints(daemon)) == 1


def test_a_password_that_everybody_can_read_is_warned_of(policyd: Callable[..., Policyd]) -> None:
    daemon = policyd()
    warning = f"everybody can read the password in {daemon.settings_file}; try: chmod 0640 {daemon.settings_file}"
    password = {"dbname": "x", "dbuser": "x", "dbpass": "hunter2", "dbport": free_port()}
    for settings, mode, number in (({}, 0o644, 0), (password, 0o640, 0), (password, 0o644, 1)):
        assert daemon.stop() == 0
        daemon.write_settings(**settings)
        daemon.settings_file.chmod(mode)
        assert complaints(daemon.start()).count(warning) == number
