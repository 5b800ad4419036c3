"""Read, predict, encode, write: the batch job as one chain of Ray Data, a chunk at a time.

Every object in it is one sealed chunk (`envelope`). Pixels stay inside the actors, full-size masks
are never made, and only receipts come back to the driver. A chunk whose process died, and died again, is
dropped by Ray Data; it is then done image by image (`isolate`), as is one for which Python raised an error.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import ray.data
from ray.data import DataContext
from ray.util.annotations import RayDeprecationWarning

from jobs import encode, isolate
from jobs.actor import Model, Pool, Predict
from jobs.cluster import ClusterError, log_folder, plain_errors
from jobs.console import console
from jobs.encode import Receipt
from jobs.envelope import PredictError
from jobs.isolate import Isolation
from jobs.pace import slow_down
from jobs.read import Source
from jobs.source import READ_CPUS, Chunks, Work
from jobs.stall import observe
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
# Times that a chunk is begun again in a stage whose process died; Ray Data's own number is infinite. An
# image that kills its process takes the chunks beside it along, so once is enough before they are parted.
RETRIES = 1
# Chunks in which Python raised an error that no image is known for, until the job is stopped.
MOST_FAILED = 20
MASK_BYTES = 28 * 28 * 4


def run(
    work: Sequence[Work],
    source: Source,
    output: Store,
    model: Model,
    pool: Pool,
    footer: Mapping[str, str],
) -> Iterator[Receipt]:
    """Do the work, and yield a receipt for each chunk when its object has been written.

    Raises:
        ClusterError: Processes die and nothing gets done; images of many chunks cannot be predicted, for a
            reason that is not known of images; or a chunk can for no process be read.
        Exception: What was raised while a chunk was read or written.
    """
    context = _context(_store_bytes(work, model, pool))
    with DataContext.current(context), warnings.catch_warnings():
        # Ray has no other way yet to say how often a task is tried.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        receipts = _chain(work, source, output, model, pool, footer)
    left = {item.chunk.chunk_id: item for item in work}
    failures = 0
    with plain_errors():
        for batch in receipts.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            try:
                for receipt in encode.receipts(batch):
                    left.pop(receipt.chunk_id, None)
                    yield receipt
            except PredictError as error:
                # One of its images, most likely; more of them than that are a fault of ours.
                failures += 1
                if failures > MOST_FAILED:
                    raise ClusterError(
                        f"{failures} chunks could not be predicted, the last one since: {error}. A reason that "
                        f"so many share is not an image's: {log_folder()} on the nodes says more"
                    ) from error
                console.print(f"{error}. Its images are done one by one at the end.", markup=False)
    if left:
        isolation = Isolation(
            source=source,
            output=output,
            model=model,
            pool=pool,
            cpus=CPU_ACTOR_CPUS,
            footer=footer,
        )
        yield from isolate.run(list(left.values()), isolation)


def _context(store_bytes: int) -> DataContext:
    """Return how Ray Data is to run the chain; what the caller has set stays as it is."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=store_bytes
    )
    # Only the death of a process is an error of a block (`envelope`).
    context.max_errored_blocks = -1
    # Nodes may be long in coming, and `stall` says that they are waited for.
    context.execution_no_progress_timeout_s = -1
    context.custom_execution_callback_classes = list(context.custom_execution_callback_classes)
    slow_down(context)
    observe(context)
    return context


def _chain(
    work: Sequence[Work],
    source: Source,
    output: Store,
    model: Model,
    pool: Pool,
    footer: Mapping[str, str],
) -> ray.data.Dataset:
    return (
        ray.data.read_datasource(
            Chunks(work, source),
            override_num_blocks=len(work),
            num_cpus=READ_CPUS,
            ray_remote_args={"max_retries": RETRIES},
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
            max_task_retries=RETRIES,
        )
        .map_batches(
            partial(
                encode.encode_and_write, output=output, categories=model.categories, footer=footer
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WRITE_CPUS,
            max_retries=RETRIES,
        )
    )


def _store_bytes(work: Sequence[Work], model: Model, pool: Pool) -> int:
    """Return what the job may hold in Ray's object store."""
    sealed = max(
        item.chunk.num_bytes
        + item.chunk.num_images * model.max_detections * (MASK_BYTES if model.masks else 64)
        for item in work
    )
    return max(MIN_STORE_BYTES, sealed * CHUNKS_IN_STORE * pool.max_actors)
