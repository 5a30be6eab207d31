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
With mode=audit the answer is always DUNNO, and the log says what it would have been.

A place is the first number of a client's address.  A thief is everywhere at once, or somewhere new: places are new to a
login that has not used them between a day and `keep_days` ago.  Whoever is stopped has an incident: a row of the
table, which all relays see.  It is recorded once in 24 hours, and then a human is told (`on_stop`).

When the database is away, mail flows and the quota holds: events go to a journal, which is moved to the
database when one of the servers of `dbhost` is back.  Without any `db...` setting the events are kept in an
embedded SQLite file instead, and nothing but Python is needed.

Files:    /etc/postfix/policyd.cfg (settings); in `statedir` journal.sqlite3 (with some room to spare), events.sqlite3
          (the embedded store), incidents.json (those that `on_stop` has not told yet), policyd.prom (figures for
          Prometheus), policyd.pid.
Signals:  HUP reads the settings again, TERM and INT answer what has been asked and end, USR1 logs a status.
Status:   0, 1 (cannot listen, something is missing in --check), 78 (a mistake in the settings).
Log:      syslog, facility daemon, tag policyd.

The sections below, each of which uses only those above it:
names, log, settings, protocol, decision, storage, watch, recorder, server, process.
"""

from __future__ import annotations

import argparse
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
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import stat
import stringprep
import sys
import syslog
import threading
import time
import traceback
import types
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Optional, TypeVar, Union

if TYPE_CHECKING:
    import ssl

    import pymysql

T = TypeVar("T")

__version__ = "0.2.0"

SETTINGS_FILE = "/etc/postfix/policyd.cfg"

NEVER = sys.maxsize  # a sum that nobody reaches
BATCH_EVENTS = 256  # the most that one INSERT takes
MINUTE_S, HALF_HOUR_S, HOUR_S, DAY_S = 60, 1800, 3600, 86_400


def local_time(seconds: float) -> str:
    """Return a time since 1970 as a human reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def printable(text: str) -> str:
    """Return `text` as printable ASCII on one line, everything else escaped as in a Python string."""
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
        text = unicodedata.normalize("NFKC", "".join(itertools.filterfalse(stringprep.in_table_b1, text)))
        text = unicodedata.normalize("NFKC", text.lower())
    text = text.lower()
    return re.sub(" *@ *", "@", re.sub("  +", " ", text)).strip(" ") if " " in text else text


def login_of(sasl_username: str, strip_domain: bool) -> str:
    """Return the account that a `sasl_username` stands for; without its domain, before or after it, if so asked."""
    whole = clean(sasl_username)
    if not strip_domain:
        return whole or sasl_username
    return whole.partition("@")[0].rpartition("\\")[2].strip(" ") or whole or sasl_username


IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 in there (RFC 4291, 6052)


def _unmapped(network: Network) -> Network:
    """Return an IPv4 network for one that is written as IPv6."""
    if network.version == 6 and any(network.subnet_of(mapped) for mapped in MAPPED):
        return ipaddress.IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


@functools.lru_cache(maxsize=10_000)
def address_of(client_address: str) -> IPAddress | None:
    """Return a client's address, IPv4 also where it comes inside IPv6; None for "unknown" and the like."""
    try:
        return _unmapped(ipaddress.ip_network(client_address.partition("%")[0])).network_address
    except ValueError:  # Postfix says "unknown" of a client that has gone
        return None


# ---- log: lines on their way to syslog ------------------------------------------------------------

LOG_QUEUE_LINES = 10_000


class Log:
    """A queue of lines and the one thread that hands them to syslog, so that no answer waits for it.

    libc's syslog() blocks after a dozen lines when nobody reads /dev/log.  Thread-safe.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the next two
        self._dropped = 0
        self._complaints: dict[str, list[Any]] = {}  # of a topic: begun when, how many more since, the last line
        self._write: Callable[[int, str], None] = syslog.syslog
        self.to_stderr = False
        self.thread = threading.Thread(target=self._write_all, name="log", daemon=True)

    def start(self, to_stderr: bool) -> None:
        """Open syslog as daemon/policyd[pid], or write the same lines to stderr, and start the thread."""
        self.to_stderr = to_stderr or not os.path.exists("/dev/log")
        if self.to_stderr:
            tag = f"policyd[{os.getpid()}]: "
            self._write = lambda level, line: print(tag + line, file=sys.stderr, flush=True)
        else:
            syslog.openlog("policyd", syslog.LOG_PID, syslog.LOG_DAEMON)
        self.thread.start()

    def _put(self, level: int, line: str) -> None:
        if self._lines.qsize() < LOG_QUEUE_LINES:
            return self._lines.put((level, printable(line)))
        with self._lock:
            self._dropped += 1

    info = functools.partialmethod(_put, syslog.LOG_INFO)  # a decision
    warning = functools.partialmethod(_put, syslog.LOG_WARNING)  # a human should look
    error = functools.partialmethod(_put, syslog.LOG_ERR)  # counting is impaired

    def complain(self, topic: str, line: str) -> None:
        """Warn of what may happen a thousand times: of a topic at once, and tick() tells how many more came."""
        with self._lock:
            kept = self._complaints.setdefault(topic, [time.monotonic(), -1, ""])
            kept[1:] = kept[1] + 1, line
        if not kept[1]:
            self.warning(line)

    def tick(self, now: float) -> None:
        """Sum up the complaints of the last minute; to be called now and then, with monotonic seconds."""
        with self._lock:
            old = [topic for topic, (begun, _, _) in self._complaints.items() if now - begun >= MINUTE_S]
            for topic in old:
                _, more, line = self._complaints.pop(topic)
                if more:
                    self._complaints[topic] = [now, 0, line]
                    self.warning(f"{line} ({more} more like this within a minute)")

    def stop(self) -> None:
        """Write what is queued, in a second at most: a stuck syslog must not keep us."""
        if self.thread.is_alive():
            self._lines.put(None)
            self.thread.join(timeout=1)

    def _write_all(self) -> None:
        while (item := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # stderr is closed: nobody to tell
                self._write(*item)
            if self._dropped and self._lines.empty():
                with self._lock:
                    dropped, self._dropped = self._dropped, 0
                self.warning(f"{dropped} log lines were lost: syslog did not take them")


log = Log()


# ---- settings: one file, read whole or not at all ---------------------------------------------------

EARLY_FLOOR = 40  # recipients of an hour below which nobody's places are looked at in the path
DAYS_TO_JUDGE = 3  # that the table must remember before an early sign counts: on the first day everything is new
GONE = {  # settings of 0.1, and what to write instead: an upgrade by night must not leave mail uncounted
    "max_networks": "early_signs=audit (or yes), and max_places= if 5 does not suit",
    "networks_window": "early_signs=audit (or yes); its times are fixed",
    "notify": "on_stop=policyd-admin mail {}",
    "notify_from": "--from {} at the end of on_stop=",
    "notify_server": "--server {} at the end of on_stop=",
}


class SettingsError(Exception):
    """A mistake in the settings: `FILE:LINE: what is wrong, and what may be meant`."""


class UserList:
    """A whitelist or a blacklist: names (logins, senders, @domains) and networks, with the lines they stand in."""

    def __init__(self, entries: Iterable[tuple[str | Network, int]] = ()) -> None:
        self.lines = dict(entries)
        self._networks = [entry for entry in self.lines if not isinstance(entry, str)]

    def line_of(self, names: Iterable[str], client_address: str) -> int:
        """Return the number of a line that lists one of `names` or the client's address; 0: there is none."""
        entries: list[str | Network] = [*names]
        if self._networks and (address := address_of(client_address)):
            entries += [ipaddress.ip_network(address), *(network for network in self._networks if address in network)]
        return next((self.lines[entry] for entry in entries if entry in self.lines), 0)


NOBODY = UserList()


def names_of(sasl_username: str, login: str, sender: str) -> list[str]:
    """Return the names by which a list may mean a message: login, `sasl_username`, sender, and the domains of both."""
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

    def decisive(self) -> int:
        """Return the sum beyond which the answer stays the same."""
        return max(limit if limit < NEVER else 0 for limit in self[:3])


# How a value is read: each reader returns it, or raises ValueError (or OSError) with what to write instead.


def _like(pattern: str, hint: str, make: Callable[[str], T],
          is_right: Callable[[T], bool] | None = None) -> Callable[[str], T]:  # fmt: skip
    """Return a reader of values that look like `pattern`, capitals aside, and are right when they are made."""

    def read(text: str) -> T:
        if not re.fullmatch(pattern, text, re.IGNORECASE | re.ASCII) or (is_right and not is_right(make(text))):
            raise ValueError(hint)
        return make(text)

    return read


def _number(lowest: int, highest: int = 999_999_999) -> Callable[[str], int]:
    hint = f"give a number from {lowest} to {highest}, digits only"
    return _like("[0-9]{1,9}", hint, int, lambda number: lowest <= number <= highest)


def _range(lowest: int, highest: int, example: str) -> Callable[[str], tuple[int, ...]]:
    hint = f"give FROM-TO between {lowest} and {highest}, for example {example}"
    return _like("[0-9]{1,2} *- *[0-9]{1,2}", hint, lambda text: tuple(map(int, text.split("-"))),
                 lambda ends: lowest <= ends[0] <= ends[1] <= highest)  # fmt: skip


def _one_of(*words: str) -> Callable[[str], str]:
    return _like("|".join(words), f"give {', '.join(words[:-1])} or {words[-1]}", str.lower)


def _file(path: str) -> str:
    with open(path, "rb"):
        return path


def _servers(text: str) -> tuple[tuple[str, int | None], ...]:
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


NEVER_MATCHES = {  # what people write into lists, and no login, sender or address ever is
    r".*\s#.*": "a comment stands in a line of its own; remove what is behind the entry",
    r".*[,;].*": "one entry a line; write a line for each",
    r"/.*/[a-z]*": "no regular expressions; give a login, a sender, @domain, an address or a network",
    r"(['\"]).*\1|[\u2018\u201c\u201e].*": "quotes are part of the value; write it without",
    r".*<.*>.*": "write it alone, without < and >",
    r"\*@([^*?]+)": r"did you mean @\1?",
    r"([0-9]+)\.(\*|\*\.\*|\*\.\*\.\*)": r"did you mean \1.0.0.0/8?",
    r"([0-9]+\.[0-9]+)\.(\*|\*\.\*)": r"did you mean \1.0.0/16?",
    r"([0-9]+\.[0-9]+\.[0-9]+)\.\*": r"did you mean \1.0/24?",
    r"\*.*|.*\*|.*@.*[*?].*|[0-9a-f:]*:\*.*": "no wildcards; give a login, a sender, @domain or a network",
    r"@?|.*@": "a domain is missing behind @",
    r"@.*@.*": "no domain has an @",
    r"@\.(.+)": r"did you mean @\1? subdomains are not meant",
    r"\[(.*)\](/[0-9]+)?": r"did you mean \1\2?",
    r"([0-9]+\.){3}[0-9]+|([0-9]+\.){1,3}|.*:::.*|[0-9.]+[*%[][0-9.*%[\]-]*": "this is no address",
    r"[0-9a-f]*:[0-9a-f:.]*%.*": "write the address without its zone",
}


def _entry(text: str) -> str:
    """Read a name as clean() gives it, unless it can never match."""
    entry = clean(text)
    if address_of(entry) and "%" not in entry:
        return entry
    for pattern, hint in NEVER_MATCHES.items():
        if match := re.fullmatch(pattern, entry, re.DOTALL):
            raise ValueError(match.expand(hint))
    words = re.split(" *[-\u2013] *| ", entry)  # 192.0.2.10-20, or one entry behind the other
    if len(words) > 1 and (address_of(words[0].partition("/")[0]) or (" " in entry and entry.count("@") > 1)):
        raise ValueError("one entry a line, and no ranges; give networks, for example 192.0.2.0/24")
    return entry


def _list_entry(text: str) -> str | Network:
    """Read a name, or an address or a network in CIDR form."""
    entry = _entry(text)
    if not address_of(entry) and not re.fullmatch(r"([0-9a-f:]*[.:][0-9a-f.:]*|[0-9]+)/[0-9.]*", entry):
        return entry
    try:
        address = ipaddress.ip_interface(entry)
    except ValueError:
        raise ValueError("not a network; give ADDRESS/PREFIX, for example 192.0.2.0/24 or 2001:db8::/32") from None
    if address.ip != address.network.network_address:
        raise ValueError(f"the address has bits beyond the prefix; did you mean {address.network}?")
    return _unmapped(address.network)


def _network(text: str) -> Network:
    entry = _list_entry(text)
    if isinstance(entry, str):
        raise ValueError("give an address or ADDRESS/PREFIX, for example 192.0.2.0/24")
    return entry


def _quota(text: str) -> tuple[str, int, int | None]:
    """Read LOGIN:DAY or LOGIN:DAY:HOUR, a login and its quotas; the second one is None if it is not given."""
    number = "([0-9]{1,9}|unlimited)"
    match = re.fullmatch(rf"(?!.*:[0-9]+ )(.*?\S) *: *{number}(?: *: *{number})?", text.lower())
    if not match:
        raise ValueError("give LOGIN:N, LOGIN:unlimited or LOGIN:DAY:HOUR, for example newsletter:20000")
    if match[1] == "*":
        raise ValueError(f"did you mean defaultquota={match[2]}?")
    if not isinstance(name := _list_entry(match[1]), str):
        raise ValueError("a quota is a login's or an @domain's, not an address's")
    day, hour = (NEVER if limit == "unlimited" else int(limit) for limit in (match[2], match[3] or "0"))
    return name, day, hour if match[3] else None


REPEATED = ("quota", "trusted_network", "always_allow", "whitelist", "blacklist")  # may be given in several lines
MESSAGE = _like("[\x00-\x7f]{1,200}", "give at most 200 characters, all of them ASCII", str)  # an SMTP line has 512
MAIL_ADDRESS = _like(r"[A-Z0-9!#$%&'+/=?^_`{|}~.-]+@[A-Z0-9.-]+",
                     "give a mail address, for example helpdesk@example.org", str.lower)  # fmt: skip
TABLE_NAME = _like("[A-Z0-9_$]{1,64}", "give a plain SQL name of letters, digits, _ and $, for example events", str)
BIND = _like("/.+|[A-Z0-9._-]+|[0-9A-F:.]*:[0-9A-F:.]*:[0-9A-F:.%]*",
             "give an address, a host name or the path of a Unix socket; the port stands in port=", str)  # fmt: skip


def _setting(default: Any, read: Callable[[str], Any], restart: bool = False, secret: bool = False) -> Any:
    """Return a field of Settings: its default, how its text is read, and whether a change needs a restart."""
    facts = {"read": read, "restart": restart}
    return dataclasses.field(default_factory=lambda: default, repr=not secret, metadata=facts)


