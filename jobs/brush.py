"""Label Studio's brush masks, by the codec of its own SDK, which is installed only where it is needed."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco

from jobs.detect import InputError
from segmodel.schema import Rle

# Where alpha is the mask: painted is 255, and edges that a browser has smoothed lie between.
_PAINTED = 128
_CHANNELS = 4


class BrushError(ValueError):
    """What is no brush mask of this size."""


Encode: TypeAlias = Callable[[npt.NDArray[np.uint8]], list[int]]
Decode: TypeAlias = Callable[[Sequence[int], tuple[int, int]], Rle]


def encoder(needed_by: str) -> Encode:
    """Return the SDK's `mask2rle`, which takes 255 where a mask is.

    Raises:
        InputError: The SDK is not installed.
    """
    encode: Encode = _codec(needed_by).mask2rle
    return encode


def decoder(needed_by: str) -> Decode:
    """Return what makes a brush mask, of an image's height and width, one of the one schema.

    It raises `BrushError` for what is none, or of another size.

    Raises:
        InputError: The SDK is not installed.
    """
    return partial(_decode, _codec(needed_by))


def _codec(needed_by: str) -> Any:
    """Return the SDK's module; importing it takes seconds, so only what needs it does."""
    try:
        return importlib.import_module("label_studio_sdk.converter.brush")
    except ImportError as error:
        raise InputError(
            f"{needed_by} needs Label Studio's SDK ({error}): pip install 'label-studio-sdk>=2'"
        ) from error


def _decode(codec: Any, values: Sequence[int], size_hw: tuple[int, int]) -> Rle:
    height, width = size_hw
    try:
        data, expected = bytes(values), height * width * _CHANNELS
        # Read here as well, before as much memory is taken as a file says.
        if (number := int.from_bytes(data[:4], "big")) != expected:
            raise BrushError(f"it has {number} values, not {expected}")
        pixels = codec.decode_rle(data)
    except (IndexError, TypeError, ValueError) as error:
        raise BrushError(f"no brush mask of {height} x {width} pixels: {error}") from error
    alpha = pixels.reshape(height, width, _CHANNELS)[..., _CHANNELS - 1]
    found = coco.encode(np.asfortranarray(alpha >= _PAINTED, np.uint8))
    return {"size": [height, width], "counts": found["counts"].decode()}
