import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import manifest
from jobs.detect import InputError
from jobs.storage import open_store
from jobs.store import StorageError, Store


def uris(store: Store, name: str, data: bytes) -> list[str]:
    store.put(name, data)
    info = store.info(name)
    assert info is not None
    return list(manifest.read_uris(store, info))


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        file,
        row_group_size=2,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    return file.getvalue()


WHOLE = [
    "s3://bucket/a, b.jpg",
    'gs://bucket/"quoted".jpg',
    "/data/line\nbreak.jpg",
    "file:///data/ü.jpg",
    "s3://bucket/#?%20.jpg",
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "lists"))


def as_csv(values: list[str]) -> bytes:
    quoted = ('"{}"'.format(value.replace('"', '""')) for value in values)
    return "".join(f"{number},{uri}\n" for number, uri in enumerate(["uri", *quoted])).encode()


def as_jsonl(values: list[str]) -> bytes:
    return "\n\n".join(json.dumps({"n": 1, "uri": value}) for value in values).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", as_csv(WHOLE)),
        ("a.CSV", b"\xef\xbb\xbf" + as_csv(WHOLE)),
        ("a.jsonl", as_jsonl(WHOLE)),
        ("a.parquet", parquet(uri=WHOLE, n=range(5))),
        ("a.parquet", parquet(uri=pa.array(WHOLE, pa.large_string()))),
    ],
)
def test_every_format_gives_its_uris_in_order(store: Store, name: str, data: bytes) -> None:
    assert uris(store, name, data) == WHOLE


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
        unique=True,
        max_size=8,
    )
)
def test_any_name_survives(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    store = open_store(str(tmp_path_factory.getbasetemp() / "names"))
    values = [f"s3://bucket/{name}" for name in names]
    for name, data in (
        ("a.csv", as_csv(values)),
        ("a.jsonl", as_jsonl(values)),
        ("a.parquet", parquet(uri=pa.array(values, pa.string()))),
    ):
        assert uris(store, name, data) == values


def test_relative_uris_start_at_the_manifest(store: Store, bucket: Any) -> None:
    data = b"uri\na.jpg\nsub/b.jpg\n"
    folder = f"{store.uri}/x"
    assert uris(store, "x/a.csv", data) == [f"{folder}/a.jpg", f"{folder}/sub/b.jpg"]
    assert uris(store, "a.csv", data) == [f"{store.uri}/a.jpg", f"{store.uri}/sub/b.jpg"]
    there = bucket.store("in")
    folder = f"{bucket.uri}/in/x"
    assert uris(there, "x/a.csv", data) == [f"{folder}/a.jpg", f"{folder}/sub/b.jpg"]


def test_repeats_are_refused_with_their_rows(store: Store) -> None:
    with pytest.raises(InputError, match=r"2 images more than once \(rows \[0, 2, 3, 4\]"):
        uris(store, "a.csv", b"uri\na\nb\na\nc\nc\n"[:12] + b"c\n")


@pytest.mark.parametrize(
    "uri", ["https://h/a.jpg?X-Amz-Credential=x&X-Amz-Signature=hunter2", "s3://me:hunter2@b/a.jpg"]
)
def test_credentials_in_a_uri_are_refused_unseen(store: Store, uri: str) -> None:
    with pytest.raises(InputError, match=r"row 1 of .* has a password or a signature") as caught:
        uris(store, "a.csv", f"uri\na.jpg\n{uri}\n".encode())
    assert "hunter2" not in str(caught.value)


def test_what_no_table_can_hold_is_named_with_its_row(store: Store) -> None:
    with pytest.raises(InputError, match=r"row 1 of .* has half a character"):
        uris(store, "a.jsonl", b'{"uri": "a.jpg"}\n{"uri": "\\ud800.jpg"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl cannot be read as a manifest"):
        uris(store, "a.jsonl", b"[" * 100_000 + b"\n")


def test_two_names_of_one_image_are_a_repeat(store: Store) -> None:
    data = f"uri\na.jpg\n{store.uri}/a.jpg\n".encode()
    with pytest.raises(InputError, match=r"1 images more than once \(rows \[0, 1\]"):
        uris(store, "a.csv", data)


@pytest.mark.parametrize(
    ("name", "data", "row"),
    [
        ("a.csv", b'uri,n\na,1\n"",2\n', 1),
        ("a.jsonl", b'{"uri": "a"}\n{"url": "b"}\n', 1),
        ("a.jsonl", b'{"uri": 5}\n', 0),
        ("a.jsonl", b'{"uri": "a"}\n["b"]\n', 1),
        ("a.jsonl", b'"a.jpg"\n', 0),
        ("a.parquet", parquet(uri=["a", "b", None]), 2),
        ("a.parquet", parquet(uri=[1, 2]), 0),
    ],
)
def test_a_row_without_uri_is_refused(store: Store, name: str, data: bytes, row: int) -> None:
    with pytest.raises(InputError, match=rf"row {row} of .*/{name} has no uri"):
        uris(store, name, data)


def flipped(data: bytes) -> bytes:
    """A bit of the last value is another one; only the page's checksum knows."""
    column = pq.read_metadata(io.BytesIO(data)).row_group(1).column(0)
    at = column.data_page_offset + column.total_compressed_size - 1
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b""),
        ("a.csv", b"url,n\na,1\n"),
        ("a.csv", b"uri\na\nb,c,d\n"),
        ("a.csv", b"uri\n\xff\xfe\n"),
        ("a.jsonl", b'{"uri": "a"}\n{"uri": \n'),
        ("a.jsonl", b'{"uri": "\xff"}\n'),
        ("a.parquet", b"no parquet"),
        ("a.parquet", parquet(url=["a"])),
        ("a.parquet", flipped(parquet(uri=["a.jpg", "b.jpg", "c.jpg"]))),
    ],
)
def test_what_is_no_manifest_is_refused_in_words(store: Store, name: str, data: bytes) -> None:
    with pytest.raises(InputError, match=r"cannot be read as a manifest: .* needs a column `uri`"):
        uris(store, name, data)


def test_trouble_of_the_store_is_not_taken_for_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise StorageError("no access")

    monkeypatch.setattr(type(store), "read", fail)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        with pytest.raises(StorageError, match="no access"):
            uris(store, name, b"uri\nabcdefgh\n")


def test_line_breaks_where_blocks_of_a_csv_meet(store: Store) -> None:
    # Arrow reads a CSV in blocks of 1 MiB; one of these line breaks lies where two meet.
    values = [f"{number:04d}" + "\n" * 3000 + ".jpg" for number in range(1000)]
    assert uris(store, "a.csv", as_csv([f"s3://b/{value}" for value in values])) == [
        f"s3://b/{value}" for value in values
    ]


def test_rows_come_as_they_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "WINDOW", 1000)
    values = [f"s3://bucket/{number:06d}.jpg" for number in range(5000)]
    assert uris(store, "a.jsonl", as_jsonl(values)) == values
    assert uris(store, "a.csv", as_csv(values)) == values
