"""A sparse ensemble of tiny random experts, made by hand: no run, no Ray."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cbtm_ray.cluster.embed import TokenTfidf
from cbtm_ray.cluster.ngrams import NgramTables, count_pairs, smooth
from cbtm_ray.decode.engine import Engine, generate
from cbtm_ray.decode.sampling import Sampling
from cbtm_ray.decode.sequence import Request, Step
from cbtm_ray.merge.ensemble import Ensemble
from cbtm_ray.merge.routers import Route
from tests.support.tiny_models import MODELS

DIMENSIONS = 4


def small_vocabulary(vocab_size: int) -> Any:
    """For statistics of draws."""
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=64)
    )  # fmt: skip


def make_routes(n_experts: int, routing: str) -> dict[int, Route]:
    """Settings of its own for every top_k, so that those of another one show."""
    found = {}
    for top_k in range(1, n_experts + 1):
        settings = {"temperature": 3.0 + 0.5 * top_k, "beta": 2.0, "gamma": 0.8 + 0.05 * top_k}
        if routing == "ngram":
            settings["reread_cost"] = 0.02
        found[top_k] = Route(routing=routing, top_k=top_k, settings=settings, prefix_tokens=6)
    return found


def make_ngrams(n_clusters: int, vocabulary: int, seed: int = 0) -> NgramTables:
    """Bigram tables of random documents, each with favorite tokens; some of their pairs have no row of their own."""
    random = np.random.default_rng(seed)
    documents = [random.choice(vocabulary, 4000, p=random.dirichlet([2.0] * vocabulary)) for _ in range(n_clusters)]
    counts = count_pairs(documents, range(n_clusters), vocabulary=vocabulary, n_clusters=n_clusters, end_of_text=0)
    return smooth(counts, end_of_text=0, max_pairs=100, min_count=1).tables()


def make_ensemble(
    n_experts: int = 4,
    *,
    architecture: str = "llama",
    vocab_size: int = 50,
    routing: str = "ngram",
) -> Ensemble:
    """Experts far enough from each other and from uniform that mistakes in mixing show."""
    experts = []
    for expert in range(n_experts):
        torch.manual_seed(expert)
        model = MODELS[architecture]() if vocab_size == 50 else small_vocabulary(vocab_size)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        experts.append(model.eval())
    random = np.random.default_rng(0)
    return Ensemble(
        experts=dict(enumerate(experts)),
        model_config=experts[0].config,
        embedder=TokenTfidf(random.normal(size=(vocab_size, DIMENSIONS))),
        centers_KD=torch.from_numpy(random.normal(size=(n_experts, DIMENSIONS)).astype(np.float32)),
        end_of_text=0,
        routes=make_routes(n_experts, routing),
        ngrams=make_ngrams(n_experts, vocab_size),
    )


def make_request(prompt: list[int], **changes: Any) -> Request:
    fields = {"max_tokens": 12, "top_k": 2, "sampling": Sampling()}
    return Request(prompt=prompt, **(fields | changes))


def tokens_of(ensemble: Ensemble, prompt: list[int], **changes: Any) -> list[int]:
    return [step.token for step in generate(ensemble, make_request(prompt, **changes))]


def drain(engine: Engine, requests: list[Request]) -> list[list[Step]]:
    """Every request's steps, decoded side by side."""
    found: dict[int, list[Step]] = {engine.add(request): [] for request in requests}
    while engine.running or engine.waiting:
        for number, step in engine.step():
            found[number].append(step)
    return list(found.values())


def text_logprobs(ensemble: Ensemble, tokens: list[int], **changes: Any) -> np.ndarray:
    """Log-probability of every token of a text under the mixture, (T,)."""
    request = make_request(tokens, **{"max_tokens": 0, "echo_logprobs": True, **changes})
    return np.array([step.logprob for step in generate(ensemble, request)])


def with_experts(ensemble: Ensemble, order: list[int]) -> Ensemble:
    tables = {name: getattr(ensemble.ngrams, name)[:, order] for name in ("token_VK", "context_VK", "pair_PK")}
    return dataclasses.replace(
        ensemble,
        ngrams=dataclasses.replace(ensemble.ngrams, **tables),
        experts={new: ensemble.experts[old] for new, old in enumerate(order)},
        centers_KD=ensemble.centers_KD[order],
        routes={top_k: route for top_k, route in ensemble.routes.items() if top_k <= len(order)},
    )
