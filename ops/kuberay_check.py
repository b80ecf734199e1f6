"""Checks of the Kubernetes manifests in `kuberay/`: our own, not KubeRay's published schemas.

What they know: the names of KubeRay's fields down to the containers of a pod (`keys.py`), replica bounds, the
head without work, the token, the Ray version of requirements.txt, that the job's entrypoint is a job of ours with a
configuration that loads, that the service's application takes its arguments, and two combinations that KubeRay refuses.
A cluster's schemas say more: kubectl apply --dry-run=server. Combinations KubeRay refuses only after it has taken a manifest,
in the events of kubectl describe.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cbtm_ray.errors import UserError
from cbtm_ray.load_config import load_config
from ops.keys import KUBERAY, Keys, check_keys

API_VERSION = "ray.io/v1"
CLUSTER_FIELD = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
"""Where in `spec` of each kind the cluster is described; None: `spec` itself."""


def check_manifest(tree: dict[str, Any]) -> str:
    """A manifest of one of KubeRay's kinds: what it is in a line; UserError with the field if something is not right."""
    if tree["apiVersion"] != API_VERSION:
        raise UserError(f"apiVersion={tree['apiVersion']!r} must be {API_VERSION!r}.")
    kind = tree.get("kind")
    if kind not in KUBERAY:
        raise UserError(f"kind={kind!r} must be one of {', '.join(KUBERAY)}.")
    check_keys(tree, {"apiVersion": None, "kind": None, "metadata": None, "spec": KUBERAY[kind]}, kind)
    if not (isinstance(tree.get("metadata"), dict) and tree["metadata"].get("name")):
        raise UserError("metadata.name is missing. Add it.")
    spec, field = tree.get("spec", {}), CLUSTER_FIELD[kind]
    where = f"spec.{field}" if field else "spec"
    cluster = spec.get(field) if field else spec
    if not cluster:
        raise UserError(f"{where} is missing. Describe the cluster there.")
    _check_cluster(cluster, where)
    if kind == "RayJob":
        _check_entrypoint(spec.get("entrypoint", ""))
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            raise UserError("spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true. Set it.")
    if kind == "RayService":
        _check_serve_config(spec.get("serveConfigV2", ""))
    groups = ", ".join(f"{group['groupName']} up to {group['maxReplicas']}" for group in cluster["workerGroupSpecs"])
    return f"{kind} {tree['metadata']['name']}, workers: {groups}"


def check_version(ray: str, where: str) -> None:
    """UserError if an image's name or a version is not of the Ray that requirements.txt installs."""
    wanted = ray_version()
    if not re.search(rf"(^|[:-]){re.escape(wanted)}($|-)", ray):
        raise UserError(
            f"{where}={ray!r} must be of Ray {wanted}, as in requirements.txt: nodes and clients must agree."
        )


@functools.cache
def ray_version() -> str:
    """The Ray that requirements.txt pins."""
    text = (Path(__file__).parent.parent / "requirements.txt").read_text(encoding="utf-8")
    found = re.search(r"^ray\[.*\]==([\d.]+)", text, re.MULTILINE)
    assert found, "requirements.txt pins Ray"
    return found[1]


def _check_cluster(cluster: dict[str, Any], where: str) -> None:
    check_version(str(cluster.get("rayVersion", "")), f"{where}.rayVersion")
    if cluster.get("authOptions", {}).get("mode") != "token":
        raise UserError(f"{where}.authOptions.mode must be 'token', or anyone who reaches the head may send it code.")
    head = cluster.get("headGroupSpec", {})
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        raise UserError(f'{where}.headGroupSpec.rayStartParams.num-cpus must be "0": no work on the head. Set it.')
    if not cluster.get("workerGroupSpecs"):
        raise UserError(f"{where}.workerGroupSpecs is empty, and the head does no work. Add a group.")
    v2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    _check_pod(head, f"{where}.headGroupSpec", v2)
    for index, group in enumerate(cluster["workerGroupSpecs"]):
        place = f"{where}.workerGroupSpecs[{index}]"
        for key in ("groupName", "minReplicas", "maxReplicas"):
            if key not in group:
                raise UserError(f"{place}.{key} is missing. Add it.")
        least, most = group["minReplicas"], group["maxReplicas"]
        if not 0 <= least <= group.get("replicas", least) <= most:
            raise UserError(
                f"{place}: minReplicas={least}, replicas={group.get('replicas', least)} and maxReplicas={most} must be in "
                "order, from 0. Change one of them."
            )
        _check_pod(group, place, v2)


def _check_pod(group: dict[str, Any], where: str, autoscaler_v2: bool) -> None:
    pod = group.get("template", {}).get("spec", {})
    restart, containers = pod.get("restartPolicy", "Never"), pod.get("containers")
    if autoscaler_v2 and restart != "Never":
        raise UserError(f"{where}.template.spec.restartPolicy={restart!r} must be 'Never' with version v2. Remove it.")
    if not containers:
        raise UserError(f"{where}.template.spec.containers is missing. Add one with an image.")
    check_version(containers[0].get("image", ""), f"{where}.template.spec.containers[0].image")


def _check_entrypoint(entrypoint: str) -> None:
    """A command line of one of the jobs, with a configuration that loads and a run directory that all nodes reach."""
    words = shlex.split(entrypoint)
    if words[:2] != ["python", "-m"] or words[3:4] != ["--config"] or len(words) < 5:
        raise UserError(
            f"spec.entrypoint={entrypoint!r} must be: python -m jobs.NAME --config FILE [section.key=value]."
        )
    name = words[2]
    if not name.startswith("jobs.") or importlib.util.find_spec(name) is None:
        raise UserError(f"spec.entrypoint: {name} is not a job. Give one of jobs/, such as jobs.run_all.")
    try:
        config = load_config(words[4], words[5:])
    except UserError as error:
        raise UserError(f"spec.entrypoint: {error}") from error
    if "://" not in config.run.dir:
        raise UserError(f"spec.entrypoint: run.dir={config.run.dir} must be a URI: pods share no disk.")


def _check_serve_config(text: str) -> None:
    """Check the Serve configuration: Ray's own schemas, which ignore unknown keys, then the keys, then our arguments."""
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    from serve.arguments import AppArguments
    from serve.limits import invalid

    tree = yaml.safe_load(text) or {}
    keys = _fields(ServeDeploySchema)
    keys["applications"] = {**_fields(ServeApplicationSchema), "deployments": _fields(DeploymentSchema)}
    check_keys(tree, keys, "spec.serveConfigV2")
    try:
        ServeDeploySchema.model_validate(tree)
        for application in tree["applications"]:
            if application["import_path"] != "serve.app:build":
                raise UserError(f"import_path={application['import_path']!r} must be 'serve.app:build'.")
            AppArguments(**application.get("args", {}))
    except ValidationError as error:
        raise UserError(f"spec.serveConfigV2: {invalid(error)}.") from error
    except UserError as error:
        raise UserError(f"spec.serveConfigV2: {error}") from error


def _fields(model: type[BaseModel]) -> dict[str, Keys]:
    return dict.fromkeys(model.model_fields)
