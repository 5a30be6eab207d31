"""The settings file: what it may say, and what every mistake in it is answered with.

And who and where: a login, a sender, an address and a list entry mean the same in all their spellings.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
from pathlib import Path

import hypothesis.strategies as st
import pytest
from asking import Relay, a_request
from hypothesis import example, given, settings
from servers import DUNNO, HOLD, Database, Start, read_settings, run_policyd
from stores import KeptLog, Store, on_each_table

from policyd import (
    BATCH_EVENTS,
    GONE,
    NEVER,
    SETTINGS_FILE,
    Policy,
    Settings,
    SettingsError,
    as_network,
    clean,
    place_of,
    printable,
)

KEYS = [field.name for field in dataclasses.fields(Settings) if field.metadata]
DATABASE = b"dbname=policyd\ndbuser=policyd\n"
LONGEST = "See \"https://help.example.org/?a=b#c\"; 100 % of <you>, $(too) ${x} \\ '".ljust(200, ".")
BLACKLISTED = "HOLD blacklisted"
SHY, ZERO_WIDTH = "\u00ad", "\u200b"
ONE_ANNA = [
    "anna", "Anna", "ANNA", " anna", "anna ", "  anna  ", "anna@example.org", "Anna@Example.ORG", "anna@a@b",
    "anna @example.org", "anna@ example.org", "anna @ example.org", "EXAMPLE\\anna", "example\\ Anna ", "A\\B\\anna",
    "EXAMPLE\\anna@example.org", f"an{SHY}na", f"{ZERO_WIDTH}an\u2060n\ufe0fa", "\uff41nna", "anna\uff20example.org",
    "\u00a0anna\u3000",
]  # fmt: skip
DOMAINS = ("strip_domain=no", "defaultquota=90", "quota=@S.example:3", "quota=max@s.example:5", "quota=@t.example:9:4")


def read(file: Path, content: bytes | str) -> Settings:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Settings.from_file(str(file))


def mistake(file: Path, content: bytes | str) -> str:
    """Return what is shown of a file with a mistake, without the file's name."""
    with pytest.raises(SettingsError) as caught:
        read(file, content)
    name, _, rest = printable(str(caught.value)).partition(":")
    assert name == str(file)
    return rest


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
    EXISTING, EXISTING.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + EXISTING + b"\n",
    EXISTING.replace(b"=", b" = \t").replace(b"\n", b"  \n \t"),
    EXISTING.replace(b"# policyd", b"  # policyd of b\xfcro\x00\xff"),
], ids=["no last newline", "CRLF", "BOM", "spaces", "a comment of any bytes"])  # fmt: skip
def test_the_file_of_an_existing_deployment_works_as_it_is(file: Path, content: bytes) -> None:
    settings = read(file, content)
    assert (settings.bind, settings.port, settings.defaultquota) == ("127.0.0.1", 9093, 1500)
    assert (settings.dbhost, settings.dbport) == ((("db.example.org", None),), 3307)
    assert (settings.dbuser, settings.dbpass, settings.dbname) == ("policyd", "s3cret", "mail")
    assert [settings.whitelist.line_of([name], "192.0.2.7") for name in ("registrar@example.org", "")] == [13, 14]
    assert (settings.policy_table, settings.blacklist.line_of(["phished"], "")) == ("events", 15)


def test_an_existing_deployment_counts_with_the_file_it_has(policyd: Start, old_database: Database) -> None:
    """Its file, its table; only the places of the servers are ours."""
    daemon = policyd()
    assert daemon.stop() == 0
    text = EXISTING.decode()
    for key, value in {"port": daemon.port, **old_database.settings()}.items():
        text = re.sub(f"(?<=^{key}=).*", lambda _, value=value: str(value), text, flags=re.MULTILINE)
    daemon.settings_file.write_text(text.replace("\n", "\r\n"))
    daemon.start()
    assert daemon.ask(sasl_username="anna", recipient_count=1499) == DUNNO
    assert daemon.ask(sasl_username="bert", recipient_count=1500) == HOLD
    assert daemon.ask(sasl_username="phished") == "HOLD blacklisted"
    counted = "SELECT sasl_username, recipient_count FROM events WHERE recipient_count IS NOT NULL ORDER BY 1"
    assert old_database.query(counted) == [("anna", 1499), ("bert", 1500)]


