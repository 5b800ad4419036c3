"""Streams of items with bounded look-ahead: batches of one shape, and work in threads."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def batches(
    items: Iterable[Item],
    key: Callable[[Item], Hashable],
    batch_size: int,
    look_ahead: int,
    weigh: Callable[[Item], int] = lambda _item: 1,
) -> Iterator[list[Item]]:
    """Group items of equal `key` into lists of at most `batch_size`.

    A full group is handed on at once. While those that wait weigh `look_ahead` or more, and are `batch_size`
    or more, the largest group goes, full or not; so what is held weighs no more than one item above that, or
    is `batch_size` items. The groups depend on nothing but the items and their order.

    Args:
        items: Consumed one by one, only as far as the next group needs.
        key: What all members of a batch must share, for example the padded shape.
        batch_size: 1 or more.
        look_ahead: In what `weigh` counts.
        weigh: What it costs to hold an item; 1 each where not given.

    Yields:
        Non-empty lists; every item is in exactly one of them, and within a key the order is kept.
    """
    waiting: defaultdict[Hashable, list[Item]] = defaultdict(list)
    held = weight = 0
    for item in items:
        group_key = key(item)
        waiting[group_key].append(item)
        held, weight = held + 1, weight + weigh(item)
        ripe = len(waiting[group_key]) == batch_size
        while ripe or (held >= batch_size and weight >= look_ahead):
            # max() takes the first of equals: the key that has waited longest.
            group = waiting.pop(max(waiting, key=lambda k: len(waiting[k])))
            held, weight = held - len(group), weight - sum(map(weigh, group))
            ripe = False
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
