"""COCO annotations of a plan's images: which record belongs to which image.

A record's `file_name` is the path of a loose image relative to the input (`shard/key`), a member's
name in a tar, the key in a Parquet shard, the URI in a manifest, or, if only one image has it, the
base name.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import chunks
from jobs.chunks import Chunk
from jobs.plan import Plan
from jobs.read import Source, read_names
from jobs.records import Matched, PackError, some_of
from jobs.storage import open_uri
from jobs.tasks import in_order
from segmodel import coco, rle
from segmodel.schema import PREDICTIONS

# Rows that become Arrow together: as dictionaries they take ten times the memory.
ROWS_AT_A_TIME = 512


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """A COCO instances file.

    Attributes:
        uri: For messages.
        rows: A table of `PREDICTIONS`, a row for each image of the file.
        file_names: Of the images, without a leading `./`.
        categories: `{"id", "name"}` of each, by id, used or not.
        notes: What a person should know.
    """

    uri: str
    rows: pa.Table
    file_names: list[str]
    categories: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Place:
    """An image of the plan that may be the one that a record means."""

    chunk: int
    position: int
    image_id: str
    shard: str
    key: str


def read(uri: str, endpoint_url: str | None) -> bytes:
    """Return the file at `uri`.

    Raises:
        FileNotFoundError: There is none.
    """
    store, name = open_uri(uri, endpoint_url)
    return store.read(name)


def digest(data: bytes) -> str:
    """Return what changes whenever the file does."""
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, uri: str) -> Annotations:
    """Check a COCO instances file and turn it into rows.

    Raises:
        PackError: It is no such file, or a record is unusable; the message names it.
    """
    try:
        file = json.loads(data)
        if not isinstance(file, dict):
            raise PackError("not a COCO instances file: it is no JSON object")
        categories = coco.categories(file)
        rows = coco.rows(file)
        parts = []
        while some := list(islice(rows, ROWS_AT_A_TIME)):
            parts.append(pa.Table.from_pylist(some, PREDICTIONS))
        # Behind `rows`, which checks the records.
        notes = _refuse_bare(file["annotations"])
    except ValueError as error:
        raise PackError(f"{uri}: {error}") from error
    if not parts:
        raise PackError(f"{uri}: it has no images")
    table = pa.concat_tables(parts).combine_chunks()
    return Annotations(
        uri=uri,
        rows=table,
        file_names=[image["file_name"].removeprefix("./") for image in file["images"]],
        categories=categories,
        notes=(*notes, *_note_of_empty(table)),
    )


def _refuse_bare(annotations: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Refuse annotations without a mask among others that have one; say where none has.

    Raises:
        PackError: There are some: neither training nor evaluating could do anything with the set.
    """
    bare = [one["id"] for one in annotations if not one.get("segmentation")]
    if not bare:
        return ()
    if len(bare) == len(annotations):
        return ("no annotation has a mask: the set serves to evaluate boxes, not to train",)
    raise PackError(
        f"{len(bare)} of {len(annotations)} annotations have no mask, such as those with the ids "
        f"{some_of(bare)}: give them one, or take them out"
    )


def _note_of_empty(rows: pa.Table) -> tuple[str, ...]:
    """Say how many masks have no pixel: outlines outside of their image, or thinner than a pixel."""
    found: list[str] = []
    number = 0
    for batch in rows.select(["image_id", "detections"]).to_batches(ROWS_AT_A_TIME):
        for row in batch.to_pylist():
            masks = [d["segmentation"] for d in row["detections"] if d["segmentation"]]
            empty = int((rle.areas(masks) == 0).sum())
            number += empty
            found += [row["image_id"]] if empty else []
    if not number:
        return ()
    return (
        f"{number} masks have no pixel within their image; they stay, as nothing: {some_of(found)}",
    )


def match(annotations: Annotations, planned: Plan, source: Source) -> Matched:
    """Find the image of each record, in Ray tasks that read the names of the images.

    Raises:
        PackError: A record has no image, or more than one, or shares it with another record.
    """
    places, num_by_base = _resolve(annotations, _candidates(annotations, planned, source), planned)
    _refuse_shared(annotations, places)
    keeps = [np.zeros(n, np.bool_) for n in planned.chunks["num_images"].to_pylist()]
    of_chunk: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, place in enumerate(places):
        keeps[place.chunk][place.position] = True
        of_chunk[place.chunk].append((place.position, row))
    rows = _renamed(annotations.rows, places)
    note = f"{num_by_base} records were matched by the base name alone"
    return Matched(
        keeps=keeps,
        records=(rows.take([row for _, row in sorted(of_chunk[n])]) for n in sorted(of_chunk)),
        categories=annotations.categories,
        notes=(*annotations.notes, *((note,) if num_by_base else ())),
    )


