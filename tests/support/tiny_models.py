"""Tiny random models of several architectures, and sequences to train them on."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cbtm_ray.config import TrainConfig
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.spec import TrainSpec
from cbtm_ray.train.trainer import train_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=64)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=64, pad_token_id=1)
    ),
    "cohere, which scales its logits": lambda: CohereForCausalLM(
        CohereConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, logit_scale=0.25, pad_token_id=1)
    ),
}
SPEC = TrainSpec(
    name="test",
    steps=20,
    sequence_length=16,
    train=TrainConfig(
        batch_size=4, learning_rate=1e-2, final_lr_fraction=0.1, warmup_steps=4, weight_decay=0.1, log_every=3,
        checkpoint_every=5, notice_every=4, evaluate_sequences=8,
    ),
)  # fmt: skip


def changed(spec: TrainSpec, **changes: Any) -> TrainSpec:
    """The spec with other values of its own fields or of its training options."""
    own = {name: changes.pop(name) for name in ("name", "steps", "sequence_length") if name in changes}
    return dataclasses.replace(spec, **own, train=dataclasses.replace(spec.train, **changes))


def make_model(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def make_sequences(highest: int = 49) -> PackedSequences:
    random = np.random.default_rng(0)
    documents = [np.sort(random.integers(1, highest + 1, 40)) for _ in range(30)]
    return PackedSequences(documents, sequence_length=16, end_of_text=0, seed=0)


def train(
    model: Any, spec: TrainSpec = SPEC, state: Any = None, valid: PackedSequences | None = None
) -> tuple[list[dict], list[bytes]]:
    """Curve and saved states, as a checkpoint holds them."""
    saved: list[bytes] = []

    def save(state: dict) -> None:
        torch.save(state, buffer := io.BytesIO())
        saved.append(buffer.getvalue())

    curve = train_model(model, make_sequences(), spec, valid=valid, state=state, save=save, log=lambda point: None)
    return curve, saved


def without_speed(curve: list[dict]) -> list[dict]:
    return [{key: value for key, value in point.items() if key != "tokens_per_s"} for point in curve]


def make_valid(documents: int = 12, length: int = 16) -> PackedSequences:
    random = np.random.default_rng(1)
    texts = [random.integers(1, 50, 30) for _ in range(documents)]
    return PackedSequences(texts, sequence_length=length, end_of_text=0, seed=0)
