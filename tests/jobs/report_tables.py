"""Tables with their images, for the tests of the report: scenes with known truth, and what was found."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from segmodel import scenes
from segmodel.schema import PREDICTIONS

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>&amp;'
HOSTILE_CATEGORY = 'star"><script>alert(2)</script>'
NUM_SCENES = 8
Row = dict[str, Any]


def put_table(folder: Path, rows: list[Row], rows_per_group: int = 3) -> None:
    path = folder / "table" / "predictions"
    path.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, PREDICTIONS)
    table = table.replace_schema_metadata({"segjobs.model_digest": "abc123"})
    pq.write_table(
        table, path / "00000000.parquet", row_group_size=rows_per_group, write_page_checksum=True
    )


def make_scenes(folder: Path) -> list[Row]:
    """Write `images/*.jpg`, `truth.json` and a table of what was found; return the table's rows.

    Of each scene the first object is missed, and one is found that is not there; two images are in
    error, the file of one of them is gone; a key and a category hold HTML.
    """
    made = [scenes.scene(seed, (120, 160)) for seed in range(NUM_SCENES)]
    names = [f"scene {n}.jpg" for n in range(NUM_SCENES)]
    names[1] = HOSTILE.replace("/", ":") + ".jpg"
    (folder / "images").mkdir(parents=True)
    for one, name in zip(made, names, strict=True):
        Image.fromarray(one.image).save(folder / "images" / name, quality=90)
    truth = scenes.coco(made, names)
    category_names = {category["id"]: category["name"] for category in truth["categories"]}
    category_names[4] = HOSTILE_CATEGORY
    for category in truth["categories"]:
        category["name"] = category_names[category["id"]]
    (folder / "truth.json").write_text(json.dumps(truth))
    rows = []
    for number, name in enumerate(names):
        known = [one for one in truth["annotations"] if one["image_id"] == number + 1]
        found = [_found(one, category_names, 0.95 - 0.1 * n) for n, one in enumerate(known[1:])]
        if known:
            found.append(_elsewhere(known[0], 0.6 + 0.04 * number))
        rows.append(row(name, made[number].image.shape[:2], found))
    for number, error in ((6, "truncated: <b>it ends</b>"), (7, "missing: gone")):
        rows[number] |= {"status": "error", "error": error, "detections": []}
        rows[number] |= {"height": None, "width": None}
    (folder / "images" / names[7]).unlink()
    put_table(folder, rows)
    return rows


def row(name: str, size_hw: tuple[int, ...], found: list[Row]) -> Row:
    return {
        "image_id": f"#{name}",
        "shard": "",
        "key": name,
        "height": size_hw[0],
        "width": size_hw[1],
        "status": "ok",
        "error": None,
        "detections": found,
    }


def _found(one: Row, names: dict[int, str], score: float) -> Row:
    kept = {name: one[name] for name in ("category_id", "bbox", "area", "iscrowd", "segmentation")}
    return kept | {"category": names[one["category_id"]], "score": score}


def _elsewhere(one: Row, score: float) -> Row:
    """A detection of a category that no scene has."""
    return _found(one | {"category_id": 9}, {9: "ghost"}, score)


def many_rows(folder: Path, num_rows: int, names: list[str], size_hw: tuple[int, int]) -> None:
    """Write a table of many rows with the masks of one, whose images are few."""
    rng = np.random.default_rng(0)
    base = [_found(one, {1: "disc", 2: "box", 4: "star", 7: "ring"}, 0.5) for one in _one_truth()]
    table = pa.Table.from_pylist([row(names[0], size_hw, base)] * num_rows, PREDICTIONS)
    ids = pa.array([f"{n}#{names[n % len(names)]}" for n in range(num_rows)])
    keys = pa.array([names[n % len(names)] for n in range(num_rows)])
    flat = table["detections"].combine_chunks()
    items = flat.flatten()
    columns = [items.field(n) for n in range(items.type.num_fields)]
    columns[2] = pa.array(rng.random(len(items)).astype(np.float32))
    items = pa.StructArray.from_arrays(columns, fields=list(items.type))
    detections = pa.ListArray.from_arrays(flat.offsets, items).cast(PREDICTIONS.field(7).type)
    table = table.set_column(0, PREDICTIONS.field(0), ids)
    table = table.set_column(2, PREDICTIONS.field(2), keys)
    table = table.set_column(7, PREDICTIONS.field(7), detections)
    path = folder / "table"
    path.mkdir(parents=True)
    pq.write_table(table, path / "all.parquet", row_group_size=5000, compression="zstd")


def _one_truth() -> list[Row]:
    found: list[Row] = scenes.coco([scenes.scene(0, (480, 640))], ["a"])["annotations"]
    return found


def make_noise(folder: Path, names: list[str], size_hw: tuple[int, int]) -> None:
    """Write images of noise, which no codec makes small."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in names:
        noise = rng.integers(0, 256, (*size_hw, 3), np.uint8)
        Image.fromarray(noise).save(folder / name, "JPEG")


def make_tar(path: Path, names: list[str]) -> None:
    """Write a tar of small images of noise."""
    made = path.with_suffix("")
    make_noise(made, names, (16, 16))
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(made / name, name)
