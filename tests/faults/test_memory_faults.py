"""Another process takes a machine's memory while experts train on it: Ray ends some of their processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cbtm_ray.branch.branches import expert_branches
from cbtm_ray.run import Run
from tests.support.local_head import wait_for
from tests.support.seeded_run import check_as_undisturbed, seeded_run

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

HEADROOM, STEP = 3 << 30, 100 << 20
TAKE = f"""
import sys, time
held = []
for _ in range({2 * HEADROOM // STEP}):
    held.append(b"x" * {STEP})
    time.sleep(0.02)
time.sleep(600)
"""


def checkpoints(run: Run) -> list[Path]:
    return list(Path(run.uri("checkpoints", "experts")).glob("*/*/step=*.pt"))


def test_memory_that_another_process_takes_is_told_in_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 3 * HEADROOM:
        pytest.skip("needs 9 GiB of free memory")
    threshold = 1 - (memory.available - HEADROOM) / memory.total
    run, command = seeded_run(tmp_path, steps=1000, checkpoint_every=200, max_failures=0)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    watched = {**environment, "RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    with open(tmp_path / "err", "w+") as err, subprocess.Popen(command, env=watched, stderr=err) as training:
        wait_for(lambda: checkpoints(run) or training.poll() is not None, "a checkpoint")
        with subprocess.Popen([sys.executable, "-c", TAKE]) as taker:
            code = training.wait()
            taker.kill()
        err.seek(0)
        said = err.read()
    assert code == 2, said
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    print(last)
    assert last.startswith("error: Ray's memory monitor ended processes of this job (")
    assert " GB, " in last.partition("most by process ")[2]
    assert "the same command then continues" in last

    assert subprocess.run(command, env=environment, check=False).returncode == 0
    for branch in expert_branches(run)[1:]:
        check_as_undisturbed(run, branch, tmp_path / f"undisturbed-{branch.cluster}")
