"""Label Studio's brush masks: its run-length encoding of RGBA pixels to COCO's of masks.

https://github.com/HumanSignal/label-studio-sdk/blob/master/src/label_studio_sdk/converter/brush.py has the
codec both ways; its decoder takes a step of Python for each bit, and its package is not needed here.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco

from segmodel.schema import Rle

# Where alpha is the mask: painted is 255, and edges that a browser has smoothed lie between.
_PAINTED = 128
_CHANNELS = 4


class BrushError(ValueError):
    """What is no brush mask of this size."""


def to_rle(values: Sequence[int], size_hw: tuple[int, int]) -> Rle:
    """Return a brush mask in the encoding of the one schema.

    Args:
        values: Bytes of the encoding.
        size_hw: Height and width of the image.

    Raises:
        BrushError: They are none, or of another size.
    """
    height, width = size_hw
    try:
        reader = _Bits(np.array(values, np.uint8))
        pixels = _pixels(reader, height * width * _CHANNELS)
    except (OverflowError, TypeError, ValueError) as error:
        raise BrushError(f"no brush mask of {height} x {width} pixels: {error}") from error
    alpha = pixels.reshape(height, width, _CHANNELS)[..., _CHANNELS - 1]
    found = coco.encode(np.asfortranarray(alpha >= _PAINTED, np.uint8))
    return {"size": [height, width], "counts": found["counts"].decode()}


class _Bits:
    """Bytes, read as numbers of any count of bits, the highest bit first."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._bits = np.unpackbits(data)
        self._at = 0

    def take(self, count: int, width: int = 1) -> npt.NDArray[np.int64]:
        """Read `count` numbers of `width` bits."""
        end = self._at + count * width
        if end > len(self._bits):
            raise ValueError("it is cut off")
        bits = self._bits[self._at : end].reshape(count, width).astype(np.int64)
        self._at = end
        found: npt.NDArray[np.int64] = bits @ (1 << np.arange(width - 1, -1, -1))
        return found

    def number(self, width: int) -> int:
        """Read one number of `width` bits."""
        return int(self.take(1, width)[0])


def _pixels(bits: _Bits, expected: int) -> npt.NDArray[np.uint8]:
    num_values = bits.number(32)
    if num_values != expected:
        raise ValueError(f"it has {num_values} values, not {expected}")
    word = bits.number(5) + 1
    widths = [bits.number(4) + 1 for _ in range(4)]
    pixels = np.zeros(num_values, np.uint8)
    start = 0
    while start < num_values:
        is_run = bits.number(1)
        length = bits.number(widths[bits.number(2)]) + 1
        stop = start + length
        if stop > num_values:
            raise ValueError("its runs go beyond its end")
        pixels[start:stop] = bits.take(1 if is_run else length, word)
        start = stop
    return pixels
