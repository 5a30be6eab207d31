"""The real servers the tests run against: MariaDB, policyd itself, and Postfix.

Each server is private: its own temporary directory, its own port on 127.0.0.1, started as a child of the tests and
ended by its pid.  Each is awaited through an answer of its own, never by a sleep.  PyMySQL is imported where MariaDB is
asked, so that tests without a server need no driver.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = (ROOT / "scripts" / "schema.sql").read_text()
# The table of go-policyd, as it stands at existing sites.
OLD_SCHEMA = """
CREATE TABLE `events` (
  `ts` DATETIME(3) NOT NULL DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP,
  `sasl_username` char(8) NOT NULL DEFAULT '',
  `sender` char(80) NOT NULL DEFAULT '',
  `client_address` char(80) NOT NULL DEFAULT '',
  `recipient_count` int(6) DEFAULT NULL,
  PRIMARY KEY (`ts`,`sasl_username`,`sender`,`client_address`)
) ENGINE=InnoDB DEFAULT CHARSET=latin1
"""

# What policyd answers, as the contract has it.
DUNNO = "DUNNO"
HOLD = "HOLD quota exceeded"
REJECT = "REJECT max quota exceeded"

PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"  # an ordinary user's lacks sbin
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


# --- what every server needs ---


def program(name: str, package: str) -> str:
    """Return the path of a program; end the whole run, naming its Debian package, if it is missing."""
    path = shutil.which(name, path=PATH)
    if path is None:
        pytest.exit(f"{name} is missing: apt-get install {package}", returncode=1)
    return path


def temporary_directory() -> Path:
    """Return a new directory with a short name: the path of a unix socket has 107 bytes at most."""
    return Path(tempfile.mkdtemp(prefix="pd"))


_ports_given: set[int] = set()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on, a different one at each call.

    It lies below the kernel's ephemeral range: no outgoing connection can take it meanwhile.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _ports_given:
                _ports_given.add(port)
                return port


def wait_until(is_true: Callable[[], Any], what: str, timeout: float = START_TIMEOUT_S) -> Any:
    """Ask until the answer is true and return it; fail, saying what was awaited, after `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        answer = is_true()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what}")
        time.sleep(0.01)


def end(process: subprocess.Popen[Any], timeout: float = STOP_TIMEOUT_S) -> int:
    """End a child: politely, and for sure.  Returns its exit status, negative for a signal."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)  # a frozen one would not hear the next signal
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


class Server:
    """A child with a directory of its own."""

    def __init__(self) -> None:
        self.directory = temporary_directory()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that runs, or ran last; a new one after each start."""
        assert self._process is not None, "not started yet"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def _spawn(self, command: Sequence[str], output: Any = subprocess.DEVNULL, **environment: str) -> None:
        self._process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=self.directory, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output,
        )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Let it end in good order; return the exit status."""
        return end(self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Let it hang: its port accepts, nobody answers."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: set(self._states()) == {"T"}, "each thread of the server has stopped")

    def _states(self) -> Iterator[str]:
        """Yield the state of each thread, a letter as in proc(5)."""
        for status in Path(f"/proc/{self.pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):  # it has just ended
                yield re.search(r"^State:\s+(\S)", status.read_text(), re.MULTILINE)[1]

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def remove(self) -> None:
        try:
            if self._process is not None:
                self.stop()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


# --- what a daemon tells others ---


def pattern(needle: str | re.Pattern[str]) -> re.Pattern[str]:
    """Return a pattern that finds `needle` as it is written, or as a regular expression."""
    if isinstance(needle, re.Pattern):
        return needle
    with contextlib.suppress(re.error):
        return re.compile(f"{re.escape(needle)}|{needle}")
    return re.compile(re.escape(needle))


class Inbox:
    """A unix datagram socket that is read all the time: what syslogd and systemd are to a daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._messages: list[str] = []
        self._marks_sent = self._marks_seen = 0
        self._changed = threading.Condition()  # guards the above; notified at each datagram
        self._is_reading = threading.Event()
        self._is_reading.set()
        self._is_closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._is_closed:
            datagram = self._socket.recv(65536)
            with self._changed:
                if datagram:
                    self._messages.append(datagram.decode("utf-8", "backslashreplace").rstrip("\0"))
                else:
                    self._marks_seen += 1
                self._changed.notify_all()
            self._is_reading.wait()

    def _send_mark(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(STOP_TIMEOUT_S)
            sender.sendto(b"", str(self.path))
        self._marks_sent += 1

    def messages(self) -> list[str]:
        """Return every message sent so far: a mark of our own, queued behind them, comes back first."""
        is_read = self._is_reading.is_set() and not self._is_closed
        if is_read:
            self._send_mark()
        with self._changed:
            if is_read:
                assert self._changed.wait_for(lambda: self._marks_seen == self._marks_sent, STOP_TIMEOUT_S)
            return list(self._messages)

    def wait_for(self, needle: str | re.Pattern[str], timeout: float, count: int = 1) -> str | None:
        """Return the `count`th message that holds `needle`, or None if it does not come in time."""
        wanted = pattern(needle)

        def found() -> list[str]:
            return [message for message in self._messages if wanted.search(message)][count - 1 : count]

        with self._changed:
            self._changed.wait_for(found, timeout)
            return next(iter(found()), None)

    def pause(self) -> None:
        """Stop reading, as a stuck reader does; one more message may still be taken."""
        self._is_reading.clear()
        self._send_mark()  # the thread may be waiting for a message: let it see the change

    def resume(self) -> None:
        self._is_reading.set()

    def close(self) -> None:
        """Take what is left and end the thread.  The messages stay readable."""
        if not self._is_closed:
            self.resume()
            self.messages()
            self._is_closed = True
            self._send_mark()
            self._thread.join(STOP_TIMEOUT_S)
            self._socket.close()


# --- MariaDB ---


class MariaDB(Server):
    """A private mariadbd in a temporary directory; or the mariadbd or mysqld that POLICYD_TEST_SERVER names."""

    host = "127.0.0.1"
    user = "policyd"
    password = "p#a\"s's\\w%rd"  # all that a settings file, a shell or SQL could stumble over

    def __init__(self, buffer_pool: str = "32M") -> None:
        super().__init__()
        self._buffer_pool = buffer_pool
        self._server = os.environ.get("POLICYD_TEST_SERVER") or program("mariadbd", "mariadb-server")
        named = subprocess.run([self._server, "--no-defaults", "--version"], capture_output=True, text=True, check=True)
        self.is_mysql = "MariaDB" not in named.stdout
        self.port = free_port()
        self.socket = str(self.directory / "socket")
        self._log = self.directory / "log.err"
        self._as_user = ["--user=root"] if os.geteuid() == 0 else []
        self._names = itertools.count(1)

    def install(self) -> None:
        """Create the system tables, with a root that needs no password on our socket, and our user."""
        options = ["--no-defaults", *self._as_user, f"--datadir={self.directory / 'data'}"]
        if self.is_mysql:
            command = [self._server, *options, "--initialize-insecure"]
        else:
            beside = Path(self._server).parent / "mariadb-install-db"
            install = str(beside) if beside.exists() else program("mariadb-install-db", "mariadb-server")
            command = [install, *options, f"--tmpdir={self.directory}", "--auth-root-authentication-method=normal",
                       "--skip-test-db", "--skip-name-resolve"]  # fmt: skip
        done = subprocess.run(
            command, env={**os.environ, "PATH": PATH}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120,
        )
        if done.returncode != 0:
            pytest.exit(f"{command[0]} failed: {done.stdout}{done.stderr}", returncode=1)
        self.start()
        self.query(f"CREATE USER '{self.user}'@'127.0.0.1' IDENTIFIED BY %s", (self.password,))

    @property
    def version(self) -> str:
        return str(self.query("SELECT VERSION()")[0][0])

    def start(self) -> None:
        self.launch()
        wait_until(self._answers, "mariadbd answers", 3 * START_TIMEOUT_S)

    def launch(self, *options: str) -> None:
        """Start the server with more options than it needs anyway."""
        # Durable as InnoDB is by default, but small and quick to start.
        small = ["--innodb-log-file-size=32M", "--aria-pagecache-buffer-size=1M"]
        if self.is_mysql:
            small = ["--innodb-redo-log-capacity=32M", "--mysqlx=OFF", "--skip-log-bin", "--secure-file-priv=NULL"]
        self._spawn([
            self._server, "--no-defaults", *self._as_user, f"--datadir={self.directory / 'data'}",
            f"--tmpdir={self.directory}", f"--socket={self.socket}", f"--port={self.port}",
            f"--bind-address={self.host}", f"--pid-file={self.directory / 'pid'}", f"--log-error={self._log}",
            "--skip-name-resolve", "--performance-schema=OFF", f"--innodb-buffer-pool-size={self._buffer_pool}",
            "--key-buffer-size=1M", *small, *options,
        ], PATH=PATH)  # fmt: skip

    def _answers(self) -> bool:
        import pymysql

        if self.process.poll() is not None:
            pytest.fail(f"{self._server} ended with status {self.process.returncode}:\n{self._log.read_text()}")
        with contextlib.suppress(pymysql.err.OperationalError):
            return self.query("SELECT 1") == [(1,)]
        return False

    def ensure_running(self) -> None:
        """Undo what a test did to the server."""
        if self.process.poll() is not None:
            self.start()
        self.thaw()

    def connect(self, database: str | None, autocommit: bool = False) -> Any:
        import pymysql

        return pymysql.connect(
            unix_socket=self.socket, user="root", database=database, charset="utf8mb4", autocommit=autocommit,
            connect_timeout=5, read_timeout=60, write_timeout=60,
            ssl_disabled=True,  # reading the system's certificates takes longer than all the rest
        )

    def query(self, sql: str, args: tuple[Any, ...] = (), database: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement as root, committed at once, and return its rows."""
        with contextlib.closing(self.connect(database, True)) as connection, connection.cursor() as cursor:
            cursor.execute(sql, args or None)
            return list(cursor.fetchall())

    def new_database(self, table_sql: str) -> Database:
        """Create a database with one table, and let our user work on it."""
        self.ensure_running()
        name = f"policyd{next(self._names)}"
        self.query(f"CREATE DATABASE {name}")
        if self.is_mysql:  # go-policyd's table as MySQL takes it: with milliseconds in its default, too
            table_sql = re.sub(r"CURRENT_TIMESTAMP\b(?!\()", "CURRENT_TIMESTAMP(3)", table_sql)
        self.query(table_sql, database=name)
        rights = "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER"
        self.query(f"GRANT {rights} ON {name}.* TO '{self.user}'@'127.0.0.1'")
        return Database(self, name)

    def drop_database(self, name: str) -> None:
        self.ensure_running()
        self.query(f"REVOKE ALL PRIVILEGES ON {name}.* FROM '{self.user}'@'127.0.0.1'")
        self.query(f"DROP DATABASE {name}")


class Database(NamedTuple):
    """One database of the server, with policyd's table and a user who may work on it."""

    server: MariaDB
    name: str

    def query(self, sql: str, args: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self.server.query(sql, args, database=self.name)

    def settings(self) -> dict[str, str]:
        server = self.server
        return {"dbhost": server.host, "dbport": str(server.port), "dbuser": server.user, "dbpass": server.password,
                "dbname": self.name}  # fmt: skip


# --- policyd ---

FACILITIES = ["kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"]
LEVELS = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]
SYSLOG_DATAGRAM = re.compile(r"<(\d+)>\w{3} [ \d]\d \d\d:\d\d:\d\d ([^\[:]+)\[(\d+)\]: (.*)", re.DOTALL)

# A /dev for the daemon alone, in which /dev/log is ours: libc's syslog() knows no other place.
# Each step replaces the process by the next, so that the pid is the daemon's from the first one on.
IN_PRIVATE_DEV = """
dev=$1; shift
for name in null zero random urandom; do mount --bind "/dev/$name" "$dev/$name" || exit; done
mount --rbind "$dev" /dev || exit
exec "$@"
"""

_numbers = itertools.count(1)


class LogLine(NamedTuple):
    """One line as it arrived at /dev/log."""

    facility: str
    level: str
    tag: str
    pid: int
    text: str

    @classmethod
    def parse(cls, datagram: str) -> LogLine:
        match = SYSLOG_DATAGRAM.fullmatch(datagram)
        assert match, f"not a syslog line: {datagram!r}"
        facility, level = divmod(int(match[1]), 8)
        return cls(FACILITIES[facility], LEVELS[level], match[2], int(match[3]), match[4])


def request_bytes(**attributes: object) -> bytes:
    """Return a request as Postfix sends it: one recipient at END-OF-MESSAGE unless told otherwise."""
    number = next(_numbers)
    request = {
        "request": "smtpd_access_policy", "protocol_state": "END-OF-MESSAGE", "protocol_name": "ESMTP",
        "client_address": "192.0.2.1", "sender": "alice@example.org", "recipient_count": 1,
        "queue_id": f"4Xk{number:X}", "instance": f"{os.getpid():x}.{number:x}.0",
        "sasl_method": "PLAIN", "sasl_username": "alice", **attributes,
    }  # fmt: skip
    return "".join(f"{name}={value}\n" for name, value in request.items()).encode() + b"\n"


def read_answer(connection: socket.socket) -> str:
    """Read one answer and return what stands behind `action=`; EOFError if the server hung up."""
    answer = b""
    while not answer.endswith(b"\n\n"):
        received = connection.recv(1)  # never a byte of the next answer
        if not received:
            raise EOFError(f"policyd hung up after {answer!r}")
        answer += received
    assert answer.startswith(b"action="), answer
    return answer[len(b"action=") : -2].decode("ascii")


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the server hangs up, and return what came."""
    answers = b""
    with contextlib.suppress(ConnectionResetError):  # it hung up before it had read all we sent
        while received := connection.recv(65536):
            answers += received
    return answers


class Policyd(Server):
    """The daemon of this repository, as a child process that takes us for syslogd and systemd.

    `settings` become the settings file, one line each, a list one line per entry; `text` replaces them.  Unless they
    say otherwise it listens on a free port of 127.0.0.1 and keeps its files in its directory.  `environment` is added
    to our own.  `mounts` are commands for a shell that sees the world as the daemon does, before it starts; what they
    mount is seen by nobody else, and `its_view` leads there.
    """

    def __init__(
        self, text: str | None = None, environment: dict[str, str] | None = None, mounts: str = "", **settings: Any
    ) -> None:
        super().__init__()
        self.settings_file = self.directory / "policyd.cfg"
        self.write_settings(text, **settings)
        self.environment = environment or {}
        self.mounts = mounts
        self.syslog = Inbox(self.directory / "syslog")
        self.notify = Inbox(self.directory / "notify")
        self._connection: socket.socket | None = None
        self.dev = self.directory / "dev"
        self.dev.mkdir()
        for name in ("null", "zero", "random", "urandom"):
            (self.dev / name).touch()
        (self.dev / "fd").symlink_to("/proc/self/fd")
        (self.dev / "log").symlink_to(self.syslog.path)

    def write_settings(self, text: str | None = None, **settings: Any) -> None:
        """Write the settings file, also while the daemon runs; what is not named stays out of it."""
        if text is None:
            if not str(settings.get("bind", "")).startswith("/"):
                settings.setdefault("port", getattr(self, "port", None) or free_port())
            settings.setdefault("statedir", self.directory / "state")
            lists = {key: value if isinstance(value, (list, tuple)) else [value] for key, value in settings.items()}
            text = "".join(f"{key}={value}\n" for key, values in lists.items() for value in values)
        self.settings_file.write_bytes(text.encode())
        self.settings_file.chmod(0o640)
        in_force = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in text.splitlines())}
        self.bind = in_force.get("bind", "127.0.0.1")
        self.port = int(in_force.get("port", 9093))
        self.statedir = Path(in_force.get("statedir", self.directory / "state"))
        self.statedir.mkdir(exist_ok=True)

    def start(self) -> Policyd:
        """Start the daemon, also again, and wait until it says that it is ready."""
        readies = sum("READY=1" in message for message in self.notifications) + 1  # reloads send it too
        with (self.directory / "stderr").open("ab") as stderr:
            as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
            self._spawn([
                program("unshare", "util-linux"), "--mount", *as_root, "sh", "-c", f"{self.mounts}\n{IN_PRIVATE_DEV}",
                "sh", str(self.dev), sys.executable, str(ROOT / "policyd.py"), "-c", str(self.settings_file),
            ], stderr, **{"STATE_DIRECTORY": str(self.statedir), "NOTIFY_SOCKET": str(self.notify.path),
                          **self.environment})  # fmt: skip
        wait_until(lambda: self._is_ready(readies), "policyd is ready")
        return self

    def _is_ready(self, readies: int) -> bool:
        status = self.process.poll()
        if status is not None:
            raise RuntimeError(f"policyd ended with status {status} before it was ready:\n{self.stderr}")
        return self.notify.wait_for("READY=1", 0.1, readies) is not None

    def its_view(self, path: Path) -> Path:
        """Return where we find what is at `path` for the running daemon."""
        return Path(f"/proc/{self.pid}/root{path}")

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr").read_text(errors="backslashreplace")

    # asking

    def connect(self) -> socket.socket:
        if self.bind.startswith("/"):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(START_TIMEOUT_S)
            connection.connect(self.bind)
            return connection
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)
        return socket.create_connection((address, self.port), START_TIMEOUT_S)

    def ask(self, **attributes: object) -> str:
        """Send one request on our own connection and return the answer, without `action=`."""
        if self._connection is None:
            self._connection = self.connect()
        self._connection.sendall(request_bytes(**attributes))
        return read_answer(self._connection)

    def hang_up(self) -> None:
        """Close the connection `ask` uses; the next `ask` opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # listening

    def log_lines(self) -> list[LogLine]:
        """Return every line that has arrived at /dev/log so far."""
        return [LogLine.parse(message) for message in self.syslog.messages()]

    def wait_for_log(self, needle: str | re.Pattern[str], timeout: float = 10, count: int = 1) -> LogLine:
        """Return the `count`th log line that holds `needle`, a text or a regular expression."""
        message = self.syslog.wait_for(needle, timeout, count)
        if message is None:
            lines = "\n".join(line.text for line in self.log_lines())
            pytest.fail(f"not logged within {timeout:g} s: {needle}\nthe log:\n{lines}\nstderr:\n{self.stderr}")
        return LogLine.parse(message)

    def lines_so_far(self) -> list[LogLine]:
        """Return every line logged before this call: that of a message of our own, sent now, comes behind them."""
        login = f"mark{next(_numbers)}"
        self.ask(sasl_username=login)
        self.wait_for_log(f"Updating db: {login}/")
        return [line for line in self.log_lines() if not re.search(r"\bmark\d+/|\bmark\d+ ", line.text)]

    @property
    def notifications(self) -> list[str]:
        return self.notify.messages()

    def wait_for_notification(self, needle: str | re.Pattern[str], timeout: float = 10, count: int = 1) -> str:
        """Return the `count`th message to systemd that holds `needle`."""
        message = self.notify.wait_for(needle, timeout, count)
        if message is None:
            pytest.fail(f"systemd was not told within {timeout:g} s: {needle}\nit was told: {self.notifications}")
        return message

    # ending

    def stop(self) -> int:
        """Send SIGTERM, wait for the end, return the exit status."""
        self.hang_up()
        return super().stop()

    def kill(self) -> None:
        super().kill()
        self.hang_up()

    def remove(self) -> None:
        """Stop the daemon if it runs, remove its files; no traceback may ever have been shown."""
        try:
            shown = ""
            if self._process is not None:
                self.stop()
                shown = self.stderr
            self.syslog.close()
            self.notify.close()
            shown += "\n".join(self.syslog.messages())
            assert "Traceback" not in shown, shown
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def run_policyd(*arguments: str, through: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Run policyd.py with these arguments to its end, for what it does without serving; `through` another command."""
    return subprocess.run(
        [*through, sys.executable, str(ROOT / "policyd.py"), *arguments],
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )


@contextlib.contextmanager
def policyd_factory() -> Iterator[Callable[..., Policyd]]:
    """Yield a function that starts daemons; all of them are ended with the block."""
    with contextlib.ExitStack() as started:

        def start(*arguments: Any, **settings: Any) -> Policyd:
            daemon = Policyd(*arguments, **settings)
            started.callback(daemon.remove)
            return daemon.start()

        yield start


# --- Postfix ---

POSTFIX_MAIN_CF = """
compatibility_level = 3.6
config_directory = {directory}/etc
queue_directory = {directory}/queue
data_directory = {directory}/data
maillog_file = {directory}/maillog
maillog_file_prefixes = {directory}
myhostname = relay.example.org
mydestination =
mynetworks =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
# No name is ever looked up, no mail ever leaves: all of example.net is one maildir, and what is for
# later.example.net waits in the deferred queue for ever.
disable_dns_lookups = yes
smtpd_peername_lookup = no
default_transport = error:no mail leaves the tests
relay_transport = error:no mail leaves the tests
virtual_mailbox_domains = example.net, later.example.net
transport_maps = inline:{{ {{ later.example.net = later: }} }}
defer_transports = later
virtual_mailbox_base = {directory}/mail
virtual_mailbox_maps = static:inbox/
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
virtual_minimum_uid = 1
smtpd_sasl_auth_enable = yes
# Debian's Postfix looks in config_directory/sasl whatever this says, others only where it says.
cyrus_sasl_config_path = {directory}/etc/sasl
smtpd_relay_restrictions = permit_sasl_authenticated, reject_unauth_destination
"""

# Three doors, one for each way to be asked. The first is the line of the README.
POSTFIX_MASTER_CF = """
127.0.0.1:{submission_port} inet n - n - - smtpd
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
127.0.0.1:{data_port} inet n - n - - smtpd
  -o {{ smtpd_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
127.0.0.1:{socket_port} inet n - n - - smtpd
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {unix}, timeout=10s, default_action=DUNNO }} }}
pickup    unix  n - n 60 1 pickup
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
verify    unix  - - n - 1 verify
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n - - proxymap
showq     unix  n - n - - showq
error     unix  - - n - - error
retry     unix  - - n - - error
virtual   unix  - n n - - virtual
anvil     unix  - - n - 1 anvil
scache    unix  - - n - 1 scache
postlog   unix-dgram n - n - 1 postlogd
"""

SASL_SMTPD_CONF = """
pwcheck_method: auxprop
auxprop_plugin: sasldb
sasldb_path: {directory}/sasldb2
mech_list: PLAIN
"""


class Postfix:
    """A private Postfix with SASL logins that asks a policy server on `policy_port` or `policy_socket`.

    Whether one is there is up to the test.  Mail comes in at `submission_port`; at `data_port`, where
    policyd is asked at DATA too; or at `socket_port`, where it is asked over the unix socket.
    """

    logins = ("alice", "boris", "carla@example.org")
    login = logins[0]
    password = "alice's secret"

    def __init__(self) -> None:
        if os.geteuid() != 0:
            pytest.exit("only root can start Postfix: run as root, or leave it out with -m 'not postfix'", returncode=1)
        self.directory = temporary_directory()
        self.submission_port, self.data_port, self.socket_port, self.policy_port = (free_port() for _ in range(4))
        self.policy_socket = self.directory / "policy" / "socket"

    def start(self) -> None:
        """Write the configuration, start Postfix and wait until it greets."""
        self.directory.chmod(0o755)  # Postfix and its deliveries run as users of their own
        for name in ("etc", "etc/sasl", "queue", "data", "mail", "policy"):
            (self.directory / name).mkdir()
        shutil.chown(self.directory / "data", "postfix")
        shutil.chown(self.directory / "mail", "nobody", "nogroup")
        # Set-group-id: the socket policyd makes here (mode 0660) belongs to the group of smtpd.
        shutil.chown(self.directory / "policy", group="postfix")
        (self.directory / "policy").chmod(0o2755)
        self._write_configuration()
        for login in self.logins:
            self.add_login(login)
        self.launch()

    def _write_configuration(self) -> None:
        mail = (self.directory / "mail").stat()
        values = {**vars(self), "uid": mail.st_uid, "gid": mail.st_gid, "unix": f"unix:{self.policy_socket}",
                  "tcp": f"inet:127.0.0.1:{self.policy_port}"}  # fmt: skip
        files = {"main.cf": POSTFIX_MAIN_CF, "master.cf": POSTFIX_MASTER_CF, "sasl/smtpd.conf": SASL_SMTPD_CONF}
        for name, text in files.items():
            (self.directory / "etc" / name).write_text(text.format(**values))

    def launch(self) -> None:
        """Start what is configured, also again, and wait until it greets."""
        self._run("postfix", "start")
        for port in (self.submission_port, self.data_port, self.socket_port):
            wait_until(partial(self._greets, port), f"Postfix greets on port {port}")

    def add_login(self, login: str) -> None:
        """Let one more login in, with the password of all."""
        file = self.directory / "sasldb2"
        user, _, realm = login.partition("@")
        saslpasswd = program("saslpasswd2", "sasl2-bin libsasl2-modules")
        subprocess.run(
            [saslpasswd, "-p", "-c", "-f", str(file), "-u", realm or "relay.example.org", user],
            input=self.password, text=True, check=True, timeout=60,
        )
        shutil.chown(file, "postfix")

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            [program(command[0], "postfix"), "-c", str(self.directory / "etc"), *command[1:]],
            env={**os.environ, "PATH": PATH}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}\n{self.log}")
        return done.stdout

    def _greets(self, port: int) -> bool:
        with contextlib.suppress(OSError, smtplib.SMTPException), smtplib.SMTP("127.0.0.1", port, timeout=5):
            return True
        return False

    @property
    def version(self) -> str:
        return self._run("postconf", "-h", "mail_version").strip()

    @property
    def log(self) -> str:
        file = self.directory / "maillog"
        return file.read_text() if file.exists() else ""

    @contextlib.contextmanager
    def session(self, port: int | None = None, login: bool | str = True) -> Iterator[smtplib.SMTP]:
        """An SMTP session, logged in unless told otherwise: as the first login, or as the one that is named."""
        with smtplib.SMTP("127.0.0.1", port or self.submission_port, timeout=60) as session:
            session.ehlo("client.example.org")
            if login:
                session.login(login if isinstance(login, str) else self.login, self.password)
            yield session

    def queue(self) -> dict[str, str]:
        """Return the id of each queued message, with the name of the queue it is in."""
        listed = (json.loads(line) for line in self._run("postqueue", "-j").splitlines())
        return {message["queue_id"]: message["queue_name"] for message in listed}

    def queue_name(self, queue_id: str) -> str | None:
        """Return the name of the queue a message is in, or None if it is in none of them."""
        return self.queue().get(queue_id)

    def delete(self, queue_id: str) -> None:
        """Delete a queued message, or with `ALL` all of them."""
        self._run("postsuper", "-d", queue_id)

    def delivered(self) -> list[str]:
        return [file.read_text() for file in (self.directory / "mail" / "inbox" / "new").glob("*")]

    def remove(self) -> None:
        """Stop Postfix, for sure, and remove all it wrote."""
        print(self.log)  # shown if the start failed
        try:
            self.stop()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def stop(self) -> None:
        """Stop Postfix, for sure."""
        pid_file = self.directory / "queue" / "pid" / "master.pid"
        if pid_file.exists():
            master_pid = int(pid_file.read_text())
            try:
                self._run("postfix", "stop")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(master_pid, signal.SIGKILL)  # the master leads the process group of all its children
                pid_file.unlink(missing_ok=True)
            wait_until(self._is_gone, "nobody listens for postqueue any more")

    def _is_gone(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.directory / "queue" / "public" / "showq")) != 0
