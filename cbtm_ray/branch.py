"""Branch the seed into K experts, and train each as a Ray Train run of its own. Nothing is shared between the runs.

K may exceed what the cluster holds: a bounded number of runs is in flight, the others wait. Ray places them, restarts them
and keeps their checkpoints; this file decides only which runs there are and which of them are still to do.
"""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cbtm_ray import files, flops, progress
from cbtm_ray.board import Board
from cbtm_ray.config import Config
from cbtm_ray.run import Run, no_space_left
from cbtm_ray.train import TrainSpec, train_model

if TYPE_CHECKING:
    from cbtm_ray.tokens import PackedSequences

DENSE = "controls/dense"
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One independent training run: what to start from, whose documents to read, how to train."""

    cluster: int | None
    """Cluster whose documents are read; None reads all."""
    partition: str | None = None
    """Folder of the run that says which cluster a document is of: a control's. None: the shards themselves say."""
    init: str | None
    """Model to start from, a folder URI or a Hugging Face name; None is a new model."""
    spec: TrainSpec


def expert_folder(cluster: int, control: str | None = None) -> str:
    return f"{f'controls/{control}' if control else 'experts'}/cluster={cluster:04d}"


def partition_folder(control: str) -> str:
    """Where the run keeps which cluster of the control every document is of."""
    return f"shards/controls/{control}"


