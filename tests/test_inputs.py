"""What is looked for before Ray starts."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from cbtm_ray.corpus.tokenizer import train_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.inputs import check_inputs
from cbtm_ray.load_config import build_config
from cbtm_ray.models import save_model
from cbtm_ray.run import Run
from tests.support.tiny import DOMAINS, tiny_tree, write_corpus


def run_with(tmp_path: Path, **sections: dict[str, Any]) -> Run:
    tree = tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus", documents=8))
    for section, fields in sections.items():
        tree[section].update(fields)
    return Run(build_config(tree))


def test_what_is_there_passes(tmp_path: Path) -> None:
    check_inputs(run_with(tmp_path))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"corpus": {"paths": ["/nowhere"]}}, r"^corpus\.paths: /nowhere does not exist"),
        ({"corpus": {"valid_paths": ["/nowhere"]}}, r"^corpus\.valid_paths: /nowhere does not exist"),
        (
            {"corpus": {"paths": [], "packages": ["yaml", "no_such"]}},
            r"^corpus\.packages: 'no_such' is not an installed",
        ),
        ({"tokens": {"tokenizer": "./nowhere"}}, r"^tokens\.tokenizer='\./nowhere' does not exist\. Give a folder"),
        ({"seed_model": {"name_or_path": "/no/model"}}, r"^seed_model\.name_or_path='/no/model' does not exist"),
        ({"embed": {"embedder": "sentence", "encoder": "/nowhere"}}, r"^embed\.encoder='/nowhere' does not exist"),
        ({"train": {"warm_start": "runs/nowhere"}}, r"^train\.warm_start='runs/nowhere' does not exist"),
        ({"seed_model": {"name_or_path": "/tmp"}}, r"^seed_model\.name_or_path='/tmp' has no config\.json"),
        ({"evaluate": {"fewshot": ["/no.jsonl"]}}, r"^evaluate\.fewshot='/no\.jsonl' is not a file"),
        ({"evaluate": {"fewshot": ["/tmp"]}}, r"^evaluate\.fewshot='/tmp' cannot be read: "),
        (
            {"run": {"shared": ["/tmp"]}},
            r"^run\.shared: /tmp has no finished corpus, tokenizer, clusterer, shards, ngrams, seed to",
        ),
        ({"run": {"shared": ["/nowhere"]}}, r"^run\.shared: /nowhere has no finished corpus, tokenizer"),
        (
            {"train": {"warm_start": "/tmp"}},
            r"^train\.warm_start='/tmp' must be .*; it has no finished experts/cluster=0000,",
        ),
        ({"tokens": {"tokenizer": "foo://bar"}}, r"^tokens\.tokenizer=foo://bar cannot be reached: "),
    ],
)
def test_what_is_not_there_is_refused_by_its_field(
    tmp_path: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_inputs(run_with(tmp_path, **sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tokens": {"tokenizer": "no/tokenizer"}}, r"^tokens\.tokenizer='no/tokenizer' cannot be loaded: "),
        (
            {"seed_model": {"name_or_path": "no/model"}},
            r"^seed_model\.name_or_path='no/model' is no causal language model",
        ),
    ],
)
def test_a_name_that_neither_the_hub_nor_its_cache_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, dict[str, Any]], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        check_inputs(run_with(tmp_path, **sections))


def test_the_users_home_stands_for_itself_in_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(write_corpus(tmp_path / "elsewhere", documents=8))
    write_corpus(tmp_path / "valid", documents=8)
    tokenizer = train_tokenizer(DOMAINS.values(), 300)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=300))
    save_model(model, tokenizer, str(tmp_path / "model"))
    run_with(tmp_path / "other", run={"dir": str(tmp_path / "other")}).stage("corpus", dict)
    examples = [
        f'{{"text": "a", "label": "{n % 2}", "split": "{split}"}}' for n in range(9) for split in ("train", "test")
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(examples))
    run = run_with(
        tmp_path,
        run={"dir": "~/run", "shared": ["~/other"]},
        corpus={"paths": ["~/corpus"], "valid_paths": ["~/valid"]},
        tokens={"tokenizer": "~/model"},
        seed_model={"name_or_path": "~/model"},
        evaluate={"fewshot": ["~/task.jsonl"], "fewshot_shots": 2},
    )
    assert run.dir == str(tmp_path / "run")
    check_inputs(run)
    named = {"tokens": "tokenizer", "seed_model": "name_or_path", "train": "warm_start", "embed": "encoder"}
    for section, field in named.items():
        embedder = {"embedder": "sentence"} if section == "embed" else {}
        run = run_with(tmp_path, **{section: {field: "~/gone", **embedder}})
        with pytest.raises(UserError, match=rf"^{section}\.{field}='~/gone' does not exist"):
            check_inputs(run)
    assert not (tmp_path / "elsewhere" / "~").exists()


def test_held_out_files_among_the_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^corpus\.valid_paths=.* and corpus\.paths=.* both hold .*part-0\.jsonl"):
        check_inputs(run_with(tmp_path, corpus={"valid_paths": [str(tmp_path / "corpus" / "part-0.jsonl")]}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task.jsonl", b"{", "task.jsonl', line 1 is not JSON"),
        ("task.jsonl", b"\xff", "task.jsonl', line 1 is not JSON"),
        ("task.jsonl.gz", b"not compressed", "task.jsonl.gz' cannot be read: Not a gzipped file"),
        ("task.jsonl.gz", gzip.compress(b"[1]", mtime=0)[:-9], "task.jsonl.gz' cannot be read: Compressed file ended"),
        ("task.jsonl", b'{"text": "a", "label": "b", "split": "test"}', "has the labels"),
        (
            "task.jsonl",
            b"\n".join(b'{"text": "a", "label": "%d", "split": "train"}' % n for n in range(9)),
            "task has 9 examples of 'train' and 0 of 'test'; evaluate.fewshot_shots=8 and one are needed",
        ),
    ],
)
def test_a_fewshot_task_is_read_before_anything_is_trained_for_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^evaluate.fewshot.*{message}"):
        check_inputs(run_with(tmp_path, evaluate={"fewshot": [str(tmp_path / name)]}))


def test_a_task_that_the_run_will_make_of_its_own_documents_need_not_be_there(tmp_path: Path) -> None:
    check_inputs(run_with(tmp_path, evaluate={"fewshot": [str(tmp_path / "run" / "fewshot" / "domains.jsonl")]}))


def test_what_a_finished_stage_was_made_of_may_be_gone(tmp_path: Path) -> None:
    run = run_with(tmp_path, corpus={"paths": ["/gone"]}, seed_model={"name_or_path": "/gone"})
    run.stage("corpus", dict)
    run.stage("seed", dict)
    check_inputs(run)


def test_what_there_is_of_another_run_passes(tmp_path: Path) -> None:
    other = run_with(tmp_path / "other")
    for folder in ("corpus", "experts/cluster=0000", "experts/cluster=0001", "controls/dense"):
        other.finish(folder, {})
    check_inputs(run_with(tmp_path, run={"shared": [other.dir]}, train={"warm_start": other.dir}))
