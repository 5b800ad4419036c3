"""One row of a Ray data set is one chunk: a sealed table travels in it whole.

Ray Data may cut a block between any two rows (`SplitBlocks`, `target_max_block_size`) and may put
blocks together to fill a batch; it cannot cut a row. So every stage of the pipeline takes and gives
blocks of one row, with `batch_size=1`, and a chunk reaches its output object as it was read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

ENVELOPE = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("positions", pa.list_(pa.int64())),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("table", pa.large_binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A chunk under way.

    Attributes:
        chunk_id: Of the plan.
        positions: Rows of the chunk that are here; all of them where None.
        seconds: What each stage has spent on it.
        table: One row for each image.
    """

    chunk_id: str
    positions: tuple[int, ...] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    table: pa.Table


def seal(envelope: Envelope) -> pa.Table:
    """Return a block of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, envelope.table.schema) as writer:
        writer.write_table(envelope.table)
    payload = sink.getvalue()
    offsets = pa.array([0, payload.size], pa.int64()).buffers()[1]
    sealed = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, payload])
    positions = None if envelope.positions is None else list(envelope.positions)
    columns = [
        pa.array([envelope.chunk_id]),
        pa.array([positions], pa.list_(pa.int64())),
        pa.array([list(envelope.seconds.items())], ENVELOPE.field("seconds").type),
        sealed,
    ]
    return pa.table(columns, schema=ENVELOPE)


def unseal(block: pa.Table) -> Envelope:
    """Return what a block of one row holds; the inner table is not copied.

    Raises:
        AssertionError: Ray handed over more or less than one chunk.
    """
    assert block.num_rows == 1, f"a block of {block.num_rows} chunks"
    row = block.drop_columns("table").to_pylist()[0]
    positions = row["positions"]
    return Envelope(
        chunk_id=row["chunk_id"],
        positions=None if positions is None else tuple(positions),
        seconds=dict(row["seconds"]),
        table=pa.ipc.open_stream(_payload(block["table"])).read_all(),
    )


def _payload(column: pa.ChunkedArray) -> pa.Buffer:
    """Return the one value of a column as a view; a scalar of pyarrow would hold a copy."""
    (cells,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = cells.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[cells.offset : cells.offset + 2]
    return data.slice(start, stop - start)
