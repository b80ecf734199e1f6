"""Speculative decoding: one expert drafts tokens, then all running experts check them in one forward pass.

A round has two phases. First the expert of most weight drafts n tokens, one forward pass each. Then every running expert
reads the drafts in one pass, and rejection sampling accepts or rejects them so that the tokens are a draw from the mixture
(Leviathan et al. 2023, algorithm 1). n follows how often the experts agree; n = 0 is lockstep.

V vocabulary, p the mixture's probabilities, q the drafting expert's.
"""

from __future__ import annotations

import numpy as np

from cbtm_ray.decode.sampling import draw
from cbtm_ray.decode.sequence import Sequence, Step

MAX_DRAFT_TOKENS = 8
FIRST_AGREEMENT, AGREEMENT_RATE = 0.8, 0.2
"""How probably a draft is accepted: the estimate before any draft was made, and its learning rate (docs/LOG.md)."""


class Speculative:
    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.draft_tokens = 0
        """Tokens to draft in this round."""
        self._agreement = FIRST_AGREEMENT
        self._draft_probabilities: list[np.ndarray] = []
        """q of each of the sequence's drafts, (V,)."""
        self._drafter = -1

    @property
    def _drafting(self) -> bool:
        sequence, drafts = self.sequence, self.sequence.drafts
        if drafts and drafts[-1] == sequence.ensemble.end_of_text:
            return False
        return len(drafts) < min(self.draft_tokens, sequence.tokens_left - 1)

    def targets(self) -> dict[int, int]:
        sequence = self.sequence
        end = len(sequence.token_ids) + len(sequence.drafts)
        if not sequence.drafts:
            self.draft_tokens = drafts_that_pay(self._agreement, len(sequence.router.running))
            self._drafter = int(sequence.router.weights().argmax())
        return {self._drafter: end} if self._drafting else dict.fromkeys(sequence.router.running, end)

    def advance(self) -> list[Step]:
        if self._drafting:
            self._draft()
            return []
        steps = self._verify()
        for state in self.sequence.expert_states.values():
            state.truncate(len(self.sequence.token_ids) - 1)  # rejected drafts were read too
        return steps

    def _draft(self) -> None:
        q_V = self._drafter_probabilities()
        self.sequence.drafts.append(draw(q_V, self.sequence.random))
        self._draft_probabilities.append(q_V)

    def _drafter_probabilities(self) -> np.ndarray:
        """q for the token after the drafts, (V,)."""
        sequence = self.sequence
        end = len(sequence.token_ids) + len(sequence.drafts)
        return sequence.probabilities(sequence.expert_states[self._drafter].logprobs_after(end - 1))

    def _verify(self) -> list[Step]:
        """The tokens of a round: the accepted drafts, and one token more.

        An accepted draft may make another expert run. The round then ends, for that expert has yet to read them.
        """
        sequence, steps = self.sequence, list[Step]()
        drafts, sequence.drafts = sequence.drafts, []
        q_NV, self._draft_probabilities = self._draft_probabilities, []
        for draft, q_V in zip(drafts, q_NV, strict=True):
            if not sequence.all_read:
                return steps
            step, accepted = self._check(draft, q_V)
            steps.append(step)
            if not accepted or step.finish_reason:
                return steps
        if not sequence.all_read:
            return steps
        p_V, logprobs_V, weights_K = self._mixture()
        if not drafts and len(sequence.router.running) > 1:
            self._update_agreement(p_V, self._drafter_probabilities())
        return [*steps, sequence.append(draw(p_V, sequence.random), logprobs_V, weights_K)]

    def _check(self, draft: int, q_V: np.ndarray) -> tuple[Step, bool]:
        """Accept a draft with probability min(1, p / q), or reject it and draw another token from max(p - q, 0)."""
        sequence = self.sequence
        p_V, logprobs_V, weights_K = self._mixture()
        self._update_agreement(p_V, q_V)
        accepted = sequence.random.random() * q_V[draft] < p_V[draft]
        token = draft if accepted else draw((p_V - q_V).clip(min=0), sequence.random)
        return sequence.append(token, logprobs_V, weights_K), accepted

    def _mixture(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """p for the next token (V,), its log-probabilities before penalties and the like (V,), the weights (K,)."""
        sequence = self.sequence
        logprobs_V, weights_K = sequence.mixture(len(sequence.token_ids) - 1)
        return sequence.probabilities(logprobs_V), logprobs_V, weights_K

    def _update_agreement(self, p_V: np.ndarray, q_V: np.ndarray) -> None:
        """A draft from q is accepted with probability sum min(p, q)."""
        self._agreement += AGREEMENT_RATE * (float(np.minimum(p_V, q_V).sum()) - self._agreement)


def drafts_that_pay(agreement: float, n_experts: int) -> int:
    """The number of drafts a round that gives most tokens a forward pass, if each is accepted with the same probability.

    A round of n drafts takes n passes of one expert and one pass of each of `n_experts`, and gives
    (1 - a^(n+1)) / (1 - a) tokens (Leviathan et al. 2023, equation 1).
    """
    return max(
        range(MAX_DRAFT_TOKENS + 1),
        key=lambda n: sum(agreement**accepted for accepted in range(n + 1)) / (n + n_experts),
    )
