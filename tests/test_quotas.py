"""What a site may change of the rule: quotas of a login's own, rejectquota, mode=audit, messages, always_allow."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from servers import Database, Policyd, Postfix, policyd_factory, wait_until
from stores import MariaStore, SQLiteStore, Store, event, soon
from test_postfix import submit, wait_for_delivery

from policyd import (
    BATCH_EVENTS,
    DUNNO,
    HOLD,
    HOLD_BLACKLISTED,
    MAX_MESSAGE,
    REJECT,
    Settings,
    decide,
    scope_of,
)

Start = Callable[..., Policyd]

QUOTA = 10


class Outcome(NamedTuple):
    """What policyd answered, and the lines it logged about it."""

    answer: str
    lines: list[str]


def ask(daemon: Policyd, login: str, **attributes: object) -> Outcome:
    """Ask about a message and return what became of it."""
    before = len(daemon.lines_so_far())
    answer = daemon.ask(**{"sasl_username": login, "queue_id": "4Xk1Zt", **attributes})
    return Outcome(answer, [line.text for line in daemon.lines_so_far()[before:]])


def update(login: str, recipients: int, reached: int) -> str:
    """Return the line of a message that was counted."""
    return f"Updating db: {login}/alice@example.org/192.0.2.1/{recipients}/{reached}"


def overquota(word: str, compared: str, login: str) -> str:
    """Return the line of a message that was too many."""
    who = f"user {login} using alice@example.org from ip [192.0.2.1]"
    return f"{word} overquota ({compared}) for {who}, queue_id=4Xk1Zt"


# ---- a quota of its own ---------------------------------------------------------------------------

OWN = ["busy:40", "few:3", "trainee:0", "robot:unlimited", "Capitals@Example.ORG:5", "phished:unlimited"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Policyd]:
    """A daemon with quotas for some; each test has a login of its own, or forgives it what others counted."""
    with policyd_factory() as start:
        yield start(defaultquota=QUOTA, quota=OWN, blacklist="phished")


@pytest.mark.parametrize(("login", "own"), [("busy", 40), ("few", 3)])
def test_a_login_is_held_from_its_own_quota_on_and_refused_from_twice_that_on(
    daemon: Policyd, login: str, own: int
) -> None:
    """Be it more than that of the others, or less."""
    assert ask(daemon, login, recipient_count=own - 1) == (DUNNO, [update(login, own - 1, own - 1)])
    assert ask(daemon, login) == (HOLD, [update(login, 1, own), overquota("DEFERRING", f"{own}>{own}", login)])
    assert ask(daemon, login, recipient_count=own - 1).answer == HOLD
    assert ask(daemon, login) == (
        REJECT, [update(login, 1, 2 * own), overquota("REJECTING", f"{2 * own}>2x{own}", login)]
    )


def test_a_quota_of_0_holds_everything_and_refuses_nothing(daemon: Policyd) -> None:
    assert ask(daemon, "trainee") == (HOLD, [update("trainee", 1, 1), overquota("DEFERRING", "1>0", "trainee")])
    assert ask(daemon, "trainee", recipient_count=999_999) == (
        HOLD, [update("trainee", 999_999, 1_000_000), overquota("DEFERRING", "1000000>0", "trainee")]
    )


def test_an_unlimited_quota_holds_and_refuses_nothing_but_counts(daemon: Policyd) -> None:
    for reached in (999_999, 1_999_998):
        assert ask(daemon, "robot", recipient_count=999_999) == (DUNNO, [update("robot", 999_999, reached)])


def test_the_blacklist_beats_an_unlimited_quota(daemon: Policyd) -> None:
    assert ask(daemon, "phished").answer == HOLD_BLACKLISTED


def test_the_others_have_the_default_quota(daemon: Policyd) -> None:
    """Also those whose logins begin or end like one with a quota of its own."""
    for login in ("anna", "trainees", "busy2", "rob", "a-robot", "unlimited"):
        assert ask(daemon, login, recipient_count=QUOTA).lines[1:] == [overquota("DEFERRING", "10>10", login)]
        assert ask(daemon, login, recipient_count=QUOTA).lines[1:] == [overquota("REJECTING", "20>2x10", login)]


def test_capitals_and_the_domain_do_not_matter_for_a_quota_when_domains_are_cut(daemon: Policyd) -> None:
    assert ask(daemon, "CAPITALS@other.example", recipient_count=5).lines[1:] == [
        overquota("DEFERRING", "5>5", "capitals")
    ]


def test_with_whole_logins_a_quota_is_that_of_the_whole_login(policyd: Start) -> None:
    own_quotas = ["Info@Example.org:3", "info@example.net:4", "bert:5"]
    daemon = policyd(strip_domain="no", defaultquota=QUOTA, quota=own_quotas)
    for sasl_username, own in [
        ("info@example.org", 3),
        ("INFO@EXAMPLE.NET", 4),
        ("Bert", 5),
        ("info", QUOTA),
        ("info@example.com", QUOTA),
        ("bert@example.org", QUOTA),
    ]:
        assert ask(daemon, sasl_username, recipient_count=own).lines[1:] == [
            overquota("DEFERRING", f"{own}>{own}", sasl_username.lower())
        ]


# ---- long histories -------------------------------------------------------------------------------

STORES = [
    pytest.param("embedded", id="embedded"),
    pytest.param("schema.sql", marks=pytest.mark.mariadb),
    pytest.param("go-policyd", marks=pytest.mark.mariadb),
    pytest.param("go-policyd with an index", marks=pytest.mark.mariadb),
]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store; the test runs once with each kind."""
    if request.param == "embedded":
        return SQLiteStore(tmp_path / "events.sqlite3")
    database: Database = request.getfixturevalue("database" if request.param == "schema.sql" else "old_database")
    if request.param == "go-policyd with an index":
        database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    return MariaStore(database)


