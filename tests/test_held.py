"""scripts/policyd-held.sh: each held message belongs to its login, and only what is named is touched."""

from __future__ import annotations

import os
import re
import shutil
import smtplib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import scripting
from scripting import COMMON, NOBODY, SCRIPTS, copy_scripts, printed, refusal
from servers import Policyd, Postfix, program, temporary_directory, wait_until

HELD = SCRIPTS / "policyd-held.sh"
QUOTA = 3
NO_LOGIN = "(no login)"


# --- sending, and asking the script ---


def queue_id_of(code: int, reply: bytes) -> str:
    match = re.search(rb"queued as (\w+)", reply)
    assert match, (code, reply)
    return match[1].decode()


def send(
    session: smtplib.SMTP,
    sender: str = "alice@example.org",
    recipients: int = 1,
    domain: str = "example.net",
    parameter: str = "",
    text: str = "Subject: hello\r\n\r\nHello\r\n",
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


def hold_without_login(postfix: Postfix, **message: Any) -> str:
    """Let a person hold a message that came in without a login."""
    queue_id = submit(postfix, False, domain="later.example.net", **message)
    wait_until(lambda: postfix.queue_name(queue_id) == "deferred", "the message is deferred")
    postfix.put_on_hold(queue_id)
    return queue_id


def run(
    postfix: Postfix | None,
    *arguments: object,
    shell: str = "sh",
    script: Path = HELD,
    user: int | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the script on the private Postfix."""
    if postfix:
        environment.setdefault("MAIL_CONFIG", str(postfix.directory / "etc"))
    return scripting.run(script, *arguments, shell=shell, environment=environment, user=user)


def tables(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of each login's table: queue id, date, time, size, recipients, sender."""
    found: dict[str, list[list[str]]] = {}
    for block in text.split("\n\n"):
        heading, *lines = block.splitlines()
        match = re.match(r"(.+): (\d+) messages?, (\d+) recipients?(, not held by policyd; never touched)?$", heading)
        if not match or heading.startswith("On hold:"):
            continue
        assert lines.pop(0).split() == ["queue", "id", "arrived", "size", "rcpts", "sender"]
        found[match[1]] = rows = [line.split(None, 5) for line in lines if not line.startswith("...")]
        assert bool(match[4]) == (match[1] == NO_LOGIN)
        if len(rows) == len(lines):
            assert (int(match[2]), int(match[3])) == (len(rows), sum(int(row[4]) for row in rows))
    return found


def by_login(text: str) -> dict[str, set[str]]:
    """Return the queue ids of each login."""
    return {login: {row[0] for row in rows} for login, rows in tables(text).items()}


def on_hold(postfix: Postfix) -> set[str]:
    return {queue_id for queue_id, name in postfix.queue().items() if name == "hold"}


@pytest.fixture(params=["dash", "bash"])
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def hold(postfix: Postfix, policyd: Callable[..., Policyd]) -> Iterator[Policyd]:
    """An empty queue, and a daemon that holds alice's mail from the quota on, and all of boris and carla."""
    postfix.delete("ALL")
    already_logged = len(postfix.log)
    yield policyd(port=postfix.policy_port, defaultquota=QUOTA, blacklist=["boris", "carla"])
    print(postfix.log[already_logged:])
    postfix.delete("ALL")


def wrapped(name: str, directory: Path, first: str) -> dict[str, Any]:
    """Return an environment in which a program of Postfix does something else `first`."""
    wrapper = directory / name
    wrapper.write_text(f'#!/bin/sh\n{first}\nexec {program(name, "postfix")} "$@"\n')
    wrapper.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


# --- the list ---


def test_each_held_message_stands_under_its_login(postfix: Postfix, hold: Policyd, shell: str) -> None:
    submit(postfix, "alice", recipients=QUOTA - 1)  # passes
    alice = [submit(postfix, "alice", recipients=number) for number in (1, 2)]
    boris = submit(postfix, "boris", sender="boris@example.org", recipients=9, text="x" * 20000)
    carla = submit(postfix, "carla@example.org", sender="")
    person = hold_without_login(postfix, sender="someone@example.com")
    text = printed(run(postfix, "-c", hold.settings_file, shell=shell))
    heading, _, columns, *summary = text.split("\n\n" + "boris: ")[0].splitlines()
    assert heading == "On hold: 5 messages, 14 recipients"
    assert columns.split() == ["messages", "recipients", "since", "login"]
    assert [[*re.split(r"  +", line.strip())[:2], line[40:].strip()] for line in summary] == [
        ["1", "9", "boris"], ["2", "3", "alice"], ["1", "1", "carla"], ["1", "1", NO_LOGIN],
    ]  # fmt: skip
    assert by_login(text) == {"boris": {boris}, "alice": set(alice), "carla": {carla}, NO_LOGIN: {person}}
    row = tables(text)["boris"][0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", f"{row[1]} {row[2]}")
    assert row[3:] == ["19k", "9", "boris@example.org"]
    assert tables(text)["carla"][0][5] == "MAILER-DAEMON"  # as mailq shows the null sender


def test_the_messages_of_the_named_logins_are_listed(postfix: Postfix, hold: Policyd, shell: str) -> None:
    boris = submit(postfix, "boris")
    carla = submit(postfix, "carla@example.org")

    def listed(*logins: str) -> str:
        return printed(run(postfix, "-c", hold.settings_file, *logins, shell=shell))

    assert by_login(listed("boris")) == {"boris": {boris}}
    assert by_login(listed("Carla@example.com")) == {"carla": {carla}}
    assert listed("anna") == "nothing is held\n"
    assert listed(NO_LOGIN, "boris@") == listed(NO_LOGIN, "boris").replace("boris@", "boris")
    for login in ("release", "delete", "--yes", "-x", "a:"):
        assert listed("--", login) == "nothing is held\n"
    text = listed("boris", "anna", "carla")
    assert by_login(text) == {"boris": {boris}, "carla": {carla}}
    assert text.endswith("\n\nanna: nothing is held\n")


def test_the_domain_belongs_to_the_login_where_the_settings_say_so(postfix: Postfix, hold: Policyd) -> None:
    carla = submit(postfix, "carla@example.org")
    hold.settings_file.write_text("strip_domain = No\n")
    assert by_login(printed(run(postfix, "-c", hold.settings_file))) == {"carla@example.org": {carla}}
    assert printed(run(postfix, "-c", hold.settings_file, "carla")) == "nothing is held\n"
    assert by_login(printed(run(postfix, "-c", hold.settings_file, "CARLA@example.org")))


def test_an_empty_hold_queue_is_no_mistake(postfix: Postfix, hold: Policyd, shell: str) -> None:
    assert printed(run(postfix, "-c", hold.settings_file, shell=shell)) == "nothing is held\n"
    assert printed(run(postfix, "-c", hold.settings_file, "alice", shell=shell)) == "nothing is held\n"


def test_many_messages_are_read_in_a_few_calls(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    with postfix.session(login="boris") as session:
        sent = [send(session, sender=f"boris{number}@example.org") for number in range(60)]
    calls = tmp_path / "calls"
    environment = wrapped("postcat", tmp_path, f'echo >>"{calls}"')
    text = printed(run(postfix, "-c", hold.settings_file, "boris", **environment))
    assert by_login(text) == {"boris": set(sent)}
    assert {row[0]: row[5] for row in tables(text)["boris"]} == {
        queue_id: f"boris{number}@example.org" for number, queue_id in enumerate(sent)
    }
    arrived = [f"{row[1]} {row[2]}" for row in tables(text)["boris"]]
    assert arrived == sorted(arrived)
    assert len(calls.read_text()) == 1
    # More than one call can take.
    script = copy_scripts(tmp_path, HELD.name)
    assert "\nat_once=100 " in HELD.read_text()
    script.write_text(HELD.read_text().replace("\nat_once=100 ", "\nat_once=8 "))
    assert printed(run(postfix, "-c", hold.settings_file, "boris", script=script, **environment)) == text
    assert len(calls.read_text()) == 1 + 8
    # The list of all has the first ones of each.
    text = printed(run(postfix, "-c", hold.settings_file))
    assert len(by_login(text)["boris"]) == 10
    assert "... and 50 more; policyd-held.sh LOGIN shows all\n" in text


def test_a_message_that_goes_away_meanwhile_is_left_out(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    sent = [submit(postfix, "boris") for _ in range(4)]
    postsuper = program("postsuper", "postfix")
    first = f"{postsuper} -d {sent[1]}; {postsuper} -H {sent[2]}"
    environment = wrapped("postcat", tmp_path, f'if mkdir "{tmp_path}/done"; then {first}; fi 2>/dev/null')
    text = printed(run(postfix, "-c", hold.settings_file, **environment))
    assert by_login(text) == {"boris": {sent[0], sent[3]}}


def test_it_lists_while_postfix_is_down(postfix: Postfix, hold: Policyd) -> None:
    boris = submit(postfix, "boris")
    postfix.stop()
    try:
        assert by_login(printed(run(postfix, "-c", hold.settings_file))) == {"boris": {boris}}
    finally:
        postfix.launch()


# --- what a client sends ---


def xtext(text: str) -> str:
    """Return the text as a parameter of RFC 3461 holds it."""
    return "".join(character if character.isalnum() else f"+{ord(character):02X}" for character in text)


def test_nobody_can_put_a_message_under_another_login(postfix: Postfix, hold: Policyd, shell: str) -> None:
    boris = [submit(postfix, "boris") for _ in range(2)]
    person = hold_without_login(postfix)
    forged = "".join(
        f"\n*** MESSAGE FILE END hold/{queue_id} ***\n*** ENVELOPE RECORDS hold/{queue_id} ***\n"
        "message_arrival_time: Sun Nov 22 13:31:10 2020\nnamed_attribute: sasl_username=alice\nsender: a\n"
        for queue_id in (*boris, person)
    )
    lines = "sasl_username=alice\r\nnamed_attribute: sasl_username=alice\r\n"
    # Postfix decodes the original recipient, line ends included, and keeps it in the envelope.
    boris.append(submit(postfix, "boris", parameter=f"ORCPT=rfc822;x{xtext(forged)}"))
    boris.append(submit(postfix, "boris", text=f"Subject: x\r\nsasl_username: alice\r\n\r\n{lines}{forged}\r\n"))
    persons = [person]
    persons.append(hold_without_login(postfix, parameter=f"ORCPT=rfc822;x{xtext(forged)}"))
    persons.append(hold_without_login(postfix, text=f"sasl_username: alice\r\n\r\n{lines}"))
    text = printed(run(postfix, "-c", hold.settings_file, shell=shell))
    assert by_login(text) == {"boris": set(boris), NO_LOGIN: set(persons)}
    assert " 2020-" not in text


def test_nobody_can_put_a_message_beside_another_queue_id(postfix: Postfix, hold: Policyd, shell: str) -> None:
    alice = submit(postfix, "alice", recipients=QUOTA)
    ugly = (
        rf'"\"}}], \"queue_name\": \"hold\", \"queue_id\": \"{alice}\", \"sender\": \"x"@example.org',
        r'"a\\\", \"recipients\": [{\"address\": \"{\"address\": \"b\\"@example.org',
        '"\x1b]0;owned\x07\x7f $(touch x)`touch x`;%s%n\\\\"@example.org',
        "x" * 60 + "@example.org",
    )
    boris = [submit(postfix, "boris", sender=sender) for sender in ugly]
    text = printed(run(postfix, "-c", hold.settings_file, shell=shell))
    assert by_login(text) == {"alice": {alice}, "boris": set(boris)}
    senders = {row[0]: row[5] for row in tables(text)["boris"]}
    assert {row[4] for row in tables(text)["boris"]} == {"1"}
    assert senders[boris[3]].endswith("x>")


# --- letting go and deleting ---


def test_without_yes_it_only_says_what_it_would_do(postfix: Postfix, hold: Policyd, shell: str) -> None:
    alice = submit(postfix, "alice", recipients=QUOTA)
    boris = [submit(postfix, "boris") for _ in range(12)]
    files = list((postfix.directory / "queue" / "hold").rglob("*"))
    before = [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files]
    for command in ("release", "delete"):
        text = printed(run(postfix, "-c", hold.settings_file, command, "Boris@example.com", shell=shell))
        assert text.startswith(f"Would {command} 12 messages:\n\n")
        assert text.endswith("\n\nNothing was changed; to do it, add --yes\n")
        assert by_login(text) == {"boris": set(boris)}
        text = printed(run(postfix, "-c", hold.settings_file, command, boris[3], alice, boris[3], shell=shell))
        assert text.startswith(f"Would {command} 2 messages:\n\n")
        assert by_login(text) == {"alice": {alice}, "boris": {boris[3]}}
    assert [(path, path.stat().st_mtime_ns, path.stat().st_mode) for path in files] == before
    assert on_hold(postfix) == {alice, *boris}


def test_releasing_a_login_delivers_its_messages_and_no_others(postfix: Postfix, hold: Policyd, shell: str) -> None:
    boris = submit(postfix, "boris", text=f"Subject: boris {shell}\r\n\r\n")
    with postfix.session(login="alice") as session:
        for number in (0, 1):
            send(session, recipients=QUOTA - number, text=f"Subject: alice {shell} {number}\r\n\r\n")
    text = printed(run(postfix, "-c", hold.settings_file, "release", "alice", "--yes", shell=shell))
    assert text.splitlines()[0] == "released 2 messages"
    assert on_hold(postfix) == {boris}
    postfix.flush()
    wait_until(lambda: set(postfix.queue()) == {boris}, "the released messages are delivered")
    delivered = "".join(postfix.delivered())
    assert all(f"Subject: alice {shell} {number}\n" in delivered for number in (0, 1))
    assert f"Subject: boris {shell}\n" not in delivered


def test_a_queue_id_is_that_message_alone(postfix: Postfix, hold: Policyd, shell: str) -> None:
    sent = [submit(postfix, "boris") for _ in range(4)]
    text = printed(run(postfix, "-c", hold.settings_file, "delete", "--yes", sent[1], sent[2], shell=shell))
    assert text == "deleted 2 messages\n"
    assert postfix.queue() == {sent[0]: "hold", sent[3]: "hold"}
    text = printed(run(postfix, "-c", hold.settings_file, "release", sent[0], "--yes", shell=shell))
    assert text.splitlines()[0] == "released 1 message"
    assert on_hold(postfix) == {sent[3]}


def test_what_others_hold_or_queue_stays(postfix: Postfix, hold: Policyd) -> None:
    deferred = submit(postfix, False, domain="later.example.net")
    person = hold_without_login(postfix)
    alice = submit(postfix, "alice", recipients=QUOTA)
    submit(postfix, "boris")
    assert printed(run(postfix, "-c", hold.settings_file, "delete", "boris", "--yes")) == "deleted 1 message\n"
    assert postfix.queue() == {deferred: "deferred", person: "hold", alice: "hold"}


def test_what_leaves_the_hold_queue_meanwhile_stays_where_it_is(
    postfix: Postfix, hold: Policyd, tmp_path: Path
) -> None:
    sent = [submit(postfix, "boris", domain="later.example.net") for _ in range(3)]
    environment = wrapped("postsuper", tmp_path, f"{program('postsuper', 'postfix')} -H {sent[1]} 2>/dev/null")
    text = printed(run(postfix, "-c", hold.settings_file, "delete", "boris", "--yes", **environment))
    assert text == "deleted 2 messages\n1 message had left the hold queue before\n"
    assert set(postfix.queue()) == {sent[1]}


def test_when_postsuper_fails_it_is_said(postfix: Postfix, hold: Policyd, tmp_path: Path) -> None:
    boris = submit(postfix, "boris")
    environment = wrapped("postsuper", tmp_path, "echo 'postsuper: fatal: disk on fire' >&2; exit 1")
    line = refusal(run(postfix, "-c", hold.settings_file, "delete", "boris", "--yes", **environment))
    assert line == "postsuper: fatal: disk on fire; policyd-held.sh shows what is left"
    assert on_hold(postfix) == {boris}


# --- what is wrong ---


@pytest.mark.parametrize("command", ["release", "delete"])
def test_nothing_is_done_when_one_argument_is_wrong(postfix: Postfix, hold: Policyd, command: str, shell: str) -> None:
    boris = submit(postfix, "boris")
    person = hold_without_login(postfix)
    unknown = "{}: no login and no queue id of a held message; nothing was changed"
    for argument, message in (
        ("anna", unknown.format("anna")),
        (NO_LOGIN, unknown.format(NO_LOGIN)),
        ("ALL", unknown.format("ALL")),
        ("-", None),
        ("*", unknown.format("*")),
        (boris.lower() + "0", unknown.format(boris.lower() + "0")),
        ("\x1b[31m\\é'\"", unknown.format(r"\x1b[31m\x5c\xc3\xa9'" + '"')),
        ("\tboris", unknown.format(r"\x09boris")),
        ("boris\nboris", "a line end is in no login and in no queue id"),
        (person, f"{person} has no login, it was not policyd that held it; nothing was changed: use postsuper"),
    ):
        result = run(postfix, "-c", hold.settings_file, command, boris, argument, "boris", "--yes", shell=shell)
        if message:
            assert refusal(result) == message
        else:
            assert result.returncode == 2
    assert on_hold(postfix) == {boris, person}


def test_a_queue_id_that_is_a_login_too_is_refused(postfix: Postfix, hold: Policyd) -> None:
    boris = submit(postfix, "boris")
    while boris.isdigit():  # it would be the same in small letters
        postfix.delete(boris)
        boris = submit(postfix, "boris")
    postfix.add_login(boris.lower())
    other = submit(postfix, boris.lower(), recipients=QUOTA)
    line = refusal(run(postfix, "-c", hold.settings_file, "delete", boris, "--yes"))
    assert line == f"{boris} is a login and the queue id of a held message too; nothing was changed: use postsuper"
    assert on_hold(postfix) == {boris, other}
    # Whoever writes it small means the login: queue ids are told apart by their capitals.
    assert printed(run(postfix, "-c", hold.settings_file, "delete", boris.lower(), "--yes")) == "deleted 1 message\n"
    assert on_hold(postfix) == {boris}


def test_only_root_may_look() -> None:
    directory = temporary_directory()
    directory.chmod(0o755)
    try:
        script = copy_scripts(directory, HELD.name)
        line = refusal(run(None, script=script, user=NOBODY if os.geteuid() == 0 else None))
        assert line == "only root may look into the hold queue; run this as root"
    finally:
        shutil.rmtree(directory)


def test_a_machine_without_postfix_is_named_so(postfix: Postfix, tmp_path: Path) -> None:
    script = tmp_path / "script"  # for which there is nothing in /usr/sbin
    script.write_text(f"exec unshare --mount sh -c 'mount -t tmpfs none /usr/sbin && exec sh {HELD}'\n")
    line = refusal(run(postfix, script=script))
    assert line == "postqueue is not installed: no Postfix on this machine?"


@pytest.mark.parametrize("arguments", [[], ["boris"], ["delete", "boris", "--yes"]])
def test_a_postfix_that_cannot_be_asked_is_said(
    postfix: Postfix, hold: Policyd, tmp_path: Path, arguments: list[str], shell: str
) -> None:
    boris = submit(postfix, "boris")
    arguments = ["-c", str(hold.settings_file), *arguments]
    line = refusal(run(postfix, *arguments, shell=shell, MAIL_CONFIG="/nonexistent"))
    assert line == "postqueue: fatal: open /nonexistent/main.cf: No such file or directory"
    environment = wrapped("postcat", tmp_path, "echo 'postcat: fatal: no memory' >&2; exit 1")
    assert refusal(run(postfix, *arguments, shell=shell, **environment)) == "postcat: fatal: no memory"
    (tmp_path / "postcat").unlink()
    environment = wrapped("postqueue", tmp_path, 'echo "{"; exit 0')
    line = refusal(run(postfix, *arguments, shell=shell, **environment))
    assert line == "postqueue -j does not say what this script understands"
    assert on_hold(postfix) == {boris}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ": no such file"),
        ("strip_domain=maybe\n", ":1: strip_domain=maybe is neither yes nor no"),
        ("\ns3cret\n", ":2: no '='; a line is key=value, a comment starts with '#'"),
    ],
)
def test_settings_that_cannot_be_used_stop_it(
    postfix: Postfix, hold: Policyd, tmp_path: Path, text: str | None, message: str
) -> None:
    boris = submit(postfix, "boris")
    settings = tmp_path / "policyd.cfg"
    if text is not None:
        settings.write_text(text)
    assert refusal(run(postfix, "-c", settings, "delete", "boris", "--yes")) == f"{settings}{message}"
    assert on_hold(postfix) == {boris}


@pytest.mark.parametrize(
    "arguments",
    [["-x"], ["-c"], ["--help"], ["--yes"], ["boris", "--yes"], ["release"], ["delete", "--yes"], ["delete", ""],
     ["release", "boris", "-y"], ["--yes", "delete", "boris"], ["--", ""]],
)  # fmt: skip
def test_a_wrong_call_gets_the_usage(arguments: list[str], shell: str) -> None:
    result = run(None, *arguments, shell=shell)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Usage: policyd-held.sh [-c FILE] [LOGIN...]\n" in result.stderr


def test_help_is_no_mistake(shell: str) -> None:
    text = printed(run(None, "-h", shell=shell))
    assert text.startswith("Usage: policyd-held.sh [-c FILE] [LOGIN...]\n")
    assert "/etc/postfix/policyd.cfg" in text


def test_a_missing_common_part_is_said(tmp_path: Path) -> None:
    shutil.copy(HELD, tmp_path)
    line = refusal(run(None, "boris", script=tmp_path / HELD.name))
    assert line == f"{tmp_path}/{COMMON.name} is missing; install it beside this script"
