"""A message that is asked about again, because an answer got lost or by configuration, counts once."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

import pytest
from servers import START_TIMEOUT_S, Policyd, policyd_factory, read_answer, request_bytes
from stores import WHOLE, KeptLog, sums

import policyd as module
from policyd import Event, Journal, Policy, PolicyServer, RecentAnswers, Recorder, Settings, SQLiteRepository

QUOTA = 3
Start = Callable[..., Policyd]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Policyd]:
    """One daemon for all tests: each has a login of its own."""
    with policyd_factory() as start:
        yield start(bind="0.0.0.0", defaultquota=QUOTA, blacklist="listed")


def ask_from(daemon: Policyd, address: str, request: bytes) -> str:
    """Ask on a new connection that comes from this address."""
    with socket.create_connection(("127.0.0.1", daemon.port), 20, (address, 0)) as connection:
        connection.sendall(request)
        return read_answer(connection)


def lines_about(daemon: Policyd, login: str) -> list[str]:
    return [line.text for line in daemon.lines_so_far() if login in line.text]


def test_a_repetition_gets_the_same_answer_and_is_counted_and_logged_once(daemon: Policyd) -> None:
    """On the same connection, and on others; whatever the sum has become meanwhile."""
    first = request_bytes(sasl_username="again", recipient_count=2, queue_id="")
    with daemon.connect() as connection:
        for request, answer in [
            (first, "DUNNO"),
            (first, "DUNNO"),
            (request_bytes(sasl_username="again", recipient_count=1, queue_id=""), "HOLD quota exceeded"),
            (first, "DUNNO"),
        ]:
            connection.sendall(request)
            assert read_answer(connection) == answer
    assert ask_from(daemon, "127.0.0.1", first) == "DUNNO"
    assert lines_about(daemon, "again") == [
        "Updating db: again/alice@example.org/192.0.2.1/2/2",
        "Updating db: again/alice@example.org/192.0.2.1/1/3",
        "DEFERRING overquota (3>3) for user again using alice@example.org from ip [192.0.2.1]",
    ]


def test_a_held_message_stays_held_when_it_is_asked_about_again(daemon: Policyd) -> None:
    """Counted again, it would reach twice the quota."""
    request = request_bytes(sasl_username="held", recipient_count=QUOTA)
    assert [ask_from(daemon, "127.0.0.1", request) for _ in range(3)] == ["HOLD quota exceeded"] * 3


def test_a_blacklisted_message_that_is_repeated_is_logged_once(daemon: Policyd) -> None:
    request = request_bytes(sasl_username="listed", queue_id="")
    assert [ask_from(daemon, "127.0.0.1", request) for _ in range(2)] == ["HOLD blacklisted"] * 2
    assert lines_about(daemon, "listed/") == ["Holding blacklisted user: listed/alice@example.org/192.0.2.1/1"]


def test_another_recipient_count_is_another_message(daemon: Policyd) -> None:
    """A refused DATA followed by more recipients keeps the instance."""
    for count in (1, 2):
        daemon.ask(sasl_username="more", instance="1.2.3", recipient_count=count)
    assert lines_about(daemon, "more")[1] == "Updating db: more/alice@example.org/192.0.2.1/2/3"


def test_the_same_instance_from_another_relay_is_another_message(daemon: Policyd) -> None:
    """Two relays number their messages alike."""
    request = request_bytes(sasl_username="relays")
    for address in ("127.0.0.1", "127.0.0.2"):
        ask_from(daemon, address, request)
    assert lines_about(daemon, "relays")[1] == "Updating db: relays/alice@example.org/192.0.2.1/1/2"


def test_without_an_instance_nothing_is_taken_for_a_repetition(daemon: Policyd) -> None:
    for _ in range(2):
        daemon.ask(sasl_username="typed", instance="")
    assert lines_about(daemon, "typed")[1] == "Updating db: typed/alice@example.org/192.0.2.1/1/2"


def test_on_a_unix_socket_all_connections_are_of_one_relay(policyd: Start, tmp_path: Path) -> None:
    daemon = policyd(bind=tmp_path / "socket")
    request = request_bytes(sasl_username="local")
    for _ in range(2):
        with daemon.connect() as connection:
            connection.sendall(request)
            assert read_answer(connection) == "DUNNO"
    assert lines_about(daemon, "local") == ["Updating db: local/alice@example.org/192.0.2.1/1/1"]


class SlowRepository(SQLiteRepository):
    """The embedded store, which commits nothing until it is told to."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.proceed = threading.Event()

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        assert self.proceed.wait(START_TIMEOUT_S)
        return super().insert(events, deadline, times)


