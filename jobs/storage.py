"""Places: a URI becomes a `Store` that lists, reads ranges, and puts objects atomically.

`s3://` goes through boto3, because a plan needs etags, reads need `If-Match` in the same request,
and the ledger needs conditional puts, none of which `pyarrow.fs` offers. Local paths and every
other scheme go through `pyarrow.fs`. Keys are taken literally: `#`, `?`, `%` and spaces mean
themselves.
"""

import contextlib
import io
import os
import random
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions
import pyarrow as pa
import pyarrow.fs as pafs
from typing_extensions import override

# Ten attempts with back-off ride out about 25 s of 503s; botocore waits up to 20 s between two.
MAX_ATTEMPTS = 10
# A body that breaks off is not retried by botocore: so many times by us, waiting up to 0.1, 0.2,
# 0.4 ... s.
BODY_ATTEMPTS = 6
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
# Reader tasks fetch loose images with this many threads at most, each with its own connection.
MAX_CONNECTIONS = 64

Result = TypeVar("Result")


class StorageError(OSError):
    """An object or place that cannot be used; the message names it and says what to do."""


class ChangedError(StorageError):
    """An object is no longer the one that was planned."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object.

    Attributes:
        path: Relative to its store.
        size: In bytes.
        etag: Changes whenever the content does.
        modified: Seconds since 1970; 0 where it was not looked up.
    """

    path: str
    size: int
    etag: str
    modified: float = 0


class Store(ABC):
    """A place that holds objects, below one URI. Can be pickled; holds no credentials."""

    uri: str

    @abstractmethod
    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose path starts with `prefix` (a folder, or empty), sorted by path."""

    @abstractmethod
    def info(self, path: str) -> ObjectInfo | None:
        """Return the object at `path`, or None where there is none."""

    @abstractmethod
    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        """Return an object's bytes.

        Args:
            path: Relative to the store.
            span: First byte and the one behind the last; everything where None.
            etag: Where given, what the object must still have.

        Raises:
            FileNotFoundError: There is no such object.
            ChangedError: It has another etag.
            StorageError: It cannot be read, with the reason.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Write an object atomically: readers see the old one or the new one, never a part."""

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one; return whether it was written.

        `data` names its writer: after a lost answer, the object that is there is compared with it.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def open(self, info: ObjectInfo, window: int) -> "WindowedFile":
        """Return the object as a seekable file that fetches `window` bytes or more at a time."""
        return WindowedFile(self, info, window)

    def url(self, path: str) -> str:
        """Return how to name the object at `path` to a person."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri


