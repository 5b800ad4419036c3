"""TIFFs written by hand, to have what no writer writes. Pixels stand at byte 8."""

import struct

import pytest

from segmodel.images import ImageError, decode, probe

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, ORIENTATION = (
    256,
    257,
    258,
    259,
    262,
    273,
    274,
)
SAMPLES, ROWS, COUNTS, PLANAR, COLOUR_MAP = 277, 278, 279, 284, 320
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_COUNTS, EXTRA, FORMAT = 322, 323, 324, 325, 338, 339

Tags = dict[int, tuple[int, ...]]


def tiff(pixels: bytes, tags: Tags, order: str = "<") -> bytes:
    """Header, pixels, lists of values, directory; every value has 32 bits."""
    body = bytearray(pixels + bytes(-len(pixels) % 4))
    directory = struct.pack(order + "H", len(tags))
    for tag, values in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) != 1:
            raw, at = struct.pack(order + "I", 8 + len(body)), raw
            body += at
        directory += struct.pack(order + "HHI", tag, 4, len(values)) + raw
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(body)) + bytes(body) + directory + bytes(4)


def grey(pixels: bytes, bits: int, tags: Tags | None = None, order: str = "<") -> bytes:
    """One row of two pixels, black is zero."""
    usual: Tags = {WIDTH: (2,), HEIGHT: (1,), BITS: (bits,), COMPRESSION: (1,), PHOTOMETRIC: (1,)}
    usual |= {STRIPS: (8,), SAMPLES: (1,), ROWS: (1,), COUNTS: (len(pixels),)}
    return tiff(pixels, usual | (tags or {}), order)


def levels(data: bytes) -> list[int]:
    return decode(data)[0, :, 0].tolist()


def kind(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return caught.value.kind


def test_bits_and_byte_orders() -> None:
    from_white = {PHOTOMETRIC: (0,)}
    assert levels(grey(b"\xff\x07", 8)) == [255, 7]
    assert levels(grey(b"\xff\x07", 8, from_white)) == [0, 248]
    assert levels(grey(b"\xff\xf0\x70", 12)) == [255, 7]
    for order in "<>":
        sixteen = struct.pack(order + "HH", 65535, 7 * 256)
        assert levels(grey(sixteen, 16, order=order)) == [255, 7]
    assert levels(grey(struct.pack("<HH", 65535, 7 * 256), 16, from_white)) == [0, 248]


@pytest.mark.parametrize(("bits", "sample"), [(16, 2), (32, 1), (32, 2), (32, 3), (64, 3), (7, 1)])
def test_samples_without_a_known_white_are_refused(bits: int, sample: int) -> None:
    assert kind(grey(bytes(16), bits, {FORMAT: (sample,)})) == "unsupported"


def test_premultiplied_alpha() -> None:
    tags = {BITS: (8, 8), SAMPLES: (2,), EXTRA: (1,)}
    assert levels(grey(bytes([10, 255, 0, 0]), 8, tags)) == [10, 255]


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation(order: str) -> None:
    assert decode(grey(b"\0\1", 8, {ORIENTATION: (6,)}, order))[:, 0, 0].tolist() == [0, 1]
    assert levels(grey(b"\0\1", 8, {ORIENTATION: (2,)}, order)) == [1, 0]
    assert levels(grey(b"\0\1", 8, {ORIENTATION: (99,)}, order)) == [0, 1]
    assert probe(grey(b"\0\1", 8, {ORIENTATION: (6,)}, order)) == (2, 1)


def test_missing_strips_are_refused() -> None:
    """Pillow would leave their part of the picture black."""
    tall = {HEIGHT: (6,), ROWS: (2,)}
    assert decode(grey(bytes(12), 8, tall | {STRIPS: (8, 12, 16)})).shape == (6, 2, 3)
    assert kind(grey(bytes(12), 8, tall | {STRIPS: (8, 12)})) == "truncated"


def test_missing_planes_are_refused() -> None:
    colour = {BITS: (8, 8, 8), PHOTOMETRIC: (2,), SAMPLES: (3,), PLANAR: (2,)}
    pixels = bytes([1, 2, 3, 4, 5, 6])
    whole = grey(pixels, 8, colour | {STRIPS: (8, 10, 12), COUNTS: (2, 2, 2)})
    assert decode(whole).tolist() == [[[1, 3, 5], [2, 4, 6]]]
    assert kind(grey(pixels, 8, colour | {STRIPS: (8, 10), COUNTS: (2, 2)})) == "truncated"


def test_missing_tiles_are_refused() -> None:
    tags = {WIDTH: (17,), HEIGHT: (16,), BITS: (8,), COMPRESSION: (1,), PHOTOMETRIC: (1,)}
    tags |= {SAMPLES: (1,), TILE_WIDTH: (16,), TILE_HEIGHT: (16,)}
    assert decode(tiff(bytes(512), tags | {TILES: (8, 264)})).shape == (16, 17, 3)
    assert kind(tiff(bytes(512), tags | {TILES: (8,)})) == "truncated"
    assert kind(tiff(bytes(512), tags)) in ("corrupt", "unsupported")


def test_bombs_are_refused_by_their_directory() -> None:
    assert (
        kind(grey(b"\0\0", 8, {WIDTH: (100_000,), HEIGHT: (1_000,), ROWS: (1_000,)})) == "too_large"
    )
    tile = {TILE_WIDTH: (60_000,), TILE_HEIGHT: (60_000,), TILES: (8,), TILE_COUNTS: (2,)}
    assert kind(grey(b"\0\0", 8, tile)) == "too_large"


def test_values_that_cannot_be() -> None:
    assert kind(grey(b"\0\0", 8, {WIDTH: (2, 2)})) == "corrupt"
    assert kind(grey(b"\0\0", 8, {WIDTH: (0,)})) == "corrupt"
    assert kind(grey(b"\0\0", 8, {STRIPS: (2**32 - 1,)})) == "truncated"
    assert kind(b"II*\0\xff\xff\xff\xff") == "truncated"


def test_lists_beyond_the_end() -> None:
    data = bytearray(grey(b"\0\0", 8, {BITS: (8, 8)}))
    at = data.index(struct.pack("<HHI", BITS, 4, 2)) + 8
    data[at : at + 4] = struct.pack("<I", 2**31)
    assert kind(bytes(data)) == "truncated"


def test_overlapping_lists() -> None:
    """Each lies in the file, but together they are larger than it."""
    tags = (STRIPS, COUNTS, COLOUR_MAP)
    data = bytearray(grey(bytes(1000), 8, dict.fromkeys(tags, (8,) * 100)))
    for tag in tags:
        at = data.index(struct.pack("<HHI", tag, 4, 100))
        data[at : at + 12] = struct.pack("<HHII", tag, 4, 450, 8)
    assert kind(bytes(data)) == "corrupt"


def test_first_of_two_equal_tags_counts() -> None:
    data = grey(b"\0\1", 8, {65_000: (7,)})
    again = data.replace(
        struct.pack("<HHII", 65_000, 4, 1, 7), struct.pack("<HHII", WIDTH, 4, 1, 9)
    )
    assert levels(again) == [0, 1]


def test_offset_of_64_bits() -> None:
    tags = [(WIDTH, 1), (HEIGHT, 1), (BITS, 8), (COMPRESSION, 1), (PHOTOMETRIC, 1), (STRIPS, 2**63)]
    entries = b"".join(struct.pack("<HHQQ", tag, 16, 1, value) for tag, value in tags)
    assert (
        kind(struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)) + entries + bytes(8))
        == "corrupt"
    )
    assert kind(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**64 - 1)) == "corrupt"
