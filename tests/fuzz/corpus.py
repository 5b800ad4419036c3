"""The first inputs of the fuzz targets: small files of every format and variant, made by code."""

import io
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

# Small enough that a mutation hits a header as often as a pixel.
SIZE_HW = (17, 23)


def images() -> dict[str, bytes]:
    """A file for each way through the readers of headers and the decoders."""
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), np.uint8)
    rgb = Image.fromarray(noise)
    rgba, grey, palette = rgb.convert("RGBA"), rgb.convert("L"), rgb.quantize(8)
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "jpeg": _saved(rgb, "JPEG", quality=30, exif=turned),
        "jpeg-grey": _saved(grey, "JPEG", quality=30, restart_marker_blocks=1),
        "jpeg-progressive": _saved(rgb, "JPEG", quality=30, progressive=True),
        "jpeg-cmyk": _saved(rgb.convert("CMYK"), "JPEG", quality=30),
        "mpo": _saved(rgb, "MPO", quality=30, frames=2),
        "png": _saved(rgb, "PNG", exif=turned),
        "png-alpha": _saved(rgba, "PNG"),
        "png-palette": _saved(palette, "PNG", transparency=1),
        "png-deep": _saved(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG"),
        "png-bits": _saved(grey.convert("1"), "PNG"),
        "png-animated": _saved(rgb, "PNG", frames=2),
        "webp": _saved(rgb, "WEBP", quality=30, exif=turned),
        "webp-lossless": _saved(rgba, "WEBP", lossless=True),
        "webp-animated": _saved(rgb, "WEBP", frames=2),
        "gif": _saved(palette, "GIF", transparency=1, comment=b"made by hand"),
        "gif-animated": _saved(palette, "GIF", frames=2),
        "bmp": _saved(rgb, "BMP"),
        "bmp-palette": _saved(palette, "BMP"),
        "bmp-bits": _saved(grey.convert("1"), "BMP"),
        "tiff": _saved(rgb, "TIFF", tiffinfo={274: 6, 278: 5}),
        "tiff-big": _saved(rgb, "TIFF", big_tiff=True),
        "tiff-pages": _saved(rgb, "TIFF", frames=2),
        "tiff-palette": _saved(palette, "TIFF"),
        "tiff-alpha": _saved(rgba, "TIFF"),
        "tiff-deep": _saved(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "TIFF"),
        "tiff-fax": _saved(grey.convert("1"), "TIFF", compression="group4"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"tiff-{compression}"] = _saved(rgb, "TIFF", compression=compression)
    return made


def tars() -> dict[str, bytes]:
    """Archives of each dialect, with all kinds of members, and damaged ones."""
    made = {}
    for name, dialect in (
        ("ustar", tarfile.USTAR_FORMAT),
        ("gnu", tarfile.GNU_FORMAT),
        ("pax", tarfile.PAX_FORMAT),
    ):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=dialect) as archive:
            for member, content in _members(long_names=dialect != tarfile.USTAR_FORMAT):
                archive.addfile(member, io.BytesIO(content))
        # Without most of the padding, where mutations would be wasted.
        end = file.getvalue().rstrip(b"\0")
        data = end.ljust(-(-len(end) // 512) * 512 + 1024, b"\0")
        made |= {name: data, f"{name}-cut": data[: len(data) // 2]}
    return {**made, "zeros": bytes(1024), "empty": b""}


def _members(*, long_names: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    names = ["a.jpg", "./a.jpg", "a.jpg", "b.json", "../c.png", "/d.webp", "ü #?%\n.jpg"]
    for number, name in enumerate([*names, "x" * 300 + ".gif"] if long_names else names):
        content = bytes([number]) * (number * 100)
        member = tarfile.TarInfo(name)
        member.size = len(content)
        yield member, content
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
        member = tarfile.TarInfo(f"{kind.decode()}.jpg")
        member.type, member.linkname = kind, "a.jpg"
        yield member, b""


def _saved(image: Image.Image, codec: str, frames: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    if frames > 1:
        options |= {"save_all": True, "append_images": [image.rotate(180)] * (frames - 1)}
    # A copy: Pillow keeps options of one save for the next.
    image.copy().save(file, codec, **options)
    return file.getvalue()
