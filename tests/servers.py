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

from policyd import MariaDBRepository, Settings

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

Result = subprocess.CompletedProcess[str]  # of a program
# What policyd answers, as the contract has it.
DUNNO = "DUNNO"
HOLD = "HOLD quota exceeded"
REJECT = "REJECT max quota exceeded"

PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"  # an ordinary user's lacks sbin
# Below the kernel's ephemeral range: no outgoing connection can take one of them meanwhile.
_ports = random.sample(range(10_000, 32_000), 22_000)
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


def program(name: str, package: str) -> str:
    """Return the path of a program; end the whole run, naming its Debian package, if it is missing."""
    path = shutil.which(name, path=PATH)
    if path is None:
        pytest.exit(f"{name} is missing: apt-get install {package}", returncode=1)
    return path


def temporary_directory() -> Path:
    """Return a new directory with a short name: the path of a unix socket has 107 bytes at most."""
    return Path(tempfile.mkdtemp(prefix="pd"))


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on, a different one at each call."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", _ports.pop()))
            return int(probe.getsockname()[1])


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A disk that can be full; only root has it."""
    disk = temporary_directory()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
        disk.rmdir()


def wait_until(is_true: Callable[[], Any], what: str, timeout: float = START_TIMEOUT_S) -> Any:
    """Ask until the answer is true and return it; fail, saying what was awaited, after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (answer := is_true()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what}")
        time.sleep(0.01)
    return answer


def executable(path: Path, text: str) -> Path:
    """Write a program, and return its path."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_settings(path: Path, *lines: str, **values: object) -> Path:
    """Write a settings file: a line for each value, for each entry of a list, and these lines; return its path."""
    entries = {key: value if isinstance(value, (list, tuple)) else [value] for key, value in values.items()}
    text = [*(f"{key}={entry}" for key in entries for entry in entries[key]), *lines]
    path.write_text("".join(f"{line}\n" for line in text))
    return path


def read_settings(*lines: str, **values: object) -> Settings:
    """Read settings from a file, as the daemon does."""
    with tempfile.TemporaryDirectory() as directory:
        return Settings.from_file(str(write_settings(Path(directory) / "policyd.cfg", *lines, **values)))


def run(*command: object, env: dict[str, str] | None = None, **how: Any) -> Result:
    """Run a command to its end, and return what came of it; `env` is added to our environment."""
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, **how}
    return subprocess.run([*map(str, command)], env={**os.environ, "PATH": PATH, **(env or {})}, text=True, **how)


def end(process: subprocess.Popen[Any]) -> int:
    """End a child: politely, and for sure.  Returns its exit status, negative for a signal."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)  # a frozen one would not hear the next signal
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


class Server:
    """A child with a directory of its own."""

    def __init__(self) -> None:
        self.directory = temporary_directory()
        self.process: Any = None  # that runs, or ran last

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def _spawn(self, command: Sequence[str], output: Any = subprocess.DEVNULL, **environment: str) -> None:
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=self.directory, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output,
        )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Let it end in good order, if it was started; return the exit status."""
        return end(self.process) if self.process else 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Let it hang: its port accepts, nobody answers."""
        self.signal(signal.SIGSTOP)
        wait_until(self._is_frozen, "each thread of the server has stopped")

    def _is_frozen(self) -> bool:
        with contextlib.suppress(OSError):  # a thread has just ended
            states = [status.read_text() for status in Path(f"/proc/{self.pid}/task").glob("*/status")]
            return all(re.search(r"^State:\s+T", state, re.MULTILINE) for state in states)
        return False

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def remove(self) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


