"""scripts/policyd-top20.sh: the right twenty logins, and one clear line for whatever is wrong."""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
import scripting
from scripting import (
    COMMON,
    DAY_S,
    NOBODY,
    SCRIPTS,
    STORES,
    STRANGE_LOGIN,
    STRANGE_LOGIN_SHOWN,
    Entry,
    Store,
    copy_scripts,
    directory_of_programs,
    fill_mariadb,
    fill_store,
    make_store,
    printed,
    refusal,
    settings_file,
)
from servers import Database, MariaDB, Policyd, free_port, program, temporary_directory

TOP20 = SCRIPTS / "policyd-top20.sh"
PROGRAMS = ("awk", "cat", "od", "readlink", "sed", "tr")

# Of 25 logins the last five miss the twenty; "early" is of this week, "gone" of the week before.
ENTRIES = [
    Entry(0, "anna", 700),
    Entry(3600, "anna", 800),
    Entry(7200, "ben", 600),
    Entry(7300, "ben", None),  # the old table allows it
    Entry(2 * DAY_S, "ben", 1000),
    *(Entry(100 + number, f"user{number:02}", 100 - number) for number in range(23)),
    Entry(6 * DAY_S, "early", 5000),
    Entry(8 * DAY_S, "gone", 9000),
]
OF_24_H = [("anna", 1500, 2), ("ben", 600, 2), *((f"user{number:02}", 100 - number, 1) for number in range(18))]
OF_7_DAYS = [
    ("early", 5000, 1), ("ben", 1600, 3), ("anna", 1500, 2),
    *((f"user{number:02}", 100 - number, 1) for number in range(17)),
]  # fmt: skip


def run(*arguments: object, script: Path = TOP20, **how: object) -> subprocess.CompletedProcess[str]:
    return scripting.run(script, *arguments, **how)  # type: ignore[arg-type]


