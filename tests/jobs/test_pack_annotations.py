"""COCO annotations packed with images from every kind of input, and what does not fit refused by name.

Sets in ../shared/data beside the checkout are used where they are there.
"""

import copy
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from jobs import annotations
from jobs.__main__ import main
from jobs.records import PackError
from jobs.storage import open_store
from jobs.store import Store
from segmodel import coco, scenes
from segmodel.schema import TRAINING

DATA = Path(__file__).parents[3] / "shared" / "data"
SETS = ("nuclei/val", "pennfudan/val", "coco/train", "nuclei/train", "pennfudan/train")
FORMATS = ("webdataset", "parquet", "images", "manifest")
SIZE_HW = (48, 64)
PER_SHARD = 4

pytestmark = [
    pytest.mark.ray,
    # pycocotools 2.0 hands its arrays over in a way that numpy 2 does not like.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def truth(num_scenes: int = 10) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Make a COCO file with masks of every kind, and its images by file name."""
    made = [scenes.scene(seed, SIZE_HW) for seed in range(num_scenes)]
    names = [f"{'ab'[n % 2]}/{n}.png" for n in range(num_scenes)]
    file = scenes.coco(made, names)
    for number, annotation in enumerate(file["annotations"]):
        annotation |= {"id": 1000 - 3 * number, "iscrowd": int(number % 5 == 0)}
        if number % 3 == 0:
            bitmap = coco_mask.decode(annotation["segmentation"])
            annotation["segmentation"] = {"size": list(SIZE_HW), "counts": runs(bitmap)}
        elif number % 3 == 1:
            x, y, w, h = annotation["bbox"]
            polygons = [[x, y, x + w, y, x + w, y + h], [x, y, x, y + h, x + w / 2, y + h]]
            annotation |= {"segmentation": polygons, "area": 59.0701, "bbox": [x, y, w, 473.07]}
    file["annotations"] = [a for a in file["annotations"] if a["image_id"] != 3]
    images = {}
    for name, one in zip(names, made, strict=True):
        data = io.BytesIO()
        Image.fromarray(one.image).save(data, "PNG")
        images[name] = data.getvalue()
    return file, images


def runs(bitmap: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], bitmap.ravel(order="F")])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [bitmap.size]])).tolist()


def put(store: Store, images: Mapping[str, bytes], format_: str, make_tar: Callable) -> str:
    """Store images in a format; return where."""
    names = list(images)
    shards = [names[start : start + PER_SHARD] for start in range(0, len(names), PER_SHARD)]
    for number, members in enumerate(shards):
        if format_ == "webdataset":
            store.put(f"in/{number}.tar", make_tar([(name, images[name]) for name in members]))
        elif format_ == "parquet":
            rows = [{"image": {"bytes": images[name], "path": name}} for name in members]
            data = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, pa.schema([TRAINING.field("image")])), data)
            store.put(f"in/{number}.parquet", data.getvalue())
        else:
            for name in members:
                store.put(f"in/{name}", images[name])
    if format_ == "manifest":
        lines = [json.dumps({"uri": f"in/{name}"}) for name in names]
        store.put("all.jsonl", "\n".join(lines).encode())
        return store.url("all.jsonl")
    return store.url("in")


def pack(images: str, output: str, *more: str) -> int:
    return main(["pack", "--images", images, "--output", output, "--shard-size", "3", *more])


def packed_rows(output: Store) -> list[dict[str, Any]]:
    return [
        row
        for found in output.list_objects("shards")
        for row in pq.read_table(io.BytesIO(output.read(found.path))).to_pylist()
    ]


def indexed(file: dict[str, Any]) -> COCO:
    made = COCO()
    made.dataset = file
    made.createIndex()
    return made


def assert_same(output: Store, file: dict[str, Any]) -> None:
    """Assert that the annotations of a file come back out of shards, every mask with IoU 1."""
    manifest = json.loads(output.read("_manifest.json"))
    ids = {image["file_name"].rpartition("/")[2]: image["id"] for image in file["images"]}
    rows = packed_rows(output)
    image_ids = {row["image_id"]: ids[row["key"].rpartition("/")[2]] for row in rows}
    assert len(rows) == len(image_ids) == len(ids)
    back = indexed(coco.instances(rows, manifest["categories"], image_ids))
    first = indexed(copy.deepcopy(file))
    expected = [{"id": c["id"], "name": c["name"]} for c in file["categories"]]
    assert back.dataset["categories"] == sorted(expected, key=lambda c: c["id"])
    compared, crowds = 0, 0
    for number in ids.values():
        pairs = zip(first.imgToAnns[number], back.imgToAnns[number], strict=True)
        for old, new in pairs:
            for name in ("category_id", "bbox", "area", "iscrowd"):
                assert new[name] == old[name]
            iou = coco_mask.iou([back.annToRLE(new)], [first.annToRLE(old)], [0])
            assert iou.item() == 1.0
            compared, crowds = compared + 1, crowds + new["iscrowd"]
    assert compared == len(file["annotations"]) == manifest["counts"]["detections"] > 0
    assert crowds == manifest["counts"]["crowds"]
    empty = sum(not first.imgToAnns[number] for number in ids.values())
    assert manifest["counts"]["without_detections"] == empty


