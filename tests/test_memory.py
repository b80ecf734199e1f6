"""Ray's page on memory becomes one line, wherever in an exception it stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from cbtm_ray.memory import out_of_memory

PAGE = """3 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 58d6) was 4.33GB used / 23.54GB limit (0.184)
OOM kill reason: Memory usage 4513275904B exceeded threshold of 4473940992B
Selected to kill: (Task: job ID=01, lease ID=0c, task name=ray::Coordinator:_Actor.__init__, required resources={}, pid=3)
Selected to kill: (Actor(4c): job ID=01, lease ID=04, task name=RayTrainWorker.__init__, required resources={}, pid=2)
Selected to kill: (Actor(4a): job ID=01, lease ID=02, task name=RayTrainWorker.__init__, required resources={}, pid=1)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
28621\t1.84\tpython other.py
28640\t0.45\tpython -m jobs.train_experts
"""  # noqa: E501
LINE = (
    "Ray's memory monitor ended processes of this job (RayTrainWorker x 2, _Actor) because memory ran short on node 10.0.0.7: "
    "4.33GB of 23.54GB were used, most by process 28621 (1.84 GB, python other.py). What is finished is kept. End what "
    "takes the memory, or run fewer trainings at once (train.slots=1); the same command then continues. "
    "RAY_memory_usage_threshold=0.98 in the environment lets more be used."
)


def raised_from(cause: BaseException) -> BaseException:
    """As `train_branches` raises what a training run failed with."""
    try:
        raise RuntimeError("1 training runs failed and left untrained: experts/cluster=0000") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "wrap",
    [
        lambda killed: killed,
        lambda killed: WorkerGroupError("a worker failed", {0: ValueError("other"), 1: killed}),
        lambda killed: ControllerError(killed),
        lambda killed: ControllerError(WorkerGroupError("a worker failed", {0: killed})),
        lambda killed: RayTaskError("f", "traceback", killed),
    ],
)
def test_the_line_names_what_was_killed_why_and_how_to_go_on(
    wrap: Callable[[BaseException], BaseException],
) -> None:
    killed = OutOfMemoryError(PAGE)
    assert out_of_memory(wrap(killed)) == LINE
    assert out_of_memory(raised_from(wrap(killed))) == LINE


def test_other_failures_are_not_of_memory() -> None:
    for other in (MemoryError(), ActorDiedError(), raised_from(WorkerGroupError("a worker failed", {0: ValueError()}))):
        assert out_of_memory(other) is None


def test_a_page_in_other_words_is_told_all_the_same() -> None:
    line = out_of_memory(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert line is not None
    assert line.startswith(
        "Ray's memory monitor ended processes of this job because memory ran short. What is finished"
    )
