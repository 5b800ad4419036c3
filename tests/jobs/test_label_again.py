"""What was in error for what may pass is labelled by a later run; what stands for it leaves."""

from pathlib import Path
from typing import Any

import pytest

from jobs import labelling, sorting, versions
from jobs.storage import open_store
from tests.jobs import labelling_place
from tests.jobs.labelling_place import Place, words

NOTE = "objects have images in error for what may pass"


def latest(place: Place) -> int:
    return versions.latest(open_store(place.named()))


def every_row(place: Place, number: int) -> dict[str, dict[str, Any]]:
    """The row that stands for each image, whichever table it is in."""
    rejected = place.rows(number, "rejected")
    in_error = {name: row for name, row in rejected.items() if row["reason"] is not None}
    accepted = place.rows(number)
    assert not in_error.keys() & accepted.keys()
    return accepted | in_error


@pytest.mark.parametrize("shard", ["1.jpg", "a.tar"])
@pytest.mark.parametrize("when", ["sorted", "predicted"])
def test_an_object_that_was_gone_for_a_moment_is_labelled_when_it_is_back(
    shard: str,
    when: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if shard == "a.tar":
        place.put("a.tar", {"0.jpg": 0, "1.jpg": 1})
        place.put("b.tar", {"2.jpg": 2})
        names = {"a.tar#0.jpg", "a.tar#1.jpg", "b.tar#2.jpg"}
    else:
        for number in range(2):
            (place.root / "in" / f"{number}.jpg").write_bytes(place.jpeg(number))
        names = {"#0.jpg", "#1.jpg"}
    there, away = place.root / "in" / shard, place.root / "away"
    module, name = (sorting, "sort") if when == "sorted" else (labelling, "main")
    real = getattr(module, name)

    def without(*of: Any) -> Any:
        there.rename(away)
        return real(*of)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, without)
        assert place.label() == 0
    assert f"1 {NOTE}" in words(capsys)
    gone = 2 if shard == "a.tar" else 1
    assert place.manifest(1)["counts"]["new"]["reasons"]["missing"] == gone
    # Not there, it is not missed; back, it has the same etag.
    assert place.label() == 0
    assert latest(place) == 1
    away.rename(there)
    assert place.label() == 0
    assert "tried again 1 objects" in words(capsys)
    # Without the names that were made up for a tar that nobody could open.
    assert set(place.rows(2)) == set(every_row(place, 2)) == names
    assert place.manifest(2)["counts"]["new"]["images"] == gone
    assert place.manifest(2)["notes"] == []
    assert place.label() == 0
    assert latest(place) == 2


def crash(place: Place, monkeypatch: pytest.MonkeyPatch, seed: int, times: int) -> None:
    """Let the image of a seed end its process the first times that it is predicted."""
    real, left = labelling_place.predicted, [times]

    def row(image: dict[str, Any]) -> dict[str, Any]:
        if image["data"] == place.jpeg(seed) and left[0]:
            left[0] -= 1
            return real({**image, "error": "crashed: its process died"})
        return real(image)

    monkeypatch.setattr(labelling_place, "predicted", row)


@pytest.mark.parametrize("times", [1, 9])
def test_an_image_whose_process_died_is_tried_again_a_few_times(
    times: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(6)})
    crash(place, monkeypatch, 3, times)
    assert place.label() == 0
    first = every_row(place, 1)
    assert first["a.tar#3.jpg"]["reason"].startswith("crashed: ")
    for _ in range(4):
        assert place.label() == 0
    assert latest(place) == (2 if times == 1 else 3)
    for number in range(2, latest(place) + 1):
        # Nothing else of the shard.
        assert place.manifest(number)["counts"]["new"]["images"] == 1
        assert place.manifest(number)["counts"]["new"]["replaced"] == 1
    last = every_row(place, latest(place))
    assert set(last) == set(first)
    assert (last["a.tar#3.jpg"]["status"] == "ok") == (times == 1)
    assert all(last[name] == first[name] for name in set(first) - {"a.tar#3.jpg"})


def test_another_etag_begins_to_count_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("a.tar", {f"{n}.jpg": n for n in range(3)})
    crash(place, monkeypatch, 1, 4)
    for _ in range(4):
        assert place.label() == 0
    assert latest(place) == 3
    place.put("a.tar", {f"{n}.jpg": n for n in range(4)})
    assert place.label() == 0
    assert place.label() == 0
    assert latest(place) == 5
    assert set(place.rows(5)) == {f"a.tar#{n}.jpg" for n in range(4)}


def test_a_damaged_shard_that_was_mended_is_in_error_no_more(place: Place) -> None:
    whole = place.make_tar([(f"{n}.jpg", place.jpeg(n)) for n in range(6)])
    tar = Path(place.root / "in" / "a.tar")
    tar.write_bytes(whole[: len(whole) // 2 + 100])
    assert place.label() == 0
    first = place.rows(1)
    assert 0 < len(first) < 6
    (damage,) = (row for row in every_row(place, 1).values() if row["key"] == "")
    assert damage["reason"].startswith("shard: ")
    tar.write_bytes(whole)
    assert place.label() == 0
    assert set(every_row(place, 2)) == {f"a.tar#{n}.jpg" for n in range(6)}
    assert {name: place.rows(2)[name] for name in first} == first
    assert place.manifest(2)["profile"]["all"]["images"] == 6


def test_what_no_other_night_changes_is_not_tried_again(place: Place) -> None:
    members = [("0.jpg", place.jpeg(0)), ("bad.jpg", b"no image")]
    (place.root / "in" / "a.tar").write_bytes(place.make_tar(members))
    for _ in range(2):
        assert place.label() == 0
    assert latest(place) == 1
