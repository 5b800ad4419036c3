"""What the pipeline lost, image by image: an image that ends its process costs its own row and no other."""

import random
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import pyarrow as pa

from jobs import stall
from jobs.cluster import ClusterError, plain_errors
from jobs.encode import Receipt
from jobs.source import Work
from jobs.supervisor import Isolation, LostError, Row, Supervisor, Turns
from jobs.write import put_chunk, replace_rows
from segmodel.schema import PREDICTIONS

# Images that are tried alone before a machine is called broken: where not even one of ten works, it is that,
# or a set of which nothing will come.
PROBES = 10


def run(work: Sequence[Work], isolation: Isolation) -> Generator[Receipt, None, list[str]]:
    """Do the work, several chunks at a time, and yield a receipt for each chunk that was written.

    Returns:
        What was wrong with each chunk that could not be done.
    """
    turns = Turns()
    threads = ThreadPoolExecutor(min(isolation.pool.max_actors, len(work)))
    failures: list[str] = []
    try:
        under_way = [threads.submit(_chunk, item, isolation, turns) for item in work]
        for done in as_completed(under_way):
            try:
                yield done.result()
            except ClusterError as error:
                failures.append(str(error))
    finally:
        turns.stop.set()
        threads.shutdown(cancel_futures=True)
    return failures


def refuse_broken(work: Sequence[Work], isolation: Isolation, streak: str) -> None:
    """Try single images after chunks were lost in a row: a broken machine ends its processes with each.

    Args:
        work: Chunks that are left, at least one.
        isolation: How images are tried.
        streak: What made them suspicious, in words.

    Raises:
        ClusterError: None of the images came through.
    """
    turns = Turns()
    threads = ThreadPoolExecutor(min(isolation.pool.max_actors, PROBES))
    spread = [work[number * len(work) // PROBES] for number in range(PROBES)]
    reasons: list[str] = []
    try:
        # Not the same image of each chunk: it may be every hundredth that is bad.
        tries = [
            threads.submit(_comes_through, item, isolation, turns, random.Random(number))
            for number, item in enumerate(spread)
        ]
        for done in as_completed(tries):
            try:
                if done.result():
                    return
            except (LostError, ClusterError) as error:
                reasons.append(str(error))
    finally:
        turns.stop.set()
        threads.shutdown(cancel_futures=True)
    if reasons:
        raise ClusterError(
            f"{streak}. Of {len(reasons)} images that were tried alone, none came through (such as: "
            f"{reasons[0]})"
        )


def _comes_through(item: Work, isolation: Isolation, turns: Turns, chance: random.Random) -> bool:
    """Try one image of a chunk; return whether there was one.

    Raises:
        LostError: It ends or stops its process.
        ClusterError: No image of the chunk can be tried.
    """
    with plain_errors(), Supervisor(item, isolation, turns) as supervisor:
        readable = supervisor.head["readable"]
        if readable:
            supervisor.row(chance.choice(readable))
        return bool(readable)


def refuse(failures: Sequence[str]) -> None:
    """Name the chunks that could not be done.

    Raises:
        ClusterError: There are some.
    """
    if failures:
        raise ClusterError(
            f"{len(failures)} chunks could not be done. {'; '.join(failures[:5])}. "
            "Run the same command again to try them again"
        )


def _chunk(item: Work, isolation: Isolation, turns: Turns) -> Receipt:
    """Read a chunk, segment its images one by one, write it."""
    started = time.perf_counter()
    chunk_id, output = item.chunk.chunk_id, isolation.output
    rows: list[Row] = []
    stall.seen.alone[chunk_id] = 0
    try:
        with plain_errors(), Supervisor(item, isolation, turns) as supervisor:
            for row in supervisor.rows():
                rows.append(row)
                stall.seen.alone[chunk_id] = len(rows)
    finally:
        stall.seen.alone.pop(chunk_id, None)
    table = pa.Table.from_pylist(rows, schema=PREDICTIONS)
    if item.positions is None:
        counts = put_chunk(output, chunk_id, table, isolation.footer)
    else:
        counts = replace_rows(output, chunk_id, table, item.positions, isolation.footer)
    return Receipt(
        chunk_id=chunk_id,
        rows=len(rows),
        counts=counts,
        seconds={**supervisor.head["seconds"], "alone": time.perf_counter() - started},
        # The driver's own are counted where they happen.
        retries=supervisor.head["retries"],
        traffic=supervisor.head["traffic"],
    )
