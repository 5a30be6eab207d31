"""Where policyd listens: IPv4, IPv6, a Unix socket, and what it says when it cannot."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from servers import (
    DUNNO,
    Policyd,
    free_port,
    program,
    read_answer,
    read_to_end,
    request_bytes,
    run_policyd,
    temporary_directory,
)

Start = Callable[..., Policyd]


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a Unix socket may be made."""
    directory = temporary_directory()
    yield directory / "socket"
    shutil.rmtree(directory)


def refusal(tmp_path: Path, **settings: object) -> str:
    """Return the one line with which policyd refuses to start with status 1."""
    file = tmp_path / "second.cfg"
    file.write_text("".join(f"{key}={value}\n" for key, value in {"statedir": tmp_path, **settings}.items()))
    done = run_policyd("-c", str(file))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    return done.stderr.rstrip("\n")


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::"])
def test_it_answers_at_the_address_it_is_given(policyd: Start, bind: str) -> None:
    daemon = policyd(bind=bind)
    assert daemon.ask() == DUNNO
    shown = f"[{bind}]" if ":" in bind else bind
    assert f" on inet:{shown}:{daemon.port}, " in daemon.log_lines()[0].text


def test_it_listens_on_the_loopback_address_unless_told_otherwise(policyd: Start) -> None:
    daemon = policyd()
    assert daemon.ask() == DUNNO
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", daemon.port))


# A machine whose localhost is both, as it is on most, IPv6 first; and one name that is IPv6 alone.
HOSTS = """
printf '%s\\n' '::1 localhost' '127.0.0.1 localhost' '::1 six.example.org' >"$STATE_DIRECTORY/hosts"
mount --bind "$STATE_DIRECTORY/hosts" /etc/hosts || exit
"""


@pytest.mark.parametrize(
    ("bind", "address", "shown"),
    [("localhost", "127.0.0.1", "127.0.0.1"), ("six.example.org", "::1", "[::1]")],
)
def test_of_a_name_ipv4_comes_first_and_is_shown(policyd: Start, bind: str, address: str, shown: str) -> None:
    """Postfix's line names 127.0.0.1: it would be refused, and mail pass uncounted.  Also in the status and --check."""
    daemon = policyd(bind=bind, mounts=HOSTS)
    with socket.create_connection((address, daemon.port), 20) as connection:
        connection.sendall(request_bytes(recipient_count=1))
        assert read_answer(connection) == DUNNO
    where = f"inet:{shown}:{daemon.port}"
    assert f" on {where}, " in daemon.log_lines()[0].text
    assert daemon.notifications[0].endswith(where)
    hosts = [program("nsenter", "util-linux"), f"--target={daemon.pid}", "--mount"]
    through = hosts if os.geteuid() == 0 else [*hosts, "--user", "--preserve-credentials"]
    done = run_policyd("-c", str(daemon.settings_file), "--check", through=through)
    assert (done.returncode, done.stderr) == (0, "")
    assert where in done.stdout


def test_a_peer_with_an_ipv6_address_is_named(policyd: Start) -> None:
    daemon = policyd(bind="::1")
    with daemon.connect() as connection:
        connection.sendall(b"junk\n\n")
        assert read_to_end(connection) == b""
    daemon.wait_for_log("bad request from ::1: a line without '='; hung up")


def test_a_unix_socket_is_for_its_owner_and_group(policyd: Start, path: Path) -> None:
    daemon = policyd(bind=path)
    assert daemon.ask() == DUNNO
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with daemon.connect() as connection:
        connection.sendall(b"junk\n\n")
        assert read_to_end(connection) == b""
    daemon.wait_for_log("bad request from the Unix socket: a line without '='; hung up")


def test_the_unix_socket_is_removed_at_the_end(policyd: Start, path: Path) -> None:
    daemon = policyd(bind=path)
    assert path.exists()
    assert daemon.stop() == 0
    assert not path.exists()


def test_at_the_end_the_socket_of_a_successor_is_left_alone(policyd: Start, path: Path) -> None:
    """Of the daemon that took the place of this one."""
    daemon = policyd(bind=path)
    path.unlink()
    successor = policyd(bind=path)
    assert daemon.stop() == 0
    assert successor.ask() == DUNNO
    assert successor.stop() == 0
    assert not path.exists()


def test_the_unix_socket_of_a_daemon_that_crashed_is_removed(policyd: Start, path: Path) -> None:
    daemon = policyd(bind=path)
    daemon.kill()
    assert path.exists()
    daemon.start()
    assert daemon.ask() == DUNNO


def test_the_unix_socket_of_a_live_daemon_is_left_alone(policyd: Start, path: Path, tmp_path: Path) -> None:
    daemon = policyd(bind=path)
    assert refusal(tmp_path, bind=path) == f"policyd: cannot listen on unix:{path}: another daemon listens there"
    assert daemon.ask() == DUNNO


def test_a_file_that_is_no_socket_is_left_alone(path: Path, tmp_path: Path) -> None:
    path.write_text("precious")
    assert refusal(tmp_path, bind=path) == f"policyd: cannot listen on unix:{path}: is there and not a socket"
    assert path.read_text() == "precious"


def test_a_unix_socket_needs_its_directory(path: Path, tmp_path: Path) -> None:
    absent = path.parent / "absent" / "socket"
    assert refusal(tmp_path, bind=absent) == f"policyd: cannot listen on unix:{absent}: {os.strerror(2)}"


def test_the_path_of_a_unix_socket_can_be_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 108)
    assert refusal(tmp_path, bind=path) == f"policyd: cannot listen on unix:{path}: AF_UNIX path too long"


def test_a_port_in_use_is_said(policyd: Start, tmp_path: Path) -> None:
    daemon = policyd()
    assert refusal(tmp_path, port=daemon.port) == (
        f"policyd: cannot listen on inet:127.0.0.1:{daemon.port}: Address already in use"
    )
    assert daemon.ask() == DUNNO


@pytest.mark.parametrize(
    ("bind", "shown"), [("192.0.2.1", "192.0.2.1"), ("2001:db8::1", "[2001:db8::1]")], ids=["IPv4", "IPv6"]
)
def test_an_address_that_is_not_ours_is_said(tmp_path: Path, bind: str, shown: str) -> None:
    port = free_port()
    assert refusal(tmp_path, bind=bind, port=port) == (
        f"policyd: cannot listen on inet:{shown}:{port}: Cannot assign requested address"
    )


@pytest.mark.parametrize("bind", ["a..b", "x" * 64 + ".example.org"])
def test_what_can_be_no_host_name_is_said(tmp_path: Path, bind: str) -> None:
    port = free_port()
    assert refusal(tmp_path, bind=bind, port=port).startswith(f"policyd: cannot listen on inet:{bind}:{port}: ")


def test_it_starts_again_at_once_on_the_port_it_had(policyd: Start) -> None:
    """Although connections of its last life may linger in the kernel."""
    daemon = policyd()
    daemon.ask()
    daemon.signal(signal.SIGTERM)  # it hangs up first, so the lingering is on its side
    assert daemon.process.wait() == 0
    daemon.hang_up()
    assert daemon.start().ask() == DUNNO
