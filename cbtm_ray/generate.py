"""One decode loop over routed experts: at every token the probabilities of the experts that run are mixed (lockstep).

T tokens, K experts, V vocabulary, D embedding dimensions.

Routing is by prefix: all experts read the first `prefix_tokens` of the context, then the best `top_k` stay for the rest of
the request. The probability of a text is that of prefix routing in `evaluate.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.branch import expert_folder
from cbtm_ray.distances import squared_distances
from cbtm_ray.embed import Embedder, load_clusterer
from cbtm_ray.merge import mix_logprobs
from cbtm_ray.models import load_model
from cbtm_ray.route import check_top_k, posterior_scores, sparse_weights
from cbtm_ray.tokens import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The experts of a run, by cluster, and what routes to them."""

    experts: list[PreTrainedModel]
    embedder: Embedder
    centers_KD: torch.Tensor
    end_of_text: int
    settings: dict[str, float]
    """temperature, beta and gamma of posterior routing, tuned by the evaluation."""
    prefix_tokens: int

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.experts[0].config.max_position_embeddings - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the mixture."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Share of the probability kept, in (0, 1]: the most probable tokens that together hold it."""
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """One generated token, its log-probability under the mixture (nats, before temperature), and the weights behind it."""

    token: int
    logprob: float
    weights_K: np.ndarray


class PrefixRouter:
    """Weights over the experts, updated in O(D) for every token of a context."""

    def __init__(self, ensemble: Ensemble, top_k: int) -> None:
        n_experts = len(ensemble.experts)
        check_top_k(top_k, n_experts)
        self.ensemble, self.top_k = ensemble, top_k
        self.running = list(range(n_experts))
        self.length = 0
        self._evidence_K = np.zeros(n_experts)
        self._context = ensemble.embedder.context()

    def weights(self) -> np.ndarray:
        """Weights for the next token, (K,): 0 for all but `top_k` of the experts that run."""
        return sparse_weights(self._scores(), self.top_k)[0]

    def observe(self, token: int, logprobs: dict[int, float]) -> None:
        """Take in the next token and what each running expert thought of it."""
        gamma = self.ensemble.settings["gamma"]
        for expert in self.running:
            self._evidence_K[expert] = gamma * self._evidence_K[expert] + logprobs[expert]
        self._context.append(token)
        self.length += 1
        if self.length == self.ensemble.prefix_tokens:
            best = np.argsort(-self._scores()[0], kind="stable")[: self.top_k]
            self.running = sorted(int(expert) for expert in best)

    def _scores(self) -> np.ndarray:
        h_1D = torch.from_numpy(self._context.embedding()[None])
        distances_1K = squared_distances(h_1D, self.ensemble.centers_KD).numpy()
        settings = self.ensemble.settings
        scores_1K = posterior_scores(
            distances_1K, self._evidence_K[None], settings["temperature"], settings["beta"]
        ).astype(np.float64)
        stopped = [expert for expert in range(len(self.ensemble.experts)) if expert not in self.running]
        scores_1K[:, stopped] = -np.inf
        return scores_1K


