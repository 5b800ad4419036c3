"""The table of measurements, `results.csv`: a row for each figure, with commit and hardware."""

import csv
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.csv")
# What has changed besides the table itself.
CHANGES = ("diff", "--stat", "HEAD", "--", ".", ":!tests/bench/results.csv")
QUICK_FLAGS = ("avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
COLUMNS = ("date", "commit", "hardware", "benchmark", "case", "measure", "value", "unit", "note")


def add(benchmark: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows of case, measure, value, unit and note, and print them."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            whole = {**_circumstances(), "benchmark": benchmark, **row}
            writer.writerow(whole)
            print(" ".join(f"{whole.get(name, '')}" for name in COLUMNS[3:]))


def _circumstances() -> dict[str, str]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git(*CHANGES) else ""),
        "hardware": _hardware(),
    }


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _hardware() -> str:
    """Name the processor, and what of it decides how quick networks are: the name alone does not say."""
    if not (told := Path("/proc/cpuinfo")).exists():
        return platform.processor()
    lines = [line.partition(":") for line in told.read_text().splitlines()]
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    flags = {flag for key, _, value in lines if key.strip() == "flags" for flag in value.split()}
    has = " ".join(flag for flag in QUICK_FLAGS if flag in flags)
    return f"{len(names)} x {names[0]}{has and f' ({has})'}" if names else platform.processor()
