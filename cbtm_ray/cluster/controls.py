"""Controls with experts: the same documents split in other ways, to be trained by the same code on the same budget.

    random       by a hash of the document's id, drawn once for all
    unbalanced   as the run's clusters, of the same sample, but without balance
    metadata     by the corpus' own domains (Branch-Train-Merge, Li et al. 2022)

A control tokenizes nothing: `shards/controls/random/part-00000.parquet` gives every row of `shards/train/part-00000.parquet`
its cluster of the control. So a finished run can be given a control later.

N documents, K clusters of the control, D embedding dimensions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from cbtm_ray import files, progress
from cbtm_ray.cluster.embed import load_centers, load_embedder
from cbtm_ray.cluster.embed_workers import map_embedding
from cbtm_ray.cluster.fit import cluster_sample, forget_fit
from cbtm_ray.cluster.partition import CHUNK_DOCUMENTS, Totals, assign, embedding_gpus, load_embedder_once
from cbtm_ray.config import Config
from cbtm_ray.corpus.documents import unit_hash
from cbtm_ray.corpus.sample import read_sample
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.run import Run
from cbtm_ray.stages import partition_folder
from cbtm_ray.train.packed_sequences import check_long_enough

SCHEMA = pa.schema([("id", pa.string()), ("cluster", pa.int32())])
HASH_OFFSET = 2
"""From run.seed to the seed of the random split: the documents held out, and their halves, were chosen by other hashes."""


def partition_control(run: Run, control: str) -> dict[str, Any]:
    """Stage `shards/controls/CONTROL/`: the cluster of every training document; and centers, but for random.

    Raises:
        UserError: a document has no domain (metadata), or a cluster no document or too few tokens.
    """
    run.require("shards", "partition_corpus")
    folder = partition_folder(control)
    domains = _domains(run) if control == "metadata" else []
    if control == "unbalanced":
        _fit_unbalanced(run, folder)
    n_clusters = len(domains) or run.config.cluster.n_clusters
    work = partial(_partition_part, config=run.config, control=control, domains=domains)
    tasks = [{"uri": uri} for uri in files.list_files(run.uri("shards", "train"))]
    totals, sums = Totals(n_clusters), dict[str, np.ndarray]()
    with progress.bar(f"split: {control}", len(tasks), "shards") as done:
        written = map_embedding(tasks, work, _gpus(run.config, control))
        for number, row in enumerate(written.iter_rows(), start=1):
            totals.add(row)
            if control == "metadata":
                sums[row["uri"]] = row["sums"]
            done(number)
    totals.check_none_empty()
    counts = totals.as_dict()
    check_long_enough(counts["clusters"], run.config.tokens.sequence_length, control, domains)
    if control == "metadata":
        sums_KD = np.sum([sums[task["uri"]] for task in tasks], axis=0)  # in the order of the shards, whoever was first
        files.write_array(run.uri(folder, "centers.npy"), (sums_KD / totals.documents_K[:, None]).astype(np.float32))
    return {"n_clusters": n_clusters, "domains": domains, **counts}


def _domains(run: Run) -> list[str]:
    """The names of the training documents' domains, sorted."""
    filesystem, path = files.resolve(run.uri("shards", "train"))
    dataset = ds.dataset(path, filesystem=filesystem, format="parquet")
    found: set[str] = set()
    for batch in dataset.to_batches(columns=["id", "domain"]):
        if batch["domain"].null_count:
            without = batch["id"].filter(batch["domain"].is_null())[0].as_py()
            raise UserError(
                f"train.controls has 'metadata', but document {without!r} has no domain. Give it one in "
                f"corpus.domain_column={run.config.corpus.domain_column!r}, or leave the control out."
            )
        found.update(batch["domain"].unique().to_pylist())
    return sorted(found)


def _fit_unbalanced(run: Run, folder: str) -> None:
    """Clusters of the sample as those of the run, but without balance."""
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    embedder = load_embedder(run.uri("clusterer", "embedder"), tokenizer, run.config.embed.batch_documents)
    sample = read_sample(run)
    documents = encode(tokenizer, sample["text"].to_pylist())
    cluster_sample(run, sample, embedder, documents, folder, balanced=False)
    forget_fit(run, folder)


def _gpus(config: Config, control: str) -> float:
    """GPUs of a worker: what it embeds documents with, if it does."""
    return {"random": 0, "unbalanced": embedding_gpus(config), "metadata": config.embed.gpus}[control]


def _partition_part(row: dict[str, Any], config: Config, control: str, domains: list[str]) -> dict[str, Any]:
    """Name the cluster of every document of one shard; the counts per cluster, and for metadata the sums of embeddings."""
    n_clusters = len(domains) or config.cluster.n_clusters
    counts: dict[str, np.ndarray] = {
        "documents": np.zeros(n_clusters, np.int64),
        "tokens": np.zeros(n_clusters, np.int64),
    }
    if control == "metadata":
        counts["sums"] = np.zeros((n_clusters, load_centers(Run(config).uri("clusterer")).shape[1]))
    named = [SCHEMA.empty_table()]
    filesystem, path = files.resolve(row["uri"])
    with filesystem.open_input_file(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(CHUNK_DOCUMENTS, columns=["id", "domain", "tokens"]):
            tokens = list(batch["tokens"].to_numpy(zero_copy_only=False))
            if control == "random":
                labels_N = random_clusters(batch["id"].to_pylist(), n_clusters, config.run.seed)
            elif control == "metadata":
                labels_N = np.array([domains.index(domain) for domain in batch["domain"].to_pylist()])
                np.add.at(counts["sums"], labels_N, load_embedder_once(config).transform(tokens))
            else:
                labels_N = assign(tokens, config, partition_folder(control))
            np.add.at(counts["documents"], labels_N, 1)
            np.add.at(counts["tokens"], labels_N, [len(document) for document in tokens])
            named.append(pa.table([batch["id"], labels_N.astype(np.int32)], SCHEMA))
    with files.writing(Run(config).uri(partition_folder(control), row["uri"].rpartition("/")[2])) as stream:
        pq.write_table(pa.concat_tables(named), stream, compression="zstd")
    return {**row, **counts}


def random_clusters(ids: list[str], n_clusters: int, seed: int) -> np.ndarray:
    """A cluster for each id, uniform, that depends on nothing but the seed and the id: int64 (N,)."""
    return np.array([int(unit_hash(seed + HASH_OFFSET, document_id) * n_clusters) for document_id in ids], np.int64)


def control_centers(run: Run, control: str) -> torch.Tensor:
    """The centers of a control's clusters, float32 (K, D): of k-means, or the mean embedding of a domain's documents."""
    return load_centers(run.uri(partition_folder(control)))
