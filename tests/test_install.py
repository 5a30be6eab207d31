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


def test_from_a_fresh_installation_to_nothing_left(machine: Machine) -> None:
    """It is complete and says the two steps left; a second run changes nothing; --remove leaves what is the site's."""
    said = installed(install(machine))
    assert set(machine.files()) == {f"/usr/local/{name}" for name in FILES} | {UNIT, SETTINGS}
    assert machine.path(SETTINGS).read_text() == (ROOT / "policyd.cfg.example").read_text()
    assert machine.owner(SETTINGS) == "root:policyd 640"
    assert machine.owner("/var/lib/policyd") == "policyd:policyd 755"
    assert said.startswith(f"policyd {policyd.__version__}")
    line = "check_policy_service {{ {}, timeout=10s, default_action=DUNNO }} }}\n"
    assert "\n    -o { smtpd_end_of_data_restrictions = " + line.format("inet:127.0.0.1:9093") in said
    assert "\n    systemctl enable --now policyd\n" in said
    assert machine.told()[0] == "daemon-reload"
    assert machine.run("runuser", "-u", "policyd", "--", "policyd", "--check-settings").returncode == 0
    machine.path(SETTINGS).write_text("defaultquota=77\nbind=/var/spool/postfix/policyd/socket\n")
    before = machine.files()
    assert line.format("unix:policyd/socket") in installed(install(machine))
    assert machine.files() == before
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


def make_old(machine: Machine) -> None:
    """Install what 0.1.0 had, as its README said."""
    machine.path("/etc/postfix").mkdir(exist_ok=True)
    machine.path(SETTINGS).write_text("defaultquota=77\n")
    text = (ROOT / "policyd.py").read_text().replace(f'"{policyd.__version__}"', '"0.1.0"')
    for name, content in [(PROGRAM, text), *((name, "#!/bin/sh\n") for name in OLD_SCRIPTS)]:
        machine.path(name).write_text(content)
        machine.path(name).chmod(0o755)
    shutil.copy(ROOT / "unit.service", machine.path(UNIT))


def test_an_upgrade_replaces_the_old_shape_and_restarts_what_runs(machine: Machine) -> None:
    for state, runs in (("active", True), ("activating", True), ("inactive", False), ("failed", False)):
        make_old(machine)
        machine.path("/fake/state").write_text(f"{state}\n")
        machine.told()
        said = installed(install(machine))
        assert not OLD_SCRIPTS & machine.files().keys()
        assert machine.path(SETTINGS).read_text() == "defaultquota=77\n"
        assert re.search(rf"policyd {re.escape(policyd.__version__)}\S* .*policyd 0\.1\.0\b", said), said
        assert ("restart policyd" in machine.told()) == runs
        assert ("systemctl enable --now policyd" in said) == (not runs)


def test_what_cannot_work_is_refused_before_anything_is_changed(machine: Machine) -> None:
    """Python, a place that the unit could not see, settings that this version refuses.  Only MariaDB needs PyMySQL."""
    python = machine.path("/fake/python3")
    python.write_text("#!/bin/sh\nexit 127\n")
    python.chmod(0o755)
    assert "Python 3.9" in refusal(install(machine))
    python.unlink()
    for prefix in ("/home/x", "/root/x", "/tmp/x"):
        assert prefix in refusal(install(machine, f"PREFIX={prefix}"))
        assert not machine.path(prefix).exists()
    assert (machine.files(), machine.told(), machine.has_user()) == ({}, [], False)
    make_old(machine)
    machine.path("/fake/pymysql.py").write_text("raise ImportError('hidden')\n")
    wrong, needs_it = "defaultquota=77\ndefaultqouta=5\n", "dbname=policyd\ndbuser=policyd\n"
    for settings, task, status, said in (
        (wrong, [], 78, f"policyd: {SETTINGS}:2: "), (wrong, ["--purge"], 78, f"policyd: {SETTINGS}:2: "),
        (needs_it, [], 1, "PyMySQL"),
    ):  # fmt: skip
        machine.path(SETTINGS).write_text(settings)
        before = machine.files()
        result = install(machine, *task, PYTHONPATH="/fake")
        assert (result.returncode, said in result.stderr) == (status, True), result
        assert (machine.files(), machine.told(), machine.has_user()) == (before, [], False)
    machine.path(SETTINGS).write_text("defaultquota=77\n")
    assert "PyMySQL" in installed(install(machine, PYTHONPATH="/fake"))


def test_without_systemd_it_says_how_to_start(machine: Machine) -> None:
    machine.path("/run/systemd/system").rmdir()
    assert "\n    systemctl enable policyd\n" in installed(install(machine))  # it is there, but does not run
    assert machine.told() == []
    assert machine.run("rm", "/fake/systemctl", "/usr/bin/systemctl").returncode == 0
    assert "\n    runuser -u policyd -- /usr/local/bin/policyd " in installed(install(machine))
    installed(install(machine, "--purge"))


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


def test_another_program_a_masked_unit_and_one_of_another_prefix_are_not_replaced(machine: Machine) -> None:
    machine.path(UNIT).symlink_to("/dev/null")
    assert "unmask" in refusal(install(machine))
    machine.path(UNIT).unlink()
    kept = machine.path("/etc/systemd/system/go-policyd.service")
    kept.write_text(FOREIGN_UNIT)
    machine.path(PROGRAM).write_text("#!/bin/sh\n")
    before = machine.files()
    for task in TASKS:
        result = install(machine, *task)
        assert (result.returncode, machine.files()) == (1, before)
        assert f"mv {PROGRAM} /usr/local/bin/go-policyd\n" in result.stderr
    kept.unlink()
    machine.path(PROGRAM).unlink()
    install(machine)
    before = machine.files()
    for task in TASKS:
        assert "PREFIX=/usr/local" in refusal(install(machine, "PREFIX=/opt/policyd", *task))
    assert machine.files() == before


def test_purge_takes_the_statedir_but_not_what_others_keep_there(machine: Machine) -> None:
    for owner, left in (("policyd", []), ("root", ["other"])):
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
