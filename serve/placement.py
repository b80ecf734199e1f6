"""Placement of experts in groups, and the group that decodes a request."""

from __future__ import annotations

from dataclasses import dataclass
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


def spread(n_experts: int, per_group: int | None) -> Layout:
    """Groups of so many experts, the last perhaps of fewer; None: one group."""
    size = per_group or n_experts
    return Layout([list(range(n_experts))[start : start + size] for start in range(0, n_experts, size)])


class Placement:
    """Chooses the expert group that decodes a sequence."""

    def __init__(
        self, layout: Layout, handles: list[DeploymentHandle], registry: DeploymentHandle, ensemble: Ensemble
    ) -> None:
        """
        Args:
            ensemble: its router is used; its experts are not loaded.
        """
        self.layout, self.registry, self.ensemble = layout, registry, ensemble
        # By gRPC: a streamed token costs a sixth of what it does through the object store.
        self.streams = [handle.options(stream=True, _by_reference=False) for handle in handles]

    async def plan(self, model: str, request: Request) -> Any:
        """The group that decodes a sequence: its experts have most of the weight at the prompt's end."""
        if model != ENSEMBLE or len(self.streams) == 1:
            return self.streams[0]
        _, _, disabled = await self.registry.stats.remote()
        active = [expert for expert in range(self.ensemble.n_experts) if expert not in disabled]
        router = self.ensemble.router(request.top_k, active)
        router.append(request.prompt)
        weights_K = router.weights()
        return self.streams[int(np.argmax([weights_K[clusters].sum() for clusters in self.layout.clusters]))]
