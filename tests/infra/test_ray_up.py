"""The cluster launcher's file: by Ray's own schema, and by what must hold besides."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.rules import ROOT, filled, versions

FILE = ROOT / "infra" / "ray-up-aws.yaml"


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
