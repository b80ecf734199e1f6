"""Controls given to a finished run: fixed partitions of the same tokens, the same training, rows beside the ensemble's."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cbtm_ray import files
from cbtm_ray.branch.branches import control_branches
from cbtm_ray.branch.upcycle import upcycle
from cbtm_ray.branch.worker import read_sequences
from cbtm_ray.cluster.controls import SCHEMA, control_centers, partition_control, random_clusters
from cbtm_ray.cluster.count_ngrams import _count_shard, fit_control_ngrams
from cbtm_ray.cluster.embed import load_clusterer
from cbtm_ray.cluster.likelihood import best_clusters
from cbtm_ray.cluster.ngrams import count_pairs, load_tables, smooth
from cbtm_ray.config import CONTROLS, PARTITION_CONTROLS
from cbtm_ray.corpus.tokenizer import load_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.evaluate.results import held_out_documents
from cbtm_ray.evaluate.scoring import logprobs_uri
from cbtm_ray.models import load_model
from cbtm_ray.pipeline import run_all, run_job
from cbtm_ray.report import terminal
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, MOE_FOLDER, expert_folder, partition_folder
from cbtm_ray.train.packed_sequences import PackedSequences, read_documents
from cbtm_ray.train.trainer import train_model
from tests.support.tiny import DOMAINS, run_with

SPLITS = {"random": 2, "unbalanced": 2, "metadata": 4}


def test_a_random_cluster_depends_on_the_seed_and_the_id_alone() -> None:
    ids = [f"d{n}" for n in range(4000)]
    clusters_N = random_clusters(ids, 5, seed=3)
    assert np.array_equal(random_clusters(ids[::-1], 5, seed=3)[::-1], clusters_N)
    assert not np.array_equal(random_clusters(ids, 5, seed=4), clusters_N)
    np.testing.assert_allclose(np.bincount(clusters_N), 800, atol=100)


def test_n_grams_are_counted_by_the_control_s_clusters_of_the_shard_s_own_documents(tmp_path: Path) -> None:
    """A control may have more clusters than the run; a partition that was made for other documents is refused."""
    run = run_with(tmp_path, cluster__n_clusters=2)
    shard, part = run.uri("shards", "train", "part-0.parquet"), run.uri(partition_folder("metadata"), "part-0.parquet")
    rows = [{"id": "a", "cluster": 1, "tokens": [1, 2]}, {"id": "b", "cluster": 0, "tokens": [3]}]

    def write(uri: str, table: pa.Table) -> None:
        with files.writing(uri) as stream:
            pq.write_table(table, stream)

    def count() -> dict:
        sizes = {"vocabulary": 4, "n_clusters": 3}
        return _count_shard({"uri": shard}, run.config, "metadata", share=1.0, end_of_text=0, **sizes)

    schema = pa.schema({"id": pa.string(), "cluster": pa.int32(), "tokens": pa.list_(pa.int32())})
    write(shard, pa.Table.from_pylist(rows, schema))
    write(part, pa.table([["a", "b"], [2, 0]], SCHEMA))
    assert count()["codes"].tolist() == [(0 * 4 + 1) * 3 + 2, (0 * 4 + 3) * 3 + 0, (1 * 4 + 2) * 3 + 2]
    write(part, pa.table([["b", "a"], [0, 2]], SCHEMA))
    with pytest.raises(UserError, match=r"metadata does not name the documents of \S+part-0\.parquet\. Delete it"):
        count()


@pytest.fixture(scope="module")
def parted_run(finished_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the finished run without its evaluation, whose documents have their clusters of every control.

    `before.json` has its files' times.
    """
    folder = tmp_path_factory.mktemp("controls") / "run"
    shutil.copytree(
        finished_run.dir, folder, ignore=shutil.ignore_patterns("evaluation", "checkpoints", "extra", "average")
    )
    times = {str(path): os.stat(path).st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    config = finished_run.config
    run = Run(
        dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, dir=str(folder)),
            train=dataclasses.replace(config.train, controls=CONTROLS, experts_per_run=8),
        )
    )
    run.open()
    run_job(run, "partition_corpus")
    (folder / "before.json").write_text(json.dumps(times))
    return run


