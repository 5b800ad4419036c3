"""What the pipeline itself costs, and what it holds in memory.

The same scenes as JPEGs in shards, the same small model, two ways: `segjobs predict` as a user runs
it, and a bare loop over the same `Predictor` in one process with as many threads as the job's
actors have together.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from PIL import Image

from segmodel import bundle, initial, scenes
from segmodel.allocator import ONE_ARENA, keep_freed_memory
from segmodel.settings import Architecture, ModelSettings
from tests.bench import results

PER_SHARD = 100
CHUNK_SIZE = 16
# Of a job that is timed. Actors that take turns between two chunks finish both together, so it divides by four.
CHUNKS = 40
# What a trained model finds in a busy picture; random weights find as many as are allowed.
DETECTIONS = 20
POLL_S = 0.2
MEMORY_NOTE = "peak of anonymous memory (RssAnon) of one process, polled"
CORES = len(psutil.Process().cpu_affinity())


def cost(repeats: int = 3) -> None:
    """Measure images/s of the job against the bare loop, in turns, for both sizes of model."""
    for arch, min_size, num_images in (
        ("small", 320, 320),
        ("maskrcnn_resnet50_fpn", 800, 80),
    ):
        _cost(arch, min_size, num_images, repeats)


def _cost(arch: Architecture, min_size: int, num_images: int, repeats: int) -> None:
    chunk_size = num_images // CHUNKS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_bundle(folder / "model", min_size, arch)
        make_shards(folder / "shards", num_images, (480, 640))
        steady, whole, bare, two = [], [], [], []
        for repeat in range(repeats):
            bare.append(bare_loop(folder, model, CORES))
            two.append(bare_loops(folder, model))
            output = folder / f"out-{repeat}"
            started = time.perf_counter()
            job(folder / "shards", output, model, DETECTIONS, chunk_size)
            whole.append(num_images / (time.perf_counter() - started))
            # The bare loops, too, are timed while each of them has images.
            steady.append(steady_rate(output, tail=False))
    case = f"{arch} at {min_size} px, {num_images} scenes of 640x480, {DETECTIONS} detections"
    turns = f"in {repeats} turns, bare loops and job by turns"
    rates = {
        "bare loop over Predictor": bare,
        "bare loops, a process of one thread for each core": two,
        "job, steady": steady,
        "job, with start-up": whole,
    }
    results.add(
        "job against bare loop",
        [
            *(_median(case, name, values, "images/s", turns) for name, values in rates.items()),
            _median(case, "job, steady / bare loop", _ratios(steady, bare), "ratio", turns),
            _median(
                case,
                "job, steady / bare loops of its own layout",
                _ratios(steady, two),
                "ratio",
                turns,
            ),
        ],
    )


def _ratios(some: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(some, others, strict=True)]


def _median(
    case: str, measure: str, values: Sequence[float], unit: str, turns: str
) -> dict[str, Any]:
    note = f"{min(values):.3g} to {max(values):.3g} {turns}"
    return row(case, measure, statistics.median(values), unit, note)


def memory(
    sizes: tuple[int, ...] = (400, 1200, 3600), min_size: int = 320, repeats: int = 2
) -> None:
    """Measure how memory and time grow with the images, the small network on scenes.

    The peak memory of the driver and of each kind of worker; seconds for each image that one size has more than
    the one before, start and end of the job included; and images/s in each quarter of the longest job.
    """
    peaks: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    took: dict[int, list[float]] = {size: [] for size in sizes}
    quarters: list[list[float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_bundle(folder / "model", min_size)
        for size in sizes:
            make_shards(folder / f"shards-{size}", size, (480, 640))
        for repeat in range(repeats):
            for size in sizes:
                output = folder / f"out-{size}-{repeat}"
                started = time.perf_counter()
                peaks[size].append(job(folder / f"shards-{size}", output, model, DETECTIONS))
                took[size].append(time.perf_counter() - started)
            quarters.append(rates_of_parts(output, 4))
    turns = f"in {repeats} turns"
    network = f"small at {min_size} px, {DETECTIONS} detections"
    results.add("memory", _memory_rows(network, peaks, turns))
    results.add("linear cost", _cost_rows(network, took, quarters, turns))


def _memory_rows(
    network: str, peaks: Mapping[int, Sequence[Mapping[str, float]]], turns: str
) -> Iterator[dict[str, Any]]:
    roles = sorted(peaks[min(peaks)][0])
    for size, found in peaks.items():
        for role in roles:
            case, values = f"{network}, {size} images", [one[role] for one in found]
            yield _median(case, f"peak of {role}", values, "MiB", f"{turns}; {MEMORY_NOTE}")
    fewest, most = peaks[min(peaks)], peaks[max(peaks)]
    for role in roles:
        ratios = _ratios([one[role] for one in most], [one[role] for one in fewest])
        case = f"{network}, {max(peaks)} / {min(peaks)} images"
        yield _median(case, f"peak of {role}", ratios, "ratio", turns)


def _cost_rows(
    network: str,
    took: Mapping[int, Sequence[float]],
    quarters: Sequence[Sequence[float]],
    turns: str,
) -> Iterator[dict[str, Any]]:
    for size, seconds in took.items():
        yield _median(f"{network}, {size} images", "job, start to end", seconds, "s", turns)
    for fewer, more in pairwise(took):
        case = f"{network}, from {fewer} to {more} images"
        each = [(b - a) / (more - fewer) for a, b in zip(took[fewer], took[more], strict=True)]
        yield _median(case, "each image more", [1000 * one for one in each], "ms", turns)
    for number, rates in enumerate(zip(*quarters, strict=True), 1):
        case = f"{network}, {max(took)} images"
        yield _median(case, f"quarter {number} of the chunks", rates, "images/s", turns)


def row(case: str, measure: str, value: float, unit: str, note: str = "") -> dict[str, Any]:
    return {"case": case, "measure": measure, "value": f"{value:.4g}", "unit": unit, "note": note}


def make_bundle(folder: Path, min_size: int, arch: Architecture = "small") -> Path:
    categories = [(category.id, category.name) for category in scenes.CATEGORIES]
    settings = ModelSettings(
        arch=arch, num_classes=len(categories) + 1, min_size=min_size, max_size=2 * min_size
    )
    made = initial.random_bundle(settings, initial.numbered_categories(categories), seed=1)
    bundle.save(folder, made)
    return folder


def make_shards(folder: Path, num_images: int, size_hw: tuple[int, int]) -> None:
    """Write tars of JPEGs; a few dozen scenes are drawn and repeated."""
    folder.mkdir()
    drawn = []
    for seed in range(min(num_images, 50)):
        data = io.BytesIO()
        Image.fromarray(scenes.scene(seed, size_hw).image).save(data, "JPEG", quality=90)
        drawn.append(data.getvalue())
    for start in range(0, num_images, PER_SHARD):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as shard:
            for number in range(start, min(start + PER_SHARD, num_images)):
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                content = drawn[number % len(drawn)]
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def job(
    shards: Path, output: Path, model: Path, detections: int, chunk_size: int = CHUNK_SIZE
) -> dict[str, float]:
    """Run `segjobs predict`; return the peak memory in MiB of each kind of process."""
    arguments = ["--input", shards, "--output", output, "--model", model]
    arguments += [
        "--chunk-size",
        chunk_size,
        "--score-threshold",
        0,
        "--max-detections",
        detections,
    ]
    command = [sys.executable, "-m", "jobs", "predict", *map(str, arguments)]
    log = output.with_suffix(".log")
    peaks: dict[str, float] = {}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:
            for role, value in now(process.pid):
                peaks[role] = max(peaks.get(role, 0), value)
            time.sleep(POLL_S)
    if process.returncode:
        raise RuntimeError(log.read_text())
    return peaks


def now(driver: int) -> Iterator[tuple[str, float]]:
    """Yield role and memory in MiB of the driver and of Ray's workers that it started."""
    for process in [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]:
        try:
            title = " ".join(process.cmdline())
            used = anonymous_mib(process.pid)
        except (psutil.Error, OSError):
            continue
        if process.pid == driver:
            yield "driver", used
        elif "MapBatches(Predict)" in title:
            yield "an actor", used
        elif "ReadChunks" in title or "encode_and_write" in title or title.startswith("ray::IDLE"):
            yield "a reader or writer", used
        elif "raylet" in title.split(" ")[0] or "gcs_server" in title.split(" ")[0]:
            yield "raylet or GCS", used


