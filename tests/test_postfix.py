"""policyd behind a real Postfix: what happens to mail."""

from __future__ import annotations

import re
import smtplib
from collections.abc import Iterator

import pytest
from asking import ask, complaints, send, status, submit, wait_for_delivery
from servers import DUNNO, Policyd, Postfix, Start, wait_until
from stores import SQLiteStore

QUOTA = 3


@pytest.fixture
def daemon(policyd: Start, postfix: Postfix) -> Iterator[Policyd]:
    already_logged = len(postfix.log)
    yield policyd(port=postfix.policy_port, defaultquota=QUOTA)
    print(postfix.log[already_logged:])  # pytest shows it if the test failed


def test_the_more_a_login_sends_its_mail_is_delivered_held_and_refused(postfix: Postfix, daemon: Policyd) -> None:
    wait_for_delivery(postfix, submit(postfix, recipients=QUOTA - 1))
    daemon.wait_for_log(f"Updating db: alice/alice@example.org/127.0.0.1/{QUOTA - 1}/{QUOTA - 1}")
    held = submit(postfix)
    assert held.code == 250
    assert postfix.queue()[held.queue_id] == "hold"
    # The log tells which message it is that waits.
    who = "for user alice using alice@example.org from ip [127.0.0.1]"
    daemon.wait_for_log(f"DEFERRING overquota ({QUOTA}>{QUOTA}) {who}, queue_id={held.queue_id}")
    refused = submit(postfix, recipients=QUOTA)
    assert (refused.code, refused.reply[:6], "max quota exceeded" in refused.reply) == (554, "5.7.1 ", True)
    daemon.wait_for_log(f"REJECTING overquota ({2 * QUOTA}>2x{QUOTA}) {who}")


def test_mail_without_login_is_not_counted_and_the_null_sender_with_one_is(postfix: Postfix, daemon: Policyd) -> None:
    with postfix.session(login=False) as session:
        wait_for_delivery(postfix, send(session, sender="someone@example.com", recipients=2 * QUOTA))
    with postfix.session() as session:
        wait_for_delivery(postfix, send(session, sender=""))
    submit(postfix)
    assert [line.text for line in daemon.lines_so_far()[1:]] == [
        "Updating db: alice//127.0.0.1/1/1", "Updating db: alice/alice@example.org/127.0.0.1/1/2"
    ]  # fmt: skip


def test_mail_flows_while_the_daemon_is_down_and_then_it_is_asked_again(postfix: Postfix, daemon: Policyd) -> None:
    submit(postfix)
    daemon.stop()
    already_logged, address = len(postfix.log), f"127.0.0.1:{postfix.policy_port}"
    wait_for_delivery(postfix, submit(postfix, recipients=2 * QUOTA))
    for warning in (f"connect to {address}: Connection refused", f"problem talking to server {address}"):
        wait_until(lambda said=f"warning: {warning}": said in postfix.log[already_logged:], f"Postfix says {warning}")
    daemon.start()
    wait_for_delivery(postfix, submit(postfix))
    daemon.wait_for_log("Updating db: alice/alice@example.org/127.0.0.1/1/2")


def test_a_message_asked_about_at_data_and_at_its_end_counts_once(postfix: Postfix, daemon: Policyd) -> None:
    wait_for_delivery(postfix, submit(postfix, postfix.data_port, recipients=QUOTA - 1))
    submit(postfix)
    updates = [line.text for line in daemon.lines_so_far() if line.text.startswith("Updating db:")]
    assert len(updates) == 2
    assert updates[1] == f"Updating db: alice/alice@example.org/127.0.0.1/1/{QUOTA}"


def test_postfix_asks_over_a_unix_socket(postfix: Postfix, policyd: Start) -> None:
    daemon = policyd(bind=postfix.policy_socket, defaultquota=QUOTA)
    wait_for_delivery(postfix, submit(postfix, postfix.socket_port))
    daemon.wait_for_log("Updating db: alice/alice@example.org/127.0.0.1/1/1")
    outcome = submit(postfix, postfix.socket_port, recipients=QUOTA)
    assert postfix.queue()[outcome.queue_id] == "hold"


def test_a_session_is_asked_about_on_one_connection(postfix: Postfix, daemon: Policyd) -> None:
    """Postfix sleeps a second before it asks a server again that hung up after an answer."""
    with postfix.session() as session:
        for number in (1, 2):
            wait_for_delivery(postfix, send(session))
            assert re.match(f"{number} requests: .*; 1 connections; ", status(daemon).text)


def test_where_postfix_cannot_hold_mail_it_is_refused(postfix: Postfix, policyd: Start) -> None:
    """Behind smtpd_proxy_filter HOLD does nothing: a thief would be served.  Whoever runs it is told where to ask."""
    postfix.delete("ALL")
    daemon = policyd(port=postfix.policy_port, defaultquota=QUOTA, blacklist="boris")
    delivered = submit(postfix, postfix.proxied_port, recipients=QUOTA - 1)
    wait_for_delivery(postfix, delivered)
    for _ in range(2):
        refused = submit(postfix, postfix.proxied_port)
        assert (refused.code, "quota exceeded" in refused.reply) == (554, True)
    refused = submit(postfix, postfix.proxied_port, login="boris")
    assert (refused.code, "blacklisted" in refused.reply) == (554, True)
    assert submit(postfix, recipients=1).code == 250, "held, where it can be"
    assert sum(delivered.subject in text for text in postfix.delivered()) == QUOTA - 1
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


def test_with_ipv6_only_ipv4_clients_are_their_ipv4_address(postfix: Postfix, policyd: Start) -> None:
    """On lists of IPv4 networks; asked over IPv6, as on a host without IPv4."""
    daemon = policyd(bind="::1", port=postfix.policy_port, blacklist="198.18.0.0/15")
    for client_address in ("::ffff:198.18.9.7", "64:ff9b::c612:907"):
        with smtplib.SMTP("::1", postfix.ipv6_port, timeout=60) as session:
            session.ehlo("proxy.example.org")
            assert session.docmd("XCLIENT", f"ADDR=IPV6:{client_address}")[0] == 220
            session.ehlo("client.example.org")
            session.login(postfix.login, postfix.password)
            reply = send(session)
        assert postfix.queue()[reply.queue_id] == "hold"
        shown = f"alice/alice@example.org/{client_address}/1, queue_id={reply.queue_id}"
        daemon.wait_for_log(f"Holding blacklisted user: {shown}")
    postfix.delete("ALL")
