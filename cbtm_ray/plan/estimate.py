"""The plan of a run before it starts: tokens, FLOPs, hours, cost, bytes. Every formula stands here with its source.

    K experts, P parameters, D embedding dimensions, G workers or devices

Training FLOPs are counted as the runs count their own (`flops.py`), so that a plan and a manifest can be compared.
Nothing here starts Ray, needs a network or looks at weights.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from cbtm_ray.config import PARTITION_CONTROLS, Config
from cbtm_ray.errors import UserError
from cbtm_ray.plan.sizes import clusterer_bytes, dimensions, seed_model, upcycled
from cbtm_ray.train import flops

PEAK_TFLOPS = {"-".join(words).lower(): peaks for words, peaks in flops.PEAK_TFLOPS.items()}
"""Peak of one GPU in 1e12 FLOPs a second by precision, dense, under the names that the command line takes."""

START_S = 15.0
"""Seconds that Ray Train takes to start and end a run: 10 to 20 where this was measured, on 2 busy CPU cores."""
COMPILE_S = 60.0
"""Seconds that `train.compile` adds to the start of a run: the minute of its documentation."""
STATE_BYTES = 16
"""Bytes a parameter while training: float32 weight, gradient and two AdamW moments. Activations come on top."""
CHECKPOINT_BYTES = 12
"""Bytes a parameter in a checkpoint: all of that but the gradient. The last two of a training are kept."""
SHARD_BYTES_PER_TOKEN = 1.3
"""Bytes of the token shards for each token, compressed, with document ids: 5.4 MB for the quickstart's 4.2 million tokens."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of the run."""

    name: str
    count: int
    peak_flops: float
    """FLOPs a second of one device."""
    utilization: float
    """Share of the peak that training reaches."""
    price_per_hour: float
    """Price of one device for an hour, in any currency."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training of one model: the seed, an expert or a control."""

    parameters: int
    infer_flops: float
    """For a token."""
    steps: int
    tokens: int
    flops: float
    """As the manifest counts them."""
    device_flops: float
    """As the devices compute them: recomputed activations and losses on held-out documents too."""


