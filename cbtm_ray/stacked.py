"""Experts of one process in one pass: a model of their stacked weights, in whose batches every expert has as many rows.

E experts, B rows of each, C tokens.

A pass of one row costs a small model, or a GPU, about as much as one of many, and experts differ in their weights only. The
model's own code runs: its rows are those of the first expert, then of the second, and what holds weights is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cbtm_ray.kv_cache import Chunk, KVCache
from cbtm_ray.paging import PagedExperts

STACKABLE = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Architectures (`model_type`) all of whose weights are in layers that can be stacked; tested."""


class Stack:
    """The parameters of alike models, one above the other. The models' own become views: weights are in memory once."""

    def __init__(self) -> None:
        self._done: dict[int, Tensor] = {}  # by the first model's parameter, which layers may share

    def of(self, layers: list[Any], name: str) -> Tensor | None:
        """A parameter of a layer of all experts, (E, ...). None: the layer has none of that name."""
        if getattr(layers[0], name, None) is None:
            return None
        parameters: list[nn.Parameter] = [getattr(layer, name) for layer in layers]
        if (found := self._done.get(id(parameters[0]))) is None:
            found = self._done[id(parameters[0])] = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, row in zip(parameters, found, strict=True):
                parameter.data = row
        return found


class _Stacked(nn.Module):
    """One layer of all experts."""

    def __init__(self, layers: list[Any], stack: Stack) -> None:
        super().__init__()
        self.n_experts = len(layers)
        weight = stack.of(layers, "weight")
        assert weight is not None
        self.weight, self.bias = weight, stack.of(layers, "bias")

    def by_expert(self, rows: Tensor) -> Tensor:
        """(E * B, ...) -> (E, B, ...)"""
        return rows.unflatten(0, (self.n_experts, -1))


class _Linear(_Stacked):
    """Of nn.Linear, whose weights are (out, in), and of GPT-2's Conv1D, whose are (in, out)."""

    def __init__(self, layers: list[Any], stack: Stack) -> None:
        super().__init__(layers, stack)
        self._inputs_first = self.weight if isinstance(layers[0], Conv1D) else self.weight.mT

    def forward(self, rows: Tensor) -> Tensor:
        found = torch.bmm(self.by_expert(rows).flatten(1, -2), self._inputs_first)
        if self.bias is not None:
            found += self.bias[:, None]
        return found.view(*rows.shape[:-1], -1)


class _Embedding(_Stacked):
    def forward(self, ids: Tensor) -> Tensor:
        first_E1 = torch.arange(self.n_experts, device=ids.device)[:, None] * self.weight.shape[1]
        return F.embedding((self.by_expert(ids).flatten(1) + first_E1).view(ids.shape), self.weight.flatten(0, 1))


class _Norm(_Stacked):
    """Of any norm with a weight for each of the last dimension's entries."""

    def __init__(self, layers: list[Any], stack: Stack) -> None:
        super().__init__(layers, stack)
        self._plain = copy.deepcopy(layers[0])
        self._plain.weight.data = torch.ones_like(self._plain.weight)
        if self.bias is not None:
            self._plain.bias.data = torch.zeros_like(self._plain.bias)

    def forward(self, rows: Tensor) -> Tensor:
        found = self.by_expert(self._plain(rows))
        for parameter, combine in ((self.weight, torch.mul), (self.bias, torch.add)):
            if parameter is not None:
                found = combine(found, parameter.view(self.n_experts, *[1] * (found.dim() - 2), -1))
        return found.flatten(0, 1)


def stack_models(models: list[PreTrainedModel]) -> PreTrainedModel:
    """A model of batches (E * B, C), the rows of each expert together. The models' parameters become views of its own."""
    stacked, stack = copy.deepcopy(models[0]), Stack()
    for name, layer in list(models[0].named_modules()):
        if next(layer.parameters(recurse=False), None) is not None:
            stacked.set_submodule(name, _stacked_layer([model.get_submodule(name) for model in models], stack))
    return stacked


def _stacked_layer(layers: list[Any], stack: Stack) -> nn.Module:
    if isinstance(layers[0], nn.Linear | Conv1D):
        return _Linear(layers, stack)
    if isinstance(layers[0], nn.Embedding):
        return _Embedding(layers, stack)
    assert type(layers[0]).__name__.endswith("Norm"), "an architecture of STACKABLE has no other layers"
    return _Norm(layers, stack)


def can_stack(experts: Mapping[int, PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether there are several, all in memory for good, and of an architecture that can."""
    paged = isinstance(experts, PagedExperts) and experts.resident < len(experts)
    return len(experts) > 1 and not paged and config.model_type in STACKABLE


class StackedExperts:
    """Reads for all experts at once. Each can still be run alone, and has read what it has read here."""

    def __init__(self, experts: Mapping[int, PreTrainedModel], caches: dict[int, KVCache]) -> None:
        """
        Args:
            experts: alike but for their weights, of an architecture in STACKABLE; they stay in memory for good.
            caches: theirs in the same order, which have read nothing yet.
        """
        self._experts, self._model = list(experts), stack_models(list(experts.values()))
        self._stride = next(iter(caches.values())).trash + 1
        self._cache = KVCache(len(caches) * self._stride - 1)
        self.read({})  # so that the layers' memory is there
        for row, cache in enumerate(caches.values()):
            own = slice(row * self._stride, (row + 1) * self._stride)
            cache.memory = {layer: (keys[own], values[own]) for layer, (keys, values) in self._cache.memory.items()}

    def read(self, chunks: dict[int, list[Chunk]]) -> dict[int, list[np.ndarray]]:
        """What `KVCache.read` gives, for every expert that is named; the others run too, for nobody."""
        rows = max((len(theirs) for theirs in chunks.values()), default=1)
        padded = []
        for place, expert in enumerate(self._experts):
            first, theirs = place * self._stride, chunks.get(expert, [])
            padded += [Chunk(chunk.tokens, chunk.start, chunk.slots + first) for chunk in theirs]
            padded += [Chunk([0], 0, torch.tensor([first + self._stride - 1]))] * (rows - len(theirs))
        found = self._cache.read(self._model, padded)
        return {
            expert: found[place * rows :][: len(chunks[expert])]
            for place, expert in enumerate(self._experts)
            if expert in chunks
        }
