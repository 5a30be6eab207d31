"""What gives a thief away before the quota does: a login that mails from places it has never been."""

from __future__ import annotations

import ipaddress
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple

import pytest
from asking import Outcome, Relay, forgive
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recorders import AWAY, BreakableRepository
from servers import DUNNO, HOLD, REJECT, Policyd
from stores import DAY_S, KeptLog, SQLiteStore, Store, incident, on_stores

from policyd import RepositoryUnavailable, Sighting, UserList, signs

Start = Callable[..., Policyd]
StartRelay = Callable[..., Relay]

_numbers = itertools.count(1)

MINUTE_S, HOUR_S = 60, 3600
HOME = "10.0.0.1"
PLACES = "HOLD too many places"
NEWPLACE = "HOLD too much from new places"
on_indexed = on_stores("SQLite", "schema.sql", "go-policyd with an index")
on_each = on_stores("SQLite", "schema.sql")


def at(place: int) -> str:
    """Return an address in one of many places."""
    return f"{20 + place}.0.0.1"


def add(store: Store, age_s: float, *rows: tuple[str, int | None], login: str = "anna") -> None:
    """Put in rows: from where, how many; each of its own."""
    if rows:
        store.add([(login, f"{n}@x", address, count) for n, (address, count) in enumerate(rows)], age_s)


def at_home(store: Store, login: str = "anna") -> None:
    """Let a login have mailed from home for some days, and 40 recipients within the hour: enough to be looked at."""
    for age_s, count in ((5 * DAY_S, 1), (2 * DAY_S, 5), (40 * MINUTE_S, 40)):
        add(store, age_s, (HOME, count), login=login)


@pytest.fixture
def start(store: Store, logged: KeptLog) -> StartRelay:
    """A function that starts a relay which has looked at all once; the table remembers more than three days."""
    add(store, 4 * DAY_S, ("192.0.2.1", 1), login="bert")

    def started(*lines: str, finds: Sequence[str] = (), **options: Any) -> Relay:
        early_signs = [] if "early_signs=" in "".join(lines) else ["early_signs=yes"]
        relay = Relay(store, logged, "keep_days=30", *early_signs, *lines, **options)
        assert relay.sweep() == list(finds)
        return relay

    return started


def line(rule: str, login: str = "anna", client_address: str = HOME) -> str:
    """Return the line of a message that was stopped by a rule."""
    return f"{rule} for user {login} using SENDER from ip [{client_address}], queue_id=4Xk1Zt"


def send(relay: Relay, client_address: str, recipients: int = 1, login: str = "anna") -> Outcome:
    """Ask about a message; of what was logged only what stopped it is told.

    Each has a sender of its own, which is not shown: two of one millisecond from one sender would be one row.
    """
    sender = f"{next(_numbers)}@example.org"
    message = {"sender": sender, "client_address": client_address, "recipient_count": recipients}
    answer, (counted, *lines) = relay.ask(login, **message)
    assert counted.startswith(f"Updating db: {login}/{sender}/{client_address}/{recipients}/")
    return Outcome(answer, [line.replace(sender, "SENDER") for line in lines])


def incidents(store: Store) -> list[tuple[str, str]]:
    """Return whose incidents are in the table, and of which kind."""
    return [(login, what) for login, _, what, count in store.rows() if count is None]


