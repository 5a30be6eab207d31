"""SIGHUP: the settings are read again, whole or not at all, and nobody who asks notices."""

from __future__ import annotations

import re
import signal
import types
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import Relay, complaints, reload
from daemons import Load
from servers import DUNNO, HOLD, REJECT, Policyd, free_port
from stores import Clock, KeptLog, Store, on_each_table, on_stores, read_settings

from policyd import DAY_S, Housekeeper, Policy, SQLiteRepository

Start = Callable[..., Policyd]


def reloaded(daemon: Policyd) -> list[tuple[str, str]]:
    """Reload; return the level and the text of each line so far, but for those of messages: they come after answers.

    systemd is told as sd_notify(3) asks: when it begins, by the monotonic clock, and when it is over, in any case.
    """
    begun, over = reload(daemon)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=[0-9]{6,}", begun)
    assert re.fullmatch(r"READY=1\nSTATUS=.*", over)
    return [(line.level, line.text) for line in daemon.lines_so_far() if not line.text.startswith("Updating db: ")]


def test_a_new_quota_applies_to_the_next_message(policyd: Start) -> None:
    """Also beside a setting that is gone, which is an error in the log."""
    daemon = policyd(defaultquota=10)
    assert daemon.ask(recipient_count=5) == DUNNO
    daemon.write_settings(defaultquota=5, max_networks=10)
    (level, text), last = reloaded(daemon)[-2:]
    assert (level, "max_networks= is gone; write instead: early_signs=audit" in text) == ("err", True)
    assert last == ("info", f"settings read again: {daemon.settings_file}")
    assert daemon.ask(recipient_count=1) == HOLD
    daemon.wait_for_log("DEFERRING overquota (6>5) for user alice")
    assert daemon.ask(recipient_count=4) == REJECT


REACHES_10, REACHES_4 = {"login": "alice", "recipient_count": 10}, {"login": "alice", "recipient_count": 4}
IS_LISTED = {"login": "phished"}
TO_THE_HELPDESK = {"login": "phished", "recipient": "helpdesk@example.org"}
HOUR, BLACKLISTED = "HOLD hour quota exceeded", "HOLD blacklisted"
ALWAYS = "whitelist_days=1-7 whitelist_hours=0-24"
CHANGES: list[tuple[str, str, dict[str, Any], str, str]] = [  # settings, and those after them; message; the answers
    ("", "mode=audit", REACHES_10, HOLD, DUNNO),
    ("mode=audit", "", REACHES_10, DUNNO, REJECT),
    ("", "mode=audit", IS_LISTED, BLACKLISTED, DUNNO),
    ("", "quota=alice:unlimited", REACHES_10, HOLD, DUNNO),
    ("quota=bert:5 quota=alice:5", "quota=bert:5", REACHES_10, REJECT, REJECT),
    ("quota=alice:100", "quota=alice:15", REACHES_10, DUNNO, HOLD),
    ("quota=alice:100", "", REACHES_10, DUNNO, REJECT),
    ("", "rejectquota=25", REACHES_10, HOLD, HOLD),
    ("rejectquota=10", "rejectquota=25", REACHES_10, REJECT, HOLD),
    ("hold_message=Anna", "hold_message=Bert defaultquota=15", REACHES_10, f"{HOLD}; Anna", f"{HOLD}; Bert"),
    ("", "hold_message=Bert", IS_LISTED, BLACKLISTED, f"{BLACKLISTED}; Bert"),
    ("rejectquota=10 reject_message=Anna", "", REACHES_10, f"{REJECT}; Anna", REJECT),
    ("", "hourquota=8", REACHES_4, DUNNO, HOUR),
    ("hourquota=4", "", REACHES_4, HOUR, DUNNO),
    ("hourquota=4", "hourquota=9", REACHES_4, HOUR, DUNNO),
    ("hourquota=4", "hourquota=4 quota=alice:9:0", REACHES_4, HOUR, DUNNO),
    ("", "quota=alice:9:8", REACHES_4, DUNNO, HOUR),
    ("", "always_allow=helpdesk@example.org", TO_THE_HELPDESK, BLACKLISTED, DUNNO),
    ("always_allow=helpdesk@example.org", "", TO_THE_HELPDESK, DUNNO, BLACKLISTED),
    ("", "strip_domain=no", {"login": "alice@example.org", "recipient_count": 9}, DUNNO, DUNNO),
    ("blacklist=alice", f"whitelist=alice {ALWAYS}", REACHES_10, BLACKLISTED, DUNNO),
    (f"whitelist=alice {ALWAYS}", f"whitelist=alice {ALWAYS[:-4]}0-0", REACHES_10, DUNNO, HOLD),
]


