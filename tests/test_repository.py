"""What both repositories promise, on every table policyd may find."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from servers import Database
from stores import (
    A_DAY_AND_A_MINUTE,
    A_DAY_LESS_A_MINUTE,
    MariaStore,
    Store,
    count,
    event,
    incident,
    on_mariadb,
    soon,
    sums,
    usages,
)

from policyd import BATCH_EVENTS, DAY_S, HOUR_S, Event, Settings, Usage, decide

FEW = Settings(defaultquota=3)  # so that histories are long ones soon
NEWEST = FEW.rows_of("anybody")  # of a long history, which are summed

# A store is emptied by hand before each example.
examples_on_one_store = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def has_index(store: Store) -> bool:
    """Tell whether a login's rows can be found without the others."""
    store.repository.check(soon())
    return store.repository.has_index()


# --- sums ---


def test_what_is_inserted_is_summed(store: Store) -> None:
    assert count(store.repository, event("anna", 3)) == [3]
    assert count(store.repository, event("anna", 4, sender="other@example.org", address="2001:db8::1")) == [7]
    assert count(store.repository, event("bert", 5)) == [5]
    assert Counter(row[0] for row in store.rows()) == {"anna": 2, "bert": 1}


def test_only_the_last_24_hours_are_summed(store: Store) -> None:
    store.add([("anna", "", "", 100)], A_DAY_AND_A_MINUTE)
    store.add([("anna", "", "", 10)], A_DAY_LESS_A_MINUTE)
    assert count(store.repository, event("anna", 1)) == [11]


def test_the_sums_of_a_batch_run_up_in_order_of_arrival(store: Store) -> None:
    store.add([("anna", "", "", 10)], age_s=60)
    batch = [event("anna", 1), event("bert", 2), event("anna", 3, sender=""), event("carl", 1), event("bert", 5)]
    assert count(store.repository, *batch) == [11, 2, 14, 1, 7]


def test_messages_of_one_batch_that_differ_in_nothing_are_a_row_each(store: Store) -> None:
    """How many messages came, and not only how many recipients, tells a thief from a letter to a class."""
    assert count(store.repository, *[event("anna", 2)] * 16) == list(range(2, 34, 2))
    assert [row[3] for row in store.rows()] == [2] * 16
    moment = int((time.time() - HOUR_S) * 1000)
    replayed = [event("bert", n) for n in range(3)]
    assert store.repository.insert(replayed, soon(), [moment] * 3) == set()
    assert sorted(row[2] for row in store.times() if row[1] == "bert") == [0, 1, 2]


events = st.builds(
    event,
    st.sampled_from(["anna", "bert", "carl"]),
    st.integers(1, 50),
    sender=st.sampled_from(["", "a@example.org"]),
)


@examples_on_one_store
@given(batches=st.lists(st.lists(events, min_size=1, max_size=20), max_size=5))
def test_sums_are_those_of_messages_that_came_one_by_one(store: Store, batches: list[list[Event]]) -> None:
    store.clear()
    reached: Counter[str] = Counter()
    for batch in batches:
        expected = []
        for each in batch:
            reached[each.sasl_username] += each.recipient_count
            expected.append(reached[each.sasl_username])
        assert count(store.repository, *batch) == expected


def test_only_what_is_above_0_counts(store: Store) -> None:
    """Not an incident (NULL), nor what a human has forgiven (below 0), nor what is nothing (0)."""
    nothing = [("anna", "", "HOLD overquota", None), ("anna", "", "forgiven", 0), ("anna", "", "", -100)]
    store.add(nothing * 100 + [("anna", "", "", 7)], age_s=60)
    watchful = Settings(defaultquota=3, hourquota=1000)
    for reached in (12, 17, 22):  # of so many rows that the newest ones alone would do, were they messages
        assert count(store.repository, event("anna", 5), event("bert", 1), settings=watchful)[0] == reached
    used = usages(store.repository, [event("anna", 5), event("bert", 1)], watchful)
    assert [(each.recipients, each.of_hour) for each in used] == [(22, 22), (3, 3)]


