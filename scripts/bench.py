#!/usr/bin/env python3
"""Measure policyd: requests per second, latency and CPU, beside a bare server in the same run.

usage: .venv/bin/python scripts/bench.py [--store mariadb|old-table|embedded] [--load even|busy|hot] ...

Starts a private MariaDB with its durable defaults (or uses the embedded store), the daemon with every log line
going to a real syslog socket, and a bare ThreadingTCPServer that reads the lines and answers DUNNO without
counting anything.  A second daemon on the same store has hourquota and early_signs on: what do they cost?  A third
one is another version of policyd.py, if --against names it.  Processes of their own ask all of them in turn, each
connection one request after the other, as Postfix does.  At the end the sums in the store must be what was
answered, to the recipient.

--load even: the logins take turns; of a history, each has used three networks.  --load busy: 2000 logins that have
sent more than 40 recipients within the hour already, from three places that are known of them, and now and then
from a new one.  --load hot: 50 messages a second of the others beside one login that sends as fast as it can and
has 200,000 events in the hour, far beyond its quota; the percentiles are the others'.

A benchmark, not a test: the figures are the machine's as much as policyd's, so look at the ratios.  Needs what
scripts/test.sh installs, and unshare(1).  Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import re
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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from conftest import OLD_SCHEMA, SCHEMA  # noqa: E402 - they stand in tests/
from servers import IN_PRIVATE_DEV, Database, MariaDB, free_port, program, temporary_directory, wait_until  # noqa: E402

WARM_UP_S = 0.5
ANSWER_TIMEOUT_S = 10
LOGINS = {"even": 20_000, "busy": 2000, "hot": 20_000}
HISTORY_LOGINS = 200_000
HOT_EVENTS = 200_000
OTHERS_A_SECOND = 50
EARLY_SIGNS = {"hourquota": "999999999", "early_signs": "yes", "keep_days": "30", "new_place_quota": "999999999"}
NUMBERS = itertools.count(1)  # of this process's requests: none is the repetition of another
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
REQUEST = """\
request=smtpd_access_policy
protocol_state=END-OF-MESSAGE
protocol_name=ESMTP
client_address={address}
client_name=host.example.org
client_port=54803
reverse_client_name=host.example.org
server_address=192.0.2.1
server_port=587
helo_name=host.example.org
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
STATEMENTS = {  # of the daemon with the early signs: what is it that the server is asked?
    "INSERT": r"INSERT INTO", "sums": r"BIT_OR", "known places": r"AS earlier",
    "the hour's places": r"MIN\(TIMESTAMPDIFF", "since when held": r"AND recipient_count IS NULL\n",
}  # fmt: skip


class Load(NamedTuple):
    """What one process has seen: latencies in s after the warm-up, recipients answered by login."""

    latencies: list[float]
    answered: Counter[str]
    errors: int


def request_of(number: int, load: str, max_recipients: int) -> tuple[str, int, bytes]:
    """Return login, recipients and bytes of one request."""
    process = os.getpid()
    which = (process * 7919 + number * 31) % LOGINS[load]
    login, recipients = f"u{which}", 1 + number % max_recipients
    place = 100 if load == "busy" and number % 100 == 0 else 10 + number % 3
    address = f"{place}.{which % 250}.0.{1 + number % 2}"
    request = REQUEST.format(login=login, sender=number % 2, address=address, recipients=recipients, number=number,
                             process=process)  # fmt: skip
    return login, recipients, request.encode()


def ask(port: int, connections: int, seconds: float, load: str, max_recipients: int) -> Load:
    """Ask on `connections` connections at once for `seconds`, each a new request after each answer."""
    seen = Load([], Counter(), 0)
    errors = number = 0
    poll = select.epoll()
    asked: dict[int, tuple[socket.socket, float, str, int]] = {}
    begin = time.perf_counter()

    def send(connection: socket.socket) -> None:
        nonlocal number
        number += 1
        login, recipients, request = request_of(number, load, max_recipients)
        asked[connection.fileno()] = connection, time.perf_counter(), login, recipients
        connection.sendall(request)

    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(connection, select.EPOLLIN)
        send(connection)
    while asked:
        ready = poll.poll(ANSWER_TIMEOUT_S)
        if not ready:
            return seen._replace(errors=errors + len(asked))
        for descriptor, _ in ready:
            connection, sent, login, recipients = asked.pop(descriptor)
            answer = connection.recv(4096)
            now = time.perf_counter()
            if answer != b"action=DUNNO\n\n":
                errors += 1
                poll.unregister(connection)
                continue
            seen.answered[login] += recipients
            if sent - begin > WARM_UP_S:
                seen.latencies.append(now - sent)
            if now - begin < WARM_UP_S + seconds:
                send(connection)
    return seen._replace(errors=errors)


