"""Files, corpus and run directory on servers that speak S3 and Google's protocol, and what a user is told when S3 refuses."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from moto.core.authorization import enable_iam_authentication
from moto.server import ThreadedMotoServer

from cbtm_ray import files
from cbtm_ray.cli import main
from cbtm_ray.config import CorpusConfig
from cbtm_ray.corpus.documents import read_shard
from cbtm_ray.corpus.shards import list_shards
from cbtm_ray.errors import UserError
from cbtm_ray.load_config import build_config
from cbtm_ray.run import Run
from tests.support.artifacts import artifacts
from tests.support.local_head import free_ports, wait_for
from tests.support.s3 import CREDENTIALS
from tests.support.tiny import tiny_tree, write_corpus


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of a server that lives as long as the module's tests; only localhost reaches it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints every request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            environment.setenv(name, value)
        files._bucket.cache_clear()
        yield f"http://{host}:{port}"
    files._bucket.cache_clear()
    server.stop()


@contextlib.contextmanager
def server_of_its_own(port: int, *command: str) -> Iterator[None]:
    """A Python module that serves a port of localhost, in a process of its own, for as long as the block."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, "the store did not start"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, "the store")
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    """The same for Google's protocol; not in this process, whose interpreter pyarrow holds while it asks for a size."""
    (port,) = free_ports(1)
    command = "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"
    with server_of_its_own(port, *command), pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        files._bucket.cache_clear()
        yield f"http://127.0.0.1:{port}"
    files._bucket.cache_clear()


@pytest.fixture
def bucket(endpoint: str) -> str:
    """The URI of an empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["s3", "gs"])
def any_bucket(request: pytest.FixtureRequest) -> str:
    """The same in either store."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    address, name = request.getfixturevalue("google"), f"bucket-{uuid.uuid4().hex[:8]}"
    httpx.post(f"{address}/storage/v1/b", json={"name": name}).raise_for_status()
    return f"gs://{name}"


