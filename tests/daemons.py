"""Daemons and those who ask them: one in the process of the test, many clients at once, and outages in the log."""

from __future__ import annotations

import contextlib
import os
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

# --- in this process, for what it does once a minute or once a day, sooner than that ---


class DaemonHere:
    """Runs in a thread, with its settings in a file; what it logs is in the fixture `logged`."""

    def __init__(self, settings_file: Path) -> None:
        settings = Settings.from_file(str(settings_file))
        self.daemon = Daemon(settings, str(settings_file), os.sched_getaffinity(0))
        self._is_listening = threading.Event()  # to signals
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._is_listening.wait()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, Daemon.SIGNALS)  # as main() does: run() asks for them
        self._is_listening.set()
        self.daemon.run()

    def signal(self, number: int) -> None:
        """Send the daemon, and nobody else in this process, a signal."""
        assert self.thread.ident is not None
        signal.pthread_kill(self.thread.ident, number)


@contextlib.contextmanager
def running_here(settings_file: Path) -> Iterator[DaemonHere]:
    """Run a daemon with these settings."""
    here = DaemonHere(settings_file)
    try:
        yield here
    finally:
        here.signal(signal.SIGTERM)
        here.thread.join()


# --- many clients ---

CONNECTIONS = 16


class Answer(NamedTuple):
    """What a client got."""

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
        sent = [
            threads.submit(lambda n: [*send(daemons[n % len(daemons)], messages[n::CONNECTIONS])], n)
            for n in range(CONNECTIONS)
        ]
        return [answer.action for each in sent for answer in each.result(60)]


class Load:
    """So many clients of each daemon, which ask about one login without a pause, each on one connection."""

    def __init__(self, daemons: list[Policyd], clients: int, login: str = "load") -> None:
        self.answers: list[Answer] = []
        self._enough = threading.Event()
        self._message = {"sasl_username": login}
        self._threads = ThreadPoolExecutor(len(daemons) * clients)
        self._clients = [self._threads.submit(self._send, daemon) for daemon in daemons for _ in range(clients)]

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: Any) -> None:
        self._enough.set()
        self._threads.shutdown()

    def _send(self, daemon: Policyd) -> None:
        for answer in send(daemon, iter(lambda: self._message, None)):
            self.answers.append(answer)
            if self._enough.is_set():
                return

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


# --- outages, as the log tells them ---

BEGINS = "ERROR while UPDATING db: "
ENDS = re.compile(r"ERROR while UPDATING db: over after (\d+) s, (\d+) events replayed")
BACK_S = 60  # until a store is used again: promised are 15 s; a cluster needs 5 s more, and a busy machine the rest


def errors(daemon: Policyd) -> list[LogLine]:
    """Return what has been logged at level err."""
    return [line for line in daemon.log_lines() if line.level == "err"]


def end_of_outage(daemon: Policyd) -> int:
    """Wait for the line that tells the end of the outage; return the number of events replayed."""
    end = daemon.wait_for_log(ENDS, BACK_S)
    assert (end.facility, end.level) == ("daemon", "err")
    return int(ENDS.fullmatch(end.text)[2])  # type: ignore[index]
