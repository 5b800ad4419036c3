"""RoIAlign from channels-last features against torchvision's kernel, bit by bit."""

import pytest
import torch

from segmodel.model import mask_rcnn
from segmodel.roi_pool import RoIPool
from tests.segmodel.test_roi_align import CHANNELS, SIZE_HW, boxes
from tests.segmodel.training_samples import bundle


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pooler_name", ["box_roi_pool", "mask_roi_pool"])
@pytest.mark.parametrize("kind", ["tiny", "usual", "huge", "whole"])
def test_outputs_are_those_of_torchvision(
    pooler_name: str, kind: str, layout: torch.memory_format
) -> None:
    pooler = getattr(mask_rcnn(bundle().settings).roi_heads, pooler_name)
    torch.manual_seed(1)
    levels = {
        str(n): torch.randn(2, CHANNELS, SIZE_HW[0] >> n + 2, SIZE_HW[1] >> n + 2).contiguous(
            memory_format=layout
        )
        for n in range(4)
    }
    per_image = [boxes(kind), boxes(kind, 7)]
    found = RoIPool(pooler, layout)(levels, per_image)
    assert torch.equal(found, pooler(levels, per_image, [SIZE_HW] * 2))
    assert found.is_contiguous(memory_format=layout)


def test_no_boxes_give_no_outputs() -> None:
    pooler = mask_rcnn(bundle().settings).roi_heads.box_roi_pool
    levels = {str(n): torch.ones(1, CHANNELS, 32 >> n, 32 >> n) for n in range(4)}
    assert RoIPool(pooler)(levels, [torch.zeros(0, 4)]).shape == (0, CHANNELS, 7, 7)
