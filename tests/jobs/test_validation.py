"""A worker's part of an evaluation: the parts together are the whole, to the last digit."""

import io
import json
from pathlib import Path

import torch
from PIL import Image

from jobs import demo, training_set, validation
from jobs.storage import open_store
from segmodel import bundle, coco, scenes
from segmodel.evaluation import CocoMatches
from tests.jobs.conftest import put_shard

SEEDS = range(3000, 3005)
SIZE_HW = (64, 96)


def test_two_parts_of_one_row_group_are_the_whole_together(tmp_path: Path) -> None:
    made = [scenes.scene(seed, SIZE_HW) for seed in SEEDS]
    rows = list(coco.rows(scenes.coco(made, [f"{seed}.png" for seed in SEEDS])))
    for row, scene in zip(rows, made, strict=True):
        data = io.BytesIO()
        Image.fromarray(scene.image).save(data, "PNG")
        row["image"] = {"bytes": data.getvalue(), "path": row["key"]}
    store = open_store(str(tmp_path))
    put_shard(store, "00000000", rows, group_rows=len(rows))
    categories = [{"id": category.id, "name": category.name} for category in scenes.CATEGORIES]
    manifest = {"categories": categories, "shards": 1, "counts": {"images": len(rows)}}
    store.put("_manifest.json", json.dumps(manifest).encode())
    chunks = training_set.load([str(tmp_path)], None).chunks
    model = bundle.load(demo.MODEL)

    def matches(part: int, num_parts: int) -> CocoMatches:
        mine = training_set.rows(chunks, part, num_parts)
        return validation.matches(mine, model, torch.device("cpu"), 1)

    whole, first, second = matches(0, 1), matches(0, 2), matches(1, 2)
    expected = validation.scores(whole.summary())
    assert expected["mask_AP"] > 0
    assert validation.scores(first.summary()) != expected
    first.merge(second)
    assert validation.scores(first.summary()) == expected
