"""The versions of a data set: what they hold, which is current, and how one is published.

`versions/<n>/manifest.json` is put last, by one conditional put, and makes the version; before that nobody
sees it. Numbers have no gaps, so whoever is second to publish finds the number taken and starts anew from what
is there. A version's rows lie in objects of its own folder and of its parents'; `objects.parquet` lists them.

A version is current from when it is published, unless it is a candidate; `promotions/<k>.json` makes any
version current until the next one is published.
"""

import io
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import documents
from jobs.detect import OBJECTS, Input, InputError, look, object_table
from jobs.storage import open_store
from jobs.store import ObjectInfo, StorageError, Store

VERSIONS, PROMOTIONS, MANIFEST = "versions", "promotions", "manifest.json"
ACCEPTED, REVIEW, REJECTED, CONTENTS = "accepted", "review", "rejected", "contents"
# Tables of rows; `contents` has the digest of each image beside them.
TABLES = (ACCEPTED, REVIEW, REJECTED)
PUBLISHED, CANDIDATE = "published", "candidate"
KIND = "segjobs data set version"

# The objects of a version: which table they are of, and what they hold.
LISTING = pa.schema(
    [
        ("table", pa.string()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("rows", pa.int64()),
        ("detections", pa.int64()),
        ("first", pa.string()),
        ("last", pa.string()),
    ]
)
READ_THREADS = 16

_PLACE = re.compile(rf"(.+)/{VERSIONS}/(\d+)(?:/({'|'.join(TABLES)}))?")


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version that was published.

    Attributes:
        store: The data set.
        number: Of the version, from 1 on.
        manifest: What `publish` was given.
    """

    store: Store
    number: int
    manifest: Mapping[str, Any]

    @cached_property
    def objects(self) -> pa.Table:
        """All objects of all tables: a table of `LISTING`."""
        return read_table(self.store, self.manifest["objects"])

    @property
    def inputs(self) -> pa.Table:
        """The objects of the input that are labelled: a table of `detect.OBJECTS`."""
        return read_table(self.store, self.manifest["inputs"])

    @property
    def categories(self) -> list[dict[str, Any]]:
        """`{"id", "name"}` of each, by id."""
        return list(self.manifest["categories"])

    @property
    def is_candidate(self) -> bool:
        """Say whether it was published as a candidate only."""
        return bool(self.manifest["status"] == CANDIDATE)

    def table(self, name: str, ids: Sequence[str] | None = None) -> Input:
        """Return one of its tables as an input.

        Args:
            name: Of the table.
            ids: Of images, sorted: only the objects that may have rows of these.
        """
        listing = self.objects.filter(pa.compute.equal(self.objects["table"], name))
        if ids is not None:
            near = [may_hold(row, ids) for row in listing.select(["first", "last"]).to_pylist()]
            listing = listing.filter(pa.array(near, pa.bool_()))
        return Input(
            store=self.store,
            format="parquet",
            why=f"it is version {self.number} of a data set",
            objects=listing.select(OBJECTS.names),
            notes=(),
            place=folder(self.number) if name == ACCEPTED else f"{folder(self.number)}/{name}",
            categories=tuple(self.categories),
        )


def latest(dataset: Store) -> int:
    """Return the highest number of a version, candidates too; 0 where there is none.

    There are no gaps, so a few looks are enough: a listing would have every object of every version.
    """
    high = 1
    while _is_there(dataset, high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _is_there(dataset, middle) else (low, middle)
    return low


def load(dataset: Store, number: int) -> Version:
    """Return a version.

    Raises:
        InputError: There is none of this number.
    """
    try:
        manifest = documents.read(dataset, manifest_path(number))
    except FileNotFoundError:
        there = latest(dataset)
        raise InputError(
            f"{dataset.uri} has no version {number}: "
            + (f"there are 1 to {there}" if there else "none was published yet")
        ) from None
    return Version(store=dataset, number=number, manifest=manifest)


def load_all(dataset: Store) -> list[Version]:
    """Return all versions, oldest first."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(lambda n: load(dataset, n), range(1, latest(dataset) + 1)))


def current(dataset: Store, most: int | None = None) -> Version | None:
    """Return the version that training reads and the next one starts from; None where there is none.

    Args:
        dataset: The data set.
        most: The highest number, where it is known.
    """
    most = latest(dataset) if most is None else most
    chosen, known = _promoted(dataset)
    for number in range(most, known, -1):
        found = load(dataset, number)
        if not found.is_candidate:
            return found
    return load(dataset, chosen) if chosen else None


def promote(dataset: Store, number: int, facts: Mapping[str, Any]) -> None:
    """Make a version current, until the next one is published.

    Args:
        dataset: The data set.
        number: Of the version.
        facts: More for the record: when, by which run. They tell this call from any other.

    Raises:
        InputError: There is no such version.
        StorageError: Another version was published or promoted in the same moment.
    """
    load(dataset, number)
    record = {**facts, "version": number, "latest": latest(dataset)}
    following = len(list(dataset.list_objects(PROMOTIONS))) + 1
    done = dataset.put_if_absent(_promotion_path(following), documents.dump(record))
    now = current(dataset)
    if not done or now is None or now.number != number:
        raise StorageError(
            f"version {number} of {dataset.uri} is not current: another one was published or promoted in the "
            "same moment. Look at --list, and promote it again if it still is to be"
        )


def left_behind(dataset: Store, number: int) -> list[Version]:
    """Return the published versions that a version does not build upon: a promotion went back behind them."""
    if next(iter(dataset.list_objects(PROMOTIONS)), None) is None:
        return []
    made = {one.number: one for one in load_all(dataset)}
    built_upon: set[int] = set()
    step: int | None = number
    while step is not None:
        built_upon.add(step)
        step = made[step].manifest.get("parent")
    return [one for n, one in made.items() if n not in built_upon and not one.is_candidate]


def publish(dataset: Store, number: int, manifest: Mapping[str, Any]) -> bool:
    """Make a version of objects that are all there; return whether the number was still free.

    Args:
        dataset: The data set.
        number: One more than `latest` was when what is published was begun.
        manifest: `objects`, `inputs` (paths of tables), `status`, `categories`, `run_id`, and what people want
            to know.
    """
    return dataset.put_if_absent(
        manifest_path(number), documents.dump({"kind": KIND, "version": number, **manifest})
    )


def find(uri: str, endpoint_url: str | None) -> tuple[Version, str] | None:
    """Return the version, and the name of its table, that a URI names; None where it names something else.

    Args:
        uri: A data set (its current version), one of its versions, or a table of that
            (`.../versions/3/review`); accepted rows where it names no table.
        endpoint_url: See `storage.open_store`.
    """
    place = open_store(uri, endpoint_url)
    if found := _PLACE.fullmatch(place.uri.rstrip("/")):
        dataset, number = open_store(found[1], endpoint_url), int(found[2])
        if dataset.info(manifest_path(number)) is None:
            return None
        return load(dataset, number), found[3] or ACCEPTED
    if place.info(manifest_path(1)) is None:
        return None
    version = current(place)
    if version is None:
        raise InputError(
            f"{place.uri} has only candidates: `segjobs label --dataset {place.uri} --promote N` makes one "
            "current, or name one by /versions/N"
        )
    return version, ACCEPTED


def look_at_table(uri: str, endpoint_url: str | None) -> Input:
    """List the Parquet objects of a table: of a version of a data set, or whatever lies at a URI.

    Raises:
        InputError: There is nothing.
    """
    found = find(uri, endpoint_url)
    if found is None:
        return look(uri, "parquet", endpoint_url)
    version, name = found
    table = version.table(name)
    if not table.objects.num_rows:
        raise InputError(f"version {version.number} of {version.store.uri} has no {name} rows")
    return table


def urls(uri: str, endpoint_url: str | None = None) -> list[str]:
    """Return the Parquet objects of a table, for readers that know no versions: `datasets`, DuckDB, pandas.

    Args:
        uri: A data set, one of its versions, or a table of that; see `find`.
        endpoint_url: See `storage.open_store`.

    Raises:
        InputError: There are none.
    """
    table = look_at_table(uri, endpoint_url)
    return [table.store.url(path) for path in table.objects["path"].to_pylist()]


def put_table(dataset: Store, path: str, table: pa.Table, *, once: bool = False) -> None:
    """Write a list beside the rows of a version.

    Args:
        dataset: The data set.
        path: In it.
        table: The list.
        once: Leave what is there: a run that is the same may have published it already, with its etag.
    """
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    put = dataset.put_if_absent if once else dataset.put
    put(path, sink.getvalue())


def read_table(dataset: Store, path: str) -> pa.Table:
    """Read what `put_table` wrote.

    Raises:
        DamagedError: It is not what was written.
    """
    data = io.BytesIO(dataset.read(path))
    try:
        return pq.read_table(data, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise dataset.damaged(path, error) from error


def listing(
    table: str, infos: Sequence[ObjectInfo], facts: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """Return a table of `LISTING` of objects; `facts` are their `rows`, `detections`, `first` and `last`."""
    objects = object_table(infos)
    columns = {name: [one[name] for one in facts] for name in LISTING.names[4:]}
    of = {"table": [table] * len(infos), **columns}
    arrays = [
        objects[n].cast(kind) if n in objects.column_names else pa.array(of[n], kind)
        for n, kind in zip(LISTING.names, LISTING.types, strict=True)
    ]
    return pa.table(arrays, schema=LISTING)


def may_hold(row: Mapping[str, Any], ids: Sequence[str]) -> bool:
    """Say whether an object may have rows of some images.

    Args:
        row: Of a listing.
        ids: Of the images, sorted.
    """
    place = bisect_left(ids, row["first"])
    return place < len(ids) and ids[place] <= row["last"]


def folder(number: int) -> str:
    """Return where a version lies, relative to the data set."""
    return f"{VERSIONS}/{number}"


def manifest_path(number: int) -> str:
    """Return where a version's manifest lies, relative to the data set."""
    return f"{folder(number)}/{MANIFEST}"


def _is_there(dataset: Store, number: int) -> bool:
    return dataset.info(manifest_path(number)) is not None


def _promotion_path(number: int) -> str:
    return f"{PROMOTIONS}/{number:08d}.json"


def _promoted(dataset: Store) -> tuple[int, int]:
    """Return the version that was promoted last and the highest number there was then; 0 and 0 without any."""
    paths = [info.path for info in dataset.list_objects(PROMOTIONS)]
    if not paths:
        return 0, 0
    record = documents.read(dataset, max(paths))
    return record["version"], record["latest"]
