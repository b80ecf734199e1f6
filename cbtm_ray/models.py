"""Causal language models as Hugging Face folders: make a new one, load one, write one to the run."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

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
from cbtm_ray.corpus.tokenizer import load_tokenizer, vocabulary_size
from cbtm_ray.errors import UserError
from cbtm_ray.train.loss import check_causal


def new_model(
    sizes: SeedModelConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, random_state: int
) -> PreTrainedModel:
    """A Llama-architecture model with seeded random weights and tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=vocabulary_size(tokenizer),
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
    """A causal LM in float32 from a folder, a URI of one, or a Hugging Face name; of a multimodal model the part for text.

    Raises:
        UserError: there is none, or it lacks weights.
        OSError: its store cannot be reached.
    """
    with files.loading(uri_or_name, f"no causal language model can be loaded from {uri_or_name!r}") as found:
        both: Any = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32, output_loading_info=True)
        model, loaded = both
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(
                f"{uri_or_name!r} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}, which "
                "would be random. Give a model that was trained as one."
            )
        return _text_part(model)


def _text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The language model in a multimodal one, as a model of its own; any other model itself."""
    text_config = model.config.get_text_config()
    if text_config is model.config:
        return model
    text_model = empty_model(text_config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if type(decoder) is not type(text_model.base_model) or head is None:
        raise ValueError(f"{type(model).__name__} is multimodal, and its part for text is no model of its own")
    setattr(text_model, text_model.base_model_prefix, decoder)
    text_model.set_output_embeddings(head)
    text_model.name_or_path = model.name_or_path
    return text_model


def most_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a sequence of a model may have, which may be on the meta device. None: its configuration sets no bound."""
    named = (getattr(model.config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    if not (most := next((count for count in named if count and count > 0), None)):
        return None
    tables: list[Any] = [module for name, module in model.named_modules() if "position" in name]
    return int(
        most - max((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None)), default=0)
    )


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal LM without its weights, on torch's meta device. ValueError if there is none of that architecture."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def check_seed(model: PreTrainedModel) -> None:
    """UserError if the model's logits depend on later tokens: tried on a few tokens from all over its vocabulary."""
    table: Any = model.get_input_embeddings()
    tokens_1T = (torch.arange(32)[None] * table.weight.shape[0] // 33 + 1).to(model.device)
    was_training = model.training
    with torch.no_grad():
        check_causal(model.eval(), tokens_1T)
    model.train(was_training)


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
        return AutoConfig.from_pretrained(uri_or_name, local_files_only=local_files_only).get_text_config()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(files.read_bytes(config_json))
        return AutoConfig.from_pretrained(folder).get_text_config()


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
