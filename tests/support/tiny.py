"""A small corpus and a configuration whose whole run takes seconds of computing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run

DOMAINS = {
    "sea": "the ship sailed over the waves and the captain watched the harbour lights beyond the reef",
    "kitchen": "stir the butter into the flour then bake the cake with sugar and eggs in a warm oven",
    "stars": "the telescope measured the galaxy and its distant supernova by the spectrum of its light",
    "law": "the court held that the statute gives the tenant a right to notice before the eviction",
}


def write_corpus(folder: Path, documents: int = 240, shards: int = 3) -> Path:
    """Documents of four domains in JSONL shards, each a shuffled repetition of its domain's words."""
    random = np.random.default_rng(0)
    names = list(DOMAINS)
    rows = []
    for index in range(documents):
        domain = names[index % len(names)]
        words = random.choice(DOMAINS[domain].split(), size=int(random.integers(30, 60)))
        rows.append({"id": f"d{index:04d}", "text": " ".join(words), "domain": domain})
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        lines = "".join(json.dumps(row) + "\n" for row in rows[shard::shards])
        (folder / f"part-{shard}.jsonl").write_text(lines)
    return folder


def tiny_tree(folder: Path, corpus: Path) -> dict[str, Any]:
    """A configuration whose whole run takes seconds of computing."""
    return {
        "run": {"dir": str(folder)},
        "corpus": {
            "paths": [str(corpus)],
            "domain_column": "domain",
            "id_column": "id",
            "valid_fraction": 0.2,
            "sample_documents": 150,
        },
        "tokens": {"vocab_size": 300, "sequence_length": 32},
        "embed": {"dimensions": 8},
        "cluster": {"n_clusters": 2},
        "seed_model": {
            "hidden_size": 16, "n_layers": 1, "n_heads": 2, "intermediate_size": 32, "train_tokens": 12 * 128,
        },
        "train": {
            "total_tokens": 2 * 8 * 128, "batch_size": 4, "checkpoint_every": 4, "log_every": 2, "experts_per_run": 2,
        },
        "evaluate": {"top_k": [1], "temperatures": [0.1, 1.0], "gammas": [0.9], "betas": [1.0], "prefix_tokens": 8},
    }  # fmt: skip


def run_with(folder: Path, **overrides: Any) -> Run:
    """A run in `folder`; overrides as section__key=value."""
    tree: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "corpus": {"paths": ["documents"]},
        "seed_model": {"train_tokens": 1000},
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return Run(build_config(tree))


def never() -> dict[str, Any]:
    raise AssertionError("a finished stage must not run again")
