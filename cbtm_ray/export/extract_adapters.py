"""Job `extract_adapters`: every expert as a LoRA adapter of the seed, and the ensemble's perplexity against the rank.

T tokens, R those of the documents that are reported on, K experts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cbtm_ray import files
from cbtm_ray.config import Config
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.evaluate import perplexity
from cbtm_ray.evaluate.scoring import held_out_documents, score_models, score_texts
from cbtm_ray.evaluate.systems import ensemble_system, measure
from cbtm_ray.export.adapters import cut, dropped_share, factors_of, save_adapter, with_factors
from cbtm_ray.merge.ensemble import served_route
from cbtm_ray.models import load_model
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, expert_folder

FOLDER = "export/adapters"
KEPT = 0.95
"""Share of the experts' gain that the report names the least rank of."""


def extract_adapters(run: Run) -> dict[str, Any]:
    """Stage `export/adapters/`: a folder `cluster=NNNN` in PEFT's format for every expert, of `export.rank`.

    And the perplexity of the served mixture with adapters of this rank and of `export.ranks`.

    Raises:
        UserError: the run is not evaluated, or its models have no linear layers.
    """
    run.require("evaluation", "evaluate_mixture")
    config, clusters = run.config, range(run.config.cluster.n_clusters)
    task = _adapters.options(num_cpus=config.train.cpus_per_expert, num_gpus=config.train.gpus_per_expert)
    ranks = sorted({*config.export.ranks, config.export.rank})
    waiting = [task.remote(config, cluster, ranks) for cluster in clusters]
    documents, ensemble, route = held_out_documents(run), ensemble_system(run), served_route(run.dir)
    logprobs = score_models(run, [DENSE_FOLDER, *ensemble.experts])
    dense_R = logprobs[DENSE_FOLDER][documents.token_mask(tuning=False)]

    def row(rank: int | None, experts: list[np.ndarray]) -> dict[str, Any]:
        found = measure(run, documents, dict(zip(ensemble.experts, experts, strict=True)), [ensemble])[0]
        return {"rank": rank, **documents.summarize(perplexity.mixture_logprobs(found.reported, route), dense_R)}

    dense = {"rank": 0, **documents.summarize(dense_R, dense_R)}
    whole = row(None, [logprobs[name] for name in ensemble.experts])
    scored = ray.get(waiting)
    rows = [row(rank, [by_rank[rank] for by_rank, _ in scored]) for rank in ranks]
    gain_nats = dense["loss_nats"] - whole["loss_nats"]
    for one in rows:
        one["gain_kept"] = (dense["loss_nats"] - one["loss_nats"]) / gain_nats if gain_nats > 0 else None
    enough = [one["rank"] for one in rows if (one["gain_kept"] or 0) >= KEPT]
    return {
        "rank": config.export.rank,
        "embeddings": config.export.embeddings,
        "routing": route.routing,
        "top_k": route.top_k,
        "rows": [dense, *rows, whole],
        "least_rank": min(enough, default=None),
        "dropped_share": float(np.mean([share for _, share in scored])),
    }


@ray.remote
def _adapters(config: Config, cluster: int, ranks: list[int]) -> tuple[dict[int, np.ndarray], float]:
    """Log-probabilities (T,) of an expert cut to each rank, and the share of its change that adapters cannot hold."""
    run, wanted = Run(config), config.export
    device = "cuda" if config.train.gpus_per_expert else "cpu"
    seed, expert = load_model(run.uri("seed")), load_model(run.uri(expert_folder(cluster)))
    factors = factors_of(expert, seed, max(ranks), embeddings=wanted.embeddings)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(seed, cut(factors, wanted.rank), _seed_name(run), Path(folder))
        files.publish_folder(folder, run.uri(FOLDER, f"cluster={cluster:04d}"))
    end_of_text, texts = load_tokenizer(run.uri("tokenizer")).eos_token_id, held_out_documents(run).tokens
    found = {}
    for rank in ranks:
        model = torch.nn.Module.to(with_factors(seed, cut(factors, rank)).eval(), device)
        found[rank] = score_texts(config, model, texts, end_of_text)
    return found, dropped_share(expert, seed, embeddings=wanted.embeddings)


def _seed_name(run: Run) -> str:
    """The seed's own name where it was taken as it is, else its folder in the run."""
    seed = run.config.seed_model
    given = seed.name_or_path
    unchanged = given is not None and seed.train_tokens == 0 and not files.exists(given)
    return str(given) if unchanged else files.absolute(run.uri("seed"))
