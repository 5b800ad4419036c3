"""What is new at an input since a version of a data set: objects by etag, then images by content.

A shard that changed may hold images that did not: those are read once more, and compared by a digest with what
was labelled, but not labelled again. The driver holds 24 bytes for each labelled image of shards that changed.
"""

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


@dataclass(frozen=True, kw_only=True)
class News:
    """Objects of an input that no parent version has labelled.

    Attributes:
        objects: New and changed ones: a table of `detect.OBJECTS`.
        changed: Paths of those that were there with another etag.
        gone: Labelled objects that are not there any more; their rows stay.
    """

    objects: pa.Table
    changed: frozenset[str]
    gone: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A plan of new and changed objects, without the images that are labelled already.

    Attributes:
        planned: The plan, or None where nothing is left.
        replaced: Ids of its images that have a row, of another content.
        same: Images that were left out.
    """

    planned: Plan | None
    replaced: tuple[str, ...]
    same: int


def news(found: Input, parent: Version | None) -> News:
    """Compare a listing with what a version has labelled."""
    if parent is None:
        return News(objects=found.objects, changed=frozenset(), gone=0)
    before = parent.inputs
    is_old = pc.is_in(_whole(found.objects), _whole(before))
    objects = found.objects.filter(pc.invert(is_old))
    changed = objects.filter(pc.is_in(objects["path"], before["path"]))["path"].to_pylist()
    there = pc.sum(pc.is_in(before["path"], found.objects["path"]), min_count=0).as_py()
    return News(objects=objects, changed=frozenset(changed), gone=before.num_rows - int(there))


def inputs(before: Version | None, new: pa.Table) -> pa.Table:
    """Return what is labelled when a version's new objects are, too: a table of `detect.OBJECTS`."""
    if before is None:
        return new
    old = before.inputs
    kept = old.filter(pc.invert(pc.is_in(old["path"], new["path"])))
    return pa.concat_tables([kept, new]).sort_by("path")


def holds(objects: pa.Table, some: pa.Table) -> bool:
    """Say whether all of some objects are among others, unchanged."""
    return bool(pc.all(pc.is_in(_whole(some), _whole(objects)), min_count=0).as_py())


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
    known = ray.put(_known(parent, None if every else found.changed))
    changed = ray.put(found.changed)
    every_chunk = list(chunks.from_table(planned.chunks))
    calls = ((chunk, source, known, changed, every) for chunk in every_chunk)
    kept: list[Chunk] = []
    replaced: list[str] = []
    for chunk, ((keep, ids),) in zip(every_chunk, in_order(_compare_chunk, calls), strict=True):
        replaced += ids
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


def _known(parent: Version, objects: frozenset[str] | None) -> Known:
    """Return what is labelled: images of some objects of the input, or all."""
    wanted = None if objects is None else pa.array(sorted(objects), pa.string())
    calls = ((parent.store, info, wanted) for info in objects_of(parent.table(CONTENTS).objects))
    return contents.joined([part for (part,) in in_order(_known_of, calls)])


def _known_of(store: Store, info: ObjectInfo, objects: pa.Array | None) -> list[Known]:
    return [contents.known_of(contents.read(store, info, objects))]


def _compare_chunk(
    chunk: Chunk,
    source: Source,
    known: Known,
    changed: frozenset[str],
    every: bool,  # noqa: FBT001 - a task's arguments have no names
) -> list[tuple[Bool, list[str]]]:
    """Return which images of a chunk are to be labelled, and the ids of those that replace others."""
    rows = [] if chunk.kind == "verdict" else read_names(chunk, source).to_pylist()
    keep = np.ones(chunk.num_images, np.bool_)
    places: dict[int, int] = {}
    for number, row in enumerate(rows):
        if every or object_of(chunk, row["shard"], row["key"]) in changed:
            place = contents.place(known, row["image_id"])
            if place is not None:
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
