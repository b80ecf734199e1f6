"""Where running experts post how far they are. An actor of its own process, and so a file that imports nothing."""

from __future__ import annotations

import time


class Board:
    """What is known of each expert by its name: state, node, and the fields of its last point of the curve."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, object]] = {}
        self._starts: dict[str, list[float]] = {}

    def post(self, name: str, news: dict[str, object]) -> None:
        """Add news to what is known of an expert."""
        self._rows.setdefault(name, {}).update(news)
        if news.get("state") == "running":
            self._starts.setdefault(name, []).append(time.time())

    def rows(self) -> dict[str, dict[str, object]]:
        return self._rows

    def starts(self, name: str) -> list[float]:
        """When a worker began an expert, or went on with it: seconds since 1970."""
        return self._starts.get(name, [])
