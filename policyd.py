#!/usr/bin/env python3
"""policyd: a Postfix policy daemon that stops a phished account from spamming through your relay.

It counts the recipients of each SASL user over a sliding 24 hours in MariaDB and answers, message by
message, whether the mail goes on, is parked in the hold queue for a human, or is refused.  Postfix asks
it from the submission services, once a message is complete and all its recipients are known (main.cf):

    smtpd_end_of_data_restrictions =
        check_policy_service { inet:127.0.0.1:9093, timeout=10s, default_action=DUNNO }

A request is lines of name=value and an empty line; the answer is one line and an empty line.  To try it by
hand, start `python3 policyd.py` and paste this into `nc 127.0.0.1 9093`; the answer is `action=DUNNO`:

    request=smtpd_access_policy
    sasl_username=anna
    recipient_count=1


What it answers, where the sum is the user's recipients of the last 24 hours, this message included:

    sum >= 2 x quota         REJECT max quota exceeded       the client gets 554
    sum >= quota             HOLD quota exceeded             accepted, and waits in the hold queue
    the last hour's >= its   HOLD hour quota exceeded        the same (if hourquota is set)
    networks > max_networks  HOLD too many networks          the same (if max_networks is set)
    else                     DUNNO                           goes on to the next restriction

A login, sender or client address on the blacklist is held at any time; one on the whitelist is let
through, uncounted, in office hours; mail without a login (inbound mail) is none of our business.
With mode=audit the answer is always DUNNO, and the log says what it would have been.

When the database is away, mail flows and the quota holds: events go to a journal, which is moved to the
database when one of the servers of `dbhost` is back.  Without any `db...` setting the events are kept in an
embedded SQLite file instead, and nothing but Python is needed.

Files:    /etc/postfix/policyd.cfg (settings); in `statedir` journal.sqlite3, events.sqlite3 (the embedded store),
          policyd.prom (figures for Prometheus) and notified.json (about whom a human has had a mail).
Signals:  HUP reads the settings again, TERM and INT answer what has been asked and end, USR1 logs a status.
Status:   0, 1 (cannot listen, database not usable in --check), 78 (a mistake in the settings).
Log:      syslog, facility daemon, tag policyd.

The sections below, each of which uses only those above it:
names, log, settings, protocol, decision, storage, recorder, notices, server, process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import difflib
import email.message
import email.utils
import errno
import functools
import io
import ipaddress
import json
import math
import os
import queue
import re
import resource
import shlex
import signal
import smtplib
import socket
import socketserver
import sqlite3
import stat
import struct
import sys
import syslog
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Optional, Protocol, TypeVar, Union

if TYPE_CHECKING:
    import pymysql
    from pymysql.connections import Connection

T = TypeVar("T")

__version__ = "0.1.0"

SETTINGS_FILE = "/etc/postfix/policyd.cfg"

NEVER = sys.maxsize  # a sum that nobody reaches
MAX_MESSAGE = 200  # characters of the site's own in an answer: an SMTP reply of one line has 512

STEPS_PER_OCTAVE = 8  # in which the times that answers take are told apart: 9 % each

MAX_LINE = 8192  # bytes of one attribute, without its newline
MAX_REQUEST = 65536  # bytes of one request
IDLE_TIMEOUT_S = 1015  # above Postfix's smtpd_policy_service_max_ttl (1000 s): Postfix is the one to hang up
KEPT_TEXT = 255  # characters of a login, sender or address that are kept: the columns of scripts/schema.sql
REQUEST_TIMEOUT_S = 30  # for a whole request once its first byte is here, however it dribbles
REMEMBERED_ANSWERS = 10_000

BATCH_EVENTS = 256  # the most that one INSERT takes
BATCH_DEADLINE_S = 2.8  # for a batch, retries included: whoever waits has an answer within 3 s
CONNECT_TIMEOUT_S = 1
RACE_RETRIES = 5  # two relays on two Galera nodes lose one to the other some times in a row, hardly six
STATEMENT_TIMEOUT_S = 2  # the server ends a statement itself, so that it leaves no late row behind
RETRY_DELAYS_S = (1, 2, 4, 8, 15)  # between two looks for a database that is away; the last one repeats
TABLE_LOOK_S = 60  # how long a connection trusts what it has seen of the table's columns and indexes
PURGE_SLICE = 10_000  # rows of one DELETE
REPLAY_SLICE = 500  # rows of the journal that one INSERT takes between two batches
LAST_KNOWN_SUMS = 100_000
FIRST_PURGE_S = 60
RETRY_PURGE_S = 3600
HOUR_S = 3600
DAY_S = 86_400
FIGURES_S = 60  # between two versions of policyd.prom
MAILS_AN_HOUR = 20
MAILED_QUEUE_IDS = 100
MAILED_TRACES = 1000
TRACES_TIMEOUT_S = 30
MAIL_TIMEOUT_S = 30
RETRY_MAIL_S = 60
GIVE_UP_MAIL_S = 3600
STUCK_S = 10  # an event that waits longer than this stops the watchdog's pings

LOG_QUEUE_LINES = 10_000
LISTEN_BACKLOG = 1024  # socketserver's 5 leaves clients waiting for seconds in a rush
SPARE_DESCRIPTORS = 64  # for the database, the store, the log
DRAIN_S = 3.5  # at the end: for the answers still owed


def local_time(seconds: float) -> str:
    """Return a time since 1970 as a human reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# ---- log: lines on their way to syslog ------------------------------------------------------------


def printable(text: str) -> str:
    """Return `text` as printable ASCII on one line, everything else escaped as in a Python string."""
    if text.isascii() and text.isprintable():
        return text
    return text.encode("unicode_escape").decode("ascii")


class Log:
    """A queue of lines and the one thread that hands them to syslog, so that no answer waits for it.

    libc's syslog() blocks after a dozen lines when nobody reads /dev/log.  Thread-safe.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._dropped = 0
        self._lock = threading.Lock()  # guards _dropped
        self.to_stderr = False
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._write: Callable[[int, str], None] = syslog.syslog

    def start(self, to_stderr: bool) -> None:
        """Open syslog as daemon/policyd[pid], or write the same lines to stderr, and start the thread."""
        self.to_stderr = to_stderr or not os.path.exists("/dev/log")
        if self.to_stderr:
            tag = f"policyd[{os.getpid()}]: "
            self._write = lambda level, line: print(tag + line, file=sys.stderr, flush=True)
        else:
            syslog.openlog("policyd", syslog.LOG_PID, syslog.LOG_DAEMON)
        self._thread.start()

    def info(self, line: str) -> None:
        """Log a decision."""
        self._put(syslog.LOG_INFO, line)

    def warning(self, line: str) -> None:
        """Log what a human should look at."""
        self._put(syslog.LOG_WARNING, line)

    def error(self, line: str) -> None:
        """Log that counting is impaired."""
        self._put(syslog.LOG_ERR, line)

    def stop(self) -> None:
        """Write what is queued, in a second at most: a stuck syslog must not keep us."""
        if self._thread.is_alive():
            self._lines.put(None)
            self._thread.join(timeout=1)

    def _put(self, level: int, line: str) -> None:
        if self._lines.qsize() < LOG_QUEUE_LINES:
            self._lines.put((level, printable(line)))
        else:
            with self._lock:
                self._dropped += 1

    def _write_all(self) -> None:
        while (item := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # stderr is closed: nobody to tell
                self._write(*item)
            if self._dropped and self._lines.empty():
                with self._lock:
                    dropped, self._dropped = self._dropped, 0
                self.warning(f"{dropped} log lines were lost: syslog did not take them")


log = Log()


class OnceAMinute:
    """Lets the first of many equal complaints through, and then one a minute."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self, now: float) -> bool:
        """Tell whether to complain at `now` (monotonic seconds)."""
        if now < self._next:
            return False
        self._next = now + 60
        return True


# ---- settings: one file, read whole or not at all ---------------------------------------------------


class SettingsError(Exception):
    """A mistake in the settings: `FILE:LINE: what is wrong, and what may be meant`."""


Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class UserList:
    """A whitelist or a blacklist: logins, senders, client addresses, and networks in CIDR form."""

    def __init__(self, entries: Sequence[str | Network] = ()) -> None:
        self._texts = {entry for entry in entries if isinstance(entry, str)}
        self._networks = [entry for entry in entries if not isinstance(entry, str)]

    def holds(self, names: Iterable[str], client_address: str) -> bool:
        """Tell whether one of `names` (lower case) or the client's address is listed."""
        if client_address in self._texts or not self._texts.isdisjoint(names):
            return True
        if not self._networks:
            return False
        try:
            address = ipaddress.ip_address(client_address)
        except ValueError:  # Postfix says "unknown" of a client that has gone
            return False
        return any(address in network for network in self._networks)


NOBODY = UserList()


def read_lines(path: str) -> list[str]:
    """Return the lines of a settings file without the space around them: UTF-8, but comments may hold anything."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            return [line.strip() for line in file]
    except OSError as error:
        hint = f"; try: chown root:policyd {path} && chmod 0640 {path}" if error.errno == errno.EACCES else ""
        raise SettingsError(f"{path}: {error.strerror}{hint}") from error


def read_number(lowest: int, highest: int) -> Callable[[str], int]:
    """Return a reader of whole numbers in these bounds; like all readers below it raises ValueError."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"give a number from {lowest} to {highest}, digits only")
        return int(text)

    return read


def read_range(lowest: int, highest: int, example: str) -> Callable[[str], tuple[int, int]]:
    """Return a reader of FROM-TO in these bounds."""

    def read(text: str) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,2}) *- *([0-9]{1,2})", text)
        if not match or not lowest <= int(match[1]) <= int(match[2]) <= highest:
            raise ValueError(f"give FROM-TO between {lowest} and {highest}, for example {example}")
        return int(match[1]), int(match[2])

    return read


def read_yes_or_no(text: str) -> bool:
    """Read `yes` or `no`."""
    if text.lower() not in ("yes", "no"):
        raise ValueError("give yes or no")
    return text.lower() == "yes"


def read_mode(text: str) -> str:
    """Read `enforce` or `audit`."""
    if text.lower() not in ("enforce", "audit"):
        raise ValueError("give enforce or audit")
    return text.lower()


def read_message(text: str) -> str:
    """Read a text for an SMTP reply."""
    if not text.isascii() or len(text) > MAX_MESSAGE:
        raise ValueError(f"give at most {MAX_MESSAGE} characters, all of them ASCII")
    return text


def read_address(text: str) -> str:
    """Read a mail address, lower-cased."""
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+@[A-Za-z0-9.-]+", text):
        raise ValueError("give a mail address, for example helpdesk@example.org")
    return text.lower()


def read_quota(text: str) -> tuple[str, int, int | None]:
    """Read LOGIN:DAY or LOGIN:DAY:HOUR, a login and its quotas; the second one is None if it is not given."""
    match = re.fullmatch(r"([^@\s]\S*?):([0-9]{1,9}|unlimited)(?::([0-9]{1,9}|unlimited))?", text.lower())
    if not match:
        raise ValueError("give LOGIN:N, LOGIN:unlimited or LOGIN:DAY:HOUR, for example newsletter:20000")
    day, hour = (NEVER if limit == "unlimited" else int(limit) for limit in (match[2], match[3] or "0"))
    return match[1], day, hour if match[3] else None


def read_window(text: str) -> int:
    """Read a time such as `90s`, `30m` or `1h`; return seconds."""
    match = re.fullmatch(r"([0-9]{1,5})([smhd])", text.lower())
    seconds = int(match[1]) * {"s": 1, "m": 60, "h": HOUR_S, "d": DAY_S}[match[2]] if match else 0
    if not 60 <= seconds <= DAY_S:
        raise ValueError("give a time from 1m to 24h, for example 30m or 1h")
    return seconds


def read_table(text: str) -> str:
    """Read a table's name, which goes into SQL as it is."""
    if not re.fullmatch("[A-Za-z0-9_$]{1,64}", text):
        raise ValueError("give a plain SQL name of letters, digits, _ and $, for example events")
    return text


def read_servers(text: str) -> tuple[tuple[str, int | None], ...]:
    """Read `host`, `host:port`, `[IPv6]:port` or `/socket`, several with commas or spaces between."""
    servers: list[tuple[str, int | None]] = []
    for server in text.replace(",", " ").split():
        match = re.fullmatch(r"(/.+|[^][:/]+|(?=.*:.*:)[0-9A-Fa-f:.]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?", server)
        if not match or not 0 < int(match[2] or 1) < 65536:
            raise ValueError(f"{server} is not a server; give host, host:port, [IPv6]:port or a socket's path")
        servers.append((match[1].strip("[]"), int(match[2]) if match[2] else None))
    if not servers:
        raise ValueError("give a server")
    return tuple(servers)


def read_mail_servers(text: str) -> tuple[tuple[str, int | None], ...]:
    """Read `host`, `host:port` or `[IPv6]:port`, several with commas or spaces between."""
    servers = read_servers(text)
    for host, _ in servers:
        if host.startswith("/"):
            raise ValueError(f"{host} is not a mail server; give host, host:port or [IPv6]:port")
    return servers


