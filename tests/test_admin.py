"""scripts/policyd-admin: who sends what, how a login stands, what another rule would do; what is wrong, on a line."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import sqlite3
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scripting import ADMIN, HOUR_S, Desk, Entry, commands_in, incident, printed, refusal, rows_of, run, run_process
from servers import ROOT, Database, free_port, temporary_directory
from stores import SQLiteStore, Store, on_each_table, on_stores

from policyd import DAY_S, NEVER, Limits, Usage, __version__, decide, printable

STRANGE_LOGIN = "\x1b]0;owned\x07\u009b31m\té"
STRANGE_LOGIN_SHOWN = r"\x1b]0;owned\x07\x9b31m\t\xe9"
TOP20 = ROOT / "scripts" / "policyd-top20.sh"
NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}
on_both = on_stores("SQLite", "schema.sql")  # the statements of go-policyd's table are those of schema.sql
# Of 25 logins the last five miss the twenty; "early" is of this week, "gone" of the week before.
ENTRIES = [
    Entry(0, "anna", 700), Entry(3600, "anna", 800), Entry(7200, "ben", 600), Entry(2 * DAY_S, "ben", 1000),
    Entry(7300, "ben", 0), *(Entry(100 + number, f"user{number:02}", 100 - number) for number in range(23)),
    Entry(6 * DAY_S, "early", 5000), Entry(8 * DAY_S, "gone", 9000),
]  # fmt: skip
USERS = [(f"user{number:02}", 100 - number, 1) for number in range(18)]
OF_24_H = [("anna", 1500, 2), ("ben", 600, 1), *USERS]
OF_7_DAYS = [("early", 5000, 1), ("ben", 1600, 2), ("anna", 1500, 2), *USERS[:-1]]
# In 24 h 1612 recipients in four messages, then two older ones.
BORIS = [
    Entry(20 * HOUR_S + 1800, "boris", 12, "boris@example.org", "192.0.2.7"),
    Entry(5 * HOUR_S + 1800, "boris", 700, "bank@example.net", "203.0.113.9"),
    Entry(5 * HOUR_S + 1700, "boris", 500, "bank@example.net", "203.0.113.10"),
    incident(5 * HOUR_S, "boris", "HOLD overquota"),
    Entry(1800, "boris", 400, "", "2001:db8::9"),
    Entry(24 * HOUR_S + 600, "boris", 5000, "boris@example.org", "192.0.2.7"),
    Entry(3 * DAY_S, "boris", 1, "boris@example.org", "192.0.2.7"),
]
COLUMNS = "day", "login", "held", "refused", "recipients", "peak"  # of the table: a login on a day
Line = tuple[Any, ...]


def ranking(text: str) -> list[tuple[str, int, int]]:
    """Return the lines of top's table as (login, recipients, messages), in their order."""
    rows = [row for row in rows_of(text, "rank ") if len(row) > 5]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [(row[1], int(row[2]), int(row[3])) for row in rows]


def states(desk: Desk) -> dict[str, str]:
    return {row[1]: " ".join(row[5:]) for row in rows_of(desk("top"), "rank ") if len(row) > 5}


@on_both
def test_the_twenty_logins_with_the_most_recipients(store: Store, desk: Desk) -> None:
    desk.fill(*ENTRIES)
    text = desk("top")
    assert ranking(text) == OF_24_H
    assert text.startswith("The 20 logins with the most recipients of the last 24 hours\n")
    assert ranking(desk("top", "-w")) == OF_7_DAYS
    text = printed(run("top", "-n3", f"-wc{desk.file}"))
    assert ranking(text) == OF_7_DAYS[:3]
    assert text.startswith("The 3 logins with the most recipients of the last 7 days\n")
    assert len(ranking(desk("top", "-n", "9999"))) == 25
    rows = list(csv.DictReader(run("top", "--csv", "-n2", "-wc", desk.file).stdout.splitlines()))
    assert [(row["login"], row["recipients"], row["recipients_24h"]) for row in rows] == [
        ("early", "5000", "0"), ("ben", "1600", "600"),
    ]  # fmt: skip


