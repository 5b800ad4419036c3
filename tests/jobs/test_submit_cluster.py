"""Submitted to real heads with their dashboard and job API, which ask for a token."""

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests
from PIL import Image
from pyarrow.fs import S3FileSystem

from segmodel import scenes
from tests.conftest import S3, Bucket
from tests.infra import runbook
from tests.jobs.ray_head import Head

# What Ray's heads and drivers wait for at their start has limits that a crowded machine passes.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1200)]

DEADLINE_S = 400
SCENES, CHUNK_SIZE = 40, 2
# Three more commands are given while this many are at work.
MANY = 300
SETTINGS = f"tasks: boxes\nchunk_size: {CHUNK_SIZE}\nmax_actors: 1\nmax_detections: 4\nfail_on_error: true\n"
TOKEN = "a-token-that-is-long-enough-for-a-test"
SECRET = "planted-secret-of-this-test"
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}

# What the command line runs, but for a patience that is shorter.
PROGRAM = "from jobs import ray_jobs; ray_jobs.PATIENCE_S = 3; from jobs.__main__ import main; raise SystemExit(main())"


@dataclass(frozen=True)
class Shell:
    """Runs `segjobs submit` against one head, as a user's shell does."""

    head: Head
    environment: dict[str, str]

    def start(self, *arguments: str, **more: str) -> "subprocess.Popen[str]":
        command = [*(sys.executable, "-c", PROGRAM), "submit", "--address", self.head.address]
        return subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, **self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **more: str) -> tuple[int, str]:
        process = self.start(*arguments, **more)
        said, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, said

    def jobs(self) -> list[dict[str, object]]:
        """What the job API says, to anybody who has the token."""
        answer = requests.get(
            f"{self.head.address}/api/jobs/",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30,
        )
        return [job for job in answer.json() if job["type"] == "SUBMISSION"]


@pytest.fixture(scope="module")
def shell(environment: None, s3: S3) -> Iterator[Shell]:
    with Head(AUTHENTICATION) as head:
        yield Shell(head, {**AUTHENTICATION, "AWS_ENDPOINT_URL": s3.endpoint_url})


@pytest.fixture
def photos(bucket: Bucket) -> Bucket:
    """Scenes in S3, and one file that is no image."""
    return put_photos(bucket, SCENES)


def put_photos(bucket: Bucket, number: int) -> Bucket:
    store = bucket.store("photos")
    pictures = [_png(seed) for seed in range(8)]
    for place in range(number - 1):
        store.put(f"{place:03d}.png", pictures[place % len(pictures)])
    store.put("broken.png", b"no image")
    return bucket


def _png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scenes.scene(seed, (96, 128)).image).save(file, "PNG")
    return file.getvalue()


def predict(photos: Bucket, model: Path, config: Path) -> list[str]:
    config.write_text(SETTINGS)
    return [
        *("predict", "--config", str(config), "--input", f"{photos.uri}/photos"),
        *("--output", f"{photos.uri}/table", "--model", str(model)),
    ]


def wait_for_chunks(
    photos: Bucket, number: int, process: "subprocess.Popen[str]", table: str = "table"
) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while (done := finished(photos, table)) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return done


def finished(photos: Bucket, table: str = "table") -> int:
    return sum(1 for _ in photos.store(f"{table}/predictions").list_objects())


def read_rows(photos: Bucket, table: str) -> list[dict[str, object]]:
    where = S3FileSystem(endpoint_override=photos.endpoint_url, region="us-east-1")
    return pq.read_table(f"{photos.name}/{table}/predictions", filesystem=where).to_pylist()


