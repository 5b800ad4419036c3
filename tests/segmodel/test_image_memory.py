"""What decoding takes at its peak, of the whole process, as the kernel counts it (Linux)."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmodel.headers import Format
from segmodel.images import PEAK_BYTES_PER_PIXEL

SIZE_HW = (1000, 1500)
# For what does not grow with the picture: tables, buffers of a few lines, the allocator's pages.
SLACK = 2 * 2**20

PROGRAM = """
import json, pathlib, sys
from segmodel.images import decode

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

small, data = (pathlib.Path(name).read_bytes() for name in sys.argv[1:])
decode(small)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS:")
image = decode(data)
print(json.dumps([status("VmHWM:") - before, list(image.shape)]))
"""


def picture(size_hw: tuple[int, int]) -> Image.Image:
    grain = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return Image.fromarray(grain).resize(size_hw[::-1], Image.Resampling.BILINEAR)


def saved(image: Image.Image, codec: str, frames: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    if frames > 1:
        options |= {"save_all": True, "append_images": [image.rotate(180)] * (frames - 1)}
    image.copy().save(file, codec, **options)
    return file.getvalue()


# The variant of each format that takes most.
WORST: dict[Format, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: saved(
        image.convert("CMYK"), "JPEG", progressive=True, subsampling=0, quality=95
    ),
    "png": lambda image: saved(image.convert("RGBA"), "PNG", compress_level=1),
    "webp": lambda image: saved(
        image.convert("RGBA"), "WEBP", frames=2, lossless=True, method=0, quality=0
    ),
    "tiff": lambda image: saved(
        image.convert("RGBA"),
        "TIFF",
        compression="tiff_lzw",
        tiffinfo={274: 6, 278: image.height},
    ),
    "bmp": lambda image: saved(image, "BMP"),
    "gif": lambda image: saved(image.quantize(8), "GIF", frames=2, transparency=1),
}


@pytest.mark.parametrize("format_", PEAK_BYTES_PER_PIXEL)
def test_decoding_stays_below_the_stated_bytes_per_pixel(format_: Format, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(WORST[format_](picture((10, 15))))
    large.write_bytes(WORST[format_](picture(SIZE_HW)))
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small), str(large)],
        # So that what is freed is given back, and not used again unseen.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, shape = json.loads(ended.stdout)
    num_pixels = SIZE_HW[0] * SIZE_HW[1]
    assert shape[0] * shape[1] == num_pixels
    bound = PEAK_BYTES_PER_PIXEL[format_] * num_pixels + large.stat().st_size
    # A bound twice as high as need be would be none.
    assert 0.5 * bound < peak < bound + SLACK
