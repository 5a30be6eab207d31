"""scripts/policyd-admin: who sends what and how a login stands; and one clear line for whatever is wrong."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest
import scripting
from scripting import (
    ADMIN,
    DAY_S,
    HOSTILE,
    HOUR_S,
    NOBODY,
    STRANGE_LOGIN,
    STRANGE_LOGIN_SHOWN,
    TOP20,
    Entry,
    commands_in,
    facts,
    fill,
    incident,
    objects,
    paste,
    printed,
    refusal,
    rows_of,
    run,
    settings_file,
)
from servers import HOLD, ROOT, Database, MariaDB, Policyd, free_port, temporary_directory
from stores import SQLiteStore, Store, on_each_table, on_stores, table_locked

import policyd

# Of 25 logins the last five miss the twenty; "early" is of this week, "gone" of the week before.
ENTRIES = [
    Entry(0, "anna", 700), Entry(3600, "anna", 800), Entry(7200, "ben", 600), Entry(2 * DAY_S, "ben", 1000),
    Entry(7300, "ben", 0), *(Entry(100 + number, f"user{number:02}", 100 - number) for number in range(23)),
    Entry(6 * DAY_S, "early", 5000), Entry(8 * DAY_S, "gone", 9000),
]  # fmt: skip
OF_24_H = [("anna", 1500, 2), ("ben", 600, 1), *((f"user{number:02}", 100 - number, 1) for number in range(18))]
OF_7_DAYS = [
    ("early", 5000, 1), ("ben", 1600, 2), ("anna", 1500, 2),
    *((f"user{number:02}", 100 - number, 1) for number in range(17)),
]  # fmt: skip
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


def ranking(text: str) -> list[tuple[str, int, int]]:
    """Return the lines of top's table as (login, recipients, messages), in their order."""
    rows = [row for row in rows_of(text, "rank ") if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [(row[1], int(row[2]), int(row[3])) for row in rows]


def states(text: str) -> dict[str, str]:
    """Return share and state of each login."""
    return {row[1]: " ".join(row[5:]) for row in rows_of(text, "rank ") if row[0].isdigit()}


def embedded(directory: Path, *entries: Entry) -> dict[str, str]:
    """Return the settings of a new embedded store with these rows."""
    store = SQLiteStore(directory / "events.sqlite3")
    fill(store, *entries)
    return store.settings


@pytest.fixture
def open_directory() -> object:
    """A directory that every user may look into, unlike pytest's own."""
    directory = temporary_directory()
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


# ---- top ------------------------------------------------------------------------------------------------------


@on_each_table
@pytest.mark.parametrize("program", [(ADMIN, "top"), (TOP20,)], ids=["top", "top20"])
def test_the_twenty_logins_with_the_most_recipients(store: Store, tmp_path: Path, program: tuple[Path, str]) -> None:
    fill(store, *ENTRIES)
    file = settings_file(tmp_path, store.settings)

    def top(*arguments: object) -> str:
        return printed(run(*program[1:], *arguments, program=program[0]))

    assert ranking(top("-c", file)) == OF_24_H
    assert ranking(top("-w", "-c", file)) == ranking(top("-wc", file)) == OF_7_DAYS
    assert ranking(top("-n3", "-w", "-c", file)) == OF_7_DAYS[:3]
    assert len(ranking(top("-n", "9999", "-c", file))) == 25
    assert top("-c", file).startswith("The twenty logins with the most recipients of the last 24 hours\n(")
    assert top("-n", 2, "-wc", file).startswith("The 2 logins with the most recipients of the last 7 days\n(")
    csv_text = run(*program[1:], "--csv", "-n2", "-wc", file, program=program[0]).stdout
    assert [(row["login"], row["recipients"],
        row["recipients_24h"]) for row in csv.DictReader(csv_text.splitlines())] == [
        ("early", "5000", "0"), ("ben", "1600", "600"),
    ]  # fmt: skip


SHARES = [
    Entry(10, "half", 750), Entry(20, "below", 1499), Entry(30, "reached", 1500), Entry(40, "almost", 2999),
    Entry(50, "refused", 3000), Entry(60, "newslett", 16_000), Entry(70, "free", 90_000), Entry(80, "none", 1),
    Entry(90, "printer", 40), Entry(95, "thief", 1), incident(99, "thief", "HOLD blocked"),
    incident(99, "early", "HOLD places"),
]  # fmt: skip
OWN = ["quota=NEWSLETT:20000", "quota = free:unlimited", "quota=none:0", "quota=printer@example.org:20:7"]
STATES = {
    "free": "unlimited ok", "newslett": "[####..] 80% ok", "refused": "[######] 200% REJECT",
    "almost": "[######] 199% HOLD",
    "reached": "[######] 100% HOLD", "below": "[#####.] 99% ok", "half": "[###...] 50% ok", "none": "all is held HOLD",
    "printer": "[######] 200% REJECT", "thief": "[......] 0% HOLD", "early": "[......] 0% ok",
}  # fmt: skip


@on_each_table
def test_each_login_has_the_share_of_its_quota_and_what_policyd_would_answer_now(store: Store, tmp_path: Path) -> None:
    fill(store, *SHARES)
    lists = [
        "blacklist=@spam.example",
        "blacklist=half",
        "whitelist=below",
        "whitelist_days=1-7",
        "whitelist_hours=0-24",
    ]
    assert states(printed(run("top", "-c", settings_file(tmp_path, store.settings, *OWN)))) == STATES
    audit = states(printed(run("top", "-c", settings_file(tmp_path, store.settings, "mode=audit", *OWN))))
    assert {login: text for login, text in audit.items() if text.endswith(("HOLD", "REJECT"))} == {
        login: text if login == "thief" else re.sub("(HOLD|REJECT)$", r"would \1", text)
        for login, text in STATES.items() if not text.endswith("ok")
    }  # fmt: skip
    found = states(printed(run("top", "-c", settings_file(tmp_path, store.settings, "early_signs=yes", *lists))))
    assert (found["early"], found["half"]) == ("[......] 0% HOLD", "[###...] 50% HOLD")
    found = states(printed(run("top", "-c", settings_file(tmp_path, store.settings, "early_signs=audit"))))
    assert (found["early"], found["thief"]) == ("[......] 0% would HOLD", "[......] 0% HOLD")
    whitelist = ["whitelist=thief", "whitelist_days=1-7", "whitelist_hours=0-24"]
    assert states(printed(run("top", "-c", settings_file(tmp_path, store.settings, *whitelist))))["thief"].endswith(
        "ok"
    )


def test_the_hour_quota_and_a_reject_quota_of_all_are_seen(tmp_path: Path) -> None:
    settings = embedded(tmp_path, Entry(60, "anna", 30), Entry(7200, "ben", 30), Entry(60, "carla", 50))
    lines = ["hourquota=20", "defaultquota=45", "rejectquota=50", "quota=carla:49:60"]
    assert states(printed(run("top", "-c", settings_file(tmp_path, settings, *lines)))) == {
        "carla": "[######] 102% HOLD", "anna": "[####..] 66% HOLD", "ben": "[####..] 66% ok",
    }  # fmt: skip


@on_stores("go-policyd")
def test_a_quota_belongs_to_the_login_as_the_old_table_cuts_it(store: Store, tmp_path: Path) -> None:
    fill(store, Entry(1, "newslett", 90), Entry(2, "registra", 90), Entry(3, "rene", 3), Entry(4, "rené", 2))
    lines = ["quota=newsletter:100", "quota=registrar:10", "quota=registra:50", "defaultquota=10"]
    text = printed(run("top", "-c", settings_file(tmp_path, store.settings, *lines)))
    assert states(text) == {
        "newslett": "[#####.] 90% ok", "registra": "[######] 180% HOLD", "rene": "[#.....] 30% ok",
        r"ren\xe9": "[#.....] 20% ok",
    }  # fmt: skip


def test_what_was_forgiven_is_shown_apart(tmp_path: Path) -> None:
    settings = embedded(tmp_path, Entry(9, "anna", -1600), Entry(8, "anna", 4), Entry(7, "ben", 5), Entry(6, "ben", -1))
    rows = objects(run("top", "-c", settings_file(tmp_path, settings), "--json"))
    assert [(row["login"], row["recipients"], row["forgiven"], row["messages"]) for row in rows] == [
        ("anna", 4, 1600, 2), ("ben", 5, 1, 2),
    ]  # fmt: skip
    assert "\n     1600 recipients forgiven\n" in printed(run("top", "-c", settings_file(tmp_path, settings)))


def test_objects_have_the_columns_of_all_lists(tmp_path: Path) -> None:
    settings = embedded(tmp_path, *BORIS, Entry(1, "free", 7))
    rows = objects(run("top", "-c", settings_file(tmp_path, settings, "quota=free:unlimited"), "--json"))
    assert [{name: row[name] for name in ("rank", "login", "recipients", "messages", "clients", "quota", "state")}
            for row in rows] == [
        {"rank": 1, "login": "boris", "recipients": 1612, "messages": 4, "clients": 4, "quota": 1500, "state": "HOLD"},
        {"rank": 2, "login": "free", "recipients": 7, "messages": 1, "clients": 1, "quota": "unlimited", "state": "ok"},
    ]  # fmt: skip
    assert list(rows[0]["incidents"]) == ["HOLD overquota"]


@on_stores("SQLite", "schema.sql")
def test_nothing_in_a_login_can_talk_to_the_terminal(store: Store, tmp_path: Path) -> None:
    login = 'x"y,z' + "-" * 200
    fill(store, Entry(1, STRANGE_LOGIN, 3), Entry(2, login, 2))
    file = settings_file(tmp_path, store.settings)
    assert ranking(printed(run("top", "-c", file))) == [
        (STRANGE_LOGIN_SHOWN[:18] + ">", 3, 1),
        (login[:18] + ">", 2, 1),
    ]
    rows = csv.DictReader(run("top", "--csv", "-c", file).stdout.splitlines(), strict=True)
    assert [row["login"] for row in rows] == [STRANGE_LOGIN_SHOWN, login]
    result = run("top", "--json", "-c", file)
    assert re.fullmatch(r"[ -~\n]*", result.stdout)
    assert [row["login"] for row in objects(result)] == [STRANGE_LOGIN, login]


def test_an_empty_store_is_said_to_be_empty(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path, Entry(8 * DAY_S, "gone", 5)))
    assert "\nno message was counted in this time\n" in printed(run("top", "-w", "-c", file))
    assert objects(run("top", "-c", file, "--json")) == []


