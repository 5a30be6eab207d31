"""The figures: the line of SIGUSR1 and `systemctl status`, and policyd.prom for Prometheus."""

from __future__ import annotations

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
from servers import DUNNO, HOLD, REJECT, Database, Policyd, free_port, read_answer, request_bytes, wait_until
from stores import DAY_S, Clock, KeptLog, SQLiteStore

from policyd import Daemon, Figures

Samples = dict[str, float]

QUOTA = 10
SERIES = [  # of requests: login, recipients, answer
    ("anna", 9, DUNNO), ("anna", 1, HOLD), ("anna", 10, REJECT), ("bert", 10, HOLD), ("bert", 1, HOLD),
    ("phished", 1, "HOLD blacklisted"), ("", 5, DUNNO), ("carl", 1, DUNNO),
]  # fmt: skip


@given(st.lists(st.floats(0, 100), min_size=1, max_size=500))
def test_the_99th_percentile_is_what_99_of_100_answers_kept_to(times: list[float]) -> None:
    figures = Figures()
    for seconds in times:
        figures.count("DUNNO", seconds)
    p99 = figures.p99_s()
    assert p99 in times
    assert sum(seconds < p99 for seconds in times) < 0.99 * len(times) <= sum(seconds <= p99 for seconds in times)


def test_the_99th_percentile_is_that_of_the_last_10_000_answers_and_a_login_is_held_once() -> None:
    """Until it is under the limit again, or for a day."""
    clock = Clock()
    figures = Figures(clock)
    assert figures.p99_s() == 0, "without any"
    for n in range(11_000):
        figures.count("DUNNO", 9.0 if n < 1000 else 0.25)
    assert figures.p99_s() == 0.25
    assert figures.answered["DUNNO"] == 11_000, "what is counted is counted from the start"
    for login, action, held in [("anna", "HOLD", 1), ("anna", "REJECT", 1), ("bert", "HOLD", 2), ("anna", "DUNNO", 1)]:
        figures.note(login, action)
        assert figures.logins_held() == held
    assert not any(figures.spared.values())
    for seconds, held in ((DAY_S - 1, 1), (2, 0)):
        clock.now += seconds
        assert figures.logins_held() == held


FAMILY = (
    r"# HELP (policyd_[a-z0-9_]+) (?:[^\\\n]|\\[\\n])+\n# TYPE \1 (?:counter|gauge)\n"
    r"""(?:\1(?:\{[a-z_]+="[^"\\\n]*"\})? [0-9.e+-]+\n)+"""
)


def parse(text: str) -> Samples:
    """Return the samples of a file in Prometheus' text format 0.0.4, of which no letter may be wrong."""
    assert re.fullmatch(f"(?:{FAMILY})*", text), f"each has a line of HELP, one of TYPE and samples: {text!r}"
    kinds = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds), "promtool would complain"
    samples = re.findall(r"^(policyd_.*) (\S+)$", text, re.MULTILINE)
    assert (len(dict(kinds)), len(dict(samples))) == (len(kinds), len(samples)), "twice"
    return {name: float(value) for name, value in samples}


def answers(metric: str, **numbers: int) -> Samples:
    return {f'policyd_{metric}{{answer="{answer}"}}': number for answer, number in numbers.items()}


NOTHING_YET = {
    **answers("requests_total", DUNNO=0, HOLD=0, REJECT=0), **answers("audited_total", HOLD=0, REJECT=0),
    "policyd_logins_held": 0, "policyd_database_up": 1, "policyd_database_down_seconds": 0, "policyd_journal_events": 0,
    "policyd_answer_p99_seconds": 0, "policyd_connections": 0,
}  # fmt: skip


class Here:
    """What a daemon in this process needs, and a way to ask it."""

    def __init__(self, directory: Path) -> None:
        self.port, self.file, self.prom = free_port(), directory / "policyd.cfg", directory / "policyd.prom"
        self.write_settings()

    def write_settings(self, **settings: object) -> None:
        settings.update(defaultquota=QUOTA, blacklist="phished", port=self.port, statedir=self.file.parent)
        self.file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def figures(self, daemon: Daemon) -> Samples:
        daemon.publish()
        return parse(self.prom.read_text())

    def ask(self, login: str, recipients: int) -> str:
        with socket.create_connection(("127.0.0.1", self.port), 20) as connection:
            connection.sendall(request_bytes(sasl_username=login, recipient_count=recipients))
            return read_answer(connection)


@pytest.fixture
def here(tmp_path: Path, logged: KeptLog) -> Here:
    return Here(tmp_path)


