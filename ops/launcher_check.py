"""Check the files that a cluster is started from, with nothing launched and no account: `make validate-cluster`.

Files of the cluster launcher go through Ray's own validation, which knows nothing of what stands under `provider` and
`node_config`, and then through ours, which does. Kubernetes manifests are looked at in `kuberay_check.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cbtm_ray.errors import UserError, refuse, unknown_key
from ops.keys import NODE_CONFIG_NEEDS, PROVIDER, PROVIDER_NEEDS, RESOURCES, check_keys, check_node_config
from ops.kuberay_check import check_manifest, check_version

TOKEN_FILE = "~/.ray/auth_token"
WATCHER = "~/preemption.py"


def main(description: str, arguments: list[str] | None = None) -> int:
    """Check every file; exit code 0, or 2 with a line for each file that is not right."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("files", nargs="+", metavar="FILE", help="cluster.yaml, kuberay/rayjob.yaml, ...")
    code = 0
    for path in parser.parse_args(arguments).files:
        try:
            print(f"{path}: {check_file(path)}")
        except UserError as error:
            code = refuse(f"{path}: {error}")
    return code


def check_file(path: str) -> str:
    """One line that describes the file.

    Raises:
        UserError: one line that names the field, its value, what is allowed and what to do.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}. Give a file such as cluster.yaml.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(tree, dict) and "apiVersion" in tree:
        return check_manifest(tree)
    if isinstance(tree, dict) and "provider" in tree:
        return check_launcher(tree)
    raise UserError("must hold 'provider' (a file of the cluster launcher) or 'apiVersion' (a Kubernetes manifest).")


def check_launcher(tree: dict[str, Any]) -> str:
    """A file for `ray up`: its clouds and node types in a line; UserError as in `check_file`."""
    provider = tree["provider"]
    cloud = provider.get("type") if isinstance(provider, dict) else provider
    if cloud not in PROVIDER:
        raise UserError(f"provider.type={cloud!r} must be one of {', '.join(PROVIDER)}.")
    check_keys(provider, PROVIDER[cloud], "provider")
    for key in PROVIDER_NEEDS[cloud]:
        if not provider.get(key):
            raise UserError(f"provider.{key} is missing. {cloud} needs it.")
    _check_with_ray(tree)
    types = tree["available_node_types"]
    for name, node_type in types.items():
        _check_node_type(node_type, cloud, f"available_node_types.{name}", tree["max_workers"])
    _check_head(tree)
    check_version(tree.get("docker", {}).get("image", ""), "docker.image")
    _check_token(tree)
    _check_preemption(tree, cloud)
    limits = ", ".join(
        f"{name} up to {node_type['max_workers']}"
        for name, node_type in types.items()
        if name != tree["head_node_type"]
    )
    return f"{cloud}, workers: {limits}"


def _check_with_ray(tree: dict[str, Any]) -> None:
    for key in ("available_node_types", "head_node_type", "max_workers"):
        if key not in tree:  # for each of them Ray would quietly take a default of its own
            raise UserError(f"{key} is missing. Add it.")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(tree))
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties":
            allowed = error.schema["properties"]
            key = next(key for key in error.instance if key not in allowed)
            raise UserError(unknown_key(key, allowed, where)) from error
        raise UserError(f"{where}: {error.message}.") from error
    except (ValueError, AssertionError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def _check_node_type(node_type: dict[str, Any], cloud: str, where: str, max_workers: int) -> None:
    for resource in node_type["resources"]:
        if resource not in RESOURCES:
            kind = "a resource that this project asks for"
            raise UserError(unknown_key(resource, RESOURCES, f"{where}.resources", kind))
    check_node_config(node_type["node_config"], cloud, f"{where}.node_config")
    needed = NODE_CONFIG_NEEDS[cloud]
    if not node_type["node_config"].get(needed):
        raise UserError(f"{where}.node_config.{needed} is missing. {cloud} needs it.")
    least, most = node_type.get("min_workers", 0), node_type.get("max_workers")
    if most is None:
        raise UserError(f"{where}.max_workers is missing: without it the whole cluster may be of this type. Add it.")
    if not 0 <= least <= most <= max_workers:
        raise UserError(
            f"{where}: min_workers={least} and max_workers={most} must be in order, from 0 to the cluster's "
            f"max_workers={max_workers}. Change one of them."
        )


def _check_head(tree: dict[str, Any]) -> None:
    name = tree["head_node_type"]
    resources = tree["available_node_types"][name]["resources"]
    if resources.get("CPU") != 0 or resources.get("GPU", 0) != 0:
        raise UserError(
            f"available_node_types.{name}.resources={resources} must be {{CPU: 0}}: work on the head can end the cluster. "
            "Give the CPUs to a worker type."
        )


def _check_token(tree: dict[str, Any]) -> None:
    """Token authentication on every node: the mode where Ray starts, and the file to read the token from."""
    if TOKEN_FILE not in tree.get("file_mounts", {}):
        raise UserError(f"file_mounts lacks {TOKEN_FILE}: without it no node knows the cluster's token. Mount it.")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in tree.get(key, []) if "ray start" in command]
        if not starts or not all("RAY_AUTH_MODE=token" in command for command in starts):
            raise UserError(f"{key} must say RAY_AUTH_MODE=token where it runs ray start, or anyone may send it code.")
        if any(re.search(r"--dashboard-host[= ]0\.0\.0\.0", command) for command in starts):
            raise UserError(f"{key}: --dashboard-host=0.0.0.0 opens the job API to the network. Use 127.0.0.1.")


def _check_preemption(tree: dict[str, Any], cloud: str) -> None:
    """Where a node may be a spot node, the watcher of its notices, for this cloud, after Ray has started."""
    spot = {"aws": "'MarketType': 'spot'", "gcp": "'provisioningModel': 'SPOT'"}[cloud]
    if not any(spot in str(node_type["node_config"]) for node_type in tree["available_node_types"].values()):
        return
    mounted = tree["file_mounts"].get(WATCHER)
    if mounted is None or not (Path(__file__).parent.parent / mounted).is_file():
        raise UserError(f"file_mounts lacks {WATCHER}: spot nodes run it. Mount ops/preemption.py there.")
    last = tree["worker_start_ray_commands"][-1]
    if f"{WATCHER} --cloud {cloud} " not in last:
        raise UserError(
            f"worker_start_ray_commands must end with python {WATCHER} --cloud {cloud}, in the background: spot notices "
            "are lost otherwise."
        )
