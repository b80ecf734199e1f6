"""Which of the chunks that sequences wait for are read in the next pass: those whose waiting is ended at the least cost.

One expert's pass has rows of that expert alone. A pass of stacked experts (stacked.py) has as many rows of each, so that what
the others have less than the one with most is padding; where few experts are asked, one of them at a time is cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from cbtm_ray.kv_cache import Chunk

T = TypeVar("T")

PASS_COST, TOKEN_COST = 40.0, 1 / 3
"""Of a pass as such, and of a token in a row; a row as such, whose text is gathered, is 1. Measured (docs/LOG.md)."""


@dataclass(frozen=True)
class Wanted(Generic[T]):
    """A chunk that an expert is to read."""

    expert: int
    chunk: Chunk
    waited: int
    """Passes since its sequence went on."""
    sequence: T
    """Whose it is."""


def choose_pass(wanted: list[Wanted[T]], stacked: int) -> list[Wanted[T]]:
    """The pass that ends most waiting for its cost. Nothing waits for ever, since what waits weighs more by the pass.

    Args:
        wanted: at least one.
        stacked: experts that can be read in one pass; 0 if they cannot.
    """
    return max(_passes(wanted, stacked), key=lambda found: sum(1 + one.waited for one in found[0]) / found[1])[0]


def _passes(wanted: list[Wanted[T]], stacked: int) -> Iterator[tuple[list[Wanted[T]], float]]:
    """Passes to choose from, each with its cost: chunks up to a width, of one expert, or the first few of every expert."""
    longest_first = sorted(wanted, key=lambda one: -one.waited)
    for width in sorted({len(one.chunk.tokens) for one in wanted}):
        by_expert: dict[int, list[Wanted[T]]] = {}
        for one in longest_first:
            if len(one.chunk.tokens) <= width:
                by_expert.setdefault(one.expert, []).append(one)
        for theirs in by_expert.values():
            yield theirs, _cost(len(theirs), width)
        if stacked and len(by_expert) > 1:
            most, rows = max(map(len, by_expert.values())), 1
            while rows < 2 * most:
                rows = min(rows, most)
                yield [one for theirs in by_expert.values() for one in theirs[:rows]], _cost(stacked * rows, width)
                rows *= 2


def _cost(rows: int, width: int) -> float:
    return PASS_COST + rows * (1 + TOKEN_COST * width)
