"""SIGHUP: the settings are read again, whole or not at all, and nobody who asks notices."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
from daemons import running_here
from servers import Policyd, free_port, read_answer, request_bytes, wait_until
from stores import KeptLog, SQLiteStore

from policyd import DAY_S, Settings, purge_daily

Start = Callable[..., Policyd]


def reload(daemon: Policyd) -> list[str]:
    """Send SIGHUP, wait until it has been acted upon, and return what systemd was told meanwhile."""
    before = daemon.notifications
    daemon.signal(signal.SIGHUP)
    readies = sum("READY=1" in message for message in before)
    daemon.wait_for_notification("READY=1", count=readies + 1)
    return [message for message in daemon.notifications[len(before):] if "WATCHDOG=1" not in message]


def logged(daemon: Policyd) -> list[tuple[str, str]]:
    """Return the level and the text of each line so far."""
    return [(line.level, line.text) for line in daemon.lines_so_far()]


def test_a_new_quota_applies_to_the_next_message(policyd: Start) -> None:
    daemon = policyd(defaultquota=10)
    assert daemon.ask(recipient_count=5) == "DUNNO"
    daemon.write_settings(defaultquota=5)
    reload(daemon)
    assert logged(daemon)[-1] == ("info", f"settings read again: {daemon.settings_file}")
    assert daemon.ask(recipient_count=1) == "HOLD quota exceeded"
    daemon.wait_for_log("DEFERRING overquota (6>5) for user alice")
    assert daemon.ask(recipient_count=4) == "REJECT max quota exceeded"


def test_a_higher_quota_sums_as_far_as_it_needs(policyd: Start) -> None:
    """Of a long history only as much is summed as decides; a higher quota needs more of it."""
    daemon = policyd(defaultquota=1)
    glued = b"".join(request_bytes() for _ in range(300))
    with daemon.connect() as connection:
        connection.sendall(glued)
        for _ in range(300):
            read_answer(connection)
    daemon.write_settings(defaultquota=1000)
    reload(daemon)
    daemon.ask(queue_id="")
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/301")


def test_new_lists_and_office_hours_apply_to_the_next_message(policyd: Start) -> None:
    daemon = policyd(defaultquota=1, blacklist="alice")
    assert daemon.ask() == "HOLD blacklisted"
    daemon.write_settings(defaultquota=1, whitelist="alice", whitelist_days="1-7", whitelist_hours="0-24")
    reload(daemon)
    assert daemon.ask() == "DUNNO"
    daemon.write_settings(defaultquota=1, whitelist="alice", whitelist_days="1-7", whitelist_hours="0-0")
    reload(daemon)
    assert daemon.ask() == "HOLD quota exceeded"


REACHES_10 = {"sasl_username": "alice", "recipient_count": 10}
REACHES_4 = {"sasl_username": "alice", "recipient_count": 4}
IS_LISTED = {"sasl_username": "phished"}
TO_THE_HELPDESK = {"sasl_username": "phished", "recipient": "helpdesk@example.org"}


@pytest.mark.parametrize(
    ("before", "after", "message", "answers"),
    [
        ({}, {"mode": "audit"}, REACHES_10, ("HOLD quota exceeded", "DUNNO")),
        ({"mode": "audit"}, {}, REACHES_10, ("DUNNO", "REJECT max quota exceeded")),
        ({}, {"mode": "audit"}, IS_LISTED, ("HOLD blacklisted", "DUNNO")),
        ({}, {"quota": "alice:unlimited"}, REACHES_10, ("HOLD quota exceeded", "DUNNO")),
        ({"quota": ["bert:5", "alice:5"]}, {"quota": "bert:5"}, REACHES_10, (*["REJECT max quota exceeded"] * 2,)),
        ({"quota": "alice:100"}, {"quota": "alice:15"}, REACHES_10, ("DUNNO", "HOLD quota exceeded")),
        ({"quota": "alice:100"}, {}, REACHES_10, ("DUNNO", "REJECT max quota exceeded")),
        ({}, {"rejectquota": 25}, REACHES_10, ("HOLD quota exceeded", "HOLD quota exceeded")),
        ({"rejectquota": 10}, {"rejectquota": 25}, REACHES_10, ("REJECT max quota exceeded", "HOLD quota exceeded")),
        (
            {"hold_message": "ask Anna"},
            {"hold_message": "ask Bert", "defaultquota": 15},
            REACHES_10,
            ("HOLD quota exceeded; ask Anna", "HOLD quota exceeded; ask Bert"),
        ),
        ({}, {"hold_message": "ask Bert"}, IS_LISTED, ("HOLD blacklisted", "HOLD blacklisted; ask Bert")),
        (
            {"rejectquota": 10, "reject_message": "ask Anna"},
            {},
            REACHES_10,
            ("REJECT max quota exceeded; ask Anna", "REJECT max quota exceeded"),
        ),
        ({}, {"hourquota": 8}, REACHES_4, ("DUNNO", "HOLD hour quota exceeded")),
        ({"hourquota": 4}, {}, REACHES_4, ("HOLD hour quota exceeded", "DUNNO")),
        ({"hourquota": 4}, {"hourquota": 9}, REACHES_4, ("HOLD hour quota exceeded", "DUNNO")),
        ({"hourquota": 4}, {"hourquota": 4, "quota": "alice:9:0"}, REACHES_4, ("HOLD hour quota exceeded", "DUNNO")),
        ({}, {"quota": "alice:9:8"}, REACHES_4, ("DUNNO", "HOLD hour quota exceeded")),
        ({}, {"always_allow": "helpdesk@example.org"}, TO_THE_HELPDESK, ("HOLD blacklisted", "DUNNO")),
        ({"always_allow": "helpdesk@example.org"}, {}, TO_THE_HELPDESK, ("DUNNO", "HOLD blacklisted")),
    ],
    ids=str,
)
def test_what_a_site_changes_of_the_rule_applies_to_the_next_message(
    policyd: Start, before: dict[str, Any], after: dict[str, Any], message: dict[str, object], answers: tuple[str, str]
) -> None:
    """The second message counts on top of the first one, whatever became of that."""
    always = {"defaultquota": 10, "blacklist": "phished"}
    daemon = policyd(**{**always, **before})
    assert daemon.ask(**message) == answers[0]
    daemon.write_settings(**{**always, **after})
    reload(daemon)
    assert daemon.ask(**message) == answers[1]


@pytest.mark.parametrize(
    ("before", "after", "answers"),
    [
        ({}, {"max_networks": 1}, ("DUNNO", "HOLD too many networks")),
        ({"max_networks": 1}, {}, ("HOLD too many networks", "DUNNO")),
        ({"max_networks": 1}, {"max_networks": 2}, ("HOLD too many networks", "DUNNO")),
        ({"max_networks": 1}, {"max_networks": 1, "networks_window": "10m"}, ("HOLD too many networks", "DUNNO")),
        ({"max_networks": 1, "networks_window": "10m"}, {"max_networks": 1}, ("DUNNO", "HOLD too many networks")),
        (
            {"max_networks": 1},
            {"max_networks": 1, "trusted_network": ["192.0.2.1", "2001:db8::/32"]},
            ("HOLD too many networks", "DUNNO"),
        ),
        (
            {"max_networks": 1, "trusted_network": "192.0.2.1"},
            {"max_networks": 1, "trusted_network": "192.0.2.2"},
            ("DUNNO", "HOLD too many networks"),
        ),
        ({"max_networks": 1}, {"max_networks": 1, "mode": "audit"}, ("HOLD too many networks", "DUNNO")),
    ],
    ids=str,
)
def test_what_a_site_changes_of_the_networks_applies_to_the_next_message(
    policyd: Start, before: dict[str, Any], after: dict[str, Any], answers: tuple[str, str]
) -> None:
    """Of a login that came from one network half an hour ago, and comes from another one now."""
    daemon = policyd(**before)
    SQLiteStore(daemon.statedir / "events.sqlite3").add([("alice", "", "198.51.100.1", 1)], age_s=1800)
    assert daemon.ask() == answers[0]
    daemon.write_settings(**after)
    reload(daemon)
    assert daemon.ask() == answers[1]


def test_a_higher_quota_of_its_own_sums_as_far_as_it_needs(policyd: Start) -> None:
    daemon = policyd(defaultquota=1)
    SQLiteStore(daemon.statedir / "events.sqlite3").add([("alice", "", "", 1)] * 500, age_s=60)
    assert daemon.ask() == "REJECT max quota exceeded"
    daemon.write_settings(defaultquota=1, quota="alice:503")
    reload(daemon)
    assert daemon.ask() == "DUNNO"
    assert daemon.ask() == "HOLD quota exceeded"
    daemon.wait_for_log("DEFERRING overquota (503>503) for user alice")


def test_a_mistake_in_a_quota_is_logged_and_the_old_quotas_stay(policyd: Start) -> None:
    daemon = policyd(quota=["alice:5", "bert:unlimited"])
    number = 1 + daemon.settings_file.read_text().splitlines().index("quota=bert:unlimited")
    daemon.write_settings(quota=["alice:100", "Alice@example.org:200"])
    reload(daemon)
    assert logged(daemon)[-1] == (
        "err",
        f"{daemon.settings_file}:{number}: alice has a quota= already; keep one of them;"
        " going on with the old settings",
    )
    assert daemon.ask(recipient_count=5) == "HOLD quota exceeded"
    assert daemon.ask(sasl_username="bert", recipient_count=5000) == "DUNNO"


class OnePurge(threading.Event):
    """The time until the daemon ends, in which it purges once."""

    waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        return self.waits > 1


def test_a_new_keep_days_applies_to_the_next_purge(
    tmp_path: Path, logged: KeptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same daemon: the purge asks for it each time."""
    purges: list[Any] = []
    monkeypatch.setattr("policyd.purge_daily", lambda *arguments: purges.append(arguments))
    file = tmp_path / "policyd.cfg"
    rest = f"port={free_port()}\nstatedir={tmp_path}\n"
    file.write_text(f"{rest}keep_days=5\n")
    store = SQLiteStore(tmp_path / "events.sqlite3")
    for days in (1, 2, 3, 4, 5, 6, 7, 8):
        store.add([("anna", "", "", days)], age_s=days * DAY_S - 60)
    with running_here(file) as here:
        wait_until(lambda: purges, "the thread that purges is there")
        repository, keep_days, _ = purges[0]
        for setting, kept in [("keep_days=5\n", 5), ("keep_days=3\n", 3), ("keep_days=1\n", 3), ("keep_days=2\n", 2)]:
            file.write_text(f"{rest}{setting}")
            lines = len(logged.lines)
            here.signal(signal.SIGHUP)
            wait_until(lambda lines=lines: len(logged.lines) > lines, "the settings are read again")
            purge_daily(repository, keep_days, OnePurge())
            assert [row[3] for row in store.rows()] == list(range(kept, 0, -1))
    assert [line.text for line in logged.lines if line.text.startswith("purged")] == [
        "purged 3 events older than 5 days",
        "purged 2 events older than 3 days",
        "purged 0 events older than 3 days",
        "purged 1 events older than 2 days",
    ]


