"""What must hold for a role of ours: each rule names what else it would allow."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.infra.rules import ROOT

CLUSTER = yaml.safe_load((ROOT / "infra" / "ray-up-aws.yaml").read_text())
OWN = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": CLUSTER["cluster_name"]}}
# What wants a condition, which ones do, and what it would allow without.
BOUNDED = {
    "iam:PassRole": (
        [{"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}],
        "a role may be given to any service",
    ),
    "ec2:TerminateInstances": ([OWN], "any machine may be ended"),
    # Of those that may be ended.
    "ec2:CreateTags": (
        [OWN, {"StringEquals": {"ec2:CreateAction": "RunInstances"}}],
        "any machine may be made one of this cluster",
    ),
}
# EC2 has no resources for these: they are about all that there is.
ABOUT_ALL = re.compile(r"ec2:Describe[A-Z]\w+")


def policy_problems(policy: dict[str, Any]) -> Iterator[str]:
    """Return what a policy allows without need."""
    for statement in policy["Statement"]:
        yield from _statement_problems(statement)


def as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _statement_problems(statement: dict[str, Any]) -> Iterator[str]:
    actions, resources = as_list(statement["Action"]), as_list(statement["Resource"])
    if statement["Effect"] != "Allow" or "NotAction" in statement or "NotResource" in statement:
        yield f"{statement['Sid']} says what it does not mean"
    yield from (f"{one} is more than one action" for one in actions if "*" in one)
    if "*" in resources and not all(ABOUT_ALL.fullmatch(one) for one in actions):
        yield f"{statement['Sid']} is about everything"
    yield from (
        f"{one} is a whole bucket"
        for one in resources
        if re.fullmatch(r"arn:aws:s3:::[^/]*\*|arn:aws:s3:::[^/]+/\*", one)
    )
    for action in actions:
        conditions, words = BOUNDED.get(action, ([], ""))
        if conditions and statement.get("Condition") not in conditions:
            yield words
    if "s3:ListBucket" in actions and "Condition" in statement:
        # Only a listing has a prefix. Without the right to list, S3 refuses what is missing (403 for 404).
        yield "an object that is missing would be refused"
    if "iam:PassRole" in actions and resources != [_worker_role()]:
        yield "not the workers' role alone may be given"


def _worker_role() -> str:
    """Return the role of the workers' profile, which has its name."""
    types = CLUSTER["available_node_types"]
    (profile,) = {
        one["node_config"]["IamInstanceProfile"]["Arn"]
        for name, one in types.items()
        if name != CLUSTER["head_node_type"]
    }
    return str(profile).replace("${ACCOUNT}", "ACCOUNT").replace("instance-profile/", "role/")
