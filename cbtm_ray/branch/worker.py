"""What a Ray Train worker runs: one branch after the other, from its last checkpoint to its Hugging Face folder.

The controllers of the runs import this file too, so what takes seconds to import is imported inside the functions.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
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
from cbtm_ray.run import Run, no_space_left
from cbtm_ray.train import flops, parallel
from cbtm_ray.train.checkpoints import Checkpoints
from cbtm_ray.train.packed_sequences import PackedSequences, held_out_sequences, read_documents
from cbtm_ray.train.trainer import Leaving, train_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Post = Callable[[str, dict[str, Any]], Any]
"""Adds news of a branch to the board."""

UNTRAINED: dict[str, Any] = {"epochs": 0.0, "valid_loss_nats": None, "valid_tokens": 0, "mfu": None, "curve": []}
"""What the manifest says of training where a seed is taken as it is, for which no document is read."""


def train_group(task: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """Train the group's branches, as each worker of a Ray Train run does.

    Returns (user errors by branch name, True if a preemption notice made it stop early). Only what a restart would meet
    again is returned, a user's mistake or a full disk; all else is raised, and Ray restarts. So is a full disk where several
    workers train, since it need not be full for all of them.
    """
    config, board, refused = task["config"], task["board"], dict[str, str]()
    run, post = Run(config), board.post.remote if parallel.rank() == 0 else _say_nothing
    for branch in task["group"]:
        name = branch.spec.name
        if run.manifest(name) is not None:
            continue
        post(name, {"state": "running", "node": socket.gethostname()})
        state = "failed"
        try:
            manifest = _train_branch(run, branch, board, post)
            if manifest is not None:
                starts = ray.get(board.starts.remote(name))
                run.finish(name, {**manifest, "starts": starts, "ended": time.time()})
                files.delete(run.uri("checkpoints", name))
            state = "done"
        except Leaving:
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


def _train_branch(run: Run, branch: Branch, board: Any, post: Post) -> dict[str, Any] | None:
    """Train a branch and write its model's folder; the manifest, of the first worker."""
    from cbtm_ray.models import save_model

    spec, started = branch.spec, time.perf_counter()
    with parallel.agreed():
        model, tokenizer = _load(run, branch)
    trained = _train(run, branch, model, tokenizer.eos_token_id, board, post) if spec.steps else UNTRAINED
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
    run: Run, branch: Branch, model: PreTrainedModel, end_of_text: int, board: Any, post: Post
) -> dict[str, Any]:
    """Train the branch's model in place, from its last checkpoint on; what the manifest says of that."""
    spec, first = branch.spec, parallel.rank() == 0
    with ExitStack() as stack:
        with parallel.agreed():
            sequences, valid = read_sequences(run, branch, end_of_text)
            checkpoints = stack.enter_context(closing(Checkpoints(run.checkpoints(spec.name))))
            state = checkpoints.last()
            tell = stack.enter_context(tracking(run.config.train.trackers if first else (), run.dir, spec.name))
        if first:
            board.begin.remote(spec.name, socket.gethostname(), state["step"] if state else 0)

        def log(point: dict[str, Any]) -> None:
            post(spec.name, point)
            tell(point)

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


def _manifest(branch: Branch, model: PreTrainedModel, content: str) -> dict[str, Any]:
    """What the manifest says of the branch's model and of how much it was trained."""
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


def _write_events(run: Run, name: str, curve: list[dict[str, Any]]) -> None:
    if run.config.train.tensorboard:
        from cbtm_ray.train.tensorboard import write_events

        write_events(curve, run.uri("tensorboard", name))


def _say_nothing(name: str, news: dict[str, Any]) -> None:
    """What is posted of a branch comes from its first worker."""
