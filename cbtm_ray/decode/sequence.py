"""One sequence that is being decoded: its tokens, what each expert predicts for them, and the weights of the experts.

T tokens, K experts, V vocabulary. Position 0 is the end-of-text token, which comes before every text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from cbtm_ray.decode.sampling import Sampling, token_probabilities
from cbtm_ray.merge.ensemble import Ensemble
from cbtm_ray.merge.mixture import mix_logprobs


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: prompt, sampling settings and limits."""

    prompt: list[int]
    max_tokens: int
    """At least 1, or 0 with `echo_logprobs`."""
    top_k: int
    """Experts mixed for a token."""
    sampling: Sampling
    strategy: str = "auto"
    """'lockstep', 'ancestral', 'speculative' (see strategies.py), or 'auto': ancestral where it is exact, else speculative."""
    refresh_tokens: int = 16
    """The router observes the experts' evidence of the prompt, and then of so many new tokens at a time. With 1 the weights
    are those that `perplexity.py` measures. With more they are another model, which every strategy samples exactly."""
    top_logprobs: int | None = None
    """Return the log-probabilities of the token and of so many most probable tokens. None: the strategy decides."""
    answer: list[int] = field(default_factory=list)
    """Tokens that an engine which is gone has generated before. They count as generated, and decoding continues after them.
    With lockstep and refresh_tokens=1 the continuation is the one that the other engine would have generated."""
    candidates: tuple[int, ...] | None = None
    """Experts that may be used, of the active ones; None: all."""
    known_logprobs: dict[int, list[float]] = field(default_factory=dict)
    """By expert: its log-probabilities of the first tokens, if they are known already. Not with `echo_logprobs`,
    which needs the full predictions."""
    echo_logprobs: bool = False
    """Return the prompt's tokens as steps too, with their log-probabilities."""
    echoed: int = 0
    """Tokens of the prompt that an engine that is gone has returned as steps."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token of a sequence."""

    token: int
    logprob: float | None
    """Under the mixture, in nats, before penalties, temperature and truncation. None with ancestral sampling, which runs one
    expert a token."""
    weights_K: np.ndarray
    expert: int
    """The expert that the token was drawn from (ancestral), or the expert of most weight."""
    finish_reason: str | None = None
    """'stop' after the end-of-text token, 'length' after `max_tokens`, None if more tokens follow."""
    top_logprobs: list[tuple[int, float]] | None = None
    """The most probable tokens and their log-probabilities, best first, as many as were asked for."""
    in_prompt: bool = False


def remaining(request: Request, steps: list[Step]) -> Request:
    """The rest of a request after its next steps: another engine can go on with it."""
    echoed = request.echoed + sum(step.in_prompt for step in steps)
    answer = [*request.answer, *(step.token for step in steps if not step.in_prompt)]
    echo_logprobs = request.echo_logprobs and echoed < len(request.prompt)
    return replace(request, answer=answer, echoed=echoed, echo_logprobs=echo_logprobs)


