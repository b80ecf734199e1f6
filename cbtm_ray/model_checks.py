"""Whether the models, the tokenizer and the few-shot tasks that a configuration names suit it and each other.

Each is tried for itself, before Ray starts and long before a stage would meet it. Nothing is trained or written.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from cbtm_ray import files, progress
from cbtm_ray.branch.upcycle import check_upcyclable
from cbtm_ray.config import Config
from cbtm_ray.corpus.tokenizer import load_tokenizer, vocabulary_size
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.fewshot import configured_prompts
from cbtm_ray.merge.routers import check_reported
from cbtm_ray.models import check_seed, check_tokenizer, empty_model, load_model, load_model_config, most_positions
from cbtm_ray.run import Run
from cbtm_ray.stages import partition_folder
from cbtm_ray.train.packed_sequences import check_long_enough


def check_models(run: Run, *, local_files_only: bool = False) -> None:
    """Try what the unfinished stages of a run take as it is.

    Args:
        local_files_only: no weights are fetched from the Hugging Face hub; those that are not here are not tried.

    Raises:
        UserError: one does not suit the configuration, or cannot be loaded.
    """
    logging.set_verbosity_error()  # of a model that is refused, the one line is what to read
    logging.disable_progress_bar()
    config, tokenizer = run.config, _tokenizer(run)
    if run.manifest("evaluation") is None:
        check_reported(config.evaluate, config.cluster.n_clusters)
    if config.embed.encoder and run.manifest("clusterer") is None and _is_here(config.embed.encoder, local_files_only):
        from cbtm_ray.cluster.sentence_encoder import load_encoder  # seconds

        load_encoder(config.embed)
    if config.seed_model.name_or_path and run.manifest("seed") is None:
        _check_seed(config, config.seed_model.name_or_path, tokenizer, local_files_only)
    if tokenizer is not None and run.manifest("evaluation") is None:
        check_fewshot(run, tokenizer)
    _check_lengths(run)


def _is_here(name: str, local_files_only: bool) -> bool:
    """Whether a model may be loaded: a name on the hub is left out, with a note, where nothing is to be fetched."""
    if not local_files_only or files.exists(name):
        return True
    progress.note(f"The model {name!r} is not fetched to be tried: a job does that before anything else.")
    return False


def _tokenizer(run: Run) -> PreTrainedTokenizerBase | None:
    """The run's tokenizer, or the one that it will take. None: it will be trained."""
    if run.manifest("tokenizer") is not None:
        return load_tokenizer(run.uri("tokenizer"))
    named = run.config.tokens.tokenizer
    return None if named == "train" else load_tokenizer(named)


def _check_seed(config: Config, name: str, tokenizer: PreTrainedTokenizerBase | None, local_files_only: bool) -> None:
    field, length = f"seed_model.name_or_path={name!r}", config.tokens.sequence_length
    with files.loading(name, f"{field} is no causal language model that can be loaded"):
        model = empty_model(load_model_config(name))
    if "moe" in config.train.controls:
        check_upcyclable(model)
    most = most_positions(model)
    if most is not None and length > most:
        raise UserError(
            f"tokens.sequence_length={length} must be at most {most}, the positions of {field}. Lower it; or raise "
            "max_position_embeddings in the model's config.json, if its positions have no table of weights."
        )
    _check_vocabulary(config, name, model, tokenizer)
    _try_seed(name, model, local_files_only)


def _check_vocabulary(
    config: Config, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    field, embeddings = f"seed_model.name_or_path={name!r}", _rows(model)
    if tokenizer is None:
        if not files.exists(name) or files.exists(files.join(name, "tokenizer_config.json")):
            raise UserError(
                f"tokens.tokenizer='train' makes a new tokenizer, whose tokens {field} does not know. Set "
                f"tokens.tokenizer={name} too."
            )
        tokens, field_of_tokens = config.tokens.vocab_size, "tokens.vocab_size"
    else:
        check_tokenizer(name, tokenizer)
        tokens, field_of_tokens = vocabulary_size(tokenizer), "the vocabulary of tokens.tokenizer"
    if tokens > embeddings:
        raise UserError(
            f"{field_of_tokens}={tokens} must be at most {embeddings}, the embeddings of {field}. Use the model's own "
            "tokenizer."
        )


def _rows(model: PreTrainedModel) -> int:
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def _try_seed(name: str, empty: PreTrainedModel, local_files_only: bool) -> None:
    """Run the seed itself on a few tokens, where it fits this machine; training tries it again before its first step."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (needed := 4 * sum(p.numel() for p in empty.parameters())) > memory_bytes / 2:
        progress.note(
            f"The seed takes {needed / 1e9:.0f} GB, too much to try on this machine: its worker tries it first."
        )
        return
    if _is_here(name, local_files_only):
        check_seed(load_model(name))


def check_fewshot(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError if a task of `evaluate.fewshot` makes no prompts with this tokenizer. What the run makes itself may not be
    there yet."""
    for task in map(files.absolute, run.config.evaluate.fewshot):
        if files.exists(task):
            configured_prompts(task, tokenizer, run.config)


def _check_lengths(run: Run) -> None:
    """As the partitions' own stages do, for one that was made with a smaller `tokens.sequence_length`."""
    length, shards = run.config.tokens.sequence_length, run.manifest("shards")
    if shards is not None and "train" in shards and run.manifest("experts") is None:
        check_long_enough(shards["train"]["clusters"], length)
    for control in run.config.train.controls:
        split = run.manifest(partition_folder(control))
        if split is not None and "clusters" in split and run.manifest(f"controls/{control}") is None:
            check_long_enough(split["clusters"], length, control, split["domains"])
