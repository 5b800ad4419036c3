import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segmodel import matching


def plain_best(ious, order, ignored, taken, threshold):
    """Find the annotation of one detection as the innermost loop of COCOeval.evaluateImg does."""
    iou, best = min(threshold, 1 - 1e-10), -1
    for g in order:
        if g in taken:
            continue
        if best > -1 and not ignored[best] and ignored[g]:
            break
        if ious[g] < iou:
            continue
        iou, best = ious[g], g
    return best


def plain_judge(ious, ignored, crowd, outside):
    """COCOeval.evaluateImg, loop for loop."""
    shape = len(ious), len(ignored), len(matching.IOU_THRESHOLDS)
    tp, fp = np.zeros(shape, bool), np.zeros(shape, bool)
    for a in range(shape[1]):
        order = np.argsort(ignored[a], kind="stable")
        for t, threshold in enumerate(matching.IOU_THRESHOLDS):
            taken = set()
            for d in range(shape[0]):
                best = plain_best(ious[d], order, ignored[a], taken, threshold)
                if best > -1 and not crowd[best]:
                    taken.add(best)
                counts = not (ignored[a, best] if best > -1 else outside[a, d])
                tp[d, a, t], fp[d, a, t] = counts and best > -1, counts and best == -1
    return tp, fp


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 2**32))
def test_judge_is_the_plain_loop(num_found, num_truth, seed):
    rng = np.random.default_rng(seed)
    ious = rng.choice([0, 0.4999, *matching.IOU_THRESHOLDS, 1], (num_found, num_truth))
    crowd = rng.random(num_truth) < 0.3
    ignored = crowd | (rng.random((4, num_truth)) < 0.4)
    outside = rng.random((4, num_found)) < 0.4
    judged = matching.judge(ious, ignored, crowd, outside)
    for mine, plain in zip(judged, plain_judge(ious, ignored, crowd, outside), strict=True):
        np.testing.assert_array_equal(mine, plain)


@pytest.mark.parametrize(
    ("area", "counts_in"),
    [(0, [1, 1, 0, 0]), (1024, [1, 1, 1, 0]), (9216, [1, 0, 1, 1]), (9216.5, [1, 0, 0, 1])],
)
def test_area_ranges_include_both_ends(area, counts_in):
    annotation = {"area": area, "iscrowd": 0}
    assert matching.counting([annotation]).ravel().tolist() == [bool(c) for c in counts_in]
    assert not matching.counting([annotation | {"iscrowd": 1}]).any()


def test_only_the_hundred_best_are_kept_in_order():
    scores = np.random.default_rng(0).permutation(130) // 2
    found = [{"score": s, "bbox": [0, 0, 9, 9], "segmentation": None} for s in scores.tolist()]
    records = matching.match([], found, masks=False)
    assert records["score"].tolist() == sorted(scores.tolist(), reverse=True)[:100]
    assert records["rank"].tolist() == list(range(100))
    false_everywhere = matching.unpack(records["box_fp"]).all(axis=(0, 2))
    assert false_everywhere.tolist() == [True, True, False, False]  # the area is 81
    assert not records["mask_fp"].any()
