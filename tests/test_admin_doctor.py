"""policyd-admin doctor: each thing that keeps mail from being counted is a line with its cure; nothing is changed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from scripting import Desk, commands_in, journal, program
from servers import Database, Postfix, Start, free_port, write_settings

LINE = "check_policy_service {{ {}, timeout=10s, default_action=DUNNO }}"


class Findings:
    def __init__(self, desk: Desk, **environment: str) -> None:
        result = desk.run("doctor", **environment)
        assert result.stderr == "", result
        self.text = result.stdout
        found = re.findall(r"^(ok|warning|wrong) +([ -~]+)$", self.text, re.MULTILINE)
        self.lines = {kind: [text for name, text in found if name == kind] for kind in ("ok", "warning", "wrong")}
        assert len(found) == len(self.text.split("\n\n")[0].splitlines()), self.text
        assert (result.returncode == 1) == bool(self.lines["wrong"]), self.text
        assert commands_in(self.text)

    def has(self, kind: str, part: str) -> bool:
        return any(part in text for text in self.lines[kind])


def a_postfix(directory: Path, services: dict[str, str], **main: str) -> dict[str, str]:
    """Return an environment in which Postfix has these services of smtpd, with their -o, and this main.cf."""
    write_settings(directory / "main.cf", **{"compatibility_level": "3.6", **main})
    lines = ["pickup unix n - y 60 1 pickup"]
    for name, options in services.items():
        lines += [f"{name} inet n - y - - smtpd", *(f"  -o {{ {each} }}" for each in options.split("; ") if each)]
    (directory / "master.cf").write_text("\n".join([*lines, ""]))
    return {"MAIL_CONFIG": str(directory)}


def test_with_all_in_place_each_thing_is_said_to_be(postfix: Postfix, policyd: Start) -> None:
    running = policyd(port=postfix.policy_port)

    def files() -> set[str]:
        return {path.name for path in running.statedir.iterdir() if "policyd.prom" not in path.name}  # once a minute

    before = files()
    found = Findings(Desk(running.settings_file), MAIL_CONFIG=str(postfix.directory / "etc"))
    for part in (
        "events can be counted: ", f"policyd runs with {running.settings_file}, pid {running.pid}",
        f"MB are free for the journal, in {running.statedir}/",
        f"a request on inet:127.0.0.1:{postfix.policy_port} is answered",
        f"127.0.0.1:{postfix.submission_port}/inet asks policyd in smtpd_end_of_data_restrictions",
        f"127.0.0.1:{postfix.data_port}/inet asks policyd in smtpd_end_of_data_restrictions",
    ):  # fmt: skip
        assert found.has("ok", part), (part, found.text)
    line = LINE.format(f"inet:127.0.0.1:{postfix.policy_port}")
    where, proxied = (f"127.0.0.1:{port}/inet" for port in (postfix.socket_port, postfix.proxied_port))
    remedy = f"does not ask policyd; write: -o {{ smtpd_end_of_data_restrictions = {line} }}"
    assert found.lines["wrong"] == [
        f"{where} {remedy}", f"{proxied} has smtpd_proxy_filter: it cannot hold; ask from the service behind it",
        f"[::1]:{postfix.ipv6_port}/inet {remedy}",
    ]  # fmt: skip
    assert files() == before
    assert "Updating db" not in "".join(line.text for line in running.log_lines())
    by_socket = policyd(bind=str(postfix.policy_socket))
    found = Findings(Desk(by_socket.settings_file), MAIL_CONFIG=str(postfix.directory / "etc"))
    assert found.has("ok", f"{where} asks policyd")
    assert found.has("ok", f"a request on unix:{postfix.policy_socket} is answered")


ASKS, AUTH = LINE.format("inet:127.0.0.1:9093"), "smtpd_sasl_auth_enable = yes"
END = "smtpd_end_of_data_restrictions"
SERVICES = {  # its options, the kind of its line, how that begins
    "submission": (f"{AUTH}; {END} = {ASKS}", "ok", f"asks policyd in {END}"),
    "smtps": (f"{AUTH[:-3]}YES; smtpd_data_restrictions = permit_x, {ASKS}, permit", "ok", "asks policyd in smtpd_d"),
    "587": (AUTH, "wrong", f"does not ask policyd; write: -o {{ {END} = "),
    "588": (f"{AUTH}; {END} = {ASKS.replace('9093', '9094')}", "wrong", "does not ask policyd"),
    "589": (f"{AUTH}; smtpd_recipient_restrictions = {ASKS}", "wrong",
            "asks in smtpd_recipient_restrictions, where nothing can be counted"),
    "590": (f"{AUTH}; {END} = {ASKS}; smtpd_proxy_filter = [127.0.0.1]:10024", "wrong", "has smtpd_proxy_filter"),
    "591": (f"{AUTH}; {END} = {ASKS.replace(', default_action=DUNNO', '')}", "warning", "has no default_action=DUNNO"),
    "592": (f"{AUTH}; {END} = check_policy_service,inet:[localhost]:9093", "warning", "has no default_action"),
    "594": (f"{AUTH}; {END} = permit_sasl_authenticated, {ASKS}", "wrong", "does not ask policyd"),
    "593": (f"{AUTH}; {END} = {ASKS.replace('timeout=10s, ', '')}", "warning", "has no timeout=10s"),
}  # fmt: skip


@pytest.mark.postfix
def test_each_mistake_of_a_service_is_found_and_main_cf_is_for_all(desk: Desk, tmp_path: Path) -> None:
    options = {name: options for name, (options, _, _) in SERVICES.items()}
    found = Findings(desk, **a_postfix(tmp_path, {**options, "smtp": ""}))
    assert found.text.count("/inet ") == len(SERVICES), found.text
    for name, (_, kind, begin) in SERVICES.items():
        assert found.has(kind, f"{name}/inet {begin}"), found.text
    main = {"smtpd_sasl_auth_enable": "yes", END: "check_policy_service inet:localhost:9093",
            "smtpd_policy_service_default_action": "DUNNO", "smtpd_policy_service_timeout": "10s"}  # fmt: skip
    found = Findings(desk, **a_postfix(tmp_path, {"smtp": "", "submission": f"{END} ="}, **main))
    assert found.has("ok", "smtp/inet asks policyd")
    assert found.has("wrong", "submission/inet does not ask policyd")
    found = Findings(desk, **a_postfix(tmp_path, {"smtp": ""}))
    assert found.has("wrong", "no service of Postfix lets users log in")
    desk.write(bind=f"{tmp_path}/a/socket")
    line, whole = (LINE.format(f"unix:{path}") for path in ("a/socket", f"{tmp_path}/a/socket"))
    options = {"587": f"{AUTH}; {END} = {line}", "588": f"{AUTH}; {END} = {whole}"}
    found = Findings(desk, **a_postfix(tmp_path, options, queue_directory=str(tmp_path)))
    assert found.has("ok", "587/inet asks policyd")
    assert found.has("wrong", f"588/inet is chrooted in {tmp_path}, and sees nothing else; write: {line}")


def test_a_daemon_that_does_not_run_or_has_other_settings_is_wrong(desk: Desk, policyd: Start) -> None:
    running = policyd()
    desk.write(port=str(free_port()))
    found = Findings(desk)
    assert found.has("wrong", f"policyd does not run with {desk.file}")
    assert not found.has("wrong", "cannot listen")
    assert found.has("warning", "postconf: fatal: open /nonexistent/main.cf")
    desk.write(port=str(running.port))
    assert not Findings(desk).has("wrong", "cannot listen"), "policyd itself has the port"
    desk.write(port=str(running.port), statedir=str(running.statedir))
    other = f"not run with {desk.file}: pid {running.pid} has {running.settings_file}"
    assert Findings(desk).has("wrong", other)


def test_a_reload_is_told_as_far_as_the_log_tells_and_a_restart_that_is_due(tmp_path: Path, policyd: Start) -> None:
    running = policyd()
    desk, file, ours = Desk(running.settings_file), running.settings_file, f"policyd[{running.pid}]: "
    program(tmp_path, "postconf", "exit 1")  # the real one waits before it fails

    def told(changed_s: int, *lines: str) -> Findings:
        at = time.time() + changed_s
        os.utime(file, (at, at))
        return Findings(desk, **journal(tmp_path, *lines))

    failed = f"{ours}{file}:3: mode=audti: give enforce or audit; going on with the old settings"
    assert not told(-3600).has("warning", "not read again")
    assert told(-3600, failed).has("wrong", f"the last reload failed: {file}:3: mode=audti")
    assert not told(-3600, failed.replace(ours, "policyd[1]: ")).has("wrong", "reload failed"), "another one's"
    assert told(60).has("warning", "not read again as far as its log tells: systemctl reload policyd")
    assert not told(-1, f"{ours}settings read again: {file}").has("warning", "not read again")
    os.utime(running.statedir / "policyd.pid", (time.time() - 900,) * 2)  # when it was started
    assert told(-60, f"{ours}Updating db: x/x; old settings/::1/1/1").has("warning", "not read again"), "a sender"
    running.write_settings(port=free_port())  # which a reload does not bring
    assert told(-3600).has("wrong", f"pid {running.pid}, but does not answer: systemctl restart policyd")


def test_what_policyd_itself_finds_is_passed_on(desk: Desk, tmp_path: Path, database: Database) -> None:
    desk.write(**database.settings())
    assert Findings(desk).has("ok", "the store's clock is ")
    database.query("DROP TABLE events")
    lines = ["max_networks=5", "early_signs=audit", "keep_days=30", "on_stop=/nonexistent/program"]
    desk.write(*lines, **{**database.settings(), "statedir": str(tmp_path / "missing")})
    found = Findings(desk)
    for part in ("there is no table events", "on_stop=/nonexistent/program", "max_networks= is gone", "statedir: "):
        assert found.has("wrong", part)