TrainRun = list[Training]
"""The models that one Ray Train run trains, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The trainings of a configuration on these devices. Figures that a formula derives from them are properties."""

    config: Config
    devices: Devices
    seed: Training
    expert: Training
    """One with an equal share of the tokens."""
    dense: Training
    """The dense control: as many tokens as all experts together."""
    moe: Training | None
    """The mixture of experts among the controls."""
    expert_runs: list[TrainRun]
    """Only the experts of `train.clusters`, if it is set."""
    skewed_runs: list[TrainRun]
    """The same if one cluster had nearly all tokens: the bound of `train.budget=by_size` before the corpus is clustered."""
    control_runs: list[TrainRun]
    slots: int
    """Runs in training at once."""
    clusterer_bytes: int
    """Network bytes of fitting the clusters, all iterations."""
    embedding_bytes: int
    """The embeddings that stay where they are meanwhile."""

    @property
    def share(self) -> float:
        """Devices that one run holds."""
        return self.config.train.gpus_per_expert or self.config.train.cpus_per_expert

    @property
    def compute_devices(self) -> float:
        """Devices that one run computes on: a worker uses one GPU, or all CPUs of its share."""
        train = self.config.train
        return min(self.share, train.workers_per_expert) if train.gpus_per_expert else self.share

    @property
    def first_runs(self) -> list[TrainRun]:
        """Runs that are started together, the longest first. `train.clusters` leaves the dense control for later."""
        return self.expert_runs if self.config.train.clusters else [[self.dense], *self.expert_runs]

    @property
    def trainings(self) -> list[Training]:
        return [self.seed, *itertools.chain(*self.first_runs, *self.control_runs)]

    def run_s(self, run: TrainRun) -> float:
        """Seconds of a run; a device that two runs share is half as fast for each."""
        rate = self.devices.peak_flops * self.devices.utilization * self.compute_devices
        start_s = START_S + COMPILE_S * self.config.train.compile
        return sum(training.device_flops for training in run) / rate + start_s

    def runs_s(self, runs: list[TrainRun]) -> float:
        """Seconds of many runs on the slots."""
        return makespan([self.run_s(run) for run in runs], self.slots)

    @property
    def seed_s(self) -> float:
        return self.run_s([self.seed]) if self.seed.steps else 0.0

    @property
    def device_hours(self) -> float:
        """Device-hours that the Ray Train runs occupy."""
        return self.share * (self.seed_s + sum(map(self.run_s, self.first_runs + self.control_runs))) / 3600

    def state_bytes(self, training: Training) -> float:
        """Bytes of training state on a GPU, for all trainings that share it; on CPUs, in a worker."""
        train = self.config.train
        beside = max(1, int(1 / train.gpus_per_expert)) if train.gpus_per_expert else 1
        parts = train.workers_per_expert if train.parallel == "fsdp" else 1
        return STATE_BYTES * training.parameters * min(beside, self.slots) / parts

    @property
    def model_bytes(self) -> int:
        """Float32 weights of all models; tokenizers are small beside them."""
        return 4 * sum(training.parameters for training in self.trainings)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints of the largest models that are trained at once. Controls are trained after the experts."""
        together = (
            sorted((run[0].parameters for run in runs), reverse=True) for runs in (self.first_runs, self.control_runs)
        )
        return 2 * CHECKPOINT_BYTES * max(sum(parameters[: self.slots]) for parameters in together)

    @property
    def written_bytes(self) -> int:
        """All checkpoints that are ever written; there is none at the last step."""
        every = self.config.train.checkpoint_every
        return CHECKPOINT_BYTES * sum(t.parameters * (max(t.steps - 1, 0) // every) for t in self.trainings)

    def worker_bytes(self, training: Training) -> float:
        """Bytes that each worker of a training sends to the others, at most.

        DDP: a ring all-reduce of float32 gradients each step. FSDP2, for each part of the batch: float32 weights gathered
        for the forward pass and for the backward pass, and gradients scattered, each (G - 1) / G of their bytes.
        """
        train = self.config.train
        reduced = training.steps * all_reduce_bytes(4 * training.parameters, train.workers_per_expert)
        share = train.batch_size // train.workers_per_expert
        parts = math.ceil(share / (train.micro_batch_size or share))
        return 1.5 * parts * reduced if train.parallel == "fsdp" else reduced

    @property
    def parallel_dense_s(self) -> float:
        """A dense model of the same FLOPs, data-parallel on all devices, communication not counted."""
        return self.dense.device_flops / (self.devices.peak_flops * self.devices.utilization * self.devices.count)

    @property
    def gradient_bytes(self) -> float:
        """Bytes that each device would send for it: a ring all-reduce of float32 gradients each step."""
        steps = self.dense.steps / self.devices.count
        return steps * all_reduce_bytes(4 * self.dense.parameters, self.devices.count)


def make_plan(config: Config, devices: Devices) -> Plan:
    """The plan of a configuration on these devices.

    Raises:
        UserError: the model or tokenizer is not on this machine, the model cannot become a mixture of experts that is
            asked for, or not even one expert fits the devices.
    """
    train, n_clusters = config.train, config.cluster.n_clusters
    per_step = train.batch_size * config.tokens.sequence_length
    steps = train.total_tokens // n_clusters // per_step
    model = seed_model(config)
    training = partial(_training, config, model)
    n_experts = n_clusters if train.clusters is None else len(set(train.clusters))
    skewed = [training(n_clusters * steps - (n_clusters - 1))] + [training(1)] * (n_experts - 1)
    moe = _training(config, upcycled(model, n_clusters), n_clusters * steps) if "moe" in train.controls else None
    n_control_experts = n_clusters * len(set(train.controls) & set(PARTITION_CONTROLS))
    in_runs = partial(_in_runs, per_run=train.experts_per_run)
    controls: list[TrainRun] = [[moe]] if moe else []
    controls += in_runs([training(steps, held_out=False)] * n_control_experts)
    return Plan(
        config=config,
        devices=devices,
        seed=training(math.ceil(config.seed_model.train_tokens / per_step)),
        expert=training(steps),
        dense=training(n_clusters * steps),
        moe=moe,
        expert_runs=in_runs([training(steps)] * n_experts),
        skewed_runs=in_runs(skewed),
        control_runs=[] if train.clusters else controls,
        slots=_slots(train.gpus_per_expert or train.cpus_per_expert, train.slots, devices.count),
        clusterer_bytes=clusterer_bytes(config),
        embedding_bytes=4 * config.corpus.sample_documents * dimensions(config),
    )


def _training(config: Config, model: PreTrainedModel, steps: int, held_out: bool = True) -> Training:
    """A training of `steps` steps. `held_out` adds the held-out losses; experts of controls have none."""
    train, context = config.train, config.tokens.sequence_length
    per_token, tokens = flops.model_flops_per_token(model, context), steps * train.batch_size * context
    counted = flops.train_flops(per_token, tokens)
    recomputed = counted / 3 if train.activation_checkpointing else 0  # the forward pass once more
    losses = math.ceil(steps / (train.evaluate_every or max(steps, 1))) if held_out else 0
    scored_tokens = losses * train.evaluate_sequences * context * train.workers_per_expert  # all, by every worker
    return Training(
        parameters=sum(p.numel() for p in model.parameters()),
        infer_flops=per_token,
        steps=steps,
        tokens=tokens,
        flops=counted,
        device_flops=counted + recomputed + per_token * scored_tokens,
    )


def _in_runs(trainings: list[Training], per_run: int) -> list[TrainRun]:
    return [trainings[first : first + per_run] for first in range(0, len(trainings), per_run)]


def _slots(share: float, most: int | None, count: int) -> int:
    slots = min(int(count / share), most or count * 1000)
    if slots < 1:
        raise UserError(
            f"--gpus={count} is less than the {share:g} that one expert takes. Give more, or lower its share."
        )
    return slots


def makespan(durations: list[float], slots: int) -> float:
    """Time to finish runs that start in this order, each as soon as one of `slots` is free."""
    ends = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)


def all_reduce_bytes(n_bytes: int, workers: int) -> float:
    """Bytes that each worker sends in a ring all-reduce (Patarasuk and Yuan 2009): 2 (G - 1) / G of the data."""
    return 2 * (workers - 1) / workers * n_bytes
