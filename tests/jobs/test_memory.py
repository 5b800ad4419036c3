"""Ray ends processes of a node whose memory runs out: an image is not to blame for what others use."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.jobs.plain import expected

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

IMAGES = 4
# What comes behind the end of a JPEG is no part of the picture.
VICTIM, HUNGRY = b"this one meets a hungry neighbour", b"this one is hungry"

# A job on a Ray that allows 3 GiB more than what is used when it begins.
PROGRAM = """
import os, pathlib, sys, threading, time
import numpy as np, psutil, ray
from jobs import cluster, pipeline, supervisor
from jobs.__main__ import main
from jobs.actor import Predict

met, marks, arguments = pathlib.Path(sys.argv[1]), [m.encode() for m in sys.argv[2:4]], sys.argv[4:]
memory = psutil.virtual_memory()
least = memory.available - 3 * 2**30
ray.init(
    address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
    log_to_driver=False, logging_level="ERROR",
    _system_config={
        **cluster.LOCAL["_system_config"],
        "memory_usage_threshold": 1 - least / memory.total, "memory_monitor_refresh_ms": 100,
    },
)

def eat(until):
    held = []
    while not until():
        if psutil.virtual_memory().available > least - 2**29:
            held.append(np.ones(2**23))
        else:
            time.sleep(0.02)

def neighbour():
    while not met.exists() or not met.read_text():
        time.sleep(0.05)
    # Ray may end idle processes first.
    victim = psutil.Process(int(met.read_text()))
    eat(lambda: not victim.is_running() or victim.status() == "zombie")

def disturbed(class_, alone):
    class Disturbed(class_):
        def __init__(self, *of):
            import jobs.actor as here
            honest = here.decode_reduced

            def decode(data, *more):
                if marks[0] in data and alone and not met.exists():
                    met.write_text(str(os.getpid()))
                    time.sleep(600)
                if marks[1] in data:
                    eat(lambda: False)
                return honest(data, *more)

            here.decode_reduced = decode
            super().__init__(*of)
    return Disturbed

threading.Thread(target=neighbour, daemon=True).start()
pipeline.Predict, supervisor.Alone = disturbed(Predict, False), disturbed(supervisor.Alone, True)
supervisor.MEMORY_WAITS_S = (1.0, 2.0, 4.0)
sys.exit(main(arguments))
"""


def test_memory_that_others_take_costs_no_row(
    jpeg: Callable[..., bytes], tiny_bundle: Path, tmp_path: Path
) -> None:
    photos, output, met = tmp_path / "photos", tmp_path / "out", tmp_path / "met"
    photos.mkdir()
    for number in range(IMAGES):
        mark = {1: VICTIM, 2: HUNGRY}.get(number, b"")
        (photos / f"{number}.jpg").write_bytes(jpeg(number, (60, 80)) + mark)
    arguments = [
        *("predict", "--input", str(photos), "--output", str(output), "--model", str(tiny_bundle)),
        *("--score-threshold", "0", "--max-detections", "4", "--max-actors", "1"),
    ]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(met), VICTIM, HUNGRY, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert met.exists()
    rows = pq.read_table(output / "predictions").to_pylist()
    wanted = expected(photos, tiny_bundle, threads=2)
    assert [row["key"] for row in rows] == [row["key"] for row in wanted]
    assert [rows[n] for n in (0, 1, 3)] == [wanted[n] for n in (0, 1, 3)]
    assert rows[2]["error"] == (
        "memory: Ray ended the process, since its node ran out of memory, 4 times, with nothing else of this "
        "job at work"
    )
