"""What is new at an input since a version of a data set: objects by etag, then images by content.

A shard that changed may hold images that did not: those are read once more, and compared by a digest with what
was labelled, but not labelled again. The driver holds 24 bytes for each labelled image of shards that changed.

An object with an image that met an error which may pass (it was gone for a moment, its process was killed) is
tried again by the next runs, a few times, although its etag is the same: of it only what has no label.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from jobs import chunks, contents
from jobs.chunks import Chunk
from jobs.contents import Known, content_digest
from jobs.detect import OBJECTS, Input, objects_of
from jobs.plan import Plan
from jobs.read import Source, read_chunk, read_names
from jobs.store import ObjectInfo, Store
from jobs.tasks import in_order
from jobs.versions import CONTENTS, Version

Bool: TypeAlias = npt.NDArray[np.bool_]


# Kinds of errors that another night may not have. What an image's own bytes are to blame for stays.
MAY_PASS = frozenset({"missing", "changed", "memory", "crashed", "hung", "failed", "shard"})
# Versions that such an object is labelled in: a shard may be damaged for good, an image crash its process always.
MAX_TRIES = 3
# What a version says of the labelled input: how often objects were tried that are to be tried again, else 0.
INPUTS = OBJECTS.append(pa.field("tries", pa.int64()))


@dataclass(frozen=True, kw_only=True)
class News:
    """Objects of an input that no parent version has labelled.

    Attributes:
        objects: New and changed ones: a table of `detect.OBJECTS`.
        changed: Paths of those that were there, with another etag or an error that may pass.
        again: Paths of those of them that have the same etag.
        gone: Labelled objects that are not there any more; their rows stay.
    """

    objects: pa.Table
    changed: frozenset[str]
    again: frozenset[str]
    gone: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A plan of new and changed objects, without the images that are labelled already.

    Attributes:
        planned: The plan, or None where nothing is left.
        replaced: Ids of rows that leave: of its images whose content is another, and of errors in changed objects.
        same: Images that were left out.
    """

    planned: Plan | None
    replaced: tuple[str, ...]
    same: int


def news(found: Input, parent: Version | None) -> News:
    """Compare a listing with what a version has labelled."""
    if parent is None:
        nothing = frozenset[str]()
        return News(objects=found.objects, changed=nothing, again=nothing, gone=0)
    before = _inputs(parent)
    tries = before["tries"]
    done = before.filter(pc.or_(pc.equal(tries, 0), pc.greater_equal(tries, MAX_TRIES)))
    objects = found.objects.filter(pc.invert(pc.is_in(_whole(found.objects), _whole(done))))
    changed = objects.filter(pc.is_in(objects["path"], before["path"]))
    again = changed.filter(pc.is_in(_whole(changed), _whole(before)))
    there = pc.sum(pc.is_in(before["path"], found.objects["path"]), min_count=0).as_py()
    return News(
        objects=objects,
        changed=frozenset(changed["path"].to_pylist()),
        again=frozenset(again["path"].to_pylist()),
        gone=before.num_rows - int(there),
    )


def some_of(news_: News, objects: pa.Table) -> News:
    """Return the part of what is new that some of its objects are."""
    paths = frozenset(objects["path"].to_pylist())
    return replace(news_, objects=objects, changed=news_.changed & paths, again=news_.again & paths)


def inputs(before: Version | None, new: pa.Table, unsettled: Collection[str]) -> pa.Table:
    """Return what is labelled when a version's new objects are, too: a table of `INPUTS`.

    Args:
        before: The parent.
        new: The new objects.
        unsettled: Paths of those with an error that may pass.
    """
    old = INPUTS.empty_table() if before is None else _inputs(before)
    tried = old.filter(pc.greater(old["tries"], 0))
    times = dict(zip(_whole(tried).to_pylist(), tried["tries"].to_pylist(), strict=True))
    whole = _whole(new)
    is_unsettled = pc.is_in(new["path"], pa.array(sorted(unsettled), pa.string())).to_numpy()
    tries = np.zeros(new.num_rows, np.int64)
    for row in np.flatnonzero(is_unsettled).tolist():
        tries[row] = times.get(whole[row].as_py(), 0) + 1
    kept = old.filter(pc.invert(pc.is_in(old["path"], new["path"])))
    both = [kept, new.append_column(INPUTS.field("tries"), pa.array(tries))]
    return pa.concat_tables(both).sort_by("path")


def may_pass(error: str | None) -> bool:
    """Say whether an image's error may be another night's no more."""
    return error is not None and error.partition(":")[0] in MAY_PASS


def _inputs(version: Version) -> pa.Table:
    """Return a version's table of `INPUTS`."""
    found = version.inputs
    if "tries" in found.column_names:
        return found
    # Versions made before 2026-11-28 tried everything once.
    return found.append_column(INPUTS.field("tries"), pa.array(np.zeros(found.num_rows, np.int64)))


def holds(objects: pa.Table, some: pa.Table) -> bool:
    """Say whether all of some objects are among others, unchanged."""
    return bool(pc.all(pc.is_in(_whole(some), _whole(objects)), min_count=0).as_py())