@settings(max_examples=20)
@given(st.text(st.characters(blacklist_categories=("C", "Z"))))
@pytest.mark.parametrize("around", ["{}", "#{}", "a#b{}", "'{}'", '"{}"', "a=b=c{}", "a b{}", "$({})", "\\n%s={}="])
def test_a_password_is_taken_as_it_is_written(file: Path, around: str, password: str) -> None:
    assert read(file, DATABASE + f"dbpass={around.format(password)}\n".encode()).dbpass == around.format(password)


def test_an_empty_file_means_the_defaults(file: Path) -> None:
    """And the file is the one beside main.cf.  Which they are, and that they are written down: test_documents.py."""
    assert SETTINGS_FILE == "/etc/postfix/policyd.cfg"
    assert {**vars(read(file, b"")), "path": ""} == vars(Settings())


@pytest.mark.parametrize(("line", "value"), [
    ("whitelist_days=01-7", [1, 7]), ("whitelist_days=3-3", [3, 3]), ("whitelist_hours=01 - 5", [1, 5]),
    ("strip_domain=No", False), ("mode=Audit", "audit"), ("early_signs=AUDIT", "audit"), ("port=65535", 65535),
    *((f"bind={each}", each) for each in ("::1", "fe80::1%br-0", "relay.example", "/run/p/socket")), ("keep_days=2", 2),
    ("on_stop=/opt/x --from 'a b' \"c'd\" e\\ f", ["/opt/x", "--from", "a b", "c'd", "e f"]),
    (f"hold_message={LONGEST}", LONGEST), (f"reject_message = {LONGEST} ", LONGEST),
    ("dbhost=db.example.org:3307", [("db.example.org", 3307)]), ("dbhost=[2001:db8::1]", [("2001:db8::1", None)]),
    *((f"dbhost={each}", [(each, None)]) for each in ("db", "192.0.2.1", "2001:db8::1", "/run/mysqld/mysqld.sock")),
    ("dbhost=a,b, c:3307 [::1]:65535", [("a", None), ("b", None), ("c", 3307), ("::1", 65535)]),
])  # fmt: skip
def test_a_setting_is_read_as_it_is_meant(file: Path, line: str, value: object) -> None:
    """Capitals do not matter where there are a few words, on_stop is split as a shell does, a message is whole."""
    found = getattr(read(file, f"{DATABASE.decode()}{line}"), line.partition("=")[0].strip())
    assert ([*found] if isinstance(value, list) else found) == value


