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
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from policyd import MAX_LINE, MAX_REQUEST, PolicyRequest, ProtocolError, requests  # noqa: E402

RECORDED = [file.read_bytes() for file in sorted((ROOT / "tests" / "requests").glob("*.txt"))]
PIECES = [
    b"\n", b"\n\n", b"=", b"==", b"\0", b"\r\n", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x1b[31m",
    b"request=smtpd_access_policy\n", b"request=other\n", b"recipient_count=", b"recipient_count=-1\n",
    b"recipient_count=999999\n", b"recipient_count=1000000\n", b"recipient_count=\xd9\xa3\n", b"recipient_count=1_0\n",
    b"sasl_username=", b"sasl_username=x\n", b"' OR 1=1 -- ", b"%s%n", b"noequals\n",
]
LENGTHS = [1, 2, 100, MAX_LINE - 20, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, MAX_REQUEST]


class Pieces:
    """A connection on which an input comes in pieces, or at once if there is no `chance`."""

    def __init__(self, data: bytes, chance: random.Random | None = None) -> None:
        self._data = memoryview(data)
        self._chance = chance

    def settimeout(self, seconds: float) -> None:
        """All is there already."""

    def recv(self, size: int) -> bytes:
        size = min(size, self._chance.choice((1, 7, 64, 500, 8192)) if self._chance else size)
        piece, self._data = self._data[:size], self._data[size:]
        return bytes(piece)


def an_input(chance: random.Random) -> bytes:
    """Return requests that were sound once."""
    data = bytearray(b"".join(chance.choices(RECORDED, k=chance.choice((1, 1, 1, 2, 3)))))
    for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        at = chance.choice((at, data.find(b"\n", at) + 1))  # anywhere, or where a line begins
        many = chance.choice((1, 1, 2, 10, 100))
        what = chance.randrange(6)
        if what == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif what == 1:
            data[at:at] = chance.choice(PIECES)
        elif what == 2:
            del data[at : at + many]
        elif what == 3:
            data[at:at] = data[at : at + many]
        elif what == 4:
            del data[at:]
        elif chance.random() < 0.1:  # a value, or the number of the lines: seldom, since it takes long
            data[at:at] = chance.choice((b"x", b"\nx=1", b"=", b"\xff")) * chance.choice(LENGTHS)
    return bytes(data)


def outcomes_of(connection: Pieces) -> list[PolicyRequest | str]:
    """Return what is read, until the end or the first mistake, which stand there as texts."""
    outcomes: list[PolicyRequest | str] = []
    try:
        outcomes.extend(requests(connection))  # type: ignore[arg-type]
    except ProtocolError as error:
        return [*outcomes, "mistake: " + str(error).partition("=")[0]]
    return [*outcomes, "end"]


def main() -> int:
    """Read the command line, fuzz, and tell what came out how often."""
    parser = argparse.ArgumentParser(description="Fuzz the reader of requests.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    chance, begin = random.Random(arguments.seed), time.monotonic()
    kinds: Counter[str] = Counter()
    for _ in range(arguments.inputs):
        data = an_input(chance)
        try:
            whole, split = outcomes_of(Pieces(data)), outcomes_of(Pieces(data, chance))
            assert whole[:-1] == split[:-1], split
            assert str(whole[-1])[:3] == str(split[-1])[:3], split  # of several mistakes another one may be named
            for request in whole[:-1]:
                assert isinstance(request, PolicyRequest)
                assert 0 <= request.recipient_count <= 999_999
                assert not any("\0" in text or "\n" in text for text in request[:-1])
        except Exception:
            print(f"seed {arguments.seed}, input: {data!r}", file=sys.stderr)
            raise
        kinds.update({"request": len(whole) - 1, str(whole[-1]): 1})
    print(f"{arguments.inputs} inputs, seed {arguments.seed}, {time.monotonic() - begin:.0f} s; all as it should be:")
    for name, number in kinds.most_common():
        print(f"{number:9} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