def test_a_job_is_followed_and_ends_as_the_verb_does(shell: Shell, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    categories = tmp_path / "my categories.yaml"
    categories.write_text("- {id: 1, name: cat}\n")
    command = ["init", "--arch", "small", "--weights", "random", "--categories", str(categories)]
    code, said = shell.run("--", *command, "--output", str(bundle))
    assert code == 0, said
    assert (bundle / "model.json").exists()
    assert [
        one["name"] for one in json.loads((bundle / "model.json").read_text())["categories"]
    ] == ["cat"]
    job_id = re.search(r"(segjobs-init-\S+-1) is submitted to", said)
    assert job_id is not None
    (job,) = [job for job in shell.jobs() if job["submission_id"] == job_id[1]]
    assert job["status"] == "SUCCEEDED"
    assert str(job["runtime_env"]["working_dir"]).startswith("gcs://")  # type: ignore[index]
    assert str(job["metadata"]["output"]) == str(bundle)  # type: ignore[index]

    # What the image has is used where that is said: here no code travels, nor any file.
    code, said = shell.run(
        "--image-has-code", "--", "evaluate", "--predictions", "/nowhere", "--annotations", "/nowhere.json",
        "--output", str(tmp_path / "scores"),
    )  # fmt: skip
    assert code == 1, said
    assert "segjobs evaluate: " in said
    (job,) = [job for job in shell.jobs() if "evaluate" in str(job["submission_id"])]
    assert "working_dir" not in job["runtime_env"]  # type: ignore[operator]


def test_submitting_twice_is_harmless_and_stop_is_clean(
    shell: Shell, bucket: Bucket, tiny_bundle: Path, tmp_path: Path
) -> None:
    photos = put_photos(bucket, MANY)
    command = predict(photos, tiny_bundle, tmp_path / "settings.yaml")
    travels = ("--env", "AWS_ENDPOINT_URL")
    # Credentials of this shell: they go nowhere, and the head has its own.
    secret = {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": SECRET}
    first = shell.start(*travels, "--", *command, **secret)
    wait_for_chunks(photos, 1, first)
    code, said = shell.run("--no-wait", "--", *command)
    assert code == 0, said
    assert "-1 is at work already." in said
    code, said = shell.run("--", *command, "--limit", "3")
    assert code == 2, said
    assert "by another command" in said

    code, said = shell.run("--stop", "--", *command)
    assert code == 0, said
    assert "-1 is stopped. Submit the same command again to go on." in said
    followed, _ = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 130, followed
    # The verb itself was told to stop, and said how far it came.
    assert re.search(rf"Stopped: \d+ of {MANY} images are done", " ".join(followed.split())), (
        followed
    )
    done = finished(photos)
    assert 0 < done < MANY / CHUNK_SIZE
    code, said = shell.run("--stop", "--", *command)
    assert code == 0, said
    assert "there is nothing to stop" in said

    # One image is broken, and --fail-on-error is in the file that travelled: the verb's own exit code.
    code, said = shell.run(*travels, "--", *command, **secret)
    assert code == 3, said
    assert "-2 is submitted to" in said
    assert photos.store("table").info("_SUCCESS") is not None
    rows = read_rows(photos, "table")
    assert len(rows) == len({row["image_id"] for row in rows}) == MANY

    # What travelled is in Ray's logs and its API; so nothing secret may.
    assert photos.endpoint_url in shell.head.logs()
    for place in (followed, said, json.dumps(shell.jobs()), shell.head.logs()):
        assert SECRET not in place
    assert not [path for path in _objects(photos) if SECRET.encode() in photos.store().read(path)]


def _objects(bucket: Bucket) -> list[str]:
    return [info.path for info in bucket.store().list_objects()]


@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_TOKEN": "wrong-" + TOKEN}, {"RAY_AUTH_MODE": "disabled"}]
)
def test_without_the_token_it_says_what_to_set(shell: Shell, variables: dict[str, str]) -> None:
    command = ["--", "init", "--arch", "small", "--weights", "random", "--output", "/tmp/x"]
    code, said = shell.run(*command, **variables)
    assert code == 1
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN" in " ".join(
        said.split()
    )
    assert TOKEN not in said


@pytest.fixture
def book(
    photos: Bucket,
    tiny_bundle: Path,
    other_bundle: Path,
    put_packed: Callable[..., object],
    tmp_path: Path,
) -> runbook.Shell:
    """A shell for the runbook: settings and a policy, and in the bucket what it names."""
    models = {
        "models/small": tiny_bundle,
        "models/coco": tiny_bundle,
        "trainings/second/bundle": other_bundle,
    }
    for place, bundle in models.items():
        for file in bundle.iterdir():
            photos.store(place).put(file.name, file.read_bytes())
    for name in ("train", "val"):
        put_packed(photos.store(f"sets/{name}"), 4)
    photos.store("sets").put("instances.json", json.dumps(truth()).encode())
    shell = runbook.Shell(
        tmp_path / "home",
        {
            **AUTHENTICATION,
            "BUCKET": photos.name,
            "AWS_ENDPOINT_URL": photos.endpoint_url,
        },
        PROGRAM,
        DEADLINE_S,
    )
    (shell.folder / "settings.yaml").write_text(SETTINGS)
    (shell.folder / "segjobs/policy.yaml").write_text("score_threshold: 0.0\nmin_area: 1\n")
    return shell


