"""Sizes for the plan: models without their weights, and the network bytes of the clustering.

    K clusters, N documents in the sample, D embedding dimensions

Nothing is downloaded: a model by name must be in Hugging Face's local cache already.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from cbtm_ray.branch.upcycle import upcycle
from cbtm_ray.cluster.shard_steps import GROUPS, SHARD_ROWS
from cbtm_ray.config import Config
from cbtm_ray.corpus.tokenizer import load_tokenizer, vocabulary_size
from cbtm_ray.errors import UserError
from cbtm_ray.models import empty_model, load_model_config

DUAL_STEPS = 10
"""Dual steps in a Lloyd iteration: 6.5 (K = 8) and 10 (K = 64) were counted on 4,000 documents of the quickstart."""


def dimensions(config: Config) -> int:
    """Dimensions of an embedding: those that are asked for, or the encoder's."""
    if config.embed.encoder is None:
        return config.embed.dimensions
    return int(_read_config(config.embed.encoder, "embed.encoder").hidden_size)


def seed_model(config: Config) -> PreTrainedModel:
    """The seed without its weights, on torch's meta device; UserError if its configuration is not on this machine."""
    name = config.seed_model.name_or_path
    architecture = _read_config(name, "seed_model.name_or_path") if name else _new_architecture(config)
    try:
        return empty_model(architecture)
    except ValueError as error:
        raise UserError(f"seed_model.name_or_path={name!r} is not a causal language model. Give one.") from error


def _new_architecture(config: Config) -> LlamaConfig:
    """The model that `models.new_model` makes, on the meta device: its size without its weights."""
    sizes = config.seed_model
    return LlamaConfig(
        vocab_size=_vocabulary(config),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        tie_word_embeddings=True,
    )


def upcycled(seed: PreTrainedModel, n_experts: int) -> PreTrainedModel:
    """The mixture of experts that a seed becomes, on the meta device too; UserError if it cannot."""
    with torch.device("meta"):
        return upcycle(seed, n_experts, 0)


def _read_config(name: str, field: str) -> PretrainedConfig:
    """The config.json of a Hugging Face folder, URI of one, or name in the local cache. Weights are not looked at."""
    try:
        return load_model_config(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}={name!r} must be the folder of a model, or in the local cache of Hugging Face: a plan downloads "
            f"nothing. Fetch it first: hf download {name} config.json"
        ) from error


def _vocabulary(config: Config) -> int:
    """Vocabulary size. For a tokenizer yet to be trained it is the size asked for; a corpus of few words may give less."""
    if config.tokens.tokenizer == "train":
        return config.tokens.vocab_size
    return vocabulary_size(load_tokenizer(config.tokens.tokenizer))


def clusterer_bytes(config: Config) -> int:
    """Bytes over the network while the clusters are fitted, and the clusters of the control without balance.

    Sums go up from groups of shards, centers down to actors. A dual step sends up K loads, K x K overlaps and a value, a
    means step K x D sums, K counts and a value, all float64; down go K x D centers in float32 and K prices in float64.
    Labels (N int32) go up once. `kmeans_actors.py` says more.
    """
    n_clusters, n_dimensions, documents = config.cluster.n_clusters, dimensions(config), config.corpus.sample_documents
    groups = min(GROUPS, math.ceil(documents / SHARD_ROWS))
    actors = min(config.cluster.actors, groups)
    total = 0
    for balanced in [config.cluster.balanced] + [False] * ("unbalanced" in config.train.controls):
        dual_steps = DUAL_STEPS if balanced else 0
        up = dual_steps * 8 * (n_clusters + n_clusters**2 + 1) + 8 * (n_clusters * n_dimensions + n_clusters + 1)
        down = (dual_steps + 1) * (4 * n_clusters * n_dimensions + 8 * n_clusters)
        total += config.cluster.max_iter * (groups * up + actors * down) + 4 * documents
    return total
