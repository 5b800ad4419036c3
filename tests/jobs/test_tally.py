import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import tally, write
from jobs.storage import open_store
from jobs.store import Store
from segmodel.schema import PREDICTIONS


@pytest.fixture
def output(tmp_path: Path) -> Store:
    """Five finished chunks; number n has n rows, the first in error."""
    made = open_store(str(tmp_path))
    for number in range(1, 6):
        names = {"image_id": "a", "shard": "", "key": "a", "detections": []}
        rows: list[dict[str, Any]] = [{**names, "status": "error", "error": "empty: no"}]
        rows += [{**names, "status": "ok", "error": None}] * (number - 1)
        table = pa.Table.from_pylist(rows, PREDICTIONS)
        write.put_chunk(made, f"{number}", table, {"run_id": f"r{number}"})
    return made


@pytest.mark.ray
@pytest.mark.parametrize("per_task", [1, 2, 5])
def test_footers_are_read_in_tasks_where_they_are_many(
    ray_local: None, output: Store, monkeypatch: pytest.MonkeyPatch, per_task: int
) -> None:
    monkeypatch.setattr(tally, "FOOTERS_PER_TASK", per_task)
    names = ["4", "1", "5", "2", "3"]
    found = tally.read_counts(output, names)
    assert {name: (counts.images, counts.failed) for name, counts in found.items()} == {
        name: (int(name), 1) for name in names
    }
    footers = tally.read_footers(output, names)
    assert {name: facts["run_id"] for name, facts in footers.items()} == {
        name: f"r{name}" for name in names
    }


@pytest.mark.ray
def test_many_are_not_read_by_the_driver(
    ray_local: None, output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*_: Any) -> dict[str, Any]:
        return {"pid": os.getpid()}

    monkeypatch.setattr(write, "read_counts", here)
    assert tally.read_counts(output, ["1", "2"])["pid"] == os.getpid()
    monkeypatch.setattr(tally, "FOOTERS_PER_TASK", 1)
    assert tally.read_counts(output, ["1", "2"])["pid"] != os.getpid()
