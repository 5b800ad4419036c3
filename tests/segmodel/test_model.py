"""The architectures: torchvision's own modules, and what was set in them."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import (
    MaskRCNN,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.ops import FrozenBatchNorm2d

from segmodel.model import mask_rcnn, shape_problems, state_shapes
from segmodel.settings import ARCHITECTURES, Architecture, ModelSettings


def settings(arch: Architecture, **changes: Any) -> ModelSettings:
    return ModelSettings(
        **{"arch": arch, "num_classes": 4, "min_size": 64, "max_size": 96, **changes}
    )


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("arch", "make"),
    [
        ("maskrcnn_resnet50_fpn", maskrcnn_resnet50_fpn),
        ("maskrcnn_resnet50_fpn_v2", maskrcnn_resnet50_fpn_v2),
    ],
)
def test_states_are_those_of_torchvision(arch: Architecture, make: Any) -> None:
    with torch.device("meta"):
        theirs = make(weights=None, weights_backbone=None, num_classes=4)
    assert state_shapes(settings(arch)) == shapes(theirs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_state_shapes_are_those_of_the_model(arch: Architecture, norm: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        model = mask_rcnn(settings(arch, norm=norm))
    before = torch.random.get_rng_state()
    assert state_shapes(settings(arch, norm=norm)) == shapes(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_small_body_is_the_front_of_mobilenet() -> None:
    with torch.device("meta"):
        theirs = shapes(mobilenet_v3_large(weights=None).features)
    body = "backbone.body."
    ours = {
        name.removeprefix(body): shape
        for name, shape in state_shapes(settings("small")).items()
        if name.startswith(body)
    }
    assert ours == {name: shape for name, shape in theirs.items() if int(name.split(".")[0]) < 15}
    assert ours.keys() < theirs.keys()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_frozen_norm_is_in_the_whole_body(arch: Architecture) -> None:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = mask_rcnn(settings(arch, norm="frozen", norm_eps=0.25))
    norms = [m for m in model.backbone.body.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) > 30
    assert {norm.eps for norm in norms} == {0.25}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.body.modules())


def test_frozen_and_batch_norm_compute_the_same() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        batch = mask_rcnn(settings("small", norm="batch", norm_eps=1e-3)).eval()
        for buffer in batch.backbone.body.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        frozen = mask_rcnn(settings("small", norm="frozen", norm_eps=1e-3)).eval()
        image = torch.rand(1, 3, 64, 64)
    state = {
        name: tensor
        for name, tensor in batch.state_dict().items()
        if not name.endswith("num_batches_tracked") or name in frozen.state_dict()
    }
    frozen.load_state_dict(state)
    with torch.inference_mode():
        expected, found = batch.backbone(image), frozen.backbone(image)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3])
def test_norm_eps_is_that_of_the_whole_body(eps: float) -> None:
    with torch.device("meta"):
        model = mask_rcnn(settings("maskrcnn_resnet50_fpn", norm_eps=eps))
    found = {m.eps for m in model.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)}
    assert found == {eps}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_transform_is_that_of_the_settings(arch: Architecture) -> None:
    with torch.device("meta"):
        transform = mask_rcnn(
            settings(arch, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
        ).transform
    assert (transform.image_mean, transform.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (transform.min_size, transform.max_size) == ((64,), 96)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_scales_of_roi_align_are_those_that_an_ordinary_image_gives(arch: Architecture) -> None:
    with torch.random.fork_rng(devices=[]):
        model: MaskRCNN = mask_rcnn(settings(arch)).eval()
        image = torch.zeros(1, 3, 128, 128)
    with torch.inference_mode():
        features = model.backbone(image)
    pools = (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool)
    for pool in pools:
        ours = pool.scales, vars(pool.map_levels)
        assert ours[0] == [features[name].shape[-1] / 128 for name in pool.featmap_names]
        pool.scales = pool.map_levels = None
        pool(features, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [(128, 128)])
        assert (pool.scales, vars(pool.map_levels)) == ours


def test_shape_problems_are_said_in_words() -> None:
    needed: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (), "c": (4,)}
    fitting = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(4)}
    assert shape_problems(needed, fitting) == []
    other = {"a": torch.zeros(3, 2), "c": torch.zeros(4), "d": torch.zeros(1)}
    assert shape_problems(needed, other) == [
        "b is missing",
        "d is not part of this architecture",
        "a has shape (3, 2), but (2, 3) is needed",
    ]
