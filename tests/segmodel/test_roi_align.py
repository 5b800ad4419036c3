"""RoIAlign as a matrix product against torchvision's kernel, forwards and backwards."""

import pytest
import torch
from torch import Tensor

from segmodel import roi_align
from segmodel.model import mask_rcnn
from tests.segmodel.training_samples import bundle

CHANNELS = 5
SIZE_HW = (96, 160)


def boxes(kind: str, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    height, width = SIZE_HW
    whole = torch.tensor([[0.0, 0.0, width, height]])
    if kind == "whole":
        return whole
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    largest = {"tiny": 0.6, "usual": 60, "huge": 400}[kind]
    sides = torch.rand(count, 2, generator=generator) * largest
    found = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    return found.clamp(min=0).minimum(whole[:, 2:].repeat(1, 2))


@pytest.mark.parametrize("pooler_name", ["box_roi_pool", "mask_roi_pool"])
@pytest.mark.parametrize("kind", ["tiny", "usual", "huge", "whole"])
def test_outputs_and_gradients_are_those_of_torchvision(pooler_name: str, kind: str) -> None:
    pooler = getattr(mask_rcnn(bundle().settings).roi_heads, pooler_name)
    torch.manual_seed(1)
    levels = {
        str(n): torch.randn(2, CHANNELS, SIZE_HW[0] >> n + 2, SIZE_HW[1] >> n + 2).requires_grad_()
        for n in range(4)
    }
    per_image = [boxes(kind), boxes(kind, 7)]
    theirs = pooler(levels, per_image, [SIZE_HW] * 2)
    ours = roi_align.pool(pooler, levels, per_image)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    grad = torch.randn_like(theirs)
    wanted = torch.autograd.grad(theirs, list(levels.values()), grad)
    found = torch.autograd.grad(ours, list(levels.values()), grad)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_no_boxes_give_no_outputs_and_no_gradients() -> None:
    pooler = mask_rcnn(bundle().settings).roi_heads.box_roi_pool
    levels = {str(n): torch.ones(1, CHANNELS, 32 >> n, 32 >> n).requires_grad_() for n in range(4)}
    pooled = roi_align.pool(pooler, levels, [torch.zeros(0, 4)])
    assert pooled.shape == (0, CHANNELS, 7, 7)
    (grad,) = torch.autograd.grad(pooled.sum(), levels["0"])
    assert not grad.any()