SHARES = [
    Entry(10, "half", 750), Entry(20, "below", 1499), Entry(30, "reached", 1500), Entry(40, "almost", 2999),
    Entry(50, "refused", 3000), Entry(60, "newslett", 16_000), Entry(70, "free", 90_000), Entry(80, "none", 1),
    Entry(90, "printer", 40), Entry(95, "thief", 1), incident(99, "thief", "HOLD blocked"),
    incident(99, "early", "HOLD places"), Entry(7200, "late", 30), Entry(7200, "late", -700),
]  # fmt: skip
OWN = ["quota=NEWSLETT:20000", "quota = free:unlimited", "quota=none:0", "quota=printer@example.org:20:7"]
STATES = {
    "free": "unlimited ok", "newslett": "[####..] 80% ok", "refused": "[######] 200% REJECT",
    "almost": "[######] 199% HOLD", "reached": "[######] 100% HOLD", "below": "[#####.] 99% ok",
    "half": "[###...] 50% ok", "none": "all is held HOLD", "printer": "[######] 200% REJECT",
    "thief": "[......] 0% HOLD", "early": "[......] 0% ok", "late": "[......] 2% ok",
}  # fmt: skip
AUDIT = {login: re.sub("(HOLD|REJECT)$", r"would \1", text) for login, text in STATES.items()}
LISTS = ["blacklist=@spam.example", "blacklist=half", "whitelist=thief", "whitelist_days=1-7", "whitelist_hours=0-24"]


@pytest.mark.parametrize(("lines", "expected"), [
    (OWN, STATES), (["mode=audit", *OWN], {**AUDIT, "thief": STATES["thief"]}),
    (["early_signs=yes", *LISTS],
     {"early": "[......] 0% HOLD", "half": "[###...] 50% HOLD", "thief": "[......] 0% ok"}),
    (["early_signs=audit"], {"early": "[......] 0% would HOLD", "thief": "[......] 0% HOLD"}),
    (["hourquota=20", "defaultquota=45", "rejectquota=50", "quota=printer:30:60"],
     {"printer": "[######] 133% HOLD", "late": "[####..] 66% ok", "half": "[######] >999% REJECT"}),
], ids=str)  # fmt: skip
def test_each_login_has_the_share_of_its_quota_and_what_policyd_would_answer_now(
    desk: Desk, lines: list[str], expected: dict[str, str]
) -> None:
    desk.fill(*SHARES)
    desk.write(*lines)
    found = states(desk)
    assert found == {**found, **expected}
    assert found.keys() == STATES.keys()


def test_objects_have_the_columns_of_all_lists_and_what_was_forgiven_stands_apart(desk: Desk) -> None:
    desk.fill(*BORIS, Entry(9, "anna", -160), Entry(8, "anna", 4), Entry(1, "free", 7))
    desk.write("quota=free:unlimited")
    names = ("rank", "login", "recipients", "forgiven", "messages", "clients", "quota", "state")
    rows = desk.objects("top")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (1, "boris", 1612, 0, 4, 4, 1500, "HOLD"), (2, "anna", 4, 160, 2, 1, 1500, "ok"),
        (3, "free", 7, 0, 1, 1, "unlimited", "ok"),
    ]  # fmt: skip
    assert list(rows[0]["incidents"]) == ["HOLD overquota"]
    text = desk("top")
    assert "\n     HOLD overquota\n" in text
    assert "\n     160 recipients forgiven\n" in text
    desk.store.clear()
    desk.fill(Entry(8 * DAY_S, "gone", 5))
    assert "\nno message was counted in this time\n" in desk("top", "-w")
    assert desk.objects("top") == []


@on_both
def test_nothing_in_a_login_can_talk_to_the_terminal(store: Store, desk: Desk) -> None:
    login = 'x"y,z' + "-" * 200
    desk.fill(Entry(1, STRANGE_LOGIN, 3, STRANGE_LOGIN), Entry(2, login, 2))
    shown = [(STRANGE_LOGIN_SHOWN[:18] + ">", 3, 1), (login[:18] + ">", 2, 1)]
    assert ranking(desk("top")) == shown
    rows = csv.DictReader(desk.run("top", "--csv").stdout.splitlines(), strict=True)
    assert [row["login"] for row in rows] == [STRANGE_LOGIN_SHOWN, login]
    assert [row["login"] for row in desk.objects("top")] == [STRANGE_LOGIN, login]
    assert desk.report(STRANGE_LOGIN)["login"] == STRANGE_LOGIN_SHOWN
    assert f" {STRANGE_LOGIN_SHOWN[:27]}>" in desk("whatif", "3")


