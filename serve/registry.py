"""ExpertRegistry: which experts are disabled, which all replicas must agree on, and how much each expert has served."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter

from ray import serve
from ray.serve.handle import DeploymentHandle

from .remote_experts import REPLICA_LOST

logger = logging.getLogger("ray.serve")

REPORT_EVERY_S = 1.0
TOLD_S = 10.0
"""How long a change waits for replicas, which report every second. A replica that is silent for longer is gone."""


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
class ExpertRegistry:
    """One small actor to which expert groups report. A new one learns the state from their next report."""

    def __init__(self) -> None:
        self.disabled: set[int] | None = None
        """Disabled experts, by cluster. None until a group has reported them."""
        self.requests: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self._replicas, self._behind = set[str](), set[str]()  # that report; that do not know the last change yet
        self._told = asyncio.Event()

    async def report(
        self, replica: str, requests: Counter[int], tokens: Counter[int], disabled: set[int] | None
    ) -> set[int] | None:
        """Add what a replica has served since its last report, and return the disabled experts, by cluster.

        `disabled` is None if the replica is new; the result is None if the registry is new too.
        """
        self.requests.update(requests)
        self.tokens.update(tokens)
        if self.disabled is None:
            self.disabled = disabled
        self._replicas.add(replica)
        self._behind.discard(replica)
        if not self._behind:
            self._told.set()
        return self.disabled

    async def set_active(self, cluster: int, active: bool, n_experts: int) -> bool | None:
        """Enable or disable an expert. Returns when all replicas know it, since a new registry learns from any of them.

        Returns:
            False if no expert would be left, None if the registry is new and does not know the disabled experts; neither
            changes anything.
        """
        if self.disabled is None:
            return None
        disabled = self.disabled - {cluster} if active else self.disabled | {cluster}
        if len(disabled) == n_experts:
            return False
        self.disabled, self._behind = disabled, self._replicas.copy()
        if self._behind:
            self._told.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), TOLD_S)
        self._replicas -= self._behind
        return True

    async def stats(self) -> tuple[Counter[int], Counter[int], set[int]]:
        """Requests and tokens by cluster, and the disabled experts."""
        return self.requests, self.tokens, self.disabled or set()


class Reporter:
    """What a replica that routes texts has served since its last report, and which experts it leaves out."""

    def __init__(self, registry: DeploymentHandle) -> None:
        self.requests, self.tokens = Counter[int](), Counter[int]()
        self.disabled: set[int] | None = None
        """Set by the replica when the disabled experts take no part any more. None: not told yet."""
        self._registry, self._name = registry, uuid.uuid4().hex

    async def report(self) -> set[int] | None:
        """Report to the registry; the disabled experts, by cluster."""
        requests, tokens = self.requests.copy(), self.tokens.copy()
        self.requests.clear()
        self.tokens.clear()
        try:
            # A new registry knows nothing; a replica that knows better tells it before this one reports again.
            return await self._registry.report.remote(self._name, requests, tokens, self.disabled) or set()
        except REPLICA_LOST as lost:  # another one comes, and is told next time
            logger.warning("The registry died under a report: %s", lost)
            self.requests.update(requests)
            self.tokens.update(tokens)
            return self.disabled
