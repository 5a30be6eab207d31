#!/usr/bin/env python3
"""Fuzz the reader of requests: 100,000 inputs of sound and broken pieces, each whole and split at any bytes.

usage: .venv/bin/python tests/tools/fuzz_protocol.py [OPTION OF PYTEST...]

Only requests, the end or ProtocolError may come out, and the same however it is split.  The inputs are new in each run;
the first that fails is shrunk, and printed with a line that repeats it.  Run by hand; needs no server.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TEST = Path(__file__).parents[1] / "test_protocol.py"
PYTEST = [sys.executable, "-m", "pytest", "-q", str(TEST), "-k", "any_bytes", "--hypothesis-profile=long"]

if __name__ == "__main__":
    sys.exit(subprocess.call([*PYTEST, *sys.argv[1:]], cwd=TEST.parents[1]))
