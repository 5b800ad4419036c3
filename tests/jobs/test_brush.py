"""Brush masks go through Label Studio's own codec and come back, and what is none is refused."""

import warnings
from typing import Any

import numpy as np
import pytest

from jobs import brush
from jobs.brush import BrushError, Decode
from segmodel import rle


@pytest.fixture(scope="module")
def decode() -> Decode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return brush.decoder("this test")


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
def test_masks_come_back(name: str, decode: Decode) -> None:
    mask = masks()[name]
    height, width = mask.shape
    made = decode(brush.encoder("this test")(mask * 255), (height, width))
    assert made["size"] == [height, width]
    assert (rle.decode(made) == mask).all()


# 17 x 23 pixels, all painted, as the codec writes it; what a browser has smoothed is a mask from 128 on.
PAINTED = [0, 0, 6, 28, 57, 27, 255, 6, 27, 255, 0]


@pytest.mark.parametrize(("alpha", "is_mask"), [(127, False), (128, True)])
def test_smoothed_edges(alpha: int, is_mask: bool, decode: Decode) -> None:
    mask = np.full((5, 7), alpha, np.uint8)
    made = decode(brush.encoder("this test")(mask), (5, 7))
    assert (rle.decode(made) == is_mask).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rle: rle[:-3], "no brush mask of 17 x 23 pixels"),
        (lambda rle: [], "it has 0 values, not 1564"),
        (lambda rle: [0, 0, 0, 9, *rle[4:]], "it has 9 values, not 1564"),
        (lambda rle: [300, *rle[1:]], "no brush mask"),
        (lambda rle: ["x"], "no brush mask"),
        (lambda rle: [*rle[:6], 0, *rle[7:]], "no brush mask"),
    ],
)
def test_what_is_none_is_refused(change: Any, words: str, decode: Decode) -> None:
    assert rle.decode(decode(PAINTED, (17, 23))).all()
    with pytest.raises(BrushError, match=words):
        decode(change(PAINTED), (17, 23))