def test_a_running_daemon_is_counted_with_what_it_has_just_recorded(policyd: Callable[..., Policyd]) -> None:
    running = policyd(defaultquota=5)
    assert running.ask(sasl_username="anna", recipient_count=3) == "DUNNO"
    assert running.ask(sasl_username="ben", recipient_count=7) == HOLD
    text = printed(run("top", "-c", running.settings_file))
    assert ranking(text) == [("ben", 7, 1), ("anna", 3, 1)]
    assert "\n     HOLD overquota\n" in text
    assert facts(printed(run("user", "BEN@x", "-c", running.settings_file)))["state"] == "HOLD: overquota (7>5)"


def test_colour_is_for_a_terminal_only_and_not_with_no_color(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path, *SHARES))

    def on_a_terminal(**environment: str) -> str:
        terminal, side = os.openpty()
        subprocess.run(
            [sys.executable, str(ADMIN), "top", "-c", str(file)],
            stdout=side,
            env={**os.environ, "TERM": "xterm", **environment},
            check=True,
        )
        os.close(side)
        text = os.read(terminal, 65536).decode()
        os.close(terminal)
        return text

    assert "\x1b[31mREJECT\x1b[0m" in on_a_terminal(NO_COLOR="")
    assert "\x1b" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b" not in printed(run("top", "-c", file))


