"""The Recorder: one thread that counts for all others, and always has an answer for them."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import Database, wait_until
from stores import KeptLog, SQLiteStore, event, maria_repository

from policyd import (
    BATCH_EVENTS,
    DAY_S,
    FIRST_PURGE_S,
    KEEP_DAYS,
    RETRY_PURGE_S,
    Event,
    Recorder,
    Repository,
    SQLiteRepository,
    purge_daily,
)

ROWS = 10**6  # no history here is longer
PATIENCE_S = 20  # for what comes at once, unless the machine is very busy


class Waiter:
    """Whoever records an event and waits for its sum."""

    def __init__(self, recorder: Recorder, recorded: Event) -> None:
        self._answered = threading.Event()
        self.answers: list[int | None] = []
        recorder.record(recorded, self._on_sum)

    def _on_sum(self, recipients: int | None) -> None:
        self.answers.append(recipients)
        self._answered.set()

    def sum(self) -> int | None:
        """Wait for the answer and return it."""
        assert self._answered.wait(PATIENCE_S), "nobody answered"
        return self.answers[0]


class GatedRepository:
    """A real store behind a gate that can be shut; it remembers what came through it."""

    def __init__(self, store: Repository) -> None:
        self._store = store
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()  # set when somebody has come to the gate
        self.batches: list[Sequence[Event]] = []

    def insert(self, events: Sequence[Event], deadline: float) -> set[int]:
        self.batches.append(events)
        self.waiting.set()
        assert self.gate.wait(PATIENCE_S)
        return self._store.insert(events, deadline)

    def sum_recipients(self, events: Sequence[Event], rows: int, deadline: float) -> list[int]:
        return self._store.sum_recipients(events, rows, deadline)

    def check(self, deadline: float) -> str:
        return self._store.check(deadline)

    def purge(self, keep_days: int) -> int:
        return self._store.purge(keep_days)

    def init(self) -> str:
        return self._store.init()


class FaultyRepository(GatedRepository):
    """A store with a fault of ours in one method, until it is mended."""

    def __init__(self, store: Repository, faulty: str) -> None:
        super().__init__(store)
        self.faults = 0
        self.is_mended = False
        sound: Callable[..., Any] = getattr(self, faulty)

        def fail(*arguments: Any) -> Any:
            if self.is_mended:
                return sound(*arguments)
            self.faults += 1
            raise ValueError("a fault of ours")

        setattr(self, faulty, fail)


@pytest.fixture
def store(tmp_path: Path) -> SQLiteStore:
    """An embedded store."""
    return SQLiteStore(tmp_path / "events.sqlite3")


@contextlib.contextmanager
def recording(repository: Repository) -> Iterator[Recorder]:
    """Run a Recorder."""
    recorder = Recorder(repository, ROWS)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop(PATIENCE_S)


@contextlib.contextmanager
def shut(gated: GatedRepository, recorder: Recorder) -> Iterator[Waiter]:
    """Let the Recorder wait at the gate with one event, while the block records more."""
    gated.gate.clear()
    gated.waiting.clear()
    first = Waiter(recorder, event("the first"))
    assert gated.waiting.wait(PATIENCE_S)
    try:
        yield first
    finally:
        gated.gate.set()


@contextlib.contextmanager
def written_by_another(path: Path) -> Iterator[None]:
    """Hold the lock of an embedded store, so that nobody else can write."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


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
        assert recorder.state() == "up"
    assert len(logged.errors()) == 2


def test_an_event_that_is_refused_alone_is_answered(store: SQLiteStore) -> None:
    class Refusing(GatedRepository):
        def insert(self, events: Sequence[Event], deadline: float) -> set[int]:
            return set(range(len(events)))

    with recording(Refusing(store.repository)) as recorder:
        assert Waiter(recorder, event("anna")).sum() is None
        assert recorder.state() == "up"


def test_the_wait_of_the_batch_at_work_can_be_watched(store: SQLiteStore) -> None:
    gated = GatedRepository(store.repository)
    with recording(gated) as recorder:
        assert recorder.longest_wait_s() == 0
        with shut(gated, recorder) as first:
            wait_until(lambda: recorder.longest_wait_s() > 0.05, "the wait grows")
        first.sum()
        wait_until(lambda: recorder.longest_wait_s() == 0, "nobody waits")


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


