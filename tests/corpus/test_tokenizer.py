"""The tokenizer: round trips, what is refused, and texts that spell out special tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cbtm_ray.cluster.embed import TokenTfidf, silent_tokens
from cbtm_ray.config import SeedModelConfig
from cbtm_ray.corpus.tokenizer import (
    END_OF_TEXT,
    encode,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from cbtm_ray.errors import UserError
from cbtm_ray.models import new_model

TEXTS = ["the ship sailed over the waves and the captain slept", "stir the butter and the flour", "caf\u00e9"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=300)


@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (ids,) = encode(tokenizer, [text])
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


def test_a_saved_tokenizer_is_opened_as_hugging_face_opens_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_tokenizer(tokenizer, str(tmp_path / "t"))
    ours, theirs = load_tokenizer(str(tmp_path / "t")), AutoTokenizer.from_pretrained(tmp_path / "t")
    assert (type(ours), ours.init_kwargs, ours.get_vocab()) == (type(theirs), theirs.init_kwargs, theirs.get_vocab())
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert (ours.eos_token_id, ours.all_special_ids) == (theirs.eos_token_id, theirs.all_special_ids)


def test_a_trained_tokenizer_has_all_bytes_merges_and_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert len(encode(tokenizer, ["the ship"])[0]) < len("the ship")


def test_encoding_adds_no_special_tokens_and_keeps_the_order(tokenizer: PreTrainedTokenizerFast) -> None:
    together = encode(tokenizer, TEXTS)
    assert all(0 not in ids for ids in together)
    assert [ids.tolist() for ids in together] == [encode(tokenizer, [text])[0].tolist() for text in TEXTS]
    assert encode(tokenizer, []) == []
    assert encode(tokenizer, [""])[0].tolist() == []


def test_training_is_the_same_every_time(tokenizer: PreTrainedTokenizerFast) -> None:
    assert train_tokenizer(TEXTS, vocab_size=300).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_saved_tokenizer_loads_as_itself(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, scheme: str) -> None:
    save_tokenizer(tokenizer, f"{scheme}{tmp_path}/tokenizer")
    back = load_tokenizer(f"{scheme}{tmp_path}/tokenizer")
    assert back.eos_token_id == 0
    assert back.get_vocab() == tokenizer.get_vocab()
    texts = [*TEXTS, "  two  spaces \n\n", "\U0001f600 x"]
    assert [ids.tolist() for ids in encode(back, texts)] == [ids.tolist() for ids in encode(tokenizer, texts)]
    assert back.decode(encode(back, ["a , b ."])[0]) == "a , b ."


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens\.tokenizer='.*nowhere' cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_folder_without_a_tokenizer_is_refused_by_field_and_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens\.tokenizer='.*' cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no end-of-text token \(eos_token\)\. Use one that has"):
        load_tokenizer(str(tmp_path))


def test_a_text_that_spells_out_the_end_of_text_does_not_end() -> None:
    tokenizer = train_tokenizer(["a captain of <|endoftext|> the harbour"], vocab_size=300)
    (ids,) = encode(tokenizer, ["the <|endoftext|> harbour"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids.tolist()) == "the <|endoftext|> harbour"


def test_a_piece_of_the_vocabulary_that_is_the_end_of_text_does_not_end_a_text_either() -> None:
    scores = {"<unk>": 0.0, "</s>": -1.0, "\u2581the": -2.0, "\u2581sea": -2.0, "\u2581": -3.0, "</s": -4.0, ">": -4.0}
    pieces = Tokenizer(Unigram(list(scores.items()), unk_id=0))
    pieces.pre_tokenizer = Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", eos_token="</s>")
    first, second, alone = encode(tokenizer, ["the </s> sea", "the sea", "</s>"])
    assert not any(tokenizer.eos_token_id in ids for ids in (first, second, alone))
    assert second.tolist() == [2, 3]
    assert [token for token in first if token != 4] == [2, 5, 6, 3]


@pytest.fixture(scope="module")
def gappy() -> PreTrainedTokenizerFast:
    """Some ids are no token's, and an added token has the largest."""
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "ship": 7, "the": 40}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens(["<harbour>"])
    return tokenizer


def test_a_tokenizer_with_gaps_is_taken_as_it_is(gappy: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(gappy, str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    added = tokenizer.convert_tokens_to_ids("<harbour>")
    (ids,) = encode(tokenizer, ["the <harbour> ship"])
    assert ids.tolist() == [40, added, 7]
    assert vocabulary_size(tokenizer) == max(40, added) + 1 > len(tokenizer)
    sizes = SeedModelConfig(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=16, train_tokens=1)
    model = new_model(sizes, tokenizer, 16, 0)
    model(torch.from_numpy(ids[None].astype(np.int64)))
    silent_V = silent_tokens(tokenizer)
    assert [bool(silent_V[token]) for token in (2, 7, 40, added)] == [True, False, True, False], (
        "no token, and a stop word"
    )
    TokenTfidf.fit([ids, ids[:1], ids[2:]], silent_V, dimensions=1, random_state=0).transform([ids])
