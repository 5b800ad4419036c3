"""Bundles of random weights that find many different things, and images to find them in."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList

from segmodel.bundle import Bundle
from segmodel.initial import numbered_categories
from segmodel.model import mask_rcnn
from segmodel.settings import Architecture, ModelSettings

Image = npt.NDArray[np.uint8]
MakeBundle = Callable[..., Bundle]
MakeImage = Callable[..., Image]

NAMES = ("ant", "bee", "cow", "dog")
# Ids with gaps, not in the order of the labels.
CATEGORIES = numbered_categories([(70 - 7 * n, name) for n, name in enumerate(NAMES)])


def _enliven(model: MaskRCNN) -> None:
    """Make random weights give detections of every class and score, and masks of every shape.

    The backbone's running statistics become those of blotches, so that features neither vanish nor
    explode, and the outputs of the last layers are spread.
    """
    for module in model.backbone.body.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    blotches = functional.interpolate(torch.randn(8, 3, 5, 5), (96, 96))
    blotches += torch.randn(8, 3, 96, 96) / 4
    model.backbone.body(blotches)
    model.eval()
    features = model.backbone(blotches[:2])
    sizes = [(96, 96)] * 2
    hidden = model.rpn.head.conv(features["0"])
    _spread(model.rpn.head.cls_logits, hidden, 2)
    _spread(model.rpn.head.bbox_pred, hidden, 0.3)
    proposals, _ = model.rpn(ImageList(blotches[:2], sizes), features)
    rois = [boxes[::50] for boxes in proposals]
    heads = model.roi_heads
    box_hidden = heads.box_head(heads.box_roi_pool(features, rois, sizes))
    _spread(heads.box_predictor.cls_score, box_hidden, 1)
    _spread(heads.box_predictor.bbox_pred, box_hidden, 1)
    mask_hidden = heads.mask_head(heads.mask_roi_pool(features, rois, sizes))
    mask_hidden = heads.mask_predictor.relu(heads.mask_predictor.conv5_mask(mask_hidden))
    _spread(heads.mask_predictor.mask_fcn_logits, mask_hidden, 2)


def _spread(layer: nn.Linear | nn.Conv2d, inputs: Tensor, std: float) -> None:
    """Give a layer random weights with which its outputs have mean 0 and this deviation."""
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    outputs = layer(inputs).movedim(1, -1).flatten(end_dim=-2)
    scale = std / float((outputs - outputs.mean(dim=0)).std())
    layer.weight.mul_(scale)
    layer.bias.copy_(-scale * outputs.mean(dim=0))


@cache
def lively_weights(arch: Architecture, num_classes: int) -> Mapping[str, Tensor]:
    """Return random weights that find many different things."""
    settings = ModelSettings(arch=arch, num_classes=num_classes, min_size=64, max_size=96)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        model = mask_rcnn(settings).eval()
        _enliven(model)
    return dict(model.state_dict())


@pytest.fixture(scope="session")
def lively() -> MakeBundle:
    """`lively(arch, num_classes, min_size, max_size)`: a bundle that finds many things."""

    def make(arch: Architecture, num_classes: int, min_size: int, max_size: int) -> Bundle:
        return Bundle(
            settings=ModelSettings(
                arch=arch, num_classes=num_classes, min_size=min_size, max_size=max_size
            ),
            categories=CATEGORIES[: num_classes - 1],
            weights=lively_weights(arch, num_classes),
            score_threshold=0.02,
            max_detections=30,
        )

    return make


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Where cores are shared, two threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def image() -> MakeImage:
    """`image(height, width, seed)`: an image of coloured blocks, noise over them."""

    def make(height: int, width: int, seed: int = 0) -> Any:
        rng = np.random.default_rng((seed, height, width))
        blocks = rng.integers(0, 256, (4, 5, 3))
        rows = np.arange(height) * 4 // height
        columns = np.arange(width) * 5 // width
        noise = rng.integers(-30, 31, (height, width, 3))
        return (blocks[rows][:, columns] + noise).clip(0, 255).astype(np.uint8)

    return make
