"""The command line of each verb, made of its dataclass in `config`.

jsonargparse reads flags and `--config FILE.yaml`, checks types, refuses what it does not know and
prints the effective configuration.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import jsonargparse

from jobs.config import ConfigError
from jobs.logs import VARIABLE, LogFormat
from jobs.redact import holds_credentials

Config = TypeVar("Config")

# How jsonargparse names a flag of the command line, or a key of a YAML file, that it does not know.
_UNKNOWN = re.compile(r"(?:unrecognized arguments: |[Oo]ption ')([^\s'=]+)")


def parser_for(config_class: type[Any]) -> jsonargparse.ArgumentParser:
    """Return the parser of one verb: a flag for each field of its dataclass."""
    parser = Parser(description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with the keys below; flags win"
    )
    parser.add_argument(
        "--log-format",
        type=LogFormat | None,
        default=None,
        help=f"json writes one object a line; {VARIABLE}, then text, if left out",
    )
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        _add_flag(parser, field, hints[field.name])
    return parser


def from_namespace(config_class: type[Config], values: jsonargparse.Namespace) -> Config:
    """Make a verb's configuration of what its parser read.

    Raises:
        ConfigError: A value is out of range, or the endpoint has credentials in it.
    """
    names = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(values).items() if name in names}
    if holds_credentials(given.get("endpoint_url") or ""):
        raise ConfigError(
            "--endpoint-url holds a password or a signature, and would stand in the manifest: give "
            "credentials by AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
        )
    return config_class(**given)


def gathered(config_class: type[Any], arguments: Sequence[str]) -> list[str]:
    """Make one argument, a list, of the several values of a flag that takes a list: `--train A B`.

    argparse could, but then a file's `train: A`, one value, would be refused.
    """
    hints = get_type_hints(config_class)
    lists = {
        "--" + name.replace("_", "-"): list[float] in get_args(hint)
        for name, hint in hints.items()
        if {list[str], list[float]} & set(get_args(hint))
    }
    result: list[str] = []
    values: list[str] = []
    for argument in [*arguments, "--"]:
        if argument.startswith("--"):
            if len(values) > 1 or (values and lists[result[-1]]):
                numbers = lists[result[-1]]
                values = [f"[{', '.join(v if numbers else json.dumps(v) for v in values)}]"]
            result += values
            values = []
        if result and result[-1] in lists and not argument.startswith("--"):
            values.append(argument)
        else:
            result.append(argument)
    return result[:-1]


def arguments_of(config: Any) -> list[str]:
    """Return the flags that make a configuration: those that are not as they are by default."""
    arguments = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = "--" + field.name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value != field.default:
            arguments += [flag, str(value)]
    return arguments


class Parser(jsonargparse.ArgumentParser):
    """Adds the nearest known name to the error about an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the usage and `message`, and exit with 2."""
        if unknown := _UNKNOWN.search(message):
            # An unknown key of a YAML file is reported to the parser above the verb's.
            parser = getattr(ex, "subcommand_parser", None) or self
            known = [name for a in parser._actions for name in (*a.option_strings, a.dest)]
            if close := difflib.get_close_matches(unknown[1], known, n=1):
                message = f"{message} - did you mean {close[0]}?"
        super().error(message, ex)


def _add_flag(parser: jsonargparse.ArgumentParser, field: "Field[Any]", hint: Any) -> None:
    help_ = field.metadata["help"]
    if field.metadata["positional"]:
        if hint == list[str]:
            parser.add_argument(field.name, type=str, nargs="+", help=help_)
        else:
            parser.add_argument(field.name, type=hint, help=help_)
        return
    flag = "--" + field.name.replace("_", "-")
    if hint == list[str]:
        given: Any = field.default
        parser.add_argument(flag, type=str, nargs="+", default=list(given), help=help_)
    elif hint is bool:
        parser.add_argument(flag, action="store_true", help=help_)
    elif field.default is MISSING:
        parser.add_argument(flag, type=hint, required=True, help=help_)
    else:
        parser.add_argument(flag, type=hint, default=field.default, help=help_)
