"""The terminal during a run: a progress bar or a table of experts, one summary line for each stage, and notes."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@contextlib.contextmanager
def bar(stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar for `total` units; the block gets a function that sets how many are done.

    On anything but a terminal the bar is not drawn.
    """
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(stage, total=total, rate="")

        def done(count: int) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else unit
            progress.update(task, completed=count, rate=rate)

        yield done


STATES = {"failed": "red", "running": "green", "waiting": "dim", "done": "cyan"}
"""States of an expert in the order of the table, and their colors."""


@contextlib.contextmanager
def experts(stage: str, steps: dict[str, int]) -> Iterator[Callable[[dict[str, dict[str, Any]]], None]]:
    """A table of experts in training, live; a bar for one alone. On anything but a terminal neither is drawn.

    Args:
        steps: optimizer steps of each expert by its name.

    Yields:
        A function that shows what is known of them by now: rows as those of `expert_table`.
    """
    if len(steps) == 1 or not console.is_terminal:
        with bar(stage, sum(steps.values()), "steps") as done:
            yield lambda rows: done(sum(row.get("step", 0) for row in rows.values()))
        return
    with Live(expert_table(stage, steps, {}, console.height), console=console, transient=True) as live:
        yield lambda rows: live.update(expert_table(stage, steps, rows, console.height))


def expert_table(stage: str, steps: dict[str, int], rows: dict[str, dict[str, Any]], height: int) -> Table:
    """Every expert in a row, those that need a look first, in at most `height` lines; the title counts them all.

    Args:
        rows: by name: state, node, and step, tokens, loss_nats, tokens_per_s of the last point; absent while waiting.
    """
    states = {name: rows.get(name, {}).get("state", "waiting") for name in steps}
    counts = Counter(states.values())
    title = f"{stage}: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for heading in ("expert", "state", "step", "loss", "tokens/s", "ETA", "node"):
        table.add_column(heading, justify="left" if heading in ("expert", "state", "node") else "right", no_wrap=True)
    for name in sorted(steps, key=lambda name: list(STATES).index(states[name]))[: max(height - 3, 1)]:
        row, state = rows.get(name, {}), states[name]
        started = row.get("step") is not None
        table.add_row(
            name,
            f"[{STATES[state]}]{state}[/]",
            f"{row.get('step', 0):,} / {steps[name]:,}",
            f"{row['loss_nats']:.3f}" if started else "",
            f"{row['tokens_per_s']:,.0f}" if started else "",
            _eta(row, steps[name]) if started and state == "running" else "",
            row.get("node", ""),
        )
    return table


def _eta(row: dict[str, Any], steps: int) -> str:
    """Time that the steps ahead take at the present speed."""
    seconds = (steps - row["step"]) * row["tokens"] / row["step"] / row["tokens_per_s"]
    return str(timedelta(seconds=round(seconds)))


def summary(stage: str, seconds: float | None, text: str) -> None:
    """One line for a finished stage; `seconds` is None when an earlier run had finished it."""
    time = "already done" if seconds is None else f"{seconds:.1f} s"
    console.print(f"[bold]{stage:<18}[/bold] {time:>12}  {text}", soft_wrap=True)


def note(text: str) -> None:
    """One line that a person should know of."""
    console.print(text, soft_wrap=True)
