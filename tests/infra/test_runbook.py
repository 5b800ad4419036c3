"""The runbook: its commands parse, what they name is there, and what it quotes is said.

Blocks marked `test` are run in `tests/jobs/test_submit_cluster.py`.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.__main__ import VERBS
from jobs.submission import prepare
from tests.infra import runbook
from tests.infra.rules import ROOT, VALUES, entrypoint_problems
from tests.jobs.ray_head import COMMAND

BLOCKS = runbook.blocks()
COMMANDS = [(block, command) for block in BLOCKS for command in block.commands]
# Programs of blocks that need a cloud; what they do is theirs.
PROGRAMS = {
    "make",
    "source",
    "export",
    "docker",
    "sed",
    "aws",
    "envsubst",
    "kubectl",
    "openssl",
    "ray",
    "crontab",
}


def test_every_block_says_what_shows_that_it_works() -> None:
    assert len(BLOCKS) > 12
    assert {block.shown_by for block in BLOCKS} == {"test", "cli", "cloud", "head", "cron"}
    shown = {block.heading for block in BLOCKS if block.shown_by in ("test", "cli")}
    assert {
        "Submit",
        "Watch",
        "Stop, and go on",
        "Retry errors",
        "Upgrade the model",
        "Roll back a label version",
    } <= shown


@pytest.mark.parametrize(
    "command",
    [command for block, command in COMMANDS if block.shown_by in ("test", "cli")],
)
def test_a_command_parses_with_the_program_itself(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files that a command names travel with it, so they must be there.
    monkeypatch.chdir(tmp_path)
    for name in ("settings.yaml", "policy.yaml"):
        Path(name).write_text("{}\n")
    line = runbook.words(command, VALUES)
    assert line[0] == "segjobs"
    assert list(entrypoint_problems(shlex.join(line))) == []
    if line[1] == "submit":
        assert prepare(line[line.index("--") + 1 :], VERBS).name.startswith("segjobs-")


@pytest.mark.parametrize("command", ["segjobs submit --nowait -- predict", "segjobs status"])
def test_a_wrong_command_would_be_found(command: str) -> None:
    assert list(entrypoint_problems(command))


@pytest.mark.parametrize(
    "command", [command for block, command in COMMANDS if block.shown_by == "cloud"]
)
def test_a_command_for_a_cloud_names_what_is_there(command: str) -> None:
    for part in re.split(r"&&|\|", command):
        assert part.split()[0] in PROGRAMS, part
    for path in re.findall(r"infra/[\w/.-]+", command):
        assert (ROOT / path).is_file(), path
    for names, path in re.findall(r"envsubst '([^']+)' < (infra/\S+)", command):
        used = set(re.findall(r"\$\{(\w+)\}", (ROOT / path).read_text()))
        assert {name.removeprefix("$") for name in names.split()} == used, path


def test_the_head_is_started_as_the_tests_start_theirs() -> None:
    export, start = runbook.block("Install", "head").commands
    assert export.startswith("export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=")
    assert start.split() == COMMAND


def test_paths_in_the_text_are_there() -> None:
    for path in re.findall(r"`((?:infra|jobs|tests)/[\w/.-]+)`", runbook.TEXT):
        assert (ROOT / path).exists(), path


def said() -> Iterator[str]:
    """Every text of the sources, with … where a value is put in."""
    for path in (*(ROOT / "jobs").glob("*.py"), *(ROOT / "segmodel").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )


def quoted() -> list[str]:
    table = runbook.TEXT.split("| it says |")[1]
    rows = re.findall(r"^\| (?!---|what)(.+?) \|", table, re.MULTILINE)
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row)]


def test_what_is_quoted_is_said() -> None:
    texts = list(said())
    messages = quoted()
    assert len(messages) > 12
    assert [one for one in messages if not any(one in text for text in texts)] == []
