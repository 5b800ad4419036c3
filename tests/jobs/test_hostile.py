"""Hostile names, images and archives, through the whole job: each is one row, and no more than that."""

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.__main__ import main
from jobs.storage import open_store
from jobs.store import Store
from segmodel.headers import MAX_JPEG_SCANS

pytestmark = pytest.mark.ray

# What a shell, a URL, a path, a page or a terminal would take for something else.
NAMES = [
    "ü 日本 \U0001f600.jpg",
    "a b#?%20&c=d+e.jpg",
    "line\nbreak\ttab.jpg",
    "$(touch pwned).jpg",
    ";touch pwned;.jpg",
    "'\"`touch pwned`|.jpg",
    "-rf.jpg",
    "back\\slash.jpg",
    "<script>alert(1)</script>.jpg",
    "%2e%2e%2fup.jpg",
    "\u202egpj.exe.jpg",
    "{0} %s {key!r}.jpg",
    "ü" * 100 + ".jpg",
    # 1,000 characters; of a file's own name, 255 bytes are the most.
    "/".join(["x" * 199] * 5)[:996] + ".jpg",
]
TRICKS = ["../../up.jpg", "/etc/passwd.jpg", "a/../../b.jpg", "C:\\x.jpg", "NUL.jpg"]


def predict(source: str, output: str, model: Path, *more: str) -> int:
    return main(
        [
            *("predict", "--input", source, "--output", output, "--model", str(model)),
            *("--score-threshold", "0", "--max-detections", "3", "--max-actors", "1", *more),
        ]
    )


def rows_of(output: str, endpoint: str | None = None) -> list[dict[str, Any]]:
    store = open_store(output, endpoint)
    tables = [
        pq.read_table(io.BytesIO(store.read(found.path)), page_checksum_verification=True)
        for found in store.list_objects("predictions")
    ]
    rows = pa.concat_tables(table.replace_schema_metadata(None) for table in tables).to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return rows


def copied(store: Store, folder: Path) -> str:
    """The predictions as local files, for DuckDB."""
    folder.mkdir()
    for number, found in enumerate(store.list_objects("predictions")):
        (folder / f"{number}.parquet").write_bytes(store.read(found.path))
    return f"{folder}/*.parquet"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str | None]:
    if request.param == "s3":
        bucket = request.getfixturevalue("bucket")
        return bucket.uri, bucket.endpoint_url
    return str(tmp_path), None


