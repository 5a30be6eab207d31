"""What MariaDB alone brings with it: the table, its upgrade, refused rows, other relays, and errors."""

from __future__ import annotations

import contextlib
import re
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import OLD_SCHEMA
from servers import Database, MariaDB, Policyd, free_port, run_policyd, wait_until
from stores import (
    WHOLE,
    Door,
    KeptLog,
    MariaStore,
    count,
    event,
    global_variable,
    maria_repository,
    session,
    sessions,
    soon,
    sums,
    table_locked,
)

from policyd import Event, MariaDBRepository, RepositoryUnavailable, retries

pytestmark = pytest.mark.mariadb


@pytest.fixture
def empty_database(mariadb: MariaDB) -> Iterator[Database]:
    """A database without a table."""
    new = mariadb.new_database("DO 0")
    yield new
    mariadb.drop_database(new.name)


def created(database: Database) -> str:
    """Return the statement that would make the table anew."""
    return str(database.query("SHOW CREATE TABLE events")[0][1])


def unavailable(work: Callable[..., Any], *arguments: Any) -> str:
    """Return what a repository complains of."""
    with pytest.raises(RepositoryUnavailable) as error:
        work(*arguments)
    return str(error.value)


# --- the table ---


def test_init_creates_the_table_of_the_schema_file(empty_database: Database, database: Database) -> None:
    repository = maria_repository(empty_database)
    assert repository.init().startswith("created table events")
    assert created(empty_database) == created(database)
    assert repository.init() == f"{repository} is up to date"
    assert created(empty_database) == created(database)
    assert count(repository, event("anna", 3)) == [3]


def test_init_leaves_the_table_of_the_schema_file_alone(database: Database) -> None:
    before = created(database)
    assert maria_repository(database).init().endswith("is up to date")
    assert created(database) == before


def test_init_upgrades_an_old_table_and_keeps_all_that_is_in_it(old_database: Database, database: Database) -> None:
    old = MariaStore(old_database)
    old.add([("é", "weiß@example.org", "192.0.2.1", 3), ("e", "", "", None), ("E", "", "", 4)], age_s=60)
    assert count(old.repository, event("longlogin1", 5), event("longlogin2", 6)) == [5, 11]
    rows = old_database.query("SELECT * FROM events ORDER BY ts, sasl_username, sender")

    assert maria_repository(old_database).init().startswith("upgraded table events")
    assert old_database.query("SELECT * FROM events ORDER BY ts, sasl_username, sender") == rows
    assert created(old_database) == created(database)
    upgraded = maria_repository(old_database)
    assert count(upgraded, event("é", 1), event("e", 1), event("E", 1), event("longlogi", 1)) == [4, 1, 5, 12]
    assert count(upgraded, event("longlogin1", 1), event("longlogin2", 2)) == [1, 2]
    assert upgraded.init().endswith("is up to date")


def test_init_keeps_an_index_that_serves(old_database: Database) -> None:
    old_database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    maria_repository(old_database).init()
    assert "KEY `by_login` (`sasl_username`,`ts`)" in created(old_database)
    assert "login_ts" not in created(old_database)


def test_a_running_daemon_counts_on_after_its_table_was_upgraded(old_database: Database) -> None:
    running = maria_repository(old_database)
    assert count(running, event("longlogin1", 1)) == [1]
    maria_repository(old_database).init()
    assert count(running, event("longlogin1", 2, sender="another")) == [3]


def test_check_names_the_missing_table_and_its_remedy(database: Database) -> None:
    repository = maria_repository(database, policy_table="evnts")
    message = unavailable(repository.check, soon())
    assert f"there is no table evnts of MariaDB database {database.name}" in message
    assert "policyd --init-db" in message


@pytest.mark.parametrize("column", ["ts", "sasl_username", "sender", "client_address", "recipient_count"])
def test_check_names_a_missing_column(database: Database, column: str) -> None:
    database.query(f"ALTER TABLE events CHANGE {column} other INT NOT NULL")
    assert f"has no column {column}" in unavailable(maria_repository(database).check, soon())


def test_check_tries_whether_events_may_be_inserted(database: Database) -> None:
    database.query(f"REVOKE INSERT ON {database.name}.* FROM '{database.server.user}'@'127.0.0.1'")
    assert "1142" in unavailable(maria_repository(database).check, soon())


