"""Detections of one image against its truth, as COCO matches them.

`judge` is pycocotools' COCOeval.evaluateImg for all area ranges and IoU thresholds at once, with
its ways among ties, crowds and annotations that do not count. There is one exception: pycocotools notes
a match by the annotation's id, and so takes a match with the id 0 for none. Ids play no part here.
https://github.com/cocodataset/cocoapi/blob/master/PythonAPI/pycocotools/cocoeval.py
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Bools: TypeAlias = npt.NDArray[np.bool_]
Float64: TypeAlias = npt.NDArray[np.float64]
Item: TypeAlias = Mapping[str, Any]  # a value of the `detections` column
Records: TypeAlias = npt.NDArray[np.void]  # of RECORD

# COCOeval's Params.setDetParams, the linspace included: arange would give other last digits.
IOU_THRESHOLDS: Float64 = np.linspace(0.5, 0.95, 10)  # T of them
AREA_NAMES = ("all", "small", "medium", "large")  # A of them
AREA_RANGES: Float64 = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
MAX_DETECTIONS = (1, 10, 100)  # M of them, for each image and category

_A, _T = len(AREA_RANGES), len(IOU_THRESHOLDS)
_BITS = np.dtype((np.uint8, _A * _T // 8))
# One detection. `rank` is its place by score among those of its image and category; the bits say,
# for each area range and IoU threshold, whether it is a true (tp) or a false (fp) positive.
RECORD = np.dtype(
    [
        ("image", np.int32),
        ("category", np.int32),
        ("rank", np.uint8),
        ("score", np.float64),
        ("box_tp", _BITS),
        ("box_fp", _BITS),
        ("mask_tp", _BITS),
        ("mask_fp", _BITS),
    ]
)


def match(annotations: Sequence[Item], detections: Sequence[Item], *, masks: bool) -> Records:
    """Match the detections of one image and category by boxes, and by masks where all have one.

    Returns:
        A record for each detection, at most 100, best first, without `image` and `category`.
    """
    best = sorted(detections, key=lambda item: -item["score"])[: MAX_DETECTIONS[-1]]
    records = np.zeros(len(best), RECORD)
    records["rank"] = np.arange(len(best))
    records["score"] = [item["score"] for item in best]
    ignored = ~counting(annotations)
    crowd = np.array([item["iscrowd"] for item in annotations], np.bool_)

    # COCO.loadRes: a detection's area is that of its box for boxes, and that of its mask for masks.
    boxes = np.array([item["bbox"] for item in best], np.float64).reshape(-1, 4)
    truth_boxes = np.array([item["bbox"] for item in annotations], np.float64).reshape(-1, 4)
    outside = _outside(boxes[:, 2] * boxes[:, 3])
    tp, fp = judge(pairwise_iou(boxes, truth_boxes, crowd), ignored, crowd, outside)
    records["box_tp"], records["box_fp"] = _pack(tp), _pack(fp)
    if masks:
        rles = [item["segmentation"] for item in best]
        truth_rles = [item["segmentation"] for item in annotations]
        outside = _outside(coco_mask.area(rles))
        tp, fp = judge(pairwise_iou(rles, truth_rles, crowd), ignored, crowd, outside)
        records["mask_tp"], records["mask_fp"] = _pack(tp), _pack(fp)
    return records


def counting(annotations: Sequence[Item]) -> Bools:
    """Say which annotations count in which area range: (A, G). Crowds never do."""
    crowd = np.array([item["iscrowd"] for item in annotations], np.bool_)
    return ~(crowd | _outside(np.array([item["area"] for item in annotations], np.float64)))


def unpack(bits: npt.NDArray[np.uint8]) -> Bools:
    """Unpack (N, 5) uint8 of a record to (N, A, T)."""
    return np.unpackbits(bits, axis=1).reshape(-1, _A, _T).astype(np.bool_)


def _pack(flags: Bools) -> npt.NDArray[np.uint8]:
    return np.packbits(flags.reshape(-1, _A * _T), axis=1)


def _outside(areas: Float64) -> Bools:
    """Say of which area ranges areas are out: (N,) pixels -> (A, N)."""
    low, high = AREA_RANGES[:, :1], AREA_RANGES[:, 1:]
    return (areas < low) | (areas > high)


def pairwise_iou(detections: Any, annotations: Any, crowd: Bools) -> Float64:
    """Return the IoU of D detections with G annotations, all boxes xywh or all RLE: (D, G).

    With a crowd it is, as COCO has it, the part of the detection that lies within.
    """
    if len(detections) == 0 or len(annotations) == 0:  # pycocotools gives a list then
        return np.zeros((len(detections), len(annotations)))
    ious: Float64 = coco_mask.iou(detections, annotations, crowd.astype(np.uint8))
    return ious


def judge(ious: Float64, ignored: Bools, crowd: Bools, outside: Bools) -> tuple[Bools, Bools]:
    """Match the detections of one image and category with its truth, best score first.

    Each takes the free annotation of highest IoU at or above the threshold, the last one among
    equals, and an ignored one only where there is no other. Crowds are never used up.

    Args:
        ious: (D, G) float64, detections in descending order of score; G annotations.
        ignored: (A, G), which annotations do not count: crowds and those out of the area range.
        crowd: (G,), which are crowds.
        outside: (A, D), which detections are out of the area range; unmatched, they do not count.

    Returns:
        True and false positives, each (D, A, T); neither where the detection does not count.
    """
    num_areas, num_thresholds = len(ignored), len(IOU_THRESHOLDS)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    matched = np.zeros((len(ious), num_areas, num_thresholds), np.bool_)
    uncounted = np.zeros_like(matched)
    free = np.ones((num_areas, num_thresholds, len(crowd)), np.bool_)
    for d, near in enumerate(ious >= thresholds[0]):
        columns = np.flatnonzero(near)[::-1]  # reversed, so that argmax finds the last of equals
        if len(columns) == 0:
            continue
        iou = ious[d, columns]
        allowed = free[:, :, columns] & (iou >= thresholds[:, None])
        counting = allowed & ~ignored[:, None, columns]
        candidates = np.where(counting.any(axis=2, keepdims=True), counting, allowed)
        best = columns[np.where(candidates, iou, -1.0).argmax(axis=2)]
        matched[d] = candidates.any(axis=2)
        area, threshold = np.nonzero(matched[d])
        taken = best[area, threshold]
        free[area, threshold, taken] = crowd[taken]
        uncounted[d, area, threshold] = ignored[area, taken]
    uncounted |= ~matched & outside.T[:, :, None]
    return matched & ~uncounted, ~matched & ~uncounted