def read_list_entry(text: str) -> str | Network:
    """Read a login, sender or client address, lower-cased, or a network in CIDR form."""
    entry = text.lower()
    if not re.fullmatch(r"[0-9a-f:]*[.:][0-9a-f.:]*/[0-9.]*", entry):
        try:
            return str(ipaddress.ip_address(entry))
        except ValueError:
            return entry
    try:
        address = ipaddress.ip_interface(entry)
    except ValueError:
        raise ValueError("not a network; give ADDRESS/PREFIX, for example 192.0.2.0/24 or 2001:db8::/32") from None
    if address.ip != address.network.network_address:
        raise ValueError(f"the address has bits beyond the prefix; did you mean {address.network}?")
    return address.network


def read_network(text: str) -> str | Network:
    """Read a client address, or a network in CIDR form."""
    entry = read_list_entry(text)
    if isinstance(entry, str):
        try:
            ipaddress.ip_address(entry)
        except ValueError:
            raise ValueError("give an address or ADDRESS/PREFIX, for example 192.0.2.0/24") from None
    return entry


def login_of(sasl_username: str, strip_domain: bool) -> str:
    """Return the account a `sasl_username` stands for: lower case, and cut at `@`."""
    login = sasl_username.lower()
    return (strip_domain and login.partition("@")[0]) or login


class Limits(NamedTuple):
    """The sums of a login's recipients from which on its mail is held and refused; NEVER is no limit."""

    hold_at: int
    reject_at: int
    hour: int  # of the last hour: held from it on

    def decisive(self) -> int:
        """Return the sum beyond which the answer stays the same."""
        return max((limit for limit in self if limit < NEVER), default=0)

    def reject_in_words(self) -> str:
        """Return the second one as the log has it."""
        return f"2x{self.hold_at}" if self.reject_at == 2 * self.hold_at else str(self.reject_at)


REPEATED = ("quota", "trusted_network", "always_allow", "whitelist", "blacklist")  # may be given in several lines


