"""A message that is asked about again, because an answer got lost or by configuration, counts once."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import Relay, a_request
from servers import DUNNO, HOLD, Policyd, read_answer, request_bytes
from stores import KeptLog, SQLiteStore, total

from policyd import Event, Policy, RecentAnswers, Recorder, Settings

Start = Callable[..., Policyd]


@pytest.fixture
def store(tmp_path: Path) -> SQLiteStore:
    return SQLiteStore(tmp_path / "events.sqlite3")


@pytest.fixture
def relay(store: SQLiteStore, logged: KeptLog) -> Relay:
    return Relay(store, logged, "defaultquota=3", "blacklist=listed")


def test_a_repetition_gets_the_same_answer_and_is_counted_and_logged_once(store: SQLiteStore, relay: Relay) -> None:
    """Whatever the sum has become meanwhile; without an instance nothing is taken for one."""
    first = ["Updating db: anna/alice@example.org/192.0.2.1/2/2"]
    assert relay.ask("anna", recipient_count=2, instance="1.2.3") == (DUNNO, first)
    assert relay.ask("anna", recipient_count=2, instance="1.2.3", protocol_state="DATA") == (DUNNO, [])
    answer, lines = relay.ask("anna", instance="1.2.4")
    assert (answer, len(lines)) == (HOLD, 2)
    assert relay.ask("anna", instance="1.2.4") == (HOLD, [])
    assert relay.ask("anna", recipient_count=2, instance="1.2.3") == (DUNNO, [])
    assert [len(relay.ask("listed", instance="1.2.5").lines) for _ in range(2)] == [1, 0]
    for _ in range(2):
        relay.ask("bert", instance="")
    assert total(store, "bert") == 2


@pytest.mark.parametrize(("again", "counted"), [
    ({}, 1), ({"instance": "1.2.4"}, 2),
    ({"recipient_count": 2}, 3),  # a refused DATA followed by more recipients keeps the instance
    ({"peer": "127.0.0.2"}, 2),  # two relays number their messages alike
])  # fmt: skip
def test_a_message_is_its_peer_its_instance_and_its_recipient_count(
    store: SQLiteStore, relay: Relay, again: dict[str, Any], counted: int
) -> None:
    for message in ({}, again):
        relay.ask("anna", **{"instance": "1.2.3", **message})
    assert total(store) == counted


@pytest.mark.parametrize("bind", ["127.0.0.1", "socket"])
def test_a_repetition_may_come_on_another_connection(policyd: Start, tmp_path: Path, bind: str) -> None:
    """On a Unix socket all are of one relay."""
    daemon = policyd(bind=tmp_path / bind if bind == "socket" else bind)
    request = request_bytes(sasl_username="anna")
    for _ in range(3):
        with daemon.connect() as connection:
            connection.sendall(request)
            assert read_answer(connection) == DUNNO
    assert [line.text for line in daemon.lines_so_far()[1:]] == ["Updating db: anna/alice@example.org/192.0.2.1/1/1"]


def test_a_repetition_waits_while_the_first_one_is_still_being_counted(relay: Relay, logged: KeptLog) -> None:
    """Three connections ask about one message before the store has it: one event, one line, one answer for all."""
    assert [outcome.answer for outcome in relay.ask_at_once([{"instance": "1.2.3"}] * 3)] == [DUNNO] * 3
    assert [line.text for line in logged.lines] == ["Updating db: alice/alice@example.org/192.0.2.1/1/1"]


def test_the_last_10_000_answers_are_remembered_and_only_the_first_one_counts() -> None:
    answers, told = RecentAnswers(), []
    for number in range(10_001):
        assert answers.ask(number, told.append)
        answers.settle(number, f"answer {number}")
        answers.settle(number, "another")
    for number in (1, 10_000):
        assert not answers.ask(number, told.append)
    assert told == [f"answer {number}" for number in (*range(10_001), 1, 10_000)]
    assert answers.ask(0, told.append), "the oldest one makes room"


@pytest.mark.parametrize("usage", [None, "no usage"], ids=["in the recorder", "in the decision"])
def test_after_a_fault_of_ours_mail_flows_and_nobody_waits(logged: KeptLog, usage: Any) -> None:
    """Also a repetition is answered; and the fault is logged, or goes on to who logs it."""

    def record(event: Event, on_usage: Any) -> None:
        if usage is None:
            raise RuntimeError("a fault of ours")
        Recorder._tell([(event, on_usage, 0.0)], [usage])

    policy = Policy(Settings(), types.SimpleNamespace(record=record), lambda _: None)  # type: ignore[arg-type]
    replies: list[str] = []
    with pytest.raises(RuntimeError) if usage is None else contextlib.nullcontext():
        policy.answer(a_request(sasl_username="anna", instance="1.2.3"), "127.0.0.1", replies.append)
    assert replies == [DUNNO]
    assert len(logged.errors()) == (usage is not None)
    policy.answer(a_request(sasl_username="anna", instance="1.2.3"), "127.0.0.1", replies.append)
    assert replies == [DUNNO] * 2
