"""What lies at the input: which objects, and how they are to be read."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.storage import open_store, split_uri
from jobs.store import ObjectInfo, StorageError, Store
from jobs.tar import IMAGE_SUFFIXES

Format = Literal["auto", "webdataset", "parquet", "images", "manifest"]

OBJECTS = pa.schema([("path", pa.string()), ("size", pa.int64()), ("etag", pa.string())])

# A listing becomes Arrow in batches of so many: millions of objects cost about 100 bytes each.
LISTING_BATCH = 65_536
FOOTER_WINDOW = 2**20

_SUFFIXES: dict[str, tuple[str, ...]] = {
    # Compressed ones cannot be read: each gets a row that says so, and is not passed over in silence.
    "webdataset": (
        *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    ),
    "parquet": (".parquet",),
    "manifest": (".csv", ".jsonl"),
    "images": tuple(sorted(IMAGE_SUFFIXES)),
}


class InputError(ValueError):
    """The input cannot be used as it is; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input that was listed.

    Attributes:
        store: Its folder.
        format: How it is read; never `auto`.
        why: Why so.
        objects: Its shards, manifests or images: a table of `OBJECTS`, sorted by path.
        notes: What a person should know.
        place: Of the store, where a person names it by that and objects lie elsewhere.
        categories: `{"id", "name"}` of each, where a version says which there are, used or not.
    """

    store: Store
    format: str
    why: str
    objects: pa.Table
    notes: tuple[str, ...]
    place: str = ""
    categories: tuple[Mapping[str, Any], ...] = ()

    def digest(self) -> str:
        """Return a digest over paths, sizes and etags."""
        digest = hashlib.sha256()
        for batch in self.objects.to_batches(max_chunksize=LISTING_BATCH):
            for column in batch.columns:
                digest.update(json.dumps(column.to_pylist()).encode())
        return digest.hexdigest()


def here(function: Callable[..., bool], *call: Any) -> bool:
    """Ask a question in this process."""
    return function(*call)


def look(
    uri: str,
    format_: Format,
    endpoint_url: str | None,
    ask: Callable[..., bool] = here,
) -> Input:
    """List an input and find out how to read it.

    Args:
        uri: A folder, or one shard, manifest or image.
        format_: What the user asked for.
        endpoint_url: See `storage.open_store`.
        ask: Where objects are looked into: a file may be the end of the process that does.

    Raises:
        InputError: There is nothing, or more than one kind of input and none was asked for.
    """
    store, listing = _listing(uri, endpoint_url)
    if not listing.num_rows:
        raise InputError(f"there is nothing at {uri}: check the path and --endpoint-url")
    kinds = [_kind(path) for path in listing["path"].to_pylist()]
    if "parquet" in kinds:
        first = listing.slice(kinds.index("parquet"), 1)
        as_manifest = (
            ask(_is_manifest, store, first) if format_ == "auto" else format_ == "manifest"
        )
        kinds = ["manifest" if kind == "parquet" and as_manifest else kind for kind in kinds]
    chosen, why = _choose(format_, Counter(kinds), uri)
    kept = listing.filter(pa.array([kind == chosen for kind in kinds]))
    if not kept.num_rows:
        raise InputError(f"nothing at {uri} can be read as {chosen}: check --format")
    hidden = sum(map(_is_hidden, listing["path"].to_pylist()))
    others = listing.num_rows - kept.num_rows - hidden
    notes = (
        *((f"{others} objects that are not {chosen} are ignored",) if others else ()),
        *((f"{hidden} hidden objects are ignored (a name with a dot in front)",) if hidden else ()),
    )
    return Input(store=store, format=chosen, why=why, objects=kept, notes=notes)


def objects_of(table: pa.Table) -> list[ObjectInfo]:
    """Return the rows of a table of `OBJECTS`."""
    return [ObjectInfo(**row) for row in table.to_pylist()]


def describe_changes(before: pa.Table, now: pa.Table) -> str:
    """Say in words how two tables of `OBJECTS` differ; empty where they do not."""
    planned, present = (
        {row["path"]: (row["size"], row["etag"]) for row in table.to_pylist()}
        for table in (before, now)
    )
    both = planned.keys() & present.keys()
    kinds = {
        "added": sorted(present.keys() - planned.keys()),
        "removed": sorted(planned.keys() - present.keys()),
        "changed": sorted(path for path in both if planned[path] != present[path]),
    }
    return "; ".join(
        f"{len(paths)} {kind} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
        for kind, paths in kinds.items()
        if paths
    )


def _listing(uri: str, endpoint_url: str | None) -> tuple[Store, pa.Table]:
    """Return the folder of `uri` and its objects, or the one object that `uri` names."""
    folder, name = split_uri(uri)
    if _kind(name):
        store = open_store(folder, endpoint_url)
        if (found := store.info(name)) is not None:
            return store, object_table([found])
    store = open_store(uri, endpoint_url)
    objects = iter(store.list_objects())
    batches = []
    while batch := list(islice(objects, LISTING_BATCH)):
        batches.append(object_table(batch))
    return store, pa.concat_tables(batches or [OBJECTS.empty_table()]).combine_chunks()


def object_table(objects: Sequence[ObjectInfo]) -> pa.Table:
    """Return objects as a table of `OBJECTS`."""
    columns = [[getattr(found, name) for found in objects] for name in OBJECTS.names]
    return pa.table(columns, schema=OBJECTS)


def _is_hidden(path: str) -> bool:
    """Say whether a file, or a folder above it, is hidden, or is what a Mac adds to archives."""
    parts = PurePosixPath(path).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _kind(path: str) -> str:
    """Return the format that a name speaks for, or an empty string.

    What is hidden holds no input, and neither do Parquet files in folders that start with an
    underscore: those are the tables beside a plan.
    """
    *folders, name = PurePosixPath(path).parts or ("",)
    if _is_hidden(path):
        return ""
    lower = name.lower()
    kind = next((kind for kind, suffixes in _SUFFIXES.items() if lower.endswith(suffixes)), "")
    if kind == "parquet" and any(folder.startswith("_") for folder in folders):
        return ""
    return kind


def is_shard(path: str) -> bool:
    """Say whether a name speaks for a file that holds images, and not for a folder of them."""
    return _kind(path) in ("webdataset", "parquet")


def holds_images(kind: pa.DataType) -> bool:
    """Say whether a column of this type may hold encoded images: bytes, or a struct with `bytes`."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_images(kind.field(index).type)
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_manifest(store: Store, first: pa.Table) -> bool:
    """Say whether a Parquet object lists images (`uri`) instead of holding them."""
    (found,) = objects_of(first)
    try:
        schema = pq.read_schema(store.open(found, FOOTER_WINDOW))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        # A damaged shard: indexing it makes the row that says so.
        return False
    return "uri" in schema.names and not any(holds_images(field.type) for field in schema)


def _choose(format_: Format, count: Counter[str], uri: str) -> tuple[str, str]:
    if format_ != "auto":
        return format_, "--format asks for it"
    known = {kind: number for kind, number in count.items() if kind}
    if len(known) == 1:
        ((kind, number),) = known.items()
        return (
            kind,
            f"{number} of {count.total()} objects are {kind}, and none is of another format",
        )
    if not known:
        suffixes = ", ".join(suffix for group in _SUFFIXES.values() for suffix in group)
        raise InputError(f"nothing at {uri} has a suffix that can be read ({suffixes})")
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(known.items()))
    raise InputError(f"{uri} holds more than one kind of input ({found}): say which by --format")
