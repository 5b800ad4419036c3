"""The semantic view of instances: the best score wins, and Pillow reads it back."""

import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segmodel import class_map

SIZE = (20, 30)


def detection(category_id: int, score: float | None, top: int, bottom: int) -> dict[str, object]:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[top:bottom, 3:9] = 1
    rle = coco_mask.encode(mask)
    segmentation = {"size": list(SIZE), "counts": rle["counts"].decode()}
    return {"category_id": category_id, "score": score, "segmentation": segmentation}


def test_the_best_score_wins_whatever_the_order() -> None:
    low, high = detection(7, 0.4, 0, 10), detection(9, 0.8, 5, 15)
    for both in ([low, high], [high, low]):
        found = class_map.paint(both, {7: 1, 9: 2}, SIZE)
        assert (found[0:5, 3:9] == 1).all()
        assert (found[5:15, 3:9] == 2).all()
        assert (found == 0).sum() == 20 * 30 - 15 * 6


@pytest.mark.parametrize("score", [0.5, None])
def test_of_equal_scores_the_first_wins(score: float | None) -> None:
    both = [detection(7, score, 0, 10), detection(9, score, 5, 15)]
    found = class_map.paint(both, {7: 1, 9: 2}, SIZE)
    assert (found[0:10, 3:9] == 1).all()
    assert (found[10:15, 3:9] == 2).all()


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask is of size"):
        class_map.paint([detection(7, 0.5, 0, 10)], {7: 1}, (21, 30))


def test_pillow_reads_classes_and_colours_back() -> None:
    classes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.open(io.BytesIO(class_map.png(classes)))
    assert image.mode == "P"
    assert (np.array(image) == classes).all()
    assert (np.array(image.convert("RGB")) == class_map.palette()[classes]).all()


def test_colours_are_those_of_pascal_voc() -> None:
    first = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    assert class_map.palette()[:6].tolist() == first
    assert len(np.unique(class_map.palette(), axis=0)) == 256