DAY = (1500, 3000, NEVER)
SIGNS = "keep_days=30\nmax_places=6\nnew_place_quota=90\nearly_signs="
LIMITS = {  # from which sum of anna's on mail is held, from which refused, from which of an hour held; the settings
    DAY: ["quota=bert:5:20", "hourquota=0"], (1500, 3000, 300): ["hourquota=300"],
    (10, 20, NEVER): ["defaultquota=10\nquota=anna2:5\nquota=ann:5\nquota=anna.b@example.org:5",
                      "defaultquota=10\nquota=anna@example.org:5\nstrip_domain=no"],
    (10, 15, NEVER): ["rejectquota=15\ndefaultquota=10"], (10, 10, NEVER): ["defaultquota=10\nrejectquota=10"],
    (5, 10, NEVER): ["quota=anna:005\ndefaultquota=10\nrejectquota=11", "quota = anna : 5 ", "quota=EXAMPLE\\Anna:5",
                     "quota=Anna@Example.ORG:5", "quota=bert:1\nquota=anna:5", "hourquota=300\nquota=anna:5:0"],
    (6, 12, NEVER): ["quota=anna@example.org:5\nquota=anna:6\nquota=anna@example.net:7\nstrip_domain=no"],
    (0, NEVER, NEVER): ["quota=anna:0"], (0, NEVER, 20): ["hourquota=300\nquota=anna:0:20"],
    (NEVER, NEVER, NEVER): ["quota=anna:unlimited", "hourquota=300\nquota=anna:Unlimited"],
    (999_999_999, 1_999_999_998, NEVER): ["quota=anna:999999999"],
    (5, 10, 300): ["hourquota=300\nquota=anna:5", "quota=anna:5\nhourquota=300"],
    (5, 10, 20): ["hourquota=300\nquota=anna:5:20", "quota=Anna@Example.ORG : 5 : 020"],
    (NEVER, NEVER, 20): ["quota=anna:Unlimited:20"],
    # ... and those of the early signs: the bulk of a login with a quota of its own, or on a whitelist, is known
    (*DAY, NEVER, NEVER, False): ["", f"{SIGNS}no"], (*DAY, 6, 90, True): [f"{SIGNS}audit", f"{SIGNS}yes"],
    (5, 10, NEVER, 6, NEVER, True): [f"{SIGNS}yes\nquota=anna:5"],
    (*DAY, 6, NEVER, True): [f"{SIGNS}yes\nwhitelist=anna"],
    (*DAY, NEVER, NEVER, True): ["keep_days=4\nearly_signs=yes\nmax_places=0\nnew_place_quota=0"],
}  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_limits_of_a_login(file: Path, limits: tuple[int, ...]) -> None:
    for content in LIMITS[limits]:
        assert read(file, content).limits_of("anna", "anna")[: len(limits)] == limits, content


def test_a_quota_may_be_of_any_login(file: Path) -> None:
    """A login may have colons, and numbers between them: the numbers of a quota are those at its end."""
    odd = ["josé", "é@b", "anna.b-c_d+e", "12345", "unlimited", "john doe", "$(x)`", "a:b", "a:5"]
    for login, numbers, hour in [*((login, "5", NEVER) for login in odd[:-1]), *((odd[n], "5:7", 7) for n in (-1, -2))]:
        settings = read(file, f"strip_domain=no\nquota={login}:{numbers}")
        assert (settings.limits.keys(), settings.limits_of(login)[:3]) == ({"", login}, (5, 10, hour))


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