def test_who_hangs_up_gets_no_traceback(desk: Desk) -> None:
    desk.store.add([(f"user{n}", "", "", 1) for n in range(1000)], 1)
    done = run_process("sh", "-c", f"{sys.executable} {ADMIN} top -n 9999 -c {desk.file} | head -1")
    assert (done.stdout[:10], done.stderr) == ("The 9999 l", "")


def moment(age_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() - age_s))


@on_both
def test_why_she_is_held_and_until_when(store: Store, desk: Desk) -> None:
    ages = {"held_since": 5 * HOUR_S, "held_until": -DAY_S + 5 * HOUR_S + 1700}  # at 900 the next one reaches it
    before = [moment(age_s + 2) for age_s in ages.values()]  # its clock is read a moment before the store's
    desk.fill(*BORIS, Entry(60, "anna", 3), Entry(60, "boriss", 4), Entry(60, "bori", 5))
    desk.write("defaultquota=901")
    line = desk.file.read_text().splitlines().index("defaultquota=901") + 1
    text = desk("user", "Boris@example.org")
    known = desk.report("boris")
    expected = {
        "login": "boris", "state": "HOLD", "why": "overquota (1612>901)", "quota": "901", "reject": "1802",
        "set_by": f"{desk.file}:{line} defaultquota", "recipients": "1612", "recipients_1h": "400", "messages": "4",
    }  # fmt: skip
    assert {name: known[name] for name in expected} == expected
    for name, first, last in zip(ages, before, map(moment, ages.values())):
        assert first <= known[name][:16] <= last, name
    assert known["held_until"].endswith(", if nothing more is sent")
    assert known["incidents"].startswith("HOLD overquota, 20")
    hours = [int(words[1]) for words in rows_of(text, "recipients of the last 24 hours;")]
    assert {23 - n: number for n, number in enumerate(hours) if number} == {0: 400, 5: 1200, 20: 12}
    assert rows_of(text, "client ") == [
        ["203.0.113.9", "new", "1", "700"], ["203.0.113.10", "new", "1", "500"], ["2001:db8::9", "new", "1", "400"],
        ["192.0.2.7", "1", "12"],
    ]  # fmt: skip
    assert rows_of(text, "sender ") == [
        ["bank@example.net", "2", "1200"], ["<>", "1", "400"], ["boris@example.org", "1", "12"],
    ]  # fmt: skip
    assert re.search(r"^in_queue        not known: .+$", text, re.MULTILINE)
    commands = [command.split()[1] for command in commands_in(text)]
    assert commands == ["forgive", "held", "block", "delete", "trace", "unblock"]
    (found,) = desk.objects("user", "boris")
    assert (found["login"], found["recipients"], found["quota"], found["state"]) == ("boris", 1612, 901, "HOLD")
    assert [client["new"] for client in found["client"]] == [True, True, True, False]


