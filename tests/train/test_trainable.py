"""Experts whose feed-forward layers alone are trained: all else stays the seed's, bit by bit."""

from __future__ import annotations

import io

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cbtm_ray.errors import UserError
from cbtm_ray.train.trainable import freeze_all_but_ffn
from tests.support.tiny_models import SIZES, SPEC, changed, make_model, train, without_speed

FFN_ONLY = changed(SPEC, trainable="ffn")
MORE = {
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=32)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, intermediate_size=32, num_key_value_heads=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=32)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=32, num_key_value_heads=2, head_dim=8)),
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt", *MORE])
def test_the_feed_forward_layers_alone_are_trained(name: str) -> None:
    model = MORE[name]() if name in MORE else make_model(name)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    train(model, FFN_ONLY)
    moved = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    layers = {key for key in before if ".mlp." in key or ".fc1." in key or ".fc2." in key}
    assert moved == layers
    assert len(moved) >= 2


def test_a_resumed_training_is_an_uninterrupted_one() -> None:
    whole, resumed = make_model(), make_model()
    curve, saved = train(whole, FFN_ONLY)
    resumed_curve, _ = train(resumed, FFN_ONLY, state=torch.load(io.BytesIO(saved[0]), weights_only=True))
    assert without_speed(resumed_curve) == without_speed(curve)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_moments_are_kept_of_trained_weights_alone() -> None:
    _, saved = train(make_model(), FFN_ONLY)
    moments = torch.load(io.BytesIO(saved[0]), weights_only=True)["optimizer"]["state"]
    assert moments
    assert all(".mlp." in name for name in moments)


def test_a_model_without_feed_forward_layers_is_refused() -> None:
    model = make_model()
    for layer in model.model.layers:
        del layer.mlp
    with pytest.raises(UserError, match=r"train\.trainable='ffn' needs feed-forward layers.*train\.trainable=all"):
        freeze_all_but_ffn(model)
