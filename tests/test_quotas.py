"""What a site may change of the rule: quotas of a login's own, rejectquota, mode=audit, messages, always_allow."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Callable

import pytest
from asking import Relay, ask, status, submit, wait_for_delivery
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from servers import DUNNO, HOLD, REJECT, Policyd, Postfix, wait_until
from stores import KeptLog, Store, event, on_stores, read_settings, soon

from policyd import BATCH_EVENTS, Usage, decide

Start = Callable[..., Policyd]

QUOTA = 10
BLACKLISTED = "HOLD blacklisted"


def update(login: str, recipients: int, reached: int) -> str:
    """Return the line of a message that was counted."""
    return f"Updating db: {login}/alice@example.org/192.0.2.1/{recipients}/{reached}"


def overquota(word: str, compared: str, login: str) -> str:
    """Return the line of a message that was too many."""
    who = f"user {login} using alice@example.org from ip [192.0.2.1]"
    return f"{word} overquota ({compared}) for {who}, queue_id=4Xk1Zt"


# ---- quotas of its own, rejectquota, an hour quota ---------------------------------------------------

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
      for n, shown in ((11, "11"), (15, "15"), (20, "2x10"), (30, "30"))),
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
        more = [overquota(word, compared, login)] if said else []
        answer = {"": DUNNO, "DEFERRING": HOLD, "REJECTING": REJECT}[word]
        assert relay.ask(login, recipient_count=count) == (answer, [update(login, count, reached), *more])
    assert relay.ask("phished").answer == BLACKLISTED


def hourquota(figures: str, login: str = "anna", word: str = "DEFERRING") -> str:
    return overquota(word, figures, login).replace("overquota", "hourquota")


def test_reaching_the_hour_quota_is_held_until_the_hour_is_over(store: Store, logged: KeptLog) -> None:
    """On every table, with the words that log parsers match; what is older than an hour does not count."""
    store.add([("anna", "", "", 40), ("anna", "", "HOLD hourquota", None)], age_s=3660)
    store.add([("anna", "", "", 3), ("anna", "", "", -50), ("anna", "", "x", None)], age_s=3540)
    relay = Relay(store, logged, "hourquota=8", "quota=own:1000:20", "quota=none:1000:0", "hold_message=ask us")
    held = "HOLD hour quota exceeded; ask us"
    assert relay.ask("anna", recipient_count=4) == (DUNNO, [update("anna", 4, 47)])
    assert relay.ask("anna") == (held, [update("anna", 1, 48), hourquota("8>8")])
    assert relay.ask("anna", recipient_count=9) == (held, [update("anna", 9, 57), hourquota("17>8")])
    assert [relay.ask(login, recipient_count=19).answer for login in ("own", "none")] == [DUNNO] * 2
    assert relay.ask("own").lines[1:] == [hourquota("20>20", "own")]
    assert relay.ask("none").answer == DUNNO


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


@hypothesis_settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# ---- mode=audit, messages, always_allow --------------------------------------------------------------


def test_an_audit_lets_all_pass_and_logs_what_would_have_been(policyd: Start) -> None:
    """In the words that parsers match, but for the first one: they do not take it for real.  It counts the same."""
    audit = policyd(
        mode="audit", defaultquota=QUOTA, quota=["trainee:0", "hasty:99:2"], blacklist="phished", whitelist="news",
        whitelist_days="1-7", whitelist_hours="0-24", hold_message="ask us", reject_message="ask us", on_stop="/bin/x",
    )
    phished = "would HOLD blacklisted user: phished/alice@example.org/192.0.2.1/1, queue_id=4Xk1Zt"
    for login, count, lines in [
        ("anna", 9, [update("anna", 9, 9)]),
        ("anna", 1, [update("anna", 1, 10), overquota("would HOLD", "10>10", "anna")]),
        ("anna", 10, [update("anna", 10, 20), overquota("would REJECT", "20>2x10", "anna")]),
        ("trainee", 1, [update("trainee", 1, 1), overquota("would HOLD", "1>0", "trainee")]),
        ("hasty", 2, [update("hasty", 2, 2), hourquota("2>2", "hasty", "would HOLD")]),
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


HELP = "see https://help.example.org/quota; or write to <help@example.org>, \"100 %\", $(x) {sender} = '\\'"


def test_a_sender_reads_the_message_and_mail_to_who_helps_is_delivered(postfix: Postfix, policyd: Start) -> None:
    """All of it, also the longest one that may be; that of held mail is in Postfix's log.  rcpt0 helps."""
    text = HELP.ljust(200, ".")
    before = len(postfix.log)
    daemon = policyd(port=postfix.policy_port, defaultquota=3, always_allow="Rcpt0@example.net",
                     hold_message=text, reject_message=text)  # fmt: skip
    held = submit(postfix, recipients=3)
    assert (held.code, postfix.queue_name(held.queue_id)) == (250, "hold")
    refused = submit(postfix, recipients=3)
    assert (refused.code, refused.reply[:6]) == (554, "5.7.1 ")
    assert refused.reply.endswith(f": max quota exceeded; {text}")
    wait_until(lambda: f"quota exceeded; {text}" in postfix.log[before:], "Postfix has logged the message")
    wait_for_delivery(postfix, submit(postfix))
    daemon.wait_for_log("allowing mail to rcpt0@example.net: alice/alice@example.org/127.0.0.1/1")


HELPDESK = "helpdesk@example.org"
ALLOW = ("always_allow=HelpDesk@Example.ORG", "always_allow=postmaster@example.org")


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
