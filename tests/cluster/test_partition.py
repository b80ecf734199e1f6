"""Token shards: complete, sorted by cluster, made once, and refused when the corpus changes under them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cbtm_ray import files
from cbtm_ray.cluster import partition
from cbtm_ray.cluster.embed import load_clusterer
from cbtm_ray.cluster.embed_workers import map_embedding
from cbtm_ray.cluster.ngrams import load_tables
from cbtm_ray.cluster.partition import assign, partition_corpus
from cbtm_ray.config import RunSettings
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run
from cbtm_ray.train.packed_sequences import read_documents

pytestmark = pytest.mark.ray


def parts(run: Run, split: str) -> list[Path]:
    return sorted(Path(run.uri("shards", split)).glob("*.parquet"))


def copied_up_to_shards(finished_run: Run, folder: Path) -> Run:
    """The run before its shards were made."""
    run = Run(dataclasses.replace(finished_run.config, run=RunSettings(dir=str(folder))))
    for stage in ("corpus", "tokenizer", "clusterer"):
        shutil.copytree(finished_run.uri(stage), run.uri(stage))
    return run


def test_every_document_is_in_the_shards_once_in_its_most_likely_cluster(finished_run: Run) -> None:
    rows = [
        row
        for split in ("train", "valid")
        for part in parts(finished_run, split)
        for row in pq.read_table(part).to_pylist()
    ]
    assert sorted(row["id"] for row in rows) == [f"d{index:04d}" for index in range(240)]
    tokens, clusters = [np.array(row["tokens"]) for row in rows], [row["cluster"] for row in rows]
    tokenizer = load_tokenizer(finished_run.uri("tokenizer"))
    tables = load_tables(finished_run.uri("clusterer", "ngrams"), tokenizer.eos_token_id)
    assert [int(tables.evidence(document).sum(axis=0).argmax()) for document in tokens] == clusters

    plain = dataclasses.replace(finished_run.config.cluster, refine="none")
    nearest = assign(tokens, dataclasses.replace(finished_run.config, cluster=plain), "clusterer")
    embedder, centers_KD = load_clusterer(finished_run.uri("clusterer"), tokenizer)
    distances_NK = ((embedder.transform(tokens)[:, None] - centers_KD.numpy()) ** 2).sum(axis=2)
    assert nearest.tolist() == distances_NK.argmin(axis=1).tolist()


def test_tokens_are_those_of_the_text(finished_run: Run) -> None:
    tokenizer = load_tokenizer(finished_run.uri("tokenizer"))
    texts = {}
    for uri in files.list_files(finished_run.config.corpus.paths[0]):
        texts |= {row["id"]: row["text"] for row in map(json.loads, files.read_bytes(uri).splitlines())}
    for row in pq.read_table(parts(finished_run, "train")[0]).to_pylist():
        assert row["tokens"] == encode(tokenizer, [texts[row["id"]]])[0].tolist()
        assert row["text_bytes"] == len(texts[row["id"]].encode())


def test_row_groups_hold_one_cluster_each_and_an_expert_reads_its_own(finished_run: Run) -> None:
    for part in parts(finished_run, "train"):
        metadata = pq.ParquetFile(part).metadata
        column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index("cluster")
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(column).statistics
            assert statistics.min == statistics.max
    counted = finished_run.require("shards", "partition_corpus")["train"]["clusters"]
    for cluster in counted:
        documents = list(read_documents(finished_run.uri("shards"), "train", cluster["cluster"]))
        assert (len(documents), sum(map(len, documents))) == (cluster["documents"], cluster["tokens"])


def test_a_restart_makes_only_what_is_missing_and_the_same_bytes(finished_run: Run) -> None:
    first, second, *_ = parts(finished_run, "train")
    before = {part: (part.read_bytes(), os.stat(part).st_mtime_ns) for part in (first, second)}
    second.unlink()
    partition_corpus(finished_run)
    assert os.stat(first).st_mtime_ns == before[first][1]
    assert second.read_bytes() == before[second][0]


@pytest.mark.parametrize("change", ["fewer documents", "another text"])
def test_a_corpus_that_changed_is_refused_by_the_name_of_its_shard(
    finished_run: Run, tmp_path: Path, change: str
) -> None:
    run = copied_up_to_shards(finished_run, tmp_path / "run")
    shard = finished_run.require("corpus", "build_corpus")["shards"][2]
    lines = Path(shard["uris"][0]).read_text().splitlines()
    changed = tmp_path / "part-2.jsonl"
    kept = lines[:-5] if change == "fewer documents" else [*lines[:-1], lines[-1].replace("the", "teh", 1)]
    changed.write_text("\n".join(kept) + "\n")
    task = {"index": 2, **shard, "uris": [str(changed)]}
    with pytest.raises(UserError, match=r"corpus\.paths: part-2\.jsonl changed after the corpus was built\."):
        partition._partition_shard(task, run.config, run.config.corpus)
    assert not list(Path(run.uri("shards")).rglob("*.parquet"))
    partition._partition_shard(task | {"uris": shard["uris"]}, run.config, run.config.corpus)
    assert len(list(Path(run.uri("shards")).rglob("*.parquet"))) == 2


@pytest.mark.slow
def test_the_number_of_actors_changes_nothing(finished_run: Run, tmp_path: Path) -> None:
    config = finished_run.config
    other = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(tmp_path)),
        cluster=dataclasses.replace(config.cluster, actors=1),
    )
    run = Run(other)
    for job in ("build_corpus", "fit_clusters", "partition_corpus"):
        run_job(run, job)
    for name in ("clusterer/centers.npy", "clusterer/embedder/table.npy", "shards/train/part-00001.parquet"):
        assert files.read_bytes(run.uri(name)) == files.read_bytes(finished_run.uri(name))


def test_a_worker_killed_while_it_assigns_changes_nothing(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_once(row: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        chunks = []

        def dying_encode(*args: Any) -> Any:
            chunks.append(args)
            if row["index"] == 1 and len(chunks) == 3 and not (tmp_path / "died").exists():
                (tmp_path / "died").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*args)

        partition.encode, partition.CHUNK_DOCUMENTS = dying_encode, 16  # in this worker's own copy of the module
        result = work(row)
        if row["index"] == 1:
            (tmp_path / "finished").write_text(str(os.getpid()))
        return result

    def map_dying(rows: list[dict[str, Any]], work: Callable[..., Any], gpus: float) -> Any:
        return map_embedding(rows, partial(die_once, work=work), gpus)

    monkeypatch.setattr(partition, "map_embedding", map_dying)
    run = copied_up_to_shards(finished_run, tmp_path / "run")
    partition_corpus(run)
    assert (tmp_path / "died").read_text() != (tmp_path / "finished").read_text()
    for split in ("train", "valid"):
        for ours, undisturbed in zip(parts(run, split), parts(finished_run, split), strict=True):
            assert ours.read_bytes() == undisturbed.read_bytes()
        assert len(list(Path(run.uri("shards", split)).glob("part-*"))) == 3


def test_an_output_larger_than_its_buffer_still_keeps_clusters_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "BUFFER_TOKENS", 50)
    stream = io.BytesIO()
    given = [(f"d{n}", n % 3, np.arange(n % 7 + 1, dtype=np.int32)) for n in range(40)]
    with pq.ParquetWriter(stream, partition.SCHEMA) as writer:
        output = partition._Output(writer, n_clusters=3)
        for name, cluster, tokens in given:
            output.add({"id": name, "domain": None, "cluster": cluster, "text_bytes": 1, "tokens": tokens})
        output.close()
    assert output.documents_K == [14, 13, 13]
    file = pq.ParquetFile(io.BytesIO(stream.getvalue()))
    assert file.num_row_groups > 6
    rows = []
    for group in range(file.num_row_groups):
        members = file.read_row_group(group).to_pylist()
        assert len({row["cluster"] for row in members}) == 1
        rows += members
    assert sorted((row["id"], row["cluster"], row["tokens"]) for row in rows) == sorted(
        (name, cluster, tokens.tolist()) for name, cluster, tokens in given
    )


def test_a_damaged_output_is_refused_by_name(finished_run: Run, tmp_path: Path) -> None:
    part = parts(finished_run, "train")[0]
    table = pq.read_table(part)
    damaged = tmp_path / part.name
    pq.write_table(table.slice(1), damaged)
    with pytest.raises(UserError, match=rf"{part.name} holds \d+ documents, but not those it was made with"):
        partition._read_counts(str(damaged))
