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
from servers import Database, free_port, wait_until
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
    session,
    sessions,
    soon,
    sums,
    table_locked,
    total,
)

from policyd import LATE_ROW_S, Event, MariaDBRepository, RepositoryUnavailable, Settings

pytestmark = pytest.mark.mariadb
ENDED = re.compile(r"\((1969|1205|3024),")  # a statement that took too long, in MariaDB's words and in MySQL's
ANNA = event("anna")


def created(database: Database) -> str:
    """Return the statement that would make the table anew, without what MySQL says twice."""
    return re.sub(" CHARACTER SET utf8mb4| COLLATE utf8mb4_bin", "", database.query("SHOW CREATE TABLE events")[0][1])


def unavailable(work: Callable[..., Any], *arguments: Any) -> str:
    """Return what a repository complains of."""
    with pytest.raises(RepositoryUnavailable) as error:
        work(*arguments)
    return str(error.value)


@pytest.fixture
def doors(database: Database) -> Iterator[list[Door]]:
    """Two ways to the server."""
    two = [Door(database.server.host, database.server.port) for _ in range(2)]
    yield two
    for door in two:
        door.shut()


def via(database: Database, *servers: str | Door) -> MariaDBRepository:
    """Return a repository that reaches the database over these servers."""
    named = [f"127.0.0.1:{server.port}" if isinstance(server, Door) else server for server in servers]
    return maria_repository(database, dbhost=", ".join(named))


# --- the table ---


def test_init_creates_the_table_of_the_schema_file_and_leaves_it_alone(database: Database) -> None:
    expected = created(database)
    repository = maria_repository(database)
    for _ in range(2):
        assert repository.init() == f"{repository} is up to date"
        assert created(database) == expected
        database.query("DROP TABLE events")
        assert repository.init().startswith("created table events")
        assert count(repository, event("anna", 3)) == [3]


def test_init_upgrades_an_old_table_and_keeps_all_that_is_in_it(old_database: Database, database: Database) -> None:
    """Of a daemon that runs meanwhile, too: it counts on, with the old widths, and a new one with the new ones."""
    old = MariaStore(old_database)
    old.add([("é", "weiß@example.org", "192.0.2.1", 3), ("e", "", "", None), ("E", "", "", 4)], age_s=60)
    assert count(old.repository, event("longlogin1", 5), event("longlogin2", 6)) == [5, 11]
    rows = old_database.query("SELECT * FROM events ORDER BY ts, sasl_username, sender")

    assert maria_repository(old_database).init().startswith("upgraded table events")
    assert old_database.query("SELECT * FROM events ORDER BY ts, sasl_username, sender") == rows
    assert created(old_database) == created(database)
    assert count(old.repository, event("longlogin1", 1, sender="another")) == [12]
    upgraded = maria_repository(old_database)
    assert count(upgraded, event("é", 1), event("e", 1), event("E", 1), event("longlogi", 1)) == [4, 1, 5, 13]
    assert count(upgraded, event("longlogin1", 1), event("longlogin2", 2)) == [1, 2]
    assert upgraded.init().endswith("is up to date")


@pytest.mark.parametrize("column", ["ts", "sasl_username", "sender", "client_address", "recipient_count"])
def test_check_names_a_missing_column(database: Database, column: str) -> None:
    """Its name may be in capitals."""
    database.query(f"ALTER TABLE events RENAME COLUMN {column} TO {column.upper()}")
    assert count(maria_repository(database), ANNA) == [1]
    database.query(f"ALTER TABLE events RENAME COLUMN {column} TO other")
    assert f"has no column {column}" in unavailable(maria_repository(database).check, soon())


def test_check_warns_of_a_missing_index_and_names_the_remedy(old_database: Database, logged: KeptLog) -> None:
    """One that does not serve is as good as none; one that does is kept by --init-db."""
    old_database.query("ALTER TABLE events ADD KEY other (ts, sasl_username), ADD KEY login (sasl_username)")
    found = maria_repository(old_database).check(soon())
    assert re.search("logins of up to 8 characters, NO index .*policyd --init-db", found)
    assert [(line.level, "NO index" in line.text) for line in logged.lines] == [("warning", True)]
    old_database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    maria_repository(old_database).init()
    assert "KEY `by_login` (`sasl_username`,`ts`)" in created(old_database)
    assert "login_ts" not in created(old_database)
    del logged.lines[:]
    assert "255 characters, index on (sasl_username, ts)" in maria_repository(old_database).check(soon())
    assert logged.lines == []