@pytest.mark.parametrize(("lines", "state", "limits", "by"), [
    ([], "ok: messages go on", "1500 3000 unlimited", "default"),
    (["quota=anna:0"], "HOLD: overquota (4>0)", "0 unlimited unlimited", "FILE:2 quota=anna"),
    (["quota=ANNA@a.org:unlimited"], "ok: messages go on", "unlimited unlimited unlimited", "FILE:2 quota=anna"),
    (["hourquota=8", "quota=anna:1:9"], "REJECT: overquota (4>2x1)", "1 2 9", "FILE:3 quota=anna"),
    (["hourquota=8", "quota=anna:1"], "REJECT: overquota (4>2x1)", "1 2 8", "FILE:3 quota=anna; FILE:2 hourquota"),
    (["defaultquota=3", "rejectquota=9"], "HOLD: overquota (4>3)", "3 9 unlimited",
     "FILE:2 defaultquota; FILE:3 rejectquota"),
    (["hourquota=4"], "HOLD: hourquota (4>4)", "1500 3000 4", "FILE:2 hourquota"),
    (["hourquota=4", "blacklist=Anna"], "HOLD: blacklisted, line 3 of the settings", "1500 3000 4", "FILE:2 hourquota"),
    (["strip_domain=no", "quota=@a.org:3"], "HOLD: overquota (4>3)", "3 6 unlimited", "FILE:3 quota=@a.org"),
])  # fmt: skip
def test_it_is_told_what_holds_her_and_which_line_says_so(
    desk: Desk, lines: list[str], state: str, limits: str, by: str
) -> None:
    login = "anna@a.org" if "strip_domain=no" in lines else "anna"
    desk.fill(Entry(60, login, 4))
    desk.write(*lines)
    known = desk.report("anna@a.org")
    assert f"{known['state']}: {known['why']}" == state
    assert " ".join(known[name] for name in ("quota", "reject", "hourquota")) == limits
    assert known["set_by"] == by.replace("FILE", str(desk.file))
    assert bool(known["held_until"]) == (">" in state and "quota=anna:0" not in lines), "a list ends when its line does"


def test_who_is_in_too_many_places_is_held_until_a_day_after_the_incident_and_which_are_new_is_told(desk: Desk) -> None:
    """Known is what was used more than a day ago, or forgiven; a trusted network is no place."""
    desk.fill(
        Entry(60 * HOUR_S, "anna", 1, client="192.0.2.1"), Entry(60, "anna", 1, client="192.9.9.9"),
        Entry(70, "anna", -1, client="198.51.100.1"), Entry(80, "anna", 1, client="198.18.0.1"),
        Entry(90, "anna", 1, client="203.0.113.1"), Entry(99, "anna", 1, client="10.0.0.1"),
        incident(HOUR_S, "anna", "HOLD places"),
    )  # fmt: skip
    assert [value for name, value in desk.report("anna").items() if name.startswith("held_")] == ["", ""]
    desk.write("early_signs=yes", "keep_days=30", "trusted_network=10.0.0.0/8")
    (found,) = desk.objects("user", "anna")
    assert {client["client"] for client in found["client"] if client["new"]} == {"203.0.113.1"}
    assert found["why"].startswith("places (since ")
    assert found["held_until"][:16] in (moment(-23 * HOUR_S), moment(-23 * HOUR_S + 60))
    desk.fill(incident(2 * HOUR_S, "anna", "HOLD blocked"))
    desk.write("early_signs=yes", "keep_days=30", "mode=audit", "defaultquota=2")  # which makes no block longer
    assert desk.report("anna")["held_until"][:16] in (moment(-22 * HOUR_S), moment(-22 * HOUR_S + 60))


@on_stores("SQLite", "schema.sql", "go-policyd")
def test_a_login_is_read_as_policyd_reads_it_and_an_unknown_one_is_said(store: Store, desk: Desk) -> None:
    desk.fill(Entry(60, "jürgen", 3), Entry(60, "anna@a.o", 1), Entry(60, "-c", 2))
    desk.write("blacklist=igor")
    for given in ("JÜRGEN", "ju\u0308rgen", "jür\u00adgen@x.org", " jürgen", "UNI\\Jürgen"):
        assert desk.report(given)["login"] == r"j\xfcrgen"
    assert desk.report("-c")["login"] == "-c"
    for login in ("nobody", "jür", "anna' OR '1'='1", "$(id)", "\\", "%", "_ürgen", "JURGEN\u0301", "*", "\xd1"):
        for command in ("user", "forgive", "unblock"):
            assert ": unknown; no message of this login is kept in the " in desk.refusal(command, login)
    line = desk.file.read_text().splitlines().index("blacklist=igor") + 1
    assert desk.report("igor")["why"] == f"blacklisted, line {line} of the settings"
    desk.write(strip_domain="no")
    assert desk.report("Anna@A.o")["login"] == "anna@a.o"
    assert desk.refusal("user", "anna").startswith("anna: unknown; ")


