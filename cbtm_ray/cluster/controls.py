"""Controls with experts: the same documents split in other ways, to be trained by the same code on the same budget.

    random       by a hash of the document's id, drawn once for all
    unbalanced   by k-means without balance, on the same sample, embeddings and number of clusters
    metadata     by the corpus' own domains (Branch-Train-Merge, Li et al. 2022)

A control tokenizes nothing: `shards/controls/random/part-00000.parquet` gives every row of `shards/train/part-00000.parquet`
its cluster of the control. So a finished run can be given a control later.

N documents, K clusters of the control, D embedding dimensions.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from cbtm_ray import files, progress
from cbtm_ray.cluster.embed import load_centers, load_embedder
from cbtm_ray.cluster.embed_workers import map_embedding
from cbtm_ray.cluster.fit import embed_sample, fit_centers, forget_fit
from cbtm_ray.cluster.partition import CHUNK_DOCUMENTS, Totals, load_tokenizer_embedder_centers
from cbtm_ray.cluster.shard_steps import squared_distances
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
        written = map_embedding(tasks, work, 0 if control == "random" else run.config.embed.gpus)
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
    """The centers of k-means without balance, on the sample that the balanced ones were fitted on."""
    tokenizer = load_tokenizer(run.uri("tokenizer"))
    embedder = load_embedder(run.uri("clusterer", "embedder"), tokenizer, run.config.embed.batch_documents)
    documents = encode(tokenizer, read_sample(run)["text"].to_pylist())
    fit_centers(run, embed_sample(run, embedder, documents, folder), folder, balanced=False)
    forget_fit(run, folder)


def _partition_part(row: dict[str, Any], config: Config, control: str, domains: list[str]) -> dict[str, Any]:
    """Name the cluster of every document of one shard; the counts per cluster, and for metadata the sums of embeddings."""
    n_clusters = len(domains) or config.cluster.n_clusters
    counts: dict[str, np.ndarray] = {
        "documents": np.zeros(n_clusters, np.int64),
        "tokens": np.zeros(n_clusters, np.int64),
    }
    if control == "metadata":
        _, _, centers_KD = load_tokenizer_embedder_centers(config)
        counts["sums"] = np.zeros((n_clusters, centers_KD.shape[1]))
    named = [SCHEMA.empty_table()]
    filesystem, path = files.resolve(row["uri"])
    with filesystem.open_input_file(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(CHUNK_DOCUMENTS, columns=["id", "domain", "tokens"]):
            tokens = list(batch["tokens"].to_numpy(zero_copy_only=False))
            if control == "random":
                labels_N = random_clusters(batch["id"].to_pylist(), n_clusters, config.run.seed)
            elif control == "metadata":
                labels_N = np.array([domains.index(domain) for domain in batch["domain"].to_pylist()])
                np.add.at(counts["sums"], labels_N, _embed(tokens, config))
            else:
                distances_NK = squared_distances(torch.from_numpy(_embed(tokens, config)), _unbalanced(config))
                labels_N = distances_NK.argmin(1).numpy()
            np.add.at(counts["documents"], labels_N, 1)
            np.add.at(counts["tokens"], labels_N, [len(document) for document in tokens])
            named.append(pa.table([batch["id"], labels_N.astype(np.int32)], SCHEMA))
    with files.writing(Run(config).uri(partition_folder(control), row["uri"].rpartition("/")[2])) as stream:
        pq.write_table(pa.concat_tables(named), stream, compression="zstd")
    return {**row, **counts}


def random_clusters(ids: list[str], n_clusters: int, seed: int) -> np.ndarray:
    """A cluster for each id, uniform, that depends on nothing but the seed and the id: int64 (N,)."""
    return np.array([int(unit_hash(seed + HASH_OFFSET, document_id) * n_clusters) for document_id in ids], np.int64)


def _embed(documents: list[np.ndarray], config: Config) -> np.ndarray:
    _, embedder, _ = load_tokenizer_embedder_centers(config)
    return embedder.transform(documents)


@lru_cache(maxsize=1)
def _unbalanced(config: Config) -> torch.Tensor:
    return control_centers(Run(config), "unbalanced")


def control_centers(run: Run, control: str) -> torch.Tensor:
    """The centers of a control's clusters, float32 (K, D): of k-means, or the mean embedding of a domain's documents."""
    return load_centers(run.uri(partition_folder(control)))
