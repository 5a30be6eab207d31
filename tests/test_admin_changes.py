"""policyd-admin forgive, block and unblock: shown first, done when told, and taken back."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from scripting import ADMIN, DAY_S, HOSTILE, HOUR_S, Desk, Entry, commands_in, incident, pasted, run_process
from servers import DUNNO, HOLD, Database, Start, wait_until
from stores import Store, on_each_table, on_stores, soon

import policyd as module

BORIS = [
    Entry(5 * HOUR_S, "boris", 700), Entry(4 * HOUR_S + 1, "boris", 900, "", "203.0.113.10"),
    Entry(1800, "boris", 400), incident(4 * HOUR_S, "boris", "HOLD overquota"),
    incident(3 * HOUR_S, "boris", "REJECT overquota"),
    Entry(24 * HOUR_S + 600, "boris", 5000), incident(25 * HOUR_S, "boris", "HOLD places"),
]  # fmt: skip
OTHERS = [
    Entry(60, "anna", 3), incident(59, "anna", "HOLD places"), Entry(60, "boriss", 4), Entry(60, "bori", 5),
    Entry(25 * HOUR_S, "older", -9), Entry(25 * HOUR_S - 9, "older", 0, "", "forgiven"), Entry(2 * DAY_S, "older", 9),
]  # fmt: skip


def numbers(store: Store, login: str) -> list[int | None]:
    """Return recipient_count of a login's messages and incidents, the oldest first."""
    return [row[3] for row in store.rows() if row[0] == login and not row[2].startswith("forgiven")]


def moments(store: Store) -> set[tuple[int, str]]:
    return {(ts, login) for ts, login, _ in store.times()}


@on_each_table
def test_forgiving_says_what_it_would_do_does_it_when_told_and_takes_it_back(store: Store, desk: Desk) -> None:
    desk.fill(*BORIS, *OTHERS)
    before, times = store.rows(), moments(store)
    assert desk("forgive", "Boris@x") == (
        "boris: 2000 recipients of the last 24 hours are forgiven\nboris: HOLD overquota ends\n"
        "boris: REJECT overquota ends\n"
        f"\nNothing was changed.  To do it:\n  policyd-admin forgive --yes -c {desk.file} Boris@x\n"
    )
    assert store.rows() == before
    did = desk("forgive", "--yes", "Boris@x")
    assert "\nDone: boris has 0 recipients now.\nok: messages go on\n" in did
    assert numbers(store, "boris") == [None, 5000, -700, -900, 0, 0, -400]
    assert [row for row in store.rows() if row[2] == "forgiven" and row[0] != "older"] == [("boris", "", "forgiven", 0)]
    assert moments(store) > times, "no row has moved"
    assert [row for row in store.rows() if row[0] != "boris"] == [row for row in before if row[0] != "boris"]
    back = desk("forgive", "boris", "--undo", "--yes")
    assert "\nDone: boris has 2000 recipients now.\nHOLD: overquota (2000>1500)\n" in back
    assert [row for row in store.rows() if row[2] != "forgiven-no-more"] == before
    assert moments(store) > times
    nothing = "{} was not forgiven in the last 24 hours: there is nothing to take back"
    for login in ("boris", "older"):
        assert desk.refusal("forgive", login, "--undo", "--yes") == nothing.format(login)
    rows = store.rows()
    desk("forgive", "older", "--yes")
    assert store.rows() == rows, "of more than a day ago nothing is forgiven, not even with a mark"


@on_stores("SQLite", "go-policyd")
def test_two_forgives_are_taken_back_one_by_one_and_what_came_between_is_right(store: Store, desk: Desk) -> None:
    """A forgive that was cut short before its mark, which comes last, is done again."""
    desk.fill(Entry(7203, "boris", -8), Entry(7202, "boris", 100), incident(7201, "boris", "HOLD places"))

    def forgive(*options: str) -> list[int | None]:
        desk("forgive", "boris", "--yes", *options)
        return numbers(store, "boris")

    assert forgive() == [-8, -100, 0]
    time.sleep(0.01)  # its mark shall be older than what comes now
    store.add([("boris", "", "HOLD newplace", None), ("boris", "", "", 10)], 0)  # the first is the newer one
    assert forgive() == [-8, -100, 0, -10, 0]
    store.add([("boris", "", "", 7)], 0)
    assert forgive("--undo") == [-8, -100, 0, 10, None, 7], "only the last one"
    assert forgive() == [-8, -100, 0, -10, 0, -7], "an undo is taken back by a forgive"
    assert forgive("--undo") == [-8, -100, 0, 10, None, 7]
    assert forgive("--undo") == [8, 100, None, 10, None, 7]


