"""The one table: its types, one image's detections, and how they become rows."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from segmodel import masks
from segmodel import rle as rle_
from segmodel.schema import (
    DETECTION,
    IMAGE,
    PREDICTIONS,
    TRAINING,
    Category,
    Detections,
    Rle,
    detection_rows,
    image_id,
)

CATEGORIES = {
    1: Category(id=18, name="dog", label=1),
    3: Category(id=17, name="cat", label=3),
}


def detections(n: int = 4, **changes: Any) -> Detections:
    """Return n detections on a canvas of 20 x 30, labelled 1, 2, 3, 1, 2, 3, ..."""
    top_left = np.arange(2 * n, dtype=np.float32).reshape(n, 2) / 3
    fields: dict[str, Any] = {
        "boxes_xyxy": np.hstack([top_left, top_left + np.array([7.25, 4.5])]).astype(np.float32),
        "scores": np.linspace(0.9, 0.1, n, dtype=np.float32),
        "labels": np.arange(n, dtype=np.int64) % 3 + 1,
        "mask_probs": np.full((n, 28, 28), 0.75, np.float32),
        "size_hw": (20, 30),
    }
    return Detections(**{**fields, **changes})


def encode(found: Detections) -> list[Rle]:
    assert found.mask_probs is not None
    return masks.encode(found.mask_probs, found.boxes_xyxy, found.size_hw)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    names = {"image_id": "a#b", "shard": "a", "key": "b", "height": 20, "width": 30}
    return pa.Table.from_pylist(
        [{**names, "status": "ok", "error": None, "detections": rows}], schema=PREDICTIONS
    )


def test_columns_are_those_of_the_design() -> None:
    columns = {field.name: (str(field.type), field.nullable) for field in PREDICTIONS}
    detection = columns.pop("detections")
    assert columns == {
        "image_id": ("string", False),
        "shard": ("string", False),
        "key": ("string", False),
        "height": ("int32", True),
        "width": ("int32", True),
        "status": ("string", False),
        "error": ("string", True),
    }
    assert detection[1] is False
    assert PREDICTIONS.field("detections").type == pa.list_(DETECTION)
    assert {field.name: str(field.type) for field in DETECTION} == {
        "category_id": "int32",
        "category": "string",
        "score": "float",
        "bbox": "list<item: float>",
        "area": "float",
        "iscrowd": "int8",
        "segmentation": "struct<size: list<item: int32>, counts: string>",
    }


def test_training_shards_add_an_image_that_datasets_recognises() -> None:
    assert TRAINING.names == [*PREDICTIONS.names, "image"]
    assert TRAINING.field("image").type == IMAGE
    described = json.loads(TRAINING.metadata[b"huggingface"])
    assert described["info"]["features"]["image"] == {"_type": "Image"}


def test_rows_hold_what_was_detected() -> None:
    found = detections()
    rles = encode(found)
    rows = table(detection_rows(found, rles, CATEGORIES))["detections"].to_pylist()[0]
    # Label 2 is a gap.
    assert [row["category_id"] for row in rows] == [18, 17, 18]
    assert [row["category"] for row in rows] == ["dog", "cat", "dog"]
    for row, n in zip(rows, (0, 2, 3), strict=True):
        x0, y0, x1, y1 = found.boxes_xyxy[n]
        assert np.array_equal(np.float32(row["bbox"]), [x0, y0, x1 - x0, y1 - y0])
        assert np.float32(row["score"]) == found.scores[n]
        assert row["segmentation"] == rles[n]
        assert row["area"] == rle_.areas([rles[n]])[0] > 0
        assert row["iscrowd"] == 0


def test_rows_of_boxes_alone_have_no_masks() -> None:
    found = replace(detections(), mask_probs=None)
    rows = table(detection_rows(found, None, CATEGORIES))["detections"].to_pylist()[0]
    assert len(rows) == 3
    assert [row["segmentation"] for row in rows] == [None] * 3
    assert [row["area"] for row in rows] == [None] * 3
    assert rows[0]["bbox"] == [0.0, pytest.approx(1 / 3), 7.25, 4.5]


@pytest.mark.parametrize("with_masks", [True, False])
def test_nothing_found_is_an_empty_list_of_the_right_type(with_masks: bool) -> None:
    rows = detection_rows(detections(0), [] if with_masks else None, CATEGORIES)
    assert rows == []
    assert table(rows).schema == PREDICTIONS
    assert table(rows)["detections"].to_pylist() == [[]]


def test_a_label_without_any_category_leaves_no_row() -> None:
    assert detection_rows(detections(), encode(detections()), {}) == []


def test_a_mask_for_each_detection_is_demanded() -> None:
    with pytest.raises(AssertionError):
        detection_rows(detections(4), encode(detections(3)), CATEGORIES)


def test_tables_survive_parquet(tmp_path: Any) -> None:
    import pyarrow.parquet as pq

    written = table(detection_rows(detections(), encode(detections()), CATEGORIES))
    pq.write_table(written, tmp_path / "rows.parquet")
    read = pq.read_table(tmp_path / "rows.parquet")
    assert read.schema == PREDICTIONS
    assert read.equals(written)


def test_boxes_alone_do_not_wait_for_the_import_of_masks() -> None:
    program = """
import sys
import numpy as np
from segmodel.schema import Category, Detections, detection_rows
found = Detections(
    boxes_xyxy=np.ones((1, 4), np.float32), scores=np.ones(1, np.float32),
    labels=np.ones(1, np.int64), mask_probs=None, size_hw=(9, 9),
)
rows = detection_rows(found, None, {1: Category(id=1, name="a", label=1)})
print(len(rows), *{"numba", "torch", "pycocotools"} & set(sys.modules))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"boxes_xyxy": np.zeros((4, 5), np.float32)},
            r"boxes_xyxy must be .* \(4, 4\), not .* \(4, 5\)",
        ),
        ({"boxes_xyxy": np.zeros((4, 4))}, "boxes_xyxy must be float32 .* not float64"),
        ({"scores": np.zeros((4, 1), np.float32)}, r"scores must be float32 of shape \(4,\), not"),
        (
            {"scores": np.float32(1).reshape(())},
            r"boxes_xyxy must be float32 of shape \(1, 4\), not",
        ),
        ({"scores": np.zeros(4)}, "scores must be float32 .* not float64"),
        ({"labels": np.zeros(3, np.int64)}, r"labels must be int64 of shape \(4,\), not .* \(3,\)"),
        ({"labels": np.zeros(4, np.int32)}, "labels must be int64 .* not int32"),
        ({"mask_probs": np.zeros((4, 28, 27), np.float32)}, r"mask_probs must be .* \(4, 27, 27\)"),
        ({"mask_probs": np.zeros((3, 28, 28), np.float32)}, r"mask_probs must be .* \(4, 28, 28\)"),
        (
            {"mask_probs": np.zeros((4, 28, 28), np.float16)},
            "mask_probs must be float32 .* float16",
        ),
        ({"mask_probs": np.zeros((4, 1, 28, 28), np.float32)}, "mask_probs must be float32"),
        ({"mask_probs": np.zeros((), np.float32)}, "mask_probs must be float32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detections(**changes)


def test_detections_count_and_may_have_no_masks() -> None:
    assert len(detections(3)) == 3
    assert len(detections(0)) == 0
    assert len(replace(detections(3), mask_probs=None)) == 3


def test_image_ids_join_shard_and_key() -> None:
    assert image_id("a/b.tar", "c/d.jpg") == "a/b.tar#c/d.jpg"
