"""The five losses against torchvision's, and what differs from it on purpose."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from segmodel import masks
from segmodel.augment import resize
from segmodel.losses import LOSSES, LossSums, _spread, project_masks
from segmodel.model import mask_rcnn
from segmodel.rle import decode
from segmodel.settings import ModelSettings
from segmodel.targets import Crop, Sample, tight
from segmodel.training import to_device
from tests.segmodel.training_samples import SIZE_HW, as_torchvision, bundle, full_mask, sample

CPU = torch.device("cpu")


def network(arch: str = "small") -> MaskRCNN:
    settings = replace(bundle().settings, arch=arch)
    torch.manual_seed(5)
    model = mask_rcnn(settings)
    if arch == "small":
        model.load_state_dict(dict(bundle().weights))
    # Images come at the size of the network's input.
    model.transform._skip_resize = True
    model.train()
    for module in model.modules():
        # Batch statistics of small images would make gradients as good as chance.
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def our_losses(model: MaskRCNN, samples: list[Sample], settings: ModelSettings) -> Tensor:
    sums, counts = LossSums(model)(*to_device(samples, settings, CPU))
    return sums / counts.clamp(min=1)


@pytest.mark.parametrize("arch", ["small", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_losses_and_gradients_are_those_of_torchvision(arch: str) -> None:
    samples = [sample(1), sample(2, (64, 80)), sample(4)]
    model = network(arch)
    torch.manual_seed(0)
    images, targets = zip(*map(as_torchvision, samples), strict=True)
    theirs = model(list(images), list(targets))
    sum(theirs.values()).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    torch.manual_seed(0)
    ours = our_losses(model, samples, bundle().settings)
    assert ours.tolist() == pytest.approx([float(theirs[n].detach()) for n in LOSSES], rel=1e-4)
    ours.sum().backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            scale = wanted[name].abs().max() + 1e-6
            torch.testing.assert_close(
                parameter.grad / scale, wanted[name] / scale, atol=5e-3, rtol=0, msg=name
            )


def test_images_without_instances_give_gradients_to_every_layer() -> None:
    blank = replace(sample(1), labels=np.zeros(0, np.int64), masks=())
    model = network()
    losses = our_losses(model, [blank, blank], bundle().settings)
    named = dict(zip(LOSSES, losses.tolist(), strict=True))
    assert named["loss_objectness"] > 0
    assert named["loss_classifier"] > 0
    assert named["loss_mask"] == named["loss_box_reg"] == named["loss_rpn_box_reg"] == 0
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_masks_are_projected_as_torchvision_does_from_full_masks() -> None:
    rng = np.random.default_rng(0)
    height, width = SIZE_HW
    windows = [(0, 0, 20, 30), (height - 9, width - 13, 9, 13), (10, 20, 31, 5), (7, 9, 1, 1)]
    windows += [(0, 0, height, width), (height - 1, 0, 1, width)]
    crops = []
    for top, left, h, w in windows:
        mask = rng.random((h, w)) < 0.7
        mask[0], mask[-1], mask[:, 0], mask[:, -1] = True, True, True, True
        crops.append(Crop(top=top, left=left, mask=mask))
    one = replace(sample(1), labels=np.ones(len(crops), np.int64), masks=tuple(crops))
    _, (target,) = to_device([one], bundle().settings, CPU)
    corners = rng.uniform(0, (width, height), (200, 2, 2)).astype(np.float32)
    boxes = torch.from_numpy(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1))
    # Some that fit their instances, as proposals do.
    boxes = torch.cat([boxes, target.boxes_xyxy, target.boxes_xyxy + 0.4]).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([width, height, width, height]))
    matched = torch.from_numpy(rng.integers(0, len(crops), len(boxes)))
    full = torch.stack([full_mask(crop, SIZE_HW) for crop in crops])
    wanted = project_masks_on_boxes(full, boxes, matched, 28)
    found = project_masks(target, boxes, matched, SIZE_HW, 28)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_what_lies_in_a_crowd_is_no_background() -> None:
    everywhere = np.array([[0, 0, SIZE_HW[1], SIZE_HW[0]]], np.float32)
    model = network()
    # Every anchor and proposal is drawn, so that counts tell which were ignored.
    model.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 10**6
    for mine, crowds, expected in (
        (sample(1), None, "all"),
        (sample(1), everywhere, "positive"),
    ):
        one = mine if crowds is None else replace(mine, crowds_xyxy=crowds)
        with torch.no_grad():
            _, counts = LossSums(model)(*to_device([one], bundle().settings, CPU))
        positives = counts[4] / 28**2
        if expected == "all":
            assert counts[2] > positives
        else:
            assert counts[2] == positives > 0


def test_autocast_stays_near_and_gives_float32() -> None:
    samples = [sample(1), sample(2)]
    images, targets = to_device(samples, bundle().settings, CPU)
    found = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        sums, counts = LossSums(network(), dtype)(images, targets)
        assert sums.dtype == torch.float32
        found.append((sums / counts).detach())
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.02)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_that_were_trained_to_be_pasted_fit_the_truth_better_once_they_are() -> None:
    """What a perfect network would give: its targets, pasted, against the masks they are of."""
    rng = np.random.default_rng(0)
    scale, size_hw = 2.0, (120, 160)
    found: dict[str, list[float]] = {"torchvision": [], "pasted": []}
    for _ in range(60):
        mask = _ring(rng, size_hw)
        crop = tight(0, 0, mask)
        assert crop is not None
        one = Sample(
            image_id="x",
            image=np.zeros((*size_hw, 3), np.uint8),
            labels=np.ones(1, np.int64),
            masks=(crop,),
            crowds_xyxy=np.zeros((0, 4), np.float32),
        )
        _, (target,) = to_device(
            [resize(one, (size_hw[0] * 2, size_hw[1] * 2))], bundle().settings, CPU
        )
        assert target.scale == scale
        box = one.boxes_xyxy + rng.normal(0, 0.6, (1, 4)).astype(np.float32)
        boxes = torch.from_numpy(box * np.float32(scale))
        for way, region in (("torchvision", boxes), ("pasted", _spread(boxes, target.scale, 28))):
            probs = project_masks(target, region, torch.zeros(1, dtype=torch.int64), (240, 320), 28)
            (rle,) = masks.encode(probs.numpy(), box, size_hw)
            shown = decode(rle)
            found[way].append(float((shown & mask).sum() / (shown | mask).sum()))
    before, after = (float(np.mean(found[way])) for way in ("torchvision", "pasted"))
    assert 1 - after < 0.8 * (1 - before)


def _ring(rng: np.random.Generator, size_hw: tuple[int, int]) -> Any:
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    outer = rng.uniform(8, 25)
    middle_y, middle_x = (rng.uniform(outer + 2, size - outer - 2) for size in size_hw)
    distance = np.hypot(y - middle_y, x - middle_x)
    return (distance <= outer) & (distance >= outer * rng.uniform(0, 0.5))
