"""A loaded network made quicker for inference, in place.

`lower` changes the arithmetic a little, `keep_exact` not by a bit. What they gain is in the README.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from segmodel.roi_pool import RoIPool
from segmodel.winograd import WinogradConv2d, fits


class ClassMasks(nn.Module):
    """torchvision's `MaskRCNNPredictor`, for the one class of each instance instead of all.

    The transposed convolution of 2 x 2 with a stride of 2 is a matrix product for each pixel.
    """

    weight: Tensor
    bias: Tensor
    class_weight: Tensor
    class_bias: Tensor

    def __init__(self, predictor: MaskRCNNPredictor) -> None:
        super().__init__()
        upscale, logits = predictor.conv5_mask, predictor.mask_fcn_logits
        self.register_buffer("weight", upscale.weight.detach().permute(0, 2, 3, 1).flatten(1))
        self.register_buffer("bias", upscale.bias.detach().repeat(4))
        self.register_buffer("class_weight", logits.weight.detach()[:, :, 0, 0])
        self.register_buffer("class_bias", logits.bias.detach())

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the logits (N, 2 M, 2 M) of hidden (N, C, M, M) and labels (N,)."""
        num, channels, side, _ = hidden.shape
        pixels = hidden.permute(0, 2, 3, 1).reshape(-1, channels)
        upscaled = torch.addmm(self.bias, pixels, self.weight).relu_()
        upscaled = upscaled.view(num, side * side * 4, self.class_weight.shape[1])
        found = torch.bmm(upscaled, self.class_weight[labels][:, :, None])
        found = found.view(num, side, side, 2, 2) + self.class_bias[labels].view(-1, 1, 1, 1, 1)
        return found.permute(0, 1, 3, 2, 4).reshape(num, 2 * side, 2 * side)


class InDtype(nn.Module):
    """A part of the network that works in a dtype of its own, between float32 and float32."""

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.dtype = part.to(dtype), dtype

    def forward(self, features: Tensor | list[Tensor], *more: Tensor) -> Any:
        """Call the part with features in its dtype; what it returns becomes float32."""
        if isinstance(features, Tensor):
            return self.part(features.to(self.dtype), *more).float()
        found = self.part([feature.to(self.dtype) for feature in features], *more)
        return tuple([one.float() for one in some] for some in found)


class AllMasks(nn.Module):
    """torchvision's `MaskRCNNPredictor` as it is, of whose logits one class is taken."""

    def __init__(self, predictor: MaskRCNNPredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the logits (N, 2 M, 2 M) of hidden (N, C, M, M) and labels (N,)."""
        logits = self.predictor(hidden)
        return cast("Tensor", logits[torch.arange(len(labels), device=labels.device), labels])


def keep_exact(model: MaskRCNN, device: torch.device) -> None:
    """Make quicker what can be without another result: on CPUs, RoIAlign."""
    heads = model.roi_heads
    heads.mask_predictor = AllMasks(heads.mask_predictor)
    # Of channels-last inputs a convolution adds in another order.
    _pool_on_cpu(model, device, torch.contiguous_format)


def lower(
    model: MaskRCNN, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> None:
    """Fold BatchNorm into the convolutions, lay channels last, compute masks of one class only.

    In float32 on a CPU, large convolutions of 3 x 3 become Winograd's, unless they are to be compiled.

    Args:
        model: In evaluation mode, its weights loaded, on the CPU.
        dtype: Of convolutions and of what is done for each box and mask. RoIAlign, the last layer of the box
            head and non-maximum suppression stay float32.
        device: Where the model will run.
        compiled: Have `torch.compile` make one program of each part, for all sizes, when it is called first.
    """
    fold_batch_norm(model)
    heads = model.roi_heads
    heads.mask_predictor = ClassMasks(heads.mask_predictor)
    for part in (model.backbone, model.rpn.head, heads.box_head, heads.mask_head):
        part.to(memory_format=torch.channels_last)
        if device.type == "cpu" and dtype == torch.float32 and not compiled:
            _use_winograd(part)
    model.backbone.to(dtype)
    if dtype != torch.float32:
        model.rpn.head = InDtype(model.rpn.head, dtype)
        heads.box_head = InDtype(heads.box_head, dtype)
        heads.mask_head = InDtype(heads.mask_head, dtype)
        heads.mask_predictor = InDtype(heads.mask_predictor, dtype)
    _pool_on_cpu(model, device, torch.channels_last)
    if compiled:
        # What lies between them chooses boxes, and so waits for the device anyhow.
        parts = (model.backbone, model.rpn.head, heads.box_head, heads.mask_head)
        for part in (*parts, heads.mask_predictor):
            part.compile(dynamic=True)


def fold_batch_norm(module: nn.Module) -> None:
    """Scale each convolution by the normalisation that stands behind it, and take that away.

    In all architectures here, a module's children are named in the order in which they are called.
    """
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d | FrozenBatchNorm2d):
            assert isinstance(before, nn.Conv2d)
            norm: Any = child
            assert before.out_channels == len(norm.running_mean)
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight, before.bias, *statistics
            )
            setattr(module, name, nn.Identity())
        else:
            fold_batch_norm(child)
        before = child


def _use_winograd(module: nn.Module) -> None:
    """Replace what `winograd.fits` below a module, with the ReLU behind it where one stands there."""
    children = list(module.named_children())
    for (name, child), (after, behind) in zip(children, [*children[1:], ("", None)], strict=False):
        if not (isinstance(child, nn.Conv2d) and fits(child)):
            _use_winograd(child)
            continue
        # Only a `Sequential` says who comes next.
        relu = isinstance(module, nn.Sequential) and isinstance(behind, nn.ReLU)
        setattr(module, name, WinogradConv2d(child, relu=relu))
        if relu:
            setattr(module, after, nn.Identity())


def _pool_on_cpu(model: MaskRCNN, device: torch.device, layout: torch.memory_format) -> None:
    if device.type == "cpu":
        heads = model.roi_heads
        heads.box_roi_pool = RoIPool(heads.box_roi_pool, layout)
        heads.mask_roi_pool = RoIPool(heads.mask_roi_pool, layout)
