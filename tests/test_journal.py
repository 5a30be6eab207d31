"""The outage journal: what the store cannot take is kept, still counts, and is replayed with its own time.

What several faults at once do to it is in test_simulation.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import BEGINS
from recorders import AWAY, BreakableRepository, ByHand, is_well
from stores import Clock, KeptLog, MariaStore, count, event, global_variable, incident, on_stores, soon

from policyd import DAY_S, HOUR_S, LAST_KNOWN_LOGINS, NOTHING, Event, Journal, LastKnown, SQLiteRepository, Usage

ENDS = f"{BEGINS}over after "


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "later" / "journal.sqlite3"


@pytest.fixture
def clock() -> Clock:
    """The time of all that is driven by hand."""
    return Clock()


@pytest.fixture
def breakable(tmp_path: Path, clock: Clock) -> BreakableRepository:
    return BreakableRepository(str(tmp_path / "events.sqlite3"), clock)


def filled(path: Path, clock: Clock, *events: Event) -> Journal:
    """Return a journal of an earlier outage."""
    path.parent.mkdir(exist_ok=True)
    journal = Journal(SQLiteRepository(str(path), clock), clock)
    journal.look()
    journal.insert(events)
    return journal


def times(repository: SQLiteRepository) -> list[tuple[int, str, int | None]]:
    """Return time, login and recipients of all events of an embedded store or a journal, in order of arrival."""
    return [(ts, each.sasl_username, each.recipient_count) for _, ts, each in repository.first()]


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
    known.grow(rows[:2], sign=-1)
    assert known.get("anna", 2000).recipients == 9


def test_the_last_100_000_logins_are_known() -> None:
    known = LastKnown()
    for n in range(LAST_KNOWN_LOGINS):
        known.put(f"user{n}", Usage(5), 0)
    known.put("user0", Usage(6), 0)
    known.put("one more", Usage(7), 0)
    known_of = [known.get(login, 1) for login in ("user0", "user1", "user2", "one more")]
    assert known_of == [Usage(6), NOTHING, Usage(5), Usage(7)]


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


def replay_all(journal: Journal, store: MariaStore) -> None:
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
    query = store.database.query
    zone = f"Test/{store.database.name}"
    query("INSERT INTO mysql.time_zone (Use_leap_seconds) VALUES ('N')")
    number = query("SELECT MAX(Time_zone_id) FROM mysql.time_zone")[0][0]
    query("INSERT INTO mysql.time_zone_name VALUES (%s, %s)", (zone, number))
    for kind, offset in enumerate(TIME_ZONES[request.param]):
        summer = offset == 7200
        query("INSERT INTO mysql.time_zone_transition_type VALUES (%s, %s, %s, %s, '')", (number, kind, offset, summer))
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


@pytest.mark.parametrize("is_restarted", [False, True], ids=["goes on", "started again"])
def test_a_journal_that_has_filled_the_disk_by_itself_is_moved_all_the_same(
    disk: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog, is_restarted: bool
) -> None:
    """Without any room nothing can be deleted from it: some is kept for that."""
    hand = ByHand(breakable, disk / "journal.sqlite3", clock)
    breakable.broken = AWAY
    sent = [event(f"login{n}") for n in range(20_000)]
    answered = 0
    while hand.journal.place != "memory" and answered < len(sent):
        hand.sums(*sent[answered : answered + 200])
        answered += 200
    waiting = answered
    if is_restarted:  # which forgets what is in memory
        waiting -= len(hand.journal.kept)
        hand.end()
        hand = ByHand(breakable, disk / "journal.sqlite3", clock)
    breakable.broken = frozenset()
    hand.minute()
    assert hand.journal.is_empty()
    assert sorted(login for _, login, _ in times(breakable)) == sorted(each[0] for each in sent[:waiting])
    hand.end()


def test_a_journal_that_is_moved_onto_the_open_one_is_replayed_beside_it(
    tmp_path: Path, clock: Clock, breakable: BreakableRepository, logged: KeptLog
) -> None:
    path = tmp_path / "journal.sqlite3"
    filled(tmp_path / "restored", clock, *(event(f"restored{n}") for n in range(7))).close()
    hand = ByHand(breakable, path, clock)
    breakable.broken = AWAY
    hand.usages(*(event(f"waiting{n}") for n in range(10)))
    (tmp_path / "restored").replace(path)
    hand.usages(event("next"))
    breakable.broken = frozenset()
    hand.minute()
    assert breakable.count() == 10 + 7 + 1
    hand.end()
