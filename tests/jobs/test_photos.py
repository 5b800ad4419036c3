"""Real photos on an S3 server: 128 of COCO, 136 of pedestrians, 20 hostile files, all in tars; a part in each format.

Needs ../shared/data beside the checkout.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from jobs.storage import open_store
from jobs.store import Store
from segmodel import rle as rle_
from segmodel.schema import TRAINING

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not DATA.exists(), reason="the shared photos are not beside the checkout"),
]

FORMATS = ("webdataset", "parquet", "images", "manifest")
# All photos are predicted from tars. Of the other formats, each such one and all hostile files: what differs is how
# they are found and read.
EVERY = 4
PER_SHARD = 48


def photos() -> dict[str, Path]:
    """Path of every photo by a unique name: `<set>/<file>`."""
    folders = {
        "coco": [DATA / "coco" / "images", DATA / "coco" / "unlabelled"],
        "pedestrians": [DATA / "pennfudan" / "images"],
        "hard": [DATA / "hard"],
    }
    return {
        f"{name}/{path.name}": path
        for name, places in folders.items()
        for place in places
        for path in sorted(place.iterdir())
        if path.suffix != ".json"
    }


def some_photos() -> dict[str, Path]:
    return {
        name: path
        for number, (name, path) in enumerate(photos().items())
        if name.startswith("hard/") or number % EVERY == 0
    }


def hard_files() -> dict[str, dict[str, Any]]:
    manifest = json.loads((DATA / "hard" / "manifest.json").read_text(encoding="utf-8"))
    return {f"hard/{entry['file']}": entry for entry in manifest["files"]}


def put(store: Store, files: dict[str, Path], format_: str) -> None:
    names = list(files)
    shards = [names[start : start + PER_SHARD] for start in range(0, len(names), PER_SHARD)]
    if format_ == "webdataset":
        for number, members in enumerate(shards):
            data = io.BytesIO()
            with tarfile.open(fileobj=data, mode="w") as archive:
                for name in members:
                    archive.add(files[name], arcname=name)
            store.put(f"{number:03d}.tar", data.getvalue())
    elif format_ == "parquet":
        for number, members in enumerate(shards):
            rows = [{"image": {"bytes": files[n].read_bytes(), "path": n}} for n in members]
            data = io.BytesIO()
            schema = pa.schema([TRAINING.field("image")])
            pq.write_table(pa.Table.from_pylist(rows, schema), data, row_group_size=20)
            store.put(f"{number:03d}.parquet", data.getvalue())
    else:
        for name, path in files.items():
            store.put(f"files/{name}" if format_ == "manifest" else name, path.read_bytes())
        if format_ == "manifest":
            lines = [json.dumps({"uri": f"files/{name}"}) for name in files]
            store.put("all.jsonl", "\n".join(lines).encode())


def run(source: str, output: str, endpoint: str, model: Path) -> dict[str, dict[str, Any]]:
    """Predict, and return the rows by `<set>/<file>`."""
    arguments = ["--input", source, "--output", output, "--model", str(model)]
    arguments += ["--endpoint-url", endpoint, "--score-threshold", "0", "--max-detections", "5"]
    assert main(["predict", *arguments]) == 0
    store = open_store(output, endpoint)
    rows = [
        row
        for found in store.list_objects("predictions")
        for row in pq.read_table(io.BytesIO(store.read(found.path))).to_pylist()
    ]
    named = {"/".join(f"{row['shard']}/{row['key']}".split("/")[-2:]): row for row in rows}
    assert len(rows) == len(named) == len({row["image_id"] for row in rows})
    return named


@pytest.fixture(scope="module")
def tables(ray_local: None, s3: Any, tiny_bundle: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by name, for each format, and for one of them a second time."""
    found = {}
    for format_ in FORMATS:
        root, files = s3.new_bucket(), photos() if format_ == "webdataset" else some_photos()
        put(open_store(f"{root}/in", s3.endpoint_url), files, format_)
        source = f"{root}/in/all.jsonl" if format_ == "manifest" else f"{root}/in"
        found[format_] = run(source, f"{root}/out", s3.endpoint_url, tiny_bundle)
        if format_ == "images":
            found["again"] = run(source, f"{root}/again", s3.endpoint_url, tiny_bundle)
    return found


@pytest.mark.parametrize("format_", FORMATS)
def test_as_many_rows_as_images_each_with_the_expected_status(
    format_: str, tables: dict[str, dict[str, dict[str, Any]]]
) -> None:
    rows, hard = tables[format_], hard_files()
    if format_ == "webdataset":
        assert rows.keys() == photos().keys()
        assert len(rows) == 128 + 136 + 20
    else:
        assert rows.keys() == some_photos().keys()
        assert len(rows) == (128 + 136) / EVERY + 20
    for name, row in rows.items():
        expected = hard.get(name, {"expect": "ok"})
        assert row["status"] in (expected["expect"], *expected.get("also_accept", ()))
        if row["status"] == "ok" and "width" in expected:
            assert (row["height"], row["width"]) == (expected["height"], expected["width"])


@pytest.mark.parametrize("format_", FORMATS)
def test_masks_decode_to_the_size_and_agree_with_box_and_area(
    format_: str, tables: dict[str, dict[str, dict[str, Any]]]
) -> None:
    instances = 0
    for row in tables[format_].values():
        for found in row["detections"]:
            mask = rle_.decode(found["segmentation"])
            assert mask.shape == (row["height"], row["width"])
            assert mask.sum() == found["area"]
            x, y, width, height = found["bbox"]
            ys, xs = np.nonzero(mask)
            if len(ys):
                # A mask reaches past its box by the paste's border of one cell and whole pixels.
                slack_x, slack_y = 2 + width / 28, 2 + height / 28
                assert x - slack_x <= xs.min() <= xs.max() <= x + width + slack_x
                assert y - slack_y <= ys.min() <= ys.max() <= y + height + slack_y
                instances += 1
    assert instances > (500 if format_ == "webdataset" else 500 / EVERY)


def test_every_format_and_a_second_run_give_the_same_detections(
    tables: dict[str, dict[str, dict[str, Any]]],
) -> None:
    first = {name: row["detections"] for name, row in tables["webdataset"].items()}
    for format_ in ("again", "parquet", "images", "manifest"):
        other = {name: row["detections"] for name, row in tables[format_].items()}
        assert other == {name: first[name] for name in some_photos()}
