"""One Parquet object for each chunk, put atomically; at the end the manifest, and the success mark last."""

import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import documents, retries
from jobs.chunks import PREDICTIONS_FOLDER, output_path
from jobs.store import ChangedError, DamagedError, ObjectInfo, StorageError, Store
from segmodel.schema import PREDICTIONS, SCHEMA_VERSION, SCHEMAS

MANIFEST, SUCCESS = "_manifest.json", "_SUCCESS"
# Footers are small: the wait for each is its cost.
FOOTER_THREADS = 64
FOOTER_WINDOW = 64 * 2**10
CHECKSUM = "crc32"
# What pyarrow raises for a file that is damaged.
_PARQUET_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
# Training shuffles row groups, the least that can be read, and the rows of a window of them, which is bounded
# in rows and bytes (`feed`): with both of these bounds it holds 16 groups or more, whatever the images' size.
TRAINING_GROUP_ROWS, TRAINING_GROUP_BYTES = 32, 8 * 2**20
# Times that another run may be faster in replacing a chunk's object.
REPLACE_TRIES = 5


class IncompleteError(RuntimeError):
    """The table does not have one row for each planned image."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a chunk's object holds. It stands in its footer too.

    Attributes:
        images: Rows.
        detections: Instances in all rows.
        errors: Rows in error, by kind.
    """

    images: int
    detections: int
    errors: Mapping[str, int]

    @property
    def failed(self) -> int:
        """Rows in error."""
        return sum(self.errors.values())


def count(table: pa.Table) -> Counts:
    """Count the rows of a table of `PREDICTIONS`."""
    kinds = Counter(
        error.partition(":")[0] for error in table["error"].to_pylist() if error is not None
    )
    detections = pc.sum(pc.list_value_length(table["detections"])).as_py() or 0
    return Counts(images=table.num_rows, detections=detections, errors=dict(kinds))


def total(counts: Iterable[Counts]) -> Counts:
    """Add up."""
    images, detections, errors = 0, 0, Counter[str]()
    for one in counts:
        images += one.images
        detections += one.detections
        errors.update(one.errors)
    return Counts(images=images, detections=detections, errors=dict(errors))


def put_chunk(
    output: Store,
    chunk_id: str,
    table: pa.Table,
    footer: Mapping[str, str],
    folder: str = PREDICTIONS_FOLDER,
    rows_per_group: int | None = None,
) -> Counts:
    """Write the rows of a chunk as its one object, unless it is there: then its rows hold.

    A write that comes late, of a process or of a whole run that was given up, so changes nothing, also
    where `replace_rows` has mended some of the rows since.

    Args:
        output: The job's output.
        chunk_id: Of the plan; it names the object.
        table: With one of `schema.SCHEMAS`.
        footer: More facts for the object's footer: model digest, run id.
        folder: Of the output.
        rows_per_group: Rows in a row group; all of them where None.

    Returns:
        What the object holds.
    """
    path = output_path(chunk_id, folder)
    data, counts = _packed(table, footer, rows_per_group)
    if output.put_if_absent(path, data):
        return counts
    try:
        found = _whole(output.read(path), table.schema.names)
    except (*_PARQUET_DAMAGE, KeyError) as error:
        if isinstance(error, StorageError):
            raise
        # Damaged on its way or in the store: whoever wrote it, its rows were these.
        output.put(path, data)
        return counts
    return found


def training_rows_per_group(table: pa.Table) -> int:
    """Return how many rows of a table, as large as they are on average, go into a row group for training."""
    by_bytes = int(TRAINING_GROUP_BYTES * table.num_rows / max(table.nbytes, 1))
    return max(1, min(TRAINING_GROUP_ROWS, by_bytes))