def settings_to(store: Store, tmp_path: Path) -> dict[str, str]:
    """Return the settings that lead a daemon to a store."""
    return store.database.settings() if isinstance(store, MariaStore) else {"statedir": str(tmp_path)}


def test_a_quota_above_the_default_sums_as_far_as_it_needs(store: Store, tmp_path: Path, policyd: Start) -> None:
    """Of a long history of somebody else only as much is summed as decides for defaultquota."""
    own = 1000
    assert own > scope_of(Settings(defaultquota=1)).everybody.rows
    store.add([("busy", "", "", 1), ("robot", "", "", 1)] * (own - 4), age_s=60)
    daemon = policyd(defaultquota=1, quota=[f"busy:{own}", "robot:unlimited"], **settings_to(store, tmp_path))
    for reached in (997, 998, 999):
        assert ask(daemon, "busy") == (DUNNO, [update("busy", 1, reached)])
        assert ask(daemon, "robot").answer == DUNNO
    assert ask(daemon, "busy") == (HOLD, [update("busy", 1, own), overquota("DEFERRING", "1000>1000", "busy")])
    store.add([("busy", "", "", 1)] * (own - 2), age_s=120)
    assert ask(daemon, "busy") == (HOLD, [update("busy", 1, 1999), overquota("DEFERRING", "1999>1000", "busy")])
    assert ask(daemon, "busy") == (REJECT, [update("busy", 1, 2000), overquota("REJECTING", "2000>2x1000", "busy")])


def test_two_logins_that_an_old_table_cuts_to_the_same_are_judged_each_by_its_own_quota(
    old_database: Database, policyd: Start
) -> None:
    """Whoever of them asks, their sum is one, and long enough for the higher quota."""
    old_database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    store = MariaStore(old_database)
    store.add([("students", "", "", 1)] * 900, age_s=60)
    daemon = policyd(defaultquota=1, quota="students-office:905", **old_database.settings())
    for n in range(2):
        assert ask(daemon, "students-office").lines == [update("students-office", 1, 901 + 2 * n)]
        assert ask(daemon, "students-union").answer == REJECT
    assert ask(daemon, "students-office").lines[1:] == [overquota("DEFERRING", "905>905", "students-office")]


