"""Balanced assignment against scipy's exact solver, k-means against scikit-learn's, and both on hand-made cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans

from cbtm_ray.cluster import lloyd
from cbtm_ray.cluster.balanced_assignment import (
    HOTTEST,
    IMBALANCE,
    WARM,
    assign_points,
    balanced_assignment,
    fit_prices,
    lower_bound,
)
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.rounding import round_sizes
from cbtm_ray.cluster.shard_steps import LocalShards, Shard, cut, squared_distances
from cbtm_ray.errors import UserError

COUNTS = [(2, 2), (7, 2), (9, 3), (10, 4), (23, 5), (40, 7), (61, 16), (96, 8), (31, 31), (33, 31)]


def random_distances(n: int, n_clusters: int, seed: int = 0) -> torch.Tensor:
    """Skewed, so that most documents want the same few clusters."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((n, n_clusters)) + 2 * rng.random(n_clusters))


def blobs(n: int, n_blobs: int = 4, dim: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.normal(size=(n_blobs, dim))[rng.integers(n_blobs, size=n)] + rng.normal(size=(n, dim))).astype("f4")


def cheapest_cost(distances: np.ndarray) -> float:
    """Exact optimum. Each cluster has floor(N / K) seats for documents and one that a dummy at no cost may take."""
    n, n_clusters = distances.shape
    floor, extra = divmod(n, n_clusters)
    seats = np.concatenate([np.repeat(distances, floor, axis=1), distances], axis=1)
    dummies = np.concatenate(
        [np.full((n_clusters - extra, n_clusters * floor), 1e6), np.zeros((n_clusters - extra, n_clusters))], axis=1
    )
    matrix = np.concatenate([seats, dummies])
    return matrix[linear_sum_assignment(matrix)].sum() / n


def assert_balanced(labels: np.ndarray, n: int, n_clusters: int) -> None:
    sizes = np.bincount(labels, minlength=n_clusters)
    assert labels.shape == (n,)
    assert len(sizes) == n_clusters
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


def test_four_points_on_a_line_by_hand() -> None:
    points, centers = torch.tensor([[0.0], [0.0], [1.0], [10.0]]), torch.tensor([[0.0], [10.0]])
    best = assign_points(points, centers)
    assert best.labels.tolist() == [0, 0, 1, 1]  # the point at 1 has to go to 10: 81 / 4
    assert best.cost == pytest.approx(20.25)
    assert best.lower_bound == pytest.approx(20.25)
    assert best.gap == pytest.approx(0, abs=1e-6)


def test_one_of_three_points_is_the_odd_one_by_hand() -> None:
    best = balanced_assignment(torch.tensor([[0.0, 5.0], [0.0, 7.0], [0.0, 3.0]]))
    assert best.labels.tolist() == [0, 0, 1]
    assert best.cost == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "n_clusters"), COUNTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cost_equals_linear_sum_assignment(n: int, n_clusters: int, seed: int) -> None:
    distances = random_distances(n, n_clusters, seed)
    best = balanced_assignment(distances)
    assert_balanced(best.labels, n, n_clusters)
    assert best.cost == pytest.approx(distances.numpy()[np.arange(n), best.labels].mean(), rel=1e-12)
    assert best.cost == pytest.approx(cheapest_cost(distances.numpy()), rel=1e-9)
    assert best.gap < 1e-9


@pytest.mark.parametrize(("n", "n_clusters"), COUNTS)
def test_rounding_is_exact_and_proven_from_any_prices(n: int, n_clusters: int) -> None:
    distances, rng = random_distances(n, n_clusters), np.random.default_rng(1)
    shards, best = LocalShards([Shard(distances)]), cheapest_cost(distances.numpy())
    for prices in (np.zeros(n_clusters), rng.normal(size=n_clusters), 5 * rng.random(n_clusters)):
        assert lower_bound(shards, None, prices, n) <= best + 1e-12
        rounded = round_sizes(distances.numpy(), np.zeros(n_clusters, int), prices)
        assert rounded is not None
        labels, proof = rounded
        assert_balanced(labels, n, n_clusters)
        assert distances.numpy()[np.arange(n), labels].mean() == pytest.approx(best, rel=1e-9)
        assert lower_bound(shards, None, proof, n) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("n", [30_000, 30_011])
def test_rounding_at_the_borders_closes_the_gap(n: int) -> None:
    points = torch.from_numpy(blobs(n, n_blobs=7, dim=20))
    best = assign_points(points, points[:16].clone())
    assert_balanced(best.labels, n, 16)
    assert 0 <= best.gap < 1e-6


