"""Which image a path means: the one that has most of its end in common with it.

Tools that people review with put something in front of names (`photos/`, `./`, `s3://bucket/photos/`), or cut
folders off.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.detect import InputError

_ROWS_AT_ONCE = 65_536
_MAX_NAMED = 3


@dataclass(frozen=True)
class _Candidate:
    """An image that has the last part of a path: its row, its id, its path's parts, and how many are its key's."""

    row: int
    image_id: str
    parts: tuple[str, ...]
    num_in_key: int


def rows_of(paths: Sequence[str], images: pa.Table) -> list[int | None]:
    """Return the row of the image that each path means; None where there is none.

    A path and an image fit where one of the two ends with all of the other. Where nothing fits, the longest
    common end counts, of at least the last part.

    Args:
        paths: With slashes.
        images: The columns `image_id`, `shard` and `key`.

    Raises:
        InputError: A path could mean either of two images.
    """
    of_path = [tuple(path.split("/")) for path in paths]
    by_name = _candidates(images, {parts[-1] for parts in of_path})
    found = [_best(parts, by_name[parts[-1]]) for parts in of_path]
    if any(one is not None and one[1] for one in found):
        # Where some fit, what only ends alike is most likely another image.
        found = [one if one is not None and one[1] else None for one in found]
    return [None if one is None else one[0] for one in found]


def _candidates(images: pa.Table, names: set[str]) -> Mapping[str, list[_Candidate]]:
    by_name: defaultdict[str, list[_Candidate]] = defaultdict(list)
    for number, image in _each(images):
        key = tuple(image["key"].split("/"))
        if key[-1] in names:
            parts = (*image["shard"].split("/"), *key) if image["shard"] else key
            by_name[key[-1]].append(_Candidate(number, image["image_id"], parts, len(key)))
    return by_name


def _each(images: pa.Table) -> Iterator[tuple[int, dict[str, Any]]]:
    for start in range(0, images.num_rows, _ROWS_AT_ONCE):
        yield from enumerate(images.slice(start, _ROWS_AT_ONCE).to_pylist(), start)


def _best(path: tuple[str, ...], candidates: Sequence[_Candidate]) -> tuple[int, bool] | None:
    """Return the row of the best candidate, and whether it fits.

    Raises:
        InputError: There are two.
    """
    ranked = [(_common(path, one.parts), one) for one in candidates]
    if not ranked:
        return None

    def rank(of: tuple[int, _Candidate]) -> tuple[int, bool, bool]:
        common, one = of
        return common, common == len(one.parts), common >= one.num_in_key

    highest = max(map(rank, ranked))
    best = [one for one in ranked if rank(one) == highest]
    if len(best) > 1:
        named = " and ".join(repr(one.image_id) for _, one in best[:_MAX_NAMED])
        raise InputError(
            f"{'/'.join(path)!r} could be {named}: give it more of its path, as the export has it"
        )
    common, one = best[0]
    return one.row, common in (len(path), len(one.parts))


def _common(path: Sequence[str], other: Sequence[str]) -> int:
    """Return how many parts at the end are the same."""
    number = 0
    for mine, theirs in zip(reversed(path), reversed(other), strict=False):
        if mine != theirs:
            break
        number += 1
    return number
