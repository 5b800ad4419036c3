"""The report's page: its numbers are those of the table, nothing on it runs, and it stays small."""

import io
import json
import shutil
import tarfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image

from jobs.__main__ import main
from jobs.pictures import Picture, Wanted, fetch, open_images
from jobs.storage import open_store
from jobs.survey import Picks, certainty
from tests.jobs.report_tables import (
    HOSTILE,
    HOSTILE_CATEGORY,
    Row,
    make_noise,
    make_scenes,
    make_tar,
    many_rows,
    put_table,
    row,
)

# Elements that have no end in HTML; in SVG a slash says so.
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in their order; keeps texts, scripts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[tuple[dict[str, Any], str]] = []
        self.attributes: Counter[str] = Counter()
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.update(name for name, _ in attrs)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "line"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
        else:
            self.text += f" {data}"

    @property
    def data(self) -> Any:
        (found,) = (text for attributes, text in self.scripts if attributes.get("id") == "data")
        return json.loads(found)


def report(folder: Path, *more: str, images: str = "images") -> Page:
    arguments = ["--predictions", str(folder / "table"), "--images", str(folder / images)]
    assert main(["report", *arguments, "--output", str(folder / "page"), *more]) == 0
    return Page((folder / "page" / "index.html").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A folder with images, truth, a table, and their page; and the table's rows."""
    folder = tmp_path_factory.mktemp("report")
    rows = make_scenes(folder)
    report(folder, "--truth", str(folder / "truth.json"))
    return folder, rows


@pytest.fixture
def page(made: tuple[Path, list[Row]]) -> Page:
    return Page((made[0] / "page" / "index.html").read_text())


def test_what_is_hostile_is_text(made: tuple[Path, list[Row]], page: Page) -> None:
    # The data and our own script: nothing else became a script, an element or a handler.
    assert len(page.scripts) == 2
    assert not [name for name in page.attributes if name.startswith("on")]
    assert len(page.ids) == len(set(page.ids))
    assert HOSTILE_CATEGORY in page.text
    assert "truncated: <b>it ends</b>" in page.text
    assert HOSTILE_CATEGORY in page.data["categories"]
    assert HOSTILE.replace("/", ":") + ".jpg" in [image["key"] for image in page.data["images"]]
    source = (made[0] / "page" / "index.html").read_text()
    assert "<script>alert" not in source
    assert "http://" not in source
    assert "https://" not in source


def test_numbers_are_those_of_the_table(made: tuple[Path, list[Row]], page: Page) -> None:
    table = f"'{made[0]}/table/predictions/*.parquet'"
    words = " ".join(page.text.split())
    (images, failed, empty, found), *_ = duckdb.sql(
        "select count(*), count(*) filter (status = 'error'), "
        f"count(*) filter (status = 'ok' and len(detections) = 0), sum(len(detections)) from {table}"
    ).fetchall()
    for number, name in (
        (images, "images"),
        (found, "detections"),
        (empty, "with nothing found"),
        (failed, "in error"),
    ):
        assert f"{number} {name}" in words
    items = f"(select unnest(detections) as d from {table})"
    for name, number, mean in duckdb.sql(
        f"select d.category, count(*), avg(d.score) from {items} group by 1"
    ).fetchall():
        assert f"{name} {number} {mean:.2f}" in words
    source = (made[0] / "page" / "index.html").read_text()
    for low, number in duckdb.sql(
        f"select least(floor(d.score::double * 20), 19) / 20, count(*) from {items} group by 1"
    ).fetchall():
        assert f"<title>{low:.2f} to {low + 0.05:.2f}: {number}</title>" in source
    for kind, number in duckdb.sql(
        f"select split_part(error, ':', 1), count(*) from {table} where error is not null group by 1"
    ).fetchall():
        assert f"{kind} {number} #scene" in words


def test_quality_is_that_of_evaluate(made: tuple[Path, list[Row]], page: Page) -> None:
    folder, _ = made
    places = ["--predictions", str(folder / "table"), "--annotations", str(folder / "truth.json")]
    assert main(["evaluate", *places, "--output", str(folder / "scores")]) == 0
    metrics = json.loads((folder / "scores" / "metrics.json").read_text())
    words = " ".join(page.text.split())
    for name in ("AP", "AP50", "APm", "AR10"):
        assert f"{name} {metrics['mask'][name]:.3f} {metrics['box'][name]:.3f}" in words


def test_groups_show_what_they_say(made: tuple[Path, list[Row]], page: Page) -> None:
    folder, rows = made
    data = page.data
    groups = {group["id"]: group["tiles"] for group in data["groups"]}
    assert list(groups) == ["best", "worst", "random", "errors", "wrong", "missed"]
    keys = {name: [data["images"][t["image"]]["key"] for t in g] for name, g in groups.items()}
    assert sorted(keys["best"]) == sorted(keys["worst"])
    assert set(keys["random"]) == {row["key"] for row in rows if row["status"] == "ok"}
    assert set(keys["errors"]) == {"scene 6.jpg", "scene 7.jpg"}
    # What is in error but can be read has its picture; what is gone says so.
    sources = {image["key"]: image["src"] for image in data["images"]}
    assert sources["scene 6.jpg"] is not None
    assert sources["scene 7.jpg"] is None
    for tile in groups["wrong"]:
        image = data["images"][tile["image"]]
        assert data["categories"][image["found"][tile["mark"]]["c"]] == "ghost"
    scores = [data["images"][t["image"]]["found"][t["mark"]]["s"] for t in groups["wrong"]]
    assert scores == sorted(scores, reverse=True)
    areas = [data["images"][t["image"]]["truth"][t["mark"]]["a"] for t in groups["missed"]]
    assert areas == sorted(areas, reverse=True)
    for image in data["images"]:
        if image["src"]:
            with Image.open(folder / "page" / image["src"]) as thumbnail:
                assert thumbnail.size == (image["tw"], image["th"])


def test_an_image_that_is_gone_or_another_is_a_tile_that_says_so(tmp_path: Path) -> None:
    make_scenes(tmp_path)
    (tmp_path / "images" / "scene 0.jpg").unlink()
    (tmp_path / "images" / "scene 2.jpg").write_bytes(b"no image")
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "scene 3.jpg")
    images = {image["key"]: image for image in report(tmp_path).data["images"]}
    assert "cannot be read any more. missing:" in images["scene 0.jpg"]["error"]
    assert "cannot be read any more. unknown_format:" in images["scene 2.jpg"]["error"]
    assert "30 x 40 pixels now" in images["scene 3.jpg"]["error"]
    assert images["scene 4.jpg"]["error"] is None
    # What an earlier page left is not kept beside this one.
    left = {f"images/{path.name}" for path in (tmp_path / "page" / "images").iterdir()}
    assert left == {image["src"] for image in images.values() if image["src"]}