# What is wrong with a value, and the lines with such a mistake: they are shown before it.
VALUES = {
    "give a number from 1 to 65535, digits only": ["port=http", "port=+25", "port=\u0669", "port=0", "dbport=65536"],
    "give a number from 1 to 999999999, digits only": ["defaultquota=1.500", "defaultquota=0", "rejectquota=0"],
    "give a number from 0 to 999999999, digits only": ["hourquota=-1", "max_places=off", "new_place_quota=1000000000"],
    "give a number from 2 to 36500, digits only": ["keep_days=1", "keep_days=7d"],
    "give yes or no": ["strip_domain=1"], "give enforce or audit": ["mode=dry-run"],
    "give no, audit or yes": ["early_signs=on"],
    "give FROM-TO, say 1-5": ["whitelist_days=Mon-Fri", "whitelist_days=0-5", "whitelist_days=5-1"],
    "give PROGRAM ARGUMENT..., quoted as for a shell": ["on_stop=/opt/x 'a"],
    "give a file that policyd can read": ["dbssl_ca=/nowhere"],
    "give one LOGIN:N, LOGIN:unlimited or LOGIN:DAY:HOUR; defaultquota= is for whoever has no quota=": [
        "quota=20000", "quota=:5", "quota=anna", "quota=anna:", "quota=anna:-1", "quota=anna:1.500", "quota=anna=5",
        "quota=anna:\u0665", "quota=anna:5:", "quota=anna:5:-1", "quota=anna:5:1000000000", "quota=anna:5 # why",
        "quota=*:50", "quota=* : 50", "quota=anna:5 bert:6", "quota=198.51.100.0/24:50", "quota=192.0.2.7:1",
        "quota=@:5", "quota=anna@:5", "quota=anna,bert:5", "quota=anna*:5", "quota=<anna>:5",
    ],
    "give at most 200 characters, all of them ASCII": ["hold_message=caf\xe9", "reject_message=" + "x" * 201],
    "give one mail address": [f"always_allow={each}" for each in ("helpdesk", "@example.org", "a@b@c", "a@b, c@d")],
    "give an address, or a network from its first address on (192.0.2.0/24)": [f"trusted_network={each}" for each in (
        "campus", "anna@example.org", "192.0.2", "@example.org", "192.0.2.0/33", "192.0.2.7/24", "192.0.2.0/24 #",
        "192.0.2.1, 192.0.2.2", "192.0.2.*", "192.0.2.10-20")],
    "give one login, sender, @domain, address or network (192.0.2.0/24), without comment or wildcard": [
        "whitelist=Lena <lena@x>", "whitelist=192.0.2.0/24 # campus", *(f"blacklist={each}" for each in (
            "2001:DB8::1/32", "\u200b", "@", "lena@", "192.0.2.0/33", "192.0.2.1/24", "2001:db8::/", "192.0.2/24",
            "boris # phished", "carla, dora", ".example.org", "\xab igor \xbb",
            "198.51.100.0/24, 203.0.113.0/24", "*@Bad.Example", "192.0.2.*", "10.*", "anna*", "*", "2001:db8::*",
            "lena@*.example.org", "@example.*", "/^svc-/", "/@bad\\.example$/i", "192.0.2.10-192.0.2.20",
            "192.0.2.10 - 192.0.2.20", "2001:db8::1-ff", "2001:db8:1/48", "1:2:3:4:5:6:7:1-8",
            "192.0.2.1\u2013192.0.2.9", "192.0.2.0 255.255.255.0", "lena*@example.org", "lena.*@example.org",
            "lena@example.org lisa@example.org", "192.0.2.256", "192.0.2.", "192.*.2.1", "2001:db8:::1", "IPv6:::1",
            "@.example.org", "[::1]", '"igor"', "'igor'", "\u201cigor\u201d", "<lena@example.org>"))],
    "give FROM-TO, say 7-19": ["whitelist_hours=19-7", "whitelist_hours=7-25"],
    "give letters, digits, _ and $ only": ["policy_table=mail.events", "policy_table=e`; DROP"],
    "give host, host:port, [IPv6]:port or a socket's path, of a cluster several": [
        "dbhost=db:port", "dbhost=a, b:0", "dbhost=,"],
    "give an address, a host name or a path; the port stands in port=": [
        f"bind={each}" for each in ("127.0.0.1:9093", "[::1]:9093", "[::1]", "inet:127.0.0.1", "*", "127.0.0.1/8")],
}  # fmt: skip


