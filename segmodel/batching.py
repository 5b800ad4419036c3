"""Streams of items with bounded look-ahead: batches of one shape, and work in threads."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def batches(
    items: Iterable[Item], key: Callable[[Item], Hashable], batch_size: int, look_ahead: int
) -> Iterator[list[Item]]:
    """Group items of equal `key` into lists of at most `batch_size`.

    A full group is handed on at once. When `look_ahead` items wait, the largest group goes, full or
    not, so that at most `look_ahead` items are held. The groups depend on nothing but the items and
    their order.

    Args:
        items: Consumed one by one, only as far as the next group needs.
        key: What all members of a batch must share, for example the padded shape.
        batch_size: 1 or more.
        look_ahead: `batch_size` or more.

    Yields:
        Non-empty lists; every item is in exactly one of them, and within a key the order is kept.
    """
    waiting: defaultdict[Hashable, list[Item]] = defaultdict(list)
    held = 0
    for item in items:
        group_key = key(item)
        waiting[group_key].append(item)
        held += 1
        if len(waiting[group_key]) == batch_size:
            group = waiting.pop(group_key)
        elif held == look_ahead:
            # max() takes the first of equals: the key that has waited longest.
            group = waiting.pop(max(waiting, key=lambda k: len(waiting[k])))
        else:
            continue
        held -= len(group)
        yield group
    yield from waiting.values()


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], executor: Executor, look_ahead: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Call `function` in an executor for at most `look_ahead` items before they are asked for.

    Yields:
        Each item in its order, with what the call gave or raised.
    """
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        under_way.append((item, executor.submit(function, item)))
        if len(under_way) == look_ahead:
            yield under_way.popleft()
    yield from under_way
