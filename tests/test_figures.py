"""The figures: the line of SIGUSR1 and `systemctl status`, and policyd.prom for Prometheus."""

from __future__ import annotations

import math
import os
import re
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Callable

import pytest
from asking import status
from daemons import running_here
from hypothesis import given
from hypothesis import strategies as st
from servers import (
    DUNNO,
    HOLD,
    REJECT,
    START_TIMEOUT_S,
    Database,
    Policyd,
    free_port,
    read_answer,
    request_bytes,
    wait_until,
)
from stores import DAY_S, Clock, KeptLog, SQLiteStore

from policyd import Figures

Start = Callable[..., Policyd]
Samples = dict[str, float]

QUOTA = 10
BLACKLISTED = "HOLD blacklisted"
SERIES = [  # of requests: login, recipients, answer
    ("anna", 9, DUNNO),
    ("anna", 1, HOLD),
    ("anna", 10, REJECT),
    ("bert", 10, HOLD),
    ("bert", 1, HOLD),
    ("phished", 1, BLACKLISTED),
    ("", 5, DUNNO),
    ("carl", 1, DUNNO),
]


# ---- how fast: the 99th percentile ------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=500))
def test_the_99th_percentile_is_what_99_of_100_answers_kept_to(times: list[float]) -> None:
    figures = Figures()
    for seconds in times:
        figures.count("DUNNO", seconds)
    within = [seconds for seconds in times if seconds <= figures.p99_s()]
    assert figures.p99_s() in times
    assert len(within) >= 0.99 * len(times)
    assert len([seconds for seconds in times if seconds < figures.p99_s()]) < 0.99 * len(times)


@pytest.mark.parametrize(("slow", "found"), [(0, 0.001), (1, 0.001), (10, 0.001), (11, 2.0), (1000, 2.0)])
def test_one_slow_answer_in_a_hundred_does_not_show_and_more_do(slow: int, found: float) -> None:
    figures = Figures()
    for n in range(1000):
        figures.count("DUNNO", 2.0 if n < slow else 0.001)
    assert figures.p99_s() == found


def test_the_99th_percentile_is_that_of_the_last_10_000_answers_and_0_without_any() -> None:
    figures = Figures()
    assert figures.p99_s() == 0
    for n in range(11_000):
        figures.count("DUNNO", 9.0 if n < 1000 else 0.25)
    assert figures.p99_s() == 0.25
    assert figures.answered["DUNNO"] == 11_000, "what is counted is counted from the start"


def test_no_answer_is_missed_when_many_are_counted_at_once() -> None:
    figures = Figures()

    def count() -> None:
        for _ in range(2000):
            figures.count("REJECT", 0.01)
            figures.note("anna", "REJECT", is_audit=True)
            figures.note("bert", "DUNNO")
            figures.logins_held()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figures.answered == {"DUNNO": 0, "HOLD": 0, "REJECT": 8000}
    assert figures.spared == {"HOLD": 0, "REJECT": 8000}
    assert figures.logins_held() == 1


def test_a_login_is_held_once_until_it_is_under_the_limit_again_or_for_a_day() -> None:
    clock = Clock()
    figures = Figures(clock)
    for login, action in [("anna", "HOLD"), ("anna", "REJECT"), ("bert", "HOLD"), ("carl", "DUNNO")]:
        figures.note(login, action)
    assert figures.logins_held() == 2
    figures.note("anna", "DUNNO")
    assert figures.logins_held() == 1
    assert not any(figures.spared.values())
    clock.now += DAY_S - 1
    assert figures.logins_held() == 1
    clock.now += 2
    assert figures.logins_held() == 0


# ---- the status line and policyd.prom ---------------------------------------------------------------

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
HELP = re.compile(rf"# HELP ({NAME}) ((?:[^\\]|\\[\\n])+)")
TYPE = re.compile(rf"# TYPE ({NAME}) (counter|gauge)")
SAMPLE = re.compile(rf"(({NAME})(?:\{{{LABEL}(?:,{LABEL})*\}})?) (\S+)")


def parse(text: str) -> Samples:
    """Return the samples of a file in Prometheus' text format 0.0.4, of which no letter may be wrong."""
    assert text.endswith("\n"), "half a line"
    lines = iter(text[:-1].split("\n"))
    samples: Samples = {}
    types: dict[str, str] = {}
    for line in lines:
        if line.startswith("#"):
            about, kind = HELP.fullmatch(line), TYPE.fullmatch(next(lines))
            assert about, f"not a line of HELP: {line!r}"
            assert kind, f"no line of TYPE follows: {line!r}"
            family = kind[1]
            assert family == about[1], f"another name in HELP and TYPE: {line!r}"
            assert family not in types, f"twice: {line!r}"
            types[family] = kind[2]
            assert (types[family] == "counter") == family.endswith("_total"), f"promtool would complain: {line}"
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, f"not a sample: {line!r}"
        assert sample[2] == family, "not below its HELP and TYPE"
        assert sample[1] not in samples, "twice"
        samples[sample[1]] = float(sample[3])
    assert {re.sub(r"\{.*", "", name) for name in samples} == set(types), "a family without a sample"
    assert all(name.startswith("policyd_") and math.isfinite(value) for name, value in samples.items())
    return samples