def lines_of(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Return the words of each line of the table."""
    heading, where, *rest = printed(result).splitlines()
    assert re.match(r"The (twenty|\d+) logins with the most recipients of the last ", heading)
    assert (where[0], where[-1]) == ("(", ")")
    columns, *lines = rest[rest.index("") + 1 :]
    assert columns.split()[:5] == ["rank", "login", "recipients", "messages", "clients"]
    return [line.split() for line in lines]


def ranking(result: subprocess.CompletedProcess[str]) -> list[tuple[str, int, int]]:
    """Return the lines of the table as (login, recipients, messages), in their order."""
    rows = lines_of(result)
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [(row[1], int(row[2]), int(row[3])) for row in rows]


def table(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return share and state of each login."""
    return {row[1]: " ".join(row[5:]) for row in lines_of(result)}


def comma_separated(result: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    assert (result.returncode, result.stderr) == (0, ""), result
    return list(csv.DictReader(result.stdout.splitlines(), strict=True))


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request, tmp_path)


@pytest.fixture(params=["dash", "bash"])
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may look into, unlike pytest's own."""
    directory = temporary_directory()
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


# --- the table ---


def test_the_twenty_logins_with_the_most_recipients_on_mariadb(database: Database, tmp_path: Path, shell: str) -> None:
    fill_mariadb(database, ENTRIES)
    settings = settings_file(tmp_path, database.settings())
    assert ranking(run("-c", settings, shell=shell)) == OF_24_H
    assert ranking(run("-w", "-c", settings, shell=shell)) == OF_7_DAYS


def test_the_twenty_logins_with_the_most_recipients_on_the_old_table(
    old_database: Database, tmp_path: Path, shell: str
) -> None:
    fill_mariadb(old_database, ENTRIES)
    settings = settings_file(tmp_path, old_database.settings())
    assert ranking(run("-c", settings, shell=shell)) == OF_24_H
    assert ranking(run("-wc", settings, shell=shell)) == OF_7_DAYS


def test_the_twenty_logins_with_the_most_recipients_in_the_embedded_store(tmp_path: Path, shell: str) -> None:
    fill_store(tmp_path, ENTRIES)
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    assert ranking(run("-c", settings, shell=shell)) == OF_24_H
    assert ranking(run("-w", "-c", settings, shell=shell)) == OF_7_DAYS


def test_the_heading_says_which_time_and_which_table(database: Database, tmp_path: Path) -> None:
    settings = settings_file(tmp_path, database.settings())
    day, week = run("-c", settings).stdout, run("-w", "-c", settings).stdout
    assert day.startswith("The twenty logins with the most recipients of the last 24 hours\n")
    assert week.startswith("The twenty logins with the most recipients of the last 7 days\n")
    assert f"({database.name}.events on 127.0.0.1; quota 1500)" in day


def test_an_empty_table_is_said_to_be_empty(database: Database, tmp_path: Path) -> None:
    fill_mariadb(database, [Entry(8 * DAY_S, "gone", 5)])
    result = run("-w", "-c", settings_file(tmp_path, database.settings()))
    assert result.returncode == 0
    assert result.stdout.endswith("\nno message was counted in this time\n")


def test_a_running_daemon_is_counted_with_what_it_has_just_recorded(policyd: Callable[..., Policyd]) -> None:
    running = policyd()
    assert running.ask(sasl_username="anna", recipient_count=3) == "DUNNO"
    assert running.ask(sasl_username="ben", recipient_count=7) == "DUNNO"
    assert ranking(run("-c", running.settings_file)) == [("ben", 7, 1), ("anna", 3, 1)]


def test_another_table_is_read_when_the_settings_name_it(database: Database, tmp_path: Path) -> None:
    database.query("CREATE TABLE `quota$2` LIKE events")
    database.query("INSERT INTO `quota$2` (sasl_username, recipient_count) VALUES ('anna', 4)")
    settings = settings_file(tmp_path, {**database.settings(), "policy_table": "quota$2"})
    assert ranking(run("-c", settings)) == [("anna", 4, 1)]


def test_logins_that_only_the_old_collation_takes_for_the_same_are_told_apart(
    old_database: Database, tmp_path: Path
) -> None:
    fill_mariadb(old_database, [Entry(1, "rene", 3), Entry(2, "rené", 2), Entry(3, "RENE", 1)])
    settings = settings_file(tmp_path, old_database.settings())
    assert ranking(run("-c", settings)) == [("rene", 3, 1), (r"ren\xc3\xa9", 2, 1), ("RENE", 1, 1)]


def test_nothing_in_a_login_can_talk_to_the_terminal(database: Database, tmp_path: Path) -> None:
    entries = [Entry(1, STRANGE_LOGIN, 3)]
    fill_mariadb(database, entries)
    fill_store(tmp_path, entries)
    for settings in (database.settings(), {"statedir": str(tmp_path)}):
        path = settings_file(tmp_path, settings)
        assert ranking(run("-c", path)) == [(STRANGE_LOGIN_SHOWN[:20] + ">", 3, 1)]
        assert comma_separated(run("--csv", "-c", path))[0]["login"] == STRANGE_LOGIN_SHOWN


# --- quotas and states ---

# Half of the quota, just below it, at it, below its double, at it; and logins with quotas of their own.
SHARES = [
    Entry(10, "half", 750),
    Entry(20, "below", 1499),
    Entry(30, "reached", 1500),
    Entry(40, "almost", 2999),
    Entry(50, "refused", 3000),
    Entry(60, "NewsLetter".lower()[:8], 16_000),
    Entry(70, "free", 90_000),
    Entry(80, "none", 1),
    Entry(90, "printer", 40),
    Entry(100, "info", 9),
]
OWN = [
    "quota=NEWSLETT:20000", "quota = free:unlimited", "quota=none:0", "quota=printer@example.org:20:7",
    "quota=info:5:5:0",  # of a login "info:5"
]  # fmt: skip
STATES = {
    "free": "unlimited ok",
    "newslett": "[########..] 80% ok",
    "refused": "[##########] 200% REJECT",
    "almost": "[##########] 199% HOLD",
    "reached": "[##########] 100% HOLD",
    "below": "[#########.] 99% ok",
    "half": "[#####.....] 50% ok",
    "printer": "[##########] 200% REJECT",
    "info": "[..........] 0% ok",
    "none": "quota 0: all held HOLD",
}


@STORES
def test_each_login_is_shown_with_the_share_of_its_quota_and_its_state(store: Store, shell: str) -> None:
    store.fill(*SHARES)
    assert table(run("-c", store.settings(*OWN), shell=shell)) == STATES


def test_the_picture_is_the_same_with_another_awk(tmp_path: Path) -> None:
    fill_store(tmp_path, [*SHARES, Entry(1, STRANGE_LOGIN, 7)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, *OWN)
    pictures = []
    for name in ("mawk", "gawk"):
        path = tmp_path / name
        path.mkdir()
        (path / "awk").symlink_to(program(name, name))
        environment = {"PATH": f"{path}:{os.environ['PATH']}"}
        pictures += [
            tuple(run(*form, "-c", settings, environment=environment).stdout for form in ([], ["--csv"], ["-w"]))
        ]
    assert pictures[0] == pictures[1]
    assert "REJECT" in pictures[0][0]


@STORES
def test_rejectquota_holds_for_logins_without_a_quota_of_their_own(store: Store) -> None:
    store.fill(Entry(1, "anna", 50), Entry(2, "ben", 49), Entry(3, "carla", 50))
    settings = store.settings("defaultquota=10", "rejectquota=50", "quota=carla:30")
    states = {login: shown.split()[-1] for login, shown in table(run("-c", settings)).items()}
    assert states == {"anna": "REJECT", "ben": "HOLD", "carla": "HOLD"}


def test_a_quota_belongs_to_the_login_as_the_old_table_cuts_it(old_database: Database, tmp_path: Path) -> None:
    fill_mariadb(old_database, [Entry(1, "newslett", 90), Entry(2, "registra", 90)])
    lines = ["quota=newsletter:100", "quota=registrar:10", "quota=registra:50"]
    settings = settings_file(tmp_path, {**old_database.settings(), "defaultquota": "10"}, *lines)
    assert table(run("-c", settings)) == {"newslett": "[#########.] 90% ok", "registra": "[##########] 180% HOLD"}


def test_a_login_with_its_domain_has_its_own_quota_when_domains_are_kept(tmp_path: Path) -> None:
    fill_store(tmp_path, [Entry(1, "anna@a.org", 9), Entry(2, "anna@b.org", 9)])
    settings = settings_file(
        tmp_path, {"statedir": str(tmp_path), "quota": "anna@b.org:9", "strip_domain": "No", "defaultquota": "10"}
    )
    assert table(run("-c", settings)) == {"anna@a.org": "[#########.] 90% ok", "anna@b.org": "[##########] 100% HOLD"}


@STORES
def test_in_the_week_the_state_is_the_one_of_the_last_24_hours(store: Store) -> None:
    store.fill(Entry(3 * DAY_S, "anna", 4000), Entry(10, "anna", 10), Entry(20, "ben", 2005), Entry(30, "carla", 0))
    assert table(run("-w", "-c", store.settings())) == {
        "anna": "[##########] 100% ok", "ben": "[#####.....] 50% HOLD", "carla": "[..........] 0% ok",
    }  # fmt: skip


@STORES
def test_client_addresses_are_counted_once(store: Store) -> None:
    store.fill(
        *(Entry(number, "anna", 1, client=f"192.0.2.{number % 3}") for number in range(7)), Entry(9, "ben", 1)
    )
    assert [row[:5] for row in lines_of(run("-c", store.settings()))] == [
        ["1", "anna", "7", "7", "3"], ["2", "ben", "1", "1", "1"],
    ]  # fmt: skip


def test_as_many_logins_as_asked_for(tmp_path: Path, shell: str) -> None:
    fill_store(tmp_path, ENTRIES)
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    assert ranking(run("-n", "2", "-c", settings, shell=shell)) == OF_24_H[:2]
    assert ranking(run("-n3", "-wc", settings, shell=shell)) == OF_7_DAYS[:3]
    assert len(ranking(run("-n", "9999", "-c", settings, shell=shell))) == 25
    assert run("-n", "2", "-c", settings).stdout.startswith("The 2 logins with the most recipients ")


def test_a_long_login_is_cut_with_a_sign_for_the_eye_and_not_for_a_spreadsheet(tmp_path: Path) -> None:
    login = 'x"y,z' + "-" * 250
    fill_store(tmp_path, [Entry(1, login, 12)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, "defaultquota=10")
    assert table(run("-c", settings)) == {login[:20] + ">": "[##########] 120% HOLD"}
    (line,) = comma_separated(run("-c", settings, "--csv"))
    assert line == {
        "rank": "1", "login": login, "recipients": "12", "messages": "1", "clients": "1", "recipients_24h": "12",
        "quota": "10", "reject": "20", "state": "HOLD",
    }  # fmt: skip


def test_the_spreadsheet_has_raw_numbers(tmp_path: Path, shell: str) -> None:
    fill_store(tmp_path, [Entry(1, "anna", 3), Entry(2 * DAY_S, "anna", 2_000_000_000), Entry(1, "ben", 7)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, "quota=ben:unlimited", "defaultquota=999999999")
    result = run("--csv", "-wc", settings, shell=shell)
    assert result.stdout == (
        "rank,login,recipients,messages,clients,recipients_24h,quota,reject,state\n"
        "1,anna,2000000003,2,1,3,999999999,1999999998,ok\n"
        "2,ben,7,1,1,7,unlimited,unlimited,ok\n"
    )
    empty = run("--csv", "-c", settings_file(tmp_path, {"statedir": str(tmp_path)}), script=TOP20)
    assert empty.stdout.splitlines()[0] == result.stdout.splitlines()[0]


def test_it_is_said_when_nothing_is_held_for_mode_audit(tmp_path: Path) -> None:
    fill_store(tmp_path, SHARES)
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, "mode=audit")
    assert "\nmode=audit: nothing is held; " in run("-c", settings).stdout
    assert table(run("-c", settings))["half"] == "[#####.....] 50% ok"


def test_colour_is_for_a_terminal_only_and_not_with_no_color(tmp_path: Path) -> None:
    fill_store(tmp_path, SHARES)
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})

    def on_a_terminal(**environment: str) -> str:
        terminal, side = os.openpty()
        process = subprocess.run(
            ["sh", str(TOP20), "-c", str(settings)], stdout=side, env={**os.environ, **environment}, check=True
        )
        assert process.returncode == 0
        os.close(side)
        text = os.read(terminal, 65536).decode()
        os.close(terminal)
        return text

    assert "\x1b[31mREJECT\x1b[0m" in on_a_terminal(NO_COLOR="")
    assert "\x1b" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b" not in run("-c", settings).stdout


# --- beside its file of common functions ---


def test_it_is_found_through_a_link_the_path_and_the_current_directory(tmp_path: Path, shell: str) -> None:
    for name in ("sbin", "bin"):
        (tmp_path / name).mkdir()
    script = copy_scripts(tmp_path / "sbin", TOP20.name)
    link = tmp_path / "bin" / "top20"
    link.symlink_to(f"../sbin/{script.name}")
    fill_store(tmp_path, [Entry(1, "anna", 1)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    assert ranking(run("-c", settings, script=link, shell=shell)) == [("anna", 1, 1)]
    assert ranking(run("-c", settings, script=Path(script.name), cwd=script.parent, shell=shell)) == [("anna", 1, 1)]
    for name, directory in (("top20", link.parent), (script.name, script.parent)):
        result = subprocess.run(
            [name, "-c", str(settings)], cwd="/", env={**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert ranking(result) == [("anna", 1, 1)]


def test_a_missing_file_of_common_functions_is_said(tmp_path: Path, shell: str) -> None:
    script = Path(shutil.copy(TOP20, tmp_path))
    line = refusal(run(script=script, shell=shell))
    assert line == f"{tmp_path}/policyd-common.sh is missing; install it beside this script"


# --- the settings file is data ---


@pytest.mark.parametrize(
    "password",
    [
        "",
        "\\",
        '"',
        "'",
        "#",
        "a \\",
        '\\"',
        "'\"\\$#`",
        "two  words\tand a tab",
        "\\n\\t\\s",
        '"quoted"',
        "'quoted'",
        "$(touch owned)`touch owned`;touch owned",
        "=",
        "%s%n",
        "-p",
        "!include /etc/passwd",
        "[client]",
        "é€",
        "x" * 79 + "\\",
    ],
)
def test_a_password_may_hold_any_character(
    database: Database, mariadb: MariaDB, tmp_path: Path, password: str, shell: str
) -> None:
    mariadb.query("CREATE OR REPLACE USER 'nasty'@'127.0.0.1' IDENTIFIED BY %s", (password,))
    mariadb.query(f"GRANT SELECT ON {database.name}.* TO 'nasty'@'127.0.0.1'")
    fill_mariadb(database, [Entry(1, "anna", 1)])
    settings = settings_file(tmp_path, {**database.settings(), "dbuser": "nasty", "dbpass": password})
    # A password of the environment must not take the place of an empty one.
    result = run("-c", settings, shell=shell, cwd=tmp_path, environment={"MYSQL_PWD": "wrong"})
    assert ranking(result) == [("anna", 1, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["policyd.cfg"]


@pytest.mark.parametrize(
    "write",
    [
        lambda lines: "".join(f"{line}\n" for line in lines),
        lambda lines: "".join(f"{line}\r\n" for line in lines),
        lambda lines: "\n".join(lines),
        lambda lines: "\ufeff" + "\n".join(lines),
        lambda lines: "\n".join(f"  {line.replace('=', chr(9) + ' = ', 1)} \t" for line in lines),
        lambda lines: "# a comment\n\n  # one more=x\n" + "\n".join(lines) + "\nport=9093\nwhitelist=a\nwhitelist=b\n",
    ],
    ids=["plain", "CRLF", "no last newline", "byte order mark", "spaces", "comments and other settings"],
)
def test_a_settings_file_may_be_written_in_many_ways(
    database: Database, tmp_path: Path, write: Callable[[list[str]], str], shell: str
) -> None:
    fill_mariadb(database, [Entry(1, "anna", 1)])
    settings = tmp_path / "policyd.cfg"
    text = write([f"{key}={value}" for key, value in database.settings().items()])
    settings.write_bytes(text.encode())
    assert ranking(run("-c", settings, shell=shell)) == [("anna", 1, 1)]


def test_the_password_is_not_in_the_arguments_or_the_environment_of_any_process(
    database: Database, mariadb: MariaDB, tmp_path: Path, shell: str
) -> None:
    """Each program the script calls is wrapped: it writes down how it was called, then does its work."""
    bin_directory, record = tmp_path / "bin", tmp_path / "record"
    bin_directory.mkdir()
    for name in ("mariadb", *PROGRAMS):
        wrapper = bin_directory / name
        wrapper.write_text(
            f'#!/bin/sh\n{program("cat", "coreutils")} /proc/$$/cmdline /proc/$$/environ >>"{record}"\n'
            f'exec {program(name, "mariadb-client")} "$@"\n'
        )
        wrapper.chmod(0o755)
    fill_mariadb(database, [Entry(1, "anna", 1)])
    settings = settings_file(tmp_path, database.settings())
    # A shell's variable that came from the environment goes back there when it changes.
    environment = dict.fromkeys(("dbpass", "line", "value", "trimmed", "options", "key", "answer", "message"), "x")
    environment["PATH"] = f"{bin_directory}:{os.environ['PATH']}"
    assert ranking(run("-c", settings, shell=shell, environment=environment)) == [("anna", 1, 1)]
    recorded = record.read_bytes().split(b"\0")
    assert str(bin_directory / "mariadb").encode() in recorded
    assert b"--defaults-file=/dev/fd/3" in recorded
    assert not [text for text in recorded if mariadb.password.encode() in text or b"%rd" in text]


def test_the_files_of_the_user_cannot_interfere(database: Database, tmp_path: Path) -> None:
    (tmp_path / ".my.cnf").write_text("[client]\nuser=wrong\nhtml\n[mysql]\nhost=192.0.2.1\npassword=wrong\n")
    (tmp_path / ".sqliterc").write_text(".mode insert\n.headers on\n.bail on\nSELECT nothing;\n")
    entries = [Entry(1, "anna", 1)]
    fill_mariadb(database, entries)
    fill_store(tmp_path, entries)
    for settings in (database.settings(), {"statedir": str(tmp_path)}):
        path = settings_file(tmp_path, settings)
        environment = {"HOME": str(tmp_path), "MYSQL_HOST": "192.0.2.1", "MYSQL_TCP_PORT": "1"}
        assert ranking(run("-c", path, environment=environment)) == [("anna", 1, 1)]


# --- the servers ---


def test_the_next_server_is_asked_when_one_does_not_answer(database: Database, tmp_path: Path, shell: str) -> None:
    fill_mariadb(database, [Entry(1, "anna", 1)])
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes the connection and says nothing
        servers = (
            f"127.0.0.1:{free_port()}, [::1]:{free_port()} ::1 /nonexistent/mysqld.sock,"
            f"127.0.0.1:{deaf.getsockname()[1]} , {database.server.host}"
        )
        result = run("-c", settings_file(tmp_path, {**database.settings(), "dbhost": servers}), shell=shell)
    assert ranking(result) == [("anna", 1, 1)]
    assert f"({database.name}.events on 127.0.0.1; quota 1500)" in result.stdout


@pytest.mark.parametrize("server", ["127.0.0.1:{port}", "localhost:{port}", "{socket}"])
def test_a_server_is_a_host_with_its_port_or_a_socket(
    database: Database, mariadb: MariaDB, tmp_path: Path, server: str
) -> None:
    fill_mariadb(database, [Entry(1, "anna", 1)])
    settings = {**database.settings(), "dbhost": server.format(port=mariadb.port, socket=mariadb.socket)}
    settings["dbport"] = str(free_port())  # not used
    if server == "{socket}":
        settings.update(dbuser="root", dbpass="")
    assert ranking(run("-c", settings_file(tmp_path, settings))) == [("anna", 1, 1)]


def test_without_dbhost_the_server_is_on_this_machine(database: Database, tmp_path: Path) -> None:
    settings = database.settings()
    del settings["dbhost"]
    fill_mariadb(database, [Entry(1, "anna", 1)])
    assert ranking(run("-c", settings_file(tmp_path, settings))) == [("anna", 1, 1)]


def test_when_no_server_answers_each_one_is_named(database: Database, tmp_path: Path) -> None:
    servers = [f"127.0.0.1:{free_port()}", "/nonexistent/mysqld.sock"]
    settings = settings_file(tmp_path, {**database.settings(), "dbhost": ",".join(servers)})
    line = refusal(run("-c", settings))
    assert line.startswith(f"cannot read {database.name}.events: {servers[0]}: 2002 ")
    assert f"; {servers[1]}: 2002 " in line


def test_a_wrong_password_is_said_and_not_shown(database: Database, tmp_path: Path) -> None:
    line = refusal(run("-c", settings_file(tmp_path, {**database.settings(), "dbpass": "s3cret"})))
    assert "Access denied for user 'policyd'" in line
    assert "s3cret" not in line


def test_a_missing_table_is_said(database: Database, tmp_path: Path) -> None:
    line = refusal(run("-c", settings_file(tmp_path, {**database.settings(), "policy_table": "nowhere"})))
    assert f"Table '{database.name}.nowhere' doesn't exist" in line


# --- the embedded store ---


def elsewhere(directory: Path) -> Path:
    """Return a copy of the script for which /etc/postfix and /var/lib are in `directory`."""
    script = copy_scripts(directory, TOP20.name)
    common = directory / COMMON.name
    text = common.read_text()
    for path in ("/etc/postfix/policyd.cfg", "/var/lib/policyd"):
        assert path in text
        text = text.replace(path, str(directory / Path(path).name))
    common.write_text(text)
    return script


def test_without_a_settings_file_the_defaults_serve(tmp_path: Path) -> None:
    """The embedded store is in /var/lib/policyd, or else where one is."""
    script = elsewhere(tmp_path)
    here, state = tmp_path / "here", tmp_path / "policyd"
    here.mkdir()
    fill_store(here, [Entry(1, "here", 1)])
    assert ranking(run(script=script, cwd=here)) == [("here", 1, 1)]
    state.mkdir()
    fill_store(state, [Entry(1, "state", 1)])
    assert ranking(run(script=script, cwd=here)) == [("state", 1, 1)]


def test_the_default_settings_file_is_read_when_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    fill_store(tmp_path / "own", [Entry(1, "anna", 1)])
    settings_file(tmp_path, {"statedir": "own"})
    assert ranking(run(script=elsewhere(tmp_path), cwd=tmp_path)) == [("anna", 1, 1)]


def test_a_missing_store_is_said(tmp_path: Path) -> None:
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    assert refusal(run("-c", settings)) == f"no events.sqlite3 in {tmp_path}: policyd has counted nothing there"
    settings.write_text("")
    line = refusal(run("-c", settings, script=elsewhere(tmp_path), cwd=tmp_path))
    assert line == (
        f"no events.sqlite3 in {tmp_path}/policyd or {tmp_path}: policyd has counted nothing there;"
        f" statedir= in {settings} would say where"
    )


@pytest.mark.parametrize(
    ("content", "reason"), [("", "no such table: events"), ("not a database " * 100, "file is not a database")]
)
def test_a_store_that_is_none_is_said(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "events.sqlite3").write_text(content)
    line = refusal(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)})))
    assert line.startswith(f"cannot read {tmp_path}/events.sqlite3: ")
    assert reason in line


def test_looking_changes_nothing_in_the_store(tmp_path: Path) -> None:
    store = fill_store(tmp_path, ENTRIES)
    before = store.read_bytes()
    ranking(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)})))
    assert store.read_bytes() == before


