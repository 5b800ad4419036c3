"""How busy each stage of the job is, and which one the others wait for."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# What stands between start-up and the end: with fewer chunks there is no steady state to speak of.
FEWEST_CHUNKS = 4


@dataclass(frozen=True, kw_only=True)
class Busy:
    """How busy the stages were.

    Attributes:
        shares: Of each stage, 0..1, the busiest first; empty where nothing was done.
        with_start: Whether that is of the whole run, start-up included, for want of a steady state.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    with_start: bool = False


class Stages:
    """Seconds of work against the seconds that there were.

    Counting begins with the first chunks' receipts, when processes have started and models are loaded; where
    few chunks come after those, all count, from the start on.
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
        self._at_start, self._since = Counter[str](), Counter[str]()
        self._started = self._first = self._last = now()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count a chunk that was just written, with the seconds that each stage has spent on it."""
        self._chunks += 1
        self._last = self._now()
        if self._chunks <= self._skipped:
            self._first = self._last
        counted = self._at_start if self._chunks <= self._skipped else self._since
        counted.update(seconds)

    def busy(self) -> Busy:
        """Return each stage's busy share, of the steady state where there was one."""
        with_start = self._chunks < self._skipped + FEWEST_CHUNKS
        spent, passed = self._since, self._last - self._first
        if with_start:
            spent, passed = self._at_start + self._since, self._last - self._started
        if not self._chunks or passed <= 0:
            return Busy()
        found = {
            name: min(1.0, spent[name] / (passed * number))
            for name, number in self._places().items()
            # None where its nodes are gone already.
            if number
        }
        shares = dict(sorted(found.items(), key=lambda item: -item[1]))
        return Busy(shares=shares, with_start=with_start)


def in_words(busy: Busy) -> str:
    """Say how busy all stages are, and which one binds."""
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in busy.shares.items())
    busiest = next(iter(busy.shares))
    if busy.with_start:
        why = "too few chunks for a steady state"
        return f"{shares}, start-up included ({why}); {busiest} was the busiest"
    return f"{shares}; the job goes as fast as {busiest} does"
