"""What both repositories promise, on every table policyd may find."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from asking import CONNECTIONS, send_at_once, status
from hypothesis import example, given, settings
from hypothesis import strategies as st
from servers import DUNNO, HOLD, REJECT, Start
from stores import MariaStore, Store, count, event, incident, on_each_table, on_stores, soon, sums, total, usages

from policyd import DAY_S, HOUR_S, Event, Settings, Usage

FEW = Settings(defaultquota=3, hourquota=1000)  # so that histories are long ones soon
NEWEST = FEW.limits_of("anybody").rows  # of a long history, which are summed
FIRST = event("anna", 10, sender="first")


def test_only_the_last_24_hours_are_summed_and_the_last_hour_apart(store: Store) -> None:
    for recipients, age_s in (
        (1000, DAY_S + 60), (500, DAY_S - 60), (100, HOUR_S + 60), (10, HOUR_S - 60),
    ):  # fmt: skip
        store.add([("anna", "", "", recipients)], age_s)
    batch = [event("anna", 1), event("bert", 2), event("anna", 3)]
    assert count(store.repository, *batch) == [611, 2, 614]
    found = usages(store.repository, batch)
    assert [(each.recipients, each.of_hour) for each in found] == [(611, 11), (2, 2), (614, 14)]


def test_messages_of_one_batch_that_differ_in_nothing_are_a_row_each(store: Store) -> None:
    """How many messages came, and not only how many recipients, tells a thief from a letter to a class."""
    assert count(store.repository, *[event("anna", 2)] * 16) == list(range(2, 34, 2))
    assert store.rows() == [store.stored(event("anna", 2))] * 16
    moment = int((time.time() - HOUR_S) * 1000)
    replayed = [event("bert", n) for n in range(3)]
    assert store.repository.insert(replayed, soon(), [moment] * 3) == set()
    assert sorted(row[2] for row in store.times() if row[1] == "bert") == [0, 1, 2]
    assert store.repository.insert([event("carl")], soon(), [2**31 * 1000 + 1]) == set()
    assert sums(store.repository, [event("carl")]) == [1], "now, though the relay's clock has passed 2038"


logins, senders = st.sampled_from(["anna", "bert", "carl"]), st.sampled_from(["", "a@example.org"])
events = st.builds(event, logins, st.integers(1, 50), senders, st.sampled_from(["192.0.2.1", "2001:db8::1"]))


@settings(max_examples=25)
@given(batches=st.lists(st.lists(events, min_size=1, max_size=20), max_size=5))
@example([[FIRST], [event("anna", 1), event("bert", 2), event("anna", 3, sender=""), event("bert", 5)], [FIRST]])
def test_the_sums_of_a_batch_run_up_in_order_of_arrival(store: Store, batches: list[list[Event]]) -> None:
    store.clear()
    reached: Counter[str] = Counter()
    for batch in batches:
        expected = []
        for each in batch:
            reached[each.sasl_username] += each.recipient_count
            expected.append(reached[each.sasl_username])
        assert count(store.repository, *batch) == expected


def test_only_what_is_above_0_counts(store: Store) -> None:
    """Not an incident (NULL), nor what a human has forgiven (below 0), nor what is nothing (0)."""
    nothing = [("anna", "", "HOLD overquota", None), ("anna", "", "forgiven", 0), ("anna", "", "", -100)]
    store.add(nothing * 100 + [("anna", "", "", 7)], age_s=60)
    for reached in (12, 17, 22):  # of so many rows that the newest ones alone would do, were they messages
        assert count(store.repository, event("anna", 5), event("bert", 1), settings=FEW)[0] == reached
    used = usages(store.repository, [event("anna", 5), event("bert", 1)], FEW)
    assert [(each.recipients, each.of_hour) for each in used] == [(22, 22), (3, 3)]


def test_an_incident_is_a_row_that_all_relays_see_for_24_hours(store: Store) -> None:
    """Each kind is told apart."""
    store.add([("anna", "", "HOLD blocked", None), ("bert", "", "HOLD places", 0)], DAY_S - 60)
    store.add([("anna", "", "HOLD places", None)], DAY_S + 60)
    assert store.repository.insert([incident("anna", "REJECT overquota"), event("bert", 4)], soon()) == set()
    found = usages(store.another(), [event("anna", 0), event("bert", 4)])
    assert found == [Usage(0, 0, frozenset(["HOLD blocked", "REJECT overquota"])), Usage(4, 4)]
    assert sorted(store.rows(), key=str)[0] == ("anna", "", "HOLD blocked", None)
    kinds = [f"{action} {rule}" for action in ("HOLD", "REJECT")
             for rule in ("overquota", "hourquota", "places", "newplace", "blocked")]  # fmt: skip
    each_its_own = [incident(f"login{n}"[:8], kind) for n, kind in enumerate(kinds)]
    assert store.repository.insert([*each_its_own, *(incident("all", kind) for kind in kinds)], soon()) == set()
    found = usages(store.repository, [event(each.sasl_username, 0) for each in each_its_own] + [event("all", 0)])
    assert found == [*(Usage(0, 0, frozenset([kind])) for kind in kinds), Usage(0, 0, frozenset(kinds))]


def test_beyond_all_limits_incidents_and_a_forgive_still_show(store: Store) -> None:
    """Though of a long history only the newest rows are summed, which may lie after the incidents."""
    store.add([("anna", "", "HOLD blocked", None)], age_s=7200)
    store.add([("anna", "", "", 1)] * (3 * NEWEST), age_s=60)
    batch = [event("anna", 1, sender="")]
    count(store.repository, *batch, settings=FEW)
    for _ in range(3):
        assert usages(store.repository, batch, FEW)[0].incidents == {"HOLD blocked"}
    store.repository.insert([incident("anna", "REJECT overquota")], soon())
    assert usages(store.repository, batch, FEW)[0].incidents == {"HOLD blocked", "REJECT overquota"}
    assert store.forgive("anna") == 3 * NEWEST + 3
    assert usages(store.repository, batch, FEW) == [Usage(0)]
    assert count(store.repository, event("anna", 2), settings=FEW) == [2]


ODD_TEXTS = [
    "x" * 3000, "é" * 300, "\U0001f600" * 90, "anna\U0001f600", "é", "пётр", "п", "я", "?", "anna ", " anna", " ",
    "tab\there", "\x01\x1f\x7f\x80\x81\x9f", "back\\slash", "\\", "it's", 'a"b', "`", "%s %d %(x)s %", "a\u0301",
    "\u2028", "e", "E", "'; DROP TABLE events; -- ", '"; DELETE FROM events; #', "\\'; DELETE FROM events; -- ",
    "') OR 1=1 -- ",
]  # fmt: skip


@settings(max_examples=25)
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300), max_size=2))
@example(ODD_TEXTS)
def test_any_text_in_any_attribute_is_only_text_and_none_is_refused(store: Store, texts: list[str]) -> None:
    """What was inserted under a login is found under it, whatever the table makes of it."""
    for text in texts:
        store.clear()
        store.add([("other", "", "", 40)], age_s=60)
        batch = [Event(text, text, text, 3), Event("other", text, "a", 2), Event("other", "s", text, 1)]
        assert count(store.repository, *batch) == [3, 42, 43], ascii(text)
        assert set(store.rows()) == {("other", "", "", 40), *map(store.stored, batch)}
        assert count(store.repository, batch[0]) == [6], ascii(text)


@on_stores("schema.sql", "go-policyd", "go-policyd with an index")
def test_logins_that_the_column_cuts_to_the_same_share_a_sum(store: MariaStore) -> None:
    same = "x" * store.width
    assert count(store.repository, event(same + "1", 1), event(same + "2", 2), event(same, 4)) == [1, 3, 7]
    assert count(store.repository, event(same[:-1], 1)) == [1]
    store.add([("anna  ", "", "", 5)], age_s=60)  # nor do spaces tell it apart that somebody has stored
    assert count(store.repository, event("anna", 1)) == [6]


def test_logins_that_a_collation_takes_for_equal_stay_apart(store: Store) -> None:
    logins = ["e", "é", "E", "ê", "a", "A", "ß", "ss"]
    for n, login in enumerate(logins):
        store.add([(login, "", "", 2**n), (login, "", "", None)], age_s=60 + n)
    batch = [event(login, 1000 + n, sender=str(n)) for n, login in enumerate(logins)]
    expected = [1000 + n + 2**n for n in range(len(logins))]
    assert count(store.repository, *batch, settings=FEW) == expected
    assert sums(store.repository, batch, FEW) == expected  # now as long histories: one row is more than what decides
    assert sums(store.another(), batch[:1]) == expected[:1], "though the others are found with it"
    assert store.repository.ask("SELECT COUNT(*) FROM {table} WHERE {of_login}", {"login": "é"}) == [(3,)]
    assert count(store.repository, event("п", 1), event("я", 2), event("?", 4)) == [1, 2, 4]  # which it may not spell


def test_a_long_history_is_summed_no_further_than_it_matters_and_exactly_when_it_is_short_again(store: Store) -> None:
    """It changes no answer, see test_decision.py; without an index one sum for all costs the least."""
    rows = 3 * NEWEST
    store.add([("anna", "", "", 1)] * rows, age_s=60)
    count(store.repository, event("anna", 1), settings=FEW)
    (found,) = count(store.repository, event("anna", 1, sender="another"), settings=FEW)
    store.repository.check(5)
    assert found == rows + 2 if store.repository.index_remedy else NEWEST <= found < rows
    store.clear()
    store.add([("anna", "", "", 7), ("anna", "", "", None), ("anna", "", "", 70)], age_s=60)
    for _ in range(3):
        assert sums(store.repository, [event("anna", 7)], FEW) == [77]


@on_stores("SQLite")
def test_a_long_history_costs_no_more_than_a_short_one(store: Store) -> None:
    """Incidents are found without a look at all messages of the day."""

    def steps() -> int:
        taken: list[int] = []
        with store.repository._connection() as connection:
            connection.set_progress_handler(lambda: taken.append(1), 100)
        sums(store.repository, [event("anna")], FEW)
        return len(taken)

    store.add([("anna", "", "", 1)] * NEWEST, age_s=60)
    short = steps()
    store.add([("anna", "", "", 1)] * 20 * NEWEST, age_s=60)
    assert steps() <= 1.1 * short


@on_stores("SQLite")
def test_the_end_hangs_up_on_no_thread_that_still_reads(store: Store) -> None:
    store.add([("anna", "", "", 1)], age_s=0)
    with ThreadPoolExecutor(1) as other:
        rows = store.repository.first()
        assert other.submit(next, rows).result()
        store.repository.close()
        assert not other.submit(next, rows, None).result()


def test_purge_deletes_what_is_older_a_slice_at_a_time(store: Store) -> None:
    """So that nobody has to wait for millions of rows."""
    words = {"keep": 3 * DAY_S, "rows": 3}
    slices = iter(lambda: store.repository.ask(store.repository.PURGE, words)[0][0], 0)
    store.add([("anna", "", "", n) for n in range(7)], age_s=3 * DAY_S + 60)
    store.add([("anna", "", "", n) for n in (10, 11, 12)], age_s=3 * DAY_S - 60)
    assert [(deleted, len(store.rows())) for deleted in slices] == [(3, 7), (3, 4), (1, 3)]
    assert sorted(row[3] or 0 for row in store.rows()) == [10, 11, 12]


def test_check_and_another_init_write_nothing_and_name_the_store(store: Store) -> None:
    """Nor does the first init, which may upgrade it, change what is in it."""
    assert count(store.repository, event("anna", 3)) == [3]
    before = store.rows()
    assert str(store.repository) in store.repository.check(5)
    assert store.rows() == before
    for _ in range(2):
        store.repository.init()
        assert store.rows() == before
    assert count(store.repository, event("anna", 4)) == [7]


@on_each_table
def test_each_recipient_is_counted_once_and_the_quota_is_met_to_the_message(policyd: Start, store: Store) -> None:
    """Of one sender, one address, and one login at a time: all that could be taken for the same."""
    daemon = policyd(defaultquota=300, quota="many:100000", **store.settings)
    counts = [1 + n * n % 23 for n in range(800)]
    answers = send_at_once([daemon], [{"sasl_username": "many", "recipient_count": count} for count in counts])
    assert answers == [DUNNO] * len(counts)
    assert total(store) == sum(counts)
    daemon.wait_for_log(f"/{sum(counts)}")
    assert Counter(send_at_once([daemon], [{}] * 1000)) == {DUNNO: 299, HOLD: 300, REJECT: 401}
    assert total(store, "alice") == 1000
    assert status(daemon).text.startswith("1800 requests: 1099 DUNNO, 300 HOLD, 401 REJECT; 1 logins held; ")


@on_stores("schema.sql", "go-policyd")
def test_two_relays_hold_a_login_at_one_quota(policyd: Start, store: MariaStore) -> None:
    relays = [policyd(defaultquota=300, **store.settings) for _ in range(2)]
    answers = Counter(send_at_once(relays, [{}] * 1000))
    assert total(store) == sum(answers.values()) == 1000
    # The n-th message that is committed has a sum of at least n.  It is more where a message of the other relay has
    # been committed meanwhile, of which there is one a connection at most.
    assert 299 - CONNECTIONS <= answers[DUNNO] <= 299
    assert answers[REJECT] >= 401
    assert [relay.ask() for relay in relays] == [REJECT, REJECT]
