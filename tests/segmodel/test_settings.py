"""What a network is made of, and the sizes that it sees."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.transform import _resize_image_and_masks

from segmodel.settings import ARCHITECTURES, DEFAULT_SIZES, ModelSettings, network_size, resolved


def settings_with(**changes: Any) -> ModelSettings:
    return ModelSettings(
        **{"arch": "small", "num_classes": 3, "min_size": 64, "max_size": 96, **changes}
    )


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out of `F.interpolate` its kernel, and nothing else: what it gives has a shape only."""

    def shape_only(image: Tensor, size: Sequence[int], *_: Any) -> Tensor:
        return torch.zeros(()).expand(*image.shape[:2], *size)

    monkeypatch.setattr(torch._C._nn, "upsample_bilinear2d", shape_only)


def torchvision_size(settings: ModelSettings, size_hw: tuple[int, int]) -> tuple[int, ...]:
    """Return what torchvision's own function makes of an image that takes no memory."""
    image = torch.zeros(()).expand(3, *size_hw)
    resized, _ = _resize_image_and_masks(image, settings.min_size, settings.max_size)
    return tuple(resized.shape[1:])


@pytest.mark.usefixtures("no_pixels")
def test_network_size_is_torchvisions() -> None:
    rng = np.random.default_rng(0)
    extreme = 0
    for _ in range(5000):
        # Sides of all magnitudes from 1 to 20,000; limits at random, or the usual ones.
        height, width = (20_000 ** rng.random(2)).astype(int).tolist()
        min_size, max_size = np.sort(rng.integers(32, 2000, 2)).tolist()
        if rng.random() < 0.5:
            min_size, max_size = DEFAULT_SIZES["small"] if rng.random() < 0.5 else (800, 1333)
        model = settings_with(min_size=min_size, max_size=max_size)
        theirs = torchvision_size(model, (height, width))
        extreme += 0 in theirs
        # torchvision makes 0 pixels of an extreme image, and fails.
        assert network_size(model, (height, width)) == (max(1, theirs[0]), max(1, theirs[1]))
    assert 0 < extreme < 2500


@pytest.mark.parametrize("size_hw", [(480, 640), (640, 480), (333, 500), (2, 3), (90, 1000)])
def test_network_size_is_torchvisions_with_pixels(size_hw: tuple[int, int]) -> None:
    """The same without the fixture: the shape is that of an image which was really resized."""
    model = settings_with()
    assert network_size(model, size_hw) == torchvision_size(model, size_hw)


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [((1, 3000), (1, 96)), ((3000, 1), (96, 1)), ((1, 1), (64, 64)), ((100, 50), (96, 48))],
)
def test_network_size_has_a_pixel_at_least(
    size_hw: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert network_size(settings_with(), size_hw) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "yolo"}, "unknown architecture 'yolo': use maskrcnn_resnet50_fpn, "),
        ({"num_classes": 1}, "num_classes counts background too, so it must be 2 or more"),
        ({"min_size": 31}, r"min_size \(31\) must be 32 or more, and at most max_size \(96\)"),
        ({"max_size": 63}, r"min_size \(64\) must be 32 or more, and at most max_size \(63\)"),
        ({"norm": "group"}, "unknown norm 'group': use batch or frozen"),
        ({"norm_eps": -1e-5}, "norm_eps must be 0 or more, not -1e-05"),
        ({"norm_eps": float("nan")}, "norm_eps must be 0 or more, not nan"),
        ({"image_std": (0.2, 0.0, 0.2)}, "image_std must be more than 0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_with(**changes)


def test_values_at_the_edge_are_taken() -> None:
    edge = settings_with(num_classes=2, min_size=32, max_size=32, norm="frozen", norm_eps=0.0)
    assert (edge.num_classes, edge.min_size, edge.max_size) == (2, 32, 32)


def test_auto_is_quicker_only_where_that_was_proved() -> None:
    chosen = {arch: resolved("auto", "cpu", arch) for arch in ARCHITECTURES}
    assert chosen == {
        "maskrcnn_resnet50_fpn": "fp32-fast",
        "maskrcnn_resnet50_fpn_v2": "fp32",
        "small": "fp32-fast",
    }
    assert {resolved("auto", "cuda", arch) for arch in ARCHITECTURES} == {"fp32"}
    assert resolved("bf16", "cpu", "maskrcnn_resnet50_fpn_v2") == "bf16"