class ExpertState:
    """One expert on one sequence: its KV cache position, and its log-probabilities of the tokens so far."""

    def __init__(self) -> None:
        self.length = 0
        """Tokens read."""
        self.token_logprobs: list[float] = []
        """Log-probabilities of the sequence's tokens from position 1 on, as far as known."""
        self._rows_NV: np.ndarray | None = None  # predictions after the last N tokens read

    def logprobs_after(self, position: int) -> np.ndarray:
        """Log-probabilities (V,) of the token after a position."""
        assert self._rows_NV is not None
        return self._rows_NV[position - self.length + len(self._rows_NV)]

    def append_predictions(self, rows_CV: np.ndarray, token_ids: list[int], keep_from: int) -> None:
        """Add the predictions after the next C tokens. Predictions before the position `keep_from` are used and dropped."""
        rows_NV = rows_CV if self._rows_NV is None else np.concatenate([self._rows_NV, rows_CV])
        self.length, self._rows_NV = self.length + len(rows_CV), rows_NV
        self.update_logprobs(token_ids)
        first = self.length - len(rows_NV)
        self._rows_NV = rows_NV[min(max(keep_from - first, 0), len(rows_NV) - 1) :]

    def update_logprobs(self, token_ids: list[int]) -> None:
        """Look up the log-probabilities of tokens that were predicted and are known now."""
        known, done = min(self.length, len(token_ids) - 1), len(self.token_logprobs)
        if known > done:
            assert self._rows_NV is not None
            rows = np.arange(done, known) - self.length + len(self._rows_NV)
            self.token_logprobs += self._rows_NV[rows, token_ids[done + 1 : known + 1]].tolist()

    def truncate(self, length: int) -> None:
        """Forget the tokens read after the first `length` ones."""
        if length < self.length:
            assert self._rows_NV is not None
            self._rows_NV = self._rows_NV[: length - self.length]
            self.length = length


