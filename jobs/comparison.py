"""Predictions compared with the truth, part by part, in Ray tasks where tables are large."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from jobs import tables
from jobs.cluster import connect, resources
from jobs.pairing import NONE, Pairing
from jobs.reference import Rows, Truth
from jobs.store import Store
from jobs.tables import RowGroup, Tables
from segmodel import evaluation
from segmodel.confusion import Confusion
from segmodel.evaluation import CocoMatches
from segmodel.faults import Faults

Int64: TypeAlias = npt.NDArray[np.int64]

# Images compared at once: what a task holds of the truth, some MB.
IMAGES_PER_PART = 1000
# Predictions are read in batches of so many images.
BATCH_SIZE = 64
# 4.5 MiB of predictions (2,000 images, 25 detections each) take 3.3 s on one core of an AMD EPYC,
# and a local Ray with its workers' imports some 8 s: up to this size one process is as quick as two.
BYTES_WITHOUT_RAY = 16 * 2**20
# Results that wait for the driver, for each CPU.
PARTS_PER_CPU = 2


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a comparison.

    Attributes:
        score_threshold: Of the confusion matrix and of faults.
        num_faults: Worst faults of a kind that are kept; 0: none are looked for.
        address: Of the Ray cluster; where None, small tables are compared in this process.
    """

    score_threshold: float
    num_faults: int = 0
    address: str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Images that are compared at once.

    Attributes:
        groups: Row groups of predictions, each with the numbers of its rows' images in the truth, or
            `pairing.NONE`.
        missing: Numbers of images without a prediction.
    """

    groups: tuple[tuple[RowGroup, Int64], ...] = ()
    missing: Int64

    @property
    def places(self) -> Int64:
        """Numbers of all its images, ascending."""
        places = np.concatenate([self.missing, *(places for _, places in self.groups)])
        return np.sort(places[places != NONE])


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out of some images; results are merged."""

    matches: CocoMatches
    confusion: Confusion
    faults: Faults

    @classmethod
    def none(cls, asked: Asked) -> "Result":
        """Return the result of no image."""
        return cls(
            matches=CocoMatches(),
            confusion=Confusion(asked.score_threshold),
            faults=Faults(asked.score_threshold, asked.num_faults),
        )

    def merge(self, other: "Result") -> None:
        """Add the images of another."""
        self.matches.merge(other.matches)
        self.confusion.merge(other.confusion)
        self.faults.merge(other.faults)


def compare(part: Part, truth: Rows, predictions: Store, asked: Asked) -> Result:
    """Compare some images.

    Args:
        part: Which.
        truth: Of all images.
        predictions: The store of the part's row groups.
        asked: What for.
    """
    places = part.places
    wanted = truth.take(places).combine_chunks()
    result = Result.none(asked)
    numbers = dict(zip(wanted["image_id"].to_pylist(), places.tolist(), strict=True))
    for row, found in evaluation.pairs(wanted, _renamed(part, places, wanted, predictions)):
        result.matches.add(row, found)
        result.confusion.add(row, found)
        if asked.num_faults:
            result.faults.add(numbers[row["image_id"]], row, found)
    return result


def _renamed(
    part: Part, places: Int64, wanted: pa.Table, predictions: Store
) -> Iterator[pa.RecordBatch]:
    """Yield a part's predictions with the ids of their images in the truth."""
    for group, group_places in part.groups:
        start = 0
        for batch in tables.stream(predictions, group, BATCH_SIZE):
            of_batch = group_places[start : start + batch.num_rows]
            start += batch.num_rows
            paired = of_batch != NONE
            ids = wanted["image_id"].take(np.searchsorted(places, of_batch[paired]))
            index = batch.schema.get_field_index("image_id")
            kept = batch.filter(pa.array(paired))
            yield kept.set_column(index, "image_id", ids.combine_chunks())


def compared(
    asked: Asked, truth: Truth, predictions: Tables, paired: Pairing
) -> Iterator[tuple[Part, Result]]:
    """Yield results, in any order: of this process where tables are small, else of Ray tasks."""
    parts = _parts(predictions, paired)
    if asked.address is None and predictions.num_bytes <= BYTES_WITHOUT_RAY:
        for part in parts:
            yield part, compare(part, truth.rows, predictions.store, asked)
        return
    connect(asked.address)
    rows = ray.put(truth.rows)
    task = ray.remote(compare)
    waiting: dict[ray.ObjectRef[Result], Part] = {}
    for part in parts:
        if len(waiting) >= PARTS_PER_CPU * max(1, resources()[0]):
            yield _finished(waiting)
        reference = task.remote(part, rows, predictions.store, asked)
        waiting[reference] = part
    while waiting:
        yield _finished(waiting)


def _finished(waiting: "dict[ray.ObjectRef[Result], Part]") -> tuple[Part, Result]:
    (done,), _ = ray.wait(list(waiting), num_returns=1)
    return waiting.pop(done), ray.get(done)


def _parts(predictions: Tables, paired: Pairing) -> Iterator[Part]:
    none = np.empty(0, np.int64)
    groups: list[tuple[RowGroup, Int64]] = []
    start = images = 0
    for group in predictions.groups:
        places = paired.places[start : start + group.num_rows]
        start += group.num_rows
        if (places == NONE).all():
            continue
        groups.append((group, places))
        images += group.num_rows
        if images >= IMAGES_PER_PART:
            yield Part(groups=tuple(groups), missing=none)
            groups, images = [], 0
    if groups:
        yield Part(groups=tuple(groups), missing=none)
    for start in range(0, len(paired.missing), IMAGES_PER_PART):
        yield Part(missing=paired.missing[start : start + IMAGES_PER_PART])