# ---- the figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sightings", "figures"),
    [
        ([], (0, 0, 0)),
        ([(at(n), 1, 1, 60) for n in range(4)], (4, 4, 0)),
        ([(at(n), 1, 1, 60) for n in range(5)], (5, 5, 5)),
        ([(at(1), 9, 5, 60), ("21.9.9.9", 3, 1, 60)], (1, 1, 12)),
        ([(at(1), 99, 4, 60)], (1, 1, 0)),
        ([(at(1), 99, 4, 60), (HOME, 99, 4, 60)], (1, 1, 0)),
        ([(at(1), 9, 5, 1799), (at(2), 9, 5, 1800), (at(3), 0, 0, 80_000)], (1, 3, 18)),
        ([(HOME, 9, 5, 60), ("unknown", 9, 5, 60), ("", 9, 5, 60)], (0, 0, 0)),
        ([("192.0.2.1", 9, 5, 60), ("192.0.3.1", 7, 5, 60)], (1, 1, 7)),
        ([(f"::ffff:{at(1)}", 1, 2, 60), ("64:ff9b::1500:2", 1, 2, 60), (at(1), 1, 1, 60)], (1, 1, 3)),
        ([("2001:db8::1", 1, 1, 60), ("2001:1::1", 1, 1, 60), ("2a02::1", 1, 3, 60)], (2, 2, 3)),
    ],
)
def test_places_are_counted_and_what_came_from_new_ones(
    sightings: list[tuple[str, int, int, float]], figures: tuple[int, int, int]
) -> None:
    """New ones within half an hour and altogether, and an hour's recipients if they came in five messages."""
    trusted = UserList([(ipaddress.ip_network("192.0.2.0/24"), 1)])
    assert signs([Sighting(*each) for each in sightings], {"10."}, trusted) == figures


# ---- too many places --------------------------------------------------------------------------------


@on_indexed
def test_one_new_place_more_than_max_places_in_half_an_hour_is_held(store: Store, start: StartRelay) -> None:
    """And from then on all mail of the login, whichever place it comes from; a human is told once."""
    at_home(store)
    add(store, 31 * MINUTE_S, *((at(n), 1) for n in range(20, 25)))  # longer ago
    relay = start()
    for place in (1, 2, 3, 2, 4, 5, 5):
        assert send(relay, at(place)) == (DUNNO, [])
    assert send(relay, HOME) == (DUNNO, [])
    assert send(relay, at(6)) == (PLACES, [line("DEFERRING places (6>5)", client_address=at(6))])
    for address in (at(7), HOME):
        answer, (said,) = send(relay, address)
        assert answer == PLACES
        assert re.fullmatch(r"DEFERRING places \(since [-0-9]+ [:0-9]+\) for user anna using .*", said)
    assert incidents(store) == [("anna", "HOLD places")]
    assert [{**each, "since": "", "sender": ""} for each in relay.told] == [{
        "login": "anna", "rule": "HOLD places", "since": "", "recipients": 54, "figure": 6, "limit": 5,
        "sender": "", "client_address": at(6), "queue_id": "4Xk1Zt",
    }]  # fmt: skip
    assert send(relay, at(7), login="bert") == (DUNNO, [])


@on_each
def test_below_40_recipients_an_hour_only_the_sweep_looks_at_places(store: Store, start: StartRelay) -> None:
    """A botnet of one-recipient messages is found within a minute; by one relay, which records it and tells."""
    add(store, 2 * DAY_S, (HOME, 1))
    one, other = start(), start()
    assert [send(one, at(place)) for place in range(6)] == [(DUNNO, [])] * 6
    assert one.sweep() == ["Held by the sweep: anna, places (6>5)"]
    assert other.sweep() == []
    assert (len(one.told), len(other.told), incidents(store)) == (1, 0, [("anna", "HOLD places")])
    assert [send(relay, HOME).answer for relay in (one, other)] == [PLACES] * 2


@on_indexed
def test_the_sweep_holds_who_was_in_too_many_places_in_24_h(store: Store, start: StartRelay) -> None:
    """Three times as many as in half an hour: however slow a botnet is, and however little each message has."""
    for login, places in (("anna", 16), ("dora", 15)):
        add(store, 3 * DAY_S, (HOME, 1), login=login)
        for place in range(places):
            add(store, (31 + 80 * place) * MINUTE_S, (at(place), 1), (HOME, 9), login=login)
    relay = start(finds=["Held by the sweep: anna, places (16>15)"])
    assert incidents(store) == [("anna", "HOLD places")]
    told = [each[key] for each in relay.told for key in ("login", "rule", "recipients", "figure", "limit")]
    assert told == ["anna", "HOLD places", 160, 16, 15]
    assert send(relay, HOME).answer == PLACES
    assert send(relay, HOME, login="dora") == (DUNNO, [])
    assert relay.sweep() == [], "who is held is not found again"
    assert send(relay, at(15), login="dora") == (DUNNO, [])
    assert relay.sweep() == ["Held by the sweep: dora, places (16>15)"]