def test_check_warns_of_a_missing_index_and_names_the_remedy(old_database: Database, logged: KeptLog) -> None:
    found = maria_repository(old_database).check(soon())
    assert "logins of up to 8 characters" in found
    assert "NO index" in found
    assert "policyd --init-db" in found
    assert [line.level for line in logged.lines] == ["warning"]
    maria_repository(old_database).init()
    del logged.lines[:]
    assert "255 characters, index on (sasl_username, ts)" in maria_repository(old_database).check(soon())
    assert logged.lines == []


def test_an_index_that_does_not_serve_is_as_good_as_none(old_database: Database) -> None:
    old_database.query("ALTER TABLE events ADD KEY other (ts, sasl_username), ADD KEY login (sasl_username)")
    assert "NO index" in maria_repository(old_database).check(soon())


def test_column_names_may_be_in_capitals(database: Database) -> None:
    database.query("ALTER TABLE events CHANGE sasl_username SASL_USERNAME VARCHAR(255) NOT NULL DEFAULT ''")
    assert count(maria_repository(database), event("anna", 3)) == [3]


# --- one clock, one millisecond ---


@contextlib.contextmanager
def clock_stopped(database: Database, at: str) -> Iterator[None]:
    """Let new sessions of policyd's live in one millisecond for ever."""
    seconds = database.query("SELECT UNIX_TIMESTAMP(%s)", (at,))[0][0]
    with global_variable(database, "init_connect", f"SET timestamp = {seconds}"):
        yield


@pytest.mark.parametrize("table", ["database", "old_database"])
def test_messages_of_one_millisecond_add_up_and_keep_their_time(table: str, request: pytest.FixtureRequest) -> None:
    """Also where go-policyd's table would move the time by itself, and where a row has no number yet."""
    database = request.getfixturevalue(table)
    now = "2026-03-04 05:06:07.123"
    database.query("INSERT INTO events VALUES (%s, 'bert', 's@example.org', '192.0.2.1', NULL)", (now,))
    with clock_stopped(database, now):
        relays = [maria_repository(database), maria_repository(database)]
        assert [count(relay, event("anna", 1), event("anna", 1)) for relay in relays] == [[1, 2], [3, 4]]
        assert count(relays[0], event("bert", 5)) == [5]
    rows = database.query("SELECT CAST(ts AS CHAR), sasl_username, recipient_count FROM events")
    assert sorted(rows) == [(now, "anna", 4), (now, "bert", 5)]


def test_times_are_the_local_ones_of_the_server(database: Database) -> None:
    """Those of an old table are; with two kinds of time in it, hours of mail would be counted wrongly."""
    with global_variable(database, "time_zone", "+05:00"):
        assert count(maria_repository(database), event("anna", 3)) == [3]
        assert database.query("SELECT COUNT(*) FROM events WHERE ABS(TIMESTAMPDIFF(MINUTE, ts, NOW())) < 60") == [(1,)]


# --- several relays ---


def test_two_relays_that_count_at_once_do_not_miss_each_other(database: Database) -> None:
    relays = [maria_repository(database), maria_repository(database)]
    together = threading.Barrier(2)

    def send(relay: MariaDBRepository, login: str) -> int:
        together.wait(10)
        return count(relay, event(login, 900))[0]

    with ThreadPoolExecutor(2) as threads:
        for n in range(20):
            sums = list(threads.map(send, relays, [f"anna{n}"] * 2))
            assert max(sums) == 1800, sums


# --- rows that are refused for their own sake ---


