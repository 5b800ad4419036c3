import io
import itertools
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import index
from jobs.chunks import Chunk
from jobs.detect import OBJECTS, object_table
from jobs.parquet_columns import ParquetInputError, find_image_column
from jobs.storage import ArrowStore, open_store
from jobs.store import ChangedError, ObjectInfo, StorageError, Store
from segmodel.schema import TRAINING
from tests.fuzz.targets import sealed

TarMaker = Callable[..., bytes]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def put(store: Store, path: str, data: bytes) -> ObjectInfo:
    store.put(path, data)
    info = store.info(path)
    assert info is not None
    return info


def check_partition(chunks: list[Chunk], num_images: int) -> None:
    """Every image is in one chunk, in order."""
    assert [chunk.start for chunk in chunks] == [
        0,
        *itertools.accumulate(chunk.num_images for chunk in chunks),
    ][:-1]
    assert sum(chunk.num_images for chunk in chunks) == num_images


def said(chunks: list[Chunk]) -> list[tuple[str, str | None]]:
    return [(chunk.key, chunk.error) for chunk in chunks if chunk.kind == "verdict"]


# --- tars -----------------------------------------------------------------------------------------

members = st.lists(
    st.tuples(st.sampled_from(["i.jpg", "i.json", "link.jpg"]), st.integers(0, 6000)), max_size=15
)


