"""`segjobs label` on a local folder: what is new, versions, candidates, and who wins."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import versions
from jobs.__main__ import main
from jobs.storage import open_store
from segmodel.schema import TRAINING

pytestmark = pytest.mark.ray

# Of the tiny model's detections some are labels, some are to be looked at, the rest is rejected.
POLICY = "score_threshold: 0.0\nduplicate_iou: 0.9\nmax_per_image: 5\naudit_share: 0.5\n"


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
