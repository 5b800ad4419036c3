"""Read, predict, encode, write: the batch job as one chain of Ray Data, a chunk at a time.

Every object in it is one sealed chunk (`envelope`). Pixels stay inside the actors, full-size masks are
never made, and only receipts come back to the driver.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from jobs.chunks import Chunk
from jobs.envelope import ENVELOPE, Envelope, seal, unseal
from jobs.read import Source, read_chunk
from jobs.storage import Store
from jobs.write import Counts, put_chunk, replace_rows
from segmodel import masks
from segmodel.bundle import Bundle
from segmodel.images import ImageError, decode
from segmodel.inference import Image, Predictor
from segmodel.schema import PREDICTIONS, Category, Detections, detection_rows
from segmodel.settings import Precision

# Reading waits for storage and encoding is short, so several of them share a CPU. An actor on a CPU
# reserves less than it uses: actors that hold every CPU would starve the readers and hang the job.
READ_CPUS = 0.25
WRITE_CPUS = 0.25
CPU_ACTOR_CPUS = 0.5
# Two chunks are in an actor: while one is in the network, the other is decoded or handed over.
CHUNKS_IN_ACTOR = 2
# Sealed chunks that may wait before, between and behind the stages, for each actor: the object store
# holds a fixed number of chunks whatever the input's size.
CHUNKS_IN_STORE = 6
MIN_STORE_BYTES = 256 * 2**20
MASK_BYTES = 28 * 28 * 4
# Decoded images that wait for the network, for each decoding thread.
DECODED_AHEAD = 2

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
    ]
)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How the actors are laid out.

    Attributes:
        min_actors: The pool never has fewer.
        max_actors: Nor more.
        gpus_per_actor: A share of one GPU, or several; 0 on CPUs.
        threads: For decoding, and on a CPU for the network.
        batch_size: Images in a batch; the device's default where None.
    """

    min_actors: int
    max_actors: int
    gpus_per_actor: float
    threads: int
    batch_size: int | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the actors run.

    Attributes:
        bundle: In Ray's object store, so that every node gets it without a shared disk.
        categories: By label.
        precision: Of the arithmetic.
        score_threshold: Detections below are dropped.
        max_detections: For each image.
        masks: False for boxes only.
        max_pixels: Larger images are refused.
    """

    bundle: "ray.ObjectRef[Bundle]"
    categories: Mapping[int, Category]
    precision: Precision
    score_threshold: float
    max_detections: int
    masks: bool
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A chunk was written.

    Attributes:
        chunk_id: Of the plan.
        rows: Images that were worked on; fewer than `counts.images` where errors were retried.
        counts: What its object holds now.
        seconds: What each stage has spent on it.
    """

    chunk_id: str
    rows: int
    counts: Counts
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A chunk to do: all of it, or the rows at `positions`."""

    chunk: Chunk
    positions: tuple[int, ...] | None = None


def run(
    work: Sequence[Work],
    source: Source,
    output: Store,
    model: Model,
    pool: Pool,
    footer: Mapping[str, str],
) -> Iterator[Receipt]:
    """Do the work, and yield a receipt for each chunk when its object has been written."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=_store_bytes(work, model, pool)
    )
    receipts = (
        ray.data.read_datasource(
            _Chunks(work, source),
            override_num_blocks=len(work),
            num_cpus=READ_CPUS,
        )
        .map_batches(
            _Predict,
            fn_constructor_args=(model, pool),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.min_actors,
                max_size=pool.max_actors,
                initial_size=pool.min_actors,
                max_concurrent_calls_per_actor=CHUNKS_IN_ACTOR,
                enable_true_multi_threading=True,
            ),
            num_gpus=pool.gpus_per_actor or None,
            num_cpus=None if pool.gpus_per_actor else CPU_ACTOR_CPUS,
        )
        .map_batches(
            partial(encode_and_write, output=output, categories=model.categories, footer=footer),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WRITE_CPUS,
        )
    )
    for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            counts = Counts(
                images=row["images"], detections=row["detections"], errors=dict(row["errors"])
            )
            yield Receipt(
                chunk_id=row["chunk_id"],
                rows=row["rows"],
                counts=counts,
                seconds=dict(row["seconds"]),
            )


def _store_bytes(work: Sequence[Work], model: Model, pool: Pool) -> int:
    """Return what the job may hold in Ray's object store."""
    sealed = max(
        item.chunk.num_bytes
        + item.chunk.num_images * model.max_detections * (MASK_BYTES if model.masks else 64)
        for item in work
    )
    return max(MIN_STORE_BYTES, sealed * CHUNKS_IN_STORE * pool.max_actors)


