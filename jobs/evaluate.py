"""`segjobs evaluate --predictions URI --annotations FILE-or-URI`: how good predictions are.

Input: a table of the one schema, and a COCO instances file or a packed set. Output: COCO's twelve
numbers of boxes and of masks, per category too, on the screen; with `--output` also `metrics.json`,
`precision_recall.png` and `confusion.png`. `--against` compares another table with the same truth, and says
which of the two is better. Tables are compared part by part, in Ray tasks where they
are large; the driver holds the ids of the images and 37 bytes for each detection.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from jobs.cluster import plain_errors
from jobs.comparison import Asked, Result, compared
from jobs.config import EvaluateConfig
from jobs.console import ImageProgress, console, facts, size
from jobs.pairing import BASE_NAME, Pairing, pair
from jobs.plan import PLAN
from jobs.reference import Truth, open_truth
from jobs.storage import open_store
from jobs.store import Store
from jobs.tables import Tables, open_tables
from jobs.write import SUCCESS
from segmodel import plots
from segmodel.confusion import BACKGROUND, IOU_THRESHOLD, Confusion
from segmodel.evaluation import Evaluation
from segmodel.metrics import Metrics

# A terminal's height; metrics.json has all of them.
CATEGORIES_SHOWN = 30

METRICS, CURVES, CONFUSION = "metrics.json", "precision_recall.png", "confusion.png"


def run(config: EvaluateConfig) -> int:
    """Pair, compare, show, write; return the exit code."""
    truth = open_truth(config.annotations, config.endpoint_url)
    asked = Asked(score_threshold=config.score_threshold, address=config.address)
    mine = _compared(config, config.predictions, truth, asked)
    _show_scores(mine.scores)
    other = None
    if config.against is not None:
        other = _compared(config, config.against, truth, asked)
        _show_verdict(mine, other)
    if config.output is not None:
        output = open_store(config.output, config.endpoint_url)
        metrics = _metrics(truth, mine)
        if other is not None:
            metrics["against"] = {**_metrics(truth, other), "better": _verdict(mine, other)}
        output.put(METRICS, json.dumps(metrics, indent=2, ensure_ascii=False).encode())
        _put_plots(output, mine.scores, mine.confusion)
        console.print(f"Numbers and plots: {output.url(METRICS)}, {CURVES}, {CONFUSION}")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """A table of predictions, and how good it is."""

    predictions: Tables
    paired: Pairing
    scores: Evaluation
    confusion: Confusion


def _compared(config: EvaluateConfig, uri: str, truth: Truth, asked: Asked) -> _Compared:
    predictions = open_tables(uri, config.endpoint_url)
    paired = pair(truth.names, predictions.names, truth.ways, subset=config.subset)
    _show_inputs(truth, predictions, paired)
    total = Result.none(asked)
    with ImageProgress(len(truth.names), 0) as progress, plain_errors():
        for part, result in compared(asked, truth, predictions, paired):
            total.merge(result)
            progress.advance(len(part.places))
    return _Compared(
        predictions=predictions,
        paired=paired,
        scores=total.matches.summary(truth.image_order),
        confusion=total.confusion,
    )


def _verdict(mine: _Compared, other: _Compared) -> dict[str, Any]:
    """Say which of two tables is better: by mask AP, or by box AP where one of them has no masks."""
    kind = "mask" if mine.scores.mask and other.scores.mask else "box"
    ours, theirs = (_kinds(of.scores)[kind].numbers["AP"] for of in (mine, other))
    better = "predictions" if ours > theirs else "against" if theirs > ours else "neither"
    return {"by": f"{kind} AP", "predictions": ours, "against": theirs, "better": better}


def _show_verdict(mine: _Compared, other: _Compared) -> None:
    found = _verdict(mine, other)
    table = Table(title="One against the other", title_justify="left")
    for name in ("", "predictions", "against", "difference"):
        table.add_column(name, justify="right" if name else "left")
    for kind in found["by"].split()[:1]:
        ours, theirs = (_kinds(of.scores)[kind] for of in (mine, other))
        for name, value in ours.numbers.items():
            _add_pair(table, f"{kind} {name}", value, theirs.numbers[name])
        both = [name for name in ours.per_category if name in theirs.per_category]
        most = sorted(both, key=lambda name: -ours.per_category[name].num_truth)
        for name in most[:CATEGORIES_SHOWN]:
            values = (of.per_category[name].AP for of in (ours, theirs))
            _add_pair(table, f"{kind} AP of {name}", *values)
    console.print(table)
    uris = {"predictions": mine.predictions.url, "against": other.predictions.url}
    if found["better"] == "neither":
        console.print(f"Neither is better: both have {found['by']} {_number(found['against'])}.")
        return
    by = abs(found["predictions"] - found["against"])
    console.print(
        f"Better by {by:.4f} {found['by']}: {uris[found['better']]} (--{found['better']}).",
        markup=False,
    )


def _add_pair(table: Table, name: str, ours: float, theirs: float) -> None:
    difference = "-" if min(ours, theirs) < 0 else f"{ours - theirs:+.4f}"
    table.add_row(Text(name), _number(ours), _number(theirs), difference)


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
        *(
            (
                "note",
                f"category {category} is {wanted!r} in the truth and {found!r} in the predictions",
            )
            for category, (wanted, found) in list(scores.renamed.items())[:CATEGORIES_SHOWN]
        ),
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


def _metrics(truth: Truth, of: _Compared) -> dict[str, Any]:
    predictions, paired, scores, confusion = of.predictions, of.paired, of.scores, of.confusion
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
