"""RoIAlign for inference on CPUs: torchvision's numbers, to the bit, from channels-last features.

torchvision's kernel goes channel by channel, so that nothing is a vector instruction and each pixel
that it reads is far from the last one. The order of all sums of one output is the same here, and
channels are side by side.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from segmodel.kernels import kernel
from segmodel.schema import Float32, Int64

_HALF, _ZERO, _ONE, _TWO = np.float32(0.5), np.float32(0), np.float32(1), np.float32(2)
_QUARTER = np.float32(0.25)


class RoIPool(nn.Module):
    """What a `MultiScaleRoIAlign` with a sampling ratio of 2 does, faster on a CPU."""

    def __init__(
        self, pooler: MultiScaleRoIAlign, layout: torch.memory_format = torch.channels_last
    ) -> None:
        super().__init__()
        self.layout = layout
        assert pooler.sampling_ratio == 2
        self.names, self.scales = pooler.featmap_names, pooler.scales
        self.side = pooler.output_size[0]
        self.map_levels = pooler.map_levels

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], _sizes: object = None
    ) -> Tensor:
        """Pool.

        Args:
            features: By name, each (B, C, H, W) float32; quickest in channels-last memory.
            boxes: B tensors of boxes, xyxy, pixels of the network's input.

        Returns:
            (P, C, S, S) float32 in memory of `layout`, for the P boxes of all images in their order.
        """
        levels = self.map_levels(boxes).numpy()
        image = np.repeat(np.arange(len(boxes)), [len(some) for some in boxes])
        together = torch.cat(list(boxes)).contiguous().numpy()
        channels = features[self.names[0]].shape[1]
        pooled = np.empty((len(together), self.side, self.side, channels), np.float32)
        for level, name in enumerate(self.names):
            pixels = features[name].permute(0, 2, 3, 1).contiguous().numpy()
            chosen = np.flatnonzero(levels == level)
            _pool(pixels, together, image, chosen, np.float32(self.scales[level]), pooled)
        return torch.from_numpy(pooled).permute(0, 3, 1, 2).contiguous(memory_format=self.layout)


@kernel
def _pool(
    pixels: Float32,
    boxes_xyxy: Float32,
    image: Int64,
    chosen: Int64,
    scale: np.float32,
    pooled: Float32,
) -> None:
    """Fill the rows `chosen` of pooled (P, S, S, C) from pixels (B, H, W, C)."""
    side = pooled.shape[1]
    taps = np.empty((4, 2 * side), np.int64)
    weights = np.empty((4, 2 * side), np.float32)
    for i in chosen:
        _axis(boxes_xyxy[i, 1], boxes_xyxy[i, 3], scale, pixels.shape[1], taps[:2], weights[:2])
        _axis(boxes_xyxy[i, 0], boxes_xyxy[i, 2], scale, pixels.shape[2], taps[2:], weights[2:])
        for y in range(side):
            for x in range(side):
                out = pooled[i, y, x]
                out[:] = _ZERO
                for sample in range(4):
                    v, h = 2 * y + sample // 2, 2 * x + sample % 2
                    _add(
                        pixels[image[i]], taps[:, v], taps[:, h], weights[:, v], weights[:, h], out
                    )
                for c in range(len(out)):
                    out[c] *= _QUARTER


@kernel
def _axis(
    start: np.float32,
    stop: np.float32,
    scale: np.float32,
    size: int,
    taps: Int64,
    weights: Float32,
) -> None:
    """Find the two pixels of each sample of an axis, and their weights; 0 where it lies outside.

    Mirrors `pre_calc_for_bilinear_interpolate` of torchvision's roi_align_common.h.
    """
    first = start * scale
    samples = taps.shape[1]
    length = max(stop * scale - first, _ONE) / np.float32(samples // 2)
    for i in range(samples):
        at = first + np.float32(i // 2) * length
        at += (np.float32(i % 2) + _HALF) * length / _TWO
        inside = at >= -_ONE and at <= np.float32(size)
        at = max(at, _ZERO)
        low = int(at)
        if low >= size - 1:
            low = size - 1
            at = np.float32(low)
        taps[0, i], taps[1, i] = low, min(low + 1, size - 1)
        share = at - np.float32(low)
        weights[0, i] = _ONE - share if inside else _ZERO
        weights[1, i] = share if inside else _ZERO


@kernel
def _add(
    pixels: Float32, rows: Int64, columns: Int64, down: Float32, right: Float32, out: Float32
) -> None:
    """Add one sample of all channels."""
    upper, lower, left, to_right = rows[0], rows[1], columns[2], columns[3]
    a, b = down[0] * right[2], down[0] * right[3]
    c, d = down[1] * right[2], down[1] * right[3]
    p, q = pixels[upper, left], pixels[upper, to_right]
    r, s = pixels[lower, left], pixels[lower, to_right]
    for k in range(len(out)):
        out[k] += a * p[k] + b * q[k] + c * r[k] + d * s[k]