@on_each
@pytest.mark.parametrize("kind", ["HOLD places", "HOLD newplace", "HOLD blocked", "REJECT places", "HOLD overquota"])
def test_a_login_that_is_held_for_a_day_anyhow_is_not_swept_and_a_quota_spares_nobody(
    store: Store, start: StartRelay, kind: str
) -> None:
    store.add([incident("anna", kind)], HOUR_S)
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    start(finds=["Held by the sweep: anna, places (6>5)"] * (kind == "HOLD overquota"))
    assert len(incidents(store)) == 1 + (kind == "HOLD overquota")


@on_each
@pytest.mark.parametrize("setting", ["max_places=6", "max_places=0", "early_signs=no"])
def test_0_places_or_no_early_signs_hold_nobody(store: Store, start: StartRelay, setting: str) -> None:
    at_home(store)
    relay = start(setting)
    held = {PLACES} if setting == "max_places=6" else set()
    assert {send(relay, at(n)).answer for n in range(40)} == {DUNNO, *held}
    assert relay.sweep() == []


# ---- too much from new places -----------------------------------------------------------------------

SENT = {  # of the last hour, messages from where and with how many recipients; what becomes of one more
    "reaching the quota in five messages": ([(at(1), 20)] * 4, (at(1), 20), "newplace (100>100)"),
    "one recipient less": ([(at(1), 20)] * 4, (at(1), 19), ""),
    "four messages": ([(at(1), 300)] * 3, (at(1), 300), ""),
    "a fifth": ([(at(1), 300)] * 4, (at(1), 1), "newplace (1201>100)"),
    "several places": ([(at(1), 40), (at(2), 40), (at(3), 10), (at(1), 5)], (at(2), 5), "newplace (100>100)"),
    "the known place does not count": ([(at(1), 20)] * 4 + [(HOME, 900)], (at(1), 19), ""),
    "mail from the known place passes": ([(at(1), 200)] * 5, (HOME, 1), ""),
    "no place at all": ([("unknown", 200)] * 5, ("unknown", 1), ""),
    "a trusted network": ([("192.0.2.1", 200)] * 5, ("192.0.2.9", 1), ""),
    "beside a trusted network": ([("192.0.2.1", 200)] * 5 + [("192.0.3.1", 20)] * 4, ("192.0.3.1", 20),
                                 "newplace (100>100)"),
    "forgiven": ([(at(2), -200)] * 5 + [(at(1), 20)] * 4, (at(1), 19), ""),
    "IPv4 inside IPv6": ([(f"::ffff:{at(1)}", 20), ("64:ff9b::1500:2", 60), (at(1), 1), (at(1), 1)],
                         ("64:ff9b::1500:3", 18), "newplace (100>100)"),
    "IPv6": ([("2001:db8::1", 25)] * 4, ("2001:1::1", 1), "newplace (101>100)"),
}  # fmt: skip


@on_indexed
@pytest.mark.parametrize("name", SENT)
def test_so_much_within_an_hour_from_new_places_is_held(store: Store, start: StartRelay, name: str) -> None:
    """What is older than an hour does not count."""
    before, (client_address, recipients), said = SENT[name]
    at_home(store)
    add(store, 59 * MINUTE_S, *before)
    add(store, 61 * MINUTE_S, *[(at(1), 30)] * 9)
    relay = start("trusted_network=192.0.2.0/24", "defaultquota=5000")
    expected = [line(f"DEFERRING {said}", client_address=client_address)] if said else []
    assert send(relay, client_address, recipients) == (NEWPLACE if said else DUNNO, expected)
    assert incidents(store) == [("anna", "HOLD newplace")] * bool(said)
    if said:
        assert send(relay, HOME).answer == NEWPLACE
    assert len(relay.told) == bool(said)


