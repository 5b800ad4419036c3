"""Truth to compare with: a COCO instances file, or a packed set that is read as it is needed."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.detect import InputError
from jobs.pairing import BY_FILE_NAME, BY_ID, Way
from jobs.storage import open_uri
from jobs.store import Store
from jobs.tables import RowGroup, Tables, open_tables, read
from segmodel import coco
from segmodel.schema import SEGMENTATION

Int64: TypeAlias = npt.NDArray[np.int64]

# As in `schema.PREDICTIONS`, but with the numbers of a JSON file as they are: rounded to float32,
# an area may leave its range and a box pass another IoU threshold than in pycocotools. These tables
# live in memory only.
_EXACT = pa.schema(
    [
        ("image_id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("status", pa.string()),
        (
            "detections",
            pa.list_(
                pa.struct(
                    [
                        ("category_id", pa.int64()),
                        ("category", pa.string()),
                        ("score", pa.float64()),
                        ("bbox", pa.list_(pa.float64())),
                        ("area", pa.float64()),
                        ("iscrowd", pa.int8()),
                        ("segmentation", SEGMENTATION),
                    ]
                )
            ),
        ),
    ]
)
_ROWS_AT_ONCE = 256  # as dictionaries


class Rows(Protocol):
    """Rows by their numbers; can be sent to a task."""

    def take(self, places: Int64) -> pa.Table:
        """Return `tables.COLUMNS` of some rows.

        Args:
            places: Their numbers, ascending.
        """


@dataclass(frozen=True)
class HeldRows:
    """All rows, in memory."""

    table: pa.Table

    def take(self, places: Int64) -> pa.Table:
        """Return some rows."""
        return self.table.take(places)


@dataclass(frozen=True)
class StoredRows:
    """Rows that stay in their store; each row group that is needed is read once, whole, for a call."""

    store: Store
    groups: tuple[RowGroup, ...]

    def take(self, places: Int64) -> pa.Table:
        """Return some rows."""
        starts = np.cumsum([0, *(group.num_rows for group in self.groups)])
        numbers = np.searchsorted(starts, places, side="right") - 1
        return pa.concat_tables(
            read(self.store, self.groups[n]).take(places[numbers == n] - starts[n])
            for n in np.unique(numbers).tolist()
        )


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Images with their annotations, by number.

    Attributes:
        rows: The annotations.
        names: Of each image, for `ways`.
        ways: How predictions find theirs.
        image_order: See `CocoMatches.summary`; None where no COCO ids are known.
        facts: What it is, for JSON.
    """

    rows: Rows
    names: Sequence[str]
    ways: tuple[Way, ...]
    image_order: Mapping[str, int] | None
    facts: Mapping[str, Any]


def open_truth(uri: str, endpoint_url: str | None) -> Truth:
    """Open a COCO instances file, which is read whole, or a packed set, of which ids are read.

    Raises:
        InputError: There is nothing that can be used, or an image comes twice.
        ValueError: A record of the file is unusable; the message names it.
    """
    store, name = open_uri(uri, endpoint_url)
    if name and not name.endswith(".parquet") and store.info(name) is not None:
        return _of_file(store, name)
    return _of_tables(open_tables(uri, endpoint_url))


def _of_file(store: Store, name: str) -> Truth:
    data = store.read(name)
    try:
        file = json.loads(data)
    except ValueError as error:
        raise InputError(f"{store.url(name)} is no JSON: {error}") from error
    if not isinstance(file, Mapping):
        raise InputError(f"{store.url(name)} is no COCO instances file: it is no JSON object")
    ids = coco.image_ids(file)
    numbers = {image["id"]: image["file_name"].removeprefix("./") for image in file["images"]}
    return Truth(
        rows=HeldRows(_held(file)),
        names=[numbers[number] for number in ids.values()],
        ways=BY_FILE_NAME,
        image_order=ids,
        facts={
            "uri": store.url(name),
            "kind": "coco",
            "images": len(ids),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    )


def _held(file: Mapping[str, Any]) -> pa.Table:
    batches: list[pa.RecordBatch] = []
    some: list[dict[str, Any]] = []
    for row in coco.rows(file):
        some.append(row)
        if len(some) == _ROWS_AT_ONCE:
            batches.append(pa.RecordBatch.from_pylist(some, _EXACT))
            some = []
    batches.append(pa.RecordBatch.from_pylist(some, _EXACT))
    return pa.Table.from_batches(batches)


def _of_tables(tables: Tables) -> Truth:
    names = tables.names["image_id"].to_pylist()
    if len(set(names)) < len(names):
        twice = next(name for name, number in Counter(names).items() if number > 1)
        raise InputError(f"image {twice!r} comes twice in {tables.url}")
    return Truth(
        rows=StoredRows(tables.store, tables.groups),
        names=names,
        ways=BY_ID,
        image_order=None,
        facts={
            "uri": tables.url,
            "kind": "table",
            "images": len(names),
            "listing_sha256": tables.listed.digest(),
        },
    )
