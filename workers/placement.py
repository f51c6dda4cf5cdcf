"""Where Ray runs a task: what it is asked for, and on which node where only one will do. Knows Ray's options."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from merger.errors import WorkerDied
from workers.resources import Request


def options_of(request: Request) -> dict[str, Any]:
    """The request in Ray's terms."""
    options: dict[str, Any] = {"num_cpus": request.cpus, "num_gpus": request.gpus, "memory": request.memory}
    if request.node:  # never another: what it writes would be missed, what it reads would not be there
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(request.node, soft=False)
    return options


def bound_to_this_node(request: Request) -> Request:
    """The request, for the node of this process alone, whose folders the others do not see.

    Raises WorkerDied where this node could never run it: another attempt may find a larger one.
    """
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    own = ray.get_runtime_context().get_node_id()
    [offered] = [node["Resources"] for node in nodes if node["NodeID"] == own]
    lacking = [name for name, needed in _needs(request).items() if needed > offered.get(name, 0.0)]
    if lacking:
        raise WorkerDied(
            f"a task needs more {' and '.join(lacking)} than the runner's node has",
            where=f"node {own[:8]}",
            remedy="Where workers share no folder, let each be large enough for a task.",
        )
    return replace(request, node=own)


def _needs(request: Request) -> Mapping[str, float]:
    return {"CPU": request.cpus, "GPU": request.gpus, "memory": request.memory}
