"""What a person sees while a run goes on: one bar a stage, one summary line a stage, and nothing else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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


def summary(stage: str, seconds: float | None, text: str) -> None:
    """One line for a finished stage; `seconds` is None when an earlier run had finished it."""
    time = "already done" if seconds is None else f"{seconds:.1f} s"
    console.print(f"[bold]{stage:<18}[/bold] {time:>12}  {text}", soft_wrap=True)
