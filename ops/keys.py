"""Which keys a cluster's files may hold, where the tools that read them later would take a typo without a word.

`Keys` say what a value may be: a dict, of each allowed key what its own value may be; a tuple, one of these; None, anything.
A list is checked item by item. What a cloud's client or Ray describes is read from there; what nothing installable describes
is copied below.
"""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

from cbtm_ray.errors import UserError, unknown_key

Keys = dict[str, "Keys"] | tuple[str, ...] | None


def check_keys(value: Any, keys: Keys, where: str) -> None:
    """UserError that names the first key or value that is not allowed, with the nearest key that is."""
    if keys is None:
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_keys(item, keys, f"{where}[{index}]")
    elif isinstance(keys, tuple):
        if value not in keys:
            raise UserError(f"{where}={value!r} must be one of {', '.join(keys)}.")
    elif not isinstance(value, dict):
        raise UserError(f"{where}={value!r} must hold keys. Allowed there: {', '.join(sorted(keys))}.")
    else:
        for key, inner in value.items():
            if key not in keys:
                raise UserError(unknown_key(key, keys, where))
            check_keys(inner, keys[key], f"{where}.{key}")


def check_node_config(config: Any, cloud: str, where: str) -> None:
    """UserError if it is no request for a node, by the description of such requests in the cloud's own client. Offline."""
    if cloud == "gcp":
        check_keys(config, _compute_engine(), where)
        return
    request = _ec2()
    check_keys(config, {**_ec2_keys(request), "SubnetIds": None}, where)
    # Ray adds the counts, and puts one of its own SubnetIds into each request.
    whole = {"MinCount": 1, "MaxCount": 1, **{key: value for key, value in config.items() if key != "SubnetIds"}}
    report = _module("botocore.validate", "boto3").ParamValidator().validate(whole, request)
    if report.has_errors():
        raise UserError(f"{where}: {report.generate_report().splitlines()[0]}.")


@functools.cache
def _ec2() -> Any:
    """The input of EC2's RunInstances, as botocore describes it."""
    ec2 = _module("botocore.session", "boto3").get_session().get_service_model("ec2")
    return ec2.operation_model("RunInstances").input_shape


def _ec2_keys(shape: Any) -> Any:
    if shape.type_name == "list":
        return _ec2_keys(shape.member)
    if shape.type_name == "structure":
        return {name: _ec2_keys(member) for name, member in shape.members.items()}
    return tuple(getattr(shape, "enum", ())) or None


@functools.cache
def _compute_engine() -> Keys:
    """The fields of Compute Engine's Instance that a request may set, from google-api-python-client.

    Without types: Compute Engine takes 200 for "200", and a list of one mapping, as Ray's own files have, for the mapping.
    """
    client = _module("googleapiclient.discovery_cache", "google-api-python-client")
    schemas = json.loads(client.get_static_doc("compute", "v1"))["schemas"]

    def keys_of(schema: dict[str, Any]) -> Any:
        schema = schema.get("items", schema)
        schema = schemas.get(schema.get("$ref"), schema)
        if "properties" in schema:
            return {name: keys_of(part) for name, part in schema["properties"].items() if not part.get("readOnly")}
        return tuple(schema.get("enum", ())) or None

    # The second is Ray's own: an argument of the call rather than of the instance.
    return {**keys_of(schemas["Instance"]), "sourceInstanceTemplate": None}


def _module(name: str, package: str) -> Any:
    """A module of the package that `ray up` itself needs for a cloud."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"node_config cannot be checked without {error.name}. Run: pip install {package}") from error


def _any(*names: str) -> dict[str, Keys]:
    return dict.fromkeys(names)


RESOURCES = ("CPU", "GPU", "memory", "object_store_memory", "serving")
"""Ray's own resources, and `serving`, which cluster.yaml gives to the nodes for replicas."""

_PROVIDER = _any(
    "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "use_external_head_ip",
    "disable_node_updaters", "disable_launch_config_check", "foreground_node_launch", "worker_liveness_check",
)  # fmt: skip
"""The provider keys that Ray 2.60's autoscaler reads for every cloud."""

