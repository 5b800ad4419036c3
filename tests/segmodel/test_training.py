"""The training step: torchvision's mathematics, shared batches, resuming, schedules, freezing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from segmodel.losses import LOSSES
from segmodel.model import mask_rcnn
from segmodel.targets import Sample
from segmodel.training import (
    LEAST_FP16_SCALE,
    Recipe,
    Trainer,
    TrainingError,
    learning_rate,
)
from tests.segmodel.training_samples import as_torchvision, bundle, sample

CPU = torch.device("cpu")
BASE = Recipe(epochs=10, learning_rate=0.02, warmup_epochs=0, clip_norm=0, ema_decay=0)


def pairs(count: int, first: int = 0) -> list[list[Sample]]:
    """Micro-batches of two images."""
    return [[sample(first + 2 * n), sample(first + 2 * n + 1)] for n in range(count)]


def trainer(**changes: Any) -> Trainer:
    return Trainer(bundle(), replace(BASE, **changes), CPU)


def test_twenty_steps_agree_with_a_plain_torchvision_loop() -> None:
    ours = trainer(learning_rate=0.008, weight_decay=0.0, norm="frozen", schedule="step")
    model = mask_rcnn(bundle().settings)
    model.load_state_dict(dict(bundle().weights))
    model.transform._skip_resize = True
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(requires_grad=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9)
    for number, batch in enumerate(pairs(20)):
        found = ours.step([batch], epoch=0.0)
        # The step draws with a seed of its own: give torchvision's samplers the same.
        state = np.random.SeedSequence((0, number, 0)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> 1))
        images, targets = zip(*map(as_torchvision, batch), strict=True)
        losses = model(list(images), list(targets))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        for name in LOSSES:
            assert found[name] == pytest.approx(float(losses[name].detach()), abs=1e-4), (
                number,
                name,
            )


def draw_everything(one: Trainer) -> None:
    """Leave nothing to chance: every anchor and proposal is trained on."""
    for sampler in (one.model.rpn.fg_bg_sampler, one.model.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = 10**6


def gradients_of_one(batch: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    one = trainer(norm="frozen")
    draw_everything(one)
    totals = one._backward(batch, 1)
    return {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}, totals


def _worker(rank: int, folder: str, batch: Sequence[Sample]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    gradients, totals = gradients_of_one(batch[2 * rank : 2 * rank + 2])
    torch.save((gradients, totals), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_with_half_the_batch_have_the_gradients_of_one_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processes that start import this file by its name.
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    # One half has many objects, the other few or none: a mean of means would be another one.
    counted = sorted((sample(n) for n in range(12)), key=lambda one: len(one.labels))
    batch = [*counted[:2], *counted[-2:]]
    assert sum(len(one.labels) for one in batch[:2]) < sum(len(one.labels) for one in batch[2:])
    wanted, totals = gradients_of_one(batch)
    mp.start_processes(_worker, (str(tmp_path), batch), nprocs=2, start_method="spawn")
    for rank in range(2):
        gradients, shared = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(shared, totals, rtol=1e-4, atol=1e-5)
        assert gradients.keys() == wanted.keys()
        for name, grad in wanted.items():
            scale = grad.abs().max() + 1e-6
            torch.testing.assert_close(gradients[name] / scale, grad / scale, atol=2e-3, rtol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_equals_going_on(optimizer: str) -> None:
    settings = {"optimizer": optimizer, "ema_decay": 0.9, "norm": "train", "learning_rate": 0.002}
    batches = pairs(4)
    whole = trainer(**settings)
    wanted = [whole.step([batch], epoch=n / 4) for n, batch in enumerate(batches)]

    first = trainer(**settings)
    for n in range(2):
        assert first.step([batches[n]], epoch=n / 4) == wanted[n]
    tensors, plain = first.state()
    second = trainer(**settings)
    second.load(tensors, plain)
    for n in (2, 3):
        assert second.step([batches[n]], epoch=n / 4) == wanted[n]
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, second.weights()[name]), name


def test_accumulated_batches_are_one_step_and_count_alike() -> None:
    one = trainer(norm="frozen", accumulate=2)
    found = one.step(pairs(2), epoch=0.0)
    assert (found["images"], one.steps) == (4, 1)
    parts = []
    for number in range(2):
        other = trainer(norm="frozen")
        draw_everything(other)
        parts.append(other._backward(pairs(2)[number], 1))
    together = trainer(norm="frozen")
    draw_everything(together)
    summed = sum(together._backward(batch, 2) for batch in pairs(2))
    torch.testing.assert_close(summed[:5], (parts[0] + parts[1])[:5] / 2)


def test_a_loss_that_is_not_finite_names_the_images_and_leaves_the_weights() -> None:
    one = trainer()
    one.step([pairs(1)[0]], epoch=0.0)
    # As a far too high rate would leave them: the next loss is not finite.
    with torch.no_grad():
        one.model.roi_heads.box_predictor.cls_score.bias.fill_(float("inf"))
    before = {n: t.clone() for n, t in one.model.state_dict().items() if "running" not in n}
    with pytest.raises(TrainingError, match=r"step 1 .*scenes#2, scenes#3.*--learning-rate"):
        one.step([pairs(2)[1]], epoch=0.0)
    for name, tensor in before.items():
        if "num_batches" not in name:
            assert torch.equal(one.model.state_dict()[name], tensor), name
    assert one.steps == 1


def test_frozen_stages_and_frozen_statistics_stay() -> None:
    one = trainer(freeze_stages=2, norm="frozen", learning_rate=0.1)
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    one.step([pairs(1)[0]], epoch=0.0)
    after = one.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    body = {name.split(".")[2] for name in changed if name.startswith("backbone.body.")}
    assert body
    assert min(map(int, body)) == 7  # blocks 0 to 6 are the first two stages
    assert not any("running" in name or "num_batches" in name for name in changed)


def test_statistics_are_learned_where_they_are_not_frozen() -> None:
    one = trainer(norm="train")
    before = one.model.state_dict()["backbone.body.0.1.running_mean"].clone()
    one.step([pairs(1)[0]], epoch=0.0)
    assert not torch.equal(before, one.model.state_dict()["backbone.body.0.1.running_mean"])


def test_statistics_of_the_average_are_measured_anew() -> None:
    one = trainer(norm="train", ema_decay=0.9, freeze_stages=1)
    one.step([pairs(1)[0]], epoch=0.0)
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    one.renew_statistics([pairs(1)[0], pairs(2)[0]])
    after = one.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith((".running_mean", ".running_var")) for name in changed)
    body = {int(name.split(".")[2]) for name in changed}
    assert min(body) == 4  # blocks 0 to 3 are the first stage, which stays as it is
    again = trainer(norm="train", ema_decay=0.9, freeze_stages=1)
    again.load(*one.state())
    again.renew_statistics([pairs(1)[0], pairs(2)[0]])
    assert all(torch.equal(again.weights()[name], after[name]) for name in after)


def test_frozen_statistics_are_not_measured() -> None:
    one = trainer(norm="frozen")
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    one.renew_statistics([pairs(1)[0]])
    assert all(torch.equal(before[name], tensor) for name, tensor in one.weights().items())


def test_only_weights_decay() -> None:
    decayed, plain = trainer(weight_decay=0.01).optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in plain["params"])
    count = sum(1 for _ in trainer().model.parameters())
    assert len(decayed["params"]) + len(plain["params"]) == count


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
def test_a_gradient_that_is_not_finite_stops_with_the_images(clip_norm: float) -> None:
    one = trainer(clip_norm=clip_norm, ema_decay=0.9)
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    parameter = next(p for p in one.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    batch = pairs(1)[0]
    with pytest.raises(TrainingError, match="the gradient of step 0 is not finite") as raised:
        one.step([batch], epoch=0.0)
    assert all(sample.image_id in str(raised.value) for sample in batch)
    after = one.weights()
    assert all(torch.equal(before[name], after[name]) for name in before if "running" not in name)


def test_fp16_does_not_go_on_for_ever_with_gradients_that_are_not_finite() -> None:
    one = trainer(precision="fp16")
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    parameter = next(p for p in one.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    batch = pairs(1)[0]
    # An overflow is no error: another factor may be small enough.
    assert "gradient_norm" not in one.step([batch], epoch=0.0)
    one._scaler.update(LEAST_FP16_SCALE)
    with pytest.raises(TrainingError, match="the gradient of step 1 is not finite"):
        one.step([batch], epoch=0.0)
    after = one.weights()
    trained = [name for name, _ in one.model.named_parameters()]
    assert all(torch.equal(before[name], after[name]) for name in trained)


def test_gradients_are_clipped_to_the_norm() -> None:
    one = trainer(clip_norm=1e-6, learning_rate=1.0, momentum=0.0, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in one.model.parameters()]
    found = one.step([pairs(1)[0]], epoch=0.0)
    assert found["gradient_norm"] > 1e-3
    moved = torch.stack(
        [(a - b).norm() for a, b in zip(before, one.model.parameters(), strict=True)]
    ).norm()
    rate = 1.0 * 2 / 16
    assert float(moved.detach()) <= 1e-6 * rate * 1.01


def test_the_average_follows_the_weights() -> None:
    one = trainer(ema_decay=0.5, learning_rate=0.1, norm="train")
    name = "roi_heads.box_predictor.cls_score.weight"
    average = one.model.state_dict()[name].clone()
    for step in range(3):
        one.step([pairs(1)[0]], epoch=0.0)
        decay = min(0.5, (1 + step) / (10 + step))
        average += (1 - decay) * (one.model.state_dict()[name] - average)
        torch.testing.assert_close(one.weights()[name], average)
    assert torch.equal(trainer().weights()[name], dict(bundle().weights)[name])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_learn(precision: str) -> None:
    one = trainer(precision=precision, learning_rate=0.02, norm="train")
    losses = [one.step([pairs(1)[0]], epoch=0.0)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]


def test_learning_rates_warm_up_scale_and_fall() -> None:
    recipe = Recipe(epochs=10, learning_rate=0.02, warmup_epochs=1, schedule="cosine")
    assert learning_rate(recipe, 0.0, 16) == pytest.approx(0.02 * 0.001)
    assert learning_rate(recipe, 0.5, 16) == pytest.approx(0.02 * 0.5005)
    assert learning_rate(recipe, 1.0, 16) == pytest.approx(0.02)
    assert learning_rate(recipe, 1.0, 64) == pytest.approx(0.08)
    assert learning_rate(recipe, 5.5, 16) == pytest.approx(0.01)
    assert learning_rate(recipe, 10.0, 16) == pytest.approx(0.0)
    stepped = replace(recipe, schedule="step")
    rates = [learning_rate(stepped, epoch, 16) for epoch in (1.0, 6.6, 6.7, 8.8, 8.9)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])


def test_another_network_is_refused_when_resuming() -> None:
    tensors, plain = trainer().state()
    tensors.pop("model/roi_heads.box_predictor.cls_score.weight")
    with pytest.raises(TrainingError, match="another network"):
        trainer().load(tensors, plain)
