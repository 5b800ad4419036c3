import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask

from segmodel import coco
from segmodel.schema import PREDICTIONS

ANNOTATION_FILES = sorted(
    (Path(__file__).parents[3] / "shared/data").glob("*/annotations/instances_*.json")
)
HEIGHT, WIDTH = 20, 30


def instances(**annotation: Any) -> dict[str, Any]:
    """Make a file of one image, and of one annotation unless an item of it is None."""
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    bitmap[3:9, 5:15] = 1
    rle = coco_mask.encode(bitmap)
    rle["counts"] = rle["counts"].decode()
    record = {"id": 7, "image_id": 1, "category_id": 3, "bbox": [5, 3, 10, 6], "area": 60}
    record |= {"iscrowd": 0, "segmentation": rle} | annotation
    return {
        "images": [{"id": 1, "file_name": "a/b/c.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [record],
        "categories": [{"id": 3, "name": "cat"}],
    }


def only(file: dict[str, Any]) -> dict[str, Any]:
    (row,) = coco.rows(file)
    (detection,) = row["detections"]
    return dict(detection)


def runs(bitmap: np.ndarray) -> list[int]:
    """Count the runs of a mask, as uncompressed RLE has them."""
    flat = np.concatenate([[0], bitmap.ravel(order="F")])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [bitmap.size]])).tolist()


class TestRows:
    def test_fill_the_schema(self):
        (row,) = coco.rows(instances())
        table = pa.Table.from_pylist([row], PREDICTIONS)
        table.validate(full=True)
        assert table.to_pylist() == [row]
        detection = row.pop("detections")[0]
        assert row == {
            "image_id": "a/b#c.jpg",
            "shard": "a/b",
            "key": "c.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "status": "ok",
            "error": None,
        }
        assert (detection["category_id"], detection["category"]) == (3, "cat")
        assert (detection["score"], detection["iscrowd"]) == (None, 0)
        assert (detection["bbox"], detection["area"]) == ([5, 3, 10, 6], 60)

    def test_shard_and_key_are_the_callers(self):
        file = instances()
        (row,) = coco.rows(file, lambda name: ("s.tar", name[:-4]))
        assert row["image_id"] == "s.tar#a/b/c"
        assert coco.image_ids(file, lambda name: ("s.tar", name[:-4])) == {"s.tar#a/b/c": 1}
        file["images"][0]["file_name"] = "c.jpg"
        assert coco.image_ids(file) == {"#c.jpg": 1}

    def test_images_without_annotations_are_empty(self):
        (row,) = coco.rows(instances() | {"annotations": []})
        assert row["detections"] == []

    def test_annotations_keep_their_order(self):
        file = instances()
        file["annotations"].append(file["annotations"][0] | {"id": 5, "area": 61})
        (row,) = coco.rows(file)
        assert [detection["area"] for detection in row["detections"]] == [60, 61]

    @pytest.mark.parametrize(
        ("segmentation", "area"), [(None, 60), ([], 60), ([[0, 0, 4, 0, 4, 4, 0, 4]], 16)]
    )
    def test_area_falls_back_on_mask_then_box(self, segmentation, area):
        assert only(instances(segmentation=segmentation, area=None))["area"] == area

    def test_the_files_area_wins(self):
        assert only(instances(area=59.25))["area"] == 59.25


class TestSegmentations:
    @pytest.mark.parametrize("seed", range(5))
    def test_rle_of_each_kind_is_the_same_mask(self, seed):
        bitmap = np.random.default_rng(seed).random((HEIGHT, WIDTH)) < (0, 0.1, 0.5, 0.9, 1)[seed]
        compressed = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
        text = compressed["counts"].decode()
        for counts in (text, compressed["counts"], runs(bitmap)):
            made = only(instances(segmentation={"size": [HEIGHT, WIDTH], "counts": counts}))
            assert made["segmentation"] == {"size": [HEIGHT, WIDTH], "counts": text}

    # pycocotools 2.0 hands its array over in a way that numpy 2 does not like.
    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    def test_polygons_are_those_of_pycocotools(self):
        polygons = [[1.5, 1.5, 9.0, 2.5, 4.0, 12.0], [20, 5, 28, 5, 28, 15.5, 20, 15]]
        made = only(instances(segmentation=polygons))["segmentation"]
        expected = coco_mask.decode(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)).any(axis=2)
        assert np.array_equal(coco_mask.decode(made), expected)
        assert isinstance(made["counts"], str)


def change(**items: Any):
    return lambda file: file["annotations"][0].update(items)


def mask_of(size: list[int], counts: Any):
    return change(segmentation={"size": size, "counts": counts})


