"""A cluster of two machines with addresses of their own, started by `ray start`, of which one is lost at work."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from jobs import checkpoints, cluster
from jobs.storage import open_store
from tests.jobs.network import Machine, Network
from tests.jobs.plain import expected
from tests.jobs.test_train_nodes import (
    BATCH_SIZE,
    ENVIRONMENT,
    EPOCHS,
    MAIN,
    NUM_ROWS,
    RECIPE,
    steps_without_a_gap,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

IMAGES, CHUNK_SIZE = 60, 2
DEADLINE_S, TRIES = 500, 5
PORT = 6379
VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "a-token-that-is-long-enough-for-a-test",
    # As the image has them, with less patience: what was sent to a silent node would wait for 7 minutes.
    **dict.fromkeys(re.findall(r"RAY_grpc_\w+", Path("infra/Dockerfile").read_text()), "5000"),
}
# A node that says nothing is given up after 20 s otherwise.
SYSTEM = {
    **cluster.LOCAL["_system_config"],  # type: ignore[dict-item]
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
}
# What the command line runs, but for a patience that is shorter.
PROGRAM = "from jobs import stall; stall.CROWDED_S = 3; from jobs.__main__ import main; raise SystemExit(main())"


@pytest.fixture
def machines(
    environment: None, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Machine, Machine]]:
    """A head of one CPU, and a worker of as many as the test says."""
    with Network() as network:
        head, worker = network.machines
        head_flags = [
            *("--head", "--port", str(PORT), "--include-dashboard", "false"),
            *("--num-cpus", "1", "--system-config", json.dumps(SYSTEM)),
        ]
        start_node(head, head_flags, tmp_path)
        worker_flags = ["--address", f"{head.address}:{PORT}", "--num-cpus", str(request.param)]
        start_node(worker, worker_flags, tmp_path)
        yield head, worker


def start_node(machine: Machine, flags: list[str], folder: Path) -> None:
    """Run `ray start` on a machine until the node is there."""
    log = folder / f"{machine.name}.log"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", *flags),
        *("--node-ip-address", machine.address, "--object-store-memory", str(80 * 2**20)),
        *("--temp-dir", str(machine.folder)),
    ]
    # A node gives its agents 15 s to start, which a crowded machine passes.
    for _ in range(TRIES):
        if machine.start(command, log, VARIABLES).wait(DEADLINE_S) == 0:
            return
        machine.end()
    raise AssertionError(log.read_text())


def actors(machine: Machine) -> list[str]:
    """Return the titles of actors that hold their model there."""
    titles = []
    for process in machine.processes():
        try:
            titles.append(" ".join(process.cmdline()))
        except psutil.Error:
            # It ended while we looked.
            continue
    wanted = "MapWorker(MapBatches(Predict))"
    return [title for title in titles if wanted in title and "__init__" not in title]


@pytest.fixture
def photos(put_photos: Callable[[int], Path]) -> Path:
    return put_photos(IMAGES)


# Of three actors the head has room for two.
@pytest.mark.parametrize("machines", [2], indirect=True)
def test_a_machine_that_falls_silent_costs_nothing(
    machines: tuple[Machine, Machine], photos: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    head, worker = machines
    output, log = tmp_path / "out", tmp_path / "log"
    command = [
        *(sys.executable, "-c", PROGRAM, "predict", "--input", str(photos)),
        *("--output", str(output), "--model", str(tiny_bundle), "--chunk-size", str(CHUNK_SIZE)),
        *("--min-actors", "3", "--max-actors", "3", "--score-threshold", "0"),
        *("--max-detections", "4", "--address", f"{head.address}:{PORT}"),
    ]
    job = head.start(command, log, VARIABLES)
    deadline = time.monotonic() + DEADLINE_S
    while len(list((output / "predictions").glob("[0-9]*.parquet"))) < 3 or not actors(worker):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    worker.lose()
    assert not worker.processes()
    assert job.poll() is None, "the job was done before the machine was lost: more images"
    assert job.wait(DEADLINE_S) == 0, log.read_text()

    assert (output / "_SUCCESS").exists()
    rows = sorted(
        pq.read_table(output / "predictions").to_pylist(), key=lambda row: row["image_id"]
    )
    assert rows == expected(photos, tiny_bundle, threads=1)


# Room for one worker on each.
@pytest.mark.parametrize("machines", [1], indirect=True)
def test_a_training_over_the_network_goes_on_with_the_machine_that_is_left(
    machines: tuple[Machine, Machine],
    put_packed: Callable[..., object],
    tmp_path: Path,
) -> None:
    head, worker = machines
    output, log = tmp_path / "out", tmp_path / "log"
    put_packed(open_store(str(tmp_path / "packed")), NUM_ROWS)
    command = [
        *(sys.executable, "-c", MAIN, "train", "--train", str(tmp_path / "packed")),
        *("--output", str(output), "--workers", "1..2", "--batch-size", str(BATCH_SIZE)),
        *("--epochs", str(EPOCHS), "--optimizer", RECIPE.optimizer, "--checkpoint-every", "3"),
        *("--learning-rate", str(RECIPE.learning_rate)),
        *("--warmup-epochs", str(RECIPE.warmup_epochs), "--proposals-per-image", "64"),
        *("--min-size", "64", "--max-size", "96", "--address", f"{head.address}:{PORT}"),
    ]
    job = head.start(command, log, {**VARIABLES, **ENVIRONMENT})
    deadline = time.monotonic() + DEADLINE_S
    while not checkpoints.last(open_store(str(output))):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    worker.lose()
    assert job.wait(DEADLINE_S) == 0, log.read_text()
    said = log.read_text()
    assert "2 workers at work, from step 0" in said
    assert "1 worker at work, from step" in said
    assert (output / "bundle" / "model.safetensors").exists()
    images = [round(point["images"]) for point in steps_without_a_gap(output)]
    assert {images[0], images[-1]} == {2 * BATCH_SIZE, BATCH_SIZE}
