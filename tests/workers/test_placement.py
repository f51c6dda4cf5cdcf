"""Where tasks run: anywhere, or on the runner's node alone. On a real cluster of two nodes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.service.processes import Cluster
from workers.placement import options_of
from workers.resources import Request

# As a runner would: a process on a node for tasks, whose tasks tell where they ran.
_RUNNER = """
import json, sys
from dataclasses import replace
import ray
from merger.errors import WorkerDied
from workers.placement import bound_to_this_node, options_of
from workers.resources import Request

def node():
    return ray.get_runtime_context().get_node_id()

def nodes(options):
    return sorted(set(ray.get([ray.remote(node).options(**options).remote() for _ in range(8)])))

@ray.remote(num_cpus=0.25)
def told():
    request = Request(0.5, 0.0, 1 << 20)
    bound = bound_to_this_node(request)
    try:
        bound_to_this_node(replace(request, cpus=64.0, gpus=1.0))
    except WorkerDied as error:
        refusal = str(error)
    free = nodes({**options_of(request), "scheduling_strategy": "SPREAD"})
    return {"own": node(), "bound": nodes(options_of(bound)), "free": free, "refusal": refusal}

ray.init(address=sys.argv[1], log_to_driver=False)
print(json.dumps(ray.get(told.remote())))
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start_head()
        cluster.start_node(2)
        cluster.start_node(3)
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
def test_tasks_that_are_bound_run_on_the_runners_node(cluster: Cluster) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    command = [sys.executable, "-c", _RUNNER, f"127.0.0.1:{cluster.gcs}"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["bound"] == [told["own"]]
    assert len(told["free"]) == 2  # there was another
    assert "more CPU and GPU than the runner's node has" in told["refusal"]


def test_a_request_in_rays_terms() -> None:
    options = options_of(Request(2.0, 1.0, 7))
    assert options == {"num_cpus": 2.0, "num_gpus": 1.0, "memory": 7}
    strategy = options_of(Request(2.0, 1.0, 7, "ab" * 28))["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == ("ab" * 28, False)
