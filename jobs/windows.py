"""Windows of training rows as a Ray Data source: one read task for each window.

No torch in here: readers start in a fraction of the time.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from typing_extensions import override

from jobs.envelope import ENVELOPE, Envelope, seal
from jobs.training_set import RowGroup, read_chunk
from segmodel.order import Order, Window, deal

# Chunks of a window are fetched together: on object storage the wait for each is its cost.
FETCH_THREADS = 8
# Each block and task costs Ray about 10 ms of CPU in all of its processes: so many micro-batches share
# that, and are decoded one after the other.
BATCHES_PER_PIECE = 4


class Windows(Datasource):
    """One read task for each window."""

    def __init__(self, chunks: Sequence[RowGroup], order: Order, windows: Sequence[Window]) -> None:
        super().__init__()
        self._chunks, self._windows = chunks, windows
        self._batch_size, self._seed = order.batch_size, order.seed

    @override
    def estimate_inmemory_data_size(self) -> int:
        return sum(self._num_bytes(window) for window in self._windows)

    @override
    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(
                    read_window,
                    [self._chunks[number] for number in window.chunks],
                    window,
                    self._batch_size,
                    self._seed,
                ),
                BlockMetadata(
                    num_rows=-(-len(window.places) // BATCHES_PER_PIECE),
                    size_bytes=self._num_bytes(window),
                    input_files=None,
                    exec_stats=None,
                ),
                schema=ENVELOPE,
            )
            for window in self._windows
        ]

    def _num_bytes(self, window: Window) -> int:
        return sum(self._chunks[number].num_bytes for number in window.chunks)


def read_window(
    chunks: Sequence[RowGroup], window: Window, batch_size: int, seed: int
) -> Iterator[pa.Table]:
    """Yield the micro-batches of a window that are wanted, some at a time.

    Yields:
        Sealed tables of `training_set.ROWS` with columns for each row's shard (`origin`), micro-batch
        (`number`, in ascending order) and `epoch`; images are still compressed.
    """
    started = time.perf_counter()
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        tables = [
            table.append_column("origin", pa.array([chunk.url] * table.num_rows, pa.string()))
            for chunk, table in zip(chunks, pool.map(read_chunk, chunks), strict=True)
        ]
    # One piece of memory: taking rows out of many would copy all of it for each micro-batch.
    table = pa.concat_tables(tables).combine_chunks()
    del tables
    is_wide = pc.greater(table["width"], table["height"]).to_numpy()
    dealt = deal(window, is_wide, batch_size=batch_size, seed=seed)
    seconds = {"read": (time.perf_counter() - started) / len(dealt)}
    for at in range(0, len(window.places), BATCHES_PER_PIECE):
        places = window.places[at : at + BATCHES_PER_PIECE]
        piece = table.take(np.concatenate([dealt[place] for place in places]))
        numbers = np.repeat([window.first + p for p in places], [len(dealt[p]) for p in places])
        piece = piece.append_column("number", pa.array(numbers, pa.int64()))
        epochs = np.full(piece.num_rows, window.epoch, np.int64)
        piece = piece.append_column("epoch", pa.array(epochs))
        yield seal(Envelope(chunk_id=str(numbers[0]), seconds=seconds, table=piece))
