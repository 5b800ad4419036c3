"""What this process had to ask a store for again, and why: counted, so that no trouble stays unseen."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_counts: Counter[str] = Counter()
# Loose images are fetched by many threads.
_lock = threading.Lock()


def note(kind: str) -> None:
    """Count one more retry; `kind` is what made it necessary, such as `503` or `timeout`."""
    add({kind: 1})


def add(counts: Mapping[str, int]) -> None:
    """Count retries of another process as this one's."""
    with _lock:
        _counts.update(counts)


def so_far() -> Counter[str]:
    """Return what was counted since `forget`."""
    with _lock:
        return _counts.copy()


def forget() -> None:
    """Begin to count anew: a driver does so with each job."""
    with _lock:
        _counts.clear()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Give a counter that holds the retries of the block, once the block is left.

    Those of all threads: a process works for one chunk at a time.
    """
    found: Counter[str] = Counter()
    before = so_far()
    try:
        yield found
    finally:
        found.update(so_far() - before)


def in_words(counts: Mapping[str, int]) -> str:
    """Return counts as a person reads them, the most frequent first."""
    return ", ".join(f"{number} x {kind}" for kind, number in Counter(counts).most_common())
