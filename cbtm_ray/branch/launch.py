"""Branch the seed into K experts, and train each as a Ray Train run of its own. Nothing is shared between the runs.

K may exceed what the cluster holds: a bounded number of runs is in flight, the others wait. Ray places and restarts them;
`branches.py` says what they train, and this file which of them are still to do.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import Any, NoReturn

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cbtm_ray import files, progress
from cbtm_ray.branch.branches import Branch, control_branches, expert_branches, seed_branch
from cbtm_ray.branch.training_progress import TrainingProgress
from cbtm_ray.branch.warm_start import check_warm_start
from cbtm_ray.branch.worker import train_group
from cbtm_ray.config import Config
from cbtm_ray.errors import UserError
from cbtm_ray.manifests import ModelManifest
from cbtm_ray.ray_session import TRAINING_ENV, capacity, check_fits
from cbtm_ray.run import Run, Unfinished
from cbtm_ray.stages import DENSE_FOLDER, expert_folder

POLL_S = 0.5


def train_branches(
    run: Run, branches: list[Branch], *, title: str, cpus: float, slots: int | None, per_run: int = 1
) -> None:
    """Train every branch that has no manifest yet: `per_run` in a Ray Train run, one after the other, `slots` runs at once.

    A failing run leaves the others alone; when all have ended, the failures are raised together.

    Raises:
        UserError: a branch refused its input, as its message says.
        RuntimeError: a run failed for another reason, with the names of what it left untrained.
    """
    waiting, gpus = _untrained(run, branches), run.config.train.gpus_per_expert
    for branch in branches:
        if branch not in waiting:  # a worker may have been killed just before it did this
            files.delete(run.uri("checkpoints", branch.spec.name))
    if not waiting:
        return
    check_fits("train.gpus_per_expert", "GPU", gpus)
    groups = [group for group in _groups(branches, per_run) if any(branch in waiting for branch in group)]
    # On the driver's own node: the run would fail with any other node that held the actor.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    training_progress: Any = ray.remote(num_cpus=0)(TrainingProgress).options(scheduling_strategy=here).remote()
    with progress.experts(title, {branch.spec.name: branch.spec.steps for branch in waiting}) as show:
        fit = partial(_fit, run, training_progress=training_progress, cpus=cpus, gpus=gpus)
        failed = _fit_all(groups, fit, slots or _slots(cpus, gpus), training_progress, show)
    if failed:
        _raise_failures(failed, [branch.spec.name for branch in _untrained(run, waiting)])
    _say_epochs(run, waiting)


def _fit_all(
    groups: list[list[Branch]],
    fit: Callable[..., Any],
    in_flight: int,
    training_progress: Any,
    show: Callable[[Any], None],
) -> dict[str, BaseException]:
    """Fit the groups, `in_flight` at once, and show their progress. Returns failures by name of branch or run."""
    failed: dict[str, BaseException] = {}
    # A pool of daemon threads: fit() never returns once an interrupt has shut Ray down, and must not hold the exit up.
    with ThreadPool(min(in_flight, len(groups))) as pool:
        fits = []
        for group in groups:
            fail = partial(failed.__setitem__, _run_name(group))
            fits.append(pool.apply_async(fit, (group,), callback=failed.update, error_callback=fail))
        while not all(fit.ready() for fit in fits):
            time.sleep(POLL_S)
            rows: Any = ray.get(training_progress.rows.remote())
            show(_with_failed_runs(rows, [group for group in groups if _run_name(group) in failed]))
    return failed


def _with_failed_runs(rows: dict[str, dict[str, Any]], failed: list[list[Branch]]) -> dict[str, dict[str, Any]]:
    """The rows of progress, with `failed` for every branch that a failed Ray Train run left untrained."""
    names = [branch.spec.name for group in failed for branch in group]
    lost = {
        name: {**rows.get(name, {}), "state": "failed"} for name in names if rows.get(name, {}).get("state") != "done"
    }
    return {**rows, **lost}


def _say_epochs(run: Run, branches: list[Branch]) -> None:
    """One line if documents were read more than once: an expert's cluster may be smaller than its budget."""
    epochs = {branch.spec.name: run.require(branch.spec.name, "train_experts")["epochs"] for branch in branches}
    most, repeated = max(epochs, key=lambda name: epochs[name]), sum(count > 1 for count in epochs.values())
    if repeated:
        progress.note(
            f"{repeated} of {len(epochs)} read their documents more than once: {most} {epochs[most]:.1f} times"
        )


def _groups(branches: list[Branch], per_run: int) -> list[list[Branch]]:
    """The branches of each Ray Train run: at most `per_run` neighbors, experts with experts and never with the dense control.

    The same whatever is finished, and so is its name.
    """
    return [
        members[first : first + per_run]
        for _, alike in itertools.groupby(branches, key=lambda branch: branch.cluster is None)
        for members in [list(alike)]
        for first in range(0, len(members), per_run)
    ]


def _untrained(run: Run, branches: list[Branch]) -> list[Branch]:
    return [branch for branch in branches if run.manifest(branch.spec.name) is None]


def _run_name(group: list[Branch]) -> str:
    name = group[0].spec.name.replace("/", "-")
    return name if len(group) == 1 else f"{name}-and-{len(group) - 1}-more"


