"""A causal language model out of a GGUF file, as a Hugging Face folder that a run can start from."""

from __future__ import annotations

import argparse
import copy
import struct
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from cbtm_ray.errors import UserError, refuse
from cbtm_ray.models import save_model


def convert(gguf_file: Path, uri: str) -> int:
    """Write model (float32, whatever it was quantised to) and tokenizer to a folder; how many parameters it has.

    Raises:
        UserError: it is not such a file, or the packages gguf and accelerate are not installed.
    """
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    try:
        whole = GgufConfig(dequantize=True)  # else weights may stay in blocks, which cannot be trained
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=whole)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, ImportError, struct.error) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{gguf_file} cannot be read as a model: {first}") from error
    save_model(_plain(model), tokenizer, uri)
    return model.num_parameters()


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without the word that it came from quantised weights, for which transformers would not save it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


def main(description: str | None) -> int:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("gguf_file", type=Path, help="model and tokenizer in one file")
    parser.add_argument("folder", help="where the Hugging Face folder goes, a path or URI")
    options = parser.parse_args()
    try:
        n_parameters = convert(options.gguf_file, options.folder)
    except UserError as error:
        return refuse(str(error))
    print(f"{options.folder}: {n_parameters:,} parameters. Start from it with")
    print(f"seed_model.name_or_path={options.folder} tokens.tokenizer={options.folder}")
    return 0
