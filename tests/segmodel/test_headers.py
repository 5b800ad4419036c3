"""What stands around the pixels of a JPEG or PNG: it must neither be missed nor do harm."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from segmodel import headers, images
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


def progressive(num_scans: int) -> bytes:
    """A progressive JPEG with its last scan, a refinement of nothing, as often as it takes."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (120, 80, 40)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * (num_scans - data.count(b"\xff\xda")) + data[end:]


def test_scans_are_bounded() -> None:
    expected = decode(progressive(10))
    np.testing.assert_array_equal(decode(progressive(headers.MAX_JPEG_SCANS)), expected)
    for num_scans in (headers.MAX_JPEG_SCANS + 1, 100_000):
        data = progressive(num_scans)
        for read in (decode, probe):
            with pytest.raises(ImageError, match="too_large: a JPEG of more than 100 scans"):
                read(data)


def test_segments_are_bounded() -> None:
    jpeg = progressive(2)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    png = picture.getvalue()
    at = png.index(b"IDAT") - 4
    empty_chunk = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    for number in (1_000, headers.MAX_SEGMENTS):
        many = {
            "jpeg": jpeg[:2] + b"\xff\xe0\x00\x02" * number + jpeg[2:],
            "png": png[:at] + empty_chunk * number + png[at:],
        }
        for data in many.values():
            for read in (decode, probe):
                if number < headers.MAX_SEGMENTS:
                    read(data)
                    continue
                with pytest.raises(ImageError, match="too_large: a file of more than 50000 seg"):
                    read(data)


def test_fill_bytes_and_segments_between_scans_hide_none() -> None:
    for between in (b"\xff\xff\xff", b"\xff\xfe\0\x06\xff\xd9\xff\xd9", b"\xff\x01"):
        data = progressive(headers.MAX_JPEG_SCANS + 1).replace(b"\xff\xda", between + b"\xff\xda")
        with pytest.raises(ImageError, match="too_large: "):
            decode(data)


def test_what_only_looks_like_a_scan_is_not_counted() -> None:
    """In a comment between scans, and behind the picture's end, where phones put other pictures."""
    data = progressive(10)
    last = data.rindex(b"\xff\xda")
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 400) + b"\xff\xda" * 200
    for looks in (data + progressive(99) + progressive(99), data[:last] + comment + data[last:]):
        np.testing.assert_array_equal(decode(looks), decode(data))


def test_scans_within_a_tiff_are_bounded_by_its_library() -> None:
    def tiff(jpeg: bytes) -> bytes:
        tags = {256: 32, 257: 32, 259: 7, 262: 6, 273: 8, 277: 3, 278: 32, 279: len(jpeg)}
        jpeg += bytes(-len(jpeg) % 4)
        # Bits of each sample, and a luma as large as both chromas.
        at = 8 + len(jpeg)
        entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()}
        entries[258] = struct.pack("<HHII", 258, 3, 3, at)
        entries[530] = struct.pack("<HHIHH", 530, 3, 2, 2, 2)
        directory = b"".join(entries[tag] for tag in sorted(entries))
        end = struct.pack("<H", len(entries)) + directory + bytes(4)
        return struct.pack("<2sHI", b"II", 42, at + 6) + jpeg + struct.pack("<HHH", 8, 8, 8) + end

    assert decode(tiff(progressive(99))).shape == (32, 32, 3)
    with pytest.raises(ImageError, match="corrupt: "):
        decode(tiff(progressive(1000)))


@pytest.mark.parametrize("codec", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_only_the_first_of_many_frames_is_decoded(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of frames cost their bytes, not their pixels."""
    frames = [Image.fromarray(PICTURE + np.uint8(number)) for number in range(200)]
    file = io.BytesIO()
    options = {"lossless": True} if codec == "WEBP" else {}
    frames[0].save(file, codec, save_all=True, append_images=frames[1:], **options)
    loaded: list[int] = []
    seek = {plugin: plugin.seek for plugin in images._PLUGINS.values()}

    def noted(self: ImageFile.ImageFile, frame: int) -> None:
        loaded.append(frame)
        seek[type(self)](self, frame)

    for plugin in seek:
        monkeypatch.setattr(plugin, "seek", noted)
    first = decode(file.getvalue())
    assert first.shape == PICTURE.shape
    assert set(loaded) <= {0}
    if codec not in ("GIF", "MPO"):
        np.testing.assert_array_equal(first, PICTURE)


def test_metadata_in_front_of_a_png_may_be_large() -> None:
    """As much text as a chunk may hold, of which nothing is unpacked or copied to the decoder."""
    text = bytes(20 << 20)
    for name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"):
        data = png_with(name, text)
        assert len(headers.png(data).data) == len(PNG)
        np.testing.assert_array_equal(decode(data), PICTURE)


@pytest.mark.parametrize("length", [0, 3, 5])
def test_a_gif_with_a_control_block_of_another_length(length: int) -> None:
    """Found by fuzzing: Pillow went on elsewhere, and found a frame of 3.7 gigapixels there."""
    file = io.BytesIO()
    Image.fromarray(PICTURE).quantize(8).save(file, "GIF")
    data = file.getvalue()
    frame = data.index(b",", 13 + 3 * 8)
    control = b"!\xf9" + bytes([length]) + bytes(length) + (b"\0" if length else b"")
    # To Pillow, what follows the empty block is as long as a comma, 44 bytes, says.
    hidden = bytes(44) + b"," + struct.pack("<HHHH", 0, 0, 60_000, 60_000)
    for extra in (b"", hidden):
        damaged = data[:frame] + control + data[frame:] + extra
        np.testing.assert_array_equal(decode(damaged), decode(data))


@pytest.mark.parametrize("length", [0, 1])
def test_segments_shorter_than_their_length_hide_no_metadata(length: int) -> None:
    """Found by fuzzing: without its length such a segment swallowed the next one's marker."""
    short = bytes([0xFF, 0xC4]) + struct.pack(">H", length)
    absurd = b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, 0x0112, 5, 9, 2**31, 0)
    hidden = bytes([0xFF, 0xE1]) + struct.pack(">H", 2 + len(absurd)) + absurd
    data = JPEG[:2] + short + hidden + JPEG[2:]
    assert b"Exif" not in headers.jpeg(data).data
    with pytest.raises(ImageError, match="corrupt: "):
        decode(data)


@pytest.mark.parametrize("marker", [0x02, 0xBF, 0xC8, 0xDE, 0xDF, 0xF0, 0xFC, 0xFD])
def test_segments_that_no_decoder_knows_hide_no_metadata(marker: int) -> None:
    """Found by fuzzing: Pillow read the EXIF block within such a segment, and warned."""
    damaged = b"Exif\0\0" + exif("<", 0x0112, 3, 6)[:-6]
    hidden = bytes([0xFF, 0xE1]) + struct.pack(">H", 2 + len(damaged)) + damaged
    for data in (jpeg_with((marker, hidden)), jpeg_with((marker, b""))):
        with pytest.raises(ImageError, match="corrupt: a JPEG with a segment of the unknown kind"):
            decode(data)
