"""Log-probabilities that are kept: found again for the same weights, documents and prompts, and for no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbtm_ray import files
from cbtm_ray.corpus.tokenizer import save_tokenizer, train_tokenizer
from cbtm_ray.evaluate.scoring import check_held_out_loss, logprobs_uri
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from cbtm_ray.train.trainer import train_model
from tests.support.tiny import DOMAINS, tiny_tree
from tests.support.tiny_models import SPEC, changed, make_model, make_sequences, make_valid


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


@pytest.mark.parametrize("apart", [False, True])
def test_a_model_is_scored_only_if_its_held_out_loss_is_training_s(tmp_path: Path, apart: bool) -> None:
    tree = tiny_tree(tmp_path, tmp_path / "corpus")
    tree["tokens"]["sequence_length"], tree["train"]["cross_documents"] = 16, not apart
    run, model, valid = Run(build_config(tree)), make_model(), make_valid()
    starts = zip(valid.starts, valid.lengths, strict=True)
    rows = [{"cluster": 1, "tokens": valid.tokens[first : first + length - 1].tolist()} for first, length in starts]
    table = pa.Table.from_pylist(rows, pa.schema({"cluster": pa.int32(), "tokens": pa.list_(pa.int32())}))
    with files.writing(run.uri("shards", "valid", "part-00000.parquet")) as stream:
        pq.write_table(table, stream)
    spec = changed(SPEC, cross_documents=not apart)
    curve = train_model(model, make_sequences(), spec, valid=valid, state=None, save=print, log=lambda point: None)
    loss, tokens = curve[-1]["valid_loss_nats"], 8 * 16
    run.finish("experts/cluster=0001", {"cluster": 1, "valid_loss_nats": loss, "valid_tokens": tokens})
    check_held_out_loss(run, "experts/cluster=0001", model, 0)
    model.lm_head.weight.data *= 1.1
    with pytest.raises(
        RuntimeError, match=rf"cluster=0001: .* where the end of training found {loss:.4f} on the same 128"
    ):
        check_held_out_loss(run, "experts/cluster=0001", model, 0)
    run.finish("experts/cluster=0001", {"cluster": 1, "valid_loss_nats": None, "valid_tokens": 0})
    check_held_out_loss(run, "experts/cluster=0001", model, 0)
