"""Which keys a cluster's files may hold, where the tools that read them later would take a typo without a word.

A `Keys` tree says of every key what may stand under it: another tree, a tuple of allowed values, or None for anything.
Lists are looked at item by item. The trees hold names only, taken from the interfaces that are given with each.
"""

from __future__ import annotations

import difflib
from typing import Any, Union

from cbtm_ray.errors import UserError

Keys = dict[str, Union["Keys", tuple[str, ...], None]]


def check_keys(value: Any, keys: Keys, where: str) -> None:
    """UserError with the nearest key, if a mapping in `value` holds one that is not in the tree."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_keys(item, keys, f"{where}[{index}]")
        return
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r} must hold keys. Allowed there: {', '.join(sorted(keys))}.")
    for key, inner in value.items():
        if key not in keys:
            raise UserError(f"{where}.{key} is not a key. {did_you_mean(key, list(keys), where)}")
        below = keys[key]
        if isinstance(below, dict):
            check_keys(inner, below, f"{where}.{key}")
        elif below is not None and inner not in below:
            raise UserError(f"{where}.{key}={inner!r} must be one of {', '.join(below)}.")


def did_you_mean(key: Any, allowed: list[str], where: str) -> str:
    """Advice for a user whose key is not allowed."""
    nearest = difflib.get_close_matches(str(key).lower(), [name.lower() for name in allowed], n=1, cutoff=0.6)
    if not nearest:
        return f"Remove it. Allowed there: {', '.join(sorted(allowed))}."
    return f"Did you mean {where}.{next(name for name in allowed if name.lower() == nearest[0])}?"


def _any(*names: str) -> Keys:
    return dict.fromkeys(names)


RESOURCES = ("CPU", "GPU", "memory", "object_store_memory", "serving")
"""Ray's own resources, and `serving`, which cluster.yaml gives to the nodes for replicas."""

_PROVIDER = _any(
    "type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "use_external_head_ip",
    "disable_node_updaters", "disable_launch_config_check", "foreground_node_launch", "worker_liveness_check",
)  # fmt: skip
"""What Ray 2.60's autoscaler reads of the provider whatever the cloud."""

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

_EC2_DISK = _any(
    "AvailabilityZone", "AvailabilityZoneId", "DeleteOnTermination", "EbsCardIndex", "Encrypted", "Iops", "KmsKeyId",
    "OutpostArn", "SnapshotId", "Throughput", "VolumeInitializationRate", "VolumeSize", "VolumeType",
)  # fmt: skip

_EC2_INSTANCE: Keys = {
    **_any(
        "AdditionalInfo", "CapacityReservationSpecification", "ClientToken", "CpuOptions", "CreditSpecification",
        "DisableApiStop", "DisableApiTermination", "DryRun", "EbsOptimized", "ElasticGpuSpecification",
        "ElasticInferenceAccelerators", "EnablePrimaryIpv6", "EnclaveOptions", "HibernationOptions", "ImageId",
        "InstanceInitiatedShutdownBehavior", "InstanceType", "Ipv6AddressCount", "Ipv6Addresses", "KernelId", "KeyName",
        "LicenseSpecifications", "MaintenanceOptions", "MaxCount", "MinCount", "Monitoring", "NetworkInterfaces",
        "NetworkPerformanceOptions", "Operator", "PrivateDnsNameOptions", "PrivateIpAddress", "RamdiskId",
        "SecondaryInterfaces", "SecurityGroupIds", "SecurityGroups", "SubnetId", "UserData",
    ),
    "SubnetIds": None,  # Ray's own: it takes one of them for each node
    "BlockDeviceMappings": {**_any("DeviceName", "NoDevice", "VirtualName"), "Ebs": _EC2_DISK},
    "IamInstanceProfile": _any("Arn", "Name"),
    "InstanceMarketOptions": {
        "MarketType": ("spot", "on-demand", "capacity-block", "interruptible-capacity-reservation"),
        "SpotOptions": _any(
            "BlockDurationMinutes", "InstanceInterruptionBehavior", "MaxPrice", "SpotInstanceType", "ValidUntil"
        ),
    },
    "LaunchTemplate": _any("LaunchTemplateId", "LaunchTemplateName", "Version"),
    "MetadataOptions": _any(
        "HttpEndpoint", "HttpProtocolIpv6", "HttpPutResponseHopLimit", "HttpTokens", "InstanceMetadataTags"
    ),
    "Placement": _any(
        "Affinity", "AvailabilityZone", "AvailabilityZoneId", "GroupId", "GroupName", "HostId", "HostResourceGroupArn",
        "PartitionNumber", "SpreadDomain", "Tenancy",
    ),
    "TagSpecifications": _any("ResourceType", "Tags"),
}  # fmt: skip
"""Parameters of EC2's RunInstances (API 2016-11-15, as in botocore 1.44)."""