NOT_PRINTABLE = "= has a control character or is not UTF-8; type it again"
TWICE = " already; keep one of them"
NEEDS = "needs strip_domain=no: without their domain logins belong to none"
EMBEDDED = "too; add it, or remove all db... lines: the embedded store"
MISTAKES: dict[bytes | str, str] = {
    **{f"# one\n{line}\n": f"2: {printable(line)}: {hint}" for hint in VALUES for line in VALUES[hint]},
    "port=9093\ndefault_quota=10": "2: unknown setting default_quota; did you mean defaultquota=?",
    "\n\nPORT=9093": "3: unknown setting PORT; did you mean port=?",
    "[policyd]\nport=1": "1: unknown setting [policyd]; did you mean policy_table=?",
    "whitelists anna": "1: unknown setting whitelists; did you mean whitelist=?",
    b"p\xf6rt=1": r"1: unknown setting p\udcf6rt; did you mean port=?",
    **dict.fromkeys(["port", "port 9093", "port 9=1"], "1: no '=' after port; write port=VALUE"),
    "port=": "1: port=: give a number from 1 to 65535, digits only",
    **{f"{key}=": f"1: {key}=: give a value, or remove the line" for key in ("dbname", "dbuser", "statedir")},
    "hold_message=a\rb": f"1: hold_message{NOT_PRINTABLE}", "whitelist=anna\t# x": f"1: whitelist{NOT_PRINTABLE}",
    "statedir=/x\0y": f"1: statedir{NOT_PRINTABLE}", b"# b\xfcro\nwhitelist=b\xfcro": f"2: whitelist{NOT_PRINTABLE}",
    "port=1\n\nport=2": f"3: port= was given in line 1{TWICE}",
    "quota=anna:5\n\nquota=anna:5": f"3: anna has a quota={TWICE}",
    "quota=anna:5\nquota=bert:5\n\nquota=anna:6": f"4: anna has a quota={TWICE}",
    "quota=jos\xe9:5\nquota=jose\u0301:6\n": rf"2: jos\xe9 has a quota={TWICE}",
    "strip_domain=no\nquota=anna@a:5\nquota=anna@b:5\nquota=anna @A:unlimited": f"4: anna@a has a quota={TWICE}",
    "quota=anna:5\nquota=@s.example:300": f"2: quota=@s.example: {NEEDS}",
    "quota=@s.example:300:100\nstrip_domain=yes": f"1: quota=@s.example: {NEEDS}",
    "rejectquota=9\n\ndefaultquota=10": "1: rejectquota= is below defaultquota=10; give more",
    "# one\nrejectquota=1499": "2: rejectquota= is below defaultquota=1500; give more",
    "early_signs=yes\nkeep_days=3": "2: early_signs= needs keep_days=4 or more (better 30)",
    "\ndbhost=db\ndbuser=anna": f"2: dbhost= needs dbname= {EMBEDDED}",
    "dbname=policyd\ndbpass=": f"1: dbname= needs dbuser= {EMBEDDED}",
    DATABASE + b"dbssl_name=db": f"3: dbssl_name= needs dbssl_ca= {EMBEDDED}",
    DATABASE + b"dbssl_cert=/dev/null": f"3: dbssl_cert= needs dbssl_key= {EMBEDDED}",
    DATABASE + b"dbssl_key=/dev/null\ndbssl_cert=/dev/null": f"4: dbssl_cert= needs dbssl_ca= {EMBEDDED}",
}  # fmt: skip


@pytest.mark.parametrize("content", MISTAKES, ids=ascii)
def test_a_mistake_is_named_with_its_line_and_what_to_do(file: Path, content: bytes | str) -> None:
    """A value that cannot be is shown, and what to write instead; also what stands on a list and can never match."""
    assert mistake(file, content) == MISTAKES[content]


def test_a_mistake_ends_everything_with_status_78_and_one_line(file: Path) -> None:
    """systemd does not start it again then."""
    file.write_text("port=9093\nmode=dry-run\n")
    calls = [(file, ":2: mode=dry-run: give enforce or audit", "--check", "--check-settings", "--init-db"),
             (file.parent, ": Is a directory"), (f"{file}2", ": No such file or directory")]  # fmt: skip
    for path, said, *arguments in calls:
        for argument in ([], *([each] for each in arguments)):
            done = run_policyd(f"--config={path}", *argument)
            assert (done.returncode, done.stdout, done.stderr) == (78, "", f"policyd: {path}{said}\n")


