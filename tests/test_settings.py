"""The settings file: what it may say, and what every mistake in it is answered with."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from servers import DUNNO, HOLD, Database, Policyd, free_port, run_policyd

from policyd import NEVER, SETTINGS_FILE, Settings, SettingsError, printable

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

EXISTING = b"""\
# policyd of relay 1
port=9093
bind=127.0.0.1
defaultquota=1500

dbuser=policyd
dbpass=s3cret
dbhost=db.example.org
dbport=3307
dbname=mail
policy_table=events
whitelist=news
whitelist=Registrar@example.org
whitelist=192.0.2.7
blacklist=phished"""


@pytest.mark.parametrize("content", [
    EXISTING,
    EXISTING + b"\n",
    EXISTING.replace(b"\n", b"\r\n"),
    b"\xef\xbb\xbf" + EXISTING,
    EXISTING.replace(b"=", b" = \t").replace(b"\n", b"  \n \t"),
    EXISTING.replace(b"# policyd", b"  # policyd of b\xfcro\x00\xff"),
], ids=["no last newline", "last newline", "CRLF", "BOM", "spaces", "a comment of any bytes"])  # fmt: skip
def test_the_file_of_an_existing_deployment_works_as_it_is(file: Path, content: bytes) -> None:
    settings = read(file, content)
    assert (settings.bind, settings.port, settings.defaultquota) == ("127.0.0.1", 9093, 1500)
    assert (settings.dbhost, settings.dbport) == ((("db.example.org", None),), 3307)
    assert (settings.dbuser, settings.dbpass, settings.dbname) == ("policyd", "s3cret", "mail")
    assert settings.policy_table == "events"
    assert settings.whitelist.line_of(["registrar@example.org"], "") == 13
    assert settings.whitelist.line_of([], "192.0.2.7") == 14
    assert settings.blacklist.line_of(["phished"], "") == 15


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


@hypothesis_settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(blacklist_categories=("C", "Z"))))
@pytest.mark.parametrize("around", ["{}", "#{}", "a#b{}", "'{}'", '"{}"', "a=b=c{}", "a b{}", "$({})", "\\n%s={}="])
def test_a_password_is_taken_as_it_is_written(file: Path, around: str, password: str) -> None:
    assert read(file, DATABASE + f"dbpass={around.format(password)}\n".encode()).dbpass == around.format(password)


def test_an_empty_file_means_the_defaults(file: Path) -> None:
    """And the file is the one beside main.cf."""
    assert SETTINGS_FILE == "/etc/postfix/policyd.cfg"
    settings = read(file, b"")
    assert (settings.bind, settings.port, settings.defaultquota, settings.dbhost) == ("127.0.0.1", 9093, 1500, ())
    assert (settings.mode, settings.keep_days, settings.lines) == ("enforce", 7, {})
    assert (settings.hold_message, settings.reject_message, [*settings.on_stop]) == ("", "", [])
    assert (settings.early_signs, settings.max_places, settings.new_place_quota) == ("no", 5, 100)
    assert (settings.strip_domain, settings.hourquota, settings.gone) == (True, 0, ())
    assert settings.limits_of("anna") == (1500, 3000, NEVER, NEVER, NEVER, False)
    assert read(file, DATABASE).dbhost == (("127.0.0.1", None),), "the database is on this machine"


LONGEST = "See \"https://help.example.org/?a=b#c\"; 100 % of <you>, $(too) ${x} \\ '".ljust(200, ".")


@pytest.mark.parametrize(("line", "value"), [
    ("whitelist_days=1-7", [1, 7]), ("whitelist_days=3-3", [3, 3]), ("whitelist_hours=1 - 5", [1, 5]),
    ("strip_domain=yes", True), ("strip_domain=No", False), ("mode=Audit", "audit"), ("mode=enforce", "enforce"),
    ("early_signs=AUDIT", "audit"), ("bind=::1", "::1"), ("bind=relay.example.org", "relay.example.org"),
    ("bind=/run/policyd/socket", "/run/policyd/socket"), ("port=65535", 65535), ("keep_days=2", 2),
    ("on_stop=/opt/x --from 'a b' \"c'd\" e\\ f", ["/opt/x", "--from", "a b", "c'd", "e f"]),
    (f"hold_message={LONGEST}", LONGEST), (f"reject_message = {LONGEST} ", LONGEST),
    ("dbhost=db", [("db", None)]), ("dbhost=db.example.org:3307", [("db.example.org", 3307)]),
    ("dbhost=192.0.2.1", [("192.0.2.1", None)]), ("dbhost=2001:db8::1", [("2001:db8::1", None)]),
    ("dbhost=[2001:db8::1]", [("2001:db8::1", None)]), ("dbhost=[2001:db8::1]:3307", [("2001:db8::1", 3307)]),
    ("dbhost=/run/mysqld/mysqld.sock", [("/run/mysqld/mysqld.sock", None)]), ("dbhost=a,b", [("a", None), ("b", None)]),
    ("dbhost=a, b:3307 [::1]:65535", [("a", None), ("b", 3307), ("::1", 65535)]),
])  # fmt: skip
def test_a_setting_is_read_as_it_is_meant(file: Path, line: str, value: object) -> None:
    """Capitals do not matter where there are a few words, on_stop is split as a shell does, a message is whole."""
    found = getattr(read(file, f"{DATABASE.decode()}{line}"), line.partition("=")[0].strip())
    assert ([*found] if isinstance(value, list) else found) == value


# ---- quotas -----------------------------------------------------------------------------------------

DAY = (1500, 3000, NEVER)
RJ = "defaultquota=10\nrejectquota="
SIGNS = "keep_days=30\nmax_places=6\nnew_place_quota=90\nearly_signs="
LIMITS = {  # from which sum of anna's on mail is held, from which refused, from which of an hour held; the settings
    DAY: ["quota=bert:5:20", "hourquota=0"], (1500, 3000, 300): ["hourquota=300"],
    (10, 20, NEVER): ["defaultquota=10", "defaultquota=10\nquota=anna2:5\nquota=ann:5\nquota=anna.b@example.org:5",
                      "defaultquota=10\nquota=anna@example.org:5\nstrip_domain=no"],
    (10, 15, NEVER): [f"{RJ}15", "rejectquota=15\ndefaultquota=10"], (10, 10, NEVER): [f"{RJ}10"],
    (1500, 1501, NEVER): ["rejectquota=1501"], (1, 2, NEVER): ["quota=anna:1"], (7, 14, NEVER): ["quota=anna:007"],
    (5, 10, NEVER): ["quota=anna:5", f"quota=anna:5\n{RJ}11", "quota = anna : 5 ", "quota=Anna@Example.ORG:5",
                     "quota=EXAMPLE\\Anna:5", "quota=anna@example.org:5\nstrip_domain=yes",
                     "quota=bert:1\nquota=anna:5\nquota=carl:2", "hourquota=300\nquota=anna:5:0"],
    (6, 12, NEVER): ["quota=anna@example.org:5\nquota=anna:6\nquota=anna@example.net:7\nstrip_domain=no"],
    (0, NEVER, NEVER): ["quota=anna:0"], (0, NEVER, 20): ["hourquota=300\nquota=anna:0:20"],
    (NEVER, NEVER, NEVER): ["quota=anna:unlimited", "quota=anna:Unlimited", "hourquota=300\nquota=anna:unlimited"],
    (999_999_999, 1_999_999_998, NEVER): ["quota=anna:999999999"],
    (999_999_999, 999_999_999, NEVER): ["defaultquota=999999999\nrejectquota=999999999"],
    (5, 10, 300): ["hourquota=300\nquota=anna:5", "quota=anna:5\nhourquota=300"],
    (5, 10, 20): ["hourquota=300\nquota=anna:5:20", "quota=anna:5:20", "quota=Anna@Example.ORG : 5 : 020"],
    (5, 10, 500): ["hourquota=300\nquota=anna:5:500"], (NEVER, NEVER, 20): ["quota=anna:Unlimited:20"],
    # ... and those of the early signs: the bulk of a login with a quota of its own, or on a whitelist, is known
    (*DAY, NEVER, NEVER, False): ["", f"{SIGNS}no"], (*DAY, 6, 90, True): [f"{SIGNS}audit", f"{SIGNS}yes"],
    (5, 10, NEVER, 6, NEVER, True): [f"{SIGNS}yes\nquota=anna:5"],
    (*DAY, 6, NEVER, True): [f"{SIGNS}yes\nwhitelist=anna"],
    (*DAY, NEVER, 100, True): ["keep_days=4\nearly_signs=yes\nmax_places=0"],
    (*DAY, 5, NEVER, True): ["keep_days=4\nearly_signs=yes\nnew_place_quota=0"],
}  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_limits_of_a_login(file: Path, limits: tuple[int, ...]) -> None:
    for content in LIMITS[limits]:
        assert read(file, content).limits_of("anna")[: len(limits)] == limits, content


ODD_LOGINS = ["josé", "é@b", "anna.b-c_d+e", "12345", "unlimited", "john doe", "$(x)`", "a:b"]


@pytest.mark.parametrize(("login", "numbers", "hour"), [
    *((login, "5", NEVER) for login in ODD_LOGINS), ("a", "5:7", 7), ("a:b", "5:7", 7), ("a:5", "5:7", 7),
])  # fmt: skip
def test_a_quota_may_be_of_any_login(file: Path, login: str, numbers: str, hour: int) -> None:
    """A login may have colons, and numbers between them: the numbers of a quota are those at its end."""
    settings = read(file, f"strip_domain=no\nquota={login}:{numbers}")
    assert settings.limits_of(login)[:3] == (5, 10, hour)
    assert set(settings.quota) == {login}


def test_trusted_networks_are_addresses_and_networks(file: Path) -> None:
    content = "trusted_network=192.0.2.0/24\ntrusted_network=2001:DB8::7\ntrusted_network=::ffff:198.51.100.7"
    trusted = read(file, content).trusted_network
    for clients, is_trusted in (("192.0.2.200 ::ffff:192.0.2.1 64:ff9b::192.0.2.1 2001:db8::7 198.51.100.7", True),
                                ("192.0.3.1 2001:db8::8 198.51.100.8 unknown", False)):  # fmt: skip
        assert {bool(trusted.line_of([], client_address)) for client_address in clients.split()} == {is_trusted}


def test_where_the_files_are(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In statedir=, else where systemd says (the first one of several), else in /var/lib if writable, else here."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert read(file, "statedir=/srv/policyd").state_file("x") == "/srv/policyd/x"
    assert Settings().state_file("x") == "/var/lib/one/x"
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.chdir(tmp_path)
    for writable, place in ("/var/lib/policyd", "/var/lib/policyd"), ("", str(tmp_path)):
        monkeypatch.setattr(os, "access", lambda path, mode, writable=writable: (path, mode) == (writable, os.W_OK))
        assert Settings().state_file("x") == f"{place}/x"


# ---- mistakes -------------------------------------------------------------------------------------

WORDS = "no wildcards; give a login, a sender, @domain or a network"
ONE_A_LINE = "one entry a line; write a line for each"
# What is wrong with a value, and the lines with such a mistake: they are shown before it.
VALUES = {
    "give a number from 1 to 65535, digits only": ["port=http", "port=+25", "port=\u0669", "port=0", "dbport=65536"],
    "give a number from 1 to 999999999, digits only": ["defaultquota=1.500", "defaultquota=0", "rejectquota=0"],
    "give a number from 0 to 999999999, digits only": ["hourquota=-1", "max_places=off", "new_place_quota=1000000000"],
    "give a number from 2 to 36500, digits only": ["keep_days=1", "keep_days=7d"],
    "give yes or no": ["strip_domain=1"], "give enforce or audit": ["mode=dry-run"],
    "give no, audit or yes": ["early_signs=on"], "give a server": ["dbhost=,"],
    "No closing quotation": ["on_stop=/opt/x 'a"], "No such file or directory": ["dbssl_ca=/nowhere/ca.pem"],
    "give LOGIN:N, LOGIN:unlimited or LOGIN:DAY:HOUR, for example newsletter:20000": [
        "quota=20000", "quota=:5", "quota=anna", "quota=anna:", "quota=anna:-1", "quota=anna:1.500", "quota=anna=5",
        "quota=anna:\u0665", "quota=anna:5:", "quota=anna:5:-1", "quota=anna:5:1000000000", "quota=anna:5 # why",
    ],
    "did you mean defaultquota=50?": ["quota=*:50", "quota=* : 50"],
    "a domain is missing behind @": ["quota=@:5", "quota=anna@:5", "blacklist=@", "blacklist=lena@"],
    "give at most 200 characters, all of them ASCII": ["hold_message=caf\xe9", "reject_message=" + "x" * 201],
    "give a mail address, for example helpdesk@example.org": [
        "always_allow=helpdesk", "always_allow=@example.org", "always_allow=a@b@c", "always_allow=a@b, c@d",
    ],
    "give an address or ADDRESS/PREFIX, for example 192.0.2.0/24": [
        f"trusted_network={each}" for each in ("campus", "anna@example.org", "192.0.2", "@example.org")],
    "not a network; give ADDRESS/PREFIX, for example 192.0.2.0/24 or 2001:db8::/32": [
        "trusted_network=192.0.2.0/33", "whitelist=192.0.2.0/33", "whitelist=2001:db8::/", "blacklist=192.0.2/24",
    ],
    "the address has bits beyond the prefix; did you mean 192.0.2.0/24?": [
        "trusted_network=192.0.2.7/24", "whitelist=192.0.2.1/24"],
    "the address has bits beyond the prefix; did you mean 2001:db8::/32?": ["blacklist=2001:DB8::1/32"],
    "a comment stands in a line of its own; remove what is behind the entry": [
        "blacklist=boris # phished", "whitelist=192.0.2.0/24 # campus", "trusted_network=192.0.2.0/24 #"],
    ONE_A_LINE: [
        "blacklist=carla, dora", "whitelist=carla,dora", "blacklist=carla; dora", "quota=anna,bert:5",
        "blacklist=198.51.100.0/24, 203.0.113.0/24", "trusted_network=192.0.2.1, 192.0.2.2",
    ],
    "did you mean @bad.example?": ["blacklist=*@bad.example", "whitelist=*@Bad.Example"],
    "did you mean 192.0.2.0/24?": ["blacklist=192.0.2.*", "trusted_network=192.0.2.*"],
    "did you mean 192.0.0.0/16?": ["blacklist=192.0.*.*"], "did you mean 10.0.0.0/8?": ["whitelist=10.*"],
    WORDS: ["blacklist=*.example.org", "blacklist=anna*", "blacklist=*", "quota=anna*:5", "blacklist=2001:db8::*",
            "blacklist=lena@*.example.org", "blacklist=@example.*"],
    "no regular expressions; give a login, a sender, @domain, an address or a network": [
        "blacklist=/^svc-/", "blacklist=/@bad\\.example$/i"],
    "one entry a line, and no ranges; give networks, for example 192.0.2.0/24": [
        "blacklist=192.0.2.10-192.0.2.20", "blacklist=192.0.2.10 - 192.0.2.20", "trusted_network=192.0.2.10-20",
        "whitelist=192.0.2.20-192.0.2.10", "blacklist=2001:db8::1-ff", "blacklist=192.0.2.1\u2013192.0.2.9",
        "blacklist=198.51.100.0/24 203.0.113.0/24", "blacklist=lena@example.org lisa@example.org",
        "blacklist=192.0.2.0 255.255.255.0"],
    "this is no address": [f"blacklist={each}" for each in (
        "192.0.2.256", "192.0.2.", "192.*.2.1", "192.0.2.[0-9]", "192.0.2.%", "2001:db8:::1")],
    "a quota is a login's or an @domain's, not an address's": ["quota=198.51.100.0/24:50", "quota=192.0.2.7:1"],
    "quotes are part of the value; write it without": [
        'blacklist="igor"', "blacklist='igor'", "blacklist=\u201cigor\u201d"],
    "write it alone, without < and >": [
        "blacklist=<lena@example.org>", "quota=<anna>:5", "whitelist=Lena <lena@example.org>"],
    "give FROM-TO between 1 and 7, for example 1-5": ["whitelist_days=Mon-Fri", "whitelist_days=0-5"],
    "give FROM-TO between 0 and 24, for example 7-19": ["whitelist_hours=19-7", "whitelist_hours=7-25"],
    "give a plain SQL name of letters, digits, _ and $, for example events": [
        "policy_table=mail.events", "policy_table=e`; DROP"],
    "db:port is not a server; give host, host:port, [IPv6]:port or a socket's path": ["dbhost=db:port"],
    "b:0 is not a server; give host, host:port, [IPv6]:port or a socket's path": ["dbhost=a, b:0"],
    "give an address, a host name or the path of a Unix socket; the port stands in port=": [
        f"bind={each}" for each in ("127.0.0.1:9093", "[::1]:9093", "[::1]", "inet:127.0.0.1", "*", "127.0.0.1/8")],
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
    "frobnicate=1": f"1: unknown setting frobnicate; known are {ALL_KEYS}",
    "=1": f"1: unknown setting ''; known are {ALL_KEYS}",
    "[policyd]\nport=1": f"1: unknown setting [policyd]; known are {ALL_KEYS}",
    "whitelists anna": "1: unknown setting whitelists; did you mean whitelist=?",
    b"p\xf6rt=1": r"1: unknown setting p\udcf6rt; did you mean port=?",
    "port 9093": "1: no '=' after port; write port=VALUE", "port=": f"1: port{NO_VALUE}",
    "hold_message=a\rb": f"1: hold_message{NOT_PRINTABLE}", "whitelist=anna\t# x": f"1: whitelist{NOT_PRINTABLE}",
    "statedir=/x\0y": f"1: statedir{NOT_PRINTABLE}", b"# b\xfcro\nwhitelist=b\xfcro": f"2: whitelist{NOT_PRINTABLE}",
    "port=1\n\nport=2": f"3: port= was given in line 1{TWICE}",
    "quota=anna:5\nquota=bert:5\n\nquota=anna:6": f"4: anna has a quota={TWICE}",
    "quota=jos\xe9:5\nquota=jose\u0301:6\n": rf"2: jos\xe9 has a quota={TWICE}",
    "strip_domain=no\nquota=anna@a:5\nquota=anna@b:5\nquota=anna @A:unlimited": f"4: anna@a has a quota={TWICE}",
    "quota=anna:5\nquota=@s.example:300": f"2: quota=@s.example: {NEEDS}",
    "quota=@s.example:300:100\nstrip_domain=yes": f"1: quota=@s.example: {NEEDS}",
    "rejectquota=9\n\ndefaultquota=10": f"1: rejectquota=9 is below defaultquota=10; {BELOW}",
    "# one\nrejectquota=1499": f"2: rejectquota=1499 is below defaultquota=1500; {BELOW}",
    "early_signs=yes\nkeep_days=3": "2: early_signs= needs keep_days=4 or more (better 30)",
    "\ndbhost=db\ndbuser=anna": f"2: dbhost= needs dbname= too; {EMBEDDED}",
    "dbname=policyd\ndbpass=": f"1: dbname= needs dbuser= too; {EMBEDDED}",
    DATABASE + b"dbssl_name=db": "3: dbssl_name= needs dbssl_ca= too",
    DATABASE + b"dbssl_cert=/dev/null": "3: dbssl_cert= needs dbssl_key= too",
    DATABASE + b"dbssl_key=/dev/null\ndbssl_cert=/dev/null": "4: dbssl_cert= needs dbssl_ca= too",
}  # fmt: skip


@pytest.mark.parametrize("content", MISTAKES, ids=ascii)
def test_a_mistake_is_named_with_its_line_and_what_to_do(file: Path, content: bytes | str) -> None:
    assert mistake(file, content) == MISTAKES[content]


COMMENT = ":2: blacklist=boris # phished: a comment stands in a line of its own; remove what is behind the entry"


@pytest.mark.parametrize(("said", "argument"), [
    *((COMMENT, argument) for argument in ("", "--check", "--check-settings", "--init-db")),
    (": No such file or directory", ""), (": Is a directory", ""),
])  # fmt: skip
def test_a_mistake_ends_everything_with_status_78_and_one_line(file: Path, said: str, argument: str) -> None:
    """systemd does not start it again then."""
    path = file.parent if "Is a directory" in said else file
    if said == COMMENT:
        file.write_text("port=9093\nblacklist=boris # phished\n")
    done = run_policyd(f"--config={path}", *[argument] * bool(argument))
    assert (done.returncode, done.stdout, done.stderr) == (78, "", f"policyd: {path}{said}\n")


# ---- settings that are gone -------------------------------------------------------------------------

GONE = {
    "max_networks=10": "early_signs=audit (or yes), and max_places= if 5 does not suit",
    "networks_window=30m": "early_signs=audit (or yes); its times are fixed",
    "notify=postmaster@example.org": "on_stop=policyd-admin mail postmaster@example.org",
    "notify_from = policyd@example.org": "--from policyd@example.org at the end of on_stop=",
    "notify_server=mail.example.org:587": "--server mail.example.org:587 at the end of on_stop=",
}


def test_a_setting_that_is_gone_is_no_mistake_and_the_line_to_write_instead_is_told(policyd: Start) -> None:
    """An error in the log, in --check and --check-settings: an upgrade by night must not leave mail uncounted."""
    daemon = policyd(defaultquota=2)
    assert daemon.stop() == 0
    settings = daemon.settings_file.read_text()
    daemon.write_settings(settings + "\n".join(GONE).replace(" = ", "="))
    daemon.start()
    assert [daemon.ask() for _ in range(2)] == [DUNNO, HOLD]
    errors = [line.text for line in daemon.lines_so_far() if line.level == "err"]
    assert errors == [f"{daemon.settings_file}:{n}: {re.split(' ?=', line)[0]}= is gone; write instead: {instead}"
                      for n, (line, instead) in enumerate(GONE.items(), settings.count("\n") + 1)]  # fmt: skip
    for option in ("--check", "--check-settings"):
        done = run_policyd("-c", str(daemon.settings_file), option)
        assert (done.returncode, done.stderr) == (0, "".join(f"policyd: {error}\n" for error in errors)), done


@pytest.mark.parametrize("content", [
    "dbpas=hunter2", "dbpass hunter2", "dbpass: hunter2", "dbpass hunter2=", "dbpass: hunter2=hunter2",
    "DBPASS=hunter2", "password hunter2", "dbpass=hunter2\ndbpass=hunter2", "dbpass=hunter2\x1b",
    b"dbpass=hunter2\xff", "dbpass=hunter2",  # and no dbname
])  # fmt: skip
def test_no_message_shows_the_password(file: Path, content: bytes | str) -> None:
    assert "hunter2" not in mistake(file, content)
    settings = read(file, DATABASE + b"dbpass=hunter2\n")
    assert settings.dbpass == "hunter2"
    assert "hunter2" not in f"{settings}{settings!r}"


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
