"""Job `export_moe`: the experts' feed-forward layers in one sparse model that any engine serves, measured as the rest is.

N sequences, T tokens, K experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from transformers import PreTrainedModel

from cbtm_ray import files
from cbtm_ray.config import Config
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.result_rows import ResultRow
from cbtm_ray.evaluate.scoring import held_out_documents, score_models, score_texts
from cbtm_ray.export.moe_router import fit_routers, scale_routers, train_routers
from cbtm_ray.merge.ensemble import servable_routers
from cbtm_ray.merge.mixture import average_weights
from cbtm_ray.models import load_model, load_model_config, save_model
from cbtm_ray.run import Run
from cbtm_ray.sparse import layers, sparse_model, why_not_sparse
from cbtm_ray.stages import DENSE_FOLDER, expert_folder
from cbtm_ray.train import flops
from cbtm_ray.train.packed_sequences import PackedSequences, read_documents

FOLDER = "export/moe/model"
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Candidates for the scale of the routers' logits, where two or more experts are mixed."""


def export_moe(run: Run) -> dict[str, Any]:
    """Stage `export/moe/`: the merged model in `model/`, a Hugging Face folder, and its held-out perplexity among the others'.

    Raises:
        UserError: the experts' architecture has no sparse one, or there are fewer experts than `export.moe_top_k`.
    """
    run.require("evaluation", "evaluate_mixture")
    top_k, n_clusters = run.config.export.moe_top_k, run.config.cluster.n_clusters
    if top_k > n_clusters:
        raise UserError(f"export.moe_top_k={top_k} must be at most cluster.n_clusters={n_clusters}.")
    if reason := why_not_sparse(load_model_config(run.uri(expert_folder(0)))):
        raise UserError(
            f"The experts cannot be merged into a mixture of experts: {reason}. Merge their outputs instead."
        )
    task = _write_moe.options(num_cpus=run.config.train.cpus_per_expert)
    made = ray.get(task.remote(run.config))
    logprobs, documents = score_models(run, [DENSE_FOLDER, FOLDER]), held_out_documents(run)
    reported_T = documents.token_mask(tuning=False)
    found = documents.summarize(logprobs[FOLDER][reported_T], logprobs[DENSE_FOLDER][reported_T])
    others = _other_rows(run)
    ensemble = next(row for row in others if row["system"] == "cbtm")
    row: ResultRow = {
        "system": "merged", "routing": None, "top_k": top_k, "n_clusters": n_clusters,
        "train_tokens": ensemble["train_tokens"] + made["router_tokens"],
        "train_flops": ensemble["train_flops"] + made["router_flops"],
        "infer_flops_per_token": made["infer_flops_per_token"], **found,
    }  # fmt: skip
    return {**made, "rows": [*others, row]}


def _other_rows(run: Run) -> list[ResultRow]:
    """The evaluation's rows of the dense control, of 'moe', and of the routers of the ensemble that are served."""
    rows = files.read_json(run.uri("evaluation", "results.json"))["rows"]
    ensemble = [row for row in rows if row["system"] == "cbtm" and row["routing"] in servable_routers(run.dir)]
    return [*(row for row in rows if row["system"] in ("dense", "moe")), *ensemble]


@ray.remote
def _write_moe(config: Config) -> dict[str, Any]:
    run = Run(config)
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    model, differing = merge_experts([run.uri(expert_folder(k)) for k in range(config.cluster.n_clusters)], config)
    tokens_NT, clusters_N = _router_text(run, int(tokenizer.eos_token_id))
    targets_NTK = torch.nn.functional.one_hot(clusters_N, config.cluster.n_clusters).float()
    targets_NTK = targets_NTK[:, None].expand(-1, tokens_NT.shape[1], -1)
    fit_routers(model, tokens_NT, targets_NTK, config.evaluate.batch_tokens)
    scale = _scale(run, model, int(tokenizer.eos_token_id)) if config.export.moe_top_k > 1 else None
    trained = _train_routers(run, model, int(tokenizer.eos_token_id))
    per_token = flops.model_flops_per_token(model, config.tokens.sequence_length)
    made = {
        "content": save_model(model, tokenizer, run.uri(FOLDER)),
        "exact": not differing,
        "averaged": differing,
        "router_scale": scale,
        "ridge_tokens": tokens_NT.numel(),
        "router_tokens": trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "infer_flops_per_token": per_token,
        "router_flops": tokens_NT.numel() * per_token * len(layers(model)) + flops.train_flops(per_token, trained),
    }
    return run.finish(FOLDER, made)


def merge_experts(uris: list[str], config: Config) -> tuple[PreTrainedModel, int]:
    """The merged model with routers yet to be fitted, and how many shared weights had to be averaged: 0 if it is exact."""
    experts = [load_model(uri) for uri in uris]
    states = [{n: w for n, w in expert.state_dict().items() if ".mlp." not in n} for expert in experts]
    differing = sum(any(not torch.equal(state[name], weight) for state in states) for name, weight in states[0].items())
    shared = average_weights(experts) if differing else experts[0]
    return sparse_model(shared, experts, config.export.moe_top_k, random_state=config.run.seed), differing


def _router_text(run: Run, end_of_text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training sequences of every cluster, as many of each, int64 (N, T), and their clusters (N,)."""
    config = run.config
    length, n_clusters = config.tokens.sequence_length, config.cluster.n_clusters
    wanted = max(1, config.export.ridge_tokens // n_clusters // length)
    tokens, clusters = [], list[int]()
    for cluster in range(n_clusters):
        packed = _packed(run, cluster, end_of_text)
        tokens.append(packed.batch(0, min(wanted, packed.per_epoch))[:, :-1])
        clusters += [cluster] * len(tokens[-1])
    return torch.from_numpy(np.concatenate(tokens)), torch.tensor(clusters)


def _packed(run: Run, cluster: int | None, end_of_text: int) -> PackedSequences:
    documents = read_documents(run.uri("shards"), "train", cluster)
    length, seed = run.config.tokens.sequence_length, run.config.run.seed
    return PackedSequences(documents, sequence_length=length, end_of_text=end_of_text, seed=seed)


def _scale(run: Run, model: PreTrainedModel, end_of_text: int) -> float:
    """The routers' scale, chosen on the held-out documents for tuning."""
    held_out = held_out_documents(run)
    tuning = [tokens for tokens, kept in zip(held_out.tokens, held_out.for_tuning, strict=True) if kept]
    return scale_routers(model, SCALES, lambda: float(-score_texts(run.config, model, tuning, end_of_text).mean()))


def _train_routers(run: Run, model: PreTrainedModel, end_of_text: int) -> int:
    """Train the routers alone on all documents for `export.router_tokens`; the tokens that whole steps make of them."""
    steps = run.config.export.router_tokens // run.config.tokens_per_step
    if steps:
        train_routers(model, _packed(run, None, end_of_text), run.config, steps)
    return steps * run.config.tokens_per_step
