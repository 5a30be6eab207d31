"""What MariaDB alone brings with it: the table, its upgrade, refused rows, other relays, and errors."""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import pytest
from servers import Database, MariaDB, Policyd, free_port, wait_until
from stores import (
    Door,
    KeptLog,
    MariaStore,
    count,
    event,
    global_variable,
    incident,
    maria_repository,
    on_stores,
    read_settings,
    session,
    sessions,
    soon,
    sums,
    table_locked,
    total,
)

from policyd import Event, MariaDBRepository, RepositoryUnavailable, Settings, open_repository

pytestmark = pytest.mark.mariadb

both_tables = on_stores("schema.sql", "go-policyd")
ENDED = re.compile(r"\((1969|1205|3024),")  # a statement that took too long, in MariaDB's words and in MySQL's


@pytest.fixture
def empty_database(mariadb: MariaDB) -> Iterator[Database]:
    """A database without a table."""
    new = mariadb.new_database("DO 0")
    yield new
    mariadb.drop_database(new.name)


def created(database: Database) -> str:
    """Return the statement that would make the table anew, without what MySQL says twice."""
    return re.sub(" CHARACTER SET utf8mb4| COLLATE utf8mb4_bin", "", database.query("SHOW CREATE TABLE events")[0][1])


def unavailable(work: Callable[..., Any], *arguments: Any) -> str:
    """Return what a repository complains of."""
    with pytest.raises(RepositoryUnavailable) as error:
        work(*arguments)
    return str(error.value)


# --- the table ---


def test_init_creates_the_table_of_the_schema_file_and_leaves_it_alone(
    empty_database: Database, database: Database
) -> None:
    expected = created(database)
    repository = maria_repository(empty_database)
    assert repository.init().startswith("created table events")
    for each in (repository, maria_repository(database)):
        assert each.init() == f"{each} is up to date"
    assert created(empty_database) == created(database) == expected
    assert count(repository, event("anna", 3)) == [3]


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


@pytest.mark.parametrize("column", ["ts", "sasl_username", "sender", "client_address", "recipient_count"])
def test_check_names_a_missing_column(database: Database, column: str) -> None:
    database.query(f"ALTER TABLE events CHANGE {column} other INT NOT NULL")
    assert f"has no column {column}" in unavailable(maria_repository(database).check, soon())


def test_check_warns_of_a_missing_index_and_names_the_remedy(old_database: Database, logged: KeptLog) -> None:
    """One that does not serve is as good as none."""
    old_database.query("ALTER TABLE events ADD KEY other (ts, sasl_username), ADD KEY login (sasl_username)")
    found = maria_repository(old_database).check(soon())
    assert "logins of up to 8 characters" in found
    assert "NO index" in found
    assert "policyd --init-db" in found
    assert [line.level for line in logged.lines] == ["warning"]
    maria_repository(old_database).init()
    del logged.lines[:]
    assert "255 characters, index on (sasl_username, ts)" in maria_repository(old_database).check(soon())
    assert logged.lines == []


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


@both_tables
def test_messages_of_one_millisecond_add_up_and_keep_their_time(store: MariaStore) -> None:
    """Also where go-policyd's table would move the time by itself, and where a row has no number yet."""
    now = "2026-03-04 05:06:07.123"
    store.database.query("INSERT INTO events VALUES (%s, 'bert', 's@example.org', '192.0.2.1', NULL)", (now,))
    with clock_stopped(store.database, now):
        relays = [store.another(), store.another()]
        assert [count(relay, event("anna", 1)) for relay in relays * 2] == [[1], [2], [3], [4]]
        assert count(relays[0], event("bert", 5)) == [5]
    rows = store.database.query("SELECT CAST(ts AS CHAR), sasl_username, recipient_count FROM events")
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

GUILTY = Event("bert", "x@example.org", "192.0.2.9", 300)
REFUSALS = {
    "a number that does not fit": ["ALTER TABLE events MODIFY recipient_count TINYINT, DROP KEY login_ts"],
    "a foreign key": [
        "CREATE TABLE relays (address VARCHAR(80) PRIMARY KEY) CHARSET utf8mb4 COLLATE utf8mb4_bin",
        "INSERT INTO relays VALUES ('192.0.2.1')",
        "ALTER TABLE events ADD FOREIGN KEY (client_address) REFERENCES relays (address)",
    ],
    "CHECK": ["ALTER TABLE events ADD CHECK (recipient_count < 100)"],
    "SIGNAL": [
        "CREATE TRIGGER no_crowds BEFORE INSERT ON events FOR EACH ROW BEGIN"
        " IF NEW.recipient_count > 100 THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no crowds'; END IF; END"
    ],
    "NOT NULL": ["ALTER TABLE events MODIFY recipient_count INT NOT NULL"],
}