class Context:
    """The text so far: its routing, and each running expert's cache and prediction of the next token."""

    def __init__(self, ensemble: Ensemble, top_k: int) -> None:
        self.ensemble, self.router = ensemble, PrefixRouter(ensemble, top_k)
        self._caches = {expert: DynamicCache() for expert in self.router.running}
        self._next = {expert: rows[-1] for expert, rows in self._forward([ensemble.end_of_text]).items()}

    def append(self, tokens: list[int]) -> None:
        """Read tokens: all experts up to the end of the prefix, then those that were chosen."""
        room = max(self.ensemble.prefix_tokens - self.router.length, 0)
        for chunk in (tokens[:room], tokens[room:]):
            if chunk:
                self._read(chunk)

    def next_logprobs(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of the next token under the mixture (V,), and the weights behind them (K,)."""
        weights_K = self.router.weights()
        experts = [expert for expert in self.router.running if weights_K[expert] > 0]
        logprobs_VK = np.stack([self._next[expert] for expert in experts], axis=1)
        return mix_logprobs(logprobs_VK, weights_K[experts]), weights_K

    def _read(self, tokens: list[int]) -> None:
        predicted = self._forward(tokens)
        for position, token in enumerate(tokens):
            before = {e: self._next[e] if position == 0 else predicted[e][position - 1] for e in self.router.running}
            self.router.observe(token, {expert: float(rows[token]) for expert, rows in before.items()})
        self._next = {expert: predicted[expert][-1] for expert in self.router.running}

    def _forward(self, tokens: list[int]) -> dict[int, np.ndarray]:
        """Each running expert's log-probabilities after each of the tokens, (T, V)."""
        input_ids = torch.tensor([tokens])
        found = {}
        for expert in self.router.running:
            model: Any = self.ensemble.experts[expert]
            with torch.inference_mode():
                logits = model(
                    input_ids=input_ids.to(model.device), past_key_values=self._caches[expert], use_cache=True
                ).logits
                found[expert] = logits[0].float().log_softmax(-1).cpu().numpy()
        return found


def generate(
    ensemble: Ensemble, prompt: list[int], *, top_k: int, max_tokens: int, sampling: Sampling
) -> Iterator[Step]:
    """Tokens after a prompt, as they come; ends after `max_tokens` or with the end-of-text token, which is given too.

    Raises:
        ValueError: prompt and answer together are longer than the experts' positions.
    """
    if len(prompt) + max_tokens > ensemble.max_length:
        raise ValueError(
            f"max_tokens={max_tokens} with a prompt of {len(prompt)} tokens must be at most {ensemble.max_length} "
            "together. Shorten the prompt or ask for less."
        )
    random = np.random.default_rng(sampling.seed)
    context = Context(ensemble, top_k)
    context.append(prompt)
    for _ in range(max_tokens):
        logprobs_V, weights_K = context.next_logprobs()
        token = sample(logprobs_V, sampling, random)
        yield Step(token, float(logprobs_V[token]), weights_K)
        if token == ensemble.end_of_text:
            return
        context.append([token])


def sample(logprobs_V: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """A token drawn after temperature and top-p; the most probable one at temperature 0."""
    if sampling.temperature == 0:
        return int(logprobs_V.argmax())
    scaled_V = logprobs_V.astype(np.float64) / sampling.temperature
    order_V = np.argsort(-scaled_V, kind="stable")
    probabilities_V = np.exp(scaled_V[order_V] - scaled_V[order_V[0]])
    probabilities_V /= probabilities_V.sum()
    kept = int(np.searchsorted(np.cumsum(probabilities_V), sampling.top_p)) + 1
    kept_V = probabilities_V[:kept] / probabilities_V[:kept].sum()
    return int(order_V[random.choice(len(kept_V), p=kept_V)])


def load_ensemble(run_dir: str) -> tuple[Ensemble, PreTrainedTokenizerBase]:
    """The ensemble of a finished run directory with the routing that its evaluation tuned, and the tokenizer.

    Raises:
        ValueError: the run is not finished.
    """
    if not files.exists(files.join(run_dir, "evaluation", "manifest.json")):
        raise ValueError(f"run_dir={run_dir} is not a finished run. Run first: python -m jobs.run_all --config FILE")
    evaluation = files.read_json(files.join(run_dir, "evaluation", "results.json"))
    ensemble_rows = [row for row in evaluation["rows"] if row["system"] == "cbtm" and row["routing"] == "posterior"]
    tuned = next(row for row in ensemble_rows if row["top_k"] == min(2, row["n_clusters"]))
    experts = [load_model(files.join(run_dir, expert_folder(k))).eval() for k in range(tuned["n_clusters"])]
    tokenizer = load_tokenizer(files.join(run_dir, "tokenizer"))
    embedder, centers_KD = load_clusterer(files.join(run_dir, "clusterer"), tokenizer)
    ensemble = Ensemble(
        experts=experts,
        embedder=embedder,
        centers_KD=centers_KD,
        end_of_text=tokenizer.eos_token_id,
        settings=tuned["settings"],
        prefix_tokens=evaluation["prefix_tokens"],
    )
    return ensemble, tokenizer