class _Mismatch(ValueError):
    """A mistake in the line with this number."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings, each named as in the file; a reload replaces the whole object, so a request sees one state."""

    bind: str = _setting("127.0.0.1", BIND, restart=True)
    port: int = _setting(9093, _number(1, 65535), restart=True)
    max_connections: int = _setting(1000, _number(1, 100_000))
    mode: str = _setting("enforce", _one_of("enforce", "audit"))
    defaultquota: int = _setting(1500, _number(1))
    rejectquota: int = _setting(0, _number(1))  # 0: twice defaultquota
    hourquota: int = _setting(0, _number(0))  # 0: none
    quota: dict[str, Limits] = _setting({}, _quota)
    early_signs: str = _setting("no", _one_of("no", "audit", "yes"))
    max_places: int = _setting(5, _number(0))  # 0: any number
    new_place_quota: int = _setting(100, _number(0))  # 0: none
    trusted_network: UserList = _setting(NOBODY, _network)
    strip_domain: bool = _setting(True, _like("yes|no", "give yes or no", lambda text: text.lower() == "yes"))
    hold_message: str = _setting("", MESSAGE)
    reject_message: str = _setting("", MESSAGE)
    always_allow: UserList = _setting(NOBODY, MAIL_ADDRESS)
    whitelist: UserList = _setting(NOBODY, _list_entry)
    blacklist: UserList = _setting(NOBODY, _list_entry)
    whitelist_days: tuple[int, int] = _setting((1, 5), _range(1, 7, "1-5"))
    whitelist_hours: tuple[int, int] = _setting((7, 19), _range(0, 24, "7-19"))
    keep_days: int = _setting(7, _number(2, 36_500))
    on_stop: Sequence[str] = _setting((), shlex.split)
    dbhost: tuple[tuple[str, int | None], ...] = _setting((), _servers, restart=True)
    dbport: int = _setting(3306, _number(1, 65535), restart=True)
    dbname: str = _setting("", str, restart=True)
    dbuser: str = _setting("", str, restart=True)
    dbpass: str = _setting("", str, restart=True, secret=True)
    dbssl_ca: str = _setting("", _file, restart=True)
    dbssl_cert: str = _setting("", _file, restart=True)
    dbssl_key: str = _setting("", _file, restart=True)
    dbssl_name: str = _setting("", str, restart=True)  # in the server's certificate; "none": any
    policy_table: str = _setting("events", TABLE_NAME, restart=True)
    statedir: str = _setting("", str, restart=True)
    lines: dict[str, int] = dataclasses.field(default_factory=dict, compare=False)  # where each was given (quota=anna)
    gone: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # what is to be said of settings of 0.1
    path: str = dataclasses.field(default="", compare=False)  # of the file; without one the defaults serve

    @classmethod
    def from_file(cls, path: str) -> Settings:
        """Read `path`; raises SettingsError, which names file, line and remedy.

        Lines of key=value, in UTF-8 (comments may hold anything).  `#` starts a comment only at the start of a line,
        and quotes are literal: passwords contain both.
        """
        given: dict[str, list[tuple[Any, int]]] = {}  # of each key its values, with the numbers of their lines
        number = 0
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
                lines = [line.strip(" \t\r\n") for line in file]
            for number, line in enumerate(lines, start=1):
                if not line or line.startswith("#"):
                    continue
                key, value = cls._read_line(line)
                given.setdefault(key, []).append((value, number))
                if len(given[key]) > 1 and key not in REPEATED:
                    raise ValueError(f"{key}= was given in line {given[key][0][1]} already; keep one of them")
            gone = [(key, *given.pop(key)[0]) for key in GONE if key in given]
            said = tuple(f"{path}:{line}: {key}= is gone; write instead: {printable(new)}" for key, new, line in gone)
            return dataclasses.replace(cls._put_together(given), gone=said, path=path)
        except OSError as error:
            hint = f"; try: chown root:policyd {path} && chmod 0640 {path}" if error.errno == errno.EACCES else ""
            raise SettingsError(f"{path}: {error.strerror}{hint}") from error
        except ValueError as error:
            raise SettingsError(f"{path}:{getattr(error, 'line', number)}: {printable(str(error))}") from error

    @classmethod
    def _read_line(cls, line: str) -> tuple[str, Any]:
        readers = {field.name: field.metadata["read"] for field in dataclasses.fields(cls) if field.metadata}
        readers.update({key: new.format for key, new in GONE.items()})
        before, equals, text = (part.strip(" \t") for part in line.partition("="))
        key = before.split()[0] if before else "''"  # no more of it: it may be a password
        if key not in readers:
            close = difflib.get_close_matches(key.lower(), readers, n=1)
            known = "known are " + ", ".join(name for name in readers if name not in GONE)
            raise ValueError(f"unknown setting {key}; {f'did you mean {close[0]}=?' if close else known}")
        if not equals or key != before:
            raise ValueError(f"no '=' after {key}; write {key}=VALUE")
        if not text and key != "dbpass":
            raise ValueError(f"{key}= has no value; give one, or remove the line")
        if not text.isprintable() and not clean(text).isprintable():  # nor are the stand-ins for what is not UTF-8
            raise ValueError(f"{key}= has a control character or is not UTF-8; type it again")
        try:
            return key, readers[key](text)
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}={text}: {getattr(error, 'strerror', '') or error}") from error

    @classmethod
    def _put_together(cls, given: dict[str, list[tuple[Any, int]]]) -> Settings:
        """Return the settings, unless one of them needs or forbids another."""
        values = {key: entries[0][0] for key, entries in given.items() if key not in REPEATED}
        lines = {key: entries[0][1] for key, entries in given.items()}
        hint = "; add it, or remove every db... line to use the embedded store"
        needs = [(key, needed, hint) for needed in ("dbname", "dbuser") for key in given if key.startswith("db")]
        needs += [("dbssl_cert", "dbssl_key", ""), ("dbssl_key", "dbssl_cert", ""), ("dbssl_cert", "dbssl_ca", ""),
                  ("dbssl_name", "dbssl_ca", "")]  # fmt: skip
        for key, needed, hint in needs:
            if key in given and needed not in given:
                raise _Mismatch(lines[key], f"{key}= needs {needed}= too{hint}")
        if "dbname" in given:
            values.setdefault("dbhost", (("127.0.0.1", None),))
        values.update({key: UserList(given.get(key, ())) for key in REPEATED[1:]})
        settings = cls(**values, lines=lines)
        if 0 < settings.rejectquota < settings.defaultquota:
            raise _Mismatch(lines["rejectquota"], f"rejectquota={settings.rejectquota} is below"
                            f" defaultquota={settings.defaultquota}; mail is held first, then refused")  # fmt: skip
        if settings.early_signs != "no" and settings.keep_days <= DAYS_TO_JUDGE:
            raise _Mismatch(lines.get("keep_days", lines["early_signs"]),
                            f"early_signs= needs keep_days={DAYS_TO_JUDGE + 1} or more (better 30)")  # fmt: skip
        if settings.dbssl_ca:
            settings.tls()
        quota: dict[str, Limits] = {}
        for (name, day, hour), line in given.get("quota", ()):
            login = clean(name) if name.startswith("@") else settings.login_of(name)
            if login in quota:
                raise _Mismatch(line, f"{login} has a quota= already; keep one of them")
            if login.startswith("@") and settings.strip_domain:
                hint = "needs strip_domain=no: without their domain logins belong to none"
                raise _Mismatch(line, f"quota={login}: {hint}")
            if hour is None:
                hour = settings.hourquota if day < NEVER else 0
            reject_at = 2 * day if 0 < day < NEVER else NEVER  # 0 is there to hold all mail, not to refuse it
            quota[login] = settings.everybody._replace(hold_at=day, reject_at=reject_at, hour=hour or NEVER)
            if not login.startswith("@"):  # its bulk is known
                quota[login] = quota[login]._replace(new_place_quota=NEVER)
            lines[f"quota={login}"] = line
        return dataclasses.replace(settings, quota=quota)

    def login_of(self, sasl_username: str) -> str:
        """Return the account that is counted."""
        return login_of(sasl_username, self.strip_domain)

    @functools.cached_property
    def everybody(self) -> Limits:
        """The limits of a login without a quota of its own."""
        is_early = self.early_signs != "no"
        return Limits(self.defaultquota, self.rejectquota or 2 * self.defaultquota, self.hourquota or NEVER,
                      (is_early and self.max_places) or NEVER, (is_early and self.new_place_quota) or NEVER,
                      is_early)  # fmt: skip

    def quota_of(self, login: str) -> str:
        """Return the login or @domain whose quota= is for `login`, or an empty text."""
        domain = "".join(login.rpartition("@")[1:]) if "@" in login else ""
        return next((name for name in (login, domain) if name in self.quota), "")

    def limits_of(self, login: str, sasl_username: str = "") -> Limits:
        """Return the limits of a login, by which a whitelist may mean its whole `sasl_username`, too."""
        limits = self.quota.get(self.quota_of(login), self.everybody) if self.quota else self.everybody
        if limits.new_place_quota == NEVER or not self.whitelist.lines:
            return limits
        is_listed = self.whitelist.line_of(names_of(sasl_username or login, login, ""), "")
        return limits._replace(new_place_quota=NEVER) if is_listed else limits  # its bulk is known, at any hour

    def rows_of(self, login: str) -> int:
        """Return how many of a login's newest events decide.

        Beyond all limits, its own or else everybody's, older events change nothing, and each has a recipient at least.
        Those of a batch are on top: running sums are computed back from the last one.
        """
        own = self.limits_of(login).decisive() if self.quota else 0
        return (own or self.everybody.decisive()) + BATCH_EVENTS

    @functools.cached_property
    def needs_hour(self) -> bool:
        """Tell whether the recipients of the last hour matter."""
        return any(limits.hour < NEVER or limits.early_signs for limits in (self.everybody, *self.quota.values()))

    def tls(self) -> ssl.SSLContext:
        """Return what checks the server's certificate, from the files as they are now; raises _Mismatch."""
        import ssl  # here: most sites do without

        key = "dbssl_ca"
        try:
            context = ssl.create_default_context(cafile=self.dbssl_ca)
            context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)  # many a site's own CA is not that strict
            context.check_hostname = self.dbssl_name != "none"
            if self.dbssl_cert:
                key = "dbssl_cert"
                context.load_cert_chain(self.dbssl_cert, self.dbssl_key, password=str)  # never ask a terminal for one
        except OSError as error:  # ssl.SSLError is one
            reason = f"{error.strerror or error}; give PEM files, and the certificate's own key without a password"
            raise _Mismatch(self.lines[key], f"{key}={getattr(self, key)}: {reason}") from error
        return context

    def differences(self, other: Settings) -> list[str]:
        """Return the names of the settings that need a restart and differ."""
        restart = [field.name for field in dataclasses.fields(self) if field.metadata.get("restart")]
        return [name for name in restart if getattr(self, name) != getattr(other, name)]

    def state_file(self, name: str) -> str:
        """Return the path of `name` in statedir, $STATE_DIRECTORY, /var/lib/policyd or the current directory."""
        usual = "/var/lib/policyd" if os.access("/var/lib/policyd", os.W_OK) else os.getcwd()
        return os.path.join(self.statedir or os.environ.get("STATE_DIRECTORY", "").split(":")[0] or usual, name)


# ---- protocol: Postfix's SMTPD_POLICY_README, and nothing of storage ----------------------------------

MAX_LINE = 8192  # bytes of one attribute, without its newline
MAX_REQUEST = 65536  # bytes of one request
IDLE_TIMEOUT_S = 1015  # above Postfix's smtpd_policy_service_max_ttl (1000 s): Postfix is the one to hang up
REQUEST_TIMEOUT_S = 30  # for a whole request once its first byte is here, however it dribbles


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


def _decode(lines: bytes) -> str:
    """Return lines as text, each that is not UTF-8 as Latin-1: a login is the same in both."""
    try:
        return lines.decode()
    except UnicodeDecodeError:
        return "\n".join(map(_decode, lines.split(b"\n"))) if b"\n" in lines else lines.decode("latin-1")


def parse_request(lines: bytes) -> PolicyRequest:
    """Return the request with these `lines`, the empty one left out; raises ProtocolError.

    Unknown attributes are ignored, of an attribute given twice the last one counts, and a missing one is
    as good as an empty one.  A value may hold any byte but NUL and newline.
    """
    text = _decode(lines)
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


def requests(connection: socket.socket) -> Iterator[PolicyRequest]:
    """Yield the requests of a connection until it ends, or is idle for too long; raises ProtocolError and OSError."""
    connection.settimeout(IDLE_TIMEOUT_S)
    received = b""
    while True:
        try:
            received = received or connection.recv(MAX_REQUEST)
        except socket.timeout:
            return  # nobody has asked anything: no news
        if not received:
            return
        lines, end, received = received.partition(b"\n\n")
        if not end or len(lines) > MAX_LINE:  # Postfix sends all of a request at once, and less
            rest = _rest_of_request(connection, lines + end + received)
            if rest is None:
                return
            lines, received = rest
        yield parse_request(lines)


def _rest_of_request(connection: socket.socket, begun: bytes) -> tuple[bytes, bytes] | None:
    """Receive what is missing of a request; return its lines and what came behind them, None if the peer ends early."""
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    received = bytearray(begun)
    line = 0  # where the first line begins that has not been looked at
    while True:
        while (end := received.find(b"\n", line)) >= 0:
            if end == line and line:
                connection.settimeout(IDLE_TIMEOUT_S)
                return bytes(received[: line - 1]), bytes(received[line + 1 :])
            if b"=" not in received[line:end]:
                raise ProtocolError("a line without '='")
            _check_size(end - line, end)
            line = end + 1
        _check_size(len(received) - line, len(received))
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            more = connection.recv(MAX_REQUEST)
        except socket.timeout:
            raise ProtocolError(f"incomplete after {REQUEST_TIMEOUT_S} s") from None
        if not more:
            return None
        received += more


def _check_size(line: int, request: int) -> None:
    for what, size, most in (("line", line, MAX_LINE), ("request", request, MAX_REQUEST)):
        if size > most:
            raise ProtocolError(f"a {what} longer than {most} bytes")


# ---- decision: numbers, hours and places; no clock, no socket, no SQL ------------------------------------------

MESSAGES_TO_JUDGE = 5  # from new places: a letter to a whole class from a train is one message
RULES = ("blocked", "places", "newplace", "hourquota", "overquota")
LASTING = RULES[:3]  # an incident of these holds all mail for 24 h
REASONS = {"blocked": "blocked", "places": "too many places", "newplace": "too much from new places",
           "hourquota": "hour quota exceeded", "overquota": "quota exceeded"}  # fmt: skip


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
        incidents = self.incidents | other.incidents
        return Usage(self.recipients + other.recipients, self.of_hour + other.of_hour, incidents, *self[3:])

    def lasting(self) -> str:
        """Return the rule of the incident that holds this login's mail, the gravest of them, or an empty text."""
        return next((rule for rule in LASTING if not self.incidents.isdisjoint((f"HOLD {rule}", f"REJECT {rule}"))), "")


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


def _held(rule: str, figure: int, limit: int) -> Verdict:
    return Verdict("HOLD", rule, REASONS[rule], f"{rule} ({figure}>{limit})", figure, limit)


def decide(usage: Usage, limits: Limits) -> Verdict:
    """Return what becomes of a message of a login that has used up `usage`, the message included.

    Reaching a quota is over it; of places one more is.
    """
    lasting = usage.lasting() if usage.incidents else ""
    if lasting == "blocked":
        return Verdict("HOLD", lasting, REASONS[lasting], f"blocked (since {local_time(usage.since)})")
    if usage.recipients >= limits.reject_at:
        limit = f"2x{limits.hold_at}" if limits.reject_at == 2 * limits.hold_at else limits.reject_at
        said = f"overquota ({usage.recipients}>{limit})"
        return Verdict("REJECT", "overquota", "max quota exceeded", said, usage.recipients, limits.reject_at)
    if usage.recipients >= limits.hold_at:
        return _held("overquota", usage.recipients, limits.hold_at)
    if usage.of_hour >= limits.hour:
        return _held("hourquota", usage.of_hour, limits.hour)
    if lasting and limits.early_signs:
        return Verdict("HOLD", lasting, REASONS[lasting], f"{lasting} (since {local_time(usage.since)})")
    if usage.new_places > limits.places:
        return _held("places", usage.new_places, limits.places)
    if usage.new_places_24h > 3 * limits.places:
        return _held("places", usage.new_places_24h, 3 * limits.places)
    if usage.from_new_places >= limits.new_place_quota:
        return _held("newplace", usage.from_new_places, limits.new_place_quota)
    return PASSED


@functools.lru_cache(maxsize=10_000)
def place_of(client_address: str, trusted: UserList = NOBODY) -> str | None:
    """Return a client's place, the first number of its address: 198. or 2001:, None if it is trusted or no address.

    That is a /8 of IPv4 and a /16 of IPv6: a carrier's phones have a handful of these, a botnet is everywhere.
    """
    address = address_of(client_address)
    if address is None or trusted.line_of((), client_address):
        return None
    return f"{address.packed[0]}." if address.version == 4 else f"{int.from_bytes(address.packed[:2], 'big'):x}:"


class Sighting(NamedTuple):
    """What a login sent from one address."""

    client_address: str
    recipients: int  # of the last hour
    messages: int  # of the last hour
    age_s: float  # of the newest, also of an older one


def signs(sightings: Iterable[Sighting], known: set[str], trusted: UserList) -> tuple[int, int, int]:
    """Return Usage's last three figures from what was seen of a login, and the places that are `known` of it."""
    new = [(place, seen) for seen in sightings if (place := place_of(seen.client_address, trusted)) not in known]
    new = [(place, seen) for place, seen in new if place]
    is_much = sum(seen.messages for _, seen in new) >= MESSAGES_TO_JUDGE
    return (
        len({place for place, seen in new if seen.age_s < HALF_HOUR_S}),
        len({place for place, _ in new}),
        sum(seen.recipients for _, seen in new) if is_much else 0,
    )


def in_office_hours(now: time.struct_time, days: tuple[int, int], hours: tuple[int, int]) -> bool:
    """Tell whether the local time `now` lies on these days (1 is Monday) and in these hours, the end excluded."""
    return days[0] <= now.tm_wday + 1 <= days[1] and hours[0] <= now.tm_hour < hours[1]


# ---- storage: events in, usages out; two stores with the same methods ------------------------------------------
#
# Both can insert(), tell usages(), ask() anything else, check() whether they can be used, name other problems(),
# purge() and init(), resolve() names before all that, and close().  All raise RepositoryUnavailable; deadlines are
# monotonic seconds.

CONNECT_TIMEOUT_S = 1
LATE_ROW_S = 0.2  # by so much sooner than we stop waiting for it
RACE_RETRIES = 5  # two relays on two Galera nodes lose one to the other some times in a row, hardly six
IDLE_CONNECTION_S = 60  # firewalls drop older ones in silence
TABLE_LOOK_S = 60  # how long a connection trusts what it has seen of the table's columns and indexes
MOST_INCIDENTS = 256  # of a login and day
LONG_LOOK_S = 10  # how old may be what is known of the older incidents of a login with a long history?
PURGE_SLICE = 10_000  # rows of one DELETE
PATIENCE_S = 600  # for a statement for which no mail waits
KEPT_TEXT = 255  # characters of a login, sender or address that are kept: the columns of scripts/schema.sql
INCIDENTS = [f"{action} {rule}" for rule in RULES for action in ("HOLD", "REJECT")]


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