def setting(default: Any, read: Callable[[str], Any], restart: bool = False, secret: bool = False) -> Any:
    """Return a field of Settings: its default, how its text is read, and whether a change needs a restart."""
    return dataclasses.field(
        default_factory=lambda: default, repr=not secret, metadata={"read": read, "restart": restart}
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings, each named as in the file; a reload replaces the whole object, so a request sees one state."""

    bind: str = setting("127.0.0.1", str, restart=True)
    port: int = setting(9093, read_number(1, 65535), restart=True)
    max_connections: int = setting(1000, read_number(1, 100_000))
    mode: str = setting("enforce", read_mode)
    defaultquota: int = setting(1500, read_number(1, 999_999_999))
    rejectquota: int = setting(0, read_number(1, 999_999_999))  # 0: twice defaultquota
    hourquota: int = setting(0, read_number(0, 999_999_999))  # 0: none
    quota: dict[str, Limits] = setting({}, read_quota)
    max_networks: int = setting(0, read_number(0, 999_999_999))  # 0: any number
    networks_window: int = setting(3600, read_window)
    trusted_network: UserList = setting(NOBODY, read_network)
    strip_domain: bool = setting(True, read_yes_or_no)
    hold_message: str = setting("", read_message)
    reject_message: str = setting("", read_message)
    always_allow: frozenset[str] = setting(frozenset(), read_address)
    whitelist: UserList = setting(NOBODY, read_list_entry)
    blacklist: UserList = setting(NOBODY, read_list_entry)
    whitelist_days: tuple[int, int] = setting((1, 5), read_range(1, 7, "1-5"))
    whitelist_hours: tuple[int, int] = setting((7, 19), read_range(0, 24, "7-19"))
    keep_days: int = setting(7, read_number(2, 36_500))
    notify: str = setting("", read_address)
    notify_from: str = setting("", read_address)
    notify_server: tuple[tuple[str, int | None], ...] = setting((("127.0.0.1", 25),), read_mail_servers)
    dbhost: tuple[tuple[str, int | None], ...] = setting((), read_servers, restart=True)
    dbport: int = setting(3306, read_number(1, 65535), restart=True)
    dbname: str = setting("", str, restart=True)
    dbuser: str = setting("", str, restart=True)
    dbpass: str = setting("", str, restart=True, secret=True)
    policy_table: str = setting("events", read_table, restart=True)
    statedir: str = setting("", str, restart=True)

    @classmethod
    def from_file(cls, path: str) -> Settings:
        """Read `path`; raises SettingsError, which names file, line and remedy.

        Lines of key=value.  `#` starts a comment only at the start of a line, and quotes are literal:
        passwords contain both.
        """
        given: dict[str, list[tuple[int, Any]]] = {}  # of each key the numbers of its lines, with the values
        for number, line in enumerate(read_lines(path), start=1):
            if not line or line.startswith("#"):
                continue
            try:
                key, value = cls._read_line(line)
                if key in given and key not in REPEATED:
                    raise ValueError(f"{key}= was given in line {given[key][0][0]} already; keep one of them")
            except ValueError as error:
                raise SettingsError(f"{path}:{number}: {printable(str(error))}") from error
            given.setdefault(key, []).append((number, value))
        return cls._put_together(path, given)

    @classmethod
    def _put_together(cls, path: str, given: dict[str, list[tuple[int, Any]]]) -> Settings:
        """Return the settings, unless one of them needs or forbids another."""
        values = {key: lines[0][1] for key, lines in given.items() if key not in REPEATED}
        repeated = {key: [value for _, value in given.get(key, [])] for key in REPEATED}
        database = [key for key in given if key.startswith("db")]
        for key in ("dbname", "dbuser"):
            if database and key not in values:
                raise SettingsError(
                    f"{path}:{given[database[0]][0][0]}: {database[0]}= needs {key}= too;"
                    " add it, or remove every db... line to use the embedded store"
                )
        if database:
            values.setdefault("dbhost", (("127.0.0.1", None),))
        settings = cls(
            **values,
            trusted_network=UserList(repeated["trusted_network"]),
            always_allow=frozenset(repeated["always_allow"]),
            whitelist=UserList(repeated["whitelist"]),
            blacklist=UserList(repeated["blacklist"]),
        )
        if 0 < settings.rejectquota < settings.defaultquota:
            raise SettingsError(
                f"{path}:{given['rejectquota'][0][0]}: rejectquota={settings.rejectquota} is below"
                f" defaultquota={settings.defaultquota}; mail is held first, then refused"
            )
        quota: dict[str, Limits] = {}
        for number, (login, day, hour) in given.get("quota", []):
            login = login_of(login, settings.strip_domain)
            if login in quota:
                raise SettingsError(f"{path}:{number}: {printable(login)} has a quota= already; keep one of them")
            if hour is None:
                hour = settings.hourquota if day < NEVER else 0
            reject_at = 2 * day if 0 < day < NEVER else NEVER  # 0 is there to hold all mail, not to refuse it
            quota[login] = Limits(day, reject_at, hour or NEVER)
        return dataclasses.replace(settings, quota=quota)

    @classmethod
    def _read_line(cls, line: str) -> tuple[str, Any]:
        readers = {field.name: field.metadata["read"] for field in dataclasses.fields(cls)}
        before, equals, text = (part.strip() for part in line.partition("="))
        key = before.split()[0] if before else "''"  # no more of it: it may be a password
        if key not in readers:
            close = difflib.get_close_matches(key.lower(), readers, n=1)
            hint = f"did you mean {close[0]}=?" if close else f"known are {', '.join(readers)}"
            raise ValueError(f"unknown setting {key}; {hint}")
        if not equals or key != before:
            raise ValueError(f"no '=' after {key}; write {key}=VALUE")
        if not text and key != "dbpass":
            raise ValueError(f"{key}= has no value; give one, or remove the line")
        if not text.isprintable():  # nor are the stand-ins for bytes that are not UTF-8
            raise ValueError(f"{key}= has a control character or is not UTF-8; type it again")
        try:
            return key, readers[key](text)
        except ValueError as error:
            raise ValueError(f"{key}={text}: {error}") from error

    @functools.cached_property
    def everybody(self) -> Limits:
        """The limits of a login without a quota of its own."""
        return Limits(self.defaultquota, self.rejectquota or 2 * self.defaultquota, self.hourquota or NEVER)

    def limits_of(self, login: str) -> Limits:
        """Return the limits of a login."""
        return self.quota.get(login, self.everybody)

    def listens_on(self) -> str:
        """Return the address as Postfix spells it."""
        if self.bind.startswith("/"):
            return f"unix:{self.bind}"
        return f"inet:[{self.bind}]:{self.port}" if ":" in self.bind else f"inet:{self.bind}:{self.port}"

    def differences(self, other: Settings) -> list[str]:
        """Return the names of the settings that need a restart and differ."""
        restart = [field.name for field in dataclasses.fields(self) if field.metadata["restart"]]
        return [name for name in restart if getattr(self, name) != getattr(other, name)]

    def state_file(self, name: str) -> str:
        """Return the path of `name` in statedir, $STATE_DIRECTORY, /var/lib/policyd or the current directory."""
        directory = self.statedir or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        if not directory:
            directory = "/var/lib/policyd" if os.access("/var/lib/policyd", os.W_OK) else os.getcwd()
        return os.path.join(directory, name)


# ---- protocol: Postfix's SMTPD_POLICY_README, and nothing of storage ----------------------------------


class ProtocolError(Exception):
    """The peer does not speak the policy protocol; it gets no answer, as the document asks."""


class PolicyRequest(NamedTuple):
    """What policyd wants to know of one request, named as Postfix names it.  (A tuple: it is made quickly.)"""

    protocol_state: str
    instance: str
    queue_id: str
    sasl_username: str
    sender: str
    client_address: str
    recipient: str  # empty when there are several
    recipient_count: int  # 0 outside DATA and END-OF-MESSAGE


def parse_request(block: bytes) -> PolicyRequest:
    """Return the request whose lines, the empty one included, are `block`; raises ProtocolError.

    Unknown attributes are ignored, of an attribute given twice the last one counts, and a missing one is
    as good as an empty one.  A value may hold any byte but NUL and newline: what is not UTF-8 is escaped.
    """
    text = block.decode("utf-8", "backslashreplace")
    if "\0" in text:
        raise ProtocolError("a NUL byte")
    try:
        attributes = dict([line.split("=", 1) for line in text.split("\n")[:-2]])
    except ValueError:
        raise ProtocolError("a line without '='") from None
    if attributes.get("request") != "smtpd_access_policy":
        raise ProtocolError("no request=smtpd_access_policy")
    count = attributes.get("recipient_count", "0")
    if not (count.isascii() and count.isdigit() and len(count) <= 6):
        raise ProtocolError(f"recipient_count={count[:80]} is not 1 to 6 digits")
    value = attributes.get
    return PolicyRequest(
        protocol_state=value("protocol_state", ""),
        instance=value("instance", ""),
        queue_id=value("queue_id", ""),
        sasl_username=value("sasl_username", ""),
        sender=value("sender", ""),
        client_address=value("client_address", ""),
        recipient=value("recipient", ""),
        recipient_count=int(count),
    )


def read_request(readline: Callable[[int], bytes]) -> PolicyRequest | None:
    """Read one request, or return None when the peer ends before its empty line; raises ProtocolError."""
    lines: list[bytes] = []
    size = 0
    while (line := readline(MAX_LINE + 1)) != b"\n":
        size += len(line)
        if line[-1:] != b"\n":
            if len(line) <= MAX_LINE:
                return None
            raise ProtocolError(f"a line longer than {MAX_LINE} bytes")
        if size > MAX_REQUEST:
            raise ProtocolError(f"a request longer than {MAX_REQUEST} bytes")
        if b"=" not in line:
            raise ProtocolError("a line without '='")
        lines.append(line)
    return parse_request(b"".join(lines) + b"\n")


# ---- decision: numbers, hours and networks; no clock, no socket, no SQL ------------------------------------------

DUNNO = "DUNNO"  # not OK: later restrictions still run (access(5))
HOLD_BLACKLISTED = "HOLD blacklisted"
HOLD = "HOLD quota exceeded"
HOLD_HOUR = "HOLD hour quota exceeded"
HOLD_NETWORKS = "HOLD too many networks"
REJECT = "REJECT max quota exceeded"


def decide(
    recipients: int,
    hold_at: int,
    reject_at: int,
    hour_quota: int = NEVER,
    of_hour: int = 0,
    networks: int = 0,
    max_networks: int = NEVER,
) -> str:
    """Return the access(5) action for a user who has reached `recipients` in 24 h.

    `recipients` counts the message being asked about.  Reaching a limit is over it; of networks one more is.
    """
    if recipients >= reject_at:
        return REJECT
    if recipients >= hold_at:
        return HOLD
    if of_hour >= hour_quota:
        return HOLD_HOUR
    if networks > max_networks:
        return HOLD_NETWORKS
    return DUNNO


@functools.lru_cache(maxsize=10_000)
def network_of(client_address: str, trusted: UserList) -> str | None:
    """Return the /24 (IPv4) or /48 (IPv6) of a client; None if it is trusted, or "unknown"."""
    try:
        address = ipaddress.ip_address(client_address)
    except ValueError:
        return None
    if trusted.holds((), client_address):
        return None
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))


def networks_of(addresses: Iterable[str], trusted: UserList) -> set[str]:
    """Return the networks that clients with these addresses are in, without the trusted ones."""
    return {network for address in addresses if (network := network_of(address, trusted))}


def in_office_hours(now: time.struct_time, days: tuple[int, int], hours: tuple[int, int]) -> bool:
    """Tell whether the local time `now` lies on these days (1 is Monday) and in these hours, the end excluded."""
    return days[0] <= now.tm_wday + 1 <= days[1] and hours[0] <= now.tm_hour < hours[1]


# ---- storage: events in, sums out; two stores behind one interface --------------------------------------


class RepositoryUnavailable(Exception):
    """The store cannot be used now, for whatever reason: time or somebody else has to mend it."""


class Event(NamedTuple):
    """One message of one user: the columns of the table, to which the store adds `ts` by its own clock."""

    sasl_username: str
    sender: str
    client_address: str
    recipient_count: int


class Trace(NamedTuple):
    """What a login sent with one sender from one client address."""

    client_address: str
    sender: str
    messages: int
    recipients: int
    first: str  # local time, YYYY-MM-DD HH:MM:SS
    last: str


class Usage(NamedTuple):
    """What a login has used up, the message in question included."""

    recipients: int  # of the last 24 h
    of_hour: int = 0  # recipients of the last hour, or of 24 h while these are few
    addresses: frozenset[str] = frozenset()  # of the clients within the window, or two of a network if all are in it

    def plus(self, other: Usage) -> Usage:
        """Return what two stores know of one login."""
        return Usage(
            self.recipients + other.recipients, self.of_hour + other.of_hour, self.addresses | other.addresses
        )


SAME_NETWORK = re.compile(r"[^.:]+[.:][^.:]+[.:][^.:]*[.:]")  # with these letters begin all addresses of one /24 or /48


def in_one_network(lowest: str, highest: str) -> bool:
    """Tell whether all client addresses between these two, as texts, are certainly in one network."""
    begin = SAME_NETWORK.match(lowest)
    return lowest == highest or (begin is not None and highest.startswith(begin[0]))


class Reach(NamedTuple):
    """How far a login's usage matters."""

    rows: int  # of its newest events with recipients; older ones may be left out
    hour_from: int = NEVER  # recipients of 24 h from which on those of the last hour are looked at

    def join(self, other: Reach) -> Reach:
        """Return the reach for two logins that a table takes for one."""
        return Reach(max(self.rows, other.rows), min(self.hour_from, other.hour_from))


class Scope(NamedTuple):
    """How far all usages matter."""

    everybody: Reach
    own: dict[str, Reach]  # of logins with a quota of their own
    window_s: int = 0  # in which client addresses matter; 0: they do not

    def of(self, login: str) -> Reach:
        """Return the reach for a login."""
        return self.own.get(login, self.everybody)


class Found(NamedTuple):
    """What a store finds of a login in 24 h; addresses only if they matter, the last two when it looks closely."""

    recipients: Any
    messages: int
    lowest: str | None = None  # client address, as a text
    highest: str | None = None
    of_hour: Any = None
    addresses: str | None = None

    def wants_a_closer_look(self, reach: Reach, scope: Scope) -> bool:
        """Tell whether the hour may be over its quota, or the clients be in several networks."""
        in_one = not scope.window_s or in_one_network(self.lowest or "", self.highest or "")
        return (self.recipients or 0) >= reach.hour_from or not in_one

    def usage(self) -> Usage:
        """Return what was found; without a closer look the bounds that decide the same."""
        recipients = int(self.recipients or 0)
        if self.of_hour is None:
            extremes = frozenset((self.lowest, self.highest)) if self.lowest and self.highest else frozenset[str]()
            return Usage(recipients, recipients, extremes)
        return Usage(recipients, int(self.of_hour), frozenset(filter(None, (self.addresses or "").split(","))))


class Repository(Protocol):
    """What the rest asks of a store; `deadline` is in monotonic seconds.  All raise RepositoryUnavailable."""

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        """Commit `events` as of now, or as of `times` (ms since 1970); return the positions of those refused."""

    def sum_recipients(self, events: Sequence[Event], scope: Scope, deadline: float) -> list[Usage]:
        """Return, for each of the `events` just inserted, what its login had used with it.

        Addresses are those of all `events`: they came in the same moment.
        """

    def traces(self, login: str) -> list[Trace]:
        """Return what a login did in the last 24 h, the most recipients first.  For any thread."""

    def check(self, deadline: float) -> str:
        """Return one line on the store, once it has been seen that events can be inserted."""

    def purge(self, keep_days: int) -> int:
        """Delete the events older than `keep_days`, a slice at a time; return their number.  For any thread."""

    def init(self) -> str:
        """Create or upgrade the table; return one line on what was done."""


def run_up(logins: Sequence[str], events: Sequence[Event], totals: dict[str, Usage]) -> list[Usage]:
    """Return the usages after each event, given the `totals` of the logins after the last one."""
    if len(totals) == len(logins):
        return list(map(totals.__getitem__, logins))  # each login once
    left = dict(totals)
    usages = []
    for login, event in zip(reversed(logins), reversed(events)):
        recipients, of_hour, addresses = usage = left[login]
        usages.append(usage)
        left[login] = Usage(recipients - event.recipient_count, of_hour - event.recipient_count, addresses)
    return usages[::-1]


def set_deadline(connection: Connection[Any], deadline: float) -> None:
    """Let no read or write of `connection` wait beyond `deadline`; PyMySQL has such limits at connect only."""
    patience = max(0.01, deadline - time.monotonic())
    vars(connection).update(_read_timeout=patience, _write_timeout=patience)


def close_quietly(connection: Connection[Any]) -> None:
    """Close a connection that may be broken already."""
    with contextlib.suppress(Exception):
        connection.close()


class ConnectionPool:
    """PyMySQL connections to the first server of `dbhost` that answers.  Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servers = collections.deque(settings.dbhost)
        self._idle: collections.deque[Connection[Any]] = collections.deque()

    @contextlib.contextmanager
    def connection(self, deadline: float) -> Iterator[Connection[Any]]:
        """Lend a connection whose every wait ends at `deadline`; one in which anything failed is thrown away."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self.connect(deadline, STATEMENT_TIMEOUT_S)
        set_deadline(connection, deadline)
        try:
            yield connection
        except (pymysql.DataError, pymysql.IntegrityError):
            self._idle.append(connection)  # a row was refused, the connection is sound
            raise
        except BaseException:
            close_quietly(connection)
            while self._idle:  # they go to the same server
                close_quietly(self._idle.pop())
            raise
        self._idle.append(connection)

    def connect(self, deadline: float, statement_timeout_s: int) -> Connection[Any]:
        """Connect to the first server that answers (0: statements may take their time)."""
        failures = []
        for server in tuple(self._servers):
            host, port = server
            patience = min(CONNECT_TIMEOUT_S, deadline - time.monotonic())
            socket_path = host if host.startswith("/") else None
            try:
                if patience <= 0:
                    raise TimeoutError("no time left")
                return pymysql.connect(
                    host="localhost" if socket_path else host,
                    port=port or self._settings.dbport,
                    unix_socket=socket_path,
                    user=self._settings.dbuser,
                    password=self._settings.dbpass,
                    database=self._settings.dbname,
                    charset="utf8mb4",
                    autocommit=True,  # committed before it is summed, or two relays would miss each other
                    connect_timeout=patience,
                    read_timeout=patience,
                    write_timeout=patience,
                    init_command=f"SET SESSION max_statement_time={statement_timeout_s}, group_concat_max_len=1048576",
                )
            except Exception as error:  # what answers there may speak anything, and PyMySQL trip over it anyhow
                failures.append(f"{host}: {error}")
                if self._servers[0] == server:  # else another thread has passed it over
                    self._servers.rotate(-1)
        raise RepositoryUnavailable("; ".join(failures))

    def pass_over(self) -> None:
        """Begin with the next server from now on: this one answers, but does not do its work."""
        self._servers.rotate(-1)


CODECS = {"utf8mb4": "utf-8", "latin1": "cp1252"}  # MariaDB's latin1 is cp1252; of the others we use ASCII


def fit(text: str, column: tuple[int, str]) -> str:
    """Return `text` as a CHAR column gives it back: escaped, cut, and without spaces at its end."""
    width, codec = column
    if text.isascii() and len(text) <= width and not text.endswith(" "):
        return text
    return text.encode(codec, "backslashreplace").decode(codec)[:width].rstrip(" ")


class Table(NamedTuple):
    """What the server says of the table."""

    columns: tuple[tuple[int, str], ...]  # width in characters and Python codec of the three texts
    force_index: str  # FORCE INDEX (...), if there is one that begins (sasl_username, ts
    login: str  # the expression by which two logins are equal only if they are

    def fit(self, event: Event) -> tuple[str | int, ...]:
        """Return `event` in the form in which the table keeps it, so that none is refused for not fitting."""
        return (*map(fit, event[:3], self.columns), event.recipient_count)


def query(connection: Connection[Any], statement: str, arguments: Sequence[object] = ()) -> list[Any]:
    """Run one statement and return its rows."""
    with connection.cursor() as cursor:
        cursor.execute(statement, arguments or None)
        return list(cursor.fetchall())


def retries(error: Exception) -> int:
    """Return how often a statement that ended with `error` is worth another try."""
    if isinstance(error.__context__, socket.timeout):
        return 0  # it may be at work still, and once more would be twice
    if error.args[:1] in [(1213,), (1205,), (1020,)]:  # deadlock or Galera conflict, lock wait, record has changed
        return RACE_RETRIES
    # server has gone away, lost connection: found closed
    return int(isinstance(error, pymysql.InterfaceError) or error.args[:1] in [(2006,), (2013,)])


class MariaDBRepository:
    """The events in a MariaDB table: that of scripts/schema.sql, or go-policyd's as it is."""

    CREATE = """CREATE TABLE IF NOT EXISTS `{table}` (
  `ts` DATETIME(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3),
  `sasl_username` VARCHAR(255) NOT NULL DEFAULT '',
  `sender` VARCHAR(255) NOT NULL DEFAULT '',
  `client_address` VARCHAR(80) NOT NULL DEFAULT '',
  `recipient_count` INT DEFAULT NULL,
  PRIMARY KEY (`ts`, `sasl_username`, `sender`, `client_address`),
  KEY `login_ts` (`sasl_username`, `ts`, `recipient_count`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin"""  # the same as scripts/schema.sql
    UPGRADE = """ALTER TABLE `{table}`
  MODIFY `ts` DATETIME(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3),
  MODIFY `sasl_username` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
  MODIFY `sender` VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
  MODIFY `client_address` VARCHAR(80) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
  MODIFY `recipient_count` INT DEFAULT NULL,
  DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin"""
    ADD_KEY = ", ADD KEY `login_ts` (`sasl_username`, `ts`, `recipient_count`)"
    COLUMNS = (
        "SELECT LOWER(column_name), character_maximum_length, character_set_name, collation_name"
        " FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = %s"
    )
    INDEXES = (
        "SELECT index_name FROM information_schema.statistics"
        " WHERE table_schema = DATABASE() AND table_name = %s"
        " AND (seq_in_index, column_name) IN ((1, 'sasl_username'), (2, 'ts'))"
        " GROUP BY index_name HAVING COUNT(*) = 2"
    )
    INSERT = (
        "INSERT INTO `{table}` (ts, sasl_username, sender, client_address, recipient_count) {rows}"
        " ON DUPLICATE KEY UPDATE"  # two messages of one millisecond add up
        " recipient_count = COALESCE(recipient_count, 0) + VALUES(recipient_count),"
        " ts = ts"  # go-policyd's table would move it
    )
    ROW = "(CURRENT_TIMESTAMP(3), %s, %s, %s, %s)"
    ROW_OF_THEN = "(FROM_UNIXTIME(%s / 1000), %s, %s, %s, %s)"
    NO_ROW = "SELECT CURRENT_TIMESTAMP(3), '', '', '', 0 FROM DUAL WHERE FALSE"
    DAY = "ts > CURRENT_TIMESTAMP(3) - INTERVAL 1 DAY"
    BINARY = "CONVERT(sasl_username USING utf8mb4) COLLATE utf8mb4_bin"  # equal only if it is
    FOUND = "SUM(recipient_count), COUNT(*)"
    EXTREMES = "MIN(client_address), MAX(client_address)"
    LATELY = (
        "COALESCE(SUM(IF(ts > CURRENT_TIMESTAMP(3) - INTERVAL 1 HOUR, recipient_count, 0)), 0),"
        " GROUP_CONCAT(DISTINCT IF(ts > CURRENT_TIMESTAMP(3) - INTERVAL {window_s} SECOND, client_address, NULL))"
    )
    SUM = (  # of many logins at once; the column's collation may find more of them than were asked for
        "SELECT {login} AS login, {found} FROM `{table}` {index}"
        f" WHERE sasl_username IN ({{logins}}) AND {DAY} GROUP BY login"
    )
    CLOSER_LOOK = (  # beside it: at those rows only that the hour and the window have
        "SELECT {login} AS login, NULL, NULL, NULL, NULL, {lately} FROM `{table}` {index}"
        " WHERE sasl_username IN ({logins}) AND ts > CURRENT_TIMESTAMP(3) - INTERVAL {span_s} SECOND"
        " AND recipient_count > 0 GROUP BY login"
    )
    BOUNDED_SUM = (  # of one login's newest rows, so that a long history costs no more than a short one
        "SELECT %s, {found} FROM (SELECT ts, client_address, recipient_count FROM `{table}` {index}"
        f" WHERE sasl_username = %s AND {{login}} = %s AND {DAY} AND recipient_count > 0"
        " ORDER BY ts DESC LIMIT %s) AS newest"
    )
    TRACES = (
        "SELECT client_address, sender, COUNT(*), CAST(COALESCE(SUM(recipient_count), 0) AS INT) AS recipients,"
        " DATE_FORMAT(MIN(ts), '%%Y-%%m-%%d %%T'), DATE_FORMAT(MAX(ts), '%%Y-%%m-%%d %%T') FROM `{table}` {index}"
        f" WHERE sasl_username = %s AND {{login}} = %s AND {DAY}"
        " GROUP BY client_address, sender ORDER BY recipients DESC, client_address, sender LIMIT %s"
    )
    PURGE = "DELETE FROM `{table}` WHERE ts < CURRENT_TIMESTAMP(3) - INTERVAL %s DAY ORDER BY ts LIMIT %s"

    def __init__(self, settings: Settings) -> None:
        global pymysql
        import pymysql  # here: the embedded store needs nothing but Python

        self._pool = ConnectionPool(settings)
        self._name = settings.policy_table
        self._where = f"table {settings.policy_table} of MariaDB database {settings.dbname}"
        self._table: tuple[Table, float] | None = None  # as last seen, and when
        self._long: set[str] = set()  # the logins whose history was last seen to be longer than needed
        self._close: set[str] = set()  # those that last needed a closer look

    def __str__(self) -> str:
        return self._where

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        """See Repository."""
        try:
            self._run(lambda connection: self._insert(connection, events, times), deadline)
            return set()
        except (pymysql.DataError, pymysql.IntegrityError) as error:
            if len(events) == 1:
                log.error(f"ERROR while UPDATING db: {error}; not counted: {'/'.join(map(str, events[0]))}")
                return {0}
        half = len(events) // 2  # closing in on the guilty ones: a commit for each row would take too long
        refused = self.insert(events[:half], deadline, times and times[:half])
        return refused | {half + n for n in self.insert(events[half:], deadline, times and times[half:])}

    def _insert(self, connection: Connection[Any], events: Sequence[Event], times: Sequence[int] | None) -> None:
        table = self._look(connection)
        row = self.ROW_OF_THEN if times else self.ROW
        statement = self.INSERT.format(table=self._name, rows=f"VALUES {', '.join([row] * len(events))}")
        values = [table.fit(event) for event in events]
        if times:
            values = [(ts, *event) for ts, event in zip(times, values)]
        query(connection, statement, [value for event in values for value in event])

    def sum_recipients(self, events: Sequence[Event], scope: Scope, deadline: float) -> list[Usage]:
        """See Repository."""
        return self._run(lambda connection: self._sum(connection, events, scope, deadline), deadline)

    def _sum(
        self, connection: Connection[Any], events: Sequence[Event], scope: Scope, deadline: float
    ) -> list[Usage]:
        table = self._look(connection)
        logins = [fit(event.sasl_username, table.columns[0]) for event in events]
        reaches: dict[str, Reach] = {}
        for login, event in zip(logins, events):
            reach, other = scope.of(event.sasl_username), reaches.get(login)
            reaches[login] = reach if other is None else reach.join(other)  # an old table cuts several logins to one
        totals = dict.fromkeys(logins, Usage(0))
        asked = set(logins)
        while asked:  # once, and again for those that turn out to need a closer look
            set_deadline(connection, deadline)
            close = asked & self._close
            found: dict[str, Found] = {}
            lately: dict[str, list[Any]] = {}
            for login, *row in query(connection, *self._question(table, asked, close, reaches, scope)):
                if row[1] is None:
                    lately[login.rstrip(" ")] = row[4:]
                else:
                    found[login.rstrip(" ")] = Found(*row)
            asked &= found.keys()
            for login in tuple(asked):
                look = found[login]
                if login in close and look.of_hour is None:
                    of_hour, addresses = lately.get(login, (0, None))
                    look = look._replace(of_hour=of_hour, addresses=addresses)
                totals[login] = look.usage()
                (self._long.add if look.messages >= reaches[login].rows else self._long.discard)(login)
                is_close = look.wants_a_closer_look(reaches[login], scope)
                (self._close.add if is_close else self._close.discard)(login)
                if not is_close or login in close:
                    asked.discard(login)
        return run_up(logins, events, totals)

    def _question(
        self, table: Table, logins: set[str], close: set[str], reaches: dict[str, Reach], scope: Scope
    ) -> tuple[str, list[object]]:
        """Return the statement that asks for `logins`, with a closer look at some, and its arguments."""
        found = [self.FOUND]  # no column that is not needed: the driver takes its time for each
        if scope.window_s or close:
            found.append(self.EXTREMES if scope.window_s else "NULL, NULL")
        lately = self.LATELY.format(window_s=scope.window_s)
        found_closely = ", ".join([*found, lately])
        words = {
            "table": self._name, "index": table.force_index, "login": table.login, "lately": lately,
            "span_s": max(HOUR_S, scope.window_s), "found": ", ".join([*found, "NULL, NULL"] if close else found),
        }
        parts: list[str] = []
        arguments: list[object] = []
        bounded = logins & self._long if table.force_index else set()
        for login in bounded:
            parts.append(self.BOUNDED_SUM.format(**{**words, "found": found_closely} if login in close else words))
            arguments += [login, login, login, reaches[login].rows]
        for statement, group in ((self.SUM, logins - bounded), (self.CLOSER_LOOK, close - bounded)):
            if group:
                parts.append(statement.format(logins=", ".join(["%s"] * len(group)), **words))
                arguments += group
        return " UNION ALL ".join(parts), arguments

    def traces(self, login: str) -> list[Trace]:
        """See Repository."""
        with self._patient_connection(TRACES_TIMEOUT_S) as connection:
            table = self._look(connection)
            login = fit(login, table.columns[0])
            statement = self.TRACES.format(table=self._name, index=table.force_index, login=table.login)
            return [Trace(*row) for row in query(connection, statement, (login, login, MAILED_TRACES))]

    def check(self, deadline: float) -> str:
        """See Repository."""

        def look(connection: Connection[Any]) -> Table:
            self._table = None
            table = self._look(connection)
            query(connection, self.INSERT.format(table=self._name, rows=self.NO_ROW))
            return table

        table = self._run(look, deadline)
        found = f"{self._where}, logins of up to {table.columns[0][0]} characters"
        if table.force_index:
            return f"{found}, index on (sasl_username, ts)"
        found += ", NO index on (sasl_username, ts): slow when it is large; run policyd --init-db"
        log.warning(found)
        return found

    def purge(self, keep_days: int) -> int:
        """See Repository."""
        deleted = 0
        statement = self.PURGE.format(table=self._name)
        with self._patient_connection() as connection, connection.cursor() as cursor:
            while cursor.execute(statement, (keep_days, PURGE_SLICE)):
                deleted += cursor.rowcount
        return deleted

    def init(self) -> str:
        """See Repository."""
        show = f"SHOW CREATE TABLE `{self._name}`"
        with self._patient_connection() as connection:
            if not query(connection, self.COLUMNS, [self._name]):
                query(connection, self.CREATE.format(table=self._name))
                return f"created {self._where}"
            before = query(connection, show)
            key = "" if query(connection, self.INDEXES, [self._name]) else self.ADD_KEY
            query(connection, self.UPGRADE.format(table=self._name) + key)
            if query(connection, show) == before:
                return f"{self._where} is up to date"
            return f"upgraded {self._where}: wide columns of any character, index on (sasl_username, ts)"

    def _look(self, connection: Connection[Any]) -> Table:
        """Return what is known of the table, looked at anew every minute: it may be upgraded under us."""
        seen = self._table
        if seen and time.monotonic() - seen[1] < TABLE_LOOK_S:
            return seen[0]
        columns = {
            name: ((width, CODECS.get(charset, "ascii")), collation)
            for name, width, charset, collation in query(connection, self.COLUMNS, [self._name])
        }
        missing = {"ts", *Event._fields} - set(columns)
        if not columns:
            raise RepositoryUnavailable(f"there is no {self._where}; create it with policyd --init-db")
        if missing:
            raise RepositoryUnavailable(f"{self._where} has no column {' and no '.join(sorted(missing))}")
        indexes = query(connection, self.INDEXES, [self._name])
        table = Table(
            columns=tuple(columns[name][0] for name in Event._fields[:3]),
            force_index=f"FORCE INDEX (`{indexes[0][0]}`)" if indexes else "",
            login="sasl_username" if columns["sasl_username"][1] == "utf8mb4_bin" else self.BINARY,
        )
        self._table = table, time.monotonic()
        return table

    def _run(self, work: Callable[[Connection[Any]], T], deadline: float) -> T:
        """Do `work` with a connection of the pool, and again where that is safe and promising.

        A row refused for its own sake passes as DataError or IntegrityError.  Every other error of the driver,
        whatever its class, means that the store cannot be used: a joining Galera node, a read-only server, ...
        """
        tried = 0
        while True:
            try:
                with self._pool.connection(deadline) as connection:
                    return work(connection)
            except (pymysql.DataError, pymysql.IntegrityError):
                raise
            except (pymysql.MySQLError, RepositoryUnavailable) as error:
                tried += 1
                if tried > retries(error):
                    self._pool.pass_over()
                    raise RepositoryUnavailable(str(error)) from error

    @contextlib.contextmanager
    def _patient_connection(self, patience_s: float = DAY_S) -> Iterator[Connection[Any]]:
        """A connection of its own, for statements that take their time."""
        connection = self._pool.connect(time.monotonic() + patience_s, statement_timeout_s=0)
        set_deadline(connection, time.monotonic() + patience_s)
        try:
            yield connection
        except pymysql.MySQLError as error:
            raise RepositoryUnavailable(str(error)) from error
        finally:
            close_quietly(connection)


class SQLiteRepository:
    """The events in a file of our own: for a single relay without a database server."""

    SCHEMA = """
        CREATE TABLE IF NOT EXISTS events (
            ts INTEGER NOT NULL, -- milliseconds since 1970, UTC
            sasl_username TEXT NOT NULL,
            sender TEXT NOT NULL,
            client_address TEXT NOT NULL,
            recipient_count INTEGER
        );
        CREATE INDEX IF NOT EXISTS login_ts ON events (sasl_username, ts, recipient_count, client_address);
    """
    INSERT = (
        "INSERT INTO events (ts, sasl_username, sender, client_address, recipient_count) VALUES (?, ?, ?, ?, ?)"
    )
    FOUND = "sum(recipient_count), count(*), {extremes}"
    EXTREMES = "min(client_address), max(client_address)"
    FOUND_CLOSELY = (
        f"{FOUND}, sum(recipient_count * (ts > :hour)),"
        " group_concat(DISTINCT CASE WHEN ts > :window THEN client_address END)"
    )
    SUM = "SELECT {found} FROM events WHERE sasl_username = :login AND ts > :day AND recipient_count > 0"
    BOUNDED_SUM = (
        "SELECT {found} FROM (SELECT ts, client_address, recipient_count FROM events"
        " WHERE sasl_username = :login AND ts > :day AND recipient_count > 0 ORDER BY ts DESC LIMIT :rows)"
    )
    TRACES = (
        "SELECT client_address, sender, count(*), coalesce(sum(recipient_count), 0) AS recipients,"
        " datetime(min(ts) / 1000, 'unixepoch', 'localtime'), datetime(max(ts) / 1000, 'unixepoch', 'localtime')"
        " FROM events WHERE sasl_username = ? AND ts > ?"
        " GROUP BY client_address, sender ORDER BY recipients DESC, client_address, sender LIMIT ?"
    )
    WRITE = "PRAGMA user_version = 1"  # the least that can be written: it finds a full disk
    OLD = "SELECT rowid FROM events WHERE ts < ? LIMIT ?"
    DELETE = "DELETE FROM events WHERE rowid = ?"
    FIRST = (
        "SELECT rowid, ts, sasl_username, sender, client_address, recipient_count FROM events"
        " WHERE rowid > ? ORDER BY rowid LIMIT ?"
    )
    DELETE_FIRST = "DELETE FROM events WHERE rowid <= ?"

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._long: set[str] = set()  # the logins whose history was last seen to be longer than needed
        self._of_thread = threading.local()  # each thread has a connection of its own

    def __str__(self) -> str:
        return f"embedded store {self._path}"

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        """See Repository."""
        times = times or [self._ms_ago(0)] * len(events)
        with self._connection() as connection:
            connection.executemany(self.INSERT, [(ts, *event) for ts, event in zip(times, events)])
        return set()

    def sum_recipients(self, events: Sequence[Event], scope: Scope, deadline: float) -> list[Usage]:
        """See Repository."""
        logins = [event.sasl_username for event in events]
        return run_up(logins, events, self.totals(logins, scope))

    def totals(self, logins: Iterable[str], scope: Scope, closely: bool = False) -> dict[str, Usage]:
        """Return each login's usage; if `closely`, without bounds in place of figures."""
        extremes = self.EXTREMES if scope.window_s else "NULL, NULL"
        looks = [found.format(extremes=extremes) for found in (self.FOUND, self.FOUND_CLOSELY)[closely:]]
        since = {"day": self._ms_ago(DAY_S), "hour": self._ms_ago(HOUR_S), "window": self._ms_ago(scope.window_s)}
        totals = dict.fromkeys(logins, Usage(0))
        with self._connection() as connection:
            for login in totals:
                reach = scope.of(login)
                arguments = {**since, "login": login, "rows": reach.rows}
                statement = self.BOUNDED_SUM if login in self._long else self.SUM
                for look in looks:
                    found = Found(*connection.execute(statement.format(found=look), arguments).fetchone())
                    if not found.wants_a_closer_look(reach, scope):
                        break
                (self._long.add if found.messages >= reach.rows else self._long.discard)(login)
                totals[login] = found.usage()
        return totals

    def traces(self, login: str) -> list[Trace]:
        """See Repository."""
        with self._connection() as connection:
            return [Trace(*row) for row in connection.execute(self.TRACES, (login, self._ms_ago(DAY_S), MAILED_TRACES))]

    def check(self, deadline: float) -> str:
        """See Repository."""
        with self._connection() as connection:
            connection.execute(self.WRITE)
        return str(self)

    def purge(self, keep_days: int) -> int:
        """See Repository."""
        deleted = 0
        while True:
            with self._connection() as connection:
                old = connection.execute(self.OLD, (self._ms_ago(keep_days * DAY_S), PURGE_SLICE)).fetchall()
                connection.executemany(self.DELETE, old)
            deleted += len(old)
            if not old:
                return deleted

    def init(self) -> str:
        """See Repository."""
        return f"{self.check(0)} is ready"

    def first(self, limit: int, after: int = 0) -> list[tuple[int, int, Event]]:
        """Return the first events: row id (those above `after`), time in ms since 1970, event."""
        with self._connection() as connection:
            rows = connection.execute(self.FIRST, (after, limit)).fetchall()
        return [(rowid, ts, Event(*event)) for rowid, ts, *event in rows]

    def delete_first(self, upto: int) -> None:
        """Delete the events up to and with row id `upto`."""
        with self._connection() as connection:
            connection.execute(self.DELETE_FIRST, (upto,))

    def count(self, after: int = 0) -> int:
        """Return the number of events, of those above row id `after`."""
        with self._connection() as connection:
            return int(connection.execute("SELECT COUNT(*) FROM events WHERE rowid > ?", (after,)).fetchone()[0])

    def _ms_ago(self, seconds: int) -> int:
        return int((self._clock() - seconds) * 1000)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, in a transaction: committed at the end, or rolled back and thrown away."""
        try:
            if not hasattr(self._of_thread, "connection"):
                self._of_thread.connection = self._open()
            with self._of_thread.connection as connection:
                yield connection
        except sqlite3.Error as error:
            self._of_thread.__dict__.clear()
            raise RepositoryUnavailable(f"{self._path}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        if os.geteuid() == 0 and not os.path.exists(self._path):  # root's --check: the daemon shall write it, too
            with contextlib.suppress(OSError):
                owner = os.stat(os.path.dirname(self._path))
                os.close(os.open(self._path, os.O_CREAT, 0o600))
                os.chown(self._path, owner.st_uid, owner.st_gid)
        connection = sqlite3.connect(self._path, timeout=1)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what was answered stays counted after a power cut
        connection.executescript(self.SCHEMA)
        return connection


def open_repository(settings: Settings) -> Repository:
    """Return the store that the settings name, without touching it yet."""
    if settings.dbhost:
        return MariaDBRepository(settings)
    return SQLiteRepository(settings.state_file("events.sqlite3"))


# ---- recorder: group commit and outage journal; it knows neither SQL nor Postfix -----------------------------

OnUsage = Callable[[Optional[Usage]], None]
Batch = list[tuple[Event, OnUsage]]


class Journal:
    """Events that the store could not take: in a file, or in memory while no file can be written.

    An event leaves the journal after the store has committed it.  A crash in between, a connection lost in the
    middle of an INSERT, or a frozen server that wakes up may count one slice twice; nothing is counted zero times.
    Only the recorder's thread comes here.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._file = SQLiteRepository(path, clock)
        self._memory = SQLiteRepository(":memory:", clock)
        self._clock = clock
        self._replayed = 0  # row id in the file up to which the store has all, though it could not be deleted
        self._path = path
        self.place = path  # where the last event went

    def look(self) -> int:
        """Return how many events wait; an error in the log says if the file cannot be used."""
        try:
            self._file.check(0)
        except RepositoryUnavailable as error:
            log.error(f"no outage journal: {error}; in an outage events would be counted in memory only")
        return len(self)

    def __len__(self) -> int:
        waiting = self._memory.count()
        with contextlib.suppress(RepositoryUnavailable):
            waiting += self._file.count(self._replayed)
        return waiting

    def insert(self, events: Sequence[Event]) -> None:
        """Keep `events`, as of now."""
        try:
            self._file.insert(events, 0)
            self.place = self._path
            self.save()
        except RepositoryUnavailable as error:
            if self.place != "memory":
                log.error(f"no outage journal: {error}; counting in memory")
                self.place = "memory"
            self._memory.insert(events, 0)

    def save(self) -> int:
        """Move to the file what had to be kept in memory, if that is possible now; return how many events stay."""
        kept = self._memory.first(-1)
        if kept:
            try:
                self._file.insert([event for _, _, event in kept], 0, [ts for _, ts, _ in kept])
                self._memory.delete_first(kept[-1][0])
            except RepositoryUnavailable:
                return len(kept)
        return 0

    def totals(self, logins: Sequence[str], scope: Scope) -> dict[str, Usage]:
        """Return what the journal holds of each login."""
        totals = self._memory.totals(logins, scope, closely=True)
        with contextlib.suppress(RepositoryUnavailable):
            for login, usage in self._file.totals(logins, scope, closely=True).items():
                totals[login] = totals[login].plus(usage)
        return totals

    def replay(self, repository: Repository, deadline: float) -> list[tuple[float, Event]]:
        """Move the oldest slice to `repository`, with its times; return age in s and event; raises as `repository`."""
        slice_: list[tuple[int, int, Event]] = []
        with contextlib.suppress(RepositoryUnavailable):
            slice_ = self._file.first(REPLAY_SLICE, self._replayed)
        store = self._file if slice_ else self._memory
        slice_ = slice_ or self._memory.first(REPLAY_SLICE)
        events = [event for _, _, event in slice_]
        if slice_:
            repository.insert(events, deadline, [ts for _, ts, _ in slice_])
            last = slice_[-1][0]
            try:
                store.delete_first(last)
                last = 0
            except RepositoryUnavailable as error:
                log.error(f"{len(slice_)} events are counted twice until the journal can be written: {error}")
            if store is self._file:
                self._replayed = last
        now = self._clock()
        return [(now - ts / 1000, event) for _, ts, event in slice_]


class LastKnown:
    """The store's own usages as last seen, for the time of an outage: at most a day old, at most 100,000 logins."""

    def __init__(self) -> None:
        self._usages: collections.OrderedDict[str, tuple[Usage, float]] = collections.OrderedDict()

    def put(self, login: str, usage: Usage, now: float) -> None:
        """Remember what was used."""
        self._usages[login] = usage, now
        self._usages.move_to_end(login)
        if len(self._usages) > LAST_KNOWN_SUMS:
            self._usages.popitem(last=False)

    def add(self, events: Iterable[tuple[float, Event]], scope: Scope, now: float) -> None:
        """Let them grow by events of this age in s, which the store has taken since."""
        for age_s, (login, _, client_address, recipients) in events:
            more = Usage(
                recipients if age_s < DAY_S else 0,
                recipients if age_s < HOUR_S else 0,
                frozenset([client_address] if age_s < scope.window_s else []),
            )
            self.put(login, self.get(login, scope, now).plus(more), now)

    def get(self, login: str, scope: Scope, now: float) -> Usage:
        """Return what was used, as far as it is known and not too old."""
        usage, seen = self._usages.get(login, (Usage(0), now))
        age_s = now - seen
        return Usage(
            usage.recipients if age_s < DAY_S else 0,
            usage.of_hour if age_s < HOUR_S else 0,
            usage.addresses if age_s < scope.window_s else frozenset(),
        )


@dataclasses.dataclass
class Outage:
    """From the first failure of the store until the journal is empty again."""

    began: float  # monotonic
    reason: str = ""  # as last logged
    replayed: int = 0  # events
    attempts: int = 0

    def next_delay(self) -> float:
        """Return the seconds until the next look for the store: longer and longer, up to the last of them."""
        self.attempts += 1
        return RETRY_DELAYS_S[min(self.attempts, len(RETRY_DELAYS_S)) - 1]


class Recorder:
    """Records events and tells their sums; one thread commits all events that wait with one statement.

    There is no timer: while one batch is being committed, the next one gathers, and another thread tells the sums of
    the last one.  Within a batch the sums run up in order of arrival, as if the messages had come one by one.

    From the first failure of the store on, events go to the journal, and nobody waits for the store; a sum is then
    the last known one plus the journal's.  Another thread looks for the store.  When it is back, events go there
    again, the journal follows slice by slice between the batches, and until it is empty a sum is both's.
    """

    def __init__(self, repository: Repository, journal: Journal, scope: Scope) -> None:
        self.scope = scope  # replaced whole by a reload
        self._repository = repository
        self._journal = journal
        self._journaled = 0  # events in the journal
        self._last_known = LastKnown()
        self._waiting: queue.SimpleQueue[tuple[Event, OnUsage] | None] = queue.SimpleQueue()  # None: look around
        self._batch_began: float | None = None  # monotonic, like all times here
        self._away = threading.Event()  # set by the recorder's thread, cleared by the one that finds the store again
        self._outage: Outage | None = None  # until the journal is empty
        self._closing = threading.Event()
        self._known: queue.SimpleQueue[tuple[Batch, Sequence[Usage | None]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._work, "recorder"), (self._tell_all, "teller"), (self._find_store, "reconnect"))
        ]

    def start(self) -> None:
        """Start the threads, one of which looks at the store first; events may come at once."""
        for thread in self._threads:
            thread.start()

    def record(self, event: Event, on_usage: OnUsage) -> None:
        """Count `event`, then call on_usage(what its login has used with it), or on_usage(None): it cannot be counted.

        Thread-safe.  `on_usage` is called in a thread of the recorder's, for which all others wait: it must not block.
        """
        self._waiting.put((event, on_usage))

    def longest_wait_s(self) -> float:
        """Return for how long the batch at work has kept its events, and those behind it, waiting.

        Without end, if a thread has died of a fault of ours: only a restart helps, and systemd's watchdog sees to it.
        """
        if not all(thread.is_alive() for thread in self._threads):
            return float("inf")
        began = self._batch_began
        return 0.0 if began is None else time.monotonic() - began

    def down_s(self) -> float | None:
        """Return for how long the store has been away, or None: it is there."""
        outage = self._outage
        return time.monotonic() - outage.began if outage and self._away.is_set() else None

    @property
    def journaled(self) -> int:
        """The number of events in the journal."""
        return self._journaled

    def stop(self, timeout: float) -> None:
        """Commit what waits, in `timeout` seconds at most; what is in the journal's file stays there."""
        self._closing.set()
        self._waiting.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            self._away.set()  # only now: what waited has gone to the store

    def _work(self) -> None:
        self._look_at_stores()
        while not (self._closing.is_set() and self._waiting.empty()):
            batch = self._gather()
            if batch:
                self._batch_began = time.monotonic()
                known = batch, self._commit([event for event, _ in batch])
                self._batch_began = None
                if len(batch) == 1:
                    self._tell(*known)  # nobody else waits: no need to wake the other thread
                else:
                    self._known.put(known)
            if self._replaying():
                self._replay_slice()
        self._known.put(None)
        forgotten = self._journal.save()
        if forgotten:
            log.error(f"{forgotten} events are forgotten: they were counted in memory only")

    def _replaying(self) -> bool:
        return self._outage is not None and not self._away.is_set()

    def _tell_all(self) -> None:
        """Tell the sums of one batch while the store is at work on the next."""
        while (known := self._known.get()) is not None:
            self._tell(*known)

    @staticmethod
    def _tell(batch: Batch, usages: Sequence[Usage | None]) -> None:
        for (_, on_usage), usage in zip(batch, usages):
            try:
                on_usage(usage)
            except Exception:  # a fault of ours must not end this thread, nor keep the client waiting
                log.error(f"internal error: {traceback.format_exc()}")
                with contextlib.suppress(Exception):
                    on_usage(None)

    def _gather(self) -> Batch:
        """Return what waits; wait for it, unless there is something to replay."""
        batch: Batch = []
        with contextlib.suppress(queue.Empty):
            item = self._waiting.get(block=not self._replaying())
            while True:
                if item is not None:
                    batch.append(item)
                if len(batch) == BATCH_EVENTS:
                    break
                item = self._waiting.get_nowait()
        return batch

    def _commit(self, events: list[Event]) -> Sequence[Usage | None]:
        """Return the sums of one batch; None for what the store refused."""
        if not self._away.is_set():
            deadline = time.monotonic() + BATCH_DEADLINE_S
            try:
                refused = self._repository.insert(events, deadline)
            except Exception as error:
                self._begin_outage(error)
            else:
                kept = [event for n, event in enumerate(events) if n not in refused]
                sums = iter(self._usages(kept, deadline))
                return [None if n in refused else next(sums) for n in range(len(events))]
        self._journal.insert(events)
        self._journaled += len(events)
        return self._usages_in_outage(events)

    def _usages(self, events: list[Event], deadline: float) -> list[Usage]:
        """Return the sums of `events`, which the store has taken."""
        now = time.monotonic()
        try:
            sums = self._repository.sum_recipients(events, self.scope, deadline) if events else []
        except Exception as error:
            self._begin_outage(error)
            self._last_known.add([(0.0, event) for event in events], self.scope, now)
            return self._usages_in_outage(events)
        for event, usage in zip(events, sums):
            self._last_known.put(event.sasl_username, usage, now)
        if not self._journaled:
            return sums
        waiting = self._journal.totals([event.sasl_username for event in events], self.scope)
        return [usage.plus(waiting[event.sasl_username]) for event, usage in zip(events, sums)]

    def _usages_in_outage(self, events: list[Event]) -> list[Usage]:
        """Return the last known sums plus the journal's: one of them has `events` already."""
        now = time.monotonic()
        logins = [event.sasl_username for event in events]
        totals = self._journal.totals(logins, self.scope)
        for login in totals:
            totals[login] = totals[login].plus(self._last_known.get(login, self.scope, now))
        return run_up(logins, events, totals)

    def _look_at_stores(self) -> None:
        self._journaled = self._journal.look()
        if self._journaled:
            log.warning(f"{self._journaled} events of an earlier outage wait in the journal")
            self._outage = Outage(time.monotonic())
        try:
            self._repository.check(time.monotonic() + BATCH_DEADLINE_S)
        except Exception as error:
            self._begin_outage(error)

    def _begin_outage(self, error: Exception) -> None:
        """From now on nobody asks the store.  Any other kind of error is a fault of ours: no reason to lose count."""
        reason = str(error) if isinstance(error, RepositoryUnavailable) else traceback.format_exc()
        self._outage = self._outage or Outage(time.monotonic())
        if reason != self._outage.reason:  # once, also of a store that says it is ready and refuses each time
            log.error(f"ERROR while UPDATING db: {reason}; counting in {self._journal.place} until it is back")
            self._outage.reason = reason
        self._away.set()

    def _find_store(self) -> None:
        """In an outage, look for the store until it takes events again."""
        while not self._closing.is_set():
            self._away.wait()
            if self._closing.wait(self._outage.next_delay() if self._outage else 0):
                return
            try:
                self._repository.check(time.monotonic() + BATCH_DEADLINE_S)
            except RepositoryUnavailable:
                continue
            except Exception:  # a fault of ours must not end the search
                log.error(f"internal error: {traceback.format_exc()}")
                continue
            self._away.clear()
            self._waiting.put(None)

    def _replay_slice(self) -> None:
        """Move one slice of the journal to the store; when there is none left, the outage is over."""
        assert self._outage is not None
        try:
            moved = self._journal.replay(self._repository, time.monotonic() + BATCH_DEADLINE_S)
        except Exception as error:
            return self._begin_outage(error)
        self._last_known.add(moved, self.scope, time.monotonic())
        self._outage.replayed += len(moved)
        self._journaled -= len(moved)
        if not moved:
            seconds = time.monotonic() - self._outage.began
            log.error(f"ERROR while UPDATING db: over after {seconds:.0f} s, {self._outage.replayed} events replayed")
            self._journaled, self._outage = 0, None


