"""Where a task runs. Knows Ray's options; knows nothing of what the task does."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.resources import Request


def this_node() -> str:
    """The name of the node of this process, which is connected to the cluster."""
    return str(ray.get_runtime_context().get_node_id())


def options_of(request: Request) -> dict[str, Any]:
    """What Ray is told for a task of this request."""
    options: dict[str, Any] = {"num_cpus": request.cpus, "num_gpus": request.gpus, "memory": request.memory}
    if request.node:  # what it reads and writes is nowhere else
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(request.node, soft=False)
    return options
