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
from servers import ROOT, Database, Policyd, free_port, run_policyd

import policyd as module
from policyd import NEVER, Settings, SettingsError

Start = Callable[..., Policyd]

ALL_KEYS = ", ".join(field.name for field in dataclasses.fields(Settings))
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


def assert_is_the_existing_deployment(settings: Settings) -> None:
    assert (settings.bind, settings.port, settings.defaultquota) == ("127.0.0.1", 9093, 1500)
    assert (settings.dbhost, settings.dbport) == ((("db.example.org", None),), 3307)
    assert (settings.dbuser, settings.dbpass, settings.dbname) == ("policyd", "s3cret", "mail")
    assert settings.policy_table == "events"
    for name in ("news", "registrar@example.org"):
        assert settings.whitelist.holds([name], "")
    assert settings.whitelist.holds([], "192.0.2.7")
    assert settings.blacklist.holds(["phished"], "")
    assert not settings.blacklist.holds(["news"], "192.0.2.7")


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
    assert_is_the_existing_deployment(read(file, content))


def test_an_existing_deployment_counts_with_the_file_it_has(policyd: Start, old_database: Database) -> None:
    """Its file, its table; only the places of the servers are ours."""
    names = old_database.settings()
    text = EXISTING.decode().replace("9093", str(free_port())).replace("db.example.org", names["dbhost"])
    text = text.replace("3307", names["dbport"]).replace("dbuser=policyd", f"dbuser={names['dbuser']}")
    text = text.replace("s3cret", names["dbpass"]).replace("dbname=mail", f"dbname={names['dbname']}")
    daemon = policyd(text.replace("\n", "\r\n"))
    assert daemon.ask(sasl_username="anna", recipient_count=1500) == "HOLD quota exceeded"
    assert daemon.ask(sasl_username="phished") == "HOLD blacklisted"
    assert old_database.query("SELECT sasl_username, recipient_count FROM events") == [("anna", 1500)]


@pytest.mark.parametrize(
    "password", ["a#b", "#a", "'a'", '"a"', "a=b=c", "a b", "$(reboot)", "`a`", "\\n", "%s", "pässwörd", "=", ""]
)
def test_a_password_is_taken_as_it_is_written(file: Path, password: str) -> None:
    assert read(file, DATABASE + f"dbpass={password}\n".encode()).dbpass == password


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(blacklist_categories=("C", "Z"))))
def test_a_password_of_any_characters_is_taken_as_it_is_written(file: Path, password: str) -> None:
    assert read(file, DATABASE + f"dbpass={password}\n".encode()).dbpass == password


def test_an_empty_file_means_the_defaults(file: Path) -> None:
    settings = read(file, b"")
    assert (settings.bind, settings.port, settings.defaultquota, settings.dbhost) == ("127.0.0.1", 9093, 1500, ())


@pytest.mark.parametrize(
    ("dbhost", "servers"),
    [
        ("db", [("db", None)]),
        ("db.example.org:3307", [("db.example.org", 3307)]),
        ("192.0.2.1", [("192.0.2.1", None)]),
        ("2001:db8::1", [("2001:db8::1", None)]),
        ("[2001:db8::1]", [("2001:db8::1", None)]),
        ("[2001:db8::1]:3307", [("2001:db8::1", 3307)]),
        ("/run/mysqld/mysqld.sock", [("/run/mysqld/mysqld.sock", None)]),
        ("a,b", [("a", None), ("b", None)]),
        ("a, b:3307 [::1]:65535", [("a", None), ("b", 3307), ("::1", 65535)]),
    ],
)
def test_dbhost_names_one_server_or_several(
    file: Path, dbhost: str, servers: list[tuple[str, int | None]]
) -> None:
    assert read(file, DATABASE + f"dbhost={dbhost}\n".encode()).dbhost == tuple(servers)


def test_without_a_dbhost_the_database_is_on_this_machine(file: Path) -> None:
    assert read(file, DATABASE).dbhost == (("127.0.0.1", None),)


@pytest.mark.parametrize(("text", "days"), [("1-7", (1, 7)), ("3-3", (3, 3)), ("1 - 5", (1, 5))])
def test_days_are_from_1_to_7(file: Path, text: str, days: tuple[int, int]) -> None:
    assert read(file, f"whitelist_days={text}").whitelist_days == days