@pytest.mark.parametrize(("before", "after", "message", "first", "second"), CHANGES, ids=str)
@on_stores("SQLite", "schema.sql")
def test_what_a_site_changes_of_the_rule_applies_to_the_next_message(
    store: Store, logged: KeptLog, before: str, after: str, message: dict[str, Any], first: str, second: str
) -> None:
    """The second message counts on top of the first one, whatever became of that."""
    lines = [[*each.split(), "blacklist=phished", *["defaultquota=10"] * ("defaultquota" not in each)]
             for each in (before, after)]  # fmt: skip
    relay = Relay(store, logged, *lines[0])
    assert relay.ask(**message).answer == first
    relay.reload(*lines[1])
    assert relay.ask(**message).answer == second


EARLY = ["early_signs=yes", "keep_days=30", "max_places=1"]
PLACES = "HOLD too many places"


@pytest.mark.parametrize(("before", "after", "answers"), [
    ([], EARLY, (DUNNO, PLACES)),
    (EARLY, ["early_signs=no"], (PLACES, DUNNO)),
    (["early_signs=audit", *EARLY[1:]], EARLY, (DUNNO, PLACES)),
    (EARLY, ["early_signs=audit", *EARLY[1:]], (PLACES, DUNNO)),
    (EARLY, [*EARLY, "mode=audit"], (PLACES, DUNNO)),
    ([*EARLY[:2], "max_places=2"], EARLY, (DUNNO, PLACES)),
    ([*EARLY, "trusted_network=21.0.0.0/8"], EARLY, (DUNNO, PLACES)),
], ids=str)  # fmt: skip
@on_stores("SQLite", "schema.sql")
def test_what_a_site_changes_of_the_early_signs_applies_within_a_minute(
    store: Store, logged: KeptLog, before: list[str], after: list[str], answers: tuple[str, str]
) -> None:
    """Of a login that has come from one new place and comes from another one."""
    store.add([("bert", "", "192.0.2.1", 1)], age_s=4 * DAY_S)
    store.add([("alice", "", "20.0.0.1", 50)], age_s=600)
    relay = Relay(store, logged, *before)
    for lines, answer in zip((before, after), answers):
        relay.reload(*lines)
        relay.sweep()
        assert relay.ask("alice", client_address="21.0.0.1").answer == answer


@on_each_table
def test_a_higher_quota_sums_as_far_as_it_needs(store: Store, logged: KeptLog) -> None:
    """Of a long history only as much is summed as decides; a higher quota needs more of it."""
    store.add([("alice", "", "", 1)] * 500, age_s=60)
    relay = Relay(store, logged, "defaultquota=1")
    assert [relay.ask("alice").answer for _ in range(2)] == [REJECT] * 2
    relay.reload("defaultquota=1", "quota=alice:504")
    assert [relay.ask("alice").answer for _ in range(2)] == [DUNNO, HOLD]
    relay.reload("defaultquota=1000")
    assert relay.ask("alice").lines == ["Updating db: alice/alice@example.org/192.0.2.1/1/505"]


def test_a_mistake_or_no_file_is_logged_and_the_old_settings_stay(policyd: Start) -> None:
    """All of them: what stands before the mistake does not apply either."""
    daemon = policyd(defaultquota=10, blacklist="phished", quota="bert:unlimited")
    file = daemon.settings_file
    for mistake, said in [
        ("whitelist_hours=7 to 19", "whitelist_hours=7 to 19: give FROM-TO between 0 and 24, for example 7-19"),
        ("blacklist=boris # phished", "blacklist=boris # phished: a comment stands in a line of its own;"
         " remove what is behind the entry"),
        ("quota=A:2\nquota=a@b:3", "a has a quota= already; keep one of them"), ("max_networks=1\nfrobnicate=1", ""),
    ]:  # fmt: skip
        daemon.write_settings(f"defaultquota=1\nport={daemon.port}\nstatedir={daemon.statedir}\n{mistake}\n")
        level, text = reloaded(daemon)[-1]
        assert (level, text.endswith("; going on with the old settings")) == ("err", True)
        assert text.startswith(f"{file}:{3 + len(mistake.splitlines())}: {said}")
    file.unlink()
    expected = f"{file}: No such file or directory; going on with the old settings"
    assert reloaded(daemon)[-1] == ("err", expected)
    assert daemon.ask(sasl_username="phished") == BLACKLISTED
    assert daemon.ask(sasl_username="bert", recipient_count=5000) == DUNNO
    assert [daemon.ask(recipient_count=count) for count in (9, 1)] == [DUNNO, HOLD]


