"""install.sh on a machine to throw away: what it does there, what it refuses, and what it leaves behind."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from installing import FILES, Machine, Result, package, refusal, succeeded
from servers import ROOT

import policyd

pytestmark = pytest.mark.postfix  # needs root as the tests with Postfix do, and nothing else of theirs

SETTINGS = "/etc/postfix/policyd.cfg"
UNIT = "/etc/systemd/system/policyd.service"
PROGRAM = "/usr/local/bin/policyd"
OLD_SCRIPTS = [f"/usr/local/sbin/policyd-{name}.sh" for name in ("user", "held", "whatif", "common")]
TASKS: list[list[str]] = [[], ["--remove"], ["--purge"]]
FOREIGN_UNIT = "[Unit]\nDescription=Policyd go daemon for Postfix\n[Service]\nExecStart=/usr/local/bin/policyd\n"
FOREIGN_PROGRAM = b"\x7fELF\0 go"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.remove()


def install(machine: Machine, *arguments: str, **environment: str) -> Result:
    return machine.run("/project/scripts/install.sh", *arguments, **environment)


def installed(result: Result) -> str:
    """Return what was said; status 0 whatever doctor has found wrong: there is no Postfix, and no daemon."""
    assert result.returncode == 0, result
    return result.stdout


def test_a_fresh_installation_is_complete_and_says_the_two_steps_left(machine: Machine) -> None:
    said = installed(install(machine))
    assert set(machine.files()) == {f"/usr/local/{name}" for name in FILES} | {UNIT, SETTINGS}
    assert machine.path(SETTINGS).read_text() == (ROOT / "policyd.cfg.example").read_text()
    assert machine.owner(SETTINGS) == "root:policyd 640"
    assert machine.owner("/var/lib/policyd") == "policyd:policyd 755"
    assert said.startswith(f"policyd {policyd.__version__}")
    assert "\n    systemctl enable --now policyd\n" in said
    assert (
        "\n    -o { smtpd_end_of_data_restrictions = check_policy_service"
        " { inet:127.0.0.1:9093, timeout=10s, default_action=DUNNO } }\n" in said
    )
    assert machine.told()[0] == "daemon-reload"
    assert machine.run("runuser", "-u", "policyd", "--", "policyd", "--check-settings").returncode == 0


def test_the_second_run_changes_nothing(machine: Machine) -> None:
    install(machine)
    machine.path(SETTINGS).write_text("defaultquota=77\nbind=/var/spool/postfix/policyd/socket\n")
    before = machine.files()
    assert "check_policy_service { unix:policyd/socket, " in installed(install(machine))
    assert machine.files() == before


def make_old(machine: Machine) -> None:
    """Install what 0.1.0 had, as its README said."""
    machine.path("/etc/postfix").mkdir(exist_ok=True)
    machine.path(SETTINGS).write_text("defaultquota=77\n")
    text = (ROOT / "policyd.py").read_text().replace(f'"{policyd.__version__}"', '"0.1.0"')
    for name, content in [(PROGRAM, text), *((name, "#!/bin/sh\n") for name in OLD_SCRIPTS)]:
        machine.path(name).write_text(content)
        machine.path(name).chmod(0o755)
    shutil.copy(ROOT / "unit.service", machine.path(UNIT))


@pytest.mark.parametrize("state", ["active", "activating", "inactive", "failed"])
def test_an_upgrade_replaces_the_old_shape_and_restarts_what_runs(machine: Machine, state: str) -> None:
    make_old(machine)
    machine.path("/fake/state").write_text(f"{state}\n")
    said = installed(install(machine))
    assert not OLD_SCRIPTS & machine.files().keys()
    assert machine.path(SETTINGS).read_text() == "defaultquota=77\n"
    assert re.search(rf"policyd {re.escape(policyd.__version__)}\S* .*policyd 0\.1\.0\b", said), said
    assert ("restart policyd" in machine.told()) == (state in ("active", "activating"))
    assert ("systemctl enable --now policyd" in said) == (state in ("inactive", "failed"))


@pytest.mark.parametrize("task", [[], ["--purge"]])
def test_settings_this_version_refuses_stop_it_before_anything_is_changed(machine: Machine, task: list[str]) -> None:
    make_old(machine)
    machine.path(SETTINGS).write_text("defaultquota=77\ndefaultqouta=5\n")
    before = machine.files()
    result = install(machine, *task)
    assert (result.returncode, result.stdout) == (78, "")
    assert result.stderr.startswith(f"policyd: {SETTINGS}:2: ")
    assert (machine.files(), machine.told(), machine.has_user()) == (before, [], False)


def test_only_a_mariadb_needs_pymysql(machine: Machine) -> None:
    machine.path("/fake/pymysql.py").write_text("raise ImportError('hidden')\n")
    assert "PyMySQL" in installed(install(machine, PYTHONPATH="/fake"))
    machine.path(SETTINGS).write_text("dbname=policyd\ndbuser=policyd\n")
    before = machine.files()
    result = install(machine, PYTHONPATH="/fake")
    assert result.returncode != 0
    assert "PyMySQL" in result.stderr
    assert machine.files() == before


def test_without_python_nothing_is_changed(machine: Machine) -> None:
    machine.path("/fake/python3").write_text("#!/bin/sh\nexit 127\n")
    machine.path("/fake/python3").chmod(0o755)
    assert "Python 3.9" in refusal(install(machine))
    assert (machine.files(), machine.has_user()) == ({}, False)


def test_without_systemd_it_says_how_to_start(machine: Machine) -> None:
    machine.path("/run/systemd/system").rmdir()
    assert "\n    systemctl enable policyd\n" in installed(install(machine))  # it is there, but does not run
    assert machine.told() == []
    assert machine.run("rm", "/fake/systemctl", "/usr/bin/systemctl").returncode == 0
    assert "\n    runuser -u policyd -- /usr/local/bin/policyd " in installed(install(machine))
    installed(install(machine, "--purge"))


@pytest.mark.parametrize("prefix", ["/home/x", "/root/x", "/tmp/x"])
def test_what_the_unit_could_not_see_is_no_prefix(machine: Machine, prefix: str) -> None:
    assert prefix in refusal(install(machine, f"PREFIX={prefix}"))
    assert not machine.path(prefix).exists()


@pytest.mark.parametrize("place", ["/etc", "/usr/lib"])
def test_another_daemon_is_left_alone_and_the_lines_that_keep_it_work(machine: Machine, place: str) -> None:
    machine.path(f"{place}/systemd/system/policyd.service").write_text(FOREIGN_UNIT)
    machine.path(PROGRAM).write_bytes(FOREIGN_PROGRAM)
    before = machine.files()
    for task in TASKS:
        result = install(machine, *task)
        assert (result.returncode, result.stdout) == (1, ""), result
        assert (machine.files(), machine.told()) == (before, [])
    lines = [line for line in install(machine).stderr.splitlines() if line.startswith("    ")]
    kept = "/etc/systemd/system/go-policyd.service"
    assert [line.split()[1:] for line in lines if line.split()[0] == "mv"] == [
        [f"{place}/systemd/system/policyd.service", kept], [PROGRAM, "/usr/local/bin/go-policyd"]
    ]  # fmt: skip
    succeeded(machine.run("sh", "-euc", "\n".join(lines)))
    assert machine.told()[-1] == "enable --now go-policyd"
    installed(install(machine))
    installed(install(machine, "--purge"))
    assert machine.path(kept).read_text() == FOREIGN_UNIT.replace("/policyd", "/go-policyd")
    assert machine.path("/usr/local/bin/go-policyd").read_bytes() == FOREIGN_PROGRAM


def test_another_program_is_not_overwritten_under_a_unit_of_another_name(machine: Machine) -> None:
    machine.path("/etc/systemd/system/go-policyd.service").write_text(FOREIGN_UNIT)
    machine.path(PROGRAM).write_text("#!/bin/sh\n")
    before = machine.files()
    for task in TASKS:
        result = install(machine, *task)
        assert (result.returncode, machine.files()) == (1, before)
        assert f"mv {PROGRAM} /usr/local/bin/go-policyd\n" in result.stderr


def test_a_masked_unit_and_one_of_another_prefix_are_not_replaced(machine: Machine) -> None:
    machine.path(UNIT).symlink_to("/dev/null")
    assert "unmask" in refusal(install(machine))
    machine.path(UNIT).unlink()
    install(machine)
    before = machine.files()
    for task in TASKS:
        assert "PREFIX=/usr/local" in refusal(install(machine, "PREFIX=/opt/policyd", *task))
    assert machine.files() == before


def test_remove_leaves_settings_and_counts_and_purge_nothing(machine: Machine) -> None:
    make_old(machine)
    install(machine)
    counts = "/var/lib/policyd/events.sqlite3"
    machine.path(counts).touch()
    machine.told()
    for _ in range(2):
        installed(install(machine, "--remove"))
        assert (set(machine.files()), machine.has_user()) == ({SETTINGS}, True)
        assert machine.path(counts).exists()
    assert machine.told()[:3] == ["stop policyd", "--quiet disable policyd", "daemon-reload"]
    for _ in range(2):
        installed(install(machine, "--purge"))
        assert (machine.files(), machine.has_user()) == ({}, False)
        assert not machine.path("/var/lib/policyd").exists()


@pytest.mark.parametrize(("owner", "left"), [("policyd", []), ("root", ["other"])])
def test_purge_takes_the_statedir_but_not_what_others_keep_there(machine: Machine, owner: str, left: list[str]) -> None:
    install(machine)
    machine.path(SETTINGS).write_text("statedir=/srv/state\n")
    succeeded(machine.run("sh", "-euc", f"""mkdir -p /srv/state; cd /srv/state; touch events.sqlite3 other
        chown policyd events.sqlite3; chown {owner} ."""))
    installed(install(machine, "--purge"))
    assert machine.run("ls", "/srv/state").stdout.split() == left


def test_the_package_installs_upgrades_and_goes_without_a_question(machine: Machine, tmp_path: Path) -> None:
    shutil.copy(package(tmp_path), machine.path("/fake/policyd.deb"))

    def dpkg(*arguments: str) -> str:
        return installed(machine.run("dpkg", "--force-depends", *arguments))  # python3 may be none of Debian's

    assert "systemctl enable --now policyd" in dpkg("--install", "/fake/policyd.deb")
    assert machine.path(SETTINGS).read_bytes() == machine.path("/usr/share/policyd/policyd.cfg.example").read_bytes()
    assert machine.owner(SETTINGS) == "root:policyd 640"
    machine.path(SETTINGS).write_text("statedir=/srv/policyd\n")
    machine.run("install", "-d", "-o", "policyd", "/srv/policyd")
    assert not [line for line in machine.told() if "start" in line]
    dpkg("--install", "/fake/policyd.deb")
    assert [line for line in machine.told() if "try-restart" in line]
    assert "package" in refusal(install(machine))
    shutil.copy(ROOT / "unit.service", machine.path(UNIT))
    assert f"rm {UNIT}" in dpkg("--install", "/fake/policyd.deb")
    machine.path(UNIT).unlink()
    dpkg("--remove", "policyd")
    assert machine.path(SETTINGS).read_text() == "statedir=/srv/policyd\n"
    dpkg("--purge", "policyd")
    assert (machine.files(), machine.has_user()) == ({}, False)
    assert not machine.path("/srv/policyd").exists()
