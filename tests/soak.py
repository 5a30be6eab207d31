#!/usr/bin/env python3
"""Soak policyd: an even load for minutes, with a fault every 30 s, and at the end a look at every single message.

usage: .venv/bin/python tests/soak.py [--minutes 10] [--rate 200]

Starts a private MariaDB and the daemon.  A process of its own sends messages at an even rate, however fast they are
answered, and does as Postfix does: one request at a time on each connection, 10 s for its answer, and when a connection
fails, once more after a second.  What dies or hangs meanwhile, in turn, stands in FAULTS.

At the end every recipient that was answered must be in the table, at the time of its message, and no login that was
held may have been let through afterwards.  A message may be in the table twice only if a statement, or the daemon,
was interrupted between storing and knowing; nothing may be missing.  Exit status 1 if that is not so.

Run by hand; needs what scripts/test.sh installs, and unshare(1).  Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import select
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from bench import REQUEST  # noqa: E402 - it stands in scripts/
from conftest import SCHEMA  # noqa: E402
from servers import Database, MariaDB, Policyd, policyd_factory, wait_until  # noqa: E402
from stores import sessions, table_locked  # noqa: E402

CONNECTIONS = 20
LOGINS = 50
QUOTA = 500  # reached after a minute: most of the time somebody is held and somebody refused
FAULT_EVERY_S = 30
FAULT_LASTS_S = 5
FIRST_ANSWERS_S = 3.5  # after a fault, the time in which an answer may wait for what has died
ANSWER_TIMEOUT_S = 10  # the timeout of main.cf
TRIES = 2  # smtpd_policy_service_try_limit
TRY_AGAIN_S = 1  # smtpd_policy_service_retry_delay
CLOCK_S = 0.1  # by which the clocks of the load and of the store may differ
SEVERITY = {b"DUNNO": 0, b"HOLD quota exceeded": 1, b"REJECT max quota exceeded": 2}


# ---- the load, in a process of its own ------------------------------------------------------------


class Message(NamedTuple):
    """One message and what became of it; times in seconds since 1970."""

    sender: str
    recipients: int
    due: float
    tries: int
    answered: float | None
    softer: bool  # than what its login had been answered before it was sent

    @property
    def latency(self) -> float:
        """The seconds from when it was due."""
        return (self.answered or self.due + ANSWER_TIMEOUT_S) - self.due


class Smtpd:
    """One connection, and the message it waits for."""

    def __init__(self, port: int, poll: select.epoll) -> None:
        self._port = port
        self._poll = poll
        self.connection: socket.socket | None = None
        self.number = 0  # of the message, 0 for none
        self.due = self.sent = 0.0
        self.tries = 0
        self.before = 0  # the hardest answer that the login had when it was sent

    def send(self) -> None:
        """Send the message, on a new connection if there is none; raises OSError."""
        self.tries += 1
        self.sent = time.time()
        if not self.connection:
            self.connection = socket.create_connection(("127.0.0.1", self._port), 1)
            self._poll.register(self.connection, select.EPOLLIN)
        which = self.number % LOGINS
        request = REQUEST.format(
            login=f"u{which}", sender=self.number, address=1, octet=which, recipients=recipients(self.number),
            number=self.number, process=1,
        )
        self.connection.sendall(request.encode())

    def hang_up(self) -> None:
        """Close the connection, which takes it from the poll, too."""
        if self.connection:
            self.connection.close()
        self.connection = None


def recipients(number: int) -> int:
    """Return how many recipients a message has."""
    return 1 + number % 5


class Load:
    """Sends messages, and tells of those that are done."""

    def __init__(self, port: int, rate: float, seconds: float, results: Connection) -> None:
        self._interval = 1 / rate
        self._messages = int(rate * seconds)
        self._results = results
        self._poll = select.epoll()
        self._smtpds = [Smtpd(port, self._poll) for _ in range(CONNECTIONS)]
        self._free = deque(self._smtpds)
        self._failed: deque[Smtpd] = deque()
        self._hardest = [0] * LOGINS
        self._done: list[Message] = []

    def run(self) -> None:
        """Send all messages when they are due, or as soon as a connection is free."""
        begin = time.time()
        number = 0
        while number < self._messages or len(self._free) < CONNECTIONS:
            now = time.time()
            while self._failed and self._failed[0].sent + TRY_AGAIN_S <= now:
                self._send(self._failed.popleft())
            while self._free and number < self._messages and begin + number * self._interval <= now:
                smtpd = self._free.popleft()
                number += 1
                smtpd.number, smtpd.due, smtpd.tries = number, begin + (number - 1) * self._interval, 0
                self._send(smtpd)
            self._receive(max(0.001, begin + number * self._interval - time.time()))
            if len(self._done) >= 100 or number == self._messages:
                self._results.send(self._done)
                self._done = []
        self._results.send(None)

    def _send(self, smtpd: Smtpd) -> None:
        smtpd.before = self._hardest[smtpd.number % LOGINS]
        try:
            smtpd.send()
        except OSError:
            self._fail(smtpd)

    def _receive(self, timeout: float) -> None:
        ready = {descriptor for descriptor, _ in self._poll.poll(min(timeout, 0.1))}
        for smtpd in self._smtpds:
            if smtpd.connection and smtpd.connection.fileno() in ready:
                self._answer(smtpd)
            elif smtpd.connection and smtpd.number and time.time() - smtpd.sent > ANSWER_TIMEOUT_S:
                self._fail(smtpd)

    def _answer(self, smtpd: Smtpd) -> None:
        answer = b""
        with contextlib.suppress(OSError):
            answer = smtpd.connection.recv(4096) if smtpd.connection else b""
        severity = SEVERITY.get(answer[len(b"action=") : -2])
        if severity is None:
            return self._fail(smtpd)
        login = smtpd.number % LOGINS
        self._hardest[login] = max(self._hardest[login], severity)
        self._end(smtpd, time.time(), severity < smtpd.before)

    def _fail(self, smtpd: Smtpd) -> None:
        smtpd.hang_up()
        if not smtpd.number:
            return  # it was idle
        if smtpd.tries < TRIES:
            self._failed.append(smtpd)
        else:
            self._end(smtpd, None, False)

    def _end(self, smtpd: Smtpd, answered: float | None, softer: bool) -> None:
        sender = f"u{smtpd.number % LOGINS}+{smtpd.number}@example.org"
        self._done.append(Message(sender, recipients(smtpd.number), smtpd.due, smtpd.tries, answered, softer))
        smtpd.number = 0
        self._free.append(smtpd)


def send_load(port: int, rate: float, seconds: float, results: Connection) -> None:
    """Be the load."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    Load(port, rate, seconds, results).run()


