"""What the tests of policyd-admin share: rows to put in, ways to run it, and what it prints."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from importlib import machinery, util
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import servers
from servers import ROOT, Result, executable, write_settings
from stores import Store

ADMIN = ROOT / "scripts" / "policyd-admin"
HOUR_S, DAY_S = 3600, 86_400
# The Python that has the driver, and no Postfix unless one is named.
PYTHON_FIRST = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = {"PATH": PYTHON_FIRST, "MAIL_CONFIG": "/nonexistent", "TZ": "UTC"}

# What a client may call itself, and a shell, a mail or a terminal must not take for anything else.
HOSTILE = [
    "a\rBcc: y@example.net", "\x1b]0;owned\x07\x1b[31m", "\x7f\x08\x08\t", "=?utf-8?q?x=0aBcc:_y?=", "$(touch touched)",
    "`touch touched`", "; touch touched", "a' ; touch touched ; '", '"; touch touched; "', "a|touch touched&", "!!",
    "*", "~root", "$HOME", "#", "-rf", "--yes", "-c/etc/passwd", "--", "release", "delete", ".", ".quit",
    "a\\nblacklist=0/0", "a\\c", "%s%n", "josé", "жанна", "\u2028Bcc: y", "\u202egnitrats", "x" * 255, "é" * 250,
    "' " * 100 + "x", "a b", "0.0.0.0/0", "192.0.2.1", "192.0.2.1x", "anna@", "blacklist=carla", "#comment",
]  # fmt: skip


class Entry(NamedTuple):
    """One row to put in: how long ago, who, how many; and from where."""

    age_s: float
    login: str
    recipients: int | None
    sender: str | None = None  # None: one that no other row has
    client: str = "192.0.2.1"


def incident(age_s: float, login: str, rule: str) -> Entry:
    return Entry(age_s, login, None, "", rule)


@functools.cache
def policyd_admin() -> Any:
    """Return the program as a module, loaded once; the policyd that it loads is not the one of the tests."""
    ours = sys.modules["policyd"]
    spec: Any = util.spec_from_loader("policyd_admin", machinery.SourceFileLoader("policyd_admin", str(ADMIN)))
    module = util.module_from_spec(spec)
    with mock.patch.object(sys, "dont_write_bytecode", True):
        spec.loader.exec_module(module)
    sys.modules["policyd"] = ours
    return module


def run(*arguments: object, text: str = "", **environment: str) -> Result:
    """Call policyd-admin in this process, since most of a process's time goes into its start."""
    words, out, err = ["policyd-admin", *map(str, arguments)], io.StringIO(), io.StringIO()
    streams = {"stdin": io.StringIO(text), "stdout": out, "stderr": err}
    with mock.patch.dict(os.environ, {**ENVIRONMENT, **environment}), mock.patch.multiple(sys, argv=words, **streams):
        time.tzset()
        try:
            status = policyd_admin().main()
        except SystemExit as end:
            status = end.code
    time.tzset()
    return Result(words, int(status or 0), out.getvalue(), err.getvalue())


def run_process(*command: object, **how: Any) -> Result:
    """Run policyd-admin, or another program, in a process of its own."""
    return servers.run(*command, env={**ENVIRONMENT, **how.pop("env", {})}, **how)


def pasted(commands: Iterable[str], directory: Path) -> list[list[str]]:
    """Let one shell run commands there; return the words that each policyd-admin among them was called with."""
    program(directory, "policyd-admin", """printf '%s\\0' "$@" '' >>words""")
    (directory / "words").write_text("")
    done = run_process("sh", "-c", "\n".join(commands), cwd=directory, env={"PATH": f"{directory}:{PYTHON_FIRST}"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
    assert not (directory / "touched").exists()
    return [call.split("\0") for call in (directory / "words").read_bytes().decode().split("\0\0")[:-1]]


def program(directory: Path, name: str, text: str) -> dict[str, str]:
    executable(directory / name, f"#!/bin/sh\n{text}\n")
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def journal(directory: Path, *lines: str) -> dict[str, str]:
    """Return an environment in which journalctl has these lines, of now and in its own form."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime())
    (directory / "lines").write_text("".join(f"{stamp} relay1 {line}\n" for line in lines))
    return program(directory, "journalctl", f'exec cat "{directory}/lines"')


def printed(result: Result) -> str:
    """Return what it printed when it had nothing to complain of: printable, narrow, and with a command at its end."""
    assert (result.returncode, result.stderr) == (0, ""), result
    assert re.fullmatch(r"[ -~\n]*", result.stdout), result.stdout
    for line in result.stdout.splitlines():
        is_word = re.match(r" *(policyd-admin|blacklist=|on_stop=)", line) or "/" in line
        assert len(line) <= 80 or is_word or "not known: " in line, line
    assert commands_in(result.stdout), result.stdout
    return result.stdout


def refusal(result: Result, status: int = 1, has_plan: bool = False) -> str:
    """Return the one line that says why nothing was done, perhaps behind the plan of what would have been."""
    assert (result.returncode, bool(result.stdout)) == (status, has_plan), result
    line = re.fullmatch(r"policyd-admin: ([ -~]+)\n", result.stderr)
    assert line, result
    return line[1]


class Desk:
    """policyd-admin, called with a file of settings: `desk("top")` is what it prints when nothing is wrong."""

    def __init__(self, file: Path, store: Store | None = None, **environment: str) -> None:
        self.file, self._environment = file, environment
        if store is not None:  # else there are settings already, of a daemon
            self.store = store
            self.write()

    def write(self, *lines: str, **changes: str) -> None:
        """Write the settings that lead to the store, some of them changed, and more lines below them."""
        write_settings(self.file, *lines, **{**self.store.settings, **changes})

    def fill(self, *entries: Entry) -> None:
        for number, entry in enumerate(entries):
            sender = f"{number}@example.org" if entry.sender is None else entry.sender
            self.store.add([(entry.login, sender, entry.client, entry.recipients)], entry.age_s)

    def run(self, command: str, *arguments: object, **how: str) -> Result:
        """Call it, whatever comes of it."""
        return run(command, "-c", self.file, *arguments, **{**self._environment, **how})

    def __call__(self, *arguments: object, **environment: str) -> str:
        return printed(self.run(*arguments, **environment))

    def objects(self, *arguments: object, **environment: str) -> list[dict[str, Any]]:
        """Return what it prints with --json."""
        result = self.run(*arguments, "--json", **environment)
        assert (result.returncode, result.stderr) == (0, ""), result
        assert re.fullmatch(r"[ -~\n]*", result.stdout), result.stdout
        return list(json.loads(result.stdout))

    def refusal(self, *arguments: object, status: int = 1, has_plan: bool = False, **environment: str) -> str:
        """Return the one line that says why nothing was done."""
        return refusal(self.run(*arguments, **environment), status, has_plan)

    def report(self, login: str) -> dict[str, str]:
        """Return what `user` says of a login: what stands beside each name in the first paragraph."""
        text = self("user", "--", login).split("\n\n")[0].replace("\n" + " " * 16, "; ")
        return {line[:15].strip(): line[16:] for line in text.splitlines()}


def commands_in(text: str) -> list[str]:
    """Return the commands that a text offers to paste."""
    return re.findall(r"^  ((?:policyd-admin|on_stop=).*)$", text, re.MULTILINE)


def rows_of(report: str, heading: str) -> list[list[str]]:
    """Return the words of the lines below a heading, up to an empty line."""
    (found,) = (part for part in report.split("\n\n") if part.lstrip("\n").startswith(heading))
    return [line.split() for line in found.strip("\n").splitlines()[1:]]