def _candidates(
    annotations: Annotations, planned: Plan, source: Source
) -> list[dict[str, list[_Place]]]:
    """Return the images that have a record's path, its key, or its base name, each by that name."""
    wanted = set(annotations.file_names)
    bases = {_base(name) for name in wanted}
    by_path: defaultdict[str, list[_Place]] = defaultdict(list)
    by_key: defaultdict[str, list[_Place]] = defaultdict(list)
    by_base: defaultdict[str, list[_Place]] = defaultdict(list)
    for chunk, place in _names(planned, source):
        key = _given_key(chunk, place)
        path = f"{place.shard}/{key}" if place.shard else key
        if path in wanted:
            by_path[path].append(place)
        if key in wanted:
            by_key[key].append(place)
        if _base(key) in bases:
            by_base[_base(key)].append(place)
    return [by_path, by_key, by_base]


def _names(planned: Plan, source: Source) -> Iterator[tuple[Chunk, _Place]]:
    """Yield every image of the plan; what is not used is held nowhere."""
    all_chunks = list(chunks.from_table(planned.chunks))
    tables = in_order(_read_names, ((chunk, source) for chunk in all_chunks))
    for number, (chunk, (names,)) in enumerate(zip(all_chunks, tables, strict=True)):
        columns = (column.to_pylist() for column in names.columns)
        for position, (image_id, shard, key) in enumerate(zip(*columns, strict=True)):
            yield chunk, _Place(number, position, image_id, shard, key)


def _read_names(chunk: Chunk, source: Source) -> list[pa.Table]:
    return [read_names(chunk, source)]


def _given_key(chunk: Chunk, place: _Place) -> str:
    """Return the name as the tar has it: `index.unique` adds a number to one that comes again."""
    number = chunk.start + place.position
    if number in dict(chunk.renamed):
        return place.key.rstrip("#").removesuffix(f"#{number}")
    return place.key


def _resolve(
    annotations: Annotations, candidates: list[dict[str, list[_Place]]], planned: Plan
) -> tuple[list[_Place], int]:
    """Return the one image of each record, and how many were found by the base name alone."""
    by_path, by_key, by_base = candidates
    places: list[_Place] = []
    missing: list[str] = []
    several: list[str] = []
    num_by_base = 0
    for name in annotations.file_names:
        exact = by_path.get(name) or by_key.get(name)
        found = exact or by_base.get(_base(name)) or []
        num_by_base += exact is None
        places += found[:1]
        if not found:
            missing.append(name)
        elif len(found) > 1:
            several.append(f"{name!r} is {' and '.join(repr(p.image_id) for p in found[:3])}")
    if missing:
        raise PackError(
            f"{len(missing)} of the {len(annotations.file_names)} images in {annotations.uri} are not "
            f"among the {planned.num_images} at {planned.folder}: {some_of(missing)}"
        )
    if several:
        raise PackError(
            f"{len(several)} names in {annotations.uri} are those of more than one image: "
            f"{'; '.join(several[:3])}. Give each file_name the path relative to --images"
        )
    return places, num_by_base


def _refuse_shared(annotations: Annotations, places: list[_Place]) -> None:
    # As they stand in the file: `a.jpg` and `./a.jpg` are two records.
    parts = (annotations.rows[name].to_pylist() for name in ("shard", "key"))
    written = [f"{shard}/{key}" if shard else key for shard, key in zip(*parts, strict=True)]
    first: dict[str, int] = {}
    shared = [
        f"{written[first[place.image_id]]!r} and {written[row]!r} are {place.image_id!r}"
        for row, place in enumerate(places)
        if first.setdefault(place.image_id, row) != row
    ]
    if shared:
        raise PackError(
            f"{len(shared)} images have more than one record in {annotations.uri}: "
            f"{'; '.join(shared[:3])}"
        )


def _renamed(rows: pa.Table, places: list[_Place]) -> pa.Table:
    """Give rows the names of their images."""
    for column, name in enumerate(("image_id", "shard", "key")):
        values = pa.array([getattr(place, name) for place in places], pa.string())
        rows = rows.set_column(column, PREDICTIONS.field(name), values)
    return rows


def _base(name: str) -> str:
    return name.rpartition("/")[2]
