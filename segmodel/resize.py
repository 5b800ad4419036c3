"""Photos to the network's input on a CPU: scaled, normalised and resized, to the bit as torch does it.

torchvision makes the whole photo float32, normalises it, and then reads at most four of its pixels for
each one of the network's. Here only those are read. What normalising makes of a byte is one of 256
values for each channel.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segmodel.kernels import kernel
from segmodel.masks import fused_multiply_add
from segmodel.schema import Float32, Int64

_HALF, _ZERO, _ONE = np.float32(0.5), np.float32(0), np.float32(1)


class Resizer:
    """Writes photos into the network's input."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tabulate what becomes of each byte.

        Args:
            mean: Of each channel of images in 0..1.
            std: Likewise.
        """
        every_byte = torch.arange(256, dtype=torch.float32).repeat(len(mean), 1)
        every_byte.div_(255).sub_(torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None])
        self._table = every_byte.numpy()

    def write(self, pixels: npt.NDArray[np.uint8], row: Tensor) -> None:
        """Normalise, then resize as `F.interpolate(mode="bilinear", align_corners=False)`.

        The arithmetic is, bit for bit, that of torch on x86 CPUs with AVX2. Runs without the
        interpreter's lock.

        Args:
            pixels: (H, W, 3) uint8.
            row: (3, h, w) float32 on the CPU, of any strides; is written.
        """
        _resize(pixels, self._table, row.numpy())


@kernel
def _sources(length: int, size: int) -> tuple[Int64, Float32]:
    """Return for each of `size` outputs the first of two source pixels, and the second one's weight.

    Mirrors `compute_source_index_and_lambda` of ATen's UpSample.h.
    """
    first, weight = np.empty(size, np.int64), np.empty(size, np.float32)
    scale = np.float32(length) / np.float32(size)
    for i in range(size):
        source = max(fused_multiply_add(scale, np.float32(i) + _HALF, -_HALF), _ZERO)
        first[i] = min(int(source), length - 1)
        weight[i] = min(max(source - np.float32(first[i]), _ZERO), _ONE)
    return first, weight


@kernel
def _resize(pixels: npt.NDArray[np.uint8], table: Float32, out: Float32) -> None:
    """Fill out (3, h, w) from pixels (H, W, 3) by way of table (3, 256).

    The four products are added in the order of ATen's kernel for tensors of few channels; see
    `masks._interpolate`.
    """
    rows, downs = _sources(pixels.shape[0], out.shape[1])
    columns, rights = _sources(pixels.shape[1], out.shape[2])
    for y in range(out.shape[1]):
        down, up = downs[y], _ONE - downs[y]
        upper, lower = pixels[rows[y]], pixels[min(rows[y] + 1, pixels.shape[0] - 1)]
        for x in range(out.shape[2]):
            right, left = rights[x], _ONE - rights[x]
            first, second = columns[x], min(columns[x] + 1, pixels.shape[1] - 1)
            for c in range(3):
                total = table[c, upper[second, c]] * (up * right)
                total = fused_multiply_add(table[c, upper[first, c]], up * left, total)
                total = fused_multiply_add(table[c, lower[first, c]], down * left, total)
                total = fused_multiply_add(table[c, lower[second, c]], down * right, total)
                out[c, y, x] = total
