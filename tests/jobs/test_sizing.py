import math
from dataclasses import replace

import pytest

from jobs.sizing import JOB_SHARE, START_S, Rates, Work, estimate, in_rows

WORK = Work(
    images=1_000_000,
    input_bytes=150 * 10**9,
    actors=8,
    gpus_per_actor=1,
    store_limit_bytes=2**30,
)
RATES = Rates(
    images_per_second=50, output_bytes=10_000, store_bytes=2**20, encode_seconds=0.01, source="x"
)


def test_an_estimate() -> None:
    found = estimate(WORK, RATES, price_per_gpu_hour=2.5)
    rate = 50 * 8 * JOB_SHARE
    assert found.images_per_second == rate
    assert found.seconds == START_S + 1_000_000 / rate
    assert found.gpus == 8
    assert found.gpu_hours == pytest.approx(8 * found.seconds / 3600)
    assert found.cost == pytest.approx(2.5 * found.gpu_hours)
    assert found.output_bytes == 10**10
    assert found.store_bytes == 2**20 * 10**6
    assert found.encode_cpus == pytest.approx(rate / 100)
    rows = dict(in_rows(found))
    assert rows["throughput"] == "320.00 images/s by 8 actors"
    assert rows["time"] == "about 53 min 05 s"
    assert rows["GPU hours"] == "7.1 of 8 GPUs"
    assert rows["cost of GPUs"] == "17.69"
    assert rows["in it at once"] == "at most 1.0 GiB"


def test_twice_the_gpus_take_half_the_time_and_the_same_hours() -> None:
    one = estimate(WORK, RATES, None)
    two = estimate(replace(WORK, actors=16), RATES, None)
    assert one.seconds
    assert two.seconds
    assert two.seconds - START_S == pytest.approx((one.seconds - START_S) / 2)
    start_hours = 8 * START_S / 3600
    assert two.gpu_hours == pytest.approx((one.gpu_hours or math.nan) + start_hours)


def test_parts_of_a_gpu_and_none() -> None:
    half = estimate(replace(WORK, gpus_per_actor=0.5), RATES, 1.0)
    whole = estimate(WORK, RATES, 1.0)
    assert half.gpus == 4
    assert half.gpu_hours == pytest.approx((whole.gpu_hours or math.nan) / 2)
    none = estimate(replace(WORK, gpus_per_actor=0), RATES, 1.0)
    assert (none.gpu_hours, none.cost) == (0, 0)
    assert not {"GPU hours", "cost of GPUs"} & dict(in_rows(none)).keys()


def test_without_a_rate_only_sizes_are_told() -> None:
    found = estimate(WORK, None, 1.0)
    assert (found.seconds, found.gpu_hours, found.cost, found.output_bytes) == (None,) * 4
    rows = dict(in_rows(found))
    assert rows.keys() == {"from", "to read", "in it at once"}
    assert "--calibrate" in rows["from"]


def test_what_was_not_measured_is_not_told() -> None:
    found = estimate(WORK, Rates(images_per_second=50, source="as given"), None)
    assert found.seconds is not None
    assert (found.output_bytes, found.store_bytes, found.encode_cpus, found.cost) == (None,) * 4
    assert not {"table", "CPUs for masks", "cost of GPUs"} & dict(in_rows(found)).keys()


def test_nothing_left_takes_no_time() -> None:
    assert estimate(replace(WORK, images=0), RATES, 1.0).seconds == 0
