"""The cluster of the tests itself: two nodes on the loopback address, one of which can be killed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, completed
from tests.ray.cluster import Cluster, cluster, is_running

pytestmark = pytest.mark.slow

# A driver that asks a task on each node which address the node has, and where the task imports camserve from.
DRIVER = """
import sys
import ray

@ray.remote
def where():
    import camserve_server, tests
    return ray.util.get_node_ip_address(), camserve_server.__file__, tests.__file__

ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
nodes = [each for each in ray.nodes() if each["Alive"]]
tasks = [where.options(resources={name: 1}).remote() for name in sys.argv[2:]]
print(len(nodes), *[value for task in tasks for value in ray.get(task)], sep="\\n")
"""


def driver_output(running: Cluster, *names: str) -> list[str]:
    done = completed([sys.executable, "-c", DRIVER, running.address, *names])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_two_nodes_run_the_code_of_this_folder_and_one_can_be_killed() -> None:
    with cluster(head_cpus=1, worker_cpus=1) as running:
        count, *values = driver_output(running, "head", "worker")
        assert count == "2"
        assert values[0] == values[3] == "127.0.0.1"
        assert all(Path(value).is_relative_to(ROOT) for value in (*values[1:3], *values[4:6]))

        assert running.worker.processes()
        running.worker.kill()
        assert not running.worker.processes()
        assert driver_output(running, "head")[1] == "127.0.0.1"
        before = running.head.processes()
    assert before
    assert not [process for process in before if is_running(process)]
