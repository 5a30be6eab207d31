"""SMTPD_POLICY_README on the wire: what Postfix may send, in whatever pieces and again, and what nobody may."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable
from unittest.mock import Mock

import hypothesis.strategies as st
import pytest
from asking import Load, Relay, a_request, complaints, reload
from hypothesis import given
from servers import DUNNO, HOLD, REJECT, Connection, Policyd, Start, policyd_factory, request_bytes, wait_until
from stores import KeptLog, Store, on_stores, total

import policyd as module
from policyd import Event, Policy, PolicyRequest, PolicyServer, ProtocolError, Recorder, Settings, Usage, requests

REQUESTS = Path(__file__).parent / "requests"
HEAD = b"request=smtpd_access_policy\n"
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\n"))
MEMORY_MB = 150


class Wire:
    """A connection on which these pieces arrive, each a second after the one before it."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.limits: list[float] = []  # how long each of its reads may wait
        self.now = 1000.0

    timeval = "=qq"  # as the kernel has it

    def getsockopt(self, level: int, option: int, most: int) -> bytes:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_RCVTIMEO)
        return bytes(struct.calcsize(self.timeval))

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        seconds, microseconds = struct.unpack(self.timeval, value)  # the kernel takes no other size either
        self._limit = seconds + microseconds / 1e6

    def recv(self, size: int) -> bytes:
        self.limits.append(self._limit)
        self.now += min(1.0, self._limit)
        if self._limit < 1:
            raise BlockingIOError
        piece = self._pieces.pop(0) if self._pieces else b""
        self._pieces[:0] = [piece[size:]] * bool(piece[size:])
        return piece[:size]


def parse(*pieces: bytes) -> list[PolicyRequest | str]:
    """Return the requests until the end, or until a mistake, which comes last as a text."""
    found: list[PolicyRequest | str] = []
    try:
        found.extend(requests(Wire(*pieces)))  # type: ignore[arg-type]
    except ProtocolError as error:
        found.append(str(error))
    return found


@pytest.fixture(scope="module")
def daemon() -> Iterator[Policyd]:
    """One daemon for all tests that tell their own log lines from those of others."""
    with policyd_factory() as start:
        yield start(bind="0.0.0.0")


END, TO, ALICE, HERE = "END-OF-MESSAGE", "rcpt1@example.net", "alice@example.org", "127.0.0.1"
MISPLACED = ("recipient_count is 0 at protocol_state RCPT: nothing is counted;"
             " in main.cf, call policyd from smtpd_end_of_data_restrictions")  # fmt: skip
OVER = "DEFERRING overquota ({}>10) for user alice using alice@example.org from ip [{}], queue_id={}"
RECORDED = [  # in the order of a day: the file, what it says, the answer, what is logged: mostly "Updating db"
    ("rcpt-three-recipients", ("RCPT", "4ad6.6b029793.ea86c.0", "", "alice", ALICE, HERE, TO, 0), DUNNO, [MISPLACED]),
    ("data-three-recipients", ("DATA", "4ad6.6b029793.ea86c.0", "EB9C920E042", "alice", ALICE, HERE, "", 3), DUNNO,
     ["alice/alice@example.org/127.0.0.1/3/3"]),
    ("end-of-message-three-recipients", (END, "4ad6.6b029793.ea86c.0", "EB9C920E042", "alice", ALICE, HERE, "", 3),
     DUNNO, []),  # the same message as the one before
    ("end-of-message-one-recipient", (END, "4ad6.6b029793.e8713.0", "E9E6720E5F5", "alice", ALICE, HERE, TO, 1), DUNNO,
     ["alice/alice@example.org/127.0.0.1/1/4"]),
    ("end-of-message-login-with-domain-and-capitals", (END, "4ad6.6b029793.ee694.0", "EE7A920E042", "Alice@EXAMPLE.ORG",
     "Alice@Example.ORG", HERE, TO, 1), DUNNO, ["alice/alice@example.org/127.0.0.1/1/5"]),
    ("end-of-message-null-sender", (END, "4ad6.6b029793.ecedc.0", "ED0DA20E5F5", "alice", "", HERE, TO, 1), DUNNO,
     ["alice//127.0.0.1/1/6"]),
    ("end-of-message-unauthenticated", (END, "4ad6.6b029793.edb0e.0", "EDCD120E042", "", "someone@example.org", HERE,
     TO, 1), DUNNO, []),
    ("end-of-message-quoted-sender", (END, "4ad6.6b029793.ef234.0", "EF35620E042", "alice",
     "o'brien \"x\" y=z@example.org", HERE, TO, 1), DUNNO, ["alice/o'brien \"x\" y=z@example.org/127.0.0.1/1/7"]),
    ("end-of-message-smtputf8-sender", (END, "4ad6.6b029793.efc9e.0", "EFDDE20E042", "alice",
     "jos\xe9@\u4f8b\u3048.example.org", HERE, TO, 1), DUNNO,
     [r"alice/jos\xe9@\u4f8b\u3048.example.org/127.0.0.1/1/8"]),
    ("end-of-message-starttls-two-recipients", (END, "4ad6.6b029793.f13ee.0", "F150E20E042", "alice", ALICE, HERE, "",
     2), HOLD, ["alice/alice@example.org/127.0.0.1/2/10", OVER.format(10, HERE, "F150E20E042")]),
    ("end-of-message-unnamed-client", (END, "4ae3.6b029793.f3a4a.0", "F3BAC20E5F5", "alice", ALICE, "127.0.0.9", TO, 1),
     HOLD, ["alice/alice@example.org/127.0.0.9/1/11", OVER.format(11, "127.0.0.9", "F3BAC20E5F5")]),
]  # fmt: skip