def test_a_setting_that_is_gone_is_no_mistake_and_the_line_to_write_instead_is_told(policyd: Start) -> None:
    """An error in the log, in --check and --check-settings: an upgrade by night must not leave mail uncounted."""
    daemon = policyd(defaultquota=2)
    assert daemon.stop() == 0
    settings = daemon.settings_file.read_text()
    given = dict(zip(GONE, ["10", "30m", "postmaster@x", "policyd@x", "mx:25"]))
    daemon.settings_file.write_text(settings + "".join(f"{key}={value}\n" for key, value in given.items()))
    daemon.start()
    assert [daemon.ask() for _ in range(2)] == [DUNNO, HOLD]
    errors = [line.text for line in daemon.lines_so_far() if line.level == "err"]
    told = [f"{key}= is gone; write instead: {GONE[key].format(value)}" for key, value in given.items()]
    assert errors == [f"{daemon.settings_file}:{n}: {line}" for n, line in enumerate(told, settings.count("\n") + 1)]
    assert told[-1].endswith("write instead: --server mx:25 at the end of on_stop=")
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


@given(st.lists(st.binary(max_size=40) | st.sampled_from([key.encode() + b"=" for key in KEYS])))
def test_any_bytes_are_settings_or_a_mistake_on_one_line(file: Path, parts: list[bytes]) -> None:
    said = ""
    try:
        read(file, b"".join(parts))
    except SettingsError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize(("sasl_username", "strip_domain", "login"), [
    *((sasl_username, True, "anna") for sasl_username in ONE_ANNA), ("Anna @ Example.ORG", False, "anna@example.org"),
    ("EXAMPLE\\Anna ", False, "example\\anna"), ("\u00c9MILE@example.org", True, "\u00e9mile"),
    ("E\u0301mile", True, "\u00e9mile"), ("John   Doe", True, "john doe"),
    ("@example.org", True, "@example.org"),  # nothing would be left of it
    ("EXAMPLE\\", True, "example\\"), ("  ", True, "  "), (SHY, True, SHY), ("", True, ""),
    ("a\tb", True, "a\tb"),  # a blank is U+0020
], ids=ascii)  # fmt: skip
def test_all_spellings_of_a_login_are_one(sasl_username: str, strip_domain: bool, login: str) -> None:
    """Directories take them for the same account: none of them may have a quota of its own."""
    assert Settings(strip_domain=strip_domain).login_of(sasl_username) == login


ODD = " @\\aAs\u00ad\u200b\u0345\u0130\u03a3\u0307\uff20\u3000\u00a0\u1160\u0301\u0327\uff3c\ufb01\u1e9e\u2126\u0390"
TEXT = st.text() | st.text(st.sampled_from(ODD), max_size=8)


@given(TEXT, st.booleans())
def test_a_login_is_the_login_of_itself(text: str, strip_domain: bool) -> None:
    """So what the log shows can be given to the tools, and written into the settings."""
    settings = Settings(strip_domain=strip_domain)
    login = settings.login_of(text)
    assert settings.login_of(login) == login
    assert clean(clean(text)) == clean(text)
    assert bool(login) == bool(text)


def test_so_many_rows_decide_as_a_login_s_own_limits_need(file: Path) -> None:
    """However large everybody's are: a long history shall not cost more than a short one."""
    settings = read(file, "defaultquota=999999999\nquota=anna:20\nquota=boris:unlimited\nquota=c:unlimited:5000")
    assert [settings.limits_of(who).rows - BATCH_EVENTS for who in ("anna", "boris", "c")] == [40, 1_999_999_998, 5000]


