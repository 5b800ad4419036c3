"""What one actor does of the images of a plan, where the job is to run: measured, and nothing written."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import ray

from jobs import chunks as chunks_
from jobs import write
from jobs.actor import Model, Pool, Predict
from jobs.cluster import plain_errors
from jobs.encode import prediction
from jobs.envelope import Envelope, seal, unseal
from jobs.pipeline import CHUNKS_IN_ACTOR, CPU_ACTOR_CPUS
from jobs.plan import Plan, PlanError
from jobs.read import Source, read_chunk
from jobs.sizing import Rates
from segmodel import masks
from segmodel.schema import PREDICTIONS

# Places of the input that images are taken from, so that one odd shard does not stand for all.
PLACES = 4
# Images that load the model and fill the caches before the clock runs.
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What an actor did.

    Attributes:
        seconds: Of the actor, for all images.
        encode_seconds: Of a CPU, to make rows of what was found.
        output_bytes: Of the rows as Parquet.
        store_bytes: Of what the actor took and gave.
    """

    seconds: float
    encode_seconds: float
    output_bytes: int
    store_bytes: int


class Measured:
    """An actor of the pipeline, with a clock."""

    def __init__(self, model: Model, pool: Pool) -> None:
        self._predict, self._model = Predict(model, pool), model

    def measure(self, warm_up: pa.Table, blocks: Sequence[pa.Table]) -> Sample:
        """Segment sealed chunks, as many at a time as in the pipeline."""
        self._predict.try_out()
        masks.warm_up()
        unseal(self._predict(warm_up))
        with ThreadPoolExecutor(CHUNKS_IN_ACTOR) as threads:
            started = time.perf_counter()
            found = list(threads.map(self._predict, blocks))
            seconds = time.perf_counter() - started
        started = time.perf_counter()
        tables = [self._rows(block) for block in found]
        return Sample(
            seconds=seconds,
            encode_seconds=time.perf_counter() - started,
            output_bytes=sum(write.size_of(table) for table in tables),
            store_bytes=sum(block.nbytes for block in (*blocks, *found)),
        )

    def _rows(self, block: pa.Table) -> pa.Table:
        raw_rows = unseal(block).table.to_pylist()
        rows = [prediction(raw, self._model.categories) for raw in raw_rows]
        return pa.Table.from_pylist(rows, schema=PREDICTIONS)


def rates(planned: Plan, images: int, source: Source, model: Model, pool: Pool) -> Rates:
    """Measure one actor on some of a plan's images.

    Args:
        planned: What the job is to do.
        images: How many to run; fewer where the plan has fewer.
        source: Where they are read.
        model: What runs.
        pool: What an actor reserves.

    Raises:
        PlanError: None of them can be read.
        ClusterError: The actor died.
    """
    table = _some_images(planned, images, source)
    if not table.num_rows:
        raise PlanError("none of the images that were to be run can be read: see `error` of a run")
    # At least as many pieces as the actor has at a time, of which none is empty.
    piece = max(1, -(-table.num_rows // (2 * CHUNKS_IN_ACTOR)))
    blocks = [_sealed(table.slice(start, piece)) for start in range(0, table.num_rows, piece)]
    share = pool.gpus_per_actor
    remote = ray.remote(num_gpus=share) if share else ray.remote(num_cpus=CPU_ACTOR_CPUS)
    with plain_errors():
        actor = remote(Measured).remote(model, pool)
        try:
            sample: Sample = ray.get(actor.measure.remote(_sealed(table.slice(0, WARM_UP)), blocks))
        finally:
            ray.kill(actor)
    number = table.num_rows
    return Rates(
        images_per_second=number / sample.seconds,
        output_bytes=sample.output_bytes / number,
        store_bytes=sample.store_bytes / number,
        encode_seconds=sample.encode_seconds / number,
        source=f"{number} images, run by one actor: {number / sample.seconds:.2f} images/s",
    )


def _sealed(table: pa.Table) -> pa.Table:
    return seal(Envelope(chunk_id="calibrate", table=table))


def _some_images(planned: Plan, images: int, source: Source) -> pa.Table:
    """Return images of a plan that can be read, spread over its chunks."""
    places = min(PLACES, planned.chunks.num_rows, images)
    each = -(-images // places)
    parts = []
    for chunk in _spread(planned, places):
        rows = read_chunk(chunk, source)
        readable = [n for n, error in enumerate(rows["error"]) if not error.is_valid]
        # Taken, not sliced: a slice would hold the whole chunk.
        parts.append(rows.take(pa.array(readable[:each], pa.int64())))
    return pa.concat_tables(parts).slice(0, images).combine_chunks()


def _spread(planned: Plan, places: int) -> Iterator[chunks_.Chunk]:
    number = planned.chunks.num_rows
    rows = [place * number // places for place in range(places)]
    yield from chunks_.from_table(planned.chunks.take(rows))
