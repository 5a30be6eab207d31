#!/usr/bin/env python3
"""Measure policyd: requests per second, latency and CPU, beside a bare server in the same run.

A second daemon on the same store has hourquota and max_networks on: what do they cost?

usage: .venv/bin/python scripts/bench.py [--store mariadb|old-table|embedded] [--history ROWS] ...

Starts a private MariaDB with its durable defaults (or uses the embedded store), the daemon with every log line
going to a real syslog socket, and a bare ThreadingTCPServer that reads the lines and answers DUNNO without
counting anything.  Processes of their own ask both in turn, each connection one request after the other, as
Postfix does.  At the end the sums in the store must be what was answered, to the recipient.

A benchmark, not a test: the figures are the machine's as much as policyd's, so look at the ratios.  Needs what
scripts/test.sh installs, and unshare(1).  Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from conftest import OLD_SCHEMA, SCHEMA  # noqa: E402 - they stand in tests/
from servers import IN_PRIVATE_DEV, Database, MariaDB, free_port, program, temporary_directory, wait_until  # noqa: E402

CONNECTIONS = (1, 16, 64)
WARM_UP_S = 0.5
ANSWER_TIMEOUT_S = 10
LOGINS = 20_000
EARLY_SIGNS = {"hourquota": "999999999", "max_networks": "10"}  # asked for, and never reached
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
REQUEST = """\
request=smtpd_access_policy
protocol_state=END-OF-MESSAGE
protocol_name=ESMTP
client_address=10.0.{octet}.{address}
client_name=host{address}.example.org
client_port=54803
reverse_client_name=host{address}.example.org
server_address=192.0.2.1
server_port=587
helo_name=host{address}.example.org
sender={login}+{sender}@example.org
recipient=
recipient_count={recipients}
queue_id=4X{number:X}
instance={process:x}.{number:x}.0
size=4711
etrn_domain=
stress=
sasl_method=PLAIN
sasl_username={login}
sasl_sender=
ccert_subject=
ccert_issuer=
ccert_fingerprint=
ccert_pubkey_fingerprint=
encryption_protocol=TLSv1.3
encryption_cipher=TLS_AES_256_GCM_SHA384
encryption_keysize=256
policy_context=

"""  # what Postfix 3.7 sends


class Load(NamedTuple):
    """What one process has seen: latencies in s after the warm-up, recipients answered by login."""

    latencies: list[float]
    answered: Counter[str]
    errors: int


def ask(port: int, connections: int, seconds: float, logins: int) -> Load:
    """Ask on `connections` connections at once for `seconds`, each a new request after each answer."""
    load = Load([], Counter(), 0)
    errors = 0
    poll = select.epoll()
    asked: dict[int, tuple[socket.socket, float, str, int]] = {}
    process = os.getpid()
    begin = time.perf_counter()
    number = 0

    def send(connection: socket.socket) -> None:
        nonlocal number
        number += 1
        which = (process * 7919 + number * 31) % logins
        recipients = 1 + number % 5
        login = f"u{which}"
        request = REQUEST.format(
            login=login, sender=number % 2, address=1 + number % 2, octet=which % 250,
            recipients=recipients, number=number, process=process,
        )
        asked[connection.fileno()] = connection, time.perf_counter(), login, recipients
        connection.sendall(request.encode())

    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(connection, select.EPOLLIN)
        send(connection)
    while asked:
        ready = poll.poll(ANSWER_TIMEOUT_S)
        if not ready:
            return load._replace(errors=errors + len(asked))
        for descriptor, _ in ready:
            connection, sent, login, recipients = asked.pop(descriptor)
            answer = connection.recv(4096)
            now = time.perf_counter()
            if answer != b"action=DUNNO\n\n":
                errors += 1
                poll.unregister(connection)
                continue
            load.answered[login] += recipients
            if sent - begin > WARM_UP_S:
                load.latencies.append(now - sent)
            if now - begin < WARM_UP_S + seconds:
                send(connection)
    return load._replace(errors=errors)


def ask_from_processes(port: int, connections: int, seconds: float, logins: int) -> Load:
    """Share the connections between two processes, so that the asking is not the bottleneck."""
    shares = [share for share in (connections // 2, connections - connections // 2) if share]
    with multiprocessing.Pool(len(shares)) as pool:
        loads = pool.starmap(ask, [(port, share, seconds, logins) for share in shares])
    return Load(
        [latency for load in loads for latency in load.latencies],
        sum((load.answered for load in loads), Counter()),
        sum(load.errors for load in loads),
    )


class BareHandler(socketserver.StreamRequestHandler):
    """The least a threaded policy server can do."""

    def handle(self) -> None:
        """Read line by line up to the empty one, answer, again."""
        while line := self.rfile.readline(8192):
            if line == b"\n":
                self.wfile.write(b"action=DUNNO\n\n")


class BareServer(socketserver.ThreadingTCPServer):
    """What policyd is measured against."""

    request_queue_size = 1024
    daemon_threads = True


def drain_syslog(path: str) -> None:
    """Be a syslogd that throws everything away."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(path)
        while True:
            log.recv(8192)