def purge_daily(repository: Repository, keep_days: Callable[[], int], closing: threading.Event) -> None:
    """Delete what is older than keep_days(), soon after the start and then every day, until `closing`."""
    pause: float = FIRST_PURGE_S
    while not closing.wait(pause):
        days = keep_days()
        try:
            deleted = repository.purge(days)
        except Exception as error:  # whatever it is, tomorrow is another day
            pause = RETRY_PURGE_S
            log.warning(f"old events stay for now: {error}")
        else:
            pause = DAY_S
            log.info(f"purged {deleted} events older than {days} days")


# ---- notices: a mail to a human when a login is held; nobody waits for it -------------------------------------


def replace_file(path: str, text: str, mode: int) -> None:
    """Write a file in such a way that nobody ever reads half of it; raises OSError."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
    os.replace(new, path)


@dataclasses.dataclass
class Case:
    """A login that is being held or refused."""

    login: str
    rule: str  # the answer, and what in the log it follows from: HOLD fanout (11>10)
    began: float  # seconds since 1970
    recipients: int = 0  # of the last 24 h, as last seen
    queue_ids: list[str] = dataclasses.field(default_factory=list)  # of what was held so far
    failing_since: float = 0.0  # monotonic; 0: no mail about it has failed yet

    def headline(self) -> str:
        """Return the case on one line fit for a header: of what a client chose, only harmless letters."""
        login = re.sub("[^A-Za-z0-9._@+-]", "?", self.login)[:64]
        return f"{login} on {os.uname().nodename}: {self.rule}"


def shell_word(text: str) -> str:
    """Return `text` as one word for a shell, in printable ASCII."""
    if text.isascii() and text.isprintable():
        return shlex.quote(text)
    octal = re.sub(b"[^A-Za-z0-9@._+]", lambda byte: b"\\%03o" % ord(byte[0]), text.encode("utf-8", "surrogateescape"))
    return f"\"$(printf '{octal.decode()}')\""


def commands(login: str, settings_file: str) -> dict[str, str]:
    """Return what to type about a login."""
    file = shell_word(os.path.abspath(settings_file))
    options = "" if settings_file == SETTINGS_FILE else f" -c {file}"
    user, held = f"policyd-user.sh{options}", f"policyd-held.sh{options}"
    word = ("-- " if login.startswith("-") or login in ("release", "delete") else "") + shell_word(login)
    block = "(no blacklist= can name this login: lock the account)"
    with contextlib.suppress(ValueError):  # it looks like a network
        if login.isprintable() and login == login.strip() == read_list_entry(login):
            # A line end first: the file's last line may have none.
            block = f"printf '\\n%s\\n' {shell_word(f'blacklist={login}')} >>{file} && systemctl reload policyd"
    return {
        "look": f"{user} {word}",
        "look at what is held": f"{held} {word}",
        "release": f"{held} release --yes {word}",
        "forgive": f"{user} --forgive --yes {word}",
        "delete": f"{held} delete --yes {word}",
        "block": block,
    }


def describe(case: Case, traces: Sequence[Trace] | None, settings_file: str) -> str:
    """Return the text of a mail about one login; `traces` is None when the database is away."""
    recipients = max(case.recipients, sum(trace.recipients for trace in traces or ()))
    lines = [
        f"Mail of {printable(case.login)} has been stopped since {local_time(case.began)}: {case.rule}.",
        f"Recipients of the last 24 hours: {recipients}.",
        f"Held so far: {' '.join(map(printable, case.queue_ids)) or 'nothing'}.",
        "",
    ]
    if traces is None:
        lines += ["From where is not known: the database is away."]
    elif not traces:
        lines += ["Nothing was counted in the last 24 hours."]
    else:
        lines += ["Networks, client addresses and senders, the most recipients first:", ""]
    by_network: dict[str, list[Trace]] = {}
    for trace in traces or ():
        by_network.setdefault(network_of(trace.client_address, NOBODY) or "no network", []).append(trace)
    totals = {network: sum(trace.recipients for trace in those) for network, those in by_network.items()}
    for network, those in sorted(by_network.items(), key=lambda item: -totals[item[0]]):
        lines.append(f"{network}: {totals[network]} recipients")
        lines += [
            f"    {printable(trace.client_address)}: {trace.recipients} recipients, {trace.messages} messages,"
            f" {trace.first} to {trace.last}, <{printable(trace.sender)}>"
            for trace in those
        ]
    if len(traces or ()) == MAILED_TRACES:
        lines.append("... and more")
    do = commands(case.login, settings_file)
    lines += [
        "",
        f"Look:            {do['look']}",
        f"                 {do['look at what is held']}",
        f"An honest user:  {do['release']}",
        f"                 {do['forgive']}",
        f"A thief:         {do['delete']}",
        f"                 {do['block']}",
        "                 and a new password",
        "",
    ]
    return "\n".join(lines)


def post(subject: str, text: str, settings: Settings) -> None:
    """Hand a mail to the first of the mail servers that takes it; raises OSError (smtplib's errors are some)."""
    host = os.uname().nodename
    mail = email.message.EmailMessage()
    mail["From"] = settings.notify_from or f"policyd@{host}"
    mail["To"] = settings.notify
    mail["Subject"] = subject
    mail["Date"] = email.utils.localtime()
    mail["Message-ID"] = email.utils.make_msgid(domain=host)
    mail["Auto-Submitted"] = "auto-generated"
    # As it is where SMTP allows it: readable for postcat, too.
    mail.set_content(text, cte="7bit" if max(map(len, text.splitlines())) < 998 else "quoted-printable")
    failures = []
    for server, port in settings.notify_server:
        try:
            smtp = smtplib.SMTP(server, port or 25, local_hostname=host, timeout=MAIL_TIMEOUT_S)
            with contextlib.closing(smtp):
                smtp.send_message(mail)
                with contextlib.suppress(OSError):  # it has the mail, whatever it says now
                    smtp.quit()
                return
        except (OSError, UnicodeError) as error:
            failures.append(f"{server}: {error}")
    raise OSError("; ".join(failures))


def read_mailed(path: str) -> dict[str, float]:
    """Return who was mailed about in the last 24 h, and when; nobody, if the file cannot tell."""
    now = time.time()
    try:
        with open(path, encoding="utf-8") as file:
            mailed = {login: float(began) for login, began in json.load(file).items()}
    except Exception:  # whatever is in there must not keep us from starting
        return {}
    return {login: began for login, began in mailed.items() if 0 <= now - began < DAY_S}


class Notices:
    """Mails a human when a login is held or refused, the first time in 24 h.  Thread-safe; nobody waits for it."""

    def __init__(self, path: str, repository: Repository, settings: Callable[[], Settings], settings_file: str) -> None:
        self._path = path  # who was mailed about, and when: known also after a restart
        self._repository = repository
        self._settings = settings
        self._settings_file = settings_file
        self._new: queue.SimpleQueue[Case] = queue.SimpleQueue()
        self._mailed = read_mailed(path)
        self._cases = {login: Case(login, "", began) for login, began in self._mailed.items()}  # of the last 24 h
        self._lock = threading.Lock()  # guards _cases
        self._complaint = ""  # the last one logged

    def note(self, login: str, rule: str, recipients: int, held_queue_id: str) -> None:
        """Take note of a message that was held (as `held_queue_id`, if that is not empty) or refused."""
        now = time.time()
        with self._lock:
            case = self._cases.get(login)
            if case is None or not 0 <= now - case.began < DAY_S:  # below 0: the clock was set back
                self._cases = {known: other for known, other in self._cases.items() if now - other.began < DAY_S}
                case = self._cases[login] = Case(login, rule, now)
                self._new.put(case)
            case.recipients = recipients
            if held_queue_id and len(case.queue_ids) < MAILED_QUEUE_IDS:
                case.queue_ids.append(held_queue_id)

    def mail(self, closing: threading.Event) -> None:
        """Mail case by case; beyond so many an hour the rest together when the hour is over.  Ends with `closing`."""
        sent: collections.deque[float] = collections.deque(maxlen=MAILS_AN_HOUR)
        waiting: list[Case] = []
        is_crowd = False  # too many for a mail each
        while not closing.is_set():
            pause = max(0.0, sent[0] + HOUR_S - time.monotonic()) if is_crowd else RETRY_MAIL_S
            with contextlib.suppress(queue.Empty):
                waiting.append(self._new.get(timeout=pause if waiting else None))
            letters = [waiting] if is_crowd else [[case] for case in waiting]
            waiting, is_crowd = [], False
            for cases in letters:
                if len(sent) == MAILS_AN_HOUR and time.monotonic() - sent[0] < HOUR_S:
                    waiting, is_crowd = waiting + cases, True
                elif self._deliver(cases):
                    sent.append(time.monotonic())
                else:
                    waiting += self._not_given_up(cases)

    def _deliver(self, cases: list[Case]) -> bool:
        """Mail about `cases`; tell whether it was possible."""
        settings = self._settings()
        if not settings.notify:  # a reload has switched the mails off
            return False
        try:
            post(*self._letter(cases), settings)
        except Exception as error:
            reason = str(error) if isinstance(error, OSError) else traceback.format_exc()
            if reason != self._complaint:
                self._complaint = reason
                log.warning(f"no notice of {cases[0].headline()}: {reason}; trying again for an hour")
            return False
        self._complaint = ""
        self._remember(cases)
        return True

    def _not_given_up(self, cases: list[Case]) -> list[Case]:
        """Return those that shall be tried again; the others are forgotten: their next message may be the first."""
        now = time.monotonic()
        again = []
        for case in cases:
            case.failing_since = case.failing_since or now
            if now - case.failing_since < GIVE_UP_MAIL_S:
                again.append(case)
                continue
            log.error(f"gave up the notice of {case.headline()}")
            with self._lock:
                self._cases.pop(case.login, None)
        return again

    def _letter(self, cases: list[Case]) -> tuple[str, str]:
        """Return subject and text."""
        if len(cases) > 1:
            looks = [f"{case.headline()}\n    {commands(case.login, self._settings_file)['look']}\n" for case in cases]
            return f"policyd: {len(cases)} more logins", "".join(looks)
        traces = None
        with contextlib.suppress(RepositoryUnavailable):
            traces = self._repository.traces(cases[0].login)
        return f"policyd: {cases[0].headline()}", describe(cases[0], traces, self._settings_file)

    def _remember(self, cases: list[Case]) -> None:
        since = time.time() - DAY_S
        self._mailed.update((case.login, case.began) for case in cases)
        self._mailed = {login: began for login, began in self._mailed.items() if began > since}
        try:
            replace_file(self._path, json.dumps(self._mailed), 0o600)
        except OSError as error:
            log.warning(f"after a restart a second notice may come: {error}")


# ---- server: connections in, answers out ---------------------------------------------------------------------


class RecentAnswers:
    """The last answers, so that a message asked about twice is counted and logged once.  Thread-safe.

    Postfix repeats a request whose answer got lost or was late, and asks at DATA and at END-OF-MESSAGE if told
    to; `instance` is the same then.  `recipient_count` belongs to the key: a refused DATA followed by
    more RCPTs keeps the instance.
    """

    def __init__(self) -> None:
        self._answers: collections.OrderedDict[object, str | None] = collections.OrderedDict()
        self._settled = threading.Condition(threading.Lock())  # guards _answers; notified when an answer is there

    def recall(self, key: object) -> str | None:
        """Return the answer to `key`, waiting for it while it is worked out; or None: the caller shall settle it."""
        with self._settled:
            if key not in self._answers:
                self._answers[key] = None
                return None
            while (answer := self._answers.get(key)) is None:
                self._settled.wait()
            return answer

    def settle(self, key: object, answer: str) -> bool:
        """Remember the answer to `key`; tell whether it is the first."""
        with self._settled:
            if self._answers.get(key) is not None:
                return False
            self._answers[key] = answer
            if len(self._answers) > REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)
            self._settled.notify_all()
            return True


