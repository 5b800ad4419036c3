"""The frozen plan: which images, cut into which chunks, under which configuration.

A plan lies beside the output (`_plan.json` and `_plan/`), is written once by a conditional put, and
is never changed. What is left to do is the plan less the chunks whose output object exists.
"""

import contextlib
import io
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import chunks as chunks_
from jobs import documents, index
from jobs.chunks import CHUNKS, PREDICTIONS_FOLDER, Chunk
from jobs.deadly import Deadly
from jobs.detect import Input, describe_changes, objects_of
from jobs.manifest import read_uris
from jobs.parquet_columns import ParquetInputError
from jobs.store import DamagedError, ObjectInfo, Store
from jobs.tasks import in_order

PLAN, PLAN_FOLDER = "_plan.json", "_plan"
ALONE = "the output's store has no conditional puts that hold: start one driver at a time on this output"

# Objects in one list of a plan: a few hundred chunks, so that a reader's look at the footer is
# cheap.
OBJECTS_PER_LIST = 65_536
# Shards that one task indexes.
SHARDS_PER_TASK = 8
# Results of tasks that are put together at once: a small table takes several times what is in it.
RESULTS_PER_TABLE = 256

UInt64 = npt.NDArray[np.uint64]


class PlanError(ValueError):
    """The job cannot be planned, or a plan does not fit it; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A frozen plan.

    Attributes:
        plan_id: Unique; the folder of its tables.
        job: What results depend on: input, model digest, thresholds, ...
        folder: The URI that shards are relative to: the input, or the folder of its one object.
        format: How the input is read.
        why: Why it is read so.
        num_images: Rows that the finished table has.
        num_bytes: Bytes of the images.
        num_objects: Shards, or loose images.
        input_digest: Over paths, sizes and etags of all objects.
        notes: What a person should know: ignored files, damaged shards.
        chunks: Table of `chunks.CHUNKS`.
    """

    plan_id: str
    job: Mapping[str, Any]
    folder: str
    format: str
    why: str
    num_images: int
    num_bytes: int
    num_objects: int
    input_digest: str
    notes: tuple[str, ...]
    chunks: pa.Table


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How an input is cut into chunks.

    Attributes:
        chunk_size: Images in a chunk, at most.
        limit: Images in the plan, at most; all where None.
        image_column: Of Parquet shards; found where None.
        endpoint_url: For the URIs of a manifest.
    """

    chunk_size: int
    limit: int | None
    image_column: str | None
    endpoint_url: str | None


@dataclass(frozen=True)
class _Indexed:
    """What is in some objects of an input.

    Attributes:
        chunks: Table of `chunks.CHUNKS`, without ids yet: millions of `Chunk` would take gigabytes.
        id_digests: 64 bits of each image id of shards in the one schema.
        misfit: What one of them says that has no images as they are wanted, and a verdict for that.
        num_misfits: How many have.
    """

    chunks: pa.Table
    id_digests: UInt64
    misfit: str = ""
    num_misfits: int = 0


def make(found: Input, job: Mapping[str, Any], cut: Cut, output: Store | None) -> Plan:
    """Index an input, in Ray tasks, and cut it into chunks.

    Args:
        found: The input as it was listed.
        job: What results depend on.
        cut: How to cut.
        output: Where the plan's lists of loose images and shards go; nothing is written where None.

    Raises:
        PlanError: There is no image in it, or two of its shards hold the same image id.
        ClusterError: Many of its shards, or all, end the process that looks into them.
    """
    plan_id = uuid.uuid4().hex
    folder = f"{PLAN_FOLDER}/{plan_id}"
    table = _gathered(_up_to(cut.limit, _index(found, cut, folder, output)), found)
    table = chunks_.numbered(table, cut.limit)
    if not table.num_rows:
        raise PlanError(
            f"no image was found in the {found.objects.num_rows} objects at {found.store.uri} "
            f"(read as {found.format}): check --input and --format"
        )
    if output is not None:
        put_table(output, f"{folder}/objects.parquet", found.objects)
    alone = (ALONE,) if output and not output.keeps_first(f"{folder}/first") else ()
    damaged = _sum(pc.and_(pc.equal(table["kind"], "verdict"), pc.equal(table["key"], "")))
    damage = (f"{damaged} shards are damaged: each has a row that says how",) if damaged else ()
    return Plan(
        plan_id=plan_id,
        job=job,
        folder=found.store.uri,
        format=found.format,
        why=found.why,
        num_images=_sum(table["num_images"]),
        num_bytes=_sum(table["num_bytes"]),
        num_objects=found.objects.num_rows,
        input_digest=found.digest(),
        notes=(*found.notes, *damage, *alone),
        chunks=table,
    )


def freeze(output: Store, plan: Plan) -> Plan:
    """Write a plan, unless another driver was faster; return the one that holds from now on.

    Raises:
        PlanError: The faster one planned another job.
    """
    put_table(output, f"{PLAN_FOLDER}/{plan.plan_id}/chunks.parquet", plan.chunks)
    head = {name: value for name, value in vars(plan).items() if name != "chunks"}
    if output.put_if_absent(PLAN, documents.dump(head)):
        return plan
    winner = load(output)
    assert winner is not None
    refuse_other_job(winner, plan.job, output)
    return winner


def load(output: Store) -> Plan | None:
    """Return the plan beside `output`, or None where none was made yet."""
    try:
        head = documents.read(output, PLAN)
    except FileNotFoundError:
        return None
    chunks = _read_table(output, f"{PLAN_FOLDER}/{head['plan_id']}/chunks.parquet")
    return Plan(**{**head, "notes": tuple(head["notes"])}, chunks=chunks)


def refuse_other_job(plan: Plan, job: Mapping[str, Any], output: Store) -> None:
    """Compare a plan with the job that was asked for.

    Raises:
        PlanError: They differ; the message names what, and both values.
    """
    different = [
        f"{name} was {plan.job.get(name)!r} and is now {job.get(name)!r}"
        for name in sorted({*plan.job, *job})
        if plan.job.get(name) != job.get(name)
    ]
    if different:
        raise PlanError(
            f"{output.uri} belongs to another job: {'; '.join(different)}. "
            "Give the old values to go on with it, or another --output to start anew."
        )


def refuse_changed_input(plan: Plan, found: Input, output: Store) -> None:
    """Compare the input as it is with the input as it was planned.

    Raises:
        PlanError: Objects were added, removed or changed; the message names some.
    """
    if found.digest() == plan.input_digest:
        return
    before = _read_table(output, f"{PLAN_FOLDER}/{plan.plan_id}/objects.parquet")
    raise PlanError(
        f"the input {found.store.uri} is not what it was when {output.uri} was planned: "
        f"{describe_changes(before, found.objects)}. Start a new --output, or give --frozen-plan to "
        "finish what was planned (what has changed since gives rows in error)."
    )


def finished_chunks(output: Store, folder: str = PREDICTIONS_FOLDER) -> dict[str, float]:
    """Return the chunks whose output object exists, by id, and when each was written.

    This is the ledger: one listing, and nothing else is asked.
    """
    start, end = f"{folder}/", ".parquet"
    return {
        found.path[len(start) : -len(end)]: found.modified
        for found in output.list_objects(folder)
        if found.path.endswith(end) and not found.path[len(start) :].startswith(".")
    }


def left(plan: Plan, done: Collection[str]) -> Iterator[Chunk]:
    """Yield the chunks that are not among `done`, ids of chunks: the plan without the ledger."""
    is_done = pc.is_in(plan.chunks["chunk_id"], pa.array(done, pa.string()))
    yield from chunks_.from_table(plan.chunks.filter(pc.invert(is_done)))


def sizes(plan: Plan) -> dict[str, int]:
    """Return the images of each chunk, by id."""
    columns = (plan.chunks[name].to_pylist() for name in ("chunk_id", "num_images"))
    return dict(zip(*columns, strict=True))


def _up_to(limit: int | None, indexed: Iterator[_Indexed]) -> Iterator[_Indexed]:
    """Yield what was indexed until it has `limit` images; what comes behind is not indexed."""
    num_images = 0
    for some in indexed:
        yield some
        num_images += _sum(some.chunks["num_images"])
        if limit is not None and num_images >= limit:
            return


def _gathered(indexed: Iterator[_Indexed], found: Input) -> pa.Table:
    """Return the chunks of an input as one table.

    Memory: of Parquet shards in the one schema 17 bytes for each image, the rest by chunk.

    Raises:
        PlanError: Two shards hold the same image id.
    """
    tables, digests = [CHUNKS.empty_table()], [np.empty(0, np.uint64)]
    while some := list(islice(indexed, RESULTS_PER_TABLE)):
        tables.append(pa.concat_tables(part.chunks for part in some).combine_chunks())
        digests.append(np.concatenate([part.id_digests for part in some]))
    _refuse_shared_ids(digests, found)
    return pa.concat_tables(tables).combine_chunks()


def _refuse_shared_ids(digests: list[UInt64], found: Input) -> None:
    """Refuse shards in the one schema that share an image id: it has one row in the output.

    Raises:
        PlanError: They do.
    """
    ordered = np.concatenate(digests)
    ordered.sort()
    again = ordered[1:] == ordered[:-1]
    if again.any():
        raise PlanError(
            f"{len(np.unique(ordered[1:][again]))} image ids are in more than one shard of "
            f"{found.store.uri}: take away the shards that are there twice, or rename their column "
            "image_id"
        )


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column, min_count=0).as_py())


def _groups(objects: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, objects.num_rows, SHARDS_PER_TASK):
        yield objects.slice(start, SHARDS_PER_TASK)


def _index(found: Input, cut: Cut, folder: str, output: Store | None) -> Iterator[_Indexed]:
    """Yield what is in the input's objects, in their order."""
    if found.format == "images":
        for number, start in enumerate(range(0, found.objects.num_rows, OBJECTS_PER_LIST)):
            some = found.objects.slice(start, OBJECTS_PER_LIST)
            yield _list_images(some, f"{folder}/list-{number:05d}.parquet", cut, "", output)
    elif found.format == "manifest":
        uris = ((*some, cut, output) for some in _lists_of_uris(found, folder))
        yield from chain.from_iterable(in_order(_index_uris, uris))
    else:
        calls = ((found.store, some, found.format, cut) for some in _groups(found.objects))
        deadly = Deadly(found, _index_shards, _verdict)
        indexed = chain.from_iterable(in_order(_index_shards, calls, deadly.one_by_one))
        yield from _refuse_if_none_fits(indexed)
        deadly.refuse_if_all()