def test_what_needs_a_restart_is_said_and_no_password_shown(policyd: Start) -> None:
    """The rest of the file applies."""
    daemon = policyd(defaultquota=10)
    port, needs = daemon.port, []
    database = {"port": port, "dbname": "x", "dbuser": "x", "dbpass": "hunter2"}
    for settings, names in (({"port": free_port(), "bind": "127.0.0.2"}, "bind, port"),
                            (database, "dbhost, dbname, dbuser, dbpass")):  # fmt: skip
        daemon.write_settings(defaultquota=1, **settings)
        daemon.bind, daemon.port = "127.0.0.1", port
        for _ in range(2):  # it is still true the second time
            reload(daemon)
            needs.append(f"settings changed that need a restart: {names}")
            assert complaints(daemon) == needs
    assert daemon.ask() == HOLD
    assert "hunter2" not in "".join(daemon.syslog.messages() + daemon.notifications)


def housekeeper(repository: Any) -> tuple[Policy, Callable[..., None]]:
    """Return a policy and a function that lets so many seconds pass and has done once what is due then."""
    clock, policy = Clock(), Policy(read_settings(), None, lambda _: None)  # type: ignore[arg-type]
    housekeeper = Housekeeper(repository, None, policy, lambda: True, clock)  # type: ignore[arg-type]

    def run_after(seconds: float) -> None:
        clock.now += seconds
        waits = iter([False, True])
        housekeeper.run(types.SimpleNamespace(wait=lambda timeout: next(waits)))  # type: ignore[arg-type]

    return policy, run_after


@on_each_table
def test_a_new_keep_days_applies_to_the_next_purge(store: Store, logged: KeptLog) -> None:
    """Without it a week is kept; a purge that fails is tried again after an hour, and is not the end."""
    for days in range(1, 10):
        store.add([("anna", "", "", days)], age_s=days * DAY_S - 60)
    policy, run_after = housekeeper(store.another())
    for keep_days, kept in [("", 7), ("keep_days=5", 5), ("keep_days=2", 2), ("keep_days=4", 2)]:
        policy.settings = read_settings(*[keep_days] * bool(keep_days))
        before = len(store.rows())
        run_after(DAY_S + 1)
        assert [row[3] for row in store.rows()] == list(range(kept, 0, -1))
        days = policy.settings.keep_days
        assert logged.lines[-1] == ("info", f"purged {before - kept} events older than {days} days")
    lines = len(logged.lines)
    run_after(DAY_S - 10)
    assert len(logged.lines) == lines, "once a day"


def test_a_purge_that_fails_is_tried_again_after_an_hour(tmp_path: Path, logged: KeptLog) -> None:
    _, run_after = housekeeper(SQLiteRepository(str(tmp_path / "nowhere" / "events.sqlite3")))
    for seconds, lines in ((30, 0), (31, 1), (3500, 1), (101, 2)):
        run_after(seconds)
        assert len(logged.lines) == lines
    assert all(line.text.startswith("old events stay for now: ") for line in logged.lines)


def test_connections_stay_open_across_a_rush_of_reloads(policyd: Start) -> None:
    """Whoever asks all the while gets every answer, and the sum runs on.

    A signal that arrives while another is acted upon waits for its turn, whichever thread the kernel asks.
    """
    daemon = policyd(defaultquota=1)
    daemon.write_settings(defaultquota=10**6)
    reload(daemon)
    with Load([daemon], 1, "steady") as load:
        for _ in range(5):
            load.wait_for_more(1)
            reload(daemon)
        for _ in range(500):
            daemon.signal(signal.SIGHUP)
        reload(daemon)
        load.wait_for_more(1)
    load.assert_no_request_failed()
    assert {answer.action for answer in load.answers} == {DUNNO}
    daemon.wait_for_log(f"Updating db: steady/alice@example.org/192.0.2.1/1/{len(load.answers)}")
    assert daemon.stop() == 0
