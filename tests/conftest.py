"""One Ray for the whole session, and one small finished run that many tests look at."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from cbtm_ray.config import Config
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from tests.tiny import tiny_tree, write_corpus

# The same examples every time, and no example fails for being slow on a busy machine.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)  # toy tensors; more threads only wait for each other


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray of this session's own with 2 logical CPUs; its address."""
    from cbtm_ray.ray_session import ray_session

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
    with ray_session(local_cpus=2):
        import ray

        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("tiny")
    return build_config(tiny_tree(folder / "run", write_corpus(folder / "corpus")))


@pytest.fixture(scope="session")
def finished_run(tiny_config: Config, ray_cluster: str) -> Run:
    """Every stage of the tiny configuration, done."""
    from cbtm_ray.pipeline import run_all

    run = Run(tiny_config)
    run.begin()
    run_all(run)
    return run
