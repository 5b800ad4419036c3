"""The first page of a TIFF or BigTIFF file, by its directory (TIFF 6.0, section 2)."""

import struct
from dataclasses import dataclass

from segmodel.headers import Header, ImageError

# The tags that Pillow and libtiff need for the pixels, in any compression.
_WIDTH, _HEIGHT, _STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _PLANAR = 256, 257, 273, 274, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES = 322, 323, 324
_SINGLE = frozenset(
    {_WIDTH, _HEIGHT, 259, 262, 266, _ORIENTATION, _SAMPLES, _ROWS, _PLANAR, 292, 293, 317}
    | {_TILE_WIDTH, _TILE_HEIGHT, 347, 512, 513, 514, 515, 531}
)
_LISTS = frozenset({258, _STRIPS, 279, 320, _TILES, 325, 338, 339, 519, 520, 521, 529, 530, 532})
_BYTE, _SHORT, _LONG, _LONG8 = 1, 3, 4, 16
_OPAQUE = (_BYTE, 2, 7)  # their values are one string together
_NUMBER_FORMATS = {_BYTE: "B", _SHORT: "H", _LONG: "I", _LONG8: "Q"}
_TYPE_SIZES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8), start=1)) | {_LONG8: 8}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One entry of a TIFF directory.

    Attributes:
        raw: Its bytes.
        size: Bytes of its values where they stand outside of the directory, else 0.
        count: How many values it has.
        value: The first of them, 0 where it is no number.
    """

    raw: bytes
    size: int
    count: int
    value: int


def read(data: bytes) -> Header:
    """Replace the first directory by one of the pixels' tags alone, which also ends the pages."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:4] == b"+\0"
    count, word, entry = ("Q", "Q", "HHQ8s") if big else ("H", "I", "HHI4s")
    (start,) = struct.unpack_from(order + word, data, 8 if big else 4)
    (num_entries,) = struct.unpack_from(order + count, data, start)
    first, size = start + struct.calcsize(order + count), struct.calcsize(order + entry)

    entries: dict[int, _Entry] = {}
    for position in range(first, first + num_entries * size, size):
        tag, kind, _, _ = struct.unpack_from(order + entry, data, position)
        if tag in _SINGLE | _LISTS and tag not in entries and kind in _TYPE_SIZES:
            entries[tag] = _entry(data, position, order, big=big)
    if sum(entry.size for entry in entries.values()) > len(data):  # Pillow would warn and skip some
        raise ImageError("corrupt", "the values of the TIFF's tags overlap")
    _check_strips(entries)

    kept = [entries[tag].raw for tag in sorted(entries) if tag != _ORIENTATION]
    next_page = bytes(struct.calcsize(order + word))
    directory = struct.pack(order + count, len(kept)) + b"".join(kept) + next_page
    view = memoryview(data)
    orientation = _value(entries, _ORIENTATION, 1)
    return Header(
        format="tiff",
        size_hw=(_value(entries, _HEIGHT, 0), _value(entries, _WIDTH, 0)),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        data=b"".join((view[:start], directory, view[start + len(directory) :])),
        tile_hw=(_value(entries, _TILE_HEIGHT, 0), _value(entries, _TILE_WIDTH, 0)),
    )


def _entry(data: bytes, position: int, order: str, *, big: bool) -> _Entry:
    entry, word, inline = ("HHQ", "Q", 8) if big else ("HHI", "I", 4)
    tag, kind, count = struct.unpack_from(order + entry, data, position)
    value_at = position + struct.calcsize(order + entry)
    raw = data[position : value_at + inline]
    size = count * _TYPE_SIZES[kind]
    if size > inline:
        (value_at,) = struct.unpack_from(order + word, data, value_at)
    if value_at + size > len(data):
        raise ImageError("truncated", f"TIFF tag {tag} has values beyond the end of the file")
    if tag in _SINGLE and count != 1 and kind not in _OPAQUE:
        raise ImageError("corrupt", f"TIFF tag {tag} has {count} values, not 1")
    value = 0
    if kind in _NUMBER_FORMATS and count:
        (value,) = struct.unpack_from(order + _NUMBER_FORMATS[kind], data, value_at)
    return _Entry(raw=raw, size=size if size > inline else 0, count=count, value=value)


def _value(entries: dict[int, _Entry], tag: int, default: int) -> int:
    return entries[tag].value if tag in entries else default


def _check_strips(entries: dict[int, _Entry]) -> None:
    """Refuse a TIFF with fewer strips or tiles than it needs: Pillow would leave the rest black."""
    height, width = _value(entries, _HEIGHT, 0), _value(entries, _WIDTH, 0)
    if _TILES in entries:
        listed = entries[_TILES].count
        rows, columns = _value(entries, _TILE_HEIGHT, height), _value(entries, _TILE_WIDTH, width)
    elif _STRIPS in entries:
        listed = entries[_STRIPS].count
        rows, columns = _value(entries, _ROWS, height), width
    else:  # old-style JPEG
        return
    planes = _value(entries, _SAMPLES, 1) if _value(entries, _PLANAR, 1) == 2 else 1
    needed = planes * -(-height // max(rows, 1)) * -(-width // max(columns, 1))
    if listed < needed:
        raise ImageError("truncated", f"the TIFF lists {listed} of its {needed} strips or tiles")
