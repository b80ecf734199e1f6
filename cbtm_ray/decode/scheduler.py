"""Scheduler: picks the next forward pass as the batch that unblocks the most waiting sequences per unit of cost.

A pass is of one expert, or of all stacked experts (stacked.py) that a sequence waits for. Its cost is PASS_COST + experts *
EXPERT_COST + rows * (1 + TOKEN_COST * width), where width is the tokens of its longest chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from cbtm_ray.decode.kv_cache import Chunk

T = TypeVar("T")

PASS_COST, EXPERT_COST, TOKEN_COST = 40.0, 3.0, 1 / 3
"""Cost model of a forward pass (docs/LOG.md): 40 per pass, 1 per row for gathering its KV cache, 1/3 per token, as measured.
An expert's matrix products cost more than 3, but then passes of one expert seem better than they are: more sequences wait."""


@dataclass(frozen=True)
class PendingChunk(Generic[T]):
    """A chunk of tokens that a sequence needs an expert to read."""

    expert: int
    chunk: Chunk
    steps_waited: int
    """Steps since an expert last read of the sequence."""
    sequence: T


def choose_pass(pending: list[PendingChunk[T]], *, stacked: bool) -> list[PendingChunk[T]]:
    """The chunks of the next pass: most waiting ended per unit of cost.

    The weight of a chunk grows with every pass that it waits, so none waits forever.

    Args:
        pending: at least one chunk.
        stacked: whether several experts can run in one pass.
    """
    candidates = _candidate_passes(pending, stacked)
    return max(candidates, key=lambda found: sum(1 + one.steps_waited for one in found[0]) / found[1])[0]


def _candidate_passes(pending: list[PendingChunk[T]], stacked: bool) -> Iterator[tuple[list[PendingChunk[T]], float]]:
    """Candidate passes with their costs. A pass takes the chunks up to some width: of one expert, or of all."""
    for width in sorted({len(one.chunk.tokens) for one in pending}):
        fitting = [one for one in pending if len(one.chunk.tokens) <= width]
        by_expert: dict[int, list[PendingChunk[T]]] = {}
        for one in fitting:
            by_expert.setdefault(one.expert, []).append(one)
        for theirs in [*by_expert.values(), *([fitting] if stacked else [])]:
            experts = len({one.expert for one in theirs})
            yield theirs, PASS_COST + experts * EXPERT_COST + len(theirs) * (1 + TOKEN_COST * width)
