"""The cluster, beside the fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from galera import Cluster, Node
from servers import SCHEMA, Database


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three nodes, all of them up."""
    new = Cluster([])
    try:
        new.nodes.extend(Node() for _ in range(3))
        new.nodes[0].install()
        new.nodes[0].stop()
        new.bootstrap()
        new.wait_until_whole()
        request.config.get_terminal_writer().line(f"Galera cluster of MariaDB {new.nodes[0].version}")
        yield new
    finally:
        for node in new.nodes:
            node.remove()


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    """A fresh database in the whole cluster, with the table of scripts/schema.sql."""
    new = cluster.nodes[0].new_database(SCHEMA)
    yield new
    cluster.wait_until_whole()
    cluster.nodes[0].drop_database(new.name)
