"""What must hold for the pods of a Ray cluster of ours: each rule names what it misses."""

import re
from collections.abc import Iterator
from typing import Any

from ray.scripts.scripts import start as ray_start

from tests.infra.rules import ROOT, VALUES, versions

# Ray's own default for its object store, of a node's memory.
STORE_SHARE = 0.3
# KubeRay makes flags of `rayStartParams`.
START_FLAGS = {flag.removeprefix("--") for one in ray_start.params for flag in one.opts}
# The image's.
USER = int(
    re.findall(r"^USER (\d+)$", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE)[-1]
)


def head_problems(group: dict[str, Any]) -> Iterator[str]:
    if group["rayStartParams"].get("num-cpus") != "0":
        yield "the head does work: num-cpus must be 0"
    if group["template"]["spec"].get("automountServiceAccountToken") is not True:
        yield "the head's autoscaler has no token: its account mounts none by itself"
    (container,) = group["template"]["spec"]["containers"]
    if {"name": "SEGJOBS_LOG_FORMAT", "value": "json"} not in container.get("env", []):
        yield "the head's log is for people: SEGJOBS_LOG_FORMAT is not json"
    yield from _pod("head", group, "on-demand")


def worker_problems(group: dict[str, Any]) -> Iterator[str]:
    name = group["groupName"]
    if group["minReplicas"] != 0:
        yield f"{name}: minReplicas must be 0, or nodes are there for nothing"
    yield from _pod(name, group, "spot")
    spec = group["template"]["spec"]
    if not gpus(group):
        yield f"{name}: it has no GPU"
    for key in ("nvidia.com/gpu", "spot"):
        if {"key": key, "operator": "Exists", "effect": "NoSchedule"} not in spec["tolerations"]:
            yield f"{name}: the taint {key} is not tolerated"


def _pod(name: str, group: dict[str, Any], capacity: str) -> Iterator[str]:
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    repository, _, tag = container["image"].rpartition(":")
    if tag != versions()[0]:
        yield f"{name}: the image is of {tag}, and this is {versions()[0]}"
    if repository != f"{VALUES['REGISTRY']}/segjobs":
        yield f"{name}: {repository} is not the image of infra/Dockerfile"
    if spec.get("serviceAccountName") != "segjobs":
        yield f"{name}: no service account, so no way to the store without keys"
    if spec.get("nodeSelector", {}).get("karpenter.sh/capacity-type") != capacity:
        yield f"{name}: must be on {capacity} nodes"
    yield from _user(name, spec.get("securityContext", {}))
    yield from _resources(name, container["resources"])
    for flag in sorted(group["rayStartParams"].keys() - START_FLAGS):
        yield f"{name}: ray start has no --{flag}"
    yield from _volumes(name, group, spec, container)


def _volumes(
    name: str, group: dict[str, Any], spec: dict[str, Any], container: dict[str, Any]
) -> Iterator[str]:
    volumes = {one["name"]: one.get("emptyDir", {}) for one in spec.get("volumes", [])}
    mounts = {one["mountPath"]: one["name"] for one in container.get("volumeMounts", [])}
    yield from (
        f"{name}: there is no volume {one}" for one in mounts.values() if one not in volumes
    )
    shared = volumes.get(mounts.get("/dev/shm", ""), {})
    store = STORE_SHARE * gibibytes(container["resources"]["limits"]["memory"])
    if shared.get("medium") != "Memory" or gibibytes(shared.get("sizeLimit", "0Gi")) < store:
        yield f"{name}: /dev/shm has no room for an object store of {store:.1f} GiB"
    spill = group["rayStartParams"].get("object-spilling-directory")
    if spill is None or "sizeLimit" not in volumes.get(mounts.get(spill, ""), {}):
        yield f"{name}: objects are not spilled to a volume that is bounded"


def _user(name: str, context: dict[str, Any]) -> Iterator[str]:
    if not context.get("runAsNonRoot"):
        yield f"{name}: may run as root"
    if context.get("runAsUser") != USER:
        yield f"{name}: runs as {context.get('runAsUser')}, and the image's user is {USER}"
    if context.get("fsGroup") != USER:
        yield f"{name}: no fsGroup, so the volume that it spills to may not be its own"


def _resources(name: str, resources: dict[str, Any]) -> Iterator[str]:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    yield from (f"{name}: no limit of {one}" for one in ("cpu", "memory") if one not in limits)
    # KubeRay tells Ray the limits; a node that has less would be over-committed.
    for one, amount in limits.items():
        if requests.get(one) != amount:
            yield f"{name}: requests {requests.get(one)} of {one}, and its limit is {amount}"
    if "ephemeral-storage" not in requests:
        yield f"{name}: requests no disk, and spills to it"


def gpus(group: dict[str, Any]) -> int:
    """Return the GPUs of each pod of a group."""
    (container,) = group["template"]["spec"]["containers"]
    return int(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0))


def gibibytes(quantity: str) -> float:
    found = re.fullmatch(r"(\d+)Gi", quantity)
    assert found is not None, quantity
    return float(found[1])