def anonymous_mib(pid: int) -> float:
    """Return what a process holds for itself: not libraries, not the object store's shared pages."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def steady_rate(output: Path, *, tail: bool = True) -> float:
    """Return images/s without start-up: from when each actor has finished its first chunks.

    Without `tail` until there are as many chunks left as all actors hold, since some have none to do then.
    """
    return _rate(_finished(output, tail=tail))


def rates_of_parts(output: Path, number: int) -> list[float]:
    """Return images/s in each of so many parts of a job, in their order, without start-up and tail."""
    finished = _finished(output, tail=False)
    bounds = [index * (len(finished) - 1) // number for index in range(number + 1)]
    return [_rate(finished[first : last + 1]) for first, last in pairwise(bounds)]


def _finished(output: Path, *, tail: bool) -> list[tuple[float, int]]:
    """Return when chunks were finished, and their images; the first one is where the time begins."""
    # Here, since the accelerator's part imports this module where there is no Ray.
    from jobs.pipeline import CHUNKS_IN_ACTOR

    manifest = json.loads((output / "_manifest.json").read_text())
    held = CHUNKS_IN_ACTOR * manifest["pool"]["max_actors"]
    objects = (output / "predictions").iterdir()
    chunks = sorted((path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in objects)
    return chunks[held - 1 : None if tail else -held]


def _rate(finished: Sequence[tuple[float, int]]) -> float:
    images = sum(count for _, count in finished[1:])
    return images / (finished[-1][0] - finished[0][0])


def bare_loop(folder: Path, model: Path, threads: int) -> float:
    """Return images/s of a loop over `Predictor` in a fresh process, without its start-up."""
    command = _bare_command(folder, model, threads)
    done = subprocess.run(command, capture_output=True, check=True, env=_environment())
    return float(done.stdout)


def bare_loops(folder: Path, model: Path) -> float:
    """Return images/s of as many such processes at once as there are cores, of one thread each."""
    running = [
        subprocess.Popen(
            _bare_command(folder, model, 1), stdout=subprocess.PIPE, env=_environment()
        )
        for _ in range(CORES)
    ]
    return sum(float(process.communicate()[0]) for process in running)


def _environment() -> dict[str, str]:
    """Return what a local Ray gives its processes."""
    return {**os.environ, **ONE_ARENA}


def _bare_command(folder: Path, model: Path, threads: int) -> list[str]:
    module = [sys.executable, "-m", "tests.bench.bench_job"]
    return [*module, str(folder / "shards"), str(model), str(threads)]


def _bare(shards: Path, model: Path, threads: int) -> float:
    import torch

    from segmodel import masks
    from segmodel.images import decode
    from segmodel.inference import Predictor

    keep_freed_memory()
    torch.set_num_threads(threads)
    masks.warm_up()
    predictor = Predictor(bundle.load(model), "cpu", score_threshold=0, max_detections=DETECTIONS)
    contents = []
    for path in sorted(shards.iterdir()):
        with tarfile.open(path) as shard:
            contents += [shard.extractfile(member).read() for member in shard]  # type: ignore[union-attr]
    predictor.predict([decode(contents[0])])
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        # Decoding runs ahead of the network, as in the job.
        for _, found in predictor.stream(enumerate(pool.map(decode, contents))):
            masks.encode(found.mask_probs, found.boxes_xyxy, found.size_hw)
    return len(contents) / (time.perf_counter() - started)


if __name__ == "__main__":
    print(_bare(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
