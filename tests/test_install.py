"""install.sh and build-deb.sh on a machine to throw away, and for packagers; and what systemd reads in unit.service."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from servers import ROOT, Result, end, executable, program, run, wait_until

import policyd

# Below the PREFIX, and where in this project it comes from; the unit is not among them.
FILES = {
    "bin/policyd": "policyd.py",
    "sbin/policyd-admin": "scripts/policyd-admin",
    "sbin/policyd-top20.sh": "scripts/policyd-top20.sh",
    "share/man/man8/policyd.8": "policyd.8",
    "share/policyd/policyd.cfg.example": "policyd.cfg.example",
    "share/policyd/schema.sql": "scripts/schema.sql",
    "share/policyd/grafana-dashboard.json": "scripts/grafana-dashboard.json",
}

SETTINGS = "/etc/postfix/policyd.cfg"
UNIT = "/etc/systemd/system/policyd.service"
PROGRAM = "/usr/local/bin/policyd"
OLD_SCRIPTS = [f"/usr/local/sbin/policyd-{name}.sh" for name in ("user", "held", "whatif", "common")]
TASKS: list[list[str]] = [[], ["--remove"], ["--purge"]]
FOREIGN_UNIT = "[Unit]\nDescription=Policyd go daemon for Postfix\n[Service]\nExecStart=/usr/local/bin/policyd\n"
FOREIGN_PROGRAM = b"\x7fELF\0 go"
INSTALL = "/project/scripts/install.sh"


def succeeded(result: Result) -> str:
    """Return what was said by who had nothing to complain of."""
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


def refusal(result: Result) -> str:
    """Return the one line that says why install.sh did nothing."""
    assert (result.returncode, result.stdout) == (1, ""), result
    assert re.fullmatch(r"install\.sh: .+\n", result.stderr), result
    return result.stderr


def package(directory: Path) -> Path:
    """Make the package for Debian without a network, and by anybody; return it."""
    alone = [program("unshare", "util-linux"), "--net", *["--user", "--map-current-user"] * (os.geteuid() != 0)]
    said = succeeded(run(*alone, ROOT / "scripts/build-deb.sh", directory))
    made = directory / f"policyd_{policyd.__version__}_all.deb"
    assert said == f"Made: {made}\n"
    return made


# "$1" is an empty directory, "$2" this project.  An overlay of this machine in a mount namespace of its own: nothing
# that is done in it changes this one.  systemd is a program that writes down what it is told, and knows one state.
MAKE = r"""
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
cd "$1/root"
mount --rbind /dev dev
mount --rbind /proc proc
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p run/systemd/system fake project
mount --rbind "$2" project
rm -rf etc/postfix/policyd.cfg etc/systemd/system/*policyd* var/lib/policyd
cat >fake/systemctl <<'TEXT'
#!/bin/sh
echo "$*" >>/fake/told
case $* in is-active*) cat /fake/state; grep -q '^active' /fake/state ;; esac
TEXT
chmod 755 fake/systemctl
echo inactive >fake/state
touch fake/told
exec chroot . sh -c '! getent passwd policyd || userdel policyd; ! getent group policyd || groupdel policyd
    touch /fake/ready; exec sleep 1000'
"""
# As systemd has it, the fakes in front.
MACHINE_PATH = "/fake:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Machine:
    """Its `/x` is `path("/x")` here.  Needs root."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [program("unshare", "util-linux"), "--mount", "--propagation=private", "sh", "-euc", MAKE, "sh",
             str(directory), str(ROOT)], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: self._process.poll() is not None or self.path("/fake/ready").exists(), "the machine is made")
        assert self._process.poll() is None, "no machine: that needs root, unshare and overlayfs"

    def path(self, path: str) -> Path:
        return Path(f"/proc/{self._process.pid}/root{path}")

    def run(self, *command: str, **environment: str) -> Result:
        inside = [program("nsenter", "util-linux"), f"--target={self._process.pid}", "--mount", "--root", "--wd"]
        variables = (f"{name}={value}" for name, value in {"PATH": MACHINE_PATH, **environment}.items())
        return run(*inside, "env", "-i", *variables, *command)

    def told(self) -> list[str]:
        """Return what systemd was told since the last time this was asked."""
        told = self.path("/fake/told").read_text().splitlines()
        self.path("/fake/told").write_text("")
        return told

    def has_user(self) -> bool:
        return self.run("getent", "passwd", "policyd").returncode == 0

    def owner(self, path: str) -> str:
        return self.run("stat", "-c", "%U:%G %a", path).stdout.rstrip()

    def files(self) -> dict[str, tuple[int, int, bytes]]:
        """Return each file whose path says policyd, but its counts: mode, owner and content."""
        found = self.run("find", "/usr", "/opt", "/etc", "-xdev", "-type", "f", "-path", "*policyd*").stdout
        return {
            path: (self.path(path).stat().st_mode, self.path(path).stat().st_uid, self.path(path).read_bytes())
            for path in found.splitlines()
        }


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    end(made._process)  # with it all is gone that was written


def install(machine: Machine, *arguments: str, command: str = INSTALL, **environment: str) -> str:
    """Return what was said; status 0 whatever doctor has found wrong: there is no Postfix, and no daemon."""
    result = machine.run(command, *arguments, **environment)
    assert result.returncode == 0, result
    return result.stdout


def refused(machine: Machine, *arguments: str, **environment: str) -> Result:
    """Call it where it must do nothing: neither a file nor a user is touched, nor is systemd told anything."""
    machine.told()
    before = machine.files(), machine.has_user()
    result = machine.run(INSTALL, *arguments, **environment)
    assert (machine.files(), machine.has_user(), machine.told()) == (*before, [])
    assert result.returncode, result
    return result


def test_from_a_fresh_installation_to_nothing_left(machine: Machine) -> None:
    """It is complete and says the two steps left; a second run changes nothing; --remove leaves what is the site's."""
    said = install(machine)
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
    assert line.format("unix:policyd/socket") in install(machine)
    assert machine.files() == before
    counts = "/var/lib/policyd/events.sqlite3"
    machine.path(counts).touch()
    machine.told()
    for _ in range(2):
        install(machine, "--remove")
        assert (set(machine.files()), machine.has_user()) == ({SETTINGS}, True)
        assert machine.path(counts).exists()
    assert machine.told()[:3] == ["stop policyd", "--quiet disable policyd", "daemon-reload"]
    for _ in range(2):
        install(machine, "--purge")
        assert (machine.files(), machine.has_user()) == ({}, False)
        assert not machine.path("/var/lib/policyd").exists()


def make_old(machine: Machine) -> None:
    """Install what 0.1.0 had, as its README said."""
    machine.path("/etc/postfix").mkdir(exist_ok=True)
    machine.path(SETTINGS).write_text("defaultquota=77\n")
    text = (ROOT / "policyd.py").read_text().replace(f'"{policyd.__version__}"', '"0.1.0"')
    for name, content in [(PROGRAM, text), *((name, "#!/bin/sh\n") for name in OLD_SCRIPTS)]:
        executable(machine.path(name), content)
    shutil.copy(ROOT / "unit.service", machine.path(UNIT))


def test_an_upgrade_replaces_the_old_shape_and_restarts_what_runs(machine: Machine) -> None:
    for state, runs in (("active", True), ("activating", True), ("inactive", False), ("failed", False)):
        make_old(machine)
        machine.path("/fake/state").write_text(f"{state}\n")
        machine.told()
        said = install(machine)
        assert not OLD_SCRIPTS & machine.files().keys()
        assert machine.path(SETTINGS).read_text() == "defaultquota=77\n"
        assert re.search(rf"policyd {re.escape(policyd.__version__)}\S* .*policyd 0\.1\.0\b", said), said
        assert ("restart policyd" in machine.told()) == runs
        assert ("systemctl enable --now policyd" in said) == (not runs)


def test_what_cannot_work_is_refused_before_anything_is_changed(machine: Machine) -> None:
    """Python, a place that the unit could not see, settings that this version refuses.  Only MariaDB needs PyMySQL."""
    no_python = executable(machine.path("/fake/python3"), "#!/bin/sh\nexit 127\n")
    assert "Python 3.9" in refusal(refused(machine))
    no_python.unlink()
    for prefix in ("/home/x", "/root/x", "/tmp/x"):
        assert prefix in refusal(refused(machine, f"PREFIX={prefix}"))
        assert not machine.path(prefix).exists()
    make_old(machine)
    machine.path("/fake/pymysql.py").write_text("raise ImportError('hidden')\n")
    wrong, needs_it = "defaultquota=77\ndefaultqouta=5\n", "dbname=policyd\ndbuser=policyd\n"
    for settings, task, status, said in (
        (wrong, [], 78, f"policyd: {SETTINGS}:2: "), (wrong, ["--purge"], 78, f"policyd: {SETTINGS}:2: "),
        (needs_it, [], 1, "PyMySQL"),
    ):  # fmt: skip
        machine.path(SETTINGS).write_text(settings)
        result = refused(machine, *task, PYTHONPATH="/fake")
        assert (result.returncode, said in result.stderr) == (status, True), result
    machine.path(SETTINGS).write_text("defaultquota=77\n")
    assert "PyMySQL" in install(machine, PYTHONPATH="/fake")


@pytest.mark.parametrize("place", ["/etc", "/usr/lib"])
def test_another_daemon_is_left_alone_and_the_lines_that_keep_it_work(machine: Machine, place: str) -> None:
    machine.path(f"{place}/systemd/system/policyd.service").write_text(FOREIGN_UNIT)
    machine.path(PROGRAM).write_bytes(FOREIGN_PROGRAM)
    said, *others = (refused(machine, *task) for task in TASKS)
    assert [(result.returncode, result.stdout) for result in (said, *others)] == [(1, "")] * 3
    lines = [line for line in said.stderr.splitlines() if line.startswith("    ")]
    kept = "/etc/systemd/system/go-policyd.service"
    assert [line.split()[1:] for line in lines if line.split()[0] == "mv"] == [
        [f"{place}/systemd/system/policyd.service", kept], [PROGRAM, "/usr/local/bin/go-policyd"]
    ]  # fmt: skip
    succeeded(machine.run("sh", "-euc", "\n".join(lines)))
    assert machine.told()[-1] == "enable --now go-policyd"
    install(machine)
    install(machine, "--purge")
    assert machine.path(kept).read_text() == FOREIGN_UNIT.replace("/policyd", "/go-policyd")
    assert machine.path("/usr/local/bin/go-policyd").read_bytes() == FOREIGN_PROGRAM


def test_another_program_a_masked_unit_and_one_of_another_prefix_are_not_replaced(machine: Machine) -> None:
    machine.path(UNIT).symlink_to("/dev/null")
    assert "unmask" in refusal(refused(machine))
    machine.path(UNIT).unlink()
    kept = machine.path("/etc/systemd/system/go-policyd.service")
    kept.write_text(FOREIGN_UNIT)
    machine.path(PROGRAM).write_text("#!/bin/sh\n")
    for task in TASKS:
        assert f"mv {PROGRAM} /usr/local/bin/go-policyd\n" in refused(machine, *task).stderr
    kept.unlink()
    machine.path(PROGRAM).unlink()
    install(machine)
    for task in TASKS:
        assert "PREFIX=/usr/local" in refusal(refused(machine, "PREFIX=/opt/policyd", *task))
    machine.path(f"{UNIT}.d").mkdir()
    for starts, said in ((f"/usr/bin/nice {PROGRAM} -c x", "\nKept: "), ("/opt/p/bin/policyd", "give PREFIX=/opt/p\n")):
        machine.path(f"{UNIT}.d/override.conf").write_text(f"[Service]\nExecStart=\nExecStart={starts}\n")
        assert said in (result := machine.run(INSTALL)).stdout + result.stderr


def test_without_systemd_it_says_how_to_start_and_purge_spares_what_others_keep_in_statedir(machine: Machine) -> None:
    machine.path("/run/systemd/system").rmdir()
    assert "\n    systemctl enable policyd\n" in install(machine)  # it is there, but does not run
    assert machine.told() == []
    assert machine.run("rm", "/fake/systemctl", "/usr/bin/systemctl").returncode == 0
    assert "\n    runuser -u policyd -- /usr/local/bin/policyd " in install(machine)
    for owner, left in (("policyd", []), ("root", ["other"])):
        install(machine)
        machine.path(SETTINGS).write_text("statedir=/srv/state\n")
        succeeded(machine.run("sh", "-euc", f"""mkdir -p /srv/state; cd /srv/state; touch events.sqlite3 other
            chown policyd events.sqlite3; chown {owner} ."""))
        install(machine, "--purge")
        assert machine.run("ls", "/srv/state").stdout.split() == left


def test_the_package_installs_upgrades_and_goes_without_a_question(machine: Machine, tmp_path: Path) -> None:
    shutil.copy(package(tmp_path), machine.path("/fake/policyd.deb"))

    dpkg = partial(install, machine, "--force-depends", command="dpkg")  # python3 may be none of Debian's
    assert "systemctl enable --now policyd" in dpkg("--install", "/fake/policyd.deb")
    assert machine.path(SETTINGS).read_bytes() == machine.path("/usr/share/policyd/policyd.cfg.example").read_bytes()
    assert machine.owner(SETTINGS) == "root:policyd 640"
    machine.path(SETTINGS).write_text("statedir=/srv/policyd\n")
    machine.run("install", "-d", "-o", "policyd", "/srv/policyd")
    assert not [line for line in machine.told() if "start" in line]
    dpkg("--install", "/fake/policyd.deb")
    assert [line for line in machine.told() if "try-restart" in line]
    assert "package" in refusal(refused(machine))
    machine.path(PROGRAM).touch()
    for unit, line in (FOREIGN_UNIT, f"mv {PROGRAM} /usr/local/bin/go-policyd"), (UNIT_TEXT, f"rm {UNIT} .*[.]8"):
        machine.path(UNIT).write_text(unit)
        assert re.search(f"\n    {line}\n", dpkg("--install", "/fake/policyd.deb"))
    machine.run("rm", UNIT, PROGRAM)
    dpkg("--remove", "policyd")
    assert "systemctl enable --now policyd" in dpkg("--install", "/fake/policyd.deb")  # which --remove has disabled
    assert machine.path(SETTINGS).read_text() == "statedir=/srv/policyd\n"
    dpkg("--purge", "policyd")
    assert (machine.files(), machine.has_user()) == ({}, False)
    assert not machine.path("/srv/policyd").exists()


def packaged(destination: Path, *arguments: str, script: Path = ROOT / "scripts/install.sh") -> Result:
    """Run install.sh for a package, where whatever would change this machine fails."""
    trap = destination.parent / "trap"
    trap.mkdir(exist_ok=True)
    for name in ("systemctl", "useradd", "groupadd", "userdel", "chown", "python3"):
        executable(trap / name, f"#!/bin/sh\necho {name} was called >&2\nexit 99\n")
    return run(script, f"DESTDIR={destination}", *arguments, env={"PATH": f"{trap}:{os.environ['PATH']}"})


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(("prefix", "units"), [("/usr/local", "/etc"), ("/opt/p", "/etc"), ("/usr", "/usr/lib")])
def test_a_packager_gets_the_files_and_nothing_else_is_touched(tmp_path: Path, prefix: str, units: str) -> None:
    """And what is removed again is gone, and no more."""
    tree, place = tmp_path / "tree", f"PREFIX={prefix}/"
    for _ in range(2):
        assert succeeded(packaged(tree, place)) == ""
    sources = {f"{prefix}/{name}": source for name, source in FILES.items()}
    sources[f"{units}/systemd/system/policyd.service"] = "unit.service"
    assert files_below(tree) == {name[1:] for name in sources}
    for name, source in sources.items():
        path, original = tree / name[1:], (ROOT / source).read_text()
        is_program = "bin/" in name
        assert path.stat().st_mode & 0o777 == (0o755 if is_program else 0o644), name
        text = original if is_program else re.sub(r"/usr/local(?=/s?bin/policyd)", prefix, original)
        assert path.read_text() == text, name
    assert f"ExecStart={prefix}/bin/policyd\n" in path.read_text()
    assert f"ExecReload={prefix}/bin/policyd --check-settings\n" in path.read_text()
    (tree / "other").touch()
    for _ in range(2):
        succeeded(packaged(tree, place, "--remove"))
        assert files_below(tree) == {"other"}


@pytest.mark.parametrize("missing", [*FILES.values(), "unit.service"])
def test_half_a_checkout_installs_nothing(tmp_path: Path, missing: str) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "copy/scripts")
    for name in ("policyd.py", "policyd.8", "policyd.cfg.example", "unit.service"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    assert missing in refusal(packaged(tmp_path / "tree", script=tmp_path / "copy/scripts/install.sh"))
    assert not (tmp_path / "tree").exists()


def test_a_wrong_call_is_refused_on_one_line_and_whoever_is_not_root(tmp_path: Path) -> None:
    wrong = "--nonsense", "remove", "PREFIX=opt", "PREFIX=/opt/a b", "PREFIX=/a|b", "PREFIX=/", "--purge"
    for argument in wrong:
        refusal(packaged(tmp_path / "tree", argument))
        assert not (tmp_path / "tree").exists(), argument
    nobody: dict[str, Any] = {"user": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(ROOT / "scripts", Path(directory, "scripts"))
        os.chmod(directory, 0o755)
        for task in TASKS:
            assert "only root" in refusal(run(f"{directory}/scripts/install.sh", *task, **nobody))


def test_the_package_has_the_files_of_install_sh_and_what_debian_asks_for(tmp_path: Path) -> None:
    made, tool = package(tmp_path), program("dpkg-deb", "dpkg")
    fields, listed = (succeeded(run(tool, what, made)) for what in ("--field", "--contents"))
    assert f"\nVersion: {policyd.__version__}\n" in fields
    assert "\nRecommends: python3-pymysql\n" in fields
    assert {line.split()[1] for line in listed.splitlines()} == {"root/root"}
    run(tool, "--raw-extract", made, tmp_path / "tree", check=True)
    for readme in (tmp_path / "tree/usr/share/doc/policyd").glob("README*"):
        assert "on_stop=/usr/sbin/policyd-admin mail" in readme.read_text(), "which is there"
    expected = {*FILES, "lib/systemd/system/policyd.service", "share/doc/policyd/copyright"}
    expected |= {"share/doc/policyd/changelog.gz", "share/man/man8/policyd.8.gz"}
    assert files_below(tmp_path / "tree/usr") >= expected - {"share/man/man8/policyd.8"}
    assert not (tmp_path / "tree/etc").exists()  # so no question about settings stops an installation
    scripts = [tmp_path / "tree/DEBIAN" / name for name in ("postinst", "prerm", "postrm")]
    run(program("shellcheck", "shellcheck"), "-s", "sh", *scripts, check=True)


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    board = json.loads((ROOT / "scripts/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    known = re.findall(r"^\.It Li policyd_(\w+)", (ROOT / "policyd.8").read_text(), re.MULTILINE)
    assert {name for query in queries for name in re.findall(r"policyd_(\w+)", query)} == set(known)
    assert [variable["name"] for variable in board["__inputs"]] == ["DS_PROMETHEUS"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {"${DS_PROMETHEUS}"}
    (up,) = (query for query in queries if "policyd_database_up" in query)
    assert "time() - node_textfile_mtime_seconds" in up, "where policyd is stopped its last figures stay"


UNIT_TEXT = (ROOT / "unit.service").read_text()
LINES = [line for line in UNIT_TEXT.splitlines() if re.match(r"[A-Z]\w+=", line)]
SAYS = [
    "Type=notify", "User=policyd", "Group=policyd", "StateDirectory=policyd", "ExecStart=/usr/local/bin/policyd",
    "Restart=always", "RestartSec=1", "RestartPreventExitStatus=78", "StartLimitIntervalSec=0", "LimitNOFILE=4096",
    "ProtectSystem=strict", "NoNewPrivileges=yes", "WantedBy=multi-user.target",
    # A database on this host is up before it, but it serves without one, too; one on another host can be reached.
    "After=network.target mariadb.service", "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
]  # fmt: skip
LACKS = {"Requires", "Requisite", "BindsTo", "Wants", "IPAddressDeny", "PrivateNetwork", "MemoryMax", "PrivateUsers",
         "NoExecPaths"}  # fmt: skip


def analyze(*arguments: str) -> Result:
    """Run systemd-analyze, which needs no running systemd for what is asked here."""
    return run(program("systemd-analyze", "systemd"), *arguments)


def test_the_exposure_is_at_most_2_and_systemd_finds_no_mistake(tmp_path: Path) -> None:
    unit = tmp_path / "policyd.service"
    unit.write_text(UNIT_TEXT.replace("=/usr/local/bin/policyd", "=/bin/sh"))  # the program is not installed here
    result = analyze("security", "--offline=true", "--no-pager", str(unit))
    level = re.search(r"Overall exposure level for policyd\.service: ([0-9.]+)", result.stdout)
    assert level, result
    assert float(level[1]) <= 2.0, result.stdout
    result = analyze("verify", "--man=no", str(unit))
    # It reads the units around this one too; their faults are not ours.
    assert [line for line in result.stderr.splitlines() if "policyd" in line] == []


def test_the_unit_says_what_policyd_needs_and_nothing_that_is_in_its_way() -> None:
    assert [line for line in SAYS if line not in LINES] == []
    assert not LACKS & {line.partition("=")[0] for line in LINES}
    # A reload tries the settings before the daemon reads them.
    reload = [line.partition("=")[2] for line in LINES if line.startswith("ExecReload=")]
    assert reload == ["/usr/local/bin/policyd --check-settings", "/bin/sh -c 'kill -HUP $MAINPID'"]
    number = {key: int(value) for key, value in re.findall(r"^(\w+)=(\d+)$", UNIT_TEXT, re.MULTILINE)}
    assert number["TasksMax"] > 1000 + 64  # the most connections, the daemon's own threads, a child's
    assert number["TimeoutStopSec"] > 5  # which it may take
    # policyd stops its pings, one in half the watchdog's time, when an event has waited for 10 s.
    assert number["WatchdogSec"] / 2 > 10


def calls_of(group: str) -> set[str]:
    """Return the system calls of one of systemd's groups, or the one of this name."""
    if not group.startswith("@"):
        return {group}
    listed = analyze("syscall-filter", group)
    assert listed.returncode == 0, listed
    return set().union(*(calls_of(name) for name in re.findall(r"^ +(@?[\w-]+)$", listed.stdout, re.MULTILINE)))


def test_on_stop_can_start_a_program_that_sends_mail_and_no_more() -> None:
    """What Python and libc need for it: a child, all processors, pipes, TCP; and the lock of statedir."""
    allowed: set[str] = set()
    for line in LINES:
        if line.startswith("SystemCallFilter="):
            is_without, names = re.fullmatch(r"SystemCallFilter=(~?)(.*)", line).groups()  # type: ignore[union-attr]
            calls = set().union(*map(calls_of, names.split()))
            allowed = allowed - calls if is_without else allowed | calls
    needed = {"clone", "clone3", "vfork", "execve", "wait4", "waitid", "kill", "pipe2", "poll", "dup2", "setsid"}
    needed |= {"rt_sigprocmask", "sched_setaffinity", "socket", "connect", "sendto", "recvfrom", "flock", "fcntl"}
    assert needed <= allowed
    assert not {"setuid", "setgroups", "chown", "mount", "ptrace", "setrlimit", "sched_setscheduler"} & allowed
