"""Starts the nodes of a Ray cluster on the loopback address and waits. `tests.ray.cluster` runs it as a process.

It is a process of its own, because `ray.cluster_utils` changes the state of the process that imports it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ray.cluster_utils import Cluster


def main(nodes: list[dict[str, Any]], mark: str) -> None:
    """Start nodes, print the address of the cluster, and wait for the end of standard input.

    Args:
        nodes: The arguments of each node; the value under the name of the mark identifies its processes.
        mark: The environment variable that identifies the processes of a node.
    """
    cluster = Cluster(shutdown_at_exit=False)
    for arguments in nodes:
        os.environ[mark] = arguments.pop(mark)
        cluster.add_node(**arguments)
    print(cluster.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