def judge(usage: Usage, limits: Limits, settings: Settings) -> tuple[str, str]:
    """Return the decision, and the rule it follows from as the log has it."""
    networks = len(networks_of(usage.addresses, settings.trusted_network)) if settings.max_networks else 0
    decision = decide(usage.recipients, *limits, usage.of_hour, networks, settings.max_networks or NEVER)
    if decision == DUNNO:
        return DUNNO, ""
    if decision == HOLD_NETWORKS:
        return decision, f"fanout ({networks}>{settings.max_networks})"
    if decision == HOLD_HOUR:
        return decision, f"hourquota ({usage.of_hour}>{limits.hour})"
    limit = limits.reject_in_words() if decision == REJECT else limits.hold_at
    return decision, f"overquota ({usage.recipients}>{limit})"


def answer_of(decision: str, settings: Settings) -> str:
    """Return the access(5) action with which Postfix is told of a decision."""
    if settings.mode == "audit":
        return DUNNO
    action = decision.partition(" ")[0]
    message = {"HOLD": settings.hold_message, "REJECT": settings.reject_message}.get(action)
    return f"{decision}; {message}" if message else decision


def said(decision: str, settings: Settings) -> str:
    """Return the word with which the log line of a decision begins."""
    if settings.mode == "audit":
        return f"would {decision.partition(' ')[0]}"
    return {HOLD_BLACKLISTED: "Holding", REJECT: "REJECTING"}.get(decision, "DEFERRING")


