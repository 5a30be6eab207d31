"""What Postfix may send, in whatever pieces, and what nobody may: SMTPD_POLICY_README on the wire."""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import struct
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NoReturn

import hypothesis.strategies as st
import pytest
from hypothesis import given
from servers import Policyd, policyd_factory, read_answer, read_to_end, request_bytes

import policyd as module
from policyd import OnceAMinute, PolicyRequest, ProtocolError, RequestStream, read_request

REQUESTS = Path(__file__).parent / "requests"
Start = Callable[..., Policyd]

HEAD = b"request=smtpd_access_policy\n"
_numbers = itertools.count(1)


def parse(data: bytes) -> PolicyRequest | None:
    return read_request(io.BytesIO(data).readline)


def parse_all(readline: Callable[[int], bytes]) -> list[PolicyRequest | str]:
    """Return the requests until the end, or until a mistake, which comes last as a text."""
    requests: list[PolicyRequest | str] = []
    try:
        while (request := read_request(readline)) is not None:
            requests.append(request)
    except ProtocolError as error:
        requests.append(str(error))
    return requests


@pytest.fixture(scope="module")
def daemon() -> Iterator[Policyd]:
    """One daemon for all tests that tell their own log lines from those of others."""
    with policyd_factory() as start:
        yield start(bind="0.0.0.0")


@contextlib.contextmanager
def peer_of(daemon: Policyd) -> Iterator[tuple[socket.socket, str]]:
    """A connection from an address of its own, by which the log tells it from all others, and this address."""
    number = next(_numbers)
    address = f"127.1.{number // 250}.{number % 250 + 1}"
    with socket.socket() as connection:
        connection.settimeout(20)
        connection.bind((address, 0))
        connection.connect(("127.0.0.1", daemon.port))
        yield connection, address


def send_and_end(connection: socket.socket, data: bytes) -> bytes:
    """Send all of it and then the end, and return all that came back until the daemon hung up."""
    with contextlib.suppress(ConnectionError):  # it hangs up where the mistake is
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    return read_to_end(connection)


def send_for_ever(connection: socket.socket, data: bytes) -> NoReturn:
    while True:
        connection.sendall(data)


# ---- recorded requests ----------------------------------------------------------------------------

TO = "rcpt1@example.net"

RECORDED = {
    "data-three-recipients": PolicyRequest(
        "DATA", "4ad6.6b029793.ea86c.0", "EB9C920E042", "alice", "alice@example.org", "127.0.0.1", "", 3
    ),
    "end-of-message-login-with-domain-and-capitals": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.ee694.0", "EE7A920E042",
        "Alice@EXAMPLE.ORG", "Alice@Example.ORG", "127.0.0.1", TO, 1,
    ),
    "end-of-message-null-sender": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.ecedc.0", "ED0DA20E5F5", "alice", "", "127.0.0.1", TO, 1
    ),
    "end-of-message-one-recipient": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.e8713.0", "E9E6720E5F5", "alice", "alice@example.org", "127.0.0.1", TO, 1
    ),
    "end-of-message-quoted-sender": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.ef234.0", "EF35620E042",
        "alice", "o'brien \"x\" y=z@example.org", "127.0.0.1", TO, 1,
    ),
    "end-of-message-smtputf8-sender": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.efc9e.0", "EFDDE20E042",
        "alice", "jos\xe9@\u4f8b\u3048.example.org", "127.0.0.1", TO, 1,
    ),
    "end-of-message-starttls-two-recipients": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.f13ee.0", "F150E20E042", "alice", "alice@example.org", "127.0.0.1", "", 2
    ),
    "end-of-message-three-recipients": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.ea86c.0", "EB9C920E042", "alice", "alice@example.org", "127.0.0.1", "", 3
    ),
    "end-of-message-unauthenticated": PolicyRequest(
        "END-OF-MESSAGE", "4ad6.6b029793.edb0e.0", "EDCD120E042", "", "someone@example.org", "127.0.0.1", TO, 1
    ),
    "end-of-message-unnamed-client": PolicyRequest(
        "END-OF-MESSAGE", "4ae3.6b029793.f3a4a.0", "F3BAC20E5F5", "alice", "alice@example.org", "127.0.0.9", TO, 1
    ),
    "rcpt-three-recipients": PolicyRequest(
        "RCPT", "4ad6.6b029793.ea86c.0", "", "alice", "alice@example.org", "127.0.0.1", TO, 0
    ),
}


def recorded(name: str) -> bytes:
    return (REQUESTS / f"{name}.txt").read_bytes()


