"""`evaluate` gives the numbers of pycocotools, from any store, in one process and in Ray tasks."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jobs import comparison
from jobs.__main__ import main
from jobs.storage import open_store
from jobs.store import Store
from segmodel import coco
from segmodel.schema import PREDICTIONS, TRAINING

DATA = Path(__file__).parents[3] / "shared" / "data"
SIZE = HEIGHT, WIDTH = 90, 120
CATEGORIES = {1: "cat", 2: "dog [big]", 9: "cow"}
Row = dict[str, Any]


def instance(category: int, bbox: np.ndarray, **of: Any) -> Row:
    x, y, w, h = bbox
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    inside = ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2 <= 0.25
    rle = coco_mask.encode(np.asfortranarray(inside, np.uint8))
    made = {"category_id": category, "category": CATEGORIES[category], "score": None}
    made |= {"bbox": [float(v) for v in bbox], "area": float(coco_mask.area(rle)), "iscrowd": 0}
    mask = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    return made | {"segmentation": mask} | of


def some_images(seed: int, num: int) -> tuple[Row, list[Row]]:
    """A COCO file with crowds and odd areas, and predictions with ties, doubles and misses."""
    rng = np.random.default_rng(seed)
    images, annotations, predictions = [], [], []
    numbers = rng.permutation(num).tolist()
    for i in range(num):
        name = f"set/{i:03}.jpg"
        images.append({"id": numbers[i], "file_name": name, "height": HEIGHT, "width": WIDTH})
        found = []
        for _ in range(rng.integers(0, 7)):
            w, h = rng.uniform(5, 60, 2)
            bbox = np.array([rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h])
            category = int(rng.choice([1, 2, 9]))
            one = instance(category, bbox, iscrowd=int(rng.random() < 0.15))
            one["area"] += 0.1
            annotations.append(one | {"id": len(annotations) + 1, "image_id": numbers[i]})
            for _ in range(rng.integers(0, 3)):
                moved = np.round(bbox + rng.normal(0, 2, 4)).clip([0, 0, 2, 2])
                other = int(rng.choice([1, 2, 9])) if rng.random() < 0.2 else category
                found.append(instance(other, moved, score=int(rng.integers(1, 9)) / 8))
        predictions.append(prediction(name, found))
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, predictions


def prediction(name: str, found: list[Row], **of: Any) -> Row:
    shard, key = name.split("/")
    row = {"image_id": f"{shard}#{key}", "shard": shard, "key": key}
    row |= {"height": HEIGHT, "width": WIDTH, "status": "ok", "error": None}
    return row | {"detections": found} | of


def put_rows(
    store: Store, path: str, rows: list[Row], schema: pa.Schema = PREDICTIONS, group: int = 3
) -> None:
    data = io.BytesIO()
    footer = {**(schema.metadata or {}), "segjobs.model_digest": "abc"}
    table = pa.Table.from_pylist(rows, schema).replace_schema_metadata(footer)
    pq.write_table(table, data, row_group_size=group, write_page_checksum=True)
    store.put(path, data.getvalue())


def put_predictions(store: Store, rows: list[Row], per_object: int = 5) -> None:
    for start in range(0, len(rows), per_object):
        put_rows(store, f"predictions/{start:08}.parquet", rows[start : start + per_object])


def stock(file: Row, predictions: list[Row], kind: str) -> list[float]:
    """The twelve numbers of pycocotools."""
    results = coco.results(predictions, coco.image_ids(file))
    unused = {"bbox": "segmentation", "segm": "bbox"}[kind]
    results = [{k: v for k, v in result.items() if k != unused} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(file)
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    numbers: list[float] = run.stats.tolist()
    return numbers


def assert_stock(metrics: Row, file: Row, predictions: list[Row]) -> None:
    stored = pa.Table.from_pylist(predictions, PREDICTIONS).to_pylist()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        ours = list(metrics[name].values())[:12]
        assert ours == pytest.approx(stock(file, stored, kind), rel=0, abs=1e-9)


def run(folder: Path, *more: str) -> Row:
    """Evaluate what lies in a folder, and return what is in metrics.json."""
    arguments = [
        "--predictions",
        str(folder / "table"),
        "--annotations",
        str(folder / "truth.json"),
    ]
    assert main(["evaluate", *arguments, "--output", str(folder / "out"), *more]) == 0
    metrics: Row = json.loads((folder / "out" / "metrics.json").read_text())
    return metrics


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Row, list[Row]]:
    """A folder with `truth.json` and `table`, and what they are."""
    file, predictions = some_images(0, 17)
    (tmp_path / "truth.json").write_text(json.dumps(file))
    put_predictions(open_store(str(tmp_path / "table")), predictions)
    return tmp_path, file, predictions


@pytest.mark.parametrize("seed", range(3))
def test_numbers_and_plots_are_put_into_the_store(
    seed: int, bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file, predictions = some_images(seed, 23)
    store = bucket.store()
    store.put("truth.json", json.dumps(file).encode())
    put_predictions(bucket.store("table"), predictions)
    places = [f"--predictions={bucket.uri}/table", f"--annotations={bucket.uri}/truth.json"]
    places += [f"--output={bucket.uri}/out/a", f"--endpoint-url={bucket.endpoint_url}"]
    assert main(["evaluate", *places]) == 0
    said = capsys.readouterr().out
    metrics = json.loads(store.read("out/a/metrics.json"))
    assert_stock(metrics, file, predictions)
    assert 0 < metrics["mask"]["AP"] < 1
    for name in metrics["box"]["per_category"]:
        assert name in said
    assert f"{metrics['mask']['AP']:.4f}" in said
    assert metrics["predictions"]["model_digests"] == ["abc"]
    assert metrics["annotations"]["uri"] == f"{bucket.uri}/truth.json"
    assert metrics["paired"]["by"] == {"path": 23}
    for name in ("precision_recall", "confusion"):
        with Image.open(io.BytesIO(store.read(f"out/a/{name}.png"))) as image:
            assert min(image.size) > 300


def test_categories_and_confusion_stand_in_the_metrics(
    made: tuple[Path, Row, list[Row]],
) -> None:
    folder, file, predictions = made
    metrics = run(folder, "--score-threshold", "0.75")
    confusion = metrics["confusion"]
    assert (confusion["score_threshold"], confusion["iou_threshold"]) == (0.75, 0.5)
    counting = [a for a in file["annotations"] if not a["iscrowd"]]
    for number, name in CATEGORIES.items():
        of_truth = [one["count"] for one in confusion["counts"] if one["truth"] == name]
        expected = sum(a["category_id"] == number for a in counting)
        assert sum(of_truth) == metrics["box"]["per_category"][name]["num_truth"] == expected
    found = [d for row in predictions for d in row["detections"] if d["score"] >= 0.75]
    crowds = len(found) - sum(c["count"] for c in confusion["counts"] if c["predicted"])
    assert 0 <= crowds < 5
    assert metrics["num_predictions"] == sum(len(row["detections"]) for row in predictions)
    assert run(folder, "--score-threshold", "0.75") == metrics


@pytest.mark.ray
def test_ray_tasks_give_the_same(
    made: tuple[Path, Row, list[Row]], ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file, predictions = made
    alone = run(folder)
    monkeypatch.setattr(comparison, "BYTES_WITHOUT_RAY", 0)
    monkeypatch.setattr(comparison, "IMAGES_PER_PART", 4)
    monkeypatch.setattr(comparison, "PARTS_PER_CPU", 1)
    assert run(folder) == alone
    assert_stock(alone, file, predictions)
    broken = folder / "table" / "predictions" / "00000005.parquet"
    data = bytearray(broken.read_bytes())
    data[200] ^= 255
    broken.write_bytes(data)
    assert main(_arguments(folder)) == 1


@pytest.mark.ray
def test_what_predict_writes_is_evaluated(
    tmp_path: Path, ray_local: None, tiny_bundle: Path, jpeg: Callable[..., bytes], make_tar: Any
) -> None:
    file, _ = some_images(1, 5)
    file["categories"] = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    for number, annotation in enumerate(file["annotations"]):
        annotation["category_id"] = 1 + 2 * (number % 2)
    names = [image["file_name"] for image in file["images"]]
    (tmp_path / "in").mkdir()
    members = [(name, jpeg(n, SIZE)) for n, name in enumerate(names)]
    (tmp_path / "in" / "0.tar").write_bytes(make_tar(members))
    (tmp_path / "truth.json").write_text(json.dumps(file))
    job = ["predict", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "table")]
    job += ["--model", str(tiny_bundle), "--score-threshold", "0", "--max-detections", "8"]
    assert main(job) == 0
    metrics = run(tmp_path)
    assert metrics["paired"] == {
        "by": {"path in the shard": 5},
        "missing": 0,
        "of_other_images": 0,
        "of_damaged_shards": 0,
    }
    rows = pq.read_table(tmp_path / "table" / "predictions").to_pylist()
    assert metrics["num_predictions"] == sum(len(row["detections"]) for row in rows) > 0
    by_name = [{**row, "image_id": row["key"].replace("/", "#")} for row in rows]
    assert_stock(metrics, file, by_name)


def _arguments(folder: Path, *more: str) -> list[str]:
    table, truth = str(folder / "table"), str(folder / "truth.json")
    return ["evaluate", "--predictions", table, "--annotations", truth, *more]


@pytest.mark.parametrize("images_per_part", [2, 1000])
def test_a_packed_set_is_truth_whatever_its_order(
    made: tuple[Path, Row, list[Row]], monkeypatch: pytest.MonkeyPatch, images_per_part: int
) -> None:
    folder, file, predictions = made
    # As a table holds them: with the ids in the order of names, by which images go without COCO's.
    for number, image in enumerate(file["images"], start=100):
        for annotation in file["annotations"]:
            if annotation["image_id"] == image["id"] and "moved" not in annotation:
                annotation.update(image_id=number, moved=True)
        image["id"] = number
    rows = pa.Table.from_pylist(list(coco.rows(file)), PREDICTIONS).to_pylist()
    stored = {row["image_id"]: row["detections"] for row in rows}
    exact = {number: name for name, number in coco.image_ids(file).items()}
    for image in file["images"]:
        theirs = [a for a in file["annotations"] if a["image_id"] == image["id"]]
        for annotation, item in zip(theirs, stored[exact[image["id"]]], strict=True):
            annotation.update(bbox=item["bbox"], area=item["area"])
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    packed = [rows[n] | {"image": {"bytes": b"?" * 5000, "path": None}} for n in order]
    store = open_store(str(folder / "packed"))
    for start in range(0, len(packed), 7):
        put_rows(store, f"shards/{start:04}.parquet", packed[start : start + 7], TRAINING)
    monkeypatch.setattr(comparison, "IMAGES_PER_PART", images_per_part)
    metrics = run(folder, "--annotations", str(folder / "packed"))
    assert metrics["annotations"]["kind"] == "table"
    assert metrics["paired"]["by"] == {"image_id": 17}
    assert_stock(metrics, file, predictions)


def test_what_is_missing_or_in_error_counts_as_nothing_found(
    made: tuple[Path, Row, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, predictions = made
    failed = {"status": "error", "error": "corrupt: no", "height": None, "width": None}
    rows = [row | failed | {"detections": []} for row in predictions[:2]] + predictions[2:14]
    rows.append(prediction("x.tar/", [], **failed))
    for old in (folder / "table" / "predictions").iterdir():
        old.unlink()
    put_predictions(open_store(str(folder / "table")), rows)
    metrics = run(folder)
    assert_stock(metrics, file, predictions[2:14])
    assert (metrics["num_missing"], metrics["num_errors"]) == (3, 2)
    said = capsys.readouterr().out
    assert "3 images have no prediction and count as nothing found" in said
    assert "2 images: nothing found" in said
    assert "1 rows are left out: they stand for damaged shards" in said


def test_predictions_of_other_images_need_subset(
    made: tuple[Path, Row, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, predictions = made
    kept = {image["id"] for image in file["images"][:9]}
    file["images"] = file["images"][:9]
    file["annotations"] = [a for a in file["annotations"] if a["image_id"] in kept]
    (folder / "truth.json").write_text(json.dumps(file))
    assert main(_arguments(folder)) == 1
    assert "8 of 17 predictions" in (said := capsys.readouterr().err)
    assert "'set#009.jpg'" in said
    assert_stock(run(folder, "--subset"), file, predictions[:9])
    assert "8 predictions are left out" in capsys.readouterr().out


def test_boxes_alone_and_one_loose_object(
    made: tuple[Path, Row, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, predictions = made
    bare = copy.deepcopy(predictions)
    for row in bare:
        for item in row["detections"]:
            item["segmentation"] = item["area"] = None
    put_rows(open_store(str(folder)), "boxes.parquet", bare)
    metrics = run(folder, "--predictions", str(folder / "boxes.parquet"))
    assert metrics["mask"] is None
    assert metrics["predictions"]["uri"] == str(folder / "boxes.parquet")
    assert metrics["box"] == run(folder)["box"]
    assert "one side has boxes only" in capsys.readouterr().out


def test_another_name_for_an_id_is_said(
    made: tuple[Path, Row, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, predictions = made
    before = run(folder)
    assert before.pop("renamed") == []
    number, name = next(
        (d["category_id"], d["category"]) for r in predictions for d in r["detections"]
    )
    for row in predictions:
        for item in row["detections"]:
            if item["category_id"] == number:
                item["category"] = "another"
    put_rows(open_store(str(folder)), "renamed.parquet", predictions)
    after = run(folder, "--predictions", str(folder / "renamed.parquet"))
    wanted = {"category_id": number, "truth": name, "predictions": "another"}
    assert after["renamed"] == [wanted]
    assert after["mask"] == before["mask"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"category {number} is '{name}' in the truth and 'another' in the predictions" in said


def test_base_names_and_an_unfinished_job_are_said(
    made: tuple[Path, Row, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, _ = made
    before = run(folder)
    for image in file["images"]:
        image["file_name"] = f"elsewhere/{image['file_name']}"
    (folder / "truth.json").write_text(json.dumps(file))
    (folder / "table" / "_plan.json").write_text("{}")
    assert run(folder)["mask"] == before["mask"]
    said = capsys.readouterr().out
    assert "17 images are paired by their base name" in said
    assert "the job that predicts is not finished" in said


def test_many_categories_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = np.array([1, 2, 30, 20])
    names = {number: f"category {number}" for number in range(1, 41)}
    found = [instance(1, box) | {"category_id": n, "category": name} for n, name in names.items()]
    put_rows(open_store(str(tmp_path)), "truth.parquet", [prediction("a/b", found)])
    scored = [one | {"score": 0.5} for one in found]
    put_rows(open_store(str(tmp_path)), "found.parquet", [prediction("a/b", scored)])
    places = [f"--predictions={tmp_path}/found.parquet", f"--annotations={tmp_path}/truth.parquet"]
    assert main(["evaluate", *places]) == 0
    said = capsys.readouterr().out
    assert "category 30" in said
    assert "category 31" not in said
    assert "10 more categories" in said


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "truth.json").write_text("{"), "truth.json is no JSON"),
        (lambda folder: (folder / "truth.json").write_text("[]"), "is no COCO instances file"),
        (lambda folder: (folder / "truth.json").write_text("{}"), "it has no list of images"),
        (lambda folder: (folder / "truth.json").unlink(), "there is nothing at"),
        (
            lambda folder: (folder / "table/predictions/00000005.parquet").write_bytes(b"PAR1"),
            "00000005.parquet cannot be read",
        ),
        (
            lambda folder: pq.write_table(
                pa.table({"image_id": ["a"]}), folder / "table/predictions/x.parquet"
            ),
            "x.parquet is no table of the one schema: it has no shard, key, height",
        ),
    ],
)
def test_what_cannot_be_used_is_named(
    spoil: Callable[[Path], Any],
    words: str,
    made: tuple[Path, Row, list[Row]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, _ = made
    spoil(folder)
    assert main(_arguments(folder)) == 1
    assert words in " ".join(capsys.readouterr().err.split())


def test_an_image_twice_is_named(
    made: tuple[Path, Row, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, predictions = made
    put_rows(open_store(str(folder)), "truth.parquet", [predictions[0], predictions[0]])
    assert main(_arguments(folder, "--annotations", str(folder / "truth.parquet"))) == 1
    assert "'set#000.jpg' comes twice" in capsys.readouterr().err


def test_a_threshold_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--predictions=a", "--annotations=b", "--score-threshold=2"])
    assert "--score-threshold must be from 0 to 1, not 2.0" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.exists(), reason="the shared photos are not beside the checkout")
@pytest.mark.parametrize(
    "name", ["coco/annotations/instances_train", "nuclei/annotations/instances_val"]
)
def test_real_annotations(name: str, tmp_path: Path) -> None:
    file = json.loads((DATA / f"{name}.json").read_text())
    kept = {image["id"] for image in file["images"][-12:]}
    file["images"] = file["images"][-12:]
    file["annotations"] = [a for a in file["annotations"] if a["image_id"] in kept]
    (tmp_path / "truth.json").write_text(json.dumps(file))
    rng = np.random.default_rng(0)
    rows = list(coco.rows(file))
    for row in rows:
        items = row["detections"]
        for item in items:
            shift = rng.normal(0, 2, 4)
            item["bbox"] = np.maximum(np.round(item["bbox"] + shift), 1).tolist()
            item |= {"score": int(rng.integers(1, 17)) / 16, "iscrowd": 0}
            # The mask of a neighbour of the same image, now and then.
            if rng.random() < 0.3:
                item["segmentation"] = items[rng.integers(len(items))]["segmentation"]
    put_predictions(open_store(str(tmp_path / "table")), rows, per_object=4)
    metrics = run(tmp_path)
    assert_stock(metrics, file, rows)
    assert 0 < metrics["mask"]["AP"] < 1


def test_one_table_is_held_against_another(
    made: tuple[Path, Row, list[Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, predictions = made
    worse = [{**row, "detections": row["detections"][1:]} for row in predictions]
    put_predictions(open_store(str(folder / "worse")), worse)
    other = str(folder / "worse")
    metrics = run(folder, "--against", other)
    assert_stock(metrics, file, predictions)
    assert_stock(metrics["against"], file, worse)
    ours, theirs = metrics["mask"]["AP"], metrics["against"]["mask"]["AP"]
    assert ours > theirs
    verdict = {"by": "mask AP", "predictions": ours, "against": theirs, "better": "predictions"}
    assert metrics["against"]["better"] == verdict
    said = capsys.readouterr().out
    assert f"Better by {ours - theirs:.4f} mask AP: " in said
    assert f"{folder / 'table'} (--predictions)" in said
    assert "mask AP of cat" in said

    assert main(_arguments(folder, "--predictions", other, "--against", str(folder / "table"))) == 0
    assert f"{folder / 'table'} (--against)" in capsys.readouterr().out
    assert main(_arguments(folder, "--against", str(folder / "table"))) == 0
    assert "Neither is better" in capsys.readouterr().out
    # Boxes alone are compared by their boxes.
    bare = [
        {
            **row,
            "detections": [{**d, "segmentation": None, "area": None} for d in row["detections"]],
        }
        for row in predictions
    ]
    put_predictions(open_store(str(folder / "bare")), bare)
    metrics = run(folder, "--against", str(folder / "bare"))
    assert metrics["against"]["better"]["by"] == "box AP"
    assert metrics["against"]["better"]["better"] == "neither"
