"""policyd-admin forgive, block and unblock: shown first, done when told, and taken back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest
from scripting import (
    ADMIN,
    DAY_S,
    HOSTILE,
    HOUR_S,
    Entry,
    commands_in,
    facts,
    fill,
    incident,
    objects,
    paste,
    printed,
    refusal,
    run,
    settings_file,
)
from servers import DUNNO, HOLD, Database, MariaDB, Policyd
from stores import SQLiteStore, Store, on_each_table, on_stores, soon

import policyd

BORIS = [
    Entry(5 * HOUR_S, "boris", 700), Entry(4 * HOUR_S, "boris", 900, "", "203.0.113.10"), Entry(1800, "boris", 400),
    incident(4 * HOUR_S, "boris", "HOLD overquota"), incident(3 * HOUR_S, "boris", "REJECT overquota"),
    Entry(24 * HOUR_S + 600, "boris", 5000), incident(25 * HOUR_S, "boris", "HOLD places"),
]  # fmt: skip
OTHERS = [Entry(60, "anna", 3), incident(60, "anna", "HOLD places"), Entry(60, "boriss", 4), Entry(60, "bori", 5)]


def numbers(store: Store, login: str) -> list[int | None]:
    """Return recipient_count of a login's messages and incidents, the oldest first."""
    return [row[3] for row in store.rows() if row[0] == login and not row[2].startswith("forgiven")]


def recipients(file: Path, login: str) -> int:
    """Return the sum, as policyd-admin has it."""
    return int(objects(run("user", "--json", "-c", file, "--", login))[0]["recipients"])


@on_each_table
def test_forgiving_says_what_it_would_do_does_it_when_told_and_takes_it_back(store: Store, tmp_path: Path) -> None:
    fill(store, *BORIS, *OTHERS)
    before, times = store.rows(), store.times()
    file = settings_file(tmp_path, store.settings)
    would = printed(run("forgive", "Boris@x", "-c", file))
    assert would == (
        "boris: 2000 recipients of the last 24 hours are forgiven\nboris: HOLD overquota ends\n"
        "boris: REJECT overquota ends\n"
        f"\nNothing was changed.  To do it:\n  policyd-admin forgive -c {file} --yes Boris@x\n"
    )
    assert store.rows() == before
    did = printed(run("forgive", "--yes", "Boris@x", "-c", file))
    assert "\nDone: boris has 0 recipients now.\nok: messages go on\n" in did
    assert numbers(store, "boris") == [None, 5000, -700, -900, 0, 0, -400]
    marks = [row for row in store.rows() if row[2] == "forgiven"]
    assert marks == [("boris", "", "forgiven", 0)]
    assert [time for time in store.times() if time[1:] != ("boris", 0)] != times
    assert {(ts, login) for ts, login, _ in store.times()} > {(ts, login) for ts, login, _ in times}, "no row has moved"
    assert [row for row in store.rows() if row[0] != "boris"] == [row for row in before if row[0] != "boris"]
    back = printed(run("forgive", "boris", "--undo", "-c", file, "--yes"))
    assert "\nDone: boris has 2000 recipients now.\nHOLD: overquota (2000>1500)\n" in back
    assert [row for row in store.rows() if row[2] != "forgiven-no-more"] == before
    assert {(ts, login) for ts, login, _ in store.times()} > {(ts, login) for ts, login, _ in times}
    line = refusal(run("forgive", "boris", "--undo", "--yes", "-c", file))
    assert line == "boris was not forgiven in the last 24 hours: there is nothing to take back"


