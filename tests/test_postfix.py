"""policyd behind a real Postfix: what happens to mail."""

from __future__ import annotations

import itertools
import re
import smtplib
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Callable, NamedTuple

import pytest
from servers import Policyd, Postfix, wait_until

QUOTA = 3
Start = Callable[..., Policyd]

_numbers = itertools.count(1)


class Outcome(NamedTuple):
    """What the client was told about its message."""

    code: int
    reply: str
    subject: str

    @property
    def queue_id(self) -> str:
        """The id Postfix gave to a message it took."""
        match = re.search(r"queued as (\w+)", self.reply)
        assert match, self
        return match[1]


def send(session: smtplib.SMTP, sender: str = "alice@example.org", recipients: int = 1) -> Outcome:
    """Send one message in a session and return what became of it."""
    subject = f"message {next(_numbers)} of the tests"
    session.mail(sender)
    for number in range(recipients):
        assert session.rcpt(f"rcpt{number}@example.net")[0] == 250
    code, reply = session.data(f"From: <{sender}>\r\nSubject: {subject}\r\n\r\nHello\r\n")
    return Outcome(code, reply.decode(), subject)


def submit(postfix: Postfix, port: int | None = None, recipients: int = 1) -> Outcome:
    """Send one message in a session of its own."""
    with postfix.session(port) as session:
        return send(session, recipients=recipients)


def wait_for_delivery(postfix: Postfix, outcome: Outcome) -> None:
    """Wait until a message has arrived at its recipient's."""
    assert outcome.code == 250, outcome
    wait_until(lambda: any(outcome.subject in text for text in postfix.delivered()), f"{outcome} is delivered")


@pytest.fixture
def daemon(policyd: Start, postfix: Postfix) -> Iterator[Policyd]:
    """The daemon where Postfix looks for it."""
    already_logged = len(postfix.log)
    yield policyd(port=postfix.policy_port, defaultquota=QUOTA)
    print(postfix.log[already_logged:])  # pytest shows it if the test failed


