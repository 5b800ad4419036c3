"""What is in a table, in one pass over its small columns: counts, histograms, and which images to show.

Masks are not read. Each group of images to show is the few rows of the lowest keys: drawn numbers
for a random group (a reservoir of which every row has the same chance), a measure for the best and
the worst, with drawn numbers among equals. Memory does not grow with the table, except for the names
that `Tables` holds.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs import tables
from jobs.tables import Tables
from segmodel.schema import DETECTION

Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]

SCORE_EDGES: Float64 = np.arange(21) / 20
# Mask pixels, by factors of two; the last bin takes all that is larger.
SIZE_EDGES: Float64 = np.array([2**n for n in range(25)], np.float64)
BATCH_SIZE = 4096
# Kinds of error are a short list; a foreign table may hold anything.
MOST_KINDS, MAX_KIND = 32, 40
# The name of a kind when there are more than `MOST_KINDS`.
OTHER = "other"

_FIELDS = ("category_id", "category", "score", "area")


class Picks:
    """The rows of the lowest keys, a bounded number of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._keys = np.empty((2, 0))
        self._rows = np.empty(0, np.int64)

    def offer(self, keys: Float64, ties: Float64, rows: Int64) -> None:
        """Look at N rows: their keys, numbers that decide among equal keys, and row numbers."""
        if len(self._rows) == self.most and self.most:
            near = keys <= self._keys[0, -1]
            keys, ties, rows = keys[near], ties[near], rows[near]
        both = np.concatenate([self._keys, [keys, ties]], axis=1)
        order = np.lexsort((both[1], both[0]))[: self.most]
        self._keys, self._rows = both[:, order], np.concatenate([self._rows, rows])[order]

    @property
    def rows(self) -> list[int]:
        """Row numbers, lowest key first."""
        numbers: list[int] = self._rows.tolist()
        return numbers


@dataclass(kw_only=True)
class CategoryCount:
    """Detections of a category, and the sum of the scores that are known."""

    detections: int = 0
    scored: int = 0
    score_sum: float = 0.0


