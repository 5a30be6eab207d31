"""A store, relays and a clock, in a world with faults: what test_simulation.py drives.

The real Recorder, Journal and SQLiteRepository on real files, without threads; time is passed in.  What can happen are
methods of a World and of its relays.  After each turn of a recorder the answers are looked at, and at the end each
message: nothing is lost but what was in memory only when a process was killed, nothing is doubled but a batch per lost
answer and a slice per crash, and no answer is softer than what the process knew.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asking import tell
from stores import Clock, KeptLog

import policyd
from policyd import DAY_S, HOUR_S, MINUTE_S, Event, Journal, Recorder, RepositoryUnavailable, Settings, Usage

SLICE = 3  # rows that a replay moves at once: few, so that there are many slices
ANSWER_S, STOP_S = 3, 5  # within which a message is answered, and a process ends
SLACK_S = 2 * MINUTE_S  # what is remembered is remembered by the minute
ALWAYS = 10**6  # times
PLAIN, HOURLY = Settings(), Settings(hourquota=50)
INCIDENTS = ("HOLD overquota", "HOLD blocked", "REJECT overquota")

ALL = ("insert", "usages", "ask", "check")
STORE_FAULTS = {  # what can be wrong with the store, and what it then does not do
    "away": ALL,  # fails before it has done anything
    "refusing": ("insert",),  # read-only, though it says that it is ready
    "mute": ("usages", "ask"),  # the question fails after the insert
    "losing answers": ("insert",),  # commits, and the connection is cut
    "frozen": ALL,  # nothing until the deadline
    "waking up": ("insert",),  # the same, and then does what it was told when it is too late
    "slow": ALL,
}
DISK_FAULTS = {  # the same of the journal's disk
    "full": ("insert", "check", "forget"),
    "unreadable": ("insert", "check", "forget", "first"),
    "not deleting": ("forget",),
}
GONE = ("unmounted", "removed", "replaced by an empty one", "replaced by another one")  # its directory, its file


class Killed(BaseException):
    """The end of a process, in the middle of what it does."""


class Fault(NamedTuple):
    kind: str
    times: int = ALWAYS
    seconds: float = math.inf

    def left(self) -> Fault | None:
        return self._replace(times=self.times - 1) if self.times > 1 else None


def is_refused(event: Event) -> bool:
    """Tell whether the store refuses this row for its own sake, whenever it comes."""
    return event.sender.startswith("refused")


def recipients(events: Iterable[Event]) -> int:
    return sum(event.recipient_count or 0 for event in events)


def incidents(events: Iterable[Event]) -> set[str]:
    return {event.client_address for event in events if event.recipient_count is None}


def events_in(path: Path) -> Counter[Event]:
    if path.exists():
        with contextlib.closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.OperationalError):
            rows = connection.execute("SELECT sasl_username, sender, client_address, recipient_count FROM events")
            return Counter(Event(*row) for row in rows)
    return Counter()


class Store(policyd.SQLiteRepository):
    """The store, as one relay sees it."""

    def __init__(self, relay: Relay) -> None:
        super().__init__(str(relay.world.directory / "store"), relay.world.clock)
        self._relay = relay
        self._world = relay.world

    def _pass(self, method: str, deadline: float | None) -> str:
        """Take the time that it takes; return a fault that the caller is to act out, or raise RepositoryUnavailable."""
        relay = self._relay
        relay.step()
        self._world.wake_up()
        fault = relay.store_fault
        if fault is None or method not in STORE_FAULTS[fault.kind]:
            return ""
        relay.store_fault = fault.left()
        if fault.kind in ("slow", "frozen", "waking up") and deadline is not None:
            left = max(0.0, deadline - self._world.clock())
            if not relay.is_elsewhere:
                relay.spend(min(fault.seconds, left))
            if fault.seconds <= left:
                return ""
        if fault.kind in ("losing answers", "waking up"):
            return fault.kind
        raise RepositoryUnavailable(f"the store is {fault.kind}")

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        if times:
            self._relay.has_answered()
        refused = {n for n, event in enumerate(events) if is_refused(event)}
        taken = [event for event in events if not is_refused(event)]
        ts = times and [then for n, then in enumerate(times) if n not in refused]
        fault = self._pass("insert", deadline)
        if fault:
            self._world.permitted.update(taken)
        if fault == "waking up":
            self._world.late.append((taken, ts))
        else:
            self.commit(taken, ts)
        if fault:
            raise RepositoryUnavailable(f"the store is {fault}")
        self._relay.has_stored(events, taken, is_replay=times is not None)
        self._relay.step()
        return refused

    def commit(self, events: Sequence[Event], times: Sequence[int] | None) -> None:
        if events:
            super().insert(events, 0, times)
            self._world.copies.update(events)
            doubled = [event for event in events if self._world.copies[event] > 1 + self._world.permitted[event]]
            assert not doubled, f"doubled: {doubled}"

    def usages(self, events: Sequence[Event], settings: Settings, deadline: float) -> list[Usage]:
        self._pass("usages", deadline)
        usages = super().usages(events, settings, deadline)
        if not settings.needs_hour:  # MariaDB is not asked for it, then
            usages = [usage._replace(of_hour=0) for usage in usages]
        self._relay.told.update(zip(events, usages))
        return usages

    def ask(self, statement: str, arguments: Any, deadline: float | None = None) -> list[Any]:
        self._pass("ask", deadline)
        return super().ask(statement, arguments, deadline)

    def check(self, patience_s: float = 0) -> str:
        self._pass("check", self._world.clock() + patience_s)
        return super().check(patience_s)


class Disk(policyd.SQLiteRepository):
    """The journal's file, on a disk with faults."""

    def __init__(self, relay: Relay) -> None:
        super().__init__(str(relay.path), relay.wall_clock)
        self._relay = relay
        self._doing = ""

    def __getattribute__(self, name: str) -> Any:
        if name in DISK_FAULTS["unreadable"]:
            self._doing = name
        return super().__getattribute__(name)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        relay = self._relay
        relay.step()
        fault = relay.disk_fault
        if fault and self._doing in DISK_FAULTS[fault.kind]:
            relay.disk_fault = fault.left()
            self._leave()
            raise RepositoryUnavailable(f"{self.path}: {fault.kind}")
        with super()._connection() as connection:
            yield connection
        relay.step()

    def leave(self) -> list[policyd.Row]:
        """The process has seen that its file is gone, and saves what was in it."""
        fault, self._relay.disk_fault = self._relay.disk_fault, None  # that is of the file that is there
        rows = super().leave()
        self._relay.disk_fault = fault
        self._relay.removed.clear()
        self._relay.has_seen_it_gone = True
        return rows