def replace_rows(
    output: Store,
    chunk_id: str,
    rows: pa.Table,
    positions: Sequence[int],
    footer: Mapping[str, str],
) -> Counts:
    """Write a chunk's rows at `positions` anew, and those that it has in the output at all others.

    A row that is in error again keeps its names: where its shard is gone, the new one has none. What another
    run has mended in the meantime is left as it is.

    Returns:
        What the object holds.

    Raises:
        StorageError: Others replace the object again and again.
    """
    path = output_path(chunk_id)
    for _ in range(REPLACE_TRIES):
        info = output.info(path)
        if info is None:
            raise IncompleteError(f"{output.url(path)} is gone: run the same command again")
        try:
            old = read_chunk(output, chunk_id, etag=info.etag)
        except ChangedError:
            continue
        data, counts = _packed(_merged(old, rows, positions), footer, None)
        if output.put_over(path, data, info.etag):
            return counts
    raise StorageError(
        f"{output.url(path)} was replaced by others each time before it could be: run the command again when "
        "no other runs on this output"
    )


def _merged(old: pa.Table, rows: pa.Table, positions: Sequence[int]) -> pa.Table:
    status = old["status"].to_pylist()
    take = list(range(old.num_rows))
    for number, position in enumerate(positions):
        if status[position] == "error":
            take[position] = old.num_rows + number
    named = old.take(list(positions))
    for name in ("image_id", "shard", "key"):
        kept = pc.if_else(pc.is_null(rows["error"]), rows[name], named[name])
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), kept)
    both = pa.concat_tables([old.replace_schema_metadata(None), rows])
    return both.take(take).combine_chunks()


def _packed(
    table: pa.Table, footer: Mapping[str, str], rows_per_group: int | None
) -> tuple[bytes, Counts]:
    """Return the bytes of a chunk's object, and the counts in its footer."""
    assert any(table.schema.equals(known) for known in SCHEMAS)
    counts = count(table)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "counts": json.dumps(asdict(counts), sort_keys=True),
        **footer,
    }
    facts[CHECKSUM] = _checksum(facts)
    metadata = {f"segjobs.{name}": value for name, value in facts.items()}
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata}),
        sink,
        row_group_size=rows_per_group,
        compression="zstd",
        write_page_checksum=True,
    )
    return sink.getvalue(), counts


def size_of(table: pa.Table) -> int:
    """Return how many bytes rows of `PREDICTIONS` take in the output."""
    return len(_packed(table, {}, None)[0])


def _whole(data: bytes, columns: list[str]) -> Counts:
    """Return the counts of a chunk's object after having read all of it, or raise what pyarrow does."""
    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    counts = Counts(**json.loads(_facts(file.metadata)["counts"]))
    if file.read().column_names != columns:
        raise pa.ArrowInvalid("its columns are not those that were written")
    return counts


def read_chunk(
    output: Store, chunk_id: str, columns: list[str] | None = None, etag: str = ""
) -> pa.Table:
    """Return a finished chunk's rows, with page checksums verified.

    Raises:
        DamagedError: They are not what was written.
        ChangedError: The object does not have the etag that was given.
    """
    path = output_path(chunk_id)
    data = io.BytesIO(output.read(path, etag=etag))
    try:
        file = pq.ParquetFile(data, page_checksum_verification=True)
        _facts(file.metadata)
        table = file.read(columns=columns)
        wanted = [field for field in PREDICTIONS if columns is None or field.name in columns]
        if not table.schema.equals(pa.schema(wanted)):
            # A footer has no checksum, and a bit of it may rename or retype what the pages hold.
            raise pa.ArrowInvalid("its columns are not those that were written")
    except _PARQUET_DAMAGE as error:
        raise _damaged(output, path, error) from error
    return table


def read_counts(
    output: Store, chunk_ids: Iterable[str], folder: str = PREDICTIONS_FOLDER
) -> dict[str, Counts]:
    """Return the counts of finished chunks, from their footers."""
    footers = read_footers(output, chunk_ids, folder)
    return {name: Counts(**json.loads(facts["counts"])) for name, facts in footers.items()}


