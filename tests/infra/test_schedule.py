"""What labels every night: a CronJob that starts a RayJob, the same as RayCronJob, and plain cron."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.infra.job_rules import job_problems
from tests.infra.kuberay import problems
from tests.infra.rules import KUBERNETES, load
from tests.infra.schedule_rules import TEXT, parts, ray_job, schedule_problems


def test_the_job_that_is_started_is_valid() -> None:
    assert job_problems(ray_job()) == []


def test_the_alpha_resource_starts_the_same_job() -> None:
    text = (KUBERNETES / "label-raycronjob.yaml").read_text()
    (cron,) = load(text)
    assert problems(cron) == []
    # Which has `timeZone`.
    assert "KubeRay 1.7 or newer" in " ".join(text.replace("#", "").split())
    assert cron["spec"]["timeZone"] == parts()["CronJob"]["spec"]["timeZone"]
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


def test_nights_do_not_overlap_and_may_start() -> None:
    assert schedule_problems(TEXT) == []


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("concurrencyPolicy: Forbid", "concurrencyPolicy: Allow", "nights may overlap"),
        ("activeDeadlineSeconds: 79200", "activeDeadlineSeconds: 7200", "the wait ends before"),
        ("backoffLimit: 1", "backoffLimit: 2", "the wait ends before"),
        ("serviceAccountName: segjobs-scheduler", "serviceAccountName: default", "account is not there"),
        ("name: segjobs-scheduler}\nsubjects", "name: other}\nsubjects", "of another role"),
        ("verbs: [create, get]", "verbs: [create]", "does not let it get RayJobs"),
        ("verbs: [create, get]", "verbs: [create, get, delete]", "more than it does"),
        ("configMap: {name: segjobs-label}", "configMap: {name: other}", "its script is not there"),
        # Who may do what.
        ("apiGroups: [ray.io]", "apiGroups: [rays.io]", "does not let it get RayJobs"),
        ("{kind: ServiceAccount, name", "{kind: User, name", "the binding is of another account"),
        ("kind: Role, name", "kind: ClusterRole, name", "the binding is of another role"),
        ("metadata:\n  name: segjobs-scheduler\n---\n# RayJobs", "metadata:\n  name: scheduler\n---\n# RayJobs", "its account is not there; the binding is of another account"),
        ("  - {kind: ServiceAccount, name: segjobs-scheduler}", "  - {kind: ServiceAccount, name: other}", "the binding is of another account"),
        # When.
        ("timeZone: Etc/UTC", "timeZone: Etc/UTC9", "there is no time zone Etc/UTC9"),
        ('schedule: "0 2 * * *"', 'schedule: "0 2 * *"', "its schedule is no five fields"),
        # What runs.
        ("restartPolicy: Never", "restartPolicy: Always", "a Job's pod never restarts by itself"),
        ("runAsNonRoot: true, runAsUser: 1000}\n          containers:\n            - name: start", "runAsNonRoot: false, runAsUser: 0}\n          containers:\n            - name: start", "may run as root"),
        ("alpine/k8s:1.33.4", "alpine:latest", "has no kubectl of a known version"),
        ("[sh, /label/start-and-wait.sh]", "[sh, /lable/start-and-wait.sh]", "there is no /lable/start-and-wait.sh"),
        ("[sh, /label/start-and-wait.sh]", "[sh, /label/start.sh]", "there is no /label/start.sh"),
        ("/label/rayjob.yaml", "/lable/rayjob.yaml", "there is no /lable/rayjob.yaml"),
        ("{name: label, mountPath: /label,", "{name: lable, mountPath: /label,", "there is no volume lable"),
        ("mountPath: /label,", "mountPath: /labels,", "there is no /label/start-and-wait.sh"),
        # What it is told, and makes of that.
        ("labels['batch.kubernetes.io/job-name']", "labels['batch.kubernetes.io/jobname']", "NAME is not the Job's"),
        ("labels['batch.kubernetes.io/controller-uid']", "labels['batch.kubernetes.io/job-name']", "OWNER is not the Job's"),
        ("- name: OWNER", "- name: OWNR", "OWNER is not the Job's"),
        ('create -f -', 'create -f - "$OTHER"', "nobody sets OTHER"),
        ("kind: Job, name: JOB_NAME", "kind: CronJob, name: JOB_NAME", "the RayJob does not go with its Job"),
        ('uid: "JOB_UID"', 'uid: "JOB_ID"', "the RayJob does not go with its Job"),
        ("      name: JOB_NAME", "      name: JOBNAME", "the RayJob is not called as its Job"),
    ],
)  # fmt: skip
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
        (
            [" ", "Initializing ", "Running PENDING", "Running RUNNING", "Complete SUCCEEDED"],
            False,
            0,
        ),
        (["Running RUNNING", "Retrying ", "Failed FAILED"], False, 1),
        (["Running RUNNING", "Complete SUCCEEDED"], True, 0),
        (["Running RUNNING", "Complete STOPPED"], False, 1),
        (["ValidationFailed "], False, 1),
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
