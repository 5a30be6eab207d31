"""The command line and the address: what each option does, where it listens, and one line for whatever is wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from servers import DUNNO, HOLD, ROOT, Database, Start, free_port, own_mounts, program, run, run_policyd, write_settings
from stores import MariaStore, SQLiteStore

import policyd as module


def settings_for(database: Database, path: Path, **changes: object) -> str:
    settings = {"port": free_port(), "statedir": path.parent, **database.settings(), **changes}
    return str(write_settings(path, **settings))


def where(database: Database) -> str:
    return f"table events of MariaDB database {database.name}"


def output(status: int, *arguments: object, **environment: str) -> str:
    """Run policyd, which must end with this status; return what it printed, all of it in one place."""
    done = run_policyd(*arguments, **environment)
    assert (done.returncode, bool(done.stdout and done.stderr)) == (status, False), done
    return done.stdout or done.stderr


def failed_check(settings_file: Path | str, says: str = "events cannot be counted: ") -> str:
    """Return what a --check that ends with status 1 says on its one line of stderr, behind these words."""
    done = run_policyd("-c", settings_file, "--check")
    said = re.fullmatch(rf"policyd: {re.escape(says)}(.*)\n", done.stderr)
    assert (done.returncode, bool(said)) == (1, True), done
    return said[1]


def test_version_is_said_with_the_commit_of_a_checkout(tmp_path: Path) -> None:
    shutil.copy(ROOT / "policyd.py", tmp_path)
    alone = run(sys.executable, tmp_path / "policyd.py", "--version")
    assert alone.stdout == f"policyd {module.__version__}\n"
    commit = r"\+[0-9a-f]{7}" if (ROOT / ".git").exists() and shutil.which("git") else ""
    assert re.fullmatch(rf"policyd {re.escape(module.__version__)}{commit}\n", output(0, "--version"))


def test_a_wrong_command_line_gets_one_line() -> None:
    for arguments, message in {
        "--frobnicate": "unrecognized arguments: --frobnicate", "policyd.cfg": "unrecognized arguments: policyd.cfg",
        "-c": "argument -c/--config: expected one argument",
        "--check --init-db": "argument --init-db: not allowed with argument --check",
    }.items():  # fmt: skip
        assert output(1, *arguments.split()) == f"policyd: {message}; see policyd --help\n"


def test_check_settings_looks_at_the_file_alone_and_where_pymysql_is_needed_its_package_is_named(file: Path) -> None:
    """Neither the database nor the port, statedir or PyMySQL are asked for: a reload needs only that."""
    file.with_name("pymysql.py").write_text("raise ImportError('not installed')")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file.write_text(f"port={port}\nstatedir=/nowhere\ndbhost=127.0.0.9\ndbname=x\ndbuser=x\ndefaultquota=42\n")
        said = output(0, "-c", file, "--check-settings", PYTHONPATH=str(file.parent))
    assert re.match(f"no mistake in the settings: .*quota 42.*{file}", said)
    write_settings(file, statedir=file.parent, dbname="policyd", dbuser="policyd")
    remedy = "policyd: PyMySQL is missing: apt install python3-pymysql, or remove the db... settings\n"
    for arguments in ([], ["--check"], ["--init-db"]):
        done = run_policyd("-c", file, *arguments, PYTHONPATH=str(file.parent))
        assert (done.returncode, done.stderr) == (1, remedy)


@pytest.mark.parametrize("kind", ["embedded", pytest.param("database", marks=pytest.mark.mariadb)])
def test_check_says_what_it_found(request: pytest.FixtureRequest, file: Path, kind: str) -> None:
    """And counts nothing.  Early signs without a trusted network are warned of: mail is counted all the same."""
    store, more = f"embedded store {file.parent}/events.sqlite3", ""
    if kind == "database":
        settings_for(request.getfixturevalue("database"), file)
        store = where(request.getfixturevalue("database"))
        more = ", logins of up to 255 characters, index on (sasl_username, ts)"
    (port,) = re.findall(r"^port=(\d+)", file.read_text(), re.MULTILINE)
    for line, number in (("", 0), ("early_signs=audit\nkeep_days=30\n", 1), ("trusted_network=192.0.2.0/24\n", 0)):
        file.write_text(file.read_text() + line)
        said = output(0, "-c", file, "--check")
        for part in (f"inet:127.0.0.1:{port}", "quota 1500", f"settings: {file}", store):
            assert part in said
        assert said.count("warning: early_signs is on and trusted_network= is empty") == number
        assert said.splitlines()[-1] == f"events can be counted: {store}{more}"


def test_check_names_the_remedy_for_a_table_without_index(old_database: Database, file: Path) -> None:
    """Mail would be counted, so the status is 0; but not with early signs, which need it."""
    found = (f"events can be counted: {where(old_database)}, logins of up to 8 characters,"
             " NO index on (sasl_username, ts): slow when it is large; run policyd --init-db")  # fmt: skip
    assert output(0, "-c", settings_for(old_database, file), "--check").splitlines()[-1] == found
    early = settings_for(old_database, file, early_signs="yes", keep_days=30, trusted_network="192.0.2.0/24")
    assert failed_check(early, "early_signs needs the index").endswith("run policyd --init-db")


def test_check_says_when_there_is_no_table_no_database_no_right_or_no_server(database: Database, file: Path) -> None:
    """And shows no password.  What else may be wrong with a table: test_mariadb.py."""
    name = settings_for(database, file)
    database.query(f"REVOKE INSERT ON {database.name}.* FROM '{database.server.user}'@'127.0.0.1'")
    done = run_policyd("-c", name, "--check")
    assert (done.returncode, "events cannot be counted: (1142, \"INSERT command denied" in done.stderr) == (1, True)
    database.query("DROP TABLE events")
    assert failed_check(name) == f"there is no {where(database)}; create it with policyd --init-db"
    message = failed_check(settings_for(database, file, dbname="absent"))
    assert re.match(r"127\.0\.0\.1: \((1044|1049), ", message)
    message = failed_check(settings_for(database, file, dbpass="hunter2"))
    assert message.startswith("127.0.0.1: (1045, \"Access denied for user 'policyd'@")
    assert "hunter2" not in message
    port = free_port()
    two = failed_check(settings_for(database, file, dbhost=f"127.0.0.1:{port} 127.0.0.2", dbport=port)).split("; ")
    for part, host in zip(two, ("127.0.0.1", "127.0.0.2")):
        assert re.match(rf"{host}: .*refused", part)


def test_check_says_what_else_cannot_be_used(file: Path, tmp_path: Path) -> None:
    """The program of on_stop=, the address, statedir."""
    file.write_text(f"{file.read_text()}on_stop=/nowhere/program --to 'a b'\n")
    assert failed_check(file, "on_stop=") == "/nowhere/program --to 'a b': /nowhere/program cannot be run"
    file.write_text(f"statedir={tmp_path}/absent\nbind=192.0.2.1\nport=9093\n")
    done = run_policyd("-c", file, "--check")
    assert done.returncode == 1
    address, first, second = done.stderr.splitlines()
    assert address == "policyd: cannot listen on inet:192.0.2.1:9093: Cannot assign requested address"
    assert first.startswith(f"policyd: statedir: {tmp_path}/absent/ is not there, or not policyd's to write")
    assert second.endswith(f"{tmp_path}/absent/events.sqlite3: unable to open database file")


def test_check_says_when_another_program_has_the_port(file: Path) -> None:
    """One that speaks something else, or nothing at all."""
    for answer in (b"220 mail ESMTP\r\n", b""):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            file.write_text(f"statedir={file.parent}\nport={port}\n")
            threading.Thread(target=lambda taken=taken, answer=answer: taken.accept()[0].sendall(answer)).start()
            assert failed_check(file, f"cannot listen on inet:127.0.0.1:{port}: ") == "Address already in use"


def test_ctrl_c_ends_a_check_with_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "settings")
    command = [sys.executable, str(ROOT / "policyd.py"), "-c", str(tmp_path / "settings"), "--check"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "settings", "w"):  # once it reads them, it waits for us
        process.send_signal(signal.SIGINT)
        assert (process.communicate()[1], process.returncode) == ("policyd: interrupted\n", 1)


# A machine that has a user policyd: in the eyes of what runs in it.
WITH_A_USER = """
(cat /etc/passwd; echo policyd:x:64999:64999::/:/bin/false) >"$0/passwd"
(cat /etc/group; echo policyd:x:64999:) >"$0/group"
mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/group" /etc/group || exit
exec "$@"
"""


@pytest.mark.server  # only root can be somebody else
def test_root_looks_and_makes_files_as_the_daemons_user_does(tmp_path: Path) -> None:
    """What root may read and write says nothing about that; and the daemon is to write what --init-db has made."""
    directory = Path(tempfile.mkdtemp())  # a way that is open to all
    directory.chmod(0o755)
    state, file = directory / "state", directory / "policyd.cfg"
    state.mkdir(mode=0o700)
    file.write_text(f"statedir={state}\nport={free_port()}\n")
    file.chmod(0o600)
    # Ours may lie where only root may look: Python reads parts of itself when they are needed first.
    above = Path(sys.executable).resolve().parents
    python = sys.executable if all(each.stat().st_mode & 1 for each in above) else "/usr/bin/python3"
    command = ["unshare", "--mount", "sh", "-c", WITH_A_USER, tmp_path, python, ROOT / "policyd.py"]

    def done(option: str) -> tuple[int, str]:
        done = run(*command, "-c", file, option)
        return done.returncode, done.stderr

    remedy = f"chown root:policyd {file} && chmod 0640 {file}"
    for option in ("--check", "--init-db"):
        assert done(option) == (78, f"policyd: {file}: Permission denied; try: {remedy}\n")
    os.chown(file, 0, 64999)
    file.chmod(0o640)
    status, said = done("--check")
    assert status == 1
    assert f"statedir: {state}/ is not there, or not policyd's to write" in said
    os.chown(state, 64999, 64999)
    assert done("--init-db") == done("--check") == (0, "")
    assert {path.stat().st_uid for path in [state, *state.iterdir()]} == {64999}
    shutil.rmtree(directory)


def test_init_db_creates_or_upgrades_the_table(database: Database, old_database: Database, file: Path) -> None:
    """With the right to; what comes of it is test_mariadb.py's.  Or the embedded store."""
    for _ in range(2):
        assert output(0, "-c", file, "--init-db") == f"embedded store {file.parent}/events.sqlite3 is ready\n"
    assert (file.parent / "events.sqlite3").stat().st_mode & 0o077 == 0, "who sent what is nobody else's business"
    database.query("DROP TABLE events")
    user = f"'{old_database.server.user}'@'127.0.0.1'"
    old_database.query(f"REVOKE ALTER ON {old_database.name}.* FROM {user}")
    old = settings_for(old_database, file)
    assert output(1, "-c", old, "--init-db").startswith("policyd: events cannot be counted: (1142, \"ALTER command")
    old_database.query(f"GRANT ALTER ON {old_database.name}.* TO {user}")
    upgraded = "upgraded {}: wide columns of any character, index on (sasl_username, ts)"
    for each, said in ((database, "created {}"), (old_database, upgraded)):
        for expected in (said, "{} is up to date"):
            assert output(0, "-c", settings_for(each, file), "--init-db") == expected.format(where(each)) + "\n"