@on_each
@pytest.mark.parametrize(("login", "is_exempt"), [("anna", False), ("own", True), ("news", True), ("free", True)])
def test_logins_whose_bulk_is_known_may_send_it_from_anywhere_but_not_from_everywhere(
    store: Store, start: StartRelay, login: str, is_exempt: bool
) -> None:
    """Those with a quota of their own, and the whitelisted out of office hours."""
    at_home(store, login)
    hours = "whitelist_hours=0-0"
    relay = start("quota=own:5000", "quota=free:unlimited", "whitelist=news", hours, "max_places=3")
    answers = [send(relay, at(1), 30, login).answer for _ in range(6)]
    assert answers == ([DUNNO] * 6 if is_exempt else [DUNNO] * 4 + [NEWPLACE] * 2)
    if is_exempt:
        assert [send(relay, at(n), login=login).answer for n in (2, 3, 4)] == [DUNNO, DUNNO, PLACES]


@on_each
def test_a_lower_new_place_quota_is_looked_at_from_its_first_recipient_on(store: Store, start: StartRelay) -> None:
    relay = start("new_place_quota=10")
    answers = [send(relay, at(1), 2) for _ in range(5)]
    assert answers == [(DUNNO, [])] * 4 + [(NEWPLACE, [line("DEFERRING newplace (10>10)", client_address=at(1))])]


@on_each
def test_above_the_quota_the_quota_decides_and_below_the_hardest_rule(store: Store, start: StartRelay) -> None:
    at_home(store)
    relay = start("defaultquota=150", "hourquota=130", "max_places=1")
    for place, recipients, answer in [
        (1, 20, DUNNO), (2, 1, PLACES), (3, 80, "HOLD hour quota exceeded"), (3, 9, HOLD), (3, 150, REJECT),
    ]:  # fmt: skip
        assert send(relay, at(place), recipients).answer == answer
    kinds = [("anna", kind) for kind in ("HOLD places", "REJECT overquota")]
    assert incidents(store) == kinds, "a HOLD of another rule is no news"


# ---- what is known ----------------------------------------------------------------------------------

DAY_AND_A_HALF = 36 * HOUR_S
PAST: dict[str, tuple[list[tuple[str, int | None, float]], bool]] = {  # what the table has: address, count, age
    "nothing": ([], False),
    "less than a day ago": ([(at(1), 1, 23 * HOUR_S)], False),
    "a day ago": ([(at(1), 1, 25 * HOUR_S)], True),
    "a day ago and since then": ([(at(1), 1, 25 * HOUR_S), (at(1), 1, 2 * HOUR_S)], True),
    "weeks ago": ([(at(1), 1, 29 * DAY_S)], True),
    "too long ago": ([(at(1), 1, 31 * DAY_S)], False),
    "another network of the place": ([("21.255.3.4", 1, 2 * DAY_S)], True),
    "inside IPv6": ([(f"::ffff:{at(1)}", 1, 2 * DAY_S)], True),
    "another place": ([(at(2), 1, 2 * DAY_S)], False),
    "forgiven an hour ago": ([(at(1), -5, 2 * HOUR_S)], True),
    "before an incident": ([(at(1), 1, 40 * HOUR_S), ("HOLD places", None, DAY_AND_A_HALF)], False),
    "before another one": ([(at(1), 1, 40 * HOUR_S), ("REJECT newplace", None, DAY_AND_A_HALF)], False),
    "a day before an incident": ([(at(1), 1, 61 * HOUR_S), ("HOLD places", None, DAY_AND_A_HALF)], True),
    "of two incidents the first": (
        [(at(1), 1, 61 * HOUR_S), *(("HOLD places", None, n * HOUR_S) for n in (50, 25))], False),
    "before a forgiven incident": ([(at(1), 1, 40 * HOUR_S), ("HOLD places", 0, DAY_AND_A_HALF)], True),
    "before an incident of a quota": ([(at(1), 1, 40 * HOUR_S), ("HOLD overquota", None, DAY_AND_A_HALF)], True),
    "forgiven after an incident": ([(at(1), -1, 30 * HOUR_S), ("HOLD places", None, DAY_AND_A_HALF)], True),
}  # fmt: skip


