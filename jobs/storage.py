"""Places: a URI becomes a `Store`.

`s3://` is `s3.S3Store`; local paths and every other scheme go through `pyarrow.fs`. Keys are taken
literally: `#`, `?`, `%` and spaces mean themselves.
"""

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
from typing_extensions import override

from jobs import traffic
from jobs.redact import holds_credentials, without_secrets
from jobs.s3 import S3Store
from jobs.store import ObjectInfo, StorageError, Store

# pyarrow's own three attempts give up after 1.5 s of 503s.
S3_ATTEMPTS = 10
# Of a local file, held at once while it is copied.
COPY_BYTES = 8 * 2**20

# What S3 and its like accept, and the names of access points.
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}|arn:[A-Za-z0-9:_-]+")


# What `_put_aside` writes: of a process that was killed meanwhile, a part stays.
_ASIDE = re.compile(r"(?:.*/)?\.[^/]+\.[0-9a-f]{32}", re.DOTALL)


class PipeError(Exception):
    """What lies at a path is a pipe or a device."""


class ArrowStore(Store):
    """Local folders, and every scheme of `pyarrow.fs` but `s3`.

    An etag is size and time of change here; only the size where the file system knows no time.
    """

    def __init__(self, filesystem: pafs.FileSystem, root: str, uri: str) -> None:
        self.filesystem, self.root, self.uri = filesystem, root, uri

    @override
    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        selector = pafs.FileSelector(self._full(prefix), recursive=True, allow_not_found=True)
        try:
            found = [info for info in self.filesystem.get_file_info(selector) if info.is_file]
        except NotADirectoryError:
            return
        root = self.root.strip("/")
        for info in sorted(found, key=self._path_of):
            path = info.path.lstrip("/").removeprefix(root).lstrip("/")
            if not _ASIDE.fullmatch(path):
                yield _object_info(path, info)

    def _refuse_pipe(self, path: str) -> None:
        """Opening one may wait for ever; object stores have none, and would be asked for each read."""
        if not isinstance(self.filesystem, pafs.LocalFileSystem):
            return
        if self.filesystem.get_file_info(self._full(path)).type is pafs.FileType.Unknown:
            raise PipeError(path)

    def _path_of(self, info: pafs.FileInfo) -> str:
        try:
            return str(info.path)
        except UnicodeDecodeError as error:
            raise StorageError(
                f"{self.uri} has a file whose name is no UTF-8, {error.object!r}, which no table can hold: "
                "rename it"
            ) from None

    @override
    def info(self, path: str) -> ObjectInfo | None:
        info = self.filesystem.get_file_info(self._full(path))
        return _object_info(path, info) if info.is_file else None

    @override
    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        if etag:
            now = self.info(path)
            if now is not None and now.etag != etag:
                raise self.changed(path)
        try:
            self._refuse_pipe(path)
            with self.filesystem.open_input_file(self._full(path)) as file:
                data = bytes(
                    file.readall() if span is None else file.read_at(span[1] - span[0], span[0])
                )
        except PipeError:
            raise FileNotFoundError(f"{self.url(path)} is a pipe or a device, no file") from None
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.url(path)} does not exist") from None
        except (OSError, pa.ArrowInvalid) as error:
            if _is_no_file(error):
                raise FileNotFoundError(f"{self.url(path)!r} is no file: {error}") from None
            raise StorageError(f"{self.url(path)} cannot be read: {error}") from error
        traffic.note("read", len(data))
        if span is not None and len(data) != span[1] - span[0]:
            raise self.changed(path)
        return data

    @override
    def put(self, path: str, data: bytes) -> None:
        self._put_parts(path, [data])

    @override
    def put_file(self, path: str, source: Path) -> None:
        with source.open("rb") as file:
            self._put_parts(path, iter(lambda: file.read(COPY_BYTES), b""))

    def _put_parts(self, path: str, parts: Iterable[bytes]) -> None:
        if self.filesystem.type_name in ("gcs", "abfs"):
            # Object stores: the object appears whole when the stream is closed.
            with self.filesystem.open_output_stream(self._full(path)) as stream:
                _write(stream, parts)
        else:
            self.filesystem.move(self._put_aside(path, parts), self._full(path))

    @override
    def put_if_absent(self, path: str, data: bytes) -> bool:
        if not isinstance(self.filesystem, pafs.LocalFileSystem):
            # pyarrow.fs has no conditional put. The caller is told in the README: on these schemes
            # start one job at a time on one output.
            if self.info(path) is not None:
                return False
            self.put(path, data)
            return True
        aside = Path(self._put_aside(path, [data]))
        try:
            os.link(aside, self._full(path))
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    @override
    def put_over(self, path: str, data: bytes, etag: str) -> bool:
        # Between the look and the move lies a moment in which another may write: no file system has a move
        # with a condition.
        now = self.info(path)
        if now is None or now.etag != etag:
            return False
        self.put(path, data)
        return True

    @override
    def keeps_first(self, path: str) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @override
    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self._full(path))

    def _full(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if self.root and path else self.root or path

    def _put_aside(self, path: str, parts: Iterable[bytes]) -> str:
        """Write `parts` beside `path`, under a name that is never listed."""
        folder, slash, name = self._full(path).rpartition("/")
        if folder:
            self.filesystem.create_dir(folder, recursive=True)
        aside = f"{folder}{slash}.{name}.{uuid.uuid4().hex}"
        try:
            with self.filesystem.open_output_stream(aside) as stream:
                _write(stream, parts)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.filesystem.delete_file(aside)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"{self.url(path)} cannot be written, the disk is full: make room, and run the same "
                    "command again to go on"
                ) from error
            raise
        return aside