@given(made=members, chunk_size=st.integers(1, 5))
def test_chunks_of_a_tar_partition_it(
    tmp_path_factory: pytest.TempPathFactory,
    make_tar: TarMaker,
    made: list[tuple[str, int]],
    chunk_size: int,
) -> None:
    parts: list[Any] = []
    for name, size in made:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, "a"
        parts.append(link if name == "link.jpg" else (name, bytes(size)))
    store = open_store(str(tmp_path_factory.getbasetemp() / "partition"))
    data = make_tar(parts)
    info = put(store, "a.tar", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_CHUNK_BYTES", 4096)
        patch.setattr(index, "MAX_IMAGE_BYTES", 5000)
        chunks = index.index_tar(store, info, chunk_size)
    images = [(name, size) for name, size in made if name.endswith(".jpg")]
    check_partition(chunks, len(images))
    for chunk in chunks:
        assert (chunk.shard, chunk.size, chunk.etag) == ("a.tar", len(data), info.etag)
        mine = images[chunk.start : chunk.start + chunk.num_images]
        if chunk.kind == "verdict":
            ((name, size),) = mine
            kind = "unreadable: " if name == "link.jpg" else "too_large: "
            assert kind == "unreadable: " or size > 5000
            assert chunk.error is not None
            assert chunk.error.startswith(kind)
            continue
        assert all(name == "i.jpg" and size <= 5000 for name, size in mine)
        assert chunk.num_images <= chunk_size
        assert chunk.num_bytes == sum(size for _, size in mine)
        span = chunk.byte_stop - chunk.byte_start
        assert span <= 4096 or chunk.num_images == 1
        with tarfile.open(fileobj=io.BytesIO(data[chunk.byte_start : chunk.byte_stop])) as archive:
            inside = [member for member in archive if member.name == "i.jpg"]
        assert [member.size for member in inside] == [size for _, size in mine]


def test_chunks_are_as_large_as_they_may_be(store: Store, make_tar: TarMaker) -> None:
    info = put(store, "a.tar", make_tar([(f"{n}.jpg", b"1") for n in range(10)]))
    assert [chunk.num_images for chunk in index.index_tar(store, info, 4)] == [4, 4, 2]
    assert [chunk.num_images for chunk in index.index_tar(store, info, 100)] == [10]


def test_repeated_keys_get_names_of_their_own(store: Store, make_tar: TarMaker) -> None:
    names = ["a.jpg", "a.jpg", "./a.jpg", "a.jpg#2", "b.jpg", "a.jpg#1", "a.jpg#1.jpg"]
    info = put(store, "a.tar", make_tar([(name, b"1") for name in names]))
    chunks = index.index_tar(store, info, 2)
    check_partition(chunks, 5)
    assert [chunk.renamed for chunk in chunks] == [
        ((1, "a.jpg#1"),),
        ((2, "a.jpg#2"),),
        (),
    ]


def test_a_verdict_carries_the_new_name(store: Store, make_tar: TarMaker) -> None:
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "b"
    info = put(store, "a.tar", make_tar([("a.jpg", b"1"), link]))
    assert said(index.index_tar(store, info, 10)) == [
        ("a.jpg#1", "unreadable: a link or a device, not a file")
    ]


def test_a_cut_tar_keeps_what_is_whole_and_says_the_rest(store: Store, make_tar: TarMaker) -> None:
    # Header and content of each: blocks 0-2, 3-5, 6-8.
    data = make_tar([(f"{n}.jpg", bytes(600)) for n in range(3)])
    whole = 3 * 512

    def cut(size: int) -> list[Chunk]:
        return index.index_tar(store, put(store, "a.tar", data[:size]), 10)

    at_a_boundary = cut(2 * whole)
    assert [chunk.num_images for chunk in at_a_boundary] == [2, 1]
    ((key, error),) = said(at_a_boundary)
    assert key == ""
    assert error is not None
    assert error.startswith("shard: the tar is cut off after 2 members")
    assert at_a_boundary[1].start == 2

    in_the_content = cut(2 * whole + 512 + 100)
    assert [chunk.num_images for chunk in in_the_content] == [2, 1, 1]
    assert said(in_the_content) == [
        ("2.jpg", "truncated: the tar ends within this image"),
        ("", "shard: the tar is damaged: unexpected end of data"),
    ]

    in_the_padding = cut(2 * whole + 512 + 600)
    assert [chunk.num_images for chunk in in_the_padding] == [3, 1]
    assert in_the_padding[0].byte_stop == 2 * whole + 512 + 600

    in_the_header = cut(2 * whole + 100)
    assert [chunk.num_images for chunk in in_the_header] == [2, 1]
    assert said(cut(0)) == [("", "shard: the tar is damaged: empty file")]
    assert said(cut(3 * whole + 512)) == []


def test_a_tar_without_images_has_no_chunks(store: Store, make_tar: TarMaker) -> None:
    assert index.index_tar(store, put(store, "a.tar", make_tar([("a.txt", b"1")])), 10) == []
    assert index.index_tar(store, put(store, "b.tar", make_tar([])), 10) == []


def test_a_tar_that_changed_stops_the_planning(store: Store, make_tar: TarMaker) -> None:
    info = put(store, "a.tar", make_tar([("a.jpg", b"1")]))
    store.put("a.tar", make_tar([("a.jpg", b"1"), ("b.jpg", bytes(90_000))]))
    with pytest.raises(ChangedError):
        index.index_tar(store, info, 10)
    store.delete("a.tar")
    with pytest.raises(FileNotFoundError):
        index.index_tar(store, info, 10)


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each range that is read from a local store."""
    spans: list[int] = []
    read = ArrowStore.read

    def noted(self: ArrowStore, path: str, span: Any = None, etag: str = "") -> bytes:
        data = read(self, path, span, etag)
        spans.append(len(data))
        return data

    monkeypatch.setattr(ArrowStore, "read", noted)
    return spans


def test_large_images_are_hopped_over(
    store: Store, make_tar: TarMaker, num_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "HOP_FROM_MEAN_BYTES", 100_000)
    large = make_tar([(f"{n}.jpg", bytes(300_000)) for n in range(40)])
    info = put(store, "a.tar", large)
    monkeypatch.setattr(index, "READ_THROUGH_WINDOW", 2**20)
    assert len(index.index_tar(store, info, 1)) == 40
    assert sum(num_read) < len(large) / 2
    num_read.clear()
    small = make_tar([(f"{n}.jpg", bytes(3_000)) for n in range(1000)])
    info = put(store, "b.tar", small)
    assert len(index.index_tar(store, info, 1)) == 1000
    # Large spans, each once: a few requests.
    assert len(num_read) < 8
    assert sum(num_read) < len(small) * 1.01


def peak_rss() -> int:
    """The most memory that this process took since it was last asked, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_a_hundred_thousand_members(store: Store, num_read: list[int]) -> None:
    """2.4 s of a core and 24 MiB: no request for each, and names stay apart."""
    blank = tarfile.TarInfo("00000.jpg").tobuf(tarfile.GNU_FORMAT)
    name = re.compile(rb"00000\.jpg")
    parts = []
    for number in range(100_000):
        # Every tenth name was there before.
        header = name.sub(
            b"%05d.jpg" % (number - number % 10 if number % 10 == 1 else number), blank
        )
        parts.append(sealed(header))
    data = b"".join([*parts, bytes(1024)])
    info = put(store, "a.tar", data)
    del parts, data
    before = peak_rss() and peak_rss()
    chunks = index.index_tar(store, info, 256)
    assert peak_rss() - before < 64 * 2**20
    check_partition(chunks, 100_000)
    assert len(chunks) == -(-100_000 // 256)
    renamed = dict(pair for chunk in chunks for pair in chunk.renamed)
    assert renamed == {n: f"{n - 1:05d}.jpg#{n}" for n in range(1, 100_000, 10)}
    assert len(num_read) < 20


# --- Parquet --------------------------------------------------------------------------------------


def parquet(table: pa.Table, group_rows: int = 1000, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=group_rows, write_page_checksum=True, **options)
    return file.getvalue()


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(num: int, size: int = 10) -> pa.Array:
    return pa.array([{"bytes": bytes(size), "path": f"{n}.jpg"} for n in range(num)], IMAGE)


@given(st.lists(st.integers(0, 25), max_size=10), st.integers(1, 12))
def test_row_cuts(groups: list[int], rows: int) -> None:
    cuts = index._row_cuts(groups, [rows] * len(groups))
    assert cuts[0] == 0
    assert cuts[-1] == sum(groups)
    sizes = [last - first for first, last in itertools.pairwise(cuts)]
    assert all(0 < size <= rows for size in sizes)
    # Two neighbours never fit into one.
    assert all(first + second > rows for first, second in itertools.pairwise(sizes))
    # A group that fills chunks of its own starts one.
    starts = [0, *itertools.accumulate(groups)]
    assert all(start in cuts for start, group in zip(starts, groups, strict=False) if group >= rows)


@pytest.mark.parametrize(
    ("groups", "most", "cuts"),
    [
        ([4, 4, 4], [9, 9, 9], [0, 8, 12]),
        ([4, 4, 4], [9, 2, 9], [0, 4, 6, 8, 12]),
        ([9, 1, 4], [4, 9, 9], [0, 4, 8, 10, 14]),
        ([0, 3], [1, 9], [0, 3]),
    ],
)
def test_row_cuts_of_groups_with_rows_of_several_sizes(
    groups: list[int], most: list[int], cuts: list[int]
) -> None:
    assert index._row_cuts(groups, most) == cuts


def test_huge_rows_make_small_chunks_where_they_are(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_CHUNK_BYTES", 40_000)
    file = io.BytesIO()
    with pq.ParquetWriter(
        file, pa.schema([("image", pa.binary())]), use_dictionary=False
    ) as writer:
        for size in (100, 10_000, 100):
            rows = [bytes(size) for _ in range(20)]
            writer.write_table(pa.table({"image": pa.array(rows, pa.binary())}))
    chunks = index.index_parquet(store, put(store, "a.parquet", file.getvalue()), 50, None)
    check_partition(chunks, 60)
    assert [chunk.num_images for chunk in chunks] == [20, 3, 3, 3, 3, 3, 3, 2, 20]
    assert all(29_000 < chunk.num_bytes <= 40_000 for chunk in chunks[1:-2])


@pytest.mark.parametrize(
    ("group_rows", "chunk_size", "sizes"),
    [
        (10, 10, [10, 10, 5]),
        (10, 4, [4, 4, 2, 4, 4, 2, 4, 1]),
        (3, 7, [6, 6, 6, 7]),
        (25, 99, [25]),
    ],
)
def test_chunks_of_a_parquet_shard(
    store: Store, group_rows: int, chunk_size: int, sizes: list[int]
) -> None:
    info = put(store, "a.parquet", parquet(pa.table({"image": images(25)}), group_rows))
    chunks = index.index_parquet(store, info, chunk_size, None)
    check_partition(chunks, 25)
    assert [chunk.num_images for chunk in chunks] == sizes
    assert {(c.kind, c.shard, c.size, c.etag) for c in chunks} == {
        ("parquet", "a.parquet", info.size, info.etag)
    }


def test_bytes_of_a_parquet_chunk_are_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_CHUNK_BYTES", 100_000)
    table = pa.table({"image": images(100, 10_000), "other": [bytes(500)] * 100})
    info = put(store, "a.parquet", parquet(table, compression="zstd", use_dictionary=False))
    # Zeros: the file is small, what is read from it is not.
    assert info.size < 300_000
    chunks = index.index_parquet(store, info, 256, None)
    check_partition(chunks, 100)
    assert 8 <= chunks[0].num_images <= 10
    assert all(80_000 < chunk.num_bytes <= 100_000 for chunk in chunks[:-1])
    monkeypatch.setattr(index, "MAX_CHUNK_BYTES", 100)
    assert [c.num_images for c in index.index_parquet(store, info, 256, None)] == [1] * 100


def test_only_the_keys_of_a_shard_are_read(store: Store, num_read: list[int]) -> None:
    raw = pa.array([bytes([n]) * 2**20 for n in range(30)], pa.binary())
    table = pa.table({"key": [f"{n}" for n in range(30)], "image": raw})
    data = parquet(table, 5, compression="none", use_dictionary=False)
    info = put(store, "a.parquet", data)
    num_read.clear()
    assert len(index.index_parquet(store, info, 5, None)) == 6
    assert sum(num_read) < len(data) / 2


@pytest.mark.parametrize(
    ("columns", "renamed"),
    [
        ({"key": ["a", "a", "b", "a"]}, {1: "a#1", 3: "a#3"}),
        ({"key": pa.array(["a", "b", "a", "c"], pa.large_string())}, {2: "a#2"}),
        ({"key": ["a", None, "", "00000001"]}, {3: "00000001#3"}),
        ({"key": [1, 1, 1, 1]}, {}),
        ({"name": ["a", "a", "a", "a"]}, {}),
    ],
)
def test_keys_of_a_parquet_shard(
    store: Store, columns: dict[str, Any], renamed: dict[int, str]
) -> None:
    table = pa.table({**columns, "image": pa.array([b"1"] * 4, pa.binary())})
    info = put(store, "a.parquet", parquet(table))
    (chunk,) = index.index_parquet(store, info, 10, None)
    assert dict(chunk.renamed) == renamed


def test_paths_are_the_keys_of_image_structs(store: Store) -> None:
    values = [{"bytes": b"1", "path": path} for path in ("a", "b", "a", None, None)]
    info = put(store, "a.parquet", parquet(pa.table({"image": pa.array(values, IMAGE)})))
    chunks = index.index_parquet(store, info, 2, None)
    assert [chunk.renamed for chunk in chunks] == [(), ((2, "a#2"),), ()]


def own_table(ids: list[str | None]) -> pa.Table:
    rows = [
        {
            "image_id": image_id,
            "shard": "s",
            "key": "k",
            "status": "ok",
            "detections": [],
            "image": {"bytes": b"1", "path": "p"},
        }
        for image_id in ids
    ]
    nullable = pa.schema([field.with_nullable(True) for field in TRAINING])
    return pa.Table.from_pylist(rows, schema=nullable)


def test_own_tables_keep_their_ids(store: Store) -> None:
    info = put(store, "a.parquet", parquet(own_table(["s#1", "s#2"])))
    (chunk,) = index.index_parquet(store, info, 10, None)
    assert (chunk.num_images, chunk.renamed) == (2, ())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "a", "b", "c"], r"has 2 image ids more than once \(a, b\): pack"),
        (["a", None], "has rows without an image_id"),
    ],
)
def test_own_ids_that_are_none_are_refused(store: Store, ids: list[str | None], words: str) -> None:
    info = put(store, "a.parquet", parquet(own_table(ids)))
    with pytest.raises(ParquetInputError, match=words) as caught:
        index.index_parquet(store, info, 10, None)
    assert store.url("a.parquet") in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda data: data[:-100] + bytes(60) + data[-40:],
        lambda data: b"?" * len(data),
    ],
)
def test_a_damaged_parquet_shard_is_one_row(store: Store, damage: Callable[[bytes], bytes]) -> None:
    data = parquet(pa.table({"image": images(3)}))
    info = put(store, "a.parquet", damage(data))
    (chunk,) = index.index_parquet(store, info, 10, None)
    assert (chunk.kind, chunk.shard, chunk.key, chunk.num_images) == ("verdict", "a.parquet", "", 1)
    assert chunk.error is not None
    assert chunk.error.startswith("shard: the Parquet file is damaged: ")
    assert "\n" not in chunk.error