class WatchedAnswers(RecentAnswers):
    """Says how many have asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)

    def recall(self, key: object) -> str | None:
        self.asked.release()
        return super().recall(key)


def test_a_repetition_waits_while_the_first_one_is_still_being_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three connections ask about one message before the store has it: one event, one line, one answer for all."""
    answers = WatchedAnswers()
    monkeypatch.setattr(module, "RecentAnswers", lambda: answers)
    monkeypatch.setattr(module, "log", module.Log())
    module.log.start(to_stderr=True)
    repository = SlowRepository(str(tmp_path / "events.sqlite3"))
    recorder = Recorder(repository, Journal(str(tmp_path / "journal.sqlite3")), WHOLE)
    recorder.start()
    policy = Policy(Settings(defaultquota=2), recorder)
    request = request_bytes(sasl_username="twice")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(PolicyServer("127.0.0.1", 0, policy))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        stack.callback(server.shutdown)
        connections = [
            stack.enter_context(socket.create_connection(server.server_address[:2], START_TIMEOUT_S)) for _ in range(3)
        ]
        for connection in connections:
            connection.sendall(request)
            assert answers.asked.acquire(timeout=START_TIMEOUT_S)
        repository.proceed.set()
        assert [read_answer(connection) for connection in connections] == ["DUNNO"] * 3
    recorder.stop(START_TIMEOUT_S)
    module.log.stop()
    lines = [line.partition(": ")[2] for line in capfd.readouterr().err.splitlines()]
    assert lines == ["Updating db: twice/alice@example.org/192.0.2.1/1/1"]
    assert sums(SQLiteRepository(str(tmp_path / "events.sqlite3")), [Event("twice", "", "", 0)]) == [1]


def test_the_last_10_000_answers_are_remembered() -> None:
    answers = RecentAnswers()
    for number in range(10_001):
        assert answers.recall(number) is None
        answers.settle(number, f"answer {number}")
    assert answers.recall(1) == "answer 1"
    assert answers.recall(10_000) == "answer 10000"
    assert answers.recall(0) is None, "the oldest one makes room"


class BrokenRecorder:
    """Fails as no recorder should."""

    def record(self, event: Event, on_usage: module.OnUsage) -> None:
        raise RuntimeError("a fault of ours")


class OddRecorder:
    """Tells what no recorder should."""

    def record(self, event: Event, on_usage: module.OnUsage) -> None:
        Recorder._tell([(event, on_usage)], ["no usage"])  # type: ignore[list-item]


def test_a_fault_of_ours_in_the_decision_is_answered_once(logged: KeptLog) -> None:
    policy = Policy(Settings(), OddRecorder())  # type: ignore[arg-type]
    request = module.PolicyRequest("END-OF-MESSAGE", "1.2.3", "4Xk", "anna", "anna@x", "192.0.2.1", "", 1)
    replies: list[str] = []
    policy.answer(request, "127.0.0.1", replies.append)
    assert replies == ["DUNNO"]
    assert len(logged.errors()) == 1
    policy.answer(request, "127.0.0.1", replies.append)
    assert replies == ["DUNNO", "DUNNO"]


def test_after_a_fault_of_ours_nobody_waits_for_the_answer() -> None:
    """Mail flows, and a repetition is answered too."""
    policy = Policy(Settings(), BrokenRecorder())  # type: ignore[arg-type]
    request = module.PolicyRequest("END-OF-MESSAGE", "1.2.3", "4Xk", "anna", "anna@x", "192.0.2.1", "", 1)
    replies: list[str] = []
    with pytest.raises(RuntimeError):
        policy.answer(request, "127.0.0.1", replies.append)
    again = threading.Thread(target=policy.answer, args=(request, "127.0.0.1", replies.append), daemon=True)
    again.start()
    again.join(START_TIMEOUT_S)
    assert replies == ["DUNNO", "DUNNO"]
