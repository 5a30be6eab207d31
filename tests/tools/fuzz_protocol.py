#!/usr/bin/env python3
"""Fuzz the reader of requests: valid requests mutated, split and glued, and whether they are the same in pieces.

usage: .venv/bin/python tests/tools/fuzz_protocol.py [--inputs 1000000] [--seed N]

Only requests, the end or ProtocolError may come out, and the same whether all is there at once or at whatever bytes it
is split.  Ends with a traceback and the input at the first that does not hold; with the same seed the inputs are the
same.  Run by hand; needs nothing but Python.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from policyd import MAX_LINE, MAX_REQUEST, PolicyRequest, ProtocolError, requests  # noqa: E402

RECORDED = [file.read_bytes() for file in sorted((ROOT / "tests" / "requests").glob("*.txt"))]
PIECES = [
    b"\n", b"\n\n", b"=", b"==", b"\0", b"\r\n", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x1b[31m", b"%s%n", b"x\n",
    b"request=smtpd_access_policy\n", b"request=other\n", b"sasl_username=", b"sasl_username=x\n", b"' OR 1=1 -- ",
    *(b"recipient_count=" + count for count in (b"", b"-1\n", b"999999\n", b"1000000\n", b"\xd9\xa3\n", b"1_0\n")),
]  # fmt: skip
LENGTHS = [1, 2, 100, MAX_LINE - 20, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, MAX_REQUEST]


class Pieces:
    """A connection on which an input comes in pieces of these sizes."""

    def __init__(self, data: bytes, chance: random.Random, *sizes: int) -> None:
        self._data, self._chance, self._sizes = memoryview(data), chance, sizes

    def settimeout(self, seconds: float) -> None:
        """All is there already."""

    def recv(self, size: int) -> bytes:
        size = min(size, self._chance.choice(self._sizes))
        piece, self._data = self._data[:size], self._data[size:]
        return bytes(piece)


def an_input(chance: random.Random) -> bytes:
    """Return requests that were sound once."""
    data = bytearray(b"".join(chance.choices(RECORDED, k=chance.choice((1, 1, 1, 2, 3)))))
    for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        at = chance.choice((at, data.find(b"\n", at) + 1))  # anywhere, or where a line begins
        end = at + chance.choice((0, 1, 1, 2, 10, 100, len(data)))
        what: list[bytes] = [b"", bytes(data[at:end]) * 2, bytes([chance.randrange(256)]), chance.choice(PIECES)]
        if chance.random() < 0.02:  # a value, or the number of the lines: seldom, since it takes long
            what = [chance.choice((b"x", b"\nx=1", b"=", b"\xff")) * chance.choice(LENGTHS)]
        data[at:end] = chance.choice(what)
    return bytes(data)


def outcomes_of(connection: Pieces) -> list[PolicyRequest | str]:
    """Return what is read, until the end or the first mistake, which stand there as texts."""
    outcomes: list[PolicyRequest | str] = []
    try:
        outcomes.extend(requests(connection))  # type: ignore[arg-type]
    except ProtocolError as error:
        return [*outcomes, "mistake: " + str(error).partition("=")[0]]
    return [*outcomes, "end"]


def main() -> None:
    """Read the command line, fuzz, and tell what came out how often."""
    parser = argparse.ArgumentParser(description="Fuzz the reader of requests.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    chance, kinds = random.Random(arguments.seed), Counter[str]()
    for number in range(arguments.inputs):
        data = an_input(chance)
        whole, split = (outcomes_of(Pieces(data, chance, *sizes)) for sizes in ((8192,), (1, 7, 64, 500, 8192)))
        about = (number, arguments.seed, data, whole, split)
        assert whole[:-1] == split[:-1], about
        assert str(whole[-1])[:3] == str(split[-1])[:3], about  # of several mistakes another one may be named
        for request in whole[:-1]:
            assert isinstance(request, PolicyRequest), about
            assert 0 <= request.recipient_count <= 999_999, about
            assert not any("\0" in text or "\n" in text for text in request[:-1]), about
        kinds.update({"request": len(whole) - 1, str(whole[-1]): 1})
    for name, count in kinds.most_common():
        print(f"{count:9} {name}")


if __name__ == "__main__":
    main()
