"""Scheduler: picks the next forward pass as the batch that unblocks the most waiting sequences per unit of cost.

A pass of one expert has rows of that expert only. A pass of stacked experts (stacked.py) has the same number of rows for every
expert: an expert with fewer chunks than the busiest one is padded. If sequences wait for few experts, one pass per expert is
cheaper.

The cost of a pass is PASS_COST + rows * (1 + TOKEN_COST * width), where width is the tokens of its longest chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from cbtm_ray.decode.kv_cache import Chunk

T = TypeVar("T")

PASS_COST, TOKEN_COST = 40.0, 1 / 3
"""Cost model of a forward pass (measured, docs/LOG.md): 40 per pass, 1 per row for gathering its KV cache, 1/3 per token."""


@dataclass(frozen=True)
class PendingChunk(Generic[T]):
    """A chunk of tokens that a sequence needs an expert to read."""

    expert: int
    chunk: Chunk
    steps_waited: int
    """Steps since the sequence last advanced."""
    sequence: T


def choose_pass(pending: list[PendingChunk[T]], stacked: int) -> list[PendingChunk[T]]:
    """The chunks of the next pass: most waiting ended per unit of cost.

    The weight of a chunk grows with every pass that it waits, so none waits forever.

    Args:
        pending: at least one chunk.
        stacked: number of stacked experts; 0 if experts run one at a time.
    """
    candidates = _candidate_passes(pending, stacked)
    return max(candidates, key=lambda found: sum(1 + one.steps_waited for one in found[0]) / found[1])[0]


def _candidate_passes(pending: list[PendingChunk[T]], stacked: int) -> Iterator[tuple[list[PendingChunk[T]], float]]:
    """Candidate passes with their costs. A pass takes the chunks up to some width: of one expert, or the first n of each."""
    longest_first = sorted(pending, key=lambda one: -one.steps_waited)
    for width in sorted({len(one.chunk.tokens) for one in pending}):
        by_expert: dict[int, list[PendingChunk[T]]] = {}
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
