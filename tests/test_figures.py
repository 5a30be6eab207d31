"""The figures: the line of SIGUSR1 and `systemctl status`, and policyd.prom for Prometheus."""

from __future__ import annotations

import calendar
import contextlib
import math
import os
import re
import signal
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Callable

import pytest
from daemons import running_here
from hypothesis import given
from hypothesis import strategies as st
from servers import START_TIMEOUT_S, Database, Policyd, free_port, read_answer, request_bytes, wait_until
from stores import KeptLog, SQLiteStore

import policyd as module
from policyd import DUNNO, HOLD, HOLD_BLACKLISTED, REJECT, Figures

Start = Callable[..., Policyd]
Samples = dict[str, float]

QUOTA = 10
SERIES = [  # of requests: login, recipients, answer
    ("anna", 9, DUNNO),
    ("anna", 1, HOLD),
    ("anna", 10, REJECT),
    ("bert", 10, HOLD),
    ("bert", 1, HOLD),
    ("phished", 1, HOLD_BLACKLISTED),
    ("", 5, DUNNO),
    ("carl", 1, DUNNO),
]
FIGURES = "8 requests: 3 DUNNO, 4 HOLD, 1 REJECT; 3 logins held; 1 connections; p99 "


# ---- how fast: the 99th percentile ------------------------------------------------------------------


def exact_p99(times: list[float]) -> float:
    """Return the time that all kept to but the slowest one of a hundred."""
    return sorted(times)[len(times) - 1 - len(times) // 100]


@given(st.lists(st.floats(1e-6, 100), min_size=1, max_size=500))
def test_the_99th_percentile_is_never_too_low_and_at_most_a_tenth_too_high(times: list[float]) -> None:
    figures = Figures()
    for seconds in times:
        figures.count(DUNNO, seconds)
    assert exact_p99(times) * (1 - 1e-12) <= figures.p99_s() <= exact_p99(times) * 1.1


def test_the_99th_percentile_is_as_exact_from_a_microsecond_to_a_minute() -> None:
    for n in range(1800):
        seconds = 1e-6 * 1.01**n
        figures = Figures()
        figures.count(DUNNO, seconds)
        assert seconds * (1 - 1e-12) <= figures.p99_s() <= seconds * 1.1


@pytest.mark.parametrize(("slow", "found"), [(0, 0.001), (1, 0.001), (10, 0.001), (11, 2.0), (1000, 2.0)])
def test_one_slow_answer_in_a_hundred_does_not_show_and_more_do(slow: int, found: float) -> None:
    figures = Figures()
    for n in range(1000):
        figures.count(DUNNO, 2.0 if n < slow else 0.001)
    assert found <= figures.p99_s() <= found * 1.1


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9])
def test_an_answer_that_took_no_time_at_all_is_counted(seconds: float) -> None:
    """Clocks are coarse."""
    figures = Figures()
    figures.count(DUNNO, seconds)
    assert 0 < figures.p99_s() <= 1.1e-6


def test_without_answers_the_99th_percentile_is_0() -> None:
    assert Figures().p99_s() == 0


def test_the_99th_percentile_is_that_of_the_last_whole_minute() -> None:
    """In the first one it is that of the answers so far."""
    figures = Figures()
    figures.count(DUNNO, 1.0)
    assert 1 <= figures.p99_s() <= 1.1
    figures.turn_minute()
    for _ in range(1000):
        figures.count(DUNNO, 0.01)
    assert 1 <= figures.p99_s() <= 1.1
    figures.turn_minute()
    assert 0.01 <= figures.p99_s() <= 0.011
    figures.turn_minute()
    assert figures.p99_s() == 0
    assert figures.answered["DUNNO"] == 1001, "what is counted from the start is not of a minute"


def test_no_answer_is_missed_when_many_are_counted_at_once() -> None:
    figures = Figures()

    def count() -> None:
        for _ in range(2000):
            figures.count(REJECT, 0.01)
            figures.note("anna", REJECT, is_audit=True)
            figures.logins_held()
            figures.p99_s()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figures.answered == {"DUNNO": 0, "HOLD": 0, "REJECT": 8000}
    assert figures.spared == {"HOLD": 0, "REJECT": 8000}
    assert figures.logins_held() == 1


# ---- who is held ------------------------------------------------------------------------------------


def test_a_login_is_held_once_until_it_is_under_the_limit_again() -> None:
    figures = Figures()
    for login, decision in [("anna", HOLD), ("anna", REJECT), ("bert", HOLD_BLACKLISTED), ("carl", DUNNO)]:
        figures.note(login, decision, is_audit=False)
    assert figures.logins_held() == 2
    figures.note("anna", DUNNO, is_audit=False)
    assert figures.logins_held() == 1
    assert not any(figures.spared.values())