def test_recorded_requests_say_what_postfix_meant_and_are_answered_right(policyd: Start) -> None:
    """On one connection, each with its answer and its lines in the log; cut off anywhere it is none.

    Asked about again, as Postfix does, they get the same; nothing more is counted or complained of.
    """
    assert sorted(file.stem for file in REQUESTS.glob("*.txt")) == sorted(name for name, _, _, _ in RECORDED)
    daemon = policyd(defaultquota=10)
    with daemon.connect() as connection:
        for name, meant, answer, _ in RECORDED * 2:
            sent = (REQUESTS / f"{name}.txt").read_bytes()
            assert parse(sent) == [PolicyRequest(*meant)]
            assert [parse(sent[:cut]) for cut in range(len(sent))] == [[]] * len(sent)
            connection.sendall(sent)
            assert (name, connection.answer()) == (name, answer)
    logged = [line.text.replace("Updating db: ", "") for line in daemon.lines_so_far()[1:]]
    assert logged == [line for _, _, _, lines in RECORDED for line in lines]


def test_any_number_of_requests_on_a_connection_are_answered_in_their_order(daemon: Policyd) -> None:
    """All in one piece, those that go to the store and those that do not in turn; or byte by byte.

    What is not UTF-8 is counted, and logged escaped.
    """
    glued = [("glued", 1, DUNNO), ("glued", 1499, HOLD), ("", 1, DUNNO), ("glued", 1500, REJECT), ("glued", 0, DUNNO)]
    with daemon.connect() as connection:
        connection.sendall(b"".join(request_bytes(sasl_username=who, recipient_count=count) for who, count, _ in glued))
        assert [connection.answer() for _ in glued] == [answer for _, _, answer in glued]
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HEAD + LONGEST_LINE + b"\nsasl_username=by\xe9\nsender=\xff\xfe@x\nrecipient_count=1\n\n":
            connection.sendall(bytes([byte]))
        assert connection.answer() == DUNNO
    daemon.wait_for_log(r"Updating db: by\xe9/\xff\xfe@x//1/1")


VALUES = st.binary(max_size=30).filter(lambda value: not {0, 10} & set(value))
NAMES = st.sampled_from([field.encode() for field in PolicyRequest._fields[:-1]] + [b"helo_name", b"", b"x"])
LINES = st.lists(st.builds(lambda name, value: name + b"=" + value + b"\n", NAMES, VALUES), max_size=5).map(b"".join)
WELL_FORMED = st.builds(
    lambda lines, count: HEAD + lines + b"recipient_count=%d\n\n" % count, LINES, st.integers(0, 999_999)
)
# Pieces of requests, so that chance gets further than the first line; and some as long as may be, and longer.
PIECES = [HEAD, b"recipient_count=", b"sasl_username=", b"=", b"\n", b"\n\n", b"\0", b"\xff", b"12", b"x=",
          *(file.read_bytes() for file in sorted(REQUESTS.glob("*.txt"))), b"\nx=1" * 16_000,
          *(b"x=" + b"y" * length + b"\n" for length in (8189, 8190, 8191))]  # fmt: skip
