"""Numbers by name that several threads of a process count up."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Counters:
    """Counts by name, since `forget`, and those of a block."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        # Loose images are fetched by many threads.
        self._lock = threading.Lock()

    def add(self, counts: Mapping[str, int]) -> None:
        """Count more; those of another process too."""
        with self._lock:
            self._counts.update(counts)

    def so_far(self) -> Counter[str]:
        """Return what was counted since `forget`."""
        with self._lock:
            return self._counts.copy()

    def forget(self) -> None:
        """Begin to count anew: a driver does so with each job."""
        with self._lock:
            self._counts.clear()

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Give a counter that holds what the block counted, once the block is left.

        Of all threads: a process works for one chunk at a time.
        """
        found: Counter[str] = Counter()
        before = self.so_far()
        try:
            yield found
        finally:
            found.update(self.so_far() - before)