class Inbox:
    """A unix datagram socket that is read all the time: what syslogd and systemd are to a daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._messages: list[str] = []
        self._lock = threading.Lock()  # guards them
        self._is_reading = threading.Event()
        self._is_reading.set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while self._is_reading.wait() and self._socket.recv(1, socket.MSG_PEEK):
            self.messages()

    def messages(self) -> list[str]:
        """Return every message sent so far, also what the thread has not taken yet."""
        with self._lock:
            with contextlib.suppress(OSError):  # nothing more is there
                while self._is_reading.is_set() and (datagram := self._socket.recv(65536, socket.MSG_DONTWAIT)):
                    self._messages.append(datagram.decode("utf-8", "backslashreplace").rstrip("\0"))
            return list(self._messages)

    def wait_for(self, needle: str | re.Pattern[str], timeout: float = 10, count: int = 1) -> str:
        """Return the `count`th message that holds `needle`, a text or a pattern; fail if it does not come in time."""
        pattern = needle if isinstance(needle, re.Pattern) else re.compile(re.escape(needle))

        def found() -> list[str]:
            return [message for message in self.messages() if pattern.search(message)][count - 1 :]

        return str(wait_until(found, pattern.pattern, timeout)[0])

    def pause(self) -> None:
        self._is_reading.clear()

    def resume(self) -> None:
        self._is_reading.set()

    def close(self) -> None:
        """Take what is left and end the thread, also again.  The messages stay readable."""
        self.resume()
        self.messages()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self._thread.join(STOP_TIMEOUT_S)
        self._socket.close()


class MariaDB(Server):
    """A private mariadbd in a temporary directory; or the mariadbd or mysqld that POLICYD_TEST_SERVER names."""

    host = "127.0.0.1"
    user = "policyd"
    password = "p#a\"s's\\w%rd"  # all that a settings file, a shell or SQL could stumble over
    is_any = True  # or always a MariaDB

    def __init__(self, buffer_pool: str = "32M") -> None:
        super().__init__()
        self._buffer_pool = buffer_pool
        named = os.environ.get("POLICYD_TEST_SERVER") if self.is_any else ""
        self._server = named or program("mariadbd", "mariadb-server")
        self.is_mysql = "MariaDB" not in run(self._server, "--no-defaults", "--version").stdout
        self.port = free_port()
        self.socket = str(self.directory / "socket")
        self._log = self.directory / "log.err"
        self._as_user = ["--user=root"] if os.geteuid() == 0 else []
        self._names = itertools.count(1)

    def install(self) -> None:
        """Create the system tables, with a root that needs no password on our socket, and our user."""
        command = [self._server, "--no-defaults", "--initialize-insecure"]
        if not self.is_mysql:
            beside = Path(self._server).with_name("mariadb-install-db")
            command = [str(beside) if beside.exists() else program("mariadb-install-db", "mariadb-server"),
                       "--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db",
                       "--skip-name-resolve", f"--tmpdir={self.directory}"]  # fmt: skip
        done = run(*command, *self._as_user, f"--datadir={self.directory / 'data'}")
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

    def repository(self, **changes: object) -> MariaDBRepository:
        """Return policyd's way to it, as another daemon would have it."""
        repository = MariaDBRepository(read_settings(**self.settings(**changes)))
        repository.resolve()
        return repository

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """Lend a cursor of a session of root's that stays open, for transactions and locks."""
        with contextlib.closing(self.server.connect(self.name)) as connection, connection.cursor() as cursor:
            yield cursor

    @contextlib.contextmanager
    def table_locked(self) -> Iterator[None]:
        with self.session() as cursor:
            cursor.execute("LOCK TABLES events WRITE")
            yield

    @contextlib.contextmanager
    def variable(self, name: str, value: object) -> Iterator[None]:
        """Set a global variable of the server; new sessions take it over."""
        before = self.query(f"SELECT @@GLOBAL.{name}")[0][0]
        self.query(f"SET GLOBAL {name} = %s", (value,))
        try:
            yield
        finally:
            self.server.ensure_running()
            self.query(f"SET GLOBAL {name} = %s", (before,))

    def sessions(self) -> list[tuple[int, str | None, int]]:
        """Return id, statement and milliseconds at work of policyd's connections to the database."""
        at_work = "time * 1000" if self.server.is_mysql else "time_ms"
        return self.query(
            f"SELECT id, info, {at_work} FROM information_schema.processlist WHERE db = %s AND user = %s",
            (self.name, self.server.user),
        )

    def settings(self, **changes: object) -> dict[str, Any]:
        """Return the settings that lead to it, some of them changed."""
        server = self.server
        return {"dbhost": server.host, "dbport": server.port, "dbuser": server.user, "dbpass": server.password,
                "dbname": self.name, **changes}  # fmt: skip


FACILITIES = ["kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"]
LEVELS = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"]
SYSLOG_DATAGRAM = re.compile(r"<(\d+)>\w{3} [ \d]\d \d\d:\d\d:\d\d ([^\[:]+)\[(\d+)\]: (.*)", re.DOTALL)

