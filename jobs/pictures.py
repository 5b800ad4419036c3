"""The bytes of a few images of a table, found where the table's job found them, by its readers.

Where the plan beside the table is of the same input, its chunks say where an image is. Otherwise a
loose image is read by its path, and shards are indexed as if for a plan: those that hold an image that is
wanted, and all of Parquet that names its images by itself. A table may hold its images, and a version of a
data set does, each once: an audit's bytes are with its accepted row.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import chunks, index, plan, versions
from jobs.chunks import PREDICTIONS_FOLDER, Chunk
from jobs.detect import Input, look, objects_of
from jobs.plan import Plan
from jobs.read import Source, read_chunk, read_names
from jobs.storage import open_store, open_uri
from jobs.store import DamagedError, ObjectInfo, Store
from jobs.versions import TABLES, Version

Item = TypeVar("Item")
Made = TypeVar("Made")

# Each holds a chunk, up to 128 MiB.
THREADS = 4
CHUNK_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A row whose image is wanted.

    Attributes:
        row: Its number in the table.
        image_id: Of the row.
        shard: Of the row.
        key: Of the row.
        path: Of the table's object that holds it.
        position: In that object.
    """

    row: int
    image_id: str
    shard: str
    key: str
    path: str
    position: int


@dataclass(frozen=True)
class Picture:
    """The bytes of an image, or why there are none."""

    row: int
    data: bytes | None
    error: str | None = None


