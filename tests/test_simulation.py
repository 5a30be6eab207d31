"""Two faults at once, and more: hypothesis chooses what happens in a World, which looks at all answers and messages.

A schedule that has failed stays as a test of its own: `state.look(relay=0)`, as printed, is `world[0].look()` there.
By hand, 100,000 schedules: python -m pytest tests/test_simulation.py -k any_order --hypothesis-profile=long
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from stores import KeptLog
from world import ALWAYS, DISK_FAULTS, GONE, HOURLY, INCIDENTS, PLAIN, SLICE, STORE_FAULTS, World

from policyd import DAY_S, HOUR_S, MINUTE_S

SCHEDULES, STEPS = 2000, 50


@pytest.fixture(autouse=True)
def small_slices(logged: KeptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policyd.REPLAY_SLICE", SLICE)


RELAYS = st.integers(0, 1)
MESSAGES = st.lists(
    st.tuples(st.sampled_from(("anna", "anna", "boris", "odd", "refused")), st.integers(1, 5)), min_size=1, max_size=4
)
TIMES = st.sampled_from((ALWAYS, 1, 2))


class Simulation(RuleBasedStateMachine):
    @initialize(relays=st.integers(1, 2), is_looked=st.booleans())
    def begin(self, relays: int, is_looked: bool) -> None:
        self.stack = contextlib.ExitStack()
        self.world = self.stack.enter_context(World(relays, is_looked))

    @rule(relay=RELAYS, messages=MESSAGES)
    def send(self, relay: int, messages: list[tuple[str, int]]) -> None:
        self.world[relay].send(*messages)

    @rule(relay=RELAYS, messages=MESSAGES)
    def send_meanwhile(self, relay: int, messages: list[tuple[str, int]]) -> None:
        self.world[relay].send_meanwhile(*messages)

    @rule(relay=RELAYS, login=st.sampled_from(("anna", "boris")), incident=st.sampled_from(INCIDENTS))
    def send_and_stop(self, relay: int, login: str, incident: str) -> None:
        self.world[relay].send((login, 1), (login, incident))

    @rule(seconds=st.sampled_from((0, 20, MINUTE_S, 10 * MINUTE_S, HOUR_S, 5 * HOUR_S, DAY_S)))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(relay=RELAYS)
    def look(self, relay: int) -> None:
        self.world[relay].look()

    @rule(relay=RELAYS, steps=st.integers(0, 12), is_killed=st.booleans())
    def meanwhile(self, relay: int, steps: int, is_killed: bool) -> None:
        """In the middle of something: kill the process, or find the store."""
        setattr(self.world[relay], "kill_in" if is_killed else "look_in", steps)

    @rule(relay=st.sampled_from((None, 0, 1)), kind=st.sampled_from(list(STORE_FAULTS)), times=TIMES,
          seconds=st.sampled_from((0.4, 1.3, 2.2, 2.7)))  # fmt: skip
    def break_store(self, relay: int | None, kind: str, times: int, seconds: float) -> None:
        self.world.break_store(kind, times, seconds if kind == "slow" else math.inf, relay)

    @rule()
    def mend_store(self) -> None:
        self.world.mend_store()

    @rule(relay=RELAYS, kind=st.sampled_from((*DISK_FAULTS, *GONE)), times=TIMES)
    def break_disk(self, relay: int, kind: str, times: int) -> None:
        self.world[relay].break_disk(kind, times)

    @rule(relay=RELAYS)
    def mend_disk(self, relay: int) -> None:
        self.world[relay].mend_disk()

    @rule(relay=RELAYS, is_killed=st.booleans(), ahead_s=st.sampled_from((None, None, None, 2 * HOUR_S, 40 * DAY_S)),
          is_looked=st.booleans())  # fmt: skip
    def restart(self, relay: int, is_killed: bool, ahead_s: float | None, is_looked: bool) -> None:
        self.world[relay].terminate(ahead_s, is_looked, is_killed)

    @rule(relay=RELAYS, is_hourly=st.booleans())
    def reload(self, relay: int, is_hourly: bool) -> None:
        self.world[relay].reload(HOURLY if is_hourly else PLAIN)

    def teardown(self) -> None:
        self.stack.close()


def test_faults_in_any_order_lose_nothing_double_nothing_and_soften_no_answer() -> None:
    """New schedules in each run: what fails is printed with a line that repeats it."""
    run_state_machine_as_test(
        Simulation,
        settings=hypothesis.settings(
            max_examples=max(SCHEDULES, hypothesis.settings.default.max_examples), stateful_step_count=STEPS,
            database=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck), deadline=None,
        ),
    )  # fmt: skip


@contextlib.contextmanager
def outage(*messages: tuple[str, int], disk: str = "") -> Iterator[World]:
    """A world in which these messages were journaled and the store is well again, but the disk may be not."""
    with World() as world:
        world.break_store("away")
        world[0].send(*messages)
        world.mend_store()
        if disk:
            world[0].break_disk(disk)
        yield world


def test_any_number_of_crashes_doubles_one_slice_while_nothing_can_be_deleted_from_the_journal() -> None:
    with outage(*[("anna", 1)] * 8, disk="full") as world:
        world[0].look()
        world.wait(20)
        world[0].kill()
        world.wait(20)
        world[0].terminate()
        assert sum(world.permitted.values()) == SLICE


def test_what_was_moved_is_deleted_within_a_minute_of_the_disks_being_well_and_a_crash_then_doubles_nothing() -> None:
    with outage(*[("anna", 1)] * 8, disk="full") as world:
        world[0].look()
        world[0].mend_disk()
        world.wait(MINUTE_S)
        world[0].kill()
        assert not world.permitted


def test_a_sum_leaves_out_what_was_moved_and_could_not_be_deleted(logged: KeptLog) -> None:
    """That is one error; new messages go to the store as usual."""
    with outage(*[("anna", 2)] * 4, disk="not deleting") as world:
        world[0].look()
        for reached in (9, 10, 11):
            world[0].send(("anna", 1))
            assert world[0].last["anna"] == reached
        assert sum(world.copies.values()) == SLICE + 3
        assert len([line for line in logged.errors() if "cannot be deleted from the journal" in line]) == 1


def test_without_its_directory_the_journal_is_in_memory_until_there_is_one_or_the_end(logged: KeptLog) -> None:
    with World(is_looked=False) as world:
        path = world[0].path
        world.break_store("away")
        world[0].break_disk("unmounted")
        world[0].look()
        world[0].send(("anna", 1))
        world[0].send(("anna", 1))
        world[0].terminate(is_looked=False)
        world[0].send(("anna", 3))
        assert (world[0].last["anna"], bool(world[0].journal.trouble)) == (3, True)
        world[0].mend_disk()
        world.wait(MINUTE_S)
        assert (world[0].journal.trouble, world[0].journal.kept) == ("", [])
    trouble = f"no outage journal: {path}: unable to open database file; in an outage events are counted in memory only"
    over = f"no outage journal: over, {path} can be used again; 1 events wait in it"
    said = [line for line in logged.errors() if "UPDATING" not in line]
    assert said[:4] == [trouble, "2 events are forgotten: they were counted in memory only", trouble, over]


@pytest.mark.parametrize("when", ["at the start", "in the middle of its replay"])
def test_a_journal_that_cannot_be_read_is_not_taken_for_empty(when: str) -> None:
    with outage(*[("anna", 1)] * 8) as world:
        world[0].look() if when != "at the start" else None
        world[0].break_disk("unreadable")
        world[0].kill() if when == "at the start" else world.wait(20)
        world[0].send(("anna", 1))
        assert when == "at the start" or world[0].last["anna"] == 9
        world[0].mend_disk()
        world.wait(MINUTE_S)
        world[0].send(("anna", 1))
        assert world[0].last["anna"] == 10


def test_a_journal_that_cannot_be_read_is_never_less_than_nothing() -> None:
    """The moved events of a login that has not been asked about."""
    with World(is_looked=False) as world:
        world[0].break_disk("replaced by another one")
        world[0].look()
        world[0].break_disk("unreadable")
        world[0].send(("anna", 1))
        assert world[0].last["anna"] >= 1 + SLICE


def test_an_outage_is_not_over_while_the_directory_of_the_journal_is_gone(logged: KeptLog) -> None:
    with World(is_looked=False) as world:
        world[0].send(("anna", 1))
        world[0].break_disk("unmounted")
        world.break_store("away")
        world[0].kill()
        world.mend_store()
        world[0].look()
        assert not [line for line in logged.errors() if "UPDATING db: over" in line]


def test_what_a_lost_journal_had_is_counted_once() -> None:
    with World() as world:
        world.break_store("away")
        world[0].send(("anna", 1))
        world[0].break_disk("unmounted")
        world[0].send(("anna", 1))
        assert world[0].last["anna"] == 2


def test_what_the_store_has_told_is_known_though_it_does_not_say_since_when() -> None:
    with World() as world:
        world[0].send(("anna", 5), ("anna", "HOLD blocked"))
        world[0].terminate()
        world.break_store("slow", seconds=1.3)
        world[0].send(("anna", 1))
        assert world[0].last["anna"] == 6


def test_what_waits_in_a_journal_that_is_removed_is_at_once_in_a_new_one_and_survives_a_crash() -> None:
    with outage(*[("anna", 1)] * 4) as world:
        world[0].break_disk("removed")
        world.wait(0)
        world[0].kill()
        assert not world.lost


def test_what_was_taken_out_of_a_journal_that_goes_is_not_counted_again_when_it_comes_back() -> None:
    with outage(*[("anna", 1)] * 4) as world:
        world[0].break_disk("unmounted")
        world[0].look()
        world[0].mend_disk()
        assert not world.permitted


def test_what_comes_after_an_empty_journal_was_removed_survives_a_crash() -> None:
    with World() as world:
        world[0].break_disk("removed")
        world.break_store("away")
        world[0].send(("anna", 1), ("anna", "HOLD overquota"))
        world[0].kill()


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_journal_that_is_put_in_place_of_another_is_replayed_beside_it(is_removed: bool) -> None:
    with World() if is_removed else outage(*[("anna", 1)] * 4) as world:
        if is_removed:
            world[0].break_disk("removed")
            world.wait(MINUTE_S)
        world[0].break_disk("replaced by another one")
        world.break_store("away")
        world[0].send(("anna", 1))


@pytest.mark.parametrize("is_read", [False, True])
def test_what_was_moved_from_one_file_is_not_deleted_from_another(is_read: bool) -> None:
    with outage(*[("anna", 1)] * 4) as world:
        world[0].break_disk("full", times=1)
        world[0].look()
        if is_read:
            world[0].send(("anna", 1))
        world[0].break_disk("replaced by another one")


def test_a_row_that_the_store_refuses_keeps_nothing_else_in_the_journal() -> None:
    with outage(("odd", 1), ("refused", 1), ("anna", 1), ("refused", 1), ("boris", 1)) as world:
        world[0].look()
        world[0].turn()
        assert world[0].journal.is_empty()


@pytest.mark.parametrize("kind", ["losing answers", "waking up"])
def test_a_store_that_does_not_say_what_it_has_done_doubles_one_batch_and_never_again(kind: str) -> None:
    with World() as world:
        world[0].send(("anna", 1))
        world.break_store(kind, times=1)
        world[0].send(("anna", 1), ("boris", 1))
        world[0].send(("anna", 1))
        world[0].look()
        world.wait(MINUTE_S)
        assert sorted(world.copies.values()) == [1, 1, 2, 2]


def test_a_reload_in_an_outage_does_not_take_the_days_sum_for_the_hours() -> None:
    with World() as world:
        world[0].send(("anna", 40))
        world.wait(5 * HOUR_S)
        world[0].send(("anna", 5))
        world.break_store("away")
        world[0].reload(HOURLY)
        world[0].send(("anna", 5))
        assert world[0].last["anna"] == 50


def test_a_clock_that_is_set_in_an_outage_lets_nobody_go() -> None:
    with World() as world:
        world[0].send(("anna", 40))
        world.break_store("away")
        world[0].ahead_s, world.is_ahead = 2 * DAY_S, True
        world[0].send(("anna", 1))
        assert world[0].last["anna"] == 41


def test_events_of_a_relay_whose_clock_is_far_ahead_have_no_time_to_come() -> None:
    with World(relays=2) as world:
        world[1].terminate(ahead_s=40 * DAY_S)
        world.break_store("away")
        world[1].send(("anna", 1500))
        world.mend_store()
        world[1].look()
        world.wait(DAY_S + MINUTE_S)
        world[0].send(("anna", 1))
        assert world[0].last["anna"] == 1


def test_the_end_takes_no_longer_than_promised_however_slow_the_store() -> None:
    """What is in memory only goes to it while there is time; the rest is said to be forgotten."""
    with World() as world:
        world[0].break_disk("full")
        world.break_store("away")
        world[0].send(*[("anna", 1)] * 5 * SLICE)
        world.break_store("slow", seconds=1.3)
        world[0].look()
        before = sum(world.copies.values())
        world[0].terminate()
        assert sum(world.copies.values()) > before


def test_a_message_that_waits_behind_a_slow_batch_and_its_replay_is_answered_within_3_s() -> None:
    with World() as world:
        world.break_store("away")
        world[0].send(*[("anna", 1)] * 4)
        world.break_store("slow", seconds=1.3)
        world[0].send_meanwhile(("boris", 1))
        world[0].look()
        world[0].send(("anna", 1))


def test_a_batch_that_begins_late_goes_to_the_journal_and_the_store_is_not_called_away(logged: KeptLog) -> None:
    with World() as world:
        world[0].send(("anna", "HOLD blocked"))  # one question more: since when?
        world.wait(20 * MINUTE_S)
        world.break_store("slow", seconds=0.93)
        world[0].send_meanwhile(("boris", 1))
        world[0].send(("anna", 1))
        assert [line.partition(";")[0] for line in logged.errors()] == [
            "ERROR while UPDATING db: the database is too slow: events have waited for more than 2 s",
            "ERROR while UPDATING db: over after 1 s, 1 events replayed",
        ]
        assert world[0].recorder.down_s() is None


def test_a_journal_that_cannot_be_read_any_more_still_counts_as_far_as_it_is_known() -> None:
    with outage(("anna", 5)) as world:
        world[0].break_disk("unreadable")
        world[0].look()
        world.wait(2 * MINUTE_S)
        world[0].send(("anna", 1))
        assert (world[0].last["anna"], bool(world[0].journal.trouble)) == (6, True)


def test_a_slice_for_which_a_slow_batch_has_left_no_time_waits_and_the_store_is_not_called_away() -> None:
    with outage(*[("anna", 1)] * 2 * SLICE) as world:
        world.break_store("slow", seconds=1.3)
        world[0].look()
        world[0].send(("anna", 1))
        assert (world[0].recorder.down_s(), world[0].journal.waiting) == (None, SLICE)


def test_an_outage_begins_for_the_log_when_a_message_comes_before_the_store_was_found(logged: KeptLog) -> None:
    """Names may take long to be looked up.  Why it was not found is said, too."""
    with World(is_looked=False) as world:
        world.break_store("away", times=1)
        world[0].send(("anna", 1))
        world[0].look()
        world[0].look()
        said = [line.partition(";")[0].removeprefix("ERROR while UPDATING db: ") for line in logged.errors()]
        assert said == ["it is still being looked for", "the store is away", "over after 0 s, 1 events replayed"]