def test_a_damaged_page_of_keys_is_one_row(store: Store) -> None:
    table = pa.table({"key": ["aaa", "bbb"], "image": pa.array([b"1", b"2"], pa.binary())})
    data = parquet(table, compression="none", use_dictionary=False)
    column = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0)
    at = column.data_page_offset + column.total_compressed_size - 1
    info = put(store, "a.parquet", data[:at] + b"c" + data[at + 1 :])
    (chunk,) = index.index_parquet(store, info, 10, None)
    assert chunk.kind == "verdict"


def test_trouble_of_the_store_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    info = put(store, "a.parquet", parquet(pa.table({"image": images(3)})))
    for error in (StorageError("no access"), FileNotFoundError("gone")):

        def fail(*_: Any, error: OSError = error) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ArrowStore, "read", fail)
            with pytest.raises(type(error), match=str(error)):
                index.index_parquet(store, info, 10, None)


BINARY, TEXT = pa.binary(), pa.string()


@pytest.mark.parametrize(
    ("schema", "asked", "column"),
    [
        ([("image", IMAGE), ("thumb", BINARY)], None, "image"),
        ([("jpg", BINARY), ("caption", TEXT)], None, "jpg"),
        ([("jpg", pa.large_binary())], None, "jpg"),
        ([("jpg", pa.binary_view())], None, "jpg"),
        ([("photo", pa.struct([("bytes", pa.large_binary())]))], None, "photo"),
        ([("image", IMAGE), ("thumb", BINARY)], "thumb", "thumb"),
    ],
)
def test_the_image_column(schema: Any, asked: str | None, column: str) -> None:
    assert find_image_column(pa.schema(schema), asked) == column


