"""unit.service: what systemd reads in it, and how little it leaves policyd."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from servers import ROOT, program

UNIT = ROOT / "unit.service"

SAYS = {
    "Type": ["notify"], "User": ["policyd"], "Group": ["policyd"], "StateDirectory": ["policyd"],
    "ExecStart": ["/usr/local/bin/policyd"], "Restart": ["always"], "RestartSec": ["1"],
    "RestartPreventExitStatus": ["78"], "StartLimitIntervalSec": ["0"], "LimitNOFILE": ["4096"],
    "ProtectSystem": ["strict"], "NoNewPrivileges": ["yes"], "WantedBy": ["multi-user.target"],
    # A reload tries the settings before the daemon reads them.
    "ExecReload": ["/usr/local/bin/policyd --check-settings", "/bin/sh -c 'kill -HUP $MAINPID'"],
    # A database on this host is up before it, but it serves without one, too; one on another host can be reached.
    "After": ["network.target mariadb.service"], "RestrictAddressFamilies": ["AF_INET AF_INET6 AF_UNIX"],
}  # fmt: skip
LACKS = {"Requires", "Requisite", "BindsTo", "Wants", "IPAddressDeny", "PrivateNetwork",
         "MemoryMax", "PrivateUsers", "NoExecPaths"}  # fmt: skip


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which needs no running systemd for what is asked here."""
    command = [program("systemd-analyze", "systemd"), *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def settings() -> dict[str, list[str]]:
    """Return all values of each setting of the unit."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^([A-Z]\w+)=(.*)$", UNIT.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def test_the_exposure_is_at_most_2_and_systemd_finds_no_mistake(tmp_path: Path) -> None:
    result = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    level = re.search(r"Overall exposure level for unit\.service: ([0-9.]+)", result.stdout)
    assert level, result
    assert float(level[1]) <= 2.0, result.stdout
    unit = tmp_path / "policyd.service"
    # It also looks for the program, which is not installed here.
    unit.write_text(UNIT.read_text().replace("=/usr/local/bin/policyd", "=/bin/sh"))
    result = analyze("verify", "--man=no", str(unit))
    # It reads the units around this one too; their faults are not ours.
    assert [line for line in result.stderr.splitlines() if "policyd" in line] == []


def test_the_unit_says_what_policyd_needs_and_nothing_that_is_in_its_way() -> None:
    found = settings()
    assert {key: found[key] for key in SAYS} == SAYS
    assert not LACKS & found.keys()
    assert int(found["TasksMax"][0]) > 1000 + 64  # the most connections, the daemon's own threads, a child's
    assert int(found["TimeoutStopSec"][0]) > 5  # which it may take
    # policyd stops its pings, one in half the watchdog's time, when an event has waited for 10 s.
    assert int(found["WatchdogSec"][0]) / 2 > 10


def calls_of(group: str) -> set[str]:
    """Return the system calls of one of systemd's groups."""
    listed = analyze("syscall-filter", group)
    assert listed.returncode == 0, listed
    names = {line.strip() for line in listed.stdout.splitlines()} - {group}
    calls = {name for name in names if re.fullmatch(r"\w+", name)}
    return calls.union(*(calls_of(name) for name in names if name.startswith("@")))


def test_on_stop_can_start_a_program_that_sends_mail_and_no_more() -> None:
    """What Python and libc need for it: a child, all processors, pipes, TCP; and the lock of statedir."""
    allowed: set[str] = set()
    for value in settings()["SystemCallFilter"]:
        for name in value.lstrip("~").split():
            calls = calls_of(name) if name.startswith("@") else {name}
            allowed = allowed - calls if value.startswith("~") else allowed | calls
    needed = {"clone", "clone3", "vfork", "execve", "wait4", "waitid", "kill", "pipe2", "poll", "dup2", "setsid"}
    needed |= {"rt_sigprocmask", "sched_setaffinity", "socket", "connect", "sendto", "recvfrom", "flock", "fcntl"}
    assert needed <= allowed
    assert not {"setuid", "setgroups", "chown", "mount", "ptrace", "setrlimit", "sched_setscheduler"} & allowed