@pytest.mark.parametrize("last", ["students-office", "students-union"])
def test_of_a_batch_with_both_the_one_who_needs_more_of_the_history_gets_it(
    old_database: Database, tmp_path: Path, last: str
) -> None:
    old_database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    store = MariaStore(old_database)
    store.add([("students", "", "", 1)] * 900, age_s=60)
    file = tmp_path / "policyd.cfg"
    file.write_text("defaultquota=1\nquota=students-office:905\n")
    scope = scope_of(Settings.from_file(str(file)))
    both = [event("students-office", sender="a"), event("students-union", sender="b")]
    batch = sorted(both, key=lambda each: each.sasl_username == last)
    assert store.repository.insert(batch, soon()) == set()
    for _ in range(2):  # that the history is long is known from the first time on
        assert [usage.recipients for usage in store.repository.sum_recipients(batch, scope, soon())] == [901, 902]


LOGINS = ["students-union", "students-office", "bert"]  # of the old table's 8 characters two are the same
counts = st.sampled_from([None, 0, 1, 1, 1, 2, 40])
histories = st.lists(st.tuples(st.integers(1, 150), st.sampled_from(LOGINS), counts), max_size=6)  # so many rows
shapes = st.lists(st.tuples(st.integers(1, 80), st.sampled_from(LOGINS), st.integers(1, 3)), min_size=1, max_size=3)
own_quotas = st.dictionaries(st.sampled_from(LOGINS), st.sampled_from(["0", "1", "3", "20", "150", "400", "unlimited"]))


@hypothesis_settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    default=st.integers(1, 20), more=st.none() | st.integers(0, 300), own=own_quotas, history=histories, shape=shapes,
    mixed=st.randoms(use_true_random=False),
)
@example(1, None, {LOGINS[0]: "400"}, [(700, LOGINS[0], 1)], [(64, LOGINS[0], 1), (64, LOGINS[1], 1)], random.Random(1))
@example(1, 299, {LOGINS[1]: "150"}, [(700, LOGINS[0], 1)], [(80, LOGINS[1], 1)], random.Random(1))
def test_a_bounded_sum_never_changes_an_answer_whoever_has_which_quota(
    store: Store,
    tmp_path: Path,
    default: int,
    more: int | None,
    own: dict[str, str],
    history: list[tuple[int, str, int | None]],
    shape: list[tuple[int, str, int]],
    mixed: random.Random,
) -> None:
    store.clear()
    lines = [f"defaultquota={default}", *(f"quota={login}:{n}" for login, n in own.items())]
    lines += [] if more is None else [f"rejectquota={default + more}"]
    file = tmp_path / "policyd.cfg"
    file.write_text("\n".join(lines))
    settings = Settings.from_file(str(file))
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
        reached[login] += each or 0
    exact = []
    for message in batch:
        reached[message.sasl_username[: store.width]] += message.recipient_count
        exact.append(reached[message.sasl_username[: store.width]])

    limits = [settings.limits_of(message.sasl_username) for message in batch]

    def answers(sums: list[int]) -> list[str]:
        return [decide(reached, each.hold_at, each.reject_at) for reached, each in zip(sums, limits)]

    for _ in range(2):  # that a history is long is known from the first time on
        found = [usage.recipients for usage in store.repository.sum_recipients(batch, scope_of(settings), soon())]
        assert answers(found) == answers(exact)
        assert all(low <= high for low, high in zip(found, exact))


