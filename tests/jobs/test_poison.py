"""Images and machines that end the processes of a job: what they cost, and that it is bounded."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import encode, isolate, pipeline, stall, supervisor
from jobs.__main__ import main
from jobs.actor import Predict
from jobs.source import Work
from jobs.supervisor import Alone
from tests.jobs import ray_processes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

IMAGES, CHUNK_SIZE = 16, 4
# What comes behind the end of a JPEG is no part of the picture.
DEADLY, ENDLESS, ODD = b"this one is deadly", b"this one is endless", b"this one is odd"
DIES, HANGS, RAISES = "0002.jpg", "0009.jpg", "0014.jpg"
# Long enough for an ordinary image on a busy machine; the ones that hang wait it out.
IMAGE_TIMEOUT_S = 15
DEADLINE_S = 60


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, jpeg: Callable[..., bytes]) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        (folder / f"{number:04d}.jpg").write_bytes(jpeg(number, (60, 80)))
    for name, mark in ((DIES, DEADLY), (HANGS, ENDLESS), (RAISES, ODD)):
        with (folder / name).open("ab") as file:
            file.write(mark)
    return folder


def predict(photos: Path, output: Path, model: Path, *more: str) -> int:
    return main(
        [
            *("predict", "--input", str(photos), "--output", str(output), "--model", str(model)),
            *("--chunk-size", str(CHUNK_SIZE), "--score-threshold", "0", "--max-detections", "4"),
            *("--image-timeout", str(IMAGE_TIMEOUT_S), *more),
        ]
    )


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(output / "predictions").to_pylist()
    named = {row["key"]: row for row in rows}
    assert len(named) == len(rows)
    return named


@pytest.fixture(scope="module")
def undisturbed(
    ray_local: None, photos: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert predict(photos, output, tiny_bundle) == 0
    rows = rows_of(output)
    assert len(rows) == IMAGES
    assert all(row["status"] == "ok" and row["detections"] for row in rows.values())
    return rows


def poisoned(
    class_: type[Any], *, deadly: bytes = DEADLY, endless: bytes = ENDLESS, odd: bytes = ODD
) -> type[Any]:
    """The same actor, in a process whose decoder crashes and hangs as one with a bug does."""

    class Poisoned(class_):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            import jobs.actor as here

            honest = here.decode_reduced

            def decode(data: bytes, *more: Any) -> Any:
                if deadly in data:
                    os.kill(os.getpid(), signal.SIGSEGV)
                if endless in data:
                    # Holds the GIL for years.
                    sum(range(10**15))
                if odd in data:
                    raise ArithmeticError("nobody\n thought of that")
                return honest(data, *more)

            here.decode_reduced = decode
            super().__init__(*arguments)

    return Poisoned


@pytest.fixture
def poison() -> Iterator[Callable[..., None]]:
    """`poison()`: from now on, the images that can end or stop a process do so."""
    with pytest.MonkeyPatch.context() as patch:

        def pour(**marks: bytes) -> None:
            patch.setattr(pipeline, "Predict", poisoned(Predict, **marks))
            patch.setattr(supervisor, "Alone", poisoned(Alone, **marks))

        yield pour


@pytest.mark.slow
def test_images_that_crash_or_hang_their_process_cost_their_own_rows(
    undisturbed: dict[str, dict[str, Any]],
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    poison: Callable[..., None],
) -> None:
    output = tmp_path / "out"
    poison()
    assert predict(photos, output, tiny_bundle) == 0
    rows = rows_of(output)
    assert rows[DIES]["error"] == "crashed: the process died, 2 times"
    assert rows[HANGS]["error"] == f"hung: no result after {IMAGE_TIMEOUT_S} s, 2 times"
    assert rows[RAISES]["error"] == "failed: ArithmeticError: nobody thought of that, 2 times"
    for name in (DIES, HANGS, RAISES):
        assert rows[name]["image_id"] == undisturbed[name]["image_id"]
        assert (rows[name]["status"], rows[name]["height"]) == ("error", None)
        assert rows[name]["detections"] == []
    assert {name for name in rows if rows[name] != undisturbed[name]} == {DIES, HANGS, RAISES}
    manifest = json.loads((output / "_manifest.json").read_text())
    assert manifest["counts"]["errors"] == {"crashed": 1, "hung": 1, "failed": 1}
    assert (output / "_SUCCESS").exists()

    # The decoder was mended for two of the three.
    poison(endless=b"nothing has this", odd=b"nor this")
    assert predict(photos, output, tiny_bundle, "--retry-errors") == 0
    again = rows_of(output)
    assert again[DIES]["error"] == "crashed: the process died, 2 times"
    assert {name for name in again if again[name] != undisturbed[name]} == {DIES}


def when_actors_are_gone(honest: Callable[..., Any]) -> Callable[..., Any]:
    """The same, when the pipeline's actors have gone: they would keep their GPUs from those for single images."""

    def call(*of: Any) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while ray_processes.titled("MapWorker("):
            assert time.monotonic() < deadline, "actors of the pipeline stay"
            time.sleep(0.1)
        return honest(*of)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("mark", [DEADLY, ODD], ids=["crashes", "raises"])
