"""Every row once in each epoch, from any position on, the same in every process."""

import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from segmodel.order import Order, Window, deal, generator

Row = tuple[int, int]


def rows_of(order: Order, window: Window) -> list[Row]:
    """The rows of a window as (chunk, position in the chunk)."""
    return [(chunk, row) for chunk in window.chunks for row in range(order.chunk_rows[chunk])]


def is_wide(rows: list[Row]) -> Any:
    return np.array([(chunk * 7 + row * 3) % 5 < 3 for chunk, row in rows], np.bool_)


def sequence(order: Order, start: int, stop: int) -> dict[int, list[Row]]:
    """The rows of each micro-batch, by its number."""
    found = {}
    for window in order.windows(start, stop):
        rows = rows_of(order, window)
        dealt = deal(window, is_wide(rows), batch_size=order.batch_size, seed=order.seed)
        for place in window.places:
            assert window.first + place not in found
            found[window.first + place] = [rows[row] for row in dealt[place]]
    return found


orders = st.builds(
    Order,
    chunk_rows=st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple),
    batch_size=st.integers(1, 6),
    window_chunks=st.integers(1, 5),
    seed=st.integers(0, 2**70),
)


@given(order=orders, epoch=st.integers(0, 3))
def test_each_row_is_once_in_each_epoch(order: Order, epoch: int) -> None:
    found = sequence(order, order.start(epoch), order.start(epoch + 1))
    assert list(found) == list(range(order.start(epoch), order.start(epoch + 1)))
    rows = [row for batch in found.values() for row in batch]
    assert sorted(rows) == [
        (chunk, row) for chunk, count in enumerate(order.chunk_rows) for row in range(count)
    ]


