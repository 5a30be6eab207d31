"""What runs a Recorder in a test: with its threads or by hand, over a store that fails when it is told to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers import wait_until
from stores import GENEROUS, Clock

from policyd import Event, Journal, Recorder, Repository, RepositoryUnavailable, SQLiteRepository, Usage

PATIENCE_S = 20  # for what comes at once, unless the machine is very busy


class Waiter:
    """Whoever records an event and waits for its sum."""

    def __init__(self, recorder: Recorder, recorded: Event) -> None:
        self.usages: list[Usage | None] = []
        recorder.record(recorded, self.usages.append)

    @property
    def answers(self) -> list[int | None]:
        """The sums that have been told so far: one, if all is well."""
        return [usage and usage.recipients for usage in self.usages]

    def sum(self) -> int | None:
        """Wait for the answer and return it."""
        wait_until(lambda: self.usages, "an answer", PATIENCE_S)
        return self.answers[0]


class BreakableRepository(SQLiteRepository):
    """An embedded store of which the methods named in `broken` fail: as if it were away, or with a fault of ours."""

    broken: frozenset[str] = frozenset()
    fault: type[Exception] = RepositoryUnavailable

    def __getattribute__(self, name: str) -> Any:
        if name != "broken" and name in self.broken:
            raise self.fault(f"{name} is broken")
        return super().__getattribute__(name)

    def count(self) -> int:
        return len(self.first())


AWAY = frozenset(("insert", "usages", "check"))


def tell(recorder: Recorder) -> None:
    """Do what the teller's thread does with what waits for it."""
    recorder._told.put(None)
    recorder.tell()


class ByHand:
    """A Recorder and its journal, driven step by step: no threads, and a clock that is set."""

    def __init__(self, repository: Repository, path: Path, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.journal = Journal(SQLiteRepository(str(path), self.clock), self.clock)
        self.recorder = Recorder(repository, self.journal, GENEROUS, self.clock)
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

    def turn(self) -> bool:
        """Do what the threads of the recorder and of the teller do once; return whether a slice was moved."""
        has_moved = self.recorder.turn()
        tell(self.recorder)
        return has_moved

    def minute(self) -> None:
        """Let a minute pass, after which the journal is looked at; then look for the store and replay all."""
        self.clock.now += 60
        self.turn()
        if self.recorder.down_s() is not None:
            self.recorder.look_for_store()
        while self.turn():
            pass

    def end(self) -> None:
        """What the end of the process does."""
        self.recorder.finish()
        self.journal.close()


def is_well(recorder: Recorder) -> bool:
    return recorder.down_s() is None and recorder.journal.waiting == 0


@contextlib.contextmanager
def recording(repository: Repository, journal: Path) -> Iterator[Recorder]:
    """Run a Recorder with its threads."""
    recorder = Recorder(repository, Journal(SQLiteRepository(str(journal))), GENEROUS)
    recorder.start()
    recorder.looked.wait(PATIENCE_S)
    try:
        yield recorder
    finally:
        recorder.stop(PATIENCE_S)
