"""Bigram tables: by hand, in pieces, and the same for a document and for one token after the other."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.cluster.ngrams import NgramCounts, add_counts, count_pairs, load_tables, smooth

END = 0


def counted(documents: list[list[int]], clusters: list[int], vocabulary: int = 4, n_clusters: int = 2) -> NgramCounts:
    found = [np.array(document, np.int32) for document in documents]
    return count_pairs(found, clusters, vocabulary=vocabulary, n_clusters=n_clusters, end_of_text=END)


def test_pairs_by_hand() -> None:
    counts = counted([[1, 2, 1, 2], [1, 3]], [0, 1])
    found = {
        (code // 8, code // 2 % 4, code % 2): count for code, count in zip(counts.codes, counts.counts, strict=True)
    }
    assert found == {(END, 1, 0): 1, (1, 2, 0): 2, (2, 1, 0): 1, (END, 1, 1): 1, (1, 3, 1): 1}


def test_evidence_by_hand() -> None:
    """The formula of the module's head, for a pair with a row and one without."""
    tables = smooth(counted([[1, 2, 1, 2], [1, 3]], [0, 1]), end_of_text=END, max_pairs=9, min_count=1).tables()
    p = np.array([1, 4, 3, 2]) / 10  # each token once more than it was counted
    p_0 = (np.array([0, 2, 2, 0]) + 2000 * p) / 2004
    p_1 = (np.array([0, 1, 0, 1]) + 2000 * p) / 2002
    after_1 = (2 + 100 * p[2]) / (3 + 100)
    wanted = [math.log((2 + 300 * after_1 * math.sqrt(p_0[2] / p[2])) / 302 / after_1),
              math.log(300 * math.sqrt(p_1[2] / p[2]) / 301)]  # fmt: skip
    assert tables.step(1, 2) == pytest.approx(wanted, abs=5e-3)  # of float16
    unseen = [math.log(300 * math.sqrt(p_0[3] / p[3]) / 301), math.log(300 * math.sqrt(p_1[3] / p[3]) / 300)]
    assert tables.step(2, 3) == pytest.approx(unseen, abs=5e-3)


documents = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 2)), min_size=1, max_size=6)


@given(documents=documents, cut=st.integers(0, 6), most=st.integers(0, 30))
def test_pieces_add_up_and_tokens_follow_documents(documents: list[tuple[list[int], int]], cut: int, most: int) -> None:
    texts, clusters = [text for text, _ in documents], [cluster for _, cluster in documents]
    whole = counted(texts, clusters, 6, 3)
    parts = add_counts([counted(texts[:cut], clusters[:cut], 6, 3), counted(texts[cut:], clusters[cut:], 6, 3)])
    assert parts.codes.tolist() == whole.codes.tolist()
    assert parts.counts.tolist() == whole.counts.tolist()
    tables = smooth(whole, end_of_text=END, max_pairs=most, min_count=1).tables()
    assert len(tables.pairs) <= most
    for text in texts:
        steps = [tables.step(before, token) for before, token in zip([None, *text], text, strict=False)]
        assert np.array_equal(tables.evidence(np.array(text, np.int32)), np.array(steps).reshape(-1, 3))


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    tables = smooth(counted([[1, 2, 1, 2], [1, 3]], [0, 1]), end_of_text=END, max_pairs=2, min_count=1).tables()
    tables.save(str(tmp_path))
    text = np.array([1, 2, 3, 1])
    assert np.array_equal(load_tables(str(tmp_path), END).evidence(text), tables.evidence(text))