def test_a_large_table_makes_a_small_page(tmp_path: Path) -> None:
    names, size_hw = [f"{n}.jpg" for n in range(6)], (480, 640)
    make_noise(tmp_path / "images", names, size_hw)
    many_rows(tmp_path, 100_000, names, size_hw)
    page = report(tmp_path)
    assert "100,000 images" in " ".join(page.text.split())
    ((found,),) = duckdb.sql(
        f"select sum(len(detections)) from '{tmp_path}/table/all.parquet'"
    ).fetchall()
    assert f"{found:,} detections" in " ".join(page.text.split())
    assert [image["key"] for image in page.data["images"] if image["src"] is None] == []
    files = [path for path in (tmp_path / "page").rglob("*") if path.is_file()]
    assert len(files) <= 1 + 3 * 24
    assert sum(path.stat().st_size for path in files) < 20e6


@pytest.mark.parametrize("output", ["images", "images/page"])
def test_a_page_within_the_images_is_refused(
    tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--predictions", "x", "--images", str(tmp_path / "images")]
    assert main(["report", *places, "--output", str(tmp_path / output)]) == 2
    assert "lies within --images" in capsys.readouterr().err


def test_an_empty_table_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.jpg")
    put_table(tmp_path, [row("a.jpg", (30, 40), [])])
    page = report(tmp_path)
    assert "1 with nothing found" in " ".join(page.text.split())
    assert [group["id"] for group in page.data["groups"]] == ["random"]


def test_picks_are_the_lowest_however_they_come() -> None:
    rng = np.random.default_rng(0)
    keys, ties = rng.integers(0, 5, 200).astype(float), rng.random(200)
    picks = Picks(7)
    for some in np.array_split(np.arange(200), 9):
        picks.offer(keys[some], ties[some], some)
    assert picks.rows == np.lexsort((ties, keys))[:7].tolist()


def test_certainty_is_the_mean_distance_from_a_half() -> None:
    found = certainty(np.array([1.0, 0.5, 0.0]), np.array([0, 0, 2]), 3)
    assert found.tolist()[0::2] == [0.5, 1.0]
    assert np.isnan(found[1])


def test_images_of_a_shard_are_found_without_a_plan(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(3)]
    (tmp_path / "shards").mkdir()
    for shard in ("a", "b"):
        make_tar(tmp_path / "shards" / f"{shard}.tar", names)
        shutil.rmtree(tmp_path / "shards" / shard)
    with tarfile.open(tmp_path / "shards" / "b.tar") as archive:
        file = archive.extractfile("1.jpg")
        assert file is not None
        expected = file.read()
    wanted = [
        Wanted(row=5, image_id="b.tar#1.jpg", shard="b.tar", key="1.jpg", path="x", position=0),
        Wanted(row=9, image_id="c.tar#1.jpg", shard="c.tar", key="1.jpg", path="x", position=1),
    ]
    images = open_images(str(tmp_path / "shards"), open_store(str(tmp_path)), None)
    found = {one.row: one for one in fetch(wanted, images)}
    assert found[5] == Picture(5, expected)
    assert (found[9].error or "").startswith("missing: ")
    assert Image.open(io.BytesIO(expected)).size == (16, 16)
