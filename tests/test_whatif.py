"""scripts/policyd-whatif.sh: what another quota would have done, message by message as policyd decides."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import scripting
from scripting import (
    COMMON,
    DAY_S,
    HOUR_S,
    SCRIPTS,
    SHELLS,
    STORES,
    STRANGE_LOGIN,
    STRANGE_LOGIN_SHOWN,
    Entry,
    Row,
    Store,
    fill_mariadb,
    fill_store,
    make_store,
    printed,
    refusal,
    settings_file,
)
from servers import Database, MariaDB, free_port, program

from policyd import DUNNO, HOLD, decide

WHATIF = SCRIPTS / "policyd-whatif.sh"
NEVER = 10**18


def run(*arguments: object, script: Path = WHATIF, **how: object) -> subprocess.CompletedProcess[str]:
    return scripting.run(script, *arguments, **how)  # type: ignore[arg-type]


class Line(NamedTuple):
    """One line of the table: a login on a day."""

    day: str
    login: str
    held: int
    refused: int
    recipients: int
    peak: int


class Totals(NamedTuple):
    logins: int
    held: int
    refused: int
    recipients: int
    went_on: int


def replay(
    store: Store, rows: list[Row], limits: tuple[int, int], own: dict[str, tuple[int, int]] | None = None
) -> tuple[list[Line], Totals]:
    """Decide on every row with policyd's own function, the sums taken anew for each."""
    days: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    totals = [0, 0, 0, 0]
    for number, row in enumerate(rows):
        if not row.recipients:
            continue
        before = rows[: number + 1]
        sum_ = sum(
            other.recipients or 0
            for other in before
            if other.login == row.login and other.ts > row.ts - DAY_S * 1000
        )
        action = decide(sum_, *(own or {}).get(row.login, limits))
        day = days[store.moment(row.ts)[:10], row.login]
        day[3] = max(day[3], sum_)
        if action == DUNNO:
            totals[3] += 1
            continue
        day[0 if action == HOLD else 1] += 1
        totals[0 if action == HOLD else 1] += 1
        day[2] += row.recipients
        totals[2] += row.recipients
    lines = [Line(*key, *day) for key, day in days.items() if day[0] + day[1]]
    lines.sort(key=lambda line: (line.day, -line.recipients, line.login.encode()))
    return lines, Totals(len({line.login for line in lines}), *totals)


def report(text: str) -> tuple[list[Line], Totals, Totals]:
    """Return the table and the totals with the other quota and as it is."""
    lines = []
    for match in re.finditer(r"^(\d{4}-\d\d-\d\d) (\S+) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE):
        lines.append(Line(match[1], match[2], *map(int, match.groups()[2:])))
    new, now = (
        Totals(*map(int, re.search(rf"^{name} +\d+ +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE).groups()))  # type: ignore[union-attr]
        for name in ("quota", "as it is,")
    )
    return lines, new, now


def plausible(seed: int) -> list[Entry]:
    """Invent two hundred messages of a week, their times far enough from each other."""
    chance = random.Random(seed)
    return [
        Entry(
            60 + number * 3001 + chance.randrange(3000), chance.choice(["anna", "ben", "carla", "newslett"]),
            chance.choice([None, 0, 1, 1, 2, 5, 40, 300]),
        )
        for number in range(200)
    ]  # fmt: skip


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request, tmp_path)


@STORES
def test_every_message_is_decided_as_policyd_decides(store: Store) -> None:
    store.fill(*plausible(seed=5))
    settings = store.settings("quota=newsletter:700", "quota=newslett:800", "quota=carla:unlimited", "quota=ben:0")
    own = {"newslett": (800, 1600), "carla": (NEVER, NEVER), "ben": (0, NEVER)}
    rows = store.rows()
    for quota, shell in ((300, "dash"), (900, "bash")):
        text = printed(run("-c", settings, quota, shell=shell))
        lines, new = replay(store, rows, (quota, 2 * quota), own)
        _, now = replay(store, rows, (1500, 3000), own)
        assert report(text) == (lines, new, now)
        assert new.held
    assert f"\nEvents are kept from {store.moment(rows[0].ts)[:10]} to {store.moment(rows[-1].ts)[:10]};" in text
    assert "\nLogins with a quota= of their own keep it: 3.\n" in text


@STORES
def test_rejectquota_is_that_of_the_call_or_of_the_settings_or_twice_the_quota(store: Store) -> None:
    store.fill(*plausible(seed=7))
    rows = store.rows()
    settings = store.settings("rejectquota=2000")
    for arguments, quota, reject in ((["500"], 500, 2000), (["-r", "501", "500"], 500, 501), (["2000"], 2000, 2000)):
        lines, new, now = report(printed(run("-c", settings, *arguments)))
        assert (lines, new) == replay(store, rows, (quota, reject))
        assert now == replay(store, rows, (1500, 2000))[1]
    line = refusal(run("-c", settings, "2001"))
    number = settings.read_text().splitlines().index("rejectquota=2000") + 1
    assert line == f"{settings}:{number}: rejectquota=2000 is below 2001; give -r REJECT too"


@STORES
def test_a_message_exactly_24_hours_old_is_out_of_the_sum(store: Store) -> None:
    """Strictly newer counts; and one millisecond makes the difference."""
    day, tick = 86_400_000, 1_700_000_000_123
    times = [(tick, "out"), (tick + day, "out"), (tick, "in"), (tick + day - 1, "in")]
    if store.database:
        for ts, login in times:
            store.database.query(
                "INSERT INTO events (ts, sasl_username, recipient_count)"
                " VALUES ('1970-01-01' + INTERVAL %s * 1000 MICROSECOND, %s, 5)",
                (ts, login),
            )
    else:
        fill_store(store.directory, [])
        import sqlite3

        with sqlite3.connect(store.directory / "events.sqlite3") as connection:
            connection.executemany("INSERT INTO events VALUES (?, ?, '', '', 5)", times)
        connection.close()
    lines, new, _ = report(printed(run("-c", store.settings(), "6")))
    assert [(line.login, line.held, line.peak) for line in lines] == [("in", 1, 10)]
    assert new == Totals(1, 1, 0, 5, 3)


def test_a_number_may_begin_with_zeros(tmp_path: Path) -> None:
    fill_store(tmp_path, [Entry(60, "anna", 9), Entry(70, "anna", 9)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, "defaultquota=010")
    for arguments in (["010"], ["-r", "020", "0010"], ["10"]):
        text = printed(run("-c", settings, *arguments))
        assert text.startswith("Had the quota been 10, and mail refused from 20 on\n")
        assert report(text)[1:] == (Totals(1, 1, 0, 9, 1),) * 2


def test_without_a_message_it_says_so(tmp_path: Path) -> None:
    fill_store(tmp_path, [Entry(60, "anna", 0)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    assert printed(run("-c", settings, "1")).endswith("\nno message is kept\n")
    fill_store(tmp_path, [Entry(60, "anna", 5)])
    text = printed(run("-c", settings, "6"))
    assert "\nno message would have been held or refused\n" in text
    assert report(text) == ([], Totals(0, 0, 0, 0, 1), Totals(0, 0, 0, 0, 1))


def test_logins_that_only_the_old_collation_takes_for_the_same_are_told_apart(
    old_database: Database, tmp_path: Path
) -> None:
    fill_mariadb(old_database, [Entry(60 * n, login, 3) for n, login in enumerate(["rene", "rené", "RENE", "rene"])])
    lines, *_ = report(printed(run("-c", settings_file(tmp_path, old_database.settings()), "4")))
    assert [(line.login, line.held, line.peak) for line in lines] == [("rene", 1, 6)]


def test_nothing_in_a_login_can_talk_to_the_terminal(tmp_path: Path) -> None:
    fill_store(tmp_path, [Entry(60, STRANGE_LOGIN, 3)])
    lines, *_ = report(printed(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}), "3")))
    assert [line.login for line in lines] == [STRANGE_LOGIN_SHOWN[:27] + ">"]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    before = fill_store(tmp_path, plausible(seed=1)).read_bytes()
    printed(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}), "10"))
    assert (tmp_path / "events.sqlite3").read_bytes() == before


