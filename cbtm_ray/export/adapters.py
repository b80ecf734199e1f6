"""Experts as LoRA adapters of their seed: each linear layer's difference to the seed, cut to a rank.

O outputs of a linear layer, I inputs, R rank.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from cbtm_ray.errors import UserError

Factors = tuple[torch.Tensor, torch.Tensor]


def low_rank(difference_OI: torch.Tensor, rank: int) -> Factors:
    """A (R, I) and B (O, R) whose product B A is the nearest matrix of that rank, by its singular values (Eckart and Young).

    R is less than `rank` where the matrix has fewer rows or columns.
    """
    left_OR, values_R, right_RI = torch.linalg.svd(difference_OI.double(), full_matrices=False)
    roots_R = values_R[:rank].sqrt()
    return (roots_R[:, None] * right_RI[:rank]).float(), (left_OR[:, :rank] * roots_R).float()


def adapted_layers(model: PreTrainedModel, *, embeddings: bool) -> dict[str, nn.Module]:
    """The layers that adapters change, by name: linear ones but for the output projection, and the token embeddings if asked
    for, with the output projection where that is the same matrix."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module is not head) or (embeddings and module is table)
    }


def factors_of(
    expert: PreTrainedModel, seed: PreTrainedModel, rank: int, *, embeddings: bool = False
) -> dict[str, Factors]:
    """The factors of every adapted layer's difference to the seed.

    Raises:
        UserError: the model has no linear layers (GPT-2's are of another kind).
    """
    layers = adapted_layers(seed, embeddings=embeddings)
    if not any(isinstance(layer, nn.Linear) for layer in layers.values()):
        raise UserError(
            f"{type(seed).__name__} has no linear layers, so that its experts have no adapters. Export the experts themselves."
        )
    theirs = adapted_layers(expert, embeddings=embeddings)
    return {name: low_rank(_weight(theirs[name]) - _weight(layer), rank) for name, layer in layers.items()}


def cut(factors: dict[str, Factors], rank: int) -> dict[str, Factors]:
    """The factors of a lower rank: the first of each, for they are in the order of their singular values."""
    return {name: (a_RI[:rank], b_OR[:, :rank]) for name, (a_RI, b_OR) in factors.items()}


def _weight(layer: Any) -> torch.Tensor:
    found: torch.Tensor = layer.weight.detach()
    return found


def with_factors(seed: PreTrainedModel, factors: dict[str, Factors]) -> PreTrainedModel:
    """The seed with an adapter's products added to its layers, as a model of its own."""
    model = copy.deepcopy(seed)
    for name, (a_RI, b_OR) in factors.items():
        _weight(model.get_submodule(name)).add_(b_OR @ a_RI)
    return model


def dropped_share(expert: PreTrainedModel, seed: PreTrainedModel, *, embeddings: bool = False) -> float:
    """The share of the squared difference to the seed that is outside the adapted layers."""
    kept = {f"{name}.weight" for name in adapted_layers(seed, embeddings=embeddings)}
    theirs, total, outside = dict(expert.named_parameters()), 0.0, 0.0
    for name, parameter in seed.named_parameters():
        squared = float((theirs[name].detach().double() - parameter.detach().double()).square().sum())
        total += squared
        outside += squared if name not in kept else 0.0
    return outside / total if total else 0.0


def save_adapter(seed: PreTrainedModel, factors: dict[str, Factors], seed_name: str, folder: Path) -> None:
    """Write an adapter in PEFT's format, which PEFT, vLLM and others load.

    Args:
        seed: is not changed.
        seed_name: what the adapter names as its base model.
    """
    rank = max(len(a_RI) for a_RI, _ in factors.values())
    table = seed.get_input_embeddings()
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=sorted({name.rpartition(".")[2] for name in factors}),
        ensure_weight_tying=any(seed.get_submodule(name) is table for name in factors),
    )  # fmt: skip
    model: Any = get_peft_model(copy.deepcopy(seed), config)
    for name, (a_RI, b_OR) in factors.items():
        layer = model.base_model.model.get_submodule(name)
        if seed.get_submodule(name) is table:  # PEFT's embedding is its linear layer transposed
            _fill(layer.lora_embedding_A["default"], b_OR.T)
            _fill(layer.lora_embedding_B["default"], a_RI.T)
        else:
            _fill(layer.lora_A["default"].weight, a_RI)
            _fill(layer.lora_B["default"].weight, b_OR)
    model.peft_config["default"].base_model_name_or_path = seed_name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's card, which says nothing but where the seed lies


def _fill(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Set a parameter to values of a lower rank, and zeros."""
    parameter.data.zero_()
    parameter.data[: values.shape[0], : values.shape[1]] = values
