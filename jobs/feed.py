"""The feed: micro-batches of decoded and augmented samples, streamed by Ray Data to N training workers.

A read task reads a window of `segmodel.order` and passes it on in pieces; each piece is decoded and
augmented in a task of its own, outside of the training processes, and becomes blocks of one row, which
is one sealed micro-batch (`envelope`). Blocks keep their order and are dealt in turn, so worker r of N
gets the micro-batches `start + r`, `start + N + r`, ...; each of them checks that.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from jobs.cluster import plain_errors
from jobs.envelope import Envelope, seal, unseal
from jobs.pace import slow_down
from jobs.source import READ_CPUS
from jobs.training_set import RowGroup, TrainingSet, read_chunk
from jobs.windows import Windows
from segmodel.augment import Augmentation, augment
from segmodel.images import ImageError, decode
from segmodel.order import Order, generator
from segmodel.targets import Sample, TargetError, from_table, to_sample, to_table

# A training worker on CPUs reserves less than the CPU it uses, so that the tasks that decode and augment
# find room on a machine whose CPUs all have a worker: on two CPUs two workers leave room for two readers
# and one of those tasks, which keeps a core busy.
WORKER_CPUS = AUGMENT_CPUS = 0.5
# Rows that are shuffled together, and the bytes that a reader may hold for them.
WINDOW_ROWS, WINDOW_BYTES = 512, 128 * 2**20
# Windows that are read at once: one that is in use and one ahead, more for many workers. A reader
# that waits for its window to be used keeps its share of a CPU.
MIN_READERS, WORKERS_PER_READER = 2, 2
# A data set of Ray has a task for each of its windows from the start: so many at most.
SEGMENT_WINDOWS = 256
# Micro-batches that each worker holds beside the one it trains on.
PREFETCH = 2
# What the feed may hold in Ray's object store: micro-batches for each worker, at the size that an
# image is supposed to have when it is decoded, and as many bytes at least.
BATCHES_IN_STORE, SAMPLE_BYTES = 16, 3 * 2**20
MIN_STORE_BYTES = 128 * 2**20
# A block is written out when it has more bytes than this, so each micro-batch becomes its own.
ONE_ROW_PER_BLOCK = 1

# Images that the statistics of normalisation are measured on: with the paper's, thousands of batches
# would change a validation score by less than its noise.
STATISTICS_ROWS = 256

_SAMPLE, _DONOR, _STATISTICS = 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a row becomes a sample. Can be pickled.

    Attributes:
        labels: The network's output index by category id.
        augmentation: How samples are varied.
        seed: Of the random numbers; those of a sample depend on it, the epoch and the image's id.
    """

    labels: Mapping[int, int]
    augmentation: Augmentation
    seed: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of the training workers gets of the micro-batches `start` to `stop`. Can be pickled.

    Attributes:
        iterator: Its part of the data set, which all workers have to iterate over together.
        rank: The worker's number.
        num_workers: How many there are.
        start: The first micro-batch of all shares.
        stop: The one behind the last.
    """

    iterator: ray.data.DataIterator
    rank: int
    num_workers: int
    start: int
    stop: int


def make_order(training_set: TrainingSet, batch_size: int, seed: int) -> Order:
    """Return the order in which a set is trained on, with windows that a reader can hold."""
    num_chunks = len(training_set.chunks)
    by_rows = WINDOW_ROWS * num_chunks // training_set.num_rows
    by_bytes = WINDOW_BYTES * num_chunks // max(training_set.num_bytes, 1)
    return Order(
        chunk_rows=tuple(chunk.num_rows for chunk in training_set.chunks),
        batch_size=batch_size,
        window_chunks=max(1, min(by_rows, by_bytes)),
        seed=seed,
        chunk_weights=training_set.weights,
    )


def min_cpus(num_workers: int) -> float:
    """Return the CPUs that have to be free beside those of the workers: with fewer, all would wait."""
    return _num_readers(num_workers) * READ_CPUS + AUGMENT_CPUS


def has_room(free_cpus: Iterable[float], num_workers: int) -> bool:
    """Say whether the feed gets on beside the workers, wherever its readers are placed.

    A reader keeps its share of a CPU until its window is used. Where readers hold all that is free, what
    they read is never augmented, and all would wait for ever.

    Args:
        free_cpus: CPUs of each node that no worker has reserved.
        num_workers: How many there are.
    """
    to_block = sum(
        int((free - AUGMENT_CPUS) / READ_CPUS) + 1 for free in free_cpus if free >= AUGMENT_CPUS
    )
    return to_block > _num_readers(num_workers)


def segments(order: Order, start: int, stop: int, num_workers: int) -> Iterator[tuple[int, int]]:
    """Cut the micro-batches `start` to `stop` into parts for one `split` each.

    Every part, like the whole, holds as many micro-batches for each worker.
    """
    assert (stop - start) % num_workers == 0, f"{stop - start} cannot be dealt to {num_workers}"
    while start < stop:
        windows = islice(order.windows(start, stop), max(SEGMENT_WINDOWS, num_workers))
        *_, last = windows
        end = last.first + last.places.stop
        end -= (end - start) % num_workers
        yield start, end
        start = end


def split(
    training_set: TrainingSet,
    order: Order,
    recipe: Recipe,
    span: tuple[int, int],
    num_workers: int,
    *,
    reserve: bool = True,
) -> list[Share]:
    """Start to feed: one process calls this and hands each worker its share.

    Args:
        training_set: Its chunks are those of `order`.
        order: Of `make_order`.
        recipe: How rows become samples.
        span: First micro-batch and the one behind the last; one of `segments`.
        num_workers: How many take part. Nothing is read before all of them iterate.
        reserve: Whether tasks reserve a part of a CPU; to be left out where there is no room for them.
    """
    windows = list(order.windows(*span))
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    slow_down(context)
    context.target_max_block_size = ONE_ROW_PER_BLOCK
    # Of an error that Ray Data wraps, only the wrapping would pass from its process to the workers.
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=_store_bytes(training_set, order, num_workers)
    )
    with ray.data.DataContext.current(context):
        iterators = (
            ray.data.read_datasource(
                Windows(training_set.chunks, order, windows),
                override_num_blocks=len(windows),
                num_cpus=READ_CPUS if reserve else 0,
                compute=ray.data.TaskPoolStrategy(_num_readers(num_workers)),
            )
            .map_batches(
                partial(make_samples, recipe=recipe),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=AUGMENT_CPUS if reserve else 0,
                # Reservations bound the number of tasks; without them something else has to.
                compute=ray.data.TaskPoolStrategy(None if reserve else num_workers),
            )
            .streaming_split(num_workers)
        )
    start, stop = span
    return [
        Share(iterator=iterator, rank=rank, num_workers=num_workers, start=start, stop=stop)
        for rank, iterator in enumerate(iterators)
    ]


def batches(share: Share) -> Iterator[tuple[int, list[Sample]]]:
    """Yield a worker's micro-batches, each with its number; pixels cannot be written.

    Raises:
        TargetError: A row cannot be trained on; the message names the image and the shard.
        StorageError: A shard changed, is damaged, or cannot be read.
        AssertionError: Ray dealt another micro-batch than the one that is due, or too few.
    """
    due = range(share.start + share.rank, share.stop, share.num_workers)
    blocks = share.iterator.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH
    )
    got = 0
    with plain_errors():
        for block in blocks:
            sealed = unseal(block)
            number = int(sealed.chunk_id)
            assert got < len(due), f"micro-batch {number} is one more than the {got} of this worker"
            assert number == due[got], f"micro-batch {number} was dealt, {due[got]} is due"
            yield number, from_table(sealed.table)
            got += 1
    assert got == len(due), f"{got} micro-batches were dealt, {len(due)} are due"


def fixed_samples(
    training_set: TrainingSet, recipe: Recipe, batch_size: int, rank: int, num_workers: int
) -> Iterator[list[Sample]]:
    """Yield a worker's batches of the same few images, varied the same way, whenever it is called."""
    chunks = training_set.chunks
    order = generator(recipe.seed, _STATISTICS).permutation(len(chunks))
    rows = _rows_of(chunks[number] for number in order)
    mine = islice(rows, rank, STATISTICS_ROWS, num_workers)
    while some := list(islice(mine, batch_size)):
        yield _augmented(some, recipe)


