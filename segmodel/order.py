"""The order of training samples: one endless, seeded sequence of micro-batches over all epochs.

Rows lie in chunks that are read whole. In each epoch the chunks are permuted, so many of them in a
row make a window, and the rows of a window are shuffled: neighbours of a shard are spread over the
epoch, and a reader holds one window. Whoever knows the number of a micro-batch knows what is in it,
so a position in the data is that number: nothing is read to go on from there.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from segmodel.schema import Int64

# What a generator is for; the same seed never serves two purposes with the same numbers.
_CHUNKS, _ROWS, _SHARES = 0, 1, 5


def generator(seed: int, *key: int) -> np.random.Generator:
    """Return the random numbers that belong to a seed and a key, the same in every process.

    Args:
        seed: 0 or more.
        key: What they are for: each a number of 0 or more, below 2**32.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of the sequence that is read at once.

    Attributes:
        epoch: From 0 on.
        window: Its number in the epoch.
        chunks: The numbers of its chunks; its rows are theirs, one after the other.
        first: The number of its first micro-batch.
        places: Which of its micro-batches are wanted, counted from `first`.
    """

    epoch: int
    window: int
    chunks: tuple[int, ...]
    first: int
    places: range


@dataclass(frozen=True, kw_only=True)
class Order:
    """The sequence. Every row is in exactly one micro-batch of each epoch, or in the share of epochs that
    its chunk's weight says.

    Attributes:
        chunk_rows: The number of rows of each chunk, 1 or more.
        batch_size: Rows of a micro-batch; the last of a window may have fewer.
        window_chunks: Chunks whose rows are shuffled together.
        seed: 0 or more.
        chunk_weights: The share of epochs that have each chunk, more than 0 and at most 1; all where empty.
    """

    chunk_rows: tuple[int, ...]
    batch_size: int
    window_chunks: int
    seed: int
    chunk_weights: tuple[float, ...] = ()
    # The number of the first micro-batch of each epoch that was asked about, and of the one behind.
    # Epochs differ by a few, since the small last micro-batches of windows fall differently.
    _starts: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.chunk_rows or min(self.chunk_rows) < 1:
            raise ValueError("there is nothing to put in order, or a chunk without rows")
        if self.batch_size < 1 or self.window_chunks < 1 or self.seed < 0:
            raise ValueError("batch_size and window_chunks are 1 or more, seed is 0 or more")
        weights = self.chunk_weights
        if weights and (
            len(weights) != len(self.chunk_rows) or not all(0 < weight <= 1 for weight in weights)
        ):
            raise ValueError("there is a weight for each chunk, more than 0 and at most 1")

    def start(self, epoch: int) -> int:
        """Return the number of an epoch's first micro-batch."""
        while len(self._starts) <= epoch:
            counts = self._counts(self._chunks(len(self._starts) - 1))
            self._starts.append(self._starts[-1] + int(counts.sum()))
        return self._starts[epoch]

    def epoch(self, number: int) -> int:
        """Return the epoch in which a micro-batch is."""
        while self._starts[-1] <= number:
            self.start(len(self._starts))
        return bisect_right(self._starts, number) - 1

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """Yield the windows that hold the micro-batches `start` to `stop`, the latter left out."""
        number = start
        while number < stop:
            epoch = self.epoch(number)
            chunks = self._chunks(epoch)
            first = self.start(epoch)
            for window, count in enumerate(self._counts(chunks).tolist()):
                places = range(max(start - first, 0), min(stop - first, count))
                if places:
                    cut = chunks[window * self.window_chunks : (window + 1) * self.window_chunks]
                    yield Window(
                        epoch=epoch,
                        window=window,
                        chunks=tuple(cut.tolist()),
                        first=first,
                        places=places,
                    )
                first += count
            number = first

    def _chunks(self, epoch: int) -> Int64:
        """Return the chunks of an epoch in its order."""
        chunks = generator(self.seed, _CHUNKS, epoch).permutation(len(self.chunk_rows))
        if not self.chunk_weights:
            return chunks
        # Systematic sampling: as many chunks as their weights sum up to, give or take one, each as often as its
        # own says. What is nearly 1 of floats that should be is 1.
        offset = generator(self.seed, _SHARES, epoch).random()
        passed = np.floor(np.cumsum(np.array(self.chunk_weights)[chunks]) + offset + 1e-9)
        drawn = chunks[np.diff(passed, prepend=0.0) > 0]
        return drawn if len(drawn) else chunks[:1]

    def _counts(self, chunks: Int64) -> Int64:
        """Return how many micro-batches each window has."""
        rows = np.array(self.chunk_rows, np.int64)[chunks]
        sums = np.add.reduceat(rows, np.arange(0, len(rows), self.window_chunks))
        return -(-sums // self.batch_size)


def deal(
    window: Window, is_wide: npt.NDArray[np.bool_], *, batch_size: int, seed: int
) -> list[Int64]:
    """Deal the rows of a window to its micro-batches.

    Rows of one orientation go together as long as they fill a micro-batch, since the images of a
    batch are padded to one size; what is left of both is joined, so that the number of
    micro-batches does not depend on the images. Two groups as in detectron2's
    AspectRatioGroupedDataset.

    Args:
        window: Of `Order.windows`.
        is_wide: (R,) bool, for each row of the window whether it is wider than it is high.
        batch_size: The order's.
        seed: The order's.

    Returns:
        All of the window's micro-batches, each (1..batch_size,) int64: positions in the window.
    """
    rng = generator(seed, _ROWS, window.epoch, window.window)
    rows = rng.permutation(len(is_wide))
    batches: list[Int64] = []
    rest: list[Int64] = []
    for group in (rows[is_wide[rows]], rows[~is_wide[rows]]):
        filled = len(group) - len(group) % batch_size
        batches += _cut(group[:filled], batch_size)
        rest.append(group[filled:])
    batches += _cut(np.concatenate(rest), batch_size)
    return [batches[place] for place in rng.permutation(len(batches))]


def _cut(rows: Int64, size: int) -> list[Int64]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]
