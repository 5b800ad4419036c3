"""`segjobs evaluate --predictions URI --annotations FILE-or-URI`: how good predictions are.

Input: a table of the one schema, and a COCO instances file or a packed set. Output: COCO's twelve
numbers of boxes and of masks, per category too, on the screen; with `--output` also `metrics.json`,
`precision_recall.png` and `confusion.png`. Tables are compared part by part, in Ray tasks where they
are large; the driver holds the ids of the images and 37 bytes for each detection.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from rich.table import Table
from rich.text import Text

from jobs import tables
from jobs.cluster import connect, plain_errors, resources
from jobs.config import EvaluateConfig
from jobs.console import ImageProgress, console, facts, size
from jobs.pairing import BASE_NAME, NONE, Pairing, pair
from jobs.plan import PLAN
from jobs.reference import Rows, Truth, open_truth
from jobs.storage import open_store
from jobs.store import Store
from jobs.tables import RowGroup, Tables, open_tables
from jobs.write import SUCCESS
from segmodel import evaluation, plots
from segmodel.confusion import BACKGROUND, IOU_THRESHOLD, Confusion
from segmodel.evaluation import CocoMatches, Evaluation
from segmodel.metrics import Metrics

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

# A terminal's height; metrics.json has all of them.
CATEGORIES_SHOWN = 30

METRICS, CURVES, CONFUSION = "metrics.json", "precision_recall.png", "confusion.png"


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


def run(config: EvaluateConfig) -> int:
    """Pair, compare, show, write; return the exit code."""
    truth = open_truth(config.annotations, config.endpoint_url)
    predictions = open_tables(config.predictions, config.endpoint_url)
    paired = pair(truth.names, predictions.names, truth.ways, subset=config.subset)
    _show_inputs(truth, predictions, paired)
    total = Result(matches=CocoMatches(), confusion=Confusion(config.score_threshold))
    with ImageProgress(len(truth.names), 0) as progress, plain_errors():
        for part, result in _compared(config, truth, predictions, paired):
            total.matches.merge(result.matches)
            total.confusion.merge(result.confusion)
            progress.advance(len(part.places))
    scores = total.matches.summary(truth.image_order)
    _show_scores(scores)
    if config.output is not None:
        output = open_store(config.output, config.endpoint_url)
        metrics = _metrics(truth, predictions, paired, scores, total.confusion)
        output.put(METRICS, json.dumps(metrics, indent=2, ensure_ascii=False).encode())
        _put_plots(output, scores, total.confusion)
        console.print(f"Numbers and plots: {output.url(METRICS)}, {CURVES}, {CONFUSION}")
    return 0


def compare(part: Part, truth: Rows, predictions: Store, score_threshold: float) -> Result:
    """Compare some images.

    Args:
        part: Which.
        truth: Of all images.
        predictions: The store of the part's row groups.
        score_threshold: Of the confusion matrix.
    """
    places = part.places
    wanted = truth.take(places).combine_chunks()
    result = Result(matches=CocoMatches(), confusion=Confusion(score_threshold))
    for row, found in evaluation.pairs(wanted, _renamed(part, places, wanted, predictions)):
        result.matches.add(row, found)
        result.confusion.add(row, found)
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


def _compared(
    config: EvaluateConfig, truth: Truth, predictions: Tables, paired: Pairing
) -> Iterator[tuple[Part, Result]]:
    """Yield results, in any order: of this process where tables are small, else of Ray tasks."""
    parts = _parts(predictions, paired)
    if config.address is None and predictions.num_bytes <= BYTES_WITHOUT_RAY:
        for part in parts:
            yield part, compare(part, truth.rows, predictions.store, config.score_threshold)
        return
    connect(config.address)
    rows = ray.put(truth.rows)
    task = ray.remote(compare)
    waiting: dict[ray.ObjectRef[Result], Part] = {}
    for part in parts:
        if len(waiting) >= PARTS_PER_CPU * max(1, resources()[0]):
            yield _finished(waiting)
        reference = task.remote(part, rows, predictions.store, config.score_threshold)
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


def _show_inputs(truth: Truth, predictions: Tables, paired: Pairing) -> None:
    store = predictions.store
    unfinished = store.info(PLAN) is not None and store.info(SUCCESS) is None
    notes = [
        *(["the job that predicts is not finished: run it again first"] if unfinished else []),
        *(
            f"{number} images are paired by their {way}, not by their whole path"
            for way, number in paired.ways.items()
            if way == BASE_NAME
        ),
        *_notes(
            {
                "images have no prediction and count as nothing found": len(paired.missing),
                "predictions are left out: the truth has not their images": paired.num_others,
                "rows are left out: they stand for damaged shards": paired.num_damages,
            }
        ),
    ]
    facts(
        "Compared",
        [
            ("truth", f"{len(truth.names)} images: {truth.facts['uri']}"),
            (
                "predictions",
                f"{predictions.names.num_rows} rows in {len(predictions.groups)} row groups, "
                f"{size(predictions.num_bytes)}: {predictions.url}",
            ),
            *(("note", note) for note in notes),
        ],
    )


def _notes(numbers: Mapping[str, int]) -> Iterator[str]:
    return (f"{number} {words}" for words, number in numbers.items() if number)


def _show_scores(scores: Evaluation) -> None:
    kinds = _kinds(scores)
    numbers = Table(title="Average precision and recall", title_justify="left")
    numbers.add_column("")
    for kind in kinds:
        numbers.add_column(kind, justify="right")
    for name in scores.box.numbers:
        numbers.add_row(name, *(_number(of.numbers[name]) for of in kinds.values()))
    console.print(numbers)
    _show_categories(kinds)
    rows = [
        ("images", f"{scores.num_images}"),
        ("annotations", f"{scores.num_truth}, crowds too"),
        ("detections", f"{scores.num_predictions}"),
        ("missing", f"{scores.num_missing} images without a prediction: nothing found"),
        ("in error", f"{scores.num_errors} images: nothing found"),
    ]
    if scores.mask is None:
        rows.append(("masks", "are not compared: one side has boxes only"))
    facts("Counts", rows)


def _show_categories(kinds: Mapping[str, Metrics]) -> None:
    categories = next(iter(kinds.values())).per_category
    most = sorted(categories, key=lambda name: -categories[name].num_truth)[:CATEGORIES_SHOWN]
    table = Table(title="Categories, those with the most truth first", title_justify="left")
    table.add_column("category", overflow="fold")
    table.add_column("truth", justify="right")
    for kind in kinds:
        table.add_column(f"{kind} AP", justify="right")
        table.add_column(f"{kind} AP50", justify="right")
    for name in most:
        cells = [
            _number(value)
            for of in kinds.values()
            for value in (of.per_category[name].AP, of.per_category[name].AP50)
        ]
        table.add_row(Text(name), str(categories[name].num_truth), *cells)
    console.print(table)
    if left := len(categories) - len(most):
        console.print(f"{left} more categories are in {METRICS}: name a place by --output.")


def _number(value: float) -> str:
    return "-" if value < 0 else f"{value:.4f}"


def _kinds(scores: Evaluation) -> dict[str, Metrics]:
    masks = {} if scores.mask is None else {"mask": scores.mask}
    return {**masks, "box": scores.box}


def _metrics(
    truth: Truth, predictions: Tables, paired: Pairing, scores: Evaluation, confusion: Confusion
) -> dict[str, Any]:
    names: dict[int | None, str | None] = {BACKGROUND: None}
    names |= {category.id: name for name, category in scores.box.per_category.items()}
    return {
        "predictions": {
            "uri": predictions.url,
            "rows": predictions.names.num_rows,
            "listing_sha256": predictions.listed.digest(),
            "model_digests": list(predictions.models),
        },
        "annotations": dict(truth.facts),
        "paired": {
            "by": dict(paired.ways),
            "missing": len(paired.missing),
            "of_other_images": paired.num_others,
            "of_damaged_shards": paired.num_damages,
        },
        **scores.to_dict(),
        "confusion": {
            "score_threshold": confusion.score_threshold,
            "iou_threshold": IOU_THRESHOLD,
            "counts": [
                {"truth": names[wanted], "predicted": names[found], "count": number}
                for (wanted, found), number in sorted(confusion.counts.items(), key=str)
            ],
        },
    }


def _put_plots(output: Store, scores: Evaluation, confusion: Confusion) -> None:
    output.put(CURVES, plots.precision_recall(_kinds(scores)))
    categories = scores.box.per_category
    matrix = confusion.matrix([category.id for category in categories.values()])
    note = f"score at least {confusion.score_threshold:g}, IoU at least {IOU_THRESHOLD:g}"
    output.put(CONFUSION, plots.confusion(matrix, list(categories), note))
