"""What all replicas must agree on: which experts take part, and how much each has served."""

from __future__ import annotations

from collections import Counter

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
class Roster:
    """One small replica, which the expert groups report to; a new one learns the state from their next report."""

    def __init__(self) -> None:
        self.resting: set[int] | None = None
        self.requests: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()

    async def report(self, requests: Counter[int], tokens: Counter[int], resting: set[int]) -> set[int]:
        """Count what a group has served since its last report; the experts that are to take no part, by cluster."""
        self.requests.update(requests)
        self.tokens.update(tokens)
        if self.resting is None:
            self.resting = resting
        return self.resting

    async def set_active(self, cluster: int, active: bool, n_experts: int) -> bool:
        """Take an expert out of the ensemble or back into it; False, and nothing done, if none would be left."""
        resting = (self.resting or set()) - {cluster} if active else (self.resting or set()) | {cluster}
        if len(resting) == n_experts:
            return False
        self.resting = resting
        return True

    async def served(self) -> tuple[Counter[int], Counter[int], set[int]]:
        """Requests and tokens by cluster, and the experts that take no part."""
        return self.requests, self.tokens, self.resting or set()
