"""The command line: what each option does, and one line for whatever is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from servers import IN_PRIVATE_DEV, ROOT, Database, Policyd, free_port, program, run_policyd, wait_until

import policyd as module

Start = Callable[..., Policyd]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file of the embedded store."""
    path = tmp_path / "policyd.cfg"
    path.write_text(f"statedir={tmp_path}\n")
    return path


def settings_for(database: Database, path: Path, **changes: str) -> str:
    """Write a settings file that leads to this database, and return its name."""
    settings = {**database.settings(), **changes}
    path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    return str(path)


def where(database: Database) -> str:
    return f"table events of MariaDB database {database.name}"


def run(status: int, *arguments: str, **environment: str) -> str:
    """Run policyd, which must end with this status; return what it printed, all of it in one place."""
    done = run_policyd(*arguments, **environment)
    assert done.returncode == status, done
    assert not (done.stdout and done.stderr), done
    return done.stdout or done.stderr


def failed_check(settings_file: str) -> str:
    """Return what a --check that ends with status 1 says of the store, on one line of stderr."""
    done = run_policyd("-c", settings_file, "--check")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
    prefix = "policyd: events cannot be counted: "
    assert done.stderr.startswith(prefix)
    return done.stderr[len(prefix):].rstrip("\n")


def test_version_is_said() -> None:
    assert run(0, "--version") == f"policyd {module.__version__}\n"


