"""policyd-admin doctor: each thing that keeps mail from being counted is a line with its cure; nothing is changed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Callable

from scripting import commands_in, embedded, journal, program, run, settings_file
from servers import Database, Policyd, Postfix, free_port

LINE = "check_policy_service {{ {}, timeout=10s, default_action=DUNNO }}"


class Findings:
    """What doctor said."""

    def __init__(self, file: Path, **environment: str) -> None:
        result = run("doctor", "-c", file, **environment)
        assert result.stderr == "", result
        self.text = result.stdout
        found = re.findall(r"^(ok|warning|wrong) +([ -~]+)$", self.text, re.MULTILINE)
        self.lines = {kind: [text for name, text in found if name == kind] for kind in ("ok", "warning", "wrong")}
        assert len(found) == len(self.text.split("\n\n")[0].splitlines()), self.text
        assert (result.returncode == 1) == bool(self.lines["wrong"]), self.text
        assert commands_in(self.text)

    def has(self, kind: str, part: str) -> bool:
        """Tell whether there is such a line."""
        return any(part in text for text in self.lines[kind])


def a_postfix(directory: Path, services: dict[str, str], **main: str) -> dict[str, str]:
    """Return an environment in which postconf has these services of smtpd, with their -o, and this main.cf."""
    names = ("end_of_data", "data", "recipient", "relay", "sender", "helo", "client")
    defaults = {
        "smtpd_sasl_auth_enable": "no", "smtpd_proxy_filter": "", "queue_directory": "/var/spool/postfix",
        "smtpd_policy_service_timeout": "100s",
        "smtpd_policy_service_default_action": "451 4.3.5 Server configuration problem",
        **{f"smtpd_{name}_restrictions": "" for name in names},
    }  # fmt: skip
    texts = {
        "-x": "".join(f"{name} = {value}\n" for name, value in {**defaults, **main}.items()),
        "-Px": "".join(f"{name}/inet/{option}\n" for name, options in services.items()
                       for option in options.split("; ") if option),
        "-M": "".join(f"{name} inet n - y - - smtpd -o x=y\n" for name in services) + "pickup unix n - y 60 1 pickup\n",
    }  # fmt: skip
    for name, text in texts.items():
        (directory / f"out{name}").write_text(text)
    return program(directory, "postconf", f'exec cat "{directory}/out$1"')


# ---- Postfix ------------------------------------------------------------------------------------------------------


def files(daemon: Policyd) -> set[str]:
    """Return what is in its statedir, but for the figures, which it writes once a minute."""
    return {path.name for path in daemon.statedir.iterdir() if not path.name.startswith("policyd.prom")}


def test_with_all_in_place_each_thing_is_said_to_be(postfix: Postfix, policyd: Callable[..., Policyd]) -> None:
    running = policyd(port=postfix.policy_port)
    before = files(running)
    found = Findings(running.settings_file, MAIL_CONFIG=str(postfix.directory / "etc"))
    for part in (
        "events can be counted: ", f"policyd runs with {running.settings_file}, pid {running.pid}",
        f"MB are free for the journal, in {running.statedir}/",
        f"a request on inet:127.0.0.1:{postfix.policy_port} is answered",
        f"127.0.0.1:{postfix.submission_port}/inet asks policyd in smtpd_end_of_data_restrictions",
        f"127.0.0.1:{postfix.data_port}/inet asks policyd in smtpd_end_of_data_restrictions",
    ):  # fmt: skip
        assert found.has("ok", part), (part, found.text)
    (wrong,) = found.lines["wrong"]
    line = LINE.format(f"inet:127.0.0.1:{postfix.policy_port}")
    where = f"127.0.0.1:{postfix.socket_port}/inet"
    assert wrong == f"{where} does not ask policyd; write: -o {{ smtpd_end_of_data_restrictions = {line} }}"
    assert files(running) == before
    assert "Updating db" not in "".join(line.text for line in running.log_lines())
    by_socket = policyd(bind=str(postfix.policy_socket))
    found = Findings(by_socket.settings_file, MAIL_CONFIG=str(postfix.directory / "etc"))
    assert found.has("ok", f"{where} asks policyd")
    assert found.has("ok", f"a request on unix:{postfix.policy_socket} is answered")


ASKS, AUTH = LINE.format("inet:127.0.0.1:9093"), "smtpd_sasl_auth_enable = yes"
END = "smtpd_end_of_data_restrictions"
SERVICES = {  # its options, the kind of its line, how that begins
    "submission": (f"{AUTH}; {END} = {ASKS}", "ok", f"asks policyd in {END}"),
    "smtps": (f"{AUTH}; smtpd_data_restrictions = reject_x, {ASKS}", "ok", "asks policyd in smtpd_data"),
    "587": (AUTH, "wrong", f"does not ask policyd; write: -o {{ {END} = "),
    "588": (f"{AUTH}; {END} = {ASKS.replace('9093', '9094')}", "wrong", "does not ask policyd"),
    "589": (f"{AUTH}; smtpd_recipient_restrictions = {ASKS}", "wrong",
            "asks in smtpd_recipient_restrictions, where nothing can be counted"),
    "590": (f"{AUTH}; {END} = {ASKS}; smtpd_proxy_filter = [127.0.0.1]:10024", "wrong", "has smtpd_proxy_filter"),
    "591": (f"{AUTH}; {END} = {ASKS.replace(', default_action=DUNNO', '')}", "warning", "has no default_action=DUNNO"),
    "592": (f"{AUTH}; {END} = check_policy_service inet:localhost:9093", "warning", "has no default_action"),
    "593": (f"{AUTH}; {END} = {ASKS.replace('timeout=10s, ', '')}", "warning", "has no timeout=10s"),
}  # fmt: skip


def test_each_mistake_of_a_service_is_found_and_main_cf_is_for_all(tmp_path: Path) -> None:
    file = settings_file(tmp_path, embedded(tmp_path).settings)
    options = {name: options for name, (options, _, _) in SERVICES.items()}
    found = Findings(file, **a_postfix(tmp_path, {**options, "smtp": ""}))
    said = {text.partition("/inet ")[0]: (kind, text.partition("/inet ")[2])
            for kind, texts in found.lines.items() for text in texts if "/inet " in text}  # fmt: skip
    assert said.keys() == SERVICES.keys()
    for name, (_, kind, begin) in SERVICES.items():
        assert said[name][0] == kind, found.text
        assert said[name][1].startswith(begin), found.text
    main = {"smtpd_sasl_auth_enable": "yes", END: "check_policy_service inet:127.0.0.1:9093",
            "smtpd_policy_service_default_action": "DUNNO", "smtpd_policy_service_timeout": "10s"}  # fmt: skip
    found = Findings(file, **a_postfix(tmp_path, {"smtp": "", "submission": f"{END} = "}, **main))
    assert found.has("ok", "smtp/inet asks policyd")
    assert found.has("wrong", "submission/inet does not ask policyd")
    found = Findings(file, **a_postfix(tmp_path, {"smtp": ""}))
    assert found.has("wrong", "no service of Postfix lets users log in")


# ---- policyd ----------------------------------------------------------------------------------------------------


def test_a_daemon_that_does_not_run_or_has_other_settings_is_wrong(
    tmp_path: Path, policyd: Callable[..., Policyd]
) -> None:
    running = policyd()
    file = settings_file(tmp_path, {**embedded(tmp_path).settings, "port": str(free_port())})
    found = Findings(file)
    assert found.has("wrong", f"policyd does not run with {file}")
    assert not found.has("wrong", "cannot listen")
    assert found.has("warning", "postconf: fatal: open /nonexistent/main.cf")
    taken = settings_file(tmp_path, {"statedir": str(tmp_path), "port": str(running.port)})
    assert not Findings(taken).has("wrong", "cannot listen"), "policyd itself has the port"
    other = settings_file(tmp_path, {"statedir": str(running.statedir), "port": str(running.port)})
    assert Findings(other).has("wrong", f"not run with {other}: pid {running.pid} has {running.settings_file}")


def test_the_last_reload_is_told_as_far_as_the_log_tells(tmp_path: Path, policyd: Callable[..., Policyd]) -> None:
    running = policyd()
    file, ours = running.settings_file, f"policyd[{running.pid}]: "

    program(tmp_path, "postconf", "exit 1")  # the real one waits before it fails

    def told(changed_s: int, *lines: str) -> Findings:
        at = time.time() + changed_s
        os.utime(file, (at, at))
        return Findings(file, **journal(tmp_path, *lines))

    assert not told(-3600).has("warning", "not read again")
    failed = f"{ours}{file}:3: mode=audti: give enforce or audit; going on with the old settings"
    assert told(-3600, failed).has("wrong", f"the last reload failed: {file}:3: mode=audti")
    assert not told(-3600, failed.replace(ours, "policyd[1]: ")).has("wrong", "reload failed"), "another one's"
    assert told(60).has("warning", "not read again as far as its log tells: systemctl reload policyd")
    assert not told(-1, f"{ours}settings read again: {file}").has("warning", "not read again")


def test_what_policyd_itself_finds_is_passed_on(tmp_path: Path, database: Database) -> None:
    settings = {**database.settings(), "statedir": str(tmp_path)}
    assert Findings(settings_file(tmp_path, settings)).has("ok", "the store's clock is ")
    database.query("DROP TABLE events")
    lines = ["max_networks=5", "early_signs=audit", "keep_days=30", "on_stop=/nonexistent/program"]
    found = Findings(settings_file(tmp_path, settings, *lines))
    assert found.has("wrong", "there is no table events")
    assert found.has("wrong", "on_stop=/nonexistent/program")
    assert found.has("wrong", "max_networks= is gone")
    assert Findings(settings_file(tmp_path, {**settings, "dbpass": "'wrong'"})).has("wrong", "Access denied")
    (tmp_path / "file").touch()
    for statedir in ("missing", "file"):
        found = Findings(settings_file(tmp_path, {"statedir": str(tmp_path / statedir)}))
        assert found.has("wrong", "statedir")
