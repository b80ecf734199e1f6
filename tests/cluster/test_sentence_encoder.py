"""A real sentence encoder against its plain use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from cbtm_ray.cluster import sentence_encoder
from cbtm_ray.cluster.embed import load_embedder, save_embedder
from cbtm_ray.cluster.sentence_encoder import SentenceEncoder, load_encoder
from cbtm_ray.config import EmbedConfig
from cbtm_ray.corpus.tokenizer import encode, train_tokenizer
from cbtm_ray.errors import UserError
from tests.support.embedded import contexts, texts
from tests.support.minilm import minilm_folder
from tests.support.tiny import DOMAINS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(texts(80), vocab_size=320)


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
    documents = encode(tokenizer, texts(3))
    assert {"batch_documents", "gpus"}.isdisjoint(json.loads((tmp_path / "embedder.json").read_text()))
    loaded = load_embedder(str(tmp_path), tokenizer, batch_documents=2)
    np.testing.assert_allclose(loaded.transform(documents), encoder.transform(documents), atol=1e-6)


def test_an_encoder_that_is_not_there_or_too_short_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    nowhere = EmbedConfig(embedder="sentence", encoder=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"embed\.encoder=.*none' cannot be loaded"):
        SentenceEncoder.open(nowhere, tokenizer)
    long = EmbedConfig(embedder="sentence", encoder=minilm_folder(), encoder_tokens=300)
    with pytest.raises(UserError, match=r"embed\.encoder_tokens=300 must be at most 256"):
        SentenceEncoder.open(long, tokenizer)


def small_encoder(tmp_path: Path, pad: str | None, **config: Any) -> EmbedConfig:
    """RoBERTa with positions for 64 tokens, two of which the tokenizer puts around a text."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(**sizes, vocab_size=20, max_position_embeddings=66, pad_token_id=1)).save_pretrained(
        tmp_path
    )
    words = Tokenizer(WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "?": 3, "word": 4}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token=pad).save_pretrained(tmp_path)
    return EmbedConfig(embedder="sentence", encoder=str(tmp_path), **config)


@pytest.mark.parametrize(
    ("pad", "tokens", "message"),
    [
        ("<pad>", 65, r"embed\.encoder_tokens=65 must be at most 64, the most that embed\.encoder='.*' reads"),
        ("<pad>", 2, r"embed\.encoder_tokens=2 must be above 2, the tokens that embed\.encoder='.*' puts around"),
        (None, 64, r"embed\.encoder='.*' has no padding token"),
    ],
)
def test_an_encoder_is_tried_at_its_limits(tmp_path: Path, pad: str | None, tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(small_encoder(tmp_path, pad, encoder_tokens=tokens))
    for within in (3, 64):
        load_encoder(small_encoder(tmp_path, "<pad>", encoder_tokens=within))


def test_an_encoder_that_pools_its_padding_is_refused(tmp_path: Path) -> None:
    config = small_encoder(tmp_path / "plain", "<pad>", encoder_tokens=8)
    model = SentenceTransformer(config.encoder)
    model[0].auto_model.forward = unmasked(model[0].auto_model.forward)
    with pytest.raises(UserError, match="embeds a text otherwise beside a longer one"):
        sentence_encoder._try_encoder(model, config)


def unmasked(forward: Callable[..., Any]) -> Callable[..., Any]:
    def all_seen(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        return forward(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask), **options)

    return all_seen


def test_an_encoder_pools_as_its_folder_says(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """BGE and others are of the first token's state, not of the mean; a prompt stands before every text."""
    folder = tmp_path / "first_state"
    shutil.copytree(minilm_folder(), folder)
    pooling = folder / "1_Pooling" / "config.json"
    sizes = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(sizes | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    settings = {"prompts": {"topic": "topic: "}, "default_prompt_name": "topic", "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    encoder = SentenceEncoder.open(EmbedConfig(embedder="sentence", encoder=f"file://{folder}"), tokenizer)
    (text,) = texts(1)
    own, model = AutoTokenizer.from_pretrained(minilm_folder()), AutoModel.from_pretrained(minilm_folder())
    with torch.no_grad():
        first_D = model(**own(f"topic: {text}", return_tensors="pt")).last_hidden_state[0, 0]
    expected_D = torch.nn.functional.normalize(first_D, dim=0).numpy()
    np.testing.assert_allclose(encoder.transform(encode(tokenizer, [text]))[0], expected_D, atol=1e-5)
