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

    blocked by a human                     HOLD blocked                    accepted, and waits in the hold queue
    sum >= 2 x quota                       REJECT max quota exceeded       the client gets 554
    sum >= quota                           HOLD quota exceeded
    the last hour's >= hourquota           HOLD hour quota exceeded        (if hourquota is set)
    too many new places                    HOLD too many places            (if early_signs is set)
    too many recipients from new places    HOLD too much from new places   (the same)
    else                                   DUNNO                           goes on to the next restriction

A login, sender or client address on the blacklist is held at any time; one on the whitelist is let
through, uncounted, in office hours; mail without a login (inbound mail) is none of our business.
With mode=audit the answer is DUNNO, but for a block, and the log says what it would have been.

A place is the first number of a client's address.  A thief is everywhere at once, or somewhere new: places are new to a
login that has not used them between a day and `keep_days` ago.  Whoever is stopped has an incident: a row of the
table, which all relays see.  It is recorded once in 24 hours, and then a human is told (`on_stop`).

When the database is away, mail flows and the quota holds: events go to a journal, which is moved to the
database when one of the servers of `dbhost` is back.  Without any `db...` setting the events are kept in an
embedded SQLite file instead, and nothing but Python is needed.

Files:    /etc/postfix/policyd.cfg (settings); in `statedir` journal.sqlite3, events.sqlite3 (the
          embedded store), incidents.json (those that `on_stop` has not told yet), policyd.prom (figures for
          Prometheus), policyd.pid.
Signals:  HUP reads the settings again, TERM and INT answer what has been asked and end, USR1 logs a status.
Status:   0, 1 (cannot listen, something is missing in --check), 78 (a mistake in the settings).
Log:      syslog, facility daemon, tag policyd.

The sections below, each of which uses only those above it:
names, log, settings, protocol, decision, storage, watch, recorder, server, process.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import importlib.util
import ipaddress
import itertools
import json
import os
import pwd
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import stringprep
import subprocess
import sys
import syslog
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional, Union

if TYPE_CHECKING:
    import pymysql

__version__ = "0.2.0"

SETTINGS_FILE = "/etc/postfix/policyd.cfg"

NEVER = sys.maxsize  # a sum that nobody reaches
BATCH_EVENTS = 256  # the most that one INSERT takes
MINUTE_S, HALF_HOUR_S, HOUR_S, DAY_S = 60, 1800, 3600, 86_400


def local_time(seconds: float) -> str:
    """Return a time since 1970 as a human reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def printable(text: str) -> str:
    """Return `text` as printable ASCII on one line, everything else escaped as in a Python string.

    For whatever is shown: clients and files may hold newlines that forge a line of the log, and a terminal's commands.
    """
    if text.isascii() and text.isprintable():
        return text
    return text.encode("unicode_escape").decode("ascii")


def wire_name(host: str, port: int) -> str:
    """Return where policyd listens, as Postfix spells it."""
    if host.startswith("/"):
        return f"unix:{host}"
    return f"inet:[{host}]:{port}" if ":" in host else f"inet:{host}:{port}"


# What a client sends, as it is counted, compared and looked up: here and nowhere else.


def clean(text: str) -> str:
    """Return a name in the one form of all its spellings: NFKC, lower case, no blanks at its ends, none doubled.

    Without what RFC 4013 maps to nothing (soft hyphen, zero-width characters): directories ignore that when they
    compare logins, so it must not make a fresh quota.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", "".join(itertools.filterfalse(stringprep.in_table_b1, text))).lower()
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(" *@ *", "@", re.sub("  +", " ", text)).strip(" ") if " " in text else text


Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 in there (RFC 4291, 6052)


@functools.lru_cache(maxsize=10_000)
def as_network(text: str) -> Network | None:
    """Return an address (a network of one) or a network, IPv4 also where it comes inside IPv6; None for anything else.

    Postfix says "unknown" of a client that has gone.
    """
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(text)
        if network.version == 6 and any(network.subnet_of(mapped) for mapped in MAPPED):
            return ipaddress.IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
        return network
    return None


# ---- log: lines on their way to syslog ------------------------------------------------------------

LOG_QUEUE_LINES = 10_000  # some megabytes; of a busy relay a minute


