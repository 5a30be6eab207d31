#!/usr/bin/env python3
"""Fuzz the reader of requests: valid requests mutated, split and glued, and whether both ways of reading agree.

usage: .venv/bin/python tests/fuzz_protocol.py [--inputs 1000000] [--seed N]

Only a request, None or ProtocolError may come out, at whatever bytes the input is split; and where the whole request is
there at once (the server's short cut, parse_request), the same as line by line (read_request).  Ends with a
traceback and the input at the first that does not hold; with the same seed the inputs are the same.

Run by hand; needs nothing but Python.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Union

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from policyd import MAX_LINE, MAX_REQUEST, PolicyRequest, ProtocolError, parse_request, read_request  # noqa: E402

RECORDED = [file.read_bytes() for file in sorted((ROOT / "tests" / "requests").glob("*.txt"))]
PIECES = [
    b"\n", b"\n\n", b"=", b"==", b"\0", b"\r\n", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x1b[31m",
    b"request=smtpd_access_policy\n", b"request=other\n", b"recipient_count=", b"recipient_count=-1\n",
    b"recipient_count=999999\n", b"recipient_count=1000000\n", b"recipient_count=\xd9\xa3\n", b"recipient_count=1_0\n",
    b"sasl_username=", b"sasl_username=x\n", b"' OR 1=1 -- ", b"%s%n", b"noequals\n",
]
LENGTHS = [1, 2, 100, MAX_LINE - 20, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, MAX_REQUEST]
Outcome = Union[PolicyRequest, str, None]  # a text stands for a ProtocolError


class Pieces(io.RawIOBase):
    """An input that comes in pieces, as from a socket."""

    def __init__(self, data: bytes, chance: random.Random) -> None:
        self._data = memoryview(data)
        self._chance = chance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), len(self._data), self._chance.choice((1, 7, 64, 500, 8192)))
        buffer[:size] = self._data[:size]
        self._data = self._data[size:]
        return size


def an_input(chance: random.Random) -> bytes:
    """Return requests that were sound once."""
    data = bytearray(b"".join(chance.choices(RECORDED, k=chance.choice((1, 1, 1, 2, 3)))))
    for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
        MUTATIONS[chance.randrange(len(MUTATIONS))](data, chance)
    return bytes(data)


def change_a_byte(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.randrange(256)


def put_in(data: bytearray, chance: random.Random) -> None:
    """At the begin of a line, or anywhere."""
    at = chance.randrange(len(data) + 1)
    if chance.random() < 0.5:
        at = data.find(b"\n", at) + 1
    data[at:at] = chance.choice(PIECES)


def take_out(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    del data[at : at + chance.choice((1, 1, 2, 10, 100))]


def repeat(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = data[at : at + chance.randrange(200)]


def cut_off(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def lengthen(data: bytearray, chance: random.Random) -> None:
    """A value, or the number of the lines; seldom, since it takes long."""
    if chance.random() < 0.1:
        at = data.find(b"\n", chance.randrange(len(data) + 1))
        if at >= 0:
            data[at:at] = chance.choice((b"x", b"\nx=1", b"=", b"\xff")) * chance.choice(LENGTHS)


MUTATIONS = (change_a_byte, put_in, take_out, repeat, cut_off, lengthen)


def in_pieces(data: bytes, chance: random.Random) -> list[Outcome]:
    """Return what is read line by line, until the end or the first mistake."""
    reader = io.BufferedReader(Pieces(data, chance))
    outcomes: list[Outcome] = []
    while not outcomes or isinstance(outcomes[-1], PolicyRequest):
        try:
            outcomes.append(read_request(reader.readline))
        except ProtocolError as error:
            outcomes.append(str(error))
    return outcomes


def as_server(data: bytes) -> list[Outcome]:
    """Return what PolicyHandler reads when all of it is there: at once what ends in an empty line."""
    reader = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
    outcomes: list[Outcome] = []
    try:
        while received := reader.peek(1):
            end = received.find(b"\n\n")
            request = parse_request(reader.read(end + 2)) if end >= 0 else read_request(reader.readline)
            outcomes.append(request)
            if request is None:
                return outcomes
    except ProtocolError as error:
        return [*outcomes, str(error)]
    return [*outcomes, None]


def kind(outcome: Outcome) -> str:
    """Return what to count an outcome as, without the digits and texts of this one."""
    if isinstance(outcome, PolicyRequest):
        assert 0 <= outcome.recipient_count <= 999_999
        assert not any("\0" in text or "\n" in text for text in outcome[:-1])
        assert all(isinstance(text, str) and text.encode() for text in outcome[:-1] if text)
        return "request"
    if outcome is None:
        return "end"
    return "recipient_count" if outcome.startswith("recipient_count=") else outcome


def main() -> int:
    """Read the command line, fuzz, and tell what came out how often."""
    parser = argparse.ArgumentParser(description="Fuzz the reader of requests.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    begin = time.monotonic()
    kinds: Counter[str] = Counter()
    size = 0
    for _ in range(arguments.inputs):
        data = an_input(chance)
        size += len(data)
        try:
            outcomes = in_pieces(data, chance)
            kinds.update(map(kind, outcomes))
            assert agree(outcomes, as_server(data)), as_server(data)
        except Exception:
            print(f"seed {arguments.seed}, input: {data!r}", file=sys.stderr)
            raise
    print(f"{arguments.inputs} inputs, {size / 1e6:.0f} MB, seed {arguments.seed}, {time.monotonic() - begin:.0f} s;"
          f" nothing but requests, ends and protocol errors, both ways alike:")
    for name, number in kinds.most_common():
        print(f"{number:9} {name}")
    return 0


def agree(one: list[Outcome], other: list[Outcome]) -> bool:
    """Tell whether both ways read the same requests and came to the same kind of end.

    Which of several mistakes in one request is named may differ.
    """
    return one[:-1] == other[:-1] and type(one[-1]) is type(other[-1])


if __name__ == "__main__":
    sys.exit(main())
