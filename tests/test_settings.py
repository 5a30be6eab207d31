"""The settings file: what it may say, and what every mistake in it is answered with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from servers import DUNNO, HOLD, ROOT, Database, Policyd, free_port, run_policyd

import policyd as module
from policyd import NEVER, Settings, SettingsError, printable

Start = Callable[..., Policyd]

ALL_KEYS = ", ".join(field.name for field in dataclasses.fields(Settings) if field.metadata)
DATABASE = b"dbname=policyd\ndbuser=policyd\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "policyd.cfg"


def read(file: Path, content: bytes | str) -> Settings:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Settings.from_file(str(file))


def mistake(file: Path, content: bytes | str) -> str:
    """Return what is said of a file with a mistake, without the file's name."""
    with pytest.raises(SettingsError) as caught:
        read(file, content)
    name, _, rest = str(caught.value).partition(":")
    assert name == str(file)
    return rest


# ---- what it may say ------------------------------------------------------------------------------

EXISTING = (
    b"# policyd of relay 1\n"
    b"port=9093\n"
    b"bind=127.0.0.1\n"
    b"defaultquota=1500\n"
    b"\n"
    b"dbuser=policyd\n"
    b"dbpass=s3cret\n"
    b"dbhost=db.example.org\n"
    b"dbport=3307\n"
    b"dbname=mail\n"
    b"policy_table=events\n"
    b"whitelist=news\n"
    b"whitelist=Registrar@example.org\n"
    b"whitelist=192.0.2.7\n"
    b"blacklist=phished"
)


@pytest.mark.parametrize(
    "content",
    [
        EXISTING,
        EXISTING + b"\n",
        EXISTING.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + EXISTING,
        EXISTING.replace(b"=", b" = \t").replace(b"\n", b"  \n \t"),
        EXISTING.replace(b"# policyd", b"  # policyd of b\xfcro\x00\xff"),
    ],
    ids=["no last newline", "last newline", "CRLF", "BOM", "spaces", "a comment of any bytes"],
)
def test_the_file_of_an_existing_deployment_works_as_it_is(file: Path, content: bytes) -> None:
    settings = read(file, content)
    assert (settings.bind, settings.port, settings.defaultquota) == ("127.0.0.1", 9093, 1500)
    assert (settings.dbhost, settings.dbport) == ((("db.example.org", None),), 3307)
    assert (settings.dbuser, settings.dbpass, settings.dbname) == ("policyd", "s3cret", "mail")
    assert settings.policy_table == "events"
    for number, name in ((12, "news"), (13, "registrar@example.org")):
        assert settings.whitelist.line_of([name], "") == number
    assert settings.whitelist.line_of([], "192.0.2.7") == 14
    assert settings.blacklist.line_of(["phished"], "") == 15
    assert not settings.blacklist.line_of(["news"], "192.0.2.7")


def test_an_existing_deployment_counts_with_the_file_it_has(policyd: Start, old_database: Database) -> None:
    """Its file, its table; only the places of the servers are ours."""
    names = old_database.settings()
    text = EXISTING.decode().replace("9093", str(free_port())).replace("db.example.org", names["dbhost"])
    text = text.replace("3307", names["dbport"]).replace("dbuser=policyd", f"dbuser={names['dbuser']}")
    text = text.replace("s3cret", names["dbpass"]).replace("dbname=mail", f"dbname={names['dbname']}")
    daemon = policyd(text.replace("\n", "\r\n"))
    assert daemon.ask(sasl_username="anna", recipient_count=1499) == DUNNO
    assert daemon.ask(sasl_username="bert", recipient_count=1500) == HOLD
    assert daemon.ask(sasl_username="phished") == "HOLD blacklisted"
    counted = "SELECT sasl_username, recipient_count FROM events WHERE recipient_count IS NOT NULL ORDER BY 1"
    assert old_database.query(counted) == [("anna", 1499), ("bert", 1500)]


