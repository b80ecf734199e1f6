"""The table of experts in training: every state, times by hand, no more lines than the terminal has."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from cbtm_ray import progress
from cbtm_ray.branch.training_progress import TrainingProgress

STEPS = {"controls/dense": 800, "experts/cluster=0000": 1200, "experts/cluster=0001": 100, "experts/cluster=0002": 100}


def board_of_four() -> TrainingProgress:
    """One that waits, one that runs, one that is done, one that failed before its first point."""
    board = TrainingProgress()
    for name, node in (("experts/cluster=0000", "node-a"), ("experts/cluster=0001", "node-b")):
        board.post(name, {"state": "running", "node": node})
    point = {"step": 300, "tokens": 30_000, "loss_nats": 2.34567, "tokens_per_s": 1000.0, "learning_rate": 1e-3}
    board.post("experts/cluster=0000", {**point, "step": 200, "tokens": 20_000, "loss_nats": 3.0})
    board.post("experts/cluster=0000", point)
    board.post("experts/cluster=0001", {**point, "step": 100, "tokens": 10_000, "loss_nats": 1.5})
    board.post("experts/cluster=0001", {"state": "done"})
    board.post("experts/cluster=0002", {"state": "failed"})
    return board


def lines(rows: dict[str, dict[str, Any]], height: int = 40) -> list[list[str]]:
    """Title and cells of the table as a terminal shows it, headings left out."""
    console = Console(file=io.StringIO(), width=110)
    console.print(progress.expert_table("train_experts", STEPS, rows, height))
    title, _, *table = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [title.split(), *(line.split() for line in table)]


def test_every_expert_has_its_row_and_those_that_need_a_look_come_first() -> None:
    assert lines(board_of_four().rows()) == [
        ["train_experts:", "1", "failed,", "1", "running,", "1", "waiting,", "1", "done"],
        ["experts/cluster=0002", "failed", "0", "/", "100"],
        ["experts/cluster=0000", "running", "300", "/", "1,200", "2.346", "1,000", "0:01:30", "node-a"],
        ["controls/dense", "waiting", "0", "/", "800"],
        ["experts/cluster=0001", "done", "100", "/", "100", "1.500", "1,000", "node-b"],
    ]


def test_all_wait_before_the_first_news() -> None:
    assert lines({}) == [
        ["train_experts:", "4", "waiting"],
        *([name, "waiting", "0", "/", str(f"{steps:,}")] for name, steps in STEPS.items()),
    ]


@pytest.mark.parametrize("height", [4, 6])
def test_a_low_terminal_shows_what_fits_and_counts_all(height: int) -> None:
    shown = lines(board_of_four().rows(), height)
    assert len(shown) == height - 2
    assert shown[0] == ["train_experts:", "1", "failed,", "1", "running,", "1", "waiting,", "1", "done"]
    assert shown[1][1] == "failed"


def terminal(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> io.StringIO:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=110, height=30, _environ={})
    monkeypatch.setattr(progress, "console", console)
    return output


def test_a_terminal_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    output = terminal(monkeypatch, True)
    with progress.experts("train_experts", STEPS) as show:
        show(board_of_four().rows())
    assert "4 waiting" in output.getvalue()
    assert "node-a" in output.getvalue()


def test_one_expert_alone_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    output = terminal(monkeypatch, True)
    with progress.experts("train_seed", {"seed": 10}) as show:
        show({"seed": {"state": "running", "step": 5, "node": "node-a"}})
    assert "50%" in output.getvalue()
    assert "node-a" not in output.getvalue()


def test_a_file_gets_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    output = terminal(monkeypatch, False)
    with progress.experts("train_experts", STEPS) as show:
        show(board_of_four().rows())
    assert output.getvalue().strip() == ""


def test_the_board_is_a_file_that_imports_nothing() -> None:
    module = "cbtm_ray.branch.training_progress"
    code = f"import sys; before = set(sys.modules); import {module}; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"__future__ cbtm_ray cbtm_ray.branch {module}"
