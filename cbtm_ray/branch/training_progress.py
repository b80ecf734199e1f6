"""Where running experts post how far they are. An actor of its own process, and so a file that imports nothing."""

from __future__ import annotations

import time


class Board:
    """What is known of each expert by its name: state, node, and the fields of its last point of the curve."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, object]] = {}
        self._starts: dict[str, list[dict[str, object]]] = {}

    def post(self, name: str, news: dict[str, object]) -> None:
        """Add news to what is known of an expert."""
        self._rows.setdefault(name, {}).update(news)

    def begin(self, name: str, node: str, step: int) -> None:
        """A worker begins an expert, or goes on with it, after so many steps."""
        reached = self._rows.get(name, {}).get("step")
        redone = max(0, reached - step) if isinstance(reached, int) else 0
        start = {"at": time.time(), "node": node, "step": step, "redone": redone}
        self._starts.setdefault(name, []).append(start)

    def rows(self) -> dict[str, dict[str, object]]:
        return self._rows

    def starts(self, name: str) -> list[dict[str, object]]:
        """When (seconds since 1970), where and at which step a worker began an expert or went on with it.

        And how many steps it does again, as far as points of the curve tell.
        """
        return self._starts.get(name, [])
