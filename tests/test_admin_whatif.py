"""policyd-admin whatif: what another rule would have done, message by message as policyd decides."""

from __future__ import annotations

import random
import re
import time
from collections import defaultdict, namedtuple
from pathlib import Path
from typing import Any

import pytest
from scripting import DAY_S, HOUR_S, Entry, embedded, fill, objects, printed, refusal, run, settings_file
from stores import SQLiteStore, Store, on_each_table, on_stores

from policyd import NEVER, Limits, Usage, decide

Line = namedtuple("Line", "day login held refused recipients peak")  # of the table: a login on a day
Totals = namedtuple("Totals", "logins held refused went_on")


def replay(store: Store, limits: Limits, own: dict[str, Limits] | None = None) -> tuple[list[Line], Totals]:
    """Decide on every row with policyd's own function, the sums taken anew for each."""
    rows = [(ts, login, abs(count)) for ts, login, count in store.times() if count]
    days: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    passed = 0
    for n, (ts, login, count) in enumerate(rows):
        before = [(then, number) for then, name, number in rows[: n + 1] if name == login]
        of_day, of_hour = (sum(number for then, number in before if then > ts - age * 1000) for age in (DAY_S, HOUR_S))
        action = decide(Usage(of_day, of_hour), (own or {}).get(login, limits)).action
        if action == "DUNNO":
            passed += 1
            continue
        day = days[time.strftime("%Y-%m-%d", time.gmtime(ts / 1000)), login]
        day[action == "REJECT"] += 1
        day[2] += count
        day[3] = max(day[3], of_day)
    lines = sorted(
        (Line(*key, *day) for key, day in days.items()), key=lambda line: (line.day, -line.recipients, line.login)
    )
    sums = [sum(line[column] for line in lines) for column in (2, 3)]
    return lines, Totals(len({line.login for line in lines}), *sums, passed)


