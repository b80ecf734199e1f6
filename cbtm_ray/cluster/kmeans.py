"""Balanced k-means as a scikit-learn estimator (paper section 3.2: equal clusters while fitting).

    N documents, D embedding dims, K clusters

`lloyd.py` has the iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from cbtm_ray.cluster.balanced_assignment import HOTTEST, WARM, assign
from cbtm_ray.cluster.lloyd import LloydState, RandomState, check_documents, lloyd, start_centers
from cbtm_ray.cluster.scale import ScaledShards, rescaling
from cbtm_ray.cluster.shard_steps import LocalShards, Shards, cut, distances_step, labels_step
from cbtm_ray.errors import UserError

FARTHEST = 1e16  # the largest number in an embedding to predict, in units of the centers: float32 holds its square
SMALLEST = float(np.finfo(np.float32).tiny)


class BalancedKMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """k-means with equal cluster sizes while fitting, a scikit-learn estimator.

    Parameters as in `sklearn.cluster.KMeans`, but `random_state` may be a numpy Generator too, and `n_init` starts are one
    by default; `balanced=False` is plain k-means. It computes in float32, whatever the size of the embeddings. After `fit`:

    cluster_centers_ : ndarray (K, D) float32
    labels_ : ndarray (N,) int32, with sizes that differ by at most 1 if balanced
    inertia_ : sum of the squared distances to the centers of `labels_`
    n_iter_ : Lloyd iterations
    gap_ : relative gap of `labels_` to the dual lower bound at these centers; 0.0 if not balanced
    imbalance_ : max_j |K load_j - 1| of the soft loads behind the last means; NaN if not balanced
    n_features_in_ : D
    feature_names_in_ : names of the columns, if X has names

    `fit_predict` gives `labels_`; `predict` is not balanced and may differ from them.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        balanced: bool = True,
        n_init: int = 1,
        max_iter: int = 50,
        tol: float = 1e-4,
        random_state: RandomState = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.balanced = balanced
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> Self:
        """Fit to embeddings (N, D) of any real type: the best by `inertia_` of `n_init` starts.

        `sample_weight` may only be the same for all documents: weights cannot, in general, be cut into equal parts.

        Raises UserError if N < K, a parameter is out of bounds, weights differ, or float32 cannot hold X; and ValueError or
        TypeError as scikit-learn does where X is no dense table.
        """
        self._check_parameters()
        points = self._points(X, reset=True)
        if sample_weight is not None:
            _check_equal(_check_sample_weight(sample_weight, points))
        shards, rng = LocalShards(cut(points)), np.random.default_rng(self.random_state)
        starts = (list(self.iterations(shards, random_state=rng))[-1] for _ in range(self.n_init))
        fits = (dict(vars(self.finish(shards, state))) for state in starts)
        self.__dict__.update(min(fits, key=lambda fit: fit["inertia_"]))
        return self

    def iterations(
        self, shards: Shards, state: LloydState | None = None, random_state: RandomState = None
    ) -> Iterator[LloydState]:
        """The start, then the state after each Lloyd iteration; goes on from `state` if given.

        `random_state` stands in for that of the estimator.
        """
        counts, variance, factor = check_documents(shards, self.n_clusters)
        scaled = ScaledShards(shards, factor)
        if state is None:
            chosen = self.random_state if random_state is None else random_state
            centers = start_centers(scaled, counts, self.n_clusters, chosen)
            prices = torch.zeros(self.n_clusters, dtype=torch.double)
            state = LloydState(0, centers, prices, math.inf, math.inf, math.nan)
        else:
            state = state.times(factor)
        yield state.times(1 / factor)
        tolerance = self.tol * variance * factor**2
        for after in lloyd(scaled, state, balanced=self.balanced, max_iter=self.max_iter, tolerance=tolerance):
            yield after.times(1 / factor)

    def finish(self, shards: Shards, state: LloydState) -> Self:
        """Label the documents by the final centers and set the learned attributes."""
        *_, factor = check_documents(shards, self.n_clusters)
        scaled, at = ScaledShards(shards, factor), state.times(factor)
        if self.balanced:
            best = assign(scaled, at.centers, at.prices, WARM if state.iteration else HOTTEST)
            labels, cost, self.gap_ = best.labels, best.cost * len(best.labels), best.gap
        else:
            labels, cost = _nearest(scaled, at.centers)
            self.gap_ = 0.0
        self.labels_, self.inertia_ = labels, float(cost) / factor**2
        self.cluster_centers_ = state.centers.numpy()
        self.n_iter_, self.imbalance_ = state.iteration, state.imbalance
        self.n_features_in_ = state.centers.shape[1]
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(N,) int32 nearest centers: not balanced, as the paper assigns the corpus."""
        shards, centers, _ = self._ready(X)
        return _nearest(shards, centers)[0]

    def transform(self, X: Any) -> np.ndarray:
        """(N, K) Euclidean distances (not squared) to the centers, float32."""
        shards, centers, factor = self._ready(X)
        return np.concatenate(shards.each(distances_step, centers)) / np.float32(factor)

    def score(self, X: Any, y: None = None, sample_weight: Any = None) -> float:
        """Minus the sum of the squared distances to the nearest centers, each times its document's weight."""
        shards, centers, factor = self._ready(X)
        nearest_N = np.concatenate(shards.each(distances_step, centers)).min(1).astype(float) / factor
        return -float(_check_sample_weight(sample_weight, nearest_N, dtype=float) @ nearest_N**2)

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def _ready(self, X: Any) -> tuple[Shards, Tensor, float]:
        """Shards and centers, both times the factor that makes room for their squared distances, and that factor."""
        check_is_fitted(self)
        points, centers = self._points(X, reset=False), torch.from_numpy(self.cluster_centers_)
        factor = rescaling(_largest(centers))
        if not _largest(points) * factor < FARTHEST:
            raise UserError(
                f"embeddings must be finite, with numbers below {FARTHEST / factor:g} beside these centers, but some are NaN, "
                "infinite or larger. Find the documents they come from."
            )
        return ScaledShards(LocalShards(cut(points)), factor), centers * factor, factor

    def _points(self, X: Any, *, reset: bool) -> Tensor:
        """Float32 (N, D) of a tensor, where it is, or of whatever scikit-learn takes for an array."""
        if isinstance(X, Tensor):
            if X.ndim != 2 or not X.shape[1]:
                raise UserError(f"embeddings have shape {tuple(X.shape)}, but must be (documents, dimensions).")
            given = validate_data(self, X.detach(), reset=reset, skip_check_array=True)
            points = given.float()
        else:
            types = (np.float64, np.float32)
            given = validate_data(
                self, X, reset=reset, dtype=types, ensure_all_finite=False, ensure_min_samples=int(reset)
            )
            with np.errstate(over="ignore"):  # infinite then, which is refused
                points = torch.from_numpy(np.require(given, np.float32, ["C", "W"]))
        if reset and _largest(points) < SMALLEST and given.any():
            raise UserError(
                f"the largest number in the embeddings must be at least {SMALLEST:g}, the smallest of float32, but is "
                f"{float(abs(given).max()):g}. Multiply all embeddings by a power of ten."
            )
        return points

    def _check_parameters(self) -> None:
        for name in ("n_clusters", "n_init", "max_iter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise UserError(f"{name}={value!r} must be at least 1, a whole number.")
        if not isinstance(self.tol, Real) or not self.tol >= 0:
            raise UserError(f"tol={self.tol!r} must be a number of at least 0.")
        try:
            np.random.default_rng(self.random_state)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"random_state={self.random_state!r} must be a whole number of at least 0, a numpy Generator or RandomState, "
                "or None."
            ) from error


def _nearest(shards: Shards, centers: Tensor) -> tuple[np.ndarray, float]:
    """Labels of the nearest centers, and the sum of the squared distances to them."""
    steps = shards.each(labels_step, centers, torch.zeros(len(centers)), -1.0)
    return np.concatenate([step[0] for step in steps]), sum(step[1] for step in steps)


def _largest(rows_ND: Tensor) -> float:
    """The largest absolute value; NaN if one is."""
    return float(torch.linalg.vector_norm(rows_ND, math.inf)) if len(rows_ND) else 0.0


def _check_equal(weights_N: np.ndarray) -> None:
    if len(weights_N) and not (weights_N[0] > 0 and (weights_N == weights_N[0]).all()):
        raise UserError(
            "sample_weight must be one positive number for all documents: clusters are to hold as many documents each, and "
            "unequal weights cannot in general be cut into equal parts. Repeat documents, or take sklearn.cluster.KMeans."
        )
