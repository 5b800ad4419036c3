"""Sets to train on, packed or versions of a data set: which rows there are, and how they are read."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import documents, versions
from jobs.chunks import SHARDS_FOLDER
from jobs.detect import InputError, objects_of
from jobs.storage import open_store
from jobs.store import DamagedError, ObjectInfo, StorageError, Store
from jobs.write import FOOTER_THREADS, FOOTER_WINDOW, MANIFEST
from segmodel.schema import IMAGE, TRAINING

# What a row of a chunk has in memory: `image_id`, what `targets.to_sample` reads, and the file.
ROWS = pa.schema(
    [
        *(TRAINING.field(name) for name in ("image_id", "height", "width", "detections")),
        pa.field("data", IMAGE.field("bytes").type),
    ]
)
_COLUMNS = [*ROWS.names[:-1], "image.bytes"]


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A row group of a shard: what is read at once.

    Attributes:
        store: The packed set.
        info: The shard.
        group: Its number in the shard.
        num_rows: Rows that can be trained on.
        num_bytes: Bytes in the shard.
        skipped: Positions in the group of rows in error.
    """

    store: Store
    info: ObjectInfo
    group: int
    num_rows: int
    num_bytes: int
    skipped: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        """Name of the shard for a person."""
        return self.store.url(self.info.path)


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What there is to train on, or to evaluate with.

    Attributes:
        chunks: Row groups with at least one row that is ok.
        categories: Id and name of each, by id.
        num_rows: Rows that are ok.
        num_skipped: Rows in error.
        num_bytes: Of the row groups.
        digest: Changes whenever a shard does.
        weights: The share of each chunk's set that an epoch has; empty where all of them have all.
        notes: What a person should know.
    """

    chunks: tuple[RowGroup, ...]
    categories: tuple[tuple[int, str], ...]
    num_rows: int
    num_skipped: int
    num_bytes: int
    digest: str
    weights: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    uris: Sequence[str], endpoint_url: str | None, weights: Sequence[float] = ()
) -> TrainingSet:
    """Look at one or more sets; their rows are taken together.

    Args:
        uris: Outputs of `pack`, each a folder with `_manifest.json` and `shards/*.parquet`; data sets
            (their current versions), or versions of one.
        endpoint_url: See `storage.open_store`.
        weights: Of each set, more than 0 and at most 1; all 1 where empty.

    Raises:
        InputError: Nothing is there, it is no set to train on or not all of it, no row of it is ok, or the
            sets' categories contradict each other.
    """
    chunks: list[RowGroup] = []
    of_chunks: list[float] = []
    categories: dict[int, str] = {}
    digest = hashlib.sha256()
    data_sets: Counter[str] = Counter()
    for uri, weight in zip(uris, weights or [1.0] * len(uris), strict=True):
        found = _open_set(uri, endpoint_url)
        for number, name in found.categories:
            if categories.setdefault(number, name) != name:
                raise InputError(
                    f"category {number} is {categories[number]!r} in one set and {name!r} in "
                    f"{uri}: sets that are taken together need the same categories"
                )
        listed = [(i.path, i.size, i.etag) for i in found.infos]
        digest.update(json.dumps(listed).encode())
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            stores = [found.store] * len(found.infos)
            of_set = [g for groups in pool.map(_row_groups, stores, found.infos) for g in groups]
        _refuse_parts(found, of_set)
        data_sets[found.data_set] += 1
        chunks += of_set
        of_chunks += [weight] * len(of_set)
    digest.update(json.dumps(sorted(categories.items())).encode())
    weighted = [(c, w) for c, w in zip(chunks, of_chunks, strict=True) if c.num_rows]
    kept = tuple(chunk for chunk, _ in weighted)
    if not kept:
        raise InputError(f"no row at {', '.join(uris)} is ok: there is nothing to train on")
    return TrainingSet(
        chunks=kept,
        categories=tuple(sorted(categories.items())),
        num_rows=sum(chunk.num_rows for chunk in kept),
        num_skipped=sum(len(chunk.skipped) for chunk in chunks),
        num_bytes=sum(chunk.num_bytes for chunk in kept),
        digest=digest.hexdigest(),
        weights=tuple(weight for _, weight in weighted) if weights else (),
        notes=tuple(_of_images_that_come_again(kept, data_sets)),
    )


def _of_images_that_come_again(
    chunks: Sequence[RowGroup], data_sets: Mapping[str, int]
) -> Iterator[str]:
    """Yield what to say of sets that share images; versions of one data set do, even in other objects."""
    rows = {(chunk.url, chunk.group): chunk.num_rows for chunk in chunks}
    times = Counter((chunk.url, chunk.group) for chunk in chunks)
    again = sum(number for place, number in rows.items() if times[place] > 1)
    several = [uri for uri, number in data_sets.items() if uri and number > 1]
    if again or several:
        share = " and ".join(f"versions of {uri}" for uri in several) or "sets"
        yield (
            f"{share} share images, {again} at least, and those come once for each of them in an epoch: a "
            "version holds what it kept of those before it, so one of them is enough"
        )


def read_chunk(chunk: RowGroup) -> pa.Table:
    """Read the rows of a chunk that are ok, with page checksums verified.

    Returns:
        A table of `ROWS` with `chunk.num_rows` rows, in the shard's order.

    Raises:
        DamagedError: The shard is damaged.
        StorageError: It changed or is gone, or the store failed for good.
    """
    # The first read fetches all of the group, the one of the footer before it what is behind.
    file = _open(chunk.store, chunk.info, chunk.num_bytes)
    try:
        table = file.read_row_group(chunk.group, columns=_COLUMNS, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        raise DamagedError(
            f"row group {chunk.group} of {chunk.url} is damaged: {' '.join(str(error).split())}: "
            "pack this set again"
        ) from error
    data = table["image"].combine_chunks().field("bytes")
    table = pa.table([*(table[name] for name in ROWS.names[:-1]), data], schema=ROWS)
    if chunk.skipped:
        skipped = set(chunk.skipped)
        table = table.take([row for row in range(table.num_rows) if row not in skipped])
    assert table.num_rows == chunk.num_rows, f"{chunk} gave {table.num_rows} rows"
    return table


def rows(chunks: Sequence[RowGroup], part: int = 0, num_parts: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the rows of chunks, or a part of them, each a dictionary with the columns of `ROWS`.

    The next chunk is read while the rows of one are used.

    Args:
        chunks: Of a `TrainingSet`.
        part: The number of the part. Parts follow one another, and are as long, give or take a row, however
            the rows are grouped: a group is read for each part that has some of it.
        num_parts: How many there are.
    """
    with ThreadPoolExecutor(1) as pool:
        pieces = _pieces(chunks, part, num_parts)
        reads = (pool.submit(_read_piece, *piece) for piece in pieces)
        ahead = next(reads, None)
        while ahead is not None:
            table, ahead = ahead.result(), next(reads, None)
            for batch in table.to_batches(max_chunksize=1):
                yield batch.to_pylist()[0]


