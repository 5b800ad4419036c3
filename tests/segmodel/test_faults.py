import pickle
from typing import Any

from segmodel.faults import Fault, Faults

Row = dict[str, Any]


def box(category: int, left: int, score: float | None = None, side: int = 10) -> Row:
    return {
        "category_id": category,
        "score": score,
        "bbox": [left, 0, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": None,
    }


def row(*items: Row, status: str = "ok") -> Row:
    return {"status": status, "detections": list(items)}


def test_right_wrong_and_missed() -> None:
    faults = Faults(0.5, 5)
    truth = row(box(1, 0), box(2, 20), box(1, 40, side=7), box(1, 60, side=9))
    # Right; another category; nothing there; too low a score to count.
    found = row(box(1, 0, 0.9), box(3, 20, 0.8), box(1, 90, 0.95), box(1, 40, 0.4, side=7))
    faults.add(4, truth, found)
    assert faults.shares == {4: 1 / 5}
    assert faults.wrong == [Fault(weight=0.95, image=4, item=2, taken=None)]
    assert faults.missed == [Fault(weight=81.0, image=4, item=3)]


def test_another_category_names_what_is_there() -> None:
    faults = Faults(0.5, 5)
    faults.add(0, row(box(7, 50), box(2, 20)), row(box(3, 20, 0.8)))
    assert faults.wrong == [Fault(weight=0.8, image=0, item=0, taken=1)]


def test_nothing_and_errors() -> None:
    faults = Faults(0.5, 5)
    faults.add(0, row(), row())
    faults.add(1, row(box(1, 0)), row(box(1, 0, 0.9), status="error"))
    faults.add(2, row(box(1, 0)), None)
    assert faults.shares == {1: 0.0, 2: 0.0}
    assert [one.image for one in faults.missed] == [1, 2]


def test_parts_merge_into_what_all_give() -> None:
    images = [(n, row(box(1, 0, side=n + 5)), row(box(1, 50, 0.5 + 0.01 * n))) for n in range(20)]
    together, parts = Faults(0.5, 3), [Faults(0.5, 3) for _ in range(4)]
    for n, truth, found in images:
        together.add(n, truth, found)
        parts[n % 4].add(n, truth, found)
    merged = Faults(0.5, 3)
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert [one.image for one in together.wrong] == [19, 18, 17]
    assert (merged.wrong, merged.missed) == (together.wrong, together.missed)
    assert merged.shares == together.shares
