"""Through the daemon: every recipient is counted once, and the quota is met to the message."""

from __future__ import annotations

from collections import Counter
from typing import Callable

import pytest
from daemons import CONNECTIONS, send_at_once
from servers import DUNNO, HOLD, REJECT, Database, Policyd
from stores import MariaStore, Store, on_each_table, on_stores, total

Start = Callable[..., Policyd]


@on_each_table
def test_the_table_holds_exactly_the_recipients_answered(policyd: Start, store: Store) -> None:
    """Of one login, one sender, one address: all that could be taken for the same."""
    daemon = policyd(defaultquota=100_000, **store.settings)
    counts = [1 + n * n % 23 for n in range(800)]
    answers = send_at_once([daemon], [{"recipient_count": recipients} for recipients in counts])
    assert answers == [DUNNO] * len(counts)
    assert total(store) == sum(counts)
    daemon.wait_for_log(f"/{sum(counts)}")


@on_each_table
def test_the_quota_is_met_to_the_message(policyd: Start, store: Store) -> None:
    daemon = policyd(defaultquota=300, **store.settings)
    answers = Counter(send_at_once([daemon], [{}] * 1000))
    assert answers == {DUNNO: 299, HOLD: 300, REJECT: 401}
    assert total(store) == 1000


@on_stores("schema.sql", "go-policyd")
def test_two_relays_hold_a_login_at_one_quota(policyd: Start, store: MariaStore) -> None:
    relays = [policyd(defaultquota=300, **store.settings) for _ in range(2)]
    answers = Counter(send_at_once(relays, [{}] * 1000))
    assert total(store) == sum(answers.values()) == 1000
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
