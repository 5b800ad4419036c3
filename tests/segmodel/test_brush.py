"""Brush masks come back as Label Studio's own codec wrote them, and what is none is refused."""

import importlib
import warnings
from typing import Any

import numpy as np
import pytest

from segmodel import rle
from segmodel.brush import BrushError, to_rle


def codec() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("label_studio_sdk.converter.brush")


def masks() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    empty = np.zeros((17, 23), np.uint8)
    ring, corner = empty.copy(), empty.copy()
    ring[3:12, 4:15] = 1
    ring[6:8, 7:10] = 0
    corner[-1, -1] = 1
    return {
        "empty": empty,
        "full": empty + 1,
        "one pixel": corner,
        "a hole": ring,
        "noise": (rng.random((31, 19)) < 0.5).astype(np.uint8),
        "large": (rng.random((300, 400)) < 0.001).astype(np.uint8),
    }


@pytest.mark.parametrize("name", list(masks()))
def test_it_gives_what_the_codec_encoded(name: str) -> None:
    mask = masks()[name]
    encoded = codec().mask2rle(mask * 255)
    height, width = mask.shape
    made = to_rle(encoded, (height, width))
    assert made["size"] == [height, width]
    found = rle.decode(made)
    assert (found == mask).all()
    plain = codec().decode_rle(encoded).reshape(height, width, 4)[..., 3]
    assert ((plain > 127) == found).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rle: rle[:-3], "it is cut off"),
        (lambda rle: [], "it is cut off"),
        (lambda rle: [0, 0, 0, 9, *rle[4:]], "it has 9 values, not 1564"),
        (lambda rle: [300, *rle[1:]], "no brush mask"),
        (lambda rle: ["x"], "no brush mask"),
        (lambda rle: [*rle[:7], *[255] * 40], "go beyond its end"),
    ],
)
def test_what_is_none_is_refused(change: Any, words: str) -> None:
    # 17 x 23 pixels, all painted, as the codec writes it.
    rle = [0, 0, 6, 28, 57, 27, 255, 6, 27, 255, 0]
    with pytest.raises(BrushError, match=words):
        to_rle(change(rle), (17, 23))
