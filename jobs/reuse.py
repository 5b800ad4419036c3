"""Predictions that other work has of the same images by the same model: taken over, not made again.

While a candidate waits, each night's work holds all that is new since the parent, that of the candidate too.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import pyarrow as pa

from jobs import chunks, plan, versions
from jobs.chunks import Chunk, output_path
from jobs.plan import Plan
from jobs.store import Store
from jobs.versions import READ_THREADS

# A chunk without its place in a plan, and the listed images that it is of.
Key: TypeAlias = tuple[Chunk, str]


def take_over(planned: Plan, work: Store, others: Iterable[Store]) -> int:
    """Copy chunks' objects from other work; return of how many images.

    Args:
        planned: What is to be predicted.
        work: Where.
        others: Work of the same data set, begun or finished.
    """
    missing = {key: chunk for chunk, key in _keys(planned, work)}
    images = 0
    for other in others:
        theirs = plan.load(other)
        if theirs is None or theirs.job != planned.job or not missing:
            continue
        done = plan.finished_chunks(other)
        pairs = [
            (chunk, mine)
            for chunk, key in _keys(theirs, other)
            if chunk.chunk_id in done and (mine := missing.pop(key, None)) is not None
        ]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(lambda pair: _copy(other, work, *pair), pairs))  # noqa: B023 - used up here
        images += sum(mine.num_images for _, mine in pairs)
    return images


def _copy(other: Store, work: Store, theirs: Chunk, mine: Chunk) -> None:
    work.put_if_absent(output_path(mine.chunk_id), other.read(output_path(theirs.chunk_id)))


def _keys(planned: Plan, work: Store) -> Iterator[tuple[Chunk, Key]]:
    """Yield chunks with what their predictions depend on."""
    path, listed = "", pa.table({})
    for chunk in chunks.from_table(planned.chunks):
        if not chunk.list_path:
            yield chunk, (replace(chunk, chunk_id=""), "")
            continue
        if chunk.list_path != path:
            path, listed = chunk.list_path, versions.read_table(work, chunk.list_path)
        images = listed.slice(chunk.start, chunk.num_read).to_pylist()
        yield chunk, (replace(chunk, chunk_id="", list_path="", start=0), repr(images))
