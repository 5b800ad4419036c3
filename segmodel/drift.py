"""How labels moved against those before: distances between distributions, and what chance makes of few.

The distance is that of Jensen and Shannon (the square root of the divergence, in bits: 0 for the same
distribution, 1 where nothing is common). Between two samples of the same distribution it is not 0: with n
and m items in k bins, 8 ln 2 (1/n + 1/m)^-1 times the divergence is close to a chi-squared variable of k - 1
degrees of freedom (Lin, Divergence measures based on the Shannon entropy, 1991; second order of both
entropies). `chance` is the distance that only one in a hundred of such pairs exceeds. Detections of one image are
not independent, so that true chance makes somewhat more.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Item: TypeAlias = Mapping[str, Any]  # a value of the `detections` column

SCORE_BINS = 20
# The quantile of the standard normal distribution of which one in a hundred is above.
_Z99 = 2.326


@dataclass(kw_only=True)
class Profile:
    """What some images hold; profiles add up.

    Attributes:
        images: That could be read.
        empty: Of them without a label.
        categories: Labels by name.
        scores: Labels by twentieth of the score; those that a person made have none.
        sizes: Labels by the whole part of the logarithm (base 2) of their mask's pixels.
        failed: Images that could not be read or predicted, and shards that could not be opened.
    """

    images: int = 0
    empty: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    scores: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    failed: int = 0

    def add(self, labels: Iterable[Item], times: int = 1) -> None:
        """Add an image with its labels, or with `times=-1` take one away."""
        labels = list(labels)
        self.images += times
        self.empty += 0 if labels else times
        for label in labels:
            self.categories[label["category"]] += times
            if label["score"] is not None:
                self.scores[min(int(label["score"] * SCORE_BINS), SCORE_BINS - 1)] += times
            self.sizes[int(math.log2(max(label["area"], 1)))] += times

    def merge(self, other: "Profile") -> None:
        """Add the images of another; what was taken away there is taken away here."""
        self.images += other.images
        self.empty += other.empty
        self.failed += other.failed
        for name in ("categories", "scores", "sizes"):
            mine: Counter[Any] = getattr(self, name)
            for key, number in getattr(other, name).items():
                mine[key] += number

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        counts = {
            name: {str(k): n for k, n in sorted(getattr(self, name).items()) if n}
            for name in ("categories", "scores", "sizes")
        }
        return {"images": self.images, "empty": self.empty, "failed": self.failed, **counts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Profile":
        """Return what `to_dict` was made of."""
        return cls(
            images=values["images"],
            empty=values["empty"],
            # Versions made before 2026-11-28 did not count them.
            failed=values.get("failed", 0),
            categories=Counter(values["categories"]),
            scores=Counter({int(key): n for key, n in values["scores"].items()}),
            sizes=Counter({int(key): n for key, n in values["sizes"].items()}),
        )


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two distributions are apart.

    Attributes:
        distance: Of Jensen and Shannon, 0 to 1.
        chance: What so few make without any drift, in 99 of 100 cases at most.
    """

    distance: float
    chance: float

    def exceeds(self, most: float) -> bool:
        """Say whether it is more than `most`, and more than chance makes."""
        return self.distance > max(most, self.chance)


def compare(before: Profile, now: Profile) -> dict[str, Distance]:
    """Return the distances by name; what one side has nothing of is not compared."""
    parts: dict[str, tuple[Mapping[Any, int], Mapping[Any, int]]] = {
        "class_mix": (before.categories, now.categories),
        "scores": (before.scores, now.scores),
        "sizes": (before.sizes, now.sizes),
        "empty_share": (_emptiness(before), _emptiness(now)),
        "error_share": (_failures(before), _failures(now)),
    }
    return {
        name: distance(*both)
        for name, both in parts.items()
        if all(sum(counts.values()) > 0 for counts in both)
    }


def distance(before: Mapping[Any, int], now: Mapping[Any, int]) -> Distance:
    """Return how far two histograms are apart; each counts at least one item."""
    n, m = sum(before.values()), sum(now.values())
    bins = {key for both in (before, now) for key, number in both.items() if number}
    divergence = 0.0
    for key in bins:
        p, q = before.get(key, 0) / n, now.get(key, 0) / m
        middle = (p + q) / 2
        divergence += sum(x / 2 * math.log2(x / middle) for x in (p, q) if x)
    chance = _chi_squared_99(len(bins) - 1) * (1 / n + 1 / m) / (8 * math.log(2))
    return Distance(
        distance=math.sqrt(min(max(divergence, 0.0), 1.0)), chance=math.sqrt(min(chance, 1.0))
    )


def _emptiness(profile: Profile) -> dict[str, int]:
    return {"empty": profile.empty, "with labels": profile.images - profile.empty}


def _failures(profile: Profile) -> dict[str, int]:
    return {"in error": profile.failed, "read": profile.images}


def _chi_squared_99(degrees: int) -> float:
    """Return the value that one in a hundred exceeds, by Wilson and Hilferty's approximation (1931)."""
    if degrees < 1:
        return 0.0
    spread = 2 / (9 * degrees)
    return degrees * float(1 - spread + _Z99 * math.sqrt(spread)) ** 3
