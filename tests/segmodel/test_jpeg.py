"""JPEGs through libjpeg-turbo's own interface: Pillow's pixels, reduced ones, and what is left to Pillow."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmodel import images
from segmodel.images import decode
from tests.segmodel.test_images import SAMPLES, kind, orientation, save

JPEGS = [
    {"quality": quality, **more}
    for quality in (30, 92)
    for more in (
        *({"subsampling": n} for n in (0, 1, 2)),
        {"progressive": True},
        {"subsampling": 0, "keep_rgb": True},
        {"restart_marker_blocks": 3},
    )
]


def blotches(size_hw: tuple[int, int]) -> Image.Image:
    """Smooth colours with some noise, of which a photo's blocks are made too."""
    rng = np.random.default_rng(size_hw)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize(size_hw[::-1], Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-20, 21, smooth.shape, np.int16)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("options", JPEGS, ids=str)
@pytest.mark.parametrize("size_hw", [(48, 64), (37, 51), (1, 1), (5, 90)])
def test_turbo_gives_the_pixels_of_pillow(
    options: dict[str, Any], size_hw: tuple[int, int]
) -> None:
    picture = blotches(size_hw)
    for image in (picture, picture.convert("L")) if "keep_rgb" not in options else (picture,):
        data = save(image, "JPEG", **options)
        header = images.headers.jpeg(data)
        found = images._turbo(header, 1)
        assert found is not None
        np.testing.assert_array_equal(found, Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(found, decode(data))


def test_turbo_leaves_to_pillow_what_it_has_a_word_to_say_about() -> None:
    whole = save(blotches((48, 64)), "JPEG")
    cut = whole[: len(whole) * 6 // 10]
    # Before the end of the picture are bytes that belong to nothing: Pillow reads on.
    padded = whole[:-2] + bytes(20) + whole[-2:]
    for data in (SAMPLES["jpeg_cmyk"], cut, padded):
        assert images._turbo(images.headers.jpeg(data), 1) is None
    assert kind(cut) == "truncated"
    np.testing.assert_array_equal(decode(padded), decode(whole))


def test_a_large_jpeg_may_be_reduced_while_it_is_decoded() -> None:
    picture = blotches((93, 160))
    data = save(picture, "JPEG", quality=95, subsampling=0, exif=orientation(6))

    def reduced(height: int, width: int) -> images.Picture:
        return images.decode_reduced(data, 93 * 160, lambda _: (height, width))

    for needed, size_hw in {
        (160, 93): (160, 93),
        (81, 40): (160, 93),
        (80, 46): (80, 47),
        (40, 47): (160, 93),
        (40, 23): (40, 24),
        (2, 2): (20, 12),
    }.items():
        found = reduced(*needed)
        assert found.pixels.shape == (*size_hw, 3)
        assert found.size_hw == (160, 93)
        assert min(have - want for have, want in zip(size_hw, needed, strict=True)) >= 0
    # What it shows is the mean of what it stands for; the file's last row, at the left, is alone.
    whole, half = decode(data).astype(int), reduced(80, 46).pixels.astype(int)
    means = whole[:, 1:].reshape(80, 2, 46, 2, 3).mean((1, 3))
    assert np.abs(half[:, 1:] - means).mean() < 3


def test_only_jpegs_are_reduced() -> None:
    found = images.decode_reduced(SAMPLES["png"], 24 * 40, lambda _: (2, 2))
    assert (found.pixels.shape, found.size_hw) == ((24, 40, 3), (24, 40))
    cmyk = images.decode_reduced(SAMPLES["jpeg_cmyk"], 24 * 40, lambda _: (2, 2))
    assert (cmyk.pixels.shape, cmyk.size_hw) == ((24, 40, 3), (24, 40))
