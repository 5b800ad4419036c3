"""What must hold for the cluster launcher's file beyond Ray's schema: each rule names what it misses."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import botocore.session
import click
from botocore.validate import ParamValidator
from ray.scripts.scripts import start as ray_start

from tests.infra.pod_rules import STORE_SHARE
from tests.infra.rules import VALUES, versions

# CPUs, GPUs and GiB of memory, by EC2's own account.
INSTANCES = {"m7i.2xlarge": (8, 0, 32), "g6.4xlarge": (16, 1, 64), "c7i.4xlarge": (16, 0, 32)}
# Ray's provider takes several, and gives EC2 one.
SEVERAL = {"SubnetIds": "SubnetId"}
NEEDED = ("ImageId", "KeyName", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile")
LEAST_DISK_GB = 100
HEAD_PORT = 6379


def cluster_problems(config: dict[str, Any]) -> Iterator[str]:
    """Return what is wrong with a cluster."""
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    if head.get("resources", {}).get("CPU") != 0:
        yield "the head does work"
    if "InstanceMarketOptions" in head["node_config"]:
        yield "the head may be taken away"
    for name, one in types.items():
        yield from _type_problems(name, one, is_head=one is head)
        yield from _node_problems(name, one["node_config"])
    if sum(one["max_workers"] for one in types.values()) != config["max_workers"]:
        yield "max_workers is not that of the types"
    yield from _container_problems(config["docker"], types.values())
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        if config[name]:
            yield f"{name}: the image has everything"
    yield from _start_problems(config)


def _type_problems(name: str, one: dict[str, Any], *, is_head: bool) -> Iterator[str]:
    node = one["node_config"]
    if not is_head and node.get("InstanceMarketOptions") != {"MarketType": "spot"}:
        yield f"{name} is not on spot"
    if one["min_workers"] != 0:
        yield f"{name} is there for nothing"
    role = node.get("IamInstanceProfile", {}).get("Arn", "").rpartition("/")[2]
    wanted = "segjobs-head" if is_head else "segjobs-worker"
    if role != wanted:
        yield f"{name} has the role {role}, and not {wanted}"
    if node["InstanceType"] not in INSTANCES:
        yield f"{name}: nothing is known of a {node['InstanceType']}"
        return
    cpus, gpus, _ = INSTANCES[node["InstanceType"]]
    has = {"CPU": 0 if is_head else cpus} | ({"GPU": gpus} if gpus else {})
    if one["resources"] != has:
        yield f"{name}: Ray is told of {one['resources']}, and a {node['InstanceType']} has {has}"


def _node_problems(name: str, node: dict[str, Any]) -> Iterator[str]:
    yield from (f"{name} has no {one}" for one in NEEDED if not node.get(one))
    asked = {SEVERAL.get(key, key): value for key, value in node.items()}
    if isinstance(asked.get("SubnetId"), list):
        asked["SubnetId"] = asked["SubnetId"][0]
    call = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    report = ParamValidator().validate(asked | {"MinCount": 1, "MaxCount": 1}, call.input_shape)
    if report.has_errors():
        yield f"{name}: {report.generate_report()}"
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield f"{name} gives its role to whoever can make it ask a URL"
    if node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] < LEAST_DISK_GB:
        yield f"{name} has no room for what is spilled"


def _container_problems(docker: dict[str, Any], types: Any) -> Iterator[str]:
    repository, _, tag = docker["image"].rpartition(":")
    if tag != versions()[0]:
        yield f"the image is of {tag}, and this is {versions()[0]}"
    if repository != f"{VALUES['REGISTRY']}/segjobs":
        yield f"{repository} is not the image of infra/Dockerfile"
    most = max(INSTANCES.get(one["node_config"]["InstanceType"], (0, 0, 0))[2] for one in types)
    found = re.search(r"--shm-size=(\d+)g\b", " ".join(docker["run_options"]))
    if found is None or int(found[1]) < STORE_SHARE * most:
        yield f"/dev/shm has no room for an object store of {STORE_SHARE * most:.1f} GiB"


def _start_problems(config: dict[str, Any]) -> Iterator[str]:
    for kind in ("head", "worker"):
        (command,) = (one for one in config[f"{kind}_start_ray_commands"] if "ray start" in one)
        before, _, flags = command.partition("ray start ")
        variables = dict(one.split("=", 1) for one in shlex.split(before))
        if variables.get("RAY_AUTH_MODE") != "token":
            yield "no token: whoever reaches the head may run any code"
        path = variables.get("RAY_AUTH_TOKEN_PATH")
        if path not in config["file_mounts"]:
            yield f"nothing is mounted at {path}"
        try:
            given = ray_start.make_context("ray start", shlex.split(flags)).params
        except click.UsageError as error:
            yield f"ray start: {error.format_message()}"
            continue
        yield from _head_start(given) if kind == "head" else _worker_start(given)


def _head_start(given: dict[str, Any]) -> Iterator[str]:
    if not given["head"] or given["port"] != HEAD_PORT:
        yield f"the head does not listen at {HEAD_PORT}"
    # Where Ray's launcher puts it.
    if given["autoscaling_config"] != "~/ray_bootstrap_config.yaml":
        yield "the head starts no workers"
    if given["dashboard_host"] != "127.0.0.1":
        yield "whoever reaches the head sees its dashboard"


def _worker_start(given: dict[str, Any]) -> Iterator[str]:
    if given["address"] != f"$RAY_HEAD_IP:{HEAD_PORT}":
        yield f"workers look for the head at {given['address']}"
