"""What all replicas must agree on: which experts take part, and how much each has served."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from ray import serve

TOLD_S = 10.0
"""How long a change waits for the groups' replicas, which report every second. One that is silent for longer is gone."""


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
class ExpertRegistry:
    """One small replica, which the expert groups report to; a new one learns the state from their next report."""

    def __init__(self) -> None:
        self.disabled: set[int] | None = None
        """Experts that take no part; None: no group has said it yet."""
        self.requests: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        self._replicas, self._behind = set[str](), set[str]()  # of groups; those that have not heard of the last change
        self._told = asyncio.Event()

    async def report(
        self, replica: str, requests: Counter[int], tokens: Counter[int], disabled: set[int] | None
    ) -> set[int] | None:
        """Count what a group's replica has served since its last report; the experts that are to take no part, by cluster.
        None, given or returned: the replica, or the registry, is new and does not know."""
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
        """Take an expert out of the ensemble or back into it. Done when all groups know it, for a new registry asks any of them.

        Returns:
            False, and nothing done, if no expert would be left. None, and nothing done, if the registry does not know yet which
            experts take part.
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
        """Requests and tokens by cluster, and the experts that take no part."""
        return self.requests, self.tokens, self.disabled or set()
