"""What both repositories promise, on every table policyd may find."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from servers import Database
from stores import (
    A_DAY_AND_A_MINUTE,
    A_DAY_LESS_A_MINUTE,
    MariaStore,
    SQLiteStore,
    Store,
    count,
    event,
    maria_repository,
    soon,
    sums,
)

from policyd import BATCH_EVENTS, DAY_S, Event, Settings, SQLiteRepository, decide, scope_of

STORES = [
    pytest.param("sqlite", id="SQLite"),
    pytest.param("schema.sql", marks=pytest.mark.mariadb),
    pytest.param("go-policyd", marks=pytest.mark.mariadb),
    pytest.param("go-policyd with an index", marks=pytest.mark.mariadb),
]
MARIADB_STORES = STORES[1:]

# A store is emptied by hand before each example.
examples_on_one_store = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store; the test runs once with each kind."""
    if request.param == "sqlite":
        yield SQLiteStore(tmp_path / "events.sqlite3")
        return
    database = request.getfixturevalue("database" if request.param == "schema.sql" else "old_database")
    if request.param == "go-policyd with an index":
        database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    yield MariaStore(database)


def has_index(store: Store) -> bool:
    """Tell whether a login's rows can be found without the others."""
    return isinstance(store, SQLiteStore) or "NO index" not in store.repository.check(soon())


on_mariadb = pytest.mark.parametrize("store", MARIADB_STORES, indirect=True)


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


def test_two_messages_in_one_batch_that_differ_in_nothing_add_up(store: Store) -> None:
    assert count(store.repository, event("anna", 2), event("anna", 3)) == [2, 5]
    assert sum(row[3] or 0 for row in store.rows()) == 5


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


def test_rows_without_recipients_count_as_none(store: Store) -> None:
    store.add([("anna", "", "", None), ("anna", "", "", 0), ("bert", "", "", None)], age_s=60)
    assert count(store.repository, event("anna", 5), event("bert", 1), event("carl", 1)) == [5, 1, 1]
    assert count(store.repository, event("anna", 5), rows=1)[0] >= 5  # of the newest row with recipients


def test_the_null_sender_is_a_sender_like_any_other(store: Store) -> None:
    assert count(store.repository, event("anna", 2, sender="")) == [2]
    assert store.rows() == [("anna", "", "192.0.2.1", 2)]


# --- texts ---

ODD_TEXTS = [
    "x" * 3000,
    "é" * 300,
    "\U0001f600" * 90,
    "anna\U0001f600",
    "é",
    "пётр",
    "anna ",
    " anna",
    " ",
    "tab\there",
    "\x01\x1f\x7f\x80\x81\x9f",
    "back\\slash",
    "\\",
    "it's",
    'a"b',
    "`",
    "%s %d %(x)s %",
    "a\u0301",
    "\u2028",
    "e",
    "E",
]


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
    assert count(store.repository, odd, event("someone", 1), rows=1)[0] >= 3  # now as a long history


@on_mariadb
def test_logins_that_the_column_cuts_to_the_same_share_a_sum(store: MariaStore) -> None:
    same = "x" * store.width
    assert count(store.repository, event(same + "1", 1), event(same + "2", 2), event(same, 4)) == [1, 3, 7]
    assert count(store.repository, event(same[:-1], 1)) == [1]


def test_logins_that_a_collation_takes_for_equal_stay_apart(store: Store) -> None:
    logins = ["e", "é", "E", "ê", "a", "A", "ß", "ss"]
    for n, login in enumerate(logins):
        store.add([(login, "", "", 2**n), (login, "", "", None)], age_s=60 + n)
    batch = [event(login, 300 + n, sender=str(n)) for n, login in enumerate(logins)]
    assert count(store.repository, *batch) == [300 + n + 2**n for n in range(len(logins))]
    if has_index(store):  # now as long histories, of which the newest row is enough
        sums(store.repository, batch, 1)
        assert sums(store.repository, batch, 1) == [300 + n for n in range(len(logins))]


def test_logins_that_a_table_cannot_spell_stay_apart(store: Store) -> None:
    assert count(store.repository, event("п", 1), event("я", 2), event("?", 4)) == [1, 2, 4]


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


runs = st.builds(Run, st.integers(1, 150), st.sampled_from([None, 0, 1, 1, 1, 2, 40]))
histories = st.lists(runs, max_size=6)
batches = st.lists(st.tuples(st.integers(1, 128), st.integers(1, 3)), min_size=1, max_size=2)  # length, recipients