def test_a_login_that_was_held_a_day_ago_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Figures()
    figures.note("anna", HOLD, is_audit=False)
    monkeypatch.setattr("policyd.DAY_S", 0)
    assert figures.logins_held() == 0


# ---- the status line --------------------------------------------------------------------------------


def send_series(daemon: Policyd) -> None:
    """Send the series; when its last line is in the log, all of it is in the figures."""
    for login, recipients, answer in SERIES:
        assert daemon.ask(sasl_username=login, recipient_count=recipients) == answer
    daemon.wait_for_log("Updating db: carl/")


def status(daemon: Policyd) -> str:
    """Return the status line of this moment."""
    pattern = re.compile(r": \d+ requests: ")
    before = sum(bool(pattern.search(message)) for message in daemon.syslog.messages())
    daemon.signal(signal.SIGUSR1)
    return daemon.wait_for_log(pattern, count=before + 1).text


def test_the_status_line_tells_what_has_been_answered(policyd: Start) -> None:
    daemon = policyd(defaultquota=QUOTA, blacklist="phished")
    send_series(daemon)
    line = status(daemon)
    assert line.startswith(FIGURES)
    assert re.search(r"; p99 \d+\.\d ms; database up, 0 events in the journal", line)
    assert "audit" not in line


def test_systemd_is_told_the_same(policyd: Start) -> None:
    daemon = policyd(environment={"WATCHDOG_USEC": "100000"}, defaultquota=QUOTA, blacklist="phished")
    send_series(daemon)
    daemon.wait_for_notification(f"STATUS={FIGURES}", timeout=5)


def test_who_is_forgiven_is_not_among_the_logins_held(policyd: Start) -> None:
    """A postmaster has taken the events out of the store; the next message is under the limit."""
    daemon = policyd(defaultquota=QUOTA, blacklist="phished")
    send_series(daemon)
    SQLiteStore(daemon.statedir / "events.sqlite3").clear()
    assert "; 3 logins held; " in status(daemon)
    assert daemon.ask(sasl_username="anna") == DUNNO
    daemon.wait_for_log("Updating db: anna/alice@example.org/192.0.2.1/1/1")
    assert "; 2 logins held; " in status(daemon)


def test_the_status_line_tells_since_when_the_database_is_down(policyd: Start, database: Database) -> None:
    """In local time, with what waits for it; and when it is up again, that it is."""
    daemon = policyd(environment={"TZ": "UTC"}, defaultquota=QUOTA, **database.settings())
    daemon.ask()
    database.query("RENAME TABLE events TO away")
    before = time.time()
    for _ in range(2):
        daemon.ask()
    after = time.time()
    match = re.search(r"; database down since ([-0-9]+ [:0-9]+), 2 events in the journal", status(daemon))
    assert match
    since = calendar.timegm(time.strptime(match[1], "%Y-%m-%d %H:%M:%S"))
    assert before - 2 <= since <= after + 1
    database.query("RENAME TABLE away TO events")
    daemon.wait_for_log("ERROR while UPDATING db: over after")
    assert "; database up, 0 events in the journal" in status(daemon)


# ---- policyd.prom -----------------------------------------------------------------------------------

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
    "policyd_logins_held": 0,
    "policyd_database_up": 1,
    "policyd_database_down_seconds": 0,
    "policyd_journal_events": 0,
    "policyd_answer_p99_seconds": 0,
    "policyd_connections": 0,
}


class Here:
    """A daemon in this process that writes its figures a hundred times a second, and all about it."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.file = directory / "policyd.cfg"
        self.prom = directory / "policyd.prom"
        self.write_settings()

    def write_settings(self, **settings: object) -> None:
        """Write the settings file."""
        settings = {"defaultquota": QUOTA, "blacklist": "phished", **settings}
        settings = {"port": self.port, "statedir": self.file.parent, **settings}
        self.file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def connect(self) -> socket.socket:
        """Return a new connection to the daemon."""
        return socket.create_connection(("127.0.0.1", self.port), START_TIMEOUT_S)

    def ask(self, login: str, recipients: int) -> str:
        """Ask on a connection of its own."""
        with self.connect() as connection:
            connection.sendall(request_bytes(sasl_username=login, recipient_count=recipients))
            return read_answer(connection)

    def wait_for(self, expected: Samples) -> Samples:
        """Wait until the file has these samples; return all that it has then."""

        def found() -> Samples | None:
            samples = parse(self.prom.read_text()) if self.prom.exists() else {}
            return samples if samples.items() >= expected.items() else None

        samples: Samples = wait_until(found, f"policyd.prom has {expected}", timeout=10)
        return samples


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: KeptLog) -> Here:
    """What a daemon in this process needs."""
    monkeypatch.setattr("policyd.FIGURES_S", 0.01)
    return Here(tmp_path)


def test_the_file_is_there_from_the_start_on_for_everybody_to_read(policyd: Start) -> None:
    """Also to node_exporter, which is neither root nor policyd."""
    daemon = policyd()
    file = daemon.statedir / "policyd.prom"
    wait_until(file.exists, "the figures are written")
    assert parse(file.read_text()).items() >= NOTHING_YET.items()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert sorted(path.name for path in file.parent.glob("policyd.prom*")) == ["policyd.prom"]


def test_the_file_has_the_figures_of_the_status_line(here: Here) -> None:
    with running_here(here.file):
        for login, recipients, answer in SERIES:
            assert here.ask(login, recipients) == answer
        expected = {**NOTHING_YET, **answers("requests_total", DUNNO=3, HOLD=4, REJECT=1), "policyd_logins_held": 3}
        here.wait_for(expected)  # the 99th percentile is that of a period without answers then
        with here.connect(), here.connect():
            here.wait_for({**expected, "policyd_connections": 2})
        here.wait_for(expected)


def test_the_file_tells_how_fast_the_answers_were(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds, of the last period."""
    monkeypatch.setattr("policyd.FIGURES_S", 0.5)
    with running_here(here.file):
        here.wait_for(NOTHING_YET)
        here.ask("anna", 1)
        found = wait_until(lambda: parse(here.prom.read_text())["policyd_answer_p99_seconds"], "it took some time")
        assert 1e-6 < found < 10
        here.wait_for({"policyd_answer_p99_seconds": 0})


