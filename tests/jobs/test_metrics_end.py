"""What a driver tells last arrives, although it ends at once: the alert that drivers are gone goes by it."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.jobs import prometheus

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

REPORTS_EVERY_S, DEADLINE_S = 10, 60
OUTPUT = "s3://bucket/table"
# A job of three images: when the test has seen them, they are done, and the process ends, before the next report is due.
PROGRAM = f"""
import sys
from jobs import cluster
from jobs.encode import Receipt
from jobs.meter import Meter
from jobs.metrics import Metrics
from jobs.write import Counts

cluster.connect(sys.argv[1])
with Meter(Metrics("{OUTPUT}"), planned=3, left=3) as meter:
    sys.stdin.read()
    counts = Counts(images=3, detections=0, errors={{}})
    meter.add(Receipt(chunk_id="00000000", rows=3, counts=counts, seconds={{}}, retries={{}}))
"""


@pytest.fixture
def port(environment: None) -> Iterator[tuple[str, int]]:
    """The address of a head that outlives its drivers, and the port of its metrics."""
    number = prometheus.free_port()
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 80 * 2**20,
            "metrics_export_port": number,
            "_system_config": {"metrics_report_interval_ms": 1000 * REPORTS_EVERY_S},
        },
    )
    yield made.address, number
    made.shutdown()


def left(port: int) -> list[float]:
    """Return the images left that the node tells of."""
    # The agent comes some seconds after the node.
    with contextlib.suppress(OSError):
        found = prometheus.samples(prometheus.get(f"http://127.0.0.1:{port}/metrics"))
        return [value for name, _, value in found if name == "ray_segjobs_images_left"]
    return []


def test_a_driver_that_ends_has_told_that_nothing_is_left(port: tuple[str, int]) -> None:
    driver = subprocess.Popen([sys.executable, "-c", PROGRAM, port[0]], stdin=subprocess.PIPE)
    try:
        while left(port[1]) != [3]:
            assert driver.poll() is None
            time.sleep(0.2)
        driver.communicate(timeout=DEADLINE_S)
    finally:
        driver.kill()
    assert driver.returncode == 0
    # Ray keeps a gauge for two reports, of ten seconds by default, and Prometheus looks every fifteen.
    assert left(port[1]) == [0]
