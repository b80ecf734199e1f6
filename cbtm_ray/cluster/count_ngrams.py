"""Stages `ngrams/` and `ngrams/controls/`: bigram models of clusters, counted over the training shards by Ray Data."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cbtm_ray import files, progress
from cbtm_ray.cluster.ngrams import NgramCounts, add_counts, count_pairs, smooth
from cbtm_ray.config import Config
from cbtm_ray.corpus.documents import unit_hash
from cbtm_ray.corpus.tokenizer import load_tokenizer, vocabulary_size
from cbtm_ray.manifests import ShardsManifest
from cbtm_ray.run import Run
from cbtm_ray.stages import ngrams_folder, partition_folder
from cbtm_ray.train.packed_sequences import control_clusters

HASH_OFFSET = 3
"""From run.seed to the seed of the draw of documents: other draws have hashes of their own."""


def fit_ngrams(run: Run) -> dict[str, Any]:
    """Stage `ngrams/`: tables of the evidence for each cluster; see `ngrams.py`."""
    return _fit(run, "ngrams", run.config.cluster.n_clusters, None)


def fit_control_ngrams(run: Run, control: str) -> dict[str, Any]:
    """Stage `ngrams/controls/CONTROL/`: the same for the clusters of a control, over the same documents."""
    n_clusters = run.require(partition_folder(control), "partition_corpus")["n_clusters"]
    return _fit(run, ngrams_folder(control), n_clusters, control)


def _fit(run: Run, folder: str, n_clusters: int, control: str | None) -> dict[str, Any]:
    """A task counts one shard. The driver holds the distinct pairs of each cluster, 16 bytes each."""
    shards: ShardsManifest = run.require("shards", "partition_corpus")
    tokenizer, wanted = load_tokenizer(run.uri("tokenizer")), run.config.ngrams
    share = wanted.tokens / max(shards["train"]["tokens"], 1)
    tasks = [{"uri": uri} for uri in files.list_files(run.uri("shards", "train"))]
    sizes: dict[str, Any] = {"vocabulary": vocabulary_size(tokenizer), "n_clusters": n_clusters}
    end_of_text = int(tokenizer.eos_token_id)
    work = partial(_count_shard, config=run.config, control=control, share=share, end_of_text=end_of_text, **sizes)
    total = NgramCounts(np.zeros(0, np.int64), np.zeros(0, np.int64), **sizes)
    with progress.bar("count n-grams", len(tasks), "shards") as done:
        counted = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(work).iter_rows()
        for number, row in enumerate(counted, start=1):
            total = add_counts([total, NgramCounts(row["codes"], row["counts"], **sizes)])
            done(number)
    tables = smooth(total, end_of_text=end_of_text, max_pairs=wanted.pairs).tables()
    tables.save(run.uri(folder))
    return {
        "pairs": len(tables.pairs),
        "tokens": int(total.counts.sum()),
        "mib": tables.n_bytes / 2**20,
        "content": hashlib.blake2b(total.codes.tobytes() + total.counts.tobytes(), digest_size=16).hexdigest(),
    }


def _count_shard(
    row: dict[str, Any],
    config: Config,
    control: str | None,
    share: float,
    end_of_text: int,
    vocabulary: int,
    n_clusters: int,
) -> dict[str, Any]:
    filesystem, path = files.resolve(row["uri"])
    table = pq.read_table(path, filesystem=filesystem, columns=["id", "cluster", "tokens"])
    if control is not None:
        clusters = control_clusters(row["uri"], Run(config).uri(partition_folder(control)))
        table = table.set_column(1, "cluster", clusters)
    if share < 1:
        seed = config.run.seed + HASH_OFFSET
        table = table.filter(pa.array([unit_hash(seed, each) < share for each in table["id"].to_pylist()], pa.bool_()))
    tokens = table["tokens"].combine_chunks()
    ends = np.cumsum(tokens.value_lengths().to_numpy())
    documents = np.split(tokens.flatten().to_numpy(), ends[:-1]) if len(ends) else []
    found = count_pairs(
        documents, table["cluster"].to_pylist(), vocabulary=vocabulary, n_clusters=n_clusters, end_of_text=end_of_text
    )
    return {"codes": found.codes, "counts": found.counts}
