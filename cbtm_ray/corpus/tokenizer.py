"""The tokenizer: train one, load one, write one to the run, and texts to token ids."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbtm_ray import files
from cbtm_ray.errors import UserError

ENCODED_AT_ONCE = 512  # texts: the tokenizer keeps about 100 bytes a token until all of them are encoded
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's splitting, and one special token that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    )


def load_tokenizer(folder_or_name: str) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer from a folder, a URI of one, or a name.

    Raises:
        UserError: there is none, or it has no end-of-text token to put between documents.
        OSError: its store cannot be reached.
    """
    with files.loading(folder_or_name, f"tokens.tokenizer={folder_or_name!r} cannot be loaded") as found:
        tokenizer = _open_tokenizer(found)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokens.tokenizer={folder_or_name!r} has no end-of-text token (eos_token). Use one that has.")
    return tokenizer


def _open_tokenizer(folder_or_name: str) -> PreTrainedTokenizerBase:
    """What AutoTokenizer gives. It imports all that generates text, 2.5 s of CPU in every worker that only tokenizes, so a
    tokenizer of no special class and with no model beside it, as a run's own is, is opened without it."""
    settings = Path(folder_or_name, "tokenizer_config.json")
    plain = settings.is_file() and not settings.with_name("config.json").exists()
    if plain and json.loads(settings.read_text()).get("tokenizer_class") == PreTrainedTokenizerFast.__name__:
        return PreTrainedTokenizerFast.from_pretrained(folder_or_name)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder_or_name)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """V: one more than the largest id. `len(tokenizer)` counts the tokens, which are fewer where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, uri: str) -> str:
    """Write a tokenizer's folder; a hash of its vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files.publish_folder(folder, uri)
    return files.fingerprint(tokenizer.get_vocab())


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, int32, without special tokens: a text that spells one out is text like any other."""
    starts = range(0, len(texts), ENCODED_AT_ONCE)
    parts = (_encode(tokenizer, texts[start : start + ENCODED_AT_ONCE]) for start in starts)
    return [np.asarray(ids, dtype=np.int32) for part in parts for ids in part]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    end, end_id = str(tokenizer.eos_token), tokenizer.eos_token_id
    for index, text in enumerate(texts):
        if len(end) > 1 and end in text and end_id in encoded[index]:  # a piece of the vocabulary too, as of T5's
            first, *rest = text.split(end)
            pieces = [first, *(piece for part in rest for piece in (end[:-1], end[-1] + part))]
            encoded[index] = [token for ids in _encode(tokenizer, pieces) for token in ids]
    return list(encoded)
