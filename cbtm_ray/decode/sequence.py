"""One sequence that is being decoded: its tokens, what each expert predicts for them, and the weights of the experts.

T tokens, K experts, V vocabulary. Position 0 is the end-of-text token, which comes before every text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from cbtm_ray.decode.sampling import Sampling, token_probabilities
from cbtm_ray.merge.context_router import ContextRouter
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
    top_logprobs: int | None = None
    """Return the log-probabilities of the token and of so many most probable tokens. None: the strategy decides."""
    answer: list[int] = field(default_factory=list)
    """Tokens that an engine which is gone has generated before. They count as generated, and decoding continues after them.
    With lockstep the continuation is the one that the other engine would have generated."""
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
    """One expert on one sequence: its KV cache position, and its predictions that may still be needed."""

    def __init__(self) -> None:
        self.length = 0
        """Tokens read."""
        self._rows_NV: np.ndarray | None = None  # predictions after the last N tokens read

    def logprobs_after(self, position: int) -> np.ndarray:
        """Log-probabilities (V,) of the token after a position."""
        assert self._rows_NV is not None
        return self._rows_NV[position - self.length + len(self._rows_NV)]

    def append_predictions(self, rows_CV: np.ndarray, keep_from: int) -> None:
        """Add the predictions after the next C tokens. Those before the position `keep_from` are dropped."""
        rows_NV = rows_CV if self._rows_NV is None else np.concatenate([self._rows_NV, rows_CV])
        self.length += len(rows_CV)
        first = self.length - len(rows_NV)
        self._rows_NV = rows_NV[min(max(keep_from - first, 0), len(rows_NV) - 1) :]

    def truncate(self, length: int) -> None:
        """Forget the tokens read after the first `length` ones."""
        if length < self.length:
            assert self._rows_NV is not None
            self._rows_NV = self._rows_NV[: length - self.length]
            self.length = length


class Sequence:
    """A request that is being decoded. Experts read it at different times, and only those that answer read it.

    The engine repeats: ask how far experts have to read, run forward passes, append their predictions, advance. With
    `echo_logprobs` it asks `echo_targets` and `echo` until all tokens of the prompt have been returned as steps, then as
    otherwise `targets` and `advance` of the strategy:

        lockstep, ancestral     `append` a token
        speculative             propose `drafts`, then append the accepted ones and one more token

    The experts of the answer are chosen at the prompt's end, as if nobody had read any of it, and from there on at every
    token. A change costs what the new expert has to read (`Route.reread_cost`), so that weights depend on the choices before:
    `reroute` makes them again for the tokens of an answer that is given. Weights of an echoed prompt are the evaluation's.
    """

    def __init__(self, ensemble: Ensemble, request: Request, slots: Tensor, active: set[int]) -> None:
        self.ensemble, self.request, self.slots = ensemble, request, slots
        self.token_ids = [ensemble.end_of_text, *request.prompt, *request.answer]
        self.drafts: list[int] = []
        """Tokens that are proposed to follow; some experts have read them already."""
        seed, n_given = request.sampling.seed, len(request.answer)
        if seed is None or request.strategy == "lockstep" or not n_given:
            self.random = np.random.default_rng(seed)
            self.random.random(n_given)  # lockstep draws once per token
        else:  # the number of draws so far is not known, and draws must not repeat
            self.random = np.random.default_rng([seed, n_given])
        self.expert_states = {expert: ExpertState() for expert in range(ensemble.n_experts)}
        # Tokens of the prompt that have been returned as steps.
        self._n_echoed = request.echoed if request.echo_logprobs else len(request.prompt)
        self.reroute(active)

    @property
    def echoing(self) -> bool:
        """Whether tokens of the prompt are still to be returned as steps."""
        return self._n_echoed < len(self.request.prompt)

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_tokens - (len(self.token_ids) - 1 - len(self.request.prompt))

    def reroute(self, active: set[int]) -> None:
        """Route the tokens so far as if these experts had been the only ones. Experts read nothing twice."""
        self._active, self.drafts = active, []
        for state in self.expert_states.values():
            state.truncate(len(self.token_ids))
        if self.echoing:  # predictions for the rest of the prompt were dropped
            self.expert_states = {expert: ExpertState() for expert in self.expert_states}
        self.router = self._new_router()

    def _new_router(self) -> ContextRouter:
        """A router that has made the choices for the tokens so far."""
        router, prompt = self.ensemble.router(self.request.top_k, self._active), self.request.prompt
        if self.echoing:
            router.replay(prompt[: self._n_echoed])
        else:
            router.append(prompt)
            router.replay(self.token_ids[1 + len(prompt) :])
        return router

    def echo_targets(self, most: int) -> dict[int, int]:
        """By expert: the position up to which to read for the next steps of the prompt, at most `most`."""
        return dict.fromkeys(self.router.running, min(len(self.token_ids), self._n_echoed + most))

    def echo(self) -> list[Step]:
        """The next tokens of the prompt as steps, as far as the experts have read."""
        steps = list[Step]()
        while self.echoing and self._have_read(self._n_echoed + 1):
            token = self.request.prompt[self._n_echoed]
            steps.append(self._step(token, *self.mixture(self._n_echoed), in_prompt=True))
            self._n_echoed += 1
            self.router.append([token])
        if not self.echoing:
            self.router = self._new_router()
        return steps

    def unread_tokens(self, expert: int, end: int) -> list[int]:
        """The tokens, drafts included, that the expert has not read, up to the position `end`."""
        start, length = self.expert_states[expert].length, len(self.token_ids)
        return self.token_ids[start:end] + self.drafts[max(start - length, 0) : max(end - length, 0)]

    def append_predictions(self, expert: int, rows_CV: np.ndarray) -> None:
        """Add an expert's predictions after the next C tokens."""
        keep_from = self._n_echoed if self.echoing else len(self.token_ids) - 1
        self.expert_states[expert].append_predictions(rows_CV, keep_from)

    @property
    def all_read(self) -> bool:
        """Whether the running experts have read all tokens."""
        return self._have_read(len(self.token_ids))

    def _have_read(self, length: int) -> bool:
        return all(self.expert_states[expert].length >= length for expert in self.router.running)

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
