"""Clusters by likelihood: scores by hand and without a document's own pairs, rounds that find what made the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.cluster.likelihood import (
    Refined,
    Tokens,
    best_clusters,
    fit_model,
    left_out_scores,
    refine,
    score_step,
    token_shards,
)
from cbtm_ray.cluster.ngrams import count_pairs, smooth
from cbtm_ray.cluster.shard_steps import LocalShards

END = 0


def model_of(documents: list[np.ndarray], labels: list[int], vocabulary: int, n_clusters: int):  # type: ignore[no-untyped-def]
    counts = count_pairs(documents, labels, vocabulary=vocabulary, n_clusters=n_clusters, end_of_text=END)
    return smooth(counts, end_of_text=END, max_pairs=1000, min_count=1)


texts = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=2, max_size=5)


@given(texts=texts, data=st.data())
def test_a_document_is_scored_as_if_its_cluster_had_never_seen_it(texts: list[list[int]], data: st.DataObject) -> None:
    """Counted again without the document, with the same smoothing: what the whole corpus has is not left out."""
    documents = [np.array(text, np.int32) for text in texts]
    labels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(texts), max_size=len(texts))))
    model = model_of(documents, labels.tolist(), 5, 2)
    scores_NK = left_out_scores(model, documents, labels)
    for n, document in enumerate(documents):
        rest = [each for i, each in enumerate(documents) if i != n]
        alone = model_of(rest, np.delete(labels, n).tolist(), 5, 2)
        for cluster in range(2):
            wanted, before = 0.0, END
            for token in document.tolist():
                [row], [here] = (
                    np.searchsorted(alone.pairs, [before * 5 + token]),
                    np.isin([before * 5 + token], alone.pairs),
                )
                [known] = np.searchsorted(model.pairs, [before * 5 + token])
                count = alone.pair_PK[row, cluster] if here else 0.0
                numerator = count / model.bigram_P[known] + model.unseen_VK[token, cluster]
                wanted += np.log(numerator) - np.log(alone.context_VK[before, cluster] + 300)
                before = token
            assert scores_NK[n, cluster] == pytest.approx(wanted, abs=1e-4)


def generated(seed: int, n_documents: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Documents of two bigram chains over the same tokens, as often as each other: only their order tells them apart."""
    rng, steps = np.random.default_rng(seed), np.array([1, 3])
    gold = rng.integers(0, 2, n_documents)
    documents = []
    for chain in gold:
        jumps = np.where(rng.random(60) < 0.9, steps[chain], rng.integers(1, 8, 60))
        documents.append((1 + np.cumsum(jumps) % 8).astype(np.int32))
    return documents, gold


@pytest.mark.parametrize("balanced", [True, False])
def test_rounds_find_the_chains_that_made_the_documents(balanced: bool) -> None:
    documents, gold = generated(0, 300)
    wrong = np.random.default_rng(1).random(300) < 0.35
    start = Refined(0, np.where(wrong, 1 - gold, gold).astype(np.int32), gold, 1.0, 0.0)
    each = LocalShards(token_shards(documents, 60, 100)).each
    states = list(refine(each, start, Tokens(9, 2, END), rounds=8, balanced=balanced))
    last = states[-1]
    assert (last.best_N == gold).mean() > 0.99
    assert states[0].moved > 0.1
    if balanced:  # the sizes of the chains differ: the documents that make up for it may move on
        assert np.ptp(np.bincount(last.labels_N)) <= 1
        assert last.moved <= 0.05
    else:
        assert last.moved == 0
        assert len(states) < 8, "it ends when no document moves"
    tables = fit_model(each, last.labels_N, Tokens(9, 2, END)).tables()
    new, new_gold = generated(2, 100)
    assert (best_clusters(tables, new, 60) == new_gold).mean() > 0.98


def test_the_outcome_does_not_depend_on_how_documents_are_cut() -> None:
    documents, gold = generated(3, 120)
    start = Refined(0, (np.arange(120) % 2).astype(np.int32), gold, 1.0, 0.0)
    sizes = Tokens(9, 2, END)
    whole, parts = (
        list(refine(LocalShards(token_shards(documents, 40, rows)).each, start, sizes, rounds=3, balanced=True))
        for rows in (120, 7)
    )
    again = list(refine(LocalShards(token_shards(documents, 40, 50)).each, whole[0], sizes, rounds=3, balanced=True))
    for one, other in zip(whole, parts, strict=True):
        assert np.array_equal(one.labels_N, other.labels_N)
        assert one.evidence_nats == other.evidence_nats
    assert np.array_equal(again[-1].labels_N, whole[-1].labels_N), "resumed after the first round"


def test_only_the_first_tokens_are_read_and_long_shards_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    documents, gold = generated(4, 30)
    [shard] = token_shards(documents, 10, 30)
    assert shard.lengths_N.tolist() == [10] * 30
    model = model_of(shard.documents(), gold.tolist(), 9, 2)
    whole = score_step(shard, model, gold)
    monkeypatch.setattr("cbtm_ray.cluster.likelihood.SCORED_TOKENS", 25)
    assert np.array_equal(score_step(shard, model, gold), whole)
