"""What is said of clusters, on cases small enough to count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import pdist

from cbtm_ray.cluster.describe import agreement, describe_clusters, top_terms
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.corpus.sample import SAMPLE_SCHEMA


def test_agreement_by_hand() -> None:
    assert agreement(np.array([1, 1, 0, 0]), ["a", "a", "b", "b"]) == {"nmi": pytest.approx(1), "purity": 1}
    assert agreement(np.array([0, 0, 0, 0]), ["a", "a", "a", "b"]) == {"nmi": pytest.approx(0), "purity": 0.75}
    assert agreement(np.array([0, 1]), ["a", None]) == {"nmi": None, "purity": None}


def test_terms_are_those_that_a_cluster_has_more_of() -> None:
    texts = ["ship sail common"] * 4 + ["oven cake common"] * 4 + ["the of"]
    terms = top_terms(texts, np.array([0] * 4 + [1] * 4 + [2]), 3)
    assert {"ship", "sail"} == set(terms[0][:2])
    assert {"oven", "cake"} == set(terms[1][:2])
    assert terms[2] == []
    assert top_terms(["one", "two"], np.array([0, 1]), 2) == [[], []]


def test_clusters_are_described_by_their_nearest_documents() -> None:
    points = np.array([[1, 0], [0.9, 0.1], [0.8, 0], [0, 1], [0, 0.9]], dtype=np.float32)
    rows = [{"id": str(i), "domain": "x" if i < 3 else "y", "text": f"text {i}"} for i in range(5)]
    clusterer = BalancedKMeans(2, balanced=False, random_state=0).fit(points)
    found = describe_clusters(
        clusterer.predict(points), clusterer.transform(points), points, pa.Table.from_pylist(rows, SAMPLE_SCHEMA)
    )
    by_domain = {next(iter(cluster["domains"])): cluster for cluster in found["clusters"]}
    assert by_domain["x"]["domains"] == {"x": 3}
    assert by_domain["x"]["sample_documents"] == 3
    assert by_domain["x"]["samples"][0] == "text 1"
    assert set(by_domain["y"]["samples"]) == {"text 3", "text 4"}
    assert found["purity"] == 1
    assert len(found["map2d"]["x"]) == len(found["map2d"]["cluster"]) == 5


def test_agreement_of_crossed_labels_and_of_renamed_ones() -> None:
    assert agreement(np.array([0, 0, 1, 1]), ["a", "b", "a", "b"]) == {"nmi": pytest.approx(0), "purity": 0.5}
    renamed = agreement(np.array([5, 5, 2, 2, 2]), ["z", "z", "b", "b", "a"])
    assert renamed["purity"] == pytest.approx(0.8)
    assert renamed == agreement(np.array([0, 0, 1, 1, 1]), ["a", "a", "c", "c", "b"])


def test_a_word_of_many_documents_is_more_typical_than_one_repeated_in_a_few() -> None:
    texts = ["reef wave"] * 3 + ["wave"] * 3 + ["reef " * 50] + ["oven"] * 5
    labels = np.array([0] * 7 + [1] * 5)
    assert top_terms(texts, labels, 2)[0] == ["wave", "reef"]


def test_words_of_two_documents_numbers_and_stop_words_are_no_terms() -> None:
    texts = ["rare the 1999 ship x1"] * 2 + ["the 1999 ship x1"] * 2 + ["oven"] * 4
    assert top_terms(texts, np.array([0] * 4 + [1] * 4), 2) == [["ship"], ["oven"]]


def test_at_most_twelve_terms_name_a_cluster() -> None:
    words = [f"word{letter}" for letter in "abcdefghijklmnop"]
    found = top_terms([" ".join(words)] * 3 + ["oven"] * 3, np.array([0] * 3 + [1] * 3), 2)
    assert [len(terms) for terms in found] == [12, 1]


def describe(points: np.ndarray, texts: list[str], domains: list[str | None]) -> dict[str, Any]:
    rows = [
        {"id": str(n), "domain": domain, "text": text}
        for n, (text, domain) in enumerate(zip(texts, domains, strict=True))
    ]
    clusterer = BalancedKMeans(2, random_state=0).fit(points)
    return describe_clusters(
        clusterer.predict(points), clusterer.transform(points), points, pa.Table.from_pylist(rows, SAMPLE_SCHEMA)
    )


def test_documents_without_a_domain_are_counted_without_one() -> None:
    points = np.array([[1, 0]] * 3 + [[0, 1]] * 3, dtype=np.float32)
    found = describe(points, ["a"] * 6, ["sea", "sea", None, None, None, None])
    assert (found["nmi"], found["purity"]) == (None, None)
    assert sorted(cluster["sample_documents"] for cluster in found["clusters"]) == [3, 3]
    assert sorted(str(cluster["domains"]) for cluster in found["clusters"]) == ["{'sea': 2}", "{}"]
    assert [cluster["cluster"] for cluster in found["clusters"]] == [0, 1]


def test_three_long_texts_are_shown_cut_nearest_first() -> None:
    offsets = np.array([0.4, 0.0, 0.3, -0.1, -0.6])  # their mean is 0: document 1 is nearest, then 3, then 2
    points = np.array([[1, offset] for offset in offsets] + [[-9, offset] for offset in offsets], dtype=np.float32)
    found = describe(points, [f"{n}" * 3000 for n in range(10)], ["x"] * 10)
    samples = sorted(cluster["samples"] for cluster in found["clusters"])
    assert samples == [["1" * 2000, "3" * 2000, "2" * 2000], ["6" * 2000, "8" * 2000, "7" * 2000]]


def test_the_map_keeps_the_distances_of_a_plane() -> None:
    plane = np.random.default_rng(0).normal(size=(20, 2))
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 2)))[0].T
    points = (plane @ basis).astype(np.float32)
    found = describe(points, ["a"] * 20, ["x"] * 20)
    shown = np.stack([found["map2d"]["x"], found["map2d"]["y"]], axis=1)
    np.testing.assert_allclose(pdist(shown), pdist(plane), atol=1e-3)
    sizes = [cluster["sample_documents"] for cluster in found["clusters"]]
    assert np.bincount(found["map2d"]["cluster"]).tolist() == sizes