BAD_FILES = {
    "not a COCO.* no list of categories": lambda file: file.pop("categories"),
    r"images\[0\] has no whole number": lambda file: file["images"][0].pop("id"),
    r"annotations\[1\] has no whole number": lambda file: file["annotations"].append("?"),
    "annotations have the id 7 twice": lambda file: file["annotations"].append({"id": 7}),
    "categories have the id 3 twice": lambda file: file["categories"].append({"id": 3}),
    "images have the id 1 twice": lambda file: file["images"].append({"id": 1}),
    "images 1 and 2 are both 'a/b#c.jpg'": lambda file: file["images"].append(
        file["images"][0] | {"id": 2}
    ),
    "image 1 has no file_name": lambda file: file["images"][0].pop("file_name"),
    "image 1 .* no height and width": lambda file: file["images"][0].update(width=0),
    r"image 1 \('a/b/c.jpg'\) has no height and width .* 1 to 2147483647": lambda file: file[
        "images"
    ][0].update(height=2**31),
    "category 1099511627776: its id does not fit": lambda file: file["categories"].append(
        {"id": 2**40}
    ),
    "annotation 7 is of image 9,": change(image_id=9),
    "annotation 7 has the category_id None, no whole": change(category_id=None),
    "annotation 7 has the category_id 3.0, no whole": change(category_id=3.0),
    "annotation 7 is of category 4, which": change(category_id=4),
    "annotation 7 of image 1: bad bbox None": change(bbox=None),
    r"annotation 7 .* bad bbox \[1, 2, 3\]": change(bbox=[1, 2, 3]),
    "annotation 7 .* bad bbox .*000.*, not four": change(bbox=[1, 2, 3, 10**400]),
    "annotation 7 .* bad bbox .* not four": change(bbox=[1, 2, 3, float("nan")]),
    "annotation 7 .* bad bbox .* negative": change(bbox=[1, 2, 3, -1]),
    r"annotation 7 .* bad bbox .*1e.300.* float32": change(bbox=[1, 2, 1e300, 4]),
    "annotation 7 .* bad area -1": change(area=-1),
    r"annotation 7 .* bad area 1e.39": change(area=1e39),
    r"annotation 7 .* bad area 1\S*e.60": change(
        area=None, segmentation=None, bbox=[1, 2, 1e30, 1e30]
    ),
    "annotation 7 .* bad iscrowd 2": change(iscrowd=2),
    r"its mask is of size \[30, 20\], the image of \[20, 30\]": mask_of([WIDTH, HEIGHT], "0"),
    "its mask is of size None": change(segmentation={}),
    "bad RLE counts: None": mask_of([HEIGHT, WIDTH], None),
    "bad RLE counts: .1.5": mask_of([HEIGHT, WIDTH], [1.5, 598.5]),
    "covers 0 of 600": mask_of([HEIGHT, WIDTH], ""),
    "covers 599 of 600": mask_of([HEIGHT, WIDTH], [5, 594]),
    "covers 600 of 600": mask_of([HEIGHT, WIDTH], [605, -5]),
    "bad character 'é'": mask_of([HEIGHT, WIDTH], "é"),
    "end within a number": mask_of([HEIGHT, WIDTH], "P"),
    "neither RLE nor polygons: 'x'": change(segmentation="x"),
    r"neither RLE nor polygons: \[1, 2, 3, 4\]": change(segmentation=[[1, 2, 3, 4]]),
    "annotation 7 .* reaches to 1e.09, far outside": change(segmentation=[[0, 0, 1e9, 0, 1, 1]]),
    "annotation 7 .* reaches to -301, far outside": change(segmentation=[[0, 0, 9, 0, 1, -301]]),
    "neither RLE nor polygons: .*inf": change(segmentation=[[1, 2, 3, 4, 5, float("inf")]]),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_records_are_named(message):
    file = instances()
    BAD_FILES[message](file)
    with pytest.raises(ValueError, match=message):
        list(coco.rows(file))


class TestResults:
    def test_carry_masks_and_cocos_ids(self):
        file = instances()
        (row,) = coco.rows(file)
        row["detections"][0]["score"] = np.float32(0.5)
        (result,) = coco.results([row], coco.image_ids(file))
        assert json.loads(json.dumps(result)) == {
            "image_id": 1,
            "category_id": 3,
            "bbox": [5, 3, 10, 6],
            "score": 0.5,
            "segmentation": row["detections"][0]["segmentation"],
        }

    def test_boxes_have_no_segmentation_and_errors_no_results(self):
        (row,) = coco.rows(instances(segmentation=None))
        row["detections"][0]["score"] = 0.5
        (result,) = coco.results([row], {"a/b#c.jpg": 1})
        assert "segmentation" not in result
        assert coco.results([row | {"status": "error"}], {"a/b#c.jpg": 1}) == []

    def test_unknown_images_are_named(self):
        with pytest.raises(ValueError, match=r"image 'a/b#c\.jpg' is not in the COCO file"):
            coco.results(coco.rows(instances()), {})


def as_stored(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pass rows through the table: numbers become float32."""
    return pa.Table.from_pylist(list(rows), PREDICTIONS).to_pylist()


class TestInstances:
    def test_are_the_way_back_from_rows(self):
        file = instances(bbox=[5.07, 3.1, 10.3, 473.07], area=120057.14, iscrowd=1)
        file["categories"] = [{"id": 9, "name": "dog"}, *file["categories"]]
        back = coco.instances(as_stored(coco.rows(file)), file["categories"])
        expected = file | {"annotations": [file["annotations"][0] | {"id": 1}]}
        assert json.loads(json.dumps(back)) == expected
        assert as_stored(coco.rows(back)) == as_stored(coco.rows(file))

    def test_ids_are_consecutive_or_given(self):
        rows = [*coco.rows(instances()), *coco.rows(instances())]
        rows[1] |= {"image_id": "#d.jpg", "shard": "", "key": "d.jpg"}
        rows.insert(1, rows[0] | {"status": "error", "height": None, "width": None})
        categories = [{"id": 3, "name": "cat"}]
        back = coco.instances(rows, categories)
        assert [(i["id"], i["file_name"]) for i in back["images"]] == [
            (1, "a/b/c.jpg"),
            (2, "d.jpg"),
        ]
        assert [(a["id"], a["image_id"]) for a in back["annotations"]] == [(1, 1), (2, 2)]
        back = coco.instances(rows, categories, {"a/b#c.jpg": 9, "#d.jpg": 4})
        assert [image["id"] for image in back["images"]] == [9, 4]
        assert [(a["id"], a["image_id"]) for a in back["annotations"]] == [(1, 9), (2, 4)]
        with pytest.raises(ValueError, match=r"image '#d\.jpg' is not in the COCO file"):
            coco.instances(rows, categories, {"a/b#c.jpg": 9})

    def test_boxes_have_no_mask_and_predictions_a_score(self):
        (row,) = coco.rows(instances(segmentation=None))
        row["detections"][0] |= {"score": np.float32(0.7), "area": None}
        (annotation,) = coco.instances([row], [{"id": 3, "name": "cat"}])["annotations"]
        assert (annotation["segmentation"], annotation["score"]) == ([], 0.7)
        assert annotation["area"] == 60

    def test_other_categories_are_named(self):
        with pytest.raises(ValueError, match=r"'a/b#c\.jpg' has a detection of category 3, which"):
            coco.instances(coco.rows(instances()), [{"id": 4, "name": "cat"}])


class TestCategories:
    def test_are_sorted_by_id(self):
        file = instances()
        file["categories"].insert(0, {"id": 90, "name": "dog", "supercategory": "animal"})
        assert coco.categories(file) == [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]

    @pytest.mark.parametrize("name", [None, "", 7])
    def test_without_a_name_are_refused(self, name):
        with pytest.raises(ValueError, match="category 3 has no name"):
            coco.categories({"categories": [{"id": 3, "name": name}]})

    def test_of_one_name_are_refused(self):
        twice = [{"id": 3, "name": "cat"}, {"id": 1, "name": "cat"}]
        with pytest.raises(ValueError, match="categories 1 and 3 are both 'cat'"):
            coco.categories({"categories": twice})

    def test_with_an_id_that_the_table_does_not_hold_are_refused(self):
        with pytest.raises(ValueError, match="category 1099511627776: its id"):
            coco.categories({"categories": [{"id": 2**40, "name": "cat"}]})


@pytest.mark.parametrize("path", ANNOTATION_FILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_real_files_come_back(path):
    file = json.loads(path.read_text())
    rows = pa.Table.from_pylist(list(coco.rows(file)), PREDICTIONS).to_pylist()
    for row in rows:
        for detection in row["detections"]:
            detection["score"] = 1.0
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in file["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    expected = [a for image in file["images"] for a in by_image.get(image["id"], [])]
    results = coco.results(rows, coco.image_ids(file))
    assert len(results) == len(expected) > 0
    for result, annotation in zip(results, expected, strict=True):
        assert result["image_id"] == annotation["image_id"]
        assert result["category_id"] == annotation["category_id"]
        assert result["bbox"] == annotation["bbox"]
        iou = coco_mask.iou([result["segmentation"]], [annotation["segmentation"]], [0])
        assert iou.item() == 1.0
