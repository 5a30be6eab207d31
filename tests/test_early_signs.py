"""What gives a thief away before the quota does: many networks that use a login at once, or an hour that is busy."""

from __future__ import annotations

import queue
import re
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recorders import AWAY, PATIENCE_S, BreakableRepository, recording
from servers import Database, MariaDB, Policyd
from stores import A_DAY_AND_A_MINUTE, A_DAY_LESS_A_MINUTE, MariaStore, SQLiteStore, Store, event, global_variable, soon
from test_exactness import CONNECTIONS, send_at_once
from test_outage import BACK_S, ENDS
from test_quotas import STORES, Outcome, ask, settings_to

from policyd import (
    DUNNO,
    HOLD,
    HOLD_BLACKLISTED,
    HOLD_HOUR,
    HOLD_NETWORKS,
    HOUR_S,
    NEVER,
    NOBODY,
    REJECT,
    Event,
    Recorder,
    Repository,
    Settings,
    Usage,
    decide,
    in_one_network,
    judge,
    network_of,
    networks_of,
    scope_of,
)

Start = Callable[..., Policyd]

A_MINUTE = 60
AN_HOUR_LESS_A_MINUTE = HOUR_S - A_MINUTE
AN_HOUR_AND_A_MINUTE = HOUR_S + A_MINUTE


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store; the test runs once with each kind."""
    if request.param == "embedded":
        return SQLiteStore(tmp_path / "events.sqlite3")
    database: Database = request.getfixturevalue("database" if request.param == "schema.sql" else "old_database")
    if request.param == "go-policyd with an index":
        database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    return MariaStore(database)


def address(network: int, host: int = 1) -> str:
    """Return an address in one of many networks."""
    return f"10.{network // 256}.{network % 256}.{host}"


def outcome(answer: str, rule: str, message: str, reached: int) -> Outcome:
    """Return what policyd answers and logs about a message: LOGIN/ADDRESS/RECIPIENTS."""
    login, client_address, recipients = message.split("/")
    lines = [f"Updating db: {login}/alice@example.org/{client_address}/{recipients}/{reached}"]
    if rule:
        lines.append(f"{rule} for user {login} using alice@example.org from ip [{client_address}], queue_id=4Xk1Zt")
    return Outcome(answer, lines)


def send(daemon: Policyd, message: str) -> Outcome:
    """Ask about a message: LOGIN/ADDRESS/RECIPIENTS."""
    login, client_address, recipients = message.split("/")
    return ask(daemon, login, client_address=client_address, recipient_count=recipients)


def read(tmp_path: Path, *lines: str) -> Settings:
    """Read settings from a file, as the daemon does."""
    file = tmp_path / "policyd.cfg"
    file.write_text("".join(f"{line}\n" for line in lines))
    return Settings.from_file(str(file))


def judged(repository: Repository, batch: Sequence[Event], settings: Settings) -> list[tuple[str, str]]:
    """Return what is decided about events that have been inserted as one batch, and by which rule."""
    usages = repository.sum_recipients(batch, scope_of(settings), soon())
    return [judge(usage, settings.limits_of(each.sasl_username), settings) for each, usage in zip(batch, usages)]


def inserted(repository: Repository, batch: Sequence[Event], settings: Settings) -> list[tuple[str, str]]:
    """Insert a batch, and return what is decided about it."""
    assert repository.insert(batch, soon()) == set()
    return judged(repository, batch, settings)


# ---- many networks ----------------------------------------------------------------------------------


def test_one_network_more_than_max_networks_is_held(store: Store, tmp_path: Path, policyd: Start) -> None:
    """On every table, with the words that log parsers match; whichever of its networks it comes from next."""
    daemon = policyd(max_networks=3, **settings_to(store, tmp_path))
    for reached, network in enumerate([1, 2, 3, 2, 1], start=1):
        message = f"anna/{address(network)}/1"
        assert send(daemon, message) == outcome(DUNNO, "", message, reached)
    for reached, (network, networks) in enumerate([(4, 4), (1, 4), (5, 5)], start=6):
        message = f"anna/{address(network)}/1"
        assert send(daemon, message) == outcome(HOLD_NETWORKS, f"DEFERRING fanout ({networks}>3)", message, reached)
    message = f"bert/{address(6)}/7"
    assert send(daemon, message) == outcome(DUNNO, "", message, 7)


def test_without_max_networks_and_hourquota_there_may_be_any_number(policyd: Start) -> None:
    daemon = policyd(networks_window="24h", trusted_network="192.0.2.0/24")
    answers = {daemon.ask(client_address=address(n), recipient_count=40) for n in range(37)}
    assert answers == {DUNNO}


@pytest.mark.parametrize("more", [0, 1])
def test_networks_that_come_in_one_batch_count_for_all_of_it(store: Store, more: int) -> None:
    """They came in the same moment: none of them was the first."""
    settings = Settings(max_networks=3)
    batch = [event("anna", address=address(n)) for n in range(3 + more)] + [event("bert", address=address(9))]
    expected = [(HOLD_NETWORKS, "fanout (4>3)") if more else (DUNNO, "")] * (3 + more)
    assert inserted(store.repository, batch, settings) == [*expected, (DUNNO, "")]


@pytest.mark.parametrize("store", STORES[1:], indirect=True)
def test_a_network_more_than_max_networks_is_held_by_whichever_relay_it_comes_to(
    store: MariaStore, policyd: Start
) -> None:
    relays = [policyd(max_networks=4, **store.database.settings()) for _ in range(2)]
    for n in range(4):
        message = f"anna/{address(n)}/1"
        assert send(relays[n % 2], message) == outcome(DUNNO, "", message, n + 1)
    for n in (4, 5):
        message = f"anna/{address(4)}/1"
        rule = "DEFERRING fanout (5>4)"
        assert send(relays[n % 2], message) == outcome(HOLD_NETWORKS, rule, message, n + 1)


@pytest.mark.parametrize("table", ["database", "old_database"])
@pytest.mark.mariadb
def test_relays_that_are_asked_at_once_let_no_more_networks_through(
    policyd: Start, request: pytest.FixtureRequest, table: str
) -> None:
    database: Database = request.getfixturevalue(table)
    relays = [policyd(max_networks=40, hourquota=200, **database.settings()) for _ in range(2)]
    anna = [{"client_address": address(n), "sasl_username": "anna"} for n in range(200)]
    bert = {"client_address": address(1), "sasl_username": "bert"}
    answers = Counter(send_at_once(relays, [message for each in anna for message in (each, bert, bert)]))
    assert answers[DUNNO] + answers[HOLD_NETWORKS] + answers[HOLD_HOUR] == 600
    # A message knows of all that were committed before it, and may know of one more on each of the connections.
    assert 40 + 199 - 2 * CONNECTIONS <= answers[DUNNO] <= 40 + 199
    for relay in relays:
        assert relay.ask(sasl_username="anna", client_address=address(1)) in (HOLD_NETWORKS, HOLD_HOUR)
        assert relay.ask(sasl_username="bert", client_address=address(1)) == HOLD_HOUR


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("1h", 3600), ("24h", 86_400)])
def test_networks_of_before_the_window_do_not_count(store: Store, tmp_path: Path, text: str, seconds: int) -> None:
    settings = read(tmp_path, "max_networks=3", f"networks_window={text}")
    store.add([("anna", "", address(n), 1) for n in range(10, 20)], age_s=seconds + A_MINUTE)
    store.add([("anna", "", address(n), 1) for n in range(2)], age_s=seconds - A_MINUTE)
    for network, expected in [(2, (DUNNO, "")), (1, (DUNNO, "")), (3, (HOLD_NETWORKS, "fanout (4>3)"))]:
        assert inserted(store.repository, [event("anna", address=address(network))], settings) == [expected]


def test_who_was_held_for_networks_is_free_when_they_are_of_before_the_window_and_held_again(store: Store) -> None:
    settings = Settings(max_networks=2)
    batch = [event("anna", address=address(n)) for n in range(3)]
    store.add(batch, age_s=AN_HOUR_LESS_A_MINUTE)
    assert inserted(store.repository, batch[:1], settings) == [(HOLD_NETWORKS, "fanout (3>2)")]
    store.clear()
    store.add(batch, age_s=AN_HOUR_AND_A_MINUTE)
    assert inserted(store.repository, batch[:1], settings) == [(DUNNO, "")]
    assert inserted(store.repository, batch[1:2], settings) == [(DUNNO, "")]
    assert inserted(store.repository, batch[2:], settings) == [(HOLD_NETWORKS, "fanout (3>2)")]


SAME_NETWORK = [
    ["192.0.2.0", "192.0.2.1", "192.0.2.10", "192.0.2.255"],
    ["2001:db8:1::1", "2001:db8:1:2::", "2001:db8:1:ffff:ffff:ffff:ffff:ffff", "2001:db8:1:0:1::1"],
    ["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:ffff:1:2:3:4", "2001:db8::"],
    ["::1", "::", "::ffff:192.0.2.1", "::ffff:198.51.100.1"],
    ["2001::1", "2001:0:0:1::", "2001::1:0:0:1"],
]
OTHER_NETWORKS = ["192.0.20.1", "192.0.3.1", "192.1.2.1", "19.0.2.1", "2001:db8:10::1", "2001:db8:1f::1", "2001:db9::"]
NO_NETWORK = ["unknown", "", "localhost", "192.0.2", "192.0.2.256", "192.0.2.1.5", "2001:db8:1", ":", "::1::", "a,b"]


@pytest.mark.parametrize("addresses", SAME_NETWORK, ids=lambda addresses: addresses[0])
def test_a_network_is_a_24_of_ipv4_and_a_48_of_ipv6(store: Store, addresses: list[str]) -> None:
    """Whichever of its addresses come first, and what is no address is in none."""
    settings = Settings(max_networks=1)
    for each in (addresses, addresses[::-1]):
        store.clear()
        for client_address in [*each, *NO_NETWORK]:
            assert inserted(store.repository, [event("anna", address=client_address)], settings) == [(DUNNO, "")]
        for n, other in enumerate(OTHER_NETWORKS, start=2):
            assert inserted(store.repository, [event("anna", address=other)], settings) == [
                (HOLD_NETWORKS, f"fanout ({n}>1)")
            ]


@pytest.mark.parametrize("recipients", [0, None])
def test_messages_that_were_forgiven_do_not_count(store: Store, recipients: int | None) -> None:
    settings = Settings(max_networks=2, hourquota=5)
    store.add([("anna", "", address(n), recipients) for n in range(9)], age_s=A_MINUTE)
    store.add([("anna", "", address(20), 4)], age_s=AN_HOUR_AND_A_MINUTE)
    for network, expected in [(30, (DUNNO, "")), (31, (DUNNO, "")), (32, (HOLD_NETWORKS, "fanout (3>2)"))]:
        assert inserted(store.repository, [event("anna", address=address(network))], settings) == [expected]


@pytest.mark.mariadb
def test_a_login_of_which_only_rows_without_a_count_are_found_is_asked_for_once(database: Database) -> None:
    """As on a node of a cluster that has not got the row yet."""
    store = MariaStore(database)
    store.add([("anna", "", address(1), None), ("anna", "", address(2), None)], age_s=A_MINUTE)
    for _ in range(2):
        usage = store.repository.sum_recipients([event("anna", 0)], scope_of(Settings(max_networks=1)), soon())
        assert usage == [Usage(0)]


@pytest.mark.parametrize(
    ("trusted", "clients"),
    [
        (["192.0.2.0/24"], ["192.0.2.1", "192.0.2.255"]),
        (["192.0.2.16/28"], ["192.0.2.16", "192.0.2.31"]),
        (["192.0.2.7"], ["192.0.2.7"]),
        (["192.0.0.0/16", "2001:db8::/32"], ["192.0.2.1", "192.0.3.1", "2001:db8:7::1", "2001:db8::1"]),
        (["2001:db8:1:2::/64"], ["2001:db8:1:2::1", "2001:db8:1:2:3:4:5:6"]),
        (["2001:DB8::7"], ["2001:db8::7"]),
        (["0.0.0.0/1"], ["10.0.0.1", "126.0.0.1"]),
    ],
    ids=str,
)
def test_trusted_networks_do_not_count(tmp_path: Path, trusted: list[str], clients: list[str]) -> None:
    """Be they wider than a network or narrower; the rest of it counts."""
    store = SQLiteStore(tmp_path / "events.sqlite3")
    settings = read(tmp_path, "max_networks=2", *(f"trusted_network={each}" for each in trusted))
    free = ["198.51.100.1", "203.0.113.1", "2001:db7::1"]
    for client_address in [*clients, *free[:2], *clients]:
        assert inserted(store.repository, [event("anna", address=client_address)], settings) == [(DUNNO, "")]
    assert inserted(store.repository, [event("anna", address=free[2])], settings) == [(HOLD_NETWORKS, "fanout (3>2)")]
    # Held is the login: also what it sends from there.
    assert inserted(store.repository, [event("anna", address=clients[0])], settings)[0][0] == HOLD_NETWORKS


def test_of_a_network_that_is_trusted_in_part_the_rest_counts(store: Store, tmp_path: Path) -> None:
    settings = read(tmp_path, "max_networks=1", "trusted_network=192.0.2.16/28")
    for client_address, expected in [
        ("192.0.2.17", (DUNNO, "")),
        ("198.51.100.1", (DUNNO, "")),
        ("192.0.2.18", (DUNNO, "")),
        ("192.0.2.32", (HOLD_NETWORKS, "fanout (2>1)")),
    ]:
        assert inserted(store.repository, [event("anna", address=client_address)], settings) == [expected]


# ---- a busy hour ------------------------------------------------------------------------------------


def test_reaching_the_hour_quota_is_held(store: Store, tmp_path: Path, policyd: Start) -> None:
    """On every table, with the words that log parsers match; what is older than an hour does not count."""
    store.add([("anna", "", "", 40)], age_s=AN_HOUR_AND_A_MINUTE)
    store.add([("anna", "", "", 3)], age_s=AN_HOUR_LESS_A_MINUTE)
    daemon = policyd(hourquota=8, **settings_to(store, tmp_path))
    for recipients, reached, answer, rule in [
        (4, 47, DUNNO, ""),
        (1, 48, HOLD_HOUR, "DEFERRING hourquota (8>8)"),
        (9, 57, HOLD_HOUR, "DEFERRING hourquota (17>8)"),
    ]:
        message = f"anna/192.0.2.1/{recipients}"
        assert send(daemon, message) == outcome(answer, rule, message, reached)
    assert send(daemon, "bert/192.0.2.1/7") == outcome(DUNNO, "", "bert/192.0.2.1/7", 7)
    assert send(daemon, "bert/192.0.2.1/1") == outcome(
        HOLD_HOUR, "DEFERRING hourquota (8>8)", "bert/192.0.2.1/1", 8
    )


def test_who_was_held_for_the_hour_is_free_when_it_is_over_and_held_again(store: Store) -> None:
    settings = Settings(hourquota=10)
    store.add([("anna", "", "", 9)], age_s=AN_HOUR_LESS_A_MINUTE)
    assert inserted(store.repository, [event("anna")], settings) == [(HOLD_HOUR, "hourquota (10>10)")]
    store.clear()
    store.add([("anna", "", "", 10)], age_s=AN_HOUR_AND_A_MINUTE)
    assert inserted(store.repository, [event("anna", 9)], settings) == [(DUNNO, "")]
    assert inserted(store.repository, [event("anna", 1)], settings) == [(HOLD_HOUR, "hourquota (10>10)")]


def test_the_hour_of_a_batch_runs_up_in_order_of_arrival(store: Store) -> None:
    store.add([("anna", "", "", 100)], age_s=AN_HOUR_AND_A_MINUTE)
    batch = [event("anna", 3), event("bert", 4), event("anna", 2), event("anna", 1), event("bert", 1)]
    assert inserted(store.repository, batch, Settings(hourquota=5)) == [
        (DUNNO, ""), (DUNNO, ""), (HOLD_HOUR, "hourquota (5>5)"), (HOLD_HOUR, "hourquota (6>5)"),
        (HOLD_HOUR, "hourquota (5>5)"),
    ]


OWN = [
    "quota=busy:1000:50", "quota=few:1000:2", "quota=none:1000:0", "quota=plain:1000", "quota=robot:unlimited",
    "quota=meter:unlimited:20", "quota=trainee:0:1",
]


@pytest.mark.parametrize(
    ("login", "hour"),
    [
        ("busy", 50), ("few", 2), ("none", None), ("plain", 10), ("robot", None), ("meter", 20), ("anna", 10),
    ],
)
def test_a_login_may_have_an_hour_quota_of_its_own(tmp_path: Path, login: str, hour: int | None) -> None:
    """A quota of its own leaves it that of all; `unlimited` is so in an hour too, unless it says otherwise."""
    store = SQLiteStore(tmp_path / "events.sqlite3")
    settings = read(tmp_path, "hourquota=10", "defaultquota=1000", *OWN)
    store.add([(login, "", "", 100)], age_s=AN_HOUR_AND_A_MINUTE)
    assert inserted(store.repository, [event(login, (hour or 890) - 1)], settings) == [(DUNNO, "")]
    expected = (HOLD_HOUR, f"hourquota ({hour}>{hour})") if hour else (DUNNO, "")
    assert inserted(store.repository, [event(login)], settings) == [expected]


def test_an_hour_quota_of_its_own_needs_none_for_all(policyd: Start) -> None:
    daemon = policyd(quota="anna:1000:5")
    assert send(daemon, "bert/192.0.2.1/100").answer == DUNNO
    assert send(daemon, "anna/192.0.2.1/4").answer == DUNNO
    assert send(daemon, "anna/192.0.2.1/1") == outcome(
        HOLD_HOUR, "DEFERRING hourquota (5>5)", "anna/192.0.2.1/1", 5
    )


# ---- one rule after the other -----------------------------------------------------------------------


def test_the_hardest_answer_is_given(policyd: Start) -> None:
    daemon = policyd(
        defaultquota=20, hourquota=10, max_networks=2, blacklist="phished", always_allow="helpdesk@example.org"
    )
    for network, recipients, reached, answer, rule in [
        (1, 1, 1, DUNNO, ""),
        (2, 1, 2, DUNNO, ""),
        (3, 7, 9, HOLD_NETWORKS, "DEFERRING fanout (3>2)"),
        (3, 1, 10, HOLD_HOUR, "DEFERRING hourquota (10>10)"),
        (3, 9, 19, HOLD_HOUR, "DEFERRING hourquota (19>10)"),
        (3, 1, 20, HOLD, "DEFERRING overquota (20>20)"),
        (3, 20, 40, REJECT, "REJECTING overquota (40>2x20)"),
    ]:
        message = f"anna/{address(network)}/{recipients}"
        assert send(daemon, message) == outcome(answer, rule, message, reached)
    assert send(daemon, f"phished/{address(1)}/1").answer == HOLD_BLACKLISTED
    assert ask(daemon, "anna", recipient="helpdesk@example.org").answer == DUNNO


@given(
    sums=st.tuples(*[st.integers(0, 9)] * 3), limits=st.tuples(*[st.integers(1, 9) | st.just(NEVER)] * 4)
)
def test_decisions_never_soften_as_anything_grows(
    sums: tuple[int, int, int], limits: tuple[int, int, int, int]
) -> None:
    day, hour, networks = sums
    hold_at, reject_at, hour_quota, max_networks = limits

    def decision(day: int, hour: int, networks: int) -> int:
        answer = decide(day, hold_at, reject_at, hour_quota, hour, networks, max_networks)
        return [DUNNO, HOLD_NETWORKS, HOLD_HOUR, HOLD, REJECT].index(answer)

    now = decision(day, hour, networks)
    assert now <= min(decision(day + 1, hour, networks), decision(day, hour + 1, networks),
                      decision(day, hour, networks + 1))


def test_an_audit_lets_early_signs_pass_and_logs_them(policyd: Start) -> None:
    daemon = policyd(mode="audit", hourquota=10, max_networks=1, hold_message="ask us")
    assert send(daemon, "anna/10.0.1.1/1") == outcome(DUNNO, "", "anna/10.0.1.1/1", 1)
    assert send(daemon, "anna/10.0.2.1/1") == outcome(DUNNO, "would HOLD fanout (2>1)", "anna/10.0.2.1/1", 2)
    assert send(daemon, "anna/10.0.2.1/8") == outcome(
        DUNNO, "would HOLD hourquota (10>10)", "anna/10.0.2.1/8", 10
    )


def test_the_message_of_the_site_is_told_with_an_early_sign(policyd: Start) -> None:
    daemon = policyd(hourquota=10, max_networks=1, hold_message="ask us", reject_message="too late")
    assert send(daemon, "anna/10.0.1.1/1").answer == DUNNO
    assert send(daemon, "anna/10.0.2.1/1").answer == f"{HOLD_NETWORKS}; ask us"
    assert send(daemon, "bert/10.0.2.1/10").answer == f"{HOLD_HOUR}; ask us"


# ---- long histories ---------------------------------------------------------------------------------


def test_of_a_long_history_the_early_signs_are_seen(store: Store, tmp_path: Path) -> None:
    """Of logins that are never refused for their sum, and have more rows than decide for others."""
    own = ["quota=robot:unlimited", "quota=meter:unlimited:50"]
    settings = read(tmp_path, "defaultquota=20", "max_networks=3", "hourquota=5", *own)
    assert scope_of(settings).of("robot").rows < 2000
    for login in ("robot", "meter"):
        store.add([(login, "", address(n % 100), 1) for n in range(2000)], age_s=2 * HOUR_S)
        store.add([(login, "", address(n % 3), 1) for n in range(48)], age_s=A_MINUTE)
    for n in range(4):  # that a history is long is known from the first time on
        batch = [event("robot", address=address(1), sender=f"{n}"), event("anna", sender=f"{n}")]
        assert inserted(store.repository, batch, settings) == [(DUNNO, "")] * 2
    for reached in (49, 50, 51):
        decision = (DUNNO, "") if reached < 50 else (HOLD_HOUR, f"hourquota ({reached}>50)")
        assert inserted(store.repository, [event("meter", address=address(2), sender=f"{reached}")], settings) == [
            decision
        ]
    for n in (4, 5):
        batch = [event("robot", address=address(n), sender="x"), event("bert", sender=f"{n}")]
        assert inserted(store.repository, batch, settings) == [(HOLD_NETWORKS, f"fanout ({n}>3)"), (DUNNO, "")]


def test_a_long_history_in_one_network_is_summed_no_further_than_it_matters(store: Store) -> None:
    settings = Settings(defaultquota=20, max_networks=1, hourquota=10)
    store.add([("anna", "", address(1, n % 250), 1) for n in range(2000)], age_s=A_MINUTE)
    for _ in range(3):
        decision, rule = inserted(store.repository, [event("anna", address=address(1))], settings)[0]
        assert decision == REJECT
        assert re.fullmatch(r"overquota \([0-9]+>2x20\)", rule)


def test_many_networks_are_counted_beside_a_login_with_one(store: Store) -> None:
    """One statement asks closely for the one and briefly for the other; nothing of a long list is cut off."""
    settings = Settings(max_networks=5)
    store.add([("anna", "", f"2001:db8:{n:x}:1111:2222:3333:4444:5555", 1) for n in range(700)], age_s=A_MINUTE)
    for n in range(3):
        batch = [event("anna", address="2001:db8::1", sender=f"{n}"), event("bert", sender=f"{n}")]
        assert inserted(store.repository, batch, settings) == [(HOLD_NETWORKS, "fanout (700>5)"), (DUNNO, "")]


# ---- against a plain model --------------------------------------------------------------------------

CLIENTS = [
    "192.0.2.1", "192.0.2.2", "192.0.2.200", "192.0.20.1", "192.0.21.1", "192.0.3.1", "198.51.100.1", "unknown", "",
    "2001:db8::1", "2001:db8:0:1::1", "2001:db8:1::1", "2001:db8:1:2::1", "2001:db8:10::1", "2001:db8:1f::", "2001::1",
    "::1", "192.0.2", "x", "2001:db8:1", "203.0.113.7", "203.0.113.8",
]
LOGINS = ["anna", "bert", "own", "free"]
AGES = [A_MINUTE, 9 * 60, 11 * 60, AN_HOUR_LESS_A_MINUTE, AN_HOUR_AND_A_MINUTE, A_DAY_LESS_A_MINUTE, A_DAY_AND_A_MINUTE]
TRUSTED = [["192.0.2.0/24"], ["192.0.2.2"], ["203.0.113.8/29", "2001:db8:1::/48"], ["2001:db8::/33"]]


class Sent(NamedTuple):
    """A message that somebody has sent."""

    login: str
    client_address: str
    recipients: int | None


def sent(recipients: st.SearchStrategy[int | None]) -> st.SearchStrategy[Sent]:
    return st.builds(Sent, st.sampled_from(LOGINS), st.sampled_from(CLIENTS), recipients)


past = st.lists(st.tuples(sent(st.sampled_from([None, 0, 1, 1, 2, 5])), st.sampled_from(AGES)), max_size=14)
present = st.lists(st.lists(sent(st.integers(1, 4)), min_size=1, max_size=8), min_size=1, max_size=3)


class Rules(NamedTuple):
    """Settings, and the same for the model."""

    defaultquota: int
    hourquota: int
    max_networks: int
    window: int  # minutes
    trusted: list[str]
    own_hour: int | None

    def lines(self) -> list[str]:
        """Return them as a file has them."""
        own = f"quota=own:{2 * self.defaultquota}" + ("" if self.own_hour is None else f":{self.own_hour}")
        return [
            f"defaultquota={self.defaultquota}", f"hourquota={self.hourquota}", f"max_networks={self.max_networks}",
            f"networks_window={self.window}m", own, "quota=free:unlimited",
            *(f"trusted_network={each}" for each in self.trusted),
        ]


rules = st.builds(
    Rules,
    st.integers(4, 25), st.integers(0, 12), st.integers(0, 4), st.sampled_from([10, 60, 1440]),
    st.just([]) | st.sampled_from(TRUSTED), st.none() | st.integers(0, 15),
)


def network_bits(client_address: str) -> bytes | None:
    """Return the bits of an address that make its network."""
    for family, size in ((socket.AF_INET, 3), (socket.AF_INET6, 6)):
        try:
            return socket.inet_pton(family, client_address)[:size]
        except OSError:
            pass
    return None


def is_trusted(client_address: str, trusted: list[str]) -> bool:
    """Tell whether the address is in one of these networks."""
    for entry in trusted:
        base, _, prefix = entry.partition("/")
        family = socket.AF_INET6 if ":" in base else socket.AF_INET
        try:
            bits, wanted = socket.inet_pton(family, client_address), socket.inet_pton(family, base)
        except OSError:
            continue
        rest = 8 * len(bits) - int(prefix or 8 * len(bits))
        if int.from_bytes(bits, "big") >> rest == int.from_bytes(wanted, "big") >> rest:
            return True
    return False


def by_the_book(rules: Rules, events: list[tuple[Sent, float]], batch: list[Sent], n: int) -> tuple[str, str]:
    """Return what is decided about the n-th of a batch, after `events` of these ages."""
    login = batch[n].login
    mine = [(each, age) for each, age in events if each.login == login and age < 86_400]
    mine += [(each, 0.0) for each in batch[: n + 1] if each.login == login]
    day = sum(each.recipients or 0 for each, _ in mine)
    hour = sum(each.recipients or 0 for each, age in mine if age < 3600)
    clients = [each.client_address for each, age in mine if age < rules.window * 60 and each.recipients]
    clients += [each.client_address for each in batch if each.login == login]
    networks = len({bits for each in clients if not is_trusted(each, rules.trusted) and (bits := network_bits(each))})
    quota = {"own": 2 * rules.defaultquota, "free": 10**9}.get(login, rules.defaultquota)
    hour_quota = {"own": rules.own_hour, "free": 0}.get(login)
    hour_quota = rules.hourquota if hour_quota is None else hour_quota
    if day >= 2 * quota:
        return REJECT, f"overquota ({day}>2x{quota})"
    if day >= quota:
        return HOLD, f"overquota ({day}>{quota})"
    if hour_quota and hour >= hour_quota:
        return HOLD_HOUR, f"hourquota ({hour}>{hour_quota})"
    if rules.max_networks and networks > rules.max_networks:
        return HOLD_NETWORKS, f"fanout ({networks}>{rules.max_networks})"
    return DUNNO, ""


@hypothesis_settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rules=rules, history=past, batches=present)
@example(
    Rules(1000, 0, 1, 10, ["192.0.2.0/24"], None),
    [(Sent("anna", "192.0.2.1", 1), A_MINUTE), (Sent("anna", "192.0.2.2", 1), A_MINUTE)],
    [[Sent("anna", "192.0.20.1", 1), Sent("bert", "unknown", 1)], [Sent("anna", "2001:db8::1", 1)]],
)
def test_decisions_are_those_of_a_simple_computation(
    store: Store, tmp_path: Path, rules: Rules, history: list[tuple[Sent, float]], batches: list[list[Sent]]
) -> None:
    """Whoever was asked for closely before or not: the repository remembers that from example to example."""
    store.clear()
    settings = read(tmp_path, *rules.lines())
    events = list(history)
    for n, (each, age) in enumerate(history):  # each has a row of its own
        store.add([(each.login, f"{n}", each.client_address, each.recipients)], age_s=age)
    for batch in batches:
        rows = [event(each.login, each.recipients or 0, f"s{n}", each.client_address) for n, each in enumerate(batch)]
        expected = [by_the_book(rules, events, batch, n) for n in range(len(batch))]
        assert inserted(store.repository, rows, settings) == expected
        assert judged(store.repository, rows, settings) == expected
        events += [(each, 0.0) for each in batch]


# ---- what spares the work ---------------------------------------------------------------------------

groups = st.sampled_from([0, 0, 0, 1, 2, 0xA, 0xB, 0x10, 0x1A, 0xFF, 0x100, 0xDB8, 0x2001, 0xFFFF])
ipv6 = st.lists(groups, min_size=8, max_size=8).map(
    lambda all_groups: socket.inet_ntop(socket.AF_INET6, b"".join(group.to_bytes(2, "big") for group in all_groups))
)
octets = st.sampled_from([0, 1, 2, 10, 19, 25, 100, 192, 200, 255])
ipv4 = st.lists(octets, min_size=4, max_size=4).map(lambda each: ".".join(map(str, each)))
texts = ipv4 | ipv6 | st.sampled_from(NO_NETWORK) | st.text("0129af.:", max_size=12)


@hypothesis_settings(max_examples=200)
@given(st.lists(texts, min_size=2, max_size=60))
@example(["2001:db8::1", "2001:db8:0:1::1"])
@example(["1:2::3:4", "1:2:3::4", "1:2::"])
@example(["10.0.1.1", "10.0.1", "10.0.10.1", "10.0.1.200"])
def test_two_addresses_are_in_one_network_only_if_all_between_them_are(addresses: list[str]) -> None:
    """Between them as texts, in whose order a database finds the lowest and the highest."""
    in_order = sorted(addresses)
    for begin in range(len(in_order)):
        for end in range(begin, len(in_order)):
            if not in_one_network(in_order[begin], in_order[end]):
                break
            assert len(networks_of(in_order[begin : end + 1], NOBODY)) <= 1


@given(ipv4 | ipv6, ipv4 | ipv6)
def test_networks_are_the_same_if_their_bits_are(one: str, other: str) -> None:
    assert (network_of(one, NOBODY) == network_of(other, NOBODY)) == (network_bits(one) == network_bits(other))


@given(st.lists(octets, min_size=3, max_size=3), octets, octets)
def test_addresses_of_one_ipv4_network_need_no_closer_look(network: list[int], one: int, other: int) -> None:
    begin = ".".join(map(str, network))
    assert in_one_network(*sorted([f"{begin}.{one}", f"{begin}.{other}"]))


@given(st.integers(1, 0xFFFF), st.integers(1, 0xFFFF), st.integers(1, 0xFFFF), st.binary(min_size=10, max_size=10),
       st.binary(min_size=10, max_size=10))
def test_addresses_of_one_ipv6_network_need_no_closer_look(a: int, b: int, c: int, one: bytes, other: bytes) -> None:
    """Unless the three groups have a zero among them, which is written in several ways."""
    begin = b"".join(group.to_bytes(2, "big") for group in (a, b, c))
    assume(any(one) and any(other))
    both = [socket.inet_ntop(socket.AF_INET6, begin + rest) for rest in (one, other)]
    assert in_one_network(*sorted(both))


@pytest.mark.mariadb
def test_a_server_that_cuts_long_lists_short_finds_the_networks_all_the_same(database: Database) -> None:
    """As older servers do by default (group_concat_max_len)."""
    with global_variable(database, "group_concat_max_len", 1024):
        store = MariaStore(database)
        many = [f"2001:db8:1:{n:x}:1111:2222:3333:4444" for n in range(200)]
        others = ["203.0.113.1", "198.51.100.1", "10.0.0.1", "2001:db8:2::1"]
        store.add([("anna", "", each, 1) for each in many + others], age_s=A_MINUTE)
        expected = [(HOLD_NETWORKS, "fanout (5>3)")]
        assert inserted(store.repository, [event("anna", address=many[0])], Settings(max_networks=3)) == expected


# ---- outages ----------------------------------------------------------------------------------------


@pytest.mark.mariadb
def test_in_an_outage_what_was_known_and_what_the_journal_has_count_together(
    policyd: Start, mariadb: MariaDB, database: Database
) -> None:
    daemon = policyd(max_networks=2, hourquota=10, **database.settings())

    def answers(*messages: str) -> list[str]:
        return [send(daemon, message).answer for message in messages]

    assert answers("anna/10.0.1.1/1", "anna/10.0.2.1/1", "bert/10.0.1.1/6") == [DUNNO] * 3
    mariadb.kill()
    assert send(daemon, "anna/10.0.3.1/1") == outcome(
        HOLD_NETWORKS, "DEFERRING fanout (3>2)", "anna/10.0.3.1/1", 3
    )
    assert answers("anna/10.0.1.1/1", "bert/10.0.1.1/3") == [HOLD_NETWORKS, DUNNO]
    assert send(daemon, "bert/10.0.1.1/1") == outcome(
        HOLD_HOUR, "DEFERRING hourquota (10>10)", "bert/10.0.1.1/1", 10
    )
    assert answers("carl/10.0.1.1/1", "carl/unknown/1", "carl/10.0.2.1/1", "carl/10.0.3.1/1") == [
        DUNNO, DUNNO, DUNNO, HOLD_NETWORKS
    ]
    assert answers("dora/10.0.1.1/9", "dora/10.0.1.1/1") == [DUNNO, HOLD_HOUR]
    mariadb.start()
    daemon.wait_for_log(ENDS, timeout=BACK_S)
    assert {login: (int(recipients), networks) for login, recipients, networks in database.query(
        "SELECT sasl_username, SUM(recipient_count), COUNT(DISTINCT client_address) FROM events"
        " WHERE sasl_username IN ('anna', 'bert', 'carl', 'dora') GROUP BY 1"
    )} == {"anna": (4, 3), "bert": (10, 1), "carl": (4, 4), "dora": (10, 1)}
    for message, rule, reached in [
        ("anna/10.0.2.1/1", "fanout (3>2)", 5),
        ("bert/10.0.1.1/1", "hourquota (11>10)", 11),
        ("carl/10.0.1.1/1", "fanout (3>2)", 5),
        ("dora/10.0.1.1/1", "hourquota (11>10)", 11),
    ]:
        answer = HOLD_NETWORKS if rule.startswith("fanout") else HOLD_HOUR
        assert send(daemon, message) == outcome(answer, f"DEFERRING {rule}", message, reached)


class UsageOf:
    """Whoever records an event and waits for what its login has used."""

    def __init__(self, recorder: Recorder, recorded: Event) -> None:
        self._usages: queue.SimpleQueue[Usage | None] = queue.SimpleQueue()
        recorder.record(recorded, self._usages.put)

    def get(self) -> Usage:
        usage = self._usages.get(timeout=PATIENCE_S)
        assert usage is not None
        return usage


@pytest.mark.usefixtures("logged", "no_delay")
def test_in_an_outage_who_was_busy_hours_ago_is_not_taken_for_busy_now(tmp_path: Path) -> None:
    """What is remembered of the hour is that of the hour."""
    SQLiteStore(tmp_path / "events.sqlite3").add([("anna", "", "192.0.2.1", 280)], age_s=8 * HOUR_S)
    repository = BreakableRepository(str(tmp_path / "events.sqlite3"))
    settings = Settings(hourquota=300, max_networks=3)
    with recording(repository, tmp_path / "journal.sqlite3") as recorder:
        recorder.scope = scope_of(settings)
        assert UsageOf(recorder, event("anna", 1)).get() == Usage(281, 1, frozenset(["192.0.2.1"]))
        repository.broken = AWAY
        usages = [UsageOf(recorder, event("anna", 5)).get() for _ in range(4)]
    assert [(usage.recipients, usage.of_hour) for usage in usages] == [(281 + n, 1 + n) for n in (5, 10, 15, 20)]
    assert {judge(usage, settings.limits_of("anna"), settings)[0] for usage in usages} == {DUNNO}
