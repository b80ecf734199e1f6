"""Detokenize a stream of tokens, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from cbtm_ray.errors import UserError

_INCOMPLETE = "\ufffd"  # a decoder writes it for bytes that are not, or not yet, a character


class TextAssembler:
    """Returns text as soon as it is final: no character whose bytes are still to come, nothing that may begin a stop string.

    Works with every tokenizer that has `decode`. DecodeStream of the tokenizers library raises "Invalid prefix" on bytes that
    are no UTF-8, which a model may generate, and never returns bytes that are still incomplete at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """UserError: a stop string is empty."""
        if not all(stop):
            raise UserError("stop='' must be at least one character. Leave it out.")
        self.stopped = False
        """Whether a stop string has come. The text ends before it."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._token_ids: list[int] = []
        self._context = 0  # decoding starts here: the text of a token may depend on the token before it
        self._done = 0  # the text of the tokens before this position has been decoded
        self._held = ""

    def push(self, *token_ids: int) -> str:
        """Take the next tokens; the text that is final now, often "". Of several at once none is known to end it."""
        self._token_ids.extend(token_ids)
        new = self._new_text()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._context, self._done = self._done, len(self._token_ids)
        return self._release(new, last=False)

    @property
    def held(self) -> int:
        """Characters that are held back because they may begin a stop string."""
        return len(self._held)

    def finish(self) -> str:
        """The rest of the text; no token follows."""
        return self._release(self._new_text(), last=True)

    def _new_text(self) -> str:
        before = self._decode(self._context, self._done)
        text = self._decode(self._context, len(self._token_ids))
        if text.startswith(before):
            return text[len(before) :]
        # Invalid bytes after valid ones make a decoder with byte fallback write all of them as U+FFFD.
        return self._decode(self._done, len(self._token_ids))

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._token_ids[start:end]))

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:  # the stop string that ends first, wherever the tokens are cut
            self.stopped = True
            return text[: min(found)[1]]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that the stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
