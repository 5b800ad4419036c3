"""Tables of the one schema that lie at a URI: whose images they hold, and their rows, a row group at a time."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import documents
from jobs.detect import Input, InputError, objects_of
from jobs.store import ObjectInfo, StorageError, Store
from jobs.versions import look_at_table
from jobs.write import FOOTER_THREADS, MANIFEST

NAMES = ("image_id", "shard", "key")
# What is compared; the images of packed sets stay where they are.
COLUMNS = ("image_id", "height", "width", "status", "detections")
# The columns of a row group lie side by side: most of them come with one read.
WINDOW = 2**20

_MODEL = b"segjobs.model_digest"


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """A row group of an object: what is read at once.

    Attributes:
        info: The object.
        number: Of the group in the object.
        num_rows: Of the group.
    """

    info: ObjectInfo
    number: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Objects that are one table together.

    Attributes:
        listed: Which they are.
        groups: In the order of paths.
        names: `NAMES` of all rows, in the order of groups.
        models: Digests of the models that made them, where footers say so.
    """

    listed: Input
    groups: tuple[RowGroup, ...]
    names: pa.Table
    models: tuple[str, ...]

    @property
    def store(self) -> Store:
        """Their folder."""
        return self.listed.store

    @property
    def url(self) -> str:
        """Their folder, their version, or the one object, as a person names it."""
        if self.listed.place:
            return self.store.url(self.listed.place)
        paths = self.listed.objects["path"].to_pylist()
        return self.store.url(paths[0] if len(paths) == 1 else "")

    @property
    def num_bytes(self) -> int:
        """Of all objects."""
        return sum(self.listed.objects["size"].to_pylist())


def open_tables(uri: str, endpoint_url: str | None) -> Tables:
    """Look at the Parquet objects at a URI, and read the names of their images.

    Args:
        uri: A Parquet object, or a folder with such objects anywhere; what is hidden or in a folder
            with an underscore in front does not count. Or a data set, a version or a table of one (`versions`).
        endpoint_url: See `storage.open_store`.

    Raises:
        InputError: There are none, or one is not of the one schema.
        StorageError: One cannot be read.
    """
    listed = look_at_table(uri, endpoint_url)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        looks = [pool.submit(_look, listed.store, info) for info in objects_of(listed.objects)]
        parts = [one.result() for one in looks]
    return Tables(
        listed=listed,
        groups=tuple(group for groups, _, _ in parts for group in groups),
        names=pa.concat_tables(names for _, names, _ in parts),
        models=tuple(sorted({model for _, _, model in parts if model})),
    )


def categories(table: Input) -> Sequence[Mapping[str, Any]]:
    """Return `{"id", "name"}` of the categories that a table could have, as its version or job says.

    Used or not, so that their order and number stay from table to table; none where nothing says.
    """
    if table.categories:
        return table.categories
    if table.store.info(MANIFEST) is None:
        return ()
    manifest = documents.read(table.store, MANIFEST, made_by_us=False)
    return list(manifest.get("categories", ()))


def read(store: Store, group: RowGroup) -> pa.Table:
    """Return `COLUMNS` of a row group, with page checksums verified."""
    with _opened(store, group.info) as file:
        return file.read_row_group(group.number, columns=list(COLUMNS))


def stream(
    store: Store, group: RowGroup, batch_size: int, columns: Sequence[str] = COLUMNS
) -> Iterator[pa.RecordBatch]:
    """Yield columns of a row group in batches, with page checksums verified.

    Args:
        store: Of the table.
        group: Of the table.
        batch_size: Rows of a batch.
        columns: Names; `detections.category` is that field alone of the structs in `detections`.
    """
    with _opened(store, group.info) as file:
        leaves = _leaves(file, columns)
        yield from file.iter_batches(batch_size, row_groups=[group.number], columns=leaves)


def scan(
    store: Store, infos: Iterable[ObjectInfo], columns: Sequence[str], batch_size: int
) -> Iterator[pa.RecordBatch]:
    """Yield columns of the rows of objects, one row group after another, page checksums verified.

    Args:
        store: The folder of the objects.
        infos: Tables of the one schema.
        columns: See `stream`.
        batch_size: Rows, at most.

    Raises:
        InputError: An object is not of the one schema.
        StorageError: One cannot be read.
    """
    for info in infos:
        with _opened(store, info) as file:
            _check_columns(store.url(info.path), file.schema_arrow.names)
            yield from file.iter_batches(batch_size, columns=_leaves(file, columns))


def model(store: Store, info: ObjectInfo) -> str:
    """Return the digest of the model that made an object; empty where its footer does not say."""
    with _opened(store, info) as file:
        return _model_of(file)


@contextlib.contextmanager
def _named_errors(store: Store, info: ObjectInfo) -> Iterator[None]:
    """Name the object in what Arrow says about a damaged one."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        raise StorageError(f"{store.url(info.path)} cannot be read: {error}") from error


def _look(store: Store, info: ObjectInfo) -> tuple[list[RowGroup], pa.Table, str]:
    with _opened(store, info) as file:
        _check_columns(store.url(info.path), file.schema_arrow.names)
        groups = [
            RowGroup(info=info, number=n, num_rows=file.metadata.row_group(n).num_rows)
            for n in range(file.num_row_groups)
        ]
        names = file.read(columns=list(NAMES)).replace_schema_metadata(None)
        return groups, names, _model_of(file)


def _model_of(file: pq.ParquetFile) -> str:
    footer: dict[bytes, bytes] = file.metadata.metadata or {}
    return footer.get(_MODEL, b"").decode()


def _check_columns(url: str, present: Sequence[str]) -> None:
    missing = [name for name in dict.fromkeys((*NAMES, *COLUMNS)) if name not in present]
    if missing:
        raise InputError(f"{url} is no table of the one schema: it has no {', '.join(missing)}")


def _leaves(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    """Return columns as Parquet names them: what writers call the elements of a list differs."""
    paths = [file.schema.column(n).path for n in range(len(file.schema))]
    wanted = [name for name in columns if "." not in name]
    for name in columns:
        column, dot, field = name.partition(".")
        if dot:
            wanted += [p for p in paths if p.startswith(f"{column}.") and p.endswith(f".{field}")]
    return wanted


@contextlib.contextmanager
def _opened(store: Store, info: ObjectInfo) -> Iterator[pq.ParquetFile]:
    """Open an object, name it in what Arrow says about a damaged one, and close it.

    Left to the garbage collector, the windows of many objects would be in memory at once.
    """
    with _named_errors(store, info):
        file = pq.ParquetFile(store.open(info, WINDOW), page_checksum_verification=True)
        try:
            yield file
        finally:
            file.close(force=True)
