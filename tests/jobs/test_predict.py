"""The batch job as a user runs it: the command line, a real Ray, a real S3 server, real readers."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from jobs import pipeline, processor
from jobs.__main__ import main
from jobs.storage import open_store
from segmodel import scenes
from segmodel.schema import PREDICTIONS, TRAINING

pytestmark = pytest.mark.ray

FORMATS = ("webdataset", "parquet", "images", "manifest")
DETECTIONS = 4


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    """Name to bytes: 18 scenes in several codecs and sizes, one upright only by its EXIF, three damaged."""
    files = {}
    for number in range(18):
        size_hw = [(96, 128), (128, 96), (100, 100)][number % 3]
        codec = ["JPEG", "PNG", "WEBP"][number % 3]
        picture = Image.fromarray(scenes.scene(number, size_hw).image)
        files[f"{number:02d} ü#.{codec.lower()}"] = _encoded(picture, codec)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.fromarray(scenes.scene(50, (60, 90)).image)
    files["turned.jpg"] = _encoded(picture, "JPEG", exif=turned)
    files["cut.jpg"] = files["00 ü#.jpeg"][:-900]
    files["nothing.png"] = b""
    files["page.jpg"] = b"<html>not an image</html>"
    return files


DAMAGED = {"cut.jpg": "truncated", "nothing.png": "empty", "page.jpg": "unknown_format"}


def _encoded(picture: Image.Image, codec: str, **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, codec, **options)
    return data.getvalue()


def _put_as_tars(root: str, endpoint: str | None, files: dict[str, bytes]) -> str:
    store = open_store(f"{root}/tars", endpoint)
    names = list(files)
    for shard, start in enumerate(range(0, len(names), 10)):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for name in names[start : start + 10]:
                for member_name, content in ((name, files[name]), (f"{name}.json", b"{}")):
                    member = tarfile.TarInfo(member_name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        store.put(f"deep/{shard}.tar", data.getvalue())
    return f"{root}/tars"


def _put_as_parquet(root: str, endpoint: str | None, files: dict[str, bytes]) -> str:
    rows = [{"image": {"bytes": data, "path": name}, "label": 1} for name, data in files.items()]
    schema = pa.schema([TRAINING.field("image"), pa.field("label", pa.int64())])
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), data, row_group_size=5)
    open_store(f"{root}/parquet", endpoint).put("part-0.parquet", data.getvalue())
    return f"{root}/parquet"


def _put_as_images(root: str, endpoint: str | None, files: dict[str, bytes]) -> str:
    store = open_store(f"{root}/images", endpoint)
    for number, (name, data) in enumerate(files.items()):
        store.put(f"{number % 3}/deep er/{name}", data)
    return f"{root}/images"


def _put_as_manifest(root: str, endpoint: str | None, files: dict[str, bytes]) -> str:
    _put_as_images(root, endpoint, files)
    lines = [
        json.dumps({"uri": f"{root}/images/{number % 3}/deep er/{name}"})
        for number, name in enumerate(files)
    ]
    store = open_store(f"{root}/manifests", endpoint)
    store.put("all.jsonl", "\n".join(lines).encode())
    return f"{root}/manifests/all.jsonl"


PUT: dict[str, Callable[[str, str | None, dict[str, bytes]], str]] = {
    "webdataset": _put_as_tars,
    "parquet": _put_as_parquet,
    "images": _put_as_images,
    "manifest": _put_as_manifest,
}


def predict(source: str, output: str, model: Path, *more: str) -> int:
    """Run the verb with few detections: random weights find as many as are allowed."""
    return main(
        [
            *("predict", "--input", source, "--output", output, "--model", str(model)),
            *("--score-threshold", "0", "--max-detections", str(DETECTIONS), "--chunk-size", "6"),
            *("--max-actors", "1", *more),
        ]
    )


def rows_of(output: str, endpoint: str | None = None) -> list[dict[str, Any]]:
    """Return all rows of a table, by name of the file that each image came from."""
    store = open_store(output, endpoint)
    tables = [
        pq.read_table(io.BytesIO(store.read(found.path)), page_checksum_verification=True)
        for found in store.list_objects("predictions")
    ]
    assert all(table.schema.equals(PREDICTIONS) for table in tables)
    return pa.concat_tables(table.replace_schema_metadata(None) for table in tables).to_pylist()


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    named = {row["key"].rpartition("/")[2]: row for row in rows}
    assert len(named) == len(rows)
    return named


def check_masks(row: dict[str, Any]) -> None:
    """The masks of a row decode to its size and agree with its boxes and areas."""
    size = [row["height"], row["width"]]
    for found in row["detections"]:
        rle = found["segmentation"]
        assert rle["size"] == size
        mask = coco_mask.frPyObjects([rle], *size) if isinstance(rle["counts"], list) else rle
        pixels = np.asarray(coco_mask.area(mask))
        assert found["area"] == pixels
        x, y, width, height = found["bbox"]
        assert 0 <= x <= x + width <= size[1] + 1e-3
        assert 0 <= y <= y + height <= size[0] + 1e-3
        if pixels:
            mask_x, mask_y, mask_w, mask_h = coco_mask.toBbox(mask)
            # A mask is pasted over its box, which the paste widens to whole pixels and by one cell.
            assert mask_x >= x - 1 - width / 28
            assert mask_y >= y - 1 - height / 28
            assert mask_x + mask_w <= x + width + 2 + width / 28
            assert mask_y + mask_h <= y + height + 2 + height / 28


@pytest.fixture(scope="module")
def outputs(ray_local: Any, s3: Any, tiny_bundle: Path, photos: dict[str, bytes]) -> dict[str, str]:
    """The same photos, predicted from S3 to S3 in each of the four formats."""
    root = s3.new_bucket()
    made = {}
    for format_ in FORMATS:
        source = PUT[format_](root, s3.endpoint_url, photos)
        made[format_] = f"{root}/out-{format_}"
        code = predict(source, made[format_], tiny_bundle, "--endpoint-url", s3.endpoint_url)
        assert code == 0
    return made


@pytest.mark.parametrize("format_", FORMATS)
def test_every_image_has_one_row_that_says_what_became_of_it(
    format_: str, outputs: dict[str, str], s3: Any, photos: dict[str, bytes]
) -> None:
    rows = rows_of(outputs[format_], s3.endpoint_url)
    assert len({row["image_id"] for row in rows}) == len(rows) == len(photos)
    named = by_name(rows)
    assert named.keys() == photos.keys()
    for name, row in named.items():
        assert row["image_id"] == f"{row['shard']}#{row['key']}"
        if name in DAMAGED:
            assert row["status"] == "error"
            assert row["error"].startswith(f"{DAMAGED[name]}: ")
            assert row["height"] is row["width"] is None
            assert row["detections"] == []
        else:
            assert (row["status"], row["error"]) == ("ok", None)
            assert len(row["detections"]) == DETECTIONS
            check_masks(row)
    assert (named["turned.jpg"]["height"], named["turned.jpg"]["width"]) == (90, 60)


def test_all_formats_give_the_same_detections(outputs: dict[str, str], s3: Any) -> None:
    first, *others = (by_name(rows_of(outputs[format_], s3.endpoint_url)) for format_ in FORMATS)
    assert any(row["detections"] for row in first.values())
    for other in others:
        for name, row in first.items():
            assert other[name]["detections"] == row["detections"]


def test_marks_and_manifest_say_what_was_done(
    outputs: dict[str, str], s3: Any, photos: dict[str, bytes]
) -> None:
    store = open_store(outputs["webdataset"], s3.endpoint_url)
    manifest = json.loads(store.read("_manifest.json"))
    assert manifest["counts"]["images"] == len(photos)
    assert manifest["categories"] == [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    assert manifest["counts"]["errors"] == {"truncated": 1, "empty": 1, "unknown_format": 1}
    assert manifest["counts"]["detections"] == DETECTIONS * (len(photos) - 3)
    assert manifest["job"]["max_detections"] == DETECTIONS
    assert manifest["run"]["images_per_second"] > 0
    # So few chunks have no steady state.
    assert manifest["run"]["busy"].keys() == {"read", "decode", "network", "encode", "write"}
    assert manifest["run"]["busy"]["network"] > 0
    assert manifest["run"]["busy_with_start"] is True
    assert manifest["versions"].keys() >= {"ray", "torch", "torchvision", "segjobs"}
    assert store.read("_SUCCESS") == b""


def test_footers_carry_version_digest_and_run(outputs: dict[str, str], s3: Any) -> None:
    store = open_store(outputs["images"], s3.endpoint_url)
    manifest = json.loads(store.read("_manifest.json"))
    for found in store.list_objects("predictions"):
        footer = pq.read_metadata(io.BytesIO(store.read(found.path))).metadata
        assert footer[b"segjobs.schema_version"] == b"1"
        assert footer[b"segjobs.model_digest"].decode() == manifest["job"]["model_digest"]
        assert footer[b"segjobs.run_id"].decode() == manifest["run"]["run_id"]


@pytest.fixture(scope="module")
def local_table(
    tmp_path_factory: pytest.TempPathFactory,
    ray_local: Any,
    tiny_bundle: Path,
    photos: dict[str, bytes],
) -> Path:
    """The photos as local tars (with a category id gap in the model) and their finished table."""
    root = tmp_path_factory.mktemp("local")
    source = _put_as_tars(str(root), None, photos)
    assert predict(source, str(root / "out"), tiny_bundle) == 0
    return root


def test_duckdb_opens_the_table(local_table: Path, photos: dict[str, bytes]) -> None:
    files = f"{local_table}/out/predictions/*.parquet"
    with duckdb.connect() as connection:
        counts = connection.sql(
            f"select status, count(*) from '{files}' group by status order by status"
        ).fetchall()
        areas = connection.sql(
            f"select d.category_id, d.segmentation.counts, d.area "
            f"from (select unnest(detections) as d from '{files}')"
        ).fetchall()
    assert counts == [("error", 3), ("ok", len(photos) - 3)]
    assert len(areas) == DETECTIONS * (len(photos) - 3)
    assert {category_id for category_id, _, _ in areas} <= {1, 3}


def test_pandas_opens_the_table(local_table: Path, photos: dict[str, bytes]) -> None:
    frame = pd.read_parquet(local_table / "out" / "predictions")
    assert len(frame) == len(photos)
    assert frame.loc[frame.status == "ok", "detections"].map(len).eq(DETECTIONS).all()


def test_datasets_opens_the_table(
    local_table: Path, photos: dict[str, bytes], tmp_path: Path
) -> None:
    found = datasets.load_dataset(
        "parquet",
        data_files=f"{local_table}/out/predictions/*.parquet",
        split="train",
        cache_dir=str(tmp_path),
    )
    assert len(found) == len(photos)
    assert set(found.column_names) == set(PREDICTIONS.names)


def test_pycocotools_opens_the_detections(local_table: Path) -> None:
    rows = rows_of(str(local_table / "out"))
    rles = [found["segmentation"] for row in rows for found in row["detections"]]
    for row in rows:
        check_masks(row)
    assert len(coco_mask.area(rles)) == len(rles) > 0


def test_a_rerun_of_a_finished_job_does_nothing_and_says_so(
    local_table: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (local_table / "out").rglob("*") if p.is_file()}
    assert predict(f"{local_table}/tars", f"{local_table}/out", tiny_bundle) == 0
    assert "nothing to do" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (local_table / "out").rglob("*") if p.is_file()}
    assert after == before


def test_objects_of_another_job_are_refused(
    local_table: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(local_table / "out" / "predictions", tmp_path / "out" / "predictions")
    assert predict(f"{local_table}/tars", f"{tmp_path}/out", tiny_bundle) == 2
    assert "not of this job's plan, such as 00000000.parquet" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "out" / "_plan.json").exists()


def test_a_chunk_that_is_gone_at_the_end_is_missed(
    ray_local: Any,
    local_table: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = pipeline.run

    def then_removed(*arguments: Any) -> Iterator[Any]:
        yield from run(*arguments)
        next((tmp_path / "out" / "predictions").glob("[0-9]*.parquet")).unlink()

    monkeypatch.setattr(pipeline, "run", then_removed)
    job = (f"{local_table}/tars", f"{tmp_path}/out", tiny_bundle)
    assert predict(*job) == 1
    assert "1 chunks of" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    monkeypatch.undo()
    assert predict(*job) == 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--score-threshold", "0.5"), "score_threshold was 0.0 and is now 0.5"),
        (("--decode", "reduced"), "decode was None and is now 'reduced'"),
        (("--compile",), "compile was None and is now True"),
        (("--tasks", "boxes"), "tasks was 'masks' and is now 'boxes'"),
        (("--chunk-size", "7"), "chunk_size was 6 and is now 7"),
        (("--limit", "3"), "limit was None and is now 3"),
    ],
)
def test_another_configuration_is_refused_with_the_difference(
    local_table: Path,
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    named: str,
) -> None:
    assert predict(f"{local_table}/tars", f"{local_table}/out", tiny_bundle, *more) == 1
    error = capsys.readouterr().err
    assert named in error
    assert "another --output" in error


def test_another_model_is_refused(
    local_table: Path, other_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(f"{local_table}/tars", f"{local_table}/out", other_bundle) == 1
    assert "model_digest was" in capsys.readouterr().err


def test_a_changed_input_is_refused_and_a_frozen_plan_goes_on(
    tmp_path: Path,
    ray_local: Any,
    tiny_bundle: Path,
    photos: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = dict(list(photos.items())[:4])
    source, output = _put_as_images(str(tmp_path), None, few), str(tmp_path / "out")
    assert predict(source, output, tiny_bundle) == 0
    (tmp_path / "images" / "0" / "late.jpg").write_bytes(few["00 ü#.jpeg"])
    assert predict(source, output, tiny_bundle) == 1
    error = capsys.readouterr().err
    assert "1 added (0/late.jpg)" in error
    assert "--frozen-plan" in error

    # What was finished is taken away, so that there is work left; one of its images has changed.
    next((tmp_path / "out" / "predictions").iterdir()).unlink()
    changed = tmp_path / "images" / "0" / "deep er" / "00 ü#.jpeg"
    changed.write_bytes(few["03 ü#.jpeg"])
    assert predict(source, output, tiny_bundle, "--frozen-plan") == 0
    named = by_name(rows_of(output))
    assert named.keys() == few.keys()
    assert named["00 ü#.jpeg"]["error"].startswith("changed: ")
    assert named["03 ü#.jpeg"]["status"] == "ok"


def test_a_failing_task_is_named_without_ray_around_it(
    tmp_path: Path,
    ray_local: Any,
    tiny_bundle: Path,
    photos: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = dict(list(photos.items())[:2])
    source, output = _put_as_images(str(tmp_path), None, few), str(tmp_path / "out")
    assert predict(source, output, tiny_bundle) == 0
    for path in [
        *(tmp_path / "out").rglob("list-*.parquet"),
        *(tmp_path / "out/predictions").iterdir(),
    ]:
        path.unlink()
    assert predict(source, output, tiny_bundle) == 1
    error = capsys.readouterr().err
    assert "list-00000.parquet does not exist: the plan is damaged" in error
    assert "Traceback" not in error


def test_retry_errors_redoes_only_rows_in_error(
    tmp_path: Path,
    ray_local: Any,
    tiny_bundle: Path,
    photos: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = _put_as_images(str(tmp_path), None, photos), str(tmp_path / "out")
    assert predict(source, output, tiny_bundle, "--fail-on-error") == 3
    before = by_name(rows_of(output))
    repaired = next((tmp_path / "images").rglob("cut.jpg"))
    repaired.write_bytes(photos["00 ü#.jpeg"])
    capsys.readouterr()

    assert predict(source, output, tiny_bundle, "--retry-errors") == 0
    assert "3 images in" in capsys.readouterr().out
    after = by_name(rows_of(output))
    assert after["cut.jpg"]["status"] == "ok"
    assert after["cut.jpg"]["detections"] == before["00 ü#.jpeg"]["detections"]
    assert {name for name in after if after[name] != before[name]} == {"cut.jpg"}
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["counts"]["errors"] == {"empty": 1, "unknown_format": 1}
    assert manifest["counts"]["images"] == len(photos)


def test_boxes_only_and_limit(
    tmp_path: Path, local_table: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "boxes")
    assert (
        predict(f"{local_table}/tars", output, tiny_bundle, "--tasks", "boxes", "--limit", "8") == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "start-up included (too few chunks for a steady state)" in said
    rows = rows_of(output)
    full = by_name(rows_of(f"{local_table}/out"))
    assert len(rows) == 8
    for row in rows:
        assert [found["bbox"] for found in row["detections"]] == [
            found["bbox"] for found in full[row["key"]]["detections"]
        ]
        assert all(found["segmentation"] is found["area"] is None for found in row["detections"])


def test_images_in_which_nothing_is_found_have_an_empty_list(
    tmp_path: Path, local_table: Path, tiny_bundle: Path
) -> None:
    output = str(tmp_path / "none")
    more = ("--score-threshold", "0.999", "--limit", "3")
    assert predict(f"{local_table}/tars", output, tiny_bundle, *more) == 0
    assert [(row["status"], row["detections"]) for row in rows_of(output)] == [("ok", [])] * 3


def test_plan_only_writes_nothing(
    tmp_path: Path, local_table: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "planned"
    assert predict(f"{local_table}/tars", str(output), tiny_bundle, "--plan-only") == 0
    said = capsys.readouterr().out
    assert "22" in said
    assert "3 objects (webdataset)" in said
    assert not output.exists()


def test_a_plan_says_where_an_arithmetic_is_only_imitated(
    tmp_path: Path,
    local_table: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for has_bf16 in (False, True):
        monkeypatch.setattr(processor, "cpu_has_bf16", lambda has=has_bf16: has)
        more = ("--plan-only", "--precision", "bf16")
        assert predict(f"{local_table}/tars", str(tmp_path / "out"), tiny_bundle, *more) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("bf16, which this processor only imitates: fp32-fast" in said) is not has_bf16
        assert "bf16" in said


def test_an_output_within_the_input_is_refused(
    local_table: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(f"{local_table}/tars", f"{local_table}/tars/out", tiny_bundle) == 2
    assert "lies within --input" in capsys.readouterr().err


def test_the_same_input_spelled_otherwise_is_the_same_job(
    local_table: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(local_table)
    assert predict("./tars/", "out", tiny_bundle) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert predict("./tars", "tars/out", tiny_bundle) == 2
    assert "lies within --input" in capsys.readouterr().err


def test_packed_shards_that_share_an_image_id_are_refused(
    tmp_path: Path, ray_local: Any, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"shard": "t", "key": "a", "image_id": "t#a", "image": {"bytes": b"x", "path": "a"}}
    columns = [TRAINING.field(name) for name in ("image_id", "shard", "key", "image")]
    (tmp_path / "in").mkdir()
    for number in range(2):
        table = pa.Table.from_pylist([row], pa.schema(columns))
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    assert predict(str(tmp_path / "in"), str(tmp_path / "out"), tiny_bundle) == 1
    assert "1 image ids are in more than one shard" in capsys.readouterr().err


def test_more_gpus_than_there_are_is_refused(
    local_table: Path, tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--gpus-per-actor", "0.5")
    assert predict(f"{local_table}/tars", str(tmp_path / "out"), tiny_bundle, *more) == 2
    assert "2 CPUs and 0 GPUs, room for 0" in capsys.readouterr().err


def test_status_of_a_finished_and_of_an_unfinished_job(
    local_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", f"{local_table}/out"]) == 0
    said = capsys.readouterr().out
    assert "22 images in 5 chunks" in said
    assert "3 images (done, with an error in their row)" in said
    assert "finished: _SUCCESS is there" in said

    store, half = open_store(f"{local_table}/out"), open_store(str(tmp_path / "half"))
    for found in list(store.list_objects()):
        if found.path not in ("_SUCCESS", "_manifest.json", "predictions/00000000.parquet"):
            half.put(found.path, store.read(found.path))
    assert main(["status", str(tmp_path / "half")]) == 0
    said = capsys.readouterr().out
    assert "6 images in 1 chunks" in said
    assert "under way" in said

    assert main(["status", str(tmp_path / "nothing")]) == 1
    assert "there is no plan" in capsys.readouterr().err
