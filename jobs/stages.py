"""How busy each stage of the job is, and which one the others wait for."""

import time
from collections import Counter
from collections.abc import Callable, Mapping

# What stands between start-up and the end: with fewer chunks there is no steady state to speak of.
FEWEST_CHUNKS = 4


class Stages:
    """Seconds of work against the seconds that there were.

    Counting begins with the first chunks' receipts, when processes have started and models are loaded.
    """

    def __init__(
        self,
        places: Callable[[], Mapping[str, float]],
        skipped: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        Args:
            places: Says how many chunks or images each stage can work on at once. Asked at the end: nodes may
                come after the beginning.
            skipped: Chunks that belong to the start.
            now: The time, seconds.
        """
        self._places, self._skipped, self._now = places, skipped, now
        self._chunks = 0
        self._seconds: Counter[str] = Counter()
        self._first = self._last = 0.0

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count a chunk that was just written, with the seconds that each stage has spent on it."""
        self._chunks += 1
        self._last = self._now()
        if self._chunks <= self._skipped:
            self._first = self._last
        else:
            self._seconds.update(seconds)

    def shares(self) -> dict[str, float]:
        """Return each stage's busy share, 0..1, the busiest first; empty after a few chunks only."""
        passed = self._last - self._first
        if self._chunks < self._skipped + FEWEST_CHUNKS or passed <= 0:
            return {}
        found = {
            name: min(1.0, self._seconds[name] / (passed * number))
            for name, number in self._places().items()
            # None where its nodes are gone already.
            if number
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def in_words(shares: Mapping[str, float]) -> str:
    """Say which stage binds, and how busy all are."""
    busy = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    return f"{busy}; the job goes as fast as {next(iter(shares))} does"
