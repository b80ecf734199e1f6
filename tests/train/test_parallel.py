"""Two workers of a process group (gloo) train what one worker trains, and resume from each other's checkpoints."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from cbtm_ray.errors import UserError
from cbtm_ray.train import parallel
from cbtm_ray.train.trainer import Preempted, Trainer, train_model
from tests.support.tiny_models import SPEC, changed, make_model, make_sequences, make_valid, train, without_speed

SHORT = changed(SPEC, steps=6, checkpoint_every=3, log_every=2, evaluate_every=3, evaluate_sequences=4)
SPECS = {
    "ddp, in parts": ("llama", changed(SHORT, micro_batch_size=1)),
    "fsdp": ("llama", changed(SHORT, parallel="fsdp")),
    "ddp, feed-forward layers": ("llama", changed(SHORT, trainable="ffn")),
    "fsdp, feed-forward layers": ("llama", changed(SHORT, trainable="ffn", parallel="fsdp")),
    "fsdp, tied and in parts": (
        "cohere, which scales its logits",
        changed(SHORT, micro_batch_size=1, parallel="fsdp"),
    ),
}
"""Architecture and spec by what is looked at; checkpoints are at step 3."""


def outcome(name: str, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Curve, checkpoint and weights of one training, in this process or shared by the process group."""
    architecture, spec = SPECS[name]
    model, saved = make_model(architecture), io.BytesIO()
    curve = train_model(
        model, make_sequences(), spec, valid=make_valid(), state=state,
        save=lambda state: torch.save(state, saved), log=lambda point: None,
    )  # fmt: skip
    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True) if saved.getbuffer() else None
    return {"curve": curve, "checkpoint": checkpoint, "weights": parallel.whole_model(model).state_dict()}


def notice_of_one(rank: int) -> list[int]:
    """The steps at which a checkpoint was written, where the second worker alone is told that its node goes."""
    saved: list[int] = []
    try:
        train_model(
            make_model(), make_sequences(), changed(SHORT, notice_every=2), state=None,
            save=lambda state: saved.append(state["step"]), log=lambda point: None, leaving=lambda: rank == 1,
        )  # fmt: skip
    except Preempted:
        return saved
    return [-1]


def refused(rank: int, **changes: Any) -> str:
    """What a worker says where the second one alone has no compiler."""
    os.environ["CXX"] = "no-such-compiler" if rank else sys.executable
    with pytest.raises(UserError) as caught:
        train(make_model(), changed(SHORT, **changes))
    return str(caught.value)


def work(rank: int, folder: Path) -> None:
    """What a worker of two does: every spec from the start, and from the checkpoint that one worker left."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name in SPECS:
        found[name] = outcome(name)
        alone = torch.load(folder / f"{name}.pt", weights_only=True)
        found[f"{name}, resumed"] = outcome(name, alone)
    model = make_model()
    trainer = Trainer(model, make_sequences(), SPECS["fsdp"][1])
    found["bytes"] = sum(p.to_local().nbytes for p in trainer.model.parameters())
    with torch.no_grad():
        list(trainer.model.parameters())[-1].to_local().fill_(float("nan") if rank else 1.0)
    found["finite"] = parallel.all_finite(trainer.model)
    found["left"] = notice_of_one(rank)
    found["no compiler"] = refused(rank, compile=True)
    found["odd batch"] = refused(rank, batch_size=3)
    torch.save(found, folder / f"worker-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: outcome(name) for name in SPECS}


@pytest.fixture(scope="module")
def together(alone: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    for name, found in alone.items():
        torch.save(found["checkpoint"], folder / f"{name}.pt")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"worker-{rank}.pt", weights_only=True) for rank in range(2)]


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    fields = ("loss_nats", "valid_loss_nats")
    points = zip(ours["curve"], theirs["curve"], strict=True)
    for a, b in points:
        assert [a["step"], a["tokens"]] == [b["step"], b["tokens"]]
        assert [a.get(f, 0) for f in fields] == pytest.approx([b.get(f, 0) for f in fields], rel=1e-4)
    for name, weights in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weights, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_two_workers_train_what_one_trains(alone: dict[str, Any], together: list[dict[str, Any]], name: str) -> None:
    check_same(together[0][name], alone[name])
    assert without_speed(together[1][name]["curve"]) == without_speed(together[0][name]["curve"])
    assert together[1][name]["checkpoint"] is None


@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint_is_for_any_number_of_workers(
    alone: dict[str, Any], together: list[dict[str, Any]], name: str
) -> None:
    check_same(together[0][f"{name}, resumed"], alone[name])
    theirs = together[0][name]["checkpoint"]
    assert theirs["step"] == 3
    check_same(outcome(name, theirs), alone[name])


def test_a_worker_of_fsdp_holds_its_part(together: list[dict[str, Any]]) -> None:
    whole = sum(p.nbytes for p in make_model().parameters())
    assert sum(found["bytes"] for found in together) == whole
    assert max(found["bytes"] for found in together) < 0.6 * whole


def test_a_broken_weight_of_one_worker_is_known_to_all(together: list[dict[str, Any]]) -> None:
    assert [found["finite"] for found in together] == [False, False]


def test_a_notice_of_one_worker_stops_all(together: list[dict[str, Any]]) -> None:
    assert [found["left"] for found in together] == [[2], []]


def test_what_one_worker_refuses_all_refuse_and_none_waits_for_it(together: list[dict[str, Any]]) -> None:
    expected = "train.compile=True needs a C++ compiler, and there is no no-such-compiler."
    assert all(found["no compiler"].startswith(expected) for found in together)


def test_a_batch_that_does_not_divide_is_refused(together: list[dict[str, Any]]) -> None:
    expected = "train.batch_size=3 must be a multiple of the 2 workers."
    assert [found["odd batch"] for found in together] == [expected, expected]
