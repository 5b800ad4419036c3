"""One row of a Ray data set is one chunk: a sealed table travels in it whole.

Ray Data may cut a block between any two rows (`SplitBlocks`, `target_max_block_size`) and may put
blocks together to fill a batch; it cannot cut a row. So every stage of the pipeline takes and gives
blocks of one row, with `batch_size=1`, and a chunk reaches its output object as it was read.

What goes wrong with a chunk travels in its envelope too. An error that a task raised would be an error of
Ray Data's block, which is dropped, as it is where a process died; only deaths are to look like one.
"""

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from ray import cloudpickle

ENVELOPE = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("positions", pa.list_(pa.int64())),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("retries", pa.map_(pa.string(), pa.int64())),
        ("traffic", pa.map_(pa.string(), pa.int64())),
        ("table", pa.large_binary()),
        ("failure", pa.binary()),
    ]
)


class PredictError(RuntimeError):
    """What was raised while a chunk's images were predicted, by a model that was loaded well."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A chunk under way.

    Attributes:
        chunk_id: Of the plan.
        positions: Rows of the chunk that are here; all of them where None.
        seconds: What each stage has spent on it.
        retries: What the store had to be asked for again, by kind (`jobs.retries`).
        traffic: Bytes that were read from stores (`jobs.traffic`).
        table: One row for each image.
    """

    chunk_id: str
    positions: tuple[int, ...] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)
    traffic: Mapping[str, int] = field(default_factory=dict)
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
        pa.array([list(envelope.retries.items())], ENVELOPE.field("retries").type),
        pa.array([list(envelope.traffic.items())], ENVELOPE.field("traffic").type),
        sealed,
        pa.array([None], pa.binary()),
    ]
    return pa.table(columns, schema=ENVELOPE)


def failed(chunk_id: str, error: Exception) -> pa.Table:
    """Return a block of one row that holds, in the place of a chunk, why there is none."""
    columns = {"chunk_id": chunk_id, "failure": pickled(error)}
    return pa.Table.from_pylist([columns], schema=ENVELOPE)


def chunk_id_of(block: pa.Table) -> str:
    """Return which chunk a block of one row holds."""
    return str(block["chunk_id"][0].as_py())


def pickled(error: Exception) -> bytes:
    """Return an error for another process of this job, with the traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        data: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(data)
    except Exception:  # noqa: BLE001 - whatever a foreign class does there, its message is to arrive
        data = cloudpickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def unseal(block: pa.Table) -> Envelope:
    """Return what a block of one row holds; the inner table is not copied.

    Raises:
        AssertionError: Ray handed over more or less than one chunk.
        Exception: What an earlier stage raised.
    """
    assert block.num_rows == 1, f"a block of {block.num_rows} chunks"
    row = block.drop_columns("table").to_pylist()[0]
    if row["failure"] is not None:
        raise cloudpickle.loads(row["failure"])
    positions = row["positions"]
    return Envelope(
        chunk_id=row["chunk_id"],
        positions=None if positions is None else tuple(positions),
        seconds=dict(row["seconds"]),
        retries=dict(row["retries"]),
        traffic=dict(row["traffic"]),
        table=pa.ipc.open_stream(_payload(block["table"])).read_all(),
    )


def _payload(column: pa.ChunkedArray) -> pa.Buffer:
    """Return the one value of a column as a view; a scalar of pyarrow would hold a copy."""
    (cells,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = cells.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[cells.offset : cells.offset + 2]
    return data.slice(start, stop - start)
