"""`make fuzz`: both targets side by side under libFuzzer for some minutes, and what came of it.

python -m tests.fuzz MINUTES [FOLDER]: what is found stays in the folder and is where the next run
goes on. Fails where an input crashed or hung a target, or where its memory grew without end.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz import corpus

SEEDS = {"image": corpus.images, "tar": corpus.tars}
# No seed takes a hundredth of this; a busy machine may stop a process for seconds.
HANG_S = 120
# Both processes hold about 160 MiB at their start.
RSS_LIMIT_MB = 1024
_STATE = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/\S+ .*rss: (\d+)Mb")


def start(target: str, minutes: float, folder: Path) -> subprocess.Popen[bytes]:
    """Start a target on its seeds and on what earlier runs have found."""
    inputs = folder / target
    inputs.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS[target]().items():
        (inputs / f"seed-{name}").write_bytes(data)
    options = {
        "max_total_time": round(60 * minutes),
        "max_len": 20_000,
        "timeout": HANG_S,
        "rss_limit_mb": RSS_LIMIT_MB,
        "artifact_prefix": folder / f"{target}-",
    }
    command = [sys.executable, "-m", "tests.fuzz.one", target, str(inputs)]
    command += [f"-{name}={value}" for name, value in options.items()]
    with (folder / f"{target}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=lambda: os.nice(19)
        )


def describe(target: str, log: str) -> str:
    """Say how far a target came: executions, coverage and memory, at the start and at the end."""
    states = [tuple(map(int, found.groups())) for found in _STATE.finditer(log)]
    if not states:
        return f"{target}: did not start\n{log[-2000:]}"
    first, last = states[0], states[-1]
    return (
        f"{target}: {last[0]:,} executions; edges {first[1]} -> {last[1]}, features {first[2]} -> "
        f"{last[2]}, inputs {first[3]} -> {last[3]}; memory {first[4]} -> {last[4]} MiB"
    )


def main() -> int:
    """Run both targets; return how many failed."""
    minutes = float(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "build/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    under_way = {target: start(target, minutes, folder) for target in SEEDS}
    failed = 0
    for target, process in under_way.items():
        code = process.wait()
        print(describe(target, (folder / f"{target}.log").read_text(errors="replace")))
        if code:
            failed += 1
            print(f"{target} FAILED: see {folder}/{target}.log and the input {folder}/{target}-*")
    return failed


if __name__ == "__main__":
    sys.exit(main())
