"""A shard's task as a plain generator: what it says, and what it raises. Ray runs it in `tests/service`."""

from pathlib import Path

import pytest

from merger.errors import SourceChanged
from merger.plan import Plan
from merger.receipt import Receipt
from merger.recipe import make_document
from merger.run import Options, plan_of
from merger.staging import Staging
from tests.service.processes import recipe, write_run
from workers.resources import INTERPRETER, TaskSize, request_for
from workers.shards import Work, write_shard


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_run(tmp_path / "run", shards=2, megabytes=4)
    return plan_of(make_document(recipe(tmp_path / "run", "unused", 4)), Options())[0]


def work_in(plan: Plan, folder: Path) -> Work:
    request, allotment = request_for(plan, TaskSize(1.0, 64 << 20))
    staging = Staging(folder / "out", "job", 1)
    staging.take(plan)
    return Work(staging.folder, allotment, plan.fingerprint, request)


def test_a_task_says_its_bytes_and_then_its_receipt(plan: Plan, tmp_path: Path) -> None:
    *numbers, receipt = write_shard(plan.shards[1], work_in(plan, tmp_path), ".1.0")
    assert sum(number for number in numbers if isinstance(number, int)) == plan.shards[1].data_size
    assert isinstance(receipt, Receipt)
    assert (receipt.file, receipt.size) == (plan.shards[1].name, plan.shards[1].size)


def test_a_task_raises_what_the_engine_raises(plan: Plan, tmp_path: Path) -> None:
    work = work_in(plan, tmp_path)
    (tmp_path / "run" / "step-1" / "model.safetensors").unlink()
    with pytest.raises(SourceChanged, match="cannot be opened any more"):
        list(write_shard(plan.shards[0], work, ""))


def test_a_request_states_processors_and_the_memory_of_buffers_and_interpreter(plan: Plan) -> None:
    request, allotment = request_for(plan, TaskSize(2.0, 64 << 20))
    assert (request.cpus, request.gpus) == (2.0, 0.0)
    assert allotment.threads == 4
    assert request.memory == allotment.memory + INTERPRETER <= (64 << 20) + INTERPRETER