PROVIDER: dict[str, Keys] = {
    "aws": {
        **_PROVIDER,
        "aws_credentials": _any("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
        "key_pair": _any("key_name"),
        "security_group": _any("GroupName", "IpPermissions"),
        "cloudwatch": None,
    },
    "gcp": {**_PROVIDER, "project_id": None, "gcp_credentials": _any("type", "credentials")},
}
"""Keys of `provider`, from ray/autoscaler/_private/{aws,gcp} of Ray 2.60."""

PROVIDER_NEEDS = {"aws": ("region",), "gcp": ("region", "availability_zone", "project_id")}

NODE_CONFIG_NEEDS = {"aws": "InstanceType", "gcp": "machineType"}

# KubeRay's definitions come in no Python package, so the fields below are copies. They are names only:
# kubectl apply --dry-run=server checks the rest.
_CONTAINER = _any(
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "name", "ports",
    "readinessProbe", "resizePolicy", "restartPolicy", "restartPolicyRules", "securityContext", "startupProbe", "stdin",
    "stdinOnce", "terminationMessagePath", "terminationMessagePolicy", "tty", "volumeDevices", "volumeMounts", "workingDir",
)  # fmt: skip

_POD: dict[str, Keys] = {
    "metadata": _any("annotations", "finalizers", "labels", "name", "namespace"),
    "spec": {
        **_any(
            "activeDeadlineSeconds", "affinity", "automountServiceAccountToken", "dnsConfig", "dnsPolicy",
            "enableServiceLinks", "ephemeralContainers", "hostAliases", "hostIPC", "hostNetwork", "hostPID", "hostUsers",
            "hostname", "hostnameOverride", "imagePullSecrets", "initContainers", "nodeName", "nodeSelector", "os",
            "overhead", "preemptionPolicy", "priority", "priorityClassName", "readinessGates", "resourceClaims", "resources",
            "restartPolicy", "runtimeClassName", "schedulerName", "schedulingGates", "securityContext", "serviceAccount",
            "serviceAccountName", "setHostnameAsFQDN", "shareProcessNamespace", "subdomain",
            "terminationGracePeriodSeconds", "tolerations", "topologySpreadConstraints", "volumes", "workloadRef",
        ),
        "containers": {**_CONTAINER, "resources": {"limits": None, "requests": None, "claims": None}},
    },
}  # fmt: skip
"""The keys of a pod, as KubeRay's CustomResourceDefinitions repeat Kubernetes' own."""

_CLUSTER: dict[str, Keys] = {
    **_any("headServiceAnnotations", "historyServerOptions", "managedBy", "networkPolicy", "rayVersion", "suspend"),
    "authOptions": {"enableK8sTokenAuth": None, "mode": ("token",), "secretName": None},
    "autoscalerOptions": {
        **_any(
            "args", "command", "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources",
            "securityContext", "volumeMounts",
        ),
        "upscalingMode": ("Aggressive", "Conservative", "Default"),
        "version": ("v1", "v2"),
    },
    "enableInTreeAutoscaling": None,
    "gcsFaultToleranceOptions": _any(
        "backend", "externalStorageNamespace", "redisAddress", "redisPassword", "redisUsername", "storage"
    ),
    "headGroupSpec": {
        **_any(
            "enableIngress", "headService", "ingressOptions", "labels", "rayStartParams", "resources", "serviceType",
        ),
        "template": _POD,
    },
    "tlsOptions": _any("enabled"),
    "upgradeStrategy": {"type": ("None", "Recreate")},
    "workerGroupSpecs": {
        **_any(
            "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "priority",
            "rayStartParams", "replicas", "resources", "scaleStrategy", "suspend",
        ),
        "template": _POD,
    },
}  # fmt: skip

_DELETION: dict[str, Keys] = {"policy": ("DeleteCluster", "DeleteNone", "DeleteSelf", "DeleteWorkers")}

KUBERAY: dict[str, dict[str, Keys]] = {
    "RayCluster": _CLUSTER,
    "RayJob": {
        **_any(
            "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "entrypoint",
            "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
            "preRunningDeadlineSeconds", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submitterConfig",
            "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
        ),
        "deletionStrategy": {
            "deletionRules": {"condition": _any("jobDeploymentStatus", "jobStatus", "ttlSeconds"), **_DELETION},
            "onFailure": _DELETION,
            "onSuccess": _DELETION,
        },
        "rayClusterSpec": _CLUSTER,
        "submissionMode": ("HTTPMode", "InteractiveMode", "K8sJobMode", "SidecarMode"),
    },
    "RayService": {
        **_any(
            "excludeHeadPodFromServeSvc", "managedBy", "rayClusterDeletionDelaySeconds", "serveConfigV2", "serveService",
            "suspend",
        ),
        "upgradeStrategy": {
            "clusterUpgradeOptions": _any("gatewayClassName", "intervalSeconds", "maxSurgePercent", "stepSizePercent"),
            "type": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
        },
        "rayClusterConfig": _CLUSTER,
    },
}  # fmt: skip
"""`spec` of KubeRay's ray.io/v1 kinds, version 1.7.

Without the service's two thresholds that 1.7 itself calls unused. The manifests here use nothing that 1.6 lacks.
"""
