"""Busy shares of the stages, from the seconds that finished chunks bring along."""

import pytest

from jobs.stages import FEWEST_CHUNKS, Busy, Stages, in_words


def test_shares_are_of_the_time_after_the_start() -> None:
    clock = iter([0.0, 100.0, 110.0, 112.0, 114.0, 116.0, 120.0])
    stages = Stages(
        lambda: {"read": 2, "network": 1, "write": 4}, skipped=2, now=lambda: next(clock)
    )
    for _ in range(2):
        stages.add({"read": 50, "network": 90, "write": 1})
    for _ in range(4):
        assert stages.busy().with_start
        stages.add({"read": 1, "network": 2.25, "write": 0.4, "predict": 9})
    # Ten seconds, of which the network had nine.
    busy = stages.busy()
    assert list(busy.shares) == ["network", "read", "write"]
    assert busy.shares == pytest.approx({"network": 0.9, "read": 0.2, "write": 0.04})
    assert not busy.with_start
    words = "network 90 %, read 20 %, write 4 %; the job goes as fast as network does"
    assert in_words(busy) == words


def test_of_few_chunks_shares_are_of_the_whole_run_and_it_says_so() -> None:
    clock = iter([0.0, 30.0, 40.0, 50.0])
    stages = Stages(lambda: {"read": 2, "network": 1}, skipped=2, now=lambda: next(clock))
    for _ in range(3):
        stages.add({"read": 1, "network": 5})
    busy = stages.busy()
    assert busy.with_start
    assert busy.shares == pytest.approx({"network": 0.3, "read": 0.03})
    assert in_words(busy) == (
        "network 30 %, read 3 %, start-up included (too few chunks for a steady state); "
        "network was the busiest"
    )


def test_a_share_is_at_most_all() -> None:
    clock = iter(range(100))
    stages = Stages(lambda: {"network": 1}, skipped=1, now=lambda: float(next(clock)))
    for _ in range(FEWEST_CHUNKS):
        stages.add({"network": 7})
        assert stages.busy() == Busy(shares={"network": 1.0}, with_start=True)
    stages.add({"network": 7})
    assert stages.busy() == Busy(shares={"network": 1.0})


def test_no_time_and_no_chunk_give_no_shares() -> None:
    stages = Stages(lambda: {"network": 1}, skipped=1, now=lambda: 5.0)
    for _ in range(9):
        assert stages.busy().shares == {}
        stages.add({"network": 1})
    assert stages.busy().shares == {}


def test_places_are_those_of_the_end() -> None:
    """A head without CPUs has none at the beginning, and its workers may be gone before the end."""
    clock = iter(range(100))
    places = {"read": 0.0, "network": 1.0}
    stages = Stages(lambda: places, skipped=1, now=lambda: float(next(clock)))
    for _ in range(FEWEST_CHUNKS + 1):
        stages.add({"read": 0.4, "network": 0.8, "predict": 5.0})
    # Four seconds since the first chunk.
    assert stages.busy().shares == pytest.approx({"network": 0.8})
    places["read"] = 4.0
    assert stages.busy().shares == pytest.approx({"network": 0.8, "read": 0.1})
