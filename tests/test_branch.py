"""Independent training runs: budgets, the dense control as K = 1, failures that stay apart, recovery from a kill."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from cbtm_ray import files
from cbtm_ray.branch import DENSE, Branch, expert_branches, expert_folder, seed_branch, train_branches
from cbtm_ray.config import Config
from cbtm_ray.load_config import build_config
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run
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


def test_one_cluster_is_the_dense_control(tmp_path: Path, ray_cluster: None) -> None:
    tree = tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus", documents=60))
    tree["cluster"]["n_clusters"] = 1
    run = Run(build_config(tree))
    for job in ("build_corpus", "fit_clusters", "partition_corpus", "train_seed", "train_experts"):
        run_job(run, job)
    expert, dense = (files.read_bytes(run.uri(name, "model.safetensors")) for name in (expert_folder(0), DENSE))
    assert expert == dense


def branch_of(run: Run, name: str, **changes: object) -> Branch:
    template = expert_branches(run)[1]
    return dataclasses.replace(template, spec=dataclasses.replace(template.spec, name=name), **changes)


def test_a_failing_run_leaves_the_others_alone_and_is_said(finished_run: Run, tmp_path: Path) -> None:
    good = branch_of(finished_run, "extra/good")
    bad = branch_of(finished_run, "extra/bad", init=str(tmp_path / "no_model"))
    with pytest.raises(ValueError, match="no causal language model can be loaded from"):
        train_branches(finished_run, [bad, good], title="test", cpus=1, slots=2)
    assert finished_run.manifest("extra/good") is not None
    assert finished_run.manifest("extra/bad") is None


@pytest.mark.timeout(200)
def test_a_killed_worker_resumes_to_the_same_weights(finished_run: Run) -> None:
    undisturbed = branch_of(finished_run, "extra/undisturbed")
    undisturbed = dataclasses.replace(undisturbed, spec=dataclasses.replace(undisturbed.spec, steps=4000))
    victim = dataclasses.replace(undisturbed, spec=dataclasses.replace(undisturbed.spec, name="extra/victim"))
    victim, undisturbed = (
        dataclasses.replace(branch, spec=dataclasses.replace(branch.spec, checkpoint_every=500))
        for branch in (victim, undisturbed)
    )
    killed: list[int] = []

    def kill_after_a_checkpoint() -> None:
        checkpoints = Path(finished_run.uri("checkpoints", "extra-victim"))
        while not any(checkpoints.glob("checkpoint_*/state.pt")):
            time.sleep(0.02)
        for process in psutil.process_iter(["cmdline"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    killer = threading.Thread(target=kill_after_a_checkpoint, daemon=True)
    killer.start()
    train_branches(finished_run, [victim], title="test", cpus=1, slots=1)
    killer.join(timeout=5)
    assert killed, "the worker was not killed while it trained"
    train_branches(finished_run, [undisturbed], title="test", cpus=1, slots=1)
    weights = [files.read_bytes(finished_run.uri(f"extra/{n}", "model.safetensors")) for n in ("victim", "undisturbed")]
    assert weights[0] == weights[1]
    curves = [finished_run.manifest(f"extra/{name}")["curve"] for name in ("victim", "undisturbed")]
    losses = [[(point["step"], point["loss_nats"]) for point in curve] for curve in curves]
    assert losses[0] == losses[1]
