"""Stage `evaluation/`: score the held-out documents with every model where Ray has room, then compare the systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import ray
import torch

from cbtm_ray import evaluate, files, progress
from cbtm_ray.branch import DENSE, expert_folder
from cbtm_ray.config import Config
from cbtm_ray.distances import squared_distances
from cbtm_ray.documents import unit_hash
from cbtm_ray.embed import load_clusterer
from cbtm_ray.models import load_model
from cbtm_ray.run import Run
from cbtm_ray.tokens import load_tokenizer

ROUTINGS = ("embedding", "posterior", "prefix")
SAMPLE_TOKENS = 300


@dataclass(frozen=True)
class HeldOutDocuments:
    """The held-out documents to score, in a fixed order, and which half of them is for tuning."""

    tokens: list[np.ndarray]
    text_bytes: np.ndarray
    domains: list[str | None]
    for_tuning: np.ndarray


def evaluate_mixture(run: Run) -> dict[str, Any]:
    """`evaluation/results.json`: perplexity of the seed, the dense control and the ensemble for every routing and top-k.

    Routing settings are tuned on one half of the held-out documents and all numbers reported on the other; halves are a
    hash of the document's id.
    """
    config = run.config
    experts = [expert_folder(cluster) for cluster in range(config.cluster.n_clusters)]
    models = {name: run.need(name, "train_experts") for name in ["seed", DENSE, *experts]}
    documents = held_out_documents(run)
    logprobs = {name: files.read_array(uri) for name, uri in _score_models(run, list(models)).items()}
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    embedder, centers_KD = load_clusterer(run.uri("clusterer"), tokenizer)
    prefixes = (torch.from_numpy(embedder.prefix_embeddings(tokens)) for tokens in documents.tokens)
    distances_TK = torch.cat([squared_distances(prefixes_TD, centers_KD) for prefixes_TD in prefixes]).numpy()
    experts_TK = np.stack([logprobs[name] for name in experts], axis=1)
    tuning, reported = (_half(documents, experts_TK, distances_TK, half) for half in (True, False))
    tokens_T = _token_mask(documents, False)
    text_bytes = int(documents.text_bytes[~documents.for_tuning].sum())
    seed_T, dense_T = logprobs["seed"][tokens_T], logprobs[DENSE][tokens_T]
    rows = [
        {**_single_row(system, models[name]), **evaluate.summarise(scores_T, reported.lengths, text_bytes, dense_T)}
        for system, name, scores_T in (("seed", "seed", seed_T), ("dense", DENSE, dense_T))
    ]
    routes = _routes(config, tuning)
    mixtures = [
        _mixture_row(route, [models[name] for name in experts], tuning, reported, text_bytes, dense_T)
        for route in routes
    ]
    best = min(range(len(mixtures)), key=lambda index: mixtures[index]["tuning_loss_nats"])
    mixtures[best]["chosen"] = True
    mixture_T = evaluate.mixture_logprobs(reported, routes[best])
    results = {
        "rows": [*rows, *mixtures],
        "domains": _domain_rows(documents, reported, dense_T, mixture_T),
        "tuned_on_documents": len(tuning.lengths),
        "reported_on_documents": len(reported.lengths),
        "reported_tokens": int(reported.lengths.sum()),
        "prefix_tokens": config.evaluate.prefix_tokens,
        "sample": _sample(run, documents, reported, routes[best]),
    }
    files.write_json(run.uri("evaluation", "results.json"), results)
    return {key: results[key] for key in ("tuned_on_documents", "reported_on_documents", "reported_tokens")}


def held_out_documents(run: Run) -> HeldOutDocuments:
    """Those with the smallest hash of their id, `evaluate.max_documents` of them, in the order of the shards."""
    seed, most = run.config.run.seed, run.config.evaluate.max_documents
    filesystem, path = files.resolve(run.uri("shards", "valid"))
    table = ds.dataset(path, filesystem=filesystem, format="parquet").to_table(use_threads=False)
    hashes = np.array([unit_hash(seed + 1, document_id) for document_id in table["id"].to_pylist()])
    kept = np.sort(np.argsort(hashes, kind="stable")[:most])
    table = table.take(kept)
    return HeldOutDocuments(
        tokens=[np.asarray(tokens, np.int32) for tokens in table["tokens"].to_pylist()],
        text_bytes=table["text_bytes"].to_numpy(),
        domains=table["domain"].to_pylist(),
        for_tuning=np.argsort(np.argsort(hashes[kept], kind="stable")) % 2 == 0,
    )


@ray.remote
def _score(config: Config, name: str) -> str:
    run = Run(config)
    uri = run.uri("evaluation", "logprobs", f"{name.replace('/', '-')}.npy")
    if not files.exists(uri):
        model = load_model(run.uri(name))
        if config.train.gpus_per_expert:
            torch.nn.Module.to(model, "cuda")
        logprobs_T = evaluate.score_documents(
            model,
            held_out_documents(run).tokens,
            sequence_length=config.tokens.sequence_length,
            end_of_text=load_tokenizer(run.uri("tokenizer")).eos_token_id,
            batch_tokens=config.evaluate.batch_tokens,
        )
        files.write_array(uri, logprobs_T)
    return uri


def _score_models(run: Run, names: list[str]) -> dict[str, str]:
    """Where each model's log-probabilities are; each model is loaded and run once, on a worker."""
    train = run.config.train
    task = _score.options(num_cpus=train.cpus_per_expert, num_gpus=train.gpus_per_expert)
    waiting = {task.remote(run.config, name): name for name in names}
    uris = {}
    with progress.bar("evaluate_mixture", len(names), "models") as done:
        while waiting:
            ready, _ = ray.wait(list(waiting))
            uris.update({waiting.pop(ref): uri for ref, uri in zip(ready, ray.get(ready), strict=True)})
            done(len(uris))
    return uris


