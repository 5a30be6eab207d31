"""What is written about policyd is true: README in two languages, the manual page, policyd.cfg.example, both ways."""

from __future__ import annotations

import configparser
import dataclasses
import re
import sys
from pathlib import Path

import pytest
from asking import running_here
from servers import ROOT, program, read_settings, run, write_settings
from stores import KeptLog, SQLiteStore

import policyd
from policyd import Limits, Settings, Usage, decide

EXAMPLE, PAGE = ROOT / "policyd.cfg.example", ROOT / "policyd.8"
ADMIN = ROOT / "scripts" / "policyd-admin"
README, FRENCH = ROOT / "README.md", ROOT / "README.fr.md"
SOURCE = (ROOT / "policyd.py").read_text()

FIELDS = {field.name: field.metadata["restart"] for field in dataclasses.fields(Settings) if field.metadata}
# These have no default, or one that depends on where policyd runs: the example shows what they look like.
WITHOUT_DEFAULT = {
    "always_allow", "blacklist", "dbname", "dbssl_ca", "dbssl_cert", "dbssl_key", "dbssl_name", "dbuser",
    "hold_message", "on_stop", "quota", "reject_message", "rejectquota", "statedir", "trusted_network", "whitelist",
}  # fmt: skip
PROPOSED = {"early_signs": ("audit", "no"), "keep_days": ("30", "7")}  # the example shows these, and tells the default
DATABASE = "dbname=policyd\ndbuser=policyd\n"  # a db... setting counts only together with these

VERDICTS = [decide(usage, Limits(1500, 3000, 300, 5, 100, True)) for usage in (  # one of each kind
    Usage(3000), Usage(1500), Usage(400, 300), Usage(1, 1, new_places=6), Usage(1, 1, from_new_places=100),
    *(Usage(1, 1, frozenset([f"HOLD {rule}"])) for rule in ("blocked", "places", "newplace")),
)]  # fmt: skip
ANSWERS = {f"{verdict.action} {verdict.reason}" for verdict in VERDICTS} | {"HOLD blacklisted"}
CODE = r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+"


def output_of(*arguments: object) -> str:
    return run(sys.executable, *arguments, check=True).stdout


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(-{1,2}[a-z][a-z-]*)", text))


def commands_of_admin() -> set[str]:
    return set(re.findall("^  ([a-z]+) ", output_of(ADMIN, "--help"), re.MULTILINE))


def commented() -> list[tuple[str, str]]:
    """Return the settings of the example, (key, value), in their order: "#key=value", where "# text" is a comment."""
    lines = (re.fullmatch(r"#([a-z_]+)=(.*)", line) for line in EXAMPLE.read_text().splitlines())
    return [(match[1], match[2]) for match in lines if match]


def test_the_example_has_and_explains_every_setting_and_changes_nothing_as_it_is() -> None:
    """Some lines of comment stand above each, or above the settings of its group; and it says what needs a restart."""
    assert {key for key, _ in commented()} == set(FIELDS)
    assert Settings.from_file(str(EXAMPLE)).lines == {}
    text = EXAMPLE.read_text()
    assert not re.search("^(?!#).*\n#[a-z_]+=", text, re.MULTILINE)
    (sentence,) = re.findall(r"applies all of them but (.*), which need a restart", text.replace("\n# ", " "))
    named = set(re.findall("[a-z_]{4,}", sentence)) & set(FIELDS) | {key for key in FIELDS if key.startswith("db")}
    assert named == {key for key, needs_restart in FIELDS.items() if needs_restart}


def test_each_line_of_the_example_is_accepted_and_shows_the_default() -> None:
    """And all of them together; but for those that name files."""
    lines = [(key, value) for key, value in commented() if not key.startswith("dbssl")]
    prose = EXAMPLE.read_text().replace("\n# ", " ")
    for key, value in lines:
        around = DATABASE.replace(f"{key}=policyd\n", "") if key.startswith("db") else ""
        settings = read_settings(f"{around}{key}={value}")
        if key not in WITHOUT_DEFAULT:
            default = getattr(Settings(), key)
            assert getattr(settings, key) == default or (value, str(default)) == PROPOSED.get(key), key
            assert key not in PROPOSED or f"The default is {default}." in prose, key
    settings = read_settings(*(f"{key}={value}" for key, value in lines))
    assert settings.whitelist.line_of([], "2001:db8:25::1")
    assert settings.blacklist.line_of([], "198.51.100.255")


