"""Names stay in their folder, and can be turned back."""

from pathlib import PurePosixPath
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.safe_names import MAX_BYTES, safe_name, safe_path

CHARACTERS = st.characters(exclude_categories=["Cs"])
ODD = st.text(st.sampled_from("./\\%#:a\0 é中~"), max_size=12)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("../../etc/passwd", "%2E./%2E./etc/passwd"),
        ("/etc/passwd", "%2Fetc/passwd"),
        ("a//b", "a/%2Fb"),
        ("a/", "a%2F"),
        (".", "%2E"),
        (".hidden/x", "%2Ehidden/x"),
        ("C:\\x", "C%3A%5Cx"),
        ("100%25.jpg", "100%2525.jpg"),
        ("été 中.jpg", "été 中.jpg"),
        ("a\nb\0", "a%0Ab%00"),
        ("a.tar#b?c", "a.tar%23b%3Fc"),
    ],
)
def test_the_stated_rule(path: str, name: str) -> None:
    assert safe_path(path) == name
    assert unquote(name) == path


@given(st.one_of(st.text(CHARACTERS, max_size=40), ODD))
def test_no_path_escapes_and_all_come_back(path: str) -> None:
    made = safe_path(path)
    assert unquote(made) == path
    if path:
        assert not made.startswith("/")
        assert all(part and not part.startswith(".") for part in made.split("/"))
        assert ".." not in PurePosixPath(made).parts
        assert not set(made) & set('\\:*?"<>|#\0\n')


@given(ODD, ODD)
def test_one_name_has_no_slash(one: str, other: str) -> None:
    assert "/" not in safe_name(one)
    assert (safe_name(one) == safe_name(other)) == (one == other)


def test_long_names_are_cut_and_told_apart() -> None:
    first, second = ("中" * 300 + end for end in "ab")
    assert safe_name(first) != safe_name(second)
    assert len(safe_name(first).encode()) <= MAX_BYTES
    # No short name looks like a cut one.
    assert safe_name(safe_name(first)) != safe_name(first)