# --- one clock, several relays; that they do not miss each other is in test_exactness.py ---

NOW = "2026-03-04 05:06:07.123"


@contextlib.contextmanager
def clock_stopped(database: Database) -> Iterator[None]:
    """Let new sessions of policyd's live in one millisecond for ever."""
    seconds = database.query("SELECT UNIX_TIMESTAMP(%s)", (NOW,))[0][0]
    with global_variable(database, "init_connect", f"SET timestamp = {seconds}"):
        yield


@on_stores("schema.sql", "go-policyd")
def test_messages_of_one_millisecond_add_up_and_keep_their_time(store: MariaStore) -> None:
    """Also where go-policyd's table would move the time by itself, and where a row has no number yet."""
    store.database.query("INSERT INTO events VALUES (%s, 'bert', 's@example.org', '192.0.2.1', NULL)", (NOW,))
    with clock_stopped(store.database):
        relays = [store.another(), store.another()]
        assert [count(relay, ANNA) for relay in relays * 2] == [[1], [2], [3], [4]]
        assert count(relays[0], event("bert", 5)) == [5]
    rows = store.database.query("SELECT CAST(ts AS CHAR), sasl_username, recipient_count FROM events")
    assert sorted(rows) == [(NOW, "anna", 4), (NOW, "bert", 5)]


def test_times_are_the_local_ones_of_the_server(database: Database) -> None:
    """Those of an old table are; with two kinds of time in it, hours of mail would be counted wrongly."""
    with global_variable(database, "time_zone", "+05:00"):
        assert count(maria_repository(database), event("anna", 3)) == [3]
        assert database.query("SELECT COUNT(*) FROM events WHERE ABS(TIMESTAMPDIFF(MINUTE, ts, NOW())) < 60") == [(1,)]


@pytest.mark.parametrize("quota", [3, 10**6])
def test_who_is_forgiven_at_once_begins_no_outage(database: Database, quota: int) -> None:
    """What was inserted is there, though its sum is less: no replica has answered, see test_splitter.py."""
    repository = maria_repository(database)
    settings = Settings(defaultquota=quota)
    assert count(repository, event("anna", 2000), settings=settings) == [2000]
    assert repository.insert([event("anna", 5)], soon()) == set()
    database.query("UPDATE events SET recipient_count = -recipient_count")
    assert sums(repository, [event("anna", 5)], settings) == [0]


# --- rows that are refused for their own sake ---

GUILTY = Event("bert", "x@example.org", "192.0.2.9", 300)
REFUSALS = {
    "a number that does not fit": ["ALTER TABLE events MODIFY recipient_count TINYINT, DROP KEY login_ts"],
    "a foreign key": ["CREATE TABLE relays (address VARCHAR(80) PRIMARY KEY) CHARSET utf8mb4 COLLATE utf8mb4_bin",
                      "INSERT INTO relays VALUES ('192.0.2.1')",
                      "ALTER TABLE events ADD FOREIGN KEY (client_address) REFERENCES relays (address)"],
    "CHECK": ["ALTER TABLE events ADD CHECK (recipient_count < 100)"],
    "SIGNAL": ["CREATE TRIGGER no_crowds BEFORE INSERT ON events FOR EACH ROW BEGIN IF NEW.recipient_count > 100"
               " THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no crowds'; END IF; END"],
    "NOT NULL": ["ALTER TABLE events MODIFY recipient_count INT NOT NULL"],
}  # fmt: skip


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


def test_a_column_that_we_do_not_fill_is_no_endless_outage(database: Database, logged: KeptLog) -> None:
    database.query("ALTER TABLE events ADD COLUMN relay INT NOT NULL")
    assert maria_repository(database).insert([ANNA, event("bert")], soon()) == {0, 1}
    assert ["1364" in error for error in logged.errors()] == [True, True]


