"""scripts/policyd-user.sh: why she is blocked and until when, and a clean slate when it is asked for."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
import scripting
from scripting import (
    COMMON,
    DAY_S,
    HOUR_S,
    NOBODY,
    SCRIPTS,
    SHELLS,
    STORES,
    STRANGE_LOGIN,
    STRANGE_LOGIN_SHOWN,
    Entry,
    Row,
    Store,
    copy_scripts,
    fill_mariadb,
    fill_store,
    make_store,
    printed,
    refusal,
    settings_file,
)
from servers import Database, MariaDB, Policyd, Postfix, temporary_directory

USER = SCRIPTS / "policyd-user.sh"

# In 24 h 1612 recipients in five messages (one of them of no known number), then two older ones.
BORIS = [
    Entry(20 * HOUR_S + 1800, "boris", 12, "boris@example.org", "192.0.2.7"),
    Entry(5 * HOUR_S + 1800, "boris", 700, "bank@example.net", "203.0.113.9"),
    Entry(5 * HOUR_S + 1700, "boris", 500, "bank@example.net", "203.0.113.10"),
    Entry(1800, "boris", 400, "", "2001:db8::9"),
    Entry(1500, "boris", None, "bank@example.net", "203.0.113.9"),
    Entry(24 * HOUR_S + 600, "boris", 5000),
    Entry(3 * DAY_S, "boris", 1),
]
OTHERS = [Entry(60, "anna", 3), Entry(60, "boriss", 4), Entry(60, "bori", 5), Entry(60, "old", 0)]


def run(*arguments: object, script: Path = USER, **how: object) -> subprocess.CompletedProcess[str]:
    """Run it with an instance of Postfix that is none: what is held is another test's matter."""
    how["environment"] = {"MAIL_CONFIG": "/nonexistent", **how.get("environment", {})}  # type: ignore[dict-item]
    return scripting.run(script, *arguments, **how)  # type: ignore[arg-type]


def facts(report: str) -> dict[str, str]:
    """Return the first paragraph: what stands beside each name, further lines of it after a semicolon."""
    found: dict[str, str] = {}
    name = ""
    for line in report.split("\n\n")[0].splitlines():
        name = line[:13].strip() or name
        found[name] = f"{found[name]}; {line[14:]}" if name in found else line[14:]
    return found


def hours(report: str) -> list[int]:
    """Return the recipients of each hour, the last one first."""
    (chart,) = (part for part in report.split("\n\n") if part.startswith("recipients of the last 24 hours"))
    lines = [line.split() for line in chart.splitlines()[1:]]
    assert len(lines) == 24
    for line, following in zip(lines, lines[1:]):  # each begins an hour after the one before
        assert (int(line[0][:2]) + 1) % 24 == int(following[0][:2])
        assert line[0][2:] == following[0][2:]
    most = max(int(line[1]) for line in lines)
    for line in lines:
        bar = line[2] if len(line) > 2 else ""
        assert len(bar) == max(int(line[1]) * 60 // (most + 1), int(line[1]) > 0), line
    return [int(line[1]) for line in reversed(lines)]


def table(report: str, name: str) -> list[list[str]]:
    """Return the words of the lines below a heading."""
    (found,) = (part for part in report.split("\n\n") if part.startswith(f"{name} "))
    return [line.split() for line in found.splitlines()[1:]]


def falls_below(rows: list[Row], login: str, limit: int, sum_: int) -> int:
    """Return when the sum is below a limit: 24 hours after the message with which enough will have gone."""
    for row in rows:
        if row.login == login and row.ts > max(row.ts for row in rows) - DAY_S * 1000:
            sum_ -= row.recipients or 0
            if sum_ < limit:
                return row.ts + DAY_S * 1000
    raise AssertionError("never")


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request, tmp_path)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may look into, unlike pytest's own."""
    directory = temporary_directory()
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


# --- the report ---


