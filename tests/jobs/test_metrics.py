"""A real job, scraped: what dashboard and alerts ask for is what Ray's metrics agent serves."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.metrics import SERIES
from tests.conftest import S3
from tests.jobs import prometheus
from tests.jobs.fault_server import FaultServer, status

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

IMAGES, DEADLINE_S = 24, 60
ACCOUNT = prometheus.INFRA / "grafana/README.md"
# A driver with a Ray of its own that serves metrics; it stays until its standard input is closed.
PROGRAM = """
import sys, ray
from jobs import cluster, meter
from jobs.__main__ import main

cluster.quieten()
meter.LOOK_EVERY_S = 0.5
ray.init(
    address="local", num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20,
    log_to_driver=False, logging_level="ERROR", _metrics_export_port=int(sys.argv[1]),
    _system_config={**cluster.LOCAL["_system_config"], "metrics_report_interval_ms": 2000},
)
print("exit code", main(sys.argv[2:]), flush=True)
sys.stdin.read()
"""


@dataclass
class Scraped:
    """What a job has served.

    Attributes:
        output: Of the job.
        said: What its driver logged.
        values: The last value of each series of ours: by name, and by its labels.
        server: A real Prometheus that has scraped it; None where none is installed.
        since: When it began.
    """

    output: str
    said: list[dict[str, Any]]
    values: dict[str, dict[frozenset[tuple[str, str]], float]]
    server: prometheus.Server | None
    since: float

    def value(self, name: str, **wanted: str) -> float:
        """Return the sum over all series that have these labels."""
        found = self.values.get(f"ray_{name}", {})
        return sum(v for labels, v in found.items() if wanted.items() <= dict(labels).items())

    def labels(self, name: str) -> set[str]:
        """Return the labels that all series of a name have."""
        return set.intersection(*({key for key, _ in labels} for labels in self.values[name]))


@pytest.fixture(scope="module")
def scraped(
    s3: S3,
    tiny_bundle: Path,
    jpeg: Callable[..., bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scraped]:
    """A job over 24 images, of which one is none, on a store that twice refuses to serve one."""
    bucket = s3.bucket()
    for number in range(IMAGES - 1):
        bucket.store("in").put(f"{number:02d}.jpg", jpeg(number, (48, 64)))
    bucket.store("in").put("99.jpg", b"<html>no image</html>")
    port = prometheus.free_port()
    found = Scraped(f"{bucket.uri}/out", [], {}, None, time.time())
    with FaultServer(s3.endpoint_url) as faults:
        faults.on("GET", "in/03.jpg", status(503), times=2)
        command = [
            *(sys.executable, "-c", PROGRAM, str(port), "predict", "--input", f"{bucket.uri}/in"),
            *("--output", found.output, "--model", str(tiny_bundle)),
            *("--endpoint-url", faults.url, "--chunk-size", "2", "--max-actors", "1"),
            *("--max-detections", "3", "--score-threshold", "0", "--log-format", "json"),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        driver = subprocess.Popen(command, text=True, **pipes)
        try:
            if prometheus.is_installed("prometheus"):
                folder = tmp_path_factory.mktemp("prometheus")
                found.server = prometheus.Server(folder, f"127.0.0.1:{port}")
            _follow(driver, port, found)
            yield found
        finally:
            driver.communicate()
            if found.server is not None:
                found.server.stop()


def _follow(driver: "subprocess.Popen[str]", port: int, found: Scraped) -> None:
    """Scrape the driver's node, and read what it says, until its job is done and all has been told."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(2):
            # The agent comes some seconds after the node.
            with contextlib.suppress(OSError):
                text = prometheus.get(f"http://127.0.0.1:{port}/metrics")
                for name, labels, value in prometheus.samples(text):
                    found.values.setdefault(name, {})[frozenset(labels.items())] = value

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("exit code"):
                assert line == "exit code 0\n", found.said[-5:]
                break
            found.said.append(json.loads(line))
        else:
            raise AssertionError(f"the driver died: {found.said[-5:]}")
        deadline = time.monotonic() + DEADLINE_S
        while found.value("segjobs_images_total") < IMAGES and time.monotonic() < deadline:
            time.sleep(0.5)
        # Two more scrapes of the server's, behind the last report.
        time.sleep(6)
    finally:
        over.set()
        thread.join()


