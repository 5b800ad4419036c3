"""A disk that is full: the kernel's own answer, from its device that is always full."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from jobs import encode
from jobs.envelope import Envelope, seal
from jobs.storage import ArrowStore, open_store
from jobs.store import StorageError


class FullDisk:
    """A file system on which files can be made and nothing can be written."""

    def __init__(self) -> None:
        self._filesystem = pafs.LocalFileSystem()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    def open_output_stream(self, path: str) -> Any:
        Path(path).touch()
        return self._filesystem.open_output_stream("/dev/full")


@pytest.fixture
def full(tmp_path: Path) -> ArrowStore:
    store = open_store(str(tmp_path))
    assert isinstance(store, ArrowStore)
    store.put("predictions/00000000.parquet", b"was there")
    store.filesystem = FullDisk()
    return store


def test_it_is_said_what_to_do_and_nothing_is_left_behind(full: ArrowStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full: make room, and run the same command"):
        full.put("predictions/00000001.parquet", bytes(1000))
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["00000000.parquet"]


def test_the_driver_learns_it(full: ArrowStore) -> None:
    raw = {"image_id": "s#0", "shard": "s", "key": "0", "error": "corrupt: bad"}
    table = pa.Table.from_pylist([raw], schema=encode.RAW)
    block = seal(Envelope(chunk_id="00000001", table=table))
    receipt = encode.encode_and_write(block, full, {}, {})
    with pytest.raises(StorageError, match=r"00000001\.parquet cannot be written"):
        list(encode.receipts(receipt))
