"""Floating-point operations of training and inference, by the usual count (Kaplan et al. 2020, section 2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product for every token: all but the input table, unless it is the output too."""
    total = sum(p.numel() for p in model.parameters())
    table: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    return total if table is head else total - table.numel()


def infer_flops_per_token(n_parameters: int, n_layers: int, hidden_size: int, context: int) -> float:
    """2 N for the products with weights, and 2 * 2 * n_layers * context / 2 * D for attention over a context half full."""
    return 2.0 * n_parameters + 2.0 * n_layers * context * hidden_size


def train_flops(flops_per_token: float, tokens: int) -> float:
    """The backward pass costs twice the forward one."""
    return 3.0 * flops_per_token * tokens
