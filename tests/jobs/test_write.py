import io
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import documents, write
from jobs.storage import open_store
from jobs.store import DamagedError, StorageError, Store
from jobs.write import Counts, IncompleteError
from segmodel.schema import PREDICTIONS, SCHEMA_VERSION, TRAINING

CAT = {
    "category_id": 17,
    "category": "cat",
    "score": 0.5,
    "bbox": [1.0, 2.0, 3.0, 4.0],
    "area": 5.0,
    "iscrowd": 0,
    "segmentation": {"size": [10, 20], "counts": "abc"},
}


def row(key: str, error: str | None = None, detections: int = 0) -> dict[str, Any]:
    return {
        "image_id": f"a.tar#{key}",
        "shard": "a.tar",
        "key": key,
        "height": None if error else 10,
        "width": None if error else 20,
        "status": "error" if error else "ok",
        "error": error,
        "detections": [CAT] * detections,
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PREDICTIONS)


ROWS = [
    row("a", detections=2),
    row("b", error="missing: gone: s3://x"),
    row("c"),
    row("d", error="truncated: cut"),
    row("e", error="missing: gone"),
]
COUNTS = Counts(images=5, detections=2, errors={"missing": 2, "truncated": 1})


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return request.getfixturevalue("bucket").store("out")
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def test_a_chunk_is_one_object(output: Store) -> None:
    counts = write.put_chunk(output, "00000003", table(*ROWS), {"run_id": "r", "model_digest": "m"})
    assert counts == COUNTS
    assert counts.failed == 3
    (info,) = output.list_objects()
    assert info.path == "predictions/00000003.parquet"
    found = write.read_chunk(output, "00000003")
    assert found.schema.equals(PREDICTIONS)
    assert found.to_pylist() == table(*ROWS).to_pylist()
    assert [field.nullable for field in found.schema] == [field.nullable for field in PREDICTIONS]
    assert write.read_counts(output, ["00000003"]) == {"00000003": COUNTS}


def test_the_footer_says_what_it_is(local: Store) -> None:
    write.put_chunk(local, "1", table(*ROWS), {"run_id": "ü", "model_digest": "m"})
    footer = pq.read_metadata(io.BytesIO(local.read("predictions/1.parquet")))
    facts = {key.decode(): value.decode() for key, value in footer.metadata.items()}
    assert facts.pop("ARROW:schema")
    assert json.loads(facts.pop("segjobs.counts")) == {
        "images": 5,
        "detections": 2,
        "errors": {"missing": 2, "truncated": 1},
    }
    assert len(facts.pop("segjobs.crc32")) == 8
    assert facts == {
        "segjobs.schema_version": SCHEMA_VERSION,
        "segjobs.run_id": "ü",
        "segjobs.model_digest": "m",
    }
    column = footer.row_group(0).column(0)
    assert column.compression == "ZSTD"


def test_a_chunk_with_images_goes_to_its_folder(output: Store) -> None:
    rows = [{**one, "image": {"bytes": b"1", "path": one["key"]}} for one in ROWS]
    training = pa.Table.from_pylist(rows, schema=TRAINING)
    assert write.put_chunk(output, "7", training, {"run_id": "r"}, "shards") == COUNTS
    assert write.read_counts(output, ["7"], "shards") == {"7": COUNTS}
    (info,) = output.list_objects()
    assert info.path == "shards/7.parquet"
    found = pq.read_table(io.BytesIO(output.read(info.path)), page_checksum_verification=True)
    assert found.schema.equals(TRAINING)
    assert found.to_pylist() == training.to_pylist()
    # What tells `datasets` that `image` is one survives beside our own facts.
    assert found.schema.metadata[b"huggingface"] == TRAINING.metadata[b"huggingface"]
    assert found.schema.metadata[b"segjobs.run_id"] == b"r"


