"""unit.service: what systemd reads in it, and how little it leaves policyd."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from servers import ROOT, program

UNIT = ROOT / "unit.service"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which needs no running systemd for what is asked here."""
    return subprocess.run(
        [program("systemd-analyze", "systemd"), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def settings() -> dict[str, list[str]]:
    """Return all values of each setting of the unit."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if re.match(r"[A-Z]\w+=", line):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_exposure_is_at_most_2() -> None:
    result = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    level = re.search(r"Overall exposure level for unit\.service: ([0-9.]+)", result.stdout)
    assert level, result
    assert float(level[1]) <= 2.0, result.stdout


def test_systemd_finds_no_mistake(tmp_path: Path) -> None:
    unit = tmp_path / "policyd.service"
    # It also looks for the program, which is not installed here.
    unit.write_text(UNIT.read_text().replace("=/usr/local/bin/policyd", "=/bin/sh"))
    result = analyze("verify", "--man=no", str(unit))
    # It reads the units around this one too; their faults are not ours.
    assert [line for line in result.stderr.splitlines() if "policyd" in line] == []


@pytest.mark.parametrize(
    "line",
    [
        "Type=notify",
        "User=policyd",
        "Group=policyd",
        "StateDirectory=policyd",
        "ExecStart=/usr/local/bin/policyd",
        "Restart=always",
        "RestartSec=1",
        "RestartPreventExitStatus=78",
        "StartLimitIntervalSec=0",
        "LimitNOFILE=4096",
        "ProtectSystem=strict",
        "NoNewPrivileges=yes",
        "WantedBy=multi-user.target",
    ],
)
def test_the_unit_says(line: str) -> None:
    key, _, value = line.partition("=")
    assert settings()[key] == [value]


def test_a_reload_tries_the_settings_before_the_daemon_reads_them() -> None:
    assert settings()["ExecReload"] == [
        settings()["ExecStart"][0] + " --check-settings", "/bin/sh -c 'kill -HUP $MAINPID'"
    ]  # fmt: skip


def calls_of(group: str) -> set[str]:
    """Return the system calls of one of systemd's groups."""
    listed = analyze("syscall-filter", group)
    assert listed.returncode == 0, listed
    calls: set[str] = set()
    for line in listed.stdout.splitlines():
        name = line.strip()
        if name.startswith("@") and name != group:
            calls |= calls_of(name)
        elif re.fullmatch(r"\w+", name):
            calls.add(name)
    return calls


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
    assert not {"MemoryMax", "PrivateUsers", "NoExecPaths"} & settings().keys()
    assert int(settings()["TasksMax"][0]) > 1000 + 64  # the most connections, the daemon's own threads, a child's


def test_the_watchdog_leaves_more_time_than_policyd_lets_an_event_wait() -> None:
    """policyd stops its pings, one in half the watchdog's time, when an event has waited for 10 s."""
    (watchdog,) = settings()["WatchdogSec"]
    assert int(watchdog) / 2 > 10


def test_the_stop_leaves_policyd_the_5_s_it_may_take() -> None:
    (stop,) = settings()["TimeoutStopSec"]
    assert int(stop) > 5


def test_policyd_starts_and_serves_without_its_database() -> None:
    assert not {"Requires", "Requisite", "BindsTo", "Wants"} & settings().keys()
    assert settings()["After"] == ["network.target mariadb.service"]


def test_a_database_on_another_host_can_be_reached() -> None:
    assert not {"IPAddressDeny", "PrivateNetwork"} & settings().keys()
    (families,) = settings()["RestrictAddressFamilies"]
    assert set(families.split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
