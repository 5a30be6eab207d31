"""The stores under test: each with a way past policyd to put rows in and to see what is there."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

from servers import Database

from policyd import (
    CODECS,
    DAY_S,
    Event,
    Journal,
    Log,
    MariaDBRepository,
    Reach,
    Repository,
    Scope,
    Settings,
    SQLiteRepository,
    fit,
    open_repository,
)

EVERYTHING = 10**6  # rows to sum: more than any test has
WHOLE = Scope(Reach(EVERYTHING), {})
Row = tuple[str, str, str, Union[int, None]]


def soon() -> float:
    """Return a deadline that a healthy server keeps, even on a machine that is busy with something else."""
    return time.monotonic() + 30


def sums(repository: Repository, events: Sequence[Event], rows: int = EVERYTHING) -> list[int]:
    """Return the sums of events that have been inserted."""
    return [usage.recipients for usage in repository.sum_recipients(events, Scope(Reach(rows), {}), soon())]


def totals(journal: Journal, *logins: str) -> dict[str, int]:
    """Return what the journal holds of each login."""
    return {login: usage.recipients for login, usage in journal.totals(logins, WHOLE).items()}


def count(repository: Repository, *events: Event, rows: int = EVERYTHING) -> list[int]:
    """Insert the events as one batch, as the Recorder does, and return their sums."""
    assert repository.insert(events, soon()) == set()
    return sums(repository, events, rows)


def event(login: str, recipients: int = 1, sender: str = "s@example.org", address: str = "192.0.2.1") -> Event:
    """Return an event of which mostly the login matters."""
    return Event(login, sender, address, recipients)


def settings_for(database: Database, **changes: str) -> Settings:
    """Read settings that lead to the database from a file, as the daemon does."""
    lines = {**database.settings(), **changes}
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write("".join(f"{key}={value}\n" for key, value in lines.items()))
        file.flush()
        return Settings.from_file(file.name)


def maria_repository(database: Database, **changes: str) -> MariaDBRepository:
    """Return a repository on the database, as another daemon would have it."""
    repository = open_repository(settings_for(database, **changes))
    assert isinstance(repository, MariaDBRepository)
    return repository


class MariaStore:
    """A MariaDB table."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.repository: Repository = maria_repository(database)
        found = database.query(
            "SELECT character_maximum_length, character_set_name FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND character_set_name IS NOT NULL ORDER BY ordinal_position"
        )
        self._columns = [(width, CODECS[charset]) for width, charset in found]
        self.width = found[0][0]  # of a login

    def add(self, rows: Sequence[Row], age_s: float) -> None:
        """Put in rows of this age, each a millisecond older than the one before it."""
        values = ", ".join(["(NOW(3) - INTERVAL %s MICROSECOND, %s, %s, %s, %s)"] * len(rows))
        arguments = [value for n, row in enumerate(rows) for value in (int(age_s * 1e6) + n * 1000, *row)]
        self.database.query(f"INSERT INTO events VALUES {values}", tuple(arguments))

    def rows(self) -> list[Row]:
        """Return what is in the table, oldest first."""
        return self.database.query(
            "SELECT sasl_username, sender, client_address, recipient_count FROM events ORDER BY ts, sasl_username"
        )

    def clear(self) -> None:
        """Empty the table."""
        self.database.query("DELETE FROM events")

    def stored(self, event: Event) -> Row:
        """Return the row in which an event is kept."""
        login, sender, address = map(fit, event[:3], self._columns)
        return login, sender, address, event.recipient_count


class SQLiteStore:
    """An embedded store."""

    width = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.repository: Repository = SQLiteRepository(str(path))
        self.repository.init()

    def _query(self, statement: str, rows: Sequence[tuple[Any, ...]] = ((),)) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self._path)) as connection, connection:
            if len(rows) == 1:
                return connection.execute(statement, rows[0]).fetchall()
            return connection.executemany(statement, rows).fetchall()

    def add(self, rows: Sequence[Row], age_s: float) -> None:
        """Put in rows of this age, each a millisecond older than the one before it."""
        newest = int((time.time() - age_s) * 1000)
        self._query("INSERT INTO events VALUES (?, ?, ?, ?, ?)", [(newest - n, *row) for n, row in enumerate(rows)])

    def rows(self) -> list[Row]:
        """Return what is in the table, oldest first."""
        return self._query("SELECT sasl_username, sender, client_address, recipient_count FROM events ORDER BY ts")

    def clear(self) -> None:
        """Empty the table."""
        self._query("DELETE FROM events")

    def stored(self, event: Event) -> Row:
        """Return the row in which an event is kept: as it is."""
        return event


Store = Union[MariaStore, SQLiteStore]

A_DAY_LESS_A_MINUTE = DAY_S - 60
A_DAY_AND_A_MINUTE = DAY_S + 60


# --- what policyd logs, in a test that has no daemon ---


class LoggedLine(NamedTuple):
    """One line and its level."""

    level: str
    text: str


class KeptLog(Log):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[LoggedLine] = []

    def info(self, line: str) -> None:
        self.lines.append(LoggedLine("info", line))

    def warning(self, line: str) -> None:
        self.lines.append(LoggedLine("warning", line))

    def error(self, line: str) -> None:
        self.lines.append(LoggedLine("error", line))

    def errors(self) -> list[str]:
        """Return the lines of level error."""
        return [line.text for line in self.lines if line.level == "error"]


# --- getting in the way of MariaDB ---


@contextlib.contextmanager
def session(database: Database) -> Iterator[Any]:
    """Lend a cursor of a session of root's that stays open, for transactions and locks."""
    import pymysql

    connection = pymysql.connect(
        unix_socket=database.server.socket, user="root", database=database.name, charset="utf8mb4", ssl_disabled=True
    )
    with contextlib.closing(connection), connection.cursor() as cursor:
        yield cursor


@contextlib.contextmanager
def table_locked(database: Database) -> Iterator[None]:
    """Keep everybody else from the table."""
    with session(database) as cursor:
        cursor.execute("LOCK TABLES events WRITE")
        yield


@contextlib.contextmanager
def global_variable(database: Database, name: str, value: object) -> Iterator[None]:
    """Set a variable of the server; new sessions take it over."""
    before = database.query(f"SELECT @@GLOBAL.{name}")[0][0]
    database.query(f"SET GLOBAL {name} = %s", (value,))
    try:
        yield
    finally:
        database.server.ensure_running()
        database.query(f"SET GLOBAL {name} = %s", (before,))


def sessions(database: Database) -> list[tuple[int, str | None, int]]:
    """Return id, statement and milliseconds at work of policyd's connections to the database."""
    return database.query(
        "SELECT id, info, time_ms FROM information_schema.processlist WHERE db = %s AND user = %s",
        (database.name, database.server.user),
    )


class Door(socketserver.ThreadingTCPServer):
    """A way to a server that can be shut, with all who are in it, or go deaf: then all that is said is lost."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), DoorHandler)
        self.port: int = self.server_address[1]
        self.target = host, port
        self.passing: list[socket.socket] = []
        self.is_deaf = False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def shut(self) -> None:
        """Refuse new connections and end the others."""
        self.shutdown()
        self.server_close()
        for connection in self.passing:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class DoorHandler(socketserver.BaseRequestHandler):
    server: Door

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as target:
            self.server.passing += [self.request, target]
            back = threading.Thread(target=self.pump, args=(target, self.request), daemon=True)
            back.start()
            self.pump(self.request, target)
            back.join()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on all that comes, then the end."""
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                if not self.server.is_deaf:
                    target.sendall(received)
            target.shutdown(socket.SHUT_WR)
