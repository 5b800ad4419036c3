"""The cluster launcher's file by Ray's own schema, and the roles that its nodes have."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.rules import ROOT, filled, versions

FILE = ROOT / "infra" / "ray-up-aws.yaml"
POLICIES = sorted((ROOT / "infra" / "aws").glob("*.json"))
# What wants a condition, and what it would do without.
BOUNDED = {
    "iam:PassRole": "a role may be given to any service",
    "ec2:TerminateInstances": "any machine may be ended",
}
# EC2 has no resources for these: they are about all that there is.
ABOUT_ALL = re.compile(r"ec2:Describe[A-Z]\w+")


def load(text: str) -> dict[str, Any]:
    return yaml.safe_load(filled(text))  # type: ignore[no-any-return]


def problems(config: dict[str, Any]) -> Iterator[str]:
    types = config["available_node_types"]
    tag = config["docker"]["image"].rpartition(":")[2]
    if tag != versions()[0]:
        yield f"the image is of {tag}, and this is {versions()[0]}"
    head = types[config["head_node_type"]]
    if head.get("resources", {}).get("CPU") != 0:
        yield "the head does work"
    if "InstanceMarketOptions" in head["node_config"]:
        yield "the head may be taken away"
    for name, one in types.items():
        yield from _type_problems(name, one, is_head=one is head)
    if sum(one["max_workers"] for one in types.values()) != config["max_workers"]:
        yield "max_workers is not that of the types"
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    if not all("RAY_AUTH_MODE=token" in one for one in starts if "ray start" in one):
        yield "no token: whoever reaches the head may run any code"


def _type_problems(name: str, one: dict[str, Any], *, is_head: bool) -> Iterator[str]:
    node = one["node_config"]
    if not is_head and node.get("InstanceMarketOptions") != {"MarketType": "spot"}:
        yield f"{name} is not on spot"
    if one["min_workers"] != 0:
        yield f"{name} is there for nothing"
    if "IamInstanceProfile" not in node:
        yield f"{name} has no role"
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield f"{name} gives its role to whoever can make it ask a URL"


def test_the_cluster_is_valid() -> None:
    config = load(FILE.read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert list(problems(config)) == []
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
        ("IamInstanceProfile: {Arn", "SomeProfile: {Arn", "has no role"),
    ],
)
def test_a_planted_error_is_named(right: str, wrong: str, words: str) -> None:
    text = FILE.read_text()
    assert right in text
    assert words in "; ".join(problems(load(text.replace(right, wrong))))


def policy_problems(policy: dict[str, Any]) -> Iterator[str]:
    for statement in policy["Statement"]:
        actions = (
            statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        )
        resources = (
            statement["Resource"]
            if isinstance(statement["Resource"], list)
            else [statement["Resource"]]
        )
        if statement["Effect"] != "Allow" or "NotAction" in statement or "NotResource" in statement:
            yield f"{statement['Sid']} says what it does not mean"
        yield from (f"{one} is more than one action" for one in actions if "*" in one)
        for resource in resources:
            if resource == "*" and not all(ABOUT_ALL.fullmatch(one) for one in actions):
                yield f"{statement['Sid']} is about everything"
            if resource != "*" and re.fullmatch(
                r"arn:aws:s3:::[^/]*\*|arn:aws:s3:::[^/]+/\*", resource
            ):
                yield f"{resource} is a whole bucket"
        if "Condition" not in statement:
            yield from (words for action, words in BOUNDED.items() if action in actions)
        elif "s3:ListBucket" in actions:
            # Only a listing has a prefix. Without the right to list, S3 refuses what is missing (403 for 404).
            yield "an object that is missing would be refused"


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_a_policy_allows_no_more_than_is_used(path: Any) -> None:
    assert list(policy_problems(json.loads(path.read_text()))) == []


def test_a_policy_allows_what_is_used() -> None:
    policy = json.loads((ROOT / "infra" / "aws" / "store-policy.json").read_text())
    allowed = {
        one
        for s in policy["Statement"]
        for one in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
    }
    # What each call of `jobs/s3.py` needs.
    needed = {
        "list_objects_v2": "s3:ListBucket",
        "get_object": "s3:GetObject",
        "head_object": "s3:GetObject",
        "put_object": "s3:PutObject",
        "create_multipart_upload": "s3:PutObject",
        "upload_part": "s3:PutObject",
        "complete_multipart_upload": "s3:PutObject",
        "abort_multipart_upload": "s3:AbortMultipartUpload",
        "delete_object": "s3:DeleteObject",
    }
    source = (ROOT / "jobs" / "s3.py").read_text()
    called = set(
        re.findall(
            r"\b((?:get|put|head|list|delete|copy|create|upload|complete|abort)_(?:objects?(?:_v2)?|part|multipart_upload))\b",
            source,
        )
    )
    assert called - {"list_objects"} <= needed.keys()
    assert allowed == {needed[name] for name in called - {"list_objects"}}


@pytest.mark.parametrize(
    ("name", "right", "wrong", "words"),
    [
        ("store", '"s3:GetObject", "s3:PutObject"', '"s3:*", "s3:PutObject"', "s3:* is more than one action"),
        ("store", "BUCKET/photos/*", "BUCKET/*", "arn:aws:s3:::BUCKET/* is a whole bucket"),
        ("store", '"s3:ListBucket",', '"s3:ListBucket", "Condition": {"StringLike": {"s3:prefix": ["a/*"]}},', "missing would be refused"),
        ("head", '"Resource": "arn:aws:iam::ACCOUNT:role/segjobs-worker"', '"Resource": "*"', "GiveWorkersTheirRole is about everything"),
        ("head", '"Condition"', '"Conditions"', "any machine may be ended"),
        ("head", "ec2:DescribeImages", "ec2:RunInstances", "LookAtWhatHasNoArns is about everything"),
    ],
)  # fmt: skip
def test_a_policy_that_allows_more_is_named(name: str, right: str, wrong: str, words: str) -> None:
    text = (ROOT / "infra" / "aws" / f"{name}-policy.json").read_text()
    assert right in text
    assert words in "; ".join(policy_problems(json.loads(text.replace(right, wrong))))