def _slots(cpus: float, gpus: float) -> int:
    """How many runs of this size the cluster holds at once, at least 1."""
    fits = capacity("CPU") / cpus
    return max(1, int(min(fits, capacity("GPU") / gpus) if gpus else fits))


def _fit(run: Run, group: list[Branch], training_progress: Any, cpus: float, gpus: float) -> dict[str, UserError]:
    """One Ray Train run, and another when it left a node that will be taken away; what refused its input, by name."""
    storage, name = run.uri("checkpoints", "_ray"), _run_name(group)
    filesystem, path = files.resolve(storage)  # of a URI Ray would make one that knows no other server for gs://
    workers = run.config.train.workers_per_expert
    resources = {"CPU": cpus / workers, **({"GPU": gpus / workers} if gpus else {})}
    left = True
    while left:
        trainer: Any = TorchTrainer(
            train_group,  # type: ignore[arg-type]  # its return value is Result.return_value
            train_loop_config={"config": run.config, "group": group, "training_progress": training_progress},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources),
            run_config=RunConfig(  # type: ignore[call-arg]  # mypy takes it for the older class of this name
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=run.config.train.max_failures),
                worker_runtime_env={"env_vars": TRAINING_ENV},
            ),
        )
        refused, left = trainer.fit().return_value
    if not refused:
        files.delete(files.join(storage, name))
    return {name: UserError(message) for name, message in refused.items()}


def _raise_failures(failed: dict[str, BaseException], untrained: list[str]) -> NoReturn:
    for error in failed.values():
        if isinstance(error, UserError):
            raise error
    name, error = next(iter(failed.items()))
    raise RuntimeError(
        f"{len(failed)} training runs failed and left untrained: {', '.join(untrained)}. The others are finished and "
        f"kept; the same command trains what is missing. First failure, {name}: {error}"
    ) from error


def seed_cpus(config: Config, nodes: list[dict[str, Any]]) -> float:
    """CPUs for the seed's training, which has the cluster to itself: all of the largest living node that has its GPUs too.

    Without such a node, as on a cluster whose nodes come when work waits for them, as many as an expert's training.

    Args:
        nodes: as `ray.nodes()` gives them.
    """
    train = config.train
    gpus_per_worker = train.gpus_per_expert / train.workers_per_expert
    living = [node["Resources"] for node in nodes if node["Alive"]]
    largest = max((each.get("CPU", 0) for each in living if each.get("GPU", 0) >= gpus_per_worker), default=0)
    return config.seed_model.cpus or largest or train.cpus_per_expert


def train_seed(run: Run) -> dict[str, Any]:
    """Stage `seed/`: the model that all experts start from."""
    run.require("shards", "partition_corpus")
    branch = seed_branch(run)
    cpus = seed_cpus(run.config, ray.nodes())
    check_fits("seed_model.cpus", "CPU", cpus)
    train_branches(run, [branch], title="train_seed", cpus=cpus, slots=1)
    return run.require("seed", "train_seed")


def train_experts(run: Run) -> dict[str, Any]:
    """Stage `experts/`: K experts, and the dense control of the same total tokens in `controls/dense/`."""
    run.require("seed", "train_seed")
    run.claim(DENSE_FOLDER)
    branches = expert_branches(run)
    asked = run.config.train.clusters
    chosen = None if asked is None else {expert_folder(cluster) for cluster in asked}
    _train_beside_each_other(
        run, [branch for branch in branches if chosen is None or branch.spec.name in chosen], "train_experts"
    )
    if asked is not None and (missing := [branch.spec.name for branch in _untrained(run, branches)]):
        raise Unfinished(
            f"train.clusters={list(asked)} are trained. Still missing: {', '.join(missing)}; "
            "the same command without train.clusters trains them."
        )
    manifests: list[ModelManifest] = [run.require(branch.spec.name, "train_experts") for branch in branches]
    return {
        "experts": len(manifests) - 1,
        "train_tokens": sum(m["train_tokens"] for m in manifests[1:]),
        "dense_train_tokens": manifests[0]["train_tokens"],
        "parameters": manifests[0]["parameters"],
        "content": [m.get("content") for m in manifests[1:]],
    }


def train_control(run: Run, control: str) -> Mapping[str, Any]:
    """Stage `controls/CONTROL/`: the experts of a control, or the one model that is a mixture of experts.

    The first one trains those of all controls, so that no slot is idle while one of them ends.
    """
    run.require("seed", "train_seed")
    branches = [branch for each in run.config.train.controls for branch in control_branches(run, each)]
    for each in run.config.train.controls:
        run.claim(f"controls/{each}")
    _train_beside_each_other(run, sorted(branches, key=lambda branch: -branch.spec.steps), "train_controls")
    manifests: list[ModelManifest] = [
        run.require(branch.spec.name, "train_experts") for branch in control_branches(run, control)
    ]
    if control == "moe":
        return manifests[0]
    return {
        "experts": len(manifests),
        "train_tokens": sum(manifest["train_tokens"] for manifest in manifests),
        "content": [manifest.get("content") for manifest in manifests],
    }


def _train_beside_each_other(run: Run, branches: list[Branch], title: str) -> None:
    check_warm_start(run, [branch.spec.name for branch in branches])
    train = run.config.train
    check_fits("train.cpus_per_expert", "CPU", train.cpus_per_expert)
    train_branches(
        run, branches, title=title, cpus=train.cpus_per_expert, slots=train.slots, per_run=train.experts_per_run
    )
