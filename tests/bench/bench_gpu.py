"""What only an accelerator can show: images/s of predicting and training, without Ray, in one table.

`python -m tests.bench --gpu` measures on the first GPU, or at toy sizes on a CPU where there is none, which shows that
it runs and nothing else. Against torchvision's own model in a plain loop, with the same weights and photos, in
one process; every way is built and warmed before it is timed. Of each precision also the AP of the shipped bundle on
scenes, and how far its masks are from those of fp32: random weights say nothing of that.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection import MaskRCNN

from segmodel import initial, masks
from segmodel.batching import ahead
from segmodel.bundle import Bundle
from segmodel.images import decode
from segmodel.inference import Predictor
from segmodel.model import mask_rcnn
from segmodel.scenes import CATEGORIES
from segmodel.settings import ARCHITECTURES, Architecture, InferencePrecision, ModelSettings
from tests.bench import results
from tests.bench.bench_gpu_train import training
from tests.bench.bench_precision import accelerated
from tests.bench.gpu_photos import Photos, kinds
from tests.bench.gpu_size import Place, Size, here, peak_mib
from tests.bench.gpu_table import Line, table
from tests.bench.gpu_watch import Watch

PLAIN = "torchvision, paste, pycocotools"
# The masks of each photo, as the counts of their RLEs.
Found = list[list[str]]
Run = Callable[[Photos, int], Found]


def gpu() -> None:
    """Measure, add the rows, and print the table."""
    place = here()
    masks.warm_up()
    photos = list(kinds(place.size.photos, place.size.large, place.size.shrink))
    lines = []
    for arch in ARCHITECTURES:
        bundle = _bundle(arch, place.size)
        for line in chain(_prediction(bundle, photos, place), training(bundle, place)):
            kind = "gpu training" if line.of.startswith("training") else "gpu prediction"
            results.add(kind, line.rows())
            lines.append(line)
    accelerated(place.device, place.size.scenes)
    print(table(lines))


def _prediction(bundle: Bundle, photos: list[Photos], place: Place) -> Iterator[Line]:
    plain: dict[str, float] = {}
    wanted: dict[str, Found] = {}
    for way, run in _ways(bundle, place):
        for kind in photos:
            if way == PLAIN and kind.decode != "full":
                continue
            rates, found, watch = _turns(run, kind, place)
            expected = wanted.setdefault(kind.name, found)
            line = Line(
                network=f"{bundle.settings.arch} at {place.size.min_size} px",
                of=kind.label,
                way=way,
                hardware=place.hardware,
                rates=rates,
                against=plain.get(kind.name),
                busy=watch.busy,
                peak_mib=peak_mib(place.device),
                note=f"{len(kind.files)} photos, {_same(found, expected)}",
            )
            if way == PLAIN:
                plain[kind.name] = line.rate
            yield line


def _ways(bundle: Bundle, place: Place) -> Iterator[tuple[str, Run]]:
    """Yield each way's name, and what runs it; torchvision first."""
    model = torchvision_model(bundle, place)
    yield PLAIN, partial(_plain, model, place.device)
    del model
    for precision, compiled in _precisions(bundle.settings.arch, place):
        predictor = Predictor(
            bundle, str(place.device), precision, batch_size=place.size.batch, compiled=compiled
        )
        name = f"ours, {precision}, compiled" if compiled else f"ours, {precision}"
        yield name, partial(_ours, predictor)
        del predictor


def _precisions(arch: Architecture, place: Place) -> list[tuple[InferencePrecision, bool]]:
    """Return precisions, and whether they are compiled: on a CPU few, so that it ends soon."""
    if place.device.type == "cuda":
        return [("fp32", False), ("bf16", False), ("fp16", False), ("bf16", True), ("fp16", True)]
    if arch != "small":
        return [("fp32-fast", False)]
    return [("fp32", False), ("fp32-fast", False), ("fp32-fast", True)]


def _turns(run: Run, photos: Photos, place: Place) -> tuple[list[float], Found, Watch]:
    """Warm up, then time; return images/s of each turn, what was found, and how busy the device was."""
    size = place.size
    run(Photos(name="", files=photos.files[: size.batch], decode=photos.decode), 1)
    peak_mib(place.device)
    rates = []
    with Watch(place.device) as watch:
        for _ in range(size.turns):
            started = time.perf_counter()
            found = run(photos, size.rounds)
            rates.append(len(found) / (time.perf_counter() - started))
    return rates, found[: len(photos.files)], watch


def _ours(predictor: Predictor, photos: Photos, rounds: int) -> Found:
    """Decode in threads ahead, run the network, encode in threads behind."""
    decoder = photos.decoder(predictor.settings)
    threads = os.cpu_count() or 1
    found: dict[int, Any] = {}
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(threads) as encoders:
        files = photos.files * rounds
        coming = ahead(decoder, files, decoders, 2 * threads + predictor.batch_size)
        pictures = (future.result() for _, future in coming)
        for number, one in predictor.stream(enumerate(pictures)):
            assert one.mask_probs is not None
            found[number] = encoders.submit(
                masks.encode, one.mask_probs, one.boxes_xyxy, one.size_hw
            )
    return [[rle["counts"] for rle in found[number].result()] for number in range(len(found))]


def _plain(model: MaskRCNN, device: torch.device, photos: Photos, _: int) -> Found:
    """Loop over the photos, once."""
    found = []
    with torch.inference_mode():
        for photo in photos.files:
            image = torch.from_numpy(decode(photo)).permute(2, 0, 1).to(device) / 255
            (result,) = model([image])
            full = (result["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
            rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in full]
            found.append([rle["counts"].decode() for rle in rles])
    return found


def _same(found: Found, wanted: Found) -> str:
    same = sum(len(set(a) & set(b)) for a, b in zip(found, wanted, strict=True))
    return f"{same} of {sum(len(set(some)) for some in wanted)} masks as torchvision's to the byte"


def _bundle(arch: Architecture, size: Size) -> Bundle:
    settings = ModelSettings(
        arch=arch, num_classes=1 + len(CATEGORIES), min_size=size.min_size, max_size=size.max_size
    )
    made = initial.random_bundle(settings, CATEGORIES, 0)
    # Random weights score low: all of the most that may be kept are found in each image.
    return Bundle(**{**vars(made), "score_threshold": 0.0})


def torchvision_model(bundle: Bundle, place: Place) -> MaskRCNN:
    """Return torchvision's own model, ready to predict."""
    model = mask_rcnn(bundle.settings)
    model.load_state_dict(dict(bundle.weights))
    model.roi_heads.score_thresh = 0.0
    return model.to(place.device).eval()
