"""The experts of a run and what routes to them, and the weights over experts of a text that grows.

T tokens, K experts, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.embed import Embedder, load_clusterer
from cbtm_ray.paging import PagedExperts
from cbtm_ray.route import posterior_scores, sparse_weights
from cbtm_ray.tokens import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The experts of a run, and what routes to them."""

    experts: Mapping[int, PreTrainedModel]
    """Those that are here, by cluster: in a service that is spread out, not all."""
    embedder: Embedder
    centers_KD: torch.Tensor
    end_of_text: int
    settings: dict[str, float]
    """temperature, beta and gamma of posterior routing, tuned by the evaluation."""
    prefix_tokens: int

    @property
    def n_experts(self) -> int:
        """Here or elsewhere."""
        return len(self.centers_KD)

    @property
    def any_expert(self) -> PreTrainedModel:
        """One of those that are here: they differ in their weights only."""
        return next(iter(self.experts.values()))

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.any_expert.config.max_position_embeddings - 1


class PrefixRouter:
    """Prefix routing of one text: all active experts up to the end of the prefix, then the best `top_k` of that moment.

    Weights are those of `evaluate.py` where every token is observed before the next is read. Evidence may come later
    than the tokens: then the weights are a function of the embedding of the whole context and of the evidence so far.
    """

    def __init__(self, ensemble: Ensemble, top_k: int, active: Iterable[int]) -> None:
        self.ensemble = ensemble
        self.running = sorted(active)
        """Experts whose evidence is needed."""
        self.top_k = min(top_k, len(self.running))
        self.length = 0
        """Tokens read."""
        self.observed = 0
        """Tokens whose evidence has been taken in, at most `length`."""
        self._evidence_K = np.zeros(ensemble.n_experts)
        self._context, self._centers_KD = ensemble.embedder.context(), ensemble.centers_KD.numpy()

    def weights(self) -> np.ndarray:
        """Weights for the next token, (K,): 0 for all but `top_k` of the experts that run."""
        scores_1K = self._scores()
        ranked = len(self.running) > self.top_k  # else the others have no weight already, and ranking takes longest
        return sparse_weights(scores_1K, self.top_k if ranked else scores_1K.size)[0]

    def read(self, token: int) -> None:
        """Take in the next token, O(D)."""
        self._context.append(token)
        self.length += 1

    def observe(self, logprobs: list[float]) -> None:
        """Take in what each running expert thought of the next token not observed yet.

        The end of the prefix has to be observed before anything after it is read: it decides who runs on.
        """
        assert self.observed < self.length
        gamma = self.ensemble.settings["gamma"]
        self._evidence_K[self.running] = gamma * self._evidence_K[self.running] + logprobs
        self.observed += 1
        if self.observed == self.ensemble.prefix_tokens:
            assert self.length == self.observed
            best = np.argsort(-self._scores()[0], kind="stable")[: self.top_k]
            self.running = sorted(int(expert) for expert in best)

    def _scores(self) -> np.ndarray:
        settings = self.ensemble.settings
        # Of one context, and in numpy: PyTorch takes longer to begin than this takes.
        offsets_KD = self._context.embedding() - self._centers_KD
        distances_K = np.einsum("kd,kd->k", offsets_KD, offsets_KD)
        found_K = posterior_scores(distances_K, self._evidence_K, settings["temperature"], settings["beta"])
        scores_1K = np.full((1, len(found_K)), -np.inf)
        scores_1K[0, self.running] = found_K[self.running]
        return scores_1K


def load_ensemble(
    run_dir: str, clusters: Collection[int] | None = None, *, resident: int | None = None
) -> tuple[Ensemble, PreTrainedTokenizerBase]:
    """The ensemble of a finished run directory with the routing that its evaluation tuned, and the tokenizer.

    Args:
        clusters: whose experts are to be here; all, if not said.
        resident: how many of them have their weights in memory at a time; all, if not said.

    Raises:
        ValueError: the run is not finished.
    """
    from cbtm_ray.branch import expert_folder  # brings Ray, which decoding does without

    if not files.exists(files.join(run_dir, "evaluation", "manifest.json")):
        raise ValueError(f"run_dir={run_dir} is not a finished run. Run first: python -m jobs.run_all --config FILE")
    evaluation = files.read_json(files.join(run_dir, "evaluation", "results.json"))
    ensemble_rows = [row for row in evaluation["rows"] if row["system"] == "cbtm" and row["routing"] == "posterior"]
    tuned = next(row for row in ensemble_rows if row["top_k"] == min(2, row["n_clusters"]))
    wanted = range(tuned["n_clusters"]) if clusters is None else clusters
    folders = {cluster: files.join(run_dir, expert_folder(cluster)) for cluster in wanted}
    tokenizer = load_tokenizer(files.join(run_dir, "tokenizer"))
    embedder, centers_KD = load_clusterer(files.join(run_dir, "clusterer"), tokenizer)
    ensemble = Ensemble(
        experts=PagedExperts(folders, resident or len(folders)),
        embedder=embedder,
        centers_KD=centers_KD,
        end_of_text=tokenizer.eos_token_id,
        settings=tuned["settings"],
        prefix_tokens=evaluation["prefix_tokens"],
    )
    return ensemble, tokenizer
