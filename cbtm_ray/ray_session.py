"""Connect to the cluster that a job runs on, or start Ray on this machine, and keep Ray's own talk in its log files."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

from cbtm_ray.errors import UserError
from cbtm_ray.progress import note

_POLL_S = "0.5"
TRAINING_ENV = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in {"arena_max": 1, "mmap_max": 0, "trim_threshold": 2**34, "hugetlb": 1}.items()
    )
}
"""For processes that train on a CPU: the C library keeps what a step frees for the next, in huge pages. By default it gives
large tensors' memory back to the system, whose new pages cost a tenth of a step (docs/LOG.md). Other C libraries ignore it."""


def capacity(kind: str) -> float:
    """How much of a resource, "CPU" or "GPU", the cluster can hold: what its nodes have, or may have once it has grown."""
    import ray
    from ray._private.state import state  # there is no public name; Ray Train and Ray Data ask the same

    grown = state.get_max_resources_from_cluster_config() or {}
    return float(max(ray.cluster_resources().get(kind, 0), grown.get(kind, 0)))


def check_fits(field: str, kind: str, wanted: float) -> None:
    """UserError: what one process is to have is more than this machine has. On a cluster, which may grow, a note of it."""
    most = capacity(kind)
    if wanted <= most:
        return
    if not os.environ.get("RAY_ADDRESS"):
        raise UserError(f"{field}={wanted:g} must be at most the {kind}s of this machine, {most:g}. Lower it.")
    note(f"{field}={wanted:g} is more than the {kind}s that Ray knows of, {most:g}: waits for nodes, see `ray status`.")


def check_installed(field: str, packages: tuple[str, ...]) -> None:
    """UserError: a node, the first that has a CPU free, lacks one of the packages that a field names."""
    import ray

    lacking = ray.remote(lambda: [name for name in packages if importlib.util.find_spec(name) is None])
    if packages and (missing := ray.get(lacking.remote())):
        raise UserError(
            f"{field} names {', '.join(missing)}, not installed on the node that was asked. Install it on every node (runtime "
            "environment), or leave it out."
        )


@contextlib.contextmanager
def ray_session(local_cpus: int | None = None) -> Iterator[None]:
    """Ray for the length of the block.

    Under `ray job submit`, or with RAY_ADDRESS set, that cluster; else a Ray of our own on this machine, which ends with
    the block.
    """
    # Ray Train polls its workers this often; a checkpoint report and the end of a run each wait for a poll (default 2 s).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    # Threads that spin while they wait starve each other once anything else runs on the machine: on 2 cores beside one
    # busy process, training fell from 36,000 tokens/s to 450, and to 20,000 with this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # One machine cannot outlive its own preemption, and the watcher is a process for every expert.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray then listens on localhost alone, as it does on desktops, where the variable has its name from. Read on import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    local: dict[str, Any] = {} if address else {"num_cpus": local_cpus, "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.raise_original_map_exception = True  # a UserError arrives as one
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log as errors arrives as exceptions too
    try:
        yield
    finally:
        ray.shutdown()