class WindowedFile(io.RawIOBase):
    """A read-only file over ranged reads, all with the etag that was given."""

    def __init__(self, store: Store, info: ObjectInfo, window: int) -> None:
        self.window = window
        self._store, self._info = store, info
        self._position = 0
        self._buffer_start, self._buffer = 0, b""

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        if base + offset < 0:
            raise ValueError(f"byte {base + offset} lies before the start")
        self._position = base + offset
        return self._position

    @override
    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    @override
    def read(self, size: int | None = -1) -> bytes:
        start, end = self._position, self._info.size
        stop = end if size is None or size < 0 else min(start + size, end)
        if start >= stop:
            return b""
        if start < self._buffer_start or stop > self._buffer_start + len(self._buffer):
            fetch_stop = min(max(stop, start + self.window), end)
            self._buffer = self._store.read(self._info.path, (start, fetch_stop), self._info.etag)
            self._buffer_start = start
        self._position = stop
        return self._buffer[start - self._buffer_start : stop - self._buffer_start]


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
        for info in sorted(found, key=lambda info: info.path):
            path = info.path.lstrip("/").removeprefix(root).lstrip("/")
            yield _object_info(path, info)

    @override
    def info(self, path: str) -> ObjectInfo | None:
        info = self.filesystem.get_file_info(self._full(path))
        return _object_info(path, info) if info.is_file else None

    @override
    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        if etag:
            now = self.info(path)
            if now is not None and now.etag != etag:
                raise ChangedError(_changed(self.url(path)))
        try:
            with self.filesystem.open_input_file(self._full(path)) as file:
                if span is None:
                    return bytes(file.readall())
                data = bytes(file.read_at(span[1] - span[0], span[0]))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.url(path)} does not exist") from None
        except OSError as error:
            raise StorageError(f"{self.url(path)} cannot be read: {error}") from error
        if len(data) != span[1] - span[0]:
            raise ChangedError(_changed(self.url(path)))
        return data

    @override
    def put(self, path: str, data: bytes) -> None:
        if self.filesystem.type_name in ("gcs", "abfs"):
            # Object stores: the object appears whole when the stream is closed.
            with self.filesystem.open_output_stream(self._full(path)) as stream:
                stream.write(data)
        else:
            self.filesystem.move(self._put_aside(path, data), self._full(path))

    @override
    def put_if_absent(self, path: str, data: bytes) -> bool:
        if not isinstance(self.filesystem, pafs.LocalFileSystem):
            # pyarrow.fs has no conditional put. The caller is told in the README: on these schemes
            # start one job at a time on one output.
            if self.info(path) is not None:
                return False
            self.put(path, data)
            return True
        aside = Path(self._put_aside(path, data))
        try:
            os.link(aside, self._full(path))
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    @override
    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self._full(path))

    def _full(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if self.root and path else self.root or path

    def _put_aside(self, path: str, data: bytes) -> str:
        """Write `data` beside `path`, under a name that no reader looks at."""
        folder, slash, name = self._full(path).rpartition("/")
        if folder:
            self.filesystem.create_dir(folder, recursive=True)
        aside = f"{folder}{slash}.{name}.{uuid.uuid4().hex}"
        with self.filesystem.open_output_stream(aside) as stream:
            stream.write(data)
        return aside


class S3Store(Store):
    """A prefix of a bucket of Amazon S3 or of a store that speaks its protocol."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.uri = "s3://" + "/".join(part for part in (bucket, prefix) if part)

    @property
    def _client(self) -> Any:
        return _s3_client(self.endpoint_url)

    @override
    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=start + (f"{prefix}/" if prefix else "")
        )
        with self._errors(prefix):
            for page in pages:
                for found in page.get("Contents", ()):
                    if not found["Key"].endswith("/"):
                        yield ObjectInfo(
                            found["Key"][len(start) :],
                            found["Size"],
                            found["ETag"],
                            found["LastModified"].timestamp(),
                        )

    @override
    def info(self, path: str) -> ObjectInfo | None:
        try:
            with self._errors(path):
                head = self._client.head_object(Bucket=self.bucket, Key=self._key(path))
        except FileNotFoundError:
            return None
        modified = head["LastModified"].timestamp()
        return ObjectInfo(path, head["ContentLength"], head["ETag"], modified)

    @override
    def read(self, path: str, span: tuple[int, int] | None = None, etag: str = "") -> bytes:
        wanted: dict[str, str] = {"Bucket": self.bucket, "Key": self._key(path)}
        if etag:
            wanted["IfMatch"] = etag
        if span is not None:
            wanted["Range"] = f"bytes={span[0]}-{span[1] - 1}"

        def attempt() -> bytes:
            return bytes(self._client.get_object(**wanted)["Body"].read())

        with self._errors(path):
            data = _again_when_broken_off(attempt)
        if span is not None and len(data) != span[1] - span[0]:
            raise ChangedError(_changed(self.url(path)))
        return data

    @override
    def put(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    @override
    def put_if_absent(self, path: str, data: bytes) -> bool:
        try:
            with self._errors(path):
                self._client.put_object(
                    Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*"
                )
        except ChangedError:
            # A lost answer makes botocore repeat the put, which then meets our own object.
            return self.read(path) == data
        return True

    @override
    def delete(self, path: str) -> None:
        with self._errors(path):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path) if part)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn botocore's errors into ones that name the object and say what to do."""
        url = self.url(path)
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = str(error.response["Error"].get("Code"))
            if code in ("404", "NoSuchKey"):
                raise FileNotFoundError(f"{url} does not exist") from error
            if code in ("412", "PreconditionFailed", "416", "InvalidRange"):
                raise ChangedError(_changed(url)) from error
            raise StorageError(f"{url}: {_ADVICE.get(code, code)} ({error})") from error
        except botocore.exceptions.NoCredentialsError as error:
            raise StorageError(f"{url}: {_ADVICE['NoCredentials']}") from error
        except botocore.exceptions.EndpointConnectionError as error:
            raise StorageError(f"{url}: {error}: check --endpoint-url and the network") from error
        except botocore.exceptions.BotoCoreError as error:
            raise StorageError(f"{url}: {error}") from error


_ADVICE = {
    "NoSuchBucket": "the bucket does not exist: check its name and --endpoint-url",
    "403": "access is denied: check the credentials and the bucket's policy",
    "AccessDenied": "access is denied: check the credentials and the bucket's policy",
    "InvalidAccessKeyId": "the access key is unknown to this store: check AWS_ACCESS_KEY_ID",
    "NoCredentials": "no credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or give the machine a role",
}


def open_store(uri: str, endpoint_url: str | None = None) -> Store:
    """Return the place that `uri` names.

    Args:
        uri: A local path, `file://`, `s3://bucket/prefix`, `gs://` or another scheme of
            `pyarrow.fs`.
        endpoint_url: The S3-compatible store; `AWS_ENDPOINT_URL`, then Amazon's, where None.

    Raises:
        ValueError: The URI has no bucket, or a scheme that `pyarrow.fs` does not know.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else uri).absolute()
        return ArrowStore(pafs.LocalFileSystem(), str(path), str(path))
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ValueError(f"{uri!r} names no bucket: write {scheme}://BUCKET/PREFIX")
    if scheme == "s3":
        return S3Store(bucket, prefix.strip("/"), endpoint_url)
    try:
        filesystem, root = pafs.FileSystem.from_uri(f"{scheme}://{bucket}")
    except pa.ArrowInvalid as error:
        raise ValueError(f"cannot use {uri!r}: {error}") from error
    # The slash in front of a root stays: without it HDFS would start at the user's home.
    full = f"{root.rstrip('/')}/{prefix}".rstrip("/") if prefix else root
    return ArrowStore(filesystem, full, uri.rstrip("/"))


def split_uri(uri: str) -> tuple[str, str]:
    """Cut a URI into its folder and the object's name there; a bucket alone has an empty name."""
    folder, slash, name = uri.rstrip("/").rpartition("/")
    if folder.endswith(":/"):
        return uri, ""
    if not folder or folder.endswith("://"):
        folder += slash
    return folder or ".", name


@cache
def _s3_client(endpoint_url: str | None) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        config=botocore.config.Config(
            retries={"mode": "standard", "max_attempts": MAX_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=MAX_CONNECTIONS,
        ),
    )


def _again_when_broken_off(attempt: Callable[[], Result]) -> Result:
    """Call `attempt`, again with back-off and jitter when a body breaks off or arrives damaged."""
    for number in range(BODY_ATTEMPTS - 1):
        with contextlib.suppress(
            botocore.exceptions.ReadTimeoutError,
            botocore.exceptions.ResponseStreamingError,
            botocore.exceptions.IncompleteReadError,
            botocore.exceptions.FlexibleChecksumError,
        ):
            return attempt()
        time.sleep(random.uniform(0, 0.1 * 2**number))
    return attempt()


def _object_info(path: str, info: pafs.FileInfo) -> ObjectInfo:
    modified_ns = info.mtime_ns or 0
    return ObjectInfo(path, info.size, f"{info.size:x}-{modified_ns:x}", modified_ns / 1e9)


def _changed(url: str) -> str:
    return f"{url} changed after it was planned: start a new output to use it as it is now"


def open_uri(uri: str, endpoint_url: str | None = None) -> tuple[Store, str]:
    """Return the folder of an object and the object's name there; folders are remembered."""
    folder, name = split_uri(uri)
    return _remembered_store(folder, endpoint_url), name


@lru_cache(maxsize=1024)
def _remembered_store(folder: str, endpoint_url: str | None) -> Store:
    return open_store(folder, endpoint_url)
