"""Warm start: the experts, and the dense control, go on from those of another run instead of from the seed.

They are paired by the number of the cluster, which means the same in both runs only if their clusterers are the same.
"""

from __future__ import annotations

from typing import Any

from cbtm_ray import files
from cbtm_ray.branch.branches import start_model
from cbtm_ray.cluster.embed import saved_settings
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.run import Run


def check_warm_start(run: Run, names: list[str]) -> None:
    """Refuse `train.warm_start` if it is not a run with the same clusterer and with all of these experts and controls.

    Raises:
        UserError: one line that says what is missing or different.
    """
    other = run.config.train.warm_start
    if other is None:
        return
    check_models(run, names)
    if different := _different(run, files.absolute(other)):
        raise UserError(
            f"train.warm_start={other!r} must have this run's tokenizer and clusterer, but {different} is not the same: its "
            f"experts are of other clusters. Copy {files.join(other, '{tokenizer,clusterer}')} into a new run.dir before its "
            "first job."
        )


def check_models(run: Run, names: list[str]) -> None:
    """UserError unless the run of `train.warm_start` has all of these experts and controls finished."""
    missing = [name for name in names if not files.exists(files.join(start_model(run, name), "manifest.json"))]
    if missing:
        raise UserError(
            f"train.warm_start={run.config.train.warm_start!r} must be the directory of a finished run; it has no finished "
            f"{', '.join(missing)}."
        )


def _different(run: Run, other: str) -> str | None:
    """The settings in which the two runs differ, so that their cluster numbers or token ids do not mean the same."""
    ours, theirs = (load_tokenizer(uri) for uri in (run.uri("tokenizer"), files.join(other, "tokenizer")))
    if ours.get_vocab() != theirs.get_vocab():
        return "tokenizer"
    own, their = run.uri("clusterer"), files.join(other, "clusterer")
    names = [uri.removeprefix(f"{own}/") for uri in files.list_files(files.join(own, "embedder"))]
    for name in ("centers.npy", *names):
        ours_uri, theirs_uri = files.join(own, name), files.join(their, name)
        if not files.exists(theirs_uri) or _decisive(ours_uri) != _decisive(theirs_uri):
            return f"clusterer/{name}"
    return None


def _decisive(uri: str) -> Any:
    """The content of a file of a clusterer, without settings that do not change the embeddings (batch size, GPUs, folder)."""
    folder, _, name = uri.rpartition("/")
    if name == "embedder.json":
        return {**saved_settings(folder), "encoder": None}
    if name in (
        "config.json",
        "tokenizer_config.json",
    ):  # of an encoder: transformers' version and where it was loaded from
        return None
    return files.read_bytes(uri)
