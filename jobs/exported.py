"""What is exported: the rows of a table one after another, its categories, and names for its images."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from jobs import tables
from jobs.detect import Input, InputError, is_shard, objects_of
from jobs.index import id_digest
from jobs.safe_names import safe_name, safe_path

Row: TypeAlias = dict[str, Any]
UInt64: TypeAlias = npt.NDArray[np.uint64]

COLUMNS = ("image_id", "shard", "key", "height", "width", "status", "detections")
# Rows that are dictionaries at once: with 100 detections each, some 10 MB.
BATCH_SIZE = 64
# Rows of which ids and categories are read at once.
SURVEY_BATCH_SIZE = 1024


@dataclass
class Tally:
    """What became of rows and detections so far.

    Attributes:
        images: That were exported.
        detections: That were exported.
        failed: Rows in error, left out.
        others: Rows of images that the annotations do not have, left out.
        below: Detections left out: they score lower than asked for.
        handed: Detections that the format was to hold.
        renamed: Images whose files need another name.
        inside: Images that lie inside of a shard, where other tools do not find them.
        unwritten: Images that were to be written and cannot be read.
        why: Of the first of those.
    """

    images: int = 0
    detections: int = 0
    failed: int = 0
    others: int = 0
    below: int = 0
    handed: int = 0
    renamed: int = 0
    inside: int = 0
    unwritten: int = 0
    why: str = ""

    @property
    def empty(self) -> int:
        """Detections left out: their masks have no pixel, which not every format can say."""
        return self.handed - self.detections


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What has to be known before the first row.

    Attributes:
        num_rows: Of the table.
        categories: `{"id", "name"}` of each, by id: those of the job's manifest or of the version, used or
            not, and those of detections.
        shared: Digests of paths without suffix that cannot name a file: more than one image has them, or they
            are the whole path of an image that keeps its suffix for that.
    """

    num_rows: int
    categories: tuple[dict[str, Any], ...]
    shared: frozenset[int] = field(repr=False)

    def name(self, row: Mapping[str, Any]) -> str:
        """Return the name of an image's file, with folders, without suffix.

        It is the image's path (shard and key) without its suffix, as tools find the file of an image,
        changed as little as `safe_names` can. Images that differ in the suffix alone keep it, and a slash in
        their key is `%2F` then, so that it also tells apart what else has the same path.
        """
        path = path_of(row)
        if id_digest(_stem(path)) not in self.shared:
            return safe_path(_stem(path))
        key = safe_name(row["key"])
        return f"{safe_path(row['shard'])}/{key}" if row["shard"] else key


def survey(table: Input, *, names: bool) -> Survey:
    """Read the categories of a table, and the names of its images where they become files.

    Memory: 24 bytes for each image where there are names, else nothing that grows with the table.

    Raises:
        InputError: Two rows are of the same image, or two names of the same category.
    """
    found = {int(one["id"]): str(one["name"]) for one in tables.categories(table)}
    columns = ["image_id", "detections.category_id", "detections.category"]
    num_rows = 0
    ids, stems, paths = array("Q"), array("Q"), array("Q")
    for batch in tables.scan(
        table.store,
        objects_of(table.objects),
        [*columns, *(("shard", "key", "status") if names else ())],
        SURVEY_BATCH_SIZE,
    ):
        num_rows += batch.num_rows
        _add_categories(found, batch["detections"].flatten(), table)
        if names:
            ok = batch.select(["image_id", "shard", "key", "status"]).to_pylist()
            ok = [row for row in ok if row["status"] == "ok"]
            ids.extend(id_digest(row["image_id"]) for row in ok)
            stems.extend(id_digest(_stem(path_of(row))) for row in ok)
            paths.extend(id_digest(path_of(row)) for row in ok)
    if twice := _repeated(np.asarray(ids, np.uint64)):
        raise InputError(
            f"{len(twice)} images have more than one row in {table.store.uri}: export the output of "
            "one job at a time"
        )
    return Survey(
        num_rows=num_rows,
        categories=tuple({"id": number, "name": found[number]} for number in sorted(found)),
        shared=_shared(np.asarray(stems, np.uint64), np.asarray(paths, np.uint64)),
    )


def rows(
    table: Input, score_threshold: float | None, tally: Tally, *, masks: bool
) -> Iterator[tuple[int, Row]]:
    """Yield the rows that are not in error, each with its number in the table, counted from 0.

    Args:
        table: What is exported.
        score_threshold: Detections that score lower are taken out; those without a score stay.
        tally: Is kept up to date.
        masks: Whether the format consists of masks.

    Raises:
        InputError: Masks are wanted, and a row has boxes only.
    """
    numbers = count()
    for batch in tables.scan(table.store, objects_of(table.objects), COLUMNS, BATCH_SIZE):
        for row in batch.to_pylist():
            number = next(numbers)
            if row["status"] != "ok":
                tally.failed += 1
                continue
            if masks and any(one["segmentation"] is None for one in row["detections"]):
                raise InputError(
                    f"image {row['image_id']!r} has boxes without masks (`predict --tasks boxes`): "
                    "export it to coco-results or coco-instances, or predict masks"
                )
            tally.inside += is_shard(row["shard"])
            kept = [one for one in row["detections"] if _scores(one, score_threshold)]
            tally.below += len(row["detections"]) - len(kept)
            tally.handed += len(kept)
            yield number, {**row, "detections": kept}


def path_of(row: Mapping[str, Any]) -> str:
    """Return the path of an image: shard and key."""
    return f"{row['shard']}/{row['key']}" if row["shard"] else str(row["key"])


def suffix_of(row: Mapping[str, Any]) -> str:
    """Return the suffix of an image's path, with its dot; empty where it has none."""
    path = path_of(row)
    return path[len(_stem(path)) :]


def _scores(detection: Mapping[str, Any], threshold: float | None) -> bool:
    score = detection["score"]
    # A threshold of 0.9 keeps what is float32 0.9, slightly less.
    return threshold is None or score is None or score >= float(np.float32(threshold))


def _add_categories(found: dict[int, str], detections: Any, table: Input) -> None:
    numbers, names = detections.field("category_id"), detections.field("category")
    for number, name in set(zip(numbers.to_pylist(), names.to_pylist(), strict=True)):
        if found.setdefault(number, name) != name:
            raise InputError(
                f"category {number} is {found[number]!r} and {name!r} in {table.store.uri}: export "
                "the tables of one model at a time"
            )


def _repeated(digests: UInt64) -> frozenset[int]:
    values, times = np.unique(digests, return_counts=True)
    return frozenset(values[times > 1].tolist())


def _shared(stems: UInt64, paths: UInt64) -> frozenset[int]:
    """Return the digests of `Survey.shared`; `a.jpg` and `a.png` keep their suffix, then so does `a.jpg.png`."""
    found = np.array(sorted(_repeated(stems)), np.uint64)
    while True:
        whole = paths[np.isin(stems, found)]
        more = np.union1d(found, np.intersect1d(whole, stems))
        if len(more) == len(found):
            return frozenset(found.tolist())
        found = more


def _stem(path: str) -> str:
    """Return a path without its suffix; a dot in front of a name starts none."""
    folder, slash, name = path.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return f"{folder}{slash}{stem}" if dot and stem else path
