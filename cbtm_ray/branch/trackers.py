"""Tell MLflow and Weights & Biases the points of a training curve as they come, through Ray's own set-up of both.

Where they send it is their own affair: MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE and the like, on every node. A training
run that was killed goes on in the same W&B run, and in a second MLflow run of the same name.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cbtm_ray.errors import UserError

Point = Mapping[str, Any]


@contextlib.contextmanager
def tracking(trackers: tuple[str, ...], run_dir: str, model: str) -> Iterator[Callable[[Point], None]]:
    """A function that logs a point of the curve of `model`, a folder of the run. The trackers' runs end with the block.

    Raises:
        UserError: a tracker is not installed on this node, or has no server or account configured.
    """
    starts = {"mlflow": _mlflow, "wandb": _wandb}
    with contextlib.ExitStack() as stack:
        told = [stack.enter_context(starts[tracker](run_dir, model)) for tracker in trackers]

        def log_point(point: Point) -> None:
            numbers = {name: value for name, value in point.items() if name != "step" and value is not None}
            for each in told:
                each(numbers, point["step"])

        yield log_point


@contextlib.contextmanager
def _mlflow(run_dir: str, model: str) -> Iterator[Callable[[Point, int], None]]:
    from ray.air.integrations.mlflow import setup_mlflow  # a second to import, for those who ask for it

    with _refused("mlflow"):
        mlflow: Any = setup_mlflow(experiment_name=run_dir, run_name=model, create_experiment_if_not_exists=True)
    status = "FAILED"
    try:
        yield lambda numbers, step: mlflow.log_metrics(numbers, step=step)
        status = "FINISHED"
    finally:
        mlflow.end_run(status)


@contextlib.contextmanager
def _wandb(run_dir: str, model: str) -> Iterator[Callable[[Point, int], None]]:
    from ray.air.integrations.wandb import setup_wandb

    name = run_dir.rstrip("/").rpartition("/")[2]
    own = hashlib.sha256(f"{run_dir} {model}".encode()).hexdigest()[:16]
    with _refused("wandb"):
        wandb_run: Any = setup_wandb(trial_id=own, trial_name=model, group=name, project="cbtm-ray")
    exit_code = 1
    try:
        yield lambda numbers, step: wandb_run.log(numbers, step=step)
        exit_code = 0
    finally:
        wandb_run.finish(exit_code)


@contextlib.contextmanager
def _refused(tracker: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"train.trackers names {tracker!r}, which this node cannot use: {str(error).splitlines()[0]} Install it and "
            "log in on every node (runtime environment), or leave it out."
        ) from error
