"""The mixture is one of probabilities, and stays one where probabilities vanish; the average is one of parameters."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, logsumexp
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from cbtm_ray.errors import UserError
from cbtm_ray.merge.mixture import average_weights, mix_logprobs


def weights_of(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    raw = draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1)))
    raw[..., 0] += 0.1
    return raw / raw.sum(axis=-1, keepdims=True)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and weights, (T, K)."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    return draw(hnp.arrays(np.float64, shape, elements=st.floats(-30, 0))), weights_of(draw, shape)


def test_a_mixture_by_hand() -> None:
    mixed = mix_logprobs(np.log([[0.5, 0.1], [0.2, 0.4]]), np.array([[0.25, 0.75], [1.0, 0.0]]))
    np.testing.assert_allclose(mixed, np.log([0.125 + 0.075, 0.2]))


@given(mixtures())
def test_a_mixture_is_the_logarithm_of_the_weighted_probabilities(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, weights = drawn
    expected = np.log((weights * np.exp(logprobs)).sum(axis=1))
    np.testing.assert_allclose(mix_logprobs(logprobs, weights), expected, atol=1e-12)


@given(mixtures())
def test_a_mixture_lies_between_its_experts(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, weights = drawn
    mixed = mix_logprobs(logprobs, weights)
    assert (mixed <= logprobs.max(axis=1) + 1e-9).all()
    assert (mixed >= logprobs.min(axis=1) - 1e-9).all()


@given(mixtures())
def test_experts_that_agree_are_the_mixture_whatever_the_weights(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    logprobs, weights = drawn
    alike = np.repeat(logprobs[:, :1], logprobs.shape[1], axis=1)
    np.testing.assert_allclose(mix_logprobs(alike, weights), logprobs[:, 0], atol=1e-9)


def test_one_expert_is_the_mixture() -> None:
    logprobs = np.random.default_rng(0).normal(size=(9, 1)) - 5
    np.testing.assert_array_equal(mix_logprobs(logprobs, np.ones((9, 1))), logprobs[:, 0])


def test_a_one_hot_weight_picks_its_expert() -> None:
    logprobs = np.random.default_rng(0).normal(size=(4, 4)) - 5
    np.testing.assert_array_equal(mix_logprobs(logprobs, np.eye(4)), np.diag(logprobs))


def test_a_mixture_over_the_vocabulary_sums_to_one() -> None:
    """Shapes (T, V, K): experts are on the last axis, whatever stands before it."""
    random = np.random.default_rng(0)
    logprobs_TVK = log_softmax(random.normal(size=(5, 11, 3)) * 9, axis=1)
    weights_T1K = random.dirichlet(np.ones(3), size=(5, 1))
    mixed_TV = mix_logprobs(logprobs_TVK, np.broadcast_to(weights_T1K, logprobs_TVK.shape))
    assert mixed_TV.shape == (5, 11)
    np.testing.assert_allclose(logsumexp(mixed_TV, axis=1), 0, atol=1e-12)


def test_very_small_probabilities_do_not_vanish() -> None:
    mixed = mix_logprobs(np.array([[-2000.0, -2001.0]]), np.array([[0.5, 0.5]]))
    assert mixed[0] == pytest.approx(-2000 + np.log(0.5 + 0.5 * np.exp(-1)))


@pytest.mark.filterwarnings("error")
def test_an_impossible_token_and_an_expert_without_weight() -> None:
    inf = np.inf
    logprobs = np.array([[-inf, -1.0], [-1.0, -inf], [-inf, -inf], [-inf, -2.0]])
    weights = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(mix_logprobs(logprobs, weights), [-1, -1, -inf, -2 + np.log(0.5)])


def llama(seed: int, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, **sizes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, intermediate_size=32, tie_word_embeddings=True, **shape)).eval()


def test_an_average_is_that_of_every_parameter() -> None:
    models = [llama(seed) for seed in range(3)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    average = average_weights(models, np.array([0.5, 0.25, 0.25])).state_dict()
    for name, tensor in average.items():
        expected = 0.5 * before[0][name] + 0.25 * before[1][name] + 0.25 * before[2][name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_uniform_weights_of_models_that_agree_give_that_model_exactly() -> None:
    average = average_weights([llama(7), llama(7), llama(7)])
    assert all(torch.equal(tensor, llama(7).state_dict()[name]) for name, tensor in average.state_dict().items())


def test_a_weight_of_one_picks_its_model() -> None:
    average = average_weights([llama(0), llama(1)], np.array([0.0, 1.0]))
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(average(tokens).logits, llama(1)(tokens).logits)


def test_folders_are_averaged_as_models_are_and_the_average_is_a_folder_too(tmp_path: Path) -> None:
    models = [llama(seed) for seed in range(2)]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index))
    average = average_weights([str(tmp_path / "0"), models[1]])
    average.save_pretrained(tmp_path / "average")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    for name, tensor in average_weights(models).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not torch.equal(loaded.state_dict()["model.embed_tokens.weight"], models[0].model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], r"weights_K=\[0.5, 0.6\] must be non-negative and sum to 1, not 1.1"),
        ([1.5, -0.5], "must be non-negative and sum to 1"),
        ([np.nan, 1.0], "must be non-negative and sum to 1"),
        ([1.0], "weights_K has 1 weights for 2 models"),
    ],
)
def test_weights_that_are_no_average_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        average_weights([llama(0), llama(1)], np.array(weights))


def test_no_models_have_no_average() -> None:
    with pytest.raises(UserError, match="Give at least one model"):
        average_weights([])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 32}, r"models\[1\] differs from models\[0\] in .*hidden_size"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, "differs from .* in head_dim, num_attention_heads"),
        ({"num_hidden_layers": 2}, r"num_hidden_layers, shape of model\.layers\.1"),
    ],
)
def test_models_of_different_shapes_are_refused(sizes: dict[str, int], message: str) -> None:
    """Two and four heads have parameters of the same shapes."""
    with pytest.raises(UserError, match=message):
        average_weights([llama(0), llama(0, **sizes)])


def test_models_of_different_architectures_are_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    cohere = CohereForCausalLM(CohereConfig(**sizes, vocab_size=50, intermediate_size=32))
    with pytest.raises(UserError, match="in architecture, CohereForCausalLM and LlamaForCausalLM: only experts of one"):
        average_weights([llama(0), cohere])
