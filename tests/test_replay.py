"""The tool behind the README's table: policyd's own rule, the attack on record, and people who move."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from statistics import mean

import pytest
import replay
from servers import ROOT

from policyd import DAY_S, DUNNO, HOLD, HOLD_HOUR, HOLD_NETWORKS, HOUR_S, NOBODY, REJECT, network_of, networks_of

USERS = 150


@pytest.fixture(scope="module")
def day() -> replay.Day:
    """A small day."""
    return replay.replay(seed=3, users=USERS)


def outcome(day: replay.Day, max_networks: int, hourquota: int) -> replay.Outcome:
    """Return what one rule did."""
    rule = max_networks, hourquota
    return next(each for each in day.outcomes if (each.rule.max_networks, each.rule.hourquota) == rule)


def phished(day: replay.Day, max_networks: int, hourquota: int) -> set[str]:
    """Return what the phished logins were first held for."""
    found = outcome(day, max_networks, hourquota)
    return {found.decisions[login] for login in replay.PHISHED}


def test_a_day_is_the_same_each_time_and_another_one_is_not(day: replay.Day) -> None:
    again, another = replay.replay(3, USERS), replay.replay(4, USERS)
    assert list(replay.table([again])) == list(replay.table([day]))
    assert list(replay.table([another])) != list(replay.table([day]))


@pytest.mark.parametrize("hourquota", [0, replay.HOUR_QUOTA])
@pytest.mark.parametrize("max_networks", replay.MAX_NETWORKS)
def test_the_attack_is_held_at_the_first_network_that_is_too_many(
    day: replay.Day, max_networks: int, hourquota: int
) -> None:
    """Each message has 8 to 10 recipients, and most of the first ones a network of their own."""
    assert phished(day, max_networks, hourquota) == {HOLD_NETWORKS}
    for leaked in outcome(day, max_networks, hourquota).leaked.values():
        assert 8 * max_networks <= leaked <= 10 * (2 * max_networks)


def test_volume_alone_is_held_at_the_quota(day: replay.Day) -> None:
    assert phished(day, 0, 0) == {HOLD}
    assert phished(day, 0, replay.HOUR_QUOTA) == {HOLD_HOUR}
    for hourquota, limit in [(0, 1500), (replay.HOUR_QUOTA, replay.HOUR_QUOTA)]:
        for leaked in outcome(day, 0, hourquota).leaked.values():
            assert limit - 10 <= leaked < limit


def test_a_stricter_rule_leaks_no_more_and_holds_no_fewer(day: replay.Day) -> None:
    for one in day.outcomes:
        for other in day.outcomes:
            networks, hours = ([rule.max_networks or 10**6, rule.hourquota or 10**6] for rule in (one.rule, other.rule))
            if networks <= hours and all(mine <= theirs for mine, theirs in zip(networks, hours)):
                assert all(one.leaked[login] <= other.leaked[login] for login in replay.PHISHED)
                assert one.users >= other.users
                assert one.messages >= other.messages


def test_the_owner_of_a_list_is_held_for_the_hour_and_by_nothing_else(day: replay.Day) -> None:
    owner = f"owner{USERS}"
    for each in day.outcomes:
        assert each.decisions.get(owner, DUNNO) == (HOLD_HOUR if each.rule.hourquota else DUNNO)


def test_only_who_moves_is_held_for_networks(day: replay.Day) -> None:
    held = {login.rstrip("0123456789") for login in outcome(day, 5, 0).users}
    assert held <= {"field", "train", "roaming", "vpn", "laptop"}
    assert len(outcome(day, 5, 0).users) < USERS / 10


def test_the_rule_is_policyds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """If policyd refused everything, so would all rules here."""
    monkeypatch.setattr("policyd.decide", lambda *_: REJECT)
    for each in replay.replay(3, 20).outcomes:
        assert set(each.decisions.values()) == {REJECT}
        assert sum(each.leaked.values()) == 0


# ---- what is assumed --------------------------------------------------------------------------------


def test_the_attack_is_the_one_on_record() -> None:
    """Two logins, 80 addresses, 9 or 10 recipients a message; 1500 of each login in two minutes, 3000 in four."""
    attack = replay.attack(random.Random(1))
    events = [message.event for message in attack]
    assert Counter(event.sasl_username for event in events).keys() == set(replay.PHISHED)
    assert len({event.client_address for event in events}) == 80
    assert len({network_of(event.client_address, NOBODY) for event in events}) == 80
    assert 9 < mean(event.recipient_count for event in events) < 9.6
    for seconds, recipients in [(110, 1500), (230, 3000)]:
        for login in replay.PHISHED:
            sent = sum(
                message.event.recipient_count
                for message in attack
                if message.event.sasl_username == login and message.at < attack[0].at + seconds
            )
            assert 0.75 * recipients < sent < 1.25 * recipients


def test_the_attack_begins_in_any_minute_of_the_day() -> None:
    begins = [replay.attack(random.Random(seed))[0].at for seed in range(200)]
    assert all(begin % 60 == 0 for begin in begins)
    assert min(begins) < 2 * HOUR_S
    assert max(begins) > DAY_S - 2 * HOUR_S


def test_people_send_as_people_do() -> None:
    """Of 2000 a quarter behind one webmail address, 12 messages each; one sends 800 recipients from one address."""
    messages = replay.honest_day(random.Random(1), replay.USERS)
    by_login: dict[str, list[replay.Message]] = {}
    for message in messages:
        assert 0 <= message.at < DAY_S
        by_login.setdefault(message.event.sasl_username, []).append(message)
    assert replay.USERS * 0.95 < len(by_login) <= replay.USERS  # some send nothing that day
    assert 10 < len(messages) / replay.USERS < 16
    behind_webmail = {each.event.sasl_username for each in messages if each.event.client_address == "10.1.0.25"}
    assert 450 < len(behind_webmail) <= 500
    owner = [each.event for each in by_login[f"owner{replay.USERS}"]]
    assert sum(event.recipient_count for event in owner) == 800
    assert len({event.client_address for event in owner}) == 1
    classes = {each.event.sasl_username for each in messages if each.event.recipient_count == replay.CLASS}
    assert 20 < len(classes) < 70


def test_a_phone_changes_networks_up_to_6_times_an_hour() -> None:
    dice = random.Random(1)
    world = replay.World(dice)
    for _ in range(50):
        since = replay.phone_of(dice, world, world.home(), [(8, 12)], slowest=12).since[1:-1]
        assert min(later - earlier for earlier, later in zip(since, since[1:])) >= 600
        assert len(since) >= 4 * 5


def test_an_ipv6_home_changes_addresses_but_not_its_network() -> None:
    dice = random.Random(2)
    homes = [replay.World(dice).home() for _ in range(20)]
    for home in homes:
        addresses = {home() for _ in range(50)}
        assert len(networks_of(addresses, NOBODY)) <= 2  # and that of its IPv4
        assert len(addresses) == 1 or len(addresses) > 30


def test_the_tool_prints_the_table_as_markdown() -> None:
    tool = [sys.executable, str(ROOT / "tests" / "replay.py"), "--users", "40", "--days", "2", "--seed", "5"]
    printed = subprocess.run(tool, capture_output=True, text=True, check=True).stdout.splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert printed[0].startswith("Honest users: 40, ")
    assert len(table) == 2 + 2 + 2 * len(replay.MAX_NETWORKS)
    assert all(line.count("|") == 7 for line in table)
    assert table[2].startswith("| off: quota 1500 alone | off | 29")