@pytest.mark.parametrize(
    ("schema", "asked", "words"),
    [
        ([("uri", TEXT)], None, "are none: name one by --image-column"),
        ([("a", BINARY), ("b", IMAGE)], None, r"are \['a', 'b'\]: name one by --image-column"),
        ([("a", BINARY)], "b", r"column 'b' holds no encoded images; columns that may: \['a'\]"),
        ([("a", TEXT)], "a", "columns that may: none"),
        ([("a", pa.struct([("path", TEXT)]))], None, "are none"),
        ([("a", pa.struct([("bytes", TEXT)]))], None, "are none"),
    ],
)
def test_no_image_column_is_refused_in_words(
    store: Store, schema: Any, asked: str | None, words: str
) -> None:
    empty = pa.schema(schema).empty_table()
    with pytest.raises(ParquetInputError, match=words):
        find_image_column(empty.schema, asked)
    info = put(store, "a.parquet", parquet(empty))
    with pytest.raises(ParquetInputError, match=words) as caught:
        index.index_parquet(store, info, 10, asked)
    assert str(caught.value).startswith(f"{store.url('a.parquet')}: ")


def test_an_empty_parquet_shard_has_no_chunks(store: Store) -> None:
    info = put(store, "a.parquet", parquet(pa.table({"image": images(0)})))
    assert index.index_parquet(store, info, 10, None) == []