def run_up(logins: Sequence[str], events: Sequence[Event], totals: Mapping[str, Usage]) -> list[Usage]:
    """Return the usages after each event, given the `totals` of the logins after the last one."""
    if len(totals) == len(logins):
        return list(map(totals.__getitem__, logins))  # each login once
    left = dict(totals)
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
        deadline = 0.0  # monotonic
        must_encrypt = False
        longest_wait_s = float(CONNECT_TIMEOUT_S)  # for one answer, as long as it is being connected
        _read_timeout = _write_timeout = property(
            lambda self: max(0.01, min(self.longest_wait_s, self.deadline - time.monotonic())), lambda self, _: None
        )

        def _request_authentication(self) -> None:  # the next step sends the password
            if self.must_encrypt and not self.server_capabilities & pymysql.constants.CLIENT.SSL:  # type: ignore
                raise pymysql.OperationalError(2026, "the server offers no TLS, which dbssl_ca= asks for")
            super()._request_authentication()  # type: ignore

    return BoundedConnection


class ConnectionPool:
    """PyMySQL connections to the first server of `dbhost` that answers.  Thread-safe."""

    # For both kinds of server: each skips what is the other's.  (autocommit: some begin with 0; the driver trusts it.)
    # The server ends a statement itself after 2 s, so that it leaves no late row behind.
    INIT = "SET SESSION autocommit=1, sql_mode='STRICT_ALL_TABLES'"
    LIMITS = "/*M! , max_statement_time=2 */" \
             " /*!50708 , max_execution_time=2000, lock_wait_timeout=2, innodb_lock_wait_timeout=2 */"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servers = collections.deque(settings.dbhost)
        self._addresses: dict[object, Any] = {}  # of a server, or why it has none
        self._idle: collections.deque[tuple[Any, float]] = collections.deque()  # with the time of its last use

    def resolve(self) -> None:
        """Look up the servers' names, which takes as long as DNS pleases; one that is not found keeps its addresses."""
        for host, _ in tuple(self._servers):
            try:
                if not host.startswith("/"):
                    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                    self._addresses[host] = [address[0] for *_, address in found]
            except (OSError, UnicodeError) as error:
                self._addresses.setdefault(host, str(error))

    @contextlib.contextmanager
    def connection(self, deadline: float) -> Iterator[Any]:
        """Lend a connection whose every wait ends at `deadline`; one in which anything failed is thrown away."""
        connection = self._take() or self.connect(deadline)
        connection.deadline = deadline
        is_sound = False
        try:
            yield connection
            is_sound = True
        finally:
            if is_sound:
                self._idle.append((connection, time.monotonic()))
            else:
                _close_quietly(connection)
                self.close()  # the others go to the same server

    def _take(self) -> Any:
        """Return an idle connection that nobody has closed, or None: to use one and to fail may count twice."""
        while self._idle:
            connection, used = self._idle.pop()
            poll = select.poll()
            with contextlib.suppress(AttributeError, IndexError, OSError, TypeError, ValueError):  # it has no socket
                poll.register(connection._sock, select.POLLIN)
                if time.monotonic() - used < IDLE_CONNECTION_S and not poll.poll(0):
                    return connection
            _close_quietly(connection)
        return None

    def connect(self, deadline: float, limits: str = LIMITS) -> Any:
        """Connect to the first server that answers."""
        failures = []
        for server in tuple(self._servers):
            try:
                return self._connect(*server, deadline, limits)
            except Exception as error:  # what answers there may speak anything, and PyMySQL trip over it anyhow
                is_quoted = error.args[:1] == (1045,) and re.fullmatch("(['\"]).*\\1", self._settings.dbpass)
                hint = " (dbpass= stands in quotes, and they are taken for a part of it)" if is_quoted else ""
                failures.append(f"{server[0]}: {error}{hint}")
                if self._servers[0] == server:  # else another thread has passed it over
                    self.pass_over()
        raise RepositoryUnavailable("; ".join(failures))

    def _connect(self, host: str, port: int | None, deadline: float, limits: str) -> Any:
        settings, path = self._settings, host if host.startswith("/") else None
        name = "localhost" if path else settings.dbssl_name if settings.dbssl_name not in ("", "none") else host
        tls = {"ssl_disabled": True} if path else {"ssl": settings.tls()} if settings.dbssl_ca else {}
        connection = _connection_class()(
            host=name, unix_socket=path, user=settings.dbuser, database=settings.dbname, charset="utf8mb4",
            password=settings.dbpass.encode(),  # as text the driver would send Latin-1
            autocommit=True,  # committed before it is summed, or two relays would miss each other
            connect_timeout=CONNECT_TIMEOUT_S, init_command=self.INIT + limits, defer_connect=True, **tls,
        )  # fmt: skip
        connection.deadline, connection.must_encrypt = deadline, "ssl" in tls
        connection.connect(None if path else self._dial(host, port or settings.dbport, deadline))
        connection.longest_wait_s = NEVER
        return connection

    def _dial(self, host: str, port: int, deadline: float) -> socket.socket:
        addresses = self._addresses.get(host, "its address is not known yet")
        failure = OSError(addresses)
        for address in addresses if isinstance(addresses, list) else ():
            try:
                patience = max(0.01, min(CONNECT_TIMEOUT_S, deadline - time.monotonic()))
                dialled = socket.create_connection((address, port), patience)
                dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                dialled.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                return dialled
            except OSError as error:
                failure = error
        raise failure

    def pass_over(self) -> None:
        """Begin with the next server from now on: this one answers, but does not do its work."""
        self._servers.rotate(-1)

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            _close_quietly(self._idle.pop()[0])


def _close_quietly(connection: Any) -> None:
    with contextlib.suppress(Exception):  # it may be broken already, in any way
        connection.close()


CODECS = {"utf8mb4": "utf-8", "latin1": "cp1252"}  # MariaDB's latin1 is cp1252; of the others we use ASCII


def fit(text: str, column: tuple[int, str]) -> str:
    """Return `text` as a CHAR column gives it back: escaped, cut, and without spaces at its end."""
    width, codec = column
    if text.isascii() and len(text) <= width and not text.endswith(" "):
        return text
    return text.encode(codec, "backslashreplace").decode(codec)[:width].rstrip(" ")


class Table(NamedTuple):
    """What the server says of the table."""

    columns: list[tuple[int, str]]  # width in characters and Python codec of the three texts
    key: str  # the name of an index that begins (sasl_username, ts, or an empty text
    force_index: str  # FORCE INDEX (...), if the server takes that
    login: str  # the expression by which two logins are equal only if they are

    def fit(self, event: Event) -> tuple[str | int | None, ...]:
        """Return `event` in the form in which the table keeps it, so that none is refused for not fitting."""
        return (*map(fit, event[:3], self.columns), event.recipient_count)


def _query(connection: Any, statement: str, arguments: object = None) -> list[Any]:
    """Run one statement; return its rows, or the number of those it changed as one."""
    with connection.cursor() as cursor:
        changed = cursor.execute(statement, arguments or None)
        return list(cursor.fetchall()) if cursor.description else [(changed,)]


# Rows refused for their own sake, whatever class the driver gives them: CHECK (2 servers), SIGNAL, no default, no NULL.
REFUSALS = 4025, 3819, 1644, 1364, 1048


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, (pymysql.DataError, pymysql.IntegrityError)) or error.args[0] in REFUSALS


def _retries(error: Exception) -> int:
    """Return how often a statement that ended with `error` is worth another try: when it has certainly done nothing."""
    if isinstance(error.__context__, socket.timeout):
        return 0
    if error.args[:1] in [(1213,), (1020,)]:  # deadlock or Galera conflict, record has changed: rolled back
        return RACE_RETRIES
    # no such index (any more); server has gone away: not even sent
    return int(isinstance(error, pymysql.InterfaceError) or error.args[:1] in [(1176,), (2006,)])


@functools.cache
def _incidents_of(kinds: int) -> frozenset[str]:
    """Return the incidents that a BIT_OR of their numbers, 1 for the first, stands for."""
    return frozenset(incident for n, incident in enumerate(INCIDENTS, start=1) if kinds >> n & 1)


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
    FACTS = (
        "SELECT LOWER(column_name), character_maximum_length, character_set_name, collation_name"
        " FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = %s"
    )
    INDEXES = (
        "SELECT index_name FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = %s"
        " AND (seq_in_index, column_name) IN ((1, 'sasl_username'), (2, 'ts')) GROUP BY index_name HAVING COUNT(*) = 2"
    )
    # With what is left of the time, for MariaDB; on MySQL only locks are waited for, and these have a limit.  Two
    # messages of one millisecond add up; ts = ts, because go-policyd's table would move it.
    INSERT = (
        "/*M! SET STATEMENT max_statement_time={left_s:.3f} FOR */"
        " INSERT INTO `{table}` (ts, sasl_username, sender, client_address, recipient_count) {rows} ON DUPLICATE KEY"
        " UPDATE recipient_count = COALESCE(recipient_count, 0) + VALUES(recipient_count), ts = ts"
    )
    NOW = "CURRENT_TIMESTAMP(3)"
    # A relay's clock may be ahead, even of what FROM_UNIXTIME knows.
    THEN = "LEAST(FROM_UNIXTIME(LEAST(%s, 2147483647000) / 1000), CURRENT_TIMESTAMP(3))"
    NO_ROW = "SELECT CURRENT_TIMESTAMP(3), '', '', '', 0 FROM DUAL WHERE FALSE"
    SINCE = r"ts > CURRENT_TIMESTAMP(3) - INTERVAL \1 SECOND"
    DAY = "ts > CURRENT_TIMESTAMP(3) - INTERVAL 1 DAY"
    AGE = "TIMESTAMPDIFF(MICROSECOND, ts, CURRENT_TIMESTAMP(3)) / 1e6"
    PLACE = "IF(LEFT(client_address, 8) = '64:ff9b:', client_address," \
            " SUBSTRING_INDEX(SUBSTRING_INDEX(TRIM(LEADING '::ffff:' FROM client_address), '.', 1), ':', 1))"
    BINARY = "CONVERT(sasl_username USING utf8mb4) COLLATE utf8mb4_bin"  # equal only if it is
    SUM_OF = "CAST(SUM({}) AS SIGNED)"  # else the driver makes a Decimal of it
    RECIPIENTS = SUM_OF.format("GREATEST(recipient_count, 0)")
    OF_HOUR = SUM_OF.format("IF(ts > CURRENT_TIMESTAMP(3) - INTERVAL 1 HOUR, GREATEST(recipient_count, 0), 0)")
    KINDS = f"BIT_OR(IF(recipient_count IS NULL, 1 << FIELD(client_address, {str(INCIDENTS)[1:-1]}), 0))"
    # Of many logins at once; the column's collation may find more of them than were asked for.
    SUM = ("SELECT {login} AS login, {found} FROM {from_}"
           f" WHERE sasl_username IN ({{logins}}) AND {DAY} GROUP BY login")  # fmt: skip
    # Of one login's newest rows, so that a long history costs no more than a short one; that may hide older incidents.
    OF_ONE = f"FROM {{from_}} WHERE sasl_username = %s AND {{login}} = %s AND {DAY}"
    BOUNDED = (f"(SELECT ts, client_address, recipient_count {OF_ONE}"
               " AND (recipient_count > 0 OR recipient_count IS NULL) ORDER BY ts DESC LIMIT %s) AS newest")
    BOUNDED_SUM = f"SELECT %s, {{found}} FROM {BOUNDED}"
    OLDER_INCIDENTS = f"SELECT %s, -1, 0, {KINDS} {OF_ONE} AND recipient_count IS NULL"
    EVERY_RECIPIENT = "SELECT COALESCE(SUM(ABS(recipient_count)), 0) FROM {from_} WHERE {of_login} AND {since day}"
    PURGE = "DELETE FROM `{table}` WHERE ts < CURRENT_TIMESTAMP(3) - INTERVAL %s DAY ORDER BY ts LIMIT %s"

    def __init__(self, settings: Settings) -> None:
        _connection_class()  # a driver that is missing is missed at the start
        self._pool = ConnectionPool(settings)
        self.resolve, self.close = self._pool.resolve, self._pool.close
        self._name = settings.policy_table
        self._where = f"table {settings.policy_table} of MariaDB database {settings.dbname}"
        self._grant = f"ON `{settings.dbname}`.`{settings.policy_table}` TO '{settings.dbuser}'@..."
        self._table: tuple[Table, float] | None = None  # as last seen, and when
        # The logins whose history was last seen to be longer than what decides, with their older incidents as of when.
        self._long: dict[str, tuple[float, frozenset[str]]] = {}

    def __str__(self) -> str:
        return self._where

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        """Commit `events` as of now, or as of `times` (ms since 1970); return the positions of those refused."""
        refused = self._run(lambda connection: self._insert(connection, events, times), deadline)
        for n, error in refused.items():
            log.error(f"ERROR while UPDATING db: {error}; not counted: {'/'.join(map(str, events[n]))}")
        return set(refused)

    def _insert(self, connection: Any, events: Sequence[Event], times: Sequence[int] | None) -> dict[int, Exception]:
        """Insert the events; equal ones a millisecond apart, so that each message is a row of its own."""
        table = self._look(connection)
        rows: list[tuple[str, list[object]]] = []
        equal: collections.Counter[object] = collections.Counter()
        for when, event in zip(times or itertools.repeat(None), events):
            values = table.fit(event)
            equal[when, values[:3]] += 1
            earlier = equal[when, values[:3]] * 1000 - 1000
            before = f" - INTERVAL {earlier} MICROSECOND" if earlier else ""
            row = f"({self.NOW if when is None else self.THEN}{before}, %s, %s, %s, %s)"
            rows.append((row, [*values] if when is None else [when, *values]))
        try:
            self._insert_rows(connection, rows)
            return {}
        except pymysql.MySQLError as error:
            if not _is_refusal(error):
                raise
        self._table = None
        if self._look(connection) != table:  # altered since it was looked at
            return self._insert(connection, events, times)
        connection.begin()  # all or nothing: a failure on the way must not leave half of them behind
        refused: dict[int, Exception] = {}
        parts = [(0, len(rows))]
        while parts:  # closing in on the guilty rows: a statement for each would take too long
            first, end = parts.pop()
            try:
                self._insert_rows(connection, rows[first:end])
            except pymysql.MySQLError as error:
                if not _is_refusal(error):
                    raise
                middle = (first + end) // 2
                parts += [(first, middle), (middle, end)] if middle > first else []
                refused.update({} if middle > first else {first: error})
        self._left_s(connection)
        connection.commit()
        return refused

    @staticmethod
    def _left_s(connection: Any) -> float:
        """Return for how long the server may work; what could come in late, beside its journaled copy, is not sent."""
        left_s: float = min(DAY_S, connection.deadline - time.monotonic() - LATE_ROW_S)
        if left_s <= 0:
            raise RepositoryUnavailable("the database is too slow")
        return left_s

    def _insert_rows(self, connection: Any, rows: list[tuple[str, list[object]]]) -> None:
        left_s = self._left_s(connection)
        texts = f"VALUES {', '.join(text for text, _ in rows)}"
        statement = self.INSERT.format(left_s=left_s, table=self._name, rows=texts)
        _query(connection, statement, [value for _, values in rows for value in values])

    def usages(self, events: Sequence[Event], settings: Settings, deadline: float) -> list[Usage]:
        """Return, for each of the `events` just inserted, what its login had used with it."""
        return self._run(lambda connection: self._usages(connection, events, settings), deadline)

    def _usages(self, connection: Any, events: Sequence[Event], settings: Settings) -> list[Usage]:
        table = self._look(connection)
        logins = [fit(event.sasl_username, table.columns[0]) for event in events]
        rows: dict[str, int] = {}  # of each that decide; an old table cuts several logins to one
        inserted: dict[str, int] = {}
        for login, event in zip(logins, events):
            rows[login] = max(settings.rows_of(event.sasl_username), rows.get(login, 0))
            inserted[login] = inserted.get(login, 0) + (event.recipient_count or 0)
        bounded = {login: rows[login] for login in rows if login in self._long} if table.force_index else {}
        totals = self._totals(connection, table, settings, rows.keys() - bounded.keys(), bounded)
        again = {login for login in bounded if totals[login].recipients < rows[login]}  # forgiven, or long ago by now
        again |= {login for login in rows if totals[login].recipients < inserted[login]}  # cannot be
        if again:
            totals.update(self._totals(connection, table, settings, again, {}))
        for login, usage in totals.items():
            if usage.recipients < inserted[login]:
                self._see_what_was_inserted(connection, login, inserted[login])
            if usage.recipients < rows[login]:
                self._long.pop(login, None)
            else:
                self._long.setdefault(login, (0.0, frozenset()))
        return run_up(logins, events, totals)

    def _totals(self, connection: Any, table: Table, settings: Settings, logins: Iterable[str],
                bounded: Mapping[str, int]) -> dict[str, Usage]:  # fmt: skip
        """Return what `logins` have used, and those `bounded` with so many of their newest rows."""
        found = f"{self.RECIPIENTS}, {self.OF_HOUR if settings.needs_hour else '0'}, {self.KINDS}"
        words = {"from_": f"`{self._name}` {table.force_index}", "login": table.login, "found": found}
        together = list(logins)
        totals = dict.fromkeys([*together, *bounded], NOTHING)
        arguments: list[object] = [*together]
        parts = [self.SUM.format(logins=", ".join(["%s"] * len(together)), **words)] if together else []
        now = time.monotonic()
        for login, rows in bounded.items():
            parts.append(self.BOUNDED_SUM.format(**words))
            arguments += [login, login, login, rows + MOST_INCIDENTS]
            if now - self._long[login][0] > LONG_LOOK_S:
                parts.append(self.OLDER_INCIDENTS.format(**words))
                arguments += [login, login, login]
        for login, recipients, of_hour, kinds in _query(connection, " UNION ALL ".join(parts), arguments):
            if recipients == -1:
                self._long[login] = now, _incidents_of(kinds)
            elif (login := login.rstrip(" ")) in totals:  # and not one that is like it for the column's collation
                totals[login] = Usage(recipients or 0, of_hour or 0, _incidents_of(kinds))
        for login in bounded:
            totals[login] = totals[login].plus(Usage(0, 0, self._long[login][1]))
        return totals

    def _see_what_was_inserted(self, connection: Any, login: str, inserted: int) -> None:
        """Make sure that what was inserted is there, forgiven already perhaps; raises RepositoryUnavailable."""
        statement = self._in_words(self.EVERY_RECIPIENT, self._look(connection))
        if _query(connection, statement, {"login": login, "day": DAY_S})[0][0] < inserted:
            raise RepositoryUnavailable("the server does not show what it has just stored: send policyd to the primary")

    def _in_words(self, statement: str, table: Table) -> str:
        statement = re.sub(r"\{since (\w+)\}", self.SINCE.replace(r"\1", r"%(\1)s"), statement)
        of_login = f"sasl_username = %(login)s AND {table.login} = %(login)s"
        return statement.format(
            table=f"`{self._name}`", from_=f"`{self._name}` {table.force_index}", login=table.login, of_login=of_login,
            by_time=f"`{self._name}` FORCE INDEX (PRIMARY)", place=self.PLACE, now=self.NOW, age=self.AGE,
        )  # fmt: skip

    def ask(self, statement: str, arguments: Mapping[str, object], deadline: float | None = None) -> list[Any]:
        """Run a statement in words that both stores know; return its rows, or [(rows changed,)].  For any thread.

        The words, in braces: table, from_ (the same, read by login), by_time (the same, read by time), login (the
        column, each login apart), of_login (it is %(login)s), place (of the client), now, age (in s), and `since NAME`
        (less than %(NAME)s seconds ago).  Without a deadline on a connection of its own, for ten minutes at most.
        """

        def work(connection: Any) -> list[Any]:
            table = self._look(connection)
            login = fit(str(arguments.get("login", "")), table.columns[0])
            return _query(connection, self._in_words(statement, table), {**arguments, "login": login})

        if deadline is not None:
            return self._run(work, deadline)
        with self._patient_connection(PATIENCE_S) as connection:
            return work(connection)

    def check(self, deadline: float) -> str:
        """Return one line on the store, once it has been seen that events can be inserted."""
        self._table = None
        statement = self.INSERT.format(left_s=1, table=self._name, rows=self.NO_ROW)
        table = self._run(lambda connection: (self._look(connection), _query(connection, statement))[0], deadline)
        found = f"{self._where}, logins of up to {table.columns[0][0]} characters"
        if table.force_index:
            return f"{found}, index on (sasl_username, ts)"
        found += ", NO index on (sasl_username, ts): slow when it is large; run policyd --init-db"
        if table.key:
            found = found.replace("run policyd --init-db", f"{table.key} is IGNORED or INVISIBLE")
        log.warning(found)
        return found

    def _look_at_ourselves(self, connection: Any) -> tuple[Table, str, bool]:
        user = str(_query(connection, "SHOW CREATE USER CURRENT_USER()"))
        return self._look(connection), user, connection._secure or not connection.password

    def problems(self, deadline: float) -> list[str]:
        """Return what else is missing, though events can be counted."""
        table, user, is_secure = self._run(self._look_at_ourselves, deadline)
        found = []
        if table.key and not table.force_index:
            found.append(f"index {table.key} is IGNORED (MariaDB) or INVISIBLE (MySQL): sums are slow without it")
        if "caching_sha2_password" in user and not is_secure and not importlib.util.find_spec("cryptography"):
            found.append("python3-cryptography is missing: without it, or dbssl_ca=, this login works only until the"
                         " server is started again")  # fmt: skip
        try:
            self._run(lambda connection: _query(connection, self.PURGE.format(table=self._name), (36_500, 0)), deadline)
        except RepositoryUnavailable as error:
            found.append(f"old events cannot be deleted: {error}; try: GRANT DELETE {self._grant}")
        return found

    def has_index(self) -> bool:
        """Tell whether a login's events are found without reading all others'."""
        return self._table is not None and self._table[0].force_index != ""

    def purge(self, keep_days: int) -> Iterator[int]:
        """Delete the events older than `keep_days`, a slice at a time; yield the number of each.  For any thread."""
        with self._patient_connection(PATIENCE_S) as connection:
            while deleted := _query(connection, self.PURGE.format(table=self._name), (keep_days, PURGE_SLICE))[0][0]:
                yield deleted
                connection.deadline = time.monotonic() + PATIENCE_S

    def init(self) -> str:
        """Create or upgrade the table; return one line on what was done."""
        show = f"SHOW CREATE TABLE `{self._name}`"
        said_twice = " CHARACTER SET utf8mb4| COLLATE utf8mb4_bin"  # by MySQL: of the table, and of each column
        with self._patient_connection(DAY_S) as connection:
            if not _query(connection, self.FACTS, [self._name]):
                _query(connection, self.CREATE.format(table=self._name))
                return f"created {self._where}"
            before = re.sub(said_twice, "", _query(connection, show)[0][1])
            key = "" if _query(connection, self.INDEXES, [self._name]) else f", ADD {self.KEY}"
            _query(connection, self.UPGRADE.format(table=self._name) + key)
            if re.sub(said_twice, "", _query(connection, show)[0][1]) == before:
                return f"{self._where} is up to date"
            return f"upgraded {self._where}: wide columns of any character, index on (sasl_username, ts)"

    def _look(self, connection: Any) -> Table:
        """Return what is known of the table, looked at anew every minute: it may be upgraded under us."""
        seen = self._table
        if seen and time.monotonic() - seen[1] < TABLE_LOOK_S:
            return seen[0]
        facts = {name: ((width, CODECS.get(charset, "ascii")), collation)
                 for name, width, charset, collation in _query(connection, self.FACTS, [self._name])}  # fmt: skip
        missing = {"ts", *Event._fields} - set(facts)
        if not facts:
            raise RepositoryUnavailable(f"there is no {self._where}; create it with policyd --init-db")
        if missing:
            raise RepositoryUnavailable(f"{self._where} has no column {' and no '.join(sorted(missing))}")
        index = next((name for (name,) in _query(connection, self.INDEXES, [self._name])), "")
        force_index = f"FORCE INDEX (`{index}`)" if index else ""
        try:
            _query(connection, f"SELECT 1 FROM `{self._name}` {force_index} LIMIT 0")
        except pymysql.MySQLError as error:
            if error.args[0] != 1176:  # it is there and must not be used: ignored, invisible
                raise
            force_index = ""
        login = "sasl_username" if facts["sasl_username"][1] == "utf8mb4_bin" else self.BINARY
        table = Table([facts[name][0] for name in Event._fields[:3]], index, force_index, login)
        self._table = table, time.monotonic()
        return table

    def _run(self, work: Callable[[Any], T], deadline: float) -> T:
        """Do `work` with a connection of the pool, and again where that is safe and promising.

        Every error of the driver that comes through here, whatever its class, means that the store cannot be used: a
        joining Galera node, a read-only server, a table that is gone, ...
        """
        tried = 0
        while True:
            try:
                with self._pool.connection(deadline) as connection:
                    return work(connection)
            except (pymysql.MySQLError, RepositoryUnavailable) as error:
                tried += 1
                if error.args[:1] == (1176,):
                    self._table = None  # the index has gone: look again
                if tried > _retries(error):
                    self._pool.pass_over()
                    is_large = error.args[:1] in [(1153,), (2006,)]  # or it hangs up while we are still sending
                    raise (TooLarge if is_large else RepositoryUnavailable)(str(error)) from error

    @contextlib.contextmanager
    def _patient_connection(self, patience_s: float) -> Iterator[Any]:
        """A connection of its own, for statements that take their time, of a server that may freeze meanwhile."""
        connection = self._pool.connect(time.monotonic() + patience_s, limits="")
        try:
            yield connection
        except pymysql.MySQLError as error:
            raise RepositoryUnavailable(str(error)) from error
        finally:
            _close_quietly(connection)