def test_init_db_moves_what_the_embedded_store_has_once(policyd: Start, database: Database, tmp_path: Path) -> None:
    """With its times, incidents and what was forgiven; then the sums go on where they were.  Twice doubles nothing."""
    daemon = policyd(defaultquota=1200)
    embedded = SQLiteStore(daemon.statedir / "events.sqlite3")
    embedded.add([("alice", "a@x", "192.0.2.1", 1)] * 1100, age_s=3600)
    embedded.add([("bert", "b@x", "192.0.2.1", -7), ("carl", "", "HOLD blocked", None)], age_s=60)
    assert daemon.ask(recipient_count=99) == DUNNO
    assert daemon.stop() == 0
    before = embedded.times()
    refused = output(1, "-c", daemon.settings_file, "--init-db", "--from-embedded")
    assert refused.startswith("policyd: --from-embedded needs the db... settings")
    daemon.write_settings(defaultquota=1200, **database.settings())
    database.query("DROP TABLE events")
    for moved in (len(before), 0):
        with database.variable("max_allowed_packet", 16_384):  # which a whole slice does not fit into
            done = run_policyd("-c", daemon.settings_file, "--init-db", "--from-embedded")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"moved {moved} events" in done.stdout.splitlines()[-1]
        assert MariaStore(database).times() == before
        assert embedded.rows() == []
    daemon.start()
    assert daemon.ask() == HOLD
    assert daemon.ask(sasl_username="carl") == "HOLD blocked"


