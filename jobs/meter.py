"""What the driver of a job tells Prometheus: what is done, from receipts, and what is under way."""

import threading
from collections import Counter
from types import TracebackType
from typing import Self

from jobs import retries, stall, traffic
from jobs.encode import Receipt
from jobs.metrics import Metrics

# Ray hands on what it was told every ten seconds.
LOOK_EVERY_S = 5.0


class Meter:
    """Counts receipts; while it is open, it looks at the pipeline too, so that a stall is seen as one."""

    def __init__(self, metrics: Metrics, planned: int, left: int) -> None:
        """Make one.

        Args:
            metrics: Of this job.
            planned: Images of the plan.
            left: Images that this run has to do.
        """
        self._metrics, self._planned, self._left = metrics, planned, left
        # What other processes have asked again and moved is added to the driver's own before it is told.
        self._told: dict[str, Counter[str]] = {"retries": Counter(), "bytes": Counter()}
        self._states: set[str] = set()
        self._stages: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def introduce(self, run_id: str, model_digest: str) -> None:
        """Tell which run it is."""
        self._metrics.set("segjobs_run_info", 1, run_id=run_id, model=model_digest[:12])

    def add(self, receipt: Receipt) -> None:
        """Count a chunk that was written."""
        metrics, counts = self._metrics, receipt.counts
        self._left -= receipt.rows
        metrics.count("segjobs_chunks", 1)
        metrics.count("segjobs_images", receipt.rows)
        if receipt.rows == counts.images:
            # Of a chunk whose errors were retried, most were counted before.
            metrics.count("segjobs_instances", counts.detections)
        for kind, number in counts.errors.items():
            metrics.count("segjobs_errors", number, kind=kind)
        for stage, seconds in receipt.seconds.items():
            metrics.count("segjobs_stage_seconds", seconds, stage=stage)

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        metrics, seen = self._metrics, stall.seen
        metrics.set("segjobs_images_planned", self._planned)
        metrics.set("segjobs_images_left", self._left)
        actors, under_way = seen.actors, {**seen.under_way, "alone": len(seen.alone)}
        # What was there before and is not any more is none now, and not what it was.
        self._states |= actors.keys()
        self._stages |= under_way.keys()
        for state in self._states:
            metrics.set("segjobs_actors", actors.get(state, 0), state=state)
        for stage in self._stages:
            metrics.set("segjobs_chunks_under_way", under_way.get(stage, 0), stage=stage)
        self._tell("retries", "segjobs_retries", retries.so_far(), "kind")
        self._tell("bytes", "segjobs_bytes", traffic.so_far(), "way")

    def _tell(self, what: str, name: str, so_far: Counter[str], label: str) -> None:
        for value, number in (so_far - self._told[what]).items():
            self._metrics.count(name, number, **{label: value})
        self._told[what] = so_far
