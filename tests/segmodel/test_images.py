import contextlib
import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmodel import images
from segmodel.images import ImageError, decode, format_of, probe

HARD = Path(__file__).parents[2].parent / "shared" / "data" / "hard"

# Four flat quarters, so that a turn, a mirror or swapped colours cannot pass unseen.
RED, GREEN, BLUE, GREY = (220, 40, 30), (40, 180, 60), (20, 60, 210), (128, 128, 128)
PICTURE = np.zeros((24, 40, 3), np.uint8)
PICTURE[:12, :20], PICTURE[:12, 20:], PICTURE[12:, :20], PICTURE[12:, 20:] = RED, GREEN, BLUE, GREY


def save(image: Image.Image, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, name, **options)  # Pillow keeps options of one save for the next
    return file.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png(
    size_hw: tuple[int, int], depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]
) -> bytes:
    """A PNG by hand: `rows` with their filter bytes, `extra` chunks before them."""
    header = struct.pack(">IIBBBBB", size_hw[1], size_hw[0], depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def samples() -> dict[str, bytes]:
    """A file of each format and of the variants that take another path through a decoder."""
    rgb = Image.fromarray(PICTURE)
    rgba = rgb.convert("RGBA")
    palette = rgb.quantize(8)
    files = {
        "jpeg": save(rgb, "JPEG", quality=95, subsampling=0),
        "jpeg_progressive": save(rgb, "JPEG", quality=95, subsampling=0, progressive=True),
        "jpeg_exif": save(rgb, "JPEG", quality=95, subsampling=0, exif=orientation(1)),
        "jpeg_cmyk": save(rgb.convert("CMYK"), "JPEG", quality=95, subsampling=0),
        "mpo": save(
            rgb, "MPO", quality=95, subsampling=0, save_all=True, append_images=[rgb.rotate(180)]
        ),
        "png": save(rgb, "PNG"),
        "png_rgba": save(rgba, "PNG"),
        "png_palette": save(palette, "PNG"),
        "png_animated": save(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]),
        "webp": save(rgb, "WEBP", quality=95),
        "webp_lossless": save(rgba, "WEBP", lossless=True, exif=orientation(1)),
        "webp_animated": save(
            rgb, "WEBP", lossless=True, save_all=True, append_images=[rgb.rotate(180)]
        ),
        "gif": save(palette, "GIF", comment=b"made by hand"),
        "gif_animated": save(
            palette, "GIF", save_all=True, append_images=[rgb.rotate(180).quantize(8)]
        ),
        "bmp": save(rgb, "BMP"),
        "bmp_palette": save(palette, "BMP"),
        "tiff_pages": save(
            rgb, "TIFF", save_all=True, append_images=[rgb.rotate(180)], compression="tiff_lzw"
        ),
        "tiff_palette": save(palette, "TIFF"),
        "tiff_rgba": save(rgba, "TIFF"),
        "tiff_cmyk": save(rgb.convert("CMYK"), "TIFF"),
        "tiff_lab": save(rgb.convert("LAB"), "TIFF"),
        "tiff_big": save(rgb, "TIFF", big_tiff=True),
        "tiff_strips": save(rgb, "TIFF", tiffinfo={278: 5}),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"tiff_{compression}"] = save(rgb, "TIFF", compression=compression)
    return files


SAMPLES = samples()
# Their further frames may be cut off without loss.
ANIMATED = {"mpo", "gif_animated", "png_animated", "tiff_pages"}


def kind(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    assert str(caught.value).startswith(f"{caught.value.kind}: ")
    return caught.value.kind


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_and_variants_give_the_same_picture(name: str) -> None:
    image = decode(SAMPLES[name])
    assert (image.dtype, image.shape) == (np.uint8, (24, 40, 3))
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_allclose(image[4:8, 4:16].mean((0, 1)), RED, atol=6)
    np.testing.assert_allclose(
        image.astype(int), PICTURE, atol=100 if "jpeg" in name or name in ("mpo", "webp") else 6
    )
    assert probe(SAMPLES[name]) == (24, 40)
    assert format_of(SAMPLES[name]) == {"mpo": "jpeg"}.get(name, name.partition("_")[0])


@pytest.mark.parametrize(
    ("value", "store"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, 1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, -1)),
    ],
)
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(value: int, store: Callable[[Any], Any], name: str) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(name, {})
    stored = Image.fromarray(np.ascontiguousarray(store(PICTURE)))
    data = save(stored, name, exif=orientation(value), **options)
    np.testing.assert_allclose(decode(data).astype(int), PICTURE, atol=12)
    assert probe(data) == (24, 40)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    samples = np.array([0, 65535, 256, 32768, 40000, 255], ">u2")
    expected = np.array([0, 255, 1, 128, 156, 0], np.uint8)
    grey = decode(png((1, 6), 16, 0, b"\0" + samples.tobytes()))
    np.testing.assert_array_equal(grey, np.repeat(expected[None, :, None], 3, axis=2))
    colour = decode(png((1, 2), 16, 2, b"\0" + samples.tobytes()))
    np.testing.assert_array_equal(colour.reshape(-1), expected)
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (6, 1), samples.astype(order).tobytes())
        np.testing.assert_array_equal(decode(save(image, "TIFF"))[0, :, 0], expected)


