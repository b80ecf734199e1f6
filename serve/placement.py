"""Placement of experts in groups: the group that decodes a request, and the request that it gets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from cbtm_ray.decode.sequence import Request
from cbtm_ray.merge.ensemble import Ensemble

ENSEMBLE, DENSE_MODEL = "cbtm", "dense"


@dataclass(frozen=True)
class Layout:
    """Which experts each group holds; the dense control is with the first."""

    clusters: list[list[int]]

    @property
    def names(self) -> list[str]:
        """Names of the deployments."""
        if len(self.clusters) == 1:
            return ["ExpertGroup"]
        return [f"ExpertGroup{index}" for index in range(len(self.clusters))]

    def group_of(self, expert: int) -> int:
        return next(index for index, clusters in enumerate(self.clusters) if expert in clusters)

    def by_group(self, experts: list[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for expert in experts:
            found.setdefault(self.group_of(expert), []).append(expert)
        return found


def spread(n_experts: int, per_group: int | None) -> Layout:
    """Groups of so many experts, the last perhaps of fewer; None: one group."""
    size = per_group or n_experts
    return Layout([list(range(n_experts))[start : start + size] for start in range(0, n_experts, size)])


class Placement:
    """What a gateway knows of the groups."""

    def __init__(
        self, layout: Layout, handles: list[DeploymentHandle], registry: DeploymentHandle, ensemble: Ensemble
    ) -> None:
        """
        Args:
            ensemble: what routes; no experts are needed.
        """
        self.layout, self.registry, self.ensemble = layout, registry, ensemble
        # By gRPC: a streamed token costs a sixth of what it does through the object store.
        self.streams = [handle.options(stream=True, _by_reference=False) for handle in handles]
        self.calls = [handle.options(_by_reference=False) for handle in handles]

    async def plan(self, model: str, request: Request) -> tuple[Any, Request]:
        """The group that decodes what comes next of a text, and what it is to decode.

        Where experts are held after a prefix, a text shorter than that is decoded only up to its end: there the experts that
        serve the rest are chosen, and they may be elsewhere.
        """
        if model != ENSEMBLE or len(self.streams) == 1:
            return self.streams[0], request
        _, _, disabled = await self.registry.stats.remote()
        active = [expert for expert in range(self.ensemble.n_experts) if expert not in disabled]
        router, token_ids = self.ensemble.router(request.top_k, active), [*request.prompt, *request.answer]
        hold_at = router.hold_at
        router.append(token_ids[:hold_at])
        request = replace(request, candidates=tuple(active))
        if hold_at is not None:
            if len(token_ids) < hold_at:
                request = replace(request, max_tokens=min(request.max_tokens, hold_at - len(request.prompt)))
            if not request.echo_logprobs:
                request = replace(request, known_logprobs=await self._score(token_ids[:hold_at], router.running))
                router.observe(request.known_logprobs)
        weights_K = router.weights()
        shares = [weights_K[clusters].sum() for clusters in self.layout.clusters]
        return self.streams[int(np.argmax(shares))], request

    async def _score(self, prefix: list[int], experts: list[int]) -> dict[int, list[float]]:
        """Log-probabilities that each expert gives to the tokens of the prefix."""
        asked = self.layout.by_group(experts)
        found = await asyncio.gather(
            *(self.calls[group].score.remote(theirs, prefix) for group, theirs in asked.items())
        )
        return {expert: logprobs for part in found for expert, logprobs in part.items()}
