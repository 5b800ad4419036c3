"""COCO box and mask average precision of rows of the one schema: the numbers of pycocotools.

Detections are matched with truth image by image (`CocoMatches.add`), which leaves 37 bytes for each
detection: tables are streamed, parts of them matched in different processes and merged, and only
`CocoMatches.summary` sees all of them. Numbers are compared as they are given, in float64.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from segmodel import matching
from segmodel.matching import AREA_RANGES, RECORD, Records
from segmodel.metrics import Metrics, metrics

Int64: TypeAlias = npt.NDArray[np.int64]
Row: TypeAlias = Mapping[str, Any]
# A table of the one schema: as one, in parts, or as row dictionaries.
Rows: TypeAlias = pa.Table | pa.RecordBatch | Iterable[pa.Table | pa.RecordBatch | Row]

_COLUMNS = ["image_id", "height", "width", "status", "detections"]
_ROWS_AT_ONCE = 64  # as dictionaries: with 100 detections each and their RLE some 10 MB
_MAX_NAMED = 3  # image ids in a message


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well predictions fit the truth.

    Attributes:
        box: Of the boxes.
        mask: Of the masks; None where truth or predictions are boxes only.
        num_images: Images in truth.
        num_truth: Annotations in truth, crowds included.
        num_predictions: Detections in predictions.
        num_missing: Images of truth without a row in predictions; they count as nothing found.
        num_errors: Images whose prediction is in error; they count as nothing found.
        renamed: Name in truth and in predictions, by id, of categories of which these differ. As in
            pycocotools the id has the say.
    """

    box: Metrics
    mask: Metrics | None
    num_images: int
    num_truth: int
    num_predictions: int
    num_missing: int
    num_errors: int
    renamed: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON, without the curves."""
        counts = ("num_images", "num_truth", "num_predictions", "num_missing", "num_errors")
        return {
            "box": self.box.to_dict(),
            "mask": self.mask.to_dict() if self.mask is not None else None,
            **{name: getattr(self, name) for name in counts},
            "renamed": [
                {"category_id": category, "truth": wanted, "predictions": found}
                for category, (wanted, found) in self.renamed.items()
            ],
        }


def evaluate(
    truth: Rows, predictions: Rows, *, image_order: Mapping[str, int] | None = None
) -> Evaluation:
    """Compare predictions with truth, both of the one schema, paired by `image_id`.

    Truth is held (a table as Arrow, dictionaries as they are); predictions are streamed.

    Args:
        truth: One row for each image; its `status` does not matter.
        predictions: At most one row for each image of truth.
        image_order: See `CocoMatches.summary`.

    Returns:
        Box and mask AP.

    Raises:
        ValueError: An image comes twice, predictions name images that truth does not have, or
            `CocoMatches` refuses the rows.
    """
    return match(truth, predictions).summary(image_order)


def match(truth: Rows, predictions: Rows) -> "CocoMatches":
    """Do the part of `evaluate` that can be done for some of the images and merged."""
    matches = CocoMatches()
    for wanted, found in pairs(truth, predictions):
        matches.add(wanted, found)
    return matches


def pairs(truth: Rows, predictions: Rows) -> Iterator[tuple[Row, Row | None]]:
    """Yield the row of truth of every image and its prediction, None where there is none.

    Args:
        truth: One row for each image; held.
        predictions: At most one row for each image of truth; streamed.

    Raises:
        ValueError: An image comes twice, or predictions name images that truth does not have; at
            the end, with their number.
    """
    sources = _sources(truth)
    left = dict.fromkeys(sources)
    unknown: list[str] = []
    for prediction in _dictionaries(predictions):
        image_id = prediction["image_id"]
        if image_id not in sources:
            unknown.append(image_id)
        elif image_id not in left:
            raise ValueError(f"image {image_id!r} comes twice in the predictions")
        elif not unknown:
            del left[image_id]
            yield _row(sources[image_id]), prediction
    if unknown:
        named = ", ".join(repr(image_id) for image_id in unknown[:_MAX_NAMED])
        raise ValueError(
            f"the predictions have {len(unknown)} images that the truth has not, such as {named}"
        )
    for image_id in left:
        yield _row(sources[image_id]), None


class _Side:
    """What is counted of truth, or of predictions."""

    def __init__(self) -> None:
        self.num = 0
        self.num_bare = 0  # without a mask
        self.names: dict[int, str | None] = {}  # by category id

    def add(self, items: Sequence[Row]) -> None:
        self.num += len(items)
        self.num_bare += sum(item["segmentation"] is None for item in items)
        for item in items:
            self.names.setdefault(item["category_id"], item["category"])

    def merge(self, other: "_Side") -> None:
        self.num += other.num
        self.num_bare += other.num_bare
        self.names = other.names | self.names

    def ids(self) -> dict[str, set[int]]:
        ids: defaultdict[str, set[int]] = defaultdict(set)
        for category, name in self.names.items():
            if name is not None:
                ids[name].add(category)
        return ids


class CocoMatches:
    """The detections of some images, matched with the truth: small, picklable and mergeable."""

    def __init__(self) -> None:
        self._image_index: dict[str, int] = {}  # by image_id
        self._records: list[Records] = []
        self._positives: dict[int, Int64] = {}  # by category id: (A,), annotations that count
        self._truth, self._predictions = _Side(), _Side()
        self._num_missing = self._num_errors = 0

    def add(self, truth: Row, prediction: Row | None) -> None:
        """Match the detections of one image.

        Args:
            truth: Its row in truth.
            prediction: Its row in predictions, or None where there is none.

        Raises:
            ValueError: The image was added before, its rows differ in `image_id` or size, a
                prediction has no score, or an annotation no area.
        """
        failed = prediction is not None and prediction["status"] == "error"
        annotations = truth["detections"]
        detections = [] if prediction is None or failed else prediction["detections"]
        _check(truth, prediction, annotations, detections)
        index = self._add_image(truth["image_id"])
        self._num_missing += prediction is None
        self._num_errors += failed
        self._truth.add(annotations)
        self._predictions.add(detections)

        wanted, found = _by_category(annotations), _by_category(detections)
        for category, items in wanted.items():
            self._count(category, np.count_nonzero(matching.counting(items), axis=1))
        masks = all(item["segmentation"] is not None for item in (*annotations, *detections))
        for category, items in found.items():
            records = matching.match(wanted.get(category, []), items, masks=masks)
            records["image"], records["category"] = index, category
            self._records.append(records)

    def merge(self, other: "CocoMatches") -> None:
        """Add the images of another, none of which may be here already.

        Raises:
            ValueError: They have an image in common.
        """
        offset = len(self._image_index)
        for image_id in other._image_index:
            self._add_image(image_id)
        records = other._joined()
        records["image"] += offset
        self._records.append(records)
        for category, positives in other._positives.items():
            self._count(category, positives)
        self._truth.merge(other._truth)
        self._predictions.merge(other._predictions)
        self._num_missing += other._num_missing
        self._num_errors += other._num_errors

    def summary(self, image_order: Mapping[str, int] | None = None) -> Evaluation:
        """Return box and mask AP, whatever the order in which the images were added.

        Args:
            image_order: By `image_id`, the place of an image. Among detections of equal score AP
                depends on it a little, and COCO's own image ids give the numbers of pycocotools;
                without it images go by `image_id`.

        Raises:
            ValueError: Only some detections have a mask, or the ids of a category differ between
                truth and predictions.
        """
        names = self._names()
        records = self._sorted(image_order)
        none = np.zeros(len(AREA_RANGES), np.int64)
        positives = np.array([self._positives.get(c, none) for c in names]).reshape(-1, len(none))
        masks = self._has_masks()
        return Evaluation(
            box=metrics(records, "box", names, positives),
            mask=metrics(records, "mask", names, positives) if masks else None,
            num_images=len(self._image_index),
            num_truth=self._truth.num,
            num_predictions=self._predictions.num,
            num_missing=self._num_missing,
            num_errors=self._num_errors,
            renamed=self._renamed(),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": [self._joined()]}

    def _add_image(self, image_id: str) -> int:
        if image_id in self._image_index:
            raise ValueError(f"image {image_id!r} comes twice")
        return self._image_index.setdefault(image_id, len(self._image_index))

    def _count(self, category: int, positives: Int64) -> None:
        self._positives[category] = self._positives.get(category, 0) + positives

    def _joined(self) -> Records:
        return np.concatenate([np.empty(0, RECORD), *self._records])

    def _sorted(self, image_order: Mapping[str, int] | None) -> Records:
        """Sort by category, and there as COCOeval does: by score, image, rank in the image."""
        key = image_order.__getitem__ if image_order is not None else None
        place = np.empty(len(self._image_index), np.int64)
        for i, image_id in enumerate(sorted(self._image_index, key=key)):
            place[self._image_index[image_id]] = i
        m = self._joined()
        return m[np.lexsort((m["rank"], place[m["image"]], -m["score"], m["category"]))]

    def _names(self) -> dict[int, str]:
        """Name the categories, by ascending id; truth has the say, equal names get their id."""
        wanted, found = self._truth.ids(), self._predictions.ids()
        for name in sorted(wanted.keys() & found.keys()):
            if wanted[name].isdisjoint(found[name]):
                raise ValueError(
                    f"the id of category {name!r} is {min(wanted[name])} in the truth "
                    f"and {min(found[name])} in the predictions"
                )
        known = self._predictions.names | self._truth.names
        names = {category: known[category] or str(category) for category in sorted(known)}
        uses = Counter(names.values())
        return {c: name if uses[name] == 1 else f"{name} ({c})" for c, name in names.items()}

    def _renamed(self) -> dict[int, tuple[str, str]]:
        both = self._truth.names.keys() & self._predictions.names.keys()
        names = {c: (self._truth.names[c], self._predictions.names[c]) for c in sorted(both)}
        return {
            category: (wanted, found)
            for category, (wanted, found) in names.items()
            if wanted is not None and found is not None and wanted != found
        }

    def _has_masks(self) -> bool:
        sides = {"truth": self._truth, "predictions": self._predictions}
        if any(0 < side.num_bare == side.num for side in sides.values()):
            return False
        for name, side in sides.items():
            if side.num_bare:
                raise ValueError(f"{side.num_bare} of {side.num} masks are missing in the {name}")
        return True


def _check(
    truth: Row, prediction: Row | None, annotations: Sequence[Row], detections: Sequence[Row]
) -> None:
    image_id = truth["image_id"]
    rows = [truth] if prediction is None else [truth, prediction]
    if rows[-1]["image_id"] != image_id:
        raise ValueError(f"image {image_id!r} is matched with {rows[-1]['image_id']!r}")
    if any(item["area"] is None for item in annotations):
        raise ValueError(f"image {image_id!r} has an annotation without an area")
    if any(item["score"] is None for item in detections):
        raise ValueError(f"image {image_id!r} has a prediction without a score")
    masks = [item["segmentation"] for item in (*annotations, *detections)]
    sizes = {tuple(mask["size"]) for mask in masks if mask is not None}
    sizes |= {(row["height"], row["width"]) for row in rows if row["status"] == "ok"}
    if len(sizes) > 1:
        raise ValueError(
            f"image {image_id!r} has rows or masks of different sizes: {sorted(sizes)}"
        )


def _by_category(items: Iterable[Row]) -> dict[int, list[Row]]:
    groups: defaultdict[int, list[Row]] = defaultdict(list)
    for item in items:
        groups[item["category_id"]].append(item)
    return groups


# Where a row lies: in a batch at a place, or as a dictionary.
_Source: TypeAlias = tuple[pa.RecordBatch, int] | Row


def _sources(rows: Rows) -> dict[str, _Source]:
    """Find rows by image_id without making dictionaries of a table."""
    sources: dict[str, _Source] = {}
    for part in _parts(rows):
        found: list[tuple[str, _Source]]
        if isinstance(part, Mapping):
            found = [(part["image_id"], part)]
        else:
            found = [(str(i), (part, n)) for n, i in enumerate(part.column("image_id"))]
        for image_id, source in found:
            if image_id in sources:
                raise ValueError(f"image {image_id!r} comes twice in the truth")
            sources[image_id] = source
    return sources


def _row(source: _Source) -> Row:
    if isinstance(source, Mapping):
        return source
    batch, i = source
    row: Row = batch.slice(i, 1).to_pylist()[0]
    return row


def _dictionaries(rows: Rows) -> Iterator[Row]:
    for part in _parts(rows):
        if isinstance(part, Mapping):
            yield part
        else:
            for start in range(0, part.num_rows, _ROWS_AT_ONCE):
                yield from part.slice(start, _ROWS_AT_ONCE).to_pylist()


def _parts(rows: Rows) -> Iterator[pa.RecordBatch | Row]:
    """Split into record batches, with the columns that matter, and dictionaries."""
    for part in [rows] if isinstance(rows, pa.Table | pa.RecordBatch) else rows:
        if isinstance(part, Mapping):
            yield part
        elif isinstance(part, pa.Table):
            yield from part.select(_COLUMNS).to_batches()
        else:
            yield part.select(_COLUMNS)