def test_transparent_pixels_are_white() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128]]], np.uint8)
    expected = [[10, 20, 30], [255, 255, 255], [132, 137, 142]]
    for name in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if name == "WEBP" else {}
        np.testing.assert_allclose(
            decode(save(Image.fromarray(rgba), name, **options))[0], expected, atol=1
        )
    grey = Image.merge("LA", [Image.fromarray(rgba[..., i]) for i in (0, 3)])
    for name in ("PNG", "TIFF"):
        np.testing.assert_allclose(decode(save(grey, name))[0, :, 0], [10, 255, 132], atol=1)
    deep = struct.pack(">B12H", 0, *(int(value) * 257 for value in rgba.reshape(-1)))
    np.testing.assert_allclose(decode(png((1, 3), 16, 6, deep))[0], expected, atol=1)


def test_palettes_with_transparency() -> None:
    palette = bytes([*RED, *GREEN, *BLUE])
    rows = bytes([0, 0, 1, 2])
    for alphas, expected in (
        (b"", [RED, GREEN, BLUE]),
        (b"\xff\x00", [RED, (255, 255, 255), BLUE]),
        (b"\x00\x80\xff", [(255, 255, 255), (148, 217, 158), BLUE]),
    ):
        extra = [(b"PLTE", palette)] + ([(b"tRNS", alphas)] if alphas else [])
        np.testing.assert_allclose(decode(png((1, 3), 8, 3, rows, *extra))[0], expected, atol=1)
    gif = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    gif.putpalette(palette)
    np.testing.assert_array_equal(
        decode(save(gif, "GIF", transparency=1))[0], [RED, (255, 255, 255), BLUE]
    )


def test_transparent_colours() -> None:
    key = struct.pack(">HHH", *RED)
    rgb = decode(png((1, 2), 8, 2, bytes([0, *RED, *BLUE]), (b"tRNS", key)))
    assert rgb[0].tolist() == [[255, 255, 255], list(BLUE)]
    grey = decode(png((1, 2), 8, 0, bytes([0, 7, 8]), (b"tRNS", b"\0\x07")))
    assert grey[0, :, 0].tolist() == [255, 8]
    deep = decode(png((1, 2), 16, 0, struct.pack(">BHH", 0, 7, 2048), (b"tRNS", b"\0\x07")))
    assert deep[0, :, 0].tolist() == [0, 8]


def test_one_bit() -> None:
    assert decode(png((1, 8), 1, 0, b"\0\xa5"))[0, :, 0].tolist() == [
        255,
        0,
        255,
        0,
        0,
        255,
        0,
        255,
    ]
    bilevel = Image.fromarray(PICTURE).convert("1")
    expected = np.asarray(bilevel.convert("RGB"))
    for data in (
        save(bilevel, "TIFF", compression="group4"),
        save(bilevel, "BMP"),
        save(bilevel, "TIFF"),
    ):
        np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 30_000), (30_000, 1)])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "BMP", "GIF"])
def test_extreme_shapes(size_hw: tuple[int, int], name: str) -> None:
    data = save(Image.new("RGB", size_hw[::-1], GREY), name)
    assert decode(data).shape == (*size_hw, 3)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"This is text, not a picture.", "unknown_format"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "unknown_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unknown_format"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "unknown_format"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\xff\xd8\xff\xd9", "truncated"),
        (b"\xff\xd8\xff\xda\0\x08\x01", "corrupt"),
        (b"\x89PNG\r\n\x1a\n", "corrupt"),
        (b"GIF89a\x01\0\x01\0\0\0\0;", "corrupt"),
        (b"RIFF\x0c\0\0\0WEBPVP8?\0\0\0\0", "corrupt"),
        (b"II*\0\x08\0\0\0\0\0", "corrupt"),
        (b"II+\0\x08\0\0\0" + b"\xff" * 8, "corrupt"),
        (b"BMW", "truncated"),
    ],
)
def test_what_is_no_picture(data: bytes, expected: str) -> None:
    assert kind(data) == expected


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - ANIMATED))
def test_truncated_files_are_refused(name: str, fraction: float) -> None:
    data = SAMPLES[name]
    cut = data[: int(fraction * len(data))]
    with contextlib.suppress(ImageError):  # else only what stands behind the pixels is gone
        np.testing.assert_array_equal(decode(cut), decode(data))


