"""Whatever dies, mail flows, the quota still holds, and no count is lost; the log says so once."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from servers import Database, LogLine, MariaDB, Policyd, read_answer, request_bytes, run_policyd, wait_until
from stores import Door, event, global_variable, sessions, table_locked

from policyd import DUNNO, HOLD, REJECT, SQLiteRepository

pytestmark = pytest.mark.mariadb

Start = Callable[..., Policyd]

QUOTA = 10
CLIENTS = 8
# Promised are 3.5 s, nothing, 20 s and 5 s; the rest is for a machine that is busy with something else.
FIRST_ANSWER_S = 8
LATER_ANSWER_S = 1
BACK_S = 40
END_S = 9

BEGINS = "ERROR while UPDATING db: "
ENDS = re.compile(r"ERROR while UPDATING db: over after (\d+) s, (\d+) events replayed")


@pytest.fixture
def daemon(policyd: Start, database: Database) -> Policyd:
    """A daemon that counts, and a login that has reached its quota."""
    return with_held_login(policyd(defaultquota=QUOTA, **database.settings()))


def with_held_login(daemon: Policyd) -> Policyd:
    assert daemon.ask(sasl_username="held", recipient_count=QUOTA) == HOLD
    return daemon


def errors(daemon: Policyd) -> list[LogLine]:
    """Return what has been logged at level err."""
    return [line for line in daemon.log_lines() if line.level == "err"]


def ask_in_time(daemon: Policyd, seconds: float, login: str = "during") -> str:
    """Ask about a message, which must be answered in time."""
    began = time.monotonic()
    answer = daemon.ask(sasl_username=login)
    assert time.monotonic() - began < seconds
    return answer


def begin_of(daemon: Policyd) -> LogLine:
    """Return the one error there has been, which says what policyd does now."""
    begin = daemon.wait_for_log(BEGINS)
    assert (begin.facility, begin.level) == ("daemon", "err")
    assert begin.text.endswith(f"; counting in {daemon.statedir}/journal.sqlite3 until it is back")
    assert errors(daemon) == [begin]
    return begin


def end_of(daemon: Policyd) -> int:
    """Wait for the line that tells the end; return the number of events replayed."""
    end = daemon.wait_for_log(ENDS, timeout=BACK_S)
    assert (end.facility, end.level) == ("daemon", "err")
    match = ENDS.fullmatch(end.text)
    assert match
    return int(match[2])


EVENTS = 11  # that assert_quotas_hold() asks about


def assert_quotas_hold(daemon: Policyd) -> LogLine:
    """The first message may take its time, the others not; who is held stays held, who sends too much is held."""
    assert ask_in_time(daemon, FIRST_ANSWER_S, "held") == HOLD
    begin = begin_of(daemon)
    answers = [ask_in_time(daemon, LATER_ANSWER_S) for _ in range(QUOTA)]
    assert answers == [DUNNO] * (QUOTA - 1) + [HOLD]
    assert errors(daemon) == [begin]
    return begin


def assert_all_is_there(daemon: Policyd, database: Database, mended: float, late: int = 0, lines: int = 2) -> None:
    """All of it is in the table, with times from before `mended`, and the sums run on.

    `late` messages may be there twice: a server that was frozen, or lost in the middle of one, may have them after all.
    """
    assert end_of(daemon) == EVENTS
    held, during = (QUOTA + 1, QUOTA)
    table = sums_before(database, mended)
    assert table["during"] == during
    assert held <= table["held"] <= held + late
    assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
    daemon.wait_for_log(f"Updating db: during/alice@example.org/192.0.2.1/1/{during + 1}")
    assert [daemon.ask(sasl_username="after") for _ in range(QUOTA)] == [DUNNO] * (QUOTA - 1) + [HOLD]
    assert len(errors(daemon)) == lines


def sums_before(database: Database, moment: float) -> dict[str, int]:
    """Return the recipients of each login that were counted before (seconds since 1970)."""
    rows = database.query(
        "SELECT sasl_username, SUM(recipient_count) FROM events WHERE UNIX_TIMESTAMP(ts) <= %s GROUP BY 1", (moment,)
    )
    return {login: int(recipients) for login, recipients in rows}


def total(database: Database, login: str) -> int:
    """Return the recipients of a login in the table."""
    return int(
        database.query("SELECT COALESCE(SUM(recipient_count), 0) FROM events WHERE sasl_username = %s", (login,))[0][0]
    )


def journaled(daemon: Policyd) -> int:
    """Return how many events are in the journal's file.

    In a copy, of the file and of its WAL: SQLite does not look through the daemon's eyes.
    """
    with tempfile.TemporaryDirectory() as directory:
        for name in ("journal.sqlite3", "journal.sqlite3-wal"):
            shutil.copy(daemon.its_view(daemon.statedir / name), directory)
        return SQLiteRepository(f"{directory}/journal.sqlite3").count()


class Answer(NamedTuple):
    asked: float  # monotonic
    took: float  # seconds
    action: str


class Load:
    """Clients that ask about one login without a pause, each on one connection."""

    def __init__(self, daemon: Policyd, login: str = "load") -> None:
        self.answers: list[Answer] = []
        self._daemon = daemon
        self._login = login
        self._enough = threading.Event()

    def __enter__(self) -> Load:
        self._threads = ThreadPoolExecutor(CLIENTS)
        self._clients: list[Future[None]] = [self._threads.submit(self._send) for _ in range(CLIENTS)]
        return self

    def __exit__(self, *_: Any) -> None:
        self._enough.set()
        self._threads.shutdown()

    def _send(self) -> None:
        with self._daemon.connect() as connection:
            while not self._enough.is_set():
                asked = time.monotonic()
                connection.sendall(request_bytes(sasl_username=self._login))
                action = read_answer(connection)
                self.answers.append(Answer(asked, time.monotonic() - asked, action))

    def wait_for_more(self, number: int) -> None:
        """Wait until so many more have been answered."""
        goal = len(self.answers) + number
        wait_until(lambda: len(self.answers) >= goal or self.is_over(), f"{number} answers")
        assert not self.is_over()

    def is_over(self) -> bool:
        """Tell whether a client has come to an end."""
        return any(client.done() for client in self._clients)

    def assert_no_request_failed(self) -> None:
        """Raise what a client ran into; to be called behind the block."""
        for client in self._clients:
            client.result()


# --- the server dies ---


def test_a_server_that_dies_under_load_costs_no_answer_and_no_count(
    mariadb: MariaDB, database: Database, daemon: Policyd
) -> None:
    with Load(daemon) as load:
        load.wait_for_more(200)
        mariadb.kill()
        began = time.monotonic()
        load.wait_for_more(200)
        assert_quotas_hold(daemon)
        killed_until = time.time()
        mariadb.start()
        load.wait_for_more(200)
        replayed = end_of(daemon)
        load.wait_for_more(200)
    load.assert_no_request_failed()
    assert max(answer.took for answer in load.answers) < FIRST_ANSWER_S
    later = sorted(answer.took for answer in load.answers if answer.asked > began + 1)
    assert later[len(later) * 99 // 100] < LATER_ANSWER_S
    # The quota was reached once and for all.
    actions = [answer.action for answer in sorted(load.answers)]
    assert set(actions[2 * QUOTA + CLIENTS:]) == {REJECT}
    # The slice that was cut off may be there twice.
    assert len(load.answers) <= total(database, "load") <= len(load.answers) + CLIENTS
    assert sums_before(database, killed_until)["during"] == QUOTA
    assert replayed >= 200 + EVENTS
    assert journaled(daemon) == 0
    assert len(errors(daemon)) == 2


def test_a_database_that_is_down_at_start_is_used_when_it_comes(
    policyd: Start, mariadb: MariaDB, database: Database
) -> None:
    mariadb.stop()
    daemon = policyd(defaultquota=QUOTA, **database.settings())  # waits for READY=1
    begin_of(daemon)  # told before the first message comes
    assert [ask_in_time(daemon, LATER_ANSWER_S) for _ in range(QUOTA)] == [DUNNO] * (QUOTA - 1) + [HOLD]
    mended = time.time()
    mariadb.start()
    assert end_of(daemon) == QUOTA
    assert sums_before(database, mended) == {"during": QUOTA}
    assert daemon.ask(sasl_username="during") == HOLD


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_what_the_journal_holds_survives_the_daemon(
    mariadb: MariaDB, database: Database, daemon: Policyd, ending: int
) -> None:
    mariadb.kill()
    assert_quotas_hold(daemon)
    daemon.signal(ending)
    assert daemon.process.wait(END_S) == (0 if ending == signal.SIGTERM else -ending)
    daemon.hang_up()
    daemon.start()
    daemon.wait_for_log(f"{EVENTS} events of an earlier outage wait in the journal")
    assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
    daemon.wait_for_log(f"Updating db: during/alice@example.org/192.0.2.1/1/{QUOTA + 1}")
    mended = time.time()
    mariadb.start()
    assert end_of(daemon) == EVENTS + 1
    table = sums_before(database, mended)
    assert table["during"] == QUOTA + 1
    assert QUOTA + 1 <= table["held"] <= QUOTA + 2
    assert ask_in_time(daemon, FIRST_ANSWER_S, "held") == HOLD


def test_nobody_waits_for_the_replay_and_the_sums_are_exact_meanwhile(
    policyd: Start, database: Database, tmp_path: Path
) -> None:
    events, now = 20_000, int(time.time() * 1000)
    journal = SQLiteRepository(str(tmp_path / "journal.sqlite3"))
    journal.insert([event("during")] * events, 0, [now - n for n in range(events, 0, -1)])
    daemon = policyd(defaultquota=events + 50, statedir=tmp_path, **database.settings())
    asked = 0
    while not any(ENDS.search(line.text) for line in daemon.log_lines()):
        assert ask_in_time(daemon, FIRST_ANSWER_S) == (DUNNO if asked < 49 else HOLD)
        asked += 1
    assert asked > 1
    assert end_of(daemon) == events
    daemon.wait_for_log(f"Updating db: during/alice@example.org/192.0.2.1/1/{events + asked}")
    assert total(database, "during") == events + asked
    assert database.query("SELECT COUNT(*), MAX(UNIX_TIMESTAMP(ts)) >= %s FROM events", (now / 1000,)) == [
        (events + asked, 1)
    ]


# --- the server hangs ---


def test_a_frozen_server_delays_one_batch_and_no_more(mariadb: MariaDB, database: Database, daemon: Policyd) -> None:
    mariadb.freeze()
    assert_quotas_hold(daemon)
    mended = time.time()
    mariadb.thaw()
    assert_all_is_there(daemon, database, mended, late=1)


def test_a_locked_table_is_an_outage_and_doubles_nothing(daemon: Policyd, database: Database) -> None:
    with table_locked(database):
        assert "1969" in assert_quotas_hold(daemon).text  # the server has ended the statement itself
        mended = time.time()
    assert_all_is_there(daemon, database, mended)


def test_a_network_that_loses_everything_is_an_outage(policyd: Start, database: Database) -> None:
    door = Door(database.server.host, database.server.port)
    settings = {**database.settings(), "dbport": str(door.port)}
    daemon = with_held_login(policyd(defaultquota=QUOTA, **settings))
    door.is_deaf = True
    assert_quotas_hold(daemon)
    mended = time.time()
    door.is_deaf = False
    assert_all_is_there(daemon, database, mended)
    daemon.stop()
    door.shut()


# --- the server refuses ---


def test_a_connection_that_the_server_closes_is_no_outage(policyd: Start, database: Database) -> None:
    with global_variable(database, "wait_timeout", 1):
        daemon = with_held_login(policyd(defaultquota=QUOTA, **database.settings()))
        for n in range(1, 3):
            wait_until(lambda: not sessions(database), "the server has closed the connection")
            assert ask_in_time(daemon, FIRST_ANSWER_S, "held") == HOLD
            daemon.wait_for_log(f"Updating db: held/alice@example.org/192.0.2.1/1/{QUOTA + n}")
    assert errors(daemon) == []


def test_a_user_who_is_dropped_and_granted_again(mariadb: MariaDB, database: Database, daemon: Policyd) -> None:
    user = f"'{mariadb.user}'@'127.0.0.1'"
    grants = [grant for grant, in mariadb.query(f"SHOW GRANTS FOR {user}")]
    mariadb.query(f"DROP USER {user}")
    try:
        for number, _, _ in sessions(database):
            mariadb.query(f"KILL {number}")
        assert "1045" in assert_quotas_hold(daemon).text
        mended = time.time()
    finally:
        for grant in grants:
            mariadb.query(grant.replace("%", "%%"))
    assert_all_is_there(daemon, database, mended)


def test_a_missing_table_is_named_and_used_once_it_is_made(policyd: Start, database: Database) -> None:
    database.query("DROP TABLE events")
    daemon = policyd(defaultquota=QUOTA, **database.settings())
    assert "there is no table events" in begin_of(daemon).text
    assert [ask_in_time(daemon, LATER_ANSWER_S) for _ in range(QUOTA)] == [DUNNO] * (QUOTA - 1) + [HOLD]
    mended = time.time()
    made = run_policyd("--init-db", "-c", str(daemon.settings_file))
    assert made.stdout.startswith("created table events"), made
    assert end_of(daemon) == QUOTA
    assert sums_before(database, mended) == {"during": QUOTA}
    assert daemon.ask(sasl_username="during") == HOLD


def test_a_table_that_is_dropped_under_the_daemon_is_an_outage(daemon: Policyd, database: Database) -> None:
    database.query("RENAME TABLE events TO away")
    assert "1146" in assert_quotas_hold(daemon).text
    mended = time.time()
    database.query("RENAME TABLE away TO events")
    assert_all_is_there(daemon, database, mended)


def test_a_server_that_turns_read_only_is_an_outage(daemon: Policyd, database: Database) -> None:
    with global_variable(database, "read_only", 1):
        assert "1290" in assert_quotas_hold(daemon).text
        mended = time.time()
    assert_all_is_there(daemon, database, mended)


# --- the journal cannot be written ---


@pytest.fixture
def full_disk(policyd: Start, mariadb: MariaDB, database: Database) -> Iterator[tuple[Policyd, Path]]:
    """A daemon in an outage, whose journal has some events and then a full file system; and what fills it."""
    daemon = with_held_login(policyd(
        defaultquota=QUOTA, mounts='mount -t tmpfs -o size=512k tmpfs "$STATE_DIRECTORY" || exit', **database.settings()
    ))
    mariadb.kill()
    assert [ask_in_time(daemon, FIRST_ANSWER_S) for _ in range(QUOTA // 2)] == [DUNNO] * (QUOTA // 2)
    begin_of(daemon)
    ballast = daemon.its_view(daemon.statedir / "ballast")
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:  # No space left on device
        while True:
            file.write(bytes(512))
    return daemon, ballast


@pytest.mark.parametrize("room_comes", ["before the database", "never"])
def test_a_full_disk_leaves_counting_to_the_memory(
    mariadb: MariaDB, database: Database, full_disk: tuple[Policyd, Path], room_comes: str
) -> None:
    """What is in the file still counts, and the file is used again once there is room; nothing is counted twice."""
    daemon, ballast = full_disk
    answers = [ask_in_time(daemon, LATER_ANSWER_S) for _ in range(QUOTA - QUOTA // 2)]
    assert answers == [DUNNO] * (len(answers) - 1) + [HOLD]
    assert ask_in_time(daemon, LATER_ANSWER_S, "held") == HOLD
    complaint = errors(daemon)[1].text
    assert complaint.startswith(f"no outage journal: {daemon.statedir}/journal.sqlite3: ")
    assert complaint.endswith(" full; counting in memory")
    if room_comes == "before the database":
        ballast.unlink()
        assert ask_in_time(daemon, LATER_ANSWER_S, "last") == DUNNO
        assert journaled(daemon) == QUOTA + 2
    mended = time.time()
    mariadb.start()
    expected = QUOTA + 1 + (room_comes == "before the database")
    assert end_of(daemon) == expected
    table = sums_before(database, mended)
    assert table["during"] == QUOTA
    assert table["held"] == QUOTA + 1
    assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
    daemon.wait_for_log(f"Updating db: during/alice@example.org/192.0.2.1/1/{QUOTA + 1}")


def test_a_state_directory_that_cannot_be_written_leaves_counting_to_the_memory(
    policyd: Start, mariadb: MariaDB, database: Database
) -> None:
    bind = 'mount --bind "$STATE_DIRECTORY" "$STATE_DIRECTORY" || exit'
    read_only = 'mount -o remount,bind,ro "$STATE_DIRECTORY" || exit'
    daemon = with_held_login(policyd(defaultquota=QUOTA, mounts=f"{bind}\n{read_only}", **database.settings()))
    assert errors(daemon)[0].text.endswith("; in an outage events would be counted in memory only")
    mariadb.kill()
    assert ask_in_time(daemon, FIRST_ANSWER_S, "held") == HOLD
    answers = [ask_in_time(daemon, LATER_ANSWER_S) for _ in range(QUOTA)]
    assert answers == [DUNNO] * (QUOTA - 1) + [HOLD]
    assert [line.text.rpartition("; ")[2] for line in errors(daemon)[1:]] == [
        f"counting in {daemon.statedir}/journal.sqlite3 until it is back", "counting in memory"
    ]
    mended = time.time()
    mariadb.start()
    assert_all_is_there(daemon, database, mended, late=1, lines=4)


# --- signals ---


@pytest.mark.parametrize("database_is", ["up", "away"])
def test_under_load_the_end_is_in_time_and_all_that_was_answered_is_stored(
    mariadb: MariaDB, database: Database, daemon: Policyd, database_is: str
) -> None:
    if database_is == "away":
        mariadb.kill()
    with Load(daemon) as load:
        load.wait_for_more(200)
        daemon.signal(signal.SIGTERM)
        assert daemon.process.wait(END_S) == 0
        wait_until(load.is_over, "the clients see the end")
    mariadb.ensure_running()
    journal = SQLiteRepository(str(daemon.statedir / "journal.sqlite3")).count()
    assert (journal > 0) == (database_is == "away")
    assert len(load.answers) <= total(database, "load") + journal <= len(load.answers) + CLIENTS


def test_under_load_a_reload_drops_no_connection(database: Database, daemon: Policyd) -> None:
    with Load(daemon) as load:
        load.wait_for_more(50)
        for n in range(5):
            daemon.write_settings(defaultquota=QUOTA + n, **database.settings())
            daemon.signal(signal.SIGHUP)
            daemon.wait_for_log("settings read again", count=n + 1)
            load.wait_for_more(20)
    load.assert_no_request_failed()
    assert total(database, "load") == len(load.answers)
    assert errors(daemon) == []