@STORES
@SHELLS
def test_why_she_is_held_and_until_when(store: Store, shell: str) -> None:
    store.fill(*BORIS, *OTHERS)
    settings = store.settings("port=9093", "defaultquota=1500")
    report = printed(run("-c", settings, "Boris@example.org", shell=shell))
    rows = store.rows()
    until = store.moment(falls_below(rows, "boris", 1500, 1612))
    line = settings.read_text().splitlines().index("defaultquota=1500") + 1
    assert facts(report) == {
        "login": "boris",
        "state": "HOLD: messages are held",
        "quota": f"1500 recipients in 24 hours; ({settings}:{line} defaultquota=)",
        "refused from": "3000 (twice the quota)",
        "sum now": "1612 recipients, 5 messages, 107% of the quota",
        "held until": f"{until}, if nothing more is sent",
        "last message": store.moment(max(row.ts for row in rows if row.login == "boris")),
    }
    assert {number: hour for number, hour in enumerate(hours(report)) if hour} == {0: 400, 5: 1200, 20: 12}
    assert [line[:3] for line in table(report, "client")] == [
        ["203.0.113.9", "2", "700"], ["203.0.113.10", "1", "500"], ["2001:db8::9", "1", "400"],
        ["192.0.2.7", "1", "12"],
    ]  # fmt: skip
    assert [line[:3] for line in table(report, "sender")] == [
        ["bank@example.net", "3", "1200"], ["<>", "1", "400"], ["boris@example.org", "1", "12"],
    ]  # fmt: skip
    first, last = (store.moment(row.ts)[11:16] for row in rows if row.client == "203.0.113.9")
    assert table(report, "client")[0][3:] == [first, last]
    assert report.splitlines()[-2] == "held messages"


@STORES
def test_when_mail_is_refused_both_moments_are_told(store: Store) -> None:
    store.fill(*BORIS, *OTHERS)
    known = facts(printed(run("boris", "-c", store.settings("defaultquota=300", "rejectquota=450"))))
    rows = store.rows()
    assert known["state"] == "REJECT: messages are refused"
    assert re.fullmatch(r"450 \(.*:\d+ rejectquota=\)", known["refused from"])
    assert known["refused until"] == (
        f"{store.moment(falls_below(rows, 'boris', 450, 1612))}, then held, if nothing more is sent"
    )
    assert known["held until"] == f"{store.moment(falls_below(rows, 'boris', 300, 1612))}, if nothing more is sent"


@STORES
def test_a_login_of_older_events_is_known_and_its_sum_is_0(store: Store) -> None:
    store.fill(Entry(25 * HOUR_S, "anna", 9000))
    report = printed(run("-c", store.settings(), "anna"))
    known = facts(report)
    assert (known["state"], known["sum now"]) == ("ok: messages go on", "0 recipients, 0 messages, 0% of the quota")
    assert known["last message"] == store.moment(store.rows()[0].ts)
    assert "held until" not in known
    assert "client" not in report


@STORES
@SHELLS
def test_an_unknown_login_is_said(store: Store, shell: str) -> None:
    store.fill(*OTHERS)
    unknown = ["nobody", "an'na", "ann", "anna' OR '1'='1", "$(id)", "\\", "%", "_nna", "ANNA\u0301", "*", "Ann\xc9"]
    for login in unknown:
        line = refusal(run("-c", store.settings(), login, shell=shell))
        assert re.search(": unknown; no message of this login is kept in ", line), line


