"""Token tf-idf: equal to scikit-learn's, exact on every prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize

from cbtm_ray import files
from cbtm_ray.cluster.embed import TokenTfidf, load_clusterer, save_embedder, silent_tokens
from cbtm_ray.config import EmbedConfig
from cbtm_ray.corpus.tokenizer import encode, train_tokenizer
from cbtm_ray.errors import UserError

VOCABULARY, DIMENSIONS = 40, 6
SILENT = np.arange(VOCABULARY) % 7 == 0
TABLE = np.random.default_rng(5).normal(size=(VOCABULARY, DIMENSIONS)) * ~SILENT[:, None]


def random_documents(count: int, seed: int = 0) -> list[np.ndarray]:
    """Documents with one of three preferred ranges of tokens, and a few tokens from everywhere."""
    random = np.random.default_rng(seed)
    return [
        np.concatenate(
            [
                random.integers(12 * (n % 3), 12 * (n % 3) + 14, random.integers(4, 30)),
                random.integers(0, VOCABULARY, 4),
            ]
        ).astype(np.int32)
        for n in range(count)
    ]


def fit(documents: list[np.ndarray], dimensions: int = DIMENSIONS) -> TokenTfidf:
    return TokenTfidf.fit(documents, SILENT, dimensions=dimensions, random_state=3)


def test_embeddings_are_those_of_scikit_learn() -> None:
    documents, unseen = random_documents(60), random_documents(20, seed=1)
    words = [
        [" ".join(f"t{v}" for v in document if not SILENT[v]) for document in part] for part in (documents, unseen)
    ]
    pipeline = make_pipeline(
        CountVectorizer(vocabulary=[f"t{token}" for token in range(VOCABULARY)]),
        TfidfTransformer(),
        TruncatedSVD(n_components=DIMENSIONS, random_state=3),
    )
    embedder = fit(documents)
    np.testing.assert_allclose(embedder.transform(documents), normalize(pipeline.fit_transform(words[0])), atol=1e-5)
    np.testing.assert_allclose(embedder.transform(unseen), normalize(pipeline.transform(words[1])), atol=1e-5)


def test_the_table_is_idf_times_the_components() -> None:
    """Tokens 1, 2 and 3 stand in three of five documents, 4 in one, 0 in none; components are orthonormal."""
    silent = np.zeros(5, bool)
    documents = [np.array(ids) for ids in ([1, 1, 2], [1], [3, 3], [2, 3], [4, 1, 2, 3])]
    embedder = TokenTfidf.fit(documents, silent, dimensions=3, random_state=0)
    assert embedder.table_VD.shape == (5, 3)
    assert embedder.table_VD.dtype == np.float32
    assert (embedder.table_VD[0] == 0).all()
    idf = np.log(6 / (1 + np.array([3, 3, 3, 1]))) + 1
    components = embedder.table_VD[1:] / idf[:, None]
    np.testing.assert_allclose(components.T @ components, np.eye(3), atol=1e-5)


def test_rows_have_unit_length() -> None:
    documents = random_documents(60)
    embeddings = fit(documents).transform(documents)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (60, DIMENSIONS)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_documents_of_one_topic_are_nearer_to_each_other() -> None:
    documents = random_documents(60)
    cosines = fit(documents).transform(documents) @ fit(documents).transform(documents).T
    same = np.arange(60)[:, None] % 3 == np.arange(60) % 3
    assert cosines[same].mean() > cosines[~same].mean() + 0.3


def test_silent_tokens_change_nothing_and_alone_give_zero() -> None:
    embedder = fit(random_documents(60))
    assert (embedder.table_VD[SILENT] == 0).all()
    quiet = np.flatnonzero(SILENT).astype(np.int32)
    embeddings = embedder.transform([quiet, np.array([1, 2]), np.array([0, 1, 7, 2, 14]), np.array([], np.int32)])
    assert (embeddings[[0, 3]] == 0).all()
    np.testing.assert_allclose(embeddings[1], embeddings[2], atol=1e-6)


def test_silent_tokens_of_the_sample_do_not_move_the_fit() -> None:
    documents = random_documents(60)
    louder = [np.concatenate([document, np.full(20, 7, np.int32)]) for document in documents]
    np.testing.assert_allclose(fit(louder).table_VD, fit(documents).table_VD, atol=1e-6)


def test_no_documents_give_no_rows() -> None:
    assert TokenTfidf(TABLE).transform([]).shape == (0, DIMENSIONS)


def test_fitting_is_the_same_every_time() -> None:
    documents = random_documents(60)
    assert np.array_equal(fit(documents).table_VD, fit(documents).table_VD)


@given(documents=st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=30), min_size=1, max_size=5))
def test_an_embedding_is_the_normalized_sum_of_rows(documents: list[list[int]]) -> None:
    embeddings = TokenTfidf(TABLE).transform([np.array(document, np.int32) for document in documents])
    for document, embedding in zip(documents, embeddings, strict=True):
        total = TABLE[document].sum(axis=0)
        np.testing.assert_allclose(embedding, total / max(np.linalg.norm(total), 1e-12), atol=1e-5)


@given(tokens=hnp.arrays(np.int32, st.integers(1, 40), elements=st.integers(0, VOCABULARY - 1)))
def test_every_prefix_embeds_as_a_document(tokens: np.ndarray) -> None:
    embedder = TokenTfidf(TABLE)
    prefixes = embedder.prefix_embeddings(tokens)
    assert prefixes.shape == (len(tokens), DIMENSIONS)
    assert prefixes.dtype == np.float32
    assert (prefixes[0] == 0).all()
    expected = embedder.transform([tokens[:t] for t in range(len(tokens))])
    np.testing.assert_allclose(prefixes, expected, atol=1e-5)


def test_an_empty_text_has_no_prefixes() -> None:
    assert TokenTfidf(TABLE).prefix_embeddings(np.array([], np.int32)).shape == (0, DIMENSIONS)


def test_the_last_prefix_of_a_long_text_is_exact() -> None:
    table = np.array([[1.0, 0.0], [0.0, 1e-4]], np.float32)
    tokens = np.array([0] * 20_000 + [1] * 20_000)
    last = TokenTfidf(table).prefix_embeddings(tokens)[-1]
    assert last[1] == pytest.approx(19_999 * 1e-4 / 20_000, rel=1e-5)


def test_silent_tokens_are_stop_words_and_all_without_a_letter() -> None:
    texts = ["the captain and the harbour of 1999, and the captain of the harbour in 1999"] * 20
    tokenizer = train_tokenizer(texts, vocab_size=330)
    silent = silent_tokens(tokenizer)
    assert (silent.shape, silent.dtype) == ((len(tokenizer),), bool)

    def is_silent(text: str) -> bool:
        (ids,) = encode(tokenizer, [text])
        assert len(ids) == 1, f"{text!r} is not one token"
        return bool(silent[ids[0]])

    loud = [" captain", " harbour", "b", "Z"]
    quiet = [" the", " and", " of", "the", " 1999", "7", ",", " ", "\n", "a", "I"]
    assert [text for text in loud if is_silent(text)] == []
    assert [text for text in quiet if not is_silent(text)] == []
    assert silent[encode(tokenizer, ["\u00e9"])[0]].all()  # bytes that are no letter by themselves


def test_an_embedder_and_its_centres_come_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a captain"], vocab_size=258)
    centers = np.random.default_rng(0).normal(size=(3, DIMENSIONS)).astype(np.float32)
    save_embedder(TokenTfidf(TABLE), EmbedConfig(), str(tmp_path / "embedder"))
    files.write_array(str(tmp_path / "centers.npy"), centers)
    embedder, loaded = load_clusterer(str(tmp_path), tokenizer)
    assert isinstance(embedder, TokenTfidf)
    assert np.array_equal(embedder.table_VD, TABLE.astype(np.float32))
    assert np.array_equal(loaded, centers)


@given(tokens=hnp.arrays(np.int32, st.integers(1, 40), elements=st.integers(0, VOCABULARY - 1)))
def test_a_context_grows_through_the_prefixes(tokens: np.ndarray) -> None:
    embedder = TokenTfidf(TABLE)
    context, rows = embedder.context(), []
    for token in tokens:
        rows.append(context.embedding())
        context.append(int(token))
    np.testing.assert_allclose(rows, embedder.prefix_embeddings(tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("documents", "bound"),
    [
        ([[1], [2], [3]], 2),  # three tokens leave two dimensions
        ([[1, 2, 3, 4], [5, 6, 8, 9]], 2),  # two documents
        ([[1, 2, 0, 7], [0, 14], [7, 3]], 2),  # 0, 7 and 14 are silent
    ],
)
def test_more_dimensions_than_the_sample_has_are_refused(documents: list[list[int]], bound: int) -> None:
    arrays = [np.array(document) for document in documents]
    with pytest.raises(UserError, match=rf"embed\.dimensions=3 must be at most {bound}, .* Lower it or give more"):
        fit(arrays, dimensions=3)
    assert fit(arrays, dimensions=bound).table_VD.shape == (VOCABULARY, bound)
