"""Hosts that share nothing but an object store run the method together, and go on when one of them is cut off or lost."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hosts import SILENT, Host, Network, missing, network, start_head, start_worker
from tests.support.local_head import wait_for
from tests.support.tiny import tiny_tree, write_corpus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

ROOT = Path(__file__).parents[2]
S3 = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
STEPS = 1500  # of each expert: seconds, for a cable to be pulled in
STORE_PORT = 5000


def python(host: Host, code: str) -> Any:
    """What an expression of this project is worth on a host."""
    imports = "import json; from cbtm_ray import files; from tests.support.artifacts import artifacts"
    program = f"{imports}; print(json.dumps({code}))"
    return json.loads(host.run(sys.executable, "-c", program, cwd=ROOT).stdout)


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    # Not pytest's folder, whose name grows: sockets of Ray's below it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, network(Path(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def store(net: Network) -> Host:
    """A host that is an S3 server, with an empty bucket."""
    host = net.add("store")
    url = f"http://{host.address}:{STORE_PORT}"
    net.environment |= {**S3, "AWS_ENDPOINT_URL": url}
    host.environment |= net.environment
    host.start("moto_server", "--host", host.address, "--port", str(STORE_PORT), **SILENT)
    make = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"
    wait_for(lambda: host.start(sys.executable, "-c", make, **SILENT).wait() == 0, "the store")
    return host


@pytest.fixture(scope="module")
def head(net: Network, store: Host) -> Host:
    return start_head(net)


@pytest.fixture(scope="module")
def submit(net: Network, head: Host, store: Host, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Start a job on the head, whose configuration and corpus are in the project and in the store."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("cbtm_ray", "jobs", "serve"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_corpus(folder / "corpus")
    tree = tiny_tree(folder, folder)
    tree["corpus"]["paths"] = ["s3://bucket/corpus"]
    tree["train"] |= {"total_tokens": 2 * STEPS * 128, "checkpoint_every": 50, "log_every": 500, "experts_per_run": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    python(store, f"files.publish_folder({str(folder / 'corpus')!r}, 's3://bucket/corpus')")

    def start(job: str, run_dir: str, *more: str) -> subprocess.Popen:
        line = f"ray job submit --working-dir . -- python -m jobs.{job} --config config.yaml run.dir={run_dir}"
        log = (folder / f"{run_dir.rpartition('/')[2]}.log").open("a")
        return head.start(*shlex.split(line), *more, cwd=folder, stdout=log, stderr=subprocess.STDOUT)

    return start


def seen(store: Host, pattern: str) -> bool:
    """Whether the bucket holds an object whose key has all words of the pattern."""
    found = python(store, "files.list_files('s3://bucket')")
    return any(all(word in uri for word in pattern.split()) for uri in found)


def test_two_nodes_without_a_shared_disk_make_a_run_in_a_bucket(
    net: Network, head: Host, store: Host, submit: Any
) -> None:
    workers = [start_worker(net, head, f"worker-{number}", cpus=1) for number in (1, 2)]
    job, trained = submit("run_all", "s3://bucket/calm"), set[str]()
    while job.poll() is None:
        trained |= {worker.name for worker in workers if worker.processes("RayTrainWorker")}
        time.sleep(0.5)
    assert job.returncode == 0
    assert trained == {"worker-1", "worker-2"}
    for host in [head, *workers]:
        assert host.run("find", str(net.disk), "-name", "*.safetensors", "-o", "-name", "*.parquet").stdout == ""
    made = python(store, "artifacts('s3://bucket/calm')")
    assert {"experts/cluster=0000/model.safetensors", "clusterer/centers.npy", "evaluation/results.json"} <= set(made)


def test_a_node_cut_off_and_one_killed_while_experts_train_change_nothing(
    net: Network, head: Host, store: Host, submit: Any
) -> None:
    """Each while it trains; a node that was cut off goes on by itself for a while, where nobody hears of it."""
    first, second = (host for host in net.hosts if host.name.startswith("worker"))
    job = submit("run_all", "s3://bucket/rough")
    wait_for(lambda: seen(store, "rough checkpoints/experts/cluster= step="), "a checkpoint", limit_s=900)
    wait_for(lambda: first.processes("RayTrainWorker"), "training on the first worker")
    first.cut_off()
    start_worker(net, head, "worker-3", cpus=1)
    wait_for(lambda: second.processes("RayTrainWorker"), "training on the second worker")
    second.kill()
    start_worker(net, head, "worker-4", cpus=1)
    assert job.wait() == 0
    ours, theirs = (python(store, f"artifacts('s3://bucket/{name}')") for name in ("rough", "calm"))
    assert len(ours) > 10
    assert ours == theirs
    starts = "[len(files.read_json(f's3://bucket/rough/{name}/manifest.json')['starts']) for name in "
    names = "('controls/dense', 'experts/cluster=0000', 'experts/cluster=0001')]"
    assert max(python(store, starts + names)) > 1
