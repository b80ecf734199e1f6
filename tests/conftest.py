"""One Ray for each of the two processes that share the tests out file by file, and one small finished run for both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock

from cbtm_ray.config import Config
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from tests.support.tiny import tiny_tree, write_corpus

# The same examples every time, and no example fails for being slow on a busy machine.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)  # toy tensors; more threads only wait for each other

# One process begins with the finished run, the other with what takes long without it; files of seconds come last.
LONGEST_FIRST = ("launch", "kmeans_actors", "object_store", "sweep", "partition", "parallel", "ray_session", "controls",
                 "jobs", "endpoint", "handover", "embed_workers", "build", "generate", "fewshot", "average")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray of this session's own with 2 logical CPUs; its address."""
    from cbtm_ray.ray_session import ray_session

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    os.environ["RAY_SERVE_PROXY_USE_GRPC"] = "1"  # as `make serve` has it
    with ray_session(local_cpus=2):
        import ray

        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of this test run have."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def tiny_config(shared_folder: Path) -> Config:
    with FileLock(shared_folder / "tiny.lock"):
        return build_config(tiny_tree(shared_folder / "tiny" / "run", write_corpus(shared_folder / "tiny" / "build")))


@pytest.fixture(scope="session")
def finished_run(tiny_config: Config, ray_cluster: str, shared_folder: Path) -> Run:
    """Every stage of the tiny configuration, done by the process that asks first: the other finds it finished."""
    from cbtm_ray.pipeline import run_all

    run = Run(tiny_config)
    with FileLock(shared_folder / "finished.lock"):
        run.open()
        run_all(run)
    return run
