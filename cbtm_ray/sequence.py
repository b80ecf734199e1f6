"""One text that grows: how far each expert has read it, what they predict, and how it is routed.

T tokens, K experts, V vocabulary. Position 0 is the end-of-text token that every text begins after.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from cbtm_ray.ensemble import Ensemble
from cbtm_ray.merge import mix_logprobs
from cbtm_ray.sampling import Sampling, token_probabilities


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to continue, and how."""

    prompt: list[int]
    max_tokens: int
    """At least 1, or 0 with `echo_logprobs`."""
    top_k: int
    """Experts mixed for a token."""
    sampling: Sampling
    strategy: str = "auto"
    """'lockstep', 'ancestral', 'speculative' (see strategies.py), or 'auto': ancestral where it is exact, else speculative."""
    refresh_tokens: int = 16
    """The weights take in the experts' evidence of the prompt, and then of every so many new tokens together. 1 is what
    `evaluate.py` measures as prefix routing; more is a model of its own, which every strategy samples exactly."""
    top_logprobs: int | None = None
    """Log-probabilities wanted: of the token (0) and of so many most probable ones. None leaves the choice to the strategy."""
    answer: list[int] = field(default_factory=list)
    """Tokens given before, by an engine that is gone: they count as generated, and the text goes on after them. With lockstep
    and refresh_tokens of 1 it is the text that would have come."""
    candidates: tuple[int, ...] | None = None
    """Experts that may take part, of those that are active; None: all."""
    heard: dict[int, list[float]] = field(default_factory=dict)
    """By expert: the log-probabilities it gave to the first tokens of the text, where somebody has asked already. Not with
    `echo_logprobs`, which needs all that the experts predicted."""
    echo_logprobs: bool = False
    """The prompt's tokens are given as steps too, with their log-probabilities."""
    echoed: int = 0
    """Tokens of the prompt that were given as steps before, by an engine that is gone."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token."""

    token: int
    logprob: float | None
    """Under the mixture, in nats, before penalties, temperature and truncation. None with ancestral sampling, which runs one
    expert a token."""
    weights_K: np.ndarray
    expert: int
    """The one it was drawn from (ancestral), or the one of most weight."""
    finish_reason: str | None = None
    """'stop' after the end-of-text token, 'length' after `max_tokens`, None where more is to come."""
    top_logprobs: list[tuple[int, float]] | None = None
    """The most probable tokens and their log-probabilities, best first, as many as were asked for."""
    in_prompt: bool = False


def remaining(request: Request, steps: list[Step]) -> Request:
    """The rest of a request whose next steps, these, have been given: another engine can go on with it."""
    echoed = request.echoed + sum(step.in_prompt for step in steps)
    answer = [*request.answer, *(step.token for step in steps if not step.in_prompt)]
    echo_logprobs = request.echo_logprobs and echoed < len(request.prompt)
    return replace(request, answer=answer, echoed=echoed, echo_logprobs=echo_logprobs)


class Reading:
    """How far one expert has read a text, and what it predicted."""

    def __init__(self) -> None:
        self.length = 0
        """Tokens read."""
        self.heard: list[float] = []
        """Log-probabilities of the tokens after position 0, as far as known."""
        self._rows_NV: np.ndarray | None = None  # after the last N tokens read

    def predicted(self, position: int) -> np.ndarray:
        """Log-probabilities (V,) of the token after a position."""
        assert self._rows_NV is not None
        return self._rows_NV[position - self.length + len(self._rows_NV)]

    def take(self, rows_CV: np.ndarray, text: list[int], keep_from: int) -> None:
        """Take in the predictions after the next C tokens; those before the position `keep_from` are used and dropped."""
        rows_NV = rows_CV if self._rows_NV is None else np.concatenate([self._rows_NV, rows_CV])
        self.length, self._rows_NV = self.length + len(rows_CV), rows_NV
        self.hear(text)
        first = self.length - len(rows_NV)
        self._rows_NV = rows_NV[min(max(keep_from - first, 0), len(rows_NV) - 1) :]

    def hear(self, text: list[int]) -> None:
        """Look up the tokens of the text that were predicted and are now known."""
        known, done = min(self.length, len(text) - 1), len(self.heard)
        if known > done:
            assert self._rows_NV is not None
            rows = np.arange(done, known) - self.length + len(self._rows_NV)
            self.heard += self._rows_NV[rows, text[done + 1 : known + 1]].tolist()

    def go_back(self, length: int) -> None:
        """Forget what was read after the first `length` tokens."""
        if length < self.length:
            assert self._rows_NV is not None
            self._rows_NV = self._rows_NV[: length - self.length]
            self.length = length


