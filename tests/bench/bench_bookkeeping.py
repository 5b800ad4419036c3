"""What the driver's bookkeeping takes: planning, resuming, `status`, the last count, Ray Data's set-up.

Parquet shards of 1,000 tiny images and 4 chunks each, in a folder and on the tests' S3 server, at three
sizes, to see growth. Every step runs in a process of its own, and so does the server, which makes
its objects itself. Finished chunks are real objects with one image in 250 in error.
"""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import plan, tasks, write
from jobs.chunks import Chunk, output_path
from jobs.detect import look
from jobs.source import Work
from jobs.storage import open_store
from segmodel.schema import PREDICTIONS
from tests.bench import results

SIZES = (1_000, 3_333, 10_000)
IMAGES_PER_SHARD, CHUNK_SIZE, CHUNKS_PER_SHARD = 1_000, 250, 4
# Chunks that are not finished.
LEFT = 100
# Empty chunks go through Ray Data for so long.
PIPELINE_S = 60
POLL_S = 0.02
JOB = {"input": "shards", "model_digest": "none"}
CUT = {"chunk_size": CHUNK_SIZE, "limit": None, "image_column": None}
# The server takes any; nobody is asked for them.
KEYS = {
    "AWS_ACCESS_KEY_ID": "bench-key-id",
    "AWS_SECRET_ACCESS_KEY": "bench-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def bookkeeping(sizes: tuple[int, ...] = SIZES) -> None:
    """Measure all of it, and add the rows."""
    with TemporaryDirectory() as folder, _server(sizes) as (server, endpoint):
        for size in sizes:
            place = Path(folder) / f"{size}"
            make_local(place, size)
            _steps("local", size, str(place / "in"), str(place / "out"))
            subprocess.run(["rm", "-r", place], check=True)
            _steps("S3", size, f"s3://in-{size}", f"s3://out-{size}", endpoint, server)
    with TemporaryDirectory() as folder:
        for size in (sizes[0], sizes[-1]):
            found = _step("pipeline", str(size), str(Path(folder) / f"{size}"))
            case = f"{size * CHUNKS_PER_SHARD} empty chunks through the pipeline"
            _add(case, "pipeline", found)


def _steps(
    where: str,
    size: int,
    source: str,
    output: str,
    endpoint: str = "",
    server: psutil.Process | None = None,
) -> None:
    chunks = size * CHUNKS_PER_SHARD
    case = f"{where}, {size} shards, {size * IMAGES_PER_SHARD} images, {chunks} chunks"
    # Every footer in this process, as a run does at its end where they are few, costs the same each.
    for step in ("plan", "resume", "status", *(("count",) if size == SIZES[0] else ())):
        before = _cpu_s(server)
        found = _step(step, source, output, endpoint)
        if server:
            found["server CPU seconds"] = _cpu_s(server) - before
        _add(case, step, found)


def _add(case: str, step: str, found: Mapping[str, float]) -> None:
    # It imports torch, whose memory the steps below are not to have.
    from tests.bench.bench_job import row

    note = "driver in a process of its own; memory is RssAnon, polled"
    rows = [row(case, f"{step}: {name}", value, _unit(name), note) for name, value in found.items()]
    results.add("bookkeeping", rows)


def _unit(name: str) -> str:
    return {"memory": "MiB", "peak": "MiB", "chunks/s": "chunks/s"}.get(name.split(" ")[0], "s")


def _cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    used = process.cpu_times()
    return float(used.user + used.system)


def _step(name: str, *arguments: str) -> dict[str, float]:
    """Run a step in a fresh process; return what it measured."""
    command = [sys.executable, "-m", "tests.bench.bench_bookkeeping", name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **KEYS})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def _server(sizes: tuple[int, ...]) -> Iterator[tuple[psutil.Process, str]]:
    """Start an S3 server with all inputs and finished chunks in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_bookkeeping", "serve", *map(str, sizes)]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, **KEYS},
    )
    assert started.stdout is not None
    try:
        yield psutil.Process(started.pid), started.stdout.readline().strip()
    finally:
        started.kill()
        started.wait()


def _serve(sizes: list[int]) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for size in sizes:
        for name, objects in (("in", _shards(size)), ("out", _finished(size))):
            backend.create_bucket(f"{name}-{size}", "us-east-1")
            for path, data in objects:
                backend.put_object(f"{name}-{size}", path, data)
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()


def make_local(place: Path, size: int) -> None:
    """Write the shards and the finished chunks of a job."""
    for name, objects in (("in", _shards(size)), ("out", _finished(size))):
        for path, data in objects:
            file = place / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def _shards(size: int) -> Iterator[tuple[str, bytes]]:
    """Yield paths and bytes of Parquet shards; their content is the same."""
    names = [f"{n:06d}.jpg" for n in range(IMAGES_PER_SHARD)]
    table = pa.table({"key": names, "jpg": [name.encode() for name in names]})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    for number in range(size):
        yield f"part-{number // 1000:03d}/shard-{number:06d}.parquet", sink.getvalue()


def _finished(size: int) -> Iterator[tuple[str, bytes]]:
    """Yield paths and bytes of the finished chunks; their rows are the same."""
    rows = [_row(n, "corrupt: broken" if n == 0 else None) for n in range(CHUNK_SIZE)]
    kept = _Kept()
    write.put_chunk(kept, "0", pa.Table.from_pylist(rows, PREDICTIONS), {"run_id": "0" * 32})
    for number in range(size * CHUNKS_PER_SHARD - LEFT):
        yield output_path(f"{number:08d}"), kept.data


def _row(number: int, error: str | None) -> dict[str, Any]:
    names = {"image_id": f"s#{number}.jpg", "shard": "s", "key": f"{number}.jpg"}
    status = "ok" if error is None else "error"
    return {**names, "status": status, "error": error, "detections": []}


class _Kept:
    """In the place of a store: keeps what is put."""

    data: bytes

    def put_if_absent(self, path: str, data: bytes) -> bool:
        self.data = data
        return True


# --- in a process of its own ----------------------------------------------------------------------


def _anonymous_mib() -> float:
    used = psutil.Process().memory_info()
    return float(used.rss - used.shared) / 2**20


@contextmanager
def _measured(found: dict[str, float]) -> Iterator[None]:
    """Note seconds, CPU seconds, and the peak of anonymous memory above what was there before."""
    over = threading.Event()
    before = peak = _anonymous_mib()

    def poll() -> None:
        nonlocal peak
        while not over.wait(POLL_S):
            peak = max(peak, _anonymous_mib())

    thread = threading.Thread(target=poll)
    thread.start()
    started, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        found["seconds"] = time.perf_counter() - started
        found["CPU seconds"] = time.process_time() - cpu
        over.set()
        thread.join()
        found["memory before"] = before
        found["peak memory"] = max(peak, _anonymous_mib())


def _plan(source: str, output: str, endpoint: str) -> dict[str, float]:
    import ray

    from jobs.cluster import connect

    connect(None)
    # The first tasks wait for processes and their imports: that is not the plan's.
    list(tasks.in_order(_nothing, iter([()] * 32)))
    before = _children_s()
    found: dict[str, float] = {}
    url = endpoint or None
    with _measured(found):
        made = plan.make(
            look(source, "auto", url),
            JOB,
            plan.Cut(**CUT, endpoint_url=url),
            open_store(output, url),
        )
        plan.freeze(open_store(output, url), made)
    found["CPU seconds of tasks"] = _children_s() - before
    ray.shutdown()
    return found


def _nothing() -> list[int]:
    time.sleep(1)
    return []


def _children_s() -> float:
    """CPU seconds of Ray's workers."""
    workers = psutil.Process().children(recursive=True)
    return sum(_cpu_s(worker) for worker in workers if "ray::" in " ".join(worker.cmdline()))


