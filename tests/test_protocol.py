"""What Postfix may send, in whatever pieces, and what nobody may: SMTPD_POLICY_README on the wire."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import hypothesis.strategies as st
import pytest
from asking import Unrecorded, complaints
from hypothesis import given
from servers import DUNNO, HOLD, REJECT, Policyd, policyd_factory, read_answer, read_to_end, request_bytes
from stores import KeptLog

import policyd as module
from policyd import Policy, PolicyRequest, PolicyServer, ProtocolError, Settings, requests

REQUESTS = Path(__file__).parent / "requests"
Start = Callable[..., Policyd]

HEAD = b"request=smtpd_access_policy\n"
_numbers = itertools.count(1)


class Wire:
    """A connection on which these pieces arrive, each a second after the one before it."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.limits: list[float] = []  # how long each of its reads may wait
        self.now = 1000.0

    def settimeout(self, seconds: float) -> None:
        self._limit = seconds

    def recv(self, size: int) -> bytes:
        self.limits.append(self._limit)
        self.now += min(1.0, self._limit)
        if self._limit < 1:
            raise socket.timeout
        if not self._pieces:
            return b""
        piece = self._pieces.pop(0)
        if piece[size:]:
            self._pieces.insert(0, piece[size:])
        return piece[:size]


def parse(*pieces: bytes) -> list[PolicyRequest | str]:
    """Return the requests until the end, or until a mistake, which comes last as a text."""
    found: list[PolicyRequest | str] = []
    try:
        found.extend(requests(Wire(*pieces)))  # type: ignore[arg-type]
    except ProtocolError as error:
        found.append(str(error))
    return found


def parse_one(data: bytes) -> PolicyRequest:
    (request,) = parse(data)
    assert isinstance(request, PolicyRequest), request
    return request


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


# ---- recorded requests ----------------------------------------------------------------------------

END, TO, ALICE, HERE = "END-OF-MESSAGE", "rcpt1@example.net", "alice@example.org", "127.0.0.1"
WHO = "for user alice using alice@example.org from ip"
RECORDED = [  # in the order of a day: the file, what it says, the answer, what is logged
    ("rcpt-three-recipients", ("RCPT", "4ad6.6b029793.ea86c.0", "", "alice", ALICE, HERE, TO, 0), DUNNO,
     ["recipient_count is 0 at protocol_state RCPT: nothing is counted;"
      " in main.cf, call policyd from smtpd_end_of_data_restrictions"]),
    ("data-three-recipients", ("DATA", "4ad6.6b029793.ea86c.0", "EB9C920E042", "alice", ALICE, HERE, "", 3), DUNNO,
     ["Updating db: alice/alice@example.org/127.0.0.1/3/3"]),
    ("end-of-message-three-recipients", (END, "4ad6.6b029793.ea86c.0", "EB9C920E042", "alice", ALICE, HERE, "", 3),
     DUNNO, []),  # the same message as the one before
    ("end-of-message-one-recipient", (END, "4ad6.6b029793.e8713.0", "E9E6720E5F5", "alice", ALICE, HERE, TO, 1), DUNNO,
     ["Updating db: alice/alice@example.org/127.0.0.1/1/4"]),
    ("end-of-message-login-with-domain-and-capitals",
     (END, "4ad6.6b029793.ee694.0", "EE7A920E042", "Alice@EXAMPLE.ORG", "Alice@Example.ORG", HERE, TO, 1), DUNNO,
     ["Updating db: alice/alice@example.org/127.0.0.1/1/5"]),
    ("end-of-message-null-sender", (END, "4ad6.6b029793.ecedc.0", "ED0DA20E5F5", "alice", "", HERE, TO, 1), DUNNO,
     ["Updating db: alice//127.0.0.1/1/6"]),
    ("end-of-message-unauthenticated",
     (END, "4ad6.6b029793.edb0e.0", "EDCD120E042", "", "someone@example.org", HERE, TO, 1), DUNNO, []),
    ("end-of-message-quoted-sender",
     (END, "4ad6.6b029793.ef234.0", "EF35620E042", "alice", "o'brien \"x\" y=z@example.org", HERE, TO, 1), DUNNO,
     ["Updating db: alice/o'brien \"x\" y=z@example.org/127.0.0.1/1/7"]),
    ("end-of-message-smtputf8-sender",
     (END, "4ad6.6b029793.efc9e.0", "EFDDE20E042", "alice", "jos\xe9@\u4f8b\u3048.example.org", HERE, TO, 1), DUNNO,
     [r"Updating db: alice/jos\xe9@\u4f8b\u3048.example.org/127.0.0.1/1/8"]),
    ("end-of-message-starttls-two-recipients",
     (END, "4ad6.6b029793.f13ee.0", "F150E20E042", "alice", ALICE, HERE, "", 2), HOLD,
     ["Updating db: alice/alice@example.org/127.0.0.1/2/10",
      f"DEFERRING overquota (10>10) {WHO} [127.0.0.1], queue_id=F150E20E042"]),
    ("end-of-message-unnamed-client",
     (END, "4ae3.6b029793.f3a4a.0", "F3BAC20E5F5", "alice", ALICE, "127.0.0.9", TO, 1), HOLD,
     ["Updating db: alice/alice@example.org/127.0.0.9/1/11",
      f"DEFERRING overquota (11>10) {WHO} [127.0.0.9], queue_id=F3BAC20E5F5"]),
]  # fmt: skip


