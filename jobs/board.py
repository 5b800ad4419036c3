"""What workers tell the driver while they train: an actor between them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

# Often enough for a person, seldom enough to cost nothing.
POLL_S = 0.5
# Workers need most of a minute to start, and are silent while they evaluate.
QUIET_S = 120.0

Entry = dict[str, Any]


class Board:
    """Runs as an actor: holds what was posted until the driver takes it, and why training cannot go on."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._failure: str | None = None

    def post(self, entry: Entry) -> None:
        """Add an entry."""
        self._entries.append(entry)

    def take(self) -> list[Entry]:
        """Return the entries since the last call."""
        taken, self._entries = self._entries, []
        return taken

    def fail(self, message: str) -> None:
        """Say that trying again would end the same way."""
        self._failure = self._failure or message

    def failure(self) -> str | None:
        """Return the first message given to `fail`."""
        return self._failure


@contextmanager
def watched(
    board: Any, show: Callable[[Entry], None], quiet: Callable[[float], None]
) -> Iterator[None]:
    """Watch a board in a thread while the block runs.

    Args:
        board: Actor of `Board`.
        show: Is called with each entry; all entries by the end of the block.
        quiet: Is called with the seconds since the last entry when there was none for long, again and
            again.
    """
    done = threading.Event()

    def watch() -> None:
        heard = said = time.monotonic()
        while not done.wait(POLL_S):
            entries = ray.get(board.take.remote())
            now = time.monotonic()
            if entries:
                heard = said = now
            elif now - said >= QUIET_S:
                said = now
                quiet(now - heard)
            for entry in entries:
                show(entry)

    thread = threading.Thread(target=watch, name="board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for entry in ray.get(board.take.remote()):
            show(entry)
