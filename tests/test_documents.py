"""What is written about policyd is true: policyd.cfg.example, both READMEs and the manual page, both ways."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from daemons import running_here
from servers import ROOT, program
from stores import KeptLog

import policyd
from policyd import Case, Settings, Trace, Usage, UserList, describe, judge

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


# --- README.md, in two languages ---

README, FRENCH = ROOT / "README.md", ROOT / "README.fr.md"
BOTH = pytest.mark.parametrize("readme", [README, FRENCH], ids=lambda path: path.name)
ANSWERS = {
    value
    for name, value in vars(policyd).items()
    if name.isupper() and isinstance(value, str) and re.match("(HOLD|REJECT) ", value)
}
LOGGED = re.compile(  # what a decision logs
    r"Updating db: [^/ ]+/[^/ ]*/[^/ ]*/\d+/\d+"
    r"|(?:skipping whitelisted user|allowing mail to [^ ]+): [^/ ]+/[^/ ]*/[^/ ]*/\d+"
    r"|(?:Holding|would HOLD) blacklisted user: [^/ ]+/[^/ ]*/[^/ ]*/\d+, queue_id=\w+"
    r"|(?:DEFERRING|REJECTING|would HOLD|would REJECT) (?P<rule>.+) for user (?P<login>[^ ]+)"
    r" using [^ ]+ from ip \[[^ ]+\], queue_id=\w+"
)


class Document(NamedTuple):
    """A Markdown text, taken apart."""

    headings: list[str]  # only their depth
    code: list[str]
    tables: list[int]  # their numbers of rows
    prose: str

    @classmethod
    def of(cls, path: Path) -> Document:
        headings, code, tables, prose = [], [], [], []
        lines = path.read_text().splitlines()
        before, in_code, is_fenced = "", False, False
        for line in lines:
            if line.startswith("```"):
                is_fenced = not is_fenced
                if is_fenced:
                    code.append("")
            elif is_fenced or (line.startswith("    ") and (in_code or not before.strip())):
                if not is_fenced and not in_code:
                    code.append("")
                    in_code = True
                code[-1] += f"{line}\n"
            elif in_code and not line.strip():
                code[-1] += "\n"
            elif line.strip():
                in_code = False
                prose.append(line)
                headings += re.findall("^#+(?= )", line)
                if line.lstrip().startswith("|"):
                    if not before.lstrip().startswith("|"):
                        tables.append(0)
                    tables[-1] += 1
            before = line
        return cls(headings, [block.rstrip("\n") for block in code], tables, "\n".join(prose))


def log_lines_of(document: Document) -> list[str]:
    return re.findall(r"^ *policyd\[\d+\]: (.*)", "\n".join(document.code), re.MULTILINE)


def test_both_readmes_have_the_same_commands_and_examples() -> None:
    assert Document.of(README).code == Document.of(FRENCH).code


def test_both_readmes_have_the_same_sections_and_tables() -> None:
    english, french = Document.of(README), Document.of(FRENCH)
    assert english.headings == french.headings
    assert english.tables == french.tables


def test_both_readmes_name_the_same_things() -> None:
    """Settings, files and log lines are words of the program: they are not translated."""
    english, french = (set(re.findall(r"`([^`]+)`", Document.of(path).prose)) for path in (README, FRENCH))
    assert english == french


@BOTH
def test_the_readme_has_each_answer_in_its_table(readme: Path) -> None:
    cells = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ", readme.read_text(), re.MULTILINE)
    assert len(ANSWERS) == 5
    assert set(cells) == ANSWERS | {policyd.DUNNO}


@BOTH
def test_the_readme_names_each_script(readme: Path) -> None:
    for script in (ROOT / "scripts").glob("policyd-*.sh"):
        assert re.search(rf"[`\s]{re.escape(script.name)}\b", readme.read_text()), script


@BOTH
def test_a_file_of_ours_that_the_readme_names_is_there(readme: Path) -> None:
    text = readme.read_text()
    scripts = set(re.findall(r"(?<![\w/])(?:\./)?(scripts/[\w.*-]+|policyd-\w+\.sh)", text))
    others = set(re.findall(r"(?<![\w/.])(policyd\.8|[\w.]+\.(?:md|py|service|cfg\.example))\b", text))
    assert {"scripts/policyd-*.sh", "scripts/test.sh", "policyd-user.sh"} <= scripts
    assert {"CHANGELOG.md", "policyd.py", "policyd.8", "unit.service", "policyd.cfg.example"} <= others
    for name in scripts | others:
        assert list(ROOT.glob(name)) or list((ROOT / "scripts").glob(name)), name


@BOTH
def test_a_setting_that_the_readme_gives_is_accepted(tmp_path: Path, readme: Path) -> None:
    given = re.findall(r"`([a-z_]+)=([^`]+)`", Document.of(readme).prose)
    assert {key for key, _ in given} - {"action", "default_action"} <= KEYS
    for key, value in given:
        if key in KEYS and not key.startswith("db"):
            read(tmp_path, f"{key}={value}\n")


@BOTH
def test_the_settings_an_old_daemon_knows_are_settings(readme: Path) -> None:
    sentence = re.search(r"`bind`, `port`,\s`defaultquota`[^:]*?`blacklist`", readme.read_text())
    assert sentence
    names = set(re.findall("`([a-z]+_?[a-z]+)`", sentence[0]))
    assert len(names) == 11
    assert names <= KEYS


@BOTH
def test_the_readme_says_which_settings_need_a_restart(readme: Path) -> None:
    sentence = re.search(r"`SIGHUP` \(.*?\.\s`SIGTERM`", readme.read_text(), re.DOTALL)
    assert sentence
    named = set(re.findall("`([a-z_]+)`", sentence[0]))
    assert named | {key for key in KEYS if key.startswith("db")} == NEED_RESTART


def test_a_log_line_in_the_readme_is_one_that_policyd_writes(logged: KeptLog) -> None:
    """Each is a decision or the line of figures, and the rule of each decision is worded as judge() does."""
    lines = log_lines_of(Document.of(README))
    assert len(lines) > 10
    rules = set()
    for line in lines:
        match = LOGGED.fullmatch(line)
        if not match:
            assert re.match(r"\d+ requests: \d+ DUNNO, \d+ HOLD, \d+ REJECT", line), line
        elif match["rule"]:
            name, reached, limit = re.fullmatch(r"(\w+) \((\d+)>(2x\d+|\d+)\)", match["rule"]).groups()
            rules.add((line.split()[0], name))
            settings = Settings(max_networks=int(limit)) if name == "fanout" else Settings()
            limits = {
                "overquota": settings.limits_of(""),
                "hourquota": settings.limits_of("")._replace(hour=int(limit.removeprefix("2x"))),
                "fanout": settings.limits_of(""),
            }[name]
            usage = {
                "overquota": Usage(int(reached)),
                "hourquota": Usage(int(reached), int(reached)),
                "fanout": Usage(1, 1, frozenset(f"198.18.{number}.1" for number in range(int(reached)))),
            }[name]
            assert judge(usage, limits, settings)[1] == match["rule"]
    assert {("DEFERRING", "overquota"), ("REJECTING", "overquota"), ("DEFERRING", "hourquota"), ("DEFERRING", "fanout"),
            ("would", "fanout")} <= rules  # fmt: skip


def test_the_readme_has_each_metric(tmp_path: Path, logged: KeptLog) -> None:
    path = tmp_path / "policyd.cfg"
    path.write_text(f"bind={tmp_path}/socket\nstatedir={tmp_path}\n")
    with running_here(path) as here:
        names = set(re.findall("^(policyd_[a-z0-9_]+)", here.daemon.metrics(), re.MULTILINE))
    for readme in (README, FRENCH):
        assert names == set(re.findall(r"^ *\| `(policyd_[a-z0-9_]+)", readme.read_text(), re.MULTILINE))


@BOTH
def test_the_line_of_figures_in_the_readme_is_the_one_policyd_logs(
    tmp_path: Path, logged: KeptLog, readme: Path
) -> None:
    path = tmp_path / "policyd.cfg"
    path.write_text(f"bind={tmp_path}/socket\nstatedir={tmp_path}\n")
    with running_here(path) as here:
        here.daemon._policy.figures.note("boris", policyd.HOLD, is_audit=True)
        words = re.sub(r"[\d.]+", "N", here.daemon.status())
    (shown,) = [line for line in log_lines_of(Document.of(readme)) if " requests: " in line]
    assert re.sub(r"[\d.]+", "N", shown) == words


@BOTH
def test_the_mail_in_the_readme_is_the_one_policyd_writes(readme: Path) -> None:
    (sample,) = [block for block in Document.of(readme).code if "Subject: policyd: " in block]
    shown = textwrap.dedent(sample).strip("\n")
    login, rule = re.search(r"^Subject: policyd: (\w+) on \w+: (.+)$", shown, re.MULTILINE).groups()
    began, recipients, queue_id = re.search(
        r"since (\S+ \S+): .*\.\n.*hours: (\d+)\.\nHeld so far: (\w+)\.", shown
    ).groups()
    traces = [
        Trace(client, sender, int(messages), int(recipients), first, last)
        for client, recipients, messages, first, last, sender in re.findall(
            r"^ +(\S+): (\d+) recipients, (\d+) messages, (\S+ \S+) to (\S+ \S+), <(.*)>$",
            shown,
            re.MULTILINE,
        )
    ]
    then = time.mktime(time.strptime(began, "%Y-%m-%d %H:%M:%S"))
    case = Case(login, rule, then, int(recipients), [queue_id])
    assert describe(case, traces, policyd.SETTINGS_FILE).strip("\n") == shown.split("\n\n", 1)[1]


# --- policyd.8 ---

PAGE = ROOT / "policyd.8"


def section(name: str) -> str:
    """Return a section of the manual page."""
    match = re.search(rf"^\.Sh {name}\n(.*?)(?=^\.Sh |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert match, name
    return match[1]


def test_the_manual_page_is_in_order() -> None:
    lint = subprocess.run(
        [program("mandoc", "mandoc"), "-T", "lint", "-W", "warning", str(PAGE)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")


def test_the_manual_page_has_every_setting_and_no_other() -> None:
    items = re.findall(r"^\.It Ic (\w+)$", section("SETTINGS"), re.MULTILINE)
    assert sorted(items) == sorted(KEYS)


def test_the_manual_page_says_of_each_setting_whether_a_reload_applies_it() -> None:
    for item in section("SETTINGS").split("\n.It Ic ")[1:]:
        key = item.split("\n")[0]
        how = [line for line in item.splitlines() if line in ("Reload.", "Restart.")]
        assert how == ["Restart." if key in NEED_RESTART else "Reload."], key


def test_the_manual_page_says_the_default_of_each_setting() -> None:
    for item in section("SETTINGS").split("\n.It Ic ")[1:]:
        key = item.split("\n")[0]
        assert re.search("^(Default:|No default)", item, re.MULTILINE), key
        if key not in WITHOUT_DEFAULT:
            value = dict(commented())[key]
            assert f"Default: {value or 'none'}." in item, key


def test_the_manual_page_has_every_option() -> None:
    help_ = subprocess.run(
        [sys.executable, str(ROOT / "policyd.py"), "--help"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    options = set(re.findall(r"(?<![\w-])(-{1,2}[a-z][a-z-]*)", help_))
    documented = {f"-{name}" for name in re.findall(r"Fl (-?[a-z][a-z-]*)", section("OPTIONS"))}
    assert {"-c", "--config", "--check"} <= options
    assert documented == options


def test_the_manual_page_has_each_answer_script_and_file() -> None:
    text = PAGE.read_text()
    for answer in ANSWERS:
        assert f" Ta Cm {answer}\n" in text, answer
    for script in (ROOT / "scripts").glob("policyd-*.sh"):
        assert f".It Nm {script.name}" in section("SCRIPTS"), script
    for name in ("journal.sqlite3", "events.sqlite3", "policyd.prom", "notified.json"):
        assert name in section("FILES")
        assert f'state_file("{name}")' in (ROOT / "policyd.py").read_text()
