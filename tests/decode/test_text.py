"""Text that comes in pieces is the whole text, up to a stop string."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbtm_ray.corpus.tokenizer import train_tokenizer
from cbtm_ray.decode.text import TextAssembler
from cbtm_ray.errors import UserError

TOKENIZER = train_tokenizer(["the ship sailed over the waves"] * 3, 280)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["\u2581", "\u2581the", "\u2581ship", "s", "\u00e9", "\u65e5\u672c", "\ufffd"]


def with_pieces(decoder: decoders.Decoder, *pieces: str) -> PreTrainedTokenizerFast:
    """A tokenizer of these pieces, the end-of-text token last."""
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def spaces(*more: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("\u2581", " "), *more])


class InPython(PreTrainedTokenizer):
    """Decodes as the SentencePiece tokenizers do that transformers has no fast version of, such as GPT-SW3's."""

    def get_vocab(self) -> dict[str, int]:
        return {piece: number for number, piece in enumerate([*PIECES, "</s>"])}

    @property
    def vocab_size(self) -> int:
        return len(PIECES) + 1

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index: int) -> str:
        return [*PIECES, "</s>"][index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("\u2581", " ").strip()


# As of Llama 2's: pieces, bytes of other characters, and no space in front.
FALLBACK = with_pieces(spaces(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)), *BYTES, *PIECES)
WHOLE_CHARACTERS = {
    "byte-level": TOKENIZER,
    "metaspace": with_pieces(decoders.Metaspace(), *PIECES),
    "in Python": InPython(eos_token="</s>"),
    "word pieces": with_pieces(decoders.WordPiece(), "the", "ship", "##s", "##ed", ".", ",", "'", "##'", "##t"),
}


def streamed(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    assembler = TextAssembler(tokenizer)
    return "".join([*map(assembler.push, token_ids), assembler.finish()])


@given(token_ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12), size=st.integers(2, 5))
def test_tokens_may_come_several_at_once(token_ids: list[int], size: int) -> None:
    assembler = TextAssembler(TOKENIZER)
    pieces = [assembler.push(*token_ids[at : at + size]) for at in range(0, len(token_ids), size)]
    assert "".join([*pieces, assembler.finish()]) == streamed(TOKENIZER, token_ids)


@pytest.mark.parametrize("kind", WHOLE_CHARACTERS)
@given(data=st.data())
def test_any_tokens_read_as_they_read_together(kind: str, data: st.DataObject) -> None:
    """Special tokens, and bytes that are no UTF-8, among them."""
    tokenizer = WHOLE_CHARACTERS[kind]
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    assert streamed(tokenizer, token_ids) == tokenizer.decode(token_ids)


@given(parts=st.lists(st.sampled_from([*PIECES, "</s>", " ", "\n", "\u00e9", "\u20ac", "\U0001f6a2"]), max_size=8))
def test_characters_in_bytes_read_as_they_read_together(parts: list[str]) -> None:
    known = set(PIECES) | {"</s>"}
    tokens = [([part] if part in known else [BYTES[byte] for byte in part.encode()]) for part in parts]
    token_ids = FALLBACK.convert_tokens_to_ids([*itertools.chain(*tokens)])
    assert streamed(FALLBACK, token_ids) == FALLBACK.decode(token_ids)


def subsequence(part: str, whole: str) -> bool:
    characters = iter(whole)
    return all(character in characters for character in part)


@settings(max_examples=300)
@given(token_ids=st.lists(st.integers(0, len(FALLBACK) - 1), max_size=12))
@example([0x4E, 0x8B, FALLBACK.eos_token_id])  # the two of which tokenizers 0.23's DecodeStream raises an exception
@example([256 + 3, 0x3D, 0x7B, 0xE1, 0xDD, 0x4D, FALLBACK.eos_token_id, 0xC0])
def test_bytes_that_are_no_character_lose_nothing_else(token_ids: list[int]) -> None:
    """Read together, one of them makes all bytes beside it unreadable, those too that were given already."""
    assert subsequence(FALLBACK.decode(token_ids).replace("\ufffd", ""), streamed(FALLBACK, token_ids))


def test_a_stray_byte_after_characters_in_bytes_is_one_character() -> None:
    ship = list("\U0001f6a2".encode())
    assert streamed(FALLBACK, ship + ship + ship[:1]) == "\U0001f6a2\U0001f6a2\ufffd"
    assert streamed(FALLBACK, [*ship, 0xFF, 256 + 1]) == "\U0001f6a2\ufffd the"


def pieces(text: str, *stop: str) -> tuple[list[str], TextAssembler]:
    assembler = TextAssembler(TOKENIZER, stop)
    shown = []
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        shown.append(assembler.push(token))
        if assembler.stopped:
            return shown, assembler
    return [*shown, assembler.finish()], assembler


@given(text=st.text(max_size=30), stop=st.lists(st.text("abs \u00e9", min_size=1, max_size=3), max_size=2))
def test_pieces_add_up_to_the_text_before_the_stop_string_that_ends_first(text: str, stop: list[str]) -> None:
    shown, assembler = pieces(text, *stop)
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    assert "".join(shown) == (text[: min(found)[1]] if found else text)
    assert assembler.stopped == bool(found)


def test_a_character_comes_when_its_last_byte_has() -> None:
    assert pieces("\U0001f6a2!")[0] == ["", "", "", "\U0001f6a2", "!", ""]


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_sure() -> None:
    assembler = TextAssembler(TOKENIZER, ["xyz"])
    x, y, z, q = TOKENIZER("xyzq", add_special_tokens=False)["input_ids"]
    assert [assembler.push(token) for token in (q, x, x, y, q, x, y)] == ["q", "", "x", "", "xyq", "", ""]
    assert assembler.held == 2
    assert assembler.finish() == "xy"
    assert not assembler.stopped
    assembler = TextAssembler(TOKENIZER, ["xyz"])
    assert [assembler.push(token) for token in (q, x, y, z, q)] == ["q", "", "", "", ""]
    assert assembler.stopped
    assert assembler.finish() == ""


def test_bytes_that_are_no_character_come_at_the_end() -> None:
    assembler = TextAssembler(TOKENIZER)
    first_byte = TOKENIZER("\U0001f6a2", add_special_tokens=False)["input_ids"][0]
    assert assembler.push(first_byte) == ""
    assert assembler.finish() == "\ufffd"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="stop='' must be at least one character"):
        TextAssembler(TOKENIZER, ["a", ""])