REFUSALS = {
    "DataError": "ALTER TABLE events MODIFY recipient_count TINYINT, DROP KEY login_ts",
    "IntegrityError": (
        "ALTER TABLE events ADD FOREIGN KEY (client_address) REFERENCES relays (address)"
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_row_that_is_refused_keeps_no_other_from_being_counted(
    database: Database, logged: KeptLog, kind: str
) -> None:
    database.query("CREATE TABLE relays (address VARCHAR(80) PRIMARY KEY) CHARSET utf8mb4 COLLATE utf8mb4_bin")
    database.query("INSERT INTO relays VALUES ('192.0.2.1')")
    database.query(REFUSALS[kind])
    guilty = Event("bert", "x@example.org", "192.0.2.9", 300)
    batch = [event("anna", 1), guilty, event("anna", 2, sender=""), event("carl", 3)]
    repository = maria_repository(database)
    assert repository.insert(batch, soon()) == {1}
    kept = [each for each in batch if each is not guilty]
    assert sums(repository, kept) == [1, 3, 3]
    assert len(logged.errors()) == 1
    assert logged.errors()[0].startswith("ERROR while UPDATING db: ")
    assert logged.errors()[0].endswith("; not counted: bert/x@example.org/192.0.2.9/300")
    assert {row[0] for row in database.query("SELECT sasl_username FROM events")} == {"anna", "carl"}


# --- servers ---


def via(database: Database, *servers: str) -> MariaDBRepository:
    """Return a repository that reaches the database over these servers."""
    return maria_repository(database, dbhost=", ".join(servers))


class Babble(socketserver.BaseRequestHandler):
    """Speaks, but not what PyMySQL understands."""

    def handle(self) -> None:
        self.request.sendall(b"220 mail.example.org ESMTP\r\n" * 10)


def test_a_dead_server_is_passed_over(database: Database) -> None:
    repository = via(database, f"127.0.0.1:{free_port()}", f"127.0.0.1:{database.server.port}")
    assert count(repository, event("anna", 3)) == [3]


def test_a_server_that_is_none_is_passed_over(database: Database) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Babble) as stranger:
        threading.Thread(target=stranger.serve_forever, args=(0.01,)).start()
        try:
            repository = via(database, f"127.0.0.1:{stranger.server_address[1]}", f"127.0.0.1:{database.server.port}")
            assert count(repository, event("anna", 3)) == [3]
        finally:
            stranger.shutdown()


def test_a_deaf_server_is_passed_over(database: Database) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Babble) as deaf:  # nobody serves it
        repository = via(database, f"127.0.0.1:{deaf.server_address[1]}", f"127.0.0.1:{database.server.port}")
        assert count(repository, event("anna", 3)) == [3]


def test_the_next_server_is_tried_when_one_fails(database: Database) -> None:
    doors = [Door(database.server.host, database.server.port) for _ in range(2)]
    repository = via(database, *(f"127.0.0.1:{door.port}" for door in doors))
    assert count(repository, event("anna", 3)) == [3]
    assert [len(door.passing) > 0 for door in doors] == [True, False]
    doors[0].shut()
    assert count(repository, event("anna", 4)) == [7]
    assert [len(door.passing) > 0 for door in doors] == [True, True]
    doors[1].shut()


def test_the_next_server_is_taken_when_one_answers_but_does_not_work(database: Database) -> None:
    doors = [Door(database.server.host, database.server.port) for _ in range(2)]
    repository = via(database, *(f"127.0.0.1:{door.port}" for door in doors))
    with global_variable(database, "read_only", 1):
        assert "1290" in unavailable(repository.insert, [event("anna")], soon())
    assert [len(door.passing) > 0 for door in doors] == [True, False]
    assert count(repository, event("anna", 4)) == [4]
    assert [len(door.passing) > 0 for door in doors] == [True, True]
    for door in doors:
        door.shut()


def test_every_server_that_failed_is_named(database: Database) -> None:
    message = unavailable(via(database, f"127.0.0.1:{free_port()}", "/no/such/socket").check, soon())
    assert "127.0.0.1: " in message
    assert "/no/such/socket: " in message


def test_a_unix_socket_may_lead_to_the_server(database: Database) -> None:
    server = database.server
    database.query(f"CREATE USER '{server.user}'@'localhost' IDENTIFIED BY %s", (server.password,))
    try:
        database.query(f"GRANT ALL ON {database.name}.* TO '{server.user}'@'localhost'")
        assert count(via(database, f"127.0.0.1:{free_port()}", server.socket), event("anna", 3)) == [3]
    finally:
        database.query(f"DROP USER '{server.user}'@'localhost'")


# --- connections ---


def kill_sessions(database: Database) -> None:
    """Close policyd's connections from the server's side."""
    for number, _, _ in sessions(database):
        database.query(f"KILL {number}")
    wait_until(lambda: not sessions(database), "the sessions are gone")


def test_a_connection_that_the_server_closed_is_replaced_without_an_outage(database: Database) -> None:
    repository = maria_repository(database)
    assert count(repository, event("anna", 3)) == [3]
    kill_sessions(database)
    assert repository.insert([event("anna", 4)], soon()) == set()
    kill_sessions(database)
    assert sums(repository, [event("anna", 4)]) == [7]