@pytest.mark.parametrize(
    ("image_bytes", "rows"), [(10, 32), (2**20, 7), (5 * 2**20, 1), (2**24, 1)]
)
def test_row_groups_for_training_are_bounded_in_rows_and_bytes(image_bytes: int, rows: int) -> None:
    one = {**row("a"), "image": {"bytes": bytes(image_bytes), "path": "a"}}
    training = pa.Table.from_pylist([one] * 4, schema=TRAINING)
    assert write.training_rows_per_group(training) == rows


def test_row_groups_are_as_small_as_asked(output: Store) -> None:
    write.put_chunk(output, "7", table(*ROWS), {"of": "1"}, "shards", rows_per_group=2)
    footer = pq.read_metadata(io.BytesIO(output.read("shards/7.parquet")))
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [2, 2, 1]
    facts = write.read_footers(output, ["7"], "shards")["7"]
    assert facts.keys() == {"counts", "of", "schema_version"}
    assert facts["of"] == "1"


def test_the_same_rows_give_the_same_object(local: Store) -> None:
    objects = set()
    for _ in range(2):
        write.put_chunk(local, "1", table(*ROWS), {"run_id": "r"})
        objects.add(local.read("predictions/1.parquet"))
    assert len(objects) == 1


def test_chunks_without_detections_read_together_with_others(local: Store) -> None:
    write.put_chunk(local, "1", table(row("a"), row("b", error="empty: nothing")), {})
    write.put_chunk(local, "2", table(row("c", detections=1)), {})
    empty = write.read_chunk(local, "1")
    assert empty.schema.field("detections").type.equals(PREDICTIONS.field("detections").type)
    assert empty["detections"].to_pylist() == [[], []]
    both = pa.concat_tables([empty, write.read_chunk(local, "2")], promote_options="none")
    assert both.num_rows == 3
    paths = [f"{local.uri}/predictions/{name}.parquet" for name in "12"]
    assert pq.read_table(paths).num_rows == 3


def test_another_schema_is_our_mistake(local: Store) -> None:
    for wrong in (
        table(*ROWS).drop_columns("error"),
        table(*ROWS).set_column(3, "height", pa.array([1] * 5, pa.int64())),
    ):
        with pytest.raises(AssertionError):
            write.put_chunk(local, "1", wrong, {})
    assert list(local.list_objects()) == []


