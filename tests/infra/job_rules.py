"""What must hold for a RayJob of ours beyond what KubeRay's types say: each rule names what it misses."""

import re
from collections.abc import Iterator
from typing import Any

from tests.infra.kuberay import problems
from tests.infra.pod_rules import gpus, head_problems, worker_problems
from tests.infra.rules import entrypoint_problems, versions

# Fields that KubeRay has and no job of ours may set.
NEVER = {
    "suspend": "it would not start",
    "submissionMode": "the runbook counts on a Job that submits it, and nobody is there to do so",
    "runtimeEnvYAML": "the image has what is locked, and nothing else is installed",
    "clusterSelector": "it has a cluster of its own",
    "deletionStrategy": "shutdownAfterJobFinishes is the one way in which the cluster goes",
}


def job_problems(job: dict[str, Any]) -> list[str]:
    """Return what is wrong with a RayJob."""
    found = problems(job)
    # What is not even of the right type cannot be looked at further.
    return found or list(_own_problems(job["spec"]))


def created_problems(job: dict[str, Any]) -> list[str]:
    """Return what is wrong with a RayJob that people create, again and again."""
    named = (
        [] if "generateName" in job["metadata"] else ["no generateName: a second one is refused"]
    )
    return [*named, *job_problems(job)]


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
    yield from head_problems(cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        yield from worker_problems(group)
    yield from _sizes(spec["entrypoint"], cluster["workerGroupSpecs"])


def _life(spec: dict[str, Any]) -> Iterator[str]:
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes is missing: the cluster would stay"
    for name in (
        "backoffLimit",
        "activeDeadlineSeconds",
        "preRunningDeadlineSeconds",
        "ttlSecondsAfterFinished",
    ):
        if spec.get(name, 0) <= 0:
            yield f"{name} is missing"
    yield from (f"{name}: {why}" for name, why in NEVER.items() if name in spec)


def _sizes(command: str, groups: list[dict[str, Any]]) -> Iterator[str]:
    most = sum(group["maxReplicas"] * gpus(group) for group in groups)
    found = re.search(r"--max-actors (\d+)|--workers \d+\.\.(\d+)", command)
    asked = int(found[1] or found[2]) if found else None
    if asked != most:
        yield f"the command asks for {asked} GPUs at most, and the cluster has {most}"
    if not re.search(r"--gpus-per-actor 1\b|--device gpu\b", command):
        yield "the command does not ask for GPUs: where there are none yet, it would take CPUs"
