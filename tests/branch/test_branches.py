"""What is trained: the shares of the budget, and the dense control as K = 1."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.branch.branches import control_branches, expert_branches, in_proportion, seed_branch
from cbtm_ray.config import Config
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, expert_folder, partition_folder
from tests.support.tiny import one_cluster


def test_experts_share_the_budget_and_the_control_gets_all_of_it(tiny_config: Config) -> None:
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, total_tokens=128 * 21))
    run = Run(config)
    branches = {branch.spec.name: branch for branch in expert_branches(run)}
    assert {name: branch.spec.steps for name, branch in branches.items()} == {
        DENSE_FOLDER: 20, expert_folder(0): 10, expert_folder(1): 10,
    }  # fmt: skip
    assert [branch.cluster for branch in branches.values()] == [None, 0, 1]
    assert {branch.init for branch in branches.values()} == {run.uri("seed")}
    assert seed_branch(run).spec.steps == 12


@given(weights=st.lists(st.integers(1, 10**9), min_size=1, max_size=20), extra=st.integers(0, 1000))
def test_shares_are_whole_sum_up_and_are_within_one_of_their_part(weights: list[int], extra: int) -> None:
    steps = len(weights) + extra
    shares = in_proportion(steps, weights)
    assert sum(shares) == steps
    assert min(shares) >= 1
    exact = [steps * weight / sum(weights) for weight in weights]
    if min(exact) >= 1:
        assert all(abs(share - part) < 1 for share, part in zip(shares, exact, strict=True))
    order = sorted(range(len(weights)), key=lambda k: weights[k])
    assert all(shares[a] <= shares[b] + 1 for a, b in itertools.pairwise(order))


def test_shares_by_hand() -> None:
    assert in_proportion(10, [1, 1, 8]) == [1, 1, 8]
    assert in_proportion(10, [5, 3, 3]) == [4, 3, 3]
    assert in_proportion(4, [1000, 1, 1]) == [2, 1, 1]
    assert in_proportion(3, [1000, 1, 1]) == [1, 1, 1]


def test_a_budget_by_size_follows_the_clusters_tokens_and_sums_to_the_same(tiny_config: Config, tmp_path: Path) -> None:
    sized = dataclasses.replace(
        tiny_config,
        run=dataclasses.replace(tiny_config.run, dir=str(tmp_path)),
        train=dataclasses.replace(tiny_config.train, budget="by_size"),
    )
    run = Run(sized)
    clusters = [{"cluster": 0, "tokens": 1000}, {"cluster": 1, "tokens": 3000}]
    run.finish("shards", {"train": {"clusters": clusters}})
    branches = expert_branches(run)
    assert [(branch.spec.name, branch.spec.steps) for branch in branches] == [
        (DENSE_FOLDER, 16), (expert_folder(1), 12), (expert_folder(0), 4),
    ]  # fmt: skip
    assert [branch.cluster for branch in branches] == [None, 1, 0]
    run.finish(partition_folder("metadata"), {"n_clusters": 4, "clusters": [{"tokens": n} for n in (1, 2, 3, 10)]})
    assert [branch.spec.steps for branch in control_branches(run, "metadata")] == [1, 2, 3, 10]


def test_one_expert_is_given_what_the_dense_control_is_given(tiny_config: Config, tmp_path: Path) -> None:
    dense, expert = expert_branches(one_cluster(tiny_config, tmp_path))
    assert expert == dataclasses.replace(dense, cluster=0, spec=dataclasses.replace(dense.spec, name=expert_folder(0)))


def test_the_seed_and_the_dense_control_train_all_weights(tiny_config: Config) -> None:
    run = Run(dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, trainable="ffn")))
    trained = {branch.spec.name: branch.spec.train.trainable for branch in [seed_branch(run), *expert_branches(run)]}
    assert trained == {"seed": "all", DENSE_FOLDER: "all", expert_folder(0): "ffn", expert_folder(1): "ffn"}
    assert "train.trainable" in run.settings("experts")
    assert not {"train.trainable"} & {
        *run.settings("seed"),
        *run.settings("controls/dense"),
        *run.settings("controls/moe"),
    }
