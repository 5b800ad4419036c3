"""What is packed with the images of a plan: their records, frozen beside it, and the plan cut down to them.

Images without a record leave the plan before it is frozen, so that it keeps its promise: every image
of the plan has one row. The records lie in `_plan/<plan>/records-*.parquet`, a row group for each
chunk; a task reads those of its chunk, and a later run needs no JSON and matches nothing again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jobs import chunks, documents
from jobs.detect import FOOTER_WINDOW
from jobs.plan import PLAN_FOLDER, Plan, PlanError, put_table
from jobs.store import ObjectInfo, StorageError, Store
from segmodel.schema import PREDICTIONS

# Chunks in one list of records: a reader's look at the footer stays cheap.
CHUNKS_PER_LIST = 256

# Where a row of another table is.
PLACES = pa.schema(
    [("path", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("row", pa.int64())]
)

Bool = npt.NDArray[np.bool_]


class PackError(ValueError):
    """Images and what is to be packed with them do not fit; the message names both."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Which images of a plan have a record, and the records.

    Attributes:
        keeps: For each chunk of the plan, (images,) bool: whether an image has a record.
        records: For each chunk with any, the records of its images, in their order: a table of
            `PREDICTIONS`, or of `PLACES` where they lie in a table of their own.
        categories: `{"id", "name"}` of each, by id.
        notes: What a person should know.
    """

    keeps: Sequence[Bool]
    records: Iterator[pa.Table]
    categories: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Records:
    """The frozen records of a plan. Can be pickled; holds no credentials.

    Attributes:
        output: The job's output.
        plan_id: Of the plan.
        table: The folder that `PLACES` are relative to; None where the lists hold the rows.
    """

    output: Store
    plan_id: str
    table: Store | None

    def rows(self, chunk_id: str) -> list[dict[str, Any]]:
        """Return the records of a chunk's images, in their order: rows of `PREDICTIONS`.

        Raises:
            StorageError: They cannot be read, or their table changed since it was planned.
        """
        number, group = divmod(int(chunk_id), CHUNKS_PER_LIST)
        path = _list_path(self.plan_id, number)
        info = self.output.info(path)
        if info is None:
            raise StorageError(
                f"{self.output.url(path)} is gone: the plan is damaged, start a new output"
            )
        file = pq.ParquetFile(
            self.output.open(info, FOOTER_WINDOW), page_checksum_verification=True
        )
        rows: list[dict[str, Any]] = file.read_row_group(group).to_pylist()
        return rows if self.table is None else _fetch(self.table, rows)


def freeze(output: Store, planned: Plan, matched: Matched) -> Plan:
    """Write the records of a plan's images; return the plan of those images alone.

    Raises:
        PlanError: No image has a record.
    """
    kept = [
        replace(
            chunk,
            num_images=int(keep.sum()),
            num_bytes=round(chunk.num_bytes * keep.mean()),
            keep=b"" if keep.all() else keep.tobytes(),
        )
        for chunk, keep in zip(chunks.from_table(planned.chunks), matched.keeps, strict=True)
        if keep.any()
    ]
    if not kept:
        raise PlanError(f"none of the {planned.num_images} images at {planned.folder} has a record")
    _put_lists(output, planned.plan_id, matched.records)
    num_images = sum(chunk.num_images for chunk in kept)
    left_out = planned.num_images - num_images
    head = {"categories": matched.categories, "left_out": left_out}
    output.put(_head_path(planned.plan_id), documents.dump(head))
    note = (f"{left_out} images without a record are left out",) if left_out else ()
    return replace(
        planned,
        num_images=num_images,
        num_bytes=sum(chunk.num_bytes for chunk in kept),
        notes=(*planned.notes, *matched.notes, *note),
        chunks=chunks.numbered(chunks.to_table(kept), None),
    )


def load_head(output: Store, planned: Plan) -> Mapping[str, Any]:
    """Return the `categories` of frozen records, and how many images were `left_out`."""
    return documents.read(output, _head_path(planned.plan_id))


def some_of(names: Sequence[str]) -> str:
    """Return the first names of many."""
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _put_lists(output: Store, plan_id: str, records: Iterator[pa.Table]) -> None:
    number = 0
    while some := list(islice(records, CHUNKS_PER_LIST)):
        sizes = [of_chunk.num_rows for of_chunk in some]
        put_table(output, _list_path(plan_id, number), pa.concat_tables(some), sizes)
        number += 1


def _fetch(table: Store, places: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows at `places`. Each object is opened once; the row groups in use are read whole."""
    by_object: dict[ObjectInfo, dict[int, int]] = {}
    for number, place in enumerate(places):
        info = ObjectInfo(place["path"], place["size"], place["etag"])
        by_object.setdefault(info, {})[place["row"]] = number
    rows: list[dict[str, Any]] = [{}] * len(places)
    for info, wanted in by_object.items():
        file = pq.ParquetFile(table.open(info, FOOTER_WINDOW), page_checksum_verification=True)
        passed = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            here = [row for row in wanted if passed <= row < passed + size]
            if here:
                found = file.read_row_group(group, columns=PREDICTIONS.names)
                found = found.take([row - passed for row in here]).select(PREDICTIONS.names)
                for row, values in zip(here, found.cast(PREDICTIONS).to_pylist(), strict=True):
                    rows[wanted[row]] = values
            passed += size
    assert all(rows)
    return rows


def _list_path(plan_id: str, number: int) -> str:
    return f"{PLAN_FOLDER}/{plan_id}/records-{number:05d}.parquet"


def _head_path(plan_id: str) -> str:
    return f"{PLAN_FOLDER}/{plan_id}/records.json"
