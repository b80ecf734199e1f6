"""Merging experts: their outputs mixed (the paper's ensemble, section 2), or their parameters averaged into one model.

T tokens, K experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cbtm_ray.errors import UserError
from cbtm_ray.models import load_model

NOT_ARCHITECTURE = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""Fields of a model's configuration that say where it is from or how it is run, not what it computes."""


def mix_logprobs(logprobs_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """Log-probability of the mixture p(y | x) = sum_j w_j(x) p_j(y | x), which is one of probabilities, not of logits.

    Args:
        logprobs_TK: each expert's log-probability, in nats; experts on the last axis.
        weights_TK: of the same shape; rows sum to 1. An expert of weight 0 takes no part.

    Returns:
        The mixture's log-probability, one axis less.
    """
    with np.errstate(divide="ignore"):
        joint_TK = logprobs_TK + np.log(weights_TK)
    return torch.logsumexp(torch.from_numpy(joint_TK), dim=-1).numpy()  # a quarter of SciPy's time, for every token


def average_weights(models: Sequence[PreTrainedModel | str], weights_K: np.ndarray | None = None) -> PreTrainedModel:
    """One model whose every parameter is the weighted mean of the experts' (BTM's and the paper's parameter average).

    Experts can be averaged because they branched from one seed. Sums are float64; one expert at a time is in memory
    where folders are given.

    Args:
        models: models, which stay as they are, or Hugging Face folders, URIs or names.
        weights_K: non-negative and of sum 1, one for each model. None: all alike.

    Raises:
        UserError: the weights are not such, or a model differs from the first in architecture or shapes.
    """
    weights_K = (
        np.full(len(models), 1 / max(len(models), 1)) if weights_K is None else np.asarray(weights_K, np.float64)
    )
    _check_weights(weights_K, len(models))
    average = load_model(models[0]) if isinstance(models[0], str) else copy.deepcopy(models[0])
    sums: dict[str, torch.Tensor] = {}
    for index, (given, weight) in enumerate(zip(models, weights_K.tolist(), strict=True)):
        model = given if isinstance(given, PreTrainedModel) else average if index == 0 else load_model(given)
        _check_alike(average, model, index)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                part = tensor.detach().to("cpu", torch.float64) * weight
                sums[name] = sums[name].add_(part) if name in sums else part
    average.load_state_dict(sums, strict=False)
    return average


def _check_weights(weights_K: np.ndarray, n_models: int) -> None:
    if not n_models or weights_K.shape != (n_models,):
        raise UserError(
            f"weights_K has {weights_K.size} weights for {n_models} models. Give at least one model, one each."
        )
    if not (weights_K >= 0).all() or abs(weights_K.sum() - 1) > 1e-6:
        raise UserError(
            f"weights_K={weights_K.tolist()} must be non-negative and sum to 1, not {weights_K.sum():g}. "
            "Divide them by their sum."
        )


def _check_alike(first: PreTrainedModel, model: PreTrainedModel, index: int) -> None:
    if type(first) is type(model):
        ours, theirs = _identity(first), _identity(model)
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    else:
        differing = [f"architecture, {type(model).__name__} and {type(first).__name__}"]
    if differing:
        raise UserError(
            f"models[{index}] differs from models[0] in {', '.join(differing[:3])}: only experts of one seed can be "
            "averaged. Leave it out."
        )


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    """The properties that must be equal: the configuration, and the shape of every tensor by name."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_ARCHITECTURE}
    return config | {f"shape of {name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