def answers(metric: str, **numbers: int) -> Samples:
    """Return the samples of a counter of answers."""
    return {f'policyd_{metric}{{answer="{answer}"}}': number for answer, number in numbers.items()}


NOTHING_YET = {
    **answers("requests_total", DUNNO=0, HOLD=0, REJECT=0),
    **answers("audited_total", HOLD=0, REJECT=0),
    "policyd_logins_held": 0, "policyd_database_up": 1, "policyd_database_down_seconds": 0, "policyd_journal_events": 0,
    "policyd_answer_p99_seconds": 0, "policyd_connections": 0,
}  # fmt: skip


class Here:
    """What a daemon in this process needs, and a way to ask it."""

    def __init__(self, directory: Path) -> None:
        self.port, self.file, self.prom = free_port(), directory / "policyd.cfg", directory / "policyd.prom"
        self.write_settings()

    def write_settings(self, **settings: object) -> None:
        """Write the settings file."""
        settings = {"defaultquota": QUOTA, "blacklist": "phished", **settings}
        settings.update(port=self.port, statedir=self.file.parent)
        self.file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def connect(self) -> socket.socket:
        """Return a new connection to the daemon."""
        return socket.create_connection(("127.0.0.1", self.port), START_TIMEOUT_S)

    def ask(self, login: str, recipients: int) -> str:
        """Ask on a connection of its own."""
        with self.connect() as connection:
            connection.sendall(request_bytes(sasl_username=login, recipient_count=recipients))
            return read_answer(connection)


@pytest.fixture
def here(tmp_path: Path, logged: KeptLog) -> Here:
    return Here(tmp_path)


@pytest.mark.parametrize("mode", ["enforce", "audit"])
def test_all_figures_are_those_of_what_was_answered(here: Here, mode: str) -> None:
    """In the line for the log and systemd, and for Prometheus; an audit says what it has let through."""
    here.write_settings(mode=mode)
    with running_here(here.file) as daemon, here.connect():
        for login, recipients, answer in SERIES:
            assert here.ask(login, recipients) == (answer if mode == "enforce" else DUNNO)
        wait_until(lambda: "; 1 connections;" in daemon.daemon.status(), "all others have gone")
        if mode == "enforce":
            text, found = "3 DUNNO, 4 HOLD, 1 REJECT", answers("requests_total", DUNNO=3, HOLD=4, REJECT=1)
        else:
            text, found = ("8 DUNNO, 0 HOLD, 0 REJECT (audit: 4 would HOLD, 1 would REJECT)",
                           answers("requests_total", DUNNO=8) | answers("audited_total", HOLD=4, REJECT=1))  # fmt: skip
        figures = parse(daemon.daemon.metrics())
        p99 = figures.pop("policyd_answer_p99_seconds")
        assert 1e-6 < p99 < START_TIMEOUT_S
        expected = {**NOTHING_YET, **found, "policyd_logins_held": 3, "policyd_connections": 1}
        assert figures.items() == {key: expected[key] for key in expected if "p99" not in key}.items()
        assert daemon.daemon.status() == (
            f"8 requests: {text}; 3 logins held; 1 connections; p99 {p99 * 1000:.1f} ms; database up, 0 events in the"
            f" journal; on inet:127.0.0.1:{here.port}"
        )


def test_who_is_forgiven_is_not_among_the_logins_held_once_he_sends_again(policyd: Start) -> None:
    """The same line goes to the log and to systemd."""
    daemon = policyd(environment={"WATCHDOG_USEC": "100000"}, defaultquota=QUOTA)
    assert [daemon.ask(sasl_username=login, recipient_count=QUOTA) for login in ("anna", "bert")] == [HOLD] * 2
    daemon.wait_for_log("DEFERRING overquota (10>10) for user bert")
    line = status(daemon)
    assert line.level == "info"
    assert line.text.startswith("2 requests: 0 DUNNO, 2 HOLD, 0 REJECT; 2 logins held; 1 connections; p99 ")
    daemon.wait_for_notification("STATUS=2 requests: 0 DUNNO, 2 HOLD, 0 REJECT; 2 logins held;")
    SQLiteStore(daemon.statedir / "events.sqlite3").clear()
    assert "; 2 logins held; " in status(daemon).text
    assert daemon.ask(sasl_username="anna") == DUNNO
    daemon.wait_for_log("Updating db: anna/alice@example.org/192.0.2.1/1/1")
    assert "; 1 logins held; " in status(daemon).text