def test_the_last_hour_is_summed_apart_where_it_matters(store: Store) -> None:
    store.add([("anna", "", "", 100)], HOUR_S + 60)
    store.add([("anna", "", "", 10)], HOUR_S - 60)
    batch = [event("anna", 1), event("bert", 2), event("anna", 3)]
    count(store.repository, *batch)
    found = usages(store.repository, batch, Settings(hourquota=1000))
    assert [(each.recipients, each.of_hour) for each in found] == [(111, 11), (2, 2), (114, 14)]
    assert [each.of_hour for each in usages(store.repository, batch)][1] in (0, 2)  # nobody asks


# --- incidents ---


def test_an_incident_is_a_row_that_all_relays_see_for_24_hours(store: Store) -> None:
    store.add([("anna", "", "HOLD blocked", None), ("bert", "", "HOLD places", 0)], A_DAY_LESS_A_MINUTE)
    store.add([("anna", "", "HOLD places", None)], A_DAY_AND_A_MINUTE)
    assert store.repository.insert([incident("anna", "REJECT overquota"), event("bert", 4)], soon()) == set()
    found = usages(store.another(), [event("anna", 0), event("bert", 4)])
    assert found == [Usage(0, 0, frozenset(["HOLD blocked", "REJECT overquota"])), Usage(4, found[1].of_hour)]
    assert sorted(store.rows(), key=str)[0] == ("anna", "", "HOLD blocked", None)


def test_each_kind_of_incident_is_told_apart(store: Store) -> None:
    kinds = [f"{action} {rule}" for action in ("HOLD", "REJECT")
             for rule in ("overquota", "hourquota", "places", "newplace", "blocked")]  # fmt: skip
    for n, kind in enumerate(kinds, start=1):
        login = f"login{n}"[:8]
        assert store.repository.insert([incident(login, kind), incident("all", kind)], soon()) == set()
        assert usages(store.repository, [event(login, 0)]) == [Usage(0, 0, frozenset([kind]))]
    assert usages(store.repository, [event("all", 0)])[0].incidents == set(kinds)


def test_beyond_all_limits_incidents_and_a_forgive_still_show(store: Store) -> None:
    """Though of a long history only the newest rows are summed, which may lie after the incidents."""
    store.add([("anna", "", "HOLD blocked", None)], age_s=7200)
    store.add([("anna", "", "", 1)] * (3 * NEWEST), age_s=60)
    batch = [event("anna", 1, sender="")]
    count(store.repository, *batch, settings=FEW)
    for _ in range(3):
        assert usages(store.repository, batch, FEW)[0].incidents == {"HOLD blocked"}
    store.repository.insert([incident("anna", "REJECT overquota")], soon())
    assert usages(store.repository, batch, FEW)[0].incidents == {"HOLD blocked", "REJECT overquota"}
    forgive = (
        "UPDATE {table} SET recipient_count = COALESCE(-recipient_count, 0), ts = ts"
        " WHERE {of_login} AND {since day} AND (recipient_count IS NULL OR recipient_count > 0)"
    )
    changed = store.another().ask(forgive, {"login": "anna", "day": DAY_S})
    assert changed == [(3 * NEWEST + 3,)]
    assert usages(store.repository, batch, FEW) == [Usage(0)]
    assert count(store.repository, event("anna", 2), settings=FEW) == [2]


# --- texts ---

ODD_TEXTS = [
    "x" * 3000, "é" * 300, "\U0001f600" * 90, "anna\U0001f600", "é", "пётр", "п", "я", "?", "anna ", " anna", " ",
    "tab\there", "\x01\x1f\x7f\x80\x81\x9f", "back\\slash", "\\", "it's", 'a"b', "`", "%s %d %(x)s %", "a\u0301",
    "\u2028", "e", "E",
]  # fmt: skip


def test_no_text_is_refused(store: Store) -> None:
    for text in ODD_TEXTS:
        store.clear()
        odd = Event(text, text, text, 3)
        assert count(store.repository, odd) == [3], ascii(text)
        assert count(store.repository, odd) == [6], ascii(text)
        assert {row[:3] for row in store.rows()} == {store.stored(odd)[:3]}


@examples_on_one_store
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300))
def test_what_was_inserted_under_a_login_is_found_under_it(store: Store, text: str) -> None:
    """Insert and sum see a text in the same form, whatever the table makes of it."""
    store.clear()
    odd = Event(text, text, text, 3)
    assert count(store.repository, odd) == [3]
    assert count(store.repository, odd, event("someone", 1))[0] == 6


