"""Three ways to draw the next token from the mixture p(y | x) = sum_j w_j(x) p_j(y | x), all exact.

    lockstep      every running expert reads every token; right for every sampling setting
    ancestral     draw an expert by its weight, then the token from that expert: the mixture, at the price of one expert.
                  Only for probabilities as they are: temperature 1, no truncation, no penalties
    speculative   the expert of most weight drafts some tokens, the others read them in one pass, rejection sampling keeps
                  the mixture (Leviathan et al. 2023, algorithm 1). Right for every setting, and faster than lockstep where
                  experts agree; tokens come several at a time

An expert that was not asked for a while reads what it missed in one chunk. A strategy says how far which experts have to
read (`reads`) and then goes on by a step (`advance`), which gives no token, one or several.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from cbtm_ray.sampling import draw
from cbtm_ray.sequence import Request, Sequence, Step

FIRST_DRAFT_TOKENS, MAX_DRAFT_TOKENS = 4, 8

Strategy: TypeAlias = "Lockstep | Ancestral | Speculative"


class Lockstep:
    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence

    def reads(self) -> dict[int, int]:
        return {expert: len(self.sequence.text) for expert in self.sequence.router.running}

    def advance(self) -> list[Step]:
        sequence = self.sequence
        sequence.refresh()
        logprobs_V, weights_K = sequence.mixture(len(sequence.text) - 1)
        token = draw(sequence.probabilities(logprobs_V), sequence.random)
        return [sequence.append(token, logprobs_V, weights_K)]


class Ancestral:
    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._drawn: tuple[int, np.ndarray] | None = None

    def reads(self) -> dict[int, int]:
        sequence = self.sequence
        if sequence.refresh_due:  # the weights need all first
            return {expert: len(sequence.text) for expert in sequence.router.running}
        self._drawn = self._draw_expert()
        return {self._drawn[0]: len(sequence.text)}

    def advance(self) -> list[Step]:
        sequence = self.sequence
        sequence.refresh()
        expert, weights_K = self._drawn or self._draw_expert()
        self._drawn = None
        logprobs_V = sequence.readings[expert].predicted(len(sequence.text) - 1)
        token = draw(sequence.probabilities(logprobs_V), sequence.random)
        return [sequence.append(token, None, weights_K, expert)]

    def _draw_expert(self) -> tuple[int, np.ndarray]:
        weights_K = self.sequence.router.weights()
        return draw(weights_K, self.sequence.random), weights_K


class Speculative:
    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.draft_tokens = FIRST_DRAFT_TOKENS
        """Tokens to draft: one more than were accepted the last time."""
        self._drafted_with: list[np.ndarray] = []
        self._drafter = -1

    @property
    def _drafting(self) -> bool:
        sequence, drafts = self.sequence, self.sequence.drafts
        if len(sequence.router.running) == 1 or (drafts and drafts[-1] == sequence.ensemble.end_of_text):
            return False
        return len(drafts) < min(self.draft_tokens, sequence.n_left - 1)

    def reads(self) -> dict[int, int]:
        sequence = self.sequence
        end = len(sequence.text) + len(sequence.drafts)
        if not self._drafting:
            return dict.fromkeys(sequence.router.running, end)
        if not sequence.drafts:
            self._drafter = int(sequence.router.weights().argmax())
        return {self._drafter: end}

    def advance(self) -> list[Step]:
        sequence, drafts = self.sequence, self.sequence.drafts
        if not self._drafting:
            return self._verify()
        logprobs_V = sequence.readings[self._drafter].predicted(len(sequence.text) + len(drafts) - 1)
        probabilities_V = sequence.probabilities(logprobs_V)
        drafts.append(draw(probabilities_V, sequence.random))
        self._drafted_with.append(probabilities_V)
        return []

    def _verify(self) -> list[Step]:
        """Accept each draft with probability min(1, p / q); the first one refused gives way to a token from the rest of p,
        max(p - q, 0). After all of them comes one more token, from p itself."""
        sequence, steps, accepted = self.sequence, list[Step](), 0
        drafts, sequence.drafts = sequence.drafts, []
        for draft, q_V in [*zip(drafts, self._drafted_with, strict=True), (-1, None)]:
            sequence.refresh()
            logprobs_V, weights_K = sequence.mixture(len(sequence.text) - 1)
            p_V = sequence.probabilities(logprobs_V)
            accept = q_V is not None and sequence.random.random() * q_V[draft] < p_V[draft]
            rest_V = p_V if q_V is None else (p_V - q_V).clip(min=0)
            steps.append(sequence.append(draft if accept else draw(rest_V, sequence.random), logprobs_V, weights_K))
            accepted += accept
            if not accept or steps[-1].finish_reason:
                break
        for reading in sequence.readings.values():
            reading.go_back(len(sequence.text) - 1)
        self.draft_tokens, self._drafted_with = min(accepted + 1, MAX_DRAFT_TOKENS), []
        return steps


STRATEGIES: dict[str, type[Strategy]] = {"lockstep": Lockstep, "ancestral": Ancestral, "speculative": Speculative}


def strategy_for(request: Request) -> str:
    """The name of the strategy that a request runs with.

    Raises:
        ValueError: it is unknown, or would not be exact.
    """
    exact = request.sampling.plain and request.top_logprobs is None
    if request.strategy == "auto":
        return "ancestral" if exact else "speculative"
    if request.strategy not in STRATEGIES:
        raise ValueError(f"strategy={request.strategy!r} must be one of {', '.join(STRATEGIES)} or auto. Choose one.")
    if request.strategy == "ancestral" and not exact:
        raise ValueError(
            "strategy='ancestral' must be asked for without log-probabilities, at temperature 1 and without truncation or "
            "penalties: it would not be exact. Use auto."
        )
    return request.strategy