@on_stores("go-policyd", "schema.sql")
def test_only_the_login_itself_is_forgiven_whatever_the_old_collation_thinks(store: Store, desk: Desk) -> None:
    newsletter = "newsletter"[: store.width]
    desk.fill(*(Entry(60, login, 5) for login in ("rene", "rené", "RENE", "rene2", newsletter)))
    desk("forgive", "rené", "--yes")
    desk("forgive", "newsletter", "--yes")
    left = {row[0]: row[3] for row in store.rows() if row[2] != "forgiven"}
    assert left == {"rene": 5, "rené": -5, "RENE": 5, "rene2": 5, newsletter: -5}


def test_a_running_daemon_lets_a_forgiven_login_send_again(policyd: Start) -> None:
    running = policyd(defaultquota=5)
    desk = Desk(running.settings_file)
    assert running.ask(sasl_username="anna", recipient_count=7) == HOLD
    wait_until(lambda: desk.objects("top")[0]["incidents"], "the incident is recorded")  # soon after the answer
    (row,) = desk.objects("top")
    assert (row["recipients"], row["why"], list(row["incidents"])) == (7, "overquota (7>5)", ["HOLD overquota"])
    desk("forgive", "anna", "--yes")
    assert running.ask(sasl_username="anna", recipient_count=4) == DUNNO
    assert running.ask(sasl_username="anna", recipient_count=1) == HOLD, "a second wave"
    known = desk.report("anna")
    assert (known["recipients"], known["messages"], known["forgiven"]) == ("5", "3", "7")


@on_each_table
def test_a_block_holds_at_once_everywhere_until_it_is_lifted(store: Store, policyd: Start) -> None:
    """Also a login that was never seen, also in mode=audit; and no undo revives it."""
    running = policyd(**{"mode": "audit", **store.settings})
    desk = Desk(running.settings_file)
    assert desk("block", "Boris").startswith("boris: all mail is held from now on for 24 hours, on all relays\n")
    assert running.ask(sasl_username="boris") == DUNNO
    did = desk("block", "boris", "--yes")
    assert "\nHOLD: blocked (since " in did
    assert [command.split()[1] for command in commands_in(did)] == ["delete", "trace", "unblock"]
    assert running.ask(sasl_username="boris") == "HOLD blocked"
    desk("block", "boris", "--yes")
    assert [row[3] for row in store.rows() if row[2] == "HOLD blocked"] == [0, None], "24 hours from now on"
    store.add([("newone", "", "HOLD places", None)], 60)  # a sweep is no human
    desk("block", "newone", "--yes")
    assert running.ask(sasl_username="newone") == "HOLD blocked"
    assert desk.report("newone")["why"].startswith("blocked (since ")
    assert desk("unblock", "boris").startswith("boris: the block ends\n")
    desk("unblock", "boris", "--yes")
    assert running.ask(sasl_username="boris") == DUNNO
    assert desk.refusal("unblock", "boris", "--yes") == "boris is not blocked"
    desk("forgive", "newone", "--yes")
    assert running.ask(sasl_username="newone") == DUNNO
    desk("forgive", "newone", "--yes", "--undo")
    assert running.ask(sasl_username="newone") == DUNNO


def test_a_block_says_what_beats_it_and_that_a_domain_is_no_login(desk: Desk) -> None:
    desk.write("whitelist=carla@example.org", "whitelist=boris", "whitelist_days=1-7", "whitelist_hours=0-24")
    text = desk("block", "boris", "--yes")
    assert "boris: BUT line 3 of the settings whitelists it" in text
    assert "\nok: whitelisted now" in text
    assert "carla: BUT line 2 of the settings whitelists it" in desk("block", "carla"), "when she logs in as that"
    desk.write("blacklist=boris", mode="audit")
    text = desk("block", "boris", "--yes")
    assert "boris: BUT line 3 of the settings blacklists it,\nwhich beats a block and passes in mode=audit\n" in text
    assert "blacklist=" not in desk("block", "carla", "--yes"), "it would let her pass again"
    line = desk.refusal("block", "@spam.example", "--yes")
    assert line == f"@spam.example is no login, but a domain: write blacklist=@spam.example into {desk.file}"