def seed_branch(run: Run) -> Branch:
    seed, name = run.config.seed_model, run.config.seed_model.name_or_path
    tokens_per_step = run.config.train.batch_size * run.config.tokens.sequence_length
    return Branch(
        cluster=None,
        init=files.absolute(name) if name and files.exists(name) else name,
        spec=_spec(
            run.config,
            name="seed",
            steps=-(-seed.train_tokens // tokens_per_step),
            learning_rate=seed.learning_rate,
            final_lr_fraction=seed.final_lr_fraction,
        ),
    )


def expert_branches(run: Run) -> list[Branch]:
    """The dense control and the K experts, the longest first.

    Each expert gets total/K tokens, rounded down to whole steps, and the control as many as all experts together (the
    paper's compute-matched comparison), so that K = 1 and the dense control are the same run.
    """
    n_clusters = run.config.cluster.n_clusters
    steps = _steps_each(run.config, n_clusters)
    return [
        _branch(run, DENSE, None, n_clusters * steps),
        *(_branch(run, expert_folder(cluster), cluster, steps) for cluster in range(n_clusters)),
    ]


def control_branches(run: Run, control: str) -> list[Branch]:
    """The experts of a control, one for each of its clusters: the same budget, rounded down to whole steps of each."""
    partition = partition_folder(control)
    n_clusters = run.need(partition, "partition_corpus")["n_clusters"]
    steps = _steps_each(run.config, n_clusters)
    return [_branch(run, expert_folder(cluster, control), cluster, steps, partition) for cluster in range(n_clusters)]


def _steps_each(config: Config, n_experts: int) -> int:
    """Optimiser steps that the budget gives each expert; ValueError if it is not one."""
    per_step = config.train.batch_size * config.tokens.sequence_length
    if (steps := config.train.total_tokens // n_experts // per_step) == 0:
        raise ValueError(
            f"train.total_tokens={config.train.total_tokens} must give each of {n_experts} experts at least one step of "
            f"{per_step} tokens; raise it to {n_experts * per_step}."
        )
    return steps


def _branch(run: Run, name: str, cluster: int | None, steps: int, partition: str | None = None) -> Branch:
    train = run.config.train
    spec = _spec(
        run.config,
        name=name,
        steps=steps,
        learning_rate=train.learning_rate,
        final_lr_fraction=train.final_lr_fraction,
    )
    return Branch(cluster=cluster, partition=partition, init=run.uri("seed"), spec=spec)


def train_branches(
    run: Run, branches: list[Branch], *, title: str, cpus: float, slots: int | None, per_run: int = 1
) -> None:
    """Train every branch that has no manifest yet: `per_run` in a Ray Train run, one after the other, `slots` runs at once.

    A failing run leaves the others alone; when all have ended, the failures are raised together.

    Raises:
        ValueError: a branch refused its input, as its message says.
        RuntimeError: a run failed for another reason, with the names of what it left untrained.
    """
    groups = [group for group in _groups(branches, per_run) if _untrained(run, group)]
    waiting = [branch for group in groups for branch in _untrained(run, group)]
    if not waiting:
        return
    config = run.config
    in_flight = slots or _slots(cpus, config.train.gpus_per_expert)
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    failed: dict[str, BaseException] = {}
    # A pool of daemon threads: fit() never returns once an interrupt has shut Ray down, and must not hold the exit up.
    with ThreadPool(min(in_flight, len(groups))) as pool:
        fits = [
            pool.apply_async(
                _fit,
                (run, group, board, cpus, config.train.gpus_per_expert),
                callback=failed.update,
                error_callback=partial(failed.__setitem__, _run_name(group)),
            )
            for group in groups
        ]
        with progress.bar(title, sum(branch.spec.steps for branch in waiting), "steps") as done:
            while not all(fit.ready() for fit in fits):
                time.sleep(POLL_S)
                steps: Any = ray.get(board.steps.remote())
                done(sum(steps.values()))
    _raise_failures(failed, [branch.spec.name for branch in waiting if run.manifest(branch.spec.name) is None])


def _groups(branches: list[Branch], per_run: int) -> list[list[Branch]]:
    """What one run trains: at most `per_run` branches of equal length. The same whatever is finished, and so is its name."""
    return [
        members[first : first + per_run]
        for _, equal in itertools.groupby(branches, key=lambda branch: branch.spec.steps)
        for members in [list(equal)]
        for first in range(0, len(members), per_run)
    ]


def _untrained(run: Run, branches: list[Branch]) -> list[Branch]:
    return [branch for branch in branches if run.manifest(branch.spec.name) is None]


def _run_name(group: list[Branch]) -> str:
    name = group[0].spec.name.replace("/", "-")
    return name if len(group) == 1 else f"{name}-and-{len(group) - 1}-more"


def _spec(config: Config, **own: Any) -> TrainSpec:
    shared = ("batch_size", "micro_batch_size", "schedule", "warmup_steps", "betas", "weight_decay", "clip_norm",
              "precision", "cross_documents", "activation_checkpointing", "compile", "log_every", "checkpoint_every",
              "evaluate_every", "evaluate_sequences")  # fmt: skip
    return TrainSpec(
        sequence_length=config.tokens.sequence_length, **{name: getattr(config.train, name) for name in shared}, **own
    )


def _slots(cpus: float, gpus: float) -> int:
    """How many runs of this size the cluster holds at once, at least 1."""
    have = ray.cluster_resources()
    fits = have.get("CPU", 0) / cpus
    return max(1, int(min(fits, have.get("GPU", 0) / gpus) if gpus else fits))


def _fit(run: Run, group: list[Branch], board: Any, cpus: float, gpus: float) -> dict[str, ValueError]:
    """One Ray Train run; the branches that refused their input, by name."""
    storage, name = run.uri("checkpoints"), _run_name(group)
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    trainer: Any = TorchTrainer(
        _train_loop,  # type: ignore[arg-type]  # its return value is Result.return_value
        train_loop_config={"config": run.config, "group": group, "board": board},
        scaling_config=ScalingConfig(num_workers=1, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=run.config.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    refused = {name: ValueError(message) for name, message in trainer.fit().return_value.items()}
    if not refused:
        files.delete(files.join(storage, name))
    return refused


def _raise_failures(failed: dict[str, BaseException], untrained: list[str]) -> None:
    for error in failed.values():
        if isinstance(error, ValueError):
            raise error
    if failed:
        name, error = next(iter(failed.items()))
        raise RuntimeError(
            f"{len(failed)} training runs failed and left untrained: {', '.join(untrained)}. The others are finished and "
            f"kept; the same command trains what is missing. First failure, {name}: {error}"
        ) from error


def _train_loop(task: dict[str, Any]) -> dict[str, str]:
    """What a Ray Train worker runs: what its branches refused, by name.

    Only what a restart would meet again is returned, a user's mistake or a full disk; all else is raised, and Ray restarts.
    """
    config, refused = task["config"], {}
    for branch in _untrained(Run(config), task["group"]):
        try:
            _train_branch(config, branch, task["board"])
        except ValueError as error:
            refused[branch.spec.name] = str(error)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            refused[branch.spec.name] = no_space_left(config.run.dir)
    return refused


def _train_branch(config: Config, branch: Branch, board: Any) -> None:
    # Imported in the worker alone: the run's controller imports this file too, and transformers takes seconds.
    from cbtm_ray.models import load_model, new_model, save_model
    from cbtm_ray.tokens import load_tokenizer

    run, spec, started = Run(config), branch.spec, time.perf_counter()
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    if branch.init is None:
        model = new_model(config.seed_model, tokenizer, 4 * spec.sequence_length, config.run.seed)
    else:
        model = load_model(branch.init)
    torch.nn.Module.to(model, "cuda" if config.train.gpus_per_expert else "cpu")
    sequences, valid = read_sequences(run, branch, tokenizer.eos_token_id)
    curve = train_model(
        model,
        sequences,
        spec,
        valid=valid,
        state=_last_state(spec.name),
        save=partial(_report_checkpoint, spec.name),
        log=lambda point: board.post.remote(spec.name, point["step"]),
    )
    save_model(model.cpu(), tokenizer, run.uri(spec.name))
    per_token = flops.model_flops_per_token(model, spec.sequence_length)
    train_tokens = spec.steps * spec.tokens_per_step
    last = curve[-1] if curve else {}
    run.finish(
        spec.name,
        {
            "cluster": branch.cluster,
            "init": branch.init,
            "steps": spec.steps,
            "train_tokens": train_tokens,
            "epochs": spec.steps * spec.batch_size / sequences.per_epoch,
            "valid_loss_nats": last.get("valid_loss_nats"),
            "valid_tokens": 0 if valid is None else spec.valid_sequences(valid) * valid.sequence_length,
            "parameters": sum(p.numel() for p in model.parameters()),
            "infer_flops_per_token": per_token,
            "train_flops": flops.train_flops(per_token, train_tokens),
            "mfu": last.get("mfu"),
            "seconds": round(time.perf_counter() - started, 1),
            "curve": curve,
        },
    )


def read_sequences(run: Run, branch: Branch, end_of_text: int) -> tuple[PackedSequences, PackedSequences | None]:
    """Training sequences of the branch's cluster, and held-out ones: shorter if its held-out documents are, None without.

    A control's partition is one of training documents alone.
    """
    from cbtm_ray.tokens import PackedSequences, read_documents  # as in _train_branch

    shards, partition_uri = run.uri("shards"), run.uri(branch.partition) if branch.partition else None
    train = read_documents(shards, "train", branch.cluster, partition_uri)
    held_out = [] if partition_uri else read_documents(shards, "valid", branch.cluster)
    length, seed = branch.spec.sequence_length, run.config.run.seed
    sequences = PackedSequences(train, sequence_length=length, end_of_text=end_of_text, seed=seed)
    if not held_out:
        return sequences, None
    length = min(length, sum(len(tokens) + 1 for tokens in held_out))
    return sequences, PackedSequences(held_out, sequence_length=length, end_of_text=end_of_text, seed=seed)


def _last_state(name: str) -> dict[str, Any] | None:
    """The state in the run's last checkpoint, if that is of this branch and not of one before it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        saved = torch.load(os.path.join(folder, "state.pt"), weights_only=True, map_location="cpu")
    return saved["state"] if saved["name"] == name else None


def _report_checkpoint(name: str, state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"name": name, "state": state}, Path(folder) / "state.pt")
        ray.train.report({"step": state["step"]}, checkpoint=Checkpoint.from_directory(folder))


def seed_cpus(config: Config) -> float:
    """CPUs for the seed's training, which has the cluster to itself: the most that one node has."""
    return config.seed_model.cpus or max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])


def train_seed(run: Run) -> dict[str, Any]:
    """Stage `seed/`: the model that all experts start from."""
    run.need("shards", "partition_corpus")
    branch = seed_branch(run)
    train_branches(run, [branch], title="train_seed", cpus=seed_cpus(run.config), slots=1)
    return run.need("seed", "train_seed")


def train_experts(run: Run) -> dict[str, Any]:
    """Stage `experts/`: K experts, and the dense control of the same total tokens in `controls/dense/`."""
    run.need("seed", "train_seed")
    branches = expert_branches(run)
    _train_beside_each_other(run, branches, "train_experts")
    manifests = [run.need(branch.spec.name, "train_experts") for branch in branches]
    return {
        "experts": len(manifests) - 1,
        "train_tokens": sum(m["train_tokens"] for m in manifests[1:]),
        "dense_train_tokens": manifests[0]["train_tokens"],
        "parameters": manifests[0]["parameters"],
    }


def train_control(run: Run, control: str) -> dict[str, Any]:
    """Stage `controls/CONTROL/`: the experts of a control.

    The first one trains those of all controls, so that no slot is idle while one of them ends.
    """
    run.need("seed", "train_seed")
    branches = [branch for each in run.config.train.controls for branch in control_branches(run, each)]
    _train_beside_each_other(run, sorted(branches, key=lambda branch: -branch.spec.steps), "train_controls")
    manifests = [run.need(branch.spec.name, "train_experts") for branch in control_branches(run, control)]
    return {"experts": len(manifests), "train_tokens": sum(manifest["train_tokens"] for manifest in manifests)}


def _train_beside_each_other(run: Run, branches: list[Branch], title: str) -> None:
    train = run.config.train
    train_branches(
        run, branches, title=title, cpus=train.cpus_per_expert, slots=train.slots, per_run=train.experts_per_run
    )