@pytest.mark.parametrize("n", [16, 100, 1003])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_distances_equal(n: int, value: float) -> None:
    best = balanced_assignment(torch.full((n, 16), value))
    assert_balanced(best.labels, n, 16)
    assert best.cost == value
    assert best.gap == 0


def test_duplicates_are_split_between_clusters() -> None:
    points = torch.from_numpy(blobs(5003))
    points[:2000] = points[0]
    best = assign_points(points, points[[0, 2500, 3000, 3500, 4000, 4500]])
    assert_balanced(best.labels, 5003, 6)
    assert best.gap < 1e-6


def test_zero_vectors_and_a_far_outlier() -> None:
    points = torch.nn.functional.normalize(torch.from_numpy(blobs(4000)))
    points[:500] = 0
    points[-1] *= 1000
    best = assign_points(points, points[[0, 600, 1200, 1800, 2400, 3000, 3600]])
    assert_balanced(best.labels, 4000, 7)
    assert best.gap < 1e-6


def test_as_many_documents_as_clusters_is_a_permutation() -> None:
    centers = torch.from_numpy(blobs(64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(64))
    best = assign_points(centers[order], centers)
    assert best.labels.tolist() == order.tolist()


def test_one_cluster_takes_all() -> None:
    best = balanced_assignment(random_distances(9, 1))
    assert best.labels.tolist() == [0] * 9
    assert best.gap == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), n_clusters=st.integers(1, 6), more=st.integers(0, 20))
def test_properties_of_any_assignment(data: st.DataObject, n_clusters: int, more: int) -> None:
    n = n_clusters + more
    whole = st.lists(st.integers(0, 9), min_size=n * n_clusters, max_size=n * n_clusters)
    distances = torch.tensor(data.draw(whole), dtype=torch.double).reshape(n, n_clusters)
    best = balanced_assignment(distances)
    assert_balanced(best.labels, n, n_clusters)
    assert best.gap >= 0
    assert best.cost >= best.lower_bound
    assert best.cost == pytest.approx(cheapest_cost(distances.numpy()), rel=1e-9, abs=1e-9)

    rows = data.draw(st.permutations(range(n)))
    columns = data.draw(st.permutations(range(n_clusters)))
    permuted = balanced_assignment(distances[rows][:, columns])
    assert permuted.cost == pytest.approx(best.cost, rel=1e-9, abs=1e-9)  # labels too, but for ties


def test_labels_follow_a_permutation_of_documents_and_clusters() -> None:
    distances = random_distances(200, 7)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(200), rng.permutation(7)
    permuted = balanced_assignment(distances[rows][:, columns])
    assert columns[permuted.labels].tolist() == balanced_assignment(distances).labels[rows].tolist()


def test_blocks_are_the_same_kept_or_computed_again() -> None:
    points = torch.from_numpy(blobs(300))
    kept, again = Shard(points), Shard(points, cache_bytes=0)
    for centers in (points[:3], points[:3], points[5:9]):
        for shard in (kept, again):
            blocks = torch.cat([d for _, d in shard.blocks(centers)])
            torch.testing.assert_close(blocks, squared_distances(points, centers))
    same, other = points[5:9].clone(), points[6:10]
    first, second, third = ([d for _, d in kept.blocks(centers)] for centers in (same, points[5:9], other))
    assert first[0].data_ptr() == second[0].data_ptr() == third[0].data_ptr()
    torch.testing.assert_close(torch.cat(third), squared_distances(points, other))


