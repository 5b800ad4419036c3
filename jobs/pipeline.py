"""Read, predict, encode, write: the batch job as one chain of Ray Data, a chunk at a time.

Every object in it is one sealed chunk (`envelope`). Pixels stay inside the actors, full-size masks
are never made, and only receipts come back to the driver. A chunk whose process died, and died again, is
dropped by Ray Data; it is then done image by image (`isolate`), as is one for which Python raised an error.
"""

import gc
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import cast

import pyarrow as pa
import ray.data
from ray.data import DataContext
from ray.util.annotations import RayDeprecationWarning

from jobs import encode, isolate
from jobs.actor import Model, Pool, Predict
from jobs.chunks import Chunk
from jobs.cluster import log_folder, plain_errors
from jobs.console import console, tell
from jobs.encode import Receipt
from jobs.envelope import PredictError
from jobs.pace import slow_down
from jobs.read import Source
from jobs.source import READ_CPUS, Chunks, Work
from jobs.stall import CrowdedError, StreakError, observe
from jobs.store import Store
from jobs.supervisor import Isolation

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
# Chunks in which Python raised an error that no image is known for, until it is asked why.
MOST_FAILED = 20
# Chunks that are done image by image before the pipeline goes on, or two for each actor where that is more.
PARTED = 20
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

    Where nothing gets done any more, single images are tried. If the machine is not to blame, some of the
    chunks are done image by image, and the pipeline goes on with the rest. Where nodes are lost and the actors
    fill those that are left, it goes on with fewer actors.

    Raises:
        ClusterError: Processes die whatever the image, or all actors are gone; or a chunk can for no process
            be read.
        Exception: What was raised while a chunk was read or written.
    """
    isolation = Isolation(
        source=source,
        output=output,
        model=model,
        pool=pool,
        cpus=CPU_ACTOR_CPUS,
        footer=footer,
    )
    left = {item.chunk.chunk_id: item for item in work}
    parted = max(PARTED, 2 * pool.max_actors)
    failures: list[str] = []
    while left:
        before, raised = len(left), list[str]()
        streak, room = yield from _round(left, raised, isolation)
        # The actors stay, and keep their GPUs, for as long as what ran is not collected.
        gc.collect()
        if room:
            isolation = replace(isolation, pool=_smaller(isolation.pool, room))
            continue
        suspects = [left[name] for name in dict.fromkeys([*raised, *left])]
        if len(left) == before and _are_many(suspects):
            # Few chunks make no streak.
            streak = streak or "not one chunk could be done"
        if streak and suspects:
            # Of all that is left: all images of one shard may be bad, and the machine is not.
            isolate.refuse_broken(suspects, isolation, streak)
            suspects = suspects[:parted]
            # Where a round got nothing done, the next one would be as short.
            parted = parted if len(left) < before else 2 * parted
            console.print(_in_words(streak, suspects), markup=False)
        if suspects:
            failures += yield from isolate.run(suspects, isolation)
        for item in suspects:
            del left[item.chunk.chunk_id]
    isolate.refuse(failures)


def _are_many(work: Sequence[Work]) -> bool:
    """Say whether a machine is more likely to be broken than so many images; those of a retry are bad."""
    fresh = [item.chunk.num_images for item in work if item.positions is None]
    return sum(fresh) > isolate.PROBES


def _smaller(pool: Pool, most: int) -> Pool:
    """Return a pool of so many actors at most."""
    numbers = {
        name: min(most, getattr(pool, name))
        for name in ("min_actors", "max_actors", "initial_actors")
    }
    return replace(pool, **numbers)


def _round(
    left: dict[str, Work], raised: list[str], isolation: Isolation
) -> Generator[Receipt, None, tuple[str, int]]:
    """Stream as `_stream` does; return why nothing got done any more, and how many actors have room.

    An empty string and 0 where it came to its end.
    """
    try:
        yield from _stream(left, raised, isolation)
    except StreakError as error:
        return str(error), 0
    except CrowdedError as error:
        console.print(
            f"Nothing can be read or written: {error}. It goes on with {error.room} actors."
        )
        return "", error.room
    return "", 0


def _in_words(streak: str, suspects: Sequence[Work]) -> str:
    return (
        f"It was tried why ({streak}): images come through alone, so it is others that end the processes. "
        f"{len(suspects)} chunks are done image by image, then the job goes on."
    )


def _stream(left: dict[str, Work], raised: list[str], isolation: Isolation) -> Iterator[Receipt]:
    """Let the chunks that are left through the pipeline, and take away those that were written.

    Args:
        left: By id.
        raised: Gets the ids of those for which Python raised an error that no image is known for.
        isolation: What runs.

    Raises:
        StreakError: Processes die and nothing gets done, or images of many chunks cannot be predicted, for a
            reason that is not known of images.
        ClusterError: All actors are gone.
        Exception: What was raised while a chunk was read or written.
    """
    work = list(left.values())
    context = _context(store_bytes((item.chunk for item in work), isolation.model, isolation.pool))
    with DataContext.current(context), warnings.catch_warnings():
        # Ray has no other way yet to say how often a task is tried.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        made = _chain(work, isolation)
    batches = iter(made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    # Closed, it frees at once what the actors reserve.
    with plain_errors(), closing(cast("Generator[pa.Table]", batches)):
        for batch in batches:
            try:
                for receipt in encode.receipts(batch):
                    left.pop(receipt.chunk_id, None)
                    yield receipt
            except PredictError as error:
                # One of its images, most likely.
                raised.append(chunk_id := batch["chunk_id"][0].as_py())
                if len(raised) > MOST_FAILED:
                    raise StreakError(
                        f"{len(raised)} chunks could not be predicted, the last one since: {error}. "
                        f"{log_folder()} on the nodes says more"
                    ) from error
                words = f"{error}. Its images are done one by one at the end."
                tell(words, "chunk_failed", chunk_id=chunk_id)


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


def _chain(work: Sequence[Work], isolation: Isolation) -> ray.data.Dataset:
    model, pool = isolation.model, isolation.pool
    write = partial(
        encode.encode_and_write,
        output=isolation.output,
        categories=model.categories,
        footer=isolation.footer,
    )
    return (
        ray.data.read_datasource(
            Chunks(work, isolation.source),
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
            write,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=WRITE_CPUS,
            max_retries=RETRIES,
        )
    )


def store_bytes(chunks: Iterable[Chunk], model: Model, pool: Pool) -> int:
    """Return what the job may hold in Ray's object store."""
    each = model.max_detections * (MASK_BYTES if model.masks else 64)
    sealed = max((chunk.num_bytes + chunk.num_images * each for chunk in chunks), default=0)
    return max(MIN_STORE_BYTES, sealed * CHUNKS_IN_STORE * pool.max_actors)
