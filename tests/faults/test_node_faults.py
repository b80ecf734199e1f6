"""Nodes that are lost while experts train on them, with a notice and without: on a Ray of three nodes on this machine."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cbtm_ray.branch.branches import expert_branches
from cbtm_ray.run import Run
from ops.preemption import Notice, drain
from tests.support.local_head import LocalHead, local_head, wait_for
from tests.support.seeded_run import check_as_undisturbed, seeded_run

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHead]:
    """A head without CPUs, on which the driver and the board of experts stand."""
    with local_head(tmp_path_factory.mktemp("head")) as started:
        started.start(cpus=0)
        yield started


@pytest.fixture
def two_nodes(head: LocalHead) -> Iterator[list[psutil.Process]]:
    """Raylets of two nodes with 2 CPUs each."""
    raylets = [head.add_node(cpus=2) for _ in range(2)]
    yield raylets
    for raylet in raylets:
        if raylet.is_running():
            raylet.kill()
    wait_for(lambda: len(head.nodes()) == 1, "the end of the nodes")


def client(head: LocalHead) -> dict[str, str]:
    """Environment of what uses the head's Ray."""
    return {**head.environment, "RAY_ADDRESS": head.address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextlib.contextmanager
def job(command: list[str], head: LocalHead) -> Iterator[subprocess.Popen]:
    """A job on the head's Ray, which must end well."""
    environment = {**client(head), "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}  # a short training is long enough then
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
        assert process.wait() == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def trainers(raylet: psutil.Process) -> list[psutil.Process]:
    """Workers of a node that train."""
    found = []
    for process in raylet.children() if raylet.is_running() else []:
        with contextlib.suppress(psutil.NoSuchProcess):  # they come and go meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def checkpoints(run: Run) -> dict[str, int]:
    """Step of the newest checkpoint of every expert that has one."""
    folder = Path(run.uri("checkpoints", "experts"))
    return {path.parent.parent.name: int(path.stem[5:]) for path in sorted(folder.glob("*/*/step=*.pt"))}


@contextlib.contextmanager
def watching(look: Callable[[], Any]) -> Iterator[list[tuple[float, Any]]]:
    """What is seen in the length of the block, and when (seconds since 1970) it was not as before."""
    seen, over = list[tuple[float, Any]](), threading.Event()

    def work() -> None:
        while not over.wait(0.02):
            now = look()
            if not seen or seen[-1][1] != now:
                seen.append((time.time(), now))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield seen
    over.set()
    thread.join()


def test_experts_of_a_node_that_dies_go_on_elsewhere(
    head: LocalHead, two_nodes: list[psutil.Process], tmp_path: Path
) -> None:
    """SIGKILL of the raylet: its workers end with it, and Ray is not told."""
    run, command = seeded_run(tmp_path, steps=1500, checkpoint_every=200)
    with job([*command, "train.clusters=[0,1]"], head) as process:
        wait_for(lambda: len(checkpoints(run)) == 2 or process.poll() is not None, "checkpoints of both")
        lost = max(two_nodes, key=lambda raylet: len(trainers(raylet)))
        training = len(trainers(lost))
        lost.kill()
        killed_at = time.time()
    experts = expert_branches(run)[1:]
    starts = [run.require(branch.spec.name, "train_experts")["starts"] for branch in experts]
    assert sum(len(each) - 1 for each in starts) == training > 0
    for again in (each[1] for each in starts if len(each) > 1):
        assert again["at"] > killed_at
        assert again["step"] > 0
        assert again["redone"] <= 200
        print(f"node killed: on again after {again['at'] - killed_at:.1f} s, {again['redone']} steps done again")
    assert not list(Path(run.uri("checkpoints")).glob("experts/*"))
    for branch in experts:
        check_as_undisturbed(run, branch, tmp_path / f"undisturbed-{branch.cluster}")


def node_id(raylet: psutil.Process) -> str:
    return next(word for word in raylet.cmdline() if word.startswith("--node_id=")).partition("=")[2]


def test_an_expert_whose_node_is_announced_to_go_moves_at_once_and_repeats_no_step(
    head: LocalHead, two_nodes: list[psutil.Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the deadline; not one failure is allowed. A node that has been left ends itself."""
    run, command = seeded_run(tmp_path, steps=3000, checkpoint_every=499, notice_every=10, max_failures=0)
    for name, value in client(head).items():
        monkeypatch.setenv(name, value)  # for the command that drains
    with watching(lambda: checkpoints(run)) as seen, job([*command, "train.clusters=[0]"], head) as process:
        wait_for(lambda: checkpoints(run) or process.poll() is not None, "a checkpoint")
        (leaving,) = (raylet for raylet in two_nodes if trainers(raylet))
        (other,) = (raylet for raylet in two_nodes if raylet != leaving)
        drain(Notice("the cloud takes the node", 600), node_id(leaving))
        told_at = time.time()
        wait_for(lambda: trainers(other) or process.poll() is not None, "training on the other node")
    branch = expert_branches(run)[1]
    first, second = run.require(branch.spec.name, "train_experts")["starts"]
    at, step = next((at, now["cluster=0000"]) for at, now in seen if now.get("cluster=0000", 0) % 499)
    assert first["step"] == 0
    assert second["step"] == step
    assert second["redone"] == 0
    print(f"node drained: checkpoint after {at - told_at:.1f} s, on again after {second['at'] - told_at:.1f} s")
    check_as_undisturbed(run, branch, tmp_path / "undisturbed")
