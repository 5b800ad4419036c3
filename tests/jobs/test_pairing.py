"""Predictions find their image of the truth by id or by file name, or it is said why not."""

import pyarrow as pa
import pytest

from jobs.detect import InputError
from jobs.pairing import BY_FILE_NAME, BY_ID, NONE, Pairing, pair


def names(*shards_and_keys: str) -> pa.Table:
    """`shard#key` of each prediction."""
    rows = [
        {"image_id": one, "shard": one.split("#")[0], "key": one.split("#")[1]}
        for one in shards_and_keys
    ]
    return pa.Table.from_pylist(rows, pa.schema([(n, pa.string()) for n in rows[0]]))


def by_file(truth: list[str], *predictions: str, subset: bool = False) -> Pairing:
    return pair(truth, names(*predictions), BY_FILE_NAME, subset=subset)


@pytest.mark.parametrize(
    ("predictions", "way"),
    [
        (("a#1.jpg", "b#1.jpg"), "path"),
        (("0.tar#a/1.jpg", "1.tar#b/1.jpg"), "path in the shard"),
        (("#a/1.jpg", "#b/1.jpg"), "path"),
    ],
)
def test_whole_paths(predictions: tuple[str, ...], way: str) -> None:
    found = by_file(["b/1.jpg", "a/1.jpg"], *predictions)
    assert found.places.tolist() == [1, 0]
    assert found.ways == {way: 2}
    assert found.missing.tolist() == []


def test_base_names_where_paths_differ() -> None:
    found = by_file(
        ["val/1.jpg", "2.jpg", "3.jpg"], "x.csv#s3://b/in/2.jpg", "y.tar#1.jpg", "#3.jpg"
    )
    assert found.places.tolist() == [1, 0, 2]
    assert found.ways == {"path": 1, "base name": 2}


def test_a_path_goes_before_a_base_name() -> None:
    found = by_file(["a/1.jpg", "c/1.jpg"], "a#1.jpg", "b#1.jpg")
    assert found.places.tolist() == [0, 1]
    assert found.ways == {"path": 1, "base name": 1}


def test_of_a_larger_set_only_the_strictest_way_is_used() -> None:
    found = by_file(["a/1.jpg", "c/2.jpg"], "a#1.jpg", "b#2.jpg", "b#3.jpg", subset=True)
    assert found.places.tolist() == [0, NONE, NONE]
    assert (found.missing.tolist(), found.num_others) == ([1], 2)


@pytest.mark.parametrize(
    ("truth", "predictions", "words"),
    [
        (["1.jpg"], ["0.tar#1.jpg", "1.tar#1.jpg"], "'0.tar#1.jpg', '1.tar#1.jpg' have the same"),
        (["a/1.jpg", "b/1.jpg"], ["0.tar#1.jpg"], "'a/1.jpg', 'b/1.jpg' have the same base name"),
    ],
)
@pytest.mark.parametrize("subset", [False, True])
def test_what_cannot_be_told_apart_is_named(
    truth: list[str], predictions: list[str], words: str, subset: bool
) -> None:
    with pytest.raises(InputError, match=words):
        by_file(truth, *predictions, subset=subset)


def test_predictions_of_other_images_are_named() -> None:
    with pytest.raises(InputError, match=r"2 of 3 predictions .* such as 'b#2', 'b#3'; the truth"):
        by_file(["a/1"], "a#1", "b#2", "b#3")


@pytest.mark.parametrize("subset", [False, True])
def test_nothing_in_common_is_an_error_even_of_a_larger_set(subset: bool) -> None:
    with pytest.raises(InputError, match=r"paired by image_id\. --subset"):
        pair(["a#1"], names("b#1"), BY_ID, subset=subset)


def test_ids_are_compared_as_they_are() -> None:
    found = pair(["a#1", "b#1", "c#1"], names("c#1", "a#1"), BY_ID, subset=False)
    assert found.places.tolist() == [2, 0]
    assert found.missing.tolist() == [1]
    assert found.ways == {"image_id": 2}


def test_a_damaged_shards_row_is_no_image() -> None:
    found = by_file(["1.jpg"], "0.tar#1.jpg", "0.tar#")
    assert found.places.tolist() == [0, NONE]
    assert (found.num_damages, found.num_others) == (1, 0)


def test_no_predictions_at_all() -> None:
    found = pair(["1", "2"], names("a#b").slice(0, 0), BY_ID, subset=False)
    assert found.missing.tolist() == [0, 1]