@pytest.mark.parametrize("mode", ["enforce", "audit"])
def test_all_figures_are_those_of_what_was_answered(here: Here, mode: str) -> None:
    """In the line for the log and systemd, and for Prometheus; an audit says what it has let through."""
    here.write_settings(mode=mode)
    with running_here(here.file) as daemon, socket.create_connection(("127.0.0.1", here.port)):
        for login, recipients, answer in SERIES:
            assert here.ask(login, recipients) == (answer if mode == "enforce" else DUNNO)
        wait_until(lambda: "; 1 connections;" in daemon.status(), "all others have gone")
        text, found = "3 DUNNO, 4 HOLD, 1 REJECT", answers("requests_total", DUNNO=3, HOLD=4, REJECT=1)
        if mode == "audit":
            text = "8 DUNNO, 0 HOLD, 0 REJECT (audit: 4 would HOLD, 1 would REJECT)"
            found = answers("requests_total", DUNNO=8) | answers("audited_total", HOLD=4, REJECT=1)
        figures = here.figures(daemon)
        p99 = figures["policyd_answer_p99_seconds"]
        assert 1e-6 < p99 < 20
        found |= {"policyd_logins_held": 3, "policyd_connections": 1, "policyd_answer_p99_seconds": p99}
        assert figures == {**NOTHING_YET, **found}
        assert daemon.status() == (
            f"8 requests: {text}; 3 logins held; 1 connections; p99 {p99 * 1000:.1f} ms; database up, 0 events in the"
            f" journal; on inet:127.0.0.1:{here.port}"
        )


def test_who_is_forgiven_is_not_among_the_logins_held_once_he_sends_again(policyd: Callable[..., Policyd]) -> None:
    """The same line goes to the log and to systemd; the file is there from the start on, for everybody to read."""
    daemon = policyd(environment={"WATCHDOG_USEC": "100000"}, defaultquota=QUOTA)
    file = daemon.statedir / "policyd.prom"
    wait_until(file.exists, "the figures are written")
    assert parse(file.read_text()).items() >= NOTHING_YET.items()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [path.name for path in file.parent.glob("policyd.prom*")] == ["policyd.prom"]
    assert [daemon.ask(sasl_username=login, recipient_count=QUOTA) for login in ("anna", "bert")] == [HOLD] * 2
    line = status(daemon)
    assert line.level == "info"
    assert line.text.startswith("2 requests: 0 DUNNO, 2 HOLD, 0 REJECT; 2 logins held; 1 connections; p99 ")
    daemon.notify.wait_for("STATUS=2 requests: 0 DUNNO, 2 HOLD, 0 REJECT; 2 logins held;")
    SQLiteStore(daemon.statedir / "events.sqlite3").clear()
    assert "; 2 logins held; " in status(daemon).text
    assert daemon.ask(sasl_username="anna") == DUNNO
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
        (since,) = re.findall(r"; database down since ([-0-9]+ [:0-9]+), 2 events in the journal", daemon.status())
        assert before - 2 <= time.mktime(time.strptime(since, "%Y-%m-%d %H:%M:%S")) <= time.time() + 2
        wait_until(lambda: here.figures(daemon)["policyd_database_down_seconds"] >= 1, "a second has passed")
        assert here.figures(daemon).items() >= {"policyd_database_up": 0, "policyd_journal_events": 2}.items()
        database.query("RENAME TABLE away TO events")
        wait_until(lambda: "; database up, 0 events in the journal" in daemon.status(), "it is up again", 60)
        up = {"policyd_database_up": 1, "policyd_database_down_seconds": 0}
        assert here.figures(daemon).items() >= up.items()


def test_without_a_database_all_say_down_from_the_start_on(policyd: Callable[..., Policyd]) -> None:
    """The first status to systemd, the status line and the file of figures; also that the journal cannot be used."""
    daemon = policyd(dbhost="127.0.0.1", dbport=free_port(), dbname="x", dbuser="x")
    down = r"; database down since [-0-9]+ [:0-9]+, {} events in the journal{}; on"
    assert re.search(down.format(0, ""), daemon.notify.messages()[0])
    wait_until((daemon.statedir / "policyd.prom").exists, "the figures are written")
    assert parse((daemon.statedir / "policyd.prom").read_text())["policyd_database_up"] == 0
    assert re.search(down.format(0, ""), status(daemon).text)
    assert daemon.ask() == DUNNO
    assert re.search(down.format(1, ""), status(daemon).text)
    (daemon.statedir / "journal.sqlite3").unlink()
    (daemon.statedir / "journal.sqlite3").mkdir()
    assert daemon.ask() == DUNNO
    daemon.wait_for_log("no outage journal: ")
    assert re.search(down.format(r"\d", ", which CANNOT BE USED"), status(daemon).text)


def test_nobody_ever_reads_half_a_file_and_one_that_cannot_be_written_is_warned_of_once(
    here: Here, logged: KeptLog
) -> None:
    """Not once a minute; and mail flows."""
    in_the_way = here.prom.with_name("policyd.prom.new")
    complaint = ("warning", f"{here.prom} cannot be written: Is a directory")
    in_the_way.mkdir()
    with running_here(here.file) as daemon:
        wait_until(lambda: complaint in logged.lines, "it is warned of")
        daemon.publish()
        assert [here.ask("anna", recipients) for recipients in (9, 1)] == [DUNNO, HOLD]
        in_the_way.rmdir()
        daemon.publish()
        seen, is_over = set(), threading.Event()
        publish = iter(lambda: is_over.is_set() or daemon.publish(), True)
        writing = threading.Thread(target=lambda: [*publish], daemon=True)
        writing.start()
        while len(seen) < 10:  # a new one each time
            with here.prom.open() as file:
                assert parse(file.read()).keys() == NOTHING_YET.keys()
                seen.add(os.fstat(file.fileno()).st_mtime_ns)
        is_over.set()
        writing.join()
        assert logged.lines.count(complaint) == 1
