"""The routers: how experts are weighted for every token.

All are parts of one formula, whose first term is the paper's (section 2):

    log w_j(x_<t) = -||h(x_<t) - c_j||^2 / T  +  beta * sum_{s<t} gamma^(t-1-s) e_j(x_s)  + const

kept for the `top_k` largest weights and renormalized. A router says which terms it has, and whether it holds its experts
after a prefix. A new one is an entry of `ROUTERS`, a name in `config.Routing`, and a line in docs/REFERENCE.md. A new source
of evidence e_j is one more value of `Router.evidence`: `evidence_TK` knows its terms for whole documents,
`ContextRouter.append` those of a text that grows. Evaluation has all routers, serving those without the experts' own
evidence (`Router.servable`).

T tokens (of one document after the other), K experts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cbtm_ray.config import EvaluateConfig
from cbtm_ray.errors import UserError
from cbtm_ray.merge.rereading import chosen_experts, tokens_read
from cbtm_ray.merge.scores import (
    ScoredHalf,
    Settings,
    evidence,
    hold_after_prefix,
    routing_scores,
    sparse_weights,
)


@dataclass(frozen=True, kw_only=True)
class Router:
    """A way of routing, without its settings."""

    meaning: str
    """A sentence for the report."""
    tuned: tuple[str, ...] = ()
    """Settings that are chosen on held-out text, of temperature, beta and gamma; what is missing is as in `routing_scores`,
    and gamma is 1."""
    evidence: Literal["experts", "ngrams"] | None = None
    """The evidence e_j. 'experts': the log-probability of a token by the expert itself, which has to run for it.
    'ngrams': of its cluster's bigram model, over all clusters'. None: 0."""
    holds: bool = False
    """Whether the best `top_k` experts at the end of the prefix stay for good."""

    @property
    def servable(self) -> bool:
        """Whether a text can be routed without a run of an expert: what decoding and the endpoint can route by."""
        return self.evidence != "experts"

    def candidates(self, config: EvaluateConfig) -> list[Settings]:
        """The settings to choose from. Gamma changes slowest: its evidence takes a pass over all tokens."""
        if self.evidence == "ngrams":
            priors: list[Settings] = [{}, *({"temperature": temperature} for temperature in config.temperatures)]
            found = itertools.product(config.ngram_gammas, priors, config.ngram_betas)
            return [{"gamma": gamma, "beta": beta} | prior for gamma, prior, beta in found]
        choices = {"gamma": config.gammas, "temperature": config.temperatures, "beta": config.betas}
        names = [name for name in choices if name in self.tuned]
        legacy = config.legacy_d4 and self.tuned == ("temperature",)  # of the paper's own routing alone
        fixed: Settings = {"legacy_d4": True} if legacy else {}
        products = itertools.product(*(choices[name] for name in names))
        return [dict(zip(names, values, strict=True)) | fixed for values in products]

    def sizes(self, n_experts: int) -> range:
        """Every top_k that this router can mix: all experts where none is better than another."""
        return range(1 if self.tuned or self.evidence else n_experts, n_experts + 1)

    def reported_sizes(self, n_experts: int, config: EvaluateConfig) -> list[int]:
        """The sizes in `evaluate.top_k`, and K. Holding all K experts would be posterior routing, so K is left out there."""
        wanted = {*config.top_k, n_experts} - ({n_experts} if self.holds else set())
        return [top_k for top_k in self.sizes(n_experts) if top_k in wanted]

    def evidence_TK(self, held_out: ScoredHalf, gamma: float) -> np.ndarray:
        """The evidence for every expert before every token; each document starts anew."""
        if self.evidence is None:
            return np.zeros_like(held_out.logprobs_TK)
        tokens_TK = held_out.logprobs_TK if self.evidence == "experts" else held_out.ngrams_TK
        return np.concatenate([evidence(tokens_TK[rows], gamma) for rows in held_out.documents()])

    def order_TK(self, held_out: ScoredHalf, scores_TK: np.ndarray, prefix_tokens: int) -> np.ndarray:
        """The experts before every token, best first; held ones in the order of the prefix's end."""
        order_TK = np.argsort(-scores_TK, axis=1, kind="stable")
        if self.holds:
            for rows in held_out.documents():
                order_TK[rows][prefix_tokens:] = order_TK[rows][prefix_tokens : prefix_tokens + 1]
        return order_TK