def _refuse_if_none_fits(indexed: Iterator[_Indexed]) -> Iterator[_Indexed]:
    """Pass on what is in shards.

    Raises:
        ParquetInputError: All of them lack what was asked for: one alone would be a row in error.
    """
    misfit, num_fit = "", 0
    for part in indexed:
        misfit = misfit or part.misfit
        num_fit += part.chunks.num_rows - part.num_misfits
        yield part
    if misfit and not num_fit:
        raise ParquetInputError(misfit)


def _index_shards(store: Store, objects: pa.Table, format_: str, cut: Cut) -> list[_Indexed]:
    planned: list[Chunk] = []
    digests: list[int] = []
    misfits: list[str] = []
    for info in objects_of(objects):
        try:
            if format_ == "webdataset":
                planned += index.index_tar(store, info, cut.chunk_size)
            else:
                planned += index.index_parquet(store, info, cut.chunk_size, cut.image_column)
                # What was read a moment ago and is damaged now has its rows all the same.
                with contextlib.suppress(DamagedError):
                    digests += index.own_id_digests(store, info)
        except ParquetInputError as error:
            misfits.append(str(error))
            planned.append(index.verdict(info, "", f"shard: {error}", start=0))
        except DamagedError as error:
            planned.append(index.verdict(info, "", f"shard: {error}", start=0))
    misfit = misfits[0] if misfits else ""
    table = chunks_.to_table(planned)
    return [_Indexed(table, np.array(digests, np.uint64), misfit, len(misfits))]