def test_without_keep_days_a_week_is_kept(tmp_path: Path, logged: KeptLog) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    for days in (6, 7, 8):
        store.add([("anna", "", "", days)], age_s=days * DAY_S - 60)
    purge_daily(store.repository, lambda: Settings().keep_days, OnePurge())
    assert [row[3] for row in store.rows()] == [7, 6]


def test_whole_logins_apply_to_the_next_message(policyd: Start) -> None:
    daemon = policyd()
    daemon.write_settings(strip_domain="no")
    reload(daemon)
    daemon.ask(sasl_username="info@example.org")
    daemon.wait_for_log("Updating db: info@example.org/")


def test_a_mistake_is_logged_and_the_old_settings_stay(policyd: Start) -> None:
    """All of them: what stands before the mistake does not apply either."""
    daemon = policyd(defaultquota=10, blacklist="phished")
    daemon.write_settings(defaultquota=1, whitelist_hours="7 to 19")
    reload(daemon)
    number = 1 + daemon.settings_file.read_text().splitlines().index("whitelist_hours=7 to 19")
    assert logged(daemon)[-1] == (
        "err",
        f"{daemon.settings_file}:{number}: whitelist_hours=7 to 19: give FROM-TO between 0 and 24, for example 7-19;"
        " going on with the old settings",
    )
    assert daemon.ask(sasl_username="phished") == "HOLD blacklisted"
    assert daemon.ask(recipient_count=9) == "DUNNO"
    assert daemon.ask(recipient_count=1) == "HOLD quota exceeded"


