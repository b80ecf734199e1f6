"""Log-probabilities that are kept: found again for the same weights, documents and prompts, and for no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cbtm_ray.corpus.tokenizer import save_tokenizer, train_tokenizer
from cbtm_ray.evaluate.scoring import logprobs_uri
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from tests.support.tiny import DOMAINS, tiny_tree


def run_with(folder: Path, shards: str = "shards", weights: str = "weights", **evaluate: Any) -> Run:
    tree = tiny_tree(folder, folder / "corpus")
    tree["evaluate"] |= evaluate
    run = Run(build_config(tree))
    run.finish("shards", {"content": shards})
    run.finish("seed", {"content": weights})
    return run


def test_of_other_weights_or_documents_there_are_none_yet(tmp_path: Path) -> None:
    found = [
        logprobs_uri(run_with(tmp_path, **given), "seed")
        for given in ({}, {"gammas": [0.5]}, {"shards": "other"}, {"weights": "other"}, {"max_documents": 9})
    ]
    assert found[0] == found[1], "what is tuned changes no log-probability"
    assert len(set(found)) == 4
    assert found[0].startswith(f"{tmp_path}/evaluation/logprobs/seed-")


def test_of_other_prompts_there_are_none_yet(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(DOMAINS.values(), 300), str(tmp_path / "tokenizer"))
    found = []
    for label in ("sea", "law", "sea"):
        rows = [
            {"text": "a ship", "label": each, "split": split} for each in (label, "pan") for split in ("train", "test")
        ]
        (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found.append(logprobs_uri(run_with(tmp_path, fewshot_shots=1), "seed", str(tmp_path / "task.jsonl")))
    assert found[0] == found[2] != found[1]
    assert found[0].startswith(f"{tmp_path}/evaluation/logprobs/fewshot-task/seed-")
