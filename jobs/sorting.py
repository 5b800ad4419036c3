"""Predictions of a chunk to the tables of a version: accepted, for a person, rejected; in Ray tasks.

An accepted image brings its bytes along, and so does one that waits for a person or was rejected for being
empty, so that a version can be trained on, or corrected, whatever becomes of the input.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import chunks, novelty, versions, write
from jobs.chunks import Chunk
from jobs.contents import CONTENT, content_digest
from jobs.detect import FOOTER_WINDOW
from jobs.plan import Plan
from jobs.read import Source, read_chunk
from jobs.store import ObjectInfo, Store
from jobs.tasks import in_order
from jobs.versions import ACCEPTED, CONTENTS, LISTING, REJECTED, REVIEW
from segmodel import schema
from segmodel.drift import Profile
from segmodel.policy import AUDIT, Policy, Verdict, judge

Row: TypeAlias = dict[str, Any]

SCHEMAS = {ACCEPTED: schema.TRAINING, REVIEW: schema.REVIEW, REJECTED: schema.REJECTED}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a version's objects are put before it is published.

    Attributes:
        store: The data set.
        folder: Of these objects alone: relative to the data set, named after all that they depend on.
    """

    store: Store
    folder: str

    def put(self, table: str, name: str, rows: Sequence[Row], footer: Mapping[str, str]) -> None:
        """Write rows as one object, unless an equal run has; nothing where there are none."""
        if rows:
            made = pa.Table.from_pylist(rows, schema=SCHEMAS[table])
            where = f"{self.folder}/{table}"
            group_rows = write.training_rows_per_group(made)
            write.put_chunk(self.store, name, made, footer, where, group_rows)

    def put_contents(self, name: str, contents: pa.Table) -> None:
        """Write the digests of some images."""
        if contents.num_rows:
            path = f"{self.folder}/{CONTENTS}/{name}.parquet"
            versions.put_table(self.store, path, contents, once=True)


@dataclass(kw_only=True)
class Sorted:
    """What came out of some images; results add up.

    Attributes:
        images: Of the chunks.
        fates: Images by the table that they went to; `audit` counts those accepted that are looked at, too.
        labels: Detections that were accepted, those that wait for a person, and those that were rejected.
        reasons: Images that were not accepted by reason (of errors the kind), and detections.
        profile: Of the images; of those in error their number.
        objects: Rows of `versions.LISTING` but for size and etag.
        unsettled: Objects of the input with an error that may pass.
    """

    images: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    profile: Profile = field(default_factory=Profile)
    objects: list[Row] = field(default_factory=list)
    unsettled: set[str] = field(default_factory=set)

    def merge(self, other: "Sorted") -> None:
        """Add the images of another."""
        self.images += other.images
        self.fates += other.fates
        self.labels += other.labels
        self.reasons += other.reasons
        self.profile.merge(other.profile)
        self.objects += other.objects
        self.unsettled |= other.unsettled


def sort(
    planned: Plan, source: Source, policy: Policy, stage: Stage, footer: Mapping[str, str]
) -> Iterator[Sorted]:
    """Apply a policy to all chunks of a finished job, and yield what came out of each.

    Args:
        planned: The job's plan.
        source: The job's; its `lists` are the job's output.
        policy: What becomes of detections.
        stage: Where rows go.
        footer: More facts for the footers of objects.

    Raises:
        StorageError: Something cannot be read or written.
    """
    calls = ((chunk, source, policy, stage, footer) for chunk in chunks.from_table(planned.chunks))
    for (done,) in in_order(_sort_chunk, calls):
        yield done


def _sort_chunk(
    chunk: Chunk, source: Source, policy: Policy, stage: Stage, footer: Mapping[str, str]
) -> list[Sorted]:
    predictions = write.read_chunk(source.lists, chunk.chunk_id).to_pylist()
    images = read_chunk(chunk, source)
    done = Sorted(images=len(predictions))
    rows: dict[str, list[Row]] = {name: [] for name in SCHEMAS}
    data = images["data"]
    for number, row in enumerate(predictions):
        content: bytes | None = data[number].as_py()
        if row["status"] == "ok" and content is None:
            # It was there when it was predicted.
            row = {**row, "status": "error", "error": images["error"][number].as_py()}
        if novelty.may_pass(row["error"]):
            done.unsettled.add(novelty.object_of(chunk, row["shard"], row["key"]))
        image = {"bytes": content, "path": row["key"]} if row["status"] == "ok" else None
        _add(rows, done, {**row, "image": image}, judge(row, policy))
    for table, of_table in rows.items():
        stage.put(table, chunk.chunk_id, of_table, footer)
        done.objects += entry(stage, table, chunk.chunk_id, of_table)
    contents = _contents(chunk, predictions, data)
    stage.put_contents(chunk.chunk_id, contents)
    done.objects += entry(stage, CONTENTS, chunk.chunk_id, contents.to_pylist())
    return [done]


