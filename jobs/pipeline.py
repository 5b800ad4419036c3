"""Read, predict, encode, write: the batch job as one chain of Ray Data, a chunk at a time.

Every object in it is one sealed chunk (`envelope`). Pixels stay inside the actors, full-size masks
are never made, and only receipts come back to the driver.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import ray.data

from jobs import encode
from jobs.actor import Model, Pool, Predict
from jobs.cluster import plain_errors
from jobs.encode import Receipt
from jobs.pace import slow_down
from jobs.read import Source
from jobs.source import READ_CPUS, Chunks, Work
from jobs.store import Store

# Encoding is short, so several share a CPU. An actor on a CPU reserves less than it uses: actors
# that hold every CPU would starve the readers and hang the job.
WRITE_CPUS = 0.25
CPU_ACTOR_CPUS = 0.5
# Two chunks are in an actor: while one is in the network, the other is decoded or handed over.
CHUNKS_IN_ACTOR = 2
# Sealed chunks that may wait before, between and behind the stages, for each actor: the object
# store holds a fixed number of chunks whatever the input's size.
CHUNKS_IN_STORE = 6
MIN_STORE_BYTES = 256 * 2**20
MASK_BYTES = 28 * 28 * 4


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
    slow_down(context)
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=_store_bytes(work, model, pool)
    )
    receipts = (
        ray.data.read_datasource(
            Chunks(work, source),
            override_num_blocks=len(work),
            num_cpus=READ_CPUS,
        )
        .map_batches(
            Predict,
            fn_constructor_args=(model, pool),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                # An actor without a chunk would load a model for nothing.
                min_size=min(pool.min_actors, len(work)),
                max_size=min(pool.max_actors, len(work)),
                initial_size=min(pool.initial_actors, len(work)),
                max_concurrent_calls_per_actor=CHUNKS_IN_ACTOR,
                enable_true_multi_threading=True,
            ),
            num_gpus=pool.gpus_per_actor or None,
            num_cpus=None if pool.gpus_per_actor else CPU_ACTOR_CPUS,
        )
        .map_batches(
            partial(
                encode.encode_and_write, output=output, categories=model.categories, footer=footer
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WRITE_CPUS,
        )
    )
    with plain_errors():
        for batch in receipts.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            yield from encode.receipts(batch)


def _store_bytes(work: Sequence[Work], model: Model, pool: Pool) -> int:
    """Return what the job may hold in Ray's object store."""
    sealed = max(
        item.chunk.num_bytes
        + item.chunk.num_images * model.max_detections * (MASK_BYTES if model.masks else 64)
        for item in work
    )
    return max(MIN_STORE_BYTES, sealed * CHUNKS_IN_STORE * pool.max_actors)