# --- outages ---


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for a store that is away without a pause."""
    monkeypatch.setattr("policyd.RETRY_DELAYS_S", (0.001, 0.01))


BEGINS = "ERROR while UPDATING db: "
ENDS = "ERROR while UPDATING db: over after "


@pytest.mark.usefixtures("no_delay")
def test_a_store_that_is_away_at_start_costs_no_answer_and_is_used_when_it_comes(
    tmp_path: Path, logged: KeptLog
) -> None:
    path = tmp_path / "later" / "events.sqlite3"
    with recording(SQLiteRepository(str(path))) as recorder:
        wait_until(lambda: recorder.state() != "up", "the outage begins")
        assert recorder.state().startswith("down for ")
        waiters = [Waiter(recorder, event("anna")) for _ in range(3)]
        assert [waiter.answers for waiter in waiters] == [[None]] * 3  # at once, by whoever asks
        path.parent.mkdir()
        wait_until(lambda: recorder.state() == "up", "the outage ends")
        assert Waiter(recorder, event("anna", 5)).sum() == 5
        wait_until(lambda: len(logged.errors()) > 1, "the end is logged")
    begin, end = logged.errors()
    assert begin.startswith(BEGINS)
    assert str(path) in begin
    assert end.startswith(ENDS)
    assert end.endswith(", 3 messages were not counted")


@pytest.mark.usefixtures("no_delay")
def test_a_store_that_fails_is_one_error_at_the_beginning_and_one_at_the_end(
    tmp_path: Path, store: SQLiteStore, logged: KeptLog
) -> None:
    gated = GatedRepository(store.repository)
    with recording(gated) as recorder:
        for n in (1, 2):
            del logged.lines[:]
            assert Waiter(recorder, event("anna")).sum() == 2 * n - 1
            with written_by_another(tmp_path / "events.sqlite3"):
                with shut(gated, recorder) as first:
                    others = [Waiter(recorder, event("anna")) for _ in range(BATCH_EVENTS + 1)]
                assert first.sum() is None
                assert [waiter.sum() for waiter in others] == [None] * len(others)
                assert Waiter(recorder, event("anna")).answers == [None]
                assert len(logged.errors()) == 1
            wait_until(lambda: recorder.state() == "up", "the outage ends")
            assert Waiter(recorder, event("anna")).sum() == 2 * n
            wait_until(lambda: len(logged.errors()) > 1, "the end is logged")
            assert logged.errors()[0].startswith(BEGINS)
            assert "database is locked" in logged.errors()[0]
            assert logged.errors()[1].startswith(ENDS)
            assert logged.errors()[1].endswith(f", {1 + BATCH_EVENTS + 1 + 1} messages were not counted")


def test_the_end_need_not_wait_for_a_store_that_is_away(tmp_path: Path, logged: KeptLog) -> None:
    recorder = Recorder(SQLiteRepository(str(tmp_path / "missing" / "events.sqlite3")), ROWS)
    recorder.start()
    wait_until(lambda: recorder.state() != "up", "the outage begins")
    recorder.stop(PATIENCE_S)
    wait_until(
        lambda: not {"recorder", "reconnect"} & {thread.name for thread in threading.enumerate()}, "no thread is left"
    )
    assert len(logged.errors()) == 1


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


@pytest.mark.parametrize("faulty", ["insert", "sum_recipients", "check"])
def test_a_fault_in_the_store_leaves_nobody_without_an_answer(
    store: SQLiteStore, logged: KeptLog, faulty: str
) -> None:
    repository = FaultyRepository(store.repository, faulty)
    with recording(repository) as recorder:
        answer = Waiter(recorder, event("anna")).sum()
        assert answer == (1 if faulty == "check" else None)
        repository.is_mended = True
        assert Waiter(recorder, event("bert")).sum() == 1
    assert repository.faults == 1
    assert len(logged.errors()) == 1
    assert "a fault of ours" in logged.errors()[0]


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
            assert Waiter(recorder, event("anna")).sum() is None
            wait_until(lambda: repository.faults > 1, "it is looked for again and again")
        repository.is_mended = True
        wait_until(lambda: recorder.state() == "up", "the outage ends")
        assert Waiter(recorder, event("anna")).sum() == 2


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
    store.add([("anna", "", "", 1)] * 3, age_s=KEEP_DAYS * DAY_S + 60)
    store.add([("anna", "", "", 2)], age_s=KEEP_DAYS * DAY_S - 60)
    days = Days(2)
    purge_daily(store.repository, days)
    assert [row[3] for row in store.rows()] == [2]
    assert days.waited == [FIRST_PURGE_S, DAY_S, DAY_S]
    assert [line.text for line in logged.lines] == [
        f"purged {number} events older than {KEEP_DAYS} days" for number in (3, 0)
    ]


def test_a_purge_that_fails_is_tried_again_within_the_day(tmp_path: Path, logged: KeptLog) -> None:
    days = Days(1)
    purge_daily(SQLiteRepository(str(tmp_path / "missing" / "events.sqlite3")), days)
    assert days.waited == [FIRST_PURGE_S, RETRY_PURGE_S]
    assert [line.level for line in logged.lines] == ["warning"]