def _resume(source: str, output: str, endpoint: str) -> dict[str, float]:
    found: dict[str, float] = {}
    url = endpoint or None
    with _measured(found):
        place = open_store(output, url)
        planned = plan.load(place)
        assert planned is not None
        plan.refuse_changed_input(planned, look(source, "auto", url), place)
        done = plan.finished_chunks(place)
        work = [Work(chunk=chunk) for chunk in plan.left(planned, done.keys())]
    assert len(work) == LEFT
    return found


def _status(_: str, output: str, endpoint: str) -> dict[str, float]:
    from jobs import status
    from jobs.config import StatusConfig

    found: dict[str, float] = {}
    with _measured(found):
        status.run(StatusConfig(output=output, endpoint_url=endpoint or None))
    return found


def _count(_: str, output: str, endpoint: str) -> dict[str, float]:
    found: dict[str, float] = {}
    place = open_store(output, endpoint or None)
    done = plan.finished_chunks(place).keys()
    with _measured(found):
        counts = write.total(write.read_counts(place, done).values())
    assert counts.failed == len(done)
    return found


def _pipeline(size: str, output: str) -> dict[str, float]:
    from jobs.cluster import connect

    number = int(size) * CHUNKS_PER_SHARD
    found: dict[str, float] = {}
    connect(None)
    with _measured(found):
        receipts = _receipts(number, output)
        started, cpu = time.perf_counter(), time.process_time()
        next(receipts)
        first, first_cpu = time.perf_counter(), time.process_time()
        done = 0
        while time.perf_counter() - first < PIPELINE_S and next(receipts, None) is not None:
            done += 1
        took, cpu_after = time.perf_counter() - first, time.process_time() - first_cpu
    found["seconds until the first chunk"] = first - started
    found["CPU seconds until the first chunk"] = first_cpu - cpu
    found["chunks/s afterwards"] = done / took
    found["CPU seconds for 1000 chunks"] = 1000 * cpu_after / done
    return found


def _receipts(number: int, output: str) -> Iterator[Any]:
    """Let empty chunks through the job's own pipeline, with a model that does nothing."""
    import ray

    from jobs import pipeline
    from jobs.actor import Model, Pool
    from jobs.read import Source

    pipeline.Predict = _Idle  # type: ignore[misc,assignment]
    store = open_store(output)
    work = [
        Work(
            chunk=Chunk(
                chunk_id=f"{n:08d}", kind="verdict", num_images=1, shard="s", error="shard: no"
            )
        )
        for n in range(number)
    ]
    pool = Pool(
        min_actors=1, max_actors=1, initial_actors=1, gpus_per_actor=0, threads=1, batch_size=1
    )
    model = Model(
        bundle=ray.put(None),
        categories={},
        precision="fp32",
        score_threshold=0,
        max_detections=1,
        masks=False,
        max_pixels=1,
    )
    source = Source(store=store, lists=store, endpoint_url=None, image_column=None)
    yield from pipeline.run(work, source, store, model, pool, {})


class _Idle:
    """In the place of `actor.Predict`."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, block: pa.Table) -> pa.Table:
        from dataclasses import replace

        from jobs.encode import RAW
        from jobs.envelope import seal, unseal

        sealed = unseal(block)
        rows = [{"error": "shard: no", "image_id": "s#", "shard": "s", "key": ""}]
        return seal(replace(sealed, table=pa.Table.from_pylist(rows, schema=RAW)))


STEPS: dict[str, Callable[..., dict[str, float]]] = {
    "plan": _plan,
    "resume": _resume,
    "status": _status,
    "count": _count,
    "pipeline": _pipeline,
}

if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve([int(size) for size in sys.argv[2:]])
    else:
        print(json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))
