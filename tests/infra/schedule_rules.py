"""What must hold for the parts of label.yaml: each rule names what would keep a night from starting, or let two overlap."""

import re
import zoneinfo
from collections.abc import Iterator
from typing import Any

import yaml

from tests.infra.rules import KUBERNETES, load

TEXT = (KUBERNETES / "label.yaml").read_text()
# Kubernetes puts them on the pods of a Job.
LABELS = {
    "NAME": "metadata.labels['batch.kubernetes.io/job-name']",
    "OWNER": "metadata.labels['batch.kubernetes.io/controller-uid']",
}

Parts = dict[str, dict[str, Any]]


def parts(text: str = TEXT) -> Parts:
    return {one["kind"]: one for one in load(text)}


def ray_job(text: str = TEXT) -> dict[str, Any]:
    return yaml.safe_load(parts(text)["ConfigMap"]["data"]["rayjob.yaml"])  # type: ignore[no-any-return]


def schedule_problems(text: str) -> list[str]:
    """Return what is wrong with what starts the RayJob; `job_problems` is about the RayJob itself."""
    about = parts(text)
    return [
        *_time_problems(about, ray_job(text)["spec"]),
        *_account_problems(about),
        *_role_problems(about),
        *_pod_problems(about),
        *_variable_problems(about),
        *_owner_problems(ray_job(text)["metadata"]),
    ]


def _pod(about: Parts) -> dict[str, Any]:
    return about["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def _time_problems(about: Parts, work: dict[str, Any]) -> Iterator[str]:
    cron = about["CronJob"]["spec"]
    if cron.get("concurrencyPolicy") != "Forbid":
        yield "nights may overlap"
    # Each attempt has the whole of it.
    attempts = (work["backoffLimit"] + 1) * work["activeDeadlineSeconds"]
    if cron["jobTemplate"]["spec"]["activeDeadlineSeconds"] <= attempts:
        yield "the wait ends before the job may"
    if cron["timeZone"] not in zoneinfo.available_timezones():
        yield f"there is no time zone {cron['timeZone']}"
    if not re.fullmatch(r"[\d*/,-]+( [\d*/,-]+){4}", cron["schedule"]):
        yield "its schedule is no five fields"


def _account_problems(about: Parts) -> Iterator[str]:
    account, binding = about["ServiceAccount"]["metadata"]["name"], about["RoleBinding"]
    if _pod(about)["serviceAccountName"] != account:
        yield "its account is not there"
    if binding["subjects"] != [{"kind": "ServiceAccount", "name": account}]:
        yield "the binding is of another account"
    if binding["roleRef"] != {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": about["Role"]["metadata"]["name"],
    }:
        yield "the binding is of another role"


def _role_problems(about: Parts) -> Iterator[str]:
    allowed = {
        (group, resource, verb)
        for rule in about["Role"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    used = set(re.findall(r"kubectl (\w+)", about["ConfigMap"]["data"]["start-and-wait.sh"]))
    needed = {("ray.io", "rayjobs", verb) for verb in used}
    yield from (f"its role does not let it {verb} RayJobs" for *_, verb in needed - allowed)
    if allowed - needed:
        yield "its role lets it do more than it does"


def _pod_problems(about: Parts) -> Iterator[str]:
    pod = _pod(about)
    (container,) = pod["containers"]
    if pod["restartPolicy"] != "Never":
        yield "a Job's pod never restarts by itself: a new one looks for its RayJob"
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "it may run as root"
    if not re.fullmatch(r"alpine/k8s:1\.\d+\.\d+", container["image"]):
        yield f"{container['image']} has no kubectl of a known version"
    yield from _file_problems(about, pod, container)


def _file_problems(about: Parts, pod: dict[str, Any], container: dict[str, Any]) -> Iterator[str]:
    script = about["ConfigMap"]["metadata"]["name"]
    volumes = {one["name"]: one["configMap"]["name"] for one in pod["volumes"]}
    there = set()
    for mount in container["volumeMounts"]:
        if mount["name"] not in volumes:
            yield f"there is no volume {mount['name']}"
        elif volumes[mount["name"]] != script:
            yield "its script is not there"
        else:
            there |= {f"{mount['mountPath']}/{name}" for name in about["ConfigMap"]["data"]}
    named = re.findall(
        r"(?<![\w/])/(?!dev/)[a-z]+/[\w.-]+", about["ConfigMap"]["data"]["start-and-wait.sh"]
    )
    for path in (container["command"][1], *named):
        if path not in there:
            yield f"there is no {path}"


def _variable_problems(about: Parts) -> Iterator[str]:
    (container,) = _pod(about)["containers"]
    told = {
        one["name"]: one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        for one in container["env"]
    }
    yield from (f"{name} is not the Job's" for name in LABELS if told.get(name) != LABELS[name])
    used = set(re.findall(r"\$([A-Z]+)\b", about["ConfigMap"]["data"]["start-and-wait.sh"]))
    yield from (f"nobody sets {name}" for name in sorted(used - told.keys()))


def _owner_problems(metadata: dict[str, Any]) -> Iterator[str]:
    # The script puts in both.
    if metadata.get("name") != "JOB_NAME":
        yield "the RayJob is not called as its Job"
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "JOB_NAME", "uid": "JOB_UID"}
    if metadata.get("ownerReferences") != [owner]:
        yield "the RayJob does not go with its Job"
