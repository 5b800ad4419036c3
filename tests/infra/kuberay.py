"""What KubeRay's custom resources may hold, as rules: an unknown field or a wrong type is named.

Fields and types are those of the API reference of KubeRay 1.7.0 (ray-project/kuberay, `docs/reference/api.md`,
last changed in commit 97509c3a72). Pods and other parts that are Kubernetes' own are checked by its schema.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import kubernetes_validate

# What is used here has not changed for many releases.
KUBERNETES = "1.33"


@dataclass(frozen=True)
class Fields:
    """An object with these fields and no others."""

    allowed: dict[str, Any]
    required: tuple[str, ...] = ()


@dataclass(frozen=True)
class Each:
    """A list of one kind of thing."""

    of: Any


@dataclass(frozen=True)
class OneOf:
    """A text of a short list."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Core:
    """A part that is Kubernetes' own: `wrap` puts it where its schema has it."""

    kind: str


STRINGS = dict[str, str]
POD = Core("PodTemplate")
MANAGERS = OneOf(("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"))

AUTOSCALER = Fields(
    {
        "resources": Core("resources"),
        "image": str,
        "imagePullPolicy": OneOf(("Always", "IfNotPresent", "Never")),
        "securityContext": dict,
        "idleTimeoutSeconds": int,
        "upscalingMode": OneOf(("Default", "Aggressive", "Conservative")),
        "version": OneOf(("v1", "v2")),
        "env": list,
        "envFrom": list,
        "volumeMounts": list,
        "command": Each(str),
        "args": Each(str),
    }
)
HEAD = Fields(
    {
        "template": POD,
        "headService": dict,
        "enableIngress": bool,
        "ingressOptions": dict,
        "resources": STRINGS,
        "labels": STRINGS,
        "rayStartParams": STRINGS,
        "serviceType": OneOf(("ClusterIP", "NodePort", "LoadBalancer")),
    },
    required=("template", "rayStartParams"),
)
WORKERS = Fields(
    {
        "suspend": bool,
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "idleTimeoutSeconds": int,
        "priority": int,
        "resources": STRINGS,
        "labels": STRINGS,
        "rayStartParams": STRINGS,
        "template": POD,
        "scaleStrategy": Fields({"workersToDelete": Each(str)}),
        "numOfHosts": int,
    },
    required=("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
)
CLUSTER = Fields(
    {
        "upgradeStrategy": Fields({"type": OneOf(("Recreate", "None"))}),
        "authOptions": Fields(
            {"enableK8sTokenAuth": bool, "secretName": str, "mode": OneOf(("disabled", "token"))}
        ),
        "suspend": bool,
        "managedBy": MANAGERS,
        "autoscalerOptions": AUTOSCALER,
        "headServiceAnnotations": STRINGS,
        "enableInTreeAutoscaling": bool,
        "gcsFaultToleranceOptions": dict,
        "historyServerOptions": dict,
        "networkPolicy": dict,
        "tlsOptions": Fields({"enabled": bool}),
        "headGroupSpec": HEAD,
        "rayVersion": str,
        "workerGroupSpecs": Each(WORKERS),
    },
    required=("headGroupSpec",),
)
POLICY = OneOf(("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"))
DELETION = Fields(
    {
        "deletionRules": Each(
            Fields(
                {
                    "policy": POLICY,
                    "condition": Fields(
                        {"jobStatus": str, "jobDeploymentStatus": str, "ttlSeconds": int}
                    ),
                },
                required=("policy", "condition"),
            )
        ),
        "onSuccess": Fields({"policy": POLICY}),
        "onFailure": Fields({"policy": POLICY}),
    }
)
JOB = Fields(
    {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "rayClusterSpec": CLUSTER,
        "submitterPodTemplate": POD,
        "metadata": STRINGS,
        "clusterSelector": STRINGS,
        "submitterConfig": Fields({"backoffLimit": int}),
        "managedBy": MANAGERS,
        "deletionStrategy": DELETION,
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "submissionMode": OneOf(("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")),
        "entrypointResources": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "ttlSecondsAfterFinished": int,
        "preRunningDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "suspend": bool,
    }
)
CRON_JOB = Fields(
    {"jobTemplate": JOB, "schedule": str, "timeZone": str, "suspend": bool},
    required=("jobTemplate", "schedule"),
)
METADATA = Fields(
    {
        "ownerReferences": list,
        "name": str,
        "generateName": str,
        "namespace": str,
        "labels": STRINGS,
        "annotations": STRINGS,
    }
)
KINDS = {
    kind: Fields(
        {"apiVersion": OneOf(("ray.io/v1",)), "kind": str, "metadata": METADATA, "spec": spec},
        required=("apiVersion", "kind", "metadata", "spec"),
    )
    for kind, spec in {"RayJob": JOB, "RayCluster": CLUSTER, "RayCronJob": CRON_JOB}.items()
}


def problems(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with a manifest, of KubeRay's kinds or of Kubernetes' own."""
    if manifest.get("kind") in KINDS:
        return list(_problems(manifest, KINDS[manifest["kind"]], manifest["kind"]))
    return list(_core(manifest, str(manifest.get("kind"))))


def _problems(value: Any, rule: Any, where: str) -> Iterator[str]:
    if isinstance(rule, Fields):
        yield from _object(value, rule, where)
    elif isinstance(rule, Each):
        if not isinstance(value, list):
            yield f"{where} must be a list, not {value!r}"
            return
        for number, inner in enumerate(value):
            yield from _problems(inner, rule.of, f"{where}[{number}]")
    elif isinstance(rule, Core):
        yield from _core(_wrapped(value, rule.kind), where)
    else:
        yield from _plain(value, rule, where)


def _object(value: Any, rule: Fields, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} must be an object, not {value!r}"
        return
    yield from (f"{where}.{name} is missing" for name in rule.required if name not in value)
    for name, inner in value.items():
        if name in rule.allowed:
            yield from _problems(inner, rule.allowed[name], f"{where}.{name}")
        else:
            yield f"{where}.{name} is unknown"


def _plain(value: Any, rule: Any, where: str) -> Iterator[str]:
    if isinstance(rule, OneOf):
        if value not in rule.texts:
            yield f"{where} must be one of {', '.join(rule.texts)}, not {value!r}"
    elif rule == STRINGS:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            yield f"{where} must be an object of texts: quote numbers"
    elif rule is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{where} must be a number, not {value!r}"
    elif not isinstance(value, rule) or (rule is int and isinstance(value, bool)):
        yield f"{where} must be of type {rule.__name__}, not {value!r}"


def _wrapped(value: Any, kind: str) -> dict[str, Any]:
    """Return a whole Kubernetes object that holds a part of one."""
    about = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
    if kind == "PodTemplate":
        return {**about, "template": value}
    container = {"name": "x", "image": "x", kind: value}
    return {**about, "template": {"spec": {"containers": [container]}}}


def _core(manifest: dict[str, Any], where: str) -> Iterator[str]:
    yield from (f"{where}: {one}" for one in _core_problems(json.dumps(manifest)))


@lru_cache(maxsize=256)
def _core_problems(manifest: str) -> list[str]:
    """The schema is read anew each time, and most manifests differ in one place."""
    try:
        kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.message} (at {'.'.join(str(part) for part in error.path)})"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [str(error)]
    return []