@on_mariadb
def test_logins_that_the_column_cuts_to_the_same_share_a_sum(store: MariaStore) -> None:
    same = "x" * store.width
    assert count(store.repository, event(same + "1", 1), event(same + "2", 2), event(same, 4)) == [1, 3, 7]
    assert count(store.repository, event(same[:-1], 1)) == [1]


def test_logins_that_a_collation_takes_for_equal_stay_apart(store: Store) -> None:
    logins = ["e", "é", "E", "ê", "a", "A", "ß", "ss"]
    for n, login in enumerate(logins):
        store.add([(login, "", "", 2**n), (login, "", "", None)], age_s=60 + n)
    batch = [event(login, 1000 + n, sender=str(n)) for n, login in enumerate(logins)]
    expected = [1000 + n + 2**n for n in range(len(logins))]
    assert count(store.repository, *batch, settings=FEW) == expected
    assert sums(store.repository, batch, FEW) == expected  # now as long histories: one row is more than what decides
    assert store.repository.ask("SELECT COUNT(*) FROM {table} WHERE {of_login}", {"login": "é"}) == [(3,)]
    assert count(store.repository, event("п", 1), event("я", 2), event("?", 4)) == [1, 2, 4]  # which it may not spell


@pytest.mark.mariadb
def test_a_login_that_somebody_stored_with_spaces_behind_it_is_the_same(database: Database) -> None:
    store = MariaStore(database)
    store.add([("anna  ", "", "", 5)], age_s=60)
    assert count(store.repository, event("anna", 1)) == [6]


SQL = ["'; DROP TABLE events; -- ", '"; DELETE FROM events; #', "\\'; DELETE FROM events; -- ", "') OR 1=1 -- "]


def test_sql_in_any_attribute_is_only_text(store: Store) -> None:
    for text in SQL:
        store.clear()
        store.add([("anna", "", "", 40)], age_s=60)
        batch = [Event(text, "s", "a", 1), Event("anna", text, "a", 2), Event("anna", "s", text, 3)]
        assert count(store.repository, *batch) == [1, 42, 45]
        assert set(store.rows()) == {("anna", "", "", 40), *map(store.stored, batch)}


# --- long histories ---

QUOTAS = st.integers(3, 20)


class Run(NamedTuple):
    """So many rows with so many recipients each."""

    length: int
    recipients: int | None


runs = st.builds(Run, st.integers(1, 150), st.sampled_from([None, 0, -1, 1, 1, 1, 2, 40]))
histories = st.lists(runs, max_size=6)
batches = st.lists(st.tuples(st.integers(1, 128), st.integers(1, 3)), min_size=1, max_size=2)  # length, recipients


@settings(examples_on_one_store, max_examples=20)
@given(quota=QUOTAS, history=histories, shape=batches, mixed=st.randoms(use_true_random=False))
@example(quota=3, history=[Run(300, 1)], shape=[(BATCH_EVENTS, 1)], mixed=random.Random(1))
@example(quota=3, history=[Run(300, -1), Run(6, 1)], shape=[(1, 1)], mixed=random.Random(1))
@example(quota=20, history=[Run(300, None), Run(300, 1)], shape=[(BATCH_EVENTS, 1)], mixed=random.Random(1))
def test_a_bounded_sum_never_changes_an_answer(
    store: Store, quota: int, history: list[Run], shape: list[tuple[int, int]], mixed: random.Random
) -> None:
    store.clear()
    few = Settings(defaultquota=quota)
    counts = [run.recipients for run in history for _ in range(run.length)]
    if counts:
        store.add([("anna", "", "", recipients) for recipients in counts], age_s=60)
    batch = [event("anna", each) for length, each in shape for _ in range(length)] + [event("bert", 1)]
    mixed.shuffle(batch)
    assert store.repository.insert(batch, soon()) == set()

    reached = Counter(anna=sum(max(recipients or 0, 0) for recipients in counts))
    exact = []
    for each in batch:
        reached[each.sasl_username] += each.recipient_count
        exact.append(reached[each.sasl_username])
    answers = [decide(Usage(recipients), few.everybody).action for recipients in exact]
    for _ in range(2):  # that a history is long is known from the first time on
        found = sums(store.repository, batch, few)
        assert [decide(Usage(recipients), few.everybody).action for recipients in found] == answers
        assert all(low <= high for low, high in zip(found, exact))


