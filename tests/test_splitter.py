"""A read/write splitter before a primary and a replica that lags: what is read there is not to be trusted."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from typing import Callable

import pytest
from daemons import BACK_S, BEGINS, errors
from servers import DUNNO, HOLD, REJECT, SCHEMA, MariaDB, Policyd, wait_until
from stores import Door, DoorHandler, event, maria_repository, sums

pytestmark = pytest.mark.mariadb  # two of its own
WARNING = "the server does not show what it has just stored: send policyd to the primary"
FOR_EVER = 24 * 3600  # more than any test takes: the replica never catches up by itself


class Node(MariaDB):
    """A MariaDB that others may follow; without TLS: the splitter reads what is said."""

    def launch(self, *options: str) -> None:
        """Start the server."""
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

    def catch_up(self) -> None:
        """Lag no more."""
        for statement in ("STOP SLAVE", "CHANGE MASTER TO MASTER_DELAY = 0", "START SLAVE"):
            self.query(statement)


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


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Node, Node]]:
    """A primary and a replica; always MariaDB: MySQL has other words for it."""
    monkeypatch.delenv("POLICYD_TEST_SERVER", raising=False)
    both = Node(), Node()
    try:
        for each in both:
            each.install()
        yield both
    finally:
        for each in both:
            each.remove()


def test_the_quota_holds_behind_a_replica_that_lags(nodes: tuple[Node, Node], policyd: Callable[..., Policyd]) -> None:
    primary, SplitterHandler.replica = nodes
    database, same = (each.new_database(SCHEMA) for each in nodes)
    assert database.name == same.name == "policyd1"
    SplitterHandler.replica.follow(primary)
    splitter = Door(primary.host, primary.port)
    splitter.RequestHandlerClass = SplitterHandler
    daemon = policyd(**{**database.settings(), "dbport": str(splitter.port)}, defaultquota=20)
    answers = [daemon.ask(sasl_username="anna") for _ in range(60)]
    assert answers == [DUNNO] * 19 + [HOLD] * 20 + [REJECT] * 21
    assert errors(daemon)[0].text.startswith(f"{BEGINS}{WARNING}")
    SplitterHandler.replica.catch_up()
    wait_until(lambda: database.query("SELECT SUM(recipient_count) FROM events") == [(60,)], "all is there", BACK_S)
    repository = maria_repository(database, dbport=str(splitter.port))
    wait_until(lambda: sums(repository, [event("anna", 0)]) == [60], "the replica has caught up")
    splitter.shut()
