"""A run as far as its seed, made without Ray: what tests of the experts' training begin with, and what they compare with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from transformers import PreTrainedModel

from cbtm_ray import files
from cbtm_ray.branch.branches import Branch
from cbtm_ray.branch.worker import read_sequences
from cbtm_ray.corpus.tokenizer import encode, load_tokenizer, save_tokenizer, train_tokenizer
from cbtm_ray.load_config import build_config
from cbtm_ray.models import load_model, new_model, save_model
from cbtm_ray.run import Run
from cbtm_ray.train.trainer import train_model
from tests.support.tiny import tiny_tree, write_corpus

Document = tuple[int, list[int]]
"""Cluster and token ids."""


def seeded_run(folder: Path, run_dir: str = "", *, steps: int, **train: Any) -> tuple[Run, list[str]]:
    """A run with two clusters whose experts have so many steps each, and the command that trains them."""
    tree = tiny_tree(folder / "run", write_corpus(folder / "corpus"))
    tree["run"]["dir"] = run_dir or tree["run"]["dir"]
    tree["train"] |= {"total_tokens": 2 * steps * 128, "experts_per_run": 1, "log_every": 10, **train}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    run = Run(build_config(tree))
    texts = [json.loads(line)["text"] for path in sorted((folder / "corpus").iterdir()) for line in path.open()]
    tokenizer = train_tokenizer(texts, 300)
    save_tokenizer(tokenizer, run.uri("tokenizer"))
    documents = [(n % 2, tokens.tolist()) for n, tokens in enumerate(encode(tokenizer, texts))]
    write_shards(run, 0, documents[:40], documents[40:])
    save_model(new_model(run.config.seed_model, tokenizer, 128, 0), tokenizer, run.uri("seed"))
    run.finish("seed", {})
    return run, [sys.executable, "-m", "jobs.train_experts", "--config", str(folder / "config.yaml")]


def write_shards(run: Run, part: int, held_out: list[Document], documents: list[Document]) -> None:
    """One shard of documents to train on and one of held-out documents, each document with its cluster."""
    schema = pa.schema({"cluster": pa.int32(), "tokens": pa.list_(pa.int32())})
    for split, given in (("train", documents), ("valid", held_out)):
        rows = [{"cluster": cluster, "tokens": tokens} for cluster, tokens in given]
        with files.writing(run.uri("shards", split, f"part-{part:05d}.parquet")) as stream:
            pq.write_table(pa.Table.from_pylist(rows, schema), stream)


def train_here(run: Run, branch: Branch) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The same training without Ray and without an interruption."""
    sequences, valid = read_sequences(run, branch, load_tokenizer(run.uri("tokenizer")).eos_token_id)
    model = load_model(branch.init)
    kept: list[dict[str, Any]] = []
    curve = train_model(model, sequences, branch.spec, valid=valid, state=None, save=kept.append, log=kept.append)
    return model, curve


def check_as_undisturbed(run: Run, branch: Branch, folder: Path) -> None:
    """Model byte by byte and curve number by number are those of training without Ray and without an interruption."""
    model, curve = train_here(run, branch)
    save_model(model, load_tokenizer(run.uri("tokenizer")), str(folder))
    ours = files.read_bytes(run.uri(branch.spec.name, "model.safetensors"))
    assert ours == (folder / "model.safetensors").read_bytes()
    timed = ("tokens_per_s", "mfu")
    ours, theirs = (
        [{key: value for key, value in point.items() if key not in timed} for point in each]
        for each in (run.require(branch.spec.name, "train_experts")["curve"], curve)
    )
    assert ours == theirs
