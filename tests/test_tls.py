"""policyd and its database over TLS: who is trusted, what is refused, and what is seen on the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from daemons import BEGINS, end_of_outage, errors
from servers import DUNNO, HOLD, ROOT, SCHEMA, Database, MariaDB, Policyd, program, run_policyd
from stores import Door, DoorHandler, count, event, maria_repository, soon

from policyd import RepositoryUnavailable

pytestmark = pytest.mark.mariadb  # one of its own
HERE = "DNS:db.example.org, IP:127.0.0.1"
ANNA = event("anna")
AUTHORITY = """
[ca]
default_ca = {name}
[{name}]
certificate = {name}.pem
private_key = {name}.key
database = {name}.issued
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = any
copy_extensions = copy
[any]
commonName = supplied
"""


# --- certificates, a server that has one, and a way there on which somebody listens ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with certificates of every kind, NAME.pem and NAME.key, made by ca.pem or other-ca.pem."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        done = subprocess.run([program("openssl", "openssl"), *arguments], cwd=directory, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert done.returncode == 0, done.stderr

    def request(name: str, *options: str) -> None:
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key",
                "-subj", f"/CN={name}", *options)  # fmt: skip

    for name in ("ca", "other-ca"):
        request(name, "-x509", "-days", "2", "-out", f"{name}.pem")
        (directory / f"{name}.cnf").write_text(AUTHORITY.format(name=name))
        (directory / f"{name}.issued").touch()
    for ca, name, names, until in (
        ("ca", "server", HERE, 2049),
        ("ca", "expired", HERE, 2021),
        ("ca", "elsewhere", "DNS:db2.example.org", 2049),
        ("other-ca", "stranger", HERE, 2049),
        ("ca", "relay", "DNS:relay.example.org", 2049),
    ):
        request(name, "-out", "request", "-addext", f"subjectAltName={names}")
        openssl("ca", "-config", f"{ca}.cnf", "-batch", "-notext", "-in", "request", "-out", f"{name}.pem",
                "-startdate", "20200101000000Z", "-enddate", f"{until}0101000000Z")  # fmt: skip
    openssl("pkey", "-in", "relay.key", "-out", "locked.key", "-aes256", "-passout", "pass:secret")
    return directory


class TlsServer(MariaDB):
    """A MariaDB that speaks TLS; `certificates` is where its are."""

    certificates: Path

    def launch(self, *options: str) -> None:
        """Start the server."""
        self._take("server")
        tls = [f"--ssl-{key}={self.directory / f'server.{key}'}" for key in ("cert", "key")]
        super().launch(f"--ssl-ca={self.certificates / 'ca.pem'}", *tls, *options)

    def _take(self, name: str) -> None:
        shutil.copy(self.certificates / f"{name}.pem", self.directory / "server.cert")
        shutil.copy(self.certificates / f"{name}.key", self.directory / "server.key")

    def present(self, name: str) -> None:
        """Show this certificate to those who come from now on."""
        self._take(name)
        self.query("FLUSH SSL")

    def require(self, what: str) -> None:
        """Ask policyd's user for a certificate, SUBJECT '/CN=...', or for NONE."""
        self.query(f"ALTER USER '{self.user}'@'127.0.0.1' REQUIRE {what}")


