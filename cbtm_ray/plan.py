"""What a run will take, before it runs: tokens, FLOPs, hours, cost, bytes. Every formula stands here with its source.

    K experts, P parameters, D hidden size, I inner size, V vocabulary, G devices

Training FLOPs are counted as the runs count their own (`flops.py`), so that a plan and a manifest can be compared.
Nothing here starts Ray or needs a network; a model by name must be in Hugging Face's local cache already.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from cbtm_ray import flops
from cbtm_ray.config import Config, SeedModelConfig
from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model_config
from cbtm_ray.shard_steps import GROUPS, SHARD_ROWS
from cbtm_ray.tokens import load_tokenizer

PEAK_TFLOPS = {"-".join(words).lower(): peaks for words, peaks in flops.PEAK_TFLOPS.items()}
"""Peak of one GPU in 1e12 FLOPs a second by precision, dense, under the names that the command line takes."""

START_S = 15.0
"""Seconds that Ray Train takes to start and end a run: 10 to 20 where this was measured, on 2 busy CPU cores."""
STATE_BYTES = 16
"""Bytes a parameter while training: float32 weight, gradient and two AdamW moments. Activations come on top."""
CHECKPOINT_BYTES = 12
"""Bytes a parameter in a checkpoint: all of that but the gradient. Ray Train keeps two of a run."""
DUAL_STEPS = 10
"""Dual steps in a Lloyd iteration: 6.5 (K = 8) and 10 (K = 64) were counted on 4,000 documents of the quickstart."""
SHARD_BYTES_PER_TOKEN = 1.3
"""Of the token shards, compressed, ids and all: 5.4 MB for the quickstart's 4.2 million tokens."""


@dataclass(frozen=True)
class Model:
    """The sizes of a model that cost depends on."""

    parameters: int
    matrix_parameters: int
    """Those that take part in a product for every token, as `flops.parameters` counts."""
    n_layers: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What the run is given."""

    name: str
    count: int
    peak_flops: float
    """FLOPs a second of one device."""
    utilisation: float
    """Share of the peak that training reaches."""
    price_per_hour: float
    """Of one device, in any currency."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of one run; what follows from them by a formula is a property."""

    devices: Devices
    model: Model
    per_step: int
    """Tokens in an optimiser step."""
    seed_steps: int
    expert_steps: int
    seed_flops: float
    expert_flops: float
    dense_flops: float
    """As all experts together."""
    infer_flops_per_token: float
    slots: int
    """Runs in training at once."""
    share: float
    """Devices that one run holds."""
    workers: int
    """Workers of one run, each of which computes on one device; what they send to each other is not counted."""
    group_sizes: list[int]
    """Experts that each run trains, one after the other."""
    clusterer_bytes: int
    """Network bytes of fitting the clusters, all iterations."""
    embedding_bytes: int
    """The embeddings that stay where they are meanwhile."""

    def run_s(self, n_flops: float) -> float:
        """Seconds of a run; a device that two runs share is half as fast for each."""
        rate = self.devices.peak_flops * self.devices.utilisation * min(self.share, self.workers)
        return n_flops / rate + START_S

    @property
    def seed_s(self) -> float:
        return self.run_s(self.seed_flops) if self.seed_steps else 0.0

    @property
    def dense_s(self) -> float:
        return self.run_s(self.dense_flops)

    @property
    def expert_runs_s(self) -> list[float]:
        return [self.run_s(count * self.expert_flops) for count in self.group_sizes]

    @property
    def training_s(self) -> float:
        """Of the experts and the dense control together, the longest first as `branch.py` has it."""
        return makespan([self.dense_s, *self.expert_runs_s], self.slots)

    @property
    def device_hours(self) -> float:
        """Those that the runs hold."""
        return self.share * (self.seed_s + self.dense_s + sum(self.expert_runs_s)) / 3600

    @property
    def model_bytes(self) -> int:
        """Float32 weights of the seed, the control and the experts; tokenizers are small beside them."""
        return 4 * self.model.parameters * (2 + sum(self.group_sizes))

    @property
    def checkpoint_bytes(self) -> int:
        return 2 * CHECKPOINT_BYTES * self.model.parameters * min(self.slots, 1 + len(self.group_sizes))

    @property
    def parallel_dense_s(self) -> float:
        """A dense model of the same FLOPs, data-parallel on all devices, communication not counted."""
        return self.dense_flops / (self.devices.peak_flops * self.devices.utilisation * self.devices.count)

    @property
    def gradient_bytes(self) -> float:
        """What each device would send for that: a ring all-reduce of float32 gradients each step."""
        steps = self.expert_steps * sum(self.group_sizes) / self.devices.count
        return steps * all_reduce_bytes(4 * self.model.parameters, self.devices.count)