def test_both_readmes_have_the_same_sections_tables_and_commands_and_name_the_same_things() -> None:
    """Settings, files and log lines are words of the program: they are not translated; nor is either text long."""
    found = []
    for readme, most in ((README, 240), (FRENCH, 260)):
        text = readme.read_text()
        prose = re.sub(CODE, "", text)
        assert len(text.splitlines()) <= most
        code = [re.sub(" +# .*", "", block) for block in re.findall(CODE, text)]
        assert len(code) > 10
        headings = re.findall("^#+(?= )", prose, re.MULTILINE)  # only their depth
        tables = [table.count("\n") for table in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)]
        found.append((headings, tables, code, set(re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", prose)))))
    for english, french in zip(*found):
        assert english == french


@pytest.mark.parametrize("readme", [README, FRENCH], ids=lambda path: path.name)
def test_what_the_readme_names_is_there(readme: Path) -> None:
    """Each answer in its table; settings that are accepted, files, commands; and the line for Postfix."""
    text = readme.read_text()
    assert set(re.findall(r"^\| [^|]+ \| `([^`]+)` \| ", text, re.MULTILINE)) == ANSWERS | {"DUNNO"}
    given = re.findall(r"`([a-z_]+)=([^` ]+(?: [^`]+)?)`", re.sub(CODE, "", text))
    assert {key for key, _ in given} <= set(FIELDS) | {"action", "default_action", "inet_protocols"}
    for key, value in given:
        if key in FIELDS:
            read_settings((DATABASE if key.startswith("db") else "") + f"{key}={value}")
    names = set(re.findall(r"(?<![\w/])(?:\./)?(scripts/[\w.-]+\w|[\w.]+\.(?:md|py|cfg\.example))\b", text))
    assert {"scripts/install.sh", "scripts/build-deb.sh", "scripts/test.sh", "CHANGELOG.md", "policyd.py"} <= names
    assert [name for name in names if not (ROOT / name).exists()] == []
    named = set(re.findall(r"policyd-admin ([a-z]+)\b", text))
    assert {"top", "user", "forgive", "block", "delete", "trace", "whatif", "held", "doctor", "mail"} <= named
    assert named <= commands_of_admin()
    (line,) = re.findall(r"^ {5,}-o \{.*\}$", text, re.MULTILINE)
    asked = f"{{ {policyd.wire_name(Settings().bind, Settings().port)}, timeout=10s, default_action=DUNNO }} }}"
    assert line.strip() == f"-o {{ smtpd_end_of_data_restrictions = check_policy_service {asked}"
    texts = "".join(path.read_text() for path in (readme, EXAMPLE, ROOT / "unit.service"))
    assert set(re.findall(r"(?:unix:|/var/spool/postfix/)policyd/(\w+)", texts)) == {"socket"}


def test_what_the_readme_shows_is_what_policyd_logs_and_policyd_admin_prints(tmp_path: Path) -> None:
    """In the table of what is down; the line of a held message; and the list."""
    for row in re.findall(r"^\|(?:[^|]+\|){2}([^|]+)\|$", README.read_text(), re.MULTILINE):
        for said in re.findall(r"`([^`]+)`", row):
            for words in re.split(r"(?:\b[A-Z]{3,}\b ?)+", said.replace("ERROR while UPDATING db", "")):
                assert words.startswith("problem talking to server") or words.strip(" :;") in SOURCE, words
    line = r"policyd\[\d+\]: DEFERRING (.*) for user \S+ using \S+ from ip \[\S+\], queue_id=\w+$"
    (shown,) = re.findall(line, README.read_text(), re.MULTILINE)
    assert shown in [verdict.said for verdict in VERDICTS]
    store = SQLiteStore(tmp_path / "events.sqlite3")
    store.add([("anna", "anna@example.org", "192.0.2.31", 2)], 0)
    file = write_settings(tmp_path / "policyd.cfg", **store.settings)
    (heading,) = re.findall("^rank .*", output_of(ADMIN, "top", "-c", file), re.MULTILINE)
    assert f"\n    {heading.strip()}\n" in README.read_text()  # and so in the other language, which has the same


def section(name: str) -> str:
    (text,) = re.findall(rf"^\.Sh {name}\n(.*?)(?=^\.Sh |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(text)


def test_the_manual_page_is_in_order_and_has_every_setting_with_its_default_and_how_it_is_applied() -> None:
    lint = run(program("mandoc", "mandoc"), "-T", "lint", "-W", "warning", PAGE)
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
    items = re.findall(r"^\.It Ic (\w+)( No \+)? Ta (.+) Ta (reload|restart)$", section("SETTINGS"), re.MULTILINE)
    assert sorted(key for key, *_ in items) == sorted(FIELDS)
    shown = {**dict(commented()), **{key: default for key, (_, default) in PROPOSED.items()}}
    for key, repeated, default, change in items:
        assert change == ("restart" if FIELDS[key] else "reload"), key
        assert bool(repeated) == (key in policyd.REPEATED), key
        assert key in WITHOUT_DEFAULT or default.partition(",")[0] == (shown[key] or "none"), key


def test_the_manual_page_has_every_option_and_command() -> None:
    documented = {f"-{name}" for name in re.findall(r"Fl (-?[a-z][a-z-]*)", section("OPTIONS"))}
    assert documented == options_in(output_of(ROOT / "policyd.py", "--help"))
    admin = section("POLICYD-ADMIN")
    commands = commands_of_admin()
    assert set(re.findall(r"^\.It Cm ([a-z]+)", admin, re.MULTILINE)) | {"unblock"} == commands
    helps = [output_of(ADMIN, command, "--help") for command in sorted(commands)]
    known = set().union(*map(options_in, helps)) - {"-h", "--config"} | {"--version"}
    assert {f"-{name}" for name in re.findall(r"Fl (-?[a-z][a-z-]*)", admin)} == known


def test_the_manual_page_has_each_line_of_the_log_with_its_answer() -> None:
    text = section("LOG")
    for verdict in VERDICTS:
        word = "REJECTING" if verdict.action == "REJECT" else "DEFERRING"
        said = re.sub(r"\(since .*\)", "(since TIME)", verdict.said).partition(">")[0].rpartition("(")[0]
        answer = f"{verdict.action} {verdict.reason}"
        assert re.search(rf"^\.It {word} {re.escape(said)}\(.* Ta Cm {answer}$", text, re.MULTILINE), verdict
    for words in re.findall(r"^\.It (.*)", text.partition(".Bl -tag")[2], re.MULTILINE):
        for part in re.split(r"\b[A-Z]+\b", words):
            assert part in SOURCE, words


def test_the_manual_page_has_each_file_and_what_go_policyd_knows() -> None:
    named = set(re.findall(r"^\.It Pa ([\w.]+)$", section("FILES"), re.MULTILINE))
    ours = set(re.findall(r'"(\w+\.(?:sqlite3|json|prom|pid))"', SOURCE))
    assert named == ours - {"notified.json"}  # of 0.1: removed at the start
    installed = set(re.findall(r"share/policyd/([\w.-]+)", (ROOT / "scripts" / "install.sh").read_text()))
    assert set(re.findall(r"Pa share/policyd/([\w.-]+)", section("FILES"))) == installed
    (known,) = re.findall(r"\nIt knows\n(.*?):", section("FROM GO-POLICYD"), re.DOTALL)
    assert len(set(re.findall(r"[a-z_]{4,}", known)) & set(FIELDS)) == 11


def test_the_manual_page_has_each_metric_and_the_line_of_figures(tmp_path: Path, logged: KeptLog) -> None:
    file = write_settings(tmp_path / "policyd.cfg", bind=tmp_path / "socket", statedir=tmp_path)
    with running_here(file) as here:
        here._policy.figures.note("boris", "HOLD", is_audit=True)
        here.publish()
        names = set(re.findall("^(policyd_[a-z0-9_]+)", (tmp_path / "policyd.prom").read_text(), re.MULTILINE))
        status = re.sub("down since [^,]+", "up", here.status())  # it has hardly begun
        status = status.replace(f"unix:{tmp_path}/socket", "inet:127.0.0.1:9093")
    text = section("MONITORING")
    assert names == set(re.findall(r"^\.It Li (policyd_[a-z0-9_]+)", text, re.MULTILINE))
    (shown,) = re.findall(r"^\d+ requests: .*?(?=\n\.Ed)", text, re.MULTILINE | re.DOTALL)
    assert re.sub(r"[\d.]+", "N", shown.replace("\n", " ")) == re.sub(r"[\d.]+", "N", status)


def test_the_changelog_has_this_version_and_the_package_says_whose_it_is() -> None:
    """With what to write for settings that are gone; and with both commands."""
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(policyd.__version__)} \(\d{{4}}-\d\d-\d\d\)$", text, re.MULTILINE)
    assert [key for key in policyd.GONE if f"`{key}`" not in text] == []
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["author"]
    assert setup["metadata"]["url"].startswith("https://")
    assert setup["options"]["scripts"] == "scripts/policyd-admin"
    assert "policyd = policyd:main" in setup["options.entry_points"]["console_scripts"]