# ---- the faults -----------------------------------------------------------------------------------


def mariadb_killed(database: Database, daemon: Policyd) -> None:
    database.server.kill()
    time.sleep(FAULT_LASTS_S)
    database.server.start()


def mariadb_frozen(database: Database, daemon: Policyd) -> None:
    database.server.freeze()
    time.sleep(FAULT_LASTS_S)
    database.server.thaw()


def locked(database: Database, daemon: Policyd) -> None:
    with table_locked(database):
        time.sleep(FAULT_LASTS_S)


def rights_revoked(database: Database, daemon: Policyd) -> None:
    """Rights on a database are looked at by new connections only: end the old ones."""
    rights = f"ON {database.name}.* {{}} '{database.server.user}'@'127.0.0.1'"
    database.query(f"REVOKE INSERT, UPDATE {rights.format('FROM')}")
    for number, _, _ in sessions(database):
        database.query(f"KILL {number}")
    time.sleep(FAULT_LASTS_S)
    database.query(f"GRANT INSERT, UPDATE {rights.format('TO')}")


def table_away(database: Database, daemon: Policyd) -> None:
    database.query("RENAME TABLE events TO away")
    time.sleep(FAULT_LASTS_S)
    database.query("RENAME TABLE away TO events")


def daemon_killed(database: Database, daemon: Policyd) -> None:
    daemon.kill()
    daemon.start()