@on_each_table
def test_two_forgives_are_taken_back_one_by_one_and_what_came_between_is_right(store: Store, tmp_path: Path) -> None:
    file = settings_file(tmp_path, store.settings)
    fill(store, Entry(7200, "boris", 100), incident(7200, "boris", "HOLD places"))

    def forgive(*options: str) -> list[int | None]:
        printed(run("forgive", "boris", "--yes", *options, "-c", file))
        return numbers(store, "boris")

    assert forgive() == [-100, 0]
    fill(store, Entry(0, "boris", 10), incident(0, "boris", "HOLD newplace"))
    assert forgive() == [-100, 0, -10, 0]
    fill(store, Entry(0, "boris", 7))
    assert forgive("--undo") == [-100, 0, 10, None, 7], "only the last one"
    assert forgive() == [-100, 0, -10, 0, -7], "an undo is taken back by a forgive"
    assert forgive("--undo") == [-100, 0, 10, None, 7]
    assert forgive("--undo") == [100, None, 10, None, 7]
    assert recipients(file, "boris") == 117


@on_each_table
def test_a_forgive_that_was_cut_short_is_done_again(store: Store, tmp_path: Path) -> None:
    """Before its mark: what is missing then is only the mark."""
    fill(store, Entry(60, "boris", -100), Entry(59, "boris", 100), incident(50, "boris", "HOLD overquota"))
    file = settings_file(tmp_path, store.settings)
    printed(run("forgive", "boris", "--yes", "-c", file))
    assert numbers(store, "boris") == [-100, -100, 0]
    printed(run("forgive", "boris", "--undo", "--yes", "-c", file))
    assert numbers(store, "boris") == [100, 100, None]


