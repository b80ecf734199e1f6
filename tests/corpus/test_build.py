"""Reading the corpus through Ray Data: counts, split, sample, and refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbtm_ray import files
from cbtm_ray.config import Config, CorpusConfig
from cbtm_ray.corpus import build, sample
from cbtm_ray.corpus.build import build_corpus
from cbtm_ray.corpus.documents import is_held_out, read_again, unit_hash
from cbtm_ray.corpus.duplicates import drop_duplicates
from cbtm_ray.corpus.sample import read_sample
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import build_config
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run
from tests.support.tiny import tiny_tree, write_corpus

pytestmark = pytest.mark.ray


def test_counts_split_and_sample_are_those_of_the_documents(finished_run: Run) -> None:
    manifest = finished_run.require("corpus", "build_corpus")
    settings = finished_run.config.corpus
    ids = [f"d{index:04d}" for index in range(240)]
    train = [i for i in ids if not is_held_out(i, settings, 0)]
    assert manifest["train_documents"] == len(train)
    assert manifest["valid_documents"] == 240 - len(train)
    expected = sorted(train, key=lambda i: unit_hash(0, i))[:150]
    assert read_sample(finished_run)["id"].to_pylist() == expected


def test_the_sample_file_is_the_one_of_a_single_pass_over_all_documents(finished_run: Run) -> None:
    corpus_config = finished_run.config.corpus
    everything = [
        json.loads(line)
        for uri in files.list_files(corpus_config.paths[0])
        for line in files.read_bytes(uri).splitlines()
    ]
    train = [row for row in everything if not is_held_out(row["id"], corpus_config, 0)]
    expected = io.BytesIO()
    chosen = sorted(train, key=lambda row: unit_hash(0, row["id"]))[:150]
    pq.write_table(pa.Table.from_pylist(chosen, sample.SAMPLE_SCHEMA), expected)
    assert files.read_bytes(finished_run.uri("corpus", "sample.parquet")) == expected.getvalue()


def scanned(folder: Path, texts: list[str], split: str = "train") -> dict[str, Any]:
    """A shard of these texts as the first reading gives it to the driver."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": f"d{n}", "text": text, "domain": "sea"} for n, text in enumerate(texts)]
    (folder / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"index": 0, "uris": [str(folder / "part.jsonl")], "names": ["part.jsonl"], "split": split}
    return build._scan(task, corpus_of(folder), seed=0, known_M=np.empty(0, np.uint64))


def test_a_shard_sends_ids_to_the_driver_and_then_the_chosen_texts_alone(tmp_path: Path) -> None:
    texts = [f"{n} " * 5000 for n in range(60)]
    row = scanned(tmp_path / "corpus", texts)
    assert 30 < len(row["sample_ids"]) == row["train_documents"] < 60
    assert len(pickle.dumps(row)) < 2000 < len(texts[0])
    chosen = row.pop("sample_ids")[:2]
    documents = list(sample._pick({**row, "ids": chosen}, corpus_of(tmp_path / "corpus")))
    assert {document["text"] for document in documents} == {texts[int(name.removeprefix("d"))] for name in chosen}
    assert len(documents) == 2


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("change", [("fair", "foul"), ("d1", "e1"), ("sea", "air")])
def test_another_text_id_or_domain_of_equal_length_is_noticed(
    tmp_path: Path, split: str, change: tuple[str, str]
) -> None:
    folder = tmp_path / "corpus"
    row = scanned(folder, ["fair wind", "foul wind", "  "], split)
    assert [document.text for document in read_again(row, corpus_of(folder))] == ["fair wind", "foul wind"]
    part = folder / "part.jsonl"
    part.write_text(part.read_text().replace(*change, 1))
    field = "paths" if split == "train" else "valid_paths"
    with pytest.raises(UserError, match=rf"^corpus\.{field}: part\.jsonl changed after the corpus was built\. Restore"):
        list(read_again(row, corpus_of(folder)))
    with pytest.raises(UserError, match=r"part\.jsonl changed"):
        list(sample._pick({**row, "ids": []}, corpus_of(folder)))


