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
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripting import (
    ADMIN,
    DAY_S,
    ENVIRONMENT,
    HOSTILE,
    HOUR_S,
    STRANGE_LOGIN,
    STRANGE_LOGIN_SHOWN,
    Entry,
    commands_in,
    embedded,
    facts,
    fill,
    incident,
    objects,
    pasted,
    printed,
    refusal,
    rows_of,
    run,
    run_process,
    settings_file,
)
from servers import ROOT, Database, free_port, temporary_directory
from stores import Store, on_stores

import policyd

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


def ranking(text: str) -> list[tuple[str, int, int]]:
    """Return the lines of top's table as (login, recipients, messages), in their order."""
    rows = [row for row in rows_of(text, "rank ") if len(row) > 5]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [(row[1], int(row[2]), int(row[3])) for row in rows]


def states(file: Path) -> dict[str, str]:
    """Return share and state of each login."""
    return {row[1]: " ".join(row[5:]) for row in rows_of(printed(run("top", "-c", file)), "rank ") if len(row) > 5}


def report(file: Path, login: str) -> dict[str, str]:
    """Return the facts about a login."""
    return facts(printed(run("user", "-c", file, "--", login)))


# ---- top ------------------------------------------------------------------------------------------------------


@on_both
def test_the_twenty_logins_with_the_most_recipients(store: Store, tmp_path: Path) -> None:
    fill(store, *ENTRIES)
    file = settings_file(tmp_path, store.settings)
    text = printed(run("top", "-c", file))
    assert ranking(text) == OF_24_H
    assert text.startswith("The 20 logins with the most recipients of the last 24 hours\n")
    assert ranking(printed(run("-c", file, "top", "-w"))) == OF_7_DAYS
    text = printed(run("top", "-n3", f"-wc{file}"))
    assert ranking(text) == OF_7_DAYS[:3]
    assert text.startswith("The 3 logins with the most recipients of the last 7 days\n")
    assert len(ranking(printed(run("top", "-n", "9999", "-c", file)))) == 25
    rows = list(csv.DictReader(run("top", "--csv", "-n2", "-wc", file).stdout.splitlines()))
    assert [(row["login"], row["recipients"], row["recipients_24h"]) for row in rows] == [
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
    "almost": "[######] 199% HOLD", "reached": "[######] 100% HOLD", "below": "[#####.] 99% ok",
    "half": "[###...] 50% ok", "none": "all is held HOLD", "printer": "[######] 200% REJECT",
    "thief": "[......] 0% HOLD", "early": "[......] 0% ok",
}  # fmt: skip
ALWAYS = ["whitelist_days=1-7", "whitelist_hours=0-24"]


def test_each_login_has_the_share_of_its_quota_and_what_policyd_would_answer_now(tmp_path: Path) -> None:
    settings = embedded(tmp_path, *SHARES, Entry(7200, "late", 30), Entry(7200, "late", -700)).settings

    def found(*lines: str) -> dict[str, str]:
        return states(settings_file(tmp_path, settings, *lines))

    assert found(*OWN) == {**STATES, "late": "[......] 2% ok"}
    assert {login: text for login, text in found("mode=audit", *OWN).items() if not text.endswith("ok")} == {
        login: text if login == "thief" else re.sub("(HOLD|REJECT)$", r"would \1", text)
        for login, text in STATES.items() if not text.endswith("ok")
    }  # fmt: skip
    listed = found("early_signs=yes", "blacklist=@spam.example", "blacklist=half", "whitelist=thief", *ALWAYS)
    assert (listed["early"], listed["half"], listed["thief"]) == (
        "[......] 0% HOLD", "[###...] 50% HOLD", "[......] 0% ok",
    )  # fmt: skip
    audit = found("early_signs=audit")
    assert (audit["early"], audit["thief"]) == ("[......] 0% would HOLD", "[......] 0% HOLD")
    hourly = found("hourquota=20", "defaultquota=45", "rejectquota=50", "quota=printer:30:60")
    assert (hourly["printer"], hourly["late"], hourly["half"]) == (
        "[######] 133% HOLD", "[####..] 66% ok", "[######] >999% REJECT",
    )  # fmt: skip