@pytest.mark.parametrize(
    ("line", "state", "quota", "refused"),
    [
        ("", "ok: messages go on", "1500 recipients in 24 hours; (policyd's default)", "3000 (twice the quota)"),
        ("quota=anna:0", "HOLD: messages are held", "0: each message is held; (FILE:2 quota=)", None),
        ("quota=ANNA@a.org:unlimited", "ok: messages go on",
         "unlimited: never held or refused for the sum; (FILE:2 quota=)", None),
        ("quota=anna:3:0", "HOLD: messages are held", "3 recipients in 24 hours; (FILE:2 quota=)",
         "6 (twice the quota)"),
        ("quota=anna:1", "REJECT: messages are refused", "1 recipients in 24 hours; (FILE:2 quota=)",
         "2 (twice the quota)"),
    ],
)  # fmt: skip
def test_it_is_told_where_the_quota_comes_from(
    tmp_path: Path, line: str, state: str, quota: str, refused: str | None
) -> None:
    fill_store(tmp_path, [Entry(60, "anna", 4)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, line)
    known = facts(printed(run("-c", settings, "anna")))
    assert known["state"] == state
    assert known["quota"] == quota.replace("FILE", str(settings))
    assert known.get("refused from") == refused


def test_what_else_holds_her_is_told(tmp_path: Path) -> None:
    clients = ["192.0.2.1", "192.0.2.200", "198.51.100.1", "203.0.113.5", "2001:db8:1::1", "2001:db8:1:7::1",
               "2001:db8:2::", "::1", "unknown", "10.9.8.7"]  # fmt: skip
    fill_store(tmp_path, [Entry(60, "anna", 1, client=client) for client in clients])
    fill_store(tmp_path, [Entry(3 * HOUR_S, "anna", 1, client="192.168.0.1")])
    lines = ["hourquota=010", "max_networks=4", "networks_window=01h", "blacklist=ben", "blacklist=Anna", "mode=Audit"]
    known = facts(printed(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}, *lines), "anna")))
    assert known["state"] == (
        "HOLD: on the blacklist, line 6 of the settings; HOLD: the hour quota is reached;"
        " HOLD: comes from too many networks; but nothing is held or refused: mode=audit"
    )
    assert known["last hour"] == "10 recipients of an hour quota of 10"
    assert known["networks"] == "7 in 01h; more than 4 are held"
    trusted = ["trusted_network=10.0.0.0/8", "trusted_network=192.0.2.0/25", "trusted_network=2001:db8::/47",
               "trusted_network=::1", "quota=anna:100:11"]  # fmt: skip
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, *lines[:3], *trusted)
    known = facts(printed(run("-c", settings, "anna")))
    assert known["networks"] == "4 in 01h; more than 4 are held"
    assert known["last hour"] == "10 recipients of an hour quota of 11"
    assert known["state"] == "ok: messages go on"


def test_networks_of_forgiven_messages_do_not_count(tmp_path: Path) -> None:
    clients = ["192.0.2.1", "198.51.100.1", "203.0.113.5"]
    fill_store(tmp_path, [Entry(60, "anna", n % 3, client=client) for n, client in enumerate(clients)])
    known = facts(printed(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}, "max_networks=1"), "anna")))
    assert known["networks"] == "2 in 1h; more than 1 are held"


@pytest.mark.parametrize(
    ("quota", "last_hour"),
    [
        ("anna:unlimited", None),
        ("anna:unlimited:7", "4 recipients of an hour quota of 7"),
        ("anna:9", "4 recipients of an hour quota of 5"),
        ("anna:9:0", None),
        ("anna:9:unlimited", None),
    ],
)
def test_whose_quota_has_no_end_has_none_for_the_hour_either(
    tmp_path: Path, quota: str, last_hour: str | None
) -> None:
    """Unless it is given; as in policyd."""
    fill_store(tmp_path, [Entry(60, "anna", 4)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, "hourquota=5", f"quota={quota}")
    assert facts(printed(run("-c", settings, "anna"))).get("last hour") == last_hour


def test_ten_addresses_and_how_many_more(tmp_path: Path) -> None:
    fill_store(tmp_path, [Entry(60, "anna", number, client=f"192.0.2.{number}") for number in range(1, 14)])
    report = printed(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}), "anna"))
    assert [line[0] for line in table(report, "client")] == [*(f"192.0.2.{n}" for n in range(13, 3, -1)), "and"]
    assert report.count("\nand 3 more\n") == 2


def test_times_are_local(tmp_path: Path) -> None:
    fill_store(tmp_path, BORIS)
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    here = facts(printed(run("-c", settings, "boris", environment={"TZ": "UTC"})))["held until"]
    there = facts(printed(run("-c", settings, "boris", environment={"TZ": "XYZ-9"})))["held until"]
    assert (int(there[11:13]) - int(here[11:13])) % 24 == 9
    assert here[13:19] == there[13:19]


