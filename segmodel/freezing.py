"""What of a network stays as it is while the rest is trained."""

from collections.abc import Iterator

from torch import nn

# Names of the last module of each stage: ResNets, and MobileNetV3's blocks in `model.SMALL_LAYERS`.
STAGE_ENDS = ("maxpool", "layer1", "layer2", "layer3", "layer4", "3", "6", "12", "14")


def frozen_stages(body: nn.Module, count: int) -> Iterator[nn.Module]:
    """Yield the modules of the first `count` stages of a backbone's body.

    A stage halves the image; the first is a ResNet's stem, and of the small network what comes
    before its first output to the pyramid.
    """
    stages: list[list[nn.Module]] = [[]]
    for name, module in body.named_children():
        stages[-1].append(module)
        if name in STAGE_ENDS:
            stages.append([])
    for stage in stages[:count]:
        yield from stage


def freeze_norm(module: nn.Module) -> None:
    """Keep statistics and constants of normalisation as they are; `train()` would undo it."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval().requires_grad_(requires_grad=False)
