"""The runbook's blocks of commands, what shows that each works, and what is wrong with those that are not run."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from ray.scripts.scripts import cli as ray_cli

from tests.infra.rules import ROOT, VALUES

TEXT = (ROOT / "infra" / "RUNBOOK.md").read_text()
# Five times, and what is run then.
CRON_LINE = re.compile(r"^(?:[\d*/,-]+ ){5}(.+)$", re.MULTILINE)
KINDS = ("test", "head", "cloud")
# Programs of blocks that need a cloud, and those of their verbs that are used; what they do is theirs.
PROGRAMS: dict[str, set[str]] = {
    "make": {".venv/.ready"},
    "docker": {"build", "push"},
    "aws": {"iam create-policy"},
    "kubectl": {"apply", "create", "describe", "delete", "get", "logs --follow job/$NAME"},
    "envsubst": set(),
    "source": set(),
    "export": set(),
    "mkdir": set(),
    "chmod": set(),
    "openssl": {"rand"},
    "ray": {"up", "attach"},
}


@dataclass(frozen=True)
class Block:
    """Commands under a heading; `shown_by` is what stands behind `sh`."""

    heading: str
    shown_by: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its lines without comments, those that go on joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(text: str = TEXT) -> list[Block]:
    found, heading = [], ""
    for match in re.finditer(r"^## (.+)$|^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        if match[1]:
            heading = match[1]
        else:
            language, _, shown_by = match[2].partition(" ")
            assert language == "sh", match[0]
            found.append(Block(heading, shown_by, match[3]))
    return found


def block(heading: str, shown_by: str = "test", number: int = 0) -> Block:
    """Return the block under a heading; the first of its kind where there are more."""
    return [one for one in blocks() if (one.heading, one.shown_by) == (heading, shown_by)][number]


@dataclass(frozen=True)
class Shell:
    """Runs blocks as they are, in a folder of its own, with `segjobs` on the path.

    Attributes:
        folder: The current one, and the home folder.
        environment: Variables, besides those of this process.
        program: What `segjobs` is, for Python.
        limit_s: How long a block may take.
    """

    folder: Path
    environment: dict[str, str]
    program: str = "from jobs.__main__ import main; raise SystemExit(main())"
    limit_s: float = 400

    def __post_init__(self) -> None:
        # On the path, and where the crontab's line has it.
        for folder in (self.folder / "bin", self.folder / "segjobs/.venv/bin"):
            folder.mkdir(parents=True)
            file = folder / "segjobs"
            start = f'exec {sys.executable} -c "{self.program}" "$@"'
            file.write_text(f"#!/bin/sh\nexport PYTHONPATH={ROOT}\n{start}\n")
            file.chmod(0o755)

    def start(self, heading: str, number: int = 0) -> "subprocess.Popen[str]":
        """Start a block of the kind `test`; the line of a crontab as cron does, now."""
        text = block(heading, "test", number).text
        if not (line := CRON_LINE.search(text)):
            return self.start_text(text)
        # Of this shell's variables it has those that the crontab sets, here to the test's values.
        given = dict(re.findall(r"^(\w+)=(.*)$", text[: line.start()], re.MULTILINE))
        return self._start(
            ["/bin/sh", "-c", line[1]],
            {
                "LOGNAME": "me",
                "PATH": "/usr/bin:/bin",
                **{name: self.environment.get(name, value) for name, value in given.items()},
            },
        )

    def start_text(self, text: str) -> "subprocess.Popen[str]":
        """Start any commands."""
        path = f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}"
        return self._start(["bash", "-ec", text], {**os.environ, **self.environment, "PATH": path})

    def _start(self, command: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**environment, "HOME": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, heading: str, number: int = 0) -> tuple[int, str]:
        """Run a block; return its exit code, and what it said, on one line."""
        return self.end(self.start(heading, number))

    def end(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        """Wait for what was started."""
        said, _ = process.communicate(timeout=self.limit_s)
        return process.returncode, " ".join(said.split())


def words(command: str, values: dict[str, str]) -> list[str]:
    """Split a command as a shell does, with variables of it put in."""
    for name, value in values.items():
        command = re.sub(rf"\${name}\b", value, command)
    return shlex.split(command)


def problems(text: str = TEXT) -> Iterator[str]:
    """Yield what is wrong with blocks: their kind, and the commands of those that no test runs."""
    for one in blocks(text):
        if one.shown_by not in KINDS:
            yield f"{one.heading}: {one.shown_by!r} says nothing of what shows that it works"
        if one.shown_by == "cloud":
            for command in one.commands:
                yield from _cloud_problems(command)
    # Commands stand in blocks, so that each has its mark.
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        program, _, rest = span.partition(" ")
        if rest and (program in PROGRAMS or program == "segjobs") and rest not in ("up", "init"):
            yield f"`{span}` is a command outside of a block"


def _cloud_problems(command: str) -> Iterator[str]:
    for part in re.split(r"&&|\|", command):
        yield from _program_problems(part)
    for path in re.findall(r"infra/[\w/.-]+", command):
        if not (ROOT / path).is_file():
            yield f"there is no {path}"
    for names, path in re.findall(r"envsubst '([^']+)' < (infra/\S+)", command):
        used = (
            set(re.findall(r"\$\{(\w+)\}", (ROOT / path).read_text()))
            if (ROOT / path).is_file()
            else set()
        )
        if {name.removeprefix("$") for name in names.split()} != used:
            yield f"{path} has ${' $'.join(sorted(used))}, not {names}"
    exported = set(VALUES) | {"NAME"}
    for name in re.findall(r"\$(\w+)", re.sub(r"'[^']*'", "", command)):
        if name not in exported:
            yield f"nobody exports {name}"


def _program_problems(part: str) -> Iterator[str]:
    program, *rest = shlex.split(part)
    if program not in PROGRAMS:
        yield f"{program} is no program of this runbook"
        return
    used, known = " ".join(rest), PROGRAMS[program]
    if known and not any(f"{used} ".startswith(f"{verb} ") for verb in known):
        yield f"{program} {used}: its verb is none of {', '.join(sorted(known))}"
    elif program == "ray":
        # Ray's own command line parses it, and does nothing.
        try:
            ray_cli.commands[rest[0]].make_context(rest[0], rest[1:])
        except click.UsageError as error:
            yield f"ray {rest[0]}: {error.format_message()}"
