"""Where policyd listens: IPv4, IPv6, a Unix socket, and what it says when it cannot."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Callable

import pytest
from servers import DUNNO, Policyd, free_port, program, read_answer, read_to_end, request_bytes, run_policyd

Start = Callable[..., Policyd]


def refusal(directory: Path, **settings: object) -> str:
    """Return the one line with which policyd refuses to start with status 1, behind what all begin with."""
    file = directory / "second.cfg"
    file.write_text("".join(f"{key}={value}\n" for key, value in {"statedir": directory, **settings}.items()))
    done = run_policyd("-c", str(file))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    assert done.stderr.startswith("policyd: cannot listen on "), done
    return done.stderr[len("policyd: cannot listen on ") : -1]


@pytest.mark.parametrize(("bind", "where", "peer"), [
    ("", "inet:127.0.0.1:{port}", "127.0.0.1"), ("127.0.0.2", "inet:127.0.0.2:{port}", "127.0.0.1"),
    ("0.0.0.0", "inet:0.0.0.0:{port}", "127.0.0.1"), ("::1", "inet:[::1]:{port}", "::1"),
    ("::", "inet:[::]:{port}", "::1"), ("socket", "unix:{bind}", "the Unix socket"),
])  # fmt: skip
def test_it_answers_where_it_is_told_to_listen_and_no_other_can(
    policyd: Start, tmp_path: Path, bind: str, where: str, peer: str
) -> None:
    """It names that and its peers.  A check beside it asks it, finds nothing wrong, and counts nothing."""
    given = {"bind": tmp_path / bind if bind == "socket" else bind} if bind else {}
    daemon = policyd(**given)
    where = where.format(bind=daemon.bind, port=daemon.port)
    assert daemon.ask() == DUNNO
    assert f" on {where}, " in daemon.log_lines()[0].text
    with daemon.connect() as connection:
        connection.sendall(b"junk\n\n")
        assert read_to_end(connection) == b""
    daemon.wait_for_log(f"bad request from {peer}: a line without '='; hung up")
    if not bind:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", daemon.port))
    done = run_policyd("-c", str(daemon.settings_file), "--check")
    assert (done.returncode, done.stderr) == (0, ""), done
    in_the_way = "another daemon listens there" if bind == "socket" else "Address already in use"
    assert refusal(tmp_path, **{"port": daemon.port, **given}) == f"{where}: {in_the_way}"
    assert daemon.ask() == DUNNO
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/2")


# A machine whose localhost is both, as it is on most, IPv6 first; and one name that is IPv6 alone.
HOSTS = """
printf '%s\\n' '::1 localhost' '127.0.0.1 localhost' '::1 six.example.org' >"$STATE_DIRECTORY/hosts"
mount --bind "$STATE_DIRECTORY/hosts" /etc/hosts || exit
"""


@pytest.mark.parametrize(("bind", "address"), [("localhost", "127.0.0.1"), ("six.example.org", "::1")])
def test_of_a_name_ipv4_comes_first_and_is_shown(policyd: Start, bind: str, address: str) -> None:
    """Postfix's line names 127.0.0.1: it would be refused, and mail pass uncounted.  Also in the status and --check."""
    daemon = policyd(bind=bind, mounts=HOSTS)
    with socket.create_connection((address, daemon.port), 20) as connection:
        connection.sendall(request_bytes(recipient_count=1))
        assert read_answer(connection) == DUNNO
    where = f"inet:{'[::1]' if ':' in address else address}:{daemon.port}"
    assert f" on {where}, " in daemon.log_lines()[0].text
    assert daemon.notifications[0].endswith(where)
    hosts = [program("nsenter", "util-linux"), f"--target={daemon.pid}", "--mount"]
    through = hosts if os.geteuid() == 0 else [*hosts, "--user", "--preserve-credentials"]
    done = run_policyd("-c", str(daemon.settings_file), "--check", through=through)
    assert (done.returncode, done.stderr) == (0, "")
    assert where in done.stdout


def test_a_unix_socket_is_for_owner_and_group_and_goes_with_its_daemon(policyd: Start, tmp_path: Path) -> None:
    """That of one that crashed is replaced; that of a daemon that took the place of this one is left alone."""
    path = tmp_path / "socket"
    daemon = policyd(bind=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    daemon.kill()
    assert path.exists()
    assert daemon.start().ask() == DUNNO
    path.unlink()
    successor = policyd(bind=path)
    assert daemon.stop() == 0
    assert successor.ask() == DUNNO
    assert successor.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize(("bind", "said"), [
    ("{}/file", "unix:{bind}: is there and not a socket"),
    ("{}/absent/socket", "unix:{bind}: No such file or directory"),
    ("{}/" + "x" * 108, "unix:{bind}: AF_UNIX path too long"),
    ("192.0.2.1", "inet:192.0.2.1:{port}: Cannot assign requested address"),
    ("2001:db8::1", "inet:[2001:db8::1]:{port}: Cannot assign requested address"),
    ("a..b", "inet:a..b:{port}: "), ("x" * 64 + ".example.org", "inet:{bind}:{port}: "),
], ids=["a file", "no directory", "a long path", "IPv4", "IPv6", "no name", "a long name"])  # fmt: skip
def test_why_it_cannot_listen_is_said(tmp_path: Path, bind: str, said: str) -> None:
    (tmp_path / "file").write_text("precious")
    bind, port = bind.format(tmp_path), free_port()
    assert refusal(tmp_path, bind=bind, port=port).startswith(said.format(bind=bind, port=port))
    assert (tmp_path / "file").read_text() == "precious"
