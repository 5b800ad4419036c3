"""Draw the dashboard's panels of a real job: `python -m tests.infra.draw_dashboard docs/dashboard.png`.

Scenes of the demo lie on the tests' S3 server, which makes some trouble; a job predicts them, a real Prometheus
scrapes its node, and each panel is drawn where the dashboard has it, from what its expressions give.
Needs the program `prometheus` (Debian's package).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import matplotlib.pyplot as plt
import numpy as np
from moto.server import ThreadedMotoServer

from jobs import demo, scene_shards
from jobs.console import duration, size
from tests.conftest import ENVIRONMENT
from tests.jobs import prometheus
from tests.jobs.fault_server import FaultServer, status
from tests.jobs.test_metrics import PROGRAM

SCENES, PER_SHARD, COLUMNS, CELL_INCHES = 160, 16, 24, 0.62
# What Grafana's units are in words.
UNITS = {
    "short": lambda value: f"{value:,.4g}",
    "s": duration,
    "percentunit": lambda value: f"{value:.2%}",
    "Bps": lambda value: f"{size(value)}/s",
    "bytes": size,
}


def run_job(folder: Path) -> Iterator[tuple[prometheus.Server, float]]:
    """Run a job that is scraped, and yield who knows of it, and when it began."""
    os.environ.update(ENVIRONMENT)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    behind = "http://{}:{}".format(*server.get_host_and_port())
    store = boto3.client("s3", endpoint_url=behind)
    store.create_bucket(Bucket="scenes")
    scene_shards.make(folder, range(SCENES), PER_SHARD)
    for path in sorted((folder / "shards").iterdir()):
        store.upload_file(str(path), "scenes", f"shards/{path.name}")
    for number in range(3):
        store.put_object(Bucket="scenes", Key=f"shards/{number}.tar", Body=b"no tar")
    port, began = prometheus.free_port(), time.time()
    with FaultServer(behind) as faults:
        for skip in (40, 90, 150):
            faults.on("GET", r"\.tar", status(503), times=3, skip=skip)
        command = [
            *(sys.executable, "-c", PROGRAM, str(port), "predict", "--input", "s3://scenes/shards"),
            *("--output", "s3://scenes/table", "--model", str(demo.MODEL), "--max-actors", "1"),
            *("--chunk-size", "4", "--endpoint-url", faults.url, "--log-format", "json"),
        ]
        driver = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        known = prometheus.Server(folder, f"127.0.0.1:{port}")
        assert driver.stdout is not None
        assert any(line == "exit code 0\n" for line in driver.stdout)
        # Two more reports and scrapes.
        time.sleep(8)
        yield known, began
        driver.communicate()
        known.stop()
    server.stop()


def draw(axes: Any, panel: dict[str, Any], known: prometheus.Server, began: float) -> None:
    """Draw one panel: a number, lines over the seconds of the job, or rows."""
    axes.set_title(panel["title"], fontsize=9, loc="left")
    say = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
    found = [
        (_legend(target["legendFormat"], series["metric"]), np.array(series["values"], float))
        for target in panel["targets"]
        for series in known.drawn(prometheus.filled(target["expr"]), began)
    ]
    if panel["type"] == "timeseries":
        for name, values in found:
            axes.plot(values[:, 0] - began, values[:, 1], label=name, linewidth=1.2)
        axes.yaxis.set_major_formatter(lambda value, _: say(value))
        axes.tick_params(labelsize=6)
        axes.set_xlim(0, time.time() - began)
        axes.legend(fontsize=6, loc="upper left")
        return
    axes.set_axis_off()
    # Of what can be told: a share of nothing is none.
    told = [(name, values[~np.isnan(values[:, 1]), 1]) for name, values in found]
    lines = [name if panel["type"] == "table" else f"{say(values[-1])}" for name, values in told]
    large = panel["type"] == "stat"
    axes.text(0.02, 0.5, "\n".join(lines), fontsize=18 if large else 7, va="center")


def _legend(pattern: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    return pattern


def main() -> None:
    """Write the picture."""
    panels = json.loads(prometheus.DASHBOARD.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(COLUMNS * CELL_INCHES, rows * CELL_INCHES), dpi=80)
    with tempfile.TemporaryDirectory() as folder:
        for known, began in run_job(Path(folder)):
            for panel in panels:
                x, y, w, h = (panel["gridPos"][name] for name in "xywh")
                place = (
                    (x + 1.2) / COLUMNS,
                    1 - (y + h - 0.6) / rows,
                    (w - 1.6) / COLUMNS,
                    (h - 1.6) / rows,
                )
                draw(figure.add_axes(place), panel, known, began)
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