@pytest.mark.parametrize(("text", "expected"), [("yes", True), ("No", False)])
def test_yes_and_no_in_any_case(file: Path, text: str, expected: bool) -> None:
    assert read(file, f"strip_domain={text}").strip_domain is expected


@pytest.mark.parametrize(("text", "mode"), [("enforce", "enforce"), ("audit", "audit"), ("Audit", "audit")])
def test_the_mode_is_enforce_or_audit_in_any_case(file: Path, text: str, mode: str) -> None:
    assert read(file, f"mode={text}").mode == mode


def test_without_settings_of_the_rule_it_is_the_old_one(file: Path) -> None:
    settings = read(file, b"")
    assert (settings.mode, settings.keep_days, settings.always_allow) == ("enforce", 7, frozenset())
    assert (settings.hold_message, settings.reject_message) == ("", "")
    assert tuple(settings.limits_of("anna"))[:2] == (1500, 3000)


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
    "quota = anna:5 ": (5, 10),
    "quota=Anna:5": (5, 10),
    "quota=Anna@Example.ORG:5": (5, 10),
    "quota=anna@example.org:5\nstrip_domain=yes": (5, 10),
    "quota=bert:1\nquota=anna:5\nquota=carl:2": (5, 10),
    "defaultquota=10\nquota=bert:5": (10, 20),
    "defaultquota=10\nquota=anna2:5\nquota=ann:5\nquota=anna.b@example.org:5": (10, 20),
    "defaultquota=10\nquota=anna@example.org:5\nstrip_domain=no": (10, 20),
    "quota=anna@example.org:5\nquota=anna:6\nquota=anna@example.net:7\nstrip_domain=no": (6, 12),
}


@pytest.mark.parametrize("content", LIMITS, ids=ascii)
def test_a_login_is_held_and_refused_from_these_sums_on(file: Path, content: str) -> None:
    assert tuple(read(file, content).limits_of("anna"))[:2] == LIMITS[content]


@pytest.mark.parametrize("login", ["a:b", "josé", "é@b", "anna.b-c_d+e", "12345", "unlimited", "'\"$(x)`"])
def test_a_quota_may_be_of_any_login_without_spaces(file: Path, login: str) -> None:
    settings = read(file, f"strip_domain=no\nquota={login}:5")
    assert tuple(settings.limits_of(login))[:2] == (5, 10)
    assert set(settings.quota) == {login}


def test_a_message_is_taken_as_it_is_written_up_to_200_characters(file: Path) -> None:
    text = "See \"https://help.example.org/?a=b#c\"; 100 % of <you>, $(too) ${x} \\ '"
    text += "." * (200 - len(text))
    settings = read(file, f"hold_message={text}\nreject_message = {text} \n")
    assert (settings.hold_message, settings.reject_message) == (text, text)


HOUR_LIMITS = {
    "": NEVER,
    "hourquota=0": NEVER,
    "hourquota=300": 300,
    "hourquota=300\nquota=anna:5": 300,
    "quota=anna:5\nhourquota=300": 300,
    "hourquota=300\nquota=anna:5:20": 20,
    "hourquota=300\nquota=anna:5:500": 500,
    "hourquota=300\nquota=anna:5:0": NEVER,
    "quota=anna:5:20": 20,
    "quota=bert:5:20": NEVER,
    "hourquota=300\nquota=anna:unlimited": NEVER,
    "hourquota=300\nquota=anna:Unlimited:20": 20,
    "hourquota=300\nquota=anna:0:20": 20,
    "hourquota=300\nquota=Anna@Example.ORG:5:020": 20,
}


@pytest.mark.parametrize("content", HOUR_LIMITS, ids=ascii)
def test_a_login_is_held_from_this_sum_of_an_hour_on(file: Path, content: str) -> None:
    assert read(file, content).limits_of("anna").hour == HOUR_LIMITS[content]


@pytest.mark.parametrize(
    ("quota", "login", "day", "hour"),
    [("a:5:6", "a", 5, 6), ("a:5:6:7", "a:5", 6, 7), ("a:b:6", "a:b", 6, NEVER), ("a:b:6:7", "a:b", 6, 7)],
)
def test_the_numbers_of_a_quota_are_those_at_its_end(
    file: Path, quota: str, login: str, day: int, hour: int
) -> None:
    """A login may have colons, and numbers between them."""
    assert read(file, f"quota={quota}").limits_of(login) == (day, 2 * day, hour)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1m", 60), ("60s", 60), ("90s", 90), ("30m", 1800), ("1h", 3600), ("2H", 7200), ("24h", 86_400), ("1d", 86_400),
     ("01h", 3600)],
)
def test_the_window_of_networks_is_a_number_and_its_unit(file: Path, text: str, seconds: int) -> None:
    assert read(file, f"networks_window = {text} ").networks_window == seconds