_POSTERIOR = ("gamma", "temperature", "beta")

ROUTERS = {
    "embedding": Router(
        meaning="Experts are weighted by the distance of their cluster's center to the context.", tuned=("temperature",)
    ),
    "ngram": Router(
        meaning="Experts are weighted by how well a bigram model of their cluster explains the context, and by distance where "
        "that helps. An expert takes over only if that is worth the tokens it has to read.",
        tuned=_POSTERIOR,
        evidence="ngrams",
    ),
    "posterior": Router(
        meaning="Experts are weighted by that distance and by how well each predicted the context so far, recent tokens most.",
        tuned=_POSTERIOR,
        evidence="experts",
    ),
    "prefix": Router(
        meaning="Every expert reads the first tokens; those that explain them best stay for good.",
        tuned=_POSTERIOR,
        evidence="experts",
        holds=True,
    ),
    "uniform": Router(meaning="All experts weigh alike: for controls whose clusters have no centers."),
    "bayes": Router(
        meaning="Experts are weighted by how well each predicted the whole context so far, from equal weights (BTM).",
        evidence="experts",
    ),
}


def check_reported(config: EvaluateConfig, n_experts: int) -> None:
    """UserError if the routers of the ensemble and their sizes leave nothing to report."""
    if not any(ROUTERS[name].reported_sizes(n_experts, config) for name in config.routings):
        raise UserError(
            f"evaluate.routings={list(config.routings)} with evaluate.top_k={list(config.top_k)} of {n_experts} experts "
            "leaves nothing to report. Add 'posterior' to the routings."
        )


@dataclass(frozen=True, kw_only=True)
class Route:
    """A router with its settings, for mixtures of `top_k` experts."""

    routing: str
    """The router's name."""
    top_k: int
    settings: Settings
    prefix_tokens: int
    """Tokens of a document after which a router that holds its experts does."""

    @property
    def router(self) -> Router:
        return ROUTERS[self.routing]

    @property
    def gamma(self) -> float:
        return self.settings.get("gamma", 1.0)

    @property
    def reread_cost(self) -> float:
        """In units of the scores."""
        return self.settings.get("reread_cost", 0.0) * self.settings.get("beta", 1.0)

    def weights(self, held_out: ScoredHalf) -> np.ndarray:
        """Weights of the experts for every token, (T, K)."""
        evidence_TK = self.router.evidence_TK(held_out, self.gamma)
        scores_TK = routing_scores(held_out.squared_distances_TK, evidence_TK, self.settings)
        if self.router.holds:
            held = [hold_after_prefix(scores_TK[rows], self.top_k, self.prefix_tokens) for rows in held_out.documents()]
            scores_TK = np.concatenate(held)
        if self.router.evidence == "ngrams":
            chosen_TK = chosen_experts(scores_TK, held_out.lengths, self.top_k, self.reread_cost)
            scores_TK = np.where(chosen_TK, scores_TK, -np.inf)
        return sparse_weights(scores_TK, self.top_k)

    def experts_run(self, held_out: ScoredHalf) -> float:
        """Experts that run for a token, on average: the experts that are mixed, with the tokens that they read when they take
        over, and the experts whose likelihood is evidence."""
        n_experts, lengths = held_out.logprobs_TK.shape[1], held_out.lengths
        if self.router.evidence != "experts":
            return tokens_read(self.weights(held_out) > 0, lengths)
        if not self.router.holds or self.top_k == n_experts:
            return float(n_experts)
        prefixes = np.minimum(lengths, self.prefix_tokens).sum() / lengths.sum()
        return float(prefixes * n_experts + (1 - prefixes) * self.top_k)
