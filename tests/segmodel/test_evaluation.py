import contextlib
import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from segmodel import coco
from segmodel.evaluation import CocoMatches, Evaluation, evaluate, match
from segmodel.metrics import Metrics
from segmodel.schema import PREDICTIONS, TRAINING

ANNOTATION_FILES = sorted(
    (Path(__file__).parents[3] / "shared/data").glob("*/annotations/instances_*.json")
)
SIZE = HEIGHT, WIDTH = 150, 200
CATEGORIES = {1: "cat", 2: "dog", 5: "cow", 9: "never there", 11: "only found"}
Row = dict[str, Any]


def rle_of(bitmap: np.ndarray) -> Row:
    rle = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def ellipse(bbox: np.ndarray) -> Row:
    x, y, w, h = bbox
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    distance = ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2
    return rle_of(distance <= 0.25)


def some_bbox(rng: np.random.Generator) -> np.ndarray:
    """Return xywh in eighths of a pixel, which float32 holds exactly, of all three area ranges."""
    w, h = rng.uniform(4, rng.choice([30, 60, 140]), 2)
    return np.round(8 * np.array([rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h])) / 8


def detection(category_id: int, bbox: np.ndarray, score: float | None = None, **items: Any) -> Row:
    segmentation = ellipse(bbox)
    area = float(coco_mask.area(segmentation))
    made = {"category_id": category_id, "category": CATEGORIES[category_id], "score": score}
    made |= {"bbox": bbox.tolist(), "area": area, "iscrowd": 0, "segmentation": segmentation}
    return made | items


def row_of(image_id: str, detections: list[Row], **items: Any) -> Row:
    shard, key = image_id.split("#")
    row = {"image_id": image_id, "shard": shard, "key": key, "height": HEIGHT, "width": WIDTH}
    return row | {"status": "ok", "error": None, "detections": detections} | items


def some_rows(seed: int, num_images: int = 12) -> tuple[list[Row], list[Row]]:
    """Return truth and predictions with crowds, ties, doubles, misses, 100 detections and more."""
    rng = np.random.default_rng(seed)
    truth, predictions = [], []
    for i in range(num_images):
        annotations = [
            detection(
                int(rng.choice([1, 2, 5], p=[0.6, 0.3, 0.1])),
                some_bbox(rng),
                iscrowd=int(rng.random() < 0.15),
            )
            for _ in range(0 if i % 5 == 4 else rng.integers(1, 9))
        ]
        for annotation in annotations:  # as polygons have it, the area is not the mask's
            annotation["area"] += float(rng.choice([-40, -0.5, 0, 30]))
        found = []
        for annotation in annotations * 3:
            moved = np.round(annotation["bbox"] + rng.normal(0, 2, 4)).clip([0, 0, 1, 1])
            if rng.random() < 0.5:
                found.append(detection(annotation["category_id"], moved, rng.integers(1, 9) / 8))
        num_wrong = 130 if i == 1 else rng.integers(0, 5)
        wrong = rng.choice([1, 2, 5, 11], num_wrong, p=[0.85, 0.05, 0.05, 0.05])
        found += [detection(int(c), some_bbox(rng), rng.integers(0, 9) / 8) for c in wrong]
        order = rng.permutation(len(found))
        truth.append(row_of(f"shard#{i:02}", annotations))
        if i % 7 != 6:
            predictions.append(row_of(f"shard#{i:02}", [found[j] for j in order]))
    return truth, predictions


def instances(truth: list[Row], ids: dict[str, int]) -> Row:
    """Write truth as a COCO instances file."""
    annotations = [
        item | {"image_id": ids[row["image_id"]]} for row in truth for item in row["detections"]
    ]
    return {
        "images": [{"id": ids[row["image_id"]], "height": HEIGHT, "width": WIDTH} for row in truth],
        "annotations": [item | {"id": i} for i, item in enumerate(annotations, start=1)],
        "categories": [{"id": c, "name": name} for c, name in CATEGORIES.items() if c != 11],
    }


