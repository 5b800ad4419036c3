"""The roles of nodes and jobs allow what is used, and no more."""

import json
import re
from typing import Any

import pytest

from tests.infra.policy_rules import as_list, policy_problems
from tests.infra.rules import ROOT

POLICIES = sorted((ROOT / "infra" / "aws").glob("*.json"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_a_policy_allows_no_more_than_is_used(path: Any) -> None:
    assert list(policy_problems(json.loads(path.read_text()))) == []


def test_a_policy_allows_what_is_used() -> None:
    policy = json.loads((ROOT / "infra" / "aws" / "store-policy.json").read_text())
    allowed = {one for s in policy["Statement"] for one in as_list(s["Action"])}
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
        ("head", '"ec2:CreateAction": "RunInstances"', '"ec2:CreateAction": "*"', "any machine may be made one of this cluster"),
        ("head", '"aws:ResourceTag/ray-cluster-name": "segjobs"', '"aws:ResourceTag/ray-cluster-name": "segjob"', "any machine may be made one of this cluster; any machine may be ended"),
        ("head", "role/segjobs-worker", "role/*", "not the workers' role alone"),
        ("head", "role/segjobs-worker", "role/segjobs-head", "not the workers' role alone"),
        ("head", '"ec2.amazonaws.com"', '"*"', "a role may be given to any service"),
        ("head", "ec2:DescribeImages", "ec2:RunInstances", "LookAtWhatHasNoArns is about everything"),
    ],
)  # fmt: skip
def test_a_policy_that_allows_more_is_named(name: str, right: str, wrong: str, words: str) -> None:
    text = (ROOT / "infra" / "aws" / f"{name}-policy.json").read_text()
    assert right in text
    assert words in "; ".join(policy_problems(json.loads(text.replace(right, wrong))))
