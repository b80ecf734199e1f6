"""What the environment of training processes does: memory that a step freed is there for the next one, in any thread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cbtm_ray.ray_session import TRAINING_ENV

PAGES = 2**14
PROGRAM = f"""
import resource, threading
def work():
    for _ in range(20):
        b"x" * ({PAGES} * resource.getpagesize())
thread = threading.Thread(target=work)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "GLIBC_TUNABLES": "", **environment}
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the environment is for the GNU C library")
def test_large_allocations_of_a_thread_come_from_memory_that_was_freed() -> None:
    assert page_faults({}) > 19 * PAGES
    assert page_faults(TRAINING_ENV) < 2 * PAGES
