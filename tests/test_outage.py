"""Whatever dies, mail flows, the quota still holds, and no count is lost; the log says so once."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import BACK_S, BEGINS, ENDS, Load, end_of_outage, errors
from servers import DUNNO, HOLD, REJECT, Database, LogLine, Policyd, Start, run_policyd, wait_until
from stores import Door

from policyd import SQLiteRepository

pytestmark = pytest.mark.mariadb

QUOTA = 10
CLIENTS = 8
# Promised are 3 s, nothing and 5 s; the rest is for a machine that is busy with something else.
FIRST_ANSWER_S, LATER_ANSWER_S, END_S = 8, 1, 9
EVENTS = 11  # that assert_quotas_hold() asks about


@pytest.fixture
def daemon(policyd: Start, database: Database) -> Policyd:
    """A daemon that counts, and a login that has reached its quota."""
    return with_held_login(policyd(defaultquota=QUOTA, **database.settings()))


def with_held_login(daemon: Policyd) -> Policyd:
    assert daemon.ask(sasl_username="held", recipient_count=QUOTA) == HOLD
    return daemon


def ask_in_time(daemon: Policyd, seconds: float, login: str = "during") -> str:
    began = time.monotonic()
    answer = daemon.ask(sasl_username=login)
    assert time.monotonic() - began < seconds
    return answer


def assert_quota_is_met_at_once(daemon: Policyd, login: str = "during", used: int = 0) -> None:
    """Ask about as many messages as a login may send, of which none waits."""
    answers = [ask_in_time(daemon, LATER_ANSWER_S, login) for _ in range(QUOTA - used)]
    assert answers == [DUNNO] * (QUOTA - used - 1) + [HOLD]


def assert_sum(daemon: Policyd, login: str, number: int) -> None:
    """Look at what was logged of the login's last message."""
    daemon.wait_for_log(f"Updating db: {login}/alice@example.org/192.0.2.1/1/{number}")


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


def recipients(database: Database, before: float = 2**31) -> Counter[str]:
    """Return the recipients of each login in the table that were counted before (seconds since 1970)."""
    rows = database.query(
        "SELECT sasl_username, SUM(recipient_count) FROM events WHERE UNIX_TIMESTAMP(ts) <= %s GROUP BY 1", (before,)
    )
    return Counter({login: int(number or 0) for login, number in rows})


