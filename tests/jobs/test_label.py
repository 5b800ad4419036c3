"""`segjobs label` on a local folder: what is new, versions, candidates, and who wins."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import sorting, versions
from jobs.__main__ import main
from jobs.storage import ArrowStore, open_store
from segmodel.schema import TRAINING

pytestmark = pytest.mark.ray

# Of the tiny model's detections some are labels, some are to be looked at, the rest is rejected.
POLICY = """
score_threshold: 0.0
min_area: 1
duplicate_iou: 0.9
max_per_image: 5
audit_share: 0.5
"""


class Place:
    """An input of tars, a data set, and the command between them."""

    def __init__(self, root: Path, model: Path, jpeg: Callable[..., bytes], make_tar: Any) -> None:
        self.root, self.model, self.jpeg, self.make_tar = root, model, jpeg, make_tar
        (root / "in").mkdir()
        self.policy(POLICY)

    def policy(self, text: str) -> None:
        (self.root / "policy.yaml").write_text(text)

    def put(self, shard: str, images: dict[str, int]) -> None:
        """Write a tar of pictures made of these seeds."""
        members = [(name, self.jpeg(seed)) for name, seed in images.items()]
        (self.root / "in" / shard).write_bytes(self.make_tar(members))

    def label(self, *more: str, model: Path | None = None) -> int:
        return main(
            [
                *("label", "--input", str(self.root / "in"), "--dataset", str(self.root / "set")),
                *("--model", str(model or self.model), "--policy", str(self.root / "policy.yaml")),
                *("--chunk-size", "4", *more),
            ]
        )

    def manifest(self, number: int) -> dict[str, Any]:
        path = self.root / "set" / "versions" / str(number) / "manifest.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def rows(self, number: int, table: str = "accepted") -> dict[str, dict[str, Any]]:
        """Rows of a version by image id, each once."""
        store = open_store(str(self.root / "set"))
        listed = versions.load(store, number).table(table).objects.to_pylist()
        rows = [
            row
            for one in listed
            for row in pq.read_table(self.root / "set" / one["path"]).to_pylist()
        ]
        assert len({row["image_id"] for row in rows}) == len(rows)
        return {row["image_id"]: row for row in rows}


@pytest.fixture
def place(
    ray_local: None,
    tmp_path: Path,
    tiny_bundle: Path,
    jpeg: Callable[..., bytes],
    make_tar: Any,
) -> Place:
    return Place(tmp_path, tiny_bundle, jpeg, make_tar)


def test_what_is_new_becomes_the_next_version(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(6)})
    assert place.label() == 0
    first = place.rows(1)
    assert set(first) == {f"a.tar#{n}.jpg" for n in range(6)}
    assert all(row["image"]["bytes"] == place.jpeg(n) for n, row in enumerate(first.values()))
    manifest = place.manifest(1)
    assert manifest["parent"] is None
    assert manifest["drift"] == {}
    assert manifest["counts"]["new"]["accepted"] == 6
    assert manifest["counts"]["all"]["accepted"]["rows"] == 6
    assert 0 < manifest["counts"]["new"]["audit"] < 6

    capsys.readouterr()
    assert place.label() == 0
    assert "Nothing is new" in capsys.readouterr().out
    # Written again, it has another time of change, and the same images.
    os.utime(place.root / "in" / "a.tar", (1, 1))
    assert place.label() == 0
    assert "their images are the same" in capsys.readouterr().out
    assert not (place.root / "set" / "versions" / "2" / "manifest.json").exists()

    # One image of six is another, one is new, and a shard is added.
    place.put("a.tar", {**{f"{n}.jpg": n for n in range(6)}, "2.jpg": 70, "6.jpg": 6})
    place.put("b.tar", {"7.jpg": 7})
    assert place.label() == 0
    second, manifest = place.rows(2), place.manifest(2)
    assert set(second) == {*first, "a.tar#6.jpg", "b.tar#7.jpg"}
    assert manifest["counts"]["new"]["images"] == 3
    assert manifest["counts"]["new"]["replaced"] == 1
    assert second["a.tar#2.jpg"]["image"]["bytes"] == place.jpeg(70)
    for name in set(first) - {"a.tar#2.jpg"}:
        assert second[name] == first[name]
    # The first version is as it was.
    assert place.rows(1) == first
    assert manifest["parent"] == 1
    assert set(manifest["drift"]) == {"class_mix", "scores", "sizes", "empty_share"}
    profile = manifest["profile"]["all"]
    assert profile["images"] == 8
    assert sum(profile["scores"].values()) == sum(len(r["detections"]) for r in second.values())

    for number, rows in ((1, first), (2, second)):
        for name in manifest_objects(place, number):
            schema = pq.read_schema(place.root / "set" / name)
            assert "accepted" not in name or schema.equals(TRAINING)
        assert len(place.rows(number, "review")) > 0
        assert set(place.rows(number, "review")) <= set(rows)


def manifest_objects(place: Place, number: int) -> list[str]:
    found: list[str] = pq.read_table(place.root / "set" / place.manifest(number)["objects"])[
        "path"
    ].to_pylist()
    return found


def table_of(place: Place, *parts: str) -> str:
    return str(place.root.joinpath("set", *parts))


def test_what_drifts_is_a_candidate_until_it_is_promoted(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(4)})
    assert place.label() == 0
    # Nothing is a label any more: the share of empty images goes from 0 to 1.
    place.policy("score_threshold: 1.0\n")
    place.put("b.tar", {f"{n}.jpg": n for n in range(10, 18)})
    capsys.readouterr()
    assert place.label("--max-drift", "0.3") == 4
    assert "over --max-drift" in capsys.readouterr().out
    manifest = place.manifest(2)
    assert (manifest["status"], manifest["exceeded"]) == ("candidate", ["empty_share"])
    assert manifest["drift"]["empty_share"]["distance"] == 1
    assert manifest["counts"]["new"]["reasons"]["detections: score"] > 0
    # It waits, and is not made again.
    assert place.label("--max-drift", "0.3") == 4
    assert "since the candidate 2, which waits" in capsys.readouterr().out
    assert main(["label", "--dataset", table_of(place), "--list"]) == 0
    said = capsys.readouterr().out
    assert "current" in said
    assert "candidate" in said
    assert not (place.root / "set" / "versions" / "3" / "manifest.json").exists()

    # The next one starts from what is current.
    place.policy(POLICY)
    assert place.label("--max-drift", "1") == 0
    assert place.manifest(3)["parent"] == 1
    assert main(["label", "--dataset", table_of(place), "--promote", "2"]) == 0
    place.put("c.tar", {"30.jpg": 30})
    assert (
        main(
            ["label", "--dry-run", "--input", str(place.root / "in"), "--dataset", table_of(place)]
        )
        == 0
    )
    assert "New since version 2" in capsys.readouterr().out
    assert main(["label", "--dataset", table_of(place), "--show", "2"]) == 0
    assert "Version 2, candidate" in capsys.readouterr().out


def test_reviewed_labels_win(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    # All images wait for a person, but those whose best detections are labels.
    place.policy("score_threshold: 1.0\nreview_from: 0.0\nmin_area: 1\nmax_per_image: 3\n")
    place.put("a.tar", {f"{n}.jpg": n for n in range(5)})
    (place.root / "in" / "a.tar").write_bytes(
        place.make_tar([(f"{n}.jpg", place.jpeg(n)) for n in range(5)] + [("bad.jpg", b"no image")])
    )
    assert place.label() == 0
    waiting = place.rows(1, "review")
    assert set(waiting) == {f"a.tar#{n}.jpg" for n in range(5)}
    assert place.rows(1) == {}
    (bad,) = (r for r in place.rows(1, "rejected").values() if r["reason"])
    assert (bad["key"], bad["image"]) == ("bad.jpg", None)

    out = str(place.root / "review.json")
    review = table_of(place, "versions", "1", "review")
    assert main(["export", "--predictions", review, "--to", "coco-instances", "--output", out]) == 0
    file = json.loads(Path(out).read_text())
    assert len(file["images"]) == 5
    # One image is left out. Of the others' labels the reviewer takes one out, renames one, adds one.
    file["images"] = [one for one in file["images"] if not one["file_name"].endswith("/4.jpg")]
    images = {one["id"] for one in file["images"]}
    labels = [one for one in file["annotations"] if one["image_id"] in images]
    square = [[1, 1, 1, 5, 5, 5, 5, 1]]
    moved = {**labels[1], "category_id": 4 - labels[1]["category_id"]}
    added = {**labels[2], "id": 999, "segmentation": square}
    file["annotations"] = [moved, *labels[2:], added]
    file["categories"] = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    Path(out).write_text(json.dumps(file))
    capsys.readouterr()
    assert main(["label", "--dataset", table_of(place), "--reviewed", out]) == 0
    said = capsys.readouterr().out
    assert "the reviewer wins" in said
    counts = place.manifest(2)["reviewed"]["counts"]
    assert counts["images that were to review"] == 4
    assert counts["labels taken out"] >= 1
    assert counts["labels of another category"] >= 1
    assert counts["labels added"] >= 1
    accepted = place.rows(2)
    assert set(accepted) == {f"a.tar#{n}.jpg" for n in range(4)}
    assert set(place.rows(2, "review")) == {"a.tar#4.jpg"}
    assert sum(len(row["detections"]) for row in accepted.values()) == len(file["annotations"])
    assert all(d["score"] is None for row in accepted.values() for d in row["detections"])
    assert all(accepted[name]["image"] == waiting[name]["image"] for name in accepted)
    assert main(["label", "--dataset", table_of(place), "--reviewed", out]) == 0
    assert "is in version 2" in capsys.readouterr().out

    # The machine does not label them again: not when nothing is new, nor beside what is.
    place.put("b.tar", {"9.jpg": 9})
    assert place.label() == 0
    assert place.manifest(3)["counts"]["new"]["images"] == 1
    assert {name: place.rows(3)[name] for name in accepted} == accepted

    # What the version has not is refused.
    file["images"].append({"id": 77, "file_name": "a.tar/none.jpg", "height": 24, "width": 32})
    Path(out).write_text(json.dumps(file))
    assert main(["label", "--dataset", table_of(place), "--reviewed", out]) == 1
    assert "1 images of" in capsys.readouterr().err


def test_who_is_second_starts_from_the_first(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put("a.tar", {"1.jpg": 1, "2.jpg": 2})
    real, lost = versions.publish, []

    def overtaken(dataset: Any, number: int, manifest: Any) -> bool:
        if not lost:
            lost.append(number)
            assert real(dataset, number, {**manifest, "run_id": "another"})
            # While it was made, more has come.
            place.put("b.tar", {"3.jpg": 3})
        return real(dataset, number, manifest)

    monkeypatch.setattr(versions, "publish", overtaken)
    assert place.label() == 0
    assert "Another run has published" in capsys.readouterr().out
    assert place.manifest(1)["run_id"] == "another"
    assert set(place.rows(1)) == {"a.tar#1.jpg", "a.tar#2.jpg"}
    assert place.manifest(2)["counts"]["new"]["images"] == 1
    assert set(place.rows(2)) == {"a.tar#1.jpg", "a.tar#2.jpg", "b.tar#3.jpg"}


def test_loose_images_are_found_by_content_and_read_by_other_verbs(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place.root / "in" / "deep"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(place.jpeg(number))
    assert place.label() == 0
    (folder / "1.jpg").write_bytes(place.jpeg(11))
    os.utime(folder / "2.jpg", (1, 1))
    (folder / "5.jpg").write_bytes(place.jpeg(5))
    (folder / "0.jpg").unlink()
    assert place.label() == 0
    second = place.rows(2)
    assert place.manifest(2)["counts"]["new"]["images"] == 2
    assert set(second) == {f"deep#{n}.jpg" for n in range(6)}
    assert second["deep#1.jpg"]["image"]["bytes"] == place.jpeg(11)
    capsys.readouterr()
    assert (
        main(
            ["label", "--dry-run", "--input", str(place.root / "in"), "--dataset", table_of(place)]
        )
        == 0
    )
    assert "1 labelled objects; their rows stay" in capsys.readouterr().out

    # A version is a table: its rows are scored against themselves, the first of its parents beside it.
    out = str(place.root / "truth.json")
    assert (
        main(
            ["export", "--predictions", table_of(place), "--to", "coco-instances", "--output", out]
        )
        == 0
    )
    scores = place.root / "scores"
    assert (
        main(
            [
                *("evaluate", "--predictions", table_of(place), "--annotations", out, "--subset"),
                *("--against", table_of(place, "versions", "1"), "--output", str(scores)),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "Better by" in said
    found = json.loads((scores / "metrics.json").read_text())
    assert found["against"]["better"]["better"] == "predictions"
    assert found["mask"]["AP"] == pytest.approx(1)
    assert found["against"]["mask"]["AP"] < 1


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--input", "elsewhere"], "is of the input .*, not of", 2),
        (["--dataset", "in/set"], "lies within --input", 2),
        (["--policy", "none.yaml"], "there is no file", 2),
        (["--policy", "bad.yaml"], "did you mean score_threshold", 2),
        (["--policy", "names.yaml"], "names the category 'cat', which the model has not", 2),
        (["--policy", "broken.yaml"], "is no YAML", 2),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str],
    message: str,
    code: int,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place.put("a.tar", {"1.jpg": 1})
    monkeypatch.chdir(place.root)
    for name, text in (
        ("bad", "score_treshold: 1"),
        ("names", "categories: {cat: {min_area: 3}}"),
        ("broken", "a: ["),
    ):
        (place.root / f"{name}.yaml").write_text(text)
    if "--input" in arguments:
        put_empty_version(place)
    assert place.label(*arguments) == code
    assert re.search(message, capsys.readouterr().err)


def put_empty_version(place: Place) -> None:
    store = open_store(str(place.root / "set"))
    facts = {"run_id": "r", "status": "published", "input": "there", "categories": []}
    assert versions.publish(store, 1, {**facts, "objects": "o", "inputs": "i"})


def test_a_store_without_conditional_puts_needs_a_word(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put("a.tar", {"1.jpg": 1})
    monkeypatch.setattr(ArrowStore, "keeps_first", lambda *_: False)
    assert place.label() == 2
    assert "no conditional puts that hold" in capsys.readouterr().err
    assert place.label("--single-writer") == 0
    assert set(place.rows(1)) == {"a.tar#1.jpg"}


def test_what_a_run_began_is_finished_by_the_next_before_what_came_since(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(3)})
    with monkeypatch.context() as patch:
        # It dies when all is predicted and nothing is sorted yet.
        patch.setattr(sorting, "sort", lambda *_: (_ for _ in ()).throw(OSError("died")))
        assert place.label() == 1
    (work,) = (place.root / "set" / "work").iterdir()
    (predicted,) = (work / "predictions").iterdir()
    before = predicted.stat().st_mtime_ns
    place.put("b.tar", {"7.jpg": 7})
    assert place.label() == 0
    assert "did not get to its end" in capsys.readouterr().out
    assert predicted.stat().st_mtime_ns == before
    assert set(place.rows(1)) == {f"a.tar#{n}.jpg" for n in range(3)}
    assert set(place.rows(2)) == {*place.rows(1), "b.tar#7.jpg"}
    assert place.manifest(2)["parent"] == 1
    # Work of two versions ago is cleared away.
    place.put("c.tar", {"8.jpg": 8})
    assert place.label() == 0
    assert not list(work.rglob("*.parquet"))
    assert len(place.rows(3)) == 5
