"""What runs a Recorder in a test: with its threads or by hand, over a store that fails when it is told to."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stores import GENEROUS, Clock

from policyd import Event, Journal, Recorder, Repository, RepositoryUnavailable, SQLiteRepository, Usage

PATIENCE_S = 20  # for what comes at once, unless the machine is very busy


class Waiter:
    """Whoever records an event and waits for its sum."""

    def __init__(self, recorder: Recorder, recorded: Event) -> None:
        self._answered = threading.Event()
        self.usages: list[Usage | None] = []
        recorder.record(recorded, self._on_usage)

    def _on_usage(self, usage: Usage | None) -> None:
        self.usages.append(usage)
        self._answered.set()

    @property
    def answers(self) -> list[int | None]:
        """The sums that have been told so far: one, if all is well."""
        return [usage and usage.recipients for usage in self.usages]

    def sum(self) -> int | None:
        """Wait for the answer and return it."""
        assert self._answered.wait(PATIENCE_S), "nobody answered"
        return self.answers[0]


class BreakableRepository(SQLiteRepository):
    """An embedded store of which the methods named in `broken` fail: as if it were away, or with a fault of ours."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path, clock)
        self.broken: frozenset[str] = frozenset()
        self.fault: type[Exception] = RepositoryUnavailable
        for method in AWAY:
            setattr(self, method, self._breakable(method, getattr(self, method)))

    def _breakable(self, method: str, sound: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if method in self.broken:
                raise self.fault(f"{method} is broken")
            return sound(*arguments)

        return call


AWAY = frozenset(("insert", "usages", "check"))


@contextlib.contextmanager
def written_by_another(path: Path) -> Iterator[None]:
    """Hold the lock of an embedded store, so that nobody else can write."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


class ByHand:
    """A Recorder and its journal, driven step by step: no threads, and a clock that is set."""

    def __init__(self, repository: Repository, path: Path, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.journal = Journal(str(path), self.clock, self.clock)
        self.recorder = Recorder(repository, self.journal, GENEROUS, clock=self.clock)
        self.recorder.look_for_store()

    def usages(self, *events: Event) -> list[Usage | None]:
        """Record the events, which come in one batch, and return what is told."""
        waiters = [Waiter(self.recorder, each) for each in events]
        self.turn()
        assert all(len(waiter.usages) == 1 for waiter in waiters), [waiter.usages for waiter in waiters]
        return [waiter.usages[0] for waiter in waiters]

    def sums(self, *events: Event) -> list[int | None]:
        """The same, but the recipients only."""
        return [usage and usage.recipients for usage in self.usages(*events)]

    def turn(self) -> None:
        """Do what the threads of the recorder and of the teller do once."""
        self.recorder.turn()
        self.recorder.tell_next()

    def minute(self) -> None:
        """Let a minute pass, after which the journal is looked at; then look for the store and replay all."""
        self.clock.now += 60
        self.turn()
        if self.recorder.down_s() is not None:
            self.recorder.look_for_store()
        while self.journal.can_move() and self.recorder.down_s() is None:
            self.turn()
        self.turn()

    def end(self) -> None:
        """What the end of the process does."""
        self.recorder.finish()
        self.journal.close()


def is_well(recorder: Recorder) -> bool:
    """Tell whether the store is there, and has all that the journal had."""
    return recorder.down_s() is None and recorder.journal.waiting == 0


@contextlib.contextmanager
def recording(repository: Repository, journal: Path | None = None) -> Iterator[Recorder]:
    """Run a Recorder with its threads, with this journal or with one of its own."""
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(repository, Journal(str(journal or Path(directory, "journal.sqlite3"))), GENEROUS)
        recorder.start()
        try:
            yield recorder
        finally:
            recorder.stop(PATIENCE_S)