def test_a_corpus_that_changed_is_another_to_the_tokenizer_made_from_it(tmp_path: Path, ray_cluster: str) -> None:
    folder = write_corpus(tmp_path / "corpus")
    run = Run(build_config(tiny_tree(tmp_path / "run", folder)))
    run_job(run, "build_corpus")
    for text, refused in ((None, False), ((folder / "part-0.jsonl").read_text().replace("the", "eht"), True)):
        files.delete(run.uri("corpus"))
        if text is not None:
            (folder / "part-0.jsonl").write_text(text)
        with (
            pytest.raises(UserError, match="tokenizer was made from another corpus than") if refused else nullcontext()
        ):
            run_job(run, "build_corpus")


def test_documents_without_text_are_counted_and_left_out(tmp_path: Path, ray_cluster: str) -> None:
    folder = write_corpus(tmp_path / "corpus", documents=40)
    rows = [{"id": f"e{i}", "text": text, "domain": "sea"} for i, text in enumerate(["", "  \n"])]
    (folder / "part-9.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = build_corpus(Run(build_config(tiny_tree(tmp_path / "run", folder))))
    assert manifest["empty_documents"] == 2
    assert manifest["train_documents"] + manifest["valid_documents"] == 40


def refused(tmp_path: Path, folder: Path, **cluster: int) -> Run:
    tree = tiny_tree(tmp_path / "run", folder)
    tree["cluster"].update(cluster)
    tree["train"]["total_tokens"] = 100_000
    return Run(build_config(tree))


def corpus_of(folder: Path) -> CorpusConfig:
    return build_config(tiny_tree(folder, folder)).corpus


def test_more_clusters_than_documents_are_refused(tmp_path: Path, ray_cluster: str) -> None:
    folder = write_corpus(tmp_path / "corpus", documents=30)
    with pytest.raises(UserError, match=r"cluster.n_clusters=100 must be at most .* documents, 2\d. Lower it"):
        build_corpus(refused(tmp_path, folder, n_clusters=100))


def test_an_empty_corpus_is_refused(tmp_path: Path, ray_cluster: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"corpus\.paths: the corpus is empty"):
        build_corpus(refused(tmp_path, folder))


@pytest.mark.parametrize("name", ["part-0.jsonl", "part-9.jsonl"])
def test_an_id_that_two_documents_have_is_refused(tmp_path: Path, ray_cluster: str, name: str) -> None:
    """In one file as in two, and whatever else the documents hold."""
    folder = write_corpus(tmp_path / "corpus", documents=12)
    again = next(f"d{n:04d}" for n in range(0, 12, 3) if not is_held_out(f"d{n:04d}", corpus_of(folder), 0))
    with (folder / name).open("a") as file:
        file.write(json.dumps({"id": again, "text": "another text", "domain": None}) + "\n")
    with pytest.raises(
        UserError, match=rf"corpus\.id_column='id': two documents have the id '{again}'\. Make ids unique"
    ):
        build_corpus(refused(tmp_path, folder))


def test_an_error_in_a_shard_reaches_the_user_with_its_line(tmp_path: Path, ray_cluster: str) -> None:
    folder = write_corpus(tmp_path / "corpus", documents=12)
    (folder / "part-1.jsonl").write_bytes(b'{"id": "a", "text": "fine", "domain": "sea"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"part-1.jsonl:2: 'text' is not UTF-8: byte 0xe9"):
        build_corpus(refused(tmp_path, folder))


def test_held_out_files_of_their_own_are_used_whole(tmp_path: Path, ray_cluster: str) -> None:
    train, valid = write_corpus(tmp_path / "train", 40), write_corpus(tmp_path / "valid", 12)
    tree = tiny_tree(tmp_path / "run", train)
    tree["corpus"]["valid_paths"] = [str(valid)]
    manifest = build_corpus(Run(build_config(tree)))
    assert (manifest["train_documents"], manifest["valid_documents"]) == (40, 12)


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
@pytest.mark.parametrize("own_files", [True, False])
def test_held_out_texts_among_the_training_documents_are_counted_and_can_be_dropped(
    tmp_path: Path, ray_cluster: str, deduplicate: str, own_files: bool
) -> None:
    folder = write_corpus(tmp_path / "corpus", 60)
    tree = tiny_tree(tmp_path / "run", folder)
    tree["corpus"] |= {"deduplicate": deduplicate, "sample_documents": 20}
    if own_files:
        tree["corpus"]["valid_paths"] = [str(write_corpus(tmp_path / "valid", 12))]
        known = range(12)
    else:
        known = [n for n in range(60) if is_held_out(f"d{n:04d}", corpus_of(folder), 0)]
        rows = [json.loads(line) for part in sorted(folder.iterdir()) for line in part.read_text().splitlines()]
        twins = {row["id"]: row for row in rows}
        again = [n for n in range(100, 200) if not is_held_out(f"e{n}", corpus_of(folder), 0)][: len(known)]
        lines = [json.dumps(twins[f"d{n:04d}"] | {"id": f"e{m}"}) + "\n" for n, m in zip(known, again, strict=True)]
        (folder / "part-9.jsonl").write_text("".join(lines))
    run = Run(build_config(tree))
    run_job(run, "build_corpus")
    manifest, dropped = run.require("corpus", "build_corpus"), deduplicate == "exact"
    assert manifest["held_out_duplicates"] == len(known) > 2
    assert manifest["train_documents"] == 60 - (len(known) if dropped else 0)
    said = build.summary(manifest)
    assert f"{len(known)} training texts equal to held-out ones ({'dropped' if dropped else 'corpus.dedup'}" in said
    texts: dict[bool, list[str]] = {False: [], True: []}
    for row in manifest["shards"]:
        for document in drop_duplicates(run, row, read_again(row, run.config.corpus)):
            held_out = row["split"] == "valid" or is_held_out(document.id, run.config.corpus, 0)
            texts[held_out].append(document.text)
    assert [len(texts[held]) for held in (False, True)] == [manifest["train_documents"], manifest["valid_documents"]]
    assert len(set(texts[False]) & set(texts[True])) == (0 if dropped else len(known))
    sampled = read_sample(run)["text"].to_pylist()
    assert len(sampled) == 20
    assert set(sampled) <= set(texts[False])


def test_the_line_of_a_corpus_of_an_older_version_is_read() -> None:
    counts = {"train_documents": 9, "train_bytes": 1000, "valid_documents": 2, "empty_documents": 0}
    assert build.summary(counts) == "9 documents, 1,000 bytes; 2 held out; 0 empty"


def test_packages_become_documents_with_the_package_as_domain(tmp_path: Path, ray_cluster: str) -> None:
    tree = tiny_tree(tmp_path / "run", tmp_path)
    tree["corpus"] = {"packages": ["jinja2", "yaml", "rich"], "package_bytes": 20_000, "valid_fraction": 0.2}
    run = Run(build_config(tree))
    manifest = build_corpus(run)
    table = read_sample(run)
    assert set(table["domain"].to_pylist()) <= {"jinja2", "yaml", "rich"}
    assert len(set(table["text"].to_pylist())) == manifest["train_documents"] > 20
    assert manifest["train_bytes"] + manifest["valid_bytes"] <= 60_000


def test_the_sample_does_not_depend_on_how_the_files_are_cut(
    tmp_path: Path, tiny_config: Config, ray_cluster: str
) -> None:
    samples = []
    for shards in (1, 5):
        folder = write_corpus(tmp_path / f"corpus{shards}", shards=shards)
        settings = dataclasses.replace(tiny_config.corpus, paths=(str(folder),), sample_documents=50)
        run_config = dataclasses.replace(tiny_config.run, dir=str(tmp_path / f"run{shards}"))
        run = Run(dataclasses.replace(tiny_config, corpus=settings, run=run_config))
        build_corpus(run)
        samples.append(read_sample(run).to_pylist())
    assert samples[0] == samples[1]
