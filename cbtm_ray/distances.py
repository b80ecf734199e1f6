"""The one distance of the method, from embeddings to cluster centres: for clustering, assigning and routing alike.

N embeddings, K centres, D dimensions.
"""

from __future__ import annotations

from torch import Tensor


def squared_distances(points_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """(N, K) squared Euclidean distances, by one matrix product.

    Both are shifted to the centres' mean first: in float32 |x|^2 - 2xc + |c|^2 loses what a common offset outweighs.
    """
    origin = centres_KD.mean(0)
    x, c = points_ND - origin, centres_KD - origin
    norms = (c * c).sum(1)[None] + (x * x).sum(1)[:, None]
    return norms.addmm_(x, c.T, alpha=-2).clamp_(min=0)
