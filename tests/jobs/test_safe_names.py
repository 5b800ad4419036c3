"""Names stay in their folder, no two become one, and what can be a file's name is left alone."""

from pathlib import PurePosixPath

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jobs.safe_names import MAX_BYTES, below_images, safe_name, safe_path

CHARACTERS = st.characters(exclude_categories=["Cs"])
ODD = st.text(st.sampled_from("./%025EFin\0~é中"), max_size=12)
MADE = st.lists(
    st.sampled_from(["%2F", "%00", "%25", "%2E", "%~", "%", "/", ".", "\0", "2F", "a"]), max_size=6
).map("".join)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("../../etc/passwd", "%2E./%2E./etc/passwd"),
        ("/etc/passwd", "%2Fetc/passwd"),
        ("a//b", "a/%2Fb"),
        ("a/", "a%2F"),
        (".", "%2E"),
        ("a\0b", "a%00b"),
        ("100%25.jpg", "100%2525.jpg"),
        ("a%2Fb", "a%252Fb"),
    ],
)
def test_the_stated_rule(path: str, name: str) -> None:
    assert safe_path(path) == name


@pytest.mark.parametrize(
    "path",
    [
        *("été 中.jpg", ".hidden/x.jpg", "...", "C:\\x.jpg", "a.tar#b?c.jpg", 'a"<>|*b.jpg'),
        *("50%.jpg", "a%20b.jpg", "photo#1.jpg", "a\nb.jpg", "x" * 200 + ".jpg"),
    ],
)
def test_what_can_be_a_files_name_stays(path: str) -> None:
    assert safe_path(path) == path


@given(st.one_of(st.text(CHARACTERS, max_size=40), ODD, MADE))
def test_no_path_escapes(path: str) -> None:
    made = safe_path(path)
    if path:
        assert not made.startswith("/")
        assert not {"", ".", ".."} & set(made.split("/"))
        assert ".." not in PurePosixPath(made).parts
    assert "\0" not in made


@given(st.one_of(ODD, MADE), st.one_of(ODD, MADE))
def test_no_two_become_one(one: str, other: str) -> None:
    assume(one != other)
    assert safe_path(one) != safe_path(other)
    assert safe_name(one) != safe_name(other)
    assert "/" not in safe_name(one)
    assert below_images(safe_path(one)) != below_images(safe_path(other))


def test_folders_that_are_called_images() -> None:
    assert below_images("images/a/images/b") == "%69mages/a/%69mages/b"
    assert below_images("my images/old_images/images") == "my images/old_images/images"
    assert below_images(safe_path("%69mages/a")) == "%2569mages/a"


def test_long_names_are_cut_and_told_apart() -> None:
    first, second = ("中" * 300 + end for end in "ab")
    assert safe_name(first) != safe_name(second)
    assert len(safe_name(first).encode()) <= MAX_BYTES
    # No short name looks like a cut one.
    assert safe_name(safe_name(first)) != safe_name(first)
