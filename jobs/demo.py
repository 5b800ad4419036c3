"""`segjobs demo [--output DIR]`: the main job on one machine with no network, small.

Input: none. Output: synthetic shards with known truth, a model bundle, the table that `predict`
makes of them, and `overlays.png`, a picture of truth and predictions. The commands are printed, so
that they can be typed.
"""

import io
import json
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image
from rich.table import Table

from jobs.config import DemoConfig
from jobs.console import console
from segmodel import scenes
from segmodel.drawing import grid, overlay
from segmodel.scenes import CATEGORIES, Scene

SCENES_PER_SHARD = 16
DETECTIONS = 6
PICTURE_SCENES = 6
ROWS_SHOWN = 8


def run(config: DemoConfig) -> int:
    """Make shards, predict them, show what came out; return the exit code."""
    folder = Path(config.output)
    if (folder / "table").exists():
        console.print(
            f"{folder} is there from an earlier demo: what is finished is not done again.\n"
        )
    made = [scenes.scene(config.seed + number) for number in range(config.scenes)]
    names = [f"scene-{number:05d}.jpg" for number in range(config.scenes)]
    _write_shards(folder / "shards", made, names)
    (folder / "truth.json").write_text(json.dumps(scenes.coco(made, names)))
    categories = [{"id": category.id, "name": category.name} for category in CATEGORIES]
    (folder / "categories.yaml").write_text(yaml.safe_dump(categories))
    console.print(f"{config.scenes} synthetic scenes with known truth are in {folder}/shards.\n")

    code = _segjobs(
        *("init", "--arch", "small", "--weights", "random", "--seed", "1"),
        *("--categories", f"{folder}/categories.yaml", "--output", f"{folder}/model"),
    ) or _segjobs(
        *("predict", "--input", f"{folder}/shards", "--model", f"{folder}/model"),
        *("--output", f"{folder}/table", "--chunk-size", str(SCENES_PER_SHARD)),
        *("--score-threshold", "0", "--max-detections", str(DETECTIONS)),
    )
    if code:
        return code
    rows = pq.read_table(folder / "table" / "predictions").to_pylist()
    _show_rows(rows)
    picture = folder / "overlays.png"
    _draw(picture, made, {row["key"]: row for row in rows}, names)
    console.print(
        f"\nOverlays: {picture} (left the truth, right the predictions).\n"
        "The model has random weights, so what it finds means nothing yet: the demo shows the job, not the "
        "quality."
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


def _write_shards(folder: Path, made: Sequence[Scene], names: Sequence[str]) -> None:
    """Write WebDataset shards of JPEGs, byte for byte the same for the same scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(made), SCENES_PER_SHARD):
        path = folder / f"scenes-{start // SCENES_PER_SHARD:03d}.tar"
        aside = path.with_suffix(".part")
        with tarfile.open(aside, "w") as shard:
            for one, name in list(zip(made, names, strict=True))[start : start + SCENES_PER_SHARD]:
                encoded = io.BytesIO()
                Image.fromarray(one.image).save(encoded, "JPEG", quality=92)
                member = tarfile.TarInfo(name)
                member.size = encoded.tell()
                encoded.seek(0)
                shard.addfile(member, encoded)
        if path.exists() and path.read_bytes() == aside.read_bytes():
            # A plan knows a local shard by its time of change: the same shard stays as it is.
            aside.unlink()
        else:
            aside.replace(path)


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


def _draw(
    path: Path, made: Sequence[Scene], rows: dict[str, dict[str, Any]], names: Sequence[str]
) -> None:
    """Draw truth and predictions of the first scenes side by side."""
    truth = scenes.coco(made, names)
    category_names = {category.id: category.name for category in CATEGORIES}
    pairs = []
    for number, name in enumerate(names[:PICTURE_SCENES]):
        image = made[number].image
        known = [one for one in truth["annotations"] if one["image_id"] == number + 1]
        found = rows[name]["detections"]
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