def test_a_file_that_is_gone_is_logged_and_the_old_settings_stay(policyd: Start) -> None:
    daemon = policyd(defaultquota=1)
    daemon.settings_file.unlink()
    reload(daemon)
    assert logged(daemon)[-1] == (
        "err", f"{daemon.settings_file}: No such file or directory; going on with the old settings"
    )
    assert daemon.ask() == "HOLD quota exceeded"


def test_a_changed_port_is_said_to_need_a_restart(policyd: Start) -> None:
    """The rest of the file applies."""
    daemon = policyd(defaultquota=10)
    old_port, new_port = daemon.port, free_port()
    daemon.write_settings(defaultquota=1, port=new_port, bind="127.0.0.2")
    daemon.bind, daemon.port = "127.0.0.1", old_port
    reload(daemon)
    assert logged(daemon)[-2] == ("warning", "settings changed that need a restart: bind, port")
    assert daemon.ask() == "HOLD quota exceeded"
    reload(daemon)
    assert logged(daemon)[-2] == ("warning", "settings changed that need a restart: bind, port"), "still true"


def test_a_changed_password_is_said_to_need_a_restart_and_not_shown(policyd: Start) -> None:
    daemon = policyd()
    daemon.write_settings(port=daemon.port, dbname="x", dbuser="x", dbpass="hunter2")
    reload(daemon)
    assert logged(daemon)[-2] == (
        "warning", "settings changed that need a restart: dbhost, dbname, dbuser, dbpass"
    )
    assert daemon.ask() == "DUNNO"
    assert "hunter2" not in "".join(daemon.syslog.messages() + daemon.notifications)