@pytest.mark.parametrize(
    "password", ["a#b", "#a", "'a'", '"a"', "a=b=c", "a b", "$(reboot)", "`a`", "\\n", "%s", "pässwörd", "=", ""]
)
def test_a_password_is_taken_as_it_is_written(file: Path, password: str) -> None:
    assert read(file, DATABASE + f"dbpass={password}\n".encode()).dbpass == password


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(blacklist_categories=("C", "Z"))))
def test_a_password_of_any_characters_is_too(file: Path, password: str) -> None:
    test_a_password_is_taken_as_it_is_written(file, password)


def test_an_empty_file_means_the_defaults(file: Path) -> None:
    settings = read(file, b"")
    assert (settings.bind, settings.port, settings.defaultquota, settings.dbhost) == ("127.0.0.1", 9093, 1500, ())
    assert (settings.mode, settings.keep_days, settings.lines) == ("enforce", 7, {})
    assert (settings.hold_message, settings.reject_message, [*settings.on_stop]) == ("", "", [])
    assert (settings.early_signs, settings.max_places, settings.new_place_quota) == ("no", 5, 100)
    assert (settings.strip_domain, settings.hourquota, settings.gone) == (True, 0, ())
    assert settings.limits_of("anna") == (1500, 3000, NEVER, NEVER, NEVER, False)


@pytest.mark.parametrize(
    ("dbhost", "servers"),
    [
        ("db", [("db", None)]), ("db.example.org:3307", [("db.example.org", 3307)]),
        ("192.0.2.1", [("192.0.2.1", None)]), ("2001:db8::1", [("2001:db8::1", None)]),
        ("[2001:db8::1]", [("2001:db8::1", None)]), ("[2001:db8::1]:3307", [("2001:db8::1", 3307)]),
        ("/run/mysqld/mysqld.sock", [("/run/mysqld/mysqld.sock", None)]), ("a,b", [("a", None), ("b", None)]),
        ("a, b:3307 [::1]:65535", [("a", None), ("b", 3307), ("::1", 65535)]),
    ],
)  # fmt: skip
def test_dbhost_names_one_server_or_several(file: Path, dbhost: str, servers: list[tuple[str, int | None]]) -> None:
    assert read(file, DATABASE + f"dbhost={dbhost}\n".encode()).dbhost == tuple(servers)
    assert read(file, DATABASE).dbhost == (("127.0.0.1", None),), "without one it is on this machine"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("whitelist_days=1-7", [1, 7]), ("whitelist_days=3-3", [3, 3]), ("whitelist_hours=1 - 5", [1, 5]),
        ("strip_domain=yes", True), ("strip_domain=No", False), ("mode=Audit", "audit"), ("mode=enforce", "enforce"),
        ("early_signs=AUDIT", "audit"), ("bind=::1", "::1"), ("bind=relay.example.org", "relay.example.org"),
        ("bind=/run/policyd/socket", "/run/policyd/socket"), ("port=65535", 65535), ("keep_days=2", 2),
        ("on_stop=/opt/x --from 'a b' \"c'd\" e\\ f", ["/opt/x", "--from", "a b", "c'd", "e f"]),
    ],
)  # fmt: skip
def test_a_setting_is_read_as_it_is_meant(file: Path, line: str, value: object) -> None:
    """Capitals do not matter where there are a few words, on_stop is split as a shell does."""
    found = getattr(read(file, line), line.partition("=")[0])
    assert ([*found] if isinstance(value, list) else found) == value


def test_a_message_is_taken_as_it_is_written_up_to_200_characters(file: Path) -> None:
    text = "See \"https://help.example.org/?a=b#c\"; 100 % of <you>, $(too) ${x} \\ '"
    text += "." * (200 - len(text))
    settings = read(file, f"hold_message={text}\nreject_message = {text} \n")
    assert (settings.hold_message, settings.reject_message) == (text, text)


