"""What lies between policyd and its database: TLS, and a read/write splitter before a replica that lags."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from asking import BACK_S, BEGINS, end_of_outage, errors
from scripting import run as run_admin
from servers import DUNNO, HOLD, REJECT, ROOT, SCHEMA, Database, MariaDB, Start, program, read_settings, run, wait_until
from stores import Door, DoorHandler, count, event, soon, sums

from policyd import RepositoryUnavailable, SettingsError

pytestmark = pytest.mark.mariadb  # servers of their own
HERE = "DNS:db.example.org, IP:127.0.0.1"
ANNA = event("anna")
NOBODY_KNOWN = "unable to get local issuer certificate"
WARNING = "the server does not show what it has just stored: send policyd to the primary"
FOR_EVER = 24 * 3600  # more than any test takes: the replica never catches up by itself


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with certificates of every kind, NAME.pem and NAME.key, made by ca.pem or other-ca.pem."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        done = run(program("openssl", "openssl"), *arguments, cwd=directory)
        assert done.returncode == 0, done.stderr

    def request(name: str, *options: str) -> None:
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key",
                "-subj", f"/CN={name}", *options)  # fmt: skip

    for name in ("ca", "other-ca"):
        request(name, "-x509", "-days", "2", "-out", f"{name}.pem")
    for ca, name, names, days in (
        ("ca", "server", HERE, "2"), ("ca", "expired", HERE, "0"), ("other-ca", "stranger", HERE, "2"),
        ("ca", "elsewhere", "DNS:db2.example.org", "2"), ("ca", "relay", "DNS:relay.example.org", "2"),
    ):  # fmt: skip
        request(name, "-out", "request", "-addext", f"subjectAltName={names}")
        openssl("x509", "-req", "-in", "request", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
                "-copy_extensions", "copy", "-days", days, "-out", f"{name}.pem")  # fmt: skip
    openssl("pkey", "-in", "relay.key", "-out", "locked.key", "-aes256", "-passout", "pass:secret")
    return directory


class TlsServer(MariaDB):
    """One that speaks TLS; `certificates` is where its are.  MySQL presents nothing that has expired."""

    is_any = False
    certificates: Path

    def launch(self, *options: str) -> None:
        self.present("server")
        tls = [f"--ssl-{option}={self.directory / option}" for option in ("cert", "key")]
        super().launch(f"--ssl-ca={self.certificates / 'ca.pem'}", *tls, *options)

    def present(self, name: str) -> None:
        """Show this certificate to those who come from now on."""
        shutil.copy(self.certificates / f"{name}.pem", self.directory / "cert")
        shutil.copy(self.certificates / f"{name}.key", self.directory / "key")
        if self.process:
            self.query("FLUSH SSL")


@pytest.fixture(scope="module")
def server(certificates: Path) -> Iterator[TlsServer]:
    with TlsServer() as new:
        new.certificates = certificates
        new.install()
        yield new


@pytest.fixture
def database(server: TlsServer) -> Iterator[Database]:
    """A fresh database of that server, which presents its ordinary certificate."""
    new = server.new_database(SCHEMA)
    server.present("server")
    yield new
    server.drop_database(new.name)


@pytest.fixture
def tls(certificates: Path) -> Callable[..., dict[str, str]]:
    """A function that returns dbssl_... settings, with files of `certificates`: ca.pem unless told otherwise."""

    def settings(name: str = "", **files: str) -> dict[str, str]:
        paths = {f"dbssl_{key}": str(certificates / file) for key, file in {"ca": "ca.pem", **files}.items() if file}
        return {**paths, "dbssl_name": name} if name else paths

    return settings


class TapHandler(DoorHandler):
    """Hears all that clients say; may hide that the server offers TLS."""

    hides_tls = False
    heard: list[bytes]

    def pump(self, source: Any, target: Any) -> None:
        if source is self.request:
            while received := source.recv(65536):
                self.heard.append(received)
                target.sendall(received)
        elif self.hides_tls:
            greeting = bytearray(source.recv(65536))
            greeting[greeting.index(0, 5) + 15] &= ~0x08  # behind version, thread, salt: CLIENT_SSL of what it can do
            target.sendall(greeting)
        super().pump(source, target)


@pytest.fixture
def tap(database: Database) -> Iterator[Door]:
    with Door(database.server, type("NewTapHandler", (TapHandler,), {"heard": []})) as door:
        yield door


def test_nothing_can_be_read_on_the_way(database: Database, tap: Door, tls: Any) -> None:
    repository = database.repository(dbport=tap.port, **tls())
    assert [count(repository, ANNA) for _ in range(3)] == [[1], [2], [3]]
    assert len(tap.passing) == 2, "one connection, two ends: it is used again with TLS, too"
    heard = b"".join(tap.RequestHandlerClass.heard)
    assert len(heard) > 1000
    assert not re.search(b"anna|INSERT|" + database.server.user.encode(), heard)
    assert count(database.repository(), ANNA) == [4], "who does not ask for it is served, too"


@pytest.mark.parametrize(("presented", "name", "reason"), [
    ("server", "db.example.org", ""), ("elsewhere", "db2.example.org", ""), ("elsewhere", "none", ""),
    ("elsewhere", "", "certificate is not valid for '127.0.0.1'"),
    ("stranger", "", NOBODY_KNOWN), ("stranger", "none", NOBODY_KNOWN),
])  # fmt: skip
def test_the_server_may_have_another_name_and_no_other_authority(
    server: TlsServer, database: Database, tls: Any, presented: str, name: str, reason: str
) -> None:
    server.present(presented)
    refused = pytest.raises(RepositoryUnavailable, match=reason) if reason else contextlib.nullcontext()
    with refused:
        assert count(database.repository(**tls(name)), ANNA) == [1]


def test_a_unix_socket_may_lead_to_the_server_and_needs_none_of_it(
    server: TlsServer, database: Database, tls: Any
) -> None:
    user = f"'{server.user}'@'localhost'"
    server.query(f"CREATE USER {user} IDENTIFIED BY %s", (server.password,))
    server.query(f"GRANT SELECT, INSERT, UPDATE ON {database.name}.events TO {user}")
    server.present("stranger")
    servers = f"127.0.0.1:1, {server.socket}"
    repository = database.repository(dbhost=servers, **tls(cert="relay.pem", key="relay.key"))
    assert count(repository, ANNA) == [1]
    assert repository.ask("SHOW SESSION STATUS LIKE 'Ssl_cipher'", {}, soon()) == [("Ssl_cipher", "")]


def test_root_asks_as_the_daemons_user_whom_the_server_knows_by_its_unix_socket(
    server: TlsServer, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = pwd.getpwuid(os.geteuid() or 65534)  # who stands here for policyd, which this machine may not have
    monkeypatch.setattr(pwd, "getpwnam", lambda name: {"policyd": user}[name])
    server.directory.chmod(0o711)
    who = f"'{user.pw_name}'@'localhost'"
    server.query(f"CREATE USER {who} IDENTIFIED VIA unix_socket")
    server.query(f"GRANT SELECT ON {database.name}.events TO {who}")
    settings = f"dbhost={server.socket}\ndbname={database.name}\ndbuser={user.pw_name}\nblacklist=anna\n"
    (file := tmp_path / "cfg").write_text(settings)
    assert {run_admin(*each, "-c", file).returncode for each in (["top"], ["whatif", "5"], ["user", "anna"])} == {0}


def test_the_server_may_ask_for_a_certificate_and_the_next_connection_reads_renewed_files(
    server: TlsServer, database: Database, tls: Any, certificates: Path, tmp_path: Path
) -> None:
    server.query("CREATE USER 'relay'@'127.0.0.1' REQUIRE SUBJECT '/CN=relay'")
    server.query(f"GRANT SELECT, INSERT, UPDATE ON {database.name}.events TO 'relay'@'127.0.0.1'")
    relay = {"dbuser": "relay", "dbpass": ""}
    with pytest.raises(RepositoryUnavailable, match="1045"):
        count(database.repository(**relay, **tls()), ANNA)
    for key, name in {"ca": "other-ca.pem", "cert": "server.pem", "key": "server.key"}.items():
        shutil.copy(certificates / name, tmp_path / key)
        relay[f"dbssl_{key}"] = str(tmp_path / key)
    repository = database.repository(**relay)
    for refused, key, name in (
        ("CERTIFICATE_VERIFY_FAILED", "ca", "ca.pem"), ("1045", "cert", "relay.pem"),
        ("dbssl_cert=", "key", "relay.key"),
    ):  # fmt: skip
        with pytest.raises(RepositoryUnavailable, match=refused):
            count(repository, ANNA)
        shutil.copy(certificates / name, tmp_path / key)
    assert count(repository, ANNA) == [1]
    (tmp_path / "ca").unlink()
    assert count(repository, ANNA) == [2], "this connection is there already"


@pytest.mark.parametrize("name", ["", "none"])
def test_a_server_that_seems_to_have_no_tls_is_told_nothing(database: Database, tap: Door, tls: Any, name: str) -> None:
    tap.RequestHandlerClass.hides_tls = True
    with pytest.raises(RepositoryUnavailable, match="offers no TLS, which dbssl_ca= asks for"):
        count(database.repository(dbport=tap.port, **tls(name)), ANNA)
    assert tap.RequestHandlerClass.heard == []


def test_an_expired_certificate_is_an_outage(server: TlsServer, database: Database, tls: Any, policyd: Any) -> None:
    server.present("expired")
    daemon = policyd(**database.settings(**tls()), defaultquota=3)
    assert [daemon.ask(sasl_username="anna") for _ in range(3)] == [DUNNO, DUNNO, HOLD]
    [line] = errors(daemon)
    assert re.match(f"{BEGINS}127.0.0.1: .*certificate has expired", line.text)
    server.present("server")
    end_of_outage(daemon)
    assert database.query("SELECT SUM(recipient_count) FROM events") == [(3,)]


@pytest.mark.parametrize(("key", "names"), [
    ("ca", {"ca": "nowhere.pem"}), ("ca", {"ca": "."}), ("ca", {"ca": "ca.key"}),
    ("cert", {"cert": "nowhere.pem", "key": "relay.key"}), ("cert", {"cert": "relay.key", "key": "relay.key"}),
    ("key", {"cert": "relay.pem", "key": "nowhere.key"}), ("key", {"key": "relay.key"}),
    ("cert", {"cert": "relay.pem", "key": "server.key"}), ("cert", {"cert": "relay.pem", "key": "relay.pem"}),
])  # fmt: skip
def test_what_cannot_be_used_is_a_mistake_in_its_line(tls: Any, key: str, names: dict[str, str]) -> None:
    settings = {"dbname": "policyd", "dbuser": "policyd", **tls(**names)}
    with pytest.raises(SettingsError, match=rf":{[*settings].index(f'dbssl_{key}') + 1}: dbssl_{key}="):
        read_settings(**settings)


def test_nobody_is_asked_for_a_password_and_unreadable_is_a_mistake(certificates: Path, tmp_path: Path) -> None:
    """Not even at a terminal, which script(1) is here: nobody sits there when a daemon starts."""
    file, unreadable = tmp_path / "policyd.cfg", tmp_path / "ca.pem"
    unreadable.touch(0o000)
    like_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    locked = f"dbssl_cert={certificates}/relay.pem\ndbssl_key={certificates}/locked.key"
    for lines, said in ((locked, ":4: dbssl_cert=.*"), ("", f":3: dbssl_ca={unreadable}: give a file.*")):
        ca = certificates / "ca.pem" if lines else unreadable
        file.write_text(f"dbname=policyd\ndbuser=policyd\ndbssl_ca={ca}\n{lines}\n")
        arguments = [*like_others, sys.executable, str(ROOT / "policyd.py"), "--check-settings", "-c", str(file)]
        shown = run(program("script", "bsdutils"), "-qec", shlex.join(arguments), "/dev/null")
        assert shown.returncode == 78
        assert re.fullmatch(f"policyd: {file}{said}\r?\n", shown.stdout), shown.stdout


class Node(MariaDB):
    """One that others may follow: MySQL has other words for it.  Without TLS: the splitter reads what is said."""

    is_any = False

    def launch(self, *options: str) -> None:
        super().launch(f"--server-id={self.port}", "--log-bin=binlog", "--skip-ssl", *options)

    def follow(self, primary: MariaDB) -> None:
        """Do what the primary does from now on, long after it."""
        primary.query("GRANT REPLICATION SLAVE ON *.* TO 'replica'@'127.0.0.1' IDENTIFIED BY 'secret'")
        self.query(
            "CHANGE MASTER TO MASTER_HOST = %s, MASTER_PORT = %s, MASTER_USER = 'replica', MASTER_PASSWORD = 'secret',"
            " MASTER_LOG_FILE = %s, MASTER_LOG_POS = %s, MASTER_SSL = 0, MASTER_SSL_VERIFY_SERVER_CERT = 0,"
            " MASTER_DELAY = %s",
            (primary.host, primary.port, *primary.query("SHOW MASTER STATUS")[0][:2], FOR_EVER),
        )
        self.query("START SLAVE")


class SplitterHandler(DoorHandler):
    """Sends what reads to the replica and all else to the primary, as MaxScale, ProxySQL or MySQL Router can do."""

    replica: Node

    def handle(self) -> None:
        import pymysql

        reader = pymysql.connect(host=self.replica.host, port=self.replica.port, user=self.replica.user,
                                 password=self.replica.password, database="policyd1", charset="utf8mb4",
                                 ssl_disabled=True)  # fmt: skip
        with reader, socket.create_connection(self.server.target) as writer:
            self.server.passing += [self.request, writer, reader._sock]
            for source in (writer, reader._sock):  # one at a time answers
                threading.Thread(target=self.pump, args=(source, self.request), daemon=True).start()
            while header := self.request.recv(4, socket.MSG_WAITALL):
                said = self.request.recv(int.from_bytes(header[:3], "little"), socket.MSG_WAITALL)
                is_read = header[3] == 0 and re.match(rb"\x03[\s(]*SELECT\b", said)  # the first packet: COM_QUERY
                (reader._sock if is_read else writer).sendall(header + said)


def test_the_quota_holds_behind_a_replica_that_lags(policyd: Start) -> None:
    with Node() as primary, Node() as replica:
        SplitterHandler.replica = replica
        for each in (primary, replica):
            each.install()
        database, same = (each.new_database(SCHEMA) for each in (primary, replica))
        assert database.name == same.name == "policyd1"
        replica.follow(primary)
        splitter = Door(primary, SplitterHandler)
        daemon = policyd(**database.settings(dbport=splitter.port), defaultquota=20)
        answers = [daemon.ask(sasl_username="anna") for _ in range(60)]
        assert answers == [DUNNO] * 19 + [HOLD] * 20 + [REJECT] * 21
        assert errors(daemon)[0].text.startswith(f"{BEGINS}{WARNING}")
        for statement in ("STOP SLAVE", "CHANGE MASTER TO MASTER_DELAY = 0", "START SLAVE"):
            replica.query(statement)
        wait_until(lambda: database.query("SELECT SUM(recipient_count) FROM events") == [(60,)], "all is there", BACK_S)
        repository = database.repository(dbport=splitter.port)
        wait_until(lambda: sums(repository, [event("anna", 0)]) == [60], "the replica has caught up")
        daemon.stop()
        splitter.server_close()
