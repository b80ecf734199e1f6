"""The cluster's files: the shipped ones pass, and each mistake is one line that names the field."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from cbtm_ray.errors import UserError
from ops import keys
from ops.kuberay_check import check_manifest
from ops.launcher_check import check_file, check_launcher, main

ROOT = Path(__file__).parents[2]
LAUNCHER = ["cluster.yaml", "cluster-gcp.yaml"]
MANIFESTS = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/rayservice.yaml"]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the entrypoint of a manifest names its configuration from there


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def types(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["available_node_types"]


@pytest.mark.parametrize("name", [*LAUNCHER, *MANIFESTS])
def test_a_shipped_file_passes(name: str) -> None:
    assert "up to" in check_file(name)


def test_the_manifests_can_stand_in_one_namespace() -> None:
    """KubeRay names the head's Service after its owner, of whichever kind, and overwrites one that is there."""
    names = {read(name)["metadata"]["name"] for name in MANIFESTS}
    assert len(names) == len(MANIFESTS)


AWS_MISTAKES: list[tuple[Change, str]] = [
    (lambda t: t["provider"].update(regoin="a"), r"^provider\.regoin is not a key\. Did you mean provider\.region\?$"),
    (lambda t: t["provider"].update(type="awz"), r"^provider\.type='awz' must be one of aws, gcp\.$"),
    (lambda t: t["provider"].pop("region"), r"^provider\.region is missing\. aws needs it\.$"),
    (
        lambda t: types(t)["expert_gpu"]["node_config"].update(InstanceTyp="a"),
        r"^available_node_types\.expert_gpu\.node_config\.InstanceTyp is not a key\. Did you mean \S+\.InstanceType\?$",
    ),
    (
        lambda t: types(t)["expert_gpu"]["node_config"].update(InstanceMarketOptions={"MarketTyp": "spot"}),
        r"InstanceMarketOptions\.MarketTyp is not a key\. Did you mean \S+InstanceMarketOptions\.MarketType\?$",
    ),
    (
        lambda t: types(t)["expert_gpu"]["node_config"]["InstanceMarketOptions"].update(MarketType="Spot"),
        r"InstanceMarketOptions\.MarketType='Spot' must be one of spot, ",
    ),
    (
        lambda t: types(t)["head"]["node_config"]["BlockDeviceMappings"][0]["Ebs"].update(VolumSize=1),
        r"head\.node_config\.BlockDeviceMappings\[0\]\.Ebs\.VolumSize is not a key\. Did you mean \S+\.VolumeSize\?$",
    ),
    (
        lambda t: types(t)["head"]["node_config"].update(NetworkInterfaces=[{"DeviceIndx": 0}]),
        r"head\.node_config\.NetworkInterfaces\[0\]\.DeviceIndx is not a key\. Did you mean \S+\.DeviceIndex\?$",
    ),
    (
        lambda t: types(t)["head"]["node_config"]["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="200 GB"),
        r"^available_node_types\.head\.node_config: .* BlockDeviceMappings\[0\]\.Ebs\.VolumeSize, value: 200 GB, .*'int'>\.$",
    ),
    (
        lambda t: types(t)["head"]["node_config"].update(CreditSpecification={}),
        r"^available_node_types\.head\.node_config: Missing required parameter in CreditSpecification: \"CpuCredits\"\.$",
    ),
    (lambda t: types(t)["head"]["node_config"].pop("InstanceType"), r"head\.node_config\.InstanceType is missing"),
    (
        lambda t: types(t)["expert_gpu"]["resources"].update(GPUs=1),
        r"^available_node_types\.expert_gpu\.resources\.GPUs is not a resource .* Did you mean \S+resources\.GPU\?$",
    ),
    (
        lambda t: types(t)["expert_gpu"]["resources"].update(GPU=0.5),
        r"^available_node_types\.expert_gpu\.resources\.GPU: 0\.5 is not of type 'integer'\.$",
    ),
    (
        lambda t: types(t)["corpus_cpu"].update(min_workers=17),
        r"^available_node_types\.corpus_cpu: min_workers=17 and max_workers=16 must be in order",
    ),
    (lambda t: types(t)["corpus_cpu"].update(max_workers=41), r"max_workers=41 must be in order, .* max_workers=40"),
    (lambda t: types(t)["corpus_cpu"].pop("max_workers"), r"^available_node_types\.corpus_cpu\.max_workers is missing"),
    (
        lambda t: types(t)["corpus_cpu"].update(idle_timeout=3),
        r"^available_node_types\.corpus_cpu\.idle_timeout is not a key\. Did you mean \S+\.idle_timeout_s\?$",
    ),
    (
        lambda t: t.update(file_mount={}),
        r"^file_mount is not a key\. Did you mean file_mounts\?$",
    ),
    (
        lambda t: types(t)["head"].update(resources={"CPU": 8}),
        r"^available_node_types\.head\.resources=\{'CPU': 8\} must be \{CPU: 0\}",
    ),
    (
        lambda t: types(t)["head"].update(resources={}),
        r"^available_node_types\.head\.resources=\{\} must be \{CPU: 0\}",
    ),
    (lambda t: t.update(head_node_type="boss"), r"`head_node_type` must be one of `available_node_types`"),
    (lambda t: t.pop("max_workers"), r"^max_workers is missing\. Add it\.$"),
    (
        lambda t: t["docker"].update(image="rayproject/ray:2.6.0-py311"),
        r"^docker\.image='rayproject/ray:2\.6\.0-py311'",
    ),
    (lambda t: t["file_mounts"].clear(), r"^file_mounts lacks ~/\.ray/auth_token"),
    (
        lambda t: t.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
        r"^worker_start_ray_commands must say RAY_AUTH_MODE=token",
    ),
    (
        lambda t: t.update(head_start_ray_commands=["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"]),
        r"^head_start_ray_commands: --dashboard-host=0\.0\.0\.0 opens the job API",
    ),
    (
        lambda t: t["file_mounts"].pop("~/preemption.py"),
        r"^file_mounts lacks ~/preemption\.py: .* Mount ops/preemption\.py",
    ),
    (
        lambda t: t["file_mounts"].update({"~/preemption.py": "ops/preemptions.py"}),
        r"^file_mounts lacks ~/preemption\.py",
    ),
    (
        lambda t: t["worker_start_ray_commands"].pop(),
        r"^worker_start_ray_commands must end with python ~/preemption\.py --cloud aws",
    ),
]


@pytest.mark.parametrize(("change", "message"), AWS_MISTAKES, ids=range(len(AWS_MISTAKES)))
def test_a_mistake_for_aws_is_named(change: Change, message: str) -> None:
    tree = read("cluster.yaml")
    change(tree)
    with pytest.raises(UserError, match=message) as caught:
        check_launcher(tree)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["provider"].pop("project_id"), r"^provider\.project_id is missing\. gcp needs it\.$"),
        (lambda t: t["provider"].update(aws_credentials={}), r"^provider\.aws_credentials is not a key\."),
        (
            lambda t: types(t)["expert_gpu"]["node_config"]["scheduling"][0].update(provisioningModel="spot"),
            r"scheduling\[0\]\.provisioningModel='spot' must be one of \S+ \S+ SPOT, STANDARD\.$",
        ),
        (
            lambda t: types(t)["expert_gpu"]["node_config"]["disks"][0]["initializeParams"].update(diskSizeGB=1),
            r"disks\[0\]\.initializeParams\.diskSizeGB is not a key\. Did you mean \S+\.diskSizeGb\?$",
        ),
        (
            lambda t: types(t)["head"]["node_config"].update(networkInterfaces=[{"subnetwrok": "a"}]),
            r"head\.node_config\.networkInterfaces\[0\]\.subnetwrok is not a key\. Did you mean \S+\.subnetwork\?$",
        ),
        (  # only in answers
            lambda t: types(t)["head"]["node_config"].update(cpuPlatform="a"),
            r"head\.node_config\.cpuPlatform is not a key\. ",
        ),
        (
            lambda t: types(t)["head"]["node_config"].update(disks="one"),
            r"head\.node_config\.disks='one' must hold keys",
        ),
        (
            lambda t: t.update(worker_start_ray_commands=read("cluster.yaml")["worker_start_ray_commands"]),
            r"^worker_start_ray_commands must end with python ~/preemption\.py --cloud gcp",
        ),
    ],
    ids=range(8),
)
def test_a_mistake_for_google_cloud_is_named(change: Change, message: str) -> None:
    tree = read("cluster-gcp.yaml")
    change(tree)
    with pytest.raises(UserError, match=message):
        check_launcher(tree)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("cluster.yaml", "botocore.session", "boto3"),
        ("cluster-gcp.yaml", "googleapiclient.discovery_cache", "google-api-python-client"),
    ],
)
def test_without_the_client_of_a_cloud_its_package_is_named(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    for found in (keys._ec2, keys._compute_engine):
        found.cache_clear()
    assert main("check", [name]) == 2
    assert capsys.readouterr().err == (
        f"error: {name}: node_config cannot be checked without {module}. Run: pip install {package}\n"
    )


def test_what_ray_takes_beside_the_clouds_own_fields_passes() -> None:
    aws, gcp = read("cluster.yaml"), read("cluster-gcp.yaml")
    types(aws)["expert_gpu"]["node_config"]["SubnetIds"] = ["subnet-1", "subnet-2"]
    types(gcp)["expert_gpu"]["node_config"]["sourceInstanceTemplate"] = "global/instanceTemplates/mine"
    assert (check_launcher(aws)[:3], check_launcher(gcp)[:3]) == ("aws", "gcp")


def test_nodes_that_nobody_preempts_need_no_watcher() -> None:
    tree = read("cluster.yaml")
    for node_type in types(tree).values():
        node_type["node_config"].pop("InstanceMarketOptions", None)
    tree["file_mounts"].pop("~/preemption.py")
    tree["worker_start_ray_commands"].pop()
    assert check_launcher(tree).startswith("aws")


def group(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def container(tree: dict[str, Any]) -> dict[str, Any]:
    return group(tree)["template"]["spec"]["containers"][0]


JOB_MISTAKES: list[tuple[Change, str]] = [
    (lambda t: t.update(apiVersion="ray.io/v1alpha1"), r"^apiVersion='ray\.io/v1alpha1' must be 'ray\.io/v1'\.$"),
    (lambda t: t.update(kind="RayJobs"), r"^kind='RayJobs' must be one of RayCluster, RayJob, RayService\.$"),
    (lambda t: t["metadata"].clear(), r"^metadata\.name is missing"),
    (
        lambda t: t["spec"].update(entryPoint=""),
        r"^RayJob\.spec\.entryPoint is not a key\. Did you mean \S+entrypoint\?$",
    ),
    (lambda t: t["spec"].pop("rayClusterSpec"), r"^spec\.rayClusterSpec is missing"),
    (lambda t: group(t).update(maxReplica=1), r"workerGroupSpecs\[0\]\.maxReplica is not a key\. .*\.maxReplicas\?$"),
    (lambda t: group(t).update(minReplicas=17), r"minReplicas=17, replicas=17 and maxReplicas=16 must be in order"),
    (lambda t: group(t).update(replicas=17), r"minReplicas=0, replicas=17 and maxReplicas=16 must be in order"),
    (lambda t: group(t).pop("maxReplicas"), r"workerGroupSpecs\[0\]\.maxReplicas is missing"),
    (
        lambda t: container(t)["resources"].update(limit={}),
        r"containers\[0\]\.resources\.limit is not a key\. .*limits\?$",
    ),
    (
        lambda t: container(t).update(image="cbtm-ray:latest"),
        r"containers\[0\]\.image='cbtm-ray:latest' must be of Ray 2",
    ),
    (lambda t: t["spec"]["rayClusterSpec"].pop("authOptions"), r"rayClusterSpec\.authOptions\.mode must be 'token'"),
    (
        lambda t: t["spec"]["rayClusterSpec"].update(rayVersion="2.59.0"),
        r"rayClusterSpec\.rayVersion='2\.59\.0' must be",
    ),
    (
        lambda t: t["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].clear(),
        r'headGroupSpec\.rayStartParams\.num-cpus must be "0"',
    ),
    (
        lambda t: t["spec"].update(entrypoint="python run.py"),
        r"^spec\.entrypoint='python run\.py' must be: python -m jobs",
    ),
    (
        lambda t: t["spec"].update(entrypoint="python -m jobs.run_everything --config configs/small.yaml"),
        r"^spec\.entrypoint: jobs\.run_everything is not a job",
    ),
    (
        lambda t: t["spec"].update(entrypoint=t["spec"]["entrypoint"].replace("gpus_per", "gpu_per")),
        r"^spec\.entrypoint: train\.gpu_per_expert is not a key\. Did you mean train\.gpus_per_expert\?",
    ),
    (
        lambda t: t["spec"].update(entrypoint="python -m jobs.run_all --config configs/small.yaml run.dir=runs/a"),
        r"^spec\.entrypoint: run\.dir=runs/a must be a URI",
    ),
    (
        lambda t: t["spec"].update(deletionStrategy={"onFailure": {"policy": "Delete"}}),
        r"^RayJob\.spec\.deletionStrategy\.onFailure\.policy='Delete' must be one of DeleteCluster, ",
    ),
    (lambda t: t["spec"].update(shutdownAfterJobFinishes=False), r"^spec\.ttlSecondsAfterFinished needs shutdownAfter"),
    (
        lambda t: t["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(restartPolicy="Always"),
        r"headGroupSpec\.template\.spec\.restartPolicy='Always' must be 'Never'",
    ),
]


@pytest.mark.parametrize(("change", "message"), JOB_MISTAKES, ids=range(len(JOB_MISTAKES)))
def test_a_mistake_in_a_job_is_named(change: Change, message: str) -> None:
    tree = read("kuberay/rayjob.yaml")
    change(tree)
    with pytest.raises(UserError, match=message):
        check_manifest(tree)


def test_what_kuberay_and_kubernetes_allow_passes() -> None:
    tree = read("kuberay/rayjob.yaml")
    rule = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}}
    tree["spec"]["deletionStrategy"] = {"deletionRules": [rule]}
    group(tree)["template"]["spec"] |= {"schedulerName": "volcano", "dnsPolicy": "ClusterFirst"}
    assert check_manifest(tree).startswith("RayJob cbtm-run, workers: corpus-cpu up to 16")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("drain_s: 300", "drains: 300", r"^spec\.serveConfigV2: drains=300: Extra inputs"),
        ("drain_s: 300", "top_k: 0", r"^spec\.serveConfigV2: top_k=0: Input should be greater than or equal to 1"),
        ("serve.app:build", "serve.app:make", r"^spec\.serveConfigV2: import_path='serve\.app:make' must be"),
        (
            "num_replicas",
            "num_replica",
            r"deployments\[0\]\.num_replica is not a key\. Did you mean \S+\.num_replicas\?$",
        ),
        ("num_replicas: 2", "num_replicas: -1", r"^spec\.serveConfigV2: applications\.0\.deployments\.0\.num_replicas"),
    ],
)
def test_a_mistake_in_what_is_served_is_named(old: str, new: str, message: str) -> None:
    tree = read("kuberay/rayservice.yaml")
    assert old in tree["spec"]["serveConfigV2"]
    tree["spec"]["serveConfigV2"] = tree["spec"]["serveConfigV2"].replace(old, new)
    with pytest.raises(UserError, match=message):
        check_manifest(tree)