def test_it_is_known_in_which_line_a_setting_stands(file: Path) -> None:
    lines = read(file, "# one\nmode=audit\n\nquota=Anna@example.org:5\nquota=bert:6\nport=25\n").lines
    assert lines.items() >= {"mode": 2, "quota=anna": 4, "quota=bert": 5, "port": 6}.items()


# ---- quotas -----------------------------------------------------------------------------------------

LIMITS = {
    "defaultquota=10": (10, 20),
    "defaultquota=10\nrejectquota=15": (10, 15),
    "rejectquota=15\ndefaultquota=10": (10, 15),
    "rejectquota=1501": (1500, 1501),
    "defaultquota=10\nrejectquota=10": (10, 10),
    "defaultquota=999999999\nrejectquota=999999999": (999_999_999, 999_999_999),
    "quota=anna:5": (5, 10),
    "quota=anna:5\ndefaultquota=10\nrejectquota=11": (5, 10),
    "quota=anna:1": (1, 2),
    "quota=anna:0": (0, NEVER),
    "quota=anna:unlimited": (NEVER, NEVER),
    "quota=anna:Unlimited": (NEVER, NEVER),
    "quota=anna:007": (7, 14),
    "quota=anna:999999999": (999_999_999, 1_999_999_998),
    "quota = anna : 5 ": (5, 10),
    "quota=Anna@Example.ORG:5": (5, 10),
    "quota=EXAMPLE\\Anna:5": (5, 10),
    "quota=anna@example.org:5\nstrip_domain=yes": (5, 10),
    "quota=bert:1\nquota=anna:5\nquota=carl:2": (5, 10),
    "defaultquota=10\nquota=bert:5": (10, 20),
    "defaultquota=10\nquota=anna2:5\nquota=ann:5\nquota=anna.b@example.org:5": (10, 20),
    "defaultquota=10\nquota=anna@example.org:5\nstrip_domain=no": (10, 20),
    "quota=anna@example.org:5\nquota=anna:6\nquota=anna@example.net:7\nstrip_domain=no": (6, 12),
}


@pytest.mark.parametrize("content", LIMITS, ids=ascii)
def test_a_login_is_held_and_refused_from_these_sums_on(file: Path, content: str) -> None:
    assert read(file, content).limits_of("anna")[:2] == LIMITS[content]


@pytest.mark.parametrize("login", ["a:b", "josé", "é@b", "anna.b-c_d+e", "12345", "unlimited", "john doe", "$(x)`"])
def test_a_quota_may_be_of_any_login(file: Path, login: str) -> None:
    settings = read(file, f"strip_domain=no\nquota={login}:5")
    assert settings.limits_of(login)[:2] == (5, 10)
    assert set(settings.quota) == {login}


@pytest.mark.parametrize(
    ("content", "hour"),
    [
        ("", NEVER), ("hourquota=0", NEVER), ("hourquota=300", 300), ("hourquota=300\nquota=anna:5", 300),
        ("quota=anna:5\nhourquota=300", 300), ("hourquota=300\nquota=anna:5:20", 20),
        ("hourquota=300\nquota=anna:5:500", 500), ("hourquota=300\nquota=anna:5:0", NEVER), ("quota=anna:5:20", 20),
        ("quota=bert:5:20", NEVER), ("hourquota=300\nquota=anna:unlimited", NEVER),
        ("hourquota=300\nquota=anna:Unlimited:20", 20), ("hourquota=300\nquota=anna:0:20", 20),
        ("hourquota=300\nquota=Anna@Example.ORG : 5 : 020", 20),
    ],
    ids=ascii,
)  # fmt: skip
def test_a_login_is_held_from_this_sum_of_an_hour_on(file: Path, content: str, hour: int) -> None:
    assert read(file, content).limits_of("anna").hour == hour


