"""What is said of a run in the terminal."""

from __future__ import annotations

import os
import shlex

from cbtm_ray.report.terminal import serve_command


def test_the_next_command_names_a_program_that_is_there() -> None:
    program, *arguments = shlex.split(serve_command("runs/a"))
    assert os.access(program, os.X_OK)
    assert arguments == ["run", "serve.app:build", "run_dir=runs/a"]