def make_plan(config: Config, devices: Devices) -> Plan:
    """The plan of a configuration on these devices.

    Raises:
        UserError: the model or tokenizer is not on this machine, or not even one expert fits the devices.
    """
    train, n_clusters = config.train, config.cluster.n_clusters
    model = model_of(config)
    per_step = train.batch_size * config.tokens.sequence_length
    seed_steps = math.ceil(config.seed_model.train_tokens / per_step)
    expert_steps = train.total_tokens // n_clusters // per_step
    per_token = flops.infer_flops_per_token(
        model.matrix_parameters, model.n_layers, model.hidden_size, config.tokens.sequence_length
    )
    expert_flops = flops.train_flops(per_token, expert_steps * per_step)
    slots = _slots(train.gpus_per_expert or train.cpus_per_expert, train.slots, devices.count)
    return Plan(
        model=model,
        per_step=per_step,
        seed_steps=seed_steps,
        expert_steps=expert_steps,
        seed_flops=flops.train_flops(per_token, seed_steps * per_step),
        expert_flops=expert_flops,
        dense_flops=n_clusters * expert_flops,
        infer_flops_per_token=per_token,
        slots=slots,
        share=train.gpus_per_expert or train.cpus_per_expert,
        workers=train.workers_per_expert,
        group_sizes=_group_sizes(n_clusters, train.experts_per_run),
        devices=devices,
        clusterer_bytes=clusterer_bytes(config),
        embedding_bytes=4 * config.corpus.sample_documents * _dimensions(config),
    )


def _slots(share: float, most: int | None, count: int) -> int:
    slots = min(int(count / share), most or count * 1000)
    if slots < 1:
        raise UserError(
            f"--gpus={count} is less than the {share:g} that one expert takes. Give more, or lower its share."
        )
    return slots


def _group_sizes(n_clusters: int, per_run: int) -> list[int]:
    return [min(per_run, n_clusters - first) for first in range(0, n_clusters, per_run)]


def makespan(durations: list[float], slots: int) -> float:
    """Time to finish runs that start in this order, each as soon as one of `slots` is free."""
    ends = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def all_reduce_bytes(n_bytes: int, workers: int) -> float:
    """What each worker sends in a ring all-reduce (Patarasuk and Yuan 2009): 2 (G - 1) / G of the data."""
    return 2 * (workers - 1) / workers * n_bytes


def clusterer_bytes(config: Config) -> int:
    """Bytes over the network while the clusters are fitted: sums go up from groups of shards, centres down to actors.

    A dual step sends up K loads, K x K overlaps and a value, a means step K x D sums, K counts and a value, all float64;
    down go K x D centres in float32 and K prices in float64. Labels (N int32) go up once. `distributed.py` says more.
    """
    n_clusters, dimensions = config.cluster.n_clusters, _dimensions(config)
    groups = min(GROUPS, math.ceil(config.corpus.sample_documents / SHARD_ROWS))
    actors = min(config.cluster.actors, groups)
    dual_steps = DUAL_STEPS if config.cluster.balanced else 0
    up = dual_steps * 8 * (n_clusters + n_clusters**2 + 1) + 8 * (n_clusters * dimensions + n_clusters + 1)
    down = (dual_steps + 1) * (4 * n_clusters * dimensions + 8 * n_clusters)
    return config.cluster.max_iter * (groups * up + actors * down) + 4 * config.corpus.sample_documents


def model_of(config: Config) -> Model:
    """Sizes of the seed model; UserError if its configuration is not on this machine."""
    name = config.seed_model.name_or_path
    if name is None:
        return _new_model(config.seed_model, _vocabulary(config))
    loaded = _read_config(name, "seed_model.name_or_path")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded)
    except ValueError as error:
        raise UserError(f"seed_model.name_or_path={name!r} is not a causal language model. Give one.") from error
    return Model(
        parameters=sum(p.numel() for p in model.parameters()),
        matrix_parameters=flops.parameters(model),
        n_layers=loaded.num_hidden_layers,
        hidden_size=loaded.hidden_size,
    )


def _read_config(name: str, field: str) -> PretrainedConfig:
    """The config.json of a Hugging Face folder, URI of one, or name in the local cache. Weights are not looked at."""
    try:
        return load_model_config(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}={name!r} must be the folder of a model, or in the local cache of Hugging Face: a plan downloads "
            f"nothing. Fetch it first: hf download {name} config.json"
        ) from error


def _dimensions(config: Config) -> int:
    """Of an embedding: what is asked for, or what the encoder has."""
    if config.embed.encoder is None:
        return config.embed.dimensions
    return int(_read_config(config.embed.encoder, "embed.encoder").hidden_size)


def _new_model(sizes: SeedModelConfig, vocabulary: int) -> Model:
    """Llama with tied embeddings: V D, then in each layer 4 D^2 of attention, 3 D I of feed-forward and two norms."""
    width, inner = sizes.hidden_size, sizes.intermediate_size
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    parameters = vocabulary * width + sizes.n_layers * layer + width
    return Model(parameters, parameters, sizes.n_layers, width)


def _vocabulary(config: Config) -> int:
    """Of a trained tokenizer, what is asked for: a corpus of few words may give less."""
    if config.tokens.tokenizer == "train":
        return config.tokens.vocab_size
    return len(load_tokenizer(config.tokens.tokenizer))
