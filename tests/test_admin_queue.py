"""policyd-admin held, release, delete and trace: a message belongs to its login, and only what is named is touched."""

from __future__ import annotations

import gzip
import json
import os
import re
import smtplib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import scripting
from scripting import commands_in, facts, journal, objects, printed, refusal, settings_file
from servers import Policyd, Postfix, program, wait_until

from policyd import printable

QUOTA = 3
NO_LOGIN = "(no login)"


def send(
    session: smtplib.SMTP, sender: str = "alice@example.org", recipients: int = 1, domain: str = "example.net",
    parameter: str = "", text: str = "Subject: hello\r\n\r\nHello\r\n",
) -> str:  # fmt: skip
    """Send one message and return its queue id; `parameter` goes to its first recipient."""
    replies = [session.docmd(f"MAIL FROM:<{sender}>")]
    for number in range(recipients):
        more = f" {parameter}" if parameter and number == 0 else ""
        replies.append(session.docmd(f"RCPT TO:<rcpt{number}@{domain}>{more}"))
    assert {code for code, _ in replies} == {250}, replies
    match = re.search(rb"queued as (\w+)", session.data(text)[1])
    assert match
    return match[1].decode()


def submit(postfix: Postfix, login: str | bool, **message: Any) -> str:
    """Send one message in a session of its own."""
    with postfix.session(login=login) as session:
        return send(session, **message)


def postfix_runs(postfix: Postfix, *command: str) -> str:
    """Run one of its programs."""
    environment = {**os.environ, "MAIL_CONFIG": str(postfix.directory / "etc")}
    command = (program(command[0], "postfix"), *command[1:])
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def queue(postfix: Postfix) -> dict[str, str]:
    """Return the id of each queued message, with the name of the queue it is in."""
    listed = map(json.loads, postfix_runs(postfix, "postqueue", "-j").splitlines())
    return {message["queue_id"]: message["queue_name"] for message in listed}


def put_on_hold(postfix: Postfix, login: str | bool = False, **message: Any) -> str:
    """Let a person hold a message that waits."""
    queue_id = deferred(postfix, login, **message)
    postfix_runs(postfix, "postsuper", "-h", queue_id)
    return queue_id


def deferred(postfix: Postfix, login: str | bool, **message: Any) -> str:
    """Send a message that cannot be delivered now."""
    queue_id = submit(postfix, login, domain="later.example.net", **message)
    wait_until(lambda: queue(postfix).get(queue_id) == "deferred", "the message is deferred")
    return queue_id


Admin = Callable[..., "subprocess.CompletedProcess[str]"]


def by_login(text: str) -> dict[str, set[str]]:
    """Return the queue ids of each login's table."""
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
def hold(postfix: Postfix, policyd: Callable[..., Policyd]) -> Iterator[Policyd]:
    """An empty queue, and a daemon that holds alice's mail from the quota on, and all of boris and carla."""
    postfix.delete("ALL")
    yield policyd(port=postfix.policy_port, defaultquota=QUOTA, rejectquota=100_000, blacklist=["boris", "carla"])
    postfix.delete("ALL")


