"""Statistics of batch normalisation, measured anew."""

import torch
from torch import nn

from segmodel.model import mask_rcnn
from segmodel.statistics import measure_statistics
from tests.segmodel import training_samples

CPU = torch.device("cpu")
FIRST = "body.0.1"


def batches(seed: int, count: int, size_hw: tuple[int, int] = (64, 96)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((2, 3, *size_hw), generator=generator) * (1 + n) for n in range(count)]


def norms(module: nn.Module) -> list[str]:
    return [name for name, found in module.named_modules() if isinstance(found, nn.BatchNorm2d)]


def test_they_are_the_mean_of_what_the_batches_have() -> None:
    settings, weights = training_samples.bundle().settings, dict(training_samples.bundle().weights)
    some = batches(0, 3)
    found = measure_statistics(settings, weights, some, [FIRST], CPU)
    first = weights["backbone.body.0.0.weight"]
    seen = [torch.nn.functional.conv2d(batch, first, stride=2, padding=1) for batch in some]
    mean = torch.stack([each.mean(dim=(0, 2, 3)) for each in seen]).mean(dim=0)
    variance = torch.stack([each.var(dim=(0, 2, 3)) for each in seen]).mean(dim=0)
    assert found.keys() == {f"backbone.{FIRST}.running_mean", f"backbone.{FIRST}.running_var"}
    torch.testing.assert_close(found[f"backbone.{FIRST}.running_mean"], mean)
    torch.testing.assert_close(found[f"backbone.{FIRST}.running_var"], variance)


def test_with_them_the_network_does_what_it_did_in_training() -> None:
    settings, weights = training_samples.bundle().settings, dict(training_samples.bundle().weights)
    (batch,) = batches(1, 1, (256, 256))
    backbone = mask_rcnn(settings).backbone
    own = {n.removeprefix("backbone."): t for n, t in weights.items() if n.startswith("backbone.")}
    backbone.load_state_dict(own)
    trained = backbone.train()(batch)["0"].detach()
    found = measure_statistics(settings, weights, [batch], norms(backbone), CPU)
    backbone.load_state_dict(own | {n.removeprefix("backbone."): t for n, t in found.items()})
    # The variance that is kept is the unbiased one, what a batch is divided by is not: at the deepest
    # layers, where it has 128 positions, they are 0.8 % apart.
    with torch.inference_mode():
        ours = backbone.eval()(batch)["0"]
        others = mask_rcnn(settings).backbone
        others.load_state_dict(own)
        before = others.eval()(batch)["0"]
    assert float((ours - trained).norm() / trained.norm()) < 0.05
    assert float((before - trained).norm() / trained.norm()) > 0.5


def test_without_a_batch_nothing_is_measured() -> None:
    one = training_samples.bundle()
    assert measure_statistics(one.settings, dict(one.weights), [], [FIRST], CPU) == {}
