"""The worst of what is wrong, and how much of each image is right: for people to look at.

Detections of at least a threshold's score take annotations as in `confusion`. Each taking of equal
categories is right; a detection of another category or of the background is wrong, and an annotation
that nothing took is missed. The share of an image that is right is right / (right + wrong + missed).
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from segmodel.confusion import takings

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        weight: The higher the worse: score of a wrong detection, area of a missed annotation.
        image: Its number.
        item: Place among the detections of the prediction, or among those of truth where missed.
        taken: Of a wrong detection: place of the annotation of another category; None: background.
    """

    weight: float
    image: int
    item: int
    taken: int | None = None


class Faults:
    """The worst faults of some images, at most one of a kind for each image; picklable, mergeable.

    Attributes:
        shares: By image, the share that is right, 0..1; images where nothing is and nothing was
            found are not in it.
        wrong: Detections that should not be, the most confident first.
        missed: Annotations that were not found, the largest first.
    """

    def __init__(self, score_threshold: float, most: int) -> None:
        self.score_threshold, self.most = score_threshold, most
        self.shares: dict[int, float] = {}
        self.wrong: list[Fault] = []
        self.missed: list[Fault] = []

    def add(self, image: int, truth: Row, prediction: Row | None) -> None:
        """Look at one image; arguments are those of `Confusion.add`, and its number."""
        failed = prediction is None or prediction["status"] == "error"
        detections = [] if failed or prediction is None else prediction["detections"]
        annotations = truth["detections"]
        wrong: list[Fault] = []
        missed: list[Fault] = []
        right = 0
        for taken, taker in takings(annotations, detections, self.score_threshold):
            if taker is None:
                assert taken is not None
                area = float(annotations[taken]["area"])
                missed.append(Fault(weight=area, image=image, item=taken))
            elif taken is not None and (
                annotations[taken]["category_id"] == detections[taker]["category_id"]
            ):
                right += 1
            else:
                score = float(detections[taker]["score"])
                wrong.append(Fault(weight=score, image=image, item=taker, taken=taken))
        if total := right + len(wrong) + len(missed):
            self.shares[image] = right / total
        self._keep(_worst(wrong, 1), _worst(missed, 1))

    def merge(self, other: "Faults") -> None:
        """Add the images of another."""
        self.shares.update(other.shares)
        self._keep(other.wrong, other.missed)

    def _keep(self, wrong: list[Fault], missed: list[Fault]) -> None:
        self.wrong = _worst([*self.wrong, *wrong], self.most)
        self.missed = _worst([*self.missed, *missed], self.most)


def _worst(faults: Iterable[Fault], most: int) -> list[Fault]:
    return heapq.nsmallest(most, faults, key=lambda one: (-one.weight, one.image, one.item))
