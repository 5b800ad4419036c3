import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import index, plan, read
from jobs.chunks import Chunk, from_table
from jobs.detect import look
from jobs.read import IMAGES, Source, read_chunk, read_names
from jobs.storage import ArrowStore, open_store
from jobs.store import ObjectInfo, StorageError, Store
from segmodel.schema import TRAINING

TarMaker = Callable[..., bytes]


def put(store: Store, path: str, data: bytes) -> ObjectInfo:
    store.put(path, data)
    info = store.info(path)
    assert info is not None
    return info


def source_of(store: Store, lists: Store | None = None, **values: Any) -> Source:
    values = {"endpoint_url": None, "image_column": None, **values}
    return Source(store=store, lists=lists or store, **values)


def read_all(chunks: list[Chunk], source: Source) -> list[dict[str, Any]]:
    """Every row of every chunk, each with the columns and the number of rows that were promised.

    What is said of names alone, and of a part of a chunk, holds for every chunk without errors.
    """
    rows = []
    for chunk in chunks:
        table = read_chunk(chunk, source)
        assert table.schema == IMAGES
        assert table.num_rows == chunk.num_images
        rows += table.to_pylist()
        if table["error"].null_count == chunk.num_images > 1:
            assert read_names(chunk, source).equals(table.select(["image_id", "shard", "key"]))
            some = replace(chunk, num_images=chunk.num_images // 2, keep=half(chunk.num_images))
            assert read_chunk(some, source).equals(table.take(list(range(1, chunk.num_images, 2))))
            assert read_names(some, source).num_rows == some.num_images
    return rows


def half(num_images: int) -> bytes:
    """Leave every second image out."""
    return bytes(number % 2 for number in range(num_images))


def kinds(rows: list[dict[str, Any]]) -> list[str | None]:
    for row in rows:
        assert (row["data"] is None) == (row["error"] is not None)
    return [row["error"] and row["error"].partition(":")[0] for row in rows]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return request.getfixturevalue("bucket").store("in")
    return open_store(str(tmp_path / "in"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


# --- tars -----------------------------------------------------------------------------------------

NAMES = ["a.jpg", "b/ü.png", "a.json", "x" * 120 + ".webp", "./a.jpg", "notes.txt"]


@given(
    made=st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=1500)), max_size=12),
    format_=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    chunk_size=st.integers(1, 5),
    chunk_bytes=st.sampled_from([1000, 4000, 2**20]),
)
def test_a_tar_in_chunks_is_the_tar(
    tmp_path_factory: pytest.TempPathFactory,
    make_tar: TarMaker,
    made: list[tuple[str, bytes]],
    format_: int,
    chunk_size: int,
    chunk_bytes: int,
) -> None:
    store = open_store(str(tmp_path_factory.getbasetemp() / "tar-chunks"))
    data = make_tar(made, format_)
    info = put(store, "s/a.tar", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_CHUNK_BYTES", chunk_bytes)
        chunks = index.index_tar(store, info, chunk_size)
    rows = read_all(chunks, source_of(store))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        whole = [
            (member.name.removeprefix("./"), archive.extractfile(member)) for member in archive
        ]
    images = [(name, file.read()) for name, file in whole if not name.endswith((".json", ".txt"))]
    assert [row["data"] for row in rows] == [content for _, content in images]
    assert kinds(rows) == [None] * len(images)
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(
        key == name or key.startswith(f"{name}#")
        for key, (name, _) in zip(keys, images, strict=True)
    )
    assert {row["shard"] for row in rows} <= {"s/a.tar"}
    assert [row["image_id"] for row in rows] == [f"s/a.tar#{key}" for key in keys]


def test_a_cut_tar_gives_what_is_whole(store: Store, make_tar: TarMaker) -> None:
    data = make_tar([(f"{n}.jpg", bytes([n]) * 600) for n in range(3)])
    # In the padding behind the last image, in its content, and before it.
    for size, expected in (
        (2 * 1536 + 512 + 600, [None, None, None, "shard"]),
        (2 * 1536 + 512 + 599, [None, None, "truncated", "shard"]),
        (2 * 1536, [None, None, "shard"]),
    ):
        info = put(store, "a.tar", data[:size])
        rows = read_all(index.index_tar(store, info, 10), source_of(store))
        assert kinds(rows) == expected
        assert [row["data"] for row in rows if row["data"]] == [
            bytes([n]) * 600 for n in range(expected.count(None))
        ]
        assert rows[-1]["image_id"] == "a.tar#"
        damage = index.index_tar(store, info, 10)[-1]
        assert read_names(damage, source_of(store))["image_id"].to_pylist() == ["a.tar#"]


def test_a_changed_tar_gives_rows_in_error(place: Store, make_tar: TarMaker) -> None:
    info = put(place, "a.tar", make_tar([(f"{n}.jpg", b"1") for n in range(5)]))
    chunks = index.index_tar(place, info, 3)
    place.put("a.tar", make_tar([(f"{n}.jpg", b"changed") for n in range(50)]))
    with pytest.raises(StorageError, match=r"a\.tar changed after it was planned"):
        read_names(chunks[0], source_of(place))
    rows = read_all(chunks, source_of(place))
    assert kinds(rows) == ["changed"] * 5
    assert [row["key"] for row in rows] == [f"{n:08d}" for n in range(5)]
    some = replace(chunks[0], num_images=1, keep=half(3))
    assert [row["key"] for row in read_all([some], source_of(place))] == ["00000001"]
    assert place.url("a.tar") in rows[0]["error"]
    place.delete("a.tar")
    rows = read_all(chunks, source_of(place))
    assert kinds(rows) == ["missing"] * 5
    assert [row["image_id"] for row in rows] == [f"a.tar#{n:08d}" for n in range(5)]


@pytest.mark.parametrize("at", [1536 + 5, 1536 + 124])
def test_a_tar_that_changed_unseen_gives_rows_in_error(
    store: Store, make_tar: TarMaker, at: int
) -> None:
    # The etag of such a file system is its size.
    data = make_tar([(f"{n}.jpg", bytes(600)) for n in range(4)])
    chunks = index.index_tar(store, put(store, "a.tar", data), 10)
    broken = put(store, "a.tar", data[:at] + b"7" + data[at + 1 :])
    chunks = [replace(chunk, etag=broken.etag) for chunk in chunks]
    rows = read_all(chunks, source_of(store))
    assert kinds(rows) == [None, "changed", "changed", "changed"]
    other = make_tar([("0.jpg", bytes(3000)), ("1.jpg", b"1")])
    same_size = put(store, "a.tar", other.ljust(len(data), b"\0")[: len(data)])
    chunks = [replace(chunk, etag=same_size.etag) for chunk in chunks]
    rows = read_all(chunks, source_of(store))
    assert kinds(rows) == [None, None, "changed", "changed"]


def test_an_image_that_runs_out_of_its_span_is_not_cut_short(
    store: Store, make_tar: TarMaker
) -> None:
    info = put(store, "a.tar", make_tar([("0.jpg", bytes(600)), ("1.jpg", bytes(600))]))
    (chunk,) = index.index_tar(store, info, 10)
    other = put(store, "a.tar", make_tar([("0.jpg", bytes(600)), ("1.jpg", bytes(5000))]))
    chunk = replace(chunk, etag=other.etag)
    assert kinds(read_all([chunk], source_of(store))) == [None, "changed"]


def test_a_limit_cuts_a_chunk_short(store: Store, make_tar: TarMaker) -> None:
    names = ["a.jpg", "a.jpg", "b.jpg", "a.jpg"]
    info = put(store, "a.tar", make_tar([(name, b"1") for name in names]))
    (chunk,) = index.index_tar(store, info, 10)
    rows = read_all([replace(chunk, num_images=2)], source_of(store))
    assert [row["key"] for row in rows] == ["a.jpg", "a.jpg#1"]


def test_a_verdict_reads_nothing(store: Store) -> None:
    chunk = Chunk(kind="verdict", shard="a.tar", num_images=1, key="b.jpg", error="truncated: cut")
    (row,) = read_all([chunk], source_of(store))
    assert row == {
        "image_id": "a.tar#b.jpg",
        "shard": "a.tar",
        "key": "b.jpg",
        "data": None,
        "error": "truncated: cut",
    }


def test_trouble_of_the_store_stops_the_reading(
    store: Store, make_tar: TarMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar_info = put(store, "a.tar", make_tar([("a.jpg", b"1")]))
    # Larger than what is read of a file's end, so that several reads are needed.
    raw = pa.table({"key": ["a", "b"], "image": [bytes(200_000), bytes(200_000)]})
    plain = parquet(raw, 1, compression="none", use_dictionary=False)
    parquet_info = put(store, "a.parquet", plain)
    chunks = [
        *index.index_tar(store, tar_info, 10),
        *index.index_parquet(store, parquet_info, 10, None),
    ]
    monkeypatch.setattr(read, "FOOTER_WINDOW", 100)
    whole = ArrowStore.read
    left = 0

    def fail(*arguments: Any) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise StorageError("no access")
        return whole(*arguments)

    monkeypatch.setattr(ArrowStore, "read", fail)
    for chunk, least_reads in zip(chunks, (1, 4), strict=True):
        left = 100
        found = read_chunk(chunk, source_of(store))
        assert kinds(found.to_pylist()) == [None] * chunk.num_images
        num_reads = 100 - left
        assert num_reads >= least_reads
        # Whichever read it is.
        for number in range(num_reads):
            left = number
            with pytest.raises(StorageError, match="no access"):
                read_chunk(chunk, source_of(store))


# --- Parquet --------------------------------------------------------------------------------------

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(table: pa.Table, group_rows: int | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=group_rows, write_page_checksum=True, **options)
    return file.getvalue()


def as_columns(values: list[bytes | None], form: str) -> dict[str, pa.Array]:
    names = [f"n{n % 7}" for n in range(len(values))]
    if form == "struct":
        rows = [
            {"bytes": value, "path": name} if n % 5 else None if value is None else {"bytes": value}
            for n, (value, name) in enumerate(zip(values, names, strict=True))
        ]
        return {"image": pa.array(rows, IMAGE)}
    if form == "key":
        return {"key": pa.array(names), "image": pa.array(values, pa.large_binary())}
    return {"image": pa.array(values, pa.binary())}


@given(
    num_images=st.integers(0, 40),
    nulls=st.sets(st.integers(0, 40), max_size=5),
    group_rows=st.integers(1, 20),
    chunk_size=st.integers(1, 20),
    form=st.sampled_from(["struct", "key", "binary"]),
)
def test_a_parquet_shard_in_chunks_is_the_shard(
    tmp_path_factory: pytest.TempPathFactory,
    num_images: int,
    nulls: set[int],
    group_rows: int,
    chunk_size: int,
    form: str,
) -> None:
    values = [None if n in nulls else b"image %d" % n for n in range(num_images)]
    store = open_store(str(tmp_path_factory.getbasetemp() / "parquet-chunks"))
    table = pa.table(as_columns(values, form))
    info = put(store, "a.parquet", parquet(table, group_rows))
    chunks = index.index_parquet(store, info, chunk_size, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "ROWS_AT_A_TIME", 3)
        rows = read_all(chunks, source_of(store))
    assert [row["data"] for row in rows] == values
    assert kinds(rows) == ["empty" if value is None else None for value in values]
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == len(keys)
    if form == "binary":
        assert keys == [f"{n:08d}" for n in range(len(values))]
    if form == "key":
        assert [key.partition("#")[0] for key in keys] == [f"n{n % 7}" for n in range(len(values))]


def test_a_null_image_is_a_row_in_error(store: Store) -> None:
    values = [{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "b"}, None]
    info = put(store, "a.parquet", parquet(pa.table({"image": pa.array(values, IMAGE)})))
    rows = read_all(index.index_parquet(store, info, 10, None), source_of(store))
    assert [row["key"] for row in rows] == ["a", "b", "00000002"]
    assert kinds(rows) == [None, "empty", "empty"]


def test_an_image_in_parquet_that_is_too_large_is_a_row_in_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MAX_IMAGE_BYTES", 10)
    table = pa.table({"key": ["a", "b"], "image": [bytes(10), bytes(11)]})
    info = put(store, "a.parquet", parquet(table))
    rows = read_all(index.index_parquet(store, info, 10, None), source_of(store))
    assert [row["error"] for row in rows] == [
        None,
        "too_large: 11 bytes, and 10 are the most that is read",
    ]
    assert [row["data"] for row in rows] == [bytes(10), None]


def test_own_tables_keep_their_ids(store: Store) -> None:
    rows = [
        {
            "image_id": f"other.tar#{n}.jpg",
            "shard": "other.tar",
            "key": f"{n}.jpg",
            "status": "ok",
            "detections": [],
            "image": {"bytes": bytes([n]), "path": f"{n}.jpg"},
        }
        for n in range(5)
    ]
    info = put(store, "a.parquet", parquet(pa.Table.from_pylist(rows, schema=TRAINING), 2))
    found = read_all(index.index_parquet(store, info, 3, None), source_of(store))
    assert [(row["image_id"], row["shard"], row["key"], row["data"]) for row in found] == [
        (f"other.tar#{n}.jpg", "other.tar", f"{n}.jpg", bytes([n])) for n in range(5)
    ]


def test_the_column_that_was_asked_for(store: Store) -> None:
    table = pa.table({"a": pa.array([b"a"], pa.binary()), "b": pa.array([b"b"], pa.binary())})
    info = put(store, "a.parquet", parquet(table))
    chunks = index.index_parquet(store, info, 10, "b")
    (row,) = read_all(chunks, source_of(store, image_column="b"))
    assert row["data"] == b"b"


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 30, 100])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_damaged_page_costs_its_row_group_at_most(
    store: Store, chunk_size: int, compression: str
) -> None:
    values = [bytes([n]) * 300 for n in range(30)]
    table = pa.table(
        {
            "key": [f"k{n}" for n in range(30)],
            "image": pa.array([{"bytes": value, "path": ""} for value in values], IMAGE),
        }
    )
    data = parquet(table, 10, compression=compression, use_dictionary=False, data_page_size=700)
    column = pq.read_metadata(io.BytesIO(data)).row_group(1).column(1)
    assert column.path_in_schema == "image.bytes"
    at = column.data_page_offset + column.total_compressed_size - 1
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    info = put(store, "a.parquet", damaged)
    rows = read_all(index.index_parquet(store, info, chunk_size, None), source_of(store))
    assert [row["key"] for row in rows] == [f"k{n}" for n in range(30)]
    said = kinds(rows)
    assert said[:10] == said[20:] == [None] * 10
    assert said[19] == "shard"
    assert "a page of the Parquet file is damaged" in rows[19]["error"]
    assert all(row["data"] in (None, value) for row, value in zip(rows, values, strict=True))


