"""The output mixture of the experts: p(y | x) = sum_j w_j(x) p_j(y | x), in probability space (paper section 2)."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp


def mix_logprobs(logprobs_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """Log-probability of the mixture.

    Args:
        logprobs_TK: each expert's log-probability, in nats; experts on the last axis.
        weights_TK: of the same shape; rows sum to 1. An expert of weight 0 takes no part.

    Returns:
        The mixture's log-probability, one axis less.
    """
    with np.errstate(divide="ignore"):
        return logsumexp(logprobs_TK + np.log(weights_TK), axis=-1)
