"""The outage journal: what the store cannot take is kept, still counts, and is replayed with its own time.

What several faults at once do to it is in test_simulation.py.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import BEGINS
from recorders import AWAY, BreakableRepository, ByHand, Waiter, is_well, written_by_another
from stores import Clock, KeptLog, MariaStore, count, event, global_variable, incident, on_stores, soon

from policyd import (
    DAY_S,
    HOUR_S,
    LAST_KNOWN_LOGINS,
    MINUTE_S,
    NOTHING,
    REPLAY_SLICE,
    RETRY_DELAYS_S,
    Event,
    Journal,
    LastKnown,
    Outage,
    SQLiteRepository,
    Usage,
)

ENDS = f"{BEGINS}over after "


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is; its directory is not there yet."""
    return tmp_path / "later" / "journal.sqlite3"


@pytest.fixture
def clock() -> Clock:
    """The time of all that is driven by hand."""
    return Clock()


@pytest.fixture
def breakable(tmp_path: Path, clock: Clock) -> BreakableRepository:
    """A store that breaks on command."""
    return BreakableRepository(str(tmp_path / "events.sqlite3"), clock)


def filled(path: Path, clock: Clock, *events: Event) -> Journal:
    """Return a journal of an earlier outage."""
    path.parent.mkdir(exist_ok=True)
    journal = Journal(str(path), clock, clock)
    journal.look()
    journal.insert(events)
    return journal


def times(repository: SQLiteRepository) -> list[tuple[int, str, int | None]]:
    """Return time, login and recipients of all events of an embedded store or a journal, in order of arrival."""
    return [(ts, each.sasl_username, each.recipient_count) for _, ts, each in repository.first(-1)]


# --- the journal's file ---


def test_a_file_that_another_process_writes_stops_the_replay_and_not_the_counting(
    path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog
) -> None:
    """A slice that cannot be deleted is one error, no other one follows it, and the sums stay true."""
    filled(path, clock)
    hand = ByHand(breakable, path, clock)
    breakable.broken = AWAY
    for _ in range(3):
        hand.sums(*[event("anna")] * 256)
    breakable.broken = frozenset()
    hand.recorder.look_for_store()
    with written_by_another(path):
        assert [hand.sums(event("anna")) for _ in range(3)] == [[769], [770], [771]]
        assert breakable.count() == REPLAY_SLICE + 3  # new ones go to the store as usual
        assert not is_well(hand.recorder)
    hand.minute()
    assert is_well(hand.recorder)
    assert breakable.count() == 771
    assert hand.sums(event("anna")) == [772]
    assert len([error for error in logged.errors() if "cannot be deleted from the journal" in error]) == 1
    assert logged.errors()[-1].startswith(ENDS)


def test_without_a_file_the_journal_is_in_memory_until_there_is_one_or_the_end(
    path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog
) -> None:
    breakable.broken = AWAY
    lost = ByHand(breakable, path, clock)
    assert lost.sums(event("anna", 1)) + lost.sums(event("anna", 1)) == [1, 2]
    lost.end()
    trouble = f"no outage journal: {path}: unable to open database file; in an outage events are counted in memory only"
    begin = f"{BEGINS}check is broken; counting in {path} until it is back"
    assert logged.errors() == [begin, trouble, "2 events are forgotten: they were counted in memory only"]
    logged.lines.clear()
    hand = ByHand(breakable, path, clock)
    assert hand.sums(event("anna", 3)) + hand.sums(event("anna", 4)) == [3, 7]
    assert (hand.journal.place, hand.journal.waiting) == ("memory", 2)
    then = int(clock.now * 1000)
    path.parent.mkdir()
    clock.now += MINUTE_S
    assert hand.sums(event("anna", 5)) == [12]
    assert (hand.journal.place, hand.journal.waiting) == (str(path), 3)
    over = f"no outage journal: over, {path} can be used again; 2 events wait in it"
    assert logged.errors() == [begin, trouble, over]
    in_file = [(then, "anna", 3), (then, "anna", 4), (then + MINUTE_S * 1000, "anna", 5)]
    assert times(SQLiteRepository(str(path))) == in_file


@pytest.mark.parametrize("instead", ["a directory", "no database"])
def test_unreadable_is_not_empty(
    path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog, instead: str
) -> None:
    """The outage is not over while the file may hold events; they count and go to the store once it can be read."""
    filled(path, clock, event("anna", 1500)).close()
    aside = path.rename(path.with_name("aside"))
    path.mkdir() if instead == "a directory" else path.write_text("what a restore has left\n" * 99)
    hand = ByHand(breakable, path, clock)
    assert hand.sums(event("anna")) == [1]
    hand.minute()
    assert not hand.journal.is_empty()
    assert not any(error.startswith(ENDS) for error in logged.errors())
    path.rmdir() if instead == "a directory" else path.unlink()
    aside.rename(path)
    hand.minute()
    assert hand.sums(event("anna")) == [1502]
    assert is_well(hand.recorder)
    assert breakable.count() == 3


