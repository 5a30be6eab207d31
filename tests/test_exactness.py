"""Through the daemon: every recipient is counted once, and the quota is met to the message."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest
from servers import Database, Policyd, read_answer, request_bytes

from policyd import DUNNO, HOLD, REJECT

CONNECTIONS = 16
Start = Callable[..., Policyd]


def send(daemon: Policyd, messages: Iterable[dict[str, Any]]) -> list[str]:
    """Ask about the messages one after the other on a connection of its own; return the answers."""
    answers = []
    with daemon.connect() as connection:
        for message in messages:
            connection.sendall(request_bytes(**message))
            answers.append(read_answer(connection))
    return answers


def send_at_once(daemons: list[Policyd], messages: list[dict[str, Any]]) -> list[str]:
    """Ask about the messages over many connections, dealt out over the daemons; return the answers."""
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        sent = [
            threads.submit(send, daemons[n % len(daemons)], messages[n::CONNECTIONS]) for n in range(CONNECTIONS)
        ]
        return [answer for each in sent for answer in each.result(60)]


def embedded_sum(daemon: Policyd) -> int:
    """Return what the daemon's own store has counted."""
    with contextlib.closing(sqlite3.connect(daemon.statedir / "events.sqlite3")) as connection:
        return int(connection.execute("SELECT SUM(recipient_count) FROM events").fetchone()[0])


def table_sum(database: Database) -> int:
    """Return what the table has counted."""
    return int(database.query("SELECT SUM(recipient_count) FROM events")[0][0])


def store_of(request: pytest.FixtureRequest, name: str) -> tuple[dict[str, str], Callable[[Policyd], int]]:
    """Return the settings that lead to a store, and what asks it for its sum."""
    if name == "SQLite":
        return {}, embedded_sum
    database: Database = request.getfixturevalue(name)
    return database.settings(), lambda _: table_sum(database)


STORES = [
    "SQLite",
    pytest.param("database", marks=pytest.mark.mariadb),
    pytest.param("old_database", marks=pytest.mark.mariadb),
]


@pytest.mark.parametrize("store", STORES)
def test_the_table_holds_exactly_the_recipients_answered(
    policyd: Start, request: pytest.FixtureRequest, store: str
) -> None:
    """Of one login, one sender, one address: all that could be taken for the same."""
    settings, stored = store_of(request, store)
    daemon = policyd(defaultquota=100_000, **settings)
    counts = [1 + n * n % 23 for n in range(800)]
    answers = send_at_once([daemon], [{"recipient_count": recipients} for recipients in counts])
    assert answers == [DUNNO] * len(counts)
    assert stored(daemon) == sum(counts)
    daemon.wait_for_log(f"/{sum(counts)}")


@pytest.mark.parametrize("store", STORES)
def test_the_quota_is_met_to_the_message(policyd: Start, request: pytest.FixtureRequest, store: str) -> None:
    settings, stored = store_of(request, store)
    daemon = policyd(defaultquota=300, **settings)
    answers = Counter(send_at_once([daemon], [{}] * 1000))
    assert answers == {DUNNO: 299, HOLD: 300, REJECT: 401}
    assert stored(daemon) == 1000


@pytest.mark.parametrize("table", ["database", "old_database"])
@pytest.mark.mariadb
def test_two_relays_hold_a_login_at_one_quota(policyd: Start, request: pytest.FixtureRequest, table: str) -> None:
    database: Database = request.getfixturevalue(table)
    relays = [policyd(defaultquota=300, **database.settings()) for _ in range(2)]
    answers = Counter(send_at_once(relays, [{}] * 1000))
    assert table_sum(database) == sum(answers.values()) == 1000
    # The n-th message that is committed has a sum of at least n.  It is more where a message of the other relay has
    # been committed meanwhile, of which there is one a connection at most.
    assert 299 - CONNECTIONS <= answers[DUNNO] <= 299
    assert answers[REJECT] >= 401
    assert [relay.ask() for relay in relays] == [REJECT, REJECT]


@pytest.mark.mariadb
def test_logins_that_an_old_table_cannot_tell_apart_share_a_quota(policyd: Start, old_database: Database) -> None:
    daemon = policyd(defaultquota=3, **old_database.settings())
    logins = ["longlogin1", "longlogin2", "longlogi", "longlogin1@example.org", "LONGLOGIN3"]
    assert [daemon.ask(sasl_username=login) for login in logins] == [DUNNO, DUNNO, HOLD, HOLD, HOLD]
    assert daemon.ask(sasl_username="longlog") == DUNNO
    daemon.wait_for_log("Updating db: longlogin3/alice@example.org/192.0.2.1/1/5")