class Figures:
    """What has been answered, for the status line and the file of figures.  Thread-safe."""

    def __init__(self) -> None:
        self.answered = {"DUNNO": 0, "HOLD": 0, "REJECT": 0}  # since the start
        self.spared = {"HOLD": 0, "REJECT": 0}  # what would have been held or refused, were it not for mode=audit
        self._held: dict[str, float] = {}  # when a login was last held or refused, if it was so the last time
        self._times: collections.Counter[int] = collections.Counter()  # this minute's, by the time taken, logarithmic
        self._last_minute = self._times
        self._lock = threading.Lock()  # guards all of them

    def count(self, action: str, seconds: float) -> None:
        """Count an answer and the time it took."""
        slot = math.ceil(STEPS_PER_OCTAVE * math.log2(max(seconds, 1e-6)))
        with self._lock:
            self.answered[action.partition(" ")[0]] += 1
            self._times[slot] += 1

    def note(self, login: str, decision: str, is_audit: bool = False) -> None:
        """Keep in mind whether this login is held or refused now."""
        if decision == DUNNO and login not in self._held:
            return  # without waiting for the lock
        with self._lock:
            if decision == DUNNO:
                self._held.pop(login, None)
                return
            self._held[login] = time.monotonic()
            if is_audit:
                self.spared[decision.partition(" ")[0]] += 1

    def logins_held(self) -> int:
        """Return how many logins were held or refused when they last sent, within 24 h."""
        since = time.monotonic() - DAY_S
        with self._lock:
            self._held = {login: when for login, when in self._held.items() if when > since}
            return len(self._held)

    def turn_minute(self) -> None:
        """Begin the next minute."""
        with self._lock:
            self._last_minute, self._times = self._times, collections.Counter()

    def p99_s(self) -> float:
        """Return the time that 99 % of the answers kept to: of the last minute, if it had any, or of this one."""
        with self._lock:
            times = sorted((self._last_minute or self._times).items())
        beyond = sum(count for _, count in times) // 100
        for slot, count in reversed(times):
            beyond -= count
            if beyond < 0:
                return float(2 ** (slot / STEPS_PER_OCTAVE))
        return 0.0


