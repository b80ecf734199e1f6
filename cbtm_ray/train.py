"""Train one language model on one cluster's documents. Knows nothing of K, of the other experts, or of Ray.

B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:  # a run's controller imports this file, and has no use for what they take seconds to import
    from transformers import PreTrainedModel

    from cbtm_ray.tokens import PackedSequences

_LOSS_CHUNK = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
"""Rows of logits alive at once: 512 of a 2,048 vocabulary stay in a core's cache, 2.5 times as fast as all at once."""

_LOGIT_CHANGES = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""What configurations call a change of the logits after the projection (Cohere, Granite, Gemma), 1 and None being none."""


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How long and how to train; one for each expert, the seed and every control."""

    name: str
    """Folder in the run directory, and the name in logs."""
    steps: int
    """Optimiser steps."""
    batch_size: int
    """Sequences a step."""
    sequence_length: int
    """Tokens a sequence."""
    learning_rate: float
    """Peak learning rate."""
    final_lr_fraction: float
    """Learning rate after the last step, as a share of the peak."""
    schedule: str
    """'linear' or 'cosine' decay after the warm-up."""
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    precision: str
    """'fp32' or 'bf16' arithmetic; weights and optimiser are float32 either way."""
    log_every: int
    """Steps between points of the curve."""
    checkpoint_every: int
    """Steps between checkpoints."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Learning rate of a step counted from 0: linear warm-up from above 0 to the peak, then decay to the final share."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(spec.steps - spec.warmup_steps, 1)
    shape = 1 - progress if spec.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return spec.learning_rate * (spec.final_lr_fraction + (1 - spec.final_lr_fraction) * shape)


class Trainer:
    """A model in training: weights, optimiser, position and curve, all of which a checkpoint holds."""

    def __init__(self, model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec) -> None:
        vocabulary: Any = model.get_input_embeddings().num_embeddings
        if (largest := int(sequences.tokens.max())) >= vocabulary:
            raise ValueError(
                f"{spec.name}: token id {largest} is not below the model's vocabulary of {vocabulary}. "
                "Use the seed model's own tokenizer: tokens.tokenizer."
            )
        self.model, self.sequences, self.spec = model.train(), sequences, spec
        self.optimizer = make_optimizer(model, spec)
        self.token_loss = loss_function(model, self._batch(0, 1))
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "curve": self.curve,
            "loss_sum": self.loss_sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve, self.loss_sum = state["step"], state["curve"], state["loss_sum"].to(self.model.device)

    def train_step(self) -> None:
        """One optimiser step on the batch at the present position."""
        torch.manual_seed(self.sequences.seed * 1_000_003 + self.step)  # dropout is a function of seed and step too
        batch = self._batch(self.step * self.spec.batch_size, self.spec.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, self.step)
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=self.spec.precision == "bf16"):
            loss = self.token_loss(batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach()
        self.step += 1

    def add_point(self, tokens_per_s: float) -> dict[str, Any]:
        """Close a stretch of the curve: the mean loss since the last point.

        Raises:
            ValueError: the loss is not a finite number.
        """
        first = self.curve[-1]["step"] if self.curve else 0
        point = {
            "step": self.step,
            "tokens": self.step * self.spec.tokens_per_step,
            "loss_nats": self.loss_sum.item() / (self.step - first),
            "learning_rate": learning_rate(self.spec, self.step - 1),
            "tokens_per_s": round(tokens_per_s, 1),
        }
        if not math.isfinite(point["loss_nats"]):
            raise self._diverged(f"the loss is {point['loss_nats']}")
        self.curve.append(point)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        return point

    def check_weights(self) -> None:
        """ValueError if a weight is not a finite number: such a state must not replace a sound one."""
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise self._diverged("a weight is not a finite number")

    def _diverged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.spec.name}: {what} at step {self.step}. Lower the learning rate "
            f"(peak {self.spec.learning_rate:g}) or train.clip_norm; earlier checkpoints are intact."
        )

    def _batch(self, position: int, batch_size: int) -> torch.Tensor:
        return torch.from_numpy(self.sequences.batch(position, batch_size)).to(self.model.device)


def train_model(
    model: PreTrainedModel,
    sequences: PackedSequences,
    spec: TrainSpec,
    *,
    state: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    log: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Train `model` in place to `spec.steps`, and return its curve.

    Args:
        model: float32 weights, on the device to train on.
        state: what `save` was given before, to go on from there to the weights of an uninterrupted run; or None.
        save: called with the state every `checkpoint_every` steps.
        log: called with every new point of the curve.

    Returns:
        Points {step, tokens, loss_nats (mean since the point before), learning_rate, tokens_per_s}.
    """
    if spec.steps == 0:
        return []
    trainer = Trainer(model, sequences, spec)
    if state is not None:
        trainer.load_state_dict(state)
    timed_step, timed_at = trainer.step, time.perf_counter()
    while trainer.step < spec.steps:
        trainer.train_step()
        last = trainer.step == spec.steps
        if last or trainer.step % spec.log_every == 0:
            now = time.perf_counter()
            log(trainer.add_point((trainer.step - timed_step) * spec.tokens_per_step / (now - timed_at)))
            timed_step, timed_at = trainer.step, now
        if not last and trainer.step % spec.checkpoint_every == 0:
            trainer.check_weights()
            save(trainer.state_dict())
    return trainer.curve


def make_optimizer(model: PreTrainedModel, spec: TrainSpec) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (norms and biases) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, fused=True)


def loss_function(model: PreTrainedModel, example: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of a batch (B, T + 1) to the loss of each target in nats, (B * T,).

    Chunked over the vocabulary projection where that gives the model's own logits on the example; models that scale or
    cap their logits get the plain path.
    """

    def plain(batch: torch.Tensor) -> torch.Tensor:
        logits_BTV = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")

    def chunked(batch: torch.Tensor) -> torch.Tensor:
        hidden_BTD = model.base_model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        return F.linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            head.weight,
            batch[:, 1:].flatten(),
            linear_bias=head.bias,
            reduction="none",
            options=_LOSS_CHUNK,
        )

    if any(getattr(model.config, name, None) not in (None, 1) for name in _LOGIT_CHANGES):
        return plain
    was_training = model.training
    model.eval()
    with torch.no_grad():
        same = torch.allclose(plain(example), chunked(example), atol=1e-3, rtol=1e-3)
    model.train(was_training)
    return chunked if same else plain
