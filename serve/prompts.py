"""The token ids of a request's prompts."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cbtm_ray.corpus.tokenizer import encode

from .limits import Refused, out_of_bounds
from .protocol import ChatRequest


class PromptReader:
    """Encodes prompts in a thread of its own: a long one must not hold up the streams."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        """
        Args:
            max_tokens: most of a prompt.
        """
        # A tokenizer is not for several threads: one more for this one.
        self._tokenizer, self._thread = copy.deepcopy(tokenizer), ThreadPoolExecutor(1)
        self._max_tokens, self._longest_token = max_tokens, max(len(token) for token in tokenizer.get_vocab())

    async def tokens(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a text, or those given. Refused: too many, or not of the vocabulary."""
        if isinstance(prompt, str):
            if len(prompt) > self._max_tokens * self._longest_token:  # sure without reading it
                raise self._too_long()
            return self._checked((await self._in_thread(encode, self._tokenizer, [prompt]))[0].tolist())
        return self._checked(prompt)

    async def chat_tokens(self, request: ChatRequest) -> list[int]:
        """The token ids of a chat. Refused: too many, or the tokenizer's template will not take it."""
        return self._checked(await self._in_thread(chat_prompt, self._tokenizer, request))

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _checked(self, prompt: list[int]) -> list[int]:
        if len(prompt) > self._max_tokens:
            raise self._too_long()
        if prompt and max(prompt) >= len(self._tokenizer):
            raise out_of_bounds("prompt", f"prompt: token ids must be from 0 to {len(self._tokenizer) - 1}.")
        return prompt

    def _too_long(self) -> Refused:
        return out_of_bounds("prompt", f"prompt: must have at most {self._max_tokens} tokens.")


def chat_prompt(tokenizer: PreTrainedTokenizerBase, request: ChatRequest) -> list[int]:
    """The messages as the tokenizer's chat template writes them.

    Raises:
        Refused: it has none, or will not take these messages.
    """
    if not tokenizer.chat_template:
        message = "This run's tokenizer has no chat template. Use /v1/completions."
        raise Refused(400, message, param="messages", code="no_chat_template")
    messages = [message.model_dump() for message in request.messages]
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except TemplateError as problem:
        raise Refused(400, f"messages: {problem.message}", param="messages", code="invalid_value") from None