def test_objects_have_the_columns_of_all_lists_and_what_was_forgiven_stands_apart(tmp_path: Path) -> None:
    store = embedded(tmp_path, *BORIS, Entry(9, "anna", -160), Entry(8, "anna", 4), Entry(1, "free", 7))
    file = settings_file(tmp_path, store.settings, "quota=free:unlimited")
    names = ("rank", "login", "recipients", "forgiven", "messages", "clients", "quota", "state")
    rows = objects(run("top", "-c", file, "--json"))
    assert [tuple(row[name] for name in names) for row in rows] == [
        (1, "boris", 1612, 0, 4, 4, 1500, "HOLD"), (2, "anna", 4, 160, 2, 1, 1500, "ok"),
        (3, "free", 7, 0, 1, 1, "unlimited", "ok"),
    ]  # fmt: skip
    assert list(rows[0]["incidents"]) == ["HOLD overquota"]
    text = printed(run("top", "-c", file))
    assert "\n     HOLD overquota\n" in text
    assert "\n     160 recipients forgiven\n" in text
    store.clear()
    fill(store, Entry(8 * DAY_S, "gone", 5))
    assert "\nno message was counted in this time\n" in printed(run("top", "-w", "-c", file))
    assert objects(run("top", "-c", file, "--json")) == []


@on_both
def test_nothing_in_a_login_can_talk_to_the_terminal(store: Store, tmp_path: Path) -> None:
    login = 'x"y,z' + "-" * 200
    fill(store, Entry(1, STRANGE_LOGIN, 3, STRANGE_LOGIN), Entry(2, login, 2))
    file = settings_file(tmp_path, store.settings)
    shown = [(STRANGE_LOGIN_SHOWN[:18] + ">", 3, 1), (login[:18] + ">", 2, 1)]
    assert ranking(printed(run("top", "-c", file))) == shown
    rows = csv.DictReader(run("top", "--csv", "-c", file).stdout.splitlines(), strict=True)
    assert [row["login"] for row in rows] == [STRANGE_LOGIN_SHOWN, login]
    assert [row["login"] for row in objects(run("top", "--json", "-c", file))] == [STRANGE_LOGIN, login]
    assert report(file, STRANGE_LOGIN)["login"] == STRANGE_LOGIN_SHOWN
    assert f" {STRANGE_LOGIN_SHOWN[:27]}>" in printed(run("whatif", "3", "-c", file))


def test_who_hangs_up_gets_no_traceback(tmp_path: Path) -> None:
    store = embedded(tmp_path)
    store.add([(f"user{n}", "", "", 1) for n in range(1000)], 1)
    file = settings_file(tmp_path, store.settings)
    done = run_process("sh", "-c", f"{sys.executable} {ADMIN} top -n 9999 -c {file} | head -1")
    assert (done.stdout[:10], done.stderr) == ("The 9999 l", "")


# ---- user -----------------------------------------------------------------------------------------------------