def test_early_signs_are_off_by_default(file: Path) -> None:
    settings = read(file, b"")
    assert (settings.max_networks, settings.networks_window, settings.hourquota) == (0, 3600, 0)
    assert not settings.trusted_network.holds([], "127.0.0.1")


def test_trusted_networks_are_addresses_and_networks(file: Path) -> None:
    content = "trusted_network=192.0.2.0/24\ntrusted_network=2001:DB8::7\ntrusted_network=198.51.100.7"
    trusted = read(file, content).trusted_network
    for client_address in ("192.0.2.200", "2001:db8::7", "198.51.100.7"):
        assert trusted.holds([], client_address)
    for client_address in ("192.0.3.1", "2001:db8::8", "198.51.100.8", "unknown", ""):
        assert not trusted.holds([], client_address)


def test_addresses_are_lower_cased(file: Path) -> None:
    content = "always_allow=HelpDesk@Example.ORG\nalways_allow=a+b@c\nalways_allow=helpdesk@example.org"
    assert read(file, content).always_allow == {"helpdesk@example.org", "a+b@c"}
    settings = read(file, "notify=PostMaster@Example.ORG\nnotify_from=Policyd@Example.ORG")
    assert (settings.notify, settings.notify_from) == ("postmaster@example.org", "policyd@example.org")


def test_nobody_is_notified_by_default_and_if_so_through_this_host(file: Path) -> None:
    settings = read(file, b"")
    assert (settings.notify, settings.notify_from, settings.notify_server) == ("", "", (("127.0.0.1", 25),))


def test_notify_server_names_one_server_or_several(file: Path) -> None:
    servers = read(file, "notify_server=mail.example.org, 192.0.2.1:587 [2001:db8::1]:26").notify_server
    assert servers == (("mail.example.org", None), ("192.0.2.1", 587), ("2001:db8::1", 26))


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