@pytest.mark.usefixtures("no_delay")
def test_all_figures_tell_that_the_database_is_down_and_since_when(here: Here, database: Database) -> None:
    """In local time, with what waits for it; and when it is up again, that it is."""
    here.write_settings(**database.settings())
    with running_here(here.file) as daemon:
        assert here.ask("anna", 1) == DUNNO
        database.query("RENAME TABLE events TO away")
        before = time.time()
        assert [here.ask("anna", 1) for _ in range(2)] == [DUNNO] * 2
        match = re.search(r"; database down since ([-0-9]+ [:0-9]+), 2 events in the journal", daemon.daemon.status())
        assert match
        assert before - 2 <= time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S")) <= time.time() + 2
        figures = parse(daemon.daemon.metrics())
        assert (figures["policyd_database_up"], figures["policyd_journal_events"]) == (0, 2)
        wait_until(lambda: parse(daemon.daemon.metrics())["policyd_database_down_seconds"] >= 1, "a second has passed")
        database.query("RENAME TABLE away TO events")
        wait_until(lambda: "; database up, 0 events in the journal" in daemon.daemon.status(), "it is up again", 60)
        figures = parse(daemon.daemon.metrics())
        assert (figures["policyd_database_up"], figures["policyd_database_down_seconds"]) == (1, 0)


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_database_all_say_down_from_the_start_on(policyd: Start, count: int) -> None:
    """The first status to systemd, the status line and the file of figures; asked or not."""
    daemon = policyd(dbhost="127.0.0.1", dbport=free_port(), dbname="x", dbuser="x")
    down = r"; database down since [-0-9]+ [:0-9]+, {} events in the journal"
    assert re.search(down.format(0), daemon.notifications[0])
    wait_until((daemon.statedir / "policyd.prom").exists, "the figures are written")
    assert parse((daemon.statedir / "policyd.prom").read_text())["policyd_database_up"] == 0
    assert [daemon.ask() for _ in range(count)] == [DUNNO] * count
    assert re.search(down.format(count), status(daemon).text)


def test_a_journal_that_cannot_be_used_is_told(policyd: Start) -> None:
    daemon = policyd(dbhost="127.0.0.1", dbport=free_port(), dbname="x", dbuser="x")
    (daemon.statedir / "journal.sqlite3").unlink()
    (daemon.statedir / "journal.sqlite3").mkdir()
    daemon.ask()
    daemon.wait_for_log("no outage journal: ")
    assert ", 1 events in the journal, which CANNOT BE USED" in status(daemon).text


def test_the_file_is_there_from_the_start_on_for_everybody_to_read(policyd: Start) -> None:
    """Also to node_exporter, which is neither root nor policyd."""
    daemon = policyd()
    file = daemon.statedir / "policyd.prom"
    wait_until(file.exists, "the figures are written")
    assert parse(file.read_text()).items() >= NOTHING_YET.items()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert sorted(path.name for path in file.parent.glob("policyd.prom*")) == ["policyd.prom"]


def test_nobody_ever_reads_half_a_file(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policyd.FIGURES_S", 0)
    with running_here(here.file):
        wait_until(here.prom.exists, "the figures are written")
        seen = set()
        for _ in range(2000):
            with here.prom.open() as file:
                assert parse(file.read()).items() >= NOTHING_YET.items()
                seen.add(os.fstat(file.fileno()).st_mtime_ns)
    assert len(seen) > 10, "a new one each time"


def test_a_file_that_cannot_be_written_is_one_warning_and_mail_flows(
    here: Here, logged: KeptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one a minute."""
    monkeypatch.setattr("policyd.FIGURES_S", 0.01)
    in_the_way = here.prom.with_name("policyd.prom.new")
    complaint = ("warning", f"no file of figures: [Errno 21] Is a directory: '{in_the_way}'")
    in_the_way.mkdir()
    with running_here(here.file):
        wait_until(lambda: complaint in logged.lines, "it is warned of")
        assert [here.ask("anna", recipients) for recipients in (9, 1)] == [DUNNO, HOLD]
        in_the_way.rmdir()
        wait_until(here.prom.exists, "it is tried again")
        here.prom.unlink()
        wait_until(here.prom.exists, "and again")
        assert logged.lines.count(complaint) == 1


def test_a_state_directory_that_cannot_be_written_is_one_warning_and_mail_flows(policyd: Start) -> None:
    bind = 'mount --bind "$STATE_DIRECTORY" "$STATE_DIRECTORY" || exit'
    read_only = 'mount -o remount,bind,ro "$STATE_DIRECTORY" || exit'
    daemon = policyd(defaultquota=QUOTA, mounts=f"{bind}\n{read_only}")
    line = daemon.wait_for_log("no file of figures: ")
    assert line.level == "warning"
    assert "Read-only file system" in line.text
    assert [daemon.ask(recipient_count=recipients) for recipients in (9, 1, 10)] == [DUNNO, HOLD, REJECT]