class Policy:
    """Answers requests: the lists, the recorder, the decision and the log line, in this order.  Thread-safe."""

    def __init__(self, settings: Settings, recorder: Recorder, notices: Notices | None = None) -> None:
        self.settings = settings  # replaced whole by a reload
        self._notices = notices
        self.figures = Figures()
        self._recorder = recorder
        self._recent = RecentAnswers()
        self._misplaced = OnceAMinute()

    def answer(self, request: PolicyRequest, peer: str, reply: Callable[[str], None]) -> None:
        """Call reply(access(5) action) once, now or from the recorder's thread; `peer` is the relay's address."""
        if not request.sasl_username:
            return reply(DUNNO)
        if not request.recipient_count:
            if self._misplaced.due(time.monotonic()):
                log.warning(
                    f"recipient_count is 0 at protocol_state {request.protocol_state}: nothing is counted;"
                    " in main.cf, call policyd from smtpd_end_of_data_restrictions"
                )
            return reply(DUNNO)
        if not request.instance:  # typed by hand: Postfix always sends one
            return self._judge(request, reply)
        key = hash((peer, request.instance, request.recipient_count))  # small, whatever was sent
        known = self._recent.recall(key)
        if known is not None:
            return reply(known)

        def settle(answer: str) -> None:
            if self._recent.settle(key, answer):
                reply(answer)

        try:
            self._judge(request, settle)
        except Exception:
            settle(DUNNO)  # a fault of ours: nobody waits for it, and it is logged as one
            raise

    def _judge(self, request: PolicyRequest, reply: Callable[[str], None]) -> None:
        settings = self.settings
        login = login_of(request.sasl_username, settings.strip_domain)[:KEPT_TEXT]
        sender, client_address = request.sender.lower()[:KEPT_TEXT], request.client_address[:KEPT_TEXT]
        event = Event(login, sender, client_address, request.recipient_count)
        message = f"{login}/{event.sender}/{event.client_address}/{event.recipient_count}"
        queue_id = f", queue_id={request.queue_id[:KEPT_TEXT]}" if request.queue_id else ""
        names = (login, request.sasl_username.lower(), event.sender)
        if request.recipient_count == 1 and request.recipient.lower() in settings.always_allow:
            log.info(f"allowing mail to {request.recipient[:KEPT_TEXT]}: {message}")
            return reply(DUNNO)

        def stop(decision: str, rule: str, recipients: int, *lines: str) -> None:
            self.figures.note(login, decision, settings.mode == "audit")
            reply(answer_of(decision, settings))
            for line in lines:
                log.info(line)
            if self._notices and settings.notify and settings.mode != "audit":
                action = decision.partition(" ")[0]
                held = request.queue_id[:KEPT_TEXT] if action == "HOLD" else ""
                self._notices.note(login, f"{action} {rule}", recipients, held)

        if settings.blacklist.holds(names, event.client_address):
            line = f"{said(HOLD_BLACKLISTED, settings)} blacklisted user: {message}{queue_id}"
            return stop(HOLD_BLACKLISTED, "blacklisted", 0, line)
        if settings.whitelist.holds(names, event.client_address) and in_office_hours(
            time.localtime(), settings.whitelist_days, settings.whitelist_hours
        ):
            log.info(f"skipping whitelisted user: {message}")
            return reply(DUNNO)

        def on_usage(usage: Usage | None) -> None:
            if usage is None:
                return reply(DUNNO)
            decision, rule = judge(usage, settings.limits_of(login), settings)
            counted = f"Updating db: {message}/{usage.recipients}"
            if decision == DUNNO:
                self.figures.note(login, DUNNO)
                reply(DUNNO)
                return log.info(counted)
            line = (
                f"{said(decision, settings)} {rule} for user {login}"
                f" using {event.sender} from ip [{event.client_address}]{queue_id}"
            )
            stop(decision, rule, usage.recipients, counted, line)

        self._recorder.record(event, on_usage)


class RequestStream(io.RawIOBase):
    """What a client sends, within two time limits: an idle connection's, and a whole request's.

    The kernel's own limits (SO_RCVTIMEO) spare each read the poll() of Python's.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline: float | None = None  # of the request that has begun, monotonic
        self._limit(IDLE_TIMEOUT_S)

    def readable(self) -> bool:
        """Say that this is for reading, as io asks."""
        return True

    def begin(self) -> None:
        """A request has begun: all of it must come in time."""
        self._deadline = time.monotonic() + REQUEST_TIMEOUT_S

    def end(self) -> None:
        """The request is complete."""
        self._deadline = None

    @property
    def in_request(self) -> bool:
        """True from begin() to end()."""
        return self._deadline is not None

    def readinto(self, buffer: Any) -> int:
        """Receive something; raises TimeoutError."""
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._limit(left)
        try:
            return self._connection.recv_into(buffer)
        except BlockingIOError:
            raise TimeoutError from None
        finally:
            if self._deadline is not None:
                self._limit(IDLE_TIMEOUT_S)

    def _limit(self, seconds: float) -> None:
        timeval = struct.pack("@ll", *divmod(max(1, int(seconds * 1e6)), 1_000_000))
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


class PolicyHandler(socketserver.BaseRequestHandler):
    """One connection of one smtpd process: requests line by line, any number of them, until it hangs up."""

    server: PolicyServer

    def handle(self) -> None:
        """Answer requests until the end of the connection, a time-out, or a peer that speaks something else."""
        stream = RequestStream(self.request)
        reader = io.BufferedReader(stream, MAX_LINE)
        peer = self.client_address[0] if self.client_address else "the Unix socket"
        self._answered = threading.Lock()  # held while an answer is owed
        try:
            while received := reader.peek(1):
                end = received.find(b"\n\n")
                if end >= 0:  # all of it is here, as Postfix sends it: no need to go line by line
                    request: PolicyRequest | None = parse_request(reader.read(end + 2))
                else:
                    stream.begin()
                    request = read_request(reader.readline)
                    stream.end()
                if request is None:
                    break
                self._answered.acquire()  # answers go out in the order of the requests
                self._asked = time.monotonic()
                self.server.policy.answer(request, peer, self._reply)
        except ProtocolError as error:
            log.warning(f"bad request from {peer}: {error}; hung up")
        except TimeoutError:
            if stream.in_request:  # else it was idle, which is no news
                log.warning(f"incomplete request from {peer} after {REQUEST_TIMEOUT_S} s; hung up")
        except OSError:
            pass  # the peer went away
        self._answered.acquire()

    def _reply(self, action: str) -> None:
        """Send the answer without waiting: whoever does not read his answers is hung up on."""
        answer = f"action={action}\n\n".encode("ascii")
        self.server.policy.figures.count(action, time.monotonic() - self._asked)
        try:
            if self.request.send(answer, socket.MSG_DONTWAIT) < len(answer):
                raise BlockingIOError
        except OSError:
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)
        self._answered.release()


def remove_stale_socket(path: str) -> None:
    """Remove the socket of a daemon that is no more; raises OSError if one listens, or if it is not a socket."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "is there and not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "another daemon listens there")


