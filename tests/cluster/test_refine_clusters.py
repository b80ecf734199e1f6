"""Refining over a cluster: resumed is uninterrupted, and the rounds say what they did."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cbtm_ray import files
from cbtm_ray.cluster.refine_clusters import REFINED_STATE, refine_clusters
from cbtm_ray.config import RunSettings
from cbtm_ray.corpus.sample import read_sample
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.run import Run

pytestmark = pytest.mark.ray


def rounds_of(run: Run, rounds: int) -> Run:
    cluster = dataclasses.replace(run.config.cluster, n_clusters=4, refine_rounds=rounds)
    return Run(dataclasses.replace(run.config, cluster=cluster))


def test_rounds_go_on_where_they_stopped(finished_run: Run, tmp_path: Path) -> None:
    config = dataclasses.replace(finished_run.config, run=RunSettings(dir=str(tmp_path)))
    shutil.copytree(finished_run.uri("tokenizer"), tmp_path / "tokenizer")
    sample = read_sample(finished_run)
    documents = encode(load_tokenizer(finished_run.uri("tokenizer")), sample["text"].to_pylist())
    labels_N = (np.arange(len(documents)) % 4).astype(np.int32)

    def refined(rounds: int, folder: str):  # type: ignore[no-untyped-def]
        domains = sample["domain"].to_pylist()
        run = rounds_of(Run(config), rounds)
        return refine_clusters(run, documents, labels_N, domains, folder, balanced=True)

    state, said = refined(3, "whole")
    refined(1, "parts")
    again, said_again = refined(3, "parts")
    assert said_again == said
    assert np.array_equal(again.labels_N, state.labels_N)
    whole, parts = (files.read_array(str(tmp_path / name / "ngrams" / "pair_PK.npy")) for name in ("whole", "parts"))
    assert np.array_equal(whole, parts)
    assert len(said) == 3 or said[-1]["moved"] == 0
    assert said[-1]["nmi"] is not None
    assert np.ptp(np.bincount(state.labels_N, minlength=4)) <= 1

    labels_N = (np.arange(len(documents)) // 40).astype(np.int32)
    other, _ = refined(3, "other")
    anew, _ = refined(3, "whole")
    assert np.array_equal(anew.labels_N, other.labels_N), "the state of other clusters is not gone on from"


def test_a_run_says_what_its_rounds_moved(finished_run: Run) -> None:
    manifest = json.loads(files.read_bytes(finished_run.uri("clusterer", "manifest.json")))
    assert 1 <= len(manifest["refined"]) <= finished_run.config.cluster.refine_rounds
    assert not files.exists(finished_run.uri("clusterer", REFINED_STATE))
