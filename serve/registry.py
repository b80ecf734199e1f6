"""ExpertRegistry: which experts are disabled, which all replicas must agree on, and how much each expert has served."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from ray import serve

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
