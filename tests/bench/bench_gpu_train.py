"""Training on an accelerator: images/s of `Trainer.step` against torchvision's model and plain SGD, samples at hand."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segmodel.bundle import Bundle
from segmodel.model import mask_rcnn
from segmodel.scenes import scene
from segmodel.settings import Precision
from segmodel.targets import Crop, Sample, tight
from segmodel.training import Recipe, Trainer
from tests.bench.gpu_photos import UNIFORM_HW
from tests.bench.gpu_size import Place, Size, peak_mib
from tests.bench.gpu_table import Line
from tests.bench.gpu_watch import Watch

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def training(bundle: Bundle, place: Place) -> Iterator[Line]:
    """Yield a line for torchvision, and one for each precision."""
    samples = [_sample(seed, place.size) for seed in range(place.size.train_batch)]
    plain = _line(
        bundle, place, "torchvision, SGD, fp32", _plain_step(bundle, samples, place), None
    )
    yield plain
    # A CPU that imitates bf16 takes minutes for what says nothing.
    for precision in PRECISIONS if place.device.type == "cuda" else PRECISIONS[:1]:
        trainer = Trainer(bundle, Recipe(epochs=1, precision=precision), place.device)
        step = lambda t=trainer: t.step([samples], 0.5)  # noqa: E731
        yield _line(bundle, place, f"Trainer.step, {precision}", step, plain.rate)


def _line(
    bundle: Bundle, place: Place, way: str, step: Callable[[], Any], against: float | None
) -> Line:
    peak_mib(place.device)
    with Watch(place.device) as watch:
        rates = _rates(step, place)
    return Line(
        network=f"{bundle.settings.arch} at {place.size.min_size} px",
        of=f"training, {place.size.train_batch} images in a step",
        way=way,
        hardware=place.hardware,
        rates=rates,
        against=against,
        busy=watch.busy,
        peak_mib=peak_mib(place.device),
        note="512 proposals each, samples at hand",
    )


def _rates(step: Callable[[], Any], place: Place) -> list[float]:
    """Images/s of each step but the first."""
    rates = []
    for _ in range(place.size.warm_up_steps + place.size.steps):
        started = time.perf_counter()
        step()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(place.size.train_batch / (time.perf_counter() - started))
    return rates[place.size.warm_up_steps :]


def _plain_step(bundle: Bundle, samples: list[Sample], place: Place) -> Callable[[], None]:
    model = mask_rcnn(bundle.settings)
    model.load_state_dict(dict(bundle.weights))
    model.to(place.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    pairs = [_as_torchvision(sample, place.device) for sample in samples]

    def step() -> None:
        losses = model([image for image, _ in pairs], [target for _, target in pairs])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def _sample(seed: int, size: Size) -> Sample:
    made = scene(seed, (UNIFORM_HW[0] // size.shrink, UNIFORM_HW[1] // size.shrink))
    crops = (tight(0, 0, mask) for mask in made.masks)
    return Sample(
        image_id=f"scene {seed}",
        image=made.image,
        labels=np.ones(len(made.masks), np.int64),
        masks=tuple(crop for crop in crops if crop is not None),
        crowds_xyxy=np.zeros((0, 4), np.float32),
    )


def _as_torchvision(sample: Sample, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    full = torch.zeros((len(sample.masks), *sample.image.shape[:2]), dtype=torch.uint8)
    for mask, crop in zip(full, sample.masks, strict=True):
        mask[_place(crop)] = torch.from_numpy(crop.mask.astype(np.uint8))
    target = {
        "boxes": torch.from_numpy(sample.boxes_xyxy).to(device),
        "labels": torch.from_numpy(sample.labels).to(device),
        "masks": full.to(device),
    }
    return torch.from_numpy(sample.image).permute(2, 0, 1).to(device) / 255, target


def _place(crop: Crop) -> tuple[slice, slice]:
    height, width = crop.mask.shape
    return slice(crop.top, crop.top + height), slice(crop.left, crop.left + width)