def test_the_recorded_requests_say_what_postfix_meant_and_get_the_right_answers(policyd: Start) -> None:
    """On one connection, each with its answer and its lines in the log; cut off anywhere it is none."""
    assert sorted(file.stem for file in REQUESTS.glob("*.txt")) == sorted(name for name, _, _, _ in RECORDED)
    daemon = policyd(defaultquota=10)
    with daemon.connect() as connection:
        for name, meant, answer, _ in RECORDED:
            sent = (REQUESTS / f"{name}.txt").read_bytes()
            assert parse(sent) == [PolicyRequest(*meant)]
            assert [parse(sent[:cut]) for cut in range(len(sent))] == [[]] * len(sent)
            connection.sendall(sent)
            assert (name, read_answer(connection)) == (name, answer)
    assert [line.text for line in daemon.lines_so_far()[1:]] == [line for _, _, _, lines in RECORDED for line in lines]


# ---- split and glued ------------------------------------------------------------------------------


def test_any_number_of_requests_on_a_connection_are_answered_in_their_order(daemon: Policyd) -> None:
    """All in one piece, those that go to the store and those that do not in turn; or byte by byte."""
    logins = ["glued", "glued", "", "glued", "glued"]
    glued = b"".join(request_bytes(sasl_username=login, recipient_count=count)
                     for login, count in zip(logins, (1, 1499, 1, 1500, 0)))  # fmt: skip
    with daemon.connect() as connection:
        connection.sendall(glued)
        assert [read_answer(connection) for _ in logins] == [DUNNO, HOLD, DUNNO, REJECT, DUNNO]
        for _ in range(100):
            connection.sendall(request_bytes(sasl_username="many"))
            assert read_answer(connection) == DUNNO
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request_bytes(sasl_username="many"):
            connection.sendall(bytes([byte]))
        assert read_answer(connection) == DUNNO
    daemon.wait_for_log("Updating db: many/alice@example.org/192.0.2.1/1/101")


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
def test_any_bytes_are_requests_or_none_or_a_protocol_error(data: bytes) -> None:
    for request in parse(data):
        if isinstance(request, PolicyRequest):
            assert 0 <= request.recipient_count <= 999_999
            assert HEAD in data


@given(st.lists(WELL_FORMED, max_size=3).map(b"".join) | ANYTHING, st.lists(st.integers(0, 400), max_size=30))
def test_requests_split_anywhere_are_the_same(data: bytes, cuts: list[int]) -> None:
    """Where there are several mistakes in one request, another one may be named."""
    whole = parse(data)
    split = parse(*(data[begin:end] for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)])))
    assert split[: len(whole)] == whole or (split[:-1] == whole[:-1] and isinstance(split[-1], str))
    assert len(split) - len(whole) in (0, int(split[-1:] != whole[-1:]))


@given(ANYTHING)
def test_any_bytes_get_their_answers_and_then_the_end(daemon: Policyd, data: bytes) -> None:
    """As many answers as there are requests before the mistake or the end; the daemon itself outlives it."""
    with daemon.connect() as connection:
        answers = send_and_end(connection, data)
    number = sum(isinstance(request, PolicyRequest) for request in parse(data))
    assert answers.count(b"\n\n") == answers.count(b"action=") == number
    assert daemon.process.poll() is None


# ---- what a request says --------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\n"))


@given(st.builds(PolicyRequest, *[TEXT] * 7, st.integers(0, 999_999)))
def test_what_is_sent_is_what_is_read(request_sent: PolicyRequest) -> None:
    lines = "".join(f"{name}={value}\n" for name, value in request_sent._asdict().items())
    assert parse(HEAD + lines.encode() + b"\n") == [request_sent]


