"""What a configuration names and a run has yet to read is looked for before Ray starts, which takes seconds."""

from __future__ import annotations

from cbtm_ray import files
from cbtm_ray.documents import list_shards
from cbtm_ray.errors import UserError
from cbtm_ray.installed_docs import package_folder
from cbtm_ray.run import Run


def check_inputs(run: Run) -> None:
    """Look for the documents, and for the folders of models, that the unfinished stages of a run begin with.

    Raises:
        UserError: one is not there; or a package is not installed on this machine.
    """
    config = run.config
    if run.manifest("corpus") is None:
        for package in config.corpus.packages:
            package_folder(package)
        if config.corpus.paths:
            list_shards(config.corpus.paths)
        if config.corpus.valid_paths:
            list_shards(config.corpus.valid_paths, "corpus.valid_paths")
    folders = {
        "tokens.tokenizer": ("tokenizer", config.tokens.tokenizer),
        "embed.encoder": ("clusterer", config.embed.encoder),
        "seed_model.name_or_path": ("seed", config.seed_model.name_or_path),
        "train.warm_start": ("experts", config.train.warm_start),
    }
    for field, (stage, folder) in folders.items():
        named_on_hub = field != "train.warm_start" and folder is not None and not _is_path(folder)
        if folder is None or named_on_hub or run.manifest(stage) is not None:
            continue
        with files.reaching(field, folder):
            if not files.exists(folder):
                raise UserError(f"{field}={folder!r} does not exist. Give a folder that does, or leave the field out.")


def _is_path(name: str) -> bool:
    """Whether it can be no name on the Hugging Face hub."""
    return name.startswith(("/", ".", "~")) or "://" in name or name.count("/") > 1