@pytest.fixture
def run(postfix: Postfix, hold: Policyd) -> Admin:
    """policyd-admin, with that daemon's settings and that Postfix."""
    environment = {"MAIL_CONFIG": str(postfix.directory / "etc")}

    def run(command: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return scripting.run(command, "-c", hold.settings_file, *arguments, **{**environment, **more})

    return run


# ---- held -----------------------------------------------------------------------------------------------------


def test_each_queued_message_stands_under_its_login(postfix: Postfix, run: Admin) -> None:
    assert printed(run("held")).startswith("nothing waits\n")
    assert objects(run("held", "--json")) == []
    submit(postfix, "alice", recipients=QUOTA - 1)  # passes
    alice = {submit(postfix, "alice", recipients=number) for number in (1, 2)}
    text = "Subject: =?utf-8?q?caf=C3=A9?=\r\n a\x1b[31m\r\n\r\n" + "x" * 20000
    boris = submit(postfix, "boris", sender="boris@example.org", recipients=9, text=text)
    carla = submit(postfix, "carla@example.org", sender="")
    person = put_on_hold(postfix, sender="someone@example.com")
    submit(postfix, False, domain="later.example.net")  # bounces and inbound mail: none of our business
    text = printed(run("held"))
    assert by_login(text) == {"boris": {boris}, "alice": alice, "carla": {carla}, NO_LOGIN: {person}}
    assert re.search(rf"^{boris} +hold +0\.0h +20k +9 127\.0\.0\.1 +\?\n  boris@example\.org: caf\\xe9 a\\x1b\[31m$",
                     text, re.MULTILINE), text  # fmt: skip
    assert "  MAILER-DAEMON: hello\n" in text
    assert re.search(r"^ +9 recipients from boris@example\.org$", text, re.MULTILINE)
    assert [command.split()[1] for command in commands_in(text)] == ["user", "release", "delete"]
    rows = objects(run("held", "--json"))
    assert [row["login"] for row in rows] == ["boris", "alice", "carla", ""]
    assert (rows[1]["recipients"], rows[1]["quota"], rows[1]["state"]) == (5, QUOTA, "HOLD")
    assert {message["queue_id"] for message in rows[1]["queued"]} == alice


def test_the_named_logins_are_listed_whatever_queue_they_wait_in(postfix: Postfix, hold: Policyd, run: Admin) -> None:
    alice = {deferred(postfix, "alice"), submit(postfix, "alice", recipients=QUOTA)}
    carla = submit(postfix, "carla@example.org")
    text = printed(run("held", "ALICE", "nobody"))
    assert by_login(text) == {"alice": alice}
    assert "alice:\n1 deferred, 1 hold\n" in text
    assert "nobody:\nnothing\n" in text
    assert by_login(printed(run("held", "Carla@example.com", "alice"))) == {"carla": {carla}, "alice": alice}
    for login in ("release", "--yes", "-x", "a:"):
        assert f"\n{login}:\nnothing\n" in printed(run("held", "--", login))
    hold.settings_file.write_text(f"strip_domain = No\nstatedir={hold.statedir}\n")
    assert by_login(printed(run("held", "carla@example.org"))) == {"carla@example.org": {carla}}


def test_whose_decision_it_was_is_told_as_far_as_the_log_tells(postfix: Postfix, run: Admin, tmp_path: Path) -> None:
    other, alice = put_on_hold(postfix, "alice"), submit(postfix, "alice", recipients=QUOTA)
    boris = submit(postfix, "boris")
    environment = journal(
        tmp_path,
        f"policyd[1]: DEFERRING overquota (3>3) for user alice using a from ip [192.0.2.1], queue_id={alice}",
        f"policyd[1]: Holding blacklisted user: boris/x, queue_id={other}/192.0.2.1/1, queue_id={boris}",
        f"policyd[1]: REJECTING overquota (9>2x3) for user alice using a from ip [192.0.2.1], queue_id={other}",
    )
    rows = objects(run("held", "--json", **environment))
    rules = {message["queue_id"]: message["why"] for row in rows for message in row["queued"]}
    assert rules == {alice: "overquota", boris: "blacklisted", other: "not policyd"}
    assert "(1 not held by policyd)\n" in printed(run("release", "alice", **environment))


def test_three_hundred_messages_are_read_in_a_few_calls(postfix: Postfix, run: Admin, tmp_path: Path) -> None:
    sent = {}
    for login in ("alice", "boris", "carla@example.org"):
        with postfix.session(login=login) as session:
            sent[login.partition("@")[0]] = {send(session, f"{login[0]}{n}@example.org", QUOTA) for n in range(100)}
    calls = tmp_path / "calls"
    environment = wrapped("postcat", tmp_path, f'echo >>"{calls}"')
    began = time.monotonic()
    assert by_login(printed(run("held", *sent, **environment))) == sent
    assert time.monotonic() - began < 10, "a second, on a machine with nothing else to do"
    assert len(calls.read_text()) <= 4
    text = printed(run("held"))
    assert [len(ids) for ids in by_login(text).values()] == [10, 10, 10]
    assert text.count("\nand 90 more\n") == 3


def test_what_leaves_the_queue_meanwhile_is_left_out_and_stays_where_it_is(
    postfix: Postfix, run: Admin, tmp_path: Path
) -> None:
    sent = [submit(postfix, "boris") for _ in range(4)]
    postsuper = program("postsuper", "postfix")
    first = f"{postsuper} -d {sent[1]}; {postsuper} -H {sent[2]}; {postsuper} -d {sent[2]}"
    environment = wrapped("postcat", tmp_path, f'if mkdir "{tmp_path}/done"; then {first}; fi 2>/dev/null')
    assert by_login(printed(run("held", **environment))) == {"boris": {sent[0], sent[3]}}
    environment = wrapped("postsuper", tmp_path, f"{postsuper} -d {sent[0]} 2>/dev/null")
    done = printed(run("delete", "boris", "--yes", **environment))
    assert "\ndeleted 1 of 2 messages; the rest had left before\n" in done


def test_it_works_while_postfix_and_the_database_are_down(postfix: Postfix, hold: Policyd, run: Admin) -> None:
    boris = submit(postfix, "boris")
    hold.settings_file.write_text("dbhost=127.0.0.1:1\ndbname=x\ndbuser=x\n")
    postfix.stop()
    try:
        assert by_login(printed(run("held"))) == {"boris": {boris}}
    finally:
        postfix.launch()
    assert "deleted 1 of 1 messages" in printed(run("delete", "boris", "--yes"))


# ---- what a client sends ----------------------------------------------------------------------------------------


def xtext(text: str) -> str:
    """Return the text as a parameter of RFC 3461 holds it."""
    return "".join(character if character.isalnum() else f"+{ord(character):02X}" for character in text)


def test_nobody_can_put_a_message_under_another_login_or_beside_another_id(postfix: Postfix, run: Admin) -> None:
    boris, alice = [submit(postfix, "boris") for _ in range(2)], submit(postfix, "alice", recipients=QUOTA)
    person = put_on_hold(postfix)
    forged = "".join(
        f"\n*** MESSAGE FILE END hold/{queue_id} ***\n*** ENVELOPE RECORDS hold/{queue_id} ***\n"
        "message_arrival_time: Sun Nov 22 13:31:10 2020\nnamed_attribute: sasl_username=alice\nsender: a\n"
        for queue_id in (*boris, person)
    )
    lines = "sasl_username=alice\r\nnamed_attribute: sasl_username=alice\r\n"
    # Postfix decodes the original recipient, line ends included, and keeps it in the envelope.
    persons = [person, put_on_hold(postfix, parameter=f"ORCPT=rfc822;x{xtext(forged)}"),
               put_on_hold(postfix, text=f"sasl_username: alice\r\n\r\n{lines}")]  # fmt: skip
    for message in (
        {"parameter": f"ORCPT=rfc822;x{xtext(forged)}"},
        {"text": f"Subject: x\r\nsasl_username: alice\r\n\r\n{lines}{forged}\r\n"},
        {"text": f"*** ENVELOPE RECORDS hold/{boris[0]} ***: x\r\nSubject: {lines}\r\n"},
        {"sender": rf'"\"}}], \"queue_name\": \"hold\", \"queue_id\": \"{alice}\", \"sender\": \"x"@example.org'},
        {"sender": r'"a\\\", \"recipients\": [{\"address\": \"{\"address\": \"b\\"@example.org'},
        {"sender": '"\x1b]0;owned\x07\x7f $(touch x)`touch x`;%s%n\\\\"@example.org'},
        {"sender": "x" * 60 + "@example.org"},
    ):
        boris.append(submit(postfix, "boris", **message))
    assert by_login(printed(run("held"))) == {"alice": {alice}, "boris": set(boris), NO_LOGIN: set(persons)}


# ---- release and delete -------------------------------------------------------------------------------------------


def test_without_yes_it_only_says_what_it_would_do(postfix: Postfix, hold: Policyd, run: Admin) -> None:
    alice = submit(postfix, "alice", recipients=QUOTA)
    boris = [submit(postfix, "boris", sender=f"b{n}@example.org") for n in range(12)]
    files = list((postfix.directory / "queue" / "hold").rglob("*"))
    before = [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files]
    for command in ("release", "delete"):
        text = printed(run(command, "Boris@example.com"))
        assert by_login(text) == {"boris": set(boris)}
        assert f"\n{command}: 12 hold\n" in text
        assert by_login(printed(run(command, boris[3], alice, boris[3]))) == {"alice": {alice}, "boris": {boris[3]}}
        text = printed(run(command, "boris", "--sender", "<B7@example.org>"))
        assert by_login(text) == {"boris": {boris[7]}}
        shown = f"policyd-admin {command} --yes -c {hold.settings_file} boris --sender '<B7@example.org>'"
        assert commands_in(text) == [shown]
    assert [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files] == before
    assert queue(postfix) == dict.fromkeys([alice, *boris], "hold")


def test_what_is_released_is_delivered_now_and_no_other(postfix: Postfix, run: Admin) -> None:
    """By release, and in one command from the phone call on by forgive."""
    others = {submit(postfix, "boris", text="Subject: boris stays\r\n\r\n"), deferred(postfix, False)}
    for number in (0, 1):
        submit(postfix, "alice", recipients=QUOTA - number, text=f"Subject: alice goes {number}\r\n\r\n")
    done = printed(run("release", "alice", "--yes"))
    assert "released 2 of 2 messages\n" in done
    assert "ends no incident" in done
    wait_until(lambda: set(queue(postfix)) == others, "the released messages are delivered")
    delivered = "".join(postfix.delivered())
    assert all(f"Subject: alice goes {number}\n" in delivered for number in (0, 1))
    assert "Subject: boris stays\n" not in delivered
    assert facts(printed(run("user", "alice")))["state"].startswith("HOLD")
    submit(postfix, "alice", recipients=QUOTA, text="Subject: honest\r\n\r\n")
    assert "alice: released: 1 hold" in printed(run("forgive", "alice", "--release"))
    done = printed(run("forgive", "alice", "--release", "--yes"))
    assert "\nDone: alice has 0 recipients now.\nok: messages go on\nreleased 1 of 1 messages\n" in done
    wait_until(lambda: any("Subject: honest\n" in text for text in postfix.delivered()), "it is delivered")
    submit(postfix, "alice", recipients=QUOTA - 1)
    wait_until(lambda: set(queue(postfix)) == others, "what comes next passes")


def test_what_waits_in_any_queue_is_deleted_and_what_others_have_stays(postfix: Postfix, run: Admin) -> None:
    inbound, person = deferred(postfix, False), put_on_hold(postfix)
    deferred(postfix, "alice")
    submit(postfix, "alice", recipients=QUOTA)
    boris = [submit(postfix, "boris") for _ in range(2)]
    assert "deleted 3 of 3 messages\n" in printed(run("delete", "alice", boris[1], "--yes"))
    assert queue(postfix) == {inbound: "deferred", person: "hold", boris[0]: "hold"}


def test_nothing_is_done_when_one_argument_is_wrong(postfix: Postfix, run: Admin) -> None:
    boris, person = submit(postfix, "boris"), put_on_hold(postfix)
    unknown = "no login and no queue id of a message that waits"
    words = ("anna", NO_LOGIN, "ALL", "*", "-", "boris\nboris", "\x1b[31m\\é'\"", f"{boris}0")
    wrong = dict.fromkeys(words, unknown)
    wrong[person] = "no login sent it, policyd has not held it: use postsuper"
    for command in ("release", "delete"):
        for word, reason in wrong.items():
            line = refusal(run(command, "--yes", "--", "boris", word, "boris"))
            assert line == f"{printable(word)}: {reason}; nothing was changed"
    assert queue(postfix) == dict.fromkeys([boris, person], "hold")


def test_a_postfix_that_cannot_be_asked_is_said(hold: Policyd, postfix: Postfix, run: Admin, tmp_path: Path) -> None:
    submit(postfix, "alice", recipients=QUOTA)
    before = queue(postfix)
    environment = wrapped("postcat", tmp_path, "echo 'postcat: fatal: no memory' >&2; exit 1")
    for arguments in (["held"], ["delete", "alice", "--yes"], ["forgive", "alice", "--release", "--yes"]):
        line = refusal(run(*arguments, MAIL_CONFIG="/nonexistent"))
        assert line == "postqueue: fatal: open /nonexistent/main.cf: No such file or directory"
        assert refusal(run(*arguments, **environment)) == "postcat: fatal: no memory"
    assert queue(postfix) == before
    assert facts(printed(run("user", "alice")))["state"] == "HOLD", "nothing was forgiven"


# ---- trace --------------------------------------------------------------------------------------------------------


def test_who_received_what_is_told_from_the_log_of_postfix(postfix: Postfix, run: Admin) -> None:
    sent, later = submit(postfix, "alice"), deferred(postfix, "alice", sender="")
    held = submit(postfix, "alice")
    submit(postfix, "boris")
    wait_until(lambda: sent not in queue(postfix), "it is on its way")
    text = printed(run("trace", "Alice"))
    begin = rf"^[-0-9]+ [:0-9]+ {sent} from 127\.0\.0\.1\n  <alice@example\.org>\n"
    assert re.search(rf"{begin}    sent +rcpt0@example\.net  ", text, re.MULTILINE)
    assert re.search(rf" {later} from 127\.0\.0\.1\n  <>\n    deferred +rcpt0@later\.example\.net  \S", text)
    assert re.search(rf" {held} from 127\.0\.0\.1\n  <.*>\n    not delivered", text)
    assert "boris" not in text
    total = r"^alice: \d+ messages of 24 hours in the log; recipients: .*\d+ deferred, \d+ sent$"
    assert re.search(total, text, re.MULTILINE)
    nothing = "\nnobody: 0 messages of 24 hours in the log; recipients: none\n"
    assert printed(run("trace", "nobody")).startswith(nothing)


def lines_of(at: float, queue_id: str, login: str, to: str, status: str = "sent") -> list[tuple[float, str]]:
    """Return what Postfix logs of a message."""
    sasl = f", sasl_method=PLAIN, sasl_username={login}" if login else ""
    return [
        (at, f"postfix/submission/smtpd[1]: {queue_id}: client=unknown[192.0.2.9]{sasl}"),
        (at, f"postfix/cleanup[1]: {queue_id}: message-id=<x@y>"),
        (at, f"postfix/qmgr[1]: {queue_id}: from=<s@example.org>, size=9, nrcpt=1 (queue active)"),
        (at + 1,
            f"postfix/smtp[1]: {queue_id}: to=<{to}>, orig_to=<o@x>, relay=mx[192.0.2.1]:25, delay=1,"
                 f" dsn=2.0.0, status={status} (250 ok)"),
        (at + 1, f"postfix/qmgr[1]: {queue_id}: removed"),
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["%b %e %H:%M:%S", "%Y-%m-%dT%H:%M:%S.123456+00:00", "%Y-%m-%dT%H:%M:%S+0000"])
def test_files_that_were_rotated_and_packed_are_read_and_only_this_login(tmp_path: Path, form: str) -> None:
    now = time.time()
    events = [
        *lines_of(now - 90_000, "OLD1", "boris", "too-old@x"), *lines_of(now - 3000, "AB12", "boris", "first@x"),
        *lines_of(now - 2000, "AB12", "anna", "other@x"), *lines_of(now - 1500, "AB12", "", "inbound@x"),
        *lines_of(now - 1000, "AB12", "Boris@example.org, sasl_sender=x", "second@x", "bounced"),
        *lines_of(now - 900, "CD34", "boriss", "longer@x"),
        *lines_of(now - 800, "EF56", "x, sasl_username=boris", "forged@x"),
    ]  # fmt: skip
    paths = [tmp_path / "mail.log.2.gz", tmp_path / "mail.log.1"]
    for path, part in zip(paths, (events[:10], events[10:])):
        text = "".join(f"{time.strftime(form, time.gmtime(at))} relay {line}\n" for at, line in part).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text + b"\xff broken\n")
    file = settings_file(tmp_path, {})
    text = printed(scripting.run("trace", "boris", *paths, "-c", file))
    assert re.findall(r"(\w+)@x", text) == ["first", "second"]
    assert "recipients: 1 bounced, 1 sent\n" in text
    assert refusal(scripting.run("trace", "a", tmp_path / "missing", "-c", file)).endswith("missing cannot be read")


def test_the_journal_is_read_too_and_a_line_in_both_counts_once(postfix: Postfix, run: Admin, tmp_path: Path) -> None:
    sent = submit(postfix, "alice")
    wait_until(lambda: sent not in queue(postfix) and f"{sent}: removed" in postfix.log, "it is delivered")
    lines = [line for line in postfix.log.splitlines() if sent in line]
    lines += [f"{lines[0][:15]} relay {line}" for _, line in lines_of(0, "FF00", "alice", "from-the-journal@x")]
    (tmp_path / "lines").write_text("\n".join(lines))
    text = printed(run("trace", "alice", **scripting.program(tmp_path, "journalctl", f"cat {tmp_path}/lines")))
    assert "from-the-journal@x" in text
    assert text.count(f" {sent} ") == 1
