"""Experts in one pass predict what each predicts alone, and have read what they have read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cbtm_ray.corpus.tokenizer import train_tokenizer
from cbtm_ray.decode.kv_cache import Chunk, KVCache
from cbtm_ray.decode.stacked import STACKABLE, StackedExperts, can_stack
from cbtm_ray.merge.paging import PagedExperts
from cbtm_ray.models import save_model
from tests.support.tiny_models import MODELS, SIZES

N_SLOTS = 40
FIRST, SECOND = torch.arange(20), torch.arange(20, 40).flip(0)
GROUPED = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 24}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    **{name: MODELS[name] for name in ("llama", "gpt2", "qwen2")},
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, num_key_value_heads=1, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, num_key_value_heads=1, head_dim=8)),
}


def make_experts(architecture: str) -> dict[int, Any]:
    experts = {}
    for expert in (3, 5, 6):
        torch.manual_seed(expert)
        model = ARCHITECTURES[architecture]().eval()
        for parameter in model.parameters():  # norms and biases differ too
            parameter.data += 0.2 * torch.randn_like(parameter)
        experts[expert] = model
    return experts


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_architecture_that_is_listed_is_tested() -> None:
    assert sorted(ARCHITECTURES) == sorted(STACKABLE)


@pytest.mark.parametrize("architecture", STACKABLE)
def test_each_expert_predicts_what_it_predicts_alone(architecture: str) -> None:
    """Chunks of several lengths, texts in pieces of memory, an expert with none; then one of them without the others."""
    experts = make_experts(architecture)
    alone = {expert: (copy.deepcopy(model), KVCache(N_SLOTS)) for expert, model in experts.items()}
    caches = {expert: KVCache(N_SLOTS) for expert in experts}
    stacked = StackedExperts(experts, caches)
    for chunks in (
        {3: [Chunk([1, 2, 3, 4], 0, FIRST), Chunk([5, 6], 0, SECOND)], 5: [Chunk([5, 6], 0, SECOND)]},
        {3: [Chunk([9], 4, FIRST)], 5: [Chunk([8, 1], 2, SECOND)], 6: [Chunk([1, 2, 3], 0, FIRST)]},
    ):
        found = stacked.forward(chunks)
        assert found.keys() == chunks.keys()
        for expert, theirs in chunks.items():
            model, cache = alone[expert]
            assert_close(found[expert], cache.forward(model, theirs))
    last = [Chunk([7], 5, FIRST)]
    assert_close(caches[3].forward(experts[3], last), alone[3][1].forward(alone[3][0], last))


def test_weights_are_in_memory_once() -> None:
    experts = make_experts("llama")
    StackedExperts(experts, {expert: KVCache(N_SLOTS) for expert in experts})
    first, second = (experts[expert].get_input_embeddings().weight for expert in (3, 5))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_paged_experts_and_other_architectures_are_read_one_by_one(tmp_path: Any) -> None:
    model, tokenizer = make_experts("llama")[3], train_tokenizer(["some words"], 258)
    folders = {expert: str(tmp_path / str(expert)) for expert in range(2)}
    for folder in folders.values():
        save_model(model, tokenizer, folder)
    assert can_stack(PagedExperts(folders, resident=2), model.config)
    assert not can_stack(PagedExperts(folders, resident=1), model.config)
    assert not can_stack({0: model}, model.config)
    opt = MODELS["opt"]()
    assert not can_stack({0: opt, 1: opt}, opt.config)
