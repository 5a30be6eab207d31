"""The rule: who is held, who is refused, who is let through, and the lines that say so."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given
from servers import LogLine, Policyd, policyd_factory

from policyd import (
    DUNNO,
    HOLD,
    REJECT,
    Settings,
    UserList,
    decide,
    in_office_hours,
    login_of,
    printable,
    read_list_entry,
)

Start = Callable[..., Policyd]

QUOTA = 10
LISTS = {
    "whitelist": ["news", "registrar@example.org", "192.0.2.77", "198.51.100.0/24", "2001:DB8:1::/48", "Both"],
    "blacklist": [
        "phished", "full@example.org", "spam@example.net", "203.0.113.9", "198.18.0.0/15", "2001:db8:bad::/48", "both"
    ],
}


# ---- numbers, hours and names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipients", "action"),
    [(0, DUNNO), (1, DUNNO), (1499, DUNNO), (1500, HOLD), (1501, HOLD), (2999, HOLD), (3000, REJECT), (10**9, REJECT)],
)
def test_reaching_a_limit_is_over_it(recipients: int, action: str) -> None:
    assert decide(recipients, 1500, 3000) == action


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_recipients_never_soften_the_answer(recipients: int, more: int, hold_at: int, further: int) -> None:
    severity = [DUNNO, HOLD, REJECT]
    fewer, greater = (decide(n, hold_at, hold_at + further) for n in (recipients, recipients + more))
    assert severity.index(fewer) <= severity.index(greater)


@given(st.integers(1, 10**6), st.integers(0, 10**7))
def test_mail_is_held_from_the_quota_on_and_refused_from_twice_the_quota_on(quota: int, recipients: int) -> None:
    times = min(recipients // quota, 2)
    assert decide(recipients, quota, 2 * quota) == [DUNNO, HOLD, REJECT][times]


def local(weekday: int, hour: int, minute: int = 0, second: int = 0) -> time.struct_time:
    """Return a local time of a week that began on Monday, 5 January 2026; Monday is 1."""
    return time.struct_time((2026, 1, 4 + weekday, hour, minute, second, weekday - 1, 4 + weekday, 0))


@pytest.mark.parametrize(("weekday", "expected"), [(day, day <= 5) for day in range(1, 8)])
def test_the_office_is_open_from_monday_to_friday(weekday: int, expected: bool) -> None:
    settings = Settings()
    assert in_office_hours(local(weekday, 12), settings.whitelist_days, settings.whitelist_hours) is expected


@pytest.mark.parametrize(
    ("hour", "minute", "second", "expected"),
    [(0, 0, 0, False), (6, 59, 59, False), (7, 0, 0, True), (18, 59, 59, True), (19, 0, 0, False), (23, 59, 59, False)],
)
def test_the_office_is_open_from_7_until_before_19(hour: int, minute: int, second: int, expected: bool) -> None:
    settings = Settings()
    now = local(3, hour, minute, second)
    assert in_office_hours(now, settings.whitelist_days, settings.whitelist_hours) is expected


@pytest.mark.parametrize("weekday", range(1, 8))
@pytest.mark.parametrize("hour", [0, 12, 23])
def test_an_office_can_always_be_open(weekday: int, hour: int) -> None:
    assert in_office_hours(local(weekday, hour), (1, 7), (0, 24))


def test_the_days_are_those_of_the_calendar() -> None:
    """1 is Monday for us, and 0 for Python."""
    monday = time.strptime("2026-01-05 08:00", "%Y-%m-%d %H:%M")
    assert in_office_hours(monday, (1, 1), (8, 9))
    assert not in_office_hours(monday, (2, 7), (8, 9))


@pytest.mark.parametrize(
    ("sasl_username", "strip_domain", "login"),
    [
        ("anna", True, "anna"),
        ("Anna@Example.ORG", True, "anna"),
        ("Anna@Example.ORG", False, "anna@example.org"),
        ("anna@a@b", True, "anna"),
        ("ÉMILE@example.org", True, "émile"),
        ("@example.org", True, "@example.org"),  # nothing would be left of it
        ("", True, ""),
    ],
)
def test_the_login_is_lower_case_and_cut_at_its_at_sign(sasl_username: str, strip_domain: bool, login: str) -> None:
    assert login_of(sasl_username, strip_domain) == login


def listing(*entries: str) -> UserList:
    return UserList([read_list_entry(entry) for entry in entries])


@pytest.mark.parametrize(
    ("names", "address"),
    [
        (("news", "news@example.org", "x@y"), "192.0.2.1"),
        (("anna", "anna@example.org", "registrar@example.org"), "192.0.2.1"),
        (("anna", "both@example.org", "x@y"), "192.0.2.77"),
        (("anna",), "198.51.100.0"),
        (("anna",), "198.51.100.255"),
        (("anna",), "2001:db8:1::"),
        (("anna",), "2001:db8:1:ffff::1"),
        (("anna",), "2001:0DB8:0001::1"),
        (("both",), "unknown"),
    ],
)
def test_a_list_holds_logins_senders_addresses_and_networks(names: tuple[str, ...], address: str) -> None:
    assert listing(*LISTS["whitelist"]).holds(names, address)


@pytest.mark.parametrize(
    ("names", "address"),
    [
        (("new", "newsletter", "news@example.org"), "192.0.2.1"),
        (("registrar",), "192.0.2.7"),
        (("example.org",), "198.51.101.0"),
        (("",), "198.51.99.255"),
        (("anna",), "2001:db8:2::1"),
        (("anna",), "unknown"),
        (("anna",), ""),
        (("anna",), "::ffff:198.51.100.1"),
        ((), "192.0.2.1"),
    ],
)
def test_a_list_holds_nobody_else(names: tuple[str, ...], address: str) -> None:
    assert not listing(*LISTS["whitelist"]).holds(names, address)


def test_an_empty_list_holds_nobody() -> None:
    assert not UserList().holds(["", "anna"], "192.0.2.1")


def test_capitals_in_a_list_do_not_matter() -> None:
    assert listing("Anna.Smith@Example.ORG").holds(["anna.smith@example.org"], "")


def test_an_ipv6_address_may_be_written_in_any_way() -> None:
    """Postfix writes it in the short way."""
    assert listing("2001:0DB8:0:0::0001").holds([], "2001:db8::1")


@given(st.ip_addresses(), st.integers(0, 128), st.ip_addresses())
def test_a_network_holds_its_addresses_and_no_others(
    base: ipaddress.IPv4Address | ipaddress.IPv6Address,
    prefix: int,
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    network = ipaddress.ip_network(f"{base}/{min(prefix, base.max_prefixlen)}", strict=False)
    users = listing(str(network))
    assert users.holds([], str(base))
    assert users.holds([], str(address)) == (address in network)


@given(st.text())
def test_whatever_is_logged_is_one_line_of_printable_ascii(text: str) -> None:
    shown = printable(text)
    assert shown.isascii()
    assert shown.isprintable() or not shown
    assert shown == text or shown.encode().decode("unicode_escape") == text


# ---- through the daemon ---------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What policyd answered, and the lines it logged about it."""

    answer: str
    lines: list[str]


