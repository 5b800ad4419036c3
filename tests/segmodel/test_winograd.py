"""Winograd's convolutions against the direct ones in float64."""

import pytest
import torch
from torch import nn

from segmodel.winograd import WinogradConv2d, fits


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("num", "channels", "outputs", "size_hw"),
    [(1, 96, 96, (1, 1)), (2, 96, 128, (7, 9)), (3, 128, 96, (4, 8)), (40, 96, 96, (14, 14))],
)
def test_it_is_the_direct_convolution(
    num: int, channels: int, outputs: int, size_hw: tuple[int, int], bias: bool, relu: bool
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=bias).requires_grad_(False)
    inputs = torch.randn(num, channels, *size_hw)
    expected = nn.functional.conv2d(
        inputs.double(),
        conv.weight.double(),
        conv.bias if conv.bias is None else conv.bias.double(),
        padding=1,
    )
    if relu:
        expected = expected.relu()
    winograd = WinogradConv2d(conv, relu=relu)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = winograd(inputs.to(memory_format=layout))
        assert found.shape == expected.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < 3e-5
    # It is no direct convolution in disguise, whose error is a tenth of this.
    if size_hw != (1, 1):
        assert error > 5e-7


def test_no_images_give_no_outputs() -> None:
    conv = nn.Conv2d(96, 128, 3, padding=1).requires_grad_(False)
    assert WinogradConv2d(conv)(torch.zeros(0, 96, 14, 14)).shape == (0, 128, 14, 14)


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (True, {}),
        (False, {"stride": 2}),
        (False, {"padding": 0}),
        (False, {"dilation": 2, "padding": 2}),
        (False, {"kernel_size": 1, "padding": 0}),
        (False, {"groups": 2}),
        (False, {"in_channels": 64}),
        (False, {"out_channels": 112}),
    ],
)
def test_what_fits(expected: bool, options: dict[str, int]) -> None:
    usual = {"in_channels": 96, "out_channels": 96, "kernel_size": 3, "padding": 1}
    assert fits(nn.Conv2d(**{**usual, **options})) is expected
