"""The rule: who is held, who is refused, who is let through, and the lines that say so."""

from __future__ import annotations

import time
from typing import Any, Callable

import hypothesis.strategies as st
import pytest
from asking import Relay
from hypothesis import given
from servers import DUNNO, HOLD, REJECT, LogLine, Policyd
from stores import KeptLog, Store, on_stores, read_settings

from policyd import NEVER, Limits, Usage, decide, in_office_hours, local_time

Start = Callable[..., Policyd]


# ---- numbers, hours, lists ------------------------------------------------------------------------------

LIMITS = Limits(hold_at=10, reject_at=20, hour=5, places=3, new_place_quota=8, early_signs=True)
SINCE = 1_800_000_000.0
WHEN = local_time(SINCE)
# The cases of the rule in their order: what has been used up, and what becomes of it.
CASES: list[tuple[dict[str, Any], tuple[str, str, str, str]]] = [
    ({"incidents": {"HOLD blocked"}}, ("HOLD", "blocked", "blocked", f"blocked (since {WHEN})")),
    ({"recipients": 20}, ("REJECT", "overquota", "max quota exceeded", "overquota (20>2x10)")),
    ({"recipients": 19}, ("HOLD", "overquota", "quota exceeded", "overquota (19>10)")),
    ({"recipients": 10}, ("HOLD", "overquota", "quota exceeded", "overquota (10>10)")),
    ({"of_hour": 5}, ("HOLD", "hourquota", "hour quota exceeded", "hourquota (5>5)")),
    ({"incidents": {"HOLD places"}}, ("HOLD", "places", "too many places", f"places (since {WHEN})")),
    ({"incidents": {"HOLD newplace"}}, ("HOLD", "newplace", "too much from new places", f"newplace (since {WHEN})")),
    ({"new_places": 4}, ("HOLD", "places", "too many places", "places (4>3)")),
    ({"new_places_24h": 10}, ("HOLD", "places", "too many places", "places (10>9)")),
    ({"from_new_places": 8}, ("HOLD", "newplace", "too much from new places", "newplace (8>8)")),
    ({}, ("DUNNO", "", "", "")),
]


def usage(*cases: dict[str, Any]) -> Usage:
    """Return what has been used up when all of these cases apply."""
    merged: dict[str, Any] = {"recipients": 9, "of_hour": 4, "new_places": 3, "new_places_24h": 9, "from_new_places": 7}
    incidents: set[str] = {"HOLD overquota", "REJECT overquota", "HOLD hourquota"}  # these hold nothing by themselves
    for case in reversed(cases):
        incidents |= case.get("incidents", set())
        merged.update({name: value for name, value in case.items() if name != "incidents"})
    return Usage(**merged, incidents=frozenset(incidents), since=SINCE)


@pytest.mark.parametrize("first", range(len(CASES)), ids=lambda n: CASES[n][1][3] or "DUNNO")
def test_of_the_cases_of_the_rule_the_first_that_applies_decides(first: int) -> None:
    """Alone, and together with any of those behind it.  Reaching a quota is over it."""
    for last in range(first, len(CASES)):
        verdict = decide(usage(CASES[first][0], *(case for case, _ in CASES[last:])), LIMITS)
        assert verdict[:4] == CASES[first][1]


def test_what_is_not_limited_is_never_too_much() -> None:
    """Incidents of early signs hold only where these are looked for; a block holds everywhere."""
    early = frozenset(("HOLD places", "HOLD newplace", "REJECT places", "HOLD overquota"))
    much = Usage(10**9, 10**9, early, SINCE, 10**6, 10**6, 10**9)
    assert decide(much, Limits(NEVER, NEVER)).action == "DUNNO"
    assert decide(much, Limits(NEVER, NEVER, early_signs=True)).said.startswith("places (since")
    blocked = decide(Usage(1, incidents=frozenset(("HOLD blocked",))), Limits(NEVER, NEVER))
    assert (blocked.action, blocked.incident) == ("HOLD", "HOLD blocked")


