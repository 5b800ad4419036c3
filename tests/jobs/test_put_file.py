"""A local file becomes an object, in parts where it is large, whole or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import s3, storage
from jobs.storage import open_store
from jobs.store import StorageError

# The least that S3 takes as a part that is not the last.
PART = 5 * 2**20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(np.random.default_rng(0).bytes(2 * PART + 17))
    return path


def test_local(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "COPY_BYTES", PART)
    store = open_store(str(tmp_path / "out"))
    store.put_file("a/b", source)
    assert store.read("a/b") == source.read_bytes()
    assert [info.path for info in store.list_objects()] == ["a/b"]


@pytest.mark.parametrize("size", [0, 17, PART, PART + 1, 2 * PART + 17])
def test_s3(source: Path, bucket: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    source.write_bytes(source.read_bytes()[:size])
    bucket.store("x").put_file("a/b", source)
    assert bucket.store("x").read("a/b") == source.read_bytes()
    parts = bucket.client.head_object(Bucket=bucket.name, Key="x/a/b")["ETag"]
    assert ("-" in parts) == (size >= PART)


def test_an_upload_that_fails_leaves_nothing(
    source: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    store = bucket.store("x")
    ask = type(store)._ask

    def failing(self: Any, path: str, call: str, wanted: Any, *use: Any) -> Any:
        if call == "upload_part" and wanted["PartNumber"] == 2:
            raise StorageError("gone")
        return ask(self, path, call, wanted, *use)

    monkeypatch.setattr(type(store), "_ask", failing)
    with pytest.raises(StorageError, match="gone"):
        store.put_file("a/b", source)
    assert not list(store.list_objects())
    assert not bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")
