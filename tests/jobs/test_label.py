"""`segjobs label` on a local folder: what is new, versions, candidates, and who wins.

The first test is on Ray with a network; the others run the same code in this process.
"""

import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import labelling, sorting, training_set, versions
from jobs.__main__ import main
from jobs.label_config import LabelConfig
from jobs.storage import ArrowStore, open_store
from segmodel.schema import TRAINING
from tests.conftest import Bucket
from tests.jobs.conftest import put_shard, training_row
from tests.jobs.labelling_place import POLICY, Place, found_in, words


@pytest.fixture
def real_place(
    ray_local: None,
    tmp_path: Path,
    tiny_bundle: Path,
    jpeg: Callable[..., bytes],
    make_tar: Any,
) -> Place:
    return Place(tmp_path, tiny_bundle, jpeg, make_tar)


@pytest.mark.ray
def test_what_is_new_becomes_the_next_version(
    real_place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place = real_place
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
    assert "Nothing is new" in words(capsys)
    # Written again, it has another time of change, and the same images.
    os.utime(place.root / "in" / "a.tar", (1, 1))
    assert place.label() == 0
    assert "their images are the same" in words(capsys)
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
    kinds = {"class_mix", "scores", "sizes", "empty_share", "error_share"}
    assert set(manifest["drift"]) == kinds
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
    said = words(capsys)
    assert "over --max-drift" in said
    assert "ALERT: Version 2 is a candidate only, and nobody reads it: empty share moved" in said
    manifest = place.manifest(2)
    assert (manifest["status"], manifest["exceeded"]) == ("candidate", ["empty_share"])
    assert manifest["drift"]["empty_share"]["distance"] == 1
    assert manifest["counts"]["new"]["reasons"]["detections: score"] > 0
    # It waits, and is not made again.
    assert place.label("--max-drift", "0.3") == 4
    assert "ALERT: Nothing is new" in (said := words(capsys))
    assert "since the candidate 2, which waits" in said
    # As schedulers want it that run again what failed.
    assert place.label("--max-drift", "0.3", "--held-exit-code", "0") == 0
    assert "ALERT: " in words(capsys)
    assert main(["label", "--dataset", place.named(), "--list"]) == 0
    said = words(capsys)
    assert "current" in said
    assert "candidate" in said
    assert not (place.root / "set" / "versions" / "3" / "manifest.json").exists()

    # The next one starts from what is current.
    place.policy(POLICY)
    assert place.label("--max-drift", "1") == 0
    assert place.manifest(3)["parent"] == 1
    assert main(["label", "--dataset", place.named(), "--promote", "2"]) == 0
    place.put("c.tar", {"30.jpg": 30})
    assert (
        main(["label", "--dry-run", "--input", str(place.root / "in"), "--dataset", place.named()])
        == 0
    )
    assert "New since version 2" in words(capsys)
    assert main(["label", "--dataset", place.named(), "--show", "2"]) == 0
    assert "Version 2, candidate" in words(capsys)


def test_a_night_of_errors_is_a_candidate(place: Place) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(20)})
    assert place.label("--max-drift", "0.1") == 0
    junk = place.make_tar([(f"{n}.jpg", b"no image %d" % n) for n in range(50)])
    (place.root / "in" / "b.tar").write_bytes(junk)
    assert place.label("--max-drift", "0.1") == 4
    second = place.manifest(2)
    assert (second["status"], second["exceeded"]) == ("candidate", ["error_share"])
    # Nothing else of it can be compared.
    assert second["drift"] == {
        "error_share": {"distance": 1.0, "chance": pytest.approx(0.29, abs=0.01)}
    }
    assert second["profile"]["all"]["failed"] == 50
    assert main(["label", "--dataset", place.named(), "--promote", "2"]) == 0
    # Mended, they are errors no more.
    place.put("b.tar", {f"{n}.jpg": 20 + n for n in range(50)})
    assert place.label() == 0
    assert place.manifest(3)["profile"]["all"]["failed"] == 0
    assert place.manifest(3)["profile"]["all"]["images"] == 70


def test_versions_that_are_trained_on_together_share_images_and_it_is_said(place: Place) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(4)})
    assert place.label() == 0
    place.put("b.tar", {f"{n}.jpg": n for n in range(20, 23)})
    assert place.label() == 0
    both = training_set.load([place.named("versions", "1"), place.named()], None)
    (note,) = both.notes
    assert f"versions of {place.named()} share images, 4 at least" in note
    for names in (("versions", "1"), ("versions", "2")):
        assert training_set.load([place.named(*names)], None).notes == ()
    # All that was of the first is written anew, without an image that is another now.
    place.put("a.tar", {**{f"{n}.jpg": n for n in range(4)}, "0.jpg": 70})
    assert place.label() == 0
    places = [place.named("versions", number) for number in "13"]
    (note,) = training_set.load(places, None).notes
    assert "share images" in note


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
    assert "Another run has published" in words(capsys)
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
        main(["label", "--dry-run", "--input", str(place.root / "in"), "--dataset", place.named()])
        == 0
    )
    assert "1 labelled objects; their rows stay" in words(capsys)

    # A version is a table: its rows are scored against themselves, the first of its parents beside it.
    out = str(place.root / "truth.json")
    assert (
        main(["export", "--predictions", place.named(), "--to", "coco-instances", "--output", out])
        == 0
    )
    scores = place.root / "scores"
    assert (
        main(
            [
                *("evaluate", "--predictions", place.named(), "--annotations", out, "--subset"),
                *("--against", place.named("versions", "1"), "--output", str(scores)),
            ]
        )
        == 0
    )
    said = words(capsys)
    assert "Better by" in said
    found = json.loads((scores / "metrics.json").read_text())
    assert found["against"]["better"]["better"] == "predictions"
    assert found["mask"]["AP"] == pytest.approx(1)
    assert found["against"]["mask"]["AP"] < 1


