"""A read/write splitter before a primary and a replica that lags: what is read there is not to be trusted."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from typing import Callable

import pytest
from daemons import BACK_S, BEGINS, errors
from servers import DUNNO, HOLD, REJECT, SCHEMA, Database, MariaDB, Policyd, wait_until
from stores import GENEROUS, Door, DoorHandler, count, event, maria_repository, soon, sums

from policyd import RepositoryUnavailable, Settings

pytestmark = pytest.mark.mariadb  # two of its own
WARNING = "the server does not show what it has just stored: send policyd to the primary"
FOR_EVER = 24 * 3600  # more than any test takes: the replica never catches up by itself


class Node(MariaDB):
    """A MariaDB that others may follow."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def launch(self, *options: str) -> None:
        """Start the server, without TLS: the splitter reads what is said."""
        super().launch(f"--server-id={self._number}", "--log-bin=binlog", "--skip-ssl", *options)

    def follow(self, primary: MariaDB) -> None:
        """Take over what the primary does from now on."""
        primary.query("GRANT REPLICATION SLAVE ON *.* TO 'replica'@'127.0.0.1' IDENTIFIED BY 'secret'")
        file, position = primary.query("SHOW MASTER STATUS")[0][:2]
        self.query(
            "CHANGE MASTER TO MASTER_HOST = %s, MASTER_PORT = %s, MASTER_USER = 'replica', MASTER_PASSWORD = 'secret',"
            " MASTER_LOG_FILE = %s, MASTER_LOG_POS = %s, MASTER_SSL = 0, MASTER_SSL_VERIFY_SERVER_CERT = 0",
            (primary.host, primary.port, file, position),
        )
        self.query("START SLAVE")

    def wait_for(self, primary: MariaDB) -> None:
        """Wait until all is done here that has been done there."""
        file, position = primary.query("SHOW MASTER STATUS")[0][:2]
        assert self.query("SELECT MASTER_POS_WAIT(%s, %s, 60)", (file, position))[0][0] not in (None, -1)

    def lag(self, seconds: int) -> None:
        """Do what the primary does so much later."""
        self.query("STOP SLAVE")
        self.query(f"CHANGE MASTER TO MASTER_DELAY = {seconds}")
        self.query("START SLAVE")


class Splitter(Door):
    """Sends what reads to the replica and all else to the primary, as MaxScale, ProxySQL or MySQL Router can do."""

    def __init__(self, primary: MariaDB, replica: MariaDB, database: str) -> None:
        super().__init__(primary.host, primary.port)
        self.replica = replica
        self.database = database
        self.RequestHandlerClass = SplitterHandler


class SplitterHandler(DoorHandler):
    server: Splitter

    def handle(self) -> None:
        import pymysql

        replica = self.server.replica
        reader = pymysql.connect(host=replica.host, port=replica.port, user=replica.user, password=replica.password,
                                 database=self.server.database, charset="utf8mb4", ssl_disabled=True)  # fmt: skip
        with reader, socket.create_connection(self.server.target) as writer:
            self.server.passing += [self.request, writer, reader._sock]
            for source in (writer, reader._sock):  # one at a time answers
                threading.Thread(target=self.pump, args=(source, self.request), daemon=True).start()
            while header := self.request.recv(4, socket.MSG_WAITALL):
                said = self.request.recv(int.from_bytes(header[:3], "little"), socket.MSG_WAITALL)
                is_read = header[3] == 0 and re.match(rb"\x03[\s(]*SELECT\b", said)  # the first packet: COM_QUERY
                (reader._sock if is_read else writer).sendall(header + said)


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    """A primary and a replica; always MariaDB: MySQL has other words for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("POLICYD_TEST_SERVER", raising=False)
        primary, replica = Node(1), Node(2)
    try:
        primary.install()
        replica.install()
        replica.follow(primary)
        yield primary, replica
    finally:
        replica.remove()
        primary.remove()


@pytest.fixture
def database(nodes: tuple[Node, Node]) -> Iterator[Database]:
    """A fresh database of the primary, with a table that the replica has, too, and in which it sees no row."""
    primary, replica = nodes
    new = primary.new_database(SCHEMA)
    replica.wait_for(primary)
    replica.lag(FOR_EVER)
    yield new
    primary.drop_database(new.name)
    replica.lag(0)


@pytest.fixture
def splitter(nodes: tuple[Node, Node], database: Database) -> Iterator[Splitter]:
    """The way to both."""
    new = Splitter(*nodes, database.name)
    yield new
    new.shut()


def test_a_replica_that_lags_is_an_outage_until_it_has_caught_up(
    nodes: tuple[Node, Node], splitter: Splitter, database: Database
) -> None:
    repository = maria_repository(database, dbport=str(splitter.port))
    batch = [event("anna", 3), event("bert", 4)]
    assert repository.insert(batch, soon()) == set()
    with pytest.raises(RepositoryUnavailable, match=WARNING):
        sums(repository, batch)
    nodes[1].lag(0)
    nodes[1].wait_for(nodes[0])
    assert sums(repository, batch) == [3, 4]


def test_the_quota_holds_behind_a_splitter_and_all_is_counted(
    splitter: Splitter, database: Database, policyd: Callable[..., Policyd]
) -> None:
    daemon = policyd(**{**database.settings(), "dbport": str(splitter.port)}, defaultquota=20)
    answers = [daemon.ask(sasl_username="anna") for _ in range(60)]
    assert answers == [DUNNO] * 19 + [HOLD] * 20 + [REJECT] * 21
    assert errors(daemon)[0].text.startswith(f"{BEGINS}{WARNING}")
    splitter.replica.lag(0)
    wait_until(lambda: database.query("SELECT SUM(recipient_count) FROM events") == [(60,)], "all is there", BACK_S)


@pytest.mark.parametrize("is_bounded", [False, True])
def test_who_is_forgiven_at_once_begins_none(database: Database, is_bounded: bool) -> None:
    """What was inserted is there, though its sum is less."""
    repository = maria_repository(database)
    settings = Settings(defaultquota=3) if is_bounded else GENEROUS
    assert count(repository, event("anna", 2000), settings=settings) == [2000]
    assert repository.insert([event("anna", 5)], soon()) == set()
    database.query("UPDATE events SET recipient_count = -recipient_count")
    assert sums(repository, [event("anna", 5)], settings) == [0]
