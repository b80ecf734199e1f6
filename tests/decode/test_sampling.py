"""Penalties, temperature and truncation by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cbtm_ray.decode.sampling import Sampling, draw, token_probabilities
from cbtm_ray.errors import UserError

LOGPROBS = np.log([0.5, 0.3, 0.15, 0.05])


def probabilities(prompt: tuple[int, ...] = (), answer: tuple[int, ...] = (), **sampling: Any) -> np.ndarray:
    return token_probabilities(LOGPROBS, Sampling(**sampling), list(prompt), list(answer))


def test_nothing_asked_is_the_mixture_itself() -> None:
    np.testing.assert_allclose(probabilities(answer=(1, 1)), [0.5, 0.3, 0.15, 0.05])


def test_temperature_and_truncation_by_hand() -> None:
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(probabilities(temperature=0.5), squared / squared.sum())
    np.testing.assert_allclose(probabilities(temperature=0), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(top_k_tokens=2), [0.625, 0.375, 0, 0])
    np.testing.assert_allclose(probabilities(top_k_tokens=9), [0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(probabilities(top_p=0.79), [0.625, 0.375, 0, 0])
    np.testing.assert_allclose(probabilities(top_p=1e-9), [1, 0, 0, 0])
    # 0.685 + 0.247 of the squares pass 0.9, though 0.5 + 0.3 do not: temperature comes first.
    np.testing.assert_allclose(probabilities(temperature=0.5, top_p=0.9), [0.25 / 0.34, 0.09 / 0.34, 0, 0])


def test_penalties_by_hand() -> None:
    """OpenAI's count the answer only; the repetition penalty also the prompt, and a token once."""
    counted = np.array([0.5, 0.3 * np.exp(-2 * 0.7), 0.15 * np.exp(-0.7), 0.05])
    np.testing.assert_allclose(probabilities((3,), (1, 2, 1), frequency_penalty=0.7), counted / counted.sum())
    present = np.array([0.5, 0.3 * np.exp(0.7), 0.15 * np.exp(0.7), 0.05])
    np.testing.assert_allclose(probabilities((3,), (1, 2, 1), presence_penalty=-0.7), present / present.sum())
    repeated = np.array([0.5, 0.3**2, 0.15, 0.05**2])
    np.testing.assert_allclose(probabilities((3,), (1, 1), repetition_penalty=2.0), repeated / repeated.sum())
    np.testing.assert_allclose(probabilities((), (0,), temperature=0, presence_penalty=2), [0, 1, 0, 0])


def test_draws_follow_weights_of_any_sum() -> None:
    random = np.random.default_rng(0)
    drawn = [draw(np.array([0.0, 6.0, 0.0, 2.0, 0.0]), random) for _ in range(4000)]
    assert set(drawn) == {1, 3}
    assert np.mean(np.array(drawn) == 1) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("top_p", 0), ("top_p", 1.1), ("top_k_tokens", 0), ("repetition_penalty", 0.5),
        ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("seed", -1), ("temperature", float("nan")),
    ],
)  # fmt: skip
def test_settings_out_of_bounds_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{field}={value} must be .*\. Change it\."):
        Sampling(**{field: value})