def test_fewer_documents_than_clusters_is_refused() -> None:
    expected = (
        r"n_clusters=8 must be at most the number of documents, 3. Lower cluster.n_clusters or give more documents."
    )
    with pytest.raises(UserError, match=expected):
        balanced_assignment(torch.zeros(3, 8))
    with pytest.raises(UserError, match=expected):
        BalancedKMeans(8).fit(np.zeros((3, 2), "f4"))


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="n_clusters=0 must be at least 1"):
        BalancedKMeans(0).fit(np.zeros((3, 2), "f4"))
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array instead"):
        BalancedKMeans(2).fit(np.zeros(3, "f4"))
    for shape in ((3,), (3, 0)):
        with pytest.raises(UserError, match=r"embeddings have shape \(3,.*\), but must be \(documents, dimensions\)"):
            BalancedKMeans(2).fit(torch.zeros(shape))
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="embeddings must be finite"):
            BalancedKMeans(2).fit(np.array([[0.0], [value], [1.0]], "f4"))
        with pytest.raises(UserError, match="squared_distances must be finite"):
            balanced_assignment(torch.full((4, 2), value))
    with pytest.raises(ValueError, match="not fitted yet"):
        BalancedKMeans(2).predict(np.zeros((3, 2), "f4"))
    for wrong in (np.zeros((4, 3), "f4"), torch.zeros(4, 3)):
        with pytest.raises(ValueError, match="X has 3 features, but BalancedKMeans is expecting 5 features as input"):
            BalancedKMeans(2).fit(blobs(20)).transform(wrong)
    uneven = LocalShards([Shard(torch.zeros(4, dim)) for dim in (2, 3)])
    with pytest.raises(UserError, match=r"embeddings have \[2, 3\] dimensions, but must all have as many"):
        lloyd.check_documents(uneven, 2)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"n_clusters": 2.0}, "n_clusters=2.0 must be at least 1, a whole number"),
        ({"n_clusters": True}, "n_clusters=True must be at least 1, a whole number"),
        ({"max_iter": 0}, "max_iter=0 must be at least 1, a whole number"),
        ({"n_init": 0}, "n_init=0 must be at least 1, a whole number"),
        ({"n_init": "auto"}, "n_init='auto' must be at least 1, a whole number"),
        ({"tol": -1e-4}, "tol=-0.0001 must be a number of at least 0"),
        ({"tol": np.nan}, "tol=nan must be a number of at least 0"),
        ({"random_state": -1}, "random_state=-1 must be a whole number of at least 0, a numpy Generator"),
        ({"random_state": "0"}, "random_state='0' must be a whole number of at least 0, a numpy Generator"),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(parameter: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedKMeans(**{"n_clusters": 2, **parameter}).fit(blobs(20))


def test_what_is_no_finite_dense_matrix_of_real_numbers_is_refused() -> None:
    model = BalancedKMeans(2).fit(blobs(20))
    for value in (np.nan, -np.inf, 1e30):
        for use in (model.predict, model.transform, model.score):
            with pytest.raises(UserError, match="embeddings must be finite"):
                use(np.full((1, 5), value, "f4"))
    for factor in (1e39, np.float64(1e-39)):
        with pytest.raises(UserError, match=r"finite in float32|the smallest of float32"):
            BalancedKMeans(2).fit(factor * blobs(20).astype(float))
    with pytest.raises(ValueError, match=r"0 feature\(s\) \(shape=\(20, 0\)\) while a minimum of 1"):
        BalancedKMeans(2).fit(np.zeros((20, 0)))
    with pytest.raises(ValueError, match="Complex data not supported"):
        BalancedKMeans(2).fit(blobs(20) + 1j)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        BalancedKMeans(2).fit(csr_matrix(blobs(20)))


@pytest.mark.parametrize("kind", [list, np.float64, np.int64, torch.tensor])
def test_embeddings_of_any_real_type_fit_alike(kind: Any) -> None:
    points = np.rint(4 * blobs(40))
    given = points.tolist() if kind is list else kind(points)
    assert BalancedKMeans(3).fit(given).labels_.tolist() == BalancedKMeans(3).fit(points).labels_.tolist()


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(0), np.random.default_rng(0), np.int64(7)])
def test_the_kinds_of_seed_that_scikit_learn_and_numpy_have(random_state: Any) -> None:
    assert_balanced(BalancedKMeans(3, random_state=random_state).fit_predict(blobs(50)), 50, 3)


def test_no_documents_have_no_labels() -> None:
    model = BalancedKMeans(2).fit(blobs(20))
    assert model.predict(np.zeros((0, 5), "f4")).shape == (0,)
    assert model.transform(np.zeros((0, 5), "f4")).shape == (0, 2)


@pytest.mark.parametrize("n_clusters", [2, 5, 9])
@pytest.mark.parametrize("tol", [0.0, 1e-4])
def test_unbalanced_equals_scikit_learn(n_clusters: int, tol: float) -> None:
    points = blobs(2000, n_blobs=6)
    start = lloyd.start_centers(LocalShards(cut(torch.from_numpy(points))), [2000], n_clusters, 3)
    ours = BalancedKMeans(n_clusters, balanced=False, max_iter=300, tol=tol, random_state=3).fit(points)
    theirs = KMeans(n_clusters, init=start.numpy(), n_init=1, tol=tol, algorithm="lloyd").fit(points)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, atol=1e-4)
    assert ours.labels_.tolist() == theirs.labels_.tolist()
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.gap_ == 0
    assert ours.predict(points).tolist() == theirs.predict(points).tolist()
    np.testing.assert_allclose(ours.transform(points), theirs.transform(points), atol=1e-3)


