"""When the database is away mail flows, the log says so once, and counting resumes by itself."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

import pytest
from servers import Database, LogLine, MariaDB, Policyd, read_answer, request_bytes, run_policyd, wait_until
from stores import global_variable, table_locked

from policyd import DUNNO, HOLD

pytestmark = pytest.mark.mariadb

Start = Callable[..., Policyd]

QUOTA = 3
# Promised are 3 s and nothing; the rest is for a machine that is busy with something else.
FIRST_ANSWER_S = 6
LATER_ANSWER_S = 1

BEGINS = "ERROR while UPDATING db: "
ENDS = "ERROR while UPDATING db: over after "


@pytest.fixture
def daemon(policyd: Start, database: Database) -> Policyd:
    """A daemon that counts."""
    running = policyd(defaultquota=QUOTA, **database.settings())
    assert running.ask(sasl_username="before") == DUNNO
    running.wait_for_log("Updating db: before/alice@example.org/192.0.2.1/1/1")
    return running


def errors(daemon: Policyd) -> list[LogLine]:
    """Return what has been logged at level err."""
    return [line for line in daemon.log_lines() if line.level == "err"]


def ask_in_time(daemon: Policyd, seconds: float, login: str = "during") -> None:
    """Ask about a message that is over the quota by itself: it is answered in time, and not counted."""
    began = time.monotonic()
    assert daemon.ask(sasl_username=login, recipient_count=QUOTA) == DUNNO
    assert time.monotonic() - began < seconds


def assert_mail_flows(daemon: Policyd) -> None:
    """The first message may take its time, the others not; one line tells it all."""
    ask_in_time(daemon, FIRST_ANSWER_S)
    begin = daemon.wait_for_log(BEGINS)
    assert (begin.facility, begin.level) == ("daemon", "err")
    lines = len(daemon.log_lines())
    for _ in range(20):
        ask_in_time(daemon, LATER_ANSWER_S)
    assert len(daemon.log_lines()) == lines
    assert errors(daemon) == [begin]


def assert_counting_resumes(daemon: Policyd, uncounted: int = 21) -> None:
    """One line tells the end, and what comes then is counted and judged."""
    end = daemon.wait_for_log(ENDS, timeout=30)
    assert (end.facility, end.level) == ("daemon", "err")
    assert end.text.endswith(f", {uncounted} messages were not counted")
    assert [daemon.ask(sasl_username="after") for _ in range(QUOTA)] == [DUNNO, DUNNO, HOLD]
    daemon.wait_for_log(f"Updating db: after/alice@example.org/192.0.2.1/1/{QUOTA}")
    assert len(errors(daemon)) == 2


def test_a_database_that_is_down_at_start_is_used_when_it_comes(
    policyd: Start, mariadb: MariaDB, database: Database
) -> None:
    mariadb.stop()
    daemon = policyd(defaultquota=QUOTA, **database.settings())  # waits for READY=1
    daemon.wait_for_log(BEGINS)  # told before the first message comes
    assert_mail_flows(daemon)
    mariadb.start()
    assert_counting_resumes(daemon)


def test_a_server_that_dies_under_load_costs_no_answer(mariadb: MariaDB, daemon: Policyd) -> None:
    answers: list[str] = []
    enough = threading.Event()

    def send() -> None:
        with daemon.connect() as connection:
            while not enough.is_set():
                connection.sendall(request_bytes(sasl_username="load"))
                answers.append(read_answer(connection))

    def wait_for_more(number: int) -> None:
        goal = len(answers) + number
        wait_until(lambda: len(answers) >= goal or any(client.done() for client in clients), f"{number} answers")

    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(send) for _ in range(8)]
        try:
            wait_for_more(100)
            mariadb.kill()
            begin = daemon.wait_for_log(BEGINS)
            so_far = len(answers) + len(clients)  # each may still be taking an answer of before
            wait_for_more(200)
        finally:
            enough.set()
        for client in clients:
            client.result()
    assert set(answers[so_far:]) == {DUNNO}
    assert errors(daemon) == [begin]
    mariadb.start()
    daemon.wait_for_log(ENDS, timeout=30)
    # What was counted before still is.
    assert daemon.ask(sasl_username="load") != DUNNO
    assert [daemon.ask(sasl_username="after") for _ in range(QUOTA)] == [DUNNO, DUNNO, HOLD]
    assert len(errors(daemon)) == 2


def test_a_frozen_server_delays_one_batch_and_no_more(mariadb: MariaDB, daemon: Policyd) -> None:
    mariadb.freeze()
    assert_mail_flows(daemon)
    mariadb.thaw()
    assert_counting_resumes(daemon)


def test_a_locked_table_is_an_outage(daemon: Policyd, database: Database) -> None:
    with table_locked(database):
        assert_mail_flows(daemon)
        assert "1969" in errors(daemon)[0].text  # the server has ended the statement itself
    assert_counting_resumes(daemon)
    # What was answered without a sum has not been written late.
    assert database.query("SELECT COUNT(*) FROM events WHERE sasl_username = 'during'") == [(0,)]


def test_a_missing_table_is_named_and_used_once_it_is_made(policyd: Start, database: Database) -> None:
    database.query("DROP TABLE events")
    daemon = policyd(defaultquota=QUOTA, **database.settings())
    assert_mail_flows(daemon)
    assert "there is no table events" in errors(daemon)[0].text
    made = run_policyd("--init-db", "-c", str(daemon.settings_file))
    assert made.stdout.startswith("created table events"), made
    assert_counting_resumes(daemon)


def test_a_table_that_is_dropped_under_the_daemon_is_an_outage(daemon: Policyd, database: Database) -> None:
    database.query("RENAME TABLE events TO away")
    assert_mail_flows(daemon)
    database.query("RENAME TABLE away TO events")
    assert_counting_resumes(daemon)


def test_a_server_that_turns_read_only_is_an_outage(daemon: Policyd, database: Database) -> None:
    with global_variable(database, "read_only", 1):
        assert_mail_flows(daemon)
    assert_counting_resumes(daemon)


def test_the_daemon_ends_in_good_order_while_the_database_is_away(mariadb: MariaDB, daemon: Policyd) -> None:
    mariadb.kill()
    assert_mail_flows(daemon)
    assert daemon.stop() == 0
