"""Where running experts post how far they are. An actor of its own process, and so a file that imports nothing."""

from __future__ import annotations


class Board:
    """What is known of each expert by its name: state, node, and the fields of its last point of the curve."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, object]] = {}

    def post(self, name: str, news: dict[str, object]) -> None:
        """Add news to what is known of an expert."""
        self._rows.setdefault(name, {}).update(news)

    def rows(self) -> dict[str, dict[str, object]]:
        return self._rows
