"""Raw results to rows and rows to the output, in CPU tasks. No torch in here."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from ray import cloudpickle

from jobs import retries, traffic
from jobs.envelope import chunk_id_of, pickled, unseal
from jobs.store import Store
from jobs.write import Counts, put_chunk, replace_rows
from segmodel import masks
from segmodel.schema import PREDICTIONS, Category, Detections, detection_rows

# What the actors hand over: arrays as the bytes that they are, float32 and int64.
RAW = pa.schema(
    [
        ("image_id", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("error", pa.string()),
        ("boxes_xyxy", pa.large_binary()),
        ("scores", pa.large_binary()),
        ("labels", pa.large_binary()),
        ("mask_probs", pa.large_binary()),
    ]
)

RECEIPT = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("rows", pa.int64()),
        ("images", pa.int64()),
        ("detections", pa.int64()),
        ("errors", pa.map_(pa.string(), pa.int64())),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("retries", pa.map_(pa.string(), pa.int64())),
        ("traffic", pa.map_(pa.string(), pa.int64())),
        ("failure", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A chunk was written.

    Attributes:
        chunk_id: Of the plan.
        rows: Images that were worked on; fewer than `counts.images` where errors were retried.
        counts: What its object holds now.
        seconds: What each stage has spent on it.
        retries: What the store had to be asked for again, by kind.
        traffic: Bytes that were read from stores and written to them.
    """

    chunk_id: str
    rows: int
    counts: Counts
    seconds: Mapping[str, float]
    retries: Mapping[str, int]
    traffic: Mapping[str, int] = field(default_factory=dict)


def raw_row(found: Detections | None, error: str | None) -> dict[str, Any]:
    """Return the columns of `RAW` that say what was found in an image, or why nothing was."""
    if found is None:
        return {"error": error}
    height, width = found.size_hw
    return {
        "height": height,
        "width": width,
        "boxes_xyxy": found.boxes_xyxy.tobytes(),
        "scores": found.scores.tobytes(),
        "labels": found.labels.tobytes(),
        "mask_probs": None if found.mask_probs is None else found.mask_probs.tobytes(),
    }


def encode_and_write(
    block: pa.Table, output: Store, categories: Mapping[int, Category], footer: Mapping[str, str]
) -> pa.Table:
    """Turn a chunk's raw results into rows and put them as one object.

    Returns:
        A block of one row of `RECEIPT`, also where something went wrong.
    """
    try:
        return _encode_and_write(block, output, categories, footer)
    except Exception as error:  # noqa: BLE001 - the driver raises it (`envelope`)
        receipt = {"chunk_id": chunk_id_of(block), "failure": pickled(error)}
        return pa.Table.from_pylist([receipt], schema=RECEIPT)


def _encode_and_write(
    block: pa.Table, output: Store, categories: Mapping[int, Category], footer: Mapping[str, str]
) -> pa.Table:
    sealed = unseal(block)
    if sealed.table["mask_probs"].null_count < sealed.table.num_rows:
        # In a new process that takes a while, which is not what encoding takes.
        masks.warm_up()
    started = time.perf_counter()
    rows = pa.Table.from_pylist(
        [prediction(raw, categories) for raw in sealed.table.to_pylist()], schema=PREDICTIONS
    )
    encoded = time.perf_counter()
    num_rows = rows.num_rows
    with retries.counted() as again, traffic.counted() as moved:
        if sealed.positions is None:
            counts = put_chunk(output, sealed.chunk_id, rows, footer)
        else:
            counts = replace_rows(output, sealed.chunk_id, rows, sealed.positions, footer)
    seconds = {
        **sealed.seconds,
        "encode": encoded - started,
        "write": time.perf_counter() - encoded,
    }
    receipt = {
        "chunk_id": sealed.chunk_id,
        "rows": num_rows,
        "images": counts.images,
        "detections": counts.detections,
        "errors": list(counts.errors.items()),
        "seconds": list(seconds.items()),
        "retries": list((again + Counter(sealed.retries)).items()),
        "traffic": list((moved + Counter(sealed.traffic)).items()),
    }
    return pa.Table.from_pylist([receipt], schema=RECEIPT)


def prediction(raw: Mapping[str, Any], categories: Mapping[int, Category]) -> dict[str, Any]:
    """Return the row of the table that a row of `RAW` becomes."""
    row = {name: raw[name] for name in ("image_id", "shard", "key", "height", "width", "error")}
    if raw["error"] is not None:
        return {**row, "status": "error", "detections": []}
    found = _detections(raw)
    rles = None
    if found.mask_probs is not None:
        rles = masks.encode(found.mask_probs, found.boxes_xyxy, found.size_hw)
    return {**row, "status": "ok", "detections": detection_rows(found, rles, categories)}


def _detections(raw: Mapping[str, Any]) -> Detections:
    scores = np.frombuffer(raw["scores"], np.float32)
    mask_probs = None
    if raw["mask_probs"] is not None:
        values = np.frombuffer(raw["mask_probs"], np.float32)
        # Where nothing was found, any side will do.
        side = math.isqrt(len(values) // len(scores)) if len(scores) else 1
        mask_probs = values.reshape(len(scores), side, side)
    return Detections(
        boxes_xyxy=np.frombuffer(raw["boxes_xyxy"], np.float32).reshape(-1, 4),
        scores=scores,
        labels=np.frombuffer(raw["labels"], np.int64),
        mask_probs=mask_probs,
        size_hw=(raw["height"], raw["width"]),
    )


def receipts(batch: pa.Table) -> Iterator[Receipt]:
    """Yield the rows of a table of `RECEIPT`.

    Raises:
        Exception: What was raised while a chunk was read, predicted or written.
    """
    for row in batch.to_pylist():
        if row["failure"] is not None:
            raise cloudpickle.loads(row["failure"])
        counts = Counts(
            images=row["images"], detections=row["detections"], errors=dict(row["errors"])
        )
        yield Receipt(
            chunk_id=row["chunk_id"],
            rows=row["rows"],
            counts=counts,
            seconds=dict(row["seconds"]),
            retries=dict(row["retries"]),
            traffic=dict(row["traffic"]),
        )
