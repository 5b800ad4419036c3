"""AP of each precision, and how far its masks are from those of fp32.

`python -m tests.bench precision`: the shipped bundle on fresh scenes. With a trained bundle and packed sets,
`python -m tests.bench.bench_precision BUNDLE SET`.
"""

import io
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pycocotools.mask as coco_mask
import torch
from PIL import Image

from jobs import training_set
from segmodel import coco, masks, scenes
from segmodel.bundle import Bundle, load
from segmodel.evaluation import evaluate
from segmodel.images import MAX_PIXELS, Picture, decode, decode_reduced
from segmodel.inference import Predictor
from segmodel.schema import Rle, detection_rows
from segmodel.settings import InferencePrecision, network_size
from tests.bench import results
from tests.bench.bench_job import row

DEMO_BUNDLE = Path(__file__).parents[2] / "jobs" / "demo_bundle"
# Not those that the bundle was trained on.
FRESH = range(5_000_000, 5_000_040)


# A name, the arithmetic, and pictures.
Way = tuple[str, InferencePrecision, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Set:
    """Pictures and their truth, rows of the one schema."""

    name: str
    images: Sequence[Any]
    truth: Sequence[dict[str, Any]]


def precision() -> None:
    """Measure the shipped bundle on fresh scenes, and add the rows."""
    made = [scenes.scene(seed) for seed in FRESH]
    names = [f"{number}.jpg" for number in range(len(made))]
    truth = list(coco.rows(scenes.coco(made, names)))
    compare(
        load(DEMO_BUNDLE), Set(name="fresh scenes", images=[m.image for m in made], truth=truth)
    )


def packed(bundle: Path, folder: str) -> None:
    """Measure a trained bundle on a packed set, and add the rows."""
    chunks = training_set.load([folder], None).chunks
    found = [{**one, "status": "ok"} for one in training_set.rows(chunks)]
    images = [decode(one["data"]) for one in found]
    name = f"{Path(folder).name}, {len(images)} photos"
    compare(load(bundle), Set(name=name, images=images, truth=found))


def compare(bundle: Bundle, pictures: Set) -> None:
    """Score each precision, fp32 first."""
    case = f"{bundle.settings.arch} at {bundle.settings.min_size} px, {pictures.name}"
    ways: list[Way] = [(kind, kind, pictures.images) for kind in get_args(InferencePrecision)[1:]]
    _measure(bundle, case, pictures.truth, ways)


def decoding() -> None:
    """Measure what decoding at a lower resolution costs: fresh scenes, enlarged tenfold to 8 megapixels."""
    made = [_enlarged(scenes.scene(seed)) for seed in FRESH]
    truth = list(coco.rows(scenes.coco(made, [f"{number}.jpg" for number in range(len(made))])))
    files = [_jpeg(one.image) for one in made]
    bundle = load(DEMO_BUNDLE)
    needed = partial(network_size, bundle.settings)
    whole = [
        Picture(decode(data), one.image.shape[:2]) for data, one in zip(files, made, strict=True)
    ]
    reduced = [decode_reduced(data, MAX_PIXELS, needed) for data in files]
    case = f"{bundle.settings.arch} at {bundle.settings.min_size} px, scenes enlarged to {made[0].image.shape[:2]}"
    ways: list[Way] = [
        (f"fp32-fast, decoded to {pictures[0].pixels.shape[:2]}", "fp32-fast", pictures)
        for pictures in (whole, reduced)
    ]
    _measure(bundle, case, truth, ways)


def _enlarged(one: scenes.Scene, factor: int = 10) -> scenes.Scene:
    height, width = one.image.shape[:2]
    image = Image.fromarray(one.image).resize((factor * width, factor * height))
    masks_ = one.masks.repeat(factor, axis=1).repeat(factor, axis=2)
    return scenes.Scene(image=np.asarray(image), masks=masks_, category_ids=one.category_ids)


def _jpeg(pixels: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=92)
    return data.getvalue()


def _measure(
    bundle: Bundle, case: str, truth: Sequence[dict[str, Any]], ways: Iterable[Way]
) -> None:
    """Add rows for each way, whose masks are compared with those of the first."""
    torch.set_num_threads(1)
    reference: list[list[dict[str, Any]]] = []
    for name, kind, images in ways:
        started = time.process_time()
        found = _predict(bundle, images, kind)
        seconds = (time.process_time() - started) / len(found)
        reference = reference or found
        scores = evaluate(
            truth, [{**t, "detections": d} for t, d in zip(truth, found, strict=True)]
        )
        note = _agreement(found, reference)
        measured = [("CPU seconds for an image", seconds, "s")]
        for what, metrics in (("mask", scores.mask), ("box", scores.box)):
            if metrics is not None:
                measured += [(f"{what} AP", metrics.AP, "AP"), (f"{what} AP50", metrics.AP50, "AP")]
        results.add("precision", [row(case, f"{name}, {m}", v, u, note) for m, v, u in measured])


def _predict(
    bundle: Bundle, images: Iterable[Any], kind: InferencePrecision
) -> list[list[dict[str, Any]]]:
    predictor, by_label = Predictor(bundle, "cpu", kind), bundle.by_label()
    found = []
    for image in images:
        (one,) = predictor.predict([image])
        assert one.mask_probs is not None
        rles = masks.encode(one.mask_probs, one.boxes_xyxy, one.size_hw)
        found.append(detection_rows(one, rles, by_label))
    return found


def _agreement(found: list[list[dict[str, Any]]], reference: list[list[dict[str, Any]]]) -> str:
    """Say how the masks that were found first are met again: the same bytes, and the median of the best IoUs."""
    equal, ious = 0, []
    for some, wanted in zip(found, reference, strict=True):
        rles: list[Rle] = [one["segmentation"] for one in some]
        counts = {rle["counts"] for rle in rles}
        equal += sum(one["segmentation"]["counts"] in counts for one in wanted)
        if rles and wanted:
            expected = [one["segmentation"] for one in wanted]
            ious.append(coco_mask.iou(rles, expected, [0] * len(expected)).max(axis=0))
    total = np.concatenate(ious) if ious else np.zeros(0)
    return (
        f"{equal} of {len(total)} masks of the first to the byte, median IoU {np.median(total):.4f}"
    )


if __name__ == "__main__":
    packed(Path(sys.argv[1]), sys.argv[2])
