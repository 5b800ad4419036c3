"""What must hold for any bytes at all: of an image file, and of a tar on its way to rows."""

import contextlib
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import get_args

import numpy as np
from typing_extensions import override

from jobs import tar
from jobs.index import index_tar
from jobs.read import Source, read_chunk
from jobs.store import ObjectInfo, Store
from segmodel.headers import Kind
from segmodel.images import ImageError, decode, probe

# Enough for every seed, and little enough that a fuzzer makes hundreds of pictures a second.
MAX_PIXELS = 200_000
CHUNK_SIZE = 3
KINDS = {"unreadable", "too_large", "truncated", "shard"}


def check_image(data: bytes) -> None:
    """A file is a picture of the size that its header states, or one error of a known kind."""
    stated: tuple[int, int] | None = None
    try:
        stated = probe(data)
    except ImageError as error:
        _check_error(error)
    try:
        image = decode(data, MAX_PIXELS)
    except ImageError as error:
        _check_error(error)
        return
    assert image.shape == (*(stated or ()), 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert image.size <= 3 * MAX_PIXELS


def _check_error(error: ImageError) -> None:
    line = str(error)
    assert error.kind in get_args(Kind)
    assert line.startswith(f"{error.kind}: ")
    assert len(line) < 250
    assert "\n" not in line


def check_tar(data: bytes) -> None:
    """Every image that is planned is a row, none is lost in silence, and content comes back as it is."""
    store = OneObject(data)
    chunks = index_tar(store, store.the_info, CHUNK_SIZE)
    source = Source(store=store, lists=store, endpoint_url=None, image_column=None)
    rows = []
    for chunk in chunks:
        table = read_chunk(chunk, source)
        assert table.num_rows == chunk.num_images
        rows += table.to_pylist()
    ids = [row["image_id"] for row in rows]
    assert len(set(ids)) == len(ids)
    for row in rows:
        assert (row["data"] is None) == (row["error"] is not None)
        assert row["error"] is None or row["error"].partition(":")[0] in KINDS
    damaged = any(row["key"] == "" and row["error"].startswith("shard: ") for row in rows)
    expected = _contents(data)
    found = [row["data"] for row in rows if row["data"] is not None]
    # A damaged archive may hold more than `tarfile` gives before it stops, never less.
    assert found[: len(expected)] == expected
    assert damaged or len(found) == len(expected)


def _contents(data: bytes) -> list[bytes]:
    """The whole images of an archive, by `tarfile` alone."""
    found: list[bytes] = []
    errors = (tarfile.TarError, EOFError, ValueError, OverflowError)
    with contextlib.suppress(*errors), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        while (member := archive.next()) is not None and member.size >= 0:
            start, stop = member.offset_data, member.offset_data + member.size
            whole = member.isreg() and not member.issparse() and stop <= len(data)
            if whole and tar.is_image(member.name):
                found.append(data[start:stop])
    return found


class OneObject(Store):
    """A store in memory that holds one object, to be read only."""

    def __init__(self, data: bytes, path: str = "a.tar") -> None:
        self.uri = "memory://"
        self.data = data
        self.the_info = ObjectInfo(path, len(data), "e")

    @override
    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield self.the_info

    @override
    def info(self, path: str) -> ObjectInfo | None:
        return self.the_info

    @override
    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        start, stop = span or (0, len(self.data))
        assert 0 <= start <= stop <= len(self.data)
        return self.data[start:stop]

    @override
    def put(self, path: str, data: bytes) -> None:
        raise io.UnsupportedOperation(path)

    @override
    def put_if_absent(self, path: str, data: bytes) -> bool:
        raise io.UnsupportedOperation(path)

    @override
    def put_over(self, path: str, data: bytes, etag: str) -> bool:
        raise io.UnsupportedOperation(path)

    @override
    def delete(self, path: str) -> None:
        raise io.UnsupportedOperation(path)


# --- mutations are mended, or a checksum would end them all ----------------------------------------


def mended_image(data: bytes) -> bytes:
    """Give the chunks of a PNG the checksums that they should have; other formats have none."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        length, _ = struct.unpack_from(">I4s", data, position)
        stop = position + 8 + length
        if stop + 4 > len(data):
            break
        body = data[position + 4 : stop]
        parts.append(data[position : position + 4] + body + struct.pack(">I", zlib.crc32(body)))
        position = stop + 4
    return b"".join([*parts, data[position:]])


_HEADER = re.compile(rb"ustar")


def mended_tar(data: bytes) -> bytes:
    """Give every block that looks like a header the checksum that it should have."""
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    return b"".join(
        sealed(block) if len(block) == 512 and _HEADER.match(block, 257) else block
        for block in blocks
    )


def sealed(header: bytes) -> bytes:
    """Return a header of 512 bytes with the checksum that it should have."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
