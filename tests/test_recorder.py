"""The Recorder: one thread that counts for all others, and always has an answer for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from recorders import PATIENCE_S, BreakableRepository, ByHand, GatedRepository, Waiter, is_well, recording, shut
from servers import Database, wait_until
from stores import Clock, KeptLog, MariaStore, SQLiteStore, event

from policyd import BATCH_DEADLINE_S, BATCH_EVENTS, LEAST_LEFT_S, Event, Journal, Usage


@pytest.fixture
def embedded(tmp_path: Path) -> SQLiteStore:
    """An embedded store."""
    return SQLiteStore(tmp_path / "events.sqlite3")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal.sqlite3"


# --- counting ---


def test_all_that_waits_is_committed_together_up_to_the_limit(embedded: SQLiteStore) -> None:
    gated = GatedRepository(embedded.repository)
    with recording(gated) as recorder:
        with shut(gated, recorder):
            waiters = [Waiter(recorder, event("anna")) for _ in range(2 * BATCH_EVENTS + 88)]
        assert [waiter.sum() for waiter in waiters] == list(range(1, 2 * BATCH_EVENTS + 88 + 1))
    assert [len(batch) for batch in gated.batches] == [1, BATCH_EVENTS, BATCH_EVENTS, 88]


@pytest.mark.mariadb
def test_one_refused_event_of_a_batch_is_answered_without_a_sum(database: Database, logged: KeptLog) -> None:
    database.query("ALTER TABLE events MODIFY recipient_count TINYINT")
    gated = GatedRepository(MariaStore(database).repository)
    with recording(gated) as recorder:
        with shut(gated, recorder):
            waiters = [Waiter(recorder, event("anna", n)) for n in (1, 300, 2, 3, 300, 4)]
        assert [waiter.sum() for waiter in waiters] == [1, None, 3, 6, None, 10]
        assert Waiter(recorder, event("anna", 300)).sum() is None  # also alone
        assert is_well(recorder)
    assert len(logged.errors()) == 3


# --- time ---


class Timed(BreakableRepository):
    """A store that remembers the deadlines it was given, and takes its time."""

    def __init__(self, path: str, clock: Clock) -> None:
        super().__init__(path, clock)
        self.takes_s = 0.0
        self.deadlines: list[float] = []
        self.clock = clock

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        self.deadlines.append(deadline)
        self.clock.now += self.takes_s
        return super().insert(events, deadline, times)


@pytest.fixture
def timed(tmp_path: Path) -> Timed:
    """A store that takes its time."""
    return Timed(str(tmp_path / "events.sqlite3"), Clock())


def test_the_deadline_of_a_batch_counts_from_the_arrival_of_its_oldest_event(timed: Timed, journal: Path) -> None:
    """Also for those who wait behind a slow batch: nobody gets a second time as much."""
    hand = ByHand(timed, journal, clock=timed.clock)
    arrived = hand.clock.now
    waiters = [Waiter(hand.recorder, event("anna"))]
    hand.clock.now += 0.3
    waiters.append(Waiter(hand.recorder, event("anna")))
    hand.clock.now += 0.3
    hand.turn()
    late = hand.clock.now
    waiters.append(Waiter(hand.recorder, event("bert")))
    hand.clock.now += 2
    hand.turn()
    assert timed.deadlines == [pytest.approx(arrived + BATCH_DEADLINE_S), pytest.approx(late + BATCH_DEADLINE_S)]
    assert [waiter.answers for waiter in waiters] == [[1], [2], [1]]


def test_a_batch_that_has_waited_too_long_is_journaled_and_the_store_is_not_called_away(
    timed: Timed, journal: Path, logged: KeptLog
) -> None:
    """An INSERT without time would be given up, and come in all the same, beside its journaled copy."""
    hand = ByHand(timed, journal, clock=timed.clock)
    assert hand.sums(event("anna", 1)) == [1]
    timed.takes_s = 2.5
    before = Waiter(hand.recorder, event("anna", 1))
    hand.recorder.turn()  # takes too long for the next one, which has come meanwhile
    behind = Waiter(hand.recorder, event("anna", 3))
    hand.clock.now += BATCH_DEADLINE_S - LEAST_LEFT_S + 0.01
    timed.takes_s = 0
    hand.turn()
    assert [before.answers, behind.answers] == [[2], [5]]
    assert hand.recorder.down_s() is None
    assert hand.journal.waiting == 0  # by now: it has been replayed at once
    assert hand.sums(event("anna", 5)) == [10]
    assert sum(each.recipient_count for _, _, each in timed.first(-1)) == 10
    assert [line.partition(";")[0] for line in logged.errors()] == [
        "ERROR while UPDATING db: the database is too slow: events have waited for more than 2 s",
        "ERROR while UPDATING db: over after 0 s, 1 events replayed",
    ]


@pytest.mark.parametrize("where", ["in a batch", "behind a replay", "behind an answer"])
def test_the_wait_of_the_event_that_waits_longest_can_be_watched(
    embedded: SQLiteStore, journal: Path, where: str
) -> None:
    gated = GatedRepository(embedded.repository)
    answering = threading.Event()
    if where == "behind a replay":
        Journal(str(journal)).insert([event("anna")])
        gated.gate.clear()
    with recording(gated, journal) as recorder:
        if where == "behind a replay":
            assert gated.waiting.wait(PATIENCE_S)
        elif where == "in a batch":
            gated.gate.clear()
        else:
            recorder.record(event("anna"), lambda usage: answering.wait(PATIENCE_S) and None)
        waiter = Waiter(recorder, event("anna"))
        wait_until(lambda: recorder.longest_wait_s() > 0.05, "the wait grows")
        gated.gate.set()
        answering.set()
        waiter.sum()
        wait_until(lambda: recorder.longest_wait_s() == 0, "nobody waits")


# --- the end ---


def test_the_end_does_not_wait_for_ever(embedded: SQLiteStore) -> None:
    gated = GatedRepository(embedded.repository)
    with recording(gated) as recorder, shut(gated, recorder) as first:
        recorder.stop(0.05)
        assert first.answers == []


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_store_that_is_away_delays_the_end_not(
    tmp_path: Path, journal: Path, logged: KeptLog, comes_back: bool
) -> None:
    """Nor does one that is found in this very moment."""
    store = BreakableRepository(str(tmp_path / "events.sqlite3"))
    store.broken = frozenset(("check",))
    with recording(store, journal) as recorder:
        assert Waiter(recorder, event("anna", 3)).sum() == 3
        if comes_back:
            store.broken = frozenset()
        began = time.monotonic()
        recorder.stop(PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S / 2
        assert not any(thread.is_alive() for thread in recorder.threads)
    assert Journal(str(journal)).waiting + len(store.first(-1)) <= 1
    looked = Journal(str(journal))
    looked.look()
    assert looked.waiting + len(store.first(-1)) == 1


# --- faults of ours ---


def test_a_fault_of_one_who_is_told_harms_no_other(embedded: SQLiteStore, journal: Path, logged: KeptLog) -> None:
    told: list[Usage | None] = []

    def stumble(usage: Usage | None) -> None:
        told.append(usage)
        if usage:
            raise ValueError("a fault of ours")

    hand = ByHand(embedded.repository, journal)
    before = Waiter(hand.recorder, event("anna"))
    hand.recorder.record(event("anna"), stumble)
    after = Waiter(hand.recorder, event("anna"))
    hand.turn()
    assert [before.answers, after.answers] == [[1], [3]]
    assert told[1:] == [None]  # so that the client has an answer
    assert hand.sums(event("anna")) == [4]
    assert len(logged.errors()) == 1
    assert "a fault of ours" in logged.errors()[0]


@pytest.mark.parametrize("faulty", ["insert", "usages", "check"])
def test_a_fault_in_the_store_leaves_nobody_without_an_answer_and_does_not_end_the_search(
    tmp_path: Path, journal: Path, logged: KeptLog, faulty: str
) -> None:
    store = BreakableRepository(str(tmp_path / "events.sqlite3"))
    store.fault, store.broken = ValueError, frozenset([faulty])
    with recording(store, journal) as recorder:
        assert [Waiter(recorder, event("anna")).sum() for _ in range(3)] == [1, 2, 3]
        looks = store.checks
        wait_until(lambda: store.checks > looks, "it is looked for again")
        store.broken = frozenset()
        wait_until(lambda: is_well(recorder) and " over after " in logged.errors()[-1], "it is found")
        assert Waiter(recorder, event("anna")).sum() == 4
    assert len(store.first(-1)) == 4
    assert all(f"ValueError: {faulty} is broken" in error for error in logged.errors()[:-1])
