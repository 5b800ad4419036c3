"""What many finished chunks hold: their footers, read in Ray tasks.

A footer of an object store takes 4 ms of a driver's CPU and two requests: of millions of chunks, hours.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from jobs import write
from jobs.chunks import PREDICTIONS_FOLDER
from jobs.store import Store
from jobs.tasks import in_order
from jobs.write import Counts

# Footers that one task reads, some seconds of work; fewer are read here, without a task.
FOOTERS_PER_TASK = 512

Footer = TypeVar("Footer")


def read_counts(
    output: Store, chunk_ids: Collection[str], folder: str = PREDICTIONS_FOLDER
) -> dict[str, Counts]:
    """Return what `write.read_counts` returns."""
    return _in_tasks(write.read_counts, output, chunk_ids, folder)


def read_footers(
    output: Store, chunk_ids: Collection[str], folder: str = PREDICTIONS_FOLDER
) -> dict[str, dict[str, str]]:
    """Return what `write.read_footers` returns."""
    return _in_tasks(write.read_footers, output, chunk_ids, folder)


def _in_tasks(
    read: Callable[[Store, Collection[str], str], dict[str, Footer]],
    output: Store,
    chunk_ids: Collection[str],
    folder: str,
) -> dict[str, Footer]:
    names = sorted(chunk_ids)
    if len(names) <= FOOTERS_PER_TASK:
        return read(output, names, folder)

    def read_some(some: Collection[str]) -> list[Mapping[str, Footer]]:
        return [read(output, some, folder)]

    starts = range(0, len(names), FOOTERS_PER_TASK)
    calls = ((names[start : start + FOOTERS_PER_TASK],) for start in starts)
    found: dict[str, Footer] = {}
    for (some,) in in_order(read_some, calls):
        found.update(some)
    return found