def test_a_batch_with_refused_rows_that_fails_leaves_nothing(database: Database, doors: list[Door]) -> None:
    """It is journaled or replayed again as a whole: what is committed by then would be there twice, again and again."""
    database.query("ALTER TABLE events MODIFY recipient_count TINYINT")
    store = MariaStore(database)
    slow = via(database, doors[0])
    slow.check(soon())
    batch = [event(f"login{n}", 1 if n % 2 else 300) for n in range(200)]
    doors[0].delay_s = 0.02  # some hundred statements: they would take seconds
    for _ in range(3):
        unavailable(slow.insert, batch, time.monotonic() + 0.9)
        wait_until(lambda: not sessions(database), "the server has noticed that we are gone")
        assert total(store) == 0
    doors[0].delay_s = 0
    assert slow.insert(batch, soon()) == set(range(0, 200, 2))
    assert total(store) == 100


# --- servers ---


class Babble(socketserver.BaseRequestHandler):
    """Speaks, but not what PyMySQL understands."""

    def handle(self) -> None:
        self.request.sendall(b"220 mail.example.org ESMTP\r\n" * 10)


@pytest.mark.parametrize("kind", ["dead", "babbling", "deaf"])
def test_a_server_that_gives_nothing_is_passed_over(database: Database, doors: list[Door], kind: str) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), Babble) as stranger:
        if kind == "babbling":
            threading.Thread(target=stranger.serve_forever, args=(0.01,), daemon=True).start()
        port = free_port() if kind == "dead" else stranger.server_address[1]
        assert count(via(database, f"127.0.0.1:{port}", doors[0]), event("anna", 3)) == [3]
        if kind == "babbling":
            stranger.shutdown()


def test_the_next_server_is_taken_when_one_fails_or_does_not_work(database: Database, doors: list[Door]) -> None:
    repository = via(database, *doors)
    assert count(repository, event("anna", 3)) == [3]
    assert [len(door.passing) > 0 for door in doors] == [True, False]
    with global_variable(database, "read_only", 1):
        assert "1290" in unavailable(repository.insert, [ANNA], soon())
    assert count(repository, event("anna", 4)) == [7]
    assert [len(door.passing) for door in doors] == [2, 2], "the other one, though the first one answers"
    doors[1].shut()
    assert count(repository, event("anna", 4)) == [11]
    assert len(doors[0].passing) == 4


