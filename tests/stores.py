"""The stores under test: each with a way past policyd to put rows in and to see what is there."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

import pytest
from servers import Database, MariaDB

from policyd import CODECS, DAY_S, Event, Log, Repository, RepositoryUnavailable, Settings, SQLiteRepository, Usage, fit

Row = tuple[str, str, str, Union[int, None]]

GENEROUS = Settings(defaultquota=10**6, hourquota=10**6)  # the quota is never reached, and no history is a long one


class Clock:
    """A clock that is set by hand: of the wall, and of time.monotonic()."""

    def __init__(self, now: float = 1_800_000_000.123) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def soon() -> float:
    """Return a deadline that a healthy server keeps, even on a machine that is busy with something else."""
    return time.monotonic() + 30


def event(login: str, recipients: int | None = 1, sender: str = "s@example.org", address: str = "192.0.2.1") -> Event:
    """Return an event of which mostly the login matters."""
    return Event(login, sender, address, recipients)


def incident(login: str, which: str) -> Event:
    """Return an incident, such as HOLD overquota."""
    return Event(login, "", which, None)


def usages(repository: Repository, events: Sequence[Event], settings: Settings = GENEROUS) -> list[Usage]:
    return repository.usages(events, settings, soon())


def sums(repository: Repository, events: Sequence[Event], settings: Settings = GENEROUS) -> list[int]:
    return [usage.recipients for usage in usages(repository, events, settings)]


def count(repository: Repository, *events: Event, settings: Settings = GENEROUS) -> list[int]:
    """Insert the events as one batch, as the Recorder does, and return their sums."""
    assert repository.insert(events, soon()) == set()
    return sums(repository, events, settings)


class Store:
    """A table; `repository` is policyd's way to it, and `settings` lead a daemon here.

    another() is a second repository, as another relay or another process has it; add() puts in rows of this age, each a
    millisecond older than the one before it.
    """

    ROWS = "SELECT sasl_username, sender, client_address, recipient_count FROM events ORDER BY ts, sasl_username"
    TIMES: str
    repository: Repository
    settings: dict[str, str]
    another: Callable[[], Repository]
    add: Callable[[Sequence[Row], float], None]
    _query: Callable[[str], list[Any]]
    width: int | None = None  # of a login

    def rows(self) -> list[Row]:
        return self._query(self.ROWS)

    def times(self) -> list[tuple[int, str, int | None]]:
        """Return time in ms since 1970, login and recipients of each row, oldest first."""
        return self._query(self.TIMES)

    def clear(self) -> None:
        self._query("DELETE FROM events")

    def forgive(self, login: str) -> int:
        """Begin a login's count anew and end its incidents, as policyd-admin does; return the number of rows."""
        statement = (
            "UPDATE {table} SET recipient_count = COALESCE(-recipient_count, 0), ts = ts"
            " WHERE {of_login} AND {since day} AND (recipient_count IS NULL OR recipient_count > 0)"
        )
        ((changed,),) = self.another().ask(statement, {"login": login, "day": DAY_S})
        return int(changed)

    def stored(self, event: Event) -> Row:
        """Return the row in which an event is kept."""
        return event


class MariaStore(Store):
    TIMES = (
        "SELECT CAST(ROUND(UNIX_TIMESTAMP(ts) * 1000) AS SIGNED), sasl_username, recipient_count"
        " FROM events ORDER BY ts, sasl_username"
    )

    def __init__(self, database: Database) -> None:
        self.database, self.settings, self._query = database, database.settings(), database.query
        self.repository = self.another()
        found = database.query(
            "SELECT character_maximum_length, character_set_name FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND table_name = 'events' AND character_set_name IS NOT NULL"
            " ORDER BY ordinal_position"
        )
        self._columns = [(width, CODECS[charset]) for width, charset in found]
        self.width = found[0][0]

    def another(self) -> Repository:
        return self.database.repository()

    def add(self, rows: Sequence[Row], age_s: float) -> None:
        values = ", ".join(["(NOW(3) - INTERVAL %s MICROSECOND, %s, %s, %s, %s)"] * len(rows))
        arguments = [value for n, row in enumerate(rows) for value in (int(age_s * 1e6) + n * 1000, *row)]
        self.database.query(f"INSERT INTO events VALUES {values}", tuple(arguments))

    def stored(self, event: Event) -> Row:
        login, sender, address = map(fit, event[:3], self._columns)
        return login, sender, address, event.recipient_count


