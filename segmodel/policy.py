"""What becomes of a model's detections: accepted as labels, shown to a person, or rejected with a reason.

The unit is the image. Where a detection is neither clearly right nor clearly wrong, the whole image waits
for a person: as a label it would teach that what was left out is background.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import numpy as np

from segmodel.matching import pairwise_iou

Item: TypeAlias = Mapping[str, Any]  # a value of the `detections` column
Fate = Literal["accepted", "review", "rejected"]

UNSURE, EMPTY, AUDIT = "unsure", "empty", "audit"


class PolicyError(ValueError):
    """A policy that cannot be; the message names the key and what it may be."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a detection of a category needs.

    Attributes:
        score_threshold: From which it is a label.
        review_from: From which up to `score_threshold` its image waits for a person; below it the
            detection is rejected. None: there is no such band.
        min_area: Mask pixels.
        min_size: Pixels of its box's shorter side.
    """

    score_threshold: float = 0.5
    review_from: float | None = None
    min_area: float = 0.0
    min_size: float = 0.0

    def __post_init__(self) -> None:
        _check("score_threshold", self.score_threshold, lambda v: 0 <= v <= 1, "from 0 to 1")
        _check("min_area", self.min_area, lambda v: 0 <= v < math.inf, "0 or more")
        _check("min_size", self.min_size, lambda v: 0 <= v < math.inf, "0 or more")
        _check(
            "review_from",
            self.lowest_score,
            lambda v: 0 <= v <= self.score_threshold,
            f"from 0 to score_threshold ({self.score_threshold:g})",
        )

    @property
    def lowest_score(self) -> float:
        """Below this a detection is rejected."""
        return self.score_threshold if self.review_from is None else self.review_from


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy.

    Attributes:
        limits: Of categories that have none of their own.
        categories: Limits by the name of the category.
        other_categories: Whether detections of categories that are not in `categories` may be labels.
        duplicate_iou: Of two masks of one category that overlap so much, the one that scores lower is
            rejected; None: no look for duplicates.
        max_per_image: Detections, those that score highest; None: all.
        keep_empty: Whether an image without a label is accepted as background, or rejected.
        audit_share: Of the accepted images, drawn by `seed` and image id, that a person looks at too.
        seed: Of that draw.
    """

    limits: Limits = field(default_factory=Limits)
    categories: Mapping[str, Limits] = field(default_factory=dict)
    other_categories: bool = True
    duplicate_iou: float | None = None
    max_per_image: int | None = None
    keep_empty: bool = True
    audit_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("audit_share", self.audit_share, lambda v: 0 <= v <= 1, "from 0 to 1")
        _check("seed", self.seed, lambda v: v >= 0, "0 or more")
        if self.duplicate_iou is not None:
            _check("duplicate_iou", self.duplicate_iou, lambda v: 0 < v <= 1, "in 0 to 1, not 0")
        if self.max_per_image is not None:
            _check("max_per_image", self.max_per_image, lambda v: v >= 1, "1 or more")
        if not self.other_categories and not self.categories:
            raise PolicyError("other_categories: false needs categories: else nothing is accepted")

    @property
    def lowest_score(self) -> float:
        """Below this every detection is rejected, whatever its category."""
        return min(one.lowest_score for one in (self.limits, *self.categories.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return it as a policy file has it, with what was left out there."""
        own = {name: value for name, value in asdict(self).items() if name != "limits"}
        return {**asdict(self.limits), **own}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of an image.

    Attributes:
        fate: Where its row goes.
        reason: Why there, where it is not accepted.
        kept: Its labels, best first; for a person also those that are unsure.
        rejected: The other detections.
        reasons: Why, one for each of `rejected`.
        audit: Whether a person looks at it although it is accepted.
    """

    fate: Fate
    reason: str | None
    kept: Sequence[Item]
    rejected: Sequence[Item] = ()
    reasons: Sequence[str] = ()
    audit: bool = False


def parse(document: Any) -> Policy:
    """Return the policy of a parsed policy file.

    Its keys are the fields of `Policy` and, for all categories, of `Limits`; `categories` has by name the
    fields of `Limits` that differ.

    Raises:
        PolicyError: A key is unknown or a value cannot be.
    """
    given = _mapping({} if document is None else document, "the policy")
    of_limits, of_policy = _names(Limits), _names(Policy) - {"limits"}
    _refuse_unknown(given, of_limits | of_policy, "")
    _check_types(Limits, {n: v for n, v in given.items() if n in of_limits}, "")
    limits = Limits(**{n: v for n, v in given.items() if n in of_limits})
    categories = {}
    of_categories = given.get("categories")
    named = _mapping({} if of_categories is None else of_categories, "categories")
    for name, values in named.items():
        where = f"categories.{name}."
        values = _mapping({} if values is None else values, where[:-1])
        _refuse_unknown(values, of_limits, where)
        _check_types(Limits, values, where)
        try:
            categories[str(name)] = replace(limits, **values)
        except PolicyError as error:
            raise PolicyError(f"{where}{error}") from None
    own = {n: v for n, v in given.items() if n in of_policy}
    _check_types(Policy, own, "")
    return Policy(**{**own, "categories": categories, "limits": limits})


def judge(row: Mapping[str, Any], policy: Policy) -> Verdict:
    """Apply a policy to a row of the one schema.

    Args:
        row: Of predictions, with masks.
        policy: The same row and policy give the same verdict.
    """
    if row["status"] != "ok":
        return Verdict(fate="rejected", reason=row["error"], kept=())
    best_first = sorted(row["detections"], key=lambda item: -item["score"])
    reasons = [_too_little(item, policy) for item in best_first]
    _mark_duplicates(best_first, reasons, policy.duplicate_iou)
    fitting = [n for n, reason in enumerate(reasons) if reason is None]
    if policy.max_per_image is not None:
        for number in fitting[policy.max_per_image :]:
            reasons[number] = "max_per_image"
    kept = [item for item, reason in zip(best_first, reasons, strict=True) if reason is None]
    fate: Fate = "accepted"
    reason = None
    if any(_is_below(item, _limits(item, policy).score_threshold) for item in kept):
        fate, reason = "review", UNSURE
    elif not kept and not policy.keep_empty:
        fate, reason = "rejected", EMPTY
    return Verdict(
        fate=fate,
        reason=reason,
        kept=kept,
        rejected=[item for item, why in zip(best_first, reasons, strict=True) if why is not None],
        reasons=[why for why in reasons if why is not None],
        audit=fate == "accepted" and _is_drawn(row["image_id"], policy),
    )


def _limits(item: Item, policy: Policy) -> Limits:
    return policy.categories.get(item["category"], policy.limits)


def _too_little(item: Item, policy: Policy) -> str | None:
    """Return why a detection alone is no label, whatever is beside it."""
    limits = _limits(item, policy)
    if not policy.other_categories and item["category"] not in policy.categories:
        return "category"
    if _is_below(item, limits.lowest_score):
        return "score"
    if item["area"] < limits.min_area:
        return "area"
    return "size" if min(item["bbox"][2:]) < limits.min_size else None


def _is_below(item: Item, threshold: float) -> bool:
    # Scores are float32: 0.7 of them is a little less than 0.7.
    return bool(item["score"] < np.float32(threshold))


def _mark_duplicates(
    best_first: Sequence[Item], reasons: list[str | None], most: float | None
) -> None:
    """Set the reason of detections whose mask overlaps that of a better one of their category."""
    if most is None:
        return
    groups: dict[int, list[int]] = {}
    for number, item in enumerate(best_first):
        if reasons[number] is None:
            groups.setdefault(item["category_id"], []).append(number)
    for group in groups.values():
        masks = [best_first[number]["segmentation"] for number in group]
        ious = pairwise_iou(masks, masks, np.zeros(len(masks), np.bool_))
        for place, number in enumerate(group):
            better = [p for p in range(place) if reasons[group[p]] is None]
            if better and ious[place, better].max() >= most:
                reasons[number] = "duplicate"


def _is_drawn(image_id: str, policy: Policy) -> bool:
    digest = blake2b(f"{policy.seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < policy.audit_share * 2**64


def _names(of: type[Any]) -> set[str]:
    return {one.name for one in fields(of)}


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        message = f"{what} must be names with values, not {value!r:.60}"
        raise PolicyError(message)
    return value


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f": did you mean {close[0]}?" if close else f", only {', '.join(sorted(known))}"
            raise PolicyError(f"there is no key {where}{name}{hint}")


def _check_types(of: type[Any], values: Mapping[str, Any], where: str) -> None:
    wanted = {
        "keep_empty": (bool, "true or false"),
        "other_categories": (bool, "true or false"),
        "seed": (int, "a whole number"),
        "max_per_image": (int, "a whole number"),
    }
    for name, value in values.items():
        kind, words = wanted.get(name, (int | float, "a number"))
        if name in ("categories", "limits"):
            continue
        optional = any(f.name == name and f.default is None for f in fields(of))
        if value is None and optional:
            continue
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise PolicyError(f"{where}{name} must be {words}, not {value!r}")


def _check(name: str, value: Any, holds: Callable[[Any], bool], words: str) -> None:
    if not holds(value):
        raise PolicyError(f"{name} must be {words}, not {value}")
