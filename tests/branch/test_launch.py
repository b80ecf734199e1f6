"""Independent training runs: what they ask of the cluster, failures that stay apart, recovery from a kill."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
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
from rich.console import Console

from cbtm_ray import files, progress
from cbtm_ray.branch.branches import Branch, expert_branches, seed_branch
from cbtm_ray.branch.launch import _groups, _run_name, _say_epochs, _with_failed_runs, seed_cpus, train_branches
from cbtm_ray.branch.worker import _train_branch, read_sequences
from cbtm_ray.config import Config
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import dump_config
from cbtm_ray.models import load_model
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run, Unfinished
from cbtm_ray.stages import DENSE_FOLDER, expert_folder
from cbtm_ray.train.packed_sequences import read_documents
from tests.support.seeded_run import seeded_run, train_here
from tests.support.tiny import one_cluster
from tests.support.tiny_models import changed

pytestmark = pytest.mark.ray


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    """As `ray.nodes()` says it, which leaves out what a node has none of."""
    return {"Alive": alive, "Resources": {kind: n for kind, n in (("CPU", cpus), ("GPU", gpus)) if n}}


@pytest.mark.parametrize(
    ("train", "nodes", "cpus"),
    [
        ({}, [node(0), node(4), node(16), node(32, alive=False)], 16),
        ({}, [node(0)], 1),  # a head that keeps work off it, and workers yet to come
        ({"cpus_per_expert": 3}, [node(0)], 3),
        ({"gpus_per_expert": 1, "cpus_per_expert": 4}, [node(0), node(16)], 4),  # no node has 16 CPUs and a GPU
        ({"gpus_per_expert": 1, "cpus_per_expert": 2}, [node(16), node(8, gpus=1)], 8),
        ({"gpus_per_expert": 4, "workers_per_expert": 2}, [node(8, gpus=2), node(64, gpus=1)], 8),
    ],
)
def test_the_seed_asks_for_what_a_node_has_and_never_for_nothing(
    tiny_config: Config, train: dict[str, Any], nodes: list[dict[str, Any]], cpus: float
) -> None:
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, **train))
    assert seed_cpus(config, nodes) == cpus
    asked = dataclasses.replace(config, seed_model=dataclasses.replace(config.seed_model, cpus=5))
    assert seed_cpus(asked, nodes) == 5


@pytest.mark.slow
def test_one_cluster_is_the_dense_control(finished_run: Run, tmp_path: Path) -> None:
    run = one_cluster(finished_run.config, tmp_path)
    for name in ("corpus", "tokenizer"):
        shutil.copytree(finished_run.uri(name), run.uri(name))
    for job in ("fit_clusters", "partition_corpus"):
        run_job(run, job)
    theirs, ours = (list(read_documents(run.uri("shards"), "train", cluster)) for cluster in (None, 0))
    assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert len(ours) > 100
    for job in ("train_seed", "train_experts"):
        run_job(run, job)
    expert, dense = (files.read_bytes(run.uri(name, "model.safetensors")) for name in (expert_folder(0), DENSE_FOLDER))
    assert expert == dense


def branch_of(run: Run, name: str, **changes: object) -> Branch:
    template = expert_branches(run)[1]
    return dataclasses.replace(template, spec=dataclasses.replace(template.spec, name=name), **changes)


@pytest.mark.parametrize("others", [("beside",), pytest.param(("beside", "apart"), marks=pytest.mark.slow)])
def test_what_fails_leaves_the_others_alone_and_is_said(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...]
) -> None:
    """Beside it in the same Ray Train run, and in another; a terminal shows every state."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=110, height=30)
    monkeypatch.setattr(progress, "console", terminal)
    names = [f"extra_{len(others)}/{name}" for name in ("bad", *others)]
    bad, *good = (branch_of(finished_run, name) for name in names)
    bad = dataclasses.replace(bad, init=str(tmp_path / "no_model"))
    with pytest.raises(UserError, match="no causal language model can be loaded from"):
        train_branches(finished_run, [bad, *good], title="test", cpus=1, slots=2, per_run=2)
    assert [finished_run.manifest(name) is not None for name in names] == [False, *(True for _ in good)]
    shown = terminal.file.getvalue()
    assert f"{len(names)} waiting" in shown
    assert f"1 failed, {len(good)} done" in shown
    assert socket.gethostname() in shown
    expert = files.read_bytes(finished_run.uri(expert_folder(0), "model.safetensors"))
    for name in names[1:]:
        assert files.read_bytes(finished_run.uri(name, "model.safetensors")) == expert


