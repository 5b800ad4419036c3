"""Whole jobs, from JPEGs to Parquet: `segjobs predict` against torchvision in a plain loop and in Ray Data.

The same photos and weights, on the same cores, by turns, each in processes of its own. The plain loop and the
class for Ray Data are what one writes by the two libraries' documentation: PIL, torchvision's model, its pasted
masks, `> 0.5`, pycocotools, a row for each image.

What a job finds is paired with what the plain loop finds, one to one. Random weights show that fp32 is equal to the
bit, and nothing of other precisions: their scores are so close that roundings choose others. For those there is the
shipped bundle, on scenes. `python -m tests.bench equality` compares on few images and times nothing.

Photos are those of a folder that `SEGJOBS_PHOTOS` names; scenes where it names none.
`python -m tests.bench.bench_whole trained BUNDLE FOLDER` does the same with a model of your own on the photos that it is
for, and `python -m tests.bench.bench_whole shipped [PRECISION...]` with the shipped one alone.
"""

import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pycocotools.mask as coco_mask
import torch
from PIL import Image

from jobs.processor import cpu_has_bf16
from segmodel import bundle as bundles
from segmodel.bundle import Bundle
from segmodel.model import mask_rcnn
from segmodel.scenes import scene
from segmodel.settings import Architecture, ModelSettings
from tests.bench import results
from tests.bench.agreement import SURE_SCORE, Detections, Pair, compare, sure
from tests.bench.bench_job import CORES, anonymous_mib, row, steady_rate
from tests.segmodel.conftest import CATEGORIES, lively_weights