def moment(age_s: float) -> str:
    """Return when that was, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() - age_s))


@on_both
def test_why_she_is_held_and_until_when(store: Store, tmp_path: Path) -> None:
    ages = {"held_since": 5 * HOUR_S, "held_until": -DAY_S + 5 * HOUR_S + 1800}
    before = list(map(moment, ages.values()))
    fill(store, *BORIS, Entry(60, "anna", 3), Entry(60, "boriss", 4), Entry(60, "bori", 5))
    file = settings_file(tmp_path, store.settings, "defaultquota=1500")
    line = file.read_text().splitlines().index("defaultquota=1500") + 1
    text = printed(run("user", "Boris@example.org", "-c", file))
    known = facts(text)
    expected = {
        "login": "boris", "state": "HOLD", "why": "overquota (1612>1500)", "quota": "1500", "reject": "3000",
        "set_by": f"{file}:{line} defaultquota", "recipients": "1612", "recipients_1h": "400", "messages": "4",
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
    (found,) = objects(run("user", "boris", "-c", file, "--json"))
    assert (found["login"], found["recipients"], found["quota"], found["state"]) == ("boris", 1612, 1500, "HOLD")
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
    (["blacklist=x", "blacklist=Anna"], "HOLD: blacklisted, line 3 of the settings", "1500 3000 unlimited", "default"),
    (["strip_domain=no", "quota=@a.org:3"], "HOLD: overquota (4>3)", "3 6 unlimited", "FILE:3 quota=@a.org"),
])  # fmt: skip
def test_it_is_told_what_holds_her_and_which_line_says_so(
    tmp_path: Path, lines: list[str], state: str, limits: str, by: str
) -> None:
    login = "anna@a.org" if "strip_domain=no" in lines else "anna"
    file = settings_file(tmp_path, embedded(tmp_path, Entry(60, login, 4)).settings, *lines)
    known = report(file, "anna@a.org")
    assert f"{known['state']}: {known['why']}" == state
    assert " ".join(known[name] for name in ("quota", "reject", "hourquota")) == limits
    assert known["set_by"] == by.replace("FILE", str(file))


def test_whoever_is_in_too_many_places_is_held_until_a_day_after_the_incident(tmp_path: Path) -> None:
    settings = embedded(tmp_path, Entry(60, "anna", 4), incident(3600, "anna", "HOLD places")).settings
    known = report(settings_file(tmp_path, settings, "early_signs=yes", "keep_days=30"), "anna")
    assert known["why"].startswith("places (since ")
    assert known["held_until"][:16] in (moment(-23 * HOUR_S), moment(-23 * HOUR_S + 60))
    assert report(settings_file(tmp_path, settings), "anna")["held_until"] == ""


def test_a_known_place_is_not_marked_as_new(tmp_path: Path) -> None:
    """Known is what was used more than a day ago, or forgiven; a trusted network is no place."""
    store = embedded(
        tmp_path, Entry(2 * DAY_S, "anna", 1, client="192.0.2.1"), Entry(60, "anna", 1, client="192.9.9.9"),
        Entry(70, "anna", -1, client="198.51.100.1"), Entry(80, "anna", 1, client="198.18.0.1"),
        Entry(90, "anna", 1, client="203.0.113.1"), Entry(99, "anna", 1, client="10.0.0.1"),
    )  # fmt: skip
    file = settings_file(tmp_path, store.settings, "trusted_network=10.0.0.0/8")
    (found,) = objects(run("user", "anna", "--json", "-c", file))
    assert {client["client"] for client in found["client"] if client["new"]} == {"203.0.113.1"}


@on_stores("SQLite", "go-policyd")
def test_an_unknown_login_is_said(store: Store, tmp_path: Path) -> None:
    fill(store, Entry(60, "anna", 3))
    file = settings_file(tmp_path, store.settings, "blacklist=igor")
    for login in ("nobody", "ann", "anna' OR '1'='1", "$(id)", "\\", "%", "_nna", "ANNA\u0301", "*", "Ann\xc9"):
        for command in ("user", "forgive", "unblock"):
            assert ": unknown; no message of this login is kept in the " in refusal(run(command, "-c", file, login))
    line = file.read_text().splitlines().index("blacklist=igor") + 1
    assert report(file, "igor")["why"] == f"blacklisted, line {line} of the settings"


@on_both
def test_a_login_is_read_as_policyd_reads_it(store: Store, tmp_path: Path) -> None:
    fill(store, Entry(60, "jürgen", 3), Entry(60, "anna@a.org", 1), Entry(60, "-c", 2))
    file = settings_file(tmp_path, store.settings)
    for given in ("JÜRGEN", "ju\u0308rgen", "jür\u00adgen@x.org", " jürgen", "UNI\\Jürgen"):
        assert report(file, given)["login"] == r"j\xfcrgen"
    assert report(file, "-c")["login"] == "-c"
    file = settings_file(tmp_path, {**store.settings, "strip_domain": "no"})
    assert report(file, "Anna@A.org")["login"] == "anna@a.org"
    assert refusal(run("user", "-c", file, "anna")).startswith("anna: unknown; ")


@on_stores("go-policyd")
def test_an_old_table_has_logins_and_quotas_as_it_cuts_them(store: Store, tmp_path: Path) -> None:
    entries = {"newslett": 90, "registra": 91, "rene": 3, "rené": 2}
    fill(store, *(Entry(60, login, number) for login, number in entries.items()))
    lines = ["quota=newsletter:100", "quota=registrar:10", "quota=registra:50", "defaultquota=10"]
    file = settings_file(tmp_path, store.settings, *lines)
    assert states(file) == {
        "newslett": "[#####.] 90% ok", "registra": "[######] 182% HOLD", "rene": "[#.....] 30% ok",
        r"ren\xe9": "[#.....] 20% ok",
    }  # fmt: skip
    known = report(file, "NewsLetter")
    assert (known["login"], known["quota"]) == ("newsletter", "100")
    for login, number in entries.items():
        assert report(file, login)["recipients"] == str(number)
    before = "The table keeps 8 characters: all logins that begin with newslett are meant\n"
    assert all(printed(run(command, "newsletter", "-c", file)).startswith(before) for command in ("block", "forgive"))


def test_what_is_offered_to_paste_means_the_login_and_nothing_else(tmp_path: Path) -> None:
    store, logins = embedded(tmp_path), [policyd.login_of(login, False) for login in HOSTILE]
    store.add([(login, "", *rest) for login in logins for rest in (("192.0.2.1", 3), ("HOLD places", None))], 60)
    file = settings_file(tmp_path, {**store.settings, "strip_domain": "no"})
    commands = [commands_in(printed(run("user", "-c", file, "--", login)))[0] for login in HOSTILE]
    assert all(command.startswith("policyd-admin forgive --release ") for command in commands)
    for login, (command, option, *words) in zip(logins, pasted(commands, tmp_path)):
        assert (command, option, words[-1]) == ("forgive", "--release", login)
        printed(run(command, "--yes", *words))
        assert sorted(row[3] for row in store.rows() if row[0] == login and row[2] != "forgiven") == [-3, 0]
    assert len(store.rows()) == 3 * len(logins)


# ---- what is wrong ----------------------------------------------------------------------------------------------

WRONG_CALLS = """ |foo|-c|top x|top -n 0|top -n|top -x|top --yes|user|user a b|user -x|user --js a|trace
held --yes|release|delete --yes|release a -y|forgive|block a b|whatif|whatif 0|whatif x|whatif -1|whatif 1 2|doctor x
whatif 1 --rejectquota 0|whatif 1234567890|mail|mail nobody|mail a@b.c --from x|--yes delete a"""


def test_a_wrong_call_is_one_line_and_help_is_no_mistake() -> None:
    calls = [call.split() for call in re.split(r"[|\n]", WRONG_CALLS)]
    for arguments in (*calls, ["user", ""], ["delete", ""], ["mail", "a@b.c\nBcc: x@y.z"]):
        assert refusal(run(*arguments), status=2).endswith(" --help")
    for command in ("", "top", "user", "held", "release", "forgive", "block", "trace", "whatif", "mail", "doctor"):
        result = run(*command.split(), "--help", COLUMNS="300")
        assert (result.returncode, result.stderr) == (0, "")
        assert "-c FILE" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80
    assert run("--version").stdout == f"policyd-admin {policyd.__version__}\n"


def test_a_mistake_in_the_settings_is_policyds_own_line_and_78(tmp_path: Path) -> None:
    file = tmp_path / "policyd.cfg"
    commands = ["top", "user a", "forgive a --yes", "block a --yes", "whatif 5", "doctor", "held"]
    for text, message in (
        (None, ": No such file"), ("quota=anna\n", ":1: quota=anna"), ("\nmode=audti\n", ":2: mode=audti"),
        ("defaultqouta=5\n", ":1: unknown setting defaultqouta"), ("quota=a:1\nquota=a:2\n", ":2: "),
    ):  # fmt: skip
        if text is not None:
            file.write_text(text)
        for command in commands:
            assert refusal(run(*command.split(), "-c", file), status=78).startswith(f"{file}{message}")


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


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may look into, unlike pytest's own."""
    directory = temporary_directory()
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_looking_changes_nothing_the_store_stays_its_owners_and_who_may_not_read_is_told(open_directory: Path) -> None:
    """Also the files beside the store that SQLite makes, whoever looks or changes."""
    path, program = open_directory / "events.sqlite3", open_directory / "scripts" / "policyd-admin"
    file = settings_file(open_directory, embedded(open_directory, Entry(60, "anna", 5)).settings)
    for each in (open_directory, *open_directory.iterdir()):
        os.chown(each, NOBODY["user"], -1)
    before = list(sqlite3.connect(path).iterdump())
    for command in (["top"], ["user", "anna"], ["whatif", "5"], ["forgive", "anna"], ["block", "anna"]):
        printed(run(*command, "-c", file))
    assert list(sqlite3.connect(path).iterdump()) == before
    printed(run("forgive", "anna", "--yes", "-c", file))
    assert {each.stat().st_uid for each in open_directory.iterdir()} == {NOBODY["user"]}
    program.parent.mkdir()
    shutil.copy(ADMIN, program)
    shutil.copy(ROOT / "policyd.py", open_directory)

    def refused(command: str, status: int = 1) -> str:  # by the system's Python, since root's is not for everybody
        words = ["/usr/bin/python3", program, command, "-c", file]
        return refusal(run_process(*words, cwd=open_directory, **NOBODY), status)

    os.chown(path, 0, 0)
    path.chmod(0o600)
    assert "unable to open database file" in refused("top")
    os.chown(file, 0, 0)
    file.chmod(0o600)
    assert refused("top", status=78).startswith(f"{file}: Permission denied; try: chown root:policyd ")


