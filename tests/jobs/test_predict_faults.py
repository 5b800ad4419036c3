"""The batch job on a store in trouble: faults are injected into whole jobs, from the command line on."""

import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs import documents
from jobs import s3 as s3_module
from jobs.__main__ import main
from jobs.s3 import Patience
from jobs.store import Store
from tests.conftest import S3, Bucket
from tests.jobs.fault_server import (
    Exchange,
    Fault,
    FaultServer,
    cut,
    flip,
    hold,
    lose_answer,
    pass_through,
    status,
    then,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SHARDS, IMAGES = 2, 3
DEADLINE_S = 400
QUICK = Patience(attempts=4, first_wait_s=0.01)


@pytest.fixture(scope="module")
def place(s3: S3, make_tar: Callable[..., bytes], jpeg: Callable[..., bytes]) -> Bucket:
    """A bucket with two tars of three images each below `in`."""
    bucket = s3.bucket()
    for shard in range(SHARDS):
        images = [(f"{n}.jpg", jpeg(10 * shard + n, (48, 64))) for n in range(IMAGES)]
        bucket.store("in").put(f"{shard}.tar", make_tar(images))
    return bucket


@pytest.fixture(scope="module")
def server(s3: S3) -> Iterator[FaultServer]:
    with FaultServer(s3.endpoint_url) as made:
        yield made


@pytest.fixture
def faults(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> FaultServer:
    monkeypatch.setattr(s3_module, "PATIENCE", QUICK)
    server.clear()
    return server


def predict(source: str, output: str, model: Path, endpoint_url: str, *more: str) -> int:
    return main(
        [
            *("predict", "--input", source, "--output", output, "--model", str(model)),
            *("--score-threshold", "0", "--max-detections", "3", "--chunk-size", "2"),
            *("--max-actors", "1", "--endpoint-url", endpoint_url, *more),
        ]
    )


def rows_of(output: Store) -> list[dict[str, Any]]:
    found = [output.read(info.path) for info in output.list_objects("predictions")]
    tables = [pq.read_table(io.BytesIO(data), page_checksum_verification=True) for data in found]
    rows = pa.concat_tables(table.replace_schema_metadata(None) for table in tables).to_pylist()
    return sorted(rows, key=lambda row: row["image_id"])


@pytest.fixture(scope="module")
def undisturbed(ray_local: None, place: Bucket, tiny_bundle: Path) -> list[dict[str, Any]]:
    output = f"{place.uri}/undisturbed"
    assert predict(f"{place.uri}/in", output, tiny_bundle, place.endpoint_url) == 0
    store = place.store("undisturbed")
    assert documents.read(store, "_manifest.json")["run"]["retries"] == {}
    rows = rows_of(store)
    assert len(rows) == SHARDS * IMAGES
    assert all(row["status"] == "ok" and row["detections"] for row in rows)
    return rows


def test_transient_faults_are_ridden_out_and_stand_in_the_manifest(
    undisturbed: list[dict[str, Any]],
    place: Bucket,
    tiny_bundle: Path,
    faults: FaultServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = (f"{place.uri}/in", f"{place.uri}/ridden", tiny_bundle, faults.url)
    rules = [
        faults.on("GET", r"list-type", status(500, "InternalError"), times=1),
        faults.on("GET", r"in/0\.tar", status(503, "SlowDown"), times=2),
        # The first request is that of the index, in a task of the planning.
        faults.on("GET", r"in/1\.tar", cut(100), times=1, skip=1),
        faults.on("PUT", r"ridden/_plan\.json", lose_answer, times=1),
        faults.on("PUT", r"predictions/00000002", lose_answer, times=1),
    ]
    assert predict(*job) == 0
    assert [rule.hits for rule in rules] == [1, 2, 1, 1, 1]
    output = place.store("ridden")
    expected = {"500": 1, "503": 2, "cut off": 1, "connection": 2}
    assert documents.read(output, "_manifest.json")["run"]["retries"] == expected
    said = capsys.readouterr().out
    assert "asked again" in said
    assert "2 x 503" in said
    assert rows_of(output) == undisturbed

    faults.clear()
    flips = [
        faults.on("GET", rf"ridden/{name}", flip(50), times=1)
        for name in (r"_plan\.json", r"_plan/.*/chunks\.parquet", r"_manifest\.json")
    ]
    assert predict(*job) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert [rule.hits for rule in flips] == [1, 1, 1]


def test_a_permanent_fault_stops_the_job_which_can_be_resumed(
    undisturbed: list[dict[str, Any]],
    place: Bucket,
    tiny_bundle: Path,
    faults: FaultServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = (f"{place.uri}/in", f"{place.uri}/stopped", tiny_bundle, faults.url)
    faults.on("GET", r"in/1\.tar", status(403, "AccessDenied"), skip=1)
    assert predict(*job) == 1
    error = capsys.readouterr().err
    assert f"{place.uri}/in/1.tar: access is denied: check the credentials" in error
    assert "Traceback" not in error
    output = place.store("stopped")
    assert output.info("_SUCCESS") is None

    faults.clear()
    assert predict(*job) == 0
    assert rows_of(output) == undisturbed


def test_a_write_that_comes_after_success_changes_nothing(
    undisturbed: list[dict[str, Any]],
    place: Bucket,
    tiny_bundle: Path,
    faults: FaultServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One attempt's put of a chunk hangs in the network until another run has finished the job."""
    monkeypatch.setattr(
        s3_module, "PATIENCE", Patience(attempts=1, first_wait_s=0.01, read_timeout_s=5)
    )
    release, done = threading.Event(), threading.Event()
    job = (f"{place.uri}/in", f"{place.uri}/zombie", tiny_bundle, faults.url)
    held = faults.on("PUT", r"predictions/00000001", hold(release, done), times=1)
    assert predict(*job) == 1
    assert "00000001.parquet: " in capsys.readouterr().err
    assert held.hits == 1

    monkeypatch.setattr(s3_module, "PATIENCE", QUICK)
    assert predict(*job) == 0
    output = place.store("zombie")
    before = run_ids(output)
    release.set()
    assert done.wait(60)

    assert run_ids(output) == before
    assert rows_of(output) == undisturbed
    assert predict(*job) == 0
    assert "nothing to do" in capsys.readouterr().out


def run_ids(output: Store) -> dict[str, str]:
    """Which run wrote each chunk, from the footers."""
    found = {}
    for info in output.list_objects("predictions"):
        footer = pq.read_metadata(io.BytesIO(output.read(info.path))).metadata
        name = info.path.removeprefix("predictions/").removesuffix(".parquet")
        found[name] = footer[b"segjobs.run_id"].decode()
    return found


@pytest.mark.parametrize("format_", ["webdataset", "parquet", "images"])
def test_input_that_changes_after_it_was_planned_gives_rows_in_error(
    format_: str,
    ray_local: None,
    s3: S3,
    tiny_bundle: Path,
    faults: FaultServer,
    make_tar: Callable[..., bytes],
    jpeg: Callable[..., bytes],
) -> None:
    bucket = s3.bucket()
    source = bucket.store("in")
    for version in (0, 1):
        images = [(f"{n}.jpg", jpeg(n, (48, 64))) for n in (2 * version, 2 * version + 1)]
        objects = dict(images)
        if format_ == "webdataset":
            objects = {"0.tar": make_tar(images)}
        elif format_ == "parquet":
            data = io.BytesIO()
            pq.write_table(pa.table({"image": [content for _, content in images]}), data)
            objects = {"0.parquet": data.getvalue()}
        if version == 0:
            for name, content in objects.items():
                source.put(name, content)
    replaced = "0.jpg" if format_ == "images" else next(iter(objects))
    new = next(iter(objects.values()))
    faults.on("PUT", r"_plan\.json", then(lambda: source.put(replaced, new)), times=1)
    assert predict(source.uri, f"{bucket.uri}/out", tiny_bundle, faults.url) == 0

    rows = rows_of(bucket.store("out"))
    assert len(rows) == 2
    changed = rows if format_ != "images" else rows[:1]
    for row in changed:
        assert row["error"].startswith(f"changed: {source.uri}/{replaced} changed after")
    assert [row["status"] for row in rows[len(changed) :]] == ["ok"] * (2 - len(changed))
    counts = documents.read(bucket.store("out"), "_manifest.json")["counts"]
    assert counts["errors"] == {"changed": len(changed)}


def start(job: tuple[str, str, Path, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start the command line in a process of its own, on the tests' Ray."""
    source, output, model, endpoint_url = job
    arguments = [
        *(sys.executable, "-m", "jobs", "predict", "--input", source, "--output", output),
        *("--model", str(model), "--score-threshold", "0", "--max-detections", "3"),
        *("--chunk-size", "2", "--max-actors", "1", "--endpoint-url", endpoint_url),
        *("--address", ray.get_runtime_context().gcs_address),
    ]
    with log.open("wb") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file)


def test_two_drivers_at_once_make_one_table(
    undisturbed: list[dict[str, Any]],
    place: Bucket,
    tiny_bundle: Path,
    faults: FaultServer,
    tmp_path: Path,
) -> None:
    """Both have planned, and both put their plan in the same moment."""
    barrier = threading.Barrier(2)
    plans = faults.on("PUT", r"twice/_plan\.json", then_together(barrier), times=2)
    puts = faults.on("PUT", r"twice/predictions/", pass_through)
    job = (f"{place.uri}/in", f"{place.uri}/twice", tiny_bundle, faults.url)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    drivers = [start(job, log) for log in logs]
    try:
        codes = [driver.wait(DEADLINE_S) for driver in drivers]
    finally:
        for driver in drivers:
            driver.kill()
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], said
    assert plans.hits == 2

    output = place.store("twice")
    chunks = len(undisturbed) // 2 + 1
    assert len(list(output.list_objects("predictions"))) == chunks
    assert puts.seen > chunks, "the two did not overlap"
    assert rows_of(output) == undisturbed
    # What the slower one planned stays without being looked at.
    plan = documents.read(output, "_plan.json")
    manifest = documents.read(output, "_manifest.json")
    assert manifest["plan_id"] == plan["plan_id"]
    assert manifest["counts"]["images"] == len(undisturbed)
    assert output.read("_SUCCESS") == b""
    # The first write of a chunk holds, whoever finishes last.
    assert len(set(run_ids(output).values())) <= 2


def then_together(barrier: threading.Barrier) -> Fault:
    def fault(exchange: Exchange) -> None:
        barrier.wait(DEADLINE_S)
        pass_through(exchange)

    return fault


PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-4f1d0c",
    "AWS_SESSION_TOKEN": "planted-token-9b7e2a",
}
TWO_JOBS = """
import sys
from jobs.__main__ import main
root, *arguments = sys.argv[1:]
for output, code in (("well", 0), ("locked", 1)):
    assert main([*arguments, "--output", f"{root}/{output}"]) == code
"""


def test_credentials_are_seen_nowhere(
    place: Bucket, tiny_bundle: Path, faults: FaultServer
) -> None:
    """A job that is well and one that is refused, on a Ray of their own whose logs are searched."""
    message = f"no access for {' and '.join(PLANTED.values())}"
    # The first job asks three times for the shard, and so does the index of the second.
    faults.on("GET", r"in/1\.tar", status(403, "AccessDenied", message), skip=4)
    arguments = [
        *("predict", "--input", f"{place.uri}/in", "--model", str(tiny_bundle)),
        *("--score-threshold", "0", "--max-detections", "3", "--chunk-size", "2"),
        *("--max-actors", "1", "--endpoint-url", faults.url),
    ]
    # Paths of sockets may not be long.
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        done = subprocess.run(
            [sys.executable, "-c", TWO_JOBS, place.uri, *arguments],
            env={**os.environ, **PLANTED, "RAY_TMPDIR": folder},
            capture_output=True,
            timeout=DEADLINE_S,
        )
        logs = [path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()]
    assert done.returncode == 0, done.stderr
    assert b"access is denied" in done.stderr
    assert b"no access for *** and ***" in done.stderr
    written = [
        place.store(name).read(info.path)
        for name in ("well", "locked")
        for info in place.store(name).list_objects()
    ]
    assert len(logs) > 10
    assert len(written) > 10
    for secret in PLANTED.values():
        for text in (done.stdout, done.stderr, *logs, *written):
            assert secret.encode() not in text
