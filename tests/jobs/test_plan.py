import io
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import chunks, detect, plan, tasks
from jobs.cluster import ClusterError
from jobs.detect import InputError, look
from jobs.parquet_columns import ParquetInputError
from jobs.plan import Cut, Plan, PlanError
from jobs.read import Source, read_chunk
from jobs.storage import open_store
from jobs.store import Store

JOB = {"input": "in", "model_digest": "abc", "score_threshold": 0.05, "limit": None}


@pytest.fixture
def source(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "in"))


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return request.getfixturevalue("bucket").store("out")
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def cut(chunk_size: int = 2, limit: int | None = None, **values: Any) -> Cut:
    values = {"image_column": None, "endpoint_url": None, **values}
    return Cut(chunk_size=chunk_size, limit=limit, **values)


def put_images(source: Store, number: int) -> None:
    for n in range(number):
        source.put(f"{n:03d}.jpg", bytes([n]) * (n + 1))


def make(
    source: Store, output: Store | None, how: Cut | None = None, job: dict[str, Any] = JOB
) -> Plan:
    return plan.make(look(source.uri, "auto", None), job, how or cut(), output)


def keys_of(made: Plan, source: Store, output: Store) -> list[str]:
    """The keys of all planned images, read chunk by chunk."""
    where = Source(store=source, lists=output, endpoint_url=None, image_column=None)
    keys = []
    for chunk in chunks.from_table(made.chunks):
        rows = read_chunk(chunk, where)
        assert rows.num_rows == chunk.num_images
        keys += rows["key"].to_pylist()
    return keys


def same(one: Plan, other: Plan) -> bool:
    return {**vars(one), "chunks": None} == {**vars(other), "chunks": None} and (
        one.chunks.equals(other.chunks)
    )


# --- making ---------------------------------------------------------------------------------------


def test_a_plan_of_loose_images(source: Store, output: Store) -> None:
    put_images(source, 5)
    source.put("notes.txt", b"1")
    made = make(source, output)
    assert made.chunks["chunk_id"].to_pylist() == ["00000000", "00000001", "00000002"]
    assert made.chunks["num_images"].to_pylist() == [2, 2, 1]
    assert (made.num_images, made.num_bytes, made.num_objects) == (5, 15, 5)
    assert (made.format, made.folder, made.job) == ("images", source.uri, JOB)
    assert made.why == "5 of 6 objects are images, and none is of another format"
    assert made.notes == ("1 objects that are not images are ignored",)
    assert keys_of(made, source, output) == [f"{n:03d}.jpg" for n in range(5)]
    # A chunk is a row group of its list, so that its reader takes no other.
    (list_path,) = set(made.chunks["list_path"].to_pylist())
    footer = pq.read_metadata(io.BytesIO(output.read(list_path)))
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [2, 2, 1]


def test_many_loose_images_have_several_lists(
    source: Store, local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "OBJECTS_PER_LIST", 4)
    put_images(source, 10)
    made = make(source, local, cut(3))
    assert made.chunks["num_images"].to_pylist() == [3, 1, 3, 1, 2]
    assert len(set(made.chunks["list_path"].to_pylist())) == 3
    assert keys_of(made, source, local) == [f"{n:03d}.jpg" for n in range(10)]


def test_a_limit(source: Store, local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "OBJECTS_PER_LIST", 4)
    put_images(source, 10)
    for limit, sizes in ((1, [1]), (3, [3]), (4, [3, 1]), (6, [3, 1, 2]), (99, [3, 1, 3, 1, 2])):
        made = make(source, local, cut(3, limit))
        assert made.chunks["num_images"].to_pylist() == sizes
        assert made.num_images == min(limit, 10)
        assert keys_of(made, source, local) == [f"{n:03d}.jpg" for n in range(min(limit, 10))]


def test_a_limit_stops_the_indexing(source: Store, local: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "OBJECTS_PER_LIST", 2)
        put_images(source, 10)
        make(source, local, cut(2, 2))
    lists = [info.path for info in local.list_objects("_plan") if "list-" in info.path]
    assert len(lists) == 1


def test_a_plan_that_is_only_shown_writes_nothing(source: Store, local: Store) -> None:
    put_images(source, 3)
    made = make(source, None)
    assert made.num_images == 3
    assert list(local.list_objects()) == []


def put_shards(source: Store, number: int, make_tar: Callable[..., bytes]) -> list[str]:
    """Tars of three images each; the keys in their order."""
    keys = [[f"{shard}-{n}.jpg" for n in range(3)] for shard in range(number)]
    for shard, names in enumerate(keys):
        source.put(f"{shard:03d}.tar", make_tar([(name, b"1") for name in names]))
    return [name for names in keys for name in names]


