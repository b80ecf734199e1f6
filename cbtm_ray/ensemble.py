"""The experts of a run and what routes to them, and the weights over experts of a text that grows.

T tokens, K experts, R of them running, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.embed import Embedder, load_clusterer
from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model_config
from cbtm_ray.paging import PagedExperts
from cbtm_ray.route import sparse_weights
from cbtm_ray.tokens import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The experts of a run, and what routes to them."""

    experts: Mapping[int, PreTrainedModel]
    """Those that are here, by cluster: in a service that is spread out, not all."""
    model_config: PretrainedConfig
    """Of every expert: they differ in their weights only."""
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
    def max_length(self) -> int:
        """Tokens that prompt and answer may have together, at least one of them in the answer."""
        return int(self.model_config.max_position_embeddings)


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
        self._context, self._running_R = ensemble.embedder.context(), np.array(self.running)
        self._evidence_R = np.zeros(len(self.running))  # times beta
        # -||h - c||^2 / T is h @ slope + offset, but for what all experts have in common: 3 steps less a token.
        centers_RD = ensemble.centers_KD.double().numpy()[self.running]
        self._slopes_RD = 2 / ensemble.settings["temperature"] * centers_RD
        self._offsets_R = -np.vecdot(centers_RD, centers_RD) / ensemble.settings["temperature"]

    def weights(self) -> np.ndarray:
        """Weights for the next token, (K,): 0 for all but `top_k` of the experts that run."""
        weights_K = np.zeros(self.ensemble.n_experts)
        weights_K[self._running_R] = 1 if len(self.running) == 1 else sparse_weights(self._scores_R(), self.top_k)
        return weights_K

    def read(self, tokens: Iterable[int]) -> None:
        """Take in the next tokens, O(D) each."""
        for token in tokens:
            self._context.append(token)
            self.length += 1

    def observe(self, logprobs_RT: list[list[float]]) -> None:
        """Take in what each running expert thought of the next tokens not observed yet.

        The end of the prefix has to be observed before anything after it is read: it decides who runs on.
        """
        settings, prefix = self.ensemble.settings, self.ensemble.prefix_tokens
        end = self.observed + len(logprobs_RT[0])
        assert end <= self.length
        assert not self.observed < prefix < end
        for evidence_R in settings["beta"] * np.array(logprobs_RT).T:
            self._evidence_R = settings["gamma"] * self._evidence_R + evidence_R
        self.observed = end
        if end == prefix:
            assert self.length == end
            best = np.sort(np.argsort(-self._scores_R(), kind="stable")[: self.top_k])
            self._slopes_RD, self._offsets_R = self._slopes_RD[best], self._offsets_R[best]
            self._running_R, self._evidence_R = self._running_R[best], self._evidence_R[best]
            self.running = self._running_R.tolist()

    def _scores_R(self) -> np.ndarray:
        return self._slopes_RD @ self._context.embedding() + self._offsets_R + self._evidence_R


def load_ensemble(
    run_dir: str, clusters: Collection[int] | None = None, *, resident: int | None = None, device: str = "cpu"
) -> tuple[Ensemble, PreTrainedTokenizerBase]:
    """The ensemble of a finished run directory with the routing that its evaluation tuned, and the tokenizer.

    Args:
        clusters: whose experts are to be here; all, if not said.
        resident: how many of them have their weights in memory at a time; all, if not said.
        device: where they run.

    Raises:
        UserError: the run is not finished.
    """
    from cbtm_ray.branch import expert_folder  # brings Ray, which decoding does without

    if not files.exists(files.join(run_dir, "evaluation", "manifest.json")):
        raise UserError(f"run_dir={run_dir} is not a finished run. Run first: python -m jobs.run_all --config FILE")
    evaluation = files.read_json(files.join(run_dir, "evaluation", "results.json"))
    ensemble_rows = [row for row in evaluation["rows"] if row["system"] == "cbtm" and row["routing"] == "posterior"]
    tuned = next(row for row in ensemble_rows if row["top_k"] == min(2, row["n_clusters"]))
    wanted = range(tuned["n_clusters"]) if clusters is None else clusters
    folders = {cluster: files.join(run_dir, expert_folder(cluster)) for cluster in wanted}
    tokenizer = load_tokenizer(files.join(run_dir, "tokenizer"))
    embedder, centers_KD = load_clusterer(files.join(run_dir, "clusterer"), tokenizer)
    ensemble = Ensemble(
        experts=PagedExperts(folders, resident or len(folders), device),
        model_config=load_model_config(files.join(run_dir, expert_folder(0))),
        embedder=embedder,
        centers_KD=centers_KD,
        end_of_text=tokenizer.eos_token_id,
        settings=tuned["settings"],
        prefix_tokens=evaluation["prefix_tokens"],
    )
    return ensemble, tokenizer