@given(st.binary().filter(lambda value: not {0, 10} & set(value)))
def test_a_value_of_any_bytes_is_read(value: bytes) -> None:
    """As what it is in UTF-8, and as something if it is not UTF-8."""
    sender = parse_one(HEAD + b"sender=" + value + b"\n\n").sender
    with contextlib.suppress(UnicodeDecodeError):
        assert sender == value.decode()
    assert bool(sender) == bool(value)


def test_a_value_that_is_not_utf8_is_counted_and_logged_escaped(daemon: Policyd) -> None:
    with daemon.connect() as connection:
        connection.sendall(HEAD + b"sasl_username=latin\xe9\nsender=\xff\xfe@x\nrecipient_count=1\n\n")
        assert read_answer(connection) == DUNNO
    daemon.wait_for_log(r"Updating db: latin\xe9/\xff\xfe@x//1/1")


def test_a_line_is_split_at_its_first_equals_sign_and_of_two_of_a_name_the_last_one_counts() -> None:
    """They may come in any order, and unknown ones are ignored."""
    request = parse_one(
        b"recipient_count=1\nfuture=1\nsender=a\nrecipient_count=000012\nsasl_username=anna\n" + HEAD
        + b"recipient=x\nsender=a=b==@example.org\n=nameless\nrecipient=\n\n"
    )  # fmt: skip
    assert request == PolicyRequest("", "", "", "anna", "a=b==@example.org", "", "", 12)


def test_without_a_recipient_count_nothing_is_counted_and_the_log_says_so_once(policyd: Start) -> None:
    daemon = policyd(defaultquota=1)
    request = HEAD + b"protocol_state=MAIL\ninstance=1.2.3\nsasl_username=anna\nsender=anna@x\n\n"
    with daemon.connect() as connection:
        for _ in range(3):
            connection.sendall(request)
            assert read_answer(connection) == DUNNO
    assert complaints(daemon) == [
        "recipient_count is 0 at protocol_state MAIL: nothing is counted;"
        " in main.cf, call policyd from smtpd_end_of_data_restrictions"
    ]


# ---- mistakes -------------------------------------------------------------------------------------

LONGEST_LINE = b"x=" + b"y" * 8190
# The longest request: its lines, newlines included; the empty one at the end is not among them.
LONGEST_REQUEST = HEAD + b"x=12345\n" * ((65536 - len(HEAD)) // 8) + b"x=1\n"
NO_DIGITS = "is not 1 to 6 digits"

MALFORMED = {
    "no request": (b"recipient_count=1\n\n", "no request=smtpd_access_policy"),
    "nothing": (b"\n\n", "a line without '='"),
    "another request": (b"request=junk\nrecipient_count=1\n\n", "no request=smtpd_access_policy"),
    "NUL": (HEAD + b"sender=a\0b\n\n", "a NUL byte"),
    "no equals sign": (HEAD + b"sender\n\n", "a line without '='"),
    **{
        f"count {count[:9]}": (HEAD + f"recipient_count={count}\n\n".encode(), f"recipient_count={shown} {NO_DIGITS}")
        for count, shown in [("1" * 5000, "1" * 80), ("\u0663", "\\u0663"), ("\xb2", "\\xb2"),
                             *((count, count) for count in ("1000000", "", "-1", "+1", "1.5", "1_0"))]
    },
    "long line": (HEAD + LONGEST_LINE + b"y\n\n", "a line longer than 8192 bytes"),
    "endless line": (b"x" * 1_000_000, "a line longer than 8192 bytes"),
    "long request": (LONGEST_REQUEST + b"x=\n\n", "a request longer than 65536 bytes"),
    "endless request": (LONGEST_REQUEST * 10, "a request longer than 65536 bytes"),
    "HTTP": (b"GET / HTTP/1.0\r\nHost: x\r\n\r\n", "a line without '='"),
    "a request with a mistake behind it": (request_bytes(sasl_username="") + b"junk\n\n", "a line without '='"),
}  # fmt: skip


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
        assert read_answer(other) == DUNNO
    lines = [(line.level, line.text) for line in daemon.lines_so_far() if address in line.text]
    assert lines == [("warning", f"bad request from {address}: {reason}; hung up")]


def test_500_health_checks_that_speak_http_are_one_warning_and_their_number(policyd: Start) -> None:
    """One a minute and peer: the last seconds of it are not waited for here."""
    daemon = policyd()
    for n in range(500):
        with socket.create_connection(("127.0.0.1", daemon.port), 20, (f"127.0.0.{1 + n % 2}", 0)) as connection:
            assert send_and_end(connection, b"GET /health HTTP/1.1\r\nHost: relay\r\n\r\n") == b""
    warned = [f"bad request from 127.0.0.{n}: a line without '='; hung up" for n in (1, 2)]
    assert sorted(complaints(daemon)) == warned


def test_a_complaint_comes_at_once_and_then_once_a_minute_with_the_number(logged: KeptLog) -> None:
    """As long as there is something to complain of; of each topic by itself."""
    for _ in range(500):
        logged.complain("one", "what")
    logged.complain("another", "other")
    assert [line.text for line in logged.lines] == ["what", "other"]
    start = module.time.monotonic()
    for seconds, said in [(0, []), (50, []), (61, ["what (499 more like this within a minute)"]), (70, [])]:
        logged.lines.clear()
        logged.tick(start + seconds)
        assert [(line.level, line.text) for line in logged.lines] == [("warning", text) for text in said]
    logged.lines.clear()
    logged.tick(start + 300)
    for _ in range(3):
        logged.complain("another", "other")
    assert [line.text for line in logged.lines] == ["other"], "again at once after a quiet time"


@pytest.mark.parametrize("longest", [HEAD + LONGEST_LINE + b"\n", LONGEST_REQUEST], ids=["line", "request"])
def test_a_line_of_8_and_a_request_of_64_kib_are_accepted(daemon: Policyd, longest: bytes) -> None:
    assert len(LONGEST_REQUEST) == 65536
    assert parse_one(longest + b"\n")
    with daemon.connect() as connection:
        connection.sendall(longest + b"\n")
        assert read_answer(connection) == DUNNO


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


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Wire]:
    """A function that makes a Wire whose seconds are those of the reader's clock."""

    def make(*pieces: bytes) -> Wire:
        new = Wire(*pieces)
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: new.now))
        return new

    return make