# ---- rejectquota ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rejectquota", "shown"), [(11, "11>11"), (15, "15>15"), (20, "20>2x10"), (30, "30>30")], ids=str
)
def test_mail_is_refused_from_rejectquota_on(policyd: Start, rejectquota: int, shown: str) -> None:
    """The log says `2x` of twice defaultquota only."""
    daemon = policyd(defaultquota=QUOTA, rejectquota=rejectquota)
    assert ask(daemon, "anna", recipient_count=rejectquota - 1).lines[1:] == [
        overquota("DEFERRING", f"{rejectquota - 1}>{QUOTA}", "anna")
    ]
    assert ask(daemon, "anna").lines[1:] == [overquota("REJECTING", shown, "anna")]


def test_a_rejectquota_of_defaultquota_refuses_and_never_holds(policyd: Start) -> None:
    daemon = policyd(defaultquota=QUOTA, rejectquota=QUOTA)
    assert ask(daemon, "anna", recipient_count=QUOTA - 1).answer == DUNNO
    assert ask(daemon, "anna").lines[1:] == [overquota("REJECTING", "10>10", "anna")]


def test_rejectquota_is_not_for_logins_with_a_quota_of_their_own(policyd: Start) -> None:
    daemon = policyd(defaultquota=QUOTA, rejectquota=15, quota=["few:4", "busy:100", "trainee:0", "robot:unlimited"])
    for login, recipients, answer in [
        ("few", 7, HOLD),
        ("few", 1, REJECT),
        ("busy", 99, DUNNO),
        ("busy", 100, HOLD),
        ("busy", 1, REJECT),
        ("trainee", 10_000, HOLD),
        ("robot", 10_000, DUNNO),
    ]:
        outcome = ask(daemon, login, recipient_count=recipients)
        assert outcome.answer == answer, outcome
    assert ask(daemon, "few").lines[1:] == [overquota("REJECTING", "9>2x4", "few")]


# ---- mode=audit -----------------------------------------------------------------------------------


@pytest.fixture
def audit(policyd: Start) -> Policyd:
    """A daemon that lets all pass."""
    return policyd(
        mode="audit", defaultquota=QUOTA, quota="trainee:0", blacklist="phished", whitelist="news",
        whitelist_days="1-7", whitelist_hours="0-24", hold_message="ask us", reject_message="ask us",
    )


def test_an_audit_lets_all_pass_and_logs_what_would_have_been(audit: Policyd) -> None:
    """In the words that parsers match, but for the first one: they do not take it for real.  It counts the same."""
    assert ask(audit, "anna", recipient_count=QUOTA - 1) == (DUNNO, [update("anna", 9, 9)])
    assert ask(audit, "anna") == (DUNNO, [update("anna", 1, 10), overquota("would HOLD", "10>10", "anna")])
    assert ask(audit, "anna", recipient_count=QUOTA) == (
        DUNNO, [update("anna", 10, 20), overquota("would REJECT", "20>2x10", "anna")]
    )
    assert ask(audit, "trainee") == (DUNNO, [update("trainee", 1, 1), overquota("would HOLD", "1>0", "trainee")])
    assert ask(audit, "phished", recipient_count=3) == (
        DUNNO, ["would HOLD blacklisted user: phished/alice@example.org/192.0.2.1/3, queue_id=4Xk1Zt"]
    )
    assert ask(audit, "phished", queue_id="") == (
        DUNNO, ["would HOLD blacklisted user: phished/alice@example.org/192.0.2.1/1"]
    )
    assert ask(audit, "news") == (DUNNO, ["skipping whitelisted user: news/alice@example.org/192.0.2.1/1"])
    assert ask(audit, "") == (DUNNO, [])
    assert not [line for line in audit.log_lines() if line.text.startswith(("DEFERRING", "REJECTING", "Holding"))]


def test_an_audit_says_so_at_its_start_and_in_its_status(audit: Policyd) -> None:
    """How many messages were let through that would not have been."""
    assert f"quota {QUOTA} (audit)," in audit.log_lines()[0].text
    for login, recipients in [("anna", 10), ("anna", 10), ("bert", 10), ("phished", 1), ("carl", 1)]:
        audit.ask(sasl_username=login, recipient_count=recipients)
    audit.wait_for_log("Updating db: carl/")
    audit.signal(signal.SIGUSR1)
    audit.wait_for_log(
        "5 requests: 5 DUNNO, 0 HOLD, 0 REJECT (audit: 3 would HOLD, 1 would REJECT); 3 logins held; 1 connections;"
    )