class PolicyServer(socketserver.ThreadingTCPServer):
    """Listens on TCP or on a Unix socket, and runs a PolicyHandler in a thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True  # a hanging client does not keep us from ending
    block_on_close = False
    request_queue_size = LISTEN_BACKLOG

    def __init__(self, bind: str, port: int, policy: Policy) -> None:
        """Listen; raises OSError."""
        self.policy = policy
        self.connections: set[socket.socket] = set()
        self._descriptors = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS)
        self._crowded = OnceAMinute()
        address: Any = bind
        if bind.startswith("/"):
            self.address_family = socket.AF_UNIX
            remove_stale_socket(bind)
        else:
            try:
                found = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            except UnicodeError as error:
                raise OSError(errno.EINVAL, "this is no host name") from error
            self.address_family, _, _, _, address = found[0]
        umask = os.umask(0o117)  # a Unix socket is for its owner and group
        try:
            super().__init__(address, PolicyHandler)
        finally:
            os.umask(umask)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, without spinning when that cannot be done."""
        try:
            connection, address = super().get_request()
        except OSError as error:
            if self._crowded.due(time.monotonic()):
                log.warning(f"cannot accept a connection: {error}")
            time.sleep(0.1)
            raise
        if self.address_family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Keep count of the connections; one too many is closed at once."""
        most = min(self.policy.settings.max_connections, self._descriptors)
        if len(self.connections) >= most:
            if self._crowded.due(time.monotonic()):
                log.warning(f"{most} connections are open, as many as may be: closing new ones at once")
            return False
        self.connections.add(request)
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread."""
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # no more threads, say because of systemd's TasksMax
            if self._crowded.due(time.monotonic()):
                log.warning(f"cannot serve a connection: {error}")
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection whose handler has ended, or was never begun."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault of ours, the last net: this connection gets no answer, the others go on."""
        log.error(f"internal error: {traceback.format_exc()}")

    def drain(self, deadline: float) -> None:
        """Stop accepting, answer what has been received, and end by `deadline` (monotonic seconds)."""
        self.shutdown()
        self.server_close()
        if self.address_family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                os.unlink(str(self.server_address))
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RD)  # its handler reads to the end of what is here
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)


# ---- process: arguments, signals, systemd; the only section that wires the others ------------------------------

EXIT_SETTINGS = 78  # EX_CONFIG: systemd does not restart us


def sd_notify(*lines: str) -> None:
    """Tell systemd, if it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect("\0" + address[1:] if address.startswith("@") else address)
        systemd.send("\n".join(lines).encode())


def stay_on_one_processor() -> None:
    """Keep all threads on one processor, which doubles what a busy daemon answers.

    Python runs one thread at a time; with two processors each hand-over moves to the other one's cold caches.
    """
    with contextlib.suppress(OSError):  # forbidden: slower, no worse
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def scope_of(settings: Settings) -> Scope:
    """Return what of a login's history can decide.

    Once a login is refused, older events change nothing any more, and each has a recipient at least.  Those of a
    batch are on top: running sums are computed back from the last one.  The hour is looked at from a quarter of
    its quota on; below it the day's sum stands for it, to which an outage adds the journal's.
    """
    everybody = settings.everybody
    return Scope(
        Reach(everybody.decisive() + BATCH_EVENTS, everybody.hour // 4),
        {
            login: Reach(max(own.decisive(), everybody.decisive()) + BATCH_EVENTS, own.hour // 4)
            for login, own in settings.quota.items()
        },
        settings.networks_window if settings.max_networks else 0,
    )


class Daemon:
    """The parts put together, and the main thread's loop over signals."""

    SIGNALS = frozenset((signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))

    def __init__(self, settings: Settings, settings_file: str | None) -> None:
        """Listen; raises OSError."""
        self._settings_file = settings_file
        self._started_with = settings
        self._repository = open_repository(settings)
        journal = Journal(settings.state_file("journal.sqlite3"))
        self._recorder = Recorder(self._repository, journal, scope_of(settings))
        self._notices = Notices(
            settings.state_file("notified.json"),
            self._repository,
            lambda: self._policy.settings,
            settings_file or SETTINGS_FILE,
        )
        self._policy = Policy(settings, self._recorder, self._notices)
        self._server = PolicyServer(settings.bind, settings.port, self._policy)
        self._closing = threading.Event()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; call with SIGNALS blocked."""
        self._recorder.start()
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        purging = (self._repository, lambda: self._policy.settings.keep_days, self._closing)
        threading.Thread(target=purge_daily, args=purging, daemon=True).start()
        threading.Thread(target=self.publish, daemon=True).start()
        threading.Thread(target=self._notices.mail, args=(self._closing,), daemon=True).start()
        sd_notify("READY=1", f"STATUS={self.status()}")
        pause = min(10.0, int(os.environ.get("WATCHDOG_USEC") or 20_000_000) / 2e6)  # half of what systemd allows
        while True:
            received = signal.sigtimedwait(self.SIGNALS, pause)
            number = received.si_signo if received else None
            if number in (signal.SIGTERM, signal.SIGINT):
                return self.stop()
            if number == signal.SIGHUP:
                self.reload()
            if number == signal.SIGUSR1:
                log.info(self.status())
            if self._recorder.longest_wait_s() < STUCK_S:
                sd_notify("WATCHDOG=1", f"STATUS={self.status()}")

    def status(self) -> str:
        """Return the figures of the moment on one line."""
        figures, down_s = self._policy.figures, self._recorder.down_s()
        answered, spared = figures.answered, any(figures.spared.values()) and figures.spared
        audit = f" (audit: {spared['HOLD']} would HOLD, {spared['REJECT']} would REJECT)" if spared else ""
        database = "up" if down_s is None else f"down since {local_time(time.time() - down_s)}"
        return (
            f"{sum(answered.values())} requests: {answered['DUNNO']} DUNNO, {answered['HOLD']} HOLD,"
            f" {answered['REJECT']} REJECT{audit}; {figures.logins_held()} logins held;"
            f" {len(self._server.connections)} connections; p99 {figures.p99_s() * 1000:.1f} ms;"
            f" database {database}, {self._recorder.journaled} events in the journal"
        )

    def metrics(self) -> str:
        """Return the same figures in Prometheus' text format."""
        figures, down_s = self._policy.figures, self._recorder.down_s()
        samples: list[tuple[str, str, str, Any]] = [
            ("requests_total", "counter", "Requests answered.", figures.answered),
            ("audited_total", "counter", "Messages that mode=audit has let through.", figures.spared),
            ("logins_held", "gauge", "Logins that were held or refused when they last sent.", figures.logins_held()),
            ("database_up", "gauge", "Is the database in use?", int(down_s is None)),
            ("database_down_seconds", "gauge", "For how long it has been away.", round(down_s or 0)),
            ("journal_events", "gauge", "Events that wait for the database.", self._recorder.journaled),
            ("answer_p99_seconds", "gauge", "99 % of the last minute's answers were as fast.", figures.p99_s()),
            ("connections", "gauge", "Open connections.", len(self._server.connections)),
        ]
        lines = []
        for name, kind, about, value in samples:
            lines += [f"# HELP policyd_{name} {about}", f"# TYPE policyd_{name} {kind}"]
            if isinstance(value, dict):
                lines += [f'policyd_{name}{{answer="{answer}"}} {number}' for answer, number in value.items()]
            else:
                lines.append(f"policyd_{name} {value}")
        return "\n".join([*lines, ""])

    def publish(self) -> None:
        """Once a minute, write the figures to a file, for node_exporter's textfile collector."""
        path = self._started_with.state_file("policyd.prom")
        complaint = ""
        while True:
            try:
                replace_file(path, self.metrics(), 0o644)
                complaint = ""
            except OSError as error:
                if complaint != str(error):
                    complaint = str(error)
                    log.warning(f"no file of figures: {complaint}")
            if self._closing.wait(FIGURES_S):
                return
            self._policy.figures.turn_minute()

    def reload(self) -> None:
        """Read the settings again, whole or not at all."""
        sd_notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            new = Settings.from_file(self._settings_file) if self._settings_file else Settings()
        except SettingsError as error:
            log.error(f"{error}; going on with the old settings")
        else:
            changed = new.differences(self._started_with)
            if changed:
                log.warning(f"settings changed that need a restart: {', '.join(changed)}")
            self._recorder.scope = scope_of(new)  # first: a higher quota needs to know more
            self._policy.settings = new
            log.info(f"settings read again: {self._settings_file or 'there is no file'}")
        sd_notify("READY=1", f"STATUS={self.status()}")

    def stop(self) -> None:
        """Answer what is in flight and write what is recorded, in 5 seconds at most."""
        sd_notify("STOPPING=1")
        deadline = time.monotonic() + DRAIN_S
        self._closing.set()
        self._server.drain(deadline)
        self._recorder.stop(max(0.1, deadline - time.monotonic()))
        log.info(f"policyd ends; {self.status()}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with mistakes on one line."""

    def error(self, message: str) -> NoReturn:
        """End with one line."""
        self.exit(1, f"policyd: {message}; see policyd --help\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog="policyd", description="Postfix policy daemon: recipient quotas for SASL users")
    parser.add_argument("-c", "--config", metavar="FILE", help=f"settings (default: {SETTINGS_FILE}, if there)")
    parser.add_argument("--stderr", action="store_true", help="log to stderr instead of syslog")
    parser.add_argument("--version", action="version", version=f"policyd {__version__}")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="try settings, database and table, and say what is found")
    instead.add_argument("--init-db", action="store_true", help="create the table, or upgrade an old one")
    return parser.parse_args(arguments)


def fail(message: str, status: int = 1) -> int:
    """Say on stderr why we end; return the exit status."""
    print(f"policyd: {printable(message)}", file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run policyd; return its exit status."""
    options = parse_arguments(arguments)
    settings_file = options.config or (SETTINGS_FILE if os.path.lexists(SETTINGS_FILE) else None)
    os.umask(0o077)
    try:
        settings = Settings.from_file(settings_file) if settings_file else Settings()
        about = (
            f"{settings.listens_on()}, quota {settings.defaultquota}{' (audit)' if settings.mode == 'audit' else ''},"
            f" {open_repository(settings)},"
            f" settings: {settings_file or f'none, defaults (yours would go into {SETTINGS_FILE})'}"
        )
        if options.init_db:
            print(open_repository(settings).init())
            return 0
        if options.check:
            print(about)
            print(f"events can be counted: {open_repository(settings).check(time.monotonic() + BATCH_DEADLINE_S)}")
            return 0
        daemon = Daemon(settings, settings_file)
    except SettingsError as error:
        return fail(str(error), EXIT_SETTINGS)
    except RepositoryUnavailable as error:
        return fail(f"events cannot be counted: {error}")
    except OSError as error:
        return fail(f"cannot listen on {settings.listens_on()}: {error.strerror or error}")
    except ImportError:
        return fail("PyMySQL is missing: apt install python3-pymysql, or remove the db... settings")
    signal.pthread_sigmask(signal.SIG_BLOCK, daemon.SIGNALS)  # in all threads to come: run() asks for them
    stay_on_one_processor()
    log.start(options.stderr)
    log.info(f"policyd {__version__} on {about}")
    if settings_file and settings.dbpass and os.stat(settings_file).st_mode & stat.S_IROTH:
        log.warning(f"everybody can read the password in {settings_file}; try: chmod 0640 {settings_file}")
    if not (log.to_stderr or "NOTIFY_SOCKET" in os.environ):
        print(f"policyd {__version__} on {about}; logging to syslog", file=sys.stderr)
    daemon.run()
    log.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
