"""What a job says of itself to Prometheus: through Ray's metrics agent, at `/metrics` of each node.

The driver counts what is done, from the receipts of chunks: exact, and once for each chunk, where what a task
counts is lost when its process ends before the next report. Actors, which stay, tell batch sizes and memory.
Ray puts `ray_` in front of each name and `_total` behind each counter, and adds labels of its own. Where there is
no agent nothing arrives anywhere, and nothing else changes.

Labels take few values, whatever the input: `output` is the URI of the table (which can hold no credentials), the
others are kinds and stages of this program.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

JOB_LABEL = "output"
# A batch is eight images on a GPU by default, and one on a CPU.
BATCH_BOUNDARIES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric.

    Attributes:
        kind: Of Prometheus.
        help: What it says, with its unit.
        labels: Besides `output`.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


SERIES: Mapping[str, Series] = {
    # The driver's, of what this run has done.
    "segjobs_images": Series(kind="counter", help="Images that have their row, by this run."),
    "segjobs_instances": Series(kind="counter", help="Instances in chunks that were done whole."),
    "segjobs_errors": Series(
        kind="counter", help="Images whose row is in error.", labels=("kind",)
    ),
    "segjobs_chunks": Series(kind="counter", help="Chunks that were written."),
    "segjobs_bytes": Series(
        kind="counter", help="Bytes read from stores and written to them.", labels=("way",)
    ),
    "segjobs_stage_seconds": Series(
        kind="counter",
        help="Seconds that processes have spent on chunks, by stage.",
        labels=("stage",),
    ),
    "segjobs_retries": Series(
        kind="counter", help="Times that a store had to be asked again.", labels=("kind",)
    ),
    "segjobs_images_planned": Series(kind="gauge", help="Images of the plan."),
    "segjobs_images_left": Series(kind="gauge", help="Images that this run has still to do."),
    "segjobs_actors": Series(kind="gauge", help="Copies of the model.", labels=("state",)),
    "segjobs_chunks_under_way": Series(
        kind="gauge", help="Chunks in each stage.", labels=("stage",)
    ),
    "segjobs_run_info": Series(
        kind="gauge", help="Always 1: which run of which model it is.", labels=("run_id", "model")
    ),
    # The actors'.
    "segjobs_batch_images": Series(kind="histogram", help="Images in a batch of the network."),
    "segjobs_memory_bytes": Series(
        kind="gauge",
        help="Memory of an actor: allocated, reserved and peak on cuda, peak of the process on cpu.",
        labels=("device", "kind"),
    ),
}


class Metrics:
    """The metrics of one job in one process."""

    def __init__(self, output: str) -> None:
        """Make them, with the job's output, as its store names it, as their label."""
        self._output = output
        self._made: dict[str, Any] = {}

    def count(self, name: str, number: float, **labels: str) -> None:
        """Count up; 0 is left out, as Ray refuses it."""
        if number > 0:
            self._metric(name).inc(number, self._tags(labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._metric(name).set(value, self._tags(labels))

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._metric(name).observe(value, self._tags(labels))

    def _tags(self, labels: Mapping[str, str]) -> dict[str, str]:
        return {JOB_LABEL: self._output, **labels}

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            series = SERIES[name]
            keys = (JOB_LABEL, *series.labels)
            if series.kind == "histogram":
                made = Histogram(name, series.help, list(BATCH_BOUNDARIES), keys)
            else:
                made = {"counter": Counter, "gauge": Gauge}[series.kind](name, series.help, keys)
            self._made[name] = made
        return self._made[name]
