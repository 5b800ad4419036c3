"""Pictures are made of anything that numbers can be, without a warning and without pyplot."""

import io
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmodel import plots
from segmodel.evaluation import Evaluation, evaluate


def picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    return pixels


def colours(data: bytes) -> set[tuple[int, ...]]:
    packed = np.unique(picture(data).astype(np.int64) @ [65536, 256, 1])
    return {(c >> 16, c >> 8 & 255, c & 255) for c in packed.tolist()}


def scores(names: Mapping[int, str], num_images: int = 6) -> Evaluation:
    """Boxes of a few pixels, half of them found."""
    truth, found = [], []
    for n in range(num_images):
        row: dict[str, Any] = {"image_id": f"#{n}", "height": 60, "width": 60, "status": "ok"}
        boxes = [
            {
                "category_id": category,
                "category": name,
                "score": None,
                "bbox": [float(category % 5 * 9), 2.0, 10.0 + n, 9.0],
                "area": 90.0,
                "iscrowd": 0,
                "segmentation": None,
            }
            for category, name in names.items()
        ]
        truth.append({**row, "detections": boxes})
        scored = [{**box, "score": (n + 1) / 10} for box in boxes[n % 2 :: 2]]
        found.append({**row, "detections": scored})
    return evaluate(truth, found)


HARD_NAMES = ("plain", "$x_1$ and $", "_hidden", "猫", "a very long name of a category", "<b>")


def test_precision_and_recall_of_hard_names() -> None:
    found = scores(dict(enumerate(HARD_NAMES, start=1)))
    both = picture(plots.precision_recall({"boxes": found.box, "again": found.box}))
    one = picture(plots.precision_recall({"boxes": found.box}))
    assert both.shape[1] > one.shape[1]


def test_one_category_has_one_panel_and_many_are_cut() -> None:
    one = picture(plots.precision_recall({"boxes": scores({1: "one"}).box}))
    many = picture(plots.precision_recall({"boxes": scores({n: f"c{n}" for n in range(20)}).box}))
    assert many.shape[1] > 1.5 * one.shape[1]


@pytest.mark.parametrize("truth", [[], [{"image_id": "#1", "status": "ok", "detections": []}]])
def test_precision_and_recall_of_nothing(truth: list[Any]) -> None:
    rows = [{**row, "height": 5, "width": 5} for row in truth]
    picture(plots.precision_recall({"boxes": evaluate(rows, []).box}))


@pytest.mark.parametrize("num_categories", [0, 6, 70])
def test_confusion_of_few_and_many(num_categories: int) -> None:
    rng = np.random.default_rng(num_categories)
    matrix = rng.integers(0, 50, (num_categories + 1, num_categories + 1))
    names = [HARD_NAMES[n % len(HARD_NAMES)] for n in range(num_categories)]
    picture(plots.confusion(matrix, names, "a note"))


def test_what_is_right_is_blue_and_what_is_wrong_orange() -> None:
    blue, orange = (11, 110, 153), (194, 65, 12)
    right, wrong = np.diag([5, 5, 0]), np.array([[0, 5, 0], [0, 0, 5], [0, 0, 0]])
    assert {blue, orange} & colours(plots.confusion(right, ["a", "b"])) == {blue}
    assert {blue, orange} & colours(plots.confusion(wrong, ["a", "b"])) == {orange}


def history(steps: int) -> list[dict[str, float]]:
    points = []
    for step in range(1, steps + 1):
        parts = dict.fromkeys(plots.LOSSES, 1 / step)
        points.append(
            {"step": step, "epoch": step / 10, "loss": sum(parts.values()), **parts}
            | {"learning_rate": 1e-4 * step, "images_per_second": 3.0}
        )
        if step % 10 == 0:
            ap = 1 - 1 / step
            points.append({"step": step, "epoch": step / 10, "box_AP": ap, "mask_AP": ap})
    return points


@pytest.mark.parametrize("steps", [0, 1, 200])
def test_curves_of_short_and_long_trainings(steps: int) -> None:
    picture(plots.curves(history(steps)))


def test_what_is_not_finite_or_absent_is_left_out() -> None:
    points = history(30)
    points[3]["loss"], points[4]["loss_mask"] = math.nan, math.inf
    del points[5]["learning_rate"]
    picture(plots.curves(points))


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert plots.curves(history(20)) == plots.curves(history(20))


def test_pyplot_is_not_used() -> None:
    code = (
        "import sys, segmodel.plots as p; p.curves([]); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