def test_the_file_tells_what_an_audit_has_let_through(here: Here) -> None:
    here.write_settings(mode="audit")
    with running_here(here.file):
        for login, recipients, _ in SERIES:
            assert here.ask(login, recipients) == DUNNO
        here.wait_for({
            **answers("requests_total", DUNNO=8, HOLD=0, REJECT=0),
            **answers("audited_total", HOLD=4, REJECT=1),
            "policyd_logins_held": 3,
        })


def test_the_file_tells_that_the_database_is_down(here: Here, database: Database, no_delay: None) -> None:
    here.write_settings(**database.settings())
    with running_here(here.file):
        here.wait_for({"policyd_database_up": 1})
        database.query("RENAME TABLE events TO away")
        for _ in range(2):
            here.ask("anna", 1)
        here.wait_for({"policyd_database_up": 0, "policyd_journal_events": 2})
        down = here.wait_for({"policyd_database_down_seconds": 1})
        assert (down["policyd_database_up"], down["policyd_journal_events"]) == (0, 2)
        database.query("RENAME TABLE away TO events")
        here.wait_for({"policyd_database_up": 1, "policyd_database_down_seconds": 0, "policyd_journal_events": 0})


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


def warnings(logged: KeptLog) -> list[str]:
    return [line.text for line in logged.lines if line.level == "warning"]


def test_a_file_that_cannot_be_written_is_one_warning_and_mail_flows(
    here: Here, logged: KeptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one a minute; and one more when it has been written in between."""
    attempts = []
    replace_file = module.replace_file

    def replace_and_tell(path: str, text: str, mode: int) -> None:
        attempts.append(path)
        replace_file(path, text, mode)

    def is_tried_again() -> None:
        already = len(attempts)
        wait_until(lambda: len(attempts) > already + 3, "it is tried again")

    def comes_in_the_way() -> bool:
        with contextlib.suppress(FileExistsError):
            in_the_way.mkdir()
        return in_the_way.is_dir()

    monkeypatch.setattr("policyd.replace_file", replace_and_tell)
    in_the_way = Path(f"{here.prom}.new")
    comes_in_the_way()
    with running_here(here.file):
        is_tried_again()
        assert [here.ask("anna", recipients) for recipients in (9, 1)] == [DUNNO, HOLD]
        assert warnings(logged) == [f"no file of figures: [Errno 21] Is a directory: '{in_the_way}'"]
        in_the_way.rmdir()
        here.wait_for(answers("requests_total", DUNNO=1, HOLD=1, REJECT=0))
        assert len(warnings(logged)) == 1
        wait_until(comes_in_the_way, "there is no file at this moment")
        is_tried_again()
        assert len(warnings(logged)) == 2


def test_a_state_directory_that_cannot_be_written_is_one_warning_and_mail_flows(policyd: Start) -> None:
    bind = 'mount --bind "$STATE_DIRECTORY" "$STATE_DIRECTORY" || exit'
    read_only = 'mount -o remount,bind,ro "$STATE_DIRECTORY" || exit'
    daemon = policyd(defaultquota=QUOTA, mounts=f"{bind}\n{read_only}")
    line = daemon.wait_for_log("no file of figures: ")
    assert line.level == "warning"
    assert "Read-only file system" in line.text
    assert [daemon.ask(recipient_count=recipients) for recipients in (9, 1, 10)] == [DUNNO, HOLD, REJECT]
    assert sum("no file of figures" in each.text for each in daemon.log_lines()) == 1