def _rows_of(chunks: Iterable[RowGroup]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        for row in read_chunk(chunk).to_pylist():
            yield {**row, "origin": chunk.url, "epoch": 0}


def make_samples(block: pa.Table, recipe: Recipe) -> Iterator[pa.Table]:
    """Decode and augment a sealed piece of a window; yield its micro-batches, sealed, of `SAMPLES`."""
    piece = unseal(block)
    rows = piece.table.to_pylist()
    for number, batch in groupby(rows, itemgetter("number")):
        started = time.perf_counter()
        made = to_table(_augmented(list(batch), recipe))
        seconds = {**piece.seconds, "augment": time.perf_counter() - started}
        yield seal(Envelope(chunk_id=str(number), seconds=seconds, table=made))


def _augmented(rows: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[Sample]:
    samples = [_sample(row, recipe) for row in rows]
    made = []
    for number, row in enumerate(rows):
        donor = None
        if recipe.augmentation.copy_paste:
            donor = _donor(samples, number, _generator(recipe.seed, _DONOR, row))
        rng = _generator(recipe.seed, _SAMPLE, row)
        made.append(augment(samples[number], recipe.augmentation, rng, donor))
    return made


def _sample(row: Mapping[str, Any], recipe: Recipe) -> Sample:
    try:
        return to_sample(row, decode(row["data"]), recipe.labels)
    except ImageError as error:
        raise TargetError(
            f"{row['image_id']} in {row['origin']} cannot be decoded: {error}: pack the set again "
            "without it"
        ) from error
    except TargetError as error:
        raise TargetError(f"{error} (in {row['origin']})") from error


def _generator(seed: int, purpose: int, row: Mapping[str, Any]) -> np.random.Generator:
    """Return the random numbers of a row in its epoch: no worker, batch-mate or restart changes them."""
    digest = blake2b(row["image_id"].encode(), digest_size=8).digest()
    return generator(seed, purpose, row["epoch"], *np.frombuffer(digest, np.uint32).tolist())


def _donor(samples: Sequence[Sample], number: int, rng: np.random.Generator) -> Sample | None:
    """Choose another sample of the micro-batch, whose instances may be pasted into this one."""
    others = [*samples[:number], *samples[number + 1 :]]
    return others[rng.integers(len(others))] if others else None


def _num_readers(num_workers: int) -> int:
    return max(MIN_READERS, num_workers // WORKERS_PER_READER)


def _store_bytes(training_set: TrainingSet, order: Order, num_workers: int) -> int:
    """Return what the feed may hold in Ray's object store."""
    decoded = order.batch_size * SAMPLE_BYTES * BATCHES_IN_STORE * num_workers
    sealed = order.window_chunks * training_set.num_bytes // len(training_set.chunks)
    return max(MIN_STORE_BYTES, decoded + sealed)
