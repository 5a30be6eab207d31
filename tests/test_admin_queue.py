"""policyd-admin held, release, delete and trace: a message belongs to its login, and only what is named is touched."""

from __future__ import annotations

import gzip
import json
import os
import re
import smtplib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import scripting
from scripting import ADMIN, commands_in, facts, objects, paste, printed, refusal
from servers import Policyd, Postfix, program, wait_until

QUOTA = 3
NO_LOGIN = "(no login)"


def queue_id_of(code: int, reply: bytes) -> str:
    """Return the id of a message that was taken."""
    match = re.search(rb"queued as (\w+)", reply)
    assert match, (code, reply)
    return match[1].decode()


def send(
    session: smtplib.SMTP, sender: str = "alice@example.org", recipients: int = 1, domain: str = "example.net",
    parameter: str = "", text: str = "Subject: hello\r\n\r\nHello\r\n",
) -> str:
    """Send one message and return its queue id; `parameter` goes to its first recipient."""
    code, reply = session.docmd(f"MAIL FROM:<{sender}>")
    assert code == 250, reply
    for number in range(recipients):
        code, reply = session.docmd(f"RCPT TO:<rcpt{number}@{domain}> {parameter if number == 0 else ''}".rstrip())
        assert code == 250, reply
    return queue_id_of(*session.data(text))


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
    queue_id = submit(postfix, login, domain="later.example.net", **message)
    wait_until(lambda: queue(postfix).get(queue_id) == "deferred", "the message is deferred")
    postfix_runs(postfix, "postsuper", "-h", queue_id)
    return queue_id


