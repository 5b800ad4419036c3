"""`segjobs demo [--output DIR]`: the main job on one machine with no network, small.

Input: none. Output: synthetic shards with known truth, the table that `predict` makes of them with
the shipped model, its evaluation, `overlays.png`, a picture of truth and predictions, and the
report, a page to look at. The commands are printed, so that they can be typed.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rich.table import Table

from jobs import scene_shards
from jobs.config import DemoConfig
from jobs.console import console
from segmodel import scenes
from segmodel.drawing import grid, overlay
from segmodel.scenes import CATEGORIES, Scene

# Trained by `jobs.demo_model` on scenes with other seeds.
MODEL = Path(__file__).with_name("demo_bundle")
SCENES_PER_SHARD = 16
# What scores lower is in the table, where AP wants it, but would clutter a picture.
SHOWN_SCORE = 0.5
PICTURE_SCENES = 6
ROWS_SHOWN = 8


def run(config: DemoConfig) -> int:
    """Make shards, predict them, evaluate, show what came out; return the exit code."""
    folder = Path(config.output)
    if (folder / "table").exists():
        console.print(
            f"{folder} is there from an earlier demo: what is finished is not done again.\n"
        )
    seeds = range(config.seed, config.seed + config.scenes)
    made = scene_shards.make(folder, seeds, SCENES_PER_SHARD)
    console.print(f"{config.scenes} synthetic scenes with known truth are in {folder}/shards.\n")
    code = (
        _segjobs(
            *("predict", "--input", f"{folder}/shards", "--model", str(MODEL)),
            *("--output", f"{folder}/table", "--chunk-size", str(SCENES_PER_SHARD)),
        )
        or _segjobs(
            *("evaluate", "--predictions", f"{folder}/table"),
            *("--annotations", f"{folder}/truth.json", "--output", f"{folder}/evaluation"),
        )
        or _segjobs(
            *("report", "--predictions", f"{folder}/table", "--images", f"{folder}/shards"),
            *("--truth", f"{folder}/truth.json", "--output", f"{folder}/report"),
        )
    )
    if code:
        return code
    rows = pq.read_table(folder / "table" / "predictions").to_pylist()
    _show_rows(rows)
    picture = folder / "overlays.png"
    _draw(picture, made, {row["key"]: row for row in rows})
    console.print(
        f"\nOverlays: {picture} (left the truth, right what the model finds at a score of {SHOWN_SCORE} "
        f"or more).\nEvaluation: {folder}/evaluation.\nReport, to be opened in a browser: "
        f"{(folder / 'report' / 'index.html').absolute()}"
    )
    return 0


def _segjobs(*arguments: str) -> int:
    """Run a verb as the command line does."""
    # Imported late: the command line imports verbs.
    from jobs.__main__ import main

    console.print(f"$ segjobs {shlex.join(arguments)}", style="bold cyan", markup=False)
    code = main(arguments)
    console.print()
    return code


def _show_rows(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"The table's first rows, of {len(rows)}", title_justify="left")
    table.add_column("image_id", no_wrap=True)
    for name in ("size", "status", "found", "best", "bbox"):
        table.add_column(name)
    for row in rows[:ROWS_SHOWN]:
        found = row["detections"]
        best = found[0] if found else None
        table.add_row(
            row["image_id"],
            f"{row['height']} x {row['width']}",
            row["status"],
            str(len(found)),
            f"{best['category']} {best['score']:.2f}" if best else "",
            " ".join(f"{value:.0f}" for value in best["bbox"]) if best else "",
        )
    console.print(table)


def _draw(path: Path, made: Sequence[Scene], rows: dict[str, dict[str, Any]]) -> None:
    """Draw truth and predictions of the first scenes side by side."""
    names = scene_shards.names(len(made))
    truth = scenes.coco(made, names)
    category_names = {category.id: category.name for category in CATEGORIES}
    pairs = []
    for number, name in enumerate(names[:PICTURE_SCENES]):
        image = made[number].image
        known = [one for one in truth["annotations"] if one["image_id"] == number + 1]
        found = [one for one in rows[name]["detections"] if one["score"] >= SHOWN_SCORE]
        pairs.append(_overlay(image, known, [category_names[one["category_id"]] for one in known]))
        pairs.append(_overlay(image, found, [one["category"] for one in found]))
    Image.fromarray(grid(pairs, columns=4)).save(path)


def _overlay(
    image: "np.ndarray[Any, np.dtype[np.uint8]]", found: Sequence[dict[str, Any]], names: list[str]
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return overlay(
        image,
        [one["bbox"] for one in found],
        names,
        [one["segmentation"] for one in found],
        [one.get("score") for one in found],
    )
