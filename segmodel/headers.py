"""What an image file says about itself before a pixel is decoded: format, size, orientation.

The readers here (and `tiff.read`) walk the container only. Each hands on the file without its
metadata (EXIF, XMP, ICC, text, thumbnails, further pages), because Pillow parses that too, and
answers damage in it by refusing the whole picture, or with Python warnings, which cannot be
silenced for one thread alone. A reader lets `struct.error` and `IndexError` escape where the file
ends too early.
"""

import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# empty           no bytes at all
# unknown_format  not one of the six formats below, whatever its name says
# unsupported     one of them, in a variant with no decoder here or no agreed rendering in 8 bits
# too_large       more pixels or scans than allowed, or more memory than there is
# truncated       the file ends before the picture does
# corrupt         the file contradicts itself or its format
Kind = Literal["empty", "unknown_format", "unsupported", "too_large", "truncated", "corrupt"]
Format = Literal["jpeg", "png", "webp", "tiff", "bmp", "gif"]

# An error goes into a column of a table that people read; decoders may quote any number of bytes.
_MAX_MESSAGE = 200


class ImageError(ValueError):
    """An image that cannot be read; `str(error)` is one line, `<kind>: <what happened>`."""

    def __init__(self, kind: Kind, what: str) -> None:
        super().__init__(kind, what)  # both, so that the error survives pickling between processes
        self.kind = kind
        self.what = " ".join(what.split())[:_MAX_MESSAGE]

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Header:
    """One picture's container.

    Attributes:
        format: By content.
        size_hw: Height and width as stored, before the orientation is applied.
        orientation: EXIF orientation, 1 to 8; 1 where it is absent or absurd.
        data: The file without its metadata.
        tile_hw: Height and width of a TIFF's tiles, of which one may be larger than the picture.
    """

    format: Format
    size_hw: tuple[int, int]
    orientation: int = 1
    data: bytes
    tile_hw: tuple[int, int] = (0, 0)

    @property
    def num_pixels(self) -> int:
        """As many pixels as decoding may allocate at once."""
        (height, width), (tile_height, tile_width) = self.size_hw, self.tile_hw
        return max(height, tile_height) * max(width, tile_width)

    @property
    def upright_hw(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        height, width = self.size_hw
        return (width, height) if self.orientation >= 5 else (height, width)


def exif_orientation(exif: bytes) -> int:
    """Return an EXIF block's orientation, 1 to 8; 1 where it is absent, damaged or absurd."""
    exif = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")  # some writers put it twice
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, start)
        for position in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, position)
            if tag == 0x0112 and kind in (3, 4):
                number = "H" if kind == 3 else "I"
                (value,) = struct.unpack_from(order + number, exif, position + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


# JPEG: ITU-T T.81, annex B. The frames that libjpeg reads: baseline, extended and progressive.
_JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_JPEG_OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xDA)})  # markers without a length
_JPEG_TABLES = frozenset({0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD})
# Each scan of a progressive JPEG walks the whole picture, and 14 bytes are enough for one: a few
# kilobytes may ask for hours. Cameras and encoders write up to about 20, libtiff decodes up to 100,
# libjpeg-turbo advises to stop at 500. At the limit of pixels, 100 take 7 to 10 s of a core instead
# of the 1.7 s of the usual ten (Zen 5, 48 MB of scans or 1 MB).
MAX_JPEG_SCANS = 100
# Each costs memory and time here and in the decoder, and two bytes are enough for one. Files have tens; a PNG
# of 256 MiB from libpng, which cuts at 8 KiB, has 32,768.
MAX_SEGMENTS = 50_000
# Within the data of a scan, 0xFF is followed by zero or is a restart mark.
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
# Metadata are APPn and comments, but JFIF (APP0) and Adobe (APP14) say how the colours are stored.
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
_JPEG_SEGMENTS = _JPEG_FRAMES | _JPEG_OTHER_FRAMES | _JPEG_TABLES | _JPEG_METADATA | {0xE0, 0xEE}


def jpeg(data: bytes) -> Header:
    """Read a JPEG; of a multi-picture file (MPO) it is the first picture."""
    view = memoryview(data)
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    size_hw, orientation = None, None
    for number, (marker, start, end) in enumerate(_jpeg_segments(data)):
        _refuse_more_segments(number)
        if marker == 0xE1 and orientation is None and data.startswith(b"Exif\0\0", start + 4):
            orientation = exif_orientation(data[start + 4 : end])
        if marker in _JPEG_OTHER_FRAMES or (marker in _JPEG_FRAMES and data[start + 4] != 8):
            raise ImageError("unsupported", "a lossless, hierarchical or 12-bit JPEG")
        if marker in _JPEG_FRAMES and size_hw is None:
            height, width = struct.unpack_from(">HH", data, start + 5)
            size_hw = (height, width)
        if marker == 0xDA and _too_many_scans(data, start):
            raise ImageError("too_large", f"a JPEG of more than {MAX_JPEG_SCANS} scans")
        if marker not in _JPEG_METADATA:
            kept.append(view[start:end])
    if size_hw is None:
        raise ImageError("corrupt", "a JPEG scan without a frame")
    return Header(format="jpeg", size_hw=size_hw, orientation=orientation or 1, data=b"".join(kept))