def test_the_numbers_are_those_of_the_job(scraped: Scraped) -> None:
    job = {"output": scraped.output}
    assert scraped.value("segjobs_images_total", **job) == IMAGES
    assert scraped.value("segjobs_chunks_total", **job) == IMAGES / 2
    assert scraped.value("segjobs_instances_total", **job) == 3 * (IMAGES - 1)
    assert scraped.value("segjobs_errors_total", kind="unknown_format", **job) == 1
    assert scraped.value("segjobs_retries_total", kind="503", **job) == 2
    assert scraped.value("segjobs_images_planned", **job) == IMAGES
    assert scraped.value("segjobs_images_left", **job) == 0
    assert scraped.value("segjobs_run_info", **job) == 1
    assert scraped.value("segjobs_batch_images_count", **job) > 0
    assert scraped.value("segjobs_memory_bytes", device="cpu", **job) > 100 * 2**20
    for way in ("read", "written"):
        assert scraped.value("segjobs_bytes_total", way=way, **job) > 10_000
    for stage in ("read", "predict", "encode", "write"):
        assert scraped.value("segjobs_stage_seconds_total", stage=stage, **job) > 0


def test_each_metric_arrives_with_its_labels_and_no_more(scraped: Scraped) -> None:
    suffixes = {"counter": "_total", "gauge": "", "histogram": "_count"}
    for name, series in SERIES.items():
        labels = scraped.labels(f"ray_{name}{suffixes[series.kind]}")
        ours = {label for label in labels if label.islower() and not label.startswith("otel_")}
        assert ours == {"output", *series.labels}, name


@pytest.mark.parametrize("name", ["images/", ".jpg", "test-secret-key", "test-key-id"])
def test_no_label_has_a_key_or_a_secret(scraped: Scraped, name: str) -> None:
    for values in scraped.values.values():
        assert not any(name in value for labels in values for _, value in labels)


def asked() -> list[tuple[str, str]]:
    """What the dashboard's panels and the alerts ask."""
    return [
        *((title, asks) for title, expressions in prometheus.panels() for asks in expressions),
        *prometheus.alerts(),
    ]


def test_what_panels_and_alerts_ask_for_is_served(scraped: Scraped) -> None:
    for title, expression in asked():
        for name, labels in prometheus.used(expression).items():
            assert name in scraped.values, f"{title}: nothing is called {name}"
            missing = labels - scraped.labels(name)
            assert not missing, f"{title}: {name} has no {missing}"


def test_each_panel_draws_something(scraped: Scraped) -> None:
    prometheus.needed("prometheus")
    assert scraped.server is not None
    for title, expressions in prometheus.panels():
        for expression in expressions:
            drawn = scraped.server.drawn(expression, scraped.since)
            assert drawn, f"{title}: {expression} gives nothing"
            assert any(value != "NaN" for series in drawn for _, value in series["values"]), title
    (group,) = scraped.server.ask("rules")["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == {
        name: "ok" for name, _ in prometheus.alerts()
    }


def test_the_account_of_the_panels_is_what_was_scraped(scraped: Scraped) -> None:
    account = ACCOUNT.read_text()
    for title, expressions in prometheus.panels():
        names = sorted({name for asks in expressions for name in prometheus.used(asks)})
        row = f"| {title} | {', '.join(f'`{name}`' for name in names)} |"
        assert row in account, f"{ACCOUNT.name} lacks: {row}"
    for name, series in SERIES.items():
        assert f"| `{name}` | {series.kind} |" in account


def test_the_log_has_run_and_chunk_in_its_lines(scraped: Scraped) -> None:
    chunks = [line for line in scraped.said if line["event"] == "chunk"]
    assert sorted(line["chunk_id"] for line in chunks) == [f"{n:08d}" for n in range(IMAGES // 2)]
    (run_id,) = {line["run_id"] for line in chunks}
    info = dict(next(iter(scraped.values["ray_segjobs_run_info"])))
    assert info["run_id"] == run_id
    assert {line["verb"] for line in scraped.said} == {"predict"}
    assert sum(line["images"] for line in chunks) == IMAGES
    assert scraped.said[-1]["event"] == "facts"
    assert scraped.said[-1]["facts"]["instances"] == str(3 * (IMAGES - 1))