def test_a_repetition_in_an_audit_is_let_through_and_logged_once(audit: Policyd) -> None:
    for login in ("anna", "phished"):
        message = {"instance": f"4711.{login}", "recipient_count": QUOTA}
        assert ask(audit, login, **message).answer == DUNNO
        assert ask(audit, login, **message) == (DUNNO, [])
    assert ask(audit, "anna").lines[0] == update("anna", 1, QUOTA + 1)


# ---- hold_message and reject_message --------------------------------------------------------------

HELP = "see https://help.example.org/quota; or write to <help@example.org>, \"100 %\", $(x) {sender} = '\\'"


def test_the_messages_stand_behind_the_answers(policyd: Start) -> None:
    """The one for what is held also when it is for the blacklist; and a repetition gets the same."""
    daemon = policyd(defaultquota=QUOTA, blacklist="phished", hold_message=HELP, reject_message="call 4711")
    assert daemon.ask(sasl_username="anna", recipient_count=QUOTA - 1) == "DUNNO"
    for _ in range(2):
        assert daemon.ask(sasl_username="anna", instance="1.2.3") == f"HOLD quota exceeded; {HELP}"
    assert daemon.ask(sasl_username="phished") == f"HOLD blacklisted; {HELP}"
    assert daemon.ask(sasl_username="anna", recipient_count=QUOTA) == "REJECT max quota exceeded; call 4711"


@pytest.mark.parametrize(
    ("setting", "answers"),
    [
        ("hold_message", ["HOLD blacklisted; x", "HOLD quota exceeded; x", "REJECT max quota exceeded"]),
        ("reject_message", ["HOLD blacklisted", "HOLD quota exceeded", "REJECT max quota exceeded; x"]),
    ],
)
def test_one_message_does_not_need_the_other(policyd: Start, setting: str, answers: list[str]) -> None:
    daemon = policyd(defaultquota=QUOTA, blacklist="phished", **{setting: "x"})
    assert [daemon.ask(sasl_username=login, recipient_count=QUOTA) for login in ("phished", "anna", "anna")] == answers


def test_the_lines_of_the_log_stay_as_they_are_with_messages(policyd: Start) -> None:
    daemon = policyd(defaultquota=QUOTA, blacklist="phished", hold_message=HELP, reject_message=HELP)
    assert ask(daemon, "anna", recipient_count=QUOTA).lines[1:] == [overquota("DEFERRING", "10>10", "anna")]
    assert ask(daemon, "anna", recipient_count=QUOTA).lines[1:] == [overquota("REJECTING", "20>2x10", "anna")]
    assert ask(daemon, "phished").lines == [
        "Holding blacklisted user: phished/alice@example.org/192.0.2.1/1, queue_id=4Xk1Zt"
    ]


def test_the_sender_of_refused_mail_reads_the_message(postfix: Postfix, policyd: Start) -> None:
    """All of it, also the longest one that may be; that of held mail is in Postfix's log."""
    text = HELP + "." * (MAX_MESSAGE - len(HELP))
    before = len(postfix.log)
    policyd(port=postfix.policy_port, defaultquota=3, hold_message=text, reject_message=text)
    held = submit(postfix, recipients=3)
    assert (held.code, postfix.queue_name(held.queue_id)) == (250, "hold")
    refused = submit(postfix, recipients=3)
    assert refused.code == 554
    assert refused.reply.startswith("5.7.1 ")
    assert refused.reply.endswith(f": max quota exceeded; {text}")
    wait_until(lambda: f"quota exceeded; {text}" in postfix.log[before:], "Postfix has logged the message")


