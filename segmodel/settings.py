"""What makes a network, without its weights; no torch in here, so that it is quick to import."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["auto", "fp32", "bf16", "fp16"]
# fp32-fast: other convolutions, so other roundings.
InferencePrecision = Literal["auto", "fp32", "fp32-fast", "bf16", "fp16"]
# What a mask is trained to be: in torchvision's way, what lies in its box; or what pasting shows best. It
# takes the box from the pixel where it begins to the pixel where it ends, both included, and so spreads a
# mask over half a pixel more at each side, on average: see `losses._spread`.
MaskTargets = Literal["torchvision", "pasted"]
# reduced: JPEGs far larger than the network's input are scaled down while they are decoded.
Decode = Literal["full", "reduced"]
Norm = Literal["batch", "frozen"]
Architecture = Literal["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "small"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
# Of which trained weights have shown it: AP of fp32-fast is that of fp32 within 0.2 (README, "Measured").
PROVED_FAST: frozenset[Architecture] = frozenset({"maskrcnn_resnet50_fpn", "small"})

# Shorter side, longer side, in pixels: torchvision's for the large ones; the small one is for
# laptops, and its cost grows with the area.
DEFAULT_SIZES: Mapping[Architecture, tuple[int, int]] = {
    "maskrcnn_resnet50_fpn": (800, 1333),
    "maskrcnn_resnet50_fpn_v2": (800, 1333),
    "small": (320, 640),
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What makes a network, without its weights.

    Attributes:
        arch: One of `ARCHITECTURES`.
        num_classes: Outputs of the heads, background (0) included.
        min_size: An image is scaled so that its shorter side has this many pixels ...
        max_size: ... unless its longer side would have more than this many.
        image_mean: RGB, of images in 0..1.
        image_std: RGB, of images in 0..1.
        norm: `batch` keeps running statistics in the backbone, `frozen` has constants.
        norm_eps: Added to the variance in the backbone. torchvision's COCO_V1 weights want 0.

    Raises:
        ValueError: A value is out of its range.
    """

    arch: Architecture
    num_classes: int
    min_size: int
    max_size: int
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    norm: Norm = "batch"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.arch!r}: use {', '.join(ARCHITECTURES)}")
        if self.num_classes < 2:
            raise ValueError("num_classes counts background too, so it must be 2 or more")
        if not 32 <= self.min_size <= self.max_size:
            raise ValueError(
                f"min_size ({self.min_size}) must be 32 or more, and at most max_size ({self.max_size})"
            )
        if self.norm not in get_args(Norm):
            raise ValueError(f"unknown norm {self.norm!r}: use {' or '.join(get_args(Norm))}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must be 0 or more, not {self.norm_eps}")
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"image_std must be more than 0, not {self.image_std}")


def network_size(settings: ModelSettings, size_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width to which the network scales an image, before padding.

    The arithmetic of torchvision's `_resize_image_and_masks`, with at least one pixel: torchvision
    fails on an image of 1 x 3000.
    """
    height, width = size_hw
    scale = min(settings.min_size / min(size_hw), settings.max_size / max(size_hw))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def resolved(
    precision: InferencePrecision, device_type: str, arch: Architecture
) -> InferencePrecision:
    """Return what `auto` stands for: the quickest that was proved to keep AP within 0.2.

    On CPUs that is `fp32-fast` for the architectures that it was proved for. On GPUs nothing but fp32
    has been measured.

    Args:
        precision: As it was asked for.
        device_type: `cpu` or `cuda`.
        arch: Of the network.

    Raises:
        ValueError: It is unknown.
    """
    if precision == "auto":
        return "fp32-fast" if device_type == "cpu" and arch in PROVED_FAST else "fp32"
    if precision not in get_args(InferencePrecision):
        known = ", ".join(get_args(InferencePrecision))
        raise ValueError(f"unknown precision {precision!r}: use {known}")
    return precision
