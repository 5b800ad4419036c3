"""The architectures: settings in, a Mask R-CNN (He et al., https://arxiv.org/abs/1703.06870) out.

All three are torchvision's `MaskRCNN` module: backbone with feature pyramid, region proposal
network, RoIAlign, class and box head, and one binary mask for each instance and class.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import (
    MaskRCNN,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from segmodel.settings import ModelSettings

# The small one: features of MobileNetV3-Large after its 14th block. The 15th block and the last
# convolution hold a third of the weights and bring it over 16 MB; 96 channels and a 192-wide box
# head make 3.8 million weights, 15 MB in float32.
SMALL_LAYERS = {"3": "0", "6": "1", "12": "2", "14": "3"}
SMALL_LAYER_CHANNELS = [24, 40, 112, 160]
SMALL_CHANNELS = 96
SMALL_BOX_WIDTH = 192
# As torchvision. 300, three for each detection that may be kept, took a third less time, and lost
# where objects are dense: mask AP50 0.596 instead of 0.617 on pictures with 52 nuclei on average.
SMALL_PROPOSALS = 1000
SMALL_PROPOSALS_IN_TRAINING = 500
# torchvision's 0.01 is for ImageNet's 100,000s of steps. After hundreds, statistics would be those of
# weights long gone: at a third of a training of 900 steps the validation AP was still 0.
SMALL_NORM_MOMENTUM = 0.1
SMALL_ANCHORS = (16, 32, 64, 128, 256)

# Image pixels per pixel of the features that RoIAlign reads are 2 to these powers.
FIRST_POOLED_LEVEL, LAST_POOLED_LEVEL = 2, 5


def mask_rcnn(settings: ModelSettings) -> MaskRCNN:
    """Build the network with random weights from torch's global generator.

    The detection thresholds are torchvision's; `inference.Predictor` sets its own.
    """
    transform = {
        "min_size": settings.min_size,
        "max_size": settings.max_size,
        "image_mean": list(settings.image_mean),
        "image_std": list(settings.image_std),
    }
    match settings.arch:
        case "maskrcnn_resnet50_fpn":
            model = maskrcnn_resnet50_fpn(
                weights=None, weights_backbone=None, num_classes=settings.num_classes, **transform
            )
        case "maskrcnn_resnet50_fpn_v2":
            model = maskrcnn_resnet50_fpn_v2(
                weights=None, weights_backbone=None, num_classes=settings.num_classes, **transform
            )
        case "small":
            model = _small(settings.num_classes, transform)
    if settings.norm == "frozen":
        _freeze_batch_norm(model.backbone.body)
    for module in model.backbone.body.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.eps = settings.norm_eps
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        _set_scales(pool)
    return model


def _small(num_classes: int, transform: Mapping[str, Any]) -> MaskRCNN:
    features = mobilenet_v3_large(
        weights=None, norm_layer=partial(nn.BatchNorm2d, momentum=SMALL_NORM_MOMENTUM)
    ).features
    backbone = BackboneWithFPN(
        nn.Sequential(*list(features)[: int(max(SMALL_LAYERS, key=int)) + 1]),
        SMALL_LAYERS,
        SMALL_LAYER_CHANNELS,
        SMALL_CHANNELS,
    )
    aspect_ratios = (0.5, 1.0, 2.0)
    anchors = AnchorGenerator(
        tuple((size,) for size in SMALL_ANCHORS), (aspect_ratios,) * len(SMALL_ANCHORS)
    )
    return MaskRCNN(
        backbone,
        **transform,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(SMALL_CHANNELS, len(aspect_ratios)),
        rpn_pre_nms_top_n_train=2 * SMALL_PROPOSALS_IN_TRAINING,
        rpn_post_nms_top_n_train=SMALL_PROPOSALS_IN_TRAINING,
        rpn_pre_nms_top_n_test=SMALL_PROPOSALS,
        rpn_post_nms_top_n_test=SMALL_PROPOSALS,
        box_head=TwoMLPHead(SMALL_CHANNELS * 7 * 7, SMALL_BOX_WIDTH),
        box_predictor=FastRCNNPredictor(SMALL_BOX_WIDTH, num_classes),
        mask_head=MaskRCNNHeads(SMALL_CHANNELS, (SMALL_CHANNELS,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(SMALL_CHANNELS, SMALL_CHANNELS, num_classes),
    )


def _freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by a FrozenBatchNorm2d with the same statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)


def _set_scales(pool: MultiScaleRoIAlign) -> None:
    """Set what the module otherwise infers from the first batch that it sees, and then keeps.

    It compares the height of the features with that of the image before padding: an image that is
    much lower than the padding's 32 pixels would spoil the results of every image after it.
    """
    levels = range(FIRST_POOLED_LEVEL, LAST_POOLED_LEVEL + 1)
    pool.scales = [2.0**-level for level in levels]
    pool.map_levels = LevelMapper(
        FIRST_POOLED_LEVEL, LAST_POOLED_LEVEL, pool.canonical_scale, pool.canonical_level
    )


def state_shapes(settings: ModelSettings) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the network's state; no memory is taken, nothing drawn."""
    with torch.device("meta"):
        model = mask_rcnn(settings)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shape_problems(needed: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    """Say in words how `state` differs from what is needed (`state_shapes`); empty when it fits."""
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return [
        *(f"{name} is missing" for name in needed if name not in given),
        *(f"{name} is not part of this architecture" for name in given if name not in needed),
        *(
            f"{name} has shape {given[name]}, but {needed[name]} is needed"
            for name in needed
            if name in given and given[name] != needed[name]
        ),
    ]