# ---- which policyd ------------------------------------------------------------------------------------------------


def test_the_policyd_that_belongs_to_it_is_found_and_no_other(tmp_path: Path) -> None:
    """Beside it, as a module, on the PATH: in this order; one of another version is refused, and not even run."""
    for name in ("bin", "sbin", "modules"):
        (tmp_path / name).mkdir()
    program = str(shutil.copy(ADMIN, tmp_path / "sbin" / "policyd-admin"))
    file = settings_file(tmp_path, embedded(tmp_path, Entry(1, "anna", 1)).settings)
    text, version = (ROOT / "policyd.py").read_text(), policyd.__version__
    foreign = "import pathlib\npathlib.Path(__file__).with_suffix('.was_run').touch()\n"
    script = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path / 'modules')!r});"
        f" sys.argv = [{program!r}, 'top', '-c', {str(file)!r}]; runpy.run_path({program!r}, run_name='__main__')"
    )

    def asked() -> subprocess.CompletedProcess[str]:
        return run_process(sys.executable, "-IS", "-c", script, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})

    assert asked().returncode == 1
    (tmp_path / "bin" / "policyd").write_text(text)
    (tmp_path / "bin" / "policyd").chmod(0o755)
    assert "anna" in printed(asked())
    assert not (tmp_path / "bin" / "__pycache__").exists()
    for place, other in (("modules/policyd.py", "0.1.0"), ("policyd.py", "0.3.0")):
        (tmp_path / place).write_text(text.replace(f'__version__ = "{version}"', f'__version__ = "{other}"') + foreign)
        line = f"{tmp_path}/{place} is not policyd {version}, as this is; install both from one release"
        assert refusal(asked()) == line
        (tmp_path / place).write_text(text)
    (tmp_path / "policyd.py").write_bytes(b"\x7fELF\0\0\0")
    assert refusal(asked()).startswith(f"{tmp_path}/policyd.py is not policyd ")
    assert not list(tmp_path.rglob("*.was_run"))


def test_the_script_of_the_cron_jobs_finds_it_beside_itself_or_on_the_path(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path, Entry(1, "anna", 1), Entry(2 * DAY_S, "ben", 2)).settings)
    alone = shutil.copy(TOP20, tmp_path)
    (tmp_path / "policyd-admin").symlink_to(ADMIN)
    path = {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    assert ranking(printed(run_process("sh", alone, "-c", file, env=path))) == [("anna", 1, 1)]
    assert ranking(printed(run_process("sh", TOP20, "-n1", "-wc", file))) == [("ben", 2, 1)]
    assert run_process("sh", TOP20, "-x").returncode == 2