@pytest.fixture(scope="module")
def controls_run(parted_run: Run) -> Run:
    """That run continued to its end."""
    run_all(parted_run)
    return parted_run


def shard_rows(run: Run) -> list[dict]:
    parts = sorted(Path(run.uri("shards", "train")).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def partition_rows(run: Run, control: str) -> list[dict]:
    parts = sorted(Path(run.uri(partition_folder(control))).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_finished_is_left_as_it_was(controls_run: Run) -> None:
    before = json.loads((Path(controls_run.dir) / "before.json").read_text())
    changed = {Path(path).name for path, time in before.items() if os.stat(path).st_mtime_ns != time}
    assert changed == {"config.yaml", "metrics.jsonl", "report.html"}


@pytest.mark.ray
def test_every_training_document_has_its_cluster_of_every_control(parted_run: Run) -> None:
    rows = shard_rows(parted_run)
    ids = [row["id"] for row in rows]
    found = {control: partition_rows(parted_run, control) for control in PARTITION_CONTROLS}
    assert all([row["id"] for row in named] == ids for named in found.values())
    clusters = {control: [row["cluster"] for row in named] for control, named in found.items()}
    assert clusters["random"] == random_clusters(ids, 2, parted_run.config.run.seed).tolist()
    assert clusters["metadata"] == [sorted(DOMAINS).index(row["domain"]) for row in rows]
    embedder, _ = load_clusterer(parted_run.uri("clusterer"), load_tokenizer(parted_run.uri("tokenizer")))
    embeddings_ND = embedder.transform([np.array(row["tokens"]) for row in rows])
    tables = load_tables(parted_run.uri("shards/controls/unbalanced/ngrams"), 0)
    assert clusters["unbalanced"] == best_clusters(tables, [np.array(row["tokens"]) for row in rows], 1024).tolist()
    means_KD = [embeddings_ND[np.array(clusters["metadata"]) == k].mean(axis=0) for k in range(4)]
    np.testing.assert_allclose(control_centers(parted_run, "metadata"), means_KD, atol=1e-6)


@pytest.mark.ray
def test_the_clusters_of_a_control_are_all_documents_once(parted_run: Run) -> None:
    every = sorted(row["tokens"] for row in shard_rows(parted_run))
    for control, n_clusters in SPLITS.items():
        manifest = parted_run.require(partition_folder(control), "partition_corpus")
        assert manifest["n_clusters"] == n_clusters
        uris = parted_run.uri("shards"), "train"
        partition_uri = parted_run.uri(partition_folder(control))
        documents = [list(read_documents(*uris, k, partition_uri)) for k in range(n_clusters)]
        assert sorted(tokens.tolist() for cluster in documents for tokens in cluster) == every
        counted = [(cluster["documents"], cluster["tokens"]) for cluster in manifest["clusters"]]
        assert counted == [(len(cluster), sum(map(len, cluster))) for cluster in documents]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("control", ["random", "metadata"])
def test_an_expert_of_a_control_is_the_seed_trained_on_its_documents(controls_run: Run, control: str) -> None:
    """Without Ray, on documents picked by hand."""
    branch = control_branches(controls_run, control)[1]
    assert branch.spec.name == f"controls/{control}/cluster=0001"
    rows = shard_rows(controls_run)
    if control == "random":
        mine = random_clusters([row["id"] for row in rows], 2, controls_run.config.run.seed) == 1
    else:
        mine = np.array([row["domain"] == "law" for row in rows])
    sequences = PackedSequences(
        [np.array(row["tokens"], np.int32) for row, own in zip(rows, mine, strict=True) if own],
        sequence_length=32,
        end_of_text=load_tokenizer(controls_run.uri("tokenizer")).eos_token_id,
        seed=controls_run.config.run.seed,
    )
    model = load_model(controls_run.uri("seed"))
    train_model(model, sequences, branch.spec, state=None, save=lambda _: None, log=lambda _: None)
    trained = load_model(controls_run.uri(branch.spec.name)).state_dict()
    assert all(torch.equal(weights, trained[name]) for name, weights in model.state_dict().items())


@pytest.mark.ray
@pytest.mark.slow
def test_every_control_has_the_budget_of_the_dense_one(controls_run: Run) -> None:
    dense = controls_run.manifest(DENSE_FOLDER)["train_tokens"]
    for control, n_clusters in SPLITS.items():
        experts = [controls_run.manifest(expert_folder(k, control)) for k in range(n_clusters)]
        assert [expert["cluster"] for expert in experts] == list(range(n_clusters))
        assert [expert["train_tokens"] for expert in experts] == [dense // n_clusters] * n_clusters
        assert controls_run.manifest("controls", control)["train_tokens"] == dense


@pytest.mark.ray
@pytest.mark.slow
def test_the_mixture_of_experts_is_the_upcycled_seed_trained_like_the_dense_control(controls_run: Run) -> None:
    """Without Ray, on all documents; its cost is that of the two experts that run."""
    [branch] = control_branches(controls_run, "moe")
    sequences, _ = read_sequences(controls_run, branch, load_tokenizer(controls_run.uri("tokenizer")).eos_token_id)
    model = upcycle(load_model(controls_run.uri("seed")), 2, controls_run.config.run.seed)
    train_model(model, sequences, branch.spec, state=None, save=lambda _: None, log=lambda _: None)
    trained = load_model(controls_run.uri(MOE_FOLDER)).state_dict()
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(weights, trained[name], atol=1e-6, rtol=1e-5)
    dense, moe = (controls_run.manifest(name) for name in (DENSE_FOLDER, MOE_FOLDER))
    assert [moe[key] == dense[key] for key in ("steps", "train_tokens", "epochs")] == [True] * 3
    mlp, router = 3 * 16 * 32, 2 * 16
    assert moe["infer_flops_per_token"] == dense["infer_flops_per_token"] + 2 * (mlp + router)
    rows = files.read_json(controls_run.uri("evaluation", "results.json"))["rows"]
    row = next(row for row in rows if row["system"] == "moe")
    assert (row["n_clusters"], row["train_flops"]) == (2, 3 * moe["infer_flops_per_token"] * moe["train_tokens"])


@pytest.mark.ray
def test_every_control_has_n_grams_of_its_own_clusters(parted_run: Run) -> None:
    rows = shard_rows(parted_run)
    documents = [np.array(row["tokens"]) for row in rows]
    for control, n_clusters in SPLITS.items():
        clusters = [row["cluster"] for row in partition_rows(parted_run, control)]
        manifest = fit_control_ngrams(parted_run, control)
        counts = count_pairs(documents, clusters, vocabulary=300, n_clusters=n_clusters, end_of_text=0)
        expected = smooth(counts, end_of_text=0, max_pairs=500_000).tables()
        found = load_tables(parted_run.uri("ngrams", "controls", control), 0)
        assert manifest["tokens"] == sum(map(len, documents))
        assert np.array_equal(found.pairs, expected.pairs)
        assert np.array_equal(found.pair_PK, expected.pair_PK)


@pytest.mark.ray
def test_more_domains_than_steps_are_refused(parted_run: Run) -> None:
    train = dataclasses.replace(parted_run.config.train, total_tokens=3 * 128)
    run = Run(dataclasses.replace(parted_run.config, train=train))
    with pytest.raises(UserError, match=r"total_tokens=384 must give each of the 4 experts .* raise it to 512\."):
        control_branches(run, "metadata")


@pytest.mark.ray
@pytest.mark.slow
def test_results_have_the_controls_after_the_ensemble(controls_run: Run) -> None:
    rows = files.read_json(controls_run.uri("evaluation", "results.json"))["rows"]
    systems = [row["system"] for row in rows]
    assert systems == sorted(systems, key=["seed", "dense", "moe", "cbtm", *SPLITS].index)
    found = {control: {(r["routing"], r["top_k"]) for r in rows if r["system"] == control} for control in CONTROLS}
    assert found.pop("moe") == {(None, 2)}
    assert found == {
        "random": {("uniform", 2), *((routing, k) for routing in ("bayes", "ngram") for k in (1, 2)), ("oracle", 1)},
        "unbalanced": {
            *((routing, k) for routing in ("embedding", "ngram", "posterior") for k in (1, 2)),
            ("oracle", 1),
        },
        "metadata": {
            ("uniform", 4),
            *((routing, k) for routing in ("bayes", "embedding", "ngram") for k in (1, 4)),
            ("oracle", 1),
        },
    }
    assert {row["system"] for row in rows if row.get("chosen")} == {"cbtm"}
    assert {row["n_clusters"] for row in rows if row["system"] == "metadata"} == {4}
    compute = {
        row["routing"]: row["infer_flops_per_token"] for row in rows if (row["system"], row["top_k"]) == ("metadata", 1)
    }
    assert compute["bayes"] / 4 <= compute["embedding"] <= compute["bayes"]  # one expert, and what it reads again


@pytest.mark.ray
@pytest.mark.slow
def test_uniform_routing_of_the_random_experts_by_hand(controls_run: Run) -> None:
    documents = held_out_documents(controls_run)
    reported_T = np.repeat(~documents.for_tuning, [len(tokens) for tokens in documents.tokens])
    names = [f"controls/random/cluster={k:04d}" for k in range(2)]
    logprobs = [files.read_array(logprobs_uri(controls_run, name))[reported_T] for name in names]
    rows = files.read_json(controls_run.uri("evaluation", "results.json"))["rows"]
    row = next(row for row in rows if (row["system"], row["routing"]) == ("random", "uniform"))
    assert row["loss_nats"] == pytest.approx(-np.log(np.exp(logprobs).mean(axis=0)).mean(), rel=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_controls_are_in_the_table_the_report_and_the_metrics(controls_run: Run, capsys: pytest.CaptureFixture) -> None:
    terminal.print_results(controls_run)
    table = capsys.readouterr().out
    report = files.read_bytes(controls_run.uri("report.html")).decode()
    for row in files.read_json(controls_run.uri("evaluation", "results.json"))["rows"]:
        assert f"{row['ppl']:.2f} [{row['ppl_low']:.2f}, {row['ppl_high']:.2f}]" in table
        assert f'value="{row["ppl"]}"' in report
    assert "random, all 2 experts" in table
    assert "metadata, top-1 of 4 experts, bayes" in report
    assert "mixture of experts" in table
    assert "mixture of experts" in report
    models = {json.loads(line)["model"] for line in files.read_bytes(controls_run.uri("metrics.jsonl")).splitlines()}
    assert {f"{control} {k:04d}" for control, n in SPLITS.items() for k in range(n)} | {"moe"} < models


@pytest.mark.ray
def test_a_document_without_a_domain_is_refused_by_its_id(parted_run: Run, tmp_path: Path) -> None:
    run = Run(dataclasses.replace(parted_run.config, run=dataclasses.replace(parted_run.config.run, dir=str(tmp_path))))
    shutil.copytree(parted_run.uri("shards"), run.uri("shards"))
    part = sorted(Path(run.uri("shards", "train")).glob("*.parquet"))[-1]
    table = pq.read_table(part)
    domains = pa.array([None, *table["domain"].to_pylist()[1:]], pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("domain"), "domain", domains), part)
    without = table["id"][0].as_py()
    with pytest.raises(UserError, match=f"'metadata', but document '{without}' has no domain") as caught:
        partition_control(run, "metadata")
    assert "corpus.domain_column='domain'" in str(caught.value)