# A machine as if new: a network of its own, in which port 9093 is free, and neither settings nor files of policyd.
# There somebody starts policyd, pastes the request of the README into nc, and reads.
FRESH_MACHINE = """
unset STATE_DIRECTORY NOTIFY_SOCKET
"$0" -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1))'  # SIOCSIFFLAGS, IFF_UP
for directory in /etc/postfix /var/lib/policyd; do
    [ ! -d "$directory" ] || mount -t tmpfs -o ro tmpfs "$directory" || exit
done
"$0" "$1" 2>../stderr &
until [ -s ../stderr ]; do sleep 0.05; done
"$0" -c 'import socket
with socket.create_connection(("127.0.0.1", 9093), 20) as connection:
    connection.sendall(b"request=smtpd_access_policy\\nsasl_username=anna\\nrecipient_count=1\\n\\n")
    print(connection.recv(100))'
kill $! && wait $!
"""


def test_on_a_fresh_machine_it_runs_with_one_command(tmp_path: Path) -> None:
    """Without settings and PyMySQL, in an empty directory: it says where it listens, where all of it goes."""
    directory, dev = tmp_path / "empty", tmp_path / "dev"
    directory.mkdir()
    dev.mkdir()
    (tmp_path / "pymysql.py").write_text("raise ImportError('not installed')")
    machine = [*own_mounts(dev, "--net"), "sh", "-c", FRESH_MACHINE]
    done = run(*machine, sys.executable, ROOT / "policyd.py", cwd=directory, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (0, repr(b"action=DUNNO\n\n") + "\n", "")
    first, counted, _ = (tmp_path / "stderr").read_text().splitlines()
    assert re.match(rf"policyd\[\d+\]: policyd {re.escape(module.__version__)} on inet:127\.0\.0\.1:9093, ", first)
    for part in ("quota 1500", f"embedded store {directory}/events.sqlite3",
                 "settings: none, defaults (yours would go into /etc/postfix/policyd.cfg)"):  # fmt: skip
        assert part in first
    assert counted.endswith("]: Updating db: anna///1/1")
    assert (directory / "events.sqlite3").exists()


def refusal(directory: Path, **settings: object) -> str:
    """Return the one line with which policyd refuses to start with status 1, behind what all begin with."""
    file = write_settings(directory / "second.cfg", statedir=directory, **settings)
    (said,) = re.findall(r"\Apolicyd: cannot listen on (.*)\n\Z", output(1, "-c", file))
    return str(said)


@pytest.mark.parametrize(("bind", "where", "peer"), [
    ("", "inet:127.0.0.1:{port}", "127.0.0.1"), ("127.0.0.2", "inet:127.0.0.2:{port}", "127.0.0.1"),
    ("0.0.0.0", "inet:0.0.0.0:{port}", "127.0.0.1"), ("::1", "inet:[::1]:{port}", "::1"),
    ("::", "inet:[::]:{port}", "::1"), ("socket", "unix:{bind}", "the Unix socket"),
])  # fmt: skip
def test_it_answers_where_it_is_told_to_listen_and_no_other_can(
    policyd: Start, tmp_path: Path, bind: str, where: str, peer: str
) -> None:
    """It names that and its peers.  A check beside it asks it, finds nothing wrong, and counts nothing."""
    given = {"bind": tmp_path / bind if bind == "socket" else bind} if bind else {}
    daemon = policyd(**given)
    where = where.format(bind=daemon.bind, port=daemon.port)
    assert daemon.ask() == DUNNO
    assert f" on {where}, " in daemon.log_lines()[0].text
    with daemon.connect() as connection:
        connection.sendall(b"junk\n\n")
        assert connection.rest() == b""
    daemon.wait_for_log(f"bad request from {peer}: a line without '='; hung up")
    if not bind:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", daemon.port))
    done = run_policyd("-c", daemon.settings_file, "--check")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert refusal(tmp_path, **{"port": daemon.port, **given}) == f"{where}: Address already in use"
    assert daemon.ask() == DUNNO
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/2")


# A machine whose localhost is both, as it is on most, IPv6 first; and one name that is IPv6 alone.
HOSTS = """
printf '%s\\n' '::1 localhost' '127.0.0.1 localhost' '::1 six.example.org' >"$STATE_DIRECTORY/hosts"
mount --bind "$STATE_DIRECTORY/hosts" /etc/hosts || exit
"""


@pytest.mark.parametrize(("bind", "address"), [("localhost", "127.0.0.1"), ("six.example.org", "::1")])
def test_of_a_name_ipv4_comes_first_and_is_shown(policyd: Start, bind: str, address: str) -> None:
    """Postfix's line names 127.0.0.1: it would be refused, and mail pass uncounted.  Also in the status and --check."""
    daemon = policyd(bind=bind, mounts=HOSTS)
    daemon.bind = address
    assert daemon.ask() == DUNNO
    where = f"inet:{'[::1]' if ':' in address else address}:{daemon.port}"
    assert f" on {where}, " in daemon.log_lines()[0].text
    assert daemon.notify.messages()[0].endswith(where)
    hosts = [program("nsenter", "util-linux"), f"--target={daemon.pid}", "--mount"]
    through = hosts if os.geteuid() == 0 else [*hosts, "--user", "--preserve-credentials"]
    done = run_policyd("-c", daemon.settings_file, "--check", through=through)
    assert (done.returncode, done.stderr) == (0, "")
    assert where in done.stdout


def test_a_unix_socket_is_for_owner_and_group_and_is_replaced(policyd: Start, tmp_path: Path) -> None:
    """That of one that crashed or ended; that of a daemon that took the place of this one is left alone."""
    path = tmp_path / "socket"
    daemon = policyd(bind=path)
    assert path.stat().st_mode & 0o777 == 0o660
    daemon.kill()
    assert path.exists()
    assert daemon.start().ask() == DUNNO
    path.unlink()
    successor = policyd(bind=path)
    assert daemon.stop() == 0
    assert successor.ask() == DUNNO
    assert successor.stop() == 0
    assert daemon.start().ask() == DUNNO


@pytest.mark.parametrize(("bind", "said"), [
    ("{}/file", "unix:{bind}: Address already in use"),
    ("{}/absent/socket", "unix:{bind}: No such file or directory"),
    ("{}/" + "x" * 108, "unix:{bind}: AF_UNIX path too long"),
    ("192.0.2.1", "inet:192.0.2.1:{port}: Cannot assign requested address"),
    ("2001:db8::1", "inet:[2001:db8::1]:{port}: Cannot assign requested address"),
    ("a..b", "inet:a..b:{port}: "), ("x" * 64 + ".example.org", "inet:{bind}:{port}: "),
], ids=["a file", "no directory", "a long path", "IPv4", "IPv6", "no name", "a long name"])  # fmt: skip
def test_why_it_cannot_listen_is_said(tmp_path: Path, bind: str, said: str) -> None:
    (tmp_path / "file").write_text("precious")
    bind, port = bind.format(tmp_path), free_port()
    assert refusal(tmp_path, bind=bind, port=port).startswith(said.format(bind=bind, port=port))
    assert (tmp_path / "file").read_text() == "precious"
