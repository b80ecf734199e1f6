"""What a Ray Train worker runs: one branch after the other, from its last checkpoint to its Hugging Face folder.

The controllers of the runs import this file too, so what takes seconds to import is imported inside the functions.
"""

from __future__ import annotations

import errno
import socket
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import ray.train
import torch

from cbtm_ray import files, flops
from cbtm_ray.checkpoints import Checkpoints
from cbtm_ray.run import Run, no_space_left
from cbtm_ray.train import train_model

if TYPE_CHECKING:
    from cbtm_ray.branch import Branch
    from cbtm_ray.tokens import PackedSequences


def train_group(task: dict[str, Any]) -> dict[str, str]:
    """What a Ray Train worker runs: what its branches refused, by name.

    Only what a restart would meet again is returned, a user's mistake or a full disk; all else is raised, and Ray restarts.
    """
    config, board, refused = task["config"], task["board"], {}
    run = Run(config)
    for branch in task["group"]:
        name = branch.spec.name
        if run.manifest(name) is not None:
            continue
        board.post.remote(name, {"state": "running", "node": socket.gethostname()})
        state = "failed"
        try:
            _train_branch(run, branch, board)
            state = "done"
        except ValueError as error:
            refused[name] = str(error)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            refused[name] = no_space_left(config.run.dir)
        finally:
            board.post.remote(name, {"state": state})
    return refused


def _train_branch(run: Run, branch: Branch, board: Any) -> None:
    from cbtm_ray.models import load_model, new_model, save_model
    from cbtm_ray.tokens import load_tokenizer

    config, spec, started = run.config, branch.spec, time.perf_counter()
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    if branch.init is None:
        model = new_model(config.seed_model, tokenizer, 4 * spec.sequence_length, config.run.seed)
    else:
        model = load_model(branch.init)
    torch.nn.Module.to(model, "cuda" if config.train.gpus_per_expert else "cpu")
    sequences, valid = read_sequences(run, branch, tokenizer.eos_token_id)
    with closing(Checkpoints(run.uri("checkpoints", spec.name))) as checkpoints:
        curve = train_model(
            model,
            sequences,
            spec,
            valid=valid,
            state=checkpoints.last(),
            save=checkpoints.save,
            log=partial(board.post.remote, spec.name),
            leaving=_leaving,
        )
    files.delete_unfinished(run.uri(spec.name))
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
    checkpoints.delete()


def read_sequences(run: Run, branch: Branch, end_of_text: int) -> tuple[PackedSequences, PackedSequences | None]:
    """Training sequences of the branch's cluster, and held-out ones: shorter if its held-out documents are, None without.

    A control's partition is one of training documents alone.
    """
    from cbtm_ray.tokens import PackedSequences, read_documents

    shards, partition_uri = run.uri("shards"), run.uri(branch.partition) if branch.partition else None
    train = read_documents(shards, "train", branch.cluster, partition_uri)
    held_out = [] if partition_uri else list(read_documents(shards, "valid", branch.cluster))
    length, seed = branch.spec.sequence_length, run.config.run.seed
    sequences = PackedSequences(train, sequence_length=length, end_of_text=end_of_text, seed=seed)
    if not held_out:
        return sequences, None
    length = min(length, sum(len(tokens) + 1 for tokens in held_out))
    return sequences, PackedSequences(held_out, sequence_length=length, end_of_text=end_of_text, seed=seed)


def _leaving() -> bool:
    """Whether Ray has been told that a node of this run will be taken away."""
    return ray.train.get_preemption_info() is not None
