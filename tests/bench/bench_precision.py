"""AP of each precision, and how far its masks are from those of fp32.

`python -m tests.bench precision`: the shipped bundle on fresh scenes. With a trained bundle and a packed set,
`python -m tests.bench.bench_precision BUNDLE SET`; and `... BUNDLE SET MIN_SIZE` for what decoding at a lower resolution
costs on the set's photos, when the network takes them at MIN_SIZE pixels: half of a photo's shorter side or less.
"""

import io
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from jobs import training_set
from jobs.processor import cpu_has_bf16
from segmodel import coco, masks, scenes
from segmodel.bundle import Bundle, load
from segmodel.evaluation import evaluate
from segmodel.images import MAX_PIXELS, Picture, decode, decode_reduced
from segmodel.inference import Predictor
from segmodel.schema import detection_rows
from segmodel.settings import InferencePrecision, network_size
from tests.bench import agreement as agreements
from tests.bench import results
from tests.bench.bench_job import row

DEMO_BUNDLE = Path(__file__).parents[2] / "jobs" / "demo_bundle"
CPU = torch.device("cpu")
# Not those that the bundle was trained on.
FRESH = range(5_000_000, 5_000_040)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to predict: pictures, arithmetic, and whether `torch.compile` makes the network's programs."""

    name: str
    precision: InferencePrecision
    images: Sequence[Any]
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Set:
    """Pictures and their truth, rows of the one schema."""

    name: str
    images: Sequence[Any]
    truth: Sequence[dict[str, Any]]


def precision() -> None:
    """Measure the shipped bundle on fresh scenes, and add the rows."""
    compare(load(DEMO_BUNDLE), fresh(len(FRESH)))


def accelerated(device: torch.device, count: int) -> None:
    """Measure the shipped bundle on so many fresh scenes and a GPU, and add the rows; on a CPU to see that it runs."""
    kinds = get_args(InferencePrecision)[1:] if device.type != "cpu" else ("fp32", "fp32-fast")
    pictures = fresh(count)
    ways = [Way(name=kind, precision=kind, images=pictures.images) for kind in kinds]
    bundle = load(DEMO_BUNDLE)
    case = f"{_network(bundle)}, {count} {pictures.name}, {device.type}"
    _measure(bundle, case, pictures.truth, ways, device)


def fresh(count: int) -> Set:
    """Return scenes that the shipped bundle was not trained on."""
    made = [scenes.scene(seed) for seed in FRESH[:count]]
    truth = list(coco.rows(scenes.coco(made, [f"{number}.jpg" for number in range(len(made))])))
    return Set(name="fresh scenes", images=[one.image for one in made], truth=truth)


def packed(bundle: Path, folder: str, min_size: int | None = None) -> None:
    """Measure a trained bundle on a packed set, and add the rows."""
    chunks = training_set.load([folder], None).chunks
    found = [{**one, "status": "ok"} for one in training_set.rows(chunks)]
    name = f"{Path(folder).name}, {len(found)} photos"
    if min_size is None:
        images = [decode(one["data"]) for one in found]
        compare(load(bundle), Set(name=name, images=images, truth=found))
    else:
        reduce(_resized(load(bundle), min_size), name, [one["data"] for one in found], found)


def compare(bundle: Bundle, pictures: Set) -> None:
    """Score each precision, fp32 first, and those that are quick on this CPU once more compiled."""
    images = pictures.images
    ways = [
        Way(name=kind, precision=kind, images=images) for kind in get_args(InferencePrecision)[1:]
    ]
    quick: list[InferencePrecision] = ["fp32-fast", *(["bf16"] if cpu_has_bf16() else [])]  # type: ignore[list-item]
    ways += [
        Way(name=f"{kind} compiled", precision=kind, images=images, compiled=True) for kind in quick
    ]
    _measure(bundle, f"{_network(bundle)}, {pictures.name}", pictures.truth, ways)


def decoding() -> None:
    """Measure what decoding at a lower resolution costs: fresh scenes, enlarged tenfold to 8 megapixels."""
    made = [_enlarged(scenes.scene(seed)) for seed in FRESH]
    truth = list(coco.rows(scenes.coco(made, [f"{number}.jpg" for number in range(len(made))])))
    files = [_jpeg(one.image) for one in made]
    reduce(load(DEMO_BUNDLE), f"scenes enlarged to {made[0].image.shape[:2]}", files, truth)


