"""How two ways to predict agree: their detections in pairs, one to one, and how far apart the pairs are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco_mask

# Values of the `detections` column: category_id, score, bbox (xywh) and segmentation count here.
Detections = Sequence[Mapping[str, Any]]
# What was found in an image, and what was wanted.
Pair = tuple[Detections, Detections]
# What overlaps less is another thing that was found, not the same one seen otherwise.
LEAST_IOU = 0.5
# Lower scores are where roundings decide what is kept at all.
SURE_SCORE = 0.5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What was found against what was wanted.

    Attributes:
        found: How many detections there are.
        equal: How many pairs have masks of the same bytes.
        ious: Of the masks, for each wanted detection; 0 where it has no partner.
        box_pixels: For each pair, how far the edge of a box is off, the worst of four.
    """

    found: int
    equal: int
    ious: npt.NDArray[np.float64]
    box_pixels: npt.NDArray[np.float64]

    @property
    def wanted(self) -> int:
        return len(self.ious)

    @property
    def median_iou(self) -> float:
        return float(np.median(self.ious)) if self.wanted else float("nan")

    def __str__(self) -> str:
        return (
            f"{self.equal} of {self.wanted} masks to the byte, {len(self.box_pixels)} paired, "
            f"{self.found} found, median IoU {self.median_iou:.4f}"
        )

    def figures(self) -> Iterator[tuple[str, float, str]]:
        """Yield measure, value and unit."""
        if self.wanted:
            yield "share paired one to one", len(self.box_pixels) / self.wanted, "share"
            yield "median mask IoU, 0 where not paired", self.median_iou, "IoU"
        if len(self.box_pixels):
            yield "median box difference", float(np.median(self.box_pixels)), "pixels"
            yield "largest box difference", float(self.box_pixels.max()), "pixels"


def sure(pairs: Sequence[Pair]) -> list[Pair]:
    """Leave out of what was wanted whatever scores low."""
    return [(some, [one for one in wanted if one["score"] >= SURE_SCORE]) for some, wanted in pairs]


def compare(pairs: Sequence[Pair]) -> Agreement:
    """Pair the detections of each image.

    Within a class each of what was found takes, best score first, the free one of what was wanted whose
    mask overlaps most, and among equals the one with the best score.
    """
    found = equal = 0
    ious: list[float] = []
    off: list[float] = []
    for some, wanted in pairs:
        found += len(some)
        for category in {one["category_id"] for one in wanted}:
            ours, theirs = (_of(category, each) for each in (some, wanted))
            overlaps = _ious(ours, theirs)
            of_theirs = np.zeros(len(theirs))
            for a, b in _pairs(overlaps):
                of_theirs[b] = overlaps[a, b]
                off.append(float(np.abs(_edges(ours[a]) - _edges(theirs[b])).max()))
                equal += _counts(ours[a]) == _counts(theirs[b])
            ious += of_theirs.tolist()
    return Agreement(found=found, equal=equal, ious=np.array(ious), box_pixels=np.array(off))


def _of(category: int, detections: Detections) -> Detections:
    return sorted(
        (one for one in detections if one["category_id"] == category),
        key=lambda one: -one["score"],
    )


def _pairs(ious: npt.NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    free = np.ones(ious.shape[1], np.bool_)
    for number, row in enumerate(ious):
        allowed = np.where(free, row, -1.0)
        best = int(allowed.argmax())
        if allowed[best] >= LEAST_IOU:
            free[best] = False
            yield number, best


def _ious(ours: Detections, theirs: Detections) -> npt.NDArray[np.float64]:
    if not ours:
        return np.zeros((0, len(theirs)))
    rles = ([one["segmentation"] for one in some] for some in (ours, theirs))
    ious: npt.NDArray[np.float64] = coco_mask.iou(*rles, [0] * len(theirs))
    # Of two empty masks it is 0.
    same = np.equal.outer([_counts(one) for one in ours], [_counts(one) for one in theirs])
    return np.where(same, 1.0, ious)


def _counts(detection: Mapping[str, Any]) -> str:
    counts: str = detection["segmentation"]["counts"]
    return counts


def _edges(detection: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    x, y, width, height = detection["bbox"]
    return np.array([x, y, x + width, y + height])