@pytest.mark.ray
def test_shards_are_indexed_in_order(
    ray_local: None,
    source: Store,
    output: Store,
    make_tar: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "SHARDS_PER_TASK", 2)
    monkeypatch.setattr(tasks, "TASKS_UNDER_WAY", 3)
    monkeypatch.setattr(plan, "RESULTS_PER_TABLE", 4)
    keys = put_shards(source, 11, make_tar)
    made = make(source, output)
    assert made.chunks["shard"].to_pylist() == [f"{n:03d}.tar" for n in range(11) for _ in "12"]
    assert made.chunks["num_images"].to_pylist() == [2, 1] * 11
    assert (made.num_images, made.num_objects) == (33, 11)
    assert keys_of(made, source, output) == keys
    limited = make(source, output, cut(limit=7))
    assert keys_of(limited, source, output) == keys[:7]


@pytest.mark.ray
def test_damaged_shards_are_noted(
    ray_local: None, source: Store, local: Store, make_tar: Callable[..., bytes]
) -> None:
    put_shards(source, 3, make_tar)
    source.put("001.tar", source.read("001.tar")[:2048])
    made = make(source, local)
    assert made.notes == ("1 shards are damaged: each has a row that says how",)
    assert made.num_images == 3 + 2 + 1 + 3
    assert made.chunks["kind"].to_pylist() == ["tar", "tar", "tar", "verdict", "tar", "tar"]


