"""The rule and what a site may change of it: who is held, refused or let through, and the lines that say so."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
from asking import Relay, ask, status, submit, wait_for_delivery
from hypothesis import example, given, settings
from hypothesis import strategies as st
from servers import DUNNO, HOLD, REJECT, LogLine, Postfix, Start, read_settings, wait_until
from stores import KeptLog, Store, event, on_stores, soon

from policyd import BATCH_EVENTS, NEVER, Limits, Usage, decide, in_office_hours, local_time

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
ODD = "\x1b[31m\x07\x7f%s%n\t\u4f8b\u2028\u202e\x85\U0001f4a9\rupdating db: b"
SHOWN = r"\x1b[31m\x07\x7f%s%n\t\u4f8b\u2028\u202e\x85\U0001f4a9\rupdating db: b"
QUOTA = 10
BLACKLISTED = "HOLD blacklisted"
HELP = "see https://help.example.org/quota; or write to <help@example.org>, \"100 %\", $(x) {sender} = '\\'"
HELPDESK = "helpdesk@example.org"
ALLOW = ("always_allow=HelpDesk@Example.ORG", "always_allow=postmaster@example.org")


def usage(*cases: dict[str, Any]) -> Usage:
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
LISTED: list[tuple[dict[str, str], str]] = [  # every spelling of what is on a list is in test_settings.py
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


def test_the_lines_of_the_log_are_those_that_parsers_match(policyd: Start) -> None:
    """Word for word, at the real syslog socket; nobody had to set a quota.  Held and refused messages count too.

    What a client sent is on one line of ASCII, in every place of the lines where it can stand.
    """
    daemon = policyd(whitelist="whitey", blacklist="black", whitelist_days="1-7", whitelist_hours="0-24")
    answers = [
        daemon.ask(sasl_username=login, sender="X@domain" if count != 3 else "", client_address="192.0.2.249",
                   recipient_count=count, queue_id="4Xk1Zt" if login != "black" else "Q" * 300)
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
            f"Holding blacklisted user: black/x@domain/192.0.2.249/6, queue_id={'Q' * 255}",  # it is cut as a login is
            f"Updating db: {SHOWN}/{SHOWN}/{SHOWN}/1500/1500",
            f"DEFERRING overquota (1500>1500) for user {SHOWN} using {SHOWN} from ip [{SHOWN}], queue_id={SHOWN}",
        ]
    ]


def update(login: str, recipients: int, reached: int) -> str:
    return f"Updating db: {login}/alice@example.org/192.0.2.1/{recipients}/{reached}"


def exceeded(word: str, compared: str, login: str, rule: str = "overquota") -> str:
    who = f"user {login} using alice@example.org from ip [192.0.2.1]"
    return f"{word} {rule} ({compared}) for {who}, queue_id=4Xk1Zt"


OWN = "defaultquota=10 quota=busy:40 quota=few:3 quota=trainee:0 quota=robot:unlimited quota=Capitals@Example.ORG:5"
REJECTQUOTA = "defaultquota=10 quota=few:4 quota=busy:100 quota=trainee:0 rejectquota="
MESSAGES: list[tuple[str, str, list[tuple[int, str]]]] = [  # settings, who, how many recipients and what is logged
    (OWN, "busy", [(39, ""), (1, "DEFERRING 40>40"), (39, "DEFERRING 79>40"), (1, "REJECTING 80>2x40")]),
    (OWN, "few", [(2, ""), (1, "DEFERRING 3>3"), (3, "REJECTING 6>2x3")]),
    (OWN, "trainee", [(1, "DEFERRING 1>0"), (999_999, "DEFERRING 1000000>0")]),
    (OWN, "robot", [(999_999, ""), (999_999, "")]), (OWN, "capitals", [(4, ""), (1, "DEFERRING 5>5")]),
    *((OWN, login, [(9, ""), (1, "DEFERRING 10>10"), (9, "DEFERRING 19>10"), (1, "REJECTING 20>2x10")])
      for login in ("anna", "trainees", "a-robot", "unlimited")),
    (f"{REJECTQUOTA}10", "anna", [(9, ""), (1, "REJECTING 10>10")]),
    *((f"{REJECTQUOTA}{n}", "anna", [(9, ""), (n - 10, f"DEFERRING {n - 1}>10"), (1, f"REJECTING {n}>{shown}")])
      for n, shown in ((11, "11"), (20, "2x10"))),
    (f"{REJECTQUOTA}15", "few", [(3, ""), (4, "DEFERRING 7>4"), (1, "REJECTING 8>2x4")]),
    (f"{REJECTQUOTA}15", "busy", [(99, "")]), (f"{REJECTQUOTA}15", "trainee", [(99, "DEFERRING 99>0")]),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "login", "messages"), MESSAGES, ids=str)
@on_stores("SQLite")
def test_mail_is_held_and_refused_from_these_sums_on(
    store: Store, logged: KeptLog, lines: str, login: str, messages: list[tuple[int, str]]
) -> None:
    """By a quota of its own, more or less than that of the others, for which rejectquota is not."""
    relay = Relay(store, logged, *lines.split(), "blacklist=phished", "quota=phished:unlimited")
    reached = 0
    for count, said in messages:
        reached += count
        word, _, compared = said.partition(" ")
        more = [exceeded(word, compared, login)] if said else []
        answer = {"": DUNNO, "DEFERRING": HOLD, "REJECTING": REJECT}[word]
        assert relay.ask(login, recipient_count=count) == (answer, [update(login, count, reached), *more])
    assert relay.ask("phished").answer == BLACKLISTED


def test_reaching_the_hour_quota_is_held_until_the_hour_is_over(store: Store, logged: KeptLog) -> None:
    """On every table, with the words that log parsers match; what is older than an hour does not count."""
    store.add([("anna", "", "", 40), ("anna", "", "HOLD hourquota", None)], age_s=3660)
    store.add([("anna", "", "", 3), ("anna", "", "", -50), ("anna", "", "x", None)], age_s=3540)
    relay = Relay(store, logged, "hourquota=8", "quota=own:1000:20", "quota=none:1000:0", "hold_message=ask us")
    for login, count, reached, said in (
        ("anna", 4, 47, ""), ("anna", 1, 48, "8>8"), ("anna", 9, 57, "17>8"), ("own", 19, 19, ""),
        ("own", 1, 20, "20>20"), ("none", 19, 19, ""), ("none", 1, 20, ""),
    ):  # fmt: skip
        more = [exceeded("DEFERRING", said, login, "hourquota")] if said else []
        expected = "HOLD hour quota exceeded; ask us" if said else DUNNO, [update(login, count, reached), *more]
        assert relay.ask(login, recipient_count=count) == expected


def test_the_hour_and_the_day_of_a_batch_run_up_in_order_of_arrival(store: Store, logged: KeptLog) -> None:
    """Also when it comes from one address in one moment; with a history that is long."""
    relay = Relay(store, logged, "hourquota=5", "defaultquota=20", "quota=anna:unlimited:5")
    for _ in range(2):  # that the history is long is known from the first time on
        store.clear()
        store.add([("anna", "", "", 1)] * 600, age_s=3660)
        for login, count, passing in (("anna", 2, 2), ("bert", 1, 4)):
            outcomes = relay.ask_at_once([{"sasl_username": login, "recipient_count": count}] * 5)
            expected = [DUNNO] * passing + ["HOLD hour quota exceeded"] * (5 - passing)
            assert [outcome.answer for outcome in outcomes] == expected


LOGINS = ["students-union", "students-office", "bert"]  # of the old table's 8 characters two are the same
counts = st.sampled_from([None, 0, -3, 1, 1, 1, 2, 40])
histories = st.lists(st.tuples(st.integers(1, 150), st.sampled_from(LOGINS), counts), max_size=6)  # so many rows
shapes = st.lists(st.tuples(st.integers(1, 80), st.sampled_from(LOGINS), st.integers(1, 3)), min_size=1, max_size=3)
own_quotas = st.dictionaries(st.sampled_from(LOGINS), st.sampled_from(["0", "1", "3", "20", "150", "400", "unlimited"]))


@settings(max_examples=20)
@given(default=st.integers(1, 20), more=st.none() | st.integers(0, 300), own=own_quotas, history=histories,
       shape=shapes, mixed=st.randoms(use_true_random=False))  # fmt: skip
@example(1, None, {LOGINS[0]: "400"}, [(700, LOGINS[0], 1)], [(64, LOGINS[0], 1), (64, LOGINS[1], 1)], random.Random(1))
@example(1, 299, {LOGINS[1]: "150"}, [(700, LOGINS[0], 1)], [(80, LOGINS[1], 1)], random.Random(1))
@example(3, None, {}, [(300, "bert", 1)], [(BATCH_EVENTS, "bert", 1)], random.Random(1))
@example(3, None, {}, [(300, "bert", -3), (6, "bert", 1)], [(1, "bert", 1)], random.Random(1))
@example(20, None, {}, [(300, "bert", None), (300, "bert", 1)], [(BATCH_EVENTS, "bert", 1)], random.Random(1))
def test_a_bounded_sum_never_changes_an_answer_whoever_has_which_quota(
    store: Store, default: int, more: int | None, own: dict[str, str], history: Any, shape: Any, mixed: random.Random
) -> None:
    store.clear()
    lines = [f"defaultquota={default}", *(f"quota={login}:{n}" for login, n in own.items())]
    settings = read_settings(*lines, *([] if more is None else [f"rejectquota={default + more}"]))
    rows = [(login[: store.width], "", "", each) for length, login, each in history for _ in range(length)]
    if rows:
        store.add(rows, age_s=60)
    # Each has a row of its own.
    batch = [event(who, each, f"{n}.{m}") for n, (length, who, each) in enumerate(shape) for m in range(length)]
    mixed.shuffle(batch)
    batch = batch[:BATCH_EVENTS]
    assert store.repository.insert(batch, soon()) == set()

    reached: Counter[str] = Counter()
    for login, _, _, each in rows:
        reached[login] += max(each or 0, 0)
    exact = []
    for message in batch:
        reached[message.sasl_username[: store.width]] += message.recipient_count or 0
        exact.append(reached[message.sasl_username[: store.width]])

    def answers(sums: list[int]) -> list[str]:
        limits = [settings.limits_of(message.sasl_username) for message in batch]
        return [decide(Usage(reached), each).action for reached, each in zip(sums, limits)]

    for _ in range(2):  # that a history is long is known from the first time on
        found = [usage.recipients for usage in store.repository.usages(batch, settings, soon())]
        assert answers(found) == answers(exact)
        assert all(low <= high for low, high in zip(found, exact))


def test_an_audit_lets_all_pass_and_logs_what_would_have_been(policyd: Start) -> None:
    """In the words that parsers match, but for the first one: they do not take it for real.  It counts the same."""
    audit = policyd(
        mode="audit", defaultquota=QUOTA, quota=["trainee:0", "hasty:99:2"], blacklist="phished", whitelist="news",
        whitelist_days="1-7", whitelist_hours="0-24", hold_message="ask us", reject_message="ask us", on_stop="/bin/x",
    )
    phished = "would HOLD blacklisted user: phished/alice@example.org/192.0.2.1/1, queue_id=4Xk1Zt"
    for login, count, lines in [
        ("anna", 9, [update("anna", 9, 9)]),
        ("anna", 1, [update("anna", 1, 10), exceeded("would HOLD", "10>10", "anna")]),
        ("anna", 10, [update("anna", 10, 20), exceeded("would REJECT", "20>2x10", "anna")]),
        ("trainee", 1, [update("trainee", 1, 1), exceeded("would HOLD", "1>0", "trainee")]),
        ("hasty", 2, [update("hasty", 2, 2), exceeded("would HOLD", "2>2", "hasty", "hourquota")]),
        ("phished", 1, [phished]),
        ("news", 1, ["skipping whitelisted user: news/alice@example.org/192.0.2.1/1"]),
        ("", 1, []),
    ]:
        message = {"recipient_count": count, "instance": f"1.2.{login}{count}"}
        assert ask(audit, login, **message) == (DUNNO, lines)
        assert ask(audit, login, **message) == (DUNNO, []), "a repetition is logged once"
    assert f"quota {QUOTA} (audit)," in audit.log_lines()[0].text
    assert "audit: 4 would HOLD, 1 would REJECT); 4 logins held;" in status(audit).text
    assert not (audit.statedir / "incidents.json").exists()


def test_a_sender_reads_the_message_and_mail_to_who_helps_is_delivered(postfix: Postfix, policyd: Start) -> None:
    """All of it, also the longest one that may be; that of held mail is in Postfix's log.  rcpt0 helps."""
    text = HELP.ljust(200, ".")
    before = len(postfix.log)
    daemon = policyd(port=postfix.policy_port, defaultquota=3, always_allow="Rcpt0@example.net",
                     hold_message=text, reject_message=text)  # fmt: skip
    held = submit(postfix, recipients=3)
    assert (held.code, postfix.queue()[held.queue_id]) == (250, "hold")
    refused = submit(postfix, recipients=3)
    assert (refused.code, refused.reply[:6]) == (554, "5.7.1 ")
    assert refused.reply.endswith(f": max quota exceeded; {text}")
    wait_until(lambda: f"quota exceeded; {text}" in postfix.log[before:], "Postfix has logged the message")
    wait_for_delivery(postfix, submit(postfix))
    daemon.wait_for_log("allowing mail to rcpt0@example.net: alice/alice@example.org/127.0.0.1/1")


