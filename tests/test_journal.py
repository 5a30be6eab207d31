"""The outage journal: what the store cannot take is kept, still counts, and is replayed with its own time."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Union

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorders import (
    AWAY,
    PATIENCE_S,
    BreakableRepository,
    GatedRepository,
    Waiter,
    is_well,
    recording,
    shut,
    written_by_another,
)
from servers import Database, wait_until
from stores import WHOLE, KeptLog, SQLiteStore, count, event, global_variable, maria_repository, soon, totals
from stores import sums as sums_of

from policyd import (
    BATCH_EVENTS,
    DAY_S,
    HOUR_S,
    LAST_KNOWN_SUMS,
    RETRY_DELAYS_S,
    Event,
    Journal,
    LastKnown,
    Outage,
    Reach,
    Recorder,
    RepositoryUnavailable,
    Scope,
    SQLiteRepository,
    Usage,
)

BEGINS = "ERROR while UPDATING db: "
ENDS = "ERROR while UPDATING db: over after "


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.123

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def store(tmp_path: Path) -> BreakableRepository:
    """A store that breaks on command."""
    return BreakableRepository(str(tmp_path / "events.sqlite3"))


@pytest.fixture
def slices_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay two events at a time."""
    monkeypatch.setattr("policyd.REPLAY_SLICE", 2)


def sums(recorder: Recorder, *events: Event) -> list[int | None]:
    """Record one event after the other."""
    return [Waiter(recorder, each).sum() for each in events]


def times(repository: SQLiteRepository) -> list[tuple[int, str, int]]:
    """Return time, login and recipients of all events of an embedded store or a journal, in order of arrival."""
    return [(ts, each.sasl_username, each.recipient_count) for _, ts, each in repository.first(-1)]


def is_up(recorder: Recorder) -> None:
    """Wait until the store has everything."""
    wait_until(lambda: is_well(recorder), "the journal is empty")


# --- the journal by itself ---


def test_a_store_that_says_it_is_ready_and_refuses_each_time_is_one_error(
    store: BreakableRepository, no_delay: None, logged: KeptLog
) -> None:
    store.broken = frozenset(["insert"])
    with recording(store) as recorder:
        assert [Waiter(recorder, event("anna", 1)).sum() for _ in range(3)] == [1, 2, 3]
        wait_until(lambda: store.checks > 5, "the store was found ready, and failed again, several times")
        assert len(logged.errors()) == 1


def test_what_the_journal_holds_survives_a_restart(path: Path) -> None:
    Journal(str(path)).insert([event("anna", 3), event("bert", 5), event("anna", 4)])
    journal = Journal(str(path))
    assert journal.look() == len(journal) == 3
    assert totals(journal, "anna", "carl") == {"anna": 7, "carl": 0}


@pytest.mark.usefixtures("slices_of_two")
def test_it_is_replayed_oldest_first_in_slices_with_the_original_times(path: Path, store: BreakableRepository) -> None:
    clock = Clock()
    journal = Journal(str(path), clock)
    expected = []
    for n in range(1, 6):
        clock.now += 0.001
        journal.insert([event("anna", n)])
        expected.append((int(clock.now * 1000), "anna", n))
    clock.now += HOUR_S
    gated = GatedRepository(store)
    while journal.replay(gated, soon()):
        pass
    assert [[each.recipient_count for each in batch] for batch in gated.batches] == [[1, 2], [3, 4], [5]]
    assert times(store) == expected
    assert len(journal) == 0
    assert totals(journal, "anna") == {"anna": 0}


@pytest.mark.usefixtures("slices_of_two")
def test_an_event_leaves_it_only_when_the_store_has_it(path: Path, store: BreakableRepository) -> None:
    journal = Journal(str(path))
    journal.insert([event("anna", n) for n in (1, 2, 3)])
    store.broken = AWAY
    with pytest.raises(RepositoryUnavailable):
        journal.replay(store, soon())
    assert len(journal) == 3

    class Watched(GatedRepository):
        def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
            assert len(Journal(str(path))) == 3  # another process still sees all
            refused = super().insert(events, deadline, times)
            assert len(Journal(str(path))) == 3
            return refused

    store.broken = frozenset()
    assert [moved for _, moved in journal.replay(Watched(store), soon())] == [event("anna", 1), event("anna", 2)]
    assert len(Journal(str(path))) == 1


