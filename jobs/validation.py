"""What a network finds in a packed set, matched with the set's truth: one worker's part of an evaluation."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from segmodel import masks
from segmodel.batching import ahead
from segmodel.bundle import Bundle
from segmodel.evaluation import CocoMatches, Evaluation
from segmodel.images import decode
from segmodel.inference import Image, Predictor
from segmodel.schema import detection_rows

DECODED_AHEAD = 2  # images for each decoding thread


def matches(
    rows: Iterable[dict[str, Any]], bundle: Bundle, device: torch.device, threads: int
) -> CocoMatches:
    """Predict the images of rows, decoded ahead in threads, and match what is found.

    Args:
        rows: A worker's part of `training_set.rows`.
        bundle: The weights.
        device: Where they run.
        threads: For decoding.
    """
    found_so_far = CocoMatches()
    predictor = Predictor(bundle, str(device))
    waiting: dict[int, dict[str, Any]] = {}

    def decoded() -> Iterator[tuple[int, Image]]:
        with ThreadPoolExecutor(threads) as pool:
            under_way = ahead(
                lambda row: decode(row.pop("data")), rows, pool, DECODED_AHEAD * threads
            )
            for number, (row, image) in enumerate(under_way):
                waiting[number] = row
                yield number, image.result()

    for number, found in predictor.stream(decoded()):
        truth = {**waiting.pop(number), "status": "ok"}
        assert found.mask_probs is not None
        rles = masks.encode(found.mask_probs, found.boxes_xyxy, found.size_hw)
        detections = detection_rows(found, rles, bundle.by_label())
        found_so_far.add(truth, {**truth, "detections": detections})
    return found_so_far


def scores(found: Evaluation) -> dict[str, float]:
    """Return COCO's numbers of boxes and masks, as a training's history has them: `box_AP`, `mask_AP`, ..."""
    numbers = {f"box_{name}": value for name, value in found.box.numbers.items()}
    if found.mask is not None:
        numbers |= {f"mask_{name}": value for name, value in found.mask.numbers.items()}
    return numbers
