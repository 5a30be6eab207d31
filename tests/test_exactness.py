"""Through the daemon: every recipient is counted once, and the quota is met to the message."""

from __future__ import annotations

from collections import Counter
from typing import Callable

from asking import status
from daemons import CONNECTIONS, send_at_once
from servers import DUNNO, HOLD, REJECT, Policyd
from stores import MariaStore, Store, on_each_table, on_stores, total

Start = Callable[..., Policyd]


@on_each_table
def test_each_recipient_is_counted_once_and_the_quota_is_met_to_the_message(policyd: Start, store: Store) -> None:
    """Of one sender, one address, and one login at a time: all that could be taken for the same."""
    daemon = policyd(defaultquota=300, quota="many:100000", **store.settings)
    counts = [1 + n * n % 23 for n in range(800)]
    answers = send_at_once([daemon], [{"sasl_username": "many", "recipient_count": count} for count in counts])
    assert answers == [DUNNO] * len(counts)
    assert total(store) == sum(counts)
    daemon.wait_for_log(f"/{sum(counts)}")
    assert Counter(send_at_once([daemon], [{}] * 1000)) == {DUNNO: 299, HOLD: 300, REJECT: 401}
    assert total(store, "alice") == 1000
    assert status(daemon).text.startswith("1800 requests: 1099 DUNNO, 300 HOLD, 401 REJECT; 1 logins held; ")


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
