"""A cluster as the manifests make it: a head without CPUs, and a worker that comes when the job is there already."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

IMAGES, DEADLINE_S = 12, 500
STORE_BYTES = 80 * 2**20
PROGRAM = "from jobs.__main__ import main; raise SystemExit(main())"


@pytest.fixture
def cluster(environment: None) -> Iterator[Cluster]:
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        # Else processes are stopped and started again, and each imports torch.
        "_system_config": {"idle_worker_killing_time_threshold_ms": 600_000},
    }
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def test_a_job_that_is_there_before_its_worker_ends_well(
    cluster: Cluster, jpeg: Callable[..., bytes], tiny_bundle: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(IMAGES):
        (photos / f"{number:03d}.jpg").write_bytes(jpeg(number, (60, 80)))
    output = tmp_path / "out"
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        driver = subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, "predict", "--address", cluster.address),
                *("--input", str(photos), "--output", str(output), "--model", str(tiny_bundle)),
                *("--chunk-size", "2", "--max-actors", "1", "--stall-warning", "30"),
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        while not (output / "_plan.json").exists():
            assert driver.poll() is None, log.read_text()
            time.sleep(0.2)
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(DEADLINE_S)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0, log.read_text()
    manifest = json.loads((output / "_manifest.json").read_text())
    assert manifest["pool"]["threads"] is None
    assert manifest["run"]["busy"].keys() == {"read", "decode", "network", "encode", "write"}
    assert (output / "_SUCCESS").exists()
