"""Manifests: CSV, JSON lines or Parquet tables that name images in a column `uri`."""

import io
import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from jobs.detect import InputError
from jobs.redact import holds_credentials
from jobs.store import ObjectInfo, StorageError, Store

WINDOW = 8 * 2**20


def read_uris(store: Store, info: ObjectInfo) -> Iterator[str]:
    """Yield the URIs of a manifest in their order, relative ones made whole.

    A relative URI is relative to the manifest's folder. Memory: 8 bytes for each URI.

    Raises:
        InputError: A row names no image, two rows name the same, or the file cannot be read.
    """
    digests = array("Q")
    for number, given in enumerate(_column(store, info)):
        if not given or not isinstance(given, str):
            raise InputError(f"row {number} of {store.url(info.path)} has no uri")
        uri = _whole(given, store, info.path)
        if not _is_text(uri):
            raise InputError(
                f"row {number} of {store.url(info.path)} has half a character in its uri, which no "
                "table can hold: rename the image"
            )
        if holds_credentials(uri):
            raise InputError(
                f"row {number} of {store.url(info.path)} has a password or a signature in its uri, which "
                "would stand in the table: name the image without, and give credentials by the "
                "environment or a role"
            )
        digests.append(int.from_bytes(blake2b(uri.encode(), digest_size=8).digest(), "big"))
        yield uri
    values, times = np.unique(np.asarray(digests, np.uint64), return_counts=True)
    if (times > 1).any():
        twice = set(values[times > 1].tolist())
        rows = [n for n, value in enumerate(digests) if value in twice][:6]
        raise InputError(
            f"{store.url(info.path)} names {len(twice)} images more than once (rows {rows}, counted "
            "from 0): every image has one row in the output, so remove the repeats"
        )


def _column(store: Store, info: ObjectInfo) -> Iterator[str | None]:
    file = store.open(info, WINDOW)
    url = store.url(info.path)
    try:
        match Path(info.path).suffix.lower():
            case ".csv":
                yield from _csv_column(file)
            case ".parquet":
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                for batch in parquet.iter_batches(columns=["uri"]):
                    yield from batch["uri"].to_pylist()
            case _:
                for line in io.TextIOWrapper(io.BufferedReader(file), encoding="utf-8-sig"):
                    if line.strip():
                        row = json.loads(line)
                        yield row.get("uri") if isinstance(row, dict) else None
    except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
        raise InputError(
            f"{url} cannot be read as a manifest: {error}. It needs a column `uri`."
        ) from error


def _is_text(uri: str) -> bool:
    """Say whether it can be written: JSON may escape one half of a surrogate pair."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_column(file: io.RawIOBase) -> Iterator[str | None]:
    batches = pyarrow.csv.open_csv(
        file,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=["uri"], column_types={"uri": pa.string()}, strings_can_be_null=False
        ),
    )
    for batch in batches:
        yield from batch["uri"].to_pylist()


def _whole(uri: str, store: Store, manifest: str) -> str:
    if "://" in uri or uri.startswith("/"):
        return uri
    folder = manifest.rpartition("/")[0]
    return store.url(f"{folder}/{uri}" if folder else uri)
