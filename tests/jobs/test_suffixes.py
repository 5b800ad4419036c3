"""Paths find their image by their longest common end, or it is said which two it could be."""

import pytest

from jobs.detect import InputError
from jobs.suffixes import rows_of
from tests.jobs.test_pairing import names


@pytest.mark.parametrize("prefix", ["", "./", "photos/", "s3://bucket/photos/", "/tmp/in/"])
def test_what_stands_in_front_does_not_matter(prefix: str) -> None:
    paths = [f"{prefix}y/0.jpg", f"{prefix}x/0.jpg", f"{prefix}x/none.jpg"]
    assert rows_of(paths, names("x#0.jpg", "y#0.jpg", "x#1.jpg")) == [1, 0, None]


@pytest.mark.parametrize(
    ("path", "images", "row"),
    [
        # The whole path goes before one that is longer, and a key before a part of one.
        ("photos/x/0.jpg", ("a/x#0.jpg", "x#0.jpg"), 1),
        ("x/0.jpg", ("a/x#0.jpg", "x#0.jpg"), 1),
        ("0.jpg", ("x#0.jpg", "#0.jpg"), 1),
        ("0.jpg", ("a.tar#dir/0.jpg", "a.tar#0.jpg"), 1),
        # Folders were cut off.
        ("0.jpg", ("a/b#0.jpg", "a/b#1.jpg"), 0),
        ("b/0.jpg", ("a/b#0.jpg", "a/c#0.jpg"), 0),
        # In tars.
        ("s3://bucket/a.tar/dir/0.jpg", ("b.tar#dir/0.jpg", "a.tar#dir/0.jpg"), 1),
        ("dir/0.jpg", ("b.tar#dir/0.jpg", "b.tar#0.jpg"), 0),
        # Nothing fits, and it is the only one that ends so.
        ("elsewhere/0.jpg", ("a#0.jpg", "a#1.jpg"), 0),
        ("0.jpg", ("a#1.jpg",), None),
    ],
)
def test_the_longest_common_end_wins(path: str, images: tuple[str, ...], row: int | None) -> None:
    assert rows_of([path], names(*images)) == [row]


def test_beside_what_fits_nothing_is_guessed() -> None:
    assert rows_of(["p/x/0.jpg", "p/z/1.jpg"], names("x#0.jpg", "y#1.jpg")) == [0, None]


def test_two_that_fit_alike_are_named() -> None:
    with pytest.raises(InputError, match=r"'0.jpg' could be 'x#0.jpg' and 'y#0.jpg'"):
        rows_of(["0.jpg"], names("x#0.jpg", "y#0.jpg"))
