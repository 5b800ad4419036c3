"""COCO run-length encodings read: masks, crops, areas, boxes. What writes them is `masks.encode`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco

from segmodel.schema import Float32, Int64, Rle


def decode(rle: Rle) -> npt.NDArray[np.bool_]:
    """Return the mask of an encoding: (H, W) bool.

    Raises:
        ValueError: The counts are damaged, or do not fit the size.
    """
    height, width = rle["size"]
    runs = _runs(rle)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def decode_crop(rle: Rle) -> tuple[int, int, npt.NDArray[np.bool_]]:
    """Return only the columns of a mask that hold something; the rest is never allocated.

    Returns:
        Row and column of the image where the crop starts, and the crop, (H, w) bool, of full
        height; (H, 0) for an empty mask.

    Raises:
        ValueError: The counts are damaged, or do not fit the size.
    """
    height, _ = rle["size"]
    ends = _runs(rle).cumsum()
    starts = np.concatenate([[0], ends[:-1]])
    # Every second run is of the mask, and some of these may be empty.
    inside = np.flatnonzero(ends[1::2] > starts[1::2]) * 2 + 1
    if not len(inside):
        return 0, 0, np.zeros((height, 0), np.bool_)
    left = int(starts[inside[0]]) // height
    stop = -(-int(ends[inside[-1]]) // height)
    clipped = np.clip(ends, left * height, stop * height)
    runs = np.diff(clipped, prepend=left * height)
    crop = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(stop - left, height).T
    return 0, left, crop


def _runs(rle: Rle) -> Int64:
    height, width = rle["size"]
    runs = _read_counts(rle["counts"])
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the counts of this encoding do not describe {height} x {width} pixels")
    return runs


def _read_counts(counts: str) -> Int64:
    """Return the run lengths, as `rleFrString` of COCO's maskApi.c."""
    groups = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    lasts = np.flatnonzero(groups & 32 == 0)
    if len(lasts) == 0 or lasts[-1] != len(groups) - 1 or not ((groups >= 0) & (groups < 64)).all():
        raise ValueError("the counts of this encoding are damaged")
    starts = np.concatenate([[0], lasts[:-1] + 1])
    sizes = lasts + 1 - starts
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, sizes))
    runs = np.add.reduceat((groups & 31) << shifts, starts)
    runs -= np.where(groups[lasts] & 16, 1 << 5 * sizes, 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def areas(rles: Sequence[Rle]) -> Float32:
    """Return the number of pixels in each of N masks: (N,) float32."""
    # One by one: pycocotools 2.0.11 refuses lists of more than 255 ("out of bounds for uint8").
    return np.array([coco.area(rle) for rle in rles], np.float32)


def bounding_boxes(rles: Sequence[Rle]) -> Float32:
    """Return the tight box around each of N masks: (N, 4) float32, xywh, pixels; empty: zeros."""
    return np.asarray(coco.toBbox(list(rles)), np.float32).reshape(-1, 4)
