"""Three ways to draw the next token from the mixture p(y | x) = sum_j w_j(x) p_j(y | x), all exact.

    lockstep      every running expert reads every token; right for every sampling setting
    ancestral     draw an expert by its weight, then the token from that expert: the mixture, at the price of one expert.
                  Only for probabilities as they are: temperature 1, no truncation, no penalties
    speculative   the expert of most weight drafts some tokens, the others read them in one pass, rejection sampling keeps
                  the mixture (Leviathan et al. 2023, algorithm 1). Right for every setting; tokens come several at a time.
                  It drafts as many as pay where experts agree so often, and none, which is lockstep, where they do not

An expert that was not asked for a while reads what it missed in one chunk. A strategy says how far which experts have to
read (`reads`) and then goes on by a step (`advance`), which gives no token, one or several.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from cbtm_ray.errors import UserError
from cbtm_ray.sampling import draw
from cbtm_ray.sequence import Request, Sequence, Step

MAX_DRAFT_TOKENS = 8
FIRST_AGREEMENT, AGREEMENT_RATE = 0.8, 0.2
"""How probably a draft is accepted, before any was made, and how fast that follows what is seen (docs/LOG.md)."""

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
        if sequence.router.due(sequence.request.refresh_tokens):  # the weights need all first
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
        self.draft_tokens = 0
        """Tokens to draft in this round."""
        self._agreement = FIRST_AGREEMENT
        self._drafted_with: list[np.ndarray] = []
        self._drafter = -1

    @property
    def _drafting(self) -> bool:
        sequence, drafts = self.sequence, self.sequence.drafts
        if drafts and drafts[-1] == sequence.ensemble.end_of_text:
            return False
        return len(drafts) < min(self.draft_tokens, sequence.n_left - 1)

    def reads(self) -> dict[int, int]:
        sequence = self.sequence
        end = len(sequence.text) + len(sequence.drafts)
        if not sequence.drafts:
            self.draft_tokens = drafts_that_pay(self._agreement, len(sequence.router.running))
            self._drafter = int(sequence.router.weights().argmax())
        return {self._drafter: end} if self._drafting else dict.fromkeys(sequence.router.running, end)

    def advance(self) -> list[Step]:
        sequence, drafts = self.sequence, self.sequence.drafts
        if not self._drafting:
            return self._verify()
        probabilities_V = self._drafters_probabilities()
        drafts.append(draw(probabilities_V, sequence.random))
        self._drafted_with.append(probabilities_V)
        return []

    def _drafters_probabilities(self) -> np.ndarray:
        """With which the drafting expert alone would draw the token after text and drafts, (V,)."""
        sequence = self.sequence
        end = len(sequence.text) + len(sequence.drafts)
        return sequence.probabilities(sequence.readings[self._drafter].predicted(end - 1))

    def _verify(self) -> list[Step]:
        """Accept each draft with probability min(1, p / q); the first one refused gives way to a token from the rest of p,
        max(p - q, 0). After all of them comes one more token, from p itself. Where an accepted draft makes an expert run that
        has not read so far, the round ends."""
        sequence, steps = self.sequence, list[Step]()
        drafts, sequence.drafts = sequence.drafts, []
        drafted_with, self._drafted_with = self._drafted_with, []
        for draft, q_V in [*zip(drafts, drafted_with, strict=True), (-1, None)]:
            if not sequence.all_read:
                break
            sequence.refresh()
            logprobs_V, weights_K = sequence.mixture(len(sequence.text) - 1)
            p_V = sequence.probabilities(logprobs_V)
            if q_V is not None or (not drafts and len(sequence.router.running) > 1):
                self._compare(p_V, self._drafters_probabilities() if q_V is None else q_V)
            accept = q_V is not None and sequence.random.random() * q_V[draft] < p_V[draft]
            rest_V = p_V if q_V is None else (p_V - q_V).clip(min=0)
            steps.append(sequence.append(draft if accept else draw(rest_V, sequence.random), logprobs_V, weights_K))
            if not accept or steps[-1].finish_reason:
                break
        for reading in sequence.readings.values():
            reading.go_back(len(sequence.text) - 1)
        return steps

    def _compare(self, p_V: np.ndarray, q_V: np.ndarray) -> None:
        """Take in how probably a draft drawn with q is accepted."""
        self._agreement += AGREEMENT_RATE * (float(np.minimum(p_V, q_V).sum()) - self._agreement)


def drafts_that_pay(agreement: float, n_experts: int) -> int:
    """How many drafts a round should have for most tokens a pass, if each is accepted with the same probability.

    n drafts take n passes of one expert and one of each, and give (1 - a^(n+1)) / (1 - a) tokens (Leviathan et al. 2023,
    equation 1). None is lockstep.
    """
    return max(
        range(MAX_DRAFT_TOKENS + 1),
        key=lambda n: sum(agreement**accepted for accepted in range(n + 1)) / (n + n_experts),
    )


STRATEGIES: dict[str, type[Strategy]] = {"lockstep": Lockstep, "ancestral": Ancestral, "speculative": Speculative}


def strategy_for(request: Request) -> str:
    """The name of the strategy that a request runs with.

    Raises:
        UserError: it is unknown, or would not be exact.
    """
    exact = request.sampling.plain and request.top_logprobs is None
    if request.strategy == "auto":
        return "ancestral" if exact else "speculative"
    if request.strategy not in STRATEGIES:
        raise UserError(f"strategy={request.strategy!r} must be one of {', '.join(STRATEGIES)} or auto. Choose one.")
    if request.strategy == "ancestral" and not exact:
        raise UserError(
            "strategy='ancestral' must be asked for without log-probabilities, at temperature 1 and without truncation or "
            "penalties: it would not be exact. Use auto."
        )
    return request.strategy