def test_a_forgive_of_more_than_a_day_ago_is_not_taken_back(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    fill(
        store,
        Entry(25 * HOUR_S, "boris", -9),
        Entry(25 * HOUR_S - 9, "boris", 0, "", "forgiven"),
        Entry(60, "boris", 3),
    )
    assert "nothing to take back" in refusal(
        run("forgive", "boris", "--undo", "-c", settings_file(tmp_path, store.settings))
    )


def test_with_nothing_to_forgive_nothing_is_written(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    fill(store, Entry(2 * DAY_S, "anna", 9))
    printed(run("forgive", "anna", "--yes", "-c", settings_file(tmp_path, store.settings)))
    assert len(store.rows()) == 1


@on_stores("go-policyd", "schema.sql")
def test_only_the_login_itself_is_forgiven_whatever_the_old_collation_thinks(store: Store, tmp_path: Path) -> None:
    fill(
        store,
        *(Entry(60, login, 5) for login in ("rene", "rené", "RENE", "rene2")),
        Entry(60, "newsletter"[: store.width], 5),
    )
    file = settings_file(tmp_path, store.settings)
    printed(run("forgive", "rené", "--yes", "-c", file))
    cut = printed(run("forgive", "newsletter", "--yes", "-c", file))
    assert cut.startswith("The table keeps 8 characters: all logins that begin with newslett are meant\n") == (
        store.width == 8
    )
    left = {row[0]: row[3] for row in store.rows() if row[2] != "forgiven"}
    assert left == {"rene": 5, "rené": -5, "RENE": 5, "rene2": 5, "newsletter"[: store.width]: -5}


def test_a_running_daemon_lets_a_forgiven_login_send_again(policyd: Callable[..., Policyd]) -> None:
    running = policyd(defaultquota=5)
    assert running.ask(sasl_username="anna", recipient_count=7) == HOLD
    printed(run("forgive", "anna", "--yes", "-c", running.settings_file))
    assert running.ask(sasl_username="anna", recipient_count=4) == DUNNO
    assert running.ask(sasl_username="anna", recipient_count=1) == HOLD, "a second wave"
    known = facts(printed(run("user", "anna", "-c", running.settings_file)))
    assert known["sum now"].startswith("5 recipients, 3 messages")
    assert known["forgiven"] == "7 recipients besides"


@on_each_table
def test_a_block_holds_at_once_everywhere_until_it_is_lifted(
    store: Store, tmp_path: Path, policyd: Callable[..., Policyd]
) -> None:
    """Also a login that was never seen, also in mode=audit; and no undo revives it."""
    running = policyd(**{"mode": "audit", **store.settings})
    file = running.settings_file
    assert running.ask(sasl_username="boris") == DUNNO
    would = printed(run("block", "Boris", "-c", file))
    assert would.startswith("boris: all mail is held from now on for 24 hours, on all relays\n")
    assert running.ask(sasl_username="boris") == DUNNO
    did = printed(run("block", "boris", "--yes", "-c", file))
    assert "\nHOLD: blocked (since " in did
    assert [command.split()[1] for command in commands_in(did) if "admin" in command] == ["delete", "trace", "unblock"]
    assert running.ask(sasl_username="boris") == "HOLD blocked"
    printed(run("block", "boris", "--yes", "-c", file))
    assert sum(row[2] == "HOLD blocked" for row in store.rows()) == 1
    printed(run("block", "newone", "--yes", "-c", file))
    assert running.ask(sasl_username="newone") == "HOLD blocked"
    assert facts(printed(run("user", "newone", "-c", file)))["state"].startswith("HOLD: blocked (since ")
    assert "\nboris: the block ends\n" in "\n" + printed(run("unblock", "boris", "-c", file))
    printed(run("unblock", "boris", "--yes", "-c", file))
    assert running.ask(sasl_username="boris") == DUNNO
    assert refusal(run("unblock", "boris", "--yes", "-c", file)) == "boris is not blocked"
    printed(run("forgive", "newone", "--yes", "-c", file))
    assert running.ask(sasl_username="newone") == DUNNO
    printed(run("forgive", "newone", "--yes", "--undo", "-c", file))
    assert running.ask(sasl_username="newone") == DUNNO


@on_stores("SQLite")
def test_a_block_says_what_beats_it_and_how_to_make_it_last(
    store: Store, tmp_path: Path, policyd: Callable[..., Policyd]
) -> None:
    running = policyd(whitelist=["carla", "boris"], whitelist_days="1-7", whitelist_hours="0-24", **store.settings)
    line = running.settings_file.read_text().splitlines().index("whitelist=boris") + 1
    text = printed(run("block", "boris", "--yes", "-c", running.settings_file))
    assert f"boris: BUT line {line} of the settings whitelists it" in text
    assert "\nok: whitelisted now" in text
    (lasting,) = (command for command in commands_in(text) if command.startswith("printf"))
    assert paste(lasting, tmp_path).returncode == 0
    settings = policyd_settings(running.settings_file)
    assert settings.blacklist.line_of(["boris"], "")
    assert not settings.blacklist.line_of(["carla"], "192.0.2.1")


def policyd_settings(file: Path) -> policyd.Settings:
    """Return what is in a settings file."""
    return policyd.Settings.from_file(str(file))


@pytest.mark.parametrize("login", HOSTILE, ids=lambda login: ascii(login[:20]))
def test_what_a_block_offers_to_paste_means_the_login_and_nothing_else(tmp_path: Path, login: str) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    file = settings_file(tmp_path, {**store.settings, "strip_domain": "no"})
    text = printed(run("block", "--yes", "-c", file, "--", login))
    counted = policyd.login_of(login, False)
    assert [row[0] for row in store.rows()] == [counted]
    (unblock,) = (command for command in commands_in(text) if command.startswith("policyd-admin unblock"))
    done = paste(unblock.replace("unblock", "unblock --yes", 1), tmp_path)
    assert (done.returncode, done.stderr, store.rows()[0][3]) == (0, "", 0), done
    lasting = [command for command in commands_in(text) if command.startswith("printf")]
    before = file.read_text()
    for command in lasting:
        assert paste(command, tmp_path).returncode == 0
        assert file.read_text() == f"{before}\nblacklist={counted}\n"
        assert policyd_settings(file).blacklist.line_of([counted], "")
    assert not (tmp_path / "touched").exists()


@on_stores("go-policyd")
def test_a_block_of_a_login_that_is_cut_says_so_before(store: Store, tmp_path: Path) -> None:
    text = printed(run("block", "newsletter", "-c", settings_file(tmp_path, store.settings)))
    assert text.startswith("The table keeps 8 characters: all logins that begin with newslett are meant\n")


@pytest.mark.parametrize(("typed", "left"), [("y\n", 0), ("yes\n", 0), ("n\n", 5), ("\n", 5), ("\x04", 5)])
def test_on_a_terminal_it_asks(tmp_path: Path, typed: str, left: int) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    fill(store, Entry(60, "anna", 5))
    file = settings_file(tmp_path, store.settings)
    terminal, side = os.openpty()
    os.write(terminal, typed.encode())
    command = [sys.executable, str(ADMIN), "forgive", "anna", "-c", str(file)]
    done = subprocess.run(command, stdin=side, capture_output=True, text=True, timeout=60)
    os.close(side)
    os.close(terminal)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Do it? [y/N]" in done.stdout
    assert recipients(file, "anna") == left
    assert ("Nothing was changed" in done.stdout) == (left == 5)


def test_without_the_right_to_update_nothing_is_changed(database: Database, mariadb: MariaDB, tmp_path: Path) -> None:
    mariadb.query("CREATE USER 'reader'@'127.0.0.1' IDENTIFIED BY 'x'")
    mariadb.query(f"GRANT SELECT ON {database.name}.* TO 'reader'@'127.0.0.1'")
    database.query("INSERT INTO events (sasl_username, recipient_count) VALUES ('anna', 5)")
    file = settings_file(tmp_path, {**database.settings(), "dbuser": "reader", "dbpass": "x"})
    assert "denied" in refusal_behind_the_plan(run("forgive", "anna", "--yes", "-c", file))
    assert "denied" in refusal_behind_the_plan(run("block", "anna", "--yes", "-c", file))
    assert database.query("SELECT recipient_count FROM events") == [(5,)]
    mariadb.query("DROP USER 'reader'@'127.0.0.1'")


def refusal_behind_the_plan(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line on stderr."""
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_store_that_policyd_is_writing_to_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    fill(store, Entry(60, "anna", 5))
    file = settings_file(tmp_path, store.settings)
    import sqlite3

    connection = sqlite3.connect(tmp_path / "events.sqlite3", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    assert "database is locked" in refusal_behind_the_plan(run("forgive", "anna", "--yes", "-c", file))
    command = [sys.executable, str(ADMIN), "forgive", "anna", "--yes", "-c", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(1)
    connection.execute("ROLLBACK")
    connection.close()
    assert "Done: anna has 0 recipients" in process.communicate(timeout=60)[0]


def test_the_write_goes_to_one_server_once(database: Database, mariadb: MariaDB, tmp_path: Path) -> None:
    """The first server that answers is the one that is changed."""
    database.query("INSERT INTO events (sasl_username, recipient_count) VALUES ('anna', 5)")
    servers = f"/nonexistent/mysqld.sock,127.0.0.1:{mariadb.port},localhost:{mariadb.port}"
    file = settings_file(tmp_path, {**database.settings(), "dbhost": servers})
    printed(run("forgive", "anna", "--yes", "-c", file))
    assert database.query("SELECT recipient_count FROM events ORDER BY ts") == [(-5,), (0,)]


def test_a_daemon_counts_on_while_a_long_history_is_forgiven(database: Database, tmp_path: Path) -> None:
    old = "SELECT NOW(3) - INTERVAL 50000 * seq MICROSECOND, 'boris', '', '', 1 FROM seq_1_to_100000"
    database.query(f"INSERT INTO events {old}")
    file = settings_file(tmp_path, database.settings())
    repository = policyd.open_repository(policyd_settings(file))
    repository.resolve()
    command = [sys.executable, str(ADMIN), "forgive", "boris", "--yes", "-c", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    counted = 0
    while process.poll() is None:
        assert repository.insert([policyd.Event("boris", "", "192.0.2.1", 1)], soon()) == set()
        counted += 1
    process.communicate()
    (found,) = objects(run("top", "--json", "-c", file))
    assert found["recipients"] + found["forgiven"] == 100_000 + counted
    assert found["forgiven"] >= 100_000