@pytest.mark.usefixtures("slices_of_two")
def test_a_slice_that_cannot_be_deleted_is_replayed_once(
    path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    journal = Journal(str(path))
    journal.insert([event("anna", n) for n in (1, 2, 3)])
    with written_by_another(path):
        assert [len(journal.replay(store, soon())) for _ in range(3)] == [2, 1, 0]
        assert len(journal) == 0
        assert all("counted twice until the journal can be written" in error for error in logged.errors())
    journal.insert([event("anna", 4)])
    assert len(journal) == 1
    assert [moved for _, moved in journal.replay(store, soon())] == [event("anna", 4)]
    assert [recipients for _, _, recipients in times(store)] == [1, 2, 3, 4]
    assert Journal(str(path)).look() == 0


@pytest.mark.usefixtures("slices_of_two")
def test_a_slice_that_cannot_be_deleted_is_not_replayed_again_behind_what_was_in_memory(
    path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    journal = Journal(str(path))
    journal.insert([event("anna", 1)])
    with written_by_another(path):
        journal.insert([event("anna", 2)])
        assert journal.place == "memory"
        assert [len(journal.replay(store, soon())) for _ in range(3)] == [1, 1, 0]
    assert [recipients for _, _, recipients in times(store)] == [1, 2]


def test_without_a_file_the_journal_is_in_memory_until_there_is_one(tmp_path: Path, logged: KeptLog) -> None:
    path = tmp_path / "later" / "journal.sqlite3"
    clock = Clock()
    journal = Journal(str(path), clock)
    assert journal.look() == 0
    journal.insert([event("anna", 3)])
    journal.insert([event("anna", 4)])
    assert journal.place == "memory"
    at_start, at_first = logged.errors()
    assert at_start.startswith(f"no outage journal: {path}: unable to open database file; in an outage events would")
    assert at_first == f"no outage journal: {path}: unable to open database file; counting in memory"
    assert (len(journal), totals(journal, "anna")) == (2, {"anna": 7})
    then = int(clock.now * 1000)
    path.parent.mkdir()
    clock.now += 60
    journal.insert([event("anna", 5)])
    assert journal.place == str(path)
    assert (len(journal), totals(journal, "anna")) == (3, {"anna": 12})
    in_file = sorted(times(SQLiteRepository(str(path))))
    assert in_file == [(then, "anna", 3), (then, "anna", 4), (then + 60_000, "anna", 5)]


def test_what_is_in_memory_is_replayed_too(tmp_path: Path, store: BreakableRepository, logged: KeptLog) -> None:
    clock = Clock()
    journal = Journal(str(tmp_path / "missing" / "journal.sqlite3"), clock)
    journal.insert([event("anna", 3)])
    assert journal.replay(store, soon()) == [(0, event("anna", 3))]
    assert journal.replay(store, soon()) == []
    assert times(store) == [(int(clock.now * 1000), "anna", 3)]
    assert len(logged.errors()) == 1


WATCHFUL = Scope(Reach(10, 1), {}, window_s=1800)


def test_what_is_known_of_a_login_is_forgotten_when_its_time_is_over() -> None:
    """The sum after a day, that of the hour after an hour, the addresses after their window."""
    known = LastKnown()
    used = Usage(7, 5, frozenset(["192.0.2.1"]))
    known.put("anna", used, 1000)
    assert known.get("anna", WATCHFUL, 1000 + 1799) == used
    assert known.get("anna", WATCHFUL, 1000 + 1800) == Usage(7, 5)
    assert known.get("anna", WATCHFUL, 1000 + HOUR_S) == Usage(7)
    assert known.get("anna", WATCHFUL, 1000 + DAY_S - 1) == Usage(7)
    assert known.get("anna", WATCHFUL, 1000 + DAY_S) == known.get("bert", WATCHFUL, 1000) == Usage(0)


def test_what_the_store_took_since_adds_to_what_is_known_as_far_as_it_is_new_enough() -> None:
    known = LastKnown()
    known.put("anna", Usage(7, 5, frozenset(["192.0.2.1"])), 1000)
    ages = [0.0, 1800.0, HOUR_S, DAY_S]
    known.add([(age, event("anna", 2, address=f"192.0.2.{n}")) for n, age in enumerate(ages, start=2)], WATCHFUL, 1001)
    known.add([(0.0, event("bert", 3))], WATCHFUL, 1001)
    assert known.get("anna", WATCHFUL, 1001) == Usage(13, 9, frozenset(["192.0.2.1", "192.0.2.2"]))
    assert known.get("bert", WATCHFUL, 1001) == Usage(3, 3, frozenset(["192.0.2.1"]))


def test_the_last_100_000_logins_are_known() -> None:
    known = LastKnown()
    for n in range(LAST_KNOWN_SUMS):
        known.put(f"user{n}", Usage(5), 0)
    known.put("user0", Usage(6), 0)
    known.put("one more", Usage(7), 0)
    known_of = [known.get(login, WATCHFUL, 1) for login in ("user0", "user1", "user2", "one more")]
    assert known_of == [Usage(6), Usage(0), Usage(5), Usage(7)]


def test_a_store_is_looked_for_less_and_less_often() -> None:
    outage = Outage(began=0)
    delays = [outage.next_delay() for _ in range(len(RETRY_DELAYS_S) + 2)]
    assert delays == [*RETRY_DELAYS_S, RETRY_DELAYS_S[-1], RETRY_DELAYS_S[-1]]
    assert delays == sorted(delays)
    assert delays[0] <= 1
    assert delays[-1] <= 15


# --- the recorder in an outage ---


@pytest.mark.usefixtures("no_delay")
def test_a_store_that_is_away_at_start_costs_no_answer_and_is_used_when_it_comes(
    tmp_path: Path, path: Path, logged: KeptLog
) -> None:
    later = tmp_path / "later" / "events.sqlite3"
    with recording(SQLiteRepository(str(later)), path) as recorder:
        wait_until(lambda: not is_well(recorder), "the outage begins")
        assert sums(recorder, *[event("anna")] * 3) == [1, 2, 3]
        assert recorder.down_s() is not None
        assert recorder.journaled == 3
        later.parent.mkdir()
        is_up(recorder)
        assert sums(recorder, event("anna", 5)) == [8]
    begin, end = logged.errors()
    assert begin == f"{BEGINS}{later}: unable to open database file; counting in {path} until it is back"
    assert end.startswith(ENDS)
    assert end.endswith(", 3 events replayed")


@pytest.mark.usefixtures("no_delay")
def test_a_store_that_fails_is_one_error_at_the_beginning_and_one_at_the_end(
    tmp_path: Path, logged: KeptLog
) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    gated = GatedRepository(store.repository)
    per_outage = 1 + BATCH_EVENTS + 1 + 1
    with recording(gated) as recorder:
        for n in range(2):
            del logged.lines[:]
            before = n * (1 + BATCH_EVENTS + 3)
            assert sums(recorder, event("anna")) == [before + 1]
            with written_by_another(tmp_path / "events.sqlite3"):
                with shut(gated, recorder) as first:
                    others = [Waiter(recorder, event("anna")) for _ in range(BATCH_EVENTS + 1)]
                assert first.sum() == n + 1
                assert [waiter.sum() for waiter in others] == list(range(before + 2, before + BATCH_EVENTS + 3))
                assert sums(recorder, event("anna")) == [before + BATCH_EVENTS + 3]
                assert len(logged.errors()) == 1
            is_up(recorder)
            assert sums(recorder, event("anna")) == [before + BATCH_EVENTS + 4]
            assert logged.errors()[0].startswith(BEGINS)
            assert "database is locked" in logged.errors()[0]
            assert logged.errors()[1].startswith(ENDS)
            assert logged.errors()[1].endswith(f", {per_outage} events replayed")
    assert sum(row[3] or 0 for row in store.rows()) == 2 * (per_outage + 2)


def test_the_end_need_not_wait_for_a_store_that_is_away(tmp_path: Path, path: Path, logged: KeptLog) -> None:
    with recording(SQLiteRepository(str(tmp_path / "missing" / "events.sqlite3")), path) as recorder:
        assert sums(recorder, event("anna", 3)) == [3]
        began = time.monotonic()
        recorder.stop(PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S / 2
        assert not any(thread.is_alive() for thread in recorder._threads)
    assert len(logged.errors()) == 1
    assert len(Journal(str(path))) == 1


@pytest.mark.usefixtures("no_delay", "logged")
def test_a_store_that_comes_back_at_the_end_delays_it_not(store: BreakableRepository) -> None:
    """The one who looks for it has just found it when the end comes."""
    looking, found = threading.Event(), threading.Event()
    check = store.check

    def slow_check(deadline: float) -> str:
        if threading.current_thread().name == "reconnect":
            looking.set()
            assert found.wait(PATIENCE_S)
        return check(deadline)

    store.check = slow_check  # type: ignore[method-assign]
    store.broken = AWAY
    with recording(store) as recorder:
        assert sums(recorder, event("anna")) == [1]
        assert looking.wait(PATIENCE_S)
        store.broken = frozenset()
        ending = threading.Thread(target=recorder.stop, args=(PATIENCE_S,))
        ending.start()
        wait_until(lambda: not recorder._threads[0].is_alive(), "nothing is recorded any more")
        found.set()
        ending.join(PATIENCE_S / 2)
        assert not ending.is_alive()


def test_at_the_end_what_is_in_memory_goes_to_the_file_or_is_said_to_be_forgotten(
    tmp_path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    store.broken = AWAY
    path = tmp_path / "later" / "journal.sqlite3"
    for has_room in (False, True):
        with recording(store, path) as recorder:
            assert sums(recorder, event("anna", 3), event("anna", 4)) == [3, 7]
            if has_room:
                path.parent.mkdir()
    last = [error for error in logged.errors() if "forgotten" in error]
    assert last == ["2 events are forgotten: they were counted in memory only"]
    assert len(Journal(str(path))) == 2


@pytest.mark.usefixtures("no_delay")
def test_a_journal_of_an_earlier_outage_counts_from_the_start_and_is_replayed(
    path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    then = Clock()
    then.now = time.time() - HOUR_S
    Journal(str(path), then).insert([event("anna", 3), event("bert", 4)])
    store.broken = AWAY
    with recording(store, path) as recorder:
        assert sums(recorder, event("anna")) == [4]
        store.broken = frozenset()
        is_up(recorder)
        assert sums(recorder, event("anna"), event("bert")) == [5, 5]
    assert times(store)[:2] == [(int(then.now * 1000), "anna", 3), (int(then.now * 1000), "bert", 4)]
    assert "2 events of an earlier outage wait in the journal" in [line.text for line in logged.lines]
    assert logged.errors()[-1].endswith(", 3 events replayed")


@pytest.mark.usefixtures("slices_of_two")
def test_until_the_journal_is_empty_a_sum_is_both_s(
    path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    """A batch comes between two slices: what is still in the journal counts, what is not counts once."""
    count(store, event("anna", 100))
    Journal(str(path)).insert([event("anna", n) for n in (1, 2, 3, 4, 5)])
    gated = GatedRepository(store)
    gated.gate.clear()
    with recording(gated, path) as recorder:
        assert gated.waiting.wait(PATIENCE_S)  # with the first slice
        waiters = [Waiter(recorder, event("anna", 10)), Waiter(recorder, event("bert", 1))]
        gated.gate.set()
        assert [waiter.sum() for waiter in waiters] == [125, 1]
        is_up(recorder)
        assert sums(recorder, event("anna", 1)) == [126]
    counts = [[each.recipient_count for each in batch] for batch in gated.batches]
    assert counts == [[1, 2], [10, 1], [3, 4], [5], [1]]


def test_a_sum_that_fails_leaves_the_event_in_the_store(
    path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    """The answer is the last known sum and the batch; nothing is journaled that the store has."""
    with recording(store, path) as recorder:
        assert sums(recorder, event("anna", 3)) == [3]
        store.broken = frozenset(("sum_recipients", "check"))
        assert sums(recorder, event("anna", 4)) == [7]
        assert len(Journal(str(path))) == 0
        assert sums(recorder, event("anna", 5), event("bert", 1)) == [12, 1]
    assert [recipients for _, _, recipients in times(store)] == [3, 4]
    assert len(Journal(str(path))) == 2
    assert len(logged.errors()) == 1


@pytest.mark.usefixtures("no_delay")
def test_what_was_replayed_still_counts_when_the_store_is_away_again(
    path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    """Also for a login that did not send in between."""
    with recording(store, path) as recorder:
        for reached in (5, 10, 15):
            store.broken = AWAY
            assert sums(recorder, event("anna", 5)) == [reached]
            store.broken = frozenset()
            is_up(recorder)


@pytest.mark.usefixtures("no_delay", "slices_of_two")
def test_a_store_that_fails_in_the_replay_gets_the_rest_later(
    path: Path, store: BreakableRepository, logged: KeptLog
) -> None:
    store.broken = AWAY
    with recording(store, path) as recorder:
        assert sums(recorder, *[event("anna")] * 5) == [1, 2, 3, 4, 5]
        store.broken = frozenset(("replay",))
        checks = store.checks
        wait_until(lambda: store.checks > checks + 3, "it is tried again and again")
        assert sums(recorder, event("anna")) == [6]
        store.broken = frozenset()
        is_up(recorder)
        assert sums(recorder, event("anna")) == [7]
    assert len(times(store)) == 7
    assert len([error for error in logged.errors() if error.startswith(ENDS)]) == 1


# --- whatever happens in whatever order ---

Step = Union[str, "frozenset[str]", "list[tuple[str, int]]"]

batches = st.lists(st.tuples(st.sampled_from(["anna", "bert"]), st.integers(1, 30)), min_size=1, max_size=5)
breakages = st.sampled_from([
    AWAY,
    frozenset(),
    frozenset(("insert",)),
    frozenset(("insert", "check")),
    frozenset(("sum_recipients",)),
    frozenset(("sum_recipients", "check")),
    frozenset(("replay",)),
])


@pytest.mark.usefixtures("no_delay", "slices_of_two", "logged")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(batches, batches, breakages, st.sampled_from(["restart", "back"])), max_size=12))
def test_no_outage_loses_an_event_and_no_sum_falls(steps: list[Step]) -> None:
    """Sums grow while a daemon lives, cover all that it has counted, and never exceed what was ever counted."""
    with tempfile.TemporaryDirectory() as directory:
        run_through(steps, BreakableRepository(f"{directory}/events.sqlite3"), f"{directory}/journal.sqlite3")


def run_through(steps: list[Step], store: BreakableRepository, path: str) -> None:
    """Do the steps and look at the sums on the way, at the stores whenever the daemon ends."""
    ever: Counter[str] = Counter()  # recipients
    life: Counter[str] = Counter()  # the same of this life of the daemon
    least: dict[str, int] = {}  # the last sum of each login in it
    sent: list[str] = []  # the senders, each of one event

    def begin() -> Recorder:
        recorder = Recorder(store, Journal(path), WHOLE)
        recorder.start()
        return recorder

    def end(recorder: Recorder) -> None:
        recorder.stop(PATIENCE_S)
        kept = store.first(-1) + SQLiteRepository(path).first(-1)
        assert sorted(each.sender for _, _, each in kept) == sorted(sent)
        life.clear()
        least.clear()

    def send(recorder: Recorder, batch: list[tuple[str, int]]) -> None:
        waiters = []
        for login, recipients in batch:
            sent.append(f"s{len(sent)}")
            waiters.append(Waiter(recorder, event(login, recipients, sender=sent[-1])))
        for waiter, (login, recipients) in zip(waiters, batch):
            ever[login] += recipients
            life[login] += recipients
            reached = waiter.sum()
            assert reached is not None
            assert max(life[login], least.get(login, 0)) <= reached <= ever[login]
            least[login] = reached

    recorder = begin()
    try:
        for step in steps:
            if isinstance(step, frozenset):
                store.broken = step
            elif isinstance(step, list):
                send(recorder, step)
            elif step == "restart":
                end(recorder)
                recorder = begin()
            else:
                store.broken = frozenset()
                is_up(recorder)
        store.broken = frozenset()
        send(recorder, [("carl", 1)])  # once it answers it knows its journal
        is_up(recorder)
        for login in list(ever):
            send(recorder, [(login, 1)])
            assert least[login] == ever[login]
    finally:
        end(recorder)
    assert len(store.first(-1)) == len(sent)


# --- into MariaDB ---


@pytest.fixture(params=["database", "old_database"])
def table(request: pytest.FixtureRequest) -> Database:
    """A table of either kind."""
    database: Database = request.getfixturevalue(request.param)
    return database


def rows_of(table: Database) -> list[tuple[int, str, int]]:
    """Return time in ms since 1970, login and recipients of each row, oldest first."""
    return table.query(
        "SELECT CAST(ROUND(UNIX_TIMESTAMP(ts) * 1000) AS SIGNED), sasl_username, recipient_count"
        " FROM events ORDER BY ts, sasl_username"
    )


@pytest.mark.mariadb
@pytest.mark.usefixtures("slices_of_two")
def test_mariadb_gets_the_original_times_to_the_millisecond(path: Path, table: Database) -> None:
    """Those of one millisecond add up, and go-policyd's table does not move them."""
    clock = Clock()
    clock.now = int(time.time()) - HOUR_S
    journal = Journal(str(path), clock)
    expected = []
    for ms in (0, 1, 499, 500, 999):
        clock.now += 1
        now = clock.now
        clock.now += ms / 1000 + 0.0001
        journal.insert([event("anna", 1), event("bert", 2)])
        journal.insert([event("anna", 3)])  # of the same millisecond, in another slice
        expected += [(int(now) * 1000 + ms, "anna", 4), (int(now) * 1000 + ms, "bert", 2)]
        clock.now = now
    repository = maria_repository(table)
    while journal.replay(repository, soon()):
        pass
    assert rows_of(table) == expected
    assert sums_of(repository, [event("anna", 1), event("bert", 1)]) == [20, 10]


@pytest.mark.mariadb
def test_rows_of_a_slice_that_are_refused_do_not_block_the_others(
    path: Path, database: Database, logged: KeptLog
) -> None:
    database.query("ALTER TABLE events MODIFY recipient_count TINYINT")
    Journal(str(path)).insert([event("anna", n, sender=str(n)) for n in (1, 300, 2, 301, 302, 3)])
    with recording(maria_repository(database), path) as recorder:
        wait_until(lambda: any(error.startswith(ENDS) for error in logged.errors()), "all is replayed")
        assert sums(recorder, event("anna")) == [7]
    assert sorted(recipients for _, _, recipients in rows_of(database)) == [1, 1, 2, 3]
    refused = [error for error in logged.errors() if "not counted: " in error]
    assert [error.rpartition("/")[2] for error in refused] == ["300", "301", "302"]
    assert len(Journal(str(path))) == 0


# --- the clock ---


def test_a_clock_that_is_set_back_makes_the_window_longer(tmp_path: Path) -> None:
    """By as much: what was counted before counts for 25 h."""
    clock = Clock()
    store = SQLiteRepository(str(tmp_path / "events.sqlite3"), clock)
    assert count(store, event("anna", 3)) == [3]
    clock.now -= HOUR_S
    assert count(store, event("anna", 4)) == [7]
    clock.now += DAY_S - 1
    assert count(store, event("anna", 5)) == [12]
    clock.now += HOUR_S
    assert count(store, event("anna", 1)) == [3 + 5 + 1]
    clock.now += 2
    assert count(store, event("anna", 1)) == [5 + 1 + 1]
    assert store.purge(7) == 0


def test_a_clock_that_is_set_forward_makes_the_window_shorter(tmp_path: Path) -> None:
    """By as much: what was counted before counts for 23 h."""
    clock = Clock()
    store = SQLiteRepository(str(tmp_path / "events.sqlite3"), clock)
    assert count(store, event("anna", 3)) == [3]
    clock.now += HOUR_S
    assert count(store, event("anna", 4)) == [7]
    clock.now += DAY_S - HOUR_S - 1
    assert count(store, event("anna", 5)) == [12]
    clock.now += 2
    assert count(store, event("anna", 1)) == [10]


@pytest.mark.parametrize("step_s", [-HOUR_S, HOUR_S])
@pytest.mark.usefixtures("slices_of_two")
def test_a_clock_that_is_set_in_an_outage_loses_nothing(path: Path, tmp_path: Path, step_s: int) -> None:
    """Events are replayed in order of arrival with the time that was theirs, right or wrong."""
    clock = Clock()
    store = SQLiteRepository(str(tmp_path / "events.sqlite3"), clock)
    journal = Journal(str(path), clock)
    expected = []
    for n in range(1, 6):
        journal.insert([event("anna", n)])
        expected.append((int(clock.now * 1000), "anna", n))
        assert totals(journal, "anna") == {"anna": sum(range(n + 1))}
        clock.now += step_s if n == 3 else 1
    while journal.replay(store, soon()):
        pass
    assert times(store) == expected
    assert count(store, event("anna", 1)) == [16]


TIME_ZONES = {"summer to winter": (7200, 3600), "winter to summer": (3600, 7200)}


@pytest.fixture
def clocks_changed(request: pytest.FixtureRequest, table: Database) -> Iterator[int]:
    """Let the server live where the clocks were changed 70 minutes ago; return when that was (s since 1970)."""
    changed = int(time.time()) - 70 * 60
    before, after = TIME_ZONES[request.param]
    zone = f"Test/{table.name}"
    table.query("INSERT INTO mysql.time_zone (Use_leap_seconds) VALUES ('N')")
    number = table.query("SELECT MAX(Time_zone_id) FROM mysql.time_zone")[0][0]
    table.query("INSERT INTO mysql.time_zone_name VALUES (%s, %s)", (zone, number))
    for kind, offset in enumerate((before, after)):
        table.query(
            "INSERT INTO mysql.time_zone_transition_type VALUES (%s, %s, %s, %s, '')",
            (number, kind, offset, offset == 7200),
        )
        table.query("INSERT INTO mysql.time_zone_transition VALUES (%s, %s, %s)", (number, changed * kind, kind))
    with global_variable(table, "time_zone", zone):
        yield changed


@pytest.mark.mariadb
@pytest.mark.parametrize("clocks_changed", TIME_ZONES, indirect=True)
def test_in_the_night_of_the_clock_change_nothing_is_lost(path: Path, table: Database, clocks_changed: int) -> None:
    """The table is in the server's local time; in autumn an hour comes twice, and the events of both are there.

    The window is an hour longer then, and an hour shorter in spring.
    """
    is_autumn = table.query(
        "SELECT FROM_UNIXTIME(%s) = FROM_UNIXTIME(%s)", (clocks_changed - 600, clocks_changed + 3000)
    ) == [(1,)]
    clock = Clock()
    journal = Journal(str(path), clock)
    long_ago, lately = time.time() - DAY_S - 1800, time.time() - DAY_S + 1800
    for n, at in enumerate((long_ago, lately, clocks_changed - 600, clocks_changed + 1, clocks_changed + 3000)):
        clock.now = at
        journal.insert([event("anna", 10**n), event("bert", 1)])
    repository = maria_repository(table)
    while journal.replay(repository, soon()):
        pass
    assert table.query("SELECT SUM(recipient_count), COUNT(*) FROM events WHERE sasl_username = 'anna'") == [
        (11_111, 4 if is_autumn else 5)  # the two of one local time have added up
    ]
    counted = 11_111 if is_autumn else 11_100
    assert count(repository, event("anna", 100_000)) == [100_000 + counted]
    assert rows_of(table)[-1][1:] == ("anna", 100_000) or is_autumn  # in autumn, yesterday's may seem to be later
