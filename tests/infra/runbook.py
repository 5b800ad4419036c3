"""The runbook's blocks of commands, and what shows that each works."""

import re
import shlex
from dataclasses import dataclass

from tests.infra.rules import ROOT

TEXT = (ROOT / "infra" / "RUNBOOK.md").read_text()


@dataclass(frozen=True)
class Block:
    """Commands under a heading; `shown_by` is what stands behind `sh`."""

    heading: str
    shown_by: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its lines, those that go on joined."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks() -> list[Block]:
    found, heading = [], ""
    for match in re.finditer(r"^## (.+)$|^```(.*)\n((?:.*\n)*?)```$", TEXT, re.MULTILINE):
        if match[1]:
            heading = match[1]
        else:
            language, _, shown_by = match[2].partition(" ")
            assert language == "sh", match[0]
            found.append(Block(heading, shown_by, match[3]))
    return found


def block(heading: str, shown_by: str) -> Block:
    (found,) = [one for one in blocks() if (one.heading, one.shown_by) == (heading, shown_by)]
    return found


def words(command: str, values: dict[str, str]) -> list[str]:
    """Split a command as a shell does, with variables of it put in."""
    for name, value in values.items():
        command = re.sub(rf"\${name}\b", value, command)
    return shlex.split(command)