@pytest.mark.parametrize(
    ("quota", "login", "day", "hour"),
    [("a:5:6", "a", 5, 6), ("a:5:6:7", "a:5", 6, 7), ("a:b:6", "a:b", 6, NEVER), ("a:b:6:7", "a:b", 6, 7)],
)
def test_the_numbers_of_a_quota_are_those_at_its_end(file: Path, quota: str, login: str, day: int, hour: int) -> None:
    """A login may have colons, and numbers between them."""
    assert read(file, f"quota={quota}").limits_of(login)[:3] == (day, 2 * day, hour)


SIGNS = "keep_days=30\nmax_places=6\nnew_place_quota=90\nquota=own:5000\nwhitelist=news\nearly_signs="


@pytest.mark.parametrize(
    ("content", "login", "limits"),
    [
        (SIGNS + "no", "anna", (NEVER, NEVER, False)),
        (SIGNS + "audit", "anna", (6, 90, True)),
        (SIGNS + "yes", "anna", (6, 90, True)),
        (SIGNS + "yes", "own", (6, NEVER, True)),
        (SIGNS + "yes", "news", (6, NEVER, True)),
        ("keep_days=4\nearly_signs=yes\nmax_places=0", "anna", (NEVER, 100, True)),
        ("keep_days=4\nearly_signs=yes\nnew_place_quota=0", "anna", (5, NEVER, True)),
    ],
)
def test_early_signs_have_two_limits_and_0_switches_one_off(
    file: Path, content: str, login: str, limits: tuple[int, int, bool]
) -> None:
    """The bulk of a login with a quota of its own, or on a whitelist, is known."""
    assert read(file, content).limits_of(login)[3:] == limits


def test_trusted_networks_are_addresses_and_networks(file: Path) -> None:
    content = "trusted_network=192.0.2.0/24\ntrusted_network=2001:DB8::7\ntrusted_network=::ffff:198.51.100.7"
    trusted = read(file, content).trusted_network
    for client_address in ("192.0.2.200", "::ffff:192.0.2.1", "64:ff9b::192.0.2.1", "2001:db8::7", "198.51.100.7"):
        assert trusted.line_of([], client_address)
    for client_address in ("192.0.3.1", "2001:db8::8", "198.51.100.8", "unknown", ""):
        assert not trusted.line_of([], client_address)


# ---- where the files are --------------------------------------------------------------------------


def test_the_place_of_the_files_is_statedir_before_all_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/given/by/systemd")
    assert read(file, "statedir=/srv/policyd").state_file("x") == "/srv/policyd/x"


def test_the_place_of_the_files_is_the_one_systemd_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one, if it gives several."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert Settings().state_file("x") == "/var/lib/one/x"


@pytest.mark.parametrize("writable", [True, False])
def test_the_place_of_the_files_is_var_lib_if_writable_else_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writable: bool
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: writable and (path, mode) == ("/var/lib/policyd", os.W_OK))
    assert Settings().state_file("x") == ("/var/lib/policyd/x" if writable else f"{tmp_path}/x")


# ---- mistakes -------------------------------------------------------------------------------------