def _pieces(
    chunks: Sequence[RowGroup], part: int, num_parts: int
) -> Iterator[tuple[RowGroup, int, int]]:
    """Yield the chunks of a part, each with the first of its rows that are the part's and their number."""
    total = sum(chunk.num_rows for chunk in chunks)
    start, stop = total * part // num_parts, total * (part + 1) // num_parts
    for chunk in chunks:
        first, behind = max(start, 0), min(stop, chunk.num_rows)
        if first < behind:
            yield chunk, first, behind - first
        start, stop = start - chunk.num_rows, stop - chunk.num_rows


def _read_piece(chunk: RowGroup, first: int, num_rows: int) -> pa.Table:
    return read_chunk(chunk).slice(first, num_rows)


@dataclass(frozen=True, kw_only=True)
class _Set:
    """One set: where it is, its shards and categories, and how many shards and rows it says it has.

    Of a version `data_set` says which data set it is of.
    """

    store: Store
    infos: list[ObjectInfo]
    categories: list[tuple[int, str]]
    expected: tuple[Any, Any]
    data_set: str = ""


def _open_set(uri: str, endpoint_url: str | None) -> _Set:
    if (found := versions.find(uri, endpoint_url)) is not None:
        version, name = found
        infos = objects_of(version.table(name).objects)
        total = version.manifest["counts"]["all"][name]
        return _Set(
            store=version.store,
            infos=infos,
            categories=_categories(version.manifest),
            expected=(total["objects"], total["rows"]),
            data_set=version.store.uri if name == versions.ACCEPTED else "",
        )
    store = open_store(uri, endpoint_url)
    infos = _shards(store)
    manifest = _manifest(store)
    return _Set(
        store=store,
        infos=infos,
        categories=_categories(manifest),
        expected=(manifest.get("shards"), manifest.get("counts", {}).get("images")),
    )


