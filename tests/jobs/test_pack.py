"""Images packed into shards: nothing lost, opened by `datasets`, predicted under the same ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from segmodel.schema import TRAINING

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def packed(
    ray_local: None, tmp_path_factory: pytest.TempPathFactory, jpeg: Callable[..., bytes]
) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("pack")
    files = {f"{number}.jpg": jpeg(number, (20 + number, 30)) for number in range(7)}
    files["bad.jpg"] = b"not an image"
    (root / "images" / "sub").mkdir(parents=True)
    for name, data in files.items():
        (root / "images" / "sub" / name).write_bytes(data)
    assert pack(root) == 0
    return root, files


def pack(root: Path, *more: str) -> int:
    source, output = str(root / "images"), str(root / "packed")
    return main(["pack", "--images", source, "--output", output, "--shard-size", "3", *more])


def test_every_image_is_there_byte_for_byte(packed: tuple[Path, dict[str, bytes]]) -> None:
    root, files = packed
    shards = sorted((root / "packed" / "shards").iterdir())
    assert len(shards) == 3
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert all(pq.read_schema(shard).equals(TRAINING) for shard in shards)
    manifest = json.loads((root / "packed" / "_manifest.json").read_text())
    assert manifest["categories"] == []
    assert manifest["counts"]["without_detections"] == 7
    good = {row["key"]: row["image"]["bytes"] for row in rows if row["status"] == "ok"}
    assert good == {name: data for name, data in files.items() if name != "bad.jpg"}
    assert {row["key"]: row["height"] for row in rows if row["status"] == "ok"} == {
        f"{number}.jpg": 20 + number for number in range(7)
    }
    (bad,) = (row for row in rows if row["status"] == "error")
    assert (bad["key"], bad["error"].partition(":")[0]) == ("bad.jpg", "unknown_format")
    assert bad["image"] is None
    assert (root / "packed" / "_SUCCESS").exists()


def test_an_image_that_is_cut_off_is_a_row_in_error(
    ray_local: None, tmp_path: Path, jpeg: Callable[..., bytes]
) -> None:
    (tmp_path / "images").mkdir()
    # Its header is good: a look at that alone would not tell.
    (tmp_path / "images" / "cut.jpg").write_bytes(jpeg(1, (200, 300))[:-1500])
    assert pack(tmp_path) == 0
    (row,) = pq.read_table(tmp_path / "packed" / "shards").to_pylist()
    assert (row["status"], row["image"], row["height"]) == ("error", None, None)
    assert row["error"].startswith("truncated: ")


def test_datasets_decodes_the_images(packed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    root, _ = packed
    found = datasets.load_dataset(
        "parquet",
        data_files=f"{root}/packed/shards/*.parquet",
        split="train",
        cache_dir=str(tmp_path),
    )
    assert isinstance(found.features["image"], datasets.Image)
    images = {row["key"]: row["image"] for row in found}
    assert images["3.jpg"].size == (30, 23)
    assert images["bad.jpg"] is None


def test_a_second_run_does_only_what_is_missing(packed: tuple[Path, dict[str, bytes]]) -> None:
    root, _ = packed
    shards = sorted((root / "packed" / "shards").iterdir())
    before = {shard.name: shard.read_bytes() for shard in shards}
    times = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    shards[1].unlink()
    assert pack(root) == 0
    after = sorted((root / "packed" / "shards").iterdir())
    assert {shard.name: shard.read_bytes() for shard in after} == before
    unchanged = [shard.name for shard in after if shard.stat().st_mtime_ns == times[shard.name]]
    assert unchanged == [shards[0].name, shards[2].name]


def test_another_cut_is_refused(
    packed: tuple[Path, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = packed
    assert pack(root, "--shard-size", "4") == 1
    assert "shard_size was 3 and is now 4" in capsys.readouterr().err


def test_predictions_on_packed_shards_keep_the_ids(
    packed: tuple[Path, dict[str, bytes]], tiny_bundle: Path, tmp_path: Path
) -> None:
    root, files = packed
    arguments: list[Any] = [
        "predict",
        "--input",
        root / "packed" / "shards",
        "--model",
        tiny_bundle,
    ]
    arguments += ["--output", tmp_path / "out", "--max-detections", "2", "--max-actors", "1"]
    assert main([str(argument) for argument in arguments]) == 0
    rows = pq.read_table(tmp_path / "out" / "predictions").to_pylist()
    assert {row["image_id"] for row in rows} == {f"sub#{name}" for name in files}

    again = ["pack", "--images", root / "packed", "--predictions", tmp_path / "out"]
    again += ["--output", tmp_path / "labels", "--shard-size", "5"]
    assert main([str(argument) for argument in again]) == 0
    labels = pq.read_table(tmp_path / "labels" / "shards").to_pylist()
    images = {row["key"]: row.pop("image") for row in labels}
    assert labels == rows
    assert images.pop("bad.jpg") is None
    assert {key: image["bytes"] for key, image in images.items()} == {
        name: data for name, data in files.items() if name != "bad.jpg"
    }
