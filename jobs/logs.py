"""Structured logs: one JSON object a line, in the place of what a person reads (`--log-format json`).

    {"time": "2026-11-27T12:00:00.123+00:00", "level": "info", "event": "chunk", "message": "...",
     "verb": "predict", "run_id": "...", "output": "s3://bucket/table", "chunk_id": "00000007", ...}

`time`, `level`, `event`, `message` and `verb` are in each; `run_id` and `output` from where a run begins; `chunk_id` where
it is about one chunk. Without the flag, SEGJOBS_LOG_FORMAT decides.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any, Literal

from jobs.redact import without_secrets

LogFormat = Literal["text", "json"]
VARIABLE = "SEGJOBS_LOG_FORMAT"


class _Log:
    """How this process logs; threads share it."""

    as_json = False
    fields: dict[str, Any]

    def __init__(self) -> None:
        self.fields = {}
        self.lock = threading.Lock()


_log = _Log()


def as_json() -> bool:
    """Say whether logs are JSON now."""
    return _log.as_json


def chosen(flag: LogFormat | None) -> LogFormat | None:
    """Return the format that a flag, or else the environment, asks for; None where neither does.

    Raises:
        ValueError: The environment asks for one that there is not.
    """
    value = os.environ.get(VARIABLE)
    if flag is not None or not value:
        return flag
    formats: dict[str, LogFormat] = {"text": "text", "json": "json"}
    if value not in formats:
        raise ValueError(f"{VARIABLE} must be text or json, not {value}")
    return formats[value]


@contextmanager
def using(format_: LogFormat | None, **fields: str) -> Iterator[None]:
    """Log in a format during the block (as around it where None), with `fields` in each line."""
    before, fields_before = _log.as_json, dict(_log.fields)
    _log.as_json = before if format_ is None else format_ == "json"
    _log.fields = {**fields_before, **fields}
    try:
        yield
    finally:
        _log.as_json, _log.fields = before, fields_before


def bind(**fields: str) -> None:
    """Put `fields` in each line from now on, until the verb ends."""
    _log.fields = {**_log.fields, **fields}


def event(
    name: str, message: str, level: str = "info", file: IO[str] | None = None, **fields: Any
) -> None:
    """Write a line, where logs are JSON; a person is not told.

    Args:
        name: What kind of event it is: `chunk`, `progress`, `message`, ...
        message: In words.
        level: `info` or `error`.
        file: Where to; standard output where None.
        fields: More of it, as JSON can hold it.
    """
    if not _log.as_json:
        return
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "event": name,
        "message": message,
        **_log.fields,
        **fields,
    }
    # One write for each line: threads tell of stalls too.
    text = without_secrets(json.dumps(line, ensure_ascii=False, default=str))
    with _log.lock:
        out = file or sys.stdout
        out.write(text + "\n")
        out.flush()
