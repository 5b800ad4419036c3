"""What is in a shard: its images, cut into chunks. Nothing of an image is read here but its key.

What it costs: a tar is read header by header (where its images are small: through, in large spans);
of Parquet the footer and the column with the keys; of a manifest its rows, and one HEAD request for
each image; loose images were listed already.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import tar
from jobs.chunks import Chunk
from jobs.detect import FOOTER_WINDOW, object_table
from jobs.parquet_columns import (
    OWN_KEYS,
    ParquetInputError,
    find_image_column,
    key_columns,
    row_key,
)
from jobs.storage import open_uri
from jobs.store import ObjectInfo, StorageError, Store

# A chunk's compressed images travel as one Ray object, and its reader holds them twice.
MAX_CHUNK_BYTES = 64 * 2**20
# No camera writes a larger one. A reader holds `MAX_CHUNK_BYTES`, or one image where that is more.
MAX_IMAGE_BYTES = 256 * 2**20
# Below this mean size of members, reading a tar through is cheaper than one request for each
# header.
HOP_FROM_MEAN_BYTES = 2**20
READ_THROUGH_WINDOW, HOP_WINDOW = 4 * 2**20, 64 * 2**10
HEAD_THREADS = 32

# What pyarrow raises for a damaged file, and what the store raises.
DAMAGED_PARQUET = (pa.ArrowException, OSError, UnicodeDecodeError)

Result = TypeVar("Result")


def index_tar(store: Store, info: ObjectInfo, chunk_size: int) -> list[Chunk]:
    """Cut a WebDataset shard into chunks of at most `chunk_size` images and `MAX_CHUNK_BYTES`.

    Damage becomes a chunk of its own with one row that says so, and so does an image that is known
    to be unreadable; what can be read is planned.
    """
    found, damage = _scan(store, info)
    if damage:
        # On its way here a bit may flip, and what a plan says is final.
        found, damage = _scan(store, info)
    keys, renamed = unique([member.key for member in found])
    planned = []
    for first, last in _runs(found, chunk_size, info.size):
        if problem := _problem(found[first], info.size):
            planned.append(verdict(info, keys[first], problem, start=first))
            continue
        planned.append(
            Chunk(
                kind="tar",
                shard=info.path,
                size=info.size,
                etag=info.etag,
                start=first,
                num_images=last - first,
                num_bytes=sum(member.size for member in found[first:last]),
                byte_start=found[first].start,
                # The padding behind the last image may be cut off.
                byte_stop=min(found[last - 1].stop, info.size),
                renamed=tuple((n, key) for n, key in renamed.items() if first <= n < last),
            )
        )
    if damage:
        planned.append(verdict(info, "", f"shard: {damage}", start=len(found)))
    return planned


def _scan(store: Store, info: ObjectInfo) -> tuple[list[tar.Member], str]:
    """Return the images of a tar, and the damage behind them or an empty string."""
    file = store.open(info, READ_THROUGH_WINDOW)
    found: list[tar.Member] = []
    try:
        for member in tar.members(cast(BinaryIO, file), until_end=True):
            found.append(member)
            file.window = (
                HOP_WINDOW
                if member.stop / len(found) > HOP_FROM_MEAN_BYTES
                else READ_THROUGH_WINDOW
            )
    except tar.DamagedTarError as error:
        return found, str(error)
    return found, ""


def index_parquet(
    store: Store, info: ObjectInfo, chunk_size: int, image_column: str | None
) -> list[Chunk]:
    """Cut a Parquet shard into chunks of rows, none across row groups that are large enough.

    Raises:
        ParquetInputError: It is whole, but has no column of images.
    """
    try:
        shard = look_twice(lambda: _look_into_parquet(store, info, image_column))
    except ParquetInputError as error:
        raise ParquetInputError(f"{store.url(info.path)}: {error}") from None
    except DAMAGED_PARQUET as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        return [verdict(info, "", f"shard: the Parquet file is damaged: {_line(error)}", start=0)]
    renamed: dict[int, str] = {}
    if shard.names == list(OWN_KEYS):
        _refuse_repeated_ids([row["image_id"] for row in shard.rows], store.url(info.path))
    else:
        _, renamed = unique([row_key(row, n, shard.column) for n, row in enumerate(shard.rows)])
    cuts = _row_cuts(
        [rows for rows, _ in shard.sizes], [_most_rows(*of, chunk_size) for of in shard.sizes]
    )
    ends = np.cumsum([[0, 0], *shard.sizes], axis=0)
    bytes_before = np.interp(cuts, ends[:, 0], ends[:, 1])
    return [
        Chunk(
            kind="parquet",
            shard=info.path,
            size=info.size,
            etag=info.etag,
            start=first,
            num_images=last - first,
            num_bytes=round(num_bytes),
            renamed=tuple((n, key) for n, key in renamed.items() if first <= n < last),
        )
        for (first, last), num_bytes in zip(pairwise(cuts), np.diff(bytes_before), strict=True)
    ]


def _most_rows(rows: int, num_bytes: int, chunk_size: int) -> int:
    """Return how many rows of a row group a chunk may have."""
    return max(1, min(chunk_size, MAX_CHUNK_BYTES * rows // max(1, num_bytes)))


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A Parquet shard: rows and bytes in memory of each group, image column, columns of names, their rows."""

    sizes: list[tuple[int, int]]
    column: str
    names: list[str]
    rows: list[dict[str, Any]]


