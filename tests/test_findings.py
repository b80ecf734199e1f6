"""What is said of a run in the terminal."""

from __future__ import annotations

import os
import shlex
from typing import Any

import pytest

from cbtm_ray.findings import serve_command, verdict


def test_the_next_command_names_a_program_that_is_there() -> None:
    program, *arguments = shlex.split(serve_command("runs/a"))
    assert os.access(program, os.X_OK)
    assert arguments == ["run", "serve.app:build", "run_dir=runs/a"]


@pytest.mark.parametrize(
    ("low", "ratio", "high", "said"),
    [
        (0.9, 0.95, 0.99, "The sparse ensemble (top-2 of 4 experts, prefix routing) beats the dense control of"),
        (0.9, 0.97, 1.02, "No clear winner: the sparse ensemble (top-2 of 4 experts, prefix routing) has 0.970"),
        (1.01, 1.1, 1.2, "The dense control beats the sparse ensemble (top-2 of 4 experts, prefix routing)"),
    ],
)
def test_whoever_won_is_named(low: float, ratio: float, high: float, said: str) -> None:
    chosen: dict[str, Any] = {"n_clusters": 4, "top_k": 2, "routing": "prefix", "chosen": True}
    evaluation = {"rows": [chosen | {"ratio_to_dense": ratio, "ratio_low": low, "ratio_high": high}]}
    assert verdict(evaluation).startswith(said)
    assert f"{ratio:.3f} [{low:.3f}, {high:.3f}]" in verdict(evaluation)
