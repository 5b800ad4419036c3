import numpy as np
import pycocotools.mask as coco_mask

from tests.bench.agreement import compare, sure


def _found(category: int, score: float, x: int, side: int = 10) -> dict[str, object]:
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[5 : 5 + side, x : x + side] = 1
    rle = coco_mask.encode(mask)
    return {
        "category_id": category,
        "score": score,
        "bbox": [x, 5, side, side],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def test_what_is_the_same_agrees_wholly_empty_masks_too():
    some = [_found(1, 0.9, 3), _found(2, 0.8, 3), _found(1, 0.7, 20), _found(1, 0.6, 30, 0)]
    found = compare([(some, some), ([], [])])
    assert (found.found, found.wanted, found.equal) == (4, 4, 4)
    assert found.ious.tolist() == [1.0] * 4
    assert found.box_pixels.tolist() == [0.0] * 4


def test_no_detection_has_two_partners_and_the_best_score_chooses_first():
    wanted = [_found(1, 0.9, 20)]
    found = compare([([_found(1, 0.5, 20), _found(1, 0.8, 22)], wanted)])
    assert found.box_pixels.tolist() == [2.0]
    assert (found.found, found.equal) == (2, 0)


def test_another_class_and_another_place_are_no_partners_and_count_as_nothing():
    wanted = [_found(1, 0.9, 20), _found(2, 0.9, 40)]
    found = compare([([_found(2, 0.9, 20), _found(2, 0.8, 46)], wanted), ([], wanted)])
    assert found.ious.tolist() == [0.0] * 4
    assert {name: value for name, value, _ in found.figures()} == {
        "share paired one to one": 0.0,
        "median mask IoU, 0 where not paired": 0.0,
    }


def test_the_best_overlap_is_taken_and_measured_by_its_worst_edge():
    wanted = [_found(1, 0.9, 16), _found(1, 0.8, 21)]
    found = compare([([_found(1, 0.9, 20)], wanted)])
    assert found.box_pixels.tolist() == [1.0]
    assert sorted(found.ious.tolist()) == [0.0, 90 / 110]


def test_where_scores_are_low_nothing_is_wanted():
    wanted = [_found(1, 0.9, 16), _found(1, 0.4, 30)]
    found = compare(sure([([_found(1, 0.45, 16)], wanted)]))
    assert (found.found, found.wanted, found.equal) == (1, 1, 1)
    assert not list(compare(sure([([], [_found(1, 0.4, 16)])])).figures())