ANYTHING = st.lists(WELL_FORMED | st.sampled_from(PIECES) | st.binary(max_size=20), max_size=9).map(b"".join)
CUTS = st.lists(st.integers(0, 400) | st.integers(0, 100_000), max_size=30)


@given(ANYTHING, CUTS)
def test_any_bytes_are_requests_or_a_protocol_error_and_split_anywhere_the_same(data: bytes, cuts: list[int]) -> None:
    """Where there are several mistakes in one request, another one may be named.  To fuzz: profile `long`."""
    whole = parse(data)
    for request in whole:
        assert isinstance(request, str) or (HEAD in data and 0 <= request.recipient_count <= 999_999)
    split = parse(*(data[begin:end] for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)])))
    assert split[: len(whole)] == whole or (split[:-1] == whole[:-1] and isinstance(split[-1], str))
    assert len(split) - len(whole) in (0, int(split[-1:] != whole[-1:]))


@given(st.builds(PolicyRequest, *[TEXT] * 7, st.integers(0, 999_999)), VALUES)
def test_what_is_sent_is_what_is_read(request_sent: PolicyRequest, value: bytes) -> None:
    """And what is not UTF-8 is read as something."""
    lines = "".join(f"{name}={text}\n" for name, text in request_sent._asdict().items())
    read, other = parse(HEAD + lines.encode() + b"\n" + HEAD + b"sender=" + value + b"\n\n")
    assert (read, type(other)) == (request_sent, PolicyRequest)
    assert bool(other.sender) == bool(value)


def test_a_line_is_split_at_its_first_equals_sign_and_of_two_of_a_name_the_last_one_counts() -> None:
    """They may come in any order, unknown ones are ignored, and what is missing is empty, or 0."""
    data = b"recipient_count=1\nfuture=1\nsender=a\nrecipient_count=000012\nsasl_username=anna\n" + HEAD
    found = parse(data + b"recipient=x\nsender=a=b==@example.org\n=nameless\nrecipient=\n\n" + HEAD + b"\n")
    assert found == [PolicyRequest("", "", "", "anna", "a=b==@example.org", "", "", 12), PolicyRequest(*[""] * 7, 0)]


