"""Distances between distributions: by hand, chance, and profiles that add up."""

import math
from collections import Counter

import numpy as np
import pytest

from segmodel.drift import Profile, compare, distance


def label(category: str = "cat", score: float | None = 0.5, area: float = 100) -> dict[str, object]:
    return {"category": category, "score": score, "area": area}


def test_the_distance_is_that_of_jensen_and_shannon() -> None:
    assert distance({"a": 3, "b": 1}, {"a": 300, "b": 100}).distance == pytest.approx(0)
    assert distance({"a": 5}, {"b": 9}).distance == pytest.approx(1)
    # p = (1, 0), q = (1/2, 1/2): 1/2 log2(4/3) + 1/4 log2(2/3) + 1/4 log2(2).
    expected = math.sqrt(0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25)
    assert distance({"a": 7}, {"a": 4, "b": 4}).distance == pytest.approx(expected)
    one, other = {"a": 7, "b": 2}, {"a": 1, "b": 2, "c": 9}
    assert distance(one, other).distance == pytest.approx(distance(other, one).distance)


def test_chance_is_what_one_in_a_hundred_pairs_of_samples_exceeds() -> None:
    rng = np.random.default_rng(0)
    shares = [0.3, 0.3, 0.2, 0.2]
    over = 0
    for _ in range(2000):
        before, now = (dict(enumerate(rng.multinomial(n, shares))) for n in (400, 150))
        found = distance(before, now)
        over += found.distance > found.chance
        assert found.exceeds(0.0) == (found.distance > found.chance)
    assert 5 <= over <= 40
    far = distance({0: 90, 1: 10}, {0: 10, 1: 90})
    assert far.exceeds(0.3)
    assert not far.exceeds(0.99)
    # Of three items nothing can be said.
    assert not distance({0: 90, 1: 10}, {0: 1, 1: 1}).exceeds(0.1)


def test_profiles_add_up_and_come_back() -> None:
    one, two = Profile(), Profile()
    one.add([label(), label("dog", 1.0, 64)])
    one.add([])
    two.add([label("dog", None, 0)])
    both = Profile()
    both.merge(one)
    both.merge(two)
    assert (both.images, both.empty) == (3, 1)
    assert both.categories == Counter(cat=1, dog=2)
    assert both.scores == Counter({10: 1, 19: 1})
    assert both.sizes == Counter({6: 2, 0: 1})
    assert Profile.from_dict(both.to_dict()).to_dict() == both.to_dict()
    less = Profile()
    less.add([label("dog", None, 0)], times=-1)
    both.merge(less)
    assert both.to_dict() == one.to_dict()


def test_what_one_side_has_nothing_of_is_not_compared() -> None:
    before, now = Profile(), Profile()
    assert compare(before, now) == {}
    before.add([label()])
    now.add([])
    assert set(compare(before, now)) == {"empty_share", "error_share"}
    assert compare(before, now)["error_share"].distance == 0
    assert compare(before, now)["empty_share"].distance == pytest.approx(1)
    now.add([label("dog", None)])
    assert set(compare(before, now)) == {"class_mix", "sizes", "empty_share", "error_share"}


def test_the_share_in_error_is_compared_where_nothing_could_be_read() -> None:
    before, now = Profile(), Profile(failed=3)
    before.add([label()])
    assert set(compare(before, now)) == {"error_share"}
    assert compare(before, now)["error_share"].distance == pytest.approx(1)
    assert Profile.from_dict(now.to_dict()) == now
    now.merge(Profile(failed=-3))
    assert compare(before, now) == {}
    old = {name: value for name, value in now.to_dict().items() if name != "failed"}
    assert Profile.from_dict(old).failed == 0
