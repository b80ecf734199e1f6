"""Routing of one text that grows by a token at a time, as a decoder needs it.

K experts, R of them that may take part, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cbtm_ray.cluster.embed import Context
from cbtm_ray.cluster.ngrams import NgramTables
from cbtm_ray.merge.rereading import best_after_reading
from cbtm_ray.merge.routers import Route
from cbtm_ray.merge.scores import routing_scores, sparse_weights


class ContextRouter:
    """The weights of `Route.weights`, token by token, in O(R D) each.

    They are the same where the evidence of every token is observed before the next is appended. It may come later than the
    tokens: then the weights are a function of the embedding of the whole context and of the evidence so far.
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
        self._route, self._context, self._n_experts = route, context, len(centers_KD)
        self.length = 0
        """Tokens appended."""
        self.hold_at = route.held_after
        """Length of the text at which the best experts are to be held; None: they have been, or never are."""
        self._experts_R = np.array(sorted(active))
        self._centers_RD = centers_KD[self._experts_R]
        self._evidence_R = np.zeros(len(self._experts_R))
        self._observed_R = np.zeros(len(self._experts_R), int)  # tokens whose evidence has been taken in
        self._ngrams, self._last_token = ngrams, None if ngrams is None else ngrams.end_of_text
        self._read_R = np.zeros(len(self._experts_R), int)  # length of the context when the expert was last mixed
        self._weights_K: np.ndarray | None = None
        self._running: list[int] | None = None
        self._changed()

    @property
    def running(self) -> list[int]:
        """Experts that have to read the text for the next weights: for their evidence, or because they are mixed."""
        if self._running is None:
            evident = self._route.router.evidence == "experts"
            self._running = self._experts_R[self._rows].tolist() if evident else np.flatnonzero(self.weights()).tolist()
        return self._running

    def weights(self) -> np.ndarray:
        """Weights for the next token, float64 (K,)."""
        if self._weights_K is None:
            scores, weights_K = self._scores(), np.zeros(self._n_experts)
            top_k = min(self._route.top_k, len(scores))
            if self._route.router.evidence == "ngrams":
                best = best_after_reading(scores, self.length - self._read_R, top_k, self._route.reread_cost)
                self._read_R[best] = self.length
                dropped = np.ones(len(scores), bool)
                dropped[best] = False
                scores[dropped] = -np.inf
            weights_K[self._experts_R[self._rows]] = 1 if len(scores) == 1 else sparse_weights(scores, top_k)
            self._weights_K = weights_K
        return self._weights_K

    def append(self, tokens: Iterable[int]) -> None:
        """Take in the next tokens. The evidence up to `hold_at` has to be observed before a token after it is appended."""
        for token in tokens:
            assert self.length != self.hold_at
            self._context.append(token)
            self.length += 1
            if self._route.router.evidence == "ngrams":
                self._evidence_R *= self._route.gamma
                self._evidence_R += self._token_evidence(token)
        self._changed()

    def _token_evidence(self, token: int) -> np.ndarray:
        assert self._ngrams is not None
        found_K, self._last_token = self._ngrams.step(self._last_token, token), token
        return found_K[self._experts_R]

    def due(self, refresh_tokens: int) -> bool:
        """Whether the next weights need the running experts' evidence up to here.

        They do after so many tokens without, at the end of the prefix, and where an expert runs that lags behind the others.
        """
        if self._route.router.evidence != "experts":
            return False
        observed_R = self._observed_R[self._rows]
        missing = self.length - observed_R.min()
        lags = observed_R.min() < observed_R.max()
        return bool(missing and (missing >= refresh_tokens or lags or self.length == self.hold_at))

    def observe(self, logprobs: Mapping[int, Sequence[float]]) -> None:
        """Take in the evidence up to here: each running expert's log-probabilities of the text's tokens, from the first on."""
        for row in self._rows.tolist():
            evidence, told = float(self._evidence_R[row]), logprobs[int(self._experts_R[row])]
            assert len(told) >= self.length
            for logprob in told[self._observed_R[row] : self.length]:
                evidence = self._route.gamma * evidence + logprob
            self._evidence_R[row], self._observed_R[row] = evidence, self.length
        self._weights_K = None
        if self.length == self.hold_at:
            self._hold()

    def _hold(self) -> None:
        best = np.sort(self._rows[np.argsort(-self._scores(), kind="stable")[: self._route.top_k]])
        self._experts_R, self._centers_RD = self._experts_R[best], self._centers_RD[best]
        self._evidence_R, self._observed_R = self._evidence_R[best], self._observed_R[best]
        self.hold_at = None
        self._changed()

    def _changed(self) -> None:
        """Look anew at the context: the distances to it, and which rows (of R) are weighed."""
        offsets_RD = self._context.embedding() - self._centers_RD
        self._distances_R = np.vecdot(offsets_RD, offsets_RD)
        self._rows = np.arange(len(self._experts_R))
        if self._route.router.nearest and self.hold_at is not None:
            readers = int(self._route.settings["prefix_experts"])
            self._rows = np.sort(np.argsort(self._distances_R, kind="stable")[:readers])
        self._weights_K = self._running = None

    def _scores(self) -> np.ndarray:
        rows = self._rows
        return routing_scores(self._distances_R[rows], self._evidence_R[rows], self._route.settings)
