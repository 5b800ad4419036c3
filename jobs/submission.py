"""A command that is to run elsewhere: checked here, named after its output, with the files that it names."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import ConfigError
from jobs.flags import from_namespace, gathered, parser_for
from jobs.redact import holds_credentials
from jobs.storage import open_store

# They ask no cluster, or are about this machine.
HERE = {
    "submit": "one submit is enough",
    "status": "it reads the output alone",
    "demo": "it is for one machine",
}
# What a verb makes; its name says whose job it is.
MADE = ("output", "dataset")
# Flags that name configuration files: these travel along.
FILES = ("config", "policy", "categories")
# Flags that name places: on the cluster, a path is that of each node's own disk.
PLACES = (
    *(
        *MADE,
        "input",
        "model",
        "train",
        "val",
        "images",
        "annotations",
        "predictions",
        "truth",
        "weights",
        "reviewed",
        "estimate_output",
        "like",
        "against",
    ),
    *FILES[1:],
)
# Of `init --weights`, that are no paths.
PUBLISHED = ("random", "coco", "imagenet")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to run.

    Attributes:
        name: Of what it makes: `segjobs-VERB-OUTPUT-DIGEST`, the same for the same verb and output.
        arguments: The verb and its flags, with the names that files have on the cluster.
        files: Those names, and contents.
        output: The place of what it makes.
    """

    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes]
    output: str


def prepare(command: Sequence[str], verbs: Mapping[str, type[Any]]) -> Submission:
    """Check a command as the verb itself would, before anything is sent.

    Exits with 2, as the verb would, where its flags are wrong.

    Raises:
        ConfigError: It cannot run elsewhere as it is.
    """
    verb, *flags = command
    if verb not in verbs or verb in HERE:
        why = f": {HERE[verb]}" if verb in HERE else ""
        names = ", ".join(name for name in verbs if name not in HERE)
        raise ConfigError(f"{verb!r} is nothing to submit{why}. What is: {names}")
    parser = parser_for(verbs[verb])
    parser.prog = f"segjobs {verb}"
    config = from_namespace(verbs[verb], parser.parse_args(gathered(verbs[verb], flags)))
    if getattr(config, "address", None) is not None:
        raise ConfigError(
            "--address within the command names another cluster: give it before the --, as submit's own"
        )
    arguments, files = _with_files(flags)
    _refuse_own_places(config, {source for source, _ in files.values()})
    output = _output(config)
    return Submission(
        name=_name(verb, output, getattr(config, "endpoint_url", None)),
        arguments=(verb, *arguments),
        files={name: content for name, (_, content) in files.items()},
        output=output,
    )


def _with_files(flags: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, bytes]]]:
    """Return flags with the names that files get there, and for each its name here and its content."""
    arguments: list[str] = []
    files: dict[str, tuple[str, bytes]] = {}
    known = {f"--{name}" for name in FILES}
    names_a_file = False
    for argument in flags:
        flag, equals, value = argument.partition("=")
        if holds_credentials(argument) or holds_credentials(value):
            raise ConfigError(
                "the command holds a password or a signature, and would stand in logs: take it out"
            )
        if not names_a_file and equals and flag in known:
            arguments.append(f"{flag}={_take(value, files)}")
        else:
            arguments.append(_take(argument, files) if names_a_file else argument)
        names_a_file = not equals and argument in known
    return arguments, files


def _take(path: str, files: dict[str, tuple[str, bytes]]) -> str:
    """Add a local file, and return the name that it gets: its content is part of it."""
    if "://" in path:
        return path
    content = Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    name = f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', Path(path).name)}"
    files[name] = (path, content)
    return name


def _refuse_own_places(config: Any, taken: set[str]) -> None:
    """Refuse paths that mean something else on the cluster: relative to a folder that is not there."""
    for name in PLACES:
        given = getattr(config, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in taken and _is_own(value):
                raise ConfigError(
                    f"--{name} {value} is a path in this folder, and the job runs elsewhere: give a URI, or the full "
                    "path of a folder that every node has"
                )


def _is_own(value: str) -> bool:
    return "://" not in value and value not in PUBLISHED and not Path(value).is_absolute()


def _output(config: Any) -> str:
    """Return the place of what is made, however it was spelled."""
    given = next(
        str(getattr(config, name)) for name in MADE if getattr(config, name, None) is not None
    )
    return open_store(given, getattr(config, "endpoint_url", None)).uri.rstrip("/")


def _name(verb: str, output: str, endpoint_url: str | None) -> str:
    endpoint = (
        (endpoint_url or os.environ.get("AWS_ENDPOINT_URL", ""))
        if output.startswith("s3://")
        else ""
    )
    digest = hashlib.sha256("\n".join((verb, endpoint, output)).encode()).hexdigest()[:10]
    last = "-".join(
        output.partition("://")[2].split("/")[-2:] if "://" in output else output.split("/")[-2:]
    )
    words = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[-40:].strip("-")
    return "-".join(filter(None, ("segjobs", verb, words, digest)))
