"""What gives a thief away before the quota does: a login that mails from places it has never been."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from asking import Outcome, Relay
from hypothesis import example, given, settings
from hypothesis import strategies as st
from servers import DUNNO, HOLD, Start, numbers
from stores import BreakableRepository, KeptLog, SQLiteStore, Store, incident, on_stores

from policyd import DAY_S, RepositoryUnavailable, Watch, place_of

StartRelay = Callable[..., Relay]

MINUTE_S, HOUR_S = 60, 3600
HOME = "10.0.0.1"
PLACES = "HOLD too many places"
NEWPLACE = "HOLD too much from new places"
on_indexed = on_stores("SQLite", "schema.sql", "go-policyd with an index")
on_each = on_stores("SQLite", "schema.sql")
YES, AUDIT, NO = (f"early_signs={each}" for each in ("yes", "audit", "no"))


def at(place: int) -> str:
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


def line(rule: str, client_address: str, login: str = "anna") -> str:
    return f"{rule} for user {login} using SENDER from ip [{client_address}], queue_id=4Xk1Zt"


def send(relay: Relay, client_address: str, recipients: int = 1, login: str = "anna") -> Outcome:
    """Ask about a message; of what was logged only what stopped it is told.

    Each has a sender of its own, which is not shown: two of one millisecond from one sender would be one row.
    """
    sender = f"{next(numbers)}@example.org"
    message = {"sender": sender, "client_address": client_address, "recipient_count": recipients}
    answer, (counted, *lines) = relay.ask(login, **message)
    assert counted.startswith(f"Updating db: {login}/{sender}/{client_address}/{recipients}/")
    return Outcome(answer, [line.replace(sender, "SENDER") for line in lines])


def incidents(store: Store) -> list[tuple[str, str]]:
    return [(login, what) for login, _, what, count in store.rows() if count is None]


@on_indexed
def test_one_new_place_more_than_max_places_in_half_an_hour_is_held(store: Store, start: StartRelay) -> None:
    """And from then on all mail of the login, whichever place it comes from; a human is told once."""
    at_home(store)
    add(store, 31 * MINUTE_S, *((at(n), 1) for n in range(20, 25)))  # longer ago
    relay = start()
    for place in (1, 2, 3, 2, 4, 5, 5):
        assert send(relay, at(place)) == (DUNNO, [])
    assert send(relay, HOME) == (DUNNO, [])
    assert send(relay, at(6)) == (PLACES, [line("DEFERRING places (6>5)", at(6))])
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
        for n in range(places):
            add(store, (31 + 80 * n) * MINUTE_S, (at(n), 1), (HOME, 9), login=login)
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
def test_who_is_held_for_a_day_anyhow_is_not_swept(store: Store, start: StartRelay) -> None:
    """But who is held by a quota is; a thief behind NAT64 is in as many places as its addresses say."""
    for kind in ("HOLD places", "HOLD newplace", "HOLD blocked", "REJECT places", "HOLD overquota"):
        login = kind.replace("HOLD ", "")[:8]
        store.add([incident(login, kind)], HOUR_S)
        add(store, MINUTE_S, *((f"64:ff9b::{20 + n:x}00:1", 1) for n in range(6)), login=login)
    store.add([incident("overquot", "HOLD places")], 25 * HOUR_S)  # that is over
    start(finds=["Held by the sweep: overquot, places (6>5)"])
    assert len(incidents(store)) == 7


@on_each
def test_who_is_forgiven_while_a_sweep_looks_is_not_held_anew(
    store: Store, start: StartRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([incident("anna", "HOLD places")], MINUTE_S)
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    relay, ask = start(repository=store.repository), store.repository.ask

    def forgiven_meanwhile(*words: Any) -> Any:
        found = ask(*words)
        if words[0] == Watch.HISTORY:
            store.forgive("anna")
        return found

    monkeypatch.setattr(store.repository, "ask", forgiven_meanwhile)
    assert (relay.sweep(), relay.told) == ([], [])


SENT = {  # of the last hour, messages from where and with how many recipients; what becomes of one more
    "reaching the quota in five messages": ([(at(1), 20)] * 4, (at(1), 20), "newplace (100>100)"),
    "one recipient less": ([(at(1), 20)] * 4, (at(1), 19), ""), "four messages": ([(at(1), 300)] * 3, (at(1), 300), ""),
    "a fifth": ([(at(1), 300)] * 4, (at(1), 1), "newplace (1201>100)"),
    "several places": ([(at(1), 40), (at(2), 40), (at(3), 10), (at(1), 5)], (at(2), 5), "newplace (100>100)"),
    "the known place does not count": ([(at(1), 20)] * 4 + [(HOME, 900)], (at(1), 19), ""),
    "mail from the known place passes": ([(at(1), 200)] * 5, (HOME, 1), ""),
    "no place at all": ([("unknown", 200)] * 5, ("unknown", 1), ""),
    "a trusted network": ([("192.0.2.1", 200)] * 5, ("192.0.2.9", 1), ""),
    "beside one": ([("192.0.2.1", 200)] * 5 + [("192.0.3.1", 20)] * 4, ("192.0.3.1", 20), "newplace (100>100)"),
    "forgiven": ([(at(2), -200)] * 5 + [(at(1), 20)] * 4, (at(1), 19), ""),
    "IPv4 inside IPv6": ([(f"::ffff:{at(1)}", 20), ("64:ff9b::1500:2", 60), (at(1), 1), (at(1), 1)],
                         ("64:ff9b::1500:3", 18), "newplace (100>100)"),
    "IPv6": ([("2001:db8::1", 25)] * 4, ("2001:1::1", 1), "newplace (101>100)"),
}  # fmt: skip


@on_indexed
def test_so_much_within_an_hour_from_new_places_is_held(store: Store, start: StartRelay) -> None:
    """What is older than an hour does not count, nor that of logins with a quota of their own."""
    for n, (before, _, _) in enumerate(SENT.values()):
        for login in (f"anna{n}", f"own{n}"):
            at_home(store, login)
            add(store, 50 * MINUTE_S, *before, login=login)
            add(store, 70 * MINUTE_S, *[(at(1), 30)] * 9, login=login)
    owns = [f"quota=own{n}:5000" for n in range(len(SENT))]
    relay = start("trusted_network=192.0.2.0/24", "defaultquota=5000", *owns)
    for n, (name, (_, (client_address, recipients), said)) in enumerate(SENT.items()):
        expected = [line(f"DEFERRING {said}", client_address, f"anna{n}")] if said else []
        outcome = send(relay, client_address, recipients, f"anna{n}")
        assert outcome == (NEWPLACE if said else DUNNO, expected), name
        assert send(relay, client_address, recipients, f"own{n}") == (DUNNO, []), name
        assert send(relay, HOME, login=f"anna{n}").answer == (NEWPLACE if said else DUNNO), name
    held = [(f"anna{n}", "HOLD newplace") for n, (_, _, said) in enumerate(SENT.values()) if said]
    assert sorted(incidents(store)) == sorted(held)
    assert [(each["login"], each["rule"]) for each in relay.told] == held


DAY_AND_A_HALF = 36 * HOUR_S
PAST: dict[str, tuple[list[tuple[str, int | None, float]], bool]] = {  # what the table has: address, count, age
    "nothing": ([], False), "less than a day ago": ([(at(1), 1, 23 * HOUR_S)], False),
    "a day ago": ([(at(1), 1, 25 * HOUR_S)], True), "weeks ago": ([(at(1), 1, 29 * DAY_S)], True),
    "a day ago and since then": ([(at(1), 1, 25 * HOUR_S), (at(1), 1, 2 * HOUR_S)], True),
    "too long ago": ([(at(1), 1, 31 * DAY_S)], False), "another place": ([(at(2), 1, 2 * DAY_S)], False),
    "another network of the place": ([("21.255.3.4", 1, 2 * DAY_S)], True),
    "inside IPv6": ([(f"::ffff:{at(1)}", 1, 2 * DAY_S)], True),
    "forgiven an hour ago": ([(at(1), -5, 2 * HOUR_S)], True),
    "before an incident": ([(at(1), 1, 40 * HOUR_S), ("HOLD places", None, DAY_AND_A_HALF)], False),
    "before another one": ([(at(1), 1, 40 * HOUR_S), ("REJECT newplace", None, DAY_AND_A_HALF)], False),
    "a day before an incident": ([(at(1), 1, 61 * HOUR_S), ("HOLD places", None, DAY_AND_A_HALF)], True),
    "of two incidents the first": ([(at(1), 1, 61 * HOUR_S), ("HOLD places", None, 50 * HOUR_S),
                                    ("HOLD places", None, 25 * HOUR_S)], False),
    "before a forgiven incident": ([(at(1), 1, 40 * HOUR_S), ("HOLD places", 0, DAY_AND_A_HALF)], True),
    "before an incident of a quota": ([(at(1), 1, 40 * HOUR_S), ("HOLD overquota", None, DAY_AND_A_HALF)], True),
    "forgiven after an incident": ([(at(1), -1, 30 * HOUR_S), ("HOLD places", None, DAY_AND_A_HALF)], True),
}  # fmt: skip


@on_indexed
def test_a_place_is_known_that_was_used_a_day_to_keep_days_ago_or_forgiven(store: Store, start: StartRelay) -> None:
    """With an incident that nobody has forgiven, only what was used a day before it: not the thief's places."""
    add(store, 2 * DAY_S, (at(1), 1), login="bert")
    for n, (past, _) in enumerate(PAST.values()):
        for address, count, age_s in past:
            add(store, age_s, (address, count), login=f"anna{n}")
        add(store, 50 * MINUTE_S, *[(at(1), 30)] * 4, login=f"anna{n}")
    relay = start()
    for n, (name, (_, is_known)) in enumerate(PAST.items()):
        assert send(relay, at(1), 30, f"anna{n}").answer == (DUNNO if is_known else NEWPLACE), name


