"""One expert's keys and values of many sequences, and the forward pass that reads a chunk of each of several at once.

B chunks, C tokens of the longest, L tokens of the longest text up to its chunk's end, S slots, H heads, D dimensions of a
head, V vocabulary.

A slot holds one token's keys and values. A sequence owns slots from when it joins to when it leaves, the same in every
expert, so memory is S slots an expert whatever the lengths are, and going back in a text costs nothing: the mask lets a
query see its own text up to itself, and what stands behind is overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PretrainedConfig

from cbtm_ray.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Tokens of one text to read, from the position `start` on; `slots` are the text's, by position."""

    tokens: list[int]
    start: int
    slots: Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


PADDING_TOKENS = 32
"""Of one pass at most; a pass more costs about as much as these."""


def passes(chunks: list[tuple[T, Chunk]]) -> Iterator[list[tuple[T, Chunk]]]:
    """Chunks that are read in one pass, right-padded: alike in length, so that little of it is padding."""
    batch: list[tuple[T, Chunk]] = []
    n_tokens = 0
    for pair in sorted(chunks, key=lambda pair: len(pair[1].tokens)):
        longest = len(pair[1].tokens)
        if (len(batch) + 1) * longest - (n_tokens + longest) > PADDING_TOKENS:
            yield batch
            batch, n_tokens = [], 0
        batch.append(pair)
        n_tokens += longest
    if batch:
        yield batch


def check_attention(config: PretrainedConfig) -> None:
    """UserError: the model attends to a window only, which the masks here do not know."""
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise UserError(
            f"sliding_window={window} of a {config.model_type} model must be null: decoding attends to the whole context. "
            "Train from another model."
        )


class KVCache(Cache):
    """What one expert has read, in memory that is taken once."""

    def __init__(self, n_slots: int) -> None:
        super().__init__(layers=[])
        self.trash = n_slots
        """One slot more, for what is read of padding."""
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: keys and values, each (S + 1, H, D)."""

    @torch.inference_mode()
    def read(self, model: Any, chunks: list[Chunk]) -> list[np.ndarray]:
        """Log-probabilities after every token of each chunk, float32 (its tokens, V).

        Args:
            model: the expert, which need not be in memory between two calls.
            chunks: everything before them must have been read.
        """
        device = model.device
        lengths = [len(chunk.tokens) for chunk in chunks]
        longest, lengths_B = max(lengths), torch.tensor(lengths)
        starts_B, columns_C = torch.tensor([chunk.start for chunk in chunks]), torch.arange(longest)
        is_token_BC = columns_C < lengths_B[:, None]
        # Padding repeats the last position, so that it is a valid one.
        positions_BC = starts_B[:, None] + columns_C.minimum(lengths_B[:, None] - 1)
        hidden_BCL = torch.arange(max(chunk.end for chunk in chunks)) > positions_BC[..., None]
        dtype = model.dtype
        mask_B1CL = torch.zeros(hidden_BCL.shape, dtype=dtype).masked_fill_(hidden_BCL, torch.finfo(dtype).min)[:, None]
        self._locate(chunks, device)
        padded = [chunk.tokens + [0] * (longest - len(chunk.tokens)) for chunk in chunks]
        logits_BCV = model(
            input_ids=torch.tensor(padded, device=device),
            position_ids=positions_BC.to(device),
            attention_mask=mask_B1CL.to(device),
            past_key_values=self,
            use_cache=True,
        ).logits
        logprobs_NV = logits_BCV[is_token_BC.to(device)].float().log_softmax(-1).cpu()
        return np.split(logprobs_NV.numpy(), np.cumsum(lengths)[:-1])

    def _locate(self, chunks: list[Chunk], device: torch.device) -> None:
        """Where the layers write the chunks' tokens, and where they find the texts."""
        first, one = chunks[0], len(chunks) == 1
        self._written: Tensor | slice
        self._texts: Tensor | slice
        if one and int(first.slots[first.end - 1]) - int(first.slots[0]) == first.end - 1:  # side by side: no copies
            begin = int(first.slots[0])
            self._written, self._texts = slice(begin + first.start, begin + first.end), slice(begin, begin + first.end)
            return
        written = [chunk.slots[chunk.start : chunk.end] for chunk in chunks]
        self._written = pad_sequence(written, batch_first=True, padding_value=self.trash).flatten().to(device)
        self._texts = pad_sequence([chunk.slots[: chunk.end] for chunk in chunks], batch_first=True).to(device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer calls: keep its new keys and values (B, H, C, D), and give those of the whole texts, (B, H, L, D)."""
        if layer_idx not in self.memory:
            # Zeros, for a weight of 0 does not hide what is no number.
            shape = (self.trash + 1, key_states.shape[1], key_states.shape[3])
            self.memory[layer_idx] = key_states.new_zeros(shape), value_states.new_zeros(shape)
        keys_SHD, values_SHD = self.memory[layer_idx]
        return self._exchange(keys_SHD, key_states), self._exchange(values_SHD, value_states)

    def _exchange(self, memory_SHD: Tensor, new_BHCD: Tensor) -> Tensor:
        memory_SHD[self._written] = new_BHCD.transpose(1, 2).flatten(0, 1)
        if isinstance(self._texts, slice):
            return memory_SHD[self._texts][None].transpose(1, 2)
        # A quarter of the time that indexing with a tensor takes on a CPU (docs/LOG.md).
        found = memory_SHD.flatten(1).index_select(0, self._texts.flatten())
        return found.view(*self._texts.shape, *memory_SHD.shape[1:]).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Models count positions from here; they are given instead."""
        return 0