SIZES: Mapping[Architecture, tuple[int, int]] = {
    "maskrcnn_resnet50_fpn": (800, 1333),
    "small": (320, 640),
}
DEMO_BUNDLE = Path(__file__).parents[2] / "jobs" / "demo_bundle"
# Scenes that the shipped bundle was not trained on.
FIRST_FRESH = 5_000_000
BATCH = 2
REFERENCE = "reference"
# What the names of copies begin with, which come first and are not timed.
WARM = "-warm-"
# What is no JPEG is made one.
SUFFIXES = (".jpg", ".png")
MODULE = (sys.executable, "-m", "tests.bench.bench_whole")
Found = dict[str, Detections]
# What a way is called, how it is run, and how its images/s are read afterwards.
Way = tuple[str, list[str], Callable[[], float]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is predicted.

    Attributes:
        name: Of the network.
        bundle: Makes it.
        images: How many give a steady rate.
        few: How many are enough to see how the ways agree, bf16 on a CPU that imitates it among them.
        chunk_size: Images in a chunk of the job.
        scene_hw: Height and width of the scenes.
        only_scenes: The network knows nothing else, so photos are not for it.
    """

    name: str
    bundle: Callable[[], Bundle]
    images: int
    few: int
    chunk_size: int
    scene_hw: tuple[int, int] = (480, 640)
    only_scenes: bool = False


def cases() -> tuple[Case, ...]:
    """Return those with random weights, for speed and equality to the bit, and the trained one."""
    resnet, small = (partial(lively, arch) for arch in SIZES)
    return (
        Case(name="maskrcnn_resnet50_fpn", bundle=resnet, images=16, few=2, chunk_size=1),
        Case(name="small", bundle=small, images=120, few=12, chunk_size=4),
        Case(
            name="small, trained",
            bundle=partial(bundles.load, DEMO_BUNDLE),
            images=240,
            few=24,
            chunk_size=4,
            scene_hw=(256, 320),
            only_scenes=True,
        ),
    )


def whole(repeats: int = 3) -> None:
    """Measure all, and add the rows: each way once in every turn, bf16 only where the CPU has it."""
    for case in cases():
        _measure(case, repeats, _precisions())


def shipped(*precisions: str) -> None:
    """Measure the bundle that ships, and add the rows, of these precisions alone where some are named."""
    (case,) = (case for case in cases() if case.only_scenes)
    _measure(case, 3, precisions or _precisions())


def _precisions() -> list[str]:
    return ["fp32", "fp32-fast", *(["bf16"] if cpu_has_bf16() else [])]


def _measure(case: Case, repeats: int, precisions: Sequence[str]) -> None:
    rates: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        title = _prepare(case, folder, case.images)
        for turn in range(repeats):
            for way, command, rate in _ways(case, folder, turn, precisions):
                peaks[way] = max(peaks.get(way, 0), _watched(command, folder / f"{way}.log"))
                rates.setdefault(way, []).append(rate())
        pairs = {way: _pairs(folder, f"{way}-{repeats - 1}") for way in rates}
    results.add("whole job", _rows(title, rates, peaks, pairs))
    results.add("whole job", _equal_rows(title, pairs))


def trained(bundle: Path, photos: Path) -> None:
    """Measure a trained bundle on photos that it knows things in, and add the rows."""
    os.environ["SEGJOBS_PHOTOS"] = str(photos)
    loaded = bundles.load(bundle)
    case = Case(
        name=f"{loaded.settings.arch}, trained",
        bundle=lambda: loaded,
        images=16,
        few=16,
        chunk_size=1,
    )
    _measure(case, 3, _precisions())


def equality() -> None:
    """Compare what all ways find, bf16 too, on few images, and add the rows; nothing is timed."""
    for case in cases():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            title = _prepare(case, folder, case.few)
            pairs = {}
            for way, command, _ in _ways(case, folder, 0, ["fp32", "fp32-fast", "bf16"]):
                _watched(command, folder / f"{way}.log")
                pairs[way] = _pairs(folder, f"{way}-0")
            results.add("whole job", _equal_rows(title, pairs))


def _prepare(case: Case, folder: Path, count: int) -> str:
    """Write bundle and photos, and what the plain loop finds in them; return what to call it."""
    source = _photos(folder, case, count)
    bundle = case.bundle()
    bundles.save(folder / "model", bundle)
    # The job has an actor of one thread for each core, and sums go by thread: equal is what one thread gives.
    _watched([*MODULE, REFERENCE, str(folder), str(folder / REFERENCE)], folder / "log")
    return f"{case.name} at {bundle.settings.min_size} px, {count} {source}, up to 100 detections"


def _rows(
    case: str,
    rates: Mapping[str, list[float]],
    peaks: Mapping[str, float],
    pairs: Mapping[str, list[Pair]],
) -> Iterator[dict[str, Any]]:
    for way, values in rates.items():
        spread = f"{min(values):.3g} to {max(values):.3g} in {len(values)} turns, by turns"
        note = f"{spread}; as plain's of one thread: {compare(pairs[way])}"
        yield row(case, way, statistics.median(values), "images/s", note)
        yield row(
            case, f"{way}, all processes at their peak", peaks[way], "MiB", "anonymous memory"
        )
        for other in ("plain", "raydata"):
            ratios = [a / b for a, b in zip(values, rates[other], strict=True)]
            spread = f"{min(ratios):.3g} to {max(ratios):.3g} in {len(ratios)} turns"
            yield row(case, f"{way} / {other}", statistics.median(ratios), "ratio", spread)


def _equal_rows(case: str, pairs: Mapping[str, list[Pair]]) -> Iterator[dict[str, Any]]:
    for way, all_ in pairs.items():
        for which, some in ((way, all_), (f"{way}, scores from {SURE_SCORE}", sure(all_))):
            agreement = compare(some)
            note = f"against plain's of one thread: {agreement}"
            for measure, value, unit in agreement.figures():
                yield row(case, f"{which}, {measure}", value, unit, note)


def _ways(case: Case, folder: Path, turn: int, precisions: Sequence[str]) -> Iterator[Way]:
    for way in ("plain", "raydata"):
        out = folder / f"{way}-{turn}"
        yield (
            way,
            [*MODULE, way, str(folder), str(out)],
            lambda out=out: float((out / "rate").read_text()),
        )
    for precision in precisions:
        out = folder / f"job {precision}-{turn}"
        flags = {
            "input": folder / "shards",
            "output": out,
            "model": folder / "model",
            "chunk-size": case.chunk_size,
            "precision": precision,
        }
        command = [sys.executable, "-m", "jobs", "predict"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        yield f"job {precision}", command, lambda out=out: steady_rate(out)


def _watched(command: list[str], log: Path) -> float:
    """Run a command; return the peak in MiB of the anonymous memory of all its processes together."""
    peak = 0.0
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:
            peak = max(peak, sum(_each_mib(process.pid)))
            time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(log.read_text()[-4000:])
    return peak


def _each_mib(pid: int) -> Iterator[float]:
    for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            yield anonymous_mib(one.pid)
        except OSError:
            continue


def _pairs(folder: Path, way: str) -> list[Pair]:
    wanted, found = (read(folder / name) for name in (REFERENCE, way))
    return [(found[name], wanted[name]) for name in wanted]


def read(output: Path) -> Found:
    """Return the detections of each photo that is no copy."""
    # A job's output has other tables too.
    rows = output / "predictions" if (output / "predictions").is_dir() else output
    table = pa.concat_tables(
        pq.read_table(path).select(["key", "detections"]) for path in rows.rglob("*.parquet")
    )
    found = {Path(one["key"]).name: one["detections"] for one in table.to_pylist()}
    return {name: detections for name, detections in found.items() if not name.startswith(WARM)}


def lively(arch: Architecture) -> Bundle:
    """Return random weights that find a hundred things in any photo, of different classes and shapes."""
    settings = ModelSettings(
        arch=arch, num_classes=len(CATEGORIES) + 1, min_size=SIZES[arch][0], max_size=SIZES[arch][1]
    )
    return Bundle(
        settings=settings,
        categories=CATEGORIES,
        weights=lively_weights(arch, settings.num_classes),
        score_threshold=0.05,
        max_detections=100,
    )


def warm_images(chunk_size: int) -> int:
    """Return how many images a job's actors have done when its steady state begins."""
    from jobs.pipeline import CHUNKS_IN_ACTOR

    return chunk_size * CHUNKS_IN_ACTOR * CORES


def _photos(folder: Path, case: Case, count: int) -> str:
    """Write photos as loose files and as a tar; return what they are."""
    (folder / "photos").mkdir()
    (folder / "shards").mkdir()
    given = None if case.only_scenes else os.environ.get("SEGJOBS_PHOTOS")
    paths = sorted(p for p in Path(given).iterdir() if p.suffix in SUFFIXES) if given else []
    for number in range(count):
        target = folder / "photos" / f"{number:04d}.jpg"
        if paths and paths[number % len(paths)].suffix == ".jpg":
            target.write_bytes(paths[number % len(paths)].read_bytes())
        elif paths:
            Image.open(paths[number % len(paths)]).convert("RGB").save(target, quality=95)
        else:
            drawn = scene(FIRST_FRESH + number, case.scene_hw)
            Image.fromarray(drawn.image).save(target, quality=92)
    # Every way starts on copies, in the order of names, and is timed on exactly the same photos then.
    for number in range(warm_images(case.chunk_size)):
        copied = (folder / "photos" / f"{number % count:04d}.jpg").read_bytes()
        (folder / "photos" / f"{WARM}{number:04d}.jpg").write_bytes(copied)
    with tarfile.open(folder / "shards" / "photos.tar", "w") as shard:
        for path in sorted((folder / "photos").iterdir()):
            shard.add(path, path.name)
    return "photos" if paths else "scenes of {}x{}".format(*case.scene_hw)


class Plain:
    """torchvision's model as its documentation uses it."""

    def __init__(self, folder: Path, threads: int = CORES) -> None:
        bundle = bundles.load(folder / "model")
        self.model = mask_rcnn(bundle.settings)
        self.model.load_state_dict(dict(bundle.weights))
        self.model.roi_heads.score_thresh = bundle.score_threshold
        self.model.roi_heads.detections_per_img = bundle.max_detections
        self.model.eval()
        self.categories = bundle.by_label()
        torch.set_num_threads(threads)

    def row(self, name: str, pixels: Any) -> dict[str, Any]:
        """Return a photo's row."""
        with torch.inference_mode():
            image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous().float() / 255
            (found,) = self.model([image])
        full = (found["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in full]
        detections = [
            {
                "category_id": self.categories[label].id,
                "score": score,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
            }
            for label, score, (x0, y0, x1, y1), rle in zip(
                found["labels"].tolist(),
                found["scores"].tolist(),
                found["boxes"].tolist(),
                rles,
                strict=True,
            )
        ]
        return {"key": name, "detections": detections, "finished": time.time()}

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Take a batch of Ray Data, return a table."""
        pairs = zip(batch["path"], batch["image"], strict=True)
        return pa.Table.from_pylist([self.row(name, pixels) for name, pixels in pairs])


def plain(folder: Path, output: Path, threads: int = CORES) -> None:
    """Loop over the photos."""
    model = Plain(folder, threads)
    paths = sorted((folder / "photos").iterdir())
    model.row("", np.asarray(Image.open(paths[0]).convert("RGB")))
    paths = [path for path in paths if not path.name.startswith(WARM)]
    started = time.perf_counter()
    rows = [model.row(path.name, np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    output.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), output / "rows.parquet")
    (output / "rate").write_text(str(len(paths) / (time.perf_counter() - started)))


def raydata(folder: Path, output: Path) -> None:
    """Run `read_images`, `map_batches` of a class, `write_parquet`.

    One actor, since two would hold both CPUs and nothing could be read, but with a thread for each core. The
    copies are not counted, as they wait for Ray, imports and the model.
    """
    import ray

    ray.init(num_cpus=CORES, include_dashboard=False, logging_level="ERROR")
    (
        ray.data.read_images(str(folder / "photos"), mode="RGB", include_paths=True)
        .map_batches(
            Plain,
            fn_constructor_args=(folder,),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(str(output))
    )
    table = pa.concat_tables(pq.read_table(path) for path in output.rglob("*.parquet"))
    warm = sum(Path(key).name.startswith(WARM) for key in table["key"].to_pylist())
    times = sorted(table["finished"].to_pylist())
    (output / "rate").write_text(str((len(times) - warm) / (times[-1] - times[warm - 1])))


if __name__ == "__main__":
    ways = {
        "plain": plain,
        "raydata": raydata,
        REFERENCE: partial(plain, threads=1),
        "trained": trained,
    }
    if sys.argv[1] == "shipped":
        shipped(*sys.argv[2:])
    else:
        ways[sys.argv[1]](*map(Path, sys.argv[2:]))
