"""Squared distances against hand and scipy, and where float32 is tight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from cbtm_ray.cluster.shard_steps import squared_distances


def test_squared_distances_by_hand() -> None:
    points = torch.tensor([[0, 0], [1, 0], [0.6, 0.8]])
    centers = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 4.0]])
    expected = torch.tensor([[0, 2, 25], [1, 1, 20], [1, 0.4**2 + 0.2**2, 2.4**2 + 3.2**2]])
    torch.testing.assert_close(squared_distances(points, centers), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_is_close_to_scipy_in_float64_and_never_negative(offset: float) -> None:
    points = (np.random.default_rng(0).normal(size=(500, 100)) + offset).astype(np.float32)
    ours = squared_distances(torch.from_numpy(points), torch.from_numpy(points[:9])).numpy()
    assert ours.min() >= 0
    np.testing.assert_allclose(
        ours, cdist(points.astype(float), points[:9].astype(float), "sqeuclidean"), rtol=1e-5, atol=2e-3
    )