def _look_into_parquet(store: Store, info: ObjectInfo, image_column: str | None) -> _Shard:
    file = pq.ParquetFile(store.open(info, FOOTER_WINDOW), page_checksum_verification=True)
    column = find_image_column(file.schema_arrow, image_column)
    sizes = _row_groups(file.metadata)
    num_rows = sum(rows for rows, _ in sizes)
    names = key_columns(file.schema_arrow, column)
    rows = file.read(columns=names).to_pylist() if names else []
    if not names:
        rows = [{}] * num_rows
    if len(rows) != num_rows:
        raise pa.ArrowInvalid(f"{len(rows)} of {num_rows} rows have a name")
    return _Shard(sizes=sizes, column=column, names=names, rows=rows)


def look_twice(look: Callable[[], Result]) -> Result:
    """Call a function again where it finds a Parquet file damaged: bits may flip on their way here."""
    try:
        return look()
    except DAMAGED_PARQUET as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        return look()


def own_id_digests(store: Store, info: ObjectInfo) -> list[int]:
    """Return 64 bits of each image id of a shard in the one schema; nothing of any other shard."""
    try:
        file = pq.ParquetFile(store.open(info, FOOTER_WINDOW), page_checksum_verification=True)
        if not set(OWN_KEYS) <= set(file.schema_arrow.names):
            return []
        ids = file.read(columns=["image_id"])["image_id"].to_pylist()
    except DAMAGED_PARQUET as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        # Indexing the shard makes the row that says so.
        return []
    return [id_digest(str(value)) for value in ids]


def id_digest(image_id: str) -> int:
    """Return 64 bits of an image id: what the driver holds of millions of them."""
    return int.from_bytes(blake2b(image_id.encode(), digest_size=8).digest(), "big")


