"""Experts that go on from another run's: from which folder, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbtm_ray import files
from cbtm_ray.branch.branches import expert_branches
from cbtm_ray.branch.warm_start import check_warm_start
from cbtm_ray.config import Config, EmbedConfig
from cbtm_ray.corpus.tokenizer import save_tokenizer, train_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, expert_folder

NAMES = [DENSE_FOLDER, expert_folder(0), expert_folder(1)]


def make(config: Config, folder: Path, warm_start: Path | None = None, words: str = "some words") -> Run:
    """A run as far as its clusterer."""
    run = Run(
        dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, dir=str(folder)),
            train=dataclasses.replace(config.train, warm_start=warm_start and str(warm_start)),
        )
    )
    save_tokenizer(train_tokenizer([words], 300), run.uri("tokenizer"))
    files.write_array(run.uri("clusterer", "centers.npy"), np.eye(2, 8, dtype=np.float32))
    files.write_array(run.uri("clusterer", "embedder", "table.npy"), np.ones((300, 8), np.float32))
    return run


@pytest.fixture
def other(tiny_config: Config, tmp_path: Path) -> Run:
    run = make(tiny_config, tmp_path / "other")
    for name in NAMES:
        run.finish(name, {})
    return run


def test_experts_and_control_begin_with_those_of_the_other_run(tiny_config: Config, other: Run, tmp_path: Path) -> None:
    run = make(tiny_config, tmp_path / "run", tmp_path / "other")
    branches = expert_branches(run)
    assert {branch.spec.name: branch.init for branch in branches} == {name: other.uri(name) for name in NAMES}
    check_warm_start(run, NAMES)


def test_without_one_they_begin_with_the_seed_and_nothing_is_checked(tiny_config: Config, tmp_path: Path) -> None:
    run = make(tiny_config, tmp_path / "run")
    assert {branch.init for branch in expert_branches(run)} == {run.uri("seed")}
    check_warm_start(run, NAMES)


def test_a_run_without_these_experts_is_refused(tiny_config: Config, other: Run, tmp_path: Path) -> None:
    files.delete(other.uri(expert_folder(1), "manifest.json"))
    run = make(tiny_config, tmp_path / "run", tmp_path / "other")
    with pytest.raises(UserError, match=r"^train\.warm_start='.*other' must be .*; it has no finished .*=0001\.$"):
        check_warm_start(run, NAMES)


@pytest.mark.parametrize("part", ["centers.npy", "embedder/table.npy"])
def test_a_run_of_other_clusters_is_refused(tiny_config: Config, other: Run, tmp_path: Path, part: str) -> None:
    files.write_array(other.uri("clusterer", part), np.zeros((2, 8), np.float32))
    run = make(tiny_config, tmp_path / "run", tmp_path / "other")
    with pytest.raises(UserError, match=rf"but clusterer/{part} is not the same: its experts are of other clusters"):
        check_warm_start(run, NAMES)


def save_sentence_embedder(run: Run, version: str, **embed: Any) -> None:
    """As `save_embedder` leaves it, with the file that transformers writes; and any field, as earlier versions did."""
    fields = dataclasses.asdict(EmbedConfig(embedder="sentence", encoder="someone/encoder"))
    folder = run.uri("clusterer", "embedder")
    files.write_json(files.join(folder, "embedder.json"), fields | embed)
    files.write_json(files.join(folder, "config.json"), {"transformers_version": version})
    files.write_bytes(files.join(folder, "model.safetensors"), b"weights")


def test_execution_fields_and_the_place_of_an_encoder_may_differ(
    tiny_config: Config, other: Run, tmp_path: Path
) -> None:
    run = make(tiny_config, tmp_path / "run", tmp_path / "other")
    save_sentence_embedder(run, "5.0", batch_documents=8, gpus=1.0, encoder="/models/encoder")
    save_sentence_embedder(other, "5.1")
    check_warm_start(run, NAMES)


def test_an_embedder_of_other_settings_is_refused(tiny_config: Config, other: Run, tmp_path: Path) -> None:
    run = make(tiny_config, tmp_path / "run", tmp_path / "other")
    save_sentence_embedder(run, "5.0", encoder_tokens=64)
    save_sentence_embedder(other, "5.0")
    with pytest.raises(UserError, match=r"but clusterer/embedder/embedder\.json is not the same"):
        check_warm_start(run, NAMES)


def test_a_run_of_another_tokenizer_is_refused(tiny_config: Config, other: Run, tmp_path: Path) -> None:
    run = make(tiny_config, tmp_path / "run", tmp_path / "other", words="other words, other merges")
    with pytest.raises(UserError, match="but tokenizer is not the same"):
        check_warm_start(run, NAMES)
