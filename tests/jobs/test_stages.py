"""Busy shares of the stages, from the seconds that finished chunks bring along."""

import pytest

from jobs.stages import FEWEST_CHUNKS, Stages, in_words


def test_shares_are_of_the_time_after_the_start() -> None:
    clock = iter([100.0, 110.0, 112.0, 114.0, 116.0, 120.0])
    stages = Stages(
        lambda: {"read": 2, "network": 1, "write": 4}, skipped=2, now=lambda: next(clock)
    )
    for _ in range(2):
        stages.add({"read": 50, "network": 90, "write": 1})
    for _ in range(4):
        assert stages.shares() == {}
        stages.add({"read": 1, "network": 2.25, "write": 0.4, "predict": 9})
    # Ten seconds, of which the network had nine.
    shares = stages.shares()
    assert list(shares) == ["network", "read", "write"]
    assert shares == pytest.approx({"network": 0.9, "read": 0.2, "write": 0.04})
    words = "network 90 %, read 20 %, write 4 %; the job goes as fast as network does"
    assert in_words(shares) == words


def test_a_share_is_at_most_all() -> None:
    clock = iter(range(100))
    stages = Stages(lambda: {"network": 1}, skipped=0, now=lambda: float(next(clock)))
    for _ in range(FEWEST_CHUNKS):
        stages.add({"network": 7})
    assert stages.shares() == {"network": 1.0}


def test_no_time_gives_no_shares() -> None:
    stages = Stages(lambda: {"network": 1}, skipped=1, now=lambda: 5.0)
    for _ in range(9):
        stages.add({"network": 1})
    assert stages.shares() == {}


def test_places_are_those_of_the_end() -> None:
    """A head without CPUs has none at the beginning, and its workers may be gone before the end."""
    clock = iter(range(100))
    places = {"read": 0.0, "network": 1.0}
    stages = Stages(lambda: places, skipped=0, now=lambda: float(next(clock)))
    for _ in range(FEWEST_CHUNKS + 1):
        stages.add({"read": 0.4, "network": 0.8, "predict": 5.0})
    assert stages.shares() == {"network": 1.0}
    places["read"] = 4.0
    assert stages.shares() == pytest.approx({"network": 1.0, "read": 2 / 16})
