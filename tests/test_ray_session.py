"""The Ray that a job starts on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cbtm_ray.errors import UserError
from cbtm_ray.ray_session import check_fits, check_installed

LISTENING = """
import json, psutil
from cbtm_ray.ray_session import ray_session
with ray_session(local_cpus=1):
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    connections = [c for p in psutil.Process().children(recursive=True) for c in p.net_connections("tcp")]
    print(json.dumps([c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]))
"""


@pytest.mark.ray
def test_a_local_ray_listens_on_this_machine_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = subprocess.run(
        [sys.executable, "-c", LISTENING], env=environment, capture_output=True, text=True, check=True
    )
    addresses = json.loads(found.stdout)
    assert len(addresses) > 5
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


TOO_MUCH = """
from cbtm_ray.ray_session import check_fits, ray_session
from cbtm_ray.errors import UserError
with ray_session(local_cpus=1):
    check_fits("train.cpus_per_expert", "CPU", 1)
    for field, kind in (("train.cpus_per_expert", "CPU"), ("train.gpus_per_expert", "GPU")):
        try:
            check_fits(field, kind, 999)
        except UserError as error:
            print(error)
"""


@pytest.mark.ray
def test_what_a_machine_does_not_have_is_not_waited_for() -> None:
    """A task that asks for it would wait for ever, and say nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = subprocess.run(
        [sys.executable, "-c", TOO_MUCH], env=environment, capture_output=True, text=True, check=True
    )
    first, second = found.stdout.splitlines()
    assert first == "train.cpus_per_expert=999 must be at most the CPUs of this machine, 1. Lower it."
    assert second.startswith("train.gpus_per_expert=999 must be at most the GPUs of this machine, ")


@pytest.mark.ray
def test_what_a_cluster_does_not_have_yet_is_waited_for_with_a_word(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    check_fits("train.cpus_per_expert", "CPU", 2)
    assert capsys.readouterr().out == ""
    check_fits("train.cpus_per_expert", "CPU", 3)
    said = "train.cpus_per_expert=3 is more than the CPUs that Ray knows of, 2: waits for nodes, see `ray status`.\n"
    assert capsys.readouterr().out == said


@pytest.mark.ray
def test_a_package_that_a_node_lacks_is_refused(ray_cluster: str) -> None:
    check_installed("train.trackers", ())
    check_installed("train.trackers", ("yaml",))
    with pytest.raises(UserError, match=r"^train\.trackers names no_such, not installed on the node that was asked"):
        check_installed("train.trackers", ("yaml", "no_such"))