@contextlib.contextmanager
def child(target: object, *arguments: object) -> Iterator[int]:
    """Run a function in a process of its own as long as the block lasts; yield its pid."""
    process = multiprocessing.Process(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def can_connect(port: int) -> bool:
    """Tell whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def running_daemon(port: int, settings: dict[str, str]) -> Iterator[tuple[int, Path]]:
    """Start policyd with a syslog of ours; yield its pid and its state directory."""
    directory = temporary_directory()
    dev = directory / "dev"
    dev.mkdir()
    for name in ("null", "zero", "random", "urandom"):
        (dev / name).touch()
    (dev / "log").symlink_to(directory / "syslog")
    file = directory / "policyd.cfg"
    settings = {"port": str(port), "statedir": str(directory), "defaultquota": "999999999", **settings}
    file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = [program("unshare", "util-linux"), "--mount", *as_root, "sh", "-c", IN_PRIVATE_DEV, "sh", str(dev)]
    with child(drain_syslog, str(directory / "syslog")):
        wait_until((directory / "syslog").exists, "the syslog socket")
        daemon = subprocess.Popen([*command, sys.executable, str(ROOT / "policyd.py"), "-c", str(file)],
                                  stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: can_connect(port), "policyd listens")
            yield daemon.pid, directory
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(10)
            shutil.rmtree(directory)


def sums(database: Database | None, directories: Sequence[Path]) -> Counter[str]:
    """Return what the store, or each daemon's own one, holds for each login."""
    statement = "SELECT sasl_username, SUM(recipient_count) FROM events GROUP BY sasl_username"
    if database:
        return Counter({login: int(recipients) for login, recipients in database.query(statement)})
    stored: Counter[str] = Counter()
    for directory in directories:
        with contextlib.closing(sqlite3.connect(directory / "events.sqlite3")) as connection:
            stored.update(dict(connection.execute(statement).fetchall()))
    return stored


def add_history(database: Database, rows: int) -> None:
    """Fill the table with events of the last 24 h, evenly spread over time and logins."""
    database.query(
        "INSERT INTO events (ts, sasl_username, sender, client_address, recipient_count)"
        " SELECT CURRENT_TIMESTAMP(3) - INTERVAL seq * %s MICROSECOND, CONCAT('u', seq %% %s),"
        " 'somebody@example.org', '10.0.0.1', 1 + seq %% 5 FROM seq_1_to_" + str(rows),
        (86_000_000_000 // rows, LOGINS),
    )


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


class Row(NamedTuple):
    """One measurement."""

    per_s: float
    p50_ms: float
    p99_ms: float
    ratio: float
    daemon_s: float  # of CPU, for 1000 requests
    database_s: float
    early_ratio: float  # requests/s with hourquota and max_networks on, of those with both off


def measure(arguments: argparse.Namespace, database: Database | None) -> int:
    """Print the table; return 1 if anything was lost, doubled or not answered."""
    port, early_port, bare_port = free_port(), free_port(), free_port()
    answered: Counter[str] = Counter()
    errors = 0
    rows: dict[int, list[Row]] = {connections: [] for connections in CONNECTIONS}
    bare = BareServer(("127.0.0.1", bare_port), BareHandler)
    settings = database.settings() if database else {}
    daemon = running_daemon(port, settings)
    early_daemon = running_daemon(early_port, {**settings, **EARLY_SIGNS})
    with child(bare.serve_forever), daemon as (pid, directory), early_daemon as (_, early_directory):
        before = sums(database, [])
        watched = [pid, *([database.server.pid] if database else [])]
        for connections in CONNECTIONS * arguments.rounds:
            bare_load = ask_from_processes(bare_port, connections, arguments.seconds, LOGINS)
            began = [cpu_s(process) for process in watched]
            load = ask_from_processes(port, connections, arguments.seconds, LOGINS)
            used = [cpu_s(process) - earlier for process, earlier in zip(watched, began)]
            early_load = ask_from_processes(early_port, connections, arguments.seconds, LOGINS)
            answered += load.answered + early_load.answered
            errors += load.errors + bare_load.errors + early_load.errors
            rows[connections].append(row_of(load, bare_load, early_load, arguments.seconds, used))
        stored = sums(database, [directory, early_directory])
    stored.subtract(before)
    print("| connections | requests/s | p50 ms | p99 ms | of the bare server | CPU s per 1000: policyd | database"
          " | with the early signs, of without |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for connections, measured in rows.items():
        row = Row(*map(statistics.median, zip(*measured)))
        print(f"| {connections} | {row.per_s:.0f} | {row.p50_ms:.2f} | {row.p99_ms:.2f} | {row.ratio:.2f}"
              f" | {row.daemon_s:.3f} | {row.database_s:.3f} | {row.early_ratio:.2f} |")
    wrong = [login for login in stored if stored[login] != answered[login]]
    print(f"recipients answered: {sum(answered.values())}, stored: {sum(stored.values())};"
          f" logins with another sum: {len(wrong)}; errors: {errors}")
    return 1 if wrong or errors else 0


def row_of(load: Load, bare_load: Load, early_load: Load, seconds: float, used: list[float]) -> Row:
    """Sum up one measurement; `used` are CPU seconds, those of the warm-up included."""
    thousands = len(load.latencies) / seconds * (seconds + WARM_UP_S) / 1000
    percentiles = statistics.quantiles(load.latencies, n=100)
    return Row(
        per_s=len(load.latencies) / seconds,
        p50_ms=percentiles[49] * 1000,
        p99_ms=percentiles[98] * 1000,
        ratio=len(load.latencies) / max(1, len(bare_load.latencies)),
        daemon_s=used[0] / thousands,
        database_s=used[1] / thousands if len(used) > 1 else 0.0,
        early_ratio=len(early_load.latencies) / max(1, len(load.latencies)),
    )


def main() -> int:
    """Read the command line, start what is needed, measure."""
    parser = argparse.ArgumentParser(description="Measure policyd beside a bare server.")
    parser.add_argument("--store", choices=("mariadb", "old-table", "embedded"), default="mariadb",
                        help="the table of schema.sql (default), go-policyd's table, or the SQLite file")
    parser.add_argument("--history", type=int, default=0, metavar="ROWS",
                        help=f"events of the last 24 h in the table beforehand, over {LOGINS} logins")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="the medians of how many are shown (default 3)")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} processors, Python {sys.version.split()[0]}, store {arguments.store},"
          f" {arguments.history} rows of history, median of {arguments.rounds} x {arguments.seconds:g} s")
    if arguments.store == "embedded":
        return measure(arguments, None)
    server = MariaDB(buffer_pool="1G")
    try:
        server.install()
        database = server.new_database(SCHEMA if arguments.store == "mariadb" else OLD_SCHEMA)
        if arguments.history:
            add_history(database, arguments.history)
        return measure(arguments, database)
    finally:
        server.remove()


if __name__ == "__main__":
    sys.exit(main())
