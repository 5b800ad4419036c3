"""Chunks to tables of image bytes: one reader for each format, one row for each planned image.

`read_names` says who a chunk's images are, at the cost of headers and columns of names.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import retries, tar
from jobs.chunks import Chunk
from jobs.detect import FOOTER_WINDOW, OBJECTS
from jobs.index import (
    DAMAGED_PARQUET,
    HOP_FROM_MEAN_BYTES,
    HOP_WINDOW,
    MAX_IMAGE_BYTES,
    READ_THROUGH_WINDOW,
)
from jobs.parquet_columns import (
    OWN_KEYS,
    ParquetInputError,
    find_image_column,
    key_columns,
    row_key,
)
from jobs.storage import open_uri
from jobs.store import ChangedError, DamagedError, ObjectInfo, StorageError, Store
from segmodel.schema import image_id

# Loose images are small: the wait for each is most of its cost.
FETCH_THREADS = 16
# Rows of a Parquet shard that are decompressed together, at most, and bytes, by the mean of the row group:
# it may hold any number of images, and Arrow would read all of them for the first.
ROWS_AT_A_TIME = 64
BYTES_AT_A_TIME = 16 * 2**20
# Bytes that are read together.
PARQUET_WINDOW = 16 * 2**20
# Size and etag say that a shard is the same, its headers or its footer that it is not.
CHANGED_TAR = "changed: the tar does not hold what was planned"
CHANGED_PARQUET = "changed: the Parquet file does not hold what was planned"
# How an error begins that a second look may clear away: bits may flip on their way here.
DAMAGE = ("shard:", CHANGED_TAR, CHANGED_PARQUET)

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("data", pa.large_binary()),
        pa.field("error", pa.string()),
    ]
)

NAMES = pa.schema([IMAGES.field(name) for name in OWN_KEYS])


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where chunks come from. Can be pickled; holds no credentials.

    Attributes:
        store: The input's folder.
        lists: The output, which holds the plan's lists of loose images.
        endpoint_url: For the URIs of a manifest.
        image_column: The Parquet column that holds images; found where None.
        check_loose: Whether a loose image must still have the etag that was planned.
    """

    store: Store
    lists: Store
    endpoint_url: str | None
    image_column: str | None
    check_loose: bool = True


@dataclass(frozen=True)
class Row:
    """One planned image: its bytes, or why there are none."""

    shard: str
    key: str
    data: bytes | None
    error: str | None = None
    image_id: str = ""


@dataclass(frozen=True)
class Part:
    """Rows of one row group: `num_rows` of them, from number `first` in the group on."""

    group: int
    first: int
    num_rows: int


def read_chunk(chunk: Chunk, source: Source) -> pa.Table:
    """Read the images of a chunk, in their order.

    Returns:
        A table of `IMAGES` with `chunk.num_images` rows. An image or a shard that is gone, changed
        or damaged since it was planned gives rows with an error, `<kind>: <what happened>`.

    Raises:
        StorageError: The store failed for good; the job stops, and can be resumed.
    """
    readers: dict[str, Callable[[Chunk, Source], list[Row]]] = {
        "tar": _read_tar,
        "parquet": _read_parquet,
        "objects": _read_objects,
        "uris": _read_uris,
        "verdict": lambda chunk, _: [Row(chunk.shard, chunk.key, None, chunk.error)],
    }
    try:
        rows = readers[chunk.kind](chunk, source)
        if chunk.kind != "verdict" and any((row.error or "").startswith(DAMAGE) for row in rows):
            retries.note("checksum")
            rows = readers[chunk.kind](chunk, source)
    except ChangedError as error:
        rows = chunk.kept(_rest_in_error(chunk, 0, f"changed: {error}"))
    except DamagedError as error:
        rows = chunk.kept(_rest_in_error(chunk, 0, f"shard: {error}"))
    except FileNotFoundError as error:
        rows = chunk.kept(_rest_in_error(chunk, 0, f"missing: {error}"))
    assert len(rows) == chunk.num_images, f"{chunk} gave {len(rows)} rows"
    columns = [
        [row.image_id or image_id(row.shard, row.key) for row in rows],
        [row.shard for row in rows],
        [row.key for row in rows],
        [row.data for row in rows],
        [row.error for row in rows],
    ]
    return pa.table(columns, schema=IMAGES)


