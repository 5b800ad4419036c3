"""What becomes of detections: limits, bands, duplicates, empty images, draws; and files that cannot be."""

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api

from segmodel.policy import Policy, PolicyError, judge, parse

SIZE_HW = (40, 60)


def item(
    score: float, box: tuple[int, int, int, int] = (0, 0, 10, 10), category: str = "cat"
) -> dict[str, Any]:
    """A detection whose mask fills its box (x, y, w, h)."""
    x, y, w, h = box
    mask = np.zeros(SIZE_HW, np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_api.encode(mask)
    return {
        "category_id": {"cat": 1, "dog": 4}[category],
        "category": category,
        "score": float(np.float32(score)),
        "bbox": list(box),
        "area": float(w * h),
        "iscrowd": 0,
        "segmentation": {"size": list(SIZE_HW), "counts": rle["counts"].decode()},
    }


def row(*items: dict[str, Any], name: str = "s#a") -> dict[str, Any]:
    return {"image_id": name, "status": "ok", "error": None, "detections": list(items)}


def test_thresholds_are_of_categories_and_of_float32() -> None:
    policy = parse({"score_threshold": 0.5, "categories": {"dog": {"score_threshold": 0.7}}})
    cat, dog = item(0.5), item(0.7, (20, 0, 9, 9), "dog")
    low = item(0.69, (40, 0, 9, 9), "dog")
    found = judge(row(low, cat, dog), policy)
    assert (found.fate, found.reason) == ("accepted", None)
    assert found.kept == [dog, cat]
    assert (found.rejected, found.reasons) == ([low], ["score"])


def test_what_is_unsure_sends_the_whole_image_to_a_person() -> None:
    policy = parse({"score_threshold": 0.8, "review_from": 0.4})
    sure, unsure, low = item(0.9), item(0.4, (20, 0, 9, 9)), item(0.3, (40, 0, 9, 9))
    found = judge(row(sure, unsure, low), policy)
    assert (found.fate, found.reason, found.kept) == ("review", "unsure", [sure, unsure])
    assert found.reasons == ["score"]
    assert judge(row(sure, low), policy).fate == "accepted"


def test_small_ones_other_categories_and_too_many_are_rejected() -> None:
    rules = {"score_threshold": 0.1, "min_area": 50, "min_size": 6, "max_per_image": 1}
    policy = parse({**rules, "other_categories": False, "categories": {"cat": None}})
    kept, beyond = item(0.9), item(0.8, (20, 0, 10, 10))
    tiny, thin = item(0.7, (0, 20, 7, 7)), item(0.6, (0, 30, 30, 5))
    found = judge(row(kept, beyond, tiny, thin, item(0.95, category="dog")), policy)
    assert found.kept == [kept]
    assert found.reasons == ["category", "max_per_image", "area", "size"]


def test_duplicates_are_found_by_masks_within_a_category() -> None:
    policy = parse({"score_threshold": 0.1, "duplicate_iou": 0.5})
    best, copy = item(0.9), item(0.8, (0, 3, 10, 10))
    # Overlaps the copy, which is gone, by more than half, and the best one by less.
    next_ = item(0.7, (0, 6, 10, 10))
    other = item(0.6, category="dog")
    found = judge(row(next_, copy, best, other), policy)
    assert found.kept == [best, next_, other]
    assert (found.rejected, found.reasons) == ([copy], ["duplicate"])


def test_empty_images_and_errors() -> None:
    assert judge(row(), Policy()).fate == "accepted"
    found = judge(row(item(0.1)), parse({"keep_empty": False}))
    assert (found.fate, found.reason, found.reasons) == ("rejected", "empty", ["score"])
    failed = {**row(), "status": "error", "error": "truncated: cut"}
    found = judge(failed, Policy())
    assert (found.fate, found.reason, found.kept) == ("rejected", "truncated: cut", ())


def test_audits_are_drawn_by_seed_from_what_is_accepted() -> None:
    policy = parse({"audit_share": 0.25, "seed": 3})
    drawn = [judge(row(name=f"s#{n}"), policy).audit for n in range(2000)]
    assert 420 < sum(drawn) < 580
    assert drawn == [judge(row(name=f"s#{n}"), policy).audit for n in range(2000)]
    other = parse({"audit_share": 0.25, "seed": 4})
    assert drawn != [judge(row(name=f"s#{n}"), other).audit for n in range(2000)]
    unsure = parse({"audit_share": 1, "score_threshold": 0.9, "review_from": 0.1})
    assert not judge(row(item(0.5)), unsure).audit
    assert not any(judge(row(name=f"s#{n}"), Policy()).audit for n in range(100))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"score_treshold": 0.5}, "no key score_treshold: did you mean score_threshold"),
        ({"limits": {}}, "no key limits"),
        ({"categories": {"cat": {"keep_empty": True}}}, "no key categories.cat.keep_empty"),
        ({"categories": ["cat"]}, "categories must be names with values"),
        ([1], "the policy must be names with values"),
        ([], "the policy must be names with values"),
        (False, "the policy must be names with values"),
        ({"categories": []}, "categories must be names with values"),
        ({"categories": {"cat": []}}, "categories.cat must be names with values"),
        ({"categories": {"cat": 3}}, "categories.cat must be names with values"),
        ({"score_threshold": 1.5}, "score_threshold must be from 0 to 1, not 1.5"),
        ({"score_threshold": "0.5"}, "score_threshold must be a number, not '0.5'"),
        ({"score_threshold": None}, "score_threshold must be a number, not None"),
        ({"review_from": 0.6}, r"review_from must be from 0 to score_threshold \(0.5\), not 0.6"),
        ({"categories": {"cat": {"review_from": 0.6}}}, "categories.cat.review_from must be"),
        ({"min_area": float("nan")}, "min_area must be 0 or more"),
        ({"duplicate_iou": 0}, "duplicate_iou must be in 0 to 1, not 0, not 0"),
        ({"max_per_image": 0}, "max_per_image must be 1 or more"),
        ({"max_per_image": 1.5}, "max_per_image must be a whole number, not 1.5"),
        ({"keep_empty": 1}, "keep_empty must be true or false, not 1"),
        ({"audit_share": True}, "audit_share must be a number, not True"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"other_categories": False}, "other_categories: false needs categories"),
    ],
)
def test_policies_that_cannot_be_are_refused(document: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(document)


def test_a_policy_comes_back_from_what_it_says() -> None:
    document = {"score_threshold": 0.6, "categories": {"cat": {"min_area": 9}}, "seed": 5}
    policy = parse(document)
    assert parse(policy.to_dict()) == policy
    assert policy.categories["cat"].score_threshold == 0.6
    assert parse(None) == Policy()
    assert parse({"categories": {"cat": {"score_threshold": 0.2}}}).lowest_score == 0.2
