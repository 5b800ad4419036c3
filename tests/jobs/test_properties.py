"""Whatever is drawn: plans cover each image once, what is left is the plan less the ledger, and a
damaged shard gives what is intact, byte for byte, and says the rest."""

import contextlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import chunks, index, plan, predict
from jobs.chunks import Chunk
from jobs.config import PredictConfig
from jobs.detect import object_table
from jobs.parquet_columns import ParquetInputError
from jobs.plan import Plan
from jobs.read import Source, read_chunk
from jobs.storage import open_store
from jobs.store import ObjectInfo, Store
from tests.fuzz.targets import OneObject, check_tar

BLOCK = tarfile.BLOCKSIZE


def read_all(planned: list[Chunk], store: Store) -> list[dict[str, Any]]:
    """Every row of every chunk, as many as were planned."""
    source = Source(store=store, lists=store, endpoint_url=None, image_column=None)
    rows = []
    for chunk in planned:
        table = read_chunk(chunk, source)
        assert table.num_rows == chunk.num_images
        rows += table.to_pylist()
    return rows


# --- the plan and its ledger ----------------------------------------------------------------------


def plan_of(folder: str, shards: list[list[int]], chunk_size: int, limit: int | None) -> Plan:
    """A plan of lists of loose images: each a number of images of given sizes."""
    cut: list[Chunk] = []
    for number, sizes in enumerate(shards):
        objects = object_table([ObjectInfo(f"{number}/{n}", s, "") for n, s in enumerate(sizes)])
        cut += index.index_objects(objects, f"list-{number}", chunk_size, "")
    table = chunks.numbered(chunks.to_table(cut), limit)
    return Plan(
        plan_id="p",
        job={},
        folder=folder,
        format="images",
        why="",
        num_images=sum(table["num_images"].to_pylist()),
        num_bytes=0,
        num_objects=0,
        input_digest="",
        notes=(),
        chunks=table,
    )