WORDS = "no wildcards; give a login, a sender, @domain or a network"
ONE_A_LINE = "one entry a line; write a line for each"
# What is wrong with a value, and the lines with such a mistake: they are shown before it.
VALUES = {
    "give a number from 1 to 65535, digits only": [
        "port=http", "port=+25", "port=25 # SMTP", "port=\u0669", "port=0", "dbport=65536",
    ],
    "give a number from 1 to 999999999, digits only": ["defaultquota=1.500", "defaultquota=0", "rejectquota=0"],
    "give a number from 0 to 999999999, digits only": [
        "hourquota=-1", "hourquota=off", "max_places=-1", "max_places=192.0.2.0/24", "new_place_quota=1000000000",
    ],
    "give a number from 2 to 36500, digits only": ["keep_days=1", "keep_days=7d"],
    "give yes or no": ["strip_domain=1"],
    "give enforce or audit": ["mode=dry-run"],
    "give no, audit or yes": ["early_signs=on"],
    "give LOGIN:N, LOGIN:unlimited or LOGIN:DAY:HOUR, for example newsletter:20000": [
        "quota=20000", "quota=:5", "quota=anna", "quota=anna:", "quota=anna:-1", "quota=anna:1000000000",
        "quota=anna:1.500", "quota=anna:\u0665", "quota=anna=5", "quota=anna:5:", "quota=anna:5:-1",
        "quota=anna:5:1000000000", "quota=anna:5 # why",
    ],
    "did you mean defaultquota=50?": ["quota=*:50", "quota=* : 50"],
    "a domain is missing behind @": ["quota=@:5", "quota=anna@:5", "blacklist=@", "blacklist=lena@"],
    "give at most 200 characters, all of them ASCII": ["hold_message=caf\xe9", "reject_message=" + "x" * 201],
    "give a mail address, for example helpdesk@example.org": [
        "always_allow=helpdesk", "always_allow=@example.org", "always_allow=a@b@c", "always_allow=a@b, c@d",
    ],
    "give an address or ADDRESS/PREFIX, for example 192.0.2.0/24": [
        "trusted_network=campus", "trusted_network=anna@example.org", "trusted_network=192.0.2",
        "trusted_network=@example.org",
    ],
    "not a network; give ADDRESS/PREFIX, for example 192.0.2.0/24 or 2001:db8::/32": [
        "trusted_network=192.0.2.0/33", "whitelist=192.0.2.0/33", "whitelist=2001:db8::/", "blacklist=192.0.2/24",
    ],
    "the address has bits beyond the prefix; did you mean 192.0.2.0/24?": [
        "trusted_network=192.0.2.7/24", "whitelist=192.0.2.1/24",
    ],
    "the address has bits beyond the prefix; did you mean 2001:db8::/32?": ["blacklist=2001:DB8::1/32"],
    "a comment stands in a line of its own; remove what is behind the entry": [
        "blacklist=boris # phished", "whitelist=192.0.2.0/24 # campus", "trusted_network=192.0.2.0/24 #",
    ],
    ONE_A_LINE: [
        "blacklist=carla, dora", "whitelist=carla,dora", "blacklist=carla; dora", "quota=anna,bert:5",
        "blacklist=198.51.100.0/24, 203.0.113.0/24", "trusted_network=192.0.2.1, 192.0.2.2",
    ],
    "did you mean @bad.example?": ["blacklist=*@bad.example", "whitelist=*@Bad.Example"],
    "did you mean 192.0.2.0/24?": ["blacklist=192.0.2.*", "trusted_network=192.0.2.*"],
    "did you mean 192.0.0.0/16?": ["blacklist=192.0.*", "blacklist=192.0.*.*"],
    "did you mean 10.0.0.0/8?": ["whitelist=10.*", "whitelist=10.*.*.*"],
    WORDS: ["blacklist=*.example.org", "blacklist=anna*", "blacklist=*", "quota=anna*:5", "blacklist=2001:db8::*",
            "blacklist=lena@*.example.org", "blacklist=@example.*"],
    "no regular expressions; give a login, a sender, @domain, an address or a network": [
        "blacklist=/^svc-/", "blacklist=/@bad\\.example$/i",
    ],
    "no ranges; give networks, a line each: 192.0.2.10/31, 192.0.2.12/30, 192.0.2.16/30, 192.0.2.20/32 ...": [
        "blacklist=192.0.2.10-192.0.2.20", "blacklist=192.0.2.10 - 192.0.2.20", "trusted_network=192.0.2.10-20",
    ],
    "quotes are part of the value; write it without": ['blacklist="igor"', "blacklist='igor'"],
    "write it without < and >": ["blacklist=<lena@example.org>", "quota=<anna>:5"],
    "give FROM-TO between 1 and 7, for example 1-5": ["whitelist_days=Mon-Fri", "whitelist_days=0-5"],
    "give FROM-TO between 0 and 24, for example 7-19": ["whitelist_hours=19-7", "whitelist_hours=7-25"],
    "give a plain SQL name of letters, digits, _ and $, for example events": [
        "policy_table=mail.events", "policy_table=e`; DROP",
    ],
    "db:port is not a server; give host, host:port, [IPv6]:port or a socket's path": ["dbhost=db:port"],
    "b:0 is not a server; give host, host:port, [IPv6]:port or a socket's path": ["dbhost=a, b:0"],
    "give a server": ["dbhost=,"],
    "give an address, a host name or the path of a Unix socket; the port stands in port=": [
        "bind=127.0.0.1:9093", "bind=[::1]:9093", "bind=[::1]", "bind=inet:127.0.0.1", "bind=*", "bind=127.0.0.1/8",
    ],
    "No closing quotation": ["on_stop=/opt/x 'a"],
    "No such file or directory": ["dbssl_ca=/nowhere/ca.pem"],
}  # fmt: skip


