import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from jobs import chunks
from jobs.chunks import CHUNKS, Chunk


def some(sizes: list[int]) -> list[Chunk]:
    return [Chunk(kind="tar", num_images=size, start=number) for number, size in enumerate(sizes)]


def test_a_table_gives_back_its_chunks() -> None:
    made = [
        Chunk(
            chunk_id="00000000",
            kind="tar",
            shard="a/b.tar",
            size=10,
            etag='"e"',
            start=3,
            num_images=2,
            num_bytes=5,
            byte_start=512,
            byte_stop=2048,
            renamed=((3, "x#3"), (4, "y#4")),
        ),
        Chunk(kind="objects", num_images=1, list_path="_plan/x/list-00000.parquet"),
        Chunk(kind="verdict", num_images=1, key="k", error="shard: cut"),
    ]
    table = chunks.to_table(made)
    assert table.schema == CHUNKS
    assert list(chunks.from_table(table)) == made
    assert list(chunks.from_table(chunks.to_table([]))) == []


def test_a_chunk_may_leave_images_out() -> None:
    whole = Chunk(kind="tar", num_images=3)
    assert (whole.num_read, whole.kept("abc")) == (3, ["a", "b", "c"])
    part = Chunk(kind="tar", num_images=2, keep=b"\0\1\0\1\0")
    assert (part.num_read, part.kept("abcde")) == (5, ["b", "d"])
    assert list(chunks.from_table(chunks.to_table([part, whole]))) == [part, whole]
    # Of a plan that was frozen before there was such a thing.
    assert list(chunks.from_table(chunks.to_table([whole]).drop_columns("keep"))) == [whole]


def test_many_chunks_keep_their_order() -> None:
    made = some(list(range(1, 3000)))
    assert list(chunks.from_table(chunks.to_table(made))) == made


def test_the_id_names_the_object() -> None:
    assert chunks.output_path("00000012") == "predictions/00000012.parquet"
    assert chunks.output_path("00000012", "shards") == "shards/00000012.parquet"


@given(st.lists(st.integers(1, 9), max_size=12), st.none() | st.integers(1, 60))
def test_numbers_and_limit(sizes: list[int], limit: int | None) -> None:
    table = chunks.numbered(chunks.to_table(some(sizes)), limit)
    assert table.schema == CHUNKS
    kept = table["num_images"].to_pylist()
    assert sum(kept) == min(sum(sizes), sum(sizes) if limit is None else limit)
    assert table["start"].to_pylist() == list(range(len(kept)))
    assert kept[:-1] == sizes[: len(kept)][:-1]
    assert all(0 < a <= b for a, b in zip(kept, sizes, strict=False))
    ids = table["chunk_id"].to_pylist()
    assert ids == sorted(ids) == [f"{number:08d}" for number in range(len(kept))]


def test_ids_of_a_chunked_table() -> None:
    table = pa.concat_tables([chunks.to_table(some([1, 1])), chunks.to_table(some([1]))])
    assert chunks.numbered(table, None)["chunk_id"].to_pylist() == [
        "00000000",
        "00000001",
        "00000002",
    ]