def _row_groups(metadata: pq.FileMetaData) -> list[tuple[int, int]]:
    """Return rows and bytes in memory of each row group: a page may hold ten times its size.

    Other columns are counted too: where one's entry is damaged, Arrow (26) aborts when asked for it.

    Raises:
        ArrowInvalid: The footer, which has no checksum, contradicts itself.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows, sizes = [g.num_rows for g in groups], [g.total_byte_size for g in groups]
    if sum(rows) != metadata.num_rows or min([*rows, *sizes], default=0) < 0:
        raise pa.ArrowInvalid("its footer contradicts itself about the number of rows")
    return [(n, min(size, MAX_IMAGE_BYTES * n)) for n, size in zip(rows, sizes, strict=True)]


def _refuse_repeated_ids(ids: list[str | None], url: str) -> None:
    if None in ids:
        raise ParquetInputError(
            f"{url} has rows without an image_id: fill them in, or rename the column image_id"
        )
    if repeated := [value for value, times in Counter(ids).items() if times > 1]:
        raise ParquetInputError(
            f"{url} has {len(repeated)} image ids more than once ({', '.join(map(str, repeated[:3]))}): "
            "pack the data set anew, or rename the column image_id"
        )


def index_objects(objects: pa.Table, list_path: str, chunk_size: int, shard: str) -> list[Chunk]:
    """Cut a list of loose images, a table of `OBJECTS`, into chunks; `shard` is their manifest."""
    ends = np.cumsum(objects["size"].to_numpy())
    planned, start = [], 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        fits = int(np.searchsorted(ends, before + MAX_CHUNK_BYTES, side="right"))
        stop = max(start + 1, min(start + chunk_size, fits))
        planned.append(
            Chunk(
                kind="uris" if shard else "objects",
                shard=shard,
                start=start,
                num_images=stop - start,
                num_bytes=int(ends[stop - 1] - before),
                list_path=list_path,
            )
        )
        start = stop
    return planned


def look_up(uris: list[str], endpoint_url: str | None) -> pa.Table:
    """Return sizes and etags of a manifest's images: a table of `OBJECTS`.

    What is missing or may not be looked at keeps size 0 and an empty etag; reading it says why.
    """

    def head(uri: str) -> ObjectInfo:
        try:
            store, name = open_uri(uri, endpoint_url)
            found = store.info(name)
        except (OSError, ValueError):
            found = None
        return ObjectInfo(uri, found.size if found else 0, found.etag if found else "")

    with ThreadPoolExecutor(HEAD_THREADS) as pool:
        found = list(pool.map(head, uris))
    return object_table(found)


def unique(keys: list[str]) -> tuple[list[str], dict[int, str]]:
    """Give every key that was there before another name; return all keys and the new ones by number."""
    seen: set[str] = set(keys)
    first: set[str] = set()
    result, renamed = [], {}
    for number, key in enumerate(keys):
        new = key
        if key in first:
            new = f"{key}#{number}"
            while new in seen:
                new += "#"
            seen.add(new)
            renamed[number] = new
        first.add(key)
        result.append(new)
    return result, renamed


def _runs(found: list[tar.Member], chunk_size: int, tar_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield first number and the one behind the last of each chunk; unreadable members stay alone."""
    start = 0
    while start < len(found):
        stop = start + 1
        if not _problem(found[start], tar_bytes):
            while (
                stop < len(found)
                and stop - start < chunk_size
                and found[stop].stop - found[start].start <= MAX_CHUNK_BYTES
                and not _problem(found[stop], tar_bytes)
            ):
                stop += 1
        yield start, stop
        start = stop


def _problem(member: tar.Member, tar_bytes: int) -> str:
    if member.problem:
        return f"unreadable: {member.problem}"
    if member.size > MAX_IMAGE_BYTES:
        return f"too_large: {member.size} bytes, and {MAX_IMAGE_BYTES} are the most that is read"
    if member.data_start + member.size > tar_bytes:
        return "truncated: the tar ends within this image"
    return ""


def _row_cuts(group_rows: Sequence[int], most_rows: Sequence[int]) -> list[int]:
    """Return where to cut so that small row groups go together and a large one is split alone.

    Args:
        group_rows: Rows of each group.
        most_rows: That a chunk with rows of this group may have.
    """
    cuts, start, held, limit = [0], 0, 0, 0
    for group, most in zip(group_rows, most_rows, strict=True):
        limit = min(limit, most) if held else most
        if held and held + group > limit:
            cuts.append(start)
            held, limit = 0, most
        for offset in range(limit, group, limit):
            cuts.append(start + offset)
        start += group
        held = start - cuts[-1]
    return [*cuts, start] if start > cuts[-1] else cuts


def verdict(info: ObjectInfo, key: str, error: str, *, start: int) -> Chunk:
    """Return the chunk of one row that says why an image, or with an empty key a shard, is unreadable."""
    return Chunk(
        kind="verdict",
        shard=info.path,
        size=info.size,
        etag=info.etag,
        start=start,
        num_images=1,
        key=key,
        error=error,
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
