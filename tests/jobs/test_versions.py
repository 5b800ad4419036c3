"""Versions of a data set: numbers, what is current, promotion, races, and what a URI names."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import documents, versions
from jobs.detect import InputError
from jobs.sorting import Stage
from jobs.storage import open_store
from jobs.store import StorageError, Store
from tests.conftest import Bucket

NOWHERE = {"objects": "lists/objects.parquet", "inputs": "lists/inputs.parquet"}


def publish(store: Store, number: int, **more: Any) -> bool:
    facts = {"run_id": f"run of {number}", "status": "published", "categories": [], **NOWHERE}
    return versions.publish(store, number, {**facts, **more})


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, bucket: Bucket) -> Store:
    return open_store(str(tmp_path)) if request.param == "local" else bucket.store("set")


def test_numbers_have_no_gaps_and_are_taken_once(store: Store) -> None:
    assert versions.latest(store) == 0
    assert versions.current(store) is None
    for number in range(1, 12):
        assert publish(store, number)
        assert versions.latest(store) == number
    assert not publish(store, 7, run_id="another")
    assert versions.load(store, 7).manifest["run_id"] == "run of 7"
    assert [one.number for one in versions.load_all(store)] == list(range(1, 12))
    now = versions.current(store)
    assert now is not None
    assert now.number == 11
    with pytest.raises(InputError, match="has no version 12: there are 1 to 11"):
        versions.load(store, 12)


def test_candidates_are_current_when_promoted_and_until_the_next(store: Store) -> None:
    publish(store, 1)
    publish(store, 2, status="candidate")
    publish(store, 3, status="candidate")
    assert number_of(versions.current(store)) == 1
    versions.promote(store, 2, {"run_id": "a"})
    assert number_of(versions.current(store)) == 2
    versions.promote(store, 3, {"run_id": "b"})
    assert number_of(versions.current(store)) == 3
    # Back to an older one; the next that is published is current again, a candidate is not.
    versions.promote(store, 1, {"run_id": "c"})
    publish(store, 4, status="candidate")
    assert number_of(versions.current(store)) == 1
    publish(store, 5)
    assert number_of(versions.current(store)) == 5
    with pytest.raises(InputError, match="has no version 9"):
        versions.promote(store, 9, {"run_id": "d"})


def number_of(version: versions.Version | None) -> int:
    assert version is not None
    return version.number


def test_a_promotion_that_another_one_passed_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    publish(store, 2, status="candidate")
    real = versions.latest

    def overtaken(dataset: Store) -> int:
        found = real(dataset)
        if found == 2:
            publish(dataset, 3)
        return found

    monkeypatch.setattr(versions, "latest", overtaken)
    with pytest.raises(StorageError, match="published or promoted in the same moment"):
        versions.promote(store, 2, {"run_id": "a"})


def put_version(store: Store, number: int) -> None:
    listed = [
        {
            "table": table,
            "path": f"versions/{number}/x/{table}/0.parquet",
            **{"size": 9, "etag": "e", "rows": 1, "detections": 2, "first": "a", "last": "b"},
        }
        for table in (versions.ACCEPTED, versions.REVIEW)
    ]
    objects = pa.Table.from_pylist(listed, schema=versions.LISTING)
    path = f"versions/{number}/objects.parquet"
    versions.put_table(store, path, objects)
    publish(store, number, objects=path, status="candidate" if number == 2 else "published")


def test_a_uri_names_a_version_and_a_table_of_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert versions.find(str(tmp_path), None) is None
    put_version(store, 1)
    put_version(store, 2)

    def named(*parts: str) -> tuple[int, str]:
        found = versions.find(str(tmp_path.joinpath(*parts)), None)
        assert found is not None
        return found[0].number, found[1]

    assert named() == (1, "accepted")
    assert named("versions", "2") == (2, "accepted")
    assert named("versions", "2", "review") == (2, "review")
    assert versions.find(str(tmp_path / "versions" / "3"), None) is None
    table = versions.look_at_table(str(tmp_path / "versions" / "1" / "review"), None)
    assert table.objects.to_pylist() == [
        {"path": "versions/1/x/review/0.parquet", "size": 9, "etag": "e"}
    ]
    with pytest.raises(InputError, match=r"version 1 of .* has no rejected rows"):
        versions.look_at_table(str(tmp_path / "versions" / "1" / "rejected"), None)


def test_a_data_set_of_candidates_names_the_remedy(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path)), 1, status="candidate")
    with pytest.raises(InputError, match=r"only candidates: `segjobs label .* --promote N`"):
        versions.find(str(tmp_path), None)


def test_damage_is_found(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put_version(store, 1)
    path = tmp_path / versions.manifest_path(1)
    manifest = json.loads(path.read_text())
    path.write_bytes(json.dumps({**manifest, "status": "candidate"}).encode())
    with pytest.raises(StorageError, match="damaged"):
        versions.load(store, 1)
    manifest.pop(documents.DIGEST)
    path.write_bytes(documents.dump(manifest))
    (tmp_path / manifest["objects"]).write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(StorageError, match="damaged"):
        _ = versions.load(store, 1).objects


def test_what_a_run_that_is_the_same_has_published_stays_as_it_is(tmp_path: Path) -> None:
    stage = Stage(store=open_store(str(tmp_path)), folder="versions/1/abc")
    stage.put_contents("c", pa.table({"key": ["a"]}))
    before = stage.store.info("versions/1/abc/contents/c.parquet")
    os.utime(tmp_path / "versions/1/abc/contents/c.parquet", ns=(1, 1))
    published = stage.store.info("versions/1/abc/contents/c.parquet")
    assert published != before
    stage.put_contents("c", pa.table({"key": ["a"]}))
    assert stage.store.info("versions/1/abc/contents/c.parquet") == published
