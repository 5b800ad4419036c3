"""What stands around the pixels of a JPEG or PNG: it must neither be missed nor do harm."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segmodel.images import ImageError, decode, probe

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)


def save(name: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, name)
    return file.getvalue()


JPEG, PNG = save("JPEG"), save("PNG")


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    """JPEG with segments, of a marker and contents, at its start."""
    added = (
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return JPEG[:2] + b"".join(added) + JPEG[2:]


def png_with(name: bytes, body: bytes) -> bytes:
    """PNG with a chunk behind its header."""
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return PNG[:33] + chunk + PNG[33:]


def exif(order: str, *entry: int) -> bytes:
    """An EXIF block with one tag: its number, its type (3 short, 4 long) and its value."""
    tag, kind, value = entry
    stored = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IHHHI", 8, 1, tag, kind, 1) + stored


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("number", [3, 4])
def test_orientation_in_either_byte_order_and_type(order: str, number: int) -> None:
    block = exif(order, 0x0112, number, 6)
    for data, plain in (
        (jpeg_with((0xE1, b"Exif\0\0" + block)), JPEG),
        (jpeg_with((0xE1, b"Exif\0\0Exif\0\0" + block)), JPEG),
        (
            jpeg_with((0xFE, b"comment"), (0xE1, b"http://ns.adobe"), (0xE1, b"Exif\0\0" + block)),
            JPEG,
        ),
        (png_with(b"eXIf", block), PNG),
    ):
        np.testing.assert_array_equal(decode(data), np.rot90(decode(plain), -1))
        assert probe(data) == (8, 16)


def test_first_exif_block_counts() -> None:
    blocks = [(0xE1, b"Exif\0\0" + exif("<", 0x0112, 3, value)) for value in (1, 6)]
    assert probe(jpeg_with(*blocks)) == (16, 8)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II",
        bytes(60_000),
        b"MM\0*\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01",
        exif("<", 0x0112, 3, 99),
        exif("<", 0x0112, 3, 0),
        exif("<", 0x0112, 4, 2**32 - 1),
        exif("<", 0x0112, 5, 0),
        exif("<", 0x011A, 5, 0),
    ],
)
def test_absurd_exif_does_not_matter(block: bytes) -> None:
    np.testing.assert_array_equal(decode(jpeg_with((0xE1, b"Exif\0\0" + block))), decode(JPEG))
    np.testing.assert_array_equal(decode(png_with(b"eXIf", block)), PICTURE)


def test_damaged_metadata_of_jpegs_do_not_matter() -> None:
    for marker, body in (
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xE2, b"ICC_PROFILE\0\x09\x01"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM" * 99),
        (0xE1, b"Exif\0\0" + exif("<", 0x011A, 5, 2**31)),
    ):
        np.testing.assert_array_equal(decode(jpeg_with((marker, body))), decode(JPEG))


def test_junk_between_segments_is_skipped() -> None:
    """As libjpeg does; the last byte is filling before a marker."""
    data = JPEG[:2] + b"\xff\xfe\0\x04hi junk \xff\0 \xff\xd0 \xff" + JPEG[2:]
    np.testing.assert_array_equal(decode(data), decode(JPEG))


def test_bombs_in_metadata_do_not_matter() -> None:
    bomb = zlib.compress(bytes(70 << 20), 1)
    for name, body in (
        (b"zTXt", b"Comment\0\0" + bomb),
        (b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + bomb),
        (b"iCCP", b"profile\0\0" + bomb),
        (b"acTL", bytes(8)),
        (b"fcTL", b""),
    ):
        np.testing.assert_array_equal(decode(png_with(name, body)), PICTURE)


@pytest.mark.parametrize(
    ("frame", "precision"), [(0xC0, 12), (0xC1, 12), (0xC3, 8), (0xC7, 8), (0xCB, 8)]
)
def test_jpegs_without_a_decoder(frame: int, precision: int) -> None:
    found = b"\xff\xc0\0\x11\x08"
    assert JPEG.count(found) == 1
    with pytest.raises(ImageError, match="unsupported: "):
        decode(JPEG.replace(found, bytes([0xFF, frame, 0, 0x11, precision])))


def test_two_frames_are_refused() -> None:
    start = JPEG.index(b"\xff\xc0\0\x11")
    frame = JPEG[start : start + 19]
    with pytest.raises(ImageError, match="corrupt: "):
        decode(JPEG[:start] + frame + JPEG[start:])
