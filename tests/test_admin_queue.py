"""policyd-admin held, release, delete and trace: a message belongs to its login, and only what is named is touched."""

from __future__ import annotations

import gzip
import lzma
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripting
from asking import send
from scripting import DAY_S, Desk, commands_in, journal
from servers import Policyd, Postfix, Start, program, wait_until
from stores import SQLiteStore

from policyd import printable

QUOTA = 3
NO_LOGIN = "(no login)"


def submit(postfix: Postfix, login: str | bool, **message: Any) -> str:
    """Send one message and return its queue id."""
    with postfix.session(login=login) as session:
        return send(session, **message).queue_id


def put_on_hold(postfix: Postfix, login: str | bool = False, **message: Any) -> str:
    """Let a person hold a message that waits."""
    queue_id = deferred(postfix, login, **message)
    postfix._run("postsuper", "-h", queue_id)
    return queue_id


def deferred(postfix: Postfix, login: str | bool, **message: Any) -> str:
    """Send a message that cannot be delivered now."""
    queue_id = submit(postfix, login, domain="later.example.net", **message)
    wait_until(lambda: postfix.queue().get(queue_id) == "deferred", "the message is deferred")
    return queue_id


def by_login(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for block in text.split("\n\n"):
        heading = re.match(r"(.+?):\n\d+ \w+.*\n", block.lstrip("\n"))
        ids = re.findall(r"^([0-9A-Za-z]{6,})\s+(?:hold|deferred|active|incoming) ", block, re.MULTILINE)
        if heading and ids:
            found[heading[1]] = set(ids)
    return found


def wrapped(name: str, directory: Path, first: str) -> dict[str, str]:
    """Return an environment in which a program does something else `first`."""
    return scripting.program(directory, name, f'{first}\nexec {program(name, "postfix")} "$@"')


@pytest.fixture
def hold(postfix: Postfix, policyd: Start) -> Iterator[Policyd]:
    """An empty queue, and a daemon that holds alice's mail from the quota on, and all of boris and carla."""
    postfix.delete("ALL")
    yield policyd(port=postfix.policy_port, defaultquota=QUOTA, rejectquota=100_000, blacklist=postfix.logins[1:])
    postfix.delete("ALL")


@pytest.fixture
def desk(postfix: Postfix, hold: Policyd) -> Desk:
    """policyd-admin, with that daemon's settings and that Postfix."""
    return Desk(hold.settings_file, MAIL_CONFIG=str(postfix.directory / "etc"))


def test_each_queued_message_stands_under_its_login(postfix: Postfix, hold: Policyd, desk: Desk) -> None:
    """What is on hold; of a login that is named, whatever queue it waits in."""
    assert desk("held").startswith("nothing waits\n")
    assert desk.objects("held") == []
    alice = {deferred(postfix, "alice")}
    submit(postfix, "alice", recipients=QUOTA - 2)  # passes
    alice.add(submit(postfix, "alice", recipients=2))
    text = "Subject: =?utf-8?q?caf=C3=A9?=\r\n a\x1b[31m\r\n\r\n" + "x" * 20000
    boris = submit(postfix, "boris", sender="boris@example.org", recipients=9, text=text)
    endless = "Subject: hello\r\n " + "=?a?b?b " * 9000 + "\r\n\r\nHello\r\n"  # ten seconds to decode as a whole
    carla = submit(postfix, "carla@example.org", sender="", text=endless)
    person = put_on_hold(postfix, sender="someone@example.com")
    submit(postfix, False, domain="later.example.net")  # bounces and inbound mail: none of our business
    text = desk("held")
    assert by_login(text) == {"boris": {boris}, "alice": alice, "carla": {carla}, NO_LOGIN: {person}}
    assert re.search(rf"^{boris} +hold +0\.0h +20k +9 127\.0\.0\.1 +\?\n  boris@example\.org: caf\\xe9 a\\x1b\[31m$",
                     text, re.MULTILINE), text  # fmt: skip
    assert "  MAILER-DAEMON: hello =?a?b?b" in text
    assert re.search(r"^ +9 recipients from boris@example\.org$", text, re.MULTILINE)
    assert [command.split()[1] for command in commands_in(text)] == ["user", "release", "delete"]
    rows = desk.objects("held")
    assert [row["login"] for row in rows] == ["boris", "alice", "carla", ""]
    long = len(rows[2]["queued"][0]["subject"])
    assert (rows[1]["recipients"], rows[1]["quota"], rows[1]["state"], long) == (4, QUOTA, "HOLD", 2000)
    assert {message["queue_id"] for message in rows[1]["queued"]} == alice
    text = desk("held", "ALICE", "Carla@example.com", "nobody")
    assert by_login(text) == {"alice": alice, "carla": {carla}}
    assert "alice:\n1 deferred, 1 hold\n" in text
    assert "nobody:\nnothing\n" in text
    for login in ("release", "--yes", "-x", "a:"):
        assert f"\n{login}:\nnothing\n" in desk("held", "--", login)
    hold.settings_file.write_text(f"strip_domain = No\nstatedir={hold.statedir}\n")
    assert by_login(desk("held", "carla@example.org")) == {"carla@example.org": {carla}}


def test_whose_decision_it_was_is_told_as_far_as_the_log_tells(postfix: Postfix, tmp_path: Path, desk: Desk) -> None:
    other, alice = put_on_hold(postfix, "alice"), submit(postfix, "alice", recipients=QUOTA)
    boris, person = submit(postfix, "boris"), put_on_hold(postfix)
    environment = journal(
        tmp_path,
        f"policyd[1]: DEFERRING overquota (3>3) for user alice using a from ip [192.0.2.1], queue_id={alice}",
        f"policyd[1]: Holding blacklisted user: boris/x, queue_id={other}/192.0.2.1/1, queue_id={boris}",
        f"policyd[1]: REJECTING overquota (9>2x3) for user alice using a from ip [192.0.2.1], queue_id={other}",
    )
    rows = desk.objects("held", **environment)
    rules = {message["queue_id"]: message["why"] for row in rows for message in row["queued"]}
    assert rules == {alice: "overquota", boris: "blacklisted", other: "not policyd", person: "not policyd"}
    assert "(1 not held by policyd)\n" in desk("release", "alice", **environment)
    lines = tmp_path / "lines"  # of a log that does not go back that far; without a login it was not policyd anyhow
    lines.write_text(re.sub(r"^\d+", "2099", lines.read_text(), flags=re.MULTILINE))
    found = {each["why"] for row in desk.objects("held", **environment) for each in row["queued"]}
    assert found == {*rules.values(), "?"}


def test_three_hundred_messages_are_read_in_a_few_calls(postfix: Postfix, tmp_path: Path, desk: Desk) -> None:
    sent = {}
    for login in ("alice", "boris", "carla@example.org"):
        with postfix.session(login=login) as session:
            sent[login.partition("@")[0]] = {
                send(session, f"{login[0]}{n}@example.org", QUOTA).queue_id for n in range(100)
            }
    calls = tmp_path / "calls"
    environment = wrapped("postcat", tmp_path, f'echo >>"{calls}"')
    began = time.monotonic()
    assert by_login(desk("held", *sent, **environment)) == sent
    assert time.monotonic() - began < 10, "a second, on a machine with nothing else to do"
    assert len(calls.read_text()) <= 4
    text = desk("held")
    assert [len(ids) for ids in by_login(text).values()] == [10, 10, 10]
    assert text.count("\nand 90 more\n") == 3


def test_what_leaves_the_queue_meanwhile_is_left_out_and_stays_where_it_is(
    postfix: Postfix, tmp_path: Path, desk: Desk
) -> None:
    sent = [submit(postfix, "boris") for _ in range(4)]
    postsuper = program("postsuper", "postfix")
    first = f"{postsuper} -d {sent[1]}; {postsuper} -H {sent[2]}; {postsuper} -d {sent[2]}"
    environment = wrapped("postcat", tmp_path, f'if mkdir "{tmp_path}/done"; then {first}; fi 2>/dev/null')
    assert by_login(desk("held", **environment)) == {"boris": {sent[0], sent[3]}}
    environment = wrapped("postsuper", tmp_path, f"{postsuper} -d {sent[0]} 2>/dev/null")
    done = desk("delete", "boris", "--yes", **environment)
    assert "\ndeleted 1 of 2 messages; the rest had left before\n" in done


def test_it_works_while_postfix_and_the_database_are_down(postfix: Postfix, hold: Policyd, desk: Desk) -> None:
    boris = submit(postfix, "boris")
    hold.settings_file.write_text("dbhost=127.0.0.1:1\ndbname=x\ndbuser=x\n")
    postfix.stop()
    try:
        assert by_login(desk("held")) == {"boris": {boris}}
    finally:
        postfix.launch()
    assert "deleted 1 of 1 messages" in desk("delete", "boris", "--yes")


def test_nobody_can_put_a_message_under_another_login_or_beside_another_id(postfix: Postfix, desk: Desk) -> None:
    boris, alice = [submit(postfix, "boris") for _ in range(2)], submit(postfix, "alice", recipients=QUOTA)
    person = put_on_hold(postfix)
    forged = "".join(
        f"\n*** MESSAGE FILE END hold/{queue_id} ***\n*** ENVELOPE RECORDS hold/{queue_id} ***\n"
        "message_arrival_time: Sun Nov 22 13:31:10 2020\nnamed_attribute: sasl_username=alice\nsender: a\n"
        for queue_id in (*boris, person)
    )
    xtext = "".join(character if character.isalnum() else f"+{ord(character):02X}" for character in forged)  # RFC 3461
    parameter = f"ORCPT=rfc822;x{xtext}"
    lines = "sasl_username=alice\r\nnamed_attribute: sasl_username=alice\r\n"
    # Postfix decodes the original recipient, line ends included, and keeps it in the envelope.
    persons = [person, put_on_hold(postfix, parameter=parameter),
               put_on_hold(postfix, text=f"sasl_username: alice\r\n\r\n{lines}")]  # fmt: skip
    for message in (
        {"parameter": parameter},
        {"text": f"Subject: x\r\nsasl_username: alice\r\n\r\n{lines}{forged}\r\n"},
        {"text": f"*** ENVELOPE RECORDS hold/{boris[0]} ***: x\r\nSubject: {lines}\r\n"},
        {"sender": rf'"\"}}], \"queue_name\": \"hold\", \"queue_id\": \"{alice}\", \"sender\": \"x"@example.org'},
        {"sender": r'"a\\\", \"recipients\": [{\"address\": \"{\"address\": \"b\\"@example.org'},
        {"sender": '"\x1b]0;owned\x07\x7f $(touch x)`touch x`;%s%n\\\\"@example.org'},
        {"sender": "x" * 60 + "@example.org"}, {"sender": "\u2028\x85@example.org"},
    ):
        boris.append(submit(postfix, "boris", **message))
    assert by_login(desk("held")) == {"alice": {alice}, "boris": set(boris), NO_LOGIN: set(persons)}


def test_without_yes_it_only_says_what_it_would_do(postfix: Postfix, hold: Policyd, desk: Desk) -> None:
    alice = submit(postfix, "alice", recipients=QUOTA)
    boris = [submit(postfix, "boris", sender=f"b{n}@example.org") for n in range(12)]
    files = list((postfix.directory / "queue" / "hold").rglob("*"))
    before = [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files]
    for command in ("release", "delete"):
        text = desk(command, "Boris@example.com")
        assert by_login(text) == {"boris": set(boris)}
        assert f"\n{command}: 12 hold\n" in text
        assert by_login(desk(command, boris[3], alice, boris[3])) == {"alice": {alice}, "boris": {boris[3]}}
        text = desk(command, "boris", "--sender", "<B7@example.org>")
        assert by_login(text) == {"boris": {boris[7]}}
        shown = f"policyd-admin {command} --yes -c {hold.settings_file} boris --sender '<B7@example.org>'"
        assert commands_in(text) == [shown]
    assert [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files] == before
    assert postfix.queue() == dict.fromkeys([alice, *boris], "hold")


def test_what_is_released_is_delivered_now_and_no_other(postfix: Postfix, desk: Desk) -> None:
    """By release, and in one command from the phone call on by forgive."""
    others = {submit(postfix, "boris", text="Subject: boris stays\r\n\r\n"), deferred(postfix, False)}
    for number in (0, 1):
        submit(postfix, "alice", recipients=QUOTA - number, text=f"Subject: alice goes {number}\r\n\r\n")
    done = desk("release", "alice", "--yes")
    assert re.search(r"released 2 of 2 messages\n(.*\n)*This ends no incident; to begin anew \(a blacklist holds", done)
    wait_until(lambda: set(postfix.queue()) == others, "the released messages are delivered")
    delivered = re.findall(r"Subject: (alice goes .|boris stays)\n", "".join(postfix.delivered()))
    assert {*delivered} == {"alice goes 0", "alice goes 1"}
    assert desk.report("alice")["state"].startswith("HOLD")
    submit(postfix, "alice", recipients=QUOTA, text="Subject: honest\r\n\r\n")
    assert "alice: released: 1 hold" in desk("forgive", "alice", "--release")
    done = desk("forgive", "alice", "--release", "--yes")
    assert "\nDone: alice has 0 recipients now.\nok: messages go on\nreleased 1 of 1 messages\n" in done
    wait_until(lambda: any("Subject: honest\n" in text for text in postfix.delivered()), "it is delivered")
    submit(postfix, "alice", recipients=QUOTA - 1)
    submit(postfix, "carla@example.org")
    assert "\nreleased 1 of 1 messages\n" in desk("forgive", desk.report("carla")["login"], "--release", "--yes")
    wait_until(lambda: set(postfix.queue()) == others, "what comes next passes, and what was never counted goes")


def test_what_waits_in_any_queue_is_deleted_and_what_others_have_stays(postfix: Postfix, desk: Desk) -> None:
    inbound, person = deferred(postfix, False), put_on_hold(postfix)
    deferred(postfix, "alice")
    submit(postfix, "alice", recipients=QUOTA)
    boris = [submit(postfix, "boris") for _ in range(2)]
    assert "deleted 3 of 3 messages\n" in desk("delete", "alice", boris[1], "--yes")
    assert postfix.queue() == {inbound: "deferred", person: "hold", boris[0]: "hold"}


def test_nothing_is_done_when_one_argument_is_wrong(postfix: Postfix, desk: Desk) -> None:
    boris, person = submit(postfix, "boris"), put_on_hold(postfix)
    words = ("anna", NO_LOGIN, "ALL", "*", "-", "boris\nboris", "\x1b[31m\\é'\"", f"{boris}0")
    wrong = {**dict.fromkeys(words, "nothing of this login or queue id is there to {}"),
             person: "no login sent it, policyd has not held it: use postsuper"}  # fmt: skip
    for command in ("release", "delete"):
        for word, reason in wrong.items():
            line = desk.refusal(command, "--yes", "--", "boris", word, "boris")
            assert line == f"{printable(word)}: {reason.format(command)}; nothing was changed"
    assert postfix.queue() == dict.fromkeys([boris, person], "hold")


def test_a_postfix_that_cannot_be_asked_is_said(hold: Policyd, postfix: Postfix, tmp_path: Path, desk: Desk) -> None:
    alice = submit(postfix, "alice", recipients=QUOTA)
    before = postfix.queue()
    environment = wrapped("postcat", tmp_path, "echo 'postcat: fatal: record read error' >&2; exit 1")
    for arguments in (["held"], ["delete", "alice", "--yes"], ["forgive", "alice", "--release", "--yes"]):
        line = desk.refusal(*arguments, MAIL_CONFIG="/nonexistent")
        assert line == "postqueue: fatal: open /nonexistent/main.cf: No such file or directory"
        assert desk.refusal(*arguments, **environment) == f"{alice}: postcat: fatal: record read error"
    assert postfix.queue() == before
    assert desk.report("alice")["state"] == "HOLD", "nothing was forgiven"


def test_who_received_what_is_told_from_the_log_of_postfix(postfix: Postfix, tmp_path: Path, desk: Desk) -> None:
    sent, later = submit(postfix, "alice"), deferred(postfix, "alice", sender="")
    held = submit(postfix, "alice")
    submit(postfix, "boris")
    wait_until(lambda: sent not in postfix.queue(), "it is on its way")
    text = desk("trace", "Alice")
    begin = rf"^[-0-9]+ [:0-9]+ {sent} from 127\.0\.0\.1\n  <alice@example\.org>\n"
    assert re.search(rf"{begin}    sent +rcpt0@example\.net  ", text, re.MULTILINE)
    assert re.search(rf" {later} from 127\.0\.0\.1\n  <>\n    deferred +rcpt0@later\.example\.net  \S", text)
    assert re.search(rf" {held} from 127\.0\.0\.1\n  <\?>\n    not delivered: it waits, or was refused", text)
    assert "boris" not in text
    total = r"^alice: \d+ messages of 24 hours in the log\nrecipients: .*\d+ deferred, \d+ sent$"
    assert re.search(total, text, re.MULTILINE)
    nothing = "\nnobody: 0 messages of 24 hours in the log\nrecipients: none\n"
    assert desk("trace", "nobody").startswith(nothing)
    # The journal is read, too, and a line in both counts once.
    lines = [line for line in postfix.log.splitlines() if sent in line]
    lines += [f"{lines[0][:15]} relay {line}" for _, line in lines_of(0, "FF00", "alice", "from-the-journal@x")]
    (tmp_path / "lines").write_text("\n".join(lines))
    text = desk("trace", "alice", **scripting.program(tmp_path, "journalctl", f"cat {tmp_path}/lines"))
    assert "from-the-journal@x" in text
    assert text.count(f" {sent} ") == 1


def lines_of(at: float, queue_id: str, login: str, to: str, status: str = "sent (ok)") -> list[tuple[float, str]]:
    """Return what Postfix logs of a message."""
    sasl = f", sasl_method=PLAIN, sasl_username={login}" if login else ""
    texts = (
        f"submission/smtpd[1]: {queue_id}: client=unknown[2001:db8:1234:5678:9abc:def0:1234:5678]{sasl}",
        f"qmgr[1]: {queue_id}: from=<s@example.org>, size=9, nrcpt=1 (queue active)",
        f"smtp[1]: {queue_id}: to=<{to}>, orig_to=<o@x>, relay=mx[192.0.2.1]:25, dsn=2.0.0, status={status}",
        f"qmgr[1]: {queue_id}: removed",
    )
    return [(at, f"postfix/{text}") for text in texts]


@pytest.mark.parametrize("form", ["%b %e %H:%M:%S", "%Y-%m-%dT%H:%M:%S.123456+00:00", "%Y-%m-%dT%H:%M:%S+0000"])
def test_files_that_were_rotated_and_packed_are_read_and_only_this_login(tmp_path: Path, form: str) -> None:
    desk = Desk(tmp_path / "policyd.cfg", SQLiteStore(tmp_path / "events.sqlite3"))
    now = time.time()
    events = [
        *lines_of(now - 360 * DAY_S, "AGO1", "boris", "year-ago@x"),
        *lines_of(now - 90_000, "OLD1", "boris", "too-old@x"), *lines_of(now - 3000, "AB12", "boris", "first@x"),
        *lines_of(now - 2000, "AB12", "anna", "other@x"), *lines_of(now - 1500, "AB12", "", "inbound@x"),
        *lines_of(now - 1000, "AB12", "Boris@example.org, sasl_sender=x", "second@x", "bounced (no)"),
        *lines_of(now - 900, "CD34", "boriss", "longer@x"),
        *lines_of(now - 800, "EF56", "x, sasl_username=boris", "forged@x"),
        *lines_of(now - 700, "GHJKLMNPQRSTVWXYZ", "boris", "filtered@x", "sent (250 2.0.0 Ok: queued as JK90)"),
        *lines_of(now - 690, "JK90", "", "filtered@x", "deferred (busy)")[1:],
    ]  # fmt: skip
    program("xzcat", "xz-utils")  # is needed
    paths = [tmp_path / f"mail.log.{name}" for name in ("3.xz", "2.gz", "1")]
    for path, pack, part in zip(paths, (lzma.compress, gzip.compress, bytes), (events[:9], events[9:15], events[15:])):
        text = "".join(f"{time.strftime(form, time.gmtime(at))} relay {line}\n" for at, line in part).encode()
        path.write_bytes(pack(text + b"\xff broken\n"))
    text = desk("trace", "boris", *paths)
    assert re.findall(r"(\w+)@x", text) == ["first", "second", "filtered"]
    assert "recipients: 1 bounced, 1 deferred, 1 sent\n" in text
    assert desk.refusal("trace", "a", tmp_path / "missing").endswith("missing cannot be read")
    scripting.program(tmp_path, "postconf", "echo /dev/stdout")  # of a container; where our answer goes to a file, one
    environment = scripting.program(tmp_path, "zcat", f'test "$3" = /dev/stdout && cat {paths[2]}')
    assert "boris: 0 messages" in desk("trace", "boris", **environment), "zcat would wait for itself"