# --- what is wrong ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port=9093\ns3cret\n", "2: no '='; a line is key=value, a comment starts with '#'"),
        ("dbname=", "1: dbname= has no value; give one, or remove the line to use the default"),
        ("\n\nstatedir =  \n", "3: statedir= has no value; give one, or remove the line to use the default"),
        ("dbpassword=s3cret\n", "1: unknown setting dbpassword; known are dbhost, dbport, dbname, dbuser, dbpass"),
        ("dbport=0\n", "1: dbport=0 has no port from 1 to 65535"),
        ("dbport=65536\n", "1: dbport=65536 has no port from 1 to 65535"),
        ("dbport=99999999999999999999\n", "1: dbport=99999999999999999999 has no port from 1 to 65535"),
        ("dbport=+1\n", "1: dbport=+1 has no port from 1 to 65535"),
        ("dbuser=a\ndbname=b\ndbhost=db1:x\n", "3: dbhost=db1:x has no port from 1 to 65535"),
        ("dbuser=a\ndbhost=[::1]:\ndbname=b\n", "2: dbhost=[::1]: has no port from 1 to 65535"),
        ("policy_table=a`b\n", "1: policy_table=a`b is not a plain SQL name (letters, digits, _ and $)"),
        ("policy_table=db.events\n", "1: policy_table=db.events is not a plain SQL name (letters, digits, _ and $)"),
        ("policy_table=\x1b[2J\n", "1: policy_table=?[2J is not a plain SQL name (letters, digits, _ and $)"),
        ("\ndefaultquota=many\n", "2: defaultquota=many is not a number from 1 to 999999999"),
        ("defaultquota=0\n", "1: defaultquota=0 is not a number from 1 to 999999999"),
        ("defaultquota=1234567890\n", "1: defaultquota=1234567890 is not a number from 1 to 999999999"),
        ("defaultquota=9\nrejectquota=8\n", "2: rejectquota=8 is below defaultquota=9"),
        ("strip_domain=maybe\n", "1: strip_domain=maybe is neither yes nor no"),
        ("networks_window=1\n", "1: networks_window=1 is no time; give a number and s, m, h or d, for example 1h"),
        *(
            (f"port=1\nquota={value}\n",
             f"2: quota={value} is not LOGIN:NUMBER, LOGIN:unlimited or LOGIN:NUMBER:HOUR")
            for value in ("anna", "5", ":5", "anna:", "anna:x", "anna:-1", "anna:5:x", "an na:5", "anna:1234567890",
                          ":5:7", "anna:7:unlimited:x")
        ),
        ("quota=\n", "1: quota= has no value; give one, or remove the line to use the default"),
        ("dbuser=a\n", " dbname= is missing, or no db... key should be there"),
        ("dbname=a\n", " dbuser= is missing, or no db... key should be there"),
    ],
)
def test_a_mistake_in_the_settings_is_named_with_its_line(tmp_path: Path, text: str, message: str, shell: str) -> None:
    settings = tmp_path / "policyd.cfg"
    settings.write_text(text)
    assert refusal(run("-c", settings, shell=shell)) == f"{settings}:{message}"


