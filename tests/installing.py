"""What the tests of an installation share: its files, its refusals, and a machine to throw away."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from servers import ROOT, end, program, wait_until

import policyd

Result = subprocess.CompletedProcess[str]

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
    command = [*alone, str(ROOT / "scripts/build-deb.sh"), str(directory)]
    said = succeeded(subprocess.run(command, capture_output=True, text=True, timeout=120))
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
        """Run a command there, as root, and wait for its end."""
        return subprocess.run(
            [program("nsenter", "util-linux"), f"--target={self._process.pid}", "--mount", "--root", "--wd", *command],
            env={"PATH": MACHINE_PATH, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip

    def told(self) -> list[str]:
        """Return what systemd was told since the last time this was asked."""
        told = self.path("/fake/told").read_text().splitlines()
        self.path("/fake/told").write_text("")
        return told

    def has_user(self) -> bool:
        """Is there a user policyd?"""
        return self.run("getent", "passwd", "policyd").returncode == 0

    def owner(self, path: str) -> str:
        """Return owner, group and rights of a file."""
        return self.run("stat", "-c", "%U:%G %a", path).stdout.rstrip()

    def files(self) -> dict[str, tuple[int, int, bytes]]:
        """Return each file whose path says policyd, but its counts: mode, owner and content."""
        found = self.run("find", "/usr", "/opt", "/etc", "-xdev", "-type", "f", "-path", "*policyd*").stdout
        return {
            path: (self.path(path).stat().st_mode, self.path(path).stat().st_uid, self.path(path).read_bytes())
            for path in found.splitlines()
        }

    def remove(self) -> None:
        """End it; what was written is gone with its last process."""
        end(self._process)