class _Chunks(Datasource):
    """One read task, one block, one sealed chunk for each piece of work."""

    def __init__(self, work: Sequence[Work], source: Source) -> None:
        super().__init__()
        self._work, self._source = work, source

    def estimate_inmemory_data_size(self) -> int:
        return sum(item.chunk.num_bytes for item in self._work)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - Ray's signature; a chunk is a block of its own
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: Any = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read, item, self._source),
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


def _read(item: Work, source: Source) -> Iterator[pa.Table]:
    started = time.perf_counter()
    chunk = item.chunk
    if item.positions is not None:
        # A retry takes loose images as they are now: putting a better one there is what it is for.
        source = replace(source, check_loose=False)
    table = read_chunk(chunk, source)
    if item.positions is not None:
        table = table.take(list(item.positions))
    seconds = {"read": time.perf_counter() - started}
    yield seal(
        Envelope(chunk_id=chunk.chunk_id, positions=item.positions, seconds=seconds, table=table)
    )


class _Predict:
    """An actor: decodes in threads beside the network."""

    def __init__(self, model: Model, pool: Pool) -> None:
        if not pool.gpus_per_actor:
            torch.set_num_threads(pool.threads)
        self.max_pixels = model.max_pixels
        self.window = pool.threads * DECODED_AHEAD
        self.decoders = ThreadPoolExecutor(pool.threads, thread_name_prefix="decode")
        self.predictor = Predictor(
            ray.get(model.bundle),
            "cuda" if pool.gpus_per_actor else "cpu",
            model.precision,
            score_threshold=model.score_threshold,
            max_detections=model.max_detections,
            batch_size=pool.batch_size,
            masks=model.masks,
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        started = time.perf_counter()
        sealed = unseal(block)
        errors: dict[int, str] = {}
        decoded = self._decoded(sealed.table, errors)
        found = dict(self.predictor.stream(decoded))
        names = sealed.table.select(["image_id", "shard", "key"]).to_pylist()
        rows = [_raw_row(found.get(n), errors.get(n)) | name for n, name in enumerate(names)]
        return seal(
            Envelope(
                chunk_id=sealed.chunk_id,
                positions=sealed.positions,
                seconds={**sealed.seconds, "predict": time.perf_counter() - started},
                table=pa.Table.from_pylist(rows, schema=RAW),
            )
        )

    def _decoded(self, images: pa.Table, errors: dict[int, str]) -> Iterator[tuple[int, Image]]:
        """Yield number and pixels of the images that can be decoded; note the errors of the others."""
        under_way: deque[tuple[int, Future[Image]]] = deque()

        def next_decoded() -> Iterator[tuple[int, Image]]:
            number, future = under_way.popleft()
            try:
                yield number, future.result()
            except ImageError as error:
                errors[number] = str(error)

        for number, (data, error) in enumerate(zip(images["data"], images["error"], strict=True)):
            if error.is_valid:
                errors[number] = error.as_py()
                continue
            future = self.decoders.submit(decode, data.as_buffer().to_pybytes(), self.max_pixels)
            under_way.append((number, future))
            if len(under_way) == self.window:
                yield from next_decoded()
        while under_way:
            yield from next_decoded()


def _raw_row(found: Detections | None, error: str | None) -> dict[str, Any]:
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
        A block of one row of `RECEIPT`.
    """
    started = time.perf_counter()
    sealed = unseal(block)
    rows = pa.Table.from_pylist(
        [_row(raw, categories) for raw in sealed.table.to_pylist()], schema=PREDICTIONS
    )
    encoded = time.perf_counter()
    num_rows = rows.num_rows
    if sealed.positions is not None:
        rows = replace_rows(output, sealed.chunk_id, rows, sealed.positions)
    counts = put_chunk(output, sealed.chunk_id, rows, footer)
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
    }
    return pa.Table.from_pylist([receipt], schema=RECEIPT)


def _row(raw: Mapping[str, Any], categories: Mapping[int, Category]) -> dict[str, Any]:
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
        side = math.isqrt(len(values) // len(scores)) if len(scores) else 0
        mask_probs = values.reshape(len(scores), side, side)
    return Detections(
        boxes_xyxy=np.frombuffer(raw["boxes_xyxy"], np.float32).reshape(-1, 4),
        scores=scores,
        labels=np.frombuffer(raw["labels"], np.int64),
        mask_probs=mask_probs,
        size_hw=(raw["height"], raw["width"]),
    )