def test_a_flipped_byte_is_noticed(local: Store) -> None:
    write.put_chunk(local, "1", table(*(row(f"{n}", detections=2) for n in range(20))), {})
    path = "predictions/1.parquet"
    data = local.read(path)
    footer = pq.read_metadata(io.BytesIO(data)).row_group(0)
    for number in range(footer.num_columns):
        column = footer.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        at = start + column.total_compressed_size - 1
        local.put(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(OSError, match="CRC checksum verification failed"):
            write.read_chunk(local, "1")
    local.put(path, data)
    assert write.read_chunk(local, "1").num_rows == 20


def test_no_flipped_bit_gives_other_rows(local: Store) -> None:
    """Not in the pages, not in the footer, which has no checksum in Parquet. A sample of all bits."""
    rows = table(*(row(f"{n}", detections=n % 3) for n in range(6)), *ROWS)
    write.put_chunk(local, "1", rows, {"run_id": "r", "model_digest": "m"})
    path = "predictions/1.parquet"
    data = local.read(path)
    caught = 0
    for number in range(0, 8 * len(data), 131):
        at, bit = divmod(number, 8)
        local.put(path, data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            assert write.read_chunk(local, "1").equals(rows)
        except DamagedError:
            caught += 1
    # The rest lies in statistics and other facts that no rows come from.
    assert caught > len(data) * 8 / 131 / 2


def replaced(output: Store, rows: pa.Table, positions: tuple[int, ...]) -> list[dict[str, Any]]:
    counts = write.replace_rows(output, "1", rows, positions, {"run_id": "new"})
    found = write.read_chunk(output, "1")
    assert counts == write.count(found) == write.read_counts(output, ["1"])["1"]
    return found.to_pylist()


def test_rows_are_replaced_where_they_stand(output: Store) -> None:
    write.put_chunk(output, "1", table(*ROWS), {"run_id": "old"})
    rows = replaced(output, table(row("e", detections=1), row("b")), (4, 1))
    assert [(r["key"], r["status"]) for r in rows] == [
        ("a", "ok"),
        ("b", "ok"),
        ("c", "ok"),
        ("d", "error"),
        ("e", "ok"),
    ]
    assert len(rows[4]["detections"]) == 1
    assert write.failed_positions(output, ["1"]) == {"1": (3,)}


def test_a_row_that_is_in_error_again_keeps_its_names(output: Store) -> None:
    write.put_chunk(output, "1", table(*ROWS), {"run_id": "old"})
    new = table(row("00000003", error="missing: the shard is gone"))
    rows = replaced(output, new, (3,))
    assert [r["key"] for r in rows] == ["a", "b", "c", "d", "e"]
    assert rows[3]["error"] == "missing: the shard is gone"


def test_a_late_write_of_a_run_that_was_given_up_brings_no_error_back(output: Store) -> None:
    write.put_chunk(output, "1", table(*ROWS), {"run_id": "given up"})
    rows = replaced(output, table(row("b"), row("d"), row("e", detections=1)), (1, 3, 4))
    assert {r["status"] for r in rows} == {"ok"}
    # Its first write comes again, then that of a retry of its own.
    counts = write.put_chunk(output, "1", table(*ROWS), {"run_id": "given up"})
    assert counts == Counts(images=5, detections=3, errors={})
    again = table(row("b", error="hung: again"))
    assert replaced(output, again, (1,)) == rows


def test_two_that_replace_rows_at_once_lose_none(
    output: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write.put_chunk(output, "1", table(*ROWS), {"run_id": "old"})
    read, others = write.read_chunk, iter([(1, "b"), (3, "d")])

    def overtaken(*of: Any, **more: Any) -> pa.Table:
        found = read(*of, **more)
        if (other := next(others, None)) is not None:
            position, key = other
            with monkeypatch.context() as patch:
                patch.setattr(write, "read_chunk", read)
                write.replace_rows(
                    output, "1", table(row(key)), (position,), {"run_id": uuid.uuid4().hex}
                )
        return found

    with monkeypatch.context() as patch:
        patch.setattr(write, "read_chunk", overtaken)
        rows = table(row("b", error="hung: again"), row("e"))
        write.replace_rows(output, "1", rows, (1, 4), {"run_id": "new"})
    assert {r["status"] for r in read(output, "1").to_pylist()} == {"ok"}

    others = iter((1, "b") for _ in range(write.REPLACE_TRIES))
    with monkeypatch.context() as patch:
        patch.setattr(write, "read_chunk", overtaken)
        with pytest.raises(StorageError, match="replaced by others each time"):
            write.replace_rows(output, "1", table(row("e")), (4,), {"run_id": "new"})


def test_a_first_write_mends_what_was_damaged_on_its_way(output: Store) -> None:
    write.put_chunk(output, "1", table(*ROWS), {"run_id": "r"})
    path = "predictions/1.parquet"
    data = output.read(path)
    for damaged in (data[:-40], data[:20] + bytes([data[20] ^ 1]) + data[21:]):
        output.put(path, damaged)
        assert write.put_chunk(output, "1", table(*ROWS), {"run_id": "r"}) == COUNTS
        assert output.read(path) == data


def test_rows_of_a_chunk_that_is_gone_cannot_be_replaced(output: Store) -> None:
    with pytest.raises(IncompleteError, match="is gone: run the same command again"):
        write.replace_rows(output, "1", table(row("a")), (0,), {})


def test_failed_positions(local: Store) -> None:
    write.put_chunk(local, "1", table(*ROWS), {})
    write.put_chunk(local, "2", table(row("a")), {})
    assert write.failed_positions(local, ["1", "2"]) == {"1": (1, 3, 4)}
    assert write.failed_positions(local, []) == {}


def test_some_columns_of_a_chunk(local: Store) -> None:
    write.put_chunk(local, "1", table(*ROWS), {})
    assert write.read_chunk(local, "1", ["key", "status"]).column_names == ["key", "status"]


def test_counts() -> None:
    assert write.count(table(*ROWS)) == COUNTS
    assert write.count(table()) == Counts(images=0, detections=0, errors={})
    assert write.total(
        [COUNTS, Counts(images=1, detections=3, errors={"empty": 1, "missing": 1})]
    ) == (Counts(images=6, detections=5, errors={"missing": 3, "truncated": 1, "empty": 1}))
    assert write.total([]) == Counts(images=0, detections=0, errors={})


def test_counts_of_a_chunk_that_is_gone(output: Store) -> None:
    write.put_chunk(output, "1", table(*ROWS), {})
    with pytest.raises(IncompleteError, match="is gone: run the same command again") as caught:
        write.read_counts(output, ["1", "2"])
    assert output.url("predictions/2.parquet") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        (b"segjobs.counts", b'{"images": 9, "detections": 0, "errors": {}}'),
        (b"segjobs.crc32", b"00000000"),
    ],
)
def test_a_footer_that_lies_is_not_believed(local: Store, name: bytes, lie: bytes) -> None:
    write.put_chunk(local, "1", table(*ROWS), {"run_id": "r"})
    honest = pq.read_metadata(io.BytesIO(local.read("predictions/1.parquet"))).metadata
    sink = io.BytesIO()
    pq.write_table(table(*ROWS).replace_schema_metadata({**honest, name: lie}), sink)
    local.put("predictions/1.parquet", sink.getvalue())
    with pytest.raises(DamagedError, match=r"1\.parquet was damaged in the store .*: delete it"):
        write.read_counts(local, ["1"])


def test_a_footer_whose_rows_are_not_there_is_not_believed(local: Store) -> None:
    write.put_chunk(local, "1", table(*ROWS), {})
    honest = pq.read_metadata(io.BytesIO(local.read("predictions/1.parquet"))).metadata
    sink = io.BytesIO()
    pq.write_table(table(*ROWS[:2]).replace_schema_metadata(honest), sink)
    local.put("predictions/1.parquet", sink.getvalue())
    with pytest.raises(DamagedError, match="and it has 2 rows"):
        write.read_counts(local, ["1"])


def ok(images: int) -> Counts:
    return Counts(images=images, detections=1, errors={})


def test_finish_adds_up(local: Store) -> None:
    found = {"0": ok(3), "1": ok(2)}
    assert write.finish(local, {"0": 3, "1": 2}, found) == Counts(images=5, detections=2, errors={})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"0": ok(3)}, r"1 chunks of .*out lack rows \(1: 0 of 2\)"),
        ({"0": ok(3), "1": ok(1)}, r"1 chunks of .* \(1: 1 of 2\)"),
        ({"0": ok(3), "1": ok(3)}, r"1 chunks of .* \(1: 3 of 2\)"),
        ({}, r"2 chunks of .* \(0: 0 of 3, 1: 0 of 2\)"),
    ],
)
def test_finish_refuses_what_is_not_there(
    local: Store, found: dict[str, Counts], words: str
) -> None:
    with pytest.raises(IncompleteError, match=words):
        write.finish(local, {"0": 3, "1": 2}, found)


def test_marks(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put = type(local).put

    def noted(self: Store, path: str, data: bytes) -> None:
        order.append(path)
        put(self, path, data)

    monkeypatch.setattr(type(local), "put", noted)
    write.put_marks(local, {"counts": {"images": 1}, "name": "ü"})
    assert order == ["_manifest.json", "_SUCCESS"]
    assert documents.read(local, "_manifest.json") == {"counts": {"images": 1}, "name": "ü"}
    assert local.read("_SUCCESS") == b""
