"""Batches of one key from a stream, with bounded look-ahead."""

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmodel.batching import ahead, batches
from segmodel.inference import GPU_BATCH_SIZE, LOOK_AHEAD_BATCHES, LOOK_AHEAD_BYTES
from segmodel.network_input import padded_size
from segmodel.settings import ModelSettings

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


@given(
    weights=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 20)), max_size=60),
    batch_size=st.integers(1, 4),
    look_ahead=st.integers(1, 40),
)
def test_what_is_held_weighs_no_more_than_one_item_above_look_ahead(
    weights: list[tuple[str, int]], batch_size: int, look_ahead: int
) -> None:
    held: Counter[int] = Counter()

    def stream() -> Iterator[tuple[str, int, int]]:
        for number, (key, weight) in enumerate(weights):
            assert held.total() < look_ahead or len(held) < batch_size
            held[number] = weight
            yield key, number, weight

    groups = batches(
        stream(), lambda item: item[0], batch_size, look_ahead, weigh=lambda item: item[2]
    )
    for group in groups:
        for _, number, _ in group:
            del held[number]
        assert 1 <= len(group) <= batch_size
    assert not held


# Height and width of COCO's photos, and how many of a hundred have them; the others are all different.
COCO_SIZES = {
    **{(480, 640): 35, (427, 640): 12, (640, 480): 9, (640, 427): 6, (426, 640): 5, (428, 640): 4},
    **{(425, 640): 3, (375, 500): 3, (481, 640): 2},
}


def coco_like(number: int, rng: random.Random) -> list[tuple[int, int]]:
    """Draw sizes of photos as COCO has them."""
    usual = list(COCO_SIZES)
    sizes = []
    for _ in range(number):
        other = (rng.randint(220, 640), 640)
        weights = [*COCO_SIZES.values(), 14, 7]
        (size,) = rng.choices([*usual, other, other[::-1]], weights)
        sizes.append(size)
    return sizes


def test_look_ahead_by_bytes_fills_the_batches_of_photos_of_many_shapes() -> None:
    """Full batches, in chunks of 256 photos: 42 % instead of 8 %, or 4.5 images in each instead of 3.2.

    What is left is the end of each chunk: of one endless stream 91 % are full, instead of none.
    """
    settings = ModelSettings(
        arch="maskrcnn_resnet50_fpn", num_classes=91, min_size=800, max_size=1333
    )
    rng = random.Random(0)
    chunks = [coco_like(256, rng) for _ in range(16)]
    endless = [[size for sizes in chunks for size in sizes]]

    def lengths(streams: list[list[tuple[int, int]]], *limits: Any) -> list[int]:
        return [
            len(group)
            for sizes in streams
            for group in batches(
                sizes, lambda size: padded_size(settings, size), GPU_BATCH_SIZE, *limits
            )
        ]

    def full(found: list[int]) -> float:
        return found.count(GPU_BATCH_SIZE) / len(found)

    def num_bytes(size: tuple[int, int]) -> int:
        return 3 * size[0] * size[1]

    waits = [(GPU_BATCH_SIZE * LOOK_AHEAD_BATCHES,), (LOOK_AHEAD_BYTES, num_bytes)]
    before, after = (lengths(chunks, *limits) for limits in waits)
    assert sum(before) == sum(after) == 4096
    assert full(before) < 0.1
    assert full(after) > 0.4
    assert len(after) < 0.75 * len(before)
    before, after = (lengths(endless, *limits) for limits in waits)
    assert full(before) < 0.01
    assert full(after) > 0.9


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
