"""Models, tokenizers and tasks that do not suit the configuration are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForCausalLM,
)

from cbtm_ray import model_checks
from cbtm_ray.corpus.tokenizer import train_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.inputs import check_inputs
from cbtm_ray.load_config import build_config
from cbtm_ray.models import empty_model, load_model, load_model_config, most_positions, save_model
from cbtm_ray.run import Run
from cbtm_ray.train import flops
from cbtm_ray.train.loss import TokenLoss
from tests.support.tiny import DOMAINS, tiny_tree, write_corpus

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 300,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300, n_positions=16)),
    "roberta": lambda: RobertaForCausalLM(
        RobertaConfig(**SIZES, is_decoder=True, max_position_embeddings=34, pad_token_id=2)
    ),
    "an encoder": lambda: RobertaForCausalLM(RobertaConfig(**SIZES)),
    "not causal": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, is_causal=False)),
    "without a head": lambda: BertModel(BertConfig(**SIZES, is_decoder=True)),
    "small": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 299})),
    "gemma 3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SIZES, "num_key_value_heads": 1, "head_dim": 8},
            vision_config={**SIZES, "image_size": 16, "patch_size": 8},
            mm_tokens_per_image=4,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(DOMAINS.values(), 300)


def run_with(tmp_path: Path, **sections: dict[str, Any]) -> Run:
    tree = tiny_tree(tmp_path / "run", write_corpus(tmp_path / "corpus", documents=8))
    for section, fields in sections.items():
        tree[section].update(fields)
    return Run(build_config(tree))


def save(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_model(MODELS[name](), tokenizer, str(tmp_path / "seed"))
    return str(tmp_path / "seed")


def refusal(run: Run) -> str:
    with pytest.raises(UserError) as refused:
        check_inputs(run)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "tokens.sequence_length=32 must be at most 16, the positions of seed_model.name_or_path="),
        ("roberta", "tokens.sequence_length=32 must be at most 31, the positions of seed_model.name_or_path="),
        ("an encoder", "a token's logits depend on the tokens after it"),
        ("not causal", "a token's logits depend on the tokens after it"),
        ("without a head", "of the weights of BertLMHeadModel, such as cls."),
        (
            "small",
            "the vocabulary of tokens.tokenizer=300 must be at most 299, the embeddings of seed_model.name_or_path=",
        ),
    ],
)
def test_a_seed_that_does_not_suit_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, message: str
) -> None:
    seed = save(name, tokenizer, tmp_path)
    assert message in refusal(run_with(tmp_path, tokens={"tokenizer": seed}, seed_model={"name_or_path": seed}))


@pytest.mark.parametrize("name", ["llama", "gemma 3"])
def test_a_seed_that_suits_passes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str) -> None:
    seed = save(name, tokenizer, tmp_path)
    check_inputs(run_with(tmp_path, tokens={"tokenizer": seed}, seed_model={"name_or_path": seed}))


def test_a_seed_goes_with_its_own_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    seed, other = save("llama", tokenizer, tmp_path), train_tokenizer(["quite other words"], 280)
    other.save_pretrained(tmp_path / "other")
    given = {"name_or_path": seed}
    assert "tokens.tokenizer='train' makes a new tokenizer" in refusal(run_with(tmp_path, seed_model=given))
    run = run_with(tmp_path, seed_model=given, tokens={"tokenizer": str(tmp_path / "other")})
    assert refusal(run).startswith("tokens.tokenizer gives other tokens than those that the model of")
    (tmp_path / "seed" / "tokenizer_config.json").unlink()
    run = run_with(tmp_path, seed_model=given, tokens={"vocab_size": 301})
    assert refusal(run).startswith(
        "tokens.vocab_size=301 must be at most 300, the embeddings of seed_model.name_or_path="
    )
    check_inputs(run_with(tmp_path, seed_model=given))


def test_a_seed_that_suits_the_tokenizer_that_the_run_has_passes(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run = run_with(tmp_path, seed_model={"name_or_path": save("llama", tokenizer, tmp_path)})
    tokenizer.save_pretrained(run.uri("tokenizer"))
    run.finish("tokenizer", {})
    check_inputs(run)


def test_a_seed_too_large_for_this_machine_is_left_to_its_worker(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_checks.os, "sysconf", lambda name: 8)
    seed = save("an encoder", tokenizer, tmp_path)
    check_inputs(run_with(tmp_path, tokens={"tokenizer": seed}, seed_model={"name_or_path": seed}))
    assert "too much to try on this machine: its worker tries it first" in capsys.readouterr().out


def test_the_text_part_of_a_multimodal_model_is_a_model_of_its_own(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = MODELS["gemma 3"]().eval()
    save_model(whole, tokenizer, str(tmp_path / "seed"))
    model = load_model(str(tmp_path / "seed")).eval()
    tokens = torch.arange(5, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, whole(tokens).logits)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert TokenLoss(model, tokens).chunkable
    empty = empty_model(load_model_config(str(tmp_path / "seed")))
    assert flops.model_flops_per_token(empty, 32) == flops.model_flops_per_token(model, 32)
    save_model(model, tokenizer, str(tmp_path / "expert"))
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(tmp_path / "expert")).eval()(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 16), ("roberta", 31), ("llama", 2048)])
def test_positions_are_those_that_the_model_takes(name: str, positions: int) -> None:
    model = MODELS[name]().eval()
    assert most_positions(model) == positions
    with torch.no_grad():
        model(torch.full((1, min(positions, 64)), 7))


def test_prompts_that_do_not_fit_are_refused_as_soon_as_the_tokens_are_known(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": "a", "label": f"a label of many words {n}", "split": s} for n in (1, 2) for s in ("train", "test")]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    task = {"fewshot": [str(tmp_path / "task.jsonl")], "fewshot_shots": 2}
    check_inputs(run := run_with(tmp_path, evaluate=task))
    with pytest.raises(UserError, match=r"^tokens\.sequence_length=32 is too short for 2 examples of task"):
        model_checks.check_fewshot(run, tokenizer)
    run = run_with(tmp_path, evaluate=task, tokens={"tokenizer": str(tmp_path / "tokenizer")})
    assert refusal(run).startswith("tokens.sequence_length=32 is too short for 2 examples of task")


def test_a_cluster_shorter_than_a_sequence_is_refused_before_it_is_trained_on(tmp_path: Path) -> None:
    run = run_with(tmp_path, train={"controls": ["metadata"]})
    rows = [{"cluster": 0, "documents": 2, "tokens": 30}, {"cluster": 1, "documents": 2, "tokens": 29}]
    run.finish("corpus", {})
    run.finish("shards", {"train": {"clusters": rows[:1]}})
    check_inputs(run)
    run.finish("shards/controls/metadata", {"clusters": rows, "domains": ["law", "sea"]})
    assert "documents: domain 'sea' of train.controls 'metadata' has 31. Lower it," in refusal(run)
    run.finish("shards", {"train": {"clusters": rows}})
    assert (
        "tokens.sequence_length=32 must be at most the tokens of a cluster's documents: cluster 1 has 31."
        in refusal(run)
    )


@pytest.mark.parametrize("evaluate", [{"routings": ["prefix"], "top_k": [2, 4]}, {"routings": ["prefix"], "top_k": []}])
def test_an_evaluation_with_nothing_to_report_is_refused_before_anything_is_trained(
    tmp_path: Path, evaluate: dict[str, Any]
) -> None:
    assert "of 2 experts leaves nothing to report. Add 'posterior'" in refusal(run_with(tmp_path, evaluate=evaluate))