@given(
    shards=st.lists(st.lists(st.integers(0, 150), max_size=30), max_size=6),
    chunk_size=st.integers(1, 12),
    limit=st.none() | st.integers(1, 120),
    data=st.data(),
)
def test_each_image_is_planned_once_and_what_is_left_is_the_plan_less_the_ledger(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[list[int]],
    chunk_size: int,
    limit: int | None,
    data: st.DataObject,
) -> None:
    folder = str(tmp_path_factory.mktemp("ledger"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_CHUNK_BYTES", 300)
        planned = plan_of(folder, shards, chunk_size, limit)
    made = list(chunks.from_table(planned.chunks))
    covered = [(c.list_path, n) for c in made for n in range(c.start, c.start + c.num_images)]
    every = [
        (f"list-{number}", n) for number, sizes in enumerate(shards) for n in range(len(sizes))
    ]
    assert covered == every[:limit]
    assert planned.num_images == len(covered)

    ids = [chunk.chunk_id for chunk in made]
    assert len(set(ids)) == len(ids)
    done = data.draw(st.sets(st.sampled_from(ids)) if ids else st.just(set()))
    output = open_store(folder)
    for chunk_id in done:
        output.put(chunks.output_path(chunk_id), b"rows")
    # What killed writers, file systems and people leave there finishes no chunk.
    for name in (".00000000.parquet.part", "00000000.tmp", "notes.txt"):
        output.put(f"predictions/{name}", b"")
    assert plan.finished_chunks(output).keys() == done

    config = PredictConfig(input="in", output=folder, model="m")
    left = predict._left(config, planned, output, plan.finished_chunks(output).keys())
    assert [work.chunk for work in left] == [c for c in made if c.chunk_id not in done]
    assert all(work.positions is None for work in left)
    for work in left:
        output.put(chunks.output_path(work.chunk.chunk_id), b"rows")
    assert predict._left(config, planned, output, plan.finished_chunks(output).keys()) == []


# --- tars -----------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=120)
KINDS = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
MEMBERS = st.lists(
    st.tuples(
        TEXT.map(lambda name: name.strip("/") or "x"),
        st.sampled_from([".jpg", ".PNG", ".json", "/../../c.jpg", ".jpg.txt"]),
        st.sampled_from(["file", "file", "file", "link", "hard", "device"]),
        st.binary(max_size=40).map(lambda data: data * 40),
    ),
    max_size=8,
)
DIALECTS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def archive_of(members: list[tuple[str, str, str, bytes]], dialect: int) -> tuple[bytes, list[Any]]:
    """A tar; of each image that is a file, its content and the byte behind its last block."""
    file, images = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=dialect, encoding="utf-8") as archive:
        for name, suffix, kind, content in members:
            member = tarfile.TarInfo(name + suffix)
            if kind in KINDS:
                member.type, member.linkname, content = KINDS[kind], "/etc/passwd", b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            if kind == "file" and suffix not in (".json", ".jpg.txt"):
                images.append((content, file.tell()))
    return file.getvalue(), images


@given(members=MEMBERS, dialect=DIALECTS, chunk_size=st.integers(1, 4))
def test_any_members_come_back_byte_for_byte(
    members: list[tuple[str, str, str, bytes]], dialect: int, chunk_size: int
) -> None:
    data, images = archive_of(members, dialect)
    check_tar(data)
    store = OneObject(data)
    rows = read_all(index.index_tar(store, store.the_info, chunk_size), store)
    assert [row["data"] for row in rows if row["error"] is None] == [c for c, _ in images]
    bad = sum(
        kind in KINDS and suffix not in (".json", ".jpg.txt") for _, suffix, kind, _ in members
    )
    errors = [row["error"] for row in rows if row["error"] is not None]
    assert errors == ["unreadable: a link or a device, not a file"] * bad


@settings(max_examples=150)
@given(members=MEMBERS, dialect=DIALECTS, data=st.data())
def test_what_lies_before_the_damage_of_a_tar_is_intact(
    members: list[tuple[str, str, str, bytes]], dialect: int, data: st.DataObject
) -> None:
    whole, images = archive_of(members, dialect)
    at = data.draw(st.integers(0, len(whole.rstrip(b"\0"))), label="at")
    some = data.draw(st.binary(min_size=1, max_size=1100), label="some")
    cut = False
    match data.draw(st.sampled_from(["cut", "overwrite", "zeros", "lost", "more"]), label="damage"):
        case "cut":
            damaged, cut = whole[:at], True
        case "overwrite":
            damaged = whole[:at] + some + whole[at + len(some) :]
        case "zeros":
            damaged = whole[:at] + bytes(len(some)) + whole[at + len(some) :]
        case "lost":
            damaged = whole[:at] + whole[at + len(some) :]
        case _:
            damaged = whole[:at] + some + whole[at:]
    check_tar(damaged)
    store = OneObject(damaged)
    rows = read_all(index.index_tar(store, store.the_info, 3), store)
    before = [content for content, stop in images if stop <= at]
    assert [row["data"] for row in rows if row["error"] is None][: len(before)] == before
    if cut:
        assert rows[-1]["key"] == ""
        assert rows[-1]["error"].startswith("shard: ")


# --- Parquet --------------------------------------------------------------------------------------

VALUES = [bytes([n]) * (20 + n) for n in range(12)]


def parquet(compression: str) -> bytes:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": value, "path": f"{n}.jpg"} for n, value in enumerate(VALUES)]
    file = io.BytesIO()
    pq.write_table(
        pa.table({"image": pa.array(rows, image)}),
        file,
        row_group_size=5,
        compression=compression,
        use_dictionary=False,
        write_page_checksum=True,
    )
    return file.getvalue()


SHARDS = {name: parquet(name) for name in ("none", "zstd")}


@settings(max_examples=150)
@given(compression=st.sampled_from(sorted(SHARDS)), chunk_size=st.integers(1, 6), data=st.data())
def test_no_changed_byte_of_a_parquet_shard_loses_a_row_in_silence(
    compression: str, chunk_size: int, data: st.DataObject
) -> None:
    changed = bytearray(SHARDS[compression])
    at = data.draw(st.integers(0, len(changed) - 1), label="at")
    changed[at] ^= data.draw(st.integers(1, 255), label="flip")
    store = OneObject(bytes(changed), "a.parquet")
    try:
        planned = index.index_parquet(store, store.the_info, chunk_size, None)
    except ParquetInputError:
        # The name or the type of the image column is another one: the plan is refused.
        return
    rows = read_all(planned, store)
    damage = [row for row in rows if (row["error"] or "").startswith(("shard: ", "changed: "))]
    assert damage or len(rows) == len(VALUES)
    if any(row["key"] == "" for row in rows):
        return
    if at < footer_start(SHARDS[compression]):
        # Everything but the footer is under the pages' checksums.
        assert len(rows) == len(VALUES)
        assert all(row["data"] in (None, VALUES[n]) for n, row in enumerate(rows))


@settings(max_examples=60)
@given(cut=st.floats(0, 1), chunk_size=st.integers(1, 6))
def test_a_cut_parquet_shard_is_one_row_that_says_so(cut: float, chunk_size: int) -> None:
    whole = SHARDS["zstd"]
    store = OneObject(whole[: int(cut * (len(whole) - 1))], "a.parquet")
    (row,) = read_all(index.index_parquet(store, store.the_info, chunk_size, None), store)
    assert row["key"] == ""
    assert row["error"].startswith("shard: the Parquet file is damaged: ")


def footer_start(data: bytes) -> int:
    """Where a Parquet file's footer begins; behind it are its length and the magic word."""
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


@pytest.mark.parametrize("flip", [1, 4, 16])
def test_no_footer_ends_the_process(flip: int) -> None:
    """Found by hypothesis: Arrow aborts where it is asked for one column's size in such a footer."""
    data = SHARDS["zstd"]
    # The schema stands first: a column's levels no longer fit what is counted of them.
    for at in range(footer_start(data), footer_start(data) + 60):
        changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        store = OneObject(changed, "a.parquet")
        with contextlib.suppress(ParquetInputError):
            read_all(index.index_parquet(store, store.the_info, 4, None), store)


# --- a bit that flips on the way ------------------------------------------------------------------


class Flipping(OneObject):
    """Flips a bit of each piece in its first so many reads."""

    def __init__(self, data: bytes, path: str, reads: set[int]) -> None:
        super().__init__(data, path)
        self.reads, self.count = reads, 0

    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        found = super().read(path, span, etag)
        self.count += 1
        if self.count - 1 not in self.reads or not found:
            return found
        at = int(np.random.default_rng(self.count).integers(len(found)))
        return found[:at] + bytes([found[at] ^ 4]) + found[at + 1 :]


def test_a_bit_that_flips_on_its_way_is_read_again(make_tar: Callable[..., bytes]) -> None:
    """Planning ends with the same chunks; a reader's rows are the right ones or are in error."""
    headers_only = make_tar([(f"{n}.jpg", b"") for n in range(20)])
    for data, path, cut in (
        (headers_only, "a.tar", index.index_tar),
        (SHARDS["zstd"], "a.parquet", lambda *of: index.index_parquet(*of, None)),
    ):
        calm = OneObject(data, path)
        planned = cut(calm, calm.the_info, 4)
        rows = read_all(planned, calm)
        for number in range(3):
            shaken = Flipping(data, path, {number})
            assert cut(shaken, shaken.the_info, 4) == planned
            shaken = Flipping(data, path, {number})
            assert read_all(planned, shaken) == rows


def test_a_row_group_of_any_size_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [np.random.default_rng(n).bytes(50_000) for n in range(400)]
    file = io.BytesIO()
    pq.write_table(
        pa.table({"image": pa.array(values, pa.binary())}),
        file,
        row_group_size=len(values),
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_batch_size=4,
        data_page_size=200_000,
    )
    data = file.getvalue()
    assert pq.read_metadata(io.BytesIO(data)).num_row_groups == 1
    store = OneObject(data, "a.parquet")
    spans: list[int] = []
    whole = OneObject.read

    def noted(self: OneObject, path: str, span: Any = None, etag: str = "") -> bytes:
        found = whole(self, path, span, etag)
        spans.append(len(found))
        return found

    monkeypatch.setattr(OneObject, "read", noted)
    monkeypatch.setattr("jobs.read.PARQUET_WINDOW", 2**20)
    planned = index.index_parquet(store, store.the_info, 16, None)
    spans.clear()
    source = Source(store=store, lists=store, endpoint_url=None, image_column=None)
    for chunk in (planned[0], planned[-1]):
        rows = read_chunk(chunk, source).to_pylist()
        assert [row["data"] for row in rows] == values[chunk.start : chunk.start + 16]
        assert max(spans) < len(data) / 8
        # The first chunk does not cost the row group.
        assert chunk.start or sum(spans) < len(data) / 2
