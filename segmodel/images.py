"""Bytes of an image file to upright RGB pixels, or to one clear error.

The content decides, never the name. JPEG (of a multi-picture file the first), PNG, WebP, TIFF
(first page), BMP and GIF (first frame) are read; no other parser of Pillow can be reached. Colours
are taken as stored: embedded profiles are not applied, as in the usual data sets and weights.
"""

import io
import struct
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
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

__all__ = ["MAX_PIXELS", "PEAK_BYTES_PER_PIXEL", "ImageError", "Kind", "decode", "probe"]

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
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    header = _read_header(data)
    _check_size(header, max_pixels)
    try:
        image = _to_rgb(_load(header))
        if header.orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[header.orientation])
        return np.array(image)
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
