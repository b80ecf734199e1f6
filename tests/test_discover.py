"""What is said of clusters, on cases small enough to count."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cbtm_ray.cluster import BalancedKMeans
from cbtm_ray.corpus import SAMPLE_SCHEMA
from cbtm_ray.discover import agreement, describe_clusters, top_terms


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
    found = describe_clusters(clusterer, points, pa.Table.from_pylist(rows, SAMPLE_SCHEMA))
    by_domain = {next(iter(cluster["domains"])): cluster for cluster in found["clusters"]}
    assert by_domain["x"]["domains"] == {"x": 3}
    assert by_domain["x"]["sample_documents"] == 3
    assert by_domain["x"]["samples"][0] == "text 1"
    assert set(by_domain["y"]["samples"]) == {"text 3", "text 4"}
    assert found["purity"] == 1
    assert len(found["map2d"]["x"]) == len(found["map2d"]["cluster"]) == 5