def keys(bucket: str) -> list[str]:
    """Every object of a bucket; folders that pyarrow marks by an empty object are left out."""
    scheme, _, name = bucket.partition("://")
    if scheme == "gs":
        found = httpx.get(f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/{name}/o").json().get("items", [])
        return sorted(entry["name"] for entry in found if not entry["name"].endswith("/"))
    found = boto3.client("s3").list_objects_v2(Bucket=name).get("Contents", [])
    return sorted(entry["Key"] for entry in found if not entry["Key"].endswith("/"))


@pytest.mark.parametrize("name", ["a/b.bin", "two words 50%.txt", "caf\u00e9+?&=#/x.gz"])
def test_bytes_come_back_whatever_the_name(any_bucket: str, name: str) -> None:
    uri = files.join(any_bucket, name)
    files.write_bytes(uri, b"\x00\xffhello")
    assert keys(any_bucket) == [name]
    assert files.list_files(any_bucket) == [uri]
    assert files.read_bytes(uri) == b"\x00\xffhello"


def test_a_file_of_several_parts_comes_back(any_bucket: str) -> None:
    array = np.random.default_rng(0).integers(0, 1 << 30, 3 << 19)  # 12 MiB; parts are of 10
    files.write_array(files.join(any_bucket, "a.npy"), array)
    assert np.array_equal(files.read_array(files.join(any_bucket, "a.npy")), array)


def test_nothing_is_seen_before_the_block_ends_or_if_it_fails(any_bucket: str) -> None:
    uri = files.join(any_bucket, "folder", "a.txt")
    with pytest.raises(RuntimeError, match="halfway"), files.writing(uri) as stream:  # noqa: PT012
        stream.write(b"half" * (4 << 20))
        assert keys(any_bucket) == []
        raise RuntimeError("halfway")
    assert keys(any_bucket) == []
    files.write_bytes(uri, b"old")
    with pytest.raises(KeyboardInterrupt), files.writing(uri) as stream:  # noqa: PT012
        stream.write(b"new and longer")
        raise KeyboardInterrupt
    assert files.read_bytes(uri) == b"old"
    files.write_bytes(uri, b"new")
    assert files.read_bytes(uri) == b"new"
    assert keys(any_bucket) == ["folder/a.txt"]


def test_exists_delete_and_list_know_folders(any_bucket: str) -> None:
    for name in ["a.txt", "folder/inner/b.txt", "folder/_state.npz", "kept.txt"]:
        files.write_bytes(files.join(any_bucket, name), b"x")
    found = [files.exists(files.join(any_bucket, name)) for name in ["folder", "folder/", "a.txt", "b.txt", "fold"]]
    assert found == [True, True, True, False, False]
    assert files.list_files(files.join(any_bucket, "folder")) == [files.join(any_bucket, "folder/inner/b.txt")]
    assert files.list_files(files.join(any_bucket, "nowhere")) == []
    for _ in range(2):
        files.delete(files.join(any_bucket, "a.txt"))
        files.delete(files.join(any_bucket, "folder"))
    assert keys(any_bucket) == ["kept.txt"]
    assert not files.exists(files.join(any_bucket, "folder"))


def test_a_folder_goes_up_and_comes_down(any_bucket: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.bin").write_bytes(b"a" * 100_000)
    (tmp_path / "b.txt").write_bytes(b"new")
    files.write_bytes(files.join(any_bucket, "model", "kept.txt"), b"kept")
    files.publish_folder(str(tmp_path), files.join(any_bucket, "model"))
    assert keys(any_bucket) == ["model/b.txt", "model/inner/a.bin", "model/kept.txt"]
    with files.local_folder(files.join(any_bucket, "model")) as folder:
        assert (Path(folder) / "inner" / "a.bin").read_bytes() == b"a" * 100_000
        assert sorted(path.name for path in Path(folder).iterdir()) == ["b.txt", "inner", "kept.txt"]
    assert not Path(folder).exists()


def test_documents_of_every_kind_are_read_by_uri(any_bucket: str) -> None:
    lines = b"".join(json.dumps({"text": f"line {row}"}).encode() + b"\n" for row in range(3))
    files.write_bytes(files.join(any_bucket, "corpus", "a.jsonl.gz"), gzip.compress(lines))
    with files.writing(files.join(any_bucket, "corpus", "b.parquet")) as stream:
        pq.write_table(pa.table({"text": ["row 1"]}), stream)
    files.write_bytes(files.join(any_bucket, "corpus", "c d.txt"), b"a whole file")
    corpus = CorpusConfig(paths=(files.join(any_bucket, "corpus"),))
    read = [document for shard in list_shards(corpus.paths) for document in read_shard(shard, corpus)]
    assert [document.id for document in read] == [
        "a.jsonl.gz:1",
        "a.jsonl.gz:2",
        "a.jsonl.gz:3",
        "b.parquet:1",
        "c d.txt",
    ]
    assert read[3].text == "row 1"


def config_file(tmp_path: Path, run_dir: str) -> list[str]:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path, tmp_path / "corpus")))
    return ["--config", str(tmp_path / "config.yaml"), f"run.dir={run_dir}"]


def test_a_stage_is_finished_by_its_manifest_there_too(any_bucket: str, tmp_path: Path) -> None:
    run = Run(build_config(tiny_tree(tmp_path, tmp_path) | {"run": {"dir": files.join(any_bucket, "runs", "mine")}}))
    run.open()
    assert run.stage("corpus", lambda: {"documents": 3})[1]
    assert not run.stage("corpus", lambda: {"documents": 4})[1]
    assert keys(any_bucket) == [
        f"runs/mine/{name}" for name in ("config.yaml", "corpus/manifest.json", "corpus/settings.json")
    ]