# A /dev for the daemon alone, in which /dev/log is ours: libc's syslog() knows no other place.
# Each step replaces the process by the next, so that the pid is the daemon's from the first one on.
IN_PRIVATE_DEV = """
dev=$1; shift
for name in null zero random urandom; do
  : >>"$dev/$name" && mount --bind "/dev/$name" "$dev/$name" || exit
done
ln -sfn /proc/self/fd "$dev/fd"
mount --rbind "$dev" /dev || exit
exec "$@"
"""

numbers = itertools.count(1)


class LogLine(NamedTuple):
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
    number = next(numbers)
    request = {
        "request": "smtpd_access_policy", "protocol_state": "END-OF-MESSAGE", "protocol_name": "ESMTP",
        "client_address": "192.0.2.1", "sender": "alice@example.org", "recipient_count": 1,
        "queue_id": f"4Xk{number:X}", "instance": f"{os.getpid():x}.{number:x}.0",
        "sasl_method": "PLAIN", "sasl_username": "alice", **attributes,
    }  # fmt: skip
    return "".join(f"{name}={value}\n" for name, value in request.items()).encode() + b"\n"


class Connection(socket.socket):
    """A connection to policyd, at a Unix socket's path, or at a host and port and perhaps from an address of ours."""

    def __init__(self, where: Any, source: str = "") -> None:
        families = {str: socket.AF_UNIX, tuple: socket.AF_INET6 if ":" in where[0] else socket.AF_INET}
        super().__init__(families[type(where)])
        self.settimeout(START_TIMEOUT_S)
        if source:
            self.bind((source, 0))
        self.connect(where)

    def answer(self) -> str:
        """Read one answer and return what stands behind `action=`; EOFError if the server hung up."""
        answer = b""
        while not answer.endswith(b"\n\n"):
            received = self.recv(1)  # never a byte of the next answer
            if not received:
                raise EOFError(f"policyd hung up after {answer!r}")
            answer += received
        assert answer.startswith(b"action="), answer
        return answer[len(b"action=") : -2].decode("ascii")

    def ask(self, **attributes: object) -> str:
        """Send one request and return its answer."""
        self.sendall(request_bytes(**attributes))
        return self.answer()

    def rest(self) -> bytes:
        """Read until the server hangs up."""
        answers = b""
        with contextlib.suppress(ConnectionResetError):  # it hung up before it had read all we sent
            while received := self.recv(65536):
                answers += received
        return answers


def own_mounts(dev: Path, *options: str, mounts: str = "") -> list[str]:
    """Return the words before a command that is to have mounts of its own: `dev` is its /dev."""
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    shell = ["sh", "-c", f"{mounts}\n{IN_PRIVATE_DEV}", "sh", str(dev)]
    return [program("unshare", "util-linux"), "--mount", *as_root, *options, *shell]


