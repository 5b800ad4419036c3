"""A cluster of three nodes, of which one is lost at work: each with a raylet and a store of its own."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from tests.jobs.plain import expected

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

IMAGES, CHUNK_SIZE = 60, 2
DEADLINE_S = 240
STORE_BYTES = 80 * 2**20


# What the command line runs, but for a patience that is shorter.
PROGRAM = "from jobs import stall; stall.CROWDED_S = 3; from jobs.__main__ import main; raise SystemExit(main())"


@pytest.fixture(params=[2, 1], ids=["room for all", "room for one"])
def cpus(request: pytest.FixtureRequest) -> int:
    """Of a node: room for all actors and what feeds them, or for one actor with it, and for two without."""
    return int(request.param)


@pytest.fixture
def cluster(cpus: int, environment: None) -> Iterator[Cluster]:
    """A head that does no work, and two nodes."""
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            # A node that says nothing is given up after 20 s otherwise.
            "_system_config": {
                "health_check_initial_delay_ms": 1000,
                "health_check_period_ms": 1000,
                "health_check_failure_threshold": 5,
            },
        },
    )
    for _ in range(2):
        made.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES)
    yield made
    made.shutdown()


@pytest.fixture
def photos(put_photos: Callable[[int], Path]) -> Path:
    return put_photos(IMAGES)


def with_an_actor(cluster: Cluster) -> Any:
    """Wait until an actor is at work, and return the node that it is on."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for node in cluster.worker_nodes:
            (raylet,) = node.all_processes["raylet"]
            for child in psutil.Process(raylet.process.pid).children():
                # It may end while it is looked at.
                with contextlib.suppress(psutil.Error):
                    if "MapWorker(MapBatches(Predict))" in " ".join(child.cmdline()):
                        return node
        time.sleep(0.1)
    raise AssertionError("no actor came to work")


def test_a_lost_node_costs_nothing(
    cluster: Cluster, cpus: int, photos: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = [
        *(
            sys.executable,
            "-c",
            PROGRAM,
            "predict",
            "--input",
            str(photos),
            "--output",
            str(output),
        ),
        *("--model", str(tiny_bundle), "--chunk-size", str(CHUNK_SIZE), "--max-actors", "2"),
        *("--score-threshold", "0", "--max-detections", "4", "--address", cluster.address),
    ]
    log = tmp_path / "log"
    with log.open("ab") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file)
    deadline = time.monotonic() + DEADLINE_S
    while len(list((output / "predictions").glob("[0-9]*.parquet"))) < 3:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    node = with_an_actor(cluster)
    assert process.poll() is None, "the job was done before a node could be lost: more images"
    cluster.remove_node(node, allow_graceful=False)
    assert process.wait(DEADLINE_S) == 0, log.read_text()

    assert (output / "_SUCCESS").exists()
    rows = sorted(
        pq.read_table(output / "predictions").to_pylist(), key=lambda row: row["image_id"]
    )
    assert [row["key"] for row in rows] == [f"{number:03d}.jpg" for number in range(IMAGES)]
    # The CPUs of both nodes for two actors.
    assert rows == expected(photos, tiny_bundle, threads=cpus)
