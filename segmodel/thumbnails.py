"""Small pictures for pages: an image as WebP of at most some pixels and bytes, and masks of its size."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from segmodel.rle import decode_crop
from segmodel.schema import Rle

UInt8 = npt.NDArray[np.uint8]

LONGEST_SIDE = 640
# A photo of 640 pixels takes 30 to 90 kB at the first quality; noise takes several times that.
MAX_BYTES = 96_000
QUALITIES = (80, 65, 45, 25, 10)


def size_of(size_hw: tuple[int, int], longest: int = LONGEST_SIDE) -> tuple[int, int]:
    """Return the height and width of an image's thumbnail, which is never larger than the image."""
    scale = min(1.0, longest / max(size_hw))
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def encode(image: UInt8, longest: int = LONGEST_SIDE, max_bytes: int = MAX_BYTES) -> bytes:
    """Return a WebP file.

    Args:
        image: (H, W, 3) uint8, RGB.
        longest: Side in pixels, at most.
        max_bytes: Of the file; the quality is lowered until it fits, as far as that goes.
    """
    height, width = size_of((image.shape[0], image.shape[1]), longest)
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
    data = b""
    for quality in QUALITIES:
        file = io.BytesIO()
        small.save(file, "WEBP", quality=quality, method=2)
        data = file.getvalue()
        if len(data) <= max_bytes:
            break
    return data


def shrink(rle: Rle, size_hw: tuple[int, int]) -> Rle:
    """Return a mask at the size of a thumbnail: each pixel is the nearest one of the mask.

    The columns of the mask that hold something are decoded, and no more.

    Raises:
        ValueError: The counts are damaged, or do not fit the size.
    """
    if tuple(rle["size"]) == size_hw:
        return rle
    (full_height, full_width), (height, width) = rle["size"], size_hw
    _, left, crop = decode_crop(rle)
    rows = ((np.arange(height) + 0.5) * full_height / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * full_width / width).astype(np.int64) - left
    inside = (columns >= 0) & (columns < crop.shape[1])
    small = np.zeros(size_hw, np.uint8, order="F")
    small[:, inside] = crop[np.ix_(rows, columns[inside])]
    encoded = coco_mask.encode(small)
    return {"size": [height, width], "counts": encoded["counts"].decode()}