def test_every_recorded_request_is_among_those_tested() -> None:
    assert {file.stem for file in REQUESTS.glob("*.txt")} == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_request_says_what_postfix_meant(name: str) -> None:
    assert parse(recorded(name)) == RECORDED[name]


def test_the_recorded_requests_get_the_right_answers(policyd: Start) -> None:
    """On one connection, each with its answer and its lines in the log."""
    daemon = policyd(defaultquota=10)
    expected = [  # in the order of a day: what is asked, the answer, what is logged
        ("rcpt-three-recipients", "DUNNO", [
            "recipient_count is 0 at protocol_state RCPT: nothing is counted;"
            " in main.cf, call policyd from smtpd_end_of_data_restrictions"]),
        ("data-three-recipients", "DUNNO", ["Updating db: alice/alice@example.org/127.0.0.1/3/3"]),
        ("end-of-message-three-recipients", "DUNNO", []),  # the same message as the one before
        ("end-of-message-one-recipient", "DUNNO", ["Updating db: alice/alice@example.org/127.0.0.1/1/4"]),
        ("end-of-message-login-with-domain-and-capitals", "DUNNO", [
            "Updating db: alice/alice@example.org/127.0.0.1/1/5"]),
        ("end-of-message-null-sender", "DUNNO", ["Updating db: alice//127.0.0.1/1/6"]),
        ("end-of-message-unauthenticated", "DUNNO", []),
        ("end-of-message-quoted-sender", "DUNNO", [
            "Updating db: alice/o'brien \"x\" y=z@example.org/127.0.0.1/1/7"]),
        ("end-of-message-smtputf8-sender", "DUNNO", [
            r"Updating db: alice/jos\xe9@\u4f8b\u3048.example.org/127.0.0.1/1/8"]),
        ("end-of-message-starttls-two-recipients", "HOLD quota exceeded", [
            "Updating db: alice/alice@example.org/127.0.0.1/2/10",
            "DEFERRING overquota (10>10) for user alice using alice@example.org from ip [127.0.0.1],"
            " queue_id=F150E20E042"]),
        ("end-of-message-unnamed-client", "HOLD quota exceeded", [
            "Updating db: alice/alice@example.org/127.0.0.9/1/11",
            "DEFERRING overquota (11>10) for user alice using alice@example.org from ip [127.0.0.9],"
            " queue_id=F3BAC20E5F5"]),
    ]
    assert {name for name, _, _ in expected} == set(RECORDED)
    with daemon.connect() as connection:
        for name, answer, _ in expected:
            connection.sendall(recorded(name))
            assert (name, read_answer(connection)) == (name, answer)
    assert [line.text for line in daemon.lines_so_far()[1:]] == [line for _, _, lines in expected for line in lines]


# ---- split and glued ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["end-of-message-smtputf8-sender", "rcpt-three-recipients"])
def test_a_request_cut_off_anywhere_is_none(name: str) -> None:
    request = recorded(name)
    assert [parse(request[:cut]) for cut in range(len(request))] == [None] * len(request)


def test_a_request_may_arrive_byte_by_byte(daemon: Policyd) -> None:
    with daemon.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request_bytes(sasl_username="drip"):
            connection.sendall(bytes([byte]))
        assert read_answer(connection) == "DUNNO"
    daemon.wait_for_log("Updating db: drip/alice@example.org/192.0.2.1/1/1")


def test_requests_glued_together_are_answered_in_their_order(daemon: Policyd) -> None:
    """All in one piece, those that go to the store and those that do not in turn."""
    outcomes = ["DUNNO", "HOLD quota exceeded", "DUNNO", "REJECT max quota exceeded", "DUNNO"]
    glued = b"".join([
        request_bytes(sasl_username="glued", recipient_count=1),
        request_bytes(sasl_username="glued", recipient_count=1499),
        request_bytes(sasl_username=""),
        request_bytes(sasl_username="glued", recipient_count=1500),
        request_bytes(sasl_username="glued", recipient_count=0),
    ])
    with daemon.connect() as connection:
        connection.sendall(glued)
        assert [read_answer(connection) for _ in outcomes] == outcomes


def test_a_connection_stays_open_for_any_number_of_requests(daemon: Policyd) -> None:
    with daemon.connect() as connection:
        for _ in range(100):
            connection.sendall(request_bytes(sasl_username="many"))
            assert read_answer(connection) == "DUNNO"
    daemon.wait_for_log("Updating db: many/alice@example.org/192.0.2.1/1/100")


