"""Causal language models as Hugging Face folders: make a new one, load one, write one to the run."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cbtm_ray import files
from cbtm_ray.config import SeedModelConfig
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError


def new_model(
    sizes: SeedModelConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, random_state: int
) -> PreTrainedModel:
    """A Llama-architecture model with seeded random weights and tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_model(uri_or_name: str) -> PreTrainedModel:
    """A causal LM in float32 from a folder, a URI of one, or a Hugging Face name.

    Raises:
        UserError: there is none.
        OSError: its store cannot be reached.
    """
    with files.loading(uri_or_name, f"no causal language model can be loaded from {uri_or_name!r}") as found:
        return AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)


def check_tokenizer(uri_or_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError if the model was trained with another tokenizer, as far as its folder has one."""
    if files.exists(uri_or_name) and not files.exists(files.join(uri_or_name, "tokenizer_config.json")):
        return
    if load_tokenizer(uri_or_name).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"tokens.tokenizer gives other tokens than those that the model of {uri_or_name!r} knows. Set it to that model "
            "too, in a new run.dir."
        )


def load_model_config(uri_or_name: str, *, local_files_only: bool = False) -> PretrainedConfig:
    """The configuration of a model that `load_model` loads, without its weights. OSError or UserError if there is none."""
    if not files.exists(config_json := files.join(uri_or_name, "config.json")):
        return AutoConfig.from_pretrained(uri_or_name, local_files_only=local_files_only)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(files.read_bytes(config_json))
        return AutoConfig.from_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, uri: str) -> str:
    """Write model and tokenizer as one Hugging Face folder, safetensors. The SHA-256 of the weights."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for part in sorted(Path(folder).glob("*.safetensors")):
            with part.open("rb") as weights:
                hashlib.file_digest(weights, lambda: digest)
        files.publish_folder(folder, uri)
    return digest.hexdigest()