@on_stores("go-policyd")
def test_an_old_table_has_logins_and_quotas_as_it_cuts_them(store: Store, desk: Desk) -> None:
    entries = {"newslett": 90, "registra": 91, "rene": 3, "rené": 2}
    desk.fill(*(Entry(60, login, number) for login, number in entries.items()))
    lines = ["quota=newsletter:100", "quota=registrar:10", "quota=registra:50", "defaultquota=10"]
    desk.write(*lines)
    assert states(desk) == {
        "newslett": "[#####.] 90% ok", "registra": "[######] 182% HOLD", "rene": "[#.....] 30% ok",
        r"ren\xe9": "[#.....] 20% ok",
    }  # fmt: skip
    known = desk.report("NewsLetter")
    assert (known["login"], known["quota"]) == ("newsletter", "100")
    for login, number in entries.items():
        assert desk.report(login)["recipients"] == str(number)
    before = "The table keeps 8 characters: all logins that begin with newslett are meant\n"
    for login in ("newsletter", "newslett"):  # as top shows it
        assert all(desk(command, login).startswith(before) for command in ("block", "forgive"))
    assert "The table" not in desk("forgive", "rene")
    # What latin1 has no letters for is longer in the table.
    assert desk("block", "жанна").startswith(before.replace("newslett", r"\u0436\u"))


def replay(store: Store, limits: Limits, own: dict[str, Limits] | None = None) -> list[Line]:
    """Decide on every row with policyd's own function, the sums taken anew for each; return the table."""
    rows = [(ts, login, abs(count)) for ts, login, count in store.times() if count]
    days: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for n, (ts, login, count) in enumerate(rows):
        before = [(then, number) for then, name, number in rows[: n + 1] if name == login]
        of_day, of_hour = (sum(number for then, number in before if then > ts - age * 1000) for age in (DAY_S, HOUR_S))
        action = decide(Usage(of_day, of_hour), (own or {}).get(login, limits)).action
        if action != "DUNNO":
            day = days[time.strftime("%Y-%m-%d", time.gmtime(ts / 1000)), login]
            day[action == "REJECT"] += 1
            day[2] += count
            day[3] = max(day[3], of_day)
    return sorted(((*key, *day) for key, day in days.items()), key=lambda line: (line[0], -line[4], line[1]))


def whatif(desk: Desk, *arguments: object) -> list[Line]:
    return [tuple(row[name] for name in COLUMNS) for row in desk.objects("whatif", *arguments)]


def plausible(seed: int) -> list[Entry]:
    """Invent two hundred messages of a week, their times far enough from each other."""
    chance = random.Random(seed)
    # Some are the same only in the eyes of go-policyd's collation.
    logins = ["anna", "ben", "carla", "newslett", "rene", "rené", "RENE"]
    counts = [None, 0, -7, 1, 1, 2, 5, 40, 300]
    return [Entry(60 + number * 3001 + chance.randrange(3000), chance.choice(logins), chance.choice(counts))
            for number in range(200)]  # fmt: skip


@on_each_table
def test_every_message_is_decided_as_policyd_decides(store: Store, desk: Desk) -> None:
    desk.fill(*plausible(seed=5))
    desk.write("quota=newsletter:700", "quota=newslett:800", "quota=carla:unlimited:300", "quota=ben:0")
    own = {"newslett": Limits(800, 1600), "carla": Limits(NEVER, NEVER, 300), "ben": Limits(0, NEVER)}
    lines, text = replay(store, Limits(300, 600), own), desk("whatif", 300)
    assert lines
    table = [line.split() for line in re.findall(r"^\d{4}-.*", text, re.MULTILINE)]
    assert table == [[printable(str(value)) for value in line] for line in lines]
    rows = desk.objects("whatif", 300)
    assert [tuple(row[name] for name in COLUMNS) for row in rows] == lines
    assert {("anna", 300), ("carla", "unlimited")} < {(row["login"], row["quota"]) for row in rows}
    assert all(row["incidents"] and row["state"] in ("HOLD", "REJECT") for row in rows)
    held, refused = (sum(row[name] for row in rows) for name in ("held", "refused"))
    went_on = sum(1 for *_, count in store.rows() if count) - held - refused
    logins = len({row["login"] for row in rows})
    assert f"\nlogins: {logins}; messages: {held} held, {refused} refused, {went_on} went on\n" in text
    forgiven = sum(-(row[3] or 0) for row in store.rows() if (row[3] or 0) < 0)
    assert f"\nrecipients that were forgiven, and count here: {forgiven}\n" in text