@on_stores("SQLite")
def test_mail_to_who_helps_and_nobody_else_passes_uncounted(store: Store, logged: KeptLog) -> None:
    """Who is held, refused or on the blacklist can still ask why.  A repetition is logged once."""
    relay = Relay(store, logged, f"defaultquota={QUOTA}", *ALLOW, "blacklist=phished", "quota=trainee:0")
    assert relay.ask("held", recipient_count=QUOTA).answer == HOLD
    assert relay.ask("refused", recipient_count=2 * QUOTA).answer == REJECT
    for login in ("phished", "trainee", "held", "refused", "anna"):
        for address in (HELPDESK, "PostMaster@Example.org"):
            message = {"recipient": address, "instance": f"{login}.{address}"}
            allowed = [f"allowing mail to {address}: {login}/alice@example.org/192.0.2.1/1"]
            assert [relay.ask(login, **message) for _ in range(2)] == [(DUNNO, allowed), (DUNNO, [])]
    for login, reached in (("held", QUOTA + 1), ("refused", 2 * QUOTA + 1), ("trainee", 1), ("anna", 1)):
        assert relay.ask(login, recipient="anna@example.org").lines[0] == update(login, 1, reached)
    assert relay.ask("", recipient=HELPDESK) == (DUNNO, [])
    others = [f"{HELPDESK}.example.net", f"x{HELPDESK}", f" {HELPDESK}", f"<{HELPDESK}>", "helpdesk", "", "a@b"]
    for message in [{"recipient": HELPDESK, "recipient_count": 2}, *({"recipient": each} for each in others)]:
        assert relay.ask("phished", sender=HELPDESK, client_address=HELPDESK, **message).answer == BLACKLISTED
        assert relay.ask("trainee", sender=HELPDESK, **message).answer == HOLD
