"""The Recorder, which always has an answer, and its journal: what the store cannot take is kept, counts, is replayed.

What several faults at once do to them, and what becomes of a batch when time runs out, is in test_simulation.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import BEGINS, tell
from servers import wait_until
from stores import GENEROUS, BreakableRepository, Clock, KeptLog, MariaStore, count, event, incident, on_stores, soon

from policyd import BATCH_EVENTS, DAY_S, HOUR_S, NOTHING, Event, Journal, LastKnown, Recorder, SQLiteRepository, Usage

ENDS = f"{BEGINS}over after "
PATIENCE_S = 20  # for what comes at once, unless the machine is very busy
TIME_ZONES = {"summer to winter": (7200, 3600), "winter to summer": (3600, 7200)}


class Waiter:
    """Whoever records an event and waits for its sum; `answers` are those told so far: one, if all is well."""

    def __init__(self, recorder: Recorder, recorded: Event) -> None:
        self.answers: list[int | None] = []
        recorder.record(recorded, lambda usage: self.answers.append(usage and usage.recipients))

    def sum(self) -> int | None:
        """Wait for the answer and return it."""
        return wait_until(lambda: self.answers, "an answer", PATIENCE_S)[0]


class ByHand:
    """A Recorder and its journal, driven step by step: no threads, and a clock that is set."""

    def __init__(self, repository: BreakableRepository, path: Path) -> None:
        self.clock = repository.clock
        self.journal = Journal(SQLiteRepository(str(path), self.clock), self.clock)
        self.recorder = Recorder(repository, self.journal, GENEROUS, self.clock)
        self.recorder.look_for_store()

    def sums(self, *events: Event) -> list[int | None]:
        """Record the events, which come in one batch, and return the sums that are told."""
        waiters = [Waiter(self.recorder, each) for each in events]
        self.turn()
        return [answer for (answer,) in (waiter.answers for waiter in waiters)]

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


@contextlib.contextmanager
def recording(repository: BreakableRepository, journal: Path) -> Iterator[Recorder]:
    """Run a Recorder with its threads."""
    recorder = Recorder(repository, Journal(SQLiteRepository(str(journal))), GENEROUS)
    recorder.start()
    recorder.looked.wait(PATIENCE_S)
    try:
        yield recorder
    finally:
        recorder.stop(PATIENCE_S)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def breakable(tmp_path: Path) -> BreakableRepository:
    """An embedded store; its time, which is that of all that is driven by hand, begins now."""
    return BreakableRepository(tmp_path / "events.sqlite3", Clock(time.time()))


def test_all_that_waits_is_committed_together_up_to_the_limit(
    breakable: BreakableRepository, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand, batches, insert, number = ByHand(breakable, path), [], breakable.insert, 2 * BATCH_EVENTS + 88
    monkeypatch.setattr(breakable, "insert", lambda events, *rest: batches.append(len(events)) or insert(events, *rest))
    waiters = [Waiter(hand.recorder, event("anna")) for _ in range(number)]
    for _ in range(3):
        hand.turn()
    assert [waiter.answers for waiter in waiters] == [[n] for n in range(1, number + 1)]
    assert batches == [BATCH_EVENTS, BATCH_EVENTS, 88]


def test_the_end_does_not_wait_for_ever(
    breakable: BreakableRepository, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(breakable, "insert", lambda *_: waiting.set() or (gate.wait(PATIENCE_S) and set()))
    with recording(breakable, path) as recorder:
        first = Waiter(recorder, event("anna"))
        assert waiting.wait(PATIENCE_S)
        recorder.stop(0.05)
        assert first.answers == []
        gate.set()


@pytest.mark.parametrize("check", ["fails", "succeeds", "hangs"])
def test_a_store_that_is_away_delays_the_end_not(
    breakable: BreakableRepository, path: Path, logged: KeptLog, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """Nor does one that is found in this very moment."""
    breakable.broken = frozenset(("check",))
    with recording(breakable, path) as recorder:
        assert Waiter(recorder, event("anna", 3)).sum() == 3
        breakable.broken = breakable.broken if check == "fails" else frozenset()
        if check == "hangs":
            asked = threading.Event()
            monkeypatch.setattr(breakable, "check", lambda *_: asked.set() or time.sleep(PATIENCE_S))
            assert asked.wait(PATIENCE_S)
        began = time.monotonic()
        recorder.stop(PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S / 2
        assert not any(thread.is_alive() for thread in recorder.threads[:2])
    left = Journal(SQLiteRepository(str(path)))
    left.look()
    assert left.waiting + breakable.count() == 1


def test_a_fault_of_one_who_is_told_harms_no_other(breakable: BreakableRepository, path: Path, logged: KeptLog) -> None:
    told: list[Usage | None] = []

    def stumble(usage: Usage | None) -> None:
        told.append(usage)
        if usage:
            raise ValueError("a fault of ours")

    hand = ByHand(breakable, path)
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
    breakable: BreakableRepository, path: Path, logged: KeptLog, faulty: str
) -> None:
    breakable.fault, breakable.broken = ValueError, frozenset([faulty])
    with recording(breakable, path) as recorder:
        assert [Waiter(recorder, event("anna")).sum() for _ in range(3)] == [1, 2, 3]
        breakable.broken = frozenset()
        wait_until(lambda: logged.errors()[-1].startswith(ENDS), "it is looked for and found")
        assert Waiter(recorder, event("anna")).sum() == 4
    assert breakable.count() == 4
    assert all(f"ValueError: {faulty} is broken" in error for error in logged.errors() if "over after" not in error)
    assert "Traceback" in logged.errors()[0]


def filled(path: Path, clock: Clock, *events: Event) -> Journal:
    """Return a journal of an earlier outage."""
    journal = Journal(SQLiteRepository(str(path), clock), clock)
    journal.look()
    journal.insert(events)
    return journal


@pytest.mark.parametrize("instead", ["a directory", "no database", "a lost sector"])
def test_unreadable_is_not_empty(path: Path, breakable: BreakableRepository, logged: KeptLog, instead: str) -> None:
    """The outage is not over while the file may hold events; they count and go to the store once it can be read."""
    filled(path, breakable.clock, event("anna", 1500)).close()
    aside = path.rename(path.with_name("aside"))
    found = b"what a restore has left\n" * 99 if instead == "no database" else aside.read_bytes()[:-512] + bytes(512)
    path.mkdir() if instead == "a directory" else path.write_bytes(found)
    hand = ByHand(breakable, path)
    assert hand.sums(event("anna")) == [1]
    hand.minute()
    assert not hand.journal.is_empty()
    assert not any(error.startswith(ENDS) for error in logged.errors())
    path.rmdir() if instead == "a directory" else path.unlink()
    aside.rename(path)
    hand.minute()
    assert hand.sums(event("anna")) == [1502]
    assert (hand.recorder.down_s(), hand.journal.waiting) == (None, 0)
    assert breakable.count() == 3


def test_what_is_known_of_a_login_grows_and_is_forgotten_when_its_time_is_over() -> None:
    """The sum and the incidents after a day, the hour's after an hour."""
    known = LastKnown()
    used = Usage(7, 5, frozenset(["HOLD places"]))
    hour, day = 1000 * HOUR_S, 1000 * DAY_S
    known.put("anna", used, 1000)
    assert known.get("anna", 1000 + hour - 1) == used
    assert known.get("anna", 1000 + hour) == known.get("anna", 1000 + day - 1) == used._replace(of_hour=0)
    assert known.get("anna", 1000 + day) == known.get("bert", 1000) == NOTHING
    rows = [(0, 2000 - age, event("anna", 2)) for age in (0, hour // 2, hour + 60_000, day + 60_000)]
    known.grow([*rows, (0, 2000, incident("anna", "HOLD blocked")), (0, 2000, event("bert", 3))])
    assert known.get("anna", 2000) == Usage(13, 9, frozenset(["HOLD places", "HOLD blocked"]))
    assert known.get("bert", 2000) == Usage(3, 3)
    assert known.get("bert", 2000).incidents is NOTHING.incidents  # not 216 bytes for each minute of a login
    known.grow(rows[:2], sign=-1)
    assert known.get("anna", 2000).recipients == 9


def test_the_last_100_000_logins_are_known() -> None:
    known = LastKnown()
    for n in range(100_000):
        known.put(f"user{n}", Usage(5), 0)
    known.put("user0", Usage(6), 0)
    known.put("one more", Usage(7), 0)
    assert [known.get(login, 1) for login in ("user0", "user1", "user2", "one more")] == [*map(Usage, (6, 0, 5, 7))]


def test_who_records_waits_for_a_slice_of_the_purge_but_for_nobody_in_an_outage(path: Path) -> None:
    store, journal = SQLiteRepository(f"{path}.store"), SQLiteRepository(str(path))
    Journal(journal).look()
    assert [each.ask("PRAGMA busy_timeout", {}) for each in (store, journal)] == [[(1000,)], [(100,)]]  # ms


def test_an_outage_is_one_error_at_the_beginning_and_one_at_the_end(
    path: Path, breakable: BreakableRepository, logged: KeptLog
) -> None:
    """However often the store says that it is ready, and refuses; or fails in the replay."""
    filled(path, breakable.clock)
    hand = ByHand(breakable, path)
    for n in range(2):
        logged.lines.clear()
        breakable.broken = frozenset(["insert"])
        for reached in range(1, 4):
            assert hand.sums(event("anna"), event("bert")) == [3 * n + reached] * 2
            hand.minute()
        breakable.broken = frozenset()
        hand.minute()
        begin = f"{BEGINS}insert is broken; counting in {path} until it is back"
        assert logged.errors() == [begin, f"{ENDS}240 s, 6 events replayed"]
    assert (breakable.count(), hand.journal.known._usages) == (12, {})  # or the memory would fill, outage by outage


def test_the_next_outage_is_told_of_though_a_broken_journal_keeps_the_last_one(
    path: Path, breakable: BreakableRepository, logged: KeptLog
) -> None:
    path.mkdir()
    hand = ByHand(breakable, path)
    for n in (1, 2):
        breakable.broken = frozenset(["insert"])
        hand.sums(event("anna"))
        assert hand.recorder.down_s() == 0
        assert sum("insert is broken" in error for error in logged.errors()) == n
        breakable.broken = frozenset()
        for _ in range(3):
            hand.minute()


def replay_all(journal: Journal, store: MariaStore) -> None:
    while journal.replay(store.repository, soon()):
        pass


@on_stores("schema.sql", "go-policyd")
def test_mariadb_gets_the_original_times_to_the_millisecond(path: Path, store: MariaStore) -> None:
    """Those of one millisecond are moved apart by one, or add up; go-policyd's table does not move them."""
    begin, clock, expected = int(time.time()) - HOUR_S, Clock(), []
    journal = filled(path, clock)
    for n, ms in enumerate((1, 3, 499, 501, 999)):
        clock.now = begin + n + ms / 1000 + 0.0001
        journal.insert([event("anna", 1), event("bert", 2)])
        journal.insert([event("anna", 3)])  # of the same millisecond
        ts = (begin + n) * 1000 + ms
        expected += [(ts - 1, "anna", 3), (ts, "anna", 1), (ts, "bert", 2)]
    replay_all(journal, store)
    assert store.times() == expected
    journal.insert([event("anna", 5)])  # of a millisecond that is there, in another slice
    replay_all(journal, store)
    assert sum(recipients for _, login, recipients in store.times() if login == "anna") == 25
    assert count(store.repository, event("anna", 1), event("bert", 1)) == [26, 11]


@on_stores("schema.sql", "go-policyd")
def test_a_relay_whose_clock_is_ahead_holds_nobody_for_a_month(path: Path, store: MariaStore) -> None:
    """What it has journaled is of now, at the latest."""
    clock = Clock(time.time() + 30 * DAY_S)
    replay_all(filled(path, clock, event("anna", 3), event("anna", 4), incident("anna", "HOLD overquota")), store)
    ahead, lately = "SUM(ts > NOW(3))", "SUM(ts > NOW(3) - INTERVAL 1 MINUTE)"
    assert store.database.query(f"SELECT COUNT(*), {ahead}, {lately} FROM events") == [(3, 0, 3)]
    assert count(store.repository, event("anna", 1)) == [8]


@pytest.fixture
def clocks_changed(request: pytest.FixtureRequest, store: MariaStore) -> Iterator[int]:
    """Let the server live where the clocks were changed 70 minutes ago; return when that was (s since 1970)."""
    changed = int(time.time()) - 70 * 60
    query = store.database.query
    zone = f"Test/{store.database.name}"
    query("INSERT INTO mysql.time_zone (Use_leap_seconds) VALUES ('N')")
    number = query("SELECT MAX(Time_zone_id) FROM mysql.time_zone")[0][0]
    query("INSERT INTO mysql.time_zone_name VALUES (%s, %s)", (zone, number))
    for kind, offset in enumerate(TIME_ZONES[request.param]):
        summer = offset == 7200
        query("INSERT INTO mysql.time_zone_transition_type VALUES (%s, %s, %s, %s, '')", (number, kind, offset, summer))
        query("INSERT INTO mysql.time_zone_transition VALUES (%s, %s, %s)", (number, changed * kind, kind))
    with store.database.variable("time_zone", zone):
        yield changed


@on_stores("schema.sql", "go-policyd")
@pytest.mark.parametrize("clocks_changed", TIME_ZONES, indirect=True)
def test_in_the_night_of_the_clock_change_nothing_is_lost(path: Path, store: MariaStore, clocks_changed: int) -> None:
    """The table is in the server's local time; in autumn an hour comes twice, and the events of both are there.

    The window is an hour longer then, and an hour shorter in spring.
    """
    local = "CAST(FROM_UNIXTIME(%s) AS DATETIME)"  # from MariaDB 11.8 on, FROM_UNIXTIME itself is a TIMESTAMP
    twice = (clocks_changed - 600, clocks_changed + 3000)
    is_autumn = store.database.query(f"SELECT {local} = {local}", twice) == [(1,)]
    clock = Clock()
    journal = filled(path, clock)
    long_ago, lately = time.time() - DAY_S - 1800, time.time() - DAY_S + 1800
    for n, at in enumerate((long_ago, lately, clocks_changed - 600, clocks_changed + 1, clocks_changed + 3000)):
        clock.now = at
        journal.insert([event("anna", 10**n), event("bert", 1)])
    replay_all(journal, store)
    assert sorted(int(recipients) for _, login, recipients in store.times() if login == "anna") == (
        [1, 10, 1000, 10_100] if is_autumn else [1, 10, 100, 1000, 10_000]  # the two of one local time have added up
    )
    counted = 11_111 if is_autumn else 11_100
    assert count(store.repository, event("anna", 100_000)) == [100_000 + counted]
    assert store.times()[-1][1:] == ("anna", 100_000) or is_autumn  # in autumn, yesterday's may seem to be later


@pytest.mark.parametrize("is_restarted", [False, True], ids=["goes on", "started again"])
def test_a_journal_that_has_filled_the_disk_by_itself_is_moved_all_the_same(
    disk: Path, breakable: BreakableRepository, logged: KeptLog, is_restarted: bool
) -> None:
    """Without any room nothing can be deleted from it: some is kept for that.  And the disk is then given it back."""
    hand = ByHand(breakable, disk / "journal.sqlite3")
    breakable.broken = breakable.AWAY
    sent = [event(f"login{n}") for n in range(20_000)]
    answered = 0
    while not hand.journal.trouble and answered < len(sent):
        hand.sums(*sent[answered : answered + 200])
        answered += 200
    waiting = answered
    if is_restarted:  # which forgets what is in memory
        waiting -= len(hand.journal.kept)
        hand.end()
        hand = ByHand(breakable, disk / "journal.sqlite3")
    breakable.broken = frozenset()
    hand.minute()
    assert hand.journal.is_empty()
    assert sorted(each.sasl_username for _, _, each in breakable.first()) == sorted(each[0] for each in sent[:waiting])
    assert sum(file.stat().st_size for file in disk.iterdir()) < 200_000
    hand.end()


def test_what_was_moved_is_not_moved_again_when_its_disk_goes_and_comes_back(
    path: Path, breakable: BreakableRepository
) -> None:
    """Also where it could not be deleted for want of room."""
    clock = breakable.clock
    filled(path, clock, event("anna"), event("boris")).close()
    file = BreakableRepository(path, clock)
    journal = Journal(file, clock)
    journal.look()
    file.broken = frozenset(["forget"])
    assert len(journal.replay(breakable, soon())) == 2
    file.broken = frozenset()
    aside = path.parent.rename(path.parent.with_name("aside"))
    journal.look()
    assert journal.trouble
    aside.rename(path.parent)
    journal.look()
    assert (journal.waiting, journal.trouble) == (0, "")
    journal.close()


def test_a_journal_out_of_our_reach_is_not_gone(path: Path, logged: KeptLog) -> None:
    """What waits in it stays there, where it survives a crash, and is not taken into memory."""
    clock = Clock()
    journal = filled(path, clock, event("anna", 5))
    aside = path.parent.rename(path.parent.with_name("aside"))
    path.parent.symlink_to(path.parent)  # even root cannot follow that
    journal.look()
    journal.insert([event("boris")])
    assert (journal.waiting, [each.sasl_username for _, _, each in journal.kept]) == (2, ["boris"])
    path.parent.unlink()
    aside.rename(path.parent)
    journal.close()
    assert [each.sasl_username for _, _, each in SQLiteRepository(str(path), clock).first()] == ["anna"]
