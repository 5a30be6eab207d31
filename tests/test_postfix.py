"""policyd behind a real Postfix: what happens to mail."""

from __future__ import annotations

import smtplib
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Callable

import pytest
from asking import ask, complaints, send, submit, wait_for_delivery
from servers import DUNNO, Policyd, Postfix, free_port, wait_until
from stores import SQLiteStore

QUOTA = 3
Start = Callable[..., Policyd]


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


# ---- doors of another kind --------------------------------------------------------------------------

# One that hands all mail to a filter before it is queued: another smtpd, as it stands behind many a content filter.
# And one that believes its clients where they come from, on a host that has IPv6 only.
OTHER_DOORS = """
127.0.0.1:{proxied_port} inet n - n - - smtpd
  -o smtpd_proxy_filter=127.0.0.1:{filter_port}
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
127.0.0.1:{filter_port} inet n - n - - smtpd
  -o smtpd_sasl_auth_enable=no
  -o mynetworks=127.0.0.1 -o {{ smtpd_relay_restrictions = permit_mynetworks, reject }}
[::1]:{ipv6_port} inet n - n - - smtpd
  -o inet_protocols=ipv6 -o inet_interfaces=all
  -o smtpd_authorized_xclient_hosts=[::1]
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ inet:[::1]:{policy_port}, timeout=10s }} }}
"""


class OtherPostfix(Postfix):
    """A Postfix with these doors, too."""

    def __init__(self) -> None:
        super().__init__()
        self.proxied_port, self.filter_port, self.ipv6_port = (free_port() for _ in range(3))

    def _write_configuration(self) -> None:
        super()._write_configuration()
        main, master = (self.directory / "etc" / name for name in ("main.cf", "master.cf"))
        main.write_text(main.read_text().replace("inet_protocols = ipv4", "inet_protocols = all"))
        doors = OTHER_DOORS.format(tcp=f"inet:127.0.0.1:{self.policy_port}", **vars(self))
        master.write_text(master.read_text() + doors)


@pytest.fixture(scope="module")
def other_postfix() -> Iterator[OtherPostfix]:
    server = OtherPostfix()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.mark.postfix
def test_where_postfix_cannot_hold_mail_it_is_refused(other_postfix: OtherPostfix, policyd: Start) -> None:
    """Behind smtpd_proxy_filter HOLD does nothing: a thief would be served.  Whoever runs it is told where to ask."""
    postfix = other_postfix
    daemon = policyd(port=postfix.policy_port, defaultquota=QUOTA, blacklist="boris")
    wait_for_delivery(postfix, submit(postfix, postfix.proxied_port, recipients=QUOTA - 1))
    for _ in range(2):
        refused = submit(postfix, postfix.proxied_port)
        assert (refused.code, "quota exceeded" in refused.reply) == (554, True)
    refused = submit(postfix, postfix.proxied_port, login="boris")
    assert (refused.code, "blacklisted" in refused.reply) == (554, True)
    assert submit(postfix, recipients=1).code == 250, "held, where it can be"
    assert len(postfix.delivered()) == QUOTA - 1
    assert set(postfix.queue().values()) == {"hold"}
    lines = [line.text for line in daemon.lines_so_far() if line.text.startswith(("REJECTING", "DEFERRING", "Holding"))]
    who = "for user alice using alice@example.org from ip [127.0.0.1]"
    assert lines[:3] == [
        f"REJECTING overquota (3>3) {who}", f"REJECTING overquota (4>3) {who}",
        "REJECTING blacklisted user: boris/alice@example.org/127.0.0.1/1",
    ]  # fmt: skip
    assert lines[3].startswith(f"DEFERRING overquota (5>3) {who}, queue_id=")
    (warning,) = complaints(daemon)
    assert "smtpd_proxy_filter" in warning
    incidents = [what for _, _, what, count in SQLiteStore(daemon.statedir / "events.sqlite3").rows() if count is None]
    assert incidents == ["REJECT overquota", "HOLD overquota"]
    postfix.delete("ALL")


@pytest.mark.parametrize("state", ["END-OF-MESSAGE", "DATA"])
def test_a_message_without_a_queue_id_is_refused_and_warned_of_once_a_minute(policyd: Start, state: str) -> None:
    """Any message with a login, held or not; one without a login, or at another state, is no sign of it."""
    daemon = policyd(defaultquota=QUOTA, hold_message="ask us", reject_message="call us", mode="enforce")
    assert ask(daemon, "", queue_id="", protocol_state=state) == (DUNNO, [])
    assert complaints(daemon) == []
    answers = [daemon.ask(sasl_username="anna", queue_id="", protocol_state=state) for _ in range(QUOTA)]
    assert answers == [*[DUNNO] * (QUOTA - 1), "REJECT quota exceeded; call us"]
    (warning,) = complaints(daemon)
    assert "smtpd_proxy_filter" in warning


@pytest.mark.postfix
@pytest.mark.parametrize("client_address", ["::ffff:198.18.9.7", "64:ff9b::c612:907"])
def test_with_ipv6_only_ipv4_clients_are_their_ipv4_address(
    other_postfix: OtherPostfix, policyd: Start, client_address: str
) -> None:
    """On lists of IPv4 networks; asked over IPv6, as on a host without IPv4."""
    daemon = policyd(bind="::1", port=other_postfix.policy_port, blacklist="198.18.0.0/15")
    with smtplib.SMTP("::1", other_postfix.ipv6_port, timeout=60) as session:
        session.ehlo("proxy.example.org")
        assert session.docmd("XCLIENT", f"ADDR=IPV6:{client_address}")[0] == 220
        session.ehlo("client.example.org")
        session.login(other_postfix.login, other_postfix.password)
        reply = send(session)
    assert other_postfix.queue_name(reply.queue_id) == "hold"
    line = daemon.wait_for_log("Holding blacklisted user: alice/alice@example.org/")
    assert f"/{client_address}/1, queue_id={reply.queue_id}" in line.text
    other_postfix.delete("ALL")