def test_a_dbhost_without_any_server_is_said(tmp_path: Path) -> None:
    settings = settings_file(tmp_path, {"dbhost": ", ,", "dbname": "a", "dbuser": "b"})
    assert refusal(run("-c", settings)) == "cannot read a.events: dbhost= names no server"


def test_a_settings_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    assert refusal(run("-c", tmp_path / "nowhere.cfg")) == f"{tmp_path}/nowhere.cfg: no such file"
    assert refusal(run("-c", tmp_path)) == f"{tmp_path}: is a directory"


def test_what_may_not_be_read_is_said(open_directory: Path) -> None:
    script = copy_scripts(open_directory, TOP20.name)
    state = open_directory / "state"
    state.mkdir()
    store = fill_store(state, [Entry(1, "anna", 1)])
    settings = settings_file(open_directory, {"statedir": str(state)})

    def refused(path: Path) -> None:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(0)
        user = NOBODY if os.geteuid() == 0 else None  # root may read everything
        result = run("-c", settings, script=script, cwd=open_directory, user=user)
        path.chmod(mode)
        assert refusal(result) == f"{path}: permission denied; run this as root"

    refused(settings)
    settings.chmod(0o644)
    refused(store)
    refused(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dbname": "a", "dbuser": "b"},
            "neither mariadb nor mysql is installed; the Debian package is mariadb-client",
        ),
        ({}, "sqlite3 is not installed; the Debian package is sqlite3"),
    ],
)
def test_a_missing_client_is_named_with_its_package(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    bin_directory = directory_of_programs(tmp_path / "bin", *PROGRAMS)
    fill_store(tmp_path, ENTRIES)
    path = settings_file(tmp_path, settings or {"statedir": str(tmp_path)})
    assert refusal(run("-c", path, environment={"PATH": str(bin_directory)})) == message


def test_the_older_name_of_the_client_serves_too(database: Database, tmp_path: Path) -> None:
    bin_directory = directory_of_programs(tmp_path / "bin", *PROGRAMS)
    (bin_directory / "mysql").symlink_to(program("mariadb", "mariadb-client"))
    fill_mariadb(database, [Entry(1, "anna", 1)])
    settings = settings_file(tmp_path, database.settings())
    assert ranking(run("-c", settings, environment={"PATH": str(bin_directory)})) == [("anna", 1, 1)]


@pytest.mark.parametrize(
    "arguments",
    [["-x"], ["-c"], ["--help"], ["anna"], ["-w", "--", "-c"], ["--csv=x"], ["-n"],
     ["-n", "0"], ["-n", "x"], ["-n", "10000"]],
)
def test_a_wrong_call_gets_the_usage(arguments: list[str], shell: str) -> None:
    result = run(*arguments, shell=shell)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Usage: policyd-top20.sh [-w] [-n N] [--csv] [-c FILE]" in result.stderr


def test_help_is_no_mistake(shell: str) -> None:
    result = run("-h", shell=shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: policyd-top20.sh [-w] [-n N] [--csv] [-c FILE]\n")
    assert "/etc/postfix/policyd.cfg" in result.stdout


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [str(path.relative_to(SCRIPTS.parent)) for path in sorted(SCRIPTS.glob("*.sh"))]
    result = subprocess.run(
        [program("shellcheck", "shellcheck"), *scripts], cwd=SCRIPTS.parent, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
