"""Nodes that come and go with the work: Ray's own stand-in for a cloud, which starts them on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from cbtm_ray.run import Run
from tests.support.artifacts import artifacts
from tests.support.local_head import LocalHead, local_head, wait_for
from tests.support.tiny import tiny_tree

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

MOST_NODES = 2
IDLE_S = 30  # more than a worker of an experts' run takes to be asked for again
NO_DEFAULTS: dict[str, Any] = {
    "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [],
}  # fmt: skip
"""Fields that Ray fills in for clouds alone. Without any of them its monitor ends, and the head with it."""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[LocalHead]:
    """A head without CPUs, and up to two nodes of one CPU that come when there is work and go without."""
    with local_head(tmp_path) as started:
        provider = {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": started.address,
            "launch_multiple": True,
            "disable_node_updaters": True,  # there is nothing to install on them
            "head_node_id": FAKE_HEAD_NODE_ID,
        }
        types = {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "expert": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MOST_NODES},
        }
        tree = {"cluster_name": "stand-in", "max_workers": MOST_NODES, "idle_timeout_minutes": IDLE_S / 60,
                "provider": provider, "available_node_types": types, "head_node_type": FAKE_HEAD_NODE_TYPE,
                **NO_DEFAULTS}  # fmt: skip
        (tmp_path / "cluster.yaml").write_text(json.dumps(tree))
        started.start(
            f"--autoscaling-config={tmp_path / 'cluster.yaml'}",
            cpus=0,
            extra={
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
        )
        yield started


def nodes(head: LocalHead) -> int:
    """Nodes beside the head."""
    return len(head.processes("raylet/raylet")) - 1


def most_nodes(command: list[str], head: LocalHead) -> int:
    """The most nodes beside the head while a command runs, which must end well."""
    environment = {**head.environment, "RAY_ADDRESS": head.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    most = 0
    try:
        while process.poll() is None:
            assert nodes(head) >= 0, "the head has ended, and the job waits for it for ever"
            most = max(most, nodes(head))
            time.sleep(0.5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0
    return most


def command_of(job: str, finished_run: Run, folder: Path, *stages: str) -> list[str]:
    """A job on a run in `folder` that has these stages of the finished one."""
    for name in stages:
        shutil.copytree(finished_run.uri(name), folder / "run" / name)
    tree = tiny_tree(folder / "run", Path(finished_run.config.corpus.paths[0]))
    tree["train"] |= {"experts_per_run": 1, "slots": MOST_NODES}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return [sys.executable, "-m", f"jobs.{job}", "--config", str(folder / "config.yaml")]


def test_a_node_comes_for_the_seed_where_there_is_none(head: LocalHead, finished_run: Run, tmp_path: Path) -> None:
    command = command_of("train_seed", finished_run, tmp_path, "corpus", "tokenizer", "clusterer", "shards")
    assert nodes(head) == 0
    assert most_nodes(command, head) == 1


def test_nodes_come_for_waiting_experts_and_go_when_they_are_done(
    head: LocalHead, finished_run: Run, tmp_path: Path
) -> None:
    run_dir, stages = tmp_path / "run", ("corpus", "tokenizer", "clusterer", "shards", "seed")
    command = command_of("train_experts", finished_run, tmp_path, *stages)
    assert nodes(head) == 0
    assert most_nodes(command, head) == MOST_NODES  # for two experts and the dense control
    wait_for(lambda: nodes(head) == 0, "the end of idle nodes")
    ours, theirs = artifacts(str(run_dir)), artifacts(finished_run.dir)
    assert any(name.startswith("experts/cluster=0001") for name in ours)
    assert ours == {name: theirs[name] for name in ours}

    for name in ("experts", "experts/cluster=0001"):
        (run_dir / name / "manifest.json").unlink()
    assert most_nodes(command, head) == 1  # for the one that is not finished
    wait_for(lambda: nodes(head) == 0, "the end of idle nodes")
    assert most_nodes(command, head) == 0
