"""The manifests of infra/kubernetes: valid, and each error that is planted in them is named."""

import re

import pytest

from tests.infra.kuberay import problems
from tests.infra.rules import KUBERNETES, job_problems, load

JOBS = ["predict.yaml", "train.yaml"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_valid(name: str) -> None:
    (job,) = load((KUBERNETES / name).read_text())
    assert job_problems(job) == []


def test_nothing_is_left_to_fill_in() -> None:
    for path in KUBERNETES.rglob("*.yaml"):
        assert not re.search(r"\$\{\w+\}", str(load(path.read_text()))), path


def test_every_manifest_is_of_known_kinds() -> None:
    for path in KUBERNETES.rglob("*.yaml"):
        for one in load(path.read_text()):
            assert problems(one) == [], path


def test_jobs_run_on_the_same_cluster() -> None:
    """What is tuned in one is tuned in all: they differ in what is run and for how long."""
    specs = [load((KUBERNETES / name).read_text())[0]["spec"]["rayClusterSpec"] for name in JOBS]
    assert all(spec == specs[0] for spec in specs)


# What is replaced in which file, and words of what is said about it.
PLANTED = [
    # Fields and types.
    ("backoffLimit: 3", "backofLimit: 3", "RayJob.spec.backofLimit is unknown"),
    ("backoffLimit: 3", 'backoffLimit: "3"', "RayJob.spec.backoffLimit must be of type int"),
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: 1", "must be of type bool"),
    ('num-cpus: "0"', "num-cpus: 0", "must be an object of texts: quote numbers"),
    ("maxReplicas: 8", "maxReplica: 8", "maxReplicas is missing"),
    ("- groupName: gpu", "- name: gpu", "groupName is missing"),
    ("mode: token", "mode: tokens", "must be one of disabled, token"),
    ("kind: RayJob", "kind: RayJobs", "RayJobs"),
    ("ray.io/v1", "ray.io/v2", "apiVersion must be one of ray.io/v1"),
    # Parts that are Kubernetes' own.
    ("tolerations:", "toleration:", "'toleration' was unexpected"),
    ("effect: NoSchedule", "effect: [NoSchedule]", "is not of type"),
    ("volumeMounts:", "volumesMounts:", "'volumesMounts' was unexpected"),
    ("runAsUser: 1000", 'runAsUser: "1000"', "is not of type"),
    # The command line.
    ("--output s3", "--outptu s3", "did you mean --output?"),
    ("--model s3", "--modle s3", "did you mean --model?"),
    # Versions.
    ('rayVersion: "2.60.0"', 'rayVersion: "2.9.0"', "rayVersion is 2.9.0, and the lock has Ray 2."),
    ("segjobs:0.1.0", "segjobs:0.0.9", "the image is of 0.0.9, and this is 0.1.0"),
    # Where and how it runs.
    ("{key: nvidia.com/gpu,", "{key: nvidia.com/gpus,", "gpu: the taint nvidia.com/gpu is not tolerated"),
    ("{key: spot,", "{key: spots,", "gpu: the taint spot is not tolerated"),
    ("capacity-type: on-demand", "capacity-type: spot", "head: must be on on-demand nodes"),
    ("capacity-type: spot", "capacity-type: on-demand", "gpu: must be on spot nodes"),
    ('num-cpus: "0"', 'num-cpus: "4"', "the head does work"),
    ("automountServiceAccountToken: true", "automountServiceAccountToken: false", "autoscaler has no token"),
    ("{name: SEGJOBS_LOG_FORMAT, value: json}", "{name: SEGJOBS_LOG_FROMAT, value: json}", "the head's log is for people"),
    ("num-cpus: ", "num-cpu: ", "head: ray start has no --num-cpu"),
    ("serviceAccountName: segjobs", "serviceAccountName: default", "no service account"),
    ("runAsNonRoot: true", "runAsNonRoot: false", "may run as root"),
    ("sizeLimit: 16Gi", "sizeLimit: 1Gi", "gpu: /dev/shm has no room for an object store of 14.4 GiB"),
    ("{medium: Memory, ", "{", "head: /dev/shm has no room"),
    ("mountPath: /spill", "mountPath: /split", "objects are not spilled"),
    ("- {name: spill, mountPath", "- {name: spills, mountPath", "there is no volume spills"),
    ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "no autoscaling"),
    ("authOptions: {mode: token}", "authOptions: {mode: disabled}", "no token"),
    ("minReplicas: 0", "minReplicas: 2", "minReplicas must be 0"),
    ("maxReplicas: 8", "maxReplicas: 4", "asks for 8 GPUs at most, and the cluster has 4"),
    # How it ends.
    ("activeDeadlineSeconds:", "#activeDeadlineSeconds:", "activeDeadlineSeconds is missing"),
    ("preRunningDeadlineSeconds:", "#preRunningDeadlineSeconds:", "preRunningDeadlineSeconds is missing"),
    ("backoffLimit: 3", "backoffLimit: 0", "backoffLimit is missing"),
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "the cluster would stay"),
]  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(("right", "wrong", "words"), PLANTED)
def test_a_planted_error_is_named(name: str, right: str, wrong: str, words: str) -> None:
    text = (KUBERNETES / name).read_text()
    assert right in text
    (job,) = load(text.replace(right, wrong))
    assert words in "; ".join(job_problems(job))


def test_a_command_without_gpus_is_named() -> None:
    text = (KUBERNETES / "predict.yaml").read_text()
    (job,) = load(text.replace("--gpus-per-actor 1 ", ""))
    assert "does not ask for GPUs" in "; ".join(job_problems(job))


def test_a_service_account_is_checked_by_kubernetes_own_types() -> None:
    (account,) = load((KUBERNETES / "access.yaml").read_text())
    account["automountServiceAccountTokens"] = account.pop("automountServiceAccountToken")
    assert "'automountServiceAccountTokens' was unexpected" in "; ".join(problems(account))