LONGEST_LINE = b"x=" + b"y" * 8190
# The longest request, but for the empty line at its end.
LONGEST_REQUEST = HEAD + b"x=12345\n" * ((65536 - len(HEAD)) // 8) + b"x=\n"
NO_DIGITS = "is not 1 to 6 digits"

MALFORMED = {
    "no request": (b"recipient_count=1\n\n", "no request=smtpd_access_policy"),
    "nothing": (b"\n\n", "a line without '='"),
    "another request": (b"request=junk\nrecipient_count=1\n\n", "no request=smtpd_access_policy"),
    "NUL": (HEAD + b"sender=a\0b\n\n", "a NUL byte"),
    "no equals sign": (HEAD + b"sender\n\n", "a line without '='"),
    "a health check": (b"GET /health HTTP/1.1\r\nHost: relay\r\n\r\n", "a line without '='"),
    "a health check with a query": (b"GET /?q=1 HTTP/1.1\r\nHost: relay\r\n\r\n", "a line without '='"),
    **{
        f"count {count[:9]}": (HEAD + f"recipient_count={count}\n\n".encode(), f"recipient_count={shown} {NO_DIGITS}")
        for count, shown in [("1" * 5000, "1" * 80), ("\u0663", "\\u0663"), ("\xb2", "\\xb2"),
                             ("'; DROP \\ %s%n \x1b]0;x\x07\r", r"'; DROP \\ %s%n \x1b]0;x\x07\r"),
                             *((count, count) for count in ("1000000", "", "-1", "+1", "1.5", "1_0"))]
    },
    "long line": (HEAD + LONGEST_LINE + b"y\n\n", "a line longer than 8192 bytes"),
    "long line without an end": (HEAD + LONGEST_LINE + b"y", "a line longer than 8192 bytes"),
    "long request": (LONGEST_REQUEST + b"x=\n\n", "a request longer than 65536 bytes"),
    "endless request": (LONGEST_REQUEST * 10, "a request longer than 65536 bytes"),
    "a request with a mistake behind it": (LONGEST_REQUEST + b"\njunk\n\n", "a line without '='"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_is_hung_up_on_with_one_warning(daemon: Policyd, kind: str) -> None:
    """Without an answer, as the Postfix documentation asks; one a minute and peer.  The others never notice."""
    assert len(LONGEST_REQUEST) == 65535
    data, reason = MALFORMED[kind]
    address = f"127.1.1.{100 + [*MALFORMED].index(kind)}"
    for _ in range(3):
        with daemon.connect() as other, daemon.connect(address) as connection:
            with contextlib.suppress(ConnectionError):  # it hangs up where the mistake is
                connection.sendall(data)
            assert connection.rest() == (b"action=DUNNO\n\n" if "behind" in kind else b"")
            assert other.ask(sasl_username="other") == DUNNO
    lines = [(line.level, line.text) for line in daemon.lines_so_far() if address in line.text]
    assert lines == [("warning", f"bad request from {address}: {reason}; hung up")]


def test_a_complaint_comes_at_once_and_then_once_a_minute_with_the_number(logged: KeptLog) -> None:
    """As long as there is something to complain of; of each topic by itself."""
    for topic, what in [("one", "what")] * 500 + [("another", "other")]:
        logged.complain(topic, what)
    assert [line.text for line in logged.lines] == ["what", "other"]
    start = module.time.monotonic()
    for seconds, said in [(0, []), (50, []), (61, ["what (499 more like this within a minute)"]), (70, []), (300, [])]:
        logged.lines.clear()
        logged.tick(start + seconds)
        assert [(line.level, line.text) for line in logged.lines] == [("warning", text) for text in said]
    for _ in range(3):
        logged.complain("another", "other")
    assert [line.text for line in logged.lines] == ["other"], "again at once after a quiet time"


def test_a_request_that_ends_early_is_no_news_and_one_whose_client_has_left_counts(daemon: Policyd) -> None:
    """It is neither answered nor counted nor logged; who has asked in full may leave before the answer."""
    for missing in (1, 2, 10, 300):
        with daemon.connect("127.1.3.1") as connection:
            connection.sendall(request_bytes(sasl_username="leaver")[:-missing])
            connection.shutdown(socket.SHUT_WR)
            assert connection.rest() == b""
    with daemon.connect("127.1.3.1") as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
        connection.sendall(request_bytes(sasl_username="leaver") * 2)
    daemon.wait_for_log("Updating db: leaver/alice@example.org/192.0.2.1/1/1")
    assert [line.text for line in daemon.lines_so_far() if "127.1.3.1" in line.text] == []


@pytest.mark.parametrize("timeval", ["=ii", "=qq"], ids=["32 bits", "64 bits, or 32 with times of 64"])
def test_a_request_has_30_s_however_it_dribbles_and_an_idle_connection_longer_than_postfix(
    monkeypatch: pytest.MonkeyPatch, timeval: str
) -> None:
    """Postfix hangs up after 1000 s (smtpd_policy_service_max_ttl); if we did first, its next request would fail."""
    monkeypatch.setattr(Wire, "timeval", timeval)
    wire, times = Wire(*[b"%c" % byte for byte in HEAD + b"\n"] * 5, *[b"x"] * 100), []
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: wire.now))
    with pytest.raises(ProtocolError, match="incomplete"):
        times.extend(wire.now for _ in requests(wire))  # type: ignore[arg-type]
    assert len(times) == 5, "each has 30 s of its own"
    assert wire.now - times[-1] == pytest.approx(31, abs=1.1), "the first byte begins it"
    assert [limit for limit in wire.limits if limit > 30] == [1015] * 6


@pytest.mark.parametrize("limit", ["IDLE_TIMEOUT_S", "REQUEST_TIMEOUT_S"])
def test_who_is_silent_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, logged: KeptLog, limit: str) -> None:
    """With a warning if it had begun a request; an idle one is no news.  Before that, an answer is sent at once."""
    monkeypatch.setattr(module, limit, 0.2)
    recorder: Any = types.SimpleNamespace(settings=Settings(), record=lambda *_: None)
    with PolicyServer("127.0.0.1", 0, Policy(recorder, lambda _: None)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with Connection(server.server_address[:2]) as connection:
            assert connection.ask(sasl_username="") == DUNNO
            for ours in [*server.connections]:  # the kernel does not keep it back in the hope of more
                assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            connection.sendall(HEAD if limit == "REQUEST_TIMEOUT_S" else b"")
            assert connection.rest() == b""
        server.shutdown()
        thread.join()
    said = ["bad request from 127.0.0.1: incomplete after 0.2 s; hung up"] * (limit == "REQUEST_TIMEOUT_S")
    assert [line.text for line in logged.lines] == said


@pytest.fixture
def relay(store: Store, logged: KeptLog) -> Relay:
    return Relay(store, logged, "defaultquota=3", "blacklist=listed")


@on_stores("SQLite")
def test_a_repetition_gets_the_same_answer_and_is_counted_and_logged_once(store: Store, relay: Relay) -> None:
    """Whatever the sum has become meanwhile, also before the store has it; without an instance nothing is one."""
    at_once = relay.ask_at_once([{"sasl_username": "carl", "instance": "1.2.2"}] * 3)
    assert at_once == [(DUNNO, ["Updating db: carl/alice@example.org/192.0.2.1/1/1"])] * 3, "of all together"
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
@on_stores("SQLite")
def test_a_message_is_its_peer_its_instance_and_its_recipient_count(
    store: Store, relay: Relay, again: dict[str, Any], counted: int
) -> None:
    for message in ({}, again):
        relay.ask("anna", **{"instance": "1.2.3", **message})
    assert total(store) == counted


def test_a_repetition_may_come_on_another_connection(policyd: Start, tmp_path: Path) -> None:
    """On a Unix socket all are of one relay."""
    request, counted = request_bytes(sasl_username="anna"), "Updating db: anna/alice@example.org/192.0.2.1/1/1"
    for daemon in (policyd(bind="127.0.0.1"), policyd(bind=tmp_path / "socket")):
        for _ in range(3):
            with daemon.connect() as connection:
                connection.sendall(request)
                assert connection.answer() == DUNNO
        assert [line.text for line in daemon.lines_so_far()[1:]] == [counted]


def test_the_last_10_000_answers_are_remembered() -> None:
    counted: list[str] = []
    replies: list[str] = []

    def record(event: Event, on_usage: Any) -> None:
        counted.extend([event.sasl_username] * (event.recipient_count is not None))
        on_usage(Usage(int(event.sasl_username) % 2))

    recorder: Any = types.SimpleNamespace(settings=Settings(defaultquota=1), record=record)
    policy = Policy(recorder, lambda _: None)
    asked = (*range(10_001), 1, 10_000, 0)
    for number in asked:
        policy.answer(a_request(sasl_username=number, instance=number), "127.0.0.1", replies.append)
    assert counted == [str(number) for number in (*range(10_001), 0)], "the oldest one makes room"
    assert replies == [(DUNNO, HOLD)[number % 2] for number in asked]


@pytest.mark.parametrize("usage", [None, "no usage"], ids=["in the recorder", "in the decision"])
def test_after_a_fault_of_ours_mail_flows_and_nobody_waits(logged: KeptLog, usage: Any) -> None:
    """Also a repetition is answered; and the fault is logged, or goes on to who logs it."""

    def record(event: Event, on_usage: Any) -> None:
        if usage is None:
            raise RuntimeError("a fault of ours")
        Recorder._call_back([(event, on_usage, 0.0)], [usage])

    recorder: Any = types.SimpleNamespace(settings=Settings(), record=record)
    policy = Policy(recorder, lambda _: None)
    replies: list[str] = []
    with pytest.raises(RuntimeError) if usage is None else contextlib.nullcontext():
        policy.answer(a_request(sasl_username="anna", instance="1.2.3"), "127.0.0.1", replies.append)
    assert replies == [DUNNO]
    assert len(logged.errors()) == (usage is not None)
    policy.answer(a_request(sasl_username="anna", instance="1.2.3"), "127.0.0.1", replies.append)
    assert replies == [DUNNO] * 2


def status_of(daemon: Policyd, name: str) -> int:
    """Return a number of /proc/PID/status: Threads, or VmHWM in kB."""
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return int(dict(line.split(":\t", 1) for line in lines)[name].split()[0])


def processor_s(daemon: Policyd) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_spinning(daemon: Policyd) -> bool:
    began = processor_s(daemon)
    time.sleep(0.5)
    return processor_s(daemon) - began > 0.2


def is_answered(daemon: Policyd) -> bool:
    with daemon.connect() as connection, contextlib.suppress(EOFError, ConnectionError):
        return connection.ask() == DUNNO
    return False


@contextlib.contextmanager
def connections(daemon: Policyd, number: int) -> Iterator[list[Connection]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(daemon.connect()) for _ in range(number)]


def three_hundred_at_once(daemon: Policyd) -> None:
    """While the daemon is busy elsewhere they wait in the kernel; all are answered then, and idle."""
    daemon.signal(signal.SIGSTOP)
    with connections(daemon, 300) as many:
        for connection in many:
            connection.sendall(request_bytes())
        daemon.signal(signal.SIGCONT)
        assert [connection.answer() for connection in many] == [DUNNO] * 300
        assert status_of(daemon, "Threads") >= 300


def requests_without_an_end(daemon: Policyd) -> None:
    """A line, and a million lines."""
    for data in (b"x=" + b"x" * 10_000_000, b"request=smtpd_access_policy\n" + b"x=y\n" * 1_000_000 + b"\n"):
        with daemon.connect() as connection:
            with contextlib.suppress(ConnectionError):  # it hangs up before all is sent
                connection.sendall(data)
            assert connection.rest() == b""


def reset_connections(daemon: Policyd) -> None:
    for sent in (b"", request_bytes()[:-1], request_bytes(), b"".join(request_bytes() for _ in range(20))):
        for _ in range(25):
            with daemon.connect() as connection:
                connection.sendall(sent)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # an error, no end


def clients_that_do_not_read(daemon: Policyd) -> None:
    """Nobody waits for them, not the thread that counts for all; who goes on asking is hung up on."""
    with connections(daemon, 4) as deaf, socket.socket() as deafest:
        for connection in deaf:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"".join(request_bytes(sasl_username="deaf") for _ in range(10_000)))
        deafest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deafest.settimeout(60)
        deafest.connect(("127.0.0.1", daemon.port))
        with contextlib.suppress(ConnectionError):  # once all buffers are full
            for _ in range(500):
                deafest.sendall(request_bytes(sasl_username="") * 1000)
            pytest.fail("nobody hangs up")
        assert is_answered(daemon)


