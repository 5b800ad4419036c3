"""What is taken for what: a confusion matrix of instances, streaming and mergeable.

An image's detections of at least a threshold's score, best first and whatever their category, each
take the free annotation with which they overlap most, at an IoU of at least 0.5 of the masks (of
the boxes where one has no mask). What is taken counts as one of the annotation's category taken for
one of the detection's; annotations that stay free are missed, and detections that take none are
found in the background. Crowds are ignored: they are never missed, and a detection of which at least
half lies within one is left out if it takes nothing else.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from segmodel.matching import Float64, Item, pairwise_iou

Int64: TypeAlias = npt.NDArray[np.int64]
Row: TypeAlias = Mapping[str, Any]

IOU_THRESHOLD = 0.5
# In the place of a category: nothing is there, or nothing was found.
BACKGROUND = None


class Confusion:
    """How often instances of one category are taken for one of another; small and picklable.

    Attributes:
        score_threshold: Detections that score lower do not count.
        counts: By the category ids of truth and prediction; either may be `BACKGROUND`, not both.
    """

    def __init__(self, score_threshold: float = 0.5) -> None:
        self.score_threshold = score_threshold
        self.counts: Counter[tuple[int | None, int | None]] = Counter()

    def add(self, truth: Row, prediction: Row | None) -> None:
        """Count the instances of one image.

        Args:
            truth: Its row in truth.
            prediction: Its row in predictions; None, or a row in error, where nothing was found.
        """
        failed = prediction is None or prediction["status"] == "error"
        detections = [] if failed or prediction is None else prediction["detections"]
        annotations = truth["detections"]
        for wanted, found in takings(annotations, detections, self.score_threshold):
            taken = BACKGROUND if wanted is None else annotations[wanted]["category_id"]
            taker = BACKGROUND if found is None else detections[found]["category_id"]
            self.counts[taken, taker] += 1

    def merge(self, other: "Confusion") -> None:
        """Add the images of another."""
        assert other.score_threshold == self.score_threshold
        self.counts.update(other.counts)

    def matrix(self, category_ids: Sequence[int]) -> Int64:
        """Return the counts as a matrix.

        Args:
            category_ids: The K categories in their order; all that were counted must be there.

        Returns:
            (K + 1, K + 1) int64: rows are of truth, columns of predictions, the last is background.
        """
        places: dict[int | None, int] = {c: k for k, c in enumerate(category_ids)}
        places[BACKGROUND] = len(places)
        matrix = np.zeros((len(places), len(places)), np.int64)
        for (wanted, found), number in self.counts.items():
            matrix[places[wanted], places[found]] += number
        return matrix


def takings(
    annotations: Sequence[Item], detections: Sequence[Item], score_threshold: float
) -> Iterator[tuple[int | None, int | None]]:
    """Yield who took what in one image: places in `annotations` and in `detections`.

    Where the second is None the annotation was missed, where the first is None the detection took
    nothing.
    """
    confident = [n for n, item in enumerate(detections) if item["score"] >= score_threshold]
    order = sorted(confident, key=lambda n: -detections[n]["score"])
    best = [detections[n] for n in order]
    crowd = np.array([item["iscrowd"] for item in annotations], np.bool_)
    free = ~crowd
    for n, item, ious in zip(order, best, _ious(best, annotations), strict=True):
        near = ious >= IOU_THRESHOLD
        candidates = np.flatnonzero(near & free)
        if len(candidates):
            taken = _nearest(item, annotations, ious, candidates)
            free[taken] = False
            yield taken, n
        elif not (near & crowd).any():
            yield None, n
    for missed in np.flatnonzero(free).tolist():
        yield missed, None


def _nearest(detection: Item, annotations: Sequence[Item], ious: Float64, candidates: Int64) -> int:
    """Return the candidate of the highest IoU, among equals the first of the detection's category."""

    def rank(candidate: int) -> tuple[float, bool]:
        same = annotations[candidate]["category_id"] == detection["category_id"]
        return float(ious[candidate]), same

    nearest: int = max(candidates.tolist(), key=rank)
    return nearest


def _ious(detections: Sequence[Item], annotations: Sequence[Item]) -> Float64:
    items = (*detections, *annotations)
    kind = "bbox" if any(item["segmentation"] is None for item in items) else "segmentation"
    crowd = np.array([item["iscrowd"] for item in annotations], np.bool_)
    found, wanted = ([item[kind] for item in side] for side in (detections, annotations))
    if kind == "segmentation":
        return pairwise_iou(found, wanted, crowd)
    boxes_found, boxes_wanted = (
        np.array(side, np.float64).reshape(-1, 4) for side in (found, wanted)
    )
    return pairwise_iou(boxes_found, boxes_wanted, crowd)