class Relay:
    """A relay: its disk, its process, and what that process must know."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.directory = world.directory / name
        self.directory.mkdir()
        self.path = self.directory / "journal"
        self.aside = world.directory / f"{name}.aside"  # where the directory is while it is unmounted
        self.settings = PLAIN
        self.store_fault: Fault | None = None
        self.disk_fault: Fault | None = None
        self.ahead_s = 0.0  # the wall clock
        self.is_elsewhere = False  # is it another thread that asks the store?
        self.meanwhile: list[Event] = []  # what arrives while the store takes its time
        self._begin()

    def wall_clock(self) -> float:
        return self.world.clock() + self.ahead_s

    # the life of a process

    def _begin(self) -> None:
        clock = self.world.clock
        self.kill_in = self.look_in = math.inf  # steps
        self.asked: dict[Event, float] = {}  # with the time of arrival
        self.batch: dict[Event, float] = {}  # of those, in this turn
        self.answers: dict[Event, list[Usage | None]] = {}
        self.last: dict[str, int] = {}  # sum that a login was answered
        self.told: dict[Event, Usage] = {}  # by the store, in this turn
        self.answered_at: float | None = None  # in this turn
        self.is_stored = False  # what has come in this turn
        self.settled: list[Event] = []  # what this process knows to be in the store
        self.hourly_since = clock() if self.settings.needs_hour else math.inf
        # What waits in the journal: as the process knows; as it will when it can read the file; when it looks again.
        self.known: Counter[Event] = Counter()
        self.pending = events_in(self.path)
        self.unseen: Counter[Event] = Counter()
        self.is_gone_unseen = False
        self.removed: Counter[Event] = Counter()  # in a file that is gone and still open
        self.has_moved = False  # a slice, in the last turn
        self.has_seen_it_gone = True
        self.disk = Disk(self)
        self.journal = Journal(self.disk, clock)
        self.store = Store(self)
        self.recorder = Recorder(self.store, self.journal, self.settings, clock)

    def _end(self, is_killed: bool) -> None:
        """Account for what ends with a process, and begin the next one."""
        world, lines = self.world, len(self.world.log.lines)
        if not is_killed:
            began, self.meanwhile = world.clock(), []
            try:
                self.recorder.finish()
                assert world.clock() - began <= STOP_S, f"it takes {world.clock() - began} s to end"
            except Killed:
                is_killed = True
        may_be_lost = len(self.journal.kept) + sum(self.removed.values())
        if not is_killed:
            said = "\n".join(line.text for line in world.log.lines[lines:])
            may_be_lost = sum(map(int, re.findall(r"^(\d+) events are forgotten", said, re.MULTILINE)))
        self.close()
        world.owed.update({event: self for event, answer in self.answers.items() if answer and answer[0]})
        in_file = events_in(self.path)
        mine = {event for event, by in world.owed.items() if by is self and not is_refused(event)} - world.lost
        lost = mine - set(world.copies + in_file + events_in(self.aside / "journal"))
        assert len(lost) <= may_be_lost, f"lost: {lost}, of which {may_be_lost} may be"
        world.lost |= lost
        self._permit(in_file, SLICE)
        self._begin()

    def close(self) -> None:
        self.journal.close()
        self.store.close()

    def _permit(self, in_file: Counter[Event], most: int = ALWAYS) -> None:
        """Let what waits in a file, though the store has it, be counted twice."""
        twice = Counter(event for event in in_file if self.world.copies[event] > self.world.permitted[event])
        assert len(twice) <= most, f"more than a slice would be doubled: {list(twice)}"
        self.world.permitted += twice

    def step(self) -> None:
        """What each call to the store or the disk passes, before it does its work and after it."""
        self.kill_in -= 1
        if self.kill_in < 0:
            raise Killed
        if not self.is_elsewhere:
            self.look_in -= 1
            if self.look_in < 0:
                self.look_in = math.inf
                self._look()

    def _alive(self, act: Callable[[], None]) -> None:
        """Let the process do something; if it is killed meanwhile, there is a next one."""
        try:
            act()
        except Killed:
            self._end(is_killed=True)

    def terminate(self, ahead_s: float | None = None, is_looked: bool = True, is_killed: bool = False) -> None:
        """End the process in good order; the next one begins with a wall clock that may be ahead."""
        self._end(is_killed)
        if ahead_s is not None and ahead_s != self.ahead_s:
            self.ahead_s, self.world.is_ahead = ahead_s, True
        if is_looked:
            self.look()

    def kill(self) -> None:
        self.terminate(is_killed=True)

    def reload(self, settings: Settings) -> None:
        if settings.needs_hour and not self.settings.needs_hour:
            self.hourly_since = self.world.clock()
        self.settings = self.recorder.settings = settings

    # what a process does

    def send(self, *messages: tuple[str, int | str]) -> None:
        """Let messages (login, recipients) and incidents (login, which) arrive at once; the recorder takes a turn."""
        self._arrive(self.world.events(messages))
        self.turn()

    def send_meanwhile(self, *messages: tuple[str, int | str]) -> None:
        """Let messages arrive while the store takes its time the next time."""
        self.meanwhile += self.world.events(messages)

    def turn(self) -> None:
        self._alive(self._turn)

    def look(self) -> None:
        self._alive(self._look)
        self.turn()

    def _look(self) -> None:
        """Look for the store if it is away: in another thread, for which nobody waits."""
        if self.recorder.down_s() is not None:
            self.is_elsewhere = True
            try:
                self.recorder.look_for_store()
            finally:
                self.is_elsewhere = False

    def _arrive(self, events: Iterable[Event]) -> None:
        for event in events:
            self.world.sent.setdefault(event.sasl_username, {})[event] = self.asked[event] = self.world.clock()
            self.answers[event] = []
            self.recorder.record(event, self.answers[event].append)

    def spend(self, seconds: float) -> None:
        """Let time pass, in the middle of which arrives what is to arrive meanwhile; the watchdog sees who waits."""
        self.world.clock.now += seconds / 2
        meanwhile, self.meanwhile = self.meanwhile, []
        self._arrive(meanwhile)
        self.world.clock.now += seconds / 2
        waiting = {**self.asked, **(self.batch if self.answered_at is None else {})}
        longest_wait_s = self.world.clock() - min(waiting.values(), default=math.inf)
        assert self.recorder.longest_wait_s() >= longest_wait_s, "nobody sees that they wait"

    def has_answered(self) -> None:
        """By now the batch has been answered; what follows is the replay."""
        if self.answered_at is None:
            self.answered_at = self.world.clock()

    def has_stored(self, events: Sequence[Event], taken: Sequence[Event], is_replay: bool) -> None:
        """The process is about to know that the store has done with `events`."""
        self.is_stored = self.is_stored or not is_replay
        is_of_another_clock = is_replay and self.world.is_ahead  # too old then, or not old enough
        self.settled += [event for event in taken if not is_of_another_clock or self.known[event] > 0]
        for event in events if is_replay else ():
            others = (waits for waits in (self.pending, self.unseen) if waits[event] > 0 >= self.known[event])
            next(others, self.known)[event] -= 1

    def _turn(self) -> None:
        """Let the recorder's thread take turns until nobody waits."""
        while True:
            is_readable = not (self.disk_fault and self.disk_fault.kind == "unreadable")
            if self.is_gone_unseen:  # what was known of a file that could not be read ends when it is seen to be gone
                self.last.clear()
                self.is_gone_unseen = not (is_readable and self.directory.exists() and self.journal.is_due())
            if self.journal.is_due() and self.directory.exists():
                self.pending, self.unseen = self.pending + self.unseen, Counter()
                if is_readable and not self.world.is_ahead:
                    self.known, self.pending = self.known + self.pending, Counter()
            asked = self.batch = self.asked
            self.asked = {}
            self.told, self.is_stored, self.answered_at = {}, False, None
            waited = [*self.known.elements()]
            knew, lines = [*self.settled, *waited], len(self.world.log.lines)
            self.has_moved = self.recorder.turn()
            self.has_answered()
            tell(self.recorder)
            if not self.is_stored:
                self.known.update(list(asked))
            self._check(asked, knew, waited)
            self._check_log(lines)
            if not self.asked:
                return

    # what must be true

    def _check(self, asked: dict[Event, float], knew: list[Event], waited: list[Event]) -> None:
        """Look at the answers of a batch, of which the process `knew` something before, part of it in the journal."""
        assert self.answered_at is not None
        for event, arrived in asked.items():
            (usage,) = self.answers.pop(event)
            assert self.answered_at - arrived <= ANSWER_S, f"answered after {self.answered_at - arrived:.1f} s"
            if usage is None:
                assert is_refused(event)
                assert self.is_stored
                continue
            self.world.owed[event] = self
            knew.append(event)
            self._check_not_above(event, usage)
            self._check_not_below(event, usage, waited if event in self.told else knew, set(waited))

    def _sent(self, login: str, seconds: float) -> list[Event]:
        since = self.world.clock() - seconds
        return [event for event, sent in self.world.sent[login].items() if sent > since]

    def _check_not_above(self, event: Event, usage: Usage) -> None:
        """No answer is above the truth, which may be a day old when the store is away."""
        times = 1 if event in self.told and not self.journal.trouble else 2
        day, hour = (
            self._sent(event.sasl_username, math.inf if self.world.is_ahead else times * window + SLACK_S)
            for window in (DAY_S, HOUR_S)
        )
        # A server that wakes up stores as of then what was sent long before.
        late = [one for one in self.world.sent[event.sasl_username] for _ in range(self.world.permitted[one])]
        true = recipients([*day, *late])
        assert usage.recipients <= true, f"{usage} for {event}, and {true} is the truth"
        assert usage.incidents <= incidents([*day, *late])
        if self.settings.needs_hour:
            true = recipients([*hour, *late])
            assert usage.of_hour <= true, f"{usage} for {event}, and {true} is the truth of the hour"

    def _check_not_below(self, event: Event, usage: Usage, known: list[Event], waited: set[Event]) -> None:
        """No answer is softer than what the process knew, beside what the store has told."""
        login = event.sasl_username
        last, sent = self.last.get(login), self.world.sent[login]
        if any(map(is_refused, sent)):
            return  # what has been refused is not counted any more
        of_day, of_hour = set(self._sent(login, DAY_S - SLACK_S)), set(self._sent(login, HOUR_S - SLACK_S))
        told = self.told.get(event, policyd.NOTHING)
        least = told.recipients + recipients(one for one in known if one in of_day)
        assert usage.recipients >= least, f"{usage} for {event}, and {least} is known"
        assert usage.incidents >= told.incidents | incidents(one for one in known if one in of_day)
        if self.settings.needs_hour:
            in_hour = [one for one in known if one in of_hour and (one in waited or sent[one] > self.hourly_since)]
            least = told.of_hour + recipients(in_hour)
            assert usage.of_hour >= least, f"{usage} for {event}, and {least} of the hour is known"
        if last is not None and len(of_day) == len(sent):
            assert usage.recipients >= last + recipients([event]), f"{usage} for {event}, and before it was {last}"
        self.last[login] = usage.recipients

    def _check_log(self, lines: int) -> None:
        """An outage is not over while the journal may hold events; and no fault is ours."""
        for line in self.world.log.lines[lines:]:
            assert "Traceback" not in line.text, line.text
            if "UPDATING db: over" in line.text:
                waits = self.known + self.pending + events_in(self.path) - self.unseen
                waits = [event for event in waits if not is_refused(event)]  # that would be so again
                assert not waits, f"the outage was called over, and {waits} waits"

    # the disk

    def break_disk(self, kind: str, times: int = ALWAYS) -> None:
        if kind in DISK_FAULTS:
            self.disk_fault = Fault(kind, times)
        elif self.directory.exists():
            self._take_away(is_for_ever=kind != "unmounted")
            if kind == "unmounted":
                self.directory.rename(self.aside)
                return
            for file in self.directory.iterdir():
                file.unlink()
            if kind != "removed":
                self._put_another(5 if kind == "replaced by another one" else 0)

    def _take_away(self, is_for_ever: bool) -> None:
        """Account for what was in a file that is about to go: what the process has open is not lost."""
        in_file = events_in(self.path)
        is_open = bool(self.disk._connections) and not self.disk.is_gone()
        self.has_seen_it_gone = not is_open
        if is_open:
            self.removed += in_file
            return
        self.known, self.pending, self.unseen = self.known - in_file, self.pending - in_file, self.unseen - in_file
        self.last.clear()
        self.is_gone_unseen = True
        if is_for_ever:
            self.world.lost |= set(in_file) - set(self.world.copies)

    def _put_another(self, events: int) -> None:
        """Put a file in place that has so many events of another time."""
        others = self.world.events([("anna", 1)] * events)
        file = policyd.SQLiteRepository(str(self.path), self.wall_clock)
        file.insert(others, 0)
        file.close()
        self.unseen.update(others)
        self.world.owed.update(dict.fromkeys(others, self))
        self.world.sent.setdefault("anna", {}).update(dict.fromkeys(others, self.world.clock()))

    def mend_disk(self) -> None:
        self.disk_fault = None
        if not self.directory.exists():
            self.aside.rename(self.directory)
            back = events_in(self.path)
            if self.has_seen_it_gone:
                self._permit(back)
                self.world.permitted.update(event for event in back if self.known[event] > 0)
                self.unseen.update(event for event in back if not self.world.copies[event])
            self.removed -= back


