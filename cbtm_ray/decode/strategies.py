"""Three strategies to draw the next token from the mixture p(y | x) = sum_j w_j(x) p_j(y | x). All are exact.

    lockstep      Every running expert reads every token. Works for every sampling setting.
    ancestral     Draw an expert by its weight, then the token from that expert: the mixture, at the cost of one expert.
                  Works only for unchanged probabilities: temperature 1, no truncation, no penalties.
    speculative   One expert drafts some tokens, the others check them in one forward pass, and rejection sampling keeps the
                  mixture. Works for every sampling setting; tokens come several at a time (speculative.py).

A strategy says up to which position which experts have to read the sequence (`targets`). Then it advances (`advance`), which
gives no token, one or several. An expert that was not needed for a while reads the tokens it missed in one chunk.
"""

from __future__ import annotations

from typing import TypeAlias

from cbtm_ray.decode.sampling import draw
from cbtm_ray.decode.sequence import Request, Sequence, Step
from cbtm_ray.decode.speculative import Speculative
from cbtm_ray.errors import UserError

Strategy: TypeAlias = "Lockstep | Ancestral | Speculative"


class Lockstep:
    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence

    def targets(self) -> dict[int, int]:
        return {expert: len(self.sequence.token_ids) for expert in self.sequence.router.running}

    def advance(self) -> list[Step]:
        sequence = self.sequence
        logprobs_V, weights_K = sequence.mixture(len(sequence.token_ids) - 1)
        token = draw(sequence.probabilities(logprobs_V), sequence.random)
        return [sequence.append(token, logprobs_V, weights_K)]


class Ancestral:
    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._expert = -1

    def targets(self) -> dict[int, int]:
        self._expert = draw(self.sequence.router.weights(), self.sequence.random)
        return {self._expert: len(self.sequence.token_ids)}

    def advance(self) -> list[Step]:
        sequence = self.sequence
        logprobs_V = sequence.expert_states[self._expert].logprobs_after(len(sequence.token_ids) - 1)
        token = draw(sequence.probabilities(logprobs_V), sequence.random)
        return [sequence.append(token, None, sequence.router.weights(), self._expert)]


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