class Policyd(Server):
    """The daemon of this repository, as a child process that takes us for syslogd and systemd.

    `settings` become the settings file, one line each, a list one line per entry.  Unless they say otherwise it listens
    on a free port of 127.0.0.1 and keeps its files in its directory.  `environment` is added to our own.  `mounts` are
    commands for a shell that sees the world as the daemon does, before it starts; what they mount nobody else sees.
    """

    def __init__(self, environment: dict[str, str] | None = None, mounts: str = "", **settings: Any) -> None:
        super().__init__()
        self.port = free_port()
        self.settings_file = self.directory / "policyd.cfg"
        self.write_settings(**settings)
        self.environment = environment or {}
        self.mounts = mounts
        self.syslog, self.notify = Inbox(self.directory / "syslog"), Inbox(self.directory / "notify")
        self._connection: Connection | None = None
        self.dev = self.directory / "dev"
        self.dev.mkdir()
        (self.dev / "log").symlink_to(self.syslog.path)

    def write_settings(self, **settings: Any) -> None:
        """Write the settings file, also while the daemon runs; what is not named stays out of it."""
        self.bind = str(settings.get("bind", "127.0.0.1"))
        self.port = int(settings.setdefault("port", self.port))
        self.statedir = Path(settings.setdefault("statedir", self.directory / "state"))
        self.statedir.mkdir(exist_ok=True)
        write_settings(self.settings_file, **settings).chmod(0o640)

    def start(self) -> Policyd:
        """Start the daemon, also again, and wait until it says that it is ready."""
        self.hang_up()
        before = self._readies()
        with (self.directory / "stderr").open("ab") as stderr:
            daemon = [sys.executable, str(ROOT / "policyd.py"), "-c", str(self.settings_file)]
            systemd = {"STATE_DIRECTORY": str(self.statedir), "NOTIFY_SOCKET": str(self.notify.path)}
            self._spawn([*own_mounts(self.dev, mounts=self.mounts), *daemon], stderr, **systemd, **self.environment)
        wait_until(lambda: self.process.poll() is not None or self._readies() > before, "policyd is ready")
        if self.process.poll() is not None:
            raise RuntimeError(f"policyd ended with {self.process.returncode} before it was ready: {self.stderr}")
        return self

    def _readies(self) -> int:
        """Return how often it has been ready: reloads tell it, too."""
        return sum("READY=1" in message for message in self.notify.messages())

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr").read_text(errors="backslashreplace")

    def connect(self, source: str = "") -> Connection:
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)
        return Connection(address if address.startswith("/") else (address, self.port), source)

    def ask(self, **attributes: object) -> str:
        """Send one request on our own connection and return the answer, without `action=`."""
        if self._connection is None:
            self._connection = self.connect()
        return self._connection.ask(**attributes)

    def hang_up(self) -> None:
        """Close the connection `ask` uses; the next `ask` opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def log_lines(self) -> list[LogLine]:
        return [LogLine.parse(message) for message in self.syslog.messages()]

    def wait_for_log(self, needle: str | re.Pattern[str], timeout: float = 10, count: int = 1) -> LogLine:
        return LogLine.parse(self.syslog.wait_for(needle, timeout, count))

    def lines_so_far(self) -> list[LogLine]:
        """Return every line logged before this call: that of a message of our own, sent now, comes behind them."""
        login = f"mark{next(numbers)}"
        self.ask(sasl_username=login)
        self.wait_for_log(f"Updating db: {login}/")
        return [line for line in self.log_lines() if not re.search(r"\bmark\d+/|\bmark\d+ ", line.text)]

    def remove(self) -> None:
        """Stop the daemon, remove its files; no traceback may ever have been shown."""
        self.hang_up()
        self.stop()
        self.syslog.close()
        self.notify.close()
        shown = self.stderr + "\n".join(self.syslog.messages())
        super().remove()
        assert "Traceback" not in shown, shown


Start = Callable[..., Policyd]  # of the fixture `policyd`


def run_policyd(*arguments: object, through: Sequence[str] = (), **environment: str) -> Result:
    """Run policyd.py with these arguments to its end, for what it does without serving; `through` another command."""
    return run(*through, sys.executable, ROOT / "policyd.py", *arguments, env=environment)


@contextlib.contextmanager
def policyd_factory() -> Iterator[Start]:
    """Yield a function that starts daemons; all of them are ended with the block."""
    with contextlib.ExitStack() as started:

        def start(**settings: Any) -> Policyd:
            daemon: Policyd = started.enter_context(Policyd(**settings))
            started.callback(lambda: print(*daemon.syslog.messages(), sep="\n"))  # pytest does if the test failed
            return daemon.start()

        yield start


MAIN_CF = """
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
inet_protocols = all
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
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
virtual_minimum_uid = 1
smtpd_sasl_auth_enable = yes
# Debian's Postfix looks in config_directory/sasl whatever this says, others only where it says.
cyrus_sasl_config_path = {directory}/etc/sasl
smtpd_relay_restrictions = permit_sasl_authenticated, reject_unauth_destination
"""

# A door for each way to be asked. The first is the line of the README; one hands all mail to a filter before it is
# queued: another smtpd, as it stands behind many a content filter; the last believes its clients where they come from,
# as on a host that has IPv6 only.
MASTER_CF = """
127.0.0.1:{submission_port} inet n - n - - smtpd
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
127.0.0.1:{data_port} inet n - n - - smtpd
  -o {{ smtpd_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
127.0.0.1:{socket_port} inet n - n - - smtpd
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {unix}, timeout=10s, default_action=DUNNO }} }}
127.0.0.1:{proxied_port} inet n - n - - smtpd
  -o smtpd_proxy_filter=127.0.0.1:{filter_port}
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ {tcp}, timeout=10s, default_action=DUNNO }} }}
127.0.0.1:{filter_port} inet n - n - - smtpd
  -o smtpd_sasl_auth_enable=no
  -o mynetworks=127.0.0.1 -o {{ smtpd_relay_restrictions = permit_mynetworks, reject }}
