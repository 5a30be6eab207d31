"""install.sh for packagers, and build-deb.sh: what anybody can do without changing this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from installing import FILES, Result, package, refusal, succeeded
from servers import ROOT, program

import policyd


def packaged(destination: Path, *arguments: str, script: Path = ROOT / "scripts/install.sh") -> Result:
    """Run install.sh for a package, where whatever would change this machine fails."""
    trap = destination.parent / "trap"
    trap.mkdir(exist_ok=True)
    for name in ("systemctl", "useradd", "groupadd", "userdel", "chown", "python3"):
        (trap / name).write_text(f"#!/bin/sh\necho {name} was called >&2\nexit 99\n")
        (trap / name).chmod(0o755)
    return subprocess.run(
        [script, f"DESTDIR={destination}", *arguments], env={"PATH": f"{trap}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


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
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if is_program else 0o644), name
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
        for task in ([], ["--remove"], ["--purge"]):
            command = [f"{directory}/scripts/install.sh", *task]
            result = subprocess.run(command, capture_output=True, text=True, timeout=60, **nobody)
            assert "only root" in refusal(result)


def test_the_package_has_the_files_of_install_sh_and_what_debian_asks_for(tmp_path: Path) -> None:
    made, tool = package(tmp_path), program("dpkg-deb", "dpkg")
    fields = subprocess.run([tool, "--field", made], capture_output=True, text=True, check=True).stdout
    assert f"\nVersion: {policyd.__version__}\n" in fields
    assert "\nRecommends: python3-pymysql\n" in fields
    listed = subprocess.run([tool, "--contents", made], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listed.splitlines()} == {"root/root"}
    subprocess.run([tool, "--raw-extract", made, tmp_path / "tree"], check=True)
    expected = {*FILES, "lib/systemd/system/policyd.service", "share/doc/policyd/copyright"}
    expected |= {"share/doc/policyd/changelog.gz", "share/man/man8/policyd.8.gz"}
    assert files_below(tmp_path / "tree/usr") >= expected - {"share/man/man8/policyd.8"}
    assert not (tmp_path / "tree/etc").exists()  # so no question about settings stops an installation
    scripts = [tmp_path / "tree/DEBIAN" / name for name in ("postinst", "prerm", "postrm")]
    subprocess.run([program("shellcheck", "shellcheck"), "-s", "sh", *scripts], check=True)


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    board = json.loads((ROOT / "scripts/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert {name for query in queries for name in re.findall(r"policyd_(\w+)", query)} == set(policyd.METRICS)
    assert [variable["name"] for variable in board["__inputs"]] == ["DS_PROMETHEUS"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {"${DS_PROMETHEUS}"}