def ask(daemon: Policyd, **attributes: object) -> Outcome:
    """Ask about a message and return what became of it."""
    before = len(daemon.lines_so_far())
    answer = daemon.ask(**attributes)
    lines = daemon.lines_so_far()[before:]
    assert all((line.facility, line.level, line.tag, line.pid) == ("daemon", "info", "policyd", daemon.pid)
               for line in lines), lines
    return Outcome(answer, [line.text for line in lines])


@pytest.fixture(scope="module")
def daemon() -> Iterator[Policyd]:
    """A daemon with a small quota; each test has a login of its own."""
    with policyd_factory() as start:
        yield start(defaultquota=QUOTA)


@pytest.fixture(scope="module")
def open_office() -> Iterator[Policyd]:
    """A daemon with both lists, for whom it is always office hours."""
    with policyd_factory() as start:
        yield start(defaultquota=QUOTA, whitelist_days="1-7", whitelist_hours="0-24", **LISTS)


@pytest.fixture(scope="module")
def closed_office() -> Iterator[Policyd]:
    """The same, long before or after office hours."""
    hours = "13-14" if time.localtime().tm_hour < 11 else "1-2"
    with policyd_factory() as start:
        yield start(defaultquota=QUOTA, whitelist_days="1-7", whitelist_hours=hours, **LISTS)