def test_nothing_a_client_sent_can_talk_to_the_terminal(database: Database, tmp_path: Path) -> None:
    ugly = "\x1b]0;owned\x07%s%n" + "x" * 60
    entries = [Entry(60, STRANGE_LOGIN, 3, STRANGE_LOGIN, ugly)]
    fill_mariadb(database, entries)
    fill_store(tmp_path, entries)
    for settings in (database.settings(), {"statedir": str(tmp_path)}):
        report = printed(run("-c", settings_file(tmp_path, settings), STRANGE_LOGIN))
        assert facts(report)["login"] == STRANGE_LOGIN_SHOWN
        assert table(report, "sender")[0][0] == STRANGE_LOGIN_SHOWN[:48]
        assert table(report, "client")[0][0] == (r"\x1b]0;owned\x07%s%n" + "x" * 60)[:47] + ">"


def test_a_login_is_looked_for_as_the_old_table_has_it(old_database: Database, tmp_path: Path) -> None:
    fill_mariadb(old_database, [Entry(60, "newslett", 3), Entry(60, "rené", 4), Entry(60, "rene", 5)])
    settings = settings_file(tmp_path, old_database.settings(), "quota=newsletter:20000")
    known = facts(printed(run("-c", settings, "NewsLetter")))
    assert known["login"] == "newsletter; cut to 8 characters in the table: all that begin so are one"
    assert known["quota"].startswith("20000 ")
    assert known["sum now"] == "3 recipients, 1 messages, 0% of the quota"
    assert facts(printed(run("-c", settings, "rené")))["sum now"].startswith("4 recipients")
    assert facts(printed(run("-c", settings, "rene")))["sum now"].startswith("5 recipients")


def test_a_login_with_its_domain_when_domains_are_kept(tmp_path: Path) -> None:
    fill_store(tmp_path, [Entry(60, "anna@a.org", 1), Entry(60, "-c", 2)])
    settings = settings_file(tmp_path, {"statedir": str(tmp_path), "strip_domain": "no"})
    assert facts(printed(run("-c", settings, "Anna@A.org")))["login"] == "anna@a.org"
    assert refusal(run("-c", settings, "anna")).startswith("anna: unknown; ")
    assert facts(printed(run("-c", settings, "--", "-c")))["login"] == "-c"


def test_her_held_messages_are_shown(policyd: Callable[..., Policyd], postfix: Postfix) -> None:
    running = policyd(port=postfix.policy_port, defaultquota=1)
    with postfix.session() as session:
        session.mail("alice@example.org")
        session.rcpt("one@example.net")
        code, reply = session.data("Subject: held\r\n\r\nHello\r\n")
    queued = re.search(rb"queued as (\w+)", reply)
    assert code == 250
    assert queued
    environment = {"MAIL_CONFIG": str(postfix.directory / "etc")}
    report = printed(run("-c", running.settings_file, "alice", environment=environment))
    assert queued[1].decode() in report.split("\nheld messages\n")[1]


def test_a_hold_queue_that_cannot_be_seen_is_one_line_of_the_report(tmp_path: Path) -> None:
    script = copy_scripts(tmp_path, USER.name)
    fill_store(tmp_path, [Entry(60, "anna", 3)])
    report = printed(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}), "anna", script=script))
    assert re.search(r"\nheld messages\nnot known: .*policyd-held\.sh.*\n\Z", report)
    report = printed(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}), "anna"))
    assert re.search(r"\nheld messages\nnot known: (?!policyd-held).+\n\Z", report)


# --- forgiving ---


def forgiven(rows: list[Row], login: str) -> list[Row]:
    """Return the rows as they must be afterwards."""
    since = max(row.ts for row in rows) - DAY_S * 1000
    return [
        row._replace(recipients=0) if row.login == login and row.ts > since and row.recipients else row for row in rows
    ]


