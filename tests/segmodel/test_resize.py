"""The network's input against what torchvision's transform does to a photo, bit by bit."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from segmodel.resize import Resizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size_hw", "network_hw"),
    [
        ((48, 64), (80, 106)),
        ((200, 300), (80, 120)),
        ((333, 500), (320, 480)),
        ((64, 90), (64, 90)),
        ((7, 900), (2, 320)),
        ((90, 120), (64, 85)),
        ((5, 7), (3, 4)),
        ((1, 1), (33, 47)),
    ],
)
def test_it_is_torchs_arithmetic(
    size_hw: tuple[int, int], network_hw: tuple[int, int], channels_last: bool
) -> None:
    pixels = np.random.default_rng(size_hw).integers(0, 256, (*size_hw, 3), np.uint8)
    mean, std = torch.tensor([MEAN, STD])[:, :, None, None]
    whole = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255)
    expected = functional.interpolate(
        ((whole - mean) / std)[None], network_hw, mode="bilinear", align_corners=False
    )[0]
    padded = torch.full((3, network_hw[0] + 5, network_hw[1] + 6), 9.0)
    if channels_last:
        padded = padded.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    Resizer(MEAN, STD).write(pixels, padded[:, : network_hw[0], : network_hw[1]])
    assert torch.equal(padded[:, : network_hw[0], : network_hw[1]], expected)
    assert (padded[:, network_hw[0] :] == 9).all()
    assert (padded[:, :, network_hw[1] :] == 9).all()


def test_any_layout_of_the_photo_will_do() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    found = [torch.empty(3, 30, 36) for _ in range(3)]
    flipped = np.ascontiguousarray(pixels[::-1, ::-1])[::-1, ::-1]
    read_only = pixels.copy()
    read_only.flags.writeable = False
    for some, row in zip((pixels, flipped, read_only), found, strict=True):
        Resizer(MEAN, STD).write(some, row)
        assert torch.equal(row, found[0])
