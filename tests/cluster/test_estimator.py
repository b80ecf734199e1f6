"""BalancedKMeans as scikit-learn has estimators: names of columns, weights, scores, starts; and embeddings of any size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from cbtm_ray.cluster.balanced_assignment import HOTTEST, assign_points, balanced_assignment, fit_prices
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.shard_steps import LocalShards, cut
from cbtm_ray.errors import UserError

SIZES = [-37, -25, -19, -13, 13, 19, 25, 37]


def points(n: int = 60, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, dim))


def table() -> pd.DataFrame:
    return pd.DataFrame(points(), columns=list("abcd"), index=range(100, 160))


@pytest.mark.parametrize("balanced", [True, False])
def test_it_passes_the_checks_of_scikit_learn(balanced: bool) -> None:
    """All but those that give documents different weights, which have no clusters of equal size."""
    results = check_estimator(BalancedKMeans(2, balanced=balanced), on_fail=None, on_skip=None)
    assert {result["check_name"] for result in results if result["status"] == "failed"} == {
        "check_sample_weight_equivalence_on_dense_data",
        "check_sample_weights_not_overwritten",
    }
    assert sum(result["status"] == "passed" for result in results) > 50


@pytest.mark.parametrize("use", [BalancedKMeans.predict, BalancedKMeans.transform, BalancedKMeans.score])
def test_columns_by_other_names_or_in_another_order_are_refused(use: Callable) -> None:
    model = BalancedKMeans(3).fit(table())
    assert model.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="Feature names must be in the same order as they were in fit"):
        use(model, table()[list("dcba")])
    with pytest.raises(ValueError, match="Feature names unseen at fit time:\n- e"):
        use(model, table().rename(columns={"d": "e"}))
    assert not hasattr(model.fit(points()), "feature_names_in_")


def test_the_distances_to_the_centers_have_names() -> None:
    model = BalancedKMeans(3).fit(table())
    assert model.get_feature_names_out().tolist() == ["balancedkmeans0", "balancedkmeans1", "balancedkmeans2"]
    named = model.set_output(transform="pandas").transform(table())
    assert named.columns.tolist() == model.get_feature_names_out().tolist()
    assert named.index.tolist() == list(range(100, 160))
    np.testing.assert_array_equal(named, BalancedKMeans(3).fit(points()).transform(points()))


def test_it_stands_in_a_pipeline_and_is_searched_over() -> None:
    piped = make_pipeline(StandardScaler(), clone(BalancedKMeans(3, balanced=False).set_params(n_clusters=4)))
    assert piped.fit_transform(points()).shape == (60, 4)
    found = GridSearchCV(BalancedKMeans(), {"n_clusters": [1, 3]}, cv=2).fit(points())
    assert found.best_params_ == {"n_clusters": 3}


def test_the_score_is_that_of_scikit_learn() -> None:
    ours, weights_N = BalancedKMeans(3).fit(points()), np.random.default_rng(1).random(60)
    theirs = KMeans(3, init=ours.cluster_centers_, n_init=1, max_iter=1).fit(points().astype("f4"))
    theirs.cluster_centers_ = ours.cluster_centers_
    for weights in (None, weights_N):
        score = ours.score(points(), sample_weight=weights)
        assert score == pytest.approx(theirs.score(points().astype("f4"), sample_weight=weights), rel=1e-5)


def test_equal_weights_change_nothing_and_others_are_refused() -> None:
    plain = BalancedKMeans(3).fit(points())
    weighted = BalancedKMeans(3).fit(points(), sample_weight=np.full(60, 2.5))
    np.testing.assert_array_equal(plain.cluster_centers_, weighted.cluster_centers_)
    for weights_N in (np.arange(60), -np.ones(60)):
        with pytest.raises(UserError, match="sample_weight must be one positive number for all documents"):
            BalancedKMeans(3).fit(points(), sample_weight=weights_N)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_best_of_several_starts_is_kept(balanced: bool) -> None:
    rng = np.random.default_rng(5)
    fits = [BalancedKMeans(6, balanced=balanced, random_state=rng).fit(points()) for _ in range(4)]
    costs = [fit.inertia_ for fit in fits]
    assert costs.index(min(costs)) not in (0, 3)
    kept = BalancedKMeans(6, balanced=balanced, n_init=4, random_state=5).fit(points())
    best = fits[costs.index(min(costs))]
    for name in ("cluster_centers_", "labels_", "inertia_", "n_iter_", "gap_", "imbalance_"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(best, name))


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("exponent", SIZES)
def test_clusters_do_not_depend_on_the_unit_of_the_embeddings(exponent: int, balanced: bool) -> None:
    unit, model = 10.0**exponent, BalancedKMeans(3, balanced=balanced)
    plain, scaled = clone(model).fit(points()), model.fit(points() * unit)
    assert scaled.labels_.tolist() == plain.labels_.tolist()
    np.testing.assert_allclose(scaled.cluster_centers_ / unit, plain.cluster_centers_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scaled.transform(points() * unit) / unit, plain.transform(points()), rtol=1e-5)
    assert scaled.predict(points() * unit).tolist() == plain.predict(points()).tolist()
    assert scaled.inertia_ / unit**2 == pytest.approx(plain.inertia_, rel=1e-5)
    assert scaled.score(points() * unit) / unit**2 == pytest.approx(plain.score(points()), rel=1e-5)
    assert scaled.gap_ < 1e-6


@pytest.mark.parametrize("value", [0.0, 1e-37, 1e-19, 1e19, 1e38])
def test_equal_documents_of_any_size_are_shared_out(value: float) -> None:
    model = BalancedKMeans(3).fit(np.full((50, 4), value, "f4"))
    assert sorted(np.bincount(model.labels_)) == [16, 17, 17]
    assert model.inertia_ == 0


@pytest.mark.parametrize("exponent", range(-45, 39, 7))
def test_documents_of_very_different_sizes_are_fitted(exponent: int) -> None:
    for few in (slice(7), slice(7, None)):
        uneven = points()
        uneven[few] *= 10.0**exponent
        model = BalancedKMeans(3).fit(uneven)
        assert np.bincount(model.labels_).tolist() == [20, 20, 20]
        assert np.isfinite(model.cluster_centers_).all()


def test_going_on_with_small_embeddings_changes_nothing() -> None:
    model, shards = BalancedKMeans(4, max_iter=6, tol=0.0), LocalShards(cut(torch.from_numpy(points() * 1e-19).float()))
    straight = list(model.iterations(shards))
    resumed = list(model.iterations(shards, straight[3]))
    assert torch.equal(straight[-1].centers, resumed[-1].centers)
    assert straight[-1].centers.abs().max() < 1e-18


@pytest.mark.parametrize("exponent", SIZES)
def test_assignments_do_not_depend_on_the_unit_of_the_distances(exponent: int) -> None:
    squared_NK, unit = torch.from_numpy(np.random.default_rng(0).random((50, 4))), 10.0**exponent
    plain, scaled = balanced_assignment(squared_NK), balanced_assignment((squared_NK * unit).float())
    assert scaled.labels.tolist() == plain.labels.tolist()
    assert scaled.cost / unit == pytest.approx(plain.cost)
    assert scaled.lower_bound / unit == pytest.approx(plain.lower_bound)
    rows = torch.from_numpy(points()).float()
    plain, scaled = assign_points(rows, rows[:5]), assign_points(rows * unit, rows[:5] * unit)
    assert scaled.labels.tolist() == plain.labels.tolist()
    assert scaled.cost / unit**2 == pytest.approx(plain.cost)


def test_loads_that_cannot_be_balanced_end_the_search_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Prices too far apart for float32 to add a distance to them."""
    squared_NK = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    far = torch.tensor([0.0, 1e30, -1e30], dtype=torch.double)
    _, _, imbalance = fit_prices(LocalShards(cut(squared_NK)), None, far, HOTTEST)
    assert imbalance > 0.5
    assert "cluster sizes while fitting are within" in caplog.text