def _shards(store: Store) -> list[ObjectInfo]:
    infos = [i for i in store.list_objects(SHARDS_FOLDER) if i.path.endswith(".parquet")]
    if infos:
        return infos
    if next(store.list_objects(), None) is None:
        raise InputError(f"there is nothing at {store.uri}: check the path and --endpoint-url")
    raise InputError(
        f"{store.uri} is no packed set, it has no {SHARDS_FOLDER}/*.parquet: {_ADVICE}"
    )


_ADVICE = "`segjobs pack --images URI --annotations COCO.json --output URI` makes one"


def _manifest(store: Store) -> dict[str, Any]:
    try:
        manifest = documents.read(store, MANIFEST, made_by_us=False)
    except FileNotFoundError:
        raise InputError(
            f"{store.uri} has no {MANIFEST}: it is no packed set, or its packing was not finished"
        ) from None
    if not manifest.get("categories"):
        raise InputError(f"{store.uri} was packed without annotations, no categories: {_ADVICE}")
    return manifest


def _categories(manifest: Mapping[str, Any]) -> list[tuple[int, str]]:
    return [(category["id"], category["name"]) for category in manifest["categories"]]


def _refuse_parts(found: _Set, groups: Sequence[RowGroup]) -> None:
    """Refuse a set of which shards are missing, or to which others were added."""
    rows = sum(group.num_rows + len(group.skipped) for group in groups)
    expected = found.expected
    if (len(found.infos), rows) != expected:
        raise InputError(
            f"{found.store.uri} holds {len(found.infos)} shards with {rows} rows, and was packed as "
            f"{expected[0]} with {expected[1]}: copy all of it again, or pack it again"
        )


def _open(store: Store, info: ObjectInfo, window: int) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            store.open(info, window), page_checksum_verification=True, pre_buffer=False
        )
    except pa.ArrowException as error:
        raise StorageError(f"{store.url(info.path)} is no Parquet file: {error}") from error


def _row_groups(store: Store, info: ObjectInfo) -> list[RowGroup]:
    file = _open(store, info, FOOTER_WINDOW)
    schema = file.schema_arrow
    missing = [name for name in (*ROWS.names[:-1], "status") if name not in schema.names]
    if missing or "image" not in schema.names or schema.field("image").type != IMAGE:
        lacks = ", ".join(missing) or "the bytes of images"
        raise InputError(
            f"{store.url(info.path)} lacks {lacks}: it is no shard to train on: {_ADVICE}"
        )
    groups = []
    for group in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(group)
        columns = [found.column(number) for number in range(found.num_columns)]
        skipped = _skipped(file, group, columns)
        groups.append(
            RowGroup(
                store=store,
                info=info,
                group=group,
                num_rows=found.num_rows - len(skipped),
                num_bytes=sum(column.total_compressed_size for column in columns),
                skipped=skipped,
            )
        )
    return groups


def _skipped(file: pq.ParquetFile, group: int, columns: Sequence[Any]) -> tuple[int, ...]:
    """Return the positions of rows in error; the column is read only where its statistics know of one."""
    (status,) = (column for column in columns if column.path_in_schema == "status")
    known = status.statistics
    if known is not None and known.has_min_max and known.min == known.max == "ok":
        return ()
    values = file.read_row_group(group, columns=["status"], use_threads=False)["status"]
    return tuple(n for n, value in enumerate(values.to_pylist()) if value != "ok")
