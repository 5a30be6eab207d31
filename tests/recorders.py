"""What runs a Recorder in a test: whoever waits for a sum, and stores that wait or fail when they are told to."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

from stores import WHOLE

from policyd import Event, Journal, Recorder, Repository, RepositoryUnavailable, Scope, SQLiteRepository, Usage

PATIENCE_S = 20  # for what comes at once, unless the machine is very busy


class Waiter:
    """Whoever records an event and waits for its sum."""

    def __init__(self, recorder: Recorder, recorded: Event) -> None:
        self._answered = threading.Event()
        self.answers: list[int | None] = []
        recorder.record(recorded, self._on_sum)

    def _on_sum(self, usage: Usage | None) -> None:
        self.answers.append(usage and usage.recipients)
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

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        self.batches.append(events)
        self.waiting.set()
        assert self.gate.wait(PATIENCE_S)
        return self._store.insert(events, deadline, times)

    def sum_recipients(self, events: Sequence[Event], scope: Scope, deadline: float) -> list[Usage]:
        return self._store.sum_recipients(events, scope, deadline)

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


class BreakableRepository(SQLiteRepository):
    """An embedded store of which the methods named in `broken` fail as if it were away."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.broken: frozenset[str] = frozenset()
        self.checks = 0

    def _pass(self, method: str) -> None:
        if method in self.broken:
            raise RepositoryUnavailable(f"{method} is broken")

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        self._pass("insert")
        if times:
            self._pass("replay")
        return super().insert(events, deadline, times)

    def sum_recipients(self, events: Sequence[Event], scope: Scope, deadline: float) -> list[Usage]:
        self._pass("sum_recipients")
        return super().sum_recipients(events, scope, deadline)

    def check(self, deadline: float) -> str:
        self.checks += 1
        self._pass("check")
        return super().check(deadline)


AWAY = frozenset(("insert", "sum_recipients", "check"))


def is_well(recorder: Recorder) -> bool:
    """Tell whether the store is there, and has all that the journal had."""
    return recorder.down_s() is None and recorder.journaled == 0


@contextlib.contextmanager
def recording(repository: Repository, journal: Path | None = None) -> Iterator[Recorder]:
    """Run a Recorder, with this journal or with one of its own."""
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(repository, Journal(str(journal or Path(directory, "journal.sqlite3"))), WHOLE)
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
    first = Waiter(recorder, Event("the first", "s@example.org", "192.0.2.1", 1))
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
