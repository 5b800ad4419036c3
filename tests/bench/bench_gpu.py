"""What only an accelerator can show: images/s of predicting and training, without Ray.

`python -m tests.bench gpu` measures on the first GPU, or at toy sizes on a CPU where there is none. Against
torchvision's own model in a plain loop, with the same weights and images, in one process.
"""

import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from segmodel import initial, masks
from segmodel.bundle import Bundle
from segmodel.images import decode
from segmodel.inference import Predictor
from segmodel.model import mask_rcnn
from segmodel.scenes import CATEGORIES, scene
from segmodel.settings import ModelSettings, Precision
from segmodel.targets import Crop, Sample, tight
from segmodel.training import Recipe, Trainer
from tests.bench import results
from tests.bench.bench_job import row

MAX_PIXELS = 89_000_000


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much to do: enough to be steady on a GPU, or just to see that it runs."""

    architectures: tuple[str, ...]
    image_hw: tuple[int, int]
    min_size: int
    images: int
    batch: int
    train_batch: int
    steps: int


GPU = Size(
    architectures=("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "small"),
    image_hw=(800, 1333),
    min_size=800,
    images=256,
    batch=16,
    train_batch=16,
    steps=20,
)
TOY = Size(
    architectures=("small",),
    image_hw=(96, 160),
    min_size=96,
    images=8,
    batch=2,
    train_batch=2,
    steps=2,
)


def gpu() -> None:
    """Measure, and add the rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = GPU if device.type == "cuda" else TOY
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, toy sizes"
    photos = [_jpeg(seed, size.image_hw) for seed in range(size.images)]
    for architecture in size.architectures:
        bundle = _bundle(architecture, size)
        case = f"{architecture}, {size.min_size} px, {hardware}"
        results.add("gpu prediction", _prediction(bundle, photos, size, device, case))
        results.add("gpu training", _training(bundle, size, device, case))


def _prediction(
    bundle: Bundle, photos: list[bytes], size: Size, device: torch.device, case: str
) -> Iterator[Mapping[str, Any]]:
    plain, _ = _timed(lambda: _plain_prediction(bundle, photos[: max(8, len(photos) // 8)], device))
    yield row(case, "torchvision, paste, pycocotools", plain, "images/s", "batches of one, fp32")
    reference: list[tuple[int, list[str]]] = []
    for precision in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        predictor = Predictor(bundle, str(device), precision, batch_size=size.batch)  # type: ignore[arg-type]
        list(_segment(predictor, photos[: size.batch]))
        rate, found = _timed(lambda p=predictor: sorted(_segment(p, photos)))  # type: ignore[misc]
        reference = reference or found
        same = sum(len(set(a) & set(b)) for (_, a), (_, b) in zip(found, reference, strict=True))
        note = f"{same} of {sum(len(rles) for _, rles in reference)} masks equal to those of fp32"
        yield row(case, f"encoded photos to RLE, {precision}", rate, "images/s", note)
        yield row(case, f"{precision}, against torchvision", rate / plain, "ratio", note)
        yield row(case, f"peak memory, {precision}", _peak_mib(device), "MiB", "")


def _segment(predictor: Predictor, photos: list[bytes]) -> Iterator[tuple[int, list[str]]]:
    """Decode in threads ahead, run the network, encode in threads behind: yield number and masks."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda photo: decode(photo, MAX_PIXELS), photos)
        encoded = [
            (number, pool.submit(masks.encode, d.mask_probs, d.boxes_xyxy, d.size_hw))
            for number, d in predictor.stream(enumerate(decoded))
            if d.mask_probs is not None
        ]
        for number, rles in encoded:
            yield number, [rle["counts"] for rle in rles.result()]


def _plain_prediction(
    bundle: Bundle, photos: list[bytes], device: torch.device
) -> list[list[dict[str, Any]]]:
    model = _torchvision(bundle, device).eval()
    found = []
    with torch.inference_mode():
        for photo in photos:
            image = torch.from_numpy(decode(photo, MAX_PIXELS)).permute(2, 0, 1).to(device) / 255
            (result,) = model([image])
            full = (result["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
            found.append([coco_mask.encode(np.asfortranarray(mask)) for mask in full])
    return found


def _training(
    bundle: Bundle, size: Size, device: torch.device, case: str
) -> Iterator[Mapping[str, Any]]:
    samples = [_sample(seed, size) for seed in range(size.train_batch)]
    note = f"{size.train_batch} images in a step, 512 proposals each, samples at hand"
    plain = _plain_training(bundle, samples, size, device)
    yield row(case, "torchvision, SGD, fp32", plain, "images/s", note)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        trainer = Trainer(bundle, Recipe(epochs=1, precision=precision), device)
        rate = _rate(lambda t=trainer: t.step([samples], 0.5), size, device)  # type: ignore[misc]
        yield row(case, f"Trainer.step, {precision}", rate, "images/s", note)
        yield row(case, f"{precision}, against torchvision", rate / plain, "ratio", note)
        yield row(case, f"peak memory of training, {precision}", _peak_mib(device), "MiB", note)


def _plain_training(
    bundle: Bundle, samples: list[Sample], size: Size, device: torch.device
) -> float:
    model = _torchvision(bundle, device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    pairs = [_as_torchvision(sample, device) for sample in samples]

    def step() -> None:
        losses = model([image for image, _ in pairs], [target for _, target in pairs])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return _rate(step, size, device)


def _rate(step: Callable[[], Any], size: Size, device: torch.device) -> float:
    """Images/s of training steps, the median; the first two are not counted."""
    seconds = []
    for _ in range(2 + size.steps):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return size.train_batch / statistics.median(seconds[2:])


def _timed(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found = work()
    return len(found) / (time.perf_counter() - started), found


def _peak_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0


def _bundle(architecture: str, size: Size) -> Bundle:
    settings = ModelSettings(
        arch=architecture,  # type: ignore[arg-type]
        num_classes=1 + len(CATEGORIES),
        min_size=size.min_size,
        max_size=2 * size.min_size,
    )
    made = initial.random_bundle(settings, CATEGORIES, 0)
    # Random weights score low: all of the most that may be kept are found in each image.
    return Bundle(**{**vars(made), "score_threshold": 0.0})


def _torchvision(bundle: Bundle, device: torch.device) -> MaskRCNN:
    model = mask_rcnn(bundle.settings)
    model.load_state_dict(dict(bundle.weights))
    model.roi_heads.score_thresh = 0.0
    return model.to(device)


def _jpeg(seed: int, size_hw: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scene(seed, size_hw).image).save(file, "JPEG", quality=92)
    return file.getvalue()


def _sample(seed: int, size: Size) -> Sample:
    made = scene(seed, size.image_hw)
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
