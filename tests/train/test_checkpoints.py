"""Checkpoints: the last two, whole, taken when asked, resumed from; what cannot be written or read is said."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from cbtm_ray.errors import UserError
from cbtm_ray.train.checkpoints import Checkpoints
from cbtm_ray.train.trainer import Preempted, train_model
from tests.support.tiny_models import SPEC, changed, make_model, make_sequences, train, without_speed


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((3,), float(step))}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_newest_comes_back_and_two_are_kept(tmp_path: Path, scheme: str) -> None:
    with closing(Checkpoints(f"{scheme}{tmp_path}/new")) as checkpoints:
        assert checkpoints.last() is None
        for step in (1, 2, 999, 1000):
            checkpoints.save(state(step))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["step=0000000999.pt", "step=0000001000.pt"]
    back = Checkpoints(f"{scheme}{tmp_path}/new").last()
    assert back["step"] == 1000
    assert torch.equal(back["weights"], torch.full((3,), 1000.0))


def test_a_state_is_as_it_was_when_it_was_given(tmp_path: Path) -> None:
    with closing(Checkpoints(str(tmp_path))) as checkpoints:
        given = state(1)
        checkpoints.save(given)
        given["weights"].zero_()
    assert checkpoints.last()["weights"].tolist() == [1.0] * 3


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step=0000000010.pt.1a2b3c4d").write_bytes(b"half")
    with closing(Checkpoints(str(tmp_path))) as checkpoints:
        assert checkpoints.last() is None
        checkpoints.save(state(5))
    assert [path.name for path in tmp_path.iterdir()] == ["step=0000000005.pt"]


def test_a_checkpoint_that_could_not_be_written_stops_the_training_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    checkpoints = Checkpoints(str(tmp_path / "file"))
    checkpoints.save(state(1))
    with pytest.raises(OSError, match="file"):
        checkpoints.save(state(2))
    with pytest.raises(OSError, match="file"):
        checkpoints.close()


@pytest.mark.parametrize("content", [b"", b"PK no archive", b"\x80\x02}q\x00."])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "step=0000000005.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"step=0000000005\.pt is damaged\. Delete it, and training goes on"):
        Checkpoints(str(tmp_path)).last()


def test_training_goes_on_from_files_to_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, resumed = make_model(), make_model()
    with closing(Checkpoints(str(tmp_path))) as checkpoints:
        curve = train_model(whole, make_sequences(), SPEC, state=None, save=checkpoints.save, log=lambda point: None)
    last = checkpoints.last()
    assert last["step"] == 15
    resumed_curve, _ = train(resumed, state=last)
    assert without_speed(resumed_curve) == without_speed(curve)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_notice_brings_a_checkpoint_at_once_and_ends_the_training_here() -> None:
    """Looked for at steps 4, 8, ...; there from step 7 on."""
    asked, saved = [], []

    def leaving() -> bool:
        asked.append(len(asked) * 4 + 4)
        return asked[-1] >= 7

    spec = changed(SPEC, steps=16, checkpoint_every=10)
    with pytest.raises(Preempted):
        train_model(
            make_model(), make_sequences(), spec, state=None, save=lambda state: saved.append(state["step"]),
            log=lambda point: None, leaving=leaving,
        )  # fmt: skip
    assert saved == asked[1:] == [8]


def test_the_last_step_is_not_left() -> None:
    """What remains is to write the model, which a notice leaves time for."""
    spec = changed(SPEC, steps=4, notice_every=4)
    curve = train_model(
        make_model(), make_sequences(), spec, state=None, save=lambda state: pytest.fail("saved"),
        log=lambda point: None, leaving=lambda: True,
    )  # fmt: skip
    assert curve[-1]["step"] == 4


def test_a_loss_that_turns_into_no_number_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    """And whatever broke it mended, training goes on from there to the weights of undisturbed training."""
    whole, broken, mended = make_model(), make_model(), make_model()
    curve, _ = train(whole)

    def break_at_9(point: dict[str, Any]) -> None:
        if point["step"] == 9:
            with torch.no_grad():
                broken.get_input_embeddings().weight[:] = float("nan")

    with closing(Checkpoints(str(tmp_path))) as checkpoints:
        expected = (
            r"^test: a weight is not a finite number at step 10\. Lower the learning rate .* checkpoints are intact"
        )
        with pytest.raises(UserError, match=expected):
            train_model(broken, make_sequences(), SPEC, state=None, save=checkpoints.save, log=break_at_9)
    assert [path.name for path in tmp_path.iterdir()] == ["step=0000000005.pt"]
    resumed_curve, _ = train(mended, state=checkpoints.last())
    assert without_speed(resumed_curve) == without_speed(curve)
    assert all(torch.equal(a, b) for a, b in zip(mended.parameters(), whole.parameters(), strict=True))
