"""What MariaDB alone brings with it: the table, refused rows, other relays, errors; what others do otherwise there."""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import errors
from servers import DUNNO, Database, Start, free_port, run_policyd, wait_until, write_settings
from stores import Door, DoorHandler, KeptLog, Listener, MariaStore, count, event, on_stores, soon, sums, total

from policyd import LATE_ROW_S, Event, Journal, MariaDBRepository, RepositoryUnavailable, Settings, SQLiteRepository

pytestmark = pytest.mark.mariadb
ENDED = re.compile(r"\((1969|1205|3024),")  # a statement that took too long, in MariaDB's words and in MySQL's
ANNA = event("anna")
NOW = "2026-03-04 05:06:07.123"


def created(database: Database) -> str:
    """Return the statement that would make the table anew, without what MySQL says twice."""
    return re.sub(" CHARACTER SET utf8mb4| COLLATE utf8mb4_bin", "", database.query("SHOW CREATE TABLE events")[0][1])


def unavailable(work: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(RepositoryUnavailable) as error:
        work(*arguments)
    return str(error.value)


@pytest.fixture
def doors(database: Database) -> Iterator[list[Door]]:
    with Door(database.server) as one, Door(database.server) as other:
        yield [one, other]


def test_init_creates_the_table_of_the_schema_file_and_leaves_it_alone(database: Database) -> None:
    expected = created(database)
    repository = database.repository()
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

    assert old_database.repository().init().startswith("upgraded table events")
    assert old_database.query("SELECT * FROM events ORDER BY ts, sasl_username, sender") == rows
    assert created(old_database) == created(database)
    assert count(old.repository, event("longlogin1", 1, sender="another")) == [12]
    upgraded = old_database.repository()
    assert count(upgraded, event("é", 1), event("e", 1), event("E", 1), event("longlogi", 1)) == [4, 1, 5, 13]
    assert count(upgraded, event("longlogin1", 1), event("longlogin2", 2)) == [1, 2]
    assert upgraded.init().endswith("is up to date")


@pytest.mark.parametrize("column", ["ts", "sasl_username", "sender", "client_address", "recipient_count"])
def test_check_names_a_missing_column(database: Database, column: str) -> None:
    """Its name may be in capitals."""
    database.query(f"ALTER TABLE events RENAME COLUMN {column} TO {column.upper()}")
    assert count(database.repository(), ANNA) == [1]
    database.query(f"ALTER TABLE events RENAME COLUMN {column} TO other")
    for work, argument in ((MariaDBRepository.check, 5), (count, ANNA)):
        assert f"Unknown column '{column}'" in unavailable(work, database.repository(), argument)


def test_check_warns_of_a_missing_index_and_names_the_remedy(old_database: Database, logged: KeptLog) -> None:
    """One that does not serve is as good as none; one that does is kept by --init-db."""
    old_database.query("ALTER TABLE events ADD KEY other (ts, sasl_username), ADD KEY login (sasl_username)")
    found = old_database.repository().check(5)
    assert re.search("logins of up to 8 characters, NO index .*policyd --init-db", found)
    assert [(line.level, "NO index" in line.text) for line in logged.lines] == [("warning", True)]
    old_database.query("ALTER TABLE events ADD KEY by_login (sasl_username, ts)")
    old_database.repository().init()
    assert "KEY `by_login` (`sasl_username`,`ts`)" in created(old_database)
    assert "login_ts" not in created(old_database)
    del logged.lines[:]
    assert "255 characters, index on (sasl_username, ts)" in old_database.repository().check(5)
    assert logged.lines == []


def add_now(cursor: Any, login: str) -> None:
    """Put in what the next message of this login adds to while the clock stands still."""
    cursor.execute("INSERT INTO events VALUES (%s, %s, 's@example.org', '192.0.2.1', 10)", (NOW, login))


@contextlib.contextmanager
def clock_stopped(database: Database) -> Iterator[None]:
    """Let new sessions of policyd's live in one millisecond for ever."""
    seconds = database.query("SELECT UNIX_TIMESTAMP(%s)", (NOW,))[0][0]
    with database.variable("init_connect", f"SET timestamp = {seconds}"):
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
    with database.variable("time_zone", "+05:00"):
        assert count(database.repository(), event("anna", 3)) == [3]
        assert database.query("SELECT COUNT(*) FROM events WHERE ABS(TIMESTAMPDIFF(MINUTE, ts, NOW())) < 60") == [(1,)]


@pytest.mark.parametrize("quota", [3, 10**6])
def test_who_is_forgiven_at_once_begins_no_outage(database: Database, quota: int) -> None:
    """What was inserted is there, though its sum is less: no replica has answered, see test_tls.py."""
    repository = database.repository()
    settings = Settings(defaultquota=quota)
    assert count(repository, event("anna", 2000), settings=settings) == [2000]
    assert repository.insert([event("anna", 5)], soon()) == set()
    database.query("UPDATE events SET recipient_count = -recipient_count")
    assert sums(repository, [event("anna", 5)], settings) == [0]


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
    guilty = Event("bert", "", "HOLD overquota", None) if refusal == "NOT NULL" else GUILTY
    batch = [event(login, n, sender=f"{n % 2}@example.org") for n in range(1, 60) for login in ("anna", "carl")]
    batch[7:7] = batch[70:70] = [guilty]
    times = [int(time.time() * 1000) - 90_000 + n for n in range(len(batch))] if is_replay else None
    assert store.repository.insert(batch, soon(), times) == {n for n, each in enumerate(batch) if each is guilty}
    assert {row[0]: total(store, row[0]) for row in store.rows()} == {"anna": 1770, "carl": 1770}
    kept = [each for each in batch if each is not guilty]
    assert sums(store.repository, kept)[-2:] == [1770, 1770]
    assert [error.startswith("ERROR while UPDATING db: (") for error in logged.errors()] == [True, True]
    assert {error.rpartition("; not counted: ")[2] for error in logged.errors()} == {"/".join(map(str, guilty))}
    store.repository.check(5)
    assert store.repository.insert([guilty, event("anna", 2)], soon()) == {0}
    database.query("ALTER TABLE events ADD COLUMN relay INT NOT NULL")  # which we do not fill: no endless outage
    assert store.repository.insert([ANNA, event("dora")], soon()) == {0, 1}
    assert ["1364" in error for error in logged.errors()[-2:]] == [True, True]


def test_a_batch_with_refused_rows_that_fails_leaves_nothing(database: Database, doors: list[Door]) -> None:
    """It is journaled or replayed again as a whole: what is committed by then would be there twice, again and again."""
    database.query("ALTER TABLE events MODIFY recipient_count TINYINT")
    store = MariaStore(database)
    slow = database.repository(dbport=doors[0].port)
    slow.check(5)
    batch = [event(f"login{n}", 1 if n % 2 else 300) for n in range(200)]
    doors[0].delay_s = 0.02  # some hundred statements: they would take seconds
    for _ in range(3):
        unavailable(slow.insert, batch, time.monotonic() + 0.9)
        wait_until(lambda: not database.sessions(), "the server has noticed that we are gone")
        assert total(store) == 0
    doors[0].delay_s = 0.12  # by then no time may be left for the answer to the COMMIT
    for n in range(4):
        with contextlib.suppress(RepositoryUnavailable):
            slow.insert(batch[:2], time.monotonic() + 0.7 + n / 10)
            database.query("DELETE FROM events")
        wait_until(lambda: slow._pool._idle or not database.sessions(), "the server has noticed that we are gone")
        assert total(store) == 0
    doors[0].delay_s = 0
    assert slow.insert(batch, soon()) == set(range(0, 200, 2))
    assert total(store) == 100


class SlowInsertHandler(DoorHandler):
    """A large INSERT arrives when nobody waits for it any more."""

    def pump(self, source: Any, target: Any) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                if len(received) > 5000:
                    time.sleep(1.5)
                target.sendall(received)
            target.shutdown(socket.SHUT_WR)


def test_a_replay_for_which_the_server_is_too_slow_is_not_there_again_each_time(
    database: Database, doors: list[Door]
) -> None:
    doors[0].RequestHandlerClass = SlowInsertHandler
    slow = database.repository(dbport=doors[0].port)
    for _ in range(2):
        unavailable(slow.insert, [ANNA] * 100, time.monotonic() + 1, [1_700_000_000_000] * 100)
        wait_until(lambda: not database.sessions(), "the server has noticed that we are gone")
        assert not database.query("SELECT * FROM events")


def test_a_column_that_is_narrowed_meanwhile_costs_no_event(database: Database) -> None:
    repository = database.repository()
    assert count(repository, ANNA) == [1]
    database.query("ALTER TABLE events MODIFY sasl_username VARCHAR(8) NOT NULL DEFAULT ''")
    assert count(repository, event("anna.with.a.long.name"), event("dora")) == [1, 1]


class Babble(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(b"220 mail.example.org ESMTP\r\n" * 10)  # which PyMySQL does not understand


def test_servers_that_give_nothing_are_passed_over(database: Database, doors: list[Door]) -> None:
    with Listener(Babble) as babbling, socket.create_server(("127.0.0.1", 0)) as deaf:
        ports = free_port(), babbling.port, deaf.getsockname()[1], doors[0].port
        servers = ", ".join(f"127.0.0.1:{port}" for port in ports)
        assert count(database.repository(dbhost=servers), event("anna", 3)) == [3]
    doors[1].delay_s = 0.95  # of each packet: it is not done in time, and then there is none for the next one
    repository = database.repository(dbhost=", ".join(f"127.0.0.1:{door.port}" for door in doors[::-1]))
    with contextlib.suppress(RepositoryUnavailable):
        repository.check(2.8)
    repository.check(2.8)


def test_the_next_server_is_taken_when_one_fails_or_does_not_work(database: Database, doors: list[Door]) -> None:
    repository = database.repository(dbhost=", ".join(f"127.0.0.1:{door.port}" for door in doors))
    assert count(repository, event("anna", 3)) == [3]
    assert [len(door.passing) > 0 for door in doors] == [True, False]
    with database.variable("read_only", 1):
        assert "1290" in unavailable(repository.insert, [ANNA], soon())
    assert count(repository, event("anna", 4)) == [7]
    assert [len(door.passing) for door in doors] == [2, 2], "the other one, though the first one answers"
    doors[1].server_close()
    assert count(repository, event("anna", 4)) == [11]
    assert len(doors[0].passing) == 4


def test_a_name_that_is_lost_keeps_its_address(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = database.repository(dbhost="localhost")
    look_up = socket.getaddrinfo

    def fail(host: str, *arguments: object, **options: object) -> object:
        if not host[0].isdigit():
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    repository.resolve()
    assert count(repository, event("anna", 3)) == [3]
    refusal = "db.example.org: [Errno -3] Temporary failure in name resolution"
    assert refusal in unavailable(database.repository(dbhost="db.example.org").check, 5)


def test_a_connection_that_the_server_closed_is_replaced_without_an_outage(database: Database) -> None:
    """And one serves all batches."""
    repository = database.repository()
    for work in (repository.insert, repository.usages):
        for n in range(9):
            count(repository, event("anna", n))
        ((session, _, _),) = database.sessions()
        database.query(f"KILL {session}")
        wait_until(lambda: not database.sessions(), "the session is gone")
        work([event("anna", 4)], *[Settings()] * (work == repository.usages), soon())
    assert sums(repository, [event("anna", 4)]) == [2 * 36 + 4]


def test_housekeeping_may_take_its_time(database: Database) -> None:
    relays = [database.repository() for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        with database.table_locked():
            purge = relays[1].ask, relays[1].PURGE, {"keep": 7, "rows": 1}
            works = [threads.submit(relays[0].init), threads.submit(*purge)]
            wait_until(lambda: sum(ms > 2500 for _, info, ms in database.sessions() if info) == 2, "both wait")
        for work in works:
            work.result(30)


def test_a_lost_race_against_another_transaction_is_run_again(database: Database) -> None:
    with clock_stopped(database), ThreadPoolExecutor(1) as thread:
        repository = database.repository()
        repository.check(5)
        with database.session() as cursor:
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
    with database.variable("innodb_lock_wait_timeout", 1), clock_stopped(database):
        repository = database.repository()
        repository.check(5)
        before = int(database.query(waits)[0][1])
        with database.session() as cursor:
            add_now(cursor, "anna")
            assert "1205" in unavailable(repository.insert, [event("anna", 100)], soon())
            cursor.execute("ROLLBACK")
        assert int(database.query(waits)[0][1]) == before + 1
    assert total(store) == 0
    assert count(store.repository, ANNA) == [1]


def test_an_insert_is_ended_by_the_server_before_we_stop_waiting_for_it(database: Database) -> None:
    """So that no late row comes in beside its journaled copy; what could come in late only is not even sent.

    And a statement may take longer than a connect, for which we wait for a second.
    """
    repository = database.repository()
    repository.check(5)
    with database.table_locked():
        for patience_s in [2.8] if database.server.is_mysql else [2.8, 1]:  # from 2 s on the limit is the session's
            assert ENDED.match(unavailable(repository.insert, [event("anna", 100)], time.monotonic() + patience_s))
        assert ENDED.match(unavailable(repository.usages, [event("anna", 100)], Settings(), soon()))
        wait_until(lambda: not any(info for _, info, _ in database.sessions()), "nobody is at work")
    assert "too slow" in unavailable(repository.insert, [ANNA], time.monotonic() + LATE_ROW_S / 2)
    database.query("CREATE TRIGGER slow BEFORE INSERT ON events FOR EACH ROW DO SLEEP(2.1)")
    assert count(repository, ANNA) == [1], "not before: what is moved from an embedded store has all day"


@pytest.mark.parametrize("right", ["INSERT", "SELECT", "UPDATE"])
def test_a_right_that_is_missing_is_an_outage(database: Database, right: str) -> None:
    database.query(f"REVOKE {right} ON {database.name}.* FROM '{database.server.user}'@'127.0.0.1'")
    for work, argument in ((MariaDBRepository.check, 5), (count, ANNA)):  # else it would be said to be back
        assert re.search("114[23]", unavailable(work, database.repository(), argument))


def another_user(database: Database, password: str = "secret") -> dict[str, str]:
    """Make a user who may count, and no more; return the settings to be it."""
    database.query("DROP USER IF EXISTS 'clerk'@'127.0.0.1'")
    database.query("CREATE USER 'clerk'@'127.0.0.1' IDENTIFIED BY %s", (password,))
    database.query("GRANT SELECT, INSERT, UPDATE ON events TO 'clerk'@'127.0.0.1'")
    return database.settings(dbuser="clerk", dbpass=password)


def not_used(database: Database) -> str:
    """Return how this kind of server calls an index that is kept up and not used."""
    return "INVISIBLE" if database.server.is_mysql else "IGNORED"


def test_a_password_may_have_any_character(database: Database) -> None:
    for n, password in enumerate(["Zürich", "пароль€", "\N{MATHEMATICAL FRAKTUR CAPITAL U}nicode"], start=1):
        assert count(database.repository(**another_user(database, password)), ANNA) == [n]


@pytest.mark.parametrize("quote", ["'", '"', ""])
def test_of_a_password_in_quotes_the_quotes_are_suspected(database: Database, quote: str) -> None:
    with pytest.raises(RepositoryUnavailable, match=r"\(1045, ") as refused:
        count(database.repository(dbpass=f"{quote}wrong{quote}"), ANNA)
    hint = "(dbpass= stands in quotes, and they are taken for a part of it)"
    assert (hint in str(refused.value)) == bool(quote)


class FirewallHandler(DoorHandler):
    """May forget all who have come so far: nothing of theirs arrives, and nobody says so."""

    forgotten = 0  # how often it has

    def pump(self, source: Any, target: Any) -> None:
        came = type(self).forgotten
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                if came == type(self).forgotten:
                    target.sendall(received)


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_connection_dropped_in_silence_costs_no_event(
    database: Database, doors: list[Door], monkeypatch: pytest.MonkeyPatch, is_idle: bool
) -> None:
    """After a minute a connection is not trusted any more; one that is dropped sooner costs a deadline."""
    doors[0].RequestHandlerClass = FirewallHandler
    repository = database.repository(dbport=doors[0].port)
    assert count(repository, ANNA) == [1]
    FirewallHandler.forgotten += 1
    if is_idle:
        monkeypatch.setattr("policyd.IDLE_CONNECTION_S", 0)
    else:
        with pytest.raises(RepositoryUnavailable, match="timed out"):
            repository.insert([event("anna", 100)], time.monotonic() + 1)
    assert count(repository, ANNA) == [2]


@pytest.mark.parametrize(("variable", "value"), [
    ("autocommit", 0), ("init_connect", "SET autocommit=0"), ("sql_mode", "EMPTY_STRING_IS_NULL"),
    ("sql_mode", "ANSI_QUOTES,ONLY_FULL_GROUP_BY,NO_BACKSLASH_ESCAPES"),
    ("init_connect", "SET character_set_results=latin1"),  # PyMySQL 1.0 leaves that as it is
])  # fmt: skip
def test_events_are_committed_whatever_sessions_are_given(database: Database, variable: str, value: object) -> None:
    if database.server.is_mysql and value == "EMPTY_STRING_IS_NULL":
        value = "PAD_CHAR_TO_FULL_LENGTH"  # MySQL has no such mode, and this one of its own
    null_sender = event("an'né\\", 3, sender="")
    with database.variable(variable, value):
        assert count(database.repository(), null_sender) == [3]
        assert count(database.repository(), null_sender) == [6]


def test_a_slice_too_large_for_the_server_is_halved_until_it_fits(database: Database, tmp_path: Path) -> None:
    """And the rest follows in slices of that size: larger ones are not tried each time."""
    journal = Journal(SQLiteRepository(str(tmp_path / "journal.sqlite3")))
    journal.look()
    wide = "x" * 240
    journal.insert([event(f"{n}{wide}", sender=f"{wide}@x") for n in range(3000)])
    with database.variable("max_allowed_packet", 65536):
        repository = database.repository()
        while journal.replay(repository, soon()):
            pass
    assert journal.is_empty()
    assert database.query("SELECT COUNT(*), SUM(recipient_count) FROM events") == [(3000, 3000)]


def test_check_names_what_is_missing_though_events_can_be_counted(database: Database, tmp_path: Path) -> None:
    """The GRANT without which nothing is ever purged, an index that is not used."""
    database.query(f"ALTER TABLE events ALTER INDEX login_ts {not_used(database)}")
    settings = another_user(database)
    file = write_settings(tmp_path / "policyd.cfg", **settings, statedir=tmp_path, bind=tmp_path / "socket",
                          early_signs="yes", keep_days=30)  # fmt: skip
    done = run_policyd("--check", "-c", file)
    database.query("GRANT DELETE ON events TO 'clerk'@'127.0.0.1'")
    database.query("ALTER TABLE events DROP INDEX login_ts, ADD INDEX login_ts (sasl_username, ts)")
    assert database.repository(**settings).problems(soon()) == []
    assert (done.returncode, "events can be counted" in done.stdout) == (1, True)
    index, grant, early = done.stderr.splitlines()
    for line in (index, early):
        assert "index login_ts is IGNORED (MariaDB) or INVISIBLE (MySQL)" in line
    assert "--init-db" not in done.stdout + done.stderr, "it would find the index, and change nothing"
    assert re.match(r"policyd: old events cannot be deleted: .*1142.*; try: GRANT DELETE ON ", grant)
    assert grant.endswith(f"`{database.name}`.`events` TO 'clerk'@...")


def test_the_daemon_counts_on_without_delete_and_index(database: Database, policyd: Start) -> None:
    daemon = policyd(**another_user(database))
    for way in (f"ALTER INDEX login_ts {not_used(database)}", "DROP INDEX login_ts"):
        assert daemon.ask(sasl_username="anna") == DUNNO
        database.query(f"ALTER TABLE events {way}")
    assert daemon.ask(sasl_username="anna") == DUNNO
    daemon.wait_for_log("Updating db: anna/alice@example.org/192.0.2.1/1/3")
    assert errors(daemon) == []
    daemon.stop()
    daemon.start()
    line = daemon.wait_for_log("NO index on (sasl_username, ts)")
    assert (line.level, "run policyd --init-db" in line.text) == ("warning", True)
    daemon.stop()
