"""Packed sets as they are found: rows, categories, and what is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import feed, training_set, versions
from jobs.detect import InputError
from jobs.storage import open_store
from jobs.store import ChangedError, DamagedError, StorageError, Store
from jobs.training_set import ROWS, TrainingSet, load, read_chunk
from segmodel.schema import PREDICTIONS, TRAINING

PutPacked = Callable[..., list[dict[str, Any]]]


def read(found: TrainingSet) -> list[dict[str, Any]]:
    return [row for chunk in found.chunks for row in read_chunk(chunk).to_pylist()]


def expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**{name: row[name] for name in ROWS.names[:-1]}, "data": row["image"]["bytes"]}
        for row in rows
        if row["status"] == "ok"
    ]


def rewrite(root: Path, change: Callable[[dict[str, Any]], None], **options: Any) -> None:
    """Write the shards again with changed rows."""
    for path in sorted((root / "shards").iterdir()):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            change(row)
        table = pa.Table.from_pylist(rows, TRAINING)
        pq.write_table(table, path, **{"row_group_size": 5, "write_page_checksum": True, **options})


def set_in_error(row: dict[str, Any]) -> None:
    row.update(status="error", error="empty: zero bytes", image=None, height=None, width=None)


def test_rows_are_found_and_read_as_they_were_packed(tmp_path: Path, put_packed: PutPacked) -> None:
    rows = put_packed(open_store(str(tmp_path)), 27)
    found = load([str(tmp_path)], None)
    assert [chunk.num_rows for chunk in found.chunks] == [5, 5, 5, 5, 5, 2]
    assert (found.num_rows, found.num_skipped) == (27, 0)
    assert found.categories == ((1, "person"), (3, "car"))
    assert read(found) == expected(rows)
    assert list(training_set.rows(found.chunks)) == expected(rows)
    assert list(training_set.rows(found.chunks[4:])) == expected(rows)[20:]
    assert list(training_set.rows(())) == []


@pytest.mark.parametrize(("num_rows", "num_parts"), [(27, 2), (27, 7), (3, 5)])
def test_parts_are_as_long_however_rows_are_grouped(
    tmp_path: Path, put_packed: PutPacked, num_rows: int, num_parts: int
) -> None:
    rows = put_packed(open_store(str(tmp_path)), num_rows, group_rows=8)
    chunks = load([str(tmp_path)], None).chunks
    parts = [list(training_set.rows(chunks, part, num_parts)) for part in range(num_parts)]
    assert [row for part in parts for row in part] == expected(rows)
    assert {len(part) for part in parts} <= {num_rows // num_parts, num_rows // num_parts + 1}


def test_of_many_groups_a_part_reads_its_own(
    tmp_path: Path, put_packed: PutPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_packed(open_store(str(tmp_path)), 40)
    chunks = load([str(tmp_path)], None).chunks
    read: list[Any] = []

    def noted(chunk: training_set.RowGroup) -> pa.Table:
        read.append(chunk)
        return read_chunk(chunk)

    monkeypatch.setattr(training_set, "read_chunk", noted)
    assert len(list(training_set.rows(chunks, 1, 2))) == 20
    assert tuple(read) == chunks[4:]


def test_a_set_on_s3_is_read_by_ranges(bucket: Any, put_packed: PutPacked) -> None:
    rows = put_packed(bucket.store("set"), 100, shard_rows=90, group_rows=30)
    found = load([f"{bucket.uri}/set"], bucket.endpoint_url)
    assert list(training_set.rows(found.chunks)) == expected(rows)
    first = found.chunks[0]
    reads = counted_reads(first.store)
    read_chunk(first)
    # The footer, and the row group; a small shard comes with its footer.
    assert 1 <= len(reads) <= 2
    put_packed(bucket.store("set"), 101, shard_rows=90, group_rows=30)
    with pytest.raises(ChangedError, match="changed"):
        read_chunk(found.chunks[-1])


def counted_reads(store: Store) -> list[Any]:
    """The spans that are read from now on."""
    reads: list[Any] = []
    plain = store.read

    def read(path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        reads.append(span)
        return plain(path, span, etag)

    store.read = read  # type: ignore[method-assign]
    return reads


@pytest.mark.parametrize("write_statistics", [True, False])
def test_rows_in_error_are_skipped_and_counted(
    tmp_path: Path, put_packed: PutPacked, write_statistics: bool
) -> None:
    rows = put_packed(open_store(str(tmp_path)), 27)
    wrong = {"all#3.jpg", "all#4.jpg", *(f"all#{number}.jpg" for number in range(10, 15))}

    def change(row: dict[str, Any]) -> None:
        if row["image_id"] in wrong:
            set_in_error(row)

    rewrite(tmp_path, change, write_statistics=write_statistics)
    found = load([str(tmp_path)], None)
    assert [chunk.num_rows for chunk in found.chunks] == [3, 5, 5, 5, 2]
    assert (found.num_rows, found.num_skipped) == (20, 7)
    assert read(found) == expected([row for row in rows if row["image_id"] not in wrong])


def test_sets_are_taken_together(tmp_path: Path, put_packed: PutPacked) -> None:
    roots = [str(tmp_path / name) for name in ("one", "two")]
    of_one = {"shards": 1, "counts": {"images": 7}}
    rows = [row for root in roots for row in put_packed(open_store(root), 7)]
    (tmp_path / "two" / "_manifest.json").write_text(
        json.dumps(of_one | {"categories": [{"id": 3, "name": "car"}, {"id": 2, "name": "tree"}]})
    )
    found = load(roots, None)
    assert read(found) == expected(rows)
    assert found.categories == ((1, "person"), (2, "tree"), (3, "car"))
    (tmp_path / "two" / "_manifest.json").write_text(
        json.dumps(of_one | {"categories": [{"id": 3, "name": "bus"}]})
    )
    with pytest.raises(InputError, match=r"category 3 is 'car' in one set and 'bus' in .*two"):
        load(roots, None)


def test_a_set_in_part_or_with_more_is_refused(tmp_path: Path, put_packed: PutPacked) -> None:
    put_packed(open_store(str(tmp_path)), 27)
    _, second = sorted((tmp_path / "shards").iterdir())
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(InputError, match="1 shards with 20 rows, and was packed as 2 with 27"):
        load([str(tmp_path)], None)
    second.write_bytes(whole)
    (tmp_path / "shards" / "99999999.parquet").write_bytes(whole)
    with pytest.raises(InputError, match="3 shards with 34 rows"):
        load([str(tmp_path)], None)


def test_the_digest_changes_with_a_shard(tmp_path: Path, put_packed: PutPacked) -> None:
    put_packed(open_store(str(tmp_path)), 27)
    before = load([str(tmp_path)], None)
    assert load([str(tmp_path)], None).digest == before.digest
    rewrite(tmp_path, lambda row: row.update(key="renamed"))
    assert load([str(tmp_path)], None).digest != before.digest


def test_what_is_no_packed_set_is_refused_in_words(tmp_path: Path, put_packed: PutPacked) -> None:
    root = tmp_path / "set"
    with pytest.raises(InputError, match=r"nothing at .*set: check the path"):
        load([str(root)], None)
    root.mkdir()
    (root / "photo.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no packed set, it has no shards/\*\.parquet: .*pack"):
        load([str(root)], None)
    put_packed(open_store(str(root)), 7)
    (root / "_manifest.json").write_text("{}")
    with pytest.raises(InputError, match="packed without annotations"):
        load([str(root)], None)
    (root / "_manifest.json").unlink()
    with pytest.raises(InputError, match=r"no _manifest\.json: .*not finished"):
        load([str(root)], None)


def test_shards_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, put_packed: PutPacked
) -> None:
    put_packed(open_store(str(tmp_path)), 7)
    shard = tmp_path / "shards" / "00000000.parquet"
    whole = pq.read_table(shard)
    pq.write_table(whole.select(PREDICTIONS.names), shard)
    with pytest.raises(InputError, match=r"00000000\.parquet lacks the bytes of images"):
        load([str(tmp_path)], None)
    pq.write_table(whole.drop_columns("detections"), shard)
    with pytest.raises(InputError, match="lacks detections"):
        load([str(tmp_path)], None)
    shard.write_bytes(b"no parquet")
    with pytest.raises(StorageError, match=r"00000000\.parquet is no Parquet file"):
        load([str(tmp_path)], None)
    pq.write_table(whole, shard)
    rewrite(tmp_path, set_in_error)
    with pytest.raises(InputError, match=r"no row at .* is ok"):
        load([str(tmp_path)], None)


def test_a_flipped_byte_is_noticed(tmp_path: Path, put_packed: PutPacked) -> None:
    put_packed(open_store(str(tmp_path)), 7)
    shard = tmp_path / "shards" / "00000000.parquet"
    column = pq.ParquetFile(shard).metadata.row_group(1).column(0)
    data = bytearray(shard.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start + column.total_compressed_size - 2] ^= 1
    shard.write_bytes(bytes(data))
    found = load([str(tmp_path)], None)
    read_chunk(found.chunks[0])
    with pytest.raises(DamagedError, match=r"row group 1 of .*00000000\.parquet is damaged"):
        read_chunk(found.chunks[1])


def test_a_version_of_a_data_set_is_a_set_to_train_on(
    tmp_path: Path, put_packed: PutPacked
) -> None:
    dataset, packed = tmp_path / "set", tmp_path / "packed"
    rows = put_packed(open_store(str(dataset / "versions" / "1" / "x")), 12)
    (dataset / "versions" / "1" / "x" / "shards").rename(
        dataset / "versions" / "1" / "x" / "accepted"
    )
    store = open_store(str(dataset))
    infos = list(store.list_objects("versions/1/x/accepted"))
    facts = {"rows": 12, "detections": 12, "first": "all#0.jpg", "last": "all#9.jpg"}
    listed = versions.listing("accepted", infos, [facts])
    versions.put_table(store, "versions/1/x/objects.parquet", listed)
    manifest = {
        **{"run_id": "r", "status": "published", "objects": "versions/1/x/objects.parquet"},
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "counts": {"all": {"accepted": {"objects": 1, "rows": 12}}},
    }
    assert versions.publish(store, 1, manifest)
    for uri in (dataset, dataset / "versions" / "1"):
        found = load([str(uri)], None)
        assert found.categories == ((1, "person"), (3, "car"))
        assert read(found) == expected(rows)
        assert found.weights == ()

    put_packed(open_store(str(packed)), 7)
    both = load([str(packed), str(dataset)], None, [1.0, 0.5])
    assert both.num_rows == 19
    # Row groups of 5: two of the packed set, three of the version.
    assert both.weights == (1.0, 1.0, 0.5, 0.5, 0.5)
    order = feed.make_order(both, 2, 0)
    assert order.chunk_weights == both.weights

    lost = {**manifest, "counts": {"all": {"accepted": {"objects": 2, "rows": 30}}}}
    assert versions.publish(store, 2, lost)
    with pytest.raises(
        InputError, match="holds 1 shards with 12 rows, and was packed as 2 with 30"
    ):
        load([str(dataset)], None)