_GCE_INSTANCE: Keys = {
    **_any(
        "advancedMachineFeatures", "canIpForward", "confidentialInstanceConfig", "deletionProtection", "description",
        "displayDevice", "hostname", "instanceEncryptionKey", "keyRevocationActionType", "labels",
        "localSsdEncryptionMode", "machineType", "minCpuPlatform", "networkInterfaces", "networkPerformanceConfig",
        "params", "privateIpv6GoogleAccess", "reservationAffinity", "resourcePolicies", "shieldedInstanceConfig",
        "sourceMachineImage", "sourceMachineImageEncryptionKey", "workloadIdentityConfig",
    ),
    "sourceInstanceTemplate": None,  # Ray's own: an argument of the call rather than of the instance
    "disks": {
        **_any(
            "architecture", "autoDelete", "boot", "deviceName", "diskEncryptionKey", "diskSizeGb", "forceAttach",
            "guestOsFeatures", "index", "interface", "kind", "licenses", "mode", "source",
        ),
        "type": ("PERSISTENT", "SCRATCH"),
        "initializeParams": _any(
            "architecture", "description", "diskName", "diskSizeGb", "diskType", "enableConfidentialCompute", "labels",
            "licenses", "onUpdateAction", "provisionedIops", "provisionedThroughput", "replicaZones",
            "resourceManagerTags", "resourcePolicies", "sourceImage", "sourceImageEncryptionKey", "sourceSnapshot",
            "sourceSnapshotEncryptionKey", "storagePool",
        ),
    },
    "guestAccelerators": _any("acceleratorCount", "acceleratorType"),
    "metadata": {"items": _any("key", "value")},
    "scheduling": {
        **_any(
            "automaticRestart", "availabilityDomain", "exposeHostTopology", "gracefulShutdown",
            "hostErrorTimeoutSeconds", "localSsdRecoveryTimeout", "locationHint", "maxRunDuration", "minNodeCpus",
            "nodeAffinities", "onInstanceStopAction", "preemptible", "preemptionNoticeDuration", "protectionTier",
            "skipGuestOsShutdown", "terminationTime",
        ),
        "instanceTerminationAction": ("DELETE", "STOP"),
        "onHostMaintenance": ("MIGRATE", "TERMINATE"),
        "provisioningModel": ("FLEX_START", "RESERVATION_BOUND", "SPOT", "STANDARD"),
    },
    "serviceAccounts": _any("email", "scopes"),
    "tags": _any("items"),
}  # fmt: skip
"""Fields of Compute Engine's Instance that a request may set (API v1, as in google-api-python-client 2.202)."""

NODE_CONFIG: dict[str, Keys] = {"aws": _EC2_INSTANCE, "gcp": _GCE_INSTANCE}

NODE_CONFIG_NEEDS = {"aws": "InstanceType", "gcp": "machineType"}

_CONTAINER = _any(
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "name", "ports",
    "readinessProbe", "resizePolicy", "restartPolicy", "restartPolicyRules", "securityContext", "startupProbe", "stdin",
    "stdinOnce", "terminationMessagePath", "terminationMessagePolicy", "tty", "volumeDevices", "volumeMounts", "workingDir",
)  # fmt: skip

_POD: Keys = {
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
"""Of a pod, as KubeRay's CustomResourceDefinitions repeat Kubernetes' own."""

_CLUSTER: Keys = {
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

_DELETION: Keys = {"policy": ("DeleteCluster", "DeleteNone", "DeleteSelf", "DeleteWorkers")}

KUBERAY: dict[str, Keys] = {
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
