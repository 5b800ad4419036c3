"""What the pipeline itself costs, and what it holds in memory.

The same scenes as JPEGs in shards, the same small model, two ways: `segjobs predict` as a user runs
it, and a bare loop over the same `Predictor` in one process with as many threads as the job's
actors have together.
"""

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from segmodel import bundle, initial, scenes
from segmodel.settings import Architecture, ModelSettings
from tests.bench import results

PER_SHARD = 100
CHUNK_SIZE = 16
# What a trained model finds in a busy picture; random weights find as many as are allowed.
DETECTIONS = 20
POLL_S = 0.2
MEMORY_NOTE = "peak of anonymous memory (RssAnon) of one process, polled"
CORES = len(psutil.Process().cpu_affinity())


def cost(repeats: int = 3) -> None:
    """Measure images/s of the job against the bare loop, in turns, for both sizes of model."""
    for arch, min_size, num_images in (
        ("small", 320, 300),
        ("maskrcnn_resnet50_fpn", 800, 40),
    ):
        _cost(arch, min_size, num_images, repeats)


def _cost(arch: Architecture, min_size: int, num_images: int, repeats: int) -> None:
    chunk_size = max(2, num_images // 20)
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
            steady.append(steady_rate(output))
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


def memory(sizes: tuple[int, ...] = (200, 2000), min_size: int = 64) -> None:
    """Measure how memory and speed hold when images grow in number.

    The peak memory of the driver and of each kind of worker, and images/s, for several numbers of images.
    """
    peaks: dict[int, dict[str, float]] = {}
    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_bundle(folder / "model", min_size)
        for num_images in sizes:
            shards, output = folder / f"shards-{num_images}", folder / f"out-{num_images}"
            make_shards(shards, num_images, (480, 640))
            peaks[num_images] = job(shards, output, model, 4)
            rates[num_images] = steady_rate(output)
    network = f"small at {min_size} px"
    results.add("memory", _growth(network, "peak of {}", "MiB", peaks, MEMORY_NOTE))
    steady = {num_images: {"job": rate} for num_images, rate in rates.items()}
    results.add("linear cost", _growth(network, "{}, steady", "images/s", steady, "one run"))


def _growth(
    network: str, measure: str, unit: str, found: Mapping[int, Mapping[str, float]], note: str
) -> Iterator[dict[str, Any]]:
    """Yield rows for each number of images, and of what the most give against what the fewest do."""
    for num_images, values in found.items():
        case = f"{network}, {num_images} images"
        for name, value in sorted(values.items()):
            yield row(case, measure.format(name), value, unit, note)
    fewest, most = min(found), max(found)
    case = f"{network}, {most} / {fewest} images"
    for name in sorted(found[fewest]):
        yield row(case, measure.format(name), found[most][name] / found[fewest][name], "ratio")


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


def steady_rate(output: Path) -> float:
    """Return images/s without start-up: from when each actor has finished its first chunks."""
    manifest = json.loads((output / "_manifest.json").read_text())
    skipped = 2 * manifest["pool"]["max_actors"]
    times = sorted(found.stat().st_mtime for found in (output / "predictions").iterdir())
    images = manifest["run"]["images"] * (len(times) - skipped) / len(times)
    return float(images / (times[-1] - times[skipped - 1]))


def bare_loop(folder: Path, model: Path, threads: int) -> float:
    """Return images/s of a loop over `Predictor` in a fresh process, without its start-up."""
    done = subprocess.run(_bare_command(folder, model, threads), capture_output=True, check=True)
    return float(done.stdout)


def bare_loops(folder: Path, model: Path) -> float:
    """Return images/s of as many such processes at once as there are cores, of one thread each."""
    running = [
        subprocess.Popen(_bare_command(folder, model, 1), stdout=subprocess.PIPE)
        for _ in range(CORES)
    ]
    return sum(float(process.communicate()[0]) for process in running)


def _bare_command(folder: Path, model: Path, threads: int) -> list[str]:
    module = [sys.executable, "-m", "tests.bench.bench_job"]
    return [*module, str(folder / "shards"), str(model), str(threads)]


def _bare(shards: Path, model: Path, threads: int) -> float:
    import torch

    from segmodel import masks
    from segmodel.images import decode
    from segmodel.inference import Predictor

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
