"""The cluster launcher's file: by Ray's own schema, and by what must hold besides."""

from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.ray_up_rules import cluster_problems
from tests.infra.rules import ROOT, filled

FILE = ROOT / "infra" / "ray-up-aws.yaml"


def load(text: str) -> dict[str, Any]:
    return yaml.safe_load(filled(text))  # type: ignore[no-any-return]


def test_the_cluster_is_valid() -> None:
    config = load(FILE.read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert list(cluster_problems(config)) == []
    assert prepared["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"]


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("max_workers: 24", "max_worker: 24", "max_worker"),
        ("max_workers: 24", "max_workers: many", "many"),
        ("head_node_type: head", "head_node_type: heads", "head"),
        ("type: aws", "typo: aws", "type"),
        ("min_workers: 0", "min_wrokers: 0", "min_wrokers"),
    ],
)
def test_what_ray_does_not_know_is_refused(right: str, wrong: str, words: str) -> None:
    text = FILE.read_text()
    assert right in text
    with pytest.raises(Exception, match=words):
        validate_config(prepare_config(load(text.replace(right, wrong))))


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("segjobs:0.1.0", "segjobs:0.0.9", "the image is of 0.0.9"),
        ("{CPU: 0}", "{CPU: 8}", "the head does work"),
        ("{MarketType: spot}", "{MarketType: capacity-block}", "gpu is not on spot"),
        ("max_workers: 8", "max_workers: 9", "max_workers is not"),
        ("HttpTokens: required", "HttpTokens: optional", "gives its role"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "no token"),
        # What EC2 is asked for.
        ("IamInstanceProfile: {Arn", "SomeProfile: {Arn", 'Unknown parameter in input: "SomeProfile"'),
        ("ImageId:", "ImageID:", 'Unknown parameter in input: "ImageID"'),
        ("SubnetIds:", "SubnetId:", "head has no SubnetIds"),
        ('SecurityGroupIds: ["${GROUP}"]', "SecurityGroupIds: []", "head has no SecurityGroupIds"),
        ("KeyName: segjobs", "KeyName: [segjobs]", "Invalid type for parameter KeyName"),
        ("profile/segjobs-worker", "profile/segjobs-head", "gpu has the role segjobs-head, and not segjobs-worker"),
        ("profile/segjobs-head", "profile/segjobs-worker", "head has the role segjobs-worker, and not segjobs-head"),
        ("VolumeSize: 200", "VolumeSize: 20", "head has no room for what is spilled"),
        ("InstanceType: g6.4xlarge", "InstanceType: m7i.2xlarge", "gpu: Ray is told of {'CPU': 16, 'GPU': 1}, and a m7i.2xlarge has"),
        ("{CPU: 16, GPU: 1}", "{CPU: 16}", "gpu: Ray is told of {'CPU': 16}, and a g6.4xlarge has"),
        ("InstanceType: c7i.4xlarge", "InstanceType: c7i.4xlrage", "cpu: nothing is known of a c7i.4xlrage"),
        # How Ray is started.
        ("${REGISTRY}/segjobs", "rayproject/ray", "rayproject/ray is not the image of infra/Dockerfile"),
        ("--shm-size=24g", "--shm-size=64m", "/dev/shm has no room for an object store of 19.2 GiB"),
        ("--shm-size=24g", "--rm", "/dev/shm has no room"),
        (" --autoscaling-config=~/ray_bootstrap_config.yaml", "", "the head starts no workers"),
        ("--address=$RAY", "--adress=$RAY", "ray start: No such option '--adress'"),
        ("$RAY_HEAD_IP:6379", "$RAY_HEAD_IP:6380", "workers look for the head at $RAY_HEAD_IP:6380"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "whoever reaches the head sees its dashboard"),
        ("  ~/ray-token: ~/.ray", "  ~/token: ~/.ray", "nothing is mounted at ~/ray-token"),
        ("RAY_AUTH_TOKEN_PATH=~/ray-token ray start --address", "RAY_AUTH_TOKEN_PATH=~/other ray start --address", "nothing is mounted at ~/other"),
        ("setup_commands: []", "setup_commands: [pip install ray==2.9.0]", "setup_commands: the image has everything"),
    ],
)  # fmt: skip
def test_a_planted_error_is_named(right: str, wrong: str, words: str) -> None:
    text = FILE.read_text()
    assert right in text
    assert words in "; ".join(cluster_problems(load(text.replace(right, wrong))))