@pytest.mark.parametrize("format_", FORMATS)
def test_masks_of_every_kind_come_back_from_every_format(
    format_: str, ray_local: None, tmp_path: Path, make_tar: Callable[..., bytes]
) -> None:
    file, images = truth()
    store = open_store(str(tmp_path))
    source = put(store, images, format_, make_tar)
    (tmp_path / "truth.json").write_text(json.dumps(file))
    out = open_store(str(tmp_path / "out"))
    assert pack(source, out.uri, "--annotations", str(tmp_path / "truth.json")) == 0
    assert_same(out, file)
    rows = packed_rows(out)
    assert {row["key"][-5:]: row["image"]["bytes"] for row in rows} == {
        name[-5:]: data for name, data in images.items()
    }
    for shard in (tmp_path / "out" / "shards").iterdir():
        assert pq.read_schema(shard).equals(TRAINING)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the shared photos are not beside the checkout")
@pytest.mark.parametrize("name", SETS)
def test_real_sets_come_back(name: str, ray_local: None, s3: Any, tmp_path: Path) -> None:
    folder, _, part = name.partition("/")
    annotations = DATA / folder / "annotations" / f"instances_{part}.json"
    images, output, more = str(DATA / folder / "images"), str(tmp_path / "out"), []
    if folder == "pennfudan":
        bucket = s3.bucket()
        for path in (DATA / folder / "images").iterdir():
            bucket.store("in").put(path.name, path.read_bytes())
        bucket.store().put("truth.json", annotations.read_bytes())
        images, output, annotations = (f"{bucket.uri}/{n}" for n in ("in", "out", "truth.json"))
        more = ["--endpoint-url", s3.endpoint_url]
    more += ["--annotations", str(annotations), "--shard-size", "50"]
    assert pack(images, output, *more) == 0
    file = json.loads((DATA / folder / "annotations" / f"instances_{part}.json").read_bytes())
    assert_same(open_store(output, s3.endpoint_url), file)


@pytest.fixture
def place(ray_local: None, tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, bytes]]:
    """Loose images of a COCO file, which is not written yet."""
    file, images = truth(7)
    put(open_store(str(tmp_path)), images, "images", lambda: None)
    return tmp_path, file, images


def pack_as(root: Path, file: Any) -> int:
    (root / "truth.json").write_text(file if isinstance(file, str) else json.dumps(file))
    return pack(str(root / "in"), str(root / "out"), "--annotations", str(root / "truth.json"))


Place = tuple[Path, dict[str, Any], dict[str, bytes]]


@pytest.mark.parametrize("format_", FORMATS)
def test_images_without_a_record_are_left_out_and_counted(
    format_: str,
    ray_local: None,
    tmp_path: Path,
    make_tar: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, images = truth()
    kept = {1, 4, 5, 6}
    for kind, name in (("images", "id"), ("annotations", "image_id")):
        file[kind] = [record for record in file[kind] if record[name] in kept]
    source = put(open_store(str(tmp_path)), images, format_, make_tar)
    (tmp_path / "truth.json").write_text(json.dumps(file))
    more = ["--annotations", str(tmp_path / "truth.json")]
    assert pack(source, str(tmp_path / "out"), *more) == 0
    assert "6 images without a record" in capsys.readouterr().out
    out = open_store(str(tmp_path / "out"))
    assert_same(out, file)
    assert json.loads(out.read("_manifest.json"))["counts"]["left_out"] == 6
    # Going on needs neither the matching nor the order in which shards are lost.
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "shards").iterdir()}
    (tmp_path / "out" / "shards" / sorted(before)[-1]).unlink()
    assert pack(source, str(tmp_path / "out"), *more) == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "out" / "shards").iterdir()}
    assert after == before


