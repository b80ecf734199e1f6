"""Experts spread over groups: which group decodes a request, and what it is told beforehand."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ray.serve.handle import DeploymentHandle

from cbtm_ray.ensemble import Ensemble, PrefixRouter
from cbtm_ray.sequence import Request
from cbtm_ray.shard_steps import squared_distances

ENSEMBLE, DENSE = "cbtm", "dense"


@dataclass(frozen=True)
class Layout:
    """Which experts each group holds; the dense control is with the first."""

    clusters: list[list[int]]

    @property
    def names(self) -> list[str]:
        """Of the deployments."""
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


class Groups:
    """What a gateway knows of the groups."""

    def __init__(
        self,
        layout: Layout,
        handles: list[DeploymentHandle],
        roster: DeploymentHandle,
        ensemble: Ensemble,
        prefix_experts: int | None,
    ) -> None:
        """
        Args:
            ensemble: what routes; no experts are needed.
            prefix_experts: how many experts score a prefix, those nearest to it; None: all.
        """
        self.layout, self.roster, self.ensemble, self.prefix_experts = layout, roster, ensemble, prefix_experts
        # By gRPC: a streamed token costs a sixth of what it does through the object store.
        self.streams = [handle.options(stream=True, _by_reference=False) for handle in handles]
        self.calls = [handle.options(_by_reference=False) for handle in handles]

    async def plan(self, model: str, request: Request) -> tuple[Any, Request]:
        """The group that decodes what comes next of a text, and what it is to decode: of a text shorter than the prefix only
        up to its end, for there the experts that serve the rest are chosen, and they may be elsewhere."""
        if model != ENSEMBLE or (len(self.streams) == 1 and self.prefix_experts is None):
            return self.streams[0], request
        text, n_prefix = [*request.prompt, *request.answer], self.ensemble.prefix_tokens
        prefix = text[:n_prefix]
        candidates = await self._candidates(prefix)
        request = replace(request, candidates=tuple(candidates))
        if len(self.streams) == 1:
            return self.streams[0], request
        if len(text) < n_prefix:
            request = replace(request, max_tokens=min(request.max_tokens, n_prefix - len(request.prompt)))
        router = PrefixRouter(self.ensemble, request.top_k, candidates)
        heard = {} if request.echo_logprobs else await self._score(prefix, candidates)
        router.read(prefix)
        if heard:
            router.observe([heard[expert] for expert in router.running])
        weights_K = router.weights()
        shares = [weights_K[clusters].sum() for clusters in self.layout.clusters]
        return self.streams[int(np.argmax(shares))], replace(request, heard=heard)

    async def _candidates(self, prefix: list[int]) -> list[int]:
        _, _, resting = await self.roster.served.remote()
        active = [expert for expert in range(self.ensemble.n_experts) if expert not in resting]
        if self.prefix_experts is None:
            return active
        context = self.ensemble.embedder.context()
        for token in prefix:
            context.append(token)
        embedding_1D = torch.from_numpy(context.embedding()[None])
        distances_K = squared_distances(embedding_1D, self.ensemble.centers_KD)[0].tolist()
        return sorted(sorted(active, key=lambda expert: distances_K[expert])[: self.prefix_experts])

    async def _score(self, prefix: list[int], experts: list[int]) -> dict[int, list[float]]:
        """Log-probabilities that each expert gives to the tokens of the prefix."""
        asked = self.layout.by_group(experts)
        found = await asyncio.gather(
            *(self.calls[group].score.remote(theirs, prefix) for group, theirs in asked.items())
        )
        return {expert: logprobs for part in found for expert, logprobs in part.items()}
