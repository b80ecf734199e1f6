"""The routers of a merged mixture of experts, in closed form: ridge regression of the cluster on what each layer sees.

N sequences, T tokens, D hidden size, K experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from cbtm_ray.config import Config
from cbtm_ray.sparse import layers
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.spec import TrainSpec
from cbtm_ray.train.trainer import train_model

RIDGE = 1e-3
"""The regression's penalty, as a share of the states' mean variance."""


@torch.no_grad()
def fit_routers(model: PreTrainedModel, tokens_NT: torch.Tensor, targets_NTK: torch.Tensor, batch_tokens: int) -> None:
    """Set the router of every layer to the regression of the targets on the states that enter its experts, first layer first.

    So a layer's router is fitted to the states that the routers below it leave. The model's gates have no bias and the
    regression has none: the targets' mean is taken out instead.

    Args:
        targets_NTK: how much each expert is wanted for the prediction after each token.
    """
    centered_NTK = targets_NTK - targets_NTK.mean(dim=(0, 1))
    for layer in layers(model.eval()):
        gram_DD, cross_DK = _products(model, layer, tokens_NT, centered_NTK, batch_tokens)
        penalty = RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64)
        layer.mlp.gate.weight.copy_(torch.linalg.solve(gram_DD + penalty, cross_DK).T)


def _products(
    model: Any, layer: Any, tokens_NT: torch.Tensor, targets_NTK: torch.Tensor, batch_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """X'X (D, D) and X'Y (D, K) in float64, of the states X that enter the layer's experts and the targets Y."""
    n_experts = targets_NTK.shape[-1]
    size = model.config.hidden_size
    gram_DD, cross_DK = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, n_experts, dtype=torch.float64)
    states: list[torch.Tensor] = []
    hook = layer.mlp.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    try:
        batch = max(1, batch_tokens // tokens_NT.shape[1])
        for tokens, targets in zip(tokens_NT.split(batch), targets_NTK.split(batch), strict=True):
            model.model(tokens)
            states_MD = states.pop().reshape(-1, size).double()
            gram_DD += states_MD.T @ states_MD
            cross_DK += states_MD.T @ targets.reshape(-1, n_experts).double()
    finally:
        hook.remove()
    return gram_DD, cross_DK


def scale_routers(model: PreTrainedModel, scales: tuple[float, ...], loss: Callable[[], float]) -> float:
    """Multiply all routers by the scale of least loss, which decides how unlike the weights of a token's experts are."""
    gates = [layer.mlp.gate.weight.data for layer in layers(model)]
    fitted = [gate.clone() for gate in gates]

    def set_scale(scale: float) -> None:
        for gate, weight in zip(gates, fitted, strict=True):
            gate.copy_(scale * weight)

    def loss_at(scale: float) -> float:
        set_scale(scale)
        return loss()

    best = min(scales, key=loss_at)
    set_scale(best)
    return best


def train_routers(model: Any, sequences: PackedSequences, config: Config, steps: int) -> None:
    """Train the routers by the loss of the next token, all else frozen.

    One expert a token has the weight 1, whatever its router says, so two are mixed while routers train for one.
    """
    gates = [layer.mlp.gate for layer in layers(model)]
    top_k = gates[0].top_k
    for name, weight in model.named_parameters():
        weight.requires_grad_(".mlp.gate." in name)
    for gate in gates:
        gate.top_k = max(top_k, min(2, config.cluster.n_clusters))
    train = replace(config.train, learning_rate=config.export.router_learning_rate, trainable="all", weight_decay=0.0)
    spec = TrainSpec(
        name="export/moe", steps=steps, sequence_length=config.tokens.sequence_length,
        train=replace(train, checkpoint_every=steps, notice_every=steps),
    )  # fmt: skip
    train_model(model, sequences, spec, state=None, save=lambda state: None, log=lambda point: None)
    for gate in gates:
        gate.top_k = top_k
