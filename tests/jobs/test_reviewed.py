"""Reviewed labels come back over a version: which win, which are refused, and of which images."""

import importlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import versions
from jobs.__main__ import main
from jobs.storage import open_store
from segmodel import rle
from tests.jobs.labelling_place import Place, words


def export_queue(place: Place) -> tuple[Path, dict[str, Any]]:
    """Make a version of which five images wait, and write their queue as COCO instances."""
    place.policy("score_threshold: 1.0\nreview_from: 0.0\nmin_area: 1\nmax_per_image: 3\n")
    members = [(f"{n}.jpg", place.jpeg(n)) for n in range(5)] + [("bad.jpg", b"no image")]
    (place.root / "in" / "a.tar").write_bytes(place.make_tar(members))
    assert place.label() == 0
    out = place.root / "review.json"
    places = ["--predictions", place.named("versions", "1", "review"), "--output", str(out)]
    assert main(["export", *places, "--to", "coco-instances"]) == 0
    file: dict[str, Any] = json.loads(out.read_text())
    return out, {**file, "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]}


def review(place: Place, out: Path, file: Any, *more: str) -> int:
    out.write_text(json.dumps(file))
    return main(["label", "--dataset", place.named(), "--reviewed", str(out), *more])


def test_reviewed_labels_win(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = export_queue(place)
    assert all(len(bytes.fromhex(one["segjobs_content"])) == 16 for one in file["images"])
    waiting = place.rows(1, "review")
    assert set(waiting) == {f"a.tar#{n}.jpg" for n in range(5)}
    assert place.rows(1) == {}
    (bad,) = (r for r in place.rows(1, "rejected").values() if r["reason"])
    assert (bad["key"], bad["image"]) == ("bad.jpg", None)
    # One image is left out. Of the others' labels the reviewer takes one out, renames one, adds one.
    file["images"] = [one for one in file["images"] if not one["file_name"].endswith("/4.jpg")]
    images = {one["id"] for one in file["images"]}
    labels = [one for one in file["annotations"] if one["image_id"] in images]
    # Below the three detections of each image.
    square = [[1, 15, 1, 20, 6, 20, 6, 15]]
    moved = {**labels[1], "category_id": 4 - labels[1]["category_id"]}
    file["annotations"] = [
        moved,
        *labels[2:],
        {**labels[2], "id": 999, "segmentation": square},
    ]
    # The reviewer's tool has counted the categories anew: names say which they are.
    ids = {1: 0, 3: 1}
    for one in file["annotations"]:
        one["category_id"] = ids[one["category_id"]]
    file["categories"] = [{**one, "id": ids[one["id"]]} for one in file["categories"]]
    capsys.readouterr()
    assert review(place, out, file) == 0
    assert "the reviewer wins" in words(capsys)
    assert place.manifest(2)["categories"] == place.manifest(1)["categories"]
    assert place.manifest(2)["reviewed"]["counts"] == {
        "images that were to review": 4,
        "labels added": 1,
        "labels kept": 10,
        "labels of another category": 1,
        "labels taken out": 1,
    }
    accepted = place.rows(2)
    assert set(accepted) == {f"a.tar#{n}.jpg" for n in range(4)}
    assert set(place.rows(2, "review")) == {"a.tar#4.jpg"}
    assert sum(len(row["detections"]) for row in accepted.values()) == len(file["annotations"])
    assert all(d["score"] is None for row in accepted.values() for d in row["detections"])
    assert all(accepted[name]["image"] == waiting[name]["image"] for name in accepted)
    assert review(place, out, file) == 0
    assert "is in version 2" in words(capsys)

    # The machine does not label them again: not when nothing is new, nor beside what is.
    place.put("b.tar", {"9.jpg": 9})
    assert place.label() == 0
    assert place.manifest(3)["counts"]["new"]["images"] == 1
    assert {name: place.rows(3)[name] for name in accepted} == accepted
    for number, said in (("3", False), ("1", True)):
        capsys.readouterr()
        assert main(["label", "--dataset", place.named(), "--promote", number]) == 0
        assert ("does not build upon reviewed labels of version 2" in words(capsys)) is said


def test_reviews_that_cannot_be_are_refused_and_later_ones_win(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = export_queue(place)
    one = {"id": 77, "height": 24, "width": 32}
    contrary = [{"id": 1, "name": "tree"}, {"id": 3, "name": "car"}]
    for change, message, code in (
        ({"images": [{**one, "file_name": "a.tar/none.jpg"}]}, "1 images of .* are not in", 1),
        ({"images": [{**one, "file_name": "a.tar/0.jpg", "height": 25}]}, "has 24 x 32 pixels", 1),
        ({"images": [{**one, "file_name": "a.tar/bad.jpg"}]}, "could not be read when", 1),
        ({"categories": contrary}, "category 1 is 'person' in the data set and 'tree'", 2),
        ({"images": [{"id": 1}]}, "is no COCO instances file: image 1 has no file_name", 1),
    ):
        assert review(place, out, {**file, "annotations": [], **change}) == code
        assert re.search(message, capsys.readouterr().err)
    bare = [{**file["annotations"][0], "segmentation": []}]
    assert review(place, out, {**file, "annotations": bare}) == 1
    assert "has boxes without masks" in capsys.readouterr().err

    assert review(place, out, file) == 0
    # Gone over once more, an image is empty.
    (image,) = (i for i in file["images"] if i["file_name"] == "a.tar/2.jpg")
    emptied = {**file, "annotations": [], "images": [image]}
    assert review(place, out, emptied) == 1
    assert "and 1 of them have labels in version 2" in capsys.readouterr().err
    assert versions.latest(open_store(place.named())) == 2
    assert review(place, out, emptied, "--reviewed-empty") == 0
    first, second = place.rows(2), place.rows(3)
    assert set(first) == set(second) == {f"a.tar#{n}.jpg" for n in range(5)}
    changed = [name for name in first if first[name] != second[name]]
    assert changed == ["a.tar#2.jpg"]
    assert second["a.tar#2.jpg"]["detections"] == []
    counts = place.manifest(3)["reviewed"]["counts"]
    assert counts == {"images that were accepted": 1, "labels added": 0, "labels taken out": 3}
    assert place.manifest(3)["profile"]["all"]["empty"] == 1


def test_an_old_review_does_not_undo_a_newer_one(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = export_queue(place)
    assert review(place, out, file) == 0
    old = out.read_bytes()
    # A second person takes all labels but one of an image out, and says nothing of the others.
    (image,) = (i for i in file["images"] if i["file_name"] == "a.tar/2.jpg")
    (label, *_) = (one for one in file["annotations"] if one["image_id"] == image["id"])
    newer = {**file, "images": [image], "annotations": [label]}
    assert review(place, out, newer) == 0
    now = place.rows(3)
    assert len(now["a.tar#2.jpg"]["detections"]) == 1
    place.put("b.tar", {"9.jpg": 9})
    assert place.label() == 0

    store = open_store(place.named())
    out.write_bytes(old)
    capsys.readouterr()
    assert main(["label", "--dataset", place.named(), "--reviewed", str(out)]) == 0
    said = words(capsys)
    assert "is in version 4 already, which builds upon version 2" in said
    assert "what was imported or replaced since stays" in said
    assert versions.latest(store) == 4
    # Written by another tool, the same labels are another file, and change nothing either.
    other = {**newer, "info": {"date_created": "later"}, "annotations": [{**label, "id": 5}]}
    assert review(place, out, other) == 0
    assert "version 4 says the same of its images" in words(capsys)
    assert versions.latest(store) == 4

    # Exported anew it is a new review, and the last one wins.
    assert review(place, out, {**file, "info": {"date_created": "later"}}) == 0
    assert place.manifest(5)["parent"] == 4
    assert place.rows(5)["a.tar#2.jpg"] == place.rows(2)["a.tar#2.jpg"]

    # Where a version without it was promoted, the old file is none of its past, and is imported.
    out.write_bytes(old)
    assert main(["label", "--dataset", place.named(), "--promote", "1"]) == 0
    assert main(["label", "--dataset", place.named(), "--reviewed", str(out)]) == 0
    assert place.manifest(6)["parent"] == 1
    assert place.rows(6) == place.rows(2)


def test_a_review_of_an_old_photo_is_not_put_on_the_new_one(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = export_queue(place)
    members = [(f"{n}.jpg", place.jpeg(777 if n == 2 else n)) for n in range(5)]
    (place.root / "in" / "a.tar").write_bytes(place.make_tar(members))
    assert place.label() == 0
    capsys.readouterr()
    assert review(place, out, file) == 0
    said = words(capsys)
    assert "1 images are other photos than those that were exported, and are left out" in said
    assert "'a.tar#2.jpg'" in said
    assert set(place.rows(3)) == {f"a.tar#{n}.jpg" for n in (0, 1, 3, 4)}
    assert place.rows(3, "review")["a.tar#2.jpg"]["image"]["bytes"] == place.jpeg(777)
    # Of it alone nothing is left; and where a tool dropped the digests, nobody knows.
    (old,) = (one for one in file["images"] if one["file_name"] == "a.tar/2.jpg")
    of_old = [one for one in file["annotations"] if one["image_id"] == old["id"]]
    assert review(place, out, {**file, "images": [old], "annotations": of_old}) == 1
    assert "export the queue of version 3 anew" in capsys.readouterr().err
    del old["segjobs_content"]
    assert review(place, out, {**file, "images": [old], "annotations": of_old}) == 0
    assert "whether they were replaced is not known" in words(capsys)
    assert len(place.rows(4)) == 5


def put_photos(place: Place, *folders: str) -> None:
    """Label two pictures of the same names in each folder, all of which wait for a person."""
    place.policy("score_threshold: 1.0\nreview_from: 0.0\nmin_area: 1\nmax_per_image: 3\n")
    for number, name in enumerate(folders):
        (place.root / "in" / name).mkdir()
        for n in range(2):
            data = place.jpeg(10 * number + n)
            (place.root / "in" / name / f"{n}.jpg").write_bytes(data)
    assert place.label() == 0


def export(place: Place, *more: str) -> Any:
    out = place.root / "export.json"
    queue = place.named("versions", "1", "review")
    wanted = ["export", "--predictions", queue, "--output", str(out), "--overwrite", *more]
    assert main(wanted) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("prefix", ["photos/", "./", "s3://bucket/photos/"])
def test_names_with_something_in_front_are_paired(place: Place, prefix: str) -> None:
    put_photos(place, "x", "y")
    file = export(place, "--to", "coco-instances")
    for image in file["images"]:
        image["file_name"] = prefix + image["file_name"]
    assert review(place, place.root / "reviewed.json", file) == 0
    waited, now = place.rows(1, "review"), place.rows(2)
    assert set(now) == {f"{folder}#{n}.jpg" for folder in "xy" for n in range(2)}
    for name, row in now.items():
        masks = [one["segmentation"] for one in row["detections"]]
        assert masks == [one["segmentation"] for one in waited[name]["detections"]]
    assert place.manifest(2)["reviewed"]["counts"]["labels taken out"] == 0


def tasks(place: Place, prefix: str = "s3://bucket/photos") -> list[dict[str, Any]]:
    """The queue as Label Studio exports it when a person takes each prediction as it is."""
    found: list[dict[str, Any]] = export(place, "--to", "labelstudio", "--image-prefix", prefix)
    for number, task in enumerate(found):
        result = task.pop("predictions")[0]["result"]
        task |= {"id": number, "annotations": [{"id": number, "result": result}]}
    return found


def sdk() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("label_studio_sdk.converter")


def test_label_studios_own_tasks_come_back_to_the_pixel(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    put_photos(place, "x", "y")
    file = tasks(place)
    waited = place.rows(1, "review")
    # One task was skipped, one waits, one has an older annotation, and one a new label with a hole.
    file[0]["annotations"][0]["was_cancelled"] = True
    file[1]["annotations"] = []
    older = {"result": [], "updated_at": "2026-01-01T00:00:00Z"}
    file[2]["annotations"] = [
        {**file[2]["annotations"][0], "updated_at": "2026-02-01T00:00:00Z"},
        older,
    ]
    mask = np.zeros((24, 32), np.uint8)
    mask[14:22, 4:28] = 1
    mask[16:18, 8:10] = 0
    encode = importlib.import_module("label_studio_sdk.converter.brush").mask2rle
    region = {
        "type": "brushlabels",
        "original_height": 24,
        "original_width": 32,
        "value": {"format": "rle", "rle": encode(mask * 255), "brushlabels": ["tree"]},
    }
    choice = {"type": "choices", "value": {"choices": ["blurred"]}}
    file[3]["annotations"][0]["result"] += [region, choice]
    reviewed = place.root / "reviewed.json"
    capsys.readouterr()
    assert review(place, reviewed, file) == 0
    assert "2 tasks that nobody has submitted are left out" in words(capsys)
    names = [task["data"]["image_id"] for task in file]
    now = place.rows(2)
    assert set(now) == {names[2], names[3]}
    for name in now:
        mine = {one["segmentation"]["counts"] for one in now[name]["detections"]}
        assert mine >= {one["segmentation"]["counts"] for one in waited[name]["detections"]}
    (tree,) = (one for one in now[names[3]]["detections"] if one["category"] == "tree")
    assert (rle.decode(tree["segmentation"]) == mask).all()
    assert (tree["category_id"], tree["area"]) == (4, mask.sum())
    assert place.manifest(2)["categories"][-1] == {"id": 4, "name": "tree"}
    # The same is no news; what the SDK makes a COCO file of has no label at all, and is refused.
    assert review(place, reviewed, file) == 0
    assert "is in version 2 already" in words(capsys)


def test_label_studios_coco_file_without_brushes_is_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    put_photos(place, "x")
    source = place.root / "tasks.json"
    source.write_text(json.dumps(tasks(place, str(place.root / "in"))))
    labels = '<BrushLabels name="label" toName="image"><Label value="person"/><Label value="car"/>'
    config = f'<View><Image name="image" value="$image"/>{labels}</BrushLabels></View>'
    made = place.root / "made"
    converter = sdk().Converter(config, project_dir=str(place.root), download_resources=False)
    converter.convert_to_coco(
        str(source), str(made), output_image_dir=str(made / "images"), is_dir=False
    )
    file = json.loads((made / "result.json").read_text())
    assert (len(file["images"]), file["annotations"]) == (2, [])
    capsys.readouterr()
    assert review(place, place.root / "reviewed.json", file) == 1
    assert "Label Studio's COCO export leaves brush masks out" in capsys.readouterr().err
    assert versions.latest(open_store(place.named())) == 1


def test_tasks_that_cannot_be_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    put_photos(place, "x")
    good = tasks(place)

    def changed(value: Any, *path: Any) -> Any:
        file = json.loads(json.dumps(good))
        at: Any = file[0]
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        return file

    region = ("annotations", 0, "result", 0)
    box = {"type": "rectanglelabels", "value": {"x": 1, "y": 1, "rectanglelabels": ["car"]}}
    for file, message in (
        (changed([box], "annotations", 0, "result"), "only brushes are taken"),
        (changed(["car", "person"], *region, "value", "brushlabels"), "has 2 labels, and not one"),
        (changed(90, *region, "image_rotation"), "turn it back"),
        (changed([1, 2], *region, "value", "rle"), "no brush mask of 24 x 32"),
        (changed(25, *region, "original_height"), "no brush mask of 25 x 32"),
        (changed("x#none.jpg", "data", "image_id"), "1 images of .* are not in version 1"),
        ([*good, good[0]], "1 images have more than one task: 'x#0.jpg'"),
        ([{**one, "annotations": []} for one in good], "names no image that somebody has reviewed"),
        ([{"image": "x", "label": []}], "export the project as JSON"),
        ([{"data": {}, "annotations": [{"result": []}]}], "has neither image_id nor image"),
        ("text", "is no COCO instances file"),
    ):
        assert review(place, place.root / "reviewed.json", file) == 1, message
        assert re.search(message, capsys.readouterr().err), message
    assert versions.latest(open_store(place.named())) == 1
    # Without an id the URL says which image it is.
    for task in good:
        del task["data"]["image_id"]
    assert review(place, place.root / "reviewed.json", good) == 0
    assert set(place.rows(2)) == {"x#0.jpg", "x#1.jpg"}