VALUES = st.binary(max_size=30).filter(lambda value: not {0, 10} & set(value))
NAMES = st.sampled_from([field.encode() for field in PolicyRequest._fields[:-1]] + [b"helo_name", b"", b"x"])
WELL_FORMED = st.builds(
    lambda attributes, count: HEAD
    + b"".join(name + b"=" + value + b"\n" for name, value in attributes)
    + b"recipient_count=%d\n\n" % count,
    st.lists(st.tuples(NAMES, VALUES), max_size=5),
    st.integers(0, 999_999),
)
# Pieces of requests, so that chance gets further than the first line.
PIECES = [HEAD, b"recipient_count=", b"sasl_username=", b"=", b"\n", b"\n\n", b"\0", b"\xff", b"12", b"x="]
ANYTHING = st.lists(WELL_FORMED | st.sampled_from(PIECES) | st.binary(max_size=20), max_size=6).map(b"".join)


@given(ANYTHING)
def test_any_bytes_are_a_request_or_none_or_a_protocol_error(data: bytes) -> None:
    try:
        request = parse(data)
    except ProtocolError:
        return
    if request is not None:
        assert 0 <= request.recipient_count <= 999_999
        assert HEAD in data


@given(st.lists(WELL_FORMED, max_size=3).map(b"".join) | ANYTHING, st.lists(st.integers(0, 400), max_size=30))
def test_requests_split_anywhere_are_the_same(data: bytes, cuts: list[int]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a packet is read alone
    with ours, theirs:
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)]):
            if data[begin:end]:
                ours.sendall(data[begin:end])
        ours.close()
        reader = io.BufferedReader(RequestStream(theirs))
        assert parse_all(reader.readline) == parse_all(io.BytesIO(data).readline)


@given(ANYTHING)
def test_any_bytes_get_their_answers_and_then_the_end(daemon: Policyd, data: bytes) -> None:
    """As many answers as there are requests before the mistake or the end; the daemon itself outlives it."""
    requests = [request for request in parse_all(io.BytesIO(data).readline) if isinstance(request, PolicyRequest)]
    with daemon.connect() as connection:
        answers = send_and_end(connection, data)
    assert answers.count(b"\n\n") == answers.count(b"action=") == len(requests)
    assert daemon.process.poll() is None


# ---- what a request says --------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\n"))
REQUESTS_OF_ANY_TEXT = st.builds(PolicyRequest, *[TEXT] * 7, st.integers(0, 999_999))


@given(REQUESTS_OF_ANY_TEXT)
def test_what_is_sent_is_what_is_read(request_sent: PolicyRequest) -> None:
    lines = "".join(f"{name}={value}\n" for name, value in request_sent._asdict().items())
    assert parse(HEAD + lines.encode() + b"\n") == request_sent


@given(st.binary().filter(lambda value: not {0, 10} & set(value)))
def test_a_value_of_any_bytes_is_read(value: bytes) -> None:
    request = parse(HEAD + b"sender=" + value + b"\n\n")
    assert request
    assert request.sender == value.decode("utf-8", "backslashreplace")


def test_a_value_that_is_not_utf8_is_counted_and_logged_escaped(daemon: Policyd) -> None:
    with daemon.connect() as connection:
        connection.sendall(HEAD + b"sasl_username=latin\xe9\nsender=\xff\xfe@x\nrecipient_count=1\n\n")
        assert read_answer(connection) == "DUNNO"
    daemon.wait_for_log(r"Updating db: latin\xe9/\xff\xfe@x//1/1")


def test_a_line_is_split_at_its_first_equals_sign() -> None:
    request = parse(HEAD + b"sender=a=b==@example.org\n=nameless\n\n")
    assert request
    assert request.sender == "a=b==@example.org"


def test_of_an_attribute_given_twice_the_last_one_counts() -> None:
    request = parse(HEAD + b"recipient_count=1\nrecipient_count=2\nsender=a\nsender=\n\n")
    assert request
    assert (request.recipient_count, request.sender) == (2, "")


def test_attributes_may_come_in_any_order_and_unknown_ones_are_ignored() -> None:
    request = parse(b"recipient_count=000012\nfuture_attribute=1\nsasl_username=anna\n" + HEAD + b"\n")
    assert request == PolicyRequest("", "", "", "anna", "", "", "", 12)


def test_without_a_recipient_count_nothing_is_counted_and_the_log_says_so_once(policyd: Start) -> None:
    daemon = policyd(defaultquota=1)
    request = HEAD + b"protocol_state=MAIL\ninstance=1.2.3\nsasl_username=anna\nsender=anna@x\n\n"
    with daemon.connect() as connection:
        for _ in range(3):
            connection.sendall(request)
            assert read_answer(connection) == "DUNNO"
    _, *lines = daemon.lines_so_far()
    assert [(line.level, line.text) for line in lines] == [(
        "warning",
        "recipient_count is 0 at protocol_state MAIL: nothing is counted;"
        " in main.cf, call policyd from smtpd_end_of_data_restrictions",
    )]


