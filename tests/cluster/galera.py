"""A Galera cluster of three private MariaDB servers on 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pymysql
import pytest
from servers import MariaDB, free_port, wait_until

PROVIDER = Path("/usr/lib/galera/libgalera_smm.so")
WHOLE_TIMEOUT_S = 60.0  # for a node that gets everything from another one


class Node(MariaDB):
    """One server of the cluster: it joins the others by their group addresses."""

    def __init__(self) -> None:
        super().__init__()
        if not PROVIDER.exists():
            pytest.exit(f"{PROVIDER} is missing: apt-get install galera-4 rsync", returncode=1)
        self.group = ""  # the addresses at which the nodes find each other
        self.group_address = f"{self.host}:{free_port()}"
        self._ist_address = f"{self.host}:{free_port()}"
        self._sst_address = f"{self.host}:{free_port()}"
        data = self.directory / "data"
        data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            # Under root the receiving rsync would become nobody and could not write.
            self._as_user = ["--user=mysql"]
            shutil.chown(self.directory, "mysql")
            shutil.chown(data, "mysql")

    def launch(self, *options: str) -> None:
        """Start the server; once it has a group, as a node of it: it may take a while until it answers."""
        if self.group:
            options = (
                "--wsrep-on=ON", f"--wsrep-provider={PROVIDER}", f"--wsrep-cluster-address=gcomm://{self.group}",
                "--loose-plugin-wsrep-provider=OFF",  # else 11.8 wants each option of the provider apart
                "--binlog-format=ROW", "--innodb-autoinc-lock-mode=2", "--wsrep-sst-method=rsync",
                f"--wsrep-node-address={self.host}", f"--wsrep-sst-receive-address={self._sst_address}",
                f"--wsrep-provider-options=gmcast.listen_addr=tcp://{self.group_address};"
                f"ist.recv_addr={self._ist_address};gcache.size=16M",
                *options,
            )  # fmt: skip
        super().launch(*options)

    def status(self, name: str) -> str:
        """Return the value of a status variable: nodes that are not ready tell them too."""
        return str(self.query("SHOW STATUS LIKE %s", (name,))[0][1])

    def is_synced_with(self, nodes: int) -> bool:
        """Tell whether the node takes part in a cluster of so many nodes."""
        names = ("wsrep_cluster_size", "wsrep_local_state_comment")
        with contextlib.suppress(pymysql.err.OperationalError):
            return [self.status(name) for name in names if self._answers()] == [str(nodes), "Synced"]
        return False

    def is_not_prepared(self) -> bool:
        """Tell whether the node takes connections and refuses to work."""
        try:
            self.query("SELECT 1 FROM mysql.user")
        except pymysql.err.OperationalError as error:
            return bool(error.args[0] == 1047)
        return False


class Cluster(NamedTuple):
    """Three nodes."""

    nodes: list[Node]

    def dbhost(self, *order: int) -> str:
        """Return the setting that names the nodes in this order."""
        return ",".join(f"{node.host}:{node.port}" for node in (self.nodes[n] for n in order))

    def bootstrap(self) -> None:
        """Start the first node as the one from which the others are to get everything."""
        for node in self.nodes:
            node.group = ",".join(each.group_address for each in self.nodes)
        state = self.nodes[0].directory / "data" / "grastate.dat"
        if state.exists():
            state.write_text(state.read_text().replace("safe_to_bootstrap: 0", "safe_to_bootstrap: 1"))
        self.nodes[0].launch("--wsrep-new-cluster")
        wait_until(lambda: self.nodes[0].is_synced_with(1), "the cluster has its first node")

    def wait_until_whole(self) -> None:
        """Start the nodes that are down and wait until all are one cluster."""
        for node in self.nodes:
            if node._process is None or node.process.poll() is not None:
                node.launch()
        for node in self.nodes:
            wait_until(lambda node=node: node.is_synced_with(len(self.nodes)), "the cluster is whole", WHOLE_TIMEOUT_S)
