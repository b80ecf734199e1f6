"""Train one language model on one cluster's documents. Knows nothing of K, of the other experts, or of Ray.

B sequences, T tokens.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from cbtm_ray.config import TrainConfig
from cbtm_ray.errors import UserError
from cbtm_ray.manifests import CurvePoint
from cbtm_ray.train import flops, parallel
from cbtm_ray.train.loss import TokenLoss
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.spec import TrainSpec, learning_rate
from cbtm_ray.train.trainable import freeze_all_but_ffn

if TYPE_CHECKING:  # a run's controller imports this file, and has no use for what it takes seconds to import
    from transformers import PreTrainedModel


class Preempted(Exception):
    """The machine will be taken away: the state was saved, and training goes on from it elsewhere."""


class Trainer:
    """A model in training: weights, optimizer, position and curve, all of which a checkpoint holds."""

    def __init__(
        self, model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec, valid: PackedSequences | None = None
    ) -> None:
        self.model, self.sequences, self.valid, self.spec = model.train(), sequences, valid, spec
        self.share = spec.train.batch_size // parallel.workers()
        self.part_size = spec.train.micro_batch_size or spec.train.batch_size
        with parallel.agreed():
            self._check()
            if spec.train.trainable == "ffn":
                freeze_all_but_ffn(model)
            border = None if spec.train.cross_documents else sequences.end_of_text
            token_loss = TokenLoss(model, self._batch(sequences, 0, 1), border=border)
            if spec.train.activation_checkpointing:
                checkpoint_activations(model)
        alone = parallel.workers() == 1
        self.token_loss = token_loss if alone else parallel.shared_loss(token_loss, spec.train.parallel)
        self.optimizer = make_optimizer(model, spec.train)
        self.train_loss = torch.compile(self.token_loss) if spec.train.compile else self.token_loss
        self.step = 0
        self._reader = ThreadPoolExecutor(1)
        self._ahead: Future[torch.Tensor] | None = None
        self.curve: list[CurvePoint] = []
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)

    def _check(self) -> None:
        """UserError if the input does not suit the model, the workers or this machine."""
        vocabulary: Any = self.model.get_input_embeddings().num_embeddings
        for tokens in (part.tokens for part in (self.sequences, self.valid) if part is not None):
            if (largest := int(tokens.max())) >= vocabulary:
                raise UserError(
                    f"{self.spec.name}: token id {largest} is not below the model's vocabulary of {vocabulary}. "
                    "Use the seed model's own tokenizer: tokens.tokenizer."
                )
        if self.spec.train.batch_size % parallel.workers():
            raise UserError(
                f"train.batch_size={self.spec.train.batch_size} must be a multiple of the {parallel.workers()} workers."
            )
        if self.spec.train.compile:
            check_compiler(self.model.device)

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`, on any number of workers. All workers must call it; worker 0 gets the state."""
        model, optimizer = parallel.state_of(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "step": self.step,
            "curve": self.curve,
            "loss_sum": parallel.mean(self.loss_sum),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parallel.load_state(self.model, self.optimizer, state["model"], state["optimizer"])
        self.step, self.curve, self.loss_sum = state["step"], state["curve"], state["loss_sum"].to(self.model.device)
        self._ahead = None

    def train_step(self) -> None:
        """One optimizer step on the batch at the present position, in parts of `micro_batch_size`."""
        # Dropout is a function of seed, step and worker too.
        torch.manual_seed((self.sequences.seed * 1_000_003 + self.step) * parallel.workers() + parallel.rank())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, self.step)
        batch = (self._ahead or self._read(self.step)).result()
        self._ahead = self._read(self.step + 1) if self.step + 1 < self.spec.steps else None
        parts = batch.split(self.part_size)
        for number, part in enumerate(parts, start=1):
            with parallel.reducing(self.token_loss, number == len(parts)):
                with self._autocast():
                    loss = self.train_loss(part).mean() * (len(part) / self.share)
                loss.backward()
            self.loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss in nats of a token of the first held-out sequences, always the same; None without such documents."""
        if self.valid is None:
            return None
        self.model.eval()
        losses = []
        for part in self._batch(self.valid, 0, self.spec.valid_sequences(self.valid)).split(self.part_size):
            with self._autocast():
                losses.append(self.token_loss(part).double())
        self.model.train()
        return parallel.mean(torch.cat(losses).mean()).item()

    def evaluation_is_due(self) -> bool:
        every = self.spec.train.evaluate_every
        return self.step == self.spec.steps or (every is not None and self.step % every == 0)

    def point_is_due(self) -> bool:
        return self.evaluation_is_due() or self.step % self.spec.train.log_every == 0

    def add_point(self, tokens_per_s: float) -> CurvePoint:
        """Close a stretch of the curve: the mean loss since the last point, and the held-out loss if it is due.

        Raises:
            UserError: the loss is not a finite number.
        """
        first = self.curve[-1]["step"] if self.curve else 0
        point: CurvePoint = {
            "step": self.step,
            "tokens": self.step * self.spec.tokens_per_step,
            "loss_nats": parallel.mean(self.loss_sum).item() / (self.step - first),
            "learning_rate": learning_rate(self.spec, self.step - 1),
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": flops.utilization(
                self.model, self.spec.sequence_length, self.spec.train.precision, tokens_per_s / parallel.workers()
            ),
        }
        if self.evaluation_is_due():
            point["valid_loss_nats"] = self.evaluate()
        for name, loss in (("loss", point["loss_nats"]), ("held-out loss", point.get("valid_loss_nats"))):
            if loss is not None and not math.isfinite(loss):
                raise self._diverged(f"the {name} is {loss}")
        self.curve.append(point)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        return point

    def check_weights(self) -> None:
        """UserError if a weight is not a finite number: such a state must not replace a sound one."""
        if not parallel.all_finite(self.model):
            raise self._diverged("a weight is not a finite number")

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{self.spec.name}: {what} at step {self.step}. Lower the learning rate "
            f"(peak {self.spec.train.learning_rate:g}) or train.clip_norm; earlier checkpoints are intact."
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.spec.train.precision == "bf16")

    def _read(self, step: int) -> Future[torch.Tensor]:
        """This worker's sequences of a step, read beside the training."""
        first = step * self.spec.train.batch_size + parallel.rank() * self.share
        return self._reader.submit(self._batch, self.sequences, first, self.share)

    def _batch(self, sequences: PackedSequences, position: int, count: int) -> torch.Tensor:
        return torch.from_numpy(sequences.batch(position, count)).to(self.model.device)