def test_a_complaint_comes_again_after_a_minute_and_not_before() -> None:
    complaint = OnceAMinute()
    assert [complaint.due(now) for now in (100.0, 100.1, 159.9, 160.0, 219.9, 500.0)] == [
        True, False, False, True, False, True
    ]


# ---- mistakes -------------------------------------------------------------------------------------

LONGEST_LINE = b"x=" + b"y" * 8190
# The longest request: its lines, newlines included; the empty one at the end is not among them.
LONGEST_REQUEST = HEAD + b"x=12345\n" * ((65536 - len(HEAD)) // 8) + b"x=1\n"

MALFORMED = {
    "no request": (b"recipient_count=1\n\n", "no request=smtpd_access_policy"),
    "nothing": (b"\n", "no request=smtpd_access_policy"),
    "another request": (b"request=junk\nrecipient_count=1\n\n", "no request=smtpd_access_policy"),
    "NUL": (HEAD + b"sender=a\0b\n\n", "a NUL byte"),
    "no equals sign": (HEAD + b"sender\n\n", "a line without '='"),
    "count of 7 digits": (HEAD + b"recipient_count=1000000\n\n", "recipient_count=1000000 is not 1 to 6 digits"),
    "no count": (HEAD + b"recipient_count=\n\n", "recipient_count= is not 1 to 6 digits"),
    "negative count": (HEAD + b"recipient_count=-1\n\n", "recipient_count=-1 is not 1 to 6 digits"),
    "signed count": (HEAD + b"recipient_count=+1\n\n", "recipient_count=+1 is not 1 to 6 digits"),
    "broken count": (HEAD + b"recipient_count=1.5\n\n", "recipient_count=1.5 is not 1 to 6 digits"),
    "arabic count": (
        HEAD + b"recipient_count=\xd9\xa3\n\n", "recipient_count=\\u0663 is not 1 to 6 digits"
    ),
    "superscript count": (HEAD + b"recipient_count=\xc2\xb2\n\n", "recipient_count=\\xb2 is not 1 to 6 digits"),
    "endless count": (
        HEAD + b"recipient_count=" + b"1" * 5000 + b"\n\n", f"recipient_count={'1' * 80} is not 1 to 6 digits"
    ),
    "long line": (HEAD + LONGEST_LINE + b"y\n\n", "a line longer than 8192 bytes"),
    "endless line": (b"x" * 1_000_000, "a line longer than 8192 bytes"),
    "long request": (LONGEST_REQUEST + b"x=\n\n", "a request longer than 65536 bytes"),
    "endless request": (LONGEST_REQUEST * 10, "a request longer than 65536 bytes"),
    "HTTP": (b"GET / HTTP/1.0\n\n", "a line without '='"),
    "a request with a mistake behind it": (request_bytes(sasl_username="") + b"junk\n\n", "a line without '='"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_is_hung_up_on_with_one_warning(daemon: Policyd, kind: str) -> None:
    """Without an answer, as the Postfix documentation asks; the others never notice."""
    data, reason = MALFORMED[kind]
    before = [b"action=DUNNO\n\n"] if "behind" in kind else []
    with daemon.connect() as other, peer_of(daemon) as (connection, address):
        with contextlib.suppress(ConnectionError):  # it hangs up where the mistake is
            connection.sendall(data)
        assert read_to_end(connection) == b"".join(before)
        other.sendall(request_bytes(sasl_username="other"))
        assert read_answer(other) == "DUNNO"
    lines = [(line.level, line.text) for line in daemon.lines_so_far() if address in line.text]
    assert lines == [("warning", f"bad request from {address}: {reason}; hung up")]


def test_a_line_of_8192_bytes_is_accepted(daemon: Policyd) -> None:
    assert parse(HEAD + LONGEST_LINE + b"\n\n")
    with daemon.connect() as connection:
        connection.sendall(HEAD + LONGEST_LINE + b"\n\n")
        assert read_answer(connection) == "DUNNO"


def test_a_request_of_64_kib_is_accepted(daemon: Policyd) -> None:
    assert len(LONGEST_REQUEST) == 65536
    assert parse(LONGEST_REQUEST + b"\n")
    with daemon.connect() as connection:
        connection.sendall(LONGEST_REQUEST + b"\n")
        assert read_answer(connection) == "DUNNO"


@pytest.mark.parametrize("missing", [1, 2, 10, 300])
def test_a_request_that_ends_early_is_neither_answered_nor_counted_nor_logged(daemon: Policyd, missing: int) -> None:
    login = f"early{missing}"
    with peer_of(daemon) as (connection, address):
        assert send_and_end(connection, request_bytes(sasl_username=login, sender=address)[:-missing]) == b""
    assert [line.text for line in daemon.lines_so_far() if address in line.text or login in line.text] == []
    daemon.ask(sasl_username=login)
    daemon.wait_for_log(f"Updating db: {login}/alice@example.org/192.0.2.1/1/1")


def test_a_client_that_leaves_before_its_answer_is_no_news(daemon: Policyd) -> None:
    """Its message was asked about in full, and counts."""
    with peer_of(daemon) as (connection, address):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
        connection.sendall(request_bytes(sasl_username="leaver") * 2)
    daemon.wait_for_log("Updating db: leaver/alice@example.org/192.0.2.1/1/1")
    assert [line.text for line in daemon.lines_so_far() if address in line.text] == []


# ---- time limits ----------------------------------------------------------------------------------


def receive_timeout_s(connection: socket.socket) -> float:
    """Return how long the kernel lets a read of this socket wait."""
    seconds, microseconds = struct.unpack("@ll", connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
    return float(seconds + microseconds / 1e6)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's socket and ours; each packet of the client's is read alone."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        yield theirs, ours


def test_an_idle_connection_waits_longer_than_postfix_does(pair: tuple[socket.socket, socket.socket]) -> None:
    """Postfix hangs up after 1000 s (smtpd_policy_service_max_ttl); if we did first, its next request would fail."""
    RequestStream(pair[1])
    assert receive_timeout_s(pair[1]) == pytest.approx(1015, abs=0.1)


def test_a_request_has_30_s_however_it_dribbles(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Each look at the clock is a second later than the one before, and each byte a packet of its own."""
    theirs, ours = pair
    seconds = itertools.count(1000)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: float(next(seconds))))
    for _ in range(100):
        theirs.sendall(b"x")
    stream = RequestStream(ours)
    stream.begin()
    with pytest.raises(TimeoutError):
        read_request(io.BufferedReader(stream).readline)
    assert next(seconds) == 1000 + 30 + 1
    assert stream.in_request


def test_the_next_request_has_its_own_30_s(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    theirs, ours = pair
    now = [1000.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    stream = RequestStream(ours)
    for _ in range(3):
        stream.begin()
        now[0] += 29
        theirs.sendall(b"x")
        assert stream.read(1) == b"x"
        stream.end()
        assert not stream.in_request
        assert receive_timeout_s(ours) == pytest.approx(1015, abs=0.1)


class Nobody:
    """Stands where the recorder is, in tests that record nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[module.PolicyServer]:
    """A server in this process, whose log goes to stderr."""
    monkeypatch.setattr(module, "log", module.Log())
    module.log.start(to_stderr=True)
    policy = module.Policy(module.Settings(), Nobody())  # type: ignore[arg-type]
    with module.PolicyServer("127.0.0.1", 0, policy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    module.log.stop()


@pytest.mark.parametrize(
    ("limit", "begun", "lines"),
    [
        ("IDLE_TIMEOUT_S", b"", []),
        ("REQUEST_TIMEOUT_S", HEAD + b"sender", ["incomplete request from 127.0.0.1 after 0.2 s; hung up"]),
    ],
    ids=["idle", "in a request"],
)
def test_a_silent_client_is_hung_up_on(
    server: module.PolicyServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    limit: str,
    begun: bytes,
    lines: list[str],
) -> None:
    """With a warning if it had begun a request; an idle one is no news."""
    monkeypatch.setattr(module, limit, 0.2)
    with socket.create_connection(server.server_address[:2], 20) as connection:
        connection.sendall(begun)
        assert read_to_end(connection) == b""
    module.log.stop()
    assert [line.partition(": ")[2] for line in capfd.readouterr().err.splitlines()] == lines


def test_an_answer_is_sent_at_once(server: module.PolicyServer) -> None:
    """The kernel does not keep it back in the hope of more."""
    with socket.create_connection(server.server_address[:2], 20) as connection:
        connection.sendall(request_bytes(sasl_username=""))
        assert read_answer(connection) == "DUNNO"
        (ours,) = server.connections
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_does_not_read_its_answers_is_hung_up_on(daemon: Policyd) -> None:
    """Nobody waits for it: not the thread that counts for all."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", daemon.port))
        with pytest.raises(ConnectionError):  # without the hang-up: a time-out, once all buffers are full
            send_for_ever(connection, request_bytes(sasl_username="") * 1000)
    assert daemon.ask(sasl_username="reader") == "DUNNO"
