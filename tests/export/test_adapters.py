"""Experts as LoRA adapters: the nearest matrices of a rank, and the same logits through PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from cbtm_ray import files
from cbtm_ray.errors import UserError
from cbtm_ray.export.adapters import cut, dropped_share, factors_of, low_rank, save_adapter, with_factors
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run
from tests.support.tiny_models import make_model

TOKENS = torch.randint(1, 50, (3, 17), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "intermediate_size": 32}


def tied_pair(*, whole: bool) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A seed, and an expert that differs in its linear layers, or in all weights but the norms."""
    torch.manual_seed(0)
    seed, expert = (LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval() for _ in range(2))
    expert.load_state_dict(seed.state_dict())
    for name, parameter in expert.named_parameters():
        if "norm" not in name and (whole or "embed" not in name):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return seed, expert


@pytest.mark.parametrize("rank", [1, 3, 99])
def test_low_rank_is_the_nearest_matrix_of_that_rank(rank: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(7, 5))
    a_RI, b_OR = low_rank(torch.from_numpy(matrix), rank)
    left, values, right = scipy.linalg.svd(matrix, full_matrices=False)
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose((b_OR @ a_RI).numpy(), expected, atol=1e-6)
    assert a_RI.shape == (min(rank, 5), 5)


@pytest.mark.parametrize("whole", [False, True])
def test_at_full_rank_the_adapter_is_the_expert(whole: bool) -> None:
    seed, expert = tied_pair(whole=whole)
    model = with_factors(seed, factors_of(expert, seed, 64, embeddings=whole))
    torch.testing.assert_close(model(TOKENS).logits, expert(TOKENS).logits, atol=1e-5, rtol=1e-4)
    assert dropped_share(expert, seed, embeddings=whole) == 0
    assert not torch.allclose(seed(TOKENS).logits, expert(TOKENS).logits, atol=0.01), "the seed is not changed"


def test_a_lower_rank_is_the_first_part_of_a_higher_one() -> None:
    seed, expert = tied_pair(whole=True)
    high, low = factors_of(expert, seed, 9), factors_of(expert, seed, 4)
    for name, (a_RI, b_OR) in cut(high, 4).items():
        torch.testing.assert_close(b_OR @ a_RI, low[name][1] @ low[name][0])


def test_what_adapters_leave_out_is_counted() -> None:
    seed, expert = tied_pair(whole=True)
    table = (expert.model.embed_tokens.weight - seed.model.embed_tokens.weight).square().sum()
    theirs = dict(expert.named_parameters())
    total = sum((theirs[name] - parameter).square().sum() for name, parameter in seed.named_parameters())
    assert dropped_share(expert, seed) == pytest.approx(float(table / total), rel=1e-5)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("rank", [4, 64])
def test_peft_loads_the_same_model(embeddings: bool, rank: int, tmp_path: Path) -> None:
    seed, expert = tied_pair(whole=True)
    factors = factors_of(expert, seed, rank, embeddings=embeddings)
    save_adapter(seed, factors, "the-seed", tmp_path)
    assert files.read_json(str(tmp_path / "adapter_config.json"))["base_model_name_or_path"] == "the-seed"
    loaded = PeftModel.from_pretrained(copy.deepcopy(seed), tmp_path).eval()
    torch.testing.assert_close(loaded(TOKENS).logits, with_factors(seed, factors)(TOKENS).logits, atol=1e-5, rtol=1e-4)


def test_an_architecture_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers"):
        factors_of(make_model("gpt2"), make_model("gpt2"), 2)


@pytest.mark.ray
def test_the_adapters_of_a_run_are_measured_with_the_served_mixture(finished_run: Run) -> None:
    run_job(finished_run, "extract_adapters")
    made = finished_run.manifest("export/adapters")
    assert made is not None
    rows = files.read_json(finished_run.uri("evaluation", "results.json"))["rows"]
    served = next(row for row in rows if row.get("served"))
    assert (made["routing"], made["top_k"]) == (served["routing"], served["top_k"])
    assert [row["rank"] for row in made["rows"]] == [0, 1, 4, 16, 64, None]
    assert made["rows"][0]["ratio_to_dense"] == 1
    assert made["rows"][-1]["ppl"] == pytest.approx(served["ppl"])
    assert 0 < made["dropped_share"] < 1
    for cluster in range(2):  # by the name of their base model
        loaded = AutoPeftModelForCausalLM.from_pretrained(
            finished_run.uri("export", "adapters", f"cluster={cluster:04d}")
        )
        assert loaded.peft_config["default"].r == 16
    assert "adapters of the seed" in Path(finished_run.dir, "report.html").read_text()
