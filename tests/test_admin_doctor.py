"""policyd-admin doctor: each thing that keeps mail from being counted is a line with its cure; nothing is changed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Callable

import pytest
from scripting import commands_in, run, settings_file
from servers import Database, Policyd, Postfix, free_port
from stores import SQLiteStore

import policyd as module

LINE = "check_policy_service {{ {}, timeout=10s, default_action=DUNNO }}"


class Findings:
    """What doctor said."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        result = run("doctor", *arguments, **environment)
        assert result.stderr == "", result
        self.status, self.text = result.returncode, result.stdout
        found = re.findall(r"^(ok|warning|wrong) +([ -~]+)$", self.text, re.MULTILINE)
        self.lines = {kind: [text for name, text in found if name == kind] for kind in ("ok", "warning", "wrong")}
        assert len(found) == len(self.text.split("\n\n")[0].splitlines()), self.text
        assert (self.status == 1) == bool(self.lines["wrong"]), self.text
        assert commands_in(self.text)

    def has(self, kind: str, part: str) -> bool:
        """Tell whether there is such a line."""
        return any(part in text for text in self.lines[kind])


def journal(directory: Path, *lines: str) -> dict[str, str]:
    """Return an environment in which journalctl has these lines, of now."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime())
    (directory / "journalctl").write_text(
        "#!/bin/sh\ncat <<'END'\n" + "".join(f"{stamp} relay1 {line}\n" for line in lines) + "END\n"
    )
    (directory / "journalctl").chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def a_postfix(directory: Path, services: dict[str, str], **main: str) -> dict[str, str]:
    """Return an environment in which postconf has these services of smtpd, with their -o, and this main.cf."""
    defaults = {
        "smtpd_sasl_auth_enable": "no", "smtpd_proxy_filter": "", "queue_directory": "/var/spool/postfix",
        "smtpd_policy_service_timeout": "100s",
            "smtpd_policy_service_default_action": "451 4.3.5 Server configuration problem",
        **{f"smtpd_{name}_restrictions": "" for name in ("end_of_data", "data", "recipient", "relay", "sender", "helo",
            "client")},
    }  # fmt: skip
    texts = {
        "-x": "".join(f"{name} = {value}\n" for name, value in {**defaults, **main}.items()),
        "-Px": "".join(
            f"{name}/inet/{option}\n" for name, options in services.items() for option in options.split("; ") if option
        ),
        "-M": "".join(f"{name} inet n - y - - smtpd -o x=y\n" for name in services) + "pickup unix n - y 60 1 pickup\n",
    }
    for name, text in texts.items():
        (directory / f"out{name}").write_text(text)
    (directory / "postconf").write_text(
        f'#!/bin/sh\n[ -e "{directory}/out$1" ] || exit 1\nexec cat "{directory}/out$1"\n'
    )
    (directory / "postconf").chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


# ---- Postfix ------------------------------------------------------------------------------------------------------


def test_with_all_in_place_each_thing_is_said_to_be(postfix: Postfix, policyd: Callable[..., Policyd]) -> None:
    running = policyd(port=postfix.policy_port)
    before = sorted(path.name for path in running.statedir.iterdir())
    found = Findings("-c", running.settings_file, MAIL_CONFIG=str(postfix.directory / "etc"))
    for part in (
        "events can be counted: ", f"policyd runs with {running.settings_file}, pid {running.pid}", "MB are free",
        f"a request on inet:127.0.0.1:{postfix.policy_port} is answered",
        f"127.0.0.1:{postfix.submission_port}/inet asks policyd in smtpd_end_of_data_restrictions",
        f"127.0.0.1:{postfix.data_port}/inet asks policyd in smtpd_end_of_data_restrictions",
    ):  # fmt: skip
        assert found.has("ok", part), (part, found.text)
    (wrong,) = found.lines["wrong"]
    line = LINE.format(f"inet:127.0.0.1:{postfix.policy_port}")
    assert wrong == (
        f"127.0.0.1:{postfix.socket_port}/inet does not ask policyd; write:"
        f" -o {{ smtpd_end_of_data_restrictions = {line} }}"
    )
    assert sorted(path.name for path in running.statedir.iterdir()) == before
    assert "Updating db" not in "".join(line.text for line in running.log_lines())
    by_socket = policyd(bind=str(postfix.policy_socket))
    found = Findings("-c", by_socket.settings_file, MAIL_CONFIG=str(postfix.directory / "etc"))
    assert found.has("ok", f"127.0.0.1:{postfix.socket_port}/inet asks policyd")
    assert found.has("ok", f"a request on unix:{postfix.policy_socket} is answered")


ASKS = LINE.format("inet:127.0.0.1:9093")
END = "smtpd_end_of_data_restrictions"
SERVICES = {
    "submission": (f"smtpd_sasl_auth_enable = yes; {END} = {ASKS}", "ok",
        "submission/inet asks policyd in smtpd_end_of_data_restrictions"),
    "smtps": (f"smtpd_sasl_auth_enable = yes; smtpd_data_restrictions = reject_x, {ASKS}", "ok",
        "smtps/inet asks policyd in smtpd_data"),
    "587": ("smtpd_sasl_auth_enable = yes", "wrong",
        "587/inet does not ask policyd; write: -o { smtpd_end_of_data_restrictions = "),
    "588": (f"smtpd_sasl_auth_enable = yes; {END} = {ASKS.replace('9093', '9094')}", "wrong",
        "588/inet does not ask policyd"),
    "589": (f"smtpd_sasl_auth_enable = yes; smtpd_recipient_restrictions = {ASKS}", "wrong",
            "589/inet asks in smtpd_recipient_restrictions, where nothing can be counted"),
    "590": (f"smtpd_sasl_auth_enable = yes; {END} = {ASKS}; smtpd_proxy_filter = [127.0.0.1]:10024", "wrong",
        "590/inet has smtpd_proxy_filter"),
    "591": (f"smtpd_sasl_auth_enable = yes; {END} = {ASKS.replace(', default_action=DUNNO', '')}", "warning",
        "591/inet has no default_action=DUNNO"),
    "592": (f"smtpd_sasl_auth_enable = yes; {END} = check_policy_service inet:localhost:9093", "warning",
        "592/inet has no default_action"),
    "593": (f"smtpd_sasl_auth_enable = yes; {END} = {ASKS.replace('timeout=10s, ', '')}", "warning",
        "593/inet has no timeout=10s"),
    "smtp": ("", "", ""),
}  # fmt: skip


def test_each_mistake_of_a_service_is_found(tmp_path: Path) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    found = Findings("-c", file, **a_postfix(tmp_path, {name: options for name, (options, _, _) in SERVICES.items()}))
    for name, (_, kind, part) in SERVICES.items():
        said = [
            (kind, text) for kind, texts in found.lines.items() for text in texts if text.startswith(f"{name}/inet ")
        ]
        assert len(said) == (name != "smtp"), (name, found.text)
        assert not said or (said[0][0] == kind and part in said[0][1]), said


def test_what_main_cf_has_is_for_all_services(tmp_path: Path) -> None:
    file = settings_file(tmp_path, SQLiteStore(tmp_path / "events.sqlite3").settings)
    main = {"smtpd_sasl_auth_enable": "yes", END: "check_policy_service inet:127.0.0.1:9093",
            "smtpd_policy_service_default_action": "DUNNO", "smtpd_policy_service_timeout": "10s"}  # fmt: skip
    found = Findings("-c", file, **a_postfix(tmp_path, {"smtp": "", "submission": f"{END} = "}, **main))
    assert found.has("ok", "smtp/inet asks policyd")
    assert found.has("wrong", "submission/inet does not ask policyd")
    found = Findings("-c", file, **a_postfix(tmp_path, {"smtp": ""}))
    assert found.has("wrong", "no service of Postfix lets users log in")
    found = Findings("-c", file, MAIL_CONFIG="/nonexistent")
    assert found.has("warning", "postconf: fatal: open /nonexistent/main.cf")


# ---- policyd ----------------------------------------------------------------------------------------------------


def test_a_daemon_that_does_not_run_or_has_other_settings_is_wrong(
    tmp_path: Path, policyd: Callable[..., Policyd]
) -> None:
    file = settings_file(tmp_path, {**SQLiteStore(tmp_path / "events.sqlite3").settings, "port": str(free_port())})
    found = Findings("-c", file)
    assert found.has("wrong", f"policyd does not run with {file}")
    assert not found.has("wrong", "cannot listen")
    running = policyd()
    found = Findings("-c", file)
    assert found.has("wrong", f"pid {running.pid} has {running.settings_file}")
    taken = settings_file(tmp_path, {"statedir": str(tmp_path), "port": str(running.port)})
    assert not Findings("-c", taken).has("wrong", "cannot listen"), "policyd itself has the port"


def test_the_last_reload_is_told_as_far_as_the_log_tells(tmp_path: Path, policyd: Callable[..., Policyd]) -> None:
    running = policyd()
    file, ours, long_ago = running.settings_file, f"policyd[{running.pid}]: ", time.time() - 3600
    os.utime(file, (long_ago, long_ago))

    def warned(*lines: str) -> Findings:
        return Findings("-c", file, **journal(tmp_path, *lines))

    assert not warned().has("warning", "settings")
    failed = f"{ours}{file}:3: mode=audti: give enforce or audit; going on with the old settings"
    assert warned(failed).has("wrong", f"the last reload failed: {file}:3: mode=audti")
    assert not warned(failed.replace(ours, "policyd[1]: ")).has("wrong", "reload failed"), "another one's"
    os.utime(file, (time.time() + 60, time.time() + 60))
    assert warned().has("warning", "not read again as far as its log tells: systemctl reload policyd")
    os.utime(file, (time.time() - 1, time.time() - 1))
    assert not warned(f"{ours}settings read again: {file}").has("warning", "not read again")


def test_what_policyd_itself_finds_is_passed_on(tmp_path: Path, database: Database) -> None:
    database.query("DROP TABLE events")
    lines = ["max_networks=5", "early_signs=audit", "keep_days=30", "on_stop=/nonexistent/program"]
    found = Findings("-c", settings_file(tmp_path, {**database.settings(), "statedir": str(tmp_path)}, *lines))
    assert found.has("wrong", "there is no table events")
    assert found.has("wrong", "on_stop=/nonexistent/program")
    assert found.has("wrong", "max_networks= is gone") or found.has("warning", "max_networks= is gone")
    found = Findings("-c", settings_file(tmp_path, {**database.settings(), "dbpass": "'wrong'"}))
    assert found.has("wrong", "Access denied")


def test_the_clocks_of_both_and_the_free_disk_are_told(tmp_path: Path, database: Database) -> None:
    found = Findings("-c", settings_file(tmp_path, {**database.settings(), "statedir": str(tmp_path)}))
    assert found.has("ok", "the store's clock is 0.")
    assert found.has("ok", f"MB are free for the journal, in {tmp_path}/")


def test_a_mistake_in_the_settings_is_78(tmp_path: Path) -> None:
    (tmp_path / "policyd.cfg").write_text("mode=audti\n")
    result = run("doctor", "-c", tmp_path / "policyd.cfg")
    assert (result.returncode, result.stderr.count("\n")) == (78, 1)


@pytest.mark.parametrize("statedir", ["missing", "file"])
def test_a_statedir_that_is_none_is_no_traceback(tmp_path: Path, statedir: str) -> None:
    (tmp_path / "file").touch()
    found = Findings("-c", settings_file(tmp_path, {"statedir": str(tmp_path / statedir)}))
    assert found.has("wrong", "statedir")
    assert module.__version__
