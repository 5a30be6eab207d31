"""Daemons and those who ask them: one in the process of the test, many clients at once, and outages in the log."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from servers import LogLine, Policyd, read_answer, request_bytes, wait_until

from policyd import Daemon, Settings


@contextlib.contextmanager
def running_here(settings_file: Path) -> Iterator[Daemon]:
    """Run a daemon in this process, so that time can be made short; what it logs is in the fixture `logged`."""
    daemon = Daemon(Settings.from_file(str(settings_file)))
    thread = threading.Thread(target=daemon.run, daemon=True)
    thread.start()
    try:
        yield daemon
    finally:
        daemon.signals.put(signal.SIGTERM)
        thread.join()


CONNECTIONS = 16


class Answer(NamedTuple):
    asked: float  # monotonic
    took: float  # seconds
    action: str


def send(daemon: Policyd, messages: Iterable[dict[str, Any]]) -> Iterator[Answer]:
    """Ask about the messages one after the other on a connection of its own; yield the answers."""
    with daemon.connect() as connection:
        for message in messages:
            asked = time.monotonic()
            connection.sendall(request_bytes(**message))
            action = read_answer(connection)
            yield Answer(asked, time.monotonic() - asked, action)


def send_at_once(daemons: list[Policyd], messages: list[dict[str, Any]]) -> list[str]:
    """Ask about the messages over many connections, dealt out over the daemons; return the answers."""
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        sent = threads.map(
            lambda n: [*send(daemons[n % len(daemons)], messages[n::CONNECTIONS])], range(CONNECTIONS), timeout=60
        )
        return [answer.action for answers in sent for answer in answers]


class Load:
    """So many clients of each daemon, which ask about one login without a pause, each on one connection."""

    def __init__(self, daemons: list[Policyd], clients: int, login: str = "load") -> None:
        self.answers: list[Answer] = []
        self._enough = threading.Event()
        self._login = login
        self._threads = ThreadPoolExecutor(len(daemons) * clients)
        self._clients = [self._threads.submit(self._send, daemon) for daemon in daemons for _ in range(clients)]

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: Any) -> None:
        """End, and raise what a client ran into."""
        self._enough.set()
        self._threads.shutdown()
        for client in self._clients:
            client.result()

    def _send(self, daemon: Policyd) -> None:
        for answer in send(daemon, itertools.repeat({"sasl_username": self._login})):
            self.answers.append(answer)
            if self._enough.is_set():
                return

    def wait_for_more(self, number: int) -> None:
        """Wait until so many more have been answered; nobody may have come to an end."""
        goal = len(self.answers) + number
        wait_until(lambda: len(self.answers) >= goal, f"{number} answers")
        assert not any(client.done() for client in self._clients)


BEGINS = "ERROR while UPDATING db: "
ENDS = re.compile(r"ERROR while UPDATING db: over after (\d+) s, (\d+) events replayed")
BACK_S = 60  # until a store is used again: promised are 15 s; a cluster needs 5 s more, and a busy machine the rest


def errors(daemon: Policyd) -> list[LogLine]:
    return [line for line in daemon.log_lines() if line.level == "err"]


def end_of_outage(daemon: Policyd) -> int:
    """Wait for the line that tells the end of the outage; return the number of events replayed."""
    end = daemon.wait_for_log(ENDS, BACK_S)
    assert (end.facility, end.level) == ("daemon", "err")
    return int(ENDS.fullmatch(end.text)[2])  # type: ignore[index]