def test_help_names_every_option() -> None:
    text = run(0, "--help")
    for option in ("-c FILE", "--config FILE", "--stderr", "--check", "--init-db", "--version", "--help"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["policyd.cfg"], "unrecognized arguments: policyd.cfg"),
        (["-c"], "argument -c/--config: expected one argument"),
        (["--check", "--init-db"], "argument --init-db: not allowed with argument --check"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_gets_one_line(arguments: list[str], message: str) -> None:
    assert run(1, *arguments) == f"policyd: {message}; see policyd --help\n"


# ---- --check --------------------------------------------------------------------------------------


def test_check_says_what_it_found_of_the_embedded_store(file: Path, tmp_path: Path) -> None:
    store = f"embedded store {tmp_path}/events.sqlite3"
    assert run(0, "-c", str(file), "--check") == (
        f"inet:127.0.0.1:9093, quota 1500, {store}, settings: {file}\n"
        f"events can be counted: {store}\n"
    )


def test_check_by_root_leaves_a_store_that_the_daemon_can_write(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    if os.geteuid() == 0:
        os.chown(state, 65534, 65534)
    settings = tmp_path / "policyd.cfg"
    settings.write_text(f"statedir={state}\n")
    run(0, "-c", str(settings), "--check")
    assert {path.stat().st_uid for path in [state, *state.iterdir()]} == {state.stat().st_uid}


def test_check_says_when_the_embedded_store_cannot_be_written(tmp_path: Path, file: Path) -> None:
    absent = tmp_path / "absent"
    file.write_text(f"statedir={absent}\n")
    assert failed_check(str(file)) == f"{absent}/events.sqlite3: unable to open database file"


def test_check_says_what_it_found_in_the_database(database: Database, file: Path) -> None:
    assert run(0, "-c", settings_for(database, file), "--check") == (
        f"inet:127.0.0.1:9093, quota 1500, {where(database)}, settings: {file}\n"
        f"events can be counted: {where(database)}, logins of up to 255 characters, index on (sasl_username, ts)\n"
    )
    assert database.query("SELECT * FROM events") == []


def test_check_names_the_remedy_for_a_table_without_index(old_database: Database, file: Path) -> None:
    """Mail would be counted, so the status is 0."""
    assert run(0, "-c", settings_for(old_database, file), "--check").splitlines()[-1] == (
        f"events can be counted: {where(old_database)}, logins of up to 8 characters,"
        " NO index on (sasl_username, ts): slow when it is large; run policyd --init-db"
    )


def test_check_says_when_there_is_no_table(database: Database, file: Path) -> None:
    database.query("DROP TABLE events")
    assert failed_check(settings_for(database, file)) == (
        f"there is no {where(database)}; create it with policyd --init-db"
    )


def test_check_says_which_columns_are_missing(database: Database, file: Path) -> None:
    database.query("ALTER TABLE events DROP COLUMN recipient_count")
    assert failed_check(settings_for(database, file)) == f"{where(database)} has no column recipient_count"


def test_check_says_when_the_password_is_wrong_and_does_not_show_it(database: Database, file: Path) -> None:
    message = failed_check(settings_for(database, file, dbpass="hunter2"))
    assert message.startswith("127.0.0.1: (1045, \"Access denied for user 'policyd'@")
    assert "hunter2" not in message


def test_check_says_when_there_is_no_such_database(database: Database, file: Path) -> None:
    message = failed_check(settings_for(database, file, dbname="absent"))
    assert re.match(r"127\.0\.0\.1: \((1044|1049), ", message)


def test_check_says_when_it_may_not_insert(database: Database, file: Path) -> None:
    name = settings_for(database, file)
    database.query(f"REVOKE INSERT ON {database.name}.* FROM '{database.server.user}'@'127.0.0.1'")
    assert failed_check(name).startswith("(1142, \"INSERT command denied to user")


def test_check_says_which_server_does_not_answer(database: Database, file: Path) -> None:
    """And why, of each of them."""
    port = free_port()
    message = failed_check(settings_for(database, file, dbhost=f"127.0.0.1:{port} 127.0.0.2", dbport=str(port)))
    first, second = message.split("; ")
    for part, host in ((first, "127.0.0.1"), (second, "127.0.0.2")):
        assert part.startswith(f"{host}: (2003, \"Can't connect to MySQL server on '{host}'")
        assert "refused" in part


# ---- --init-db ------------------------------------------------------------------------------------


def test_init_db_creates_the_embedded_store(file: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(0, "-c", str(file), "--init-db") == f"embedded store {tmp_path}/events.sqlite3 is ready\n"
    assert (tmp_path / "events.sqlite3").stat().st_mode & 0o077 == 0, "who sent what is nobody else's business"


def test_init_db_creates_the_table_of_schema_sql(database: Database, file: Path) -> None:
    expected = database.query("SHOW CREATE TABLE events")
    database.query("DROP TABLE events")
    name = settings_for(database, file)
    assert run(0, "-c", name, "--init-db") == f"created {where(database)}\n"
    assert database.query("SHOW CREATE TABLE events") == expected
    assert run(0, "-c", name, "--init-db") == f"{where(database)} is up to date\n"


def test_init_db_upgrades_the_table_of_an_existing_deployment(
    database: Database, old_database: Database, file: Path
) -> None:
    """All rows stay, and what they say; then it is the table of schema.sql."""
    for number in range(50):
        old_database.query(
            "INSERT INTO events VALUES (CURRENT_TIMESTAMP(3) - INTERVAL %s HOUR, %s, %s, '192.0.2.1', %s)",
            (number, f"anna{number % 3}", "andr\xe9@example.org", number if number % 7 else None),
        )
    rows = "SELECT * FROM events ORDER BY ts, sasl_username"
    sums = "SELECT sasl_username, SUM(recipient_count) FROM events GROUP BY sasl_username ORDER BY sasl_username"
    before = old_database.query(rows), old_database.query(sums)
    name = settings_for(old_database, file)
    assert run(0, "-c", name, "--init-db") == (
        f"upgraded {where(old_database)}: wide columns of any character, index on (sasl_username, ts)\n"
    )
    assert (old_database.query(rows), old_database.query(sums)) == before
    assert columns_and_keys(old_database) == columns_and_keys(database)
    assert run(0, "-c", name, "--init-db") == f"{where(old_database)} is up to date\n"


def columns_and_keys(database: Database) -> list[tuple[object, ...]]:
    return database.query("SHOW FULL COLUMNS FROM events") + [
        (row[2], row[3], row[4]) for row in database.query("SHOW INDEX FROM events")
    ]


def test_init_db_without_the_right_to_says_so(old_database: Database, file: Path) -> None:
    name = settings_for(old_database, file)
    old_database.query(f"REVOKE ALTER ON {old_database.name}.* FROM '{old_database.server.user}'@'127.0.0.1'")
    line = run(1, "-c", name, "--init-db")
    assert line.startswith("policyd: events cannot be counted: (1142, \"ALTER command denied to user")
    assert line.count("\n") == 1


# ---- what a fresh machine lacks -------------------------------------------------------------------


def test_without_pymysql_a_database_gets_one_line_that_names_the_package(file: Path, tmp_path: Path) -> None:
    (tmp_path / "pymysql.py").write_text("raise ImportError('not installed')")
    file.write_text("dbname=policyd\ndbuser=policyd\n")
    for arguments in ([], ["--check"], ["--init-db"]):
        assert run(1, "-c", str(file), *arguments, PYTHONPATH=str(tmp_path)) == (
            "policyd: PyMySQL is missing: apt install python3-pymysql, or remove the db... settings\n"
        )


def test_without_pymysql_the_embedded_store_works(policyd: Start, tmp_path: Path) -> None:
    (tmp_path / "pymysql.py").write_text("raise ImportError('not installed')")
    daemon = policyd(environment={"PYTHONPATH": str(tmp_path)}, defaultquota=1)
    assert daemon.ask() == "HOLD quota exceeded"


# A machine as if new: a network of its own, in which port 9093 is free, and neither settings nor files of policyd.
FRESH_MACHINE = """
"$1" -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1))'  # SIOCSIFFLAGS, IFF_UP
for directory in /etc/postfix /var/lib/policyd; do
    [ ! -d "$directory" ] || mount -t tmpfs -o ro tmpfs "$directory" || exit
done
exec "$@"
"""
# What a person with nc does: paste the request of the README, and read.
PASTE = """
import socket
with socket.create_connection(("127.0.0.1", 9093), 20) as connection:
    connection.sendall(b"request=smtpd_access_policy\\nsasl_username=anna\\nrecipient_count=1\\n\\n")
    print(repr(connection.recv(100)))
"""


def test_on_a_fresh_machine_it_runs_with_one_command(tmp_path: Path) -> None:
    """Without settings, in an empty directory: it says where it listens, where its events and its settings go."""
    directory, dev = tmp_path / "empty", tmp_path / "dev"
    directory.mkdir()
    dev.mkdir()
    for name in ("null", "zero", "random", "urandom"):
        (dev / name).touch()
    errors = tmp_path / "stderr"
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("STATE_DIRECTORY", "NOTIFY_SOCKET")
    }
    with errors.open("wb") as stderr, subprocess.Popen(
        [program("unshare", "util-linux"), "--mount", "--net", *as_root, "sh", "-c", IN_PRIVATE_DEV, "sh", str(dev),
         "sh", "-c", FRESH_MACHINE, "sh", sys.executable, str(ROOT / "policyd.py")],
        cwd=directory, stdin=subprocess.DEVNULL, stderr=stderr, env=environment,
    ) as process:
        try:
            wait_until(lambda: errors.read_text().endswith("\n") or process.poll() is not None, "policyd has started")
            assert errors.read_text() == (
                f"policyd[{process.pid}]: policyd {module.__version__} on inet:127.0.0.1:9093, quota 1500,"
                f" embedded store {directory}/events.sqlite3,"
                " settings: none, defaults (yours would go into /etc/postfix/policyd.cfg)\n"
            )
            pasted = subprocess.run(
                [program("nsenter", "util-linux"), f"--target={process.pid}", "--net",
                 *(["--user", "--preserve-credentials"] if as_root else []), sys.executable, "-c", PASTE],
                capture_output=True, text=True, timeout=60,
            )
            assert (pasted.stdout, pasted.stderr) == (repr(b"action=DUNNO\n\n") + "\n", "")
        finally:
            process.terminate()
    assert process.returncode == 0
    assert f"policyd[{process.pid}]: Updating db: anna///1/1\n" in errors.read_text()
    assert (directory / "events.sqlite3").exists()
