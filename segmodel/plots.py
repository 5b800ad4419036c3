"""Pictures of how good a model is and how it became so: each function returns the bytes of a PNG.

Figures are drawn with matplotlib's objects on a canvas of their own, never with pyplot, so that
they need no display, share no state, and can be drawn in any thread.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from segmodel.matching import IOU_THRESHOLDS
from segmodel.metrics import RECALL_THRESHOLDS, Metrics

Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]
Point: TypeAlias = Mapping[str, float]

DPI = 110
GREY, INK = "#5f6b7a", "#1f2933"
RIGHT, WRONG = "#0b6e99", "#c2410c"
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#b8860b", "#64473a", "#4c5fd5")
# More curves than colours can be told apart by nobody.
MAX_CURVES = len(COLOURS)
# A matrix of more categories has cells too small to see; numbers are legible up to MAX_NUMBERED.
MAX_CELLS, MAX_NUMBERED = 60, 24
MAX_NAME = 22  # characters of a category's name

SMOOTHING = 50  # a curve is smoothed over this part of its length
LOSSES = {
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposal box",
}
SCORES = {"mask_AP": "mask AP", "mask_AP50": "mask AP50", "box_AP": "box AP"}


def precision_recall(metrics: Mapping[str, Metrics]) -> bytes:
    """Draw precision over recall: by IoU threshold, and by category where there are several.

    Args:
        metrics: By what they are of, such as "masks" and "boxes"; a panel each, and for the first
            one more with its categories of most truth.
    """
    first = next(iter(metrics.values()))
    known = [k for k, c in enumerate(first.per_category.values()) if c.num_truth]
    figure, panels = _panels(1, len(metrics) + (len(known) > 1))
    for axes, (what, of) in zip(panels, metrics.items(), strict=False):
        _draw_thresholds(axes, of, f"{what}: mean over categories, by IoU")
    if len(known) > 1:
        _draw_categories(panels[-1], first, known, f"{next(iter(metrics))}: categories at IoU 0.50")
    for axes in panels:
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    return _png(figure)


def confusion(matrix: Int64, names: Sequence[str], note: str = "") -> bytes:
    """Draw a confusion matrix.

    Blue is right and orange is wrong. Cells of categories are coloured by their share of the row's
    truth; those of the last row, what was found in the background, by their share of what was
    predicted as the column's category.

    Args:
        matrix: (K + 1, K + 1) int64: rows are of truth, columns of predictions, the last is
            background.
        names: Of the K categories; the 60 with the most instances are drawn.
        note: More for the title.
    """
    shown = _most(matrix, len(names))
    cells = np.array([*shown, len(names)])
    # A background taken for background is nothing that could be counted.
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shares[-1] = matrix[-1] / np.maximum(matrix.sum(axis=0), 1)
    counts, shares = matrix[np.ix_(cells, cells)], shares[np.ix_(cells, cells)]
    side = min(4.5 + 0.42 * len(cells), 16.0)
    figure = Figure(figsize=(side, side + 0.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    _draw_cells(axes, counts, shares)
    _label_cells(axes, [_name(names[k]) for k in shown])
    left_out = len(names) - len(shown)
    cut = f" ({len(shown)} of {len(names)} categories)" if left_out else ""
    axes.set_title(f"Confusion matrix{cut}" + (f"\n{note}" if note else ""), pad=12)
    return _png(figure)


def curves(history: Sequence[Point]) -> bytes:
    """Draw how a training went.

    Args:
        history: In the order of steps. Training points have `step`, `epoch`, `loss`, its parts
            (`LOSSES`), `learning_rate` and `images_per_second`; evaluation points `step`, `epoch`
            and scores (`SCORES`). What is absent is not drawn; what is not finite is left out.
    """
    figure, panels = _panels(2, 2)
    loss, scores, rate, speed = panels
    _draw_losses(loss, history)
    for (key, label), colour in zip(SCORES.items(), COLOURS, strict=False):
        steps, values = _series(history, key)
        if len(steps):
            best = int(values.argmax())
            words = f"{label}: best {values[best]:.3f} at step {steps[best]:.0f}"
            scores.plot(steps, values, "o-", color=colour, label=words, markersize=3.5)
    scores.set(title="Average precision on the validation set", ylabel="AP (0 to 1)")
    rate.plot(*_series(history, "learning_rate"), ".-", color=COLOURS[0], markersize=2)
    rate.set(title="Learning rate", ylabel="learning rate")
    rate.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _draw_smoothed(speed, _series(history, "images_per_second"), COLOURS[2], "images/s")
    speed.set(title="Throughput", ylabel="images/s")
    for axes in (scores, rate, speed):
        axes.set_ylim(bottom=0)
    _share_steps(panels, history)
    for axes in (loss, scores, speed):
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.0 * columns, 4.3 * rows), dpi=DPI, layout="constrained")
    panels = [figure.add_subplot(rows, columns, n + 1) for n in range(rows * columns)]
    for axes in panels:
        axes.grid(color="#e3e6ea", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _draw_thresholds(axes: Axes, metrics: Metrics, title: str) -> None:
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(IOU_THRESHOLDS)))
    best = metrics.precision[:, :, :, 0, -1]  # (T, R, K), of all areas, with the most detections
    present = best[0, 0] > -1
    for threshold, precision, colour in zip(IOU_THRESHOLDS, best, colours, strict=True):
        if present.any():
            mean = precision[:, present].mean(axis=1)
            label = f"{threshold:.2f}   AP {mean.mean():.3f}"
            axes.plot(RECALL_THRESHOLDS, mean, color=colour, linewidth=1.6, label=label)
    if present.any():
        _legend_beside(axes, "IoU")
    axes.set_title(
        f"{title}\nAP {metrics.AP:.3f}, AP50 {metrics.AP50:.3f}, AP75 {metrics.AP75:.3f}"
    )


def _draw_categories(axes: Axes, metrics: Metrics, known: Sequence[int], title: str) -> None:
    categories = list(metrics.per_category.items())
    most = sorted(known, key=lambda k: -categories[k][1].num_truth)[:MAX_CURVES]
    for k, colour in zip(most, COLOURS, strict=False):
        name, category = categories[k]
        label = f"{_name(name)}   AP50 {category.AP50:.3f}"
        precision = metrics.precision[0, :, k, 0, -1]
        axes.plot(RECALL_THRESHOLDS, precision, color=colour, linewidth=1.6, label=label)
    cut = (
        f"{len(most)} of {len(known)}, those with the most truth" if len(most) < len(known) else ""
    )
    _legend_beside(axes, "")
    axes.set_title(f"{title}\n{cut}")


def _legend_beside(axes: Axes, title: str) -> None:
    # Curves may run anywhere in a panel: no corner of it is free for sure.
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(title=title, fontsize=8, title_fontsize=8, frameon=False, **place)


def _most(matrix: Int64, num_categories: int) -> list[int]:
    """Return the categories with the most instances, in their order."""
    instances = (matrix.sum(axis=0) + matrix.sum(axis=1))[:num_categories]
    return sorted(np.argsort(-instances, kind="stable")[:MAX_CELLS].tolist())


def _draw_cells(axes: Axes, counts: Int64, shares: Float64) -> None:
    last = len(counts) - 1
    right = np.eye(len(counts), dtype=np.bool_)
    right[last, last] = False
    for colour, hidden in ((RIGHT, ~right), (WRONG, right)):
        axes.imshow(np.ma.masked_array(shares, hidden), cmap=_tint(colour), vmin=0, vmax=1)
    axes.axhline(last - 0.5, color="white", linewidth=3)
    axes.axvline(last - 0.5, color="white", linewidth=3)
    if last > MAX_NUMBERED:
        return
    size = 9 if last < 12 else 7.5
    for (i, j), number in np.ndenumerate(counts):
        if number:
            percent = f"\n{shares[i, j]:.0%}" if last < 12 else ""
            colour = "white" if shares[i, j] > 0.55 else INK
            style: dict[str, Any] = {"color": colour, "fontsize": size}
            axes.text(j, i, f"{number}{percent}", ha="center", va="center", **style)


def _label_cells(axes: Axes, names: Sequence[str]) -> None:
    size = 9 if len(names) <= MAX_NUMBERED else 6.5
    places = range(len(names) + 1)
    axes.set_xticks(places, [*names, "missed"], rotation=90, fontsize=size)
    axes.set_yticks(places, [*names, "background"], fontsize=size)
    axes.set(
        xlabel="predicted (last row: share of the predictions of that category)",
        ylabel="truth (other rows: share of the truth of that category)",
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _tint(colour: str) -> Colormap:
    return LinearSegmentedColormap.from_list("tint", ["#f5f7f9", colour])


def _draw_losses(axes: Axes, history: Sequence[Point]) -> None:
    drawn = [("loss", "all"), *LOSSES.items()]
    for (key, label), colour in zip(drawn, (INK, *COLOURS), strict=False):
        width = 2.0 if key == "loss" else 1.3
        _draw_smoothed(axes, _series(history, key), colour, label, width)
    axes.set(title="Losses (faint: as they were, strong: smoothed)", ylabel="loss")
    _, values = _series(history, "loss")
    if len(values):
        # The first steps are often many times what follows, which would then lie flat.
        axes.set_ylim(0, 1.15 * max(np.percentile(values, 98), 1e-6))
    else:
        axes.set_ylim(bottom=0)


def _draw_smoothed(
    axes: Axes, series: tuple[Float64, Float64], colour: str, label: str, width: float = 1.6
) -> None:
    steps, values = series
    if len(steps):
        smooth = _smoothed(values)
        marker = "." if len(steps) == 1 else ""
        axes.plot(steps, values, marker=marker, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth, color=colour, linewidth=width, label=f"{label}: {smooth[-1]:.3g}")


def _smoothed(values: Float64) -> Float64:
    """Return the mean over a window around each value, as far as there are values: (N,) -> (N,)."""
    half = len(values) // SMOOTHING // 2
    sums = np.concatenate([[0.0], values.cumsum()])
    places = np.arange(len(values))
    starts, stops = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    smooth: Float64 = (sums[stops] - sums[starts]) / (stops - starts)
    return smooth


def _series(history: Sequence[Point], key: str) -> tuple[Float64, Float64]:
    """Return steps and values of the points that have a finite one."""
    found = [(p["step"], p[key]) for p in history if key in p and math.isfinite(p[key])]
    steps, values = np.array(found, np.float64).reshape(-1, 2).T
    return steps, values


def _share_steps(panels: Sequence[Axes], history: Sequence[Point]) -> None:
    """Give all panels the same steps, with the epochs above them."""
    last = max((point["step"] for point in history), default=0)
    epochs = max((point["epoch"] for point in history), default=0)
    for axes in panels:
        axes.set(xlabel="optimizer step", xlim=(0, max(last, 1)))
        if last and epochs:
            _draw_epochs(axes, epochs / last)


def _draw_epochs(axes: Axes, epochs_per_step: float) -> None:
    def to_epochs(steps: npt.ArrayLike) -> npt.ArrayLike:
        return np.asarray(steps) * epochs_per_step

    def to_steps(epochs: npt.ArrayLike) -> npt.ArrayLike:
        return np.asarray(epochs) / epochs_per_step

    above = axes.secondary_xaxis("top", functions=(to_epochs, to_steps))
    above.set_xlabel("epoch", fontsize=8, color=GREY)
    above.tick_params(labelsize=7.5, colors=GREY, length=2)


def _name(name: str) -> str:
    """Shorten a name, and keep matplotlib from reading formulas or a hidden label into it."""
    short = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
    return f" {short}".replace("$", r"\$") if short.startswith("_") else short.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    with warnings.catch_warnings():
        # Categories may be named in any script; where the font lacks it a box is drawn.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        FigureCanvasAgg(figure)
        trim: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.15}
        figure.savefig(data, format="png", metadata={"Software": None}, **trim)
    return data.getvalue()
