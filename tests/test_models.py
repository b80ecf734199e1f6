"""Models as Hugging Face folders, and their costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cbtm_ray.config import SeedModelConfig
from cbtm_ray.corpus.tokenizer import train_tokenizer
from cbtm_ray.errors import UserError
from cbtm_ray.models import check_tokenizer, load_model, new_model, save_model
from cbtm_ray.train import flops

SIZES = SeedModelConfig(hidden_size=16, n_layers=2, n_heads=2, intermediate_size=32, train_tokens=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["some text to train on"], 300)


def test_a_new_model_is_a_function_of_its_seed_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = new_model(SIZES, tokenizer, 64, 0)
    assert torch.equal(torch.rand(3), expected)
    second, other = (new_model(SIZES, tokenizer, 64, seed) for seed in (0, 1))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.config.eos_token_id == tokenizer.eos_token_id


def test_a_saved_model_comes_back(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = new_model(SIZES, tokenizer, 64, 0)
    content = save_model(model, tokenizer, str(tmp_path / "model"))
    assert content == save_model(model, tokenizer, str(tmp_path / "copy"))
    assert content != save_model(new_model(SIZES, tokenizer, 64, 1), tokenizer, str(tmp_path / "other"))
    for loaded in (load_model(str(tmp_path / "model")), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        state = loaded.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no causal language model can be loaded from"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_costs_by_hand(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    layer = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8
    n_parameters = flops.matmul_parameters(LlamaForCausalLM(config))
    assert n_parameters == 100 * 8 + 2 * layer + 8
    per_token = flops.infer_flops_per_token(n_parameters, n_layers=2, hidden_size=8, context=10)
    assert per_token == 2 * n_parameters + 2 * 2 * 10 * 8
    assert flops.train_flops(per_token, 5) == 15 * per_token


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", None),
        ("Tesla T4", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "fp32", None),
    ],
)
def test_the_peak_of_a_gpu_goes_by_the_words_of_its_name(name: str, precision: str, tflops: float | None) -> None:
    assert flops.peak_flops(name, precision) == (None if tflops is None else tflops * 1e12)


def test_utilization_is_not_known_on_a_cpu(tokenizer: PreTrainedTokenizerBase) -> None:
    assert flops.utilization(new_model(SIZES, tokenizer, 64, 0), 64, "fp32", tokens_per_s=1e6) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_utilization_on_a_gpu_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_model(SIZES, tokenizer, 64, 0).to("cuda")
    peak = flops.peak_flops(torch.cuda.get_device_name(), "fp32")
    per_token = 6 * flops.matmul_parameters(model) + 6 * 2 * 64 * 16
    assert flops.utilization(model, 64, "fp32", 1e8) == (None if peak is None else round(1e8 * per_token / peak, 4))


def test_a_new_model_has_the_sizes_asked_for_and_shares_its_table(tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_model(SIZES, tokenizer, 64, 0)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (len(model.model.layers), model.config.intermediate_size) == (2, 32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_goes_through_a_uri_with_its_tokenizer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = new_model(SIZES, tokenizer, 64, 0)
    save_model(model, tokenizer, f"file://{tmp_path}/model")
    loaded = load_model(f"file://{tmp_path}/model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
    assert [path.suffix for path in (tmp_path / "model").iterdir() if path.suffix in (".bin", ".pt", ".pkl")] == []


def test_a_model_in_half_precision_is_loaded_in_float32(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    half = new_model(SIZES, tokenizer, 64, 0).to(torch.bfloat16)
    save_model(half, tokenizer, str(tmp_path))
    loaded = load_model(str(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.lm_head.weight, half.lm_head.weight.float())


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no causal language model can be loaded from '.*nowhere'"):
        load_model(str(tmp_path / "nowhere"))


def test_a_model_of_another_tokenizer_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_model(new_model(SIZES, tokenizer, 64, 0), tokenizer, str(tmp_path))
    check_tokenizer(f"file://{tmp_path}", tokenizer)
    other = train_tokenizer(["quite other words, and other merges"], len(tokenizer))
    with pytest.raises(
        UserError, match=r"^tokens\.tokenizer gives other tokens than those that the model of '.*' knows"
    ):
        check_tokenizer(str(tmp_path), other)
    (tmp_path / "tokenizer_config.json").unlink()
    check_tokenizer(str(tmp_path), other)