def ask_from_processes(port: int, connections: int, seconds: float, load: str, max_recipients: int) -> Load:
    """Share the connections between two processes, so that the asking is not the bottleneck."""
    shares = [share for share in (connections // 2, connections - connections // 2) if share]
    with multiprocessing.Pool(len(shares)) as pool:
        loads = pool.starmap(ask, [(port, share, seconds, load, max_recipients) for share in shares])
    return Load(
        [latency for one in loads for latency in one.latencies],
        sum((one.answered for one in loads), Counter()),
        sum(one.errors for one in loads),
    )


def ask_beside_a_hot_login(port: int, connections: int, seconds: float, load: str, max_recipients: int) -> Load:
    """Ask at a steady pace on one connection, while the hot login does on `connections`; return what the one saw."""
    end = time.perf_counter() + WARM_UP_S + seconds
    hot = [multiprocessing.Process(target=ask_hot, args=(port, end), daemon=True) for _ in range(connections)]
    for process in hot:
        process.start()
    seen, errors = Load([], Counter(), 0), 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(ANSWER_TIMEOUT_S)
        while time.perf_counter() < end:
            login, recipients, request = request_of(next(NUMBERS), load, max_recipients)
            sent = time.perf_counter()
            connection.sendall(request)
            errors += connection.recv(4096) != b"action=DUNNO\n\n"
            seen.answered[login] += recipients
            seen.latencies.append(time.perf_counter() - sent)
            time.sleep(max(0.0, sent + 1 / OTHERS_A_SECOND - time.perf_counter()))
    for process in hot:
        process.join()
    return seen._replace(errors=errors)


def ask_hot(port: int, end: float) -> None:
    """Be the hot login on one connection until `end`."""
    number = 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while time.perf_counter() < end:
            number += 1
            address = f"{number % 200}.0.0.1"
            request = REQUEST.format(login="hot", sender=0, address=address, recipients=1, number=number,
                                     process=os.getpid())  # fmt: skip
            connection.sendall(request.encode())
            connection.recv(4096)


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


class Daemon(NamedTuple):
    """A policyd that runs."""

    name: str
    port: int
    pid: int
    directory: Path


@contextlib.contextmanager
def running_daemon(name: str, program_file: Path, settings: dict[str, str]) -> Iterator[Daemon]:
    """Start policyd with a syslog of ours."""
    directory, port = temporary_directory(), free_port()
    dev = directory / "dev"
    dev.mkdir()
    for device in ("null", "zero", "random", "urandom"):
        (dev / device).touch()
    (dev / "log").symlink_to(directory / "syslog")
    file = directory / "policyd.cfg"
    settings = {"port": str(port), "statedir": str(directory), "defaultquota": "999999999", **settings}
    file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = [program("unshare", "util-linux"), "--mount", *as_root, "sh", "-c", IN_PRIVATE_DEV, "sh", str(dev)]
    with child(drain_syslog, str(directory / "syslog")):
        wait_until((directory / "syslog").exists, "the syslog socket")
        daemon = subprocess.Popen([*command, sys.executable, str(program_file), "-c", str(file)],
                                  stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: can_connect(port), "policyd listens")
            yield Daemon(name, port, daemon.pid, directory)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(10)
            shutil.rmtree(directory)


def sums(database: Database | None, daemons: list[Daemon]) -> Counter[str]:
    """Return what the store, or each daemon's own one, holds for each login but the hot one."""
    statement = ("SELECT sasl_username, SUM(recipient_count) FROM events WHERE recipient_count > 0"
                 " AND sasl_username <> 'hot' GROUP BY sasl_username")  # fmt: skip
    if database:
        return Counter({login: int(recipients) for login, recipients in database.query(statement)})
    stored: Counter[str] = Counter()
    for daemon in daemons:
        with contextlib.closing(sqlite3.connect(daemon.directory / "events.sqlite3")) as connection:
            stored.update(dict(connection.execute(statement).fetchall()))
    return stored


def add_history(database: Database, load: str, rows: int) -> None:
    """Fill the table with what the load needs, and an event of some days ago: else no early sign is judged."""
    insert = ("INSERT INTO events (ts, sasl_username, sender, client_address, recipient_count)"
              " SELECT CURRENT_TIMESTAMP(3)")  # fmt: skip
    database.query(f"{insert} - INTERVAL 5 DAY, 'somebody', 'somebody@example.org', '10.0.0.1', 1")
    if rows:
        database.query(
            f"{insert} - INTERVAL seq * %s MICROSECOND, CONCAT('u', seq %% %s), 'somebody@example.org',"
            " CONCAT('10.', seq %% 250, '.', seq DIV %s %% 3, '.1'), 1 FROM seq_1_to_" + str(rows),
            (86_000_000_000 // rows, HISTORY_LOGINS, HISTORY_LOGINS),
        )
    if load == "busy":  # each 60 recipients in the hour, and two days ago three places
        for age_s, recipients in ((600, 20), (172_800, 1)):
            database.query(
                f"{insert} - INTERVAL %s + seq * 0.001 SECOND, CONCAT('u', seq %% 2000), 's@example.org',"
                " CONCAT(10 + seq %% 3, '.0.0.1'), %s FROM seq_1_to_6000", (age_s, recipients),
            )
    if load == "hot":
        database.query(
            f"{insert} - INTERVAL seq * 17 * 1000 MICROSECOND, 'hot', 's@example.org', CONCAT(seq % 200, '.0.0.1'), 1"
            f" FROM seq_1_to_{HOT_EVENTS}"
        )


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


class Row(NamedTuple):
    """One measurement of one daemon."""

    per_s: float
    p50_ms: float
    p99_ms: float
    of_bare: float
    daemon_s: float  # of CPU, for 1000 requests
    database_s: float
    of_plain: float  # requests/s, of those of the daemon without early signs


def measure(arguments: argparse.Namespace, database: Database | None) -> int:
    """Print the table; return 1 if anything was lost, doubled or not answered."""
    settings = database.settings() if database else {}
    asking = ask_beside_a_hot_login if arguments.load == "hot" else ask_from_processes
    ours = ROOT / "policyd.py"
    kinds = [("policyd", ours, settings), ("with early signs", ours, {**settings, **EARLY_SIGNS})]
    if arguments.load == "hot":
        kinds = [(name, file, {**changed, "quota": "hot:1500:1500"}) for name, file, changed in kinds]
    if arguments.against:
        kinds.append((str(arguments.against), arguments.against, kinds[0][2]))
    bare = BareServer(("127.0.0.1", 0), BareHandler)
    answered: Counter[str] = Counter()
    errors = 0
    rows: dict[tuple[int, str], list[Row]] = {}
    with child(bare.serve_forever), contextlib.ExitStack() as stack:
        daemons = [stack.enter_context(running_daemon(*kind)) for kind in kinds]
        before = sums(database, [])
        for daemon in daemons:  # uncounted: the server is busy yet with the history it was given
            answered += asking(daemon.port, 16, arguments.seconds + 3, arguments.load, arguments.recipients).answered
        for connections in arguments.connections * arguments.rounds:
            how = (connections, arguments.seconds, arguments.load, arguments.recipients)
            bare_load = ask_from_processes(bare.server_address[1], *how)
            plain = 0
            for daemon in daemons:
                watched = [daemon.pid, *([database.server.pid] if database else [])]
                began = [cpu_s(process) for process in watched]
                load = asking(daemon.port, *how)
                used = [cpu_s(process) - earlier for process, earlier in zip(watched, began)]
                plain = plain or len(load.latencies)
                answered += load.answered
                errors += load.errors + bare_load.errors
                row = row_of(load, len(bare_load.latencies), plain, arguments.seconds, used)
                rows.setdefault((connections, daemon.name), []).append(row)
        stored = sums(database, daemons)
        if database:
            print_statements(database, daemons[1], asking, arguments)
    stored.subtract(before)
    print("| connections | daemon | requests/s | p50 ms | p99 ms | of the bare server | CPU s per 1000: policyd"
          " | database | of policyd |")
    print("|--:|:--|--:|--:|--:|--:|--:|--:|--:|")
    for (connections, name), measured in rows.items():
        row = Row(*map(statistics.median, zip(*measured)))
        print(f"| {connections} | {name} | {row.per_s:.0f} | {row.p50_ms:.2f} | {row.p99_ms:.2f} | {row.of_bare:.2f}"
              f" | {row.daemon_s:.3f} | {row.database_s:.3f} | {row.of_plain:.2f} |")
    wrong = [login for login in answered if stored[login] != answered[login]]
    print(f"recipients answered: {sum(answered.values())}, stored: {sum(stored.values())};"
          f" logins with another sum: {len(wrong)}; errors: {errors}")
    return 1 if wrong or errors else 0


def print_statements(database: Database, daemon: Daemon, asking: object, arguments: argparse.Namespace) -> None:
    """Say how often each kind of statement is sent, in one more second that the server logs."""
    log = database.server.directory / "general.log"
    database.server.query(f"SET GLOBAL general_log_file = '{log}'")
    database.server.query("SET GLOBAL general_log = 1")
    load = asking(daemon.port, 16, 1, arguments.load, arguments.recipients)  # type: ignore[operator]
    database.server.query("SET GLOBAL general_log = 0")
    text = log.read_text(errors="replace")
    counts = {name: len(re.findall(pattern, text)) for name, pattern in STATEMENTS.items()}
    requests = sum(load.answered.values()) * 2 // (1 + arguments.recipients)
    others = " of the others" * (arguments.load == "hot")
    print(f"with early signs, at 16 connections, about {requests} requests{others} were: "
          + ", ".join(f"{count} x {name}" for name, count in counts.items()))


def row_of(load: Load, bare: int, plain: int, seconds: float, used: list[float]) -> Row:
    """Sum up one measurement; `used` are CPU seconds, those of the warm-up included."""
    thousands = len(load.latencies) / seconds * (seconds + WARM_UP_S) / 1000
    percentiles = statistics.quantiles(load.latencies, n=100)
    return Row(
        per_s=len(load.latencies) / seconds, p50_ms=percentiles[49] * 1000, p99_ms=percentiles[98] * 1000,
        of_bare=len(load.latencies) / max(1, bare), daemon_s=used[0] / thousands,
        database_s=used[1] / thousands if len(used) > 1 else 0.0, of_plain=len(load.latencies) / plain,
    )  # fmt: skip


def main() -> int:
    """Read the command line, start what is needed, measure."""
    parser = argparse.ArgumentParser(description="Measure policyd beside a bare server.")
    parser.add_argument("--store", choices=("mariadb", "old-table", "embedded"), default="mariadb",
                        help="the table of schema.sql (default), go-policyd's table, or the SQLite file")
    parser.add_argument("--load", choices=tuple(LOGINS), default="even", help="who sends (default: even, see above)")
    parser.add_argument("--history", type=int, default=0, metavar="ROWS",
                        help=f"events of the last 24 h in the table beforehand, over {HISTORY_LOGINS} logins")
    parser.add_argument("--against", type=Path, metavar="FILE", help="another policyd.py to measure by turns")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="default: 1 16 64")
    parser.add_argument("--recipients", type=int, default=5, metavar="N", help="of a message, at most (default 5)")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="the medians of how many are shown (default 3)")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} processors, Python {sys.version.split()[0]}, store {arguments.store},"
          f" load {arguments.load}, {arguments.history} rows of history,"
          f" median of {arguments.rounds} x {arguments.seconds:g} s")
    if arguments.store == "embedded":
        return measure(arguments, None)
    server = MariaDB(buffer_pool="1G")
    try:
        server.install()
        database = server.new_database(SCHEMA if arguments.store == "mariadb" else OLD_SCHEMA)
        add_history(database, arguments.load, arguments.history)
        return measure(arguments, database)
    finally:
        server.remove()


if __name__ == "__main__":
    sys.exit(main())
