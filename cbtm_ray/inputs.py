"""What a configuration names and a run has yet to read is looked for before Ray starts, which takes seconds."""

from __future__ import annotations

from cbtm_ray import files
from cbtm_ray.corpus.installed_docs import package_folder
from cbtm_ray.corpus.shards import list_corpus
from cbtm_ray.errors import UserError
from cbtm_ray.run import Run
from cbtm_ray.stages import SHAREABLE

MODELS = ("embed.encoder", "seed_model.name_or_path")


def check_inputs(run: Run, *, local_files_only: bool = False) -> None:
    """Look for the documents, models, runs and few-shot tasks that the unfinished stages of a run begin with, and whether they
    suit the configuration and each other.

    Args:
        local_files_only: as of `check_models`.

    Raises:
        UserError: one is not there, or not what it should be; or a package is not installed on this machine.
    """
    _check_corpus(run)
    _check_folders(run)
    _check_shared(run)
    _check_warm_start(run)
    _check_fewshot(run)
    from cbtm_ray.model_checks import check_models  # brings torch and transformers

    check_models(run, local_files_only=local_files_only)


def _check_corpus(run: Run) -> None:
    config = run.config
    if run.manifest("corpus") is None:
        for package in config.corpus.packages:
            package_folder(package)
        if config.corpus.paths:
            list_corpus(config.corpus)


def _check_folders(run: Run) -> None:
    config = run.config
    folders = {
        "tokens.tokenizer": ("tokenizer", config.tokens.tokenizer),
        "embed.encoder": ("clusterer", config.embed.encoder),
        "seed_model.name_or_path": ("seed", config.seed_model.name_or_path),
        "train.warm_start": ("experts", config.train.warm_start),
    }
    for field, (stage, folder) in folders.items():
        named_on_hub = field != "train.warm_start" and folder is not None and not is_path(folder)
        if folder is None or named_on_hub or run.manifest(stage) is not None:
            continue
        with files.reaching(field, folder):
            if not files.exists(folder):
                raise UserError(f"{field}={folder!r} does not exist. Give a folder that does, or leave the field out.")
            if field in MODELS and not files.exists(files.join(folder, "config.json")):
                raise UserError(f"{field}={folder!r} has no config.json. Give the Hugging Face folder of a model.")


def _check_shared(run: Run) -> None:
    missing = [stage for stage in SHAREABLE if run.manifest(stage) is None]
    for folder in run.config.run.shared if missing else ():
        with files.reaching("run.shared", folder):
            found = any(files.exists(files.join(folder, stage, "manifest.json")) for stage in SHAREABLE)
        if not found:
            raise UserError(
                f"run.shared: {folder} has no finished {', '.join(missing)} to take. Give the directory of a run that has, or "
                "leave it out."
            )


def _check_warm_start(run: Run) -> None:
    config, train = run.config, run.config.train
    if train.warm_start is None or run.manifest("experts") is not None:
        return
    from cbtm_ray.branch.warm_start import check_models  # brings torch and transformers

    clusters = train.clusters or range(min((config.cluster.n_clusters, *config.sweep.clusters)))
    # The experts of metadata are as many as the documents have domains, which is not known yet.
    folders = ["experts", *(f"controls/{split}" for split in train.controls if split in ("random", "unbalanced"))]
    names = [f"{folder}/cluster={cluster:04d}" for folder in folders for cluster in clusters]
    check_models(run, [*names, *([] if train.clusters else ["controls/dense"])])


def _check_fewshot(run: Run) -> None:
    wanted = run.config.evaluate
    if not wanted.fewshot or run.manifest("evaluation") is not None:
        return
    from cbtm_ray.evaluate.fewshot import check_shots, read_task  # brings torch and transformers

    for task in map(files.absolute, wanted.fewshot):
        to_be_made = task.startswith(run.uri("fewshot")) and not files.exists(task)  # by jobs.make_fewshot_task
        if not to_be_made:
            check_shots(read_task(task), wanted.fewshot_shots)


def is_path(name: str) -> bool:
    """Whether it can be no name on the Hugging Face hub."""
    return name.startswith(("/", ".", "~")) or "://" in name or name.count("/") > 1
