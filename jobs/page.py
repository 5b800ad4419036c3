"""The report's page: numbers and words become one HTML file with its styles, its script and its data.

Everything is escaped by jinja2, and the data for the script by `json_in_html`; the page's content
security policy lets only its own script and style run, whatever a key or a category is called.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from jobs import charts
from jobs.survey import SCORE_EDGES, SIZE_EDGES, Survey
from segmodel.confusion import IOU_THRESHOLD, Confusion
from segmodel.evaluation import Evaluation
from segmodel.matching import IOU_THRESHOLDS
from segmodel.metrics import RECALL_THRESHOLDS, Metrics

FILES = Path(__file__).with_name("report_page")
# A table that a person reads; metrics.json of `evaluate` and the table itself have all of them.
CATEGORIES_SHOWN = 40
# Numbers of a larger matrix do not fit beside one another.
CONFUSION_SHOWN = 12
CURVES_SHOWN = 8
NOT_KNOWN = "-"
_CURVES_AT = (0.5, 0.75, 0.9)
_WORDS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "of objects smaller than 32 x 32 pixels",
    "APm": "of objects between 32 x 32 and 96 x 96 pixels",
    "APl": "of objects larger than 96 x 96 pixels",
    "AR1": "recall with one detection for each image and category",
    "AR10": "recall with 10 detections for each image and category",
    "AR100": "recall with 100 detections for each image and category",
    "ARs": "recall of objects smaller than 32 x 32 pixels",
    "ARm": "recall of objects between 32 x 32 and 96 x 96 pixels",
    "ARl": "recall of objects larger than 96 x 96 pixels",
}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a comparison with the truth has found."""

    scores: Evaluation
    confusion: Confusion
    truth: str

    @property
    def kinds(self) -> dict[str, Metrics]:
        """The metrics, masks first."""
        masks = {} if self.scores.mask is None else {"mask": self.scores.mask}
        return {**masks, "box": self.scores.box}


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is on the page.

    Attributes:
        title: Of the page.
        subtitle: Where the table is, and when it was made.
        notes: What a person should know first.
        found: What is in the table.
        quality: None without truth.
        examples: By kind of error, rows in error with `image_id` and `error`.
        facts: Names and values of the job.
        details: Names and long texts of the job.
        data: For the script.
    """

    title: str
    subtitle: str
    notes: Sequence[str]
    found: Survey
    quality: Quality | None
    examples: Mapping[str, Sequence[Mapping[str, Any]]]
    facts: Sequence[tuple[str, str]]
    details: Sequence[tuple[str, str]]
    data: Mapping[str, Any]


def render(content: Content) -> bytes:
    """Return the page: UTF-8 HTML that asks no network for anything."""
    script, style = _file("page.js"), _file("page.css")
    found = content.found
    ranked = sorted(found.categories.items(), key=lambda item: (-item[1].detections, item[0]))
    shown = ranked[:CATEGORIES_SHOWN]
    most = max((of.detections for _, of in ranked), default=1)
    html = _template().render(
        title=content.title,
        subtitle=content.subtitle,
        notes=content.notes,
        figures=_figures(found, content.quality),
        quality=None if content.quality is None else _quality(content.quality),
        categories=[
            {
                "name": name,
                "count": f"{of.detections:,}",
                "score": f"{of.score_sum / of.scored:.2f}" if of.scored else NOT_KNOWN,
                "share": f"{of.detections / most:.4f}",
            }
            for (_, name), of in shown
        ],
        more_categories=_cut(len(shown), len(ranked)),
        histograms=_histograms(found),
        errors=[
            {"kind": kind, "count": f"{number:,}", "examples": content.examples.get(kind, ())}
            for kind, number in found.kinds.most_common()
        ],
        facts=content.facts,
        details=content.details,
        data=json_in_html(content.data),
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
    )
    # A name of a file may hold what is no text: half of a surrogate pair.
    return html.encode("utf-8", "replace")


def json_in_html(value: Any) -> Markup:
    """Return JSON that can stand in a script element: nothing in it ends the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _file(name: str) -> str:
    return (FILES / name).read_text("utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("page.html"))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _cut(shown: int, of: int) -> str:
    return f" ({shown} of {of})" if shown < of else ""


def _figures(found: Survey, quality: Quality | None) -> list[dict[str, Any]]:
    failed = found.kinds.total()
    is_ok = found.images - failed
    figures: list[dict[str, Any]] = [
        {"name": "images", "value": f"{found.images:,}"},
        {
            "name": "detections",
            "value": f"{found.detections:,}",
            "more": f"{found.detections / is_ok:.1f} for each readable image" if is_ok else "",
        },
        {"name": "categories", "value": f"{len(found.categories):,}"},
        {"name": "with nothing found", "value": f"{found.empty:,}"},
        {"name": "in error", "value": f"{failed:,}", "bad": failed > 0},
    ]
    if quality is not None:
        figures += [
            {"name": f"{kind} AP", "value": _number(of.AP), "more": f"AP50 {_number(of.AP50)}"}
            for kind, of in quality.kinds.items()
        ]
    return figures


def _histograms(found: Survey) -> list[dict[str, Any]]:
    scores = {"title": "Scores of all detections", "none": "No detection has a score."}
    sizes = {"title": "Sizes of all masks", "none": "No detection has a mask."}
    if found.score_counts.any():
        scores["svg"] = charts.histogram(found.score_counts, charts.score_axis(SCORE_EDGES))
    if found.size_counts.any():
        last = int(np.flatnonzero(found.size_counts)[-1]) + 1
        last = min(len(found.size_counts), last + last % 2)
        axis = charts.size_axis(SIZE_EDGES, last)
        sizes["svg"] = charts.histogram(found.size_counts[:last], axis)
    return [scores, sizes]


def _quality(quality: Quality) -> dict[str, Any]:
    kinds, scores = quality.kinds, quality.scores
    per_category = scores.box.per_category
    ranked = sorted(per_category, key=lambda name: (-per_category[name].num_truth, name))
    shown = ranked[:CATEGORIES_SHOWN]
    return {
        "about": f"{scores.num_truth:,} annotations of {scores.num_images:,} images in {quality.truth}. "
        "An image that is in error or has no row counts as nothing found.",
        "kinds": list(kinds),
        "numbers": [
            {
                "name": name,
                "words": words,
                "cells": [_number(of.numbers[name]) for of in kinds.values()],
            }
            for name, words in _WORDS.items()
        ],
        "curves": _curves(kinds),
        "more_categories": _cut(len(shown), len(ranked)),
        "categories": [
            {
                "name": name,
                "truth": f"{per_category[name].num_truth:,}",
                "cells": [
                    _number(value)
                    for of in kinds.values()
                    for value in (of.per_category[name].AP, of.per_category[name].AP50)
                ],
            }
            for name in shown
        ],
        **_confusion(quality.confusion, scores),
    }


def _curves(kinds: Mapping[str, Metrics]) -> list[dict[str, Any]]:
    kind, metrics = next(iter(kinds.items()))
    best = metrics.precision[:, :, :, 0, -1]  # (T, R, K), of all areas, with the most detections
    present = best[0, 0] > -1
    if not present.any():
        return []
    thresholds = [int(np.abs(IOU_THRESHOLDS - at).argmin()) for at in _CURVES_AT]
    overall = [
        (f"IoU {IOU_THRESHOLDS[t]:.2f}", best[t][:, present].mean(axis=1)) for t in thresholds
    ]
    names = list(metrics.per_category)
    most = sorted(
        np.flatnonzero(present).tolist(),
        key=lambda k: -metrics.per_category[names[k]].num_truth,
    )[:CURVES_SHOWN]
    categories = [(names[k], best[0][:, k]) for k in most]
    titles = [
        (f"Precision over recall, {kind}s, mean over categories", overall),
        (f"Precision over recall, {kind}s, at IoU 0.50", categories),
    ]
    return [
        {
            "title": title,
            "names": [name for name, _ in series],
            "svg": charts.precision_recall(series, RECALL_THRESHOLDS, title),
        }
        for title, series in titles
        if len(series) > 1
    ]


def _confusion(confusion: Confusion, scores: Evaluation) -> dict[str, Any]:
    names = list(scores.box.per_category)
    matrix = confusion.matrix([of.id for of in scores.box.per_category.values()])
    instances = (matrix.sum(axis=0) + matrix.sum(axis=1))[:-1]
    kept = sorted(np.argsort(-instances, kind="stable")[:CONFUSION_SHOWN].tolist())
    cells = [*kept, len(names)]
    # As in `plots.confusion`: shares of the row's truth; in the last row, of the column's predictions.
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shares[-1] = matrix[-1] / np.maximum(matrix.sum(axis=0), 1)
    rows = [
        {
            "name": names[i] if i < len(names) else "background",
            "cells": [
                {
                    "count": "" if i == j == len(names) else f"{matrix[i, j]:,}",
                    "right": i == j,
                    "tint": int(np.ceil(9 * shares[i, j])) if matrix[i, j] else 0,
                }
                for j in cells
            ],
        }
        for i in cells
    ]
    return {
        "confusion": rows,
        "confusion_names": [names[k] for k in kept],
        "confusion_title": f"What is taken for what{_cut(len(kept), len(names))}, at a score of at least "
        f"{confusion.score_threshold:g} and an IoU of at least {IOU_THRESHOLD:g}",
    }


def _number(value: float) -> str:
    return NOT_KNOWN if value < 0 else f"{value:.3f}"