def test_after_one_closed_connection_no_other_is_tried(database: Database) -> None:
    """They have all been closed: what is tried instead is a new one."""
    repository = maria_repository(database)
    repository.check(soon())
    with ThreadPoolExecutor(2) as threads:
        with table_locked(database):
            inserts = [threads.submit(repository.insert, [event("anna", n)], soon()) for n in (1, 2)]
            wait_until(lambda: len(sessions(database)) == 2, "both have a connection")
        assert [insert.result() for insert in inserts] == [set(), set()]
    kill_sessions(database)
    assert count(repository, event("anna", 4)) == [7]


def test_a_statement_may_take_longer_than_a_connect(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policyd.CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr("policyd.STATEMENT_TIMEOUT_S", 30)
    repository = maria_repository(database)
    repository.check(soon())
    with ThreadPoolExecutor(1) as thread:
        with table_locked(database):
            done = thread.submit(repository.insert, [event("anna", 1)], soon())
            wait_until(lambda: done.done() or any(ms > 700 for _, info, ms in sessions(database) if info), "it waits")
        assert done.result() == set()


def test_one_connection_serves_all_batches(database: Database) -> None:
    repository = maria_repository(database)
    for n in range(10):
        count(repository, event("anna", n))
    assert len(sessions(database)) == 1


def test_a_lost_race_against_another_transaction_is_run_again(database: Database) -> None:
    with clock_stopped(database, "2026-03-04 05:06:07.123"), ThreadPoolExecutor(1) as thread:
        repository = maria_repository(database)
        repository.check(soon())
        deadlocks = database.query("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'")
        with session(database) as cursor:

            def add(login: str) -> None:
                cursor.execute(
                    "INSERT INTO events VALUES ('2026-03-04 05:06:07.123', %s, 's@example.org', '192.0.2.1', 10)",
                    (login,),
                )

            for n in range(200):  # the one that has done more is not the one to give up
                add(f"someone{n}")
            add("bert")
            inserted = thread.submit(repository.insert, [event("anna", 1), event("bert", 2)], soon())
            wait_until(
                lambda: database.query("SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"),
                "policyd waits for our lock",
            )
            add("anna")  # and we for policyd's: one of us must give up
            cursor.execute("COMMIT")
        assert inserted.result() == set()
        assert database.query("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'") > deadlocks
        assert sums(repository, [event("anna"), event("bert")]) == [11, 12]


def test_how_often_an_error_is_worth_a_retry() -> None:
    import pymysql

    for code in (1213, 1205, 1020):
        assert retries(pymysql.OperationalError(code, "")) == 5, code
    for code in (2006, 2013):
        assert retries(pymysql.OperationalError(code, "")) == 1, code
    assert retries(pymysql.InterfaceError(0, "")) == 1
    for code in (1047, 1290, 1142, 1045, 1040, 1146, 1969, 1044):
        assert retries(pymysql.OperationalError(code, "")) == 0, code


def test_a_time_out_is_not_retried(mariadb: MariaDB) -> None:
    """The server may be at work on the statement still: once more would be twice."""
    import pymysql

    connection = pymysql.connect(unix_socket=mariadb.socket, user="root", read_timeout=0.05, ssl_disabled=True)
    with connection.cursor() as cursor, pytest.raises(pymysql.OperationalError) as error:
        cursor.execute("SELECT SLEEP(1)")
    assert error.value.args[0] == 2013
    assert retries(error.value) == 0


# --- errors that are outages ---


def test_a_frozen_server_is_an_outage_by_the_deadline_and_doubles_nothing(
    mariadb: MariaDB, database: Database
) -> None:
    repository = maria_repository(database)
    assert count(repository, event("anna", 1)) == [1]
    mariadb.freeze()
    began = time.monotonic()
    unavailable(repository.insert, [event("anna", 100)], began + 0.5)
    assert time.monotonic() - began < 10  # a retry without a deadline would wait for ever
    unavailable(repository.check, time.monotonic() + 0.5)
    mariadb.thaw()
    wait_until(lambda: not sessions(database), "the server has noticed that we are gone")
    # What was on its way when we gave up may have been written, once.
    assert count(repository, event("anna", 1)) in ([2], [102])


def test_a_slow_statement_is_ended_by_the_server(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it does not write a row long after everybody has an answer."""
    monkeypatch.setattr("policyd.STATEMENT_TIMEOUT_S", 0.05)
    repository = maria_repository(database)
    repository.check(soon())
    with table_locked(database):
        assert "1969" in unavailable(repository.insert, [event("anna", 100)], soon())
        assert "1969" in unavailable(repository.sum_recipients, [event("anna", 100)], WHOLE, soon())
    assert count(repository, event("anna", 1)) == [1]


@pytest.mark.parametrize("name", ["purge", "init"])
def test_housekeeping_may_take_its_time(database: Database, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("policyd.STATEMENT_TIMEOUT_S", 0.05)
    repository = maria_repository(database)
    work: Callable[[], object] = {"purge": lambda: repository.purge(7), "init": repository.init}[name]
    with ThreadPoolExecutor(1) as thread:
        with table_locked(database):
            done = thread.submit(work)
            wait_until(lambda: any(ms > 300 for _, info, ms in sessions(database) if info), "it waits for the lock")
        done.result(30)


def test_a_read_only_server_is_an_outage(database: Database) -> None:
    repository = maria_repository(database)
    with global_variable(database, "read_only", 1):
        assert "1290" in unavailable(repository.insert, [event("anna", 1)], soon())
        assert "1290" in unavailable(repository.check, soon())
    assert count(repository, event("anna", 1)) == [1]


def test_a_dropped_table_is_an_outage_until_it_is_back(database: Database) -> None:
    repository = maria_repository(database)
    assert count(repository, event("anna", 1)) == [1]
    database.query("DROP TABLE events")
    assert "1146" in unavailable(repository.insert, [event("anna", 1)], soon())
    assert "1146" in unavailable(repository.sum_recipients, [event("anna", 1)], WHOLE, soon())
    assert "there is no table events" in unavailable(repository.check, soon())
    database.query(OLD_SCHEMA)  # with the other columns
    repository.check(soon())
    assert count(repository, event("longlogin1", 1), event("longlogin2", 1)) == [1, 2]


def test_a_dropped_index_is_an_outage_until_the_table_is_looked_at(database: Database) -> None:
    repository = maria_repository(database)
    assert count(repository, event("anna", 1)) == [1]
    database.query("ALTER TABLE events DROP KEY login_ts")
    unavailable(repository.sum_recipients, [event("anna", 1)], WHOLE, soon())
    repository.check(soon())
    assert count(repository, event("anna", 1)) == [2]


def test_a_wrong_password_is_an_outage(database: Database) -> None:
    assert "1045" in unavailable(maria_repository(database, dbpass="wrong").insert, [event("anna", 1)], soon())


@pytest.mark.parametrize("right", ["INSERT", "SELECT", "UPDATE"])
def test_a_right_that_is_missing_is_an_outage(database: Database, right: str) -> None:
    database.query(f"REVOKE {right} ON {database.name}.* FROM '{database.server.user}'@'127.0.0.1'")
    assert re.search("114[23]", unavailable(count, maria_repository(database), event("anna", 1)))


def test_a_connection_in_which_something_failed_is_not_used_again(database: Database) -> None:
    """The next one may lead to a server that is well."""
    repository = maria_repository(database)
    count(repository, event("anna", 1))
    before = {number for number, _, _ in sessions(database)}
    with global_variable(database, "read_only", 1):
        unavailable(repository.insert, [event("anna", 1)], soon())
    count(repository, event("anna", 1))
    assert before.isdisjoint(number for number, _, _ in sessions(database))


# --- the command ---


def test_the_daemon_tells_of_a_missing_index_when_it_starts(
    policyd: Callable[..., Policyd], old_database: Database
) -> None:
    line = policyd(**old_database.settings()).wait_for_log("NO index on (sasl_username, ts)")
    assert line.level == "warning"
    assert "run policyd --init-db" in line.text


def test_init_db_and_check_on_the_command_line(empty_database: Database, tmp_path: Path) -> None:
    file = tmp_path / "policyd.cfg"
    file.write_text("".join(f"{key}={value}\n" for key, value in empty_database.settings().items()))
    failed = run_policyd("--check", "-c", str(file))
    assert failed.returncode == 1
    assert "policyd --init-db" in failed.stderr
    done = run_policyd("--init-db", "-c", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"created table events of MariaDB database {empty_database.name}\n"
    checked = run_policyd("--check", "-c", str(file))
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "events can be counted" in checked.stdout

