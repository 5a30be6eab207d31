"""Fixtures every test file uses; the servers behind them are in servers.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from scripting import Desk
from servers import OLD_SCHEMA, SCHEMA, Database, MariaDB, Postfix, Start, free_port, policyd_factory, small_disk
from stores import KINDS, KeptLog, MariaStore, SQLiteStore, Store


def pytest_configure() -> None:
    # No test depends on how fast it is, and an example empties what it finds in a fixture; CI tries the same each time,
    # and whoever runs the tests by hand something new.
    ours: Any = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture]}
    hypothesis.settings.register_profile("policyd", **ours, derandomize="CI" in os.environ)
    hypothesis.settings.register_profile("long", **ours, max_examples=100_000)  # --hypothesis-profile=long
    hypothesis.settings.load_profile("policyd")
    # A run that is told to end still ends its servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the servers it needs, so that `-m "not server"` needs none."""
    for item in items:
        for server, fixtures in (("mariadb", {"mariadb"}), ("postfix", {"postfix", "machine"})):  # both as root
            if fixtures & set(getattr(item, "fixturenames", ())):
                item.add_marker(server)
            if item.get_closest_marker(server):
                item.add_marker("server")


def _fail_what_is_skipped() -> Any:
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, and no test may be: {report.longrepr}"
    return report


# A skipped test is a failed one, what a test needs must be there; the same for a file that skips itself.
pytest_runtest_makereport = pytest.hookimpl(wrapper=True)(_fail_what_is_skipped)
pytest_make_collect_report = pytest.hookimpl(wrapper=True)(_fail_what_is_skipped)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> KeptLog:
    """What policyd.py logs in this process."""
    kept = KeptLog()
    monkeypatch.setattr("policyd.log", kept)
    return kept


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file of the embedded store."""
    path = tmp_path / "policyd.cfg"
    path.write_text(f"statedir={tmp_path}\nport={free_port()}\n")
    return path


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of 1 MB."""
    with small_disk(1) as path:
        yield path


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for a store that is away without a pause."""
    monkeypatch.setattr("policyd.RETRY_DELAYS_S", (0.001, 0.01))


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store; the test runs once with each kind, or with those that on_stores() names."""
    if request.param == "SQLite":
        return SQLiteStore(tmp_path / "events.sqlite3")
    database: Database = request.getfixturevalue("database" if request.param == "schema.sql" else "old_database")
    if request.param == "go-policyd with an index":
        database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    return MariaStore(database)


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    """policyd-admin with an empty store: an embedded one, or that of a test that asks for `store` too."""
    has_store = "store" in request.fixturenames
    store = request.getfixturevalue("store") if has_store else SQLiteStore(tmp_path / "events.sqlite3")
    return Desk(tmp_path / "policyd.cfg", store)


@pytest.fixture(scope="session")
def mariadb(request: pytest.FixtureRequest) -> Iterator[MariaDB]:
    with MariaDB() as server:
        server.install()
        request.config.get_terminal_writer().line(f"MariaDB {server.version}")
        yield server


@pytest.fixture(scope="session")
def postfix(request: pytest.FixtureRequest) -> Iterator[Postfix]:
    """A private Postfix that asks the policy server a test starts at its `policy_port`."""
    with Postfix() as server:
        server.start()
        request.config.get_terminal_writer().line(f"Postfix {server.version}")
        yield server


@pytest.fixture
def database(mariadb: MariaDB) -> Iterator[Database]:
    """A fresh database with the table of scripts/schema.sql."""
    new = mariadb.new_database(SCHEMA)
    yield new
    mariadb.drop_database(new.name)


@pytest.fixture
def old_database(mariadb: MariaDB) -> Iterator[Database]:
    """A fresh database with the table of an existing deployment."""
    old = mariadb.new_database(OLD_SCHEMA)
    yield old
    mariadb.drop_database(old.name)


@pytest.fixture
def policyd() -> Iterator[Start]:
    """A function that starts the daemon with the settings it is given."""
    with policyd_factory() as start:
        yield start
