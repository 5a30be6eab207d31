#!/usr/bin/env python3
"""Soak policyd: an even load, faults of the database, the disk and the daemon at random, and a look at every message.

usage: .venv/bin/python tests/tools/soak.py [--seed N] [--minutes 2]

As root, for what only real processes show: a private MariaDB; the daemon as another user, its statedir on a small
tmpfs, so that rights and a full disk bite.  A process of its own sends messages at an even rate and does as Postfix
does: one request at a time on each connection, 10 s for its answer, and once more when a connection fails.  Meanwhile
each lane of FAULTS goes from one to the next as the seed decides.  Then all is mended, and every message is looked at:

- lost may be only what was in memory when the daemon was killed, or what it says that it has forgotten;
- doubled may be only what was sent twice, one slice for each kill, and one batch or slice for each thing that was done
  to the database;
- nobody who was held may have been let through, but by a daemon that was started while something was broken, and only
  until that is over; or if what had counted was in memory only;
- an answer may be missing only if the daemon was away; and each message has the time at which it was sent.

Exit status 1 if that is not so.  Needs what scripts/test.sh installs.  Loopback only; ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pwd
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from servers import IN_PRIVATE_DEV, SCHEMA, Database, MariaDB, Policyd, request_bytes, small_disk, wait_until  # noqa: E402

CONNECTIONS, LOGINS, QUOTA = 16, 40, 200
RATE, DISK_MB = 150, 16  # messages a second; what has room for the journal, but not for all of an outage
ANSWER_TIMEOUT_S = 10  # the timeout of main.cf
TRIES, TRY_AGAIN_S = 2, 1  # smtpd_policy_service_try_limit and _retry_delay
CLOCK_S = 0.2  # by which the time of a row may differ from the load's
LOOK_S = 0.2  # how often the log is looked at
SETTLE_S = 120  # in which everything must have come to an end: the journal is looked at each minute
SLICE = 500  # rows of a replay
SEVERITY = {b"DUNNO": 0, b"HOLD quota exceeded": 1, b"REJECT max quota exceeded": 2}
USER = pwd.getpwnam("nobody")
Span = tuple[float, float]


# ---- the load, in a process of its own ------------------------------------------------------------


class Message(NamedTuple):
    """One message and what became of it; times in s since 1970."""

    number: int
    sent: float
    answered: float | None
    tries: int
    severity: int
    before: int  # the hardest answer that its login had been given when it was sent

    @property
    def sender(self) -> str:
        return f"{self.number}@example.org"

    @property
    def recipients(self) -> int:
        return 1 + self.number % 5

    def touches(self, spans: Sequence[Span], before: float, after: float) -> bool:
        """Tell whether it was on its way in one of these times, or so many seconds before it or after it."""
        end = self.answered or self.sent + TRIES * (ANSWER_TIMEOUT_S + TRY_AGAIN_S)
        return any(self.sent <= last + after and begin - before <= end for begin, last in spans)


def ask(connection: list[socket.socket], port: int, request: bytes) -> int | None:
    """Return how hard the answer is, or None if there is none; a connection that has failed is replaced next time."""
    try:
        if not connection:
            connection.append(socket.create_connection(("127.0.0.1", port), 1))
            connection[0].settimeout(ANSWER_TIMEOUT_S)
        connection[0].sendall(request)
        return SEVERITY[connection[0].recv(4096)[len(b"action=") : -2]]
    except (OSError, KeyError):
        if connection:
            connection.pop().close()
        return None


def smtpd(port: int, numbers: range, begin: float, hardest: list[int]) -> list[Message]:
    """Send these messages on one connection; `hardest` are the hardest answers of each login so far, shared by all."""
    connection: list[socket.socket] = []
    messages = []
    for number in numbers:
        time.sleep(max(0.0, begin + number / RATE - time.time()))
        message = Message(number, time.time(), None, 0, 0, hardest[number % LOGINS])
        request = request_bytes(
            sasl_username=f"u{number % LOGINS}", sender=message.sender, recipient_count=message.recipients,
            instance=f"soak.{number}", queue_id=f"{number:X}",
        )  # fmt: skip
        while message.answered is None and message.tries < TRIES:
            if message.tries:
                time.sleep(TRY_AGAIN_S)
            severity = ask(connection, port, request)
            answered = None if severity is None else time.time()
            message = message._replace(tries=message.tries + 1, severity=severity or 0, answered=answered)
        hardest[number % LOGINS] = max(hardest[number % LOGINS], message.severity)
        messages.append(message)
    return messages


def send_load(port: int, seconds: float) -> list[Message]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    total, begin, hardest = int(RATE * seconds), time.time(), [0] * LOGINS
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        sent = threads.map(lambda n: smtpd(port, range(n, total, CONNECTIONS), begin, hardest), range(CONNECTIONS))
        return [message for each in sent for message in each]


# ---- the faults -----------------------------------------------------------------------------------


@contextlib.contextmanager
def repeating(act: Callable[[], object], every_s: float) -> Iterator[None]:
    enough = threading.Event()

    def run() -> None:
        while not enough.wait(every_s):
            act()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    enough.set()
    thread.join()


FAULTS: dict[str, dict[str, Callable[[Any, contextlib.ExitStack], object]]] = {  # of each lane; the stack mends it
    "database": {
        "killed": lambda soak, mended: (soak.server.kill(), mended.callback(soak.server.start)),
        "stopped": lambda soak, mended: (soak.server.stop(), mended.callback(soak.server.start)),
        "frozen": lambda soak, mended: (soak.server.freeze(), mended.callback(soak.server.thaw)),
        "slow": lambda soak, mended: mended.enter_context(repeating(soak.stutter, 0.03)),
        "locked": lambda soak, mended: mended.enter_context(soak.database.table_locked()),
        "cutting connections": lambda soak, mended: mended.enter_context(repeating(soak.cut, 0.2)),
        "refusing us": lambda soak, mended: (soak.allow("REVOKE {} FROM {}"), mended.callback(soak.allow)),
        "without its table": lambda soak, mended: soak.swap(mended, "RENAME TABLE {} TO {}", "events", "away"),
        "with another table": lambda soak, mended: soak.swap(
            mended, "ALTER TABLE events RENAME COLUMN {} TO {}", "sender", "sent_by"),
    },
    "disk": {
        "full": lambda soak, mended: (soak.fill(), mended.callback(soak.filler.unlink)),
        "unwritable": lambda soak, mended: (
            soak.own(0, soak.state), mended.callback(soak.own, USER.pw_uid, soak.state)),
        "unreadable": lambda soak, mended: (soak.own(0), mended.callback(soak.own, USER.pw_uid)),
        "gone": lambda soak, mended: (
            soak.state.rename(soak.aside), mended.callback(soak.aside.rename, soak.state)),
    },
    "daemon": {
        "killed": lambda soak, _: soak.restart(is_killed=True),
        "terminated": lambda soak, _: soak.restart(),
        "reloaded": lambda soak, _: soak.daemon.signal(signal.SIGHUP),
        "frozen": lambda soak, mended: (soak.daemon.freeze(), mended.callback(soak.daemon.thaw)),
    },
}  # fmt: skip


class Soak:
    def __init__(self, database: Database, daemon: Policyd) -> None:
        self.database, self.server, self.daemon = database, database.server, daemon
        self.state = daemon.statedir
        self.filler, self.aside = self.state.with_name("filler"), self.state.with_name("aside")
        self.kills: list[float] = []
        self.restarts: list[float] = []
        self.blows: list[float] = []  # when something was done to the database
        self._begin = time.time()
        self._log: list[tuple[float, str]] = []  # but the lines that each message makes
        self._is_over = threading.Event()
        self._spans: dict[str, list[Span]] = {lane: [] for lane in (*FAULTS, "gone")}  # of the faults

    # what faults do

    def restart(self, is_killed: bool = False) -> None:
        began = time.time()
        (self.kills if is_killed else self.restarts).append(began)
        if is_killed:
            self.daemon.kill()
        else:
            status = self.daemon.stop()
            assert status == 0, f"policyd ended with status {status}"
            assert time.time() - began < 7, f"policyd took {time.time() - began:.1f} s to end"
        self.daemon.start()

    def stutter(self) -> None:
        self.server.freeze()
        time.sleep(0.4)
        self.server.thaw()

    def cut(self) -> None:
        self.blows.append(time.time())
        for number, *_ in self.database.sessions():
            with contextlib.suppress(Exception):  # it has ended by itself
                self.database.query(f"KILL {number}")

    def allow(self, words: str = "GRANT {} TO {}") -> None:
        user = f"'{self.server.user}'@'127.0.0.1'"
        self.database.query(words.format(f"INSERT, UPDATE ON {self.database.name}.*", user))
        self.cut()  # only new connections look at the rights on a database

    def fill(self) -> None:
        with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def swap(self, mended: contextlib.ExitStack, statement: str, *names: str) -> None:
        self.database.query(statement.format(*names))
        mended.callback(self.database.query, statement.format(*names[::-1]))

    def own(self, user: int, *directory: Path) -> None:
        """Let the journal's files be somebody's, and the directory, too, if it is named."""
        for path in (*directory, *self.state.glob("journal.sqlite3*")):
            with contextlib.suppress(FileNotFoundError):
                os.chown(path, user, user)

    # what is seen

    def run(self, seed: int, seconds: float) -> bool:
        reader = threading.Thread(target=self._read_log)
        reader.start()
        try:
            with ProcessPoolExecutor(1) as processes, ThreadPoolExecutor() as lanes:
                load = processes.submit(send_load, self.daemon.port, seconds)
                list(lanes.map(self._break, FAULTS, [seed] * len(FAULTS), [seconds] * len(FAULTS)))
                messages = load.result()
            self._settle()
            self.restart()
            self._settle()
        finally:
            self._is_over.set()
            reader.join()
        return self._account(messages)

    def _break(self, lane: str, seed: int, seconds: float) -> None:
        chance = random.Random(f"{seed} {lane}")
        time.sleep(chance.uniform(1, 6))
        while time.time() + 8 < self._begin + seconds:
            began, fault, lasts = time.time(), chance.choice(list(FAULTS[lane])), chance.uniform(0.2, 7)
            print(f"{began - self._begin:6.1f} s  {lane} {fault} for {lasts:.1f} s", flush=True)
            if lane == "database":
                self.blows.append(began)
            with contextlib.ExitStack() as mended:
                FAULTS[lane][fault](self, mended)
                time.sleep(lasts)
            for key in (lane, *["gone"] * (fault == "gone")):
                self._spans[key].append((began, time.time()))
            time.sleep(chance.uniform(0.2, 8))

    def _read_log(self) -> None:
        read = 0
        while not self._is_over.wait(LOOK_S):
            lines = [line.text for line in self.daemon.log_lines()]
            self._log += [(time.time(), text) for text in lines[read:] if not re.match("Updating|DEFER|REJECT", text)]
            read = len(lines)

    def _settle(self) -> None:

        def is_well() -> bool:
            asked = time.time()
            self.daemon.signal(signal.SIGUSR1)
            time.sleep(3 * LOOK_S)
            status = [text for seen, text in self._log if seen > asked and " requests: " in text]
            return bool(status) and "database up, 0 events in the journal;" in status[-1]

        try:
            wait_until(is_well, "the database is used, and the journal is empty", SETTLE_S)
        except BaseException:
            print("the log:", *(f"{seen - self._begin:6.1f} s  {text}" for seen, text in self._log[-60:]), sep="\n")
            raise

    def _spans_of(self, *begins: str) -> list[Span]:
        """Return when something lasted, as the log says: until it is over, or the daemon is."""
        spans, began = [], 0.0
        ends = [(then, "") for then in (*self.kills, *self.restarts, time.time())]
        for seen, text in sorted([*self._log, *ends]):
            is_end = not text or text.startswith(f"{begins[0]}: over")
            if began and is_end:
                spans.append((began, seen))
                began = 0.0
            elif not began and not is_end and text.startswith(begins):
                began = seen - 2 * LOOK_S
        return spans

    def _account(self, messages: Sequence[Message]) -> bool:
        rows = self.database.query(
            "SELECT sender, SUM(recipient_count), MIN(UNIX_TIMESTAMP(ts)), MAX(UNIX_TIMESTAMP(ts)) FROM events"
            " WHERE recipient_count IS NOT NULL GROUP BY sender"
        )
        stored = {sender: (int(total), float(first), float(last)) for sender, total, first, last in rows}
        copies = {message: stored.get(message.sender, (0,))[0] / message.recipients for message in messages}
        kills, ends = self.kills, [*self.kills, *self.restarts]
        outages = self._spans_of("ERROR while UPDATING db")
        troubles = self._spans_of("no outage journal", "the database has events that cannot be deleted")
        bad_times = [*self._spans["database"], *outages, *troubles]
        in_memory = [span for span in troubles if any(span[0] <= kill <= span[1] + LOOK_S for kill in kills)]
        in_memory += [  # what waited in a file that has gone
            (began, gone) for began, over in outages for gone, _ in self._spans["gone"]
            if began <= gone <= over and any(first - 1 <= gone <= last for first, last in in_memory)]
        # After a start in bad times, what was known is not known any more, until the outage is over; what was in memory
        # only, never again.
        forgetful = []
        for end in ends:
            if any(began - 2 <= end <= over + 20 for began, over in bad_times):
                over = max((last for began, last in outages if began <= end + 20 and last > end), default=end)
                is_gone = any(began <= end <= last + LOOK_S for began, last in troubles)
                forgetful.append((end, math.inf if is_gone else over + LOOK_S))
        # What a blow hits is one batch, in which each connection has a message, or one slice of a replay.
        blows = [SLICE if any(began <= blow <= over for began, over in outages) else CONNECTIONS
                 for blow in self.blows]  # fmt: skip
        interruptions, may_be_doubled = len(kills) + len(blows), SLICE * len(kills) + sum(blows)
        answered = [message for message in messages if message.answered]
        once = [message for message in answered if message.tries == 1]
        found = {
            "lost, and not in the memory of a daemon that was killed": [
                message for message in answered if copies[message] < 1 and not message.touches(in_memory, 1, 1)],
            "doubled when all was well": [
                message for message in once if copies[message] > 1
                and not message.touches([*bad_times, *((end, end) for end in ends)], 1, 4)],
            "stored more often than something broke": [
                message for message in messages if copies[message] > message.tries + interruptions],
            "softer without a reason": [
                message for message in answered if message.severity < message.before
                and not message.touches(forgetful, 0, 0)],
            "not answered though policyd was there": [
                message for message in messages
                if not message.answered and not message.touches(self._spans["daemon"], 1, 3)],
            "at another time than theirs": [
                message for message in once if copies[message] == 1 and not
                message.sent - CLOCK_S <= stored[message.sender][1] <= (message.answered or 0) + CLOCK_S],
        }  # fmt: skip
        forgotten = sum(int(text.split()[0]) for _, text in self._log if "events are forgotten" in text)
        doubled = sum(copies[message] > 1 for message in once)
        print(
            f"{len(messages)} messages, {len(answered)} answered; {len(kills)} kills, {len(ends) - len(kills)} other"
            f" restarts, {len(outages)} outages, {len(troubles)} times without a journal\n"
            f"lost: {sum(copies[message] < 1 for message in answered)} ({forgotten} of them forgotten and said so);"
            f" sent once and doubled: {doubled} (of {may_be_doubled} that may be)"
        )
        tracebacks = [text for _, text in self._log if "Traceback" in text]
        print(*tracebacks[:3], sep="\n", end="")
        for what, those in found.items():
            print(f"{what}: {len(those)}")
            for message in those[:5]:
                print(f"    {message.sent - self._begin:.2f} s, copies {copies[message]:g}: {message}")
        lost = found.pop("lost, and not in the memory of a daemon that was killed")
        return not (any(found.values()) or len(lost) > forgotten or doubled > may_be_doubled or tracebacks)


def main() -> int:
    parser = argparse.ArgumentParser(description="An even load, faults at random, and a look at every message.")
    parser.add_argument("--seed", type=int, default=None, help="decides about the faults (default: a new one)")
    parser.add_argument("--minutes", type=float, default=2)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("only root can start the daemon as another user")
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}: {arguments.minutes:g} minutes, {RATE} messages/s, a disk of {DISK_MB} MB", flush=True)
    setpriv = f"exec setpriv --reuid={USER.pw_uid} --regid={USER.pw_gid} --clear-groups"
    with MariaDB() as server, small_disk(DISK_MB) as disk:
        server.install()
        database = server.new_database(SCHEMA)
        settings = database.settings(defaultquota=QUOTA, statedir=disk / "state")
        with Policyd(mounts=IN_PRIVATE_DEV.replace("exec", setpriv), **settings) as daemon:
            for path in (disk / "state", daemon.settings_file):
                os.chown(path, USER.pw_uid, USER.pw_gid)
            daemon.directory.chmod(0o755)
            for inbox in (daemon.syslog, daemon.notify):
                inbox.path.chmod(0o666)
            is_well = Soak(database, daemon.start()).run(seed, arguments.minutes * 60)
    print("all is well" if is_well else f"NOT WELL: seed {seed}")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