# --- loose images ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 150), max_size=20), st.integers(1, 6))
def test_chunks_of_loose_images(sizes: list[int], chunk_size: int) -> None:
    objects = object_table([ObjectInfo(f"{n}", size, "") for n, size in enumerate(sizes)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_CHUNK_BYTES", 100)
        chunks = index.index_objects(objects, "list", chunk_size, "")
    check_partition(chunks, len(sizes))
    for chunk in chunks:
        mine = sizes[chunk.start : chunk.start + chunk.num_images]
        assert chunk.num_images <= chunk_size
        assert chunk.num_bytes == sum(mine)
        assert chunk.num_bytes <= 100 or chunk.num_images == 1
        assert (chunk.kind, chunk.shard, chunk.list_path) == ("objects", "", "list")
    for first, second in itertools.pairwise(chunks):
        # The next image did not fit.
        next_size = sizes[second.start]
        assert first.num_images == chunk_size or first.num_bytes + next_size > 100


def test_chunks_of_a_slice_of_loose_images() -> None:
    objects = object_table([ObjectInfo(f"{n}", n, "") for n in range(10)]).slice(4, 3)
    (chunk,) = index.index_objects(objects, "list", 10, "a.csv")
    assert (chunk.kind, chunk.shard, chunk.num_bytes) == ("uris", "a.csv", 4 + 5 + 6)


def test_look_up(store: Store, bucket: Any) -> None:
    one = put(store, "a.jpg", b"1")
    two = put(bucket.store("x"), "b #.jpg", b"22")
    uris = [
        store.url("a.jpg"),
        store.url("gone.jpg"),
        f"{bucket.uri}/x/b #.jpg",
        f"{bucket.uri}-not-there/c.jpg",
    ]
    found = index.look_up(uris, bucket.endpoint_url)
    assert found.schema == OBJECTS
    assert found["path"].to_pylist() == uris
    assert found["size"].to_pylist() == [1, 0, 2, 0]
    assert found["etag"].to_pylist() == [one.etag, "", two.etag, ""]


def test_look_up_where_nobody_may_look(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("no access")

    monkeypatch.setattr(ArrowStore, "info", refuse)
    found = index.look_up([store.url("a.jpg")], None)
    assert found.to_pylist() == [{"path": store.url("a.jpg"), "size": 0, "etag": ""}]


@given(st.lists(st.sampled_from(["a", "b", "a#1", "a#2", "a#1#", "b#3"]), max_size=12))
def test_unique_names(keys: list[str]) -> None:
    names, renamed = index.unique(keys)
    assert len(set(names)) == len(keys)
    assert [renamed.get(n, key) for n, key in enumerate(keys)] == names
    # The first of a name keeps it.
    assert all(n not in renamed for n, key in enumerate(keys) if key not in keys[:n])