def reduce(bundle: Bundle, name: str, files: Sequence[bytes], truth: Sequence[Any]) -> None:
    """Score files decoded whole and reduced."""
    needed = partial(network_size, bundle.settings)
    whole = [decode_reduced(data, MAX_PIXELS, None) for data in files]
    reduced = [decode_reduced(data, MAX_PIXELS, needed) for data in files]
    fewer = sum(a.pixels.shape != b.pixels.shape for a, b in zip(whole, reduced, strict=True))
    if not fewer:
        raise SystemExit("no photo is large enough to be reduced: give a smaller MIN_SIZE")
    ways = [
        Way(name="fp32-fast, decoded whole", precision="fp32-fast", images=whole),
        Way(
            name=f"fp32-fast, {fewer} of {len(files)} reduced to {_mean_share(whole, reduced):.2g} of their pixels",
            precision="fp32-fast",
            images=reduced,
        ),
    ]
    _measure(bundle, f"{_network(bundle)}, {name}", truth, ways)


def _mean_share(whole: Sequence[Picture], reduced: Sequence[Picture]) -> float:
    """Return how many of the pixels are left in those that are reduced."""
    shares = [b.pixels.size / a.pixels.size for a, b in zip(whole, reduced, strict=True)]
    return float(np.mean([share for share in shares if share < 1]))


def _network(bundle: Bundle) -> str:
    return f"{bundle.settings.arch} at {bundle.settings.min_size} px"


def _resized(bundle: Bundle, min_size: int) -> Bundle:
    settings = replace(bundle.settings, min_size=min_size, max_size=2 * min_size)
    return replace(bundle, settings=settings, digest="")


def _enlarged(one: scenes.Scene, factor: int = 10) -> scenes.Scene:
    height, width = one.image.shape[:2]
    image = Image.fromarray(one.image).resize((factor * width, factor * height))
    masks_ = one.masks.repeat(factor, axis=1).repeat(factor, axis=2)
    return scenes.Scene(image=np.asarray(image), masks=masks_, category_ids=one.category_ids)


def _jpeg(pixels: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=92)
    return data.getvalue()


def _measure(
    bundle: Bundle,
    case: str,
    truth: Sequence[dict[str, Any]],
    ways: Iterable[Way],
    device: torch.device = CPU,
) -> None:
    """Add rows for each way, whose masks are compared with those of the first."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    reference: list[list[dict[str, Any]]] = []
    for way in ways:
        seconds, found = _predict(bundle, way, device)
        reference = reference or found
        scores = evaluate(
            truth, [{**t, "detections": d} for t, d in zip(truth, found, strict=True)]
        )
        agreement = agreements.compare(list(zip(found, reference, strict=True)))
        note = f"of the first's masks: {agreement}"
        measured = [("CPU seconds for an image", seconds, "s")]
        for what, metrics in (("mask", scores.mask), ("box", scores.box)):
            if metrics is not None:
                measured += [(f"{what} AP", metrics.AP, "AP"), (f"{what} AP50", metrics.AP50, "AP")]
        measured += agreement.figures()
        name = way.name
        results.add("precision", [row(case, f"{name}, {m}", v, u, note) for m, v, u in measured])


def _predict(
    bundle: Bundle, way: Way, device: torch.device
) -> tuple[float, list[list[dict[str, Any]]]]:
    """Return CPU seconds for an image, without building and compiling, and what is found."""
    predictor = Predictor(bundle, str(device), way.precision, compiled=way.compiled)
    by_label, found = bundle.by_label(), []
    masks.warm_up()
    # Compiled with the first.
    predictor.predict(way.images[:1])
    started = time.process_time()
    for image in way.images:
        (one,) = predictor.predict([image])
        assert one.mask_probs is not None
        rles = masks.encode(one.mask_probs, one.boxes_xyxy, one.size_hw)
        found.append(detection_rows(one, rles, by_label))
    return (time.process_time() - started) / len(found), found


if __name__ == "__main__":
    packed(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:4]))