def test_what_a_block_offers_to_paste_means_the_login_and_nothing_else(tmp_path: Path, desk: Desk) -> None:
    """To end it, and to make it last: no line of the settings that would mean something else is offered."""
    logins = ["boris", *map(module.Settings(strip_domain=False).login_of, HOSTILE)]
    desk.write(strip_domain="no")
    lasting, unblocking = [], []
    for login in ("boris", *HOSTILE):
        text = desk("block", "--yes", "--", login)
        unblocking.append(commands_in(text)[-1])
        lasting += re.findall("^  blacklist=(.*)$", text, re.MULTILINE)
    assert sorted(row[0] for row in desk.store.rows()) == sorted(logins)
    assert {"boris", "release", "x" * 255} < set(lasting)
    assert not {"0.0.0.0/0", "192.0.2.1", "#comment", "a\\nblacklist=0/0"} & set(lasting)
    desk.file.write_text(desk.file.read_text() + "".join(f"blacklist={login}\n" for login in lasting))
    assert list(module.Settings.from_file(str(desk.file)).blacklist.lines) == lasting
    for login, (command, *words) in zip(logins, pasted(unblocking, tmp_path)):
        assert (command, words[-1]) == ("unblock", login)
        desk(command, "--yes", *words)
    assert {row[3] for row in desk.store.rows()} == {0}


def test_on_a_terminal_it_asks(desk: Desk) -> None:
    desk.fill(Entry(60, "anna", 5))
    for typed, left in (("n\n", 5), ("\n", 5), ("\x04", 5), ("y\n", -5)):
        terminal, side = os.openpty()
        os.write(terminal, typed.encode())
        done = run_process(sys.executable, ADMIN, "forgive", "anna", "-c", desk.file, stdin=side)
        os.close(side)
        os.close(terminal)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Do it? [y/N]" in done.stdout
        assert ("Nothing was changed" in done.stdout) == (left == 5)
        assert numbers(desk.store, "anna") == [left]


def test_the_first_server_that_answers_is_changed_and_without_the_right_to_update_none(
    database: Database, desk: Desk
) -> None:
    database.query("INSERT INTO events (sasl_username, recipient_count) VALUES ('anna', 5)")
    database.server.query("CREATE USER 'reader'@'127.0.0.1' IDENTIFIED BY 'x'")
    database.server.query(f"GRANT SELECT ON {database.name}.* TO 'reader'@'127.0.0.1'")
    desk.write(**database.settings(dbuser="reader", dbpass="x"))
    for command in ("forgive", "block"):
        assert "denied" in desk.refusal(command, "anna", "--yes", has_plan=True)
    database.server.query("DROP USER 'reader'@'127.0.0.1'")
    assert database.query("SELECT recipient_count FROM events") == [(5,)]
    servers = f"/nonexistent/mysqld.sock,127.0.0.1:{database.server.port},localhost:{database.server.port}"
    desk.write(**database.settings(dbhost=servers))
    desk("forgive", "anna", "--yes")
    assert database.query("SELECT recipient_count FROM events ORDER BY ts") == [(-5,), (0,)]


def test_a_store_that_policyd_is_writing_to_is_waited_for_but_not_for_ever(tmp_path: Path, desk: Desk) -> None:
    desk.fill(Entry(60, "anna", 5))
    with contextlib.closing(sqlite3.connect(tmp_path / "events.sqlite3", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert "database is locked" in desk.refusal("forgive", "anna", "--yes", has_plan=True)
        assert time.monotonic() - began > 2.5
    assert numbers(desk.store, "anna") == [5]
    assert "Done: anna has 0 recipients" in desk("forgive", "anna", "--yes")


def test_a_daemon_counts_on_while_a_long_history_is_forgiven(database: Database, desk: Desk) -> None:
    numbers = "JSON_TABLE(CONCAT('[0', REPEAT(',0', 19999), ']'), '$[*]' COLUMNS (seq FOR ORDINALITY)) AS numbers"
    old = f"SELECT NOW(3) - INTERVAL 500000 * seq MICROSECOND, 'boris', '', '', 1 FROM {numbers}"
    database.query(f"INSERT INTO events {old}")
    desk.write(**database.settings())
    repository = module.open_repository(module.Settings.from_file(str(desk.file)))
    repository.resolve()
    command = [sys.executable, str(ADMIN), "forgive", "boris", "--yes", "-c", str(desk.file)]
    counted = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            assert repository.insert([module.Event("boris", "", "192.0.2.1", 1)], soon()) == set()
            counted += 1
    (found,) = desk.objects("top")
    assert found["recipients"] + found["forgiven"] == 20_000 + counted
    assert found["forgiven"] >= 20_000