amounts = st.integers(0, 40)
limits = st.integers(1, 40) | st.just(NEVER)


@given(numbers=st.tuples(*[amounts] * 5), more=st.tuples(*[amounts] * 5), some=st.integers(0, 4), hold_at=limits,
       incidents=st.sets(st.sampled_from(["HOLD blocked", "HOLD places", "HOLD newplace", "HOLD overquota"])),
       further=st.integers(0, 40), others=st.tuples(limits, limits, limits, st.booleans()))  # fmt: skip
def test_decisions_never_soften_as_anything_grows(
    numbers: Any, more: Any, incidents: set[str], some: int, hold_at: int, further: int, others: Any
) -> None:
    bounds = Limits(hold_at, min(NEVER, hold_at + further), *others)

    def severity(figures: tuple[int, ...], incidents: frozenset[str]) -> int:
        now = Usage(figures[0], figures[1], incidents, SINCE, *figures[2:])
        return ["DUNNO", "HOLD", "REJECT"].index(decide(now, bounds).action)

    greater = tuple(one + other for one, other in zip(numbers, more))
    fewer_incidents = frozenset(sorted(incidents)[:some])
    now = severity(numbers, fewer_incidents)
    assert now <= severity(greater, fewer_incidents)
    if "HOLD blocked" not in incidents - fewer_incidents:  # a block holds what would be refused
        assert now <= severity(numbers, frozenset(incidents))


def is_office(day: int, clock: str, **settings: str) -> bool:
    """Tell whether the office is open on that day of January 2026, of which the 5th is a Monday."""
    read, when = read_settings(**settings), time.strptime(f"2026-01-{day} {clock}", "%Y-%m-%d %H:%M:%S")
    return in_office_hours(when, read.whitelist_days, read.whitelist_hours)


def test_the_office_is_open_from_monday_to_friday_from_7_until_before_19_or_as_the_settings_say() -> None:
    """1 is Monday for us, and 0 for Python."""
    for day in range(5, 12):
        for clock, is_open in [("00:00:00", False), ("06:59:59", False), ("07:00:00", True), ("12:00:00", True),
                               ("18:59:59", True), ("19:00:00", False), ("23:59:59", False)]:  # fmt: skip
            assert is_office(day, clock) is (is_open and day <= 9)
            assert is_office(day, clock, whitelist_days="1-7", whitelist_hours="0-24")
            assert not is_office(day, clock, whitelist_days="1-7", whitelist_hours="0-0")
            assert is_office(day, clock, whitelist_days="1-1", whitelist_hours="0-24") is (day == 5)


LISTS = [
    *(f"whitelist={each}" for each in ("news", "registrar@example.org", "198.51.100.0/24", "@Ally.example", "Both")),
    *(f"blacklist={each}" for each in ("phished", "spam@example.net", "2001:db8:bad::/48", "@ spam.example", "both")),
]
LISTED: list[tuple[dict[str, str], str]] = [  # every spelling of what is on a list is in test_names.py
    ({"login": "News@Example.org"}, "whitelist"), ({"sender": "Registrar@Example.org"}, "whitelist"),
    ({"client_address": "64:ff9b::c633:6403"}, "whitelist"), ({"login": "Phished@Example.org"}, "blacklist"),
    ({"sender": "Spam@Example.net"}, "blacklist"), ({"client_address": "2001:db8:bad::25"}, "blacklist"),
    ({"login": "both"}, "blacklist"), ({"login": "max@ally.example"}, "whitelist"),
    ({"sender": "max@ally.example"}, "whitelist"), ({"sender": "lena@Spam.Example"}, "blacklist"),
    ({"login": "lena@spam.example"}, "blacklist"),
]  # fmt: skip


