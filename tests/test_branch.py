"""Independent training runs: budgets, the dense control as K = 1, failures that stay apart, recovery from a kill."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel

from cbtm_ray import files
from cbtm_ray.branch import (
    DENSE,
    Branch,
    _groups,
    _run_name,
    expert_branches,
    expert_folder,
    read_sequences,
    seed_branch,
    train_branches,
)
from cbtm_ray.config import Config
from cbtm_ray.load_config import build_config
from cbtm_ray.models import load_model
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run
from cbtm_ray.tokens import load_tokenizer, read_documents
from cbtm_ray.train import train_model
from tests.tiny import tiny_tree, write_corpus

pytestmark = pytest.mark.ray


def test_experts_share_the_budget_and_the_control_gets_all_of_it(tiny_config: Config) -> None:
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, total_tokens=128 * 21))
    run = Run(config)
    branches = {branch.spec.name: branch for branch in expert_branches(run)}
    assert {name: branch.spec.steps for name, branch in branches.items()} == {
        DENSE: 20, expert_folder(0): 10, expert_folder(1): 10,
    }  # fmt: skip
    assert [branch.cluster for branch in branches.values()] == [None, 0, 1]
    assert {branch.init for branch in branches.values()} == {run.uri("seed")}
    assert seed_branch(run).spec.steps == 12


def one_cluster_run(tmp_path: Path) -> Run:
    tree = tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus", documents=60))
    tree["cluster"]["n_clusters"] = 1
    run = Run(build_config(tree))
    for job in ("build_corpus", "fit_clusters", "partition_corpus"):
        run_job(run, job)
    return run


def test_one_expert_is_given_what_the_dense_control_is_given(tmp_path: Path, ray_cluster: None) -> None:
    run = one_cluster_run(tmp_path)
    dense, expert = expert_branches(run)
    assert expert == dataclasses.replace(dense, cluster=0, spec=dataclasses.replace(dense.spec, name=expert_folder(0)))
    theirs, ours = (read_documents(run.uri("shards"), "train", branch.cluster) for branch in (dense, expert))
    assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert len(ours) > 20


@pytest.mark.slow
def test_one_cluster_is_the_dense_control(tmp_path: Path, ray_cluster: None) -> None:
    run = one_cluster_run(tmp_path)
    for job in ("train_seed", "train_experts"):
        run_job(run, job)
    expert, dense = (files.read_bytes(run.uri(name, "model.safetensors")) for name in (expert_folder(0), DENSE))
    assert expert == dense


def branch_of(run: Run, name: str, **changes: object) -> Branch:
    template = expert_branches(run)[1]
    return dataclasses.replace(template, spec=dataclasses.replace(template.spec, name=name), **changes)


def test_what_fails_leaves_the_others_alone_and_is_said(finished_run: Run, tmp_path: Path) -> None:
    """Beside it in the same Ray Train run, and in another."""
    names = ("extra/bad", "extra/beside", "extra/apart")
    bad, beside, apart = (branch_of(finished_run, name) for name in names)
    bad = dataclasses.replace(bad, init=str(tmp_path / "no_model"))
    with pytest.raises(ValueError, match="no causal language model can be loaded from"):
        train_branches(finished_run, [bad, beside, apart], title="test", cpus=1, slots=2, per_run=2)
    assert [finished_run.manifest(name) is not None for name in names] == [False, True, True]
    expert = files.read_bytes(finished_run.uri(expert_folder(0), "model.safetensors"))
    for name in names[1:]:
        assert files.read_bytes(finished_run.uri(name, "model.safetensors")) == expert


def test_runs_are_of_branches_of_equal_length_whatever_is_finished(tiny_config: Config) -> None:
    tree = dataclasses.replace(
        tiny_config,
        cluster=dataclasses.replace(tiny_config.cluster, n_clusters=5),
        train=dataclasses.replace(tiny_config.train, total_tokens=128 * 10),
    )
    groups = _groups(expert_branches(Run(tree)), 2)
    assert [[branch.cluster for branch in group] for group in groups] == [[None], [0, 1], [2, 3], [4]]
    assert [_run_name(group) for group in groups] == [
        "controls-dense",
        "experts-cluster=0000-and-1-more",
        "experts-cluster=0002-and-1-more",
        "experts-cluster=0004",
    ]


def train_here(run: Run, branch: Branch) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The same training without Ray and without an interruption."""
    sequences, valid = read_sequences(run, branch, load_tokenizer(run.uri("tokenizer")).eos_token_id)
    model = load_model(branch.init)
    kept: list[dict[str, Any]] = []
    curve = train_model(model, sequences, branch.spec, valid=valid, state=None, save=kept.append, log=kept.append)
    return model, curve


