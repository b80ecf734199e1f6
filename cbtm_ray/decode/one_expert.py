"""A text that one expert at a time decodes, in an engine elsewhere that knows no router, such as vLLM's.

The engine gets the text so far and gives tokens, several at a time. The router follows them, token by token: where it would
have changed to another expert, the tokens from there on are dropped, and the other expert's engine gets the text. So the text
is the one that `Engine` decodes with top_k = 1, up to the random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.merge.ensemble import Ensemble

LEAST_TEMPERATURE = 0.01
"""vLLM takes what is below, but for 0, for as much."""


@dataclass(frozen=True, kw_only=True)
class ExpertRequest:
    """What an expert's engine is asked for: a text's next tokens."""

    expert: int
    token_ids: list[int]
    """The text so far, with the end-of-text token before it."""
    max_tokens: int
    sampling: Sampling
    top_logprobs: int | None
    """As in `Request`."""
    message_tokens: int
    """Tokens that the engine sends at least at a time, but for the last."""


@dataclass(frozen=True, kw_only=True)
class ExpertTokens:
    """Next tokens from an expert's engine, at least one."""

    token_ids: list[int]
    logprobs: list[float] | None = None
    """Before temperature and truncation, in nats; None where nobody asked."""
    top_logprobs: list[list[tuple[int, float]]] | None = None
    """By token: the most probable tokens, best first, and perhaps the token itself."""
    finish_reason: str | None = None
    """'stop' or 'length' with the last tokens."""
    cached_tokens: int = 0
    """Tokens of the text that the engine had read before."""

    def followed_by(self, later: ExpertTokens) -> ExpertTokens:
        """Both as one."""
        return ExpertTokens(
            token_ids=self.token_ids + later.token_ids,
            logprobs=None if self.logprobs is None else self.logprobs + (later.logprobs or []),
            top_logprobs=None if self.top_logprobs is None else self.top_logprobs + (later.top_logprobs or []),
            finish_reason=later.finish_reason,
            cached_tokens=self.cached_tokens,
        )


class RoutedText:
    """A request's text while engines decode it: which expert is next, and how far the text is."""

    def __init__(self, ensemble: Ensemble, request: Request, active: set[int], *, message_tokens: int) -> None:
        """
        Args:
            ensemble: routes; its experts are not used.
            active: experts that may take part.
            message_tokens: as in `ExpertRequest`.
        """
        self._ensemble, self.request, self._message_tokens = ensemble, request, message_tokens
        self.answer = list(request.answer)
        self._start = len(self.answer)  # of the tokens that the present expert decodes
        self._again: list[int] = []  # tokens that the present engine gives once more
        self.reroute(active)

    def reroute(self, active: set[int]) -> None:
        """Route the text so far as if these experts had been the only ones."""
        self.router = self._ensemble.router(1, active)
        self.router.append(self.request.prompt)
        self.router.replay(self.answer)
        self.expert, self._weights_K = self._choice()

    def _choice(self) -> tuple[int, np.ndarray]:
        weights_K = self.router.weights()
        return int(weights_K.argmax()), weights_K

    def next_request(self) -> ExpertRequest:
        """What the present expert's engine is to decode, from here on."""
        self._start, self._again = len(self.answer), []
        return self._request()

    def repeated_request(self) -> ExpertRequest:
        """After the engine was lost: the same request again where a seed makes the tokens the same, else as `next_request`."""
        if self.request.sampling.seed is None or self.request.sampling.temperature == 0:
            return self.next_request()
        self._again = self.answer[self._start :]
        return self._request()

    def _request(self) -> ExpertRequest:
        sampling, given = self.request.sampling, self.answer[: self._start]
        return ExpertRequest(
            expert=self.expert,
            token_ids=[self._ensemble.end_of_text, *self.request.prompt, *given],
            max_tokens=self.request.max_tokens - len(given),
            sampling=sampling if not given else _with_seed_after(sampling, len(given)),
            top_logprobs=self.request.top_logprobs,
            message_tokens=self._message_tokens,
        )

    def take(self, tokens: ExpertTokens) -> tuple[list[Step], bool]:
        """The steps that these tokens are, and whether the same expert goes on: if not, drop the engine's answer and make
        a `next_request`."""
        steps = list[Step]()
        for place, token in enumerate(tokens.token_ids):
            if self._again:
                if self._again.pop(0) != token:  # rounded otherwise: the text that was sent stands
                    return steps, False
                continue
            expert, weights_K = self.expert, self._weights_K
            last = place + 1 == len(tokens.token_ids)
            self.answer.append(token)
            self.router.append([token])
            reason = tokens.finish_reason if last else None
            steps.append(_step(tokens, place, expert, weights_K, reason, self.request.top_logprobs))
            if steps[-1].finish_reason:
                return steps, True
            self.expert, self._weights_K = self._choice()
            if self.expert != expert:
                return steps, False
        return steps, True


def _with_seed_after(sampling: Sampling, n_tokens: int) -> Sampling:
    """Another seed for the tokens after so many, since an engine begins a request with the seed's first random numbers."""
    if sampling.seed is None:
        return sampling
    seed = int(np.random.SeedSequence([sampling.seed, n_tokens]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return replace(sampling, seed=seed)


def _step(
    tokens: ExpertTokens, place: int, expert: int, weights_K: np.ndarray, reason: str | None, n_top: int | None
) -> Step:
    return Step(
        token=tokens.token_ids[place],
        logprob=None if tokens.logprobs is None else tokens.logprobs[place],
        weights_K=weights_K,
        expert=expert,
        finish_reason=reason,
        top_logprobs=None if tokens.top_logprobs is None else tokens.top_logprobs[place][:n_top],
    )


def unlike_one_expert(request: Request, max_length: int) -> str | None:
    """Why an engine such as vLLM's cannot decode a request as `Engine` does, by field; None if it can.

    Args:
        max_length: the model's positions, of which vLLM takes one for the answer's last token too.
    """
    sampling, length = request.sampling, 1 + len(request.prompt) + request.max_tokens
    reasons = {
        f"top_k={request.top_k} mixes experts": request.top_k > 1,
        "echo=True with log-probabilities or routing asks all experts that a prompt is routed to": request.echo_logprobs,
        f"frequency_penalty={sampling.frequency_penalty:g} counts tokens over a change of expert": (
            sampling.frequency_penalty != 0
        ),
        f"presence_penalty={sampling.presence_penalty:g} counts tokens over a change of expert": (
            sampling.presence_penalty != 0
        ),
        f"temperature={sampling.temperature:g} is below {LEAST_TEMPERATURE:g} and not 0": (
            0 < sampling.temperature < LEAST_TEMPERATURE
        ),
        f"max_tokens={request.max_tokens} makes a text of {length} tokens with the first, more than {max_length}": (
            length > max_length
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