@given(order=orders)
def test_the_number_of_micro_batches_is_known_without_the_images(order: Order) -> None:
    for window in order.windows(0, order.start(2)):
        count = len(rows_of(order, window))
        for wide in (np.zeros(count, np.bool_), np.arange(count) % 2 == 0):
            dealt = deal(window, wide, batch_size=order.batch_size, seed=order.seed)
            assert len(dealt) == -(-count // order.batch_size) == window.places.stop
            assert max(map(len, dealt)) <= order.batch_size


@given(order=orders, data=st.data())
def test_a_suffix_equals_that_of_the_whole(order: Order, data: st.DataObject) -> None:
    stop = order.start(3)
    start = data.draw(st.integers(0, stop))
    whole = sequence(order, 0, stop)
    fresh = Order(
        chunk_rows=order.chunk_rows,
        batch_size=order.batch_size,
        window_chunks=order.window_chunks,
        seed=order.seed,
    )
    assert sequence(fresh, start, stop) == {n: whole[n] for n in range(start, stop)}


@given(order=orders, number=st.integers(0, 200))
def test_a_number_lies_in_its_epoch(order: Order, number: int) -> None:
    epoch = order.epoch(number)
    assert order.start(epoch) <= number < order.start(epoch + 1)
    (window,) = order.windows(number, number + 1)
    assert (window.epoch, window.first + window.places.start) == (epoch, number)
    assert len(window.places) == 1


@given(order=orders, number=st.integers(0, 40))
def test_orientations_are_mixed_only_in_what_is_left(order: Order, number: int) -> None:
    (window,) = order.windows(number, number + 1)
    wide = is_wide(rows_of(order, window))
    dealt = deal(window, wide, batch_size=order.batch_size, seed=order.seed)
    mixed = [batch for batch in dealt if len(set(wide[batch].tolist())) == 2]
    filled = sum(sum(wide == side) // order.batch_size for side in (False, True))
    assert len(mixed) <= len(dealt) - filled <= 2


def test_seeds_and_epochs_have_their_own_order() -> None:
    def epoch(seed: int, number: int) -> list[list[Row]]:
        order = Order(chunk_rows=(8,) * 20, batch_size=4, window_chunks=5, seed=seed)
        return list(sequence(order, order.start(number), order.start(number + 1)).values())

    found = [epoch(1, 0), epoch(1, 1), epoch(2, 0), epoch(2**40 + 1, 0)]
    assert all(one != other for n, one in enumerate(found) for other in found[:n])


def test_neighbours_of_a_shard_are_spread() -> None:
    order = Order(chunk_rows=(32,) * 64, batch_size=4, window_chunks=16, seed=0)
    batches = sequence(order, 0, order.start(1)).values()
    chunks = [len({chunk for chunk, _ in batch}) for batch in batches]
    assert np.mean(chunks) > 3.5


PRINTS = """
from segmodel.order import Order, deal
import numpy as np
order = Order(chunk_rows=(5, 8, 3, 8, 8), batch_size=3, window_chunks=2, seed=11)
for window in order.windows(4, 30):
    rows = sum(order.chunk_rows[chunk] for chunk in window.chunks)
    print(window, [b.tolist() for b in deal(window, np.arange(rows) % 3 > 0, batch_size=3, seed=11)])
"""


def test_another_process_has_the_same_order() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", PRINTS],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("Window(") > 3


def test_generators_of_different_keys_differ() -> None:
    keys = [(0, (0,)), (0, (0, 0)), (0, (1,)), (1, (0,)), (0, (0, 0, 0)), (2**64, (0,))]
    draws = {tuple(generator(seed, *key).integers(0, 2**62, 4).tolist()) for seed, key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunk_rows": ()},
        {"chunk_rows": (3, 0)},
        {"batch_size": 0},
        {"window_chunks": 0},
        {"seed": -1},
    ],
)
def test_what_cannot_be_put_in_order_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nothing to put in order|1 or more"):
        Order(**{"chunk_rows": (3,), "batch_size": 1, "window_chunks": 1, "seed": 0, **wrong})


def test_a_chunk_is_in_as_many_epochs_as_its_weight_says() -> None:
    weights = (1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25)
    order = Order(chunk_rows=(3,) * 7, batch_size=2, window_chunks=2, seed=5, chunk_weights=weights)
    epochs = 400
    seen = np.zeros(7)
    for epoch in range(epochs):
        found = sequence(order, order.start(epoch), order.start(epoch + 1))
        rows = [row for batch in found.values() for row in batch]
        assert len(set(rows)) == len(rows)
        chunks = {chunk for chunk, _ in rows}
        # 4.5 chunks on average, and never more or less than the next whole numbers.
        assert len(chunks) in (4, 5)
        assert len(rows) == 3 * len(chunks)
        seen[list(chunks)] += 1
    assert (seen[:3] == epochs).all()
    assert np.abs(seen / epochs - weights).max() < 0.08
    again = Order(chunk_rows=(3,) * 7, batch_size=2, window_chunks=2, seed=5, chunk_weights=weights)
    start = order.start(7) + 1
    assert sequence(again, start, start + 5) == sequence(order, start, start + 5)


def test_weights_of_one_change_nothing_and_an_epoch_is_never_empty() -> None:
    plain = Order(chunk_rows=(2, 5, 1), batch_size=2, window_chunks=2, seed=1)
    ones = Order(
        chunk_rows=(2, 5, 1), batch_size=2, window_chunks=2, seed=1, chunk_weights=(1.0,) * 3
    )
    assert sequence(ones, 0, ones.start(3)) == sequence(plain, 0, plain.start(3))
    few = Order(chunk_rows=(2,), batch_size=2, window_chunks=1, seed=1, chunk_weights=(0.1,))
    assert few.start(5) == 5


@pytest.mark.parametrize("weights", [(0.5,), (0.0, 1.0), (1.5, 1.0), (float("nan"), 1.0)])
def test_weights_that_cannot_be_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a weight for each chunk"):
        Order(chunk_rows=(1, 1), batch_size=1, window_chunks=1, seed=0, chunk_weights=weights)