@pytest.mark.parametrize("hint", VALUES)
def test_a_value_that_cannot_be_is_shown_with_what_to_write_instead(file: Path, hint: str) -> None:
    """Also what stands on a list and can never match."""
    for line in VALUES[hint]:
        assert mistake(file, f"# one\n{line}\n") == f"2: {printable(line)}: {hint}"


NOT_PRINTABLE = "= has a control character or is not UTF-8; type it again"
NO_VALUE = "= has no value; give one, or remove the line"
TWICE = " already; keep one of them"
NEEDS = "needs strip_domain=no: without their domain logins belong to none"
EMBEDDED = "add it, or remove every db... line to use the embedded store"
BELOW = "mail is held first, then refused"
MISTAKES: dict[bytes | str, str] = {
    "port=9093\ndefault_quota=10": "2: unknown setting default_quota; did you mean defaultquota=?",
    "\n\nPORT=9093": "3: unknown setting PORT; did you mean port=?",
    "max_place=5": "1: unknown setting max_place; did you mean max_places=?",
    "frobnicate=1": f"1: unknown setting frobnicate; known are {ALL_KEYS}",
    "=1": f"1: unknown setting ''; known are {ALL_KEYS}",
    "[policyd]\nport=1": f"1: unknown setting [policyd]; known are {ALL_KEYS}",
    "whitelists anna": "1: unknown setting whitelists; did you mean whitelist=?",
    b"p\xf6rt=1": r"1: unknown setting p\udcf6rt; did you mean port=?",
    "port=1".encode("utf-16-be"): r"1: unknown setting \x00p\x00o\x00r\x00t\x00; did you mean port=?",
    "port 9093": "1: no '=' after port; write port=VALUE",
    "port number=9093": "1: no '=' after port; write port=VALUE",
    "port=": f"1: port{NO_VALUE}",
    "whitelist = \t": f"1: whitelist{NO_VALUE}",
    "hold_message=": f"1: hold_message{NO_VALUE}",
    "hold_message=a\rb": f"1: hold_message{NOT_PRINTABLE}",
    "whitelist=anna\x07": f"1: whitelist{NOT_PRINTABLE}",
    "whitelist=anna\t# x": f"1: whitelist{NOT_PRINTABLE}",
    "dbpass=a\tb": f"1: dbpass{NOT_PRINTABLE}",
    "statedir=/x\0y": f"1: statedir{NOT_PRINTABLE}",
    b"# b\xfcro\nwhitelist=b\xfcro": f"2: whitelist{NOT_PRINTABLE}",
    "port=1\n\nport=2": f"3: port= was given in line 1{TWICE}",
    "reject_message=a\nreject_message=b": f"2: reject_message= was given in line 1{TWICE}",
    "quota=anna:5\nquota=bert:5\n\nquota=anna:6": f"4: anna has a quota={TWICE}",
    "quota=anna:5\nquota= ANNA:6": f"2: anna has a quota={TWICE}",
    "quota=Anna@example.org:5\nquota=anna@example.net:5\n": f"2: anna has a quota={TWICE}",
    "quota=jos\xe9:5\nquota=jose\u0301:6\n": rf"2: jos\xe9 has a quota={TWICE}",
    "strip_domain=no\nquota=anna@a:5\nquota=anna@b:5\nquota=anna @A:unlimited": f"4: anna@a has a quota={TWICE}",
    "quota=anna:5\nquota=@s.example:300": f"2: quota=@s.example: {NEEDS}",
    "quota=@s.example:300:100\nstrip_domain=yes": f"1: quota=@s.example: {NEEDS}",
    "rejectquota=9\n\ndefaultquota=10": f"1: rejectquota=9 is below defaultquota=10; {BELOW}",
    "# one\nrejectquota=1499": f"2: rejectquota=1499 is below defaultquota=1500; {BELOW}",
    "early_signs=yes\nkeep_days=3": "2: early_signs= needs keep_days=4 or more (better 30)",
    "early_signs=audit\nkeep_days=2\n": "2: early_signs= needs keep_days=4 or more (better 30)",
    "\ndbhost=db\ndbuser=anna": f"2: dbhost= needs dbname= too; {EMBEDDED}",
    "dbname=policyd\ndbpass=": f"1: dbname= needs dbuser= too; {EMBEDDED}",
    DATABASE + b"dbssl_name=db": "3: dbssl_name= needs dbssl_ca= too",
    DATABASE + b"dbssl_cert=/dev/null": "3: dbssl_cert= needs dbssl_key= too",
    DATABASE + b"dbssl_key=/dev/null\ndbssl_cert=/dev/null": "4: dbssl_cert= needs dbssl_ca= too",
}