def read_names(chunk: Chunk, source: Source) -> pa.Table:
    """Return who the images of a chunk are, in their order, without reading any: a table of `NAMES`.

    Raises:
        StorageError: The shard is no longer what was planned, or the store failed.
    """
    readers: dict[str, Callable[[Chunk, Source], list[Row]]] = {
        "tar": _tar_names,
        "parquet": _parquet_names,
        "objects": lambda *of: [_object_row(info) for info in _listed(*of)],
        "uris": lambda *of: [Row(chunk.shard, info.path, None) for info in _listed(*of)],
        "verdict": lambda chunk, _: [Row(chunk.shard, chunk.key, None)],
    }
    rows = readers[chunk.kind](chunk, source)
    columns = [
        [row.image_id or image_id(row.shard, row.key) for row in rows],
        [row.shard for row in rows],
        [row.key for row in rows],
    ]
    return pa.table(columns, schema=NAMES)


def _tar_names(chunk: Chunk, source: Source) -> list[Row]:
    hop = chunk.num_bytes > HOP_FROM_MEAN_BYTES * chunk.num_read
    info = ObjectInfo(chunk.shard, chunk.size, chunk.etag)
    file = source.store.open(info, HOP_WINDOW if hop else READ_THROUGH_WINDOW)
    file.seek(chunk.byte_start)
    renamed = dict(chunk.renamed)
    numbers = range(chunk.start, chunk.start + chunk.num_read)
    found = tar.members(cast(BinaryIO, file), until_end=False)
    # In this order: a member too many would be read, and behind the last one is the archive's end.
    members = zip(numbers, found, strict=False)
    return chunk.kept([Row(chunk.shard, renamed.get(n, member.key), None) for n, member in members])


def _read_tar(chunk: Chunk, source: Source) -> list[Row]:
    span = chunk.byte_start, chunk.byte_stop
    data = source.store.read(chunk.shard, span, chunk.etag)
    renamed = dict(chunk.renamed)
    rows: list[Row] = []
    found = tar.members(io.BytesIO(data), until_end=False)
    numbers = range(chunk.start, chunk.start + chunk.num_read)
    with contextlib.suppress(tar.DamagedTarError):
        for number, member in zip(numbers, found, strict=False):
            content = data[member.data_start : member.data_start + member.size]
            if member.problem or len(content) != member.size:
                break
            rows.append(Row(chunk.shard, renamed.get(number, member.key), content))
    return chunk.kept(rows + _rest_in_error(chunk, len(rows), CHANGED_TAR))


def _read_parquet(chunk: Chunk, source: Source) -> list[Row]:
    try:
        file = _open_parquet(chunk, source)
        column = find_image_column(file.schema_arrow, source.image_column)
        # The names first: where a page of images is damaged, rows in error still have their own.
        named = _named_rows(chunk, file, column)
    except (*DAMAGED_PARQUET, ParquetInputError) as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        # When it was planned, it was whole.
        damage = f"shard: the Parquet file is damaged: {_line(error)}"
        return chunk.kept(_rest_in_error(chunk, 0, damage))
    if len(named) != chunk.num_read:
        return chunk.kept(_rest_in_error(chunk, 0, CHANGED_PARQUET))
    rows: list[Row] = []
    for part in _parts(file, chunk.start, chunk.num_read):
        of_part = named[len(rows) : len(rows) + part.num_rows]
        rows += _with_images(of_part, file, part, column)
    return chunk.kept(rows)


def _open_parquet(chunk: Chunk, source: Source) -> pq.ParquetFile:
    file = source.store.open(ObjectInfo(chunk.shard, chunk.size, chunk.etag), FOOTER_WINDOW)
    # Arrow's own reading ahead takes a whole row group, whatever `buffer_size` says.
    return pq.ParquetFile(
        file, page_checksum_verification=True, pre_buffer=False, buffer_size=PARQUET_WINDOW
    )


def _parquet_names(chunk: Chunk, source: Source) -> list[Row]:
    file = _open_parquet(chunk, source)
    column = find_image_column(file.schema_arrow, source.image_column)
    return chunk.kept(_named_rows(chunk, file, column))


def _named_rows(chunk: Chunk, file: pq.ParquetFile, column: str) -> list[Row]:
    """Return a row without an image for each that is read."""
    names = key_columns(file.schema_arrow, column)
    renamed = dict(chunk.renamed)
    parts = _parts(file, chunk.start, chunk.num_read)
    found = chain.from_iterable(_rows_of(file, part, names) for part in parts)
    return [
        _named_row(chunk.shard, values, renamed.get(number) or row_key(values, number, column))
        for number, values in enumerate(found, chunk.start)
    ]


def _named_row(shard: str, values: dict[str, Any], key: str) -> Row:
    if "image_id" in values:
        return Row(values["shard"], values["key"], None, image_id=values["image_id"])
    return Row(shard, key, None)


