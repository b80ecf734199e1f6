"""The training loop: schedule by hand, exact resumption, clear refusals."""

from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbtm_ray.errors import UserError
from cbtm_ray.train.spec import learning_rate
from cbtm_ray.train.trainer import Trainer, make_optimizer, train_model
from tests.support.tiny_models import SPEC, changed, make_model, make_sequences, train, without_speed


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(SPEC, step) for step in (0, 3, 4, 12, 20)]
    assert rates == pytest.approx([0.0025, 0.01, 0.01, 0.0055, 0.001])
    cosine = changed(SPEC, schedule="cosine")
    assert [learning_rate(cosine, step) for step in (4, 8, 12)] == pytest.approx(
        [0.01, 0.001 + 0.009 * (1 + np.sqrt(0.5)) / 2, 0.0055]
    )


@pytest.mark.parametrize(("name", "fall"), [("llama", 0.5), ("qwen2", 0.5), ("gpt2", 0.5), ("opt", 0.15)])
def test_training_lowers_the_loss(name: str, fall: float) -> None:
    curve, _ = train(make_model(name), changed(SPEC, steps=60))
    assert curve[-1]["loss_nats"] < curve[0]["loss_nats"] - fall
    assert [point["step"] for point in curve] == list(range(3, 61, 3))
    assert curve[-1]["tokens"] == 60 * 64


@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(checkpoint: int) -> None:
    whole = make_model()
    curve, saved = train(whole)
    assert len(saved) == 3
    resumed = make_model()
    state = torch.load(io.BytesIO(saved[checkpoint]), weights_only=True)
    resumed_curve, _ = train(resumed, state=state)
    assert without_speed(resumed_curve) == without_speed(curve)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_no_steps_leave_the_model_alone() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    assert train(model, changed(SPEC, steps=0)) == ([], [])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_only_matrices_decay() -> None:
    decayed, others = make_optimizer(make_model(), SPEC.train).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert decayed["betas"] == others["betas"] == (0.9, 0.95)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_loss_that_is_no_number_stops_the_run_with_its_step() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(UserError, match=r"test: the loss is nan at step 3\. Lower the learning rate"):
        train(model)


@pytest.mark.parametrize("highest", [50, 60])
def test_a_token_outside_the_vocabulary_is_refused(highest: int) -> None:
    with pytest.raises(UserError, match=f"token id {highest} is not below the model's vocabulary of 50"):
        Trainer(make_model(), make_sequences(highest), SPEC)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_steps_read_one_sequence_after_the_other(micro_batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, read = make_sequences(), []
    trainer = Trainer(make_model(), sequences, changed(SPEC, micro_batch_size=micro_batch_size))
    batch = sequences.batch
    monkeypatch.setattr(
        sequences, "batch", lambda first, count: read.extend(range(first, first + count)) or batch(first, count)
    )
    for _ in range(3):
        trainer.train_step()
    assert read[:12] == list(range(12))
    assert len(read) <= 16, "no more than the next step's are read ahead"


@given(
    step=st.integers(0, 99),
    warmup=st.integers(0, 120),
    share=st.floats(0, 1),
    schedule=st.sampled_from(["linear", "cosine"]),
)
def test_the_learning_rate_rises_to_its_peak_and_then_falls_to_its_share(
    step: int, warmup: int, share: float, schedule: str
) -> None:
    spec = changed(SPEC, steps=100, warmup_steps=warmup, final_lr_fraction=share, schedule=schedule, learning_rate=1.0)
    here, after = learning_rate(spec, step), learning_rate(spec, step + 1)
    assert 0 <= here <= 1
    if step + 1 < warmup:
        assert 0 < here < after
    if warmup <= step:
        assert here >= after >= share - 1e-12
        assert learning_rate(spec, warmup) == 1
    if warmup < 100:
        assert learning_rate(spec, 100) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_half_precision_gives_nearly_the_same_curve(name: str) -> None:
    curves = [train(make_model(name), changed(SPEC, steps=6, precision=precision))[0] for precision in ("fp32", "bf16")]
    losses = [[point["loss_nats"] for point in curve] for curve in curves]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_weights_stay_float32_in_half_precision() -> None:
    model = make_model()
    train(model, changed(SPEC, steps=2, precision="bf16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_point_of_the_curve_is_the_mean_since_the_point_before() -> None:
    every = [point["loss_nats"] for point in train(make_model(), changed(SPEC, log_every=1))[0]]
    points = train(make_model())[0]
    steps = [point["step"] for point in points]
    assert steps == [3, 6, 9, 12, 15, 18, 20]
    expected = [np.mean(every[first:last]) for first, last in itertools.pairwise([0, *steps])]
    assert [point["loss_nats"] for point in points] == pytest.approx(expected, rel=1e-9)
    assert [point["learning_rate"] for point in points] == [learning_rate(SPEC, step - 1) for step in steps]


def test_the_first_loss_is_that_of_the_first_batch() -> None:
    model = make_model()
    with torch.no_grad():
        batch = torch.from_numpy(make_sequences().batch(0, 4))
        expected = model(input_ids=batch, labels=batch).loss.item()
    curve, _ = train(model, changed(SPEC, steps=1))
    assert curve[0]["loss_nats"] == pytest.approx(expected, rel=1e-5)


def test_states_are_saved_every_few_steps_but_not_at_the_end() -> None:
    _, saved = train(make_model())
    steps = [torch.load(io.BytesIO(state), weights_only=True)["step"] for state in saved]
    assert steps == [5, 10, 15]


def test_a_large_gradient_is_scaled_down_to_the_norm() -> None:
    trainer = Trainer(make_model(), make_sequences(), changed(SPEC, clip_norm=1e-3))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())  # so that a step is the gradient
    before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    trainer.train_step()
    moved = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach() - before
    assert moved.norm().item() == pytest.approx(learning_rate(SPEC, 0) * 1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen2"])
def test_a_model_of_another_architecture_resumes_bit_for_bit_too(name: str) -> None:
    whole, resumed = make_model(name), make_model(name)
    curve, saved = train(whole)
    resumed_curve, _ = train(resumed, state=torch.load(io.BytesIO(saved[0]), weights_only=True))
    assert without_speed(resumed_curve) == without_speed(curve)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_state_with_broken_weights_is_never_saved() -> None:
    """Else the promise of intact checkpoints fails where checkpoints are more frequent than points."""
    model, saved = make_model(), []
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    spec = changed(SPEC, log_every=10, checkpoint_every=5)
    with pytest.raises(UserError, match="earlier checkpoints are intact"):
        train_model(model, make_sequences(), spec, state=None, save=saved.append, log=lambda point: None)
    assert saved == []