def truth() -> dict[str, object]:
    """One thing in each photo, as COCO says it."""
    names = [*(f"{place:03d}.png" for place in range(SCENES - 1)), "broken.png"]
    corners = [10, 10, 50, 10, 50, 60, 10, 60]
    return {
        "images": [
            {"id": n, "file_name": name, "height": 96, "width": 128} for n, name in enumerate(names)
        ],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [10, 10, 40, 50], "area": 2000,
             "iscrowd": 0, "segmentation": [corners]}
            for n in range(len(names))
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
    }  # fmt: skip


def test_the_runbook_and_a_head_that_is_lost(
    environment: None, photos: Bucket, book: runbook.Shell
) -> None:
    variables = {**AUTHENTICATION, "AWS_ENDPOINT_URL": photos.endpoint_url}
    table = photos.store("tables/photos")
    with Head(variables) as head:
        book.environment["RAY_API_SERVER_ADDRESS"] = head.address
        first = book.start("Submit")
        wait_for_chunks(photos, 3, first, "tables/photos")
        # The driver's node with everything on it.
        head.kill()
        code, said = book.end(first)
        assert code == 1, said
        assert "may be lost with its head node; what it finished is in its output" in said
        done = finished(photos, "tables/photos")
        assert 3 <= done < SCENES / CHUNK_SIZE
        port = head.ports["dashboard-port"]

    with Head(variables, port):
        # One image is no image, and the settings ask for --fail-on-error.
        code, said = book.run("Submit")
        assert code == 3, said
        assert f"of them {SCENES // CHUNK_SIZE - done} to do" in said
        assert finished(photos, "tables/photos") == SCENES / CHUNK_SIZE
        code, said = book.run("Watch")
        assert code == 0, said
        assert "finished: _SUCCESS is there" in said
        code, said = book.run("Stop, and go on")
        assert code == 0, said
        assert "there is nothing to stop" in said
        photos.store("photos").put("broken.png", _png(SCENES))
        code, said = book.run("Retry errors")
        assert code == 0, said
        look_at_the_rest(photos, book)
    assert table.info("_SUCCESS") is not None
    rows = read_rows(photos, "tables/photos")
    assert len(rows) == len({row["image_id"] for row in rows}) == SCENES
    assert {row["status"] for row in rows} == {"ok"}


def look_at_the_rest(photos: Bucket, book: runbook.Shell) -> None:
    """Run what the runbook has for the same cluster besides: another model, a night's labels, a training."""
    code, said = book.run("Upgrade the model")
    assert code == 0, said
    assert photos.store("tables/photos-second").info("_SUCCESS") is not None
    scores = json.loads(photos.store("tables/photos-second-scores").read("metrics.json"))
    # The settings ask for boxes alone.
    assert scores["against"]["box"]["AP"] >= 0
    # The crontab's line has no variable of this shell, but for those that the crontab sets.
    token = book.folder / "token"
    token.write_text(TOKEN)
    book.environment["RAY_AUTH_TOKEN_PATH"] = str(token)
    code, said = book.run("Label every night")
    log = (book.folder / "label.log").read_text()
    assert code == 0, said + log
    assert photos.store("labels/photos/versions/1").info("manifest.json") is not None
    # Here are no GPUs: the training waits for some until it is stopped.
    book.environment["AWS_DEFAULT_REGION"] = "us-east-1"
    code, said = book.run("Submit", 1)
    assert code == 0, said
    assert "is submitted to" in said
    (command,) = runbook.block("Submit", "test", 1).commands
    code, said = book.end(book.start_text(command.replace("--no-wait", "--stop")))
    assert code == 0, said
    assert "is stopped. Submit the same command again to go on." in said