def test_mail_under_the_quota_goes_on(daemon: Policyd) -> None:
    assert ask(daemon, sasl_username="under", recipient_count=QUOTA - 1) == (
        "DUNNO", ["Updating db: under/alice@example.org/192.0.2.1/9/9"]
    )


def test_reaching_the_quota_exactly_holds_the_mail(daemon: Policyd) -> None:
    ask(daemon, sasl_username="exact", recipient_count=QUOTA - 1)
    assert ask(daemon, sasl_username="exact", queue_id="4Xk1Zt") == (
        "HOLD quota exceeded",
        [
            "Updating db: exact/alice@example.org/192.0.2.1/1/10",
            "DEFERRING overquota (10>10) for user exact using alice@example.org from ip [192.0.2.1], queue_id=4Xk1Zt",
        ],
    )


def test_mail_under_twice_the_quota_is_held(daemon: Policyd) -> None:
    assert ask(daemon, sasl_username="almost", recipient_count=2 * QUOTA - 1).answer == "HOLD quota exceeded"


def test_reaching_twice_the_quota_exactly_refuses_the_mail(daemon: Policyd) -> None:
    """Held and refused messages count too."""
    answers = [ask(daemon, sasl_username="twice", recipient_count=QUOTA).answer for _ in range(2)]
    assert answers == ["HOLD quota exceeded", "REJECT max quota exceeded"]
    assert ask(daemon, sasl_username="twice", queue_id="4Xk1Zt") == (
        "REJECT max quota exceeded",
        [
            "Updating db: twice/alice@example.org/192.0.2.1/1/21",
            "REJECTING overquota (21>2x10) for user twice using alice@example.org from ip [192.0.2.1], queue_id=4Xk1Zt",
        ],
    )


def test_the_null_sender_with_a_login_is_counted(daemon: Policyd) -> None:
    assert ask(daemon, sasl_username="receipts", sender="", recipient_count=QUOTA, queue_id="") == (
        "HOLD quota exceeded",
        [
            "Updating db: receipts//192.0.2.1/10/10",
            "DEFERRING overquota (10>10) for user receipts using  from ip [192.0.2.1]",
        ],
    )


def test_mail_without_a_login_is_none_of_our_business(open_office: Policyd) -> None:
    """However many recipients it has, and whoever sent it from wherever: inbound mail is not ours to hold."""
    for _ in range(2):
        assert ask(
            open_office, sasl_username="", sender="spam@example.net", client_address="203.0.113.9",
            recipient_count=100 * QUOTA,
        ) == ("DUNNO", [])


def test_all_spellings_of_a_login_share_a_quota(daemon: Policyd) -> None:
    ask(daemon, sasl_username="shared", recipient_count=1)
    ask(daemon, sasl_username="Shared@Example.org", recipient_count=1)
    assert ask(daemon, sasl_username="SHARED@other.example", sender="Shared@Example.ORG", recipient_count=1) == (
        "DUNNO", ["Updating db: shared/shared@example.org/192.0.2.1/1/3"]
    )


def test_with_whole_logins_each_domain_has_its_own_quota(policyd: Start) -> None:
    daemon = policyd(strip_domain="no")
    ask(daemon, sasl_username="info@example.org", recipient_count=1)
    assert ask(daemon, sasl_username="Info@example.net", recipient_count=2).lines == [
        "Updating db: info@example.net/alice@example.org/192.0.2.1/2/2"
    ]


@pytest.mark.parametrize(
    "listed",
    [
        {"sasl_username": "phished"},
        {"sasl_username": "Phished@Example.org"},
        {"sasl_username": "Full@Example.org"},
        {"sender": "Spam@Example.net"},
        {"client_address": "203.0.113.9"},
        {"client_address": "198.19.255.255"},
        {"client_address": "2001:db8:bad::25"},
        {"sasl_username": "both"},
    ],
    ids=str,
)
@pytest.mark.parametrize("office", ["open_office", "closed_office"])
def test_blacklisted_mail_is_held_at_any_time(
    request: pytest.FixtureRequest, office: str, listed: dict[str, str]
) -> None:
    """Also when the user is on the whitelist too."""
    daemon = request.getfixturevalue(office)
    message = {"sasl_username": "anna", "sender": "anna@example.org", "client_address": "192.0.2.1", **listed}
    login = message["sasl_username"].lower().partition("@")[0]
    shown = f"{login}/{message['sender'].lower()}/{message['client_address']}/3"
    assert ask(daemon, **message, recipient_count=3, queue_id="4Xk1Zt") == (
        "HOLD blacklisted", [f"Holding blacklisted user: {shown}, queue_id=4Xk1Zt"]
    )