NO_NETWORK = "not a network; give ADDRESS/PREFIX, for example 192.0.2.0/24 or 2001:db8::/32"
NO_QUOTA = "give LOGIN:N, LOGIN:unlimited or LOGIN:DAY:HOUR, for example newsletter:20000"
NO_WINDOW = "give a time from 1m to 24h, for example 30m or 1h"
NO_CLIENTS = "give an address or ADDRESS/PREFIX, for example 192.0.2.0/24"
NO_MESSAGE = "give at most 200 characters, all of them ASCII"
NO_ADDRESS = "give a mail address, for example helpdesk@example.org"
MISTAKES = {
    "unknown key, nearly right": (
        "port=9093\ndefault_quota=10", "2: unknown setting default_quota; did you mean defaultquota=?"
    ),
    "unknown key in capitals": ("\n\nPORT=9093", "3: unknown setting PORT; did you mean port=?"),
    "unknown key": ("frobnicate=1", f"1: unknown setting frobnicate; known are {ALL_KEYS}"),
    "no key": ("=1", f"1: unknown setting ''; known are {ALL_KEYS}"),
    "no equals sign": ("port 9093", "1: no '=' after port; write port=VALUE"),
    "words before the equals sign": ("port number=9093", "1: no '=' after port; write port=VALUE"),
    "no equals sign, unknown key": ("whitelists anna", "1: unknown setting whitelists; did you mean whitelist=?"),
    "section": ("[policyd]\nport=1", f"1: unknown setting [policyd]; known are {ALL_KEYS}"),
    "no value": ("port=", "1: port= has no value; give one, or remove the line"),
    "no value but space": ("whitelist = \t", "1: whitelist= has no value; give one, or remove the line"),
    "no number": ("port=http", "1: port=http: give a number from 1 to 65535, digits only"),
    "number with a sign": ("port=+25", "1: port=+25: give a number from 1 to 65535, digits only"),
    "number with a comment": ("port=25 # SMTP", "1: port=25 # SMTP: give a number from 1 to 65535, digits only"),
    "number with a point": (
        "defaultquota=1.500", "1: defaultquota=1.500: give a number from 1 to 999999999, digits only"
    ),
    "number in other digits": ("port=٩", r"1: port=\u0669: give a number from 1 to 65535, digits only"),
    "number too small": ("port=0", "1: port=0: give a number from 1 to 65535, digits only"),
    "number too large": ("dbport=65536", "1: dbport=65536: give a number from 1 to 65535, digits only"),
    "quota of nothing": ("defaultquota=0", "1: defaultquota=0: give a number from 1 to 999999999, digits only"),
    "neither yes nor no": ("strip_domain=1", "1: strip_domain=1: give yes or no"),
    "mode": ("mode=dry-run", "1: mode=dry-run: give enforce or audit"),
    "quota of a login, without the login": ("quota=20000", f"1: quota=20000: {NO_QUOTA}"),
    "quota of a login that is empty": ("quota=:5", f"1: quota=:5: {NO_QUOTA}"),
    "quota of a login, without the number": ("quota=anna", f"1: quota=anna: {NO_QUOTA}"),
    "quota of a login, number empty": ("quota=anna:", f"1: quota=anna:: {NO_QUOTA}"),
    "quota of a login, number negative": ("quota=anna:-1", f"1: quota=anna:-1: {NO_QUOTA}"),
    "quota of a login, number too large": ("quota=anna:1000000000", f"1: quota=anna:1000000000: {NO_QUOTA}"),
    "quota of a login, number with a point": ("quota=anna:1.500", f"1: quota=anna:1.500: {NO_QUOTA}"),
    "quota of a login, number in other digits": ("quota=anna:\u0665", rf"1: quota=anna:\u0665: {NO_QUOTA}"),
    "quota of a login, with spaces": ("quota=anna : 5", f"1: quota=anna : 5: {NO_QUOTA}"),
    "quota of two logins": ("quota=anna:5 bert:6", f"1: quota=anna:5 bert:6: {NO_QUOTA}"),
    "quota of a login, with a comment": ("quota=anna:5 # why", f"1: quota=anna:5 # why: {NO_QUOTA}"),
    "quota of a login with =": ("quota=anna=5", f"1: quota=anna=5: {NO_QUOTA}"),
    "quota of a login twice": (
        "quota=anna:5\nquota=bert:5\n\nquota=anna:6", "4: anna has a quota= already; keep one of them"
    ),
    "quota of a login twice, with capitals": (
        "quota=anna:5\nquota=ANNA:6", "2: anna has a quota= already; keep one of them"
    ),
    "quota of a login twice, with its domain": (
        "quota=Anna@example.org:5\nquota=anna@example.net:5\n", "2: anna has a quota= already; keep one of them"
    ),
    "quota of a login twice, not ASCII": (
        "quota=jos\xe9:5\nquota=jos\xe9:6\n", r"2: jos\xe9 has a quota= already; keep one of them"
    ),
    "quota of a login and its domain twice": (
        "strip_domain=no\nquota=anna@a:5\nquota=anna@b:5\nquota=anna@a:unlimited",
        "4: anna@a has a quota= already; keep one of them",
    ),
    "rejectquota of nothing": ("rejectquota=0", "1: rejectquota=0: give a number from 1 to 999999999, digits only"),
    "rejectquota below defaultquota": (
        "rejectquota=9\n\ndefaultquota=10",
        "1: rejectquota=9 is below defaultquota=10; mail is held first, then refused",
    ),
    "rejectquota below the default of defaultquota": (
        "# one\nrejectquota=1499", "2: rejectquota=1499 is below defaultquota=1500; mail is held first, then refused"
    ),
    "message not ASCII": ("hold_message=caf\xe9", rf"1: hold_message=caf\xe9: {NO_MESSAGE}"),
    "message too long": ("reject_message=" + "x" * 201, f"1: reject_message={'x' * 201}: {NO_MESSAGE}"),
    "message of two lines": (
        "hold_message=a\rb", "1: hold_message= has a control character or is not UTF-8; type it again"
    ),
    "message that is empty": ("hold_message=", "1: hold_message= has no value; give one, or remove the line"),
    "message twice": (
        "reject_message=a\nreject_message=b",
        "2: reject_message= was given in line 1 already; keep one of them",
    ),
    "address without a domain": ("always_allow=helpdesk", f"1: always_allow=helpdesk: {NO_ADDRESS}"),
    "address without a name": ("always_allow=@example.org", f"1: always_allow=@example.org: {NO_ADDRESS}"),
    "address with two domains": ("always_allow=a@b@c", f"1: always_allow=a@b@c: {NO_ADDRESS}"),
    "two addresses": ("always_allow=a@b, c@d", f"1: always_allow=a@b, c@d: {NO_ADDRESS}"),
    "notify without a domain": ("notify=postmaster", f"1: notify=postmaster: {NO_ADDRESS}"),
    "notify of two": ("notify=a@b, c@d", f"1: notify=a@b, c@d: {NO_ADDRESS}"),
    "notify twice": ("notify=a@b\nnotify=c@d", "2: notify= was given in line 1 already; keep one of them"),
    "notify with a name": ("notify=Me <me@example.org>", f"1: notify=Me <me@example.org>: {NO_ADDRESS}"),
    "notify not ASCII": ("notify=jos\xe9@example.org", rf"1: notify=jos\xe9@example.org: {NO_ADDRESS}"),
    "notify of nobody": ("notify=", "1: notify= has no value; give one, or remove the line"),
    "notify of two lines": (
        "notify=a@b\rBcc: c@d", "1: notify= has a control character or is not UTF-8; type it again"
    ),
    "notify_from without a domain": ("notify_from=policyd", f"1: notify_from=policyd: {NO_ADDRESS}"),
    "notify_from of the null sender": ("notify_from=<>", f"1: notify_from=<>: {NO_ADDRESS}"),
    "notify_server with a service": (
        "notify_server=mail:smtp",
        "1: notify_server=mail:smtp: mail:smtp is not a server; give host, host:port, [IPv6]:port or a socket's path",
    ),
    "notify_server of nothing": ("notify_server=,", "1: notify_server=,: give a server"),
    "notify_server by a socket": (
        "notify_server=/run/smtp",
        "1: notify_server=/run/smtp: /run/smtp is not a mail server; give host, host:port or [IPv6]:port",
    ),
    "notify_server by a name for notify": (
        "notify_host=mail", "1: unknown setting notify_host; did you mean notify_from=?"
    ),
    "hour quota, negative": ("hourquota=-1", "1: hourquota=-1: give a number from 0 to 999999999, digits only"),
    "hour quota that is off": ("hourquota=off", "1: hourquota=off: give a number from 0 to 999999999, digits only"),
    "hour quota twice": ("hourquota=1\nhourquota=2", "2: hourquota= was given in line 1 already; keep one of them"),
    "hour quota of a login, empty": ("quota=anna:5:", f"1: quota=anna:5:: {NO_QUOTA}"),
    "hour quota of a login, negative": ("quota=anna:5:-1", f"1: quota=anna:5:-1: {NO_QUOTA}"),
    "hour quota of a login, too large": ("quota=anna:5:1000000000", f"1: quota=anna:5:1000000000: {NO_QUOTA}"),
    "networks, negative": ("max_networks=-1", "1: max_networks=-1: give a number from 0 to 999999999, digits only"),
    "networks that are networks": (
        "max_networks=192.0.2.0/24", "1: max_networks=192.0.2.0/24: give a number from 0 to 999999999, digits only"
    ),
    "networks, nearly right": ("max_network=5", "1: unknown setting max_network; did you mean max_networks=?"),
    "window without a unit": ("networks_window=60", f"1: networks_window=60: {NO_WINDOW}"),
    "window of too little": ("networks_window=59s", f"1: networks_window=59s: {NO_WINDOW}"),
    "window of too much": ("networks_window=25h", f"1: networks_window=25h: {NO_WINDOW}"),
    "window of two days": ("networks_window=2d", f"1: networks_window=2d: {NO_WINDOW}"),
    "window with a fraction": ("networks_window=1.5h", f"1: networks_window=1.5h: {NO_WINDOW}"),
    "window of two units": ("networks_window=1h30m", f"1: networks_window=1h30m: {NO_WINDOW}"),
    "window in another unit": ("networks_window=1w", f"1: networks_window=1w: {NO_WINDOW}"),
    "window in other digits": ("networks_window=\u0661h", rf"1: networks_window=\u0661h: {NO_WINDOW}"),
    "window of nothing": ("networks_window=0h", f"1: networks_window=0h: {NO_WINDOW}"),
    "window twice": (
        "networks_window=1h\nnetworks_window=2h", "2: networks_window= was given in line 1 already; keep one of them"
    ),
    "trusted network that is a name": (
        "trusted_network=campus", f"1: trusted_network=campus: {NO_CLIENTS}"
    ),
    "trusted network that is a login": (
        "trusted_network=anna@example.org", f"1: trusted_network=anna@example.org: {NO_CLIENTS}"
    ),
    "trusted network, half an address": ("trusted_network=192.0.2", f"1: trusted_network=192.0.2: {NO_CLIENTS}"),
    "trusted network, prefix too long": (
        "trusted_network=192.0.2.0/33", f"1: trusted_network=192.0.2.0/33: {NO_NETWORK}"
    ),
    "trusted network with bits beyond the prefix": (
        "trusted_network=192.0.2.7/24",
        "1: trusted_network=192.0.2.7/24: the address has bits beyond the prefix; did you mean 192.0.2.0/24?",
    ),
    "two trusted networks": (
        "trusted_network=192.0.2.1, 192.0.2.2", f"1: trusted_network=192.0.2.1, 192.0.2.2: {NO_CLIENTS}"
    ),
    "days that are too few": ("keep_days=1", "1: keep_days=1: give a number from 2 to 36500, digits only"),
    "days with their unit": ("keep_days=7d", "1: keep_days=7d: give a number from 2 to 36500, digits only"),
    "no range": ("whitelist_days=Mon-Fri", "1: whitelist_days=Mon-Fri: give FROM-TO between 1 and 7, for example 1-5"),
    "range beyond": ("whitelist_days=0-5", "1: whitelist_days=0-5: give FROM-TO between 1 and 7, for example 1-5"),
    "range backwards": (
        "whitelist_hours=19-7", "1: whitelist_hours=19-7: give FROM-TO between 0 and 24, for example 7-19"
    ),
    "hours beyond": (
        "whitelist_hours=7-25", "1: whitelist_hours=7-25: give FROM-TO between 0 and 24, for example 7-19"
    ),
    "table": (
        "policy_table=mail.events",
        "1: policy_table=mail.events: give a plain SQL name of letters, digits, _ and $, for example events",
    ),
    "table with SQL in it": (
        "policy_table=e`; DROP",
        "1: policy_table=e`; DROP: give a plain SQL name of letters, digits, _ and $, for example events",
    ),
    "server": (
        "dbhost=db:port",
        "1: dbhost=db:port: db:port is not a server; give host, host:port, [IPv6]:port or a socket's path",
    ),
    "one server of several": (
        "dbhost=a, b:0",
        "1: dbhost=a, b:0: b:0 is not a server; give host, host:port, [IPv6]:port or a socket's path",
    ),
    "no server": ("dbhost=,", "1: dbhost=,: give a server"),
    "network with host bits": (
        "whitelist=192.0.2.1/24",
        "1: whitelist=192.0.2.1/24: the address has bits beyond the prefix; did you mean 192.0.2.0/24?",
    ),
    "IPv6 network with host bits": (
        "blacklist=2001:DB8::1/32",
        "1: blacklist=2001:DB8::1/32: the address has bits beyond the prefix; did you mean 2001:db8::/32?",
    ),
    "prefix": ("whitelist=192.0.2.0/33", f"1: whitelist=192.0.2.0/33: {NO_NETWORK}"),
    "no prefix": ("whitelist=2001:db8::/", f"1: whitelist=2001:db8::/: {NO_NETWORK}"),
    "network of three numbers": ("blacklist=192.0.2/24", f"1: blacklist=192.0.2/24: {NO_NETWORK}"),
    "key twice": ("port=1\n\nport=2", "3: port= was given in line 1 already; keep one of them"),
    "database without a name": (
        "\ndbhost=db\ndbuser=anna",
        "2: dbhost= needs dbname= too; add it, or remove every db... line to use the embedded store",
    ),
    "database without a user": (
        "dbname=policyd\ndbpass=",
        "1: dbname= needs dbuser= too; add it, or remove every db... line to use the embedded store",
    ),
    "control character": (
        "whitelist=anna\x07", "1: whitelist= has a control character or is not UTF-8; type it again"
    ),
    "tab inside": ("dbpass=a\tb", "1: dbpass= has a control character or is not UTF-8; type it again"),
    "NUL": ("statedir=/x\0y", "1: statedir= has a control character or is not UTF-8; type it again"),
    "not UTF-8": (
        b"# b\xfcro\nwhitelist=b\xfcro", "2: whitelist= has a control character or is not UTF-8; type it again"
    ),
    "key not UTF-8": (b"p\xf6rt=1", r"1: unknown setting p\udcf6rt; did you mean port=?"),
    "UTF-16": (
        "port=1".encode("utf-16-be"), r"1: unknown setting \x00p\x00o\x00r\x00t\x00; did you mean port=?"
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_with_its_line_and_what_to_do(file: Path, kind: str) -> None:
    content, message = MISTAKES[kind]
    assert mistake(file, content) == message


def test_a_mistake_ends_the_daemon_with_status_78_and_one_line(file: Path) -> None:
    """systemd does not start it again then."""
    file.write_text("port=9093\ndefault_quota=10\n")
    done = run_policyd("-c", str(file))
    line = f"policyd: {file}:2: unknown setting default_quota; did you mean defaultquota=?\n"
    assert (done.returncode, done.stdout, done.stderr) == (78, "", line)


@pytest.mark.parametrize("option", ["--check", "--init-db"])
def test_a_mistake_ends_everything_else_alike(file: Path, option: str) -> None:
    file.write_text("port=http\n")
    done = run_policyd(f"--config={file}", option)
    line = f"policyd: {file}:1: port=http: give a number from 1 to 65535, digits only\n"
    assert (done.returncode, done.stdout, done.stderr) == (78, "", line)


def test_a_file_that_is_named_must_be_there(file: Path) -> None:
    done = run_policyd("-c", str(file))
    assert (done.returncode, done.stdout, done.stderr) == (78, "", f"policyd: {file}: No such file or directory\n")


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    done = run_policyd("-c", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (78, "", f"policyd: {tmp_path}: Is a directory\n")


def test_of_a_file_it_may_not_read_the_remedy_is_named(file: Path) -> None:
    file.write_text("port=9093\n")
    file.chmod(0)
    rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = run_policyd("-c", str(file), through=rights)
    assert (done.returncode, done.stdout, done.stderr) == (
        78, "", f"policyd: {file}: Permission denied; try: chown root:policyd {file} && chmod 0640 {file}\n"
    )


# ---- the password ---------------------------------------------------------------------------------


def test_the_password_is_not_shown_with_the_settings(file: Path) -> None:
    settings = read(file, DATABASE + b"dbpass=hunter2\n")
    assert settings.dbpass == "hunter2"
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


@pytest.mark.parametrize(
    "content",
    [
        "dbpas=hunter2",
        "dbpass hunter2",
        "dbpass: hunter2",
        "dbpass hunter2=",
        "dbpass: hunter2=hunter2",
        "dbpass=hunter2",  # and no dbname
        "dbpass=hunter2\ndbpass=hunter2",
        "dbpass=hunter2\x1b",
        b"dbpass=hunter2\xff",
        "DBPASS=hunter2",
        "password hunter2",
    ],
)
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
    applied = read(file, "defaultquota=1\nstrip_domain=no\nwhitelist=a\nblacklist=b\nwhitelist_hours=0-24\n")
    assert old.differences(applied) == []
    rule = "mode=audit\nquota=a:1\nrejectquota=2000\nhold_message=x\nreject_message=x\nalways_allow=a@b\nkeep_days=2"
    assert old.differences(read(file, rule)) == []
    early_signs = "hourquota=1\nmax_networks=1\nnetworks_window=2h\ntrusted_network=::1\nquota=a:1:1"
    assert old.differences(read(file, early_signs)) == []
    assert old.differences(read(file, "notify=a@b\nnotify_from=c@d\nnotify_server=mail")) == []
    restart = read(file, DATABASE + b"bind=::1\nport=1\ndbport=1\ndbpass=x\npolicy_table=x\nstatedir=/x\n")
    assert old.differences(restart) == [
        "bind", "port", "dbhost", "dbport", "dbname", "dbuser", "dbpass", "policy_table", "statedir"
    ]


def test_the_settings_file_is_the_one_beside_main_cf() -> None:
    assert module.SETTINGS_FILE == "/etc/postfix/policyd.cfg"
    assert (ROOT / "policyd.cfg.example").exists()
