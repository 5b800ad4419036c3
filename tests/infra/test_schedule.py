"""What labels every night: a CronJob that starts a RayJob, the same as RayCronJob, and plain cron."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.kuberay import problems
from tests.infra.rules import KUBERNETES, job_problems, load

TEXT = (KUBERNETES / "label.yaml").read_text()


def parts(text: str = TEXT) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in load(text)}


def ray_job(text: str = TEXT) -> dict[str, Any]:
    return yaml.safe_load(parts(text)["ConfigMap"]["data"]["rayjob.yaml"])  # type: ignore[no-any-return]


def test_the_job_that_is_started_is_valid() -> None:
    assert job_problems(ray_job()) == []


def test_the_alpha_resource_starts_the_same_job() -> None:
    (cron,) = load((KUBERNETES / "label-raycronjob.yaml").read_text())
    assert problems(cron) == []
    assert cron["spec"]["jobTemplate"] == ray_job()["spec"]
    assert cron["spec"]["schedule"] == parts()["CronJob"]["spec"]["schedule"]


def test_it_runs_on_the_cluster_of_the_other_jobs() -> None:
    (train,) = load((KUBERNETES / "train.yaml").read_text())
    assert ray_job()["spec"]["rayClusterSpec"] == train["spec"]["rayClusterSpec"]


def test_a_gate_keeps_what_drifted_away_and_does_not_fail_the_job() -> None:
    """A RayJob that fails is run again on new clusters, and so is the Job that waits for it."""
    words = shlex.split(ray_job()["spec"]["entrypoint"])
    assert 0 < float(words[words.index("--max-drift") + 1]) < 1
    assert words[words.index("--held-exit-code") + 1] == "0"


def schedule_problems(text: str) -> list[str]:
    """Return what would let two nights overlap, or a night's start fail."""
    about = parts(text)
    cron = about["CronJob"]["spec"]
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    work = ray_job(text)["spec"]
    rules = {
        "nights may overlap": cron.get("concurrencyPolicy") == "Forbid",
        "the wait ends before the job may": cron["jobTemplate"]["spec"]["activeDeadlineSeconds"]
        > work["activeDeadlineSeconds"],
        "its account has no role": pod["serviceAccountName"]
        == about["RoleBinding"]["subjects"][0]["name"],
        "the binding is of another role": about["RoleBinding"]["roleRef"]["name"]
        == about["Role"]["metadata"]["name"],
        "its script is not there": pod["volumes"][0]["configMap"]["name"]
        == about["ConfigMap"]["metadata"]["name"],
    }
    return [words for words, holds in rules.items() if not holds] + list(_role_problems(about))


def _role_problems(about: dict[str, dict[str, Any]]) -> Iterator[str]:
    rules = about["Role"]["rules"]
    allowed = {(r, v) for rule in rules for r in rule["resources"] for v in rule["verbs"]}
    used = set(re.findall(r"kubectl (\w+)", about["ConfigMap"]["data"]["start-and-wait.sh"]))
    yield from (
        f"its role does not let it {v} RayJobs" for v in used if ("rayjobs", v) not in allowed
    )
    if len(allowed) > len(used):
        yield "its role lets it do more than it does"


def test_nights_do_not_overlap_and_may_start() -> None:
    assert schedule_problems(TEXT) == []


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("concurrencyPolicy: Forbid", "concurrencyPolicy: Allow", "nights may overlap"),
        ("activeDeadlineSeconds: 79200", "activeDeadlineSeconds: 7200", "the wait ends before"),
        ("serviceAccountName: segjobs-scheduler", "serviceAccountName: default", "no role"),
        ("name: segjobs-scheduler}\nsubjects", "name: other}\nsubjects", "of another role"),
        ("verbs: [create, get]", "verbs: [create]", "does not let it get RayJobs"),
        ("verbs: [create, get]", "verbs: [create, get, delete]", "more than it does"),
        ("configMap: {name: segjobs-label}", "configMap: {name: other}", "its script is not there"),
    ],
)
def test_a_planted_error_is_named(right: str, wrong: str, words: str) -> None:
    assert right in TEXT
    assert words in "; ".join(schedule_problems(TEXT.replace(right, wrong)))


def test_a_planted_error_in_the_job_is_named() -> None:
    for right, wrong, words in (
        ("--policy s3", "--polcy s3", "did you mean --policy?"),
        ("segjobs label", "segjobs lable", "segjobs lable is no verb"),
        ("mode: token", "mode: none", "must be one of disabled, token"),
    ):
        assert right in TEXT
        assert words in "; ".join(job_problems(ray_job(TEXT.replace(right, wrong))))


# `kubectl` as far as the script uses it: a folder of jobs, whose states come one after the other.
KUBECTL = """#!/bin/sh
echo "$*" >> "$STATE/calls"
case "$1 $2" in
  "get rayjob")
    [ -e "$STATE/$3" ] || exit 1
    case "$*" in *jobDeploymentStatus*) head -n 1 "$STATE/states"; sed -i 1d "$STATE/states" ;; *reason*) echo "AppFailed: x" ;; esac ;;
  "create -f")
    cat > "$STATE/created"; touch "$STATE/segjobs-label-1" ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "there", "code"),
    [
        (["", "Initializing", "Running", "Complete"], False, 0),
        (["Running", "Failed"], False, 1),
        (["Running", "Complete"], True, 0),
    ],
)
def test_the_script_starts_once_and_ends_as_the_job_does(
    states: list[str], there: bool, code: int, tmp_path: Path
) -> None:
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    if there:
        # Of a pod that was lost.
        (tmp_path / "segjobs-label-1").touch()
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    data = parts()["ConfigMap"]["data"]
    for name, text in data.items():
        (tmp_path / name).write_text(text.replace("/label/", f"{tmp_path}/"))
    done = subprocess.run(
        ["sh", str(tmp_path / "start-and-wait.sh")],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STATE": str(tmp_path),
            "NAME": "segjobs-label-1",
            "OWNER": "1234",
            "PAUSE": "0",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert ("AppFailed: x" in done.stdout) == bool(code)
    assert (tmp_path / "created").exists() != there
    if not there:
        made = yaml.safe_load((tmp_path / "created").read_text())
        assert job_problems(made) == []
        assert made["metadata"]["name"] == "segjobs-label-1"
        assert made["metadata"]["ownerReferences"][0]["uid"] == "1234"
