"""What stops an expert is said by name, leaves the others and its own earlier checkpoints alone, and can be mended."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from transformers import PreTrainedModel

from cbtm_ray import files
from cbtm_ray.branch.branches import Branch, expert_branches
from cbtm_ray.branch.launch import _fit
from cbtm_ray.branch.training_progress import TrainingProgress
from cbtm_ray.branch.worker import read_sequences, train_group
from cbtm_ray.corpus.tokenizer import load_tokenizer, train_tokenizer
from cbtm_ray.models import load_model, new_model, save_model
from cbtm_ray.run import Run
from cbtm_ray.train.checkpoints import Checkpoints
from cbtm_ray.train.packed_sequences import PackedSequences
from cbtm_ray.train.spec import TrainSpec
from cbtm_ray.train.trainer import Trainer, train_model
from tests.support.local_head import free_ports
from tests.support.s3 import CREDENTIALS
from tests.support.seeded_run import check_as_undisturbed, seeded_run, write_shards
from tests.support.tiny_models import SPEC, changed, make_model, make_sequences, train, without_speed


@contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[None]:
    """A disk of that size at the folder, for the length of the block."""
    folder.mkdir(parents=True)
    options = f"size={size_kib}k,nr_inodes=100"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk, and only Linux has tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def enlarge(folder: Path, size_kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(folder)], check=True)


def checkpoint_kib(model: PreTrainedModel, sequences: PackedSequences, spec: TrainSpec, folder: Path) -> int:
    """Size of a checkpoint, which goes to the folder."""
    trainer = Trainer(model, sequences, spec)
    trainer.train_step()
    with closing(Checkpoints(str(folder))) as checkpoints:
        checkpoints.save(trainer.state_dict())
    return next(folder.iterdir()).stat().st_size >> 10


def test_a_disk_that_fills_keeps_the_checkpoints_before_and_training_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """Room for two and a half: the third is refused while it is written beside them."""
    disk, size_kib = tmp_path / "disk", checkpoint_kib(make_model(), make_sequences(), SPEC, tmp_path / "one")
    whole, cut, mended = make_model(), make_model(), make_model()
    curve, _ = train(whole)
    with small_disk(disk, size_kib * 5 // 2):
        with pytest.raises(OSError, match="No space left on device"), closing(Checkpoints(str(disk))) as checkpoints:
            train_model(cut, make_sequences(), SPEC, state=None, save=checkpoints.save, log=lambda point: None)
        assert sorted(path.name for path in disk.iterdir()) == ["step=0000000005.pt", "step=0000000010.pt"]
        state = checkpoints.last()
        enlarge(disk, 10 * size_kib)
        with closing(Checkpoints(str(disk))) as checkpoints:
            resumed_curve = train_model(
                mended, make_sequences(), SPEC, state=state, save=checkpoints.save, log=lambda point: None
            )
    assert without_speed(resumed_curve) == without_speed(curve)
    assert all(torch.equal(a, b) for a, b in zip(mended.parameters(), whole.parameters(), strict=True))


class Store:
    """An S3 server that can be away; what it holds outlasts that, as moto keeps it in this process."""

    def __init__(self) -> None:
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"
        self.come_back()

    def come_back(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()

    def go_away(self) -> None:
        self._server.stop()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """With an empty bucket named `bucket`; one try only in this process, as each that follows waits longer."""
    made = Store()
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": made.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(files, "_S3_ATTEMPTS", 1)
    files._bucket.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield made
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])
    client.delete_bucket(Bucket="bucket")
    made.go_away()
    files._bucket.cache_clear()


def test_a_bucket_that_goes_away_keeps_the_checkpoints_before_and_training_goes_on_when_it_is_back(
    store: Store,
) -> None:
    whole, cut, mended = make_model(), make_model(), make_model()
    curve, _ = train(whole)

    def leave_at_12(point: dict[str, Any]) -> None:
        if point["step"] == 12:  # the checkpoint of step 10 began when that of step 5 was there
            store.go_away()

    refused = pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION")
    with refused as caught, closing(Checkpoints("s3://bucket/one")) as checkpoints:
        train_model(cut, make_sequences(), SPEC, state=None, save=checkpoints.save, log=leave_at_12)
    assert files.refusal(caught.value).endswith("Check the network, and AWS_ENDPOINT_URL if the store is not Amazon's.")
    store.come_back()
    assert files.list_files("s3://bucket/one")[0] == "s3://bucket/one/step=0000000005.pt"
    resumed_curve, _ = train(mended, state=checkpoints.last())
    assert without_speed(resumed_curve) == without_speed(curve)
    assert all(torch.equal(a, b) for a, b in zip(mended.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_bucket_that_is_away_is_an_error_that_may_pass_and_no_mistake(store: Store, load: Any) -> None:
    """A UserError would be a refusal, after which the expert is not tried again."""
    store.go_away()
    try:
        with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
            load("s3://bucket/seed")
    finally:
        store.come_back()


def named(run: Run, name: str, **changes: Any) -> Branch:
    """The first expert under another name; its `spec` may be changed too."""
    branch = expert_branches(run)[1]
    spec = changed(branch.spec, name=name, **changes.pop("spec", {}))
    return dataclasses.replace(branch, spec=spec, **changes)


@pytest.fixture
def training_progress(ray_cluster: str) -> Any:
    return ray.remote(num_cpus=0)(TrainingProgress).remote()


@pytest.mark.slow
@pytest.mark.ray
def test_what_an_expert_refuses_is_said_by_name_and_the_next_one_is_trained(
    training_progress: Any, tmp_path: Path
) -> None:
    """One Ray Train run for all four."""
    run, _ = seeded_run(tmp_path, steps=12)
    write_shards(run, 1, [], [(7, [5, 5000] * 40)])
    other = train_tokenizer(["quite other words, and other merges"], 300)
    save_model(new_model(run.config.seed_model, other, 128, 0), other, str(tmp_path / "other"))
    sound = named(run, "extra/sound")
    group = [
        named(run, "extra/rate", spec={"learning_rate": 1e30}),
        named(run, "extra/token", cluster=7),
        named(run, "extra/seed", init=str(tmp_path / "other")),
        sound,
    ]
    refused = {name: str(error) for name, error in _fit(run, group, training_progress, 1, 0).items()}
    assert set(refused) == {"extra/rate", "extra/token", "extra/seed"}
    known = len(load_tokenizer(run.uri("tokenizer")))
    assert re.match(r"extra/rate: .* at step \d+\. Lower the learning rate \(peak 1e\+30\) or", refused["extra/rate"])
    expected = f"extra/token: token id 5000 is not below the model's vocabulary of {known}. Use the seed model's own"
    assert refused["extra/token"].startswith(expected)
    expected = f"tokens.tokenizer gives other tokens than those that the model of '{tmp_path}/other' knows. Set it to"
    assert refused["extra/seed"].startswith(expected)
    check_as_undisturbed(run, sound, tmp_path / "undisturbed")


def write_nested_tokens(run: Run) -> None:
    """A document of two lists of tokens, which only a defect of ours can write: NumPy meets it with a ValueError."""
    with files.writing(run.uri("shards", "train", "part-00000.parquet")) as stream:
        pq.write_table(pa.table({"cluster": pa.array([0], pa.int32()), "tokens": [[[1, 2], [3]]]}), stream)


@pytest.mark.ray
def test_a_value_error_is_no_refusal_of_an_expert(training_progress: Any, tmp_path: Path) -> None:
    run, _ = seeded_run(tmp_path, steps=1)
    write_nested_tokens(run)
    with pytest.raises(ValueError, match="setting an array element with a sequence"):
        train_group(
            {"config": run.config, "training_progress": training_progress, "group": [named(run, "extra/nested")]}
        )


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_that_ends_with_a_value_error_shows_its_traceback_and_no_refusal(tmp_path: Path) -> None:
    run, command = seeded_run(tmp_path, steps=1, max_failures=0, clusters=[0])
    write_nested_tokens(run)
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.startswith("Traceback")
    assert "ValueError: setting an array element with a sequence" in found.stderr
    assert not any(line.startswith("error:") for line in found.stderr.splitlines())


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="only where MLflow is not installed")
def test_a_tracker_that_the_first_of_two_workers_cannot_use_is_refused_by_both(
    training_progress: Any, tmp_path: Path
) -> None:
    run, _ = seeded_run(tmp_path, steps=12, workers_per_expert=2, trackers=["mlflow"])
    refused = _fit(run, [named(run, "extra/tracked"), named(run, "extra/next")], training_progress, 2, 0)
    assert set(refused) == {"extra/tracked", "extra/next"}
    assert all(str(error).startswith("train.trackers names 'mlflow', which this") for error in refused.values())


@pytest.mark.slow
@pytest.mark.ray
def test_an_expert_whose_disk_is_full_goes_on_from_its_last_checkpoint_once_there_is_room(
    training_progress: Any, tmp_path: Path
) -> None:
    run, _ = seeded_run(tmp_path, steps=40)
    branch = named(run, "small/expert", spec={"checkpoint_every": 10})
    sequences, _ = read_sequences(run, branch, load_tokenizer(run.uri("tokenizer")).eos_token_id)
    size_kib = checkpoint_kib(load_model(branch.init), sequences, branch.spec, tmp_path / "one")
    disk = Path(run.uri("checkpoints", "small"))
    with small_disk(disk, size_kib * 5 // 2):
        refused = _fit(run, [branch], training_progress, 1, 0)
        expected = (
            f"run.dir={run.dir}: no space left on the device. Free some, or give another run.dir; what is finished"
        )
        assert str(refused[branch.spec.name]).startswith(expected)
        kept = sorted(path.name for path in (disk / "expert").iterdir())
        assert kept == ["step=0000000010.pt", "step=0000000020.pt"]
        enlarge(disk, 10 * size_kib)
        assert _fit(run, [branch], training_progress, 1, 0) == {}
    assert [start["step"] for start in run.require(branch.spec.name, "train_experts")["starts"]] == [0, 20]
    check_as_undisturbed(run, branch, tmp_path / "undisturbed")