class Log:
    """A queue of lines and the one thread that hands them to syslog, so that no answer waits for it.

    libc's syslog() blocks after a dozen lines when nobody reads /dev/log.  Thread-safe.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        # Without a lock, which every line would wait for: it is no matter if one of thousands is not counted.
        self._dropped = 0
        # Of a topic: since when (NEVER: told once), how many more, the last line.
        self._complaints: dict[str, tuple[float, int, str]] = {}
        self._write: Callable[[int, str], object] = syslog.syslog
        self.thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self.info = functools.partial(self._put, syslog.LOG_INFO)  # a decision
        self.warning = functools.partial(self._put, syslog.LOG_WARNING)  # a human should look
        self.error = functools.partial(self._put, syslog.LOG_ERR)  # counting is impaired

    def start(self, to_stderr: bool) -> None:
        """Write to syslog as daemon/policyd[pid], or the same lines to stderr, from now on.

        Where nobody listens on /dev/log (a container, a terminal of a fresh machine) lines to syslog would be lost.
        """
        if to_stderr or not os.path.exists("/dev/log"):
            self._write = lambda _, line: print(f"policyd[{os.getpid()}]: {line}", file=sys.stderr, flush=True)
        syslog.openlog("policyd", syslog.LOG_PID, syslog.LOG_DAEMON)
        self.thread.start()

    def _put(self, level: int, line: str) -> None:
        if self._lines.qsize() < LOG_QUEUE_LINES:
            return self._lines.put((level, printable(line)))
        self._dropped += 1

    def complain(self, topic: str, line: str, lasts: bool = False) -> None:
        """Warn of what may happen a thousand times: of a topic at once, and tick() tells how many more came.

        Of what `lasts` it tells no more, until forget() says that it is over.
        """
        since, more, _ = self._complaints.get(topic, (NEVER if lasts else time.monotonic(), -1, ""))
        self._complaints[topic] = since, more + 1, line
        if more < 0:
            self.warning(line)

    def forget(self, topic: str) -> None:
        """Complain of a topic at once when it comes again."""
        self._complaints.pop(topic, None)

    def tick(self, now: float) -> None:
        """Sum up the complaints of the last minute; to be called now and then, with monotonic seconds.

        A topic that was quiet for a minute is forgotten: so there are never many, though each address may be one.
        """
        for topic, (since, more, line) in list(self._complaints.items()):
            if now - since >= MINUTE_S:
                del self._complaints[topic]
                if more:
                    self._complaints[topic] = now, 0, line  # it goes on: the next one is told in a minute, not at once
                    self.warning(f"{line} ({more} more like this within a minute)")

    def stop(self) -> None:
        """Write what is queued, in a second at most: a stuck syslog must not keep us."""
        self._lines.put(None)
        self.thread.join(timeout=1)

    def _write_all(self) -> None:
        while (item := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # stderr is closed: nobody to tell
                self._write(*item)
            if self._dropped and self._lines.empty():
                self.warning(f"{self._dropped} log lines were lost: syslog did not take them")
                self._dropped = 0


log = Log()


# ---- settings: one file, read whole or not at all ---------------------------------------------------

DAYS_TO_JUDGE = 3  # that the table must remember before an early sign counts: on the first day everything is new
GONE = {  # settings of 0.1, and what to write instead: an upgrade by night must not leave mail uncounted
    "max_networks": "early_signs=audit (or yes), and max_places= if 5 does not suit",
    "networks_window": "early_signs=audit (or yes); its times are fixed",
    "notify": "on_stop=policyd-admin mail {}",
    "notify_from": "--from {} at the end of on_stop=",
    "notify_server": "--server {} at the end of on_stop=",
}
REPEATED = ("quota", "trusted_network", "always_allow", "whitelist", "blacklist")  # may be given in several lines
NEEDS = {"dbssl_cert": ("dbssl_key", "dbssl_ca"), "dbssl_key": ("dbssl_cert",), "dbssl_name": ("dbssl_ca",)}


class SettingsError(Exception):
    """A mistake in the settings: `FILE:LINE: what is wrong; what to do`.  Whoever shows it makes it printable."""


class UserList:
    """What may be given in several lines, with their lines: names (logins, senders, @domains) and networks, or quotas.

    Compared by identity, so that what is remembered of one (place_of) is not that of another.
    """

    def __init__(self, given: Iterable[tuple[Any, int]]) -> None:
        self.lines = dict(given)
        self._networks = [entry for entry in self.lines if not isinstance(entry, str)]

    def line_of(self, names: Iterable[str], client_address: str) -> int:
        """Return the number of a line that lists one of `names` or the client's address; 0: there is none.

        A name costs the same in a list of any length, a network as much as all of them: lists have some dozens.
        """
        client = as_network(client_address) if self._networks else None
        networks = [network for network in self._networks if client and client.network_address in network]
        return next((self.lines[entry] for entry in (*names, *networks) if entry in self.lines), 0)


NOBODY = UserList(())


def names_of(sasl_username: str, login: str, sender: str) -> list[str]:
    """Return the names by which a list may mean a message: login, `sasl_username`, sender, and the domains of both.

    The login as Postfix gave it, too: with strip_domain=yes its domain is known from there alone.
    """
    names = [login, clean(sasl_username), clean(sender)]
    return names + ["@" + name.rpartition("@")[2] for name in names[1:] if "@" in name]


class Limits(NamedTuple):
    """The figures of a login from which on its mail is held or refused; NEVER is no limit."""

    hold_at: int
    reject_at: int
    hour: int = NEVER  # of the last hour: held from it on
    places: int = NEVER  # new ones within half an hour: held beyond it, and beyond three times as many in 24 h
    new_place_quota: int = NEVER  # recipients of an hour from new places: held from it on
    early_signs: bool = False  # do incidents of this kind hold here?
    own: str = ""  # the login or @domain whose quota= this is; empty: everybody's
    rows: int = NEVER  # so many of the newest events decide


# How a value is read: what to write, what that looks like (capitals aside), and what makes the value of it: it may
# still refuse it, by None or a ValueError.  Patterns are ASCII, since to int() digits of all scripts are digits.
Reader = tuple[str, str, Callable[[str], Any]]


def _setting(default: Any, hint: str = "give a value, or remove the line", pattern: str = ".+",
             make: Callable[[str], Any] = str, restart: bool = False) -> Any:  # fmt: skip
    """Return a field of Settings, with its default and its reader; `restart`: a change of it needs one."""
    return dataclasses.field(default=default, metadata={"reader": (hint, pattern, make), "restart": restart})


def _number(lowest: int, highest: int = 999_999_999) -> Reader:
    """Return the reader of a number, of nine digits at most: a longer one is a slip, and `unlimited` can be said."""
    hint = f"give a number from {lowest} to {highest}, digits only"
    return hint, "[0-9]{1,9}", lambda text: int(text) if lowest <= int(text) <= highest else None


def _span(text: str) -> tuple[int, ...] | None:
    """Read FROM-TO; what runs over midnight or Sunday would be empty, and the whitelist without effect."""
    ends = tuple(map(int, text.split("-")))
    return ends if ends[0] <= ends[1] else None


def _servers(text: str) -> tuple[tuple[str, int | None], ...] | None:
    """Read `host`, `host:port`, `[IPv6]:port` or `/socket`, several with commas or spaces between."""
    server = r"(/.+|[^][:/]+|(?=.*:.*:)[0-9A-Fa-f:.]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?"
    found = [re.fullmatch(server, each) for each in text.replace(",", " ").split()]
    is_right = found and all(match and 0 < int(match[2] or 1) < 65536 for match in found)
    servers = [(match[1].strip("[]"), int(match[2]) if match[2] else None) for match in found if match]
    return tuple(servers) if is_right else None


# What people write into lists, and no login, sender or domain ever is: it would be on no list, and nobody would know.
NEVER_MATCHES = (
    r"|.* #.*|.*[,;<>].*|[/*\[\xab\u201c\u201e].*|.*[*'\"\u2019\u201d]"  # comments, several, expressions, quotes, *
    r"|@.*@.*|\.[^@]*|.*(\*@|@\.|@.*[*? ]).*|.*@"  # .example.org, lena*@example.org, lena@a.example lisa@a.example
    r"|([0-9]+\.){3}[^@]*|[0-9.]+([/*%\[][0-9.*%\[\]-]*|\.)"  # 192.0.2.10-20, 10.*, 10/8, 192.0.
    r"|[0-9a-f:]*:(:|[0-9a-f.]*[/*\u2013 -])[^@]*|ipv6:.*"  # 2001:db8:::1, 2001:db8:*, 2001:db8:1/48, IPv6:2001:db8::1
)


def _entry(text: str) -> str | Network | None:
    """Read what stands on a list: a name as clean() gives it, an address or a network."""
    entry = clean(text)
    return as_network(entry) or (None if re.fullmatch(NEVER_MATCHES, entry) else entry)


def _quota(text: str) -> tuple[str, int, int] | None:
    """Read LOGIN:DAY or LOGIN:DAY:HOUR, a login or an @domain and its quotas; HOUR is 0 for none, -1 for hourquota.

    A login may have colons and numbers between them: the numbers at the end are the quotas, unless there is a blank
    behind others (anna:5 bert:6), which are two on one line.
    """
    number = "([0-9]{1,9}|unlimited)"
    match = re.fullmatch(rf"(?!.*:[0-9]+ )(.*?\S) *: *{number}(?: *: *{number})?", text.lower())
    if not match or not isinstance(name := _entry(match[1]), str):
        return None
    day, hour = (NEVER if limit == "unlimited" else int(limit or -1) for limit in match.groups()[1:])
    return name, day, hour if day < NEVER else max(hour, 0)  # `unlimited` is never held for a sum


ENTRY = "give one login, sender, @domain, address or network (192.0.2.0/24), without comment or wildcard", ".+", _entry
FILE = "give a file that policyd can read", ".+", lambda path: path if os.access(path, os.R_OK) else None
MESSAGE = "give at most 200 characters, all of them ASCII", "[\x00-\x7f]{1,200}"  # an SMTP line has 512
BIND = "give an address, a host name or a path; the port stands in port=", r"/.+|[\w.-]+|([\w.%]*:){2}[\w.:%-]*"
NETWORK = "give an address, or a network from its first address on (192.0.2.0/24)", ".+", as_network
QUOTA = "give one LOGIN:N, LOGIN:unlimited or LOGIN:DAY:HOUR; defaultquota= is for whoever has no quota=", ".+", _quota
SERVERS = "give host, host:port, [IPv6]:port or a socket's path, of a cluster several", ".+", _servers


@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # shown to nobody: it has a password
class Settings:
    """All settings, each named as in the file; a reload replaces the whole object, so a request sees one state.

    Of what is not given, the default; policyd.cfg.example says why one would change each.
    """

    bind: str = _setting("127.0.0.1", *BIND, restart=True)
    port: int = _setting(9093, *_number(1, 65535), restart=True)
    max_connections: int = _setting(1000, *_number(1, 100_000))
    mode: str = _setting("enforce", "give enforce or audit", "enforce|audit", str.lower)
    defaultquota: int = _setting(1500, *_number(1))
    rejectquota: int = _setting(0, *_number(1))  # 0: twice defaultquota
    hourquota: int = _setting(0, *_number(0))  # 0: none
    quota: UserList = _setting(NOBODY, *QUOTA)
    early_signs: str = _setting("no", "give no, audit or yes", "no|audit|yes", str.lower)
    max_places: int = _setting(5, *_number(0))  # 0: any number
    new_place_quota: int = _setting(100, *_number(0))  # 0: none
    trusted_network: UserList = _setting(NOBODY, *NETWORK)
    strip_domain: bool = _setting(True, "give yes or no", "yes|no", lambda text: text.lower() == "yes")
    hold_message: str = _setting("", *MESSAGE)
    reject_message: str = _setting("", *MESSAGE)
    always_allow: UserList = _setting(NOBODY, "give one mail address", r"[^@\s,;:<]+@[\w.-]+", str.lower)
    whitelist: UserList = _setting(NOBODY, *ENTRY)
    blacklist: UserList = _setting(NOBODY, *ENTRY)
    whitelist_days: tuple[int, int] = _setting((1, 5), "give FROM-TO, say 1-5", "0?[1-7] *- *0?[1-7]", _span)
    whitelist_hours: tuple[int, int] = _setting(
        (7, 19), "give FROM-TO, say 7-19", "([01]?[0-9]|2[0-4]) *- *([01]?[0-9]|2[0-4])", _span)  # fmt: skip
    keep_days: int = _setting(7, *_number(2, 36_500))
    on_stop: Sequence[str] = _setting((), "give PROGRAM ARGUMENT..., quoted as for a shell", ".+", shlex.split)
    dbhost: tuple[tuple[str, int | None], ...] = _setting((("127.0.0.1", None),), *SERVERS, restart=True)
    dbport: int = _setting(3306, *_number(1, 65535), restart=True)
    dbname: str = _setting("", restart=True)  # none: the embedded store
    dbuser: str = _setting("", restart=True)
    dbpass: str = _setting("", "", ".*", restart=True)
    dbssl_ca: str = _setting("", *FILE, restart=True)
    dbssl_cert: str = _setting("", *FILE, restart=True)
    dbssl_key: str = _setting("", *FILE, restart=True)
    dbssl_name: str = _setting("", restart=True)  # in the server's certificate; "none": any
    policy_table: str = _setting("events", "give letters, digits, _ and $ only", r"[\w$]{1,64}", restart=True)
    statedir: str = _setting("", restart=True)
    lines: dict[str, int] = dataclasses.field(default_factory=dict)  # where each was given (quota=anna)
    gone: tuple[str, ...] = ()  # what is to be said of settings of 0.1
    path: str = ""  # of the file; without one the defaults serve

    @classmethod
    def from_file(cls, path: str) -> Settings:
        """Read `path`; raises SettingsError, which names file, line and remedy.

        Comments may hold any bytes.  The first mistake is told, not all of them: others often follow from it.
        """
        given: dict[str, list[tuple[Any, int]]] = {}  # of each key its values, with the numbers of their lines
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
                for number, line in enumerate(file, start=1):
                    cls._read_line(line.strip(), number, given)
        except OSError as error:
            hint = f"; try: chown root:policyd {path} && chmod 0640 {path}" if error.errno == errno.EACCES else ""
            raise SettingsError(f"{path}: {error.strerror}{hint}") from error
        except ValueError as error:
            raise SettingsError(f"{path}:{number}: {error}") from error
        gone = tuple(f"{path}:{number}: {key}= is gone; write instead: {instead}"
                     for key in GONE for instead, number in given.pop(key, ()))  # fmt: skip
        lines = {key: pairs[0][1] for key, pairs in given.items()}
        values: Any = {key: UserList(pairs) if key in REPEATED else pairs[0][0] for key, pairs in given.items()}
        settings = cls(**values, lines=lines, gone=gone, path=path)
        for number, mistake in settings._mistakes(given.get("quota", ())):
            raise SettingsError(f"{path}:{number}: {mistake}")
        return settings

    @classmethod
    def _read_line(cls, line: str, number: int, given: dict[str, list[tuple[Any, int]]]) -> None:
        """Add what a line says to what was `given` before it; raises ValueError.

        `#` starts a comment only at the start, and quotes are literal: passwords contain both.  An unknown key is a
        mistake, not ignored: `defualtquota=500` would leave everybody at 1500, in silence.
        """
        if not line or line.startswith("#"):
            return
        readers: dict[str, Reader] = {key: ("", ".*", instead.format) for key, instead in GONE.items()}
        readers.update({field.name: field.metadata["reader"] for field in dataclasses.fields(cls) if field.metadata})
        key, equals, text = (part.strip() for part in line.partition("="))
        if not equals or key not in readers:
            word = "".join(key.split()[:1])  # no more of it is shown: it may be a password
            nearest = difflib.get_close_matches(word.lower(), readers, n=1, cutoff=0)[0]
            if word in readers:
                raise ValueError(f"no '=' after {word}; write {word}=VALUE")
            raise ValueError(f"unknown setting {word}; did you mean {nearest}=?")
        if not clean(text).isprintable():  # nor are the stand-ins for what is not UTF-8
            raise ValueError(f"{key}= has a control character or is not UTF-8; type it again")
        (hint, pattern, make), value = readers[key], None
        with contextlib.suppress(ValueError):
            value = make(text) if re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII) else None
        if value is None:
            raise ValueError(f"{key}={text}: {hint}")
        if key in given and key not in REPEATED:
            raise ValueError(f"{key}= was given in line {given[key][0][1]} already; keep one of them")
        given.setdefault(key, []).append((value, number))

    def _mistakes(self, quotas: Iterable[tuple[tuple[str, int, int], int]]) -> Iterator[tuple[int, str]]:
        """Yield what is wrong though each line is right by itself, with the number of the line to be shown.

        And note in `lines` where each login's quota= stands.
        """
        for key, number in [line for line in self.lines.items() if line[0].startswith("db")]:
            for needed in ("dbname", "dbuser", *NEEDS.get(key, ())):
                if needed not in self.lines:
                    yield number, f"{key}= needs {needed}= too; add it, or remove all db... lines: the embedded store"
        if 0 < self.rejectquota < self.defaultquota:  # mail is held first, then refused
            yield self.lines["rejectquota"], f"rejectquota= is below defaultquota={self.defaultquota}; give more"
        if self.early_signs != "no" and self.keep_days <= DAYS_TO_JUDGE:
            yield self.lines["keep_days"], f"early_signs= needs keep_days={DAYS_TO_JUDGE + 1} or more (better 30)"
        if self.dbssl_ca:
            self.tls()
        for (name, _, _), number in quotas:  # also those that are equal, of which `quota` has one
            login = self.login_of(name)
            if self.lines.setdefault(f"quota={login}", number) < number:
                yield number, f"{login} has a quota= already; keep one of them"
            if self.strip_domain and login.startswith("@"):
                yield number, f"quota={login}: needs strip_domain=no: without their domain logins belong to none"

    def login_of(self, sasl_username: str) -> str:
        """Return the account that is counted: with strip_domain=yes without its domain, before or after it."""
        whole = clean(sasl_username)
        account = whole.partition("@")[0].rpartition("\\")[2].strip(" ") if self.strip_domain else whole
        return account or whole or sasl_username

    @functools.cached_property
    def limits(self) -> dict[str, Limits]:
        """The limits of each login and @domain with a quota of its own; of everybody else under the empty text.

        Made once, for each message asks for them.  rejectquota= is for those without a quota of their own.

        `rows`: as many of the newest events as the highest limit (everybody's, where a login has none) reach it, since
        each has a recipient at least, and older ones change no answer.  Those of a batch are on top: running sums are
        computed back from the last one.
        """
        limits: dict[str, Limits] = {}
        is_early = self.early_signs != "no"
        most = self.rejectquota or 2 * self.defaultquota
        everybody = "", self.defaultquota, self.hourquota
        for name, day, hour in (everybody, *self.quota.lines):
            login = self.login_of(name)
            reject_at = 2 * day if 0 < day < NEVER else NEVER  # 0 is there to hold all mail, not to refuse it
            sums = day, reject_at if name else most, (self.hourquota if hour < 0 else hour) or NEVER
            rows = BATCH_EVENTS + max((limit for limit in sums if limit < NEVER), default=most)
            bulk = self.new_place_quota if is_early and name[:1] in ("", "@") else 0  # that of a single login is known
            limits[login] = Limits(*sums, is_early * self.max_places or NEVER, bulk or NEVER, is_early, login, rows)
        return limits

    def limits_of(self, login: str, sasl_username: str = "") -> Limits:
        """Return the limits of a login: its own, or those of its domain, or everybody's.

        The domain is exact, and `anna` alone belongs to none.  With a `sasl_username`, which may be no more than the
        login, it counts, too, that the bulk of whoever stands on a whitelist is known, at any hour.
        """
        limits = self.limits.get(login) or self.limits.get("".join(login.rpartition("@")[1:])) or self.limits[""]
        is_asked = sasl_username and limits.early_signs and self.whitelist.lines
        if is_asked and self.whitelist.line_of(names_of(sasl_username, login, ""), ""):
            return limits._replace(new_place_quota=NEVER)
        return limits

    @functools.cached_property
    def needs_hour(self) -> bool:
        """Tell whether the recipients of the last hour matter."""
        return any(limits.hour < NEVER or limits.early_signs for limits in self.limits.values())

    def tls(self) -> ssl.SSLContext:
        """Return what checks the server's certificate, from the files as they are now; raises SettingsError."""
        key = "dbssl_ca"
        try:
            context = ssl.create_default_context(cafile=self.dbssl_ca)
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # many a site's own CA is not that strict
            context.check_hostname = self.dbssl_name != "none"
            if self.dbssl_cert:
                key = "dbssl_cert"
                context.load_cert_chain(self.dbssl_cert, self.dbssl_key, password=str)  # never ask a terminal for one
        except OSError as error:  # ssl.SSLError is one
            reason = f"{error.strerror or error}; give PEM files, and the certificate's own key without a password"
            raise SettingsError(f"{self.path}:{self.lines[key]}: {key}={getattr(self, key)}: {reason}") from error
        return context

    def state_file(self, name: str) -> str:
        """Return the path of `name` in statedir, $STATE_DIRECTORY, /var/lib/policyd or the current directory."""
        given, usual = self.statedir or os.environ.get("STATE_DIRECTORY", "").split(":")[0], "/var/lib/policyd"
        return os.path.join(given or (usual if os.access(usual, os.W_OK) else os.getcwd()), name)


# ---- protocol: Postfix's SMTPD_POLICY_README, and nothing of storage ----------------------------------

MAX_LINE = 8192  # bytes of one attribute, without its newline
MAX_REQUEST = 65536  # bytes of one request, the empty line included; Postfix's have some 600
IDLE_TIMEOUT_S = 1015  # above Postfix's smtpd_policy_service_max_ttl (1000 s): Postfix is the one to hang up
REQUEST_TIMEOUT_S = 30  # for a whole request once its first byte is here, however it dribbles
# What is not UTF-8 is taken for Latin-1: so a login is the same in both, whatever else the request has.
codecs.register_error("latin-1", lambda bad: (str(bad.object[bad.start : bad.end], "latin-1"), bad.end))  # type: ignore


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


def parse_request(lines: bytes) -> PolicyRequest:
    """Return the request with these `lines`, without the last two newlines; raises ProtocolError.

    Unknown attributes are ignored, of one given twice the last counts, and a missing one is as good as an empty one.
    """
    if len(lines) + len(b"\n\n") > MAX_REQUEST:
        raise ProtocolError(f"a request longer than {MAX_REQUEST} bytes")
    if len(lines) > MAX_LINE < max(map(len, lines.split(b"\n"))):  # most requests are shorter than a line may be
        raise ProtocolError(f"a line longer than {MAX_LINE} bytes")
    text = lines.decode(errors="latin-1")
    if "\0" in text:
        raise ProtocolError("a NUL byte")
    try:
        attributes = dict([line.split("=", 1) for line in text.split("\n")])
    except ValueError:
        raise ProtocolError("a line without '='") from None
    if attributes.get("request") != "smtpd_access_policy":
        raise ProtocolError("no request=smtpd_access_policy")
    count = attributes.get("recipient_count", "0")
    if not (count.isascii() and count.isdigit() and len(count) <= 6):
        raise ProtocolError(f"recipient_count={count[:80]} is not 1 to 6 digits")
    return PolicyRequest._make([*[attributes.get(name, "") for name in PolicyRequest._fields[:-1]], int(count)])


def _limit_waiting(connection: socket.socket, seconds: float) -> None:
    """Let no recv() of a connection wait for longer; it then raises BlockingIOError.

    The kernel's own limit: with Python's each recv() is a poll() before, which costs a twentieth of the speed.
    """
    option = socket.SOL_SOCKET, socket.SO_RCVTIMEO
    width = len(connection.getsockopt(*option, 16)) // 2  # of the numbers of a timeval: on 32 bits not always a long's
    whole, rest = divmod(int(seconds * 1e6), 1_000_000)
    connection.setsockopt(*option, whole.to_bytes(width, sys.byteorder) + rest.to_bytes(width, sys.byteorder))


def requests(connection: socket.socket) -> Iterator[PolicyRequest]:
    """Yield the requests of a connection until it ends, or is idle for too long; raises ProtocolError and OSError.

    Nothing is decided before the empty line.  Postfix sends a request in one piece, so that it is whole at once; what
    dribbles is looked at anew with each piece, which its size and its time keep cheap.
    """
    received, deadline = b"", 0.0  # by when the request that has begun must be here
    _limit_waiting(connection, IDLE_TIMEOUT_S)
    try:
        while more := connection.recv(MAX_LINE):  # most requests in one piece, and a small buffer for each
            *whole, received = (received + more).split(b"\n\n")
            for lines in whole:
                yield parse_request(lines)
            begun = received.split(b"\n")
            is_long = len(received) > MAX_REQUEST or max(map(len, begun)) > MAX_LINE
            if is_long or any(b"=" not in line for line in begun[:-1]):
                parse_request(received)  # refused now: a health check that speaks HTTP never sends an end
            if received:
                deadline = (not whole and deadline) or time.monotonic() + REQUEST_TIMEOUT_S
                _limit_waiting(connection, max(0.001, deadline - time.monotonic()))
            elif deadline:
                deadline = 0.0
                _limit_waiting(connection, IDLE_TIMEOUT_S)
    except BlockingIOError:
        if received:  # else nobody has asked anything: no news
            raise ProtocolError(f"incomplete after {REQUEST_TIMEOUT_S} s") from None


# ---- decision: numbers, hours and places; no clock, no socket, no SQL ------------------------------------------

MESSAGES_TO_JUDGE = 5  # from new places: a letter to a whole class from a train is one message
REASONS = {"blocked": "blocked", "places": "too many places", "newplace": "too much from new places",
           "hourquota": "hour quota exceeded", "overquota": "quota exceeded"}  # fmt: skip
RULES = tuple(REASONS)
LASTING = RULES[:3]  # an incident of these holds all mail for 24 h: what a human said, and what no pause makes good


class Usage(NamedTuple):
    """What a login has used up, the message in question included."""

    recipients: int  # of the last 24 h
    of_hour: int = 0  # recipients of the last hour, if they matter
    incidents: frozenset[str] = frozenset()  # of the last 24 h: "HOLD overquota", ...
    since: float = 0.0  # when the one began that lasts, in s since 1970
    new_places: int = 0  # within half an hour
    new_places_24h: int = 0
    from_new_places: int = 0  # recipients of the last hour, if they came in several messages

    def plus(self, other: Usage) -> Usage:
        """Return what two stores know of one login."""
        incidents = self.incidents | other.incidents if other.incidents else self.incidents
        return Usage(self.recipients + other.recipients, self.of_hour + other.of_hour, incidents, *self[3:])

    def lasting(self) -> str:
        """Return the rule of the incident that holds this login's mail, the gravest of them, or an empty text."""
        return next((rule for rule in LASTING for kind in self.incidents if kind.endswith(f" {rule}")), "")


NOTHING = Usage(0)


class Verdict(NamedTuple):
    """What becomes of a message."""

    action: str  # one of access(5): DUNNO (not OK: later restrictions still run), HOLD, REJECT
    rule: str = ""  # one of RULES, or blacklisted
    reason: str = ""  # for the sender
    said: str = ""  # for the log: overquota (1507>1500)
    figure: int = 0
    limit: int = 0

    @property
    def incident(self) -> str:
        """What the table calls an incident of this kind."""
        return f"{self.action} {self.rule}"


PASSED = Verdict("DUNNO")


def decide(usage: Usage, limits: Limits) -> Verdict:
    """Return what becomes of a message of a login that has used up `usage`, the message included.

    The first case that applies decides.  Reaching a quota is over it; of places one more is.  A human's block comes
    first: it holds what would be refused, too, so that he can look at it.
    """
    if usage.recipients < limits.hold_at and usage[1:] == NOTHING[1:]:
        return PASSED  # as most do
    lasting, limit = usage.lasting(), limits.reject_at
    if usage.recipients >= limit and lasting != "blocked":
        shown = f"2x{limits.hold_at}" if limit == 2 * limits.hold_at else limit
        said = f"overquota ({usage.recipients}>{shown})"
        return Verdict("REJECT", "overquota", "max quota exceeded", said, usage.recipients, limit)
    for is_held, rule, figure, limit in (
        (lasting == "blocked", lasting, 0, 0),
        (usage.recipients >= limits.hold_at, "overquota", usage.recipients, limits.hold_at),
        (usage.of_hour >= limits.hour, "hourquota", usage.of_hour, limits.hour),
        (lasting and limits.early_signs, lasting, 0, 0),
        (usage.new_places > limits.places, "places", usage.new_places, limits.places),
        (usage.new_places_24h > 3 * limits.places, "places", usage.new_places_24h, 3 * limits.places),
        (usage.from_new_places >= limits.new_place_quota, "newplace", usage.from_new_places, limits.new_place_quota),
    ):
        if is_held:
            said = f"since {local_time(usage.since)}" if rule == lasting and not figure else f"{figure}>{limit}"
            return Verdict("HOLD", rule, REASONS[rule], f"{rule} ({said})", figure, limit)
    return PASSED


def only_audits(settings: Settings, rule: str) -> bool:
    """Tell whether what a rule would do is logged, and not done; a human's block is always done."""
    return rule != "blocked" and (settings.mode == "audit" or (rule in LASTING and settings.early_signs == "audit"))


@functools.lru_cache(maxsize=10_000)
def place_of(client_address: str, trusted: UserList = NOBODY) -> str | None:
    """Return a client's place, the first number of its address: 198. or 2001:, None if it is trusted or no address.

    That is a /8 of IPv4 and a /16 of IPv6: a carrier's phones have a handful of these, a botnet is everywhere.
    """
    network = as_network(client_address)
    if network is None or trusted.line_of((), client_address):
        return None
    address = network.network_address
    return f"{address.packed[0]}." if address.version == 4 else f"{int.from_bytes(address.packed[:2], 'big'):x}:"


def signs(seen: Iterable[Sequence[Any]], known: set[str | None], trusted: UserList) -> tuple[int, int, int]:
    """Return Usage's last three figures from what was `seen` of a login, and the places that are `known` of it.

    Seen of each client's address: recipients and messages of the last hour, and the age in s of the newest message,
    also of an older one.  None is always known: no place, or a trusted one.
    """
    new = [(place, *rest) for address, *rest in seen if (place := place_of(address, trusted)) not in known]
    recipients, messages = (sum(row[n] for row in new) for n in (1, 2))
    places = {place for place, *_ in new}
    of_half_hour = {place for place, _, _, age_s in new if age_s < HALF_HOUR_S}
    # As an int: the driver may make Decimals.
    return len(of_half_hour), len(places), int(recipients) if messages >= MESSAGES_TO_JUDGE else 0


def in_office_hours(now: time.struct_time, days: tuple[int, int], hours: tuple[int, int]) -> bool:
    """Tell whether the local time `now` lies on these days (1 is Monday) and in these hours, the end excluded."""
    return days[0] <= now.tm_wday + 1 <= days[1] and hours[0] <= now.tm_hour < hours[1]


# ---- storage: events in, usages out; two stores with the same methods ------------------------------------------
#
# Both can insert(), tell usages(), ask() anything else, check() whether they can be used, name other problems(),
# init() and close().  All raise RepositoryUnavailable; deadlines are monotonic seconds.  The recorder's thread inserts
# and asks for the sums, one that looks for the store checks it, the housekeeper's purges and sweeps.

CONNECT_TIMEOUT_S = 1
STATEMENT_S = 2  # after which the server ends a statement itself, so that it leaves no late row behind
LATE_ROW_S = 0.2  # by so much sooner than we stop waiting, it does so, too, and none is begun any more
RACE_TRIES = 6  # two relays on two Galera nodes lose one to the other some times in a row, hardly as often
IDLE_CONNECTION_S = 60  # firewalls drop older ones in silence
PURGE_SLICE = 1000  # rows of one DELETE, for which the embedded store is locked
PATIENCE_S = 600  # for a statement for which no mail waits
KEPT_TEXT = 255  # characters of a login, sender or address that are kept: the columns of scripts/schema.sql
INCIDENTS = [f"{action} {rule}" for rule in RULES for action in ("HOLD", "REJECT")]
EVENT_COLUMNS = "ts, sasl_username, sender, client_address, recipient_count"
# Statements are in words that both stores know, in braces: {table}, {from_} (the same, read by login), {by_time} (the
# same, read by time), {login} (the column, each login apart), {of_login} (it is %(login)s), {place} (of the client),
# {now}, {age} (in s), and {since NAME}: less than so many seconds ago, some of which are told with each statement.
INSERT_INTO = f"INSERT INTO {{table}} ({EVENT_COLUMNS})"
PERIODS = {"half_hour": HALF_HOUR_S, "hour": HOUR_S, "day": DAY_S, "judge": DAYS_TO_JUDGE * DAY_S,
           **{name: f"%({name})s" for name in ("window", "lately", "keep")}}  # fmt: skip


class RepositoryUnavailable(Exception):
    """The store cannot be used now, for whatever reason: time or somebody else has to mend it."""


class TooLarge(RepositoryUnavailable):
    """The server takes no statement of this size (max_allowed_packet)."""


class Event(NamedTuple):
    """One message of one user: the columns of the table, to which the store adds `ts` by its own clock.

    Or an incident: without a sender, what it is in place of the address, and None in place of the number.
    """

    sasl_username: str
    sender: str
    client_address: str
    recipient_count: int | None


Row = tuple[int, int, Event]  # of a journal: row id (0: of none), ms since 1970, event


def run_up(logins: Sequence[str], events: Sequence[Event], left: dict[str, Usage]) -> list[Usage]:
    """Return the usages after each event, given those of the logins after the last one: `left`, which is used up.

    Computed back, because a store is asked once a batch and login, when all is in it.
    """
    if len(left) == len(logins):
        return [left[login] for login in logins]  # each of them once, as mostly
    usages = []
    for login, event in zip(reversed(logins), reversed(events)):
        usage, recipients = left[login], event.recipient_count or 0
        usages.append(usage)
        left[login] = Usage(usage.recipients - recipients, usage.of_hour - recipients, *usage[2:])
    return usages[::-1]


@functools.cache
def _connection_class() -> Any:
    """Return PyMySQL's connection, but each of its waits ends at `deadline`, and it insists on TLS if asked."""
    global pymysql
    import pymysql  # here: the embedded store needs nothing but Python

    class BoundedConnection(pymysql.connections.Connection):  # type: ignore[misc, type-arg, unused-ignore]
        deadline = idle_since = 0.0  # monotonic
        certified_name = ""  # of the server, where TLS is asked for: the host is one of its addresses
        # Anew for each packet, so that a slow server does not keep us beyond the deadline; in steps, since each new
        # limit costs the driver a system call, during which Python lets other threads in.
        _read_timeout = _write_timeout = property(
            lambda self: max(0.01, int(10 * min(self.connect_timeout, self.deadline - time.monotonic())) / 10),
            lambda self, _: None,
        )

        def _request_authentication(self) -> None:  # the next step sends the password
            if self.certified_name and not self.server_capabilities & pymysql.constants.CLIENT.SSL:  # type: ignore
                raise pymysql.OperationalError(2026, "the server offers no TLS, which dbssl_ca= asks for")
            self.host = self.certified_name or self.host
            super()._request_authentication()  # type: ignore

    return BoundedConnection


class ConnectionPool:
    """PyMySQL connections to the first server of `dbhost` that answers; one is kept for the next batch.

    One in which anything failed is not nursed.  With a deadline only one thread comes at a time: the recorder's, or,
    while that leaves the store alone, the one that looks for it.  Without a deadline any thread may come.
    """

    # For both kinds of server: each skips what is the other's.  Some begin with autocommit=0, which the driver does not
    # notice, so that nothing would ever be committed; some with a sql_mode that refuses each null sender, or another
    # character set, which PyMySQL 1.0 leaves alone.  time_zone stays as it is: the rows of an old table are in the
    # server's local time.
    INIT = "SET NAMES utf8mb4, SESSION autocommit=1, sql_mode='STRICT_ALL_TABLES'"
    LIMITS = f"/*M! , max_statement_time={STATEMENT_S} */ /*!50708 , max_execution_time={1000 * STATEMENT_S}," \
             f" lock_wait_timeout={STATEMENT_S}, innodb_lock_wait_timeout={STATEMENT_S} */"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servers = collections.deque(settings.dbhost)  # the next connection begins with the first one
        self._addresses: dict[str, list[str]] = {}  # of each server, as far as they were ever found
        self._failures: dict[str, str] = {}  # of each server the last one, for the log
        self._idle: Any = None  # the connection for the next batch

    def resolve(self) -> None:
        """Look up the servers' names, which takes as long as DNS pleases; one that is not found keeps its addresses.

        No deadline covers getaddrinfo(): so the recorder's thread, for which mail waits, never comes here.
        """
        for host, _ in self._settings.dbhost:
            try:
                found = [] if host.startswith("/") else socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                self._addresses[host] = [str(address[0]) for *_, address in found] or [host]
            except (OSError, UnicodeError) as error:
                self._failures[host] = f"{host}: {error}"

    @contextlib.contextmanager
    def connection(self, deadline: float | None = None, patience_s: float = PATIENCE_S) -> Iterator[Any]:
        """Lend a connection whose every wait ends at `deadline`.

        Without a deadline, for what no mail waits for, it is a new one, on which the server sets statements no limit.
        Every error of the driver that comes through here, whatever its class, means that the store cannot be used: a
        joining Galera node, a read-only server, a table that is gone, ...
        """
        connection, until = None, time.monotonic() + patience_s if deadline is None else deadline
        try:
            connection = self._connect(until, "") if deadline is None else self._take() or self._connect(until)
            connection.deadline = until
            yield connection
        except (pymysql.MySQLError, RepositoryUnavailable) as error:
            if connection:
                connection._force_close()  # without a word: it may be broken in any way, or in a transaction
            if deadline is not None:  # begin with the next server: this one may answer, but does not do its work
                self._servers.rotate(-1)
            is_large = error.args[:1] in ((1153,), (2006,))  # or it hangs up while we are still sending
            raise (TooLarge if is_large else RepositoryUnavailable)(str(error)) from error
        if deadline is None:
            connection.close()
        else:
            self._idle, connection.idle_since = connection, time.monotonic()

    def _take(self) -> Any:
        """Return the connection of the last batch, or None, if somebody has closed it.

        It is looked at first, because to use one, to fail and to try again may count twice.
        """
        connection, self._idle = self._idle, None
        if connection:
            poll = select.poll()  # not select(), which knows no descriptor beyond 1023
            poll.register(connection._sock, select.POLLIN)
            if time.monotonic() - connection.idle_since < IDLE_CONNECTION_S and not poll.poll(0):
                return connection
            connection.close()
        return None

    def _connect(self, deadline: float, limits: str = LIMITS) -> Any:
        """Connect to the first server that answers, with which the next connections begin."""
        for host, port in tuple(self._servers):
            for address in self._addresses.get(host, ()):
                try:
                    return self._dial(host, port, address, deadline, limits)
                except Exception as error:  # what answers there may speak anything, and PyMySQL trip over it anyhow
                    self._failures[host] = f"{host}: {error}"
            self._servers.rotate(-1)
        reasons = "; ".join(self._failures.values()) or "no address is known yet"
        if "(1045, " in reasons and re.fullmatch("(['\"]).*\\1", self._settings.dbpass):
            reasons += " (dbpass= stands in quotes, and they are taken for a part of it)"
        raise RepositoryUnavailable(reasons)

    def _dial(self, host: str, port: int | None, address: str, deadline: float, limits: str) -> Any:
        """Connect to one address of a server, in a second for each step; raises anything.

        TLS by a context of our own, made anew of the files as they are now: the driver's own ssl_ca verifies nothing.
        """
        if deadline - time.monotonic() <= LATE_ROW_S:  # else it would seem to be the one that is slow
            raise RepositoryUnavailable("no time is left, what came before it was too slow")
        settings, is_file = self._settings, host.startswith("/")
        tls = settings.tls() if settings.dbssl_ca and not is_file else None
        connection = _connection_class()(
            host="localhost" if is_file else address, port=port or settings.dbport,
            unix_socket=host if is_file else None, ssl=tls, ssl_disabled=is_file,
            user=settings.dbuser, database=settings.dbname, charset="utf8mb4",
            password=settings.dbpass.encode(),  # as text the driver would send Latin-1
            autocommit=True,  # committed before it is summed, or two relays would miss each other
            connect_timeout=min(CONNECT_TIMEOUT_S, deadline - time.monotonic()),
            init_command=self.INIT + limits, defer_connect=True,
        )  # fmt: skip
        connection.deadline = deadline
        if tls:
            connection.certified_name = settings.dbssl_name if settings.dbssl_name not in ("", "none") else host
        connection.connect()
        connection.connect_timeout = NEVER  # for a statement we wait until the deadline
        return connection

    def close(self) -> None:
        """Close the idle connection."""
        if self._idle:
            self._idle.close()


CODECS = {"utf8mb4": "utf-8", "latin1": "cp1252"}  # MariaDB's latin1 is cp1252; of the others we use ASCII


def fit(text: str, column: tuple[int, str]) -> str:
    """Return `text` as a CHAR column gives it back: escaped, cut, and without spaces at its end.

    Both what is inserted and what is asked for goes through here: so nothing is ever refused for not fitting, no odd
    login spoils the statement of all, and logins that an old table cuts to the same share a quota.
    """
    width, codec = column
    return text.encode(codec, "backslashreplace").decode(codec)[:width].rstrip(" ")


def _query(connection: Any, statement: str, arguments: object = None) -> list[Any]:
    """Run one statement; return its rows, or the number of those it changed as one; raises pymysql.MySQLError.

    Raises RepositoryUnavailable if it could come in late, beside its journaled copy.
    """
    if connection.deadline - time.monotonic() <= LATE_ROW_S:
        raise RepositoryUnavailable("the database is too slow")
    with connection.cursor() as cursor:
        changed = cursor.execute(statement, arguments or None)
        return list(cursor.fetchall()) if cursor.description else [(changed,)]


# Rows refused for their own sake, whatever class the driver gives them: CHECK (2 servers), SIGNAL, no default, no NULL.
REFUSALS = 4025, 3819, 1644, 1364, 1048
# What has certainly done nothing, and may do better: deadlock or Galera conflict, record has changed since (both rolled
# back), no such index any more.  Not a time-out or 1205, a lock wait: the statement may come to its end all the same.
RETRIED = 1213, 1020, 1176


def _usage_of(found: str) -> tuple[Usage, int]:
    """Return what the database has FOUND, and what was recorded; bit 0 stands for no incident, the others for one."""
    recipients, of_hour, recorded, kinds = map(int, found.split())
    incidents = frozenset(what for n, what in enumerate(INCIDENTS, 1) if kinds >> n & 1) if kinds else NOTHING.incidents
    return Usage(recipients, of_hour, incidents), recorded


class MariaDBRepository:
    """The events in a table of MariaDB or MySQL: that of scripts/schema.sql, or go-policyd's as it is."""

    TEXT = "VARCHAR({}) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT ''"
    COLUMNS = (
        "`ts` DATETIME(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3)", f"`sasl_username` {TEXT.format(255)}",
        f"`sender` {TEXT.format(255)}", f"`client_address` {TEXT.format(80)}", "`recipient_count` INT DEFAULT NULL",
    )  # fmt: skip
    PRIMARY = "PRIMARY KEY (`ts`, `sasl_username`, `sender`, `client_address`)"
    KEY = "KEY `login_ts` (`sasl_username`, `ts`, `recipient_count`)"
    CHARSET = "DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin"
    CREATE = f"CREATE TABLE IF NOT EXISTS `{{table}}` ({', '.join(COLUMNS)}, {PRIMARY}, {KEY}) ENGINE=InnoDB {CHARSET}"
    UPGRADE = f"ALTER TABLE `{{table}}` MODIFY {', MODIFY '.join(COLUMNS)}, {CHARSET}"
    # Of the three texts, then of all else; with each the index by which a login is found, if there is one, and whether
    # it must not be used, as each kind of server says that.
    FACTS = (
        "SELECT character_maximum_length, character_set_name, collation_name, serving, is_hidden, facts.*"
        " FROM information_schema.columns AS facts LEFT JOIN (SELECT index_name AS serving,"
        " MAX(/*M!100600 ignored = 'YES' OR */ /*!80000 is_visible = 'NO' OR */ FALSE) AS is_hidden"
        " FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = %(table)s"
        " AND (seq_in_index, column_name) IN ((1, 'sasl_username'), (2, 'ts'))"
        " GROUP BY index_name HAVING COUNT(*) = 2 ORDER BY is_hidden LIMIT 1) AS indexes ON TRUE"
        " WHERE table_schema = DATABASE() AND table_name = %(table)s"
        " ORDER BY FIELD(column_name, 'client_address', 'sender', 'sasl_username') DESC, ordinal_position"
    )
    # From here on in words.  Two messages of one millisecond add up; ts = ts, because go-policyd's table would move it.
    INSERT = f"{{limit}} {INSERT_INTO}"
    LIMIT = "/*M! SET STATEMENT max_statement_time={:.6f} FOR */"  # MySQL waits for locks only, and these have a limit
    ADD_UP = "ON DUPLICATE KEY UPDATE recipient_count = COALESCE(recipient_count, 0) + VALUES(recipient_count), ts = ts"
    # A relay's clock may be ahead, even of what FROM_UNIXTIME knows; nobody is to be held until next month for that.
    THEN = "LEAST(FROM_UNIXTIME(LEAST({}, 2147483647000) / 1000), CURRENT_TIMESTAMP(3))"
    NO_ROW = f"SELECT {{now}}, '', '', '', 0 FROM DUAL WHERE EXISTS (SELECT 1 FROM {{from_}} WHERE FALSE) {ADD_UP}"
    NOW = "CURRENT_TIMESTAMP(3)"  # of the database: one clock for all relays
    AGE = "TIMESTAMPDIFF(MICROSECOND, ts, CURRENT_TIMESTAMP(3)) / 1e6"
    PLACE = "IF(LEFT(client_address, 8) = '64:ff9b:', client_address," \
            " SUBSTRING_INDEX(SUBSTRING_INDEX(TRIM(LEADING '::ffff:' FROM client_address), '.', 1), ':', 1))"
    BINARY = "CONVERT(sasl_username USING utf8mb4) COLLATE utf8mb4_bin"  # equal only if it is
    # The recipients of the day and of the hour (what is below 0 was forgiven), all that were recorded, and incidents as
    # bits: a scan of the index tells them; GROUP_CONCAT takes ten times as long, and MAX would hide one incident behind
    # the other.  As one text, since for each column the driver takes as long as the server for a hundred rows; of
    # doubles (0e0), since to add up decimals takes a quarter of a long scan.
    OF_HOUR = "COALESCE(SUM(IF({since hour}, GREATEST(recipient_count, 0e0), 0)), 0)"  # a third of the scan's time
    FOUND = (
        f"CONCAT_WS(' ', COALESCE(SUM(GREATEST(recipient_count, 0e0)), 0), {OF_HOUR},"
        " COALESCE(SUM(ABS(recipient_count) + 0e0), 0), BIT_OR(CASE WHEN recipient_count IS NULL"
        f" THEN 1 << FIND_IN_SET(client_address, '{','.join(INCIDENTS)}') END))"
    )
    # Of many logins at once, which takes 11 us for each, and 83 in a subselect of its own.  The column's collation may
    # find more logins than were asked for.
    SUMS = (f"SELECT {{login}} AS login, {FOUND} FROM {{from_}} WHERE sasl_username IN %(logins)s AND {{since day}}"
            " GROUP BY login")  # fmt: skip
    # Of one login's newest rows, so that a long history costs no more than a short one; that may hide older incidents.
    NEWEST = (
        f"SELECT {FOUND} FROM (SELECT ts, client_address, recipient_count FROM {{from_}} WHERE {{of_login}} AND"
        " {since day} AND (recipient_count > 0 OR recipient_count IS NULL) ORDER BY ts DESC LIMIT %(rows)s) AS newest"
    )
    PURGE = "DELETE FROM {table} WHERE NOT {since keep} ORDER BY ts LIMIT %(rows)s"

    def __init__(self, settings: Settings) -> None:
        _connection_class()  # a driver that is missing is missed at the start
        self._settings, self._name = settings, settings.policy_table
        self._pool = ConnectionPool(settings)
        self.resolve, self.close = self._pool.resolve, self._pool.close
        self._next_look = 0.0  # at the table; all else is as it was last seen, _columns and _words, too
        self.index_remedy = "run policyd --init-db"  # for the index that finds a login's events; empty: it is there
        self._long: dict[str, frozenset[str]] = {}  # logins past all limits at this look, and their incidents

    def __str__(self) -> str:
        return f"table {self._name} of MariaDB database {self._settings.dbname}"

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        """Commit `events` as of now, or as of `times` (ms since 1970); return the positions of those refused.

        Equal ones a millisecond apart, so that each is a row of its own: an early sign counts messages, and not only
        recipients; and the primary key is all but the number.  Where a row is refused for its own sake we close in on
        it by halves, since a statement for each row would take too long.
        """
        rows: list[tuple[int, str, Event]] = []  # position, what is in its place in the statement, event
        equal: dict[object, int] = {}  # of each kind how many came before
        for when, event in zip(times or itertools.repeat(None), events):
            moment, what = self.NOW if when is None else self.THEN.format(when), (when, event[:3])
            before = equal[what] = equal.get(what, -1) + 1
            sooner = f" - INTERVAL {1000 * before} MICROSECOND" if before else ""
            rows.append((len(rows), f"({moment}{sooner}, %s, %s, %s, %s)", event))
        with self._pool.connection(deadline) as connection:
            refused = {} if times else self._insert(connection, rows, RACE_TRIES)
            # In a transaction, what takes several statements, so that a failure on the way leaves no half behind; and a
            # replay: it is tried again and again, and what a slow server still does when we have left must not stay.
            if times or refused:
                self._next_look = 0.0  # the table may have been altered since it was looked at
                connection.begin()
                refused = self._insert(connection, rows, 1)
                _query(connection, "COMMIT")
        for n, error in refused.items():
            log.error(f"ERROR while UPDATING db: {error}; not counted: {'/'.join(map(str, events[n]))}")
        return set(refused)

    def _insert(self, connection: Any, rows: Sequence[tuple[int, str, Event]], tries: int) -> dict[int, Exception]:
        """Insert rows in one statement; return which of them the database refuses, and why; of several tries the first.

        Raises pymysql.MySQLError for anything else, which is an outage, and no reason to drop a row.
        """
        self._look(connection)
        values = [value for *_, event in rows for value in (*map(fit, event[:3], self._columns), event.recipient_count)]
        words = ", ".join(each for _, each, _ in rows)
        try:
            self._ask(connection, f"{self.INSERT} VALUES {words} {self.ADD_UP}", values, tries)
        except pymysql.MySQLError as error:
            if not isinstance(error, (pymysql.DataError, pymysql.IntegrityError)) and error.args[0] not in REFUSALS:
                raise
            if tries > 1 or len(rows) == 1:
                return {rows[0][0]: error}
            middle = len(rows) // 2  # the second half first: its equal rows must not fall on newer ones
            return {**self._insert(connection, rows[middle:], 1), **self._insert(connection, rows[:middle], 1)}
        return {}

    def usages(self, events: Sequence[Event], settings: Settings, deadline: float) -> list[Usage]:
        """Return, for each of the `events` just inserted, what its login had used with it.

        Of a long history only the newest rows are asked for: the sum of 200,000 takes up to 85 ms, for which all others
        would wait.  Its older incidents are those of the minute's beginning; whoever ends one waits as long.
        """
        newest, sums = (text if settings.needs_hour else text.replace(self.OF_HOUR, "0")
                        for text in (self.NEWEST, self.SUMS))  # fmt: skip
        rows: dict[str, int] = {}  # of each: so many of its newest events decide; several may be cut to one
        unseen: dict[str, int] = {}  # of each login: recipients that were inserted, and that no answer has shown yet
        with self._pool.connection(deadline) as connection:
            self._look(connection)
            column, long = self._columns[0], self._long
            logins = [fit(event.sasl_username, column) for event in events]
            for login, event in zip(logins, events):
                rows[login] = max(settings.limits_of(event.sasl_username).rows, rows.get(login, 0))
                unseen[login] = unseen.get(login, 0) + (event.recipient_count or 0)
            totals = dict.fromkeys(rows, NOTHING)
            for login in long.keys() & rows:
                words = {"login": login, "rows": rows[login] + BATCH_EVENTS}  # incidents are among them, too
                ((figures,),) = self._ask(connection, newest, words)
                found, _ = _usage_of(figures)
                if found.recipients < rows[login]:
                    del long[login]  # it was forgiven
                    continue
                totals[login] = found._replace(incidents=found.incidents | long[login])
                del unseen[login]
            for name, figures in self._ask(connection, sums, {"logins": [*unseen]}) if unseen else ():
                if (login := name.rstrip(" ")) not in unseen:  # but like it for the column's collation
                    continue
                found, recorded = _usage_of(figures)
                totals[login] = found
                unseen[login] -= recorded
                if found.recipients >= rows[login] and not self.index_remedy:
                    long[login] = found.incidents
        # What is committed and not there was read elsewhere: from a replica, which lags for more logins than we see.
        # Whoever was forgiven meanwhile is no such case: that was recorded all the same.
        if max(unseen.values(), default=0) > 0:
            raise RepositoryUnavailable("the server does not show what it has just stored: send policyd to the primary")
        return run_up(logins, events, totals)

    def ask(self, statement: str, arguments: Mapping[str, object], deadline: float | None = None) -> list[Any]:
        """Run a statement in words that both stores know; return its rows, or [(rows changed,)].  For any thread.

        Without a deadline on a connection of its own, for ten minutes at most.
        """
        with self._pool.connection(deadline) as connection:
            self._look(connection)
            login = fit(str(arguments.get("login", "")), self._columns[0])
            return self._ask(connection, statement, {**arguments, "login": login})

    def _ask(self, connection: Any, statement: str, arguments: object, tries: int = RACE_TRIES) -> list[Any]:
        """Run a statement in words, and again where that is safe and promising.

        Once only in a transaction: a deadlock rolls back all of it.
        """
        self._look(connection)
        left_s = connection.deadline - time.monotonic() - LATE_ROW_S
        # A batch that has just begun does with the session's; a move of the embedded store has a day.
        limit = "" if STATEMENT_S <= left_s < 2 * STATEMENT_S else self.LIMIT.format(left_s)
        try:
            return _query(connection, statement.format(**self._words, limit=limit), arguments)
        except pymysql.MySQLError as error:
            if tries == 1 or error.args[0] not in RETRIED:
                raise
        self._next_look = 0.0
        return self._ask(connection, statement, arguments, tries - 1)

    def check(self, patience_s: float) -> str:
        """Return one line on the store, once it has been seen that events can be inserted and read: none are.

        A server may answer and be read only, or have lost the table: then it is not back, and the next one is tried.
        The servers' names are looked up first, for which patience does not count.
        """
        self.resolve()
        self._next_look = 0.0
        self.ask(f"{self.INSERT} {self.NO_ROW}", {}, time.monotonic() + patience_s)
        index = "index on (sasl_username, ts)"
        if self.index_remedy:
            index = f"NO {index}: slow when it is large; {self.index_remedy}"
            log.warning(f"{self}, {index}")
        return f"{self}, logins of up to {self._columns[0][0]} characters, {index}"

    def problems(self, deadline: float) -> list[str]:
        """Return what else is missing, once check() has found that events can be counted; the daemon goes on without.

        caching_sha2_password needs the module only until the server remembers the login, that is, after its next start.
        """
        found = [f"{self.index_remedy}: sums are slow without it"] if "INVISIBLE" in self.index_remedy else []
        with self._pool.connection(deadline) as connection:
            needs_key = "caching_sha2_password" in str(_query(connection, "SHOW CREATE USER CURRENT_USER()"))
            is_secure = connection._secure or not connection.password or importlib.util.find_spec("cryptography")
        if needs_key and not is_secure:
            found.append("python3-cryptography is missing: without it, or dbssl_ca=, this login works only until"
                         " the server is started again")  # fmt: skip
        try:
            self.ask(self.PURGE, {"keep": 36_500 * DAY_S, "rows": 0}, deadline)
        except RepositoryUnavailable as error:
            grant = f"GRANT DELETE ON `{self._settings.dbname}`.`{self._name}` TO '{self._settings.dbuser}'@..."
            found.append(f"old events cannot be deleted: {error}; try: {grant}")
        return found

    def init(self) -> str:
        """Create or upgrade the table; return one line on what was done."""
        self.resolve()
        with self._pool.connection(patience_s=DAY_S) as connection:
            look = functools.partial(_query, connection, self.FACTS, {"table": self._name})
            before = look()
            if not before:
                _query(connection, self.CREATE.format(table=self._name))
                return f"created {self}"
            key = "" if before[0][3] else f", ADD {self.KEY}"
            _query(connection, self.UPGRADE.format(table=self._name) + key)
            if look() == before:
                return f"{self} is up to date"
            return f"upgraded {self}: wide columns of any character, index on (sasl_username, ts)"

    def _look(self, connection: Any) -> None:
        """Look at the table, if that was not done within a minute: it may be upgraded under us.  For any thread.

        Raises RepositoryUnavailable if it is not there; of a column that is not, the INSERT complains.
        """
        if time.monotonic() < self._next_look:
            return
        facts = _query(connection, self.FACTS, {"table": self._name})
        if not facts:
            raise RepositoryUnavailable(f"there is no {self}; create it with policyd --init-db")
        # Of the three texts: width in characters, and Python codec.
        self._columns = [(width or KEPT_TEXT, CODECS.get(charset, "ascii")) for width, charset, *_ in facts[:3]]
        *_, collation, key, is_hidden = facts[0][:5]
        login = "sasl_username" if collation == "utf8mb4_bin" else self.BINARY
        remedy = f"index {key} is IGNORED (MariaDB) or INVISIBLE (MySQL)" if is_hidden else "run policyd --init-db"
        self.index_remedy = "" if key and not is_hidden else remedy
        table, force_index = f"`{self._name}`", "" if self.index_remedy else f"FORCE INDEX (`{key}`)"
        self._words = {  # what those of the statements mean here
            "table": table, "from_": f"{table} {force_index}", "by_time": f"{table} FORCE INDEX (PRIMARY)",
            "login": login, "of_login": f"sasl_username = %(login)s AND {login} = %(login)s",
            "place": self.PLACE, "now": self.NOW, "age": self.AGE,
            **{f"since {name}": f"ts > {self.NOW} - INTERVAL {seconds} SECOND" for name, seconds in PERIODS.items()},
        }  # fmt: skip
        self._long, self._next_look = {}, time.monotonic() + MINUTE_S


class SQLiteRepository:
    """The events in a file of our own: for a single relay without a database server, and for the outage journal.

    Each thread has a connection of its own; in a WAL, whoever reads delays nobody who writes.
    """

    # ts in ms since 1970, UTC; the rest as in MariaDBRepository.
    SCHEMA = """
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = FULL;  -- what was answered stays counted after a power cut
        CREATE TABLE IF NOT EXISTS events (ts INTEGER NOT NULL, sasl_username TEXT NOT NULL, sender TEXT NOT NULL,
            client_address TEXT NOT NULL, recipient_count INTEGER);
    """
    more_schema = """  -- a journal has other needs
        CREATE INDEX IF NOT EXISTS login_ts ON events (sasl_username, ts, recipient_count, client_address);
        CREATE INDEX IF NOT EXISTS incidents ON events (sasl_username, ts, client_address)
            WHERE recipient_count IS NULL;
    """
    WORDS: ClassVar[dict[str, str]] = {
        "table": "events", "from_": "events", "by_time": "events", "login": "sasl_username", "now": ":now",
        "of_login": "sasl_username = :login", "place": "place(client_address)", "age": "((:now - ts) / 1000.0)",
        **{f"since {name}": f"ts > :now - 1000 * {seconds}" for name, seconds in PERIODS.items()},
    }  # fmt: skip
    INSERT = f"INSERT INTO events ({EVENT_COLUMNS}) VALUES (?, ?, ?, ?, ?)"
    USAGE = (
        "SELECT coalesce(sum(recipient_count), 0), coalesce(sum(recipient_count * ({since hour})), 0),"
        " (SELECT group_concat(DISTINCT client_address) FROM events INDEXED BY incidents"  # else all are read
        " WHERE {of_login} AND {since day} AND recipient_count IS NULL)"
        " FROM (SELECT ts, recipient_count FROM events WHERE {of_login} AND {since day} AND recipient_count > 0"
        " ORDER BY ts DESC LIMIT :rows)"
    ).format(**WORDS)
    FIRST = f"SELECT rowid, {EVENT_COLUMNS} FROM events ORDER BY rowid LIMIT ?"
    index_remedy = ""  # there is one
    OLDEST = "SELECT rowid FROM {table} NOT INDEXED WHERE NOT {since keep} LIMIT %(rows)s"  # the first ones in the file
    PURGE = f"DELETE FROM {{table}} WHERE rowid IN ({OLDEST})"

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._connections: dict[int, sqlite3.Connection] = {}  # of each thread
        self._opened: os.stat_result | None = None  # the file of this name that was opened last

    def __str__(self) -> str:
        return f"embedded store {self.path}"

    def now_ms(self) -> int:
        """Return the time in ms since 1970."""
        return int(self._clock() * 1000)

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        """See MariaDBRepository; nothing is ever refused."""
        now = self.now_ms()  # never later: the clock may have been ahead
        rows = [(min(ts, now), *event) for ts, event in zip(times or [now] * len(events), events)]
        with self._connection() as connection:
            connection.executemany(self.INSERT, rows)
        return set()

    def usages(self, events: Sequence[Event], settings: Settings, deadline: float) -> list[Usage]:
        """See MariaDBRepository."""
        logins = [event.sasl_username for event in events]
        totals, now = {}, self.now_ms()
        with self._connection() as connection:
            for login in dict.fromkeys(logins):
                words = {"login": login, "rows": settings.limits_of(login).rows, "now": now}
                recipients, of_hour, incidents = connection.execute(self.USAGE, words).fetchone()
                totals[login] = Usage(recipients, of_hour, frozenset(incidents.split(",") if incidents else ()))
        return run_up(logins, events, totals)

    def ask(self, statement: str, arguments: Mapping[str, object], deadline: float | None = None) -> list[Any]:
        """See MariaDBRepository."""
        text = re.sub(r"%\((\w+)\)s", r":\1", statement.format(**self.WORDS))
        with self._connection() as connection:
            cursor = connection.execute(text, {**arguments, "now": self.now_ms()})
            return cursor.fetchall() if cursor.description else [(cursor.rowcount,)]

    def check(self, patience_s: float = 0) -> str:
        """See MariaDBRepository."""
        with self._connection() as connection:
            connection.execute("PRAGMA user_version = 1")  # the least that can be written: it finds a full disk
        return str(self)

    def problems(self, deadline: float) -> list[str]:
        """See MariaDBRepository."""
        return []

    def init(self) -> str:
        """See MariaDBRepository."""
        return f"{self.check()} is ready"

    def first(self, limit: int = -1) -> Iterator[Row]:
        """Yield the first events, or all: one by one, since a million take half a gigabyte at once."""
        with self._connection() as connection:
            for number, ts, *event in connection.execute(self.FIRST, [limit]):
                types = [type(value) for value in (ts, *event[:3], event[3] or 0)]
                if types != [int, str, str, str, int]:  # the disk has lost a sector, and SQLite does not look
                    raise sqlite3.DatabaseError("a row is broken")
                yield number, ts, Event(*event)

    def forget(self, upto: int) -> None:
        """Delete the events up to and with row id `upto`; an empty file gives its room back, which may be a lot."""
        self.ask("DELETE FROM events WHERE rowid <= %(upto)s", {"upto": upto})
        if not list(self.first(1)):
            with contextlib.suppress(RepositoryUnavailable):  # no room: another time
                self.ask("VACUUM", {})
                self.ask("PRAGMA wal_checkpoint(TRUNCATE)", {})

    def is_gone(self) -> bool:
        """Tell whether another file, or none, is where the opened one was: what is written there is lost at the end.

        Out of our reach is not gone: what has been written stays there, and is not in memory only.
        """
        try:
            return self._opened is not None and not os.path.samestat(self._opened, os.stat(self.path))
        except OSError as error:
            return error.errno == errno.ENOENT

    def leave(self) -> list[Row]:
        """Leave a file that is gone; return what is in it, if it is open."""
        rows: list[Row] = []
        if threading.get_ident() in self._connections:
            with contextlib.suppress(RepositoryUnavailable):
                rows = list(self.first())
                self.ask("DELETE FROM events", {})  # should it come back
        self._leave()
        self._opened = None
        return rows

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, in a transaction: committed at the end, or rolled back and thrown away."""
        me = threading.get_ident()
        try:
            if me not in self._connections:
                # It waits for a slice of the purge, or for policyd-admin: that is no outage.
                self._connections[me] = sqlite3.connect(self.path, timeout=1, check_same_thread=False)
                self._connections[me].create_function("place", 1, place_of)
                self._connections[me].executescript(self.SCHEMA + self.more_schema)
                self._opened = os.stat(self.path)
            with self._connections[me] as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            self._leave()
            raise RepositoryUnavailable(f"{self.path}: {error}") from error

    def _leave(self) -> None:
        if connection := self._connections.pop(threading.get_ident(), None):
            connection.close()

    def close(self) -> None:
        """Close the connections of this thread and of those that have ended: of one in use SQLite would crash."""
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        for thread in self._connections.keys() - others:
            self._connections[thread].close()


Repository = Union[MariaDBRepository, SQLiteRepository]


def open_repository(settings: Settings) -> Repository:
    """Return the store that the settings name, without touching it yet."""
    return MariaDBRepository(settings) if settings.dbname else SQLiteRepository(settings.state_file("events.sqlite3"))


# ---- watch: what is asked beyond the sums, of the few for whom it matters ------------------------------------

EARLY_FLOOR = 40  # recipients of an hour below which nobody's places are looked at in the path
KNOWN_S = 600  # for how long is remembered what is known of logins
NEWEST_ROWS = 2000  # of a login's hour in which its places are looked for in the path
HISTORY_ROWS = 20_000  # of its day, and of its days before


class Watch:
    """Looks for the early signs of a thief, and remembers since when an incident holds a login's mail.

    In the path, before the answer, of the few logins that send enough to be worth it; and, in a sweep each minute, of
    all that have sent, since a slow botnet never sends enough at a time.  Nothing is judged before the table remembers
    some days, on the first of which everything is new, nor in an outage, when nobody knows what is.
    """

    # The newest rows are found by the index, however long a history is.  Those of the day and those before it are
    # limited apart, or a thief's messages of today would crowd out where the login has been at home for weeks.
    NEWEST = "SELECT ts, client_address, recipient_count FROM {from_} WHERE {of_login} AND"
    NEWEST_FIRST = "ORDER BY ts DESC LIMIT %(rows)s"
    SIGHTINGS = (
        "SELECT client_address, SUM(recipient_count * ({since hour})), SUM({since hour}), MIN({age})"
        f" FROM ({NEWEST} {{since window}} AND recipient_count > 0 {NEWEST_FIRST}) AS newest GROUP BY client_address"
    )
    HISTORY = (  # what was used (0), what was forgiven (1) and what has happened (None), with the age of the first time
        "SELECT client_address, recipient_count < 0, MAX({age})"
        f" FROM (SELECT * FROM ({NEWEST} {{since day}} {NEWEST_FIRST}) AS today"
        f" UNION ALL SELECT * FROM ({NEWEST} {{since keep}} AND NOT {{since day}} {NEWEST_FIRST}) AS earlier"
        ") AS newest GROUP BY 1, 2"
    )
    SINCE = "SELECT client_address, {age} FROM {from_} WHERE {of_login} AND {since day} AND recipient_count IS NULL"
    CAN_JUDGE = "SELECT 1 FROM {table} WHERE {since keep} AND NOT {since judge} LIMIT 1"
    # Of those that have sent lately, since places grow by sending only: 0.4 s for a million rows, and 10 s by the
    # server's own plan.  A derived table, since MySQL would flatten IN (SELECT ...).  The places are counted in a rough
    # way (an IPv6 address has many spellings); signs() then looks at each candidate exactly.
    CANDIDATES = (
        "SELECT {login} AS login, SUM(recipient_count)"
        " FROM (SELECT DISTINCT sasl_username AS who FROM {by_time} WHERE {since lately}) AS recent"
        " JOIN {from_} ON sasl_username = who WHERE {since day} AND recipient_count > 0"
        " GROUP BY {login} HAVING COUNT(DISTINCT {place}) > 3 * %(places)s"
        " OR COUNT(DISTINCT CASE WHEN {since half_hour} THEN {place} END) > %(places)s"
    )
    UNLESS_HELD = (  # for a day anyhow; by a sweep of another relay perhaps, that was faster
        " SELECT {now}, %(login)s, '', %(incident)s, NULL FROM (SELECT 1 AS one) AS once WHERE NOT EXISTS (SELECT 1"
        " FROM {from_} WHERE {of_login} AND {since day} AND recipient_count IS NULL"
        f" AND client_address IN ({str(INCIDENTS[: 2 * len(LASTING)])[1:-1]}))"
    )

    def __init__(self, repository: Repository, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = repository  # without a deadline it is asked by another thread than the recorder's, which may wait
        self._clock = clock
        self._can_judge = False  # has the table events that are old enough?
        self._known: dict[str, set[str | None]] = {}  # of a login: its places
        self._since: dict[str, dict[str, float]] = {}  # of a login: since when each rule holds its mail
        self._forget_at = 0.0  # both of them

    def look(self, events: Sequence[Event], usages: Sequence[Usage], settings: Settings,
             deadline: float | None) -> list[Usage]:  # fmt: skip
        """Return the usages with what only a closer look tells; without a deadline, in an outage, nothing is asked."""
        if deadline is not None and self._clock() >= self._forget_at:
            self._known, self._since, self._forget_at = {}, {}, self._clock() + KNOWN_S
        figures: dict[str, tuple[int, int, int]] = {}  # of those that were looked at: one look a batch
        return [self._look_at(event, usage, settings, deadline, figures) for event, usage in zip(events, usages)]

    def _since_when(self, login: str, rule: str, deadline: float | None) -> float:
        """Return when the incident began that holds a login, in s since 1970; at worst, when it was first seen."""
        since = self._since.setdefault(login, {})
        if rule not in since:
            kinds = self._store.ask(self.SINCE, {"login": login}, deadline) if deadline is not None else []
            since[rule] = time.time() - max((age_s for kind, age_s in kinds if kind.endswith(rule)), default=0.0)
        return since[rule]

    def _look_at(self, event: Event, usage: Usage, settings: Settings, deadline: float | None,
                 figures: dict[str, tuple[int, int, int]]) -> Usage:  # fmt: skip
        """Look for signs if a message comes from a place not known, of a login that sends enough to be worth it.

        Only below its quota: beyond that this decides anyhow, and one hot account there would have everybody wait for
        it.  What is known is remembered, since to ask it for each message of 2000 busy logins would cost half of the
        speed; but it is asked anew before a hold: perhaps the login was forgiven.
        """
        login, trusted = event.sasl_username, settings.trusted_network
        if usage.incidents and (rule := usage.lasting()):
            return usage._replace(since=self._since_when(login, rule, deadline))
        self._since.pop(login, None)  # whatever held it was forgiven
        if deadline is None or not self._can_judge:
            return usage
        limits = settings.limits_of(login, login)
        is_much = usage.of_hour >= min(EARLY_FLOOR, limits.new_place_quota) and usage.recipients < limits.hold_at
        if not (is_much and limits.early_signs):
            return usage
        known = self._known[login] = self._known.get(login) or self.known_places(login, settings, deadline)
        if place_of(event.client_address, trusted) in known:  # None, which is no place, is
            return usage
        if login not in figures:
            seen = self._store.ask(self.SIGHTINGS, {"login": login, "window": HOUR_S, "rows": NEWEST_ROWS}, deadline)
            figures[login] = signs(seen, known, trusted)
            rule = decide(Usage(*usage[:4], *figures[login]), limits).rule
            if rule in LASTING and not only_audits(settings, rule):  # an audit would ask for each message to come
                known = self._known[login] = self.known_places(login, settings, deadline)
                figures[login] = signs(seen, known, trusted)
        return Usage(*usage[:4], *figures[login])

    def known_places(self, login: str, settings: Settings, deadline: float | None) -> set[str | None]:
        """Return the places that are known of a login: used more than a day ago, or forgiven.

        After an incident of this kind that nobody has forgiven, more than a day before it: else the thief's places
        would be known the next day.  None, which is no place, always is.
        """
        keep = settings.keep_days * DAY_S
        history = self._store.ask(self.HISTORY, {"login": login, "keep": keep, "rows": HISTORY_ROWS}, deadline)
        held = [age_s for what, is_forgiven, age_s in history if is_forgiven is None and what.endswith(LASTING[1:])]
        long_ago = DAY_S + max(held, default=0.0)
        return {None, *(place_of(address, settings.trusted_network) for address, is_forgiven, age_s in history
                        if is_forgiven or (is_forgiven == 0 and age_s >= long_ago))}  # fmt: skip

    def sweep(self, settings: Settings, lately_s: float) -> Iterator[tuple[str, Verdict, int]]:
        """Yield, with the day's recipients, who has been in too many places in half an hour or a day.

        Of those that have sent within `lately_s`; logins whose mail is held already are left out, and audit records
        nothing.  To be called in a thread of its own.
        """
        self._can_judge = bool(self._store.ask(self.CAN_JUDGE, {"keep": settings.keep_days * DAY_S}))
        if not self._can_judge or not settings.max_places:
            return
        limits = Limits(NEVER, NEVER, places=settings.max_places)
        for login, recipients in self._store.ask(self.CANDIDATES, {"lately": lately_s, "places": settings.max_places}):
            if not self._store.ask(self.UNLESS_HELD, {"login": login, "incident": ""}):
                continue  # known before it is looked at: who is forgiven meanwhile must not be held anew
            seen = self._store.ask(self.SIGHTINGS, {"login": login, "window": DAY_S, "rows": HISTORY_ROWS})
            figures = signs(seen, self.known_places(login, settings, None), settings.trusted_network)
            verdict = decide(Usage(0, 0, frozenset(), 0.0, *figures), limits)
            words = {"login": login, "incident": verdict.incident}
            if verdict is PASSED:
                continue
            if only_audits(settings, verdict.rule) or self._store.ask(INSERT_INTO + self.UNLESS_HELD, words)[0][0]:
                yield login, verdict, int(recipients)


# ---- recorder: group commit and outage journal; it knows neither SQL nor Postfix -----------------------------

BATCH_DEADLINE_S = 2.8  # for a batch from the arrival of its oldest event: whoever waits has an answer within 3 s
LEAST_LEFT_S = 0.5  # of it: a batch that begins with less goes to the journal
RETRY_DELAYS_S = (1, 15)  # between two looks for a database that is away: the first, twice as long each time, the last
PAUSE_S = 0.2  # of a recorder with nothing to do: so late it sees a store found, or our end; and of a purge
REPLAY_SLICE = 500  # rows of the journal that one INSERT takes between two batches
SPARE_BYTES = 256 << 10  # that the journal leaves free: from a disk that is full of it nothing could be moved
LAST_KNOWN_LOGINS = 100_000
NOT_YET_KNOWN = "it is still being looked for"  # the reason of an outage, until the first look tells a better one
OnUsage = Callable[[Optional[Usage]], None]
Waiting = tuple[Event, OnUsage, float]  # with the time of its arrival


class LastKnown:
    """What a store was last seen to have of each login, and has got since: of a day, of at most 100,000 logins.

    By this whoever is held stays held in an outage.  A restart forgets it: a login then has its whole quota once more,
    as far as the journal knows no better.  Times are in ms, always of the same clock.
    """

    def __init__(self) -> None:
        # What, by when.  (A dict that loses its first key is slow to find the next.)
        self._usages: collections.OrderedDict[str, dict[int, Usage]] = collections.OrderedDict()

    def put(self, login: str, usage: Usage, now: int) -> None:
        """Remember what was used."""
        self._usages[login] = {now: usage}
        self._usages.move_to_end(login)
        while len(self._usages) > LAST_KNOWN_LOGINS:
            self._usages.popitem(last=False)

    def grow(self, rows: Iterable[Row], sign: int = 1) -> int:
        """Add events, or take them away again, by the minute: who sends all day shall not be a long list.

        Return their number.
        """
        number = 0
        for _, ms, event in rows:
            number += 1
            minute = -(-ms // 60_000) * 60_000  # its end: rather too hard for a minute than too soft
            known = self._usages.setdefault(event.sasl_username, {})
            more = sign * (event.recipient_count or 0)
            incidents = frozenset([event.client_address]) if event.recipient_count is None else NOTHING.incidents
            known[minute] = known.get(minute, NOTHING).plus(Usage(more, more, incidents))
        return number

    def get(self, login: str, now: int) -> Usage:
        """Return what was used, as far as it is known and not too old."""
        total = NOTHING
        for ms, usage in self._usages.get(login, {}).items():
            if now - ms < DAY_S * 1000:
                total = total.plus(usage if now - ms < HOUR_S * 1000 else usage._replace(of_hour=0))
        return total


class Journal:
    """Events that the store could not take: in a file, or in memory while that cannot be written.

    An event waits here until the store has committed it.  A crash in between, a connection lost in the middle of an
    INSERT, or a frozen server that wakes up may count one slice twice, not more: no other slice is moved before the
    last one is deleted.  Nothing is counted zero times: unreadable is not empty.

    Whatever is wrong with the file is tried again every minute and at the end, and not with each event: a disk that
    fails may take its time.  What waits is known in memory, too, so that no sum asks the file.  Only the recorder's
    thread comes here; the others may look at `trouble` and `waiting`.
    """

    def __init__(self, file: SQLiteRepository, clock: Callable[[], float] = time.monotonic) -> None:
        # It is read from its beginning only: without indexes it is written four times as fast.  And a small disk shall
        # hold it: SQLite's usual log of writes may fill that alone, and to overwrite what is deleted takes room, too.
        # Nor shall a second fault at the same time, somebody who locks it, delay an answer.
        file.more_schema = "PRAGMA wal_autocheckpoint = 32; PRAGMA secure_delete = OFF; PRAGMA busy_timeout = 100"
        self._file = file
        self._clock = clock
        self.path, self.now_ms, self.close = file.path, file.now_ms, file.close
        self._directory = os.path.dirname(file.path) or "."
        self.kept: list[Row] = []  # in memory only: what the file could not take
        self._in_file: int | None = None  # events that wait there; None: not seen yet, or unreadable (`trouble`)
        self._moved = -1  # row id up to which the store has all, still to be deleted; -1: perhaps nothing can be
        self.known = LastKnown()  # what waits, in memory and in the file
        self.trouble = ""  # what is wrong with the file
        self._next_look = 0.0
        self._slice = REPLAY_SLICE  # rows; halved when the store does not take them, doubled each minute

    @property
    def waiting(self) -> int:
        """The number of events that wait, as far as it is known."""
        return (self._in_file or 0) + len(self.kept)

    def is_empty(self) -> bool:
        """Tell whether certainly nothing waits, and nothing could be counted twice."""
        return self._in_file == 0 and not self.kept and self._moved <= 0

    def is_due(self) -> bool:
        """Tell whether it is time for look(): each minute, and at once when a file in which events wait is gone."""
        return self._clock() >= self._next_look or (bool(self._in_file) and self._file.is_gone())

    def look(self) -> None:
        """Mend what can be mended: delete what was moved, see what waits in the file, write what was kept.

        While all is well mail waits for no disk.  A file that was removed while it was open is still there, for us
        alone: what waits in it goes to memory first.
        """
        self._next_look = self._clock() + MINUTE_S
        self._slice = min(REPLAY_SLICE, 2 * self._slice)
        is_gone = self._file.is_gone()
        if self._in_file is not None and not self.trouble and not is_gone:
            return
        with self._or_trouble():
            if is_gone:
                self.kept = [row for row in self._file.leave() if row[0] > self._moved] + self.kept
                self._in_file, self._moved = None, -1
            if self._moved > 0:
                self._file.forget(self._moved)
            if not self._in_file:  # else it has what we have put there
                self._in_file = None
                # If there is none nothing waits in it, though it could not be made now; but it may be out of our reach.
                is_none = not os.path.lexists(self.path) and os.access(self._directory, os.X_OK)
                known = LastKnown()
                known.grow(self.kept)
                self._in_file = 0 if is_none else known.grow(self._file.first())
                self.known = known  # only now: of a file that cannot be read any more it is all there is
            self._file.check()
            self._moved = 0  # only now: what cannot be deleted would be moved again by each start
            self._write()
            if self.trouble:
                self.trouble = ""
                log.error(f"no outage journal: over, {self.path} can be used again; {self.waiting} events wait in it")

    @contextlib.contextmanager
    def _or_trouble(self) -> Iterator[None]:
        """What fails in here begins a time in which events are kept in memory; only look() ends it."""
        try:
            yield
        except (RepositoryUnavailable, OSError) as error:
            if not self.trouble:
                log.error(f"no outage journal: {error}; in an outage events are counted in memory only")
            self.trouble = str(error)

    def _write(self) -> None:
        """Write to the file what is in memory only; raises RepositoryUnavailable, also for want of room."""
        if shutil.disk_usage(self._directory).free < SPARE_BYTES:
            raise RepositoryUnavailable(f"{self.path}: its disk is full")
        self._file.insert([event for _, _, event in self.kept], 0, [ms for _, ms, _ in self.kept])
        self._in_file = (self._in_file or 0) + len(self.kept)
        self.kept = []

    def insert(self, events: Sequence[Event]) -> None:
        """Keep `events`, as of now."""
        if self._file.is_gone():  # else they would be written to a file that nobody can ever find
            self.look()
        now = self.now_ms()
        rows = [(0, now, event) for event in events]
        self.known.grow(rows)
        self.kept += rows
        if not self.trouble:
            with self._or_trouble():
                self._write()

    def replay(self, repository: Repository, deadline: float) -> list[Row]:
        """Move the oldest slice to `repository` and return it; empty: nothing can be moved; raises as `repository`.

        What is in memory only goes first: it has most to lose.
        """
        rows = self.kept[: self._slice]
        if not rows and self._in_file and not self._moved:
            with self._or_trouble():
                rows = list(self._file.first(self._slice))
            self._in_file = self._in_file if rows else None  # look() will see; this is not tried in each turn
        if not rows:
            return []
        try:
            repository.insert([event for _, _, event in rows], deadline, [ms for _, ms, _ in rows])
        except RepositoryUnavailable as error:
            self._slice = max(1, self._slice // 2)  # too large perhaps, or too slow, with rows that are refused
            if isinstance(error, TooLarge) and len(rows) > 1:
                return self.replay(repository, deadline)
            raise
        self.known.grow(rows, sign=-1)  # by now a sum has them from the store
        if self.kept:
            del self.kept[: len(rows)]
            return rows
        self._in_file = (self._in_file or 0) - len(rows)
        self._moved = rows[-1][0]
        with self._or_trouble():
            self._file.forget(self._moved)
            self._moved = 0
        if self._moved:
            log.error("the database has events that cannot be deleted from the journal; trying each minute, nothing"
                      " else is moved before, and a crash would count them twice")  # fmt: skip
        return rows


class Recorder:
    """Records events and tells their sums; one thread commits all events that wait with one statement.

    There is no timer: while one batch is being committed, the next one gathers, and another thread tells the sums of
    the last one: to wake 64 handlers takes a third of the time.  Within a batch the sums run up in order of arrival, as
    if the messages had come one by one.

    From the first failure of the store on, events go to the journal, and nobody waits for the store; a sum is then
    the last known one plus the journal's.  Another thread looks for the store.  When it is back, events go there
    again, the journal follows slice by slice between the batches, and until it is empty a sum is both's.
    """

    def __init__(self, repository: Repository, journal: Journal, settings: Settings,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.settings = settings  # replaced whole by a reload
        self.journal = journal
        self.watch = Watch(repository, clock)
        self._repository = repository
        self._clock = clock
        self._last_known = LastKnown()  # of the store's part
        self._waiting: queue.SimpleQueue[Waiting] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[tuple[list[Waiting], Sequence[Usage | None]] | None] = queue.SimpleQueue()
        self._batches = self._batches_told = 0  # of this queue: put in by one thread, and done with by the other
        self._busy_since = clock()  # since when whoever waits for the recorder's thread has come; or the last turn
        self._away = threading.Event()  # set by the recorder's thread, cleared by the one that finds the store
        self._away.set()
        self.looked = threading.Event()  # is it known by now whether the store is there, and what is in the journal?
        self._down_since = self._found_at = clock()  # if it is away; or if it is there
        self._reason = ""  # of the outage, as last logged; empty: there is none
        self._replayed = 0  # events, in this outage, or of that of an earlier process
        self._closing = threading.Event()
        works = self._work, self.tell, self._find_store  # at the end the first two are waited for
        self.threads = [threading.Thread(target=work, daemon=True) for work in works]

    def start(self) -> None:
        """Start the threads; events may come at once."""
        for thread in self.threads:
            thread.start()

    def record(self, event: Event, on_usage: OnUsage) -> None:
        """Count `event`, then call on_usage(what its login has used with it), or on_usage(None): it cannot be counted.

        Thread-safe.  `on_usage` is called in a thread of the recorder's, for which all others wait: it must not block.
        """
        self._waiting.put((event, on_usage, self._clock()))

    def longest_wait_s(self) -> float:
        """Return for how long, at most, an event has waited: in the queue, in a batch or behind a replay."""
        return self._clock() - self._busy_since

    def down_s(self) -> float | None:
        """Return for how long the store has been away, or None: it is there."""
        return self._clock() - self._down_since if self._away.is_set() else None

    def stop(self, timeout: float) -> None:
        """Commit what waits, in `timeout` seconds at most; what is in the journal's file stays there.

        A database that hangs now keeps us no longer than that: these threads end with the process.  The one that looks
        for it has nothing that could be lost, and names may take long to be looked up.
        """
        self._closing.set()
        deadline = time.monotonic() + timeout
        for thread in self.threads[:2]:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._away.set()  # only now: what waited has gone to the store
        self.journal.close()

    def _work(self) -> None:
        """Take turns until the end, also beyond it for those who wait already."""
        has_moved = True
        while not (self._closing.is_set() and self._waiting.empty()):
            has_moved = self.turn(0 if has_moved else PAUSE_S)
            if self._reason or not self._away.is_set():  # a turn has looked at the journal, another thread at the store
                self.looked.set()
        self.finish()
        self._told.put(None)

    def turn(self, patience_s: float = 0) -> bool:
        """Do once what the recorder's thread repeats: record what waits, move a slice of the journal.

        Waits for so long for something to come.  Returns whether a slice was moved: another one may be there.  It is
        one in a turn, so that whoever comes meanwhile waits for no more than that.  No thread is started here and no
        clock but ours asked: tests/test_simulation.py takes these turns in a world with faults.
        """
        batch: list[Waiting] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._waiting.get(patience_s > 0, patience_s))  # (Python 3.9 takes a timeout of 0 for none)
        while len(batch) < BATCH_EVENTS and not self._waiting.empty():
            batch.append(self._waiting.get())  # nobody else takes any
        began = self._clock()
        self._busy_since = batch[0][2] if batch else began  # the watchdog looks at the one that has waited longest
        if self.journal.is_due():
            self.journal.look()
        if batch:
            usages = self._commit([event for event, _, _ in batch], batch[0][2] + BATCH_DEADLINE_S)
            if len(batch) == 1 and self._batches_told == self._batches:  # nobody else waits: no need to wake a thread
                self._call_back(batch, usages)
            else:
                self._batches += 1
                self._told.put((batch, usages))
        return self._move_slice(began + BATCH_DEADLINE_S)

    def finish(self) -> None:
        """At the end, do what can still be done for the events that are in memory only."""
        self.journal.look()
        deadline = self._clock() + BATCH_DEADLINE_S  # for all of them: systemd waits for us
        while self.journal.kept and self._move_slice(deadline):
            pass
        if self.journal.kept:
            log.error(f"{len(self.journal.kept)} events are forgotten: they were counted in memory only")

    def tell(self) -> None:
        """Call back all who have recorded something, until the end: in a thread of its own, beside the next batch."""
        while told := self._told.get():
            self._call_back(*told)
            self._batches_told += 1

    @staticmethod
    def _call_back(batch: list[Waiting], usages: Sequence[Usage | None]) -> None:
        for (_, on_usage, _), usage in zip(batch, usages):
            try:
                on_usage(usage)
            except Exception:  # a fault of ours must not end this thread, nor keep the client waiting
                log.error(f"internal error: {traceback.format_exc()}")
                on_usage(None)

    def _commit(self, events: list[Event], deadline: float) -> Sequence[Usage | None]:
        """Keep one batch in the store, or else in the journal; return its sums, None for what the store refused.

        What has failed on its way to the store goes to the journal, though it may be there: rather twice than never.
        """
        refused: set[int] | None = None  # None: it is not in the store
        if self._away.is_set():
            self._note_outage(self._reason or NOT_YET_KNOWN)
        elif deadline - self._clock() < LEAST_LEFT_S:  # no reason to call the store away: it is others who are late
            self._note_outage("the database is too slow: events have waited for more than 2 s")
        else:
            with self._or_outage():
                refused = self._repository.insert(events, deadline)
        if refused is None:
            self.journal.insert(events)
        if not refused:
            return self._usages(events, None if refused is None else deadline)
        kept = [event for n, event in enumerate(events) if n not in refused]
        usages = iter(self._usages(kept, deadline))
        return [None if n in refused else next(usages) for n in range(len(events))]

    def _usages(self, events: list[Event], deadline: float | None) -> list[Usage]:
        """Return the sums of `events`, of the store, which is asked if it has them (`deadline`), and of the journal.

        If it has them and cannot tell, they are not journaled: they would count twice.
        """
        now, clock = self.journal.now_ms(), int(self._clock() * 1000)  # that of the wall may be set meanwhile
        logins = [event.sasl_username for event in events]
        known = {} if self.journal.is_empty() else {login: self.journal.known.get(login, now) for login in {*logins}}
        usages: list[Usage] = []
        if deadline is not None:
            with self._or_outage():
                usages = self._repository.usages(events, self.settings, deadline)
                for login, usage in zip(logins, usages):
                    self._last_known.put(login, usage, clock)
                if known:
                    usages = [usage.plus(known[login]) for login, usage in zip(logins, usages)]
                return self.watch.look(events, usages, self.settings, deadline)
            if not usages:
                self._last_known.grow((0, clock, event) for event in events)  # it has them, though it does not tell
        totals = {login: self._last_known.get(login, clock).plus(known.get(login, NOTHING)) for login in {*logins}}
        return self.watch.look(events, run_up(logins, events, totals), self.settings, None)

    @contextlib.contextmanager
    def _or_outage(self) -> Iterator[None]:
        """What fails in here begins an outage: from then on nobody asks the store, until look_for_store() finds it.

        Once is enough: with a server that is frozen, each further try would let a batch wait for 2.8 s.
        """
        try:
            yield
        except Exception as error:  # any other kind is a fault of ours, and no reason to lose count
            if not self._away.is_set() or self._reason in ("", NOT_YET_KNOWN):  # else that it is away has been said
                if not self._away.is_set() and self._clock() - self._found_at > MINUTE_S:
                    self._reason = ""  # a new one, though a broken journal keeps the last
                self._note_outage(str(error) if isinstance(error, RepositoryUnavailable) else traceback.format_exc())
            self._away.set()

    def _note_outage(self, reason: str) -> None:
        """Note when an outage begins, which lasts until the journal is empty; say why, and why else.

        But not what is the same as the last time: monit rules and humans are told once, not once a message.
        """
        if not self._reason:
            self._down_since = self._clock()
        if reason != self._reason:
            place = "memory" if self.journal.trouble else self.journal.path
            log.error(f"ERROR while UPDATING db: {reason}; counting in {place} until it is back")
            self._reason = reason

    def look_for_store(self) -> None:
        """See whether the store takes events (again); what waits in the journal then follows.

        In a thread of its own, that nobody waits for: names may take long to be looked up, and a server to answer.
        """
        with self._or_outage():
            self._repository.check(BATCH_DEADLINE_S)
            self._found_at = self._clock()
            self._away.clear()

    def _find_store(self) -> None:
        """Look for the store at the start, and in an outage until it is back: less and less often.

        A server that says it is ready, and then hangs, costs a batch of messages 2.8 s each time.
        """
        shortest, longest = RETRY_DELAYS_S
        delay_s = 0.0
        while not self._closing.wait(delay_s):
            self.look_for_store()
            while not self._away.wait(MINUTE_S):  # else it said that it is ready, and failed
                delay_s = 0.0
            delay_s = min(max(shortest, 2 * delay_s), longest)

    def _move_slice(self, deadline: float) -> bool:
        """Move a slice of the journal to the store, if both can; when nothing is left there, the outage is over."""
        is_outage = self._reason or self._replayed or not self.journal.is_empty()
        if not is_outage or self._away.is_set() or deadline - self._clock() < LEAST_LEFT_S:
            return False
        moved: list[Row] = []
        with self._or_outage():
            moved = self.journal.replay(self._repository, deadline)
        ahead = self.journal.now_ms() - int(self._clock() * 1000)
        self._replayed += self._last_known.grow((0, ms - ahead, event) for _, ms, event in moved)
        if self.journal.is_empty():
            seconds = self._clock() - self._down_since
            log.error(f"ERROR while UPDATING db: over after {seconds:.0f} s, {self._replayed} events replayed")
            self._reason, self._replayed = "", 0
            self.journal.known = LastKnown()  # all zeroes by now, and incidents that a human may have forgiven
        return bool(moved)


# ---- server: connections in, answers out ---------------------------------------------------------------------
#
# One message travels one way: Policy.answer() -> _judge() by the lists, or else through Recorder.record() ->
# decide() -> _conclude(), which logs -> settle() -> PolicyHandler._reply().  The thread of the connection goes as far
# as record(); from there on it is one of the recorder's, for which all others wait.

LAST_ANSWERS = 10_000  # that are remembered, and whose times the p99 is of
Reply = Callable[[str], None]


class Figures:
    """What has been answered, also to mail without a login and to repetitions: Postfix waits for all.  Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.answered = {"DUNNO": 0, "HOLD": 0, "REJECT": 0}  # since the start
        self.spared = {"HOLD": 0, "REJECT": 0}  # what would have been held or refused, were it not for an audit
        self._held: dict[str, float] = {}  # when a login was last held or refused, if it was so the last time
        self._times: collections.deque[float] = collections.deque(maxlen=LAST_ANSWERS)  # s
        self._lock = threading.Lock()  # guards the counts; of the others each use is a single step

    def count(self, action: str, seconds: float) -> None:
        """Count an answer and the time it took."""
        self._times.append(seconds)
        with self._lock:
            self.answered[action] += 1

    def note(self, login: str, action: str, is_audit: bool = False) -> None:
        """Keep in mind whether this login is held or refused now, or would be, were it not for an audit."""
        if action == "DUNNO":
            self._held.pop(login, None)
            return
        self._held[login] = self._clock()
        with self._lock:
            self.spared[action] += is_audit

    def logins_held(self) -> int:
        """Return how many logins were held or refused when they last sent, within 24 h."""
        return sum(self._clock() - when < DAY_S for when in list(self._held.values()))

    def p99_s(self) -> float:
        """Return the time that 99 % of the last answers kept to; 0 if there is none."""
        times = sorted(self._times.copy()) or [0.0]
        return times[(len(times) * 99 - 1) // 100]


class Policy:
    """Answers requests: the lists, the recorder, the decision, the answer, the log line.  Thread-safe.

    A message that is asked about twice is counted and logged once, and gets one answer: Postfix repeats a request
    whose answer got lost or was late, and asks at DATA and at END-OF-MESSAGE if told to; `instance` is the same then.
    """

    def __init__(self, recorder: Recorder, tell: Callable[[dict[str, object]], None]) -> None:
        self.figures = Figures()
        self.recorder = recorder  # its settings are ours
        self._tell = tell  # of an incident
        # Of the last messages who waits for the answer, or the answer.  (A plain dict is slow to lose its first key.)
        self._asked: collections.OrderedDict[object, list[Reply] | str] = collections.OrderedDict()
        self._lock = threading.Lock()  # guards it: once it has the answer, nobody begins to wait
        self._on_its_way: set[tuple[str, str]] = set()  # a login and a word of its incident that is being recorded
        self._swept = float(-DAY_S)  # who has sent since then is to be swept; at first all logins
        self._would_hold: dict[str, float] = {}  # of whom a sweep has said so in an audit, and when

    def answer(self, request: PolicyRequest, peer: str, reply: Reply) -> None:
        """Call reply(access(5) action) once, now or from a thread of the recorder's, so that it must not block.

        `peer` is the relay's address.  Inbound mail, and mail at another state, is none of our business: DUNNO.
        """
        if not request.sasl_username:
            return reply("DUNNO")
        if not request.recipient_count:
            log.complain("place", f"recipient_count is 0 at protocol_state {request.protocol_state}: nothing is"
                         " counted; in main.cf, call policyd from smtpd_end_of_data_restrictions")  # fmt: skip
            return reply("DUNNO")
        # Two relays number their messages alike, and a refused DATA followed by more RCPTs keeps the instance.  A hash
        # is small, whatever was sent.  Whoever types a request by hand gives no instance.
        key = hash((peer, request.instance, request.recipient_count)) if request.instance else object()
        waiting: list[Reply] = [reply]
        with self._lock:
            known = self._asked.setdefault(key, waiting)
            if known is not waiting and isinstance(known, list):
                return known.append(reply)
            if len(self._asked) > LAST_ANSWERS:
                self._asked.popitem(last=False)
        if isinstance(known, str):
            return reply(known)

        def settle(answer: str) -> None:
            """Answer all who wait, without the lock.  After a fault in here the recorder comes again, for the rest."""
            with self._lock:
                self._asked[key] = answer
            while waiting:
                waiting.pop()(answer)

        try:
            self._judge(request, settle)
        except Exception:
            settle("DUNNO")  # a fault of ours: nobody waits for it, and it is logged as one
            raise

    def _judge(self, request: PolicyRequest, settle: Reply) -> None:
        """Settle a message by the lists, which beat each other in this order, or when the recorder has counted it."""
        settings = self.recorder.settings  # one state to the end: after a reload a quota may need to know more
        # No longer than the table keeps them: what waits for the store takes no more room than its rows.
        login = settings.login_of(request.sasl_username)[:KEPT_TEXT]
        client_address = request.client_address[:KEPT_TEXT]
        event = Event(login, request.sender.lower()[:KEPT_TEXT], client_address, request.recipient_count)

        def counted(usage: Usage | None) -> None:
            """Decide, answer and log, once the recorder tells the usage; without one it could not be counted."""
            verdict = decide(usage, settings.limits_of(login, request.sasl_username)) if usage else PASSED
            if usage and verdict is PASSED:  # what is not counted says nothing of a login that is held
                self.figures.note(login, "DUNNO")
                settle("DUNNO")  # before the log's thread is woken; below nobody waits any more
            settle(self._conclude(request, event, settings, usage, verdict))

        is_listed = settings.blacklist.lines or settings.whitelist.lines
        names = names_of(request.sasl_username, login, request.sender) if is_listed else []
        if request.recipient_count == 1 and settings.always_allow.line_of([request.recipient.lower()], ""):
            listed = Verdict("DUNNO", said=f"allowing mail to {request.recipient}")
        elif is_listed and settings.blacklist.line_of(names, client_address):
            listed = Verdict("HOLD", "blacklisted", "blacklisted", "blacklisted user")
        elif (is_listed and settings.whitelist.line_of(names, client_address)
              and in_office_hours(time.localtime(), settings.whitelist_days, settings.whitelist_hours)):  # fmt: skip
            listed = Verdict("DUNNO", said="skipping whitelisted user")
        else:
            return self.recorder.record(event, counted)
        settle(self._conclude(request, event, settings, None, listed))

    def _conclude(self, request: PolicyRequest, event: Event, settings: Settings, usage: Usage | None,
                  verdict: Verdict) -> str:  # fmt: skip
        """Return the answer to a message, and log it; without a usage it is not counted.

        An audit only says what it would do, but for a block, which is a human's word.
        """
        login, sender, client_address, recipients = event
        message = f"{login}/{sender}/{client_address}/{recipients}"
        if usage:
            log.info(f"Updating db: {message}/{usage.recipients}")
        # Where Postfix has no queue id it delivers in spite of HOLD.  (Who types a request by hand gives no state.)
        if not request.queue_id and request.protocol_state in ("END-OF-MESSAGE", "DATA"):
            log.complain("proxy", "Postfix cannot hold what goes into smtpd_proxy_filter: what should be is refused;"
                         " ask policyd from the smtpd behind it, or use smtpd_milters or content_filter")  # fmt: skip
            if verdict.action == "HOLD":
                verdict = verdict._replace(action="REJECT")  # better a sender who asks than a thief who is served
        if verdict.action == "DUNNO":
            if verdict.said:
                log.info(f"{verdict.said}: {message}")
            return "DUNNO"
        is_audit = only_audits(settings, verdict.rule)
        self.figures.note(login, verdict.action, is_audit)
        who = f" for user {login} using {sender} from ip [{client_address}]" if usage else f": {message}"
        word = "REJECTING" if verdict.action == "REJECT" else "DEFERRING" if usage else "Holding"
        text = settings.reject_message if verdict.action == "REJECT" else settings.hold_message
        queue_id = f", queue_id={request.queue_id[:KEPT_TEXT]}" if request.queue_id else ""  # which held message is it?
        log.info(f"{f'would {verdict.action}' if is_audit else word} {verdict.said}{who}{queue_id}")
        if is_audit:
            return "DUNNO"
        if usage:
            self._note_incident(event, verdict, usage, request.queue_id[:KEPT_TEXT])
        return f"{verdict.action} {verdict.reason}" + (f"; {text}" if text else "")

    def _note_incident(self, event: Event, verdict: Verdict, usage: Usage, queue_id: str) -> None:
        """Record that a login is stopped, and tell a human, if it is the first time in 24 h.

        A lasting rule is told of for itself; of the others, that it is held, and once more that it is refused.  Only
        threads of the recorder's come here, one at a time.
        """
        login = event.sasl_username
        kind = verdict.rule if verdict.rule in LASTING else verdict.action
        if (login, kind) in self._on_its_way or any(kind in incident.split() for incident in usage.incidents):
            return
        new = {(login, verdict.action), (login, verdict.rule)}
        self._on_its_way |= new
        incident = Event(login, "", verdict.incident, None)
        # One that the store refuses stays on its way: it is told of once, not with each message.
        self.recorder.record(incident, lambda usage: self._on_its_way.difference_update(new if usage else ()))
        self._tell_human(event, verdict, usage.recipients, queue_id)

    def sweep(self, repository: Repository, clock: Callable[[], float] = time.monotonic) -> float:
        """Hold who shows an early sign: of all logins after a start or an outage, else of those that have sent since.

        Return the seconds until the next time.  Until the journal is in the store, the past is not at hand.
        """
        settings, now = self.recorder.settings, clock()
        if settings.early_signs == "no" or self.recorder.down_s() is not None or self.recorder.journal.waiting:
            self._swept = -DAY_S
            return MINUTE_S
        try:
            if remedy := repository.index_remedy:
                raise RepositoryUnavailable(f"they need the index on (sasl_username, ts); {remedy}")
            for login, verdict, recipients in self.recorder.watch.sweep(settings, min(DAY_S, now - self._swept)):
                if not only_audits(settings, verdict.rule):
                    log.info(f"Held by the sweep: {login}, {verdict.said}")
                    self._tell_human(Event(login, "", "", None), verdict, recipients)
                elif now - self._would_hold.get(login, -DAY_S) >= DAY_S:  # no incident is recorded: found each time
                    self._would_hold[login] = now
                    log.info(f"would HOLD {verdict.said} for user {login}, found by the sweep")
            self._swept = now - MINUTE_S  # an event's time is before its commit
            log.forget("sweep")
        except RepositoryUnavailable as error:
            log.complain("sweep", f"no sweep for early signs, trying each minute: {error}", lasts=True)
        # Relays that were started together shall not sweep together: two would find the same thief, and tell twice.
        return random.uniform(0.9, 1.1) * MINUTE_S

    def _tell_human(self, event: Event, verdict: Verdict, recipients: int, queue_id: str = "") -> None:
        """Tell a human of an incident that begins now, in the words that on_stop= promises its program (policyd.8)."""
        self._tell({
            "login": event.sasl_username, "rule": verdict.incident, "recipients": recipients,
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "figure": verdict.figure, "limit": verdict.limit, "sender": event.sender,
            "client_address": event.client_address, "queue_id": queue_id if verdict.action == "HOLD" else "",
        })  # fmt: skip


def listening_address(bind: str, port: int) -> tuple[int, Any, str]:
    """Return family and address for a socket, and what Postfix calls it; raises OSError.

    A name is looked up once, so that all show the address that it stood for.  IPv4 first: Postfix's line names
    127.0.0.1, and a localhost of ::1 alone would be refused in silence.
    """
    if bind.startswith("/"):
        return socket.AF_UNIX, bind, wire_name(bind, port)
    # As bytes: of what can be no host name the resolver says so; Python's own encoding would raise something else.
    found = socket.getaddrinfo(bind.encode(), port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, address, wire_name(str(address[0]), port)


class PolicyHandler(socketserver.BaseRequestHandler):
    """One connection of one smtpd process, which keeps it open for hours, mostly idle, for any number of requests.

    It sleeps a second before it asks again a server that hung up.
    """

    server: PolicyServer

    def handle(self) -> None:
        """Answer requests until the end of the connection, a time-out, or a peer that speaks something else.

        One too many is closed at once: in the queue it would wait.  64 descriptors are for database, store and log.
        """
        policy, connections = self.server.policy, self.server.connections
        most = min(policy.recorder.settings.max_connections, os.sysconf("SC_OPEN_MAX") - 64)
        peer = self.client_address[0] if self.client_address else "the Unix socket"
        self._answered = threading.Lock()  # held while an answer is owed: released by the thread that gives it
        connections.add(self.request)
        try:
            if len(connections) > most:
                return log.complain("many", f"{most} connections are open, as many as may be: closing new ones at once")
            for asked in requests(self.request):
                self._answered.acquire()  # answers go out in the order of the requests
                policy.answer(asked, peer, functools.partial(self._reply, time.monotonic()))
        except ProtocolError as error:
            log.complain(peer, f"bad request from {peer}: {error}; hung up")
        except OSError:
            pass  # the peer went away
        finally:
            self._answered.acquire()  # not before the last answer is out
            connections.discard(self.request)

    def _reply(self, asked: float, action: str) -> None:
        """Send the answer without waiting: whoever does not read his answers is hung up on.

        The connection's own thread is not woken for that: with 64 of them it would cost a third of the speed.
        """
        self.server.policy.figures.count(action.partition(" ")[0], time.monotonic() - asked)
        try:  # so few bytes are taken whole or not at all
            self.request.send(f"action={action}\n\n".encode(), socket.MSG_DONTWAIT)
        except OSError:
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)
        self._answered.release()


class PolicyServer(socketserver.ThreadingTCPServer):
    """Listens on TCP or on a Unix socket, and runs a PolicyHandler in a thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True  # a hanging client does not keep us from ending
    request_queue_size = 1024  # socketserver's 5 leaves clients waiting for seconds in a rush

    def __init__(self, bind: str, port: int, policy: Policy) -> None:
        """Listen; raises OSError."""
        self.policy = policy
        self.connections: set[socket.socket] = set()
        self.address_family, address, self.listens_on = listening_address(bind, port)
        if self.address_family == socket.AF_UNIX:
            with socket.socket(socket.AF_UNIX) as probe:  # of a daemon that is no more; all else is in bind()'s way
                if probe.connect_ex(bind) == errno.ECONNREFUSED and stat.S_ISSOCK(os.stat(bind).st_mode):
                    os.unlink(bind)
        super().__init__(address, PolicyHandler)
        if self.address_family == socket.AF_UNIX:
            os.chmod(bind, 0o660)  # for its owner and its group, which smtpd is in; until now for nobody but us
        else:  # Linux hands it on to what is accepted: no answer is kept back in the hope of more
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, without spinning where there is no descriptor left for it."""
        try:
            return super().get_request()
        except OSError as error:
            log.complain("accept", f"cannot accept a connection: {error}")
            time.sleep(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault of ours, the last net: this connection gets no answer, the others go on."""
        if "can't start new thread" in str(error := sys.exc_info()[1]):  # say because of systemd's TasksMax
            return log.complain("accept", f"cannot serve a connection: {error}")
        log.error(f"internal error: {traceback.format_exc()}")

    def drain(self, deadline: float) -> None:
        """Stop accepting, answer what has been received, and end by `deadline` (monotonic seconds).

        What the kernel has of a connection that is shut for reading can still be read, and then comes the end.
        """
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RD)
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)


# ---- process: arguments, signals, systemd; the only section that wires the others ------------------------------


def sd_notify(*lines: str) -> None:
    """Tell systemd, if it listens (sd_notify(3)); without it there is no such socket, and that is no error."""
    address = re.sub("^@", "\0", os.environ.get("NOTIFY_SOCKET", ""))
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto("\n".join(lines).encode(), address)


def write_file(path: str, text: str, mode: int) -> None:
    """Write a file so that nobody ever reads half of it, or complain: mail flows.  After a power cut it may be gone."""
    try:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
        os.replace(f"{path}.new", path)
        log.forget(path)
    except OSError as error:
        log.complain(path, f"{path} cannot be written: {error.strerror}", lasts=True)


class OnStop:
    """Runs the program of on_stop= when a login is stopped, in a thread of its own: no request waits for it.

    What it has not been told stands in a file, too, and is told after a restart: rather twice than never.
    """

    def __init__(self, path: str, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings  # replaced whole by a reload
        # Put in by the threads that answer, so that no disk keeps them waiting.
        self.incidents: queue.SimpleQueue[Mapping[str, object]] = queue.SimpleQueue()
        self._path = path
        self._clock = clock
        self._lines: list[str] = []  # of JSON, an incident each, that the program is to be told
        self._next_run = 0.0
        self._failures = 0  # in a row
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            self._lines = file.readlines()

    def keep(self) -> None:
        """Let what has come wait, also in the file; where that cannot be written it is told all the same."""
        new = [json.dumps(self.incidents.get()) + "\n" for _ in range(self.incidents.qsize())]
        if new and self.settings.on_stop:
            self._lines += new
            write_file(self._path, "".join(self._lines), 0o600)

    def turn(self) -> float:
        """Run the program if something waits and it is time; return the seconds until the next turn."""
        self.keep()
        words, now = self.settings.on_stop, self._clock()
        if self._lines and now >= self._next_run:
            failure = self._run_program(words) if words else ""  # a reload may have switched it off
            # Not sooner: a thief with a hundred accounts is not a hundred mails.
            self._next_run = now + (1 if failure else 3) * MINUTE_S
            if failure and self._failures < 60:
                self._failures += 1
                log.complain("on_stop", f"on_stop={shlex.join(words)}: {failure}; trying again each minute for an hour")
            else:
                if failure:
                    log.error(f"gave up telling of {len(self._lines)} incidents: {failure}")
                self._failures, self._lines = 0, []
                with contextlib.suppress(OSError):  # it could not be written, then
                    os.unlink(self._path)
        return 0.2  # until somebody new is looked for: a human is slower

    def _run_program(self, words: Sequence[str]) -> str:
        """Run the program with what waits as its standard input; return why that failed, or an empty text."""
        with contextlib.suppress(OSError):  # of this thread, and so of the program: our others stay on one processor
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        try:  # in a session of its own, to be killed with all that it has started
            with subprocess.Popen(words, stdin=subprocess.PIPE, encoding="utf-8", start_new_session=True) as program:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.communicate("".join(self._lines), MINUTE_S)
                    return f"status {program.returncode}" if program.returncode else ""
                os.killpg(program.pid, signal.SIGKILL)
        except OSError as error:
            return str(error.strerror)
        return f"not done after {MINUTE_S} s"


def purge(repository: Repository, recorder: Recorder) -> float:
    """Delete a slice of the oldest events; return the seconds until the next one: a day, when nothing is left.

    Without the right to DELETE policyd counts all the same, and warns each hour.
    """
    keep_days = recorder.settings.keep_days
    try:
        if repository.ask(repository.PURGE, {"keep": keep_days * DAY_S, "rows": PURGE_SLICE})[0][0]:
            return PAUSE_S  # in which mail comes in between: a lock that is taken again at once nobody else gets
    except RepositoryUnavailable as error:
        log.warning(f"old events stay for now: {error}")
        return HOUR_S
    log.info(f"purged the events older than {keep_days} days")
    return DAY_S


class Daemon:
    """The parts put together, and the main thread's loop over signals.

    What may hang for long (the disk of statedir, a database, a program) does so in a thread of its own, never in the
    main one: that feeds the watchdog, and to be started anew would mend none of these, but lose the last known sums.
    """

    def __init__(self, settings: Settings) -> None:
        """Listen, but start nothing yet; raises OSError, and SystemExit where another daemon has our statedir.

        Both would move the same journal.  One that cannot be used at all is no reason to leave mail uncounted.
        """
        pid_file, pid = settings.state_file("policyd.pid"), "unknown"
        with contextlib.suppress(OSError), open(pid_file, encoding="utf-8", errors="replace") as file:
            pid = file.read().strip()
        try:  # of the directory, since a file may be removed; it stays open, and the lock ours, until we end or crash
            fcntl.flock(os.open(os.path.dirname(pid_file), os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_file(pid_file, f"{os.getpid()}\n", 0o644)
        except BlockingIOError:
            sys.exit(f"policyd: cannot use its statedir: policyd with pid {pid} keeps its events there")
        except OSError as error:
            log.warning(f"statedir: {error}; in an outage events are counted in memory only")
        with contextlib.suppress(OSError):
            os.unlink(settings.state_file("notified.json"))  # of 0.1
        # Signals, a byte each, from whichever thread the kernel hands one to: when it is one that just begins, the main
        # one sleeps on.  Each waits for its turn.  None is blocked: what on_stop= runs would inherit that.
        self._signals, self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # as signal.set_wakeup_fd() asks
        self.actions: dict[int, Callable[[], None]] = {
            # Of a terminal it means that somebody who tried policyd out has left.
            signal.SIGHUP: self.stop if os.isatty(0) else self.reload,
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGUSR1: lambda: log.info(self.status()),
        }
        self._started_with = settings  # bind, port, store and statedir stay these, whatever a reload brings
        self._closing = threading.Event()
        self._repository = open_repository(settings)
        journal = Journal(SQLiteRepository(settings.state_file("journal.sqlite3")))
        self._recorder = Recorder(self._repository, journal, settings)
        self._on_stop = OnStop(settings.state_file("incidents.json"), settings)
        self._policy = Policy(self._recorder, self._on_stop.incidents.put)
        self.server = PolicyServer(settings.bind, settings.port, self._policy)
        # Each in a thread of its own: a purge takes as long as it takes, and no sweep waits for it.  It comes a minute
        # later: the store has been found by then, and the mail that had waited is through.
        works = [(0, self.publish), (0, self._on_stop.turn), (0, self._policy.sweep, self._repository),
                 (MINUTE_S, purge, self._repository, self._recorder)]  # fmt: skip
        self._threads = [threading.Thread(target=self._repeat, args=work, daemon=True) for work in works]
        self._threads.append(threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True))

    def _repeat(self, pause_s: float, work: Callable[..., float], *arguments: object) -> None:
        """Do `work` until we end, each time after the seconds that it has asked for.

        What it raises is a fault of ours: this thread ends, and the watchdog has us started anew.
        """
        while not self._closing.wait(pause_s):
            pause_s = work(*arguments)

    def run(self) -> None:
        """Serve, and do what signals ask for, until we end."""
        self._recorder.start()
        self._recorder.looked.wait(BATCH_DEADLINE_S)  # the first status shall be true, and the first mail not journaled
        for thread in self._threads:
            thread.start()
        pause = min(10.0, int(os.environ.get("WATCHDOG_USEC") or 20_000_000) / 2e6)  # half of what systemd allows
        while not self._closing.is_set():
            log.tick(time.monotonic())
            if self.is_well():
                sd_notify("READY=1", "WATCHDOG=1", f"STATUS={self.status()}")  # the start, or a reload, is over, too
            if select.select([self._signals], [], [], pause)[0]:
                self.actions[os.read(self._signals, 1)[0]]()

    def is_well(self) -> bool:
        """Tell whether no event waits for too long and no thread of ours has died: else only a restart helps.

        Postfix gives up on an answer after 10 s.  Handlers of single connections come and go.
        """
        threads = [*self._recorder.threads, *self._threads, log.thread]
        return self._recorder.longest_wait_s() < 10 and all(thread.is_alive() for thread in threads)

    def figures(self) -> list[tuple[str, str, str, Any]]:
        """Return the figures of the moment: name, kind, what it is, and the value, for some one of each answer.

        An interface: policyd.8, the dashboard in scripts/ and the alerts of a site have these names.
        """
        figures, down_s = self._policy.figures, self._recorder.down_s()
        return [
            ("requests_total", "counter", "Requests answered.", dict(figures.answered)),
            ("audited_total", "counter", "Messages that an audit has let through.", dict(figures.spared)),
            ("logins_held", "gauge", "Logins that were held or refused when they last sent.", figures.logins_held()),
            ("database_up", "gauge", "Is the database in use?", int(down_s is None)),
            ("database_down_seconds", "gauge", "For how long it has been away.", round(down_s or 0)),
            ("journal_events", "gauge", "Events that wait for the database.", self._recorder.journal.waiting),
            ("answer_p99_seconds", "gauge", "99 % of the last answers were as fast.", figures.p99_s()),
            ("connections", "gauge", "Open connections.", len(self.server.connections)),
        ]

    def status(self) -> str:
        """Return them on one line."""
        answered, spared, held, is_up, down_s, waiting, p99_s, connections = (value for *_, value in self.figures())
        audit = f" (audit: {spared['HOLD']} would HOLD, {spared['REJECT']} would REJECT)" * any(spared.values())
        database = "up" if is_up else f"down since {local_time(time.time() - down_s)}"
        trouble = ", which CANNOT BE USED" * bool(self._recorder.journal.trouble)
        return (
            f"{sum(answered.values())} requests: {answered['DUNNO']} DUNNO, {answered['HOLD']} HOLD,"
            f" {answered['REJECT']} REJECT{audit}; {held} logins held; {connections} connections;"
            f" p99 {p99_s * 1000:.1f} ms; database {database}, {waiting} events in the journal{trouble};"
            f" on {self.server.listens_on}"
        )

    def publish(self) -> float:
        """Write them to a file in Prometheus' text format 0.0.4; return the seconds to the next one."""
        lines = []
        for name, kind, about, value in self.figures():
            lines += [f"# HELP policyd_{name} {about}", f"# TYPE policyd_{name} {kind}"]
            values = {f'{{answer="{key}"}}': value[key] for key in value} if isinstance(value, dict) else {"": value}
            lines += [f"policyd_{name}{label} {number}" for label, number in values.items()]
        write_file(self._started_with.state_file("policyd.prom"), "\n".join([*lines, ""]), 0o644)
        return MINUTE_S

    def reload(self) -> None:
        """Read the settings again, whole or not at all; when it is over run() tells systemd.

        A file that is gone is a mistake, too: the defaults would lift the limits of a site in silence.
        """
        sd_notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            new = Settings.from_file(self._started_with.path or SETTINGS_FILE)
        except SettingsError as error:
            return log.error(f"{error}; going on with the old settings")
        needs_restart = [field.name for field in dataclasses.fields(new) if field.metadata.get("restart")]
        if changed := [name for name in needs_restart if getattr(new, name) != getattr(self._started_with, name)]:
            log.warning(f"settings changed that need a restart: {', '.join(changed)}")
        for line in new.gone:
            log.error(line)
        self._recorder.settings = self._on_stop.settings = new
        log.info(f"settings read again: {new.path}")

    def stop(self) -> None:
        """Answer what is in flight and write what is recorded, in 5 seconds at most.

        In this order: what is drained must still be counted, and the last of it may be an incident.
        """
        sd_notify("STOPPING=1")
        deadline = time.monotonic() + 3.5  # for the answers still owed: systemd kills after 10 s (unit.service)
        self._closing.set()
        self.server.drain(deadline)
        status = self.status()
        self._recorder.stop(max(0.1, deadline - time.monotonic()))
        log.info(f"policyd ends; {status}")
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        self._on_stop.keep()  # what the recorder has just recorded, which nobody else will be told of again
        self._repository.close()


def _answers_at(settings: Settings) -> str:
    """Return where a policyd answers, or an empty text; a request without a login counts nothing."""
    family, address, listens_on = listening_address(settings.bind, settings.port)
    with contextlib.suppress(OSError), socket.socket(family) as connection:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(address)
        connection.sendall(b"request=smtpd_access_policy\n\n")
        return listens_on if connection.recv(64) == b"action=DUNNO\n\n" else ""
    return ""


def check(settings: Settings) -> Iterator[str]:
    """Try all that policyd needs: print what is found, and yield what is missing, a line each.

    What is missing would make the daemon end, be restarted for ever, or count in memory only.  The store is the last;
    raises RepositoryUnavailable.
    """
    repository, journal = open_repository(settings), settings.state_file("journal.sqlite3")
    policy = Policy(Recorder(repository, Journal(SQLiteRepository(journal)), settings), print)
    reason = "requests are not understood"  # by our own code: the sockets of this system may be unlike those of others
    try:
        with PolicyServer(settings.bind, settings.port, policy) as server:
            threading.Thread(target=server.handle_request, daemon=True).start()
            address = _answers_at(settings)
    except OSError as error:  # only where the address is ours: bind= may be a copy of another relay's
        reason = error.strerror or str(error)
        address = _answers_at(settings) if error.errno == errno.EADDRINUSE else ""
    if address:
        print(f"a request on {address} is answered")
    else:
        yield f"cannot listen on {wire_name(settings.bind, settings.port)}: {reason}"
    if settings.port < 1024 and not settings.bind.startswith("/"):
        yield f"port={settings.port}: under unit.service policyd may not listen below 1024"
    for path in (settings.state_file(""), *[journal] * os.path.exists(journal)):
        if not os.access(path, os.R_OK | os.W_OK):
            yield f"statedir: {path} is not there, or not policyd's to write: an outage would be counted in memory only"
    if settings.on_stop and not shutil.which(settings.on_stop[0]):
        yield f"on_stop={shlex.join(settings.on_stop)}: {settings.on_stop[0]} cannot be run"
    if settings.early_signs != "no" and not settings.trusted_network.lines:
        print("warning: early_signs is on and trusted_network= is empty: your own webmail and campus are places, too")
    print(f"events can be counted: {repository.check(BATCH_DEADLINE_S)}")
    yield from repository.problems(time.monotonic() + BATCH_DEADLINE_S)
    if settings.early_signs != "no" and repository.index_remedy:
        yield f"early_signs needs the index on (sasl_username, ts): {repository.index_remedy}"


def init_database(settings: Settings, is_from_embedded: bool) -> Iterator[str]:
    """Create or upgrade the table, and move there what the embedded store has, if asked; yield what goes wrong.

    Moved as after an outage, slice by slice, with the original times: what is moved is deleted, so that a second run
    doubles nothing.  Raises RepositoryUnavailable.
    """
    repository = open_repository(settings)
    print(repository.init())
    if is_from_embedded:
        embedded, moved = Journal(SQLiteRepository(settings.state_file("events.sqlite3"))), 0
        embedded.look()
        while rows := embedded.replay(repository, time.monotonic() + DAY_S):
            moved += len(rows)
        print(f"moved {moved} events of the embedded store")
        if not embedded.is_empty():
            yield f"{embedded.trouble}: what stays there would be moved again"


def _fail(message: str, status: int = 1) -> int:
    """Say on stderr what is wrong, on one line whatever a settings file holds; return the exit status."""
    print(f"policyd: {printable(message)}", file=sys.stderr)
    return status


def _carry_out(options: argparse.Namespace) -> int:
    """Do what the command line asks for; return the exit status.  Raises what main() has a line for."""
    is_given = options.config or os.path.lexists(SETTINGS_FILE)
    settings = Settings.from_file(options.config or SETTINGS_FILE) if is_given else Settings()
    where = wire_name(settings.bind, settings.port)
    file = settings.path or f"none, defaults (yours would go into {SETTINGS_FILE})"
    about = f"quota {settings.defaultquota}{' (audit)' if settings.mode == 'audit' else ''}, settings: {file}"
    for line in settings.gone:  # an upgrade by night: to whoever looks on, and for the log, should we serve
        _fail(line)
        log.error(line)
    if options.check or options.check_settings:
        print(f"no mistake in the settings: {where}, {about}")
        return max(map(_fail, check(settings)), default=0) if options.check else 0
    if options.from_embedded and not settings.dbname:
        return _fail("--from-embedded needs the db... settings: where to?")
    if options.init_db or options.from_embedded:
        return max(map(_fail, init_database(settings, options.from_embedded)), default=0)
    try:
        daemon = Daemon(settings)
    except OSError as error:
        return _fail(f"cannot listen on {where}: {error.strerror or error}")
    signal.set_wakeup_fd(daemon.wakeup)
    for number in daemon.actions:
        signal.signal(number, lambda *_: None)
    # All threads to come.  On one processor a busy daemon answers twice as much: Python runs one thread at a time, and
    # with two processors each hand-over moves to the other one's cold caches.
    with contextlib.suppress(OSError):  # forbidden: slower, no worse
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    threading.excepthook = lambda fault: log.error("internal error: " + "".join(traceback.format_exception(*fault[:3])))
    log.start(options.stderr)
    log.info(started := f"policyd {__version__} on {daemon.server.listens_on}, {about}, {open_repository(settings)}")
    if os.path.exists("/dev/log") and not (options.stderr or "NOTIFY_SOCKET" in os.environ):
        print(f"{started}; logging to syslog", file=sys.stderr)
    if settings.dbpass and os.stat(settings.path).st_mode & stat.S_IROTH:
        log.warning(f"everybody can read the password in {settings.path}; try: chmod 0640 {settings.path}")
    daemon.run()
    log.stop()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run policyd; return its exit status."""
    parser = argparse.ArgumentParser("policyd", description="Postfix policy daemon: recipient quotas for SASL users")
    # On one line, and with our status instead of its 2, which no manual of ours has.
    parser.error = lambda message: sys.exit(_fail(f"{message}; see policyd --help"))  # type: ignore[method-assign]
    parser.add_argument("-c", "--config", metavar="FILE", help=f"settings (default: {SETTINGS_FILE}, if there)")
    parser.add_argument("--stderr", action="store_true", help="log to stderr instead of syslog")
    parser.add_argument("--version", action="store_true", help="say which version this is")
    parser.add_argument("--from-embedded", action="store_true", help="with --init-db: move the embedded store's events")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="try all that policyd needs, and say what is missing")
    instead.add_argument("--check-settings", action="store_true", help="read the settings, and do nothing else")
    instead.add_argument("--init-db", action="store_true", help="create the table, or upgrade an old one")
    options = parser.parse_args(arguments)
    if options.version:  # with the commit, where git knows it: two checkouts may be far apart
        here = shlex.quote(os.path.dirname(os.path.realpath(__file__)))
        with os.popen(f"git --git-dir {here}/.git rev-parse --short=7 HEAD 2>/dev/null") as git:
            print("+".join([f"policyd {__version__}", *git.read().split()]))
        return 0
    os.umask(0o077)  # who sent what is nobody else's business; what is for others gets its mode when it is written
    if os.geteuid() == 0 and (options.check or options.init_db or options.from_embedded):
        # What root may do says nothing of the daemon's user; what root makes would be out of its reach; and a database
        # that knows it by its Unix socket would refuse root.
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam("policyd")
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
    try:
        return _carry_out(options)
    except SettingsError as error:
        return _fail(str(error), 78)  # EX_CONFIG: only a human can mend it, so unit.service does not start us again
    except RepositoryUnavailable as error:
        return _fail(f"events cannot be counted: {error}")
    except ImportError:
        return _fail("PyMySQL is missing: apt install python3-pymysql, or remove the db... settings")
    except KeyboardInterrupt:  # of what does not serve
        return _fail("interrupted")


if __name__ == "__main__":
    sys.exit(main())