@pytest.mark.parametrize("hours", ["0-24", "0-0"])
@on_stores("SQLite")
def test_a_whitelist_lets_pass_in_office_hours_and_a_blacklist_holds(store: Store, logged: KeptLog, hours: str) -> None:
    """However many recipients; neither is counted.  Who is on both is held."""
    relay = Relay(store, logged, "defaultquota=10", *LISTS, "whitelist_days=1-7", f"whitelist_hours={hours}")
    for listed, where in LISTED * 2:
        message = {"login": "anna", "sender": "anna@example.org", "client_address": "192.0.2.1", **listed}
        login = message["login"].lower().partition("@")[0]
        shown = f"{login}/{message['sender'].lower()}/{message['client_address']}/100"
        outcome = relay.ask(**message, recipient_count=100)
        if where == "blacklist":
            assert outcome == ("HOLD blacklisted", [f"Holding blacklisted user: {shown}, queue_id=4Xk1Zt"])
        elif hours == "0-24":
            assert outcome == (DUNNO, [f"skipping whitelisted user: {shown}"])
        else:
            assert (outcome.answer, outcome.lines[0].rpartition("/")[0]) == (REJECT, f"Updating db: {shown}")
    assert {row[0] for row in store.rows()} == ({"news", "anna", "max"} if hours == "0-0" else set())


# ---- the lines that others match ------------------------------------------------------------------


ODD = "\x1b[31m\x07\x7f%s%n\t\u4f8b\u2028\u202e\x85\U0001f4a9\rupdating db: b"
SHOWN = r"\x1b[31m\x07\x7f%s%n\t\u4f8b\u2028\u202e\x85\U0001f4a9\rupdating db: b"


def test_the_lines_of_the_log_are_those_that_parsers_match(policyd: Start) -> None:
    """Word for word, at the real syslog socket; nobody had to set a quota.  Held and refused messages count too.

    What a client sent is on one line of ASCII, in every place of the lines where it can stand.
    """
    daemon = policyd(whitelist="whitey", blacklist="black", whitelist_days="1-7", whitelist_hours="0-24")
    answers = [
        daemon.ask(sasl_username=login, sender="X@domain" if count != 3 else "", client_address="192.0.2.249",
                   recipient_count=count, queue_id="4Xk1Zt")
        for login, count in [("phish2", 1499), ("phish2", 3), ("phish2", 1498), ("phish3", 1), ("whitey", 5),
                             ("black", 6), ("", 5000)]
    ]  # fmt: skip
    assert answers == [DUNNO, HOLD, REJECT, DUNNO, DUNNO, "HOLD blacklisted", DUNNO]
    odd = dict.fromkeys(("sasl_username", "sender", "client_address", "queue_id"), ODD)
    assert daemon.ask(**odd, recipient_count=1500) == HOLD
    pid = daemon.pid
    _, *lines = daemon.lines_so_far()
    assert lines == [
        LogLine("daemon", "info", "policyd", pid, text)
        for text in [
            "Updating db: phish2/x@domain/192.0.2.249/1499/1499",
            "Updating db: phish2//192.0.2.249/3/1502",  # the null sender
            "DEFERRING overquota (1502>1500) for user phish2 using  from ip [192.0.2.249], queue_id=4Xk1Zt",
            "Updating db: phish2/x@domain/192.0.2.249/1498/3000",
            "REJECTING overquota (3000>2x1500) for user phish2 using x@domain from ip [192.0.2.249], queue_id=4Xk1Zt",
            "Updating db: phish3/x@domain/192.0.2.249/1/1",
            "skipping whitelisted user: whitey/x@domain/192.0.2.249/5",
            "Holding blacklisted user: black/x@domain/192.0.2.249/6, queue_id=4Xk1Zt",
            f"Updating db: {SHOWN}/{SHOWN}/{SHOWN}/1500/1500",
            f"DEFERRING overquota (1500>1500) for user {SHOWN} using {SHOWN} from ip [{SHOWN}], queue_id={SHOWN}",
        ]
    ]
