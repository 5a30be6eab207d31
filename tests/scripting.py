"""What the tests of the postmaster's scripts share: events to count, a way to run a script, and its refusals."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from servers import ROOT, Database, program

import policyd as daemon

SCRIPTS = ROOT / "scripts"
COMMON = SCRIPTS / "policyd-common.sh"
HOUR_S = 3600
DAY_S = 86_400
NOBODY = 65534

SHELLS = pytest.mark.parametrize("shell", ["dash", "bash"])

STRANGE_LOGIN = "\x1b]0;owned\x07\u009b31m\t\n\\é"
STRANGE_LOGIN_SHOWN = r"\x1b]0;owned\x07\xc2\x9b31m\x09\x0a\x5c\xc3\xa9"


class Entry(NamedTuple):
    """One row to count: how long ago, who, how many; and from where."""

    age_s: float
    login: str
    recipients: int | None
    sender: str | None = None  # None: one that no other row has
    client: str = "192.0.2.1"


class Row(NamedTuple):
    """One row as it is kept; `ts` in milliseconds, of UTC in the embedded store and of local time in MariaDB."""

    ts: int
    login: str
    sender: str
    client: str
    recipients: int | None


def fill_mariadb(database: Database, entries: list[Entry]) -> None:
    for number, entry in enumerate(entries):
        database.query(
            "INSERT INTO events (ts, sasl_username, sender, client_address, recipient_count)"
            " VALUES (CURRENT_TIMESTAMP(3) - INTERVAL %s SECOND, %s, %s, %s, %s)",
            (entry.age_s, entry.login, f"{number}@example.org" if entry.sender is None else entry.sender, entry.client,
             entry.recipients),
        )  # fmt: skip


def fill_store(directory: Path, entries: list[Entry]) -> Path:
    """Make the embedded store as policyd does."""
    store = directory / "events.sqlite3"
    connection = sqlite3.connect(store)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(daemon.SQLiteRepository.SCHEMA)
    connection.executemany(
        "INSERT INTO events (ts, sasl_username, sender, client_address, recipient_count) VALUES (?, ?, ?, ?, ?)",
        [
            (int((time.time() - entry.age_s) * 1000), entry.login,
             f"{number}@example.org" if entry.sender is None else entry.sender, entry.client, entry.recipients)
            for number, entry in enumerate(entries)
        ],
    )  # fmt: skip
    connection.commit()
    connection.close()
    return store


def settings_file(directory: Path, settings: dict[str, str], *lines: str) -> Path:
    """Write the settings and, below them, more lines; return the file's path."""
    path = directory / "policyd.cfg"
    text = "".join(f"{key}={value}\n" for key, value in settings.items()) + "".join(f"{line}\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


class Store:
    """One of the three kinds of store, filled and read past the scripts."""

    def __init__(self, directory: Path, database: Database | None) -> None:
        self.directory = directory
        self.database = database
        if database is None:
            fill_store(directory, [])

    def fill(self, *entries: Entry) -> None:
        if self.database:
            fill_mariadb(self.database, list(entries))
        else:
            fill_store(self.directory, list(entries))

    def settings(self, *lines: str) -> Path:
        settings = self.database.settings() if self.database else {"statedir": str(self.directory)}
        return settings_file(self.directory, settings, *lines)

    def rows(self) -> list[Row]:
        """Return all rows, the oldest first."""
        if self.database:
            found = self.database.query(
                "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', ts) DIV 1000, sasl_username, sender, client_address,"
                " recipient_count FROM events ORDER BY ts, sender"
            )
        else:
            connection = sqlite3.connect(self.directory / "events.sqlite3")
            found = connection.execute(
                "SELECT ts, sasl_username, sender, client_address, recipient_count FROM events ORDER BY ts, rowid"
            ).fetchall()
            connection.close()
        return [Row(*row) for row in found]

    def moment(self, ts: int) -> str:
        """Return the time of a row as the scripts show it."""
        shown = time.gmtime(ts // 1000) if self.database else time.localtime(ts // 1000)
        return time.strftime("%Y-%m-%d %H:%M:%S", shown)


STORES = pytest.mark.parametrize(
    "store",
    [
        pytest.param("database", marks=pytest.mark.mariadb),
        pytest.param("old_database", marks=pytest.mark.mariadb),
        "embedded",
    ],
    indirect=True,
)


def make_store(request: pytest.FixtureRequest, directory: Path) -> Store:
    """Return the store of a parametrized fixture `store`."""
    kind = str(request.param)
    return Store(directory, None if kind == "embedded" else request.getfixturevalue(kind))


def run(
    script: Path,
    *arguments: object,
    shell: str = "sh",
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    user: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script as this user, or as another one who is in no group."""
    return subprocess.run(
        [program(shell, shell), str(script), *map(str, arguments)],
        cwd=cwd, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, user=user, group=user, extra_groups=None if user is None else [],
    )  # fmt: skip


def printed(result: subprocess.CompletedProcess[str]) -> str:
    """Return what a script printed when it had nothing to complain of."""
    assert (result.returncode, result.stderr) == (0, ""), result
    long = [line for line in result.stdout.splitlines() if len(line) > 80]
    assert all("/" in line or line.startswith("not known: ") for line in long), result.stdout  # a path; another's words
    assert re.fullmatch(r"[ -~\n]*", result.stdout), result.stdout
    return result.stdout


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that says why a script did nothing."""
    assert result.returncode == 1, result
    assert result.stdout == "", result
    line = re.fullmatch(r"policyd-[a-z0-9]+\.sh: (.+)\n", result.stderr)
    assert line, result
    return line[1]


def directory_of_programs(directory: Path, *names: str) -> Path:
    """Make a directory for PATH in which there are only these."""
    directory.mkdir()
    for name in names:
        (directory / name).symlink_to(program(name, name))
    return directory


def copy_scripts(directory: Path, *names: str) -> Path:
    """Copy a script and what it sources, return the copy of the first one."""
    for name in (*names, COMMON.name):
        shutil.copy(SCRIPTS / name, directory)
    return directory / names[0]