def test_a_long_history_is_summed_no_further_than_it_matters(store: Store) -> None:
    """It would cost more and more; without an index one sum for all costs the least."""
    rows = 3 * NEWEST
    store.add([("anna", "", "", 1)] * rows, age_s=60)
    count(store.repository, event("anna", 1), settings=FEW)
    (found,) = count(store.repository, event("anna", 1, sender="another"), settings=FEW)
    assert NEWEST <= found < rows if has_index(store) else found == rows + 2


def test_the_sum_of_a_history_that_is_short_again_is_exact_again(store: Store) -> None:
    store.add([("anna", "", "", 1)] * (3 * NEWEST), age_s=60)
    for _ in range(2):
        assert sums(store.repository, [event("anna", 1)], FEW)[0] >= NEWEST
    store.clear()
    store.add([("anna", "", "", 7), ("anna", "", "", None), ("anna", "", "", 70)], age_s=60)
    for _ in range(3):
        assert sums(store.repository, [event("anna", 7)], FEW) == [77]


# --- statements that all stores know ---


def test_one_statement_serves_all_stores(store: Store) -> None:
    """Its words mean the same on each; a % stands doubled, and a value may hold anything."""
    store.add([("anna", "100%", "192.0.2.1", 5), ("anna", "", "HOLD blocked", None)], age_s=60)
    store.add([("anna", "", "::ffff:192.0.2.2", 7), ("bert", "", "2001:db8::1", 1)], age_s=7200)
    answer = []

    def ask() -> None:  # in a thread of its own, as the housekeeper does
        statement = (
            "SELECT {place}, recipient_count, CASE WHEN {since hour} THEN 1 ELSE 0 END, {age} FROM {from_}"
            " WHERE {of_login} AND recipient_count > 0 AND sender NOT LIKE '9%%' ORDER BY ts"
        )
        answer.extend(store.repository.ask(statement, {"login": "anna", "hour": HOUR_S}))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert [(str(place).strip(".:"), *rest) for place, *rest, _ in answer] == [("192", 7, 0), ("192", 5, 1)]
    assert [round(float(row[-1]) / 60) for row in answer] == [120, 1]
    login = {"login": "o'brien %"[: store.width]}
    columns = "(ts, sasl_username, sender, client_address, recipient_count)"
    write = f"INSERT INTO {{table}} {columns} VALUES ({{now}}, %(login)s, '', '', 3)"
    assert store.repository.ask(write, login) == [(1,)]
    old = "SELECT {login} AS login, SUM(recipient_count) FROM {by_time} WHERE NOT {since hour} GROUP BY {login}"
    assert sorted((login, int(n)) for login, n in store.repository.ask(old, {"hour": HOUR_S}, soon())) == [
        ("anna", 7), ("bert", 1)
    ]  # fmt: skip
    assert sums(store.repository, [event(login["login"], 0)]) == [3]


# --- keeping house ---


def test_purge_deletes_only_what_is_older(store: Store) -> None:
    store.add([("anna", "", "", n) for n in range(7)], age_s=3 * DAY_S + 60)
    store.add([("anna", "", "", n) for n in (10, 11, 12)], age_s=3 * DAY_S - 60)
    assert sum(store.repository.purge(keep_days=3)) == 7
    assert sorted(row[3] or 0 for row in store.rows()) == [10, 11, 12]
    assert sum(store.repository.purge(keep_days=3)) == 0


def test_purge_commits_a_slice_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody has to wait for millions of rows."""
    monkeypatch.setattr("policyd.PURGE_SLICE", 3)
    store.add([("anna", "", "", n) for n in range(7)], age_s=3 * DAY_S + 60)
    left = [(deleted, len(store.rows())) for deleted in store.repository.purge(keep_days=3) if deleted]
    assert left == [(3, 4), (3, 1), (1, 0)]


def test_check_writes_nothing_and_names_the_store(store: Store) -> None:
    store.add([("anna", "", "", 1)], age_s=60)
    before = store.rows()
    found = store.repository.check(soon())
    assert str(store.repository) in found
    assert store.rows() == before


def test_init_can_be_repeated_at_any_time(store: Store) -> None:
    assert count(store.repository, event("anna", 3)) == [3]
    store.repository.init()
    before = store.rows()
    store.repository.init()
    assert store.rows() == before
    assert count(store.repository, event("anna", 4)) == [7]