def values_as_long_as_may_be(daemon: Policyd) -> None:
    """Of which we remember something.  With one wide character, each takes four bytes of memory."""
    request = request_bytes(sasl_username="listed", sender="x" * 8000)
    with daemon.connect() as connection:
        for number in range(4500):
            connection.sendall(request.replace(b"instance=", b"instance=%d\xf0\x9f\x92\xa9%s" % (number, b"x" * 8000)))
            assert connection.answer() == "HOLD blacklisted"


ATTACKS = [three_hundred_at_once, requests_without_an_end, reset_connections, clients_that_do_not_read,
           values_as_long_as_may_be]  # fmt: skip


def all_of_them_at_once(daemon: Policyd) -> None:
    with ThreadPoolExecutor(len(ATTACKS)) as threads:
        for attack in [threads.submit(attack, daemon) for attack in ATTACKS]:
            attack.result()


@pytest.fixture(scope="module")
def victim() -> Iterator[Policyd]:
    """One daemon for all attacks, which in the end has taken no more memory than it may, and stops as it should."""
    with policyd_factory() as start:
        daemon = start(defaultquota=1_000_000, blacklist="listed")
        yield daemon
        assert status_of(daemon, "VmHWM") < MEMORY_MB * 1024
        assert daemon.stop() == 0