@pytest.mark.parametrize("images", ["in", "set/versions/1"])
@pytest.mark.parametrize("table", ["", "review"])
def test_a_report_shows_a_version_and_its_queue(place: Place, images: str, table: str) -> None:
    place.policy("score_threshold: 0.6\nreview_from: 0.5\nmin_area: 1\n")
    place.put("a.tar", {f"{n}.jpg": n for n in range(12)})
    assert place.label() == 0
    place.put("b.tar", {f"{n}.jpg": n for n in range(20, 24)})
    assert place.label() == 0
    rows = place.rows(1, table or "accepted")
    assert 1 < len(rows) < 12
    if images != "in":
        (place.root / "in" / "a.tar").unlink()
    shown = "/".join(filter(None, (images, table if images != "in" else "")))
    arguments = [
        *("--predictions", place.named("versions", "1", *filter(None, [table]))),
        *("--images", str(place.root / shown), "--output", str(place.root / "page")),
    ]
    assert main(["report", *arguments]) == 0
    page = (place.root / "page" / "index.html").read_text()
    # Rows of the second version, and of the other tables, are not on it.
    labels = sum(len(row["detections"]) for row in rows.values())
    for number, name in ((len(rows), "images"), (labels, "detections")):
        assert re.search(rf"\b{number}\b(<[^>]*>|\s)*{name}", page)
    assert f"versions/1{'/' + table if table else ''}" in page
    (data,) = re.findall(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, re.DOTALL)
    pictures = {image["key"]: image["src"] for image in json.loads(data)["images"]}
    assert set(pictures) <= {row["key"] for row in rows.values()}
    assert pictures
    assert None not in pictures.values()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--input", "elsewhere"], "is of the input .*, not of", 2),
        (["--dataset", "in/set"], "lies within --input", 2),
        (["--policy", "none.yaml"], "there is no file", 2),
        (["--policy", "bad.yaml"], "did you mean score_threshold", 2),
        (["--policy", "names.yaml"], "names the category 'cat', which the model has not", 2),
        (["--policy", "broken.yaml"], "is no YAML", 2),
        (["--policy", "twice.yaml"], "the key 'min_area' comes twice", 2),
        (["--policy", "list.yaml"], "must be names with values", 2),
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
        ("twice", "categories: {person: {min_area: 3, min_area: 4}}"),
        ("list", "categories: []"),
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
    real, seen = labelling._tidy, []

    def tidy(base: labelling.Base) -> None:
        seen.append(predicted.stat().st_mtime_ns)
        real(base)

    monkeypatch.setattr(labelling, "_tidy", tidy)
    assert place.label() == 0
    assert "did not get to its end" in words(capsys)
    # It was not made again, and was cleared away when the next version but one was there.
    assert seen == [before, before]
    assert not predicted.exists()
    assert set(place.rows(1)) == {f"a.tar#{n}.jpg" for n in range(3)}
    assert set(place.rows(2)) == {*place.rows(1), "b.tar#7.jpg"}
    assert place.manifest(2)["parent"] == 1


def test_packed_shards_are_compared_by_the_ids_that_they_bring(
    place: Place, put_packed: Callable[..., list[dict[str, Any]]], jpeg: Callable[..., bytes]
) -> None:
    store = open_store(str(place.root / "in"))
    rows = put_packed(store, 6)
    assert place.label("--format", "parquet") == 0
    assert set(place.rows(1)) == {row["image_id"] for row in rows}
    # Another shard has one of the same images, one that replaces another's, and one that is new.
    again, other, new = rows[1], {**rows[2]}, training_row(8, jpeg)
    other["image"] = {"bytes": jpeg(99), "path": "2.jpg"}
    put_shard(store, "later", [again, other, new], 5)
    assert place.label("--format", "parquet") == 0
    second = place.rows(2)
    assert place.manifest(2)["counts"]["new"]["images"] == 2
    assert place.manifest(2)["counts"]["new"]["replaced"] == 1
    assert set(second) == {row["image_id"] for row in (*rows, new)}
    assert second["all#2.jpg"]["image"]["bytes"] == jpeg(99)
    assert second["all#1.jpg"] == place.rows(1)["all#1.jpg"]