def test_a_name_that_is_lost_keeps_its_address(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = via(database, f"localhost:{database.server.port}")
    look_up = socket.getaddrinfo

    def fail(host: str, *arguments: object, **options: object) -> object:
        if not host[0].isdigit():
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    repository.resolve()
    assert count(repository, event("anna", 3)) == [3]
    refusal = "db.example.org: [Errno -3] Temporary failure in name resolution"
    assert refusal in unavailable(via(database, "db.example.org").check, soon())


def test_a_unix_socket_may_lead_to_the_server(database: Database) -> None:
    server = database.server
    database.query(f"CREATE USER '{server.user}'@'localhost' IDENTIFIED BY %s", (server.password,))
    try:
        database.query(f"GRANT ALL ON {database.name}.* TO '{server.user}'@'localhost'")
        assert count(via(database, f"127.0.0.1:{free_port()}", server.socket), event("anna", 3)) == [3]
    finally:
        database.query(f"DROP USER '{server.user}'@'localhost'")


# --- connections, statements ---


def test_a_connection_that_the_server_closed_is_replaced_without_an_outage(database: Database) -> None:
    """And one serves all batches."""
    repository = maria_repository(database)
    for work in (repository.insert, repository.usages):
        for n in range(9):
            count(repository, event("anna", n))
        ((session, _, _),) = sessions(database)
        database.query(f"KILL {session}")
        wait_until(lambda: not sessions(database), "the session is gone")
        work([event("anna", 4)], *[Settings()] * (work == repository.usages), soon())
    assert sums(repository, [event("anna", 4)]) == [2 * 36 + 4]


def test_housekeeping_may_take_its_time(database: Database) -> None:
    relays = [maria_repository(database) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        with table_locked(database):
            works = [threads.submit(relays[0].init), threads.submit(lambda: sum(relays[1].purge(7)))]
            wait_until(lambda: sum(ms > 2500 for _, info, ms in sessions(database) if info) == 2, "both wait")
        for work in works:
            work.result(30)


def add_now(cursor: Any, login: str) -> None:
    """Put in what the next message of this login adds to while the clock stands still."""
    cursor.execute("INSERT INTO events VALUES (%s, %s, 's@example.org', '192.0.2.1', 10)", (NOW, login))


def test_a_lost_race_against_another_transaction_is_run_again(database: Database) -> None:
    with clock_stopped(database), ThreadPoolExecutor(1) as thread:
        repository = maria_repository(database)
        repository.check(soon())
        with session(database) as cursor:
            for n in range(200):  # the one that has done more is not the one to give up
                add_now(cursor, f"someone{n}")
            add_now(cursor, "bert")
            inserted = thread.submit(repository.insert, [ANNA, event("bert", 2)], soon())
            waiting = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'"
            wait_until(lambda: database.query(waiting)[0][1] == "1", "policyd waits for our lock")
            add_now(cursor, "anna")  # and we for policyd's: one must give up, and it is not the one this raises for
            cursor.execute("COMMIT")
        assert inserted.result() == set()
        assert sums(repository, [ANNA, event("bert")]) == [11, 12]


def test_a_lock_that_is_not_had_in_time_is_an_outage_and_not_tried_again(database: Database) -> None:
    """The statement may come to its end all the same; tried again, its recipients would be there twice."""
    store = MariaStore(database)
    waits = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_waits'"
    with global_variable(database, "innodb_lock_wait_timeout", 1), clock_stopped(database):
        repository = maria_repository(database)
        repository.check(soon())
        before = int(database.query(waits)[0][1])
        with session(database) as cursor:
            add_now(cursor, "anna")
            assert "1205" in unavailable(repository.insert, [event("anna", 100)], soon())
            cursor.execute("ROLLBACK")
        assert int(database.query(waits)[0][1]) == before + 1
    assert total(store) == 0
    assert count(store.repository, ANNA) == [1]


def test_an_insert_is_ended_by_the_server_before_we_stop_waiting_for_it(database: Database) -> None:
    """So that no late row comes in beside its journaled copy, however little time a batch has left.

    And a statement may take longer than a connect, for which we wait for a second.
    """
    repository = maria_repository(database)
    repository.check(soon())
    patience_s = 2.8 if database.server.is_mysql else 1  # on MySQL the limit is that of the session
    with table_locked(database):
        assert ENDED.match(unavailable(repository.insert, [event("anna", 100)], time.monotonic() + patience_s))
        assert ENDED.match(unavailable(repository.usages, [event("anna", 100)], Settings(), soon()))
        wait_until(lambda: not any(info for _, info, _ in sessions(database)), "nobody is at work")
    assert count(repository, ANNA) == [1]


@pytest.mark.parametrize("right", ["INSERT", "SELECT", "UPDATE"])
def test_a_right_that_is_missing_is_an_outage(database: Database, right: str) -> None:
    database.query(f"REVOKE {right} ON {database.name}.* FROM '{database.server.user}'@'127.0.0.1'")
    assert re.search("114[23]", unavailable(count, maria_repository(database), ANNA))


def test_another_spelling_in_an_old_table_is_another_login(old_database: Database) -> None:
    """Its collation finds both: whoever kept logins as they came has left such rows."""
    old_database.query("INSERT INTO events VALUES (NOW() - INTERVAL 1 HOUR, 'Anna', 's@x', '192.0.2.1', 7)")
    repository = maria_repository(old_database)
    anna = [event("anna", 1, f"{n}@x") for n in range(2)]
    repository.insert(anna, soon())
    assert sums(repository, anna) == [1, 2]


def test_what_the_server_could_do_late_only_is_not_sent(database: Database) -> None:
    repository = maria_repository(database)
    repository.insert([event("anna")], soon())
    with pytest.raises(RepositoryUnavailable, match="too slow"):
        repository.insert([event("bert")], time.monotonic() + LATE_ROW_S / 2)
    assert database.query("SELECT sasl_username FROM events") == [("anna",)]


def test_a_relay_whose_clock_has_passed_2038_is_counted_now(database: Database) -> None:
    repository = maria_repository(database)
    assert repository.insert([event("anna")], soon(), [2**31 * 1000 + 1]) == set()
    assert sums(repository, [event("anna")]) == [1]


def test_a_column_that_is_made_narrow_while_we_run_costs_no_message(database: Database) -> None:
    repository = maria_repository(database)
    repository.insert([event("anna")], soon())
    database.query("ALTER TABLE events MODIFY sender VARCHAR(16) NOT NULL DEFAULT ''")
    assert repository.insert([event("anna", sender="longer@example.org")], soon()) == set()
