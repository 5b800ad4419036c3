"""Ends a process that makes no progress, also one that hangs in foreign code and holds the GIL."""

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Where the stacks go: a worker's log file.
STDERR = 2
# Setting the alarm anew starts a thread; with 500 images a second that is not for every image.
SLACK = 0.01


class Watchdog:
    """Watches pieces of work in the threads of one process.

    `faulthandler` has one alarm for a process. It is set to the first of all deadlines, writes all stacks
    to the log, and exits: no exception could reach code that hangs in a decoder.
    """

    def __init__(self, limit_s: float) -> None:
        """Make one that lets a piece of work be without progress for `limit_s` seconds."""
        self.limit_s = limit_s
        self._progress: dict[int, float] = {}
        self._alarm = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def watch(self) -> Iterator[Callable[[], None]]:
        """Watch the block, and give what it is to call whenever it has come further."""
        work = threading.get_ident()

        def progress() -> None:
            with self._lock:
                self._progress[work] = time.monotonic()
                self._set()

        progress()
        try:
            yield progress
        finally:
            with self._lock:
                del self._progress[work]
                self._set()

    def _set(self) -> None:
        if not self._progress:
            faulthandler.cancel_dump_traceback_later()
            self._alarm = 0.0
            return
        now = time.monotonic()
        deadline = min(self._progress.values()) + self.limit_s
        # An alarm that comes too soon would end a process that works; one that comes late does not matter
        # much, so it is set at a little more than the limit and left alone for as long as that.
        if self._alarm < deadline:
            self._alarm = deadline + SLACK * self.limit_s
            faulthandler.dump_traceback_later(max(self._alarm - now, SLACK), exit=True, file=STDERR)
