"""Whatever dies, mail flows, the quota still holds, and no count is lost; the log says so once."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from daemons import BACK_S, BEGINS, ENDS, Load, end_of_outage, errors
from servers import DUNNO, HOLD, REJECT, Database, LogLine, MariaDB, Policyd, run_policyd, wait_until
from stores import Door, event, global_variable, table_locked

from policyd import SQLiteRepository

pytestmark = pytest.mark.mariadb

Start = Callable[..., Policyd]

QUOTA = 10
CLIENTS = 8
# Promised are 3 s, nothing and 5 s; the rest is for a machine that is busy with something else.
FIRST_ANSWER_S = 8
LATER_ANSWER_S = 1
END_S = 9
EVENTS = 11  # that assert_quotas_hold() asks about


@pytest.fixture
def daemon(policyd: Start, database: Database) -> Policyd:
    """A daemon that counts, and a login that has reached its quota."""
    return with_held_login(policyd(defaultquota=QUOTA, **database.settings()))


def with_held_login(daemon: Policyd) -> Policyd:
    assert daemon.ask(sasl_username="held", recipient_count=QUOTA) == HOLD
    return daemon


def ask_in_time(daemon: Policyd, seconds: float, login: str = "during") -> str:
    """Ask about a message, which must be answered in time."""
    began = time.monotonic()
    answer = daemon.ask(sasl_username=login)
    assert time.monotonic() - began < seconds
    return answer


def assert_quota_is_met_at_once(daemon: Policyd, login: str = "during") -> None:
    """Ask about as many messages as a login may send, of which none waits."""
    answers = [ask_in_time(daemon, LATER_ANSWER_S, login) for _ in range(QUOTA)]
    assert answers == [DUNNO] * (QUOTA - 1) + [HOLD]


def begin_of(daemon: Policyd) -> LogLine:
    """Return the one error there has been, which says what policyd does now."""
    begin = daemon.wait_for_log(BEGINS)
    assert (begin.facility, begin.level) == ("daemon", "err")
    assert begin.text.endswith(f"; counting in {daemon.statedir}/journal.sqlite3 until it is back")
    assert errors(daemon) == [begin]
    return begin


def assert_quotas_hold(daemon: Policyd) -> LogLine:
    """The first message may take its time, the others not; who is held stays held, who sends too much is held."""
    assert ask_in_time(daemon, FIRST_ANSWER_S, "held") == HOLD
    begin = begin_of(daemon)
    assert_quota_is_met_at_once(daemon)
    assert errors(daemon) == [begin]
    return begin


def replayed(daemon: Policyd, messages: int) -> bool:
    """Wait for the end of the outage; tell whether so many messages were replayed, and the incidents of two logins."""
    return messages <= end_of_outage(daemon) <= messages + 2


def assert_all_is_there(daemon: Policyd, database: Database, mended: float, late: int = 0, lines: int = 2) -> None:
    """All of it is in the table, with times from before `mended`, and the sums run on.

    `late` messages may be there twice: a server that was frozen, or lost in the middle of one, may have them after all.
    """
    assert replayed(daemon, EVENTS)
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
    return {login: int(recipients or 0) for login, recipients in rows}


def total(database: Database, login: str) -> int:
    """Return the recipients of a login in the table."""
    return sums_before(database, time.time() + 3600).get(login, 0)


def recipients_in(directory: Path) -> Counter[str]:
    """Return the recipients of each login in the journal's file.

    In a copy, of the file and of its WAL: SQLite does not look through the daemon's eyes.
    """
    with tempfile.TemporaryDirectory() as copies:
        for name in ("journal.sqlite3", "journal.sqlite3-wal"):
            with contextlib.suppress(FileNotFoundError):  # the end of the daemon removes the second one
                shutil.copy(directory / name, copies)
        found: Counter[str] = Counter()
        for _, _, each in SQLiteRepository(f"{copies}/journal.sqlite3").first(-1):
            found[each.sasl_username] += each.recipient_count or 0
        return found


@contextlib.contextmanager
def its_directory(daemon: Policyd) -> Iterator[Path]:
    """Look into the statedir that only the daemon sees, also after its end."""
    directory = os.open(daemon.its_view(daemon.statedir), os.O_RDONLY)
    yield Path(f"/proc/self/fd/{directory}")
    os.close(directory)


# --- the server dies ---


def test_a_server_that_dies_under_load_costs_no_answer_and_no_count(
    mariadb: MariaDB, database: Database, daemon: Policyd
) -> None:
    with Load([daemon], CLIENTS) as load:
        load.wait_for_more(200)
        mariadb.kill()
        began = time.monotonic()
        load.wait_for_more(200)
        assert_quotas_hold(daemon)
        killed_until = time.time()
        mariadb.start()
        load.wait_for_more(200)
        moved = end_of_outage(daemon)
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
    assert moved >= 200 + EVENTS
    assert not recipients_in(daemon.statedir)
    assert len(errors(daemon)) == 2


@pytest.mark.parametrize("missing", ["server", "table"])
def test_what_is_not_there_at_the_start_is_named_and_used_when_it_comes(
    policyd: Start, mariadb: MariaDB, database: Database, missing: str
) -> None:
    mariadb.stop() if missing == "server" else database.query("DROP TABLE events")
    daemon = policyd(defaultquota=QUOTA, **database.settings())  # waits for READY=1
    begin = begin_of(daemon).text  # told before the first message comes, as in the status
    assert ("there is no table events" if missing == "table" else "refused") in begin
    assert "; database down since " in next(line for line in daemon.notifications if "READY=1" in line)
    assert_quota_is_met_at_once(daemon)
    mended = time.time()
    mariadb.ensure_running()
    made = run_policyd("--init-db", "-c", str(daemon.settings_file))
    assert made.returncode == 0, made
    assert replayed(daemon, QUOTA)
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
    daemon.wait_for_log(re.compile("1[123] events of an earlier outage wait in the journal"))
    assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
    daemon.wait_for_log(f"Updating db: during/alice@example.org/192.0.2.1/1/{QUOTA + 1}")
    mended = time.time()
    mariadb.start()
    assert replayed(daemon, EVENTS + 1)
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
    assert end_of_outage(daemon) >= events
    daemon.wait_for_log(f"Updating db: during/alice@example.org/192.0.2.1/1/{events + asked}")
    assert total(database, "during") == events + asked
    assert sums_before(database, (now - 1) / 1000) == {"during": events}


# --- the server hangs, or refuses ---


@contextlib.contextmanager
def frozen(database: Database, _: Door) -> Iterator[None]:
    database.server.freeze()
    yield
    database.server.thaw()


@contextlib.contextmanager
def lost_on_the_way(_: Database, door: Door) -> Iterator[None]:
    door.is_deaf = True
    yield
    door.is_deaf = False


@contextlib.contextmanager
def table_away(database: Database, _: Door) -> Iterator[None]:
    database.query("RENAME TABLE events TO away")
    yield
    database.query("RENAME TABLE away TO events")


@contextlib.contextmanager
def user_dropped(database: Database, _: Door) -> Iterator[None]:
    database.query(f"DROP USER {DOOMED}")
    its_sessions = "SELECT id FROM information_schema.processlist WHERE user = 'doomed'"
    for (number,) in database.query(its_sessions):
        database.query(f"KILL {number}")
    wait_until(lambda: not database.query(its_sessions), "its sessions are gone")
    yield
    grant(database)


DOOMED = "'doomed'@'127.0.0.1'"


def grant(database: Database) -> None:
    database.query(f"DROP USER IF EXISTS {DOOMED}")
    database.query(f"CREATE USER {DOOMED} IDENTIFIED BY %s", (database.server.password,))
    database.query(f"GRANT SELECT, INSERT, UPDATE ON {database.name}.* TO {DOOMED}")


@pytest.mark.parametrize(("fault", "words", "late"), [
    (frozen, "", 1),
    (lost_on_the_way, "", 0),
    (lambda database, _: table_locked(database), "1969|1205|3024", 0),  # the server has ended the statement itself
    (lambda database, _: global_variable(database, "read_only", 1), "1290", 0),
    (table_away, "1146", 0),
    (user_dropped, "1045|2013", 0),
], ids=["frozen", "lost", "locked", "read-only", "no table", "no user"])  # fmt: skip
def test_whatever_the_server_does_the_quotas_hold_and_all_is_there_in_the_end(
    policyd: Start, database: Database, fault: Callable[..., Any], words: str, late: int
) -> None:
    grant(database)
    door = Door(database.server.host, database.server.port)
    settings = {**database.settings(), "dbport": str(door.port), "dbuser": "doomed"}
    daemon = with_held_login(policyd(defaultquota=QUOTA, **settings))
    with fault(database, door):
        assert re.search(words, assert_quotas_hold(daemon).text)
        mended = time.time()
    assert_all_is_there(daemon, database, mended, late)
    daemon.stop()
    door.shut()
    database.query(f"DROP USER {DOOMED}")


# --- DNS is silent ---


class NameServer:
    """Says that each name is 127.0.0.1, or nothing at all; at an address of its own: resolv.conf knows no port."""

    def __init__(self) -> None:
        self.is_deaf = False
        self.address = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.53"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((self.address, 53))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            question = query[12 : query.index(b"\0", 12) + 5]
            is_ipv4 = question[-4:-2] == b"\0\1"
            address = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1" if is_ipv4 else b""
            header = query[:2] + b"\x81\x80\0\1\0" + bytes([is_ipv4]) + b"\0\0\0\0"
            if not self.is_deaf:
                self._socket.sendto(header + question + address, client)

    def close(self) -> None:
        with self._socket:
            self._socket.sendto(b"", (self.address, 53))
            self._thread.join()

    def mounts(self, directory: Path) -> str:
        """Return what makes this the daemon's name server; a look-up that fails takes 5 s for each name."""
        file = directory / "resolv.conf"
        file.write_text(f"nameserver {self.address}\noptions timeout:1 attempts:5\n")
        return f"mount --bind {file} /etc/resolv.conf || exit"