def test_an_answer_that_nobody_reads_to_its_end_is_no_traceback(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path, *(Entry(1, f"user{n}", 1) for n in range(3000))))
    command = f"{sys.executable} {ADMIN} top -n 9999 -c {file} | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# ---- user -----------------------------------------------------------------------------------------------------


def moment(age_s: float) -> str:
    """Return when that was, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() - age_s))


@on_each_table
def test_why_she_is_held_and_until_when(store: Store, tmp_path: Path) -> None:
    fill(store, *BORIS, Entry(60, "anna", 3), Entry(60, "boriss", 4), Entry(60, "bori", 5))
    file = settings_file(tmp_path, store.settings, "defaultquota=1500")
    line = file.read_text().splitlines().index("defaultquota=1500") + 1
    before = [moment(5 * HOUR_S), moment(-DAY_S + 5 * HOUR_S + 1800), moment(1800)]
    report = printed(run("user", "Boris@example.org", "-c", file))
    known = facts(report)
    assert {name: known[name] for name in ("login", "state", "quota", "quota set by", "refused from", "sum now")} == {
        "login": "boris", "state": "HOLD: overquota (1612>1500)", "quota": "1500 recipients in 24 hours",
        "quota set by": f"{file}:{line} defaultquota=", "refused from": "3000 (twice the quota)",
        "sum now": "1612 recipients, 4 messages, 107% of it",
    }  # fmt: skip
    after = [moment(5 * HOUR_S), moment(-DAY_S + 5 * HOUR_S + 1800), moment(1800)]
    for name, first, last in zip(("held since", "held until", "last message"), before, after):
        assert first <= known[name][:16] <= last, name
    assert known["held until"].endswith(", if nothing more is sent")
    hours = [int(words[1]) for words in rows_of(report, "recipients of the last 24 hours;")]
    assert {23 - n: number for n, number in enumerate(hours) if number} == {0: 400, 5: 1200, 20: 12}
    clients = rows_of(report, "client ")
    assert clients == [
        ["203.0.113.9", "new", "1", "700"], ["203.0.113.10", "new", "1", "500"], ["2001:db8::9", "new", "1", "400"],
        ["192.0.2.7", "1", "12"],
    ]  # fmt: skip
    assert [row[:3] for row in rows_of(report, "sender ")] == [
        ["bank@example.net", "2", "1200"], ["<>", "1", "400"], ["boris@example.org", "1", "12"],
    ]  # fmt: skip
    assert re.search(r"^in the queue  not known: .+$", report, re.MULTILINE)
    assert [command.split()[1] for command in commands_in(report)] == [
        "forgive",
        "held",
        "block",
        "delete",
        "trace",
        "unblock",
    ]
    (found,) = objects(run("user", "boris", "-c", file, "--json"))
    assert (found["login"], found["recipients"], found["quota"], found["state"]) == ("boris", 1612, 1500, "HOLD")
    assert [client["new"] for client in found["client"]] == [True, True, True, False]


@pytest.mark.parametrize(
    ("lines", "state", "quota", "refused"),
    [
        ([], "ok: messages go on", "1500 recipients in 24 hours", "3000 (twice the quota)"),
        (["quota=anna:0"], "HOLD: overquota (4>0)", "0: each message is held", None),
        (["quota=ANNA@a.org:unlimited"], "ok: messages go on", "unlimited: never held or refused for the sum", None),
        (["quota=anna:1"], "REJECT: overquota (4>2x1)", "1 recipients in 24 hours", "2 (twice the quota)"),
        (["defaultquota=3", "rejectquota=9"], "HOLD: overquota (4>3)", "3 recipients in 24 hours",
            "9 (FILE:3 rejectquota=)"),
        (["hourquota=4"], "HOLD: hourquota (4>4)", "1500 recipients in 24 hours", "3000 (twice the quota)"),
        (["blacklist=x", "blacklist=Anna"], "HOLD: blacklisted, line 3 of the settings", "1500 recipients in 24 hours",
         "3000 (twice the quota)"),
        (["strip_domain=no", "quota=@a.org:3"], None, "3 recipients in 24 hours", "6 (twice the quota)"),
    ],
)  # fmt: skip
def test_it_is_told_what_holds_her_and_which_line_says_so(
    tmp_path: Path, lines: list[str], state: str | None, quota: str, refused: str | None
) -> None:
    login = "anna@a.org" if "strip_domain=no" in lines else "anna"
    file = settings_file(tmp_path, embedded(tmp_path, Entry(60, login, 4)), *lines)
    known = facts(printed(run("user", "anna@a.org", "-c", file)))
    assert state in (None, known["state"])
    assert (known["quota"], known.get("refused from")) == (quota, refused and refused.replace("FILE", str(file)))
    where = next((n for n, line in enumerate(lines, start=2) if line.startswith(("quota=", "defaultquota="))), 0)
    assert known["quota set by"].startswith(f"{file}:{where} " if where else "policyd's default")


def test_whoever_is_in_too_many_places_is_held_until_a_day_after_the_incident(tmp_path: Path) -> None:
    settings = embedded(tmp_path, Entry(60, "anna", 4), incident(3600, "anna", "HOLD places"))
    known = facts(
        printed(run("user", "anna", "-c", settings_file(tmp_path, settings, "early_signs=yes", "keep_days=30")))
    )
    assert known["state"].startswith("HOLD: places (since ")
    assert known["held until"][:16] in (moment(-23 * HOUR_S), moment(-23 * HOUR_S + 60))
    assert "held until" not in facts(printed(run("user", "anna", "-c", settings_file(tmp_path, settings))))


def test_a_known_place_is_not_marked_as_new(tmp_path: Path) -> None:
    """Known is what was used more than a day ago, or forgiven; a trusted network is no place."""
    settings = embedded(
        tmp_path, Entry(2 * DAY_S, "anna", 1, client="192.0.2.1"), Entry(60, "anna", 1, client="192.9.9.9"),
        Entry(70, "anna", -1, client="198.51.100.1"), Entry(80, "anna", 1, client="198.18.0.1"),
        Entry(90, "anna", 1, client="203.0.113.1"), Entry(99, "anna", 1, client="10.0.0.1"),
    )  # fmt: skip
    file = settings_file(tmp_path, settings, "trusted_network=10.0.0.0/8")
    (found,) = objects(run("user", "anna", "--json", "-c", file))
    assert {client["client"] for client in found["client"] if client["new"]} == {"203.0.113.1"}


@on_each_table
def test_an_unknown_login_is_said(store: Store, tmp_path: Path) -> None:
    fill(store, Entry(60, "anna", 3))
    file = settings_file(tmp_path, store.settings, "blacklist=igor")
    for login in [
        "nobody",
        "an'na",
        "ann",
        "anna' OR '1'='1",
        "$(id)",
        "\\",
        "%",
        "_nna",
        "ANNA\u0301",
        "*",
        "Ann\xc9",
    ]:
        for command in ("user", "forgive", "unblock"):
            line = refusal(run(command, "-c", file, login))
            assert re.search(": unknown; no message of this login is kept in the |is not blocked", line), line
    assert facts(printed(run("user", "-c", file, "igor")))[
        "state"
    ] == "HOLD: blacklisted, line {} of the settings".format(file.read_text().splitlines().index("blacklist=igor") + 1)


@on_stores("SQLite", "schema.sql")
@pytest.mark.parametrize("given", ["JÜRGEN", "ju\u0308rgen", "jür\u00adgen@x.org", " jürgen", "UNI\\Jürgen"])
def test_a_login_is_read_as_policyd_reads_it(store: Store, tmp_path: Path, given: str) -> None:
    fill(store, Entry(60, "jürgen", 3))
    assert facts(printed(run("user", given, "-c", settings_file(tmp_path, store.settings))))["login"] == r"j\xfcrgen"


def test_a_login_with_its_domain_when_domains_are_kept(tmp_path: Path) -> None:
    settings = {**embedded(tmp_path, Entry(60, "anna@a.org", 1), Entry(60, "-c", 2)), "strip_domain": "no"}
    file = settings_file(tmp_path, settings)
    assert facts(printed(run("user", "Anna@A.org", "-c", file)))["login"] == "anna@a.org"
    assert refusal(run("user", "-c", file, "anna")).startswith("anna: unknown; ")
    assert facts(printed(run("user", "-c", file, "--", "-c")))["login"] == "-c"


@on_stores("go-policyd")
def test_a_login_is_looked_for_as_the_old_table_has_it(store: Store, tmp_path: Path) -> None:
    fill(store, Entry(60, "newslett", 3), Entry(60, "rené", 4), Entry(60, "rene", 5))
    file = settings_file(tmp_path, store.settings, "quota=newsletter:20000")
    known = facts(printed(run("user", "NewsLetter", "-c", file)))
    assert (known["login"], known["in the table"]) == ("newsletter", "newslett: all that begin so are one")
    assert known["quota"].startswith("20000 ")
    for login, number in (("newsletter", 3), ("rené", 4), ("rene", 5)):
        assert facts(printed(run("user", login, "-c", file)))["sum now"].startswith(f"{number} recipients")


@on_stores("SQLite", "schema.sql")
@pytest.mark.parametrize("login", HOSTILE, ids=lambda login: ascii(login[:20]))
def test_what_is_offered_to_paste_means_the_login_and_nothing_else(store: Store, tmp_path: Path, login: str) -> None:
    counted = policyd.login_of(login, False)
    fill(store, Entry(60, counted, 3), incident(60, counted, "HOLD overquota"))
    file = settings_file(tmp_path, {**store.settings, "strip_domain": "no"})
    report = printed(run("user", "-c", file, "--", login))
    (forgive, *_) = commands_in(report)
    for suffix, number in (("", 3), (" --yes", 0)):
        command = forgive.replace("forgive --release", f"forgive{suffix}")
        done = paste(command, tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done
        (row,) = (row for row in objects(run("top", "--json", "-c", file)) if row["login"] == counted)
        assert row["recipients"] == number
    assert not (tmp_path / "touched").exists()


# ---- what is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["foo"], ["-c"], ["top", "x"], ["top", "-n", "0"], ["top", "-n", "10000"], ["top", "-n"], ["top", "-x"],
        ["top", "--yes"],
        ["user"], ["user", ""], ["user", "a", "b"], ["user", "-x"], ["user", "--js", "a"], ["held", "--yes"],
        ["release"],
        ["delete", "--yes"], ["delete", ""], ["release", "a", "-y"], ["forgive"], ["block", "a", "b"], ["trace"],
        ["whatif"],
        ["whatif", "0"], ["whatif", "x"], ["whatif", "-1"], ["whatif", "1", "2"], ["whatif", "1", "--rejectquota", "0"],
        ["whatif", "1234567890"], ["mail"], ["mail", "nobody"], ["mail", "a@b", "--server", "a b"], ["doctor", "x"],
        ["mail", "a@b.c\nBcc: x@y.z"], ["mail", "a@b.c", "--from", "x"], ["--yes", "delete", "a"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_call_is_one_line(arguments: list[str]) -> None:
    assert refusal(run(*arguments), status=2).endswith(" --help")


def test_help_is_no_mistake_and_narrow() -> None:
    for command in (
        [],
        ["top"],
        ["user"],
        ["held"],
        ["release"],
        ["forgive"],
        ["block"],
        ["whatif"],
        ["mail"],
        ["doctor"],
    ):
        result = run(*command, "--help", COLUMNS="300")
        assert (result.returncode, result.stderr) == (0, "")
        assert "-c FILE" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
    assert run("--version").stdout == f"policyd-admin {policyd.__version__}\n"


def test_the_settings_may_be_named_before_or_after_the_command(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path, Entry(1, "anna", 1)))
    texts = {printed(run(*arguments)) for arguments in (["-c", file, "top"], ["top", "-c", file], ["top", f"-c{file}"])}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quota=anna\n", ":1: quota=anna"), ("defaultqouta=5\n", ":1: unknown setting defaultqouta"),
        ("\nmode=audti\n", ":2: mode=audti"),
        ("quota=a:1\nquota=a:2\n", ":2: "), (None, ": No such file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "command", [["top"], ["user", "a"], ["forgive", "a", "--yes"], ["block", "a", "--yes"], ["whatif", "5"]]
)
def test_a_mistake_in_the_settings_is_policyds_own_line_and_78(
    tmp_path: Path, command: list[str], text: str | None, message: str
) -> None:
    file = tmp_path / "policyd.cfg"
    if text is not None:
        file.write_text(text)
    assert refusal(run(*command, "-c", file), status=78).startswith(f"{file}{message}")


def test_a_store_that_cannot_be_used_is_one_line(tmp_path: Path, database: Database) -> None:
    def refused(settings: dict[str, str], *command: str) -> str:
        return refusal(run(*(command or ["top"]), "-c", settings_file(tmp_path, settings)))

    assert refused({"statedir": str(tmp_path)}).startswith(f"no {tmp_path}/events.sqlite3: ")
    assert not (tmp_path / "events.sqlite3").exists()
    (tmp_path / "events.sqlite3").write_text("not a database " * 100)
    assert refused({"statedir": str(tmp_path)}).endswith("file is not a database")
    for command in (["top"], ["user", "a"], ["block", "a", "--yes"], ["whatif", "5"]):
        assert "127.0.0.1: " in refused({**database.settings(), "dbport": str(free_port())}, *command)
    assert "Access denied" in refused({**database.settings(), "dbpass": "'wrong'"})
    assert "there is no table nowhere" in refused({**database.settings(), "policy_table": "nowhere"})


def test_the_password_is_not_in_the_arguments_or_the_environment_of_any_process(
    database: Database, tmp_path: Path
) -> None:
    file = settings_file(tmp_path, database.settings())
    with table_locked(database):
        command = [sys.executable, str(ADMIN), "top", "-c", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(0.5)
        for path in Path(f"/proc/{process.pid}").glob("[ce][mn][dv]*"):
            assert database.server.password.encode() not in path.read_bytes()
    assert process.wait(60) == 0
    process.communicate()


@on_stores("SQLite")
def test_looking_changes_nothing_and_the_store_stays_its_owners(store: Store, open_directory: Path) -> None:
    """Also the files beside it that SQLite makes, whoever looks or changes."""
    shutil.copy(store._path, open_directory)  # type: ignore[union-attr]
    path = open_directory / "events.sqlite3"
    fill(SQLiteStore(path), Entry(60, "anna", 5))
    for each in (open_directory, *open_directory.iterdir()):
        os.chown(each, NOBODY, -1)
    file = settings_file(open_directory, {"statedir": str(open_directory)})
    before = list(sqlite3.connect(path).iterdump())
    for command in (["top"], ["user", "anna"], ["whatif", "5"], ["forgive", "anna"], ["block", "anna"]):
        printed(run(*command, "-c", file))
    assert list(sqlite3.connect(path).iterdump()) == before
    printed(run("forgive", "anna", "--yes", "-c", file))
    assert {each.stat().st_uid for each in open_directory.iterdir() if each != file} == {NOBODY}


def test_who_may_not_read_is_told(open_directory: Path) -> None:
    file = settings_file(open_directory, embedded(open_directory, Entry(60, "anna", 5)))
    for each in (ADMIN, ROOT / "policyd.py"):
        (open_directory / each.parent.name).mkdir(exist_ok=True)
    shutil.copy(ADMIN, open_directory / "scripts")
    shutil.copy(ROOT / "policyd.py", open_directory)
    program = open_directory / "scripts" / "policyd-admin"
    file.chmod(0o600)
    line = refusal(run("top", "-c", file, program=program, user=NOBODY, cwd=open_directory), status=78)
    assert line.startswith(f"{file}: Permission denied; try: chown root:policyd ")
    file.chmod(0o644)
    (open_directory / "events.sqlite3").chmod(0o600)
    assert "unable to open database file" in refusal(
        run("top", "-c", file, program=program, user=NOBODY, cwd=open_directory)
    )
    line = refusal(run("held", "-c", file, program=program, user=NOBODY, cwd=open_directory))
    assert line == "only root may look into the queue; run this as root"


# ---- which policyd ------------------------------------------------------------------------------------------------


def test_the_policyd_that_belongs_to_it_is_found_and_no_other(tmp_path: Path) -> None:
    """Beside it, as a module, on the PATH: in this order; one of another version is refused, and not even run."""
    for name in ("bin", "sbin", "modules"):
        (tmp_path / name).mkdir()
    program = Path(shutil.copy(ADMIN, tmp_path / "sbin" / "policyd-admin"))
    file = settings_file(tmp_path, embedded(tmp_path, Entry(1, "anna", 1)))
    path = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "modules")}
    text = (ROOT / "policyd.py").read_text()
    foreign = "import pathlib\npathlib.Path(__file__).with_suffix('.was_run').touch()\n"

    def asked() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-IS", "-c", f"""