def _identity(path: str, known: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Return what tells a file from another one of the same name, None if there is none; what was `known`, in doubt."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError as error:
        return None if isinstance(error, FileNotFoundError) else known or (0, 0)


class SQLiteRepository:
    """The events in a file of our own: for a single relay without a database server, and for the outage journal."""

    # Milliseconds since 1970, UTC; the rest as in MariaDBRepository.
    SCHEMA = """
        CREATE TABLE IF NOT EXISTS events (ts INTEGER NOT NULL, sasl_username TEXT NOT NULL, sender TEXT NOT NULL,
            client_address TEXT NOT NULL, recipient_count INTEGER);
        CREATE INDEX IF NOT EXISTS login_ts ON events (sasl_username, ts, recipient_count, client_address);
        CREATE INDEX IF NOT EXISTS incidents ON events (sasl_username, ts, client_address)
            WHERE recipient_count IS NULL;
    """
    INSERT = "INSERT INTO events (ts, sasl_username, sender, client_address, recipient_count) VALUES (?, ?, ?, ?, ?)"
    OF_LOGIN = "FROM events WHERE sasl_username = :login AND ts > :day AND rowid > :after"
    USAGE = (
        "SELECT coalesce(sum(recipient_count), 0), coalesce(sum(recipient_count * (ts > :hour)), 0),"
        f" (SELECT group_concat(DISTINCT client_address) {OF_LOGIN} AND recipient_count IS NULL)"
        f" FROM (SELECT ts, recipient_count {OF_LOGIN} AND recipient_count > 0 ORDER BY ts DESC LIMIT :rows)"
    )
    WRITE = "PRAGMA user_version = 1"  # the least that can be written: it finds a full disk
    PURGE = "DELETE FROM events WHERE rowid IN (SELECT rowid FROM events WHERE ts < ? LIMIT ?)"
    FIRST = (
        "SELECT rowid, ts, sasl_username, sender, client_address, recipient_count FROM events"
        " WHERE rowid > ? ORDER BY rowid LIMIT ?"
    )

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._of_thread = threading.local()  # each thread has a connection of its own
        self._opened: list[sqlite3.Connection] = []

    def __str__(self) -> str:
        return f"embedded store {self.path}"

    def resolve(self) -> None:
        """Nothing: there is no name."""

    def insert(self, events: Sequence[Event], deadline: float, times: Sequence[int] | None = None) -> set[int]:
        """See MariaDBRepository; nothing is ever refused."""
        now = self._ms_ago(0)  # never later: the clock may have been ahead
        rows = [(min(ts, now), *event) for ts, event in zip(times or [now] * len(events), events)]
        with self._connection() as connection:
            connection.executemany(self.INSERT, rows)
        return set()

    def usages(self, events: Sequence[Event], settings: Settings, deadline: float) -> list[Usage]:
        """See MariaDBRepository."""
        logins = [event.sasl_username for event in events]
        return run_up(logins, events, self.totals(logins, settings.rows_of))

    def totals(self, logins: Iterable[str], rows_of: Callable[[str], int], after: int = 0) -> dict[str, Usage]:
        """Return what each login has used, as far as rows_of() its newest events say it, those above row id `after`."""
        words: dict[str, Any] = {"day": self._ms_ago(DAY_S), "hour": self._ms_ago(HOUR_S), "after": after}
        totals = {}
        with self._connection() as connection:
            for login in dict.fromkeys(logins):
                words.update(login=login, rows=rows_of(login))
                recipients, of_hour, incidents = connection.execute(self.USAGE, words).fetchone()
                totals[login] = Usage(recipients, of_hour, frozenset(incidents.split(",") if incidents else ()))
        return totals

    def ask(self, statement: str, arguments: Mapping[str, object], deadline: float | None = None) -> list[Any]:
        """See MariaDBRepository."""
        now = str(self._ms_ago(0))
        statement = re.sub(r"\{since (\w+)\}", rf"ts > {now} - 1000 * %(\1)s", statement)
        text = statement.format(
            table="events", from_="events", by_time="events", login="sasl_username", now=now,
            of_login="sasl_username = %(login)s", place="place(client_address)", age=f"(({now} - ts) / 1000.0)",
        )  # fmt: skip
        with self._connection() as connection:
            cursor = connection.execute(re.sub(r"%\((\w+)\)s", r":\1", text), dict(arguments))
            return cursor.fetchall() if cursor.description else [(cursor.rowcount,)]

    def check(self, deadline: float) -> str:
        """See MariaDBRepository."""
        with self._connection() as connection:
            connection.execute(self.WRITE)
        return str(self)

    def problems(self, deadline: float) -> list[str]:
        """See MariaDBRepository."""
        return []

    def has_index(self) -> bool:
        """See MariaDBRepository."""
        return True

    def purge(self, keep_days: int) -> Iterator[int]:
        """See MariaDBRepository."""
        deleted = 1
        while deleted:
            with self._connection() as connection:
                deleted = connection.execute(self.PURGE, (self._ms_ago(keep_days * DAY_S), PURGE_SLICE)).rowcount
            yield deleted

    def init(self) -> str:
        """See MariaDBRepository."""
        return f"{self.check(0)} is ready"

    def first(self, limit: int, after: int = 0) -> list[tuple[int, int, Event]]:
        """Return the first events: row id (those above `after`), time in ms since 1970, event."""
        with self._connection() as connection:
            rows = connection.execute(self.FIRST, (after, limit)).fetchall()
        return [(rowid, ts, Event(*event)) for rowid, ts, *event in rows]

    def delete_first(self, upto: int) -> None:
        """Delete the events up to and with row id `upto`."""
        with self._connection() as connection:
            connection.execute("DELETE FROM events WHERE rowid <= ?", (upto,))

    def shrink(self) -> None:
        """Give back the room of what was deleted."""
        with self._connection() as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def count(self, after: int = 0) -> int:
        """Return the number of events, of those above row id `after`; a file that is certainly not there has none."""
        if _identity(self.path) is None and os.path.isdir(os.path.dirname(self.path) or "."):
            return 0
        with self._connection() as connection:
            return int(connection.execute("SELECT count(*) FROM events WHERE rowid > ?", (after,)).fetchone()[0])

    def left_behind(self, after: int) -> list[tuple[int, int, Event]] | None:
        """If the file that this thread has open is there no more, leave it; return what first() would have of it."""
        connection = getattr(self._of_thread, "connection", None)
        if connection is None or self._of_thread.file == _identity(self.path, self._of_thread.file):
            return None
        rows: list[Any] = []
        with contextlib.suppress(sqlite3.Error), connection:
            rows = connection.execute(self.FIRST, (after, -1)).fetchall()
            connection.execute("DELETE FROM events")  # should that file come back, it is not to be moved again
            connection.commit()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._drop()
        return [(rowid, ts, Event(*event)) for rowid, ts, *event in rows]

    def _ms_ago(self, seconds: float) -> int:
        return int((self._clock() - seconds) * 1000)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, in a transaction: committed at the end, or rolled back and thrown away."""
        mine = self._of_thread
        try:
            known = getattr(mine, "file", None)
            if self.path != ":memory:" and known != _identity(self.path, known):
                self._drop()  # another file has come in its place
            if not hasattr(mine, "connection"):
                mine.connection = self._open()
                mine.file = _identity(self.path)
            with mine.connection as connection:
                yield connection
        except sqlite3.Error as error:
            self._drop()
            raise RepositoryUnavailable(f"{self.path}: {error}") from error

    def _open(self) -> sqlite3.Connection:
        if os.geteuid() == 0 and not os.path.exists(self.path):  # root's tools: the daemon shall write it, too
            with contextlib.suppress(OSError):
                owner = os.stat(os.path.dirname(self.path))
                os.close(os.open(self.path, os.O_CREAT, 0o600))
                os.chown(self.path, owner.st_uid, owner.st_gid)
        connection = sqlite3.connect(self.path, timeout=0.1, check_same_thread=False)
        self._opened.append(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what was answered stays counted after a power cut
        connection.execute("PRAGMA wal_autocheckpoint = 100")  # or the log of writes alone fills a small disk
        connection.create_function("place", 1, place_of)
        connection.executescript(self.SCHEMA)
        return connection

    def _drop(self) -> None:
        """Close this thread's connection."""
        connection = self._of_thread.__dict__.pop("connection", None)
        if connection:
            self._opened.remove(connection)
            connection.close()

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._opened:
            connection.close()


Repository = Union[MariaDBRepository, SQLiteRepository]


def open_repository(settings: Settings) -> Repository:
    """Return the store that the settings name, without touching it yet."""
    return MariaDBRepository(settings) if settings.dbhost else SQLiteRepository(settings.state_file("events.sqlite3"))


# ---- watch: what is asked beyond the sums, of the few for whom it matters ------------------------------------

KNOWN_S = 600  # for how long is remembered what is known of a login
KNOWN_LOGINS = 100_000
NEWEST_ROWS = 2000  # of a login's hour in which its places are looked for in the path
HISTORY_ROWS = 20_000  # of its day, and of its days before


class Watch:
    """Looks for the early signs of a thief, and remembers since when an incident holds a login's mail."""

    NEWEST = "SELECT ts, client_address, recipient_count FROM {from_} WHERE {of_login} AND"
    NEWEST_FIRST = "ORDER BY ts DESC LIMIT %(rows)s"
    SIGHTINGS = (
        "SELECT client_address, SUM(CASE WHEN {since hour} THEN recipient_count ELSE 0 END),"
        " SUM(CASE WHEN {since hour} THEN 1 ELSE 0 END), MIN({age})"
        f" FROM ({NEWEST} {{since period}} AND recipient_count > 0 {NEWEST_FIRST}) AS newest GROUP BY client_address"
    )
    HISTORY = (  # what was used, what was forgiven and what has happened, each with the age of the first time
        "SELECT client_address, CASE WHEN recipient_count IS NULL THEN 'incident'"
        " WHEN recipient_count < 0 THEN 'forgiven' ELSE 'used' END, MAX({age})"
        f" FROM (SELECT * FROM ({NEWEST} {{since day}} {NEWEST_FIRST}) AS today"
        f" UNION ALL SELECT * FROM ({NEWEST} {{since keep}} AND NOT {{since day}} {NEWEST_FIRST}) AS earlier"
        ") AS newest GROUP BY 1, 2"
    )
    LASTING = (
        "SELECT client_address, MAX({age}) FROM {from_}"
        " WHERE {of_login} AND {since day} AND recipient_count IS NULL GROUP BY client_address"
    )
    REMEMBERS = "SELECT 1 FROM {table} WHERE {since keep} AND NOT {since judge} LIMIT 1"
    CANDIDATES = (  # places grow by sending only; a derived table, since MySQL would flatten IN (SELECT ...)
        "SELECT {login} AS login, SUM(recipient_count)"
        " FROM (SELECT DISTINCT sasl_username AS who FROM {by_time} WHERE {since lately}) AS recent"
        " JOIN {from_} ON sasl_username = who WHERE {since day} AND recipient_count > 0"
        " GROUP BY {login} HAVING COUNT(DISTINCT {place}) > 3 * %(places)s"
        " OR COUNT(DISTINCT CASE WHEN {since half_hour} THEN {place} END) > %(places)s"
    )
    RECORD = (  # where no other relay was faster
        "INSERT INTO {table} (ts, sasl_username, sender, client_address, recipient_count)"
        " SELECT {now}, %(login)s, '', %(incident)s, NULL FROM (SELECT 1 AS one) AS once WHERE NOT EXISTS (SELECT 1"
        " FROM {from_} WHERE {of_login} AND {since day} AND recipient_count IS NULL AND client_address = %(incident)s)"
    )
    TIMES = types.MappingProxyType(
        {"half_hour": HALF_HOUR_S, "hour": HOUR_S, "day": DAY_S, "judge": DAYS_TO_JUDGE * DAY_S}
    )

    def __init__(self, repository: Repository, clock: Callable[[], float] = time.monotonic) -> None:
        self._repository = repository
        self._clock = clock
        self._remembers = False  # has the table events that are old enough to judge by?
        self._known: dict[str, tuple[set[str], float]] = {}  # of a login: its places, as of when
        self._since: dict[str, tuple[str, float, float]] = {}  # the rule that holds a login, since when, as of when

    def _ask(self, statement: str, deadline: float | None, **arguments: object) -> list[Any]:
        times = {name: value for name, value in self.TIMES.items() if f"since {name}" in statement}
        return self._repository.ask(statement, {**times, **arguments}, deadline)

    def look(self, events: Sequence[Event], usages: Sequence[Usage], settings: Settings,
             deadline: float | None) -> list[Usage]:  # fmt: skip
        """Return the usages of `events` with what only a closer look tells; only with a deadline is the store asked."""
        seen: dict[str, tuple[int, int, int]] = {}  # the figures of those that were looked at
        looked = []
        for event, usage in zip(events, usages):
            login = event.sasl_username
            rule = usage.lasting() if usage.incidents else ""
            if not rule:
                self._since.pop(login, None)  # whatever held it was forgiven
            if rule:
                usage = usage._replace(since=self._since_when(login, rule, deadline))
            elif settings.everybody.early_signs and deadline is not None and self._is_worth_it(event, usage, settings):
                figures = seen.get(login) or self._signs(event, usage, settings, deadline)
                seen.update({login: figures} if figures else {})
                usage = Usage(*usage[:4], *(figures or ()))
            looked.append(usage)
        return looked

    def _is_worth_it(self, event: Event, usage: Usage, settings: Settings) -> bool:
        """Tell whether a login sends enough, below its quota, and from a place that is not remembered as known."""
        limits = settings.limits_of(event.sasl_username)
        least = min(EARLY_FLOOR, limits.new_place_quota)
        if not self._remembers or usage.of_hour < least or usage.recipients >= limits.hold_at:
            return False
        place = place_of(event.client_address, settings.trusted_network)
        known, as_of = self._known.get(event.sasl_username, ((), 0.0))
        return place is not None and (place not in known or self._clock() - as_of > KNOWN_S)

    def _signs(self, event: Event, usage: Usage, settings: Settings,
               deadline: float) -> tuple[int, int, int] | None:  # fmt: skip
        """Return Usage's last three figures; None for a message from a place that is known, as it turns out."""
        login = event.sasl_username
        known, as_of = self._known.get(login, (set(), 0.0))
        is_old = not as_of or self._clock() - as_of > KNOWN_S
        if is_old:
            known = self.known_places(login, settings, deadline)
            if place_of(event.client_address, settings.trusted_network) in known:
                return None
        sightings = self._sightings(login, HOUR_S, NEWEST_ROWS, deadline)
        found = signs(sightings, known, settings.trusted_network)
        verdict = decide(Usage(*usage[:4], *found), settings.limits_of(login))
        is_held = verdict.rule in LASTING and "audit" not in (settings.mode, settings.early_signs)
        if is_held and not is_old:  # afresh before a hold: it may have been forgiven a minute ago
            found = signs(sightings, self.known_places(login, settings, deadline), settings.trusted_network)
        return found

    def _sightings(self, login: str, period_s: int, rows: int, deadline: float | None) -> list[Sighting]:
        found = self._ask(self.SIGHTINGS, deadline, login=login, period=period_s, rows=rows)
        return [Sighting(address, int(count), int(messages), float(age)) for address, count, messages, age in found]

    def known_places(self, login: str, settings: Settings, deadline: float | None) -> set[str]:
        """Return, and remember, the places that are known of a login: used more than a day ago, or forgiven.

        After an incident of this kind that nobody has forgiven, more than a day before it: else the thief's places
        would be known the next day.
        """
        keep = settings.keep_days * DAY_S
        history = self._ask(self.HISTORY, deadline, login=login, keep=keep, rows=HISTORY_ROWS)
        held = [float(age) for what, kind, age in history if kind == "incident" and what.split(" ")[-1] in LASTING[1:]]
        long_ago = DAY_S + max(held, default=0.0)
        known = {place_of(address, settings.trusted_network) or "" for address, kind, age in history
                 if kind == "forgiven" or (kind == "used" and age >= long_ago)}  # fmt: skip
        if len(self._known) >= KNOWN_LOGINS:
            self._known.clear()
        self._known[login] = known, self._clock()
        return known

    def _since_when(self, login: str, rule: str, deadline: float | None) -> float:
        """Return when the incident began that holds a login, in s since 1970; at worst, when it was first seen."""
        known, since, as_of = self._since.get(login, ("", 0.0, 0.0))
        if deadline is not None and (known != rule or self._clock() - as_of > KNOWN_S):
            incidents = self._ask(self.LASTING, deadline, login=login)
            ages = [float(age) for incident, age in incidents if incident.endswith(rule)]
            since, as_of = time.time() - max(ages, default=0.0), self._clock()
        if len(self._since) >= KNOWN_LOGINS:
            self._since.clear()
        self._since[login] = rule, since or time.time(), as_of
        return self._since[login][1]

    def sweep(self, settings: Settings, lately_s: float) -> Iterator[tuple[str, Verdict, int]]:
        """Yield, with the day's recipients, who has been in too many places in half an hour or a day.

        Of those that have sent within `lately_s`; logins whose mail is held already are left out, and audit records
        nothing.  To be called in a thread of its own.
        """
        if not self._remembers:
            self._remembers = bool(self._ask(self.REMEMBERS, None, keep=settings.keep_days * DAY_S))
        if not self._remembers or not settings.max_places:
            return
        limits = Limits(NEVER, NEVER, places=settings.max_places)
        for login, recipients in self._ask(self.CANDIDATES, None, lately=lately_s, places=settings.max_places):
            incidents = frozenset(incident for incident, _ in self._ask(self.LASTING, None, login=login))
            if not Usage(0, 0, incidents).lasting():
                sightings = self._sightings(login, DAY_S, HISTORY_ROWS, None)
                found = signs(sightings, self.known_places(login, settings, None), settings.trusted_network)
                verdict = decide(Usage(0, 0, frozenset(), 0.0, *found), limits)
                is_audit = "audit" in (settings.mode, settings.early_signs)
                if verdict.action == "HOLD" and (
                    is_audit or self._ask(self.RECORD, None, login=login, incident=verdict.incident)[0][0]
                ):
                    yield login, verdict, int(recipients)


# ---- recorder: group commit and outage journal; it knows neither SQL nor Postfix -----------------------------

BATCH_DEADLINE_S = 2.8  # for a batch from the arrival of its oldest event: whoever waits has an answer within 3 s
LEAST_LEFT_S = 0.5  # of it: a batch that begins with less goes to the journal
RETRY_DELAYS_S = (1, 2, 4, 8, 15)  # between two looks for a database that is away; the last one repeats
REPLAY_SLICE = 500  # rows of the journal that one INSERT takes between two batches
TIGHT_SLICE = 50  # where the disk was full: to delete a row takes room, too, up to a page of the index
SPARE_BYTES = 512 << 10  # beside the journal: from a disk that is full of it nothing could be deleted, or moved
LAST_KNOWN_LOGINS = 100_000
OnUsage = Callable[[Optional[Usage]], None]
Waiting = tuple[Event, OnUsage, float]  # with the time of its arrival


class LastKnown:
    """What a store was last seen to have of each login, and has got since: of a day, of at most 100,000 logins."""

    def __init__(self) -> None:
        self._usages: collections.OrderedDict[str, list[tuple[float, Usage]]] = collections.OrderedDict()

    def put(self, login: str, usage: Usage, now: float) -> None:
        """Remember what was used."""
        self._usages[login] = [(now, usage)]
        self._usages.move_to_end(login)
        if len(self._usages) > LAST_KNOWN_LOGINS:
            self._usages.popitem(last=False)

    def grow(self, events: Iterable[tuple[float, Event]], now: float) -> None:
        """Add events of this age in s, by the minute."""
        for age_s, event in events:
            minute = now - age_s + (age_s - now) % MINUTE_S  # rounded up: rather too hard for a minute than too soft
            recipients = event.recipient_count or 0
            more = Usage(recipients, recipients, frozenset([event.client_address] * (event.recipient_count is None)))
            known = self._usages.setdefault(event.sasl_username, [])
            if known and known[-1][0] == minute:
                more = known.pop()[1].plus(more)
            known.append((minute, more))
        while len(self._usages) > LAST_KNOWN_LOGINS:
            self._usages.popitem(last=False)

    def get(self, login: str, now: float) -> Usage:
        """Return what was used, as far as it is known and not too old."""
        total = NOTHING
        for when, (recipients, of_hour, incidents, *_) in self._usages.get(login, ()):
            if now - when < DAY_S:
                total = total.plus(Usage(recipients, of_hour if now - when < HOUR_S else 0, incidents))
        return total


class Journal:
    """Events that the store could not take: in a file, or in memory while that cannot be written.

    An event leaves the journal after the store has committed it.  A crash in between, a connection lost in the middle
    of an INSERT, or a frozen server that wakes up may count one slice twice, not more: no other slice is moved before
    the last one is deleted.  Nothing is counted zero times: unreadable is not empty.  Whatever is wrong with the file
    is tried again every minute and at the end.  Only the recorder's thread comes here.
    """

    def __init__(self, path: str, wall_clock: Callable[[], float] = time.time,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._file = SQLiteRepository(path, wall_clock)
        self._memory = SQLiteRepository(":memory:", wall_clock)
        self._wall_clock = wall_clock
        self._clock = clock
        self.kept = 0  # events in memory
        self._in_file: int | None = None  # events that wait there; None: it cannot be read
        self._moved = 0  # row id up to which the store has all, though the file still has it, too
        self._moved_of: object = None  # which file that is
        self._file_known = LastKnown()  # what the file has, for the time when it cannot be read
        self.trouble = ""  # what is wrong with the file
        self._spare = f"{path}-spare"
        self._has_spare = os.path.exists(self._spare)
        self._next_look = 0.0
        self._slice = REPLAY_SLICE  # halved when the store does not take it: it may be too large

    @property
    def place(self) -> str:
        """Where the next event goes."""
        return "memory" if self.trouble else self._file.path

    @property
    def waiting(self) -> int:
        """The number of events that wait, as far as it is known."""
        return (self._in_file or 0) + self.kept

    def is_empty(self) -> bool:
        """Tell whether certainly nothing waits, and nothing could be counted twice."""
        return self._in_file == 0 and not self.kept and not self._moved

    def can_move(self) -> bool:
        """Tell whether there is something that replay() can move now."""
        return bool(self.kept or (self._in_file and not self._moved and (self._has_spare or not self.trouble)))

    def next_look_s(self) -> float:
        """Return the seconds until look() is due."""
        return max(0.0, self._next_look - self._clock())

    def look(self) -> None:
        """Mend what can be mended: see what waits in the file, delete what was moved, write what was kept."""
        self._next_look = self._clock() + MINUTE_S
        self._slice = min(REPLAY_SLICE, 2 * self._slice)
        is_first = self._in_file is None and not self.trouble
        try:
            self._see(is_afresh=bool(self.trouble))
            if is_first or self.trouble or self.kept:
                self._file.check(0)
            if self._moved:
                self._file.delete_first(self._moved)
                self._moved = 0
            if self.kept:
                kept = self._memory.first(-1)
                self._write([event for _, _, event in kept], [ts for _, ts, _ in kept])
                self._forget(kept)
        except RepositoryUnavailable as error:
            return self._complain(error)
        if self.trouble:
            log.error(f"no outage journal: over, {self._file.path} can be used again; {self.waiting} events wait in it")
            self.trouble = ""
        elif is_first and self._in_file:
            log.warning(f"{self._in_file} events of an earlier outage wait in the journal")

    def _see(self, is_afresh: bool = False) -> None:
        """See how many events wait in the file; if it was removed while it was open, keep what waited in it."""
        left_behind = self._file.left_behind(self._moved)
        if left_behind is not None:
            self._moved, self._next_look, self._file_known = 0, 0.0, LastKnown()
            self._keep([event for _, _, event in left_behind], [ts for _, ts, _ in left_behind])
        elif self._moved and _identity(self._file.path) not in (None, (0, 0), self._moved_of):
            self._moved = 0  # another file has come in its place
        if is_afresh or left_behind is not None or not self._in_file:
            self._in_file = None
            self._in_file = self._file.count(self._moved)

    def _complain(self, error: RepositoryUnavailable) -> None:
        if not self.trouble:
            log.error(f"no outage journal: {error}; in an outage events are counted in memory only")
        self.trouble = str(error)

    def _aged(self, events: Sequence[Event], times: Sequence[int]) -> list[tuple[float, Event]]:
        now = self._wall_clock()
        return [(now - ts / 1000, event) for ts, event in zip(times, events)]

    def _keep(self, events: Sequence[Event], times: Sequence[int]) -> None:
        self._memory.insert(events, 0, times)
        self.kept += len(events)

    def _forget(self, kept: list[tuple[int, int, Event]]) -> None:
        self._memory.delete_first(kept[-1][0])
        self.kept -= len(kept)

    def _write(self, events: Sequence[Event], times: Sequence[int]) -> None:
        self._file.insert(events, 0, times)
        self._file_known.grow(self._aged(events, times), self._wall_clock())
        self._in_file = (self._in_file or 0) + len(events)

    def insert(self, events: Sequence[Event]) -> None:
        """Keep `events`, as of now."""
        times = [int(self._wall_clock() * 1000)] * len(events)
        if not self.trouble:
            try:
                self._see()
                self._take_spare()
                return self._write(events, times)
            except RepositoryUnavailable as error:
                self._complain(error)
        self._keep(events, times)

    def _take_spare(self) -> None:
        """Before the first event, where the disk is not nearly full, take the room in which the last one can go."""
        if self._in_file or self._moved or self._has_spare:
            return
        self._file.shrink()
        with contextlib.suppress(OSError):
            if shutil.disk_usage(os.path.dirname(self._spare) or ".").free >= 1.5 * SPARE_BYTES:
                with open(self._spare, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, SPARE_BYTES)
                self._has_spare = True

    def _give_spare(self) -> None:
        """Now that the store takes events, and the journal may do no more: it may have filled the disk itself."""
        self._has_spare, self._slice = False, TIGHT_SLICE // 2  # which look() doubles
        with contextlib.suppress(OSError):
            os.unlink(self._spare)
        self.look()

    def totals(self, logins: Sequence[str]) -> dict[str, Usage]:
        """Return what each login has in the journal; of a file that cannot be read, what is known of it."""
        if self.is_empty():
            return {}
        now = self._wall_clock()
        try:
            found = dict.fromkeys(logins, NOTHING)
            if self._in_file != 0 or self._moved:
                self._see()
                found = self._file.totals(logins, lambda _: -1, self._moved)
            for login, usage in found.items():
                self._file_known.put(login, usage, now)
        except RepositoryUnavailable as error:
            self._in_file = None
            self._complain(error)
            found = {login: self._file_known.get(login, now) for login in logins}
        kept = self._memory.totals(logins, lambda _: -1) if self.kept else {}
        return {login: usage.plus(kept.get(login, NOTHING)) for login, usage in found.items()}

    def replay(self, repository: Repository, deadline: float) -> list[tuple[float, Event]]:
        """Move the oldest slice to `repository`, with its times; return age in s and event; raises as `repository`."""
        slice_ = self._memory.first(self._slice) if self.kept else []
        is_kept = bool(slice_)
        if not is_kept and self.can_move() and self.trouble:
            self._give_spare()
        if not is_kept and self.can_move():
            try:
                self._see()
                slice_ = self._file.first(self._slice, self._moved)
            except RepositoryUnavailable as error:
                self._in_file = None
                self._complain(error)
        if not slice_:
            return []
        events, times = [event for _, _, event in slice_], [ts for _, ts, _ in slice_]
        size, self._slice = self._slice, max(1, self._slice // 2)  # the next one, unless the store takes this one
        try:
            repository.insert(events, deadline, times)
        except TooLarge:
            if size > 1:
                return []
            raise
        self._slice = size
        moved = self._aged(events, times)
        if is_kept:
            self._forget(slice_)
        else:
            self._in_file = max(0, (self._in_file or 0) - len(events))
            self._delete(slice_[-1][0])
            self._file_known = self._file_known if self._in_file else LastKnown()
            self.totals([event.sasl_username for event in events])  # to know what is left, should it become unreadable
        return moved

    def _delete(self, upto: int) -> None:
        self._moved, self._moved_of = upto, _identity(self._file.path)
        try:
            self._file.delete_first(upto)
            self._moved = 0
        except RepositoryUnavailable as error:
            self.trouble = self.trouble or str(error)
            if self._has_spare:
                self._give_spare()
            if self._moved:
                log.error(f"the database has events that cannot be deleted from the journal: {error}; trying each"
                          " minute, nothing else is moved before, and a crash would count them twice")  # fmt: skip

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclasses.dataclass
class Outage:
    """From the first failure of the store until the journal is empty again."""

    began: float  # monotonic
    reason: str = ""  # as last logged
    replayed: int = 0  # events
    attempts: int = 0
    ended: float = 0.0

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

    def __init__(self, repository: Repository, journal: Journal, settings: Settings,
                 watch: Watch | None = None, clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.settings = settings  # replaced whole by a reload
        self._repository = repository
        self.journal = journal
        self._watch = watch
        self._clock = clock
        self._last_known = LastKnown()
        self._waiting: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()  # None: look around
        self._turn_began: float | None = None
        self._in_hand: float | None = None  # when the oldest event of the batch arrived that the turn holds
        self._telling_since: float | None = None
        self._away = threading.Event()  # set by the recorder's thread, cleared by the one that finds the store
        self._away.set()
        self.looked = threading.Event()  # has the store been looked for, once?
        self._began = clock()
        self._outage: Outage | None = None  # until the journal is empty
        self._last_outage = Outage(self._began)
        self._closing = threading.Event()
        self._known: queue.SimpleQueue[tuple[list[Waiting], Sequence[Usage | None]] | None] = queue.SimpleQueue()
        self._handed = self._told = 0  # batches, to the teller and by it
        work = {"recorder": self._work, "teller": self._tell_all, "reconnect": self._find_store}
        self.threads = [threading.Thread(target=work[name], name=name, daemon=True) for name in work]

    def start(self) -> None:
        """Start the threads; events may come at once, and wait for the first look at the stores as long as they may."""
        for thread in self.threads:
            thread.start()

    def record(self, event: Event, on_usage: OnUsage) -> None:
        """Count `event`, then call on_usage(what its login has used with it), or on_usage(None): it cannot be counted.

        Thread-safe.  `on_usage` is called in a thread of the recorder's, for which all others wait: it must not block.
        """
        self._waiting.put((event, on_usage, self._clock()))

    def longest_wait_s(self) -> float:
        """Return for how long, at most, an event has waited: in the queue, a batch, behind a replay or an answer."""
        queued = None if self._waiting.empty() else self._turn_began
        waits = (self._in_hand, queued, self._telling_since)
        return max((self._clock() - since for since in waits if since is not None), default=0.0)

    def down_s(self) -> float | None:
        """Return for how long the store has been away, or None: it is there."""
        began = self._outage.began if self._outage else self._began
        return self._clock() - began if self._away.is_set() else None

    def stop(self, timeout: float) -> None:
        """Commit what waits, in `timeout` seconds at most; what is in the journal's file stays there."""
        self._closing.set()
        self._waiting.put(None)
        deadline = time.monotonic() + timeout
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            self._away.set()  # only now: what waited has gone to the store
        self.journal.close()

    def _work(self) -> None:
        while not (self._closing.is_set() and self._waiting.empty()):
            self._turn_began = None
            can_move = self.journal.can_move() and not self._away.is_set()
            first = None
            with contextlib.suppress(queue.Empty):
                first = self._waiting.get(timeout=0 if can_move else self.journal.next_look_s())
            self.turn(first)
        self.finish()
        self._known.put(None)

    def turn(self, first: Waiting | None = None) -> None:
        """Do once what the recorder's thread repeats: record what waits (`first` before the rest), move a slice."""
        self._turn_began = self._clock()
        batch = [first] if first else []
        with contextlib.suppress(queue.Empty):
            while len(batch) < BATCH_EVENTS:
                item = self._waiting.get_nowait()
                batch += [item] if item else []
        self._in_hand = batch[0][2] if batch else None
        if not self.journal.next_look_s():
            self.journal.look()
        if batch:
            known = batch, self._commit([event for event, _, _ in batch], batch[0][2] + BATCH_DEADLINE_S)
            self._in_hand = None
            if len(batch) == 1 and self._handed == self._told:
                self._tell(*known)  # nobody else waits: no need to wake the other thread
            else:
                self._handed += 1
                self._known.put(known)
        if not self._away.is_set():
            self._move_slice()

    def finish(self) -> None:
        """At the end, do what can still be done for the events that are in memory only."""
        self.journal.look()
        deadline = self._clock() + BATCH_DEADLINE_S  # for all of them: systemd waits for us
        with self._or_outage():
            while self.journal.kept and not self._away.is_set():
                self.journal.replay(self._repository, deadline)
        if self.journal.kept:
            log.error(f"{self.journal.kept} events are forgotten: they were counted in memory only")

    def tell_next(self, block: bool = False) -> bool:
        """Tell the sums of the next batch, if there is one; return False when there will be no more."""
        self._telling_since = None
        try:
            known = self._known.get(block)
        except queue.Empty:
            return True
        if known is not None:
            self._telling_since = self._clock()
            self._tell(*known)
            self._told += 1
        return known is not None

    def _tell_all(self) -> None:
        while self.tell_next(block=True):
            pass

    @staticmethod
    def _tell(batch: list[Waiting], usages: Sequence[Usage | None]) -> None:
        for (_, on_usage, _), usage in zip(batch, usages):
            try:
                on_usage(usage)
            except Exception:  # a fault of ours must not end this thread, nor keep the client waiting
                log.error(f"internal error: {traceback.format_exc()}")
                on_usage(None)

    def _commit(self, events: list[Event], deadline: float) -> Sequence[Usage | None]:
        """Return the sums of one batch; None for what the store refused."""
        if not self.looked.is_set():
            self.looked.wait(max(0.0, deadline - LEAST_LEFT_S - self._clock()))
            if not self.looked.is_set():
                self._note_outage("it is still being looked for")
            self.looked.set()  # nobody else waits: names may take long
        is_stored, refused = self._keep(events, deadline)
        kept = [event for n, event in enumerate(events) if n not in refused] if refused else events
        usages = self._usages(kept, deadline, is_stored)
        if self._watch:
            usages = self._look_closer(self._watch, kept, usages, deadline if is_stored else None)
        told = iter(usages)
        return [None if n in refused else next(told) for n in range(len(events))] if refused else usages

    def _keep(self, events: list[Event], deadline: float) -> tuple[bool, set[int]]:
        """Commit `events` to the store, or else to the journal; tell which, and the positions of those refused."""
        if deadline - self._clock() < LEAST_LEFT_S and not self._away.is_set():
            self._note_outage("the database is too slow: events have waited for more than 2 s")
        elif not self._away.is_set():
            with self._or_outage():
                return True, self._repository.insert(events, deadline)
        self.journal.insert(events)
        return False, set()

    def _usages(self, events: list[Event], deadline: float, is_stored: bool) -> list[Usage]:
        """Return the sums of `events`: the store's, or what it was last known to have, and the journal's."""
        now = self._clock()
        logins = [event.sasl_username for event in events]
        journal = self.journal.totals(logins)
        if is_stored and events:
            with self._or_outage():
                usages = self._repository.usages(events, self.settings, deadline)
                for login, usage in zip(logins, usages):
                    self._last_known.put(login, usage, now)
                return [usage.plus(journal[login]) for login, usage in zip(logins, usages)] if journal else usages
            self._last_known.grow([(0.0, event) for event in events], now)  # it has them, though it does not tell
        totals = {login: self._last_known.get(login, now).plus(journal.get(login, NOTHING)) for login in logins}
        return run_up(logins, events, totals)

    def _look_closer(self, watch: Watch, events: list[Event], usages: list[Usage],
                     deadline: float | None) -> list[Usage]:  # fmt: skip
        if deadline is not None and not self._away.is_set():
            with self._or_outage():
                return watch.look(events, usages, self.settings, deadline)
        return watch.look(events, usages, self.settings, None)  # what is remembered must do

    @contextlib.contextmanager
    def _or_outage(self) -> Iterator[None]:
        """What fails in here begins an outage: from then on nobody asks the store."""
        try:
            yield
        except Exception as error:  # any other kind is a fault of ours, and no reason to lose count
            is_known = isinstance(error, RepositoryUnavailable)
            if not (is_known and self._outage and self._away.is_set()):  # it is away, and still is
                self._note_outage(str(error) if is_known else traceback.format_exc())
            self._away.set()

    def _note_outage(self, reason: str) -> None:
        now, last = self._clock(), self._last_outage
        is_again = last.reason == reason and now - last.ended < MINUTE_S  # it says it is ready, and fails each time
        self._outage = self._outage or Outage(now, attempts=last.attempts if is_again else 0)
        if reason != self._outage.reason:
            log.error(f"ERROR while UPDATING db: {reason}; counting in {self.journal.place} until it is back")
            self._outage.reason = reason

    def look_for_store(self) -> None:
        """See whether the store takes events (again); what waits in the journal then follows."""
        with self._or_outage():
            self._repository.resolve()
            self._repository.check(self._clock() + BATCH_DEADLINE_S)
            self._away.clear()
        self.looked.set()
        self._waiting.put(None)

    def _find_store(self) -> None:
        """Look for the store at the start, and in an outage until it is back."""
        delay_s = 0.0
        while not self._closing.wait(delay_s):
            self.look_for_store()
            self._away.wait()
            delay_s = (self._outage or Outage(0)).next_delay()

    def _move_slice(self) -> None:
        """Move one slice of the journal to the store; when there is none left, the outage is over."""
        deadline = (self._turn_began or self._clock()) + BATCH_DEADLINE_S  # of whoever has come since
        if self.journal.can_move() and deadline - self._clock() >= LEAST_LEFT_S:
            self._outage = self._outage or Outage(self._clock())
            with self._or_outage():
                moved = self.journal.replay(self._repository, deadline)
                self._last_known.grow(moved, self._clock())
                self._outage.replayed += len(moved)
        outage = self._outage
        if outage and self.journal.is_empty() and not self._away.is_set():
            outage.ended = self._clock()
            seconds = outage.ended - outage.began
            log.error(f"ERROR while UPDATING db: over after {seconds:.0f} s, {outage.replayed} events replayed")
            self._last_outage, self._outage = outage, None


# ---- server: connections in, answers out ---------------------------------------------------------------------

REMEMBERED_ANSWERS = 10_000
TIMED_ANSWERS = 10_000  # the last ones, whose times the p99 is of
LISTEN_BACKLOG = 1024  # socketserver's 5 leaves clients waiting for seconds in a rush
SPARE_DESCRIPTORS = 64  # for the database, the store, the log
Reply = Callable[[str], None]


class RecentAnswers:
    """The last answers, so that a message asked about twice is counted and logged once.  Thread-safe.

    Postfix repeats a request whose answer got lost or was late, and asks at DATA and at END-OF-MESSAGE if told
    to; `instance` is the same then.  `recipient_count` belongs to the key: a refused DATA followed by
    more RCPTs keeps the instance.
    """

    def __init__(self) -> None:
        self._answers: dict[object, str | list[Reply]] = {}  # or who waits for it
        self._lock = threading.Lock()  # guards it

    def ask(self, key: object, reply: Reply) -> bool:
        """Tell whether the caller shall settle `key`; reply() is called once, with the first answer to it."""
        with self._lock:
            known = self._answers.setdefault(key, [])
            if isinstance(known, list):
                known.append(reply)
                return len(known) == 1
        reply(known)
        return False

    def settle(self, key: object, answer: str) -> None:
        """Answer all who wait for `key`; only the first answer counts."""
        with self._lock:
            waiting = self._answers.get(key, answer)
            if isinstance(waiting, str):
                return
            self._answers[key] = answer
            oldest = next(iter(self._answers))
            if len(self._answers) > REMEMBERED_ANSWERS and isinstance(self._answers[oldest], str):
                del self._answers[oldest]
        for reply in waiting:
            reply(answer)


class Figures:
    """What has been answered, for the status line and the file of figures.  Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.answered = {"DUNNO": 0, "HOLD": 0, "REJECT": 0}  # since the start
        self.spared = {"HOLD": 0, "REJECT": 0}  # what would have been held or refused, were it not for an audit
        self._held: dict[str, float] = {}  # when a login was last held or refused, if it was so the last time
        self._times: collections.deque[float] = collections.deque(maxlen=TIMED_ANSWERS)  # s, of the last answers
        self._lock = threading.Lock()  # guards all of them

    def count(self, action: str, seconds: float) -> None:
        """Count an answer and the time it took."""
        with self._lock:
            self.answered[action] += 1
            self._times.append(seconds)

    def note(self, login: str, action: str, is_audit: bool = False) -> None:
        """Keep in mind whether this login is held or refused now."""
        if action == "DUNNO" and login not in self._held:
            return  # without waiting for the lock
        with self._lock:
            if action == "DUNNO":
                self._held.pop(login, None)
            else:
                self._held[login] = self._clock()
                self.spared[action] += is_audit

    def logins_held(self) -> int:
        """Return how many logins were held or refused when they last sent, within 24 h."""
        since = self._clock() - DAY_S
        with self._lock:
            self._held = {login: when for login, when in self._held.items() if when > since}
            return len(self._held)

    def p99_s(self) -> float:
        """Return the time that 99 % of the last answers kept to."""
        with self._lock:
            times = sorted(self._times)
        return times[(len(times) * 99 - 1) // 100] if times else 0.0


class Policy:
    """Answers requests: the lists, the recorder, the decision and the log line, in this order.  Thread-safe."""

    def __init__(self, settings: Settings, recorder: Recorder, tell: Callable[[dict[str, object]], None]) -> None:
        self.settings = settings  # replaced whole by a reload
        self.figures = Figures()
        self._recorder = recorder
        self._tell = tell  # of an incident
        self._recent = RecentAnswers()
        self._on_its_way: set[tuple[str, str]] = set()  # logins and the incidents that are being recorded

    def answer(self, request: PolicyRequest, peer: str, reply: Reply) -> None:
        """Call reply(access(5) action) once, now or from the recorder's thread; `peer` is the relay's address."""
        if not request.sasl_username:
            return reply("DUNNO")
        if not request.recipient_count:
            state = request.protocol_state
            log.complain("place", f"recipient_count is 0 at protocol_state {state}: nothing is counted;"
                         " in main.cf, call policyd from smtpd_end_of_data_restrictions")  # fmt: skip
            return reply("DUNNO")
        # Small, whatever was sent; Postfix always sends an instance, whoever types by hand does not.
        key = hash((peer, request.instance, request.recipient_count)) if request.instance else object()
        if not self._recent.ask(key, reply):
            return None
        try:
            self._judge(request, functools.partial(self._recent.settle, key))
        except Exception:
            self._recent.settle(key, "DUNNO")  # a fault of ours: nobody waits for it, and it is logged as one
            raise
        return None

    def _judge(self, request: PolicyRequest, reply: Reply) -> None:
        settings = self.settings
        login = settings.login_of(request.sasl_username)[:KEPT_TEXT]
        sender, client_address = request.sender.lower()[:KEPT_TEXT], request.client_address[:KEPT_TEXT]
        event = Event(login, sender, client_address, request.recipient_count)
        message = f"{login}/{sender}/{client_address}/{request.recipient_count}"
        if not _can_hold(request):
            log.complain("proxy", "Postfix cannot hold what goes into smtpd_proxy_filter: what should be is refused;"
                         " ask policyd from the smtpd behind it, or use smtpd_milters or content_filter")  # fmt: skip
        if request.recipient_count == 1 and settings.always_allow.line_of([request.recipient.lower()], ""):
            log.info(f"allowing mail to {request.recipient[:KEPT_TEXT]}: {message}")
            return reply("DUNNO")
        if settings.blacklist.lines or settings.whitelist.lines:
            names = names_of(request.sasl_username, login, request.sender)
            if settings.blacklist.line_of(names, client_address):
                blacklisted = Verdict("HOLD", "blacklisted", "blacklisted")
                word = self._stop(blacklisted, login, request, settings, reply)[1].replace("DEFERRING", "Holding")
                return log.info(f"{word} blacklisted user: {message}{self._queue_id(request)}")
            if settings.whitelist.line_of(names, client_address) and in_office_hours(
                time.localtime(), settings.whitelist_days, settings.whitelist_hours
            ):
                log.info(f"skipping whitelisted user: {message}")
                return reply("DUNNO")
        self._recorder.record(event, functools.partial(self._on_usage, request, event, message, settings, reply))

    def _on_usage(self, request: PolicyRequest, event: Event, message: str, settings: Settings, reply: Reply,
                  usage: Usage | None) -> None:  # fmt: skip
        """Answer a message that has been counted; of None, one that could not be."""
        if usage is None:
            return reply("DUNNO")
        login = event.sasl_username
        verdict = decide(usage, settings.limits_of(login, request.sasl_username))
        counted = f"Updating db: {message}/{usage.recipients}"
        if verdict is PASSED:
            reply("DUNNO")
            self.figures.note(login, "DUNNO")
            return log.info(counted)
        verdict, word = self._stop(verdict, login, request, settings, reply)
        log.info(counted)
        log.info(f"{word} {verdict.said} for user {login} using {event.sender} from ip [{event.client_address}]"
                 f"{self._queue_id(request)}")  # fmt: skip
        if not word.startswith("would"):
            self._note_incident(event, verdict, usage, request.queue_id[:KEPT_TEXT])

    @staticmethod
    def _queue_id(request: PolicyRequest) -> str:
        return f", queue_id={request.queue_id[:KEPT_TEXT]}" if request.queue_id else ""

    def _stop(self, verdict: Verdict, login: str, request: PolicyRequest, settings: Settings,
              reply: Reply) -> tuple[Verdict, str]:  # fmt: skip
        """Answer with a verdict; return what is really done, and the word for the log: an audit only says it."""
        if verdict.action == "HOLD" and not _can_hold(request):
            verdict = verdict._replace(action="REJECT")  # better a sender who asks than a thief who is served
        is_early = verdict.rule in LASTING[1:] and settings.early_signs == "audit"
        is_audit = (is_early or settings.mode == "audit") and verdict.rule != "blocked"  # that is a human's word
        message = settings.hold_message if verdict.action == "HOLD" else settings.reject_message
        reply("DUNNO" if is_audit else f"{verdict.action} {verdict.reason}" + (f"; {message}" if message else ""))
        self.figures.note(login, verdict.action, is_audit)
        word = "DEFERRING" if verdict.action == "HOLD" else "REJECTING"
        return verdict, f"would {verdict.action}" if is_audit else word

    def _note_incident(self, event: Event, verdict: Verdict, usage: Usage, queue_id: str) -> None:
        """Record that a login is stopped, and tell a human, if it is the first time in 24 h."""
        login, new = event.sasl_username, (event.sasl_username, verdict.incident)
        of_its_kind = [f"{action} {rule}" for action in ("HOLD", "REJECT") for rule in RULES
                       if (rule == verdict.rule if verdict.rule in LASTING else action == verdict.action)]  # fmt: skip
        if any(incident in usage.incidents or (login, incident) in self._on_its_way for incident in of_its_kind):
            return
        self._on_its_way.add(new)

        def on_recorded(recorded: Usage | None) -> None:
            if recorded is not None:  # one that the store refuses is told of once, not with each message
                self._on_its_way.discard(new)

        self._recorder.record(Event(login, "", verdict.incident, None), on_recorded)
        self.tell(event, verdict, usage.recipients, queue_id)

    def tell(self, event: Event, verdict: Verdict, recipients: int, queue_id: str = "") -> None:
        """Tell a human of an incident that begins now."""
        self._tell({
            "login": event.sasl_username, "rule": verdict.incident, "recipients": recipients,
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "figure": verdict.figure, "limit": verdict.limit, "sender": event.sender,
            "client_address": event.client_address, "queue_id": queue_id if verdict.action == "HOLD" else "",
        })  # fmt: skip


def _can_hold(request: PolicyRequest) -> bool:
    """Tell whether Postfix can hold this message: behind smtpd_proxy_filter, which has no queue id, it cannot."""
    return request.queue_id != "" or request.protocol_state not in ("END-OF-MESSAGE", "DATA")


class PolicyHandler(socketserver.BaseRequestHandler):
    """One connection of one smtpd process: requests line by line, any number of them, until it hangs up."""

    server: PolicyServer

    def handle(self) -> None:
        """Answer requests until the end of the connection, a time-out, or a peer that speaks something else."""
        peer = self.client_address[0] if self.client_address else "the Unix socket"
        self._answered = threading.Lock()  # held while an answer is owed
        try:
            for request in requests(self.request):
                self._answered.acquire()  # answers go out in the order of the requests
                self._asked = time.monotonic()
                self.server.policy.answer(request, peer, self._reply)
        except ProtocolError as error:
            log.complain(f"bad request from {peer}", f"bad request from {peer}: {error}; hung up")
        except OSError:
            pass  # the peer went away
        self._answered.acquire()

    def _reply(self, action: str) -> None:
        """Send the answer without waiting: whoever does not read his answers is hung up on."""
        answer = f"action={action}\n\n".encode("ascii")
        self.server.policy.figures.count(action.partition(" ")[0], time.monotonic() - self._asked)
        try:
            # Not send(): it would wait for as long as recv() may.  The descriptor itself does not block.
            if os.write(self.request.fileno(), answer) < len(answer):
                raise BlockingIOError
        except OSError:
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)
        self._answered.release()


def _remove_stale_socket(path: str) -> None:
    """Remove the socket of a daemon that is no more; raises OSError if one listens, or if it is not a socket."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "is there and not a socket")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(path)
        raise OSError(errno.EADDRINUSE, "another daemon listens there")
    os.unlink(path)


def listening_address(bind: str, port: int) -> tuple[int, Any, str]:
    """Return family and address for a socket, and what Postfix calls it; raises OSError."""
    if bind.startswith("/"):
        return socket.AF_UNIX, bind, wire_name(bind, port)
    try:
        found = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "this is no host name") from error
    # IPv4 first: Postfix's line names 127.0.0.1, and a localhost of ::1 alone would be refused in silence.
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return family, address, wire_name(str(address[0]), port)


class PolicyServer(socketserver.ThreadingTCPServer):
    """Listens on TCP or on a Unix socket, and runs a PolicyHandler in a thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True  # a hanging client does not keep us from ending
    block_on_close = False
    request_queue_size = LISTEN_BACKLOG
    _socket_file: tuple[int, int] | None = None  # which one is ours

    def __init__(self, bind: str, port: int, policy: Policy) -> None:
        """Listen; raises OSError."""
        self.policy = policy
        self.connections: set[socket.socket] = set()
        self._descriptors = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_DESCRIPTORS)
        self.address_family, address, self.listens_on = listening_address(bind, port)
        if self.address_family == socket.AF_UNIX:
            _remove_stale_socket(bind)
        umask = os.umask(0o117)  # a Unix socket is for its owner and group
        try:
            super().__init__(address, PolicyHandler)
        finally:
            os.umask(umask)
        self._socket_file = _identity(bind) if bind.startswith("/") else None

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, without spinning when that cannot be done."""
        try:
            connection, address = super().get_request()
        except OSError as error:
            log.complain("accept", f"cannot accept a connection: {error}")
            time.sleep(0.1)
            raise
        if self.address_family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Keep count of the connections; one too many is closed at once."""
        most = min(self.policy.settings.max_connections, self._descriptors)
        if len(self.connections) >= most:
            log.complain("crowd", f"{most} connections are open, as many as may be: closing new ones at once")
            return False
        self.connections.add(request)
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread."""
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # no more threads, say because of systemd's TasksMax
            log.complain("threads", f"cannot serve a connection: {error}")
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection whose handler has ended, or was never begun."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault of ours, the last net: this connection gets no answer, the others go on."""
        log.error(f"internal error: {traceback.format_exc()}")

    def server_close(self) -> None:
        """Stop listening; remove the socket's file, unless it is another daemon's by now."""
        super().server_close()
        if self._socket_file and _identity(str(self.server_address)) == self._socket_file:
            with contextlib.suppress(OSError):
                os.unlink(str(self.server_address))

    def drain(self, deadline: float) -> None:
        """Stop accepting, answer what has been received, and end by `deadline` (monotonic seconds)."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # gone already
                connection.shutdown(socket.SHUT_RD)  # its handler reads to the end of what is here
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)


# ---- process: arguments, signals, systemd; the only section that wires the others ------------------------------

EXIT_SETTINGS = 78  # EX_CONFIG: systemd does not restart us
STUCK_S = 10  # an event that waits longer than this stops the watchdog's pings
DRAIN_S = 3.5  # at the end: for the answers still owed
FIRST_LOOK_S = 1  # at the start: so long the store is waited for before we are ready
FIRST_PURGE_S, RETRY_PURGE_S = 60, 3600
FIGURES_S = 60  # between two versions of policyd.prom
TELL_EVERY_S = 180  # between two runs of on_stop's program
TELL_TIMEOUT_S, TELL_AGAIN_S, GIVE_UP_TELLING_S = 60, 60, 3600  # of one run, after one that failed, of all these
METRICS = {
    "requests_total": "counter Requests answered.",
    "audited_total": "counter Messages that an audit has let through.",
    "logins_held": "gauge Logins that were held or refused when they last sent.",
    "database_up": "gauge Is the database in use?",
    "database_down_seconds": "gauge For how long it has been away.",
    "journal_events": "gauge Events that wait for the database.",
    "answer_p99_seconds": "gauge 99 % of the last answers were as fast.",
    "connections": "gauge Open connections.",
}


def sd_notify(*lines: str) -> None:
    """Tell systemd, if it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.connect("\0" + address[1:] if address.startswith("@") else address)
        systemd.send("\n".join(lines).encode())


def replace_file(path: str, text: str, mode: int) -> None:
    """Write a file in such a way that nobody ever reads half of it; raises OSError."""
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
    os.replace(new, path)


def _lock_statedir(directory: str) -> None:
    """Keep a second daemon from this directory, or it would move the same journal; raises OSError if one has it."""
    pid_file = os.path.join(directory, "policyd.pid")
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # stays open, and locked, until we end
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        replace_file(pid_file, f"{os.getpid()}\n", 0o644)
    except BlockingIOError:
        pid = "a pid it could not write down"
        with contextlib.suppress(OSError), open(pid_file, encoding="ascii") as file:
            pid = f"pid {file.read().strip()}"
        raise OSError(errno.EBUSY, f"policyd with {pid} keeps its events there") from None
    except OSError as error:
        log.warning(f"statedir {directory}: {error.strerror}; in an outage events are counted in memory only")


class OnStop:
    """Runs the program of on_stop= when a login is stopped; no request waits for it.

    What has not been told stands in a file, too: it is told after a restart, and rather twice than never.
    """

    def __init__(self, path: str, settings: Callable[[], Settings], processors: set[int],
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._path = path
        self._settings = settings
        self._processors = processors
        self._clock = clock
        self._new: queue.SimpleQueue[str] = queue.SimpleQueue()  # an empty text: look around
        self._lines: list[str] = []  # that wait
        self._next_run = self._failing_since = 0.0

    def tell(self, incident: Mapping[str, object]) -> None:
        """Take an incident: one line of JSON for the program."""
        self._new.put(json.dumps(incident) + "\n" if incident else "")

    def run(self, closing: threading.Event) -> None:
        """Tell what there is to tell, until `closing` (and tell({}))."""
        with contextlib.suppress(OSError), open(self._path, encoding="utf-8") as file:
            self._lines = file.readlines()
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._processors)  # of this thread, and of the programs that it starts
        while not closing.is_set():
            self.turn(closing)
            self.gather(max(0.0, self._next_run - self._clock()) if self._lines else None)
        self.gather(0)

    def turn(self, closing: threading.Event) -> None:
        """Run the program with what waits: at once, then at most once in three minutes; each minute while it fails."""
        now = self._clock()
        self.gather(0)
        if not self._lines or now < self._next_run:
            return
        told = len(self._lines)
        failure = self._run_program("".join(self._lines), closing)
        self._next_run = now + (TELL_AGAIN_S if failure else TELL_EVERY_S)
        self._failing_since = (self._failing_since or now) if failure else 0.0
        if failure and now - self._failing_since >= GIVE_UP_TELLING_S:
            log.error(f"gave up telling of {told} incidents: {failure}")
            failure = ""
        if not failure:
            self._keep(self._lines[told:])

    def gather(self, patience_s: float | None = 0) -> None:
        """Take what there is to tell, and keep it in the file."""
        new = []
        with contextlib.suppress(queue.Empty):
            new.append(self._new.get(timeout=patience_s))
            while True:
                new.append(self._new.get_nowait())
        if any(new) and self._settings().on_stop:
            self._keep(self._lines + [line for line in new if line])

    def _keep(self, lines: list[str]) -> None:
        self._lines = lines
        try:
            replace_file(self._path, "".join(lines), 0o600)
            if not lines:
                os.unlink(self._path)
        except OSError as error:
            log.complain("incidents.json", f"after a restart incidents may be told not at all, or twice: {error}")

    def _run_program(self, text: str, closing: threading.Event) -> str:
        """Run on_stop= with `text` as its standard input; return why that failed, or an empty text."""
        words = self._settings().on_stop
        if not words:
            return ""  # a reload has switched it off
        environment = {name: os.environ[name] for name in os.environ if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
        try:
            with os.fdopen(os.memfd_create("incidents"), "w+") as file:
                file.write(text)
                file.seek(0)
                # Our signals are blocked, which the program must not inherit.
                pid = os.posix_spawnp(words[0], list(words), environment, setpgroup=0, setsigmask=(),
                                      setsigdef=(signal.SIGPIPE,),
                                      file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 0)])  # fmt: skip
            failure = self._wait_for(pid, closing)
        except OSError as error:
            failure = str(error.strerror)
        if failure:
            log.complain("on_stop", f"on_stop={shlex.join(words)}: {failure}; trying again each minute for an hour")
        return failure

    @staticmethod
    def _wait_for(pid: int, closing: threading.Event) -> str:
        deadline = time.monotonic() + TELL_TIMEOUT_S
        ended = status = 0
        while not ended and time.monotonic() < deadline and not closing.wait(0.05):
            ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return f"status {os.waitstatus_to_exitcode(status)}" if status else ""
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return f"not done after {TELL_TIMEOUT_S} s"


class Housekeeper:
    """Sweeps once a minute, and purges soon after the start and then every day; in a thread of its own."""

    def __init__(self, repository: Repository, watch: Watch, policy: Policy, is_up: Callable[[], bool],
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._repository = repository
        self._watch = watch
        self._policy = policy
        self._is_up = is_up
        self._clock = clock
        self._next_purge = self._clock() + FIRST_PURGE_S
        self._next_sweep = self._clock()
        self._swept: float | None = None  # when the last good sweep began; None: all logins are to be swept
        self._audited: dict[str, float] = {}  # who would have been held, and when that was said
        self._complaint = ""  # of the last sweep

    def run(self, closing: threading.Event) -> None:
        """Do what is due until `closing`."""
        while not closing.wait(max(0.0, min(self._next_sweep, self._next_purge) - self._clock())):
            self.sweep_if_due(self._clock())
            if self._clock() >= self._next_purge:
                self._purge(self._policy.settings.keep_days)

    def _purge(self, keep_days: int) -> None:
        deleted = 0
        try:
            for of_slice in self._repository.purge(keep_days):
                deleted += of_slice
                self.sweep_if_due(self._clock())
        except RepositoryUnavailable as error:
            self._next_purge = self._clock() + RETRY_PURGE_S
            log.warning(f"old events stay for now: {error}")
        else:
            self._next_purge = self._clock() + DAY_S
            log.info(f"purged {deleted} events older than {keep_days} days")

    def sweep_if_due(self, now: float) -> None:
        """Sweep: at the start and after an outage all logins, else those that have sent since the last good sweep."""
        if now < self._next_sweep:
            return
        # Relays that were started together shall not sweep together.
        self._next_sweep = now + (random.uniform(0, MINUTE_S) if self._swept is None else MINUTE_S)
        settings = self._policy.settings
        if settings.early_signs == "no" or not self._is_up():
            self._swept = None
            return
        lately_s = DAY_S if self._swept is None else now - self._swept + MINUTE_S
        try:
            if not self._repository.has_index():
                raise RepositoryUnavailable("they need the index on (sasl_username, ts); run policyd --init-db")
            for login, verdict, recipients in self._watch.sweep(settings, lately_s):
                self._found(login, verdict, recipients, "audit" in (settings.mode, settings.early_signs))
            self._swept, self._complaint = now, ""
        except RepositoryUnavailable as error:
            if not self._complaint:
                log.warning(f"no sweep for early signs, trying each minute: {error}")
            self._complaint = str(error)

    def _found(self, login: str, verdict: Verdict, recipients: int, is_audit: bool) -> None:
        if not is_audit:
            log.info(f"Held by the sweep: {login}, {verdict.said}")
            return self._policy.tell(Event(login, "", "", None), verdict, recipients)
        now = self._clock()
        self._audited = {known: when for known, when in self._audited.items() if now - when < DAY_S}
        if self._audited.setdefault(login, now) == now:
            log.info(f"would HOLD {verdict.said} for user {login}, found by the sweep")


class Daemon:
    """The parts put together, and the main thread's loop over signals."""

    SIGNALS = frozenset((signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))

    def __init__(self, settings: Settings, settings_file: str, processors: set[int]) -> None:
        """Listen; raises OSError."""
        self._settings_file = settings_file
        self._started_with = settings
        _lock_statedir(os.path.dirname(settings.state_file("")))
        self._repository = open_repository(settings)
        watch = Watch(self._repository)
        self._recorder = Recorder(self._repository, Journal(settings.state_file("journal.sqlite3")), settings, watch)
        self._on_stop = OnStop(settings.state_file("incidents.json"), lambda: self._policy.settings, processors)
        with contextlib.suppress(OSError):
            os.unlink(settings.state_file("notified.json"))  # of 0.1
        self._policy = Policy(settings, self._recorder, self._on_stop.tell)
        self._server = PolicyServer(settings.bind, settings.port, self._policy)
        self.listens_on = self._server.listens_on
        self._closing = threading.Event()
        housekeeper = Housekeeper(self._repository, watch, self._policy, self._has_all_events)
        accept = functools.partial(self._server.serve_forever, 0.1)
        sweep, tell = (functools.partial(part.run, self._closing) for part in (housekeeper, self._on_stop))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (accept, self.publish, sweep, tell)]

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; call with SIGNALS blocked."""
        self._recorder.start()
        self._recorder.looked.wait(FIRST_LOOK_S)  # the first status shall be true
        for thread in self._threads:
            thread.start()
        sd_notify("READY=1", f"STATUS={self.status()}")
        pause = min(10.0, int(os.environ.get("WATCHDOG_USEC") or 20_000_000) / 2e6)  # half of what systemd allows
        while True:
            received = signal.sigtimedwait(self.SIGNALS, pause)
            number = received.si_signo if received else None
            if number in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGHUP and os.isatty(0)):
                return self.stop()
            if number == signal.SIGHUP:
                self.reload()
            if number == signal.SIGUSR1:
                log.info(self.status())
            log.tick(time.monotonic())
            if self.is_well():
                sd_notify("WATCHDOG=1", f"STATUS={self.status()}")

    def _has_all_events(self) -> bool:
        """Tell whether the store is there, and the journal has none of its events any more."""
        return self._recorder.down_s() is None and self._recorder.journal.is_empty()

    def is_well(self) -> bool:
        """Tell whether no event waits for too long and no thread of ours has died: else only a restart helps."""
        threads = [*self._recorder.threads, *self._threads, log.thread]
        return self._recorder.longest_wait_s() < STUCK_S and all(thread.is_alive() for thread in threads)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the moment, of which METRICS says what they are."""
        figures, down_s = self._policy.figures, self._recorder.down_s()
        waiting, connections = self._recorder.journal.waiting, len(self._server.connections)
        values = (dict(figures.answered), dict(figures.spared), figures.logins_held(), int(down_s is None),
                  round(down_s or 0), waiting, figures.p99_s(), connections)  # fmt: skip
        return dict(zip(METRICS, values))

    def status(self) -> str:
        """Return them on one line."""
        answered, spared, held, is_up, down_s, waiting, p99_s, connections = self.figures().values()
        audit = f" (audit: {spared['HOLD']} would HOLD, {spared['REJECT']} would REJECT)" * any(spared.values())
        database = "up" if is_up else f"down since {local_time(time.time() - down_s)}"
        trouble = ", which CANNOT BE USED" if self._recorder.journal.place == "memory" else ""
        return (
            f"{sum(answered.values())} requests: {answered['DUNNO']} DUNNO, {answered['HOLD']} HOLD,"
            f" {answered['REJECT']} REJECT{audit}; {held} logins held; {connections} connections;"
            f" p99 {p99_s * 1000:.1f} ms; database {database}, {waiting} events in the journal{trouble};"
            f" on {self.listens_on}"
        )

    def metrics(self) -> str:
        """Return them in Prometheus' text format."""
        lines = []
        for name, value in self.figures().items():
            kind, _, about = METRICS[name].partition(" ")
            lines += [f"# HELP policyd_{name} {about}", f"# TYPE policyd_{name} {kind}"]
            values = {f'{{answer="{key}"}}': value[key] for key in value} if isinstance(value, dict) else {"": value}
            lines += [f"policyd_{name}{label} {number}" for label, number in values.items()]
        return "\n".join([*lines, ""])

    def publish(self) -> None:
        """Once a minute, write the figures to a file, for node_exporter's textfile collector."""
        complaint = ""
        while not complaint or not self._closing.is_set():
            try:
                replace_file(self._started_with.state_file("policyd.prom"), self.metrics(), 0o644)
                complaint = ""
            except OSError as error:
                if complaint != str(error):
                    log.warning(f"no file of figures: {error}")
                complaint = str(error)
            if self._closing.wait(FIGURES_S):
                return

    def reload(self) -> None:
        """Read the settings again, whole or not at all."""
        sd_notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            new = _read_settings(self._settings_file, is_needed=bool(self._policy.settings.path))
        except SettingsError as error:
            log.error(f"{error}; going on with the old settings")
        else:
            changed = new.differences(self._started_with)
            if changed:
                log.warning(f"settings changed that need a restart: {', '.join(changed)}")
            for line in new.gone:
                log.error(line)
            self._recorder.settings = new  # first: a higher quota needs to know more
            self._policy.settings = new
            log.info(f"settings read again: {new.path or 'none, defaults'}")
        sd_notify("READY=1", f"STATUS={self.status()}")

    def stop(self) -> None:
        """Answer what is in flight and write what is recorded, in 5 seconds at most."""
        sd_notify("STOPPING=1")
        deadline = time.monotonic() + DRAIN_S
        self._closing.set()
        self._on_stop.tell({})
        self._server.drain(deadline)
        status = self.status()
        self._recorder.stop(max(0.1, deadline - time.monotonic()))
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        self._on_stop.gather()  # of what the recorder has just recorded, which nobody else will be told of again
        self._repository.close()
        log.info(f"policyd ends; {status}")


def _read_settings(path: str, is_needed: bool) -> Settings:
    """Return the settings of a file, or the defaults if there is none and it need not be; raises SettingsError."""
    return Settings.from_file(path) if is_needed or os.path.lexists(path) else Settings()


def version() -> str:
    """Return what this is, with the commit if it is a checkout that git knows."""
    here = os.path.dirname(os.path.realpath(__file__))
    commit = ""
    if os.path.exists(os.path.join(here, ".git")):
        import subprocess  # here: an installed policyd needs it never

        with contextlib.suppress(OSError):
            command = ["git", "-C", here, "rev-parse", "--short=7", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{__version__}+{commit}" if commit else __version__


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with mistakes on one line."""

    def error(self, message: str) -> NoReturn:
        """End with one line."""
        self.exit(1, f"policyd: {message}; see policyd --help\n")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(prog="policyd", description="Postfix policy daemon: recipient quotas for SASL users")
    parser.add_argument("-c", "--config", metavar="FILE", help=f"settings (default: {SETTINGS_FILE}, if there)")
    parser.add_argument("--stderr", action="store_true", help="log to stderr instead of syslog")
    parser.add_argument("--version", action="store_true", help="say which version this is")
    parser.add_argument("--from-embedded", action="store_true", help="with --init-db: move the embedded store's events")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="try all that policyd needs, and say what is missing")
    instead.add_argument("--check-settings", action="store_true", help="read the settings, and do nothing else")
    instead.add_argument("--init-db", action="store_true", help="create the table, or upgrade an old one")
    options = parser.parse_args(arguments)
    if options.from_embedded and not options.init_db:
        parser.error("--from-embedded goes with --init-db")
    return options


def _become_policyd() -> None:
    """If root asks, go on as the daemon's user, where there is one: what root may do says nothing."""
    with contextlib.suppress(KeyError):
        if os.geteuid() == 0:
            user = pwd.getpwnam("policyd")
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)


def _ask_over_the_wire(connection: socket.socket, address: Any = None) -> bool:
    """Tell whether policyd answers on this connection (to `address`); a request without a login counts nothing."""
    connection.settimeout(CONNECT_TIMEOUT_S)
    with contextlib.suppress(OSError), connection:
        if address:
            connection.connect(address)
        connection.sendall(b"request=smtpd_access_policy\n\n")
        return connection.recv(64) == b"action=DUNNO\n\n"
    return False


def _check_listening(settings: Settings) -> str:
    """Return what keeps policyd from listening and understanding, or an empty text; it may listen already."""
    policy = Policy(settings, Recorder(open_repository(settings), Journal(os.devnull), settings), lambda incident: None)
    try:
        family, address, name = listening_address(settings.bind, settings.port)
        print(f"listening on {name}")
        PolicyServer(settings.bind, settings.port, policy).server_close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _ask_over_the_wire(socket.socket(family), address):
            print(f"a request on {name} is answered")
            return ""
        return f"cannot listen on {wire_name(settings.bind, settings.port)}: {error.strerror or error}"
    ours, theirs = socket.socketpair()
    server: Any = types.SimpleNamespace(policy=policy)
    threading.Thread(target=PolicyHandler, args=(theirs, "", server), daemon=True).start()
    return "" if _ask_over_the_wire(ours) else "requests are not understood: the sockets of this system differ"


def check(settings: Settings) -> list[str]:
    """Return all that is missing, a line each; print what was found."""
    problems = [_check_listening(settings)]
    statedir = os.path.dirname(settings.state_file(""))
    if not os.access(statedir, os.W_OK | os.X_OK):
        is_there = "cannot be written" if os.path.isdir(statedir) else "is not there"
        problems.append(f"statedir {statedir} {is_there}: in an outage events would be counted in memory only")
    journal = settings.state_file("journal.sqlite3")
    if os.path.exists(journal) and not os.access(journal, os.R_OK | os.W_OK):
        problems.append(f"{journal} cannot be read and written: try chown policyd: {journal}")
    if settings.port < 1024 and not settings.bind.startswith("/"):
        problems.append(f"port={settings.port}: under unit.service policyd may not listen below 1024")
    if settings.on_stop and not shutil.which(settings.on_stop[0]):
        problems.append(f"on_stop={shlex.join(settings.on_stop)}: {settings.on_stop[0]} cannot be run")
    if settings.early_signs != "no" and not settings.trusted_network.lines:
        print("warning: early_signs is on and trusted_network= is empty: your own webmail and campus are places, too")
    repository = open_repository(settings)
    try:
        repository.resolve()
        print(f"events can be counted: {repository.check(time.monotonic() + BATCH_DEADLINE_S)}")
        problems += repository.problems(time.monotonic() + BATCH_DEADLINE_S)
        if settings.early_signs != "no" and not repository.has_index():
            problems.append("early_signs needs the index on (sasl_username, ts): run policyd --init-db")
    except RepositoryUnavailable as error:
        problems.append(f"events cannot be counted: {error}")
    return [problem for problem in problems if problem]


def _init_database(settings: Settings, is_from_embedded: bool) -> int:
    """Create or upgrade the table, and move there what the embedded store has, if asked; return the exit status."""
    if is_from_embedded and not settings.dbhost:
        return _fail("--from-embedded needs the db... settings: where to?")
    repository = open_repository(settings)
    repository.resolve()
    print(repository.init())
    if is_from_embedded:
        embedded = Journal(settings.state_file("events.sqlite3"))
        embedded.look()
        moved = 0
        while embedded.can_move():
            moved += len(embedded.replay(repository, time.monotonic() + DAY_S))
        print(f"moved {moved} events of the embedded store")
        if not embedded.is_empty():
            return _fail(f"{embedded.trouble}: what stays there would be moved again")
    return 0


def _fail(message: str, status: int = 1) -> int:
    """Say on stderr why we end; return the exit status."""
    print(f"policyd: {printable(message)}", file=sys.stderr)
    return status


def _do_instead(options: argparse.Namespace, settings: Settings, about: str) -> int:
    """Do what the command line asks for instead of serving; return the exit status."""
    for line in settings.gone:
        _fail(line)
    if options.check_settings:
        print(f"no mistake in the settings: {about}")
        return 0
    if options.init_db:
        return _init_database(settings, options.from_embedded)
    print(f"{about}, {open_repository(settings)}")
    return max([_fail(problem) for problem in check(settings)], default=0)


def _serve(daemon: Daemon, settings: Settings, settings_file: str, about: str) -> None:
    """Say what is to be said at the start, and serve to the end."""
    threading.excepthook = lambda fault: log.error("internal error: " + "".join(traceback.format_exception(*fault[:3])))
    log.info(about)
    for line in settings.gone:
        log.error(line)
    if settings.dbpass and os.stat(settings_file).st_mode & stat.S_IROTH:
        log.warning(f"everybody can read the password in {settings_file}; try: chmod 0640 {settings_file}")
    if not (log.to_stderr or "NOTIFY_SOCKET" in os.environ):
        print(f"{about}; logging to syslog", file=sys.stderr)
    daemon.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run policyd; return its exit status."""
    options = _parse_arguments(arguments)
    if options.version:
        print(f"policyd {version()}")
        return 0
    settings_file = options.config or SETTINGS_FILE
    os.umask(0o077)
    if options.check:
        _become_policyd()
    where = ""
    try:
        settings = _read_settings(settings_file, is_needed=bool(options.config))
        where = wire_name(settings.bind, settings.port)
        file = settings.path or f"none, defaults (yours would go into {SETTINGS_FILE})"
        about = f"quota {settings.defaultquota}{' (audit)' if settings.mode == 'audit' else ''}, settings: {file}"
        if options.init_db or options.check or options.check_settings:
            return _do_instead(options, settings, f"{where}, {about}")
        about += f", {open_repository(settings)}"
        # In all threads to come: run() asks for them.  All stay on one processor, which doubles what a busy daemon
        # answers: Python runs one at a time, and with two each hand-over moves to the other one's cold caches.
        signal.pthread_sigmask(signal.SIG_BLOCK, Daemon.SIGNALS)
        processors = os.sched_getaffinity(0)
        with contextlib.suppress(OSError):  # forbidden: slower, no worse
            os.sched_setaffinity(0, {max(processors)})
        daemon = Daemon(settings, settings_file, processors)
    except SettingsError as error:
        return _fail(str(error), EXIT_SETTINGS)
    except RepositoryUnavailable as error:
        return _fail(f"events cannot be counted: {error}")
    except OSError as error:
        what = "use its statedir" if error.errno == errno.EBUSY else f"listen on {where}"
        return _fail(f"cannot {what}: {error.strerror or error}")
    except ImportError:
        return _fail("PyMySQL is missing: apt install python3-pymysql, or remove the db... settings")
    log.start(options.stderr)
    _serve(daemon, settings, settings_file, f"policyd {__version__} on {daemon.listens_on}, {about}")
    log.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