def report(text: str) -> tuple[list[Line], Totals]:
    """Return the table and the totals."""
    lines = [
        Line(match[1], match[2], *map(int, match.groups()[2:]))
        for match in re.finditer(r"^(\d{4}-\d\d-\d\d) (\S+) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
    ]
    words = r"^logins: (\d+); messages: (\d+) held, (\d+) refused, (\d+) went on$"
    (totals,) = re.findall(words, text, re.MULTILINE)
    return lines, Totals(*map(int, totals))


def plausible(seed: int) -> list[Entry]:
    """Invent two hundred messages of a week, their times far enough from each other."""
    chance = random.Random(seed)
    logins, counts = ["anna", "ben", "carla", "newslett"], [None, 0, -7, 1, 1, 2, 5, 40, 300]
    return [Entry(60 + number * 3001 + chance.randrange(3000), chance.choice(logins), chance.choice(counts))
            for number in range(200)]  # fmt: skip


@on_each_table
def test_every_message_is_decided_as_policyd_decides(store: Store, tmp_path: Path) -> None:
    fill(store, *plausible(seed=5))
    file = settings_file(
        tmp_path, store.settings, "quota=newsletter:700", "quota=newslett:800", "quota=carla:unlimited", "quota=ben:0"
    )
    own = {"newslett": Limits(800, 1600), "carla": Limits(NEVER, NEVER), "ben": Limits(0, NEVER)}
    lines, new = replay(store, Limits(300, 600), own)
    assert new.held
    text = printed(run("whatif", 300, "-c", file))
    assert report(text) == (lines, new)
    rows = objects(run("whatif", "--json", 300, "-c", file))
    names = ("day", "login", "held", "refused", "recipients", "peak")
    assert [tuple(row[name] for name in names) for row in rows] == lines
    assert {row["quota"] for row in rows if row["login"] == "anna"} == {300}
    assert all(row["incidents"] and row["state"] in ("HOLD", "REJECT") for row in rows)
    forgiven = sum(-(row[3] or 0) for row in store.rows() if (row[3] or 0) < 0)
    assert f"\nrecipients that were forgiven, and count here: {forgiven}\n" in text


def test_the_other_limits_are_those_of_the_call_or_of_the_settings(tmp_path: Path) -> None:
    store = embedded(tmp_path, *plausible(seed=7), *(Entry(3000 + n, "dora", 60) for n in range(20)))
    file = settings_file(tmp_path, store.settings, "rejectquota=2000", "hourquota=1000")
    for arguments, limits in (
        (["500"], Limits(500, 2000, 1000)), (["500", "--rejectquota", "501"], Limits(500, 501, 1000)),
        (["2000"], Limits(2000, 2000, 1000)), (["0600", "--hourquota=300"], Limits(600, 2000, 300)),
        (["900", "--hourquota", "0"], Limits(900, 2000, NEVER)),
    ):  # fmt: skip
        assert report(printed(run("whatif", *arguments, "-c", file))) == replay(store, limits)
    line = refusal(run("whatif", "2001", "-c", file))
    assert line == "first held, then refused: 2000 is below 2001; give --rejectquota"


@pytest.fixture
def history(tmp_path: Path) -> SQLiteStore:
    """Ten days of a login that mails from home."""
    return embedded(tmp_path, *(Entry(day * DAY_S + 60, "boris", 2, client="192.0.2.7") for day in range(10)))


def held(rows: list[dict[str, Any]]) -> dict[str, tuple[int, set[str]]]:
    """Return each login's held messages and incidents, whether midnight lies between them or not."""
    found: dict[str, tuple[int, set[str]]] = {}
    for row in rows:
        number, incidents = found.get(row["login"], (0, set()))
        found[row["login"]] = number + row["held"], incidents | set(row["incidents"])
    return found


def test_a_fast_thief_would_have_been_in_too_many_places(history: SQLiteStore, tmp_path: Path) -> None:
    fill(history, *(Entry(2 * HOUR_S - n * 9, "boris", 1, client=f"{11 + n}.0.0.1") for n in range(40)))
    file = settings_file(tmp_path, history.settings)
    assert report(printed(run("whatif", "1500", "-c", file)))[1].held == 0
    rows = objects(run("whatif", "1500", "--max-places", "5", "--json", "-c", file))
    assert held(rows) == {"boris": (36, {"HOLD places"})}, "all after the sixth, and the next day's"
    assert sum(row["clients"] for row in rows) == 36
    assert report(printed(run("whatif", "1500", "--max-places", "5", "-c", file)))[1].held == 36
    for early_signs, number in (("yes", 36), ("audit", 0)):
        file = settings_file(tmp_path, history.settings, f"early_signs={early_signs}", "keep_days=30")
        assert held(objects(run("whatif", "1500", "--json", "-c", file))).get("boris", (0, set()))[0] == number


def test_a_slow_thief_and_one_of_a_single_new_place_too(history: SQLiteStore, tmp_path: Path) -> None:
    fill(history, *(Entry(20 * HOUR_S - n * HOUR_S, "boris", 1, client=f"{11 + n}.0.0.1") for n in range(18)),
         *(Entry(3 * HOUR_S - n * 60, "carla", 10, client="203.0.113.1") for n in range(20)))  # fmt: skip
    file = settings_file(tmp_path, history.settings)
    arguments = "whatif", "1500", "--max-places", "5", "--new-place-quota", "100", "--json", "-c"
    assert held(objects(run(*arguments, file))) == {
        "boris": (4, {"HOLD places"}),  # from the sixteenth new one in a day on
        "carla": (11, {"HOLD newplace"}),  # from the hundredth recipient on
    }
    own = settings_file(tmp_path, history.settings, "quota=carla:1500", "trusted_network=0.0.0.0/1")
    assert objects(run(*arguments, own)) == []


def test_the_bulk_of_a_domain_is_not_known_by_its_quota(tmp_path: Path) -> None:
    logins = ("anna@a.example", "bert@a.example")
    store = embedded(tmp_path, *(Entry(8 * DAY_S, login, 1) for login in logins))
    fill(store, *(Entry(3 * HOUR_S - n * 60, login, 30, client="203.0.113.1") for login in logins for n in range(6)))
    quotas = "quota=@a.example:500", "quota=bert@a.example:500"
    file = settings_file(tmp_path, store.settings, "strip_domain=no", *quotas)
    rows = objects(run("whatif", "1500", "--new-place-quota", "100", "--json", "-c", file))
    assert held(rows) == {"anna@a.example": (2, {"HOLD newplace"})}


def test_on_the_first_days_nothing_is_new(tmp_path: Path) -> None:
    thief = (Entry(HOUR_S - n, "boris", 1, client=f"{11 + n}.0.0.1") for n in range(40))
    file = settings_file(tmp_path, embedded(tmp_path, Entry(2 * DAY_S, "anna", 1), *thief).settings)
    assert objects(run("whatif", "1500", "--max-places", "5", "--json", "-c", file)) == []


@on_stores("SQLite", "schema.sql")
def test_a_message_exactly_24_hours_old_is_out_of_the_sum(store: Store, tmp_path: Path) -> None:
    """Strictly newer counts; and one millisecond makes the difference."""
    store.add([("out", "", "", 5)], DAY_S + 600)
    store.add([("in", "", "", 5)], DAY_S + 600)
    (first,) = {ts for ts, login, _ in store.times() if login == "out"}
    (other,) = {ts for ts, login, _ in store.times() if login == "in"}
    for login, then in (("out", first + DAY_S * 1000), ("in", other + DAY_S * 1000 - 1)):
        moment = "FROM_UNIXTIME(%(then)s / 1000)" if store.width else "%(then)s"
        statement = f"INSERT INTO {{table}} VALUES ({moment}, %(login)s, '', '', 5)"
        store.another().ask(statement, {"login": login, "then": then})
    lines, new = report(printed(run("whatif", "6", "-c", settings_file(tmp_path, store.settings))))
    assert [(line.login, line.held, line.peak) for line in lines] == [("in", 1, 10)]
    assert new == Totals(1, 1, 0, 3)


def test_without_a_message_it_says_so(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path, Entry(60, "anna", 0)).settings)
    text = printed(run("whatif", "1", "-c", file))
    assert report(text) == ([], Totals(0, 0, 0, 0))


@on_stores("go-policyd")
def test_logins_that_only_the_old_collation_takes_for_the_same_are_told_apart(store: Store, tmp_path: Path) -> None:
    fill(store, *(Entry(60 * n, login, 3) for n, login in enumerate(["rene", "rené", "RENE", "rene"], start=1)))
    lines, *_ = report(printed(run("whatif", "4", "-c", settings_file(tmp_path, store.settings))))
    assert [(line.login, line.held, line.peak) for line in lines] == [("rene", 1, 6)]
