"""Which weights of a model are trained: all, or those of its feed-forward layers alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cbtm_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FFN = re.compile(r"\.(mlp|feed_forward|fc1|fc2)\.")
"""In a weight's name: of a feed-forward layer. fc1 and fc2 are OPT's; most other architectures of transformers say mlp."""


def freeze_all_but_ffn(model: PreTrainedModel) -> None:
    """Train the feed-forward layers only: attention, embeddings and norms stay as they are.

    Raises:
        UserError: the model has no weights whose names say that they are of feed-forward layers.
    """
    if not any(FFN.search(name) for name, _ in model.named_parameters()):
        raise UserError(
            f"train.trainable='ffn' needs feed-forward layers, and {type(model).__name__} names none mlp, feed_forward, fc1 "
            "or fc2. Set train.trainable=all, or take another seed_model.name_or_path."
        )
    for name, weight in model.named_parameters():
        weight.requires_grad_(FFN.search(name) is not None)