def test_the_other_limits_are_those_of_the_call_or_of_the_settings(desk: Desk) -> None:
    desk.fill(*plausible(seed=7), *(Entry(3000 + n, "dora", 60) for n in range(20)))
    desk.write("rejectquota=2000", "hourquota=1000")
    for arguments, limits in (
        (["500"], Limits(500, 2000, 1000)), (["500", "--rejectquota", "501"], Limits(500, 501, 1000)),
        (["2000"], Limits(2000, 2000, 1000)), (["0600", "--hourquota=300"], Limits(600, 2000, 300)),
        (["900", "--hourquota", "0"], Limits(900, 2000, NEVER)),
    ):  # fmt: skip
        assert whatif(desk, *arguments) == replay(desk.store, limits)
    assert desk.refusal("whatif", "2001") == "first held, then refused: 2000 is below 2001; give --rejectquota"


@pytest.fixture
def history(desk: Desk) -> Desk:
    """Ten days of a login that mails from home."""
    desk.fill(*(Entry(day * DAY_S + 60, "boris", 2, client="192.0.2.7") for day in range(10)))
    return desk


def held(desk: Desk, *options: str) -> dict[str, tuple[int, int, set[str]]]:
    """Return each login's held messages, clients and incidents, whether midnight lies between them or not."""
    found: dict[str, tuple[int, int, set[str]]] = {}
    for row in desk.objects("whatif", "1500", *options):
        number, clients, incidents = found.get(row["login"], (0, 0, set()))
        found[row["login"]] = number + row["held"], clients + row["clients"], incidents | set(row["incidents"])
    return found


@pytest.mark.parametrize(("lines", "options", "number"), [
    ((), (), 0), ((), ("--max-places", "5"), 36), (("early_signs=yes", "keep_days=30"), (), 36),
    (("early_signs=audit", "keep_days=30"), (), 0),
])  # fmt: skip
def test_a_fast_thief_would_have_been_in_too_many_places(
    history: Desk, lines: tuple[str], options: tuple[str], number: int
) -> None:
    """All after the sixth is held, also on the next day."""
    history.write(*lines)
    history.fill(*(Entry(2 * HOUR_S - n * 9, "boris", 1, client=f"{11 + n}.0.0.1") for n in range(40)))
    expected = {"boris": (number, number, {"HOLD places"})} if number else {}
    assert held(history, *options) == expected


def test_a_slow_thief_and_one_of_a_single_new_place_too(history: Desk) -> None:
    """The bulk of a domain is not known by its quota, that of a login by its own is."""
    logins = ("anna@a.example", "bert@a.example")
    history.fill(*(Entry(8 * DAY_S, login, 1) for login in logins))
    history.fill(*(Entry(3 * HOUR_S - n * 60, login, 30, client="203.0.113.1") for login in logins for n in range(6)))
    history.fill(*(Entry(20 * HOUR_S - n * HOUR_S, "boris", 1, client=f"{11 + n}.0.0.1") for n in range(18)))
    history.fill(*(Entry(3 * HOUR_S - n * 60, "carla", 10, client="203.0.113.1") for n in range(20)))
    options = "--max-places", "5", "--new-place-quota", "100"
    quotas = "strip_domain=no", "quota=@a.example:500", "quota=bert@a.example:500"
    history.write(*quotas)
    assert held(history, *options) == {
        "boris": (4, 4, {"HOLD places"}),  # from the sixteenth new one in a day on
        "carla": (11, 1, {"HOLD newplace"}),  # from the hundredth recipient on
        "anna@a.example": (2, 1, {"HOLD newplace"}),
    }
    history.write(*quotas, "quota=carla:1500", "quota=anna@a.example:500", "trusted_network=0.0.0.0/1")
    assert held(history, *options) == {}