@pytest.mark.parametrize("content", MISTAKES, ids=ascii)
def test_a_mistake_is_named_with_its_line_and_what_to_do(file: Path, content: bytes | str) -> None:
    assert mistake(file, content) == MISTAKES[content]


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--check-settings"], ["--init-db"]], ids=str)
def test_a_mistake_ends_everything_with_status_78_and_one_line(file: Path, arguments: list[str]) -> None:
    """systemd does not start it again then."""
    file.write_text("port=9093\nblacklist=boris # phished\n")
    done = run_policyd(f"--config={file}", *arguments)
    line = (f"policyd: {file}:2: blacklist=boris # phished: a comment stands in a line of its own;"
            " remove what is behind the entry\n")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (78, "", line)


def test_a_file_that_is_named_must_be_there_and_a_file(file: Path, tmp_path: Path) -> None:
    for path, reason in ((file, "No such file or directory"), (tmp_path, "Is a directory")):
        done = run_policyd("-c", str(path))
        assert (done.returncode, done.stdout, done.stderr) == (78, "", f"policyd: {path}: {reason}\n")


def test_of_a_file_it_may_not_read_the_remedy_is_named(file: Path) -> None:
    file.write_text("port=9093\n")
    file.chmod(0)
    rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = run_policyd("-c", str(file), through=rights)
    assert (done.returncode, done.stdout, done.stderr) == (
        78, "", f"policyd: {file}: Permission denied; try: chown root:policyd {file} && chmod 0640 {file}\n"
    )


# ---- settings that are gone -------------------------------------------------------------------------

GONE = {
    "max_networks=10": "early_signs=audit (or yes), and max_places= if 5 does not suit",
    "networks_window=30m": "early_signs=audit (or yes); its times are fixed",
    "notify=postmaster@example.org": "on_stop=policyd-admin mail postmaster@example.org",
    "notify_from = policyd@example.org": "--from policyd@example.org at the end of on_stop=",
    "notify_server=mail.example.org:587": "--server mail.example.org:587 at the end of on_stop=",
}