def train_model(
    model: PreTrainedModel,
    sequences: PackedSequences,
    spec: TrainSpec,
    *,
    valid: PackedSequences | None = None,
    state: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
    log: Callable[[CurvePoint], None],
    leaving: Callable[[], bool] = lambda: False,
) -> list[CurvePoint]:
    """Train `model` in place to `spec.steps`, and return its curve. Called by all workers of a process group, if there is one.

    Args:
        model: float32 weights, on the device to train on; the same on all workers.
        valid: held-out documents, for the loss on them.
        state: what `save` was given before, to go on from there to the weights of an uninterrupted run; or None.
        save: called by worker 0 with the state every `checkpoint_every` steps, and when the machine is leaving. The state
            is of the model's own tensors: what is to outlast the call must be copied in it.
        log: called by worker 0 with every new point of the curve.
        leaving: asked every `notice_every` steps whether the machine will be taken away. All workers stop if one's will.

    Returns:
        Points {step, tokens, loss_nats (mean since the point before), learning_rate, tokens_per_s, mfu (None where the
        device's peak is not known), and at some valid_loss_nats (None without held-out documents)}.

    Raises:
        Preempted: the machine is leaving; the state has been given to `save`.
        UserError: the loss or a weight is not a finite number, or the input does not suit the model.
    """
    trainer = Trainer(model, sequences, spec, valid)
    if state is not None:
        trainer.load_state_dict(state)
    timed_step, timed_at = trainer.step, time.perf_counter()
    while trainer.step < spec.steps:
        trainer.train_step()
        if trainer.point_is_due():
            speed = (trainer.step - timed_step) * spec.tokens_per_step / (time.perf_counter() - timed_at)
            point = trainer.add_point(speed)
            if parallel.rank() == 0:
                log(point)
            timed_step, timed_at = trainer.step, time.perf_counter()
        if trainer.step < spec.steps:
            _save_if_due(trainer, save, leaving)
    return trainer.curve


def _save_if_due(trainer: Trainer, save: Callable[[dict[str, Any]], None], leaving: Callable[[], bool]) -> None:
    train = trainer.spec.train
    left = trainer.step % train.notice_every == 0 and parallel.any_of(leaving(), trainer.model.device)
    if left or trainer.step % train.checkpoint_every == 0:
        trainer.check_weights()
        state = trainer.state_dict()
        if parallel.rank() == 0:
            save(state)
    if left:
        raise Preempted


def make_optimizer(model: PreTrainedModel, train: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (norms and biases) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the model compute its layers' activations again in the backward pass. UserError if it cannot."""
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.activation_checkpointing=True does not work with {type(model).__name__}, whose code has none. "
            "Set train.activation_checkpointing=false and lower train.micro_batch_size."
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def check_compiler(device: torch.device) -> None:
    """UserError on a CPU without a C++ compiler, which torch.compile needs there."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"train.compile=True needs a C++ compiler, and there is no {compiler}. Install one, or set train.compile=false."
        )
