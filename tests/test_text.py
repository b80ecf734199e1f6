"""Text that comes in pieces is the whole text, up to a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.errors import UserError
from cbtm_ray.text import TextAssembler
from cbtm_ray.tokens import train_tokenizer

TOKENIZER = train_tokenizer(["the ship sailed over the waves"] * 3, 280)


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
