"""What Ray is told of where a task may run."""

from workers.placing import options_of
from workers.resources import Request


def test_a_task_goes_anywhere() -> None:
    assert options_of(Request(1.5, 1.0, 100)) == {"num_cpus": 1.5, "num_gpus": 1.0, "memory": 100}


def test_a_task_whose_node_is_given_goes_there_and_nowhere_else() -> None:
    options = options_of(Request(1.5, 0.0, 100, "ab" * 28))
    strategy = options["scheduling_strategy"]
    assert (strategy.node_id, strategy.soft) == ("ab" * 28, False)