def shares(objects: pa.Table, others: pa.Table) -> bool:
    """Say whether any of some objects is among others, unchanged."""
    return bool(pc.any(pc.is_in(_whole(objects), _whole(others)), min_count=0).as_py())


def compare(found: News, planned: Plan, source: Source, parent: Version | None) -> Compared:
    """Leave out of a plan the images whose content is labelled, in Ray tasks that read them.

    Args:
        found: What is new.
        planned: A plan of `found.objects`, not frozen yet.
        source: Of the plan.
        parent: What is labelled.
    """
    # Packed shards name their images themselves, so that a new one may hold what another held before.
    every = planned.format == "parquet"
    if parent is None or not (found.changed or every):
        return Compared(planned=planned, replaced=(), same=0)
    labelled, lost = _known(parent, found.changed, every=every)
    known, news_ = ray.put(labelled), ray.put(replace(found, objects=OBJECTS.empty_table()))
    every_chunk = list(chunks.from_table(planned.chunks))
    calls = ((chunk, source, known, news_, every) for chunk in every_chunk)
    kept: list[Chunk] = []
    replaced = set(lost)
    for chunk, ((keep, ids),) in zip(every_chunk, in_order(_compare_chunk, calls), strict=True):
        replaced.update(ids)
        if keep.any():
            kept.append(_cut(chunk, keep))
    num_images = sum(chunk.num_images for chunk in kept)
    same = planned.num_images - num_images
    note = (f"{same} images are labelled already, and are the same",) if same else ()
    less = replace(
        planned,
        num_images=num_images,
        num_bytes=sum(chunk.num_bytes for chunk in kept),
        notes=(*planned.notes, *note),
        chunks=chunks.numbered(chunks.to_table(kept), None),
    )
    return Compared(planned=less if kept else None, replaced=tuple(sorted(replaced)), same=same)


def object_of(chunk: Chunk, shard: str, key: str) -> str:
    """Return the object of the input that an image of a chunk comes from."""
    if chunk.kind != "objects":
        return chunk.shard
    return f"{shard.rstrip('/')}/{key}" if shard else key


def _whole(objects: pa.Table) -> pa.ChunkedArray:
    parts = [objects["path"], objects["size"].cast(pa.string()), objects["etag"]]
    return pc.binary_join_element_wise(*parts, "\0")


def _cut(chunk: Chunk, keep: Bool) -> Chunk:
    """Return a chunk of those of its images that are to be kept."""
    if keep.all():
        return chunk
    return replace(
        chunk,
        num_images=int(keep.sum()),
        num_bytes=round(chunk.num_bytes * keep.mean()),
        keep=keep.tobytes(),
    )


def _known(parent: Version, changed: frozenset[str], *, every: bool) -> tuple[Known, list[str]]:
    """Return what is labelled of changed objects, or of all; and the rows of changed objects that had no image.

    Those rows leave: their images are tried again, and what stood for a shard's damage has no image.
    """
    wanted = pa.array(sorted(changed), pa.string())
    calls = (
        (parent.store, info, wanted, every) for info in objects_of(parent.table(CONTENTS).objects)
    )
    parts = [part for (part,) in in_order(_known_of, calls)]
    lost = [image_id for _, ids in parts for image_id in ids]
    return contents.joined([known for known, _ in parts]), lost


def _known_of(
    store: Store,
    info: ObjectInfo,
    changed: pa.Array,
    every: bool,  # noqa: FBT001 - a task's arguments have no names
) -> list[tuple[Known, list[str]]]:
    table = contents.read(store, info, None if every else changed)
    is_lost = pc.and_(
        pc.equal(pc.binary_length(table["digest"]), 0), pc.is_in(table["object"], changed)
    )
    return [(contents.known_of(table), table.filter(is_lost)["image_id"].to_pylist())]


def _compare_chunk(
    chunk: Chunk,
    source: Source,
    known: Known,
    found: News,
    every: bool,  # noqa: FBT001 - a task's arguments have no names
) -> list[tuple[Bool, list[str]]]:
    """Return which images of a chunk are to be labelled, and the ids of those that replace others."""
    rows = [] if chunk.kind == "verdict" else read_names(chunk, source).to_pylist()
    keep = np.ones(chunk.num_images, np.bool_)
    places: dict[int, int] = {}
    for number, row in enumerate(rows):
        path = object_of(chunk, row["shard"], row["key"])
        if not every and path not in found.changed:
            continue
        place = contents.place(known, row["image_id"])
        if place is None:
            continue
        if path in found.again:
            # The same object: there is nothing to compare.
            keep[number] = known["digest"][place] == contents.padded(b"")
        else:
            places[number] = place
    if not places:
        return [(keep, [])]
    look = np.isin(np.arange(len(rows)), list(places))
    data = read_chunk(_cut(chunk, look), source)["data"].to_pylist()
    replaced = []
    for (number, place), content in zip(sorted(places.items()), data, strict=True):
        digest = contents.padded(content_digest(content))
        keep[number] = content is None or known["digest"][place] != digest
        if keep[number]:
            replaced.append(rows[number]["image_id"])
    return [(keep, replaced)]


def only(found: Input, objects: pa.Table) -> Input:
    """Return an input of some of its objects."""
    assert objects.schema.equals(OBJECTS)
    return replace(found, objects=objects)
