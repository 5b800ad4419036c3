"""How many bytes this process has read from stores and written to them."""

from typing import Literal

from jobs.counters import Counters

_traffic = Counters()
add, so_far, forget, counted = _traffic.add, _traffic.so_far, _traffic.forget, _traffic.counted


def note(way: Literal["read", "written"], num_bytes: int) -> None:
    """Count bytes of objects, once they have arrived; bodies that broke off on their way are not in it."""
    add({way: num_bytes})
