"""Instances as a class for each pixel: the semantic view, as a PNG with a palette."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from segmodel.rle import decode_crop

UInt8 = npt.NDArray[np.uint8]

# Values of a byte, without 0 for the background.
MAX_CLASSES = 255


def paint(
    detections: Sequence[Mapping[str, Any]], classes: Mapping[int, int], size_hw: tuple[int, int]
) -> UInt8:
    """Return the class of each pixel; where instances overlap, the best score wins.

    Args:
        detections: Of the one schema, with masks of (H, W) pixels. Of equal scores, and where there
            are none, as in ground truth, the first wins.
        classes: 1..255, by category id.
        size_hw: H and W.

    Returns:
        (H, W) uint8; 0 is background.

    Raises:
        ValueError: A mask is damaged or of another size.
    """
    found = np.zeros(size_hw, np.uint8)
    for detection in sorted(detections, key=_score, reverse=True):
        rle = detection["segmentation"]
        if tuple(rle["size"]) != size_hw:
            raise ValueError(f"a mask is of size {rle['size']}, the image of {list(size_hw)}")
        top, left, crop = decode_crop(rle)
        window = found[top : top + crop.shape[0], left : left + crop.shape[1]]
        window[crop & (window == 0)] = classes[detection["category_id"]]
    return found


def png(class_map: UInt8) -> bytes:
    """Return a class map, (H, W) uint8, as a PNG with `palette`."""
    image = Image.fromarray(class_map, "L")
    image.putpalette(palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def palette() -> UInt8:
    """Return colours of 256 classes: (256, 3) uint8, RGB, the first black.

    Those of PASCAL VOC (`VOClabelcolormap` of its development kit): the bits of a class, dealt to
    the three channels in turn, highest first.
    """
    classes = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            bit = classes >> (3 * level + channel) & 1
            colours[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return colours


def _score(detection: Mapping[str, Any]) -> float:
    score = detection["score"]
    return 0.0 if score is None else float(score)
