"""Paste, threshold and pycocotools against `segmodel.masks.encode`, one thread."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pycocotools.mask as coco
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from segmodel import masks
from segmodel.schema import Float32, Rle
from tests.bench import results
from tests.bench.bench_job import row

CASES = [
    ("480p", (480, 640), 30),
    ("480p", (480, 640), 100),
    ("1080p", (1080, 1920), 100),
    ("4K", (2160, 3840), 100),
]
MASK_SIZE = 28
# The plain way pastes in groups of this size: 100 masks at 4K are 3.3 GB, twice while stacking.
GROUP_BYTES = 512 << 20
REPEATS = {"plain": 5, "direct": 15}


def detections(size_hw: tuple[int, int], num: int, seed: int = 0) -> tuple[Float32, Float32]:
    """Draw boxes with sides of 3 to 70 % of the image's, most of them small; soft, lobed masks."""
    rng = np.random.default_rng(seed)
    sides_wh = np.exp(rng.uniform(np.log(0.03), np.log(0.7), (num, 2))) * size_hw[::-1]
    corners = rng.uniform(0, 1, (num, 2)) * (np.array(size_hw[::-1]) - sides_wh)
    boxes_xyxy = np.concatenate([corners, corners + sides_wh], axis=1).astype(np.float32)
    y, x = (np.mgrid[:MASK_SIZE, :MASK_SIZE] + 0.5) / MASK_SIZE * 2 - 1
    angle = np.arctan2(y, x)
    lobes, phase = rng.integers(2, 7, (2, num, 1, 1))
    radius = 0.85 + 0.15 * np.sin(lobes * angle + phase)
    logits = 12 * (radius - np.hypot(x, y)) + rng.normal(0, 0.3, (num, MASK_SIZE, MASK_SIZE))
    return (1 / (1 + np.exp(-logits))).astype(np.float32), boxes_xyxy


def plain(mask_probs: Float32, boxes_xyxy: Float32, size_hw: tuple[int, int]) -> list[Rle]:
    """Paste, threshold and encode, as many masks at once as fit."""
    group = max(GROUP_BYTES // (4 * size_hw[0] * size_hw[1]), 1)
    rles: list[dict[str, Any]] = []
    for i in range(0, len(mask_probs), group):
        probs = torch.from_numpy(mask_probs[i : i + group])[:, None]
        pasted = paste_masks_in_image(probs, torch.from_numpy(boxes_xyxy[i : i + group]), size_hw)
        binary = (pasted[:, 0] > 0.5).numpy().astype(np.uint8)
        rles += coco.encode(np.asfortranarray(binary.transpose(1, 2, 0)))
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]


def encoding() -> None:
    """Measure each case, and add the rows."""
    torch.set_num_threads(1)
    masks.warm_up()
    for name, size_hw, num in CASES:
        results.add("mask encoding", _rows(f"{name}, {num} masks, one thread", size_hw, num))


def _rows(case: str, size_hw: tuple[int, int], num: int) -> Iterator[dict[str, Any]]:
    arguments = (*detections(size_hw, num), size_hw)
    pairs = zip(plain(*arguments), masks.encode(*arguments), strict=True)
    equal = f"{sum(a == b for a, b in pairs)} of {num} masks equal to the byte"
    slow = _milliseconds(lambda: plain(*arguments), REPEATS["plain"])
    quick = _milliseconds(lambda: masks.encode(*arguments), REPEATS["direct"])
    for measure, took in (
        ("paste, threshold, pycocotools", slow),
        ("segmodel.masks.encode", quick),
    ):
        spread = f"median of {len(took)}, {min(took):.4g} to {max(took):.4g}; {equal}"
        yield row(case, measure, statistics.median(took), "ms", spread)
    ratio = statistics.median(slow) / statistics.median(quick)
    spread = f"of the medians; {min(slow) / max(quick):.3g} to {max(slow) / min(quick):.3g}"
    yield row(case, "ratio", ratio, "ratio", f"{spread}; {equal}")


def _milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times