def final_counts(output: Store) -> Counts:
    """Return the counts of a finished job, from its manifest."""
    counts = documents.read(output, MANIFEST)["counts"]
    return Counts(**{name: counts[name] for name in ("images", "detections", "errors")})


def read_footers(
    output: Store, chunk_ids: Iterable[str], folder: str = PREDICTIONS_FOLDER
) -> dict[str, dict[str, str]]:
    """Return the facts that stand in the footers of finished chunks: `counts`, and what was added.

    Raises:
        IncompleteError: A chunk is gone.
        DamagedError: A footer is not what was written.
    """

    def facts(chunk_id: str) -> tuple[str, dict[str, str]]:
        path = output_path(chunk_id, folder)
        try:
            return chunk_id, _footer(output, path)
        except _PARQUET_DAMAGE as error:
            if isinstance(error, StorageError | FileNotFoundError):
                raise
        # Pages have checksums, footers have none on their way: the second look is the true one.
        retries.note("checksum")
        try:
            return chunk_id, _footer(output, path)
        except _PARQUET_DAMAGE as error:
            if isinstance(error, StorageError | FileNotFoundError):
                raise
            raise _damaged(output, path, error) from error

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return dict(pool.map(facts, chunk_ids))


def _footer(output: Store, path: str) -> dict[str, str]:
    info = output.info(path)
    if info is None:
        raise IncompleteError(f"{output.url(path)} is gone: run the same command again")
    return _facts(pq.read_metadata(output.open(ObjectInfo(path, info.size, ""), FOOTER_WINDOW)))


def _facts(footer: pq.FileMetaData) -> dict[str, str]:
    found = {
        name.decode().removeprefix("segjobs."): value.decode()
        for name, value in (footer.metadata or {}).items()
        if name.startswith(b"segjobs.")
    }
    if found.pop(CHECKSUM, "") != _checksum(found):
        raise pa.ArrowInvalid("its footer does not have the checksum that stands in it")
    if json.loads(found["counts"])["images"] != footer.num_rows:
        raise pa.ArrowInvalid(
            f"its footer counts {found['counts']}, and it has {footer.num_rows} rows"
        )
    return found


def _checksum(facts: Mapping[str, str]) -> str:
    """Return the CRC-32 of the facts in a footer: Parquet has checksums of pages, none of footers."""
    return f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"


def _damaged(output: Store, path: str, error: Exception) -> StorageError:
    return DamagedError(
        f"{output.url(path)} was damaged in the store ({error}): delete it, and run the same command "
        "again to make it anew"
    )


def failed_positions(output: Store, chunk_ids: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return which rows of which finished chunks are in error."""
    failed = {}
    for chunk_id in chunk_ids:
        status = read_chunk(output, chunk_id, ["status"])["status"].to_pylist()
        if positions := tuple(n for n, value in enumerate(status) if value == "error"):
            failed[chunk_id] = positions
    return failed


def finish(output: Store, planned: Mapping[str, int], found: Mapping[str, Counts]) -> Counts:
    """Compare what was planned with what was found, chunk by chunk.

    Args:
        output: To name in messages.
        planned: Images by chunk id.
        found: Counts by chunk id.

    Raises:
        IncompleteError: They differ.
    """
    wrong = [
        f"{chunk_id}: {found[chunk_id].images if chunk_id in found else 0} of {images}"
        for chunk_id, images in planned.items()
        if chunk_id not in found or found[chunk_id].images != images
    ]
    if wrong:
        raise IncompleteError(
            f"{len(wrong)} chunks of {output.uri} lack rows ({', '.join(wrong[:5])}): "
            "run the same command again to go on"
        )
    return total(found.values())


def put_marks(output: Store, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, then the success mark."""
    output.put(MANIFEST, documents.dump(manifest))
    output.put(SUCCESS, b"")
