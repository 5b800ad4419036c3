"""Processes that are killed: the driver at random moments, readers, writers, actors at work. Nothing is lost or doubled."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from segmodel import scenes
from tests.jobs import ray_processes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

# Enough chunks that a fast machine is not done before the last process was killed.
IMAGES, CHUNK_SIZE = 120, 2
KILLS = 3
DEADLINE_S = 180


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        Image.fromarray(scenes.scene(number, (96, 128)).image).save(folder / f"{number:03d}.png")
    return folder


def start(photos: Path, output: Path, model: Path) -> "subprocess.Popen[bytes]":
    """Start the command line in a process of its own, on the tests' Ray."""
    arguments = [
        *(sys.executable, "-m", "jobs", "predict", "--input", str(photos), "--output", str(output)),
        *("--model", str(model), "--chunk-size", str(CHUNK_SIZE), "--max-actors", "1"),
        *("--score-threshold", "0", "--max-detections", "4"),
        *("--address", ray.get_runtime_context().gcs_address),
    ]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)


def finished(output: Path) -> int:
    return len(list((output / "predictions").glob("[0-9]*.parquet")))


def wait(process: "subprocess.Popen[bytes]", output: Path) -> None:
    code = process.wait(DEADLINE_S)
    assert code == 0, output.with_suffix(".log").read_text()


def rows_of(output: Path) -> list[dict[str, Any]]:
    return sorted(
        pq.read_table(output / "predictions").to_pylist(), key=lambda row: row["image_id"]
    )


@pytest.fixture(scope="module")
def undisturbed(
    ray_local: Any, photos: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    wait(start(photos, output, tiny_bundle), output)
    return rows_of(output)


def wait_for_chunks(process: "subprocess.Popen[bytes]", output: Path, chunks: int) -> None:
    """Wait until so many chunks are finished, or the job is."""
    deadline = time.monotonic() + DEADLINE_S
    while finished(output) < chunks and process.poll() is None:
        assert time.monotonic() < deadline, output.with_suffix(".log").read_text()
        time.sleep(0.02)


def wait_for_actors(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Wait until an actor is at work, and return those that are."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None, "the job was done before its actor could be killed"
        assert time.monotonic() < deadline
        if actors := ray_processes.actors():
            return actors
        time.sleep(0.02)


def at_work_on(process: "subprocess.Popen[bytes]", name: str) -> psutil.Process:
    """Wait until a task of that name is at work, by the title that Ray gives its process."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert process.poll() is None, f"the job was done before {name} could be killed"
        assert time.monotonic() < deadline
        if found := ray_processes.titled(name):
            return found[0]
        time.sleep(0.005)


def test_killed_processes_and_ctrl_c_cost_nothing(
    undisturbed: list[dict[str, Any]], photos: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(20261123)
    output = tmp_path / "out"
    for _ in range(KILLS):
        process = start(photos, output, tiny_bundle)
        # Some die before their first chunk, while they plan or wait for the actor; most amid the
        # work.
        more = int(rng.integers(0, 4))
        if more:
            wait_for_chunks(process, output, finished(output) + more)
        time.sleep(rng.uniform(0, 0.15) if more else rng.uniform(0.5, 3))
        assert process.poll() is None, "the job was done before it could be killed: more images"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (output / "_SUCCESS").exists()
    killed_at = finished(output)
    assert 0 < killed_at < IMAGES / CHUNK_SIZE

    process = start(photos, output, tiny_bundle)
    wait_for_chunks(process, output, killed_at + 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 130
    said = " ".join(output.with_suffix(".log").read_text().split())
    done = finished(output)
    assert killed_at < done < IMAGES / CHUNK_SIZE
    assert f"Stopped: {CHUNK_SIZE * done} of {IMAGES} images are done. Run the same command" in said
    assert "Traceback" not in said
    assert not (output / "_SUCCESS").exists()

    process = start(photos, output, tiny_bundle)
    # Readers run ahead: when the first chunk is written, all may have been read.
    for name in ("ReadChunks", "ReadChunks", "MapBatches(encode_and_write)"):
        at_work_on(process, name).kill()
    actors: set[int] = set()
    for chunks in (1, 6):
        wait_for_chunks(process, output, done + chunks)
        for actor in wait_for_actors(process):
            actors.add(actor.pid)
            actor.kill()
    wait(process, output)
    assert len(actors) >= 2
    assert (output / "_SUCCESS").exists()
    rows = rows_of(output)
    assert len(rows) == len({row["image_id"] for row in rows}) == IMAGES
    assert rows == undisturbed