@pytest.mark.parametrize("is_replay", [False, True], ids=["now", "in a replay"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_row_that_is_refused_keeps_no_other_from_being_counted_and_doubles_none(
    database: Database, logged: KeptLog, refusal: str, is_replay: bool
) -> None:
    for statement in REFUSALS[refusal]:
        database.query(statement)
    store = MariaStore(database)
    guilty = incident("bert", "HOLD overquota") if refusal == "NOT NULL" else GUILTY
    batch = [event(login, n, sender=f"{n % 2}@example.org") for n in range(1, 60) for login in ("anna", "carl")]
    batch[7:7] = batch[70:70] = [guilty]
    times = [int(time.time() * 1000) - 90_000 + n for n in range(len(batch))] if is_replay else None
    assert store.repository.insert(batch, soon(), times) == {n for n, each in enumerate(batch) if each is guilty}
    assert {row[0]: total(store, row[0]) for row in store.rows()} == {"anna": 1770, "carl": 1770}
    kept = [each for each in batch if each is not guilty]
    assert sums(store.repository, kept)[-2:] == [1770, 1770]
    assert [error.startswith("ERROR while UPDATING db: (") for error in logged.errors()] == [True, True]
    assert {error.rpartition("; not counted: ")[2] for error in logged.errors()} == {"/".join(map(str, guilty))}
    store.repository.check(soon())
    assert store.repository.insert([guilty, event("anna", 2)], soon()) == {0}


def test_a_column_that_we_do_not_fill_refuses_each_row_and_is_no_endless_outage(
    database: Database, logged: KeptLog
) -> None:
    database.query("ALTER TABLE events ADD COLUMN relay INT NOT NULL")
    assert maria_repository(database).insert([event("anna"), event("bert")], soon()) == {0, 1}
    assert all("1364" in error for error in logged.errors())


def test_a_batch_with_refused_rows_that_runs_out_of_time_leaves_nothing_behind(
    database: Database, logged: KeptLog
) -> None:
    """It is journaled or replayed again as a whole: what is committed by then would be there twice, again and again."""
    database.query("ALTER TABLE events MODIFY recipient_count TINYINT")
    store = MariaStore(database)
    door = Door(database.server.host, database.server.port)
    slow = maria_repository(database, dbhost=f"127.0.0.1:{door.port}")
    slow.check(soon())
    batch = [event(f"login{n}", 1 if n % 2 else 300) for n in range(200)]
    door.delay_s = 0.02  # some hundred statements: they would take seconds
    for _ in range(3):
        unavailable(slow.insert, batch, time.monotonic() + 0.9)
        wait_until(lambda: not sessions(database), "the server has noticed that we are gone")
        assert total(store) == 0
    door.delay_s = 0
    assert slow.insert(batch, soon()) == set(range(0, 200, 2))
    assert total(store) == 100
    door.shut()


# --- servers ---


def via(database: Database, *servers: str | Door) -> MariaDBRepository:
    """Return a repository that reaches the database over these servers."""
    named = [f"127.0.0.1:{server.port}" if isinstance(server, Door) else server for server in servers]
    return maria_repository(database, dbhost=", ".join(named))


def was_used(*doors: Door) -> list[bool]:
    """Tell through which doors somebody has gone."""
    return [len(door.passing) > 0 for door in doors]


@pytest.fixture
def doors(database: Database) -> Iterator[list[Door]]:
    """Two ways to the server."""
    two = [Door(database.server.host, database.server.port) for _ in range(2)]
    yield two
    for door in two:
        door.shut()


class Babble(socketserver.BaseRequestHandler):
    """Speaks, but not what PyMySQL understands."""

    def handle(self) -> None:
        self.request.sendall(b"220 mail.example.org ESMTP\r\n" * 10)


@pytest.fixture(params=["dead", "babbling", "deaf"])
def useless(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of which nothing is to be had."""
    if request.param == "dead":
        yield f"127.0.0.1:{free_port()}"
        return
    with socketserver.TCPServer(("127.0.0.1", 0), Babble) as stranger:
        if request.param == "babbling":
            threading.Thread(target=stranger.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{stranger.server_address[1]}"
        if request.param == "babbling":
            stranger.shutdown()


def test_a_server_of_which_nothing_is_to_be_had_is_passed_over(database: Database, useless: str) -> None:
    assert count(via(database, useless, f"127.0.0.1:{database.server.port}"), event("anna", 3)) == [3]


def test_the_next_server_is_tried_when_one_fails(database: Database, doors: list[Door]) -> None:
    repository = via(database, *doors)
    assert count(repository, event("anna", 3)) == [3]
    assert was_used(*doors) == [True, False]
    doors[0].shut()
    assert count(repository, event("anna", 4)) == [7]
    assert was_used(*doors) == [True, True]


def test_the_next_server_is_taken_when_one_answers_but_does_not_work(database: Database, doors: list[Door]) -> None:
    repository = via(database, *doors)
    with global_variable(database, "read_only", 1):
        assert "1290" in unavailable(repository.insert, [event("anna")], soon())
    assert was_used(*doors) == [True, False]
    assert count(repository, event("anna", 4)) == [4]
    assert was_used(*doors) == [True, True]


def test_a_name_that_is_not_found_any_more_keeps_its_address(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = via(database, f"localhost:{database.server.port}")

    look_up = socket.getaddrinfo

    def fail(host: str, *arguments: object, **options: object) -> object:
        if not host[0].isdigit():
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    repository.resolve()
    assert count(repository, event("anna", 3)) == [3]
    unknown = open_repository(read_settings(**database.settings() | {"dbhost": "db.example.org"}))
    unknown.resolve()
    assert "db.example.org: [Errno -3] Temporary failure in name resolution" in unavailable(unknown.check, soon())


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


def test_a_statement_may_take_longer_than_a_connect(database: Database) -> None:
    repository = maria_repository(database)
    repository.check(soon())
    with ThreadPoolExecutor(1) as thread:
        with table_locked(database):
            done = thread.submit(repository.insert, [event("anna", 1)], soon())
            wait_until(lambda: done.done() or any(ms > 1200 for _, info, ms in sessions(database) if info), "it waits")
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
            add("anna")  # and we for policyd's: one must give up, and it is not the one that this raises for
            cursor.execute("COMMIT")
        assert inserted.result() == set()
        assert sums(repository, [event("anna"), event("bert")]) == [11, 12]


@contextlib.contextmanager
def row_locked(database: Database, login: str) -> Iterator[None]:
    """Keep everybody else from the row that the next message of this login adds to."""
    now = "2026-03-04 05:06:07.123"
    with clock_stopped(database, now), session(database) as cursor:
        cursor.execute("INSERT INTO events VALUES (%s, %s, 's@example.org', '192.0.2.1', 1)", (now, login))
        yield
        cursor.execute("ROLLBACK")


def test_a_lock_that_is_not_had_in_time_is_an_outage_and_not_tried_again(database: Database) -> None:
    """The statement may come to its end all the same; tried again, its recipients would be there twice."""
    store = MariaStore(database)
    inserts = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_waits'"
    with global_variable(database, "innodb_lock_wait_timeout", 1), row_locked(database, "anna"):
        repository = maria_repository(database)
        repository.check(soon())
        before = int(database.query(inserts)[0][1])
        assert "1205" in unavailable(repository.insert, [event("anna", 100)], soon())
        assert int(database.query(inserts)[0][1]) == before + 1
    assert total(store) == 0
    assert count(repository, event("anna", 1)) == [1]


# --- errors that are outages ---


def test_an_insert_is_ended_by_the_server_before_we_stop_waiting_for_it(database: Database) -> None:
    """So that no late row comes in beside its journaled copy, however little time a batch has left."""
    store = MariaStore(database)
    repository = maria_repository(database)
    repository.check(soon())
    patience_s = 2.8 if database.server.is_mysql else 1  # on MySQL the limit is that of the session
    with table_locked(database):
        assert ENDED.match(unavailable(repository.insert, [event("anna", 100)], time.monotonic() + patience_s))
        assert ENDED.match(unavailable(repository.usages, [event("anna", 100)], Settings(), soon()))
        wait_until(lambda: not any(info for _, info, _ in sessions(database)), "nobody is at work")
    assert total(store) == 0
    assert count(repository, event("anna", 1)) == [1]


@pytest.mark.parametrize("name", ["purge", "init"])
def test_housekeeping_may_take_its_time(database: Database, name: str) -> None:
    repository = maria_repository(database)
    work: Callable[[], object] = {"purge": lambda: sum(repository.purge(7)), "init": repository.init}[name]
    with ThreadPoolExecutor(1) as thread:
        with table_locked(database):
            done = thread.submit(work)
            wait_until(lambda: any(ms > 2500 for _, info, ms in sessions(database) if info), "it waits for the lock")
        done.result(30)


def test_a_dropped_index_is_no_outage(database: Database) -> None:
    repository = maria_repository(database)
    assert count(repository, event("anna", 1)) == [1]
    assert repository.has_index()
    database.query("ALTER TABLE events DROP KEY login_ts")
    assert count(repository, event("anna", 1)) == [2]
    assert not repository.has_index()


@pytest.mark.parametrize("right", ["INSERT", "SELECT", "UPDATE"])
def test_a_right_that_is_missing_is_an_outage(database: Database, right: str) -> None:
    database.query(f"REVOKE {right} ON {database.name}.* FROM '{database.server.user}'@'127.0.0.1'")
    assert re.search("114[23]", unavailable(count, maria_repository(database), event("anna", 1)))


# --- the command ---


def test_the_daemon_tells_of_a_missing_index_when_it_starts(
    policyd: Callable[..., Policyd], old_database: Database
) -> None:
    line = policyd(**old_database.settings()).wait_for_log("NO index on (sasl_username, ts)")
    assert line.level == "warning"
    assert "run policyd --init-db" in line.text
