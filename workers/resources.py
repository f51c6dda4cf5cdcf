"""What a shard's task asks of the cluster. Pure: the API checks with it what the runner will ask for."""

from dataclasses import dataclass

from merger.budget import Allotment, allot
from merger.plan import Plan

_TORCH = 1 << 30  # bytes: a process with torch and transformers, measured at 600 MB, and activations
INTERPRETER = 400 << 20  # bytes: a Ray worker with the library and its kernels loaded, measured at 310 MB


@dataclass(frozen=True)
class TaskSize:
    """What one task may use: processors, and bytes of memory for its buffers; `device` is where whole matrices are
    decomposed: cpu, cuda (a GPU for each task that does), or auto (where a task finds one).
    """

    cpus: float = 1.0
    memory: int = 1 << 30
    device: str = "auto"


@dataclass(frozen=True)
class Request:
    """What Ray is asked for, for one task."""

    cpus: float
    gpus: float
    memory: int
    node: str = ""  # the only one that may run it, by Ray's name; any without


def measuring_request(plan: Plan, size: TaskSize) -> Request:
    """The request of a task that measures a model: in float32, once more while it loads, torch and what it computes."""
    return Request(size.cpus, 0.0, 2 * 4 * plan.parameters + _TORCH)


def training_request(plan: Plan, size: TaskSize) -> Request:
    """The request of a task that trains a model: weights, gradients and two moments in float32, weights and moments
    once more while a state is taken up, torch and what it computes.
    """
    return Request(size.cpus, 0.0, 7 * 4 * plan.parameters + _TORCH)


def request_for(plan: Plan, size: TaskSize) -> tuple[Request, Allotment]:
    """The request of each shard's task, and how the task divides its memory among two threads a processor.

    Raises NotEnoughMemory.
    """
    allotment = allot(plan, size.memory, max(1, round(2 * size.cpus)), size.device)
    if not allotment.whole:
        return Request(size.cpus, 0.0, allotment.memory + INTERPRETER), allotment
    gpus = 1.0 if size.device == "cuda" else 0.0
    return Request(size.cpus, gpus, allotment.memory + INTERPRETER + _TORCH), allotment