def _add(rows: Mapping[str, list[Row]], done: Sorted, row: Row, verdict: Verdict) -> None:
    """Put an image where it belongs, and count it."""
    kept, reason = list(verdict.kept), verdict.reason
    done.fates[verdict.fate] += 1
    if row["status"] == "ok":
        done.profile.add(kept)
    else:
        done.profile.failed += 1
    if reason is not None:
        done.reasons[reason.partition(":")[0]] += 1
    if verdict.fate == ACCEPTED:
        rows[ACCEPTED].append({**row, "detections": kept})
        done.labels[ACCEPTED] += len(kept)
        if verdict.audit:
            done.fates[AUDIT] += 1
            # Its bytes are with the accepted row.
            rows[REVIEW].append({**row, "detections": kept, "image": None, "reason": AUDIT})
    elif verdict.fate == REVIEW:
        rows[REVIEW].append({**row, "detections": kept, "reason": reason})
        done.labels[REVIEW] += len(kept)
    if verdict.fate == REJECTED or verdict.rejected:
        of_image = reason if verdict.fate == REJECTED else None
        rows[REJECTED].append(
            {
                **row,
                "image": row["image"] if verdict.fate == REJECTED else None,
                "detections": list(verdict.rejected),
                "reason": of_image,
                "reasons": list(verdict.reasons),
            }
        )
        done.labels[REJECTED] += len(verdict.rejected)
        done.reasons.update(f"detections: {why}" for why in verdict.reasons)


def _contents(chunk: Chunk, rows: Iterable[Row], data: pa.ChunkedArray) -> pa.Table:
    found = [
        {
            "image_id": row["image_id"],
            "object": novelty.object_of(chunk, row["shard"], row["key"]),
            # Like no other where it is to be tried again.
            "digest": content_digest(None if novelty.may_pass(row["error"]) else content.as_py()),
        }
        for row, content in zip(rows, data, strict=True)
    ]
    return pa.Table.from_pylist(found, schema=CONTENT)


def entry(stage: Stage, table: str, name: str, rows: Sequence[Row]) -> list[Row]:
    """Return what a listing says of an object, but for its size and etag; nothing of one without rows."""
    if not rows:
        return []
    ids = [row["image_id"] for row in rows]
    return [
        {
            "table": table,
            "path": f"{stage.folder}/{table}/{name}.parquet",
            "rows": len(rows),
            "detections": sum(len(row.get("detections", ())) for row in rows),
            "first": min(ids),
            "last": max(ids),
        }
    ]


def listed(stage: Stage, objects: Sequence[Row]) -> pa.Table:
    """Return objects that were put as a table of `versions.LISTING`, with sizes and etags.

    Raises:
        IncompleteError: One of them is not there.
    """
    infos = {info.path: info for info in stage.store.list_objects(stage.folder)}
    gone = [one["path"] for one in objects if one["path"] not in infos]
    if gone:
        raise write.IncompleteError(
            f"{stage.store.url(gone[0])} is gone: run the same command again"
        )
    rows = [
        {**one, "size": infos[one["path"]].size, "etag": infos[one["path"]].etag} for one in objects
    ]
    return pa.Table.from_pylist(rows, schema=LISTING)


def replace_rows(
    before: pa.Table,
    ids: Sequence[str],
    stage: Stage,
    tables: Collection[str] = (*SCHEMAS, CONTENTS),
) -> tuple[pa.Table, Sorted]:
    """Take rows out of a parent's objects: those that hold any are written anew without them.

    Args:
        before: The parent's objects, a table of `LISTING`.
        ids: Of the images whose rows go, sorted.
        stage: Where what is left of an object goes.
        tables: Of which rows go.

    Returns:
        The objects that stay as they are, and what was taken away: `images`, `fates` and `profile`, all
        negative, and `objects` that are new.
    """
    taken = Sorted()
    if not ids:
        return before, taken
    wanted = pa.array(ids, pa.string())
    stays: list[Row] = []
    touched: list[Row] = []
    for row in before.to_pylist():
        may_hold = row["table"] in tables and versions.may_hold(row, ids)
        (touched if may_hold else stays).append(row)
    calls = ((stage, number, row, wanted) for number, row in enumerate(touched))
    for row, ((hit, done),) in zip(touched, in_order(_without, calls), strict=True):
        if hit:
            taken.merge(done)
        else:
            stays.append(row)
    return pa.Table.from_pylist(stays, schema=LISTING), taken


def _without(stage: Stage, number: int, row: Row, ids: pa.Array) -> list[tuple[bool, Sorted]]:
    """Write an object anew without the rows of some images, where it has any."""
    table = read(stage.store, row)
    gone = pc.is_in(table["image_id"], ids)
    done = Sorted()
    if not pc.any(gone).as_py():
        return [(False, done)]
    left = table.filter(pc.invert(gone))
    name = f"old-{number:08d}"
    if row["table"] == CONTENTS:
        stage.put_contents(name, left)
    else:
        stage.put(row["table"], name, left.to_pylist(), {})
        removed = table.filter(gone).drop_columns("image").to_pylist()
        _take_away(done, row["table"], removed)
    done.objects += entry(stage, row["table"], name, left.to_pylist())
    return [(True, done)]


def _take_away(done: Sorted, table: str, rows: Iterable[Row]) -> None:
    for row in rows:
        if table == REVIEW and row["reason"] == AUDIT:
            continue
        if table == REJECTED and row["reason"] is None:
            continue
        done.images -= 1
        if row["status"] == "ok":
            done.profile.add(row["detections"] if table != REJECTED else (), times=-1)
        else:
            done.profile.failed -= 1


def read(store: Store, row: Row, columns: Sequence[str] | None = None) -> pa.Table:
    """Return columns of the rows of an object of a listing, page checksums verified.

    Raises:
        DamagedError: It is not what was written.
        ChangedError: It is another object.
    """
    info = ObjectInfo(row["path"], row["size"], row["etag"])
    try:
        file = store.open(info, FOOTER_WINDOW if columns else max(info.size, 1))
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            return opened.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise store.damaged(info.path, error) from error