@on_indexed
def test_who_was_forgiven_is_not_held_again_from_the_same_places(store: Store, start: StartRelay) -> None:
    """At once, though what is known is remembered, nor by a sweep; a second wave from yet other places is."""
    at_home(store)
    relay = start()
    wave = [PLACES, *[DUNNO] * 5][::-1]
    assert [send(relay, at(n)).answer for n in range(6)] == wave
    store.forgive("anna")
    assert send(relay, HOME, 50) == (DUNNO, [])
    assert [send(relay, at(n)).answer for n in range(6)] == [DUNNO] * 6
    assert relay.sweep() == []
    assert [send(relay, at(n)).answer for n in range(10, 16)] == wave
    assert [each["rule"] for each in relay.told] == ["HOLD places"] * 2
    assert relay.sweep() == []


@on_each
@pytest.mark.parametrize(("age_s", "is_judged"), [
    (71 * HOUR_S, False), (73 * HOUR_S, True), (29 * DAY_S, True), (31 * DAY_S, False), (20_000 * DAY_S, False),
])  # fmt: skip
def test_nothing_is_judged_before_the_third_day(store: Store, start: StartRelay, age_s: float, is_judged: bool) -> None:
    """Of the memory of the table: on its first day everything is new; one stray row of 1970 says nothing."""
    store.clear()
    add(store, age_s, ("192.0.2.1", 1), login="bert")
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    relay = start(finds=["Held by the sweep: anna, places (6>5)"] * is_judged)
    add(store, MINUTE_S, *[(at(1), 30)] * 5, login="dora")
    assert send(relay, at(1), login="dora").answer == (NEWPLACE if is_judged else DUNNO)
    store.clear()  # and with it the memory, though the daemon runs on
    add(store, MINUTE_S, *[(at(n), 30) for n in range(8)], login="carl")
    assert relay.sweep() == []
    assert send(relay, at(9), login="carl").answer == DUNNO


