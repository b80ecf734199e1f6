"""TrainSpec: what one training run is, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cbtm_ray.config import TrainConfig
from cbtm_ray.train.packed_sequences import PackedSequences


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One training run: the seed's, an expert's or a control's."""

    name: str
    """Folder in the run directory, and the name in logs."""
    steps: int
    """Optimizer steps."""
    sequence_length: int
    """Tokens in a sequence."""
    train: TrainConfig
    """How to train; the seed's has the learning rates of `seed_model`."""

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.sequence_length

    def valid_sequences(self, valid: PackedSequences) -> int:
        """How many of the held-out sequences are read."""
        return min(valid.per_epoch, self.train.evaluate_sequences)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Learning rate of a step counted from 0: linear warm-up from above 0 to the peak, then decay to the final share."""
    train = spec.train
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(spec.steps - train.warmup_steps, 1)
    shape = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.learning_rate * (train.final_lr_fraction + (1 - train.final_lr_fraction) * shape)