@pytest.mark.parametrize("form", ["tar", "loose"])
def test_any_name_is_one_row_and_nothing_else(
    ray_local: None,
    root: tuple[str, str | None],
    form: str,
    tiny_bundle: Path,
    jpeg: Callable[..., bytes],
    make_tar: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "working folder"
    here.mkdir()
    monkeypatch.chdir(here)
    uri, endpoint = root
    source = open_store(f"{uri}/in", endpoint)
    files = {name: jpeg(number) for number, name in enumerate(NAMES)}
    if form == "tar":
        files |= {name: jpeg(number) for number, name in enumerate(TRICKS)}
        source.put("$(touch pwned) ü#.tar", make_tar(files.items()))
    else:
        if endpoint:
            # The tests' server, not S3, finds no object by such a name.
            del files["line\nbreak\ttab.jpg"]
        for name, data in files.items():
            source.put(f"sub #1/{name}", data)
    before = sorted(path.name for path in tmp_path.iterdir())
    more = ("--endpoint-url", endpoint) if endpoint else ()
    assert predict(f"{uri}/in", f"{uri}/out", tiny_bundle, *more) == 0

    rows = rows_of(f"{uri}/out", endpoint)
    assert [row["status"] for row in rows] == ["ok"] * len(files)
    if form == "tar":
        assert {row["key"] for row in rows} == files.keys()
    else:
        assert {f"{row['shard']}/{row['key']}" for row in rows} == {f"sub #1/{n}" for n in files}
    for row in rows:
        # The shard's `#` and `%` are escaped, so that the first `#` ends it.
        shard, _, key = row["image_id"].partition("#")
        assert shard == row["shard"].replace("%", "%25").replace("#", "%23")
        assert key == row["key"]
    pattern = copied(open_store(f"{uri}/out", endpoint), tmp_path / "copy")
    found = duckdb.sql(f"select image_id, key, len(detections) as n from '{pattern}'").fetchall()
    assert sorted(found) == sorted((r["image_id"], r["key"], len(r["detections"])) for r in rows)
    # No name was run, and nothing was written beside the output.
    assert list(here.iterdir()) == []
    expected = {*before, *(() if endpoint else ("out",)), "copy"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def saved(image: Image.Image, codec: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, codec, **options)
    return file.getvalue()


def png_with(data: bytes, name: bytes, body: bytes) -> bytes:
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data[:33] + chunk + data[33:]


def hostile_images() -> dict[str, tuple[bytes, str]]:
    """Name to content and to what becomes of it: `ok`, or the kind of its error."""
    grey = Image.new("RGB", (32, 24), (128, 128, 128))
    png, jpeg = saved(grey, "PNG"), saved(grey, "JPEG", progressive=True)
    last, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    endless = jpeg[:end] + jpeg[last:end] * (10 * MAX_JPEG_SCANS) + jpeg[end:]
    bomb = png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:]
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 65_535, 0x0112, 4, 1, 2**32 - 1, 8)
    absurd = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]
    text = png_with(png, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))
    frames = {"save_all": True, "append_images": [Image.new("P", (32, 24), n) for n in range(99)]}
    made = {f"dot.{codec}": (saved(grey.resize((1, 1)), codec), "ok") for codec in ("jpeg", "png")}
    for name, size_wh in {"wide.png": (30_000, 1), "tall.jpeg": (1, 30_000)}.items():
        codec = name.partition(".")[2].upper()
        made[name] = (saved(grey.resize(size_wh), codec), "ok")
    return {
        **made,
        "bomb.png": (bomb, "too_large"),
        "endless.jpg": (endless, "too_large"),
        "absurd.jpg": (absurd, "ok"),
        "text.png": (text, "ok"),
        "frames.gif": (saved(grey.quantize(4), "GIF", **frames), "ok"),
        "nothing.jpg": (b"", "empty"),
        "page.jpg": (b"<html>404</html>", "unknown_format"),
        "code.jpg": (b"#!/bin/sh\ntouch pwned\n", "unknown_format"),
        "vector.png": (b"<svg onload='alert(1)'/>", "unknown_format"),
        "pickle.jpg": (b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.", "unknown_format"),
    }


def test_hostile_images_and_shards_cost_their_rows_alone(
    ray_local: None,
    tiny_bundle: Path,
    jpeg: Callable[..., bytes],
    make_tar: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    hostile = hostile_images()
    links = []
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        links.append(tarfile.TarInfo(f"link {kind.decode()}.jpg"))
        links[-1].type, links[-1].linkname = kind, "/etc/passwd"
    source = open_store(str(tmp_path / "in"))
    good = [(f"{number}.jpg", jpeg(number)) for number in range(3)]
    source.put("a.tar", make_tar([(name, data) for name, (data, _) in hostile.items()]))
    source.put("b.tar", make_tar([*links, *good]))
    whole = make_tar([*good, *good])
    source.put("c.tar", whole[: len(whole) // 2])
    source.put("d.tar.gz", gzip.compress(make_tar(good)))
    source.put("e.tar.zst", pa.compress(make_tar(good), "zstd", asbytes=True))
    source.put("f.tar", os.urandom(3000))
    assert predict(str(tmp_path / "in"), str(tmp_path / "out"), tiny_bundle) == 0

    rows = rows_of(str(tmp_path / "out"))
    kinds: dict[str, dict[str, str]] = {}
    for row in rows:
        kind = row["error"].partition(":")[0] if row["error"] else "ok"
        kinds.setdefault(row["shard"], {})[row["key"]] = kind
    assert kinds["a.tar"] == {name: kind for name, (_, kind) in hostile.items()}
    assert kinds["b.tar"] == {
        **{link.name: "unreadable" for link in links},
        **{name: "ok" for name, _ in good},
    }
    assert kinds["c.tar"][""] == "shard"
    assert list(kinds["c.tar"].values()).count("ok") >= 2
    for shard in ("d.tar.gz", "e.tar.zst", "f.tar"):
        assert kinds[shard] == {"": "shard"}
    (said,) = [row["error"] for row in rows if row["shard"] == "d.tar.gz"]
    assert "the tar is compressed (gzip): unpack it to a plain .tar" in said
    sizes = {row["key"]: (row["height"], row["width"]) for row in rows if row["shard"] == "a.tar"}
    assert sizes["wide.png"] == (1, 30_000)
    assert sizes["tall.jpeg"] == (30_000, 1)
    assert sizes["dot.png"] == (1, 1)
    for row in rows:
        for found in row["detections"]:
            assert found["segmentation"]["size"] == [row["height"], row["width"]]
