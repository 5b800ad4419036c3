"""Rows of a table of predictions packed with their images."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from segmodel.schema import PREDICTIONS, TRAINING

pytestmark = pytest.mark.ray

SIZE_HW = (24, 32)
CATEGORIES = {7: "cat", 2: "dog"}
Place = tuple[Path, list[dict[str, Any]]]


def detection(score: float | None, category_id: int = 7) -> dict[str, Any]:
    return {
        "category_id": category_id,
        "category": CATEGORIES[category_id],
        "score": score,
        "bbox": [1, 2, 3, 4],
        "area": 12,
        "iscrowd": 0,
        "segmentation": {"size": list(SIZE_HW), "counts": "f04d1"},
    }


def row(number: int, *detections: dict[str, Any], error: str | None = None) -> dict[str, Any]:
    return {
        "image_id": f"x/{number % 3}#{number}.jpg",
        "shard": f"x/{number % 3}",
        "key": f"{number}.jpg",
        "height": None if error else SIZE_HW[0],
        "width": None if error else SIZE_HW[1],
        "status": "error" if error else "ok",
        "error": error,
        "detections": list(detections),
    }


@pytest.fixture
def place(ray_local: None, tmp_path: Path, jpeg: Callable[..., bytes]) -> Place:
    """Twenty loose images, and rows of 17 of them, one in error and one without detections."""
    for number in range(20):
        path = tmp_path / "in" / "x" / f"{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, SIZE_HW))
    rows = [row(n, detection(0.5 + n / 40), detection(0.25, 2)) for n in range(15)]
    rows += [row(15), row(16, error="truncated: cut")]
    return tmp_path, rows


def put_table(root: Path, rows: list[dict[str, Any]], schema: pa.Schema = PREDICTIONS) -> None:
    """Write rows in another order than the images', over two files of several row groups."""
    folder = root / "table" / "deep"
    folder.mkdir(parents=True, exist_ok=True)
    shuffled = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))]
    for name, part in (("a", shuffled[:6]), ("b", shuffled[6:])):
        table = pa.Table.from_pylist(part, schema)
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=4)


def pack(root: Path, *more: str) -> int:
    places = ["--images", str(root / "in"), "--output", str(root / "out")]
    return main(["pack", *places, "--predictions", str(root / "table"), "--shard-size", "4", *more])


def packed_rows(root: Path) -> dict[str, dict[str, Any]]:
    shards = sorted((root / "out" / "shards").iterdir())
    assert all(pq.read_schema(shard).equals(TRAINING) for shard in shards)
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row for row in rows}


def test_rows_get_their_images(place: Place, jpeg: Callable[..., bytes]) -> None:
    root, rows = place
    put_table(root, rows)
    assert pack(root) == 0
    found = packed_rows(root)
    expected = pa.Table.from_pylist(rows, PREDICTIONS).to_pylist()
    assert found.keys() == {row["image_id"] for row in rows}
    for one in expected:
        image = found[one["image_id"]].pop("image")
        assert found[one["image_id"]] == one
        number = int(one["key"][:-4])
        assert image == (
            None if number == 16 else {"bytes": jpeg(number, SIZE_HW), "path": one["key"]}
        )
    manifest = json.loads((root / "out" / "_manifest.json").read_text())
    assert manifest["categories"] == [{"id": 2, "name": "dog"}, {"id": 7, "name": "cat"}]
    assert manifest["counts"] == {
        "images": 17,
        "detections": 30,
        "errors": {"truncated": 1},
        "crowds": 0,
        "without_detections": 1,
        "left_out": 3,
        "detections_of_failed": 0,
    }


