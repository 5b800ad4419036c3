import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import detect
from jobs.detect import OBJECTS, InputError, describe_changes, look, object_table, objects_of
from jobs.storage import open_store
from jobs.store import ObjectInfo, StorageError, Store


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def paths(found: detect.Input) -> list[str]:
    return found.objects["path"].to_pylist()


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, str, str | None]:
    """A store, its URI, and the endpoint."""
    if request.param == "s3":
        bucket = request.getfixturevalue("bucket")
        return bucket.store("in"), f"{bucket.uri}/in", bucket.endpoint_url
    return open_store(str(tmp_path / "in")), str(tmp_path / "in"), None


IMAGES = parquet(image=[b"1"], key=["a"])
LIST = parquet(uri=["a.jpg"])


@pytest.mark.parametrize(
    ("format_", "files"),
    [
        ("webdataset", {"b.tar": b"1", "a/1.TAR": b"1", "c.tar.gz": b"1", "d.tgz": b"1"}),
        ("parquet", {"a.parquet": IMAGES, "b/c.parquet": IMAGES}),
        ("manifest", {"a.csv": b"uri\nx\n", "b.jsonl": b"{}"}),
        ("manifest", {"a.parquet": LIST, "b.csv": b"uri\nx\n"}),
        ("images", {"a.jpg": b"1", "b/c.PNG": b"1", "d.webp": b"", "e.tiff": b"1", "f.gif": b"1"}),
    ],
)
def test_auto_finds_the_format_and_says_why(
    place: tuple[Store, str, str | None], format_: str, files: dict[str, bytes]
) -> None:
    store, uri, endpoint = place
    for path, data in files.items():
        store.put(path, data)
    found = look(uri, "auto", endpoint)
    assert found.format == format_
    number = len(files)
    assert found.why == f"{number} of {number} objects are {format_}, and none is of another format"
    assert paths(found) == sorted(files)
    assert found.notes == ()
    assert found.store.uri == store.uri
    assert objects_of(found.objects) == [
        ObjectInfo(info.path, info.size, info.etag) for info in store.list_objects()
    ]
    asked = look(uri, format_, endpoint)  # type: ignore[arg-type]
    assert (asked.format, asked.why) == (format_, "--format asks for it")
    assert asked.objects == found.objects


def test_what_holds_no_input_is_ignored_and_counted(place: Any) -> None:
    store, uri, endpoint = place
    ignored = [
        ".hidden.jpg",
        ".git/a.jpg",
        "__MACOSX/a.jpg",
        "a/_plan/b.parquet",
        "a/._b.jpg",
        "README.md",
        "labels.json",
        "noending",
    ]
    for path in [*ignored, "a/b.jpg", "_c.jpg", "_train/d.jpg"]:
        store.put(path, b"1")
    found = look(uri, "auto", endpoint)
    assert paths(found) == ["_c.jpg", "_train/d.jpg", "a/b.jpg"]
    assert found.why == "3 of 11 objects are images, and none is of another format"
    assert found.notes == (
        "4 objects that are not images are ignored",
        "4 hidden objects are ignored (a name with a dot in front)",
    )


@pytest.mark.parametrize(
    ("columns", "auto"),
    [
        ({"jpg": [b"1"], "uri": ["x"]}, "parquet"),
        ({"image": ["a.jpg"], "uri": ["x"]}, "manifest"),
    ],
)
def test_parquet_is_told_apart_by_its_types_and_a_format_asked_for_holds(
    place: Any, columns: dict[str, list[Any]], auto: str
) -> None:
    store, uri, endpoint = place
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    store.put("a.parquet", data.getvalue())
    assert look(uri, "auto", endpoint).format == auto
    for asked in ("parquet", "manifest"):
        found = look(uri, asked, endpoint)  # type: ignore[arg-type]
        assert (found.format, paths(found)) == (asked, ["a.parquet"])


def test_mixtures_are_refused_in_words(place: Any) -> None:
    store, uri, endpoint = place
    for path in ("a.tar", "b.tar", "c.jpg", "d.csv"):
        store.put(path, b"uri\nx\n")
    words = "(1 images, 1 manifest, 2 webdataset): say which by --format"
    with pytest.raises(InputError, match=re.escape(words)):
        look(uri, "auto", endpoint)
    found = look(uri, "webdataset", endpoint)
    assert paths(found) == ["a.tar", "b.tar"]
    assert found.notes == ("2 objects that are not webdataset are ignored",)


def test_nothing_to_read_is_refused_in_words(place: Any) -> None:
    store, uri, endpoint = place
    with pytest.raises(InputError, match=r"there is nothing at .*: check the path and --endpoint"):
        look(uri, "auto", endpoint)
    store.put("notes.txt", b"1")
    with pytest.raises(InputError, match=r"has a suffix that can be read \(\.tar, .*\.webp\)"):
        look(uri, "auto", endpoint)
    with pytest.raises(InputError, match="can be read as images: check --format"):
        look(uri, "images", endpoint)
    with pytest.raises(InputError, match="there is nothing at"):
        look(f"{uri}/notes.txt", "auto", endpoint)


