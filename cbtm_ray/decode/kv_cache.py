"""The KV cache of one expert for many sequences, and the forward pass of a batch of chunks over it.

B chunks, C tokens of the longest chunk, L tokens of the longest sequence up to the end of its chunk, S slots, H heads,
D dimensions of a head, V vocabulary.

A slot holds the keys and values of one token. A sequence owns its slots from when it joins until it leaves, the same slots in
every expert. So each expert has memory for S tokens whatever the lengths of the sequences are, and truncating a sequence costs
nothing: the mask lets a query see its own sequence up to itself, and later entries are overwritten.
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
    """Consecutive tokens of one sequence to read, from the position `start` on; `slots` are the sequence's, by position."""

    tokens: list[int]
    start: int
    slots: Tensor

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


PADDING_TOKENS = 32
"""At most so many tokens of a pass are padding; one pass more costs about as much as these."""


def length_buckets(chunks: list[tuple[T, Chunk]]) -> Iterator[list[tuple[T, Chunk]]]:
    """Split chunks into batches of similar length, so that right-padding each batch adds few tokens."""
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
    """UserError: the model has sliding-window attention, which the masks here do not implement."""
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise UserError(
            f"sliding_window={window} of a {config.model_type} model must be null: decoding attends to the whole context. "
            "Train from another model."
        )


class KVCache(Cache):
    """Keys and values that one expert has computed, in memory that is allocated once."""

    def __init__(self, n_slots: int) -> None:
        super().__init__(layers=[])
        self.padding_slot = n_slots
        """One slot more, where padding tokens write their keys and values."""
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: keys and values, each (S + 1, H, D)."""

    @torch.inference_mode()
    def forward(self, model: Any, chunks: list[Chunk]) -> list[np.ndarray]:
        """One forward pass over the chunks.

        Args:
            model: the expert; it need not stay in memory between two calls.
            chunks: all tokens before each chunk must have been read.

        Returns:
            For each chunk the log-probabilities after every one of its tokens, float32 (its tokens, V).
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
        self._set_slots(chunks, device)
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

    def _set_slots(self, chunks: list[Chunk], device: torch.device) -> None:
        """Set the slots where the layers write the chunks, and the slots where they read the whole sequences."""
        first = chunks[0]
        self._new_slots: Tensor | slice
        self._all_slots: Tensor | slice
        begin, end = int(first.slots[0]), int(first.slots[first.end - 1]) + 1
        if len(chunks) == 1 and end - begin == first.end:  # consecutive slots: no copies
            self._new_slots, self._all_slots = slice(begin + first.start, end), slice(begin, end)
            return
        written = [chunk.slots[chunk.start : chunk.end] for chunk in chunks]
        new_BC = pad_sequence(written, batch_first=True, padding_value=self.padding_slot)
        self._new_slots = new_BC.flatten().to(device)
        self._all_slots = pad_sequence([chunk.slots[: chunk.end] for chunk in chunks], batch_first=True).to(device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by each layer: store new keys and values (B, H, C, D); return those of the whole sequences (B, H, L, D)."""
        if layer_idx not in self.memory:
            # Zeros: an attention weight of 0 times NaN would be NaN.
            shape = (self.padding_slot + 1, key_states.shape[1], key_states.shape[3])
            self.memory[layer_idx] = key_states.new_zeros(shape), value_states.new_zeros(shape)
        keys_SHD, values_SHD = self.memory[layer_idx]
        return self._store_and_gather(keys_SHD, key_states), self._store_and_gather(values_SHD, value_states)

    def _store_and_gather(self, memory_SHD: Tensor, new_BHCD: Tensor) -> Tensor:
        memory_SHD[self._new_slots] = new_BHCD.transpose(1, 2).flatten(0, 1)
        if isinstance(self._all_slots, slice):
            return memory_SHD[self._all_slots][None].transpose(1, 2)
        # On a CPU this takes a quarter of the time of indexing with a tensor (docs/LOG.md).
        found = memory_SHD.flatten(1).index_select(0, self._all_slots.flatten())
        return found.view(*self._all_slots.shape, *memory_SHD.shape[1:]).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: models would count positions from it, but `forward` passes the positions."""
        return 0