@on_indexed
@pytest.mark.parametrize("name", PAST)
def test_a_place_is_known_that_was_used_a_day_to_keep_days_ago_or_forgiven(
    store: Store, start: StartRelay, name: str
) -> None:
    """With an incident that nobody has forgiven, only what was used a day before it: not the thief's places."""
    past, is_known = PAST[name]
    for address, count, age_s in past:
        add(store, age_s, (address, count))
    add(store, 2 * DAY_S, (at(1), 1), login="bert")
    add(store, 50 * MINUTE_S, *[(at(1), 30)] * 4)
    assert send(start(), at(1), 30).answer == (DUNNO if is_known else NEWPLACE)


@on_indexed
def test_who_was_forgiven_is_not_held_again_from_the_same_places(store: Store, start: StartRelay) -> None:
    """At once, though what is known is remembered, nor by a sweep; a second wave from yet other places is."""
    at_home(store)
    relay = start()
    wave = [PLACES, *[DUNNO] * 5][::-1]
    assert [send(relay, at(n)).answer for n in range(6)] == wave
    forgive(store, "anna")
    assert send(relay, HOME, 50) == (DUNNO, [])
    assert [send(relay, at(n)).answer for n in range(6)] == [DUNNO] * 6
    assert relay.sweep() == []
    assert [send(relay, at(n)).answer for n in range(10, 16)] == wave
    assert [each["rule"] for each in relay.told] == ["HOLD places"] * 2
    assert relay.sweep() == []


@on_each
@pytest.mark.parametrize(
    ("age_s", "is_judged"),
    [(71 * HOUR_S, False), (73 * HOUR_S, True), (29 * DAY_S, True), (31 * DAY_S, False), (20_000 * DAY_S, False)],
)
def test_nothing_is_judged_before_the_table_remembers_three_days(
    store: Store, start: StartRelay, age_s: float, is_judged: bool
) -> None:
    """On the first day everything is new; one stray row of 1970 says nothing."""
    store.clear()
    add(store, age_s, ("192.0.2.1", 1), login="bert")
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    relay = start(finds=["Held by the sweep: anna, places (6>5)"] * is_judged)
    add(store, MINUTE_S, *[(at(1), 30)] * 5, login="dora")
    assert send(relay, at(1), login="dora").answer == (NEWPLACE if is_judged else DUNNO)


# ---- what lasts -------------------------------------------------------------------------------------

YES = ("early_signs=yes",)
AUDIT = ("early_signs=audit",)
NO = ("early_signs=no",)


