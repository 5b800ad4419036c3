"""The tables of a version in other hands: exported, shown on a page, opened as they are."""

import json
import re
from pathlib import Path

import datasets
import duckdb
import pytest
import yaml

from jobs.__main__ import main
from jobs.versions import urls
from tests.jobs.export_tables import export
from tests.jobs.labelling_place import Place


@pytest.mark.parametrize("table", ["accepted", "review", "rejected"])
def test_classes_are_those_of_the_version(place: Place, tmp_path: Path, table: str) -> None:
    """Numbers of classes stay, whichever of them occur in a table."""
    # Of persons, 1 in the data set, no table has any.
    place.policy(
        "score_threshold: 0.6\nreview_from: 0.4\naudit_share: 1\nother_categories: false\n"
        "categories: {car: {}}\n"
    )
    place.put("a.tar", {f"{n}.jpg": n for n in range(12)})
    assert place.label() == 0
    uri = place.named("versions", "1", table)
    rows = place.rows(1, table).values()
    if table != "rejected":
        assert {one["category_id"] for row in rows for one in row["detections"]} == {3}
    assert export(uri, "yolo-seg", tmp_path / "yolo") == 0
    names = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"]
    assert names == {0: "person", 1: "car"}
    assert export(uri, "semantic-png", tmp_path / "maps") == 0
    legend = json.loads((tmp_path / "maps/legend.json").read_text())["classes"]
    assert [(one["value"], one["category_id"]) for one in legend] == [(1, 1), (2, 3)]


@pytest.mark.parametrize("table", ["accepted", "review", "rejected"])
def test_a_page_shows_every_image_of_each_table(place: Place, tmp_path: Path, table: str) -> None:
    """Whichever table has the bytes: an audit's are with its accepted row."""
    place.policy("score_threshold: 0.6\nreview_from: 0.5\naudit_share: 0.7\n")
    place.put("a.tar", {f"{n}.jpg": n for n in range(12)})
    assert place.label() == 0
    reasons = {row["reason"] for row in place.rows(1, "review").values()}
    assert len(reasons) > 1
    assert "audit" in reasons
    (tmp_path / "in" / "a.tar").unlink()
    uri = place.named("versions", "1", table)
    for images in (uri, place.named()):
        page = tmp_path / "page"
        places = ["--predictions", uri, "--images", images, "--output", str(page)]
        assert main(["report", *places]) == 0
        html = (page / "index.html").read_text()
        (data,) = re.findall(r'<script[^>]*id="data"[^>]*>(.*?)</script>', html, re.DOTALL)
        shown = {image["key"]: image["src"] for image in json.loads(data)["images"]}
        assert shown.keys() == {row["key"] for row in place.rows(1, table).values()}
        assert None not in shown.values()


@pytest.mark.parametrize("table", ["accepted", "review", "rejected"])
def test_datasets_and_duckdb_open_the_objects_of_a_version(
    place: Place, tmp_path: Path, table: str
) -> None:
    """Of a version, not of a folder: some lie with its parents, and parents have more than that."""
    place.policy("score_threshold: 0.6\nreview_from: 0.5\naudit_share: 0.5\n")
    place.put("a.tar", {f"{n}.jpg": n for n in range(8)})
    place.put("b.tar", {f"{n}.jpg": n for n in range(20, 24)})
    assert place.label() == 0
    place.put("a.tar", {f"{n}.jpg": n if n > 3 else n + 40 for n in range(12)})
    assert place.label() == 0
    wanted = place.rows(2, table)
    objects = urls(place.named("versions", "2", table))
    found = datasets.load_dataset(
        "parquet", data_files=objects, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(found["image_id"]) == sorted(wanted)
    assert len(objects) > 1
    for row in found.with_format(None):
        kept = wanted[row["image_id"]]
        assert [one["score"] for one in row["detections"]] == [
            one["score"] for one in kept["detections"]
        ]
        if kept["image"] is None:
            assert row["image"] is None
        else:
            assert row["image"].size == (kept["width"], kept["height"])
    counted = duckdb.sql(
        f"select count(*), sum(len(detections)) from read_parquet({objects})"
    ).fetchall()
    detections = sum(len(row["detections"]) for row in wanted.values())
    assert counted == [(len(wanted), detections)]


def test_a_page_says_what_the_version_is(place: Place, tmp_path: Path) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(8)})
    assert place.label() == 0
    place.put("b.tar", {f"{n}.jpg": n for n in range(20, 24)})
    assert place.label("--max-drift", "1") == 0
    uri = place.named("versions", "2", "review")
    page = tmp_path / "page"
    places = ["--predictions", uri, "--images", uri, "--output", str(page)]
    assert main(["report", *places]) == 0
    html = (page / "index.html").read_text()
    facts = dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", html))
    manifest = place.manifest(2)
    assert facts["version"] == "2, published"
    assert facts["parent"] == "1"
    assert facts["labelled by"] == f"{place.model} ({manifest['model']['digest'][:12]})"
    assert facts["images"] == uri
    distance = f"{manifest['drift']['scores']['distance']:.3f}"
    assert facts["drift of scores"].startswith(f"{distance} (chance alone")
    policy = html.partition("<summary>Policy of the labels</summary>")[2].partition("</details>")[0]
    assert "&#34;duplicate_iou&#34;: 0.9" in policy
