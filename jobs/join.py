"""A table of predictions or labels joined with a plan's images, by `image_id`.

The driver holds 64 bits of each id and where its row is, some 30 bytes for each image; detections
are read by the task that packs them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import chunks, tables
from jobs.chunks import Chunk
from jobs.detect import FOOTER_WINDOW, Input, InputError, objects_of
from jobs.index import id_digest
from jobs.plan import PLAN, Plan
from jobs.read import Source, read_names
from jobs.records import PLACES, Matched, PackError, some_of
from jobs.store import ObjectInfo, StorageError, Store
from jobs.tasks import in_order
from jobs.versions import look_at_table
from jobs.write import SUCCESS
from segmodel.schema import PREDICTIONS

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Who the rows of an object, or of all objects, are.

    Attributes:
        digests: (rows,) uint64, of their image ids.
        categories: Pairs of `category_id` and `category` in their detections.
    """

    digests: UInt64
    categories: frozenset[tuple[int, str]]


def look_at(uri: str, endpoint_url: str | None) -> Input:
    """List a table: the output of `predict` or `pack`, any folder of Parquet in the one schema, or a version.

    Raises:
        InputError: There is none, or the job that writes it is not finished.
    """
    found = look_at_table(uri, endpoint_url)
    store = found.store
    if store.info(PLAN) is not None and store.info(SUCCESS) is None:
        raise InputError(
            f"the table at {uri} is not finished: run its job again with the same --output first"
        )
    return found


def match(table: Input, planned: Plan, source: Source) -> Matched:
    """Find the row of each image, in Ray tasks that read ids on both sides.

    Raises:
        PackError: A row has no image, two rows have the same, or categories contradict each other.
    """
    objects = objects_of(table.objects)
    parts = [rows for (rows,) in in_order(_rows_of, ((table.store, info) for info in objects))]
    starts = np.cumsum([0, *(len(part.digests) for part in parts)])
    digests = np.concatenate([part.digests for part in parts])
    categories = _categories(frozenset().union(*(part.categories for part in parts)), table)
    del parts
    order = np.argsort(digests, kind="stable")
    digests = digests[order]
    repeated = order[1:][digests[1:] == digests[:-1]]
    if len(repeated):
        names = some_of(_image_ids(table.store, objects, starts, repeated[:4]))
        raise PackError(
            f"{len(repeated)} rows of {table.store.uri} are of an image that has another row: {names}"
        )
    keeps: list[Bool] = []
    rows: list[Int64] = []
    for images in _image_digests(planned, source):
        at = np.searchsorted(digests, images).clip(max=len(digests) - 1)
        keep = digests[at] == images if len(digests) else np.zeros(len(images), np.bool_)
        keeps.append(keep)
        rows.append(order[at[keep]] if len(digests) else np.zeros(0, np.int64))
    _refuse_unused(table, objects, starts, np.concatenate(rows), planned)
    return Matched(
        keeps=keeps,
        records=(_places(objects, starts, some) for some in rows if len(some)),
        categories=categories,
    )


def _rows_of(store: Store, info: ObjectInfo) -> list[_Rows]:
    try:
        file = pq.ParquetFile(store.open(info, FOOTER_WINDOW), page_checksum_verification=True)
        if absent := [name for name in PREDICTIONS.names if name not in file.schema_arrow.names]:
            raise PackError(
                f"{store.url(info.path)} is not in the one schema: it has no {', '.join(absent)}"
            )
        leaves = (file.schema.column(n).path for n in range(len(file.schema)))
        wanted = [
            path
            for path in leaves
            if path.startswith("detections.") and path.endswith((".category_id", ".category"))
        ]
        read = file.read(columns=["image_id", *wanted])
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        raise PackError(f"{store.url(info.path)} cannot be read: {error}") from error
    found = pa.table({"of": pc.list_flatten(read["detections"])}).flatten()
    pairs = found.group_by(found.column_names).aggregate([]).to_pylist()
    return [
        _Rows(
            digests=np.array([id_digest(name) for name in read["image_id"].to_pylist()], np.uint64),
            categories=frozenset((p["of.category_id"], p["of.category"]) for p in pairs),
        )
    ]


def _categories(pairs: frozenset[tuple[int, str]], table: Input) -> list[dict[str, Any]]:
    names = {one["id"]: one["name"] for one in tables.categories(table)}
    for number, name in pairs:
        if names.setdefault(number, name) != name:
            raise PackError(
                f"category {number} is {names[number]!r} and {name!r} in {table.store.uri}"
            )
    return [{"id": number, "name": names[number]} for number in sorted(names)]


def _image_digests(planned: Plan, source: Source) -> Iterator[UInt64]:
    calls = ((chunk, source) for chunk in chunks.from_table(planned.chunks))
    for (digests,) in in_order(_digests_of, calls):
        yield digests


def _digests_of(chunk: Chunk, source: Source) -> list[UInt64]:
    names = read_names(chunk, source)["image_id"].to_pylist()
    return [np.array([id_digest(name) for name in names], np.uint64)]


def _refuse_unused(
    table: Input, objects: Sequence[ObjectInfo], starts: Int64, used: Int64, planned: Plan
) -> None:
    unused = np.ones(starts[-1], np.bool_)
    unused[used] = False
    rows = np.flatnonzero(unused)
    if len(rows):
        names = some_of(_image_ids(table.store, objects, starts, rows[:4]))
        raise PackError(
            f"{len(rows)} of the {starts[-1]} rows of {table.store.uri} have no image among the "
            f"{planned.num_images} at {planned.folder}: {names}"
        )


def _places(objects: Sequence[ObjectInfo], starts: Int64, rows: Int64) -> pa.Table:
    """Return where rows, numbered through all objects, are: a table of `PLACES`."""
    numbers = np.searchsorted(starts, rows, side="right") - 1
    infos = [objects[number] for number in numbers]
    columns = [
        [info.path for info in infos],
        [info.size for info in infos],
        [info.etag for info in infos],
        rows - starts[numbers],
    ]
    return pa.table(columns, schema=PLACES)


def _image_ids(
    store: Store, objects: Sequence[ObjectInfo], starts: Int64, rows: Int64
) -> list[str]:
    """Return the ids of a few rows, for a message."""
    found = []
    for place in _places(objects, starts, rows).to_pylist():
        file = pq.ParquetFile(
            store.open(ObjectInfo(place["path"], place["size"], place["etag"]), FOOTER_WINDOW)
        )
        found.append(file.read(columns=["image_id"])["image_id"][place["row"]].as_py())
    return found