@pytest.mark.parametrize("attack", [*ATTACKS, all_of_them_at_once], ids=lambda attack: attack.__name__)
def test_an_attack_costs_the_others_nothing(victim: Policyd, attack: Callable[[Policyd], None]) -> None:
    """Every answer comes, every message counts, memory stays small, and all threads go away again."""
    victim.hang_up()
    threads = status_of(victim, "Threads")
    honest = f"honest_{attack.__name__}"
    with Load([victim], 1, honest, pause_s=0.002) as load:
        attack(victim)
    assert {answer.action for answer in load.answers} == {DUNNO}
    wait_until(lambda: status_of(victim, "Threads") <= threads, f"the {threads} threads of before are left")
    assert victim.ask(sasl_username=honest, queue_id="") == DUNNO
    victim.wait_for_log(f"Updating db: {honest}/alice@example.org/192.0.2.1/1/{len(load.answers) + 1}")


def test_there_are_as_many_connections_as_the_settings_say(policyd: Start) -> None:
    """Also after SIGHUP.  One too many is closed at once, and the others never notice."""
    daemon = policyd(max_connections=3)
    with connections(daemon, 3) as first:
        assert [connection.ask() for connection in first] == [DUNNO] * 3
        assert [is_answered(daemon) for _ in range(5)] == [False] * 5
        daemon.write_settings(max_connections=5)
        reload(daemon)
        with connections(daemon, 2) as more:
            for fewer in (5, 2):
                daemon.write_settings(max_connections=fewer)
                reload(daemon)
                assert [connection.ask() for connection in first + more] == [DUNNO] * 5
                assert not is_answered(daemon)
        for _ in range(2):
            first.pop().close()
        wait_until(lambda: is_answered(daemon), "there is room for a second one")
        assert first[0].ask() == DUNNO
    wait_until(lambda: is_answered(daemon), "there is room again")
    assert complaints(daemon) == ["3 connections are open, as many as may be: closing new ones at once"]