def test_an_idle_connection_waits_longer_than_postfix_does(wire: Callable[..., Wire]) -> None:
    """Postfix hangs up after 1000 s (smtpd_policy_service_max_ttl); if we did first, its next request would fail."""
    idle: Any = wire(request_bytes(), request_bytes()[:9], request_bytes()[9:], request_bytes())
    assert len([*requests(idle)]) == 4 - 1
    assert [limit for limit in idle.limits if limit > 30] == [1015] * 4


def test_a_request_has_30_s_however_it_dribbles_and_the_next_one_its_own(wire: Callable[..., Wire]) -> None:
    dribble = [*(b"%c" % byte for byte in HEAD), b"\n"]
    assert len(dribble) < 30
    slow: Any = wire(*dribble * 5, *[b"x"] * 100)
    answered: list[float] = []
    with pytest.raises(ProtocolError, match="incomplete after 30 s"):
        answered.extend(slow.now for _ in requests(slow))
    assert slow.now - answered[-1] == pytest.approx(31, abs=1.1)  # the first byte begins it


@pytest.fixture
def server() -> Iterator[PolicyServer]:
    """A server in this process, behind which nothing is recorded."""
    with PolicyServer("127.0.0.1", 0, Policy(Settings(), Unrecorded(), lambda _: None)) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("limit", "begun", "lines"),
    [
        ("IDLE_TIMEOUT_S", b"", []),
        ("REQUEST_TIMEOUT_S", HEAD + b"sender", ["bad request from 127.0.0.1: incomplete after 0.2 s; hung up"]),
    ],
    ids=["idle", "in a request"],
)
def test_a_silent_client_is_hung_up_on(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch, logged: KeptLog, limit: str, begun: bytes, lines: list[str]
) -> None:
    """With a warning if it had begun a request; an idle one is no news."""
    monkeypatch.setattr(module, limit, 0.2)
    with socket.create_connection(server.server_address[:2], 20) as connection:
        connection.sendall(begun)
        assert read_to_end(connection) == b""
    assert [line.text for line in logged.lines] == lines


def test_an_answer_is_sent_at_once(server: PolicyServer) -> None:
    """The kernel does not keep it back in the hope of more."""
    with socket.create_connection(server.server_address[:2], 20) as connection:
        connection.sendall(request_bytes(sasl_username=""))
        assert read_answer(connection) == DUNNO
        (ours,) = server.connections
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_does_not_read_its_answers_is_hung_up_on(daemon: Policyd) -> None:
    """Nobody waits for it: not the thread that counts for all."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", daemon.port))
        with contextlib.suppress(ConnectionError):  # without the hang-up: a time-out, once all buffers are full
            while True:
                connection.sendall(request_bytes(sasl_username="") * 1000)
    assert daemon.ask(sasl_username="reader") == DUNNO
