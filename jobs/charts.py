"""Charts as inline SVG, coloured by the page's style sheet, so that they follow light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 42
_INNER_WIDTH, _INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

_HEAD = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="chart">')
_BAR = Markup(
    '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
)
_GRID = Markup('<line class="grid" x1="{0:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}"/>')
_Y_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>')
_X_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
_CURVE = Markup('<polyline class="curve s{}" points="{}"><title>{}</title></polyline>')


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The horizontal axis of a histogram.

    Attributes:
        title: What it shows, with its unit.
        ticks: Position in bins, from the left, and what is written there.
        bins: In words, one for each bin.
    """

    title: str
    ticks: Sequence[tuple[float, str]]
    bins: Sequence[str]


def short(number: float) -> str:
    """Return a count as it fits beside an axis: 950, 1.2k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def histogram(counts: Int64, axis: Axis) -> Markup:
    """Draw bars.

    Args:
        counts: (N,) of the bins.
        axis: Of the bins.
    """
    highest = _round_up(int(counts.max(initial=0)))
    fullest = axis.bins[int(counts.argmax())]
    label = f"Histogram: {axis.title}. {counts.sum():,} in all, most of them {fullest}."
    step = _INNER_WIDTH / len(counts)
    gap = min(2.0, step / 4)
    parts = [_HEAD.format(WIDTH, HEIGHT, label), _y_axis([0, highest / 2, highest], highest)]
    for n, (number, words) in enumerate(zip(counts.tolist(), axis.bins, strict=True)):
        if number:
            # A bar of one in a million is still seen.
            height = max(1.5, _INNER_HEIGHT * number / highest)
            y = TOP + _INNER_HEIGHT - height
            parts.append(
                _BAR.format(LEFT + n * step, y, step - gap, height, f"{words}: {number:,}")
            )
    ticks = [(LEFT + at * step, words) for at, words in axis.ticks]
    return Markup("").join([*parts, _x_axis(ticks, axis.title), Markup("</svg>")])


def precision_recall(series: Sequence[tuple[str, Float64]], recall: Float64, label: str) -> Markup:
    """Draw precision over recall, both 0..1.

    Args:
        series: Name and (R,) precision of each curve.
        recall: (R,).
        label: What the chart is, for those who do not see it.
    """
    parts = [_HEAD.format(WIDTH, HEIGHT, label), _y_axis([0, 0.5, 1], 1)]
    for n, (name, precision) in enumerate(series):
        points = " ".join(
            f"{LEFT + _INNER_WIDTH * r:.1f},{TOP + _INNER_HEIGHT * (1 - p):.1f}"
            for r, p in zip(recall.tolist(), precision.tolist(), strict=True)
        )
        parts.append(_CURVE.format(n % 8, points, name))
    ticks = [(LEFT + _INNER_WIDTH * at, f"{at:g}") for at in (0, 0.25, 0.5, 0.75, 1)]
    return Markup("").join([*parts, _x_axis(ticks, "recall"), Markup("</svg>")])


def score_axis(edges: Float64) -> Axis:
    """Return the axis of scores, 0..1, in equal bins."""
    num_bins = len(edges) - 1
    return Axis(
        title="score",
        ticks=[(at * num_bins, f"{at:g}") for at in (0, 0.25, 0.5, 0.75, 1)],
        bins=[f"{low:.2f} to {high:.2f}" for low, high in pairwise(edges)],
    )


def size_axis(edges: Float64, last: int) -> Axis:
    """Return the axis of the first bins of areas that double from edge to edge.

    Args:
        edges: (N + 1,) pixels.
        last: Bins that are drawn.
    """
    # The side of a square says more than its area.
    return Axis(
        title="mask size: side of a square of the same area, in pixels",
        ticks=[(n, f"{np.sqrt(edges[n]):g}") for n in range(0, last + 1, 2 if last < 14 else 4)],
        bins=[f"{low:,.0f} to {high:,.0f} pixels" for low, high in pairwise(edges[: last + 1])],
    )


def _y_axis(values: Sequence[float], highest: float) -> Markup:
    parts = []
    for value in values:
        y = TOP + _INNER_HEIGHT * (1 - value / highest)
        parts.append(_GRID.format(LEFT, WIDTH - RIGHT, y))
        parts.append(_Y_TEXT.format(LEFT - 6, y + 4, short(value)))
    return Markup("").join(parts)


def _x_axis(ticks: Sequence[tuple[float, str]], title: str) -> Markup:
    texts = [_X_TEXT.format(x, HEIGHT - BOTTOM + 16, words) for x, words in ticks]
    return Markup("").join([*texts, _X_TEXT.format(LEFT + _INNER_WIDTH / 2, HEIGHT - 6, title)])


def _round_up(number: int) -> int:
    """Return the next number of the form 2, 4, 6, 10, 20, ..., so that its half is round too."""
    size = 1
    while True:
        for step in (2, 4, 6, 10):
            if number <= step * size:
                return step * size
        size *= 10