[::1]:{ipv6_port} inet n - n - - smtpd
  -o inet_protocols=ipv6 -o inet_interfaces=all
  -o smtpd_authorized_xclient_hosts=[::1]
  -o {{ smtpd_end_of_data_restrictions = check_policy_service {{ inet:[::1]:{policy_port}, timeout=10s }} }}
pickup    unix  n - n 60 1 pickup
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n - - proxymap
showq     unix  n - n - - showq
error     unix  - - n - - error
retry     unix  - - n - - error
virtual   unix  - n n - - virtual
anvil     unix  - - n - 1 anvil
postlog   unix-dgram n - n - 1 postlogd
"""

SASL = """
pwcheck_method: auxprop
auxprop_plugin: sasldb
sasldb_path: {directory}/sasldb2
mech_list: PLAIN
"""


class Postfix(Server):
    """A private Postfix with SASL logins that asks a policy server on `policy_port` or `policy_socket`.

    Mail comes in at `submission_port`; at `data_port`, where policyd is asked at DATA too; at `socket_port`, where it
    is asked over the unix socket; at `proxied_port`, before smtpd_proxy_filter; or over IPv6 at `ipv6_port`.
    """

    logins = ("alice", "boris", "carla@example.org")
    login = logins[0]
    password = "alice's secret"

    def __init__(self) -> None:
        if os.geteuid() != 0:
            pytest.exit("only root can start Postfix: run as root, or leave it out with -m 'not postfix'", returncode=1)
        super().__init__()
        self.submission_port, self.data_port, self.socket_port, self.policy_port = (free_port() for _ in range(4))
        self.proxied_port, self.filter_port, self.ipv6_port = (free_port() for _ in range(3))
        self.policy_socket = self.directory / "policy" / "socket"
        self.tcp, self.unix = f"inet:127.0.0.1:{self.policy_port}", f"unix:{self.policy_socket}"

    def start(self) -> None:
        self.directory.chmod(0o755)  # Postfix and its deliveries run as users of their own
        for name in ("etc", "etc/sasl", "queue", "data", "mail", "policy"):
            (self.directory / name).mkdir()
        shutil.chown(self.directory / "data", "postfix")
        shutil.chown(self.directory / "mail", 65534, 65534)  # nobody's
        # Set-group-id: the socket policyd makes here (mode 0660) belongs to the group of smtpd.
        shutil.chown(self.directory / "policy", group="postfix")
        (self.directory / "policy").chmod(0o2755)
        for name, text in {"main.cf": MAIN_CF, "master.cf": MASTER_CF, "sasl/smtpd.conf": SASL}.items():
            (self.directory / "etc" / name).write_text(text.format(**vars(self)))
        for login in self.logins:
            user, _, realm = login.partition("@")
            command = [program("saslpasswd2", "sasl2-bin libsasl2-modules"), "-p", "-c", "-u",
                       realm or "relay.example.org", "-f", str(self.directory / "sasldb2"), user]  # fmt: skip
            run(*command, stdin=None, input=self.password, check=True)
        shutil.chown(self.directory / "sasldb2", "postfix")
        self.launch()

    def launch(self) -> None:
        self._run("postfix", "start")
        for port in (self.submission_port, self.data_port, self.socket_port):
            wait_until(partial(self._greets, port), f"Postfix greets on port {port}")

    def _run(self, *command: str) -> str:
        done = run(program(command[0], "postfix"), "-c", str(self.directory / "etc"), *command[1:])
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
            session.command_encoding = "utf-8"
            if login:
                session.login(login if isinstance(login, str) else self.login, self.password)
            yield session

    def queue(self) -> dict[str, str]:
        """Return the id of each queued message, with the name of the queue it is in."""
        listed = (json.loads(line) for line in self._run("postqueue", "-j").splitlines())
        return {message["queue_id"]: message["queue_name"] for message in listed}

    def delete(self, queue_id: str) -> None:
        """Delete a queued message, or with `ALL` all of them."""
        self._run("postsuper", "-d", queue_id)

    def delivered(self) -> list[str]:
        return [file.read_text() for file in (self.directory / "mail" / "inbox" / "new").glob("*")]

    def stop(self) -> int:
        print(self.log)  # shown if a test failed
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
        return 0

    def _is_gone(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.directory / "queue" / "public" / "showq")) != 0
