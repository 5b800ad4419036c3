"""The digests that a version keeps of its images: they say whether an image is the one that was labelled."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.detect import FOOTER_WINDOW, objects_of
from jobs.index import id_digest
from jobs.store import ObjectInfo, Store
from jobs.versions import CONTENTS, READ_THREADS, Version

Known: TypeAlias = npt.NDArray[np.void]

DIGEST_BYTES = 16
# Of each labelled image: the object of the input that it came from, and a digest of its bytes, which is empty
# where there were none. In files of their own, so that rows stay in the one schema.
CONTENT = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("object", pa.string(), nullable=False),
        pa.field("digest", pa.binary(), nullable=False),
    ]
)
# Of an image in memory: 24 bytes.
KNOWN = np.dtype([("image", np.uint64), ("digest", f"V{DIGEST_BYTES}")])
# What exports say of an image, so that a review of it is not taken for one of another by the same name.
FIELD = "segjobs_content"


def content_digest(data: bytes | None) -> bytes:
    """Return the digest of an image's bytes; empty where there are none, which is like no other."""
    return b"" if data is None else blake2b(data, digest_size=DIGEST_BYTES).digest()


def padded(digest: bytes) -> np.void:
    """Return a digest as `KNOWN` has it."""
    return np.void(digest.ljust(DIGEST_BYTES, b"\0"))


def known_of(table: pa.Table) -> Known:
    """Return ids and digests of a table of `CONTENT`, in its order."""
    known = np.zeros(table.num_rows, KNOWN)
    known["image"] = [id_digest(name) for name in table["image_id"].to_pylist()]
    for row, digest in enumerate(table["digest"].to_pylist()):
        known["digest"][row] = padded(digest)
    return known


def joined(parts: list[Known]) -> Known:
    """Return parts as one, by id, for `place`."""
    known = np.concatenate([np.empty(0, KNOWN), *parts])
    return known[np.argsort(known["image"], kind="stable")]


def place(known: Known, image_id: str) -> int | None:
    """Return where an image is in what `joined` gave; None where it is not."""
    image = np.uint64(id_digest(image_id))
    found = int(np.searchsorted(known["image"], image))
    return found if found < len(known) and known["image"][found] == image else None


def read(store: Store, info: ObjectInfo, objects: pa.Array | None) -> pa.Table:
    """Return the rows of an object of `CONTENT`: those of images of some objects of the input, or all."""
    file = pq.ParquetFile(store.open(info, FOOTER_WINDOW), page_checksum_verification=True)
    table = file.read(columns=CONTENT.names)
    return table if objects is None else table.filter(pc.is_in(table["object"], objects))


class Contents:
    """The digests of all images of a version, in memory."""

    def __init__(self, version: Version) -> None:
        infos = objects_of(version.table(CONTENTS).objects)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            parts = pool.map(lambda info: known_of(read(version.store, info, None)), infos)
            self._known = joined(list(parts))

    def of(self, image_id: str) -> str:
        """Return an image's digest in hexadecimal digits; empty where none is known."""
        found = place(self._known, image_id)
        digest = b"" if found is None else bytes(self._known["digest"][found])
        return digest.hex() if any(digest) else ""

    def noted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with what exports say of its image's content."""
        return {**row, FIELD: self.of(row["image_id"])}
