"""Each stage of the job alone, one thread: decode, transform, network, encode, write; and what it replaces."""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn import functional

from jobs.processor import cpu_has_bf16
from jobs.storage import open_store
from jobs.write import put_chunk
from segmodel import headers, images, masks
from segmodel.inference import Predictor
from segmodel.model import mask_rcnn
from segmodel.resize import Resizer
from segmodel.scenes import scene
from segmodel.schema import PREDICTIONS, detection_rows
from segmodel.settings import Architecture, network_size
from tests.bench import bench_masks, results
from tests.bench.bench_job import row
from tests.bench.bench_whole import SIZES, lively
from tests.bench.memory import peak_mib

REPEATS = 3
PHOTOS = {"640x480": (480, 640), "12 megapixels": (3000, 4000)}


def stages() -> None:
    """Measure, and add the rows."""
    torch.set_num_threads(1)
    for name, size_hw in PHOTOS.items():
        results.add("stages", _pixels(name, size_hw))
    for arch in SIZES:
        results.add("stages", _network(arch))


def _pixels(name: str, size_hw: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Decode and transform a photo for R50 at 800 pixels."""
    file = io.BytesIO()
    small = Image.fromarray(scene(0, (480, 640)).image)
    small.resize(size_hw[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    data = file.getvalue()
    settings = lively("maskrcnn_resnet50_fpn").settings
    network_hw = network_size(settings, size_hw)
    pixels = images.decode(data)
    row_ = torch.empty((1, 3, *network_hw), memory_format=torch.channels_last)[0]
    mean, std = torch.tensor([settings.image_mean, settings.image_std])[:, :, None, None]
    resizer = Resizer(settings.image_mean, settings.image_std)

    def transform() -> None:
        whole = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)
        functional.interpolate(((whole - mean) / std)[None], network_hw, mode="bilinear")

    def reduced() -> None:
        images.decode_reduced(data, images.MAX_PIXELS, lambda hw: network_size(settings, hw))

    return _timed(
        f"JPEG of {name}",
        {
            "decode, Pillow": lambda: np.array(images._to_rgb(images._load(headers.jpeg(data)))),
            "decode": lambda: images.decode(data),
            "decode, reduced for 800 px": reduced,
            "transform, torch": transform,
            "transform": lambda: resizer.write(pixels, row_),
        },
    )


def _network(arch: Architecture) -> Iterator[dict[str, Any]]:
    """Run the network, encode and write what it finds."""
    bundle = lively(arch)
    image = scene(1, (480, 640)).image
    model = mask_rcnn(bundle.settings)
    model.load_state_dict(dict(bundle.weights))
    model.roi_heads.score_thresh = bundle.score_threshold
    model.eval()
    whole = torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div(255)
    exact, fast = (Predictor(bundle, "cpu", kind) for kind in ("fp32", "fp32-fast"))
    ways = {"network, fp32": exact, "network, fp32-fast": fast}
    if cpu_has_bf16():
        ways["network, bf16"] = Predictor(bundle, "cpu", "bf16")
        ways["network, bf16, compiled"] = Predictor(bundle, "cpu", "bf16", compiled=True)
    (found,) = exact.predict([image])
    assert found.mask_probs is not None
    probs, boxes = found.mask_probs, found.boxes_xyxy
    rles = masks.encode(probs, boxes, found.size_hw)
    one = {
        **dict.fromkeys(PREDICTIONS.names),
        "status": "ok",
        "detections": detection_rows(found, rles, bundle.by_label()),
    }

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows = [{**one, "image_id": str(n), "shard": "", "key": str(n)} for n in range(16)]
            table = pa.Table.from_pylist(rows, schema=PREDICTIONS)
            put_chunk(open_store(folder, None), "chunk", table, {})

    return _timed(
        f"{arch} at {bundle.settings.min_size} px, a scene of 480x640, {len(found)} detections",
        {
            "network, torchvision with pasted masks": lambda: _plain(model, whole),
            **{name: partial(way.predict, [image]) for name, way in ways.items()},
            "encode, paste and pycocotools": lambda: bench_masks.plain(probs, boxes, found.size_hw),
            "encode": lambda: masks.encode(probs, boxes, found.size_hw),
            "rows and write, 16 images": write,
        },
    )


def _plain(model: Any, image: torch.Tensor) -> None:
    with torch.inference_mode():
        model([image])


def _timed(case: str, calls: Mapping[str, Callable[[], object]]) -> Iterator[dict[str, Any]]:
    """CPU milliseconds of each call, in turns, of which the first does not count; then each call's memory."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(REPEATS + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                took[name].append(1000 * (time.process_time() - started))
    for name, some in took.items():
        spread = f"CPU time, {min(some):.3g} to {max(some):.3g}"
        yield row(case, name, statistics.median(some), "ms", spread)
        peak = peak_mib(calls[name])
        yield row(
            case, f"{name}, memory at its peak", peak, "MiB", "resident, above before the call"
        )
