"""Samples for the tests of training: synthetic scenes, small."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from segmodel import scenes
from segmodel.bundle import Bundle
from segmodel.initial import random_bundle
from segmodel.settings import ModelSettings
from segmodel.targets import Crop, Sample, tight

LABELS = {category.id: category.label for category in scenes.CATEGORIES}
SIZE_HW = (64, 96)


@cache
def sample(seed: int, size_hw: tuple[int, int] = SIZE_HW) -> Sample:
    """A scene, with nothing in it for some seeds."""
    scene = scenes.scene(seed, size_hw)
    crops = [tight(0, 0, mask) for mask in scene.masks]
    return Sample(
        image_id=f"scenes#{seed}",
        image=scene.image,
        labels=np.array([LABELS[i] for i in scene.category_ids], np.int64),
        masks=tuple(crop for crop in crops if crop is not None),
        crowds_xyxy=np.zeros((0, 4), np.float32),
    )


@cache
def bundle(seed: int = 3) -> Bundle:
    """The small network with random weights, for scenes of `SIZE_HW` as they are."""
    settings = ModelSettings(
        arch="small", num_classes=1 + len(scenes.CATEGORIES), min_size=64, max_size=96
    )
    return random_bundle(settings, scenes.CATEGORIES, seed)


def full_mask(crop: Crop, size_hw: tuple[int, int]) -> Tensor:
    """(H, W) uint8."""
    mask = np.zeros(size_hw, np.uint8)
    height, width = crop.mask.shape
    mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
    return torch.from_numpy(mask)


def as_torchvision(one: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """An image in 0..1 and a target, as torchvision's models take them."""
    size_hw = one.image.shape[:2]
    masks = [full_mask(crop, size_hw) for crop in one.masks]
    target = {
        "boxes": torch.from_numpy(one.boxes_xyxy),
        "labels": torch.from_numpy(one.labels),
        "masks": torch.stack(masks) if masks else torch.zeros((0, *size_hw), dtype=torch.uint8),
    }
    # A flipped image is a view with negative strides, which torch does not take.
    return torch.from_numpy(np.ascontiguousarray(one.image)).permute(2, 0, 1) / 255, target
