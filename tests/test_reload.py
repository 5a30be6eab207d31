"""SIGHUP: the settings are read again, whole or not at all, and nobody who asks notices."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import Relay, complaints, reload
from daemons import Load
from servers import DUNNO, HOLD, REJECT, Policyd, free_port
from stores import KeptLog, Store, on_each_table, on_stores, read_settings

from policyd import DAY_S, HOUR_S, Housekeeper, Policy, SQLiteRepository


def reloaded(daemon: Policyd) -> list[tuple[str, str]]:
    """Reload; return the level and the text of each line so far, but for those of messages: they come after answers.

    systemd is told as sd_notify(3) asks: when it begins, by the monotonic clock, and when it is over, in any case.
    """
    begun, over = reload(daemon)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=[0-9]{6,}", begun)
    assert re.fullmatch(r"READY=1\nWATCHDOG=1\nSTATUS=.*", over)
    return [(line.level, line.text) for line in daemon.lines_so_far() if not line.text.startswith("Updating db: ")]


def test_a_new_quota_applies_to_the_next_message(policyd: Callable[..., Policyd]) -> None:
    """Also beside a setting that is gone, which is an error in the log."""
    daemon = policyd(defaultquota=10)
    assert daemon.ask(recipient_count=5) == DUNNO
    daemon.write_settings(defaultquota=5, max_networks=10)
    (level, text), last = reloaded(daemon)[-2:]
    assert (level, "max_networks= is gone; write instead: early_signs=audit" in text) == ("err", True)
    assert last == ("info", f"settings read again: {daemon.settings_file}")
    assert [daemon.ask(recipient_count=count) for count in (1, 4)] == [HOLD, REJECT]


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
    ("quota=alice:100", "quota=alice:15", REACHES_10, DUNNO, HOLD),
    ("rejectquota=10", "rejectquota=25", REACHES_10, REJECT, HOLD),
    ("hold_message=Anna", "hold_message=Bert defaultquota=15", REACHES_10, f"{HOLD}; Anna", f"{HOLD}; Bert"),
    ("rejectquota=10 reject_message=Anna", "", REACHES_10, f"{REJECT}; Anna", REJECT),
    ("", "hourquota=8", REACHES_4, DUNNO, HOUR),
    ("hourquota=4", "hourquota=4 quota=alice:9:0", REACHES_4, HOUR, DUNNO),
    ("", "quota=alice:9:8", REACHES_4, DUNNO, HOUR),
    ("", "always_allow=helpdesk@example.org", TO_THE_HELPDESK, BLACKLISTED, DUNNO),
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


@pytest.mark.parametrize(("other", "back"), [
    ([], DUNNO), (["early_signs=no"], DUNNO), (["early_signs=audit", *EARLY[1:]], DUNNO),
    ([*EARLY, "mode=audit"], DUNNO),
    ([*EARLY[:2], "max_places=2"], PLACES), ([*EARLY, "trusted_network=21.0.0.0/8"], PLACES),  # the incident lasts
], ids=str)  # fmt: skip
@on_stores("SQLite", "schema.sql")
def test_what_a_site_changes_of_the_early_signs_applies_within_a_minute(
    store: Store, logged: KeptLog, other: list[str], back: str
) -> None:
    """Of a login that has come from one new place and comes from another one; there and back."""
    store.add([("bert", "", "192.0.2.1", 1)], age_s=4 * DAY_S)
    store.add([("alice", "", "20.0.0.1", 50)], age_s=600)
    relay = Relay(store, logged, *other)
    for lines, answer in ((other, DUNNO), (EARLY, PLACES), (other, back)):
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


def test_a_mistake_or_no_file_is_logged_and_the_old_settings_stay(policyd: Callable[..., Policyd]) -> None:
    """All of them: what stands before the mistake does not apply either."""
    daemon = policyd(defaultquota=10, blacklist="phished", quota="bert:unlimited")
    file = daemon.settings_file
    for mistake, said in [
        ("whitelist_hours=7 to 19", "whitelist_hours=7 to 19: give FROM-TO, say 7-19"),
        ("blacklist=boris # phished", "blacklist=boris # phished: give one login, sender, @domain, "),
        ("quota=A:2\nquota=a@b:3", "a has a quota= already; keep one of them"), ("max_networks=1\nfrobnicate=1", ""),
    ]:  # fmt: skip
        file.write_text(f"defaultquota=1\nport={daemon.port}\nstatedir={daemon.statedir}\n{mistake}\n")
        level, text = reloaded(daemon)[-1]
        assert (level, text.endswith("; going on with the old settings")) == ("err", True)
        assert text.startswith(f"{file}:{3 + len(mistake.splitlines())}: {said}")
    file.unlink()
    expected = f"{file}: No such file or directory; going on with the old settings"
    assert reloaded(daemon)[-1] == ("err", expected)
    assert daemon.ask(sasl_username="phished") == BLACKLISTED
    assert daemon.ask(sasl_username="bert", recipient_count=5000) == DUNNO
    assert [daemon.ask(recipient_count=count) for count in (9, 1)] == [DUNNO, HOLD]


def test_what_needs_a_restart_is_said_and_no_password_shown(policyd: Callable[..., Policyd]) -> None:
    """The rest of the file applies."""
    daemon = policyd(defaultquota=10)
    port = daemon.port
    changed = {"port": free_port(), "bind": "127.0.0.2", "dbname": "x", "dbuser": "x", "dbpass": "hunter2"}
    daemon.write_settings(defaultquota=1, **changed)
    daemon.bind, daemon.port = "127.0.0.1", port
    needs = "settings changed that need a restart: bind, port, dbname, dbuser, dbpass"
    for number in (1, 2):  # it is still true the second time
        reload(daemon)
        assert complaints(daemon) == [needs] * number
    assert daemon.ask() == HOLD
    assert "hunter2" not in "".join(daemon.syslog.messages() + daemon.notify.messages())


@on_each_table
def test_a_new_keep_days_applies_to_the_next_purge(store: Store, logged: KeptLog, tmp_path: Path) -> None:
    """Without it a week is kept; a purge that fails is tried again after an hour, and is not the end."""
    policy = Policy(read_settings(), None, lambda _: None)  # type: ignore[arg-type]
    nowhere = SQLiteRepository(str(tmp_path / "nowhere" / "events.sqlite3"))
    assert Housekeeper(nowhere, None, policy).purge() == HOUR_S  # type: ignore[arg-type]
    (line,) = logged.lines
    assert line.text.startswith("old events stay for now: ")
    for days in range(1, 10):
        store.add([("anna", "", "", days)], age_s=days * DAY_S - 60)
    housekeeper = Housekeeper(store.another(), None, policy)  # type: ignore[arg-type]
    for keep_days, kept in [("", 7), ("keep_days=5", 5), ("keep_days=2", 2), ("keep_days=4", 2)]:
        policy.settings = read_settings(keep_days)
        before = len(store.rows())
        assert housekeeper.purge() == DAY_S
        assert [row[3] for row in store.rows()] == list(range(kept, 0, -1))
        days = policy.settings.keep_days
        assert logged.lines[-1] == ("info", f"purged {before - kept} events older than {days} days")


def test_connections_stay_open_across_a_rush_of_reloads(policyd: Callable[..., Policyd]) -> None:
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
    assert {answer.action for answer in load.answers} == {DUNNO}
    daemon.wait_for_log(f"Updating db: steady/alice@example.org/192.0.2.1/1/{len(load.answers)}")
    assert daemon.stop() == 0
