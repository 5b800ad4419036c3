"""Bytes of an image file to upright RGB pixels, or to one clear error.

The content decides, never the name. JPEG (of a multi-picture file the first), PNG, WebP, TIFF
(first page), BMP and GIF (first frame) are read; no other parser of Pillow can be reached. Colours
are taken as stored: embedded profiles are not applied, as in the usual data sets and weights.

JPEGs go through libjpeg-turbo's own interface (`simplejpeg`) first, which gives Pillow's pixels without
its copies; whatever it does not take at once is left to Pillow, whose words become the error.
"""

import io
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from segmodel import headers, tiff
from segmodel.headers import Format, Header, ImageError, Kind

__all__ = [
    "MAX_PIXELS",
    "PEAK_BYTES_PER_PIXEL",
    "ImageError",
    "Kind",
    "Picture",
    "decode",
    "decode_reduced",
    "probe",
]

# 89 megapixels, what Pillow opens without a warning: whatever others read quietly is read here too.
MAX_PIXELS = 1024**3 // 4 // 3

# The most memory that decoding takes at once for each pixel, result included, besides the file
# itself and one copy of it. Measured over the variants of each format, at 6 megapixels: JPEG and
# TIFF 10.4, 12.3 as CMYK with the coefficients of a progressive one or with alpha; PNG 10.5, 12.1
# with alpha; WebP 18.3, animated with alpha 20.2; BMP and GIF 10.3. At `MAX_PIXELS` that is 0.9 to
# 1.1 GiB for each decoding thread, and 1.8 GiB for WebP.
PEAK_BYTES_PER_PIXEL: Mapping[Format, int] = {
    "jpeg": 13,
    "png": 13,
    "webp": 21,
    "tiff": 13,
    "bmp": 11,
    "gif": 11,
}

_READERS: tuple[tuple[bytes, Callable[[bytes], Header]], ...] = (
    (b"\xff\xd8\xff", headers.jpeg),
    (b"\x89PNG\r\n\x1a\n", headers.png),
    (b"RIFF", headers.webp),
    (b"II*\0", tiff.read),
    (b"MM\0*", tiff.read),
    (b"II+\0", tiff.read),  # BigTIFF; Pillow takes the big-endian one for a damaged TIFF
    (b"GIF87a", headers.gif),
    (b"GIF89a", headers.gif),
    (b"BM", headers.bmp),
)

# Pillow's classes themselves and not `Image.open`, which warns (a matter of global state) at sizes
# that a caller may well allow, and of which every other plugin is one `formats` away.
_PLUGINS: Mapping[Format, type[ImageFile]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
    "tiff": TiffImageFile,
    "bmp": BmpImageFile,
    "gif": GifImageFile,
}

# What Pillow raises for bad bytes: OSError and SyntaxError by intent; ValueError for sizes, offsets
# and palettes that do not fit; of a TIFF, TypeError for a stride that is no whole number and
# OverflowError for an offset of 64 bits; DecompressionBombError where it reads another size than the
# readers of headers did.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, OverflowError),
    Image.DecompressionBombError,
)

# How to bring a picture upright, by EXIF orientation (CIPA DC-008, tag 0x0112).
_UPRIGHT: Mapping[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}

# Of four channels libjpeg-turbo makes no RGB, and there are two opinions on what is ink in them.
_TURBO_COLOURS = ("YCbCr", "RGB", "Gray")
# libjpeg-turbo has vector instructions for these reductions, not for 8/7 and the like.
_REDUCTIONS = (2, 4, 8)