def test_with_80_descriptors_it_neither_dies_nor_spins(policyd: Start) -> None:
    """What is open is served, at the price that it has without the crowd outside, and later there is room again."""
    daemon = policyd(mounts="ulimit -S -n 80", max_connections=1000)
    with connections(daemon, 80 - 64) as served:
        assert {connection.ask() for connection in served} == {DUNNO}
        began = processor_s(daemon)
        with connections(daemon, 200) as crowd:
            assert {connection.rest() for connection in crowd} == {b""}
        for _ in range(20):
            assert {connection.ask() for connection in served} == {DUNNO}
        assert processor_s(daemon) - began < 2
        assert not is_spinning(daemon)
    wait_until(lambda: is_answered(daemon), "there is room again")
    assert complaints(daemon) == ["16 connections are open, as many as may be: closing new ones at once"]


def test_running_out_of_descriptors_neither_kills_nor_spins(policyd: Start) -> None:
    """Open connections are served on, others wait until there are descriptors again."""
    daemon = policyd()
    daemon.ask()
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir(f"/proc/{daemon.pid}/fd")))
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (in_use + 1, before[1]))
    with daemon.connect() as waiting:
        waiting.sendall(request_bytes())
        assert daemon.wait_for_log("cannot accept a connection: ").level == "warning"
        assert daemon.ask() == DUNNO
        assert not is_spinning(daemon)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert waiting.answer() == DUNNO
    assert len(complaints(daemon)) == 1


def test_running_out_of_threads_closes_new_connections_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, logged: KeptLog
) -> None:
    """As systemd's TasksMax would have it; that is no fault of ours, with a traceback for each."""
    recorder = Mock(settings=Settings())
    with PolicyServer("127.0.0.1", 0, Policy(recorder, lambda _: None)) as server:
        monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        for _ in range(3):
            with Connection(server.server_address[:2]) as connection:
                server.handle_request()
                assert connection.rest() == b""
    assert [(line.level, line.text) for line in logged.lines] == [
        ("warning", "cannot serve a connection: can't start new thread")]  # fmt: skip


def test_a_password_that_everybody_can_read_is_warned_of(policyd: Start) -> None:
    daemon = policyd()
    warning = f"everybody can read the password in {daemon.settings_file}; try: chmod 0640 {daemon.settings_file}"
    password = {"dbname": "x", "dbuser": "x", "dbpass": "hunter2", "dbport": 1}
    for settings, mode, number in (({}, 0o644, 0), (password, 0o640, 0), (password, 0o644, 1)):
        assert daemon.stop() == 0
        daemon.write_settings(**settings)
        daemon.settings_file.chmod(mode)
        assert complaints(daemon.start()).count(warning) == number