@on_stores("SQLite", "schema.sql", "go-policyd")
@pytest.mark.parametrize(
    ("kind", "lines", "answer", "word"),
    [
        ("HOLD places", YES, PLACES, "DEFERRING places"),
        ("HOLD newplace", YES, NEWPLACE, "DEFERRING newplace"),
        ("REJECT places", YES, PLACES, "DEFERRING places"),
        ("HOLD places", AUDIT, DUNNO, "would HOLD places"),
        ("HOLD places", (*YES, "mode=audit"), DUNNO, "would HOLD places"),
        ("HOLD newplace", NO, DUNNO, ""),
        ("HOLD blocked", YES, "HOLD blocked", "DEFERRING blocked"),
        ("HOLD blocked", NO, "HOLD blocked", "DEFERRING blocked"),
        ("HOLD blocked", (*AUDIT, "mode=audit", "quota=anna:unlimited"), "HOLD blocked", "DEFERRING blocked"),
        ("HOLD overquota", YES, DUNNO, ""),
    ],
)
def test_an_incident_of_another_relay_holds_here_for_24_h_as_our_own_would(
    store: Store, start: StartRelay, logged: KeptLog, kind: str, lines: tuple[str, ...], answer: str, word: str
) -> None:
    """A human's word always; early signs as this relay's early_signs= says.  Also after a restart; TIME is local."""
    store.add([incident("anna", kind)], DAY_S - MINUTE_S)
    before = time.time() - DAY_S
    for _ in range(2):
        relay = Relay(store, logged, "keep_days=30", *lines)
        for _ in range(2):
            found, said = send(relay, HOME)
            assert (found, [text.partition(" (since ")[0] for text in said]) == (answer, [word] if word else [])
            for moment in re.findall(r"since ([-0-9]+ [:0-9]+)\)", "".join(said)):
                assert abs(time.mktime(time.strptime(moment, "%Y-%m-%d %H:%M:%S")) - before - MINUTE_S) < HOUR_S / 2
        assert relay.told == []
    store.clear()
    store.add([incident("anna", kind)], DAY_S + MINUTE_S)
    assert send(Relay(store, logged, "keep_days=30", *lines), HOME) == (DUNNO, [])


@on_each
@pytest.mark.parametrize("lines", [("early_signs=audit",), ("early_signs=yes", "mode=audit")])
def test_an_audit_says_what_would_be_held_and_records_and_tells_nothing(
    store: Store, start: StartRelay, lines: tuple[str, ...]
) -> None:
    """The sweep once a login and day; quotas hold meanwhile, unless all is an audit."""
    at_home(store)
    for n in range(16):
        add(store, (31 + 60 * n) * MINUTE_S, (at(n), 1), login="dora")
    found = "would HOLD places (16>15) for user dora, found by the sweep"
    relay = start(*lines, "defaultquota=200", finds=[found])
    assert [send(relay, at(n)) for n in range(5)] == [(DUNNO, [])] * 5
    assert send(relay, at(5)) == (DUNNO, [line("would HOLD places (6>5)", client_address=at(5))])
    assert send(relay, HOME) == (DUNNO, [])
    assert relay.sweep(2 * HOUR_S) == ["would HOLD places (6>5) for user anna, found by the sweep"]
    assert relay.sweep(2 * HOUR_S) == []
    assert (relay.told, incidents(store)) == ([], [])
    assert sorted(relay.sweep(DAY_S)) == [found, "would HOLD places (6>5) for user anna, found by the sweep"]
    assert send(relay, HOME, 200).answer == (DUNNO if "mode=audit" in lines else HOLD)
    assert len(relay.told) == len(incidents(store)) == (0 if "mode=audit" in lines else 1)


# ---- when something is down -------------------------------------------------------------------------


@on_stores("SQLite")
def test_in_an_outage_no_early_sign_is_judged_and_known_incidents_hold_on(
    store: SQLiteStore, start: StartRelay
) -> None:
    """Quotas work; afterwards all logins are swept, not only those that send then."""
    at_home(store)
    at_home(store, "dora")
    store.add([incident("carl", "HOLD places")], HOUR_S)
    repository = BreakableRepository(str(store._path))
    relay = start("defaultquota=200", repository=repository)
    assert [send(relay, HOME, login=login).answer for login in ("carl", "dora")] == [PLACES, DUNNO]
    repository.broken = AWAY
    for login, n in (("dora", 0), ("carl", 0), *(("anna", n) for n in range(10))):
        assert relay.ask(login, client_address=at(n)).answer == (PLACES if login == "carl" else DUNNO)
    assert relay.recorder.down_s() is not None
    assert relay.sweep() == []
    assert relay.ask("anna", client_address=HOME, recipient_count=200).answer == HOLD
    repository.broken = frozenset()
    relay.recorder.look_for_store()
    for _ in range(3):
        relay.recorder.turn()
    assert (relay.recorder.down_s(), relay.recorder.journal.waiting) == (None, 0)
    store.add([("late", "", at(n), 1) for n in range(16)], 2 * HOUR_S)
    found = ["anna, places (10>5)", "late, places (16>15)"]
    assert sorted(relay.sweep()) == [f"Held by the sweep: {each}" for each in found]
    assert relay.ask("late").answer == PLACES