@pytest.fixture
def names() -> Iterator[NameServer]:
    """A name server."""
    server = NameServer()
    yield server
    server.close()


def test_names_that_nobody_resolves_delay_neither_the_start_nor_an_answer_nor_the_end(
    policyd: Start, database: Database, names: NameServer, tmp_path: Path
) -> None:
    names.is_deaf = True
    settings = {**database.settings(), "dbhost": "db1.example.org, db2.example.org"}
    daemon = policyd(defaultquota=QUOTA, mounts=names.mounts(tmp_path), **settings)
    assert "; database down since " in next(line for line in daemon.notifications if "READY=1" in line)
    assert ask_in_time(daemon, FIRST_ANSWER_S, "first") == DUNNO
    assert_quota_is_met_at_once(daemon)
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < END_S
    names.is_deaf = False
    mended = time.time()
    daemon.start()
    assert end_of_outage(daemon) >= QUOTA + 1
    assert sums_before(database, mended) == {"during": QUOTA, "first": 1}


def test_a_dead_server_and_a_silent_dns_delay_one_answer_at_most(
    policyd: Start, mariadb: MariaDB, database: Database, names: NameServer, tmp_path: Path
) -> None:
    settings = {**database.settings(), "dbhost": "db1.example.org, db2.example.org"}
    daemon = with_held_login(policyd(defaultquota=QUOTA, mounts=names.mounts(tmp_path), **settings))
    names.is_deaf = True
    assert daemon.ask(sasl_username="during") == DUNNO  # who is known need not be asked for
    mariadb.kill()
    assert ask_in_time(daemon, FIRST_ANSWER_S, "held") == HOLD
    begin_of(daemon)
    assert [ask_in_time(daemon, LATER_ANSWER_S) for _ in range(QUOTA)] == [DUNNO] * (QUOTA - 2) + [HOLD] * 2
    names.is_deaf = False
    mariadb.start()
    assert replayed(daemon, QUOTA + 1)
    assert total(database, "during") == QUOTA + 1


