"""From matched detections to COCO's numbers: precision and recall curves, and their means.

This is pycocotools' COCOeval.accumulate and summarize.
https://github.com/cocodataset/cocoapi/blob/master/PythonAPI/pycocotools/cocoeval.py
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from segmodel import matching
from segmodel.matching import IOU_THRESHOLDS, MAX_DETECTIONS, Bools, Float64, Records

Int64: TypeAlias = npt.NDArray[np.int64]

# COCOeval's Params.setDetParams, as in `matching`; R of them.
RECALL_THRESHOLDS: Float64 = np.linspace(0.0, 1.0, 101)
_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, kw_only=True)
class CategoryMetrics:
    """Average precision of one category; -1 where it has no truth that counts.

    Attributes:
        id: The category's id in the data set.
        AP: Mean over IoU 0.50 to 0.95.
        AP50: At IoU 0.50.
        num_truth: Annotations that count, hence without crowds.
    """

    id: int
    AP: float
    AP50: float
    num_truth: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """COCO's twelve numbers, 0..1, and as in pycocotools -1 where truth has nothing to be found.

    AP is the mean over IoU 0.50 to 0.95, AP50 and AP75 are at one IoU; s, m and l are for areas
    up to 32², up to 96² and above; AR1, AR10 and AR100 allow so many detections in each image and
    category.

    Attributes:
        per_category: By name, in ascending order of id, which is the order of K below.
        precision: (T=10, R=101, K, A=4, M=3) float64; the axes are those of `segmodel.matching`.
        scores: (T, R, K, A, M) float64, the score at which that recall is reached.
        recall: (T, K, A, M) float64.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    per_category: dict[str, CategoryMetrics]
    precision: Float64 = field(repr=False, compare=False)
    scores: Float64 = field(repr=False, compare=False)
    recall: Float64 = field(repr=False, compare=False)

    @property
    def numbers(self) -> dict[str, float]:
        """The twelve numbers by name, in the order of COCOeval.stats."""
        return {name: getattr(self, name) for name in _NAMES}

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON, without the curves."""
        categories = {name: asdict(category) for name, category in self.per_category.items()}
        return {**self.numbers, "per_category": categories}


def metrics(
    records: Records, kind: Literal["box", "mask"], names: Mapping[int, str], positives: Int64
) -> Metrics:
    """Sum up the matches of all images.

    Args:
        records: Of all images, ordered by category, and there by descending score.
        kind: Which matches are meant.
        names: Of the K categories, by id in ascending order.
        positives: (K, A), the annotations that count.
    """
    K, A = positives.shape
    T, R, M = len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), len(MAX_DETECTIONS)
    precision, scores = -np.ones((T, R, K, A, M)), -np.ones((T, R, K, A, M))
    recall = -np.ones((T, K, A, M))
    starts, stops = (
        np.searchsorted(records["category"], list(names), side) for side in ("left", "right")
    )
    for k in range(K):
        mine = records[starts[k] : stops[k]]
        tp, fp = matching.unpack(mine[f"{kind}_tp"]), matching.unpack(mine[f"{kind}_fp"])
        for m, limit in enumerate(MAX_DETECTIONS):
            among = mine["rank"] < limit
            for a in np.flatnonzero(positives[k]):
                precision[:, :, k, a, m], scores[:, :, k, a, m], recall[:, k, a, m] = curves(
                    tp[among, a], fp[among, a], mine["score"][among], positives[k, a]
                )
    return _summarise(precision, scores, recall, names, positives)


def _summarise(
    precision: Float64, scores: Float64, recall: Float64, names: Mapping[int, str], positives: Int64
) -> Metrics:
    at50, at75 = (int(np.flatnonzero(iou == IOU_THRESHOLDS)[0]) for iou in (0.5, 0.75))
    best = precision[..., 0, -1]  # (T, R, K), of all areas, with the most detections
    per_category = {
        name: CategoryMetrics(
            id=category,
            AP=_mean(best[:, :, k]),
            AP50=_mean(best[at50, :, k]),
            num_truth=int(positives[k, 0]),
        )
        for k, (category, name) in enumerate(names.items())
    }
    return Metrics(
        AP=_mean(best),
        AP50=_mean(best[at50]),
        AP75=_mean(best[at75]),
        APs=_mean(precision[..., 1, -1]),
        APm=_mean(precision[..., 2, -1]),
        APl=_mean(precision[..., 3, -1]),
        AR1=_mean(recall[..., 0, 0]),
        AR10=_mean(recall[..., 0, 1]),
        AR100=_mean(recall[..., 0, 2]),
        ARs=_mean(recall[..., 1, -1]),
        ARm=_mean(recall[..., 2, -1]),
        ARl=_mean(recall[..., 3, -1]),
        per_category=per_category,
        precision=precision,
        scores=scores,
        recall=recall,
    )


def _mean(values: Float64) -> float:
    """Average over what truth has; -1 where it has nothing."""
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0


def curves(
    tp: Bools, fp: Bools, scores: Float64, num_truth: int
) -> tuple[Float64, Float64, Float64]:
    """Return precision, score and final recall of one category and area range.

    Args:
        tp: (N, T), true positives of all images in descending order of score.
        fp: (N, T), false positives.
        scores: (N,) float64.
        num_truth: Annotations that count, 1 or more.

    Returns:
        precision: (T, R) float64, the best at that or a higher recall; 0 where it is not reached.
        scores: (T, R) float64, the score at which it is reached, or 0.
        recall: (T,) float64, of all detections.
    """
    shape = len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS)
    precision_at, score_at = np.zeros(shape), np.zeros(shape)
    if len(scores) == 0:
        return precision_at, score_at, np.zeros(shape[0])
    hits, misses = tp.cumsum(axis=0, dtype=np.float64), fp.cumsum(axis=0, dtype=np.float64)
    recall = hits / num_truth
    precision = hits / (misses + hits + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    for t in range(shape[0]):
        where = np.searchsorted(recall[:, t], RECALL_THRESHOLDS, side="left")
        reached = where < len(scores)
        precision_at[t, reached] = envelope[where[reached], t]
        score_at[t, reached] = scores[where[reached]]
    return precision_at, score_at, recall[-1]
