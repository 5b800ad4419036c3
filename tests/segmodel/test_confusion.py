import pickle
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from segmodel.confusion import BACKGROUND, Confusion

SIZE = 40, 60
Row = dict[str, Any]


def instance(category: int, bbox: tuple[int, ...], score: float | None = None, **of: Any) -> Row:
    """A rectangle, xywh in whole pixels."""
    x, y, w, h = bbox
    bitmap = np.zeros(SIZE, np.uint8, order="F")
    bitmap[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(bitmap)
    mask = {"size": list(SIZE), "counts": rle["counts"].decode()}
    made = {"category_id": category, "score": score, "bbox": list(map(float, bbox))}
    return made | {"area": float(w * h), "iscrowd": 0, "segmentation": mask} | of


def row(*instances: Row, **of: Any) -> Row:
    return {"image_id": "#i", "status": "ok", "detections": list(instances)} | of


def counts(truth: list[Row], found: list[Row], threshold: float = 0.5) -> dict[Any, int]:
    confusion = Confusion(threshold)
    confusion.add(row(*truth), row(*found))
    return dict(confusion.counts)


def test_hit_mix_up_miss_and_background() -> None:
    truth = [
        instance(1, (0, 0, 10, 10)),
        instance(2, (20, 0, 10, 10)),
        instance(1, (40, 0, 10, 10)),
    ]
    found = [
        instance(1, (0, 0, 10, 10), 0.9),
        instance(1, (20, 1, 10, 10), 0.8),
        instance(2, (0, 20, 10, 10), 0.7),
    ]
    assert counts(truth, found) == {(1, 1): 1, (2, 1): 1, (1, BACKGROUND): 1, (BACKGROUND, 2): 1}


@pytest.mark.parametrize(("width", "hit"), [(10, True), (5, True), (4, False)])
def test_an_overlap_of_half_is_enough(width: int, hit: bool) -> None:
    found = counts([instance(1, (0, 0, 10, 10))], [instance(1, (0, 0, width, 10), 0.9)])
    assert found == ({(1, 1): 1} if hit else {(1, BACKGROUND): 1, (BACKGROUND, 1): 1})


@pytest.mark.parametrize(("score", "counted"), [(0.49, False), (0.5, True), (0.51, True)])
def test_the_threshold_itself_counts(score: float, counted: bool) -> None:
    one = (0, 0, 10, 10)
    found = counts([instance(1, one)], [instance(1, one, score)])
    assert found == ({(1, 1): 1} if counted else {(1, BACKGROUND): 1})


def test_the_best_score_chooses_first_whatever_the_categories() -> None:
    truth = [instance(1, (0, 0, 10, 10))]
    found = [instance(1, (0, 0, 10, 10), 0.6), instance(2, (0, 0, 10, 9), 0.8)]
    assert counts(truth, found) == {(1, 2): 1, (BACKGROUND, 1): 1}


def test_the_nearest_annotation_is_taken_and_only_once() -> None:
    truth = [instance(1, (0, 0, 10, 10)), instance(2, (0, 2, 10, 10))]
    found = [instance(3, (0, 2, 10, 10), 0.9), instance(3, (0, 2, 10, 10), 0.8)]
    assert counts(truth, found) == {(2, 3): 1, (1, 3): 1}
    assert counts(truth[1:], found) == {(2, 3): 1, (BACKGROUND, 3): 1}


def test_among_equals_the_own_category_is_taken() -> None:
    truth = [instance(1, (0, 0, 10, 10)), instance(2, (0, 0, 10, 10))]
    assert counts(truth, [instance(2, (0, 0, 10, 10), 0.9)]) == {(2, 2): 1, (1, BACKGROUND): 1}


def test_crowds_are_ignored() -> None:
    crowd = instance(1, (0, 0, 40, 20), iscrowd=1)
    inside = [instance(1, (x, 0, 10, 10), 0.9) for x in (0, 10, 20)]
    half, outside = instance(2, (35, 0, 10, 10), 0.9), instance(2, (38, 0, 10, 10), 0.9)
    assert counts([crowd], [*inside, half, outside]) == {(BACKGROUND, 2): 1}
    within = instance(2, (0, 0, 10, 10))
    assert counts([crowd, within], inside[:1]) == {(2, 1): 1}


def test_masks_decide_and_boxes_where_one_has_no_mask() -> None:
    truth = instance(1, (0, 0, 10, 10))
    other_mask = instance(1, (30, 30, 5, 5), 0.9) | {"bbox": truth["bbox"]}
    assert counts([truth], [other_mask]) == {(1, BACKGROUND): 1, (BACKGROUND, 1): 1}
    assert counts([truth], [other_mask | {"segmentation": None}]) == {(1, 1): 1}


def test_nothing_missing_and_failed() -> None:
    confusion = Confusion()
    confusion.add(row(), row())
    assert not confusion.counts
    confusion.add(row(instance(1, (0, 0, 5, 5))), None)
    confusion.add(row(instance(1, (0, 0, 5, 5))), row(status="error"))
    confusion.add(row(), row(instance(4, (0, 0, 5, 5), 0.9)))
    assert confusion.counts == {(1, BACKGROUND): 2, (BACKGROUND, 4): 1}


def test_parts_are_merged_and_laid_out() -> None:
    one = (0, 0, 10, 10)
    first, second = Confusion(0.3), Confusion(0.3)
    first.add(row(instance(7, one)), row(instance(7, one, 0.4)))
    second.add(row(instance(7, one)), row(instance(2, one, 0.4)))
    second.add(row(instance(7, one)), row(instance(7, one, 0.4), instance(2, one, 0.2)))
    first.merge(pickle.loads(pickle.dumps(second)))
    matrix = first.matrix([2, 7, 9])
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[0, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert Confusion().matrix([]).tolist() == [[0]]
