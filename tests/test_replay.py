"""The tool behind the manual's figures: policyd's own rule, people who persist, and thieves as they are on record."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest
from servers import run

from policyd import DAY_S, NEVER, Settings, Usage

sys.path.insert(0, str(Path(__file__).parent / "tools"))

import replay
from replay import POPULATIONS, RULES, WARM_UP, Login, Person, Rule, World

USUAL, *_, PESSIMISTIC = POPULATIONS
SINCE = WARM_UP * DAY_S


@pytest.mark.parametrize("population", [USUAL, PESSIMISTIC])
def test_asking_about_candidates_only_misses_nobody(
    population: replay.Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With limits so strict that people are held by all rules; forgiven or not, and held again."""
    world, rules = World(2, population), set[str]()
    limits = {"max_places": 2, "new_place_quota": 30, "hourquota": 150, "defaultquota": 300}
    rule = Rule("strict", 7, Settings(early_signs="yes", keep_days=7, **limits))
    monkeypatch.setattr(replay, "RULES", [rule])
    most = Usage(NEVER, NEVER, new_places=NEVER, new_places_24h=NEVER, from_new_places=NEVER)
    for n in range(42):
        person, dice = Person(world, n, WARM_UP + 3), random.Random(n)
        stolen = list(replay.thieves(dice, SINCE + 100.0).values())[n % 7][:150] if n % 4 else []
        forgiven = [replay.forgiven_by_a_human, lambda at: at + 5e3, lambda at: math.inf][n % 3]
        sent = sorted([*person.sent, *stolen])
        login = Login(sent, world, SINCE, 17.0)
        found = login.incidents(rule, forgiven)
        login.candidates = [(n, most) for n, message in enumerate(sent) if message.at >= SINCE]
        assert found == login.incidents(rule, forgiven)
        rules.update(incident.rule for incident in found)
    assert rules == {"places", "newplace", "hourquota", "overquota"}


@pytest.fixture(scope="module")
def notes() -> replay.Notes:
    """What becomes of a few people and of many thieves."""
    return replay.replay(USUAL, 5, 15, 7, 15)


@pytest.mark.parametrize(("kind", "rule", "fewest", "most"), [  # recipients before the hold, by the rules' own figures
    ("fast botnet", 0, 700, 1500),
    ("fast botnet", -1, 5 * 8, 12 * 10),
    ("slow botnet", 1, 448, 5 * 448),
    ("slow botnet", -1, 15, 5 * 40),
    ("one address, 1 at a time", -1, 60, 99),
    ("one address, 50 at a time", -1, 100, 200),
    ("one address, 370 at a time", -1, 370, 4 * 370),
    ("five places, 99 an hour", -1, 50, 1500),
])  # fmt: skip
def test_a_thief_gets_what_the_rule_leaves(notes: replay.Notes, kind: str, rule: int, fewest: int, most: int) -> None:
    """But for a few: the login's owner sends too, and may be where the thief is."""
    leaked = sorted(recipients for recipients, *_ in notes["leaked", kind, RULES[rule].name, RULES[rule].keep_days])
    assert len(leaked) == 15
    assert fewest <= leaked[1]
    assert leaked[-3] <= most


def test_the_same_seed_gives_the_same_figures_and_another_one_does_not() -> None:
    first, again, other = (replay.replay(USUAL, seed, 4, 7, 1) for seed in (5, 5, 6))
    assert first == again != other


def test_the_tool_prints_the_table_as_markdown_and_what_the_manual_quotes() -> None:
    tool = run(sys.executable, replay.__file__, "--seed=3", "--seeds=1", "--users=100", "--days=7", check=True)
    printed = tool.stdout.splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert printed[0] == "Seeds 3 to 3, 100 people of each population, 7 days."
    assert len(table) == 2 + len(RULES)
    assert {line.count("|") for line in table} == {6 + len(POPULATIONS)}
    quoted = [line[2:].split(":")[0] for line in printed if line.startswith("- ")]
    assert quoted == [*(each.name for each in POPULATIONS), *replay.thieves(random.Random(1), 0)]
