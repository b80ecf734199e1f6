"""Routing of one text that grows by a token at a time, as a decoder needs it.

K experts, R of them that may take part, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cbtm_ray.cluster.embed import Context
from cbtm_ray.cluster.ngrams import NgramTables
from cbtm_ray.merge.rereading import best_after_reading
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import routing_scores, sparse_weights


class ContextRouter:
    """The weights of `Route.weights`, token by token, in O(R D) each; for routers that need no expert's likelihood.

    Experts are chosen where weights are asked for, and a change of experts has its cost from there on. So weights that are
    asked for at every token are those of the evaluation. Tokens that are appended together are a prompt that nobody has read.
    """

    def __init__(
        self,
        route: Route,
        context: Context,
        centers_KD: np.ndarray,
        active: Iterable[int],
        ngrams: NgramTables | None = None,
    ) -> None:
        """
        Args:
            context: embeds the text, which is empty yet.
            active: experts that may take part.
            ngrams: the evidence of a router by n-grams.
        """
        assert route.router.servable
        self._route, self._context, self._n_experts = route, context, len(centers_KD)
        self._gamma, self._reread_cost = route.gamma, route.reread_cost
        self._experts_R = np.array(sorted(active))
        self._centers_RD = centers_KD[self._experts_R]
        self._ngrams, self._last_token = ngrams, 0 if ngrams is None else ngrams.end_of_text
        self._evidence_R = np.zeros(len(self._experts_R))
        self._length = 0
        self._read_R = np.zeros(len(self._experts_R), int)  # length of the context when the expert was last mixed
        self._weights_K: np.ndarray | None = None

    @property
    def running(self) -> list[int]:
        """Experts that are mixed for the next token."""
        return np.flatnonzero(self.weights()).tolist()

    def weights(self) -> np.ndarray:
        """Weights for the next token, float64 (K,)."""
        if self._weights_K is None:
            top_k = min(self._route.top_k, len(self._experts_R))
            scores_R = self._scores()
            best = best_after_reading(scores_R, self._length - self._read_R, top_k, self._reread_cost)
            self._read_R[best] = self._length
            self._weights_K = np.zeros(self._n_experts)
            self._weights_K[self._experts_R[best]] = 1 if top_k == 1 else sparse_weights(scores_R[best], top_k)
        return self._weights_K

    def append(self, tokens: Sequence[int]) -> None:
        """Take in the next tokens."""
        if "temperature" in self._route.settings:
            for token in tokens:
                self._context.append(token)
        if self._route.router.evidence == "ngrams" and len(tokens):
            self._evidence_R = self._gamma ** len(tokens) * self._evidence_R + self._new_evidence(tokens)
            self._last_token = tokens[-1]
        self._length += len(tokens)
        self._weights_K = None

    def replay(self, tokens: Sequence[int]) -> None:
        """Take in the next tokens, with the choices that were made before each of them."""
        for token in tokens:
            self.weights()
            self.append([token])

    def _new_evidence(self, tokens: Sequence[int]) -> np.ndarray:
        """The tokens' own, (R,). One token is the way of every answer, and has to be fast."""
        assert self._ngrams is not None
        if len(tokens) == 1:
            return self._ngrams.step(self._last_token, tokens[0])[self._experts_R]
        found_TR = self._ngrams.evidence(np.array([self._last_token, *tokens]))[1:, self._experts_R]
        return self._gamma ** np.arange(len(tokens) - 1, -1, -1) @ found_TR

    def _scores(self) -> np.ndarray:
        if "temperature" not in self._route.settings:
            return routing_scores(self._evidence_R, self._evidence_R, self._route.settings)
        offsets_RD = self._context.embedding() - self._centers_RD
        return routing_scores(np.vecdot(offsets_RD, offsets_RD), self._evidence_R, self._route.settings)