# --- what is known of a login ---


def test_what_is_known_of_a_login_grows_and_is_forgotten_when_its_time_is_over() -> None:
    """The sum and the incidents after a day, the hour's after an hour."""
    known = LastKnown()
    used = Usage(7, 5, frozenset(["HOLD places"]))
    known.put("anna", used, 1000)
    assert known.get("anna", 1000 + HOUR_S - 1) == used
    assert known.get("anna", 1000 + HOUR_S) == known.get("anna", 1000 + DAY_S - 1) == used._replace(of_hour=0)
    assert known.get("anna", 1000 + DAY_S) == known.get("bert", 1000) == NOTHING
    ages = [0.0, 1800.0, HOUR_S + MINUTE_S, DAY_S + MINUTE_S]
    known.grow([*((age, event("anna", 2)) for age in ages), (0.0, incident("anna", "HOLD blocked"))], 1001)
    known.grow([(0.0, event("bert", 3))], 1001)
    assert known.get("anna", 1001) == Usage(13, 9, frozenset(["HOLD places", "HOLD blocked"]))
    assert known.get("bert", 1001) == Usage(3, 3)


def test_the_last_100_000_logins_are_known() -> None:
    known = LastKnown()
    for n in range(LAST_KNOWN_LOGINS):
        known.put(f"user{n}", Usage(5), 0)
    known.put("user0", Usage(6), 0)
    known.put("one more", Usage(7), 0)
    known_of = [known.get(login, 1) for login in ("user0", "user1", "user2", "one more")]
    assert known_of == [Usage(6), NOTHING, Usage(5), Usage(7)]


def test_a_store_is_looked_for_less_and_less_often() -> None:
    outage = Outage(began=0)
    delays = [outage.next_delay() for _ in range(len(RETRY_DELAYS_S) + 2)]
    assert delays == [*RETRY_DELAYS_S, RETRY_DELAYS_S[-1], RETRY_DELAYS_S[-1]]
    assert delays == sorted(delays)
    assert (max(delays[:1]), max(delays)) == (1, 15)


# --- the recorder in an outage ---


def test_an_outage_is_one_error_at_the_beginning_and_one_at_the_end(
    path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog
) -> None:
    """However often the store says that it is ready, and refuses; or fails in the replay."""
    filled(path, clock)
    hand = ByHand(breakable, path, clock)
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
    assert breakable.count() == 12


def test_a_journal_of_an_earlier_outage_counts_from_the_start_and_is_replayed(
    path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog
) -> None:
    filled(path, clock, event("anna", 3), event("bert", 4), incident("bert", "HOLD blocked"))
    then = int(clock.now * 1000)
    clock.now += HOUR_S
    breakable.broken = AWAY
    hand = ByHand(breakable, path, clock)
    assert hand.usages(event("anna"), event("bert")) == [Usage(4, 1), Usage(5, 1, frozenset(["HOLD blocked"]))]
    breakable.broken = frozenset()
    hand.minute()
    assert hand.sums(event("anna"), event("bert")) == [5, 6]
    assert times(breakable)[:3] == [(then, "anna", 3), (then, "bert", 4), (then, "bert", None)]
    assert ("warning", "3 events of an earlier outage wait in the journal") in logged.lines
    assert logged.errors()[-1].endswith(", 5 events replayed")


# --- into MariaDB ---


def replay_all(journal: Journal, store: MariaStore) -> None:
    """Move all that there is."""
    while journal.replay(store.repository, soon()):
        pass


@on_stores("schema.sql", "go-policyd")
def test_mariadb_gets_the_original_times_to_the_millisecond(path: Path, clock: Clock, store: MariaStore) -> None:
    """Those of one millisecond are moved apart by one, or add up; go-policyd's table does not move them."""
    begin = int(time.time()) - HOUR_S
    journal = filled(path, clock)
    expected = []
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
def test_a_relay_whose_clock_is_ahead_holds_nobody_for_a_month(path: Path, clock: Clock, store: MariaStore) -> None:
    """What it has journaled is of now, at the latest."""
    clock.now = time.time() + 30 * DAY_S
    replay_all(filled(path, clock, event("anna", 3), event("anna", 4), incident("anna", "HOLD overquota")), store)
    ahead, lately = "SUM(ts > NOW(3))", "SUM(ts > NOW(3) - INTERVAL 1 MINUTE)"
    assert store.database.query(f"SELECT COUNT(*), {ahead}, {lately} FROM events") == [(3, 0, 3)]
    assert count(store.repository, event("anna", 1)) == [8]


TIME_ZONES = {"summer to winter": (7200, 3600), "winter to summer": (3600, 7200)}


