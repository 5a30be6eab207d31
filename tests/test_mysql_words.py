"""What servers, administrators and firewalls do otherwise: passwords, idle connections, modes, rights, indexes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from daemons import errors
from servers import DUNNO, Database, Policyd, run_policyd
from stores import Door, DoorHandler, count, event, global_variable, maria_repository, soon

from policyd import Journal, RepositoryUnavailable

ANNA = event("anna")


@contextlib.contextmanager
def another_user(database: Database, password: str) -> Iterator[dict[str, str]]:
    """Make a user who may count, and no more; the block gets the settings to be it."""
    database.query("DROP USER IF EXISTS 'clerk'@'127.0.0.1'")
    database.query("CREATE USER 'clerk'@'127.0.0.1' IDENTIFIED BY %s", (password,))
    database.query("GRANT SELECT, INSERT, UPDATE ON events TO 'clerk'@'127.0.0.1'")
    yield {**database.settings(), "dbuser": "clerk", "dbpass": password}
    database.query("DROP USER 'clerk'@'127.0.0.1'")


def not_used(database: Database) -> str:
    """Return how this kind of server calls an index that is kept up and not used."""
    return "INVISIBLE" if database.server.is_mysql else "IGNORED"


@pytest.mark.parametrize("password", ["Zürich", "пароль€", "\N{MATHEMATICAL FRAKTUR CAPITAL U}nicode"])
def test_a_password_may_have_any_character(database: Database, password: str) -> None:
    with another_user(database, password) as settings:
        assert count(maria_repository(database, **settings), ANNA) == [1]


@pytest.mark.parametrize("quote", ["'", '"', ""])
def test_of_a_password_in_quotes_the_quotes_are_suspected(database: Database, quote: str) -> None:
    with pytest.raises(RepositoryUnavailable, match=r"\(1045, ") as refused:
        count(maria_repository(database, dbpass=f"{quote}wrong{quote}"), ANNA)
    hint = "(dbpass= stands in quotes, and they are taken for a part of it)"
    assert (hint in str(refused.value)) == bool(quote)


class FirewallHandler(DoorHandler):
    """May forget all who have come so far: nothing of theirs arrives, and nobody says so."""

    forgotten = 0  # how often it has

    def pump(self, source: Any, target: Any) -> None:
        came = type(self).forgotten
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                if came == type(self).forgotten:
                    target.sendall(received)


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_connection_dropped_in_silence_costs_no_event(database: Database, monkeypatch: Any, is_idle: bool) -> None:
    """After a minute a connection is not trusted any more; one that is dropped sooner costs a deadline."""
    firewall = Door(database.server.host, database.server.port)
    firewall.RequestHandlerClass = FirewallHandler
    repository = maria_repository(database, dbport=str(firewall.port))
    assert count(repository, ANNA) == [1]
    FirewallHandler.forgotten += 1
    if is_idle:
        monkeypatch.setattr("policyd.IDLE_CONNECTION_S", 0)
    else:
        with pytest.raises(RepositoryUnavailable, match="timed out"):
            repository.insert([event("anna", 100)], time.monotonic() + 1)
    assert count(repository, ANNA) == [2]
    firewall.shut()


@pytest.mark.parametrize(("variable", "value"), [
    ("autocommit", 0), ("init_connect", "SET autocommit=0"), ("sql_mode", "EMPTY_STRING_IS_NULL"),
    ("sql_mode", "ANSI_QUOTES,ONLY_FULL_GROUP_BY,NO_BACKSLASH_ESCAPES"),
])  # fmt: skip
def test_events_are_committed_whatever_sessions_are_given(database: Database, variable: str, value: object) -> None:
    if database.server.is_mysql and value == "EMPTY_STRING_IS_NULL":
        value = "PAD_CHAR_TO_FULL_LENGTH"  # MySQL has no such mode, and this one of its own
    null_sender = event("an'na\\", 3, sender="")
    with global_variable(database, variable, value):
        assert count(maria_repository(database), null_sender) == [3]
        assert count(maria_repository(database), null_sender) == [6]


def test_a_slice_too_large_for_the_server_is_halved_until_it_fits(database: Database, tmp_path: Path) -> None:
    """And the rest follows in slices of that size: larger ones are not tried each time."""
    journal = Journal(str(tmp_path / "journal.sqlite3"))
    journal.look()
    wide = "x" * 240
    journal.insert([event(f"{n}{wide}", sender=f"{wide}@x") for n in range(3000)])
    failures = 0
    with global_variable(database, "max_allowed_packet", 65536):
        repository = maria_repository(database)
        while not journal.is_empty():
            try:
                journal.replay(repository, soon())
            except RepositoryUnavailable:
                failures += 1
                assert failures < 10, "500 halved nine times is none"
    assert database.query("SELECT COUNT(*), SUM(recipient_count) FROM events") == [(3000, 3000)]


def test_check_names_what_is_missing_though_events_can_be_counted(database: Database, tmp_path: Path) -> None:
    """The GRANT without which nothing is ever purged, an index that is not used."""
    database.query(f"ALTER TABLE events ALTER INDEX login_ts {not_used(database)}")
    with another_user(database, "secret") as settings:
        file = tmp_path / "policyd.cfg"
        values = {**settings, "statedir": tmp_path, "bind": tmp_path / "socket"}
        file.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        done = run_policyd("--check", "-c", str(file))
        database.query("GRANT DELETE ON events TO 'clerk'@'127.0.0.1'")
        database.query("ALTER TABLE events DROP INDEX login_ts, ADD INDEX login_ts (sasl_username, ts)")
        assert maria_repository(database, **settings).problems(soon()) == []
    assert (done.returncode, "events can be counted" in done.stdout) == (1, True)
    index, grant = done.stderr.splitlines()
    assert "index login_ts is IGNORED (MariaDB) or INVISIBLE (MySQL)" in index
    assert "--init-db" not in done.stdout + index, "it would find the index, and change nothing"
    assert re.match(r"policyd: old events cannot be deleted: .*1142.*; try: GRANT DELETE ON ", grant)
    assert grant.endswith(f"`{database.name}`.`events` TO 'clerk'@...")


def test_the_daemon_counts_on_without_delete_and_index(database: Database, policyd: Callable[..., Policyd]) -> None:
    with another_user(database, "secret") as settings:
        daemon = policyd(**settings)
        for way in (f"ALTER INDEX login_ts {not_used(database)}", "DROP INDEX login_ts"):
            assert daemon.ask(sasl_username="anna") == DUNNO
            database.query(f"ALTER TABLE events {way}")
        assert daemon.ask(sasl_username="anna") == DUNNO
        daemon.wait_for_log("Updating db: anna/alice@example.org/192.0.2.1/1/3")
        assert errors(daemon) == []
        daemon.stop()
        daemon.start()
        line = daemon.wait_for_log("NO index on (sasl_username, ts)")
        assert (line.level, "run policyd --init-db" in line.text) == ("warning", True)
        daemon.stop()