def _refuse_more_segments(number: int) -> None:
    if number >= MAX_SEGMENTS:
        raise ImageError("too_large", f"a file of more than {MAX_SEGMENTS} segments")


def _too_many_scans(data: bytes, position: int) -> bool:
    """Count the scans from the first one to the picture's end; what is behind that is not decoded."""
    if data.count(b"\xff\xda", position) <= MAX_JPEG_SCANS:
        return False
    num_scans = 0
    while num_scans <= MAX_JPEG_SCANS:
        found = _JPEG_SCAN_END.search(data, position)
        if found is None or found[0] == b"\xff\xd9":
            return False
        num_scans += found[0] == b"\xff\xda"
        position = found.end()
        if found[0][1] not in _JPEG_BARE:
            position += int.from_bytes(data[position : position + 2])
    return True


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of each segment; the last is the first scan and all behind it."""
    position = 2
    while True:
        position = data.find(b"\xff", position)  # between segments, decoders skip what is no marker
        if position < 0:
            raise ImageError("truncated", "the file ends before its first scan")
        marker = data[position + 1]
        if marker in (0x00, 0xFF):
            position += 1
        elif marker == 0xDA:
            yield marker, position, len(data)
            return
        elif marker in _JPEG_BARE:
            position += 2
        elif marker not in _JPEG_SEGMENTS:
            # libjpeg stops here; Pillow would look for metadata within the segment.
            raise ImageError("corrupt", f"a JPEG with a segment of the unknown kind {marker:#x}")
        else:
            # Of less than the two bytes of the length itself: Pillow and libjpeg go on behind those.
            length = max(2, *struct.unpack_from(">H", data, position + 2))
            if position + 2 + length > len(data):
                raise ImageError("truncated", "the file ends inside its header")
            yield marker, position, position + 2 + length
            position += 2 + length


_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def png(data: bytes) -> Header:
    """Read a PNG; of an animated one it is the default picture."""
    if data[12:16] != b"IHDR":
        raise ImageError("corrupt", "a PNG that does not begin with IHDR")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    view = memoryview(data)
    kept: list[bytes | memoryview] = [view[:8]]
    orientation, position, has_palette = 1, 8, False
    for number in itertools.count():
        if position + 8 > len(data):
            break
        _refuse_more_segments(number)
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind == b"eXIf":
            orientation = exif_orientation(data[position + 8 : end - 4])
        # A transparent colour of 16 bits cannot be found again once the picture has 8.
        elif kind in _PNG_KEPT and not (kind == b"tRNS" and depth == 16):
            kept.append(view[position:end])
        has_palette |= kind == b"PLTE"
        if kind == b"IEND":
            break
        position = end
    if colour == 3 and not has_palette:
        raise ImageError("corrupt", "a PNG of palette colours without a palette")
    return Header(
        format="png", size_hw=(height, width), orientation=orientation, data=b"".join(kept)
    )


def webp(data: bytes) -> Header:
    """Read a WebP, whose metadata Pillow leaves alone."""
    (riff_size,) = struct.unpack_from("<I", data, 4)
    if 8 + riff_size > len(data):
        raise ImageError("truncated", f"{len(data)} bytes of {8 + riff_size}")
    kind = data[12:16]
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        size_hw = (1 + low_h + (high_h << 16), 1 + low_w + (high_w << 16))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        size_hw = (1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF))
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        size_hw = (height & 0x3FFF, width & 0x3FFF)
    else:
        raise ImageError("corrupt", f"a WebP that begins with {kind!r}")
    orientation, position = 1, 12
    while kind == b"VP8X" and position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        if name == b"EXIF":
            orientation = exif_orientation(data[position + 8 : position + 8 + length])
        position += 8 + length + length % 2
    return Header(format="webp", size_hw=size_hw, orientation=orientation, data=data)


def bmp(data: bytes) -> Header:
    """Read a BMP, which has no metadata."""
    (header_size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header_size == 12 else "<Ii", data, 18)
    # A negative height says that the rows are stored from the top.
    return Header(format="bmp", size_hw=(abs(height), width), data=data)


def gif(data: bytes) -> Header:
    """Read a GIF: the first frame, which may reach beyond the screen, and its control block."""
    screen_w, screen_h, flags = struct.unpack_from("<HHB", data, 6)
    screen_end = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = b""
    position = screen_end
    while data[position] != 0x2C:  # an image
        if data[position] == 0x3B:  # the end
            raise ImageError("corrupt", "a GIF without a frame")
        start = position
        position += 1
        if data[start] == 0x21:  # an extension: its label, then blocks that state their length
            position += 1
            while data[position]:
                position += 1 + data[position]
            position += 1
            # Of another length, Pillow would read on elsewhere than the loop here.
            if data[start + 1 : start + 3] == b"\xf9\x04":
                control = data[start : start + 7] + b"\0"
    left, top, width, height = struct.unpack_from("<HHHH", data, position + 1)
    size_hw = (max(screen_h, top + height), max(screen_w, left + width))
    return Header(format="gif", size_hw=size_hw, data=data[:screen_end] + control + data[position:])