def test_an_image_that_changes_while_it_is_labelled_is_labelled_by_the_next_run(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        (place.root / "in" / f"{number}.jpg").write_bytes(place.jpeg(number))
    real = sorting.sort

    def sort(*of: Any) -> Any:
        (place.root / "in" / "1.jpg").write_bytes(place.jpeg(50))
        return real(*of)

    with monkeypatch.context() as patch:
        patch.setattr(sorting, "sort", sort)
        assert place.label() == 0
    assert set(place.rows(1)) == {"#0.jpg", "#2.jpg"}
    assert place.rows(1, "rejected")["#1.jpg"]["reason"].startswith("changed: ")
    assert place.manifest(1)["counts"]["new"]["reasons"] == {"changed": 1}
    assert place.label() == 0
    assert place.rows(2)["#1.jpg"]["image"]["bytes"] == place.jpeg(50)
    assert "#1.jpg" not in place.rows(2, "rejected")


def test_thresholds_and_reasons_reach_the_tables(place: Place) -> None:
    place.policy("score_threshold: 0.6\nreview_from: 0.5\nkeep_empty: false\nmax_per_image: 2\n")
    place.put("a.tar", {f"{n}.jpg": n for n in range(12)})
    assert place.label() == 0
    accepted, review_, rejected = (place.rows(1, t) for t in ("accepted", "review", "rejected"))
    for number in range(12):
        name = f"a.tar#{number}.jpg"
        found = found_in(place.jpeg(number))
        kept = [one["score"] for one in found if one["score"] >= 0.5][:2]
        fate = accepted if kept and min(kept) >= 0.6 else review_ if kept else rejected
        row = fate[name]
        if kept:
            scores = [one["score"] for one in row["detections"]]
            assert scores == pytest.approx(kept, abs=1e-6)
            assert rejected[name]["reason"] is None
            assert rejected[name]["image"] is None
        else:
            assert row["reason"] == "empty"
        reasons = ["score" if one["score"] < 0.5 else "max_per_image" for one in found[len(kept) :]]
        assert rejected[name]["reasons"] == reasons
        assert name not in {*accepted, *review_} - set(fate)
    assert min(len(accepted), len(review_)) > 0
    counts = place.manifest(1)["counts"]["new"]
    assert counts["accepted"] + counts["review"] + counts["rejected"] == 12


def test_a_manifest_with_more_lines_brings_what_they_name(place: Place) -> None:
    photos = place.root / "photos"
    photos.mkdir()
    lines = ["uri"]
    for number in range(4):
        (photos / f"{number}.jpg").write_bytes(place.jpeg(number))
        lines.append(str(photos / f"{number}.jpg"))
    manifest = place.root / "in" / "list.csv"
    manifest.write_text("\n".join(lines[:4]))
    assert place.label() == 0
    assert len(place.rows(1)) == 3
    (photos / "0.jpg").write_bytes(place.jpeg(40))
    # Which of its images changed nobody sees before the manifest does.
    assert place.label() == 0
    manifest.write_text("\n".join(lines))
    assert place.label() == 0
    assert place.manifest(2)["counts"]["new"]["images"] == 2
    assert place.manifest(2)["counts"]["new"]["replaced"] == 1
    assert len(place.rows(2)) == 4


def test_two_at_once_on_s3_publish_one_version(
    place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LabelConfig(
        input=f"{bucket.uri}/in",
        dataset=f"{bucket.uri}/set",
        model=str(place.model),
        policy=str(place.root / "policy.yaml"),
        chunk_size=2,
        endpoint_url=bucket.endpoint_url,
    )

    def put(shard: str, images: dict[str, int]) -> None:
        members = [(name, place.jpeg(seed)) for name, seed in images.items()]
        bucket.store("in").put(shard, place.make_tar(members))

    # Both have made all of it when the first one publishes.
    both, real = threading.Barrier(2), versions.publish

    def publish(dataset: Any, number: int, manifest: Any) -> bool:
        both.wait(60)
        return real(dataset, number, manifest)

    put("a.tar", {f"{n}.jpg": n for n in range(5)})
    dataset = bucket.store("set")
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(versions, "publish", publish)
        assert list(pool.map(labelling.label, [config] * 2, [dataset] * 2)).count(None) == 1
    assert versions.latest(dataset) == 1
    assert labelling.label(config, dataset) == 0
    put("a.tar", {**{f"{n}.jpg": n for n in range(5)}, "3.jpg": 30})
    put("b.tar", {"7.jpg": 7})
    assert labelling.label(config, dataset) == 0
    assert versions.latest(dataset) == 2
    counts = [versions.load(dataset, n).manifest["counts"]["new"]["images"] for n in (1, 2)]
    assert counts == [5, 2]
    found = training_set.load([f"{bucket.uri}/set"], bucket.endpoint_url)
    images = {row["image_id"]: row["data"] for row in training_set.rows(found.chunks)}
    assert images == {
        **{f"a.tar#{n}.jpg": place.jpeg(n) for n in (0, 1, 2, 4)},
        **{"a.tar#3.jpg": place.jpeg(30), "b.tar#7.jpg": place.jpeg(7)},
    }
