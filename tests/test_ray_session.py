"""The Ray that a job starts on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cbtm_ray.errors import UserError
from cbtm_ray.ray_session import START_VARIABLE, check_fits, check_installed, ray_session
from tests.support.tiny import tiny_tree, write_corpus

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


LOADED = """
import sys, threading, time, psutil
from cbtm_ray.cli import main
def stop(name):
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.exe().endswith(name) and process.status() != psutil.STATUS_STOPPED:
                    process.suspend()
            except psutil.NoSuchProcess:
                pass
        time.sleep(0.002)
threading.Thread(target=stop, args=[sys.argv[1]], daemon=True).start()
sys.exit(main("", "build_corpus", ["--config", sys.argv[2]]))
"""


@pytest.mark.ray
@pytest.mark.parametrize("name", ["raylet/raylet", pytest.param("gcs/gcs_server", marks=pytest.mark.slow)])
def test_a_node_that_does_not_come_up_in_time_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    """A process of Ray's that gets no time of a processor, as on a machine that is very loaded."""
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus"))))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-c", LOADED, name, str(tmp_path / "a.yaml")],
        env={**environment, START_VARIABLE: "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "error: Ray did not come up on this machine within 2 s, which is too loaded. Wait until less runs beside, or set "
        "RAY_raylet_start_wait_time_s=20 in the environment to wait longer."
    )


def test_a_wait_for_ray_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for given in ("soon", "0", "-1", ""):
        monkeypatch.setenv(START_VARIABLE, given)
        with (
            pytest.raises(
                UserError, match=f"^{START_VARIABLE}='{given}' must be a whole number of seconds, at least 1"
            ),
            ray_session(),
        ):
            pass


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