@STORES
@SHELLS
def test_forgiving_says_what_it_would_do_and_does_it_when_told(store: Store, shell: str) -> None:
    store.fill(*BORIS, *OTHERS)
    before = store.rows()
    settings = store.settings()
    would = printed(run("-c", settings, "boris", "--forgive", shell=shell))
    assert would == (
        "boris: 4 events of the last 24 hours, 1612 recipients, would be set to 0\nsum: 1612 -> 0\n"
        "Nothing was changed; add --yes to do it.\n"
    )
    assert store.rows() == before
    did = printed(run("--forgive", "Boris@x", "--yes", "-c", settings, shell=shell))
    assert did == "boris: 4 events of the last 24 hours were set to 0\nsum: 1612 -> 0\n"
    assert store.rows() == forgiven(before, "boris") != before
    assert facts(printed(run("-c", settings, "boris")))["state"] == "ok: messages go on"
    again = printed(run("boris", "--forgive", "--yes", "-c", settings))
    assert again == "boris: 0 events of the last 24 hours were set to 0\nsum: 0 -> 0\n"


def test_only_the_login_itself_is_forgiven_whatever_the_old_collation_thinks(
    old_database: Database, tmp_path: Path
) -> None:
    logins = ["rene", "rené", "RENE", "rene2", "newslett"]
    fill_mariadb(old_database, [Entry(60, login, 5) for login in logins])
    settings = settings_file(tmp_path, old_database.settings())
    printed(run("-c", settings, "rené", "--forgive", "--yes"))
    cut = printed(run("-c", settings, "newsletter", "--forgive", "--yes"))
    assert cut.startswith("This table cuts logins to 8 characters: all that begin so are meant.\n")
    left = dict(old_database.query("SELECT sasl_username, recipient_count FROM events"))
    assert left == {"rene": 5, "rené": 0, "RENE": 5, "rene2": 5, "newslett": 0}


def test_a_running_daemon_lets_a_forgiven_login_send_again(policyd: Callable[..., Policyd]) -> None:
    running = policyd(defaultquota=5)
    assert running.ask(sasl_username="anna", recipient_count=7) == "HOLD quota exceeded"
    printed(run("-c", running.settings_file, "anna", "--forgive", "--yes"))
    assert running.ask(sasl_username="anna", recipient_count=4) == "DUNNO"
    assert facts(printed(run("-c", running.settings_file, "anna")))["sum now"].startswith("4 recipients, 2 messages")


def test_the_store_stays_its_owners_when_root_forgives(open_directory: Path) -> None:
    """Also the files beside it that SQLite makes, which are left behind when one only looks."""
    store = fill_store(open_directory, [Entry(60, "anna", 5)])
    settings = settings_file(open_directory, {"statedir": str(open_directory)})
    is_root = os.geteuid() == 0
    owner = NOBODY if is_root else os.geteuid()
    for path in (open_directory, *open_directory.iterdir()):
        os.chown(path, owner, -1)
    printed(run("-c", settings, "anna", "--forgive", "--yes"))
    printed(run("-c", settings, "anna"))
    assert {path.stat().st_uid for path in open_directory.iterdir()} == {owner}
    write = "import sqlite3, sys; sqlite3.connect(sys.argv[1], isolation_level=None).execute(sys.argv[2])"
    statement = "INSERT INTO events VALUES (1, 'anna', '', '', 1)"
    subprocess.run(
        [shutil.which("python3", path="/usr/bin") or sys.executable, "-c", write, str(store), statement],
        user=owner if is_root else None, extra_groups=[] if is_root else None, check=True, cwd="/",
    )  # fmt: skip


@SHELLS
def test_without_the_right_to_update_nothing_is_changed(
    database: Database, mariadb: MariaDB, tmp_path: Path, shell: str
) -> None:
    mariadb.query("CREATE OR REPLACE USER 'reader'@'127.0.0.1' IDENTIFIED BY 'x'")
    mariadb.query(f"GRANT SELECT ON {database.name}.* TO 'reader'@'127.0.0.1'")
    fill_mariadb(database, [Entry(60, "anna", 5)])
    settings = settings_file(tmp_path, {**database.settings(), "dbuser": "reader", "dbpass": "x"})
    line = refusal(run("-c", settings, "anna", "--forgive", "--yes", shell=shell))
    assert line.startswith(f"cannot change {database.name}.events on 127.0.0.1: ")
    assert "UPDATE command denied" in line
    assert database.query("SELECT recipient_count FROM events") == [(5,)]


