import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import tar
from jobs.tar import DamagedTarError, Member

FORMATS = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
BLOCK = tarfile.BLOCKSIZE


def found_in(data: bytes, *, until_end: bool = True) -> tuple[list[Member], str]:
    """The members that were found, and the damage behind them."""
    found: list[Member] = []
    try:
        for member in tar.members(io.BytesIO(data), until_end=until_end):
            found.append(member)
    except DamagedTarError as error:
        return found, str(error)
    return found, ""


def contents(data: bytes, found: list[Member]) -> list[tuple[str, bytes]]:
    return [(m.key, data[m.data_start : m.data_start + m.size]) for m in found]


def info(name: str, kind: bytes, **values: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for attribute, value in values.items():
        setattr(made, attribute, value)
    return made


def resealed(header: bytes) -> bytes:
    """The header with the checksum that it should have."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    "images",
    [
        [("a.jpg", b"one"), ("b.PNG", b""), ("sub/c.webp", bytes(513)), ("d.tiff", bytes(512))],
        [("./a.jpg", b"1"), ("a b/ü 日本#?%.jpeg", b"2"), ("a.jpg", b"again")],
    ],
)
def test_contents(make_tar: Callable[..., bytes], format_: int, images: list[Any]) -> None:
    data = make_tar([*images, ("a.json", b"{}"), ("notes", b"x"), ("a.jpg.txt", b"x")], format_)
    found, damage = found_in(data)
    assert damage == ""
    assert contents(data, found) == [(name.removeprefix("./"), content) for name, content in images]
    assert all(not member.problem for member in found)
    assert [m.stop % BLOCK for m in found] == [0] * len(found)


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(make_tar: Callable[..., bytes], format_: int) -> None:
    names = ["x" * 300 + ".jpg", "/".join(["ü" * 60] * 5) + ".png", "short.jpg"]
    data = make_tar([(name, name.encode()) for name in names], format_)
    found, damage = found_in(data)
    assert damage == ""
    assert contents(data, found) == [(name, name.encode()) for name in names]
    # A span that starts at a member holds all that names it.
    for number, member in enumerate(found):
        span = data[member.start : member.stop]
        (alone,), damage = found_in(span, until_end=False)
        assert damage == ""
        assert contents(span, [alone]) == contents(data, [found[number]])


def test_names_that_are_no_text(make_tar: Callable[..., bytes]) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    for format_ in FORMATS:
        found, damage = found_in(make_tar([(name, b"1")], format_))
        assert damage == ""
        assert [member.key for member in found] == ["caf�.jpg"]
        found[0].key.encode()


def test_what_is_no_file_has_a_problem(make_tar: Callable[..., bytes]) -> None:
    data = make_tar(
        [
            info("folder.jpg", tarfile.DIRTYPE),
            info("soft.jpg", tarfile.SYMTYPE, linkname="a.jpg"),
            info("hard.jpg", tarfile.LNKTYPE, linkname="a.jpg"),
            info("pipe.jpg", tarfile.FIFOTYPE),
            info("soft.txt", tarfile.SYMTYPE, linkname="a.jpg"),
            ("a.jpg", b"1"),
        ]
    )
    found, damage = found_in(data)
    assert damage == ""
    assert [(m.key, m.problem) for m in found] == [
        ("soft.jpg", "a link or a device, not a file"),
        ("hard.jpg", "a link or a device, not a file"),
        ("pipe.jpg", "a link or a device, not a file"),
        ("a.jpg", ""),
    ]


def test_sparse_members_have_a_problem(make_tar: Callable[..., bytes]) -> None:
    plain = make_tar([("sparse.jpg", b"x" * 512), ("b.jpg", b"2")])
    header = bytearray(plain[:BLOCK])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (10_000, 512)
    header[483:495] = b"%011o\0" % 10_512
    data = resealed(bytes(header)) + plain[BLOCK:]
    found, damage = found_in(data)
    assert damage == ""
    assert [(m.key, m.problem) for m in found] == [
        ("sparse.jpg", "a sparse member: store it whole"),
        ("b.jpg", ""),
    ]


def test_an_archive_without_members() -> None:
    assert found_in(bytes(10240)) == ([], "")
    assert found_in(bytes(BLOCK)) == ([], "")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"no tar at all", b"?" * 5000])
def test_no_archive(data: bytes) -> None:
    found, damage = found_in(data)
    assert found == []
    assert damage.startswith("the tar is damaged: ")


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("gzip", gzip.compress),
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
        ("zstd", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_compressed_archives_are_named(
    make_tar: Callable[..., bytes], name: str, compress: Callable[[bytes], bytes]
) -> None:
    found, damage = found_in(compress(make_tar([("a.jpg", bytes(3000))])))
    assert found == []
    assert damage.startswith(f"the tar is compressed ({name}): unpack it to a plain .tar")


def test_a_member_named_like_a_compressed_file(make_tar: Callable[..., bytes]) -> None:
    found, damage = found_in(make_tar([("BZh91AY.jpg", b"1")]))
    assert (len(found), damage) == (1, "")


@pytest.mark.parametrize("format_", FORMATS)
def test_every_cut_is_noticed(make_tar: Callable[..., bytes], format_: int) -> None:
    images = [("a.jpg", bytes(700)), ("ü/b.jpg", b"1"), ("x" * 90 + ".jpg", bytes(512))]
    data = make_tar(images, format_)
    whole, _ = found_in(data)
    end = whole[-1].stop
    for cut in [*range(0, end + BLOCK, 61), *(m.stop for m in whole), end + BLOCK - 1]:
        found, damage = found_in(data[:cut])
        assert damage, cut
        assert found == whole[: len(found)]
        # No member that is there whole is lost.
        assert len(found) >= sum(member.stop <= cut for member in whole)
    assert found_in(data[: end + BLOCK]) == (whole, "")


def test_messages_say_where(make_tar: Callable[..., bytes]) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2")])
    assert "cut off after 1 members, at byte 1024: it has no end mark" in found_in(data[:1024])[1]
    broken = data[:1024] + b"?" + data[1025:]
    assert "a damaged header at byte 1024, after 1 members" in found_in(broken)[1]
    lost = data[:1024] + bytes(BLOCK) + data[1536:]
    assert "goes on behind an end mark at byte 1024, after 1 members" in found_in(lost)[1]
    put_together = data + make_tar([("c.jpg", b"3")])
    assert "several were put together" in found_in(put_together)[1]


def test_long_padding_is_no_damage(make_tar: Callable[..., bytes]) -> None:
    data = make_tar([("a.jpg", b"1")]) + bytes(200_000)
    found, damage = found_in(data)
    assert (len(found), damage) == (1, "")


@pytest.mark.parametrize("format_", FORMATS)
@given(at=st.integers(0, BLOCK - 1), flip=st.integers(1, 255))
def test_a_flipped_header_is_noticed(
    make_tar: Callable[..., bytes], format_: int, at: int, flip: int
) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")], format_)
    whole, _ = found_in(data)
    changed = bytearray(data)
    changed[whole[1].start + at] ^= flip
    found, damage = found_in(bytes(changed))
    assert found[0] == whole[0]
    # A byte behind the digits of the checksum means nothing.
    assert damage or found == whole


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    changes=st.dictionaries(st.integers(0, 4 * BLOCK - 1), st.integers(0, 255), max_size=6),
    reseal=st.booleans(),
)
def test_no_damage_breaks_the_reader(
    make_tar: Callable[..., bytes], format_: int, changes: dict[int, int], reseal: bool
) -> None:
    data = bytearray(make_tar([("ü" * 80 + ".jpg", b"1"), ("b.jpg", b"2")], format_))
    for at, value in changes.items():
        data[at] = value
    if reseal:
        for start in range(0, 4 * BLOCK, BLOCK):
            data[start : start + BLOCK] = resealed(bytes(data[start : start + BLOCK]))
    found, _ = found_in(bytes(data))
    for member in found:
        member.key.encode()
        assert 0 <= member.start < member.data_start <= member.stop


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME),
        *(tarfile.XHDTYPE, tarfile.XGLTYPE),
    ],
)
@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
def test_a_negative_size_ends_the_archive(
    make_tar: Callable[..., bytes], size: int, kind: bytes
) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", bytes(600))])
    header = data[1024:1536]
    number = (256**11 + size).to_bytes(11, "big")
    header = resealed(header[:124] + b"\xff" + number + header[136:156] + kind + header[157:])
    found, damage = found_in(data[:1024] + header + data[1536:])
    assert [member.key for member in found] == ["a.jpg"]
    assert "b.jpg has a negative size" in damage


@pytest.mark.parametrize("left", [0, 100, 504])
def test_a_sparse_map_that_is_cut_off_is_damage(make_tar: Callable[..., bytes], left: int) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", bytes(600))])
    header = data[1024:1536]
    # The map goes on in the next block.
    header = header[:156] + tarfile.GNUTYPE_SPARSE + header[157:482] + b"\1" + header[483:]
    found, damage = found_in(data[:1024] + resealed(header) + bytes(left))
    assert [member.key for member in found] == ["a.jpg"]
    assert "the tar is damaged" in damage


def test_a_global_header_gives_no_sizes(make_tar: Callable[..., bytes]) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])
    harmless = extension(tarfile.XGLTYPE, b"13 comment=xx\n"[:14])
    found, damage = found_in(data[:1024] + harmless + data[1024:])
    assert ([member.key for member in found], damage) == (["a.jpg", "b.jpg", "c.jpg"], "")
    found, damage = found_in(
        data[:1024] + extension(tarfile.XGLTYPE, b"13 size=8000\n") + data[1024:]
    )
    assert [member.key for member in found] == ["a.jpg"]
    assert "a global header gives all members a size" in damage


def test_images_without_a_decoder_have_rows_too(make_tar: Callable[..., bytes]) -> None:
    found, _ = found_in(make_tar([("a.avif", b"1"), ("b.HEIC", b"2"), ("c.jfif", b"3")]))
    assert [member.key for member in found] == ["a.avif", "b.HEIC", "c.jfif"]


def extension(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    """A header with a long name or PAX records in front of the next one."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_extension_headers_without_end_are_damage(
    make_tar: Callable[..., bytes], kind: bytes
) -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2")])
    content = b"name.jpg\0" if kind == tarfile.GNUTYPE_LONGNAME else b"13 comment=xx\n"
    for headers in (extension(kind, content) * 1000, extension(kind, b"", size=2**40)):
        found, damage = found_in(data[:1024] + headers + data[1024:])
        assert [member.key for member in found] == ["a.jpg"]
        assert "the tar is damaged" in damage


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_only_headers_are_read_and_none_is_kept(
    make_tar: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [(f"{number:05d}.jpg", bytes(2000)) for number in range(3000)]
    file = Counting(make_tar(images))
    opened: list[tarfile.TarFile] = []
    whole = tarfile.open

    def noted(*arguments: Any, **options: Any) -> tarfile.TarFile:
        opened.append(whole(*arguments, **options))
        return opened[0]

    monkeypatch.setattr(tarfile, "open", noted)
    found = []
    for member in tar.members(file, until_end=True):
        found.append(member)
        assert len(opened[0].members) <= 1  # type: ignore[attr-defined]
    assert [member.key for member in found] == [name for name, _ in images]
    assert file.num_read < 3000 * (BLOCK + 1) + 20_000


def test_a_span_has_no_end_mark(make_tar: Callable[..., bytes]) -> None:
    data = make_tar([(f"{number}.jpg", bytes(number)) for number in range(5)])
    whole, _ = found_in(data)
    span = data[whole[1].start : whole[3].stop]
    found, damage = found_in(span, until_end=False)
    assert (len(found), damage) == (3, "")
    assert contents(span, found) == contents(data, whole[1:4])
    assert "no end mark" in found_in(span)[1]
