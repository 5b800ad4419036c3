from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import plan, status, write
from jobs.config import StatusConfig
from jobs.detect import look
from jobs.plan import Cut, PlanError
from jobs.storage import open_store
from jobs.store import Store
from segmodel.schema import PREDICTIONS

CHUNKS, PER_CHUNK = 10, 3


def put(output: Store, number: int, failed: int) -> None:
    """A finished chunk of three images; the first `failed` are in error."""
    names = {"image_id": "a", "shard": "", "key": "a", "detections": []}
    rows = [
        {**names, "status": "error", "error": "corrupt: no"}
        if n < failed
        else {**names, "status": "ok", "error": None}
        for n in range(PER_CHUNK)
    ]
    table = pa.Table.from_pylist(rows, PREDICTIONS)
    write.put_chunk(output, f"{number:08d}", table, {})


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "s3":
        bucket = request.getfixturevalue("bucket")
        return bucket.uri, bucket.endpoint_url
    return str(tmp_path), None


@pytest.fixture
def output(root: Any) -> Store:
    """The output of a job of ten chunks of three images, none of them finished."""
    uri, endpoint = root
    source, made = (open_store(f"{uri}/{name}", endpoint) for name in ("in", "out"))
    for n in range(CHUNKS * PER_CHUNK):
        source.put(f"{n:03d}.jpg", b"1")
    cut = Cut(chunk_size=PER_CHUNK, limit=None, image_column=None, endpoint_url=endpoint)
    plan.freeze(made, plan.make(look(f"{uri}/in", "auto", endpoint), {}, cut, made))
    return made


@pytest.fixture
def said(root: Any, output: Store, capsys: pytest.CaptureFixture[str]) -> Any:
    """`said()`: what `status` prints, by the name of the line."""

    def say() -> dict[str, str]:
        assert status.run(StatusConfig(output=f"{root[0]}/out", endpoint_url=root[1])) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        return {line[:12].strip(): line[12:].strip() for line in lines if line.strip()}

    return say


def test_a_job_that_was_only_planned(said: Any) -> None:
    found = said()
    assert found["planned"] == "30 images in 10 chunks"
    assert found["done"] == "0 images in 0 chunks"
    assert found["failed"] == "0 images (done, with an error in their row)"
    assert found["left"] == "30 images in 10 chunks"
    assert found["state"] == "planned; no chunk is finished yet"


def test_a_job_under_way(said: Any, output: Store) -> None:
    for number in range(4):
        put(output, number, failed=number % 2)
    # Of no plan: what someone copied there.
    put(output, 77, failed=3)
    found = said()
    assert found["done"] == "12 images in 4 chunks"
    assert found["failed"] == "2 images (done, with an error in their row)"
    assert found["left"] == "18 images in 6 chunks"
    assert found["state"].startswith("under way, the last chunk")


def test_failures_among_many_chunks_are_estimated(
    said: Any, output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        put(output, number, failed=1 if number < 4 else 0)
    monkeypatch.setattr(status, "MOST_FOOTERS", 4)
    asked: list[str] = []
    read_counts = write.read_counts

    def counted(output: Store, names: list[str]) -> Any:
        asked.extend(names)
        return read_counts(output, names)

    monkeypatch.setattr(write, "read_counts", counted)
    found = said()
    # Every second one: two of the four that are looked at have one of three rows in error.
    assert asked == [f"{number:08d}" for number in (0, 2, 4, 6)]
    assert found["failed"] == "about 4 images, from 4 of the chunks (exact when all is done)"
    assert found["done"] == "24 images in 8 chunks"


def test_failures_of_a_finished_job_stand_in_its_manifest(
    said: Any, output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(CHUNKS):
        put(output, number, failed=1)
    counts = {"images": 30, "detections": 0, "errors": {"corrupt": 7, "empty": 3}, "more": 1}
    write.put_marks(output, {"counts": counts})
    monkeypatch.delattr(write, "read_footers")
    found = said()
    assert found["failed"] == "10 images (done, with an error in their row)"
    assert found["left"] == "0 images in 0 chunks"
    assert found["state"] == "finished: _SUCCESS is there"


def test_no_job_at_all(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"there is no plan at .*nothing: check the path"):
        status.run(StatusConfig(output=str(tmp_path / "nothing")))
