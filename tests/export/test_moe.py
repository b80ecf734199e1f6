"""The merged mixture of experts: equal to its experts where a token has one, and to a forward pass routed by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cbtm_ray import files
from cbtm_ray.export.moe_router import fit_routers
from cbtm_ray.pipeline import run_job
from cbtm_ray.run import Run
from cbtm_ray.sparse import layers, sparse_model, why_not_sparse
from tests.support.tiny_models import SIZES, make_model

BATCH = torch.randint(1, 50, (3, 17), generator=torch.Generator().manual_seed(1))
HEADS = {"intermediate_size": 32, "num_key_value_heads": 1}
DENSE = {
    "llama": make_model,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=8)),
}
KIND = {"llama": "MixtralForCausalLM", "mistral": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


def experts_of(name: str, count: int = 3) -> list[Any]:
    """Models that differ in their feed-forward layers alone."""
    torch.manual_seed(0)
    seed = DENSE[name]().eval()
    experts = [copy.deepcopy(seed) for _ in range(count)]
    for expert in experts:
        for weight in expert.model.layers[0].mlp.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return experts


@pytest.mark.parametrize("name", DENSE)
def test_with_all_tokens_sent_to_one_expert_it_is_that_expert(name: str, tmp_path: Path) -> None:
    experts = experts_of(name)
    model = sparse_model(experts[0], experts, 1, random_state=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == KIND[name]
    [layer] = layers(loaded)
    seen: list[torch.Tensor] = []
    layer.mlp.gate.register_forward_hook(
        lambda module, inputs, output: (*output[:2], torch.full_like(output[2], seen[0]))
    )
    for k, expert in enumerate(experts):
        seen[:] = [k]  # type: ignore[list-item]
        torch.testing.assert_close(loaded(BATCH).logits, expert(BATCH).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_two_experts_are_summed_by_their_routers_weights(name: str) -> None:
    experts = experts_of(name)
    model = sparse_model(experts[0], experts, 2, random_state=0).eval()
    [layer] = layers(model)
    with torch.no_grad():
        layer.mlp.gate.weight.normal_()
    by_hand = copy.deepcopy(experts[0])

    def route(module: Any, inputs: Any, output: Any) -> torch.Tensor:
        logits_BTK = inputs[0] @ layer.mlp.gate.weight.T
        best = logits_BTK.topk(2)
        weights_BT2 = best.values.softmax(-1)
        each_BTKD = torch.stack([expert.model.layers[0].mlp(inputs[0]) for expert in experts], dim=2)
        chosen_BT2D = each_BTKD.gather(2, best.indices[..., None].expand(*best.indices.shape, each_BTKD.shape[-1]))
        return (weights_BT2[..., None] * chosen_BT2D).sum(2)

    by_hand.model.layers[0].mlp = torch.nn.Identity()
    by_hand.model.layers[0].mlp.register_forward_hook(route)
    torch.testing.assert_close(model(BATCH).logits, by_hand(BATCH).logits, atol=1e-5, rtol=1e-4)


def test_a_router_finds_the_expert_that_a_token_names() -> None:
    """Tokens are their clusters': the state of a token says which, and a linear map of it is enough."""
    experts = experts_of("llama", 2)
    model = sparse_model(experts[0], experts, 1, random_state=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[25:] *= -1
        model.get_input_embeddings().weight[:, 0] = torch.where(torch.arange(50) < 25, 1.0, -1.0)
    targets = torch.nn.functional.one_hot((BATCH >= 25).long(), 2).float()
    fit_routers(model, BATCH, targets, batch_tokens=17)
    chosen: list[torch.Tensor] = []
    layers(model)[0].mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    model(BATCH)
    right = chosen[0].flatten() == (BATCH >= 25).long().flatten()
    assert right.float().mean() > 0.95


def test_what_has_no_sparse_architecture_is_named() -> None:
    assert why_not_sparse(make_model("gpt2").config) == "its architecture is 'gpt2', not llama, mistral or qwen3"
    config = make_model().config
    config.mlp_bias = True
    assert why_not_sparse(config) == "its layers have biases, and Mixtral's have none"


@pytest.mark.ray
def test_the_merged_model_of_a_run_is_measured_as_the_evaluation_measures(finished_run: Run) -> None:
    run_job(finished_run, "export_moe")
    made = finished_run.manifest("export/moe")
    assert made is not None
    assert not made["exact"], "these experts were trained whole"
    rows = {(row["system"], row["routing"], row["top_k"]): row for row in made["rows"]}
    merged, dense = rows["merged", None, 1], rows["dense", None, 1]
    results = files.read_json(finished_run.uri("evaluation", "results.json"))["rows"]
    assert dense == next(row for row in results if row["system"] == "dense")
    assert {("cbtm", "ngram", 1), ("cbtm", "ngram", 2), ("cbtm", "embedding", 1)} <= rows.keys()
    assert merged["ratio_to_dense"] == pytest.approx(merged["ppl"] / dense["ppl"])
    assert merged["infer_flops_per_token"] > dense["infer_flops_per_token"], "its routers cost something"
    model = AutoModelForCausalLM.from_pretrained(finished_run.uri("export", "moe", "model"))
    assert model.config.num_local_experts == 2
    assert len(AutoTokenizer.from_pretrained(finished_run.uri("export", "moe", "model"))) == 300
    assert "experts merged into one model" in Path(finished_run.dir, "report.html").read_text()