@pytest.mark.parametrize("line", GONE)
def test_a_setting_that_is_gone_is_no_mistake_and_the_line_to_write_instead_is_told(file: Path, line: str) -> None:
    """An upgrade by night must not leave mail uncounted; all else in the file applies."""
    settings = read(file, f"defaultquota=42\n{line}\n")
    key = line.split("=")[0].strip()
    assert settings.gone == (f"{file}:2: {key}= is gone; write instead: {GONE[line]}",)
    assert settings.defaultquota == 42


def test_a_daemon_with_settings_that_are_gone_starts_with_an_error_for_each(policyd: Start) -> None:
    """In the log, and in --check and --check-settings; what it holds, it holds."""
    daemon = policyd(defaultquota=2)
    assert daemon.stop() == 0
    daemon.write_settings(daemon.settings_file.read_text() + "\n".join(GONE).replace(" = ", "="))
    daemon.start()
    assert [daemon.ask() for _ in range(2)] == [DUNNO, HOLD]
    errors = [line.text for line in daemon.lines_so_far() if line.level == "err"]
    assert sorted(error.partition("write instead: ")[2] for error in errors) == sorted(GONE.values())
    assert all(error.startswith(f"{daemon.settings_file}:") for error in errors)
    for option in ("--check", "--check-settings"):
        done = run_policyd("-c", str(daemon.settings_file), option)
        assert (done.returncode, done.stderr) == (0, "".join(f"policyd: {error}\n" for error in errors)), done


# ---- the password ---------------------------------------------------------------------------------


def test_the_password_is_not_shown_with_the_settings(file: Path) -> None:
    settings = read(file, DATABASE + b"dbpass=hunter2\n")
    assert settings.dbpass == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


@pytest.mark.parametrize(
    "content",
    [
        "dbpas=hunter2", "dbpass hunter2", "dbpass: hunter2", "dbpass hunter2=", "dbpass: hunter2=hunter2",
        "DBPASS=hunter2", "password hunter2", "dbpass=hunter2\ndbpass=hunter2", "dbpass=hunter2\x1b",
        b"dbpass=hunter2\xff", "dbpass=hunter2",  # and no dbname
    ],
)  # fmt: skip
def test_no_message_shows_the_password(file: Path, content: bytes | str) -> None:
    assert "hunter2" not in mistake(file, content)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40) | st.sampled_from([key.encode() + b"=" for key in ALL_KEYS.split(", ")])))
def test_any_bytes_are_settings_or_a_mistake_on_one_line(file: Path, parts: list[bytes]) -> None:
    try:
        read(file, b"".join(parts))
    except SettingsError as error:
        said = str(error)
    else:
        return
    assert said.isascii()
    assert said.isprintable()


# ---- what needs a restart -------------------------------------------------------------------------


def test_a_change_that_needs_a_restart_is_told_from_one_that_does_not(file: Path) -> None:
    old = Settings()
    for content in (
        "defaultquota=1\nstrip_domain=no\nwhitelist=a\nblacklist=b\nwhitelist_hours=0-24\nmax_connections=5\n",
        "mode=audit\nquota=a:1\nrejectquota=2000\nhold_message=x\nreject_message=x\nalways_allow=a@b\nkeep_days=4",
        "hourquota=1\nearly_signs=yes\nmax_places=1\nnew_place_quota=2\ntrusted_network=::1\nquota=a:1:1\non_stop=x",
    ):
        assert old.differences(read(file, content)) == []
    restart = read(file, DATABASE + b"bind=::1\nport=1\ndbport=1\ndbpass=x\npolicy_table=x\nstatedir=/x\n")
    assert old.differences(restart) == [
        "bind", "port", "dbhost", "dbport", "dbname", "dbuser", "dbpass", "policy_table", "statedir"
    ]


def test_the_settings_file_is_the_one_beside_main_cf() -> None:
    assert module.SETTINGS_FILE == "/etc/postfix/policyd.cfg"
    assert (ROOT / "policyd.cfg.example").exists()
