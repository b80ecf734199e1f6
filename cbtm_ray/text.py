"""Text out of tokens that come one by one, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from cbtm_ray.errors import UserError

_INCOMPLETE = "\ufffd"  # how a decoder shows bytes that are no character, or not yet


class TextAssembler:
    """Gives text as soon as it is sure: characters whose last byte has come, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """UserError: a stop string is empty."""
        if not all(stop):
            raise UserError("stop='' must be at least one character. Leave it out.")
        self.stopped = False
        """Whether a stop string has come. It and all after it are not part of the text."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._shown_tokens = 0  # those whose text has been given or held back
        self._context = 0  # where decoding begins: what a token reads like may depend on the one before
        self._held = ""

    def push(self, token: int) -> str:
        """Take the next token; the text that is sure now, "" if there is none."""
        self._tokens.append(token)
        new = self._new_text()
        if new.endswith(_INCOMPLETE):
            return ""
        self._context, self._shown_tokens = self._shown_tokens, len(self._tokens)
        return self._release(new, last=False)

    @property
    def held(self) -> int:
        """Characters that have come and are not sure yet."""
        return len(self._held)

    def finish(self) -> str:
        """The rest of the text; no token follows."""
        return self._release(self._new_text(), last=True)

    def _new_text(self) -> str:
        before = str(self._tokenizer.decode(self._tokens[self._context : self._shown_tokens]))
        return str(self._tokenizer.decode(self._tokens[self._context :]))[len(before) :]

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:  # the one that ends first, however the tokens are cut
            self.stopped = True
            return text[: min(found)[1]]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that the stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
