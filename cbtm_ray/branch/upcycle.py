"""The mixture-of-experts control: the seed made sparse (Komatsuzaki et al. 2022), trained as one model on all documents.

Every feed-forward layer becomes E copies of itself and a fresh router that sends each token to two of them. Attention,
norms and embeddings stay shared, and so does all training: what C-BTM's experts are measured against.

E experts, D hidden size, I inner size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model_config

TOP_K = 2
BALANCE_COEF = 0.01
"""Weight of the load-balancing loss (Fedus et al. 2022, section 2.2)."""

_NOT_MIXTRAL = {"model_type", "architectures", "transformers_version", "attention_bias", "mlp_bias", "pretraining_tp"}


def check_upcyclable(model: PreTrainedModel | str) -> None:
    """UserError unless Mixtral's layers can be those of a model, or of the one in a folder or of a Hugging Face name."""
    config: Any = load_model_config(model) if isinstance(model, str) else model.config
    reason = None
    if config.model_type != "llama":
        reason = f"its architecture is {config.model_type!r}"
    elif config.attention_bias or config.mlp_bias:
        reason = "its layers have biases"
    if reason:
        raise UserError(
            f"train.controls has 'moe', but the seed model cannot be upcycled: {reason}, and only Llama's without biases "
            "becomes a Mixtral. Leave 'moe' out, or take another seed_model.name_or_path."
        )


def upcycle(seed: PreTrainedModel, n_experts: int, random_state: int) -> PreTrainedModel:
    """A Mixtral whose E experts are the seed's feed-forward layers each, so that it computes what the seed does.

    The two weights of a token sum to 1, and its experts are alike until they are trained.

    Args:
        n_experts: E, at least `TOP_K`.
        random_state: of the routers' weights, the only new ones.

    Raises:
        UserError: the seed is of another architecture than Llama's.
    """
    check_upcyclable(seed)
    kept = {name: value for name, value in seed.config.to_dict().items() if name not in _NOT_MIXTRAL}
    config = MixtralConfig(
        **kept,
        num_local_experts=n_experts,
        num_experts_per_tok=TOP_K,
        router_aux_loss_coef=BALANCE_COEF,
    )
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(_without_mlp(seed), strict=False)
    assert not unexpected, "Mixtral names what it shares with Llama as Llama does"
    assert all(".mlp." in name for name in missing), "all but routers and experts is the seed's"
    for sparse, dense in zip(_layers(model), _layers(seed), strict=True):
        gate_up_2ID = torch.cat([dense.mlp.gate_proj.weight, dense.mlp.up_proj.weight])
        sparse.mlp.experts.gate_up_proj.data.copy_(gate_up_2ID)
        sparse.mlp.experts.down_proj.data.copy_(dense.mlp.down_proj.weight)
    return model


def _without_mlp(seed: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in seed.state_dict().items() if ".mlp." not in name}


def _layers(model: Any) -> Any:
    return model.model.layers