class Unsweepable(BreakableRepository):
    """A store in which only the sweep fails."""

    def ask(self, statement: str, arguments: Mapping[str, object], deadline: float | None = None) -> list[Any]:
        if deadline is None and self.broken:
            raise RepositoryUnavailable("as for a wrong right")
        return super().ask(statement, arguments, deadline)


@on_stores("SQLite")
def test_a_sweep_that_fails_is_one_warning_and_tried_again_each_minute(store: SQLiteStore, start: StartRelay) -> None:
    repository = Unsweepable(str(store._path))
    relay = start(repository=repository)
    add(store, 10 * MINUTE_S, *((at(n), 1) for n in range(6)))
    for found in (["Held by the sweep: anna, places (6>5)"], []):
        repository.broken = frozenset(("ask",))
        expected = ["no sweep for early signs, trying each minute: as for a wrong right"]
        assert [relay.sweep(5 * MINUTE_S) for _ in range(3)] == [expected, [], []]
        assert relay.recorder.down_s() is None
        repository.broken = frozenset()
        assert relay.sweep() == found


@on_stores("go-policyd")
def test_without_the_index_there_is_no_sweep_and_the_log_says_what_helps(
    store: Store, start: StartRelay, logged: KeptLog
) -> None:
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    (warning,) = Relay(store, logged, "keep_days=30", "early_signs=yes").sweep()
    assert "index" in warning
    assert "policyd --init-db" in warning
    assert incidents(store) == []


# ---- against a plain model --------------------------------------------------------------------------


class Past(NamedTuple):
    """A row of anna's: a message, one that was forgiven, or an incident."""

    what: str
    count: int | None
    age_s: float


AGES = [MINUTE_S, 29 * MINUTE_S, 31 * MINUTE_S, 59 * MINUTE_S, 61 * MINUTE_S, 23 * HOUR_S, 25 * HOUR_S, 50 * HOUR_S,
        29 * DAY_S, 31 * DAY_S]  # fmt: skip
CLIENTS = [HOME, "10.9.9.9", *map(at, range(5)), "::ffff:20.0.0.9", "64:ff9b::1600:1", "unknown", "192.0.2.1",
           "2001:db8::1", "2a02::1"]  # fmt: skip
messages = st.builds(Past, st.sampled_from(CLIENTS), st.sampled_from([1, 2, 20, 20, 30, 0, -3]), st.sampled_from(AGES))
troubles = st.builds(Past, st.sampled_from(["HOLD places", "HOLD newplace", "HOLD overquota"]),
                     st.sampled_from([None, None, 0]), st.sampled_from(AGES[5:]))  # fmt: skip
pasts = st.lists(messages, max_size=14) | st.lists(messages | troubles, max_size=20)


def place(client_address: str) -> str:
    """Return the first number of an address; nothing if it has no place."""
    if client_address.startswith("192.0.2.") or client_address[0] not in "0123456789:":
        return ""
    inside = re.fullmatch(r"::ffff:(.*)", client_address)
    if client_address.startswith("64:ff9b::"):
        return f"{int(client_address[9:11], 16)}."
    client_address = inside[1] if inside else client_address
    return client_address.split(".")[0] + "." if "." in client_address else client_address.split(":")[0] + ":"


