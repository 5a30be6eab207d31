"""The Recorder: one thread that counts for all others, and always has an answer for them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorders import (
    PATIENCE_S,
    FaultyRepository,
    GatedRepository,
    Waiter,
    is_well,
    recording,
    shut,
    written_by_another,
)
from servers import Database, wait_until
from stores import KeptLog, SQLiteStore, event, maria_repository

from policyd import (
    BATCH_EVENTS,
    DAY_S,
    FIRST_PURGE_S,
    RETRY_PURGE_S,
    Event,
    Journal,
    Recorder,
    SQLiteRepository,
    purge_daily,
)


@pytest.fixture
def store(tmp_path: Path) -> SQLiteStore:
    """An embedded store."""
    return SQLiteStore(tmp_path / "events.sqlite3")


# --- counting ---


def test_whoever_records_gets_the_sum_with_his_own(store: SQLiteStore) -> None:
    with recording(store.repository) as recorder:
        assert Waiter(recorder, event("anna", 3)).sum() == 3
        assert Waiter(recorder, event("bert", 5)).sum() == 5
        assert Waiter(recorder, event("anna", 4)).sum() == 7
    assert [row[3] for row in store.rows()] == [3, 5, 4]


def test_events_of_many_threads_are_all_counted_once(store: SQLiteStore) -> None:
    answers: list[int | None] = []

    def send() -> None:
        for _ in range(25):
            answers.append(Waiter(recorder, event("anna")).sum())

    with recording(store.repository) as recorder:
        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert sorted(answer or 0 for answer in answers) == list(range(1, 201))
    assert len(store.rows()) == 200


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(
        st.lists(st.builds(event, st.sampled_from(["anna", "bert", "carl"]), st.integers(1, 30)), max_size=30),
        max_size=4,
    )
)
def test_however_events_are_gathered_the_sums_run_up_in_order_of_arrival(
    store: SQLiteStore, batches: list[list[Event]]
) -> None:
    store.clear()
    gated = GatedRepository(store.repository)
    waiters = []
    with recording(gated) as recorder:
        for batch in batches:
            with shut(gated, recorder) as first:
                waiters += [Waiter(recorder, each) for each in batch]
            first.sum()
    reached: dict[str, int] = {}
    for waiter, each in zip(waiters, [each for batch in batches for each in batch]):
        reached[each.sasl_username] = reached.get(each.sasl_username, 0) + each.recipient_count
        assert waiter.answers == [reached[each.sasl_username]]


def test_all_that_waits_is_committed_together_up_to_the_limit(store: SQLiteStore) -> None:
    gated = GatedRepository(store.repository)
    with recording(gated) as recorder:
        with shut(gated, recorder):
            waiters = [Waiter(recorder, event("anna")) for _ in range(2 * BATCH_EVENTS + 88)]
        assert [waiter.sum() for waiter in waiters] == list(range(1, 2 * BATCH_EVENTS + 88 + 1))
    assert [len(batch) for batch in gated.batches] == [1, BATCH_EVENTS, BATCH_EVENTS, 88]


@pytest.mark.mariadb
def test_one_refused_event_of_a_batch_is_answered_without_a_sum(database: Database, logged: KeptLog) -> None:
    database.query("ALTER TABLE events MODIFY recipient_count TINYINT")
    gated = GatedRepository(maria_repository(database))
    with recording(gated) as recorder:
        with shut(gated, recorder):
            counts = [1, 300, 2, 3, 300, 4]
            waiters = [Waiter(recorder, event("anna", n, sender=str(at))) for at, n in enumerate(counts)]
        assert [waiter.sum() for waiter in waiters] == [1, None, 3, 6, None, 10]
        assert is_well(recorder)
    assert len(logged.errors()) == 2


def test_an_event_that_is_refused_alone_is_answered(store: SQLiteStore) -> None:
    class Refusing(GatedRepository):
        def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
            return set(range(len(events)))

    with recording(Refusing(store.repository)) as recorder:
        assert Waiter(recorder, event("anna")).sum() is None
        assert is_well(recorder)


def test_the_wait_of_the_batch_at_work_can_be_watched(store: SQLiteStore) -> None:
    gated = GatedRepository(store.repository)
    with recording(gated) as recorder:
        assert recorder.longest_wait_s() == 0
        with shut(gated, recorder) as first:
            wait_until(lambda: recorder.longest_wait_s() > 0.05, "the wait grows")
        first.sum()
        wait_until(lambda: recorder.longest_wait_s() == 0, "nobody waits")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_a_wait_without_end_so_that_the_watchdog_restarts_us(tmp_path: Path) -> None:
    class FaultyJournal(Journal):
        def look(self) -> int:
            raise ValueError("a fault of ours")

    store = SQLiteRepository(str(tmp_path / "events.sqlite3"))
    recorder = Recorder(store, FaultyJournal(str(tmp_path / "journal.sqlite3")), 1)
    recorder.start()
    try:
        wait_until(lambda: recorder.longest_wait_s() == float("inf"), "the dead thread is noticed")
    finally:
        recorder.stop(0)


def test_the_end_commits_what_waits(store: SQLiteStore) -> None:
    gated = GatedRepository(store.repository)
    with recording(gated) as recorder:
        with shut(gated, recorder) as first:
            waiters = [first, *(Waiter(recorder, event("anna")) for _ in range(BATCH_EVENTS + 5))]
            ending = threading.Thread(target=recorder.stop, args=(PATIENCE_S,))
            ending.start()
        ending.join(PATIENCE_S)
        assert "recorder" not in {thread.name for thread in threading.enumerate()}
        assert [waiter.answers for waiter in waiters] == [[1], *([n + 1] for n in range(BATCH_EVENTS + 5))]
    assert len(store.rows()) == BATCH_EVENTS + 6


def test_the_end_does_not_wait_for_ever(store: SQLiteStore) -> None:
    gated = GatedRepository(store.repository)
    with recording(gated) as recorder, shut(gated, recorder) as first:
        recorder.stop(0.05)
        assert first.answers == []


# --- faults of ours ---


def test_a_fault_of_one_who_is_told_harms_no_other(store: SQLiteStore, logged: KeptLog) -> None:
    def stumble(recipients: int | None) -> None:
        raise ValueError("a fault of ours")

    gated = GatedRepository(store.repository)
    with recording(gated) as recorder:
        with shut(gated, recorder):
            before = Waiter(recorder, event("anna"))
            recorder.record(event("anna"), stumble)
            after = Waiter(recorder, event("anna"))
        assert [before.sum(), after.sum()] == [1, 3]
        assert Waiter(recorder, event("anna")).sum() == 4
    assert len(logged.errors()) == 1
    assert "a fault of ours" in logged.errors()[0]


@pytest.mark.usefixtures("no_delay")
@pytest.mark.parametrize("faulty", ["insert", "sum_recipients", "check"])
def test_a_fault_in_the_store_leaves_nobody_without_an_answer(
    store: SQLiteStore, logged: KeptLog, faulty: str
) -> None:
    repository = FaultyRepository(store.repository, faulty)
    with recording(repository) as recorder:
        assert [Waiter(recorder, event("anna")).sum() for _ in range(2)] == [1, 2]
        repository.is_mended = True
        wait_until(lambda: " over after " in logged.errors()[-1], "the outage ends")
        assert Waiter(recorder, event("anna")).sum() == 3
    assert repository.faults > 0
    assert all("a fault of ours" in error for error in logged.errors()[:-1])
    assert len(store.rows()) == 3


@pytest.mark.usefixtures("no_delay")
def test_a_fault_while_a_store_is_looked_for_does_not_end_the_search(
    tmp_path: Path, store: SQLiteStore, logged: KeptLog
) -> None:
    repository = FaultyRepository(store.repository, "check")
    repository.is_mended = True
    with recording(repository) as recorder:
        assert Waiter(recorder, event("anna")).sum() == 1
        with written_by_another(tmp_path / "events.sqlite3"):
            repository.is_mended = False
            assert Waiter(recorder, event("anna")).sum() == 2
            wait_until(lambda: repository.faults > 1, "it is looked for again and again")
        repository.is_mended = True
        wait_until(lambda: is_well(recorder), "the outage ends")
        assert Waiter(recorder, event("anna")).sum() == 3


# --- the daily purge ---


class Days(threading.Event):
    """The time until the daemon ends: so many waits, all of them over at once."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self._left = waits
        self.waited: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout)
        self._left -= 1
        return self._left < 0


def test_old_events_are_purged_soon_after_the_start_and_then_every_day(store: SQLiteStore, logged: KeptLog) -> None:
    store.add([("anna", "", "", 1)] * 3, age_s=3 * DAY_S + 60)
    store.add([("anna", "", "", 2)], age_s=3 * DAY_S - 60)
    days = Days(2)
    purge_daily(store.repository, lambda: 3, days)
    assert [row[3] for row in store.rows()] == [2]
    assert days.waited == [FIRST_PURGE_S, DAY_S, DAY_S]
    assert [line.text for line in logged.lines] == [
        f"purged {number} events older than 3 days" for number in (3, 0)
    ]


def test_a_purge_that_fails_is_tried_again_within_the_day(tmp_path: Path, logged: KeptLog) -> None:
    days = Days(1)
    purge_daily(SQLiteRepository(str(tmp_path / "missing" / "events.sqlite3")), lambda: 7, days)
    assert days.waited == [FIRST_PURGE_S, RETRY_PURGE_S]
    assert [line.level for line in logged.lines] == ["warning"]
