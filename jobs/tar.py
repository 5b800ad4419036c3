"""Images in a tar: names, places, and whether the archive is whole.

`tarfile` parses the headers. It ends quietly at a cut or a damaged header, so the end is checked here:
an archive is whole only when a block of zeros follows its last member.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"})


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
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` belongs to the caller
        count = 0
        while (info := archive.next()) is not None:
            count += 1
            if is_image(info.name) and not info.isdir():
                yield Member(
                    _text(info.name), info.offset, info.offset_data, info.size, _problem(info)
                )
            # A TarFile remembers every member that it has seen; a shard may hold 100,000.
            archive.members.clear()  # type: ignore[attr-defined]
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DamagedTarError(f"the tar is damaged: {error}") from error
    if until_end:
        _check_end(file, archive.offset, count)


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


def _problem(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "a sparse member: store it whole"
    if not info.isreg():
        return "a link or a device, not a file"
    return ""


def _text(name: str) -> str:
    """Make a name of any bytes one that a table can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").removeprefix("./")