def test_a_threshold_drops_detections_not_rows(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    root, rows = place
    rows[15]["detections"] = [detection(None)]
    put_table(root, rows)
    assert pack(root, "--score-threshold", "0.7") == 0
    found = packed_rows(root)
    assert len(found) == 17
    # 0.5 + 8 / 40 is 0.7, in float32 a little less; truth has no score and stays.
    kept = {int(row["key"][:-4]) for row in found.values() if row["detections"]}
    assert kept == {*range(8, 15), 15}
    assert pack(root, "--score-threshold", "0.6") == 1
    assert "score_threshold was 0.7 and is now 0.6" in capsys.readouterr().err


def test_categories_that_nothing_has_stay(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    root, rows = place
    put_table(root, rows)
    known = [{"id": 2, "name": "dog"}, {"id": 5, "name": "newt"}, {"id": 7, "name": "cat"}]
    manifest = root / "table" / "_manifest.json"
    manifest.write_text(json.dumps({"categories": known}))
    assert pack(root) == 0
    assert json.loads((root / "out" / "_manifest.json").read_text())["categories"] == known

    known[0]["name"] = "hound"
    manifest.write_text(json.dumps({"categories": known}))
    assert pack(root, "--output", str(root / "other")) == 1
    assert "category 2 is 'hound' and 'dog'" in " ".join(capsys.readouterr().err.split())


def test_a_packed_set_is_a_table_too(place: Place) -> None:
    root, rows = place
    put_table(root, [{**row, "image": {"bytes": b"old", "path": ""}} for row in rows], TRAINING)
    assert pack(root) == 0
    assert b"old" not in {
        row["image"]["bytes"] for row in packed_rows(root).values() if row["image"]
    }


def test_only_lost_shards_are_packed_again(place: Place) -> None:
    root, rows = place
    put_table(root, rows)
    assert pack(root) == 0
    shards = sorted((root / "out" / "shards").iterdir())
    before = {path.name: path.read_bytes() for path in shards}
    times = {path.name: path.stat().st_mtime_ns for path in shards}
    shards[1].unlink()
    assert pack(root) == 0
    after = sorted((root / "out" / "shards").iterdir())
    assert {path.name: path.read_bytes() for path in after} == before
    written = {path.name for path in after if path.stat().st_mtime_ns != times[path.name]}
    assert written == {shards[1].name}


def test_an_image_that_broke_is_a_row_in_error(place: Place) -> None:
    root, rows = place
    put_table(root, rows)
    (root / "in" / "x" / "2" / "2.jpg").write_bytes(b"")
    assert pack(root) == 0
    bad = packed_rows(root)["x/2#2.jpg"]
    assert (bad["status"], bad["detections"], bad["image"]) == ("error", [], None)
    assert bad["error"].startswith("empty: ")


def renamed(rows: list[dict[str, Any]]) -> None:
    for number in range(2):
        rows[number]["image_id"] = f"gone#{number}"


REFUSED: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    r"2 of the 17 rows of .* have no image among the 20 at .*'gone#[01]', 'gone#[01]'": renamed,
    "1 rows of .* are of an image that has another row: 'x/1#4.jpg'": lambda rows: rows.append(
        rows[4]
    ),
    "category 7 is '(cat|dog)' and '(cat|dog)'": lambda rows: rows[3]["detections"].append(
        detection(0.5) | {"category": "dog"}
    ),
    r"image 'x/2#5.jpg' has 24 x 32 pixels .* its record says 32 x 24": lambda rows: rows[5].update(
        height=32, width=24
    ),
    "none of the 20 images .* has a record": lambda rows: rows.clear(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_named(
    message: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    root, rows = place
    REFUSED[message](rows)
    put_table(root, rows)
    assert pack(root) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (root / "out" / "_SUCCESS").exists()


def test_tables_that_cannot_be_joined_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    root, rows = place
    put_table(root, rows)
    (root / "table" / "_plan.json").write_text("{}")
    assert pack(root) == 1
    assert "is not finished" in capsys.readouterr().err
    (root / "table" / "_plan.json").unlink()
    (root / "table" / "c.parquet").write_bytes(b"PAR1")
    assert pack(root) == 1
    assert re.search(r"c\.parquet cannot be read", capsys.readouterr().err)
    pq.write_table(pa.table({"image_id": ["a"]}), root / "table" / "c.parquet")
    assert pack(root) == 1
    assert re.search(r"c\.parquet is not in the one schema", capsys.readouterr().err)


def test_a_table_that_changed_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    root, rows = place
    put_table(root, rows)
    assert pack(root) == 0
    put_table(root, rows[:-1])
    assert pack(root) == 1
    assert "predictions_digest was" in capsys.readouterr().err