def test_the_report_is_the_same_with_another_awk(tmp_path: Path) -> None:
    fill_store(tmp_path, [*plausible(seed=3), *(Entry(HOUR_S + n, "huge", 999_999) for n in range(5000))])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    reports = set()
    for name in ("mawk", "gawk"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "awk").symlink_to(program(name, name))
        environment = {"PATH": f"{tmp_path / name}:/usr/bin:/bin"}
        reports.add(printed(run("-c", settings, "10", environment=environment)))
    assert len(reports) == 1
    assert f" {5000 * 999_999}\n" in reports.pop()  # the peak: beyond what 32 bits hold


# --- what is wrong ---


@SHELLS
@pytest.mark.parametrize(
    "arguments",
    [[], ["0"], ["x"], ["1", "2"], ["-r", "0", "1"], ["-r"], ["-x", "1"], ["1234567890"], ["-1"], ["1", "-r", "2"]],
)
def test_a_wrong_call_gets_the_usage(arguments: list[str], shell: str) -> None:
    result = run(*arguments, shell=shell)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Usage: policyd-whatif.sh [-c FILE] [-r REJECT] QUOTA\n" in result.stderr


@SHELLS
def test_help_is_no_mistake(shell: str) -> None:
    assert printed(run("-h", shell=shell)).startswith("Usage: policyd-whatif.sh [-c FILE] [-r REJECT] QUOTA\n")


@SHELLS
def test_what_cannot_be_read_is_one_line(database: Database, mariadb: MariaDB, tmp_path: Path, shell: str) -> None:
    def refused(settings: dict[str, str], *arguments: str) -> str:
        return refusal(run("-c", settings_file(tmp_path, settings), *arguments or ["5"], shell=shell))

    assert refused({"statedir": str(tmp_path)}).startswith(f"no events.sqlite3 in {tmp_path}: ")
    (tmp_path / "events.sqlite3").write_text("not a database " * 100)
    assert refused({"statedir": str(tmp_path)}).endswith("file is not a database (26) ")
    assert refused({"statedir": str(tmp_path), "quota": "a"}).startswith(f"{tmp_path}/policyd.cfg:2: quota=a is not ")
    assert "nowhere' doesn't exist" in refused({**database.settings(), "policy_table": "nowhere"})
    assert ": 2002 " in refused({**database.settings(), "dbport": str(free_port())})
    assert refused({}, "-r", "4", "5") == "-r 4 is below 5; mail is held first, then refused"
    # Readable at the first look, not at the second one: the columns beside the login.
    mariadb.query("CREATE OR REPLACE USER 'half'@'127.0.0.1' IDENTIFIED BY 'x'")
    mariadb.query(f"GRANT SELECT (sasl_username) ON {database.name}.events TO 'half'@'127.0.0.1'")
    line = refused({**database.settings(), "dbuser": "half", "dbpass": "x"})
    assert line.startswith(f"cannot read {database.name}.events on 127.0.0.1: ")
    assert "denied" in line


def test_a_missing_file_of_common_functions_is_said(tmp_path: Path) -> None:
    script = Path(shutil.copy(WHATIF, tmp_path))
    assert refusal(run("5", script=script)) == f"{tmp_path}/{COMMON.name} is missing; install it beside this script"