def test_without_a_message_it_says_so_and_on_the_first_days_nothing_is_new(desk: Desk) -> None:
    desk.fill(Entry(60, "anna", 0))
    assert "\nlogins: 0; messages: 0 held, 0 refused, 0 went on\n" in desk("whatif", "1")
    thief = (Entry(HOUR_S - n, "boris", 1, client=f"{11 + n}.0.0.1") for n in range(40))
    desk.fill(Entry(2 * DAY_S, "anna", 1), *thief)
    assert held(desk, "--max-places", "5") == {}


@on_both
def test_a_message_exactly_24_hours_old_is_out_of_the_sum(store: Store, desk: Desk) -> None:
    """Strictly newer counts; and one millisecond makes the difference."""
    for login, later_ms in (("out", DAY_S * 1000), ("in", DAY_S * 1000 - 1)):
        store.add([(login, "", "", 5)], DAY_S + 600)
        (then,) = (ts + later_ms for ts, name, _ in store.times() if name == login)
        moment = "FROM_UNIXTIME(%(then)s / 1000)" if store.width else "%(then)s"
        statement = f"INSERT INTO {{table}} VALUES ({moment}, %(login)s, '', '', 5)"
        store.another().ask(statement, {"login": login, "then": then})
    found = whatif(desk, "6")
    assert [(login, number, peak) for _, login, number, _, _, peak in found] == [("in", 1, 10)]


WRONG_CALLS = """user |delete |foo|-c|top x|top -n 0|top -n|top -x|top --yes|user|user a b|user -x|user --js a|trace
held --yes|release|delete --yes|release a -y|forgive|block a b|whatif|whatif 0|whatif x|whatif -1|whatif 1 2|doctor x
whatif 1 --rejectquota 0|whatif 1234567890|mail|mail nobody|mail a@b.c --from x|--yes delete a
mail a@b.c --server ::1|mail a@b.c --server 127.0.0.1:x"""


def test_a_wrong_call_is_one_line_and_help_is_no_mistake() -> None:
    calls = [call.split(" ") for call in re.split(r"[|\n]", WRONG_CALLS)]
    for arguments in ([], *calls, ["mail", "a@b.c\nBcc: x@y.z"], ["mail", "a@b.c", "--server", "a b"]):
        assert refusal(run(*arguments), status=2).endswith(" --help")
    for command in ("", "top", "user", "held", "release", "forgive", "block", "trace", "whatif", "mail", "doctor"):
        result = run(*command.split(), "--help", COLUMNS="300")
        assert (result.returncode, result.stderr) == (0, "")
        assert "-c FILE" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
    assert run("--version").stdout == f"policyd-admin {__version__}\n"


def test_a_mistake_in_the_settings_is_policyds_own_line_and_78(desk: Desk) -> None:
    desk.file.unlink()
    for text, message in (
        (None, ": No such file"), ("quota=anna\n", ":1: quota=anna"), ("\nmode=audti\n", ":2: mode=audti"),
        ("defaultqouta=5\n", ":1: unknown setting defaultqouta"), ("quota=a:1\nquota=a:2\n", ":2: "),
    ):  # fmt: skip
        if text is not None:
            desk.file.write_text(text)
        for command in ("top", "user a", "forgive a --yes", "block a --yes", "whatif 5", "doctor", "held"):
            assert desk.refusal(*command.split(), status=78).startswith(f"{desk.file}{message}")


def test_a_store_that_cannot_be_used_is_one_line(desk: Desk, tmp_path: Path, database: Database) -> None:
    def refused(*command: str, **settings: str) -> str:
        desk.write(**settings)
        return desk.refusal(*command)

    store = tmp_path / "other" / "events.sqlite3"
    store.parent.mkdir()
    assert refused("top", statedir=str(store.parent)).startswith(f"no {store}: ")
    assert not store.exists()
    store.write_text("not a database " * 100)
    assert refused("top", statedir=str(store.parent)).endswith("file is not a database")
    for command in ("top", "user a", "block a --yes", "whatif 5"):
        assert "127.0.0.1: " in refused(*command.split(), **database.settings(dbport=free_port()))
    assert "Access denied" in refused("top", **database.settings(dbpass="'wrong'"))
    assert "there is no table nowhere" in refused("top", **database.settings(), policy_table="nowhere")