def test_a_bad_image_in_every_chunk_costs_its_own_row(
    undisturbed: dict[str, dict[str, Any]],
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    poison: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mark: bytes,
) -> None:
    # Few chunks, so the first that is lost makes a streak; and only some of them are parted at once.
    monkeypatch.setattr(stall, "MOST_LOST", 0)
    monkeypatch.setattr(stall, "LOST_FOR_EACH_PLACE", 0)
    monkeypatch.setattr(stall, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(pipeline, "MOST_FAILED", 1)
    monkeypatch.setattr(pipeline, "PARTED", 2)
    monkeypatch.setattr(isolate, "PROBES", 6)
    bad = tmp_path / "photos"
    bad.mkdir()
    for path in photos.iterdir():
        data = path.read_bytes().removesuffix(DEADLY).removesuffix(ENDLESS).removesuffix(ODD)
        last = int(path.stem) % CHUNK_SIZE == CHUNK_SIZE - 1
        (bad / path.name).write_bytes(data + mark * last)
    for name in ("refuse_broken", "run"):
        monkeypatch.setattr(isolate, name, when_actors_are_gone(getattr(isolate, name)))
    poison()
    output = tmp_path / "out"
    # The third chunk is left for a second round.
    images = 3 * CHUNK_SIZE
    assert predict(bad, output, tiny_bundle, "--limit", str(images)) == 0
    assert "images come through alone" in " ".join(capsys.readouterr().out.split())
    rows = rows_of(output)
    wrong = {name for name in rows if rows[name] != undisturbed[name]}
    assert wrong == {f"{n:04d}.jpg" for n in range(CHUNK_SIZE - 1, images, CHUNK_SIZE)}
    kinds = {rows[name]["error"].partition(":")[0] for name in wrong}
    assert kinds == {"crashed" if mark == DEADLY else "failed"}
    assert sorted(rows) == sorted(undisturbed)[:images]
    assert (output / "_SUCCESS").exists()


@pytest.mark.parametrize("everything", ["deadly", "odd"])
def test_a_machine_on_which_no_image_comes_through_ends_the_job(
    ray_local: None,
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    poison: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    everything: str,
) -> None:
    monkeypatch.setattr(stall, "MOST_LOST", 0)
    monkeypatch.setattr(stall, "LOST_FOR_EACH_PLACE", 0)
    monkeypatch.setattr(stall, "LOOK_EVERY_S", 0)
    monkeypatch.setattr(pipeline, "MOST_FAILED", 2)
    monkeypatch.setattr(isolate, "PROBES", 2)
    marks = {"deadly": b"nothing has this", "endless": b"nor this", "odd": b"nor that"}
    poison(**{**marks, everything: b""})
    assert predict(photos, tmp_path / "out", tiny_bundle, "--max-actors", "1") == 1
    error = " ".join(capsys.readouterr().err.split())
    if everything == "deadly":
        assert "chunks in a row lost theirs" in error or "not one chunk could be done" in error
        why = "the process died, 2 times"
    else:
        assert "3 chunks could not be predicted" in error
        why = "ArithmeticError: nobody thought of that, 2 times"
    assert f"Of 2 images that were tried alone, none came through (such as: {why})" in error
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_chunk_that_cannot_be_read_is_named_and_the_others_are_done(
    undisturbed: dict[str, dict[str, Any]],
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def deadly(honest: Callable[..., Any]) -> Callable[..., Any]:
        def read(item: Work, *more: Any) -> Any:
            if item.chunk.chunk_id == "00000001":
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(item, *more)

        return read

    from jobs import source

    monkeypatch.setattr(source, "_read_or_fail", deadly(source._read_or_fail))
    monkeypatch.setattr(supervisor, "_read_parts", deadly(supervisor._read_parts))
    output = tmp_path / "out"
    assert predict(photos, output, tiny_bundle) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "1 chunks could not be done. chunk 00000001 (" in error
    assert "images 4 to 7) cannot be read: the process died, 3 times. Run the same command" in error
    rows = rows_of(output)
    assert rows == {name: row for name, row in undisturbed.items() if not "0004" <= name < "0008"}
    assert not (output / "_SUCCESS").exists()


def test_a_chunk_whose_writer_dies_is_done_image_by_image(
    undisturbed: dict[str, dict[str, Any]],
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = encode.encode_and_write

    def deadly(block: pa.Table, **more: Any) -> pa.Table:
        if block["chunk_id"][0].as_py() == "00000002":
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(block, **more)

    monkeypatch.setattr(encode, "encode_and_write", deadly)
    output = tmp_path / "out"
    assert predict(photos, output, tiny_bundle) == 0
    assert rows_of(output) == undisturbed
    manifest = json.loads((output / "_manifest.json").read_text())
    assert manifest["run"]["stage_seconds"]["alone"] > 0
    assert manifest["run"]["images"] == IMAGES


def ends(class_: type[Any], error: Exception | None) -> type[Any]:
    """The same actor with a model that cannot be loaded: it raises, or its process is killed."""

    class Ends(class_):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            import jobs.actor as here

            def no_predictor(*_: Any, **__: Any) -> None:
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise error

            here.Predictor = no_predictor
            super().__init__(*arguments)

    return Ends


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("the driver is too old"), "segjobs predict: the driver is too old"),
        (
            None,
            "the model cannot be run, before it has seen any image of it (the process died, 3 times)",
        ),
    ],
    ids=["raises", "is killed"],
)
def test_a_model_that_cannot_be_loaded_ends_the_job(
    ray_local: None,
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    words: str,
) -> None:
    monkeypatch.setattr(pipeline, "Predict", ends(Predict, error))
    monkeypatch.setattr(supervisor, "Alone", ends(Alone, error))
    more = ("--limit", str(CHUNK_SIZE), "--max-actors", "1")
    assert predict(photos, tmp_path / "out", tiny_bundle, *more) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "predictions").exists()


