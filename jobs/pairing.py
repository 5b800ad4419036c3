"""Which prediction is of which image of the truth: by `image_id`, or by the names of files."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.detect import InputError

Int64: TypeAlias = npt.NDArray[np.int64]
Names: TypeAlias = Mapping[str, str]  # `image_id`, `shard` and `key` of a prediction

# In the place of the number of an image of the truth.
NONE = -1
MAX_NAMED = 3
BASE_NAME = "base name"
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to pair: what must be equal.

    Attributes:
        words: For a person.
        of_truth: From the name of an image of the truth.
        of_prediction: From the names of a prediction.
    """

    words: str
    of_truth: Callable[[str], str]
    of_prediction: Callable[[Names], str]


BY_ID = (
    Way(words="image_id", of_truth=lambda name: name, of_prediction=lambda row: row["image_id"]),
)


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _path(row: Names) -> str:
    return f"{row['shard']}/{row['key']}" if row["shard"] else row["key"]


# Strictest first. A shard that is a folder is part of a path; one that is a tar is not.
BY_FILE_NAME = (
    Way(words="path", of_truth=lambda name: name, of_prediction=_path),
    Way(
        words="path in the shard", of_truth=lambda name: name, of_prediction=lambda row: row["key"]
    ),
    Way(words=BASE_NAME, of_truth=_base, of_prediction=lambda row: _base(row["key"])),
)


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Predictions and truth, paired.

    Attributes:
        places: (N,), for each prediction the number of its image in the truth, or `NONE`.
        missing: Numbers of the images of the truth that have no prediction, ascending.
        ways: Pairs, by the words of their way.
        num_others: Predictions of images that the truth does not have.
        num_damages: Rows that stand for what cannot be told apart in a damaged shard, not for an
            image.
    """

    places: Int64
    missing: Int64
    ways: Mapping[str, int]
    num_others: int
    num_damages: int


def pair(
    truth: Sequence[str], predictions: pa.Table, ways: Sequence[Way], *, subset: bool
) -> Pairing:
    """Pair each prediction with an image of the truth.

    Args:
        truth: The name of each of its images.
        predictions: The columns `image_id`, `shard` and `key`.
        ways: What one way does not pair the next one may.
        subset: Predictions may be of other images too. What no stricter way has paired is then most
            likely one of those, so that only the first way that pairs anything is used.

    Raises:
        InputError: Two predictions, or two images of the truth, cannot be told apart, or
            predictions are of no image of the truth and `subset` does not allow it.
    """
    places = np.full(predictions.num_rows, NONE, np.int64)
    free_rows = np.flatnonzero(np.array(predictions["key"].to_pylist(), object) != "")
    num_damages = len(places) - len(free_rows)
    free_truth = np.arange(len(truth))
    used: Counter[str] = Counter()
    for way in ways:
        for row, place in _pairs(truth, free_truth, predictions, free_rows, way):
            places[row] = place
            used[way.words] += 1
        free_rows = free_rows[places[free_rows] == NONE]
        free_truth = np.setdiff1d(free_truth, places)
        if subset and used:
            break
    if len(free_rows) and not (subset and used):
        raise _unknown(truth, predictions, free_rows, ways)
    return Pairing(
        places=places,
        missing=free_truth,
        ways=used,
        num_others=len(free_rows),
        num_damages=num_damages,
    )


def _pairs(
    truth: Sequence[str], free_truth: Int64, predictions: pa.Table, free_rows: Int64, way: Way
) -> Iterator[tuple[int, int]]:
    wanted: defaultdict[str, list[int]] = defaultdict(list)
    for place in free_truth.tolist():
        wanted[way.of_truth(truth[place])].append(place)
    found: dict[str, int] = {}
    for row, names in _rows(predictions, free_rows):
        name = way.of_prediction(names)
        if name not in wanted:
            continue
        if name in found:
            both = [str(predictions["image_id"][n]) for n in (found[name], row)]
            raise _ambiguous("predictions", both, name, way)
        if len(wanted[name]) > 1:
            raise _ambiguous("images of the truth", [truth[n] for n in wanted[name]], name, way)
        found[name] = row
    for name, row in found.items():
        yield row, wanted[name][0]


def _rows(predictions: pa.Table, rows: Int64) -> Iterator[tuple[int, dict[str, Any]]]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        yield from zip(some.tolist(), predictions.take(some).to_pylist(), strict=True)


def _ambiguous(what: str, which: Sequence[str], name: str, way: Way) -> InputError:
    named = ", ".join(repr(one) for one in which[:MAX_NAMED])
    return InputError(f"{what} cannot be told apart: {named} have the same {way.words}, {name!r}")


def _unknown(
    truth: Sequence[str], predictions: pa.Table, rows: Int64, ways: Sequence[Way]
) -> InputError:
    named = ", ".join(repr(str(predictions["image_id"][row])) for row in rows[:MAX_NAMED].tolist())
    examples = ", ".join(repr(name) for name in truth[:MAX_NAMED])
    return InputError(
        f"{len(rows)} of {predictions.num_rows} predictions are of images that the truth has not, "
        f"such as {named}; the truth has {len(truth)}, such as {examples}; they are paired by "
        f"{', then '.join(way.words for way in ways)}. --subset leaves such predictions out, where "
        "there are others"
    )