@pytest.mark.parametrize(
    ("name", "data", "format_"),
    [
        ("a.tar", b"1", "webdataset"),
        ("b.parquet", IMAGES, "parquet"),
        ("c.parquet", LIST, "manifest"),
        ("d.jsonl", b"{}", "manifest"),
        ("e #?%.jpg", b"1", "images"),
    ],
)
def test_one_object_is_an_input(place: Any, name: str, data: bytes, format_: str) -> None:
    store, uri, endpoint = place
    store.put(f"x/{name}", data)
    store.put("x/other.csv", b"1")
    found = look(f"{uri}/x/{name}", "auto", endpoint)
    assert (found.format, paths(found)) == (format_, [name])
    assert found.store.uri == store.url("x")
    assert found.store.read(name) == data


def test_one_object_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    found = look("a.tar", "auto", None)
    assert paths(found) == ["a.tar"]
    assert found.store.uri == str(tmp_path)


def test_a_folder_named_like_a_shard(tmp_path: Path) -> None:
    (tmp_path / "photos.tar").mkdir()
    (tmp_path / "photos.tar" / "a.jpg").write_bytes(b"1")
    found = look(str(tmp_path / "photos.tar"), "auto", None)
    assert (found.format, paths(found)) == ("images", ["a.jpg"])


def test_a_bucket_is_an_input(bucket: Any) -> None:
    bucket.store().put("a.jpg", b"1")
    assert paths(look(bucket.uri, "auto", bucket.endpoint_url)) == ["a.jpg"]


def damaged_footer(data: bytes) -> bytes:
    length = int.from_bytes(data[-8:-4], "little")
    footer = bytes(byte ^ 0x5A for byte in data[-8 - length : -8])
    return data[: -8 - length] + footer + data[-8:]


@pytest.mark.parametrize("damage", [damaged_footer, lambda data: data[:-3], lambda data: b""])
def test_a_damaged_shard_is_not_detected_away(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store = open_store(str(tmp_path))
    store.put("a.parquet", damage(IMAGES))
    store.put("b.parquet", IMAGES)
    found = look(str(tmp_path), "auto", None)
    assert (found.format, paths(found)) == ("parquet", ["a.parquet", "b.parquet"])


def test_trouble_of_the_store_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    store.put("a.parquet", IMAGES)

    def fail(*_: Any) -> None:
        raise StorageError("no access")

    monkeypatch.setattr(type(store), "read", fail)
    with pytest.raises(StorageError, match="no access"):
        look(str(tmp_path), "auto", None)


def test_an_image_table_with_uris_is_no_manifest(tmp_path: Path) -> None:
    open_store(str(tmp_path)).put("a.parquet", parquet(image=[b"1"], uri=["x"]))
    assert look(str(tmp_path), "auto", None).format == "parquet"


def test_a_listing_of_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    for number in range(7):
        store.put(f"{number}.jpg", bytes(number))
    whole = look(str(tmp_path), "auto", None)
    monkeypatch.setattr(detect, "LISTING_BATCH", 3)
    parts = look(str(tmp_path), "auto", None)
    assert parts.objects == whole.objects
    assert parts.objects["path"].num_chunks == 1


# --- digests and changes --------------------------------------------------------------------------

BEFORE = [ObjectInfo("a", 11, "x"), ObjectInfo("b", 2, "y")]


def digest(objects: list[ObjectInfo]) -> str:
    found = detect.Input(
        store=None,  # type: ignore[arg-type]
        format="images",
        why="",
        objects=object_table(objects),
        notes=(),
    )
    return found.digest()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ([ObjectInfo("a", 11, "x"), ObjectInfo("b", 3, "y")], "1 changed (b)"),
        ([ObjectInfo("a", 11, "x"), ObjectInfo("b", 2, "z")], "1 changed (b)"),
        ([ObjectInfo("a", 11, "x"), ObjectInfo("c", 2, "y")], "1 added (c); 1 removed (b)"),
        ([ObjectInfo("a", 11, "x")], "1 removed (b)"),
        ([], "2 removed (a, b)"),
        ([*BEFORE, ObjectInfo("c", 1, "z")], "1 added (c)"),
        ([ObjectInfo("a1", 1, "x"), ObjectInfo("b", 2, "y")], "1 added (a1); 1 removed (a)"),
        (
            [*BEFORE, *(ObjectInfo(f"c{n}", 1, "") for n in range(5))],
            "5 added (c0, c1, c2, ...)",
        ),
    ],
)
def test_every_difference_changes_the_digest_and_has_words(
    now: list[ObjectInfo], words: str
) -> None:
    assert describe_changes(object_table(BEFORE), object_table(now)) == words
    assert digest(now) != digest(BEFORE)


def test_the_digest_depends_on_nothing_else() -> None:
    later = [ObjectInfo(info.path, info.size, info.etag, modified=5.0) for info in BEFORE]
    assert digest(later) == digest(BEFORE)
    assert describe_changes(object_table(BEFORE), object_table(later)) == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([ObjectInfo("a", 11, "x")], [ObjectInfo("a1", 1, "x")]),
        ([ObjectInfo("a", 1, "1x")], [ObjectInfo("a", 11, "x")]),
        (
            [ObjectInfo("a\nb", 1, ""), ObjectInfo("c", 1, "")],
            [ObjectInfo("a", 1, ""), ObjectInfo("b\nc", 1, "")],
        ),
    ],
)
def test_what_runs_together_in_print_has_another_digest(
    one: list[ObjectInfo], other: list[ObjectInfo]
) -> None:
    assert digest(one) != digest(other)


def test_object_tables() -> None:
    assert objects_of(object_table(BEFORE)) == BEFORE
    assert object_table([]).schema == OBJECTS