@settings(examples_on_one_store, max_examples=20)
@given(quota=QUOTAS, history=histories, shape=batches, mixed=st.randoms(use_true_random=False))
@example(quota=3, history=[Run(300, 1)], shape=[(BATCH_EVENTS, 1)], mixed=random.Random(1))
@example(quota=3, history=[Run(300, 0), Run(6, 1)], shape=[(1, 1)], mixed=random.Random(1))
@example(quota=20, history=[Run(300, None), Run(300, 1)], shape=[(BATCH_EVENTS, 1)], mixed=random.Random(1))
def test_a_bounded_sum_never_changes_an_answer(
    store: Store, quota: int, history: list[Run], shape: list[tuple[int, int]], mixed: random.Random
) -> None:
    store.clear()
    rows = scope_of(Settings(defaultquota=quota)).everybody.rows
    counts = [run.recipients for run in history for _ in range(run.length)]
    if counts:
        store.add([("anna", "", "", recipients) for recipients in counts], age_s=60)
    # Each has a row of its own.
    batch = [event("anna", each, sender=f"{n}.{m}") for n, (length, each) in enumerate(shape) for m in range(length)]
    batch += [event("bert", 1)]
    mixed.shuffle(batch)
    assert store.repository.insert(batch, soon()) == set()

    reached = Counter(anna=sum(recipients or 0 for recipients in counts))
    exact = []
    for each in batch:
        reached[each.sasl_username] += each.recipient_count
        exact.append(reached[each.sasl_username])
    answers = [decide(recipients, quota, 2 * quota) for recipients in exact]
    for _ in range(2):  # that a history is long is known from the first time on
        found = sums(store.repository, batch, rows)
        assert [decide(recipients, quota, 2 * quota) for recipients in found] == answers
        assert all(low <= high for low, high in zip(found, exact))


def test_a_long_history_is_summed_no_further_than_it_matters(store: Store) -> None:
    """It would cost more and more; without an index one sum for all costs the least."""
    store.add([("anna", "", "", 1)] * 50, age_s=60)
    count(store.repository, event("anna", 1), rows=10)
    expected = 1 + 9 if has_index(store) else 2 + 50
    assert count(store.repository, event("anna", 1, sender="another"), rows=10) == [expected]


def test_the_sum_of_a_history_that_is_short_again_is_exact_again(store: Store) -> None:
    store.add([("anna", "", "", 1)] * 50, age_s=60)
    for _ in range(2):
        assert sums(store.repository, [event("anna", 1)], 10)[0] >= 10
    store.clear()
    store.add([("anna", "", "", 7), ("anna", "", "", None), ("anna", "", "", 70)], age_s=60)
    for _ in range(3):
        assert sums(store.repository, [event("anna", 7)], 10) == [77]


# --- keeping house ---


def test_purge_deletes_only_what_is_older(store: Store) -> None:
    store.add([("anna", "", "", n) for n in range(7)], age_s=3 * DAY_S + 60)
    store.add([("anna", "", "", n) for n in (10, 11, 12)], age_s=3 * DAY_S - 60)
    assert store.repository.purge(keep_days=3) == 7
    assert sorted(row[3] or 0 for row in store.rows()) == [10, 11, 12]
    assert store.repository.purge(keep_days=3) == 0


@pytest.mark.mariadb
def test_purge_deletes_a_slice_at_a_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody has to wait for millions of rows."""
    monkeypatch.setattr("policyd.PURGE_SLICE", 3)
    store = MariaStore(database)
    store.add([("anna", "", "", n) for n in range(7)], age_s=3 * DAY_S + 60)
    deletes = "SELECT variable_value FROM information_schema.global_status WHERE variable_name = 'COM_DELETE'"
    before = int(database.query(deletes)[0][0])
    assert store.repository.purge(keep_days=3) == 7
    assert int(database.query(deletes)[0][0]) >= before + 3
    assert store.rows() == []


def test_purge_of_an_embedded_store_commits_a_slice_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policyd.PURGE_SLICE", 3)
    store = SQLiteStore(tmp_path / "events.sqlite3")
    store.add([("anna", "", "", n) for n in range(7)], age_s=3 * DAY_S + 60)
    left: list[int] = []  # whenever purge asks for the time, as others see it

    def clock() -> float:
        left.append(len(store.rows()))
        return time.time()

    assert SQLiteRepository(str(tmp_path / "events.sqlite3"), clock).purge(keep_days=3) == 7
    assert left == [7, 4, 1, 0]


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


@on_mariadb
def test_another_daemon_sees_the_same_sums(store: MariaStore) -> None:
    assert count(store.repository, event("anna", 3)) == [3]
    assert count(maria_repository(store.database), event("anna", 4)) == [7]