def _with_images(named: list[Row], file: pq.ParquetFile, part: Part, column: str) -> list[Row]:
    """Add the images of a part of a row group to its rows; behind a damaged page, the error."""
    rows: list[Row] = []
    try:
        for row, values in zip(named, _rows_of(file, part, [column]), strict=False):
            image = values[column]
            data = image.get("bytes") if isinstance(image, dict) else image
            if data is None:
                rows.append(replace(row, error="empty: the row holds no image"))
            elif len(data) > MAX_IMAGE_BYTES:
                rows.append(replace(row, error=_too_large(len(data))))
            else:
                rows.append(replace(row, data=data))
    except DAMAGED_PARQUET as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        damage = f"shard: a page of the Parquet file is damaged: {_line(error)}"
        return [*rows, *(replace(row, error=damage) for row in named[len(rows) :])]
    return [*rows, *(replace(row, error=CHANGED_PARQUET) for row in named[len(rows) :])]


def _parts(file: pq.ParquetFile, start: int, count: int) -> Iterator[Part]:
    """Yield the parts of row groups that make up `count` rows from number `start` on."""
    passed = 0
    for group in range(file.metadata.num_row_groups):
        group_rows = file.metadata.row_group(group).num_rows
        first, last = max(start, passed), min(start + count, passed + group_rows)
        if first < last:
            yield Part(group, first - passed, last - first)
        passed += group_rows


def _rows_of(file: pq.ParquetFile, part: Part, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part of a row group, holding few of them at a time."""
    if not columns:
        yield from ({} for _ in range(part.num_rows))
        return
    skip, left = part.first, part.num_rows
    group = file.metadata.row_group(part.group)
    fit = BYTES_AT_A_TIME * group.num_rows // max(1, group.total_byte_size)
    at_a_time = max(1, min(ROWS_AT_A_TIME, fit))
    for batch in file.iter_batches(at_a_time, row_groups=[part.group], columns=columns):
        rows = batch.slice(min(skip, batch.num_rows), left)
        skip -= min(skip, batch.num_rows)
        left -= rows.num_rows
        yield from rows.to_pylist()
        if not left:
            return


def _read_objects(chunk: Chunk, source: Source) -> list[Row]:
    def row(info: ObjectInfo) -> Row:
        data, error = _fetch(source.store, info)
        return replace(_object_row(info), data=data, error=error)

    return _in_threads(row, _listed(chunk, source))


def _object_row(info: ObjectInfo) -> Row:
    folder, slash, name = info.path.rpartition("/")
    # An S3 key may start with a slash: then the slash is its folder.
    return Row(folder or slash, name, None)


def _read_uris(chunk: Chunk, source: Source) -> list[Row]:
    def row(info: ObjectInfo) -> Row:
        try:
            store, name = open_uri(info.path, source.endpoint_url)
        except (ValueError, OSError) as error:
            if isinstance(error, StorageError):
                raise
            return Row(chunk.shard, info.path, None, f"missing: {_line(error)}")
        return Row(chunk.shard, info.path, *_fetch(store, ObjectInfo(name, info.size, info.etag)))

    return _in_threads(row, _listed(chunk, source))


def _in_threads(row: Callable[[ObjectInfo], Row], infos: list[ObjectInfo]) -> list[Row]:
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        return list(pool.map(row, infos))


def _listed(chunk: Chunk, source: Source) -> list[ObjectInfo]:
    try:
        data = source.lists.read(chunk.list_path)
    except FileNotFoundError as error:
        raise StorageError(f"{error}: the plan is damaged, start a new output") from error
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    infos = [
        ObjectInfo(**row)
        for part in _parts(file, chunk.start, chunk.num_read)
        for row in _rows_of(file, part, OBJECTS.names)
    ]
    infos = chunk.kept(infos)
    return infos if source.check_loose else [replace(info, etag="") for info in infos]


def _fetch(store: Store, info: ObjectInfo) -> tuple[bytes | None, str | None]:
    """Return an object's bytes, or the error that its row gets."""
    if info.size > MAX_IMAGE_BYTES:
        return None, _too_large(info.size)
    try:
        return store.read(info.path, etag=info.etag), None
    except FileNotFoundError as error:
        return None, f"missing: {error}"
    except ChangedError as error:
        return None, f"changed: {error}"
    except DamagedError as error:
        return None, f"corrupt: {error}"


def _too_large(num_bytes: int) -> str:
    return f"too_large: {num_bytes} bytes, and {MAX_IMAGE_BYTES} are the most that is read"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _rest_in_error(chunk: Chunk, done: int, error: str) -> list[Row]:
    """Return a row in error for each image of a chunk but the first `done`; no names are known."""
    numbers = range(chunk.start + done, chunk.start + chunk.num_read)
    return [Row(chunk.shard, f"{number:08d}", None, error) for number in numbers]
