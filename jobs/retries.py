"""What this process had to ask a store for again, and why: counted, so that no trouble stays unseen."""

from collections import Counter
from collections.abc import Mapping

from jobs.counters import Counters

_retries = Counters()
add, so_far, forget, counted = _retries.add, _retries.so_far, _retries.forget, _retries.counted


def note(kind: str) -> None:
    """Count one more retry; `kind` is what made it necessary, such as `503` or `timeout`."""
    add({kind: 1})


def in_words(counts: Mapping[str, int]) -> str:
    """Return counts as a person reads them, the most frequent first."""
    return ", ".join(f"{number} x {kind}" for kind, number in Counter(counts).most_common())