def deadly(bad: str, honest: Callable[..., Any]) -> Callable[..., Any]:
    """The same, in a process that dies when it is to look into shards whose name has `bad` in it."""

    def look_into(store: Store, shards: pa.Table, *more: Any) -> Any:
        if any(bad in path for path in shards["path"].to_pylist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(store, shards, *more)

    return look_into


@pytest.mark.ray
def test_a_shard_that_ends_its_indexer_is_a_row_in_error(
    ray_local: None,
    source: Store,
    local: Store,
    make_tar: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_index_shards", deadly("1.tar", plan._index_shards))
    monkeypatch.setattr(plan, "SHARDS_PER_TASK", 2)
    put_shards(source, 4, make_tar)
    made = make(source, local, cut(chunk_size=3))
    assert made.chunks["kind"].to_pylist() == ["tar", "verdict", "tar", "tar"]
    assert made.chunks["shard"].to_pylist() == [f"{n:03d}.tar" for n in range(4)]
    assert made.notes == ("1 shards are damaged: each has a row that says how",)
    where = Source(store=source, lists=local, endpoint_url=None, image_column=None)
    (row,) = read_chunk(list(chunks.from_table(made.chunks))[1], where).to_pylist()
    assert row["error"] == "shard: it cannot be indexed: the process died, 3 times"
    assert (row["shard"], row["key"], row["data"]) == ("001.tar", "", None)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("most", "words"),
    [
        (10, r"3 shards of .* them, all that there are \(000.tar, 001.tar, 002.tar;"),
        (
            1,
            r"2 shards of .* them, the last 2 in a row \(000.tar, 001.tar; the process died, 3 times",
        ),
    ],
)
def test_a_machine_that_can_index_no_shard_ends_the_job(
    ray_local: None,
    source: Store,
    local: Store,
    make_tar: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    words: str,
) -> None:
    monkeypatch.setattr(plan, "_index_shards", deadly("tar", plan._index_shards))
    monkeypatch.setattr("jobs.deadly.MOST_DEADLY", most)
    put_shards(source, 3, make_tar)
    with pytest.raises(ClusterError, match=words):
        make(source, local)
    assert plan.load(local) is None


@pytest.mark.ray
def test_a_parquet_file_that_ends_who_looks_into_it_is_taken_for_a_shard(
    ray_local: None, source: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.put("a.parquet", parquet(uri=["x.jpg"]))
    assert look(source.uri, "auto", None, tasks.aside).format == "manifest"
    monkeypatch.setattr(detect, "_is_manifest", deadly("a.parquet", detect._is_manifest))
    assert look(source.uri, "auto", None, tasks.aside).format == "parquet"


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


@pytest.mark.ray
def test_what_a_task_says_reaches_the_user_as_it_was_said(
    ray_local: None, source: Store, local: Store
) -> None:
    source.put("b.parquet", parquet(caption=["no image"]))
    source.put("c.parquet", parquet(caption=["none either"]))
    with pytest.raises(ParquetInputError) as caught:
        make(source, local)
    assert str(caught.value) == (
        f"{source.url('b.parquet')}: the columns that may hold encoded images are none: "
        "name one by --image-column"
    )
    source.put("a.parquet", parquet(image=[b"1", b"2"]))
    made = make(source, local)
    planned = list(chunks.from_table(made.chunks))
    assert [(c.shard, c.num_images) for c in planned] == [
        *(("a.parquet", 2), ("b.parquet", 1), ("c.parquet", 1))
    ]
    where = Source(store=source, lists=local, endpoint_url=None, image_column=None)
    (row,) = read_chunk(planned[1], where).to_pylist()
    assert row["error"].startswith("shard: ")
    assert "hold encoded images are none" in row["error"]


@pytest.mark.ray
def test_a_plan_of_parquet_shards(ray_local: None, source: Store, local: Store) -> None:
    source.put("a.parquet", parquet(jpg=[b"1", b"2", b"3"], other=[b"x"] * 3, key=["p", "q", "p"]))
    source.put("b.parquet", parquet(jpg=[b"4"], other=[b"x"], key=["r"]))
    made = make(source, local, cut(image_column="jpg"))
    assert made.num_images == 4
    where = Source(store=source, lists=local, endpoint_url=None, image_column="jpg")
    rows = [read_chunk(chunk, where) for chunk in chunks.from_table(made.chunks)]
    assert pa.concat_tables(rows)["data"].to_pylist() == [b"1", b"2", b"3", b"4"]
    assert pa.concat_tables(rows)["key"].to_pylist() == ["p", "q", "p#2", "r"]


@pytest.mark.ray
def test_shards_that_share_image_ids_are_refused(
    ray_local: None, source: Store, local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHARDS_PER_TASK", 1)
    monkeypatch.setattr(plan, "RESULTS_PER_TABLE", 2)
    for name, ids in (("a", "pq"), ("b", "rst"), ("c", "u"), ("d", "qtv"), ("e", "q")):
        columns = {"image_id": list(ids), "shard": ["s"] * len(ids), "key": list(ids)}
        source.put(f"{name}.parquet", parquet(image=[b"1"] * len(ids), **columns))
    with pytest.raises(PlanError) as caught:
        make(source, local)
    assert str(caught.value) == (
        f"2 image ids are in more than one shard of {source.uri}: take away the shards that are there "
        "twice, or rename their column image_id"
    )
    # What a limit leaves out is not looked at.
    assert make(source, local, cut(limit=6)).num_images == 6
    for name in "de":
        source.delete(f"{name}.parquet")
    assert keys_of(make(source, local), source, local) == list("pqrstu")


@pytest.mark.ray
def test_a_plan_of_manifests(
    ray_local: None, source: Store, local: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan, "OBJECTS_PER_LIST", 3)
    photos = open_store(str(tmp_path / "photos"))
    put_images(photos, 7)
    uris = [photos.url(f"{n:03d}.jpg") for n in range(7)] + [photos.url("gone.jpg")]
    source.put("a.csv", "\n".join(["uri", *uris[:5]]).encode())
    source.put("b.jsonl", "\n".join(json.dumps({"uri": uri}) for uri in uris[5:]).encode())
    made = make(source, local)
    assert made.format == "manifest"
    assert made.chunks["num_images"].to_pylist() == [2, 1, 2, 2, 1]
    assert made.chunks["shard"].to_pylist() == ["a.csv"] * 3 + ["b.jsonl"] * 2
    assert (made.num_images, made.num_objects) == (8, 2)
    assert keys_of(made, source, local) == uris
    assert keys_of(make(source, local, cut(limit=4)), source, local) == uris[:4]
    source.put("b.jsonl", b'{"url": "x"}')
    with pytest.raises(InputError, match="row 0 of"):
        make(source, local)


@pytest.mark.ray
def test_nothing_to_plan_is_refused_in_words(
    ray_local: None, source: Store, local: Store, make_tar: Callable[..., bytes]
) -> None:
    source.put("a.tar", make_tar([("a.txt", b"1")]))
    words = r"no image was found in the 1 objects at .*in \(read as webdataset\): check --input"
    with pytest.raises(PlanError, match=words):
        make(source, local)


# --- freezing -------------------------------------------------------------------------------------


def test_a_frozen_plan_comes_back(source: Store, output: Store) -> None:
    put_images(source, 5)
    assert plan.load(output) is None
    made = make(source, output, job={**JOB, "input": "ü #"})
    frozen = plan.freeze(output, made)
    assert frozen is made
    loaded = plan.load(output)
    assert loaded is not None
    assert same(loaded, made)
    assert keys_of(loaded, source, output) == [f"{n:03d}.jpg" for n in range(5)]
    plan.refuse_other_job(loaded, {**JOB, "input": "ü #"}, output)
    plan.refuse_changed_input(loaded, look(source.uri, "auto", None), output)


def test_one_of_two_freezers_wins(source: Store, output: Store) -> None:
    put_images(source, 3)
    made = [make(source, output) for _ in range(8)]
    assert len({one.plan_id for one in made}) == 8
    start = Barrier(8)

    def freeze(one: Plan) -> Plan:
        start.wait()
        return plan.freeze(output, one)

    with ThreadPoolExecutor(8) as pool:
        frozen = list(pool.map(freeze, made))
    winner = plan.load(output)
    assert winner is not None
    assert {one.plan_id for one in frozen} == {winner.plan_id}
    assert all(same(one, winner) for one in frozen)
    assert keys_of(winner, source, output) == ["000.jpg", "001.jpg", "002.jpg"]


def test_a_later_freezer_of_another_job_is_refused(source: Store, output: Store) -> None:
    put_images(source, 3)
    plan.freeze(output, make(source, output))
    other = make(source, output, job={**JOB, "score_threshold": 0.5})
    with pytest.raises(PlanError, match=r"score_threshold was 0\.05 and is now 0\.5"):
        plan.freeze(output, other)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({**JOB, "model_digest": "xyz"}, "job: model_digest was 'abc' and is now 'xyz'. Give"),
        (
            {**JOB, "limit": 5, "input": "out"},
            "job: input was 'in' and is now 'out'; limit was None and is now 5. Give",
        ),
        ({**JOB, "new": 1}, "job: new was None and is now 1. Give"),
        ({"input": "in", "model_digest": "abc"}, "score_threshold was 0.05 and is now None. Give"),
    ],
)
def test_another_job_is_refused_with_what_differs(
    source: Store, local: Store, job: dict[str, Any], words: str
) -> None:
    put_images(source, 1)
    frozen = plan.freeze(local, make(source, local))
    with pytest.raises(PlanError) as caught:
        plan.refuse_other_job(frozen, job, local)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{local.uri} belongs to another job")


def test_a_changed_input_is_refused_with_what_changed(source: Store, output: Store) -> None:
    put_images(source, 6)
    frozen = plan.freeze(output, make(source, output))
    source.put("004.jpg", b"longer than it was")
    source.delete("001.jpg")
    source.put("new.jpg", b"1")
    loaded = plan.load(output)
    assert loaded is not None
    for planned in (frozen, loaded):
        with pytest.raises(PlanError) as caught:
            plan.refuse_changed_input(planned, look(source.uri, "auto", None), output)
        assert "1 added (new.jpg); 1 removed (001.jpg); 1 changed (004.jpg)" in str(caught.value)
        assert "--frozen-plan" in str(caught.value)


def test_a_damaged_plan_is_noticed(source: Store, local: Store) -> None:
    put_images(source, 50)
    frozen = plan.freeze(local, make(source, local))
    path = f"_plan/{frozen.plan_id}/chunks.parquet"
    data = local.read(path)
    column = pq.read_metadata(io.BytesIO(data)).row_group(0).column(0)
    at = column.dictionary_page_offset + column.total_compressed_size - 1
    local.put(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        plan.load(local)


def test_what_is_left(source: Store, local: Store) -> None:
    put_images(source, 7)
    made = make(source, local)
    assert plan.sizes(made) == {"00000000": 2, "00000001": 2, "00000002": 2, "00000003": 1}
    every = list(chunks.from_table(made.chunks))
    assert list(plan.left(made, [])) == every
    # One of them is of no plan, as another job would leave it.
    assert (
        list(plan.left(made, {"00000002": 1.0, "00000000": 2.0, "77": 3.0}.keys())) == every[1::2]
    )
    assert list(plan.left(made, plan.sizes(made))) == []


# --- the ledger -----------------------------------------------------------------------------------


def test_finished_chunks(output: Store) -> None:
    assert plan.finished_chunks(output) == {}
    for path in (
        "predictions/00000001.parquet",
        "predictions/00000010.parquet",
        # What a writer that was killed leaves, and what does not belong there.
        "predictions/.00000002.parquet.0123456789abcdef",
        "predictions/.00000003.parquet",
        "predictions/00000004.parquet.tmp",
        "predictions-old/00000005.parquet",
        "shards/00000006.parquet",
        "00000007.parquet",
    ):
        output.put(path, b"1")
    found = plan.finished_chunks(output)
    assert set(found) == {"00000001", "00000010"}
    assert set(plan.finished_chunks(output, "shards")) == {"00000006"}
    (first, second) = (output.info(f"predictions/{name}.parquet") for name in sorted(found))
    assert first is not None
    assert second is not None
    assert found["00000001"] == first.modified > 1.6e9
    assert found["00000010"] == second.modified