def _verdict(info: ObjectInfo, why: str) -> _Indexed:
    chunk = index.verdict(info, "", f"shard: it cannot be indexed: {why}", start=0)
    return _Indexed(chunks_.to_table([chunk]), np.empty(0, np.uint64))


def _lists_of_uris(found: Input, folder: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield manifest, some of its URIs, and the path of the list that they go to."""
    number = 0
    for info in objects_of(found.objects):
        uris = read_uris(found.store, info)
        while some := list(islice(uris, OBJECTS_PER_LIST)):
            yield info.path, some, f"{folder}/list-{number:05d}.parquet"
            number += 1


def _index_uris(
    manifest: str, uris: list[str], list_path: str, cut: Cut, output: Store | None
) -> list[_Indexed]:
    objects = index.look_up(uris, cut.endpoint_url)
    return [_list_images(objects, list_path, cut, manifest, output)]


def _list_images(
    objects: pa.Table, list_path: str, cut: Cut, shard: str, output: Store | None
) -> _Indexed:
    """Cut loose images into chunks and write their list, each chunk as one row group."""
    planned = index.index_objects(objects, list_path, cut.chunk_size, shard)
    if output is not None:
        put_table(output, list_path, objects, [chunk.num_images for chunk in planned])
    return _Indexed(chunks_.to_table(planned), np.empty(0, np.uint64))


def put_table(
    output: Store, path: str, table: pa.Table, rows_per_group: list[int] | None = None
) -> None:
    """Write a table beside a plan, as row groups of the sizes given or as one."""
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", write_page_checksum=True
    ) as writer:
        start = 0
        for rows in rows_per_group or [max(1, table.num_rows)]:
            writer.write_table(table.slice(start, rows), row_group_size=rows)
            start += rows
    output.put(path, sink.getvalue())


def _read_table(output: Store, path: str) -> pa.Table:
    data = io.BytesIO(output.read(path))
    try:
        return pq.read_table(data, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise output.damaged(path, error) from error
