"""The run directory: one folder a stage, finished when it holds a manifest, tied to the settings it was made with.

    <run.dir>/
      config.yaml  metrics.jsonl
      corpus/      tokenizer/      clusterer/      shards/{train,valid}/           shards/controls/random/
      seed/        experts/cluster=0003/           controls/dense/                 controls/random/cluster=0003/
      checkpoints/ evaluation/     average/{uniform,routing}/      fewshot/      report.html

A stage writes `settings.json` when it starts and `manifest.json` when it ends. A folder with a manifest is skipped when
the stage runs again; one without is continued. Either is refused when its settings are not those of the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cbtm_ray import files
from cbtm_ray.config import CONTROLS, EXECUTION_FIELDS, EXPERTS_ONLY_FIELDS, SPLIT_CONTROLS, Config
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import config_tree, dump_config

_TRAINING = ("train", "-train.controls", "tokens.sequence_length")

STAGE_SETTINGS: dict[str, tuple[str, ...]] = {
    "corpus": ("run", "corpus"),
    "tokenizer": ("tokens.tokenizer", "tokens.vocab_size"),
    "clusterer": ("embed", "cluster"),
    "shards": (),
    "seed": ("seed_model", "train", *(f"-{name}" for name in sorted(EXPERTS_ONLY_FIELDS)), "tokens.sequence_length"),
    "experts": _TRAINING,
    **{f"shards/controls/{split}": () for split in SPLIT_CONTROLS},
    **{f"controls/{control}": _TRAINING for control in CONTROLS},
    "evaluation": ("evaluate", "tokens.sequence_length", "train.controls"),
    "average": (),
    "fewshot": ("evaluate.max_documents",),
}  # fmt: skip
"""What each stage depends on in the configuration, beyond what the stages before it do: fields, or sections less -fields.

Each control is a stage of its own, so that a finished run can be given another one."""


SHAREABLE = ("corpus", "tokenizer", "clusterer", "shards", "seed")
"""Stages that a run may take from another; a control's partition is kept beside the shards that it is one of."""


DENSE_FOLDER, MOE_FOLDER = "controls/dense", "controls/moe"


def expert_folder(cluster: int, control: str | None = None) -> str:
    """Folder of an expert's model in the run directory."""
    return f"{f'controls/{control}' if control else 'experts'}/cluster={cluster:04d}"


def partition_folder(control: str) -> str:
    """Folder of the control's cluster of every document."""
    return f"shards/controls/{control}"


class Unfinished(Exception):
    """What was asked for is done, but not the whole stage; the message says what is missing."""


class Run:
    """A run directory on any pyarrow filesystem, and the configuration it belongs to."""

    def __init__(self, config: Config) -> None:
        self.dir = files.absolute(config.run.dir)
        shared = tuple(map(files.absolute, config.run.shared))
        self.config = replace(config, run=replace(config.run, dir=self.dir, shared=shared))
        self._owners = {stage: self._owner(stage) for stage in SHAREABLE} if shared else {}
        self._fields = _flatten(config_tree(self.config))

    def uri(self, *parts: str) -> str:
        stage = parts[0].partition("/")[0] if parts else ""
        return files.join(self._owners.get(stage, self.dir), *parts)

    def _owner(self, stage: str) -> str:
        """The directory that has the stage finished, or this run's."""
        folders = (self.dir, *self.config.run.shared)
        return next((d for d in folders if files.exists(files.join(d, stage, "manifest.json"))), self.dir)

    def settings(self, stage: str) -> dict[str, Any]:
        """The dotted configuration fields that the stage's own output depends on."""
        owners = STAGE_SETTINGS[stage]
        return {
            name: value
            for name, value in self._fields.items()
            if name not in EXECUTION_FIELDS
            and (name in owners or (name.partition(".")[0] in owners and f"-{name}" not in owners))
        }

    def check(self) -> None:
        """Refuse a run directory that another configuration made.

        Raises:
            UserError: one line with every field that differs, and what to do.
        """
        for stage in STAGE_SETTINGS:
            settings_uri = self.uri(stage, "settings.json")
            if not files.exists(settings_uri):
                continue
            made_with, now = files.read_json(settings_uri), self.settings(stage)
            differing = [
                f"{name}={now.get(name)!r} (the run has {made_with.get(name)!r})"
                for name in sorted(made_with.keys() | now.keys())
                if made_with.get(name) != now.get(name)
            ]
            if differing:
                raise UserError(
                    f"run.dir={self.dir} was made with another configuration: {', '.join(differing)}. "
                    f"Give another run.dir, restore the field, or delete {self.uri(stage)} and the stages after it."
                )

    def begin(self) -> None:
        """Check the directory, then keep the resolved configuration in it.

        Raises:
            UserError: another configuration made it, or it cannot be reached: why, and what to do.
        """
        with files.reaching("run.dir", self.dir):
            self.check()
            files.write_bytes(self.uri("config.yaml"), dump_config(self.config).encode())

    def manifest(self, *folder: str) -> dict[str, Any] | None:
        """What a finished folder says of itself, or None while it is unfinished."""
        uri = self.uri(*folder, "manifest.json")
        return files.read_json(uri) if files.exists(uri) else None

    def need(self, folder: str, job: str) -> dict[str, Any]:
        """The manifest of an earlier stage; UserError with the command that makes it if there is none."""
        manifest = self.manifest(folder)
        if manifest is None:
            raise UserError(f"{self.uri(folder)} is not finished. Run first: python -m jobs.{job} --config FILE")
        return manifest

    def start(self, stage: str) -> None:
        """Tie the stage's folder to the present settings, before anything else is written there."""
        files.write_json(self.uri(stage, "settings.json"), self.settings(stage))

    def finish(self, folder: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, which makes the folder finished."""
        files.write_json(self.uri(folder, "manifest.json"), manifest)
        return manifest

    def _untie(self, stage: str) -> None:
        """Forget the settings of a stage that refused its input before it made anything: the mended one is welcome there.

        Not those of the experts, whose dense control and checkpoints lie in other folders.
        """
        if stage == "experts" or files.list_files(self.uri("checkpoints", stage)):
            return
        if files.list_files(self.uri(stage)) == [settings_uri := self.uri(stage, "settings.json")]:
            files.delete(settings_uri)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """Run `work` unless the stage is finished; its manifest, and whether it ran now.

        The manifest gets `seconds`, the wall time of the call that finished the stage.
        """
        done = self.manifest(name)
        if done is not None:
            return done, False
        started = time.perf_counter()
        self.start(name)
        try:
            manifest = work()
        except UserError:
            self._untie(name)
            raise
        return self.finish(name, {**manifest, "seconds": round(time.perf_counter() - started, 1)}), True


def no_space_left(run_dir: str) -> str:
    """What to tell a user whose disk is full."""
    return (
        f"run.dir={run_dir}: no space left on the device. Free some, or give another run.dir; what is finished is kept, "
        "and the same command continues."
    )


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}
