"""The paper's embedding against scikit-learn's own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from transformers import PreTrainedTokenizerBase

from cbtm_ray.cluster.embed import fit_embedder, load_embedder, save_embedder
from cbtm_ray.cluster.word_tfidf import WordTfidf, words_of
from cbtm_ray.config import EmbedConfig
from cbtm_ray.corpus.tokenizer import encode, train_tokenizer
from cbtm_ray.errors import UserError
from tests.support.embedded import contexts, texts


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(texts(80), vocab_size=320)


def fit(tokenizer: PreTrainedTokenizerBase, *, standardize: bool, dimensions: int = 5) -> WordTfidf:
    documents = encode(tokenizer, texts(80))
    return WordTfidf.fit(documents, tokenizer, dimensions=dimensions, standardize=standardize, random_state=3)


@pytest.mark.parametrize("normalisation", ["l2", "standard"])
def test_the_configuration_names_the_normalisation(tokenizer: PreTrainedTokenizerBase, normalisation: str) -> None:
    documents = encode(tokenizer, texts(80))
    config = EmbedConfig(embedder="word_tfidf", dimensions=5, normalisation=normalisation)
    expected = fit(tokenizer, standardize=normalisation == "standard").transform(documents)
    assert np.array_equal(fit_embedder(config, tokenizer, documents, 3).transform(documents), expected)


def test_words_leave_out_stop_words_and_numbers() -> None:
    assert words_of("The 3rd Caf\u00e9 of 1999, x2 a-b re-read it") == ["caf\u00e9", "x2", "read"]


@pytest.mark.parametrize("standardize", [False, True])
def test_word_tfidf_is_scikit_learns_pipeline(tokenizer: PreTrainedTokenizerBase, standardize: bool) -> None:
    pipeline = make_pipeline(
        TfidfVectorizer(analyzer=words_of),
        TruncatedSVD(n_components=5, random_state=3),
        StandardScaler() if standardize else Normalizer(),
    ).fit(texts(80))
    embedder = fit(tokenizer, standardize=standardize)
    for given in (texts(80), texts(20, seed=1), ["", "the of", "captain"]):
        found = embedder.transform(encode(tokenizer, given))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, pipeline.transform(given), atol=1e-4)


@pytest.mark.parametrize("standardize", [False, True])
def test_every_word_prefix_embeds_as_a_document(tokenizer: PreTrainedTokenizerBase, standardize: bool) -> None:
    embedder = fit(tokenizer, standardize=standardize)
    text = (
        "Caf\u00e9 captain\u2019s  harbour,harbour\n\nthe 1999 x2 oven \u4e16\u754c galaxygalaxy " + texts(1, seed=5)[0]
    )
    (tokens,) = encode(tokenizer, [text])
    expected = embedder.transform([tokens[:t] for t in range(len(tokens))])
    np.testing.assert_allclose(embedder.prefix_embeddings(tokens), expected, atol=1e-5)
    np.testing.assert_allclose(contexts(embedder, tokens), expected, atol=1e-5)
    assert embedder.prefix_embeddings(tokens[:0]).shape == embedder.transform([]).shape == (0, 5)


@pytest.mark.parametrize("standardize", [False, True])
def test_word_tfidf_comes_back_from_its_folder(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, standardize: bool
) -> None:
    embedder = fit(tokenizer, standardize=standardize)
    config = EmbedConfig(embedder="word_tfidf", normalisation="standard" if standardize else "l2", dimensions=5)
    save_embedder(embedder, config, str(tmp_path))
    documents = encode(tokenizer, texts(9, seed=2))
    loaded = load_embedder(str(tmp_path), tokenizer)
    assert np.array_equal(loaded.transform(documents), embedder.transform(documents))


def test_more_dimensions_than_words_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"embed\.dimensions=500 must be at most \d+, what the corpus sample has"):
        fit(tokenizer, standardize=False, dimensions=500)
    silent = encode(tokenizer, ["the of 12"] * 9)
    with pytest.raises(UserError, match=r"embed\.dimensions=2 must be at most 0"):
        WordTfidf.fit(silent, tokenizer, dimensions=2, standardize=False, random_state=0)
