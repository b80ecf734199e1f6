"""The mixture-of-experts control: the seed made sparse (Komatsuzaki et al. 2022), trained as one model on all documents.

Every feed-forward layer becomes E copies of itself and a fresh router that sends each token to two of them. Attention,
norms and embeddings stay shared, and so does all training: what C-BTM's experts are measured against.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model_config
from cbtm_ray.sparse import sparse_model

TOP_K = 2
BALANCE_COEF = 0.01
"""Weight of the load-balancing loss (Fedus et al. 2022, section 2.2)."""


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
    return sparse_model(seed, [seed] * n_experts, TOP_K, random_state=random_state, balance_coef=BALANCE_COEF)
