"""Which column of a Parquet shard holds its images, and what names them."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from jobs.detect import holds_images

OWN_KEYS = ("image_id", "shard", "key")


class ParquetInputError(ValueError):
    """A Parquet shard without an image column that can be read."""


def find_image_column(schema: pa.Schema, asked: str | None) -> str:
    """Return the column that holds encoded images: the one asked for, or the only candidate.

    A candidate is a struct with a field `bytes` (Hugging Face's Image) or a binary column.

    Raises:
        ParquetInputError: There is none, or several.
    """
    candidates = [field.name for field in schema if holds_images(field.type)]
    twice = sorted({name for name in candidates if schema.names.count(name) > 1})
    if twice:
        raise ParquetInputError(f"several columns have the name {twice[0]!r}: rename all but one")
    if asked is not None:
        if asked not in candidates:
            raise ParquetInputError(
                f"column {asked!r} holds no encoded images; columns that may: {candidates or 'none'}"
            )
        return asked
    if "image" in candidates:
        return "image"
    if len(candidates) != 1:
        raise ParquetInputError(
            f"the columns that may hold encoded images are {candidates or 'none'}: "
            "name one by --image-column"
        )
    return str(candidates[0])


def key_columns(schema: pa.Schema, image_column: str) -> list[str]:
    """Return the columns that name a shard's images.

    Tables in the one schema keep their ids (`image_id`, `shard`, `key`), so that predictions on
    packed shards can be held against them; otherwise the column `key`, or the path in the image
    struct, or
    none: then the number of the row is the key.
    """
    strings = {field.name for field in schema if _holds_text(field.type)}
    if strings >= set(OWN_KEYS):
        return list(OWN_KEYS)
    if "key" in strings:
        return ["key"]
    image_type = schema.field(image_column).type
    if pa.types.is_struct(image_type) and image_type.get_field_index("path") >= 0:
        return [f"{image_column}.path"]
    return []


def row_key(row: Mapping[str, Any], number: int, image_column: str) -> str:
    """Return the key of a row that was read with `key_columns`."""
    image = row.get(image_column)
    given = row.get("key") or (image.get("path") if isinstance(image, dict) else None)
    return str(given or f"{number:08d}")


def _holds_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