@dataclass(kw_only=True)
class Survey:
    """What a pass has found.

    Attributes:
        images: Rows.
        empty: Rows that are ok and hold nothing.
        detections: Of all rows.
        kinds: Rows in error, by kind.
        categories: By id and name.
        score_counts: (20,) detections by `SCORE_EDGES`.
        size_counts: (24,) masks by `SIZE_EDGES`.
        best: Rows of the highest measure.
        worst: Rows of the lowest measure.
        random: Rows that are ok.
        failed: Rows in error, by kind.
    """

    images: int = 0
    empty: int = 0
    detections: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    categories: dict[tuple[int, str], CategoryCount] = field(default_factory=dict)
    score_counts: Int64 = field(default_factory=lambda: np.zeros(len(SCORE_EDGES) - 1, np.int64))
    size_counts: Int64 = field(default_factory=lambda: np.zeros(len(SIZE_EDGES) - 1, np.int64))
    best: Picks
    worst: Picks
    random: Picks
    failed: dict[str, Picks] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How many images are to be shown, and which are the best.

    Attributes:
        most: Images of a group.
        per_kind: Images in error of a kind.
        seed: Of the drawn numbers.
        measure: (rows,) float64, how good each row is, NaN where that is not known; where None it is
            how sure the model was.
    """

    most: int
    per_kind: int
    seed: int
    measure: Float64 | None = None


def survey(table: Tables, wish: Wish, progress: Callable[[int], None]) -> Survey:
    """Look at all rows of a table.

    Args:
        table: The same table and wish give the same survey.
        wish: What to show.
        progress: Is told how many rows were looked at since the last call.

    Raises:
        StorageError: A part of it cannot be read.
    """
    found = Survey(best=Picks(wish.most), worst=Picks(wish.most), random=Picks(wish.most))
    rng = np.random.default_rng(wish.seed)
    start = 0
    columns = ["status", "error", *(f"detections.{name}" for name in _FIELDS)]
    for group in table.groups:
        for batch in tables.stream(table.store, group, BATCH_SIZE, columns):
            numbers = np.arange(start, start + batch.num_rows)
            start += batch.num_rows
            _count(found, batch)
            _pick(found, batch, numbers, wish, rng)
            progress(batch.num_rows)
    return found


def certainty(scores: Float64, parents: Int64, num_rows: int) -> Float64:
    """Return how sure the model was of each row: the mean of |2 score - 1| over its detections.

    Args:
        scores: (D,) of all detections.
        parents: (D,) the row of each.
        num_rows: N.

    Returns:
        (N,) 0..1; NaN for a row without detections.
    """
    sums = np.bincount(parents, np.abs(2 * scores - 1), num_rows)
    counts = np.bincount(parents, minlength=num_rows)
    means: Float64 = np.divide(sums, counts, out=np.full(num_rows, np.nan), where=counts > 0)
    return means


def _count(found: Survey, batch: pa.RecordBatch) -> None:
    lengths = pc.list_value_length(batch["detections"]).to_numpy(zero_copy_only=False)
    is_ok = _is_ok(batch)
    found.images += batch.num_rows
    found.empty += int((is_ok & (lengths == 0)).sum())
    found.detections += int(lengths.sum())
    found.kinds.update(_kinds(found, batch, is_ok))
    items = _items(batch)
    groups = pa.table(items).group_by(["category_id", "category"])
    wanted = [([], "count_all"), ("score", "count"), ("score", "sum")]
    for row in groups.aggregate(wanted).to_pylist():
        name = (row["category_id"], row["category"] or str(row["category_id"]))
        of = found.categories.setdefault(name, CategoryCount())
        of.detections += row["count_all"]
        of.scored += row["score_count"]
        of.score_sum += row["score_sum"] or 0.0
    found.score_counts += np.histogram(_known(items["score"]).clip(0, 1), SCORE_EDGES)[0]
    areas = _known(items["area"]).clip(SIZE_EDGES[0], SIZE_EDGES[-1])
    found.size_counts += np.histogram(areas, SIZE_EDGES)[0]


def _pick(
    found: Survey, batch: pa.RecordBatch, rows: Int64, wish: Wish, rng: np.random.Generator
) -> None:
    drawn = rng.random(len(rows))
    is_ok = _is_ok(batch)
    found.random.offer(drawn[is_ok], drawn[is_ok], rows[is_ok])
    if wish.measure is None:
        parents = pc.list_parent_indices(batch["detections"]).to_numpy()
        score = _items(batch)["score"]
        scores = score.to_numpy(zero_copy_only=False).astype(np.float64)
        measure = certainty(scores, parents, len(rows))
    else:
        measure = wish.measure[rows]
    known = is_ok & np.isfinite(measure)
    found.best.offer(-measure[known], drawn[known], rows[known])
    found.worst.offer(measure[known], drawn[known], rows[known])
    kinds = np.array(_kinds(found, batch, is_ok), object)
    failed_rows, failed_drawn = rows[~is_ok], drawn[~is_ok]
    for kind in dict.fromkeys(kinds.tolist()):
        picks = found.failed.setdefault(kind, Picks(wish.per_kind))
        of_kind = kinds == kind
        picks.offer(failed_drawn[of_kind], failed_drawn[of_kind], failed_rows[of_kind])


def _is_ok(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    is_ok: npt.NDArray[np.bool_] = pc.equal(batch["status"], "ok").to_numpy(zero_copy_only=False)
    return is_ok


def _kinds(found: Survey, batch: pa.RecordBatch, is_ok: npt.NDArray[np.bool_]) -> list[str]:
    errors = batch["error"].filter(pa.array(~is_ok)).to_pylist()
    kinds = [(error or "").partition(":")[0][:MAX_KIND] or OTHER for error in errors]
    known = set(found.kinds)
    for kind in dict.fromkeys(kinds):
        if len(known) < MOST_KINDS:
            known.add(kind)
    return [kind if kind in known else OTHER for kind in kinds]


def _items(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    flat = pc.list_flatten(batch["detections"])
    assert set(_FIELDS) <= {field.name for field in DETECTION}
    return {name: pc.struct_field(flat, name) for name in _FIELDS}


def _known(values: pa.Array) -> Float64:
    """Return the values of a column that are numbers."""
    numbers: Float64 = values.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
    return numbers[np.isfinite(numbers)]
