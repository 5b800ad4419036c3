"""The rate of a finished job, taken from its manifest."""

from pathlib import Path
from typing import Any

import pytest

from jobs import documents, precedent, write
from jobs.actor import Pool
from jobs.config import ConfigError
from jobs.sizing import Work, estimate
from jobs.storage import open_store
from jobs.store import Store

JOB: dict[str, Any] = {
    "model_digest": "abc",
    "score_threshold": 0.05,
    "max_detections": 100,
    "precision": "fp16",
    "tasks": "masks",
}
POOL = Pool(
    min_actors=1, max_actors=8, initial_actors=1, gpus_per_actor=1, threads=None, batch_size=None
)
# As much as was done.
WORK = Work(images=1000, input_bytes=0, actors=8, gpus_per_actor=1, store_limit_bytes=0)
BYTES = 123


@pytest.fixture
def table(tmp_path: Path) -> Store:
    return finished(tmp_path)


def finished(folder: Path, **of_run: Any) -> Store:
    """A job of 1000 images that took 50 s."""
    store = open_store(str(folder))
    run = {"images": 1000, "seconds": 50.0, "stage_seconds": {"encode": 20.0}, **of_run}
    manifest = {
        "job": JOB,
        "pool": {"max_actors": 8, "gpus_per_actor": 1},
        "chunks": 40,
        "counts": {"images": 1000},
        "run": run,
    }
    store.put("predictions/00000000.parquet", bytes(1000 * BYTES))
    write.put_marks(store, manifest)
    return store


def test_the_same_again_takes_as_long(table: Store) -> None:
    found = precedent.rates(table, JOB, POOL)
    assert estimate(WORK, found, None).images_per_second == pytest.approx(1000 / 50)
    assert found.output_bytes == BYTES
    assert found.encode_seconds == 0.02
    assert found.store_bytes is None
    assert found.source == f"{table.uri}: 1000 images in 50 s by 8 actors"


def test_actors_that_had_no_chunk_do_not_count(tmp_path: Path) -> None:
    store = finished(tmp_path)
    manifest = {**documents.read(store, write.MANIFEST), "chunks": 2}
    write.put_marks(store, manifest)
    assert precedent.rates(store, JOB, POOL).source.endswith("by 2 actors")


@pytest.mark.parametrize(
    ("job", "pool", "words"),
    [
        ({"model_digest": "xyz"}, {}, "that job had model_digest abc, and this one has xyz"),
        ({"precision": "bf16"}, {}, "had precision fp16, and this one has bf16"),
        ({"tasks": "boxes"}, {}, "had tasks masks, and this one has boxes"),
        ({"compile": True}, {}, "had compile None, and this one has True"),
        ({}, {"gpus_per_actor": 0.5}, "its actors had 1 GPUs each, and this job's have 0.5"),
    ],
)
def test_another_kind_of_job_is_refused(
    table: Store, job: dict[str, Any], pool: dict[str, Any], words: str
) -> None:
    other = Pool(**{**vars(POOL), **pool})
    with pytest.raises(ConfigError, match=words):
        precedent.rates(table, {**JOB, **job}, other)


def test_a_job_without_a_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no job is finished there"):
        precedent.rates(open_store(str(tmp_path)), JOB, POOL)
    with pytest.raises(ConfigError, match="had nothing to do"):
        precedent.rates(finished(tmp_path, images=0), JOB, POOL)