def test_truncated_photo_says_so() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        data = save(Image.fromarray(noise), name)
        assert kind(data[: len(data) * 6 // 10]) == "truncated"


BOMBS = {
    "jpeg": SAMPLES["jpeg"].replace(struct.pack(">HH", 24, 40), struct.pack(">HH", 65_000, 65_000)),
    "png": png((20_000, 20_000), 1, 0, bytes(2501)),
    "bmp": SAMPLES["bmp"].replace(struct.pack("<II", 40, 24), struct.pack("<II", 40_000, 24_000)),
    "gif": b"GIF89a\x01\0\x01\0\0\0\0,"
    + struct.pack("<HHHH", 9_000, 9_000, 800, 800)
    + b"\0\x02\x02L\x01\0;",
    "webp": SAMPLES["webp_lossless"].replace(bytes([39, 0, 0, 23, 0, 0]), b"\xff\x3f\0\xff\x3f\0"),
    "webp_plain": SAMPLES["webp"].replace(
        struct.pack("<HH", 40, 24), struct.pack("<HH", 16_383, 16_383)
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_PLUGINS", {})  # nothing is opened
    assert BOMBS[name] not in SAMPLES.values()
    assert kind(BOMBS[name]) == "too_large"


def test_max_pixels_is_inclusive() -> None:
    for name in SAMPLES:
        assert decode(SAMPLES[name], max_pixels=24 * 40).shape == (24, 40, 3)
        assert kind(SAMPLES[name], max_pixels=24 * 40 - 1) == "too_large"


def test_limit_of_pillow_neither_warns_nor_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (24 * 40 - 1, 10):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for name in ("jpeg", "mpo", "png", "png_animated", "bmp"):
            decode(SAMPLES[name])
        for name in ("tiff_strips", "tiff_packbits", "webp", "gif"):
            assert kind(SAMPLES[name]) == "too_large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for data in SAMPLES.values():
        decode(data)


def test_bmp_without_a_decoder() -> None:
    depth_and_compression = struct.pack("<HI", 24, 0)
    assert SAMPLES["bmp"].count(depth_and_compression) == 1
    as_png = SAMPLES["bmp"].replace(depth_and_compression, struct.pack("<HI", 24, 5))
    assert kind(as_png) == "unsupported"


def test_sizes_that_disagree() -> None:
    """Pillow takes a height whose sign bit is set, but not the seven next to it, as positive."""
    data = save(Image.new("RGB", (1, 24)), "BMP")
    height = struct.pack("<II", 1, 24)
    assert data.count(height) == 1
    assert kind(data.replace(height, struct.pack("<II", 1, 0xFEFF_FF00))) == "corrupt"


def test_out_of_memory_is_an_error_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Image, "new", exhausted)
    assert kind(SAMPLES["png_rgba"]) == "too_large"


def test_error_is_one_bounded_line_and_survives_pickling() -> None:
    error = ImageError("corrupt", "first\nsecond\t" + "x" * 10_000)
    assert str(error).startswith("corrupt: first second xxx")
    assert len(str(error)) < 250
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.kind) == (ImageError, str(error), "corrupt")


def test_many_threads() -> None:
    expected = {name: decode(data) for name, data in SAMPLES.items()}
    names = list(SAMPLES) * 8
    with ThreadPoolExecutor(8) as pool:
        for name, image in zip(
            names, pool.map(decode, (SAMPLES[name] for name in names)), strict=True
        ):
            np.testing.assert_array_equal(image, expected[name])


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut the end off, or change a few bytes: anywhere, near the start, or near the end."""
    where = rng.integers(4)
    if where == 0:
        return data[: rng.integers(len(data))]
    low, high = [(0, len(data)), (0, min(300, len(data))), (max(0, len(data) - 300), len(data))][
        where - 1
    ]
    changed = bytearray(data)
    for position in rng.integers(low, high, rng.integers(1, 8)):
        changed[position] = rng.choice([0, 255, rng.integers(256)])
    return bytes(changed)


@pytest.mark.parametrize("name", SAMPLES)
def test_damage_gives_a_picture_or_an_image_error(name: str) -> None:
    rng = np.random.default_rng(sorted(SAMPLES).index(name))
    for _ in range(60):
        data = damaged(SAMPLES[name], rng)
        with contextlib.suppress(ImageError):
            image = decode(data, max_pixels=1_000_000)
            assert image.dtype == np.uint8
            assert image.shape[2:] == (3,)


def hard_files() -> list[dict[str, Any]]:
    """Unusual and hostile files that may stand beside the repository."""
    manifest = HARD / "manifest.json"
    return json.loads(manifest.read_text())["files"] if manifest.exists() else []


@pytest.mark.parametrize("case", hard_files(), ids=lambda case: case["file"])
def test_hard_files(case: dict[str, Any]) -> None:
    data = (HARD / case["file"]).read_bytes()
    try:
        image = decode(data)
    except ImageError:
        assert "error" in (case["expect"], *case.get("also_accept", ()))
        return
    assert case["expect"] == "ok"
    height, width = case["height"], case["width"]
    assert image.shape == (height, width, 3)
    if "quadrants_rgb" in case:
        rows, columns = np.split(image, [height // 2]), [width // 2]
        means = [part.mean((0, 1)) for row in rows for part in np.split(row, columns, axis=1)]
        np.testing.assert_allclose(means, case["quadrants_rgb"], atol=case["tolerance"])