def stock(file: Row, results: list[Row], kind: str) -> COCOeval:
    """Run pycocotools as one does, on results with boxes only or with masks only."""
    unused = {"bbox": "segmentation", "segm": "bbox"}[kind]
    results = [{k: v for k, v in result.items() if k != unused} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(file)
        truth.createIndex()
        if results:
            found = truth.loadRes(copy.deepcopy(results))
        else:  # which loadRes refuses
            found = COCO()
            found.dataset = {**file, "annotations": []}
            found.createIndex()
        run = COCOeval(truth, found, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def assert_same(metrics: Metrics, run: COCOeval) -> None:
    """Compare the twelve numbers, the curves, and what they say of each category."""
    assert list(metrics.numbers.values()) == pytest.approx(run.stats.tolist(), rel=0, abs=1e-12)
    columns = {c.id: k for k, c in enumerate(metrics.per_category.values())}
    known = [category for category in run.params.catIds if category in columns]
    ours = [columns[category] for category in known]
    theirs = [run.params.catIds.index(category) for category in known]
    for name, axis in (("precision", 2), ("scores", 2), ("recall", 1)):
        mine, reference = getattr(metrics, name), run.eval[name]
        np.testing.assert_array_equal(mine.take(ours, axis), reference.take(theirs, axis), name)
        for absent in set(range(len(columns))) - set(ours):
            assert (mine.take(absent, axis) == -1).all()
    for category in metrics.per_category.values():
        if category.id in known:
            precision = run.eval["precision"][:, :, run.params.catIds.index(category.id), 0, 2]
            assert np.isclose(category.AP, mean(precision), rtol=0, atol=1e-12)
            assert np.isclose(category.AP50, mean(precision[0]), rtol=0, atol=1e-12)


def mean(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def assert_parity(truth: list[Row], predictions: list[Row], evaluation: Evaluation) -> None:
    ids = {row["image_id"]: i for i, row in enumerate(truth, start=1)}
    file, results = instances(truth, ids), coco.results(predictions, ids)
    assert_same(evaluation.box, stock(file, results, "bbox"))
    assert evaluation.mask is not None
    assert_same(evaluation.mask, stock(file, results, "segm"))


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, PREDICTIONS)


class TestParity:
    @pytest.mark.parametrize("seed", range(6))
    def test_crowds_ties_areas_and_many_detections(self, seed, capsys):
        truth, predictions = some_rows(seed)
        evaluation = evaluate(table(truth), table(predictions))
        assert capsys.readouterr().out == ""
        assert_parity(truth, predictions, evaluation)
        assert 0 < evaluation.box.AP < evaluation.box.AP50 < 1
        assert evaluation.mask is not None
        assert evaluation.mask.AP != evaluation.box.AP
        assert evaluation.box.per_category["only found"].AP == -1
        assert evaluation.num_predictions == sum(len(row["detections"]) for row in predictions)

    def test_perfect_predictions(self):
        truth, _ = some_rows(0)
        perfect = [
            row
            | {"detections": [d | {"score": 1.0} for d in row["detections"] if not d["iscrowd"]]}
            for row in truth
        ]
        evaluation = evaluate(truth, perfect)
        assert_parity(truth, perfect, evaluation)
        assert np.isclose(evaluation.box.AP, 1)

    @pytest.mark.parametrize("seed", range(3))
    def test_image_order_is_that_of_cocos_ids(self, seed):
        truth, predictions = some_rows(seed)
        shuffled = np.random.default_rng(seed).permutation(len(truth)).tolist()
        ids = {row["image_id"]: 3 + i for row, i in zip(truth, shuffled, strict=True)}
        file, results = instances(truth, ids), coco.results(predictions, ids)
        run = stock(file, results, "bbox")
        assert_same(evaluate(truth, predictions, image_order=ids).box, run)
        with pytest.raises(AssertionError):  # ties matter here
            assert_same(evaluate(truth, predictions).box, run)

    def test_nothing_found(self):
        truth, _ = some_rows(0)
        evaluation = evaluate(truth, [])
        assert_parity(truth, [], evaluation)
        assert evaluation.box.AP == evaluation.box.AR100 == 0
        assert (evaluation.num_missing, evaluation.num_predictions) == (len(truth), 0)

    def test_nothing_to_be_found(self):
        truth, predictions = some_rows(0)
        truth = [row | {"detections": []} for row in truth]
        evaluation = evaluate(truth, predictions)
        assert_parity(truth, predictions, evaluation)
        assert set(evaluation.box.numbers.values()) == {-1}

    @pytest.mark.parametrize("nothing", [table([]), []])
    def test_nothing_at_all(self, nothing):
        evaluation = evaluate(nothing, [])
        assert set(evaluation.box.numbers.values()) == {-1}
        assert (evaluation.box.per_category, evaluation.num_images) == ({}, 0)

    def test_images_in_error_count_as_nothing_found(self):
        truth, predictions = some_rows(0)
        failed = {"status": "error", "error": "decode: no image", "height": None, "width": None}
        broken = [row | failed for row in predictions[:3]] + predictions[3:]
        evaluation = evaluate(truth, broken)
        assert_parity(truth, predictions[3:], evaluation)
        assert evaluation.num_errors == 3
        assert evaluation.num_missing == len(truth) - len(predictions) == 1
        assert evaluation.num_images == len(truth)
        assert evaluation.num_truth == sum(len(row["detections"]) for row in truth)
        assert evaluation.num_predictions == sum(len(row["detections"]) for row in predictions[3:])

    def test_an_annotation_with_the_id_0_is_found_though_pycocotools_loses_it(self):
        mask = ellipse(np.array([20, 30, 60, 50]))
        item = {"category_id": 1, "bbox": [20, 30, 60, 50], "segmentation": mask}
        file = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
            "annotations": [{**item, "id": 0, "image_id": 1, "area": 3000, "iscrowd": 0}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (truth,) = coco.rows(file)
        found = {**truth, "detections": [{**truth["detections"][0], "score": 0.5}]}
        results = coco.results([found], coco.image_ids(file))
        assert stock(file, results, "bbox").stats[0] == 0
        assert pytest.approx(1) == evaluate([truth], [found]).box.AP

    @pytest.mark.parametrize(
        "path", ANNOTATION_FILES, ids=lambda path: f"{path.parts[-3]}-{path.stem}"
    )
    def test_real_files(self, path):
        file = json.loads(path.read_text())
        kept = {image["id"] for image in file["images"][:10]}
        file["images"] = [image for image in file["images"] if image["id"] in kept]
        file["annotations"] = [a for a in file["annotations"] if a["image_id"] in kept]
        truth = list(coco.rows(file))
        predictions = [disturbed(row, np.random.default_rng(i)) for i, row in enumerate(truth)]
        order = coco.image_ids(file)
        results = coco.results(predictions, order)
        evaluation = evaluate(table(truth), table(predictions), image_order=order)
        assert_same(evaluation.box, stock(file, results, "bbox"))
        assert evaluation.mask is not None
        assert_same(evaluation.mask, stock(file, results, "segm"))
        assert 0 < evaluation.mask.AP < 1


def disturbed(row: Row, rng: np.random.Generator) -> Row:
    """Make predictions of truth: some lost, some double, moved, of other categories, with ties."""
    found = []
    items = row["detections"]
    for item in items + items[:5]:
        if rng.random() < 0.2:
            continue
        other = items[rng.integers(len(items))] if rng.random() < 0.1 else item
        x, y, w, h = np.round(item["bbox"] + rng.normal(0, 1, 4) * 8).clip(1)
        box = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        (moved,) = coco_mask.frPyObjects(box, row["height"], row["width"])
        both = coco_mask.merge([item["segmentation"], moved], intersect=rng.random() < 0.8)
        mask = {"size": list(both["size"]), "counts": both["counts"].decode()}
        made = {"score": rng.integers(1, 17) / 16, "bbox": [x, y, w, h], "segmentation": mask}
        of = {key: other[key] for key in ("category_id", "category")}
        found.append(item | made | of | {"iscrowd": 0})
    return row | {"detections": found}


FORMS: dict[str, Callable[[list[Row]], Any]] = {
    "table": table,
    "batch": lambda rows: table(rows).combine_chunks().to_batches()[0],
    "dictionaries": iter,
    "batches": lambda rows: iter(table(rows).to_batches(max_chunksize=5)),
    "tables": lambda rows: (table(rows[i : i + 5]) for i in range(0, len(rows), 5)),
    "training table": lambda rows: pa.Table.from_pylist(
        [row | {"image": {"bytes": b"?", "path": None}} for row in rows], TRAINING
    ),
}


class TestStreaming:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_of_rows_is_the_same(self, form):
        truth, predictions = some_rows(1)
        expected = evaluate(truth, predictions)
        assert evaluate(FORMS[form](truth), FORMS[form](predictions)) == expected

    @pytest.mark.parametrize("seed", range(3))
    def test_order_and_parts_do_not_matter(self, seed):
        truth, predictions = some_rows(2)
        expected = evaluate(truth, predictions)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(truth)).tolist()
        parts = []
        for images in (order[:4], order[4:5], [], order[5:]):
            ids = [truth[i]["image_id"] for i in images]
            found = [row for row in reversed(predictions) if row["image_id"] in ids]
            parts.append(pickle.loads(pickle.dumps(match([truth[i] for i in images], found))))
        total = CocoMatches()
        for part in parts:
            total.merge(part)
        merged = total.summary()
        assert merged == expected
        np.testing.assert_array_equal(merged.box.precision, expected.box.precision)

    def test_merging_leaves_the_other_as_it_is(self):
        truth, predictions = some_rows(3)
        first, second = match(truth[:6], predictions[:6]), match(truth[6:], predictions[6:])
        before = pickle.dumps(second)
        first.merge(second)
        first.add(row_of("shard#z", [detection(1, np.array([1, 2, 30, 40]))]), None)
        assert pickle.dumps(second) == before
        assert first.summary().num_images == len(truth) + 1

    def test_an_image_takes_tens_of_bytes_for_a_detection(self):
        truth, predictions = some_rows(1, num_images=2)
        matches = match(truth, predictions)
        assert len(pickle.dumps(matches)) < 60 * matches.summary().num_predictions


class TestWords:
    def test_boxes_only_have_no_mask_metrics(self):
        truth, predictions = some_rows(0)
        boxes = copy.deepcopy(predictions)
        for row in boxes:
            for item in row["detections"]:
                item["segmentation"] = item["area"] = None
        evaluation = evaluate(truth, boxes)
        assert evaluation.mask is None
        assert evaluation.box == evaluate(truth, predictions).box
        assert json.loads(json.dumps(evaluation.to_dict()))["mask"] is None
        with pytest.raises(ValueError, match=r"\d+ of \d+ masks are missing in the predictions"):
            evaluate(truth, boxes[:5] + predictions[5:])

    def test_result_is_json(self):
        truth, predictions = some_rows(0)
        evaluation = evaluate(truth, predictions)
        result = json.loads(json.dumps(evaluation.to_dict()))
        assert list(result["box"])[:12] == [
            *("AP", "AP50", "AP75", "APs", "APm", "APl"),
            *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
        ]
        counting = [d for row in truth for d in row["detections"] if not d["iscrowd"]]
        category = result["box"]["per_category"]["cat"]
        assert category["num_truth"] == sum(item["category_id"] == 1 for item in counting)
        assert category["AP"] == evaluation.box.per_category["cat"].AP
        assert result["num_images"] == len(truth)

    def test_unknown_images_are_named(self):
        truth, predictions = some_rows(0)
        with pytest.raises(
            ValueError, match=r"4 images .* such as 'shard#00', 'shard#01', 'shard#0"
        ):
            evaluate(truth[4:], predictions)

    def test_an_image_may_not_come_twice(self):
        truth, predictions = some_rows(0)
        with pytest.raises(ValueError, match="'shard#00' comes twice in the truth"):
            evaluate([*truth, truth[0]], predictions)
        with pytest.raises(ValueError, match="'shard#00' comes twice"):
            evaluate(truth, [*predictions, predictions[0]])
        matches = match(truth, predictions)
        with pytest.raises(ValueError, match="'shard#00' comes twice"):
            matches.merge(matches)
        with pytest.raises(ValueError, match="'shard#00' is matched with 'shard#01'"):
            CocoMatches().add(truth[0], predictions[1])

    @pytest.mark.parametrize(
        ("side", "changed", "message"),
        [
            (0, {"area": None}, "'shard#00' has an annotation without an area"),
            (1, {"score": None}, "'shard#00' has a prediction without a score"),
            (1, {"segmentation": rle_of(np.ones((2, 3)))}, r"sizes: \[\(2, 3\), \(150, 200\)"),
        ],
    )
    def test_unusable_detections_are_named(self, side, changed, message):
        rows = some_rows(0)
        rows[side][0]["detections"][0] |= changed
        with pytest.raises(ValueError, match=message):
            evaluate(*rows)

    def test_images_of_another_size_are_refused(self):
        truth, _ = some_rows(0)
        with pytest.raises(ValueError, match=r"'shard#00' .* different sizes"):
            evaluate(truth, [row_of("shard#00", [], height=15)])

    def test_categories_of_other_ids_are_refused(self):
        truth, predictions = some_rows(0)
        for row in predictions:
            for item in row["detections"]:
                item["category_id"] -= 1
        with pytest.raises(ValueError, match="the id of category 'cat' is 1 in the truth and 0 in"):
            evaluate(truth, predictions)

    def test_truth_names_the_categories(self):
        box = np.array([1, 2, 30, 40])
        annotations = [detection(c, box, category=n) for c, n in ((1, "a"), (2, "a"), (5, None))]
        found = [detection(c, box, 0.5, category="b") for c in (1, 9)]
        evaluation = evaluate([row_of("#i", annotations)], [row_of("#i", found)])
        assert [(c.id, n) for n, c in evaluation.box.per_category.items()] == [
            *((1, "a (1)"), (2, "a (2)"), (5, "5"), (9, "b"))
        ]
        assert evaluation.renamed == {1: ("a", "b")}
        assert evaluation.to_dict()["renamed"] == [
            {"category_id": 1, "truth": "a", "predictions": "b"}
        ]
