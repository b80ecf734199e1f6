"""All experts of a process in one forward pass: one model with their weights stacked.

E experts, B rows of each, C tokens.

On a small model, or a GPU, a pass of one row costs about as much as a pass of many, and experts differ in their weights only.
The code of the model runs unchanged on a batch of E * B rows, the rows of the first expert first. Only the layers that hold
weights are replaced by layers that hold the weights of all experts. `torch.func.vmap` would do this for any architecture, but
forbids the KV cache's writes in place.
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

from cbtm_ray.decode.kv_cache import Chunk, KVCache
from cbtm_ray.merge.paging import PagedExperts

STACKABLE = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Architectures (`model_type`) whose every layer with weights can be stacked; each is tested."""


class ParameterStack:
    """Stacks parameters of models of one architecture. The models' parameters become views: weights are in memory once."""

    def __init__(self) -> None:
        self._done: dict[int, Tensor] = {}  # by id of the first model's parameter, which layers may share

    def parameter(self, layers: list[Any], name: str) -> Tensor | None:
        """The parameter of one layer in all models, (E, ...), or None if the layer has no parameter of that name."""
        if getattr(layers[0], name, None) is None:
            return None
        parameters: list[nn.Parameter] = [getattr(layer, name) for layer in layers]
        if (found := self._done.get(id(parameters[0]))) is None:
            found = self._done[id(parameters[0])] = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, row in zip(parameters, found, strict=True):
                parameter.data = row
        return found


class _Stacked(nn.Module):
    """One layer with the weights of all experts."""

    def __init__(self, layers: list[Any], stack: ParameterStack) -> None:
        super().__init__()
        self.n_experts = len(layers)
        weight = stack.parameter(layers, "weight")
        assert weight is not None
        self.weight, self.bias = weight, stack.parameter(layers, "bias")

    def by_expert(self, rows: Tensor) -> Tensor:
        """(E * B, ...) -> (E, B, ...)"""
        return rows.unflatten(0, (self.n_experts, -1))


class _Linear(_Stacked):
    """Replaces nn.Linear, with weights (out, in), and GPT-2's Conv1D, with weights (in, out)."""

    def __init__(self, layers: list[Any], stack: ParameterStack) -> None:
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
    """Replaces any norm with one weight per entry of the last dimension: the plain norm, then the expert's weight and bias."""

    def __init__(self, layers: list[Any], stack: ParameterStack) -> None:
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
    """A model for batches (E * B, C), rows grouped by expert. The parameters of `models` become views of its parameters."""
    stacked, stack = copy.deepcopy(models[0]), ParameterStack()
    for name, layer in list(models[0].named_modules()):
        if next(layer.parameters(recurse=False), None) is not None:
            stacked.set_submodule(name, _stacked_layer([model.get_submodule(name) for model in models], stack))
    return stacked


def _stacked_layer(layers: list[Any], stack: ParameterStack) -> nn.Module:
    if isinstance(layers[0], nn.Linear | Conv1D):
        return _Linear(layers, stack)
    if isinstance(layers[0], nn.Embedding):
        return _Embedding(layers, stack)
    assert type(layers[0]).__name__.endswith("Norm"), "an architecture of STACKABLE has no other layers"
    return _Norm(layers, stack)


def can_stack(experts: Mapping[int, PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether there are several experts, all always in memory, of an architecture in STACKABLE."""
    paged = isinstance(experts, PagedExperts) and experts.resident < len(experts)
    return len(experts) > 1 and not paged and config.model_type in STACKABLE


class StackedExperts:
    """Forward passes of all experts at once. Each expert can still run alone: both ways share its KV cache."""

    def __init__(self, experts: Mapping[int, PreTrainedModel], caches: dict[int, KVCache]) -> None:
        """
        Args:
            experts: models that differ in their weights only, of an architecture in STACKABLE; they stay in memory.
            caches: the experts' empty caches, in the same order.
        """
        self._experts, self._model = list(experts), stack_models(list(experts.values()))
        self._stride = next(iter(caches.values())).padding_slot + 1
        self._cache = KVCache(len(caches) * self._stride - 1)
        self.forward({})  # allocates the memory of the layers
        for row, cache in enumerate(caches.values()):
            own = slice(row * self._stride, (row + 1) * self._stride)
            cache.memory = {layer: (keys[own], values[own]) for layer, (keys, values) in self._cache.memory.items()}

    def forward(self, chunks: dict[int, list[Chunk]]) -> dict[int, list[np.ndarray]]:
        """`KVCache.forward` for every expert in `chunks`. The other experts run too, on padding."""
        rows = max((len(theirs) for theirs in chunks.values()), default=1)
        padded = []
        for place, expert in enumerate(self._experts):
            first, theirs = place * self._stride, chunks.get(expert, [])
            padded += [Chunk(chunk.tokens, chunk.start, chunk.slots + first) for chunk in theirs]
            padded += [Chunk([0], 0, torch.tensor([first + self._stride - 1]))] * (rows - len(theirs))
        found = self._cache.forward(self._model, padded)
        return {
            expert: found[place * rows :][: len(chunks[expert])]
            for place, expert in enumerate(self._experts)
            if expert in chunks
        }
