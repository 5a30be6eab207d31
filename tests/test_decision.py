"""The rule: who is held, who is refused, who is let through, and the lines that say so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Callable

import hypothesis.strategies as st
import pytest
from asking import Relay, ask
from hypothesis import given
from servers import DUNNO, HOLD, REJECT, LogLine, Policyd
from stores import KeptLog, SQLiteStore, read_settings

from policyd import NEVER, Limits, Settings, Usage, decide, in_office_hours, local_time

Start = Callable[..., Policyd]

SEVERITY = ["DUNNO", "HOLD", "REJECT"]


# ---- numbers ----------------------------------------------------------------------------------------

LIMITS = Limits(hold_at=10, reject_at=20, hour=5, places=3, new_place_quota=8, early_signs=True)
SINCE = 1_800_000_000.0
WHEN = local_time(SINCE)
# The cases of the rule in their order: what has been used up, and what becomes of it.
CASES: list[tuple[dict[str, Any], tuple[str, str, str, str]]] = [
    ({"incidents": {"HOLD blocked"}}, ("HOLD", "blocked", "blocked", f"blocked (since {WHEN})")),
    ({"recipients": 20}, ("REJECT", "overquota", "max quota exceeded", "overquota (20>2x10)")),
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
    """Alone, and together with any of those behind it."""
    for last in range(first, len(CASES)):
        verdict = decide(usage(CASES[first][0], *(case for case, _ in CASES[last:])), LIMITS)
        assert verdict[:4] == CASES[first][1]


@pytest.mark.parametrize(
    ("recipients", "action"), [(0, "DUNNO"), (1, "DUNNO"), (1499, "DUNNO"), (1500, "HOLD"), (1501, "HOLD"),
                               (2999, "HOLD"), (3000, "REJECT"), (10**9, "REJECT")],
)  # fmt: skip
def test_reaching_a_quota_is_over_it(recipients: int, action: str) -> None:
    assert decide(Usage(recipients), Limits(1500, 3000)).action == action


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


@given(
    numbers=st.tuples(*[amounts] * 5), more=st.tuples(*[amounts] * 5), incidents=st.sets(st.sampled_from(
        ["HOLD blocked", "HOLD places", "HOLD newplace", "HOLD overquota"])), some=st.integers(0, 4),
    hold_at=limits, further=st.integers(0, 40), others=st.tuples(limits, limits, limits, st.booleans()),
)  # fmt: skip
def test_decisions_never_soften_as_anything_grows(
    numbers: tuple[int, ...], more: tuple[int, ...], incidents: set[str], some: int, hold_at: int, further: int,
    others: tuple[Any, ...],
) -> None:  # fmt: skip
    bounds = Limits(hold_at, min(NEVER, hold_at + further), *others)

    def severity(figures: tuple[int, ...], incidents: frozenset[str]) -> int:
        now = Usage(figures[0], figures[1], incidents, SINCE, *figures[2:])
        return SEVERITY.index(decide(now, bounds).action)

    greater = tuple(one + other for one, other in zip(numbers, more))
    fewer_incidents = frozenset(sorted(incidents)[:some])
    now = severity(numbers, fewer_incidents)
    assert now <= severity(greater, fewer_incidents)
    if "HOLD blocked" not in incidents - fewer_incidents:  # a block holds what would be refused
        assert now <= severity(numbers, frozenset(incidents))


# ---- office hours -----------------------------------------------------------------------------------


def is_office(text: str, settings: Settings) -> bool:
    return in_office_hours(time.strptime(text, "%Y-%m-%d %H:%M:%S"), settings.whitelist_days, settings.whitelist_hours)


@pytest.mark.parametrize("day", range(5, 12))  # 5 January 2026 is a Monday
def test_the_office_is_open_from_monday_to_friday_from_7_until_before_19(day: int) -> None:
    for clock, is_open in [("00:00:00", False), ("06:59:59", False), ("07:00:00", True), ("12:00:00", True),
                           ("18:59:59", True), ("19:00:00", False), ("23:59:59", False)]:  # fmt: skip
        assert is_office(f"2026-01-{day} {clock}", Settings()) is (is_open and day <= 9)
        assert is_office(f"2026-01-{day} {clock}", read_settings(whitelist_days="1-7", whitelist_hours="0-24"))
        assert not is_office(f"2026-01-{day} {clock}", read_settings(whitelist_days="1-7", whitelist_hours="0-0"))


def test_the_days_are_those_of_the_calendar() -> None:
    """1 is Monday for us, and 0 for Python."""
    assert is_office("2026-01-05 08:00:00", read_settings(whitelist_days="1-1", whitelist_hours="8-9"))
    assert not is_office("2026-01-05 08:00:00", read_settings(whitelist_days="2-7", whitelist_hours="8-9"))


# ---- the lists --------------------------------------------------------------------------------------

LISTS = [
    *(f"whitelist={each}" for each in ("news", "registrar@example.org", "198.51.100.0/24", "2001:DB8:1::/48", "Both")),
    *(f"blacklist={each}" for each in ("phished", "spam@example.net", "198.18.0.0/15", "2001:db8:bad::/48", "both")),
]
LISTED: list[tuple[dict[str, str], str]] = [
    ({"login": "News@Example.org"}, "whitelist"), ({"sender": "Registrar@Example.org"}, "whitelist"),
    ({"client_address": "64:ff9b::c633:6403"}, "whitelist"), ({"client_address": "2001:db8:1:2::3"}, "whitelist"),
    ({"login": "Phished@Example.org"}, "blacklist"), ({"sender": "Spam@Example.net"}, "blacklist"),
    ({"client_address": "::ffff:198.19.255.255"}, "blacklist"), ({"client_address": "2001:db8:bad::25"}, "blacklist"),
    ({"login": "both"}, "blacklist"),
]  # fmt: skip


@pytest.mark.parametrize(("listed", "where"), LISTED, ids=str)
@pytest.mark.parametrize("hours", ["0-24", "0-0"])
def test_the_blacklist_holds_at_any_time_and_the_whitelist_lets_pass_in_office_hours(
    tmp_path: Path, logged: KeptLog, hours: str, listed: dict[str, str], where: str
) -> None:
    """However many recipients; neither is counted.  Who is on both is held."""
    store = SQLiteStore(tmp_path / "events.sqlite3")
    relay = Relay(store, logged, "defaultquota=10", *LISTS, "whitelist_days=1-7", f"whitelist_hours={hours}")
    message = {"login": "anna", "sender": "anna@example.org", "client_address": "192.0.2.1", **listed}
    login = message["login"].lower().partition("@")[0]
    shown = f"{login}/{message['sender'].lower()}/{message['client_address']}/100"
    held = f"Holding blacklisted user: {shown}, queue_id=4Xk1Zt"
    for _ in range(2):
        outcome = relay.ask(**message, recipient_count=100)
        if where == "blacklist":
            assert outcome == ("HOLD blacklisted", [held])
        elif hours == "0-24":
            assert outcome == (DUNNO, [f"skipping whitelisted user: {shown}"])
        else:
            assert (outcome.answer, outcome.lines[0].rpartition("/")[0]) == (REJECT, f"Updating db: {shown}")
    assert bool(store.rows()) == (where == "whitelist" and hours == "0-0")


# ---- the lines that others match ------------------------------------------------------------------


def test_the_lines_of_the_log_are_those_that_parsers_match(policyd: Start) -> None:
    """Word for word, at the real syslog socket; nobody had to set a quota.  Held and refused messages count too."""
    daemon = policyd(whitelist="whitey", blacklist="black", whitelist_days="1-7", whitelist_hours="0-24")
    answers = [
        daemon.ask(sasl_username=login, sender="X@domain" if count != 3 else "", client_address="192.0.2.249",
                   recipient_count=count, queue_id="4Xk1Zt")
        for login, count in [("phish2", 1499), ("phish2", 3), ("phish2", 1498), ("phish3", 1), ("whitey", 5),
                             ("black", 6), ("", 5000)]
    ]  # fmt: skip
    assert answers == [DUNNO, HOLD, REJECT, DUNNO, DUNNO, "HOLD blacklisted", DUNNO]
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
        ]
    ]


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("a\rupdating db: b", r"a\rupdating db: b"),
        ("\x1b[31m\x07\x7f", r"\x1b[31m\x07\x7f"),
        ("%s%n%d%1$s", "%s%n%d%1$s"),
        ("jos\xe9 \u4f8b\u3048", r"jos\xe9 \u4f8b\u3048"),
        ("\u2028\u202e\x85\U0001f4a9", r"\u2028\u202e\x85\U0001f4a9"),
        ("a\tb", r"a\tb"),
    ],
    ids=["carriage return", "escape sequence", "format", "not ASCII", "line separators", "tab"],
)
def test_what_a_client_sent_is_logged_on_one_line_of_ascii(policyd: Start, sent: str, shown: str) -> None:
    """In every place of the lines where it can stand."""
    daemon = policyd(defaultquota=10)
    assert ask(daemon, sent, sender=sent, client_address=sent, queue_id=sent, recipient_count=10) == (
        HOLD,
        [
            f"Updating db: {shown}/{shown}/{shown}/10/10",
            f"DEFERRING overquota (10>10) for user {shown} using {shown} from ip [{shown}], queue_id={shown}",
        ],
    )