class RecordingRelay(socketserver.ThreadingTCPServer):
    """Passes bytes between Postfix and policyd, and keeps what each connection asked."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, daemon: Policyd) -> None:
        self.daemon = daemon
        self.asked: list[bytearray] = []
        super().__init__(("127.0.0.1", port), RelayHandler)


class RelayHandler(socketserver.BaseRequestHandler):
    server: RecordingRelay

    def handle(self) -> None:
        asked = bytearray()
        self.server.asked.append(asked)
        with self.server.daemon.connect() as policy:
            answers = threading.Thread(target=copy, args=(policy, self.request, bytearray()))
            answers.start()
            copy(self.request, policy, asked)
            answers.join()


def copy(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    """Pass on and record all that comes, then the end."""
    source.settimeout(None)
    while True:
        received = source.recv(65536)
        record += received
        if not received:
            break
        target.sendall(received)
    target.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(policyd: Start, postfix: Postfix) -> Iterator[RecordingRelay]:
    """A recording relay where Postfix looks for policyd, and policyd behind it."""
    daemon = policyd(defaultquota=QUOTA)
    with RecordingRelay(postfix.policy_port, daemon) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        daemon.stop()  # ends the relayed connections, which server_close waits for
        server.shutdown()
        thread.join()


def test_mail_under_the_quota_is_delivered(postfix: Postfix, daemon: Policyd) -> None:
    outcome = submit(postfix, recipients=QUOTA - 1)
    wait_for_delivery(postfix, outcome)
    daemon.wait_for_log(f"Updating db: alice/alice@example.org/127.0.0.1/{QUOTA - 1}/{QUOTA - 1}")


def test_mail_that_reaches_the_quota_waits_in_the_hold_queue(postfix: Postfix, daemon: Policyd) -> None:
    outcome = submit(postfix, recipients=QUOTA)
    assert outcome.code == 250
    assert postfix.queue_name(outcome.queue_id) == "hold"
    # The log tells which message it is that waits.
    daemon.wait_for_log(
        f"DEFERRING overquota ({QUOTA}>{QUOTA}) for user alice using alice@example.org from ip [127.0.0.1]"
        f", queue_id={outcome.queue_id}"
    )


def test_mail_that_reaches_twice_the_quota_is_refused(postfix: Postfix, daemon: Policyd) -> None:
    assert submit(postfix, recipients=2 * QUOTA - 1).code == 250
    outcome = submit(postfix)
    assert outcome.code == 554
    assert outcome.reply.startswith("5.7.1 ")
    assert "max quota exceeded" in outcome.reply
    daemon.wait_for_log(f"REJECTING overquota ({2 * QUOTA}>2x{QUOTA}) for user alice")


def test_mail_without_login_passes_uncounted(postfix: Postfix, daemon: Policyd) -> None:
    with postfix.session(login=False) as session:
        outcome = send(session, sender="someone@example.com", recipients=2 * QUOTA)
    wait_for_delivery(postfix, outcome)
    # The next message of a login is the first that was counted, and its line the first that was logged.
    submit(postfix)
    daemon.wait_for_log("Updating db: alice/alice@example.org/127.0.0.1/1/1")
    daemon.stop()
    assert [line.text for line in daemon.log_lines() if "someone" in line.text] == []


def test_the_null_sender_with_a_login_is_counted(postfix: Postfix, daemon: Policyd) -> None:
    with postfix.session() as session:
        outcome = send(session, sender="")
    wait_for_delivery(postfix, outcome)
    daemon.wait_for_log("Updating db: alice//127.0.0.1/1/1")
    submit(postfix)
    daemon.wait_for_log("Updating db: alice/alice@example.org/127.0.0.1/1/2")


def test_the_messages_of_a_session_are_asked_about_on_one_connection(postfix: Postfix, relay: RecordingRelay) -> None:
    """Postfix sleeps a second before it asks a server again that hung up after an answer."""
    with postfix.session() as session:
        outcomes = [send(session) for _ in range(2)]
    assert [outcome.code for outcome in outcomes] == [250, 250]
    assert [bytes(asked).count(b"\n\n") for asked in relay.asked] == [2]


def test_mail_flows_while_the_daemon_is_down(postfix: Postfix, daemon: Policyd) -> None:
    daemon.stop()
    already_logged = len(postfix.log)
    outcome = submit(postfix, recipients=2 * QUOTA)
    wait_for_delivery(postfix, outcome)
    address = f"127.0.0.1:{postfix.policy_port}"
    wait_until(
        lambda: f"warning: connect to {address}: Connection refused" in postfix.log[already_logged:]
        and f"warning: problem talking to server {address}" in postfix.log[already_logged:],
        "Postfix warns that its policy server is gone",
    )


def test_the_restarted_daemon_is_asked_again(postfix: Postfix, daemon: Policyd) -> None:
    submit(postfix)
    daemon.stop()
    daemon.start()
    wait_for_delivery(postfix, submit(postfix))
    daemon.wait_for_log("Updating db: alice/alice@example.org/127.0.0.1/1/2")


def test_a_message_asked_about_at_data_and_at_its_end_counts_once(postfix: Postfix, daemon: Policyd) -> None:
    wait_for_delivery(postfix, submit(postfix, postfix.data_port, recipients=QUOTA - 1))
    submit(postfix)
    daemon.wait_for_log(f"Updating db: alice/alice@example.org/127.0.0.1/1/{QUOTA}")
    updates = [line.text for line in daemon.log_lines() if line.text.startswith("Updating db:")]
    assert len(updates) == 2


def test_postfix_asks_over_a_unix_socket(postfix: Postfix, policyd: Start) -> None:
    daemon = policyd(bind=postfix.policy_socket, defaultquota=QUOTA)
    wait_for_delivery(postfix, submit(postfix, postfix.socket_port))
    daemon.wait_for_log("Updating db: alice/alice@example.org/127.0.0.1/1/1")
    outcome = submit(postfix, postfix.socket_port, recipients=QUOTA)
    assert postfix.queue_name(outcome.queue_id) == "hold"