def test_balanced_fit_by_hand() -> None:
    points = np.array([[0.0], [1.0], [2.0], [9.0]], "f4")  # plain k-means would cut 3 + 1
    model = BalancedKMeans(2, tol=0.0).fit(points)
    assert sorted(model.cluster_centers_[:, 0].tolist()) == pytest.approx([0.5, 5.5], abs=0.06)
    assert model.labels_[0] == model.labels_[1] != model.labels_[2] == model.labels_[3]
    assert model.inertia_ == pytest.approx(2 * 0.25 + 2 * 12.25, rel=1e-2)
    nearest = model.predict(points)
    assert nearest[2] == nearest[0] != nearest[3]  # predict drops the balance


@pytest.mark.parametrize("n", [997, 40_000])
def test_balanced_fit_has_equal_sizes_and_a_closed_gap(n: int) -> None:
    points = blobs(n, n_blobs=5)
    model = BalancedKMeans(8, max_iter=10).fit(points)
    assert_balanced(model.labels_, n, 8)
    assert model.gap_ < 1e-6
    assert model.imbalance_ <= IMBALANCE
    assert model.cluster_centers_.dtype == np.float32
    chosen = (points - model.cluster_centers_[model.labels_]).astype(float)
    assert model.inertia_ == pytest.approx((chosen**2).sum(), rel=1e-4)
    nearest = model.transform(points).min(1).astype(float)
    assert model.inertia_ >= (nearest**2).sum()


def test_seed_decides_the_start_and_nothing_global_does() -> None:
    points = blobs(600)
    first = BalancedKMeans(6, max_iter=2, random_state=1).fit(points).cluster_centers_
    np.random.seed(5)
    torch.manual_seed(5)
    again = BalancedKMeans(6, max_iter=2, random_state=1).fit(points).cluster_centers_
    other = BalancedKMeans(6, max_iter=2, random_state=2).fit(points).cluster_centers_
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_threads_do_not_change_the_result() -> None:
    points, threads = blobs(40_000), torch.get_num_threads()
    fits = []
    for count in (1, 3):
        torch.set_num_threads(count)
        fits.append(BalancedKMeans(4, max_iter=3).fit(points).cluster_centers_)
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    np.testing.assert_array_equal(*fits)


def test_empty_cluster_moves_to_the_farthest_document() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0]])
    start = lloyd.LloydState(0, torch.tensor([[0.0], [99.0]]), torch.zeros(2), np.inf, np.inf, np.nan)
    shards = LocalShards([Shard(points)])
    first, *_, last = lloyd.lloyd(shards, start, balanced=False, max_iter=9, tolerance=0.0)
    assert first.centers[:, 0].tolist() == pytest.approx([11 / 3, 10.0])
    assert last.centers[:, 0].tolist() == [0.5, 10.0]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("n", [8, 50])
def test_equal_documents_fit(n: int, balanced: bool) -> None:
    model = BalancedKMeans(8, balanced=balanced).fit(np.ones((n, 3), "f4"))
    np.testing.assert_array_equal(model.cluster_centers_, 1)
    assert model.inertia_ == 0
    assert model.gap_ == 0
    if balanced:
        assert_balanced(model.labels_, n, 8)


def test_as_many_clusters_as_documents_fit_exactly() -> None:
    points = blobs(12)
    model = BalancedKMeans(12).fit(points)
    assert sorted(model.labels_.tolist()) == list(range(12))
    np.testing.assert_allclose(model.cluster_centers_[model.labels_], points, atol=1e-2)


def test_going_on_from_a_saved_iteration_changes_nothing() -> None:
    model = BalancedKMeans(4, max_iter=6, tol=0.0)
    shards = LocalShards(cut(torch.from_numpy(blobs(500))))
    straight = list(model.iterations(shards))
    resumed = list(model.iterations(shards, straight[3]))
    assert len(straight) == 7
    assert len(resumed) == 4
    assert torch.equal(straight[-1].centers, resumed[-1].centers)


def test_prices_that_start_far_away_are_found_all_the_same() -> None:
    """Centers can move so far between iterations that the prices of the last one are a thousand spreads off."""
    points = torch.from_numpy(blobs(600))
    shards = LocalShards(cut(points))
    far = torch.tensor([0.0, 2e3, -2e3, 5e3], dtype=torch.double)
    prices, _, imbalance = fit_prices(shards, points[:4], far, WARM)
    near, _, _ = fit_prices(shards, points[:4], torch.zeros(4, dtype=torch.double), HOTTEST)
    assert imbalance <= IMBALANCE
    assert (prices - near).abs().max() < 0.1 * near.abs().max()