def _write(stream: pa.NativeFile, parts: Iterable[bytes]) -> None:
    for part in parts:
        stream.write(part)
        traffic.note("written", len(part))


def _is_no_file(error: Exception) -> bool:
    """Say whether a path was a folder's, or can be none of a file: too long, or with a zero byte."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return True
    return isinstance(error, pa.ArrowInvalid) or "directory" in str(error)


def open_store(uri: str, endpoint_url: str | None = None) -> Store:
    """Return the place that `uri` names.

    Args:
        uri: A local path, `file://`, `s3://bucket/prefix`, `gs://` or another scheme of
            `pyarrow.fs`.
        endpoint_url: The S3-compatible store; `AWS_ENDPOINT_URL`, then Amazon's, where None.

    Raises:
        ValueError: The URI has no bucket or one that cannot be, a scheme that `pyarrow.fs` does not
            know, or a password or signature in it: it would stand in plans and manifests.
    """
    if holds_credentials(uri):
        raise ValueError(
            f"{without_secrets(uri)!r} holds credentials: give them by the environment, the machine's "
            "role or a credentials file, and the URI without them"
        )
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else uri).absolute()
        return ArrowStore(pafs.LocalFileSystem(), str(path), str(path))
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ValueError(f"{uri!r} names no bucket: write {scheme}://BUCKET/PREFIX")
    if scheme == "s3":
        if not BUCKET.fullmatch(bucket):
            raise ValueError(f"{bucket!r} is no name of a bucket: write s3://BUCKET/PREFIX")
        return S3Store(bucket, prefix.strip("/"), endpoint_url)
    try:
        filesystem, root = pafs.FileSystem.from_uri(f"{scheme}://{bucket}")
    except pa.ArrowInvalid as error:
        raise ValueError(f"cannot use {uri!r}: {error}") from error
    # The slash in front of a root stays: without it HDFS would start at the user's home.
    full = f"{root.rstrip('/')}/{prefix}".rstrip("/") if prefix else root
    return ArrowStore(filesystem, full, uri.rstrip("/"))


def arrow_location(uri: str, endpoint_url: str | None = None) -> tuple[pafs.FileSystem, str]:
    """Return a place as `pyarrow.fs` names it, for libraries that write by themselves.

    Args:
        uri: See `open_store`.
        endpoint_url: See `open_store`.
    """
    store = open_store(uri, endpoint_url)
    if isinstance(store, ArrowStore):
        return store.filesystem, store.root
    assert isinstance(store, S3Store)
    endpoint = (
        endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    filesystem = pafs.S3FileSystem(
        endpoint_override=endpoint,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
    )
    return filesystem, "/".join(part for part in (store.bucket, store.prefix) if part)


def split_uri(uri: str) -> tuple[str, str]:
    """Cut a URI into its folder and the object's name there; a bucket alone has an empty name."""
    folder, slash, name = uri.rstrip("/").rpartition("/")
    if folder.endswith(":/"):
        return uri, ""
    if not folder or folder.endswith("://"):
        folder += slash
    return folder or ".", name


def lies_within(uri: str, place: str, endpoint_url: str | None = None) -> bool:
    """Say whether `uri` names `place` or something below it, however the two are spelled."""
    inner, outer = (_true_place(open_store(one, endpoint_url).uri) for one in (uri, place))
    return inner.startswith(outer)


def _true_place(uri: str) -> str:
    """Return a folder's URI with a slash; of a local one what links and `..` lead to."""
    return (str(Path(uri).resolve()) if uri.startswith("/") else uri).rstrip("/") + "/"


def open_uri(uri: str, endpoint_url: str | None = None) -> tuple[Store, str]:
    """Return the folder of an object and the object's name there; folders are remembered."""
    folder, name = split_uri(uri)
    return _remembered_store(folder, endpoint_url), name


@lru_cache(maxsize=1024)
def _remembered_store(folder: str, endpoint_url: str | None) -> Store:
    return open_store(folder, endpoint_url)


def _object_info(path: str, info: pafs.FileInfo) -> ObjectInfo:
    modified_ns = info.mtime_ns or 0
    return ObjectInfo(path, info.size, f"{info.size:x}-{modified_ns:x}", modified_ns / 1e9)