def test_every_wrong_file_gets_a_line_and_the_exit_code_is_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    broken.write_text("provider: [\n")
    other.write_text("steps: 3\n")
    assert main("check", [str(broken), "cluster.yaml", str(other), str(tmp_path / "c.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("cluster.yaml: aws, workers: ")
    errors = printed.err.splitlines()
    assert [error.split(": ")[2].split(" ")[0] for error in errors] == ["is", "must", "cannot"]


def test_the_job_checks_what_make_gives_it() -> None:
    job = [sys.executable, "-m", "jobs.validate_cluster", "cluster.yaml"]
    assert subprocess.run(job, cwd=ROOT, capture_output=True, check=True).stdout.startswith(b"cluster.yaml: aws")


def test_ray_uploads_the_code_and_neither_runs_nor_data(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    kept = {
        "cbtm_ray/config.py",
        "jobs/run_all.py",
        "ops/gguf.py",
        "serve/app.py",
        "configs/quickstart.yaml",
        "requirements.txt",
    }
    left = {
        ".venv/bin/python",
        "ops/grafana.json",
        "runs/a/seed/model.safetensors",
        "corpus.jsonl",
        "big.npy",
        "cbtm_ray/__pycache__/a.pyc",
    }
    for name in kept | left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        uploaded = {re.sub("^/", "", name) for name in archive.namelist() if not name.endswith("/")}
    assert uploaded == kept | {".rayignore"}