def kill_training_worker(manifest: Path, checkpoints: Path, killed: list[int]) -> None:
    """SIGKILL the training worker of this session's Ray once the second branch of its run has a checkpoint."""
    while not manifest.exists():
        time.sleep(0.01)
    before = set(checkpoints.glob("checkpoint_*/state.pt"))
    while not set(checkpoints.glob("checkpoint_*/state.pt")) - before:
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)


@pytest.mark.timeout(200)
def test_a_killed_worker_resumes_to_the_weights_of_undisturbed_training(finished_run: Run) -> None:
    template = branch_of(finished_run, "extra/victim")
    spec = dataclasses.replace(template.spec, steps=1200, checkpoint_every=300)
    branches = [
        dataclasses.replace(template, cluster=cluster, spec=dataclasses.replace(spec, name=f"extra/victim-{cluster}"))
        for cluster in (0, 1)
    ]
    killed: list[int] = []
    first = Path(finished_run.uri("extra/victim-0", "manifest.json"))
    checkpoints = Path(finished_run.uri("checkpoints", "extra-victim-0-and-1-more"))
    killer = threading.Thread(target=kill_training_worker, args=(first, checkpoints, killed), daemon=True)
    killer.start()
    train_branches(finished_run, branches, title="test", cpus=1, slots=1, per_run=2)
    killer.join(timeout=5)
    assert killed, "the worker was not killed while it trained"
    for branch in branches:
        model, curve = train_here(finished_run, branch)
        resumed = load_model(finished_run.uri(branch.spec.name)).state_dict()
        assert all(torch.equal(weights, resumed[name]) for name, weights in model.state_dict().items())
        theirs = finished_run.manifest(branch.spec.name)["curve"]
        fields = ("step", "loss_nats", "valid_loss_nats")
        assert [[p.get(f) for f in fields] for p in theirs] == [[p.get(f) for f in fields] for p in curve]


def test_the_held_out_loss_is_that_of_the_branch_s_own_documents(finished_run: Run) -> None:
    end_of_text = load_tokenizer(finished_run.uri("tokenizer")).eos_token_id
    for branch in expert_branches(finished_run):
        manifest = finished_run.manifest(branch.spec.name)
        _, valid = read_sequences(finished_run, branch, end_of_text)
        documents = read_documents(finished_run.uri("shards"), "valid", branch.cluster)
        assert len(documents) > 3
        assert sorted(valid.tokens) == sorted([*np.concatenate(documents), *[end_of_text] * len(documents)])
        model = load_model(finished_run.uri(branch.spec.name)).eval()
        batch = torch.from_numpy(valid.batch(0, min(valid.per_epoch, 32)))
        with torch.no_grad():
            expected = model(input_ids=batch, labels=batch).loss.item()
        assert manifest["valid_loss_nats"] == pytest.approx(expected, rel=1e-5)
        assert manifest["valid_tokens"] == len(batch) * 32
        assert manifest["curve"][-1]["valid_loss_nats"] == manifest["valid_loss_nats"]


def shards_of(run: Run, held_out: list[list[int]]) -> None:
    """Shards of one cluster with 100 tokens to train on."""
    for split, documents in (("train", [list(range(1, 101))]), ("valid", held_out)):
        uri = run.uri("shards", split, "part-00000.parquet")
        rows = [{"cluster": 0, "tokens": tokens} for tokens in documents]
        schema = pa.schema({"cluster": pa.int32(), "tokens": pa.list_(pa.int32())})
        with files.writing(uri) as stream:
            pq.write_table(pa.Table.from_pylist(rows, schema), stream)


@pytest.mark.parametrize(("held_out", "length"), [([[1, 2, 3], [4]], 6), ([[1] * 80], 32), ([], None)])
def test_few_held_out_documents_make_a_shorter_sequence_and_none_make_none(
    tiny_config: Config, tmp_path: Path, held_out: list[list[int]], length: int | None
) -> None:
    run = Run(dataclasses.replace(tiny_config, run=dataclasses.replace(tiny_config.run, dir=str(tmp_path))))
    shards_of(run, held_out)
    sequences, valid = read_sequences(run, expert_branches(run)[1], 0)
    assert sequences.sequence_length == 32
    assert (valid and valid.sequence_length) == length
