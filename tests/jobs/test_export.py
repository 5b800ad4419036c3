"""Exports open in their consumers, with the same counts, boxes and mask areas as the table."""

import contextlib
import gc
import importlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from jobs import tables
from jobs.json_files import image_url
from jobs.storage import open_store
from jobs.store import WindowedFile
from segmodel import class_map, rle, scenes
from segmodel.schema import PREDICTIONS
from tests.jobs.export_tables import Row, export, put, row, scene_rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row]]:
    folder = tmp_path_factory.mktemp("table")
    put(open_store(str(folder)), scene_rows())
    return str(folder), [one for one in scene_rows() if one["status"] == "ok"]


def opened(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_pycocotools_opens_instances(
    table: tuple[str, list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, rows = table
    path = tmp_path / "instances.json"
    assert export(uri, "coco-instances", path) == 0
    assert "1 rows are left out: they are in error" in capsys.readouterr().out
    coco = opened(path)
    assert [coco.imgs[n]["file_name"] for n in coco.getImgIds()] == [
        f"s/1.tar/{one['key']}" for one in rows
    ]
    wanted = [one for r in rows for one in r["detections"]]
    annotations = coco.loadAnns(coco.getAnnIds())
    assert [a["id"] for a in annotations] == list(range(1, len(wanted) + 1))
    assert len(wanted) > 20
    for annotation, one in zip(annotations, wanted, strict=True):
        assert annotation["category_id"] == one["category_id"]
        assert annotation["bbox"] == one["bbox"]
        assert np.float32(annotation["score"]) == np.float32(one["score"])
        assert coco_mask.area(coco.annToRLE(annotation)) == one["area"] == annotation["area"]
        assert annotation["iscrowd"] == 0


def test_datumaro_opens_instances(table: tuple[str, list[Row]], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datumaro = importlib.import_module("datumaro")
        # It refuses names that lead out of its folder, or that differ in their suffix alone.
        rows = [one for one in table[1] if one["key"] not in ("../../up.jpg", "same.png")]
        put(open_store(str(tmp_path / "table")), rows)
        uri = str(tmp_path / "table")
        export(uri, "coco-instances", tmp_path / "annotations/instances_all.json")
        # It looks for the folder, not for what is in it.
        (tmp_path / "images").mkdir()
        found = datumaro.Dataset.import_from(str(tmp_path), "coco_instances")
        items = {item.attributes["id"]: item for item in found}
    assert len(items) == len(rows)
    for number, one in enumerate(rows, start=1):
        found = [of for of in items[number].annotations if hasattr(of, "rle")]
        masks = sorted(found, key=lambda mask: mask.id)
        for mask, wanted in zip(masks, one["detections"], strict=True):
            assert mask.get_area() == wanted["area"]
            assert list(mask.get_bbox()) == wanted["bbox"]


def test_results_are_of_the_instances_numbers(table: tuple[str, list[Row]], tmp_path: Path) -> None:
    uri, rows = table
    export(uri, "coco-instances", tmp_path / "i.json")
    export(uri, "coco-results", tmp_path / "r.json")
    coco = opened(tmp_path / "i.json")
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes(str(tmp_path / "r.json"))
    for number, one in zip(coco.getImgIds(), rows, strict=True):
        results = found.loadAnns(found.getAnnIds([number]))
        assert [r["bbox"] for r in results] == [d["bbox"] for d in one["detections"]]
        # `loadRes` takes the area of the box where there is one.
        areas = [coco_mask.area(r["segmentation"]) for r in results]
        assert areas == [d["area"] for d in one["detections"]]
        assert [r["score"] for r in results] == [d["score"] for d in one["detections"]]


def test_results_take_the_ids_of_annotations(table: tuple[str, list[Row]], tmp_path: Path) -> None:
    uri, rows = table
    images = [
        {"id": 700 - n, "file_name": one["key"], "height": 96, "width": 128}
        for n, one in enumerate(scene_rows())
    ]
    known = [{"id": c.id, "name": c.name} for c in scenes.CATEGORIES]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": images, "annotations": [], "categories": known}))
    assert export(uri, "coco-results", tmp_path / "r.json", f"--annotations={truth}") == 0
    wanted = {one["key"]: 700 - n for n, one in enumerate(scene_rows())}
    results = json.loads((tmp_path / "r.json").read_text())
    assert [r["image_id"] for r in results] == [
        wanted[one["key"]] for one in rows for _ in one["detections"]
    ]
    # Images that the truth has not are an error, or left out where that is asked for.
    truth.write_text(json.dumps({"images": images[:2], "annotations": [], "categories": known}))
    again = ["coco-results", str(tmp_path / "s.json"), f"--annotations={truth}"]
    assert export(uri, *again) == 1
    assert export(uri, *again, "--subset") == 0
    few = json.loads((tmp_path / "s.json").read_text())
    assert {r["image_id"] for r in few} <= {700, 699}


def test_label_studios_own_codec_gives_the_masks_back(
    table: tuple[str, list[Row]], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        brush = importlib.import_module("label_studio_sdk.converter.brush")
    uri, rows = table
    path = tmp_path / "tasks.json"
    assert export(uri, "labelstudio", path, "--image-prefix=https://x.org/photos") == 0
    tasks = json.loads(path.read_text())
    assert len(tasks) == len(rows)
    for task, one in zip(tasks, rows, strict=True):
        assert unquote(task["data"]["image"]) == f"https://x.org/photos/s/1.tar/{one['key']}"
        assert task["data"]["image_id"] == one["image_id"]
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == "segjobs 0123456789ab"
        for region, wanted in zip(prediction["result"], one["detections"], strict=True):
            assert region["value"]["brushlabels"] == [wanted["category"]]
            assert region["score"] == wanted["score"]
            size_hw = region["original_height"], region["original_width"]
            decoded = brush.decode_rle(region["value"]["rle"]).reshape(*size_hw, 4)[..., 3]
            assert ((decoded > 0) == rle.decode(wanted["segmentation"])).all()


def test_yolo_labels(table: tuple[str, list[Row]], tmp_path: Path) -> None:
    uri, rows = table
    assert export(uri, "yolo-seg", tmp_path / "out") == 0
    names = yaml.safe_load((tmp_path / "out/data.yaml").read_text())["names"]
    files = sorted(p.relative_to(tmp_path / "out/labels") for p in tmp_path.rglob("*.txt"))
    assert len(files) == len(rows)
    assert Path("s/1.tar/plain.txt") in files
    assert Path("s/1.tar/same.png.txt") in files
    assert Path("s/1.tar/%2E./%2E./up.txt") in files
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    lines = (tmp_path / "out/labels/s/1.tar/plain.txt").read_text().splitlines()
    plain = next(one for one in rows if one["key"] == "plain.jpg")
    for line, one in zip(lines, plain["detections"], strict=True):
        number, *points = line.split()
        assert names[int(number)] == one["category"]
        xy = np.array(points, float).reshape(-1, 2)
        assert ((xy >= 0) & (xy <= 1)).all()
        left, top, width, height = one["bbox"]
        assert np.allclose(xy.min(axis=0) * (128, 96), (left, top), atol=0.51)
        assert np.allclose(xy.max(axis=0) * (128, 96), (left + width, top + height), atol=0.51)


def test_ultralytics_reads_the_labels(table: tuple[str, list[Row]], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = importlib.import_module("ultralytics.data.utils")
    uri, rows = table
    export(uri, "yolo-seg", tmp_path)
    plain = next(one for one in rows if one["key"] == "plain.jpg")
    image = tmp_path / "images/s/1.tar/plain.jpg"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (128, 96)).save(image)
    (label,) = data.img2label_paths([str(image)])
    found = data.verify_image_label((str(image), label, "", False, 100, 0, 0, False))
    _, classes_and_boxes, _, segments, _, missing, read, _, corrupt, said = found
    assert (missing, read, corrupt, said) == (0, 1, 0, "")
    assert len(classes_and_boxes) == len(plain["detections"])
    drawn = data.polygons2masks(
        (96, 128), [(s * (128, 96)).reshape(-1) for s in segments], color=1, downsample_ratio=1
    )
    for mask, one in zip(drawn, plain["detections"], strict=True):
        wanted = rle.decode(one["segmentation"])
        # It draws the outline too, on whole pixels, and holes are filled: nothing is missing.
        assert (mask.astype(bool) & wanted).sum() / wanted.sum() > 0.97
        assert (mask.astype(bool) & ~wanted).sum() < wanted.sum()


def test_class_maps(table: tuple[str, list[Row]], tmp_path: Path) -> None:
    uri, rows = table
    assert export(uri, "semantic-png", tmp_path) == 0
    legend = json.loads((tmp_path / "legend.json").read_text())
    values = {one["category_id"]: one["value"] for one in legend["classes"]}
    assert len(list(tmp_path.rglob("*.png"))) == len(rows)
    plain = next(one for one in rows if one["key"] == "plain.jpg")
    image = Image.open(tmp_path / "masks/s/1.tar/plain.png")
    assert image.mode == "P"
    assert image.size == (128, 96)
    wanted = class_map.paint(plain["detections"], values, (96, 128))
    assert (np.array(image) == wanted).all()
    for one in legend["classes"]:
        assert class_map.palette()[one["value"]].tolist() == one["colour_rgb"]


def test_more_classes_than_a_byte_has_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rle_ = {
        "size": [2, 2],
        "counts": coco_mask.encode(np.ones((2, 2), np.uint8, order="F"))["counts"].decode(),
    }
    found = [
        {"category_id": n, "category": f"c{n}", "score": 0.5, "bbox": [0, 0, 2, 2], "area": 4}
        | {"iscrowd": 0, "segmentation": rle_}
        for n in range(256)
    ]
    put(open_store(str(tmp_path / "t")), [row("s", "a.jpg", found, (2, 2))])
    assert export(str(tmp_path / "t"), "semantic-png", tmp_path / "o") == 1
    assert "256 categories" in capsys.readouterr().err


def test_low_scores_are_left_out_and_counted(
    table: tuple[str, list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, rows = table
    export(uri, "coco-instances", tmp_path / "i.json", "--score-threshold=0.75")
    scores = [one["score"] for r in rows for one in r["detections"]]
    # 0.75 in float32 is among them: equal is not lower.
    kept = sum(score >= np.float32(0.75) for score in scores)
    assert np.float32(0.75) in np.array(scores, np.float32)
    assert len(opened(tmp_path / "i.json").anns) == kept
    assert f"{len(scores) - kept} detections are left out" in capsys.readouterr().out


def test_boxes_without_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scene_rows()
    for one in rows:
        one["detections"] = [d | {"segmentation": None, "area": None} for d in one["detections"]]
    put(open_store(str(tmp_path / "t")), rows)
    assert export(str(tmp_path / "t"), "coco-results", tmp_path / "r.json") == 0
    assert "segmentation" not in json.loads((tmp_path / "r.json").read_text())[0]
    assert export(str(tmp_path / "t"), "yolo-seg", tmp_path / "y") == 1
    assert "boxes without masks" in capsys.readouterr().err


def test_an_image_that_comes_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(open_store(str(tmp_path / "t")), [row("a", "b.jpg", []), row("a", "b.jpg", [])])
    assert export(str(tmp_path / "t"), "yolo-seg", tmp_path / "o") == 1
    assert "1 images have more than one row" in capsys.readouterr().err


def test_what_is_there_is_not_written_over(
    table: tuple[str, list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, _ = table
    file, folder = tmp_path / "i.json", tmp_path / "y"
    file.write_text("mine")
    folder.mkdir()
    (folder / "notes").write_text("mine")
    for to, output in (("coco-instances", file), ("yolo-seg", folder)):
        assert export(uri, to, output) == 1
        assert "--overwrite" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert export(uri, "coco-instances", folder) == 1
    assert "is a folder" in capsys.readouterr().err
    for to, output in (("coco-instances", file), ("yolo-seg", folder)):
        assert export(uri, to, output, "--overwrite") == 0
    assert opened(file).anns
    assert (folder / "notes").read_text() == "mine"
    # The same export goes on; another one is refused, or replaces the old one.
    assert export(uri, "yolo-seg", folder) == 0
    assert export(uri, "semantic-png", folder) == 1
    assert "another export" in capsys.readouterr().err
    assert export(uri, "semantic-png", folder, "--overwrite") == 0
    assert not list(folder.rglob("*.txt"))
    assert not (folder / "data.yaml").exists()
    assert (folder / "notes").read_text() == "mine"


def test_stores(table: tuple[str, list[Row]], tmp_path: Path, bucket: Any) -> None:
    uri, rows = table
    put(bucket.store("t"), scene_rows())
    endpoint = f"--endpoint-url={bucket.endpoint_url}"
    for to in ("coco-instances", "yolo-seg"):
        here, there = tmp_path / to, f"{bucket.uri}/{to}"
        assert export(uri, to, here) == 0
        assert export(f"{bucket.uri}/t", to, there, endpoint) == 0
    assert bucket.store().read("coco-instances") == (tmp_path / "coco-instances").read_bytes()
    labels = {
        p.path: bucket.store("yolo-seg/labels").read(p.path)
        for p in bucket.store("yolo-seg/labels").list_objects()
    }
    assert len(labels) == len(rows)
    for path, data in labels.items():
        assert (tmp_path / "yolo-seg/labels" / path).read_bytes() == data


def test_one_batch_is_held_at_a_time(
    table: tuple[str, list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written before later ones are read, but for what the file's buffer holds."""
    read, written = [], []
    scan = tables.scan

    def watched(*of: Any) -> Any:
        for batch in scan(*of):
            if "detections" in batch.schema.names and "status" in batch.schema.names:
                read.append(batch.num_rows)
                assert len(written) >= sum(read[:-1]) - 1
            yield batch

    monkeypatch.setattr("jobs.tables.scan", watched)
    monkeypatch.setattr(
        "jobs.json_files.coco.instances",
        lambda *of: written.append(1) or {"images": [{}], "annotations": []},
    )
    uri, rows = table
    export(uri, "coco-instances", tmp_path / "i.json")
    assert len(read) > 2
    assert len(written) == len(rows)


@pytest.mark.parametrize(
    ("prefix", "key", "url"),
    [
        ("https://x.org/p", "a b#.jpg", "https://x.org/p/s/a%20b%23.jpg"),
        ("/data/local-files/?d=", "a&b.jpg", "/data/local-files/?d=s/a%26b.jpg"),
        ("s3://bucket/p/", "a b%.jpg", "s3://bucket/p/s/a b%.jpg"),
        ("https://x.org", "gs://photos/a b.jpg", "gs://photos/a b.jpg"),
    ],
)
def test_where_label_studio_finds_an_image(prefix: str, key: str, url: str) -> None:
    assert image_url({"shard": "s", "key": key}, prefix) == url


def test_label_studio_needs_a_prefix_and_its_sdk(
    table: tuple[str, list[Row]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        export(table[0], "labelstudio", tmp_path / "t.json")
    assert "--image-prefix" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "label_studio_sdk.converter.brush", None)
    assert export(table[0], "labelstudio", tmp_path / "t.json", "--image-prefix=/x") == 1
    assert "pip install 'label-studio-sdk>=2'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_truth_has_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scene_rows()
    for one in rows:
        one["detections"] = [d | {"score": None} for d in one["detections"]]
    put(open_store(str(tmp_path / "t")), rows)
    assert export(str(tmp_path / "t"), "coco-results", tmp_path / "r.json") == 1
    assert "coco-instances" in capsys.readouterr().err
    assert export(str(tmp_path / "t"), "coco-instances", tmp_path / "i.json") == 0
    assert all("score" not in one for one in opened(tmp_path / "i.json").anns.values())


def test_a_manifest_names_categories_that_nothing_has(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "t"))
    put(store, scene_rows())
    store.put("_manifest.json", json.dumps({"categories": [{"id": 99, "name": "none"}]}).encode())
    assert export(str(tmp_path / "t"), "coco-instances", tmp_path / "i.json") == 0
    assert opened(tmp_path / "i.json").cats[99]["name"] == "none"


def test_masks_without_pixels_have_no_polygon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scene_rows()
    empty = coco_mask.encode(np.zeros((96, 128), np.uint8, order="F"))["counts"].decode()
    one = next(r["detections"][0] for r in rows if r["detections"])
    one |= {"segmentation": {"size": [96, 128], "counts": empty}, "area": 0.0}
    put(open_store(str(tmp_path / "t")), rows)
    assert export(str(tmp_path / "t"), "yolo-seg", tmp_path / "o") == 0
    assert "1 detections are left out: their masks are empty" in capsys.readouterr().out
    lines = [line for p in tmp_path.rglob("*.txt") for line in p.read_text().splitlines()]
    assert len(lines) == sum(len(r["detections"]) for r in rows) - 1


def test_the_windows_of_objects_are_given_up(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for number in range(20):
        sink = io.BytesIO()
        pq.write_table(PREDICTIONS.empty_table(), sink)
        store.put(f"{number}.parquet", sink.getvalue())
    gc.collect()
    gc.disable()
    try:
        list(tables.scan(store, store.list_objects(), ["image_id"], 64))
        windows = [found for found in gc.get_objects() if type(found) is WindowedFile]
        assert not any(found._buffer for found in windows)
    finally:
        gc.enable()
