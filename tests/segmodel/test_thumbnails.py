import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segmodel import thumbnails
from segmodel.rle import decode


def encoded(mask: np.ndarray) -> thumbnails.Rle:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((256, 320), (256, 320)),
        ((3000, 4000), (480, 640)),
        ((4000, 1), (640, 1)),
        ((641, 641), (640, 640)),
    ],
)
def test_size(size_hw: tuple[int, int], expected: tuple[int, int]) -> None:
    assert thumbnails.size_of(size_hw) == expected


def test_noise_fits_into_the_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (960, 1280, 3), np.uint8)
    data = thumbnails.encode(noise)
    assert len(data) <= thumbnails.MAX_BYTES
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("WEBP", (640, 480))


@pytest.mark.parametrize("kind", ["empty", "full", "pixel", "border", "random"])
def test_a_mask_shrinks_as_by_its_nearest_pixels(kind: str) -> None:
    rng = np.random.default_rng(1)
    mask = np.zeros((90, 70), np.bool_)
    if kind == "full":
        mask[:] = True
    elif kind == "pixel":
        mask[45, 35] = True
    elif kind == "border":
        mask[:, 60:] = True
    elif kind == "random":
        mask = rng.random((90, 70)) < 0.3
    rows, columns = (np.arange(45) * 2 + 1), (np.arange(35) * 2 + 1)
    small = thumbnails.shrink(encoded(mask), (45, 35))
    assert small["size"] == [45, 35]
    np.testing.assert_array_equal(decode(small), mask[np.ix_(rows, columns)])
    same = encoded(mask)
    assert thumbnails.shrink(same, (90, 70)) is same


def test_a_damaged_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="do not describe"):
        thumbnails.shrink({"size": [9, 9], "counts": "11"}, (4, 4))
