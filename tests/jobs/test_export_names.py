"""Files of an export are found by the names of their images, or the export says how to call those."""

import csv
import importlib
import warnings
from pathlib import Path

import pytest
from PIL import Image

from jobs.storage import open_store
from tests.jobs.export_tables import Row, export, put, row, scene_rows

# Names as they come, and how Ultralytics wants a few of them called.
PLAIN = (
    *("p/plain.jpg", "p/photo#1.jpg", "p/50%.jpg", "p/a:b.jpg", "p/.hid.jpg", "a%20b.jpg"),
    *("é/中.jpg", f"p/{'x' * 200}.jpg", "my images/1.jpg"),
)
RENAMED = {
    "p/same.jpg": "p/same.jpg.jpg",
    "p/same.png": "p/same.png.png",
    # Its label would be that of the image above.
    "p/same.jpg.png": "p/same.jpg.png.png",
    "images/1.jpg": "%69mages/1.jpg",
    f"p/{'y' * 230}.jpg": f"p/{'y' * 192}%~",
}


def named_rows(found: list[Row]) -> list[Row]:
    paths = [*PLAIN, *RENAMED]
    return [row(*path.rpartition("/")[::2], found) for path in paths]


@pytest.fixture
def found() -> list[Row]:
    detections: list[Row] = next(one for one in scene_rows() if one["detections"])["detections"]
    return detections


def test_ultralytics_finds_the_labels_of_every_image(
    found: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = importlib.import_module("ultralytics.data.utils")
    put(open_store(str(tmp_path / "t")), named_rows(found))
    assert export(str(tmp_path / "t"), "yolo-seg", tmp_path / "out") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(RENAMED)} images need files of another name, as names.csv has them" in said
    with (tmp_path / "out/names.csv").open(newline="") as file:
        listed = {one["image_id"]: one["file"] for one in csv.DictReader(file)}
    assert len(listed) == len(RENAMED)
    for of_path, wanted in RENAMED.items():
        assert listed["#".join(of_path.rsplit("/", 1))].startswith(wanted)
    for one in named_rows(found):
        path = listed.get(one["image_id"], "/".join(filter(None, (one["shard"], one["key"]))))
        image = tmp_path / "out/images" / path
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (128, 96)).save(image)
        (label,) = data.img2label_paths([str(image)])
        read = data.verify_image_label((str(image), label, "", False, 100, 0, 0, False))
        assert len(read[1]) == len(found), path
        assert read[5] == 0, path


def test_two_images_with_one_path_are_told_apart(tmp_path: Path) -> None:
    rows = [row("a", "b/c.jpg", []), row("a/b", "c.jpg", []), row("", "a/b/c.jpg", [])]
    put(open_store(str(tmp_path / "t")), rows)
    export(str(tmp_path / "t"), "yolo-seg", tmp_path / "o")
    files = {str(p.relative_to(tmp_path / "o/labels")) for p in tmp_path.rglob("*.txt")}
    assert files == {"a/b%2Fc.jpg.txt", "a/b/c.jpg.txt", "a%2Fb%2Fc.jpg.txt"}
    listed = (tmp_path / "o/names.csv").read_text().splitlines()
    assert "a#b/c.jpg,a,b/c.jpg,a/b%2Fc.jpg.jpg" in listed


def test_another_export_takes_the_list_of_names_away(found: list[Row], tmp_path: Path) -> None:
    put(open_store(str(tmp_path / "t")), named_rows(found))
    assert export(str(tmp_path / "t"), "yolo-seg", tmp_path / "o") == 0
    assert (tmp_path / "o/names.csv").exists()
    put(open_store(str(tmp_path / "plain")), [row("p", "plain.jpg", found)])
    assert export(str(tmp_path / "plain"), "yolo-seg", tmp_path / "o", "--overwrite") == 0
    assert not (tmp_path / "o/names.csv").exists()