def test_runs_are_of_experts_or_of_a_control_whatever_is_finished(tiny_config: Config) -> None:
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


def test_what_a_dead_run_left_untrained_has_failed(tiny_config: Config) -> None:
    branches = expert_branches(Run(tiny_config))
    dense, first, second = (branch.spec.name for branch in branches)
    rows = {dense: {"state": "running", "step": 3}, first: {"state": "done"}, second: {"state": "running", "step": 2}}
    assert _with_failed_runs(rows, [branches[1:]]) == {**rows, second: {"state": "failed", "step": 2}}
    assert _with_failed_runs({}, [branches[:1]]) == {dense: {"state": "failed"}}


def part_of(finished_run: Run, folder: Path, clusters: tuple[int, ...], finished: tuple[str, ...]) -> Run:
    """The run up to its seed and these experts, with `train.clusters`."""
    for name in ("tokenizer", "shards", "seed", *finished):
        shutil.copytree(finished_run.uri(name), folder / name)
    config = finished_run.config
    return Run(
        dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, dir=str(folder)),
            train=dataclasses.replace(config.train, clusters=clusters),
        )
    )


def test_a_part_of_the_experts_leaves_the_stage_unfinished_and_says_what_is_missing(
    finished_run: Run, tmp_path: Path
) -> None:
    run = part_of(finished_run, tmp_path, (1,), (expert_folder(1),))
    expected = (
        rf"^train\.clusters=\[1\] are trained\. Still missing: {DENSE_FOLDER}, {expert_folder(0)}; the same command"
    )
    with pytest.raises(Unfinished, match=expected):
        run_job(run, "train_experts")
    assert run.manifest("experts") is None
    assert [run.manifest(name) is not None for name in (DENSE_FOLDER, expert_folder(0), expert_folder(1))] == [0, 0, 1]


def test_the_last_part_finishes_the_stage(finished_run: Run, tmp_path: Path) -> None:
    run = part_of(finished_run, tmp_path, (0,), (DENSE_FOLDER, expert_folder(0), expert_folder(1)))
    run_job(run, "train_experts")
    assert run.manifest("experts")["experts"] == 2