class SQLiteStore(Store):
    TIMES = "SELECT ts, sasl_username, recipient_count FROM events ORDER BY ts, rowid"

    def __init__(self, path: Path) -> None:
        self._path, self.settings = path, {"statedir": str(path.parent)}
        self.repository = self.another()
        self.repository.init()

    def another(self) -> Repository:
        return SQLiteRepository(str(self._path))

    def _query(self, statement: str, *rows: tuple[Any, ...]) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self._path)) as connection, connection:
            if rows:
                return connection.executemany(statement, rows).fetchall()
            return connection.execute(statement).fetchall()

    def add(self, rows: Sequence[Row], age_s: float) -> None:
        newest = int((time.time() - age_s) * 1000)
        self._query("INSERT INTO events VALUES (?, ?, ?, ?, ?)", *((newest - n, *row) for n, row in enumerate(rows)))


# What the fixture `store` (conftest.py) is made of.
STORES = ("SQLite", "schema.sql", "go-policyd", "go-policyd with an index")
KINDS = [pytest.param(kind, marks=[] if kind == "SQLite" else pytest.mark.mariadb) for kind in STORES]


def on_stores(*kinds: str) -> pytest.MarkDecorator:
    """Run a test that asks for `store` with some kinds of it only."""
    return pytest.mark.parametrize("store", [KINDS[STORES.index(kind)] for kind in kinds], indirect=True)


on_each_table = on_stores(*STORES[:3])  # for what an index has nothing to do with


def total(store: Store, login: str | None = None) -> int:
    """Return the recipients that count, of a login or of all, however old."""
    return sum(max(row[3] or 0, 0) for row in store.rows() if login in (None, row[0]))


class BreakableRepository(SQLiteRepository):
    """An embedded store of which the methods named in `broken` fail: as if it were away, or with a fault of ours."""

    AWAY = frozenset(("insert", "usages", "check"))
    broken: frozenset[str] = frozenset()
    fault: type[Exception] = RepositoryUnavailable

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(str(path), clock)
        self.clock = clock

    def __getattribute__(self, name: str) -> Any:
        if name != "broken" and name in self.broken:
            raise self.fault(f"{name} is broken")
        return super().__getattribute__(name)

    def count(self) -> int:
        return len(list(self.first()))


class LoggedLine(NamedTuple):
    level: str
    text: str


class KeptLog(Log):
    """Keeps what policyd logs, in a test that has no daemon."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[LoggedLine] = []
        for level in ("info", "warning", "error"):
            setattr(self, level, lambda line, level=level: self.lines.append(LoggedLine(level, line)))

    def errors(self) -> list[str]:
        return [line.text for line in self.lines if line.level == "error"]


class Listener(socketserver.ThreadingTCPServer):
    """Listens on 127.0.0.1, and serves in threads of its own until it is closed."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.port: int = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class Door(Listener):
    """A way to a server that can be closed, with all who are in it, be slow, or go deaf: what is said then is lost."""

    def __init__(self, server: MariaDB, handler: type[DoorHandler] | None = None) -> None:
        self.target = server.host, server.port
        self.passing: list[socket.socket] = []
        self.is_deaf = False
        self.delay_s = 0.0  # of what the client says
        super().__init__(handler or DoorHandler)

    def server_close(self) -> None:
        super().server_close()
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
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                if source is self.request and self.server.delay_s:
                    time.sleep(self.server.delay_s)
                if not self.server.is_deaf:
                    target.sendall(received)
            target.shutdown(socket.SHUT_WR)