@on_each_table
def test_a_quota_a_list_and_a_block_mean_all_spellings_of_a_login(store: Store, logged: KeptLog) -> None:
    """In whichever of them they are written; and all of them share a quota."""
    relay = Relay(
        store, logged, "blacklist=Bob", f"whitelist=n{SHY}ews", "whitelist_days=1-7", "whitelist_hours=0-24",
        "quota=ALICE :2", "quota= john  doe:50", f"defaultquota={len(ONE_ANNA)}",
    )  # fmt: skip
    assert [relay.ask(each).answer for each in ONE_ANNA] == [DUNNO] * (len(ONE_ANNA) - 1) + [HOLD]
    for sasl_username in ("bob ", " bob", "BOB@example.org", "EXAMPLE\\bob", f"bo{SHY}b", "bob @example.org"):
        assert relay.ask(sasl_username).answer == BLACKLISTED
    skipped = "skipping whitelisted user: news/alice@example.org/192.0.2.1/99"
    assert relay.ask("News ", recipient_count=99) == (DUNNO, [skipped])
    assert [relay.ask(each).answer for each in ("alice ", "EXAMPLE\\Alice")] == [DUNNO, HOLD]
    assert [relay.ask(each, recipient_count=25).answer for each in ("John Doe", "john  doe ")] == [DUNNO, HOLD]
    store.add([("dora", "", "HOLD blocked", None)], age_s=60)
    assert relay.ask(" Dora@example.org").answer == "HOLD blocked"
    assert {row[0] for row in store.rows()} == {"anna", "alice", "john doe"[: store.width], "dora"}


@pytest.mark.parametrize(("client_address", "address", "place"), [
    *((each, "198.18.9.7", "198.") for each in ("198.18.9.7", "::ffff:198.18.9.7", "::FFFF:C612:907",
        "64:ff9b::c612:907", "64:ff9b::198.18.9.7")), ("2001:DB8:0:0::0001", "2001:db8::1", "2001:"),
    ("fd00::1", "fd00::1", "fd00:"), ("::1", "::1", "0:"), ("fe80::1%eth0", "fe80::1%eth0", "fe80:"),
    ("64:ff9b:1::1", "64:ff9b:1::1", "64:"),
    *((text, None, None) for text in ("unknown", "", "localhost", "192.0.2", "192.0.2.256", "1.2.3.4.5", "::1::")),
])  # fmt: skip
def test_an_address_is_one_in_all_spellings(client_address: str, address: str | None, place: str | None) -> None:
    """Its place is the first number.  IPv4 is inside IPv6 behind inet_protocols=ipv6, a proxy or NAT64."""
    found = as_network(client_address)
    assert (found and str(found.network_address)) == address
    assert place_of(client_address) == place


@given(st.text())
def test_whatever_is_logged_is_one_line_of_printable_ascii(text: str) -> None:
    shown = printable(text)
    assert shown.isascii()
    assert shown.isprintable() or not shown
    assert shown == text or shown.encode().decode("unicode_escape") == text


def is_listed(entry: str, sasl_username: str = "anna", sender: str = "x@y", client_address: str = "192.0.2.1") -> bool:
    """Tell whether an entry of a blacklist holds such a message."""
    settings = read_settings("blacklist=phished", f"blacklist={entry}")
    replies, recorder = list[str](), types.SimpleNamespace(settings=settings, record=lambda *_: None)
    message = a_request(sasl_username=sasl_username, sender=sender, client_address=client_address)
    Policy(recorder, lambda _: None).answer(message, "127.0.0.1", replies.append)  # type: ignore[arg-type]
    if as_network(entry):  # what is trusted is written the same way
        trusted = read_settings(f"trusted_network={entry}").trusted_network
        assert bool(trusted.line_of([], client_address)) == (replies == [BLACKLISTED])
    return replies == [BLACKLISTED]