def by_the_book(past: list[Past], quota: int, max_places: int) -> tuple[str, str]:
    """Return what is decided of the last message of a past, in the path, and what the sweep says before it."""
    sent = [each for each in past if place(each.what) and (each.count or 0) > 0]
    cuts = [each.age_s for each in past if each.what in ("HOLD places", "HOLD newplace") and each.count is None
            and each.age_s < 30 * DAY_S]  # fmt: skip
    known = {
        place(each.what) for each in past
        if (each.count or 0) < 0 or (each.count is not None and DAY_S + max(cuts, default=0) <= each.age_s < 30 * DAY_S)
    }  # fmt: skip
    new = [each for each in sent if place(each.what) not in known]
    in_half_hour = len({place(each.what) for each in new if each.age_s < HOUR_S / 2})
    in_hour = [each for each in new if each.age_s < HOUR_S]
    places_of_hour = len({place(each.what) for each in in_hour})
    places_of_day = len({place(each.what) for each in new if each.age_s < DAY_S})
    recipients = sum(each.count or 0 for each in in_hour)
    held = ""
    if in_half_hour > max_places or places_of_day > 3 * max_places:
        figure = (in_half_hour, max_places) if in_half_hour > max_places else (places_of_day, 3 * max_places)
        held = "Held by the sweep: anna, places ({}>{})".format(*figure)
    floor = sum(each.count or 0 for each in past if (each.count or 0) > 0 and each.age_s < HOUR_S) >= min(40, quota)
    last = place(past[-1].what)
    if not floor or not last or last in known:
        return "", held
    if in_half_hour > max_places:
        return f"places ({in_half_hour}>{max_places})", held
    if places_of_hour > 3 * max_places:
        return f"places ({places_of_hour}>{3 * max_places})", held
    if len(in_hour) >= 5 and recipients >= quota:
        return f"newplace ({recipients}>{quota})", held
    return "", held


@on_each
@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(past=pasts, client=st.sampled_from(CLIENTS), quota=st.sampled_from([30, 60]), max_places=st.integers(1, 4))
@example([Past(at(n), 20, 31 * MINUTE_S) for n in range(4)], at(4), 60, 1)
@example([Past(at(n), 10, 29 * MINUTE_S) for n in range(4)], at(4), 60, 4)
@example([*[Past(at(1), 20, 60)] * 4, Past(at(1), 1, 50 * HOUR_S), Past("HOLD places", None, 9e4)], at(1), 60, 4)
def test_decisions_are_those_of_a_simple_computation(
    store: Store, logged: KeptLog, past: list[Past], client: str, quota: int, max_places: int
) -> None:
    """In the path for one more message, and then of the sweep."""
    store.clear()
    add(store, 4 * DAY_S, ("192.0.2.1", 1), login="bert")
    for age_s in {each.age_s for each in past}:  # each has a row of its own
        rows = [("anna", f"{n}", each.what, each.count) for n, each in enumerate(past) if each.age_s == age_s]
        store.add(rows, age_s)
    lines = (f"new_place_quota={quota}", f"max_places={max_places}", "trusted_network=192.0.2.0/24")
    relay = Relay(store, logged, "keep_days=30", "early_signs=audit", *lines)
    lasts = [each.what for each in past if each.count is None and each.age_s < DAY_S and each.what != "HOLD overquota"]
    relay.sweep()  # it learns that the table remembers enough
    said, held = by_the_book([*past, Past(client, 3, 0)], quota, max_places)
    outcome = send(relay, client, 3)
    if lasts:
        assert "since" in outcome.lines[0]
        held = ""
    else:
        assert outcome.lines == ([line(f"would HOLD {said}", client_address=client)] if said else [])
    other = Relay(store, logged, "keep_days=30", "early_signs=yes", *lines)
    assert other.sweep() == ([held] if held else [])


# ---- the daemon by itself ---------------------------------------------------------------------------


@on_each
def test_the_daemon_sweeps_by_itself(store: Store, policyd: Start) -> None:
    """At its start already; a relay that was started together with others a little later."""
    add(store, 4 * DAY_S, ("192.0.2.1", 1), login="bert")
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    daemon = policyd(early_signs="yes", keep_days=30, **store.settings)
    assert daemon.wait_for_log("Held by the sweep").text == "Held by the sweep: anna, places (6>5)"
    assert daemon.ask(sasl_username="anna") == PLACES


