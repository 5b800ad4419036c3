"""Images in a tar: names, places, and whether the archive is whole.

`tarfile` parses the headers. It ends quietly at a cut, a damaged header or a lost block, so the end
is checked here: an archive is whole only when zeros follow its last member, and nothing but zeros.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

# How archives begin that were compressed as a whole.
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# What lies behind an end mark is read in pieces of so many bytes.
PADDING_BYTES = 2**16
# Of a header with a long name or PAX records; names have a thousand bytes at most where they are used.
MAX_EXTENSION_BYTES = 2**20
_EXTENSIONS = frozenset(
    {
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    }
)

# PAX records of a global header that would give all members behind it a size that is not theirs.
_SIZE_RECORDS = frozenset({"size", "GNU.sparse.size", "GNU.sparse.realsize"})

# Those without a decoder here too: a row that says so is better than none.
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
        *(".avif", ".heic", ".heif", ".jp2", ".jxl"),
    }
)


class DamagedTarError(ValueError):
    """The archive ends or breaks off where it should not."""


@dataclass(frozen=True)
class Member:
    """One image of a tar.

    Attributes:
        key: Its name there, without a leading `./`.
        start: First byte of its header.
        data_start: First byte of its content.
        size: Bytes of its content.
        problem: Why it cannot be read (a link, a sparse file), or empty.
    """

    key: str
    start: int
    data_start: int
    size: int
    problem: str

    @property
    def stop(self) -> int:
        """The byte behind its last block of 512."""
        return self.data_start + -(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def is_image(name: str) -> bool:
    """Say whether a file of this name is taken for an image; its content decides later what it is."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def members(file: BinaryIO, *, until_end: bool) -> Iterator[Member]:
    """Yield the images of a tar in their order. Only headers are read.

    Args:
        file: Seekable, at the start of a header.
        until_end: Demand the end-of-archive mark; False for a span cut out of an archive.

    Raises:
        DamagedTarError: After the last readable member, where the archive is not whole.
    """
    start = file.tell()
    try:
        archive = tarfile.open(  # noqa: SIM115 - not ours
            fileobj=file, mode="r:", encoding="utf-8", tarinfo=_Header
        )
        count = 0
        while (info := _next(archive)) is not None:
            count += 1
            if is_image(info.name) and not info.isdir():
                yield Member(
                    _text(info.name), info.offset, info.offset_data, info.size, _problem(info)
                )
            # A TarFile remembers every member that it has seen; a shard may hold 100,000.
            archive.members.clear()  # type: ignore[attr-defined]
    # IndexError: `tarfile` looks into the block of a sparse member's map, which may be cut off.
    except (
        *(tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, IndexError),
    ) as error:
        problem = _compression(file, start) or f"the tar is damaged: {error}"
        raise DamagedTarError(problem) from error
    if until_end:
        _check_end(file, archive.offset, count)


class _Header(tarfile.TarInfo):
    """A header; `tarfile` reads what long names and PAX records say they are long at once."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            # `tarfile` would step back, or read all that follows.
            raise tarfile.ReadError(f"{_text(self.name)} has a negative size")
        if self.type in _EXTENSIONS and self.size > MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"an extension header has {self.size} bytes")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        if _SIZE_RECORDS & archive.pax_headers.keys():
            raise tarfile.ReadError("a global header gives all members a size")
        return found


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    info = archive.next()
    if info is not None and (info.size < 0 or archive.offset <= info.offset):
        # `tarfile` would step back, and read the same header for ever.
        raise tarfile.ReadError(f"{_text(info.name)} has a negative size")
    return info


def _compression(file: BinaryIO, start: int) -> str:
    """Return what to say about an archive that was compressed as a whole, or an empty string."""
    file.seek(start)
    first = file.read(8)
    for magic, name in COMPRESSED.items():
        if first.startswith(magic):
            return f"the tar is compressed ({name}): unpack it to a plain .tar, whose images can be reached"
    return ""


def _check_end(file: BinaryIO, offset: int, count: int) -> None:
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DamagedTarError(
            f"the tar is cut off after {count} members, at byte {offset}: it has no end mark"
        )
    if any(block):
        raise DamagedTarError(
            f"the tar has a damaged header at byte {offset}, after {count} members"
        )
    while block := file.read(PADDING_BYTES):
        if block.strip(b"\0"):
            raise DamagedTarError(
                f"the tar goes on behind an end mark at byte {offset}, after {count} members: several "
                "were put together, or a block is lost"
            )


def _problem(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "a sparse member: store it whole"
    if not info.isreg():
        return "a link or a device, not a file"
    return ""


def _text(name: str) -> str:
    """Make a name of any bytes one that a table can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").removeprefix("./")
