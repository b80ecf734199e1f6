"""How the next token is drawn from log-probabilities: penalties, temperature, truncation, and a seed of its own.

V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbtm_ray.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings that apply in the order of the fields, to the mixture's log-probabilities where other libraries have logits.

    Raises:
        UserError: a setting is out of its bounds.
    """

    repetition_penalty: float = 1.0
    """At least 1; multiplies the log-probability of every token that stands in prompt or answer (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """In [-2, 2]; subtracted from a token's log-probability for every time it stands in the answer (OpenAI's definition)."""
    presence_penalty: float = 0.0
    """In [-2, 2]; subtracted once if the token stands in the answer (OpenAI's definition)."""
    temperature: float = 1.0
    """At least 0; divides the log-probabilities. 0 takes the most probable token."""
    top_k_tokens: int | None = None
    """At least 1: only so many most probable tokens are drawn from. Not to be confused with top_k, the experts mixed."""
    top_p: float = 1.0
    """Share of the probability kept, in (0, 1]: the most probable tokens that together hold it."""
    seed: int | None = 0
    """None: no two draws alike."""

    def __post_init__(self) -> None:
        allowed = {
            "repetition_penalty": (self.repetition_penalty >= 1, "at least 1"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k_tokens": (self.top_k_tokens is None or self.top_k_tokens >= 1, "at least 1, or left out"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (self.seed is None or self.seed >= 0, "at least 0, or left out"),
        }
        for name, (holds, bound) in allowed.items():
            if not holds:
                raise UserError(f"{name}={getattr(self, name)} must be {bound}. Change it.")

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the probabilities as they are."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k_tokens is None and not self.penalizes


def token_probabilities(logprobs_V: np.ndarray, sampling: Sampling, prompt: list[int], answer: list[int]) -> np.ndarray:
    """The probabilities that the token after prompt and answer is drawn with, float64 (V,)."""
    scores_V = logprobs_V.astype(np.float64)
    if sampling.penalizes:
        seen = np.unique(np.array([*prompt, *answer], np.int64))
        scores_V[seen] *= sampling.repetition_penalty  # log-probabilities are never positive
        used, counts = np.unique(np.array(answer, np.int64), return_counts=True)
        scores_V[used] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if sampling.temperature == 0:
        probabilities_V = np.zeros(len(scores_V))
        probabilities_V[scores_V.argmax()] = 1
        return probabilities_V
    probabilities_V = np.exp((scores_V - scores_V.max()) / sampling.temperature)
    if sampling.top_k_tokens is not None and sampling.top_k_tokens < len(probabilities_V):
        probabilities_V[np.argsort(-scores_V, kind="stable")[sampling.top_k_tokens :]] = 0
    probabilities_V /= probabilities_V.sum()
    if sampling.top_p < 1:
        order_V = np.argsort(-probabilities_V, kind="stable")
        kept = int(np.searchsorted(np.cumsum(probabilities_V[order_V]), sampling.top_p)) + 1
        probabilities_V[order_V[kept:]] = 0
        probabilities_V /= probabilities_V.sum()
    return probabilities_V


def draw(weights: np.ndarray, random: np.random.Generator) -> int:
    """An index, drawn in proportion to non-negative weights of any sum."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])  # the product may round up to the sum
