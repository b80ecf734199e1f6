"""Sparse upcycling: the seed's own outputs before training, an objective with the balance of experts, and active FLOPs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cbtm_ray.branch.launch import train_seed
from cbtm_ray.branch.upcycle import check_upcyclable, upcycle
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from cbtm_ray.train import flops
from cbtm_ray.train.loss import TokenLoss
from tests.support.tiny import tiny_tree
from tests.support.tiny_models import SIZES, SPEC, changed, make_model, train, without_speed

BATCH = torch.randint(1, 50, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
def test_before_training_it_computes_what_the_seed_does(tied: bool) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2, "tie_word_embeddings": tied, "rms_norm_eps": 1e-4}
    seed = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, num_key_value_heads=1)).eval()
    model = upcycle(seed, n_experts=4, random_state=3).eval()
    chosen = model(BATCH, output_router_logits=True).router_logits[1].topk(2).indices
    assert len({tuple(experts) for experts in chosen.tolist()}) > 1
    torch.testing.assert_close(model(BATCH).logits, seed(BATCH).logits, atol=1e-6, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == (
        sum(p.numel() for p in seed.parameters()) + 2 * (3 * 3 * 16 * 32 + 4 * 16)
    )


def test_routers_are_new_and_of_the_given_seed() -> None:
    first, again, other = (upcycle(make_model(), 4, state).state_dict() for state in (3, 3, 4))
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing == {"model.layers.0.mlp.gate.weight"}
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_it_is_a_hugging_face_folder(tmp_path: Path) -> None:
    model = upcycle(make_model(), 4, 0).eval()
    train(model, changed(SPEC, steps=2))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(loaded(BATCH).logits, model.eval()(BATCH).logits)


def test_the_gradient_is_that_of_hugging_face_with_its_balance_and_the_value_that_of_the_tokens() -> None:
    model = upcycle(make_model(), 4, 0)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    losses = TokenLoss(model, BATCH)(BATCH)
    losses.mean().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hugging_face = {"labels": BATCH[:, :-1], "shift_labels": BATCH[:, 1:].contiguous(), "output_router_logits": True}
    outputs = model(BATCH[:, :-1], **hugging_face)
    outputs.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-4)
    assert losses.mean().item() == pytest.approx(outputs.loss.item() - 0.5 * outputs.aux_loss.item(), rel=1e-5)
    model.config.router_aux_loss_coef = 0.0
    model.zero_grad()
    TokenLoss(model, BATCH)(BATCH).mean().backward()
    router = model.model.layers[0].mlp.gate.weight
    assert not torch.allclose(router.grad, ours["model.layers.0.mlp.gate.weight"], rtol=0.1)


def test_training_spreads_the_tokens_over_the_experts() -> None:
    """All tokens want experts 0 and 1, and the balance is part of what training lowers: 1 is an even spread."""

    def balance_after(steps: int, coef: float) -> float:
        model = upcycle(make_model(), 4, 0)
        model.config.router_aux_loss_coef = coef
        model.model.embed_tokens.weight.data[:, 0] += 1  # a direction that all tokens share
        model.model.layers[0].mlp.gate.weight.data[:2, 0] += 0.3
        train(model, changed(SPEC, steps=steps, checkpoint_every=99))
        even = 2  # the experts that run for a token, in Hugging Face's count
        return model.eval()(BATCH, output_router_logits=True).aux_loss.item() / even

    assert balance_after(15, 1.0) < 1.05 < 1.1 < balance_after(15, 0.0) < balance_after(1, 1.0)


def test_it_resumes_and_recomputes_like_any_model() -> None:
    whole = upcycle(make_model(), 4, 0)
    spec = changed(SPEC, steps=8)
    curve, saved = train(whole, spec)
    resumed = upcycle(make_model(), 4, 0)
    assert without_speed(train(resumed, spec, state=torch.load(io.BytesIO(saved[0])))[0]) == without_speed(curve)
    assert train(upcycle(make_model(), 4, 0), changed(spec, cross_documents=False))[0] != curve
    frugal = upcycle(make_model(), 4, 0)
    train(frugal, changed(spec, activation_checkpointing=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
        torch.testing.assert_close(tensor, frugal.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_flops_count_the_two_experts_that_run() -> None:
    seed = make_model()
    model = upcycle(seed, n_experts=8, random_state=0)
    mlp, router = 3 * 16 * 32, 8 * 16
    assert flops.matmul_parameters(model) == flops.matmul_parameters(seed) + mlp + router
    more = 2 * (mlp + router)
    assert flops.model_flops_per_token(model, 16) == flops.model_flops_per_token(seed, 16) + more


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_another_architecture_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"cannot be upcycled: its architecture is '{name}'.*Leave 'moe'"):
        upcycle(make_model(name), 4, 0)


def test_biases_are_refused_by_the_folder(tmp_path: Path) -> None:
    LlamaConfig(**SIZES, attention_bias=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its layers have biases"):
        check_upcyclable(str(tmp_path))


def test_a_seed_that_cannot_be_upcycled_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    make_model("gpt2").config.save_pretrained(tmp_path / "gpt2")
    tree = tiny_tree(tmp_path / "run", tmp_path)
    tree["seed_model"] = {"name_or_path": str(tmp_path / "gpt2")}
    tree["train"]["controls"] = ["moe"]
    run = Run(build_config(tree))
    run.finish("shards", {})
    with pytest.raises(UserError, match="cannot be upcycled: its architecture is 'gpt2'"):
        train_seed(run)
