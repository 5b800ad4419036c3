"""The photos that the accelerator's benchmark predicts: all of one size, of COCO's sizes, and of 12 megapixels."""

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from PIL import Image

from segmodel.images import MAX_PIXELS, Picture, decode_reduced
from segmodel.scenes import scene
from segmodel.settings import Decode, ModelSettings, network_size

UNIFORM_HW, LARGE_HW = (800, 1333), (3000, 4000)
# Height and width of a hundred photos of COCO 2017, and how many have them.
COCO_HW = {
    **{(480, 640): 29, (427, 640): 9, (640, 480): 7, (426, 640): 4, (640, 427): 4, (428, 640): 3},
    **{(425, 640): 2, (375, 500): 2, (481, 640): 2},
    **dict.fromkeys(
        [
            *((640, 481), (478, 640), (500, 381), (488, 640), (640, 565), (612, 612), (640, 512)),
            *((416, 640), (640, 416), (374, 500), (573, 640), (500, 600), (536, 640), (424, 640)),
            *((333, 500), (640, 591), (640, 428), (600, 600), (491, 640), (327, 640), (218, 640)),
            *((332, 500), (640, 446), (611, 640), (580, 640), (640, 638), (640, 426), (640, 359)),
            *((360, 640), (389, 640), (640, 516), (226, 640), (500, 333), (406, 640), (495, 500)),
            *((313, 500), (640, 360), (336, 448)),
        ],
        1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Encoded photos.

    Attributes:
        name: What they are.
        files: JPEGs.
        decode: Whether the job's `--decode reduced` is to be used.
    """

    name: str
    files: list[bytes]
    decode: Decode = "full"

    @property
    def label(self) -> str:
        return self.name if self.decode == "full" else f"{self.name}, --decode {self.decode}"

    def decoder(self, settings: ModelSettings) -> Callable[[bytes], Picture]:
        """Return what decodes one of them for a network."""
        needed = None if self.decode == "full" else partial(network_size, settings)
        return lambda file: decode_reduced(file, MAX_PIXELS, needed)


def kinds(count: int, large: int, shrink: int) -> Iterator[Photos]:
    """Yield all kinds.

    Args:
        count: Photos of the first two kinds.
        large: Photos of 12 megapixels.
        shrink: Divides all sides, for toy sizes.
    """
    sizes = random.Random(0).choices(list(COCO_HW), list(COCO_HW.values()), k=count)
    yield _drawn("{}x{}", [UNIFORM_HW] * count, shrink)
    yield Photos(name="COCO's sizes", files=_drawn("", sizes, shrink).files)
    whole = _drawn("{}x{}", [LARGE_HW] * large, shrink)
    yield whole
    yield Photos(name=whole.name, files=whole.files, decode="reduced")


def _drawn(name: str, sizes: list[tuple[int, int]], shrink: int) -> Photos:
    sizes = [(height // shrink, width // shrink) for height, width in sizes]
    files = [_jpeg(number, size_hw) for number, size_hw in enumerate(sizes)]
    return Photos(name=name.format(*sizes[0]), files=files)


def _jpeg(seed: int, size_hw: tuple[int, int]) -> bytes:
    # Drawing 12 megapixels takes seconds; enlarging does not.
    image = Image.fromarray(scene(seed, (480, 640)).image)
    file = io.BytesIO()
    image.resize(size_hw[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()
