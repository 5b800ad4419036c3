"""Chunks as a Ray Data source: one read task, one block, one sealed chunk. No torch in here."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from typing_extensions import override

from jobs import retries, traffic
from jobs.chunks import Chunk
from jobs.envelope import ENVELOPE, Envelope, failed, seal
from jobs.read import Source, read_chunk

# Reading waits for storage: several share a CPU.
READ_CPUS = 0.25


@dataclass(frozen=True, kw_only=True)
class Work:
    """A chunk to do: all of it, or the rows at `positions`."""

    chunk: Chunk
    positions: tuple[int, ...] | None = None


class Chunks(Datasource):
    """One read task for each piece of work."""

    def __init__(self, work: Sequence[Work], source: Source) -> None:
        super().__init__()
        self._work, self._source = work, source

    @override
    def estimate_inmemory_data_size(self) -> int:
        return sum(item.chunk.num_bytes for item in self._work)

    @override
    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read_or_fail, item, self._source),
                BlockMetadata(
                    num_rows=1,
                    size_bytes=item.chunk.num_bytes,
                    input_files=None,
                    exec_stats=None,
                ),
                schema=ENVELOPE,
            )
            for item in self._work
        ]


def _read_or_fail(item: Work, source: Source) -> Iterator[pa.Table]:
    try:
        yield read_sealed(item, source)
    except Exception as error:  # noqa: BLE001 - the driver raises it (`envelope`)
        yield failed(item.chunk.chunk_id, error)


def read_sealed(item: Work, source: Source) -> pa.Table:
    """Read what is to be done as a sealed chunk of `read.IMAGES`.

    Raises:
        StorageError: The store failed for good.
    """
    started = time.perf_counter()
    chunk = item.chunk
    if item.positions is not None:
        # A retry takes loose images as they are now: putting a better one there is what it is for.
        source = replace(source, check_loose=False)
    with retries.counted() as again, traffic.counted() as moved:
        table = read_chunk(chunk, source)
    if item.positions is not None:
        table = table.take(list(item.positions))
    seconds = {"read": time.perf_counter() - started}
    return seal(
        Envelope(
            chunk_id=chunk.chunk_id,
            positions=item.positions,
            seconds=seconds,
            retries=again,
            traffic=moved,
            table=table,
        )
    )
