"""Where running experts post how far they are. An actor of its own process, and so a file that imports nothing."""

from __future__ import annotations


class Board:
    """Where running experts post their step, for the driver to show."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def post(self, name: str, step: int) -> None:
        self._steps[name] = step

    def steps(self) -> dict[str, int]:
        return self._steps