def test_a_changed_parquet_shard_gives_rows_in_error(place: Store) -> None:
    info = put(place, "a.parquet", parquet(pa.table({"image": [b"1", b"2", b"3"]}), 2))
    chunks = index.index_parquet(place, info, 2, None)
    place.put("a.parquet", parquet(pa.table({"image": [b"longer"] * 30})))
    assert kinds(read_all(chunks, source_of(place))) == ["changed"] * 3
    place.delete("a.parquet")
    assert kinds(read_all(chunks, source_of(place))) == ["missing"] * 3


def test_a_limit_cuts_a_parquet_chunk_short(store: Store) -> None:
    info = put(store, "a.parquet", parquet(pa.table({"image": [b"1", b"2", b"3"]}), 2))
    (chunk,) = index.index_parquet(store, info, 10, None)
    rows = read_all([replace(chunk, num_images=2)], source_of(store))
    assert [row["data"] for row in rows] == [b"1", b"2"]


# --- loose images and manifests -------------------------------------------------------------------


def planned(store: Store, output: Store, endpoint: str | None, chunk_size: int) -> list[Chunk]:
    """The chunks of the loose images at `store`, and their list in `output`."""
    found = look(store.uri, "images", endpoint)
    list_path = "_plan/x/list-00000.parquet"
    indexed = plan._list_images(found.objects, list_path, cut(chunk_size), "", output)
    return list(from_table(indexed.chunks))