def recipients_in(directory: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for _, _, each in SQLiteRepository(f"{directory}/journal.sqlite3").first():
        found[each.sasl_username] += each.recipient_count or 0
    return found


def test_a_server_that_dies_under_load_costs_no_answer_and_no_count(database: Database, daemon: Policyd) -> None:
    with Load([daemon], CLIENTS) as load:
        load.wait_for_more(200)
        database.server.kill()
        began = time.monotonic()
        load.wait_for_more(200)
        assert_quotas_hold(daemon)
        killed_until = time.time()
        database.server.start()
        load.wait_for_more(200)
        moved = end_of_outage(daemon)
        load.wait_for_more(200)
    assert max(answer.took for answer in load.answers) < FIRST_ANSWER_S
    later = sorted(answer.took for answer in load.answers if answer.asked > began + 1)
    assert later[len(later) * 99 // 100] < LATER_ANSWER_S
    # The quota was reached once and for all.
    assert {answer.action for answer in sorted(load.answers)[2 * QUOTA + CLIENTS :]} == {REJECT}
    # The slice that was cut off may be there twice.
    assert len(load.answers) <= recipients(database)["load"] <= len(load.answers) + CLIENTS
    assert recipients(database, killed_until)["during"] == QUOTA
    assert moved >= 200 + EVENTS
    assert not recipients_in(daemon.statedir)
    assert len(errors(daemon)) == 2


@pytest.mark.parametrize("missing", ["server", "table"])
def test_what_is_not_there_at_the_start_is_named_and_used_when_it_comes(
    policyd: Start, database: Database, missing: str
) -> None:
    database.server.stop() if missing == "server" else database.query("DROP TABLE events")
    daemon = policyd(defaultquota=QUOTA, **database.settings())  # waits for READY=1
    begin = begin_of(daemon).text  # told before the first message comes, as in the status
    assert ("there is no table events" if missing == "table" else "refused") in begin
    assert_quota_is_met_at_once(daemon)
    mended = time.time()
    database.server.ensure_running()
    made = run_policyd("--init-db", "-c", str(daemon.settings_file))
    assert made.returncode == 0, made
    assert replayed(daemon, QUOTA)
    assert recipients(database, mended) == {"during": QUOTA}
    assert daemon.ask(sasl_username="during") == HOLD


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_what_the_journal_holds_survives_the_daemon(database: Database, daemon: Policyd, ending: int) -> None:
    database.server.kill()
    assert_quotas_hold(daemon)
    daemon.signal(ending)
    assert daemon.process.wait(END_S) == (0 if ending == signal.SIGTERM else -ending)
    daemon.hang_up()
    daemon.start()
    assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
    assert_sum(daemon, "during", QUOTA + 1)
    mended = time.time()
    database.server.start()
    assert replayed(daemon, EVENTS + 1)
    table = recipients(database, mended)
    assert table["during"] == QUOTA + 1
    assert QUOTA + 1 <= table["held"] <= QUOTA + 2
    assert ask_in_time(daemon, FIRST_ANSWER_S, "held") == HOLD


def drop_user(mended: contextlib.ExitStack, database: Database, _: Door) -> None:
    user, away = f"'{database.server.user}'@'127.0.0.1'", "'away'@'127.0.0.1'"
    database.query(f"RENAME USER {user} TO {away}")
    mended.callback(database.query, f"RENAME USER {away} TO {user}")
    for number, *_ in database.sessions():
        database.query(f"KILL {number}")
    wait_until(lambda: not database.sessions(), "its sessions are gone")


# How it begins; what the log says of it; and how many messages may be there twice: the server may have them after all.
@pytest.mark.parametrize(("begin", "words", "late"), [
    (lambda mended, database, _: (database.server.freeze(), mended.callback(database.server.thaw)), "", 1),
    (lambda mended, _, door: (setattr(door, "is_deaf", True), mended.callback(setattr, door, "is_deaf", False)), "", 0),
    (lambda mended, database, _: mended.enter_context(database.table_locked()), "1969|1205|3024", 0),  # ended by itself
    (lambda mended, database, _: mended.enter_context(database.variable("read_only", 1)), "1290", 0),
    (lambda mended, database, _: (database.query("RENAME TABLE events TO away"),
                                  mended.callback(database.query, "RENAME TABLE away TO events")), "1146", 0),
    (drop_user, "1045|2013", 0),
], ids=["frozen", "lost", "locked", "read-only", "no table", "no user"])  # fmt: skip
def test_whatever_the_server_does_the_quotas_hold_and_all_is_there_in_the_end(
    policyd: Start, database: Database, begin: Callable[..., Any], words: str, late: int
) -> None:
    door = Door(database.server)
    daemon = with_held_login(policyd(defaultquota=QUOTA, **database.settings(dbport=door.port)))
    with contextlib.ExitStack() as mended:
        begin(mended, database, door)
        assert re.search(words, assert_quotas_hold(daemon).text)
        then = time.time()
    assert replayed(daemon, EVENTS)
    table = recipients(database, then)
    assert table["during"] == QUOTA
    assert QUOTA + 1 <= table["held"] <= QUOTA + 1 + late
    assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
    assert_sum(daemon, "during", QUOTA + 1)
    assert_quota_is_met_at_once(daemon, "after")
    assert len(errors(daemon)) == 2
    daemon.stop()
    door.server_close()


class NameServer(socketserver.BaseRequestHandler):
    """Says that each name is 127.0.0.1, or nothing at all."""

    is_deaf = False

    def handle(self) -> None:
        query, door = self.request
        question = query[12 : query.index(b"\0", 12) + 5]
        is_ipv4 = question[-4:-2] == b"\0\1"
        address = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1" if is_ipv4 else b""
        header = query[:2] + b"\x81\x80\0\1\0" + bytes([is_ipv4]) + b"\0\0\0\0"
        if not NameServer.is_deaf:
            door.sendto(header + question + address, self.client_address)


@pytest.fixture
def name_server() -> Iterator[str]:
    """A name server's address, its own: resolv.conf knows no port."""
    address = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.53"
    with socketserver.UDPServer((address, 53), NameServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield address
        server.shutdown()


def test_names_that_nobody_resolves_delay_neither_the_start_nor_the_end_and_one_answer_at_most(
    policyd: Start, database: Database, name_server: str, tmp_path: Path
) -> None:
    NameServer.is_deaf = True
    file = tmp_path / "resolv.conf"  # a look-up that fails takes 5 s for each name
    file.write_text(f"nameserver {name_server}\noptions timeout:1 attempts:5\n")
    settings = database.settings(dbhost="db1.example.org, db2.example.org")
    daemon = policyd(defaultquota=QUOTA, mounts=f"mount --bind {file} /etc/resolv.conf || exit", **settings)
    assert ask_in_time(daemon, FIRST_ANSWER_S, "first") == DUNNO
    assert_quota_is_met_at_once(daemon)
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < END_S
    NameServer.is_deaf = False
    mended = time.time()
    daemon.start()
    assert end_of_outage(daemon) >= QUOTA + 1
    assert recipients(database, mended) == {"during": QUOTA, "first": 1}
    NameServer.is_deaf = True
    before = len(errors(daemon))
    assert daemon.ask(sasl_username="again") == DUNNO  # who is known need not be asked for
    assert len(errors(daemon)) == before
    database.server.kill()
    assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
    assert len(errors(daemon)) == before + 1
    assert_quota_is_met_at_once(daemon, "again", used=1)
    NameServer.is_deaf = False
    database.server.start()
    daemon.wait_for_log(ENDS, BACK_S, count=2)
    assert recipients(database) == {"during": QUOTA + 1, "first": 1, "again": QUOTA}


@pytest.mark.parametrize("database_comes", ["never", "while the disk is full"])
def test_a_full_disk_leaves_counting_to_the_memory(
    policyd: Start, database: Database, disk: Path, database_comes: str
) -> None:
    """What is in the file still counts, and the file is used again once there is room; nothing is counted twice."""
    daemon = with_held_login(policyd(defaultquota=QUOTA, statedir=disk, **database.settings()))
    database.server.kill()
    assert [ask_in_time(daemon, FIRST_ANSWER_S) for _ in range(QUOTA // 2)] == [DUNNO] * (QUOTA // 2)
    begin_of(daemon)
    with contextlib.suppress(OSError), (disk / "ballast").open("ab", buffering=0) as file:  # No space left
        while True:
            file.write(bytes(512))
    assert_quota_is_met_at_once(daemon, used=QUOTA // 2)
    assert ask_in_time(daemon, LATER_ANSWER_S, "held") == HOLD
    complaint = errors(daemon)[1].text
    assert complaint.startswith(f"no outage journal: {daemon.statedir}/journal.sqlite3: ")
    assert complaint.endswith(" full; in an outage events are counted in memory only")
    if database_comes != "never":
        database.server.start()
        wait_until(lambda: recipients(database)["held"] == QUOTA + 1, "what was in memory is in the table", BACK_S)
        assert ask_in_time(daemon, FIRST_ANSWER_S) == HOLD
        assert_sum(daemon, "during", QUOTA + 1)
    (disk / "ballast").unlink()
    assert daemon.stop() == 0
    daemon.wait_for_log("can be used again")  # at the end it is looked at once more
    database.server.ensure_running()
    left = recipients_in(disk)
    assert recipients(database)["during"] + left["during"] == QUOTA + (database_comes != "never")
    assert recipients(database)["held"] + left["held"] == QUOTA + 1
