"""TrainingProgress: the actor to which running experts post their progress. It imports nothing, so it starts at once."""

from __future__ import annotations

import time


class TrainingProgress:
    """One row for each expert, by its name: state, node, and the fields of the last point of its curve."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, object]] = {}
        self._starts: dict[str, list[dict[str, object]]] = {}

    def post(self, name: str, news: dict[str, object]) -> None:
        """Update the row of an expert."""
        self._rows.setdefault(name, {}).update(news)

    def begin(self, name: str, node: str, step: int) -> None:
        """Record that a worker starts or resumes an expert at `step`."""
        reached = self._rows.get(name, {}).get("step")
        redone = max(0, reached - step) if isinstance(reached, int) else 0
        start = {"at": time.time(), "node": node, "step": step, "redone": redone}
        self._starts.setdefault(name, []).append(start)

    def rows(self) -> dict[str, dict[str, object]]:
        return self._rows

    def starts(self, name: str) -> list[dict[str, object]]:
        """Each start of an expert: time (`at`, seconds since 1970), node, step, and the steps that it repeats (`redone`).

        `redone` counts from the last point of the curve, so it is a lower bound.
        """
        return self._starts.get(name, [])