@pytest.fixture
def clocks_changed(request: pytest.FixtureRequest, store: MariaStore) -> Iterator[int]:
    """Let the server live where the clocks were changed 70 minutes ago; return when that was (s since 1970)."""
    changed = int(time.time()) - 70 * 60
    before, after = TIME_ZONES[request.param]
    query = store.database.query
    zone = f"Test/{store.database.name}"
    query("INSERT INTO mysql.time_zone (Use_leap_seconds) VALUES ('N')")
    number = query("SELECT MAX(Time_zone_id) FROM mysql.time_zone")[0][0]
    query("INSERT INTO mysql.time_zone_name VALUES (%s, %s)", (zone, number))
    for kind, offset in enumerate((before, after)):
        query(
            "INSERT INTO mysql.time_zone_transition_type VALUES (%s, %s, %s, %s, '')",
            (number, kind, offset, offset == 7200),
        )
        query("INSERT INTO mysql.time_zone_transition VALUES (%s, %s, %s)", (number, changed * kind, kind))
    with global_variable(store.database, "time_zone", zone):
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


@contextlib.contextmanager
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("is_restarted", [False, True], ids=["goes on", "started again"])
def test_a_journal_that_has_filled_the_disk_by_itself_is_moved_all_the_same(
    tmp_path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog, is_restarted: bool
) -> None:
    """Without any room nothing can be deleted from it: some is kept for that."""
    with small_disk(tmp_path) as disk:
        hand = ByHand(breakable, disk / "journal.sqlite3", clock=clock)
        breakable.broken = AWAY
        sent = [event(f"login{n}") for n in range(20_000)]
        answered = 0
        while hand.journal.place != "memory" and answered < len(sent):
            hand.sums(*sent[answered : answered + 200])
            answered += 200
        waiting = answered
        if is_restarted:  # which forgets what is in memory
            waiting -= hand.journal.kept
            hand.end()
            hand = ByHand(breakable, disk / "journal.sqlite3", clock=clock)
        breakable.broken = frozenset()
        hand.minute()
        assert hand.journal.is_empty()
        assert sorted(login for _, login, _ in times(breakable)) == sorted(each[0] for each in sent[:waiting])
        hand.end()


def test_room_is_found_for_what_was_moved_and_a_restart_counts_nothing_again(
    tmp_path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog
) -> None:
    """Another program has filled the disk since the outage began."""
    with small_disk(tmp_path) as disk:
        hand = ByHand(breakable, disk / "journal.sqlite3", clock=clock)
        breakable.broken = AWAY
        for n in range(0, 1200, 200):
            hand.usages(*(event(f"login{each}") for each in range(n, n + 200)))
        with contextlib.suppress(OSError), (disk / "another's").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        breakable.broken = frozenset()
        for _ in range(4):
            hand.minute()
            hand.end()
            hand = ByHand(breakable, disk / "journal.sqlite3", clock=clock)
        hand.minute()
        assert hand.journal.is_empty()
        assert breakable.count() == 1200
        hand.end()


def test_a_journal_that_is_moved_onto_the_open_one_is_replayed_beside_it(
    tmp_path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog
) -> None:
    path = tmp_path / "journal.sqlite3"
    filled(tmp_path / "restored", clock, *(event(f"restored{n}") for n in range(7))).close()
    hand = ByHand(breakable, path, clock=clock)
    breakable.broken = AWAY
    hand.usages(*(event(f"waiting{n}") for n in range(10)))
    (tmp_path / "restored").replace(path)
    hand.usages(event("next"))
    breakable.broken = frozenset()
    hand.minute()
    assert breakable.count() == 10 + 7 + 1
    hand.end()


def test_what_is_kept_in_memory_does_not_depend_on_a_file_of_that_name(
    tmp_path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hand = ByHand(breakable, tmp_path / "nowhere" / "journal.sqlite3", clock=clock)
    breakable.broken = AWAY
    hand.usages(event("anna"))
    Path(":memory:").touch()
    assert hand.sums(event("anna"), event("anna")) == [2, 3]
    breakable.broken = frozenset()
    hand.minute()
    assert breakable.count() == 3
    hand.end()


def test_an_event_that_waits_in_the_next_batch_too_is_seen_to_wait(
    path: Path, clock: Clock, breakable: BreakableRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog counts from its arrival, not from the batch's begin."""
    hand = ByHand(breakable, path, clock=clock)
    waits = []
    insert = breakable.insert

    def slow(*arguments: Any) -> set[int]:
        if not waits:
            Waiter(hand.recorder, event("bert"))
        clock.now += 2
        waits.append(hand.recorder.longest_wait_s())
        return insert(*arguments)

    monkeypatch.setattr(breakable, "insert", slow)
    hand.usages(event("anna"))
    hand.turn()
    assert waits == [2, 4]
    hand.end()
