"""What must hold for a RayJob of ours beyond what KubeRay's types say: each rule names what it misses."""

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ray.scripts.scripts import start as ray_start

from jobs.__main__ import VERBS
from jobs.config import ConfigError
from jobs.flags import from_namespace, parser_for
from tests.infra.kuberay import problems

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
# What envsubst puts in.
VALUES = {
    "BUCKET": "my-bucket",
    "REGISTRY": "registry.example/team",
    "ACCOUNT": "123456789012",
    "REGION": "eu-central-1",
    "AMI": "ami-0123456789abcdef0",
    "SUBNET": "subnet-0123456789abcdef0",
    "GROUP": "sg-0123456789abcdef0",
}
# Ray's own default for its object store, of a node's memory.
STORE_SHARE = 0.3
# KubeRay makes flags of `rayStartParams`.
START_FLAGS = {flag.removeprefix("--") for one in ray_start.params for flag in one.opts}
GI = 2**30


def filled(text: str) -> str:
    """Put values in, as envsubst does with the names that it is given."""
    for name, value in VALUES.items():
        text = text.replace("${" + name + "}", value)
    return text


def load(text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(filled(text)) if one is not None]


def versions() -> tuple[str, str]:
    """Return the version of this package, and that of Ray in the lock file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(
        r"^ray(?:\[.*?\])?==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE
    )
    assert found is not None
    return project["version"], found[1]


def job_problems(job: dict[str, Any]) -> list[str]:
    """Return what is wrong with a RayJob."""
    found = problems(job)
    # What is not even of the right type cannot be looked at further.
    return found or list(_own_problems(job["spec"]))


def _own_problems(spec: dict[str, Any]) -> Iterator[str]:
    yield from entrypoint_problems(spec["entrypoint"])
    yield from _life(spec)
    cluster = spec["rayClusterSpec"]
    if cluster.get("rayVersion") != versions()[1]:
        yield f"rayVersion is {cluster.get('rayVersion')}, and the lock has Ray {versions()[1]}"
    if cluster.get("enableInTreeAutoscaling") is not True:
        yield "no autoscaling: spot nodes would be there all the time"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token: whoever reaches the head may run any code"
    yield from _head(cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        yield from _workers(group)
    yield from _sizes(spec["entrypoint"], cluster["workerGroupSpecs"])


def entrypoint_problems(command: str) -> Iterator[str]:
    """Parse a command line as the program itself does."""
    name, verb, *flags = shlex.split(command)
    if name != "segjobs" or verb not in VERBS:
        yield f"entrypoint: {name} {verb} is no verb"
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            from_namespace(VERBS[verb], parser_for(VERBS[verb]).parse_args(flags))
    except ConfigError as error:
        yield f"entrypoint: {error}"
    except SystemExit:
        yield f"entrypoint: {said.getvalue().strip().rpartition('error: ')[2]}"


def _life(spec: dict[str, Any]) -> Iterator[str]:
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes is missing: the cluster would stay"
    for name in (
        "backoffLimit",
        "activeDeadlineSeconds",
        "preRunningDeadlineSeconds",
        "ttlSecondsAfterFinished",
    ):
        if not spec.get(name):
            yield f"{name} is missing"


def _head(group: dict[str, Any]) -> Iterator[str]:
    if group["rayStartParams"].get("num-cpus") != "0":
        yield "the head does work: num-cpus must be 0"
    if group["template"]["spec"].get("automountServiceAccountToken") is not True:
        yield "the head's autoscaler has no token: its account mounts none by itself"
    (container,) = group["template"]["spec"]["containers"]
    if {"name": "SEGJOBS_LOG_FORMAT", "value": "json"} not in container.get("env", []):
        yield "the head's log is for people: SEGJOBS_LOG_FORMAT is not json"
    yield from _pod("head", group, "on-demand")


def _workers(group: dict[str, Any]) -> Iterator[str]:
    name = group["groupName"]
    if group["minReplicas"] != 0:
        yield f"{name}: minReplicas must be 0, or nodes are there for nothing"
    yield from _pod(name, group, "spot")
    spec = group["template"]["spec"]
    tolerated = {one["key"] for one in spec.get("tolerations", [])}
    needed = {"spot"}
    if "nvidia.com/gpu" in spec["containers"][0]["resources"]["limits"]:
        needed.add("nvidia.com/gpu")
    for key in sorted(needed - tolerated):
        yield f"{name}: the taint {key} is not tolerated"


def _pod(name: str, group: dict[str, Any], capacity: str) -> Iterator[str]:
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    tag = container["image"].rpartition(":")[2]
    if tag != versions()[0]:
        yield f"{name}: the image is of {tag}, and this is {versions()[0]}"
    if spec.get("serviceAccountName") != "segjobs":
        yield f"{name}: no service account, so no way to the store without keys"
    if spec.get("nodeSelector", {}).get("karpenter.sh/capacity-type") != capacity:
        yield f"{name}: must be on {capacity} nodes"
    if not spec.get("securityContext", {}).get("runAsNonRoot"):
        yield f"{name}: may run as root"
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


def _sizes(command: str, groups: list[dict[str, Any]]) -> Iterator[str]:
    most = sum(group["maxReplicas"] for group in groups)
    found = re.search(r"--max-actors (\d+)|--workers \d+\.\.(\d+)", command)
    asked = int(found[1] or found[2]) if found else None
    if asked != most:
        yield f"the command asks for {asked} GPUs at most, and the cluster has {most}"
    if not re.search(r"--gpus-per-actor 1\b|--device gpu\b", command):
        yield "the command does not ask for GPUs: where there are none yet, it would take CPUs"


def gibibytes(quantity: str) -> float:
    found = re.fullmatch(r"(\d+)Gi", quantity)
    assert found is not None, quantity
    return float(found[1])