class World:
    def __init__(self, relays: int = 1, is_looked: bool = True) -> None:
        assert isinstance(policyd.log, KeptLog)
        self.log = policyd.log
        self.log.lines.clear()
        self.clock = Clock()
        self.directory = Path(tempfile.mkdtemp(prefix="pd", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.sent: dict[str, dict[Event, float]] = {}  # of each login, and when
        self.owed: dict[Event, Relay] = {}  # what has been answered, and by whom
        self.copies: Counter[Event] = Counter()  # in the store
        self.permitted: Counter[Event] = Counter()  # copies beyond the first
        self.lost: set[Event] = set()  # as may be
        self.late: list[tuple[Sequence[Event], Sequence[int] | None]] = []  # what the store does when it wakes up
        self.is_ahead = False  # has a relay's clock ever been ahead?
        self._numbers = 0
        self.relays = [Relay(self, f"relay{n}") for n in range(relays)]
        for relay in self.relays if is_looked else ():
            relay.look()

    def __getitem__(self, relay: int) -> Relay:
        return self.relays[relay % len(self.relays)]

    def __enter__(self) -> World:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self.end()
        finally:
            for relay in self.relays:
                relay.close()
            shutil.rmtree(self.directory)

    def events(self, messages: Iterable[tuple[str, int | str]]) -> list[Event]:
        """Return messages, each with a sender of its own, and those incidents that there have not been yet."""
        events = []
        for login, what in messages:
            self._numbers += 1
            name = "odd" if login == "refused" else login  # of whose messages some are refused
            if isinstance(what, int):
                events.append(Event(name, f"{login}{self._numbers}@example.org", "192.0.2.1", what))
            elif Event(name, "", what, None) not in self.sent.get(name, ()):
                events.append(Event(name, "", what, None))
        return list(dict.fromkeys(events))

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        for relay in self.relays:
            relay.turn()

    def break_store(self, kind: str, times: int = ALWAYS, seconds: float = math.inf, relay: int | None = None) -> None:
        for one in self.relays if relay is None else [self[relay]]:
            one.store_fault = Fault(kind, times, seconds)

    def mend_store(self) -> None:
        for relay in self.relays:
            relay.store_fault = None

    def wake_up(self) -> None:
        """Let the store do what it was told while it was frozen."""
        late, self.late = self.late, []
        for events, times in late:
            self[0].store.commit(events, times)

    def end(self) -> None:
        """Mend everything, let ten minutes pass without a restart, look at each message; and again after a restart."""
        self.mend_store()
        self.wake_up()
        for relay in self.relays:
            relay.kill_in = relay.look_in = math.inf
            relay.mend_disk()
        for is_again in (False, True):
            for relay in self.relays if is_again else ():
                relay.terminate()
            for _ in range(10):
                self.wait(MINUTE_S)
                for relay in self.relays:
                    self._replay(relay)
            for relay in self.relays:
                assert (relay.recorder.down_s(), relay.journal.waiting, relay.journal.trouble) == (None, 0, "")
                assert not events_in(relay.path), f"left in the journal: {events_in(relay.path)}"
            stored = events_in(self.directory / "store")
            assert stored == +self.copies
            lost = {event for event in self.owed if not stored[event] and not is_refused(event)} - self.lost
            assert not lost, f"lost: {lost}"
            doubled = {event for event, times in stored.items() if times > 1 + self.permitted[event]}
            assert not doubled, f"doubled: {doubled}"
        with contextlib.closing(sqlite3.connect(self.directory / "store")) as store:
            newest = store.execute("SELECT coalesce(max(ts), 0) FROM events").fetchone()[0]
        assert newest <= self.clock() * 1000, "a row has a time to come"

    def _replay(self, relay: Relay) -> None:
        relay.look()
        turns = 0
        while relay.has_moved:
            relay.turn()
            turns += 1
            assert turns < 100, "the replay never ends"
