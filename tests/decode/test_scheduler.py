"""The next pass: several experts where they are stacked, one where many wait for it, and nobody waits for ever."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.decode.kv_cache import Chunk
from cbtm_ray.decode.scheduler import PendingChunk, choose_pass

SLOTS = torch.arange(200)


def pending(expert: int, length: int = 1, waited: int = 0, sequence: int = 0) -> PendingChunk[int]:
    return PendingChunk(expert, Chunk([1] * length, 0, SLOTS), waited, sequence)


def test_experts_that_are_asked_alike_are_read_together() -> None:
    asked = [pending(expert) for expert in range(8)]
    assert choose_pass(asked, stacked=True) == asked
    assert len(choose_pass(asked, stacked=False)) == 1


def test_an_expert_that_few_wait_for_is_read_with_the_others() -> None:
    """If not at once, then in the next pass."""
    asked = [pending(0, sequence=number) for number in range(30)] + [pending(1, waited=1)]
    assert choose_pass(asked, stacked=True) == asked


def test_a_long_prompt_does_not_make_padding_of_the_others() -> None:
    asked = [pending(0, sequence=number) for number in range(20)] + [pending(0, length=128)]
    assert choose_pass(asked, stacked=False) == asked[:20]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 7, 100])), min_size=1, max_size=12),
    st.booleans(),
)
def test_everybody_is_served_though_others_come_again(asked: list[tuple[int, int]], stacked: bool) -> None:
    """Whoever was served asks anew at once; 60 passes are enough for all."""
    waited, unserved = [0] * len(asked), set(range(len(asked)))
    for _ in range(60):
        chosen = {
            one.sequence
            for one in choose_pass(
                [pending(expert, length, waited[n], n) for n, (expert, length) in enumerate(asked)],
                stacked=stacked,
            )
        }
        assert chosen
        unserved -= chosen
        waited = [0 if n in chosen else passes + 1 for n, passes in enumerate(waited)]
    assert not unserved