def test_connections_stay_open_across_a_reload(policyd: Start) -> None:
    """Whoever asks all the while gets every answer, and the sum runs on."""
    daemon = policyd()
    reloaded = threading.Event()
    answers = 0

    def ask_until_reloaded() -> None:
        nonlocal answers
        with daemon.connect() as connection:
            while not reloaded.is_set() or not answers:
                connection.sendall(request_bytes(sasl_username="steady"))
                assert read_answer(connection) == "DUNNO"
                answers += 1
            connection.sendall(request_bytes(sasl_username="steady"))
            assert read_answer(connection) == "DUNNO"

    asking = threading.Thread(target=ask_until_reloaded)
    asking.start()
    try:
        for _ in range(5):
            reload(daemon)
    finally:
        reloaded.set()
        asking.join()
    daemon.wait_for_log(f"Updating db: steady/alice@example.org/192.0.2.1/1/{answers + 1}")


def test_a_rush_of_reloads_does_not_end_the_daemon(policyd: Start) -> None:
    """A signal that arrives while another is acted upon waits for its turn, whichever thread the kernel asks."""
    daemon = policyd(defaultquota=1)
    daemon.write_settings(port=daemon.port, defaultquota=2)
    for _ in range(500):
        daemon.signal(signal.SIGHUP)
    reload(daemon)
    assert daemon.ask() == "DUNNO"
    assert daemon.stop() == 0


def test_systemd_is_told_of_a_reload(policyd: Start) -> None:
    """As sd_notify(3) asks: when it begins, by the monotonic clock, and when it is over."""
    daemon = policyd()
    for mistake in ("", "quota=1\n"):  # over it is in any case
        daemon.settings_file.write_text(f"port={daemon.port}\n{mistake}")
        told = reload(daemon)
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=[0-9]{6,}", told[0])
        assert re.fullmatch(r"READY=1\nSTATUS=.*", told[1])
