"""What the tests of policyd-admin share: rows to put in, ways to run it, and what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from servers import ROOT
from stores import Store

ADMIN = ROOT / "scripts" / "policyd-admin"
TOP20 = ROOT / "scripts" / "policyd-top20.sh"
PYTHON_FIRST = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # which has the driver
HOUR_S = 3600
DAY_S = 86_400
NOBODY = 65534

STRANGE_LOGIN = "\x1b]0;owned\x07\u009b31m\té"
STRANGE_LOGIN_SHOWN = r"\x1b]0;owned\x07\x9b31m\t\xe9"
# What a client may call itself, and a shell, a mail or a terminal must not take for anything else.
HOSTILE = [
    "a\rBcc: y@example.net", "\x1b]0;owned\x07\x1b[31m", "\x7f\x08\x08\t", "=?utf-8?q?x=0aBcc:_y?=", "$(touch touched)",
    "`touch touched`", "; touch touched", "a' ; touch touched ; '", '"; touch touched; "', "a|touch touched&", "!!",
    "*",
    "~root", "$HOME", "#", "-rf", "--yes", "-c/etc/passwd", "--", "release", "delete", ".", ".quit",
    "a\\nblacklist=0/0",
    "a\\c", "%s%n", "josé", "жанна", "\u2028Bcc: y", "\u202egnitrats", "x" * 250, "é" * 250, "' " * 100 + "x", "a b",
    "0.0.0.0/0", "192.0.2.1", "blacklist=carla", "#comment",
]  # fmt: skip


class Entry(NamedTuple):
    """One row to put in: how long ago, who, how many; and from where."""

    age_s: float
    login: str
    recipients: int | None
    sender: str | None = None  # None: one that no other row has
    client: str = "192.0.2.1"


def fill(store: Store, *entries: Entry) -> None:
    """Put rows in."""
    for number, entry in enumerate(entries):
        sender = f"{number}@example.org" if entry.sender is None else entry.sender
        store.add([(entry.login, sender, entry.client, entry.recipients)], entry.age_s)


def incident(age_s: float, login: str, rule: str) -> Entry:
    """Return the row of an incident."""
    return Entry(age_s, login, None, "", rule)


def settings_file(directory: Path, settings: dict[str, str], *lines: str) -> Path:
    """Write the settings and, below them, more lines; return the file's path."""
    path = directory / "policyd.cfg"
    path.write_text("".join(f"{line}\n" for line in (*(f"{key}={value}" for key, value in settings.items()), *lines)))
    return path


def run(
    *arguments: object,
    program: Path = ADMIN,
    text: str | None = None,
    user: int | None = None,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run policyd-admin as this user, or as another one who is in no group; with no Postfix unless one is named."""
    python = sys.executable if user is None else "/usr/bin/python3"  # that of root is not for everybody
    command = [python, str(program)] if program.suffix != ".sh" else ["sh", str(program)]
    return subprocess.run(
        [*command, *map(str, arguments)], input=text, stdin=subprocess.DEVNULL if text is None else None,
        env={**os.environ, "PATH": PYTHON_FIRST, "MAIL_CONFIG": "/nonexistent", "TZ": "UTC", **environment}, cwd=cwd,
        capture_output=True, text=True, timeout=60, user=user, group=user, extra_groups=None if user is None else [],
    )  # fmt: skip


def printed(result: subprocess.CompletedProcess[str]) -> str:
    """Return what it printed when it had nothing to complain of: printable, narrow, and with a command at its end."""
    assert (result.returncode, result.stderr) == (0, ""), result
    assert re.fullmatch(r"[ -~\n]*", result.stdout), result.stdout
    for line in result.stdout.splitlines():
        is_word = re.match(r" *(policyd-admin|printf|on_stop=)", line) or "/" in line
        assert len(line) <= 80 or is_word or "not known: " in line, line
    assert commands_in(result.stdout), result.stdout
    return result.stdout


def objects(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return what it printed with --json."""
    assert (result.returncode, result.stderr) == (0, ""), result
    return list(json.loads(result.stdout))


def refusal(result: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """Return the one line that says why nothing was done."""
    assert (result.returncode, result.stdout) == (status, ""), result
    line = re.fullmatch(r"policyd-admin: ([ -~]+)\n", result.stderr)
    assert line, result
    return line[1]


def commands_in(text: str) -> list[str]:
    """Return the commands that a text offers to paste."""
    return re.findall(r"^  ((?:policyd-admin|printf|on_stop=).*)$", text, re.MULTILINE)


def paste(command: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as it stands, with our policyd-admin on the PATH and a systemctl that does nothing."""
    for name, target in (("policyd-admin", ADMIN), ("systemctl", Path("/bin/true"))):
        if not (directory / name).exists():
            (directory / name).symlink_to(target)
    return subprocess.run(
        ["sh", "-c", command], cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env={**os.environ, "MAIL_CONFIG": "/nonexistent", "PATH": f"{directory}:{PYTHON_FIRST}", **environment},
    )  # fmt: skip


def facts(report: str) -> dict[str, str]:
    """Return what stands beside each name in the first paragraph of a report."""
    found: dict[str, str] = {}
    name = ""
    for line in report.split("\n\n")[0].splitlines():
        name = line[:13].strip() or name
        found[name] = f"{found[name]}; {line[14:]}" if name in found else line[14:]
    return found


def rows_of(report: str, heading: str) -> list[list[str]]:
    """Return the words of the lines below a heading, up to an empty line."""
    (found,) = (part for part in report.split("\n\n") if part.lstrip("\n").startswith(heading))
    return [line.split() for line in found.strip("\n").splitlines()[1:]]
