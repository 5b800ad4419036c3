"""Who may use the network: one batch is in it, and one more may be got ready for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

Ready = TypeVar("Ready")
Result = TypeVar("Result")


class _Seconds(threading.local):
    """What the calling thread has spent in the network."""

    seconds = 0.0


class Turns:
    """Takes the batches of several threads one by one.

    The memory of the device so holds one batch at work, and at most one that is ready.
    """

    def __init__(self) -> None:
        self.busy = _Seconds()
        # Always taken in this order.
        self._getting_ready, self._network = threading.Lock(), threading.Lock()

    def ahead(self, prepare: Callable[[], Ready], run: Callable[[Ready], Result]) -> Result:
        """Prepare a batch beside the one in the network, and run it next."""
        with ExitStack() as turn:
            with self._getting_ready:
                ready = prepare()
                turn.enter_context(self._network)
            with self._timed():
                return run(ready)

    def alone(self, prepare: Callable[[], Ready], run: Callable[[Ready], Result]) -> Result:
        """Prepare a batch and run it, with nothing of another on the device."""
        with self._getting_ready, self._network, self._timed():
            return run(prepare())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.busy.seconds += time.perf_counter() - started
