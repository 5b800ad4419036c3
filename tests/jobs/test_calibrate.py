"""What a job takes, told by `--plan-only`: by images that are really run, or by a rate that is given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from jobs import calibrate
from jobs.__main__ import main
from jobs.actor import Model, Pool
from jobs.chunks import Chunk, to_table
from jobs.plan import Plan, PlanError
from jobs.read import Source
from jobs.sizing import JOB_SHARE, START_S
from jobs.storage import open_store

pytestmark = pytest.mark.ray

IMAGES = 12


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    make_tar: Callable[..., bytes],
    jpeg: Callable[..., bytes],
) -> Path:
    """Two tars of six images each, of which one is none."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        members = [(f"{n}.jpg", jpeg(10 * shard + n, (48, 64))) for n in range(IMAGES // 2)]
        if shard == 1:
            members[0] = ("0.jpg", b"no image")
        (folder / f"{shard}.tar").write_bytes(make_tar(members))
    return folder


@pytest.fixture
def told(
    ray_local: None, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """`told(source, output, *flags)`: the estimate as JSON, and what was printed."""

    def run(source: Path, output: Path, *flags: str) -> tuple[dict[str, Any], str]:
        file = tmp_path / "estimate.json"
        arguments = [
            *("predict", "--input", str(source), "--output", str(output)),
            *("--model", str(tiny_bundle), "--score-threshold", "0", "--max-detections", "3"),
            *("--chunk-size", "3", "--max-actors", "2", "--plan-only"),
            *("--estimate-output", str(file), *flags),
        ]
        assert main(arguments) == 0
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_images_are_run_and_nothing_is_written(
    told: Callable[..., tuple[dict[str, Any], str]], shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    found, said = told(shards, output, "--calibrate", "8", "--price-per-gpu-hour", "2")
    assert not output.exists()
    assert "8 images, run by one actor" in found["source"]
    assert (found["images"], found["actors"], found["gpus"]) == (IMAGES, 2, 0)
    assert found["images_per_second"] > 0
    assert found["seconds"] == pytest.approx(START_S + IMAGES / found["images_per_second"])
    assert (found["gpu_hours"], found["cost"]) == (0, 0)
    assert found["input_bytes"] == pytest.approx(
        sum(file.stat().st_size for file in shards.iterdir()), rel=0.7
    )
    # Three masks an image, and three detections' probabilities in the store.
    assert 100 < found["output_bytes"] / IMAGES < 20_000
    assert found["store_bytes"] / IMAGES > 3 * 28 * 28 * 4
    assert found["encode_cpus"] > 0
    assert "What it takes" in said
    assert "throughput" in said


def test_loose_images_are_run_too(
    told: Callable[..., tuple[dict[str, Any], str]], tmp_path: Path, jpeg: Callable[..., bytes]
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, (48, 64)))
    found, _ = told(folder, output, "--calibrate", "100")
    assert not output.exists()
    assert "4 images, run by one actor" in found["source"]


def test_a_rate_that_is_given_and_what_is_left(
    told: Callable[..., tuple[dict[str, Any], str]], shards: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    output = tmp_path / "out"
    found, said = told(shards, output, "--images-per-second", "50")
    assert found["images_per_second"] == 50 * 2 * JOB_SHARE
    assert found["source"] == "50 images/s of one actor, as given"
    assert found["output_bytes"] is None
    assert "about 1 min 00 s" in said
    job = [
        *("predict", "--input", str(shards), "--output", str(output), "--chunk-size", "3"),
        *("--model", str(tiny_bundle), "--score-threshold", "0", "--max-detections", "3"),
    ]
    assert main([*job, "--max-actors", "1"]) == 0
    manifest = json.loads((output / "_manifest.json").read_text())
    found, _ = told(shards, tmp_path / "other", "--like", str(output))
    # Twice as many actors.
    expected = 2 * IMAGES / manifest["run"]["seconds"]
    assert found["images_per_second"] == pytest.approx(expected, rel=1e-6)
    assert found["output_bytes"] == sum(p.stat().st_size for p in output.glob("predictions/*"))
    assert f"{output}: {IMAGES} images in" in found["source"]
    (output / "predictions" / "00000002.parquet").unlink()
    found, _ = told(shards, output)
    assert (found["images"], found["actors"], found["seconds"]) == (3, 1, None)


def test_a_damaged_shard_has_no_image_to_run(tmp_path: Path) -> None:
    verdict = Chunk(
        chunk_id="00000000", kind="verdict", shard="0.tar", num_images=1, error="shard: cut off"
    )
    planned = Plan(
        plan_id="1",
        job={},
        folder=str(tmp_path),
        format="webdataset",
        why="",
        num_images=1,
        num_bytes=0,
        num_objects=1,
        input_digest="",
        notes=(),
        chunks=to_table([verdict]),
    )
    store = open_store(str(tmp_path))
    source = Source(store=store, lists=store, endpoint_url=None, image_column=None)
    with pytest.raises(PlanError, match="none of the images that were to be run can be read"):
        calibrate.rates(planned, 1, source, cast("Model", None), cast("Pool", None))
