"""What a store is: a place that lists, reads ranges with etags, and puts objects atomically."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override


class StorageError(OSError):
    """An object or place that cannot be used; the message names it and says what to do."""


class ChangedError(StorageError):
    """An object is no longer the one that was planned."""


class DamagedError(StorageError):
    """What was read is not what was written: a checksum says so."""


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
            DamagedError: It does not fit its checksum, where the store has one.
            StorageError: It cannot be read, with the reason.
        """

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Write an object atomically: readers see the old one or the new one, never a part."""

    def put_file(self, path: str, source: Path) -> None:
        """Write a local file as an object, atomically too; real stores do not hold all of it."""
        self.put(path, source.read_bytes())

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one; return whether it was written.

        `data` names its writer: after a lost answer, the object that is there is compared with it.
        """

    @abstractmethod
    def put_over(self, path: str, data: bytes, etag: str) -> bool:
        """Write an object in the place of the one with `etag`; return whether that was there.

        See `put_if_absent` for what `data` has to be.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def keeps_first(self, path: str) -> bool:
        """Say whether `put_if_absent` keeps two writers apart; `path` is written to try it."""
        self.put_if_absent(path, b"first")
        kept = not self.put_if_absent(path, b"second")
        self.delete(path)
        return kept

    def open(self, info: ObjectInfo, window: int) -> "WindowedFile":
        """Return the object as a seekable file that fetches `window` bytes or more at a time."""
        return WindowedFile(self, info, window)

    def url(self, path: str) -> str:
        """Return how to name the object at `path` to a person."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri

    def changed(self, path: str) -> ChangedError:
        """Return the error that says that an object is not the planned one."""
        return ChangedError(
            f"{self.url(path)} changed after it was planned: start a new output to use it as it is now"
        )

    def damaged(self, path: str, why: object) -> DamagedError:
        """Return the error that says that an object does not fit its checksum."""
        return DamagedError(
            f"{self.url(path)} was damaged in transit or in the store ({why}): "
            "if that stays so, put the object there again"
        )


class WindowedFile(io.RawIOBase):
    """A read-only file over ranged reads, all with the etag that was given."""

    def __init__(self, store: Store, info: ObjectInfo, window: int) -> None:
        self.window = window
        self._store, self._info = store, info
        self._position = 0
        self._buffer_start, self._buffer = 0, b""

    @override
    def close(self) -> None:
        # Arrow may hold on to the file.
        self._buffer = b""
        super().close()

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
