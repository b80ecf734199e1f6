"""Floating-point operations of training and inference, by the usual count (Kaplan et al. 2020, section 2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def matmul_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in a matrix product for every token: all but the input table, unless it is the output too.

    Of a mixture of experts those of as many experts as a token is sent to.
    """
    config: Any = model.config
    n_experts = getattr(config, "num_local_experts", 1)
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = in_experts - in_experts * getattr(config, "num_experts_per_tok", 1) // n_experts
    total = sum(p.numel() for p in model.parameters()) - idle
    table: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    return total if table is head else total - table.numel()


def infer_flops_per_token(n_parameters: int, n_layers: int, hidden_size: int, context: int) -> float:
    """2 N for the products with weights, and 2 * 2 * n_layers * context / 2 * D for attention over a context half full."""
    return 2.0 * n_parameters + 2.0 * n_layers * context * hidden_size


def model_flops_per_token(model: PreTrainedModel, context: int) -> float:
    """`infer_flops_per_token` with the model's own sizes."""
    config: Any = model.config
    return infer_flops_per_token(matmul_parameters(model), config.num_hidden_layers, config.hidden_size, context)


def train_flops(flops_per_token: float, tokens: int) -> float:
    """The backward pass costs twice the forward one."""
    return 3.0 * flops_per_token * tokens


PEAK_TFLOPS: dict[tuple[str, ...], dict[str, float]] = {
    ("B200",): {"bf16": 2250},  # NVIDIA HGX B200 data sheet, an eighth of the board, half of the figure with sparsity
    ("H200",): {"bf16": 989, "fp32": 67},  # NVIDIA H200 data sheet, SXM
    ("H100", "PCIe"): {"bf16": 756, "fp32": 51},  # NVIDIA H100 data sheet
    ("H100", "NVL"): {"bf16": 835, "fp32": 60},  # NVIDIA H100 data sheet
    ("H100",): {"bf16": 989, "fp32": 67},  # NVIDIA H100 data sheet, SXM
    ("A100",): {"bf16": 312, "fp32": 19.5},  # NVIDIA A100 data sheet
    ("L40S",): {"bf16": 362, "fp32": 91.6},  # NVIDIA L40S data sheet
    ("L4",): {"bf16": 121, "fp32": 30.3},  # NVIDIA L4 data sheet, half of the figure with sparsity
    ("A10",): {"bf16": 125, "fp32": 31.2},  # NVIDIA A10 data sheet
    ("T4",): {"fp32": 8.1},  # NVIDIA T4 data sheet; no bf16
}
"""Words of a GPU's name -> dense TFLOP/s by precision, the more specific first; fp32 is that without TF32, torch's default."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Most operations a second of a GPU by its name, as torch.cuda.get_device_name gives it; None if not known."""
    words = set(device_name.replace("-", " ").split())
    if "MIG" in words:  # a slice of the GPU
        return None
    for name, tflops in PEAK_TFLOPS.items():
        if words.issuperset(name):
            return tflops[precision] * 1e12 if precision in tflops else None
    return None


def utilization(model: PreTrainedModel, context: int, precision: str, tokens_per_s: float) -> float | None:
    """Share of its device's peak that training at this speed makes use of; None where the peak is not known, as on CPUs."""
    if model.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(model.device), precision)
    used = train_flops(model_flops_per_token(model, context), 1) * tokens_per_s
    return None if peak is None else round(used / peak, 4)