def run(postfix: Postfix, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run policyd-admin on the private Postfix."""
    how.setdefault("MAIL_CONFIG", str(postfix.directory / "etc"))
    return scripting.run(*arguments, **how)


def by_login(text: str) -> dict[str, set[str]]:
    """Return the queue ids of each login's table."""
    found: dict[str, set[str]] = {}
    for block in text.split("\n\n"):
        heading = re.match(r"(.+?): \d+ \w+.*\n", block.lstrip("\n"))
        ids = re.findall(r"^([0-9A-Za-z]{6,})\s+(?:hold|deferred|active|incoming) ", block, re.MULTILINE)
        if heading and ids:
            found[heading[1]] = set(ids)
    return found


def on_hold(postfix: Postfix) -> set[str]:
    """Return what the hold queue has."""
    return {queue_id for queue_id, name in queue(postfix).items() if name == "hold"}


def wrapped(name: str, directory: Path, first: str) -> dict[str, str]:
    """Return an environment in which a program does something else `first`."""
    wrapper = directory / name
    wrapper.write_text(f'#!/bin/sh\n{first}\nexec {program(name, "postfix")} "$@"\n')
    wrapper.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def journal(directory: Path, *lines: str) -> dict[str, str]:
    """Return an environment in which journalctl has these lines, of now and in its own form."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime())
    (directory / "lines").write_text("".join(f"{stamp} relay1 {line}\n" for line in lines))
    (directory / "journalctl").write_text(f'#!/bin/sh\nexec cat "{directory}/lines"\n')
    (directory / "journalctl").chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


@pytest.fixture
def hold(postfix: Postfix, policyd: Callable[..., Policyd]) -> Iterator[Policyd]:
    """An empty queue, and a daemon that holds alice's mail from the quota on, and all of boris and carla."""
    postfix.delete("ALL")
    yield policyd(port=postfix.policy_port, defaultquota=QUOTA, rejectquota=100_000, blacklist=["boris", "carla"])
    postfix.delete("ALL")


# ---- held -----------------------------------------------------------------------------------------------------


def test_each_queued_message_stands_under_its_login(postfix: Postfix, hold: Policyd) -> None:
    submit(postfix, "alice", recipients=QUOTA - 1)  # passes
    alice = {submit(postfix, "alice", recipients=number) for number in (1, 2)}
    boris = submit(
        postfix,
        "boris",
        sender="boris@example.org",
        recipients=9,
        text="Subject: =?utf-8?q?caf=C3=A9?=\r\n a\x1b[31m\r\n\r\n" + "x" * 20000,
    )
    carla = submit(postfix, "carla@example.org", sender="")
    person = put_on_hold(postfix, sender="someone@example.com")
    submit(postfix, False, domain="later.example.net")  # bounces and inbound mail: none of our business
    text = printed(run(postfix, "held", "-c", hold.settings_file))
    assert by_login(text) == {"boris": {boris}, "alice": alice, "carla": {carla}, NO_LOGIN: {person}}
    assert re.search(rf"^{boris} +hold +0m +20k +9 127\.0\.0\.1 +\?\n  boris@example\.org: caf\\xe9 a\\x1b\[31m$",
                     text, re.MULTILINE), text  # fmt: skip
    assert f"{carla} " in text
    assert "  MAILER-DAEMON: hello\n" in text
    assert re.search(r"^ +9 recipients from boris@example\.org$", text, re.MULTILINE)
    assert [command.split()[1] for command in commands_in(text)] == ["held", "user", "release", "delete"]
    rows = objects(run(postfix, "held", "--json", "-c", hold.settings_file))
    assert [row["login"] for row in rows] == ["boris", "alice", "carla", ""]
    assert (rows[1]["recipients"], rows[1]["quota"], rows[1]["state"]) == (5, QUOTA, "HOLD")
    assert {message["queue_id"] for message in rows[1]["queued"]} == alice


def test_the_named_logins_are_listed_whatever_queue_they_wait_in(postfix: Postfix, hold: Policyd) -> None:
    deferred = submit(postfix, "alice", domain="later.example.net")
    wait_until(lambda: queue(postfix).get(deferred) == "deferred", "it is deferred")
    held = submit(postfix, "alice", recipients=QUOTA)
    carla = submit(postfix, "carla@example.org")

    def listed(*logins: str) -> str:
        return printed(run(postfix, "held", "-c", hold.settings_file, *logins))

    assert by_login(listed("ALICE")) == {"alice": {deferred, held}}
    assert "alice: 1 deferred, 1 hold\n" in listed("alice")
    assert by_login(listed("Carla@example.com", "alice")) == {"carla": {carla}, "alice": {deferred, held}}
    assert "nobody: nothing waits\n" in listed("nobody", "alice")
    for login in ("release", "--yes", "-x", "a:"):
        assert listed("--", login).startswith(f"{login}: nothing waits\n")
    hold.settings_file.write_text(f"strip_domain = No\nstatedir={hold.statedir}\n")
    assert by_login(listed("carla@example.org")) == {"carla@example.org": {carla}}


def test_an_empty_queue_is_no_mistake(postfix: Postfix, hold: Policyd) -> None:
    assert printed(run(postfix, "held", "-c", hold.settings_file)).startswith("nothing waits\n")
    assert objects(run(postfix, "held", "--json", "-c", hold.settings_file)) == []


def test_whose_decision_it_was_is_told_as_far_as_the_log_tells(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    other, alice, boris = (
        put_on_hold(postfix, "alice"),
        submit(postfix, "alice", recipients=QUOTA),
        submit(postfix, "boris"),
    )
    environment = journal(
        tmp_path,
        f"policyd[1]: DEFERRING overquota (3>3) for user alice using a from ip [192.0.2.1], queue_id={alice}",
        f"policyd[1]: Holding blacklisted user: boris/x, queue_id={other}/192.0.2.1/1, queue_id={boris}",
        f"policyd[1]: REJECTING overquota (9>2x3) for user alice using a from ip [192.0.2.1], queue_id={other}",
    )
    messages = {message["queue_id"]: message["rule"]
                for row in objects(run(postfix, "held", "--json", "-c", hold.settings_file, **environment))
                for message in row["queued"]}  # fmt: skip
    assert messages == {alice: "overquota", boris: "blacklisted", other: "not policyd"}
    text = printed(run(postfix, "release", "alice", "-c", hold.settings_file, **environment))
    assert "(1 of them not held by policyd)\n" in text


def test_three_hundred_messages_are_read_in_a_few_calls(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    sent = {}
    for login in ("alice", "boris", "carla@example.org"):
        with postfix.session(login=login) as session:
            sent[login.partition("@")[0]] = {send(session, f"{login[0]}{n}@example.org", QUOTA) for n in range(100)}
    calls = tmp_path / "calls"
    environment = wrapped("postcat", tmp_path, f'echo >>"{calls}"')
    began = time.monotonic()
    text = printed(run(postfix, "held", "-c", hold.settings_file, *sent, **environment))
    assert by_login(text) == sent
    assert time.monotonic() - began < 5, "a second, on a machine with nothing else to do"
    assert len(calls.read_text()) <= 4
    text = printed(run(postfix, "held", "-c", hold.settings_file))
    assert [len(ids) for ids in by_login(text).values()] == [10, 10, 10]
    assert text.count("\nand 90 more\n") == 3


def test_a_message_that_goes_away_meanwhile_is_left_out(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    sent = [submit(postfix, "boris") for _ in range(4)]
    postsuper = program("postsuper", "postfix")
    first = f"{postsuper} -d {sent[1]}; {postsuper} -H {sent[2]}; {postsuper} -d {sent[2]}"
    environment = wrapped("postcat", tmp_path, f'if mkdir "{tmp_path}/done"; then {first}; fi 2>/dev/null')
    assert by_login(printed(run(postfix, "held", "-c", hold.settings_file, **environment))) == {
        "boris": {sent[0], sent[3]}
    }


def test_it_lists_while_postfix_and_the_database_are_down(postfix: Postfix, hold: Policyd) -> None:
    boris = submit(postfix, "boris")
    hold.settings_file.write_text("dbhost=127.0.0.1:1\ndbname=x\ndbuser=x\n")
    postfix.stop()
    try:
        assert by_login(printed(run(postfix, "held", "-c", hold.settings_file))) == {"boris": {boris}}
    finally:
        postfix.launch()
    assert "deleted 1 message" in printed(run(postfix, "delete", "boris", "--yes", "-c", hold.settings_file))


# ---- what a client sends ----------------------------------------------------------------------------------------


def xtext(text: str) -> str:
    """Return the text as a parameter of RFC 3461 holds it."""
    return "".join(character if character.isalnum() else f"+{ord(character):02X}" for character in text)


def test_nobody_can_put_a_message_under_another_login(postfix: Postfix, hold: Policyd) -> None:
    boris = [submit(postfix, "boris") for _ in range(2)]
    person = put_on_hold(postfix)
    forged = "".join(
        f"\n*** MESSAGE FILE END hold/{queue_id} ***\n*** ENVELOPE RECORDS hold/{queue_id} ***\n"
        "message_arrival_time: Sun Nov 22 13:31:10 2020\nnamed_attribute: sasl_username=alice\nsender: a\n"
        for queue_id in (*boris, person)
    )
    lines = "sasl_username=alice\r\nnamed_attribute: sasl_username=alice\r\n"
    # Postfix decodes the original recipient, line ends included, and keeps it in the envelope.
    boris.append(submit(postfix, "boris", parameter=f"ORCPT=rfc822;x{xtext(forged)}"))
    boris.append(submit(postfix, "boris", text=f"Subject: x\r\nsasl_username: alice\r\n\r\n{lines}{forged}\r\n"))
    boris.append(submit(postfix, "boris", text=f"*** ENVELOPE RECORDS hold/{boris[0]} ***: x\r\nSubject: {lines}\r\n"))
    persons = [person, put_on_hold(postfix, parameter=f"ORCPT=rfc822;x{xtext(forged)}"),
               put_on_hold(postfix, text=f"sasl_username: alice\r\n\r\n{lines}")]  # fmt: skip
    assert by_login(printed(run(postfix, "held", "-c", hold.settings_file))) == {
        "boris": set(boris),
        NO_LOGIN: set(persons),
    }


def test_nobody_can_put_a_message_beside_another_queue_id(postfix: Postfix, hold: Policyd) -> None:
    alice = submit(postfix, "alice", recipients=QUOTA)
    ugly = (
        rf'"\"}}], \"queue_name\": \"hold\", \"queue_id\": \"{alice}\", \"sender\": \"x"@example.org',
        r'"a\\\", \"recipients\": [{\"address\": \"{\"address\": \"b\\"@example.org',
        '"\x1b]0;owned\x07\x7f $(touch x)`touch x`;%s%n\\\\"@example.org', "x" * 60 + "@example.org",
    )  # fmt: skip
    boris = {submit(postfix, "boris", sender=sender) for sender in ugly}
    text = printed(run(postfix, "held", "-c", hold.settings_file))
    assert by_login(text) == {"alice": {alice}, "boris": boris}


# ---- release and delete -------------------------------------------------------------------------------------------


def test_without_yes_it_only_says_what_it_would_do(postfix: Postfix, hold: Policyd) -> None:
    alice = submit(postfix, "alice", recipients=QUOTA)
    boris = [submit(postfix, "boris", sender=f"b{n}@example.org") for n in range(12)]
    files = list((postfix.directory / "queue" / "hold").rglob("*"))
    before = [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files]
    for command in ("release", "delete"):
        text = printed(run(postfix, command, "Boris@example.com", "-c", hold.settings_file))
        assert by_login(text) == {"boris": set(boris)}
        assert f"\n{command}: 12 hold\n" in text
        text = printed(run(postfix, command, boris[3], alice, boris[3], "-c", hold.settings_file))
        assert by_login(text) == {"alice": {alice}, "boris": {boris[3]}}
        text = printed(run(postfix, command, "boris", "--sender", "<B7@example.org>", "-c", hold.settings_file))
        assert by_login(text) == {"boris": {boris[7]}}
        assert commands_in(text) == [
            f"policyd-admin {command} -c {hold.settings_file} --yes --sender='<B7@example.org>' boris"
        ]  # fmt: skip
    assert [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files] == before
    assert on_hold(postfix) == {alice, *boris}


def test_what_is_released_is_delivered_now_and_no_other(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    deferred = submit(postfix, "boris", domain="later.example.net")
    boris = submit(postfix, "boris", text="Subject: boris stays\r\n\r\n")
    with postfix.session(login="alice") as session:
        for number in (0, 1):
            send(session, recipients=QUOTA - number, text=f"Subject: alice goes {number}\r\n\r\n")
    shown = printed(run(postfix, "release", "alice", "-c", hold.settings_file))
    done = paste(commands_in(shown)[-1], tmp_path, MAIL_CONFIG=str(postfix.directory / "etc"))
    assert "released 2 messages\n" in done.stdout
    assert "ends no incident" in done.stdout
    wait_until(lambda: set(queue(postfix)) == {boris, deferred}, "the released messages are delivered")
    delivered = "".join(postfix.delivered())
    assert all(f"Subject: alice goes {number}\n" in delivered for number in (0, 1))
    assert "Subject: boris stays\n" not in delivered
    assert facts(printed(run(postfix, "user", "alice", "-c", hold.settings_file)))["state"].startswith("HOLD")


def test_from_a_phone_call_to_delivered_mail_in_one_command(postfix: Postfix, hold: Policyd) -> None:
    submit(postfix, "alice", recipients=QUOTA, text="Subject: honest\r\n\r\n")
    boris = submit(postfix, "boris")
    shown = printed(run(postfix, "forgive", "alice", "--release", "-c", hold.settings_file))
    assert "alice: released and delivered: 1 hold" in shown
    done = printed(run(postfix, "forgive", "alice", "--release", "--yes", "-c", hold.settings_file))
    assert "\nDone: alice has 0 recipients now.\nok: messages go on\nreleased 1 message\n" in done
    wait_until(lambda: any("Subject: honest\n" in text for text in postfix.delivered()), "it is delivered")
    assert set(queue(postfix)) == {boris}
    submit(postfix, "alice", recipients=QUOTA - 1)
    wait_until(lambda: set(queue(postfix)) == {boris}, "what comes next passes")


def test_what_waits_in_any_queue_is_deleted_and_what_others_have_stays(postfix: Postfix, hold: Policyd) -> None:
    inbound = submit(postfix, False, domain="later.example.net")
    person = put_on_hold(postfix)
    deferred = submit(postfix, "alice", domain="later.example.net")
    wait_until(lambda: queue(postfix).get(deferred) == "deferred", "it is deferred")
    submit(postfix, "alice", recipients=QUOTA)
    boris = [submit(postfix, "boris") for _ in range(2)]
    text = printed(run(postfix, "delete", "alice", boris[1], "--yes", "-c", hold.settings_file))
    assert "deleted 3 messages\n" in text
    assert queue(postfix) == {inbound: "deferred", person: "hold", boris[0]: "hold"}


def test_what_leaves_the_queue_meanwhile_stays_where_it_is(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    sent = [submit(postfix, "boris", domain="later.example.net") for _ in range(3)]
    environment = wrapped("postsuper", tmp_path, f"{program('postsuper', 'postfix')} -d {sent[1]} 2>/dev/null")
    text = printed(run(postfix, "delete", "boris", "--yes", "-c", hold.settings_file, **environment))
    assert "\ndeleted 2 messages\n1 message had left the queue before\n" in text


@pytest.mark.parametrize("command", ["release", "delete"])
def test_nothing_is_done_when_one_argument_is_wrong(postfix: Postfix, hold: Policyd, command: str) -> None:
    boris = submit(postfix, "boris")
    person = put_on_hold(postfix)
    unknown = "{}: no login and no queue id of a message that waits; nothing was changed"
    for argument, message in (
        ("anna", unknown.format("anna")), (NO_LOGIN, unknown.format(NO_LOGIN)), ("ALL", unknown.format("ALL")),
        ("*", unknown.format("*")),
        ("-", unknown.format("-")), (boris.lower() + "0", unknown.format(boris.lower() + "0")),
        ("\x1b[31m\\é'\"", unknown.format(r"\x1b[31m\\\xe9'" + '"')), ("boris\nboris", unknown.format(r"boris\nboris")),
        (person, f"{person}: it has no login, it was not policyd that held it: use postsuper; nothing was changed"),
    ):  # fmt: skip
        result = run(postfix, command, "-c", hold.settings_file, boris, argument, "boris", "--yes")
        assert refusal(result) == message
    assert on_hold(postfix) == {boris, person}


def test_a_queue_id_that_is_a_login_too_is_refused(postfix: Postfix, hold: Policyd) -> None:
    boris = submit(postfix, "boris")
    while boris.isdigit():  # it would be the same in small letters
        postfix.delete(boris)
        boris = submit(postfix, "boris")
    postfix.add_login(boris.lower())
    other = submit(postfix, boris.lower(), recipients=QUOTA)
    line = refusal(run(postfix, "delete", boris, "--yes", "-c", hold.settings_file))
    assert line == f"{boris}: a login and a queue id, too: use postsuper; nothing was changed"
    assert on_hold(postfix) == {boris, other}


@pytest.mark.parametrize(
    "arguments", [["held"], ["delete", "boris", "--yes"], ["forgive", "boris", "--release", "--yes"]], ids=" ".join
)
def test_a_postfix_that_cannot_be_asked_is_said(
    postfix: Postfix, hold: Policyd, tmp_path: Path, arguments: list[str]
) -> None:
    assert hold.ask(sasl_username="alice") == "DUNNO"
    boris = submit(postfix, "boris")
    arguments = [
        *(word.replace("boris", "alice") if arguments[0] == "forgive" else word for word in arguments),
        "-c",
        str(hold.settings_file),
    ]
    line = refusal(run(postfix, *arguments, MAIL_CONFIG="/nonexistent"))
    assert line == "postqueue: fatal: open /nonexistent/main.cf: No such file or directory"
    environment = wrapped("postcat", tmp_path, "echo 'postcat: fatal: no memory' >&2; exit 1")
    assert refusal(run(postfix, *arguments, **environment)) == "postcat: fatal: no memory"
    (tmp_path / "postcat").unlink()
    for text in ("{", '{"queue_id": 5}', "[]"):
        environment = wrapped("postqueue", tmp_path, f"echo '{text}'; exit 0")
        line = refusal(run(postfix, *arguments, **environment))
        assert line == "postqueue -j does not say what this program understands"
    assert on_hold(postfix) == {boris}
    assert objects(run(postfix, "user", "alice", "--json", "-c", hold.settings_file))[0]["recipients"] == 1


def test_a_postfix_that_says_a_little_more_is_understood(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    """As 3.11 does."""
    boris = submit(postfix, "boris")
    more = f'{program("postqueue", "postfix")} "$@" | sed \'s/^{{/{{"new": [1], /; s/, "/,"/g\'; exit'
    assert by_login(
        printed(run(postfix, "held", "-c", hold.settings_file, **wrapped("postqueue", tmp_path, more)))
    ) == {"boris": {boris}}


def test_a_machine_without_postfix_is_named_so(postfix: Postfix, hold: Policyd) -> None:
    script = f"mount -t tmpfs none /usr/sbin && exec {sys.executable} {ADMIN} held -c {hold.settings_file}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    assert refusal(done) == "postqueue is not installed: no Postfix on this machine?"


def test_her_queued_messages_are_in_the_report(postfix: Postfix, hold: Policyd) -> None:
    queue_id = submit(postfix, "alice", recipients=QUOTA)
    assert facts(printed(run(postfix, "user", "alice", "-c", hold.settings_file)))["in the queue"].startswith("1 hold")
    (found,) = objects(run(postfix, "user", "alice", "--json", "-c", hold.settings_file))
    assert [message["queue_id"] for message in found["queued"]] == [queue_id]


# ---- trace ----------------------------------------------------------------------------------------------------


def test_who_received_what_is_told_from_the_log_of_postfix(postfix: Postfix, hold: Policyd) -> None:
    sent = submit(postfix, "alice")
    deferred = submit(postfix, "alice", sender="", domain="later.example.net")
    held = submit(postfix, "alice")
    submit(postfix, "boris")
    wait_until(
        lambda: queue(postfix).get(deferred) == "deferred" and sent not in queue(postfix), "they are on their way"
    )
    text = printed(run(postfix, "trace", "Alice", "-c", hold.settings_file))
    assert re.search(
        rf"^[-0-9]+ [:0-9]+ {sent} from 127\.0\.0\.1\n  <alice@example\.org>\n    sent +rcpt0@example\.net  ",
        text,
        re.MULTILINE,
    )
    assert re.search(rf" {deferred} from 127\.0\.0\.1\n  <>\n    deferred +rcpt0@later\.example\.net  \S", text)
    assert re.search(rf" {held} from 127\.0\.0\.1\n  <.*>\n    not delivered", text)
    assert "boris" not in text
    assert re.search(
        r"^alice: \d+ messages of 24 hours in the log; recipients: .*\d+ deferred, \d+ sent$", text, re.MULTILINE
    )
    assert printed(run(postfix, "trace", "nobody", "-c", hold.settings_file)).startswith(
        "\nnobody: 0 messages of 24 hours in the log; recipients: none\n"
    )


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
@pytest.mark.parametrize("is_packed", [False, True])
def test_files_that_were_rotated_and_packed_are_read_and_only_this_login(
    tmp_path: Path, form: str, is_packed: bool
) -> None:
    now = time.time()
    events = [
        *lines_of(now - 90_000, "OLD1", "boris", "too-old@x"), *lines_of(now - 3000, "AB12", "boris", "first@x"),
        *lines_of(now - 2000, "AB12", "anna", "other@x"), *lines_of(now - 1500, "AB12", "", "inbound@x"),
        *lines_of(now - 1000, "AB12", "Boris@example.org, sasl_sender=x", "second@x", "bounced"),
        *lines_of(now - 900, "CD34", "boriss", "longer@x"), *lines_of(now - 800, "EF56", "x, sasl_username=boris",
            "forged@x"),
    ]  # fmt: skip
    paths = []
    for number, part in enumerate((events[:10], events[10:])):
        text = "".join(f"{time.strftime(form, time.gmtime(at))} relay {line}\n" for at, line in part)
        paths.append(tmp_path / f"mail.log.{number}{'.gz' if is_packed else ''}")
        paths[-1].write_bytes(gzip.compress(text.encode()) if is_packed else text.encode() + b"\xff broken\n")
    result = scripting.run("trace", "boris", *paths, "-c", scripting.settings_file(tmp_path, {}))
    assert re.findall(r"(\w+)@x", printed(result)) == ["first", "second"]
    assert "recipients: 1 bounced, 1 sent\n" in result.stdout
    assert re.fullmatch(
        r".*missing cannot be read",
        refusal(scripting.run("trace", "a", tmp_path / "missing", "-c", tmp_path / "policyd.cfg")),
    )


def test_the_journal_is_read_too_and_a_line_in_both_counts_once(
    postfix: Postfix, hold: Policyd, tmp_path: Path
) -> None:
    sent = submit(postfix, "alice")
    wait_until(lambda: sent not in queue(postfix) and f"{sent}: removed" in postfix.log, "it is delivered")
    lines = [line.split(" ", 4)[-1] for line in postfix.log.splitlines() if sent in line]
    environment = journal(tmp_path, *lines, *(line for _, line in lines_of(0, "FF00", "alice", "from-the-journal@x")))
    text = printed(run(postfix, "trace", "alice", "-c", hold.settings_file, **environment))
    assert "from-the-journal@x" in text
    assert text.count(f" {sent} ") == 1
