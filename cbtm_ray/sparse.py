"""Sparse models whose experts are the feed-forward layers of dense ones: Mixtral of Llama and Mistral, Qwen3-MoE of Qwen3.

E experts, D hidden size, I inner size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

_DROPPED = {"model_type", "architectures", "transformers_version", "attention_bias", "mlp_bias", "pretraining_tp"}
_QWEN_DROPPED = {"model_type", "architectures", "transformers_version", "layer_types", "max_window_layers"}


def why_not_sparse(config: Any) -> str | None:
    """Why no sparse model can be made of a dense one, or None if one can."""
    if config.model_type not in ("llama", "mistral", "qwen3"):
        return f"its architecture is {config.model_type!r}, not llama, mistral or qwen3"
    if config.model_type == "qwen3":
        return "it has sliding windows" if config.use_sliding_window else None
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return "its layers have biases, and Mixtral's have none" if biased else None


def sparse_config(dense: PretrainedConfig, n_experts: int, top_k: int, balance_coef: float = 0.0) -> PretrainedConfig:
    """The configuration of the sparse model, whose top-k weights of a token sum to 1."""
    values = dense.to_dict()
    sizes: dict[str, Any] = {"num_experts_per_tok": top_k, "router_aux_loss_coef": balance_coef}
    if dense.model_type == "qwen3":
        kept = {name: value for name, value in values.items() if name not in _QWEN_DROPPED}
        inner = values["intermediate_size"]
        return Qwen3MoeConfig(
            **kept, **sizes, num_experts=n_experts, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
            moe_intermediate_size=inner,
        )  # fmt: skip
    kept = {name: value for name, value in values.items() if name not in _DROPPED}
    return MixtralConfig(**kept, **sizes, num_local_experts=n_experts)


def sparse_model(
    shared: PreTrainedModel, experts: list[PreTrainedModel], top_k: int, *, random_state: int, balance_coef: float = 0.0
) -> PreTrainedModel:
    """A sparse model with all but the feed-forward layers of `shared`, and those of each expert.

    Args:
        shared: `why_not_sparse` is None of its configuration, and each expert's is the same.
        experts: E dense models.
        random_state: of the routers' weights, the only new ones.
    """
    config = sparse_config(shared.config, len(experts), top_k, balance_coef)
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kept = {name: tensor for name, tensor in shared.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected, "the sparse architecture names what it shares with the dense one as that does"
    assert all(".mlp." in name for name in missing), "all but routers and experts is shared"
    for e, expert in enumerate(experts):
        for sparse, dense in zip(layers(model), layers(expert), strict=True):
            gate_up_2ID = torch.cat([dense.mlp.gate_proj.weight, dense.mlp.up_proj.weight])
            sparse.mlp.experts.gate_up_proj.data[e].copy_(gate_up_2ID)
            sparse.mlp.experts.down_proj.data[e].copy_(dense.mlp.down_proj.weight)
    return model


def layers(model: Any) -> Any:
    """The decoder layers of a model of these architectures."""
    return model.model.layers