@on_stores("SQLite", "schema.sql", "go-policyd")
@pytest.mark.parametrize(("kind", "lines", "answer", "word"), [
    ("HOLD places", [YES], PLACES, "DEFERRING places"), ("HOLD newplace", [NO], DUNNO, ""),
    ("HOLD newplace", [YES], NEWPLACE, "DEFERRING newplace"),
    ("REJECT places", [YES], PLACES, "DEFERRING places"), ("HOLD overquota", [YES], DUNNO, ""),
    ("HOLD places", [AUDIT], DUNNO, "would HOLD places"),
    ("HOLD places", [YES, "mode=audit"], DUNNO, "would HOLD places"),
    ("HOLD blocked", [AUDIT, "mode=audit", "quota=anna:unlimited"], "HOLD blocked", "DEFERRING blocked"),
])  # fmt: skip
def test_an_incident_of_another_relay_holds_here_for_24_h_as_our_own_would(
    store: Store, logged: KeptLog, kind: str, lines: list[str], answer: str, word: str
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
@pytest.mark.parametrize("lines", [[AUDIT], [YES, "mode=audit"]])
def test_an_audit_only_says_what_would_be_held(store: Store, start: StartRelay, lines: list[str]) -> None:
    """The sweep once a login and day; quotas hold meanwhile, unless all is an audit."""
    at_home(store)
    for n in range(16):
        add(store, (31 + 60 * n) * MINUTE_S, (at(n), 1), login="dora")
    found = "would HOLD places (16>15) for user dora, found by the sweep"
    relay = start(*lines, "defaultquota=200", finds=[found])
    assert [send(relay, at(n)) for n in range(5)] == [(DUNNO, [])] * 5
    assert send(relay, at(5)) == (DUNNO, [line("would HOLD places (6>5)", at(5))])
    assert send(relay, HOME) == (DUNNO, [])
    assert relay.sweep(2 * HOUR_S) == ["would HOLD places (6>5) for user anna, found by the sweep"]
    assert relay.sweep(2 * HOUR_S) == []
    assert (relay.told, incidents(store)) == ([], [])
    assert sorted(relay.sweep(DAY_S)) == [found, "would HOLD places (6>5) for user anna, found by the sweep"]
    assert send(relay, HOME, 200).answer == (DUNNO if "mode=audit" in lines else HOLD)
    assert len(relay.told) == len(incidents(store)) == (0 if "mode=audit" in lines else 1)


@on_stores("SQLite")
@pytest.mark.parametrize("setting", [AUDIT, "hourquota=20"])
def test_who_is_not_held_for_a_place_has_his_history_read_once(
    store: Store, start: StartRelay, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """And not with each message: it may be long, and all others wait meanwhile."""
    at_home(store)
    relay, asked, ask = start(setting, repository=store.repository), [], store.repository.ask
    monkeypatch.setattr(store.repository, "ask", lambda *words: asked.append(words[0]) or ask(*words))
    for n in range(12):
        send(relay, at(n))
    assert asked.count(Watch.HISTORY) == 1


@on_stores("SQLite")
def test_in_an_outage_only_known_incidents_hold_on(store: SQLiteStore, start: StartRelay) -> None:
    """Quotas work; afterwards all logins are swept, not only those that send then."""
    at_home(store)
    at_home(store, "dora")
    store.add([incident("carl", "HOLD places")], HOUR_S)
    repository = BreakableRepository(store._path)
    relay = start("defaultquota=200", repository=repository)
    assert [send(relay, HOME, login=login).answer for login in ("carl", "dora")] == [PLACES, DUNNO]
    repository.broken = repository.AWAY
    for login, n in (("dora", 0), ("carl", 0), *(("anna", n) for n in range(10))):
        assert relay.ask(login, client_address=at(n)).answer == (PLACES if login == "carl" else DUNNO)
    assert relay.recorder.down_s() is not None
    assert relay.sweep() == []
    assert relay.ask("anna", client_address=HOME, recipient_count=200).answer == HOLD
    repository.broken = frozenset()
    relay.recorder.look_for_store()
    assert relay.sweep() == []  # not before it has what waits in the journal
    for _ in range(3):
        relay.recorder.turn()
    assert (relay.recorder.down_s(), relay.recorder.journal.waiting) == (None, 0)
    store.add([("late", "", at(n), 1) for n in range(16)], 2 * HOUR_S)
    found = ["anna, places (10>5)", "late, places (16>15)"]
    assert sorted(relay.sweep()) == [f"Held by the sweep: {each}" for each in found]
    assert relay.ask("late").answer == PLACES
    store.forgive("anna")
    assert send(relay, HOME) == (DUNNO, [])
    repository.broken = repository.AWAY  # once more: what was in the journal was forgiven
    assert relay.ask("anna", client_address=HOME, recipient_count=200).answer == HOLD
    assert (relay.told[-1]["login"], relay.told[-1]["rule"]) == ("anna", "HOLD overquota")


@on_stores("SQLite")
def test_without_a_journal_thieves_are_found_all_the_same(store: Store, start: StartRelay) -> None:
    """Its disk may be broken while the database is well."""
    relay = start()
    journal = relay.recorder.journal
    Path(journal.path).unlink()
    Path(journal.path).mkdir()
    journal.look()
    assert journal.trouble
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    assert relay.sweep() == ["Held by the sweep: anna, places (6>5)"]


@on_stores("SQLite")
def test_a_sweep_that_fails_is_one_warning(store: Store, start: StartRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again each minute."""

    def refuse(*_: object) -> None:
        raise RepositoryUnavailable("as for a wrong right")

    relay = start(repository=store.repository)
    add(store, 10 * MINUTE_S, *((at(n), 1) for n in range(6)))
    for found in (["Held by the sweep: anna, places (6>5)"], []):
        with monkeypatch.context() as patch:
            patch.setattr(store.repository, "ask", refuse)
            expected = ["no sweep for early signs, trying each minute: as for a wrong right"]
            assert [relay.sweep(5 * MINUTE_S) for _ in range(3)] == [expected, [], []]
        assert relay.sweep() == found


@on_stores("go-policyd")
def test_without_the_index_there_is_no_sweep_but_a_warning(store: Store, logged: KeptLog) -> None:
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    (warning,) = Relay(store, logged, "keep_days=30", YES).sweep()
    assert re.search("index.*policyd --init-db", warning)
    assert incidents(store) == []


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


def by_the_book(past: list[Past], quota: int, most: int) -> tuple[str, str]:
    """Return what is decided of the last message of a past, in the path, and what the sweep says before it."""
    at = [None if each.what.startswith("192.0.2.") else place_of(each.what) for each in past]  # that network is trusted
    cut = max((each.age_s for each in past if each.what in ("HOLD places", "HOLD newplace") and each.count is None
               and each.age_s < 30 * DAY_S), default=0)  # fmt: skip
    known = {place for place, each in zip(at, past) if each.count is not None and each.age_s < 30 * DAY_S
             and (each.count < 0 or each.age_s >= DAY_S + cut)} | {None}  # fmt: skip
    sent = [(place, each) for place, each in zip(at, past) if (each.count or 0) > 0]
    new = [(place, each) for place, each in sent if place not in known]

    def recipients(of: list[tuple[str | None, Past]]) -> int:
        return sum(each.count or 0 for _, each in of if each.age_s < HOUR_S)

    def too_many(long_s: float) -> str:
        few, many = (len({place for place, each in new if each.age_s < time_s}) for time_s in (HOUR_S / 2, long_s))
        figures = [(few, most), (many, 3 * most)] if most else []
        return next((f"places ({found}>{limit})" for found, limit in figures if found > limit), "")

    if recipients(sent) < min(40, quota) or at[-1] in known:
        return "", too_many(DAY_S)
    is_much = sum(each.age_s < HOUR_S for _, each in new) >= 5 and recipients(new) >= quota
    return too_many(HOUR_S) or f"newplace ({recipients(new)}>{quota})" * is_much, too_many(DAY_S)


@on_each
@settings(max_examples=15)
@given(past=pasts, client=st.sampled_from(CLIENTS), quota=st.sampled_from([10, 30, 60]), max_places=st.integers(0, 4))
@example([Past(at(n), 20, 31 * MINUTE_S) for n in range(4)], at(4), 60, 1)
@example([Past(at(1), 1, 31 * MINUTE_S), *[Past(at(n), 10 if n else 6, 29 * MINUTE_S) for n in range(4)]], at(4), 60, 4)
@example([Past(at(n), 10, 29 * MINUTE_S) for n in range(4)], at(4), 60, 0)
@example([Past(at(1), 2, 29 * MINUTE_S)] * 4, at(1), 10, 4)  # a low quota is looked at from its first recipient on
@example([*[Past(at(1), 20, 60)] * 4, Past(at(1), -3, 31 * DAY_S)], at(1), 60, 4)
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
    lines = (f"new_place_quota={quota}", f"max_places={max_places}", "trusted_network=192.0.2.0/24", "keep_days=30")
    relay = Relay(store, logged, AUDIT, *lines)
    relay.sweep()  # it learns that the table remembers enough
    said, held = by_the_book([*past, Past(client, 3, 0)], quota, max_places)
    outcome = send(relay, client, 3)
    if any(each.count is None and each.age_s < DAY_S and each.what != "HOLD overquota" for each in past):
        assert "since" in outcome.lines[0]
        held = ""
    else:
        assert outcome.lines == ([line(f"would HOLD {said}", client)] if said else [])
    assert Relay(store, logged, YES, *lines).sweep() == ([f"Held by the sweep: anna, {held}"] if held else [])


@on_each
def test_the_daemon_sweeps_by_itself(store: Store, policyd: Start) -> None:
    """At its start already; a relay that was started together with others a little later."""
    add(store, 4 * DAY_S, ("192.0.2.1", 1), login="bert")
    add(store, MINUTE_S, *((at(n), 1) for n in range(6)))
    daemon = policyd(early_signs="yes", keep_days=30, **store.settings)
    assert daemon.wait_for_log("Held by the sweep").text == "Held by the sweep: anna, places (6>5)"
    assert daemon.ask(sasl_username="anna") == PLACES


@on_each
def test_the_bulk_of_one_login_is_known_and_not_that_of_its_domain(store: Store, start: StartRelay) -> None:
    """Neither quota=@domain nor a whitelist entry for another login spares anybody; an entry for the domain does."""
    logins = ("anna@a.example", "anna@b.example", "anna@c.example")
    for login in logins:
        add(store, 5 * DAY_S, (HOME, 1), login=login)
    relay = start("strip_domain=no", "quota=@a.example:500", "whitelist=@b.example", "whitelist_hours=0-0",
                  "whitelist=bert@c.example")  # fmt: skip
    answers = {login: [send(relay, at(1), 30, login=login).answer for _ in range(6)] for login in logins}
    held = [DUNNO] * 4 + [NEWPLACE] * 2
    assert answers == {"anna@a.example": held, "anna@b.example": [DUNNO] * 6, "anna@c.example": held}


@on_each
def test_a_message_from_home_hides_none_of_the_same_batch(store: Store, start: StartRelay) -> None:
    at_home(store)
    relay = start()
    add(store, MINUTE_S, *((at(place), 10) for place in range(6)))
    outcomes = relay.ask_at_once([
        {"sasl_username": "anna", "client_address": address, "sender": address} for address in (HOME, at(7))
    ])  # fmt: skip
    assert [outcome.answer for outcome in outcomes] == [DUNNO, PLACES]