class Picture(NamedTuple):
    """A decoded picture that may have fewer pixels than its file.

    Attributes:
        pixels: (h, w, 3) uint8, RGB, upright, C-contiguous and writable.
        size_hw: Height and width of the upright picture in the file.
    """

    pixels: npt.NDArray[np.uint8]
    size_hw: tuple[int, int]


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode an image file.

    Memory: at most `PEAK_BYTES_PER_PIXEL` (13 for JPEG, PNG and TIFF, 21 for WebP, 11 for BMP and
    GIF) times `max_pixels`, and a copy of the file. Time grows with pixels and bytes; a JPEG may
    have `headers.MAX_JPEG_SCANS` scans.

    Args:
        data: The whole file.
        max_pixels: Width times height above which nothing is decoded.

    Returns:
        (H, W, 3) uint8, RGB, upright, C-contiguous and writable.

    Raises:
        ImageError: The file cannot be read whole; `kind` says why.
    """
    return decode_reduced(data, max_pixels, None).pixels


def decode_reduced(
    data: bytes, max_pixels: int, needed: Callable[[tuple[int, int]], tuple[int, int]] | None
) -> Picture:
    """Decode an image file, a JPEG perhaps smaller than it is.

    A JPEG whose sides are at least twice as long as needed is scaled while it is decoded, by one of
    libjpeg's powers of two: its blocks of 8 x 8 pixels become blocks of 4, 2 or 1, which are then their
    mean as the cosine transform has it, and not every second pixel.

    Args:
        data: The whole file.
        max_pixels: As for `decode`; what the file states counts.
        needed: What height and width are enough for an upright picture of a height and width; where
            None, nothing is reduced.

    Raises:
        ImageError: The file cannot be read whole; `kind` says why.
    """
    header = _read_header(data)
    _check_size(header, max_pixels)
    try:
        pixels = _pixels(header, _reduction(header, needed))
        return Picture(_upright(pixels, header.orientation), header.upright_hw)
    except ImageError:
        raise
    except MemoryError as error:
        height, width = header.size_hw
        raise ImageError("too_large", f"no memory for {width} x {height} pixels") from error
    except _DAMAGE as error:
        raise ImageError(_kind(str(error)), str(error)) from error


def probe(data: bytes) -> tuple[int, int]:
    """Return the height and width of the upright picture, from the header alone.

    Raises:
        ImageError: The header cannot be read.
    """
    return _read_header(data).upright_hw


def format_of(data: bytes) -> Format:
    """Return what an image is, from the header alone.

    Raises:
        ImageError: The header cannot be read.
    """
    return _read_header(data).format


def _read_header(data: bytes) -> Header:
    if not data:
        raise ImageError("empty", "zero bytes")
    reader = next((reader for magic, reader in _READERS if data.startswith(magic)), None)
    if reader is None or (reader is headers.webp and data[8:12] != b"WEBP"):
        raise ImageError("unknown_format", f"an image does not begin with {data[:12]!r}")
    try:
        header = reader(data)
    except (struct.error, IndexError) as error:
        raise ImageError("truncated", "the file ends inside its header") from error
    except OverflowError as error:
        raise ImageError("corrupt", "an offset of 64 bits points outside of any file") from error
    if min(header.size_hw) < 1:
        raise ImageError("corrupt", f"{header.size_hw[1]} x {header.size_hw[0]} pixels")
    return header


def _check_size(header: Header, max_pixels: int) -> None:
    # While decoding these, Pillow warns or fails by its own, global limit.
    if header.format in ("tiff", "webp", "gif") and Image.MAX_IMAGE_PIXELS is not None:
        max_pixels = min(max_pixels, Image.MAX_IMAGE_PIXELS)
    if header.num_pixels > max_pixels:
        height, width = header.size_hw
        raise ImageError("too_large", f"{width} x {height} pixels, more than {max_pixels} in all")


def _kind(message: str) -> Kind:
    """Pillow has the same exceptions for all of these; only its words differ."""
    message = message.lower()
    if "truncated" in message:
        return "truncated"
    if "unsupported" in message or "unknown pixel mode" in message:
        return "unsupported"
    return "corrupt"


def _reduction(header: Header, needed: Callable[[tuple[int, int]], tuple[int, int]] | None) -> int:
    """Return by what a JPEG's sides may be divided while it is decoded: 1, 2, 4 or 8."""
    if needed is None or header.format != "jpeg":
        return 1
    enough = needed(header.upright_hw)
    most = min(have // want for have, want in zip(header.upright_hw, enough, strict=True))
    return max((n for n in _REDUCTIONS if n <= most), default=1)


def _pixels(header: Header, reduction: int) -> npt.NDArray[np.uint8]:
    if header.format == "jpeg":
        pixels = _turbo(header, reduction)
        if pixels is not None:
            return pixels
    return np.array(_to_rgb(_load(header)))


def _turbo(header: Header, reduction: int) -> npt.NDArray[np.uint8] | None:
    """Decode a JPEG with libjpeg-turbo, by the methods that Pillow asks it for too.

    Returns:
        (h, w, 3) uint8; None for what Pillow is to decode or to refuse: four channels, and whatever
        libjpeg-turbo has a word to say about.
    """
    height, width = (-(-side // reduction) for side in header.size_hw)
    try:
        stated_h, stated_w, colours, _ = simplejpeg.decode_jpeg_header(header.data)
        if (stated_h, stated_w) != header.size_hw or colours not in _TURBO_COLOURS:
            return None
        pixels = simplejpeg.decode_jpeg(
            header.data, "RGB", min_height=height, min_width=width, min_factor=reduction
        )
    except ValueError:
        return None
    return cast("npt.NDArray[np.uint8]", pixels)


def _upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _load(header: Header) -> ImageFile:
    image = _PLUGINS[header.format](io.BytesIO(header.data))
    if image.size != header.size_hw[::-1]:
        raise ImageError("corrupt", "the header states two sizes")
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as a person would see it on a white page, in mode RGB.

    Transparent pixels become white, because this is what is seen where pictures are labelled and
    published; the colours that are stored below them are leftovers, mostly black, that nobody saw.
    """
    if image.mode in ("I", "F"):
        raise ImageError("unsupported", "signed, 32-bit or float samples have no agreed white")
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "La":  # Pillow has no way from here to RGBA
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(rgba, mask=rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits, as Pillow does for 16-bit colours.

    The range is the type's, 16 bits or a TIFF's 12, not the picture's own, so that pictures of one
    set stay comparable.
    """
    num_bits, is_inverted = 16, False
    if isinstance(image, TiffImageFile):
        num_bits = image.tag_v2[BITSPERSAMPLE][0]
        is_inverted = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    grey = (np.asarray(image) >> (num_bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if is_inverted else grey)
