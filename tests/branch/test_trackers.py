"""MLflow and Weights & Biases are told every value at its step, where they are installed; where not, a user is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from cbtm_ray.branch.trackers import tracking
from cbtm_ray.errors import UserError

CURVE = [
    {"step": 2, "tokens": 100, "loss_nats": 3.5, "mfu": None},
    {"step": 4, "tokens": 200, "loss_nats": 2.5, "mfu": 0.5, "valid_loss_nats": 2.75},
]
MISSING = [name for name in ("mlflow", "wandb") if importlib.util.find_spec(name) is None]


def test_nobody_is_told_unless_asked() -> None:
    with tracking((), "runs/one", "experts/cluster=0000") as log_point:
        log_point(CURVE[0])


@pytest.mark.parametrize("tracker", MISSING)
def test_what_is_not_installed_is_refused(tracker: str) -> None:
    refused = pytest.raises(UserError, match=rf"train\.trackers names '{tracker}', which this node cannot use")
    with refused, tracking((tracker,), "runs/one", "seed"):
        pass


def test_mlflow_keeps_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    with tracking(("mlflow",), "/runs/one", "experts/cluster=0000") as log_point:
        for point in CURVE:
            log_point(point)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("/runs/one").experiment_id])
    assert (run.info.run_name, run.info.status) == ("experts/cluster=0000", "FINISHED")
    losses = client.get_metric_history(run.info.run_id, "loss_nats")
    assert [(metric.step, metric.value) for metric in losses] == [(2, 3.5), (4, 2.5)]
    assert run.data.metrics["valid_loss_nats"] == 2.75


def test_wandb_keeps_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with tracking(("wandb",), "/runs/one", "experts/cluster=0000") as log_point:
        for point in CURVE:
            log_point(point)
    (written,) = tmp_path.rglob("run-*.wandb")
    content = written.read_bytes()
    assert all(word in content for word in (b"valid_loss_nats", b"2.75", b"experts/cluster=0000"))