@pytest.fixture(scope="module")
def server(certificates: Path) -> Iterator[TlsServer]:
    """A MariaDB that speaks TLS; always one: MySQL presents nothing that has expired."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("POLICYD_TEST_SERVER", raising=False)
        new = TlsServer()
    new.certificates = certificates
    try:
        new.install()
        yield new
    finally:
        new.remove()


@pytest.fixture
def database(server: TlsServer) -> Iterator[Database]:
    """A fresh database of that server, which presents its ordinary certificate."""
    new = server.new_database(SCHEMA)
    server.present("server")
    yield new
    server.require("NONE")
    server.drop_database(new.name)


@pytest.fixture
def tls(certificates: Path) -> Callable[..., dict[str, str]]:
    """A function that returns dbssl_... settings, with files of `certificates`: ca.pem unless told otherwise."""

    def settings(name: str = "", **files: str) -> dict[str, str]:
        paths = {f"dbssl_{key}": str(certificates / file) for key, file in {"ca": "ca.pem", **files}.items() if file}
        return {**paths, "dbssl_name": name} if name else paths

    return settings


class Tap(Door):
    """A way to a server on which all is heard that clients say; it may hide that the server offers TLS."""

    def __init__(self, database: Database, hides_tls: bool = False) -> None:
        super().__init__(database.server.host, database.server.port)
        self.RequestHandlerClass = TapHandler
        self.hides_tls = hides_tls
        self.heard: list[bytes] = []


class TapHandler(DoorHandler):
    server: Tap

    def pump(self, source: Any, target: Any) -> None:
        if source is self.request:
            while received := source.recv(65536):
                self.server.heard.append(received)
                target.sendall(received)
        elif self.server.hides_tls:
            greeting = bytearray(source.recv(65536))
            greeting[greeting.index(0, 5) + 15] &= ~0x08  # behind version, thread, salt: CLIENT_SSL of what it can do
            target.sendall(greeting)
        super().pump(source, target)


# --- what works ---


def test_nothing_can_be_read_on_the_way(database: Database, tls: Any) -> None:
    tap = Tap(database)
    repository = maria_repository(database, dbport=str(tap.port), **tls())
    assert [count(repository, ANNA) for _ in range(3)] == [[1], [2], [3]]
    assert len(tap.passing) == 2, "one connection, two ends: it is used again with TLS, too"
    tap.shut()
    for word in (b"anna", b"INSERT", database.server.user.encode()):
        assert word not in b"".join(tap.heard)


@pytest.mark.parametrize(("presented", "name"), [
    ("server", "db.example.org"), ("elsewhere", "db2.example.org"), ("elsewhere", "none"),
])  # fmt: skip
def test_the_server_may_have_another_name(
    server: TlsServer, database: Database, tls: Any, presented: str, name: str
) -> None:
    server.present(presented)
    assert count(maria_repository(database, **tls(name)), ANNA) == [1]


def test_the_server_may_ask_for_a_certificate(server: TlsServer, database: Database, tls: Any) -> None:
    server.require("SUBJECT '/CN=relay'")
    assert count(maria_repository(database, **tls(cert="relay.pem", key="relay.key")), ANNA) == [1]
    for other in (tls(), tls(cert="server.pem", key="server.key")):
        with pytest.raises(RepositoryUnavailable, match="1045"):
            count(maria_repository(database, **other), ANNA)


def test_a_unix_socket_needs_none_of_it(server: TlsServer, database: Database, tls: Any) -> None:
    user = f"'{server.user}'@'localhost'"
    server.query(f"CREATE USER {user} IDENTIFIED BY %s", (server.password,))
    server.query(f"GRANT SELECT, INSERT, UPDATE ON {database.name}.events TO {user}")
    server.present("stranger")
    repository = maria_repository(database, dbhost=server.socket, **tls(cert="relay.pem", key="relay.key"))
    assert count(repository, ANNA) == [1]
    assert repository.ask("SHOW SESSION STATUS LIKE 'Ssl_cipher'", {}, soon()) == [("Ssl_cipher", "")]
    server.query(f"DROP USER {user}")


def test_the_next_connection_reads_renewed_files(
    server: TlsServer, database: Database, tls: Any, certificates: Path, tmp_path: Path
) -> None:
    ca, cert, key = (tmp_path / name for name in ("ca", "cert", "key"))
    for file, name in ((ca, "other-ca.pem"), (cert, "server.pem"), (key, "server.key")):
        shutil.copy(certificates / name, file)
    server.require("SUBJECT '/CN=relay'")
    repository = maria_repository(database, dbssl_ca=str(ca), dbssl_cert=str(cert), dbssl_key=str(key))
    for refused, file, name in (
        ("CERTIFICATE_VERIFY_FAILED", ca, "ca.pem"), ("1045", cert, "relay.pem"), ("dbssl_cert=", key, "relay.key"),
    ):  # fmt: skip
        with pytest.raises(RepositoryUnavailable, match=refused):
            count(repository, ANNA)
        shutil.copy(certificates / name, file)
    assert count(repository, ANNA) == [1]
    ca.unlink()
    assert count(repository, ANNA) == [2], "this connection is there already"


# --- who is refused ---


@pytest.mark.parametrize("name", ["", "none"])
def test_a_server_that_seems_to_have_no_tls_is_not_told_anything(database: Database, tls: Any, name: str) -> None:
    tap = Tap(database, hides_tls=True)
    with pytest.raises(RepositoryUnavailable, match="offers no TLS, which dbssl_ca= asks for"):
        count(maria_repository(database, dbport=str(tap.port), **tls(name)), ANNA)
    tap.shut()
    assert tap.heard == []


@pytest.mark.parametrize(("presented", "reason"), [
    ("expired", "certificate has expired"),
    ("elsewhere", "certificate is not valid for '127.0.0.1'"),
    ("stranger", "unable to get local issuer certificate"),
])  # fmt: skip
def test_a_server_that_cannot_be_trusted_is_an_outage(
    server: TlsServer, database: Database, tls: Any, policyd: Callable[..., Policyd], presented: str, reason: str
) -> None:
    server.present(presented)
    daemon = policyd(**{**database.settings(), **tls()}, defaultquota=3)
    assert [daemon.ask(sasl_username="anna") for _ in range(3)] == [DUNNO, DUNNO, HOLD]
    [line] = errors(daemon)
    assert line.text.startswith(f"{BEGINS}127.0.0.1: ")
    assert reason in line.text
    server.present("server")
    end_of_outage(daemon)
    assert database.query("SELECT SUM(recipient_count) FROM events") == [(3,)]


# --- mistakes in the settings ---


def mistake(directory: Path, settings: dict[str, str], *through: str) -> str:
    """Return what --check-settings and a start say of these settings: one line with status 78, here `key: text`."""
    given = {"dbname": "policyd", "dbuser": "policyd", "statedir": str(directory), **settings}
    file = directory / "policyd.cfg"
    file.write_text("".join(f"{key}={value}\n" for key, value in given.items()))
    checked, started = (run_policyd(*how, "-c", str(file), through=through) for how in (["--check-settings"], []))
    assert (checked.returncode, checked.stdout) == (started.returncode, started.stdout) == (78, "")
    assert checked.stderr == started.stderr
    said = re.fullmatch(rf"policyd: {file}:([0-9]+): (.*)\n", checked.stderr)
    assert said, checked.stderr
    return f"{list(given)[int(said[1]) - 1]}: {said[2]}"


@pytest.mark.parametrize(("key", "names"), [
    ("ca", {"ca": "nowhere.pem"}),
    ("ca", {"ca": "."}),
    ("ca", {"ca": "ca.cnf"}),
    ("ca", {"ca": "ca.issued"}),
    ("cert", {"cert": "nowhere.pem", "key": "relay.key"}),
    ("cert", {"cert": "ca.cnf", "key": "relay.key"}),
    ("cert", {"cert": "relay.pem"}),
    ("key", {"cert": "relay.pem", "key": "nowhere.key"}),
    ("key", {"key": "relay.key"}),
    ("cert", {"cert": "relay.pem", "key": "server.key"}),
    ("cert", {"cert": "relay.pem", "key": "ca.cnf"}),
    ("cert", {"cert": "relay.pem", "key": "relay.key", "ca": ""}),
    ("name", {"name": "none", "ca": ""}),
])  # fmt: skip
def test_what_cannot_be_used_is_named_with_its_line(
    tls: Any, tmp_path: Path, key: str, names: dict[str, str]
) -> None:
    assert mistake(tmp_path, tls(**names)).startswith(f"dbssl_{key}: dbssl_{key}=")


def test_an_unreadable_file_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.touch(0o000)
    like_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    assert mistake(tmp_path, {"dbssl_ca": str(file)}, *like_others) == f"dbssl_ca: dbssl_ca={file}: Permission denied"


def test_nobody_is_asked_for_the_password_of_a_key(tls: Any, tmp_path: Path) -> None:
    """Not even at a terminal, which script(1) is here: nobody sits there when a daemon starts."""
    said = mistake(tmp_path, tls(cert="relay.pem", key="locked.key"))
    assert said.startswith("dbssl_cert: dbssl_cert=")
    command = f"{sys.executable} {ROOT / 'policyd.py'} --check-settings -c {tmp_path / 'policyd.cfg'}"
    shown = subprocess.run([program("script", "bsdutils"), "-qec", command, "/dev/null"], stdin=subprocess.DEVNULL,
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    assert shown.returncode == 78
    assert shown.stdout.count("\n") == 1, shown.stdout
