"""Images written beside an export: where its consumers look for them, whatever they lay in."""

import importlib
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.storage import open_store
from tests.jobs.export_tables import export, put, row, scene_rows
from tests.jobs.labelling_place import Place
from tests.jobs.report_tables import make_tar

NAMES = [f"{n}.jpg" for n in range(6)]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def test_the_queue_of_a_version_of_tars(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.policy("score_threshold: 0.7\nreview_from: 0.6\naudit_share: 0.5\n")
    place.put("a.tar", {name: n for n, name in enumerate(NAMES)})
    assert place.label() == 0
    shutil.rmtree(tmp_path / "in")
    queue = place.rows(1, "review")
    uri = place.named("versions", "1", "review")
    assert "audit" in {one["reason"] for one in queue.values()}
    assert {one["image"] is None for one in queue.values()} == {True, False}
    prefix = ["--image-prefix", str(tmp_path / "ls/images")]
    assert export(uri, "labelstudio", tmp_path / "none.json", *prefix) == 0
    assert f"{len(queue)} images lie inside of tars or Parquet" in said(capsys)
    assert export(uri, "labelstudio", tmp_path / "ls/tasks.json", *prefix, f"--images={uri}") == 0
    assert "lie inside" not in said(capsys)
    tasks = json.loads((tmp_path / "ls/tasks.json").read_text())
    assert len(tasks) == len(queue)
    for task in tasks:
        seed = int(task["data"]["key"].removesuffix(".jpg"))
        assert Path(task["data"]["image"]).read_bytes() == place.jpeg(seed)


def test_datumaro_opens_images_and_masks(place: Place, tmp_path: Path) -> None:
    place.put("a.tar", {name: n for n, name in enumerate(NAMES)})
    assert place.label() == 0
    root = tmp_path / "coco"
    flags = [f"--images={place.named()}"]
    assert export(place.named(), "coco-instances", root / "instances_all.json", *flags) == 0
    (root / "annotations").mkdir()
    (root / "instances_all.json").rename(root / "annotations/instances_all.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datumaro = importlib.import_module("datumaro")
        items = list(datumaro.Dataset.import_from(str(root), "coco_instances"))
        sizes = [item.media.data.shape[:2] for item in items]
    rows = place.rows(1)
    assert sizes == [(24, 32)] * len(rows)
    assert sum(len(item.annotations) for item in items) >= sum(
        len(one["detections"]) for one in rows.values()
    )


def test_ultralytics_finds_images_with_odd_names_and_without_suffix(
    tmp_path: Path, jpeg: Callable[..., bytes]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = importlib.import_module("ultralytics.data.utils")
    found = next(one for one in scene_rows() if one["detections"])["detections"]
    keys = ["00000000", "images/0.jpg", "same.jpg", "same.JPG", "../up.jpg", "x.v2"]
    images = pa.array([jpeg(n, (96, 128)) for n in range(len(keys))], pa.binary())
    (tmp_path / "in").mkdir()
    shard = pa.table({"key": keys, "image": images})
    pq.write_table(shard, tmp_path / "in/s.parquet")
    put(open_store(str(tmp_path / "t")), [row("s.parquet", key, found) for key in keys])
    out = tmp_path / "out"
    assert export(str(tmp_path / "t"), "yolo-seg", out, f"--images={tmp_path / 'in'}") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"in", "t", "out"}
    files = sorted(str(path) for path in (out / "images").rglob("*") if path.is_file())
    assert len(files) == len(keys)
    labels = data.img2label_paths(files)
    assert len(set(labels)) == len(keys)
    contents = []
    for file, label in zip(files, labels, strict=True):
        read = data.verify_image_label((file, label, "", False, 100, 0, 0, False))
        assert len(read[1]) == len(found), file
        contents.append(Path(file).read_bytes())
    assert sorted(contents) == sorted(images.to_pylist())


def test_a_jobs_plan_says_where_images_are(place: Place, tmp_path: Path) -> None:
    place.put("a.tar", {name: n for n, name in enumerate(NAMES)})
    place.put("b.tar", {name: n + 10 for n, name in enumerate(NAMES)})
    assert place.label() == 0
    (job,) = (tmp_path / "set/work").iterdir()
    flags = [f"--images={tmp_path / 'in'}"]
    assert export(str(job), "yolo-seg", tmp_path / "o", *flags) == 0
    for shard, first in (("a.tar", 0), ("b.tar", 10)):
        for n, name in enumerate(NAMES):
            assert (tmp_path / "o/images" / shard / name).read_bytes() == place.jpeg(first + n)


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in/s.tar", NAMES[:2])
    shutil.rmtree(tmp_path / "in/s")
    rows = [row("s.tar", name, [], (16, 16)) for name in NAMES[:3]]
    rows.append(row("t.tar", "0.jpg", [], (16, 16)) | {"status": "error", "error": "corrupt: x"})
    put(open_store(str(tmp_path / "t")), rows, per_object=2)
    flags = [f"--images={tmp_path / 'in'}"]
    assert export(str(tmp_path / "t"), "coco-instances", tmp_path / "o/i.json", *flags) == 3
    assert "1 images are not written: missing: it is not among the images at" in said(capsys)
    named = [one["file_name"] for one in json.loads((tmp_path / "o/i.json").read_text())["images"]]
    assert named == ["s.tar/0.jpg", "s.tar/1.jpg", "s.tar/2.jpg"]
    there = sorted(p for p in (tmp_path / "o/images").rglob("*") if p.is_file())
    assert [str(p.relative_to(tmp_path / "o/images")) for p in there] == named[:2]
    assert Image.open(io.BytesIO(there[0].read_bytes())).size == (16, 16)


def test_a_packed_set_holds_its_images(
    put_packed: Callable[..., Any], tmp_path: Path, bucket: Any
) -> None:
    rows = put_packed(bucket.store("set"), 45)
    uri, endpoint = f"{bucket.uri}/set", f"--endpoint-url={bucket.endpoint_url}"
    assert export(uri, "semantic-png", f"{bucket.uri}/o", endpoint, f"--images={uri}") == 0
    written = {one.path for one in bucket.store("o/images").list_objects()}
    assert written == {f"all/{one['key']}" for one in rows}
    one = bucket.store("o/images").read("all/41.jpg")
    assert one == rows[41]["image"]["bytes"]


def test_images_that_are_there_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in/s.tar", NAMES[:1])
    shutil.rmtree(tmp_path / "in/s")
    put(open_store(str(tmp_path / "t")), [row("s.tar", "0.jpg", [], (16, 16))])
    mine = tmp_path / "o/images/mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    flags = [f"--images={tmp_path / 'in'}"]
    table = str(tmp_path / "t")
    assert export(table, "coco-instances", tmp_path / "o/i.json", *flags) == 1
    assert "images is there already" in said(capsys)
    assert export(table, "coco-instances", tmp_path / "o/i.json", *flags, "--overwrite") == 0
    assert mine.read_text() == "mine"
    assert export(table, "coco-instances", tmp_path / "in/o/i.json", *flags) == 2
    assert "lies within --images" in said(capsys)
    # What an export wrote goes with it, what a person put there does not.
    assert export(table, "yolo-seg", tmp_path / "y", *flags) == 0
    assert export(table, "semantic-png", tmp_path / "y", "--overwrite") == 0
    assert not (tmp_path / "y/images/s.tar/0.jpg").exists()
    (tmp_path / "y/images/s.tar/0.jpg").write_text("mine")
    assert export(table, "yolo-seg", tmp_path / "y", "--overwrite") == 0
    assert (tmp_path / "y/images/s.tar/0.jpg").read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        export(table, "coco-results", tmp_path / "r.json", *flags)