def test_an_image_that_cannot_be_read_is_a_row_in_error(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file, _ = place
    (root / "in" / "a" / "4.png").write_bytes(b"no image")
    assert pack_as(root, file) == 0
    rows = {row["key"]: row for row in packed_rows(open_store(str(root / "out")))}
    assert len(rows) == 7
    (lost,) = [i["id"] for i in file["images"] if i["file_name"].endswith("4.png")]
    instances = sum(a["image_id"] == lost for a in file["annotations"])
    bad = rows.pop("4.png")
    assert (bad["status"], bad["detections"], bad["image"]) == ("error", [], None)
    assert bad["error"].startswith("unknown_format: ")
    assert {row["status"] for row in rows.values()} == {"ok"}
    counts = json.loads((root / "out" / "_manifest.json").read_text())["counts"]
    assert counts["errors"] == {"unknown_format": 1}
    assert counts["detections_of_failed"] == instances > 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{instances} instances on them are left out" in said


def test_names_may_be_base_names_where_one_image_has_them(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file, _ = place
    for number, image in enumerate(file["images"]):
        base = image["file_name"][2:]
        image["file_name"] = (f"./b/../{base}", base, f"train/{base}")[number % 3]
    assert pack_as(root, file) == 0
    assert_same(open_store(str(root / "out")), file)
    assert "5 records were matched by the base name alone" in capsys.readouterr().out


def named(*names: str) -> Callable[[dict[str, Any]], None]:
    """Rename the first images of a file."""

    def change(file: dict[str, Any]) -> None:
        for image, name in zip(file["images"], names, strict=False):
            image["file_name"] = name

    return change


REFUSED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "2 of the 7 images in .* are not among the 8 at .*/in: 'x.png', 'y.png'": named(
        "x.png", "y.png"
    ),
    "1 names in .* more than one image: '6.png' is 'a#6.png' and 'c#6.png'": lambda file: file[
        "images"
    ][6].update(file_name="6.png"),
    "1 images have more than one record in .*: 'a/0.png' and '0.png' are 'a#0.png'": named(
        "a/0.png", "0.png"
    ),
    r"1 images have more than one record in .*: 'a/0.png' and '\./a/0.png' are 'a#0.png'": named(
        "a/0.png", "./a/0.png"
    ),
    r"image 'a#2.png' has 48 x 64 pixels .* record says 64 x 48": lambda file: file["images"][
        2
    ].update(height=64, width=48),
    "truth.json: annotation 997 of image 1: bad bbox": lambda file: file["annotations"][1].update(
        bbox=None
    ),
    "truth.json: category 2 has no name": lambda file: file["categories"][1].pop("name"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_named(
    message: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file, images = place
    open_store(str(root)).put("in/c/6.png", images["a/6.png"])
    REFUSED[message](file)
    assert pack_as(root, file) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (root / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Expecting"), ("[]", "no JSON object"), ("{}", "no list of categories")],
)
def test_what_is_no_coco_file_is_refused(
    text: str, message: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    root, *_ = place
    assert pack_as(root, text) == 1
    assert message in capsys.readouterr().err


def test_a_name_that_a_tar_has_twice_is_refused(
    ray_local: None,
    tmp_path: Path,
    make_tar: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, images = truth(2)
    members = [*images.items(), ("a/0.png", images["b/1.png"])]
    open_store(str(tmp_path)).put("in/0.tar", make_tar(members))
    assert pack_as(tmp_path, file) == 1
    assert "'a/0.png' is '0.tar#a/0.png' and '0.tar#a/0.png#2'" in capsys.readouterr().err


def test_other_annotations_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    root, file, _ = place
    assert pack_as(root, file) == 0
    file["annotations"].pop()
    assert pack_as(root, file) == 1
    assert "annotations_digest was" in capsys.readouterr().err
    assert pack(str(root / "in"), str(root / "out")) == 1
    assert "and is now None" in capsys.readouterr().err


def parsed(file: Mapping[str, Any]) -> annotations.Annotations:
    return annotations.parse(json.dumps(file).encode(), "truth.json")


def test_annotations_without_a_mask_among_others_are_named() -> None:
    file, _ = truth(4)
    for annotation, none in zip(file["annotations"], ([], None), strict=False):
        annotation["segmentation"] = none
    number, ids = len(file["annotations"]), [a["id"] for a in file["annotations"][:2]]
    with pytest.raises(
        PackError, match=f"2 of {number} annotations have no mask.* {ids[0]}, {ids[1]}"
    ):
        parsed(file)
    for annotation in file["annotations"]:
        annotation["segmentation"] = []
    assert parsed(file).notes == (
        "no annotation has a mask: the set serves to evaluate boxes, not to train",
    )


def add(annotation: Any) -> Callable[[dict[str, Any]], None]:
    return lambda file: file["annotations"].append(annotation)


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    r"annotations\[\d+\] has no whole number as its id": add({"image_id": 1, "category_id": 1}),
    r"annotations\[\d+\] has no whole": add(None),
    "no list of annotations": lambda file: file.update(annotations={"id": 1}),
    "has no list of annotations": lambda file: file.pop("annotations"),
    "image 1 .* has no height and width": lambda file: file["images"][0].update(height=2**31),
    "category 2147483648: its id": lambda file: file["categories"][0].update(id=2**31),
    "annotation 5000 of image 1: bad bbox .*1e.300": add(
        {"id": 5000, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1e300, 1]}
    ),
    "categories 1 and 99 are both": lambda file: file["categories"].append(
        {"id": 99, "name": file["categories"][0]["name"]}
    ),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_malformed_records_are_named_before_anything_is_read_of_them(message: str) -> None:
    file, _ = truth(4)
    MALFORMED[message](file)
    with pytest.raises(PackError, match=f"truth.json: .*{message}"):
        parsed(file)


def test_masks_without_a_pixel_are_said() -> None:
    file, _ = truth(4)
    assert parsed(file).notes == ()
    victim = file["annotations"][-1]
    victim["segmentation"] = [[100, 100, 120, 100, 120, 120]]
    (note,) = parsed(file).notes
    names = {image["id"]: image["file_name"] for image in file["images"]}
    shard, _, key = names[victim["image_id"]].partition("/")
    assert note.startswith("1 masks have no pixel")
    assert f"{shard}#{key}" in note
