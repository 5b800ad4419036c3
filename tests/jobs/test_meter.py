from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest

from jobs import retries, stall, traffic
from jobs.encode import Receipt
from jobs.meter import Meter
from jobs.metrics import SERIES, Metrics
from jobs.write import Counts

RECEIPT = Receipt(
    chunk_id="00000001",
    rows=4,
    counts=Counts(images=4, detections=9, errors={"empty": 1, "truncated": 2}),
    seconds={"read": 0.5, "predict": 2.0},
    retries={},
)


class Recorder(Metrics):
    """Keeps what it is told, by name and labels; refuses what Ray would."""

    def __init__(self) -> None:
        super().__init__("s3://bucket/out")
        self.values: Counter[tuple[str, ...]] = Counter()

    def count(self, name: str, number: float, **labels: str) -> None:
        assert number >= 0
        self.values[self._key(name, "counter", labels)] += number  # type: ignore[assignment]

    def set(self, name: str, value: float, **labels: str) -> None:
        self.values[self._key(name, "gauge", labels)] = value  # type: ignore[assignment]

    def _key(self, name: str, kind: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        series = SERIES[name]
        assert (series.kind, set(series.labels)) == (kind, labels.keys())
        return (name.removeprefix("segjobs_"), *labels.values())


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    retries.forget()
    traffic.forget()
    yield Recorder()
    retries.forget()
    traffic.forget()


def test_receipts_are_counted(recorder: Recorder) -> None:
    with Meter(recorder, planned=100, left=50) as meter:
        meter.introduce("run", "0123456789abcdef")
        meter.add(RECEIPT)
        meter.add(replace(RECEIPT, chunk_id="00000002", seconds={"alone": 3.0}))
    assert recorder.values["images",] == 8
    assert recorder.values["instances",] == 18
    assert recorder.values["chunks",] == 2
    assert recorder.values["errors", "truncated"] == 4
    assert recorder.values["stage_seconds", "alone"] == 3
    assert recorder.values["stage_seconds", "predict"] == 2
    assert recorder.values["images_planned",] == 100
    assert recorder.values["images_left",] == 42
    assert recorder.values["run_info", "run", "0123456789ab"] == 1


def test_instances_of_a_retried_chunk_are_not_counted_twice(recorder: Recorder) -> None:
    with Meter(recorder, planned=4, left=3) as meter:
        meter.add(replace(RECEIPT, rows=3))
    assert recorder.values["images",] == 3
    assert recorder.values["instances",] == 0
    assert recorder.values["errors", "empty"] == 1
    assert recorder.values["images_left",] == 0


def test_what_was_asked_again_and_moved_is_told_once(recorder: Recorder) -> None:
    retries.add({"503": 2})
    with Meter(recorder, planned=4, left=4):
        traffic.add({"read": 10, "written": 5})
        retries.add({"503": 1, "timeout": 4})
    assert recorder.values["retries", "503"] == 3
    assert recorder.values["retries", "timeout"] == 4
    assert recorder.values["bytes", "read"] == 10
    assert recorder.values["bytes", "written"] == 5


def test_what_is_gone_is_zero(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stall.Seen({"read": 3}, {"alive": 2}, {"00000001": 0})
    monkeypatch.setattr(stall, "seen", seen)
    with Meter(recorder, planned=4, left=4):
        assert recorder.values["chunks_under_way", "read"] == 3
        assert recorder.values["chunks_under_way", "alone"] == 1
        assert recorder.values["actors", "alive"] == 2
        seen.under_way, seen.actors, seen.alone = {}, {}, {}
    assert recorder.values["chunks_under_way", "read"] == 0
    assert recorder.values["chunks_under_way", "alone"] == 0
    assert recorder.values["actors", "alive"] == 0
