"""Connect to the cluster that a job runs on, or start Ray on this machine, and keep Ray's own talk in its log files."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from cbtm_ray.errors import UserError
from cbtm_ray.progress import note

_POLL_S = "0.5"
START_S = 30
"""How long Ray's processes may take to come up on this machine, unless START_VARIABLE says otherwise."""
START_VARIABLE = "RAY_raylet_start_wait_time_s"
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


def _start_here(wait_s: int, **options: Any) -> None:
    """Start Ray on this machine.

    Raises UserError if its processes do not come up in time. Ray 2.60 waits for its node for 30 s, which no option of its own
    changes: so the question whether the node is there waits, for as long as START_VARIABLE says.
    """
    import ray
    from ray._private import services

    late = UserError(
        f"Ray did not come up on this machine within {wait_s} s, which is too loaded. Wait until less runs beside, or set "
        f"{START_VARIABLE}={10 * wait_s} in the environment to wait longer."
    )
    get_node = services.get_node
    services.get_node = _patient(get_node, wait_s, late)
    try:
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:
        if "timed out" in str(error).lower():
            raise late from error
        raise
    finally:
        services.get_node = get_node


def _start_wait_s() -> int:
    """Seconds of START_VARIABLE. Asked before Ray is imported, which dies of a value that is no number."""
    given = os.environ.get(START_VARIABLE, str(START_S))
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{START_VARIABLE}={given!r} must be a whole number of seconds, at least 1.")
    return int(given)


def _patient(get_node: Callable[..., Any], wait_s: int, late: UserError) -> Callable[..., Any]:
    """`get_node`, which asks again until the node is there, and raises `late` after `wait_s` seconds."""

    def wait_for_node(*args: Any) -> Any:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return get_node(*args)
            except RuntimeError as error:
                if time.monotonic() > deadline:
                    raise late from error
            time.sleep(0.1)

    return wait_for_node


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
    address, wait_s = os.environ.get("RAY_ADDRESS"), _start_wait_s()
    if not address:
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(wait_s))
        os.environ.setdefault("RAY_agent_register_timeout_ms", str(1000 * wait_s))
        # One machine cannot outlive its own preemption, and the watcher is a process for every expert.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray then listens on localhost alone, as it does on desktops, where the variable has its name from. Read on import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        _start_here(wait_s, num_cpus=local_cpus, include_dashboard=False)
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False
    data_context.raise_original_map_exception = True  # a UserError arrives as one
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log as errors arrives as exceptions too
    try:
        yield
    finally:
        ray.shutdown()
