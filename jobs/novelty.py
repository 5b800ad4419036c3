"""What is new at an input since a version of a data set: objects by etag, then images by content.

A shard that changed may hold images that did not: those are read once more, and compared by a digest with what
was labelled, but not labelled again. The driver holds 24 bytes for each labelled image of shards that changed.
"""

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from jobs import chunks
from jobs.chunks import Chunk
from jobs.detect import FOOTER_WINDOW, OBJECTS, Input, objects_of
from jobs.index import id_digest
from jobs.plan import Plan
from jobs.read import Source, read_chunk, read_names
from jobs.store import ObjectInfo, Store
from jobs.tasks import in_order
from jobs.versions import CONTENTS, Version

Bool: TypeAlias = npt.NDArray[np.bool_]

DIGEST_BYTES = 16
# Of each labelled image: the object of the input that it came from, and a digest of its bytes, which is empty
# where there were none. In files of their own, so that rows stay in the one schema.
CONTENT = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("object", pa.string(), nullable=False),
        pa.field("digest", pa.binary(), nullable=False),
    ]
)
_KNOWN = np.dtype([("image", np.uint64), ("digest", f"V{DIGEST_BYTES}")])


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


def content_digest(data: bytes | None) -> bytes:
    """Return the digest of an image's bytes; empty where there are none, which is like no other."""
    return b"" if data is None else blake2b(data, digest_size=DIGEST_BYTES).digest()


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


def _known(parent: Version, objects: frozenset[str] | None) -> npt.NDArray[np.void]:
    """Return ids and digests of what is labelled, by id: of images of some objects of the input, or of all."""
    wanted = None if objects is None else pa.array(sorted(objects), pa.string())
    calls = ((parent.store, info, wanted) for info in objects_of(parent.table(CONTENTS).objects))
    parts = [part for (part,) in in_order(_known_of, calls)]
    known = np.concatenate([np.empty(0, _KNOWN), *parts])
    return known[np.argsort(known["image"], kind="stable")]


def _known_of(
    store: Store, info: ObjectInfo, objects: pa.Array | None
) -> list[npt.NDArray[np.void]]:
    file = pq.ParquetFile(store.open(info, FOOTER_WINDOW), page_checksum_verification=True)
    table = file.read(columns=CONTENT.names)
    if objects is not None:
        table = table.filter(pc.is_in(table["object"], objects))
    known = np.zeros(table.num_rows, _KNOWN)
    known["image"] = [id_digest(name) for name in table["image_id"].to_pylist()]
    for row, digest in enumerate(table["digest"].to_pylist()):
        known["digest"][row] = np.void(digest.ljust(DIGEST_BYTES, b"\0"))
    return [known]


def _compare_chunk(
    chunk: Chunk,
    source: Source,
    known: npt.NDArray[np.void],
    changed: frozenset[str],
    every: bool,  # noqa: FBT001 - a task's arguments have no names
) -> list[tuple[Bool, list[str]]]:
    """Return which images of a chunk are to be labelled, and the ids of those that replace others."""
    rows = [] if chunk.kind == "verdict" else read_names(chunk, source).to_pylist()
    keep = np.ones(chunk.num_images, np.bool_)
    places: dict[int, int] = {}
    for number, row in enumerate(rows):
        if every or object_of(chunk, row["shard"], row["key"]) in changed:
            image = np.uint64(id_digest(row["image_id"]))
            place = int(np.searchsorted(known["image"], image))
            if place < len(known) and known["image"][place] == image:
                places[number] = place
    if not places:
        return [(keep, [])]
    look = np.isin(np.arange(len(rows)), list(places))
    data = read_chunk(_cut(chunk, look), source)["data"].to_pylist()
    replaced = []
    for (number, place), content in zip(sorted(places.items()), data, strict=True):
        digest = np.void(content_digest(content).ljust(DIGEST_BYTES, b"\0"))
        keep[number] = content is None or known["digest"][place] != digest
        if keep[number]:
            replaced.append(rows[number]["image_id"])
    return [(keep, replaced)]


def only(found: Input, objects: pa.Table) -> Input:
    """Return an input of some of its objects."""
    assert objects.schema.equals(OBJECTS)
    return replace(found, objects=objects)
