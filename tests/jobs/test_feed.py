"""Micro-batches by Ray: every worker gets its own in turn, the same ones after a restart."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from jobs import feed, training_set, write
from jobs.envelope import unseal
from jobs.feed import Recipe, Share
from jobs.storage import open_store
from jobs.store import ChangedError
from jobs.training_set import RowGroup, TrainingSet
from jobs.windows import read_window
from segmodel.augment import Augmentation
from segmodel.order import Order, deal
from segmodel.targets import Sample, TargetError, from_table

NUM_ROWS, BATCH_SIZE = 67, 4
VARIED = Augmentation(
    min_size=24, max_size=64, size_hw=(40, 40), scale=(0.5, 2), flip="horizontal", copy_paste=1
)
PutPacked = Callable[..., list[dict[str, Any]]]
Batch = tuple[int, list[Sample]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, put_packed: PutPacked) -> TrainingSet:
    root = tmp_path_factory.mktemp("packed")
    put_packed(open_store(str(root)), NUM_ROWS)
    return training_set.load([str(root)], None)


def make_order(packed: TrainingSet, batch_size: int = BATCH_SIZE, seed: int = 5) -> Order:
    rows = tuple(chunk.num_rows for chunk in packed.chunks)
    return Order(chunk_rows=rows, batch_size=batch_size, window_chunks=4, seed=seed)


def recipe(augmentation: Augmentation = VARIED, seed: int = 5) -> Recipe:
    return Recipe(labels={1: 1, 3: 2}, augmentation=augmentation, seed=seed)


def without_ray(packed: TrainingSet, order: Order, how: Recipe, stop: int) -> Iterator[Batch]:
    """What the feed gives, one function after the other in this process."""
    for window in order.windows(0, stop):
        chunks = [packed.chunks[number] for number in window.chunks]
        for block in read_window(chunks, window, order.batch_size, order.seed):
            for made in feed.make_samples(block, how):
                sealed = unseal(made)
                yield int(sealed.chunk_id), from_table(sealed.table)


def consume(share: Share) -> list[Batch]:
    return list(feed.batches(share))


def in_threads(shares: list[Share]) -> list[list[Batch]]:
    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(consume, shares))


def in_processes(shares: list[Share]) -> list[list[Batch]]:
    remote = ray.remote(num_cpus=0.25)(consume)
    found: list[list[Batch]] = ray.get([remote.remote(share) for share in shares])
    return found


def contents(sample: Sample) -> tuple[Any, ...]:
    masks = [(crop.top, crop.left, crop.mask.tolist()) for crop in sample.masks]
    return sample.image_id, sample.image.tobytes(), sample.labels.tolist(), masks


def by_number(batches: list[Batch] | Iterator[Batch]) -> dict[int, list[tuple[Any, ...]]]:
    return {number: [contents(sample) for sample in samples] for number, samples in batches}


@pytest.mark.ray
@pytest.mark.parametrize(("num_workers", "consumers"), [(2, in_processes), (3, in_threads)])
def test_workers_get_their_micro_batches_in_turn(
    ray_local: None,
    packed: TrainingSet,
    num_workers: int,
    consumers: Callable[[list[Share]], list[list[Batch]]],
) -> None:
    order = make_order(packed)
    # From within a window to within another one, two epochs later.
    start = 3
    stop = start + (order.start(2) + 8 - start) // num_workers * num_workers
    found = consumers(feed.split(packed, order, recipe(), (start, stop), num_workers))
    for rank, batches in enumerate(found):
        assert [number for number, _ in batches] == list(range(start + rank, stop, num_workers))
    dealt = {number: samples for batches in found for number, samples in batches}
    expected = by_number(without_ray(packed, order, recipe(), stop))
    assert by_number(iter(dealt.items())) == {n: expected[n] for n in range(start, stop)}


@pytest.mark.ray
def test_what_cannot_be_trained_on_stops_training_and_is_named(
    ray_local: None, tmp_path: Path, put_packed: PutPacked
) -> None:
    put_packed(open_store(str(tmp_path)), 10, cut={4})
    packed = training_set.load([str(tmp_path)], None)
    (share,) = feed.split(packed, make_order(packed), recipe(), (0, 3), 1)
    with pytest.raises(TargetError, match=r"all#4\.jpg in .*00000000\.parquet cannot be decoded"):
        consume(share)
    put_packed(open_store(str(tmp_path)), 11)
    with pytest.raises(ChangedError, match=r"00000000\.parquet changed"):
        consume(share)


@pytest.mark.ray
def test_a_micro_batch_out_of_turn_is_refused(ray_local: None, packed: TrainingSet) -> None:
    (share,) = feed.split(packed, make_order(packed), recipe(), (0, 2), 1)
    with pytest.raises(AssertionError, match="micro-batch 0 was dealt, 1 is due"):
        consume(replace(share, start=1))
    with pytest.raises(AssertionError, match="2 micro-batches were dealt, 3 are due"):
        consume(replace(share, stop=3))
    with pytest.raises(AssertionError, match="micro-batch 1 is one more than the 1"):
        consume(replace(share, stop=1))


def test_a_sample_depends_on_seed_epoch_and_image_alone(packed: TrainingSet) -> None:
    alone = replace(VARIED, copy_paste=0.0)
    two_epochs = make_order(packed).start(2)
    order, other = make_order(packed), make_order(packed, batch_size=3, seed=6)
    first = samples_by_image(without_ray(packed, order, recipe(alone), order.start(1)))
    # Other batches, in another order: the recipe's seed alone counts.
    again = samples_by_image(without_ray(packed, other, recipe(alone), other.start(1)))
    assert first == again
    both = list(without_ray(packed, order, recipe(alone), two_epochs))
    second = samples_by_image(iter(batch for batch in both if batch[0] >= order.start(1)))
    assert first.keys() == second.keys()
    assert sum(first[name] == second[name] for name in first) < NUM_ROWS // 4
    seeded = samples_by_image(without_ray(packed, order, recipe(alone, seed=6), order.start(1)))
    assert sum(first[name] == seeded[name] for name in first) < NUM_ROWS // 4


def samples_by_image(batches: Iterator[Batch]) -> dict[str, tuple[Any, ...]]:
    return {sample.image_id: contents(sample) for _, samples in batches for sample in samples}


def test_instances_are_pasted_from_another_sample_of_the_micro_batch(packed: TrainingSet) -> None:
    order = make_order(packed)
    pasted = [s for _, b in without_ray(packed, order, recipe(), order.start(1)) for s in b]
    alone = replace(VARIED, copy_paste=0.0)
    plain = [s for _, b in without_ray(packed, order, recipe(alone), order.start(1)) for s in b]
    assert [s.image_id for s in pasted] == [s.image_id for s in plain]
    assert max(len(sample.masks) for sample in plain) == 1
    assert sum(len(sample.masks) == 2 for sample in pasted) > NUM_ROWS // 4


def test_a_micro_batch_of_one_has_no_donor(packed: TrainingSet) -> None:
    order = make_order(packed, batch_size=1)
    found = [samples for _, samples in without_ray(packed, order, recipe(), 5)]
    assert all(len(samples) == 1 and len(samples[0].masks) <= 1 for samples in found)


def test_a_category_that_the_model_lacks_is_refused(packed: TrainingSet) -> None:
    lacking = replace(recipe(), labels={1: 1})
    with pytest.raises(TargetError, match=r"category 3 \(car\) is not one .*\(in .*\.parquet\)"):
        next(without_ray(packed, make_order(packed), lacking, 1))


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_segments_hold_as_many_micro_batches_for_each_worker(
    packed: TrainingSet, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "SEGMENT_WINDOWS", 3)
    order = make_order(packed)
    found = list(feed.segments(order, 7, 7 + 60, num_workers))
    assert [start for start, _ in found] == [7, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == 67
    assert all((stop - start) % num_workers == 0 for start, stop in found)
    assert all(len(list(order.windows(*span))) <= max(3, num_workers) for span in found)
    assert list(feed.segments(order, 7, 7, num_workers)) == []


def test_windows_are_bounded_in_rows_and_bytes(packed: TrainingSet) -> None:
    def window_chunks(rows: int, num_bytes: int) -> int:
        chunk = replace(packed.chunks[0], num_rows=rows, num_bytes=num_bytes)
        return feed.make_order(many(chunk), 2, 0).window_chunks

    def many(chunk: RowGroup) -> TrainingSet:
        return replace(
            packed,
            chunks=(chunk,) * 100,
            num_rows=chunk.num_rows * 100,
            num_bytes=chunk.num_bytes * 100,
        )

    assert window_chunks(32, 10**6) == 16
    assert window_chunks(32, 32 * 10**6) == 4
    assert window_chunks(10_000, 10**9) == 1


@pytest.mark.parametrize("image_bytes", [2**16, 2**20, 4 * 2**20])
def test_a_set_sorted_by_class_is_shuffled_whatever_the_size_of_its_images(
    packed: TrainingSet, image_bytes: int
) -> None:
    num_classes, per_class = 20, 256
    one = pa.table({"image": pa.array([bytes(image_bytes)], pa.large_binary())})
    group_rows = write.training_rows_per_group(one)
    groups = num_classes * per_class // group_rows
    chunk = replace(packed.chunks[0], num_rows=group_rows, num_bytes=group_rows * image_bytes)
    found = replace(
        packed,
        chunks=(chunk,) * groups,
        num_rows=groups * group_rows,
        num_bytes=groups * chunk.num_bytes,
    )
    order = feed.make_order(found, 4, 0)
    steps = []
    for window in order.windows(0, order.start(1)):
        rows = np.concatenate([n * group_rows + np.arange(group_rows) for n in window.chunks])
        dealt = deal(window, np.ones(len(rows), np.bool_), batch_size=4, seed=0)
        batches = [rows[batch] // per_class for batch in dealt]
        # Two workers with four images each.
        pairs = zip(batches[::2], batches[1::2], strict=False)
        steps += [len({*one, *other}) for one, other in pairs]
    # Of eight images drawn from everything there would be 6.7 classes.
    assert np.mean(steps) > 5
    assert min(steps) > 1


@pytest.mark.ray
def test_a_feed_without_room_gets_on_without_reservations(
    ray_local: None, packed: TrainingSet
) -> None:
    order = make_order(packed)
    stop = order.start(1) // 2 * 2
    with every_cpu_taken():
        shares = feed.split(packed, order, recipe(), (0, stop), 2, reserve=False)
        found = in_threads(shares)
    assert [[n for n, _ in batches] for batches in found] == [
        list(range(0, stop, 2)),
        list(range(1, stop, 2)),
    ]


@contextmanager
def every_cpu_taken() -> Iterator[None]:
    group = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert group.wait(60)
    yield
    remove_placement_group(group)


@pytest.mark.parametrize(
    ("free_cpus", "num_workers", "has_room"),
    [
        ([1.0], 2, True),
        ([0.5], 1, False),
        ([0.0, 0.0], 1, False),
        # Two readers on different nodes would leave a quarter on each.
        ([0.5, 0.5], 6, False),
        ([0.5, 0.5], 2, False),
        ([0.5, 0.5, 0.5], 2, True),
        ([0.25] * 8, 2, False),
        ([15.5] * 4, 32, True),
    ],
)
def test_room_is_there_wherever_readers_are_placed(
    free_cpus: list[float], num_workers: int, has_room: bool
) -> None:
    assert feed.has_room(free_cpus, num_workers) is has_room


def test_two_workers_of_half_a_cpu_and_their_feed_fit_on_two() -> None:
    assert 2 * feed.WORKER_CPUS + feed.min_cpus(2) <= 2
    assert feed.has_room([2 - 2 * feed.WORKER_CPUS], 2)
    assert feed.min_cpus(8) == 1.5


def test_fixed_samples_are_the_same_few_whoever_shares_them(
    packed: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "STATISTICS_ROWS", 30)
    without_donors = recipe(replace(VARIED, copy_paste=0))

    def drawn(num_workers: int) -> list[tuple[Any, ...]]:
        parts = [
            feed.fixed_samples(packed, without_donors, BATCH_SIZE, rank, num_workers)
            for rank in range(num_workers)
        ]
        batches = [batch for part in parts for batch in part]
        assert all(len(batch) <= BATCH_SIZE for batch in batches)
        return sorted(contents(sample) for batch in batches for sample in batch)

    alone = drawn(1)
    assert len({found[0] for found in alone}) == 30
    assert drawn(3) == alone
