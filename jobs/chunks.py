"""Chunks: a fixed range of images of one shard, and the name of the one output object it becomes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PREDICTIONS_FOLDER, SHARDS_FOLDER = "predictions", "shards"

Item = TypeVar("Item")
Kind = Literal["tar", "parquet", "objects", "uris", "verdict"]

CHUNKS = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("kind", pa.string()),
        ("shard", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("start", pa.int64()),
        ("num_images", pa.int64()),
        ("num_bytes", pa.int64()),
        ("byte_start", pa.int64()),
        ("byte_stop", pa.int64()),
        ("renamed", pa.map_(pa.int64(), pa.string())),
        ("list_path", pa.string()),
        ("key", pa.string()),
        ("error", pa.string()),
        ("keep", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A fixed range of images of one shard.

    Attributes:
        chunk_id: Unique in the plan; the order of ids is the order of images.
        kind: `tar`, `parquet`, `objects` (a range of a list of loose images), `uris` (of a
            manifest's images), or `verdict`: an image known to be unreadable, or a shard that is
            damaged; nothing is read, one row says why.
        shard: Path of the shard relative to the input; empty for `objects`.
        size: Bytes of the shard.
        etag: Of the shard.
        start: Number of the first image in its shard or list.
        num_images: Rows of the output object.
        num_bytes: Bytes of the images, to measure work with.
        byte_start: Tar only: the first byte to read.
        byte_stop: Tar only: the byte behind the last.
        renamed: Keys, by number in the shard, of images whose name was there before.
        list_path: `objects` and `uris` only: the list, relative to the output.
        key: Verdict only: the image's key, empty for the shard as a whole.
        error: Verdict only.
        keep: Where only some of its images are rows of the output: a byte for each image from
            `start` on, 1 where it is a row, 0 where it is left out. Empty where all are.
    """

    chunk_id: str = ""
    kind: Kind
    shard: str = ""
    size: int = 0
    etag: str = ""
    start: int = 0
    num_images: int
    num_bytes: int = 0
    byte_start: int = 0
    byte_stop: int = 0
    renamed: tuple[tuple[int, str], ...] = ()
    list_path: str = ""
    key: str = ""
    error: str | None = None
    keep: bytes = b""

    @property
    def num_read(self) -> int:
        """Images from `start` on, those that are left out too."""
        return len(self.keep) or self.num_images

    def kept(self, images: Sequence[Item]) -> list[Item]:
        """Return those of all its images that are rows of the output, in their order."""
        assert len(images) == self.num_read
        return list(compress(images, self.keep) if self.keep else images)


def output_path(chunk_id: str, folder: str = PREDICTIONS_FOLDER) -> str:
    """Return where a chunk's rows go, relative to the output."""
    return f"{folder}/{chunk_id}.parquet"


def to_table(chunks: Iterable[Chunk]) -> pa.Table:
    """Return chunks as a table of `CHUNKS`."""
    return pa.Table.from_pylist([asdict(chunk) for chunk in chunks], schema=CHUNKS)


def from_table(table: pa.Table) -> Iterator[Chunk]:
    """Yield the chunks of a table of `CHUNKS`."""
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield Chunk(**{**row, "renamed": tuple(row["renamed"])})


def numbered(table: pa.Table, limit: int | None) -> pa.Table:
    """Give chunks their ids, in order, and cut them off after `limit` images."""
    if limit is not None:
        sizes = table["num_images"].to_numpy()
        before = np.cumsum(sizes) - sizes
        fitting = pa.array(np.minimum(sizes, limit - before))
        column = CHUNKS.get_field_index("num_images")
        table = table.set_column(column, CHUNKS.field(column), fitting)
        table = table.filter(pa.array(before < limit))
    numbers = pa.array(np.arange(table.num_rows)).cast(pa.string())
    return table.set_column(0, "chunk_id", pc.utf8_lpad(numbers, 8, "0"))