LISTED = [
    ("news", {"sasl_username": "News@example.org"}), ("news@example.org", {"sasl_username": "news@example.org"}),
    ("Registrar@Example.ORG", {"sender": "registrar@example.org"}),
    ("registrar@example.org", {"sender": "Registrar @Example.org"}),
    ("EXAMPLE\\bob", {"sasl_username": "example\\Bob"}),
    *((each, {"sasl_username": each}) for each in ("boris*master", "4711*master")),  # so a master of Dovecot's logs in
    *(("192.0.2.77", {"client_address": each}) for each in ("192.0.2.77", "::ffff:192.0.2.77")),
    ("::ffff:192.0.2.77", {"client_address": "192.0.2.77"}),
    ("64:ff9b::c000:24d", {"client_address": "::ffff:192.0.2.77"}),
    *(("198.51.100.0/24", {"client_address": each}) for each in ("198.51.100.255", "64:ff9b::c633:6403")),
    ("::ffff:198.51.100.0/120", {"client_address": "198.51.100.3"}),
    ("2001:0DB8:0:0::0001", {"client_address": "2001:db8::1"}),
    ("2001:DB8:1::/48", {"client_address": "2001:db8:1:ffff::1"}), ("0.0.0.0/0", {"client_address": "203.0.113.9"}),
    *(("@spam.example", {"sender": each}) for each in ("lena@Spam.Example", "\"a@b\"@spam.example")),
    *(("@Spam.Example", {"sasl_username": each}) for each in ("lena@spam.example", "lena @ spam.example ")),
]  # fmt: skip
NOT_LISTED = [
    ("news", {"sasl_username": "newsletter", "sender": "news@example.org"}),
    ("registrar@example.org", {"sasl_username": "registrar"}), ("example.org", {"sender": "x@example.org"}),
    *(("198.51.100.0/24", {"client_address": each}) for each in ("198.51.101.0", "198.51.99.255", "unknown")),
    ("2001:DB8:1::/48", {"client_address": "2001:db8:2::"}),
    ("::/0", {"client_address": "::ffff:192.0.2.1"}),  # that is IPv4
    ("@spam.example", {"sender": "lena@mail.spam.example", "sasl_username": "lena@spam.example.org"}),
    ("@spam.example", {"sasl_username": "spam.example", "sender": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "message"), LISTED + NOT_LISTED, ids=str)
def test_a_list_means_logins_senders_addresses_networks_and_domains(entry: str, message: dict[str, str]) -> None:
    """The domain of the sender, or of the login as Postfix gave it: also with strip_domain=yes.

    Not parts of a name, nor subdomains.
    """
    assert is_listed(entry, **message) == ((entry, message) in LISTED)


PIECES = st.sampled_from([*" @\\aA.:/%*#,;<>\"'-_0129f\u00e9\u00ad\u200b\u3000\uff20", "192.0.2.", "2001:db8:", "/24"])
ENTRIES = st.lists(PIECES, min_size=1, max_size=8).map("".join) | st.text(st.characters(blacklist_characters="\n"))


@given(ENTRIES)
@example("::/24\\")  # a login
def test_a_list_entry_that_is_accepted_matches_what_it_names(text: str) -> None:
    """And what can never match is refused."""
    text = text.strip()  # as a line of the file loses them
    try:
        blacklist = read_settings(f"blacklist={text}").blacklist
    except (SettingsError, UnicodeEncodeError):
        return
    entry = clean(text)
    address, slash, prefix = entry.partition("/")
    if as_network(address) and re.fullmatch("[0-9.]*", prefix) and (slash or blacklist.line_of([], address)):
        assert blacklist.line_of([], address)
    elif entry.startswith("@"):
        assert is_listed(text, sender=f"x{text}")
        assert is_listed(text, sasl_username=f"x{text}")
    else:
        assert is_listed(text, sasl_username=text)
        assert is_listed(text, sender=text)


@on_each_table
def test_each_login_without_a_quota_of_its_own_has_that_of_its_domain(store: Store, logged: KeptLog) -> None:
    """The domain is exact; `anna` alone belongs to none.  As far as a table tells them apart: some cut logins."""
    relay = Relay(store, logged, *DOMAINS)
    for sasl_username, quota in (
        ("a@s.example", 3), ("b@S.example ", 3), ("max@s.example", 5), ("c@t.example", 4), ("a@x.s.example", 90),
        ("a", 90), ("s.example", 90), ("@s.example", 3), ("X\\a", 90),
    ):  # fmt: skip
        assert relay.ask(sasl_username, recipient_count=quota - 1).answer == DUNNO
        assert relay.ask(sasl_username).answer.startswith("HOLD")
    assert {"a@s.example", "b@s.example", "a", "x\\a"} <= {each["login"] for each in relay.told}
