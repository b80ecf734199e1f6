"""The run directory: one folder a stage, finished when it holds a manifest, tied to the settings and inputs it was made with.

    <run.dir>/
      config.yaml  metrics.jsonl
      corpus/      tokenizer/      clusterer/      shards/{train,valid}/           shards/controls/random/
      seed/        experts/cluster=0003/           controls/dense/                 controls/random/cluster=0003/
      checkpoints/ evaluation/     average/{uniform,routing}/      fewshot/      report.html

A stage writes `settings.json` when it starts and `manifest.json` when it ends. A folder with a manifest is skipped when
the stage runs again; one without is continued. Either is refused when its settings are not those of the configuration, or
when one of the stages that it was made from is another now. (Folders of earlier versions do not say what they were made from,
and are taken as they are.)
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from cbtm_ray import files
from cbtm_ray.config import EXECUTION_FIELDS, Config
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import config_tree, dump_config
from cbtm_ray.stages import FORMER_VALUES, MADE_FROM, SHAREABLE, STAGE_SETTINGS, before


class Unfinished(Exception):
    """The part that was asked for is done, but not the whole stage; the message names the missing parts."""


class Run:
    """A run directory on any pyarrow filesystem, and the configuration it belongs to."""

    def __init__(self, config: Config) -> None:
        self.dir = files.absolute(config.run.dir)
        shared = tuple(map(files.absolute, config.run.shared))
        self.config = replace(config, run=replace(config.run, dir=self.dir, shared=shared))
        self._owners = {stage: self._owner(stage) for stage in SHAREABLE} if shared else {}
        self._fields = _flatten(config_tree(self.config))

    def uri(self, *parts: str) -> str:
        return files.join(self._taken_from(parts[0]) if parts else self.dir, *parts)

    def _taken_from(self, folder: str) -> str:
        """The run directory that a stage's folder lies in: this one, or one of `run.shared`."""
        return self._owners.get(folder.partition("/")[0], self.dir)

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

    def _all_settings(self, stage: str) -> dict[str, Any]:
        """The settings of the stage and of all stages before it."""
        return {name: value for each in (*before(stage), stage) for name, value in self.settings(each).items()}

    def identity(self, stage: str) -> str | None:
        """A hash of the settings, the inputs and the content of a stage; None while it is unfinished."""
        return _identity(self.uri(stage))

    def _inputs(self, stage: str) -> dict[str, str]:
        """The folders of the stages that a stage is made from; models of a warm start are made from the other run's."""
        inputs, other = {name: self.uri(name) for name in MADE_FROM[stage]}, self.config.train.warm_start
        if other and stage.startswith(("experts", "controls/")):
            inputs["seed"] = files.join(files.absolute(other), stage)
        return inputs

    def check(self, *stages: str) -> None:
        """Refuse folders that were made with another configuration or from other inputs: of these stages, or of all.

        Raises:
            UserError: one line with every field that differs, or every input, and which folders of this run to delete.
                A shared run that does not fit is named instead.
        """
        identity = functools.cache(_identity)
        fields, inputs, stale = dict[str, str](), list[str](), set[str]()
        for stage in stages or STAGE_SETTINGS:
            if (made_with := self._made_with(stage)) is None:
                continue
            made_from, sources = made_with.pop("made_from", {}), self._inputs(stage)
            differing = self._differing(stage, made_with)
            changed = [name for name, known in made_from.items() if identity(sources[name]) not in (None, known)]
            self._check_shared(stage, differing, {name: sources[name] for name in changed})
            fields |= differing
            inputs += [f"{self.uri(stage)} was made from another {name} than {sources[name]}" for name in changed]
            stale |= {stage} if differing or changed else set()
        if fields:
            raise UserError(
                f"run.dir={self.dir} was made with another configuration: {', '.join(fields.values())}. Give another "
                f"run.dir, restore the field, or delete {self._with_later(stale)}."
            )
        if inputs:
            raise UserError(f"{'; '.join(inputs)}. Delete {self._with_later(stale)}: the same command makes it again.")

    def _check_shared(self, stage: str, differing: dict[str, str], changed: dict[str, str]) -> None:
        """UserError: the stage is a shared run's and does not fit, or it was made before such a run's was there."""
        taken_from = self._taken_from(stage)
        if taken_from != self.dir and differing:
            raise UserError(
                f"run.shared: {taken_from} was made with another configuration: {', '.join(differing.values())}. Take it out "
                "of run.shared, or restore the field."
            )
        for name, source in changed.items():
            shared = {taken_from, self._taken_from(name) if source == self.uri(name) else self.dir} - {self.dir}
            if shared:
                raise UserError(
                    f"run.shared: {self.uri(stage)} was made from another {name} than {source}. Take {', '.join(shared)} out "
                    "of run.shared, or give another run.dir."
                )

    def _is_begun(self, stage: str) -> bool:
        return any(files.exists(self.uri(stage, name)) for name in ("settings.json", "manifest.json"))

    def _made_with(self, stage: str) -> dict[str, Any] | None:
        """The settings and inputs that the stage's folder is tied to, or None if it has none yet."""
        uri = self.uri(stage, "settings.json")
        return files.read_json(uri) if files.exists(uri) else None

    def _differing(self, stage: str, made_with: dict[str, Any]) -> dict[str, str]:
        """The fields that are not those that the stage was made with, as they are to be shown. Of the stages before it, only
        those that it knows of."""
        now, own = self._all_settings(stage), self.settings(stage)
        made_with = {name: FORMER_VALUES.get(name, _default(self.config, name)) for name in own} | made_with
        return {
            name: f"{name}={now.get(name)!r} (the run has {made_with.get(name)!r})"
            for name in sorted(made_with)
            if made_with.get(name) != now.get(name)
        }

    def _with_later(self, stages: set[str]) -> str:
        """The folders of stages, and those that there are of the stages made from them."""
        affected = [each for each in STAGE_SETTINGS if not stages.isdisjoint((*before(each), each))]
        own = [each for each in affected if self._taken_from(each) == self.dir]
        there = [self.uri(each) for each in own if self._is_begun(each)]
        return ", ".join(uri for uri in there if not any(uri.startswith(f"{other}/") for other in there))

    def open(self) -> None:
        """Check the directory, then keep the resolved configuration in it.

        Raises:
            UserError: another configuration made it, or it cannot be reached: why, and what to do.
        """
        with files.reaching("run.dir", self.dir):
            self.check()
            files.write_bytes(self.uri("config.yaml"), dump_config(self.config).encode())

    def manifest(self, *folder: str) -> dict[str, Any] | None:
        """The manifest of a finished folder, or None while it is unfinished."""
        uri = self.uri(*folder, "manifest.json")
        return files.read_json(uri) if files.exists(uri) else None

    def require(self, folder: str, job: str) -> Any:
        """The manifest (see `manifests.py`) of an earlier stage; UserError with the command that makes it if there is none."""
        manifest = self.manifest(folder)
        if manifest is None:
            raise UserError(f"{self.uri(folder)} is not finished. Run first: python -m jobs.{job} --config FILE")
        return manifest

    def claim(self, stage: str) -> None:
        """Tie the stage's folder to the present settings and inputs, before anything else is written there.

        A folder that is begun or finished keeps what it is tied to. UserError if that is something else.
        """
        self.check(stage)
        if not self._is_begun(stage):
            found = {name: _identity(folder) for name, folder in self._inputs(stage).items()}
            made_from = {name: identity for name, identity in found.items() if identity is not None}
            files.write_json(self.uri(stage, "settings.json"), {**self._all_settings(stage), "made_from": made_from})

    def checkpoints(self, folder: str) -> str:
        """Where the training of a model of the run keeps its checkpoints: elsewhere for other settings, inputs or shards, so
        that no training goes on from the checkpoint of another."""
        made_with = self._made_with(folder.partition("/cluster=")[0])
        if made_with is None or "made_from" not in made_with:  # of an earlier version
            return self.uri("checkpoints", folder)
        return self.uri("checkpoints", folder, files.fingerprint([made_with, self.identity("shards")])[:16])

    def finish(self, folder: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, which makes the folder finished."""
        files.write_json(self.uri(folder, "manifest.json"), manifest)
        return {**manifest}

    def _untie(self) -> None:
        """Forget the settings of stages that made nothing before an input was refused: the mended one is welcome there.

        Log-probabilities are found again by what they were made of, and checkpoints by what their stage is tied to.
        """
        for stage in STAGE_SETTINGS:
            settings_uri, logprobs = self.uri(stage, "settings.json"), self.uri(stage, "logprobs")
            made = [uri for uri in files.list_files(self.uri(stage)) if not uri.startswith(f"{logprobs}/")]
            if made == [settings_uri]:
                files.delete(settings_uri)

    def stage(self, name: str, work: Callable[[], Mapping[str, Any]]) -> tuple[dict[str, Any], bool]:
        """Run `work` unless the stage is finished; its manifest, and whether it ran now.

        The manifest gets `seconds`, the wall time of the call that finished the stage.
        """
        started = time.perf_counter()
        self.claim(name)
        if (done := self.manifest(name)) is not None:
            return done, False
        try:
            manifest = work()
        except UserError:
            self._untie()
            raise
        return self.finish(name, {**manifest, "seconds": round(time.perf_counter() - started, 1)}), True


def _identity(folder: str) -> str | None:
    """A hash of what a finished stage was made with and from, and of what its manifest says of its content."""
    manifest_uri, settings_uri = files.join(folder, "manifest.json"), files.join(folder, "settings.json")
    if not files.exists(manifest_uri):
        return None
    settings = files.read_json(settings_uri) if files.exists(settings_uri) else None
    return files.fingerprint([settings, files.read_json(manifest_uri).get("content")])


def no_space_left(run_dir: str) -> str:
    """The message for a full disk."""
    return (
        f"run.dir={run_dir}: no space left on the device. Free some, or give another run.dir; what is finished is kept, "
        "and the same command continues."
    )


def _default(config: Config, name: str) -> Any:
    """A dotted field's default, as JSON has it: what a stage was made with that is older than the field."""
    section, _, key = name.partition(".")
    default = next(field.default for field in fields(getattr(config, section)) if field.name == key)
    return None if default is MISSING else list(default) if isinstance(default, tuple) else default


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}
