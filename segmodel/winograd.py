"""3 x 3 convolutions on CPUs with a quarter of the multiplications: Winograd's F(4 x 4, 3 x 3).

Lavin and Gray, https://arxiv.org/abs/1509.09308. An output of 4 x 4 pixels is made from 6 x 6 inputs by 36
products for each pair of channels, instead of 144. The products are matrix products, which torch does;
the transforms before and behind them are sums over a tile, side by side for many channels.

In float32 it errs by about 7e-6 of the largest output, where the direct way errs by 1e-6; bfloat16 alone
rounds by 4e-3.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from segmodel.kernels import inlined, kernel
from segmodel.schema import Float32

# The transform of weights; those of inputs and outputs stand in `_spread` and `_gather`.
_G = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
# Of 64 channels the transforms take what the products save (AMD EPYC of Zen 3, one thread: 51 ms directly,
# 52 ms so, at 200 x 272 pixels); of 128 it is a third quicker, of 256 more than twice.
_LEAST_CHANNELS = 96
# Channels of a tile that are transformed at once: 6 x 6 x 32 float32 are 4.5 KiB, and lie in the first cache.
_BLOCK = 32
_ROW, _TILE = 6 * _BLOCK, 36 * _BLOCK
# Transformed inputs and outputs of this many bytes each are under way: more would leave the caches.
_STRIP_BYTES = 4 * 2**20


def fits(conv: nn.Conv2d) -> bool:
    """Say whether a layer can be done, and whether it pays."""
    return (
        (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
        == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.in_channels % _BLOCK == conv.out_channels % _BLOCK == 0
        and min(conv.in_channels, conv.out_channels) >= _LEAST_CHANNELS
    )


class WinogradConv2d(nn.Module):
    """A convolution of 3 x 3 with stride and padding 1, of float32 on a CPU; perhaps with a ReLU behind."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, *, relu: bool = False) -> None:
        super().__init__()
        assert fits(conv)
        weight = conv.weight.detach().double()
        transformed = torch.einsum("ai,kcij,bj->abck", _G, weight, _G)
        self.register_buffer("weight", transformed.flatten(0, 1).float().contiguous())
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()
        self.register_buffer("bias", bias)
        self.least = np.float32(0 if relu else -np.inf)

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve (N, C, H, W) to (N, K, H, W), quickest in channels-last memory, which it returns."""
        pixels = inputs.permute(0, 2, 3, 1).contiguous().numpy()
        num, height, width, channels = pixels.shape
        outputs = self.weight.shape[2]
        out = torch.empty((num, height, width, outputs))
        tiles = num * math.ceil(height / 4) * math.ceil(width / 4)
        most = max(32, _STRIP_BYTES // (36 * 4 * max(channels, outputs)))
        strip = max(1, min(tiles, most))
        spread, product = torch.empty(36, strip, channels), torch.empty(36, strip, outputs)
        for start in range(0, tiles, strip):
            many = min(strip, tiles - start)
            _spread(pixels, start, many, spread.numpy())
            torch.bmm(spread, self.weight, out=product)
            _gather(product.numpy(), self.bias.numpy(), self.least, start, many, out.numpy())
        return out.permute(0, 3, 1, 2)


@kernel
def _place(tile: int, height: int, width: int) -> tuple[int, int, int]:
    """Return a tile's image, and the row and column of its first output."""
    down, across = (height + 3) // 4, (width + 3) // 4
    image, rest = divmod(tile, down * across)
    return image, 4 * (rest // across), 4 * (rest % across)


# The loops over k below have constant distances between all that they touch, and so become vector
# instructions.


@kernel
def _read(pixels: Float32, top: int, left: int, c: int, tile: Float32) -> None:
    """Read 6 x 6 pixels of pixels (H, W, C) and a block of channels from c on; 0 where none are."""
    height, width, _ = pixels.shape
    for i in range(6):
        for j in range(6):
            y, x, at = top + i, left + j, i * _ROW + j * _BLOCK
            if 0 <= y < height and 0 <= x < width:
                source = pixels[y, x]
                for k in range(_BLOCK):
                    tile[at + k] = source[c + k]
            else:
                for k in range(_BLOCK):
                    tile[at + k] = np.float32(0)


@kernel
def _spread(pixels: Float32, start: int, many: int, spread: Float32) -> None:
    """Transform inputs: pixels (N, H, W, C) to spread (36, many, C), tiles from `start` on."""
    _, height, width, channels = pixels.shape
    tile, other = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for t in range(many):
        image, top, left = _place(start + t, height, width)
        for c in range(0, channels, _BLOCK):
            _read(pixels[image], top - 1, left - 1, c, tile)
            for j in range(6):
                _six_to_six(tile, other, j * _BLOCK, _ROW)
            for i in range(6):
                _six_to_six(other, tile, i * _ROW, _BLOCK)
            for n in range(36):
                target = spread[n, t]
                for k in range(_BLOCK):
                    target[c + k] = tile[n * _BLOCK + k]


@inlined
def _six_to_six(tile: Float32, other: Float32, first: int, step: int) -> None:
    """Apply B transposed to six blocks that are `step` apart."""
    two, four, five = np.float32(2), np.float32(4), np.float32(5)
    for k in range(first, first + _BLOCK):
        a, b, c = tile[k], tile[k + step], tile[k + 2 * step]
        d, e, f = tile[k + 3 * step], tile[k + 4 * step], tile[k + 5 * step]
        other[k] = four * a - five * c + e
        other[k + step] = (e - four * c) + (d - four * b)
        other[k + 2 * step] = (e - four * c) - (d - four * b)
        other[k + 3 * step] = (e - c) + two * (d - b)
        other[k + 4 * step] = (e - c) - two * (d - b)
        other[k + 5 * step] = four * b - five * d + f


@kernel
def _gather(
    product: Float32, bias: Float32, least: np.float32, start: int, many: int, out: Float32
) -> None:
    """Transform outputs: product (36, many, K) to out (N, H, W, K), add the bias, cut below `least`."""
    _, height, width, channels = out.shape
    tile, other = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for t in range(many):
        image, top, left = _place(start + t, height, width)
        for c in range(0, channels, _BLOCK):
            for n in range(36):
                source = product[n, t]
                for k in range(_BLOCK):
                    tile[n * _BLOCK + k] = source[c + k]
            for j in range(6):
                _six_to_four(tile, other, j * _BLOCK, _ROW)
            for i in range(4):
                _six_to_four(other, tile, i * _ROW, _BLOCK)
            _write(tile, bias, least, out[image], (top, left, c))


@kernel
def _write(
    tile: Float32, bias: Float32, least: np.float32, out: Float32, corner: tuple[int, int, int]
) -> None:
    """Write what is inside of out (H, W, K), of 4 x 4 pixels and a block of channels from `corner` on."""
    top, left, c = corner
    for i in range(min(4, out.shape[0] - top)):
        for j in range(min(4, out.shape[1] - left)):
            target, at = out[top + i, left + j], i * _ROW + j * _BLOCK
            for k in range(_BLOCK):
                target[c + k] = max(tile[at + k] + bias[c + k], least)


@inlined
def _six_to_four(tile: Float32, other: Float32, first: int, step: int) -> None:
    """Apply A transposed to six blocks that are `step` apart."""
    two, four, eight = np.float32(2), np.float32(4), np.float32(8)
    for k in range(first, first + _BLOCK):
        a, b, c = tile[k], tile[k + step], tile[k + 2 * step]
        d, e, f = tile[k + 3 * step], tile[k + 4 * step], tile[k + 5 * step]
        other[k] = a + (b + c) + (d + e)
        other[k + step] = (b - c) + two * (d - e)
        other[k + 2 * step] = (b + c) + four * (d + e)
        other[k + 3 * step] = (b - c) + eight * (d - e) + f