def daemon_restarted(database: Database, daemon: Policyd) -> None:
    assert daemon.stop() == 0
    daemon.start()


FAULTS: dict[str, Callable[[Database, Policyd], None]] = {
    "MariaDB killed, and started again": mariadb_killed,
    "MariaDB frozen": mariadb_frozen,
    "table locked": locked,
    "rights revoked, and granted again": rights_revoked,
    "table renamed away and back": table_away,
    "policyd killed, and started again": daemon_killed,
    "policyd restarted": daemon_restarted,
}


# ---- what is seen ---------------------------------------------------------------------------------


def p99_ms(messages: Sequence[Message]) -> float:
    """Return the latency that 99 of 100 messages keep."""
    latencies = sorted(message.latency for message in messages) or [0.0]
    return latencies[int(len(latencies) * 0.99)] * 1000


def process_figures(daemon: Policyd) -> str:
    """Return memory and threads of the daemon."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines())
    return f"RSS {int(status['VmRSS'].split()[0]) / 1024:.0f} MB, {status['Threads']} threads"


def journaled(daemon: Policyd) -> int:
    """Return how many events wait in the journal."""
    with contextlib.closing(sqlite3.connect(daemon.statedir / "journal.sqlite3", timeout=10)) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM events").fetchone()[0])


class Soak:
    """The time with faults, and the account at its end."""

    def __init__(self, database: Database, daemon: Policyd) -> None:
        self._database = database
        self._daemon = daemon
        self._begin = time.time()
        self._faults: list[tuple[float, str]] = []
        self._messages: list[Message] = []  # only ever appended to, by the thread that reads the results

    def _say(self, text: str) -> None:
        print(f"{time.time() - self._begin:6.0f} s  {text}", flush=True)

    def _messages_since(self, begin: float) -> list[Message]:
        return [message for message in list(self._messages) if message.due >= begin]

    def run(self, rate: float, minutes: float) -> bool:
        """Return whether nothing was lost."""
        seconds = minutes * 60
        results, theirs = multiprocessing.Pipe(duplex=False)
        load = multiprocessing.Process(target=send_load, args=(self._daemon.port, rate, seconds, theirs), daemon=True)
        load.start()
        theirs.close()
        reader = threading.Thread(target=self._read, args=(results,), daemon=True)
        reader.start()
        minute = threading.Thread(target=self._say_every_minute, daemon=True)
        minute.start()
        at_begin = ""
        for number in range(1, int(seconds / FAULT_EVERY_S)):
            time.sleep(max(0.0, self._begin + number * FAULT_EVERY_S - time.time()))
            at_begin = at_begin or process_figures(self._daemon)
            self._tell_last_fault()
            name = list(FAULTS)[(number - 1) % len(FAULTS)]
            self._faults.append((time.time(), name))
            FAULTS[name](self._database, self._daemon)
        reader.join()
        load.join()
        self._tell_last_fault()
        wait_until(lambda: not journaled(self._daemon), "the journal is empty", 60)
        print(f"policyd before the first fault: {at_begin}; after the last connection: {process_figures(self._daemon)}")
        return self._account()

    def _read(self, results: Connection) -> None:
        while (messages := results.recv()) is not None:
            self._messages.extend(messages)

    def _say_every_minute(self) -> None:
        for minute in range(1, 1000):
            time.sleep(max(0.0, self._begin + minute * 60 - time.time()))
            last = self._messages_since(time.time() - 60)
            errors = sum(message.answered is None for message in last)
            with contextlib.suppress(OSError):  # the daemon is away just now
                self._say(f"{len(last) - errors} answers in the last minute, {errors} errors,"
                          f" p99 {p99_ms(last):.1f} ms, {process_figures(self._daemon)},"
                          f" {journaled(self._daemon)} events in the journal")

    def _tell_last_fault(self) -> None:
        if self._faults:
            begin, name = self._faults[-1]
            messages = self._messages_since(begin)
            first = [message.latency for message in messages if message.due < begin + FIRST_ANSWERS_S]
            later = [message.latency for message in messages if message.due >= begin + FIRST_ANSWERS_S]
            ends = [line.text for line in self._daemon.log_lines() if "UPDATING db: over" in line.text]
            self._say(f"{name} at {begin - self._begin:.0f} s: {len(messages)} messages since, slowest answer"
                      f" {max(first, default=0):.2f} s, after {FIRST_ANSWERS_S} s {max(later, default=0):.3f} s;"
                      f" {len(ends)} outages so far{f', the last: {ends[-1]}' if ends else ''}")

    def _account(self) -> bool:
        messages = self._messages
        answered = [message for message in messages if message.answered]
        calm = [message for message in messages if not any(
            message.due < begin + FIRST_ANSWERS_S and begin < message.due + message.latency
            for begin, _ in self._faults)]
        stored = {
            sender: (int(total), first, last)
            for sender, total, first, last in self._database.query(
                "SELECT sender, SUM(recipient_count), MIN(UNIX_TIMESTAMP(ts)), MAX(UNIX_TIMESTAMP(ts))"
                " FROM events GROUP BY sender"
            )
        }
        lost = [message for message in answered if stored.get(message.sender, (0,))[0] < message.recipients]
        doubled = [message for message in messages if stored.get(message.sender, (0,))[0] > message.recipients]
        odd = [message for message in set(answered) - set(lost) - set(doubled) if not at_its_time(
            message, *stored[message.sender][1:])]
        softer = sum(message.softer for message in messages)
        repeated = sum(message.tries > 1 for message in messages)
        errors = len(messages) - len(answered)
        print(f"requests: {len(messages)}, answered: {len(answered)}, errors: {errors},"
              f" sent twice because policyd was away: {repeated}")
        print(f"recipients answered: {sum(message.recipients for message in answered)},"
              f" stored: {sum(total for total, _, _ in stored.values())};"
              f" messages lost: {len(lost)}, stored twice: {len(doubled)}"
              f" ({sum(message.tries > 1 for message in doubled)} of them sent twice, else a statement interrupted),"
              f" at another time than theirs: {len(odd)}, softer than before: {softer}")
        print(f"p99 {p99_ms(messages):.1f} ms; outside of the first {FIRST_ANSWERS_S} s of each fault"
              f" {p99_ms(calm):.1f} ms, slowest {max((message.latency for message in calm), default=0) * 1000:.0f} ms")
        return not (lost or odd or softer or errors)


def at_its_time(message: Message, first: float, last: float) -> bool:
    """Tell whether a message was stored with the time between its request and its answer."""
    return message.due - CLOCK_S <= first and last <= (message.answered or 0) + CLOCK_S


@contextlib.contextmanager
def running_mariadb() -> Iterator[MariaDB]:
    """Start a private MariaDB."""
    server = MariaDB()
    try:
        server.install()
        yield server
    finally:
        server.remove()


def main() -> int:
    """Read the command line, start the servers, run."""
    parser = argparse.ArgumentParser(description="An even load for minutes with a fault every 30 s.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=200, help="messages per second (default 200)")
    arguments = parser.parse_args()
    with running_mariadb() as server, policyd_factory() as start:
        database = server.new_database(SCHEMA)
        daemon = start(defaultquota=QUOTA, **database.settings())
        print(f"MariaDB {server.version}; {arguments.minutes:g} minutes, {arguments.rate:g} messages/s,"
              f" {CONNECTIONS} connections, {LOGINS} logins, a fault every {FAULT_EVERY_S} s", flush=True)
        return 0 if Soak(database, daemon).run(arguments.rate, arguments.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