def test_an_actor_whose_constructor_fails_ends_the_job(
    ray_local: None,
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Refuses(Predict):
        def __init__(self, *_: Any) -> None:
            raise ModuleNotFoundError("No module named 'segmodel'")

    monkeypatch.setattr(pipeline, "Predict", Refuses)
    assert predict(photos, tmp_path / "out", tiny_bundle) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "an actor could not be started: ModuleNotFoundError: No module named 'segmodel'" in error


def test_an_actor_that_dies_as_it_starts_is_not_started_for_ever(
    ray_local: None,
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Killed(Predict):
        def __init__(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(pipeline, "Predict", Killed)
    monkeypatch.setattr(supervisor, "Alone", Killed)
    monkeypatch.setattr(isolate, "PROBES", 1)
    monkeypatch.setattr(stall, "RESTARTS_EVERY_S", 0.5)
    monkeypatch.setattr(stall, "MOST_RESTARTS", 3)
    assert predict(photos, tmp_path / "out", tiny_bundle, "--max-actors", "1") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "actors were started anew" in error
    assert "none came through (such as: chunk 0000" in error


def test_actors_that_die_and_cannot_come_back_end_the_job(
    ray_local: None,
    photos: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mark = tmp_path / "was here"

    class Once(Predict):
        def __init__(self, *_: Any) -> None:
            if mark.exists():
                raise OSError("the device is gone")
            mark.touch()

        def __call__(self, block: pa.Table) -> pa.Table:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(pipeline, "Predict", Once)
    # More chunks than are given to an actor ahead: those that were are done image by image.
    more = ("--max-actors", "1", "--chunk-size", "2")
    assert predict(photos, tmp_path / "out", tiny_bundle, *more) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "all actors are gone for good" in error
    assert "Run the same command again" in error