def test_who_may_not_write_the_store_changes_nothing(open_directory: Path) -> None:
    script = copy_scripts(open_directory, USER.name)
    store = fill_store(open_directory, [Entry(60, "anna", 5)])
    settings = settings_file(open_directory, {"statedir": str(open_directory)})
    store.chmod(0o444)
    connection = sqlite3.connect(store)  # keeps the files beside it, so that others may read
    connection.execute("SELECT * FROM events").fetchall()
    for path in open_directory.glob("events.sqlite3-*"):
        path.chmod(0o644)
    user = NOBODY if os.geteuid() == 0 else None  # root may write everything
    line = refusal(run("-c", settings, "anna", "--forgive", "--yes", script=script, user=user, cwd=open_directory))
    assert line == f"{store}: not yours to change; run this as root"
    assert connection.execute("SELECT recipient_count FROM events").fetchall() == [(5,)]
    connection.close()


def test_a_locked_store_is_said_and_not_changed(tmp_path: Path) -> None:
    store = fill_store(tmp_path, [Entry(60, "anna", 5)])
    connection = sqlite3.connect(store, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    line = refusal(run("-c", settings_file(tmp_path, {"statedir": str(tmp_path)}), "anna", "--forgive", "--yes"))
    assert line.startswith(f"cannot change {store}: ")
    assert "database is locked" in line
    connection.execute("ROLLBACK")
    assert connection.execute("SELECT recipient_count FROM events").fetchall() == [(5,)]
    connection.close()


# --- what is wrong ---


@SHELLS
@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["a", "--yes"], ["a", "--forgiven"], ["-c"], ["-x", "a"], [""], ["a", "--", "b"], ["--"]],
)
def test_a_wrong_call_gets_the_usage(arguments: list[str], shell: str) -> None:
    result = run(*arguments, shell=shell)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: policyd-user.sh [-c FILE] LOGIN\n")


@SHELLS
def test_help_is_no_mistake(shell: str) -> None:
    assert printed(run("-h", shell=shell)).startswith("Usage: policyd-user.sh [-c FILE] LOGIN\n")


def test_a_mistake_in_the_settings_a_missing_store_and_table_are_said(database: Database, tmp_path: Path) -> None:
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)}, "quota=anna")
    assert refusal(run("-c", settings, "anna")).startswith(f"{settings}:2: quota=anna is not ")
    settings = settings_file(tmp_path, {"statedir": str(tmp_path)})
    assert refusal(run("-c", settings, "anna")).startswith(f"no events.sqlite3 in {tmp_path}: ")
    settings = settings_file(tmp_path, {**database.settings(), "policy_table": "nowhere"})
    assert "nowhere' doesn't exist" in refusal(run("-c", settings, "anna"))
    settings = settings_file(tmp_path, {**database.settings(), "policy_table": "strange"})
    database.query("CREATE TABLE strange (a INT)")
    assert refusal(run("-c", settings, "anna")).endswith("it has no column sasl_username")


def test_a_missing_file_of_common_functions_is_said(tmp_path: Path) -> None:
    script = Path(shutil.copy(USER, tmp_path))
    assert refusal(run("anna", script=script)) == f"{tmp_path}/{COMMON.name} is missing; install it beside this script"


def test_the_write_goes_to_one_server_and_is_done_once(database: Database, mariadb: MariaDB, tmp_path: Path) -> None:
    """The first server that can read the table is the one that is changed; the general log counts."""
    fill_mariadb(database, [Entry(60, "anna", 5)])
    servers = f"/nonexistent/mysqld.sock,127.0.0.1:{mariadb.port},localhost:{mariadb.port}"
    settings = settings_file(tmp_path, {**database.settings(), "dbhost": servers})
    mariadb.query("SET GLOBAL log_output = 'TABLE'")
    mariadb.query("TRUNCATE mysql.general_log")
    mariadb.query("SET GLOBAL general_log = 1")
    printed(run("-c", settings, "anna", "--forgive", "--yes"))
    mariadb.query("SET GLOBAL general_log = 0")
    logged = mariadb.query(
        "SELECT COUNT(*) FROM mysql.general_log WHERE command_type = 'Query' AND argument LIKE 'UPDATE %%events%%'"
    )
    assert logged == [(1,)]
