"""The train loop of a Ray Train worker: one branch after the other, from its last checkpoint to its Hugging Face folder.

The controllers of the runs import this file too, so what takes seconds to import is imported inside the functions.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.train.torch
import torch

from cbtm_ray import files
from cbtm_ray.branch.branches import Branch
from cbtm_ray.branch.trackers import tracking
from cbtm_ray.errors import UserError
from cbtm_ray.manifests import CurvePoint, ModelFields, ModelManifest, TrainedFields
from cbtm_ray.run import Run, no_space_left
from cbtm_ray.train import flops, parallel
from cbtm_ray.train.checkpoints import Checkpoints
from cbtm_ray.train.packed_sequences import PackedSequences, held_out_sequences, read_documents
from cbtm_ray.train.trainer import Preempted, train_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Post = Callable[[str, Mapping[str, Any]], Any]
"""Posts fields of a branch, by its name, to TrainingProgress."""

UNTRAINED: TrainedFields = {"epochs": 0.0, "valid_loss_nats": None, "valid_tokens": 0, "mfu": None, "curve": []}
"""The training fields of the manifest of a branch of zero steps, which reads no documents."""


def train_group(task: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """Train the group's branches, as each worker of a Ray Train run does.

    Returns (user errors by branch name, True if a preemption notice made it stop early). Only what a restart would meet
    again is returned, a user's mistake or a full disk; all else is raised, and Ray restarts. So is a full disk where several
    workers train, since it need not be full for all of them.
    """
    config, training_progress, refused = task["config"], task["training_progress"], dict[str, str]()
    run, post = Run(config), training_progress.post.remote if parallel.rank() == 0 else _ignore
    for branch in task["group"]:
        name = branch.spec.name
        if run.manifest(name) is not None:
            continue
        post(name, {"state": "running", "node": socket.gethostname()})
        state = "failed"
        try:
            manifest = _train_branch(run, branch, training_progress, post)
            if manifest is not None:
                starts = ray.get(training_progress.starts.remote(name))
                run.finish(name, {**manifest, "starts": starts, "ended": time.time()})
                files.delete(run.uri("checkpoints", name))
            state = "done"
        except Preempted:
            state = "waiting"
            return refused, True
        except UserError as error:
            refused[name] = str(error)
        except OSError as error:
            if error.errno != errno.ENOSPC or parallel.workers() > 1:
                raise
            refused[name] = no_space_left(config.run.dir)
        finally:
            post(name, {"state": state})
    return refused, False


def _train_branch(run: Run, branch: Branch, training_progress: Any, post: Post) -> ModelManifest | None:
    """Train a branch and write its model's folder; the manifest, of the first worker."""
    from cbtm_ray.models import save_model

    spec, started = branch.spec, time.perf_counter()
    with parallel.agreed():
        model, tokenizer = _load(run, branch)
    trained = _train(run, branch, model, tokenizer.eos_token_id, training_progress, post) if spec.steps else UNTRAINED
    whole = parallel.whole_model(model)
    if parallel.rank() > 0:
        return None
    _write_events(run, spec.name, trained["curve"])
    files.delete_unfinished(run.uri(spec.name))
    content = save_model(whole, tokenizer, run.uri(spec.name))
    seconds = round(time.perf_counter() - started, 1)
    return {**_manifest(branch, whole, content), **trained, "workers": parallel.workers(), "seconds": seconds}


def _load(run: Run, branch: Branch) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the branch begins with, on the device to train on, and the run's tokenizer."""
    from cbtm_ray.branch.upcycle import upcycle
    from cbtm_ray.corpus.tokenizer import load_tokenizer
    from cbtm_ray.models import check_seed, check_tokenizer, load_model, new_model

    config, tokenizer = run.config, load_tokenizer(run.uri("tokenizer"))
    if branch.init is None:
        model = new_model(config.seed_model, tokenizer, 4 * branch.spec.sequence_length, config.run.seed)
    else:
        model = load_model(branch.init)
        check_tokenizer(branch.init, tokenizer)
        check_seed(model)
    if branch.upcycled_experts:
        model = upcycle(model, branch.upcycled_experts, config.run.seed)
    torch.nn.Module.to(model, ray.train.torch.get_device() if config.train.gpus_per_expert else "cpu")
    return model, tokenizer


def _train(
    run: Run, branch: Branch, model: PreTrainedModel, end_of_text: int, training_progress: Any, post: Post
) -> TrainedFields:
    """Train the branch's model in place, from its last checkpoint on; what the manifest says of that."""
    spec, first = branch.spec, parallel.rank() == 0
    with ExitStack() as stack:
        with parallel.agreed():
            sequences, valid = read_sequences(run, branch, end_of_text)
            checkpoints = stack.enter_context(closing(Checkpoints(run.checkpoints(spec.name))))
            state = checkpoints.last()
            log_point = stack.enter_context(tracking(run.config.train.trackers if first else (), run.dir, spec.name))
        if first:
            training_progress.begin.remote(spec.name, socket.gethostname(), state["step"] if state else 0)

        def log(point: CurvePoint) -> None:
            post(spec.name, point)
            log_point(point)

        save = partial(_save, run, spec.name, checkpoints)
        curve = train_model(
            model, sequences, spec, valid=valid, state=state, save=save, log=log,
            leaving=lambda: ray.train.get_preemption_info() is not None,
        )  # fmt: skip
    return {
        "epochs": spec.steps * spec.train.batch_size / sequences.per_epoch,
        "valid_loss_nats": curve[-1]["valid_loss_nats"],
        "valid_tokens": 0 if valid is None else spec.valid_sequences(valid) * valid.sequence_length,
        "mfu": curve[-1]["mfu"],
        "curve": curve,
    }


def _manifest(branch: Branch, model: PreTrainedModel, content: str) -> ModelFields:
    """The manifest's fields about the model and the amount of training."""
    spec = branch.spec
    per_token = flops.model_flops_per_token(model, spec.sequence_length)
    train_tokens = spec.steps * spec.tokens_per_step
    return {
        "cluster": branch.cluster,
        "init": branch.init,
        "content": content,
        "experts": getattr(model.config, "num_local_experts", 1),
        "steps": spec.steps,
        "train_tokens": train_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "infer_flops_per_token": per_token,
        "train_flops": flops.train_flops(per_token, train_tokens),
    }


def read_sequences(run: Run, branch: Branch, end_of_text: int) -> tuple[PackedSequences, PackedSequences | None]:
    """Training sequences of the branch's cluster, and held-out ones; a control's partition has training documents alone."""
    shards, partition_uri = run.uri("shards"), run.uri(branch.partition) if branch.partition else None
    train = read_documents(shards, "train", branch.cluster, partition_uri)
    packed: Any = {
        "sequence_length": branch.spec.sequence_length, "end_of_text": end_of_text, "seed": run.config.run.seed,
    }  # fmt: skip
    valid = None if partition_uri else held_out_sequences(shards, branch.cluster, **packed)
    return PackedSequences(train, **packed), valid


def _save(run: Run, name: str, checkpoints: Checkpoints, state: dict[str, Any]) -> None:
    checkpoints.save(state)
    _write_events(run, name, state["curve"])


def _write_events(run: Run, name: str, curve: list[CurvePoint]) -> None:
    if run.config.train.tensorboard:
        from cbtm_ray.train.tensorboard import write_events

        write_events(curve, run.uri("tensorboard", name))


def _ignore(name: str, news: Mapping[str, Any]) -> None:
    """Only the first worker of a branch posts."""