Way: TypeAlias = Callable[[Sequence[Wanted]], Iterator[Picture]]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Where the images of a table are.

    Attributes:
        uri: As a person names it.
        ways: To find some of them, the best one first.
    """

    uri: str
    ways: Sequence[Way]


def open_images(uri: str, table: Store, endpoint_url: str | None) -> Images:
    """Look at where the images of a table are.

    Args:
        uri: The folder, prefix, shard or manifest that the table was made of, or a copy of it; or a packed
            set or a version of a data set, which hold their images.
        table: The table's folder.
        endpoint_url: See `storage.open_store`.

    Raises:
        InputError: There is nothing.
    """
    planned = plan.load(table)
    store = open_store(uri, endpoint_url)
    ways: list[Way]
    if planned is not None and store.uri in (planned.job.get("input"), planned.folder):
        ways = [partial(_by_plan, planned, _source(planned.folder, table, endpoint_url))]
    elif of_version := versions.find(uri, endpoint_url):
        version, named = of_version
        names = (named, *(name for name in TABLES if name != named))
        ways = [partial(_by_version, version, name, endpoint_url) for name in names]
    else:
        found = look(uri, "auto", endpoint_url)
        by = _by_object if found.store.uri == table.uri else _by_look
        ways = [partial(by, found, endpoint_url)]
    return Images(uri=uri, ways=ways)


def fetch(wanted: Sequence[Wanted], images: Images) -> Iterator[Picture]:
    """Yield a picture for each row that is wanted, in any order.

    Raises:
        StorageError: The store failed for good.
    """
    left = {one.row: one for one in wanted}
    without: dict[int, Picture] = {}
    for way in images.ways:
        for picture in way(tuple(left.values())):
            if picture.data is None:
                without.setdefault(picture.row, picture)
            elif left.pop(picture.row, None):
                yield picture
    for row in left:
        missing = Picture(row, None, f"missing: it is not among the images at {images.uri}")
        yield without.get(row, missing)


def _source(folder: str, lists: Store, endpoint_url: str | None) -> Source:
    return Source(
        store=open_store(folder, endpoint_url),
        lists=lists,
        endpoint_url=endpoint_url,
        image_column=None,
    )


def _by_plan(planned: Plan, source: Source, wanted: Sequence[Wanted]) -> Iterator[Picture]:
    by_chunk: defaultdict[str, dict[int, Wanted]] = defaultdict(dict)
    for one in wanted:
        name = one.path.removeprefix(f"{PREDICTIONS_FOLDER}/").removesuffix(".parquet")
        by_chunk[name][one.position] = one
    found = planned.chunks.filter(pc.is_in(planned.chunks["chunk_id"], pa.array(by_chunk)))
    calls = [(chunk, by_chunk[chunk.chunk_id], source) for chunk in chunks.from_table(found)]
    return chain.from_iterable(_in_threads(lambda call: _read(*call), calls))


def _by_version(
    version: Version, name: str, endpoint_url: str | None, wanted: Sequence[Wanted]
) -> Iterator[Picture]:
    found = version.table(name, sorted(one.image_id for one in wanted))
    return _by_look(found, endpoint_url, wanted)


def _by_look(found: Input, endpoint_url: str | None, wanted: Sequence[Wanted]) -> Iterator[Picture]:
    if found.format in ("images", "manifest"):

        def read_one(one: Wanted) -> Picture:
            if found.format == "manifest":
                return _read_object(one, *open_uri(one.key, endpoint_url))
            folder = f"{one.shard}/" if one.shard.strip("/") else one.shard
            return _read_object(one, found.store, f"{folder}{one.key}")

        return _in_threads(read_one, wanted)
    source = _source(found.store.uri, found.store, endpoint_url)
    by_id = {one.image_id: one for one in wanted}
    infos = objects_of(found.objects)
    shards = {one.shard for one in wanted}
    if found.format == "webdataset" or shards <= {info.path for info in infos}:
        infos = [info for info in infos if info.path in shards]
    in_shards = _in_threads(lambda info: _in_shard(info, found.format, by_id, source), infos)
    calls = list(chain.from_iterable(in_shards))
    return chain.from_iterable(_in_threads(lambda call: _read(*call, source), calls))


def _by_object(
    table: Input, endpoint_url: str | None, wanted: Sequence[Wanted]
) -> Iterator[Picture]:
    """Find images in the rows themselves."""
    paths = pa.array({one.path for one in wanted}, pa.string())
    near = table.objects.filter(pc.is_in(table.objects["path"], paths))
    return _by_look(replace(table, objects=near), endpoint_url, wanted)


def _in_shard(
    info: ObjectInfo, format_: str, by_id: dict[str, Wanted], source: Source
) -> list[tuple[Chunk, dict[int, Wanted]]]:
    """Return the chunks of a shard with what is wanted of them; nothing of one that is damaged."""
    try:
        if format_ == "webdataset":
            cut = index.index_tar(source.store, info, CHUNK_SIZE)
        else:
            cut = index.index_parquet(source.store, info, CHUNK_SIZE, None)
    except DamagedError:
        return []
    found = []
    for chunk in cut:
        ids = read_names(chunk, source)["image_id"].to_pylist()
        here = {position: by_id[name] for position, name in enumerate(ids) if name in by_id}
        if here and chunk.kind != "verdict":
            found.append((chunk, here))
    return found


def _read(chunk: Chunk, wanted: dict[int, Wanted], source: Source) -> list[Picture]:
    """Return images of a chunk by their positions among its rows."""
    if chunk.kind == "verdict":
        return [Picture(one.row, None, chunk.error) for one in wanted.values()]
    positions = sorted(wanted)
    keep = np.zeros(chunk.num_read, np.uint8)
    rows = np.flatnonzero(np.frombuffer(chunk.keep, np.uint8)) if chunk.keep else None
    keep[positions if rows is None else rows[positions]] = 1
    part = replace(chunk, keep=keep.tobytes(), num_images=len(positions))
    found = read_chunk(part, source).to_pylist()
    return [_picture(wanted[n], row) for n, row in zip(positions, found, strict=True)]


def _picture(wanted: Wanted, row: Mapping[str, Any]) -> Picture:
    data, error = row["data"], row["error"]
    if error is None and wanted.image_id != row["image_id"]:
        error = f"changed: {row['image_id']} is in its place"
    return Picture(wanted.row, None if error else data, error)


def _read_object(wanted: Wanted, store: Store, path: str) -> Picture:
    try:
        return Picture(wanted.row, store.read(path))
    except FileNotFoundError as error:
        return Picture(wanted.row, None, f"missing: {error}")
    except DamagedError as error:
        return Picture(wanted.row, None, f"corrupt: {error}")


def _in_threads(function: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
    """Yield results in order; each is made when there is room for it."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(items), THREADS):
            yield from pool.map(function, items[start : start + THREADS])
