"""The Recorder: one thread that counts for all others, and always has an answer for them.

What becomes of a batch when time or the store runs out is in test_simulation.py.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from recorders import PATIENCE_S, BreakableRepository, ByHand, Waiter, is_well, recording
from servers import wait_until
from stores import KeptLog, event

from policyd import BATCH_EVENTS, Journal, SQLiteRepository, Usage


@pytest.fixture
def store(tmp_path: Path) -> BreakableRepository:
    """An embedded store."""
    return BreakableRepository(str(tmp_path / "events.sqlite3"))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal.sqlite3"


def test_all_that_waits_is_committed_together_up_to_the_limit(
    store: BreakableRepository, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand, batches, insert, number = ByHand(store, journal), [], store.insert, 2 * BATCH_EVENTS + 88
    monkeypatch.setattr(store, "insert", lambda events, *rest: batches.append(len(events)) or insert(events, *rest))
    waiters = [Waiter(hand.recorder, event("anna")) for _ in range(number)]
    for _ in range(3):
        hand.turn()
    assert [waiter.answers for waiter in waiters] == [[n] for n in range(1, number + 1)]
    assert batches == [BATCH_EVENTS, BATCH_EVENTS, 88]


def test_the_end_does_not_wait_for_ever(
    store: BreakableRepository, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(store, "insert", lambda *_: waiting.set() or (gate.wait(PATIENCE_S) and set()))
    with recording(store, journal) as recorder:
        first = Waiter(recorder, event("anna"))
        assert waiting.wait(PATIENCE_S)
        recorder.stop(0.05)
        assert first.answers == []
        gate.set()


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_store_that_is_away_delays_the_end_not(
    store: BreakableRepository, journal: Path, logged: KeptLog, comes_back: bool
) -> None:
    """Nor does one that is found in this very moment."""
    store.broken = frozenset(("check",))
    with recording(store, journal) as recorder:
        assert Waiter(recorder, event("anna", 3)).sum() == 3
        if comes_back:
            store.broken = frozenset()
        began = time.monotonic()
        recorder.stop(PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S / 2
        assert not any(thread.is_alive() for thread in recorder.threads)
    left = Journal(SQLiteRepository(str(journal)))
    left.look()
    assert left.waiting + store.count() == 1


def test_a_fault_of_one_who_is_told_harms_no_other(store: BreakableRepository, journal: Path, logged: KeptLog) -> None:
    told: list[Usage | None] = []

    def stumble(usage: Usage | None) -> None:
        told.append(usage)
        if usage:
            raise ValueError("a fault of ours")

    hand = ByHand(store, journal)
    before = Waiter(hand.recorder, event("anna"))
    hand.recorder.record(event("anna"), stumble)
    after = Waiter(hand.recorder, event("anna"))
    hand.turn()
    assert [before.answers, after.answers] == [[1], [3]]
    assert told[1:] == [None]  # so that the client has an answer
    assert hand.sums(event("anna")) == [4]
    (error,) = logged.errors()
    assert "a fault of ours" in error


@pytest.mark.usefixtures("no_delay")
@pytest.mark.parametrize("faulty", ["insert", "usages", "check"])
def test_a_fault_in_the_store_leaves_nobody_without_an_answer_and_does_not_end_the_search(
    store: BreakableRepository, journal: Path, logged: KeptLog, faulty: str
) -> None:
    store.fault, store.broken = ValueError, frozenset([faulty])
    with recording(store, journal) as recorder:
        assert [Waiter(recorder, event("anna")).sum() for _ in range(3)] == [1, 2, 3]
        store.broken = frozenset()
        wait_until(lambda: is_well(recorder) and " over after " in logged.errors()[-1], "it is looked for and found")
        assert Waiter(recorder, event("anna")).sum() == 4
    assert store.count() == 4
    assert all(f"ValueError: {faulty} is broken" in error for error in logged.errors() if "over after" not in error)
    assert "Traceback" in logged.errors()[0]
