"""Batches of one key from a stream, with bounded look-ahead."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmodel.batching import ahead, batches

Item = tuple[str, int]
Stream = list[Item]

KEYS = st.lists(st.sampled_from("abcde"), max_size=60)
LIMITS = st.integers(1, 6).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(size, 4 * size))
)


def items_of(keys: list[str]) -> Stream:
    return [(key, number) for number, key in enumerate(keys)]


def key_of(item: Item) -> str:
    return item[0]


@given(keys=KEYS, limits=LIMITS)
def test_every_item_is_in_one_batch_of_its_key(keys: list[str], limits: tuple[int, int]) -> None:
    batch_size, look_ahead = limits
    groups = list(batches(items_of(keys), key_of, batch_size, look_ahead))
    assert Counter(item for group in groups for item in group) == Counter(items_of(keys))
    for group in groups:
        assert 1 <= len(group) <= batch_size
        assert len({key for key, _ in group}) == 1


@given(keys=KEYS, limits=LIMITS)
def test_the_order_is_kept_within_a_key(keys: list[str], limits: tuple[int, int]) -> None:
    given_out = [item for group in batches(items_of(keys), key_of, *limits) for item in group]
    for key in set(keys):
        numbers = [number for other, number in given_out if other == key]
        assert numbers == sorted(numbers)


@given(keys=KEYS, limits=LIMITS)
def test_never_holds_more_than_look_ahead(keys: list[str], limits: tuple[int, int]) -> None:
    batch_size, look_ahead = limits
    taken = 0

    def stream() -> Iterator[Item]:
        nonlocal taken
        for item in items_of(keys):
            taken += 1
            yield item

    handed_on = 0
    most = 0
    for group in batches(stream(), key_of, batch_size, look_ahead):
        most = max(most, taken - handed_on)
        handed_on += len(group)
    assert handed_on == taken == len(keys)
    assert most <= look_ahead


@given(keys=KEYS, limits=LIMITS)
def test_a_full_batch_is_handed_on_before_the_next_item_is_taken(
    keys: list[str], limits: tuple[int, int]
) -> None:
    """At each moment nothing full waits, and fewer than look_ahead items do."""
    batch_size, look_ahead = limits
    waiting: Counter[str] = Counter()
    handed_on: list[Item] = []

    def stream() -> Iterator[Item]:
        for item in items_of(keys):
            assert max(waiting.values(), default=0) < batch_size
            assert waiting.total() < look_ahead
            waiting[item[0]] += 1
            yield item

    for group in batches(stream(), key_of, batch_size, look_ahead):
        waiting[group[0][0]] -= len(group)
        handed_on += group
    assert len(handed_on) == len(keys)
    assert waiting.total() == 0


def test_hands_on_the_largest_group_and_of_equals_the_oldest() -> None:
    stream = items_of(list("abcbabc"))
    groups = list(batches(stream, key_of, batch_size=3, look_ahead=4))
    assert [[key for key, _ in group] for group in groups] == [
        ["b", "b"],  # a, b, c, b wait: the largest
        ["a", "a"],  # a, c, a, b
        ["c", "c"],  # at the end the oldest first
        ["b"],
    ]


def test_a_batch_size_of_one_takes_and_gives_one_by_one() -> None:
    taken: list[int] = []

    def stream() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number

    groups = batches(stream(), lambda number: number % 2, batch_size=1, look_ahead=1)
    assert taken == []
    assert next(groups) == [0]
    assert taken == [0]
    assert next(groups) == [1]
    assert taken == [0, 1]
    assert list(groups) == [[2]]


def test_no_items_give_no_batches() -> None:
    assert list(batches([], len, batch_size=4, look_ahead=8)) == []


def test_an_error_of_the_stream_passes_through() -> None:
    def stream() -> Iterator[Item]:
        yield ("a", 0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(batches(stream(), key_of, batch_size=2, look_ahead=2))


def test_work_goes_ahead_so_far_and_no_further() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        found = ahead(lambda number: 10 // (number - 4), items(), pool, look_ahead=3)
        for number in range(9):
            item, future = next(found)
            assert item == number
            assert len(taken) <= number + 3
            if number == 4:
                with pytest.raises(ZeroDivisionError):
                    future.result()
            else:
                assert future.result() == 10 // (number - 4)
        assert next(found, None) is None
