"""What is written about policyd is true: policyd.cfg.example, setting by setting, both ways."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from servers import ROOT

from policyd import Settings, UserList

EXAMPLE = ROOT / "policyd.cfg.example"
# "#key=value" is a setting behind a comment sign, "# text" is a comment.
COMMENTED = re.compile(r"#([a-z_]+)=(.*)")

KEYS = {field.name for field in dataclasses.fields(Settings)}
NEED_RESTART = {field.name for field in dataclasses.fields(Settings) if field.metadata["restart"]}

# These have no default, or one that depends on where policyd runs: the example shows what they look like.
WITHOUT_DEFAULT = {
    "always_allow", "blacklist", "dbhost", "dbname", "dbuser", "hold_message", "notify", "notify_from", "quota",
    "reject_message", "rejectquota", "statedir", "trusted_network", "whitelist",
}
# A db... setting counts only together with these.
DATABASE = "dbname=policyd\ndbuser=policyd\n"


def commented() -> list[tuple[str, str]]:
    """Return the settings of the example, (key, value), in their order."""
    lines = map(COMMENTED.fullmatch, EXAMPLE.read_text().splitlines())
    return [(match[1], match[2]) for match in lines if match]


def read(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "policyd.cfg"
    path.write_text(text)
    return Settings.from_file(str(path))


def numbers_and_texts(settings: Settings) -> dict[str, object]:
    """Return all but the lists, which cannot be compared."""
    return {key: getattr(settings, key) for key in KEYS if not isinstance(getattr(settings, key), UserList)}


def test_the_example_names_every_setting_and_no_other() -> None:
    assert {key for key, _ in commented()} == KEYS


def test_the_example_as_it_is_changes_nothing() -> None:
    assert numbers_and_texts(Settings.from_file(str(EXAMPLE))) == numbers_and_texts(Settings())


@pytest.mark.parametrize(("key", "value"), commented(), ids=lambda text: text)
def test_a_line_of_the_example_is_accepted(tmp_path: Path, key: str, value: str) -> None:
    around = DATABASE.replace(f"{key}=policyd\n", "") if key.startswith("db") else ""
    read(tmp_path, f"{around}{key}={value}\n")


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, value in commented() if key not in WITHOUT_DEFAULT], ids=lambda text: text
)
def test_a_default_in_the_example_is_the_default(tmp_path: Path, key: str, value: str) -> None:
    around = DATABASE if key.startswith("db") else ""
    assert getattr(read(tmp_path, f"{around}{key}={value}\n"), key) == getattr(Settings(), key)


def test_the_dbhost_in_the_example_is_the_one_that_serves_without(tmp_path: Path) -> None:
    (value,) = [value for key, value in commented() if key == "dbhost"]
    assert read(tmp_path, f"{DATABASE}dbhost={value}\n").dbhost == read(tmp_path, DATABASE).dbhost


def test_all_lines_of_the_example_fit_together(tmp_path: Path) -> None:
    settings = read(tmp_path, "".join(f"{key}={value}\n" for key, value in commented()))
    assert settings.dbname == settings.dbuser == "policyd"
    assert settings.whitelist.holds([], "2001:db8:25::1")
    assert settings.blacklist.holds([], "198.51.100.255")


def test_the_example_explains_each_setting() -> None:
    """Some lines of comment stand above it, or above the settings of the same group."""
    before = ""
    for line in EXAMPLE.read_text().splitlines():
        if COMMENTED.fullmatch(line):
            assert before.startswith("#"), line
        before = line


def test_the_example_says_which_settings_a_reload_applies_and_which_need_a_restart() -> None:
    text = EXAMPLE.read_text().replace("\n# ", " ")
    sentences = re.search(r"applies ([^.]*)\.  ([^.]*?the db\.\.\. settings) need a restart\.", text)
    assert sentences
    reloaded, restarted = (set(re.findall(r"[a-z_]{4,}", sentence)) for sentence in sentences.groups())
    databases = {key for key in KEYS if key.startswith("db")}
    lists = {key for key in KEYS if key.startswith(("whitelist", "blacklist"))}
    assert "all whitelist and blacklist settings" in sentences[1]
    assert reloaded & KEYS | lists == KEYS - NEED_RESTART
    assert restarted & KEYS | databases == NEED_RESTART