class Sequence:
    """A request under way. Experts read it at different times; the routing is a function of the text alone."""

    def __init__(self, ensemble: Ensemble, request: Request, slots: Tensor, active: set[int]) -> None:
        self.ensemble, self.request, self.slots = ensemble, request, slots
        self.text = [ensemble.end_of_text, *request.prompt, *request.answer]
        self.drafts: list[int] = []
        """Tokens proposed to follow the text, which some experts have read already."""
        seed, n_given = request.sampling.seed, len(request.answer)
        if request.strategy == "lockstep" or not n_given:
            self.random = np.random.default_rng(seed)
            self.random.random(n_given)  # lockstep draws once a token
        else:  # how often the others drew is gone; what they drew with must not come again
            self.random = np.random.default_rng([seed, n_given])
        self.readings = {expert: Reading() for expert in range(ensemble.n_experts)}
        for expert, logprobs in request.heard.items():
            self.readings[expert].heard = logprobs.copy()
        self._echoed = request.echoed if request.echo_logprobs else len(request.prompt)  # prompt tokens given as steps
        self.reroute(active)

    @property
    def n_left(self) -> int:
        """Tokens that may still come."""
        return self.request.max_tokens - (len(self.text) - 1 - len(self.request.prompt))

    def reroute(self, active: set[int]) -> None:
        """Route the text so far as if it were a prompt to these experts. What they have read of it they do not read again."""
        candidates = self.request.candidates
        chosen = active if candidates is None else active.intersection(candidates) or active
        self.router, self.drafts = self.ensemble.router(self.request.top_k, chosen), []
        for reading in self.readings.values():
            reading.go_back(len(self.text))
        if self._echoed < len(self.request.prompt):  # the predictions of the rest are gone
            self.readings = {expert: Reading() for expert in self.readings}
        self.routed = False
        """Whether the running experts have read all of the text that is given."""
        self.route_prompt()

    def prompt_reads(self, most: int) -> dict[int, int]:
        """How far each running expert should read next, at most so many tokens more each: the prefix first, then the rest."""
        hold_at = self.router.hold_at
        end = len(self.text) if hold_at is None else min(len(self.text), hold_at + 1)
        return {expert: min(end, self.readings[expert].length + most) for expert in self.router.running}

    def unread(self, expert: int, end: int) -> list[int]:
        """The tokens of text and drafts from where the expert is to the position `end`."""
        start, length = self.readings[expert].length, len(self.text)
        return self.text[start:end] + self.drafts[max(start - length, 0) : max(end - length, 0)]

    def take(self, expert: int, rows_CV: np.ndarray) -> None:
        """Take in what an expert predicts after the next C tokens."""
        keep_from = len(self.text) - 1 if self._echoed == len(self.request.prompt) else self._echoed
        self.readings[expert].take(rows_CV, self.text, keep_from)

    def route_prompt(self) -> list[Step]:
        """Route as much of the given text as its experts have read; steps of the prompt where they are wanted."""
        steps, router, last = list[Step](), self.router, len(self.text) - 1
        while True:
            if router.due(1):
                if any(len(self.readings[expert].heard) < router.length for expert in router.running):
                    return steps
                self._observe()
            start, echoing = router.length, self._echoed < len(self.request.prompt)
            if start == last:
                break
            if echoing and start == self._echoed:  # this token's mixture is wanted, and that of every one from here on
                if any(self.readings[expert].length <= start for expert in router.running):
                    return steps
                steps.append(self._step(self.text[start + 1], *self.mixture(start), in_prompt=True))
                self._echoed += 1
            end = min(last, max(self._echoed, start + 1) if echoing else last, router.hold_at or last)
            router.append(self.text[start + 1 : end + 1])
        self.routed = self.all_read
        return steps

    @property
    def all_read(self) -> bool:
        """Whether the running experts have read all of the text."""
        return all(self.readings[expert].length >= len(self.text) for expert in self.router.running)

    def refresh(self) -> None:
        """Take in the evidence, if it is due. The running experts must have read all but the last token at least."""
        if self.router.due(self.request.refresh_tokens):
            for expert in self.router.running:
                self.readings[expert].hear(self.text)
            self._observe()

    def _observe(self) -> None:
        self.router.observe({expert: self.readings[expert].heard for expert in self.router.running})

    def mixture(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the token after a position under the mixture (V,), and the weights behind them (K,)."""
        weights_K = self.router.weights()
        experts = np.flatnonzero(weights_K)
        logprobs_KV = np.stack([self.readings[int(expert)].predicted(position) for expert in experts])
        return mix_logprobs(logprobs_KV.T, weights_K[experts]), weights_K

    def probabilities(self, logprobs_V: np.ndarray) -> np.ndarray:
        """What the token after text and drafts is drawn with, (V,)."""
        prompt = self.request.prompt
        answer = self.text[1 + len(prompt) :] + self.drafts
        return token_probabilities(logprobs_V, self.request.sampling, prompt, answer)

    def append(
        self, token: int, logprobs_V: np.ndarray | None, weights_K: np.ndarray, expert: int | None = None
    ) -> Step:
        """Add a token to the text."""
        self.text.append(token)
        self.router.append([token])
        return self._step(token, logprobs_V, weights_K, expert=expert)

    def _step(
        self,
        token: int,
        logprobs_V: np.ndarray | None,
        weights_K: np.ndarray,
        *,
        expert: int | None = None,
        in_prompt: bool = False,
    ) -> Step:
        top_logprobs = None
        if logprobs_V is not None and self.request.top_logprobs is not None:
            best = np.argsort(-logprobs_V, kind="stable")[: self.request.top_logprobs]
            top_logprobs = [(int(other), float(logprobs_V[other])) for other in best]
        reason = None
        if not in_prompt:
            reason = "stop" if token == self.ensemble.end_of_text else "length" if self.n_left == 0 else None
        elif self.request.max_tokens == 0 and self._echoed + 1 == len(self.request.prompt):
            reason = "length"
        return Step(
            token=token,
            logprob=None if logprobs_V is None else float(logprobs_V[token]),
            weights_K=weights_K,
            expert=int(weights_K.argmax()) if expert is None else expert,
            finish_reason=reason,
            top_logprobs=top_logprobs,
            in_prompt=in_prompt,
        )
