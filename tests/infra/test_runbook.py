"""The runbook: each command is run by a test or marked, what it names is there, and what it quotes is said.

Blocks marked `test` are run in `tests/jobs/test_runbook.py` and `tests/jobs/test_submit_cluster.py`.
"""

import ast
import fnmatch
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.__main__ import VERBS
from jobs.submission import prepare
from tests.infra import runbook
from tests.infra.rules import KUBERNETES, ROOT, VALUES, entrypoint_problems, load
from tests.jobs.ray_head import COMMAND

BLOCKS = runbook.blocks()
# Each line of `segjobs`, that of the crontab too.
COMMANDS = [
    f"segjobs {found[1]}"
    for block in BLOCKS
    for command in block.commands
    if (found := re.search(r"(?:^|&& \S*/)segjobs (.+?)(?: >> .*)?$", command))
]
POLICY = json.loads((ROOT / "infra" / "aws" / "store-policy.json").read_text())


def test_every_command_is_run_or_marked_and_names_what_is_there() -> None:
    assert len(BLOCKS) > 12
    assert list(runbook.problems()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("```sh cloud\nkubectl get", "```sh cli\nkubectl get", "Watch: 'cli' says nothing"),
        ("kubectl get rayjobs", "kubctl get rayjobs", "kubctl is no program"),
        ("kubectl logs --follow", "kubectl log --follow", "kubectl log --follow"),
        # The submitter's pod has the driver's log; the head's container has none of it.
        ("logs --follow job/$NAME", "logs --follow --container=ray-head", "its verb is none of"),
        ("| kubectl create -f -", "| kubectl crate -f -", "kubectl crate -f -: its verb is none of"),
        ("infra/kubernetes/train.yaml |", "infra/kubernetes/trian.yaml |", "there is no infra/kubernetes/trian.yaml"),
        ("envsubst '$ACCOUNT' <", "envsubst '$BUCKET' <", "access.yaml has $ACCOUNT, not $BUCKET"),
        ("$AMI $SUBNET $GROUP' <", "$AMI $SUBNET' <", "not $ACCOUNT $REGION $REGISTRY $AMI $SUBNET"),
        ("-t $REGISTRY/segjobs", "-t $REGISTRIES/segjobs", "nobody exports REGISTRIES"),
        ("ray up --yes cluster.yaml", "ray up --yse cluster.yaml", "ray up: No such option"),
        ("--port-forward 8265", "--port-forward dashboard", "ray attach: Invalid value"),
        ("aws iam create-policy", "aws iam creat-policy", "its verb is none of iam create-policy"),
        ("Ctrl-C ends", "`segjobs submit --no-wait` ends", "outside of a block"),
        ("Versions never change", "See `kubectl get pods`. Versions never change", "outside of a block"),
    ],
)  # fmt: skip
def test_a_planted_error_is_named(right: str, wrong: str, words: str) -> None:
    assert right in runbook.TEXT
    assert words in "; ".join(runbook.problems(runbook.TEXT.replace(right, wrong)))


def test_every_block_for_tests_is_run_by_one() -> None:
    tests = [ROOT / "tests/jobs" / name for name in ("test_runbook.py", "test_submit_cluster.py")]
    calls = r"\b(?:run|start)\(\"([^\"]+)\"(?:, (\d))?\)"
    run = {
        (heading, int(number or 0))
        for path in tests
        for heading, number in re.findall(calls, path.read_text())
    }
    headings = [block.heading for block in BLOCKS if block.shown_by == "test"]
    assert run == {
        (heading, headings[:place].count(heading)) for place, heading in enumerate(headings)
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_with_the_program_itself(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files that a command names travel with it, so they must be there.
    monkeypatch.chdir(tmp_path)
    for name in ("settings.yaml", "policy.yaml"):
        Path(name).write_text("{}\n")
    line = runbook.words(command, VALUES)
    assert list(entrypoint_problems(shlex.join(line))) == []
    if line[1] == "submit":
        assert prepare(line[line.index("--") + 1 :], VERBS).name.startswith("segjobs-")


# What is started says its arguments, and the variables that it has.
SAYS = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"


def test_the_crontab_needs_nothing_of_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "of-the-shell")
    shell = runbook.Shell(tmp_path / "home", {}, SAYS)
    code, said = shell.run("Label every night")
    assert (code, said) == (0, "")
    words, variables = json.loads((shell.folder / "label.log").read_text())
    text = runbook.block("Label every night").text
    given = dict(re.findall(r"^([A-Z_]+)=(.+)$", text, re.MULTILINE))
    assert {name: variables[name] for name in given} == given
    assert {"BUCKET", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} == set(
        given
    )
    # Cron puts nothing into them.
    assert not [value for value in given.values() if re.search(r"[$~%]", value)]
    assert words[:3] == ["submit", "--", "label"]
    assert words[words.index("--dataset") + 1] == f"s3://{given['BUCKET']}/labels/photos"
    assert list(entrypoint_problems(shlex.join(["segjobs", *words]))) == []


@pytest.mark.parametrize("command", ["segjobs submit --nowait -- predict", "segjobs status"])
def test_a_wrong_command_would_be_found(command: str) -> None:
    assert list(entrypoint_problems(command))


def refused(line: list[str]) -> Iterator[str]:
    """Yield what the role of `store-policy.json` would not let a command read or write."""
    for flag, value in itertools.pairwise(line):
        if value.startswith(f"s3://{VALUES['BUCKET']}/"):
            needed = "s3:PutObject" if flag in ("--output", "--dataset") else "s3:GetObject"
            name = value.removeprefix(f"s3://{VALUES['BUCKET']}/").rstrip("/")
            if not any(
                needed in statement["Action"]
                and fnmatch.fnmatchcase(f"arn:aws:s3:::BUCKET/{name}/x", pattern)
                for statement in POLICY["Statement"]
                for pattern in statement["Resource"]
            ):
                yield f"{needed} of {name}"


def entrypoints(part: Any) -> Iterator[str]:
    """Yield the command lines of a manifest, and of one within it."""
    if isinstance(part, list):
        for inner in part:
            yield from entrypoints(inner)
    elif isinstance(part, dict):
        for name, inner in part.items():
            if name == "entrypoint":
                yield inner
            else:
                yield from entrypoints(yaml.safe_load(inner) if name == "rayjob.yaml" else inner)


def test_the_role_of_jobs_may_do_what_their_commands_say() -> None:
    manifests = [one for path in KUBERNETES.glob("*.yaml") for one in load(path.read_text())]
    lines = [runbook.words(command, VALUES) for command in COMMANDS]
    lines += [shlex.split(command) for command in entrypoints(manifests)]
    assert len(lines) == len(COMMANDS) + 4
    for line in lines:
        assert list(refused(line)) == [], line
    for wrong in ("--annotations s3://$BUCKET/instances.json", "--output s3://$BUCKET/models/coco"):
        assert list(refused(runbook.words(wrong, VALUES)))


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