class Sequence:
    """A request that is being decoded. Experts read it at different times; the weights depend on its tokens alone.

    The engine repeats: ask how far experts have to read, run forward passes, append their predictions, advance. Two phases:

        __init__, reroute(active)     a new router; drafts are dropped
            |
            v
        PROMPT, routed = False        prompt_targets -> forward passes -> append_predictions -> route_prompt
            |                         The running experts read the tokens that are given, in chunks: the prompt and
            |                         `request.answer`. A router with a prefix first has all of them read the prefix, and
            |                         then holds the best `top_k`, which read the rest. With `echo_logprobs`, route_prompt
            |                         returns the prompt's tokens as steps, one by one; `_n_echoed` counts them. Where
            |                         `request.known_logprobs` knows the prefix, nobody reads it for its evidence.
            v
        DECODE, routed = True         strategy.targets -> forward passes -> append_predictions -> strategy.advance
            |                         Lockstep and ancestral `append` a token. Speculative proposes `drafts`, then appends
            |                         the accepted ones and one more token. `refresh` lets the router observe evidence.
            v
        a step with a finish_reason

    `reroute` may come in either phase: then the tokens so far are treated like a prompt.
    """

    def __init__(self, ensemble: Ensemble, request: Request, slots: Tensor, active: set[int]) -> None:
        self.ensemble, self.request, self.slots = ensemble, request, slots
        self.token_ids = [ensemble.end_of_text, *request.prompt, *request.answer]
        self.drafts: list[int] = []
        """Tokens that are proposed to follow; some experts have read them already."""
        seed, n_given = request.sampling.seed, len(request.answer)
        if request.strategy == "lockstep" or not n_given:
            self.random = np.random.default_rng(seed)
            self.random.random(n_given)  # lockstep draws once per token
        else:  # the number of draws so far is not known, and draws must not repeat
            self.random = np.random.default_rng([seed, n_given])
        self.expert_states = {expert: ExpertState() for expert in range(ensemble.n_experts)}
        for expert, logprobs in request.known_logprobs.items():
            self.expert_states[expert].token_logprobs = logprobs.copy()
        self._n_echoed = (
            request.echoed if request.echo_logprobs else len(request.prompt)
        )  # prompt tokens returned as steps
        self.reroute(active)

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - (len(self.token_ids) - 1 - len(self.request.prompt))

    def reroute(self, active: set[int]) -> None:
        """Route the tokens so far again, as a prompt, with these experts. Experts do not read again what they have read."""
        candidates = self.request.candidates
        chosen = active if candidates is None else active.intersection(candidates) or active
        self.router, self.drafts = self.ensemble.router(self.request.top_k, chosen), []
        for state in self.expert_states.values():
            state.truncate(len(self.token_ids))
        if self._n_echoed < len(self.request.prompt):  # predictions for the rest of the prompt were dropped
            self.expert_states = {expert: ExpertState() for expert in self.expert_states}
        self.routed = False
        """Whether the prompt phase is over: the running experts have read all tokens."""
        self.route_prompt()

    def prompt_targets(self, most: int) -> dict[int, int]:
        """By running expert: the position up to which to read next, at most `most` tokens. First the prefix, then the rest."""
        hold_at = self.router.hold_at
        end = len(self.token_ids) if hold_at is None else min(len(self.token_ids), hold_at + 1)
        return {expert: min(end, self.expert_states[expert].length + most) for expert in self.router.running}

    def unread_tokens(self, expert: int, end: int) -> list[int]:
        """The tokens, drafts included, that the expert has not read, up to the position `end`."""
        start, length = self.expert_states[expert].length, len(self.token_ids)
        return self.token_ids[start:end] + self.drafts[max(start - length, 0) : max(end - length, 0)]

    def append_predictions(self, expert: int, rows_CV: np.ndarray) -> None:
        """Add an expert's predictions after the next C tokens."""
        keep_from = len(self.token_ids) - 1 if self._n_echoed == len(self.request.prompt) else self._n_echoed
        self.expert_states[expert].append_predictions(rows_CV, self.token_ids, keep_from)

    def route_prompt(self) -> list[Step]:
        """Route the tokens that the experts have read; the prompt's steps, if asked for."""
        steps, router, last = list[Step](), self.router, len(self.token_ids) - 1
        while True:
            if router.due(1):
                if any(len(self.expert_states[expert].token_logprobs) < router.length for expert in router.running):
                    return steps
                self._observe()
            start, echoing = router.length, self._n_echoed < len(self.request.prompt)
            if start == last:
                break
            if echoing and start == self._n_echoed:  # from here on, the mixture of every token of the prompt is needed
                if any(self.expert_states[expert].length <= start for expert in router.running):
                    return steps
                steps.append(self._step(self.token_ids[start + 1], *self.mixture(start), in_prompt=True))
                self._n_echoed += 1
            end = min(last, max(self._n_echoed, start + 1) if echoing else last, router.hold_at or last)
            router.append(self.token_ids[start + 1 : end + 1])
        self.routed = self.all_read
        return steps

    @property
    def all_read(self) -> bool:
        """Whether the running experts have read all tokens."""
        return all(self.expert_states[expert].length >= len(self.token_ids) for expert in self.router.running)

    def refresh(self) -> None:
        """Let the router observe the evidence, if due. The running experts must have read at least all but the last token."""
        if self.router.due(self.request.refresh_tokens):
            for expert in self.router.running:
                self.expert_states[expert].update_logprobs(self.token_ids)
            self._observe()

    def _observe(self) -> None:
        self.router.observe({expert: self.expert_states[expert].token_logprobs for expert in self.router.running})

    def mixture(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The mixture's log-probabilities of the token after a position (V,), and the weights (K,)."""
        weights_K = self.router.weights()
        experts = np.flatnonzero(weights_K)
        logprobs_KV = np.stack([self.expert_states[int(expert)].logprobs_after(position) for expert in experts])
        return mix_logprobs(logprobs_KV.T, weights_K[experts]), weights_K

    def probabilities(self, logprobs_V: np.ndarray) -> np.ndarray:
        """The probabilities that the token after the tokens and drafts is drawn with, (V,)."""
        prompt = self.request.prompt
        answer = self.token_ids[1 + len(prompt) :] + self.drafts
        return token_probabilities(logprobs_V, self.request.sampling, prompt, answer)

    def append(
        self, token: int, logprobs_V: np.ndarray | None, weights_K: np.ndarray, expert: int | None = None
    ) -> Step:
        """Append a token."""
        self.token_ids.append(token)
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
            reason = "stop" if token == self.ensemble.end_of_text else "length" if self.tokens_left == 0 else None
        elif self.request.max_tokens == 0 and self._n_echoed + 1 == len(self.request.prompt):
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
