"""Tables to export, with names that tools trip over, for the tests of export."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from jobs.__main__ import main
from jobs.store import Store
from segmodel import scenes
from segmodel.schema import PREDICTIONS

Row = dict[str, Any]
ODD = ("../../up.jpg", "/root.jpg", "a b#c%.jpg", ".hidden.jpg", "same.jpg", "same.png")


def scene_rows() -> list[Row]:
    """Rows of scenes as a detector with scores has them, with odd keys, and one in error."""
    rows = []
    for seed, key in enumerate((*ODD, "plain.jpg", "é中.jpg")):
        scene = scenes.scene(seed, (96, 128))
        names = {category.id: category.name for category in scenes.CATEGORIES}
        found = []
        for n, (category, mask) in enumerate(zip(scene.category_ids, scene.masks, strict=True)):
            made = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            found.append(
                {
                    "category_id": category,
                    "category": names[category],
                    "score": float(np.float32(0.95 - 0.1 * n)),
                    "bbox": coco_mask.toBbox(made).tolist(),
                    "area": float(coco_mask.area(made)),
                    "iscrowd": 0,
                    "segmentation": {"size": [96, 128], "counts": made["counts"].decode()},
                }
            )
        rows.append(row("s/1.tar", key, found))
    failed = row("s/1.tar", "broken.jpg", [])
    rows.insert(3, failed | {"status": "error", "error": "corrupt: x", "height": None})
    return rows


def row(shard: str, key: str, found: list[Row], size_hw: tuple[int, int] = (96, 128)) -> Row:
    made = {"image_id": f"{shard}#{key}", "shard": shard, "key": key, "error": None}
    made |= {"height": size_hw[0], "width": size_hw[1], "status": "ok"}
    return made | {"detections": found}


def put(store: Store, rows: list[Row], per_object: int = 4) -> None:
    for start in range(0, len(rows), per_object):
        data = io.BytesIO()
        footer = {"segjobs.model_digest": "0123456789abcdef"}
        table = pa.Table.from_pylist(rows[start : start + per_object], PREDICTIONS)
        table = table.replace_schema_metadata(footer)
        pq.write_table(table, data, row_group_size=3, write_page_checksum=True)
        store.put(f"predictions/{start:08}.parquet", data.getvalue())


def export(uri: str, to: str, output: Path | str, *flags: str) -> int:
    return main(["export", f"--predictions={uri}", f"--to={to}", f"--output={output}", *flags])
