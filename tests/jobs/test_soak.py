"""One job until it is done, whatever happens: dozens of faults of processes and of storage, drawn from a seed.

No image is lost, doubled or changed. Drivers, readers, writers and actors are killed from outside here; images that
kill their own process are in `test_poison.py`.
"""

import io
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.store import Store
from tests.conftest import S3, Bucket
from tests.jobs import ray_processes
from tests.jobs.fault_server import (
    Fault,
    FaultServer,
    Rule,
    cut,
    flip,
    flip_request,
    hang,
    keep_back,
    lose_answer,
    reset,
    slow,
    status,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 20261124
IMAGES, CHUNK_SIZE = 180, 2
CHUNKS = IMAGES // CHUNK_SIZE
DEADLINE_S = 240
READ_FAULTS: list[Fault] = [
    status(500, "InternalError"),
    status(503, "SlowDown"),
    status(429, "TooManyRequests"),
    slow(0.5),
    cut(100),
    reset,
    flip(200, bit=3),
]
WRITE_FAULTS: list[Fault] = [
    status(500, "InternalError"),
    status(503, "SlowDown"),
    slow(0.5),
    reset,
    lose_answer,
    flip_request,
]
NUM_READ, NUM_WRITE = 16, 8
# So soon behind the end of another that this one may still plan, or wait for its actor.
EARLY = "SIGKILL of the driver, early"
DRIVER = (EARLY, "SIGKILL of the driver", "Ctrl-C")
# Titles of the processes in which the pipeline's stages are.
TASKS = {"reader": "ReadChunks", "writer": "MapBatches(encode_and_write)"}
# Readers are at work when a job begins, and soon all is read: they are killed behind the end of a driver.
PROCESS_FAULTS = [
    *[("SIGKILL of the driver", "reader"), ("writer",), ("actor",)] * 2,
    ("Ctrl-C", "reader"),
    ("Ctrl-C", EARLY, "reader"),
    ("writer",),
]


class Job:
    """The command line in a process of its own, on the tests' Ray."""

    def __init__(self, place: Bucket, model: Path, endpoint_url: str, log: Path) -> None:
        self.output, self.log = place.store("out"), log
        arguments = [
            *(sys.executable, "-m", "jobs", "predict", "--model", str(model)),
            *("--input", f"{place.uri}/in", "--output", f"{place.uri}/out"),
            *("--score-threshold", "0", "--max-detections", "4"),
            *("--chunk-size", str(CHUNK_SIZE), "--max-actors", "1"),
            *("--endpoint-url", endpoint_url, "--address", ray.get_runtime_context().gcs_address),
        ]
        with log.open("ab") as file:
            self.log_begins = file.tell()
            self.process = subprocess.Popen(
                arguments, stdout=file, stderr=file, start_new_session=True
            )

    def finished(self) -> int:
        return len(list(self.output.list_objects("predictions")))

    def wait_until(self, there: Callable[[], bool]) -> None:
        """Wait until it is true; the job must not end before."""
        deadline = time.monotonic() + DEADLINE_S
        while not there():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def wait_for(self, more: int) -> None:
        """Wait until so many more chunks are finished, or all but the one that is kept back."""
        chunks = min(self.finished() + more, CHUNKS - 1)
        self.wait_until(lambda: self.finished() >= chunks)

    def wait(self) -> None:
        assert self.process.wait(DEADLINE_S) == 0, self.log.read_text()

    def meet(self, fault: str) -> None:
        """Meet a fault of a process, as soon as there is one that can."""
        if fault in DRIVER:
            finished = self.finished()
            self.process.send_signal(signal.SIGINT if fault == "Ctrl-C" else signal.SIGKILL)
            code = self.process.wait(DEADLINE_S)
            assert code == (130 if fault == "Ctrl-C" else -signal.SIGKILL), self.log.read_text()
            if fault == "Ctrl-C":
                self._has_said_how_much_is_done(at_least=finished)
            return

        def able() -> list[psutil.Process]:
            return ray_processes.titled(TASKS[fault]) if fault in TASKS else ray_processes.actors()

        self.wait_until(lambda: bool(able()))
        for process in able()[:1]:
            process.kill()

    def _has_said_how_much_is_done(self, at_least: int) -> None:
        """Between the chunks that were finished before Ctrl-C and those that are now."""
        said = " ".join(self.log.read_bytes()[self.log_begins :].decode().split())
        stopped = re.search(
            rf"Stopped: (\d+) of {IMAGES} images are done. Run the same command", said
        )
        assert stopped, said
        assert CHUNK_SIZE * at_least <= int(stopped[1]) <= CHUNK_SIZE * self.finished()
        assert "Traceback" not in said


def table(output: Store) -> pa.Table:
    parts = [
        pq.read_table(io.BytesIO(output.read(found.path)), page_checksum_verification=True)
        for found in output.list_objects("predictions")
    ]
    rows = pa.concat_tables(part.replace_schema_metadata(None) for part in parts)
    return rows.sort_by("image_id").combine_chunks()


def as_bytes(rows: pa.Table) -> bytes:
    """A table's column of detections as bytes."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.schema([rows.schema.field("detections")])) as writer:
        writer.write_table(rows.select(["detections"]))
    return sink.getvalue()


@pytest.fixture
def place(s3: S3, jpeg: Callable[..., bytes]) -> Bucket:
    bucket = s3.bucket()
    for number in range(IMAGES):
        bucket.store("in").put(f"{number:04d}.jpg", jpeg(number, (60, 80)))
    return bucket


def lay(faults: FaultServer, rng: np.random.Generator) -> list[Rule]:
    """Have requests for some images and some chunks meet a fault, the first time or two."""
    rules = [
        faults.on("GET", r"/in/0117\.jpg", hang(), times=1),
        faults.on("GET", r"list-type.*out", status(503, "SlowDown"), times=2),
        faults.on("PUT", r"out/_plan\.json", lose_answer, times=1),
    ]
    # The first chunk is kept back, see below.
    images = 1 + rng.choice(116, NUM_READ, replace=False)
    chunks = 1 + rng.choice(CHUNKS - 1, NUM_WRITE, replace=False)
    for kinds, method, paths in (
        (READ_FAULTS, "GET", [rf"/in/{image:04d}\.jpg" for image in images]),
        (WRITE_FAULTS, "PUT", [rf"/predictions/{chunk:08d}" for chunk in chunks]),
    ):
        for number, path in enumerate(paths):
            # Each kind at least once.
            kind = kinds[number if number < len(kinds) else int(rng.integers(len(kinds)))]
            rules.append(faults.on(method, path, kind, times=int(rng.integers(1, 3))))
    return rules


def test_dozens_of_faults_lose_double_and_change_nothing(
    ray_local: None, s3: S3, place: Bucket, tiny_bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(PROCESS_FAULTS))
    before = [fault for number in order for fault in PROCESS_FAULTS[number]]
    log = tmp_path / "log"
    with FaultServer(s3.endpoint_url) as faults:
        # However fast the machine is: the first chunk is not written before the last process was killed, and
        # after the end of a driver not read before a reader was.
        all_met, reader_met = threading.Event(), threading.Event()
        faults.on("PUT", r"/predictions/00000000", keep_back(all_met))
        rules = lay(faults, rng)
        job = Job(place, tiny_bundle, faults.url, log)
        for fault, following in zip(before, [*before[1:], ""], strict=True):
            if fault == EARLY:
                time.sleep(rng.uniform(0.5, 3))
            elif fault != "reader":
                job.wait_for(int(rng.integers(1, 6)))
            assert place.store("out").info("_SUCCESS") is None
            job.meet(fault)
            reader_met.set()
            if fault in DRIVER:
                if following == "reader":
                    reader_met.clear()
                    faults.on("GET", r"/in/0000\.jpg", keep_back(reader_met), times=1)
                job = Job(place, tiny_bundle, faults.url, log)
        all_met.set()
        job.wait()
        assert all(rule.hits for rule in rules), [rule for rule in rules if not rule.hits]
        assert len(before) + sum(rule.hits for rule in rules) >= 30
    assert place.store("out").info("_SUCCESS") is not None

    calm = s3.bucket()
    for found in place.store("in").list_objects():
        calm.store("in").put(found.path, place.store("in").read(found.path))
    Job(calm, tiny_bundle, s3.endpoint_url, tmp_path / "calm").wait()
    rows, expected = table(place.store("out")), table(calm.store("out"))
    assert rows.num_rows == len(set(rows["image_id"].to_pylist())) == IMAGES
    assert rows.equals(expected)
    assert as_bytes(rows) == as_bytes(expected)
