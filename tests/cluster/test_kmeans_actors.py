"""k-means over actors: the same for any number of them, as on one tensor, and when any of them or we are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbtm_ray import files
from cbtm_ray.cluster import lloyd
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.kmeans_actors import fit_distributed
from cbtm_ray.cluster.shard_steps import Shard
from cbtm_ray.errors import UserError

pytestmark = pytest.mark.ray

SETTINGS: dict[str, Any] = {"n_clusters": 5, "balanced": True, "max_iter": 8, "tol": 0.0, "random_state": 0}


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (4 * rng.normal(size=(5, 8))[rng.integers(5, size=3001)] + rng.normal(size=(3001, 8))).astype("f4")


@pytest.fixture(scope="module")
def shards(points: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = str(tmp_path_factory.mktemp("embeddings"))
    uris = [files.join(folder, f"part-{i}.npy") for i in range(4)]
    for uri, part in zip(uris, np.split(points, [200, 1500, 2900]), strict=True):
        files.write_array(uri, part)
    return uris


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, shards: list[str]) -> BalancedKMeans:
    return fit_distributed(shards, n_actors=2, **SETTINGS)


def assert_same(ours: BalancedKMeans, theirs: BalancedKMeans) -> None:
    np.testing.assert_array_equal(ours.cluster_centers_, theirs.cluster_centers_)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert (ours.inertia_, ours.gap_, ours.n_iter_) == (theirs.inertia_, theirs.gap_, theirs.n_iter_)


@pytest.mark.parametrize("n_actors", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 9))])
def test_number_of_actors_does_not_change_a_bit(undisturbed: BalancedKMeans, shards: list[str], n_actors: int) -> None:
    assert_same(fit_distributed(shards, n_actors=n_actors, cpus_per_actor=0.25, **SETTINGS), undisturbed)


@pytest.mark.parametrize("balanced", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equals_one_tensor(ray_cluster: str, points: np.ndarray, shards: list[str], balanced: bool) -> None:
    settings = SETTINGS | {"balanced": balanced, "tol": 1e-4, "max_iter": 50}
    remote = fit_distributed(shards, n_actors=2 if balanced else 1, **settings)
    local = BalancedKMeans(**settings).fit(points)
    np.testing.assert_allclose(remote.cluster_centers_, local.cluster_centers_, atol=1e-5)
    assert remote.labels_.tolist() == local.labels_.tolist()
    assert remote.inertia_ == pytest.approx(local.inertia_, rel=1e-5)
    assert remote.n_iter_ == local.n_iter_
    if balanced:
        assert sorted(np.bincount(remote.labels_)) == [600, 600, 600, 600, 601]
        assert remote.gap_ < 1e-6


def test_a_driver_that_dies_goes_on_where_it_was(
    undisturbed: BalancedKMeans, shards: list[str], tmp_path: Path
) -> None:
    state, seen = str(tmp_path / "state.npz"), []

    def die_at_three(iteration: int, cost: float) -> None:
        seen.append(iteration)
        if iteration == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_distributed(shards, n_actors=1, state_uri=state, on_iteration=die_at_three, **SETTINGS)
    again = fit_distributed(shards, n_actors=1, state_uri=state, on_iteration=die_at_three, **SETTINGS)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8]
    assert_same(again, undisturbed)

    finished = fit_distributed(shards, n_actors=1, state_uri=state, on_iteration=die_at_three, **SETTINGS)
    assert seen[-1] == 8, "nothing was left to do"
    assert_same(finished, undisturbed)


def test_state_of_another_fit_is_refused(ray_cluster: str, shards: list[str], tmp_path: Path) -> None:
    state = str(tmp_path / "state.npz")
    fit_distributed(shards, n_actors=1, state_uri=state, **SETTINGS | {"max_iter": 1})
    with pytest.raises(UserError, match=r"must be of the same fit, but holds .*n_clusters=5.* where this one is .*=6"):
        fit_distributed(shards, n_actors=1, state_uri=state, **SETTINGS | {"n_clusters": 6})


def dying_step(folder: Path, real_step: Callable[..., Any]) -> Callable[..., Any]:
    """`real_step`, but the first process to take it on shard 3 writes its id and then waits to be killed."""

    def step(shard: Shard, *args: Any) -> Any:
        if shard.position == 3:
            victim = folder / "victim"
            if not victim.exists():
                (folder / "aside").write_text(str(os.getpid()))
                (folder / "aside").rename(victim)
                time.sleep(120)
                (folder / "survived").touch()
            (folder / "last").write_text(str(os.getpid()))
        return real_step(shard, *args)

    return step


def test_an_actor_killed_inside_a_lloyd_step_changes_nothing(
    undisturbed: BalancedKMeans, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lloyd, "means_step", dying_step(tmp_path, lloyd.means_step))
    killed = []

    def kill_the_victim() -> None:
        deadline = time.monotonic() + 100
        while not (tmp_path / "victim").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.append(int((tmp_path / "victim").read_text()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_victim)
    killer.start()
    fitted = fit_distributed(shards, n_actors=2, **SETTINGS)
    killer.join()
    assert not (tmp_path / "survived").exists(), "the step was in flight when its process was killed"
    assert int((tmp_path / "last").read_text()) != killed[0]
    assert_same(fitted, undisturbed)


def test_user_errors_cross_the_actors(ray_cluster: str, shards: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard_uris=\[\] must name at least one shard"):
        fit_distributed([], **SETTINGS)
    with pytest.raises(UserError, match=r"cluster\.gpus_per_actor=1 must be at most the GPUs of this machine, 0\."):
        fit_distributed(shards, gpus_per_actor=1, **SETTINGS)
    with pytest.raises(UserError, match="n_actors=0 must be at least 1"):
        fit_distributed(shards, n_actors=0, **SETTINGS)
    with pytest.raises(UserError, match="n_clusters=9999 must be at most the number of documents, 3001"):
        fit_distributed(shards, n_actors=1, **SETTINGS | {"n_clusters": 9999})
    files.write_array(str(tmp_path / "bad.npy"), np.full((10, 8), np.nan, "f4"))
    with pytest.raises(UserError, match="embeddings must be finite"):
        fit_distributed([*shards, str(tmp_path / "bad.npy")], n_actors=1, **SETTINGS)