@pytest.mark.slow
def test_a_job_trains_the_experts_asked_for_and_no_others(finished_run: Run, tmp_path: Path) -> None:
    run = part_of(finished_run, tmp_path, (1,), ())
    (tmp_path / "part.yaml").write_text(dump_config(run.config))
    job = [sys.executable, "-m", "jobs.train_experts", "--config", str(tmp_path / "part.yaml")]
    found = subprocess.run(job, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Still missing") == 1
    assert [run.manifest(name) is not None for name in (DENSE_FOLDER, expert_folder(0), expert_folder(1))] == [0, 0, 1]
    ours, theirs = (files.read_bytes(r.uri(expert_folder(1), "model.safetensors")) for r in (run, finished_run))
    assert ours == theirs


def test_documents_read_more_than_once_are_said(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name, epochs in (("extra/once", 0.5), ("extra/twice", 2.25), ("extra/often", 7.5)):
        finished_run.finish(name, {"epochs": epochs})
    once, twice, often = (branch_of(finished_run, f"extra/{name}") for name in ("once", "twice", "often"))
    _say_epochs(finished_run, [once])
    assert capsys.readouterr().out == ""
    _say_epochs(finished_run, [once, often, twice])
    assert capsys.readouterr().out == "2 of 3 read their documents more than once: extra/often 7.5 times\n"


def kill_training_worker(manifest: Path, checkpoints: Path, killed: list[int]) -> None:
    """SIGKILL the training worker of this session's Ray once the second branch of its run has a checkpoint."""
    while not manifest.exists():
        time.sleep(0.01)
    while not list(checkpoints.glob("step=*.pt")):
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_killed_worker_resumes_to_the_weights_of_undisturbed_training(finished_run: Run) -> None:
    template = branch_of(finished_run, "extra/victim")
    spec = changed(template.spec, steps=400, checkpoint_every=100)
    branches = [
        dataclasses.replace(template, cluster=cluster, spec=dataclasses.replace(spec, name=f"extra/victim-{cluster}"))
        for cluster in (0, 1)
    ]
    killed: list[int] = []
    first = Path(finished_run.uri("extra/victim-0", "manifest.json"))
    checkpoints = Path(finished_run.uri("checkpoints", "extra/victim-1"))
    killer = threading.Thread(target=kill_training_worker, args=(first, checkpoints, killed), daemon=True)
    killer.start()
    train_branches(finished_run, branches, title="test", cpus=1, slots=1, per_run=2)
    killer.join(timeout=5)
    assert killed, "the worker was not killed while it trained"
    assert not list(checkpoints.parent.iterdir())
    manifests = [finished_run.manifest(branch.spec.name) for branch in branches]
    assert [(len(manifest["starts"]), manifest["workers"]) for manifest in manifests] == [(1, 1), (2, 1)]
    for branch in branches:
        model, curve = train_here(finished_run, branch)
        resumed = load_model(finished_run.uri(branch.spec.name)).state_dict()
        assert all(torch.equal(weights, resumed[name]) for name, weights in model.state_dict().items())
        theirs = finished_run.manifest(branch.spec.name)["curve"]
        fields = ("step", "loss_nats", "valid_loss_nats")
        assert [[p.get(f) for f in fields] for p in theirs] == [[p.get(f) for f in fields] for p in curve]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_workers_train_one_expert_in_a_process_group_of_its_own(finished_run: Run, kind: str) -> None:
    """And another expert beside it at the same time: each group has its own workers and no others."""
    config = finished_run.config
    run = Run(
        dataclasses.replace(
            config, train=dataclasses.replace(config.train, workers_per_expert=2, parallel=kind, tensorboard=True)
        )
    )
    branches = [branch_of(run, f"extra/{kind}-{cluster}", cluster=cluster) for cluster in (0, 1)]
    train_branches(run, branches, title="test", cpus=2, slots=2)
    for branch in branches:
        manifest = run.manifest(branch.spec.name)
        assert manifest["workers"] == 2
        assert files.list_files(run.uri("tensorboard", branch.spec.name))
        model, curve = train_here(run, branch)
        for name, weights in load_model(run.uri(branch.spec.name)).state_dict().items():
            torch.testing.assert_close(weights, model.state_dict()[name], atol=1e-4, rtol=1e-3)
        losses = [[point["loss_nats"] for point in points] for points in (manifest["curve"], curve)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_held_out_loss_is_that_of_the_branch_s_own_documents(finished_run: Run) -> None:
    end_of_text = load_tokenizer(finished_run.uri("tokenizer")).eos_token_id
    for branch in expert_branches(finished_run):
        manifest = finished_run.manifest(branch.spec.name)
        _, valid = read_sequences(finished_run, branch, end_of_text)
        documents = list(read_documents(finished_run.uri("shards"), "valid", branch.cluster))
        assert len(documents) > 3
        assert sorted(valid.tokens) == sorted([*np.concatenate(documents), *[end_of_text] * len(documents)])
        model = load_model(finished_run.uri(branch.spec.name)).eval()
        batch = torch.from_numpy(valid.batch(0, min(valid.per_epoch, 32)))
        with torch.no_grad():
            expected = model(input_ids=batch, labels=batch).loss.item()
        assert manifest["valid_loss_nats"] == pytest.approx(expected, rel=1e-5)
        assert manifest["valid_tokens"] == len(batch) * 32
        assert manifest["curve"][-1]["valid_loss_nats"] == manifest["valid_loss_nats"]


def test_a_seed_that_is_taken_as_it_is_reads_no_document(tmp_path: Path) -> None:
    seeded, _ = seeded_run(tmp_path, steps=1)
    as_it_is = dataclasses.replace(seeded.config.seed_model, name_or_path=seeded.uri("seed"), train_tokens=0)
    run = Run(dataclasses.replace(seeded.config, seed_model=as_it_is))
    shutil.rmtree(run.uri("shards"))
    branch = seed_branch(run)
    manifest = _train_branch(
        run, dataclasses.replace(branch, spec=dataclasses.replace(branch.spec, name="copy")), None, None
    )
    assert [manifest[key] for key in ("steps", "epochs", "curve", "valid_loss_nats")] == [0, 0, [], None]
    copy, seed = (load_model(run.uri(name)).state_dict() for name in ("copy", "seed"))
    assert all(torch.equal(weights, copy[name]) for name, weights in seed.items())


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
