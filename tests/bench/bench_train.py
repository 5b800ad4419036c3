"""Training: images/s of `segjobs train` against a plain torchvision loop, the way of its detection reference.

Same scenes, weights, augmentation, batch of 8 images in a step, optimizer and number of sampled proposals. The
plain loop is one process with a `DataLoader`, full-size masks and torchvision's own losses; ours runs as
a user starts it, with one worker of two threads and with two of one.
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jobs import scene_shards, training_set
from jobs.__main__ import main
from segmodel import initial
from segmodel.augment import Augmentation, augment
from segmodel.images import decode
from segmodel.model import mask_rcnn
from segmodel.scenes import CATEGORIES
from segmodel.settings import ModelSettings
from segmodel.targets import to_sample
from tests.bench import results
from tests.bench.bench_job import row
from tests.segmodel.training_samples import LABELS, as_torchvision

SCENES, BATCH, PROPOSALS, SIDE = 240, 8, 128, 256
# Steps that are timed, after the first few.
WARM_UP_STEPS, STEPS = 5, 25
SETTINGS = ModelSettings(arch="small", num_classes=1 + len(CATEGORIES), min_size=320, max_size=640)
AUGMENTATION = Augmentation(
    min_size=320, max_size=640, size_hw=(SIDE, SIDE), scale=(0.8, 1.1), flip="both"
)


class _Scenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Decodes and augments as ours does, and unfolds masks as torchvision wants them."""

    def __init__(self, packed: Path) -> None:
        self.rows = list(training_set.rows(training_set.load([str(packed)], None).chunks))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.set_num_threads(1)
        found = self.rows[number]
        sample = to_sample(found, decode(found["data"]), LABELS)
        image, target = as_torchvision(augment(sample, AUGMENTATION, np.random.default_rng(number)))
        return image, target


def _plain(packed: Path) -> float:
    """Images/s of the plain loop."""
    torch.set_num_threads(2)
    bundle = initial.random_bundle(SETTINGS, CATEGORIES, 0)
    model = mask_rcnn(SETTINGS).train()
    model.load_state_dict(dict(bundle.weights))
    model.transform._skip_resize = True
    model.roi_heads.fg_bg_sampler.batch_size_per_image = PROPOSALS
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0005, weight_decay=0.05)
    loader = DataLoader(
        _Scenes(packed),
        batch_size=BATCH,
        shuffle=True,
        num_workers=2,
        collate_fn=lambda batch: tuple(zip(*batch, strict=True)),
        drop_last=True,
    )
    seconds: list[float] = []
    started = time.perf_counter()
    for images, targets in _endless(loader):
        losses = model(list(images), list(targets))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        if len(seconds) == WARM_UP_STEPS + STEPS:
            return BATCH / statistics.median(seconds[WARM_UP_STEPS:])
    raise AssertionError


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _ours(packed: Path, output: Path, workers: int, precision: str) -> float:
    """Images/s of the job, the median of its steps."""
    epochs = -(-(WARM_UP_STEPS + STEPS) * BATCH // SCENES) + 1
    arguments: Mapping[str, Any] = {
        "train": packed,
        "output": output,
        "workers": workers,
        "batch-size": BATCH // workers,
        "epochs": epochs,
        "precision": precision,
        "optimizer": "adamw",
        "learning-rate": 0.001,
        "weight-decay": 0.05,
        "clip-norm": 5.0,
        "proposals-per-image": PROPOSALS,
        "min-size": 320,
        "max-size": 640,
        "crop-size": SIDE,
        "scale-min": 0.8,
        "scale-max": 1.1,
        "flip": "both",
    }
    words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    assert main(["train", *words]) == 0
    history = json.loads((output / "history.json").read_text())
    rates = [point["images_per_second"] for point in history if "loss" in point]
    return statistics.median(rates[WARM_UP_STEPS : WARM_UP_STEPS + STEPS])


def training() -> None:
    """Measure, and add the rows."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        scene_shards.make(root, range(5_000_000, 5_000_000 + SCENES), 100)
        arguments = ["--images", root / "shards", "--annotations", root / "truth.json"]
        assert main([str(a) for a in ("pack", *arguments, "--output", root / "packed")]) == 0
        plain = _plain(root / "packed")
        found = {
            f"train, {workers} workers, {precision}": _ours(
                root / "packed", root / f"{workers}-{precision}", workers, precision
            )
            for precision in ("fp32", "bf16")
            for workers in (1, 2)
        }
    case = f"small, {SIDE} px crops of scenes, {BATCH} images in a step, two cores"
    note = f"median of {STEPS} steps"
    rows = [row(case, "plain torchvision loop, fp32", plain, "images/s", note)]
    for name, rate in found.items():
        rows.append(row(case, name, rate, "images/s", note))
        rows.append(row(case, f"{name}, against the plain loop", rate / plain, "ratio", note))
    results.add("training", rows)