# --- the journal cannot be written ---


@pytest.mark.parametrize("database_comes", ["never", "while the disk is full"])
def test_a_full_disk_leaves_counting_to_the_memory(
    policyd: Start, mariadb: MariaDB, database: Database, database_comes: str
) -> None:
    """What is in the file still counts, and the file is used again once there is room; nothing is counted twice."""
    mount = 'mount -t tmpfs -o size=512k tmpfs "$STATE_DIRECTORY" || exit'
    daemon = with_held_login(policyd(defaultquota=QUOTA, mounts=mount, **database.settings()))
    mariadb.kill()
    assert [ask_in_time(daemon, FIRST_ANSWER_S) for _ in range(QUOTA // 2)] == [DUNNO] * (QUOTA // 2)
    begin_of(daemon)
    with its_directory(daemon) as directory:
        with contextlib.suppress(OSError), (directory / "ballast").open("ab", buffering=0) as file:  # No space left
            while True:
                file.write(bytes(512))
        answers = [ask_in_time(daemon, LATER_ANSWER_S) for _ in range(QUOTA - QUOTA // 2)]
        assert answers == [DUNNO] * (len(answers) - 1) + [HOLD]
        assert ask_in_time(daemon, LATER_ANSWER_S, "held") == HOLD
        complaint = errors(daemon)[1].text
        assert complaint.startswith(f"no outage journal: {daemon.statedir}/journal.sqlite3: ")
        assert complaint.endswith(" full; in an outage events are counted in memory only")
        if database_comes != "never":
            mariadb.start()
            wait_until(lambda: total(database, "held") == QUOTA + 1, "what was in memory is in the table", BACK_S)
            assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
            daemon.wait_for_log(f"Updating db: during/alice@example.org/192.0.2.1/1/{QUOTA + 1}")
        (directory / "ballast").unlink()
        assert daemon.stop() == 0
        daemon.wait_for_log("can be used again")  # at the end it is looked at once more
        mariadb.ensure_running()
        left = recipients_in(directory)
    assert total(database, "during") + left["during"] == QUOTA + (database_comes != "never")
    assert total(database, "held") + left["held"] == QUOTA + 1


# --- signals ---


@pytest.mark.parametrize("database_is", ["up", "away"])
def test_under_load_the_end_is_in_time_and_all_that_was_answered_is_stored(
    mariadb: MariaDB, database: Database, daemon: Policyd, database_is: str
) -> None:
    if database_is == "away":
        mariadb.kill()
    with Load([daemon], CLIENTS) as load:
        load.wait_for_more(200)
        daemon.signal(signal.SIGTERM)
        assert daemon.process.wait(END_S) == 0
        wait_until(load.is_over, "the clients see the end")
    mariadb.ensure_running()
    left = recipients_in(daemon.statedir)["load"]
    assert (left > 0) == (database_is == "away")
    assert len(load.answers) <= total(database, "load") + left <= len(load.answers) + CLIENTS