def _token_mask(documents: HeldOutDocuments, tuning: bool) -> np.ndarray:
    lengths = np.array([len(tokens) for tokens in documents.tokens])
    return np.repeat(documents.for_tuning == tuning, lengths)


def _half(
    documents: HeldOutDocuments, logprobs_TK: np.ndarray, distances_TK: np.ndarray, tuning: bool
) -> evaluate.HeldOut:
    mask_T = _token_mask(documents, tuning)
    lengths = [len(t) for t, kept in zip(documents.tokens, documents.for_tuning == tuning, strict=True) if kept]
    return evaluate.HeldOut(np.array(lengths), logprobs_TK[mask_T], distances_TK[mask_T])


def _single_row(system: str, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "system": system,
        "n_clusters": 1,
        "top_k": 1,
        "routing": None,
        "train_tokens": manifest["train_tokens"],
        "train_flops": manifest["train_flops"],
        "infer_flops_per_token": manifest["infer_flops_per_token"],
    }


def _routes(config: Config, tuning: evaluate.HeldOut) -> list[evaluate.Route]:
    """Every way of routing to report, tuned."""
    n_clusters = config.cluster.n_clusters
    sizes = sorted({*(k for k in config.evaluate.top_k if k < n_clusters), n_clusters})
    return [
        route
        for routing in ROUTINGS
        for route in evaluate.tune(tuning, config.evaluate, routing=routing, sizes=sizes)
        if routing != "prefix" or route.top_k < n_clusters  # holding all leaves nothing out: posterior routing
    ]


def _mixture_row(
    route: evaluate.Route,
    manifests: list[dict[str, Any]],
    tuning: evaluate.HeldOut,
    reported: evaluate.HeldOut,
    text_bytes: int,
    dense_T: np.ndarray,
) -> dict[str, Any]:
    n_clusters = len(manifests)
    running = evaluate.experts_run(route.routing, route.top_k, n_clusters, reported.lengths, route.prefix_tokens)
    return {
        "system": "cbtm",
        "n_clusters": n_clusters,
        "routing": route.routing,
        "top_k": route.top_k,
        "settings": route.settings,
        "train_tokens": sum(manifest["train_tokens"] for manifest in manifests),
        "train_flops": sum(manifest["train_flops"] for manifest in manifests),
        "infer_flops_per_token": running * manifests[0]["infer_flops_per_token"],
        "tuning_loss_nats": float(-evaluate.mixture_logprobs(tuning, route).mean()),
        **evaluate.summarise(evaluate.mixture_logprobs(reported, route), reported.lengths, text_bytes, dense_T),
    }


def _domain_rows(
    documents: HeldOutDocuments, reported: evaluate.HeldOut, dense_T: np.ndarray, mixture_T: np.ndarray
) -> list[dict[str, Any]]:
    """Perplexity of the dense control and the chosen ensemble on each gold domain."""
    domains = [d for d, tuning in zip(documents.domains, documents.for_tuning, strict=True) if not tuning]
    domain_T = np.repeat(np.array([domain or "" for domain in domains]), reported.lengths)
    return [
        {
            "domain": domain,
            "tokens": int((domain_T == domain).sum()),
            "dense_ppl": float(np.exp(-dense_T[domain_T == domain].mean())),
            "cbtm_ppl": float(np.exp(-mixture_T[domain_T == domain].mean())),
        }
        for domain in sorted({domain for domain in domains if domain})
    ]


def _sample(
    run: Run, documents: HeldOutDocuments, reported: evaluate.HeldOut, route: evaluate.Route
) -> list[dict[str, Any]]:
    """The reported document closest to 300 tokens, with the expert of most weight for each token."""
    index = int(np.argmin(np.abs(reported.lengths - SAMPLE_TOKENS)))
    rows = list(reported.documents())[index]
    one = evaluate.HeldOut(
        reported.lengths[index : index + 1], reported.logprobs_TK[rows], reported.squared_distances_TK[rows]
    )
    weights_TK = evaluate.routing_weights(one, route)[:SAMPLE_TOKENS]
    tokens = documents.tokens[int(np.flatnonzero(~documents.for_tuning)[index])][:SAMPLE_TOKENS]
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    return [
        {"token": tokenizer.decode([int(token)]), "expert": int(weights.argmax()), "weight": float(weights.max())}
        for token, weights in zip(tokens, weights_TK, strict=True)
    ]
