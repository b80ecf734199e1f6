"""The jobs as a user runs them: results, skipping, refusals with exit code 2, and a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbtm_ray import files, pipeline
from cbtm_ray.load_config import build_config, config_tree
from cbtm_ray.report import terminal
from cbtm_ray.report.terminal import curves
from cbtm_ray.run import Run
from cbtm_ray.stages import DENSE_FOLDER, MADE_FROM, expert_folder
from tests.support.artifacts import artifacts
from tests.support.tiny import tiny_tree, write_corpus

pytestmark = pytest.mark.ray

ARTIFACTS = (
    "tokenizer/tokenizer.json",
    "clusterer/centers.npy",
    "clusterer/embedder/table.npy",
    "shards/train/part-00000.parquet",
    "shards/valid/part-00002.parquet",
    "seed/model.safetensors",
    "controls/dense/model.safetensors",
    "experts/cluster=0000/model.safetensors",
    "experts/cluster=0001/model.safetensors",
)


def rows(run: Run) -> list[dict]:
    return files.read_json(run.uri("evaluation", "results.json"))["rows"]


def test_results_compare_every_system_on_the_same_tokens(finished_run: Run) -> None:
    found = rows(finished_run)
    assert [row["system"] for row in found[:2]] == ["seed", "dense"]
    mixtures = {(row["routing"], row["top_k"]) for row in found[2:]}
    expected = {(r, k) for r in ("embedding", "ngram", "posterior") for k in (1, 2)}
    expected |= {("prefix", 1), ("oracle", 1)}
    assert mixtures == expected
    dense = found[1]
    assert dense["ratio_to_dense"] == dense["ratio_low"] == dense["ratio_high"] == 1
    for row in found[2:]:
        assert row["train_tokens"] == dense["train_tokens"] == 2 * 8 * 128
        assert row["ratio_to_dense"] == pytest.approx(row["ppl"] / dense["ppl"])
        assert row["ppl"] == pytest.approx(np.exp(row["loss_nats"]))
        assert row["ppl_low"] < row["ppl"] < row["ppl_high"]
    assert sum(bool(row.get("chosen")) for row in found) == 1
    [served] = [row for row in found if row.get("served")]
    rivals = [
        row["tuning_loss_nats"] for row in found if row["routing"] in ("embedding", "ngram") and row["top_k"] == 1
    ]
    assert (served["top_k"], served["tuning_loss_nats"]) == (1, min(rivals))


def test_results_have_the_settings_of_every_router_for_every_top_k(finished_run: Run) -> None:
    """Also for the two experts that `evaluate.top_k`, [1], leaves out of the report of prefix routing."""
    routers = files.read_json(finished_run.uri("evaluation", "results.json"))["routers"]
    assert list(routers) == ["embedding", "ngram", "posterior", "prefix"]
    assert all(list(by_top_k) == ["1", "2"] for by_top_k in routers.values())
    for row in rows(finished_run)[2:-1]:
        assert row["settings"] == routers[row["routing"]][str(row["top_k"])]
    assert routers["prefix"]["2"] == routers["posterior"]["2"]


def test_results_have_every_router_held_after_every_prefix_that_documents_exceed(finished_run: Run) -> None:
    """One and two experts, also where `evaluate.top_k`, [1], leaves out two."""
    results = files.read_json(finished_run.uri("evaluation", "results.json"))
    found = {(row["prefix_tokens"], row["routing"], row["top_k"], row["held"]) for row in results["prefixes"]}
    routed = {(name, k, held) for name in results["routers"] for k in (1, 2) for held in (True, False)}
    lengths = {n for n, *_ in found}
    assert {8, 16, 32} <= lengths <= set(finished_run.config.evaluate.prefix_lengths)
    assert found == {(n, *key) for n in lengths for key in routed | {("oracle", 1, False)}}
    best = {row["prefix_tokens"]: row["loss_nats"] for row in results["prefixes"] if row["routing"] == "oracle"}
    held = [row for row in results["prefixes"] if row["held"] and row["top_k"] == 1]
    assert all(row["loss_nats"] >= best[row["prefix_tokens"]] - 1e-6 for row in held)


def test_the_oracle_is_named_for_what_it_is_and_has_nothing_to_tune(
    finished_run: Run, capsys: pytest.CaptureFixture
) -> None:
    """It costs one expert, and the terminal and the report say that it is hindsight."""
    found = rows(finished_run)
    oracle = next(row for row in found if row["routing"] == "oracle")
    assert oracle["infer_flops_per_token"] == found[1]["infer_flops_per_token"]
    assert not {"settings", "chosen", "served", "tuning_loss_nats"} & oracle.keys()
    terminal.print_results(finished_run)
    assert "best of 2 experts in hindsight" in capsys.readouterr().out
    report = files.read_bytes(finished_run.uri("report.html")).decode()
    assert "best of 2 experts in hindsight, oracle" in report
    assert "No router: the best single expert for each document, in hindsight" in report


def test_dense_row_is_what_hugging_face_gives(finished_run: Run) -> None:
    from cbtm_ray.evaluate.results import held_out_documents

    model = AutoModelForCausalLM.from_pretrained(finished_run.uri(DENSE_FOLDER)).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished_run.uri(DENSE_FOLDER))
    documents = held_out_documents(finished_run)
    total, tokens = 0.0, 0
    for ids, tuning in zip(documents.tokens, documents.for_tuning, strict=True):
        stream = [tokenizer.eos_token_id, *ids.tolist()]
        for first in range(0, 0 if tuning else len(ids), 32):
            window = torch.tensor([stream[first : first + 33]])
            with torch.no_grad():
                logprobs = model(window[:, :-1]).logits.log_softmax(-1)
            total -= logprobs.gather(2, window[:, 1:, None]).sum().item()
            tokens += window.shape[1] - 1
    assert rows(finished_run)[1]["loss_nats"] == pytest.approx(total / tokens, rel=1e-5)


def test_every_model_loads_as_a_hugging_face_folder(finished_run: Run) -> None:
    for folder in ("seed", DENSE_FOLDER, *(expert_folder(cluster) for cluster in range(2))):
        model = AutoModelForCausalLM.from_pretrained(finished_run.uri(folder))
        tokenizer = AutoTokenizer.from_pretrained(finished_run.uri(folder))
        generated = model.generate(**tokenizer("the ship", return_tensors="pt"), max_new_tokens=3, do_sample=False)
        assert generated.shape[1] > 3
        assert finished_run.manifest(folder)["train_tokens"] > 0
    assert finished_run.manifest(expert_folder(1))["cluster"] == 1


def test_curves_and_report_are_in_the_run(finished_run: Run) -> None:
    assert set(curves(finished_run)) == {"seed", "dense", "expert 0000", "expert 0001"}
    points = [json.loads(line) for line in files.read_bytes(finished_run.uri("metrics.jsonl")).splitlines()]
    assert [p["step"] for p in points if p["model"] == "dense"] == list(range(2, 17, 2))
    html = files.read_bytes(finished_run.uri("report.html")).decode()
    chosen = next(row for row in rows(finished_run) if row.get("chosen"))
    assert f'value="{chosen["ppl"]}"' in html
    assert not files.exists(finished_run.uri("checkpoints", "seed"))


def test_a_second_run_does_nothing_but_show_the_results(finished_run: Run, capsys: pytest.CaptureFixture) -> None:
    before = {name: os.stat(finished_run.uri(name)).st_mtime_ns for name in ARTIFACTS}
    pipeline.run_all(finished_run)
    assert {name: os.stat(finished_run.uri(name)).st_mtime_ns for name in ARTIFACTS} == before
    out = capsys.readouterr().out
    assert out.count("already done") == 8
    assert "dense control" in out


def test_every_stage_says_what_it_was_made_from_and_what_it_holds(finished_run: Run) -> None:
    for stage in ("corpus", "tokenizer", "clusterer", "shards", "seed", "experts", "controls/dense", "evaluation"):
        made_from = files.read_json(finished_run.uri(stage, "settings.json"))["made_from"]
        there = [name for name in MADE_FROM[stage] if finished_run.manifest(name) is not None]
        assert made_from == {name: finished_run.identity(name) for name in there}
        assert stage in ("shards", "evaluation") or finished_run.manifest(stage)["content"]


@pytest.mark.slow
def test_stages_deleted_and_made_again_are_the_same_to_the_stages_after_them(finished_run: Run, tmp_path: Path) -> None:
    tree = config_tree(finished_run.config)
    tree["run"]["dir"] = str(tmp_path / "run")
    shutil.copytree(finished_run.dir, tmp_path / "run")
    for stage in ("corpus", "tokenizer", "clusterer", "shards", "seed", "experts", "controls/dense"):
        shutil.rmtree(tmp_path / "run" / stage)
    tree["cluster"]["actors"], tree["train"]["log_every"] = 1, 3
    run = Run(build_config(tree))
    run.open()
    pipeline.run_all(run)
    assert {stage: run.identity(stage) for stage in MADE_FROM} == {s: finished_run.identity(s) for s in MADE_FROM}


def command(job: str, config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", "--config", str(config), *overrides]


def write_config(tmp_path: Path, **changes: dict) -> Path:
    tree = tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus"))
    for section, fields in changes.items():
        tree[section].update(fields)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.total_token=5"], "train.total_token is not a key. Did you mean train.total_tokens?"),
        pytest.param(
            ["corpus.text_column=body"],
            ":1, which has id, text, domain. Set corpus.text_column to one of these.",  # of the shard read first
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, ray_cluster: str, overrides: list[str], message: str
) -> None:
    job = command("build_corpus", write_config(tmp_path), *overrides)
    done = subprocess.run(job, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": ray_cluster})
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("whose", ["ours", pytest.param("the user's", marks=pytest.mark.slow)])
def test_a_defect_in_a_worker_keeps_its_traceback_and_a_mistake_found_there_is_one_line(
    tmp_path: Path, finished_run: Run, ray_cluster: str, whose: str
) -> None:
    """Both are ValueErrors, of the task that partitions a shard: NumPy's of a damaged array, and the one of a changed file."""
    config = write_config(tmp_path, corpus={"paths": list(finished_run.config.corpus.paths)})
    for stage in ("corpus", "tokenizer", "clusterer"):
        shutil.copytree(finished_run.uri(stage), tmp_path / "run" / stage)
    if whose == "ours":
        (tmp_path / "run" / "clusterer" / "ngrams" / "pairs.npy").write_bytes(b"no array")
    else:
        manifest = files.read_json(finished_run.uri("corpus", "manifest.json"))
        changed = tmp_path / "part-1.jsonl"
        changed.write_text(Path(manifest["shards"][1]["uris"][0]).read_text().replace("the", "teh", 1))
        manifest["shards"][1]["uris"] = [str(changed)]
        files.write_json(str(tmp_path / "run" / "corpus" / "manifest.json"), manifest)
    job = command("partition_corpus", config)
    done = subprocess.run(job, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": ray_cluster})
    if whose == "ours":
        assert done.returncode == 1
        assert "Traceback (most recent call last)" in done.stderr
        assert "in _partition_shard" in done.stderr
        assert "ValueError: This file contains pickled (object) data." in done.stderr
        assert not any(line.startswith("error: ") for line in done.stderr.splitlines())
    else:
        assert done.returncode == 2
        assert done.stderr.startswith("error: corpus.paths: part-1.jsonl changed after the corpus was built.")
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_directory_of_another_configuration_is_refused(finished_run: Run, tmp_path: Path) -> None:
    path = Path(finished_run.uri("config.yaml"))
    before = path.read_bytes()
    done = subprocess.run(command("run_all", path, "cluster.n_clusters=3"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "cluster.n_clusters=3 (the run has 2)" in done.stderr
    assert path.read_bytes() == before


def test_print_config_shows_overrides_and_starts_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    done = subprocess.run(
        command("run_all", path, "--print-config", "run.seed=7"), capture_output=True, text=True, check=True
    )
    assert yaml.safe_load(done.stdout)["run"]["seed"] == 7
    assert not (tmp_path / "run").exists()


def kill_when(tmp_path: Path, config: Path, there: str, environment: dict[str, str] | None = None) -> None:
    """Start the whole run, and kill its process group when a file of the run shows that a stage is at work."""
    process = subprocess.Popen(
        command("run_all", config), start_new_session=True, stdout=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 120
    try:
        while not any((tmp_path / "run").glob(there)):
            assert process.poll() is None, f"the run ended before {there} was there"
            assert time.monotonic() < deadline, f"{there} never came"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_driver_killed_among_its_experts_continues_to_the_same_artifacts(
    tmp_path: Path, finished_run: Run, ray_cluster: str
) -> None:
    """On a cluster that outlives it, as under `ray job submit`."""
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    config = write_config(tmp_path, corpus={"paths": list(finished_run.config.corpus.paths)})
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "corpus", "tokenizer", "clusterer", "shards", "seed"):
        source, target = finished_run.uri(name), tmp_path / "run" / name
        shutil.copytree(source, target) if Path(source).is_dir() else shutil.copy(source, target)
    kill_when(tmp_path, config, "experts/cluster=*/manifest.json", environment)
    assert not (tmp_path / "run" / "experts" / "manifest.json").exists()
    subprocess.run(command("run_all", config), check=True, stdout=subprocess.DEVNULL, env=environment)
    assert artifacts(str(tmp_path / "run")) == artifacts(finished_run.dir)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_in_every_stage_continues_to_the_same_artifacts(tmp_path: Path, finished_run: Run) -> None:
    config = write_config(tmp_path)
    for there in (
        "corpus",
        "tokenizer",
        "clusterer/_state.npz",
        "shards/train/part-*.parquet",
        "checkpoints/seed/*/step=*",
        "experts/cluster=*/manifest.json",
        "evaluation/logprobs/*.npy",
    ):
        kill_when(tmp_path, config, there)
        stage = there.split("/")[0].replace("checkpoints", "seed")
        assert not (tmp_path / "run" / stage / "manifest.json").exists(), f"{stage} was over before the kill"
    subprocess.run(command("run_all", config), check=True, stdout=subprocess.DEVNULL)
    assert artifacts(str(tmp_path / "run")) == artifacts(finished_run.dir)