def said(tmp_path: Path, run_dir: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a job that cannot start prints: one line, exit code 2."""
    assert main("a job", "build_corpus", config_file(tmp_path, run_dir)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_a_missing_bucket_is_one_line(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = said(tmp_path, "s3://not-made/run", capsys)
    assert line.startswith("error: run.dir=s3://not-made/run cannot be reached: ")
    assert line.endswith("Create the bucket, or correct its name.\n")


def test_wrong_credentials_are_one_line(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with enable_iam_authentication():  # from here on the server looks at them
        line = said(tmp_path, files.join(bucket, "run"), capsys)
    assert line.startswith(f"error: run.dir={bucket}/run cannot be reached: ")
    assert line.endswith("Check the credentials, and what they may do there.\n")


@pytest.fixture
def closed_port(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing listens where the store should be; one try only, as each that follows waits longer."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr(files, "_S3_ATTEMPTS", 1)
    files._bucket.cache_clear()
    yield
    files._bucket.cache_clear()


def test_an_endpoint_that_nobody_is_at_is_one_line(
    closed_port: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(tmp_path, "s3://bucket/run", capsys)
    assert line.startswith("error: run.dir=s3://bucket/run cannot be reached: ")
    assert line.endswith("Check the network, and AWS_ENDPOINT_URL if the store is not Amazon's.\n")


def test_a_corpus_that_cannot_be_reached_is_named(bucket: str) -> None:
    with enable_iam_authentication(), pytest.raises(UserError, match=r"^corpus\.paths=s3://.*Check the credentials"):
        list_shards((files.join(bucket, "corpus"),))
    with pytest.raises(UserError, match=r"corpus\.paths: s3://not-made/corpus does not exist"):
        list_shards(("s3://not-made/corpus",))
    with pytest.raises(UserError, match=r"^corpus\.paths=s4://bucket/corpus cannot be reached: Unrecognized"):
        list_shards(("s4://bucket/corpus",))


def test_a_disk_s_own_error_is_no_store_s() -> None:
    assert files.refusal(FileNotFoundError(2, "No such file or directory", "/data/bucket/x")) is None
    assert files.refusal(RuntimeError("AWS Error")) is None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_in_a_bucket_killed_among_its_experts_ends_as_one_on_the_disk(
    any_bucket: str, finished_run: Run, tmp_path: Path
) -> None:
    files.publish_folder(str(write_corpus(tmp_path / "corpus")), files.join(any_bucket, "corpus"))
    run_dir = files.join(any_bucket, "runs", "mine")
    job = [sys.executable, "-m", "jobs.run_all", *config_file(tmp_path, run_dir), f"corpus.paths=[{any_bucket}/corpus]"]
    process = subprocess.Popen(job, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while not any(key.startswith("runs/mine/experts/cluster=") and "manifest" in key for key in keys(any_bucket)):
            assert process.poll() is None, "the run ended before an expert was finished"
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not files.exists(files.join(run_dir, "experts", "manifest.json"))
    subprocess.run(job, check=True, stdout=subprocess.DEVNULL)
    assert artifacts(run_dir) == artifacts(finished_run.dir)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_whose_bucket_goes_away_ends_with_one_line(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    environment = {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="tests",
                          aws_secret_access_key="tests", region_name="us-east-1")  # fmt: skip
    with server_of_its_own(port, "moto.server", "-H", "127.0.0.1", "-p", str(port)):
        client.create_bucket(Bucket="bucket")
        write_corpus(tmp_path / "corpus")
        job = [sys.executable, "-m", "jobs.run_all", *config_file(tmp_path, "s3://bucket/run")]
        job += [f"train.total_tokens={2 * 4000 * 128}", "train.checkpoint_every=50"]
        process = subprocess.Popen(job, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        checkpoints = {"Bucket": "bucket", "Prefix": "run/checkpoints/experts/cluster="}
        while "Contents" not in client.list_objects_v2(**checkpoints):
            assert process.poll() is None, "the run ended before an expert had a checkpoint"
            time.sleep(0.1)
    _, said = process.communicate()
    assert process.returncode == 2
    *_, line = said.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("if the store is not Amazon's. What is finished is kept, and the same command continues.")
