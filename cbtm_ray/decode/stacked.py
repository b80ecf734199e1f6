"""All experts of a process in one forward pass: one model with their weights stacked.

E experts, B rows of all together, C tokens.

On a small model, or a GPU, a pass of one row costs about as much as a pass of many, and experts differ in their weights only.
The code of the model runs unchanged on a batch of B rows, the rows of the first expert first. Only the layers that hold
weights are replaced by layers that hold the weights of all experts, and give each row its own. `torch.func.vmap` would
do this for any architecture, but forbids the KV cache's writes in place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass
class Rows:
    """Which rows of a pass are whose. All layers of a stacked model share it."""

    sizes: dict[int, int]
    """Number of rows by the place of the expert among the experts; without those that have none."""
    experts_B: Tensor
    """The place of each row's expert among the experts."""


class _Stacked(nn.Module):
    """One layer with the weights of all experts."""

    def __init__(self, layers: list[Any], stack: ParameterStack, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        weight = stack.parameter(layers, "weight")
        assert weight is not None
        self.weight, self.bias = weight, stack.parameter(layers, "bias")


class _Linear(_Stacked):
    """Replaces nn.Linear, with weights (out, in), and GPT-2's Conv1D, with weights (in, out)."""

    def __init__(self, layers: list[Any], stack: ParameterStack, rows: Rows) -> None:
        super().__init__(layers, stack, rows)
        self._inputs_first = self.weight if isinstance(layers[0], Conv1D) else self.weight.mT
        self._weights = self._inputs_first.unbind()
        self._biases = None if self.bias is None else self.bias.unbind()

    def forward(self, given: Tensor) -> Tensor:
        sizes, flat = list(self.rows.sizes.values()), given.flatten(0, -2)
        if len(sizes) == len(self._weights) and min(sizes) == max(sizes):
            found = torch.bmm(flat.unflatten(0, (len(sizes), -1)), self._inputs_first)
            if self.bias is not None:
                found += self.bias[:, None]
        else:
            parts = zip(self.rows.sizes, flat.split([size * (len(flat) // len(given)) for size in sizes]), strict=True)
            found = torch.cat([self._product(part, place) for place, part in parts])
        return found.view(*given.shape[:-1], -1)

    def _product(self, part: Tensor, place: int) -> Tensor:
        if self._biases is None:
            return torch.mm(part, self._weights[place])
        return torch.addmm(self._biases[place], part, self._weights[place])


class _Embedding(_Stacked):
    def forward(self, ids_BC: Tensor) -> Tensor:
        return F.embedding(ids_BC + self.rows.experts_B[:, None] * self.weight.shape[1], self.weight.flatten(0, 1))


class _Norm(_Stacked):
    """Replaces any norm with one weight per entry of the last dimension: the plain norm, then the expert's weight and bias."""

    def __init__(self, layers: list[Any], stack: ParameterStack, rows: Rows) -> None:
        super().__init__(layers, stack, rows)
        self._plain = copy.deepcopy(layers[0])
        self._plain.weight.data = torch.ones_like(self._plain.weight)
        if self.bias is not None:
            self._plain.bias.data = torch.zeros_like(self._plain.bias)

    def forward(self, given: Tensor) -> Tensor:
        found = self._plain(given)
        for parameter, combine in ((self.weight, torch.mul), (self.bias, torch.add)):
            if parameter is not None:
                of_rows = parameter.index_select(0, self.rows.experts_B)
                found = combine(found, of_rows.view(len(found), *[1] * (found.dim() - 2), -1))
        return found


def stack_models(models: list[PreTrainedModel], rows: Rows) -> PreTrainedModel:
    """A model for batches whose rows are those of `rows`. The parameters of `models` become views of its parameters."""
    stacked, stack = copy.deepcopy(models[0]), ParameterStack()
    for name, layer in list(models[0].named_modules()):
        if next(layer.parameters(recurse=False), None) is not None:
            stacked.set_submodule(name, _stacked_layer([model.get_submodule(name) for model in models], stack, rows))
    return stacked


def _stacked_layer(layers: list[Any], stack: ParameterStack, rows: Rows) -> nn.Module:
    if isinstance(layers[0], nn.Linear | Conv1D):
        return _Linear(layers, stack, rows)
    if isinstance(layers[0], nn.Embedding):
        return _Embedding(layers, stack, rows)
    assert type(layers[0]).__name__.endswith("Norm"), "an architecture of STACKABLE has no other layers"
    return _Norm(layers, stack, rows)


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
        self._experts, self._rows = list(experts), Rows({}, torch.zeros(0))
        self._model = stack_models(list(experts.values()), self._rows)
        self._stride = next(iter(caches.values())).padding_slot + 1
        self._cache = KVCache(len(caches) * self._stride - 1)
        self.forward({})  # allocates the memory of the layers
        for row, cache in enumerate(caches.values()):
            own = slice(row * self._stride, (row + 1) * self._stride)
            cache.memory = {layer: (keys[own], values[own]) for layer, (keys, values) in self._cache.memory.items()}

    def forward(self, chunks: dict[int, list[Chunk]]) -> dict[int, list[np.ndarray]]:
        """`KVCache.forward` for every expert in `chunks`.

        On a GPU, where rows cost little and each matrix product costs its start, all experts have as many rows, some padding.
        """
        sizes = [len(chunks.get(expert, [])) for expert in self._experts]
        device = self._model.device
        if device.type == "cuda" or not chunks:
            sizes = [max(*sizes, 1)] * len(sizes)
        given = list[Chunk]()
        for place, (expert, size) in enumerate(zip(self._experts, sizes, strict=True)):
            first, theirs = place * self._stride, chunks.get(expert, [])
            given += [Chunk(chunk.tokens, chunk.start, chunk.slots + first) for chunk in theirs]
            given += [Chunk([0], 0, torch.tensor([first + self._stride - 1]))] * (size - len(theirs))
        self._rows.sizes = {place: size for place, size in enumerate(sizes) if size}
        self._rows.experts_B = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
        found, ends = self._cache.forward(self._model, given), np.cumsum(sizes)
        return {
            expert: found[end - size :][: len(chunks[expert])]
            for expert, size, end in zip(self._experts, sizes, ends, strict=True)
            if expert in chunks
        }