import os, runpy, sys
sys.path.insert(0, {path['PYTHONPATH']!r})
sys.argv = [{str(program)!r}, "top", "-c", {str(file)!r}]
runpy.run_path({str(program)!r}, run_name="__main__")
"""], env={**os.environ, **path}, capture_output=True, text=True)  # fmt: skip

    assert asked().returncode == 1
    (tmp_path / "bin" / "policyd").write_text(text)
    (tmp_path / "bin" / "policyd").chmod(0o755)
    assert "anna" in printed(asked())
    assert not (tmp_path / "bin" / "__pycache__").exists()
    for place, older in (("modules/policyd.py", "0.1.0"), ("policyd.py", "0.3.0")):
        (tmp_path / place).write_text(
            text.replace(f'__version__ = "{policyd.__version__}"', f'__version__ = "{older}"') + foreign
        )
        line = refusal(asked())
        assert line == (f"{tmp_path}/{place} is policyd {older}, and this is policyd-admin {policyd.__version__};"
                        " install both from one release")  # fmt: skip
        (tmp_path / place).write_text(text)
        assert "anna" in printed(asked())
    (tmp_path / "policyd.py").write_bytes(b"\x7fELF\0\0\0")
    assert refusal(asked()).startswith(f"{tmp_path}/policyd.py is another program, and this is ")
    assert not list(tmp_path.rglob("*.was_run"))


def test_the_script_finds_it_beside_itself_or_on_the_path(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path, Entry(1, "anna", 1)))
    for name in ("bin", "alone"):
        (tmp_path / name).mkdir()
    link = tmp_path / "bin" / "top20"
    link.symlink_to(TOP20)
    assert ranking(printed(scripting.run("-c", file, program=link))) == [("anna", 1, 1)] if link.suffix else True
    alone = Path(shutil.copy(TOP20, tmp_path / "alone"))
    (tmp_path / "bin" / "policyd-admin").symlink_to(ADMIN)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert ranking(printed(run("-c", file, program=alone, PATH=path))) == [("anna", 1, 1)]
    assert run("-x", program=TOP20).returncode == 2


def test_shellcheck_has_nothing_to_say_of_the_script() -> None:
    subprocess.run(["shellcheck", str(TOP20)], check=True)


def test_a_table_of_very_many_rows_is_read_in_seconds(mariadb: MariaDB, database: Database, tmp_path: Path) -> None:
    database.query("INSERT INTO events SELECT NOW(3) - INTERVAL seq SECOND, CONCAT('u', seq % 5000), '',"
                   " CONCAT('10.0.0.', seq % 9), 1"
                   " FROM seq_1_to_80000")  # fmt: skip
    began = time.monotonic()
    assert len(ranking(printed(run("top", "-c", settings_file(tmp_path, database.settings()))))) == 20
    assert time.monotonic() - began < 20
