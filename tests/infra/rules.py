"""What the rules of all manifests share: what is filled in, versions, and command lines."""

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.__main__ import VERBS
from jobs.config import ConfigError
from jobs.flags import from_namespace, parser_for
from jobs.submission import PLACES

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
# What envsubst puts in.
VALUES = {
    "BUCKET": "my-bucket",
    "REGISTRY": "registry.example/team",
    "ACCOUNT": "123456789012",
    "REGION": "eu-central-1",
    "AMI": "ami-0123456789abcdef0",
    "SUBNET": "subnet-0123456789abcdef0",
    "GROUP": "sg-0123456789abcdef0",
}


def filled(text: str) -> str:
    """Put values in, as envsubst does with the names that it is given."""
    for name, value in VALUES.items():
        text = text.replace("${" + name + "}", value)
    return text


def load(text: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(filled(text)) if one is not None]


def versions() -> tuple[str, str]:
    """Return the version of this package, and that of Ray in the lock file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(
        r"^ray(?:\[.*?\])?==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE
    )
    assert found is not None
    return project["version"], found[1]


def entrypoint_problems(command: str) -> Iterator[str]:
    """Parse a command line as the program itself does."""
    name, verb, *flags = shlex.split(command)
    if name != "segjobs" or verb not in VERBS:
        yield f"entrypoint: {name} {verb} is no verb"
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = from_namespace(VERBS[verb], parser_for(VERBS[verb]).parse_args(flags))
    except ConfigError as error:
        yield f"entrypoint: {error}"
    except SystemExit:
        yield f"entrypoint: {said.getvalue().strip().rpartition('error: ')[2]}"
    else:
        yield from _place_problems(config)


def _place_problems(config: Any) -> Iterator[str]:
    """Name the places that are gone with a node."""
    for name in PLACES:
        given = getattr(config, name, None)
        for place in given if isinstance(given, list) else [given]:
            if place is not None and place.startswith("/"):
                yield f"entrypoint: --{name} {place} is on a node's own disk"
