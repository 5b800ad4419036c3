"""RoIAlign on CPUs as one sparse matrix product.

Each output is a weighted sum of at most 16 pixels: two by two samples, each between four pixels
(He et al., https://arxiv.org/abs/1703.06870, as torchvision's kernel computes it). So the features of
all levels and images, one pixel a row, are multiplied by a sparse matrix, and gradients by its
transpose. torchvision's kernel goes channel by channel, without vector instructions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

SAMPLES = 2  # in each direction of a bin: the `sampling_ratio` of torchvision's models
TAPS = (2 * SAMPLES) ** 2


def pool(
    pooler: MultiScaleRoIAlign, features: Mapping[str, Tensor], boxes_xyxy: Sequence[Tensor]
) -> Tensor:
    """Do what `pooler` does, faster on a CPU.

    Args:
        pooler: With the scales of the levels set, as `model.mask_rcnn` sets them.
        features: By name, each (B, C, H, W) float32.
        boxes_xyxy: B tensors of boxes, pixels of the network's input.

    Returns:
        (P, C, S, S) float32 in channels-last memory, for the P boxes of all images in their order.
    """
    levels = [features[name] for name in pooler.featmap_names]
    side = pooler.output_size[0]
    num_images, channels = levels[0].shape[:2]
    pixels = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in levels])
    boxes = torch.cat(list(boxes_xyxy))
    counts = torch.tensor([len(some) for some in boxes_xyxy])
    image = torch.repeat_interleave(torch.arange(num_images), counts)
    level = pooler.map_levels(list(boxes_xyxy))
    sizes = torch.tensor([tensor.shape[2:] for tensor in levels])
    starts = torch.cat([sizes.new_zeros(1), (num_images * sizes.prod(dim=1)).cumsum(0)])

    scaled = boxes * torch.tensor(pooler.scales)[level, None]
    size_hw = sizes[level]
    rows, row_weights = _taps(scaled[:, 1], scaled[:, 3], size_hw[:, 0], side)
    columns, column_weights = _taps(scaled[:, 0], scaled[:, 2], size_hw[:, 1], side)
    # (P, S, S, row taps, column taps), flattened to a row of TAPS entries for each output.
    first = starts[level] + image * size_hw.prod(dim=1)
    rows = first[:, None, None] + rows * size_hw[:, 1, None, None]
    index = (rows[:, :, None, :, None] + columns[:, None, :, None, :]).reshape(-1, TAPS)
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    pooled: Tensor = _WeightedSums.apply(pixels, index, weights.reshape(-1, TAPS))
    return pooled.view(len(boxes), side, side, channels).permute(0, 3, 1, 2)


def _taps(start: Tensor, stop: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Pixels that the bins of an axis read, and their weights: each (P, S, 2 * SAMPLES).

    Args:
        start: (P,) float32, where boxes begin on the axis, in pixels of their level.
        stop: (P,) float32, where they end.
        size: (P,) int64, pixels of the level on this axis.
        side: S, bins.
    """
    bin_size = (stop - start).clamp(min=1) / side
    places = (torch.arange(side * SAMPLES) + 0.5) / SAMPLES
    at = start[:, None] + bin_size[:, None] * places
    last = size[:, None] - 1
    inside = (at >= -1) & (at <= size[:, None])
    at = at.clamp(min=0)
    low = at.long().clamp(max=last)
    high = (low + 1).clamp(max=last)
    share = torch.where(low < last, at - low, 0.0)
    scale = inside / SAMPLES
    weights = torch.stack([(1 - share) * scale, share * scale], dim=-1)
    index = torch.stack([low, high], dim=-1)
    return index.view(-1, side, 2 * SAMPLES), weights.view(-1, side, 2 * SAMPLES)


class _WeightedSums(torch.autograd.Function):
    """Row i of the output is the sum over t of weights[i, t] * pixels[index[i, t]]."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(index, weights)
        ctx.num_pixels = len(pixels)
        return torch.nn.functional.embedding_bag(
            index, pixels, per_sample_weights=weights, mode="sum"
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, weights = ctx.saved_tensors
        # The transpose: entries by pixel instead of by output.
        columns, order = index.view(-1).sort(stable=True)
        starts = torch.searchsorted(columns, torch.arange(ctx.num_pixels))
        per_pixel = torch.nn.functional.embedding_bag(
            order // TAPS,
            grad.contiguous(),
            starts,
            per_sample_weights=weights.view(-1)[order],
            mode="sum",
        )
        return per_pixel, None, None