def cut(chunk_size: int) -> plan.Cut:
    return plan.Cut(chunk_size=chunk_size, limit=None, image_column=None, endpoint_url=None)


def endpoint_of(store: Store) -> str | None:
    return getattr(store, "endpoint_url", None)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_loose_images(place: Store, tmp_path: Path, chunk_size: int) -> None:
    paths = ["a.jpg", "b #?%.png", "sub/ü/c.jpg", "sub/d.jpg", "z.webp"]
    for path in paths:
        place.put(path, path.encode())
    output = open_store(str(tmp_path / "out"))
    chunks = planned(place, output, endpoint_of(place), chunk_size)
    rows = read_all(chunks, source_of(place, output))
    assert [row["data"] for row in rows] == [path.encode() for path in sorted(paths)]
    assert [(row["shard"], row["key"]) for row in rows] == [
        (path.rpartition("/")[0], path.rpartition("/")[2]) for path in sorted(paths)
    ]
    assert rows[0]["image_id"] == "#a.jpg"
    assert rows[3]["image_id"] == "sub/ü#c.jpg"


def test_loose_images_that_went_or_changed(
    place: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c", "d"):
        place.put(f"{name}.jpg", name.encode())
    place.put("d.jpg", bytes(200))
    output = open_store(str(tmp_path / "out"))
    chunks = planned(place, output, endpoint_of(place), 100)
    place.delete("a.jpg")
    place.put("b.jpg", b"another one")
    monkeypatch.setattr(read, "MAX_IMAGE_BYTES", 100)
    rows = read_all(chunks, source_of(place, output))
    assert kinds(rows) == ["missing", "changed", None, "too_large"]
    assert [row["key"] for row in rows] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert place.url("a.jpg") in rows[0]["error"]
    again = read_all(chunks, source_of(place, output, check_loose=False))
    assert kinds(again) == ["missing", None, None, "too_large"]
    assert again[1]["data"] == b"another one"


def test_a_lost_list_is_no_missing_image(store: Store, tmp_path: Path) -> None:
    store.put("a.jpg", b"1")
    output = open_store(str(tmp_path / "out"))
    (chunk,) = planned(store, output, None, 10)
    output.delete(chunk.list_path)
    with pytest.raises(StorageError, match="does not exist: the plan is damaged"):
        read_chunk(chunk, source_of(store, output))


def test_trouble_with_one_image_stops_the_reading(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a.jpg", b"1")
    output = open_store(str(tmp_path / "out"))
    (chunk,) = planned(store, output, None, 10)
    whole = ArrowStore.read

    def fail(self: ArrowStore, path: str, *rest: Any, **more: Any) -> bytes:
        if path == "a.jpg":
            raise StorageError("no access")
        return whole(self, path, *rest, **more)

    monkeypatch.setattr(ArrowStore, "read", fail)
    with pytest.raises(StorageError, match="no access"):
        read_chunk(chunk, source_of(store, output))


def test_images_of_a_manifest(store: Store, bucket: Any, tmp_path: Path) -> None:
    store.put("a.jpg", b"one")
    bucket.store("x").put("b #.jpg", b"two")
    uris = [store.url("a.jpg"), f"{bucket.uri}/x/b #.jpg", f"{bucket.uri}/gone.jpg"]
    output = open_store(str(tmp_path / "out"))
    found = index.look_up(uris, bucket.endpoint_url)
    indexed = plan._list_images(found, "_plan/x/list-00000.parquet", cut(2), "m.csv", output)
    chunks = list(from_table(indexed.chunks))
    assert [chunk.num_images for chunk in chunks] == [2, 1]
    source = source_of(store, output, endpoint_url=bucket.endpoint_url)
    rows = read_all(chunks, source)
    assert [row["data"] for row in rows] == [b"one", b"two", None]
    assert kinds(rows) == [None, None, "missing"]
    assert [row["image_id"] for row in rows] == [f"m.csv#{uri}" for uri in uris]
    store.put("a.jpg", b"changed")
    assert kinds(read_all(chunks, source)) == ["changed", None, "missing"]


def test_uris_of_a_manifest_that_cannot_be_objects_are_rows(store: Store, tmp_path: Path) -> None:
    store.put("a.jpg", b"one")
    (tmp_path / "folder.jpg").mkdir()
    names = [str(tmp_path / name) for name in ("folder.jpg", "a" * 300 + ".jpg", "zero\0.jpg")]
    uris = [store.url("a.jpg"), "s3://bad bucket!/x.jpg", *names]
    output = open_store(str(tmp_path / "out"))
    found = index.look_up(uris, None)
    indexed = plan._list_images(found, "_plan/x/list-00000.parquet", cut(2), "m.csv", output)
    rows = read_all(list(from_table(indexed.chunks)), source_of(store, output))
    assert kinds(rows) == [None, *["missing"] * 4]
