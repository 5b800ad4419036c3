"""Statistics of batch normalisation for weights that were never trained with: those of an average.

While it trains, a network normalises by the statistics of each batch. What it has gathered of them on the
way fits neither the average of its weights nor, where images differ much from one another, any of them.
"Precise BatchNorm" of Wu and Johnson (https://arxiv.org/abs/2105.07576, section 3.2) measures them anew.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segmodel.model import mask_rcnn
from segmodel.settings import ModelSettings


def measure_statistics(
    settings: ModelSettings,
    weights: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    layers: Collection[str],
    device: torch.device,
) -> dict[str, Tensor]:
    """Measure mean and variance of what layers of batch normalisation get to see.

    Where `torch.distributed` is set up, all workers must call it, and get the statistics of all batches.

    Args:
        settings: Of the network.
        weights: Its state.
        batches: Each (N, 3, H, W), normalised, of the size that is trained with: the variance is the mean
            of the batches' own.
        layers: Names of the layers, within the network's backbone; the others normalise as `weights` says.
        device: Where the batches are.

    Returns:
        `backbone.<layer>.running_mean` and `running_var` of each layer; nothing where no worker had a batch.
    """
    with torch.random.fork_rng(devices=[]):
        backbone = mask_rcnn(settings).backbone
    backbone.load_state_dict(
        {n.removeprefix("backbone."): t for n, t in weights.items() if n.startswith("backbone.")}
    )
    backbone.eval().to(device, memory_format=torch.channels_last)
    norms = {name: module for name, module in backbone.named_modules() if name in layers}
    for norm in norms.values():
        # With a momentum of 1 the running statistics are those of the last batch.
        norm.train().momentum = 1.0
    count = torch.zeros(1, device=device)
    sums = {name: torch.zeros_like(value) for name, value in _running(norms).items()}
    with torch.no_grad():
        for batch in batches:
            backbone(batch)
            count += 1
            for name, value in _running(norms).items():
                sums[name] += value
    if dist.is_initialized():
        for tensor in (count, *sums.values()):
            dist.all_reduce(tensor)
    return {name: total / count for name, total in sums.items()} if count else {}


def _running(norms: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"backbone.{name}.{kind}": getattr(norm, kind)
        for name, norm in norms.items()
        for kind in ("running_mean", "running_var")
    }