def test_looking_changes_nothing_the_store_stays_its_owners_and_who_may_not_read_is_told() -> None:
    """Also the files beside the store that SQLite makes, whoever looks or changes."""
    open_directory = temporary_directory()  # to all, unlike pytest's own
    open_directory.chmod(0o755)
    path = open_directory / "events.sqlite3"
    desk = Desk(open_directory / "policyd.cfg", SQLiteStore(path))
    desk.fill(Entry(60, "anna", 5))
    for each in (open_directory, *open_directory.iterdir()):
        os.chown(each, NOBODY["user"], -1)
    before = list(sqlite3.connect(path).iterdump())
    for command in (["top"], ["user", "anna"], ["whatif", "5"], ["forgive", "anna"], ["block", "anna"]):
        desk(*command)
    assert list(sqlite3.connect(path).iterdump()) == before
    desk("forgive", "anna", "--yes")
    assert {each.stat().st_uid for each in open_directory.iterdir()} == {NOBODY["user"]}
    (open_directory / "scripts").mkdir()
    program = shutil.copy(ADMIN, open_directory / "scripts")
    shutil.copy(ROOT / "policyd.py", open_directory)
    # By the system's Python, since root's is not for everybody.
    top = partial(run_process, "/usr/bin/python3", program, "top", "-c", desk.file, cwd=open_directory, **NOBODY)
    for kept, status, said in (
        (path, 1, ": unable to open database file"), (desk.file, 78, ": Permission denied; try: chown root:policyd "),
    ):  # fmt: skip
        os.chown(kept, 0, 0)
        kept.chmod(0o600)
        assert refusal(top(), status).startswith(f"{kept}{said}")
    shutil.rmtree(open_directory)


def test_the_policyd_that_belongs_to_it_is_found_and_no_other(tmp_path: Path, desk: Desk) -> None:
    """Beside it, as a module, on the PATH: in this order; one of another version is refused, and not even run."""
    for name in ("bin", "sbin", "modules"):
        (tmp_path / name).mkdir()
    program = shutil.copy(ADMIN, tmp_path / "sbin")
    desk.fill(Entry(1, "anna", 1))
    text, version = (ROOT / "policyd.py").read_text(), f'__version__ = "{__version__}"'
    foreign = "import pathlib\npathlib.Path(__file__).with_suffix('.was_run').touch()\n"
    paths = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}/modules"}
    asked = partial(run_process, sys.executable, "-S", program, "top", "-c", desk.file, env=paths)
    assert asked().returncode == 1
    (tmp_path / "bin" / "policyd").write_text(text)
    (tmp_path / "bin" / "policyd").chmod(0o755)
    assert "anna" in printed(asked())
    assert not (tmp_path / "bin" / "__pycache__").exists()
    for place, other in (("modules/policyd.py", "0.1.0"), ("policyd.py", "0.3.0"), ("policyd.py", "\0")):
        (tmp_path / place).write_text(text.replace(version, f'__version__ = "{other}"') + foreign)
        line = f"{tmp_path}/{place} is not policyd {__version__}, as this is; install both from one release"
        assert refusal(asked()) == line
        (tmp_path / place).write_text(text)
    assert not list(tmp_path.rglob("*.was_run"))


def test_the_script_of_the_cron_jobs_finds_it_beside_itself_or_on_the_path(tmp_path: Path, desk: Desk) -> None:
    desk.fill(Entry(1, "anna", 1), Entry(2 * DAY_S, "ben", 2))
    alone = shutil.copy(TOP20, tmp_path)
    (tmp_path / "policyd-admin").symlink_to(ADMIN)
    path = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert ranking(printed(run_process("sh", alone, "-c", desk.file, env=path))) == [("anna", 1, 1)]
    assert ranking(printed(run_process("sh", TOP20, "-n1", "-wc", desk.file))) == [("ben", 2, 1)]
    assert run_process("sh", TOP20, "-x").returncode == 2
