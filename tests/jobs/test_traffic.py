from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import traffic
from jobs.s3 import PART_BYTES
from jobs.storage import open_store
from jobs.store import Store
from tests.conftest import Bucket


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.store("store")


Doing = Callable[[Store], object]


@pytest.mark.parametrize(
    ("doing", "expected"),
    [
        (lambda store: store.put("a", b"12345"), {"written": 5}),
        (lambda store: store.put_if_absent("b", b"123"), {"written": 3}),
        (lambda store: store.read("there"), {"read": 10}),
        (lambda store: store.read("there", (2, 6)), {"read": 4}),
        (
            lambda store: store.put_over("there", b"1234567", store.info("there").etag),
            {"written": 7},
        ),
        (lambda store: list(store.list_objects()), {}),
        (lambda store: store.delete("there"), {}),
    ],
)
def test_bytes_are_counted_as_they_arrive(
    store: Store, doing: Doing, expected: dict[str, int]
) -> None:
    store.put("there", b"0123456789")
    with traffic.counted() as moved:
        doing(store)
    assert moved == expected


def test_a_file_in_parts(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(PART_BYTES + 7))
    with traffic.counted() as moved:
        store.put_file("a", file)
    assert moved == {"written": PART_BYTES + 7}


def test_what_does_not_arrive_is_not_counted(store: Store) -> None:
    with traffic.counted() as moved, pytest.raises(FileNotFoundError):
        store.read("none")
    assert not moved
