"""Every embedder through the stages that use it, and embedding where there is no GPU."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cbtm_ray import files
from cbtm_ray.cluster.embed import load_clusterer
from cbtm_ray.cluster.embed_workers import map_embedding
from cbtm_ray.cluster.fit import fit_clusters
from cbtm_ray.cluster.partition import partition_corpus
from cbtm_ray.config import EmbedConfig, RunSettings
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.run import Run
from tests.support.minilm import minilm_folder

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.parametrize("embedder", ["word_tfidf", "sentence"])
def test_documents_go_to_the_nearest_center_of_the_chosen_embedder(
    finished_run: Run, tmp_path: Path, embedder: str
) -> None:
    embed = EmbedConfig(embedder="word_tfidf", dimensions=8)
    if embedder == "sentence":
        embed = EmbedConfig(embedder="sentence", encoder=minilm_folder(), encoder_tokens=32)
    run = Run(dataclasses.replace(finished_run.config, run=RunSettings(dir=str(tmp_path)), embed=embed))
    for folder in ("corpus", "tokenizer"):
        shutil.copytree(finished_run.uri(folder), run.uri(folder))
    found = run.stage("clusterer", lambda: fit_clusters(run))[0]
    assert found["nmi"] > 0.4, "two clusters of four domains"
    assert not files.exists(run.uri("clusterer", "embeddings"))
    partition_corpus(run)
    loaded, centers_KD = load_clusterer(run.uri("clusterer"), load_tokenizer(run.uri("tokenizer")))
    rows = [row for part in sorted(tmp_path.glob("shards/*/*.parquet")) for row in pq.read_table(part).to_pylist()]
    assert len(rows) == 240
    embeddings_ND = loaded.transform([np.array(row["tokens"], np.int32) for row in rows])
    distances_NK = ((embeddings_ND[:, None] - centers_KD.numpy()) ** 2).sum(axis=2)
    near = np.sort(distances_NK, axis=1)
    clear = near[:, 1] - near[:, 0] > 1e-4  # batches of other documents round an encoder's last digits differently
    assert clear.mean() > 0.9
    assert (distances_NK.argmin(axis=1) == [row["cluster"] for row in rows])[clear].all()


def test_gpus_that_the_machine_lacks_are_refused(ray_cluster: str) -> None:
    with pytest.raises(UserError, match=r"embed\.gpus=0\.5 must be at most the GPUs of this machine, 0\."):
        map_embedding([{"n": 1}], lambda row: row, 0.5)