WHITELISTED = [
    {"sasl_username": "news"},
    {"sasl_username": "News@Example.org"},
    {"sender": "Registrar@Example.org"},
    {"client_address": "192.0.2.77"},
    {"client_address": "198.51.100.3"},
    {"client_address": "2001:db8:1:2::3"},
]


@pytest.mark.parametrize("listed", WHITELISTED, ids=str)
def test_whitelisted_mail_passes_in_office_hours(open_office: Policyd, listed: dict[str, str]) -> None:
    """However many recipients it has."""
    message = {"sasl_username": "anna", "sender": "anna@example.org", "client_address": "192.0.2.1", **listed}
    login = message["sasl_username"].lower().partition("@")[0]
    shown = f"{login}/{message['sender'].lower()}/{message['client_address']}/100"
    for _ in range(2):
        assert ask(open_office, **message, recipient_count=10 * QUOTA) == (
            "DUNNO", [f"skipping whitelisted user: {shown}"]
        )


@pytest.mark.parametrize("listed", WHITELISTED, ids=str)
def test_whitelisted_mail_counts_out_of_office_hours(closed_office: Policyd, listed: dict[str, str]) -> None:
    message = {"sasl_username": "anna", "sender": "anna@example.org", "client_address": "192.0.2.1", **listed}
    outcome = ask(closed_office, **message, recipient_count=10 * QUOTA)
    assert outcome.answer == "REJECT max quota exceeded"
    assert outcome.lines[0].startswith("Updating db: ")


def test_listed_mail_is_not_counted(open_office: Policyd) -> None:
    """What was skipped or held for a list leaves the quota of the same login as it was."""
    for address in ("192.0.2.77", "203.0.113.9"):
        ask(open_office, sasl_username="mixed", client_address=address, recipient_count=QUOTA)
    assert ask(open_office, sasl_username="mixed", recipient_count=1).lines == [
        "Updating db: mixed/alice@example.org/192.0.2.1/1/1"
    ]


# ---- the lines that others match ------------------------------------------------------------------


def test_the_lines_of_the_log_are_those_that_parsers_match(policyd: Start) -> None:
    """Word for word, at the real syslog socket; nobody had to set a quota."""
    daemon = policyd(whitelist="whitey", blacklist="black", whitelist_days="1-7", whitelist_hours="0-24")
    for login, count in [("phish2", 1502), ("phish2", 1499), ("phish3", 1), ("whitey", 5), ("black", 6)]:
        daemon.ask(
            sasl_username=login, sender="x@domain", client_address="201.48.226.249", recipient_count=count, queue_id=""
        )
    pid = daemon.pid
    _, *lines = daemon.lines_so_far()
    assert lines == [
        LogLine("daemon", "info", "policyd", pid, text)
        for text in [
            "Updating db: phish2/x@domain/201.48.226.249/1502/1502",
            "DEFERRING overquota (1502>1500) for user phish2 using x@domain from ip [201.48.226.249]",
            "Updating db: phish2/x@domain/201.48.226.249/1499/3001",
            "REJECTING overquota (3001>2x1500) for user phish2 using x@domain from ip [201.48.226.249]",
            "Updating db: phish3/x@domain/201.48.226.249/1/1",
            "skipping whitelisted user: whitey/x@domain/201.48.226.249/5",
            "Holding blacklisted user: black/x@domain/201.48.226.249/6",
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
def test_what_a_client_sent_is_logged_on_one_line_of_ascii(daemon: Policyd, sent: str, shown: str) -> None:
    """In every place of the lines where it can stand."""
    assert ask(
        daemon, sasl_username=sent, sender=sent, client_address=sent, queue_id=sent, recipient_count=QUOTA
    ) == (
        "HOLD quota exceeded",
        [
            f"Updating db: {shown}/{shown}/{shown}/10/10",
            f"DEFERRING overquota (10>10) for user {shown} using {shown} from ip [{shown}], queue_id={shown}",
        ],
    )
