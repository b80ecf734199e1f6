"""The continuation of one prompt, token by token."""

from __future__ import annotations

from collections.abc import Iterator

from cbtm_ray.engine import Engine, slots_needed
from cbtm_ray.ensemble import Ensemble
from cbtm_ray.sampling import Sampling
from cbtm_ray.sequence import Request, Step


def generate(
    ensemble: Ensemble, prompt: list[int], *, top_k: int, max_tokens: int, sampling: Sampling, strategy: str = "auto"
) -> Iterator[Step]:
    """Tokens after a prompt, as they come; ends after `max_tokens` or with the end-of-text token, which is given too.

    Raises:
        UserError: the request cannot run (see `Engine.add`).
    """
    request = Request(prompt=prompt, max_tokens=max_tokens, top_k=top_k, sampling=sampling, strategy=strategy)
    return run(ensemble, request)


def run(ensemble: Ensemble, request: Request) -> Iterator[Step]:
    """The steps of one request."""
    engine = Engine(ensemble, max_sequences=1, cache_tokens=slots_needed(request))
    engine.add(request)
    while engine.running or engine.waiting:
        for _, step in engine.step():
            yield step
