"""Several relays on one Galera cluster: one quota, and a node that dies or is cut off costs neither mail nor counts."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

import pytest
from galera import Cluster
from servers import Database, Policyd, read_answer, request_bytes, wait_until
from test_exactness import CONNECTIONS, send_at_once

from policyd import DUNNO, HOLD, REJECT, REPLAY_SLICE

Start = Callable[..., Policyd]

BEGINS = "ERROR while UPDATING db: "
ENDS = "ERROR while UPDATING db: over after "
NOT_PREPARED = 1047
# What a cluster needs to notice that a node is gone (5 s), and policyd's longest pause between two looks (15 s).
BACK_S = 60


def relay(policyd: Start, cluster: Cluster, database: Database, *order: int, quota: int = 100_000) -> Policyd:
    """Start a daemon that prefers the nodes in this order."""
    return policyd(defaultquota=quota, **{**database.settings(), "dbhost": cluster.dbhost(*order)})


def sums(cluster: Cluster, database: Database, login: str = "alice") -> list[int]:
    """Return what each node has counted, once it has applied all that others have committed."""
    statement = (
        "SET STATEMENT wsrep_sync_wait = 1 FOR"
        " SELECT COALESCE(SUM(recipient_count), 0) FROM events WHERE sasl_username = %s"
    )
    return [int(node.query(statement, (login,), database.name)[0][0]) for node in cluster.nodes]


def outages_begun(daemon: Policyd) -> list[str]:
    """Return what the daemon has logged about the beginnings of outages."""
    return [line.text for line in daemon.log_lines() if line.text.startswith(BEGINS) and not line.text.startswith(ENDS)]


def is_over(daemon: Policyd) -> bool:
    """Tell whether the last outage, if there was one, has ended."""
    errors = [line.text for line in daemon.log_lines() if line.level == "err"]
    return not errors or errors[-1].startswith(ENDS)


def is_not_prepared(cluster: Cluster, number: int) -> bool:
    """Tell whether the node takes connections and refuses to work."""
    import pymysql

    try:
        cluster.nodes[number].query("SELECT 1 FROM mysql.user")
    except pymysql.err.OperationalError as error:
        return bool(error.args[0] == NOT_PREPARED)
    return False


@contextlib.contextmanager
def cut_off(cluster: Cluster, *numbers: int) -> Iterator[None]:
    """Part nodes from all others, and join them again."""
    try:
        for number in numbers:
            cluster.nodes[number].isolate()
        yield
    finally:
        for number in numbers:
            cluster.nodes[number].isolate(False)


class Load:
    """Clients that ask, each on a connection of its own, one message after the other."""

    def __init__(self, daemons: list[Policyd], clients: int) -> None:
        self.answers: list[str] = []
        self._enough = threading.Event()
        self._threads = ThreadPoolExecutor(len(daemons) * clients)
        self._clients = [self._threads.submit(self._send, daemon) for daemon in daemons for _ in range(clients)]

    def _send(self, daemon: Policyd) -> None:
        with daemon.connect() as connection:
            while not self._enough.is_set():
                connection.sendall(request_bytes())
                self.answers.append(read_answer(connection))

    def wait_for_more(self, number: int) -> None:
        """Wait for so many answers, or for a client that failed."""
        goal = len(self.answers) + number
        wait_until(
            lambda: len(self.answers) >= goal or any(client.done() for client in self._clients), f"{number} answers"
        )

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._threads.shutdown()
        for client in self._clients:
            client.result()


# --- a cluster in good health ---


def test_two_relays_on_two_nodes_hold_a_login_at_one_quota(
    policyd: Start, cluster: Cluster, database: Database
) -> None:
    """In spite of all the conflicts: one login, one sender, one address, many rows of the same millisecond."""

    def conflicts() -> int:
        counters = ("wsrep_local_cert_failures", "wsrep_local_bf_aborts")
        return sum(int(node.status(counter)) for node in cluster.nodes for counter in counters)

    relays = [relay(policyd, cluster, database, *order, quota=1000) for order in ((0, 1, 2), (1, 2, 0))]
    before = conflicts()
    answers = Counter(send_at_once(relays, [{}] * 4000))
    assert conflicts() > before
    assert sum(answers.values()) == 4000
    assert sums(cluster, database) == [4000] * 3
    # The n-th message that is committed has a sum of at least n.  It is more where a message of the other relay has
    # been committed meanwhile, of which there is one a connection at most.
    assert 999 - CONNECTIONS <= answers[DUNNO] <= 999
    assert answers[REJECT] >= 2001
    assert [outages_begun(daemon) for daemon in relays] == [[], []]


def test_a_sum_has_what_was_committed_on_another_node_a_moment_ago(
    policyd: Start, cluster: Cluster, database: Database
) -> None:
    """Also with wsrep_sync_wait=0: a node commits its own rows after all that come before them in the cluster."""
    ahead, behind = (relay(policyd, cluster, database, *order) for order in ((0, 1, 2), (1, 2, 0)))
    assert cluster.nodes[1].query("SELECT @@GLOBAL.wsrep_sync_wait") == [(0,)]
    database.query("CREATE TABLE burden (number INT PRIMARY KEY) ENGINE=InnoDB")
    for n in range(10):
        # Committed here, and much work yet for the other nodes.
        database.query(f"INSERT INTO burden SELECT seq + {n * 100_000} FROM seq_1_to_50000")
        login = f"login{n}"
        ahead.ask(sasl_username=login)
        statement = "SELECT COUNT(*) FROM events WHERE sasl_username = %s"
        was_behind = cluster.nodes[1].query(statement, (login,), database.name) == [(0,)]
        behind.ask(sasl_username=login)
        behind.wait_for_log(f"Updating db: {login}/alice@example.org/192.0.2.1/1/2")
        if was_behind:
            break
    else:
        pytest.fail("the other node was never behind")


# --- nodes that fail ---


def test_a_node_that_is_killed_under_load_costs_no_answer_and_no_count(
    policyd: Start, cluster: Cluster, database: Database
) -> None:
    clients = 4
    relays = [relay(policyd, cluster, database, *order) for order in ((0, 1, 2), (1, 2, 0))]
    for daemon in relays:
        assert daemon.ask(sasl_username="phished", recipient_count=200_000) == REJECT
    with Load(relays, clients) as load:
        load.wait_for_more(200)
        cluster.nodes[0].kill()
        load.wait_for_more(200)
        for daemon in relays:
            assert daemon.ask(sasl_username="phished") == REJECT
        wait_until(lambda: cluster.nodes[1].is_synced_with(2), "the cluster goes on without the node", BACK_S)
        load.wait_for_more(200)
        cluster.wait_until_whole()
        load.wait_for_more(200)
    wait_until(lambda: all(is_over(daemon) for daemon in relays), "no outage is left", BACK_S)
    counted = sums(cluster, database)
    assert len(set(counted)) == 1
    # A statement that was interrupted may have been committed nevertheless, and its events once more: that of the
    # killed node, or one that waited in another node for the cluster to notice.  It had one message a client at most,
    # or, when an outage began anew while the journal was replayed, a slice of that.
    begun = [len(outages_begun(daemon)) for daemon in relays]
    may_be_doubled = sum((1 + n) * clients + max(0, n - 1) * REPLAY_SLICE for n in begun)
    assert len(load.answers) <= counted[0] <= len(load.answers) + may_be_doubled


def test_a_node_that_has_lost_the_others_is_passed_over(policyd: Start, cluster: Cluster, database: Database) -> None:
    early = relay(policyd, cluster, database, 0, 1, 2)
    assert early.ask() == DUNNO
    with cut_off(cluster, 0):
        wait_until(lambda: is_not_prepared(cluster, 0), "the node knows that it is alone")
        wait_until(lambda: cluster.nodes[1].is_synced_with(2), "the others go on", BACK_S)
        late = relay(policyd, cluster, database, 0, 1, 2)
        for daemon in (early, late):
            assert daemon.ask(recipient_count=10) == DUNNO
            assert f"({NOT_PREPARED}, " in daemon.wait_for_log(BEGINS).text
            daemon.wait_for_log(ENDS, BACK_S)
            assert daemon.ask(recipient_count=100) == DUNNO
    cluster.wait_until_whole()
    assert sums(cluster, database) == [221] * 3


def test_a_cluster_without_a_quorum_is_an_outage_that_ends_by_itself(
    policyd: Start, cluster: Cluster, database: Database
) -> None:
    daemon = relay(policyd, cluster, database, 0, 1, 2, quota=20)
    assert daemon.ask(recipient_count=10) == DUNNO
    with cut_off(cluster, 0, 1):
        wait_until(lambda: all(is_not_prepared(cluster, n) for n in range(3)), "all nodes know that they are alone")
        assert [daemon.ask() for _ in range(12)] == [DUNNO] * 9 + [HOLD] * 3
    daemon.wait_for_log(ENDS, BACK_S)
    assert daemon.ask() == HOLD
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/23")
    cluster.wait_until_whole()
    assert sums(cluster, database) == [23] * 3


def test_after_the_end_of_the_whole_cluster_all_is_there(policyd: Start, cluster: Cluster, database: Database) -> None:
    daemon = relay(policyd, cluster, database, 1, 2, 0, quota=20)
    assert daemon.ask(recipient_count=10) == DUNNO
    assert sums(cluster, database) == [10] * 3
    for node in cluster.nodes:
        node.kill()
    assert [daemon.ask() for _ in range(12)] == [DUNNO] * 9 + [HOLD] * 3
    cluster.bootstrap()
    daemon.wait_for_log(ENDS, BACK_S)
    assert daemon.ask() == HOLD
    daemon.wait_for_log("Updating db: alice/alice@example.org/192.0.2.1/1/23")
    cluster.wait_until_whole()
    assert sums(cluster, database) == [23] * 3