# ---- always_allow ---------------------------------------------------------------------------------

HELPDESK = "helpdesk@example.org"


@pytest.fixture(scope="module")
def helpful() -> Iterator[Policyd]:
    """A daemon that lets everybody write to two addresses."""
    with policyd_factory() as start:
        yield start(
            defaultquota=QUOTA, always_allow=["HelpDesk@Example.ORG", "postmaster@example.org"], blacklist="phished",
            quota="trainee:0",
        )


def test_mail_to_who_helps_passes_uncounted(helpful: Policyd) -> None:
    """Who is held, refused or on the blacklist can still ask why."""
    assert ask(helpful, "held", recipient_count=QUOTA).answer == HOLD
    assert ask(helpful, "refused", recipient_count=2 * QUOTA).answer == REJECT
    for login in ("phished", "trainee", "held", "refused", "anna"):
        for address in (HELPDESK, "postmaster@example.org"):
            assert ask(helpful, login, recipient=address) == (
                DUNNO, [f"allowing mail to {address}: {login}/alice@example.org/192.0.2.1/1"]
            )
    for login, reached in (("held", QUOTA + 1), ("refused", 2 * QUOTA + 1), ("trainee", 1), ("anna", 1)):
        assert ask(helpful, login, recipient="anna@example.org").lines[0] == update(login, 1, reached)
    assert ask(helpful, "phished", recipient="anna@example.org").answer == HOLD_BLACKLISTED


def test_capitals_in_the_address_of_who_helps_do_not_matter(helpful: Policyd) -> None:
    assert ask(helpful, "phished", recipient="HELPDESK@Example.org") == (
        DUNNO, ["allowing mail to HELPDESK@Example.org: phished/alice@example.org/192.0.2.1/1"]
    )


@pytest.mark.parametrize(
    "message",
    [
        {"recipient": "", "recipient_count": 2},
        {"recipient": "", "recipient_count": 1},
        {"recipient": HELPDESK, "recipient_count": 2},
        {"recipient": HELPDESK, "recipient_count": QUOTA},
        {"recipient": f"{HELPDESK}.example.net"},
        {"recipient": f"x{HELPDESK}"},
        {"recipient": f" {HELPDESK}"},
        {"recipient": f"<{HELPDESK}>"},
        {"recipient": "helpdesk"},
        {"recipient": "anna@example.org", "sender": HELPDESK},
        {"recipient": "anna@example.org", "client_address": HELPDESK},
    ],
    ids=str,
)
def test_mail_to_others_or_to_others_too_does_not_pass(helpful: Policyd, message: dict[str, object]) -> None:
    assert ask(helpful, "phished", **message).answer == HOLD_BLACKLISTED
    assert ask(helpful, "trainee", **message).answer == HOLD


def test_a_message_to_who_helps_that_is_repeated_is_logged_once(helpful: Policyd) -> None:
    """Postfix asks at DATA and at END-OF-MESSAGE if told to."""
    message = {"recipient": HELPDESK, "instance": "4711.helpdesk"}
    assert len(ask(helpful, "phished", protocol_state="DATA", **message).lines) == 1
    assert ask(helpful, "phished", **message) == (DUNNO, [])


def test_mail_without_a_login_to_who_helps_is_none_of_our_business(helpful: Policyd) -> None:
    assert ask(helpful, "", recipient=HELPDESK) == (DUNNO, [])


def test_with_a_real_postfix_mail_to_who_helps_is_delivered(postfix: Postfix, policyd: Start) -> None:
    """rcpt0 helps; with another recipient beside it the message waits."""
    daemon = policyd(port=postfix.policy_port, blacklist="alice", always_allow="Rcpt0@example.net")
    wait_for_delivery(postfix, submit(postfix))
    daemon.wait_for_log("allowing mail to rcpt0@example.net: alice/alice@example.org/127.0.0.1/1")
    both = submit(postfix, recipients=2)
    assert postfix.queue_name(both.queue_id) == "hold"
